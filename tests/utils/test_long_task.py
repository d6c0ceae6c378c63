"""What the terminal shows: progress of long work, a run's history in columns, lines that wrap at words."""

from __future__ import annotations

import io
import time

import click
import pytest
from rich.console import Console

from mlx_lora.trainer.progress import LiveProgress, Metrics, Pace, PlainProgress, format_metrics
from mlx_lora.utils import console, hub
from mlx_lora.utils import progress as long_task
from mlx_lora.utils.progress import tracked


def metrics(step, loss=None, val_loss=None, **changes):
    facts = {
        "step": step, "epoch": 0.1, "loss": loss, "val_loss": val_loss, "learning_rate": 1e-4, "grad_norm": 0.5,
        "supervised_tokens_per_s": 70.0, "tokens_per_s": 90.0, "examples": 1, "supervised_tokens": 7, "real_tokens": 9,
        "positions": 9, "shapes": [], "padding_fraction": 0.0, "skipped_steps": 0, "peak_memory_bytes": 10**9,
        "process_peak_bytes": 10**9, "elapsed_s": 1.0,
    }  # fmt: skip
    return Metrics(**{**facts, **changes})


def wait_for(happened, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_short_work_says_nothing_and_long_work_says_how_far_it_is(monkeypatch, logged):
    assert list(tracked(range(3), "Converting", 3, "tensors")) == [0, 1, 2]
    assert logged == []
    monkeypatch.setattr(long_task, "QUIET_S", 0.0)
    monkeypatch.setattr(long_task, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(long_task.LongTask, "_after", lambda *_: None)  # no line before the first one is done
    assert list(tracked(range(2000), "Converting", 2000, "tensors"))[-1] == 1999
    assert logged[0] == "Converting: 1 of 2,000 tensors, about 0s left"
    assert len(logged) == 1999  # the end is no news: what was made is told then
    assert list(tracked(range(3), "Converting", 3, "tensors")) == [0, 1, 2]  # where nobody listens


def test_lines_come_rarely(monkeypatch, logged):
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(long_task.time, "monotonic", lambda: float(next(clock)))
    list(tracked(range(12), "Asking", 12, "questions"))
    assert 1 < len(logged) < 6


def test_a_terminal_gets_a_bar_after_two_seconds_and_no_lines(monkeypatch, logged):
    screen = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=screen, force_terminal=True, width=80))
    monkeypatch.setattr(long_task, "QUIET_S", 60.0)
    with long_task.long_task("Fusing", 9, "layers", live=True) as task:
        task.reach(3)
    assert screen.getvalue() == ""
    monkeypatch.setattr(long_task, "QUIET_S", 0.0)
    with long_task.long_task("Fusing", 9, "layers", live=True) as task:
        deadline = time.monotonic() + 20
        while "layers" not in screen.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        task.reach(4)
    shown = click.unstyle(screen.getvalue())
    assert "Fusing" in shown
    assert "4/9 layers" in shown
    assert logged == []


def test_work_of_unknown_length_tells_how_long_it_has_taken(monkeypatch, logged):
    with long_task.waiting("Loading"):
        pass
    assert logged == []
    monkeypatch.setattr(long_task, "QUIET_S", 0.02)
    monkeypatch.setattr(long_task, "LINE_EVERY_S", 0.04)
    with long_task.waiting("Loading"):
        wait_for(lambda: len(logged) > 1)
        with long_task.long_task("Converting", 5, "tensors") as part:
            part.reach(5)
            time.sleep(0.02)  # a line that was due already
            before = len(logged)
            time.sleep(0.2)
            assert len(logged) == before  # the part speaks for itself
        wait_for(lambda: len(logged) > before)
    assert {line.partition(":")[0] for line in logged} <= {"Loading", "Converting"}
    assert "so far" in logged[0]
    ended = len(logged)
    time.sleep(0.2)
    assert len(logged) == ended


def test_what_is_counted_is_told_before_the_first_is_done(monkeypatch, logged):
    monkeypatch.setattr(long_task, "QUIET_S", 0.02)
    monkeypatch.setattr(long_task, "LINE_EVERY_S", 0.04)
    with long_task.long_task("Comparing", 2, "computations") as task:
        wait_for(lambda: logged)
        time.sleep(0.05)
        task.advance()
        told = len(logged)
        time.sleep(0.2)
        assert len(logged) == told  # the next line comes with the next computation
    assert logged[0].startswith("Comparing: ")


def test_a_line_says_after_two_seconds_what_goes_on(monkeypatch):
    waits = []
    monkeypatch.setattr(long_task.LongTask, "_after", lambda task, seconds, action: waits.append(seconds))
    for what in (long_task.waiting("Loading"), long_task.long_task("Comparing", 3, "texts")):
        with what:
            pass
    assert waits == [2.0, 2.0]


