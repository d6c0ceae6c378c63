"""Draw line and bar charts as SVG text, and render report pages, which need neither network nor script.

Colors, fonts and dark mode come from the page's style sheet, by class. Measured bars are filled, predicted ones hollow.
All text on a page is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

# Line charts

WIDTH, HEIGHT = 640, 260
WIDE = (1240, 320)  # of a chart that has a page's whole width
LEFT, RIGHT, TOP, BOTTOM = 88, 12, 12, 34
MOST_POINTS = 400  # per series; more are averaged
MOST_DOTS = 60  # a series with more points is drawn as a line without dots
# Titles of what episodes with tools report -> their names in metrics.jsonl.
OF_TOOLS = (
    ("Calls of tools in an episode", "tools/call_frequency"),
    ("Share of calls that failed", "tools/failure_frequency"),
    ("Answers of the model in an episode", "tools/turns"),
    ("Episodes ended at --max-turns", "tools/max_turns_frequency"),
)


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: for the legend.
        points: (x, y) with increasing x; points that are not finite leave a gap.
        dashed: whether it is dashed, for a prediction or a limit, not a measurement.
        markers: whether its points are drawn large, for few measurements; two of them are not joined by a line.
    """

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    markers: bool = False


def line_chart(
    title: str,
    series: Sequence[Series],
    unit: str = "",
    from_zero: bool = False,
    along: str = "step",
    size: tuple[int, int] = (WIDTH, HEIGHT),
    label: Callable[[float], str] | None = None,
) -> str:
    """Return an SVG element with axes, the lines, and each point's values as its tooltip.

    Args:
        title: description for readers who do not see it.
        series: the lines; without a finite point, the chart says that nothing was recorded.
        unit: written after the numbers of the y axis.
        from_zero: start the y axis at zero.
        along: the name of the x axis.
        size: width and height of the drawing, in its own units.
        label: returns what is written at an x; the default is the number itself.
    """
    width, height = size
    label = label or _short
    shown = [replace(one, points=_thinned(one.points)) for one in series]
    points = [point for one in shown for point in one.points if math.isfinite(point[1])]
    drawn: dict[str, Any] = {"title": title, "width": width, "height": height, "along": along}
    drawn |= {"left": LEFT, "right": width - RIGHT, "x_marks": [], "y_marks": [], "lines": []}
    if points:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        x_ticks = ticks(min(xs), max(xs), 6 if width == WIDTH else 12, whole=all(x == int(x) for x in xs))
        y_ticks = ticks(0 if from_zero else min(ys), max(ys), 5)
        low_x, high_x = min(xs), max(max(xs), min(xs) + 1e-9)
        low_y, high_y = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

        def locate(x: float, y: float) -> tuple[float, float]:
            across = (x - low_x) / (high_x - low_x) * (width - LEFT - RIGHT)
            up = (y - low_y) / ((high_y - low_y) or 1) * (height - TOP - BOTTOM)
            return round(LEFT + across, 1), round(height - BOTTOM - up, 1)

        marks = [(locate(tick, low_y)[0], label(tick)) for tick in x_ticks]
        drawn["x_marks"] = [(x, words) for x, words in marks if LEFT + 20 <= x <= width - RIGHT]
        drawn["y_marks"] = [(locate(low_x, tick)[1], f"{_short(tick)}{unit}") for tick in y_ticks]
        drawn["lines"] = [_line(one, unit, locate) for one in shown]
    return _environment(COMMON).get_template("line_chart.svg").render(drawn)


def _line(one: Series, unit: str, locate: Callable[[float, float], tuple[float, float]]) -> dict[str, Any]:
    """Return what is drawn of a series: the corners of each run without a gap, and a dot with its words for each point."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in one.points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    finite = [point for run in runs for point in run]
    drawn = [run for run in runs if len(run) > 1 and (not one.markers or len(finite) > 2)]
    dotted = finite if len(finite) <= MOST_DOTS and not one.dashed else []
    return {
        "dashed": one.dashed, "radius": 5 if one.markers else 3,
        "runs": [" ".join(f"{x},{y}" for x, y in (locate(*point) for point in run)) for run in drawn],
        "dots": [(*locate(x, y), f"{one.name}, {number(x)}: {number(y)}{unit}") for x, y in dotted],
    }  # fmt: skip


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Return up to `most` + 1 round numbers from at or below `low` to at least `high`, in steps of 1, 2 or 5.

    Args:
        low, high: the ends of the axis.
        most: how many steps it has at most.
        whole: whether only whole numbers make sense, as for a run's steps.
    """
    if not high > low:
        around = (
            (low - 0.5, low + 0.5) if abs(low) < 1 else (low * 0.9, low * 1.1) if low > 0 else (low * 1.1, low * 0.9)
        )
        low, high = around if low else (0.0, 1.0)  # what is 0 throughout is mostly a share or a reward
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def number(value: float) -> str:
    """Return a number as text for an axis: 1,200, 0.25, 2.0e-5."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-2 else f"{value:.1e}".replace("e-0", "e-")


def perplexity(loss: float) -> str:
    """Return exp(loss) as text, for a loss in nats per token."""
    if loss >= 700:
        return "∞"
    value = math.exp(loss)
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:#.3g}".rstrip(".")


def _short(value: float) -> str:
    """Return a number as text that fits an axis on a phone: 40k for 40,000."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else number(value)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbors until there are at most MOST_POINTS."""
    size = math.ceil(len(points) / MOST_POINTS) if points else 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


