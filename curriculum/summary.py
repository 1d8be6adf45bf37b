"""What a plan does and costs, as a dictionary (plan.json) and as a table."""

from __future__ import annotations

from typing import Any

from curriculum.plan import Pass, Plan
from curriculum.sampler import CurriculumSampler, idle_share


def summarize(
    plan: Plan,
    baseline_epochs: float = 300,
    flops: dict[int, float] | None = None,
    params: int | None = None,
    sampler: CurriculumSampler | None = None,
    images_per_s: dict[int, float] | None = None,
) -> dict[str, Any]:
    """The plan as plain types.

    Args:
        baseline_epochs: ordinary epochs at the base size that the speed-ups compare with.
        flops: forward multiply-adds of one image for each of the plan's input sizes.
        params: the model's parameters.
        sampler: how an optimizer step is shared out over the devices; without it nothing is said about them.
        images_per_s: what one device trains per second at each of the plan's input sizes, as measured.

    Returns:
        What plan.json holds. Of a stage: ``cost``, an image's relative to a full-size one (by FLOPs where they are
        given, else by pixels); ``compute``, the stage's share of the run's; ``loader``, the images per second it asks
        for relative to full-size training; ``groups`` of an optimizer step, of each device, and ``idle``, the share of
        the devices' time that they wait for those with a group more. Values that need what was not given are None.

    Raises:
        ValueError: no measured speed for one of the sizes.

    >>> from curriculum import build_plan
    >>> plan = build_plan("efficienttrain++", epochs=200, num_images=1281167, batch_size=4096)
    >>> round(summarize(plan)["total"]["speedup_pixels"], 2)
    1.5
    """
    records = list(plan)
    work = flops or {size: float(size**2) for size in (plan.base_size, *(stage.input_size for stage in plan.stages))}
    spent = sum(stage.steps * stage.batch_size * work[stage.input_size] for stage in plan.stages)
    stages = []
    for number, stage in enumerate(plan.stages):
        epochs = [record for record in records if record.stage == number]
        size, images = stage.input_size, stage.steps * stage.batch_size
        stages.append(
            {
                "input_size": size,
                "passes": round(stage.passes, 4),
                "steps": stage.steps,
                "images": images,
                "magnitude": [epochs[0].magnitude, epochs[-1].magnitude],
                "lr": [plan.lr_at(stage.first_step), plan.lr_at(stage.first_step + stage.steps - 1)],
                "progress": [stage.start, stage.stop],
                "batch_size": stage.batch_size,
                "flops": flops[size] if flops else None,
                "cost": work[size] / work[plan.base_size],
                "compute": images * work[size] / spent,
                "loader": work[plan.base_size] / work[size] / stage.replay,
                "radius": stage.radius,
                "mixing": stage.mixing,
                **_sharing(epochs[0], sampler),
                **_time(stage, sampler, images_per_s),
            }
        )
    equivalent_epochs = plan.equivalent_epochs(plan.total_steps)
    ordinary = baseline_epochs * (plan.num_images // plan.batch_size) * plan.batch_size * work[plan.base_size]
    seconds = sum(stage["seconds"] for stage in stages) if images_per_s else None
    return {
        "curriculum": plan.curriculum.name,
        "base_size": plan.base_size,
        "epochs": plan.epochs,
        "num_images": plan.num_images,
        "batch_size": plan.batch_size,
        "micro_batch": sampler.micro_batch if sampler else None,
        "devices": sampler.world_size if sampler else None,
        "stages": stages,
        "total": {
            "steps": plan.total_steps,
            "images": sum(stage["images"] for stage in stages),
            "passes": round(sum(stage.passes for stage in plan.stages), 4),
            "equivalent_epochs": equivalent_epochs,
            "speedup_pixels": baseline_epochs / equivalent_epochs,
            "speedup_flops": ordinary / spent if flops else None,
            "params": params,
            "flops": flops[plan.base_size] if flops else None,
            "seconds": seconds,
            "device_hours": seconds * sampler.world_size / 3600 if seconds is not None else None,
        },
    }


def _sharing(epoch: Pass, sampler: CurriculumSampler | None) -> dict[str, Any]:
    """How the device with most to do takes its share of an optimizer step: images, forward passes, images of the
    largest of them; and the groups of every device, with the share of the devices' time that they wait for that one."""
    if sampler is None:
        return dict.fromkeys(("images_per_device", "forward_passes", "forward_batch", "groups", "idle"))
    passes, shares = sampler.forward_passes(epoch), sampler.shares(epoch)
    return {
        "images_per_device": shares[0] * sampler.micro_batch,
        "forward_passes": len(passes),
        "forward_batch": max(len(groups) for groups in passes) * sampler.micro_batch,
        "groups": shares,
        "idle": idle_share(sum(shares), sampler.world_size),
    }


def _time(stage, sampler: CurriculumSampler | None, images_per_s: dict[int, float] | None) -> dict[str, float | None]:
    """From measured speeds: seconds of the stage, and images per second that the loaders must bring, of all devices."""
    if images_per_s is None:
        return {"seconds": None, "images_per_s": None}
    if stage.input_size not in images_per_s:
        raise ValueError(
            f"`images_per_s` has no speed for input size {stage.input_size}: {sorted(images_per_s)} were measured"
        )
    working = 1 - idle_share(stage.batch_size // sampler.micro_batch, sampler.world_size)
    speed = images_per_s[stage.input_size] * sampler.world_size * working
    return {"seconds": stage.steps * stage.batch_size / speed, "images_per_s": speed / stage.replay}


def table(summary: dict[str, Any] | Plan, baseline_epochs: float = 300) -> str:
    """A plan, or its summary, as text for a terminal: what is trained, what that costs, and the totals.

    Args:
        summary: of :func:`summarize`, or a plan, which is then summarized by pixels alone.
        baseline_epochs: those that the summary was made with.

    >>> from curriculum import build_plan
    >>> plan = build_plan("none", epochs=10, num_images=1000, batch_size=100)
    >>> table(plan).splitlines()[0]
    'curriculum none, 10 epochs at base size 224, 1,000 images'
    """
    if isinstance(summary, Plan):
        summary = summarize(summary, baseline_epochs)
    lines = [
        f"curriculum {summary['curriculum']}, {summary['epochs']:g} epochs at base size {summary['base_size']}, "
        f"{summary['num_images']:,} images",
        f"{'stage':>5} {'B':>5} {'progress':>15} {'passes':>8} {'steps':>9} {'images':>13} {'batch':>6} "
        f"{'magnitude':>11} {'learning rate':>19}",
    ]
    stages, total = summary["stages"], summary["total"]
    for number, stage in enumerate(stages, 1):
        first, last = stage["magnitude"]
        magnitude = "none" if first is None else f"{first:.1f} - {last:.1f}"
        start, stop = (100 * share for share in stage["progress"])
        low, high = stage["lr"]
        lines.append(
            f"{number:>5} {stage['input_size']:>5} {f'{start:.1f} - {stop:.1f} %':>15} {stage['passes']:>8.1f} "
            f"{stage['steps']:>9} {stage['images']:>13,} {stage['batch_size']:>6} {magnitude:>11} "
            f"{f'{low:.2e} - {high:.2e}':>19}{_shown(stage)}"
        )
    lines.append(
        f"{'total':>11} {'':>15} {total['passes']:>8.1f} {total['steps']:>9} {total['images']:>13,}   "
        f"= {total['equivalent_epochs']:.2f} full-size epochs"
    )
    if summary["devices"]:
        lines += _costs(summary)
    speedup = f"{total['speedup_pixels']:.2f}x by pixels"
    if total["speedup_flops"] is not None:
        speedup += f", {total['speedup_flops']:.2f}x by FLOPs"
    lines.append(f"less compute than {baseline_epochs:g} ordinary epochs: {speedup}")
    if total["flops"] is not None:
        lines.append(f"model: {total['params'] / 1e6:.1f} M parameters, {total['flops'] / 1e9:.1f} G multiply-adds")
    return "\n".join(lines)


def _shown(stage: dict[str, Any]) -> str:
    """What few curricula do to the images of a stage."""
    radius = "" if stage["radius"] is None else f"  low-pass {stage['radius']:g}"
    return radius + ("" if stage["mixing"] == 1 else f"  mixing x {stage['mixing']:.2g}")


def _costs(summary: dict[str, Any]) -> list[str]:
    """The table's second half: each stage on the devices."""
    timed = summary["total"]["seconds"] is not None
    heading = (
        f"{'stage':>5} {'B':>5} {'per device':>11} {'forward passes':>21} {'GFLOPs':>8} {'cost':>6} {'compute':>8}"
    )
    lines = [heading + (f" {'loader images/s':>16} {'hours':>8}" if timed else f" {'loader demand':>14}")]
    for number, stage in enumerate(summary["stages"], 1):
        passes = f"{stage['forward_passes']} of {stage['forward_batch']} images"
        flops = "" if stage["flops"] is None else f"{stage['flops'] / 1e9:.2f}"
        line = (
            f"{number:>5} {stage['input_size']:>5} {stage['images_per_device']:>11} {passes:>21} {flops:>8} "
            f"{stage['cost']:>6.2f} {100 * stage['compute']:>6.1f} %"
        )
        if timed:
            line += f" {stage['images_per_s']:>16,.0f} {stage['seconds'] / 3600:>8.2f}"
        else:
            line += f" {stage['loader']:>13.1f}x"
        lines.append(line)
    lines.append(
        f"{summary['devices']} device{'s' * (summary['devices'] > 1)}, groups of {summary['micro_batch']} images"
        + (
            f": {summary['total']['seconds'] / 3600:.2f} hours, {summary['total']['device_hours']:.1f} device-hours"
            if timed
            else "; loader demand: images per second, relative to full-size training on the same devices"
        )
    )
    uneven = {tuple(stage["groups"]): stage["idle"] for stage in summary["stages"] if stage["idle"]}
    return lines + [f"{_shares(groups)}, {100 * idle:.2g} % of the time idle" for groups, idle in uneven.items()]


def _shares(groups: tuple[int, ...]) -> str:
    """8 groups over 3 devices: 3+3+2. Of many devices, how many take how many."""
    shown = "+".join(map(str, groups))
    if len(groups) > 8:
        shown = " + ".join(f"{groups.count(each)} x {each}" for each in dict.fromkeys(groups))
    return f"{sum(groups)} groups over {len(groups)} devices: {shown}"
