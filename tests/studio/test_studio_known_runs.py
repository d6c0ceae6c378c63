"""Runs that were started in a terminal, anywhere: `train` notes them, and the studio lists them, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time

import pytest
from studio_client import furnish, studio, wait_for, write_run

from mlx_lora.cli.train import main as train
from mlx_lora.studio.folders import Checker, Folders
from mlx_lora.studio.runs import POLL_S, RunControl, RunListing, run_id
from mlx_lora.studio.web import Tasks
from mlx_lora.trainer.checkpoint import locked
from mlx_lora.trainer.run_folder import KnownRun, known_runs, note_run, runs_file
from mlx_lora.utils.hub import SMOLLM2_GGUF


@pytest.fixture
def file(own_cache):
    return runs_file()


@pytest.fixture
def started(monkeypatch) -> list:
    """The words of the commands that the studio starts, each with how; none of them runs."""
    found = []

    def start(words, log, **how):
        found.append((words, how))
        child = subprocess.Popen(["true"])
        child.wait()
        return child

    monkeypatch.setattr("mlx_lora.studio.runs.start_child", start)
    return found


def test_train_notes_its_folder_and_the_studio_shows_it(tiny_folder, chats, tmp_path, file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny_folder)
    words = [
        "--model",
        "base",
        "--data",
        str(chats),
        "--epochs",
        "0.2",
        "--max-seq-length",
        "64",
        "--sample-tokens",
        "0",
    ]
    train([*words, "--adapter-path", "my-adapter", "--val-batches", "0"], standalone_mode=False)
    folder = (tmp_path / "my-adapter").resolve()
    with studio(tmp_path / "home", known_runs=file) as client:
        (run,) = client.get("/api/runs").json()["runs"]
        assert (run["name"], run["path"], run["state"]) == ("my-adapter", str(folder), "done")
        assert run["steps"] == run["step"] > 0, "known from its epochs: a terminal's run has no log here"
        (adapter,) = client.get("/api/adapters").json()["adapters"]
        assert adapter["base"] == str(tmp_path / "base"), "the model's name was relative to where the command was given"
        # Its base may be talked to, though it lies in none of the studio's folders.
        for model, status in ((adapter["base"], 400), (str(tmp_path / "other"), 403)):
            assert client.post("/api/talk", json={"model": model, "columns": []}).status_code == status
    with studio(tmp_path / "another-home") as client:
        assert client.get("/api/runs").json()["runs"] == []


@pytest.mark.parametrize("noted", [True, False])
def test_a_run_of_the_small_model_is_talked_to_and_resumed_by_its_name(tmp_path, file, started, monkeypatch, noted):
    small = tmp_path / "cache" / "models" / SMOLLM2_GGUF.file_name
    small.parent.mkdir(parents=True)
    small.write_bytes(b"GGUF")
    project = (tmp_path / "project").resolve()
    data = tmp_path / "home" / "data" / "a.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text('{"text": "a"}\n')
    folder = write_run(project / "runs" / "mine", ended=False, model="smollm2", data=str(data.resolve()))
    monkeypatch.chdir(project)
    if noted:
        note_run(folder)

    monkeypatch.setattr("mlx_lora.studio.runs.POLL_S", 60)  # the run is not read anew when its process has ended
    with studio(tmp_path / "home", known_runs=file, runs_folders=(project / "runs",)) as client:
        (adapter,) = client.get("/api/adapters").json()["adapters"]
        assert adapter["base"] == adapter["file"] == str(small)
        for model in ("smollm2", adapter["base"]):
            answer = client.post("/api/talk", json={"model": model, "columns": []})
            assert answer.json()["error"]["param"] == "columns", "the model is allowed"
            assert client.post("/api/talk/model", json={"model": model}).json() == {"sees": False}
        assert client.post(f"/api/runs/{run_id(folder)}/resume", json={}).status_code == 200
        (project / "smollm2").mkdir()  # a folder of that name is another model, and in none of the studio's folders
        assert client.post("/api/talk", json={"model": "smollm2", "columns": []}).status_code == 403
    assert "--resume" in started[0][0]


@pytest.mark.parametrize("listed", ["in a runs folder", "by its note alone"])
def test_names_of_a_run_start_where_its_command_was_given(tmp_path, file, tiny_folder, started, monkeypatch, listed):
    project = (tmp_path / "project").resolve()
    folder = write_run(project / "runs" / "mine", ended=False, model="base")
    (project / "base").symlink_to(tiny_folder)
    monkeypatch.chdir(project)
    note_run(folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()  # another model of that name, where the studio is started

    runs = {"runs_folders": (project / "runs",)} if listed == "in a runs folder" else {}
    with studio(tmp_path / "home", known_runs=file, **runs) as client:
        (run,) = client.get("/api/runs").json()["runs"]
        (adapter,) = client.get("/api/adapters").json()["adapters"]
        detail = client.get(f"/api/runs/{run['id']}").json()
        assert run["model"] == adapter["base"] == detail["settings"]["model"] == str(project / "base")
        ask = {"model": adapter["base"], "columns": []}
        assert client.post("/api/talk", json=ask).status_code == 400, "it may be talked to"
        assert client.post(f"/api/runs/{run['id']}/resume", json={}).status_code == 200
    assert [how["cwd"] for _, how in started] == [str(project)]


def test_one_run_trains_at_a_time_wherever_it_was_started(tmp_path, file, monkeypatch):
    folder = write_run(tmp_path / "theirs", ended=False)
    note_run(folder)
    launched = []
    monkeypatch.setattr(
        "mlx_lora.studio.runs.RunControl._launch", lambda self, folder, *_, **__: launched.append(folder.name)
    )
    monkeypatch.setattr("mlx_lora.studio.runs.train_settings", lambda *_: None)
    paused = write_run(tmp_path / "home" / "runs" / "paused", ended=False)
    order = {"settings": {"model": "org/model", "data": "tiny-shakespeare", "iters": 3}, "card": "balanced"}
    with studio(tmp_path / "home", known_runs=file) as client:
        with locked(folder):
            assert client.post("/api/train/start", json={**order, "name": "one"}).status_code == 409
            assert client.post("/api/train/start", json={**order, "name": "one", "queue": True}).status_code == 200
            assert client.post(f"/api/runs/{run_id(paused.resolve())}/resume", json={}).status_code == 409
            time.sleep(2 * POLL_S)
            assert launched == []
        wait_for(lambda: launched == ["one"], 20)


def test_a_search_of_the_learning_rate_trains_too(tmp_path):
    folders, tasks, end = Folders(tmp_path), Tasks(tmp_path), threading.Event()
    control = RunControl(folders, RunListing(folders), tasks, Checker(folders, ()))
    assert control.going_on() is None
    tasks.begin("export", "Copy", lambda task: end.wait(60))
    assert control.going_on() is None
    search = tasks.begin("sweep", "Rates", lambda task: end.wait(60))
    assert "Rates" in (control.going_on() or "")
    end.set()
    wait_for(lambda: search.state == "done", 20)
    assert control.going_on() is None


def test_a_run_is_listed_once_and_leaves_with_its_folder(tmp_path, file):
    one, two = (write_run(tmp_path / "work" / name) for name in ("one", "two"))
    for folder in (one, two, one):
        note_run(folder)
    assert [known.folder.name for known in known_runs(file)] == ["two", "one"]
    (two / "run.yaml").unlink()
    assert [known.folder.name for known in known_runs(file)] == ["one"]
    note_run(one)
    assert len(file.read_text().splitlines()) == 1


def test_a_damaged_list_or_a_cache_that_cannot_be_written_stops_nothing(tmp_path, file):
    file.parent.mkdir(parents=True)
    lines = ["{", "[]", '{"path": 3, "cwd": "", "at": 0}', '{"other": 1}', "\x00"]
    file.write_text("\n".join(lines))
    assert known_runs(file) == []
    note_run(write_run(tmp_path / "run"))
    assert [one.folder.name for one in known_runs(file)] == ["run"]
    file.unlink()
    file.mkdir()
    note_run(tmp_path / "run")
    assert known_runs(file) == []


def test_only_noted_folders_that_hold_a_run_are_opened(tmp_path, file, tiny_folder):
    home = (tmp_path / "home").resolve()
    furnish(home, tiny_folder)
    noted, other = write_run(tmp_path / "noted"), write_run(tmp_path / "other")
    swapped = write_run(tmp_path / "swapped")
    plain = tmp_path / "plain"
    plain.mkdir()
    for folder in (noted, swapped, plain):
        note_run(folder)
    with file.open("a") as out:
        for path in ("relative", "/etc", str(tmp_path / "noted" / ".." / "other")):
            out.write(json.dumps({"path": path, "cwd": "/", "at": 0.0}) + "\n")
    (swapped / "run.yaml").unlink()
    for left in swapped.iterdir():
        left.unlink()
    swapped.rmdir()
    os.symlink(other, swapped)
    with studio(home, known_runs=file) as client:
        assert [run["name"] for run in client.get("/api/runs").json()["runs"]] == ["noted"]
        for folder in (other, plain, swapped):
            assert client.get(f"/api/runs/{run_id(folder)}").status_code == 404
        base = str(home / "models" / "tiny")
        for folder, status in ((noted, 400), (other, 403), (plain, 403), (tmp_path, 403), (noted / "..", 403)):
            ask = {
                "model": base,
                "adapter": str(folder),
                "out": "x",
                "to": "nowhere",
            }  # looked at if the folder is allowed
            answer = client.post("/api/export", json=ask)
            assert answer.status_code == status, folder


def test_taking_a_run_elsewhere_off_the_list_leaves_its_folder(tmp_path, file):
    """It may be a project's own folder: `--adapter-path .` is allowed."""
    folder = write_run(tmp_path / "project")
    (folder / "thesis.tex").write_text("years of work")
    own = write_run(tmp_path / "home" / "runs" / "own")
    note_run(folder)
    note_run(own)
    with studio(tmp_path / "home", known_runs=file) as client:
        runs = {run["name"]: run for run in client.get("/api/runs").json()["runs"]}
        assert {name: run["elsewhere"] for name, run in runs.items()} == {"project": True, "own": False}
        for name, run in runs.items():
            assert client.request("DELETE", f"/api/runs/{run['id']}", json={"confirm": name}).status_code == 200
        assert client.get("/api/runs").json()["runs"] == []
    assert (folder / "thesis.tex").exists()
    assert (folder / "run.yaml").exists()
    assert not own.exists()


def test_a_known_run_is_what_its_line_says(tmp_path, file):
    folder = write_run(tmp_path / "one")
    note_run(folder)
    (found,) = known_runs(file)
    assert found == KnownRun(str(folder.resolve()), os.getcwd(), found.at)
