"""The LoRA GGUF: names, orientation and permutation, read back; and llama.cpp itself with it."""

from __future__ import annotations

import json
import urllib.request

import gguf
import numpy as np
import pytest
from make_adapters import adapt_and_save, loaded, random_adapter
from real_models import gemma3_gguf, smollm2_gguf
from run_cli import one_line, passed, run

from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.gguf.mapping import rope_order
from mlx_lora.models.convert import token_logprobs


def export(model, folder):
    given = ("--adapter-path", folder / "a", "--to", "gguf-adapter", "--out", folder / "a.gguf")
    return run("export", "--model", model, *given)


def exported(model, folder):
    passed(export(model, folder))
    return folder / "a.gguf"


def test_rope_order_there_and_back():
    rows = np.arange(8 * 6 * 2).reshape(48, 2)
    written = rows[rope_order(8).to_file(len(rows))]
    assert (written[rope_order(8).from_file(len(rows))] == rows).all()
    assert (written != rows).any()


def test_the_file_holds_the_update_of_each_tensor(tiny_folder, tmp_path):
    adapt_and_save(tiny_folder, tmp_path / "a")
    out = exported(tiny_folder, tmp_path)
    reader = gguf.GGUFReader(out)
    assert [reader.fields[name].contents() for name in ("general.type", "adapter.type")] == ["adapter", "lora"]
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    layers = adapter_layers(loaded(tiny_folder, tmp_path / "a").model)
    assert len(tensors) == 2 * len(layers)
    for path, tensor, heads in (
        ("self_attn.q_proj", "attn_q", 4),
        ("self_attn.k_proj", "attn_k", 2),
        ("self_attn.v_proj", "attn_v", 0),
        ("mlp.down_proj", "ffn_down", 0),
    ):
        a, b = (tensors[f"blk.1.{tensor}.weight.lora_{side}"] for side in "ab")
        update = b @ a * alpha / len(a)
        update = update[rope_order(heads).from_file(len(update))] if heads else update
        assert np.allclose(update, layers[f"model.layers.1.{path}"].delta(), atol=1e-5)


def test_embeddings_are_refused_by_name(tiny_folder, tmp_path):
    adapt_and_save(tiny_folder, tmp_path / "a", "all-linear,embed_tokens")
    one_line(export(tiny_folder, tmp_path), "model.embed_tokens is an embedding")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(("model", "size"), [(smollm2_gguf, 0.2), (gemma3_gguf, 0.02)])
def test_llamacpp_applies_it_to_the_quantized_base(model, size, tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp")
    path = model()
    bare = loaded(path)
    base = random_adapter(path, tmp_path / "a", size)
    out = exported(path, tmp_path)

    def continuation(adapter):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.port = 512, 1, 0, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.warmup, params.verbosity = False, -1
        if adapter:
            info = xllamacpp.CommonAdapterLoraInfo()
            info.path, info.scale = str(adapter), 1.0
            params.lora_adapters = [info]
        server = xllamacpp.Server(params)
        body = json.dumps({"content": "Once upon a time, in a village by the sea,", "add_special": True}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            ids = json.load(reply)["tokens"]
        settings = {"n_predict": 24, "temperature": 0, "n_probs": 1, "cache_prompt": False}
        steps = server.handle_completions({"prompt": ids, **settings})["choices"][0]["logprobs"]["content"]
        return ids, [step["id"] for step in steps], np.array([step["logprob"] for step in steps])

    def apart(ours, ids, new, wanted):
        return float(np.abs(np.array(token_logprobs(ours, ids + new))[-len(new) :] - wanted).mean())

    plain, adapted = continuation(None), continuation(out)
    # Within what llama.cpp's rounding makes of the base alone, and the base itself is far away.
    assert apart(base.model, *adapted) < max(2 * apart(bare.model, *plain), 0.1)
    assert apart(bare.model, *adapted) > 5 * apart(base.model, *adapted)
