"""--bits: a 16-bit base is quantized once, into the cache, and used like the folder that `convert --bits` writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import mlx.core as mx
import pytest
from conftest import tiny_model, write_folder
from mlx.utils import tree_flatten
from rank_runs import assert_same_run, command, train, weights
from ranks import Started, rank_environment
from real_models import smollm2_gguf
from run_cli import one_line, run, succeeds

from mlx_lora.config.settings import ModelSettings
from mlx_lora.models.load import load_base
from mlx_lora.models.meta import outline_for

SHORT = ("--iters", 3, "--batch-tokens", 240, "--rank", 4, "--val-batches", 2, "--sample-tokens", 0)


@pytest.fixture(scope="module")
def converted(tiny_folder, tmp_path_factory):
    """The folder that `convert` writes."""
    folder = tmp_path_factory.mktemp("converted") / "4bit"
    assert run("convert", "--model", tiny_folder, "--out", folder, "--bits", 4).code == 0
    return folder


@pytest.fixture(scope="module")
def trained(tiny_folder, chats, tmp_path_factory):
    """A run with --bits."""
    folder = tmp_path_factory.mktemp("bits") / "a"
    ran = succeeds("train", "--model", tiny_folder, "--bits", 4, "--data", chats, "--adapter-path", folder, *SHORT)
    assert "4-bit affine (group 64)" in ran.err
    following = ran.lines[ran.lines.index("What to do next:") :]
    told = [line.strip() for line in following if line.strip().startswith("mlx-lora ")]
    assert [line for line in told if f"--model {tiny_folder} --bits 4 " in line] == [told[0], told[1], told[2], told[4]]
    assert told[3].startswith("mlx-lora export")
    return folder


def test_the_adapter_is_that_of_the_converted_model(trained, converted, tiny_folder, chats, tmp_path):
    succeeds("train", "--model", converted, "--data", chats, "--adapter-path", tmp_path / "b", *SHORT)
    assert weights(trained) == weights(tmp_path / "b")
    own = json.loads((trained / "adapter_config.json").read_text())["mlx_lora"]
    assert own["base_model"] == str(tiny_folder)  # not the cache's folder
    assert "bits: 4" in (trained / "run.yaml").read_text()


def test_evaluate_and_generate_have_it_and_need_it_not(trained, converted, tiny_folder, chats):
    words = ("--adapter-path", trained, "--data", chats, "--json")
    losses = [
        json.loads(run("evaluate", "--model", *model, *words).out)["loss"]
        for model in ((converted,), (tiny_folder, "--bits", 4), (tiny_folder,))
    ]
    assert losses[0] == losses[1] != losses[2]
    words = ("--adapter-path", trained, "--prompt", "Say 3. #10", "--max-tokens", 12, "--json")
    texts = [
        json.loads(run("generate", "--model", *model, *words).out)["text"]
        for model in ((converted,), (tiny_folder, "--bits", 4))
    ]
    assert texts[0] == texts[1]
    assert run("generate", "--model", tiny_folder, *words).code == 0


@pytest.mark.slow
def test_a_plan_is_that_of_the_converted_model(converted, tiny_folder):
    words = ("--max-seq-length", 128, "--batch-tokens", 512, "--json")
    plans = [
        json.loads(run("plan", "--model", *model, *words).out)["needed_bytes"]
        for model in ((converted,), (tiny_folder, "--bits", 4), (tiny_folder,))
    ]
    assert plans[0] == plans[1] < plans[2]


@pytest.mark.parametrize("file", [".", "config.json", pytest.param("gguf", marks=pytest.mark.slow)])
def test_the_outline_is_the_loaded_model(file, tiny_folder):
    source = smollm2_gguf() if file == "gguf" else tiny_folder
    outlined = outline_for(ModelSettings(model=str(source / file if file != "gguf" else source), bits=4), mx.float32)
    loaded = load_base(ModelSettings(model=str(source), bits=4, dtype="float32"))
    shapes = [
        {name: (p.shape, p.dtype) for name, p in tree_flatten(one.model.parameters())} for one in (outlined, loaded)
    ]
    assert shapes[0] == shapes[1]
    assert outlined.is_quantized


def test_a_resumed_run_keeps_its_bits(trained, tiny_folder, chats):
    words = ("--model", tiny_folder, "--data", chats, "--adapter-path", trained, "--resume", *SHORT)
    for other in ((), ("--bits", 8)):
        ran = run("train", *words, *other)
        assert ran.code == 2
        assert "bits" in ran.lines[-1]


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (7, "--bits 7: "),
        (9, "must be at least 2 and at most 8"),
        (8, "already quantized (4 bits)"),
    ],
)
@pytest.mark.parametrize("name", ["train", "plan"])
def test_bits_that_cannot_be_had_get_one_line(name, bits, words, tiny_4bit_folder, chats, tmp_path):
    extra = ("--data", chats, "--adapter-path", tmp_path / "a") if name == "train" else ()
    one_line(run(name, "--model", tiny_4bit_folder, "--bits", bits, *extra), words)
    assert not (tmp_path / "a").exists()


def test_a_model_that_has_these_bits_is_used_as_it_is(tiny_4bit_folder):
    assert load_base(ModelSettings(model=str(tiny_4bit_folder), bits=4)).folder == tiny_4bit_folder


def test_a_model_published_in_fp8_is_quantized(tmp_path):
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = write_folder(tmp_path / "m", tiny_model(), {"quantization_config": fp8})
    for wrap in (load_base, lambda asked: outline_for(asked, mx.float32)):
        assert wrap(ModelSettings(model=str(folder), bits=4)).config["quantization"]["bits"] == 4


def test_the_teacher_is_not_quantized(tiny_folder, chats, tmp_path):
    words = ("--objective", "distill", "--teacher", tiny_folder, "--bits", 4, "--data", chats)
    succeeds("train", "--model", tiny_folder, "--adapter-path", tmp_path / "a", *words, *SHORT)
    first = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["val_loss"] > 1e-6  # the student is not its teacher


@pytest.mark.slow
def test_files_of_other_trainers_quantize(tiny_folder, chats, tmp_path):
    file = tmp_path / "axolotl.yml"
    file.write_text(f"base_model: {tiny_folder}\nload_in_4bit: true\nadapter: qlora\nmicro_batch_size: 2\n")
    ran = succeeds("train", "--config", file, "--data", chats, "--adapter-path", tmp_path / "a", "--iters", 1)
    assert "4-bit affine (group 64)" in ran.err


MEASURED = """
import sys
import mlx.core as mx
from pathlib import Path
from mlx_lora.models.convert import folder_of
from mlx_lora.config.settings import ModelSettings
from mlx_lora.utils.hub import resolve_model
folder_of(ModelSettings(model=sys.argv[1], bits=4, dtype="float32"), resolve_model(sys.argv[1]))
print(mx.get_peak_memory())
"""


@pytest.mark.slow
def test_quantizing_takes_the_memory_of_the_result_and_one_tensor(tmp_path):
    """The result: what is written as one file is in memory until then."""
    deep = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 16}
    model = tiny_model(**deep)
    folder = write_folder(tmp_path / "float", model, deep)
    parameters = [p for _, p in tree_flatten(model.parameters())]
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, str(folder)],
        capture_output=True, text=True, env={**rank_environment(), "MLX_LORA_CACHE": str(tmp_path / "cache")}, check=True,
    )  # fmt: skip
    peak, whole = int(ran.stdout.splitlines()[-1]), sum(p.nbytes for p in parameters)
    [made] = (tmp_path / "cache" / "converted").glob("*/model.safetensors")
    assert peak < os.path.getsize(made) + 3 * max(p.nbytes for p in parameters)
    assert peak < 0.5 * whole


@pytest.mark.slow
def test_ranks_share_a_base_that_they_quantize(tiny_folder, chats, tmp_path):
    words = command(tiny_folder, chats, tmp_path / "one", "--bits", 4)
    assert run("train", *words).code == 0
    words = command(tiny_folder, chats, tmp_path / "two", "--bits", 4, "--shard-base", "3:1")
    ended = Started([train(*words)] * 2, tmp_path / "ranks").wait(300)
    assert ended.codes == [0, 0], ended.errs
    assert "4-bit affine" in ended.errs[0]
    assert_same_run(tmp_path / "one", tmp_path / "two")
