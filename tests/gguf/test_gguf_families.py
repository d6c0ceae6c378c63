"""Each family as GGUF and back: names, orders, packed blocks, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_families import FAMILIES, architecture, tiny_family, write_family
from gguf_tensors import random_tensor
from make_adapters import adapt_and_save, loaded
from mlx.utils import tree_flatten
from tiny_moe import with_quantized_experts

from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.gguf.arch import ARCHITECTURES, context_length, gguf_settings, model_config, weight_map
from mlx_lora.gguf.mapping import Order, TensorMapping
from mlx_lora.gguf.reader import GGUFFile, GGUFTensor, read_gguf
from mlx_lora.gguf.weights import carry_blocks, check_shapes, import_weights, mxfp4_blocks
from mlx_lora.gguf.write import write_gguf_adapter, write_gguf_model
from mlx_lora.models.convert import build_model, convert_model
from mlx_lora.models.load import Base
from mlx_lora.models.meta import outline_of
from mlx_lora.models.quantize import QuantFormat
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_model

IDS = mx.array([[3, 250, 17, 99, 42, 7, 7, 201, 5, 88, 31, 60, 2, 140]])


load = partial(loaded, dtype="float32")


def parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a function: case -> (its model, its GGUF file); each is made once."""
    made: dict[str, tuple[Base, Path]] = {}

    def of(name: str) -> tuple[Base, Path]:
        if name not in made:
            folder = write_family(name, tmp_path_factory.mktemp("family") / "m")
            base = load(folder)
            write_gguf_model(folder.parent / "m.gguf", base, gguf_type="f32", name="m")
            made[name] = base, folder.parent / "m.gguf"
        return made[name]

    return of


# --- there and back


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_is_read_back(name, written):
    base, path = written(name)
    back = load(path)
    ours, theirs = parameters(base.model), parameters(back.model)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if key.endswith("A_log"):  # the file holds -exp of it
            assert mx.allclose(value, theirs[key], rtol=0, atol=1e-6), key
        else:
            assert mx.array_equal(value, theirs[key]), key
    assert mx.allclose(base.model(IDS), back.model(IDS), rtol=1e-5, atol=1e-4)
    assert back.hf_tokenizer("abc tab")["input_ids"] == base.hf_tokenizer("abc tab")["input_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_one_that_the_gguf_package_knows_of_the_architecture(name, written):
    _, path = written(name)
    kind = next(arch for arch, its in gguf.MODEL_ARCH_NAMES.items() if its == architecture(name))
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[kind]}
    found = {re.sub(r"\.(weight|bias|scale)$", "", tensor) for tensor in read_gguf(path).tensors}
    found = {re.sub(r"^blk\.\d+\.", "blk.{bid}.", tensor) for tensor in found}
    assert found <= known
    others = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.MAMBA]}
    assert not found <= others


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss", "lfm2", "qwen35", "gemma4"])
def test_the_planner_outlines_the_file_as_the_folder(name, written):
    base, path = written(name)
    outlined = {key: value.shape for key, value in parameters(outline_of(str(path)).model).items()}
    assert outlined == {key: value.shape for key, value in parameters(base.model).items()}


CARRIED = [("qwen3moe", "q4_0"), ("phi3", "q8_0"), ("gpt-oss", "q5_1"), ("lfm2", "q4_1"), ("qwen35", "q4_0")]
CARRIED += [("qwen35", "q5_1"), ("qwen35moe", "q8_0"), ("gemma4 experts", "q8_0")]


@pytest.mark.parametrize(("name", "kind"), CARRIED)
def test_carried_blocks_give_the_logits_of_the_float_form(name, kind, written, tmp_path):
    base, _ = written(name)
    write_gguf_model(tmp_path / "m.gguf", base, gguf_type=kind, name="m")
    source = resolve_model(str(tmp_path / "m.gguf"))
    kept = convert_model(source, tmp_path / "kept")
    convert_model(source, tmp_path / "float", target="float")
    assert kept.lossless > 10
    assert kept.requantized == 0
    a, b = (np.array(load(tmp_path / folder).model(IDS)) for folder in ("kept", "float"))
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    assert np.abs(a - np.array(base.model(IDS))).max() > 1e-3  # the blocks did round


