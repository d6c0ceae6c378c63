"""What a first look at the studio needs: an example in one click, readable texts, honest states, numbers that are there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

from studio_client import metric, studio, write_run

from mlx_lora.studio.places.runs import RunNews
from mlx_lora.studio.run_folders import Started, last_values, run_id, samples_of
from mlx_lora.trainer.checkpoint import LOCK_FILE
from mlx_lora.utils.files import cache_dir
from mlx_lora.utils.hub import SMOLLM2_GGUF
from mlx_lora.utils.text import start_mark


def test_texts_are_shown_without_a_templates_markers(tmp_path):
    prompt = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    sample = {"prompt": prompt, "before": "Because.<|im_end|>", "after": "O why!<|im_end|>", "specials": ["<|im_end|>"]}
    before, after = samples_of(tmp_path, {"samples": [sample]}, 7)
    assert before["prompt"] == "System: Be kind.\n\nWhy?"
    assert (before["text"], after["text"], after["step"]) == ("Because.", "O why!", 7)
    (tmp_path / "answers.jsonl").write_text(
        json.dumps({"step": 2, "number": 0, "prompt": prompt, "answer": "Yes<|im_end|>"})
    )
    (one,) = samples_of(tmp_path, {}, 7)
    assert "<|" not in one["prompt"] + one["text"]


def test_the_loss_before_training_is_no_result(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [metric(0, loss=None, val_loss=3.5), metric(1), metric(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert last_values(path).get("val_loss") is None
    with path.open("a") as file:
        file.write(json.dumps(metric(2, loss=None, val_loss=1.5)) + "\n" + json.dumps(metric(3)) + "\n")
    found = last_values(path)
    assert (found["val_loss"], found["val_step"], found["step"]) == (1.5, 2, 3)


def test_a_run_that_was_asked_to_end_says_so_until_it_has(tmp_path):
    home = (tmp_path / "home").resolve()
    folder = write_run(home / "runs" / "one", ended=False)
    # A process that takes a while to end, as a run does in the middle of a step.
    slow = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: None); print('ready', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "ready\n"
        known = Started("one", {}, time.time(), pid=child.pid, mark=start_mark(child.pid), at=time.time())
        known.write(folder)
        with studio(home) as client:
            route = f"/api/runs/{run_id(folder)}"
            news = RunNews(folder, lambda: client.get("/api/runs").json()["runs"][0])
            news.read()
            assert client.get(route).json()["ending"] is None
            line = client.post(f"{route}/pause", json={}).json()["run"]
            assert (line["state"], line["ending"]) == ("running", "pause")
            assert [(one["state"], one["ending"]) for one in news.read() if one["type"] == "state"] == [
                ("running", "pause")
            ]
            child.send_signal(signal.SIGKILL)
            child.wait()
            (folder / LOCK_FILE).unlink(missing_ok=True)
            ended = client.get(route).json()
            assert (ended["state"], ended["ending"]) == ("paused", None)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_the_example_is_fetched_once_and_its_model_is_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    with studio(tmp_path / "home") as client:
        about = client.get("/api/example").json()
        assert not about["here"]
        assert about["mb"] == SMOLLM2_GGUF.size_mb
        model = cache_dir("models") / SMOLLM2_GGUF.file_name
        assert about["model"] == str(model)
        model.parent.mkdir(parents=True)
        model.write_bytes(b"GGUF")
        assert client.get("/api/example").json()["here"]
        listed = [one for one in client.get("/api/models").json()["models"] if one["kind"] == "embedded"]
        assert [one["id"] for one in listed] == [str(model)]
        # A file that is not the pinned one is refused, in one line.
        task = client.post("/api/example", json={}).json()["task"]
        until = time.monotonic() + 120
        while (now := client.get("/api/tasks").json()["tasks"][0])["state"] == "running":
            assert time.monotonic() < until
            time.sleep(0.2)
        assert (now["id"], now["state"]) == (task["id"], "failed")
        assert SMOLLM2_GGUF.file_name in now["message"]


def test_the_examples_settings_are_settings_of_a_run(tmp_path):
    with studio(tmp_path / "home") as client:
        about = client.get("/api/example").json()
        plan = client.post("/api/train/plan", json={"settings": {**about["settings"], "data": about["data"]}}).json()
        assert "model" in plan["problems"][0], "nothing else is missing"
        assert os.path.basename(about["model"]).endswith(".gguf")
        assert len(about["questions"]) == 3
