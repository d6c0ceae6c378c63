"""The performance gate: what it flags, what it admits that it cannot see, and what it does not record."""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Import a module of benchmarks/, which is no package. --quick sets the number of threads for its children."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # undone even if it was not set
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def made(ratio: float, spread: float = 0.01, rounds: int = 5, seed: int = 0, **changes) -> dict:
    """An entry whose rounds' logarithms have exactly this mean and standard deviation."""
    draws = random.Random(seed)
    logs = [draws.gauss(0, 1) for _ in range(rounds)]
    mean = sum(logs) / rounds
    scale = spread / math.sqrt(sum((x - mean) ** 2 for x in logs) / (rounds - 1))
    ratios = [ratio * math.exp((x - mean) * scale) for x in logs]
    entry = {
        "date": "2026-11-26T15:00:00+0000", "commit": f"c{seed}", "cpu": "A CPU", "cores": 2, "backend": "cpu",
        "threads": "1", "versions": {"mlx": "1", "mlx-lm": "2"}, "workload": {"rows": 24}, "ratios": ratios,
        "tokens_per_s": {"mlx_lora": 40.0, "mlx-lm": 20.0}, "unsound": [],
    }  # fmt: skip
    return entry | changes


def test_a_fall_of_five_percent_is_seen_where_the_spread_is_one(module):
    history = module("history")
    earlier = [made(2.0, seed=n) for n in range(3)]
    verdict = history.compare(made(1.9, seed=9), earlier)
    assert verdict.fell
    assert not verdict.blind
    assert (verdict.change, verdict.compared) == (pytest.approx(-0.05), 3)
    assert history.words(verdict).startswith("FELL: -5.0% (")
    for same_or_better in (2.0, 2.1, 1.995):
        assert not history.compare(made(same_or_better, seed=9), earlier).fell


def test_what_a_wide_spread_hides_is_admitted(module):
    history = module("history")
    earlier = [made(2.0, 0.08, seed=n) for n in range(3)]
    verdict = history.compare(made(1.9, 0.08, seed=9), earlier)
    assert not verdict.fell
    assert verdict.blind
    assert verdict.sees > 0.1
    assert f"{verdict.rounds} rounds per entry would find one of 5%" in history.words(verdict)
    assert verdict.rounds == history.rounds_needed(0.08) > 30
    assert history.compare(made(1.2, 0.08, seed=9), earlier).fell, "a fall of 40% is seen all the same"
    assert history.compare(made(1.9, rounds=5), [made(2.0, rounds=2, spread=0.0001)]).fell
    assert math.isinf(history.Spread.of([2.0]).interval()[1])
    assert history.compare({**made(1.0), "ratios": [1.0]}, earlier).blind


def test_the_promise_of_nine_in_ten_holds(module):
    """Drawn by chance: falls of the size that a verdict says it sees are found about so often, and no falls rarely."""
    history, draws = module("history"), random.Random(3)

    def drawn(ratio: float, rounds: int) -> dict:
        return {**made(ratio), "ratios": [ratio * math.exp(draws.gauss(0, 0.03)) for _ in range(rounds)]}

    needed = history.rounds_needed(0.03)
    for fall, low, high in ((0.05, 0.82, 0.97), (0.0, 0.0, 0.09)):
        found = [
            history.compare(drawn(2 * (1 - fall), needed), [drawn(2.0, needed)]).fell for _ in range(400)
        ]  # fmt: skip
        assert low <= sum(found) / 400 <= high


def test_only_the_same_machine_versions_and_work_are_compared(module):
    history = module("history")
    entry = made(1.0)
    others = [
        made(2.0, cpu="Another"), made(2.0, versions={"mlx": "2", "mlx-lm": "2"}), made(2.0, workload={"rows": 12}),
        made(2.0, threads="2"), made(2.0, unsound=["busy"]),
    ]  # fmt: skip
    verdict = history.compare(entry, others)
    assert (verdict.change, verdict.compared, verdict.fell) == (None, 0, False)
    assert "no earlier entry" in history.words(verdict)
    assert history.compare(entry, [*others, made(2.0)]).fell
    assert history.compare(entry, [made(9.0), *(made(1.0, seed=n) for n in range(3))]).compared == 3


