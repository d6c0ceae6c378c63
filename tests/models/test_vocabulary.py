"""Token ids that a model has no row for are refused, whatever its config calls its parts."""

from __future__ import annotations

import mlx.nn as nn
import pytest
from architectures.build import tiny_architecture, tiny_config, write_architecture

from mlx_lora.config.settings import ModelSettings
from mlx_lora.models.load import check_token_ids, embedding_rows, load_base
from mlx_lora.utils.errors import InputError


@pytest.mark.parametrize("kind", ["mistral3", "qwen3_vl", "gemma3", "baichuan_m1", "youtu_llm"])
def test_ids_without_a_row_are_refused(kind, tmp_path):
    """Wrappers keep the vocabulary's size elsewhere, and some models keep no settings at all."""
    config = tiny_config(kind)
    for part in (config, config.get("text_config", config)):
        if "vocab_size" in part:
            part["vocab_size"] = 280
    base = load_base(ModelSettings(model=str(write_architecture(tmp_path / kind, kind, config=config))))
    check_token_ids(base, 279, "--data x")
    with pytest.raises(InputError, match=r"has token 280, and --model .* only has 280"):
        check_token_ids(base, 280, "--data x")


@pytest.mark.parametrize("kind", ["gpt2", "gemma3n", "qwen2_vl"])
def test_only_the_embedding_of_the_ids_counts(kind):
    """GPT-2 has another of positions, Gemma 3n one of each block; the config is not asked."""
    model = tiny_architecture(kind)
    others = [module.weight.shape for module in model.modules() if isinstance(module, nn.Embedding)]
    assert len(others) == (1 if kind == "qwen2_vl" else 2)
    assert embedding_rows(model, {}) == 288


def test_watching_leaves_the_model_as_it_was():
    model = tiny_architecture("llama")
    before = {path: (type(module), tuple(module)) for path, module in model.named_modules()}
    assert embedding_rows(model, {"vocab_size": 5}) == 288
    assert {path: (type(module), tuple(module)) for path, module in model.named_modules()} == before


def test_a_model_that_embeds_in_its_own_way_is_asked_through_its_config():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 4).weight

        def __call__(self, ids):
            return self.table[ids]

    assert embedding_rows(Own(), {"text_config": {"vocab_size": 7}, "vocab_size": 9}) == 7
    assert embedding_rows(Own(), {}) is None
