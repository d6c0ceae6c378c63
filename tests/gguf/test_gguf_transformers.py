"""From transformers to llama.cpp: torch models with random weights, saved, loaded here, written as GGUF, heard there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from gguf_families import FAMILIES, MERGES
from gguf_judge import compare, judge, listen, prompts  # noqa: F401
from make_adapters import loaded

from mlx_lora.gguf.write import write_gguf_model

pytestmark = pytest.mark.parity
CLASSES = {
    "qwen3moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM"),
    "phi3 longrope": ("Phi3Config", "Phi3ForCausalLM"),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM"),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM"),
    "qwen35": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
    "qwen35moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"),
    "gemma4": ("Gemma4TextConfig", "Gemma4ForCausalLM"),
    "gemma4 values from keys": ("Gemma4TextConfig", "Gemma4ForCausalLM"),
    "gemma4 experts": ("Gemma4TextConfig", "Gemma4ForCausalLM"),
}


def torch_model(name: str, folder: Path) -> Any:
    """Save transformers' model of a case with random weights as it saves them; returns it."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.set_num_threads(1)
    config_class, model_class = (getattr(transformers, part) for part in CLASSES[name])
    config = json.loads(json.dumps({key: value for key, value in FAMILIES[name].items() if key != "model_type"}))
    config |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 260}
    if name == "gpt-oss":  # as published it is false, which neither mlx-lm nor llama.cpp heeds
        config["rope_scaling"]["truncate"] = True
    if "qwen35" in name:
        config["layer_types"] = ["linear_attention", "full_attention"] * 2
    model = model_class(config_class(**config)).eval().float()
    torch.manual_seed(5)
    tied = config["tie_word_embeddings"]
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn_like(value)
            if "embed_tokens" in key:
                value.copy_(noise * (0.06 if tied else 1.0))
            elif value.ndim == 1:
                value.add_(0.2 * noise)
            elif "experts" in key and name == "gpt-oss" and "bias" not in key:  # (E, in, out)
                value.copy_(noise * 1.2 / value.shape[-2] ** 0.5)
            elif "conv" in key and value.ndim == 3:
                value.copy_(0.5 * noise)
            else:
                value.copy_(noise * 1.2 / value.shape[-1] ** 0.5)
    _save(name, model, folder)
    return model


def _save(name: str, model: Any, folder: Path) -> None:
    """Write a folder as such models are published."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | FAMILIES[name]
    if "qwen35" in name:  # multimodal, and mlx-lm knows no others
        config = {"model_type": FAMILIES[name]["model_type"], "text_config": config, "vocab_size": 288}
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 260}))
    byte_tokenizer(merges=MERGES).save_pretrained(folder)
    if name not in ("qwen35moe", "gpt-oss", "gemma4 experts"):
        return
    # transformers 5 writes experts otherwise than the published files have them.
    weights = {key: mx.array(value.numpy()) for key, value in model.state_dict().items()}
    if FAMILIES[name]["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    if name == "gpt-oss":
        for key in [key for key in weights if key.endswith(("gate_up_proj", "gate_up_proj_bias"))]:
            both, (start, _, kind) = weights.pop(key), key.partition("gate_up_proj")
            for part, first in (("gate_proj", 0), ("up_proj", 1)):
                turn = both[..., first::2]
                weights[f"{start}{part}.{'bias' if kind else 'weight'}"] = turn if kind else turn.swapaxes(1, 2)
        for key in [key for key in weights if key.endswith(("down_proj", "down_proj_bias"))]:
            value, stem = weights.pop(key), key.removesuffix("_bias")
            weights[f"{stem}.{'bias' if value.ndim == 2 else 'weight'}"] = (
                value if value.ndim == 2 else value.swapaxes(1, 2)
            )
    for file in folder.glob("*.safetensors"):
        file.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})


@pytest.mark.parametrize("name", CLASSES)
def test_llamacpp_says_what_transformers_says(name, judge, tmp_path, capsys):  # noqa: F811
    import torch

    theirs = torch_model(name, tmp_path / "m")
    base = loaded(tmp_path / "m", dtype="float32")
    write_gguf_model(tmp_path / "m.gguf", base, gguf_type="f32", name="m")
    # Before its original context is full, transformers takes LongRoPE's other factors.
    asked = prompts((70, 80)) if name == "phi3 longrope" else prompts()
    heard = listen(judge.start_llamacpp(tmp_path / "m.gguf", flash_attention=False), asked)

    def logits(ids: mx.array) -> mx.array:
        with torch.no_grad():
            return mx.array(theirs(torch.tensor(np.array(ids), dtype=torch.long)).logits.numpy())

    found, bar = compare(logits, asked, heard), 0.05 if name.startswith("gemma4") else 5e-4
    with capsys.disabled():
        print(f"\n| {name} | {found.same} of {found.n_tokens} | {found.median:.1e} | {found.worst:.1e} |", end=" ")
    assert found.n_distinct > 10
    assert found.same >= found.n_tokens - (2 if name.startswith("gemma4") else 0)
    assert found.worst < bar
    with torch.no_grad():
        next(value for value in theirs.parameters() if value.ndim == 1).mul_(0.5)
    assert compare(logits, asked, heard).worst > 10 * bar
