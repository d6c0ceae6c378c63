"""Print how large the package is and what it is made of, against the bars that hold; exits with 1 above a bar.

python scripts/house.py                      # all that can be read from the source
python scripts/house.py --run MODEL DATA     # and the modules that a plain fine-tuning run of the command loads

Statements are those of the syntax tree without docstrings. The applications are what people start (APPLICATIONS); everything else is the
core. A change that has a good reason to be larger raises its bar in the same commit.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE, TESTS = ROOT / "mlx_lora", ROOT / "tests"
APPLICATIONS = ("bench", "cli", "doctor", "mcp_server", "serving", "studio", "training_server")
PLUMBING = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Return)
OWN = ("self", "cls")
PUBLIC = {"_replace", "_asdict", "_fields", "_exit"}  # of the standard library, in spite of their names
# What is measured -> (what the house is to have, the bar today).
BARS: dict[str, tuple[float, float]] = {
    "statements of the core": (34_500, 41_400),
    "statements of the applications": (7_900, 8_355),
    "lines of the package": (80_000, 99_840),
    "modules": (265, 284),
    "modules of a plain run": (88, 130),
    "members of Objective": (14, 14),
    "fields of Batch": (8, 8),
    "files with an objective's name": (5, 5),
    "foreign private names and exchanged classes": (0, 0),
    "batch arrays taken by number": (0, 0),
    "refused combinations as code": (65, 82),
    "imports, definitions, returns, in percent": (30, 33.9),
    "statements of the tests": (37_000, 47_700),
    "lines of the tests": (62_000, 79_220),
}


@cache
def tree(path: Path) -> ast.Module:
    """Return a file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


def statements(path: Path) -> Iterator[ast.stmt]:
    """Yield a file's statements, without docstrings."""
    for node in ast.walk(tree(path)):
        text = node.value if isinstance(node, ast.Expr) else None
        if isinstance(node, ast.stmt) and not (isinstance(text, ast.Constant) and isinstance(text.value, str)):
            yield node


def files(folder: Path) -> list[Path]:
    """Return the Python files of a folder."""
    return sorted(folder.rglob("*.py"))


def room(path: Path) -> str:
    """Return the folder of the package that a file is in."""
    return path.relative_to(PACKAGE).parts[0]


def count(paths: Iterable[Path]) -> int:
    """Return the number of statements in some files."""
    return sum(1 for path in paths for _ in statements(path))


def lines(paths: Iterable[Path]) -> int:
    """Return the number of lines in some files."""
    return sum(path.read_text(encoding="utf-8").count("\n") for path in paths)


