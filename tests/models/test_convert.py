"""The convert command and its pipeline: folders that stock mlx-lm loads, all or nothing, one JSON object."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from click.testing import CliRunner, Result
from comparing import by_dtype
from conftest import TINY, tiny_model, write_folder
from gguf import GGMLQuantizationType as Kind
from gguf_cases import IDS, SHARED, write_case
from gguf_cases import tiny_model as any_model
from mlx.utils import tree_flatten
from real_models import gemma3_gguf, smollm2_gguf
from tiny_encoders import tiny_encoder

from mlx_lora.cli.convert import main
from mlx_lora.models import convert as converting
from mlx_lora.models.convert import (
    cached_gguf_folder,
    cached_quantized_folder,
    convert_model,
    copy_side_files,
    copy_tower,
    measure_text_loss,
)
from mlx_lora.models.folder import ShardWriter
from mlx_lora.models.quantize import QuantFormat
from mlx_lora.objectives.embed import stored_choices
from mlx_lora.utils.device import compute_dtype
from mlx_lora.utils.errors import RunError
from mlx_lora.utils.hub import resolve_model


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    write_case("llama untied", tmp_path / "m.gguf", Kind.Q4_1)
    return tmp_path / "m.gguf"


def dtypes(folder: Path) -> set[mx.Dtype]:
    return {a.dtype for a in mx.load(str(folder / "model.safetensors")).values() if mx.issubdtype(a.dtype, mx.floating)}


def test_gguf_default_carries_blocks(gguf_file: Path, tmp_path: Path) -> None:
    result = run("--model", gguf_file, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["lossless"], report["requantized"], report["floats"]) == (23, 0, 7)
    # 4-bit codes, and two scales per group of 32, in the compute dtype
    assert report["bits_per_weight"] == pytest.approx(by_dtype(6, 5), abs=0.5)
    assert "23 carried over" in result.stderr
    # The file's scales are float16, which bfloat16 does not hold: nobody shall read "carried over" as "unchanged".
    assert (report["rounded"], report["dtype"]) == by_dtype((0, "float32"), (23, "bfloat16"))
    for dtype, rounded in (("bfloat16", 23), ("float16", 0)):
        result = run("--model", gguf_file, "--out", tmp_path / dtype, "--dtype", dtype, "--json")
        assert json.loads(result.stdout)["rounded"] == rounded
        assert ("--dtype float32" in result.stderr) is bool(rounded)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    ours = config["mlx_lora"]
    assert ours["source"] == str(gguf_file)
    assert len(ours["sha256"]) == 64
    assert ours["carried"] == {"lossless": 23, "requantized": 0, "float": 7}
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    assert model(IDS).shape == (1, IDS.shape[1], 288)


def test_gguf_no_quantize_and_bits(gguf_file: Path, tmp_path: Path) -> None:
    assert run("--model", gguf_file, "--out", tmp_path / "f", "--no-quantize", "--dtype", "bfloat16").exit_code == 0
    assert dtypes(tmp_path / "f") == {mx.bfloat16}
    assert "quantization" not in json.loads((tmp_path / "f" / "config.json").read_text())
    result = run("--model", gguf_file, "--out", tmp_path / "b", "--bits", 3, "--group-size", 32, "--json")
    report = json.loads(result.stdout)
    assert report["requantized"] == 23
    assert 0 < report["errors"]["Q4_1"]["mean"] <= report["errors"]["Q4_1"]["max"] < 0.3
    assert report["stored"]["Q4_1"] == str(QuantFormat(3, 32))
    assert f"Q4_1 requantized as {QuantFormat(3, 32)}" in result.stderr
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["quantization"]["bits"] == 3
    mlx_lm.load(str(tmp_path / "b"))


def test_mixed_types_get_their_own_entries(tmp_path: Path) -> None:
    import gguf
    from hf_to_gguf import gguf_tensors, write_gguf

    config = {**SHARED, "model_type": "llama"}
    tensors = gguf_tensors(any_model(config), "llama", config)
    path = write_gguf(tmp_path / "m.gguf", tensors, "llama", config, kind=Kind.Q5_0)
    reader = gguf.GGUFReader(path)
    assert {t.tensor_type for t in reader.tensors} == {Kind.Q5_0, Kind.F32}
    convert_model(resolve_model(str(path)), tmp_path / "five")
    assert json.loads((tmp_path / "five" / "config.json").read_text())["quantization"]["bits"] == 5
    entries = converting.quantization_entries(
        {"a": QuantFormat(4, 32), "b": QuantFormat(4, 32), "c": QuantFormat(8, 64)}
    )
    wanted = {"group_size": 32, "bits": 4, "mode": "affine", "c": {"group_size": 64, "bits": 8, "mode": "affine"}}
    assert entries == {"quantization": wanted, "quantization_config": wanted}
    assert converting.quantization_entries({}) == {}


def test_folder_default_is_four_bits(tiny_folder: Path, tmp_path: Path) -> None:
    result = run("--model", tiny_folder, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert sorted(report["skipped"]) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    assert (model.layers[0].self_attn.q_proj.bits, model.layers[0].self_attn.q_proj.group_size) == (4, 64)
    assert tokenizer.decode(tokenizer.encode("abc", add_special_tokens=False)) == "abc"
    assert (tmp_path / "out" / "config.json").stat().st_mode & 0o777 == 0o644


def test_folder_no_quantize_only_changes_the_dtype(tiny_folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_folder, tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert run("--model", source, "--out", tmp_path / "out", "--no-quantize", "--dtype", "float16").exit_code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["torch_dtype"], config["dtype"]) == ("float16", "float16")
    before, after = (mx.load(str(f / "model.safetensors")) for f in (tiny_folder, tmp_path / "out"))
    assert set(before) == set(after)
    for name, array in before.items():
        assert mx.array_equal(array.astype(mx.float16), after[name])


def with_weight(folder: Path, change) -> Path:
    """Change one weight of a folder."""
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.layers.0.mlp.up_proj.weight"] = change(weights["model.layers.0.mlp.up_proj.weight"])
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


@pytest.mark.parametrize("packed", [("--no-quantize",), (), ("--mode", "mxfp4")])
def test_values_that_float16_cannot_hold_and_bytes_of_fp8_are_refused(packed, tmp_path: Path) -> None:
    source = with_weight(write_folder(tmp_path / "m", tiny_model()), lambda weight: weight * (1e5 / weight[0, 0]))
    refused = run("--model", source, "--out", tmp_path / "out", *packed, "--dtype", "float16")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "up_proj.weight" in refused.stderr
    assert "bfloat16" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert run("--model", source, "--out", tmp_path / "out", *packed, "--dtype", "bfloat16").exit_code == 0
    refused = run("--model", with_weight(source, mx.to_fp8), "--out", tmp_path / "fp8", *packed)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "up_proj.weight is uint8" in refused.stderr  # bytes of fp8 are no weights


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_microscaling_modes_load_in_mlx_lm(mode: str, tiny_folder: Path, tmp_path: Path) -> None:
    assert run("--model", tiny_folder, "--out", tmp_path / "out", "--mode", mode).exit_code == 0
    assert mlx_lm.load(str(tmp_path / "out"))[0].layers[0].self_attn.q_proj.mode == mode


def test_quantized_folder_can_be_made_float_and_quantized_anew(tiny_4bit_folder: Path, tmp_path: Path) -> None:
    assert run("--model", tiny_4bit_folder, "--out", tmp_path / "f", "--no-quantize").exit_code == 0
    a, b = (mlx_lm.load(str(folder))[0](IDS) for folder in (tiny_4bit_folder, tmp_path / "f"))
    np.testing.assert_allclose(np.array(a), np.array(b), atol=by_dtype(1e-4, 5e-2))
    assert run("--model", tiny_4bit_folder, "--out", tmp_path / "e", "--bits", 8, "--group-size", 32).exit_code == 0
    assert mlx_lm.load(str(tmp_path / "e"))[0].layers[0].mlp.up_proj.bits == 8
    result = run("--model", tiny_4bit_folder, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "already quantized" in result.stderr  # it needs to be told
    assert not (tmp_path / "out").exists()


def test_sharded_checkpoints_and_shards(tmp_path: Path) -> None:
    model = tiny_model()
    folder = write_folder(tmp_path / "sharded", model)
    weights = dict(tree_flatten(model.parameters()))
    (folder / "model.safetensors").unlink()
    writer = ShardWriter(folder, max_shard_bytes=30_000)
    for name, array in weights.items():
        writer.add({name: array})
    assert writer.close() == sum(array.nbytes for array in weights.values())
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights)
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert run("--model", folder, "--out", tmp_path / "out", "--no-quantize").exit_code == 0
    again = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert all(mx.array_equal(again[name], array.astype(compute_dtype())) for name, array in weights.items())


@pytest.mark.long
def test_report_prints_both_perplexities(gguf_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20)
    carried = run("--model", gguf_file, "--out", tmp_path / "a", "--report", text, "--json")
    figures = json.loads(carried.stdout)["perplexity"]
    assert figures["converted"] == pytest.approx(figures["source"], rel=by_dtype(1e-4, 1e-2))
    coarse = run(
        "--model", gguf_file, "--out", tmp_path / "b", "--bits", 2, "--group-size", 32, "--report", text, "--json"
    )
    changed = json.loads(coarse.stdout)["perplexity"]
    assert changed["source"] == pytest.approx(figures["source"], rel=1e-4)
    assert abs(changed["converted"] / changed["source"] - 1) > by_dtype(1e-3, 2e-2)
    assert "perplexity on" in coarse.stderr


def test_text_loss_is_the_plain_definition() -> None:
    model, ids = tiny_model(), [5, 9, 200, 31, 7, 7, 150]
    found = measure_text_loss(model, ids, None, window_tokens=4)
    wanted = 0.0
    for window in (ids[:4], ids[4:]):
        logits = np.array(model(mx.array([window]))[0]).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        wanted -= sum(logprobs[i, token] for i, token in enumerate(window[1:]))
    assert found.tokens == 5
    assert found.loss_sum == pytest.approx(wanted, rel=1e-5)
    assert measure_text_loss(model, ids, 1, window_tokens=4).tokens == 7  # with BOS every token is predicted


BAD_USAGE = {
    "no such model": (["--model", "{tmp}/none"], "none"),
    "bits": (["--model", "{gguf}", "--bits", "7"], "--bits 7"),
    "mode": (["--model", "{gguf}", "--mode", "int4"], "--mode"),
    "report": (["--model", "{gguf}", "--report", "{tmp}/none.txt"], "none.txt"),
}


@pytest.mark.parametrize("name", BAD_USAGE)
def test_bad_usage_is_one_line_and_leaves_nothing(name: str, gguf_file: Path, tmp_path: Path) -> None:
    arguments, words = BAD_USAGE[name]
    result = run(*(a.format(tmp=tmp_path, gguf=gguf_file) for a in arguments), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


def test_existing_folders_are_safe(gguf_file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "2026.txt").write_text("mine")
    for force in ([], ["--force"]):
        assert run("--model", gguf_file, "--out", tmp_path / "diary", *force).exit_code == 2
    assert (tmp_path / "diary" / "2026.txt").read_text() == "mine"
    assert run("--model", gguf_file, "--out", tmp_path, "--force").exit_code == 2  # would delete its own source
    assert run("--model", gguf_file, "--out", gguf_file).exit_code == 2
    old = write_folder(tmp_path / "old", tiny_model())
    assert run("--model", gguf_file, "--out", old).exit_code == 2
    assert run("--model", gguf_file, "--out", old, "--force").exit_code == 0
    assert json.loads((old / "config.json").read_text())["mlx_lora"]["source"] == str(gguf_file)
    (tmp_path / "empty").mkdir()
    assert run("--model", gguf_file, "--out", tmp_path / "empty").exit_code == 0


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RunError, OSError(28, "No space left on device")])
def test_nothing_half_written_remains(failure, gguf_file: Path, tmp_path: Path, monkeypatch) -> None:
    def fail(self: ShardWriter) -> int:
        self._write()
        raise failure

    monkeypatch.setattr(ShardWriter, "close", fail)
    old = write_folder(tmp_path / "old", tiny_model())
    before = {p.name: p.read_bytes() for p in old.iterdir()}
    result = run("--model", gguf_file, "--out", old, "--force")
    assert result.exit_code == (130 if failure is KeyboardInterrupt else 1)
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "old"]


def test_a_full_disk_is_a_run_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    os.symlink("/dev/full", tmp_path / "part-0.safetensors")
    writer = ShardWriter(tmp_path)
    writer.add({"w": mx.zeros((1 << 16,))})
    with pytest.raises(RunError, match="failed"):
        writer.close()


def test_damaged_folders_are_input_errors(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", tiny_model())
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    assert run("--model", folder, "--out", tmp_path / "out").exit_code == 2
    (folder / "model.safetensors").write_bytes(whole)
    for config in ("{", "[]", json.dumps({**TINY, "model_type": "unheard-of"}), json.dumps({"model_type": "llama"})):
        (folder / "config.json").write_text(config)
        result = run("--model", folder, "--out", tmp_path / "out")
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_sentencepiece_only_folder_gets_a_fast_tokenizer(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    folder = write_folder(tmp_path / "m", tiny_model(vocab_size=320), {"vocab_size": 320})
    for file in folder.glob("tokenizer*"):
        file.unlink()
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("\n".join(f"the quick brown fox number {n} jumps over lazy dogs" for n in range(200)))
    spm.SentencePieceTrainer.train(
        input=str(sentences), model_prefix=str(folder / "tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, pad_id=-1,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    result = run("--model", folder, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    _, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    reference = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = "the quick fox jumps"
    assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)


def test_an_embedding_model_keeps_its_pooling_prompts_and_length(tmp_path: Path) -> None:
    source = tiny_encoder("bert", tmp_path / "m")
    files = {
        "modules.json": [{"type": "sentence_transformers.models.Transformer"}],
        "1_Pooling/config.json": {"pooling_mode_cls_token": True},
        "config_sentence_transformers.json": {"prompts": {"query": "Q: "}},
        "sentence_bert_config.json": {"max_seq_length": 40},
    }
    (source / "1_Pooling").mkdir()
    for name, content in files.items():
        (source / name).write_text(json.dumps(content))
    assert run("--model", source, "--out", tmp_path / "out", "--group-size", 32).exit_code == 0
    assert {name: json.loads((tmp_path / "out" / name).read_text()) for name in files} == files
    cached = [cached_quantized_folder(resolve_model(str(source)), 8, mx.float32)]
    assert stored_choices(cached[0]) == {"pooling": "cls", "query_prompt": "Q: "}
    (source / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    cached += [cached_quantized_folder(resolve_model(str(source)), 8, mx.float32)]
    assert [stored_choices(folder)["pooling"] for folder in cached] == ["cls", "mean"]


def test_vocabularies_of_any_name_come_along(tiny_folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_folder, tmp_path / "m")
    names = ("tiktoken.model", "spiece.model", "sentencepiece.bpe.model", "rwkv_vocab_v20230424.txt", "merges.txt")
    for name in names:
        (source / name).write_text(name)
    copy_side_files(source, tmp_path)
    assert [(tmp_path / name).read_text() for name in names] == list(names)


def test_another_form_of_the_weights_is_not_a_tower(tmp_path: Path) -> None:
    source, out = tmp_path / "m", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"vision_config": {}}))
    weights = {"model.layers.0.x": mx.zeros(4), "vision_tower.y": mx.ones(4)}
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    mx.save_safetensors(str(source / "consolidated.safetensors"), {"layers.0.x": mx.zeros(4)})
    for before, after in ((source, out), (out, source)):  # a folder that was written like this too
        copy_tower(before, after)
        assert list(mx.load(str(after / "tower.safetensors"))) == ["vision_tower.y"]


def test_the_disk_is_checked_for_the_dtype_that_is_written(tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    source = shutil.copytree(tiny_folder, tmp_path / "m")
    shutil.copy(source / "model.safetensors", source / "consolidated.safetensors")
    needed = []
    monkeypatch.setattr(converting, "check_writable", lambda *asked: needed.append(asked[2]))
    for asked in ({"target": "float", "dtype": mx.bfloat16}, {"target": "float", "dtype": mx.float32}):
        written = convert_model(resolve_model(str(source)), tmp_path / "out", **asked).size_bytes
        assert 0.95 * written < needed[-1] < 1.1 * written
        shutil.rmtree(tmp_path / "out")


def test_gguf_is_converted_into_the_cache_once(gguf_file: Path, monkeypatch) -> None:
    source = resolve_model(str(gguf_file))
    folder = cached_gguf_folder(source)
    mlx_lm.load(str(folder))
    monkeypatch.setattr(converting, "convert_model", lambda *a, **k: pytest.fail("converted again"))
    assert cached_gguf_folder(source) == folder


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(
    ("model", "float_copy", "mean", "most"),
    [(smollm2_gguf, False, 0.06, 0.3), (gemma3_gguf, False, 0.06, 0.3), (smollm2_gguf, True, 0.003, 0.02)],
)
def test_logprobs_agree_with_llama_cpp(model, float_copy, mean, most, tmp_path: Path) -> None:
    """llama.cpp rounds activations to 8 bits, which alone makes the larger differences."""
    pytest.importorskip("xllamacpp")
    path = model()
    from parity import llamacpp

    row = llamacpp.compare(
        llamacpp.write_float_copy(path, tmp_path / "f.gguf") if float_copy else path, tmp_path / "out"
    )
    assert row["tokens"] > 100
    assert row["mean"] <= mean
    assert row["max"] <= most


@pytest.fixture
def calibration(tmp_path: Path) -> tuple[Path, Path]:
    """A float model and rows to learn a quantization from."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{n} foxes jump over {n * n} dogs"}) + "\n" for n in range(12)))
    return write_folder(tmp_path / "float", tiny_model()), rows


