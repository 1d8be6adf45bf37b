"""Minibatch CKA between the layers of two models (Nguyen et al., ICLR 2021)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from studies.figures import panels, save, write_csv


def hsic1(k: torch.Tensor, l: torch.Tensor) -> torch.Tensor:  # noqa: E741 (the paper's K and L)
    """The unbiased estimator HSIC_1 of pairs of Gram matrices (Song et al., JMLR 2012, Eq. 5; Nguyen et al., Eq. 3).

    Args:
        k, l: (..., n, n), n > 3; their leading dimensions broadcast.

    Returns:
        (...): (tr(K L) + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 / (n - 2) 1'K L1) / (n (n - 3)), diagonals set to 0.
    """
    n = k.shape[-1]
    if n <= 3:
        raise ValueError(f"HSIC_1 needs more than 3 images in a batch, got {n}")
    k, l = (m - torch.diag_embed(m.diagonal(dim1=-2, dim2=-1)) for m in (k, l))  # noqa: E741
    rows_k, rows_l = k.sum(-1), l.sum(-1)
    trace = (k * l.mT).sum((-2, -1))
    cross = (rows_k * rows_l).sum(-1)  # 1'K L1, K being symmetric
    return (trace + rows_k.sum(-1) * rows_l.sum(-1) / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3))


class MinibatchCka:
    """Averages HSIC_1 over batches: CKA = mean HSIC(K, L) / sqrt(mean HSIC(K, K) mean HSIC(L, L))."""

    def __init__(self) -> None:
        self.cross: torch.Tensor | float = 0.0
        self.own: list[torch.Tensor | float] = [0.0, 0.0]

    def add(self, first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
        """Activations (n, ...) of the same n images in the layers of both models."""
        k, l = (torch.stack([_gram(x) for x in layers]) for layers in (first, second))  # noqa: E741
        self.cross = self.cross + hsic1(k[:, None], l[None])
        self.own = [own + hsic1(m, m) for own, m in zip(self.own, (k, l))]

    def similarity(self) -> torch.Tensor:
        """(layers of the first model, of the second), about 0 to 1."""
        return self.cross / torch.sqrt(self.own[0][:, None] * self.own[1][None])


def _gram(x: torch.Tensor) -> torch.Tensor:
    x = x.flatten(1).double()
    return x @ x.T


class Layers:
    """Collects what chosen layers put out in a forward pass, in the order in which they run.

    Args:
        model: any.
        pattern: a regular expression that names of modules match as a whole; None: the blocks, that is the composite
            members of its innermost sequences (of which ResNets, Transformers and ConvNets are made), or else every
            layer with weights.

    Raises:
        ValueError: no module matches.
    """

    def __init__(self, model: nn.Module, pattern: str | None = None) -> None:
        modules = dict(model.named_modules())
        if pattern is not None:
            names = [name for name in modules if name and re.fullmatch(pattern, name)]
        else:
            names = _blocks(modules) or [n for n, m in modules.items() if n and any(True for _ in m.parameters(False))]
        if not names:
            raise ValueError(
                f"--layers {pattern}: no module is called so; there are {', '.join(list(modules)[1:9])} ..."
            )
        self.outputs: dict[str, torch.Tensor] = {}
        self.model = model
        for name in names:
            modules[name].register_forward_hook(lambda _m, _i, output, name=name: self._note(name, output))

    def _note(self, name: str, output: object) -> None:
        first = output[0] if isinstance(output, tuple | list) else output
        if isinstance(first, torch.Tensor) and first.dim() > 1:
            self.outputs[name] = first

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.outputs = {}
        self.model(images)
        return self.outputs


def _blocks(modules: dict[str, nn.Module]) -> list[str]:
    members = [
        name
        for name, module in modules.items()
        if name
        and isinstance(modules[name.rpartition(".")[0]], nn.Sequential | nn.ModuleList)
        and any(module.children())
    ]
    return [name for name in members if not any(other.startswith(f"{name}.") for other in members)]


@torch.inference_mode()
def measure(
    first: nn.Module, second: nn.Module, batches: Iterable[torch.Tensor], pattern: str | None = None
) -> tuple[list[str], list[str], torch.Tensor]:
    """CKA of every layer of ``first`` with every layer of ``second`` on the same images; batches of fewer than 4 are
    skipped. Returns both models' layer names, in the order of their running, and the (layers, layers) matrix."""
    layers, cka, done = (Layers(first, pattern), Layers(second, pattern)), MinibatchCka(), 0
    names: tuple[list[str], list[str]] = ([], [])
    for images in batches:
        if len(images) > 3:
            outputs = [one(images) for one in layers]
            names = tuple(list(output) for output in outputs)
            cka.add(*(list(output.values()) for output in outputs))
            done += len(images)
            print(f"\r{done} images", end="", flush=True)
    if not done:
        raise ValueError("CKA needs batches of more than 3 images; raise --images or --batch_size")
    print()
    return *names, cka.similarity().cpu()


def report(names: tuple[str, str], layers: tuple[list[str], list[str]], similarity: torch.Tensor, folder: Path) -> None:
    """Writes the heat map and its numbers."""
    rows = [
        {"first": a, "second": b, "cka": similarity[i, j].item()}
        for i, a in enumerate(layers[0])
        for j, b in enumerate(layers[1])
    ]
    write_csv(rows, folder, "cka")
    figure, (axis,) = panels(1, 5.6, 4.8)
    picture = axis.imshow(similarity, origin="lower", vmin=0, vmax=1, cmap="magma")
    axis.grid(False)
    for ticks, labels in ((axis.set_xticks, layers[1]), (axis.set_yticks, layers[0])):
        step = -(-len(labels) // 24)
        turned = {"rotation": 90} if ticks == axis.set_xticks else {}
        ticks(range(0, len(labels), step), labels[::step], fontsize=7, **turned)
    axis.set(ylabel=names[0], xlabel=names[1], title="minibatch CKA")
    figure.colorbar(picture)
    save(figure, folder, "cka")
