"""The tree keeps its shape: stages import from their left only, files and functions stay short."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mlx_lora"
PROJECT = (PACKAGE.parent / "pyproject.toml").read_text()
OLDEST = (3, int(re.search(r'requires-python = ">=3\.(\d+)"', PROJECT)[1]))
STAGES = (
    "sources", "data", "models", "adapters", "objectives", "training", "artifacts", "runs", "serving", "suite", "api",
    "owner_kit", "workbench",
)  # fmt: skip
BELOW = ("system", "settings", "planner")  # of all stages; each imports only from its own left as well
COMMANDS = (
    "train",
    "convert",
    "generate",
    "evaluate",
    "fuse",
    "export",
    "plan",
    "bench",
    "chat",
    "serve",
    "studio",
    "cluster",
    "doctor",
    "demo",
)
FILES = sorted(PACKAGE.rglob("*.py"))
TRAIN_LOOP = "train"  # may have 150 lines; it reads top to bottom


def imported_parts(path: Path) -> set[str]:
    """First parts under mlx_lora that a file imports, function-level imports included."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_lora"):
            rest = node.module.split(".")[1:]
            parts.update([rest[0]] if rest else [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            parts.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mlx_lora."))
    return parts


def test_the_root_holds_the_commands_and_nothing_else():
    assert {p.stem for p in PACKAGE.glob("*.py")} == {*COMMANDS, "__init__", "__main__"}
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and list(p.glob("*.py"))} == {*STAGES, *BELOW}


def test_no_two_files_have_the_same_name():
    names = [p.stem for p in FILES if p.stem != "__init__"]
    assert sorted(names) == sorted(set(names))
    rooms = {p.parent.name for p in FILES} - {PACKAGE.name}
    assert rooms.isdisjoint(names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_left(path):
    room, used = path.relative_to(PACKAGE).parts[0].removesuffix(".py"), imported_parts(path)
    rooms = (*BELOW, *STAGES)
    used &= {*rooms, *COMMANDS}
    if room in rooms:
        allowed = set(rooms[: rooms.index(room) + 1])
        assert used <= allowed, f"{room} imports {used - allowed}"
    elif room != "__main__":
        assert used.isdisjoint(COMMANDS), f"{room} imports another command: {used & set(COMMANDS)}"


def test_the_planner_is_arithmetic():
    """Only what measures or describes this very machine knows MLX."""
    for path in (PACKAGE / "planner").glob("*.py"):
        names = [n.module or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        names += [a.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import) for a in n.names]
        asks = [name for name in names if name.startswith("mlx.") or name == "mlx_lora.utils.device"]
        assert not asks or path.stem in ("ceilings", "this_machine"), path


def test_sources_and_data_need_no_mlx():
    for path in FILES:
        if path.relative_to(PACKAGE).parts[0] in ("sources", "data"):
            text = ast.parse(path.read_text())
            names = [a.name for n in ast.walk(text) if isinstance(n, ast.Import) for a in n.names]
            names += [n.module or "" for n in ast.walk(text) if isinstance(n, ast.ImportFrom)]
            assert not [n for n in names if n == "mlx" or n.startswith("mlx.")], path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path):
    source = path.read_text()
    assert source.count("\n") <= 600
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            limit = 150 if node.name == TRAIN_LOOP else 80
            assert node.end_lineno - node.lineno + 1 <= limit, node.name


# What Python's standard library got after 3.11, of that which is used in programs like this one.
NEWER = frozenset(
    ["sumprod", "batched", "override", "is_junction", "process_cpu_count", "onexc", "walk_up", "case_sensitive"]
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_oldest_python_that_is_promised_has_all_that_is_used(path):
    tree = ast.parse(path.read_text(), feature_version=OLDEST)
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) if node.arg}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            used |= {alias.name for alias in node.names}
    assert OLDEST == (3, 11)
    assert not used & NEWER


def test_files_that_the_package_declares_are_there():
    declared = re.search(r"^mlx_lora = \[(.*?)\]", PROJECT, re.M | re.S)[1]
    patterns = re.findall(r'"(.+?)"', declared)
    assert "py.typed" in patterns
    assert all(list(PACKAGE.glob(pattern)) for pattern in patterns)
    assert not list(PACKAGE.glob("*.typo"))


def imported_modules(source: str) -> set[str]:
    """All module names that a source text imports, at its top or in a function."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_no_test_imports_another():
    """What several tests share stands in a helper module, so that each test file can be read and run alone."""
    root = Path(__file__).parent
    tests = {path.stem for path in root.rglob("test_*.py")}
    assert "test_layout" in tests
    found = {str(p.relative_to(root)): imported_modules(p.read_text()) & tests for p in root.rglob("*.py")}
    assert not {path: names for path, names in found.items() if names}
    assert imported_modules("def f():\n    from test_layout import PACKAGE\n") & tests
    assert imported_modules("import test_layout as other\n") & tests


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
    lint = (PACKAGE.parent / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    assert lint.index("scripts/typing_stubs.py") < lint.index("/pyright")
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
    names = {".".join(("mlx_lora", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in FILES}
    graph = {}
    for name, path in names.items():
        used = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                used.update(m for m in (node.module, *(f"{node.module}.{a.name}" for a in node.names)) if m in names)
        graph[name] = used
    while leaves := [name for name, used in graph.items() if not used]:
        for leaf in leaves:
            del graph[leaf]
        graph = {name: used - set(leaves) for name, used in graph.items()}
    assert not graph, f"these import each other: {sorted(graph)}"


def test_the_page_of_changes_names_files_that_exist():
    page = (PACKAGE.parent / "docs" / "development" / "where.md").read_text()
    named = set(re.findall(r"`((?:mlx_lora|tests)/[\w/]+\.py)`", page))
    assert len(named) > 25
    missing = sorted(name for name in named if not (PACKAGE.parent / name).is_file())
    assert not missing
    assert not (PACKAGE.parent / "mlx_lora/models/nowhere.py").is_file()
