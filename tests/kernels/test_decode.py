"""Generating on a CPU: the form of quantized weights, their bound of memory, and steps of one token."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures.build import tiny_architecture
from conftest import quantized, tiny_model, write_folder
from make_adapters import make_adapter
from mlx_lm.models import base as shared
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache
from run_cli import run, succeeds

import mlx_lora
from mlx_lora.bench.doctor.check import known_table
from mlx_lora.config.settings import ModelSettings
from mlx_lora.engine.adapter_store import AdapterSource
from mlx_lora.engine.engine import Engine, Limits, Request
from mlx_lora.kernels.measure import SWITCH
from mlx_lora.kernels.quantized_matmul import DENSE
from mlx_lora.models import generator as decode_weights
from mlx_lora.models import generator as token_steps
from mlx_lora.models.generator import (
    Sampling,
    TokenSteps,
    choose_weights,
    hold_weights,
    layers_with_copies,
    release_weights,
)
from mlx_lora.models.load import load_base
from mlx_lora.models.prefix_attention import SharedPrefix, rotate_by_token
from mlx_lora.trainer.callbacks import greedy_text
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError

PROMPT = mx.array([[72, 101, 108, 108, 111]])
GREEDY = Sampling(temperature=0)
pytestmark = pytest.mark.skipif(device.on_gpu(), reason="a GPU uses mlx's own kernels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A 4-bit model with biases and a head of its own: a tied one repeats its prompt's last token."""
    changes = {"tie_word_embeddings": False, "attention_bias": True}
    model = tiny_model(**changes)
    for layer in model.layers:
        layer.self_attn.q_proj.bias = mx.random.normal(layer.self_attn.q_proj.bias.shape)
    config = {**changes, "quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}
    return write_folder(tmp_path_factory.mktemp("decode") / "base", quantized(model), config)


def base_of(folder: Path, form: str = "auto"):
    return load_base(ModelSettings(model=str(folder), decode_weights=form))


def copies(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if DENSE in layer]


def test_dense_copies_multiply_as_the_packed_weights_do(folder):
    base = base_of(folder)
    plain = base.model(PROMPT)
    hold_weights(base)
    held = copies(base.model)
    assert len(held) == 2 * 7 + 1  # every linear layer and the head, and not the embedding, which only looks rows up
    assert mx.allclose(base.model(PROMPT), plain, atol=1e-5)
    assert not any(name.endswith(DENSE) for name, _ in nn.utils.tree_flatten(base.model.parameters()))
    for layer in held:
        layer[DENSE] = 1.5 * layer[DENSE]
    assert not mx.allclose(base.model(PROMPT), plain, atol=1e-2)  # so it is the copies that multiply
    release_weights(base.model)
    assert mx.array_equal(base.model(PROMPT), plain)


def test_a_tied_head_has_a_copy_too(tiny_4bit_folder):
    base = base_of(tiny_4bit_folder)
    plain = base.model(PROMPT)
    hold_weights(base)
    assert DENSE in base.model.model.embed_tokens
    assert mx.allclose(base.model(PROMPT), plain, atol=1e-5)


@pytest.mark.long
def test_texts_are_the_same_in_every_form_with_and_without_an_adapter(folder, tmp_path):
    adapters = [None, make_adapter(folder, tmp_path / "lora"), make_adapter(folder, tmp_path / "dora", form="dora")]
    bases = {form: mlx_lora.load(folder, decode_weights=form) for form in ("packed", "dense", "auto")}
    texts = {
        form: [base.generate("To be", adapter, max_tokens=24) for adapter in adapters] for form, base in bases.items()
    }
    assert texts["packed"] == texts["dense"] == texts["auto"]
    assert len(set(texts["packed"])) == 3
    assert not copies(bases["packed"].model)
    assert copies(bases["dense"].model)


def test_an_adapted_copy_shares_the_bases_dense_weights(folder, tmp_path):
    base = mlx_lora.load(folder, decode_weights="dense")
    base.generate("To be", max_tokens=2)
    before = mx.get_active_memory()
    base.generate("To be", make_adapter(folder, tmp_path / "a"), max_tokens=2)
    dense = sum(layer[DENSE].nbytes for layer in copies(base.model))
    assert mx.get_active_memory() - before < dense


def test_a_training_run_does_not_carry_the_copies(folder, chats, tmp_path):
    base = mlx_lora.load(folder, decode_weights="dense")
    base.generate("To be", max_tokens=2)
    quick = {"iters": 1, "batch_tokens": 256, "max_seq_length": 128, "sample_tokens": 0}
    mlx_lora.train(base, chats, tmp_path / "run", progress=False, **quick)
    assert not copies(base.model)


def test_texts_of_a_run_leave_no_copies(folder):
    base = base_of(folder, "dense")
    text = greedy_text(base, PROMPT[0].tolist(), 12)
    assert not copies(base.model)
    hold_weights(base)
    assert greedy_text(base, PROMPT[0].tolist(), 12) == text
    assert copies(base.model)  # they were there before


def test_copies_may_take_a_third_of_the_free_memory(folder):
    base = base_of(folder)
    needed = sum(layer.weight.shape[0] * layer.weight.shape[1] * 8 * 4 for layer in layers_with_copies(base))
    fits, not_quite = (choose_weights(base, free_bytes=3 * needed + more) for more in (0, -3))
    assert (fits.form, fits.copied_bytes) == ("dense", needed)
    assert not_quite.form == "packed"
    assert "over a third of" in not_quite.describe()


def test_a_forced_form_is_kept_or_refused(folder, tiny_folder, monkeypatch):
    dense, packed = base_of(folder, "dense"), base_of(folder, "packed")
    assert choose_weights(packed, free_bytes=1 << 40).form == "packed"
    needed = choose_weights(dense, free_bytes=1 << 40).copied_bytes
    assert choose_weights(dense, free_bytes=needed).form == "dense"  # all of it, if it was asked for
    with pytest.raises(InputError, match="--decode-weights dense"):
        choose_weights(dense, free_bytes=needed - 1)
    monkeypatch.setattr(device, "free_bytes", lambda: 1000)
    base = base_of(folder)
    assert hold_weights(base).form == "packed"  # without room nothing is copied
    assert not copies(base.model)
    assert hold_weights(base_of(tiny_folder)) is None  # a float model has no choice


def test_the_flag_reaches_the_model(folder, monkeypatch):
    seen = []
    real = hold_weights
    monkeypatch.setattr("mlx_lora.api.base.hold_weights", lambda base: seen.append(real(base)))
    for form in ("packed", "dense"):
        succeeds("generate", "--model", folder, "--prompt", "a", "--max-tokens", 2, "--decode-weights", form)
    assert [one.form for one in seen] == ["packed", "dense"]
    assert run("generate", "--model", folder, "--prompt", "a", "--decode-weights", "thin").code == 2


def test_the_choice_is_measured_kept_and_shown(folder, monkeypatch, own_cache):
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr(decode_weights, "TRIAL_BYTES", 1 << 18)
    base = base_of(folder)
    assert choose_weights(base, free_bytes=1 << 40).reason == "measured"
    rows = [row for row in known_table() if row["kernel"] == decode_weights.NAME]
    assert {row["shape"].split(",")[0] for row in rows} == {"1 row", "8 rows", "64 rows"}
    assert all(one["correct"] for row in rows for one in row["candidates"].values())

    def fails(*given):
        raise AssertionError("measured again")

    monkeypatch.setattr(decode_weights, "_measure", fails)
    assert choose_weights(base, free_bytes=1 << 40).reason == "measured"


@pytest.mark.parametrize(("faster", "form"), [("packed", "packed"), ("dense", "dense")])
def test_the_faster_form_is_taken(folder, monkeypatch, faster, form):
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr(decode_weights, "_seconds", lambda layers, one, rows: 1.0 if one == faster else 2.0)
    assert choose_weights(base_of(folder), free_bytes=1 << 40).form == form


def answers(folder: Path, form: str, named: dict[str, Path]) -> list[str]:
    engine = Engine(lambda: base_of(folder, form), Limits())
    try:
        engine.call(lambda store: store.add({name: AdapterSource(path) for name, path in named.items()})).result()
        texts = []
        events: list[list] = [[] for _ in range(2 * len(named) + 1)]
        done = [engine.submit(Request(list(range(60, 66 + row)), name, 16, GREEDY, ignore_eos=True), events[row].append)
                for row, name in enumerate([None, *named, *named])]  # fmt: skip
        assert len(done) == len(events)
        while not all(row and row[-1].last for row in events):
            engine.call(lambda store: None).result()
        texts += ["".join(event.piece.text for event in row) for row in events]
    finally:
        engine.close()
    return texts


def test_adapters_in_one_batch_answer_the_same_in_both_forms(folder, tmp_path):
    kinds = {"a": {"seed": 1}, "b": {"seed": 2, "rank": 3}, "c": {"seed": 3, "form": "dora"}}
    named = {name: make_adapter(folder, tmp_path / name, **kind) for name, kind in kinds.items()}
    dense = answers(folder, "dense", named)
    assert dense == answers(folder, "packed", named)
    assert len(set(dense)) > 3


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROPES = {"plain": {}, "llama3": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}}


