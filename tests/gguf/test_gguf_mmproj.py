"""The tower of a vision-language model as llama.cpp's mmproj: what the file holds, and what cannot be written."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
from gguf_pictures import adapt, load, write_model
from mlx.utils import tree_flatten
from run_cli import one_line, passed, run, succeeds

from mlx_lora.gguf.mmproj import PROJECTORS, mmproj_of
from mlx_lora.gguf.reader import read_gguf
from mlx_lora.models.vision import stored_tower
from mlx_lora.utils.errors import InputError

pytest.importorskip("mlx_vlm")
FAMILIES = sorted(PROJECTORS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function that writes a family's model once."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = write_model(family, tmp_path_factory.mktemp(family) / "m")
        return made[family]

    return folder


def export(folder, out, *more):
    return run("export", "--model", folder, "--to", "gguf", "--out", out, "--gguf-type", "f32", *more)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_the_tower_is_in_the_file(family, folders, tmp_path):
    mmproj = mmproj_of(load(folders(family)), "f32")
    mmproj.write(tmp_path / "mmproj.gguf", "tiny")
    file = read_gguf(tmp_path / "mmproj.gguf")
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 200).mapping.values()
    names = {name for _, name in known}
    assert not [
        name for name in file.tensors if name.removesuffix(".1").rpartition(".")[0] not in names | {"v.token_embd"}
    ]
    written = sum(int(np.prod(tensor.shape)) for tensor in file.tensors.values())
    model, _ = stored_tower(folders(family))
    whole = sum(array.size for _, array in tree_flatten(model.parameters()))
    line_end = file.tensors.get("v.token_embd.img_break")
    assert written - (0 if line_end is None else line_end.shape[0]) == whole
    assert file.metadata["general.architecture"] == "clip"
    assert file.metadata["clip.vision.block_count"] == 2
    assert file.metadata["clip.vision.projection_dim"] == 64


def test_matrices_are_of_16_bits_unless_asked_otherwise_and_norms_never(folders, tmp_path):
    base = load(folders("gemma3"))
    types = {}
    for asked in ("f32", "bf16", "q4_0", "f16"):
        mmproj_of(base, asked).write(tmp_path / f"{asked}.gguf", "tiny")
        tensors = read_gguf(tmp_path / f"{asked}.gguf").tensors
        types[asked] = tensors["v.blk.0.attn_q.weight"].type.name
        assert tensors["v.blk.0.ln1.weight"].type.name == tensors["v.patch_embd.weight"].type.name == "F32"
    assert types == {"f32": "F32", "bf16": "BF16", "q4_0": "F16", "f16": "F16"}


def test_a_kernel_over_two_frames_becomes_two(folders, tmp_path):
    model, _ = stored_tower(folders("qwen2_vl"))
    kernel = np.array(dict(tree_flatten(model.parameters()))["vision_tower.patch_embed.proj.weight"])
    mmproj_of(load(folders("qwen2_vl")), "f32").write(tmp_path / "m.gguf", "tiny")
    tensors = read_gguf(tmp_path / "m.gguf").tensors
    for frame, name in enumerate(("v.patch_embd.weight", "v.patch_embd.weight.1")):
        assert (tensors[name].dequantize()[3, 1, 5, 7] == kernel[3, frame, 5, 7, 1]).all()
    assert kernel[3, 0, 5, 7, 1] != kernel[3, 1, 5, 7, 1]


@pytest.mark.parametrize("family", ["smolvlm", "gemma3"])
def test_an_adapter_of_the_tower_is_folded_in(family, folders, tmp_path):
    adapter = adapt(folders(family), tmp_path / "a", tower=True)
    ran = passed(export(folders(family), tmp_path / "m.gguf", "--adapter-path", adapter))
    assert "--mmproj" in ran.err
    found = read_gguf(tmp_path / "mmproj-m.gguf").tensors
    mmproj_of(load(folders(family)), "f32").write(tmp_path / "plain.gguf", "tiny")
    plain = read_gguf(tmp_path / "plain.gguf").tensors
    base = load(folders(family), adapter)
    tower = base.model.vision_model if family == "smolvlm" else base.model.vision_tower.vision_model
    name = "v.blk.1.attn_q.weight"
    update = found[name].dequantize() - plain[name].dequantize()
    np.testing.assert_allclose(update, np.array(tower.encoder.layers[1].self_attn.q_proj.delta()), atol=1e-5)
    assert np.abs(update).max() > 0.01
    connector = {"smolvlm": "mm.model.fc.weight", "gemma3": "mm.input_projection.weight"}[family]
    assert np.abs(found[connector].dequantize() - plain[connector].dequantize()).max() > 0.01
    assert (found["v.post_ln.weight"].dequantize() == plain["v.post_ln.weight"].dequantize()).all()


def test_an_adapter_file_says_that_the_tower_is_not_in_it(folders, tmp_path):
    adapter = adapt(folders("smolvlm"), tmp_path / "a", tower=True)
    command = ("export", "--model", folders("smolvlm"), "--adapter-path", adapter)
    one_line(run(*command, "--to", "gguf-adapter", "--out", tmp_path / "a.gguf"), "vision tower", "--to gguf")
    one_line(run(*command, "--to", "ollama", "--out", tmp_path / "o"), "vision tower", "--to gguf")
    assert not (tmp_path / "a.gguf").exists()
    language = adapt(folders("smolvlm"), tmp_path / "l", tower=False)
    succeeds("export", "--model", folders("smolvlm"), "--adapter-path", language, "--to", "gguf-adapter", "--out", tmp_path / "a.gguf")  # fmt: skip
    assert "blk.0.attn_q.weight.lora_a" in read_gguf(tmp_path / "a.gguf").tensors


def test_an_earlier_tower_is_replaced_only_if_asked(folders, tmp_path):
    (tmp_path / "mmproj-m.gguf").write_text("mine")
    one_line(export(folders("smolvlm"), tmp_path / "m.gguf"), "mmproj-m.gguf", "--force")
    assert (tmp_path / "mmproj-m.gguf").read_text() == "mine"
    assert not (tmp_path / "m.gguf").exists()
    assert export(folders("smolvlm"), tmp_path / "m.gguf", "--force").code == 0
    assert read_gguf(tmp_path / "mmproj-m.gguf").metadata["clip.projector_type"] == "idefics3"


@pytest.mark.parametrize("family", ["llava", "gemma4"])
def test_a_tower_that_was_not_compared_is_left_out_with_a_word(family, folders, tmp_path):
    ran = passed(export(folders(family), tmp_path / "m.gguf"))
    assert "no pictures" in ran.err
    assert "blk.0.attn_q.weight" in read_gguf(tmp_path / "m.gguf").tensors
    assert not (tmp_path / "mmproj-m.gguf").exists()
    (tmp_path / "mmproj-m.gguf").write_text("of another model")
    one_line(export(folders(family), tmp_path / "m.gguf", "--force"), "mmproj-m.gguf")
    (tmp_path / "mmproj-m.gguf").unlink()
    adapter = adapt(folders(family), tmp_path / "a", tower=True)
    one_line(export(folders(family), tmp_path / "n.gguf", "--adapter-path", adapter), "vision tower", "fuse")
    assert not (tmp_path / "n.gguf").exists()


def test_paligemma_is_refused(folders, tmp_path):
    one_line(export(folders("paligemma"), tmp_path / "m.gguf"), "paligemma", "gemma")


def test_without_mlx_vlm_the_language_model_is_written_and_the_missing_package_named(folders, tmp_path, monkeypatch):
    folder = folders("smolvlm")
    monkeypatch.setitem(sys.modules, "mlx_vlm.utils", None)
    ran = passed(export(folder, tmp_path / "m.gguf"))
    assert "mlx-lora[vision]" in ran.err
    assert not (tmp_path / "mmproj-m.gguf").exists()


UNSUPPORTED = [
    ("qwen2_5_vl", "vision_config", {"window_size": 56}, "window_size"),
    ("qwen2_5_vl", "vision_config", {"fullatt_block_indexes": [0, 1]}, "fullatt_block_indexes"),
    ("smolvlm", "vision_config", {"hidden_act": "gelu"}, "hidden_act"),
    ("pixtral", "vision_config", {"rope_theta": 5000.0}, "rope_theta"),
]


@pytest.mark.parametrize(("family", "part", "changes", "words"), UNSUPPORTED, ids=[row[3] for row in UNSUPPORTED])
def test_what_llamacpps_tower_lacks_is_refused(family, part, changes, words, folders):
    base = load(folders(family))
    base = replace(base, config={**base.config, part: {**base.config[part], **changes}})
    with pytest.raises(InputError, match=words):
        mmproj_of(base, "f16")


def test_what_the_image_processor_must_do_is_checked(tmp_path):
    folder = write_model("gemma3", tmp_path / "m")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_pan_and_scan": True}))
    with pytest.raises(InputError, match="do_pan_and_scan"):
        mmproj_of(load(folder), "f16")


@pytest.mark.parametrize(("family", "architecture"), [("qwen2_vl", "qwen2vl"), ("qwen2_5_vl", "qwen2vl"), ("qwen3_vl", "qwen3vl"),
                         ("gemma3", "gemma3"), ("mistral3", "llama"), ("smolvlm", "llama"), ("qwen3_5", "qwen35")])  # fmt: skip
def test_the_language_model_has_the_architecture_that_llamacpp_puts_pictures_into(
    family, architecture, folders, tmp_path
):
    passed(export(folders(family), tmp_path / "m.gguf"))
    metadata = read_gguf(tmp_path / "m.gguf").metadata
    assert metadata["general.architecture"] == architecture
    if architecture.startswith("qwen"):
        assert metadata[f"{architecture}.rope.dimension_sections"].sum() == 8
    assert metadata.get("qwen3vl.n_deepstack_layers") == (2 if architecture == "qwen3vl" else None)


# As --model


def test_a_gguf_model_beside_its_tower_says_that_it_sees_no_pictures(folders, tmp_path, caplog):
    assert export(folders("gemma3"), tmp_path / "m.gguf").code == 0
    with caplog.at_level("INFO"):
        base = load(tmp_path / "m.gguf")
    assert "mmproj-m.gguf" in caplog.text
    assert "vision_config" not in base.config
    caplog.clear()
    (tmp_path / "mmproj-m.gguf").rename(tmp_path / "tower.bin")
    with caplog.at_level("INFO"):
        load(tmp_path / "m.gguf")
    assert "mmproj" not in caplog.text


def test_a_tower_as_the_model_is_refused(folders, tmp_path):
    mmproj_of(load(folders("smolvlm")), "f16").write(tmp_path / "mmproj-m.gguf", "tiny")
    one_line(run("plan", "--model", tmp_path / "mmproj-m.gguf"), "vision tower", "language model")
