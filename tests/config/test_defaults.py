"""What a run chooses for itself: the rate from the model, the length from the data, and warnings of what was given."""

from __future__ import annotations

import json

import pytest
import yaml
from run_cli import run, succeeds

from mlx_lora.config import defaults
from mlx_lora.config.defaults import DataFacts, preset_settings, rows_per_step, with_learning_rate, with_length
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS


def rate(model_type: str, width: int, **settings: object) -> float:
    return with_learning_rate(train_settings(settings), model_type, width).optimizer.learning_rate


def length(examples: int, tokens: int = 50, held_out: int = 0, **settings: object):
    """Return the settings of a run over equal rows, as planned without a lack of memory."""
    asked, data = train_settings(settings), DataFacts(examples, examples * tokens, held_out)
    return with_length(asked, asked.loop.batch_tokens or defaults.batch_tokens_for(asked, data), data).loop


def updates(examples: int, **more: object) -> float:
    loop, data = length(examples, **more), DataFacts(examples, examples * 50)
    return loop.epochs * defaults.steps_per_epoch(loop, data)


def test_the_rate_is_the_published_formula():
    # tinker-cookbook, hyperparam_utils.get_lr: 5e-5 * 10 * (2000 / hidden)^0.781 for Llama, 0.0775 for Qwen.
    assert rate("llama", 576) == pytest.approx(5e-4 * (2000 / 576) ** 0.781, rel=0.05)
    assert rate("llama", 4096) == pytest.approx(2.9e-4, rel=0.05)
    assert rate("qwen2", 1536) == pytest.approx(5e-4 * (2000 / 1536) ** 0.0775, rel=0.05)
    assert rate("qwen3", 4096) > rate("llama", 4096)  # wide models of the two families differ the other way
    assert rate("qwen3", 576) < rate("gemma3_text", 576) < rate("llama", 576)


def test_the_rate_follows_method_and_objective_and_stays_as_given():
    lora = rate("llama", 2048)
    assert rate("llama", 2048, method="full") == pytest.approx(lora / 10, rel=0.05)
    assert rate("llama", 2048, method="rslora", rank=16) == pytest.approx(lora / 4, rel=0.05)
    assert rate("llama", 2048, method="lora-plus") < lora
    assert rate("llama", 2048, objective="dpo") < lora / 4
    assert rate("llama", 2048, learning_rate=0.5) == 0.5
    assert defaults.LEAST_RATE <= rate("llama", 10**6, method="full") < rate("llama", 8) <= defaults.MOST_RATE


@pytest.mark.parametrize("examples", [20, 40, 60, 150, 300, 1000, 1500])
def test_small_sets_get_enough_updates(examples):
    assert 55 <= updates(examples) <= 160


def test_other_wordings_are_no_further_examples_and_get_more_updates():
    assert length(350, rephrase=6).batch_tokens == length(50).batch_tokens
    assert 1.5 * updates(50) < updates(350, rephrase=6) < 300


