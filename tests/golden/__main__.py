"""Golden runs: do two trees compute the same, bit for bit?

PYTHONPATH=tests python -m golden check                             the working tree against the commit in tests/golden/BASE
PYTHONPATH=tests python -m golden check --base HEAD~3 --case dpo-shared --case grpo
PYTHONPATH=tests python -m golden record --tree . --out new.json    record one tree
PYTHONPATH=tests python -m golden check --against old.json          the working tree against a recording of this machine
PYTHONPATH=tests python -m golden compare old.json new.json
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from golden.cases import CASES
from golden.differences import ROOT, NoTreeError, base_commit, described, differences, incomparable, unpacked
from golden.recording import PERTURBED, record


def with_package(_: click.Context, __: click.Parameter, tree: Path) -> Path:
    """Refuse a folder that is no tree of this project."""
    if not (tree / "mlx_lora").is_dir():
        raise click.BadParameter(f"{tree} has no folder mlx_lora; give a checkout of this project")
    return tree


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
case_option = click.option(
    "--case", "names", multiple=True, type=click.Choice(list(CASES)), help="Only this case; may be repeated."
)
tree_option = click.option(
    "--tree", type=FOLDER, default=ROOT, callback=with_package, help="Folder with the package (default: this checkout)."
)
perturb_option = click.option(
    "--perturb", type=click.Choice(list(PERTURBED)), help="Run all cases with this changed: each must then differ."
)


def report(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Print what differs, and exit: 0 nothing, 1 something, 2 the recordings cannot be compared."""
    if reasons := incomparable(old, new):
        click.echo("Error: these recordings cannot be compared; record both again: " + "; ".join(reasons), err=True)
        raise SystemExit(2)
    names = [name for name in old["cases"] if name in new["cases"]]
    old, new = ({**one, "cases": {name: one["cases"][name] for name in names}} for one in (old, new))
    found = differences(old, new)
    click.echo(described(found, len(names)))
    raise SystemExit(bool(found))


@click.group()
def main() -> None:
    """Record the results of tiny runs, and compare those of two trees."""


@main.command("record")
@tree_option
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="JSON file to write.")
@case_option
@perturb_option
def record_command(tree: Path, out: Path, names: tuple[str, ...], perturb: str | None) -> None:
    """Run the cases with a tree's package and write the results."""
    recorded = record(tree, list(names), perturb)
    out.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    failed = {name: case["problems"] for name, case in recorded["cases"].items() if case["problems"]}
    for name, problems in failed.items():
        click.echo(f"{name}: {'; '.join(problems)}", err=True)
    click.echo(f"{len(recorded['cases'])} cases in {out}, {len(failed)} failed")
    raise SystemExit(bool(failed))


@main.command("compare")
@click.argument("old", type=FILE)
@click.argument("new", type=FILE)
def compare_command(old: Path, new: Path) -> None:
    """Name what differs between two recordings, in the cases that both have."""
    report(*(json.loads(path.read_text(encoding="utf-8")) for path in (old, new)))


@main.command("check")
@tree_option
@click.option("--base", help="Commit to compare with (default: the one in tests/golden/BASE).")
@click.option("--against", type=FILE, help="Recording to compare with, instead of a commit.")
@case_option
@perturb_option
def check_command(
    tree: Path, base: str | None, against: Path | None, names: tuple[str, ...], perturb: str | None
) -> None:
    """Record a tree and the commit before it, and name what differs."""
    if against is not None:
        old = json.loads(against.read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory(prefix="golden-base-") as folder:
            try:
                before = unpacked(base or base_commit(), Path(folder))
            except NoTreeError as error:
                click.echo(f"Error: {error}; give another commit with --base, or a recording with --against", err=True)
                raise SystemExit(2) from None
            old = record(before, list(names))
    new = record(tree, list(names), perturb)
    if names:
        old = {**old, "cases": {name: case for name, case in old["cases"].items() if name in names}}
    report(old, new)


if __name__ == "__main__":
    main()
