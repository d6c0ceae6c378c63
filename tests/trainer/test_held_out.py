"""Which held-out rows a run validates on, the same after a resume; and a task that is scored there, and chooses the best adapter."""

from __future__ import annotations

import dataclasses
import json
from contextlib import closing
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from resumed_runs import command, metrics, stopped_after, weights
from rich.console import Console
from run_cli import one_line, refused, run, succeeds

from mlx_lora.config.settings import LoopSettings
from mlx_lora.data.dataset import EncodedSet, spaced_by_length
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.trainer import progress
from mlx_lora.trainer import progress as display
from mlx_lora.trainer.evaluate import FEWEST, choose_held_out, validations
from mlx_lora.trainer.guards import VALIDATED
from mlx_lora.trainer.progress import LiveProgress, PlainProgress
from mlx_lora.trainer.request import ValidationTask, chosen_score
from mlx_lora.utils import progress as long_task

STEPS = 20


def made_rows(count: int, seed: int = 0, most: int = 40) -> EncodedSet:
    lengths = np.random.default_rng(seed).integers(3, most, count)
    return EncodedSet.from_rows([(np.full(n, number), np.arange(n) > 0) for number, n in enumerate(lengths.tolist())])


def chosen(held_out: EncodedSet | None, steps: int = STEPS, identity=None, rows: int = 400, **settings):
    loop = LoopSettings(**{"batch_tokens": 80, **settings})
    plan = BatchPlan(made_rows(rows, seed=1), batch_tokens=80, batch_size=None, seed=0)
    return choose_held_out(held_out, loop, plan, steps, identity), plan


def row_numbers(plan: BatchPlan, batches: int = -1) -> list[int]:
    """The first token of each row is its number."""
    return sorted(int(plan.rows.row(int(i))[0][0]) for i in plan.examples_of(batches))


def test_all_validations_together_take_at_most_a_tenth_of_the_work():
    for steps in (60, 200, 500):
        for every in (0, 20, 60):
            found, plan = chosen(made_rows(300), steps, steps_per_eval=every)
            work = 2 * steps / len(plan) * int((plan.rows.lengths - 1).sum())
            assert found.times == len({0, steps, *(range(every, steps, every) if every else ())})
            assert found.times == validations(steps, every)
            assert found.times * found.tokens <= 0.1 * work or found.examples == FEWEST
            assert found.examples >= FEWEST
            if "tenth" in found.words and found.examples > FEWEST:
                assert found.times * found.tokens > 0.07 * work, "much less than it may"
    assert chosen(made_rows(300), 500)[0].examples > chosen(made_rows(300), 200)[0].examples


def test_a_short_run_validates_on_a_few_rows_and_a_long_one_on_25_batches():
    short, _ = chosen(made_rows(300), 2)
    assert (short.examples, "the fewest possible" in short.words) == (FEWEST, True)
    few, _ = chosen(made_rows(5), 2)
    assert (few.examples, "all of them" in few.words) == (5, True)
    long, _ = chosen(made_rows(3000), 10**6)
    assert long.val_batches is None
    assert 23 <= len(long.plan) <= 30
    assert "25 batches" in long.words
    nothing, _ = chosen(None)
    assert (nothing.plan, nothing.words) == (None, "")


def test_the_rows_are_of_all_lengths_and_the_same_each_time():
    rows = made_rows(300)
    numbers = spaced_by_length(rows, 20)
    assert len(set(numbers.tolist())) == 20
    assert abs(rows.lengths[numbers].mean() - rows.lengths.mean()) < 0.5
    first, again = (chosen(made_rows(300))[0] for _ in range(2))
    assert row_numbers(first.plan) == row_numbers(again.plan)
    assert [b.numbers.tolist() for b in first.plan.batches()] == [b.numbers.tolist() for b in first.plan.batches()]


def test_val_batches_is_obeyed():
    rows = made_rows(300)
    everything, _ = chosen(rows, val_batches=-1)
    assert (everything.examples, everything.val_batches) == (300, -1)
    three, _ = chosen(rows, val_batches=3)
    assert three.val_batches == 3
    assert three.tokens == sum(batch.real_tokens for batch in three.plan.batches(3))
    assert "--val-batches 3" in three.words
    none, _ = chosen(rows, val_batches=0)
    assert (none.plan, none.val_batches, none.words) == (None, 0, "")


