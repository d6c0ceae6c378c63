"""Tasks of reasoning-gym and of environments of verifiers by name: as prompts, and refused in one line."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from refusing import refuses
from verifiers_environments import OWN, PROGRAM, SINGLE, TURNS, TWO_AGENTS, TWO_KINDS, plain, write_environments

from mlx_lora.config.load import train_settings
from mlx_lora.config.rules import is_verifiers
from mlx_lora.data import task_sets
from mlx_lora.data.data_sets import find_sets
from mlx_lora.data.prompts import parse_prompt
from mlx_lora.data.task_sets import make_environment, named, tasks_of
from mlx_lora.rollouts.make_environment import check_environment
from mlx_lora.rollouts.rewards import ready_reward


def made(name: str, size: int, seed: int) -> list[dict]:
    """Stand for the package's tasks; one of their facts is no JSON."""
    about = {"source_dataset": name, "set": {1}}
    return [{"question": f"{n} legs?", "answer": str(n + seed), "metadata": about} for n in range(size)]


def records(data: str) -> list[dict]:
    [file] = find_sets(data)[0].splits["train"]
    return [json.loads(line) for line in file.path.read_text().splitlines()]


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
    before = find_sets("reasoning-gym:legs:3")[0].splits
    found = records("reasoning-gym:legs:3")
    prompt = parse_prompt(found[2])
    assert prompt.example.messages[0] == {"role": "user", "content": "2 legs?"}
    assert prompt.columns["answer"] == "2"
    columns = {name: [record[name] for record in found] for name in ("answer", "metadata")}
    assert ready_reward("reasoning-gym")(completions=["0", "9", " 2\n"], **columns) == [1.0, 0.5, 1.0]
    package.create_dataset = None  # they are made once
    assert find_sets("reasoning-gym:legs:3")[0].splits == before


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


@pytest.mark.parametrize("name", ["leg_counting", "rearc", "spell_backward"])
def test_the_package_itself(name, monkeypatch, tmp_path):
    gym = pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(task_sets, "cache_dir", lambda name: tmp_path / name)
    found = records(f"reasoning-gym:{name}:4")
    tasks = gym.create_dataset(name, size=4, seed=0)
    assert [one["prompt"][0]["content"] for one in found] == [task["question"] for task in tasks]
    columns = {name: [record[name] for record in found] for name in ("answer", "metadata")}
    right = ready_reward("reasoning-gym")(completions=columns["answer"], **columns)
    assert right == [1.0] * 4
    assert ready_reward("reasoning-gym")(completions=["-1"] * 4, **columns) != right


@pytest.fixture
def modules(monkeypatch, tmp_path):
    pytest.importorskip("verifiers.v1", reason="pip install 'mlx-lora[verifiers]'")
    picture = "vf.UserMessage(content=[vf.ImageUrlContentPart(image_url=vf.ImageUrlSource(url='data:,'))])"
    made = {
        "vt_words": SINGLE, "vt_turns": TURNS, "vt_two": TWO_AGENTS, "vt_boxed": plain(container=True),
        "vt_image": plain("yield One(vf.TaskData(prompt='?', image='ubuntu'), self.config.task)"),
        "vt_fails": plain("raise OSError('no network\\nhere')"), "vt_empty": plain("return iter(())"),
        "vt_seen": plain(f"yield One(vf.TaskData(prompt=[{picture}]), self.config.task)"),
        "vt_opened": plain("yield One(vf.TaskData(system_prompt='Wait.'), self.config.task)"),
        "vt_own": OWN, "vt_program": PROGRAM, "vt_broken": "import no_such_package",
        "vt_kinds": TWO_KINDS,
    }  # fmt: skip
    folder = write_environments(tmp_path, **made)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr("mlx_lora.data.task_sets.cache_dir", lambda name: tmp_path / name)
    for name in made:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


ENVIRONMENT = {"model": "m", "objective": "grpo", "environment": "verifiers:a"}


def test_names():
    assert is_verifiers("verifiers:a")
    assert not is_verifiers("a.py:A")
    assert not is_verifiers(None)
    assert named("verifiers:a") == ("a", None)
    assert named("verifiers:dir/a.toml:20") == ("dir/a.toml", 20)
    for bad in ("verifiers:", "verifiers:a:0"):
        refuses("name of an environment", named, bad)


def test_the_data_are_the_environments_tasks_unless_a_number_of_them_is_asked_for():
    asked = ENVIRONMENT
    assert train_settings(asked).data.data == "verifiers:a"
    assert train_settings({**asked, "data": "verifiers:a:20"}).data.data == "verifiers:a:20"
    for other in ("verifiers:b", "prompts.jsonl", "verifiers:ab"):
        refuses("its own tasks; leave --data out", train_settings, {**asked, "data": other})
    assert train_settings({**asked, "environment": "a.py:A", "data": "p.jsonl"}).data.data == "p.jsonl"


