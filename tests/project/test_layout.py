"""The tree keeps its shape: which rooms may import which, no circles, short files and functions."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

from mlx_lora.__main__ import COMMANDS, ELSEWHERE

PACKAGE = Path(__file__).parents[2] / "mlx_lora"
PROJECT = (PACKAGE.parent / "pyproject.toml").read_text()
OLDEST = (3, int(re.search(r'requires-python = ">=3\.(\d+)"', PROJECT)[1]))
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = {
    "adapters", "api", "bench", "cli", "compat", "config", "data", "engine", "evaluation", "exporters", "gguf", "kernels", "losses",
    "mcp_server", "models", "objectives", "parallel", "planner", "reports", "rollouts", "serving", "studio", "trainer", "training_server",
    "utils",
}  # fmt: skip
# What people start. Each may be deleted: nothing imports it but itself, and the lists of commands at the root.
APPLICATIONS = {"bench", "cli", "mcp_server", "serving", "studio", "training_server"}
# A room imports these and itself; a room that is not named here may import all but the `ABOVE` ones.
ONLY = {"compat": set(), "config": {"utils"}, "data": {"config", "utils"}, "planner": {"config", "kernels", "utils"}}
# Only these import the room: what a person calls stands on top.
ABOVE = {
    **{name: set() for name in APPLICATIONS}, "api": APPLICATIONS, "engine": {*APPLICATIONS, "api", "evaluation"},
    "evaluation": {"api", "cli", "studio", "trainer"},
}  # fmt: skip
MOST_ARGUMENTS, MOST_WITH_MANY = 7, 10
# Names that the applications import from the core, all together; the plan is a facade of 47.
MOST_NAMES = 524
# Modules of ours that come with a module.
MOST_WITH_IT = {"trainer.step": 20, "trainer.trainer": 24, "objectives.sft": 44}


@cache
def trees() -> dict[Path, ast.Module]:
    """All files of the package, parsed: once, and not by a process that only collects this file."""
    return {path: ast.parse(path.read_text(), feature_version=OLDEST) for path in FILES}


def statements(body: Iterable[ast.AST], at_import: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports of a file; `at_import`: without those in functions, and those of types that only annotate."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif at_import and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from statements(node.orelse, at_import)
        elif not (at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            for part in ("body", "orelse", "finalbody", "handlers", "cases"):
                yield from statements(getattr(node, part, ()), at_import)


def imported(tree: ast.Module, at_import: bool = False) -> set[str]:
    """All names that a file imports; `from a import b` gives both `a` and `a.b`."""
    found = set()
    for node in statements(tree.body, at_import):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@cache
def graph(at_import: bool) -> dict[str, set[str]]:
    """Module of ours -> those of ours that it imports; without packages, whose files import nothing when they are loaded."""
    dotted = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in FILES if p.stem != "__init__"}
    return {name: imported(trees()[path], at_import) & dotted.keys() - {name} for name, path in dotted.items()}


def with_it(name: str) -> set[str]:
    """All modules of ours that are imported when one is."""
    found, new = set(), {f"mlx_lora.{name}"}
    while new:
        found |= new
        new = set().union(*(graph(True)[one] for one in new)) - found
    return found - {f"mlx_lora.{name}"}


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def test_the_rooms_are_those_of_the_map():
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and list(p.glob("*.py"))}
    assert ROOMS - APPLICATIONS <= rooms <= ROOMS
    assert {p.stem for p in PACKAGE.glob("*.py")} == {"__init__", "__main__", "train"}


def rooms_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(trees()[path]) if name.startswith("mlx_lora.")} & ROOMS


def test_imports_point_down():
    wrong = []
    for path in FILES:
        room, used = room_of(path), rooms_imported(path)
        allowed = ONLY.get(room, ROOMS) | {room}
        wrong += [(str(path), other) for other in used - allowed]
        wrong += [(str(path), other) for other in used if room and room not in ABOVE.get(other, ROOMS) | {other}]
    assert not wrong


def test_only_a_command_leads_from_the_root_to_an_application():
    """`import mlx_lora` and a run need none of them; the commands of one that was deleted are gone, and the others work."""
    importing = {p.name: used for p in PACKAGE.glob("*.py") if (used := rooms_imported(p) & APPLICATIONS)}
    assert importing == {"train.py": {"cli"}}  # python -m mlx_lora.train
    homes = [ELSEWHERE.get(name, f"cli.{name}") for name in {*COMMANDS, *ELSEWHERE}]
    assert {home.split(".")[0] for home in homes} == APPLICATIONS
    here = [PACKAGE / f"{home.replace('.', '/')}.py" for home in homes if (PACKAGE / home.split(".")[0]).is_dir()]
    assert [path for path in here if not path.is_file()] == []


def test_applications_use_no_more_names_of_the_core_than_they_do():
    used = {
        (node.module, alias.name)
        for path in FILES
        if room_of(path) in APPLICATIONS
        for node in ast.walk(trees()[path])
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_lora.")
        for alias in node.names
        if node.module.split(".")[1] not in APPLICATIONS
    }
    assert len(used) <= MOST_NAMES


def test_data_settings_and_planner_need_no_mlx():
    """Only what measures or describes this very machine knows MLX."""
    asking = [
        str(path.relative_to(PACKAGE))
        for path, tree in trees().items()
        if room_of(path) in ("data", "config", "planner")
        and any(name == "mlx" or name.startswith(("mlx.", "mlx_lora.utils.device")) for name in imported(tree))
    ]
    assert asking == ["planner/machine.py"]


def test_the_package_can_be_used_without_matplotlib():
    """It is an extra, which only figures need; at night, a test of the notebooks tries it."""
    assert not [
        path for path, tree in trees().items() if "matplotlib" in {n.split(".")[0] for n in imported(tree, True)}
    ]


def test_functions_take_few_arguments():
    """What belongs together is one object; the functions that Python users call, and those with mlx-lm's signature, take many."""
    many = []
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len([one for one in taken if one.arg not in ("self", "cls")]) > MOST_ARGUMENTS:
                    many.append(f"{path.relative_to(PACKAGE)}: {node.name}")
    others = [one for one in many if not one.startswith(("api/", "kernels/"))]
    assert others == ["rollouts/verifiers_host.py: launch"]  # the signature of the package that calls it
    assert len(many) <= MOST_WITH_MANY


