"""Runs in the studio: the list, one run, its states, notes, removal, the queue, and live news, from folders alone."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from studio_client import metric, state_of, studio, write_run

from mlx_lora.reports.run_report import elapsed_s
from mlx_lora.studio.places.runs import RunNews
from mlx_lora.studio.runs import (
    MOST_POINTS,
    RunNumbers,
    Started,
    Tail,
    read_columns,
    read_started,
    run_id,
    samples_of,
)
from mlx_lora.studio.runs import state_of as state_of_folder
from mlx_lora.trainer.checkpoint import LOCK_FILE, lock_holder, locked
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir
from mlx_lora.utils.hub import SMOLLM2_GGUF
from mlx_lora.utils.text import start_mark


@pytest.fixture
def home(tmp_path):
    return (tmp_path / "home").resolve()


def started(folder, **values):
    known = Started(folder.name, {"model": "org/model"}, time.time() - 10)
    for name, value in values.items():
        setattr(known, name, value)
    (folder / "studio").mkdir(parents=True, exist_ok=True)
    known.write(folder)
    return folder


def test_200_runs_are_listed_from_their_folders(home):
    for number in range(200):
        write_run(home / "runs" / f"run-{number:03}", steps=20)
    with studio(home) as client:
        answer = client.get("/api/runs")
        assert len(answer.json()["runs"]) == 200
        assert len(answer.content) < 150_000
        start = time.process_time()
        runs = client.get("/api/runs").json()["runs"]
        assert time.process_time() - start < 0.2
        run = next(run for run in runs if run["name"] == "run-007")
        assert (run["state"], run["step"], run["steps"], run["model"]) == ("done", 20, 20, "org/model")
        assert run["plan_peak_bytes"] == run["peak_bytes"] == 10**8
        with (home / "runs" / "run-007" / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metric(21, loss=0.5)) + "\n")
        runs = client.get("/api/runs").json()["runs"]
        assert next(run for run in runs if run["name"] == "run-007")["loss"] == 0.5, "a change is seen"


def test_a_run_of_another_folder_appears_with_its_own_command(home, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    write_run(elsewhere / "bard", ended=False)
    with studio(home, runs_folders=(elsewhere.resolve(),)) as client:
        (run,) = client.get("/api/runs").json()["runs"]
        detail = client.get(f"/api/runs/{run['id']}").json()
        assert (detail["state"], detail["can_resume"]) == ("stopped", True)
        assert detail["command"] == "mlx-lora train --model org/model"
        assert detail["samples"][0] == {"step": 0, "prompt": "Say 1", "text": "<script>alert(1)</script>"}
        assert detail["metrics"]["step"] == list(range(1, 11))
        assert detail["adapter"] == str(elsewhere.resolve() / "bard")
        assert [one["name"] for one in client.get("/api/adapters").json()["adapters"]] == ["bard"]


def test_states_are_told_from_files(tmp_path):
    killed = write_run(tmp_path / "killed", ended=False)
    (killed / ".lock").touch()
    assert state_of_folder(killed, None)[0] == "killed"
    running = write_run(tmp_path / "running", ended=False)
    with locked(running):
        assert lock_holder(running) == os.getpid()
        assert state_of_folder(running, None) == ("running", None)
    assert state_of_folder(running, None)[0] == "stopped", "it left its folder in order"
    mine = {"pid": os.getpid(), "mark": start_mark(os.getpid()), "at": time.time()}
    for values, state in (
        (mine, "running"),
        ({**mine, "mark": "another process of that number"}, "killed"),
        ({"pid": 1, "mark": "x", "asked": "pause", "code": 130}, "paused"),
        ({"pid": 1, "mark": "x", "asked": "stop", "code": -15}, "stopped"),
        ({"pid": 1, "mark": "x", "code": 2}, "failed"),
        ({"pid": 1, "mark": "x", "code": -9}, "killed"),
        ({"pid": 1, "mark": "x", "code": 0}, "done"),
        ({}, "waiting"),
    ):
        folder = started(tmp_path / f"{len(list(tmp_path.iterdir()))}", **values)
        assert state_of_folder(folder, read_started(folder))[0] == state, values


def test_the_reason_of_a_failure_is_the_commands_own_line(home):
    folder = started(home / "runs" / "bad", pid=1, mark="x", code=2)
    (folder / "studio" / "output.log").write_text("Reading\nError: --data x: no such file\n")
    with studio(home) as client:
        detail = client.get(f"/api/runs/{run_id(folder)}").json()
        assert (detail["state"], detail["reason"]) == ("failed", "“Data” x: no such file")
        assert detail["log"][-1].startswith("Error")
        assert detail["metrics"] == {}


def test_a_long_history_is_thinned_with_its_validations(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, 30_001):
            file.write(json.dumps(metric(step)) + "\n")
            if step % 3000 == 0:
                file.write(json.dumps(metric(step, loss=None, val_loss=1.5)) + "\n")
        file.write('{"step": 30001, "lo')
    columns = read_columns(path)
    assert len({len(column) for column in columns.values()}) == 1
    assert MOST_POINTS // 3 < len(columns["step"]) <= MOST_POINTS
    assert sum(value is not None for value in columns["val_loss"]) == 10
    assert columns["step"][0] < 50
    assert columns["step"][-1] == 30_000


def test_news_come_once(tmp_path):
    folder = write_run(tmp_path / "run", steps=5, ended=False)
    news = RunNews(folder, lambda: {"step": 5})
    assert [one["type"] for one in news.read()] == ["state"]
    assert news.read() == []
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metric(6)) + "\n" + '{"step": 7')
        file.flush()
        found = news.read()
        assert [one["type"] for one in found] == ["metrics", "state"]
        assert found[0]["metrics"]["step"] == 6
        file.write(json.dumps(metric(7))[10:] + "\n")
        file.flush()
        assert news.read()[0]["metrics"]["step"] == 7, "an incomplete line waits"


def test_the_time_of_a_resumed_run_is_that_of_all_its_processes(home):
    first = [metric(step, elapsed_s=10.0 * step) for step in range(0, 901, 100)]
    # It was killed at step 900 and continued from 800, twice as fast; before its second report the old speed is the best guess.
    again = [
        metric(850, elapsed_s=300.0),
        metric(900, elapsed_s=550.0),
        metric(900, loss=None, val_loss=1.0, elapsed_s=560.0),
    ]
    folder = write_run(home / "runs" / "resumed", steps=0, iters=1000)
    path = folder / "metrics.jsonl"

    def told(rows, rest=""):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + rest)
        (run,) = client.get("/api/runs").json()["runs"]
        assert run["seconds"] == pytest.approx(elapsed_s(rows))
        return run["seconds"], run["step_s"]

    with studio(home) as client:
        assert told(first[:2]) == (1000, 10)
        assert told(first, '{"step": 950, "elapsed_s": 1') == (9000, 10)
        assert told([*first[:9], again[0]]) == (8300, 10)
        assert told([*first[:9], *again]) == (8560, pytest.approx(260 / 50))
    with studio(home) as client:
        assert told([*first[:9], *again]) == (8560, pytest.approx(260 / 50)), "a new server reads it again"


# In a process of its own: threads that earlier tests left behind would be counted too.
MEMORY_OF_NEWS = """
import json, sys, tracemalloc
from pathlib import Path
from mlx_lora.reports.run_report import elapsed_s
from mlx_lora.studio.places.runs import RunNews

