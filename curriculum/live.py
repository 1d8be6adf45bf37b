"""A curriculum in anyone's training loop: the model follows the plan, and its images are reduced on the device."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from curriculum.operators import downsample, low_pass
from curriculum.plan import Plan
from curriculum.records import Pass
from curriculum.resize import check_input_sizes, set_input_size


class LiveCurriculum:
    """Keeps a model at the plan's input size, whatever loop trains it.

    Call :meth:`start_step` before each optimizer step. Where a stage begins it resizes the model, its optimizer's
    moments and its moving average (:func:`curriculum.set_input_size`). From then on images that come to the model are
    reduced to that size by the plan's operator, in training and in evaluation; images that the loader has reduced
    already (:class:`curriculum.CurriculumSampler` tells it to) pass as they are. ``lr`` is the plan's learning rate of
    the step, for the loop to set; ``step`` counts the steps that were started, which is where a loop resumes.

    Args:
        plan: from :func:`curriculum.build_plan`.
        model: takes float images (N, C, H, W) of the base size or the stage's, as its first argument or by name. It may
            be wrapped (DistributedDataParallel, torch.compile) if none of its parameters depends on the input size.
        optimizer: over the model's parameters.
        ema: a moving average of the model: a module, or an object that holds it as ``.module``.
        wrap: for a model whose parameters do: returns the model wrapped, such as ``DistributedDataParallel``. It is
            called again after each change of size; call :attr:`wrapped` in place of the model.
        is_wrapped: that a trainer has wrapped the model elsewhere, which cannot be seen from here.

    Raises:
        ValueError: the model cannot take one of the plan's sizes, or is wrapped and its parameters would change shape.

    >>> from timm import create_model
    >>> from curriculum import build_plan
    >>> model = create_model("test_resnet", num_classes=10)
    >>> plan = build_plan("efficienttrain++", epochs=2, num_images=800, batch_size=8, base_size=64)
    >>> live = LiveCurriculum(plan, model)
    >>> for step in (0, 200, 400):
    ...     epoch = live.start_step(step)
    ...     logits = model(torch.zeros(8, 3, 64, 64))
    ...     print(epoch.input_size, tuple(logits.shape))
    32 (8, 10)
    48 (8, 10)
    64 (8, 10)
    >>> live.seen
    {32: 8, 48: 8, 64: 8}
    >>> round(live.saved, 3)
    0.396
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        ema: Any = None,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        is_wrapped: bool = False,
    ) -> None:
        self.plan, self.optimizer, self.ema, self.wrap = plan, optimizer, ema, wrap
        self.model = _unwrap(model)
        self._wrapped = None if wrap else model
        sizes = sorted({stage.input_size for stage in plan.stages})
        check_input_sizes(self.model, sizes)
        if (is_wrapped or self.model is not model) and (changing := _changing_size(self.model, sizes)):
            raise ValueError(
                f"{type(self.model).__name__} is wrapped (for several processes or by torch.compile), and its "
                f"parameters change their shape at input size {changing}: give LiveCurriculum the model without its "
                "wrapper, and the wrapper as wrap=..., then call live.wrapped"
            )
        self.input_size: int | None = None  # before the first step images are let through
        self.step, self.lr, self.radius = 0, plan.lr_at(0), None
        self._seen: Counter[int] = Counter()
        averaged = [] if ema is None else [getattr(ema, "module", ema)]
        hook = _Hook(self)
        self._hooks = [part.register_forward_pre_hook(hook, with_kwargs=True) for part in (self.model, *averaged)]

    def start_step(self, step: int) -> Pass:
        """Call before optimizer step ``step`` (from 0). Returns the plan's record; beyond the plan, its last one."""
        self.step = step + 1
        step = min(step, self.plan.total_steps - 1)
        epoch, _ = self.plan.locate(step)
        self.lr, self.radius = self.plan.lr_at(step), epoch.radius
        self._resize(epoch.input_size)
        return epoch

    def _resize(self, size: int) -> None:
        if size == self.input_size:
            return
        if self.wrap is not None:
            self._wrapped = None  # a live data-parallel wrapper would keep its hooks on the resized parameters
        set_input_size(self.model, size, self.optimizer, self.ema)
        self.input_size = size

    @property
    def wrapped(self) -> nn.Module:
        """The model as it is to be called, in the present wrapper. Keep no other reference to it over a step."""
        if self._wrapped is None:
            self._wrapped = self.wrap(self.model)
        return self._wrapped

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside model and optimizer: plain types, as JSON has them. Take it between steps."""
        seen = [list(item) for item in self.seen.items()]
        return {"stages": self._stages(), "step": self.step, "input_size": self.input_size, "seen": seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Call before the model, the optimizer and the average load theirs: it gives them the shapes of then.

        Raises:
            ValueError: the state is of another plan.
        """
        if [list(stage) for stage in state["stages"]] != self._stages():
            raise ValueError(
                f"the state is of another plan: its stages (input size, steps) are {state['stages']}, this plan's are "
                f"{self._stages()}; build the plan with the settings of then"
            )
        if state["input_size"] is not None:
            self._resize(state["input_size"])
        self.step, self._seen = state["step"], Counter(dict(state["seen"]))

    def _stages(self) -> list[list[int]]:
        return [[stage.input_size, stage.steps] for stage in self.plan.stages]

    @property
    def seen(self) -> dict[int, int]:
        """Images that were trained on, by the input size at which the model saw them."""
        return dict(sorted(self._seen.items()))

    @property
    def saved(self) -> float:
        """Share of the compute that was saved: of what the same images cost at the base size, by pixels. In [0, 1)."""
        full = sum(self._seen.values()) * self.plan.base_size**2
        return 1 - sum(count * size**2 for size, count in self._seen.items()) / full if full else 0.0

    def close(self) -> None:
        """Leaves the model as it is and its images alone."""
        for hook in self._hooks:
            hook.remove()

    def reduce(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a forward pass, the first images (N, C, H, W) among them reduced to the present size."""
        if self.input_size is None:
            return args, kwargs
        places = [*enumerate(args), *kwargs.items()]
        found = [(place, value) for place, value in places if isinstance(value, torch.Tensor) and value.dim() == 4]
        if not found:
            raise ValueError(f"{type(model).__name__} was called without images of shape (N, C, H, W)")
        place, images = found[0]
        height, width = images.shape[-2:]
        size = self.input_size
        if height != width or height < size:
            raise ValueError(
                f"images of {height}x{width} came to {type(model).__name__} at input size {size}: load squares of the "
                f"base size, {self.plan.base_size}, or of the stage's"
            )
        if height > size:
            images = downsample(images, size, self.plan.operator)
        if self.radius is not None:
            images = low_pass(images, self.radius)
        if model is self.model and model.training:
            self._seen[size] += len(images)
        if isinstance(place, int):
            return (*args[:place], images, *args[place + 1 :]), kwargs
        return args, {**kwargs, place: images}


class _Hook:
    """Calls :meth:`LiveCurriculum.reduce` before each forward pass. A copy of the model gets one that does nothing."""

    def __init__(self, live: LiveCurriculum | None = None) -> None:
        self.live = live

    @torch.compiler.disable  # counting images in a compiled graph would compile it anew each time
    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        return None if self.live is None else self.live.reduce(model, args, kwargs)

    def __reduce__(self) -> tuple:
        return _Hook, ()


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    while inner := getattr(model, "_orig_mod", None) or (
        model.module if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else None
    ):
        model = inner
    return model


def _changing_size(model: nn.Module, sizes: list[int]) -> int | None:
    """The first of the sizes at which parameters have another shape than now."""
    trial = copy.deepcopy(model)
    return next((size for size in sizes if set_input_size(trial, size)), None)
