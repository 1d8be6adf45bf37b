"""Build models without their initial values, where only structure matters: checks of sizes, counts of FLOPs, grafts."""

from torch import nn
from torch.overrides import TorchFunctionMode

_FILLS = {"uniform_", "normal_", "trunc_normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_", "copy_"}


class Skeleton(TorchFunctionMode):
    """A context in which in-place arithmetic on parameters, and on any tensor of the meta device, does nothing.

    Initialisation is most of what building a model costs: nearly all on the meta device, where PyTorch emulates it in
    Python. Parameters built here hold arbitrary memory; buffers are as always. With torch.device("meta"): shapes only.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        fills = args and getattr(func, "__name__", "") in _FILLS
        if fills and (isinstance(args[0], nn.Parameter) or args[0].is_meta):
            return args[0]
        return func(*args, **(kwargs or {}))