def test_a_part_has_the_screen_while_it_lasts(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=screen, force_terminal=True, width=80))
    monkeypatch.setattr(long_task, "QUIET_S", 0.0)
    with long_task.long_task("Loading", 0, "", live=True):
        wait_for(lambda: "Loading" in screen.getvalue())
        with long_task.long_task("Converting", 5, "tensors", live=True):
            wait_for(lambda: "Converting" in screen.getvalue())
            at = len(screen.getvalue())
            time.sleep(0.3)
            assert "Loading" not in screen.getvalue()[at:]
        with long_task.covered():  # a download's own bar
            at = len(screen.getvalue())
            time.sleep(0.3)
            assert screen.getvalue()[at:] == ""
        wait_for(lambda: "Loading" in screen.getvalue()[at:])


def test_a_pipe_is_told_that_the_first_step_takes_long(monkeypatch, logged):
    monkeypatch.setattr(long_task, "QUIET_S", 0.02)
    monkeypatch.setattr(long_task, "LINE_EVERY_S", 0.04)
    progress = PlainProgress(10)
    wait_for(lambda: logged)
    assert logged[0].startswith("First step, with everything that MLX compiles for it: 0s so far")
    progress.report(metrics(1, 2.0))
    lines = len(logged)
    time.sleep(0.2)
    assert len(logged) == lines
    progress.close()


def test_a_notebook_has_a_live_display(monkeypatch):
    shell = type("ZMQInteractiveShell", (), {"kernel": object()})()
    monkeypatch.setitem(long_task.sys.modules, "IPython", type("IPython", (), {"get_ipython": lambda: shell}))
    assert long_task.has_live_display()
    monkeypatch.setitem(long_task.sys.modules, "IPython", type("IPython", (), {"get_ipython": lambda: None}))
    assert not long_task.in_notebook()


def test_a_download_in_a_pipe_tells_its_bytes(monkeypatch, logged):
    monkeypatch.setattr(hub, "LINE_EVERY_S", 0.0)
    bar = hub.TerminalBar(total=5_000_000, unit="B")
    bar.update(3_000_000)
    assert logged == ["Downloading: 3 MB so far"]
    hub.TerminalBar(total=5, unit="it").update(3)  # files, not bytes
    assert len(logged) == 1


def test_the_columns_of_a_history_stand_under_each_other():
    lines = [format_metrics(metrics(step, loss, grad_norm=norm), 120, 60.0) for step, loss, norm in (
        (1, 2.5, 0.25), (20, 1.25, 12.5), (120, 0.125, 3.0))]  # fmt: skip
    for column in ("loss", "lr", "grad norm", "tok/s", "peak"):
        assert len({line.index(column) for line in lines}) == 1, lines
    assert lines[0].startswith("step 1/120, ")
    assert "\x1b" not in lines[0]
    assert "\x1b[1m2.5000\x1b[0m" in format_metrics(metrics(1, 2.5), 120, None)


def test_a_line_has_one_speed_that_of_all_tokens():
    line = format_metrics(metrics(1, 2.0), 9, 1.0)
    assert line.count("tok/s") == 1
    assert "90 tok/s" in line
    assert "1 step skipped" in format_metrics(metrics(1, 2.0, skipped_steps=1), 9, 1.0)


def test_losses_stay_in_the_scrollback_of_a_terminal():
    screen = io.StringIO()
    progress = LiveProgress(4, Console(file=screen, force_terminal=True, width=100))
    for step in (1, 2, 3):
        progress.report(metrics(step, 3.0 - step / 2))
    progress.report(metrics(3, None, 1.75))
    progress.close()
    for words in ("step 1/4, loss \x1b[1m2.5000", "step 3/4, loss \x1b[1m1.5000", "step 3/4, val loss \x1b[1m1.7500"):
        assert words in screen.getvalue()


def test_the_first_step_is_told_only_before_the_first_report(logged):
    for reported, lines in ((True, 1), (False, 2)):
        logged.clear()
        progress = PlainProgress(10)
        if reported:
            progress.report(metrics(1, 2.0))
        progress.step(2)
        if not reported:
            progress.report(metrics(2, 2.0))
        assert len(logged) == lines
        assert any("after the start" in line for line in logged) is not reported


def test_a_resumed_run_tells_its_time_by_its_own_steps(monkeypatch):
    resumed = Pace(100)
    monkeypatch.setattr(Pace, "spent_s", 20.0)
    resumed.step(81)
    resumed.step(82)
    assert resumed.left_s(82) == 20 / 2 * 18
    assert resumed.left_s(90) == 20 / 10 * 10


@pytest.mark.parametrize("color", ["", "\x1b[32m"])
def test_long_lines_wrap_at_words(color):
    text = f"Adapter: {color}lora, rank 16, 14 layers{color and chr(27) + '[0m'} (down_proj, gate_proj, up_proj)"
    found = console.wrapped(text, 41).split("\n")
    assert [len(click.unstyle(line)) <= 41 for line in found] == [True] * 2
    assert " ".join(line.strip() for line in found) == text
    assert console.wrapped(text, 200) == text
    command = "    mlx-lora chat --model a-rather-long-name --adapter a=a"  # to be copied in one piece
    assert console.wrapped(command, 41) == command
