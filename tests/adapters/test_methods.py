"""Every method: what it trains, that it starts as the base and learns, and the plain adapter it leaves; AdaLoRA and ReLoRA by themselves."""

from __future__ import annotations

import json
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from comparing import by_dtype, peak_bytes
from conftest import TINY, quantized, tiny_model, write_folder
from make_adapters import TOKENS
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import load as mlx_lm_load
from run_cli import run, succeeds
from tiers import by_default
from tiny_moe import tiny_moe, with_quantized_experts
from tiny_steps import batch, losses_of, method_step
from torch_judge import name_here, torch_base, trained_in_torch

from mlx_lora.adapters.base import dense_weight
from mlx_lora.adapters.inject import (
    adapt_model,
    adapter_layers,
    adapter_parameters,
    fresh_factors,
    inject,
    select_targets,
)
from mlx_lora.config.presets import PRESETS
from mlx_lora.config.settings import AdapterSettings, ModelSettings, OptimizerSettings
from mlx_lora.exporters.adapter_folder import AdapterInfo, load_adapter, save_adapter, stored_parameters
from mlx_lora.losses.agree import choose_loss
from mlx_lora.losses.cross_entropy import plain_loss, token_arrays
from mlx_lora.models.load import load_base
from mlx_lora.trainer.method_events import BudgetSchedule, budget_schedule, restart_every, restart_warmup
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.step import Step
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


def saved(folder, loaded, setup, method: str) -> tuple[AdapterInfo, np.ndarray]:
    """Save what was trained; return its description and the logits of TOKENS."""
    info = AdapterInfo(
        method, setup.rank, 8.0, setup.scale, 0.0, setup.targets.num_layers, setup.targets.keys,
        loaded.model_id, None, loaded.fingerprint, full=setup.full,
    )  # fmt: skip
    save_adapter(folder, loaded.model, info)
    loaded.model.eval()
    return info, np.array(loaded.model(TOKENS))


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
    info, expected = saved(tmp_path / "a", loaded, setup, method)
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
    _, expected = saved(tmp_path / "a", loaded, setup, method)
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


@pytest.mark.long
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
        ran = succeeds(*common, "--method", method, "--adapter-path", tmp_path / name, *extra)
        stored = mx.load(str(tmp_path / name / "adapters.safetensors"))
        weights.append({key: np.array(value).tobytes() for key, value in stored.items()})
    assert weights[0] != weights[1]
    ran = run(*common, "--adapter-path", tmp_path / "c", *flags)
    assert (ran.code, f"only --method {method} uses it" in ran.err) == (2, True)


def test_the_bias_setting_reaches_the_run(chats, tmp_path):
    folder = write_folder(tmp_path / "m", tiny_model(attention_bias=True), {"attention_bias": True})
    succeeds(
        "train", "--model", folder, "--data", chats, "--iters", 2, "--adapter-path", tmp_path / "a", "--bias", "all"
    )
    stored = mx.load(str(tmp_path / "a" / "adapters.safetensors"))
    assert sum(name.endswith(".bias") for name in stored) == 2 * 4
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["mlx_lora"]["full"]


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


