"""EfficientTrain in PyTorch Lightning: ``Trainer(max_steps=plan.total_steps, callbacks=[Curriculum(plan, "net")])``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from curriculum.live import LiveCurriculum
from curriculum.plan import Plan
from curriculum.sampler import CurriculumSampler

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

    To resume (``trainer.fit(..., ckpt_path=...)``), the module's ``on_load_checkpoint`` must call :meth:`resume`.

    Args:
        plan: from :func:`curriculum.build_plan`; its batch is the images of all devices and accumulated batches.
        network: name of the module's attribute that holds the network; "" for the module itself.
        ema: name of the attribute that holds its moving average.
    """

    def __init__(self, plan: Plan, network: str, ema: str | None = None) -> None:
        self.plan, self.network, self.ema = plan, network, ema
        self.live: LiveCurriculum | None = None
        self._resumed: LiveCurriculum | None = None

    def resume(self, pl_module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
        """Gives the network the input size of the checkpoint's weights, which Lightning loads next."""
        self._resumed = self._make(pl_module)
        self._resumed.load_state_dict(checkpoint["callbacks"][self.state_key])

    def state_dict(self) -> dict[str, Any]:
        return self.live.state_dict() if self.live else {}

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Raises ValueError where the trainer's steps are not the plan's, or the network cannot take its sizes."""
        if trainer.max_steps != self.plan.total_steps:
            raise ValueError(
                f"Trainer(max_steps={trainer.max_steps}): the plan has {self.plan.total_steps} optimizer steps; "
                "write max_steps=plan.total_steps"
            )
        if len(trainer.optimizers) != 1:
            raise ValueError(f"the curriculum follows one optimizer, the module has {len(trainer.optimizers)}")
        self.live, self._resumed = self._resumed or self._make(pl_module), None
        self.live.optimizer = trainer.optimizers[0]

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        epoch = self.live.start_step(trainer.global_step)
        pl_module.log("input_size", float(epoch.input_size))

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        self.live.close()

    def _make(self, pl_module: nn.Module) -> LiveCurriculum:
        ema = getattr(pl_module, self.ema) if self.ema else None
        several = pl_module.trainer.world_size > 1  # then a wrapper holds the whole module
        return LiveCurriculum(self.plan, pl_module.get_submodule(self.network), ema=ema, is_wrapped=several)


class RunLoader(DataLoader):
    """The batches of a whole run, which begin at the sampler's ``start_step``.

    Lightning wants the number of all of them, those from before a resume too, and ends where it has counted that many.
    """

    def __init__(self, data: Dataset, sampler: CurriculumSampler, **kwargs: Any) -> None:
        super().__init__(data, batch_sampler=sampler, **kwargs)

    def __len__(self) -> int:
        return self.batch_sampler.plan.total_steps
