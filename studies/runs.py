"""A run's output folder, read back: settings, plan, data and the models of its checkpoints, at the base size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from config import Config
from config.checks import check_settings
from config.command_line import parse_config
from curriculum import Plan, set_input_size
from datasets import Source, build_source, eval_loader
from inputs.finish import Finish
from inputs.transforms import EvalTransform
from inputs.views import View
from models import checkpoints
from models.registry import check_name_from_file
from models.weights import nonfinite
from training.build import make_finish, make_model, make_plan, number_of_classes
from training.resume import size_of_weights


class RunFolder:
    """What main.py left in an output folder.

    Args:
        path: the folder.
        data_path: where its data lie now; None: where they lay then.
        model: its model; None: what its settings say, which must then be one of the registry's.

    Raises:
        ValueError: no run, or its data are not there.
    """

    def __init__(self, path: Path, data_path: str | None = None, model: str | None = None) -> None:
        if not (path / "config.yaml").exists():
            raise ValueError(f"{path} holds no run (no config.yaml)")
        self.path = path
        config: Config = parse_config(["--recipe", str(path / "config.yaml"), *(["--model", model] if model else [])])
        check_settings(config)
        if model is None:
            check_name_from_file(config.model, config.model_args, str(path / "config.yaml"))
        self.config = replace(config, data_path=data_path or config.data_path)

    @cached_property
    def train_source(self) -> Source:
        return build_source(self.config, train=True)

    @cached_property
    def plan(self) -> Plan:
        return make_plan(self.config, len(self.train_source), self.classes)

    @cached_property
    def classes(self) -> int:
        return number_of_classes(self.config, self.train_source)

    @cached_property
    def finish(self) -> Finish:
        return make_finish(self.config, self.classes, self.plan.operator)

    def checkpoints(self) -> list[Path]:
        """Those with the number of their step, in order; without any, the last one.

        Raises:
            ValueError: there is none.
        """
        numbered = sorted(self.path.glob("checkpoint-*.pth"), key=lambda path: _step(path) or 0)
        paths = [path for path in numbered if _step(path) is not None] or [self.path / checkpoints.LAST]
        if not paths[0].exists():
            raise ValueError(f"{self.path} holds no checkpoints; train with --keep_checkpoints 1000 to keep them all")
        return paths

    def model(self, path: Path, device: torch.device, average: bool = False) -> tuple[nn.Module, dict[str, Any]]:
        """A checkpoint's model at the base size, in evaluation mode, and the checkpoint.

        Args:
            average: the moving average of the weights instead.

        Raises:
            ValueError: the run keeps no average; BadCheckpoint: the file cannot be used.
        """
        state = checkpoints.load(path)
        weights = state["model_ema" if average else "model"]
        if weights is None:
            raise ValueError(f"{path} has no moving average; leave --ema out")
        if bad := nonfinite(weights):
            raise ValueError(f"{path} holds numbers that are not finite, in {', '.join(bad[:3])}")
        model = make_model(self.config, self.classes, size_of_weights(self.plan, state))
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit its settings: {' '.join(str(error).split())[:300]}") from None
        set_input_size(model, self.config.input_size)
        return model.eval().to(device), state

    def validation(
        self, images: int | None, batch_size: int, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Validation images at the base size, normalised, and their labels, in a fixed order.

        Args:
            images: that many of them, evenly spaced; None: all.
        """
        source, base = build_source(self.config, train=False), self.config.input_size
        if images is not None and images < len(source):
            keep = np.zeros(len(source), dtype=bool)
            keep[np.linspace(0, len(source) - 1, images).round().astype(int)] = True
            source = View(source, keep)
        transform = EvalTransform(base, base, self.plan.operator, self.config.crop_pct)
        workers, pin = self.config.num_workers, device.type == "cuda"
        for pixels, labels, _ in eval_loader(source, transform, batch_size, 0, 1, workers, pin):
            yield self.finish.evaluate(pixels.to(device), base), labels.to(device)


def _step(path: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)\.pth", path.name)
    return int(match[1]) if match else None