def members(path: Path, name: str, methods: bool = True) -> int:
    """Return how many fields (and properties and methods) a class declares that do not begin with an underscore."""
    body = next(node.body for node in tree(path).body if isinstance(node, ast.ClassDef) and node.name == name)
    names = [node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    names += [node.name for node in body if methods and isinstance(node, ast.FunctionDef)]
    return sum(1 for one in names if not one.startswith("_"))


def naming_objectives(names: Iterable[str]) -> list[Path]:
    """Return the files outside of the objectives' own room that have an objective's name as text."""
    known = set(names) - {"reward", "embed"}  # which are also a number's and a command's name
    return [
        path
        for path in files(PACKAGE)
        if room(path) != "objectives"
        and any(isinstance(node, ast.Constant) and node.value in known for node in ast.walk(tree(path)))
    ]


def foreign_privates() -> Iterator[str]:
    """Yield the places outside of `compat` that use a private name of another package, or change one of its classes."""
    nodes = {path: list(ast.walk(tree(path))) for path in files(PACKAGE)}
    own = set[str]()
    for each in nodes.values():
        own |= {node.attr for node in each if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
        own |= {node.name for node in each if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        own |= {node.id for node in each if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for path, each in nodes.items():
        if room(path) == "compat":
            continue
        modules = set[str]()
        for node in each:
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                modules |= {
                    (one.asname or one.name).split(".")[0] for one in node.names if not one.name.startswith("mlx_lora")
                }
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("mlx_lora"):
                modules |= {one.asname or one.name for one in node.names}
                yield from (f"{where} {one.name}" for one in node.names if re.match("_[a-z]", one.name))
        for node in each:
            if not isinstance(node, ast.Attribute):
                continue
            where, name = f"{path.relative_to(ROOT)}:{node.lineno}", node.attr
            base = node.value
            stored = isinstance(node.ctx, ast.Store)
            if stored and (name == "__class__" or (isinstance(base, ast.Name) and base.id in modules - {"sys"})):
                yield f"{where} {name} ="
            elif (
                re.match("_[a-z]", name)
                and name not in own | PUBLIC
                and not (isinstance(base, ast.Name) and base.id in OWN)
            ):
                yield f"{where} {name}"


def by_number() -> Iterator[str]:
    """Yield the places that take an element of a batch's arrays by its number."""
    for path in (one for one in files(PACKAGE) if room(one) in ("losses", "objectives", "trainer", "training_server")):
        for node in ast.walk(tree(path)):
            if not (isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "arrays"):
                continue
            numbers = [
                one for one in ast.walk(node.slice) if isinstance(one, ast.Constant) and isinstance(one.value, int)
            ]
            if numbers and not any(isinstance(one, ast.Tuple | ast.Name) for one in ast.walk(node.slice)):
                yield f"{path.relative_to(ROOT)}:{node.lineno}"


def refusals() -> Iterator[str]:
    """Yield the places that refuse a combination: errors that name two settings."""
    for path in files(PACKAGE):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Raise) and node.exc is not None and "InputError" in ast.unparse(node.exc):
                texts = [
                    one.value
                    for one in ast.walk(node.exc)
                    if isinstance(one, ast.Constant) and isinstance(one.value, str)
                ]
                if len(set(re.findall(r"--[a-z][a-z-]+", " ".join(texts)))) > 1:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}"


# What a plain fine-tuning run of the command loads, as a program that prints the count.
PLAIN_RUN = """
import sys
from mlx_lora.__main__ import main
main(["train", *sys.argv[1:]], standalone_mode=False)
print("MODULES", sum(name.split(".")[0] == "mlx_lora" for name in sys.modules))
"""


def loaded(model: str, data: str) -> int:
    """Return how many modules of the package a fine-tuning run of two steps loads."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            "--model",
            model,
            "--data",
            data,
            "--adapter-path",
            f"{folder}/run",
            "--iters",
            "2",
            "--sample-tokens",
            "0",
        ]
        said = subprocess.run([sys.executable, "-c", PLAIN_RUN, *flags], cwd=ROOT, capture_output=True, text=True)
    if said.returncode:
        sys.exit(said.stderr)
    return int(said.stdout.rpartition("MODULES ")[2])


def measure() -> dict[str, float]:
    """Return everything that can be read from the source."""
    package, tests = files(PACKAGE), files(TESTS)
    applications = [path for path in package if room(path) in APPLICATIONS]
    everything = count(package)
    plumbing = sum(isinstance(one, PLUMBING) for path in package for one in statements(path))
    table = tree(PACKAGE / "config" / "objectives.py").body
    rows = next(
        node.value for node in table if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OBJECTIVES"
    )
    names = [key.value for key in rows.keys if isinstance(key, ast.Constant)] if isinstance(rows, ast.Dict) else []
    return {
        "statements of the core": everything - count(applications),
        "statements of the applications": count(applications),
        "lines of the package": lines(package),
        "modules": len(package),
        "members of Objective": members(PACKAGE / "objectives" / "base.py", "Objective"),
        "fields of Batch": members(PACKAGE / "data" / "batch.py", "Batch", methods=False),
        "files with an objective's name": len(naming_objectives(names)),
        "foreign private names and exchanged classes": len(list(foreign_privates())),
        "batch arrays taken by number": len(list(by_number())),
        "refused combinations as code": len(list(refusals())),
        "imports, definitions, returns, in percent": round(100 * plumbing / everything, 1),
        "statements of the tests": count(tests),
        "lines of the tests": lines(tests),
    }


def main(argv: list[str]) -> int:
    """Print the table; returns 1 above a bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", nargs=2, metavar=("MODEL", "DATA"), help="also count the modules that a plain run loads"
    )
    run = parser.parse_args(argv).run
    found = measure()
    if run:
        found["modules of a plain run"] = loaded(*run)
    above = 0
    for name, value in found.items():
        goal, bar = BARS[name]
        above += value > bar
        print(f"{name:45} {value:>9,} {bar:>9,} {goal:>9,}{'  above the bar' if value > bar else ''}")
    if above:
        print("Above the bar: delete something, or raise the bar in BARS of scripts/house.py in the same commit.")
    return int(above > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
