"""Folders that transformers 5 saves: RoPE, layers and names under other keys of config.json than mlx-lm reads."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import run_cli
from architectures import saved, stages, sweep, table
from architectures.build import tiny_config, write_architecture
from architectures.trial import relative
from tiers import by_default
from transformers import CONFIG_MAPPING

from mlx_lora.config.settings import ModelSettings
from mlx_lora.gguf.arch import gguf_settings
from mlx_lora.models.config import check_rotation, translate_config
from mlx_lora.models.folder import read_config
from mlx_lora.models.load import load_base
from mlx_lora.models.meta import outline_of
from mlx_lora.utils.errors import InputError

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CASES = {  # an architecture, and what is changed in its config as transformers 4 wrote it
    "llama": ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "mistral": ("llama", {"model_type": "mistral", "rope_theta": 1e6, "sliding_window": None}),
    "qwen2": ("qwen2", {"rope_theta": 3e6}),
    "qwen2 yarn": ("qwen2", {"rope_theta": 1e6, "rope_scaling": YARN}),
    "gemma3": ("gemma3_text", {"rope_theta": 2e6, "rope_local_base_freq": 2e4}),
    "phi": ("phi", {"rope_theta": 5e4, "partial_rotary_factor": 0.25}),
    "qwen3_moe": ("qwen3_moe", {"rope_theta": 1e6}),
    "granitemoehybrid": ("granitemoehybrid", {}),
    "qwen3_next": ("qwen3_next", {"rope_theta": 1e6}),
}
IDS = mx.array(np.random.default_rng(0).integers(5, 250, (2, 21)))


def as_transformers_5(config: dict) -> dict:
    """Return a config as transformers 5 writes it; it drops what it holds for its own."""
    kind = config["model_type"]
    made = CONFIG_MAPPING[kind](**{key: value for key, value in config.items() if key != "model_type"})
    return json.loads(made.to_json_string())


def write_pair(tmp_path: Path, case: str) -> tuple[Path, Path]:
    """Write one model with its config as transformers 4 wrote it, and as transformers 5 does."""
    name, changes = CASES[case]
    config = {**tiny_config(name, name == "gemma3_text"), **changes}
    config["eos_token_id"] = 2
    older = write_architecture(tmp_path / "older", name, name == "gemma3_text", config=config)
    newer = write_architecture(tmp_path / "newer", name, name == "gemma3_text", config=config)
    (newer / "config.json").write_text(json.dumps(as_transformers_5(config)), encoding="utf-8")
    return older, newer


def logits(folder: Path) -> mx.array:
    return load_base(ModelSettings(model=str(folder), dtype="float32")).model(IDS)


@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_transformers_5_is_the_same_model(case, tmp_path):
    older, newer = write_pair(tmp_path, case)
    stored = json.loads((newer / "config.json").read_text())
    assert "rope_parameters" in stored
    assert "rope_theta" not in stored
    assert mx.array_equal(logits(newer), logits(older)).item()


def test_an_untranslated_config_is_another_model(tmp_path, monkeypatch):
    """The paired inequality: what mlx-lm makes of the same folder, without a word."""
    older, newer = write_pair(tmp_path, "llama")
    expected = logits(older)
    stock, _ = mlx_lm.utils.load_model(newer)
    assert relative(stock(IDS), expected) > 0.01


@pytest.mark.parametrize("case", ["llama", "gemma3", "qwen3_moe"])
def test_convert_writes_what_stock_mlx_lm_reads(case, tmp_path):
    older, newer = write_pair(tmp_path, case)
    ran = run_cli.run("convert", "--model", newer, "--out", tmp_path / "out", "--no-quantize", "--dtype", "float32")
    assert ran.code == 0, ran.err
    stock, _ = mlx_lm.utils.load_model(tmp_path / "out")
    assert relative(stock(IDS), logits(older)) < 1e-6


def test_convert_again_changes_nothing(tmp_path):
    _, newer = write_pair(tmp_path, "gemma3")
    once = translate_config(read_config(newer, False), newer)
    assert translate_config(once, newer) == once


def test_gguf_has_the_base_and_scaling_of_rope(tmp_path):
    _, newer = write_pair(tmp_path, "qwen2 yarn")
    settings, _ = gguf_settings(load_base(ModelSettings(model=str(newer))).model, "qwen2")
    found = [settings[f"rope.{name}"] for name in ("scaling.type", "scaling.factor", "freq_base")]
    assert found == ["yarn", 4.0, 1e6]


@pytest.mark.parametrize("case", ["llama", "qwen3_moe", "gemma3"])
def test_the_planner_builds_it_from_the_config_alone(case, tmp_path):
    older, newer = write_pair(tmp_path, case)
    found, wanted = (outline_of(str(folder / "config.json")).model.args for folder in (newer, older))
    assert found.num_hidden_layers == wanted.num_hidden_layers
    assert found.rope_theta == wanted.rope_theta != 10000


def test_attention_factor_of_yarn_is_kept(tmp_path):
    """mlx-lm has no such field; its own mscale gives the same factor."""
    name, changes = CASES["qwen2 yarn"]
    config = {**tiny_config(name), **changes}
    rope = {**YARN, "rope_theta": 1e6, "attention_factor": 1.3}
    newer = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    found = translate_config({**newer, "rope_parameters": rope}, "config.json")["rope_scaling"]
    assert 0.1 * found["mscale"] * np.log(4.0) + 1 == pytest.approx(1.3)
    assert found["mscale_all_dim"] == 0


@pytest.mark.parametrize(
    ("name", "rope", "fact"),
    [
        ("cohere", {**YARN, "rope_theta": 5e4}, "yarn"),  # a class without scaling
        ("recurrent_gemma", {"rope_type": "default", "rope_theta": 5e4}, "50000"),  # with a fixed base
        ("glm", {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}, "8 of 16"),
        ("olmo3", {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}}, "window"),
        (
            "gemma3_text",
            {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
            "linear",
        ),
    ],
)  # fmt: skip
def test_what_mlx_lm_cannot_express_is_refused_in_one_line(name, rope, fact, tmp_path):
    tied = name in ("cohere", "gemma3_text")
    folder = write_architecture(tmp_path / "model", name, tied)
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_theta", "rope_local_base_freq", "partial_rotary_factor"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    with pytest.raises(InputError) as error:
        load_base(ModelSettings(model=str(folder)))
    assert fact in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError):
        outline_of(str(folder / "config.json"))


@pytest.mark.long
@pytest.mark.parametrize(
    "rope",
    by_default(
        ["x", [], {}, {"rope_theta": "x"}, {"full_attention": 3, "a": {}}, {"rope_type": []}], "x", {"rope_theta": "x"}
    ),
)
def test_damaged_rope_parameters_end_in_one_line(rope, tmp_path):
    folder = write_architecture(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    ran = run_cli.run("plan", "--model", folder, "--json")
    assert ran.code in (0, 2)
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("name", ["base", "cache", "switch_layers"])
def test_a_module_of_mlx_lm_that_is_no_model_is_left_to_who_builds_it(name):
    assert translate_config({"model_type": name}, "a folder") == {"model_type": name}


def test_a_rotation_that_does_not_fit_its_config_is_seen(tmp_path):
    base = load_base(ModelSettings(model=str(write_architecture(tmp_path / "model", "qwen3"))))
    right = {**base.config, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    check_rotation(base.model, right, "config.json")
    with pytest.raises(InputError, match="20000"):
        check_rotation(base.model, {**right, "rope_parameters": {"rope_theta": 20000.0}}, "config.json")


def test_the_page_has_a_column_for_it():
    found = table.read_found()
    column, verdicts = table.column(found, table.SAVED), table.verdicts(found)
    assert len(column) > 100
    assert all(said for name, said in column.items() if verdicts[name] != table.UNTRIED)
    assert {column[name] for name in ("llama", "qwen2", "qwen3", "gemma3_text", "qwen3_moe")} == {table.AGREE}
    assert set(saved.OTHERWISE) <= column.keys()
    assert saved.saved is stages.STAGES["saved"]


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_torch(case, tmp_path):
    pytest.importorskip("torch")
    name, changes = CASES[case]
    expected = mx.array(saved.by_transformers(tmp_path / "m", name, name == "gemma3_text", **changes))
    assert relative(logits(tmp_path / "m"), expected) < 1e-4


@pytest.mark.parity
@pytest.mark.parametrize("case", ["llama", "gemma3", "qwen2 yarn"])
def test_transformers_reads_back_what_we_export(case, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    name, changes = CASES[case]
    expected = mx.array(saved.by_transformers(tmp_path / "m", name, name == "gemma3_text", **changes))
    ran = run_cli.run(
        "convert", "--model", tmp_path / "m", "--out", tmp_path / "out", "--no-quantize", "--dtype", "float32"
    )
    assert ran.code == 0, ran.err
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        found = mx.array(model(torch.tensor(np.array(saved.token_ids()))).logits.numpy())
    assert relative(found, expected) < 1e-4


@pytest.mark.parity
@pytest.mark.slow
def test_the_page_says_what_transformers_5_saves():
    """Every architecture of the sweep that transformers has, about two minutes."""
    pytest.importorskip("torch")
    results = sweep.sweep(sweep.asked_for(()), stages=("saved",))
    found = {name: table.saved_text([r for r in results if r.name == name]) for name in {r.name for r in results}}
    assert found == table.column(table.read_found(), table.SAVED)
