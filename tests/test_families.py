"""Families of models that are made otherwise than Llama: what differs is borne, or refused in one plain line."""

from __future__ import annotations

import json

import pytest
from architectures.build import tiny_config, write_architecture

from mlx_lora.errors import InputError
from mlx_lora.models.tokenizer import load_folder_tokenizer


def test_a_config_that_transformers_refuses_is_not_blamed_on_the_tokenizer(tmp_path):
    config = tiny_config("gemma3")
    config["text_config"]["query_pre_attn_scalar"] = 16.5
    folder = write_architecture(tmp_path / "g", "gemma3", config=config)
    with pytest.raises(InputError, match=r"config.json: transformers refuses it \(.*query_pre_attn_scalar"):
        load_folder_tokenizer(folder, config, trust_remote_code=False)
    (folder / "config.json").write_text(json.dumps(tiny_config("gemma3")))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        load_folder_tokenizer(folder, config, trust_remote_code=False)
