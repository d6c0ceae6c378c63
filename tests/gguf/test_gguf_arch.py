"""Each architecture: a tiny model written as GGUF by llama.cpp's rules comes back as the same model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx_lm
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_cases import CASES, IDS, SHARED, tiny_model, write_case
from hf_to_gguf import gguf_tensors, write_gguf
from mlx.utils import tree_flatten
from run_cli import holds

from mlx_lora.gguf.arch import gguf_architecture, model_config
from mlx_lora.gguf.reader import read_gguf
from mlx_lora.models.convert import convert_model
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_model


@pytest.mark.parametrize("name", CASES)
def test_same_logits_as_the_model_it_was_written_from(name: str, tmp_path: Path) -> None:
    model, config = write_case(name, tmp_path / "m.gguf")
    convert_model(resolve_model(str(tmp_path / "m.gguf")), tmp_path / "out")
    loaded, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    for key in ("num_hidden_layers", "tie_word_embeddings", "rms_norm_eps", "rope_theta", "vocab_size", "rope_scaling"):
        if hasattr(loaded.args, key):
            assert getattr(loaded.args, key) == config.get(key)
    wanted, found = model(IDS), loaded(IDS)
    np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=1e-4, atol=1e-4)
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_transformers_builds_the_same_model_from_the_folder(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model, _ = write_case(name, tmp_path / "m.gguf")
    convert_model(resolve_model(str(tmp_path / "m.gguf")), tmp_path / "out", target="float")
    judge, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        found = judge(torch.tensor(np.array(IDS), dtype=torch.long)).logits.numpy()
    # Gemma: mlx-lm rounds its embedding scale to bfloat16 (64 ** 0.5 is exact), so no allowance is needed.
    np.testing.assert_allclose(found, np.array(model(IDS)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "there", "here"),
    [
        ("llama", "blk.0.attn_q.weight", "self_attn.q_proj.weight"),
        ("llama biased", "blk.0.attn_k.bias", "self_attn.k_proj.bias"),
        ("gemma3", "blk.0.attn_norm.weight", "input_layernorm.weight"),
    ],
)
def test_the_file_differs_from_the_model_where_it_should(name: str, there: str, here: str, tmp_path: Path) -> None:
    """Without undoing permutation and norm offset the test above could pass by luck: it cannot."""
    model, _ = write_case(name, tmp_path / "m.gguf")
    file = read_gguf(tmp_path / "m.gguf")
    own = dict(tree_flatten(model.parameters()))
    assert np.abs(file.tensors[there].dequantize() - np.array(own[f"model.layers.0.{here}"])).max() > 0.1


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0], ids=lambda k: k.name)
def test_carried_blocks_give_the_logits_of_the_float_form(kind: Kind, tmp_path: Path) -> None:
    write_case("llama untied", tmp_path / "m.gguf", kind)
    source = resolve_model(str(tmp_path / "m.gguf"))
    kept = convert_model(source, tmp_path / "kept")
    convert_model(source, tmp_path / "float", target="float")
    assert (kept.lossless, kept.requantized) == (23, 0)
    a, b = (mlx_lm.load(str(tmp_path / folder))[0](IDS) for folder in ("kept", "float"))
    np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-3, atol=1e-3)


def test_gemma_27b_scales_attention_by_width_per_head(tmp_path: Path) -> None:
    _, config = write_case("gemma3", tmp_path / "m.gguf")
    file = read_gguf(tmp_path / "m.gguf")
    assert model_config(file)["query_pre_attn_scalar"] == 32
    deep = dataclasses.replace(file, metadata=file.metadata | {"gemma3.block_count": 62})
    deep.tensors.update({f"extra{i}": file.tensors["output_norm.weight"] for i in range(62)})
    assert model_config(deep)["query_pre_attn_scalar"] == config["hidden_size"] / config["num_attention_heads"]


def changed(
    tmp_path: Path,
    tensors: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    architecture: str = "llama",
) -> Path:
    """Write the plain llama case with tensors put in or (None) taken away, or with extra settings."""
    config = {**SHARED, "model_type": "llama"}
    whole = gguf_tensors(tiny_model(config), "llama", config) | (tensors or {})
    kept = {name: array for name, array in whole.items() if array is not None}
    return write_gguf(tmp_path / "m.gguf", kept, architecture, config, extra)


def test_all_missing_and_unknown_tensors_are_named_at_once(tmp_path: Path) -> None:
    gone = dict.fromkeys(("blk.1.ffn_up.weight", "output_norm.weight"))
    wrong = {**gone, "blk.0.ffn_gate_exps.weight": np.zeros((4, 4), np.float32)}
    with pytest.raises(InputError) as caught:
        convert_model(resolve_model(str(changed(tmp_path, wrong))), tmp_path / "out")
    holds(str(caught.value), *wrong)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


KNOWN = "llama, qwen2, qwen3, qwen3moe, qwen35, qwen35moe, gemma3, gemma4, gpt-oss, lfm2, phi3"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"extra": {"expert_count": 8}}, "mixtures of experts"),
        ({"extra": {"rope.dimension_count": 8}}, "dimension_count"),
        ({"extra": {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}}, "longrope"),
        ({"extra": {"attention.sliding_window": 0}}, "sliding_window"),
        ({"extra": {"split.count": 3}}, "split"),
        ({"architecture": "rwkv7"}, f"rwkv7.*{KNOWN}"),
        (
            {"tensors": {"blk.2.attn_q.weight": np.zeros((48, 64), np.float32)}},
            r"blk\.2\.attn_q\.weight is \(48, 64\), but the model needs \(64, 64\)",
        ),
        ({"tensors": {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}}, "rope_freqs"),
    ],
)
def test_what_the_model_cannot_express_is_refused(how, words, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        convert_model(resolve_model(str(changed(tmp_path, **how))), tmp_path / "out")


@pytest.mark.parametrize("name", [np.array([1, 2], np.uint8), ["llama", "llama"], 7, None])
def test_an_architecture_that_is_no_text_is_refused(name, tmp_path: Path) -> None:
    file = read_gguf(changed(tmp_path))
    file.metadata["general.architecture"] = name
    with pytest.raises(InputError, match="cannot be read from GGUF"):
        gguf_architecture(file)
