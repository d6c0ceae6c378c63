"""llama.cpp answers about a picture, with our two files, as we answer: the same tokens, the same likelihoods.

The pictures have sizes that neither side changes, except SmolVLM's, which is also shown as a whole in fewer pixels; there it
has slopes that both ways of shrinking leave as they are.
"""

from __future__ import annotations

import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf_judge import LIKELY, N_PRINTABLE, judge  # noqa: F401
from gguf_pictures import adapt, load, ours, picture, theirs, write_model
from run_cli import run, succeeds

pytest.importorskip("mlx_vlm")
pytestmark = pytest.mark.parity
# Sizes of pictures, (width, height).
CASES = {
    "smolvlm": ((112, 112), (112, 56)),
    "idefics3": ((112, 112),),
    "gemma3": ((112, 112),),
    "qwen2_vl": ((56, 84), (112, 112)),
    "qwen2_5_vl": ((56, 84), (196, 140)),
    "qwen3_vl": ((32, 48), (64, 64)),
    "qwen3_5": ((32, 48), (64, 64)),
    "pixtral": ((64, 96), (112, 112)),
    "mistral3": ((84, 112), (112, 112)),
}
SMOOTH = ("smolvlm", "idefics3")
# What is left of rounding to 16 bits in llama.cpp's table of GELU, which random weights amplify. A picture's place or its
# pixels are worth 10 times as much and more.
BAR = 0.02


@pytest.fixture(autouse=True)
def gelu_of_16_bits(monkeypatch):
    """Let towers and Gemma 3 compute GELU here as llama.cpp does: its tanh form, looked up for 16-bit inputs."""
    activations = sys.modules["mlx.nn.layers.activations"]
    exact, fast = nn.gelu_approx, nn.gelu_fast_approx

    def rounded(x):
        return x.astype(mx.float16).astype(mx.float32)

    def table(x):
        return mx.where(x <= -10, 0.0, mx.where(x >= 10, x, rounded(exact(rounded(x)))))

    changes = {"gelu": table, "gelu_approx": table, "gelu_fast_approx": lambda x: rounded(fast(rounded(x)))}
    for name, function in changes.items():
        monkeypatch.setattr(activations, name, function)
        monkeypatch.setattr(nn, name, function)


def apart(rows, steps) -> float:
    """Return the largest difference of log-probabilities of likely tokens."""
    pairs = zip(rows, steps, strict=True)
    return max(abs(row[i] - value) for row, step in pairs for i, value in step.items() if value > LIKELY)


@pytest.mark.parametrize("tower", [False, True], ids=["language", "tower"])
@pytest.mark.parametrize("family", CASES)
def test_llamacpp_sees_what_we_see(family, tower, judge, tmp_path, capsys):  # noqa: F811
    model = write_model(family, tmp_path / "m")
    adapter = adapt(model, tmp_path / "a", tower)
    succeeds("export", "--model", model, "--adapter-path", adapter, "--to", "gguf", "--out", tmp_path / "m.gguf", "--gguf-type", "f32")  # fmt: skip
    server = judge.start_llamacpp(tmp_path / "m.gguf", flash_attention=False, mmproj=tmp_path / "mmproj-m.gguf")
    base, bare = load(model, adapter), load(model)
    for size in CASES[family]:
        one, other = (picture(tmp_path, *size, seed, family in SMOOTH) for seed in (1, 2))
        tokens, new, steps = theirs(server, one)
        counted, found = ours(base, one, new)
        worst = apart(found, steps)
        with capsys.disabled():
            print(f"\n| {family} {size} | {worst:.1e} | {apart(ours(base, other, new)[1], steps):.2f} |", end=" ")
        assert counted == tokens
        assert worst < BAR
        assert (np.argmax(found[:, :N_PRINTABLE], axis=1) == new).all()
        assert apart(ours(base, other, new)[1], steps) > 10 * BAR
        assert apart(ours(bare, one, new)[1], steps) > 10 * BAR


@pytest.mark.parametrize("family", ["smolvlm", "qwen3_vl"])
def test_an_adapter_file_beside_model_and_tower_sees_the_same(family, judge, tmp_path):  # noqa: F811
    """And the tower is of 16 bits here, as it is unless asked otherwise."""
    model = write_model(family, tmp_path / "m")
    adapter = adapt(model, tmp_path / "a", tower=False)
    for out, *more in (("m.gguf", "--to", "gguf"), ("a.gguf", "--to", "gguf-adapter", "--adapter-path", adapter)):
        assert run("export", "--model", model, "--out", tmp_path / out, *more).code == 0
    files = tmp_path / "m.gguf", tmp_path / "a.gguf"
    server = judge.start_llamacpp(*files, flash_attention=False, mmproj=tmp_path / "mmproj-m.gguf")
    base, bare = load(model, adapter), load(model)
    one = picture(tmp_path, *CASES[family][0], 1, family in SMOOTH)
    tokens, new, steps = theirs(server, one)
    counted, found = ours(base, one, new)
    assert counted == tokens
    worst = apart(found, steps)
    assert worst < 0.1
    assert apart(ours(bare, one, new)[1], steps) > 4 * worst
