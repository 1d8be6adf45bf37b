"""EfficientTrain in the Hugging Face Trainer: ``Trainer(..., callbacks=[Curriculum(plan)])``."""

from __future__ import annotations

from typing import Any

from torch import nn

from curriculum.live import LiveCurriculum
from curriculum.plan import Plan

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "curriculum.integrations.transformers needs packages: pip install transformers accelerate"
    ) from error


class Curriculum(TrainerCallback):
    """The Trainer's model follows the plan's input sizes; its images (``pixel_values``) are reduced on the device.

    The plan counts optimizer steps, so ``TrainingArguments(max_steps=...)`` must be its number. The learning rate is
    the Trainer's own matter: ``optimizers=(optimizer, LambdaLR(optimizer, lambda step: plan.lr_at(min(step,
    plan.total_steps - 1)) / plan.lr))`` gives the plan's. ``live`` (:class:`curriculum.LiveCurriculum`) tells what was
    seen and saved once training began.

    Args:
        plan: from :func:`curriculum.build_plan`; its batch is the images of all devices and accumulated batches.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.live: LiveCurriculum | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Raises ValueError where the Trainer's steps are not the plan's, or the model cannot take its sizes."""
        if state.max_steps != self.plan.total_steps:
            raise ValueError(
                f"TrainingArguments: max_steps is {state.max_steps}; the plan has {self.plan.total_steps} optimizer "
                "steps; write max_steps=plan.total_steps"
            )
        optimizer = kwargs.get("optimizer")
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self.live = LiveCurriculum(self.plan, model, optimizer, wrapped=args.world_size > 1)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.live.start_step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """The record of this moment, in ``trainer.state.log_history`` too, gets the input size."""
        if self.live is not None and self.live.input_size is not None and state.log_history:
            state.log_history[-1]["input_size"] = self.live.input_size

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.live.close()