@pytest.mark.parametrize("quantizer", ["dwq", "awq", "gptq"])
def test_a_learned_quantization_is_reported_beside_plain_rounding(quantizer, calibration, tmp_path):
    model, rows = calibration
    text = tmp_path / "text.txt"
    text.write_text("A fox jumps over nine dogs, and a dog over none. " * 3)
    given = ("--bits", 2, "--group-size", 32, "--report", text, "--json")
    learned = run(
        "--model", model, "--out", tmp_path / "q", *given, "--calibrate", rows, "--quantizer", quantizer
    )  # fmt: skip
    assert learned.exit_code == 0, learned.output
    found, plain = json.loads(learned.stdout), json.loads(run("--model", model, "--out", tmp_path / "r", *given).stdout)
    assert "by plain rounding" in learned.stderr
    assert found["perplexity"]["rounded"] == pytest.approx(plain["perplexity"]["converted"], rel=1e-4)
    if quantizer != by_dtype("", "dwq"):  # its few steps here are too small for scales in bfloat16
        assert found["perplexity"]["converted"] != found["perplexity"]["rounded"]
    entries = json.loads((tmp_path / "q" / "config.json").read_text())["quantization"]
    assert (entries["bits"], entries["group_size"], entries["mode"]) == (2, 32, "affine")
    assert ("model.embed_tokens" in entries) is (quantizer == "gptq")  # mlx-lm's gptq gives it 6 bits
    loaded, _ = mlx_lm.load(str(tmp_path / "q"))
    assert loaded(IDS).shape == (1, IDS.shape[1], 288)