def test_tasks_are_prompts(modules):
    found = records("verifiers:vt_words")
    assert found[1]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say pear"},
    ]
    assert [one["task"] for one in found] == [0, 1, 2, 3]
    assert found[1]["task_hash"] == tasks_of("verifiers:vt_words")[1].hash != found[0]["task_hash"]
    assert len(records("verifiers:vt_words:2")) == 2
    assert len(records("verifiers:vt_turns")) == 1000  # of an endless set
    assert records("verifiers:vt_opened")[0]["prompt"][0] == {"role": "system", "content": "Wait."}


def test_sampling_and_retries_of_a_package_are_the_runs(modules):
    agent = make_environment("vt_own", "it").config.agent
    assert agent.sampling is None
    assert (agent.retries.max_retries, agent.max_turns) == (0, 6)


def test_a_file_configures_an_environment(modules, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[env.taskset]\nid = 'vt_words'\n[env.agent]\nmax_turns = 3\n")
    assert len(records(f"verifiers:{file}:3")) == 3
    made = make_environment(str(file), "it", turns=7)
    assert made.config.agent.max_turns == 3
    assert make_environment("vt_words", "it", turns=7, tool_s=5.0).config.agent.max_turns == 7
    assert make_environment("vt_words", "it", tool_s=5.0).config.agent.harness.tool_timeout == 5.0
    file.write_text("[env.taskset]\nid = 'vt_words'\n[env.agent]\nharness.id = 'bash'\nruntime.type = 'subprocess'\n")
    assert make_environment(str(file), "it").config.agent.harness.id == "bash"  # the user allows it
    assert (made.config.agent.harness.id, made.config.agent.runtime.type) == ("null", "subprocess")


BAD = {
    "vt_nowhere": "no package vt_nowhere is installed",
    "textarna": "no package textarna is installed; did you mean textarena",
    "vt_two": "2 agents .solver, checker.",
    "vt_boxed": "need a container",
    "vt_image": "container image ubuntu",
    "vt_fails": "OSError: no network",
    "vt_empty": "no tasks",
    "vt_seen": "has a picture",
    "vt_program": "vt_program. lets the model run commands",
    "vt_broken": "No module named 'no_such_package'",
    "vt_kinds": "task 2 .Sum. has the reward right",
}


def test_only_the_tasks_of_a_run_must_have_the_same_rewards(modules):
    assert len(records("verifiers:vt_kinds:2")) == 2


AGENT = "[env.taskset]\nid = 'vt_words'\n[env.agent]\n"
FILES = {
    "no table": ("a = 1", "no .env.taskset. with an id"),
    "more than the table": (AGENT + "[sampling]\ntemperature = 1\n", "has sampling, and only its table env"),
    "no TOML": ("[", "cannot be read"),
    "a sandbox": (AGENT + "runtime = { type = 'prime' }\n", r"in a sandbox .prime."),
    "another model": (AGENT + "model = 'gpt'\n", "sets model of its agent; the model that is trained plays"),
    "commands": (AGENT + "harness = { id = 'bash' }\n", "lets the model run commands on this machine"),
    "sampling": (AGENT + "sampling = { temperature = 0.5 }\n", "sets sampling of its agent; give --temp"),
    "retries": (AGENT + "retries = { max_retries = 2 }\n", "sets retries"),
    "an unknown setting": (AGENT + "colour = 1\n", r"cannot be loaded .agent.colour: "),
}


@pytest.mark.parametrize("case", [*BAD, *FILES])
def test_an_environment_or_file_that_cannot_be_used_is_one_line(case, modules, tmp_path):
    text, words = FILES.get(case) or ("", BAD[case])
    (tmp_path / "bad.toml").write_text(text)
    refuses(words, records, f"verifiers:{tmp_path / 'bad.toml' if text else case}")


@pytest.mark.parametrize(
    ("package", "data", "call", "words"),
    [
        ("reasoning_gym", "reasoning-gym:legs", lambda: ready_reward("reasoning-gym"), r"reasoning-gym; pip install 'mlx-lora\[rewards\]'"),
        ("verifiers", "verifiers:a", lambda: check_environment(train_settings(ENVIRONMENT).objective),
         r"verifiers 0.4; pip install 'mlx-lora\[verifiers\]'"),
    ],
)  # fmt: skip
def test_without_the_package_it_is_one_line(package, data, call, words, monkeypatch):
    for name in (package, f"{package}.v1"):
        monkeypatch.setitem(sys.modules, name, None)
    refuses(f"needs {words}", find_sets, data)
    refuses(f"needs {words}", call)
