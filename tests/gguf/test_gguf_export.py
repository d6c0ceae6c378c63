"""Merged GGUF files: what is in them, bit for bit, and llama.cpp with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from comparing import by_dtype
from conftest import quantized, tiny_model
from gguf import GGMLQuantizationType as Kind
from gguf_cases import CASES, IDS, write_case
from gguf_families import MERGES, write_folder_with_merges
from gguf_judge import judge  # noqa: F401
from make_adapters import adapt_and_save, loaded, make_adapter, random_adapter
from mlx.utils import tree_flatten
from mlx_lm.models import cohere
from real_models import gemma3_gguf, smollm2_gguf
from run_cli import holds, one_line, run, succeeds
from tiers import by_default
from tokenizer_judge import differing
from varied_strings import varied_strings

from mlx_lora.adapters.base import dense_weight
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.gguf.arch import model_config, weight_map
from mlx_lora.gguf.mapping import rope_order
from mlx_lora.gguf.reader import read_gguf
from mlx_lora.gguf.weights import import_weights
from mlx_lora.gguf.write import TYPES
from mlx_lora.models.convert import convert_model, token_logprobs
from mlx_lora.models.load import Base
from mlx_lora.utils import device
from mlx_lora.utils.hub import resolve_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder_with_merges(tmp_path_factory.mktemp("float"))


@pytest.fixture(scope="module")
def folder_4bit(tmp_path_factory) -> Path:
    config = {"quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}
    return write_folder_with_merges(tmp_path_factory.mktemp("packed"), quantized(tiny_model()), config)


def export(model, out, *more):
    return run("export", "--model", model, "--to", "gguf", "--out", out, *more)


def exported(model, out, *more):
    succeeds("export", "--model", model, "--to", "gguf", "--out", out, *more)
    return read_gguf(out)


def logits_of(file) -> mx.array:
    return loaded(file).model(IDS)


# --- as stored


def assert_same_codes(found: Base, wanted: Base) -> None:
    layers = dict(wanted.model.named_modules())
    for path, layer in found.model.named_modules():
        if "scales" in layer:
            assert mx.array_equal(layer.weight, layers[path].weight).item(), path


def test_a_packed_model_keeps_its_codes(folder_4bit, tmp_path):
    """Read back, the file has the base's own weights, up to the float16 of a scale; f16 and q4_1 files have not."""
    base = loaded(folder_4bit, dtype="float32")
    stored = exported(folder_4bit, tmp_path / "stored.gguf", "--gguf-type", "stored")
    kinds = {tensor.type for name, tensor in stored.tensors.items() if name.startswith("blk") and "norm" not in name}
    assert kinds <= {Kind.Q4_0, Kind.Q4_1}  # Q4_0 where every bias is -8 times its scale
    again = loaded(tmp_path / "stored.gguf", dtype="float32")
    assert_same_codes(again, base)
    exported(folder_4bit, tmp_path / "again.gguf", "--gguf-type", "q4_1")
    rounded = loaded(tmp_path / "again.gguf", dtype="float32").model(IDS)
    wanted, found = base.model(IDS), again.model(IDS)
    assert mx.abs(found - wanted).max().item() < 0.2 * mx.abs(rounded - wanted).max().item()


def test_a_qa_lora_ships_in_the_bases_codes(folder_4bit, tmp_path):
    make_adapter(folder_4bit, tmp_path / "adapter", form="qa-lora", strength=0.1)
    base = loaded(folder_4bit, tmp_path / "adapter", "float32")
    wanted = base.model(IDS)
    exported(folder_4bit, tmp_path / "m.gguf", "--adapter-path", tmp_path / "adapter")
    again = loaded(tmp_path / "m.gguf", dtype="float32")
    plain = loaded(folder_4bit, dtype="float32")
    assert mx.abs(again.model(IDS) - wanted).max().item() < 0.05 * mx.abs(plain.model(IDS) - wanted).max().item()
    assert_same_codes(again, plain)


# --- round trips


