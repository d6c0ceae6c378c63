"""The Train place searches a learning rate, and its fields take the word `auto`."""

from __future__ import annotations

import time

import pytest
from studio_client import furnish, studio

from mlx_lora.studio.web import setting_groups


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
