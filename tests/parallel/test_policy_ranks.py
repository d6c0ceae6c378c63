"""Objectives in several processes: sampled answers, pairs and texts have the steps of one, one end for all, and the same bytes after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from bound import bind
from conftest import TINY, tiny_model
from embedding_cases import bound, random_examples
from rank_runs import assert_same_run, records, until, weights
from ranks import REPOSITORY, Started
from run_cli import run, succeeds

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import ModelSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.losses.agree import choose_loss
from mlx_lora.models.load import load_base
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel.ranks import ALONE
from mlx_lora.parallel.strategy import DataParallel
from mlx_lora.rollouts.environment import Episode, Played
from mlx_lora.rollouts.rollout import deal_prompts, gathered
from mlx_lora.trainer.evaluate import mean_loss
from mlx_lora.utils.supervise import last_given

# Each process notes what it was asked to reward, in order; the file's folder is the test's own.
REWARD = """
import json, os
from pathlib import Path

SEEN = Path(__file__).parent / f"seen-{os.getpid()}.jsonl"

def odd(prompts, completions, completion_ids, **columns):
    with SEEN.open("a") as file:
        file.write("".join(json.dumps([p, list(ids)]) + "\\n" for p, ids in zip(prompts, completion_ids)))
    return [sum(ord(letter) % 2 for letter in text) / max(1, len(text)) for text in completions]

def fails_on_one(completions, **columns):
    if os.environ.get("MLX_RANK") == "1":
        raise KeyError("not on this rank")
    return [float(len(text)) for text in completions]
