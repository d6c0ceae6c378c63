"""The LoRA GGUF: names, orientation and permutation, read back; and llama.cpp itself with it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf_judge import judge  # noqa: F401
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
def test_llamacpp_applies_it_to_the_quantized_base(model, size, tmp_path, judge):  # noqa: F811
    path = model()
    bare = loaded(path)
    base = random_adapter(path, tmp_path / "a", size)
    out = exported(path, tmp_path)

    def continuation(adapter):
        return judge.continue_greedily(judge.start_llamacpp(path, adapter), judge.PROMPTS[1])

    def apart(ours, ids, new, wanted):
        return float(np.abs(np.array(token_logprobs(ours, ids + new))[-len(new) :] - wanted).mean())

    plain, adapted = continuation(None), continuation(out)
    # Within what llama.cpp's rounding makes of the base alone, and the base itself is far away.
    assert apart(base.model, *adapted) < max(2 * apart(bare.model, *plain), 0.1)
    assert apart(bare.model, *adapted) > 5 * apart(base.model, *adapted)