@pytest.mark.long
def test_a_run_goes_on_from_a_file_whose_layers_had_other_alphas(tiny_folder, chats, tmp_path):
    common = (
        "train", "--model", tiny_folder, "--data", chats, "--rank", 4, "--batch-tokens", 256, "--val-batches", -1,
        "--alpha-pattern", "q_proj=3,*.mlp.*=50", "--valid-fraction", 0.2,
    )  # fmt: skip
    assert run(*common, "--iters", 6, "--learning-rate", 1e-2, "--adapter-path", tmp_path / "a").code == 0
    file = tmp_path / "a" / "adapters.safetensors"
    succeeds(
        *common, "--iters", 1, "--learning-rate", 1e-9, "--adapter-path", tmp_path / "b", "--resume-adapter-file", file
    )
    losses = [
        [json.loads(line)["val_loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in "ab"
    ]
    assert losses[1][0] == pytest.approx(losses[0][-1], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.1


STEPS = 30
# With a cut every 2nd or 4th step, two ranks come to within one rounding of the threshold in the end, and either
# side keeps another one; up to there the losses are equal to 1e-6 as well.
SETTINGS = AdapterSettings(
    method="adalora", rank=4, alpha=32.0, adalora_init_rank=6, adalora_tinit=5, adalora_tfinal=10, adalora_delta_t=3
)


def batches():
    return [batch(3, 17 + step % 4, seed=step) for step in range(STEPS)]


def trained(model, settings=SETTINGS):
    """Train and return losses, and the ranks that are on after each step."""
    step, on = method_step(model, settings, STEPS, 2e-2), []
    losses = []
    for one in batches():
        losses += losses_of(step, [one])
        on.append(sum((layer.lora_e != 0).sum().item() for layer in adapter_layers(model).values()))
    return losses, on


def in_peft(folder, initial):
    """Return losses, ranks that are on after each step, and the final parameters under our names."""
    import peft
    import torch

    config = peft.AdaLoraConfig(
        init_r=6, target_r=4, tinit=5, tfinal=10, deltaT=3, lora_alpha=32, total_step=STEPS, lora_dropout=0.0,
        orth_reg_weight=0.5, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(torch_base(folder), config).train()
    own = {name_here(name): value for name, value in model.named_parameters() if value.requires_grad}
    assert own.keys() == initial.keys()
    for name, value in own.items():
        start = initial[name][:, None] if name.endswith("lora_e") else initial[name].T
        value.data = torch.tensor(start.copy())
    on = []

    def penalty():
        """Return that of AdaLoraModel.forward, which needs labels in PEFT's own shift."""
        factors = [(name, value) for name, value in own.items() if not name.endswith("lora_e")]
        grams = [value @ value.T if name.endswith("lora_a") else value.T @ value for name, value in factors]
        return 0.5 * sum(torch.norm(gram - torch.eye(len(gram)), p="fro") for gram in grams) / len(grams)

    def after(step: int) -> None:
        model.base_model.update_and_allocate(step)
        on.append(sum(int((value != 0).sum()) for name, value in own.items() if name.endswith("lora_e")))

    optimizer = torch.optim.AdamW(own.values(), lr=2e-2, weight_decay=0.01)
    losses = trained_in_torch(model, own, optimizer, batches(), penalty, after)
    return losses, on, {name: value.detach().numpy() for name, value in own.items()}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_losses_budget_and_ranks_are_pefts(tiny_folder):
    pytest.importorskip("peft")
    base = load_base(ModelSettings(model=str(tiny_folder)))
    adapt_model(base.model, SETTINGS, seed=1)
    initial = {name: np.array(value) for name, value in adapter_parameters(base.model).items()}
    losses, on = trained(base.model)
    theirs, their_on, final = in_peft(tiny_folder, initial)
    assert np.abs(np.array(losses) / np.array(theirs) - 1).max() < 1e-4
    assert on == their_on
    assert on[0] == 6 * 14
    assert on[-1] == 4 * 14
    assert losses[-1] < losses[0] - 0.1
    for path, layer in adapter_layers(base.model).items():
        assert ((layer.lora_e != 0).tolist()) == (final[f"{path}.lora_e"][:, 0] != 0).tolist(), path
    # The penalty is in the gradient: without it the factors end elsewhere.
    base = load_base(ModelSettings(model=str(tiny_folder)))
    free = AdapterSettings(**{**SETTINGS.__dict__, "orth_reg_weight": 0.0})
    adapt_model(base.model, free, seed=1)
    assert not np.allclose(trained(base.model, free)[0], losses, rtol=1e-3)


def test_the_budget_is_a_cubic_between_two_plateaus():
    schedule = BudgetSchedule(initial=84, target=56, total_steps=100, warmup=10, final=30, every=5)
    curve = [schedule.budget(step) for step in range(1, 101)]
    assert curve[:10] == [84] * 10
    assert curve[70:] == [56] * 30
    assert all(a >= b for a, b in pairwise(curve))
    assert curve[39] == int((84 - 56) * 0.5**3 + 56)
    assert [step for step in range(1, 101) if schedule.cuts(step)] == [*range(15, 70, 5), 70]


def test_the_factors_come_closer_to_orthogonal():
    model = tiny_model()
    settings = AdapterSettings(**{**SETTINGS.__dict__, "orth_reg_weight": 10.0})
    adapt_model(model, settings, seed=1)

    def distance():
        grams = [layer.lora_a.T @ layer.lora_a for layer in adapter_layers(model).values()]
        return sum(mx.linalg.norm(gram - mx.eye(6)).item() for gram in grams)

    before = distance()
    trained(model, settings)
    assert distance() < 0.7 * before


def test_what_is_off_is_not_stored():
    model = tiny_model()
    setup = adapt_model(model, SETTINGS, seed=1)
    trained(model)
    info = AdapterInfo("adalora", 6, 32.0, setup.scale, 0.0, 2, setup.targets.keys, "x", None, "y")
    stored = stored_parameters(model, info)
    ranks = [value.shape[1] for name, value in stored.items() if name.endswith("lora_a")]
    on = [(layer.lora_e != 0).sum().item() for layer in adapter_layers(model).values()]
    assert ranks == [max(1, count) for count in on]
    assert len(set(ranks)) > 1
    for path, layer in adapter_layers(model).items():
        product = setup.scale * (stored[f"{path}.lora_a"] @ stored[f"{path}.lora_b"]).T
        assert np.allclose(product, layer.delta(), atol=1e-5)


def test_a_run_without_steps_for_cuts_is_refused():
    model = tiny_model()
    adapt_model(model, SETTINGS, seed=1)
    with pytest.raises(InputError, match="5 and 10 of 15 steps"):
        budget_schedule(SETTINGS, model, 15)


def test_the_penalty_takes_no_memory_to_speak_of():
    # Its gradient through a flat array would be as large as the array, once for each of the parameters.
    def peak(method: str) -> int:
        model = tiny_model(num_hidden_layers=8)
        settings = AdapterSettings(method=method, rank=32, alpha=32.0)
        adapt_model(model, settings, seed=1)
        step = method_step(model, settings, STEPS)
        return peak_bytes(lambda: step([batch(1, 16, seed=0)]), waits=False)

    parameters = 8 * 2 * 32 * (4 * 64 + 2 * 32 + 3 * (64 + 96)) * 4 // 2
    # Through the flat array it was 165 times that.
    assert peak("adalora") - peak("lora") < 40 * parameters


RELORA_STEPS, EVERY, RATE = 20, 6, 5e-3


def settings(**changes) -> AdapterSettings:
    own = {"method": "relora", "rank": 3, "alpha": 6.0, "relora_every": EVERY, "relora_warmup": 2, **changes}
    return AdapterSettings(**own)


def make_step(model: nn.Module, of: AdapterSettings, optimizer: str = "adamw") -> Step:
    return method_step(model, of, RELORA_STEPS, RATE, optimizer)


def trained_of_relora(step: Step) -> list[float]:
    return losses_of(step, [batch(3, 17, seed=number % 4) for number in range(RELORA_STEPS)])


def by_merging(model: nn.Module, paths: tuple[str, ...]) -> list[float]:
    """Train the plain way: at each restart the product goes into the dense weight, and moments to zero."""
    inject(model, paths, 3, 2.0, seed=1)
    optimizer = optim.AdamW(RATE, weight_decay=0.01, bias_correction=True)
    gradient = nn.value_and_grad(model, plain_loss)
    losses, cycle = [], 0
    for number in range(RELORA_STEPS):
        if number and number % EVERY == 0:
            cycle += 1
            for path, layer in adapter_layers(model).items():
                layer.linear.weight = layer.linear.weight + layer.delta()
                layer.lora_a, layer.lora_b = fresh_factors(f"{path}#{cycle}", layer, 1)
            for part in [key for key in optimizer.state if key not in ("step", "learning_rate")]:
                optimizer.state[part] = tree_map(mx.zeros_like, optimizer.state[part])
        since = number % EVERY
        optimizer.learning_rate = RATE if number < EVERY else RATE * min(1, (since + 1) / 2)
        (loss, count), grads = gradient(model, token_arrays(batch(3, 17, seed=number % 4)))
        losses.append(loss.item() / count.item())
        grads = tree_map(lambda g, count=count: g / count, grads)
        norm = mx.sqrt(sum(mx.square(g).sum() for _, g in tree_flatten(grads)))
        optimizer.update(model, tree_map(lambda g, norm=norm: g * mx.minimum(1, 1 / norm), grads))
    return losses


def test_it_equals_merging_into_the_weights():
    model = tiny_model()
    adapt_model(model, settings(relora_prune_ratio=1.0), seed=1)
    ours = trained_of_relora(make_step(model, settings(relora_prune_ratio=1.0)))
    expected = by_merging(tiny_model(), select_targets(tiny_model()).paths)
    assert np.abs(np.array(ours) / np.array(expected) - 1).max() < 1e-4
    # Without restarts it is LoRA, another run.
    model = tiny_model()
    adapt_model(model, settings(relora_every=RELORA_STEPS), seed=1)
    assert not np.allclose(trained_of_relora(make_step(model, settings(relora_every=RELORA_STEPS))), ours, rtol=1e-3)


@pytest.mark.parametrize("base", by_default(["float", "4-bit"], "4-bit"))
@pytest.mark.parametrize("optimizer", by_default(["adamw", "muon", "sgd", "adafactor"], "adamw", "muon"))
def test_a_restart_changes_no_output_and_the_sum_is_stored(base, optimizer):
    model = tiny_model() if base == "float" else quantized(tiny_model())
    before = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    setup = adapt_model(model, settings(target_modules="all-linear,embed_tokens"), seed=1)
    step = make_step(model, settings(), optimizer)
    outputs = []
    after = step.events.after

    def watched(number, masters, optimizer):
        masters.hand_out()
        outputs.append([np.array(model(TOKENS))])
        after(number, masters, optimizer)
        masters.hand_out()
        outputs[-1].append(np.array(model(TOKENS)))

    step.events.after = watched
    losses = trained_of_relora(step)
    assert losses[-1] < losses[0]
    assert step.events.cycles == 1 + RELORA_STEPS // EVERY
    assert all(np.allclose(one, other, atol=1e-4) for one, other in outputs)
    assert not np.allclose(outputs[0][0], outputs[-1][0], atol=1e-3)
    kept = {
        name.replace(".linear.", ".").replace(".embedding.", "."): v for name, v in tree_flatten(model.parameters())
    }
    assert all(np.array_equal(value, kept[name]) for name, value in before.items())
    info = AdapterInfo("relora", 3, 6.0, setup.scale, 0.0, 2, setup.targets.keys, "x", None, "y")
    stored = stored_parameters(model, info)
    assert stored["model.layers.0.self_attn.q_proj.lora_a"].shape == (64, 3 * step.events.cycles)
    for path, layer in adapter_layers(model).items():
        product = setup.scale * (stored[f"{path}.lora_a"] @ stored[f"{path}.lora_b"])
        assert np.allclose(product if "embed" in path else product.T, layer.delta(), atol=1e-5)


def test_moments_are_pruned_at_the_same_places():
    model = tiny_model()
    of = settings(relora_prune_ratio=0.9)
    adapt_model(model, of, seed=1)
    step = make_step(model, of)
    for number in range(EVERY - 1):
        step([batch(3, 17, seed=number)])
    size = step.optimizer.state["flat"]["v"].size
    assert (step.optimizer.state["flat"]["v"] != 0).sum().item() > 0.6 * size
    step([batch(3, 17, seed=9)])
    m, v = (np.array(step.optimizer.state["flat"][name]) for name in "mv")
    assert 0.05 * size < (v != 0).sum() < 0.11 * size
    assert not m[v == 0].any()


def test_the_rate_warms_up_again():
    of = settings()
    built = build_optimizer(
        OptimizerSettings(learning_rate=1.0, lr_schedule="constant", warmup=0.0),
        RELORA_STEPS, restart_every(of, RELORA_STEPS), restart_warmup(of, RELORA_STEPS),
    )  # fmt: skip
    rates = []
    for _ in range(2 * EVERY + 1):
        built.apply_gradients({"x": mx.ones(1)}, {"x": mx.ones(1)})
        rates.append(built.learning_rate.item())
    assert rates == [1.0] * EVERY + [0.5] + [1.0] * (EVERY - 1) + [0.5]
    assert restart_every(AdapterSettings(method="relora"), 100) == 25
    assert restart_warmup(AdapterSettings(method="relora"), 100) == 2


def test_many_cycles_do_not_grow_past_the_layer():
    model = tiny_model()
    of = settings(rank=8, relora_every=1)
    setup = adapt_model(model, of, seed=1)
    step = make_step(model, of)
    trained_of_relora(step)
    widths = {path: layer.fixed_a.shape[1] for path, layer in adapter_layers(model).items()}
    assert widths["model.layers.0.self_attn.k_proj"] <= 32
    info = AdapterInfo("relora", 8, 6.0, setup.scale, 0.0, 2, setup.targets.keys, "x", None, "y")
    stored = stored_parameters(model, info)
    layer = adapter_layers(model)["model.layers.0.self_attn.k_proj"]
    product = setup.scale * (
        stored["model.layers.0.self_attn.k_proj.lora_a"] @ stored["model.layers.0.self_attn.k_proj.lora_b"]
    )
    assert np.allclose(product.T, layer.delta(), atol=1e-5)
