"""What a run folder holds is neither lost nor mixed up: by --resume, by a supervisor, by the best step, by a change of rounding."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import pytest
from conftest import TINY, tiny_model
from resumed_runs import STEPS, command, stopped_after, weights
from run_cli import run, succeeds
from tiny_steps import batch

from mlx_lora.adapters.inject import adapt_model
from mlx_lora.config.load import train_settings
from mlx_lora.config.optimizers import OPTIMIZERS
from mlx_lora.config.settings import AdapterSettings, OptimizerSettings
from mlx_lora.losses.check import choose_loss
from mlx_lora.parallel.ranks import ALONE, OneRank
from mlx_lora.parallel.strategy import Strategy
from mlx_lora.trainer.checkpoint import run_arrays
from mlx_lora.trainer.guards import Position
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.run_folder import RunFolder, own_folder
from mlx_lora.trainer.schedules import make_events
from mlx_lora.trainer.step import Step, StepOptions
from mlx_lora.utils import supervise


@pytest.fixture(scope="module")
def finished(tiny_folder, chats, tmp_path_factory):
    """A run with checkpoints after steps 5, 10 and 12."""
    folder = tmp_path_factory.mktemp("finished") / "a"
    succeeds(*command(tiny_folder, chats, folder, "--save-every", 5, "--keep", 0))
    return folder


@pytest.fixture
def best_at_4(monkeypatch):
    """Let the validation after step 4 be the best, whatever was learned."""
    own = Position.validated
    monkeypatch.setattr(Position, "validated", lambda self, loss, *rest: own(self, loss + abs(self.taken - 4), *rest))


def copied(folder, place):
    shutil.copytree(folder, place)
    return place


def steps_of(folder) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def held_out(folder) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["val_loss"] for line in lines if line["val_loss"] is not None}


def checkpoint_of(folder, step: int):
    return folder / "checkpoints" / f"step-{step:06d}"


def own_facts(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())["mlx_lora"]


def test_resume_without_a_checkpoint_does_not_replace_an_adapter(finished, tiny_folder, chats, tmp_path):
    folder = copied(finished, tmp_path / "a")
    shutil.rmtree(folder / "checkpoints")
    before, metrics = weights(folder), (folder / "metrics.jsonl").read_bytes()
    ran = run(*command(tiny_folder, chats, folder, "--iters", 2, "--resume"))
    assert (ran.code, "--resume-adapter-file" in ran.err, "--force" in ran.err) == (2, True, True)
    assert (weights(folder), (folder / "metrics.jsonl").read_bytes()) == (before, metrics)
    ran = succeeds(*command(tiny_folder, chats, folder, "--iters", 2, "--resume", "--force"))
    assert weights(folder) != before


def test_a_checkpoint_of_another_folder_does_not_replace_an_adapter(finished, tiny_folder, chats, tmp_path):
    other = copied(finished, tmp_path / "b")
    before = weights(other)
    resume = ("--resume", finished / "checkpoints" / "step-000005", "--save-every", 5)
    ran = run(*command(tiny_folder, chats, other, *resume))
    assert (ran.code, "--force" in ran.err) == (2, True)
    assert weights(other) == before
    ran = succeeds(*command(tiny_folder, chats, other, *resume, "--force"))
    assert max(steps_of(other)) == STEPS
    assert 5 not in steps_of(other)  # of the earlier run there
    assert not (other / "earlier-run").exists()


def test_the_best_step_comes_along_into_another_folder(tiny_folder, chats, tmp_path, best_at_4):
    best = ("--keep-best", "--steps-per-eval", 2, "--save-every", 2, "--keep", 0)
    assert run(*command(tiny_folder, chats, tmp_path / "a", *best)).code == 0
    stopped = tmp_path / "a" / "checkpoints" / "step-000010"
    succeeds(*command(tiny_folder, chats, tmp_path / "b", *best, "--resume", stopped))
    assert weights(tmp_path / "b") == weights(tmp_path / "a") == weights(tmp_path / "a" / "checkpoints" / "step-000004")


def test_later_checkpoints_of_another_way_are_gone_after_the_next_save(finished, tiny_folder, chats, tmp_path):
    folder = copied(finished, tmp_path / "a")
    resume = ("--resume", folder / "checkpoints" / "step-000005", "--save-every", 4)
    ran = succeeds(*command(tiny_folder, chats, folder, *resume, "--iters", 9))
    assert steps_of(folder) == [5, 8, 9]
    ran = run(*command(tiny_folder, chats, folder, "--iters", 14, "--resume"))
    assert "Resuming from step 9" in ran.err


def test_a_supervised_run_that_begins_again_leaves_the_earlier_one_aside(finished, tmp_path, monkeypatch):
    folder = copied(finished, tmp_path / "a")

    def fail():
        (folder / "earlier-run").mkdir(exist_ok=True)
        if (folder / "adapters.safetensors").exists():
            (folder / "adapters.safetensors").rename(folder / "earlier-run" / "adapters.safetensors")
        raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008)")

    def die_after_setting_aside():
        with pytest.raises(RuntimeError), own_folder(folder, ALONE):
            fail()

    monkeypatch.setenv(supervise.SUPERVISOR, "1")
    monkeypatch.setenv(supervise.RESTARTS_LEFT, "1")
    die_after_setting_aside()
    assert not (
        folder / "adapters.safetensors"
    ).exists()  # the next process begins, and finds no earlier run to go on from
    monkeypatch.setenv(supervise.RESTARTS_LEFT, "0")
    die_after_setting_aside()
    assert weights(folder) == weights(finished)


def test_the_best_step_of_relora_is_without_later_cycles(tiny_folder, chats, tmp_path, best_at_4):
    relora = (
        "--method",
        "relora",
        "--relora-every",
        6,
        "--keep-best",
        "--steps-per-eval",
        2,
        "--save-every",
        2,
        "--keep",
        0,
    )
    succeeds(*command(tiny_folder, chats, tmp_path / "a", *relora))
    assert weights(tmp_path / "a") == weights(tmp_path / "a" / "checkpoints" / "step-000004")


def test_the_best_step_of_adalora_may_be_before_the_first_cut(tiny_folder, chats, tmp_path, best_at_4):
    """Its checkpoint has no list of the ranks that are off, and the run has one by then."""
    adalora = (
        "--method",
        "adalora",
        "--adalora-tinit",
        5,
        "--adalora-tfinal",
        2,
        "--adalora-delta-t",
        1,
        "--keep-best",
    )
    each = ("--steps-per-eval", 2, "--save-every", 2, "--keep", 0)
    succeeds(*command(tiny_folder, chats, tmp_path / "a", *adalora, *each))
    stored = {step: mx.load(str(checkpoint_of(tmp_path / "a", step) / "state.safetensors")) for step in (4, 8)}
    assert [any(name.startswith("extras.") for name in arrays) for arrays in stored.values()] == [False, True]
    assert (
        weights(tmp_path / "a")
        == weights(checkpoint_of(tmp_path / "a", 4))
        != weights(checkpoint_of(tmp_path / "a", 8))
    )
    stopped = stopped_after(tmp_path / "a", tmp_path / "b", 4)
    assert run(*command(tiny_folder, chats, stopped, *adalora, *each, "--resume")).code == 0
    assert weights(checkpoint_of(stopped, STEPS)) == weights(checkpoint_of(tmp_path / "a", STEPS))


class OtherRank(OneRank):
    """Rank 1 of a run whose first rank has other arrays."""

    rank, size, leads = 1, 2, False

    def __init__(self, first: dict[str, mx.array]):
        self._first = first

    def same_bits(self, arrays: dict[str, mx.array]) -> bool:
        return False

    def arrays_from_first(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        return self._first


def test_ranks_above_0_take_the_best_step_and_say_nothing(caplog):
    """Rank 0 alone restored it, so that they are not equal is as it should be."""
    model, settings = (
        tiny_model(),
        AdapterSettings(method="adalora", rank=2, adalora_tinit=1, adalora_tfinal=1, adalora_delta_t=1),
    )
    adapt_model(model, settings, seed=1)
    optimizer = build_optimizer(OptimizerSettings(learning_rate=1e-2), 6)
    events = make_events(settings, model, 4, seed=0)
    step = Step(model, optimizer, choose_loss(model, TINY).train, 1.0, StepOptions(compiled=False, events=events))
    best: dict[str, mx.array] = {}
    for number in range(4):
        step([batch(2, 9, seed=number)])
        best = best or {name: mx.array(value) for name, value in run_arrays(step).items()}
    assert run_arrays(step).keys() != best.keys()
    whole = train_settings({"model": "m", "data": "d", "keep_best": True})
    strategy = Strategy(OtherRank(best))  # pyright: ignore[reportArgumentType]
    folder = RunFolder(whole, None, {}, strategy, step, Position(4, best_at=1))  # pyright: ignore[reportArgumentType]
    with caplog.at_level("DEBUG", logger="mlx_lora"):
        assert folder.put_best() is None
    assert not caplog.records
    found = run_arrays(step)
    assert found.keys() == best.keys()
    assert all(mx.array_equal(found[name], value) for name, value in best.items())


def test_a_run_with_a_skipped_update_resumes_to_the_same_bytes(tiny_folder, chats, tmp_path, monkeypatch):
    events = ("--method", "relora", "--relora-every", 4, "--save-every", 7, "--keep", 0)
    whole, calls = Step.forward_backward, []

    def poisoned(self, *args, **options):
        sums = whole(self, *args, **options)
        calls.append(len(calls))
        return sums._replace(loss_sum=sums.loss_sum * float("nan")) if len(calls) == 3 else sums

    monkeypatch.setattr(Step, "forward_backward", poisoned)
    succeeds(*command(tiny_folder, chats, tmp_path / "a", *events))
    assert len(calls) == STEPS
    stopped = stopped_after(tmp_path / "a", tmp_path / "b", 7)
    assert run(*command(tiny_folder, chats, stopped, *events, "--resume")).code == 0
    assert weights(stopped) == weights(tmp_path / "a")


def test_a_share_of_qat_compares_only_validations_with_rounding(tiny_4bit_folder, chats, tmp_path):
    share = ("--qat", 0.5, "--keep-best", "--steps-per-eval", 2, "--save-every", 2, "--keep", 0)
    # So high a rate that the first validations without rounding are the best, and the patience is over before it begins.
    worse = ("--learning-rate", 0.5, "--lr-schedule", "constant", "--early-stopping-patience", 2)
    succeeds(*command(tiny_4bit_folder, chats, tmp_path / "a", *share, *worse))
    losses = held_out(tmp_path / "a")
    first = STEPS // 2
    assert max(losses) >= first
    kept = min((step for step in losses if step >= first), key=losses.__getitem__)
    assert weights(tmp_path / "a") == weights(tmp_path / "a" / "checkpoints" / f"step-{kept:06d}")
    assert own_facts(tmp_path / "a")["qat"]
    # Before rounding begins, the adapter is an ordinary one.
    assert not own_facts(tmp_path / "a" / "checkpoints" / f"step-{first - 2:06d}").get("qat")
    assert own_facts(tmp_path / "a" / "checkpoints" / f"step-{kept:06d}")["qat"]


def test_muon_decays_apart_from_the_gradient_and_updates_each_expert_by_itself():
    weight, still = mx.random.normal((6, 4)), mx.zeros((6, 4))
    decayed = OPTIMIZERS["muon"].build(0.1, 0.5).apply_gradients({"w": still}, {"w": weight})["w"]
    assert mx.allclose(decayed, weight * (1 - 0.1 * 0.5))
    experts, gradients = mx.random.normal((3, 6, 4)), mx.random.normal((3, 6, 4))
    together = OPTIMIZERS["muon"].build(0.1, 0.5).apply_gradients({"w": gradients}, {"w": experts})["w"]
    for number in range(3):
        alone = (
            OPTIMIZERS["muon"].build(0.1, 0.5).apply_gradients({"w": gradients[number]}, {"w": experts[number]})["w"]
        )
        assert mx.allclose(together[number], alone, atol=1e-5)
