"""What a plan does and costs, as a dictionary (plan.json) and as a table."""

from __future__ import annotations

from typing import Any

from curriculum.plan import Plan


def summarize(
    plan: Plan, baseline_epochs: float, flops: dict[int, float] | None = None, params: int | None = None
) -> dict[str, Any]:
    """The plan as plain types.

    Args:
        baseline_epochs: ordinary epochs at the base size that the speed-ups compare with.
        flops: forward multiply-adds of one image for each of the plan's input sizes.
        params: the model's parameters.

    Returns:
        What plan.json holds; ``speedup_flops``, ``params`` and ``flops`` are None where not given.
    """
    records = list(plan)
    stages = []
    for number, stage in enumerate(plan.stages):
        magnitudes = [record.magnitude for record in records if record.stage == number]
        stages.append(
            {
                "input_size": stage.input_size,
                "passes": round(stage.passes, 4),
                "steps": stage.steps,
                "images": stage.steps * stage.batch_size,
                "magnitude": [magnitudes[0], magnitudes[-1]],
                "lr": [plan.lr_at(stage.first_step), plan.lr_at(stage.first_step + stage.steps - 1)],
                "progress": [stage.start, stage.stop],
                "batch_size": stage.batch_size,
            }
        )
    equivalent_epochs = plan.equivalent_epochs(plan.total_steps)
    total = {
        "steps": plan.total_steps,
        "images": sum(stage["images"] for stage in stages),
        "passes": round(sum(stage.passes for stage in plan.stages), 4),
        "equivalent_epochs": equivalent_epochs,
        "speedup_pixels": baseline_epochs / equivalent_epochs,
        "speedup_flops": None,
        "params": params,
        "flops": None,
    }
    if flops is not None:
        total["flops"] = flops[plan.base_size]
        spent = sum(stage.steps * stage.batch_size * flops[stage.input_size] for stage in plan.stages)
        ordinary = baseline_epochs * (plan.num_images // plan.batch_size) * plan.batch_size * flops[plan.base_size]
        total["speedup_flops"] = ordinary / spent
    return {
        "curriculum": plan.curriculum.name,
        "base_size": plan.base_size,
        "epochs": plan.epochs,
        "num_images": plan.num_images,
        "batch_size": plan.batch_size,
        "stages": stages,
        "total": total,
    }


def table(summary: dict[str, Any], baseline_epochs: float) -> str:
    """The summary as text for a terminal, one line per stage and the totals below."""
    lines = [
        f"curriculum {summary['curriculum']}, {summary['epochs']:g} epochs at base size {summary['base_size']}, "
        f"{summary['num_images']:,} images",
        f"{'stage':>5} {'B':>5} {'progress':>15} {'passes':>8} {'steps':>9} {'images':>13} {'batch':>6} "
        f"{'magnitude':>11} {'learning rate':>19}",
    ]
    for number, stage in enumerate(summary["stages"], 1):
        first, last = stage["magnitude"]
        magnitude = "none" if first is None else f"{first:.1f} - {last:.1f}"
        start, stop = (100 * share for share in stage["progress"])
        low, high = stage["lr"]
        lines.append(
            f"{number:>5} {stage['input_size']:>5} {f'{start:.1f} - {stop:.1f} %':>15} {stage['passes']:>8.1f} "
            f"{stage['steps']:>9} {stage['images']:>13,} {stage['batch_size']:>6} {magnitude:>11} "
            f"{f'{low:.2e} - {high:.2e}':>19}"
        )
    total = summary["total"]
    lines.append(
        f"{'total':>11} {'':>15} {total['passes']:>8.1f} {total['steps']:>9} {total['images']:>13,}   "
        f"= {total['equivalent_epochs']:.2f} full-size epochs"
    )
    speedup = f"{total['speedup_pixels']:.2f}x by pixels"
    if total["speedup_flops"] is not None:
        speedup += f", {total['speedup_flops']:.2f}x by FLOPs"
    lines.append(f"less compute than {baseline_epochs:g} ordinary epochs: {speedup}")
    if total["flops"] is not None:
        lines.append(f"model: {total['params'] / 1e6:.1f} M parameters, {total['flops'] / 1e9:.1f} G multiply-adds")
    return "\n".join(lines)
