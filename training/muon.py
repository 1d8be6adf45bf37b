"""Muon: momentum whose update is orthogonalised, for matrices; AdamW for everything else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw

# Coefficients of the five quintic iterations (a, b, c): X <- (a + b X X^T + c (X X^T)^2) X takes singular values to
# about 1. Those of https://leloykun.github.io/ponder/muon-opt-coeffs, which timm and modded-nanogpt use too.
QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_EPS = 1e-7  # of a gradient's norm


def newton_schulz(grams: torch.Tensor) -> torch.Tensor:
    """What makes X (M, N) of these X X^T nearly orthogonal when it is multiplied by it from the left.

    With X = U S V^T it is U V^T (all singular values about 1). Newton-Schulz's iterations need only X X^T, so they are
    carried out on that smaller, symmetric matrix: the layers of a network have few different M, and those with the same
    are done together, however wide they are. In fp32, since it squares the singular values; those below 1e-3 of the
    norm stay small in five iterations in any case.

    Args:
        grams: (K, M, M) fp32.

    Returns:
        (K, M, M).
    """
    norms = grams.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()[:, None, None].clamp_min(_EPS)  # of X
    grams, product = grams / norms.square(), None
    for a, b, c in QUINTIC:
        factor = torch.baddbmm(grams, grams, grams, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else torch.bmm(factor, product)
        grams = torch.bmm(torch.bmm(factor, grams), factor)
    return product / norms


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """A view of a weight as (out, in), of a convolution (out, in x height x width) in the order of its memory."""
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.permute(0, 2, 3, 1)
    return weight.view(len(weight), -1)


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan, 2024) for the groups with ``matrix: True``, AdamW for the others.

    A matrix's step has the root mean square of AdamW's (0.2 sqrt(max(M, N)), arXiv:2502.16982), so that a learning rate
    means about the same to both; convolutions are matrices of (out, in x height x width).

    Args:
        params: groups; ``lr_scale`` and the like are left to the caller.
        lr, weight_decay: as AdamW's, decoupled.
        momentum: of the matrices, [0, 1); Nesterov's form.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "matrix": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices: dict[int, list[tuple[torch.Tensor, torch.Tensor, float]]] = defaultdict(list)
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            if not group["matrix"]:
                self._adamw(group, parameters)
                continue
            for parameter, update in zip(parameters, self._momentum(group, parameters)):
                parameter, update = as_matrix(parameter), as_matrix(update).float()
                size = group["lr"] * 0.2 * max(update.shape) ** 0.5
                if len(update) > update.shape[1]:
                    parameter, update = parameter.mT, update.mT
                matrices[len(update)].append((parameter, update, size))
        for same in matrices.values():
            products = newton_schulz(torch.stack([update @ update.mT for _, update, _ in same]))
            for (parameter, update, size), product in zip(same, products):
                parameter.addmm_(product, update, alpha=-size)
        return loss

    def _momentum(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Lets the parameters decay and gives what is to be orthogonalised: the momentum, a gradient ahead."""
        gradients = [torch.empty_like(p).copy_(p.grad) if p.grad.stride() != p.stride() else p.grad for p in parameters]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        return torch._foreach_lerp(gradients, buffers, group["momentum"])

    def _adamw(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter].update(step=torch.tensor(0.0), **zeros)
        state = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            *([entry[name] for entry in state] for name in ("exp_avg", "exp_avg_sq")),
            [],
            [entry["step"] for entry in state],
            foreach=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
