"""Analyses of finished runs and of the operators; each writes its figure (PNG, SVG) and its numbers (CSV).

  python scripts/analyze.py filtered RUN [RUN ...] --output FOLDER    low- and high-pass filtered accuracy over training
  python scripts/analyze.py cka RUN RUN --output FOLDER               similarity of two runs' layers
  python scripts/analyze.py spectra RUN --output FOLDER               what the network is shown at each stage
  python scripts/analyze.py proposition1 --output FOLDER              what each down-sampling lets through

RUN is an output folder of main.py; for `filtered`, train with --keep_checkpoints 1000 and the --save_interval you want.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.checkpoints import LAST  # noqa: E402
from studies import cka, filtered, proposition1, spectra  # noqa: E402
from studies.runs import RunFolder  # noqa: E402
from utils import die  # noqa: E402


def parse(argv: list[str]) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for figure and numbers")
    of_runs = argparse.ArgumentParser(add_help=False)
    of_runs.add_argument("--data_path", help="where the runs' data lie now (default: where they lay)")
    of_runs.add_argument("--model", help="the runs' model, if it is package.module:function (default: the registry's)")
    of_runs.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any"
    )
    of_runs.add_argument("--images", type=int, help="images to use, evenly spaced (default: all; cka and spectra: 512)")
    of_runs.add_argument("--batch_size", type=int, default=128, help="images at a time (default: 128)")
    of_runs.add_argument("--ema", action="store_true", help="take the moving averages of the weights")
    parser = argparse.ArgumentParser(
        prog="analyze.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("filtered", parents=[common, of_runs], help="ICCV Figure 4, Table 1")
    one.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of main.py")
    one.add_argument(
        "--radii",
        type=lambda text: [float(value) for value in text.split(",")],
        help="bandwidths, cycles per image side (default: 10,20,40,60,80,110, in proportion to 224 pixels)",
    )
    one = commands.add_parser("cka", parents=[common, of_runs], help="of two networks, layer by layer")
    one.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="output folders of main.py")
    one.add_argument("--layers", help="regular expression of the modules to compare (default: the blocks)")
    one.add_argument("--checkpoint", default=LAST, help=f"of both runs (default: {LAST})")
    one = commands.add_parser("spectra", parents=[common, of_runs], help="of what the network is shown")
    one.add_argument("runs", nargs=1, type=Path, metavar="RUN", help="output folder of main.py")
    one = commands.add_parser("proposition1", parents=[common], help="ICCV Proposition 1")
    one.add_argument("--base_size", type=int, default=224)
    one.add_argument("--sizes", type=lambda text: [int(value) for value in text.split(",")], default=[96, 160])
    one.add_argument("--images", type=int, default=16, help="images of 1 / f noise")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        if args.images is not None and args.images < 4:
            raise ValueError(f"--images is {args.images}; it must be at least 4")
        if args.command == "proposition1":
            proposition1.report(*proposition1.measure(args.base_size, args.sizes, args.images), args.output)
            return 0
        device, runs = torch.device(args.device), [RunFolder(path, args.data_path, args.model) for path in args.runs]
        if args.command == "filtered":
            rows = []
            for run in runs:
                scale = run.config.input_size / 224
                radii = args.radii or [radius * scale for radius in filtered.BANDWIDTHS]
                rows += filtered.measure(run, radii, device, args.images, args.batch_size, args.ema)
            filtered.report(rows, args.output)
        elif args.command == "cka":
            models = [run.model(run.path / args.checkpoint, device, args.ema)[0] for run in runs]
            images = (pixels for pixels, _ in runs[0].validation(args.images or 512, args.batch_size, device))
            *layers, similarity = cka.measure(*models, images, args.layers)
            cka.report((runs[0].path.name, runs[1].path.name), tuple(layers), similarity, args.output)
        else:
            images = (args.images or 512) // 2 * 2
            spectra.report(*spectra.measure(runs[0], images), runs[0].path.name, args.output)
    except (ValueError, OSError) as error:
        return die(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
