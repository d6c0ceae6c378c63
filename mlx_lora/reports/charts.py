"""Draw line and bar charts as SVG text, and render report pages, which need neither network nor script.

Colors, fonts and dark mode come from the page's style sheet, by class. Measured bars are filled, predicted ones hollow.
All text on a page is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from html import escape
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
    opening = f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
    if not points:
        return f'{opening}<text x="{width / 2}" y="{height / 2}" text-anchor="middle">nothing recorded</text></svg>'
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_ticks = ticks(min(xs), max(xs), 6 if width == WIDTH else 12, whole=all(x == int(x) for x in xs))
    y_ticks = ticks(0 if from_zero else min(ys), max(ys), 5)
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1e-9)
    low_y, high_y = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def locate(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / (high_x - low_x) * (width - LEFT - RIGHT)
        up = (y - low_y) / ((high_y - low_y) or 1) * (height - TOP - BOTTOM)
        return round(LEFT + across, 1), round(height - BOTTOM - up, 1)

    parts = [opening, *_grid(x_ticks, y_ticks, low_x, unit, locate, size, label)]
    parts.append(f'<text class="tick" x="{LEFT - 8}" y="{height - 12}" text-anchor="end">{escape(along)}</text>')
    for number, one in enumerate(shown):
        parts += _line(one, number, unit, locate)
    return "".join([*parts, "</svg>"])


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


def _grid(
    x_ticks: list[float],
    y_ticks: list[float],
    low_x: float,
    unit: str,
    locate: Callable,
    size: tuple[int, int],
    label: Callable[[float], str],
) -> list[str]:
    width, height = size
    parts = []
    for tick in y_ticks:
        _, y = locate(low_x, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{_short(tick)}{escape(unit)}</text>'
        )
    for tick in x_ticks:
        x, _ = locate(tick, y_ticks[0])
        if LEFT + 20 <= x <= width - RIGHT:
            anchor = "end" if x > width - RIGHT - 20 else "middle"
            parts.append(
                f'<text class="tick" x="{x}" y="{height - 12}" text-anchor="{anchor}">{escape(label(tick))}</text>'
            )
    return parts


def _line(one: Series, index: int, unit: str, locate: Callable) -> list[str]:
    runs: list[list[tuple[float, float]]] = [[]]
    for point in one.points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    finite = [point for run in runs for point in run]
    joined = not one.markers or len(finite) > 2
    style = f"line s{index}{' dashed' if one.dashed else ''}"
    parts = []
    for run in runs:
        corners = " ".join(f"{x},{y}" for x, y in (locate(*point) for point in run))
        if len(run) > 1 and joined:
            parts.append(f'<polyline class="{style}" points="{corners}"/>')
    if len(finite) <= MOST_DOTS and not one.dashed:
        for point in finite:
            x, y = locate(*point)
            words = f"{one.name}, {number(point[0])}: {number(point[1])}{unit}"
            parts.append(
                f'<circle class="dot s{index}" cx="{x}" cy="{y}" r="{5 if one.markers else 3}"><title>{escape(words)}</title></circle>'
            )
    return parts


# Bar charts

LABELS = 205  # width of the column of names
LETTER = 12.5  # width of a letter of a value on a page as narrow as a phone
ROW, BAR, BAR_TOP = 28, 16, 6
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
    height = 2 * BAR_TOP + ROW * max(1, len(bars))
    opening = f'<svg class="chart bars" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
    if not bars:
        return f'{opening}<text x="{WIDTH / 2}" y="{height / 2}" text-anchor="middle">nothing measured</text></svg>'
    values = [bar.words or f"{number(float(f'{bar.value:.3g}'))}{unit}" for bar in bars]
    room = WIDTH - LABELS - 10 - LETTER * max(len(value) for value in values)
    most = max(max(bar.value, bar.high or 0) for bar in bars) or 1
    parts = [opening, f'<line class="grid" x1="{LABELS}" x2="{LABELS}" y1="{BAR_TOP}" y2="{height - BAR_TOP}"/>']
    for row, (bar, value) in enumerate(zip(bars, values, strict=True)):
        top = BAR_TOP + ROW * row + (ROW - BAR) / 2
        length = round(max(1.0, bar.value / most * room), 1)
        kind = "predicted" if bar.predicted else "measured"
        words = f"{bar.name}: {number(bar.value)}{unit}, {kind}{f'; {bar.note}' if bar.note else ''}"
        parts.append(f"<g><title>{escape(words)}</title>")
        parts.append(f'<text x="{LABELS - 8}" y="{top + BAR - 3}" text-anchor="end">{escape(_cut(bar.name))}</text>')
        parts.append(
            f'<rect class="bar s{bar.color} {kind}" x="{LABELS}" y="{top}" width="{length}" height="{BAR}" rx="2"/>'
        )
        end = length
        if bar.low is not None and bar.high is not None:
            left, right = (round(LABELS + value / most * room, 1) for value in (bar.low, bar.high))
            middle = top + BAR / 2
            parts.append(f'<line class="whisker" x1="{left}" x2="{right}" y1="{middle}" y2="{middle}"/>')
            end = max(end, right - LABELS)
        parts.append(f'<text class="value" x="{LABELS + end + 6}" y="{top + BAR - 3}">{escape(value)}</text></g>')
    return "".join([*parts, "</svg>"])


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
