"""The studio speaks of its fields, not of flags; the command that it shows keeps them."""

from __future__ import annotations

import re

import pytest
from studio_client import furnish, studio

from mlx_lora.config.fields import flag_of
from mlx_lora.config.settings import FIELDS
from mlx_lora.studio.page_words import fields_in, in_page_words, label_of, setting_groups


def test_flags_of_settings_become_fields():
    said = in_page_words(
        "--iters and --epochs: both given; keep one; see `mlx-lora train --iters 3` and --no-mask-prompt"
    )
    assert said.startswith("“Steps” and “Passes over the data”: both given")
    assert "`mlx-lora train --iters 3`" in said
    assert said.endswith(f"“{label_of('mask_prompt')}” off")
    assert in_page_words("--push-to-hub x--iters") == "--push-to-hub x--iters", "no setting of a run"
    assert fields_in("--iters and --epochs: both; --iters, --no-such-thing") == ["iters", "epochs"]


def test_labels_are_unlike_each_other_and_help_names_no_flag():
    labels = {name: label_of(name) for name in FIELDS}
    assert len({label.lower() for label in labels.values()}) == len(labels)
    rows = [row for group in setting_groups() for row in group["settings"]]
    flags = {flag_of(name) for name in FIELDS}
    for row in rows:
        assert row["label"] == labels[row["name"]]
        assert not set(re.findall(r"--[a-z-]+", row["help"])) & flags, row["help"]
        assert "flag" not in row["help"], row["help"]


@pytest.fixture(scope="module")
def client_and_names(tmp_path_factory, tiny_folder, chats):
    home = tmp_path_factory.mktemp("words") / "home"
    names = furnish(home, tiny_folder, chats)
    with studio(home) as client:
        yield client, names


def test_what_is_wrong_names_the_fields_and_stands_at_them(client_and_names):
    client, (model, data) = client_and_names
    settings = {"model": model, "data": data, "iters": 3, "epochs": 2}
    plan = client.post("/api/train/plan", json={"settings": settings}).json()
    (problem,) = plan["problems"]
    assert "--" not in problem
    assert label_of("iters") in problem
    assert set(plan["said"]) == {"iters", "epochs"}
    assert "--iters 3" in plan["command"], "the command keeps its flags"
    refused = client.post("/api/train/start", json={"settings": settings, "name": "x"})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == problem