@pytest.mark.parametrize("name", ["phi", "qwen3", "gemma3_text", "phi3", "gpt_oss", "qwen3_5", "deepseek_v3", *ROPES])
def test_steps_of_one_token_are_the_models_own(name, uncompiled):
    model = tiny_model(**ROPES[name]) if name in ROPES else tiny_architecture(name)
    own, ours = make_prompt_cache(model), make_prompt_cache(model)
    steps = [PROMPT, *(mx.array([[token]]) for token in (7, 8, 9, 10))]
    expected = [model(tokens, cache=own) for tokens in steps]
    mx.eval(expected)
    short = TokenSteps(model)
    for tokens, logits in zip(steps, expected, strict=True):
        assert mx.allclose(short(tokens, cache=ours), logits, rtol=1e-4, atol=1e-5 * mx.abs(logits).max().item())


def test_rows_of_a_batch_keep_their_own_positions():
    model = tiny_model()
    mx.eval(model.parameters())
    lengths = (9, 4, 6)
    tokens = mx.random.randint(0, 250, (3, 9), key=mx.random.key(1))
    alone = []
    for row, length in enumerate(lengths):
        cache = make_prompt_cache(model)
        model(tokens[row : row + 1, :length], cache=cache)
        alone.append([model(mx.array([[token]]), cache=cache)[0, -1] for token in (5, 6)])
    caches = [BatchKVCache([9 - length for length in lengths]) for _ in model.layers]
    padded = mx.stack([mx.pad(tokens[row, :length], (9 - length, 0)) for row, length in enumerate(lengths)])
    model(padded, cache=caches)
    short = TokenSteps(model)
    for step, token in enumerate((5, 6)):
        logits = short(mx.full((3, 1), token), cache=caches)[:, -1]
        for row in range(3):
            assert mx.allclose(logits[row], alone[row][step], atol=1e-5)


