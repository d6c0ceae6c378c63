"""The demo: its stages on a tiny model, what it prints, and that it overwrites nothing unasked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import signal
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_cases import write_case
from run_cli import one_line, run, succeeds

from mlx_lora.api import demo
from mlx_lora.api.demo import QUESTIONS, small_model, steps_taken
from mlx_lora.config.load import RECIPES
from mlx_lora.trainer.callbacks import Callback


@pytest.mark.long
def test_the_demo_takes_its_stages_and_then_refuses_to_overwrite_them(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "ANSWER_TOKENS", 4)
    out = tmp_path / "my demo"
    ran = succeeds("demo", "--model", tiny_folder, "--iters", 2, "--out", out)
    places = [line.split()[0] for line in ran.lines if line[:1].isdigit() and "done in" in line]
    assert places == ["1/4", "2/4", "3/4", "4/4"]
    assert "step 2 of 2, loss " in ran.err
    assert "\x1b" not in ran.err + ran.out
    assert all(question in ran.out for question in QUESTIONS)
    assert ran.out.count("before: ") == ran.out.count("after:  ") == 3
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
def test_force_trains_again(tiny_folder, tmp_path):
    words = ("demo", "--model", tiny_folder, "--out", tmp_path / "demo")
    assert run(*words, "--iters", 2).code == 0
    first = (tmp_path / "demo" / "bard" / "adapters.safetensors").read_bytes()
    again = succeeds(*words, "--iters", 3, "--force")
    assert "step 3 of 3" in again.err
    assert (tmp_path / "demo" / "bard" / "adapters.safetensors").read_bytes() != first


@pytest.mark.long
def test_an_interrupted_demo_continues_exactly_where_it_was(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "ANSWER_TOKENS", 2)
    words = ("demo", "--model", tiny_folder, "--iters", 4, "--out")
    assert run(*words, tmp_path / "whole").code == 0
    train_run, pressed = demo.train_run, []

    class Press(Callback):
        def on_step(self, facts):
            if facts["step"] == 2 and not pressed:
                pressed.append(True)
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(
        demo,
        "train_run",
        lambda settings, base, callbacks: train_run(settings, base=base, callbacks=[*callbacks, Press()]),
    )
    out = tmp_path / "cut"
    ended = run(*words, out)
    taken = int(re.search(r"Interrupted after (\d) steps, which are saved", ended.err)[1])
    assert (ended.code, 2 <= taken < 4, ended.out) == (130, True, "")
    assert ended.lines[-1].endswith(f"demo --out {out} --model {tiny_folder} --iters 4")
    resumed = succeeds(*words, out)
    assert f"which was interrupted after {taken} steps of 4" in resumed.err
    assert all(question in resumed.out for question in QUESTIONS)
    whole, cut = ((tmp_path / name / "bard" / "adapters.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    one_line(run(*words, out), "already holds the demo's run", "--force")


def test_steps_count_until_the_run_has_ended(tmp_path):
    assert steps_taken(tmp_path) == 0
    (tmp_path / "checkpoints" / "step-000003").mkdir(parents=True)
    assert steps_taken(tmp_path) == 3
    (tmp_path / "report.json").write_text('{"ended": true}')
    assert steps_taken(tmp_path) == 0


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


def test_the_small_model_is_fetched_and_converted_once(tmp_path, monkeypatch, own_cache):
    gguf = tmp_path / "cache" / "models" / "Small.Q4_1.gguf"
    gguf.parent.mkdir(parents=True)
    write_case("llama untied", gguf, Kind.Q4_1)
    checksum = hashlib.sha256(gguf.read_bytes()).hexdigest()
    pinned = dataclasses.replace(demo.SMOLLM2_GGUF, file_name=gguf.name, sha256=checksum)
    monkeypatch.setattr(demo, "SMOLLM2_GGUF", pinned)
    model = small_model(tmp_path / "out")
    assert Path(model) == tmp_path / "out" / "Small"
    assert (Path(model) / "model.safetensors").is_file()
    gguf.write_bytes(b"another")  # a second time it is not needed
    assert small_model(tmp_path / "out") == model
