"""PEFT folders of families whose names or weights mlx-lm has otherwise than transformers, against both of these."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.falcon_h1
import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from make_adapters import TOKENS, adapt_and_save, as_peft, our_logits, write_moved_peft
from run_cli import one_line, run

from mlx_lora.exporters.peft import (
    PEFT_WEIGHTS,
    folded_rows,
    full_for_peft,
    full_values,
    own_path,
    peft_path,
    shift_of,
)

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]

COMMON = {"vocab_size": 288, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1}
FALCON = {
    **COMMON, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8,
    "key_multiplier": 1.0, "embedding_multiplier": 3.0, "lm_head_multiplier": 0.3, "mlp_multipliers": [0.9, 0.6],
    "ssm_multipliers": [0.35, 0.25, 0.45, 0.5, 0.3], "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.25,
    "attention_out_multiplier": 0.9, "projectors_bias": False, "mamba_rms_norm": False, "pad_token_id": 0,
}  # fmt: skip
LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,in_proj"
CASES = {  # transformers' config, what is adapted
    "falcon_h1": ("FalconH1Config", {**FALCON, "tie_word_embeddings": False}, f"{LINEAR},lm_head,embed_tokens"),
    "falcon_h1 tied": ("FalconH1Config", {**FALCON, "tie_word_embeddings": True}, f"{LINEAR},embed_tokens"),
    "gptj": (
        "GPTJConfig",
        {"vocab_size": 288, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
        "q_proj,k_proj,v_proj,out_proj,fc_in,fc_out,lm_head",
    ),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 288, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "c_attn,c_proj,c_fc",
    ),
    "gpt2 tied": (
        "GPT2Config",
        {"vocab_size": 288, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "c_attn,wte,wpe",
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {**COMMON, "intermediate_size": 128, "num_attention_heads": 4, "hidden_act": "gelu_new"},
        "query_key_value,dense,dense_h_to_4h,dense_4h_to_h,embed_out",
    ),
    "mamba": ("MambaConfig", {**COMMON, "state_size": 8, "time_step_rank": 4, "use_cache": False}, "in_proj,x_proj"),
    "mamba tied": (
        "MambaConfig",
        {**COMMON, "state_size": 8, "time_step_rank": 4, "use_cache": False},
        "in_proj,embeddings",
    ),
}


def published(case: str, folder):
    """Write a tiny model as transformers publishes it, and return what is adapted in it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind, settings, targets = CASES[case]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings)).eval()
    for name, value in model.named_parameters():
        if value.ndim == 2 and "conv" not in name and "A_log" not in name:
            value.data = torch.randn(value.shape) * (0.5 / value.shape[-1] ** 0.5)
    (model.transformer if case.startswith("gpt2") else model).save_pretrained(
        folder
    )  # GPT-2's has names without a prefix
    byte_tokenizer().save_pretrained(folder)
    # What published files have and transformers 5 no longer writes.
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    older = {"rope_theta": rope.get("rope_theta"), "rotary_emb_base": rope.get("rope_theta"),
             "rotary_pct": rope.get("partial_rotary_factor"), "n_ctx": settings.get("n_positions")}  # fmt: skip
    config |= {name: value for name, value in older.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return targets


def theirs(folder, adapter=None) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter is not None:
        model = pytest.importorskip("peft").PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return model(torch.tensor(np.array(TOKENS))).logits.numpy()


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_peft_on_transformers_gives_our_logits(case, tmp_path):
    folder = tmp_path / "base"
    targets = published(case, folder)
    assert np.allclose(our_logits(folder), theirs(folder), atol=2e-5)
    expected = as_peft(folder, tmp_path, targets)
    found = theirs(folder, tmp_path / "p")
    effect = np.abs(expected - our_logits(folder)).max()
    assert effect > 1e-2
    assert np.abs(found - expected).max() < 1e-3 * effect
    assert np.allclose(our_logits(folder, tmp_path / "p"), expected, atol=1e-4)  # and back


@pytest.mark.parametrize(
    ("case", "saved"), [("gpt2", "attn.c_proj,wte,ln_f"), ("gpt2", "c_fc,wpe"), ("mamba", "embeddings,norm_f")]
)
@pytest.mark.parity
def test_whole_modules_in_peft_give_our_logits(case, saved, tmp_path):
    folder, out = tmp_path / "base", tmp_path / "p"
    targets = published(case, folder).split(",")[0]
    expected, _ = write_moved_peft(folder, out, target_modules=targets, modules_to_save=saved)
    assert np.abs(theirs(folder, out) - expected).max() < 1e-3 * np.abs(expected - our_logits(folder)).max()


@pytest.mark.parametrize(("case", "targets"), [("falcon_h1", "all-linear"), ("mamba", "in_proj,dt_proj")])
@pytest.mark.parity
def test_layers_that_peft_cannot_reach_are_refused_in_one_line(case, targets, tmp_path):
    published(case, tmp_path / "base")
    adapt_and_save(tmp_path / "base", tmp_path / "a", targets)
    out = tmp_path / "p"
    ran = run("export", "--model", tmp_path / "base", "--adapter-path", tmp_path / "a", "--to", "peft", "--out", out)
    one_line(ran, "transformers multiplies by its weight directly")
    assert not (out / PEFT_WEIGHTS).exists()


def test_names_go_there_and_back():
    modules = dict.fromkeys(
        ("model.h.0.attn.q_proj", "model.embed_out", "backbone.layers.3.mixer.in_proj", "model.wte")
    )
    for path, kind, theirs in (
        ("model.h.0.attn.q_proj", "gptj", "transformer.h.0.attn.q_proj"),
        ("model.h.0.attn.q_proj", "gpt_neox", "gpt_neox.layers.0.attn.q_proj"),
        ("model.embed_out", "gpt_neox", "lm_head"),
        ("model.wte", "gpt2", "transformer.wte"),
        ("backbone.layers.3.mixer.in_proj", "nemotron_h", "model.layers.3.mixer.in_proj"),
    ):
        assert peft_path(path, kind) == theirs
        assert own_path(theirs, modules) == path
        assert peft_path(path, "mamba") == path
    assert own_path("transformer.h.0.attn.k_proj", modules) is None


def test_the_folded_numbers_are_mlx_lms_own():
    args = mlx_lm.models.falcon_h1.ModelArgs.from_dict(json.loads(json.dumps(FALCON)))
    model = mlx_lm.models.falcon_h1.Model(args)
    block = "model.layers.1."
    assert folded_rows(model, f"{block}self_attn.o_proj", 16)[:, 0].tolist() == pytest.approx([0.9] * 16)
    assert folded_rows(model, f"{block}feed_forward.down_proj", 5)[:, 0].tolist() == pytest.approx([0.6] * 5)
    rows = folded_rows(model, f"{block}mamba.in_proj", 84)[:, 0]
    assert len(set(rows.tolist())) == 5
    assert mx.allclose(folded_rows(model, f"{block}self_attn.v_proj", 16), mx.ones((16, 1)))


@pytest.mark.parametrize(
    ("kind", "path"), [("qwen3_next", "model.norm"), ("qwen3_5", "model.q_norm"), ("step3p5", "model.norm")]
)
def test_norms_that_mlx_lm_shifts_are_shifted_back(kind, path):
    """transformers computes x (1 + w) with them, and mlx-lm adds the 1 when it loads a published model."""
    model = nn.Module()
    model.model_type, model.model = kind, nn.Module()
    model.model.norm, model.model.q_norm = nn.RMSNorm(4), nn.RMSNorm(4)
    model.update({"model": {path.rpartition(".")[2]: {"weight": mx.array([1.5, 1.0, 0.5, 2.0])}}})
    [(name, theirs)] = full_for_peft(model, (f"{path}.weight",), None)[0].items()
    assert theirs.tolist() == [0.5, 0.0, -0.5, 1.0]
    back = full_values({name: (path, "weight")}, {name: theirs}, model)
    assert back[path, "weight"].tolist() == [1.5, 1.0, 0.5, 2.0]
    assert shift_of("qwen3_next", "model.layers.0.linear_attn.norm", "weight") == 0
    assert shift_of("qwen3", "model.norm", "weight") == 0
