"""The plan command, its shapes against models that are really loaded, and what train does with the plan."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
import yaml
from architectures.build import write_architecture
from byte_tokenizer import byte_tokenizer
from conftest import MEASURE, TINY, tiny_model, write_folder
from hub_stand_in import hub_server, run_with_hub
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3_text
from real_models import smollm2_gguf
from run_cli import one_line, run, succeeds
from tiers import by_default
from tiny_gguf import write_tiny_gguf
from tiny_moe import CONFIGS, MXFP4, tiny_moe, with_quantized_experts

from mlx_lora.adapters.inject import adapt_model, adapter_parameters
from mlx_lora.api import plan as plan_api
from mlx_lora.cli.plan import PART_WORDS, PHASE_WORDS, time_words
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import AdapterSettings, ModelSettings, TrainSettings
from mlx_lora.data.data_sets import is_local
from mlx_lora.kernels import activations as exponentials
from mlx_lora.models.load import load_base
from mlx_lora.models.meta import model_shape, outline_of, outline_of_config
from mlx_lora.objectives import reference
from mlx_lora.objectives.reference import row_log_probabilities
from mlx_lora.planner import machine as ceilings
from mlx_lora.planner.fit import fit, largest_batch, largest_batch_size, largest_sequence, largest_that_fits, run_of
from mlx_lora.planner.memory import ModelShape
from mlx_lora.planner.speed import CHIPS, find_chip
from mlx_lora.trainer import build as composition
from mlx_lora.trainer.fit import outlined_shape
from mlx_lora.utils import device

LLAMA_8B = {
    **TINY, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
SHORT = ("--max-seq-length", 96, "--learning-rate", "5e-3", "--iters", 2, "--val-batches", 0)


def planned(*arguments: object) -> dict:
    ran = succeeds("plan", *arguments, "--json")
    return json.loads(ran.out)


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """The config.json of an 8B model, and nothing else."""
    path = tmp_path_factory.mktemp("big") / "config.json"
    path.write_text(json.dumps(LLAMA_8B))
    return path


@pytest.fixture(scope="module")
def plan(tiny_folder) -> dict:
    """The plan of the tiny model without further flags."""
    return planned("--model", tiny_folder)


def test_the_plan_holds_what_scripts_read(plan):
    assert plan["fits"] is True
    assert plan["peak_bytes"] == sum(plan["parts"].values())
    assert {"base", "adapter", "optimizer"} <= plan["parts"].keys()
    assert plan["settings"]["batch_tokens"] == 2048
    assert plan["settings"]["grad_checkpoint"] == "none"
    assert plan["predicted"]["tokens_per_s"] > 0
    assert "predicted" in plan["predicted"]["note"]
    assert plan["predicted"]["ceilings"] == "measured here"


def test_a_config_alone_plans_what_its_folder_does(tiny_folder, plan):
    assert planned("--model", tiny_folder / "config.json")["parts"] == plan["parts"]


@pytest.mark.long
def test_planning_a_large_model_takes_no_memory(big):
    before, start = mx.get_active_memory(), mx.get_peak_memory()
    plan = planned("--model", big, "--chip", "M2 Max")
    assert plan["parts"]["base"] > 15e9
    assert max(mx.get_peak_memory() - start, mx.get_active_memory() - before) < 100e6


def settings_of(**flags: object) -> TrainSettings:
    return train_settings({"model": "x", **flags})


def loaded_shape(folder: Path, rank: int) -> tuple[ModelShape, int, int]:
    """Return the shape of a model that is really loaded, and what it and its adapter take."""
    base = load_base(ModelSettings(model=str(folder)))
    base_bytes = sum(p.nbytes for _, p in tree_flatten(base.model.parameters()))
    adapt_model(base.model, AdapterSettings(rank=rank), 0)
    trained = sum(p.size for p in adapter_parameters(base.model).values())
    return model_shape(base.model, base.config), base_bytes, trained


def same(folder: Path, rank: int = 4) -> ModelShape:
    """Check an outline against the loaded model, layer by layer and to the byte, and return its shape."""
    loaded, base_bytes, trained = loaded_shape(folder, rank)
    outline = outline_of(str(folder), dtype=device.compute_dtype())
    outlined = outlined_shape(outline, settings_of(rank=rank))
    # What is read and then cast is known from the files alone.
    assert dataclasses.replace(outlined, source_bytes=0) == dataclasses.replace(loaded, source_bytes=0)
    assert (outlined.base_bytes, outlined.trained) == (base_bytes, trained)
    return outlined


def test_dense_tied_and_untied_shapes(tiny_folder, tmp_path):
    tied = same(tiny_folder)
    untied = same(write_folder(tmp_path / "u", tiny_model(tie_word_embeddings=False), {"tie_word_embeddings": False}))
    head = TINY["hidden_size"] * TINY["vocab_size"]
    assert untied.base_bytes - tied.base_bytes == head * device.compute_dtype().size
    assert not tied.head_packed
    assert {layer.name for layer in tied.blocks[0].layers if layer.is_end} == {"o_proj", "down_proj"}


@pytest.mark.parametrize("ties", [True, False])
def test_a_gemmas_head_is_tied_unless_one_is_stored(ties, tmp_path):
    config = {**TINY, "model_type": "gemma3_text", "head_dim": 16, "sliding_window": 64, "sliding_window_pattern": 2}
    config.pop("tie_word_embeddings")
    model = gemma3_text.Model(gemma3_text.ModelArgs.from_dict(config))
    if ties:
        model.sanitize({})
    path = write_folder(tmp_path / "g", model)
    (path / "config.json").write_text(json.dumps(config))
    shape = same(path)
    alone = outlined_shape(
        outline_of_config({**config, **({} if ties else {"tie_word_embeddings": False})}, device.compute_dtype()),
        settings_of(rank=4),
    )
    assert dataclasses.replace(alone, source_bytes=0) == dataclasses.replace(shape, source_bytes=0)


def test_quantized_shapes(tiny_folder, tiny_4bit_folder):
    packed, dense = same(tiny_4bit_folder), same(tiny_folder)
    assert packed.base_bytes < 0.4 * dense.base_bytes
    assert packed.head_packed
    assert all(layer.packed for layer in packed.blocks[0].layers)
    assert [b.widths for b in packed.blocks] == [b.widths for b in dense.blocks]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("packed", [False, True])
def test_mixture_shapes(kind, packed, tmp_path):
    model, config = tiny_moe(kind)
    if packed:
        model, config = with_quantized_experts(model, config, MXFP4)
    shape = same(write_folder(tmp_path / kind, model, config))
    experts = [layer for layer in shape.blocks[0].layers if layer.experts > 1]
    assert {layer.experts for layer in experts} == {4}
    assert {layer.active for layer in experts} == {2}
    assert {layer.packed for layer in experts} == {packed}
    assert shape.blocks[0].window == config.get("sliding_window")


def test_a_packed_model_whose_layers_are_all_its_own_has_a_shape(tmp_path):
    """No layer of it has two ways to multiply, so none can be forced."""
    shape = outlined_shape(outline_of(str(write_architecture(tmp_path / "p", "prism_hadamard_qwen35"))), settings_of())
    assert all(block.layers for block in shape.blocks)
    assert shape.trained > 0


def test_gguf_shapes_from_the_header(tmp_path):
    path = tmp_path / "tiny.gguf"
    tokenizer = byte_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    write_tiny_gguf(path, {"model": "gpt2", "pre": "default", "tokens": tokens, "merges": []})
    outline = outline_of(str(path), dtype=mx.float32)
    assert outlined_shape(outline, settings_of()).vocabulary == len(tokens)


@pytest.mark.slow
def test_data_is_measured_for_a_gguf_file_and_for_a_recipe(tmp_path):
    path, data = tmp_path / "tiny.gguf", tmp_path / "texts.jsonl"
    letters = [chr(0x100 + n) for n in range(256) if n not in range(33, 127)]
    tokens = [*map(chr, range(33, 127)), *letters, "te", "<|end|>"]
    write_tiny_gguf(
        path, {"model": "gpt2", "pre": "default", "tokens": tokens, "merges": ["t e"], "eos_token_id": len(tokens) - 1}
    )
    data.write_text("".join(json.dumps({"text": f"text {n}, and so on"}) + "\n" for n in range(30)))
    plan = planned("--model", path, "--data", data)
    assert plan["data"]["rows"] > 0
    assert plan["steps"] > 0
    assert is_local("bard")
    assert not is_local("no-such-recipe")


@pytest.mark.slow
def test_a_real_gguf_outlines_to_the_byte():
    path = smollm2_gguf()
    loaded, base_bytes, _ = loaded_shape(path, 8)
    outlined = outlined_shape(outline_of(str(path), dtype=device.compute_dtype()), settings_of(rank=8))
    assert outlined == loaded
    assert outlined.base_bytes == base_bytes


def test_a_sliding_window_and_further_norms_are_read():
    config = {
        **TINY, "model_type": "gemma3_text", "num_hidden_layers": 6, "head_dim": 16, "sliding_window": 64,
        "sliding_window_pattern": 6, "query_pre_attn_scalar": 16, "rope_local_base_freq": 1e4, "hidden_size": 64,
    }  # fmt: skip
    block = outlined_shape(outline_of_config(config, mx.float32), settings_of()).blocks[0]
    assert (block.window, block.gated, block.head_width) == (64, "other", 16)
    assert block.norms.count(64) == 4
    assert block.norms.count(16) == 2


def test_what_a_method_keeps_beside_its_factors_counts():
    def shape(**flags: object) -> ModelShape:
        return outlined_shape(outline_of_config(TINY, mx.float32), settings_of(**flags))

    lora = shape()
    assert shape(method="pissa").frozen_adapter_bytes == 4 * lora.trained
    assert shape(method="relora").frozen_adapter_bytes == 12 * lora.trained
    assert shape(method="adalora").trained > 1.4 * lora.trained  # half as much rank again, and gains
    assert shape(num_layers=1).first_trained == 1
    assert shape(target_modules="all-linear,embed_tokens", num_layers=1).first_trained == 0
    assert shape(target_modules="all-linear,embed_tokens").plain_loss
    assert shape(method="full").trained > 2 * lora.trained


def test_the_text_has_words_for_every_moment_and_sums_that_are_right(tiny_folder, plan):
    ran, facts = run("plan", "--model", tiny_folder), plan
    assert facts["phases"].keys() == PHASE_WORDS.keys() - {"rollout", "teacher"}  # of other runs
    lines = ran.out.splitlines()
    moment = next(place for place, line in enumerate(lines) if line.startswith("The most memory is in use "))
    assert PHASE_WORDS[facts["phase"]] in lines[moment]
    listed = lines[moment + 1 : moment + 1 + len(facts["parts"]) + 3]
    assert [line.split("  ")[-1] for line in listed[:-3]] == [PART_WORDS[name] for name in facts["parts"]]
    assert [line.split("  ")[-1] for line in listed[-3:]] == [
        "= peak, which a run reports", "buffers that MLX keeps for reuse, at most", "= needed",
    ]  # fmt: skip
    assert facts["needed_bytes"] == facts["peak_bytes"] + facts["cache_bytes"]


@pytest.mark.long
@pytest.mark.cpu("a GPU computes exponentials as fast as it reads numbers, and has no fast form of them")
def test_fast_exponentials_count_only_where_a_run_may_use_them(tiny_folder, monkeypatch, own_cache):
    """Without the rates of an earlier plan, which are kept for a day."""
    measured = []
    monkeypatch.setattr(ceilings, "measure_ceilings", MEASURE)
    monkeypatch.setattr(ceilings, "_best_s", lambda make, rounds, clock: 1e-3)
    monkeypatch.setattr(ceilings, "_exponentials_per_s", lambda power, *_: measured.append(power) or 1e8)
    monkeypatch.setattr(exponentials, "usable", lambda array: True)
    for kernels in ("auto", "ours", "mlx"):
        planned("--model", tiny_folder, "--kernels", kernels)
    assert measured == [exponentials.exp_minus, mx.exp]  # once for each, whoever asks


@pytest.mark.slow
def test_another_mac_and_all_of_them(big):
    small, large = (planned("--model", big, "--chip", "M2", "--memory-gb", size) for size in (16, 24))
    assert not small["fits"]
    assert small["machine"]["memory_bytes"] == 16 << 30
    assert small["predicted"]["ceilings"] == "listed"
    assert large["budget_bytes"] > small["budget_bytes"]
    assert "--bits 4" in small["advice"]
    ran = run("plan", "--model", big, "--all-chips")
    rows = [line for line in ran.out.splitlines() if line.startswith("| M")]
    assert len(rows) == sum(len(chip.memory_gib) for chip in CHIPS)
    assert "does not fit" in rows[0]
    assert "predicted" in ran.out.splitlines()[0]
    table = planned("--model", big, "--all-chips")["chips"]
    ordered = sorted(table, key=lambda row: row["budget_bytes"])
    assert [row["fits"] for row in ordered] == sorted(row["fits"] for row in ordered)
    lengths = [row["largest_sequence"] for row in ordered]
    assert lengths == sorted(lengths)


@pytest.mark.long
@pytest.mark.parametrize(
    "flags", by_default([{}, {"offload_base": "on"}, {"dtype": "float32"}], {"offload_base": "on"})
)
def test_a_row_of_all_chips_is_the_plan_of_that_mac(flags, tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA_8B, "quantization": {"group_size": 64, "bits": 4}}))
    monkeypatch.setattr(plan_api, "CHIPS", [replace(find_chip("M2"), memory_gib=(8, 24))])
    for name in ("largest_sequence", "largest_batch_size"):  # many graphs of long rows
        monkeypatch.setattr(plan_api, name, lambda *_: 0)
    settings = train_settings({"model": str(path), "max_seq_length": 96, **flags})
    rows = plan_api.plan_run(settings, all_chips=True)["chips"]
    assert [row["reading"] is not None for row in rows] == [True, "offload_base" in flags]
    for row in rows:
        alone = plan_api.plan_run(settings, row["chip"], row["memory_bytes"] >> 30)
        assert [row[name] for name in ("fits", "peak_bytes", "budget_bytes")] == [
            alone[name] for name in ("fits", "peak_bytes", "budget_bytes")
        ]
        assert row["reading"] == alone["predicted"]["reading"]
        assert row["tokens_per_s"] == alone["predicted"]["tokens_per_s"]
        assert row["grad_checkpoint"] == alone["settings"]["grad_checkpoint"]


@pytest.mark.slow
def test_a_step_from_files_counts_copies_and_planning(tiny_4bit_folder):
    here, memory = (planned("--model", tiny_4bit_folder, "--offload-base", way)["predicted"] for way in ("on", "off"))
    assert here["reading"]["disk_source"] == "measured here"
    assert here["reading"]["copied_bytes_per_s"] > 0
    added = {"waiting for the disk", "copying weights", "planning blocks"}
    assert here["parts_s"].keys() - memory["parts_s"].keys() == added
    assert here["step_s"] == pytest.approx(sum(here["parts_s"].values()))
    assert min(here["parts_s"][name] for name in added - {"waiting for the disk"}) > 0
    mac = planned("--model", tiny_4bit_folder, "--offload-base", "on", "--chip", "M2")["predicted"]["reading"]
    assert mac["disk_source"] == "assumed"


@pytest.mark.slow
def test_all_experts_of_a_mixture_are_read(tmp_path):
    outline = outline_of_config(CONFIGS["gpt_oss"], mx.bfloat16)
    stored = [sum(p.nbytes for _, p in tree_flatten(block.parameters())) for block in outline.model.layers]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["gpt_oss"]))
    reading = planned("--model", path, "--offload-base", "on", "--chip", "M2")["predicted"]["reading"]
    assert reading["bytes"] == sum(stored[1:]) + sum(stored[:-1])


def test_an_outline_is_adapted_once():
    outline = outline_of_config(TINY, mx.float32)
    outlined_shape(outline, settings_of())
    with pytest.raises(ValueError, match="of its own"):
        outlined_shape(outline, settings_of())


@pytest.mark.long
def test_longest_row_and_most_rows_fit_and_no_more(big):
    settings, machine = settings_of(), CHIPS[0].machine(16)
    shape = outlined_shape(outline_of_config({**LLAMA_8B, "num_hidden_layers": 8}, mx.bfloat16), settings)
    longest = largest_sequence(settings, shape, machine, "block")
    rows = largest_batch_size(settings, shape, machine, "block", 512)
    for flags, width, fits in (
        ({"batch_size": 1}, longest, True),
        ({"batch_size": 1}, longest + 64, False),
        ({"batch_size": rows}, 512, True),
        ({"batch_size": rows + 1}, 512, False),
    ):
        chosen = settings_of(**flags, grad_checkpoint="block")
        assert fit(chosen, shape, machine, width).memory.fits is fits
    assert largest_that_fits(lambda n: n <= 1000, 5000, 32) == 992
    assert largest_that_fits(lambda n: False, 5000) == 0


def test_the_fastest_that_fits_is_chosen(big):
    settings, shape = settings_of(), outlined_shape(outline_of_config(LLAMA_8B, mx.bfloat16), settings_of())
    chosen = [fit(settings, shape, CHIPS[2].machine(size), 512) for size in (24, 28, 32, 64, 128)]
    order = [("none", "selective", "block").index(found.checkpointing) for found in chosen]
    assert order == sorted(order, reverse=True)
    assert order[0] > order[-1]
    assert chosen[-1].batch_tokens == 2048
    own = settings_of(grad_checkpoint="3", batch_tokens=64)
    assert (fit(own, shape, CHIPS[0].machine(8), 512).checkpointing, 64) == ("3", 64)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--chip", "M9"), "not a known chip"),
        pytest.param(("--memory-gb", 16), "--chip", marks=pytest.mark.cpu("a Mac's chip is in the table")),
        (("--rank", 0), "--rank"),
        (("--target-modules", "nothing"), "matches no layer"),
        (("--memory-budget", 0), "--memory-budget"),
    ],
)
def test_bad_flags_are_one_line(flags, words, tiny_folder):
    one_line(run("plan", "--model", tiny_folder, *flags), words)


def test_a_plan_needs_a_model():
    one_line(run("plan"), "--model")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "nothing"}', '{"model_type": "llama"}'])
def test_a_config_that_is_none_is_one_line(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    one_line(run("plan", "--model", path))


def test_hours_follow_iters_and_a_data_file(tiny_folder, chats, plan):
    iters = [planned("--model", tiny_folder, "--iters", n)["predicted"] for n in (10, 1000)]
    assert all(p["hours"] == pytest.approx(n * p["step_s"] / 3600) for p, n in zip(iters, (10, 1000), strict=True))
    assert planned("--model", tiny_folder, "--data", chats)["predicted"]["hours"] > 0
    assert plan["predicted"]["hours"] is None


def test_the_rows_of_the_data_are_planned_and_no_more(tiny_folder, tmp_path):
    """Five short rows are one small batch, whatever --max-seq-length allows."""
    data = tmp_path / "five.jsonl"
    rows = [{"instruction": f"Say {n}.", "output": "abc" * n} for n in range(1, 6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    without = planned("--model", tiny_folder, "--max-seq-length", 512)
    found = planned(
        "--model", tiny_folder, "--max-seq-length", 512, "--data", data, "--valid-fraction", 0, "--batch-tokens", 2048
    )
    assert found["data"]["rows"] == found["settings"]["rows"] == 5
    assert found["settings"]["max_seq_length"] == found["data"]["longest"] < 100
    assert found["data"]["tokens"] <= 5 * found["data"]["longest"]
    assert found["peak_bytes"] < 0.5 * without["peak_bytes"]
    assert without["data"] is None
    # `train` plans the same, and chooses no checkpointing where the rows fit without.
    budget = 0.6 * without["peak_bytes"] / 1e9
    succeeds(
        "train", "--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / "a", "--iters", 1,
        "--max-seq-length", 512, "--valid-fraction", 0, "--memory-budget", budget,
    )  # fmt: skip
    settings = yaml.safe_load((tmp_path / "a" / "run.yaml").read_text())
    assert settings["grad_checkpoint"] == "none"


def test_a_predicted_time_is_written_as_people_do():
    hours = {1 / 3600: "1 second", 0.001: "4 seconds", 0.04: "2.4 minutes", 0.5: "30 minutes", 1.25: "75 minutes"}
    hours |= {2.04: "2.0 hours", 1234.0: "1,234 hours"}
    assert {value: time_words(value) for value in hours} == hours


def train(folder: Path, chats: Path, out: Path, *more: object):
    return run("train", "--model", folder, "--data", chats, "--adapter-path", out, *SHORT, *more)


@pytest.mark.long
def test_train_refuses_what_cannot_fit_and_says_what_would(tiny_folder, chats, tmp_path):
    ran = train(tiny_folder, chats, tmp_path / "a", "--memory-budget", 1e-4)
    assert ran.code == 2
    assert "do not fit" in ran.lines[-1]
    assert not (tmp_path / "a" / "adapters.safetensors").exists()
    need = planned("--model", tiny_folder, "--max-seq-length", 96, "--batch-size", 40)
    between = need["peak_bytes"] * 0.35 / 1e9
    ran = train(
        tiny_folder, chats, tmp_path / "a", "--memory-budget", between, "--batch-size", 40, "--grad-checkpoint", "none"
    )
    assert ran.code == 2
    assert "--grad-checkpoint" in ran.lines[-1]
    assert "--no-memory-check" in ran.lines[-1]
    forced = train(
        tiny_folder, chats, tmp_path / "b", "--memory-budget", between, "--batch-size", 40, "--grad-checkpoint", "none",
        "--no-memory-check",
    )  # fmt: skip
    assert forced.code == 0, forced.err


@pytest.mark.long
@pytest.mark.cpu("in 16 bits, the tiny model's smallest batch needs more than four fifths of its default one")
def test_train_takes_its_defaults_from_the_plan(tiny_folder, chats, tmp_path):
    def chosen(name: str, *more: object) -> tuple:
        ran = train(tiny_folder, chats, tmp_path / name, *more)
        assert ran.code == 0, ran.err
        settings = yaml.safe_load((tmp_path / name / "run.yaml").read_text())
        return settings["batch_tokens"], settings["grad_checkpoint"]

    free = chosen("free")
    none = planned("--model", tiny_folder, "--data", chats, "--max-seq-length", 96, "--iters", 12)
    assert free == (none["settings"]["batch_tokens"], "none")
    tight = chosen("tight", "--memory-budget", none["peak_bytes"] * 0.8 / 1e9)
    assert tight != free
    assert chosen("own", "--batch-tokens", 128, "--grad-checkpoint", "block") == (128, "block")


@pytest.mark.long
def test_hub_ids_are_planned_without_their_weights(tmp_path):
    folder = tmp_path / "model"
    write_folder(folder, tiny_model())
    with hub_server() as server:
        server.folders["org/tiny"] = folder
        done = run_with_hub(
            tmp_path / "home", server.endpoint, ["-m", "mlx_lora", "plan", "--model", "org/tiny", "--json"]
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"]
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.slow
def test_a_gguf_file_of_the_hub_is_planned_once_it_is_here(tmp_path):
    with hub_server() as server:
        picked = run_with_hub(
            tmp_path / "home", server.endpoint, ["-m", "mlx_lora", "plan", "--model", "org/ggufs:Q8_0"]
        )
    assert picked.returncode == 2
    assert "download it" in picked.stderr


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Twelve pairs of about the same length."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"Say the number {n:02}, please.", "chosen": f"It is {n:02}.", "rejected": f"No {n:02}!"}
        for n in range(12)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.long
def test_an_objectives_rows_and_its_reference_are_planned(tiny_folder, pairs):
    flags = ("--model", tiny_folder, "--data", pairs, "--valid-fraction", 0.25, "--batch-size", 8, "--chip", "M2")
    apart = ("--shared-prefix", "off")
    dpo, orpo = (planned(*flags, "--objective", name, *apart) for name in ("dpo", "orpo"))
    kto = planned(*flags, "--objective", "kto")
    # A pair has two rows and both are trained; of a rated answer and the one beside it, only the first.
    assert [plan["settings"]["rows"] for plan in (dpo, orpo, kto)] == [16, 16, 8]
    assert (dpo["data"]["rows"], kto["data"]["rows"]) == (18, 36)
    of_rows = [
        plan["phases"]["backward"] - sum(plan["parts"][part] for part in ("base", "adapter", "optimizer"))
        for plan in (kto, dpo)
    ]
    assert of_rows[0] == pytest.approx(of_rows[1] / 2, rel=0.1)
    assert "other answers" in kto["predicted"]["parts_s"]
    assert "other answers" not in dpo["predicted"]["parts_s"]
    # ORPO trains the chosen rows whole, and has no reference; the others measure one once, on held-out answers too.
    assert orpo["data"]["supervised_tokens"] > dpo["data"]["supervised_tokens"]
    assert orpo["predicted"]["reference_s"] is None
    for plan in (dpo, kto):
        assert plan["data"]["measured_tokens"] > plan["data"]["tokens"]
        assert 0 < plan["predicted"]["reference_s"] < 3600 * plan["predicted"]["hours"]
    # No second model: a pair takes no more than ORPO's, which has no reference but trains more positions.
    assert dpo["parts"]["base"] == orpo["parts"]["base"]
    assert dpo["peak_bytes"] < orpo["peak_bytes"]
    # A prompt that is computed once: a row per pair, fewer tokens, the same trained ones.
    shared = planned(*flags, "--objective", "dpo")
    assert shared["settings"]["rows"] == 8
    assert shared["data"]["rows"] == 9
    assert shared["data"]["tokens"] < 0.8 * dpo["data"]["tokens"]
    assert shared["data"]["measured_tokens"] < 0.8 * dpo["data"]["measured_tokens"]
    assert shared["data"]["supervised_tokens"] == dpo["data"]["supervised_tokens"]
    assert shared["peak_bytes"] < 0.9 * dpo["peak_bytes"]


@pytest.mark.long
def test_a_plan_for_an_objective_says_what_it_assumes(tiny_folder, pairs):
    flags = ("--model", tiny_folder, "--objective", "dpo", "--chip", "M2")
    alone = run("plan", *flags).out
    known = run("plan", *flags, "--data", pairs, "--valid-fraction", 0).out
    assert "each prompt with an answer counts as --max-seq-length tokens" in alone
    assert "--max-seq-length tokens" not in known
    assert "12 pairs in 12 rows" in known
    assert "one row for a pair, with the prompt once" in known
    assert (
        "12 pairs in 24 rows"
        in run("plan", *flags, "--data", pairs, "--valid-fraction", 0, "--shared-prefix", "off").out
    )
    assert "did you mean 'dpo'?" in run("plan", "--model", tiny_folder, "--objective", "dop").err


def test_pairs_stay_whole_in_the_largest_batch_and_its_parts():
    width, dpo, sft = 100, settings_of(objective="dpo"), settings_of()
    assert largest_batch(width, dpo, 1024) == (10, width)
    assert largest_batch(width, sft, 1024) == (10, width)
    assert largest_batch(600, dpo, 1024) == (2, 600)  # one pair, whatever the budget is
    assert largest_batch(width, settings_of(objective="kto"), 1024) == (5, width)
    assert largest_batch(width, dpo, 1024, most_rows=6) == (6, width)
    cut = settings_of(objective="dpo", batch_parts=4), settings_of(batch_parts=4)
    assert [run_of(settings, 10, width, "none").rows for settings in cut] == [4, 3]


def test_the_reference_is_measured_in_batches_that_fit(tiny_folder, pairs, tmp_path, monkeypatch, own_cache):
    """Its batches are as large as the step's, so its forward pass has a lower peak."""
    found, fit_settings = [], composition.fit_settings

    def narrow(*given):
        settings, memory = fit_settings(*given)
        return replace(settings, loop=replace(settings.loop, batch_tokens=256)), memory

    def measured(*given, **named):
        found.append(given[3])
        return row_log_probabilities(*given, **named)

    monkeypatch.setattr(composition, "fit_settings", narrow)
    monkeypatch.setattr(reference, "row_log_probabilities", measured)
    succeeds(
        "train", "--model", tiny_folder, "--data", pairs, "--objective", "dpo", "--adapter-path", tmp_path / "a",
        "--iters", 1, "--sample-tokens", 0, "--val-batches", 0,
    )  # fmt: skip
    assert set(found) == {256}