"""


AS_CLOSE = {
    "rates": ("loss", "val_loss", "grad_norm", "reward", "length", "truncated", "kl", "clipped"),
    "counts": ("step", "examples", "supervised_tokens", "real_tokens", "positions", "shapes"),
    "rel": 2e-4,
    "atol": 2e-4,
}


@pytest.fixture
def data(tmp_path) -> Path:
    return written(tmp_path / "data")


def written(folder: Path) -> Path:
    """Write prompts and rewards."""
    folder.mkdir()
    rows = [{"prompt": "+".join(map(str, range(n, n + 2 + n % 3))) + "="} for n in range(22)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "mine.py").write_text(REWARD)
    return folder


def command(model: Path, data: Path, folder: Path, *more: object, reward: str = "odd") -> list:
    return [
        "--model", model, "--data", data / "prompts.jsonl", "--adapter-path", folder, "--objective", "grpo",
        "--reward", f"{data / 'mine.py'}:{reward}", "--learning-rate", "1e-2", "--batch-size", 3, "--group-size", 4,
        "--max-new-tokens", 8, "--sample-tokens", 0, "--kernels", "ours", "--val-batches", 2, "--steps-per-report", 1,
        "--rank", 4, "--iters", 4, "--warmup", 0, "--keep", 0, *more,
    ]  # fmt: skip


def ranks_of(count: int, words: list, folder: Path, timeout_s: float = 240.0):
    return Started([["-m", "mlx_lora.train", *words]] * count, folder).wait(timeout_s)


def seen(data: Path) -> list[list]:
    """Return all (prompt, answer) that were rewarded, in no particular order, and forget them."""
    files = list(data.glob("seen-*.jsonl"))
    found = [line for file in files for line in file.read_text().splitlines()]
    for file in files:
        file.unlink()
    return sorted(found)


VARIANTS = {
    "two": (2, ()),
    "two, updates with a reference": (2, ("--updates-per-rollout", 2, "--kl-beta", 0.1, "--scale-rewards", "batch")),
    "four, some without a prompt": (4, ("--grpo-loss", "dapo", "--steps-per-eval", 2)),
    "four, accumulation": (4, ("--batch-size", 1, "--grad-accumulation-steps", 3, "--grpo-loss", "gspo")),
    "rloo": (2, ("--objective", "rloo", "--kl-beta", 0.05)),
}


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [name if name == "two" else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
@pytest.mark.float32("an update that rounds otherwise samples other answers in the next step")
def test_several_processes_sample_the_answers_and_take_the_steps_of_one(name, tiny_folder, data, tmp_path):
    size, more = VARIANTS[name]
    succeeds("train", *command(tiny_folder, data, tmp_path / "one", *more))
    expected = seen(data)
    ended = ranks_of(size, command(tiny_folder, data, tmp_path / "several", *more), tmp_path / "ranks")
    assert ended.codes == [0] * size, ended.errs
    assert f"prompts answered by {size} processes" in ended.errs[0]
    assert (" may wait" in ended.errs[0]) == (size > 3)
    parts = len(list(data.glob("seen-*.jsonl")))
    assert parts == min(size, 3)  # each of the processes that have a prompt rewarded its own
    assert seen(data) == expected
    assert_same_run(tmp_path / "one", tmp_path / "several", **AS_CLOSE)
    assert len({line["reward"] for line in records(tmp_path / "one")}) > 2


@pytest.mark.slow
def test_a_reward_that_fails_on_one_rank_ends_all_with_its_words(tiny_folder, data, tmp_path):
    words = command(tiny_folder, data, tmp_path / "a", "--val-batches", 0, reward="fails_on_one")
    ended = ranks_of(2, words, tmp_path / "ranks", 60)
    assert ended.codes == [1, 1], ended.errs
    assert ended.message(0).startswith("Error: rank 1: --reward fails_on_one failed (KeyError: 'not on this rank') for")
    assert "Traceback" not in ended.errs[0] + ended.errs[1]


@pytest.mark.slow
def test_what_another_rank_skips_is_said_by_the_first(tiny_folder, data, tmp_path):
    more = ("--val-batches", 0, "--reward-errors", "skip")
    words = command(tiny_folder, data, tmp_path / "a", *more, reward="fails_on_one")
    ended = ranks_of(2, words, tmp_path / "ranks")
    assert ended.codes == [0, 0], ended.errs
    assert ended.errs[0].count("rank 1: Note: --reward fails_on_one failed") == 4


@pytest.mark.slow
def test_ranks_with_other_rewards_in_a_file_of_the_same_name_are_refused(tiny_folder, data, tmp_path):
    """The path is the same on both machines, its content is not: here, a link that each rank resolves for itself."""
    other = written(tmp_path / "other")
    (other / "mine.py").write_text(REWARD + "\n# another version\n")
    words = []
    for name, home in (("a", data), ("b", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text((home / "mine.py").read_text())
        words.append(command(tiny_folder, data, tmp_path / name / "run", "--reward", "mine.py:odd"))
    program = "import os, sys; os.chdir(sys.argv.pop(1)); from mlx_lora.cli.train import main; main()"
    started = [["-c", program, tmp_path / name, *given] for name, given in zip("ab", words, strict=True)]
    ended = Started(started, tmp_path / "ranks").wait(60)
    assert ended.codes == [2, 2], ended.errs
    assert "code of --reward mine.py:odd is" in ended.message(0)


@pytest.mark.slow
def test_one_goes_on_from_two_and_two_from_one(tiny_folder, data, tmp_path):
    more = ("--iters", 6, "--save-every", 2)
    assert run("train", *command(tiny_folder, data, tmp_path / "one", *more)).code == 0
    ended = ranks_of(2, command(tiny_folder, data, tmp_path / "two", *more), tmp_path / "ranks")
    assert ended.codes == [0, 0], ended.errs
    for name, count in (("one", 2), ("two", 1)):
        again = until(tmp_path / name, tmp_path / f"from {name}", 2)
        words = command(tiny_folder, data, again, *more, "--resume")
        ended = ranks_of(count, words, tmp_path / f"ranks from {name}")
        assert ended.codes == [0] * count, ended.errs
        assert "Resuming from step 2" in ended.errs[0]
        assert_same_run(tmp_path / "one", again, **AS_CLOSE)
        assert weights(again) != weights(again / "checkpoints" / "step-000002")


# Kills its own process when a function is called for the n-th time; then it is the train command.
KILLED = """
import importlib, os, signal, sys
module, owner, name, count = sys.argv.pop(1).split(":")
home = importlib.import_module(module)
home = getattr(home, owner) if owner else home
whole, calls = getattr(home, name), []
def call(*words, **named):
    calls.append(1)
    if len(calls) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*words, **named)
