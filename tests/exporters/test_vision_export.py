"""Adapters of vision-language models for other programs: mlx-vlm and PEFT compute the same logits with them."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from run_cli import one_line, run, succeeds
from tiny_vision import write_model
from vision_judge import judge_inputs, judge_processor
from vision_rows import chats_of, picture, read_rows, write_rows

from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.models.image_inputs import prepare_rotation, with_images

pytest.importorskip("mlx_vlm")
BAR = 1e-4


# Families with what is trained beside the language model.
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "smolvlm": ("smolvlm", ()),
    "llava": ("llava", ()),
    "smolvlm, tower": ("smolvlm", ("--train-connector", "lora", "--train-vision", "lora")),
    "qwen2_5_vl, tower in full": ("qwen2_5_vl", ("--train-connector", "full", "--train-vision", "full")),
    "llava, connector in full": ("llava", ("--train-connector", "full", "--train-vision", "lora")),
    "gemma3, connector in full": ("gemma3", ("--train-connector", "full")),
    "gemma4": ("gemma4", ("--train-connector", "lora")),
    "gemma4_31b, tower": ("gemma4_31b", ("--train-vision", "lora")),
    "qwen3_5, tower": ("qwen3_5", ("--train-connector", "lora", "--train-vision", "lora")),
    "mistral3, tower": ("mistral3", ("--train-connector", "lora", "--train-vision", "lora")),
    "pixtral, tower": ("pixtral", ("--train-connector", "lora", "--train-vision", "lora")),
    "paligemma2, tower": ("paligemma2", ("--train-connector", "lora", "--train-vision", "lora")),
}


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory):
    """A tiny model as transformers writes it, rows, and an adapter."""
    pytest.importorskip("torch")
    root, (family, more) = tmp_path_factory.mktemp("exported"), CASES[request.param]
    model, data = write_model(family, root / "model"), write_rows(root / "data", chats_of(family) * 2)
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["rope_theta"] = 10000.0  # as in published files: mlx-vlm does not read rope_parameters
    if family.startswith("gemma4"):  # nor per_layer_config, nor another padding token than 0
        heads = 1 if family == "gemma4_31b" else None
        config["text_config"] |= {"global_head_dim": 32, "num_global_key_value_heads": heads, "pad_token_id": 0}
    (model / "config.json").write_text(json.dumps(config))
    succeeds("train", "--model", model, "--data", data, "--adapter-path", root / "adapter",
              "--iters", 3, "--batch-size", 3, "--learning-rate", "2e-2", "--rank", 4, "--kernels", "ours", "--valid-fraction", 0, *more)  # fmt: skip
    return request.param, root


def own_logits(root: Path, adapter: Path | None):
    """Return our logits (T, V) of the first row, its tokens, and what the tower takes of its picture."""
    rows = read_rows(root / "model", root / "data" / "train.jsonl", trains=False)
    if adapter:
        load_adapter(rows.base, adapter)
    prepare_rotation(rows.base.model, rows.objective.vision.spec)
    tokens, mask = rows.rows.row(0)
    prompts = np.array([mask.argmax()])
    (digest,) = rows.objective.table.of_numbers(rows.rows.pictures, len(rows.rows))[0]
    vision = rows.objective.vision
    with with_images(rows.base.model, vision.spec, vision.arrays(tokens[None], [(digest,)], prompts)):
        logits = np.array(rows.base.model(mx.array(tokens[None])))[0]
    return logits, tokens, vision.processor.pixels(rows.objective.table.pictures[digest].pixels())


@pytest.mark.parity
def test_mlx_vlm_computes_the_same_with_an_exported_adapter(trained, tmp_path):
    from mlx_vlm.trainer.peft.utils import apply_lora_layers
    from mlx_vlm.utils import load_model

    case, root = trained
    if "full" in case:
        one_line(run("export", "--model", root / "model", "--adapter-path", root / "adapter", "--to", "mlx-vlm", "--out", tmp_path / "v"), "fuse")  # fmt: skip
        return
    if case == "gemma4_31b, tower":
        one_line(run("export", "--model", root / "model", "--adapter-path", root / "adapter", "--to", "mlx-vlm", "--out", tmp_path / "v"), "fuse")  # fmt: skip
        return
    if CASES[case][0] in ("llava", "pixtral", "paligemma2"):
        pytest.skip("mlx-vlm does not read the names that transformers 5 gives this model or its tower")
    succeeds("export", "--model", root / "model", "--adapter-path", root / "adapter", "--to", "mlx-vlm", "--out", tmp_path / "v")  # fmt: skip
    (expected, tokens, pixels), (base, *_) = own_logits(root, root / "adapter"), own_logits(root, None)
    theirs = apply_lora_layers(load_model(root / "model"), tmp_path / "v")
    arrays = {name: mx.array(value) for name, value in pixels.items()}
    found = np.array(theirs(mx.array(tokens[None]), arrays.pop("pixel_values"), mask=None, **arrays).logits)[0]
    largest = np.abs(expected).max()
    assert np.abs(found - expected).max() <= BAR * largest
    assert np.abs(base - expected).max() > 100 * BAR * largest


@pytest.mark.parity
def test_peft_computes_the_same_with_an_exported_adapter_and_we_read_it_back(trained, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    import transformers

    case, root = trained
    family, _ = CASES[case]
    succeeds("export", "--model", root / "model", "--adapter-path", root / "adapter", "--to", "peft", "--out", tmp_path / "p")  # fmt: skip
    expected, tokens, _ = own_logits(root, root / "adapter")
    again, *_ = own_logits(root, tmp_path / "p")
    assert np.abs(again - expected).max() <= BAR * np.abs(expected).max()
    base = transformers.AutoModelForImageTextToText.from_pretrained(root / "model", dtype=torch.float32)
    with pytest.warns(FutureWarning, match="checkpointing"):
        model = peft.PeftModel.from_pretrained(base, tmp_path / "p")
    turns, numbers = chats_of(family)[0]
    given = judge_inputs(judge_processor(root / "model"), turns, [picture(number) for number in numbers])
    assert given["input_ids"][0].tolist() == tokens.tolist()
    found = model(**given).logits[0].detach().numpy()
    assert np.abs(found - expected).max() <= BAR * np.abs(expected).max()


def test_a_model_that_sees_nothing_is_not_exported_to_mlx_vlm(tiny_folder, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"a{n}", "completion": "b"}) for n in range(4)))
    succeeds("train", "--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / "a", "--iters", 1,
              "--valid-fraction", 0, "--sample-tokens", 0, "--kernels", "mlx")  # fmt: skip
    one_line(run("export", "--model", tiny_folder, "--adapter-path", tmp_path / "a", "--to", "mlx-vlm", "--out", tmp_path / "v"), "mlx-lm")  # fmt: skip
