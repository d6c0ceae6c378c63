"""Real runs under a real studio: the command's run.yaml, pause and resume, kills of the run and of the server, talk, export."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest
from serving_process import ROOT, Server
from studio_client import furnish, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_runs_list")]
SETTINGS = {
    "max_seq_length": 64,
    "batch_size": 4,
    "rank": 2,
    "sample_tokens": 4,
    "steps_per_report": 1,
    "save_every": 2,
}


@pytest.fixture
def home(tmp_path, tiny_folder, chats):
    furnish(tmp_path / "home", tiny_folder, chats)
    return (tmp_path / "home").resolve()


@contextmanager
def opened(home, tmp_path, name="log"):
    arguments = ("--home", home, "--no-browser")
    with (
        Server(
            *arguments, log=tmp_path / name, command="studio", cwd=tmp_path, environment={"PYTHONPATH": str(ROOT)}
        ) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield server, client


def begin(client, home, name, **settings):
    model, data = str(home / "models" / "tiny"), str(home / "data" / "chats.jsonl")
    asked = {"model": model, "data": data, **SETTINGS, **settings}
    answer = client.post("/api/train/start", json={"settings": asked, "name": name})
    assert answer.status_code == 200, answer.text
    return answer.json()["run"], asked


def detail(client, run):
    return client.get(f"/api/runs/{run}").json()


def until(client, run, *states):
    return wait_for(lambda: (found := detail(client, run))["state"] in states and found, 240)


def said(client, home, *columns):
    """Return the events of an answer in columns of (path, weight) lists."""
    asked = [{"adapters": [{"path": path, "weight": weight} for path, weight in column]} for column in columns]
    body = {"model": str(home / "models" / "tiny"), "columns": asked, "max_tokens": 8, "temperature": 0}
    answer = client.post("/api/talk", json={**body, "messages": [{"role": "user", "content": "Say 1."}]})
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]


def pid_of(home, name):
    return json.loads((home / "runs" / name / "studio" / "started.json").read_text())["pid"]


def test_a_run_of_the_page_is_the_run_of_its_command(home, tmp_path):
    with opened(home, tmp_path) as (_server, client):
        run, asked = begin(client, home, "one", iters=3, learning_rate=1e-3)
        shown = client.post("/api/train/plan", json={"settings": asked, "name": "one"}).json()
        found = until(client, run, "done", "failed", "killed")
        assert found["state"] == "done", found["log"]
        assert found["command"] == shown["command"]
        assert found["steps"] == 3
        assert [value for value in found["metrics"]["loss"] if value is not None]
        assert found["samples"]
    folder = home / "runs" / "one"
    ours = (folder / "run.yaml").read_bytes()
    shutil.rmtree(folder)
    words = shlex.split(found["command"])
    words = words[words.index("train") if "train" in words else words.index("mlx_lora.train") :]
    command = [sys.executable, "-m", "mlx_lora.train", *words[1:]]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert (folder / "run.yaml").read_bytes() == ours
    assert ours.decode() == found["run_yaml"]


def test_a_run_outlives_the_server_and_a_killed_run_is_resumed(home, tmp_path):
    with opened(home, tmp_path) as (server, client):
        run, _ = begin(client, home, "long", iters=4000)
        wait_for(lambda: detail(client, run)["step"] >= 3, 240)
        server.process.kill()
    process = pid_of(home, "long")
    os.kill(process, 0)
    with opened(home, tmp_path, "log2") as (server, client):
        step = detail(client, run)["step"]
        assert detail(client, run)["state"] == "running"
        wait_for(lambda: detail(client, run)["step"] > step, 120)
        assert client.post(f"/api/runs/{run}/resume", json={}).status_code == 409
        client.post(f"/api/runs/{run}/pause", json={})
        paused = until(client, run, "paused", "killed", "stopped")
        assert paused["state"] == "paused"
        assert paused["can_resume"]
        assert paused["checkpoint"] == paused["step"]
        client.post(f"/api/runs/{run}/resume", json={})
        wait_for(lambda: detail(client, run)["step"] > paused["step"], 240)
        ends = [event for event in said(client, home, []) if event.get("done")]
        assert ends[0]["tokens"] > 0, "talk works while a run goes on"
        assert detail(client, run)["state"] == "running"
        os.kill(pid_of(home, "long"), signal.SIGKILL)
        killed = until(client, run, "killed", "failed", "stopped", "done")
        assert killed["state"] == "killed"
        assert killed["can_resume"]
        assert "killed" in killed["reason"]
        client.post(f"/api/runs/{run}/resume", json={})
        wait_for(lambda: detail(client, run)["step"] > killed["step"], 240)
        client.post(f"/api/runs/{run}/stop", json={})
        assert until(client, run, "stopped", "killed", "paused")["state"] == "stopped"
        assert "Resuming from step" in (home / "runs" / "long" / "studio" / "output.log").read_text()


def test_the_queue_starts_the_next_run_and_talk_and_export_use_it(home, tmp_path):
    with opened(home, tmp_path) as (_server, client):
        begin(client, home, "first", iters=2)
        model, data = str(home / "models" / "tiny"), str(home / "data" / "chats.jsonl")
        asked = {"model": model, "data": data, **SETTINGS, "iters": 2, "learning_rate": 0.01}
        second = client.post("/api/train/start", json={"settings": asked, "name": "second", "queue": True}).json()[
            "run"
        ]
        assert until(client, second, "done", "failed", "killed")["state"] == "done"
        paths = {one["name"]: one["path"] for one in client.get("/api/adapters").json()["adapters"]}
        assert paths.keys() == {"first", "second"}
        second_alone, blend = [(paths["second"], 1)], [(paths["first"], 0.5), (paths["second"], 0.5)]
        events = said(client, home, [], second_alone, blend)
        ends = {event["column"]: event for event in events if event.get("done")}
        assert ends.keys() == {0, 1, 2}, events
        assert all(event["tokens"] > 0 and event["first_token_s"] > 0 for event in ends.values())
        assert client.post("/api/talk/close", json={}).json() == {"closed": True}
        export = {"model": model, "adapter": paths["second"], "to": "peft", "out": "mine"}
        begun = client.post("/api/export", json=export).json()
        assert "--to peft" in begun["command"]
        ended = wait_for(lambda: [t for t in client.get("/api/tasks").json()["tasks"] if t["state"] != "running"], 120)
        assert ended[0]["state"] == "done", ended
        assert (home / "exports" / "mine" / "adapter_config.json").is_file()
        assert client.post("/api/export", json=export).status_code == 409
        fused = client.post("/api/export", json=export | {"to": "fuse", "out": "whole"}).json()
        assert "mlx-lora fuse" in fused["command"]
        ended = wait_for(
            lambda: [
                t for t in client.get("/api/tasks").json()["tasks"] if "Fuse" in t["title"] and t["state"] != "running"
            ],
            120,
        )
        assert ended[0]["state"] == "done", ended
        assert "layers fused" in ended[0]["message"]
        assert (home / "exports" / "whole" / "model.safetensors").is_file()
        assert client.post("/api/export", json=export | {"to": "fuse", "out": "bare", "adapter": ""}).status_code == 400