def test_a_base_on_the_disk_gets_larger_batches_that_leave_enough_updates():
    def tokens(examples: int, hidden_from: int, **settings: object) -> int:
        return defaults.batch_tokens_for(train_settings(settings), DataFacts(examples, examples * 50), hidden_from)

    usual = tokens(60, 0)
    assert tokens(60, usual // 2) == usual
    assert tokens(60, usual + 100) == usual + 100
    most = tokens(60, 10**6)  # a fifth of the rows: 20 epochs of 5 steps
    assert usual + 100 < most < 60 * 50 / 3
    assert tokens(20, 10**6) == tokens(20, 0)
    assert tokens(10**4, 10**6) <= DEFAULT_BATCH_TOKENS
    assert tokens(60, 10**6, grad_accumulation_steps=2) == pytest.approx(most / 2, abs=1)


def test_large_sets_get_one_pass_and_never_more_than_the_planner_allows():
    assert length(20_000).epochs == 1
    assert length(20_000, tokens=500).batch_tokens == DEFAULT_BATCH_TOKENS
    assert [rows_per_step(n) for n in (10, 60, 300, 1000, 10**6)] == sorted(
        rows_per_step(n) for n in (10, 60, 300, 1000, 10**6)
    )
    assert length(60).batch_tokens < length(5000).batch_tokens
    assert length(3).epochs <= defaults.MOST_EPOCHS


def test_what_is_given_stays():
    assert length(60, epochs=2).epochs == 2
    assert length(60, iters=7).epochs is None
    assert length(60, batch_tokens=512).batch_tokens == 512
    assert length(60, steps_per_eval=3, keep_best=True, early_stopping_patience=2).early_stopping_patience == 2
    assert updates(60, batch_size=2) >= 55
    # Accumulation divides a step's rows, it does not multiply them.
    assert length(300, grad_accumulation_steps=4).batch_tokens == pytest.approx(length(300).batch_tokens / 4, abs=1)


def test_a_run_ends_early_only_where_enough_is_held_out_and_its_length_was_open():
    few, many = length(60, held_out=3), length(600, held_out=30)
    assert [(bool(one.early_stopping_patience), one.keep_best) for one in (few, many)] == [(False, False), (True, True)]
    assert many.steps_per_eval < defaults.STEPS_PER_EVAL
    for more in ({"epochs": 3}, {"method": "adalora"}, {"early_stopping_patience": 0}):
        assert not length(600, held_out=30, **more).early_stopping_patience


def test_rewards_keep_one_pass():
    loop = length(60, objective="grpo", reward="exact_match")
    assert (loop.epochs, loop.batch_tokens) == (1, DEFAULT_BATCH_TOKENS)


def test_presets_are_points_of_one_rule():
    data = DataFacts(60, 3000)
    counts = {}
    for name in ("quick", "balanced", "thorough"):
        counts[name] = updates(60, **preset_settings(name, data))
    assert counts["quick"] < counts["balanced"] < counts["thorough"]
    assert counts["balanced"] == updates(60)
    assert preset_settings("balanced", data) == {}
    many = DataFacts(100_000, 5_000_000)  # for which one epoch is usual
    assert [preset_settings(name, many).get("epochs") for name in ("quick", "balanced", "thorough")] == [0.5, None, 2.0]


SHORT = 48  # updates of the runs here in place of 100


@pytest.fixture(scope="module")
def by_default(tiny_folder, chats, tmp_path_factory):
    """A run with no flag but model, data and folder."""
    out = tmp_path_factory.mktemp("defaults") / "adapter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defaults, "UPDATES", SHORT)
        ran = succeeds("train", "--model", tiny_folder, "--data", chats, "--adapter-path", out, "--sample-tokens", 0)
    return out, ran


def test_a_run_writes_what_it_chose(by_default):
    out, ran = by_default
    chosen = yaml.safe_load((out / "run.yaml").read_text())
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert min(chosen["learning_rate"], chosen["epochs"]) > 0
    assert chosen["chat_date"] is None  # the template shows no date
    assert chosen["batch_tokens"] < DEFAULT_BATCH_TOKENS
    assert last["step"] >= 40
    line = next(line for line in ran.err.splitlines() if line.startswith("Chosen"))
    assert f"{chosen['learning_rate']:g}" in line
    assert f"{last['step']} steps" in line
    assert "Warning" not in ran.err


def test_the_plan_says_what_the_run_does(by_default, tiny_folder, chats, monkeypatch):
    out, _ = by_default
    monkeypatch.setattr(defaults, "UPDATES", SHORT)
    planned = json.loads(run("plan", "--model", tiny_folder, "--data", chats, "--json").out)
    chosen = yaml.safe_load((out / "run.yaml").read_text())
    assert planned["steps"] == json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (
        planned["settings"].items()
        >= {name: chosen[name] for name in ("learning_rate", "epochs", "batch_tokens")}.items()
    )
    assert not planned["warnings"]


def test_run_yaml_repeats_the_run(by_default, tmp_path):
    out, _ = by_default
    ran = succeeds("train", "--config", out / "run.yaml", "--adapter-path", tmp_path / "again")
    assert "Chosen" not in ran.err
    assert (tmp_path / "again" / "adapters.safetensors").read_bytes() == (out / "adapters.safetensors").read_bytes()


@pytest.mark.long
def test_a_resumed_run_keeps_its_choices(by_default, tiny_folder, chats, tmp_path, monkeypatch):
    out, _ = by_default
    half = tmp_path / "half"
    asked = ("train", "--model", tiny_folder, "--data", chats, "--adapter-path", half, "--sample-tokens", 0)
    with monkeypatch.context() as patch:
        patch.setattr(defaults, "UPDATES", SHORT)
        patch.setattr("mlx_lora.trainer.guards.Position.diverged", _fail_at(20))
        with pytest.raises(RuntimeError):
            run(*asked, "--save-every", 10)
    # Another version may have other rules; the run goes on by those that it began with.
    monkeypatch.setattr(defaults, "FULL_RATE", 1e-6)
    monkeypatch.setattr(defaults, "UPDATES", 10)
    monkeypatch.setattr(defaults, "FEWEST_ROWS", 30)
    succeeds(*asked, "--save-every", 10, "--resume")
    assert (half / "adapters.safetensors").read_bytes() == (out / "adapters.safetensors").read_bytes()


def _fail_at(step: int):
    from mlx_lora.trainer.guards import Position

    diverged = Position.diverged

    def stop(at, applied):
        if at.taken >= step:
            raise RuntimeError
        return diverged(at, applied)

    return stop


@pytest.mark.parametrize(("flags", "words"), [
    (("--learning-rate", 1, "--iters", 60), ("--learning-rate 1",)),
    pytest.param(("--learning-rate", 1e-7, "--iters", 60), ("--learning-rate 1e-07",), marks=pytest.mark.slow),
    (("--epochs", 1, "--batch-tokens", 2048), ("--epochs",)),
])  # fmt: skip
def test_what_will_not_work_is_said_before(tiny_folder, chats, tmp_path, flags, words):
    planned = json.loads(run("plan", "--model", tiny_folder, "--data", chats, "--json", *flags).out)
    assert len(planned["warnings"]) == 1
    for word in words:
        assert word in planned["warnings"][0]


def test_a_larger_alpha_needs_a_smaller_rate():
    def warned(**settings: object) -> bool:
        return bool(defaults.rate_problem(train_settings(settings), "llama", 576))

    assert warned(learning_rate=1e-5)
    assert not warned(learning_rate=1e-5, rank=8, alpha=160)  # mlx-lm's defaults: scale 20
    assert warned(learning_rate=5e-3, alpha=160)
    assert not warned(learning_rate=5e-3)


def test_the_length_that_a_warning_names_is_enough(tiny_folder, chats):
    short = json.loads(run("plan", "--model", tiny_folder, "--data", chats, "--json", "--iters", 3).out)
    named = short["warnings"][0].split("--iters ")[1].split()[0]
    longer = json.loads(run("plan", "--model", tiny_folder, "--data", chats, "--json", "--iters", named).out)
    assert not longer["warnings"]
