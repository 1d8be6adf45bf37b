"""EfficientTrain with Hugging Face Accelerate: ``live = follow(accelerator, plan, model, optimizer)``."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from curriculum.live import LiveCurriculum
from curriculum.plan import Plan

try:
    from accelerate import Accelerator, DistributedType
except ImportError as error:
    raise ImportError("curriculum.integrations.accelerate needs a package: pip install accelerate") from error

STATE = "curriculum.json"  # in each folder of accelerator.save_state
TYPES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def follow(
    accelerator: Accelerator, plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Any = None
) -> LiveCurriculum:
    """The curriculum of a model on the accelerator's device: call ``live.wrapped``, under ``accelerator.autocast()``.

    Do not give the model itself to ``accelerator.prepare``: its parameters may change their shape, so it is wrapped
    here, and again at each stage. ``save_state`` and ``load_state`` hold it all the same, and give it its size.

    Raises:
        ValueError: the accelerator shards the model, or the model cannot take one of the plan's sizes.
    """
    if accelerator.distributed_type not in TYPES:
        raise ValueError(f"the curriculum changes parameters, which {accelerator.distributed_type} shards: use DDP")
    model.to(accelerator.device)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else None
    wrap = partial(DistributedDataParallel, device_ids=devices) if accelerator.num_processes > 1 else None
    live = LiveCurriculum(plan, model, optimizer, ema, wrap)

    def save(models: Any, weights: Any, folder: str) -> None:
        if accelerator.is_main_process:
            (Path(folder) / STATE).write_text(json.dumps(live.state_dict()), encoding="utf-8")

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(
        lambda models, folder: live.load_state_dict(json.loads((Path(folder) / STATE).read_text(encoding="utf-8")))
    )
    accelerator.register_for_checkpointing(model)
    return live
