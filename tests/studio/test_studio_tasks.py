"""The studio's long work: tasks, their children, and downloads through the real hub client."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from hub_stand_in import hub_server
from run_cli import one_line, run
from serving_process import ROOT, Server
from studio_client import wait_for

from mlx_lora.config.settings import ModelSettings
from mlx_lora.studio import web as tasks_module
from mlx_lora.studio.command import only_one
from mlx_lora.studio.places.talk import Talk
from mlx_lora.studio.web import Cancelled, Tasks
from mlx_lora.utils.errors import InputError


@pytest.fixture
def tasks(tmp_path):
    return Tasks(tmp_path)


def ended(task):
    return wait_for(lambda: task.state != "running" and task, 30)


def test_work_is_done_fails_in_one_line_or_is_cancelled(tasks):
    assert ended(tasks.begin("data", "a", lambda task: 7)).public()["result"] == 7

    def fails(task):
        raise InputError("this:\n is wrong")

    failed = ended(tasks.begin("data", "b", fails))
    assert (failed.state, failed.message) == ("failed", "this: is wrong")

    def waits(task):
        while task.wanted.is_set():
            tasks.change(task, done=task.done + 1, total=10**9)
            time.sleep(0.01)
        raise Cancelled

    waiting = tasks.begin("data", "c", waits)
    assert tasks.running == 1
    time.sleep(1.2)
    assert waiting.public()["seconds_left"] > 0
    waiting.wanted.clear()
    assert ended(waiting).state == "cancelled"
    assert [task["title"] for task in tasks.listed()] == ["c", "b", "a"]


def test_finished_tasks_do_not_pile_up(tasks):
    for _ in range(3 * tasks_module.KEPT):
        ended(tasks.begin("data", "a", lambda task: None))
    assert len(tasks.listed()) <= tasks_module.KEPT + 1


def test_each_change_is_an_event(tasks):
    async def first_two():
        request = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(ending=lambda: False)))
        response = await tasks.events(request)
        lines = response.body_iterator
        found = [json.loads((await anext(lines))[6:])]
        tasks.change(task, message="two")
        found.append(json.loads((await anext(lines))[6:]))
        await lines.aclose()
        return found

    task = ended(tasks.begin("data", "one", lambda task: None))
    assert [one["message"] for one in asyncio.run(first_two())] == ["", "two"]


@pytest.mark.parametrize(
    ("code", "state"), [("print('wrote it')", "done"), ("import sys; sys.exit('Error: no room')", "failed")]
)
def test_a_childs_last_line_is_the_tasks_message(tasks, monkeypatch, code, state):
    def start(words, log, result, cwd):
        with log.open("wb") as out:
            return subprocess.Popen([sys.executable, "-c", code], stdout=out, stderr=out)

    monkeypatch.setattr(tasks_module, "start_child", start)
    task = ended(tasks.child("export", "x", ["export"], {"path": "y"}))
    assert task.state == state
    assert task.message == ("wrote it" if state == "done" else "no room")


def test_a_cancelled_child_is_ended(tasks, monkeypatch):
    children = []

    def start(words, log, result, cwd):
        log.touch()
        children.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return children[0]

    monkeypatch.setattr(tasks_module, "start_child", start)
    task = tasks.child("download", "x", ["y"], None)
    wait_for(lambda: children)
    task.wanted.clear()
    assert ended(task).state == "cancelled"
    assert children[0].returncode is not None


def test_talk_beside_a_run_warns_if_both_do_not_fit(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    runs = [{"name": "bard", "peak_bytes": 10**9}]
    assert Talk(lambda: runs, 2 * 10**9)._memory_warning(ModelSettings(str(tmp_path))) is None
    assert Talk(lambda: [], 1)._memory_warning(ModelSettings(str(tmp_path))) is None
    line = Talk(lambda: runs, 10**9)._memory_warning(ModelSettings(str(tmp_path)))
    assert "bard" in line
    assert "(predicted)" in line


def test_a_second_studio_of_one_home_is_refused(tmp_path):
    with only_one(tmp_path):
        one_line(run("studio", "--home", tmp_path, "--no-browser", "--port", 0), "another studio", str(tmp_path))
    one_line(run("studio", "--home", tmp_path, "--data-folder", tmp_path / "none"), "--data-folder", "no such folder")
    one_line(run("studio", "--home", tmp_path, "--host", "0.0.0.0"), "MLX_LORA_API_KEY")


@pytest.mark.slow
def test_a_model_is_found_and_downloaded_with_the_real_client(tmp_path, tiny_folder):
    with hub_server() as hub:
        hub.folders["org/tiny"] = Path(tiny_folder)
        environment = {
            "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        arguments = ("--home", tmp_path / "home", "--no-browser")
        with (
            Server(*arguments, log=tmp_path / "log", command="studio", cwd=tmp_path, environment=environment) as server,
            httpx.Client(base_url=server.url, timeout=60) as client,
        ):
            found = client.get("/api/models/search", params={"q": "tiny"}).json()
            assert found == {
                "results": [{"id": "org/tiny", "downloads": 7, "likes": 1, "here": False}],
                "offline": None,
            }
            plan = client.post(
                "/api/models/plan", json={"model": "org/tiny", "settings": {"max_seq_length": 64}}
            ).json()
            assert plan["fits"], "from the config alone"
            task = client.post("/api/models/download", json={"model": "org/tiny"}).json()["task"]
            done = wait_for(lambda: [t for t in client.get("/api/tasks").json()["tasks"] if t["state"] != "running"])
            assert (done[0]["id"], done[0]["state"]) == (task["id"], "done"), done
            models = client.get("/api/models").json()["models"]
            assert [one["trainable"] for one in models if one["id"] == "org/tiny"] == [True]
            task = client.post("/api/models/download", json={"model": "org/gated"}).json()["task"]
            failed = wait_for(lambda: [t for t in client.get("/api/tasks").json()["tasks"] if t["state"] == "failed"])
            assert "gated" in failed[0]["message"]


@pytest.mark.slow
def test_a_server_with_open_streams_ends_in_order(tmp_path):
    arguments = ("--home", tmp_path / "home", "--no-browser")
    with (
        Server(
            *arguments, log=tmp_path / "log", command="studio", cwd=tmp_path, environment={"PYTHONPATH": str(ROOT)}
        ) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
        client.stream("GET", "/api/tasks/events") as stream,
    ):
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert server.stop() == 0
        assert "ended" in server.text
