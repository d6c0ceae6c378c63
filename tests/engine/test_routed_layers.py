"""Routed layers and their pools: every row is what the adapter on the model computes."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from conftest import quantized, tiny_model, write_folder
from make_adapters import make_adapter
from mlx.utils import tree_flatten

from mlx_lora.config.settings import ModelSettings
from mlx_lora.engine.adapter_store import (
    ROUTED,
    AdapterSource,
    AdapterStore,
    LayerFactors,
    LayerPools,
    UnknownAdapter,
    read_factors,
    route,
    unrouted_twin,
)
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.models.generator import Routing, Sampler, Sampling, TextStream, TokenReport, sample_rows
from mlx_lora.models.load import load_base
from mlx_lora.models.tokenizer import spelling
from mlx_lora.utils.errors import InputError

TOKENS = mx.array([[3, 1, 4], [1, 5, 9], [2, 6, 5], [3, 5, 8], [9, 7, 9]])


@pytest.fixture(params=["tied", "biased 4-bit"])
def folder(request, tmp_path):
    if request.param == "tied":
        return write_folder(tmp_path / "base", tiny_model())
    changes = {"tie_word_embeddings": False, "attention_bias": True}
    config = {**changes, "quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}
    model = tiny_model(**changes)
    for layer in model.layers:
        layer.self_attn.q_proj.bias = mx.random.normal(layer.self_attn.q_proj.bias.shape)
    return write_folder(tmp_path / "base", quantized(model), config)


@pytest.fixture
def adapters(folder, tmp_path):
    kinds = {
        "lora": {"rank": 4},
        "narrow": {"rank": 3, "seed": 2, "targets": "q_proj,down_proj"},
        "dora": {"rank": 4, "seed": 3, "form": "dora", "strength": 3.0},
        "embedding": {"rank": 4, "seed": 4, "targets": "all-linear,embed_tokens"},
    }
    return {name: make_adapter(folder, tmp_path / name, **kind) for name, kind in kinds.items()}


def base_of(folder):
    return load_base(ModelSettings(model=str(folder)))


def store_of(base, named, budget=None):
    routing = Routing()
    store = AdapterStore(base, routing, mx.float32, budget)
    store.add({name: AdapterSource(path) for name, path in named.items()})
    return store, routing


@pytest.mark.parametrize("flattened", [False, True])
def test_every_row_is_what_its_adapter_computes_alone(folder, adapters, flattened):
    base = base_of(folder)
    store, routing = store_of(base, adapters)
    order = ["lora", None, "dora", "embedding", "narrow"]
    numbers = [store.acquire(name).number if name else None for name in order]
    routing.rows = tuple(numbers)
    mixed = base.model(TOKENS)
    if flattened:  # some blocks hand their linear layers (B * T, in)
        layer = base.model.layers[0].self_attn.q_proj
        x = mx.random.normal((5, 3, 64))
        assert mx.allclose(layer(x).reshape(15, -1), layer(x.reshape(15, 64)), atol=1e-5)
    for row, name in enumerate(order):
        alone = base_of(folder)
        if name:
            load_adapter(alone, adapters[name])
        assert mx.allclose(mixed[row], alone.model(TOKENS)[row], atol=1e-4), name
        routing.rows = (numbers[row],)
        assert mx.allclose(base.model(TOKENS[row : row + 1])[0], mixed[row], atol=1e-4), name
    routing.rows = (numbers[0],) * 5
    assert not mx.allclose(base.model(TOKENS)[1], mixed[1], atol=1e-2)


def test_memory_is_the_adapters_own_bytes(folder, adapters):
    base = base_of(folder)
    before = sum(p.nbytes for _, p in tree_flatten(base.model.parameters()))
    store, _ = store_of(base, adapters)
    stacks = [
        array
        for module in base.model.modules()
        if isinstance(module, ROUTED)
        for stack in module.pools._stacks.values()
        for array in stack
    ]
    assert sum(array.nbytes for array in stacks) == store.nbytes
    assert sum(p.nbytes for _, p in tree_flatten(base.model.parameters())) == before, "the base is as it was"
    for name in adapters:
        store.remove(name)
    assert store.nbytes == 0
    assert not any(module.pools._stacks for module in base.model.modules() if isinstance(module, ROUTED))


def test_removing_one_leaves_the_others(folder, adapters):
    base = base_of(folder)
    store, routing = store_of(base, adapters)
    kept = store.acquire("embedding")
    routing.rows = (kept.number,)
    before = base.model(TOKENS[:1])
    for name in ("lora", "dora", "narrow"):
        store.remove(name)
        assert mx.array_equal(base.model(TOKENS[:1]), before)
    with pytest.raises(UnknownAdapter):
        store.acquire("lora")
    store.remove("embedding")
    assert mx.array_equal(base.model(TOKENS[:1]), before), "in use: it stays for who has it"
    assert store.nbytes == kept.nbytes
    store.release(kept)
    assert store.nbytes == 0


def test_a_failed_load_changes_nothing(folder, adapters):
    base = base_of(folder)
    store, _ = store_of(base, {"lora": adapters["lora"]})
    cards, modules = store.cards, [id(module) for module in base.model.modules()]
    config = json.loads((adapters["dora"] / "adapter_config.json").read_text())
    config["mlx_lora"]["base_fingerprint"] = "0" * 16
    (adapters["dora"] / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="was trained on a different base"):
        store.add({"narrow": AdapterSource(adapters["narrow"]), "dora": AdapterSource(adapters["dora"])})
    assert store.cards == cards
    assert [id(module) for module in base.model.modules()] == modules


def test_the_limit_on_pictures_of_a_run_is_kept_and_a_blend_has_the_smallest(folder, adapters):
    for name, pixels in (("lora", 9000), ("narrow", 4000)):
        (adapters[name] / "run.yaml").write_text(f"max_pixels: {pixels}\n")
    store, _ = store_of(base_of(folder), adapters)
    store.add({"both": AdapterSource(blend={"lora": 1.0, "narrow": 0.5, "embedding": 0.5})})
    found = {name: card.max_pixels for name, card in store.cards.items()}
    assert found == {"lora": 9000, "narrow": 4000, "dora": None, "embedding": None, "both": 4000}


def test_a_twin_has_modules_of_its_own_over_the_same_arrays(folder, adapters):
    base = base_of(folder)
    route(base.model, ["model.layers.0.self_attn.q_proj", "model.embed_tokens"], Routing())
    twin = unrouted_twin(base.model)
    assert not any(isinstance(module, ROUTED) for module in twin.modules())
    assert not {id(module) for module in base.model.modules()} & {id(module) for module in twin.modules()}
    assert mx.array_equal(twin(TOKENS), base_of(folder).model(TOKENS))
    assert read_factors(base, adapters["lora"], mx.float32).rank == 4


def test_pools_of_one_rank_stack_and_close_gaps():
    routing = Routing()
    pools = LayerPools(routing)
    for number in range(4):
        pools.put(number, LayerFactors(mx.full((5, 2), number), mx.full((2, 3), number)))
    pools.settle()
    pools.drop(1)
    assert [pools.get(number).a[0, 0].item() for number in (0, 2, 3)] == [0, 2, 3]
    routing.rows = (3, None, 2, 3)
    (group,) = pools.groups()
    assert (group.rows.tolist(), group.slots.tolist()) == ([0, 2, 3], [2, 1, 2])
    routing.rows = (3, 3)
    (group,) = pools.groups()
    assert (group.one, group.a[0, 0].item()) == (True, 3)
    routing.rows = (None, None)
    assert pools.groups() == []


# --- sampling and text


def test_sampling_follows_its_own_stream():
    logits = mx.random.normal((3, 50), key=mx.random.key(1))
    settings = [Sampling(temperature=0), Sampling(temperature=1.0, seed=3), Sampling(temperature=1.0, top_k=1)]
    draws = []
    for _ in range(2):
        samplers = [Sampler(s, 50) for s in settings]
        draws.append([sample_rows(logits, samplers)[0].tolist() for _ in range(6)])
    likeliest = mx.argmax(logits, axis=-1).tolist()
    for one, other in zip(*draws, strict=True):
        assert one[:2] == other[:2]
        assert (one[0], one[2]) == (likeliest[0], likeliest[2])
    assert len({draw[1] for draw in draws[0]}) > 1


class Letters:
    """A detokenizer of one letter per token."""

    def __init__(self):
        self.text = ""

    def add_token(self, token):
        self.text += chr(token)

    def finalize(self):
        self.text += "."


def pieces(text, stops):
    stream, sent, reports = TextStream(Letters(), stops), [], []
    for letter in text:
        piece = stream.add(ord(letter), TokenReport(letter, -1.0, ()))
        sent.append(piece.text)
        reports += [report.text for report in piece.reports]
        if piece.stopped:
            return "".join(sent), "".join(reports), True
    last = stream.finish()
    return "".join(sent) + last.text, "".join(reports) + "".join(r.text for r in last.reports), last.stopped


def test_text_that_may_begin_a_stop_is_held_back():
    assert pieces("abcabd", ("abd",)) == ("abc", "abc", True)
    assert pieces("abcab", ("abd",)) == ("abcab.", "abcab", False)
    assert pieces("aaab", ("aab", "x")) == ("a", "a", True)
    assert pieces("abc", ("c.",)) == ("ab", "ab", True), "a stop that only the end completes"
    stream = TextStream(Letters(), ("stop",))
    assert [stream.add(ord(c)).text for c in "xsto"] == ["x", "", "", ""]
    assert stream.add(ord("y")).text == "stoy"


class Vocabulary:
    """A tokenizer of a few pieces, as byte-level and SentencePiece vocabularies have them."""

    PIECES = (
        "\u00c3",
        "\u00a9",
        "<0xE2>",
        "\u2581the",
        "the",
        "\u0120a",
    )  # the first two are the bytes of "e" with an acute

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.PIECES[token]

    def decode(self, tokens: list[int]) -> str:
        return ("\ufffd", "\ufffd", "\ufffd", "the", "the", " a")[tokens[0]]


def test_a_token_is_spelled_with_its_own_bytes():
    found = [spelling(Vocabulary(), token) for token in range(6)]
    assert b"".join(data for _, data in found[:2]).decode() == "\u00e9"
    assert found[2] == ("\ufffd", b"\xe2")
    assert [text for text, _ in found[3:]] == [" the", "the", " a"]
