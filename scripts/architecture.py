"""Draw docs/development/architecture.svg, the rooms of mlx_lora and the imports between them, and print a table of the rooms.

python scripts/architecture.py
python scripts/architecture.py --road train --model MODEL --data FILE --adapter-path DIR --iters 4

The first reads the imports from the source and imports nothing of the package. The second runs the command, and prints the package's
files in the order in which the command first calls a function of each, with that function.
"""

from __future__ import annotations

import ast
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from html import escape
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "development" / "architecture.svg"
# The layers from top to bottom: title, and rows of rooms with their column and a few words. A room is meant to import from the rows
# below its own; an arrow that does not point down is drawn in another color.
LAYERS: list[tuple[str, list[dict[str, tuple[float, str]]]]] = [
    ("What people call", [
        {"cli": (1, "one file per command"), "serving": (2, "OpenAI's protocol"), "training_server": (3, "Tinker's protocol")},
        {"studio": (1, "the local page"), "bench": (2, "benchmarks, doctor"), "mcp_server": (3, "tools of assistants")},
        {"api": (2, "what Python users call")},
    ]),
    ("Training and answers", [
        {"trainer": (1, "loop, step, checkpoints")},
        {"evaluation": (1, "tasks, answers, intervals")},
        {"engine": (3, "many adapters at once")},
        {"objectives": (1, "sft, dpo, grpo, ..."), "reports": (2, "pages about results")},
        {"rollouts": (3, "sampling, rewards")},
        {"exporters": (2, "adapter folders, PEFT"), "losses": (3, "functions of arrays")},
        {"parallel": (2, "several processes")},
    ]),
    ("The model", [
        {"models": (2, "load, convert, quantize")},
        {"gguf": (2, "llama.cpp's files")},
        {"adapters": (3, "LoRA and its relatives")},
        {"kernels": (3, "fast functions, chosen")},
    ]),
    ("Data, settings, machine", [
        {"data": (1, "records to token rows"), "planner": (3, "memory and speed")},
        {"config": (2, "every setting, one row")},
        {"utils": (2, "files, device, console"), "compat": (3, "into other packages")},
    ]),
]  # fmt: skip
ROWS = [row for _, rows in LAYERS for row in rows]
ROW_OF = {room: number for number, row in enumerate(ROWS) for room in row}
WIDTH, BOX_WIDTH, BOX_HEIGHT, PITCH, TOP, BAND_GAP = 860, 150, 42, 64, 54, 16
FIRST_COLUMN, COLUMN = 296, 174  # x of the middle of column 1, and from one column to the next
LANE, LEFT_LANE, RIGHT_LANE, CORNER = 10, 206, 734, 5  # arrows that do not point down run beside the boxes
STYLE = """
.card{fill:#fff;stroke:#d0d7de}.band{fill:#f6f8fa}.box{fill:#fff;stroke:#8c959f}.ink{fill:#1f2328}.dim{fill:#59636e}
path{fill:none;stroke:#0969da;stroke-width:1.5}.up{stroke:#bc4c00;stroke-dasharray:5 3}
.tip{fill:#0969da;stroke:none}.up-tip{fill:#bc4c00;stroke:none}
text{font:11px -apple-system,'Segoe UI',Helvetica,Arial,sans-serif}.name{font-size:14px;font-weight:600}.title{font-size:12px;font-weight:600}
@media (prefers-color-scheme:dark){
.card{fill:#0d1117;stroke:#3d444d}.band{fill:#151b23}.box{fill:#0d1117;stroke:#656c76}.ink{fill:#f0f6fc}.dim{fill:#9198a1}
path{stroke:#4493f8}.up{stroke:#f0883e}.tip{fill:#4493f8;stroke:none}.up-tip{fill:#f0883e;stroke:none}}
"""
Arrow = tuple[str, str]


class Room(NamedTuple):
    """A folder of the package.

    Attributes:
        modules: its Python files.
        lines: of all of them.
        purpose: the first sentence of its docstring.
    """

    modules: int
    lines: int
    purpose: str


