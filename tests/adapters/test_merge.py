"""Merging adapters: the arithmetic of each way against PEFT's own add_weighted_adapter on torch, and what must hold by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import quantized, tiny_model, write_folder
from make_adapters import TOKENS, make_adapter
from tiers import by_default
from torch_judge import torch_base

import mlx_lora
from mlx_lora.adapters.inject import adapter_layers, path_key
from mlx_lora.adapters.lora import group_update
from mlx_lora.adapters.merge import COMBINATIONS, AdapterTerm, MergeSettings, add_up, low_rank, merge_layer, prune
from mlx_lora.api.fuse import merge_adapters
from mlx_lora.config.settings import ModelSettings
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.models.load import load_base
from mlx_lora.utils.errors import InputError

CLOSE, FAR = 1e-5, 1e-2
FACTORS = [name for name, way in COMBINATIONS.items() if way.of == "factors"]
UPDATES = [name for name, way in COMBINATIONS.items() if way.of == "updates"]
RANDOM = [name for name, way in COMBINATIONS.items() if way.prunes == "random"]
SEED, DENSITY = 3, 0.4


def parts_of(
    *ranks: int, weights=(0.7, -0.3, 1.1), scales=(2.0, 0.5, 1.3), widths=(24, 40), seed=0
) -> list[AdapterTerm]:
    mx.random.seed(seed)
    return [
        AdapterTerm(mx.random.normal((widths[0], rank)), mx.random.normal((rank, widths[1])), scale, weight)
        for rank, weight, scale in zip(ranks, weights, scales, strict=False)
    ]


def update_of(parts: list[AdapterTerm]) -> np.ndarray:
    """The weighted sum of the updates, in float64."""
    return sum(p.weight * p.scale * np.array(p.a, np.float64) @ np.array(p.b, np.float64) for p in parts)


def product(factors) -> np.ndarray:
    return np.array(factors[0], np.float64) @ np.array(factors[1], np.float64)


# Against PEFT


class Judge:
    """PEFT's model with some of its adapters, which it merges; ours are the same folders."""

    def __init__(self, root: Path, base: Path, settings: list[dict]):
        import torch
        from peft import LoraConfig, get_peft_model

        self.base, self.folders = base, []
        torch.manual_seed(1)
        for number, given in enumerate(settings):
            config = LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "down_proj"], **given})
            if number:
                self.model.add_adapter(f"a{number}", config)
            else:
                self.model = get_peft_model(torch_base(base), config, adapter_name="a0")
        for name, value in self.model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(value, std=0.3)
        self.model.save_pretrained(root)
        self.names = [f"a{number}" for number in range(len(settings))]
        self.folders = [root / name for name in self.names]

    def layers(self) -> Iterator[tuple[str, object]]:
        from peft.tuners.lora import LoraLayer

        for name, module in self.model.base_model.model.named_modules():
            if isinstance(module, LoraLayer):
                yield name, module

    def merged(self, weights, how: str, **settings) -> dict[str, np.ndarray]:
        """The product of the merged factors by layer, (in, out).

        It is without PEFT's scale of the new adapter: that is 1, but for rsLoRA, where PEFT 0.21 keeps the flag and so
        multiplies the sum by the root of the new rank.
        """
        self.model.add_weighted_adapter(self.names, weights, "merged", combination_type=how, **settings)
        found = {}
        for name, module in self.layers():
            if "merged" in module.lora_A:
                a, b = module.lora_A["merged"].weight, module.lora_B["merged"].weight
                found[name] = (b.detach().numpy().astype(np.float64) @ a.detach().numpy()).T
        self.model.delete_adapter("merged")
        return found


def merged_here(judge: Judge, out: Path, weights, settings: MergeSettings) -> dict[str, np.ndarray]:
    """The update of our merged folder by layer, (in, out), as it is loaded again."""
    base = load_base(ModelSettings(model=str(judge.base)))
    given = {str(folder): weight for folder, weight in zip(judge.folders, weights, strict=True)}
    merge_adapters(base, given, settings, out, evaluate=False)
    load_adapter(base, out)
    return {path: np.array(layer.delta()).T for path, layer in adapter_layers(base.model).items()}


def agree(ours: dict, theirs: dict) -> None:
    """Assert that the updates are the same, relative to the largest number of each."""
    assert ours.keys() == theirs.keys()
    for path, update in theirs.items():
        assert np.abs(update).max() > FAR
        assert np.abs(ours[path] - update).max() <= CLOSE * np.abs(update).max(), path


