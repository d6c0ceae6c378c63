"""Every method: what it trains, that it starts as the base, that it learns, and that what it leaves is a plain adapter."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from comparing import by_dtype
from conftest import TINY, quantized, tiny_model, write_folder
from make_adapters import TOKENS
from mlx.utils import tree_flatten
from mlx_lm.utils import load as mlx_lm_load
from run_cli import run
from tiers import by_default
from tiny_moe import tiny_moe, with_quantized_experts
from tiny_steps import batch, losses_of, method_step

from mlx_lora.adapters.base import dense_weight
from mlx_lora.adapters.inject import adapt_model, adapter_layers, adapter_parameters
from mlx_lora.config.load import train_settings
from mlx_lora.config.presets import PRESETS
from mlx_lora.config.settings import AdapterSettings, ModelSettings
from mlx_lora.exporters.adapter_folder import AdapterInfo, load_adapter, save_adapter
from mlx_lora.losses.check import choose_loss
from mlx_lora.losses.cross_entropy import plain_loss, token_arrays
from mlx_lora.models.load import load_base
from mlx_lora.utils.errors import InputError

RANK = 4
EVERYWHERE = "all-linear,embed_tokens,lm_head"
LEAVES = {
    **{method: {"lora_a", "lora_b"} for method in ("lora", "rslora", "lora-plus", "pissa", "relora")},
    "dora": {"lora_a", "lora_b", "m"},
    "qa-lora": {"lora_a", "lora_b"},
    "adalora": {"lora_a", "lora_b", "lora_e"},
    "full": {"weight"},
}
LOW_RANK = [method for method in PRESETS if method != "full"]
BASES = {
    "float": lambda model: model,
    **{f"{bits}-bit": lambda model, bits=bits: quantized(model, bits) for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": lambda model: quantized(model, 4, 32, "mxfp4"),
}


def adapted(method: str, base: str = "float", targets: str = EVERYWHERE, **settings):
    """Return an untied tiny model adapted everywhere, and its logits before."""
    model = BASES[base](tiny_model(tie_word_embeddings=False))
    before = model(TOKENS)
    adapt_model(model, AdapterSettings(method=method, rank=RANK, alpha=8.0, target_modules=targets, **settings), seed=1)
    return model, before


def refused(method: str, base: str) -> bool:
    """Return whether a method cannot adapt a base, after an assertion that it says so."""
    if method != "qa-lora" or base.endswith("-bit"):
        return False
    with pytest.raises(InputError, match="qa-lora"):
        adapted(method, base)
    return True


def train_steps(model: nn.Module, settings: AdapterSettings, steps: int, rate: float = 5e-3) -> list[float]:
    """Train as the train command does and return the losses."""
    rows = [batch(3, 17, seed=number % 4) for number in range(steps)]
    return losses_of(method_step(model, settings, steps, rate), rows)


def test_the_table_and_the_settings_name_the_same_methods():
    assert set(PRESETS) == set(LEAVES)


@pytest.mark.parametrize("method", PRESETS)
@pytest.mark.parametrize("base", ["float", "4-bit"])
def test_exactly_its_parameters_are_trained(method, base):
    if refused(method, base):
        return
    untouched = BASES[base](tiny_model(tie_word_embeddings=False))
    model, _ = adapted(method, base)
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
    layers = [path for path, module in untouched.named_modules() if "weight" in module and "norm" not in path]
    assert trained == {f"{path}.{leaf}" for path in layers for leaf in LEAVES[method]}
    # And everything else is the base, under its own name or inside the layer that wraps it.
    own = {name: np.array(value) for name, value in tree_flatten(untouched.parameters())}
    for name, value in tree_flatten(model.parameters()):
        plain = name.replace(".linear.", ".").replace(".embedding.", ".")
        if name in trained or plain.rpartition(".")[2] in ("start_a", "start_b") or "._" in name:
            continue
        assert np.array_equal(own.pop(plain), np.array(value)), name
    assert all(method == "full" or name in trained for name in own), own.keys()


@pytest.mark.parametrize("method", PRESETS)
@pytest.mark.parametrize("base", by_default(BASES, "float", "4-bit"))
def test_it_starts_as_the_base(method, base):
    if refused(method, base):
        return
    model, before = adapted(method, base)
    tolerance = 3e-2 if base == "mxfp4" and method == "full" else 1e-4
    assert np.allclose(model(TOKENS), before, atol=tolerance * mx.abs(before).max().item())
    leaf = {"adalora": "lora_e", "full": "weight"}.get(method, "lora_b")
    name, value = next((n, v) for n, v in adapter_parameters(model).items() if n.endswith(leaf))
    moved = dict(adapter_parameters(model)) | {name: value + (100 if name.endswith("lora_e") else 0.1)}
    model.load_weights(list(moved.items()), strict=False)
    assert not np.allclose(model(TOKENS), before, atol=1e-3 * mx.abs(before).max().item())


@pytest.mark.parametrize("method", PRESETS)
@pytest.mark.parametrize("base", by_default(["float", "4-bit", "mxfp4"], "4-bit"))
def test_it_learns_and_what_it_stores_is_the_same_model(method, base, tmp_path):
    if refused(method, base):
        return
    config = {"tie_word_embeddings": False}
    if base != "float":
        mode = "affine" if base == "4-bit" else base
        config["quantization"] = {"group_size": 32, "bits": 4, "mode": mode}
    folder = write_folder(tmp_path / "base", BASES[base](tiny_model(tie_word_embeddings=False)), config)
    loaded = load_base(ModelSettings(model=str(folder)))
    settings = AdapterSettings(method=method, rank=RANK, alpha=8.0, target_modules=EVERYWHERE)
    setup = adapt_model(loaded.model, settings, seed=1)
    losses = train_steps(loaded.model, settings, 24, 5e-2 if method == "adalora" else 5e-3)
    assert losses[-1] < 0.9 * losses[0]
    info = AdapterInfo(
        method, setup.rank, 8.0, setup.scale, 0.0, setup.targets.num_layers, setup.targets.keys,
        loaded.model_id, None, loaded.fingerprint, full=setup.full,
    )  # fmt: skip
    save_adapter(tmp_path / "a", loaded.model, info)
    loaded.model.eval()
    expected = np.array(loaded.model(TOKENS))
    size = np.abs(expected).max()
    again = load_base(ModelSettings(model=str(folder)))
    assert not np.allclose(again.model(TOKENS), expected, atol=1e-2 * size)
    assert load_adapter(again, tmp_path / "a").method == method
    # An mxfp4 embedding gives bfloat16, where the order of additions shows.
    assert np.allclose(again.model(TOKENS), expected, atol=(1e-2 if base == "mxfp4" else 2e-5) * size)
    if base != "float" and method in ("full", "dora"):
        return  # mlx-lm puts no dense weights into quantized layers (fuse first), and has no DoRA on a quantized embedding
    save_adapter(tmp_path / "b", loaded.model, info, same_rank=True)
    stock, _ = mlx_lm_load(str(folder), adapter_path=str(tmp_path / "b"))
    # Its mxfp4 embedding gives bfloat16, and all that follows is computed in it; the other folders are float32, as mlx-lm
    # then computes, whatever we compute in.
    assert np.allclose(stock(TOKENS), expected, atol=(4e-2 if base == "mxfp4" else by_dtype(1e-4, 4e-2)) * size)


@pytest.mark.parametrize("method", by_default(PRESETS, "lora", "dora", "full"))
@pytest.mark.parametrize("kind", by_default(["gpt_oss", "qwen3_moe"], "gpt_oss"))
def test_it_learns_on_a_mixtures_experts(method, kind, tmp_path):
    model, config = tiny_moe(kind)
    if kind == "gpt_oss":
        model, config = with_quantized_experts(model, config)
    folder = write_folder(tmp_path / "base", model, config)
    loaded = load_base(ModelSettings(model=str(folder)))
    before = loaded.model(TOKENS)
    settings = AdapterSettings(method=method, rank=RANK, alpha=8.0)
    if method == "qa-lora":  # float attention, or mxfp4 experts
        with pytest.raises(InputError, match="qa-lora"):
            adapt_model(loaded.model, settings, seed=1)
        return
    setup = adapt_model(loaded.model, settings, seed=1)
    assert np.allclose(loaded.model(TOKENS), before, atol=(3e-2 if method == "full" else 1e-4) * np.abs(before).max())
    losses = train_steps(loaded.model, settings, 24, {"adalora": 5e-2, "full": 1e-3}.get(method, 5e-3))
    assert losses[-1] < 0.95 * losses[0]
    info = AdapterInfo(
        method, setup.rank, 8.0, setup.scale, 0.0, setup.targets.num_layers, setup.targets.keys,
        loaded.model_id, None, loaded.fingerprint, full=setup.full,
    )  # fmt: skip
    save_adapter(tmp_path / "a", loaded.model, info)
    loaded.model.eval()
    expected = np.array(loaded.model(TOKENS))
    again = load_base(ModelSettings(model=str(folder)))
    load_adapter(again, tmp_path / "a")
    assert np.allclose(again.model(TOKENS), expected, atol=1e-4 * np.abs(expected).max())
    assert not np.allclose(before, expected, atol=1e-2 * np.abs(expected).max())


def test_pissa_starts_from_the_bases_principal_directions():
    model, _ = adapted("pissa")
    for layer in adapter_layers(model).values():
        inner = layer.linear if isinstance(layer, nn.Module) and "linear" in layer else layer.embedding
        weight = np.array(dense_weight(inner), dtype=np.float64)
        matrix = weight.T if "linear" in layer else weight
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        best = u[:, :RANK] * s[:RANK] @ vt[:RANK]
        product = layer.scale * np.array(layer.lora_a) @ np.array(layer.lora_b)
        assert np.abs(product - best).max() < 1e-5 * s[0]
        # The subspaces are numpy's: all principal angles are zero.
        for factor, vectors in ((layer.lora_a, u[:, :RANK]), (layer.lora_b.T, vt[:RANK].T)):
            q, _ = np.linalg.qr(np.array(factor, dtype=np.float64))
            assert np.linalg.svd(q.T @ vectors, compute_uv=False).min() > 1 - 1e-6
        random = np.linalg.qr(np.random.default_rng(0).normal(size=(len(u), RANK)))[0]
        assert np.linalg.svd(random.T @ u[:, :RANK], compute_uv=False).min() < 0.9


def test_pissas_subspace_iteration_finds_them_too(monkeypatch):
    from mlx_lora.adapters import inject as init

    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 96)))[0] for n in (200, 96))
    s = 1 / (1 + np.arange(96.0))
    matrix = mx.array((u * s @ v.T).astype(np.float32))
    monkeypatch.setattr(init, "EXACT_UP_TO", 8)
    for given in (matrix, matrix.T):
        a, b = init.principal_factors(given, RANK, 0.5, mx.random.key(0))
        best = u[:, :RANK] * s[:RANK] @ v[:, :RANK].T
        found = 0.5 * np.array(a @ b)
        assert np.abs((found if given is matrix else found.T) - best).max() < 1e-5


def test_pissas_rank_has_a_bound():
    with pytest.raises(InputError, match=r"--rank 40 with --method pissa: .*k_proj has 32 principal directions"):
        adapt_model(tiny_model(), AdapterSettings(method="pissa", rank=40), seed=0)


def test_patterns_give_layers_their_own_rank_and_alpha():
    model, _ = adapted("lora", targets="all-linear", rank_pattern="q_proj=2,*.mlp.*=6", alpha_pattern="layers.1.*=3")
    ranks = {path: layer.lora_a.shape[1] for path, layer in adapter_layers(model).items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 2
    assert ranks["model.layers.1.mlp.up_proj"] == 6
    assert ranks["model.layers.0.self_attn.k_proj"] == RANK
    scales = {path: layer.scale for path, layer in adapter_layers(model).items()}
    assert scales["model.layers.0.self_attn.q_proj"] == 8 / 2
    assert scales["model.layers.1.self_attn.q_proj"] == 3 / 2
    with pytest.raises(InputError, match=r"--rank-pattern nowhere: matches no adapted layer"):
        adapted("lora", targets="all-linear", rank_pattern="nowhere=2")


@pytest.mark.parametrize("text", ["q_proj", "q_proj=x", "=3", "q_proj=0", "q_proj=2.5"])
def test_a_bad_pattern_is_named(text):
    with pytest.raises(InputError, match="--rank-pattern"):
        train_settings({"rank_pattern": text})


def test_modules_in_full_beside_the_adapter_are_stored_and_loaded(tmp_path):
    model = tiny_model(tie_word_embeddings=False, attention_bias=True)
    config = {"tie_word_embeddings": False, "attention_bias": True}
    folder = write_folder(
        tmp_path / "base", quantized(model), {**config, "quantization": {"group_size": 32, "bits": 4}}
    )
    loaded = load_base(ModelSettings(model=str(folder)))
    settings = AdapterSettings(rank=RANK, alpha=8.0, modules_to_save="lm_head,model.norm", bias="lora_only")
    setup = adapt_model(loaded.model, settings, seed=1)
    assert {"lm_head.weight", "model.norm.weight"} < set(setup.full)
    assert sum(name.endswith(".linear.bias") for name in setup.full) == 2 * 4
    train_steps(loaded.model, settings, 6)
    info = AdapterInfo(
        "lora", RANK, 8.0, setup.scale, 0.0, 2, setup.targets.keys, "x", None, loaded.fingerprint, full=setup.full
    )
    save_adapter(tmp_path / "a", loaded.model, info)
    expected = np.array(loaded.model(TOKENS))
    again = load_base(ModelSettings(model=str(folder)))
    load_adapter(again, tmp_path / "a")
    assert np.allclose(again.model(TOKENS), expected, atol=1e-4)
    stored = mx.load(str(tmp_path / "a" / "adapters.safetensors"))
    kept = {name: value for name, value in stored.items() if not name.endswith("linear.bias")}
    mx.save_safetensors(str(tmp_path / "a" / "adapters.safetensors"), kept)
    with pytest.raises(InputError, match=r"linear\.bias is missing"):
        load_adapter(load_base(ModelSettings(model=str(folder))), tmp_path / "a")
    ran = run("fuse", "--model", folder, "--adapter-path", tmp_path / "a", "--out", tmp_path / "f")
    assert ran.code == 2


def test_a_module_is_adapted_or_trained_in_full():
    with pytest.raises(InputError, match=r"--modules-to-save .*q_proj.*not both"):
        adapt_model(tiny_model(), AdapterSettings(modules_to_save="q_proj"), seed=0)
    with pytest.raises(InputError, match="--bias all: "):
        adapt_model(tiny_model(), AdapterSettings(bias="all"), seed=0)


@pytest.mark.parametrize(
    ("method", "flags"),
    by_default(
        [
            ("adalora", ("--adalora-init-rank", 9)),
            ("adalora", ("--adalora-tinit", 5)),
            ("adalora", ("--adalora-tfinal", 5)),
            ("adalora", ("--adalora-delta-t", 3)),
            ("adalora", ("--orth-reg-weight", 0)),
            ("relora", ("--relora-every", 5)),
            ("relora", ("--relora-warmup", 2)),
            ("relora", ("--relora-prune-ratio", 0)),
        ],
        ("adalora", ("--adalora-tinit", 5)),
        ("relora", ("--relora-every", 5)),
    ),
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_each_methods_own_settings_change_its_run_and_no_others(method, flags, tiny_folder, chats, tmp_path):
    common = (
        "train", "--model", tiny_folder, "--data", chats, "--iters", 12, "--batch-tokens", 256, "--learning-rate", 1e-2,
        "--rank", 4, "--steps-per-eval", 0, "--val-batches", 0, "--save-every", 0,
    )  # fmt: skip
    weights = []
    for name, extra in (("a", ()), ("b", flags)):
        ran = run(*common, "--method", method, "--adapter-path", tmp_path / name, *extra)
        assert ran.code == 0, ran.err
        stored = mx.load(str(tmp_path / name / "adapters.safetensors"))
        weights.append({key: np.array(value).tobytes() for key, value in stored.items()})
    assert weights[0] != weights[1]
    ran = run(*common, "--adapter-path", tmp_path / "c", *flags)
    assert (ran.code, f"only --method {method} uses it" in ran.err) == (2, True)


def test_the_bias_setting_reaches_the_run(chats, tmp_path):
    folder = write_folder(tmp_path / "m", tiny_model(attention_bias=True), {"attention_bias": True})
    ran = run(
        "train", "--model", folder, "--data", chats, "--iters", 2, "--adapter-path", tmp_path / "a", "--bias", "all"
    )
    assert ran.code == 0, ran.err
    stored = mx.load(str(tmp_path / "a" / "adapters.safetensors"))
    assert sum(name.endswith(".bias") for name in stored) == 2 * 4
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["mlx_lora"]["full"]


@pytest.mark.parametrize("method", ["pissa", "adalora", "relora"])
def test_plain_factors_do_not_start_these(method):
    with pytest.raises(InputError, match="it cannot start from LoRA weights"):
        train_settings({"method": method, "resume_adapter_file": "a.safetensors"})


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_trained_in_full_gets_its_gradient(tied):
    model = tiny_model(tie_word_embeddings=tied)
    name = "embed_tokens" if tied else "lm_head"
    settings = AdapterSettings(rank=RANK, modules_to_save=name)
    setup = adapt_model(model, settings, seed=1)
    assert choose_loss(model, TINY).description == "plain cross-entropy (the head itself is trained)"
    before = np.array(adapter_parameters(model)[setup.full[0]])
    arrays = token_arrays(batch(3, 17, seed=0))
    _, expected = nn.value_and_grad(model, plain_loss)(model, arrays)
    assert all(mx.abs(g).max().item() > 0 for n, g in tree_flatten(expected) if n in setup.full)
    train_steps(model, settings, 3)
    assert not np.allclose(np.array(adapter_parameters(model)[setup.full[0]]), before, atol=1e-3)


def test_a_run_goes_on_from_a_file_whose_layers_had_other_alphas(tiny_folder, chats, tmp_path):
    common = (
        "train", "--model", tiny_folder, "--data", chats, "--rank", 4, "--batch-tokens", 256, "--val-batches", -1,
        "--alpha-pattern", "q_proj=3,*.mlp.*=50", "--valid-fraction", 0.2,
    )  # fmt: skip
    assert run(*common, "--iters", 6, "--learning-rate", 1e-2, "--adapter-path", tmp_path / "a").code == 0
    file = tmp_path / "a" / "adapters.safetensors"
    ran = run(
        *common, "--iters", 1, "--learning-rate", 1e-9, "--adapter-path", tmp_path / "b", "--resume-adapter-file", file
    )
    assert ran.code == 0, ran.err
    losses = [
        [json.loads(line)["val_loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in "ab"
    ]
    assert losses[1][0] == pytest.approx(losses[0][-1], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.1