def read_rooms(package: Path) -> dict[str, Room]:
    """Return the package's rooms by name."""
    found = {}
    for folder in sorted(path.parent for path in package.glob("*/__init__.py")):
        files = list(folder.rglob("*.py"))
        purpose = (ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or "").split(
            "\n\n"
        )[0]
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
        found[folder.name] = Room(len(files), lines, " ".join(purpose.split()))
    return found


def read_imports(package: Path, rooms: Iterable[str]) -> dict[Arrow, list[str]]:
    """Return the imports from one room to another, also those in functions.

    Returns:
        (importing room, imported room) -> the importing files, each as often as it imports a module of that room.
    """
    rooms, found = set(rooms), defaultdict(list)
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package)
        room = file.parts[0]
        for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
            for other in {name.split(".")[1] for name in imported(node, package.name)} & rooms - {room}:
                if room in rooms:
                    found[room, other].append(file.as_posix())
    return dict(found)


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements within a file, a function or a block, and theirs; what has no statements is not looked into."""
    for part in ("body", "orelse", "finalbody", "handlers", "cases"):
        for inner in getattr(node, part, ()):
            yield inner
            yield from statements(inner)


def imported(node: ast.AST, package: str) -> Iterator[str]:
    """Yield the modules of a package that a statement imports."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom) and node.module:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    return (name for name in names if name.startswith(f"{package}."))


def arrows_of(imports: Iterable[Arrow]) -> tuple[set[Arrow], set[Arrow]]:
    """Return the arrows of the picture: those that point down, without what others imply, and those that do not."""
    up = {(room, other) for room, other in imports if ROW_OF[room] >= ROW_OF[other]}
    below: dict[str, set[str]] = defaultdict(set)
    for room, other in set(imports) - up:
        below[room].add(other)

    def reached(room: str) -> set[str]:
        return below[room].union(*(reached(other) for other in list(below[room])))

    down = {
        (room, other)
        for room in list(below)
        for other in below[room]
        if not any(other in reached(between) for between in below[room])
    }
    return down, up


# The picture.


def box_of(room: str) -> tuple[float, float]:
    """Return the upper left corner of a room's box."""
    row = ROW_OF[room]
    bands = sum(row >= first for first in band_starts())  # the room's own included
    column, _ = ROWS[row][room]
    return FIRST_COLUMN + (column - 1) * COLUMN - BOX_WIDTH / 2, TOP + row * PITCH + bands * BAND_GAP


def band_starts() -> list[int]:
    """Return the number of each layer's first row."""
    return [sum(len(rows) for _, rows in LAYERS[:number]) for number in range(len(LAYERS))]


def label(x: float, y: float, text: str, classes: str, anchor: str = "middle") -> str:
    """Return a line of text."""
    return f'<text x="{x:g}" y="{y:g}" class="{classes}" text-anchor="{anchor}">{escape(text)}</text>'


def spread(place: int, count: int, length: float) -> float:
    """Return where arrow `place` of `count` leaves or meets a side of a box, from the middle of that side."""
    return (place - (count - 1) / 2) * min(length / max(count, 1), 22)


def path_of(arrow: Arrow, points: str, kind: str, files: list[str]) -> str:
    """Return an arrow that names its rooms and the files behind it."""
    title = f"{arrow[0]} imports {arrow[1]}" + (f": {', '.join(dict.fromkeys(files))}" if kind == "up" else "")
    return (
        f'<path d="{points}" class="{kind}" data-from="{arrow[0]}" data-to="{arrow[1]}" marker-end="url(#{kind}-tip)">'
        f"<title>{escape(title)}</title></path>"
    )


