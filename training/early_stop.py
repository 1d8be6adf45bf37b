"""Ending a run before its plan because it is not worth the rest: ``--patience``, ``--stop_if``, and the note of it."""

from __future__ import annotations

import difflib
import json
import operator
from pathlib import Path
from typing import Any

from config import Config, UsageError
from config.checks import parse_stop_if
from config.files import read_text
from curriculum import Pass, Plan, parse_duration
from engine import Task
from utils import from_main, write_text

NOTE = "ended_early.json"
COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
NUMBERS = ("train_loss", "grad_norm", "weight_norm", "loss_scale", "images_per_s", "seconds", "memory_gib")


def check_stop_if(config: Config, task: Task) -> None:
    """Raises UsageError where ``--stop_if`` names no number of this run's log."""
    if config.stop_if is None:
        return
    name, tested = parse_stop_if(config.stop_if).name, [f"test_{metric}" for metric in task.metrics]
    known = [*NUMBERS, *tested, *(f"{name}_ema" for name in tested if config.model_ema)]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
        raise UsageError(f"--stop_if {config.stop_if!r}: the log has no number {name}; {hint}")


class EarlyStop:
    """Says after each pass whether the run should end.

    The best evaluation that ``--patience`` counts from is that of the stage: under a curriculum, the next stage trains
    other images at another size, so that an accuracy that stands still in one stage says nothing of the next.

    Args:
        standing: the best evaluation of the stage so far, from a checkpoint: ``stage``, ``score``, ``step``.
    """

    def __init__(self, config: Config, plan: Plan, task: Task, standing: dict[str, Any]) -> None:
        self.config, self.plan, self.task, self.standing = config, plan, task, standing
        self.rule = config.stop_if and parse_stop_if(config.stop_if)

    def judge(self, record: Pass, line: dict[str, Any]) -> str | None:
        """Why the run should end after this pass, whose log record is ``line``; None: it should not. The main process's
        answer, for speeds differ."""
        why = self._stands_still(record, line) if self.config.patience is not None else None
        if self.rule and why is None:
            why = self._broken_rule(line)
        return from_main(why) if self.rule or self.config.patience is not None else None

    def _stands_still(self, record: Pass, line: dict[str, Any]) -> str | None:
        key = f"test_{self.task.score}"
        scores = [line[name] for name in (key, f"{key}_ema") if line.get(name) is not None]
        if not scores:
            return None
        score = max((score for score in scores if score == score), default=-1.0)  # NaN is no score
        if self.standing.get("stage") != record.stage or score > self.standing["score"]:
            self.standing = {"stage": record.stage, "score": score, "step": line["step"]}
            return None
        value, unit = parse_duration(self.config.patience)
        waited = self.plan.measure(line["step"], unit) - self.plan.measure(self.standing["step"], unit)
        if waited < value - 1e-9:
            return None
        return (
            f"--patience {self.config.patience}: no evaluation of stage {record.stage + 1} was better than that after "
            f"step {self.standing['step']} ({key} {self.standing['score']:.2f})"
        )

    def _broken_rule(self, line: dict[str, Any]) -> str | None:
        rule, value = self.rule, line.get(self.rule.name)
        if value is None or line["step"] < self.plan.first_after(rule.after):
            return None
        if not COMPARE[rule.sign](value, rule.bound):
            return None
        return f"--stop_if {self.config.stop_if!r}: {rule.name} is {value:.4g}"


def leave_note(config: Config, step: int, why: str) -> None:
    """Marks the output folder of a run that ended early, for its report, scripts/results.py and who resumes it."""
    content = {"step": step, "why": why, "patience": config.patience, "stop_if": config.stop_if}
    write_text(Path(config.output_dir) / NOTE, json.dumps(content, ensure_ascii=False) + "\n")


def read_note(folder: Path) -> dict[str, Any] | None:
    """The note that the run of this folder ended early; None without one."""
    try:
        note = json.loads(read_text(folder / NOTE, 1 << 16))
        return note if isinstance(note["step"], int) and isinstance(note["why"], str) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def stays_ended(config: Config, folder: Path, step: int, is_main: bool) -> bool:
    """Whether a run that ended early after this step, in this folder, is over: it is unless the rules have changed."""
    note = from_main(read_note(folder) if is_main else None)
    if note is None or note["step"] != step:
        return False
    over = all(note.get(name) == getattr(config, name) for name in ("patience", "stop_if"))
    then = "to train on, leave that setting out or change it" if over else "it trains on under other rules"
    if is_main:
        print(f"this run ended early after step {step}, {note['why']}; {then}", flush=True)
    return over
