"""Layers that ranks have parts of: the losses, gradients and adapters of a single process, from a part of its memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from architectures.build import tiny_config, write_architecture
from conftest import TINY, quantized, tiny_model, write_folder
from rank_runs import assert_same_run, command, train, weights
from ranks import Started
from run_cli import run
from tiny_moe import tiny_moe, with_quantized_experts

from mlx_lora.planner.tensor_plan import ARCHITECTURES, cut_problem

SCRIPT = Path(__file__).with_name("cut_rank.py")
# Widths that four ranks divide into whole groups of 32 quantized weights.
WIDE = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4}
FOUR_BITS = {"quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}
ALL_LAYERS = "lm_head,embed_tokens,*_proj"


def compared(cases: list[dict], ranks: int, folder: Path) -> list[dict]:
    """Return how far the ranks are from one process in each case."""
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    ended = Started([[SCRIPT, folder / "cases.json"]] * ranks, folder / "ranks").wait()
    assert ended.codes == [0] * ranks, ended.errs
    return [json.loads(line) for line in ended.errs[0].splitlines() if line.startswith("{")]


def assert_close(found: list[dict]) -> None:
    for case in found:
        assert case["loss"] < 1e-5, case
        assert case["gradient"] < 2e-5, case
        assert case["alive"] == 1, case


def test_parts_have_the_gradients_of_the_whole(tmp_path):
    deep = {**WIDE, "num_hidden_layers": 8}
    cases = [
        {"model": "llama", "quantize": 4, "mode": "selective", "targets": ALL_LAYERS, "config": WIDE, "dropout": 0.1},
        {"model": "gpt_oss", "quantize": "mxfp4", "mode": "block", "config": {"intermediate_size": 64}, "dropout": 0.1},
        {"load": str(write_folder(tmp_path / "deep", tiny_model(**deep), deep))},
        {"model": "llama", "targets": ALL_LAYERS, "without": "counting"},
        {"model": "llama", "without": "entry"},
    ]
    *right, loaded, counted_twice, not_added = compared(cases, 2, tmp_path)
    assert_close(right)
    assert counted_twice["gradient"] > 0.5
    assert not_added["gradient"] > 0.01
    assert loaded["part"] < 0.6 * loaded["whole"]
    assert loaded["peak"] <= loaded["part"] + 2 * loaded["largest"]  # a whole array, and this rank's part of it


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_architecture_that_is_cut(ranks, tmp_path):
    modes = ("none", "block", "selective")
    cases = [{"model": name, "mode": modes[number % 3]} for number, name in enumerate(ARCHITECTURES)]
    for case in cases if ranks == 4 else ():
        config = tiny_config(case["model"])
        case["config"] = {name: 4 for name in ("num_key_value_heads", "num_attention_groups") if name in config}
        if "attention_other_setting" in config:
            case["config"]["attention_other_setting"] = {**config["attention_other_setting"], "num_attention_groups": 4}
    assert_close(compared(cases, ranks, tmp_path))


def cut(model, data, folder: Path, ranks: int, *extra) -> tuple[Path, str]:
    words = train(*command(model, data, folder / "a", *extra))
    ended = Started([words] * ranks, folder / "ranks").wait()
    assert ended.codes == [0] * ranks, ended.errs
    return folder / "a", ended.errs[0]


def model_folder(kind: str, bits: str, folder: Path) -> Path:
    if kind == "gpt_oss":
        model, config = tiny_moe("gpt_oss")
        if bits == "4-bit":
            model, config = with_quantized_experts(model, config)
        return write_folder(folder, model, config)
    if kind == "qwen3":
        return write_architecture(folder, "qwen3", config={**tiny_config("qwen3"), **WIDE})
    model = tiny_model(**WIDE)
    return write_folder(
        folder, quantized(model) if bits == "4-bit" else model, {**WIDE, **(FOUR_BITS if bits == "4-bit" else {})}
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "bits", "ranks"),
    [("llama", "float", 2), ("llama", "4-bit", 2), ("llama", "4-bit", 4), ("qwen3", "float", 4), ("gpt_oss", "float", 2),
     ("gpt_oss", "4-bit", 2)],
)  # fmt: skip
def test_ranks_with_parts_of_layers_take_the_steps_of_one(kind, bits, ranks, chats, tmp_path):
    model = model_folder(kind, bits, tmp_path / "model")
    assert run("train", *command(model, chats, tmp_path / "alone")).code == 0
    folder, printed = cut(model, chats, tmp_path / "cut", ranks, "--parallel", "tensor")
    assert_same_run(tmp_path / "alone", folder)
    assert f"layers cut among {ranks} processes" in printed


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adalora", "relora", "rslora"])
def test_methods_of_whole_factors(method, tiny_folder, chats, tmp_path):
    extra = ("--method", method, *(("--relora-every", 3) if method == "relora" else ()))
    assert run("train", *command(tiny_folder, chats, tmp_path / "alone", *extra)).code == 0
    assert_same_run(tmp_path / "alone", cut(tiny_folder, chats, tmp_path, 2, "--parallel", "tensor", *extra)[0])


@pytest.mark.slow
def test_resumed_with_as_many_ranks_it_is_the_same_run_and_else_by_rounding(tiny_folder, chats, tmp_path):
    tensor = ("--parallel", "tensor", "--dropout", 0.1, "--grad-checkpoint", "selective")
    whole = cut(tiny_folder, chats, tmp_path / "whole", 2, *tensor)[0]
    kept = whole / "checkpoints" / "step-000003"
    again = cut(tiny_folder, chats, tmp_path / "again", 2, *tensor, "--resume", kept)[0]
    assert weights(again) == weights(whole)
    plain = cut(tiny_folder, chats, tmp_path / "plain", 2, "--parallel", "tensor")[0]
    kept = plain / "checkpoints" / "step-000003"
    assert run("train", *command(tiny_folder, chats, tmp_path / "one", "--resume", kept)).code == 0
    assert_same_run(plain, tmp_path / "one", since=3)
    assert_same_run(plain, cut(tiny_folder, chats, tmp_path / "data", 2, "--resume", kept)[0], since=3)


@pytest.mark.slow
def test_auto_measures_the_link_and_takes_what_fits(tiny_folder, chats, tmp_path):
    printed = cut(tiny_folder, chats, tmp_path / "free", 2, "--parallel", "auto")[1]
    assert "Parallel: data with a whole base, by the measured link (" in printed
    printed = cut(tiny_folder, chats, tmp_path / "pissa", 2, "--parallel", "auto", "--method", "pissa")[1]
    assert "tensor not possible (--method pissa" in printed
    assert run("train", *command(tiny_folder, chats, tmp_path / "one", "--parallel", "auto")).code == 0


def test_what_cannot_be_cut_is_refused(tiny_folder, chats, tmp_path):
    asked = command(tiny_folder, chats, tmp_path / "a", "--parallel", "tensor")
    assert "there is one process" in run("train", *asked).err
    assert "only training cuts a base" in run("train", *asked, "--no-train", "--test").err
    for extra, words in (
        (("--method", "dora"), "it needs or changes whole weights"),
        (("--objective", "dpo"), "needs the whole base"),
        (("--bias", "all"), "biases are cut"),
        (("--shard-base", "even"), "it decides what each process has"),
    ):
        ran = run("train", *asked, *extra)
        assert ran.code == 2
        assert words in ran.err


def test_heads_that_ranks_do_not_divide_are_told():
    smollm2 = {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    assert (
        cut_problem("llama", smollm2, 2)
        == "the model has 9 attention heads and 3 key-value heads, which 2 do not divide"
    )
    assert cut_problem("llama", smollm2, 3) is None
    assert "gemma3 is not one of the architectures that are cut (deepseek_v2, " in (
        cut_problem("gemma3", TINY, 2) or ""
    )