@pytest.fixture(scope="session")
def judged_base(tmp_path_factory):
    pytest.importorskip("peft")
    pytest.importorskip("torch")
    config = {"tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}
    return write_folder(tmp_path_factory.mktemp("judged"), tiny_model(tie_word_embeddings=False), config)


# The ranks that a way takes, the number of adapters, rsLoRA, and adapters that lack layers.
CASES = {
    "two": [{"r": 4, "lora_alpha": 6}, {"r": 4, "lora_alpha": 2}],
    "three, rslora": [{"r": 4, "lora_alpha": 6, "use_rslora": True}, {"r": 4}, {"r": 4, "lora_alpha": 3, "use_rslora": True}],
    "other layers": [{"r": 4, "target_modules": ["q_proj"]}, {"r": 4, "target_modules": ["q_proj", "v_proj"]}, {"r": 4}],
    "two, other ranks": [{"r": 3, "lora_alpha": 6}, {"r": 7, "lora_alpha": 2}],
    "three, other ranks, rslora": [{"r": 2, "use_rslora": True}, {"r": 5}, {"r": 3, "rank_pattern": {"q_proj": 6}}],
}  # fmt: skip
WEIGHTS = [0.7, -0.4, 1.6]
SIGNED = [name for name, way in COMBINATIONS.items() if way.elects]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("how", "case"), by_default(
    [(how, case) for how in COMBINATIONS for case in CASES if how not in FACTORS or "ranks" not in case],
    ("linear", "two"), ("ties", "three, rslora"), ("svd", "three, other ranks, rslora"), ("dare_ties_svd", "other layers"),
    ("dare_linear", "two"), ("ties_svd", "two, other ranks"),
))  # fmt: skip
def test_each_way_gives_the_update_of_peft(how, case, judged_base, tmp_path, monkeypatch):
    """PEFT drops what we drop: its draws are replaced by ours, layer by layer, in the order in which it asks for them."""
    import torch

    way, judge = COMBINATIONS[how], Judge(tmp_path / "p", judged_base, CASES[case])
    weights = WEIGHTS[: len(judge.names)]
    given = {"density": DENSITY} if way.prunes else {}
    own = MergeSettings(how, seed=SEED if way.prunes == "random" else None, **given)
    if way.prunes == "random":
        masks = iter(our_masks(judge, own))
        monkeypatch.setattr(torch, "bernoulli", lambda odds: next(masks).reshape(odds.shape))
    theirs = judge.merged(weights, how, **given)
    if way.prunes == "random":
        assert next(masks, None) is None  # all of them were taken
    ours = merged_here(judge, tmp_path / "m", weights, own)
    agree(ours, theirs)
    other = merged_here(judge, tmp_path / "n", [w + 0.2 for w in weights], own)
    assert any(np.abs(other[path] - update).max() > FAR for path, update in theirs.items())


def our_masks(judge: Judge, settings: MergeSettings) -> Iterator:
    """The masks of our draws, in PEFT's layout and order: in each layer A of each adapter, then B; or the updates."""
    import torch

    for path, module in judge.layers():
        own = [name for name in judge.names if name in module.lora_A]
        keys = mx.random.split(path_key(f"merge:{path}", settings.seed or 0), 2 * len(own))
        shapes = [(module.lora_A[name].weight.shape[::-1], module.lora_B[name].weight.shape[::-1]) for name in own]
        if settings.combination.of == "updates":
            asked = [((a[0], b[1]), key) for (a, b), key in zip(shapes, keys[::2], strict=True)]
        else:
            asked = [(a, key) for (a, _), key in zip(shapes, keys[::2], strict=True)]
            asked += [(b, key) for (_, b), key in zip(shapes, keys[1::2], strict=True)]
        for shape, key in asked:
            kept = prune(mx.ones(shape), settings, key) > 0
            yield torch.tensor(np.array(kept).T.astype(np.float32).copy())


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("how", by_default(SIGNED[:2], "ties"))
def test_signs_by_count_and_a_lower_rank_are_those_of_peft(how, judged_base, tmp_path):
    judge, options = Judge(tmp_path / "p", judged_base, CASES["three, rslora"]), {"majority_sign_method": "frequency"}
    if how == "ties":
        theirs = judge.merged(WEIGHTS, "ties", density=DENSITY, **options)
        agree(merged_here(judge, tmp_path / "m", WEIGHTS, MergeSettings("ties", DENSITY, **options)), theirs)
        other = merged_here(judge, tmp_path / "n", WEIGHTS, MergeSettings("ties", DENSITY))
        assert any(np.abs(other[path] - update).max() > FAR for path, update in theirs.items())
    for rank in (2, 9):
        theirs = judge.merged(WEIGHTS, "svd", svd_rank=rank)
        agree(merged_here(judge, tmp_path / f"s{rank}", WEIGHTS, MergeSettings("svd", svd_rank=rank)), theirs)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_one_adapter_is_scaled_as_in_peft(judged_base, tmp_path):
    judge = Judge(tmp_path / "p", judged_base, [{"r": 4, "lora_alpha": 6}])
    theirs = judge.merged([-0.5], "linear")
    for how in ("linear", "cat", "svd"):
        agree(merged_here(judge, tmp_path / how, [-0.5], MergeSettings(how)), theirs)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("how", ["cat", "ties_svd"])
