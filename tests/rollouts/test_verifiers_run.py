"""Runs on an environment of verifiers through the command: killed within an episode and resumed, measured, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from child_environment import child_environment
from conftest import tiny_model, write_folder
from resumed_runs import metrics, resumes_to_the_same_bytes
from run_cli import one_line, run, succeeds
from verifiers_environments import plain, write_environments

from mlx_lora.rollouts.make_environment import close_hosts

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the package's own code

# Two answers to each task, of which longer ones are better; it ends its own process in the episode that a variable names.
LETTERS = """
import os
import signal
import verifiers.v1 as vf

class Letters(vf.Task):
    begun = 0

    async def setup(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        Letters.begun += 1
        if os.environ.get("DIE_AT") == str(Letters.begun):
            os.kill(os.getpid(), signal.SIGKILL)

    @vf.reward
    async def long(self, trace: vf.Trace) -> float:
        return sum(len(said.content or "") for said in trace.assistant_messages) / 10

    @vf.metric
    async def answers(self, trace: vf.Trace) -> float:
        return float(trace.num_turns)

class Alphabet(vf.Taskset[Letters]):
    def load(self):
        for letter in "abcdefghij":
            yield Letters(vf.TaskData(prompt=letter), self.config.task)

class More(vf.Env[vf.SingleAgentEnvConfig]):
    async def run(self, task, agents):
        async with agents.agent.interaction(task) as talk:
            await talk.turn()
            await talk.turn("more")

__all__ = ["Alphabet", "More"]
"""
QUICK = ("--learning-rate", "1e-2", "--batch-size", 2, "--group-size", 3, "--max-new-tokens", 90, "--kernels", "ours",
         "--steps-per-report", 1, "--rank", 4, "--warmup", 0, "--sample-tokens", 0)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("verifiers.v1", reason="pip install 'mlx-lora[verifiers]'")
    made = write_environments(
        tmp_path_factory.mktemp("letters"), vr_letters=LETTERS,
        vr_judged=plain().replace("        return 1.0", "        raise ConnectionError('no judge answers')"),
    )  # fmt: skip
    write_folder(made / "tiny", tiny_model())
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(made))
        yield made
        close_hosts()


def command(folder: Path, adapter: Path, *more: object) -> tuple:
    return (
        "train", "--model", folder / "tiny", "--environment", "verifiers:vr_letters", "--adapter-path", adapter,
        "--objective", "grpo", *QUICK, *more,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_that_is_killed_within_an_episode_resumes_to_the_same_bytes(folder, tmp_path):
    def words(adapter: Path, *more: object) -> tuple:
        asked = ("--iters", 4, "--save-every", 2, "--val-batches", 0, "--valid-fraction", 0)
        return command(folder, adapter, *asked, *more)

    whole = tmp_path / "whole"
    succeeds(*words(whole))
    lines = metrics(whole)
    assert all(line["reward"] > 0 and line["grad_norm"] > 0 for line in lines)
    assert any(line["metrics/answers"] > 1 for line in lines)
    # After one without the model, in the fourth step.
    dies = child_environment(folder, DIE_AT=str(1 + 3 * 6 + 4))
    resumes_to_the_same_bytes(words, whole, tmp_path, dies, 2)


def test_a_run_is_planned_validated_and_measured(folder, tmp_path):
    succeeds(*command(folder, tmp_path / "a", "--dry-run"))
    succeeds(
        *command(
            folder, tmp_path / "a", "--iters", 1, "--val-batches", 1, "--valid-fraction", 0.3, "--sample-tokens", 20
        )
    )
    answers = [json.loads(line) for line in (tmp_path / "a" / "answers.jsonl").read_text().splitlines()]
    assert {turn["role"] for one in answers for turn in one["messages"]} <= {"assistant", "user"}
    flags = ("--objective", "grpo", "--environment", "verifiers:vr_letters", "--max-new-tokens", 90, "--group-size", 2)
    measured = succeeds("evaluate", "--model", folder / "tiny", "--adapter-path", tmp_path / "a", *flags, "--json")
    found = json.loads(measured.out)
    assert found["reward"] > 0
    assert found["metrics/answers"] >= 1


def test_what_cannot_be_played_is_one_line(folder, tmp_path):
    def refused(*more: object):
        return run(*command(folder, tmp_path / "no", "--iters", 1, *more))

    one_line(refused("--environment", "verifiers:vr_judged"), "cannot be played", "no judge answers")
    one_line(refused("--environment", "verifiers:nowhere"), "no package nowhere")
