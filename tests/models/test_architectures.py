"""mlx-lm's architectures: a dozen families through the stages that decide, the table of all of them, and the tiny models."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
import run_cli
from architectures import images, stages, sweep, table, trial
from architectures.build import tiny_architecture, tiny_config, write_architecture
from architectures.configs import CONFIGS, PARTS, architecture_modules, ways
from architectures.scaling import scaled
from architectures.sweep import Result, Stage
from architectures.vlm import CHANGES
from byte_tokenizer import byte_tokenizer
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from tiers import by_default
from transformers import CONFIG_MAPPING, AutoTokenizer

from mlx_lora.adapters.inject import adapt_model
from mlx_lora.config.settings import AdapterSettings, ModelSettings
from mlx_lora.kernels.measure import left_unchanged
from mlx_lora.models.load import load_base
from mlx_lora.models.meta import outline_of_config
from mlx_lora.models.quantize import fitting_choice
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
from mlx_lora.utils.errors import InputError

# One of each kind: dense, windows, parallel blocks, sinks and experts, delta rule, state space, latent attention, wrappers; of mlx-vlm,
# experts, one that chooses its keys, and one that calls its head for each row.
FAMILIES = [
    ("llama", True), ("qwen3", False), ("gemma3_text", True), ("gemma4_text", True), ("phi3", True), ("cohere2", True),
    ("gpt_oss", False), ("qwen3_5", True), ("falcon_h1", False), ("deepseek_v3", False), ("lfm2", True),
    ("mistral3", True), ("granitemoehybrid", True), ("kolibri1", True), ("glm5_next", False),
    ("cohere_compass", False),
]  # fmt: skip
ESSENTIAL = ("load", "plan", "adapt", "gradients", "checkpointing")


# One of attention with windows, of experts, of the delta rule, and of a state space.
BY_DEFAULT = [
    one
    for one in FAMILIES
    if one[0] in ("gemma3_text", "gpt_oss", "qwen3_5", "falcon_h1", "glm5_next", "cohere_compass")
]


@pytest.mark.parametrize(("name", "tied"), by_default(FAMILIES, *BY_DEFAULT), ids=[name for name, _ in FAMILIES])
def test_a_family_is_right_in_the_essential_stages(name, tied, uncompiled):
    result = sweep.try_architecture(name, tied, ESSENTIAL)
    assert {stage: (found.outcome, found.text) for stage, found in result.stages.items()} == dict.fromkeys(
        ESSENTIAL, ("right", "")
    )
    assert 0 < result.facts["worst_factor_error"] < trial.FACTOR_BAR
    assert result.facts["loss_form"].startswith("fused")


def test_the_sweep_sees_a_wrong_gradient(uncompiled, monkeypatch):
    """The paired inequality: a loss whose gradient is 1% off is no match."""
    right = stages.trained_gradients

    def wrong(*arguments):
        value, grads = right(*arguments)
        return value, tree_map(lambda g: 1.01 * g, grads)

    monkeypatch.setattr(stages, "trained_gradients", wrong)
    found = sweep.try_architecture("llama", False, ("load", "adapt", "gradients")).stages["gradients"]
    assert found.outcome == "fails"
    assert "differs by 1.0e-02" in found.text


def test_every_installed_architecture_was_tried():
    stated = table.verdicts(table.read_found())
    tried = [name for name in architecture_modules() if name in CONFIGS or name in CHANGES]
    assert len(tried) > 100
    assert set(tried) <= stated.keys()
    assert table.UNTRIED not in {stated[name] for name in tried}
    assert PARTS.isdisjoint(stated)


def test_the_pages_are_made_of_what_was_found():
    for path, text in table.pages(table.read_found()).items():
        assert path.read_text(encoding="utf-8") == text, f"PYTHONPATH=tests python -m architectures.table writes {path}"


def test_a_sweep_of_some_architectures_leaves_the_others(tmp_path):
    before = table.read_found()
    results = {("llama", False): Result("llama", False, {"train": Stage("fails", "it is late")})}
    after = table.with_results(before, table.rows(before.rows, results), results)
    assert {name for name, row in after.rows.items() if row != before.rows[name]} == {"llama"}
    assert after.worst == before.worst
    table.write_found(after, tmp_path / "found.json")
    assert table.read_found(tmp_path / "found.json") == after
    only = table.with_field(before, table.SAVED, {("llama", False): Result("llama", False, {"saved": Stage("right")})})
    assert only == before


def test_what_was_found_on_pictures():
    column = table.column(table.read_found(), table.IMAGES)
    assert {column[name] for name in images.OF_MODULE} == {"right"}
    assert {name: images.without_images(name) for name in column.keys() & CONFIGS.keys() - images.OF_MODULE.keys()} == {
        name: text for name, text in column.items() if name in CONFIGS and name not in images.OF_MODULE
    }
    assert column["llama4"] == images.TEXT_ONLY
    assert not column["llama"]


def test_an_unknown_architecture_shows_as_not_yet_tried(monkeypatch):
    results = {("llama", False): Result("llama", False, {"train": Stage("right")})}
    rows = {row.name: row.verdict for row in table.rows(["llama", "mamba9"], results)}
    assert rows == {"llama": "right", "mamba9": table.UNTRIED}
    found = table.with_results(table.Found("", 0.0, {}), table.rows(["llama", "mamba9"], results), results)
    assert table.verdicts(found) == rows
    pages = table.pages(found)
    assert "- `llama` Llama 1 to 3.3" in pages[table.PAGE]
    assert "Not yet tried: `mamba9`." in pages[table.PAGE]
    monkeypatch.setattr(sweep, "architecture_modules", lambda: ["mamba9"])
    assert sweep.asked_for(()) == []


def test_tied_models_have_no_head_of_their_own():
    for name in ("llama", "gemma3_text", "qwen3_5", "openelm"):
        names = [{key for key, _ in tree_flatten(tiny_architecture(name, tied).parameters())} for tied in ways(name)]
        assert {key.rpartition(".")[0].rpartition(".")[2] for key in names[0] - names[1]} == {"lm_head"}, name
    assert tiny_config("qwen3_5", True)["text_config"]["tie_word_embeddings"] is True


def test_wider_models_keep_the_order_of_their_blocks():
    config = scaled("qwen3_5", width=2, layers=2)["text_config"]
    assert config["layer_types"] == ["linear_attention", "full_attention"] * 2
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]) == (128, 4, 4)
    assert scaled("kimi_linear", layers=2)["linear_attn_config"]["kda_layers"] == [1, 2, 4, 5]
    small, large = (tiny_architecture("jamba", config=scaled("jamba", width=width)) for width in (1, 2))
    assert large.layers[0].mamba.in_proj.weight.shape[1] == 2 * small.layers[0].mamba.in_proj.weight.shape[1]


def test_a_tokenizer_loads_beside_a_config_that_transformers_does_not_know(tmp_path):
    """DeepSeek V4.1: transformers fails at its YaRN rotation before it comes to the tokenizer."""
    folder = write_architecture(tmp_path / "model", "deepseek_v41")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] not in CONFIG_MAPPING
    assert config["rope_scaling"]["type"] == "yarn"
    with pytest.raises(AttributeError, match="max_position_embeddings"):
        AutoTokenizer.from_pretrained(folder)
    tokenizer = load_folder_tokenizer(folder, config, trust_remote_code=False)
    assert tokenizer._tokenizer.encode("hello") == byte_tokenizer().encode("hello")
    assert tokenizer.eos_token_ids == {config["eos_token_id"]}


@pytest.mark.parametrize(
    ("wanted", "width", "found"),
    [
        (True, 96, True),
        (False, 96, False),
        ({"bits": 8, "group_size": 64}, 128, {"bits": 8, "group_size": 64}),
        ({"bits": 8, "group_size": 64}, 96, {"bits": 8, "group_size": 32}),
        ({"bits": 8}, 32, {"bits": 8, "group_size": 32}),
        ({"bits": 8}, 48, False),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, 96, {"bits": 4, "group_size": 32, "mode": "mxfp4"}),
    ],
)
def test_a_models_wish_for_a_layer_fits_its_width(wanted, width, found):
    assert fitting_choice(wanted, width) == found


@pytest.mark.parametrize("name", ["granite", "rwkv7"])
def test_models_with_wishes_for_some_layers_are_converted_in_small_groups(name, tmp_path):
    """Both ended in a traceback: a layer of 96 inputs, or of 32, and groups of 64."""
    folder, out = write_architecture(tmp_path / "model", name), tmp_path / "out"
    assert run_cli.run("convert", "--model", folder, "--out", out, "--bits", 4, "--group-size", 32).code == 0
    layouts = json.loads((out / "config.json").read_text())["quantization"]
    assert {"group_size": 32, "bits": 8} in layouts.values()
    model = load_base(ModelSettings(model=str(out), dtype="float32")).model
    assert {layer.bits for layer in model.modules() if isinstance(layer, nn.QuantizedLinear)} == {4, 8}


@pytest.mark.parametrize("name", ["stablelm", "phixtral", "recurrent_gemma"])
def test_families_that_failed_in_bfloat16(name, uncompiled):
    """A ValueError in a Mac's dtype: two bring float32 queries and bfloat16 values; the third's gradients were NaN."""
    found = sweep.try_architecture(name, name == "recurrent_gemma", ("load", "bfloat16")).stages["bfloat16"]
    assert (found.outcome, found.text) == ("right", "")


@pytest.mark.long
def test_blocks_that_write_into_a_shared_state_are_not_checkpointed(uncompiled):
    """Kimi K3's blocks ran twice over the same object: gradients off by their own size."""
    stages = ("load", "adapt", "checkpointing")
    found = sweep.try_architecture("kimi_k3", False, stages).stages["checkpointing"]
    assert (found.outcome, found.text) == ("right", "")
    for name, left_out in (("kimi_k3", True), ("deepseek_v41", True), ("gemma4_text", False)):
        model = tiny_architecture(name)
        tape = apply_checkpointing(model, "block")
        model(mx.array([[1, 2, 3]]))
        assert tape.left_out is left_out, name