@pytest.mark.parametrize("name", CASES)
def test_an_imported_file_comes_back_bit_for_bit(name, tmp_path):
    write_case(name, tmp_path / "in.gguf")
    convert_model(resolve_model(str(tmp_path / "in.gguf")), tmp_path / "folder", target="float")
    before, after = read_gguf(tmp_path / "in.gguf"), exported(tmp_path / "folder", tmp_path / "out.gguf", *F32)
    assert model_config(after) == model_config(before)
    assert set(after.tensors) == set(before.tensors)
    for tensor, wanted in before.tensors.items():
        found = after.tensors[tensor]
        assert (found.type, found.shape) == (Kind.F32, wanted.shape)
        assert (found.data == wanted.data).all(), tensor
    known = dict(before.metadata)
    if name.startswith("qwen2"):  # transformers reads any folder of this model type with Qwen2's own pre-tokenizer
        assert known.pop("tokenizer.ggml.pre") == "smollm"
        assert after.metadata["tokenizer.ggml.pre"] == "qwen2"
    for key, value in known.items():
        found = after.metadata[key]
        assert (found == value).all() if isinstance(value, np.ndarray) else found == value, key


F32 = ("--gguf-type", "f32")


@pytest.mark.parametrize("stored", [mx.float16, mx.float32])
def test_a_machine_that_computes_in_bfloat16_writes_the_stored_weights(stored, folder_4bit, tmp_path, monkeypatch):
    """A Mac casts a base to bfloat16 as it loads it, which is no reason to round what is exported."""
    weights = {
        name: a.astype(stored) if a.dtype == mx.float32 else a
        for name, a in mx.load(str(folder_4bit / "model.safetensors")).items()
    }
    folder = shutil.copytree(folder_4bit, tmp_path / "base")
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    adapt_and_save(folder, tmp_path / "a")
    here = exported(folder, tmp_path / "here.gguf", "--adapter-path", tmp_path / "a", *F32)
    monkeypatch.setattr(
        device, "compute_dtype", lambda name="auto": mx.bfloat16 if name == "auto" else getattr(mx, name)
    )
    there = exported(folder, tmp_path / "there.gguf", "--adapter-path", tmp_path / "a", *F32)
    for name, tensor in here.tensors.items():
        assert np.allclose(tensor.data, there.tensors[name].data, rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize("tied", [True, False])
def test_our_importer_reads_back_the_folder_it_was_made_of(tied, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    # As published: the config leaves out what has a default, and says mistral for a llama.
    folder = write_folder_with_merges(tmp_path / "m", model, {"model_type": "mistral", "tie_word_embeddings": tied})
    file = exported(folder, tmp_path / "out.gguf", *F32)
    config = model_config(file)
    assert (config["model_type"], config["head_dim"], config["tie_word_embeddings"]) == ("llama", 16, tied)
    own = dict(mx.load(str(folder / "model.safetensors")))
    for tensor in import_weights(file.tensors, weight_map(file, config), "float", mx.float32):
        for name, array in tensor.parameters.items():
            assert mx.array_equal(array, own.pop(name)), name
    assert not own
    limit = by_dtype(1e-5, 5e-2)
    assert mx.allclose(logits_of(tmp_path / "out.gguf"), model(IDS), rtol=limit, atol=limit)


# --- types and the adapter


def merged_weights(folder, adapter) -> dict[str, np.ndarray]:
    """Compute base + adapter apart from the code that writes it, under GGUF's names and in its order."""
    base = loaded(folder, adapter, "float32")
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    weights = {}
    for path, layer in adapter_layers(base.model).items():
        _, _, number, part = path.split(".", 3)
        whole = np.array(dense_weight(layer.linear).astype(mx.float32) + layer.delta())
        whole = whole[rope_order(heads[part]).to_file(len(whole))] if part in heads else whole
        weights[f"blk.{number}.{names[part.split('.')[-1]]}.weight"] = whole
    return weights


@pytest.mark.long
@pytest.mark.parametrize("kind", by_default(TYPES, "f16", "q4_0"))
@pytest.mark.parametrize("source", by_default(["folder", "folder_4bit"], "folder_4bit"))
def test_every_type_holds_base_and_adapter(kind, source, tmp_path, request):
    model = request.getfixturevalue(source)
    adapt_and_save(model, tmp_path / "a")
    file = exported(model, tmp_path / "m.gguf", "--adapter-path", tmp_path / "a", "--gguf-type", kind)
    wanted_kind, file_type = TYPES[kind]
    assert file.metadata["general.file_type"] == file_type
    for name, wanted in merged_weights(model, tmp_path / "a").items():
        assert file.tensors[name].type is wanted_kind
        stored = gguf.quants.quantize(wanted, wanted_kind)
        assert (file.tensors[name].data == stored.view(np.uint8)).all(), name
        found, largest = file.tensors[name].dequantize(), np.abs(wanted).max()
        assert np.abs(found - wanted).max() <= STEPS[kind] * largest
    norms = [tensor for tensor in file.tensors.values() if len(tensor.shape) == 1]
    assert len(norms) == 5
    assert all(tensor.type is Kind.F32 for tensor in norms)
    head = file.tensors["token_embd.weight"].type
    assert head is (Kind.Q8_0 if kind.startswith(("q4", "q5")) else wanted_kind)


# The largest rounding error, against the largest value: half a step of the type (Q4_0's highest code is cut off: one), and
# in Q8_0 that of the step itself, which is a float16.
STEPS = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 254 + 2**-11, "q5_0": 1 / 15, "q5_1": 1 / 30}
STEPS |= {"q4_0": 1 / 7, "q4_1": 1 / 14}


def test_the_adapter_is_in_it_and_the_default_is_f16(folder, tmp_path):
    expected = adapt_and_save(folder, tmp_path / "a")
    file = exported(folder, tmp_path / "m.gguf", "--adapter-path", tmp_path / "a")
    assert file.tensors["blk.0.attn_q.weight"].type is Kind.F16
    exported(folder, tmp_path / "bare.gguf")
    with_it, without = logits_of(tmp_path / "m.gguf"), logits_of(tmp_path / "bare.gguf")
    base = loaded(folder, tmp_path / "a")
    wanted = base.model(IDS)
    limit = by_dtype(1e-2, 5e-2)
    assert mx.allclose(with_it, wanted, rtol=limit, atol=limit)
    assert not mx.allclose(without, wanted, rtol=0.1, atol=0.1)
    assert expected.size


def test_an_adapted_embedding_moves_the_tied_head_too(folder, tmp_path):
    adapt_and_save(folder, tmp_path / "a", "all-linear,embed_tokens")
    exported(folder, tmp_path / "m.gguf", "--adapter-path", tmp_path / "a", *F32)
    base = loaded(folder, tmp_path / "a")
    limit = by_dtype(1e-4, 5e-2)
    assert mx.allclose(logits_of(tmp_path / "m.gguf"), base.model(IDS), rtol=limit, atol=limit)


def test_rows_that_blocks_do_not_divide_are_f16(tmp_path):
    folder = write_folder_with_merges(tmp_path / "m", tiny_model(intermediate_size=80), {"intermediate_size": 80})
    file = exported(folder, tmp_path / "m.gguf", "--gguf-type", "q4_0")
    assert file.tensors["blk.0.ffn_down.weight"].type is Kind.F16
    assert file.tensors["blk.0.ffn_up.weight"].type is Kind.Q4_0


def test_values_beyond_float16_are_refused_by_name(tmp_path):
    model = tiny_model()
    model.layers[1].mlp.up_proj.weight = model.layers[1].mlp.up_proj.weight.at[3, 5].add(1e5)
    folder = write_folder_with_merges(tmp_path / "m", model)
    one_line(export(folder, tmp_path / "out" / "m.gguf"), "blk.1.ffn_up.weight has 100000, too large for F16")
    assert not list((tmp_path / "out").iterdir())
    assert export(folder, tmp_path / "m.gguf", "--gguf-type", "bf16").code == 0


# --- metadata


def test_tokenizer_and_chat_template_are_complete(folder, tmp_path):
    adapt_and_save(folder, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    metadata = exported(folder, tmp_path / "m.gguf", "--adapter-path", tmp_path / "a").metadata
    tokenizer = byte_tokenizer(merges=MERGES)
    wanted = {
        "general.type": "model",
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    assert {key: metadata[key] for key in wanted} == wanted
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    n_tokens = len(tokenizer)
    assert len(tokens) == len(types) == 288
    assert tokens[:n_tokens] == tokenizer.convert_ids_to_tokens(range(n_tokens))
    assert set(types[: 256 + len(MERGES)]) == {1}
    assert set(types[256 + len(MERGES) : n_tokens]) == {3}
    assert set(types[n_tokens:]) == {5}
    config["mlx_lora"]["chat_template"] = "{{ messages[0].content }}"
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    metadata = exported(folder, tmp_path / "m.gguf", "--adapter-path", tmp_path / "a", "--force").metadata
    assert metadata["tokenizer.chat_template"] == "{{ messages[0].content }}"


# --- bad input


def test_an_existing_file_stays_unless_forced(folder, tmp_path):
    (tmp_path / "m.gguf").write_text("mine")
    one_line(export(folder, tmp_path / "m.gguf"), "exists", "--force")
    one_line(export(folder, tmp_path), "exists")
    assert (tmp_path / "m.gguf").read_text() == "mine"
    assert export(folder, tmp_path / "m.gguf", "--force").code == 0
    assert read_gguf(tmp_path / "m.gguf").tensors
    file = exported(folder, tmp_path / "q.gguf", "--gguf-type", "q8_0").path
    one_line(export(file, file, "--force"), "is the base")


def test_what_cannot_be_written_is_named(folder, tiny_folder, tmp_path):
    out = tmp_path / "m.gguf"
    one_line(export(folder, out, "--gguf-type", "q3_k"), "q3_k", "q8_0")
    one_line(export(tiny_folder, out), "without merges")
    plain = ("export", "--model", folder, "--out", out)
    one_line(run(*plain, "--to", "peft"), "--to peft without --adapter-path")
    one_line(run(*plain, "--to", "gguf-adapter"), "--to gguf-adapter without --adapter-path")
    one_line(run(*plain, "--to", "peft", "--gguf-type", "f16"), "--gguf-type with --to peft")
    assert not out.exists()


ODD = {"low_freq_factor": 2.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling dynamic"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "rope_scaling.beta_fast 16"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, **ODD}}, "low_freq_factor 2.0, not 1"),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, "sliding attention"),
        ({"rope_traditional": True}, "rope_traditional"),
    ],
)
def test_settings_that_llama_cpp_lacks_are_refused(changes, words, tmp_path):
    folder = write_folder_with_merges(tmp_path / "m", tiny_model(**changes), changes)
    one_line(export(folder, tmp_path / "m.gguf"), words, "llama")


def test_parts_without_a_tensor_and_other_architectures_are_named(tmp_path):
    folder = write_folder_with_merges(tmp_path / "m", tiny_model(mlp_bias=True), {"mlp_bias": True})
    one_line(export(folder, tmp_path / "m.gguf"), "mlp.down_proj.bias", "no tensor in a llama GGUF")
    base = loaded(folder)
    config = {**base.config, "model_type": "cohere", "logit_scale": 1.0, "layer_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    model = cohere.Model(cohere.ModelArgs.from_dict(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    one_line(export(folder, tmp_path / "m.gguf"), "cohere", "llama, qwen2, qwen3, qwen3_moe", "gpt_oss, lfm2, phi3")


# --- llama.cpp


def continuations(judge, file):  # noqa: F811
    """Return (prompt ids, new ids, log-probabilities) by llama.cpp for each prompt of the benchmark."""
    server = judge.start_llamacpp(file)
    return [judge.continue_greedily(server, prompt) for prompt in judge.PROMPTS]


def differences(model, found) -> np.ndarray:
    """Return |log-probability here - in llama.cpp| of every new token."""
    apart = [np.array(token_logprobs(model, ids + new))[-len(new) :] - wanted for ids, new, wanted in found]
    return np.abs(np.concatenate(apart))


def says_the_same(model, ids, new) -> bool:
    """Tell whether greedy decoding here gives `new` too: each token is the likeliest after those before it."""
    logits = model(mx.array([ids + new[:-1]]))[0, len(ids) - 1 :]
    return logits.argmax(axis=-1).tolist() == new


def next_logprobs(judge, file, prompts) -> list[tuple[list[int], dict[int, float]]]:  # noqa: F811
    """Return each prompt with llama.cpp's {token: log-probability} of what follows.

    Prompts whose likeliest next byte begins a longer character are left out: llama.cpp waits for the rest of it.
    """
    server = judge.start_llamacpp(file)
    settings = {"n_predict": 1, "temperature": 0, "n_probs": 100, "cache_prompt": False}
    answers = [server.handle_completions({"prompt": prompt, **settings}) for prompt in prompts]
    told = [(prompt, a["choices"][0]["logprobs"]) for prompt, a in zip(prompts, answers, strict=True)]
    steps = [(prompt, logprobs["content"][0]["top_logprobs"]) for prompt, logprobs in told if logprobs]
    return [(prompt, {top["id"]: top["logprob"] for top in step}) for prompt, step in steps]


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_llamacpp_runs_every_architecture_as_we_do(name, judge, tmp_path):  # noqa: F811
    write_case(name, tmp_path / "in.gguf")
    convert_model(resolve_model(str(tmp_path / "in.gguf")), tmp_path / "m", target="float")
    adapt_and_save(tmp_path / "m", tmp_path / "a")
    file = exported(tmp_path / "m", tmp_path / "m.gguf", "--adapter-path", tmp_path / "a", *F32)
    ids = [int(i) for i in np.random.default_rng(3).integers(0, 256, 90)]
    found = next_logprobs(judge, file.path, [ids[:n] for n in range(1, 90, 6)])
    assert len(found) >= 4
    base = loaded(tmp_path / "m")

    def apart() -> float:
        worst = 0.0
        for prompt, wanted in found:
            logits = base.model(mx.array([prompt]))[0, -1]
            here = (logits - mx.logsumexp(logits)).tolist()
            likely = {i: value for i, value in wanted.items() if value > -8}
            worst = max([worst, *(abs(here[i] - value) for i, value in likely.items())])
        return worst

    bare = apart()
    load_adapter(base, tmp_path / "a")
    adapted = apart()
    print(f"{name}: {len(found)} prompts, adapted {adapted:.4f}, bare {bare:.3f}")
    # Random weights of this size make logits of +-50, and llama.cpp rounds to 16 bits inside attention.
    assert adapted < 0.03
    assert bare > 20 * adapted


@pytest.mark.parity
def test_llamacpp_cuts_texts_into_our_ids(folder, tmp_path):
    exported(folder, tmp_path / "m.gguf")
    tokenizer = byte_tokenizer(merges=MERGES).backend_tokenizer
    assert differing(tmp_path / "m.gguf", tokenizer, varied_strings(1000, seed=3)) == []


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(("model", "size"), [(smollm2_gguf, 0.2), (gemma3_gguf, 0.03)])
def test_llamacpp_says_what_we_say_on_real_models(model, size, judge, tmp_path):  # noqa: F811
    """Float32 on both sides; what is left for Gemma is mostly mlx-lm's embedding scale, 25.25 for 25.298."""
    convert_model(resolve_model(str(model())), tmp_path / "m", target="float")
    random_adapter(tmp_path / "m", tmp_path / "a", size)
    file = exported(tmp_path / "m", tmp_path / "m.gguf", "--adapter-path", tmp_path / "a", *F32)
    bare = loaded(tmp_path / "m")
    base = loaded(tmp_path / "m", tmp_path / "a")
    found = continuations(judge, file.path)
    apart = differences(base.model, found)
    print(f"{model.__name__}: |d logp| mean {apart.mean():.4f}, max {apart.max():.4f}")
    assert apart.mean() < 0.01
    assert differences(bare.model, found).mean() > 50 * apart.mean()
    assert not all(says_the_same(bare.model, ids, new) for ids, new, _ in found)
    for prompt, (ids, new, _) in zip(judge.PROMPTS, found, strict=True):
        assert base.hf_tokenizer(prompt)["input_ids"] == ids
        assert says_the_same(base.model, ids, new), prompt


@pytest.mark.long
def test_what_to_type_next_is_said_for_each_program(folder, tmp_path):
    adapter = ("--adapter-path", tmp_path / "a")
    adapt_and_save(folder, tmp_path / "a")

    def told(to: str, name: str, *more: object) -> str:
        return succeeds("export", "--model", folder, *adapter, "--to", to, "--out", tmp_path / name, *more).err

    modelfile = tmp_path / "My Ollama" / "Modelfile"
    ollama = told("ollama", "My Ollama")
    holds(ollama, f"ollama create my-ollama -f '{modelfile}'", "ollama run my-ollama")
    merged = told("gguf", "m.gguf")
    holds(
        merged,
        f"lms import {tmp_path / 'm.gguf'}",
        f"llama-quantize {tmp_path / 'm.gguf'} {tmp_path / 'm-Q8_0.gguf'} Q8_0",
    )
    assert "llama-quantize" not in told("gguf", "q.gguf", "--gguf-type", "q8_0")  # it is small already
    assert f"--lora {tmp_path / 'a.gguf'}" in told("gguf-adapter", "a.gguf")


@pytest.mark.parametrize("kind", ["q4_k_m", "Q4_K_M", "iq4_xs", "q6_k"])
def test_a_type_that_only_llamacpp_writes_is_refused_with_the_command_that_makes_it(kind, folder, tmp_path):
    ran = export(folder, tmp_path / "m.gguf", "--gguf-type", kind)
    one_line(ran, "--gguf-type f16", f"llama-quantize {tmp_path / 'm-f16.gguf'}", f" {kind.upper()}")
    assert "llama-quantize" not in export(folder, tmp_path / "m.gguf", "--gguf-type", "zip").err
    assert not (tmp_path / "m.gguf").exists()
