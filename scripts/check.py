"""Run the tests that a change touches: `make check`, or `python scripts/check.py [FILE ...]`.

A test file is touched if it changed itself, or if it or one of the test helpers that it imports imports a changed module. What a
test reaches through other modules is left to `make test`: most modules reach most others, and the answer should come within a minute.
Changed are the files that differ from the commit where this branch left `main` (on main: from the last commit), and new files.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = "test_layout.py"
MOST = 8  # test files besides those that changed; the others are left to `make test`


def git(*words: str) -> list[str]:
    """Return the lines that git prints."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def changed_files() -> list[str]:
    """Return the changed and new files, relative to the checkout."""
    here = git("rev-parse", "HEAD")
    main = git("for-each-ref", "--format=%(objectname)", "refs/heads/main") or here
    since = here[0] if here == main else git("merge-base", here[0], main[0])[0]
    return [*git("diff", "--name-only", since), *git("ls-files", "--others", "--exclude-standard")]


@cache
def imported(path: Path) -> frozenset[str]:
    """Return the names that a file imports: `from a.b import c` gives both `a.b` and `a.b.c`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("mlx_lora."):
            names.add(node.value.partition(":")[0])  # what a test patches by name
    return frozenset(names)


@cache
def reached(test: Path) -> frozenset[str]:
    """Return what a test file and the test helpers that it imports import."""
    names, seen, left = set(), {test}, [test]
    while left:
        found = imported(left.pop())
        names |= found
        helpers = {ROOT / "tests" / f"{name.replace('.', '/')}.py" for name in found}
        left += [helper for helper in helpers - seen if helper.is_file()]
        seen |= helpers
    return frozenset(names)


def test_files() -> list[Path]:
    """Return all test files, in the rooms that are named like the package's and beside them."""
    return sorted((ROOT / "tests").rglob("test_*.py"))


def touched_tests(files: list[str]) -> tuple[list[str], list[str]]:
    """Return the test files that these changed files touch: those that changed, and the others, the nearest first.

    The nearer a test, the larger the share of changed modules among what it imports of this project.
    """
    modules = {file.removesuffix(".py").replace("/", ".") for file in files if file.endswith(".py")}
    modules |= {name.removeprefix("tests.") for name in modules}
    others = {Path(file).name for file in files if not file.endswith(".py")}  # a page, a template, a workflow
    own, shares = [], {}
    for test in test_files():
        name = str(test.relative_to(ROOT))
        names = {one for one in reached(test) if one.startswith("mlx_lora.")} | imported(test)
        touching = {one for one in names if any(f"{one}.".startswith(f"{module}.") for module in modules)}
        if name in files:
            own.append(name)
        elif touching:
            shares[name] = len(touching) / len(names)
        elif others and any(other in test.read_text(encoding="utf-8") for other in others):
            shares[name] = 1.0
    return own, sorted(shares, key=lambda name: -shares[name])


def main() -> int:
    """Print which tests run, run them, and return pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="changed files; by default, git is asked")
    parser.add_argument("--list", action="store_true", help="print the test files and run nothing")
    options = parser.parse_args()
    files = options.files or changed_files()
    if not files:
        print("Nothing changed.")
        return 0
    own, near = touched_tests(files)
    always = [str(path.relative_to(ROOT)) for path in test_files() if path.name == ALWAYS]
    tests = list(dict.fromkeys([*own, *near[:MOST], *always]))
    print(f"{len(files)} changed files, {len(tests)} test files:", *tests, sep="\n  ", flush=True)
    if near[MOST:]:
        print(f"{len(near) - MOST} more test files import what changed; make test runs them.", flush=True)
    if options.list:
        return 0
    python = [file for file in files if file.endswith(".py") and (ROOT / file).is_file()]
    if python and subprocess.run([sys.executable, "-m", "ruff", "check", *python], cwd=ROOT, check=False).returncode:
        return 1
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", *tests], cwd=ROOT, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