# Bar charts

LABELS = 205  # width of the column of names
LETTER = 12.5  # width of a letter of a value on a page as narrow as a phone
ROW, BAR, BAR_TOP = 28, 16, 6  # as bar_chart.svg has them
MOST_LETTERS = 18
WIDE_LETTER = 1.5  # letters of usual width
ENDING = 6  # letters at the end of a long name that are kept, because the names of a family differ there


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        name: on its left.
        value: its length.
        predicted: whether it was not measured; then it is hollow and dashed.
        low, high: spread, drawn as a whisker; None for none.
        color: index of the page's colors.
        note: added to the tooltip.
        words: written after the bar instead of its value.
    """

    name: str
    value: float
    predicted: bool = False
    low: float | None = None
    high: float | None = None
    color: int = 0
    note: str = ""
    words: str = ""


def bar_chart(title: str, bars: Sequence[Bar], unit: str = "") -> str:
    """Return an SVG element with a row per bar: name, bar from zero, value, and a tooltip.

    Args:
        title: description for readers who do not see it.
        bars: from top to bottom; values must not be negative.
        unit: written after the numbers.
    """
    values = [bar.words or f"{number(float(f'{bar.value:.3g}'))}{unit}" for bar in bars]
    room = WIDTH - LABELS - 10 - LETTER * max((len(value) for value in values), default=0)
    most = max((max(bar.value, bar.high or 0) for bar in bars), default=0) or 1
    rows = []
    for row, (bar, value) in enumerate(zip(bars, values, strict=True)):
        length, kind, spread = (
            round(max(1.0, bar.value / most * room), 1),
            "predicted" if bar.predicted else "measured",
            None,
        )
        if bar.low is not None and bar.high is not None:
            spread = [round(LABELS + value / most * room, 1) for value in (bar.low, bar.high)]
        rows.append({
            "name": _cut(bar.name), "top": BAR_TOP + ROW * row + (ROW - BAR) / 2, "length": length, "kind": kind,
            "color": bar.color, "spread": spread, "end": max(LABELS + length, spread[1] if spread else 0), "value": value,
            "words": f"{bar.name}: {number(bar.value)}{unit}, {kind}{f'; {bar.note}' if bar.note else ''}",
        })  # fmt: skip
    height = 2 * BAR_TOP + ROW * max(1, len(bars))
    drawn = {"title": title, "width": WIDTH, "height": height, "labels": LABELS, "rows": rows}
    return _environment(COMMON).get_template("bar_chart.svg").render(drawn)


def _cut(name: str) -> str:
    """Return a name shortened to about the width of its column."""
    widths = [WIDE_LETTER if letter in "<>=+~%@#&mwMW" else 1.0 for letter in name]
    if sum(widths) <= MOST_LETTERS:
        return name
    room = MOST_LETTERS - 1 - sum(widths[-ENDING:])
    kept = next(n for n in range(len(name)) if sum(widths[: n + 1]) > room)
    return f"{name[:kept]}…{name[-ENDING:]}"


# Pages

COMMON = Path(__file__).parent / "pages"


def render_page(folder: Path, template: str, /, **values: Any) -> str:
    """Return a page's text.

    Args:
        folder, template: the template's folder and name; it extends page.html.
        values: for the template. They are escaped unless the template marks them `safe`, as it does for our SVG.
    """
    css = tokens_css() + (COMMON / "page.css").read_text(encoding="utf-8")
    return _environment(folder).get_template(template).render(css=css, **values)


def tokens_css() -> str:
    """Return the colors, type sizes and spacing that all pages of ours share; one that must stay one file copies them in."""
    return (COMMON / "tokens.css").read_text(encoding="utf-8")


@cache
def _environment(folder: Path) -> jinja2.Environment:
    loader = jinja2.FileSystemLoader([folder, COMMON])
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
