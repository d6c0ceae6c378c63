"""Draw docs/first-run.svg, and first-run-narrow.svg for phones, from a run folder's losses, a question, and its answers.

python scripts/draw_first_run.py runs/bard question.txt before.txt after.txt
"""

from __future__ import annotations

import json
import sys
import textwrap
from html import escape
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
WIDTH, HEIGHT = 860, 330
NARROW, TALL, BELOW = 430, 642, "translate(-420 312)"  # on a phone the texts stand under the chart
LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT = 56, 62, 350, 208
TEXT_LEFT, LINE, CHARACTERS, LINES = 442, 18, 53, 5
STYLE = """
.card{fill:#fff;stroke:#d0d7de}.ink{fill:#1f2328}.dim{fill:#59636e}.grid{stroke:#d0d7de}
.train{stroke:#8c959f}.held{stroke:#0969da}.heldfill{fill:#0969da}.after{fill:#ddf4ff}.before{fill:#f6f8fa}
text{font:13px -apple-system,'Segoe UI',Helvetica,Arial,sans-serif}.small{font-size:11.5px}.bold{font-weight:600}
@media (prefers-color-scheme:dark){
.card{fill:#0d1117;stroke:#3d444d}.ink{fill:#f0f6fc}.dim{fill:#9198a1}.grid{stroke:#3d444d}
.train{stroke:#656c76}.held{stroke:#4493f8}.heldfill{fill:#4493f8}.after{fill:#0c2d6b}.before{fill:#151b23}}
"""


def read(folder: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Return the losses and the held-out losses by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    held = [(line["step"], line["val_loss"]) for line in lines if line.get("val_loss") is not None]
    return trained, held


def label(x: float, y: float, text: str, classes: str, anchor: str = "start") -> str:
    """Return a line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{classes}" text-anchor="{anchor}">{escape(text)}</text>'


def chart(trained: list[tuple[int, float]], held: list[tuple[int, float]]) -> list[str]:
    """Return the loss over the steps."""
    steps = max(step for step, _ in held)
    losses = [loss for _, loss in trained + held]
    low, high = int(min(losses)), int(max(losses)) + 1

    def place(step: int, loss: float) -> tuple[float, float]:
        return LEFT + PLOT_WIDTH * step / steps, TOP + PLOT_HEIGHT * (high - loss) / (high - low)

    parts = []
    for tick in range(low, high + 1):
        _, y = place(0, tick)
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + PLOT_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(label(LEFT - 10, y + 4, str(tick), "dim small", "end"))
    for step in (0, steps // 2, steps):
        parts.append(label(place(step, low)[0], TOP + PLOT_HEIGHT + 20, str(step), "dim small", "middle"))
    parts.append(label(LEFT + PLOT_WIDTH / 2, TOP + PLOT_HEIGHT + 40, "step", "dim small", "middle"))
    for points, kind, width in ((trained, "train", 1.5), (held, "held", 2.5)):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" class="{kind}" stroke-width="{width}"/>')
    for step, loss in held:
        x, y = place(step, loss)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="heldfill"/>')
    x, y = place(*held[-1])
    parts.append(label(x, y - 12, f"{held[-1][1]:.2f}", "ink bold", "end"))
    x, y = place(*held[0])
    parts.append(label(x + 9, y + 4, f"{held[0][1]:.2f}", "ink bold"))
    return parts


def box(y: float, height: float, kind: str, title: str, text: str) -> list[str]:
    """Return a text in a box with a title."""
    parts = [
        f'<rect x="{TEXT_LEFT}" y="{y}" width="{WIDTH - TEXT_LEFT - 22}" height="{height}" rx="8" class="{kind}"/>'
    ]
    parts.append(label(TEXT_LEFT + 14, y + 22, title, "dim small bold"))
    lines = [piece for line in text.strip().splitlines() for piece in textwrap.wrap(line, CHARACTERS) or [""]]
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], lines[LINES - 1][: CHARACTERS - 4].rstrip() + " …"]
    for number, line in enumerate(lines):
        parts.append(label(TEXT_LEFT + 14, y + 43 + LINE * number, line, "ink"))
    return parts


def draw(folder: Path, question: str, before: str, after: str, narrow: bool = False) -> str:
    """Return the picture: the texts beside the chart, or under it where `narrow`."""
    width, height = (NARROW, TALL) if narrow else (WIDTH, HEIGHT)
    texts = [
        label(TEXT_LEFT, 32, question, "ink bold"),
        *box(48, 124, "before", "BEFORE", before),
        *box(184, 124, "after", "AFTER", after),
    ]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>Held-out loss of a run over its steps, and an answer before and after</title>",
        f"<style>{STYLE}</style>",
        f'<rect x="1" y="1" width="{width - 2}" height="{height - 2}" rx="12" class="card"/>',
        label(LEFT - 26, 32, "Held-out loss", "ink bold"),
        label(LEFT + PLOT_WIDTH, 32, "gray: training loss", "dim small", "end"),
        *chart(*read(folder)),
        *([f'<g transform="{BELOW}">', *texts, "</g>"] if narrow else texts),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Draw both pictures of the run folder and the three text files named on the command line."""
    folder = Path(sys.argv[1])
    question, before, after = (Path(name).read_text(encoding="utf-8").strip() for name in sys.argv[2:5])
    for name, narrow in (("first-run.svg", False), ("first-run-narrow.svg", True)):
        (DOCS / name).write_text(draw(folder, question, before, after, narrow), encoding="utf-8")
        print(f"docs/{name}: {(DOCS / name).stat().st_size} bytes")


if __name__ == "__main__":
    main()