def test_routers_and_kernels_stay_float_whatever_is_asked(written, tmp_path):
    base, path = written("qwen35moe")
    convert_model(resolve_model(str(path)), tmp_path / "four", target=QuantFormat(4, 32))
    names = {
        name.rsplit(".", 1)[0] for name in mx.load(str(tmp_path / "four" / "model.safetensors")) if "scales" in name
    }
    block = "language_model.model.layers.0"
    assert f"{block}.mlp.switch_mlp.up_proj" in names
    assert not {f"{block}.mlp.gate", f"{block}.mlp.shared_expert_gate", f"{block}.linear_attn.conv1d"} & names
    write_gguf_model(tmp_path / "q.gguf", base, gguf_type="q4_0", name="m")
    tensors = read_gguf(tmp_path / "q.gguf").tensors
    for tensor in ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight", "ssm_a", "ssm_dt.bias"):
        assert tensors[f"blk.0.{tensor}"].type is Kind.F32
    assert tensors["blk.0.ffn_up_exps.weight"].type is Kind.Q4_0


@pytest.mark.parametrize(("name", "wrapper"), [("gemma4", "gemma4"), ("qwen35", "qwen3_5")])
def test_a_multimodal_models_text_part_is_the_same_file(name, wrapper, written, tmp_path):
    model, config = tiny_family(name)
    prefix = "language_model." if name == "gemma4" else ""  # the other's names have it already
    weights = {prefix + key: value for key, value in parameters(model).items()}
    folder = write_family(name, tmp_path / "m")
    nested = {"model_type": wrapper, "text_config": config, "vocab_size": 288}
    eos = json.loads((folder / "config.json").read_text())["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(nested | {"eos_token_id": eos}))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    write_gguf_model(tmp_path / "m.gguf", load(folder), gguf_type="f32", name="m")
    assert (tmp_path / "m.gguf").read_bytes() == written(name)[1].read_bytes()


# --- orders


def test_value_heads_of_one_key_head_stand_apart_in_the_file(written):
    base, path = written("qwen35")
    tensors, ours = read_gguf(path).tensors, parameters(base.model)
    block, width, key_heads, per_key = "language_model.model.layers.0.linear_attn", 32, 2, 3
    start = 2 * key_heads * width
    qkv, z = (np.array(ours[f"{block}.in_proj_{part}.weight"]) for part in ("qkv", "z"))
    out, a_log = np.array(ours[f"{block}.out_proj.weight"]), np.array(ours[f"{block}.A_log"])
    kernel = np.array(ours[f"{block}.conv1d.weight"])
    theirs = {name: tensors[f"blk.0.{name}"].dequantize() for name in ("attn_qkv.weight", "attn_gate.weight")}
    theirs |= {name: tensors[f"blk.0.{name}"].dequantize() for name in ("ssm_out.weight", "ssm_a", "ssm_conv1d.weight")}
    assert (theirs["attn_qkv.weight"][:start] == qkv[:start]).all()
    for key in range(key_heads):
        for nth in range(per_key):
            here, there = key * per_key + nth, nth * key_heads + key
            rows, their_rows = (slice(head * width, (head + 1) * width) for head in (here, there))
            assert (theirs["attn_gate.weight"][their_rows] == z[rows]).all()
            assert (theirs["ssm_out.weight"][:, their_rows] == out[:, rows]).all()
            assert (theirs["attn_qkv.weight"][start:][their_rows] == qkv[start:][rows]).all()
            assert (theirs["ssm_conv1d.weight"][start:][their_rows] == kernel[start:, :, 0][rows]).all()
            assert theirs["ssm_a"][there] == pytest.approx(-np.exp(a_log[here]), rel=1e-6)
    assert (theirs["attn_gate.weight"] != z).any()


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q4_1, Kind.Q8_0, Kind.Q6_K])
@pytest.mark.parametrize("inner", [64, 16])
def test_columns_move_in_whole_groups_or_are_packed_anew(kind, inner):
    tensor = random_tensor(kind)  # (6, 512)
    mapping = TensorMapping("x.weight", columns=Order(1, 2, 256 // inner, inner))
    wanted = tensor.dequantize()[:, mapping.columns.from_file(512)]
    (found,) = import_weights({"t": tensor}, {"t": mapping}, "carry", mx.float32)
    values = np.array(mx.dequantize(*found.parameters.values(), **found.quantization.layout))
    assert found.lossless == (kind is not Kind.Q6_K and inner % 32 == 0)
    error = np.linalg.norm(values - wanted) / np.linalg.norm(wanted)
    assert error < (1e-6 if found.lossless else 0.01)
    assert np.linalg.norm(values - tensor.dequantize()) > 0.5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("order", [Order(3, 2, -1, 1), Order(1, 2, 3, -1, start=6), Order(1, 4, 2, 1)])
def test_orders_there_and_back(order):
    length = {1: 24, 3: 24}[order.outer] if order != Order(1, 4, 2, 1) else 8
    rows = np.arange(length)
    moved = rows[order.to_file(length)]
    assert (moved[order.from_file(length)] == rows).all()
    assert (moved != rows).any()
    assert (moved[: order.start] == rows[: order.start]).all()


# --- what published files have beside


def changed(path: Path, **tensors: Any) -> GGUFFile:
    """Return a file with tensors taken away (None) or put in (arrays of float32)."""
    file = read_gguf(path)
    for name, values in tensors.items():
        if values is None:
            del file.tensors[name]
        else:
            rows = np.ascontiguousarray(values, "<f4").reshape(-1, values.shape[-1])
            file.tensors[name] = GGUFTensor(name, Kind.F32, values.shape, rows.view(np.uint8))
    return file


def test_experts_are_read_joined_or_apart(written):
    for name, ours in (("qwen35moe", "mlp.switch_mlp"), ("gemma4 experts", "experts.switch_glu")):
        base, path = written(name)
        held, both = read_gguf(path).tensors, {}
        joined, apart = "blk.1.ffn_gate_up_exps.weight", ("blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight")
        if joined in held:
            both = dict(zip(apart, np.split(held[joined].dequantize(), 2, axis=1), strict=True)) | {joined: None}
        else:
            both = {joined: np.concatenate([held[part].dequantize() for part in apart], axis=1)}
            both |= dict.fromkeys(apart)
        file = changed(path, **both)
        mappings = weight_map(file, model_config(file))
        own = {part: mappings[part] for part in (joined, *apart) if part in mappings}
        found = {
            key: value
            for one in import_weights(file.tensors, own, "float", mx.float32)
            for key, value in one.parameters.items()
        }
        assert len(found) == 2
        for key, value in found.items():
            assert ours in key
            assert mx.array_equal(value, parameters(base.model)[key])


def test_keys_that_nobody_uses_and_layers_that_guess_ahead_are_left_out(written):
    _, path = written("gemma4")
    file = changed(path, **{"blk.5.attn_k.weight": np.zeros((128, 64)), "blk.5.attn_k_norm.weight": np.zeros((64,))})
    assert not {"blk.5.attn_k.weight", "blk.5.attn_k_norm.weight"} & weight_map(file, model_config(file)).keys()
    _, path = written("qwen35")
    file = changed(path, **{"blk.4.nextn.eh_proj.weight": np.zeros((64, 128))})
    file.metadata.update({"qwen35.block_count": 5, "qwen35.nextn_predict_layers": 1})
    config = model_config(file)
    assert config["num_hidden_layers"] == 4
    assert "blk.4.nextn.eh_proj.weight" not in weight_map(file, config)
    stray = changed(path, **{"blk.3.nextn.eh_proj.weight": np.zeros((64, 128))})
    with pytest.raises(InputError, match="nextn"):
        weight_map(stray, config)


# --- MXFP4


def all_mxfp4_blocks() -> GGUFTensor:
    """One block of each exponent whose values float32 holds, with random codes: (125, 64)."""
    codes = np.random.default_rng(0).integers(0, 256, (250, 16)).astype(np.uint8)
    blocks = np.concatenate([np.arange(1, 251, dtype=np.uint8)[:, None], codes], axis=1)
    return GGUFTensor("t", Kind.MXFP4, (125, 64), blocks.reshape(125, 34))


def test_mxfp4_is_carried_bit_for_bit_and_means_the_same():
    tensor = all_mxfp4_blocks()
    packed = carry_blocks(tensor, mx.float32)
    assert [str(array.dtype) for array in packed.arrays] == ["mlx.core.uint32", "mlx.core.uint8"]
    assert (mxfp4_blocks(packed) == tensor.data).all()
    found, wanted = np.array(packed.dequantize().astype(mx.float32)), tensor.dequantize()
    assert (found == wanted).all()
    assert len(np.unique(np.abs(wanted))) > 250
    other = dataclasses.replace(tensor, data=tensor.data.copy())
    other.data[40, 3] ^= 0x10
    differing = np.argwhere(np.array(carry_blocks(other, mx.float32).dequantize().astype(mx.float32)) != found)
    assert differing.tolist() == [[40, 18]]  # the high half of byte 2 of the first block: code 16 + 2


def test_published_gpt_oss_blocks_become_ggml_blocks_of_the_same_values():
    """Hugging Face's layout: codes in pairs, low half first; rows of gate and up in turns."""
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (2, 8, 2, 16)).astype(np.uint8)  # (E, 2 * width, groups, bytes)
    scales = rng.integers(110, 140, (2, 8, 2)).astype(np.uint8)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(2, 8, 2, 32)
    wanted = (table[codes] * np.exp2(scales.astype(np.float32) - 127)[..., None]).reshape(2, 8, 64)
    model, _ = tiny_family("gpt-oss")
    prefix = "model.layers.0.mlp.experts"
    sane = model.sanitize(
        {f"{prefix}.gate_up_proj_blocks": mx.array(blocks), f"{prefix}.gate_up_proj_scales": mx.array(scales)}
    )
    for part, rows in (("gate_proj", slice(0, None, 2)), ("up_proj", slice(1, None, 2))):
        packed = carry_blocks(all_mxfp4_blocks(), mx.float32)
        arrays = [sane[f"{prefix}.{part}.{name}"] for name in ("weight", "scales")]
        stored = mxfp4_blocks(dataclasses.replace(packed, arrays=arrays))
        assert stored.shape == (2, 4, 34)
        assert (gguf.quants.dequantize(stored, Kind.MXFP4) == wanted[:, rows]).all()
    assert (wanted[:, ::2] != wanted[:, 1::2]).any()


@pytest.fixture(scope="module")
def mxfp4_folder(tmp_path_factory) -> Path:
    model, config = with_quantized_experts(*tiny_family("gpt-oss"))
    return write_family(
        "gpt-oss", tmp_path_factory.mktemp("mxfp4") / "m", model, {"quantization": config["quantization"]}
    )


def test_mxfp4_experts_stay_as_they_are_from_folder_to_file_and_back(mxfp4_folder, tmp_path):
    base = load(mxfp4_folder)
    write_gguf_model(tmp_path / "m.gguf", base, name="m")
    file = read_gguf(tmp_path / "m.gguf")
    for part in ("gate", "up", "down"):
        assert file.tensors[f"blk.2.ffn_{part}_exps.weight"].type is Kind.MXFP4
        assert file.tensors[f"blk.2.ffn_{part}_exps.bias"].type is Kind.F32
    assert file.tensors["blk.2.attn_q.weight"].type is Kind.F16
    layer = base.model.layers[2].mlp.experts.up_proj
    wanted = np.array(mx.dequantize(layer.weight, layer.scales, group_size=32, bits=4, mode="mxfp4").astype(mx.float32))
    assert (file.tensors["blk.2.ffn_up_exps.weight"].dequantize() == wanted).all()
    ours, theirs = parameters(base.model), parameters(load(tmp_path / "m.gguf").model)
    packed = [key for key in ours if ".experts." in key and not key.endswith("bias")]
    assert len(packed) == 4 * 3 * 2
    for key in packed:
        assert ours[key].dtype == theirs[key].dtype
        assert mx.array_equal(ours[key], theirs[key]), key


def test_an_adapted_expert_is_no_mxfp4_any_more_and_f32_is_f32(mxfp4_folder, tmp_path):
    adapt_and_save(mxfp4_folder, tmp_path / "a", "up_proj")
    base = load(mxfp4_folder, tmp_path / "a")
    write_gguf_model(tmp_path / "m.gguf", base, name="m")
    file = read_gguf(tmp_path / "m.gguf")
    assert file.tensors["blk.1.ffn_up_exps.weight"].type is Kind.F16
    assert file.tensors["blk.1.ffn_down_exps.weight"].type is Kind.MXFP4
    write_gguf_model(tmp_path / "f.gguf", base, gguf_type="f32", name="m")
    assert {tensor.type for tensor in read_gguf(tmp_path / "f.gguf").tensors.values()} == {Kind.F32}
    assert mx.allclose(load(tmp_path / "f.gguf").model(IDS), base.model(IDS), rtol=1e-4, atol=1e-4)


# --- adapters


@pytest.mark.parametrize(
    ("name", "targets", "tensor", "parts"),
    [
        ("qwen3moe", "down_proj", "ffn_down_exps", ["mlp.switch_mlp.down_proj"]),
        (
            "gemma4 experts",
            "gate_proj,up_proj",
            "ffn_gate_up_exps",
            ["experts.switch_glu.gate_proj", "experts.switch_glu.up_proj"],
        ),
        ("gemma4 experts", "up_proj", "ffn_gate_up_exps", ["", "experts.switch_glu.up_proj"]),
        ("phi3", "qkv_proj", "attn_qkv", ["self_attn.qkv_proj"]),
    ],
)
def test_an_adapter_file_holds_the_update_of_each_tensor(name, targets, tensor, parts, tmp_path):
    folder = write_family(name, tmp_path / "m")
    adapt_and_save(folder, tmp_path / "a", targets)
    base = load(folder, tmp_path / "a")
    write_gguf_adapter(tmp_path / "a.gguf", base.model, "m")
    file = read_gguf(tmp_path / "a.gguf")
    a, b = (file.tensors[f"blk.1.{tensor}.weight.lora_{side}"].dequantize() for side in "ab")
    update = b @ a * file.metadata["adapter.lora.alpha"] / a.shape[-2]
    deltas = [np.array(adapter_layers(base.model)[f"model.layers.1.{part}"].delta()) for part in parts if part]
    if len(parts) > len(deltas):
        deltas = [np.zeros_like(deltas[0]), *deltas]
    np.testing.assert_allclose(update, np.concatenate(deltas, axis=-2), rtol=1e-4, atol=1e-5)
    assert np.abs(update).max() > 0.01


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"max_position_embeddings": 4096, "model_type": "gpt_oss"}, 4096),
        ({"model_type": "gpt_oss"}, 131072),  # which mlx-lm has no argument for
        ({"text_config": {"max_position_embeddings": 8192}, "max_position_embeddings": 5}, 8192),
        # Published multimodal Gemma 3 leaves it to transformers, whose default is not mlx-lm's.
        ({"text_config": {"model_type": "gemma3_text"}, "model_type": "gemma3"}, 131072),
        ({"text_config": {}, "model_type": "gemma3"}, 131072),
        ({"model_type": "unheard-of"}, 128),
    ],
)
def test_the_context_is_the_configs_then_transformers(config, wanted):
    model, _ = tiny_family("qwen3moe", changes={"max_position_embeddings": 128})
    assert context_length(model, config) == wanted