def down_arrows(down: set[Arrow], imports: dict[Arrow, list[str]]) -> list[str]:
    """Return curves from the lower side of a box to the upper side of another."""
    leaving, meeting = defaultdict(list), defaultdict(list)
    for room, other in down:
        leaving[room].append((box_of(other)[0], other))
        meeting[other].append((box_of(room)[0], room))
    parts = []
    for room, other in sorted(down):
        (x, y), (to_x, to_y) = box_of(room), box_of(other)
        out, into = sorted(leaving[room]), sorted(meeting[other])
        x += BOX_WIDTH / 2 + spread([name for _, name in out].index(other), len(out), BOX_WIDTH)
        to_x += BOX_WIDTH / 2 + spread([name for _, name in into].index(room), len(into), BOX_WIDTH)
        y, to_y = y + BOX_HEIGHT, to_y - 1
        bend = (to_y - y) / 2
        points = f"M{x:g} {y:g}C{x:g} {y + bend:g} {to_x:g} {to_y - bend:g} {to_x:g} {to_y:g}"
        parts.append(path_of((room, other), points, "down", imports[room, other]))
    return parts


def blocked(room: str, right: bool) -> int:
    """Return how many boxes stand between a room and the right or left edge of the picture."""
    row = ROWS[ROW_OF[room]]
    return sum((column > row[room][0]) == right for name, (column, _) in row.items() if name != room)


def up_arrows(up: set[Arrow], imports: dict[Arrow, list[str]]) -> list[str]:
    """Return lines that leave a box at its side, run up in a lane, and meet another box from its side."""

    def side_of(arrow: Arrow) -> bool:  # to the right
        ways = [sum(blocked(room, right) for room in arrow) for right in (False, True)]
        columns = sum(ROWS[ROW_OF[room]][room][0] for room in arrow)
        return ways[1] < ways[0] or (ways[1] == ways[0] and columns >= 4)

    level = sorted(arrow for arrow in up if ROW_OF[arrow[0]] == ROW_OF[arrow[1]])
    sides = {arrow: side_of(arrow) for arrow in up if arrow not in level}
    lanes = lanes_of(sides)
    parts = []
    for arrow in level:
        (x, y), (to_x, _) = map(box_of, arrow)
        start, end = (x, to_x + BOX_WIDTH + 1) if to_x < x else (x + BOX_WIDTH, to_x - 1)
        parts.append(path_of(arrow, f"M{start:g} {y + BOX_HEIGHT / 2:g}H{end:g}", "up", imports[arrow]))
    for arrow, lane in lanes.items():
        right = sides[arrow]
        ends = []
        for room in arrow:
            # What leaves stands above what arrives, and arrows in inner lanes are crossed by as few others as possible.
            here = [one for one in lanes if room in one and sides[one] == right]
            here.sort(key=lambda one: lanes[one] if one[0] == room else 1000 - lanes[one])
            x, y = box_of(room)
            y += BOX_HEIGHT / 2 + spread(here.index(arrow), len(here), BOX_HEIGHT - 8)
            ends.append((x + BOX_WIDTH * right, y))
        (x, y), (to_x, to_y) = ends
        way = 1 if right else -1
        edge = (RIGHT_LANE if right else LEFT_LANE) + way * LANE * lane
        turn = edge - way * CORNER
        up_to = (
            f"H{turn:g}Q{edge:g} {y:g} {edge:g} {y - CORNER:g}V{to_y + CORNER:g}Q{edge:g} {to_y:g} {turn:g} {to_y:g}"
        )
        parts.append(path_of(arrow, f"M{x:g} {y:g}{up_to}H{to_x + way:g}", "up", imports[arrow]))
    return parts


def lanes_of(sides: dict[Arrow, bool]) -> dict[Arrow, int]:
    """Return the lane of each arrow, from 0 at the boxes; `sides` says whether it runs on the right."""
    taken: list[tuple[bool, int, int, int]] = []  # side, lane, first and last row
    lanes = {}
    for arrow in sorted(sides, key=lambda arrow: (ROW_OF[arrow[0]] - ROW_OF[arrow[1]], arrow)):  # short ones inside
        first, last = ROW_OF[arrow[1]], ROW_OF[arrow[0]]
        used = {lane for side, lane, a, b in taken if side == sides[arrow] and a <= last and first <= b}
        lanes[arrow] = next(lane for lane in range(len(used) + 1) if lane not in used)
        taken.append((sides[arrow], lanes[arrow], first, last))
    return lanes