def test_a_model_without_a_layer_to_adapt_is_told_so():
    """BitNet's layers are packed in a form of their own."""
    outline = outline_of_config(tiny_config("bitnet"), mx.float32)
    with pytest.raises(InputError, match="no linear layer"):
        adapt_model(outline.model, AdapterSettings(), seed=0)


def test_what_a_model_remembers_between_passes_is_no_stand_in(uncompiled):
    """Kimi K3 keeps products of its weights under private names; a traced pass left its own arrays there."""
    model = tiny_architecture("kimi_k3")
    ids = mx.array([[1, 2, 3]])
    expected = model(ids)

    names, own = zip(*tree_flatten(model.parameters()), strict=True)

    def whole(*arrays: mx.array) -> mx.array:
        model.update(tree_unflatten(list(zip(names, arrays, strict=True))))
        return model(ids)

    def trace() -> None:
        model.train()
        mx.export_function(lambda listed: None, whole, *own)
        model.update(tree_unflatten(list(zip(names, own, strict=True))))
        model.eval()

    with left_unchanged(model):
        trace()
    assert mx.array_equal(model(ids), expected).item()
    trace()
    with pytest.raises(RuntimeError, match="without a primitive"):
        mx.eval(model(ids))


@pytest.mark.slow
def test_the_page_says_what_the_sweep_finds(tmp_path):
    """All architectures in all stages, about 20 minutes."""
    results = {(result.name, result.tied): result for result in sweep.sweep(sweep.asked_for(()))}
    sweep.write_results(tmp_path / "sweep.json", results.values())
    found = {row.name: row.verdict for row in table.rows(architecture_modules(), results)}
    stated = table.verdicts(table.read_found())
    assert {name: (verdict, stated.get(name)) for name, verdict in found.items() if verdict != stated.get(name)} == {}
    assert json.loads((tmp_path / "sweep.json").read_text())