@pytest.mark.parametrize("shares", ["never", "before", "after"])
def test_a_step_makes_its_rotation_once(shares, monkeypatch):
    """Also in a model whose prompts are shared, before the steps are made shorter, or after."""
    model = tiny_model()
    if shares == "after":
        TokenSteps(model)
    if shares != "never":
        rotate_by_token(model)
    cache, batch = make_prompt_cache(model), [BatchKVCache([0, 1]) for _ in model.layers]
    model(PROMPT, cache=cache)
    model(mx.concatenate([PROMPT, PROMPT]), cache=batch)
    short, turned, real = TokenSteps(model), [], mx.fast.rope
    monkeypatch.setattr(mx.fast, "rope", lambda x, *given, **more: turned.append(x.shape) or real(x, *given, **more))
    short(mx.array([[7]]), cache=cache)
    short(mx.array([[7], [8]]), cache=batch)
    assert turned == [(1, 16, 1, 16), (2, 16, 1, 16)]
    turned.clear()
    model(mx.array([[7]]), cache=cache)  # outside such a step: of queries and keys, in each block
    assert len(turned) == 2 * len(model.layers)
    if shares != "never":
        turned.clear()
        tokens = mx.array([[7, 8, 9, 8]])
        layout = SharedPrefix.of(mx.array([[1, 3]]), 4)
        model(tokens, cache=[layout] * len(model.layers))
        assert turned[0] == (4, 4, 1, 16)  # a position for each token


def test_only_its_own_steps_exchange_attention(monkeypatch):
    model, seen = tiny_model(), []
    monkeypatch.setattr(
        token_steps, "attention_of_tokens", lambda *given, **more: seen.append(1) or shared.scaled_dot_product_attention(*given, **more)
    )  # fmt: skip
    cache = make_prompt_cache(model)
    short = TokenSteps(model)
    short(PROMPT, cache=cache)
    assert not seen
    short(mx.array([[7]]), cache=cache)
    assert len(seen) == len(model.layers)
    with pytest.raises(ValueError, match="unpack"):
        short(mx.zeros((1, 1, 1), mx.int32), cache=cache)
    model(mx.array([[7]]), cache=cache)
    assert len(seen) == len(model.layers)