def written(path: Path, entries: list[dict]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def test_the_table_flags_falls_and_check_exits_with_one(module, tmp_path, capsys):
    history = module("history")
    fine, fell = [made(2.0, seed=1), made(2.0, seed=2)], made(1.9, seed=3)
    path = written(tmp_path / "h.jsonl", [*fine, fell, made(2.0, 0.1, seed=4, unsound=["load average 9.0"])])
    assert history.main(["--history", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["FELL" in line for line in lines[2:6]] == [False, False, True, False]
    assert "unsound: load average 9.0" in lines[5]
    assert "at best" in lines[5]
    assert history.main(["--history", str(written(path, fine)), "--check"]) == 0
    assert history.main(["--history", str(written(path, [*fine, fell])), "--check"]) == 1
    assert history.main(["--history", str(written(path, [*fine, made(2.0, 0.1)])), "--check"]) == 1, "blind"
    assert history.main(["--history", str(tmp_path / "none"), "--check"]) == 0
    capsys.readouterr()
    path.write_text('{"ratios": [1.0]}\n')
    assert history.main(["--history", str(path)]) == 2
    assert "line 1: without " in capsys.readouterr().err


def test_the_committed_history_can_be_read(module):
    history = module("history")
    entries = history.read_history(history.HISTORY)
    assert history.table(entries).count("\n") == 1 + len(entries)


def made_result(speeds: dict[str, list[float]], share: float = 0.98, backend: str = "cpu", **arguments) -> dict:
    """A result of versus.py; `share` is the part of a core that each side got."""
    return {
        "date": "2026-11-26T15:00:00+0000", "commit": "abc", "cores": 2, "tolerance": 1e-3, "arguments": arguments,
        "versions": dict.fromkeys(("mlx", "mlx-lm", "python", "scipy-openblas32"), "1"),
        "prepared": {"device": {"backend": backend, "name": "Apple M4"}, "model_fingerprint": "m" * 64, "rows_fingerprint": "r" * 64},
        "checks": {name: {"loss_sum": 100.0} for name in speeds},
        "rounds": {
            name: [{"supervised_tokens_per_s": s, "tokens_per_cpu_s": s / share if backend == "cpu" else None} for s in values]
            for name, values in speeds.items()
        },
    }  # fmt: skip


SPEEDS = {"mlx_lora": [40.0, 41.0, 40.5, 40.2, 40.8], "mlx-lm": [20.0, 20.0, 20.0, 20.0, 20.0]}


@pytest.mark.parametrize(
    ("load", "share", "changed", "words"),
    [(0.1, 0.98, False, None), (3.0, 0.98, False, "load average 3.0"), (0.1, 0.5, False, "got 50% of a core"),
     (0.1, 0.98, True, "not committed")],
)  # fmt: skip
def test_a_busy_machine_and_a_changed_tree_are_not_recorded(module, tmp_path, monkeypatch, load, share, changed, words):
    quick, versus = module("_quick"), module("versus")
    monkeypatch.setattr(quick, "changed_tree", lambda: changed)
    path = tmp_path / "h.jsonl"
    args = versus.arguments(["--quick", "--record", "--history", str(path)])
    told, code = quick.finish(args, made_result(SPEEDS, share), load)
    assert path.exists() == (words is None)
    assert code == (words is not None)
    assert (words or "Recorded in") in told
    args.force = True
    told, code = quick.finish(args, made_result(SPEEDS, share), load)
    assert code == 0
    entry = module("history").read_history(path)[-1]
    assert bool(entry["unsound"]) == (words is not None)
    assert entry["ratio"] == pytest.approx(2.025, abs=1e-3)
    assert entry["by"] == "tokens_per_cpu_s"


def test_the_gate_is_shut_after_a_fall(module, tmp_path, monkeypatch):
    quick, versus = module("_quick"), module("versus")
    monkeypatch.setattr(quick, "changed_tree", lambda: False)
    path = tmp_path / "h.jsonl"
    record = versus.arguments(["--quick", "--record", "--check", "--history", str(path)])
    slower = {**SPEEDS, "mlx_lora": [0.94 * speed for speed in SPEEDS["mlx_lora"]]}
    told, code = quick.finish(
        versus.arguments(["--quick", "--check", "--history", str(path)]), made_result(SPEEDS), 0.0
    )
    assert (code, "Nothing to compare with" in told) == (1, True)
    assert quick.finish(record, made_result(SPEEDS), 0.0)[1] == 0
    assert quick.finish(record, made_result(SPEEDS), 0.0)[1] == 0
    check = versus.arguments(["--quick", "--check", "--history", str(path)])
    told, code = quick.finish(check, made_result(slower), 0.0)
    assert code == 1
    assert "FELL: -6.0%" in told
    assert len(path.read_text().splitlines()) == 2
    assert quick.finish(versus.arguments(["--quick", "--history", str(path)]), made_result(slower), 0.0)[1] == 0
    moved = quick.entry_of(made_result(SPEEDS, begun_at="abd"), 0.0)
    assert moved["unsound"] == ["the checkout was at abd when it began"]
    assert not quick.entry_of(made_result(SPEEDS, begun_at="abc"), 0.0)["unsound"]
    gpu = quick.entry_of(made_result(SPEEDS, backend="metal"), 0.0)
    assert (gpu["by"], gpu["cpu"], gpu["unsound"]) == ("supervised_tokens_per_s", "Apple M4", [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--check"], "--check: only with --quick"),
        ([], "--model and --data are required"),
        (["--quick", "--steps", "5"], "--steps: --quick fixes it"),
        (["--quick", "--rounds", "1"], "a spread needs 2"),
        (["--quick", "--record", "--ours=--rank 2"], "--ours with --record"),
    ],
)
def test_what_quick_fixes_is_refused(module, arguments, words, capsys, monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    with pytest.raises(SystemExit, match="2"):
        module("versus").arguments(arguments)
    assert words in capsys.readouterr().err


def test_processor_time_is_that_of_the_child(module):
    processes = module("_harness")
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    found = processes.cpu_seconds(child.pid)
    child.communicate(b"\n")
    if sys.platform == "linux":
        assert 0.28 <= found < 3
    assert processes.cpu_seconds(2**30) is None