def test_a_resumed_run_keeps_its_rows():
    rows = made_rows(300)
    begun, _ = chosen(rows, 200)
    for steps, settings in ((400, {}), (200, {"steps_per_eval": 50})):
        resumed, _ = chosen(rows, steps, begun.identity, **settings)
        assert row_numbers(resumed.plan) == row_numbers(begun.plan)
        assert resumed.identity == begun.identity
        assert row_numbers(chosen(rows, steps, **settings)[0].plan) != row_numbers(begun.plan)
    assert chosen(rows, identity=begun.identity, val_batches=2)[0].val_batches == 2
    explicit, _ = chosen(rows, 200, val_batches=3)
    assert row_numbers(chosen(rows, identity=explicit.identity)[0].plan) == row_numbers(begun.plan)


def test_what_is_chosen_keeps_everything_of_a_row():
    rows = made_rows(6)
    marks = np.arange(len(rows.tokens)) % 2 == 0
    rows = dataclasses.replace(
        rows, group=2, trained_rows=1, labels=np.arange(6, dtype=np.float32), answers=marks,
        reference=-np.arange(6, dtype=np.float32), starts=np.arange(12, dtype=np.int32).reshape(6, 2),
    )  # fmt: skip
    some = rows.select([2, 0])
    assert some.labels.tolist() == [4, 5, 0, 1]
    assert some.reference.tolist() == [-4, -5, 0, -1]
    assert some.starts.tolist() == rows.starts[[4, 5, 0, 1]].tolist()
    assert some.trained_rows == 1
    assert some.answers.tolist() == [m for i in (4, 5, 0, 1) for m in marks[rows.offsets[i] : rows.offsets[i + 1]]]
    assert some.row(0)[0].tolist() == rows.row(4)[0].tolist()


@pytest.fixture
def begun(tiny_folder, chats, tmp_path):
    """A run's folder, and the command that made it."""
    command = (
        "train", "--model", tiny_folder, "--data", chats, "--adapter-path", tmp_path / "a", "--valid-fraction", 0.5,
        "--batch-tokens", 256, "--learning-rate", 5e-3, "--rank", 4, "--steps-per-report", 2, "--steps-per-eval", 2,
        "--sample-tokens", 0, "--save-every", 2, "--kernels", "mlx", "--iters",
    )  # fmt: skip
    return tmp_path / "a", command, succeeds(*command, 4)


def losses(folder) -> dict[int, float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["val_loss"] for record in records if record["val_loss"] is not None}


@pytest.mark.long
def test_a_run_says_what_it_validates_and_measures_the_same_after_a_resume(begun):
    folder, command, ran = begun
    (line,) = (line for line in ran.lines if line.startswith("Validation: "))
    assert "3 times" in line
    assert line in run(*command, 4, "--dry-run", "--force").out.splitlines()
    assert yaml.safe_load((folder / "run.yaml").read_text())["val_batches"] is None
    state = json.loads(sorted(folder.glob("checkpoints/*/state.json"))[-1].read_text())
    assert f"Validation: {state['identity'][VALIDATED]} of " in line
    first = losses(folder)
    more = succeeds(*command, 6, "--resume")
    assert any(f"Validation: {state['identity'][VALIDATED]} of " in line for line in more.lines)
    assert {step: losses(folder)[step] for step in first} == first
    assert set(losses(folder)) == {0, 2, 4, 6}


