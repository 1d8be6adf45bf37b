"""Line charts as SVG text: for the plan's picture and the run report. No plotting library, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444")  # told apart by all eyes
LEFT, RIGHT, TOP, BOTTOM = 72, 16, 34, 44  # margins around the axes, pixels
FONT = 'font-family="system-ui, sans-serif"'


@dataclass(frozen=True)
class Series:
    """One line of a chart. ``points`` are (x, y)."""

    name: str
    points: list[tuple[float, float]]


def chart(
    title: str,
    series: list[Series],
    x_label: str,
    y_label: str,
    width: int = 640,
    height: int = 260,
    zero: bool = False,
    marks: Sequence[float] = (),
    clip: bool = False,
) -> str:
    """One SVG element, drawn on white.

    Args:
        series: at least one with points; what is not finite is skipped.
        zero: whether the vertical axis starts at 0, as the horizontal one always does.
        marks: places on the horizontal axis that get a dashed line; those beyond the data are skipped.
        clip: whether a few values far above all others may lie above the axis; the title then says how many and how
            high (:func:`clipped_top`).
    """
    drawn = [(s, [(x, y) for x, y in s.points if math.isfinite(x) and math.isfinite(y)]) for s in series]
    xs = [0.0, *(x for _, points in drawn for x, _ in points)]
    ys = [y for _, points in drawn for _, y in points] or [0.0, 1.0]
    if clip and (top := clipped_top(ys)) < max(ys):
        above = sum(y > top for y in ys)
        title = f"{title}; {above} value{'s' * (above > 1)} up to {max(ys):.3g} cut off"
        drawn = [(s, [(x, min(y, top)) for x, y in points]) for s, points in drawn]
        ys = [min(y, top) for y in ys]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(0.0 if zero else min(ys), max(ys))
    (x_low, x_high), (y_low, y_high) = ((values[0], values[-1]) for values in (x_ticks, y_ticks))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / (x_high - x_low) * (width - LEFT - RIGHT),
            height - BOTTOM - (y - y_low) / (y_high - y_low) * (height - TOP - BOTTOM),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title, quote=True)}"><rect width="{width}" height="{height}" fill="#fff"/>',
        text(LEFT, 16, title, size=13, weight="bold"),
    ]
    for tick in x_ticks:
        x, bottom = at(tick, y_low)
        parts.append(line(x, bottom, x, bottom + 4, "#888") + text(x, bottom + 16, number(tick), anchor="middle"))
    for tick in y_ticks:
        left, y = at(x_low, tick)
        parts.append(line(left, y, width - RIGHT, y, "#e4e4e4") + text(left - 6, y + 4, number(tick), anchor="end"))
    for mark in marks:
        if x_low < mark <= max(xs):
            x, top = at(mark, y_high)
            parts.append(line(x, top, x, height - BOTTOM, "#999", dashed=True))
    parts.append(line(LEFT, height - BOTTOM, width - RIGHT, height - BOTTOM, "#888"))
    parts.append(text((LEFT + width - RIGHT) / 2, height - 8, x_label, anchor="middle"))
    middle = (TOP + height - BOTTOM) / 2
    parts.append(
        f'<text x="14" y="{middle}" {FONT} font-size="11" fill="#333" text-anchor="middle" '
        f'transform="rotate(-90 14 {middle})">{escape(y_label)}</text>'
    )
    for index, (one, points) in enumerate(drawn):
        colour = COLOURS[index % len(COLOURS)]
        places = [at(x, y) for x, y in points]
        if len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if len(places) < 40:
            for number_, (x, y) in enumerate(places):
                label = f"{number(points[number_][0])}: {points[number_][1]:.5g}"
                parts.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}">'
                    f"<title>{escape(one.name)} {escape(label)}</title></circle>"
                )
    if len(series) > 1:
        parts.append(legend([one.name for one in series], width))
    return "".join(parts) + "</svg>"


def legend(names: list[str], width: int) -> str:
    """One row of coloured names, right-aligned above the axes."""
    parts, x = [], float(width - RIGHT)
    for index in reversed(range(len(names))):
        x -= 6.6 * len(names[index]) + 26
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<rect x="{x}" y="22" width="10" height="4" fill="{colour}"/>' + text(x + 14, 28, names[index]))
    return "".join(parts)


def text(x: float, y: float, content: str, anchor: str = "start", size: int = 11, weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" {FONT} font-size="{size}" font-weight="{weight}" fill="#333" '
        f'text-anchor="{anchor}">{escape(content)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str, dashed: bool = False) -> str:
    style = ' stroke-dasharray="3 3"' if dashed else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{style}/>'


def clipped_top(values: Sequence[float]) -> float:
    """Where a vertical axis may end, so that a few high values do not flatten the rest.

    The greatest value that lies no more than twice the central range (from the 5th to the 75th percentile, or a quarter
    of the latter if that is more) above it.
    """
    ordered = sorted(values)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.05, 0.75))
    return max(value for value in ordered if value <= high + 2 * max(high - low, abs(high) / 4))


def stack(charts: list[str], width: int, height: int) -> str:
    """Charts of one size below each other, as one SVG document."""
    moved = "".join(f'<svg y="{height * index}"{one.removeprefix("<svg")}' for index, one in enumerate(charts))
    total = height * len(charts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" width="{width}" height="{total}">'
        f"{moved}</svg>"
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers that cover [low, high]; at least two."""
    if high <= low:
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's label: 12500 -> 12.5k, 0.00025 -> 2.5e-4."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10_000:
        return f"{value / 1e6:g}M" if size >= 1e6 else f"{value / 1e3:g}k"
    if size < 1e-2:
        return f"{value:.2g}".replace("e-0", "e-")
    return f"{value:g}"
