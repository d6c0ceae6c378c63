"""Layers that ranks have parts of: the losses, gradients and adapters of a single process, from a part of its memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from architectures.build import tiny_config, write_architecture
from comparing import by_dtype
from conftest import TINY, quantized, tiny_model, write_folder
from rank_runs import assert_same_run, command, weights
from ranks import Started, in_one_session
from run_cli import run
from tiny_moe import tiny_moe, with_quantized_experts

from mlx_lora.planner.several_macs import ARCHITECTURES, cut_problem

SCRIPT = Path(__file__).parents[1] / "cut_rank.py"
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
    assert loaded["part"] < by_dtype(0.6, 0.7) * loaded["whole"]  # the adapter, which is float32, is not in the whole
    # A whole array and this rank's part of it; and where they are cast to bfloat16, the array as it is stored.
    few_small_arrays = 1 << 14
    assert loaded["peak"] <= loaded["part"] + by_dtype(2, 4) * loaded["largest"] + few_small_arrays


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


KINDS = [("llama", "float"), ("llama", "4-bit"), ("qwen3", "float"), ("gpt_oss", "float"), ("gpt_oss", "4-bit")]
TENSOR = ("--parallel", "tensor")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_with_parts_of_layers_take_the_steps_of_one(ranks, chats, tmp_path):
    kinds = KINDS if ranks == 2 else KINDS[:3]  # tiny GPT-OSS has two key-value heads
    commands = {}
    for kind, bits in kinds:
        model, name = model_folder(kind, bits, tmp_path / f"{kind}-{bits}"), f"{kind}-{bits}-alone"
        assert run("train", *command(model, chats, tmp_path / name)).code == 0
        commands[name] = command(model, chats, tmp_path / f"{name}-cut", *TENSOR)
    printed = in_one_session([*commands.values()], ranks, tmp_path / "session")
    for name in commands:
        # Where a gradient is near zero, Adam makes its rounding a step: of 8 steps of up to 5e-3.
        assert_same_run(tmp_path / name, tmp_path / f"{name}-cut", atol=1e-4)
    assert printed.count(f"layers cut among {ranks} processes") == len(kinds)


@pytest.mark.slow
def test_methods_and_objectives_of_whole_factors(tiny_folder, chats, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {n}.", "chosen": "abc" * (1 + n % 3), "rejected": "xyz" * (1 + n % 2)} for n in range(24)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {
        "adalora": (chats, "--method", "adalora"),
        "relora": (chats, "--method", "relora", "--relora-every", 3),
        "rslora": (chats, "--method", "rslora", "--optimizer", "muon"),
        "orpo": (pairs, "--objective", "orpo"),
        "accumulated": (chats, "--grad-accumulation-steps", 2, "--num-layers", 1),
    }
    for name, (data, *extra) in asked.items():
        assert run("train", *command(tiny_folder, data, tmp_path / name, *extra)).code == 0
    runs = [
        command(tiny_folder, data, tmp_path / f"{name}-cut", *extra, *TENSOR) for name, (data, *extra) in asked.items()
    ]
    in_one_session(runs, 2, tmp_path / "session")
    for name in asked:
        # After a restart of ReLoRA, Adam makes the rounding of near-zero gradients a step, as above.
        assert_same_run(tmp_path / name, tmp_path / f"{name}-cut", atol=1e-4 if name == "relora" else 1e-5)


@pytest.mark.slow
def test_resumed_with_as_many_ranks_it_is_the_same_run_and_else_by_rounding(tiny_folder, chats, tmp_path):
    dropped = (*TENSOR, "--dropout", 0.1, "--grad-checkpoint", "selective")
    kept, dropped_kept = (tmp_path / name / "checkpoints" / "step-000003" for name in ("plain", "dropped"))
    runs = [
        command(tiny_folder, chats, tmp_path / "dropped", *dropped),
        command(tiny_folder, chats, tmp_path / "dropped-again", *dropped, "--resume", dropped_kept),
        command(tiny_folder, chats, tmp_path / "plain", *TENSOR),
        command(tiny_folder, chats, tmp_path / "data", "--resume", kept),
        command(tiny_folder, chats, tmp_path / "auto", "--parallel", "auto"),
        command(tiny_folder, chats, tmp_path / "auto-pissa", "--parallel", "auto", "--method", "pissa"),
    ]
    printed = in_one_session(runs, 2, tmp_path / "session")
    assert weights(tmp_path / "dropped-again") == weights(tmp_path / "dropped")
    assert_same_run(tmp_path / "plain", tmp_path / "data", since=3)
    assert run("train", *command(tiny_folder, chats, tmp_path / "one", "--resume", kept)).code == 0
    assert_same_run(tmp_path / "plain", tmp_path / "one", since=3)
    assert "Parallel: data" in printed
    assert "tensor not possible (--method pissa" in printed
    assert run("train", *command(tiny_folder, chats, tmp_path / "alone", "--parallel", "auto")).code == 0


def test_what_cannot_be_cut_is_refused(tiny_folder, chats, tmp_path):
    asked = command(tiny_folder, chats, tmp_path / "a", "--parallel", "tensor")
    assert "this run is a single process" in run("train", *asked).err
    assert "only training cuts a base" in run("train", *asked, "--test").err
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
        == "the model has 9 attention heads and 3 key-value heads, which cannot be divided by 2"
    )
    assert cut_problem("llama", smollm2, 3) is None
    assert "gemma3 is not one of the architectures that are cut (deepseek_v2, " in (
        cut_problem("gemma3", TINY, 2) or ""
    )
