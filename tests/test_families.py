"""Families of models that are made otherwise than Llama: what differs is borne, or refused in one plain line."""

from __future__ import annotations

import json

import pytest
from tiny_families import family_config, save_family

from mlx_lora.errors import InputError
from mlx_lora.models.tokenizer import load_folder_tokenizer


def test_a_config_that_transformers_refuses_is_not_blamed_on_the_tokenizer(tmp_path):
    config = family_config("gemma3", query_pre_attn_scalar=16.5)
    folder = save_family(tmp_path / "g", config)
    with pytest.raises(InputError, match=r"config.json: transformers refuses it \(.*query_pre_attn_scalar"):
        load_folder_tokenizer(folder, config, trust_remote_code=False)
    (folder / "config.json").write_text(json.dumps(family_config("gemma3")))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        load_folder_tokenizer(folder, config, trust_remote_code=False)
