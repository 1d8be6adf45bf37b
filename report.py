"""The run report: one self-contained page, report.html, beside a run's checkpoints, and the plan's picture."""

from __future__ import annotations

from charts import Series, chart, stack
from curriculum import Plan

WIDTH, HEIGHT = 640, 220


def plan_picture(plan: Plan) -> str:
    """Input size, RandAugment magnitude and learning rate against compute, as one SVG document."""
    return stack(plan_charts(plan), WIDTH, HEIGHT)


def plan_charts(plan: Plan) -> list[str]:
    """The three charts of the plan. The horizontal axis is compute, in epochs at the base size (by pixels)."""
    size, magnitude, rate = [], [], []
    for epoch in plan:
        first, last = (plan.equivalent_epochs(step) for step in (epoch.first_step, epoch.first_step + epoch.steps))
        size += [(first, epoch.input_size), (last, epoch.input_size)]
        if epoch.magnitude is not None:
            magnitude += [(first, epoch.magnitude), (last, epoch.magnitude)]
    steps = {round(plan.total_steps * index / 400) for index in range(400)}
    for stage in plan.stages:  # both sides of every switch
        steps |= {stage.first_step, stage.first_step + stage.steps - 1}
    rate = [(plan.equivalent_epochs(step), plan.lr_at(step)) for step in sorted(steps) if step < plan.total_steps]
    x = f"compute, epochs at {plan.base_size}"
    return [
        chart("Input size B", [Series("B", size)], x, "pixels", WIDTH, HEIGHT),
        chart("RandAugment magnitude", [Series("m", magnitude)], x, "magnitude", WIDTH, HEIGHT, zero=True),
        chart("Learning rate", [Series("learning rate", rate)], x, "learning rate", WIDTH, HEIGHT, zero=True),
    ]
