"""Finds a curriculum, or its settings, for your own data and model. Every trial is a run of main.py.

  python scripts/search.py constrained --recipe RECIPE --output FOLDER [--data_path DATA, and any flag of main.py]
  python scripts/search.py parity --recipe A.yaml --against B.yaml --budgets 1.5,2,3,4,6 --output FOLDER [...]

greedy        ICCV Algorithm 1: stages from last to first, the smallest input size that keeps the accuracy
constrained   EfficientTrain++: total compute is fixed, stages from first to last, each continuing the one before
magnitude     the RandAugment schedule that goes with a curriculum
tune          learning rate and batch size, of the ordinary schedule and of the curriculum alike
parity        what a recipe saves: how much less compute and time it takes for the accuracy of others

Says first what it may cost at most. Trials run side by side on the machine's devices, each on one. Stopped or killed,
the same command resumes: FOLDER/ledger.jsonl holds the finished trials by all their settings, so that none is repeated,
by another search in the same folder neither. What was found is written to FOLDER/*.yaml, recipes for main.py; by
parity, to FOLDER/parity.md, .json, .csv and .png.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import Config, load_curriculum, plain  # noqa: E402
from config.checks import check_settings  # noqa: E402
from config.command_line import flags_of, parse_config, usage_error  # noqa: E402
from studies.parity import RULE, Parity  # noqa: E402
from studies.parity_report import ParityReport, arm_names  # noqa: E402
from studies.strategies import Constrained, Found, Greedy, Magnitudes, Tuning  # noqa: E402
from studies.study import Study  # noqa: E402
from studies.trials import CIRCUMSTANCES, Laboratory, SearchStopped, launch  # noqa: E402
from utils import STOPPED, die, duration_text, write_text  # noqa: E402

# Flags that the search sets itself, or that train nothing.
OURS = ("output_dir", "resume", "stop_after", "allow_change", "eval", "plan", "doctor", "predict", "suggest")
PARITY_S = ("epochs", "lr", "batch_size", "eval_interval", "keep_checkpoints")  # that parity sets itself, too
STATED = ("curriculum", "epochs", "batch_size", "lr")  # in a recipe even where they are the defaults


class OneLineParser(argparse.ArgumentParser):
    """Wrong usage is one line."""

    def error(self, message: str) -> NoReturn:
        sys.exit(usage_error(f"{message}; --help lists what there is"))


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The search's own arguments, and main.py's."""
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="ledger, trials and what was found")
    every.add_argument("--parallel", type=int, help="trials at a time (default: the number of GPUs, or 1)")
    every.add_argument("--predict", action="store_true", help="say what the search may cost, and end")
    common = argparse.ArgumentParser(add_help=False, parents=[every])
    common.add_argument("--seeds", type=int, default=1, help="repetitions of every trial, against noise (default: 1)")
    common.add_argument(
        "--tolerance",
        type=float,
        default=0.1,
        help="differences of accuracy up to this, in per cent, count as none (default: 0.1)",
    )
    parser = OneLineParser(
        prog="search.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)

    shared = {
        "parents": [common],
        "allow_abbrev": False,
        "epilog": "All flags of main.py may follow: --recipe, --lr ...",
    }

    greedy = commands.add_parser("greedy", **shared, help="ICCV Algorithm 1")
    greedy.add_argument(
        "--stages", type=int, default=5, help="N, the number of stages (ICCV Table 16: 3, 4, 5, 10; default: 5)"
    )
    greedy.add_argument("--baseline", type=float, help="accuracy to keep (default: trained at the base size)")

    constrained = commands.add_parser("constrained", **shared, help="EfficientTrain++")
    constrained.add_argument("--stages", type=int, default=5, help="N, stages of equal compute (default: 5)")
    constrained.add_argument("--shares", type=_numbers, help="their shares of the compute instead, e.g. 10,30,30,30")
    constrained.add_argument(
        "--full_share",
        type=float,
        default=30,
        help="per cent of the compute, at the end, that are full-size without a search (default: 30)",
    )
    constrained.add_argument(
        "--tune_epochs",
        type=float,
        help="full-size epochs of a candidate's brief tuning (default: 5 %% of --epochs)",
    )
    constrained.add_argument(
        "--tune_lr",
        type=float,
        default=1.0,
        help="the tuning's learning rate, as a factor on the run's then (default: 1)",
    )
    constrained.add_argument(
        "--confirm",
        type=int,
        default=1,
        help="seeds with which the result and the ordinary schedule are trained at the end (default: 1)",
    )
    for one in (greedy, constrained):
        one.add_argument(
            "--sizes", type=_integers, help="candidate input sizes (default: 64,96,128,160,192,224, scaled to the base)"
        )

    magnitude = commands.add_parser("magnitude", **shared, help="RandAugment's schedule")
    magnitude.add_argument(
        "--magnitudes",
        nargs="+",
        default=["linear:9", "linear:5", "constant:9", "steps:3,9", "none"],
        help="candidates: linear:9 (0 to 9), constant:9, steps:3,9 (equal shares of the clock), none",
    )
    tune = commands.add_parser("tune", **shared, help="learning rate and batch size")
    tune.add_argument("--lrs", type=_numbers, help="learning rates (default: half, once and twice the recipe's)")
    tune.add_argument("--batch_sizes", type=_integers, help="batch sizes (default: the recipe's)")
    _add_parity(commands, every)
    return parser.parse_known_args(argv)


PARITY = """\
How much less compute and training time A takes than B for the same accuracy, on your data.

  python scripts/search.py parity --recipe A.yaml --against B.yaml --budgets 1.5,2,3,4,6 \\
      --lrs 5e-4,1e-3,2e-3,4e-3,8e-3 --batches 32,64 --seeds 3 --output FOLDER --data_path DATA

B may be two lines: "extends: A.yaml" and "curriculum: none". FOLDER/parity.md has the answer, parity.png the curves,
parity.csv every trial. More budgets, seeds or values can be added later; trials that are known are not repeated.
"""


def _add_parity(commands: argparse._SubParsersAction, every: argparse.ArgumentParser) -> None:
    parity = commands.add_parser(
        "parity",
        parents=[every],
        allow_abbrev=False,
        help="what a recipe saves",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"""{PARITY}
{textwrap.fill(RULE, 100)}""",
        epilog="All other flags of main.py may follow, and hold for every recipe: --data_path DATA ...",
    )
    parity.add_argument("--recipe", required=True, metavar="A.yaml", help="the recipe that is to save something")
    parity.add_argument(
        "--against", required=True, action="append", metavar="B.yaml", help="what it is compared with; may be repeated"
    )
    parity.add_argument(
        "--budgets",
        type=_numbers,
        required=True,
        metavar="X,X,...",
        help="full-size epochs of compute, e.g. 1.2,1.7,2.4,3.5,6",
    )
    parity.add_argument(
        "--lrs",
        type=_numbers,
        metavar="X,X,...",
        help="learning rates (default: from half the recipes' lowest to twice their highest)",
    )
    parity.add_argument("--batches", type=_integers, metavar="N,N,...", help="batch sizes (default: the recipes')")
    parity.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="of every result, after the two that tune (default: 3)"
    )
    parity.add_argument(
        "--at", type=float, metavar="X", help="budget of B whose accuracy is to be reached (default: its largest)"
    )


