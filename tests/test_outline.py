"""A model built from its config alone has the parameters that mlx-lm's loader gives it."""

from __future__ import annotations

import ast
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import pytest
from mlx.utils import tree_flatten
from tiny_families import ALL, family_config, save_family

from mlx_lora.models.converting import TIED_BY_WEIGHTS
from mlx_lora.models.folder import load_weights
from mlx_lora.models.outline import outline_of


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in tree_flatten(model.parameters())}


@pytest.mark.parametrize("kind", ALL)
def test_an_outline_has_what_the_loader_makes(kind, tmp_path):
    """With a config that says tied and with one that does not; from the folder and from the config alone."""
    found = {}
    for tied in (True, False) if kind != "baichuan_m1" else (False,):  # tied, mlx-lm itself cannot run it
        folder = save_family(tmp_path / str(tied), family_config(kind, tie_word_embeddings=tied))
        loaded = shapes(load_weights(folder, trust_remote_code=False)[0])
        assert shapes(outline_of(str(folder), dtype=mx.float32).model) == loaded
        assert shapes(outline_of(str(folder / "config.json"), dtype=mx.float32).model) == loaded
        found[tied] = loaded
    if kind in ("llama", "gemma3", "gemma3_text", "recurrent_gemma", "qwen3_vl"):
        assert any("lm_head" in name for name in found[False])
        assert not any("lm_head" in name for name in found[True])


def test_a_stored_head_is_kept_whatever_the_config_says(tmp_path):
    untied = save_family(tmp_path / "g", family_config("gemma3_text", tie_word_embeddings=False))
    config = untied / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    assert "lm_head.weight" in shapes(load_weights(untied, trust_remote_code=False)[0])
    assert "lm_head.weight" in shapes(outline_of(str(untied), dtype=mx.float32).model)
    assert "lm_head.weight" not in shapes(outline_of(str(config), dtype=mx.float32).model)


def test_the_families_that_lose_their_head_on_loading_are_known():
    """Of a new mlx-lm too: `sanitize` changes the model itself in these architectures and in no other."""
    changing = set()
    for file in Path(mlx_lm.models.__path__[0]).glob("*.py"):
        text = file.read_text(encoding="utf-8")
        if "def sanitize" not in text:
            continue
        for function in ast.walk(ast.parse(text)):
            if isinstance(function, ast.FunctionDef) and function.name == "sanitize":
                called = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
                if called & {"self.pop", "self.update_modules", "setattr", "delattr"}:
                    changing.add(file.stem)
    assert changing == set(TIED_BY_WEIGHTS)
