"""EfficientTrain in the Hugging Face Trainer: ``Trainer(..., callbacks=[Curriculum(plan)])``."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from curriculum.live import LiveCurriculum
from curriculum.plan import Plan
from curriculum.resize import InputSizeError, check_input_sizes

try:
    from transformers import TrainerCallback
except ImportError as error:
    needs = "curriculum.integrations.transformers needs packages: pip install transformers accelerate"
    raise ImportError(needs) from error

STATE = "curriculum.json"  # in each of the Trainer's checkpoints


class Curriculum(TrainerCallback):
    """The Trainer's model follows the plan's input sizes; its images (``pixel_values``) are reduced on the device.

    The plan counts optimizer steps, so ``TrainingArguments(max_steps=...)`` must be its number. The learning rate is
    the Trainer's own matter: ``optimizers=(optimizer, LambdaLR(optimizer, lambda step: plan.lr_at(min(step,
    plan.total_steps - 1)) / plan.lr))`` gives the plan's. ``live`` (:class:`curriculum.LiveCurriculum`) tells what was
    seen and saved once training began. Of a model that is built for one size (ViT, DeiT, BEiT), ``config.image_size``
    follows, so that what is saved can be loaded. To resume, call :meth:`resume` first.

    Args:
        plan: from :func:`curriculum.build_plan`; its batch is the images of all devices and accumulated batches.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.live: LiveCurriculum | None = None
        self._resumed: dict[str, Any] | None = None

    def resume(self, model: nn.Module, checkpoint: str | Path) -> None:
        """Gives the model the size of a checkpoint's weights, and the weights: ``trainer.train`` loads them next, but
        in transformers 5 not those whose names ``save_pretrained`` changed (all layers of a ViT), and only warns."""
        self._resumed = json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))
        live = self._make(model)
        live.load_state_dict(self._resumed)
        live.close()
        if hasattr(model, "from_pretrained"):
            model.load_state_dict(type(model).from_pretrained(checkpoint).state_dict())

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        """Raises ValueError where the Trainer's steps are not the plan's, or the model cannot take its sizes."""
        if state.max_steps != (steps := self.plan.total_steps):
            asked = f"TrainingArguments(max_steps={state.max_steps})"
            raise ValueError(f"{asked}: the plan has {steps} optimizer steps; write max_steps=plan.total_steps")
        self.live, resumed, self._resumed = self._make(model, args.world_size > 1), self._resumed, None
        if resumed is not None:
            self.live.load_state_dict(resumed)
        self.live.optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.live.start_step(state.global_step)
        if hasattr(self.live.model, "rebuild") and hasattr(self.live.model, "config"):
            self.live.model.config.image_size = self.live.input_size

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
            (checkpoint / STATE).write_text(json.dumps(self.live.state_dict()), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """The record of this moment, in ``trainer.state.log_history`` too, gets the input size."""
        if self.live and self.live.input_size and state.log_history:
            state.log_history[-1]["input_size"] = self.live.input_size

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.live.close()

    def _make(self, model: nn.Module, is_wrapped: bool = False) -> LiveCurriculum:
        teach_sizes(model, [stage.input_size for stage in self.plan.stages])
        return LiveCurriculum(self.plan, model, is_wrapped=is_wrapped)


def teach_sizes(model: nn.Module, sizes: list[int]) -> None:
    """Gives a model of transformers that does not take the sizes a way to be built anew for another."""
    size = getattr(getattr(model, "config", None), "image_size", None)
    if not isinstance(size, int) or hasattr(model, "rebuild"):
        return
    try:
        model.input_size = size
        check_input_sizes(model, sizes)
    except InputSizeError:
        model.rebuild, model.takes_size = partial(_rebuild, type(model), model.config), True


def _rebuild(kind: type[nn.Module], config: Any, size: int) -> nn.Module:
    config = copy.deepcopy(config)
    config.image_size = size
    return kind(config)
