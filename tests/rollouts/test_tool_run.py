"""Runs with tools through the command and Python: killed in the middle of an episode and resumed, measured, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from child_environment import child_environment
from conftest import tiny_model, write_folder
from resumed_runs import metrics, resumes_to_the_same_bytes
from run_cli import one_line, run, succeeds
from tool_model import SHELF, shelf_folder

import mlx_lora
from mlx_lora.rollouts.user_code import module_of

QUICK = ("--learning-rate", "1e-2", "--batch-size", 2, "--group-size", 4, "--max-new-tokens", 30, "--kernels", "ours",
         "--steps-per-report", 1, "--rank", 4, "--warmup", 0, "--val-batches", 0, "--sample-tokens", 0)  # fmt: skip
DIES = SHELF.replace(
    "        self.found =",
    "        Shelf.calls = getattr(Shelf, 'calls', 0) + 1\n"
    "        if os.environ.get('DIE_AT') == str(Shelf.calls):\n"
    "            os.kill(os.getpid(), 9)\n"
    "        self.found =",
).replace('"""What stands', 'import os\n"""What stands', 1)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    folder = shelf_folder(tmp_path_factory.mktemp("shelf"), steps=80)
    (folder / "dies.py").write_text(DIES)
    return folder


def command(shelf: Path, folder: Path, *more: object) -> tuple:
    return (
        "train", "--model", shelf / "base", "--data", shelf / "prompts", "--adapter-path", folder, "--objective", "grpo",
        "--environment", f"{shelf / 'dies.py'}:Shelf", "--reward", f"{shelf / 'dies.py'}:right", *QUICK, *more,
    )  # fmt: skip


@pytest.mark.long
def test_a_run_that_is_killed_within_an_episode_resumes_to_the_same_bytes(shelf, tmp_path):
    def words(folder: Path, *more: object) -> tuple:
        return command(shelf, folder, "--iters", 6, "--save-every", 2, *more)

    whole = tmp_path / "whole"
    succeeds(*words(whole))
    lines = metrics(whole)
    calls = [8 * line["tools/call_frequency"] for line in lines]
    assert all(line["tools/turns"] > 1 for line in lines)
    died_at = round(sum(calls[:4])) + 3  # within the fifth step's episodes
    resumes_to_the_same_bytes(words, whole, tmp_path, child_environment(DIE_AT=str(died_at)), 4)


@pytest.mark.long
def test_the_same_run_from_python_and_its_measurement(shelf, tmp_path):
    made = vars(module_of(str(shelf / "shelf.py"), "it"))
    settings = {
        "objective": "grpo", "environment": made["Shelf"], "reward": made["right"], "iters": 2, "batch_size": 2,
        "group_size": 4, "max_new_tokens": 30, "max_turns": 2, "sample_tokens": 40, "val_batches": 1, "rank": 4,
        "kernels": "ours", "steps_per_report": 1, "progress": False,
    }  # fmt: skip
    ran = mlx_lora.train(shelf / "base", shelf / "prompts", tmp_path / "a", **settings)
    assert ran.settings["environment"] == "python:Shelf"
    assert {"tools/call_frequency", "tools/failure_frequency", "tools/turns"} <= ran.metrics[0].keys()
    answers = [json.loads(line) for line in (ran.adapter / "answers.jsonl").read_text().splitlines()]
    assert any(one["messages"][0].get("tool_calls") for one in answers)
    flags = (
        "--objective", "grpo", "--max-new-tokens", 30, "--group-size", 2, "--json", "--data",
        shelf / "prompts" / "valid.jsonl",
    )  # fmt: skip
    user = ("--environment", f"{shelf / 'shelf.py'}:Shelf", "--reward", f"{shelf / 'shelf.py'}:right")
    measured = succeeds("evaluate", "--model", shelf / "base", "--adapter-path", ran.adapter, *flags, *user)
    found = json.loads(measured.out)
    assert 0 <= found["reward"] <= 1
    assert found["tools/turns"] > 1


@pytest.mark.long
def test_tools_alone_are_planned_with_the_prompt(shelf, tmp_path):
    (tmp_path / "t.py").write_text(
        "def fly(to: str) -> str:\n    '''Fly.\n\n    Args:\n        to: where\n    '''\n    return to\n"
    )
    asked = ("train", "--model", shelf / "base", "--data", shelf / "prompts", "--adapter-path", tmp_path / "a",
             "--objective", "grpo", "--reward", "length:4", *QUICK, "--dry-run")  # fmt: skip
    with_tools, without = run(*asked, "--tools", tmp_path / "t.py"), run(*asked)
    assert with_tools.code == without.code == 0, with_tools.err
    assert "Call a function with" in with_tools.out + with_tools.err
    assert "Call a function with" not in without.out + without.err


@pytest.mark.long
def test_a_template_that_shows_no_tools_is_one_line(shelf, tmp_path):
    bare = write_folder(tmp_path / "bare", tiny_model())
    given = ("train", "--model", shelf / "base", "--data", shelf / "prompts", "--adapter-path", tmp_path / "b")
    for asked, *words in (
        (command(shelf, tmp_path / "a", "--model", bare, "--iters", 1), "does not show tools", "--chat-template"),
        (command(shelf, tmp_path / "a", "--model", bare, "--dry-run"), "does not show tools"),
        (command(shelf, tmp_path / "a", "--objective", "sft", "--iters", 1), "--reward"),
        ((*given, "--tools", "t.py"), "--tools"),
    ):
        one_line(run(*asked), *words)
