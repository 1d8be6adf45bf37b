"""List the papers' models: parameters, FLOPs, input sizes, and what a change of the input size does to them.

python -m models.list [NAME ...]     the papers' models, or any others
"""

import argparse
import sys
from collections import Counter

from curriculum.resize import set_input_size
from curriculum.skeleton import Skeleton

from .flops import count_flops
from .registry import create_model

PAPER_MODELS = [
    *("resnet18", "resnet50", "convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
    *("convnext_isotropic_small", "convnext_isotropic_base", "convnext_isotropic_large"),
    *("deit_tiny", "deit_small", "deit_base", "pvt_tiny", "pvt_small", "pvt_medium", "pvt_large"),
    *("swin_tiny", "swin_small", "swin_base", "swin_large", "cswin_tiny", "cswin_small", "cswin_base", "cswin_large"),
    *("caformer_s18", "caformer_s36", "caformer_m36", "caformer_b36"),
]
SIZES = (224, 384)


def describe(name: str) -> dict:
    """What the listing says of one model: {"params", "flops": {size: FLOPs}, "size_multiple", "resizing"}."""
    flops, _ = count_flops(name, SIZES)
    with Skeleton():  # on no meta device, where torch 2.4 cannot resample
        model = create_model(name)
    before = {key: parameter.shape for key, parameter in model.named_parameters()}
    params = sum(shape.numel() for shape in before.values())
    changed = Counter()
    if set_input_size(model, SIZES[-1]):
        changed.update(
            k.rpartition(".")[2] for k, parameter in model.named_parameters() if parameter.shape != before[k]
        )
    parts = [f"{count} x {leaf}" if count > 1 else leaf for leaf, count in changed.items()]
    resizing = f"resamples {', '.join(parts)}" if parts else "changes no parameter"
    return {"params": params, "flops": flops, "size_multiple": model.size_multiple, "resizing": resizing}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m models.list", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to list; the papers' if none")
    names = parser.parse_args().names or PAPER_MODELS
    flops = "".join(f"{f'GFLOPs at {size}':>15}" for size in SIZES)
    print(f"{'model':<26}{'M parameters':>12}{flops}{'sizes':>17}  a change of input size")
    for name in names:
        try:
            row = describe(name)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        flops = "".join(f"{row['flops'][size] / 1e9:>15.2f}" for size in SIZES)
        sizes = f"multiples of {row['size_multiple']}"
        print(f"{name:<26}{row['params'] / 1e6:>12.2f}{flops}{sizes:>17}  {row['resizing']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
