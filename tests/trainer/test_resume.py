"""Going on from a checkpoint: the same bytes as a run that never stopped, nothing taken up that is not whole, nothing lost or mixed up."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial

import mlx.core as mx
import pytest
from conftest import TINY, tiny_model
from resumed_runs import STEPS, command, metrics, stopped_after, weights
from run_cli import holds, run, succeeds
from tiers import by_default
from tiny_steps import batch

from mlx_lora.adapters.inject import adapt_model
from mlx_lora.config.load import train_settings
from mlx_lora.config.presets import OPTIMIZERS
from mlx_lora.config.settings import AdapterSettings, OptimizerSettings
from mlx_lora.losses.agree import choose_loss
from mlx_lora.parallel.ranks import ALONE, OneRank
from mlx_lora.parallel.strategy import Strategy
from mlx_lora.trainer import trainer
from mlx_lora.trainer.checkpoint import ARRAYS_FILE, STATE_FILE, locked, run_arrays
from mlx_lora.trainer.guards import Position
from mlx_lora.trainer.method_events import make_events
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.run_folder import RunFolder, own_folder
from mlx_lora.trainer.step import Step, StepOptions
from mlx_lora.utils import supervise
from mlx_lora.utils.errors import InputError

RUNS = {
    "lora": ("--dropout", 0.1),
    "dora": ("--method", "dora", "--grad-checkpoint", "block", "--grad-accumulation-steps", 2),
    "pissa": ("--method", "pissa", "--optimizer", "muon"),
    "adalora": ("--method", "adalora", "--optimizer", "adafactor"),
    "relora": ("--method", "relora", "--relora-every", 3),
    "full": ("--method", "full", "--optimizer", "sgd"),
}


def held_out(folder) -> dict[int, float]:
    """Return the held-out loss of each validated step."""
    lines = metrics(folder)
    return {line["step"]: line["val_loss"] for line in lines if line["val_loss"] is not None}


@pytest.fixture(scope="module")
def finished(tiny_folder, chats, tmp_path_factory):
    """A run that never stopped, with checkpoints after steps 5, 10 and 12, and the best so far at 4 and 8."""
    folder = tmp_path_factory.mktemp("finished")
    succeeds(*command(tiny_folder, chats, folder / "a", "--save-every", 5, "--keep", 0))
    return folder / "a"


@pytest.mark.parametrize("name", by_default(RUNS, "adalora"))
def test_the_result_is_the_same_bytes(name, tiny_folder, chats, tmp_path):
    succeeds(*command(tiny_folder, chats, tmp_path / "whole", "--save-every", 0, *RUNS[name]))
    parts = command(tiny_folder, chats, tmp_path / "parts", *RUNS[name])
    assert run(*parts, "--save-every", 7).code == 0
    stopped = stopped_after(tmp_path / "parts", tmp_path / "again", 7)
    before = weights(stopped / "checkpoints" / "step-000007")
    parts = command(tiny_folder, chats, stopped, *RUNS[name])
    # Another cadence of reports, validations and saves.
    ran = succeeds(*parts, "--save-every", 2, "--steps-per-report", 1, "--steps-per-eval", 5, "--resume")
    assert "Resuming from step 7" in ran.err
    assert weights(stopped) == weights(tmp_path / "whole")
    assert weights(stopped) != before


def test_metrics_go_on_behind_the_checkpoint(finished, tiny_folder, chats, tmp_path):
    stopped = stopped_after(finished, tmp_path / "a", 5)
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')  # a kill in the middle of a line
    assert run(*command(tiny_folder, chats, stopped, "--save-every", 5, "--resume")).code == 0
    steps = [json.loads(line)["step"] for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == STEPS
    assert steps.count(0) == 1


def test_a_validation_that_was_interrupted_is_taken_when_the_run_goes_on(
    finished, tiny_folder, chats, tmp_path, monkeypatch
):
    """Else the best checkpoint, and early stopping, would not be those of a run without a stop."""
    measure, calls = trainer.mean_loss, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 2:  # after step 4
            os.kill(os.getpid(), signal.SIGINT)
        return measure(*given)

    asked = command(tiny_folder, chats, tmp_path / "a", "--save-every", 5, "--keep", 0)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "mean_loss", interrupted)
        ran = run(*asked)
    assert (ran.code, f"train --config {tmp_path / 'a' / 'run.yaml'} --resume" in ran.err) == (130, True)
    assert set(held_out(tmp_path / "a")) == {0}
    assert run(*asked, "--resume").code == 0
    assert held_out(tmp_path / "a") == held_out(finished)
    assert weights(tmp_path / "a") == weights(finished)


def test_a_longer_run_goes_on_and_a_finished_one_says_so(finished, tiny_folder, chats, tmp_path):
    copy = stopped_after(finished, tmp_path / "a", STEPS)
    (copy / "adapters.safetensors").unlink()
    ran = run(*command(tiny_folder, chats, copy, "--save-every", 5, "--resume"))
    assert (ran.code, f"all {STEPS} steps are done" in ran.err) == (0, True)
    assert weights(copy) == weights(finished)
    ran = succeeds(*command(tiny_folder, chats, copy, "--save-every", 5, "--resume", "--iters", STEPS + 2))
    assert f"Resuming from step {STEPS}" in ran.err


DAMAGE = {
    "cut short": lambda folder: (folder / ARRAYS_FILE).write_bytes((folder / ARRAYS_FILE).read_bytes()[:-100]),
    "a byte flipped": lambda folder: flip(folder / "adapters.safetensors"),
    "no state": lambda folder: (folder / STATE_FILE).unlink(),
    "half a state": lambda folder: (folder / STATE_FILE).write_text('{"version": 1,'),
    "a file gone": lambda folder: (folder / ARRAYS_FILE).unlink(),
}


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("kind", by_default(DAMAGE, "a byte flipped", "no state"))
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(kind, finished, tiny_folder, chats, tmp_path):
    stopped = stopped_after(finished, tmp_path / "a", 10)
    DAMAGE[kind](stopped / "checkpoints" / "step-000010")
    named = run(*command(tiny_folder, chats, stopped, "--resume", stopped / "checkpoints" / "step-000010"))
    assert (named.code, "step-000010" in named.err) == (2, True)
    ran = succeeds(*command(tiny_folder, chats, stopped, "--save-every", 5, "--resume"))
    holds(ran.err, "skipped: ", "Resuming from step 8")
    assert weights(stopped) == weights(finished)


@pytest.mark.parametrize(("version", "program"), by_default([(1, None), (3, "9.8.7"), (3, "9\n8")], (3, "9.8.7")))
def test_a_checkpoint_of_another_version_is_refused_and_the_run_stays_as_it_is(
    version, program, finished, tiny_folder, chats, tmp_path
):
    stopped = stopped_after(finished, tmp_path / "a", 5)
    for path in stopped.glob(f"checkpoints/*/{STATE_FILE}"):
        state = json.loads(path.read_text()) | {"version": version}
        path.write_text(json.dumps(state | {"program": program} if program else state))
    before = weights(stopped)
    for named in ("auto", stopped / "checkpoints" / "step-000005"):  # auto does not begin again
        ran = run(*command(tiny_folder, chats, stopped, "--resume", named))
        assert (ran.code, len(ran.lines[-1:])) == (2, 1)
        holds(ran.lines[-1], f"version {version} ", "--resume-adapter-file")
        assert ("mlx-lora 9.8.7" in ran.lines[-1]) == (program == "9.8.7")
    assert weights(stopped) == before
    succeeds(*command(tiny_folder, chats, tmp_path / "b", "--resume-adapter-file", named))


OTHER = {
    "rank": ("--rank", 5),
    "learning_rate": ("--learning-rate", 1e-3),
    "seed": ("--seed", 7),
    "batch_tokens": ("--batch-tokens", 512),
    "rows": ("--valid-fraction", 0.3),
}


@pytest.mark.parametrize("name", by_default(OTHER, "rank", "rows"))
def test_another_run_is_refused_and_the_difference_named(name, finished, tiny_folder, chats, tmp_path):
    stopped = stopped_after(finished, tmp_path / "a", 5)
    before = weights(stopped)
    ran = run(*command(tiny_folder, chats, stopped, "--resume", *OTHER[name]))
    assert (ran.code, name in ran.err) == (2, True)
    assert name != "rows" or "--resume-adapter-file" in ran.err  # other rows are for a new run
    assert weights(stopped) == before


def test_another_base_is_refused(finished, tiny_4bit_folder, chats, tmp_path):
    from conftest import tiny_model, write_folder

    stranger = write_folder(tmp_path / "stranger", tiny_model(seed=5))
    ran = run(*command(stranger, chats, stopped_after(finished, tmp_path / "a", 5), "--resume"))
    assert (ran.code, "base model" in ran.err) == (2, True)


def test_without_a_checkpoint_it_starts_at_the_beginning(finished, tiny_folder, chats, tmp_path):
    ran = succeeds(*command(tiny_folder, chats, tmp_path / "new", "--save-every", 5, "--resume"))
    assert "starts at the beginning" in ran.err
    assert weights(tmp_path / "new") == weights(finished)


def test_the_newest_and_the_best_are_kept(tiny_folder, chats, tmp_path):
    succeeds(*command(tiny_folder, chats, tmp_path / "a", "--save-every", 1, "--keep", 2, "--steps-per-eval", 1))
    kept = sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())
    losses = {}
    for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["val_loss"] is not None and record["step"]:
            losses[record["step"]] = record["val_loss"]
    best = min(losses, key=losses.get)
    assert kept == sorted({f"step-{best:06d}", "step-000011", "step-000012"})


def test_two_runs_do_not_share_a_folder(tiny_folder, chats, tmp_path):
    with (
        locked(tmp_path / "a"),
        pytest.raises(InputError, match="another run is writing to it"),
        locked(tmp_path / "a"),
    ):
        pass
    with locked(tmp_path / "a"):
        pass


def test_a_lock_whose_file_was_removed_holds_nothing(tmp_path, monkeypatch):
    """The first run ends, and a third begins, between the second's opening of the lock file and its locking it."""
    first, third, lock = ExitStack(), ExitStack(), fcntl.flock
    first.enter_context(locked(tmp_path))

    def late(file, operation):
        monkeypatch.setattr(fcntl, "flock", lock)
        first.close()
        third.enter_context(locked(tmp_path))
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with third, pytest.raises(InputError, match="another run is writing to it"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_killed_in_its_first_save_it_begins_again(finished, tiny_folder, chats, tmp_path, monkeypatch):
    def killed(*_):
        raise RuntimeError("killed")

    asked = command(tiny_folder, chats, tmp_path / "a", "--save-every", 5, "--resume")
    with monkeypatch.context() as patch:
        patch.setattr("mlx_lora.trainer.run_folder.write_checkpoint", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run(*asked)
    succeeds(*asked)
    assert weights(tmp_path / "a") == weights(finished)


@pytest.mark.slow
def test_killed_in_the_middle_again_and_again_it_ends_the_same(finished, tiny_folder, chats, tmp_path):
    """A short form of the soak: -9 around saves and steps, then --resume."""
    folder = tmp_path / "a"
    words = [str(word) for word in command(tiny_folder, chats, folder, "--save-every", 1, "--resume")]
    line = [sys.executable, "-m", "mlx_lora", *words]
    chance, kills = random.Random(3), 0
    for step in (2, 8):
        child = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Steps take milliseconds here, so the kill comes in one of the steps, saves or validations that follow.
        while child.poll() is None and not reached(folder, step):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        kills += child.poll() is None
        child.kill()
        child.wait()
    assert kills > 0
    succeeds(*command(tiny_folder, chats, folder, "--save-every", 1, "--resume"))
    assert weights(folder) == weights(finished)
    assert not list(folder.rglob(".*"))


def reached(folder, step: int) -> bool:
    names = [path.name for path in (folder / "checkpoints").glob("step-*")]
    return any(int(name.removeprefix("step-")) >= step for name in names)


def test_what_kills_left_half_written_goes_and_the_users_own_files_stay(finished, tiny_folder, chats, tmp_path):
    stopped = stopped_after(finished, tmp_path / "a", 10)
    ours = ("adapters.safetensors", "adapter_config.json", "run.yaml", "report.html", "report.json", "README.md")
    halves = [stopped / f".{name}.123.{name.rpartition('.')[2]}" for name in ours]
    for half in halves:
        half.write_text("half")
    (stopped / "checkpoints" / ".step-000011.abc").mkdir()
    (stopped / ".notes.txt").write_text("mine")
    assert run(*command(tiny_folder, chats, stopped, "--save-every", 5, "--resume")).code == 0
    assert [path.name for path in stopped.rglob(".*")] == [".notes.txt"]


@pytest.mark.long
@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("--method", "pissa"),
        pytest.param(("--bits", 4, "--target-modules", "q_proj", "--qat", 0.5), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_more_data_is_answered_with_the_command_that_continues(extra, tiny_folder, chats, tmp_path):
    given = (
        "--model", tiny_folder, "--rank", 3, "--batch-tokens", 256, "--sample-tokens", 0, "--val-batches", 0, *extra,
    )  # fmt: skip
    folder, more = tmp_path / "a", tmp_path / "more.jsonl"
    more.write_text(chats.read_text() + '{"instruction": "And this?", "output": "More."}\n')
    assert run("train", *given, "--data", chats, "--adapter-path", folder, "--iters", 2).code == 0
    refused = run("train", *given, "--data", more, "--adapter-path", folder, "--iters", 4, "--resume")
    assert refused.code == 2
    assert "rows" in refused.lines[-1]
    assert not re.search(r"[0-9a-f]{16}", refused.lines[-1].replace(str(tmp_path), ""))  # no hashes
    words = shlex.split(refused.lines[-1][refused.lines[-1].index("--config") :])
    succeeds("train", *[str(more) if word == "NEW.jsonl" else word for word in words])
    start, end = (mx.load(str(path / "adapters.safetensors")) for path in (folder, tmp_path / "a-2"))
    assert {name: p.shape for name, p in start.items()} == {name: p.shape for name, p in end.items()}
    assert any(mx.abs(end[name] - start[name]).max().item() > 0 for name in start)
    assert all(
        mx.abs(end[name] - start[name]).max().item() < 0.5 * mx.abs(start[name]).max().item()
        for name in start
        if "lora_a" in name
    )


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
        "--method", "relora", "--relora-every", 6, "--keep-best", "--steps-per-eval", 2, "--save-every", 2, "--keep", 0,
    )  # fmt: skip
    succeeds(*command(tiny_folder, chats, tmp_path / "a", *relora))
    assert weights(tmp_path / "a") == weights(tmp_path / "a" / "checkpoints" / "step-000004")


@pytest.mark.long
def test_the_best_step_of_adalora_may_be_before_the_first_cut(tiny_folder, chats, tmp_path, best_at_4):
    """Its checkpoint has no list of the ranks that are off, and the run has one by then."""
    adalora = (
        "--method", "adalora", "--adalora-tinit", 5, "--adalora-tfinal", 2, "--adalora-delta-t", 1, "--keep-best",
    )  # fmt: skip
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


@pytest.mark.long
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
    muon = partial(OPTIMIZERS["muon"].build, 0.1, OptimizerSettings(weight_decay=0.5))
    decayed = muon().apply_gradients({"w": still}, {"w": weight})["w"]
    assert mx.allclose(decayed, weight * (1 - 0.1 * 0.5))
    experts, gradients = mx.random.normal((3, 6, 4)), mx.random.normal((3, 6, 4))
    together = muon().apply_gradients({"w": gradients}, {"w": experts})["w"]
    for number in range(3):
        alone = muon().apply_gradients({"w": gradients[number]}, {"w": experts[number]})["w"]
        assert mx.allclose(together[number], alone, atol=1e-5)
