"""Tasks of reasoning-gym by name, with a stand-in for the package, and with the package itself where it is installed."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from refusing import refuses

from mlx_lora.data import task_sets
from mlx_lora.data.files import find_sets
from mlx_lora.data.prompts import parse_prompt
from mlx_lora.rollouts.rewards import ready_reward


def made(name: str, size: int, seed: int) -> list[dict]:
    """Stand for the package's tasks; one of their facts is no JSON."""
    about = {"source_dataset": name, "set": {1}}
    return [{"question": f"{n} legs?", "answer": str(n + seed), "metadata": about} for n in range(size)]


@pytest.fixture
def package(monkeypatch, tmp_path):
    stand_in = SimpleNamespace(
        factory=SimpleNamespace(DATASETS={"legs": 1, "knots": 2}), create_dataset=made,
        get_score_answer_fn=lambda name: lambda answer, entry: 0.5 * (answer == entry["answer"]) + 0.5 * (name == "legs"),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "reasoning_gym", stand_in)
    monkeypatch.setattr(task_sets.metadata, "version", lambda name: "0")
    monkeypatch.setattr(task_sets, "cache_dir", lambda name: tmp_path / name)
    return stand_in


def test_tasks_are_prompts_with_what_judges_answers(package):
    [one] = find_sets("reasoning-gym:legs:3")
    [file] = one.splits["train"]
    records = [json.loads(line) for line in file.path.read_text().splitlines()]
    prompt = parse_prompt(records[2])
    assert prompt.example.messages[0] == {"role": "user", "content": "2 legs?"}
    assert prompt.columns["answer"] == "2"
    columns = {name: [record[name] for record in records] for name in ("answer", "metadata")}
    assert ready_reward("reasoning-gym")(completions=["0", "9", " 2\n"], **columns) == [1.0, 0.5, 1.0]
    package.create_dataset = None  # they are made once
    assert find_sets("reasoning-gym:legs:3")[0].splits == one.splits


@pytest.mark.parametrize(
    ("name", "words"), [("leg", "it has legs"), ("legs:x", "give a number of tasks"), ("legs:0", "give a number")]
)
def test_bad_names_are_one_line(name, words, package):
    refuses(words, find_sets, f"reasoning-gym:{name}")


def test_tasks_that_cannot_be_made_are_one_line(package):
    def fails(name: str, size: int, seed: int):
        raise AssertionError("Must specify at least one dataset\nand more")

    package.create_dataset = fails
    refuses("AssertionError: Must specify at least one dataset", find_sets, "reasoning-gym:legs")


def test_tasks_without_a_known_answer_and_with_tuples_are_judged(package):
    """Several tasks of the package know how to judge an answer, but have none; others compare it with a tuple."""

    def score(answer: str, entry: dict) -> float:
        assert entry["answer"] is None
        return float(tuple(map(int, answer.split())) == entry["metadata"]["moves"])

    package.get_score_answer_fn = lambda name: score
    about = json.loads(json.dumps({"source_dataset": "cube", "moves": (1, 2)}))
    reward = ready_reward("reasoning-gym")
    assert reward(completions=["1 2", "2 1"], metadata=[about] * 2) == [1.0, 0.0]
    refuses("metadata", reward, completions=["1"], answer=["1"], kind=ValueError)


def test_without_the_package_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    for call in (lambda: find_sets("reasoning-gym:legs"), lambda: ready_reward("reasoning-gym")):
        refuses(r"needs reasoning-gym; pip install 'mlx-lora\[rewards\]'", call)


@pytest.mark.parametrize("name", ["leg_counting", "rearc", "spell_backward"])
def test_the_package_itself(name, monkeypatch, tmp_path):
    gym = pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(task_sets, "cache_dir", lambda name: tmp_path / name)
    [file] = find_sets(f"reasoning-gym:{name}:4")[0].splits["train"]
    records = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [one["prompt"][0]["content"] for one in records] == [
        task["question"] for task in gym.create_dataset(name, size=4, seed=0)
    ]
    columns = {name: [record[name] for record in records] for name in ("answer", "metadata")}
    right = ready_reward("reasoning-gym")(completions=columns["answer"], **columns)
    assert right == [1.0] * 4
    assert ready_reward("reasoning-gym")(completions=["-1"] * 4, **columns) != right