def draw(imports: dict[Arrow, list[str]]) -> str:
    """Return the picture of these imports."""
    down, up = arrows_of(imports)
    height = TOP + len(ROWS) * PITCH + len(LAYERS) * BAND_GAP + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>The rooms of mlx_lora in layers, and the imports between them</title>",
        f"<style>{STYLE}</style><defs>",
        *(
            f'<marker id="{kind}-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" class="{tip}"/></marker>'
            for kind, tip in (("down", "tip"), ("up", "up-tip"))
        ),
        "</defs>",
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="12" class="card"/>',
        '<path d="M24 28H60" class="down" marker-end="url(#down-tip)"/>',
        label(70, 32, "imports, and may use all below it", "dim", "start"),
        '<path d="M300 28H336" class="up" marker-end="url(#up-tip)"/>',
        label(346, 32, "imports against the layers, to be removed", "dim", "start"),
    ]
    for (title, rows), first in zip(LAYERS, band_starts(), strict=True):
        y = box_of(next(iter(ROWS[first])))[1] - 13
        parts.append(
            f'<rect x="12" y="{y:g}" width="{WIDTH - 24}" height="{len(rows) * PITCH + 4}" rx="8" class="band"/>'
        )
        parts.append(label(24, y + 22, title, "dim title", "start"))
    parts += down_arrows(down, imports) + up_arrows(up, imports)
    for row in ROWS:
        for room, (_, words) in row.items():
            x, y = box_of(room)
            parts.append(
                f'<rect x="{x:g}" y="{y:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="7" class="box" data-room="{room}"/>'
            )
            parts.append(label(x + BOX_WIDTH / 2, y + 18, room, "ink name"))
            parts.append(label(x + BOX_WIDTH / 2, y + 33, words, "dim"))
    return "\n".join([*parts, "</svg>"]) + "\n"


# The road of a command.


def follow(words: list[str], called: Callable[[str, str], None]) -> None:
    """Run a command of mlx-lora, and call `called` with file and function whenever a function of the package begins.

    Functions that run while a module is imported are left out.

    Args:
        words: of the command, without mlx-lora.
        called: gets the path in the package, and the function with its class or the function around it, as in `Step.__call__`.
    """
    import mlx_lora
    from mlx_lora.__main__ import main as command

    package = str(Path(mlx_lora.__file__).parent) + "/"

    def on_event(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package) and not importing(frame):
            called(code.co_filename.removeprefix(package), code.co_qualname.replace("<locals>.", ""))

    def importing(frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(package):
                return True
            frame = frame.f_back
        return False

    sys.setprofile(on_event)
    threading.setprofile(on_event)
    try:
        command.main(words, prog_name="mlx-lora", standalone_mode=False)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def main() -> None:
    """Draw the picture and print the table, or run a command and print its files."""
    if sys.argv[1:2] == ["--road"]:
        first: dict[str, str] = {}

        def called(name: str, function: str) -> None:
            first.setdefault(name, function)

        follow(sys.argv[2:], called)
        for name, function in first.items():
            print(f"{name:<40} {function}")
        return
    package = ROOT / "mlx_lora"
    rooms = read_rooms(package)
    if set(rooms) != set(ROW_OF):
        sys.exit(
            f"scripts/architecture.py: rooms without a place in LAYERS, or without a folder: {sorted(set(rooms) ^ set(ROW_OF))}"
        )
    imports = read_imports(package, rooms)
    PICTURE.write_text(draw(imports), encoding="utf-8")
    print("| room | modules | lines | holds |\n|---|---|---|---|")
    for room in ROW_OF:
        print(f"| `{room}/` | {rooms[room].modules} | {rooms[room].lines:,} | {rooms[room].purpose} |")
    down, up = arrows_of(imports)
    print(
        f"\n{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size:,} bytes, {len(down)} arrows down, {len(up)} against the layers; their imports:"
    )
    for arrow in sorted(up, key=lambda arrow: -len(imports[arrow])):
        print(f"  {arrow[0]} -> {arrow[1]}: {len(imports[arrow])} in {', '.join(dict.fromkeys(imports[arrow]))}")


if __name__ == "__main__":
    main()