def test_a_merged_adapter_goes_to_peft(how, judged_base, tmp_path):
    import torch
    from peft import PeftModel

    given = {
        str(make_adapter(judged_base, tmp_path / "a", rank=3, strength=0.2)): 0.7,
        str(make_adapter(judged_base, tmp_path / "b", rank=5, seed=2, num_layers=1, strength=0.2)): 0.5,
    }
    base = load_base(ModelSettings(model=str(judged_base)))
    merge_adapters(base, given, MergeSettings(how), tmp_path / "m", evaluate=False)
    mlx_lora.export(judged_base, tmp_path / "m", to="peft", out=tmp_path / "p")
    load_adapter(base, tmp_path / "m")
    ours, alone = np.array(base.model(TOKENS)), torch_base(judged_base)
    with torch.no_grad():
        before = alone(torch.tensor(np.array(TOKENS))).logits.numpy()
        theirs = PeftModel.from_pretrained(alone, tmp_path / "p").eval()(torch.tensor(np.array(TOKENS))).logits.numpy()
    assert np.allclose(ours, theirs, atol=1e-4)
    assert not np.allclose(ours, before, atol=FAR)


# By itself


@pytest.mark.parametrize("ranks", [(4, 4), (2, 7), (3, 5, 6), (30, 30)])
def test_cat_is_the_sum_and_svd_the_nearest_of_its_rank(ranks):
    parts = parts_of(*ranks)
    whole = update_of(parts)
    exact = merge_layer("x", parts, MergeSettings("cat"), 1)
    assert exact[0].shape[1] == sum(ranks)
    assert np.allclose(product(exact), whole, atol=CLOSE * np.abs(whole).max())
    left, sizes, right = np.linalg.svd(whole)
    for rank in (1, 3, 100):
        found = merge_layer("x", parts, MergeSettings("svd"), rank)
        assert found[0].shape[1] == min(rank, sum(ranks), 24)
        nearest = (left[:, :rank] * sizes[:rank]) @ right[: len(sizes)][:rank]
        assert np.allclose(product(found), nearest, atol=CLOSE * np.abs(whole).max())
    assert np.abs(product(merge_layer("x", parts, MergeSettings("svd"), 1)) - whole).max() > FAR


def test_the_low_rank_is_exact_for_long_matrices():
    """In float32, QR of so many rows would lose two digits."""
    mx.random.seed(0)
    a, b = mx.random.normal((3000, 12)), mx.random.normal((12, 200))
    found = product(low_rank(a, b, 12))
    whole = np.array(a, np.float64) @ np.array(b, np.float64)
    assert np.linalg.norm(found - whole) < 1e-6 * np.linalg.norm(whole)
    assert np.linalg.norm(product(low_rank(a, b, 11)) - whole) > 0.05 * np.linalg.norm(whole)


def test_linear_is_twice_the_sum_of_two_adapters_that_share_a():
    """And of others it is no multiple of the sum: it has A of one times B of the other in it."""
    parts = parts_of(4, 4, weights=(0.5, 0.5), scales=(1.0, 1.0))
    shared = [parts[0], AdapterTerm(parts[0].a, parts[1].b, 1.0, 0.5)]
    for given, is_twice in ((shared, True), (parts, False)):
        found = product(merge_layer("x", given, MergeSettings("linear"), 4))
        assert np.allclose(found, 2 * update_of(given), atol=1e-4) is is_twice