setattr(home, name, call)
from mlx_lora.cli.train import main
main()
"""
# Two updates on each rollout, saved after both: rollouts begin with steps 1, 3, 5 and 7, and have 8 tokens at most.
UPDATES = ("--updates-per-rollout", 2, "--iters", 8, "--save-every", 2, "--val-batches", 0, "--steps-per-eval", 0)
MOMENTS = {
    "while sampling": ("mlx_lora.models.generator::_drawn:20", None),
    "between rollout and update": ("mlx_lora.trainer.step:Step:__call__:5", 4),
    "between two updates of a rollout": ("mlx_lora.trainer.step:Step:__call__:6", 4),
    "while rewarding": ("mlx_lora.rollouts.environment::rewards_for:3", 4),
}
FAST = ("between rollout and update",)


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """A run that was never killed; its data, and its adapter's bytes."""
    folder = tmp_path_factory.mktemp("whole")
    data = written(folder / "data")
    assert run("train", *command(tiny_folder, data, folder / "a", *UPDATES, "--dropout", 0.1)).code == 0
    return data, weights(folder / "a")


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MOMENTS]
)
def test_a_run_killed_around_its_rollouts_ends_in_the_same_bytes(moment, whole, tiny_folder, tmp_path):
    data, expected = whole
    where, saved = MOMENTS[moment]
    words = command(tiny_folder, data, tmp_path / "a", *UPDATES, "--dropout", 0.1)
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, where, *last_given([str(word) for word in words])],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}, timeout=240,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    ran = succeeds("train", *words, "--resume")
    assert "Resuming from step" in ran.err
    assert saved is None or f"Resuming from step {saved}" in ran.err
    assert weights(tmp_path / "a") == expected


@pytest.mark.slow
def test_two_ranks_of_which_one_is_killed_end_in_the_same_bytes(tiny_folder, data, tmp_path):
    words = {name: command(tiny_folder, data, tmp_path / name, *UPDATES, "--dropout", 0.1) for name in "ab"}
    assert ranks_of(2, words["a"], tmp_path / "whole").codes == [0, 0]
    dying = [
        ["-m", "mlx_lora.train", *words["b"]],
        ["-c", KILLED, MOMENTS["between rollout and update"][0], *words["b"]],
    ]
    ended = Started(dying, tmp_path / "killed").wait(60)
    assert ended.codes == [1, -signal.SIGKILL], ended.errs
    ended = ranks_of(2, [*words["b"], "--resume"], tmp_path / "again")
    assert ended.codes == [0, 0], ended.errs
    assert "Resuming from step 4" in ended.errs[0]
    assert weights(tmp_path / "b") == weights(tmp_path / "a")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_prompt_is_dealt_once_and_ranks_get_about_as_many(size):
    counts = [3, 1, 1, 4, 1]
    dealt = deal_prompts(counts, size)
    of_rank = np.zeros(size, int)
    for count, prompts_of in zip(counts, dealt, strict=True):
        assert sorted(prompt for prompts in prompts_of for prompt in prompts) == list(range(count))
        of_rank += [len(prompts) for prompts in prompts_of]
    assert np.ptp(of_rank) <= 1