def _numbers(text: str) -> list[float]:
    return _listed(text, float, "1e-3,2e-3")


def _integers(text: str) -> list[int]:
    return _listed(text, int, "32,64")


def _listed(text: str, kind: type, example: str) -> list:
    try:
        return [kind(value) for value in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like {example}") from None


def make_search(args: argparse.Namespace, study: Study) -> Greedy | Constrained | Magnitudes | Tuning:
    """Raises ValueError for arguments out of range."""
    config = study.config
    if config.task != "supervised":
        raise ValueError(f"--task {config.task}: searches compare accuracies, of --task supervised")
    if isinstance(config.epochs, str):
        raise ValueError(f"--epochs is {config.epochs!r}; a search shares out a number of epochs")
    for name in ("seeds", "parallel", "stages"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    if args.command == "greedy":
        return Greedy(study, args.stages, study.sizes(args.sizes), args.baseline)
    if args.command == "constrained":
        shares = args.shares or [1.0] * args.stages
        if min(shares) <= 0 or not 0 <= args.full_share < 100:
            raise ValueError("--shares must be above 0, and --full_share from 0 to below 100")
        shares = [share / sum(shares) for share in shares]
        tune = 0.05 * config.epochs if args.tune_epochs is None else args.tune_epochs
        sizes = study.sizes(args.sizes)
        search = Constrained(study, shares, sizes, args.full_share / 100, tune, args.tune_lr, args.confirm)
        if search.searched() == 0:
            raise ValueError(f"--full_share {args.full_share:g} leaves no whole stage to search; lower it")
        return search
    if args.command == "magnitude":
        return Magnitudes(study, args.magnitudes)
    lrs = args.lrs or [config.lr / 2, config.lr, 2 * config.lr]
    return Tuning(study, lrs, args.batch_sizes or [config.batch_size])


def make_parity(args: argparse.Namespace, configs: dict[str, Config]) -> Parity:
    """Raises ValueError for arguments out of range."""
    for name in ("seeds", "parallel"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    if args.at is not None and args.at not in args.budgets:
        raise ValueError(f"--at {args.at:g} is none of the --budgets")
    for name, config in configs.items():
        if config.task != "supervised":
            raise ValueError(f"{name} is --task {config.task}: searches compare accuracies, of --task supervised")
    arms = {
        # The content of a curriculum's file, so that the ledger knows it from one that was changed.
        name: Study(replace(config, curriculum=load_curriculum(config.curriculum)))
        for name, config in configs.items()
    }
    rates = [config.lr for config in configs.values()]
    doublings = math.ceil(math.log2(max(rates) / min(rates)) - 1e-9) + 2
    lrs = args.lrs or [float(f"{min(rates) / 2 * 2**number:.6g}") for number in range(doublings + 1)]
    batches = args.batches or sorted({config.batch_size for config in configs.values()})
    return Parity(arms, args.budgets, lrs, batches, args.seeds)


def check_whole(config: Config) -> None:
    """Raises ValueError for settings by which a trial would end before its plan: its accuracy is taken at the end."""
    for name in ("patience", "stop_if"):
        if (value := getattr(config, name)) is not None:
            raise ValueError(
                f"--{name} {value}: trials are compared at their ends, so that all run to it; leave it out"
            )


def make_slots(parallel: int | None, device: str) -> list[dict[str, str]]:
    """The environment of each trial that may run at a time: a GPU of its own, or a share of the cores."""
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(number) for number in range(gpus)]
    count = parallel or max(gpus, 1)
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": names[number % gpus]} for number in range(count)]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    return [{"OMP_NUM_THREADS": threads}] * count


def write_recipes(found: Found, folder: Path, command: str) -> None:
    """What was found, as recipes, with the command and the evidence in their heads."""
    defaults = plain(Config())
    for name, config in found.recipes.items():
        settings = {
            key: value
            for key, value in plain(config).items()
            if (value != defaults[key] or key in STATED) and key not in (*CIRCUMSTANCES, *OURS, "data_path", "seed")
        }
        path = folder / f"{name}.yaml"
        own = f" --model {config.model}" if ":" in config.model or "/" in config.model else ""
        head = [f"Found by {command}", f"  python main.py --recipe {path}{own} --data_path DATA --output_dir OUT"]
        head += ["Top-1 on the validation images, of all trials that led here:", *found.evidence]
        text = "".join(f"# {line}\n" for line in head)
        write_text(path, text + yaml.safe_dump(settings, sort_keys=False))
        print(f"recipe: {path}")


def main(argv: list[str], launch=launch) -> int:
    args, flags = parse(argv)
    parity = args.command == "parity"
    if forbidden := sorted(flags_of(flags) & {*OURS, *(PARITY_S if parity else ())}):
        return usage_error(f"--{forbidden[0]} is not for searches: they set it themselves, or do not need it")
    try:
        if parity:
            recipes = [args.recipe, *args.against]
            configs = dict(zip(arm_names(recipes), [parse_config(["--recipe", path, *flags]) for path in recipes]))
        else:
            configs = {"": parse_config(flags)}
        for config in configs.values():
            check_settings(config)
            check_whole(config)
        if parity:
            search = make_parity(args, configs)
            studies = [*search.arms.values()]
        else:
            studies = [Study(configs[""], args.seeds, args.tolerance)]
            search = make_search(args, studies[0])
        trials, compute = search.bound()
    except (ValueError, OSError) as error:
        return die(error, 2)
    slots = make_slots(args.parallel, studies[0].config.device)
    print(f"at most {trials} trials, {compute:.4g} full-size epochs of compute, {len(slots)} at a time", flush=True)
    if args.predict:
        return 0
    started, command = time.perf_counter(), f"python scripts/search.py {shlex.join(argv)}"
    try:
        with Laboratory(args.output, slots, compute, launch) as laboratory:
            for study in studies:
                study.laboratory = laboratory
            found = search.search()
    except SearchStopped:
        print("stopped; the same command resumes from here", flush=True)
        return STOPPED
    except (ValueError, OSError) as error:
        return die(error)
    used = laboratory.used
    print(
        f"done in {duration_text(time.perf_counter() - started)}: {used['trials']} trials of {used['compute']:.4g} "
        f"full-size epochs, {duration_text(used['seconds'])} of device time; {used['reused']} more were known"
    )
    if parity:
        ParityReport(search, found, args.at, len(slots)).write(args.output, command)
    else:
        write_recipes(found, args.output, command)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
