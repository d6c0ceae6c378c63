"""mlx-lora merge: one adapter folder that every command takes, measured beside its sources, and what it refuses."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from comparing import by_dtype
from conftest import tiny_model, write_folder
from make_adapters import OWN_TEMPLATE, TOKENS, make_adapter
from resumed_runs import command
from run_cli import one_line, run, succeeds
from tiny_moe import tiny_moe

import mlx_lora
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.adapters.merge import COMBINATIONS
from mlx_lora.config.settings import ModelSettings
from mlx_lora.engine.adapter_store import blend_factors, read_factors
from mlx_lora.exporters.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from mlx_lora.models.load import load_base

CLOSE, FAR = by_dtype((1e-4, 1e-2), (1e-1, 3e-1))  # of logits


def merge(model, out, *adapters, more=()):
    given = [word for adapter in adapters for word in ("--adapter", adapter)]
    return run("merge", "--model", model, *given, "--out", out, "--json", *more, exactly=True)


def merged(model, out, *adapters, more=("--no-evaluate",)) -> dict:
    ran = merge(model, out, *adapters, more=more)
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def logits(model, adapter=None) -> np.ndarray:
    base = load_base(ModelSettings(model=str(model)))
    if adapter is not None:
        load_adapter(base, adapter)
    return np.array(base.model(TOKENS).astype(mx.float32))


def updates(model, adapter) -> dict[str, np.ndarray]:
    base = load_base(ModelSettings(model=str(model)))
    load_adapter(base, adapter)
    return {path: np.array(layer.delta()) for path, layer in adapter_layers(base.model).items()}


@pytest.fixture(scope="module")
def two(tiny_folder, tmp_path_factory):
    """Two adapters of different ranks, layers and kinds of layers."""
    root = tmp_path_factory.mktemp("two")
    make_adapter(tiny_folder, root / "a", rank=3, seed=1, targets="all-linear,embed_tokens", strength=0.2)
    make_adapter(tiny_folder, root / "b", rank=5, seed=2, num_layers=1, strength=0.2)
    return root


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    """Two runs on different data, which hold rows out."""
    root = tmp_path_factory.mktemp("runs")
    for name, word in (("cats", "miaow"), ("dogs", "woof")):
        data = root / f"{name}.jsonl"
        rows = [{"prompt": f"{name} {n}?", "completion": word * (1 + n % 3)} for n in range(30)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        succeeds(
            *command(tiny_folder, data, root / name, "--iters", 12, "--learning-rate", 1e-2, "--valid-fraction", 0.2)
        )
    return root


# What is written


def test_cat_adds_the_weighted_updates_and_a_missing_layer_counts_as_zero(two, tiny_folder, tmp_path):
    facts = merged(tiny_folder, tmp_path / "m", f"{two / 'a'}=0.5", f"{two / 'b'}=-2")
    first, second, both = (updates(tiny_folder, folder) for folder in (two / "a", two / "b", tmp_path / "m"))
    assert facts["rank"] == 8
    assert facts["layers"] == len(both) == len(first.keys() | second.keys()) > len(second)
    for path, update in both.items():
        expected = 0.5 * first[path] - 2 * second.get(path, np.zeros(1))
        assert np.allclose(update, expected, atol=1e-5 * np.abs(expected).max()), path
        assert not np.allclose(update, first[path], atol=1e-2)


def test_cat_is_the_blend_of_the_server(two, tiny_folder, tmp_path):
    merged(tiny_folder, tmp_path / "m", f"{two / 'a'}=0.5", f"{two / 'b'}=1")
    base = load_base(ModelSettings(model=str(tiny_folder)))
    parts = [(name, read_factors(base, two / name, mx.float32), weight) for name, weight in (("a", 0.5), ("b", 1.0))]
    served, alone = blend_factors(parts).layers, read_factors(base, tmp_path / "m", mx.float32).layers
    assert served.keys() == alone.keys()
    for path, factors in served.items():
        assert np.allclose(factors.a @ factors.b, alone[path].a @ alone[path].b, atol=1e-5)


@pytest.mark.parametrize("how", ["svd", "ties_svd"])
def test_a_merged_folder_works_in_every_command(how, two, tiny_folder, tmp_path):
    given = ("--model", tiny_folder, "--adapter-path", tmp_path / "m")
    facts = merged(
        tiny_folder, tmp_path / "m", f"{two / 'a'}=1", f"{two / 'b'}=1", more=("--how", how, "--no-evaluate")
    )
    assert facts["rank"] == 5
    expected = logits(tiny_folder, tmp_path / "m")
    assert not np.allclose(expected, logits(tiny_folder), atol=FAR)
    assert run("generate", *given, "--prompt", "Hello", "--max-tokens", 3).code == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "bcd"}\n')
    found = json.loads(run("evaluate", *given, "--data", rows, "--json").out)
    assert found["loss"] != pytest.approx(found["base_loss"], abs=1e-3)
    for to in ("peft", "mlx-lm"):
        succeeds("export", *given, "--to", to, "--out", tmp_path / to)
        assert np.allclose(logits(tiny_folder, tmp_path / to), expected, atol=CLOSE)
    assert run("fuse", *given, "--out", tmp_path / "f").code == 0
    assert np.allclose(logits(tmp_path / "f"), expected, atol=CLOSE)


@pytest.mark.long
def test_it_is_measured_on_the_rows_that_the_runs_held_out(runs, tiny_folder, tmp_path):
    facts = merged(tiny_folder, tmp_path / "m", f"{runs / 'cats'}=1", f"{runs / 'dogs'}=1", more=())
    cats, dogs = facts["losses"]
    assert (cats["rows"], dogs["rows"]) == (6, 6)
    for name, found in (("cats", cats), ("dogs", dogs)):
        alone = json.loads(run("evaluate", "--model", tiny_folder, "--adapter-path", runs / name, "--json").out)
        assert found["adapters"][name] == pytest.approx(alone["loss"], rel=by_dtype(1e-4, 5e-3))
        assert found["base"] == pytest.approx(alone["base_loss"], rel=by_dtype(1e-4, 5e-3))
        assert min(found["adapters"], key=found["adapters"].get) == name
        assert found["merged"] < found["base"]
    assert cats["merged"] != pytest.approx(dogs["merged"], rel=1e-4)
    assert json.loads((tmp_path / "m" / "merge.json").read_text()) == {
        k: facts[k] for k in facts if k not in ("out", "model")
    }
    # Rows of one file are one column, and rows that are gone are not measured.
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "bcd"}\n')
    given = (f"{runs / 'cats'}=1", f"{runs / 'dogs'}=1")
    (one,) = merged(tiny_folder, tmp_path / "n", *given, more=("--data", rows))["losses"]
    assert (one["rows"], str(rows) in one["of"]) == (1, True)
    moved = shutil.copytree(runs / "cats", tmp_path / "moved")
    (moved / "run.yaml").unlink()
    facts = merged(tiny_folder, tmp_path / "o", f"{moved}=1", f"{runs / 'dogs'}=1", more=())
    assert [list(one["adapters"]) for one in facts["losses"]] == [["moved", "dogs"]]
    assert list(facts["not_measured"]) == ["moved"]


def test_the_table_has_a_row_for_each_model(runs, tiny_folder, tmp_path):
    ran = run(
        "merge", "--model", tiny_folder, "--adapter", f"{runs / 'cats'}=1", "--adapter", f"{runs / 'dogs'}=1", "--how", "dare",
        "--out", tmp_path / "m", exactly=True,
    )  # fmt: skip
    head, *rows = ran.out.splitlines()
    assert ("6 held-out rows of cats" in head, "6 held-out rows of dogs" in head) == (True, True)
    assert [row.split()[0] for row in rows] == ["base", "cats", "dogs", "merged"]
    assert "dare_linear" in rows[-1]


@pytest.mark.parametrize("how", ["cat", "svd", "ties"])
def test_experts_of_a_mixture_are_merged(how, tmp_path):
    model, config = tiny_moe("qwen3_moe")
    folder = write_folder(tmp_path / "base", model, config)
    for seed in (1, 2):
        make_adapter(folder, tmp_path / str(seed), seed=seed, strength=0.3)
    merged(
        folder, tmp_path / "m", *(f"{tmp_path / str(seed)}=1" for seed in (1, 2)), more=("--how", how, "--no-evaluate")
    )
    first, second, both = (updates(folder, tmp_path / name) for name in ("1", "2", "m"))
    is_sum = [np.allclose(both[path], first[path] + second[path], atol=1e-4) for path in both]
    assert any(first[path].ndim == 3 for path in both)
    assert all(is_sum) if how == "cat" else not any(is_sum)


def test_what_the_adapters_agree_on_is_kept(two, tiny_folder, tmp_path):
    make_adapter(tiny_folder, tmp_path / "x", seed=3, chat_template=OWN_TEMPLATE)
    make_adapter(tiny_folder, tmp_path / "y", seed=4, chat_template=OWN_TEMPLATE)
    for other, template in ((tmp_path / "y", OWN_TEMPLATE), (two / "b", None)):
        out = tmp_path / f"merged-{other.name}"
        merged(tiny_folder, out, f"{tmp_path / 'x'}=1", f"{other}=1")
        own = json.loads((out / CONFIG_FILE).read_text())["mlx_lora"]
        assert own["chat_template"] == template
        assert own["base_fingerprint"] == load_base(ModelSettings(model=str(tiny_folder))).fingerprint


def test_python_merges_and_leaves_the_base_as_it_is(two, tiny_folder, tmp_path):
    base = mlx_lora.load(tiny_folder)
    before = np.array(base.model(TOKENS))
    found = mlx_lora.merge(
        base, {two / "a": 0.5, two / "b": 1}, out=tmp_path / "m", how="svd", svd_rank=2, evaluate=False
    )
    assert (found.adapter, found.rank) == (tmp_path / "m", 2)
    assert np.array_equal(np.array(base.model(TOKENS)), before)
    assert base.generate("Hello", found.adapter, max_tokens=2) is not None
    with pytest.raises(ValueError, match="density"):
        mlx_lora.merge(base, {two / "a": 0.5}, out=tmp_path / "n", how="ties", density=2.0)


# What is refused


def test_bad_arguments_are_one_line(two, tiny_folder, tmp_path):
    a, b, out = two / "a", two / "b", tmp_path / "out"
    cases = {
        "no such folder": ((f"{a}=1", f"{tmp_path / 'none'}=1"), (), "none"),
        "no weight": ((f"{a}=1", str(b)), (), str(b)),
        "a word": ((f"{a}=heavy",), (), "heavy"),
        "a name": ((f"bard={a}",), (), "DIR=WEIGHT"),
        "not finite": ((f"{a}=nan",), (), "nan"),
        "too large": ((f"{a}=1e9",), (), "100"),
        "twice": ((f"{a}=1", f"{a}=0.5"), (), "twice"),
        "twice, spelled otherwise": ((f"{a}=1", f"{a.parent / '..' / a.parent.name / 'a'}=1"), (), "twice"),
        "density 0": ((f"{a}=1", f"{b}=1"), ("--how", "ties_svd", "--density", 0), "--density"),
        "density above 1": ((f"{a}=1", f"{b}=1"), ("--how", "dare", "--density", 1.5), "--density"),
        "density nan": ((f"{a}=1", f"{b}=1"), ("--how", "dare", "--density", "nan"), "--density"),
        "density of cat": ((f"{a}=1", f"{b}=1"), ("--density", 0.5), "--density"),
        "rank 0": ((f"{a}=1", f"{b}=1"), ("--how", "svd", "--svd-rank", 0), "--svd-rank"),
        "rank of ties": ((f"{a}=1", f"{b}=1"), ("--how", "ties", "--svd-rank", 4), "--svd-rank"),
        "seed of ties": ((f"{a}=1", f"{b}=1"), ("--how", "ties", "--seed", 4), "--seed"),
        "negative seed": ((f"{a}=1", f"{b}=1"), ("--how", "dare_linear_svd", "--seed", -1), "--seed"),
        "signs of svd": ((f"{a}=1", f"{b}=1"), ("--how", "svd", "--majority-sign-method", "total"), "--majority-sign"),
        "another way": ((f"{a}=1", f"{b}=1"), ("--how", "slerp"), "slerp"),
        "ranks": ((f"{a}=1", f"{b}=1"), ("--how", "linear"), "svd"),
        "no rows": ((f"{a}=1", f"{b}=1"), ("--data", tmp_path / "none.jsonl"), "none.jsonl"),
    }
    for name, (adapters, more, fact) in cases.items():
        one_line(merge(tiny_folder, out, *adapters, more=more), fact)
        assert not out.exists(), name
    assert run("merge", "--model", tiny_folder, "--out", out).code == 2


def test_adapters_of_another_base_are_refused(two, tmp_path):
    other = write_folder(tmp_path / "other", tiny_model(seed=9))
    given = (f"{two / 'a'}=1", f"{two / 'b'}=1")
    one_line(merge(other, tmp_path / "m", *given), "different base")
    assert merge(other, tmp_path / "m", *given, more=("--ignore-fingerprint", "--no-evaluate")).code == 0


def test_what_is_no_sum_of_factors_is_refused(two, tiny_folder, chats, tmp_path):
    make_adapter(tiny_folder, tmp_path / "dora", form="dora")
    make_adapter(tiny_folder, tmp_path / "nan", targets="q_proj")
    file = tmp_path / "nan" / WEIGHTS_FILE
    stored = mx.load(str(file))
    name = next(name for name in stored if name.endswith("lora_b"))
    mx.save_safetensors(str(file), {**stored, name: stored[name] * float("nan")})
    make_adapter(tiny_folder, tmp_path / "half", targets="embed_tokens", peft=True)
    file = tmp_path / "half" / "adapter_model.safetensors"
    mx.save_safetensors(str(file), {k: v for k, v in mx.load(str(file)).items() if "lm_head" not in k})
    assert run(*command(tiny_folder, chats, tmp_path / "full", "--modules-to-save", "norm", "--iters", 1)).code == 0
    for name, fact in (("dora", "dora"), ("nan", "q_proj"), ("half", "head"), ("full", "norm")):
        one_line(merge(tiny_folder, tmp_path / "m", f"{two / 'b'}=1", f"{tmp_path / name}=1"), name, fact)
    assert not (tmp_path / "m").exists()


def test_only_a_merged_adapter_is_replaced(two, tiny_folder, tmp_path):
    given, m = (f"{two / 'a'}=1", f"{two / 'b'}=1"), tmp_path / "m"
    merged(tiny_folder, m, *given)
    one_line(merge(tiny_folder, m, *given), "--force")
    merged(tiny_folder, m, *given, more=("--force", "--how", "svd", "--no-evaluate"))
    one_line(merge(tiny_folder, m, f"{m}=1", given[0], more=("--force",)), "--out")
    shutil.copytree(two / "a", tmp_path / "run")
    one_line(merge(tiny_folder, tmp_path / "run", *given, more=("--force",)), "--out")
    (tmp_path / "file").write_text("")
    one_line(merge(tiny_folder, tmp_path / "file", *given), "--out")


def test_every_way_runs_with_one_adapter(two, tiny_folder, tmp_path):
    rescaled = {}
    for how in COMBINATIONS:
        merged(tiny_folder, tmp_path / how, f"{two / 'b'}=0.5", more=("--how", how, "--no-evaluate"))
        rescaled[how] = updates(tiny_folder, tmp_path / how)
    alone = updates(tiny_folder, two / "b")
    for how, found in rescaled.items():
        is_half = all(np.allclose(found[path], 0.5 * alone[path], atol=1e-5) for path in alone)
        assert is_half is (COMBINATIONS[how].prunes is None), how