def test_the_file_has_the_context_of_the_config(written):
    base, path = written("gpt-oss")
    assert read_gguf(path).metadata["gpt-oss.context_length"] == base.config["max_position_embeddings"] != 2048


# --- refusals

CANNOT_WRITE = [
    ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("qwen3moe", {"mlp_only_layers": [1]}, "blocks without experts"),
    ("qwen3moe", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling yarn"),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0, "long_factor": [1.0]}}, "rope_scaling linear"),
    ("gpt-oss", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
    ("lfm2", {"conv_bias": True}, "conv_bias"),
    ("qwen35", {"linear_value_head_dim": 64}, "linear_value_head_dim 64"),
    ("gemma4", {"rope_traditional": True}, "rope_traditional"),
]


@pytest.mark.parametrize(("name", "changes", "words"), CANNOT_WRITE, ids=[f"{a} {w}" for a, _, w in CANNOT_WRITE])
def test_settings_that_llamacpp_lacks_are_refused(name, changes, words):
    model, _ = tiny_family(name, changes=changes)
    with pytest.raises(InputError, match=f"{words}.*llama.cpp's {architecture(name)} does not support this"):
        gguf_settings(model, architecture(name))
    whole, _ = tiny_family(name)
    assert gguf_settings(whole, architecture(name))[0]["block_count"] == len(whole.layers)


CANNOT_READ = [
    ("qwen3moe", {"expert_count": 10**9}, "expert_count"),
    ("qwen3moe", {"rope.scaling.type": "yarn"}, "has no scaling"),
    ("phi3 longrope", {"rope.scaling.attn_factor": 2.0}, "attn_factor"),
    ("gpt-oss", {"expert_used_count": 7}, "with 7 in use"),
    ("lfm2", {"attention.head_count_kv": np.array([0, 2, 0, 1])}, "head_count_kv"),
    ("qwen35", {"ssm.inner_size": 100}, "ssm: 6 value heads"),
    ("qwen35", {"full_attention_interval": 9}, "attention in every 9"),
    ("gemma4", {"attention.sliding_window_pattern": 6}, "sliding_window_pattern"),
    ("gemma4", {"rope.dimension_count_swa": 16}, "dimension_count_swa is 16"),
    ("gemma4", {"feed_forward_length": np.array([96, 96, 96, 96, 96, 192])}, "feed_forward_length"),
]


@pytest.mark.parametrize(("name", "changes", "words"), CANNOT_READ, ids=[f"{a} {w}" for a, _, w in CANNOT_READ])
def test_files_that_mlx_lm_cannot_express_are_refused(name, changes, words, written):
    file = read_gguf(written(name)[1])
    model_config(file)
    file.metadata.update({f"{architecture(name)}.{key}": value for key, value in changes.items()})
    with pytest.raises(InputError, match=words):
        model_config(file)


NASTY = [0, 1, 3, 2**40, -1, -0.5, float("nan"), True, "text", [], ["a"], np.zeros(0, np.int32), np.array([1, 2])]
NASTY += [np.array([2**31 - 1] * 64), np.array([0.5] * 64), np.array([True, False] * 32), None]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_no_setting_leads_to_anything_but_one_line(name, written):
    file = read_gguf(written(name)[1])
    whole, told = dict(file.metadata), []
    for key in [key for key in whole if key.startswith(f"{architecture(name)}.")]:
        for value in NASTY:
            file.metadata.clear()
            file.metadata.update(
                whole | {key: value} if value is not None else {k: v for k, v in whole.items() if k != key}
            )
            try:
                config = model_config(file)
                mappings = weight_map(file, config)
                shapes = {ours: array.shape for ours, array in parameters(build_model(config)).items()}
                check_shapes("m.gguf", file.tensors, mappings, shapes)
            except InputError as error:
                told.append(str(error))
    assert len(told) > 100
    assert not [line for line in told if "\n" in line or len(line) > 1500]


def test_an_adapter_of_what_is_scaled_expert_by_expert_is_refused(tmp_path):
    folder = write_family("gemma4 experts", tmp_path / "m")
    adapt_and_save(folder, tmp_path / "a", "down_proj")
    base = load(folder, tmp_path / "a")
    with pytest.raises(InputError, match=r"switch_glu\.down_proj has a scale for each expert.*fuse it instead"):
        write_gguf_adapter(tmp_path / "a.gguf", base.model, "m")
    assert not (tmp_path / "a.gguf").exists()


def test_an_unknown_architecture_lists_what_is_known(written):
    file = read_gguf(written("phi3")[1])
    file.metadata["general.architecture"] = "rwkv7"
    with pytest.raises(InputError, match="'rwkv7' cannot be read from GGUF \\(supported: " + ", ".join(ARCHITECTURES)):
        model_config(file)
