"""`make fuzz`: run at least --cases bad inputs and print what became of them.

python -m fuzz --cases 1200 --seed 0
python -m fuzz --kind GGUF --cases 100        one kind
python -m fuzz --kind GGUF --number 17        one case
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from fuzz.kinds import KINDS, plan_cases
from fuzz.runner import describe, is_fault, run_cases


@click.command()
@click.option("--cases", type=int, default=1200, show_default=True, help="At least so many.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the mutations.")
@click.option("--kind", type=click.Choice(list(KINDS)), default=None, help="Only this kind.")
@click.option("--number", type=int, default=None, help="Only this case of --kind.")
@click.option("--nasties", is_flag=True, help="Only the hand-made ones.")
@click.option("--show", is_flag=True, help="Print every case's outcome.")
@click.option("--keep", is_flag=True, help="Leave the folder with the faulty cases.")
def main(cases: int, seed: int, kind: str | None, number: int | None, nasties: bool, show: bool, keep: bool) -> None:
    """Feed bad inputs to the commands; exit 1 when one does what it must not."""
    plan = [
        case
        for case in plan_cases(cases)
        if kind in (None, case[0]) and (not nasties or case[1] < len(KINDS[case[0]][1]))
    ]
    if number is not None:
        plan = [(kind, number)]
    start, root = time.monotonic(), Path(tempfile.mkdtemp(prefix="fuzz-"))
    os.environ["MLX_LORA_CACHE"] = str(root / "cache")

    def tell(kind: str, number: int, result: dict[str, Any]) -> None:
        if show or is_fault(result):
            click.echo(describe(kind, number, result), err=True)

    report = run_cases(root, plan, seed, tell)
    click.echo(report.table())
    click.echo(
        f"{len(report.results)} cases, seed {seed}, {time.monotonic() - start:.0f} s, {len(report.faults)} faults"
    )
    if keep:
        click.echo(f"kept: {root}")
    else:
        shutil.rmtree(root)
    raise SystemExit(bool(report.faults))


if __name__ == "__main__":
    main()
