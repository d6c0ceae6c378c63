"""Questions and answers in the studio: the command that it runs, what a run shows of its results, and the button in Chromium."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from run_cli import run
from studio_browser import chromium, open_studio
from studio_client import furnish, studio, write_run
from studio_real import PATIENCE_MS
from studio_real import studio as real_studio

from mlx_lora.config.settings import ModelSettings
from mlx_lora.reports.run_report import EVALUATION_FILE, keep_evaluation
from mlx_lora.studio.places.talk import Talk
from mlx_lora.studio.runs import MOST_SAID, run_id, words_of_asking, words_of_measuring
from mlx_lora.studio.web import Tasks
from mlx_lora.trainer.run_folder import note_run, runs_file
from mlx_lora.utils.errors import InputError

CHANGE = {"change": -1.0, "low": -1.5, "high": -0.5, "rows": 9}
EXAMPLE = {"question": "q" * 9000, "expected": "Yes.", "base": "No", "adapter": "yes", "base_right": False, "right": True}  # fmt: skip
FACTS = {"loss": 1.0, "base_loss": 2.0, "change": CHANGE, "rows": 9, "data": "d.jsonl", "partial": False, "examples": [EXAMPLE]}  # fmt: skip
REPORT = {**dict.fromkeys(("device", "base", "adapter", "versions"), "-"), "data": {**dict.fromkeys(("rows_read", "truncated", "duplicates", "empty", "dropped"), 0), "splits": {}, "notes": [], "example": None, "data": "d", "valid_source": "", "template": ""}}  # fmt: skip
CHATS = {"splits": {"train": {"rows": 9, "tokens": 90, "supervised_tokens": 40}, "valid": {"rows": 2}}}


@pytest.fixture
def home(tmp_path, tiny_folder, chats):
    furnish(tmp_path / "home", tiny_folder, chats)
    return (tmp_path / "home").resolve()


def test_a_run_shows_its_questions_and_answers(home):
    folder = write_run(home / "runs" / "a")
    with studio(home) as client:
        path = f"/api/runs/{run_id(folder)}"
        before = client.get(path).json()
        assert before["evaluation"] is None
        assert before["evaluation_command"].startswith("mlx-lora evaluate --model org/model")
        keep_evaluation(folder, FACTS)
        found = client.get(path).json()["evaluation"]
        assert found["models"] == ["base", "adapter"]
        assert [one["right"] for one in found["rows"][0]["said"]] == [False, True]
        assert len(found["rows"][0]["question"]) == MOST_SAID
        assert "9 rows of d.jsonl" in found["source"]
        (folder / EVALUATION_FILE).write_text("[]")
        assert client.get(path).json()["evaluation"] is None


def test_a_tick_counts_for_the_run_and_for_later_questions(home):
    folder = write_run(home / "runs" / "a")
    facts = json.loads((folder / "report.json").read_text())
    one = {"question": "Why?", "expected": "Because.", "base": "No", "adapter": "So", "new_words": True, "right": False, "base_right": False, "ticked": None}  # fmt: skip
    (folder / "report.json").write_text(json.dumps({**facts, **REPORT, "answers": [one, {**one, "new_words": False}]}))
    keep_evaluation(folder, {**FACTS, "examples": [EXAMPLE]})
    with studio(home) as client:
        path = f"/api/runs/{run_id(folder)}"
        tick = lambda **body: client.post(f"{path}/tick", json=body)  # noqa: E731
        assert [row["ticked"] for row in client.get(path).json()["answers"]] == [None, None]
        assert tick(index=2, right=False).json()["evaluation"]["rows"][0]["said"][1]["right"] is False
        assert tick(index=2, right=None).json()["evaluation"]["rows"][0]["said"][1]["right"] is True
        for body, status in (({"index": 3, "right": True}, 404), ({"index": -1, "right": True}, 400), ({"right": True}, 400), ({"index": 0, "right": 1}, 400)):  # fmt: skip
            assert tick(**body).status_code == status
        before = client.get(path).json()["verdict"]
        assert tick(index=1, right=True).json()["verdict"]["headline"] != before["headline"]
        (folder / "adapters.safetensors").unlink()
        assert tick(index=0, right=True).status_code == 409, "no finished run"


def test_runs_on_the_same_data_say_so_wherever_it_is(home, tmp_path, monkeypatch, own_cache):
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_bytes((home / "data" / "chats.jsonl").read_bytes())
    Path("other.jsonl").write_text('{"text": "other"}\n')
    found = {}
    for name, data in (("copy", "mine.jsonl"), ("whole", str(home / "data" / "chats.jsonl")), ("other", "other.jsonl"), ("gone", "x.jsonl")):  # fmt: skip
        note_run(write_run(home / "runs" / name, data=data))
    write_run(home / "runs" / "stranger", data=str(tmp_path / "mine.jsonl"))
    with studio(home, known_runs=runs_file()) as client:
        for name in ("copy", "whole", "other", "gone", "stranger"):
            found[name] = client.get(f"/api/runs/{run_id(home / 'runs' / name)}").json()["data_content"]
    assert found["copy"] == found["whole"] != found["other"]
    assert found["gone"] is found["stranger"] is None, "files of a run that did not begin here are not read"


def test_the_command_asks_on_what_was_chosen(home, monkeypatch):
    begun = []
    monkeypatch.setattr(Tasks, "child", lambda self, kind, title, words, *rest, **named: begun.append((words, named)) or self.begin(kind, title, lambda task: None))  # fmt: skip
    folder = write_run(home / "runs" / "a", bits=4)
    data = str(home / "data" / "chats.jsonl")
    with studio(home) as client:
        path = f"/api/runs/{run_id(folder)}/evaluation"
        command = client.post(path, json={"data": data}).json()["command"]
        words = begun[0][0]
        assert command == f"mlx-lora {' '.join(words)}"
        assert words[words.index("--data") + 1] == data
        assert words[words.index("--bits") + 1] == "4"
        assert "--show" in words
        client.post(path, json={})
        assert "--data" not in begun[1][0]
        assert client.post(path, json={"data": "/etc/passwd"}).status_code == 403
        other = write_run(home / "runs" / "pairs", objective="dpo")
        assert client.post(f"/api/runs/{run_id(other)}/evaluation", json={}).status_code == 409
        (folder / "adapters.safetensors").unlink()
        assert client.post(path, json={}).status_code == 409
    assert len(begun) == 2


def test_an_adapter_is_offered_what_takes_it_and_goes_with_its_base(home, monkeypatch):
    begun = []
    monkeypatch.setattr(Tasks, "child", lambda self, kind, title, words, *rest, **named: begun.append(words) or self.begin(kind, title, lambda task: None))  # fmt: skip
    model = str(home / "models" / "tiny")
    kinds = {
        "plain": {}, "qat": {"bits": 4, "qat": 1.0}, "full": {"method": "full"}, "norm": {"modules_to_save": ["norm"]},
        "labels": {"objective": "classify", "bits": 4}, "vectors": {"objective": "embed"},
    }  # fmt: skip
    for name, settings in kinds.items():
        write_run(home / "runs" / name, **{"model": model, **settings})
    with studio(home) as client:
        found = {one["name"]: one for one in client.get("/api/adapters").json()["adapters"]}
        assert {name for name, one in found.items() if one["talks"]} == {"plain"}
        assert not found["plain"]["refused"]
        assert all(why for one in found.values() for why in one["refused"].values()), "each with its reason"
        assert {"peft", "mlx-lm"} <= set(found["qat"]["refused"]) & set(found["full"]["refused"])
        assert "gguf" in found["labels"]["refused"]
        assert "peft" not in found["labels"]["refused"]
        for name, to, flags in (
            ("qat", "hf", {"--bits"}),
            ("labels", "fuse", {"--bits", "--dequantize"}),
            ("plain", "fuse", set()),
        ):
            asked = {"model": model, "adapter": found[name]["path"], "to": to, "out": f"{name}-out"}
            assert client.post("/api/export", json=asked).status_code == 200
            assert {"--bits", "--dequantize"} & set(begun[-1]) == flags


def test_an_adapter_is_talked_to_on_the_base_that_it_was_trained_on(home, monkeypatch):
    loaded = []

    def load(settings):
        loaded.append((settings.model, settings.revision, settings.bits))
        raise InputError("not loaded here")

    monkeypatch.setattr("mlx_lora.studio.places.talk.load_base", load)
    model = str(home / "models" / "tiny")
    runs = {
        "four": {"bits": 4},
        "two": {"bits": 2},
        "plain": {},
        "old": {"model": "org/model", "revision": "v1", "bits": 4},
    }
    paths = {name: str(write_run(home / "runs" / name, **{"model": model, **own})) for name, own in runs.items()}
    with studio(home) as client:
        found = {one["name"]: one for one in client.get("/api/adapters").json()["adapters"]}
        assert {name: (one["revision"], one["bits"]) for name, one in found.items()} == {
            "four": (None, 4), "two": (None, 2), "plain": (None, None), "old": ("v1", 4),
        }  # fmt: skip

        def talk(model, *names, **more):
            columns = [{"adapters": [{"path": paths[name]}] if name else []} for name in names]
            said = [{"role": "user", "content": "Say 1."}]
            return client.post("/api/talk", json={"model": model, "columns": columns, "messages": said, **more})

        for asked in (
            (model, "", "four"),
            (model, "four"),
            (model, "two"),
            (model, "plain"),
            ("org/model", "old"),
            ("org/model", ""),
        ):
            assert "not loaded here" in talk(*asked).text
        assert loaded == [
            (model, None, 4), (model, None, 4), (model, None, 2), (model, None, None), ("org/model", "v1", 4), ("org/model", None, None),
        ]  # fmt: skip
        assert talk(model, "four", "two").status_code == 400, "one base is in memory at a time"
        assert "not loaded here" in talk(model, "four", bits=None, revision=None).text
        assert loaded[-1] == (model, None, None), "what is asked for comes first"
        for wrong in ({"bits": 99}, {"bits": "x"}, {"revision": "../../x"}):
            assert talk(model, "four", **wrong).status_code == 400


def test_exports_take_the_revision_and_an_upload_is_tried_as_often_as_one_likes(home, monkeypatch):
    begun = []
    monkeypatch.setattr(Tasks, "child", lambda self, kind, title, words, *rest, **named: begun.append(words) or self.begin(kind, title, lambda task: None))  # fmt: skip
    folder = write_run(home / "runs" / "a", model="org/model", revision="v1")
    order = {"model": "org/model", "adapter": str(folder), "out": "a-hub", "to": "hub", "options": {"repo": "me/a"}}
    with studio(home) as client:
        for more in ({}, {}, {"to": "hf", "out": "a-hf"}, {"to": "fuse", "out": "a-fuse"}):
            assert client.post("/api/export", json=order | more).status_code == 200
            words = begun[-1]
            assert words[words.index("--revision") + 1] == "v1"
            Path(words[words.index("--out") + 1]).mkdir()  # left by an upload that failed, too
        assert client.post("/api/export", json=order | {"model": str(home / "models" / "tiny")}).status_code == 200
        assert "--revision" not in begun[-1]
        assert client.post("/api/export", json=order | {"to": "hf", "out": "a-hf"}).status_code == 409
    assert len({words[words.index("--out") + 1] for words in begun}) == len(begun)


OLD = "0" * 40  # a commit


def test_a_model_of_the_hub_is_weighed_before_it_is_loaded_beside_a_run(tmp_path, monkeypatch):
    snapshots = tmp_path / "models--org--big" / "snapshots"
    (tmp_path / "models--org--big" / "refs").mkdir(parents=True)
    (tmp_path / "models--org--big" / "refs" / "main").write_text("new")
    for name, numbers in (("new", 4 * 10**6), (OLD, 10**6)):
        (snapshots / name).mkdir(parents=True)
        (snapshots / name / "config.json").write_text('{"model_type": "llama"}')
        header = json.dumps({"w": {"dtype": "BF16", "shape": [numbers], "data_offsets": [0, 2 * numbers]}}).encode()
        with (snapshots / name / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + 2 * numbers)
        shutil.copyfile(snapshots / name / "model.safetensors", snapshots / name / "consolidated.safetensors")
    monkeypatch.setattr("mlx_lora.studio.model_stores.HF_HUB_CACHE", str(tmp_path))
    talk = Talk(lambda: [{"name": "r", "peak_bytes": 10 * 10**6}], 15 * 10**6)

    def warned(**settings):
        return talk._memory_warning(ModelSettings(**{"model": "org/big", **settings})) is not None

    assert warned()
    assert not warned(revision=OLD)
    assert not warned(bits=4)
    assert warned(model=str(snapshots / "new"))
    assert not warned(model="org/unknown")


def test_rows_of_plain_text_are_only_measured(tmp_path):
    settings = {"model": "m"}
    text = {"splits": {"train": {"rows": 9, "tokens": 90, "supervised_tokens": 81}}}
    assert "--show" in words_of_asking(tmp_path, settings, CHATS)
    assert "--show" not in words_of_asking(tmp_path, settings, text)


@pytest.mark.parametrize(
    "settings", [{"objective": "classify"}, {"objective": "sft", "images": True}, {"objective": "dpo", "images": True}]
)
def test_what_was_forgotten_is_not_asked_where_texts_are_not_answered(home, settings):
    folder = write_run(home / "runs" / "a", **settings)
    with studio(home) as client:
        path = f"/api/runs/{run_id(folder)}"
        assert client.get(path).json()["forgetting_command"] is None
        assert client.post(f"{path}/forgetting", json={}).status_code == 409


def test_what_was_forgotten_is_measured_on_rows_that_were_not_trained(tmp_path):
    settings = {"model": "m", "data": "d.jsonl"}
    assert "--data" not in words_of_measuring(tmp_path, settings)
    assert "--data" in words_of_measuring(tmp_path, settings | {"objective": "distill"})
    assert words_of_measuring(tmp_path, settings | {"objective": "dpo"}) is None


def test_names_of_a_terminals_run_start_where_it_began(tmp_path, home, monkeypatch):
    begun = []
    monkeypatch.setattr(Tasks, "child", lambda self, kind, title, words, *rest, **named: begun.append(named) or self.begin(kind, title, lambda task: None))  # fmt: skip
    folder = write_run(tmp_path / "elsewhere" / "a")
    known = tmp_path / "runs.jsonl"
    known.write_text(json.dumps({"path": str(folder), "cwd": str(tmp_path), "at": 1.0}) + "\n")
    with studio(home, known_runs=known) as client:
        assert client.post(f"/api/runs/{run_id(folder)}/evaluation", json={}).status_code == 200
    assert begun == [{"cwd": str(tmp_path)}]


@pytest.mark.slow
@pytest.mark.usefixtures("own_runs_list")
def test_both_are_asked_from_the_page(tiny_folder, chats, home):
    words = ("--iters", 4, "--batch-size", 8, "--learning-rate", 1e-2, "--val-batches", 0, "--sample-tokens", 0)
    model, data, folder = home / "models" / "tiny", home / "data" / "chats.jsonl", home / "runs" / "loop"
    assert run("train", "--model", model, "--data", data, "--adapter-path", folder, *words).code == 0
    with real_studio(home, tiny_folder.parent) as url, chromium() as browser, open_studio(browser, url) as watched:
        page = watched.page
        page.set_default_timeout(PATIENCE_MS)
        watched.go("runs", "loop")
        page.get_by_role("link", name="loop").click()
        page.get_by_role("button", name="Ask both").click()
        page.get_by_role("region", name="Tasks").get_by_role("group", name="Questions to loop").wait_for()
        page.get_by_role("button", name="Ask again").wait_for()
        table = page.get_by_role("region", name="Questions and answers")
        kept = json.loads((folder / EVALUATION_FILE).read_text())
        assert kept["held_out"] is True
        assert table.get_by_role("row").count() == 1 + len(kept["examples"]) == 1 + kept["rows"]
        assert kept["examples"][0]["question"] in table.inner_text()
        page.get_by_text("held out of").wait_for()
        page.get_by_label("Questions from").select_option(label="chats.jsonl")
        page.get_by_role("button", name="Ask again").click()
        page.locator(".note", has_text="rows that the run trained on, such as").wait_for()
        page.get_by_role("button", name="Show all 20").click()
        assert table.get_by_role("row").count() == 21
        assert "Questions and answers" in (folder / "report.html").read_text()
        assert watched.complaints() == []
