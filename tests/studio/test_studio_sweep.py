"""The Train place searches a learning rate, and its fields take the word `auto`."""

from __future__ import annotations

import math
import os
import time

import pytest
from studio_client import furnish, studio

from mlx_lora.config.load import train_settings
from mlx_lora.studio.places.train import sweep_folder
from mlx_lora.studio.web import setting_groups
from mlx_lora.trainer.sweep import SweepState
from mlx_lora.utils.console import finite_values


def test_the_word_that_a_number_may_be_is_told_to_the_page():
    rate = next(one for group in setting_groups() for one in group["settings"] if one["name"] == "learning_rate")
    assert (rate["type"], rate["word"]) == ("float", "auto")


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
