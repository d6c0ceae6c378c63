"""docs/development/architecture.md: its picture shows the imports that are there, and its roads are those that runs take."""

from __future__ import annotations

import ast
import importlib
import json
import re
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mlx_lora"
PAGE = (ROOT / "docs" / "development" / "architecture.md").read_text()
OFTEN = (
    "--max-seq-length",
    64,
    "--rank",
    4,
    "--iters",
    2,
    "--steps-per-eval",
    1,
    "--val-batches",
    1,
    "--sample-tokens",
    0,
)


@pytest.fixture
def architecture(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("architecture")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def road(title: str) -> list[tuple[str, str]]:
    """Return the (file, function) of a road, in order."""
    return re.findall(r"^\| `([\w/]+\.py)` \| `([\w.]+)` \|", section(title), re.MULTILINE)


ROADS = {name: road(f"The road of {title}") for name, title in (("sft", "an SFT example"), ("grpo", "a GRPO step"))}


@cache
def defined_in(path: Path) -> set[str]:
    """Return the functions of a file as a call names them: with their class, or the function around them."""
    found = set()

    def visit(node: ast.AST, around: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = around
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found.add(around + child.name)
                inner = f"{around}{child.name}."
            visit(child, inner)

    visit(ast.parse(path.read_text()), "")
    return found


@pytest.mark.long
def test_the_picture_has_the_rooms_and_the_imports_of_the_code(architecture):
    """If this fails: python scripts/architecture.py, look at the picture, and commit it."""
    root = ElementTree.parse(architecture.PICTURE).getroot()
    assert {element.get("data-room") for element in root.iter() if element.get("data-room")} == set(architecture.ROW_OF)
    assert set(architecture.read_rooms(PACKAGE)) == set(architecture.ROW_OF)
    shown = {
        (element.get("class"), element.get("data-from"), element.get("data-to"))
        for element in root.iter() if element.get("data-from")
    }  # fmt: skip
    down, up = architecture.arrows_of(architecture.read_imports(PACKAGE, architecture.ROW_OF))
    assert shown == {("down", *arrow) for arrow in down} | {("up", *arrow) for arrow in up}
    assert len(down) > 20
    assert architecture.PICTURE.stat().st_size < 60_000
    assert not any(element.tag.endswith("script") for element in root.iter())


def test_imports_are_found_wherever_they_stand_and_implied_arrows_are_left_out(architecture, tmp_path):
    package = tmp_path / "mlx_lora"
    (package / "cli").mkdir(parents=True)
    (package / "cli" / "x.py").write_text("def f():\n    from mlx_lora import api, utils as u\nimport mlx_lora.api.a\n")
    (package / "api").mkdir()
    (package / "api" / "a.py").write_text("from mlx_lora.utils.b import b\nfrom mlx_lora.api.c import c\n")
    (package / "utils").mkdir()
    (package / "utils" / "b.py").write_text("import mlx_lora.cli.x as x\nimport numpy.api\n")
    found = architecture.read_imports(package, ["cli", "api", "utils"])
    assert found == {
        ("cli", "api"): ["cli/x.py", "cli/x.py"], ("cli", "utils"): ["cli/x.py"], ("api", "utils"): ["api/a.py"],
        ("utils", "cli"): ["utils/b.py"],
    }  # fmt: skip
    assert architecture.arrows_of(found) == ({("cli", "api"), ("api", "utils")}, {("utils", "cli")})
    assert "utils/b.py" in architecture.draw(found)


def test_every_room_says_what_it_holds_and_the_page_does_too(architecture):
    rooms = architecture.read_rooms(PACKAGE)
    shown = dict(re.findall(r"^\| `(\w+)/` \| (.+) \|$", section("The rooms"), re.MULTILINE))
    assert shown == {name: room.purpose for name, room in rooms.items()}
    assert all(len(room.purpose.split()) >= 5 and room.purpose.endswith(".") for room in rooms.values())


def test_files_functions_and_classes_of_the_page_exist():
    named = set(re.findall(r"`([\w/]+/\w+\.py)`", PAGE))
    assert len(named) > 35
    assert not {name for name in named if not (PACKAGE / name).is_file() and not (ROOT / name).is_file()}
    for name, function in (step for steps in ROADS.values() for step in steps):
        assert function in defined_in(PACKAGE / name), f"{name}: {function}"
    for words, files in re.findall(r"^\| (.+?) \| .+ \| (`[^|]+`) \|$", section("Words"), re.MULTILINE):
        classes = re.findall(r"`(\w+)`", words)
        places = [defined_in(PACKAGE / name) for name in re.findall(r"`([\w/]+\.py)`", files)]
        assert not {name for name in classes if not any(name in place for place in places)}
    assert "compose_nothing" not in defined_in(PACKAGE / "trainer" / "build.py")


def left_of(steps: list[tuple[str, str]], calls: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the steps that are not reached when calls go along them in order."""
    place = 0
    for call in calls:
        place += place < len(steps) and call == steps[place]
    return steps[place:]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ROADS)
def test_a_run_calls_the_functions_of_the_road_in_this_order(objective, architecture, tiny_folder, chats, tmp_path):
    words = ["train", "--model", tiny_folder, "--data", chats, "--adapter-path", tmp_path / "out", *OFTEN]
    words += ["--grad-checkpoint", "block", "--kernels", "ours"]
    if objective == "grpo":
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(20)))
        (tmp_path / "reward.py").write_text(
            "def length(completions, **columns):\n    return list(map(len, completions))\n"
        )
        words[4] = tmp_path / "prompts.jsonl"
        words += ["--objective", "grpo", "--reward", f"{tmp_path / 'reward.py'}:length", "--kl-beta", 0.1]
        words += ["--group-size", 2, "--max-new-tokens", 4, "--batch-size", 2]
    steps, calls = ROADS[objective], []
    architecture.follow(list(map(str, words)), lambda *function: calls.append(function) if function in steps else None)
    assert len(steps) > 15
    assert not left_of(steps, calls)
    assert left_of(steps[::-1], calls)