def test_a_long_validation_shows_its_progress(monkeypatch, logged):
    monkeypatch.setattr(long_task, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(long_task, "QUIET_S", -1.0)
    with closing(PlainProgress(4)) as shown:
        assert list(shown.validating(iter("abc"), 3)) == ["a", "b", "c"]
    assert any(line.startswith("Validating: 1 of 3 batches, about ") for line in logged)
    monkeypatch.setattr(progress, "QUIET_S", -1.0)
    console = Console(file=StringIO(), force_terminal=True, width=100)
    live = LiveProgress(4, console)
    shown = []
    for _ in live.validating(iter("abc"), 3):
        shown.append(live._bar.tasks[0].description)
    assert shown == ["validating 0/3", "validating 1/3", "validating 2/3"]
    assert live._bar.tasks[0].description == "first step"
    live.close()
    monkeypatch.setattr(progress, "QUIET_S", 60.0)
    quick = LiveProgress(4, console)
    assert {quick._bar.tasks[0].description for _ in quick.validating(iter("abc"), 3)} == {"first step"}
    quick.close()


def test_the_two_answers_of_a_pair_stay_together():
    found, _ = chosen(made_rows(600).grouped(2), 200)
    assert FEWEST < found.examples < 300
    assert f"{found.examples} of 300 held-out examples (" in found.words
    assert found.tokens == int((found.plan.rows.lengths - 1).sum()) == sum(b.real_tokens for b in found.plan.batches())
    numbers = np.array([int(found.plan.rows.row(i)[0][0]) for i in range(len(found.plan.rows))]).reshape(-1, 2)
    assert (numbers[:, 0] % 2 == 0).all()
    assert (numbers[:, 1] == numbers[:, 0] + 1).all()


def test_a_notebook_shows_how_far_a_validation_is(monkeypatch):
    shown = []
    handle = SimpleNamespace(update=lambda html: shown.append(html.data))
    monkeypatch.setattr(pytest.importorskip("IPython.display"), "display", lambda *given, **named: handle)
    monkeypatch.setattr(display, "QUIET_S", -1.0)
    assert list(display.NotebookProgress(4).validating(iter("ab"), 2)) == ["a", "b"]
    assert ["validating 0/2" in shown[0], "validating 1/2" in shown[1], len(shown)] == [True, True, 2]


SCORES = {0: 0.5, 4: 0.25, 8: 0.75, 12: 0.5}  # by step
# The longest beginning of "abcabc..." in an answer, as a share of six letters.
METRIC = """
def letters(prompts, completions, **columns):
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [max(n for n in range(7) if "abcabc"[:n] in text) / 6 for text in texts]
"""


@pytest.fixture(scope="module")
def asked(chats, tmp_path_factory) -> tuple:
    """The flags of a task of rows."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.jsonl").write_text("".join(chats.read_text().splitlines(keepends=True)[:6]))
    (folder / "own.py").write_text(METRIC)
    metric = f"{folder / 'own.py'}:letters"
    return ("--eval-tasks", folder / "rows.jsonl", "--eval-metric", metric, "--eval-max-tokens", 8)


def trained(folder: Path, model: Path, data: Path, *flags) -> list[dict]:
    succeeds(*command(model, data, folder, "--iters", 12, "--dropout", 0.1, *flags))
    lines = metrics(folder)
    return [line for line in lines if line["val_loss"] is not None]


@pytest.mark.long
def test_a_run_finds_what_evaluate_finds_and_is_not_changed(asked, tiny_folder, chats, tmp_path):
    found = trained(tmp_path / "a", tiny_folder, chats, *asked)
    trained(tmp_path / "plain", tiny_folder, chats)
    assert weights(tmp_path / "a") == weights(tmp_path / "plain")
    measured = succeeds("evaluate", "--model", tiny_folder, "--adapter", f"mine={tmp_path / 'a'}", "--data", asked[1],
                   "--metric", asked[3], "--max-tokens", 8, "--json")  # fmt: skip
    [score] = json.loads(measured.out)["tasks"]
    assert found[0]["task"] == pytest.approx(score["models"]["base"]["score"])
    assert found[-1]["task"] == pytest.approx(score["models"]["mine"]["score"])
    assert found[-1]["task"] > found[0]["task"]


@pytest.fixture
def scripted(monkeypatch):
    """Let validations find `SCORES`."""

    def score(task: ValidationTask, stopped) -> float:
        return SCORES[steps.pop(0)]

    steps = list(SCORES)
    monkeypatch.setattr(ValidationTask, "_score", score)
    return steps


@pytest.mark.long
@pytest.mark.parametrize(("metric", "best"), [("task", 8), ("loss", 12)])
def test_the_best_adapter_is_that_of_the_best_score(metric, best, scripted, asked, tiny_folder, chats, tmp_path):
    more = ("--save-every", 4, "--keep-best", "--metric-for-best-model", metric)
    trained(tmp_path / "a", tiny_folder, chats, *asked, *more)
    kept = (tmp_path / "a/checkpoints" / f"step-{best:06d}/adapters.safetensors").read_bytes()
    assert weights(tmp_path / "a") == kept
    state = json.loads((tmp_path / "a/checkpoints/step-000012/state.json").read_text())["position"]
    assert (state["best_score"], state["best_at"]) == ((0.75, 8) if metric == "task" else (None, 12))


@pytest.mark.long
def test_a_run_that_was_cut_ends_with_the_same_bytes(scripted, asked, tiny_folder, chats, tmp_path):
    more = (*asked, "--save-every", 4, "--keep", 0, "--keep-best", "--metric-for-best-model", "task",
            "--early-stopping-patience", 1)  # fmt: skip
    scripted[:] = [0, 8, 4]  # better at step 4 than before, worse at step 8: the run ends there
    whole = trained(tmp_path / "whole", tiny_folder, chats, *more)
    assert [line["step"] for line in whole] == [0, 4, 8]
    scripted[:] = [4]
    cut = stopped_after(tmp_path / "whole", tmp_path / "cut", 4)
    (cut / "adapters.safetensors").unlink()
    trained(cut, tiny_folder, chats, *more, "--resume")
    assert weights(cut) == weights(tmp_path / "whole")
    assert weights(cut) == (cut / "checkpoints/step-000004/adapters.safetensors").read_bytes()


@pytest.mark.long
def test_a_task_of_lm_eval(tiny_folder, chats, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra eval")
    rows = [{"q": f"Say {n}.", "choices": ["abcabc", "xyz"], "right": 0} for n in range(4)]
    (tmp_path / "letters.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "letters.yaml").write_text(
        "task: letters\ndataset_path: json\ntest_split: test\ndataset_kwargs: {data_files: {test: letters.jsonl}}\n"
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: right\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    asked = ("--eval-tasks", tmp_path / "letters.yaml", "--eval-rows", 3, "--eval-metric", "acc_norm", "--iters", 4)
    found = trained(tmp_path / "a", tiny_folder, chats, *asked)
    assert [line["step"] for line in found] == [0, 4]
    assert all(line["task"] in (0, 1 / 3, 2 / 3, 1) for line in found)
    trained(tmp_path / "plain", tiny_folder, chats, "--iters", 4)
    assert weights(tmp_path / "a") == weights(tmp_path / "plain")


def test_the_score_of_a_task_that_is_compared():
    from mlx_lora.evaluation.paired import TaskScore

    found = [TaskScore("one", "acc", True, 3, {}), TaskScore("two", "word_perplexity", False, 3, {}),
             TaskScore("two", "exact_match (strict)", True, 3, {})]  # fmt: skip
    assert chosen_score(found, None, "two.yaml") is found[2]
    assert chosen_score(found, "exact_match", "two.yaml") is found[2]
    assert chosen_score(found, None, "one") is found[0]  # a group that holds another one


def test_a_run_without_held_out_rows_says_so_before_its_first_step(asked, tiny_folder, chats, tmp_path):
    refused(run(*command(tiny_folder, chats, tmp_path / "a", *asked, "--valid-fraction", 0)), "no held-out rows")
    assert not (tmp_path / "a/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--eval-tasks", "none.jsonl"), "there is no such file"),
        (("--eval-tasks", "{rows}", "--eval-metric", "exactmatch"), "--eval-metric exactmatch: did you mean exact_match"),
        (("--eval-tasks", "{rows}", "--eval-chat-template"), "--eval-chat-template"),
        (("--eval-tasks", "{rows}", "--objective", "embed"), "writes no text"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused(flags, said, asked, tiny_folder, chats, tmp_path):
    given = [str(flag).format(rows=asked[1]) for flag in flags]
    one_line(run(*command(tiny_folder, chats, tmp_path / "a", *given)), said)
