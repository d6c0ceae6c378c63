"""What each kind of unwelcome request gets from the studio: the table of docs/studio.md, and more."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest
from studio_client import UPLOAD, furnish, studio, upload, wait_for, write_run

from mlx_lora.config.fields import field_type
from mlx_lora.config.settings import FIELDS, ROWS
from mlx_lora.studio import previews
from mlx_lora.studio.folders import WORDS
from mlx_lora.studio.runs import run_id
from mlx_lora.studio.web import OWN, POLICY
from mlx_lora.utils.errors import InputError

KEY = "correct horse"
READ = (
    "/api/state", "/api/models", "/api/models/search?q=x", "/api/tasks", "/api/tasks/events", "/api/data/sets", "/api/settings",
    "/api/example", "/api/queue", "/api/runs", "/api/runs/x", "/api/runs/x/events", "/api/adapters", "/api/export/needs",
)  # fmt: skip
WRITE = (
    "/api/example", "/api/models/plan", "/api/models/download", "/api/models/convert", "/api/tasks/x/cancel", UPLOAD, "/api/data/preview",
    "/api/train/rule", "/api/train/plan", "/api/train/start", "/api/queue/move", "/api/queue/remove", "/api/runs/x/pause", "/api/runs/x/resume",
    "/api/runs/x/stop", "/api/runs/x/forgetting", "/api/runs/x/evaluation", "/api/talk", "/api/talk/close", "/api/export",
)  # fmt: skip
ALL = [
    *(("GET", path) for path in READ),
    *(("POST", path) for path in WRITE),
    ("PUT", "/api/runs/x/notes"),
    ("DELETE", "/api/runs/x"),
]
TEXTS = [
    name for name, field in FIELDS.items() if field_type(field) is str and not ROWS[name].choices and name not in OWN
]
OUTSIDE = ("/etc/passwd", "/etc", "../../outside", "~/.ssh", "LINK", "HOME/../outside")


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_folder, chats):
    home = tmp_path_factory.mktemp("security") / "home"
    furnish(home, tiny_folder, chats)
    outside = home.parent / "outside"
    outside.mkdir()
    (outside / "train.jsonl").write_text('{"text": "secret"}\n')
    write_run(home.parent / "runs-outside" / "theirs")
    for place in ("data", "models", "runs", "exports"):
        (home / place).mkdir(exist_ok=True)
        os.symlink(outside, home / place / "link")
    write_run(home / "runs" / "mine")
    os.symlink(home.parent / "runs-outside" / "theirs", home / "runs" / "theirs")
    return home.resolve()


@pytest.fixture(scope="module")
def locked(home):
    with studio(home, key=KEY) as client:
        yield client


@pytest.fixture(scope="module")
def client(home):
    with studio(home, most=2_000_000) as client:
        yield client


@pytest.fixture
def unplanned(monkeypatch):
    """Without the planner, which would ask the hub for a model that does not exist."""

    def refuse(*_, **__):
        raise InputError("not planned here")

    monkeypatch.setattr("mlx_lora.studio.plans.Plans._planned", refuse)


def message(answer) -> str:
    error = answer.json()["error"]["message"]
    assert "\n" not in error
    return error


@pytest.mark.parametrize(("method", "path"), ALL)
def test_every_route_needs_the_key_refuses_other_origins_and_has_the_policy(locked, method, path):
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
        answer = locked.request(method, path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Host": "evil.example"},
                    {"Host": "[::1"}, {"Origin": "http://[::1"}):  # fmt: skip
        answer = locked.request(method, path, headers=headers)
        assert answer.status_code == 403, headers
        assert answer.headers["content-security-policy"] == POLICY
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", WRITE)
def test_a_form_that_a_page_may_send_without_asking_gets_415(client, path):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert client.post(path, content=b"{}", headers={"Content-Type": kind}).status_code == 415
    assert client.put("/api/runs/x/notes", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415


@pytest.mark.parametrize("path", [path for path in WRITE if path != UPLOAD])
@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b'{"model": NaN}', b"[" * 4000, b'{"model": "\\ud800"}'])
def test_a_body_that_is_no_object_gets_400(client, path, body):
    answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert message(answer)


def test_a_body_over_the_limit_gets_413(client):
    assert client.post("/api/train/plan", json={"settings": {"data": "x" * 1_100_000}}).status_code == 413


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_path_outside_the_folders_gets_403_wherever_it_is_named(client, home, path):
    data, model = str(home / "data" / "chats.jsonl"), str(home / "models" / "tiny")
    of = {
        place: path.replace("LINK", str(home / place / "link")).replace("HOME", str(home))
        for place in ("data", "models", "runs")
    }
    bad = [
        ("/api/data/preview", {"model": model, "data": [{"path": of["data"], "weight": 1}]}),
        ("/api/data/preview", {"model": of["models"], "data": [{"path": data, "weight": 1}]}),
        ("/api/train/plan", {"settings": {"model": model, "data": f"{data},{of['data']}=2"}}),
        ("/api/train/start", {"settings": {"model": of["models"], "data": data}, "name": "no"}),
        ("/api/train/start", {"settings": {"model": model, "data": data, "chat_template": of["data"]}, "name": "no"}),
        ("/api/train/plan", {"settings": {"model": model, "data": data, "reward": f"{of['data']}/x.py:f"}}),
        ("/api/train/plan", {"settings": {"model": model, "data": data, "environment": f"{of['data']}/x.py:A"}}),
        ("/api/models/plan", {"model": of["models"], "settings": {}}),
        ("/api/models/convert", {"model": of["models"], "name": "x"}),
        ("/api/export", {"model": of["models"], "to": "gguf", "out": "x"}),
        ("/api/export", {"model": model, "adapter": of["runs"], "to": "peft", "out": "x"}),
        ("/api/talk", {"model": of["models"], "columns": [{"adapters": []}], "messages": []}),
        ("/api/talk", {"model": model, "columns": [{"adapters": [{"path": of["runs"]}]}], "messages": []}),
    ]
    for route, body in bad:
        answer = client.post(route, json=body)
        assert answer.status_code in (400, 403, 404), (route, body)
        if not path.startswith(".."):
            assert answer.status_code == 403, (route, body, answer.text)
        assert "secret" not in answer.text
    assert client.post("/api/train/rule", json={"settings": {"model": of["models"]}}).status_code in (403, 404)


@pytest.mark.parametrize("name", [name for name in TEXTS if name not in WORDS])
def test_no_setting_names_a_file_outside_the_folders(client, unplanned, home, name, monkeypatch):
    """Also as code, as a task, as one of several, and relative to where the studio was started."""
    outside = home.parent / "outside"
    for file in ("evil.py", "task.yaml", "a,b.py"):
        (outside / file).write_text("")
    monkeypatch.chdir(outside)
    at, inside = str(outside), str(home / "data" / "chats.jsonl")
    values = [f"{at}/evil.py", f"{at}/evil.py:score", f"{at}/task.yaml", at, f"{at}/gone.py:score"]
    values += ["evil.py:score", "task.yaml", str(home / "data" / "link" / "train.jsonl")]
    if name != "model":
        values.append(f"{inside},{at}/evil.py:score")
    if name not in ("model", "data"):  # these have a form of their own
        values += [f"json_schema:{at}/evil.py", f"verifiers:{at}/task.yaml", "a,b.py:score", "evil.py:no-name"]
    for value in values:
        answer = client.post("/api/train/plan", json={"settings": {name: value}})
        assert answer.status_code == 403, (value, answer.text)


@pytest.mark.parametrize("name", sorted(WORDS))
def test_a_setting_that_is_not_checked_names_no_file(name):
    assert name in TEXTS
    assert not re.search(r"\b(file|folder|FILE)\b", ROWS[name].help)


def test_a_metric_and_a_task_of_the_studios_folders_are_taken(client, unplanned, home):
    rows, code = home / "data" / "chats.jsonl", home / "data" / "mine.py"
    code.write_text("")
    for more in (
        {"eval_metric": f"{code}:score"},
        {"eval_metric": "exact_match"},
        {"reward": f"{code}:f,{code}:g,length:9"},
    ):
        answer = client.post("/api/train/plan", json={"settings": {"eval_tasks": str(rows), **more}})
        assert answer.status_code == 200, answer.text
    folder = home / "data" / "asked"
    folder.mkdir()
    os.symlink(home.parent / "outside" / "train.jsonl", folder / "train.jsonl")
    answer = client.post("/api/train/plan", json={"settings": {"eval_tasks": str(folder)}})
    assert answer.status_code == 403, "a folder of rows may hold links out of it"


@pytest.mark.parametrize("revision", ["../../../outside", "/etc/hostname", "~/x", "a\\b"])
def test_a_revision_is_no_path(client, revision):
    for settings in ({"revision": revision}, {"data": f"org/data@{revision}"}):
        assert client.post("/api/train/plan", json={"settings": settings}).status_code in (400, 403)


@pytest.mark.parametrize("name", ["train.jsonl", "valid.jsonl"])
def test_a_link_inside_a_data_folder_is_not_read(client, home, name):
    folder = home / "data" / f"with-link-{name[:5]}"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "ours"}\n')
    (folder / name).unlink(missing_ok=True)
    os.symlink(home.parent / "outside" / "train.jsonl", folder / name)
    model = str(home / "models" / "tiny")
    bad = [
        ("/api/data/preview", {"model": model, "data": [{"path": str(folder), "weight": 1}]}),
        ("/api/train/plan", {"settings": {"model": model, "data": str(folder)}}),
        ("/api/train/start", {"settings": {"model": model, "data": str(folder)}, "name": "no"}),
    ]
    for route, body in bad:
        answer = client.post(route, json=body)
        assert answer.status_code == 403, (route, answer.text)
        assert "secret" not in answer.text
    (folder / name).unlink()
    os.symlink(home / "data" / "chats.jsonl", folder / name)  # a link inside the studio's folders
    assert client.post("/api/data/preview", json=bad[0][1]).status_code != 403


def test_lists_do_not_follow_links_out_of_their_folders(client, home):
    everything = client.get("/api/data/sets").text + client.get("/api/models").text + client.get("/api/runs").text
    assert "mine" in everything
    assert "outside" not in everything
    assert '"theirs"' not in everything
    assert client.get(f"/api/runs/{run_id(home / 'runs' / 'theirs')}").status_code == 404


@pytest.mark.parametrize("number", ["..", "%2e%2e", "..%2f..%2fetc", "mine", "x" * 5000, "%00"])
def test_a_runs_id_is_no_path(client, home, number):
    for method, rest in (("GET", ""), ("POST", "/stop"), ("PUT", "/notes"), ("DELETE", "")):
        body = {} if method == "GET" else {"json": {"confirm": "mine", "text": "x"}}
        assert client.request(method, f"/api/runs/{number}{rest}", **body).status_code in (404, 405)
    assert (home / "runs" / "mine").is_dir()


@pytest.mark.parametrize("name", ["../x.jsonl", "a/../../x.jsonl", "..\\x.jsonl", "C:\\x.jsonl"])
def test_an_uploads_name_loses_its_folders(client, home, name):
    answer = upload(client, name, b'{"text": "a"}\n')
    assert answer.status_code == 200
    assert answer.json()["path"].startswith(str(home / "data" / "x"))
    assert not (home / "x.jsonl").exists()


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden.jsonl", "x", "x.py", "x.html", "a\0b.jsonl", "con.jsonl", "x.jsonl/", "y" * 200 + ".csv"],
)
def test_an_upload_that_is_no_data_file_gets_400(client, name):
    assert upload(client, name, b"x").status_code == 400


def test_an_upload_over_the_limit_gets_413_and_leaves_nothing(client, home):
    before = sorted(path.name for path in (home / "data").iterdir())
    assert upload(client, "big.jsonl", b"x" * 2_000_001).status_code == 413
    chunks = iter([b"x" * 1_000_000] * 3)
    answer = client.post(
        UPLOAD, params={"name": "big.jsonl"}, content=chunks, headers={"Content-Type": "application/octet-stream"}
    )
    assert answer.status_code == 413
    assert sorted(path.name for path in (home / "data").iterdir()) == before


def test_hostile_rows_come_back_as_text_and_cut(client, home, monkeypatch):
    monkeypatch.setattr(previews, "AT_ONCE_BYTES", 10**8)  # in this process, whatever the size
    script = "<script>alert(document.cookie)</script><img src=x onerror=alert(1)>\x1b[31m"
    rows = [{"prompt": script, "completion": script}, {"prompt": "a", "completion": "b" * 200_000}]
    lines = [json.dumps(row) for row in rows] + ['{"prompt": "' + "z" * 10_000_000]
    path = home / "data" / "hostile.jsonl"
    path.write_text("\n".join(lines))
    body = {"model": str(home / "models" / "tiny"), "data": [{"path": str(path), "weight": 1}]}
    body["settings"] = {"max_seq_length": 10**6}
    answer = client.post("/api/data/preview", json=body)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    page = answer.json()
    assert script in "".join(span["text"] for span in page["rows"][0]["spans"])
    assert page["rows"][1]["more_tokens"] > 100_000
    assert len(answer.content) < 60_000
    assert len(page["problems"][0]["message"]) < 500


def test_settings_that_the_page_may_not_choose_get_400(client):
    for name in ("trust_remote_code", "adapter_path", "resume", "force", "no_such", "api_key"):
        answer = client.post("/api/train/plan", json={"settings": {name: True}})
        assert answer.status_code == 400
        assert name in message(answer)


@pytest.fixture
def started(monkeypatch, own_cache):
    """The words, log and folder of the commands that the studio starts; none of them runs. The list of agreed code is empty."""
    found = []

    def start(words, log, **how):
        found.append(words)
        child = subprocess.Popen(["true"])
        child.wait()
        return child

    monkeypatch.setattr("mlx_lora.studio.runs.start_child", start)
    monkeypatch.setattr("mlx_lora.studio.web.start_child", start)
    return found


def resume(client, folder, **body):
    return client.post(f"/api/runs/{run_id(folder.resolve())}/resume", json=body)


STRANGERS = {"name": "x", "created": 1.0, "words": ["train", "--config", "evil.yaml", "--trust-remote-code"]}


@pytest.mark.parametrize("begun", [True, False])
def test_the_words_of_a_strangers_run_are_never_run(client, home, started, begun):
    folder = home / "runs" / f"strangers-{begun}"
    data = str(home / "data" / "chats.jsonl")
    if begun:
        write_run(folder, ended=False, model=str(home / "models" / "tiny"), data=data)
    (folder / "studio").mkdir(parents=True)
    settings = {
        "model": str(home / "models" / "tiny"),
        "data": data,
        "trust_remote_code": True,
        "no_such": 1,
        "adapter_path": "/x",
    }
    (folder / "studio" / "started.json").write_text(json.dumps({**STRANGERS, "settings": settings}))
    detail = client.get(f"/api/runs/{run_id(folder)}").json()
    assert "evil" not in detail["command"]
    assert "--trust-remote-code" not in detail["command"]
    assert resume(client, folder).status_code == 200
    again = ["train", "--config", str(folder / "run.yaml"), "--adapter-path", str(folder), "--resume"]
    anew = ["train", "--model", settings["model"], "--data", data, "--adapter-path", str(folder)]
    assert started == [again if begun else anew]
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "content", ["[]", '{"settings": [1]}', '{"settings": {}}', '{"settings": {}, "name": 1, "created": 2, "pid": {}}']
)
def test_a_started_json_of_any_form_is_read(client, home, content):
    folder = write_run(home / "runs" / "odd", ended=False)
    (folder / "studio").mkdir()
    (folder / "studio" / "started.json").write_text(content)
    assert client.get("/api/runs").status_code == 200
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["trust_remote_code", "reward"])
def test_a_strangers_run_that_runs_code_is_asked_about_with_its_path(client, home, started, name):
    folder = home / "runs" / "coded"
    (home / "data" / "evil.py").touch()
    coded = {"reward": f"{home}/data/evil.py:f", "objective": "grpo"} if name == "reward" else {name: True}
    write_run(
        folder,
        ended=False,
        **{"model": str(home / "models" / "tiny"), "data": str(home / "data" / "chats.jsonl"), **coded},
    )
    for agreed in ({}, {"agreed": True}, {"agreed": "another question"}):
        answer = resume(client, folder, **agreed)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "runs_code")
    question = message(answer)
    assert str(folder / "run.yaml") in question
    assert str(home / "data" / "evil.py" if name == "reward" else home / "models" / "tiny") in question
    assert started == []
    assert client.get(f"/api/runs/{run_id(folder)}").json()["settings"][name] is None, "nor do evaluations take it"
    assert resume(client, folder, agreed=question).status_code == 200
    assert started[0][-1] == "--resume"
    assert client.get(f"/api/runs/{run_id(folder)}").json()["settings"][name] == coded[name]
    note = folder / "studio" / "started.json"
    wait_for(lambda: json.loads(note.read_text())["code"] == 0, 30)  # the end is written down, not while it is removed
    note.unlink()
    assert resume(client, folder).status_code == 200, "it is not asked about again"
    copy = shutil.copytree(folder, home / "runs" / "copied")
    (copy / "studio" / "started.json").unlink()
    assert resume(client, copy).status_code == 409
    for one in (folder, copy):
        shutil.rmtree(one)
    (home / "data" / "evil.py").unlink()


@pytest.mark.parametrize("name", ["reward", "environment", "tools", "teacher-prompt", "data"])
def test_a_strangers_run_names_no_files_outside_the_folders(client, home, started, name):
    folder, evil = home / "runs" / "outside", home.parent / "outside" / "evil.py"
    evil.touch()
    value = {"reward": f"{evil}:f", "environment": f"{evil}:C", "tools": [str(evil), str(evil)]}.get(name, str(evil))
    settings = {
        "model": str(home / "models" / "tiny"),
        "data": str(home / "data" / "chats.jsonl"),
        "objective": "grpo",
        name: value,
    }
    if name not in ("reward", "environment"):
        settings["reward"] = "exact_match"
    if name == "teacher-prompt":
        settings |= {"objective": "distill", "reward": None}
    write_run(folder, ended=False, **settings)
    answer = resume(client, folder)
    assert answer.status_code == 403, answer.text
    assert started == []
    shutil.rmtree(folder)


def test_measuring_a_strangers_adapter_runs_none_of_its_models_code(client, home, started):
    model, data = str(home / "models" / "tiny"), str(home / "data" / "chats.jsonl")
    folder = write_run(home / "runs" / "measured", model=model, data=data, trust_remote_code=True)
    for route in ("forgetting", "evaluation"):
        answer = client.post(f"/api/runs/{run_id(folder)}/{route}", json={})
        assert answer.status_code == 200
        assert "--trust-remote-code" not in answer.json()["command"]
    shutil.rmtree(folder)


def test_a_queue_that_came_with_its_folder_runs_no_code(tmp_path, tiny_folder, chats, started):
    home = tmp_path / "home"
    model, data = furnish(home, tiny_folder, chats)
    (home / "data" / "evil.py").touch()
    folders = [home / "runs" / name for name in ("coded", "plain")]
    for folder, more in zip(folders, ({"objective": "grpo", "reward": f"{home}/data/evil.py:f"}, {}), strict=True):
        (folder / "studio").mkdir(parents=True)
        content = {**STRANGERS, "settings": {"model": model, "data": data, **more}}
        (folder / "studio" / "started.json").write_text(json.dumps(content))
    (home / "queue.json").write_text(json.dumps([run_id(folder.resolve()) for folder in folders]))
    with studio(home):
        wait_for(lambda: started, 30)
    assert started == [["train", "--model", model, "--data", data, "--adapter-path", str(folders[1].resolve())]]


def test_words_of_a_command_are_never_a_shells(client, unplanned):
    asked = {
        "model": "org/model",
        "data": "tiny-shakespeare",
        "target_modules": "--force; touch x",
        "project_name": "$(touch x)",
    }
    command = client.post("/api/train/plan", json={"settings": asked}).json()["command"]
    assert "'--target-modules=--force; touch x'" in command
    assert "'$(touch x)'" in command


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", "x" * 101, ".x", "-x", 7, None])
def test_a_name_is_no_path(client, unplanned, name):
    settings = {"model": "org/model", "data": "tiny-shakespeare", "iters": 1}
    for route, body in (
        ("/api/train/start", {"settings": settings, "name": name}),
        ("/api/models/convert", {"model": "org/model", "name": name}),
        ("/api/export", {"model": "org/model", "to": "gguf", "out": name}),
    ):
        assert client.post(route, json=body).status_code == 400


def test_files_beside_the_page_cannot_be_read(client):
    for path in ("/static/../web.py", "/static/%2e%2e/web.py", "/static/..%2fweb.py", "/static//etc/passwd"):
        assert client.get(path).status_code in (400, 404)
    assert client.get("/static/places/data.js").status_code == 200
    for path in ("/static/places/data.py", "/static/places/__init__.py", "/static/places/", "/static/places/x.js"):
        assert client.get(path).status_code == 404


def test_what_the_studio_downloads_is_a_hub_id(client):
    for model in ("https://evil.example/x", "../x", "a", "", 5, "org/model; rm", "/etc/passwd"):
        assert client.post("/api/models/download", json={"model": model}).status_code == 400


def test_numbers_out_of_range_get_400(client, home):
    body = {"model": str(home / "models" / "tiny"), "data": [{"path": str(home / "data" / "chats.jsonl"), "weight": 1}]}
    for wrong in ({"limit": 10**9}, {"offset": -1}, {"limit": True}, {"offset": "1"}):
        assert client.post("/api/data/preview", json={**body, **wrong}).status_code == 400
    for weight in (0, -1, 10**9, "1", True):
        data = [{**body["data"][0], "weight": weight}]
        assert client.post("/api/data/preview", json={**body, "data": data}).status_code == 400