def test_answers_of_all_ranks_are_put_in_their_own_places():
    """Two ranks, two batches; each answer's token is its place, so that a mix-up shows."""
    group, counts = 2, [3, 2]
    whole = [
        Played(
            [[100 * batch + prompt] for prompt in range(count)],
            [
                Episode([100 * batch + row, 7, 8], [(1, 1 + row % 2)], row % 3 == 0, {"turns": float(row)})
                for row in range(group * count)
            ],
            np.arange(2.0 * group * count).reshape(-1, 2) + batch,
        )
        for batch, count in enumerate(counts)
    ]
    dealt = deal_prompts(counts, 2)
    parts = []
    for rank in range(2):
        own = []
        for one, prompts_of in zip(whole, dealt, strict=True):
            rows = [group * prompt + place for prompt in prompts_of[rank] for place in range(group)]
            begun = [one.prompts[prompt] for prompt in prompts_of[rank]]
            own.append(Played(begun, [one.episodes[row] for row in rows], one.rewards[rows], [f"note of {rank}"]))
        parts.append(own)
    sent = [[[one.prompts, one.written, one.rewards.tolist(), one.notes] for one in own] for own in parts]
    sent = json.loads(json.dumps(sent))
    two = SimpleNamespace(size=2, everyone=lambda value: sent)
    for found, expected in zip(gathered(parts[0], dealt, group, two), whole, strict=True):
        assert found.prompts == expected.prompts
        assert [one.tokens for one in found.episodes] == [one.tokens for one in expected.episodes]
        assert [one.sampled.tolist() for one in found.episodes] == [one.sampled.tolist() for one in expected.episodes]
        assert [one.truncated for one in found.episodes] == [one.truncated for one in expected.episodes]
        assert [one.counts for one in found.episodes] == [one.counts for one in expected.episodes]
        assert found.rewards.tolist() == expected.rewards.tolist()
        assert found.notes == ["note of 0", "rank 1: note of 1"]
    missing = Played([[3]], [Episode([1]), Episode([2])], np.array([[np.nan], [1.0]]))
    (alone,) = gathered([missing], deal_prompts([1], 1), 2, ALONE)
    assert np.isnan(alone.rewards[0])


OF_TEXTS = {
    "classify": [{"text": f"{'warm' * (n % 3)} day {n}", "label": "abc"[n % 3]} for n in range(36)],
    "rerank": [
        {"query": f"Where is {n}?", "positive": f"{n}, here.", "negatives": [f"{n}, no.", "No."]} for n in range(24)
    ],
    "embed": [{"query": f"Where is {n}?", "positive": f"{n} is by the river."} for n in range(36)],
}
PAIRS = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No" + "!" * (n % 5)} for n in range(24)]
OBJECTIVES = ["dpo", "orpo", "kto", "reward", "classify", "rerank", "embed"]
# On a shared base, the second rank has no batch of the validation and computes one without rows.
SHARED = ["reward", "classify", "rerank", "embed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "shared"), [*((name, False) for name in OBJECTIVES), *((name, True) for name in SHARED)]
)
def test_two_ranks_take_the_steps_of_one(objective, shared, tiny_folder, tmp_path):
    rows = PAIRS
    if objective == "kto":
        rows = [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in rows
            for name in ("chosen", "rejected")
        ]
    rows = OF_TEXTS.get(objective, rows)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for count in (1, 2):
        command = ["-m", "mlx_lora.train", "--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / str(count),
                   "--objective", objective, "--iters", 4, "--learning-rate", "5e-3", "--batch-size", 6, "--sample-tokens", 0,
                   "--steps-per-report", 1, "--val-batches", 1 if shared else 2, "--kernels", "ours"]  # fmt: skip
        command += ["--shard-base"] if shared and count > 1 else []
        ended = Started([command] * count, tmp_path / f"hosts{count}").wait()
        assert ended.codes == [0] * count, ended.errs
    rates = ("loss", "val_loss", "margin", "accuracy", "macro_f1", "mrr")
    assert_same_run(tmp_path / "1", tmp_path / "2", 1e-4, 1e-4, rates, ("step",))
    first, *_, last = records(tmp_path / "1")
    assert last["val_loss"] != pytest.approx(first["val_loss"], rel=1e-3)


@pytest.mark.slow
def test_two_ranks_say_that_each_sorts_its_own_pairs(tiny_folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, PAIRS)))
    for loss_type, told in (("aot", [1, 0]), ("sigmoid", [0, 0])):
        command = ["-m", "mlx_lora.train", "--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / loss_type,
                   "--objective", "dpo", "--loss-type", loss_type, "--iters", 2, "--batch-size", 6]  # fmt: skip
        ended = Started([command] * 2, tmp_path / f"hosts-{loss_type}").wait()
        assert ended.codes == [0, 0], ended.errs
        assert [err.count("--loss-type aot") for err in ended.errs] == told


