"""What only a GPU shows, checked on this machine: `bash scripts/gpu_check.sh [--quick] [--output DIR]`.

Prints a line for each check as it ends, and last the table; writes gpu_check.json to the output folder. What needs a
GPU is skipped without one; --quick makes everything small. The exit code is 1 if a bar is missed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for --deterministic true; read when CUDA starts

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpu_right
import gpu_speed
import timm

from utils import init_topology

Row = tuple[str, float | str, str, bool | None]


@dataclass(frozen=True)
class Machine:
    """Where the checks run, and at what size."""

    device: torch.device
    quick: bool
    folder: Path

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


CHECKS: tuple[tuple[Callable[[Machine], Iterator[Row]], bool], ...] = (
    # a generator of (what, value, bar, whether it is met; None: printed only), and whether it needs a GPU
    (gpu_right.synchronisations, True),
    (gpu_right.resuming, False),
    (gpu_right.cpu_and_gpu_agree, True),
    (gpu_right.end_to_end, False),
    (gpu_right.switching, False),
    (gpu_right.tasks, False),
    (gpu_right.data_parallel, False),
    (gpu_right.compiled, False),
    (gpu_speed.memory, True),
    (gpu_speed.loop, False),
    (gpu_speed.host, True),
    (gpu_speed.sizes, False),
    (gpu_speed.whole_run, False),
    (gpu_speed.fast, False),
    (gpu_speed.augmenting, False),
    (gpu_speed.options, True),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models and images: do the checks run at all")
    parser.add_argument("--output", type=Path, default=Path("output/gpu_check"))
    parser.add_argument("--only", default="", help="checks whose name holds this")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    args.output.mkdir(parents=True, exist_ok=True)
    rows, began = [], time.perf_counter()
    about = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d"),
        "quick": args.quick,
    }
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(device, args.quick, Path(folder))
        for check, needs_gpu in CHECKS:
            name = check.__name__.replace("_", " ")
            if args.only and args.only not in name:
                continue
            started = time.perf_counter()
            for row in run(check, machine) if machine.gpu or not needs_gpu else [("", "needs a GPU", "", None)]:
                what, value, bar, met = row
                seconds = round(time.perf_counter() - started, 1)
                rows.append({"check": name, "what": what, "value": value, "bar": bar, "met": met, "seconds": seconds})
                print(line(rows[-1]), flush=True)
                about["seconds"] = round(time.perf_counter() - began)
                content = json.dumps({"about": about, "rows": rows}, indent=1) + "\n"  # what there is, if it is stopped
                (args.output / "gpu_check.json").write_text(content, encoding="utf-8")
    failed = [row for row in rows if row["met"] is False]
    print("\n" + table(rows, about))
    print(f"\n{len(failed)} of {len(rows)} bars missed" if failed else "\nno bar was missed")
    return 1 if failed else 0


def run(check: Callable[[Machine], Iterator[Row]], machine: Machine) -> Iterator[Row]:
    """The check's rows; an error is a bar that is missed, and the next check follows."""
    if machine.gpu:
        init_topology("cuda", deterministic=False, tf32=True, timeout=timedelta(minutes=5))  # as a run sets it
    try:
        yield from check(machine)
    except Exception as error:
        traceback.print_exc()
        yield "stopped", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", "no error", False
    finally:
        torch.use_deterministic_algorithms(False)
        if machine.gpu:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.empty_cache()


def line(row: dict) -> str:
    value = f"{row['value']:.4g}" if isinstance(row["value"], float) else str(row["value"])
    verdict = {True: "met", False: "MISSED", None: "-"}[row["met"]]
    return f"{row['check']:<20} {row['what']:<44} {value:>14} {row['bar']:>12}  {verdict}"


def table(rows: list[dict], about: dict) -> str:
    """For docs/gpu.md."""
    head = ", ".join(f"{key} {value}" for key, value in about.items() if key != "quick")
    lines = [head, "", "| check | what | value | bar | |", "|---|---|---|---|---|"]
    for row in rows:
        value = f"{row['value']:.4g}" if isinstance(row["value"], float) else row["value"]
        verdict = {True: "met", False: "**missed**", None: ""}[row["met"]]
        lines.append(f"| {row['check']} | {row['what']} | {value} | {row['bar']} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