def test_trim_keeps_the_largest_numbers():
    array = mx.array([[3.0, -1.0, 0.5], [-4.0, 2.0, 0.1]])
    kept = prune(array, MergeSettings("ties", 0.5), mx.random.key(0))
    assert kept.tolist() == [[3.0, 0.0, 0.0], [-4.0, 2.0, 0.0]]
    assert prune(array, MergeSettings("ties", 1), mx.random.key(0)).tolist() == array.tolist()
    assert not prune(array, MergeSettings("ties", 0.1), mx.random.key(0)).any().item()  # less than one number


def test_drop_keeps_the_expected_value_and_depends_on_the_seed():
    array, settings = mx.full((200, 200), 2.0), MergeSettings("dare", 0.25)
    kept = prune(array, settings, mx.random.key(1))
    assert set(np.unique(kept).tolist()) == {0.0, 8.0}
    assert kept.mean().item() == pytest.approx(2.0, abs=0.15)
    assert not mx.array_equal(kept, prune(array, settings, mx.random.key(2))).item()
    parts = parts_of(4, 4)
    once, again, other = (merge_layer("x", parts, MergeSettings("dare", seed=seed), 4)[0] for seed in (1, 1, 2))
    assert mx.array_equal(once, again).item()
    assert not mx.array_equal(once, other).item()
    assert not mx.array_equal(once, merge_layer("y", parts, MergeSettings("dare", seed=1), 4)[0]).item()


def test_elected_signs_leave_out_those_that_disagree():
    arrays = [mx.array([1.0, -2.0, 0.0]), mx.array([3.0, 1.0, 5.0]), mx.array([-1.0, 0.5, 1.0])]
    by_sum = add_up(arrays, [1.0, 1.0, 2.0], MergeSettings("ties"))
    assert by_sum.tolist() == [2.0, -2.0, 3.5]  # means of those that agree: (1 + 3) / 2, -2 alone, (5 + 2 * 1) / 2
    by_count = add_up(arrays, [1.0, 1.0, 2.0], MergeSettings("ties", majority_sign_method="frequency"))
    assert by_count.tolist() == [2.0, 1.0, 3.5]


@pytest.mark.parametrize("how", by_default(list(COMBINATIONS), "cat", "ties", "svd", "dare_linear_svd"))
def test_experts_are_merged_each_for_itself(how):
    one, other = parts_of(4, 4, seed=1), parts_of(4, 4, seed=2)
    both = [
        AdapterTerm(mx.stack([x.a, y.a]), mx.stack([x.b, y.b]), x.scale, x.weight)
        for x, y in zip(one, other, strict=True)
    ]
    a, b = merge_layer("x", both, MergeSettings(how), 4)
    for expert, parts in enumerate((one, other)):
        alone = merge_layer(f"x.{expert}", parts, MergeSettings(how), 4)
        assert np.allclose(product((a[expert], b[expert])), product(alone), atol=1e-5)
    assert np.abs(product((a[0], b[0])) - product((a[1], b[1]))).max() > FAR


@pytest.mark.parametrize("how", FACTORS)
def test_ways_that_merge_factors_need_one_rank(how):
    with pytest.raises(InputError) as refused:
        merge_layer("layers.0.q_proj", parts_of(3, 4), MergeSettings(how), 4)
    for fact in ("layers.0.q_proj", "3, 4", f"--how {how}", "cat", "svd"):
        assert fact in str(refused.value)


@pytest.mark.parametrize(("how", "kept"), [("cat", True), ("linear", True), ("ties", True), ("svd", False)])
def test_a_merged_qa_lora_still_fuses_exactly(how, kept, tmp_path):
    config = {"quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}
    folder = write_folder(tmp_path / "base", quantized(tiny_model()), config)
    given = {str(make_adapter(folder, tmp_path / str(seed), seed=seed, form="qa-lora")): 0.6 for seed in (1, 2)}
    base = load_base(ModelSettings(model=str(folder)))
    merge_adapters(base, given, MergeSettings(how), tmp_path / "m", evaluate=False)
    info = load_adapter(base, tmp_path / "m")
    assert (info.method == "qa-lora") is kept
    updates = [group_update(layer) for layer in adapter_layers(base.model).values()]
    assert all((update is not None) is kept for update in updates)
