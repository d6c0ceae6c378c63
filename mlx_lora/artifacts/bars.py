"""Bar charts as SVG text, in the style of plots.py's line charts: measured bars are filled, predicted ones hollow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mlx_lora.artifacts.plots import WIDTH, number

LABELS = 205  # width of the column of names
LETTER = 12.5  # width of a letter of a value on a page as narrow as a phone
ROW, BAR, TOP = 28, 16, 6
MOST_LETTERS = 18
WIDE = 1.5
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
    height = 2 * TOP + ROW * max(1, len(bars))
    opening = f'<svg class="chart bars" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
    if not bars:
        return f'{opening}<text x="{WIDTH / 2}" y="{height / 2}" text-anchor="middle">nothing measured</text></svg>'
    values = [bar.words or f"{number(float(f'{bar.value:.3g}'))}{unit}" for bar in bars]
    room = WIDTH - LABELS - 10 - LETTER * max(len(value) for value in values)
    most = max(max(bar.value, bar.high or 0) for bar in bars) or 1
    parts = [opening, f'<line class="grid" x1="{LABELS}" x2="{LABELS}" y1="{TOP}" y2="{height - TOP}"/>']
    for row, (bar, value) in enumerate(zip(bars, values, strict=True)):
        top = TOP + ROW * row + (ROW - BAR) / 2
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
    widths = [WIDE if letter in "<>=+~%@#&mwMW" else 1.0 for letter in name]
    if sum(widths) <= MOST_LETTERS:
        return name
    room = MOST_LETTERS - 1 - sum(widths[-ENDING:])
    kept = next(n for n in range(len(name)) if sum(widths[: n + 1]) > room)
    return f"{name[:kept]}…{name[-ENDING:]}"