def test_a_quantization_that_cannot_be_learned_is_one_line(calibration, gguf_file, tmp_path):
    model, rows = calibration
    quantized = tmp_path / "quantized"
    assert run("--model", model, "--out", quantized, "--bits", 4, "--group-size", 32).exit_code == 0
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "a fox"}\n')
    other = tmp_path / "other"
    write_folder(other, tiny_model(), {"model_type": "olmo2"})
    joined = write_folder(tmp_path / "joined", tiny_model(), {"model_type": "afm7"})
    encoder = tiny_encoder("bert", tmp_path / "encoder")
    for source, data, extra, said in (
        (model, rows, ("--bits", 8), "less than 8 bits"),
        (model, short, ("--group-size", 32), "tokens"),
        (model, tmp_path / "none.jsonl", (), "none.jsonl"),
        (quantized, rows, (), "quantized already"),
        (other, rows, ("--quantizer", "awq"), "not olmo2"),
        (joined, rows, ("--quantizer", "gptq"), "afm7"),
        (gguf_file, rows, (), "GGUF"),
        (encoder, rows, (), "encoder"),  # it predicts no tokens
        (encoder, None, ("--report", rows), "encoder"),
    ):
        result = run("--model", source, "--out", tmp_path / "q", "--calibrate", data, *extra)
        assert (result.exit_code, said in str(result.exception) + result.output) == (2, True), (said, result.output)
        assert not (tmp_path / "q").exists()