# How long a run takes: the same by --epochs and by --iters, and by the batches that the data really has

BATCH = ("--batch-size", 4, "--valid-fraction", 0, "--max-seq-length", 512)


@pytest.fixture(scope="module")
def unlike(tmp_path_factory) -> Path:
    """Forty short rows and a long one."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"instruction": f"Say {n}.", "output": "abc" * (400 if n == 7 else 2)} for n in range(41)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("more", [(), ("--grad-accumulation-steps", 2), ("--num-layers", 1)])
def test_epochs_and_as_many_iters_have_the_same_plan(tiny_folder, unlike, more):
    by_epochs = planned("--model", tiny_folder, "--data", unlike, *BATCH, "--epochs", 6, *more)
    by_iters = planned("--model", tiny_folder, "--data", unlike, *BATCH, "--iters", by_epochs["steps"], *more)
    assert by_iters["predicted"]["hours"] == pytest.approx(by_epochs["predicted"]["hours"], rel=0.05)
    assert (by_iters["trunk"] is None) == (more != ("--num-layers", 1))
    if by_iters["trunk"]:
        assert by_iters["trunk"]["kept"] == by_epochs["trunk"]["kept"]
        assert by_iters["trunk"]["saved_s"] == pytest.approx(by_epochs["trunk"]["saved_s"], rel=0.05)
    twice = planned("--model", tiny_folder, "--data", unlike, *BATCH, "--iters", 2 * by_epochs["steps"], *more)[
        "predicted"
    ]["hours"]
    assert twice > 1.5 * by_iters["predicted"]["hours"]
    # Not as long as if each batch had the longest row.
    full = by_epochs["steps"] * by_epochs["predicted"]["step_s"] / 3600
    assert by_iters["predicted"]["hours"] < 0.7 * full


def test_the_flag_that_decides_the_batch_is_named(tiny_folder, unlike):
    said = run("plan", "--model", tiny_folder, "--data", unlike, *BATCH, "--iters", 4).out
    assert "--batch-size 4 (" in said
    assert "--batch-tokens" not in next(line for line in said.splitlines() if line.startswith("Chosen"))
    said = run("plan", "--model", tiny_folder, "--data", unlike, "--batch-tokens", 64, "--iters", 4).out
    assert "--batch-tokens 64 (" in said
