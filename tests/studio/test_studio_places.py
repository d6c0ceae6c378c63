"""The studio's model, data and training places, asked as the page asks."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from pathlib import Path

import pytest
import yaml
from studio_client import furnish, studio, upload, wait_for

from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import FIELDS
from mlx_lora.data import sandbox
from mlx_lora.studio import previews
from mlx_lora.studio.model_stores import ollama_models
from mlx_lora.studio.places.train import sweep_folder
from mlx_lora.studio.plans import Plans, kept_outline
from mlx_lora.studio.plans import _key as key_of_plan
from mlx_lora.studio.web import OWN, Tasks
from mlx_lora.trainer.sweep import SweepState
from mlx_lora.utils.console import finite_values


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("studio") / "home"


@pytest.fixture(scope="module")
def named(home, tiny_folder, chats):
    return furnish(home, tiny_folder, chats)


@pytest.fixture(scope="module")
def client(home, named):
    with studio(home) as client:
        yield client


def preview(client, model, data, **asked):
    body = {"model": model, "data": [{"path": data, "weight": 1}], **asked}
    return client.post("/api/data/preview", json=body)


def test_the_state_says_what_this_machine_is(client, home):
    state = client.get("/api/state").json()
    assert state["home"] == str(home.resolve())
    assert state["machine"]["memory_bytes"] > 10**9
    assert not state["key_required"]
    assert state["tasks_running"] == 0


def test_a_model_of_the_studios_folder_is_listed_with_its_facts(client, named):
    (model,) = [one for one in client.get("/api/models").json()["models"] if one["id"] == named[0]]
    assert model["kind"] == "folder"
    assert model["trainable"]
    assert model["architecture"] == "llama"
    assert model["bits"] == 32
    assert model["parameters"] > 10_000
    kinds = [store["kind"] for store in client.get("/api/models").json()["stores"]]
    assert set(kinds) == {"hub", "folder", "ollama", "lmstudio"}


def test_ollamas_manifests_lead_to_its_blobs(tmp_path):
    blob = tmp_path / "blobs" / f"sha256-{'a' * 64}"
    blob.parent.mkdir()
    blob.write_bytes(b"GGUF")
    manifest = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "llama3" / "8b"
    manifest.parent.mkdir(parents=True)
    layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{'a' * 64}"}]
    climbing = [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../etc/passwd"}]
    manifest.write_text(json.dumps({"layers": [*climbing, *layers, "strange", {"mediaType": "other"}]}))
    (found,) = ollama_models(tmp_path, tmp_path / "links")
    assert found.name == "llama3:8b"
    assert found.path.name == "llama3-8b.gguf"
    assert found.path.resolve() == blob.resolve()


def test_every_setting_is_there_with_its_help(client):
    groups = client.get("/api/settings").json()["groups"]
    rows = {row["name"]: row for group in groups for row in group["settings"]}
    assert rows.keys() | OWN == FIELDS.keys()
    assert [rows["learning_rate"][name] for name in ("type", "word", "range")] == ["float", "auto", [0, 1000]]
    assert rows["learning_rate"]["exclusive"]
    assert "dpo" in rows["objective"]["choices"]
    assert rows["mask_prompt"]["type"] == "bool"
    assert rows["relora_every"]["method"] == "relora"
    assert rows["beta"]["objectives"][0] == "dpo"
    assert all(row["help"] for row in rows.values())


@pytest.mark.slow
def test_a_plan_comes_from_the_config_alone_and_is_kept(client, named):
    body = {"model": named[0], "settings": {"rank": 4, "max_seq_length": 64}}
    plan = client.post("/api/models/plan", json=body).json()
    assert plan["fits"]
    assert plan["predicted"]
    assert {"base", "adapter"} <= {part["name"] for part in plan["parts"]}
    assert "predicted" in plan["line"]
    start = time.process_time()
    assert client.post("/api/models/plan", json=body).json() == plan
    assert time.process_time() - start < 0.1
    refused = client.post("/api/models/plan", json={**body, "settings": {"rank": 0}}).json()
    assert not refused["fits"]
    assert "“Rank”" in refused["problems"][0]
    assert list(refused["said"]) == ["rank"]


@pytest.mark.long
def test_plans_are_traced_beside_a_model_that_answers(client, named, monkeypatch):
    def traced(*_, **__):
        raise AssertionError("this process replaced MLX's functions")

    monkeypatch.setattr("mlx_lora.trainer.fit.gradient_graph", traced)
    body = {"model": named[0], "settings": {"max_seq_length": 96}}
    answer = client.post("/api/models/plan", json=body).json()
    assert answer.get("peak_bytes"), answer
    for process in multiprocessing.active_children():
        process.kill()
    body["settings"]["max_seq_length"] = 95
    assert "ask again" in client.post("/api/models/plan", json=body).json()["error"]["message"]
    assert client.post("/api/models/plan", json=body).json()["peak_bytes"]


def test_the_rule_fills_the_cards_at_once(client, named):
    settings = {"model": named[0], "data": named[1]}
    start = time.process_time()
    cards = client.post("/api/train/rule", json={"settings": settings}).json()["cards"]
    assert time.process_time() - start < 1
    assert list(cards) == ["quick", "balanced", "thorough"]
    assert 10 < cards["quick"]["steps"] < cards["balanced"]["steps"] < cards["thorough"]["steps"]
    assert len({card["learning_rate"] for card in cards.values()} - {None}) == 1
    assert [card["rank"] for card in cards.values()] == [8, 16, 32]
    set_by_hand = client.post("/api/train/rule", json={"settings": {**settings, "rank": 16, "iters": 7}}).json()[
        "cards"
    ]
    assert {(card["rank"], card["steps"]) for card in set_by_hand.values()} == {(16, 7)}
    nothing = client.post("/api/train/rule", json={"settings": {"model": "org/elsewhere", "data": "org/data"}}).json()
    assert nothing["cards"]["balanced"]["steps"] is None


@pytest.mark.slow
def test_the_cards_are_the_plans_of_their_runs(client, named):
    settings = {"model": named[0], "data": named[1]}
    plans = {
        card: client.post("/api/train/plan", json={"settings": settings, "card": card}).json()
        for card in ("balanced", "quick", "thorough")
    }
    steps = {card: plan["steps"] for card, plan in plans.items()}
    assert 10 < steps["quick"] < steps["balanced"] < steps["thorough"]
    assert plans["balanced"]["own"] == {}
    assert plans["quick"]["own"]["rank"] == 8
    assert f"--rank {plans['thorough']['own']['rank']}" in plans["thorough"]["command"]
    by_rule = client.post("/api/train/rule", json={"settings": settings}).json()["cards"]
    for card, plan in plans.items():
        assert by_rule[card]["learning_rate"] == plan["chosen"]["learning_rate"]
        assert by_rule[card]["epochs"] == plan["chosen"]["epochs"]
        assert by_rule[card]["steps"] == pytest.approx(plan["steps"], rel=0.35)
    far_off = client.post("/api/train/plan", json={"settings": {**settings, "learning_rate": 1.0}}).json()
    assert list(far_off["warned"]) == ["learning_rate"]
    assert "--" not in far_off["warnings"][0]
    assert client.post("/api/train/plan", json={"settings": settings, "card": "huge"}).status_code == 400


def test_an_upload_gets_a_name_of_its_own(client, home):
    first = upload(client, "mine.jsonl", b'{"text": "a"}\n').json()
    second = upload(client, "mine.jsonl", b'{"text": "b"}\n').json()
    assert (first["name"], second["name"]) == ("mine.jsonl", "mine-2.jsonl")
    names = {one["name"] for one in client.get("/api/data/sets").json()["sets"]}
    assert {"chats.jsonl", "mine.jsonl", "mine-2.jsonl"} <= names
    assert not list((home / "data").glob(".*"))


def test_a_preview_shows_rows_as_they_are_trained(client, named):
    page = preview(client, *named, settings={"max_seq_length": 40}, limit=3).json()
    assert page["task"] is None
    assert page["total"] == 40
    assert page["forms"] == {"alpaca": 40}
    assert page["counts"]["cut"] + page["counts"]["refused"] > 0
    assert sum(bar["count"] for bar in page["histogram"]) == page["counts"]["rows"]
    row = page["rows"][0]
    assert (row["file"], row["line"], row["form"]) == ("chats.jsonl", 1, "alpaca")
    trained = "".join(span["text"] for span in row["spans"] if span["trained"])
    assert trained.startswith("abc")
    assert "Say 0" in "".join(span["text"] for span in row["spans"] if not span["trained"])
    assert row["trained_tokens"] < row["tokens"]
    second = preview(client, *named, settings={"max_seq_length": 40}, offset=38, limit=50).json()
    assert [row["line"] for row in second["rows"]] == [39, 40]


def test_a_preview_follows_the_files_that_it_depends_on(tmp_path, tiny_folder, chats):
    model, data = furnish(tmp_path / "home", tiny_folder, chats)
    template, own = tmp_path / "home" / "data" / "mine.jinja", Path(model) / "chat_template.jinja"

    def first_row(settings: dict[str, str]) -> str:
        with studio(tmp_path / "home") as client:  # also after a new start
            asked = {"model": model, "data": [{"path": data, "weight": 1}], "settings": settings, "limit": 1}
            rows = [client.post("/api/data/preview", json=asked).json()["rows"] for _ in range(2)]
            assert rows[0] == rows[1]
            return "".join(span["text"] for span in rows[0][0]["spans"])

    for file, settings in ((template, {"chat_template": str(template)}), (own, {})):
        for mark in ("[", "<<"):
            file.write_text(f"{{% for m in messages %}}{mark}{{{{ m['content'] }}}}\n{{% endfor %}}")
            assert first_row(settings).startswith(f"{mark}Say 0"), file


@pytest.mark.parametrize(
    "template", ["{{ ('a' * 9000000 ~ 'b') in (['a' * 9000000 ~ 'c'] * 100000) }}", "{% for i in range(99999) %}{{ 'a' * 30000 }}{% endfor %}"]
)  # fmt: skip
def test_a_model_with_a_hostile_template_is_refused_in_one_line(template, tmp_path, tiny_folder, chats, monkeypatch):
    model, data = furnish(tmp_path / "home", tiny_folder, chats)
    monkeypatch.setattr(sandbox, "RENDER_S", 2.0)
    (Path(model) / "chat_template.jinja").write_text(template)
    with studio(tmp_path / "home") as client, ThreadPoolExecutor(1) as threads:
        shown = threads.submit(preview, client, model, data)
        while not shown.done():
            start = time.monotonic()
            assert client.get("/api/models").status_code == 200
            assert time.monotonic() - start < 1
            time.sleep(0.1)
    assert shown.result().status_code == 400
    assert "the chat template takes more than" in shown.result().text


def test_a_preview_reads_the_label_and_the_control_tokens_that_were_asked_for(client, named):
    rows = [
        {
            "text": f"{n}",
            "prompt": f"<|im_end|>{n}",
            "completion": "yes",
            "label": "a",
            "verdict": "good" if n % 2 else "bad",
        }
        for n in range(4)
    ]
    data = upload(client, "verdicts.jsonl", "\n".join(map(json.dumps, rows)).encode()).json()["path"]
    other = {"objective": "classify", "label_column": "nothing"}
    found = [
        preview(client, named[0], data, settings=one).json()
        for one in ({"objective": "classify"}, other, {}, {"allow_special_tokens": True})
    ]
    assert found[0]["counts"]["rows"] == 4
    assert found[1]["counts"]["rows"] == 0, "no record has that column"
    assert found[3]["counts"]["tokens"] < found[2]["counts"]["tokens"], "<|im_end|> is one token"


def test_the_keys_of_a_preview_and_a_plan_have_the_files_that_are_read(tmp_path):
    for name in ("rows.jsonl", "teacher.txt"):
        (tmp_path / name).write_text("{}\n")
    asked = {"data": str(tmp_path / "rows.jsonl"), "teacher_prompt": str(tmp_path / "teacher.txt")}
    settings = {"model": str(tmp_path), **asked}
    kept = [previews._key(asked, (), None)[0], previews._key(asked, (), date(2026, 1, 1))[0], key_of_plan(settings)]
    (tmp_path / "teacher.txt").write_text("You know more.\n")
    assert previews._key(asked, (), None)[0] not in kept[:2]
    changed = key_of_plan(settings)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert len({kept[2], changed, key_of_plan(settings)}) == 3, "a plan reads the same files"


def test_rows_that_are_cut_doubled_or_refused_have_their_lines(client, named):
    long = {"prompt": "a", "completion": "b" * 500}
    good = {"prompt": "a", "completion": "b"}
    lines = [
        json.dumps(good),
        json.dumps(long),
        "not JSON",
        json.dumps(good),
        json.dumps({"prompt": "x", "completion": ""}),
    ]
    data = upload(client, "odd.jsonl", "\n".join(lines).encode()).json()["path"]
    settings = {"max_seq_length": 80}
    found = {
        kind: preview(client, named[0], data, settings=settings, filter=kind).json()
        for kind in ("cut", "doubled", "refused")
    }
    assert [row["line"] for row in found["cut"]["rows"]] == [2]
    assert [(row["line"], row["doubled_of"]["line"]) for row in found["doubled"]["rows"]] == [(4, 1)]
    assert [row["line"] for row in found["refused"]["rows"]] == [3, 5]
    assert "not JSON" in found["refused"]["rows"][0]["why"]
    counts = found["cut"]["counts"]
    assert (counts["rows"], counts["cut"], counts["doubled"], counts["refused"]) == (3, 1, 1, 2)
    assert preview(client, named[0], data, filter="odd").status_code == 400


def test_columns_that_nobody_knows_are_listed_for_the_menus(client, named):
    data = upload(client, "faq.csv", b"Kundenfrage,Unsere Antwort\nWann?,Um 9.\nWo?,Hier.\n").json()["path"]
    page = preview(client, named[0], data).json()
    assert (page["columns"], page["counts"]["rows"]) == (["Kundenfrage", "Unsere Antwort"], 0)
    settings = {"prompt_column": "Kundenfrage", "completion_column": "Unsere Antwort"}
    page = preview(client, named[0], data, settings=settings).json()
    assert (page["columns"], page["set_rows"]) == ([], [2])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \n"),
        ("a.csv", b"prompt,completion\n"),
        ("a.txt", b""),
        ("a.csv", b"\x89PNG\r\n\x1a\n\0\0"),
    ],
)
def test_a_file_without_rows_is_refused_and_nothing_stays(client, home, name, content):
    before = sorted((home / "data").iterdir())
    answer = upload(client, name, content)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(name)
    assert sorted((home / "data").iterdir()) == before


def test_an_upload_keeps_its_name_or_says_why_not(client):
    row = b'{"text": "a"}\n'
    for given, name in (
        ("Gr\u00fc\u00dfe & Fragen (1).jsonl", "Grüße & Fragen (1).jsonl"),
        ("Gru\u0308\u00dfe.jsonl", "Grüße.jsonl"),  # as a Mac spells it
    ):
        found = upload(client, given, row).json()
        assert (found["name"], found["why"]) == (name, "")
    found = upload(client, "a,b=2#c.jsonl", row).json()
    assert found["name"] == "a-b-2-c.jsonl"
    assert found["why"]
    assert upload(client, "Grüße.jsonl", row).json()["name"] == "Grüße.jsonl", "the same file is not kept twice"
    found = upload(client, "Grüße.jsonl", b'{"text": "b"}\n').json()
    assert found["name"] == "Grüße-2.jsonl"
    assert found["why"]


def test_pairs_are_shown_side_by_side(client, named):
    pairs = [{"prompt": "a", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(4)]
    data = upload(client, "pairs.jsonl", "\n".join(map(json.dumps, pairs)).encode()).json()["path"]
    page = preview(client, named[0], data, settings={"objective": "dpo"}).json()
    assert page["total"] == 8
    assert [row["part"] for row in page["rows"][:2]] == ["chosen", "rejected"]
    assert "bad 0" in "".join(span["text"] for span in page["rows"][1]["spans"])


def test_a_mixture_becomes_the_value_of_data(client, named):
    other = upload(client, "other.jsonl", b'{"prompt": "a", "completion": "b"}\n').json()["path"]
    sets = [{"path": named[1], "weight": 2}, {"path": other, "weight": 0.5}]
    page = client.post("/api/data/preview", json={"model": named[0], "data": sets}).json()
    assert page["data"] == f"{named[1]}=2,{other}=0.5"
    assert page["total"] == 41
    assert page["set_rows"] == [40, 1], "so the page can say that it is no even mixture"
    assert client.post("/api/data/preview", json={"model": named[0], "data": [*sets, {"path": 3}]}).status_code == 400


@pytest.mark.long
def test_a_plan_of_a_run_has_its_command_and_its_settings(client, named, home):
    settings = {
        "model": named[0],
        "data": named[1],
        "iters": 4,
        "learning_rate": 1e-3,
        "mask_prompt": False,
        "rank": 16,
    }
    plan = client.post("/api/train/plan", json={"settings": settings, "name": "one"}).json()
    assert plan["fits"]
    assert (plan["problems"], plan["said"]) == ([], {})
    assert plan["steps"] == 4
    assert plan["task"] is None
    assert "--no-mask-prompt" in plan["command"]
    assert "--rank" not in plan["command"], "the default is left out"
    content = yaml.safe_load(plan["run_yaml"])
    assert content["learning_rate"] == 1e-3
    assert content["adapter_path"] == str(home.resolve() / "runs" / "one")
    wrong = client.post("/api/train/plan", json={"settings": {**settings, "learning_rate": -1}}).json()
    assert "“Learning rate”" in wrong["line"]
    assert list(wrong["said"]) == ["learning_rate"]
    none = client.post("/api/train/plan", json={"settings": {}}).json()
    assert none["problems"] == ["choose a model first"]


def test_a_kept_shape_is_not_that_of_a_base_that_is_read_from_its_files(tiny_folder):
    memory, disk = (
        kept_outline(train_settings({"model": str(tiny_folder), "offload_base": given}), "float32", None)[1]
        for given in ("off", "on")
    )
    assert disk.shared
    assert not memory.shared


@pytest.mark.slow
def test_a_server_that_ends_waits_for_no_plan(tmp_path):
    plans = Plans(Tasks(tmp_path))
    assert plans._processes.submit(int, "3").result(timeout=300) == 3  # the process has begun
    working = plans._processes.submit(time.sleep, 600)
    wait_for(working.running)
    children = list(plans._processes._processes.values())
    plans.close()
    with pytest.raises(BrokenProcessPool):
        working.result(timeout=60)
    assert children
    assert wait_for(lambda: not any(child.is_alive() for child in children) or None, 60)


@pytest.mark.slow
def test_large_data_is_read_in_a_process_of_its_own(client, named, monkeypatch):
    monkeypatch.setattr(previews, "AT_ONCE_BYTES", 10)
    first = preview(client, *named, settings={"max_seq_length": 61}).json()
    assert first["counts"] is None
    number = first["task"]["id"]
    ended = wait_for(
        lambda: [t for t in client.get("/api/tasks").json()["tasks"] if t["id"] == number and t["state"] != "running"]
    )
    assert ended[0]["state"] == "done", ended
    assert preview(client, *named, settings={"max_seq_length": 61}).json()["total"] == 40


def test_the_hub_out_of_reach_is_one_line(client, monkeypatch):
    from mlx_lora.studio.places import model as model_routes

    def unreachable():
        raise OSError("no route to host")

    monkeypatch.setattr(model_routes, "get_session", unreachable)
    found = client.get("/api/models/search", params={"q": "smol"}).json()
    assert found["results"] == []
    assert "no route to host" in found["offline"]
    assert "\n" not in found["offline"]


def test_what_an_export_needs(client):
    needs = client.get("/api/export/needs").json()
    assert needs.keys() == {"peft", "mlx-lm", "hf", "gguf-adapter", "gguf", "ollama", "hub", "fuse"}
    assert all(one["needs"] for one in needs.values())


# The search of a learning rate


@pytest.mark.long
def test_auto_is_planned_with_the_default_rate(tmp_path, tiny_folder, chats):
    with studio(tmp_path / "home") as client:
        model, data = furnish(tmp_path / "home", tiny_folder, chats)
        plans = []
        for more in ({}, {"learning_rate": "auto"}):
            answer = client.post(
                "/api/train/plan",
                json={"settings": {"model": model, "data": data, "iters": 200, **more}, "card": "balanced"},
            ).json()
            plans.append(answer)
        assert "--learning-rate auto" in plans[1]["command"]
        assert not plans[1].get("problems")


def write_sweep(folder, settings):
    """Write what a sweep leaves after its first round, in which the last rate diverged."""
    rates = [{"learning_rate": 10.0**-n} for n in range(3)]
    rounds = [
        [
            {"name": f"{n}", "candidate": n, "seed": 0, "step": 4, "loss": None if n == 2 else 2.0 + n, "error": None}
            for n in range(3)
        ]
    ]
    SweepState({"settings": train_settings(settings).to_flat()}, rates, rounds=rounds).write(folder)


@pytest.mark.long
def test_a_rate_that_diverged_has_no_loss(tmp_path):
    write_sweep(tmp_path / "home" / "sweeps" / "rates", {"model": "org/model", "data": "a.jsonl"})
    with studio(tmp_path / "home") as client:
        found = client.get("/api/train/sweep/rates").json()
    assert [row["loss"] for row in found["rows"]] == [2.0, 3.0, None]


def test_an_answer_has_no_number_that_json_does_not_have():
    value = {"a": [math.inf, (1.0, -math.inf)], "b": {"c": math.nan}}
    assert finite_values(value) == {"a": [None, [1.0, None]], "b": {"c": None}}


def test_a_search_goes_on_only_with_the_same_settings_and_data(tmp_path):
    data, home = tmp_path / "a.jsonl", tmp_path / "sweeps"
    data.write_text('{"text": "a"}\n')
    settings = {"model": "org/model", "data": str(data), "iters": 60}
    assert sweep_folder(home / "rates", settings) == home / "rates"
    write_sweep(home / "rates", settings)
    assert sweep_folder(home / "rates", settings) == home / "rates", "it goes on"
    for more in ({"rank": 4}, {"iters": 30}, {"data": "tiny-shakespeare"}):
        assert sweep_folder(home / "rates", {**settings, **more}) == home / "rates-2"
    write_sweep(home / "rates-2", {**settings, "rank": 4})
    assert sweep_folder(home / "rates", {**settings, "rank": 4}) == home / "rates-2"
    (home / "rates" / "sweep.json").write_text("{}")
    assert sweep_folder(home / "rates", settings) == home / "rates-3"
    later = time.time() + 60
    os.utime(data, (later, later))
    assert sweep_folder(home / "rates", {**settings, "rank": 4}) == home / "rates-3", "the rows have changed"


@pytest.mark.slow
def test_a_sweep_runs_and_goes_on(tmp_path, tiny_folder, chats):
    with studio(tmp_path / "home") as client:
        model, data = furnish(tmp_path / "home", tiny_folder, chats)
        assert client.get("/api/train/sweep/none").status_code == 404
        assert client.post("/api/train/sweep", json={"settings": {"model": model}}).status_code == 400
        settings = {
            "model": model,
            "data": data,
            "iters": 60,
            "batch_size": 4,
            "sample_tokens": 0,
            "learning_rate": 1e-3,
        }
        order = {"settings": settings, "name": "rates", "card": "balanced"}
        begun = client.post("/api/train/sweep", json=order).json()
        assert "--learning-rate" not in begun["command"]
        assert "sweep" in begun["command"]
        for _ in range(600):
            task = next(one for one in client.get("/api/tasks").json()["tasks"] if one["id"] == begun["task"]["id"])
            if task["state"] != "running":
                break
            time.sleep(0.2)
        assert task["state"] == "done", task["message"]
        found = client.get("/api/train/sweep/rates").json()
        assert len(found["rows"]) == 6
        assert found["advice"].startswith("Use --learning-rate")
        assert found["learning_rate"] in [row["learning_rate"] for row in found["rows"]]
        again = client.post("/api/train/sweep", json=order).json()
        assert again["command"].endswith("--resume")
        assert again["name"] == "rates"
        other = client.post("/api/train/sweep", json={**order, "settings": {**settings, "rank": 4}})
        assert other.status_code == 409, "one trains at a time"
