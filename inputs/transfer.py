"""From main memory to the device: copies that wait for nothing, and a stream that prepares the next batch meanwhile."""

from collections.abc import Callable
from typing import TypeVar

import torch

Prepared = TypeVar("Prepared", bound=tuple)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; the host does not wait if it comes from page-locked memory and goes to CUDA.

    Elsewhere the copy is a blocking one: MPS reads pageable memory later, when it may have been freed.
    """
    return tensor.to(device, non_blocking=device.type == "cuda" and tensor.is_pinned())


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Small numbers that were just computed on the CPU, on the device: without waiting on CUDA."""
    return to_device(tensor.pin_memory() if device.type == "cuda" else tensor, device)


class SideStream:
    """Prepares batches on a CUDA stream of its own, beside the training of those before; elsewhere, in place.

    The host runs ahead of the device: when it asks for a batch, the kernels that train on the one before still wait in
    the main stream, and copying and finishing overlap with them. What is prepared stays referenced here until the main
    stream has used it. Only then may the side stream's allocator reuse its memory, so two batches are held at most, no
    matter how far the host is ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._held: list[tuple[tuple, torch.cuda.Event]] = []  # prepared tensors, and when the main stream used them
        self._newest: tuple = ()

    def prepare(self, make: Callable[[], Prepared]) -> Prepared:
        """``make()``, a tuple; the main stream waits for its tensors. What was trained on before must be issued."""
        if self.stream is None:
            return make()
        main = torch.cuda.current_stream(self.stream.device)
        self._held.append((self._newest, main.record_event()))
        while len(self._held) > 1:
            self.stream.wait_event(self._held[0][1])
            del self._held[0]
        with torch.cuda.stream(self.stream):
            self._newest = make()
        main.wait_stream(self.stream)
        return self._newest
