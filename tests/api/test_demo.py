"""The demo: its stages on a tiny model, what a terminal and a pipe get, and that it overwrites nothing unasked."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import click
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_cases import write_case
from rich.console import Console
from run_cli import one_line, run, succeeds

from mlx_lora.api import demo as verse_demo
from mlx_lora.api.demo import QUESTIONS, Answers, Demo, DemoScreen, called_as, get_model
from mlx_lora.config.load import RECIPES
from mlx_lora.trainer.callbacks import Callback
from mlx_lora.trainer.guards import WORDS as INTERRUPTED
from mlx_lora.trainer.guards import interrupt_flag


def made_screen(width: int = 100, terminal: bool = True) -> tuple[DemoScreen, Console, Console]:
    """A screen that writes into memory."""
    log, out = (
        Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, highlight=False)
        for _ in range(2)
    )
    return DemoScreen(log, out), log, out


def shown(console: Console) -> str:
    return console.file.getvalue()


def test_the_demo_takes_its_stages_and_then_refuses_to_overwrite_them(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(verse_demo, "ANSWER_TOKENS", 4)
    out = tmp_path / "my demo"
    ran = succeeds("demo", "--model", tiny_folder, "--iters", 2, "--out", out)
    places = [line.split()[0] for line in ran.lines if line[:1].isdigit() and "done in" in line]
    assert places == ["1/4", "2/4", "3/4", "4/4"]
    assert "step 2 of 2, loss " in ran.err
    assert "\x1b" not in ran.err + ran.out
    assert all(question in ran.out for question in QUESTIONS)
    adapter = out / "bard"
    assert f"chat --model {tiny_folder} --adapter 'bard={adapter}'" in ran.out
    assert str(adapter / "report.html") in ran.out
    assert (adapter / "report.html").is_file()
    before, after = map(float, re.search(r"Held-out loss (\S+) -> (\S+),", ran.out).groups())
    measured = run("evaluate", "--model", tiny_folder, "--adapter-path", adapter, "--data", RECIPES / "bard", "--json")
    assert after == round(json.loads(measured.out)["loss"], 2) < before
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    refused = run("demo", "--model", tiny_folder, "--iters", 2, "--out", out)
    one_line(refused, "already holds the demo's run", "--force")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == files


@pytest.mark.slow
def test_force_trains_again_and_an_interrupted_demo_says_what_is_left(tiny_folder, tmp_path, monkeypatch):
    out = tmp_path / "demo"
    words = ("demo", "--model", tiny_folder, "--out", out)
    assert run(*words, "--iters", 2).code == 0
    first = (out / "bard" / "adapters.safetensors").read_bytes()
    again = succeeds(*words, "--iters", 3, "--force")
    assert "step 3 of 3" in again.err
    assert (out / "bard" / "adapters.safetensors").read_bytes() != first
    train_run = verse_demo.train_run
    monkeypatch.setattr(
        verse_demo,
        "train_run",
        lambda *given, **named: dataclasses.replace(train_run(*given, **named), interrupted=True),
    )
    ended = run(*words, "--iters", 2, "--force")
    assert ended.code == 130
    assert "Interrupted" in ended.err
    assert "3/4 done" not in ended.err
    assert not ended.out


def test_an_interrupted_demo_continues_exactly_where_it_was(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(verse_demo, "ANSWER_TOKENS", 2)
    words = ("demo", "--model", tiny_folder, "--iters", 4, "--out")
    assert run(*words, tmp_path / "whole").code == 0
    train_run, pressed = verse_demo.train_run, []

    class Press(Callback):
        def on_step(self, facts):
            if facts["step"] == 2 and not pressed:
                pressed.append(True)
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(
        verse_demo, "train_run", lambda settings, callbacks: train_run(settings, callbacks=[*callbacks, Press()])
    )
    out = tmp_path / "cut"
    ended = run(*words, out)
    taken = int(re.search(r"Interrupted after (\d) steps, which are saved. To continue: ", ended.err)[1])
    assert (ended.code, 2 <= taken < 4) == (130, True)
    assert ended.lines[-1].endswith(f"demo --out {out} --model {tiny_folder} --iters 4")
    resumed = succeeds(*words, out)
    assert f"which was interrupted after {taken} steps of 4; --force starts again" in resumed.err
    assert all(question in resumed.out for question in QUESTIONS)
    whole, cut = ((tmp_path / name / "bard" / "adapters.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    one_line(run(*words, out), "already holds the demo's run", "--force")


def test_a_demo_that_saved_nothing_starts_again(tmp_path):
    demo = Demo(tmp_path / "a b", "model", 7)
    assert demo.steps_taken() == 0
    assert verse_demo.interrupted_words(demo, 0).endswith(f"demo --out '{tmp_path}/a b' --model model --iters 7")
    assert "before anything was saved" in verse_demo.interrupted_words(demo, 0)
    assert verse_demo.interrupted_words(Demo(verse_demo.OUT), 0).endswith(" demo")
    (demo.run_folder / "checkpoints" / "step-000003").mkdir(parents=True)
    assert (demo.steps_taken(), dataclasses.replace(demo, force=True).steps_taken()) == (3, 0)
    (demo.run_folder / "report.json").write_text('{"ended": true}')
    assert demo.steps_taken() == 0


def test_an_interruption_is_told_below_the_table_and_not_written_into_it(tmp_path, capfd):
    screen, log, _ = made_screen()
    with screen.stages(tmp_path), interrupt_flag() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        while not asked():
            time.sleep(0.01)
        console = Console(file=io.StringIO(), width=100)
        console.print(screen.table())
        # A line as wide as the terminal would be broken by the ^C that the terminal adds to it.
        assert max(map(len, shown(console).splitlines())) < 100
    assert capfd.readouterr().err == ""
    assert click.unstyle(shown(log)).rstrip().endswith(INTERRUPTED)
    with interrupt_flag() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        while not asked():
            time.sleep(0.01)
    assert capfd.readouterr().err == f"\n{INTERRUPTED}\n"


def test_the_questions_are_test_rows_that_are_not_trained_on():
    asked = {
        split: {
            json.loads(line)["messages"][0]["content"]
            for line in (RECIPES / "bard" / f"{split}.jsonl").read_text().splitlines()
        }
        for split in ("train", "valid", "test")
    }
    assert set(QUESTIONS) <= asked["test"]
    assert not set(QUESTIONS) & (asked["train"] | asked["valid"])


def test_the_small_model_is_fetched_and_converted_once(tmp_path, monkeypatch):
    gguf = tmp_path / "cache" / "models" / "Small.Q4_1.gguf"
    gguf.parent.mkdir(parents=True)
    write_case("llama untied", gguf, Kind.Q4_1)
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    checksum = hashlib.sha256(gguf.read_bytes()).hexdigest()
    pinned = dataclasses.replace(verse_demo.SMOLLM2_GGUF, file_name=gguf.name, sha256=checksum)
    monkeypatch.setattr(verse_demo, "SMOLLM2_GGUF", pinned)
    screen, _, _ = made_screen(terminal=False)
    model, words = get_model(Demo(tmp_path / "out"), screen)
    assert (Path(model), words) == (tmp_path / "out" / "Small", "Small, 4-bit")
    assert (Path(model) / "model.safetensors").is_file()
    gguf.write_bytes(b"another")  # a second time it is not needed
    assert get_model(Demo(tmp_path / "out"), screen) == (model, words)
    assert get_model(Demo(tmp_path / "out", "a/b"), screen) == ("a/b", "a/b")


def test_a_terminal_gets_one_table_that_is_kept_up_to_date(tmp_path):
    screen, _, _ = made_screen()

    def table() -> list[str]:
        console = Console(file=io.StringIO(), width=100)  # to the screen's own, another thread writes meanwhile
        console.print(screen.table())
        return [line.strip() for line in shown(console).splitlines()]

    with screen.stages(tmp_path):
        with screen.stage() as done:
            screen.doing("getting it")
            assert "getting it" in table()[0]
            done("a model")
        with screen.stage() as done:
            screen.follow(40).on_report({"step": 10, "loss": 3.456, "elapsed_s": 20.0})
            first, second, third, fourth = table()
            done("40 steps")
        assert "━" not in table()[1]
    assert first.startswith("✓")
    assert "a model" in first
    assert "━" * 12 + "  step 10 of 40, loss 3.46 " in second
    assert second.endswith(" 1m00s left")
    assert third.startswith("·")
    assert "about 1m25s" in third
    assert fourth.startswith("·")
    screen, _, _ = made_screen()
    with pytest.raises(RuntimeError), screen.stages(tmp_path), screen.stage():
        raise RuntimeError
    assert table()[0].startswith("×")


def test_answers_are_side_by_side_where_there_is_room():
    before, after = Answers(4.0, 16, ("First,\n\n\x1b[31mred", "b", "")), Answers(3.0, 16, ("O rose!", "d.", "x"))
    for width, terminal, beside in ((100, True, True), (60, True, False), (100, False, False)):
        screen, _, out = made_screen(width, terminal)
        screen.result(before, after)
        text = shown(out)
        assert any("First," in line and "O rose!" in line for line in text.splitlines()) == beside
        assert ("before: First," in text) != beside
        assert "25% lower" in text.replace("\n", " ")
        assert "\x1b" not in text
        assert "(nothing)" in text
        assert "d. ..." not in text
        assert "b ..." in text
    screen, _, out = made_screen(terminal=False)
    screen.result(after, before)
    assert "33% higher" in shown(out)


def test_commands_to_copy_are_never_broken(tmp_path):
    screen, _, out = made_screen(60)
    model = "a-folder-with-a-long-name/" * 4
    screen.next_steps(model, Path("runs/bard"))
    assert f"{called_as()} chat --model {model} --adapter bard=runs/bard" in shown(out)


def test_the_program_is_named_as_the_user_can_call_it(tmp_path, monkeypatch):
    script = tmp_path / "bin" / "mlx-lora"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", "/nowhere")
    assert called_as() == str(script)
    monkeypatch.setenv("PATH", str(script.parent))
    assert called_as() == "mlx-lora"
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "__main__.py")])
    assert called_as() == f"{sys.executable} -m mlx_lora"
    (script.parent / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(script.parent / "python"))
    assert called_as() == "python -m mlx_lora"
    monkeypatch.setenv("UV", "/somewhere/uv")
    assert called_as() == "python -m mlx_lora"  # uv run
    monkeypatch.setattr(sys, "prefix", "/cache/uv/archive-v0/abc")
    assert called_as() == "uvx mlx-lora"
