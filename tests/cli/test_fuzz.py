"""Bad input from files, by the hundred: refused in one line, or taken; never a traceback, a hang, or a file elsewhere.

The long form is `make fuzz`. What it counts as a fault is in fuzz/worker.py, and is tested here as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.kinds import KINDS, plan_cases
from fuzz.runner import Report, describe, is_fault, run_cases

SHORT_CASES = 180


def short_plan() -> list[tuple[str, int]]:
    """Every fifth hand-made case of each kind, and mutations for the rest."""
    plan = []
    for kind, (_, made, share) in KINDS.items():
        plan += [(kind, number) for number in range(0, len(made), 5)]
        plan += [(kind, len(made) + number) for number in range(share * SHORT_CASES // 2 // 118)]
    return plan


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "seed", "fewest"), [(short_plan(), 7, SHORT_CASES), (plan_cases(1200), 0, 1000)])
def test_bad_inputs_by_the_hundred(plan, seed, fewest, tmp_path, own_cache):
    report = run_cases(tmp_path / "fuzz", plan, seed=seed)
    assert len(report.results) >= fewest
    assert not report.faults, "\n".join(describe(f.pop("kind"), f.pop("number"), f) for f in report.faults)
    assert sum(result["outcome"] == "refused" for result in report.results) > SHORT_CASES / 2  # they are bad inputs


# One broken command each, as the watch must see it.
BROKEN = {
    "traceback": "raise IndexError('x')",
    "outside": "pathlib.Path('../beside').write_text('x')",
    "input": "pathlib.Path('in/beside').write_text('x')",
    "unpickled": "__import__('pickle').loads(b'cos\\ngetcwd\\n.')",
    "bad message": "print('Error: a\\nError: b', file=sys.stderr); sys.exit(2)",
    "long message": "print('Error: ' + 'a' * 5000, file=sys.stderr); sys.exit(2)",
    "half an output": "pathlib.Path('out').mkdir(); pathlib.Path('out/x').touch(); print('Error: a', file=sys.stderr); sys.exit(2)",
}
WATCHED = """
import json, pathlib, sys
from fuzz import worker
import mlx_lora.cli.convert as convert

root = pathlib.Path(sys.argv[1])
watch = worker.Watch(root)
for name, code in json.loads(sys.argv[2]).items():
    place = root / "world" / name.replace(" ", "-")
    (place / "in").mkdir(parents=True)
    (place / "in" / "given").touch()
    convert.main.main = lambda arguments, prog_name: exec(code, {"pathlib": pathlib, "sys": sys})
    print(json.dumps([name, worker.run_case(("convert",), place, root, watch)]))
"""


@pytest.mark.slow
def test_the_watch_sees_broken_commands(tmp_path):
    """A fuzzer that finds nothing must be able to find something: commands that break in each way."""
    tests = Path(__file__).parents[1]
    path = {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    command = [sys.executable, "-c", WATCHED, str(tmp_path), json.dumps({**BROKEN, "fine": "sys.exit(0)"})]
    done = subprocess.run(command, capture_output=True, text=True, env=path)
    results = dict(map(json.loads, done.stdout.splitlines()))
    assert {name: is_fault(result) for name, result in results.items()} == {
        **dict.fromkeys(BROKEN, True),
        "fine": False,
    }
    report = Report()
    for name, result in results.items():
        report.add("convert", len(name), result)
    assert len(report.faults) == len(BROKEN)
    assert "| convert | 8 | 4 | 0 | 0 | 4 | 0 | 0 | 3 |" in report.table(), report.table()
