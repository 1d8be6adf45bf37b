"""EfficientTrain in PyTorch Lightning: ``Trainer(max_steps=plan.total_steps, callbacks=[Curriculum(plan, "net")])``."""

from __future__ import annotations

from typing import Any

from torch import nn

from curriculum.live import LiveCurriculum
from curriculum.plan import Plan

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError("curriculum.integrations.lightning needs a package: pip install lightning") from error


class Curriculum(Callback):
    """The LightningModule's network follows the plan's input sizes; its images are reduced on the device.

    The plan counts optimizer steps, so ``max_steps`` must be its number. The learning rate is the module's own matter:
    ``LambdaLR(optimizer, lambda step: plan.lr_at(min(step, plan.total_steps - 1)) / plan.lr)`` at interval "step"
    gives the plan's. ``live`` (:class:`curriculum.LiveCurriculum`) tells what was seen and saved once training began.

    Args:
        plan: from :func:`curriculum.build_plan`; its batch is the images of all devices and accumulated batches.
        network: name of the module's attribute that holds the network; "" for the module itself.
        ema: name of the attribute that holds its moving average.
    """

    def __init__(self, plan: Plan, network: str, ema: str | None = None) -> None:
        self.plan, self.network, self.ema = plan, network, ema
        self.live: LiveCurriculum | None = None

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Raises ValueError where the trainer's steps are not the plan's, or the network cannot take its sizes."""
        if trainer.max_steps != self.plan.total_steps:
            raise ValueError(
                f"Trainer(max_steps={trainer.max_steps}): the plan has {self.plan.total_steps} optimizer steps; "
                "write max_steps=plan.total_steps"
            )
        if len(trainer.optimizers) != 1:
            raise ValueError(f"the curriculum follows one optimizer, the module has {len(trainer.optimizers)}")
        ema = getattr(pl_module, self.ema) if self.ema else None
        several = trainer.world_size > 1  # then a wrapper holds the whole module
        self.live = LiveCurriculum(
            self.plan, pl_module.get_submodule(self.network), trainer.optimizers[0], ema, wrapped=several
        )

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        epoch = self.live.start_step(trainer.global_step)
        pl_module.log("input_size", float(epoch.input_size))

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        self.live.close()