@pytest.mark.slow
def test_the_first_of_two_ranks_scores_the_task_for_both(tiny_folder, tmp_path):
    rows = [{"prompt": f"Say {n}.", "completion": "abc"} for n in range(24)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows[:4])))
    scores = {}
    for count in (1, 2):
        command = ["-m", "mlx_lora.train", "--model", tiny_folder, "--data", tmp_path / "data.jsonl", "--adapter-path",
                   tmp_path / str(count), "--iters", 12, "--learning-rate", "1e-2", "--batch-size", 6, "--sample-tokens", 0,
                   "--kernels", "ours", "--steps-per-eval", 4, "--eval-tasks", tmp_path / "task.jsonl", "--eval-metric", "rouge_l",
                   "--eval-max-tokens", 6, "--metric-for-best-model", "task", "--early-stopping-patience", 2]  # fmt: skip
        ended = Started([command] * count, tmp_path / f"hosts{count}").wait()
        assert ended.codes == [0] * count, ended.errs
        scores[count] = [line["task"] for line in records(tmp_path / str(count)) if line["val_loss"] is not None]
    assert scores[1] == pytest.approx(scores[2])
    assert len(scores[1]) >= 3


class Messages:
    """The ranks of a measurement, taken one after the other: the last gets what all of them sent."""

    def __init__(self, size: int):
        self.size, self.rank, self.sent = size, 0, {"sum": [], "everyone": []}

    leads = property(lambda self: self.rank == 0)

    def sum(self, array: mx.array) -> mx.array:
        self.sent["sum"].append(array)
        return sum(self.sent["sum"][1:], self.sent["sum"][0])

    def everyone(self, value):
        self.sent["everyone"].append(json.dumps(value))
        return list(map(json.loads, self.sent["everyone"]))

    def meet(self) -> None:
        pass


class Lockstep(DataParallel):
    lockstep = True


def measured_in(size: int, model, task, plan, kind=DataParallel):
    """Return what the last of several ranks finds."""
    ranks, found = Messages(size), None
    for ranks.rank in range(size):
        strategy = kind(ranks)
        found = mean_loss(model, task, strategy.held_out(plan, -1), strategy)
    return found


@pytest.mark.parametrize("kind", [DataParallel, Lockstep])
def test_each_held_out_row_is_known_once_and_in_order(kind):
    random = np.random.default_rng(2)
    lengths = random.integers(4, 30, 11)
    rows = EncodedSet.from_rows([(random.integers(0, 288, n).astype(np.int32), np.arange(n) > 1) for n in lengths])
    model, plan = tiny_model(), BatchPlan(rows, batch_tokens=64, batch_size=None, seed=0)
    task = bind(objective_of(ObjectiveSettings()), choose_loss(model, TINY), model)
    alone = mean_loss(model, task, plan.batches())
    assert len(plan) % 4  # one of four ranks has a batch without rows, or fewer batches
    for size in (2, 4):
        found = measured_in(size, model, task, plan, kind)
        assert found.loss == pytest.approx(alone.loss, rel=1e-5)
        assert found.rows.tokens.tolist() == alone.rows.tokens.tolist() == (lengths - 2).tolist()
        assert found.rows.sums == pytest.approx(alone.rows.sums, rel=1e-6)
        assert found.rows.loss == pytest.approx(found.loss, rel=1e-5)


@pytest.mark.parametrize("kind", [DataParallel, Lockstep])
def test_a_rank_without_rows_has_no_part_in_the_search(kind, tiny_folder):
    rows = random_examples(13, 1, False)
    base = load_base(ModelSettings(model=str(tiny_folder), dtype="float32"))
    _, task = bound(base, rows)
    plan = BatchPlan(rows, batch_tokens=10**6, batch_size=5, seed=0)
    alone = mean_loss(base.model, task, plan.batches())
    for size in (2, 4):
        found = measured_in(size, base.model, task, plan, kind)
        assert (found.loss, found.count) == (pytest.approx(alone.loss, rel=1e-5), 13)
        assert found.reports == pytest.approx(alone.reports)
