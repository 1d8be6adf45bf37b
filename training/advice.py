"""Warnings that save a run: settings that are rarely what was meant, before it starts, and a sign of overfitting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from config import Config
from curriculum import Plan

STALE = 0.01  # share of the moving average that may still be the initial weights at the end
USUAL_WARMUP = 0.1  # share of a run; a warm-up as short as this is fine however short the first of many stages is


def advice(config: Config, plan: Plan) -> list[str]:
    """What is odd about the plan of a run, a line each."""
    return [f"warning: {line}" for line in (_slow_average(config, plan), _long_warmup(config, plan)) if line]


def _slow_average(config: Config, plan: Plan) -> str | None:
    """The average of n steps holds decay^n of the weights that it began with."""
    steps, decay = plan.total_steps, config.model_ema_decay
    if not config.model_ema or decay**steps <= STALE:
        return None
    return (
        f"--model_ema_decay {decay} averages over {1 / (1 - decay):,.0f} steps, and this run has {steps:,}: at its end "
        f"{100 * decay**steps:.0f} % of the average will be the initial weights; {_fitting(steps):.4g} fits its length"
    )


def _fitting(steps: int) -> float:
    """A decay that averages over the last tenth of a run."""
    return 1 - 10 / max(steps, 20)


def _long_warmup(config: Config, plan: Plan) -> str | None:
    first = plan.stages[0]
    most = max(first.stop, USUAL_WARMUP) + 0.01  # stages end at a step
    if len(plan.stages) == 1 or plan.warmup_progress <= most:
        return None
    return (
        f"--warmup_epochs {config.warmup_epochs} ends at {100 * plan.warmup_progress:.0f} % of the run, but its first "
        f"stage (input size {first.input_size}) at {100 * first.stop:.0f} %: the whole stage trains at a low learning "
        "rate; a shorter one, as 5%, may be meant"
    )


def first_was_best(records: Sequence[dict[str, Any]], key: str, size: int) -> str | None:
    """Of a finished run of several evaluations at ``size``: that none after the first was better, if so.

    Args:
        records: of log.txt. key: the score, as ``test_acc1``; the average's counts, too.
    """
    scored = [record for record in records if record.get("eval_size") == size and record.get(key) is not None]
    scores = [max(record[key], record.get(f"{key}_ema") or record[key]) for record in scored]
    if len(scores) < 3 or max(scores[1:]) > scores[0]:
        return None
    return (
        f"the first evaluation at {size} pixels, after step {scored[0]['step']}, is the best of {len(scores)}: what "
        "followed did not help; look for overfitting (training loss falls, validation loss rises), or a "
        "learning rate that is too high"
    )