# What Python's standard library got after 3.11, of that which is used in programs like this one.
NEWER = frozenset(
    ["sumprod", "batched", "override", "is_junction", "process_cpu_count", "onexc", "walk_up", "case_sensitive"]
)


def test_the_oldest_python_that_is_promised_has_all_that_is_used():
    newer = {}
    for path, tree in trees().items():
        # Of an attribute, a name, an argument, and what is imported.
        nodes = ast.walk(tree)
        newer[path] = {
            name
            for node in nodes
            for field in ("attr", "id", "arg", "name")
            if (name := getattr(node, field, None)) in NEWER
        }
    assert OLDEST == (3, 11)
    assert not {path: found for path, found in newer.items() if found}


def test_files_that_the_package_declares_are_there():
    declared = re.search(r"^mlx_lora = \[(.*?)\]", PROJECT, re.M | re.S)[1]
    patterns = re.findall(r'"(.+?)"', declared)
    assert "py.typed" in patterns
    assert all(list(PACKAGE.glob(pattern)) for pattern in patterns)
    assert not list(PACKAGE.glob("*.typo"))


def test_no_test_imports_another():
    """What several tests share stands in a helper module, so that each test file can be read and run alone."""
    root = Path(__file__).parents[1]
    tests = {path.stem for path in root.rglob("test_*.py")}
    assert "test_layout" in tests
    lines = {p: re.findall(r"^\s*(?:from|import) (test_\w+)", p.read_text(), re.MULTILINE) for p in root.rglob("*.py")}
    assert not {path: names for path, names in lines.items() if tests & set(names)}


def test_the_linter_sees_all_that_is_ours_and_nothing_else():
    """Run folders may lie anywhere in a checkout, and what they hold is nobody's code."""
    root = PACKAGE.parent
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.ipynb"], cwd=root, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    linted = re.search(r"^LINTED := (.+)$", (root / "Makefile").read_text(), re.M)[1].split()
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} == set(linted)
    pinned = re.search(r'"ruff==(\d+\.\d+)\.\*"', PROJECT)[1]
    hook = re.search(r"rev: v(\d+\.\d+)\.\d+", (root / ".pre-commit-config.yaml").read_text())[1]
    assert hook == pinned == ".".join(metadata.version("ruff").split(".")[:2])
    assert "make lint" in (root / ".ci" / "run").read_text()


def test_types_are_checked_with_mlx_as_it_is(tmp_path, monkeypatch):
    """`make lint` runs pyright, pinned, over declarations that hold what mlx's own leave open."""
    assert re.search(r'"pyright\[nodejs\]==1\.1\.\d+"', PROJECT)
    makefile = (PACKAGE.parent / "Makefile").read_text()
    assert "scripts/typing_stubs.py" in makefile
    assert "/pyright" in makefile
    monkeypatch.syspath_prepend(str(PACKAGE.parent / "scripts"))
    stubs = importlib.import_module("typing_stubs")
    monkeypatch.setattr(stubs, "OUT", tmp_path / "mlx")
    stubs.main()
    core = (tmp_path / "mlx" / "core" / "__init__.pyi").read_text()
    assert "def item(self) -> Any:" in core
    assert "-> scalar:" not in core
    monkeypatch.setitem(stubs.MENDED, "utils.py", [("no such line", "")])
    with pytest.raises(AssertionError, match="no such line"):
        stubs.main()


def test_no_file_imports_in_a_circle():
    left = graph(False)
    while leaves := {name for name, used in left.items() if not used}:
        left = {name: used - leaves for name, used in left.items() if name not in leaves}
    assert not left, f"these import each other: {sorted(left)}"


def test_a_file_needs_few_others_to_be_read():
    sizes = {name: len(with_it(name)) for name in MOST_WITH_IT}
    assert all(sizes[name] <= most for name, most in MOST_WITH_IT.items()), sizes


def test_a_run_of_one_process_on_a_folders_model_loads_neither_gguf_nor_a_divided_base():
    loaded = with_it("cli.train") | with_it("trainer.run")
    others = ("gguf", "parallel.divided_base", "parallel.offloaded_base", "parallel.hosts", "planner.several_macs")
    assert [one for one in loaded if one.startswith(tuple(f"mlx_lora.{name}" for name in others))] == []
    assert "mlx_lora.parallel.strategy" in loaded


def test_an_import_counts_unless_it_only_annotates():
    text = "import b\nif TYPE_CHECKING:\n    import e\nclass C:\n    from d import x\ndef f():\n    import g\n"
    assert imported(ast.parse(text)) == {"b", "e", "d", "d.x", "g"}
    assert imported(ast.parse(text), at_import=True) == {"b", "d", "d.x"}


def test_the_page_of_changes_names_files_that_exist():
    page = (PACKAGE.parent / "docs" / "development" / "where.md").read_text()
    named = set(re.findall(r"`((?:mlx_lora|tests|benchmarks|scripts|packaging|\.github)/[\w/]+\.\w+)`", page))
    assert len(named) > 60
    missing = sorted(name for name in named if not (PACKAGE.parent / name).is_file())
    assert not missing
    assert not (PACKAGE.parent / "mlx_lora/models/nowhere.py").is_file()
