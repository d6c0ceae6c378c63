"""Each name that another package does not promise is there; without it, one line says which, and what it was for."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from byte_tokenizer import byte_tokenizer
from mlx_lm.models.cache import BatchKVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_lora.compat import foreign
from mlx_lora.compat.foreign import Foreign

NAMES = {name: value for name, value in vars(foreign).items() if isinstance(value, Foreign)}
# Those that an instance has, and not its class.
INSTANCES = {
    "TOKENIZER": lambda: TokenizerWrapper(byte_tokenizer()),
    "LENGTH": lambda: BatchKVCache([0, 1]),
    "KEPT_SHARE": nn.Dropout,
}
PROJECT = (Path(__file__).parents[2] / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    "name", sorted(NAMES.keys() - {"INTERCEPTION"})
)  # served in tests/rollouts/test_verifiers_env.py
def test_it_is_there(name):
    package = NAMES[name].owner.partition(":")[0].partition(".")[0]
    pytest.importorskip(package)
    instance = INSTANCES[name]() if name in INSTANCES else None
    assert NAMES[name].of(instance) is not None


def test_a_missing_one_is_named_with_what_it_is_for():
    gone = Foreign("mlx_lm.utils", "_gone", "models are found")
    line = r"mlx-lm \d\S+ has no _gone in mlx_lm.utils, by which models are found"
    for instance in (None, mx):
        with pytest.raises(AttributeError) as error:
            gone.of(instance)
        assert re.fullmatch(line, str(error.value))
    with pytest.raises(ImportError):
        Foreign("no_package.part", "name", "nothing is found").of()


@pytest.mark.parametrize("package", sorted({one.owner.partition(":")[0].partition(".")[0] for one in NAMES.values()}))
def test_its_package_has_an_upper_limit(package):
    found = re.findall(rf'"{package.replace("_", "-")}(?:\[\w+\])?>=[\d.]+(,<\d+(?:\.\d+)*)?', PROJECT)
    assert found
    assert all(found)