folder, row = Path(sys.argv[1]), json.loads(sys.argv[2])
news, read = RunNews(folder, lambda: {"step": 5}), 0
tracemalloc.start()
with (folder / "metrics.jsonl").open("a") as file:
    for step in range(8, 1008):
        file.write(json.dumps({**row, "step": step}) + "\\n")
        file.flush()
        read += sum(one["type"] == "metrics" for one in news.read())
        if step == 107:
            before = tracemalloc.get_traced_memory()[0]
print(read, tracemalloc.get_traced_memory()[0] - before)
"""


@pytest.mark.long
def test_news_take_no_memory(tmp_path):
    folder = write_run(tmp_path / "run", steps=5, ended=False)
    command = [sys.executable, "-c", MEMORY_OF_NEWS, folder, json.dumps(metric(6))]
    read, grown = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert read == 1000
    assert grown < 200_000


def test_rows_between_the_answer_and_the_stream_come_once(tmp_path):
    """The page has read the run up to step 3; a validation of that step, and two reports, were written since."""
    folder = write_run(tmp_path / "run", steps=3, ended=False)
    with (folder / "metrics.jsonl").open("a") as file:
        later = [metric(3, loss=None, val_loss=1.5), metric(4), metric(5)]
        file.write("".join(json.dumps(one) + "\n" for one in later) + '{"step": 6')
        file.flush()
        news = RunNews(folder, lambda: {"step": 5})
        file.write(json.dumps(metric(6))[10:] + "\n")
        file.flush()
        found = [one["metrics"] for one in [*news.since(3), *news.read()] if one["type"] == "metrics"]
    assert [(one["step"], one["val_loss"]) for one in found] == [(3, None), (3, 1.5), (4, None), (5, None), (6, None)]


def test_a_tail_reads_a_file_that_was_replaced(tmp_path):
    path = tmp_path / "a"
    path.write_text("1\n2\n")
    tail = Tail(path)
    assert tail.new_lines() == []
    path.write_text("3\n")
    assert tail.new_lines() == ["3"]
    (tmp_path / "b").write_text("4\n5\n6\n7\n")
    (tmp_path / "b").replace(path)
    assert tail.new_lines() == ["4", "5", "6", "7"]


def test_notes_are_kept_and_a_run_is_removed_by_its_name_alone(home):
    folder = write_run(home / "runs" / "one")
    with studio(home) as client:
        route = f"/api/runs/{run_id(folder)}"
        assert client.put(f"{route}/notes", json={"text": "good\nfaster"}).json() == {"saved": True}
        assert client.get(route).json()["notes"] == "good\nfaster"
        assert client.request("DELETE", route, json={"confirm": "two"}).status_code == 400
        with locked(folder):
            assert client.request("DELETE", route, json={"confirm": "one"}).status_code == 409
        assert folder.exists()
        assert client.request("DELETE", route, json={"confirm": "one"}).json() == {"deleted": True}
        assert not folder.exists()
        assert client.get(route).status_code == 404


def test_the_queue_waits_is_ordered_and_outlives_the_server(home, monkeypatch):
    def refuse(*_, **__):  # it would ask the hub for a model that does not exist
        raise InputError("not planned here")

    monkeypatch.setattr("mlx_lora.studio.plans.Plans._planned", refuse)
    busy = write_run(home / "runs" / "busy", ended=False)
    settings = {"model": "org/model", "data": "tiny-shakespeare", "iters": 3}
    with (busy / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("0")
        with studio(home) as client:
            assert client.get("/api/runs").json()["runs"][0]["state"] == "running"
            start = {"settings": settings, "name": "second"}
            refused = client.post("/api/train/start", json=start)
            assert refused.status_code == 409
            assert "busy is still running" in refused.json()["error"]["message"]
            second = client.post("/api/train/start", json={**start, "queue": True}).json()["run"]
            third = client.post("/api/train/start", json={**start, "name": "third", "queue": True}).json()["run"]
            assert client.post("/api/train/start", json={**start, "name": "third", "queue": True}).status_code == 409
            assert state_of(client, second) == "queued"
        with studio(home) as client:
            assert [run["name"] for run in client.get("/api/queue").json()["queue"]] == ["second", "third"]
            moved = client.post("/api/queue/move", json={"run": third, "to": 0}).json()["queue"]
            assert [run["name"] for run in moved] == ["third", "second"]
            left = client.post("/api/queue/remove", json={"run": third}).json()["queue"]
            assert [run["name"] for run in left] == ["second"]
            client.post(f"/api/runs/{second}/stop", json={})
            assert client.get("/api/queue").json() == {"queue": []}
            assert client.post("/api/queue/remove", json={"run": third}).status_code == 404


# What a first look shows of a run


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
    numbers = RunNumbers(path)
    assert numbers.read().get("val_loss") is None
    with path.open("a") as file:
        file.write(json.dumps(metric(2, loss=None, val_loss=1.5)) + "\n" + json.dumps(metric(3)) + "\n")
    found = numbers.read()
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


@pytest.mark.long
def test_the_example_is_fetched_once_and_its_model_is_listed(tmp_path, own_cache):
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
