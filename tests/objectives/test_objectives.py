"""What holds of every objective, on tiny data of its own: it learns, resumes to the same bytes, is measured and planned as it ran."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from comparing import by_dtype
from conftest import tiny_model, write_folder
from resumed_runs import metrics, stopped_after, weights
from run_cli import one_line, run, succeeds
from tiers import by_default

from mlx_lora.config.objectives import OBJECTIVES

SIZE = ("--batch-size", 4, "--rank", 4)
QUICK = ("--iters", 8, "--save-every", 4, "--keep", 0, *SIZE, "--learning-rate", "5e-3", "--warmup", 0, "--kernels", "ours",
         "--val-batches", -1, "--sample-tokens", 0)  # fmt: skip
LABELS = ("cold", "hot", "mild")


def chat(n: int) -> dict:
    return {"prompt": f"Say {n}.", "completion": "abc" * (1 + n % 4)}


def pair(n: int) -> dict:
    return {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea" + "!" * (n % 5)}


def rated(n: int) -> dict:
    return {"prompt": f"What is {n}?", "completion": f"It is {n}." if n % 2 else "No idea", "label": bool(n % 2)}


def labeled(n: int) -> dict:
    return {"text": f"day {n}: {'abz'[n % 3] * 3}", "label": LABELS[n % 3]}


def ranked(n: int) -> dict:
    return {"query": f"q{n}", "positive": f"{n} yes!", "negatives": [f"{n} no{'?' * i}" for i in range(1 + n % 3)]}


def searched(n: int) -> dict:
    return {"query": f"Where is {n}?", "positive": f"{n} is by the river.", "negative": f"No {n * 7}."}


@dataclass(frozen=True)
class Member:
    """An objective in this suite.

    Attributes:
        row: makes its nth record.
        flags: of its runs; `TEACHER` stands for another tiny model.
        better: the number of a validation that rises while it learns; None: what it learns is shown by a test of its own.
        measured: whether `evaluate` finds the numbers of the last validation: answers are sampled anew.
        dropout: of its runs, which a resumed run draws again.
    """

    row: Callable[[int], dict]
    flags: tuple = ()
    better: str | None = "margin"
    measured: bool = True
    dropout: float = 0.1


ANSWERS = ("--max-new-tokens", 8, "--group-size", 3)
REWARDED = (*ANSWERS, "--reward", "regex:[A-Z0-9]", "--updates-per-rollout", 2, "--kl-beta", 0.1)
MEMBERS = {
    "sft": Member(chat, better="-val_loss"),
    **dict.fromkeys(("dpo", "orpo", "simpo", "cpo", "reward"), Member(pair)),
    "kto": Member(rated),
    **dict.fromkeys(("grpo", "rloo"), Member(chat, REWARDED, None, measured=False)),
    "distill": Member(chat, ("--teacher", "TEACHER"), "-kl"),
    "distill on-policy": Member(chat, ("--teacher", "TEACHER", "--on-policy", *ANSWERS), "-kl", measured=False),
    "classify": Member(labeled, better="-val_loss"),
    "rerank": Member(ranked, better="-val_loss"),
    "embed": Member(searched, better="-val_loss", dropout=0),
}
# One of each way that arrays take to the loss.
DEFAULT = ("sft", "dpo", "kto", "reward", "grpo", "distill", "distill on-policy", "classify", "rerank", "embed")
MEASURED = [name for name, member in MEMBERS.items() if member.measured]


@pytest.fixture(scope="module")
def command(tiny_folder, tmp_path_factory) -> Callable[..., list]:
    """Return what all commands on a member are told; its data are written once."""
    root = tmp_path_factory.mktemp("objectives")
    teacher = write_folder(root / "teacher", tiny_model(seed=7))

    def words(name: str, *more: object) -> list:
        member, data = MEMBERS[name], root / name
        if not data.exists():
            data.mkdir()
            for part, numbers in (("train", range(24)), ("valid", range(30, 39))):
                (data / f"{part}.jsonl").write_text("\n".join(json.dumps(member.row(n)) for n in numbers))
        flags = [teacher if flag == "TEACHER" else flag for flag in member.flags]
        return ["--model", tiny_folder, "--data", data, "--objective", name.split()[0], *flags, *more]

    return words


@pytest.fixture(scope="module")
def train(command) -> Callable[..., None]:
    """Return what makes a member's run in a folder."""

    def run_in(name: str, folder: Path, *more: object) -> None:
        dropout = ("--dropout", MEMBERS[name].dropout)
        succeeds("train", *command(name, "--adapter-path", folder, *QUICK, *dropout, *more))

    return run_in


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Callable[[str], Path]:
    """Return the folder of a member's run, which is made once."""
    root = tmp_path_factory.mktemp("whole")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            train(name, root / name)
        return root / name

    return folder


def validations(folder: Path) -> list[dict]:
    return [line for line in metrics(folder) if line["val_loss"] is not None]


def test_every_objective_is_in_the_suite():
    assert {name.split()[0] for name in MEMBERS} == set(OBJECTIVES)


@pytest.mark.parametrize(
    "name", by_default([n for n, one in MEMBERS.items() if one.better], *sorted({*DEFAULT} - {"grpo"}))
)
def test_it_learns(name, whole):
    better = MEMBERS[name].better
    first, *_, last = (line[better.lstrip("-")] for line in validations(whole(name)))
    assert last < first if better.startswith("-") else last > first
    assert metrics(whole(name))[-1]["skipped_steps"] == 0


@pytest.mark.parametrize("name", by_default(MEMBERS, *DEFAULT))
def test_a_run_that_was_cut_goes_on_to_the_same_bytes(name, train, whole, tmp_path):
    rest = stopped_after(whole(name), tmp_path / "rest", 4)
    train(name, rest, "--resume")
    assert weights(rest) == weights(whole(name)) != weights(rest / "checkpoints/step-000004")


@pytest.mark.parametrize("name", by_default(MEASURED, "sft", "dpo", "distill", "rerank"))
def test_evaluate_finds_what_the_last_validation_found(name, command, whole):
    found = json.loads(succeeds("evaluate", *command(name, "--adapter-path", whole(name)), "--json").out)
    last, first = validations(whole(name))[-1], validations(whole(name))[0]
    assert found["loss"] == pytest.approx(last["val_loss"], rel=by_dtype(1e-4, 2e-2))
    assert found["loss"] != pytest.approx(first["val_loss"], rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", by_default(MEMBERS, "sft", "dpo", "distill on-policy", "classify"))
def test_a_plan_has_the_peak_of_the_run(name, command, whole):
    more = (*SIZE, "--dropout", MEMBERS[name].dropout, "--json")
    planned = json.loads(succeeds("plan", *command(name, *more)).out)
    ran = json.loads((whole(name) / "report.json").read_text())
    assert planned["peak_bytes"] == pytest.approx(ran["planned_peak_bytes"], rel=0.05)


@pytest.mark.parametrize("name", by_default(MEMBERS, *({*DEFAULT} - {"sft", "distill", "distill on-policy", "grpo"})))
def test_records_of_another_objective_are_refused_in_one_line(name, command, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"nothing": "of use"}\n')
    words = command(name, "--adapter-path", tmp_path / "a", *QUICK, "--data", tmp_path / "train.jsonl")
    one_line(run("train", *words), "train.jsonl")
    assert not (tmp_path / "a").exists()
