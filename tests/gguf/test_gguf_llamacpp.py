"""llama.cpp runs the GGUF files of every family as we run the models: the same greedy tokens, the same likelihoods."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from gguf_families import FAMILIES, tiny_family, write_family
from gguf_judge import Verdict, compare, judge, listen, prompts  # noqa: F401
from make_adapters import adapt_and_save, loaded
from mlx_lm.models import gemma4_text
from tiny_moe import with_quantized_experts

from mlx_lora.gguf.reader import read_gguf
from mlx_lora.gguf.write import write_gguf_adapter, write_gguf_model
from mlx_lora.models.load import Base

pytestmark = pytest.mark.parity
# llama.cpp looks GELU up in a table of 16-bit floats, and Gemma 4 has it in every block. With the same table here what
# is left are inputs that round to the other neighbor.
BARS = {name: 0.02 if name.startswith("gemma4") else 5e-4 for name in FAMILIES}


@pytest.fixture(autouse=True)
def gelu_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Gemma 4 compute GELU here as llama.cpp does."""
    exact = nn.gelu_approx

    def table(x: mx.array) -> mx.array:
        looked_up = exact(x.astype(mx.float16).astype(mx.float32)).astype(mx.float16).astype(mx.float32)
        return mx.where(x <= -10, 0.0, mx.where(x >= 10, x, looked_up))

    monkeypatch.setattr(nn, "gelu_approx", table)
    monkeypatch.setattr(gemma4_text, "geglu", lambda gate, x: table(gate) * x)


load = partial(loaded, dtype="float32")


def adapted(name: str, tmp_path: Path, targets: str = "all-linear") -> tuple[Base, Base]:
    """Return a case's model with a random adapter, and the same without."""
    folder = write_family(name, tmp_path / "m")
    adapt_and_save(folder, tmp_path / "a", targets)
    base = load(folder, tmp_path / "a")
    return base, load(folder)


def judged(capsys, what: str, base: Base, bare: Base, heard, bar: float) -> None:
    found, without = compare(base.model, prompts(), heard), compare(bare.model, prompts(), heard)
    with capsys.disabled():
        print(f"\n| {what} | {found.same} of {found.n_tokens} | {found.median:.1e} | {found.worst:.1e} |", end=" ")
        print(f"{without.worst:.2f} |", end=" ")
    assert found.n_distinct > 10
    assert found.same == found.n_tokens
    assert found.worst < bar
    assert without.worst > 10 * bar
    assert without.same < found.n_tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_a_merged_model_says_the_same(name, judge, tmp_path, capsys):  # noqa: F811
    base, bare = adapted(name, tmp_path)
    write_gguf_model(tmp_path / "m.gguf", base, gguf_type="f32", name="m")
    heard = listen(judge.start_llamacpp(tmp_path / "m.gguf", flash_attention=False), prompts())
    judged(capsys, f"{name}, merged", base, bare, heard, BARS[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_beside_the_model_says_the_same(name, judge, tmp_path, capsys):  # noqa: F811
    # The last of Gemma 4's expert layers is the only one of all these that an adapter GGUF cannot hold.
    targets = "self_attn.*,mlp.*,gate_proj,up_proj" if name == "gemma4 experts" else "all-linear"
    base, bare = adapted(name, tmp_path, targets)
    write_gguf_model(tmp_path / "m.gguf", bare, gguf_type="f32", name="m")
    write_gguf_adapter(tmp_path / "a.gguf", base.model, "m")
    server = judge.start_llamacpp(tmp_path / "m.gguf", tmp_path / "a.gguf", flash_attention=False)
    judged(capsys, f"{name}, adapter", base, bare, listen(server, prompts()), BARS[name])


def rounded(capsys, what: str, found: Verdict) -> None:
    """Print what llama.cpp's own rounding of activations to 8 bits makes of a random model, which amplifies it."""
    with capsys.disabled():
        print(f"\n| {what} | {found.same} of {found.n_tokens} | {found.median:.1e} | {found.worst:.1e} |  |", end=" ")


def test_mxfp4_experts_say_the_same(judge, tmp_path, capsys):  # noqa: F811
    """The blocks as they are, and the same values in F32, where nothing rounds activations."""
    model, config = with_quantized_experts(*tiny_family("gpt-oss"))
    base = load(write_family("gpt-oss", tmp_path / "m", model, {"quantization": config["quantization"]}))
    plain = load(write_family("gpt-oss", tmp_path / "plain"))
    write_gguf_model(tmp_path / "m.gguf", base, gguf_type="bf16", name="m")
    assert read_gguf(tmp_path / "m.gguf").tensors["blk.0.ffn_up_exps.weight"].type.name == "MXFP4"
    heard = listen(judge.start_llamacpp(tmp_path / "m.gguf", flash_attention=False), prompts())
    found, without = (compare(it.model, prompts(), heard) for it in (load(tmp_path / "m.gguf"), plain))
    rounded(capsys, "gpt-oss, MXFP4 experts", found)
    assert found.median < 0.1 < 0.5 < without.median
    write_gguf_model(tmp_path / "f.gguf", base, gguf_type="f32", name="m")
    heard = listen(judge.start_llamacpp(tmp_path / "f.gguf", flash_attention=False), prompts())
    judged(capsys, "gpt-oss, MXFP4 experts as F32", base, plain, heard, 5e-4)


QUANTIZED = ["qwen3moe", "phi3", "gpt-oss", "lfm2", "qwen35", "qwen35moe", "gemma4", "gemma4 experts"]


@pytest.mark.parametrize("name", QUANTIZED)
def test_carried_blocks_say_the_same(name, judge, tmp_path, capsys):  # noqa: F811
    """llama.cpp loads a Q4_0 file of ours; unpacked by the gguf package, it says what the carried blocks say here."""
    plain = load(write_family(name, tmp_path / "m"))
    write_gguf_model(tmp_path / "m.gguf", plain, gguf_type="q4_0", name="m")
    base = load(tmp_path / "m.gguf")
    heard = listen(judge.start_llamacpp(tmp_path / "m.gguf", flash_attention=False), prompts())
    rounded(capsys, f"{name}, Q4_0", compare(base.model, prompts(), heard))
    judge.write_float_copy(tmp_path / "m.gguf", tmp_path / "f.gguf")
    heard = listen(judge.start_llamacpp(tmp_path / "f.gguf", flash_attention=False), prompts())
    judged(capsys, f"{name}, Q4_0 as F32", base, plain, heard, BARS[name])
