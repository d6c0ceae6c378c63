"""A model built from its config alone has the parameters that mlx-lm's loader gives it."""

from __future__ import annotations

import ast
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import pytest
from architectures.build import tiny_config, write_architecture
from architectures.configs import CONFIGS, ways
from mlx.utils import tree_flatten

from mlx_lora.models.convert import TIED_BY_WEIGHTS
from mlx_lora.models.folder import load_weights
from mlx_lora.models.meta import outline_of


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in tree_flatten(model.parameters())}


# Of each way that families have with their heads and with `sanitize`; the others are slow only together.
QUICK = {
    "afm7", "cohere", "cohere2", "ernie4_5", "exaone", "exaone4", "falcon_h1", "gemma", "gemma2", "gemma3",
    "gemma3_text", "gemma3n", "glm4", "gpt_bigcode", "olmo3", "phi3", "qwen2_vl", "qwen3_5", "qwen3_vl",
    "recurrent_gemma", "starcoder2", "talkie",
}  # fmt: skip
# Not on a CPU, or not at all: mlx-lm itself cannot load these when their configs say that they are tied.
UNLOADABLE = {"bitnet", "muse_spark", "olmo"}
NOT_TIED = {"minicpm", "qwen3_vl_moe"}


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow)
        for kind in sorted(CONFIGS.keys() - UNLOADABLE)
    ],
)
def test_an_outline_has_what_the_loader_makes(kind, tmp_path):
    """With a config that says tied and with one that does not; from the folder and from the config alone."""
    found = {}
    for tied in ways(kind) if kind not in NOT_TIED else (False,):
        folder = write_architecture(tmp_path / str(tied), kind, tied)
        loaded = shapes(load_weights(folder, trust_remote_code=False)[0])
        assert shapes(outline_of(str(folder), dtype=mx.float32).model) == loaded
        if "quantization" not in tiny_config(kind):
            assert shapes(outline_of(str(folder / "config.json"), dtype=mx.float32).model) == loaded
        found[tied] = loaded
    if kind in ("gemma3", "gemma3_text", "recurrent_gemma", "qwen3_vl"):
        assert any("lm_head" in name for name in found[False])
        assert not any("lm_head" in name for name in found[True])


def test_a_stored_head_is_kept_whatever_the_config_says(tmp_path):
    untied = write_architecture(tmp_path / "g", "gemma3_text", tied=False)
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
