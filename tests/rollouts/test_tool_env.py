"""Episodes with tools: whose calls are made, what the model reads of them, what is trained, and what rewards see."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import numpy as np
import pytest
from tool_files import FAMILIES, TOOLS, answer_text, call_text, family_tokenizer

from mlx_lora.api.train import named_functions
from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.data.chat_template import chat_tokens
from mlx_lora.data.examples import Completion
from mlx_lora.data.prompts import encode_prompts, parse_prompt
from mlx_lora.data.tokenize import Encoder
from mlx_lora.rollouts.environment import (
    CALLS,
    CUT,
    FAILED,
    TURNS,
    Agent,
    Played,
    ToolEnv,
    asked_tools,
    begin,
    failures_of_calls,
    plain_tools,
    play,
    with_ids,
)
from mlx_lora.rollouts.make_environment import check_environment, episode_rewards, rewards_itself, toolbox_of
from mlx_lora.rollouts.rewards import reward_files, reward_names, rewards_of
from mlx_lora.rollouts.rollout import talk_text
from mlx_lora.rollouts.user_code import module_of
from mlx_lora.utils.errors import InputError, RunError

ASKED = {"model": "m", "data": "d", "objective": "grpo", "group_size": 2, "max_new_tokens": 4000, "reward_timeout": 0.2}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(TOOLS)
    return path


def environment(family: str, file, **asked) -> ToolEnv:
    """Return the environment of tools in a file; `environment` and `tools` are names in it."""
    asked = {
        name: f"{file}:{value}" if name in ("environment", "tools", "reward") else value
        for name, value in asked.items()
    }
    settings = train_settings({**ASKED, **asked})
    toolbox = toolbox_of(settings.objective)
    rewards = rewards_of(settings.objective) if settings.objective.reward else []
    tokenizer, ends = family_tokenizer(family)
    return ToolEnv(episode_rewards(rewards, toolbox.environment), settings, tokenizer, toolbox=toolbox, ends=ends)


def prompts_of(env: ToolEnv, *texts: str, **columns) -> tuple[list[list[int]], list[dict]]:
    """Return prompts as the data of a run has them: tokens, and what rewards see."""
    encoder = Encoder(env.tokenizer, env.tokenizer.chat_template, max_seq_length=10**4)
    records = [{"prompt": [{"role": "user", "content": text}], **columns} for text in texts]
    encoded = encode_prompts(encoder, [parse_prompt(record) for record in records], tools=env.toolbox.schemas)
    return [encoded.rows.row(number)[0].tolist() for number in range(len(texts))], list(encoded.rows.facts)


def played(env: ToolEnv, answers: list[list[str]], seed: int = 4, room: int = 4000, **columns) -> Played:
    """Play an episode for each list of answers, two of each prompt."""
    prompts, facts = prompts_of(env, *(f"p{number}" for number in range(len(answers) // 2)), **columns)

    def sample(turn, episodes, before, left):
        texts = [answers[number][turn] for number in episodes]
        return [
            env.tokenizer.encode(text, add_special_tokens=False)[:most] for text, most in zip(texts, left, strict=True)
        ]

    return play(env, Agent(sample, room, env.ends), prompts, facts, [seed] * len(prompts), 2)


QWEN = "qwen3_thinking"


def call(name: str, family: str = QWEN, **arguments) -> str:
    return call_text(family, name, arguments)


RED = answer_text(QWEN, "It is red.")


def test_a_result_is_put_back_as_the_template_writes_it_and_is_not_trained(file):
    env = environment(QWEN, file, tools="look_up", reward="said_red")
    found = played(env, [[call("look_up", word="apple"), RED], [RED]])
    once = found.episodes[1]
    assert once.sampled.all()
    episode = found.episodes[0]
    observed = env.tokenizer.decode(episode.tokens[slice(*episode.observed[0])])
    assert observed == "\n<|im_start|>user\n<tool_response>\nred\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    own = [token for token, sampled in zip(episode.tokens, episode.sampled, strict=True) if sampled]
    assert env.tokenizer.decode(own) == call("look_up", word="apple") + RED
    assert found.rewards.tolist() == [[1.0], [1.0]]
    assert [one.counts[CALLS] for one in found.episodes] == [1, 0]
    assert [one.counts[TURNS] for one in found.episodes] == [2, 1]


def test_rewards_see_conversations_as_in_trl(file):
    env = environment(QWEN, file, tools="look_up", reward="said_red")
    seen = {}

    def reward(prompts, completions, completion_ids, level, **more):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, level=level, more=sorted(more))
        return [None, 2.0]

    env.rewards = [replace(env.rewards[0], function=reward)]
    thinking = "<think>\nHm.\n</think>\n\n"
    found = played(env, [[thinking + "I look. " + call("look_up", word="apple"), RED], [RED]], level=3)
    call_made = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "apple"}}}
    assert seen["prompts"] == [[{"role": "user", "content": "p0"}]] * 2
    assert seen["completions"][0] == [
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [call_made]},
        {"role": "tool", "name": "look_up", "content": "red"},
        {"role": "assistant", "content": "It is red."},
    ]
    assert seen["completions"][1] == [{"role": "assistant", "content": "It is red."}]
    assert seen["ids"] == [episode.tokens for episode in found.episodes]
    assert (seen["level"], seen["more"]) == ([3, 3], ["trainer_state"])
    assert np.isnan(found.rewards[0, 0])
    assert found.rewards[1, 0] == 2


def test_a_class_written_for_trl_runs_as_it_is(file):
    """Its methods are tools, reset gets the columns, and rewards get the instances, which are begun anew for each batch."""
    env = environment(QWEN, file, environment="Counter", reward="reached")
    assert [one["function"]["name"] for one in env.toolbox.schemas] == ["peek", "step_by"]
    two, done = call("step_by", count=2), answer_text(QWEN, "Done.")
    found = played(env, [[two, two, done], [two, done]], start=7)
    assert found.rewards.tolist() == [[4.0], [2.0]]
    texts = [[one["content"] for one in episode.messages if one["role"] == "tool"] for episode in found.episodes]
    assert texts == [["at 9", "at 11"], ["at 9"]]
    assert "p0 Begin at 7." in env.tokenizer.decode(found.prompts[0])
    again = played(env, [[done], [call("peek"), done]])
    assert again.rewards.tolist() == [[0.0], [0.0]]
    assert "Begin" not in env.tokenizer.decode(again.prompts[0])
    assert again.episodes[1].messages[1]["content"] == [
        {"type": "text", "text": "at 0"}
    ]  # rewards get lists as they are
    assert "\nat 0\n" in env.tokenizer.decode(again.episodes[1].tokens)
    assert env.toolbox.environment.made == 2


def test_a_class_may_reward_itself(file):
    env = environment(QWEN, file, environment="Scored", reward="reached")
    assert [reward.name for reward in env.rewards] == ["reached", "Scored"]
    three = [call("step_by", count=3), answer_text(QWEN, "Done.")]
    assert played(env, [three, three]).rewards.tolist() == [[3.0, 3.0]] * 2
    alone = environment(QWEN, file, environment="Scored")
    assert [reward.name for reward in alone.rewards] == reward_names(alone.settings.objective) == ["Scored"]
    assert not rewards_itself(environment(QWEN, file, environment="Counter", reward="reached").toolbox.environment)


@pytest.mark.parametrize("ends", ["1 / 0", "import sys; sys.exit(0)"])
def test_an_episode_without_a_reward_of_its_own_leaves_the_others_theirs(ends, file):
    reward = (
        "    async def get_reward(self) -> float:\n        if not self.value: {}\n        return float(self.value)\n"
    )
    file.write_text(TOOLS + f"\n\nclass Strict(Counter):\n{reward.format(ends)}")
    done = answer_text(QWEN, "Done.")
    answers = [[call("step_by", count=3), done], [done], [call("step_by", count=2), done], [done]]
    found = played(environment(QWEN, file, environment="Strict", reward_errors="skip"), answers)
    assert np.isnan(found.rewards.ravel()).tolist() == [False, True, False, True]
    assert found.rewards.ravel()[::2].tolist() == [3.0, 2.0]
    [note] = found.notes  # one for both, with the first one's prompt
    assert "p0" in note
    with pytest.raises(RunError):
        played(environment(QWEN, file, environment="Strict"), answers)


def test_functions_and_a_class_may_stand_together_and_be_async(file):
    env = environment(QWEN, file, environment="Counter", tools="add", reward="reached")
    [one, _] = played(env, [[call("add", a=4), call("step_by", count=1), RED], [RED]]).episodes
    assert [turn["content"] for turn in one.messages if turn["role"] == "tool"] == ["5", "at 1"]


WRONG = {
    "an unknown tool": (call("fly"), "Tool fly not found."),
    "a wrong argument": (call("look_up", letter="apple"), "unexpected keyword argument 'letter'"),
    "a missing argument": (call("look_up"), "missing 1 required positional argument"),
    "no object": (call("look_up").replace("{}", '"apple"'), "not an object"),
    "an exception": (call("look_up", word="plum"), "'plum'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_goes_wrong_in_a_call_is_told_to_the_model_and_counted(case, file):
    said, words = WRONG[case]
    env = environment(QWEN, file, tools="look_up", reward="said_red")
    found = played(env, [[said, RED], [RED]])
    assert words in found.episodes[0].messages[1]["content"]
    assert found.episodes[0].messages[1]["content"].startswith("{'error': ")
    assert [one.counts[FAILED] for one in found.episodes] == [1, 0]
    assert found.rewards.tolist() == [[1.0], [1.0]]  # the episode goes on
    [note] = found.notes
    assert "failed once" in note
    assert not played(env, [[said, RED], [RED]]).notes  # told at the 1st, 10th, 100th time


def test_a_tool_has_a_time_limit(file):
    file.write_text(TOOLS + "\n\nimport time\ndef wait() -> str:\n    '''Waits.'''\n    time.sleep(30)\n")
    env = environment(QWEN, file, tools="wait", reward="said_red")
    start = time.perf_counter()
    found = played(env, [[call("wait"), RED], [RED]])
    assert time.perf_counter() - start < 20
    assert "took longer than 0.2 s" in found.episodes[0].messages[1]["content"]
    assert found.episodes[0].counts[FAILED] == 1


def test_a_loop_ends_at_the_most_turns_and_is_counted(file):
    env = environment(QWEN, file, environment="Counter", reward="reached", max_turns=3)
    found = played(env, [[call("step_by", count=1)] * 9, [RED]])
    assert found.rewards.tolist() == [[2.0], [0.0]]  # the last calls are not made
    assert [one.counts[CUT] for one in found.episodes] == [1, 0]
    assert not found.episodes[0].truncated
    assert len(found.episodes[0].observed) == 2


def test_results_without_room_are_left_out_for_rewards_too(file):
    env = environment(QWEN, file, environment="Counter", reward="reached")
    said = call("step_by", count=1)
    size = len(env.tokenizer.encode(said, add_special_tokens=False))
    found = played(env, [[said, RED], [said, RED]], room=size + 20)
    assert all(one.truncated and not one.observed for one in found.episodes)
    assert [turn["role"] for turn in found.episodes[0].messages] == ["assistant"]
    cut = played(env, [[said, RED], [said, RED]], room=size - 1)  # the call itself has no end token: it is not made
    assert cut.rewards.tolist() == [[0.0], [0.0]]


def test_what_is_no_call_is_an_answer(file):
    env = environment(QWEN, file, tools="look_up", reward="said_red")
    broken = '<tool_call>\n{"name": "look_up", "arguments": {"word"\n</tool_call><|im_end|>'
    thought = (
        "<think>\n" + call("look_up", word="apple").removesuffix("<|im_end|>") + "\n</think>\n\nIt is red.<|im_end|>"
    )
    found = played(env, [[broken], [thought]])
    assert [len(one.messages) for one in found.episodes] == [1, 1]
    assert "look_up" in found.episodes[0].messages[0]["content"]
    assert found.episodes[1].messages[0]["content"] == "It is red."


def test_several_calls_in_a_turn(file):
    env = environment(QWEN, file, tools="look_up,add", reward="said_red")
    both = call("look_up", word="pear").removesuffix("<|im_end|>") + "\n" + call("add", a=2, b=3)
    [one, _] = played(env, [[both, RED], [RED]]).episodes
    assert [turn.get("content") for turn in one.messages] == ["", "green", "5", "It is red."]
    assert one.counts[CALLS] == 2
    observed = env.tokenizer.decode(one.tokens[slice(*one.observed[0])])
    assert observed.index("green") < observed.index("\n5\n")


def test_random_numbers_belong_to_the_episode(file):
    """The episodes of a prompt begin alike, a second run repeats them, and the process's own numbers go on."""
    env = environment(QWEN, file, environment="Counter", reward="reached")

    def luck(seed: int) -> list[int]:
        played(env, [[RED], [RED]], seed=seed)
        return [one.luck for one in env.pool]

    random.seed(1)
    first = luck(4)
    after = random.random()
    random.seed(1)
    assert after == random.random()
    assert first[0] == first[1]
    assert luck(4) == first
    assert luck(5) != first


DRAWING = """
import random
import numpy

class Drawing:
    def __init__(self):
        self.salt = random.random(), numpy.random.rand()

    def reset(self, **columns):
        self.luck = random.random(), numpy.random.rand()

    def pull(self) -> str:
        \"\"\"
        Pull the lever.
        \"\"\"
        return "nothing"

    def get_reward(self):
        return random.random()
"""


def test_episodes_repeat_in_a_process_that_has_not_played_the_ones_before(tmp_path):
    """As after --resume, also if instances draw when they are made, and when they reward."""
    (tmp_path / "drawing.py").write_text(DRAWING)

    def episodes(*seeds: int, **asked) -> list:
        env = environment(QWEN, tmp_path / "drawing.py", environment="Drawing", **asked)
        for seed in seeds:
            random.seed(seed * len(seeds))  # the process's own numbers are others, too
            found = played(env, [[RED]] * 4, seed=seed)
        return [(one.salt, one.luck, reward) for one, [reward] in zip(env.pool, found.rewards.tolist(), strict=True)]

    resumed = episodes(5)
    assert episodes(4, 5) == resumed
    salts = [salt for salt, _, _ in resumed]
    assert salts[0] == salts[1] != salts[2] == salts[3]  # those of a prompt begin alike
    assert salts[0] != episodes(5, seed=1)[0][0]


def test_a_column_may_give_the_seed_and_one_that_is_empty_does_not():
    class Begun:
        def reset(self, seed, hint):
            return f"{seed} {hint}"

    assert begin(Begun(), {"hint": None, "seed": None}, 4) == "4 None"
    assert begin(Begun(), {"hint": "h", "seed": 0}, 4) == "0 h"


def test_an_empty_column_leaves_a_default_as_it_is():
    class Begun:
        def reset(self, level=1, hint=None, **others):
            return f"{level} {hint} {others}"

    assert begin(Begun(), {"level": None, "hint": None, "more": None}, 4) == "1 None {'more': None, 'seed': 4}"
    assert begin(Begun(), {"level": 3, "hint": "h"}, 4) == "3 h {'seed': 4}"


@pytest.mark.parametrize("errors", ["stop", "skip"])
def test_a_failing_reset_ends_the_run_or_is_skipped(errors, file):
    file.write_text(TOOLS + "\n\nclass Broken(Counter):\n    def reset(self, **k):\n        return {}['key']\n")
    env = environment(QWEN, file, environment="Broken", reward="reached", reward_errors=errors)
    if errors == "stop":
        with pytest.raises(RunError, match=r"--environment Broken failed \(KeyError: 'key'\)"):
            played(env, [[RED], [RED]])
        return
    found = played(env, [[RED], [RED]])
    assert np.isnan(found.rewards).all()
    assert "skipped" in found.notes[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_calls_and_reads_results(family, file):
    env = environment(family, file, tools="look_up", reward="said_red")
    red = answer_text(family, "It is red.")
    found = played(env, [[call("look_up", family, word="apple"), red], [call("look_up", family, word="x"), red]])
    assert [[turn["role"] for turn in one.messages] for one in found.episodes] == [
        ["assistant", "tool", "assistant"]
    ] * 2
    assert [one.messages[1]["content"] for one in found.episodes] == ["red", "{'error': \"'x'\"}"]
    assert found.rewards.tolist() == [[1.0], [1.0]]


def reference_mask(env: ToolEnv, tokens: list[int], said: list[list[int]]) -> list[bool]:
    """Return which tokens the model sampled, found without the code under test: the turns, one after the other, in the row."""
    mask, at = [False] * len(tokens), 0
    for turn in said:
        at = next(start for start in range(at, len(tokens)) if tokens[start : start + len(turn)] == turn)
        mask[at : at + len(turn)] = [True] * len(turn)
        at += len(turn)
    return mask


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3_5"])
def test_masks_of_forty_episodes_are_those_of_the_rendered_conversations(family, file):
    """Row by row: the tokens are the template's own rendering of the whole conversation, and the trained ones the model's turns."""
    env = environment(family, file, environment="Counter", reward="reached", max_turns=20, reward_timeout=10.0)
    draw = random.Random(7)
    answers = []
    for _ in range(40):
        turns = [call_text(family, "step_by", {"count": draw.randint(-2, 9)}) for _ in range(draw.randint(0, 3))]
        answers.append([*turns, answer_text(family, f"I am at {draw.randint(0, 99)}.")])
    found = played(env, answers, start=3)
    encoder = env.encoder
    for number, (episode, texts) in enumerate(zip(found.episodes, answers, strict=True)):
        said = [env.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        row = [*found.prompts[number // 2], *episode.tokens]
        mask = [*[False] * len(found.prompts[number // 2]), *episode.sampled.tolist()]
        assert mask == reference_mask(env, row, said)
        turns = [*env.talks[number].prompt, *with_ids(episode.messages)]
        whole = chat_tokens(
            env.tokenizer, [*turns, {"role": "user", "content": "-"}], encoder.template, env.toolbox.schemas
        )
        shown = env.tokenizer.decode(whole)
        if family == "mistral_tools":  # shows tools before the last question only
            whole = chat_tokens(env.tokenizer, turns, encoder.template, env.toolbox.schemas)
        if family == "harmony":  # writes the last answer's end otherwise once another question follows
            row[-1] = env.tokenizer.convert_tokens_to_ids("<|end|>")
        assert whole[: len(row)] == row, (shown, env.tokenizer.decode(row))
        assert not all(mask)
    assert sum(len(one.observed) for one in found.episodes) > 20


def test_sampled_thinking_is_kept_where_the_template_strips_it(file):
    env = environment("qwen3_5", file, tools="look_up", reward="said_red")
    said = "I think.\n" + call("look_up", "qwen3_5", word="apple")
    [one, _] = played(env, [[said, answer_text("qwen3_5", "It is red.")]] * 2).episodes
    own = [token for token, sampled in zip(one.tokens, one.sampled, strict=True) if sampled]
    assert env.tokenizer.decode(own).startswith("I think.\n\n</think>")
    assert one.messages[0]["reasoning_content"] == "I think."


def test_prompts_show_the_tools(file):
    env = environment(QWEN, file, tools="look_up", reward="said_red")
    [tokens], [fact] = prompts_of(env, "What?")
    text = env.tokenizer.decode(tokens)
    assert '"description": "Look up a word."' in text
    assert fact["example"].tools == env.toolbox.schemas
    encoder = Encoder(env.tokenizer, env.tokenizer.chat_template, max_seq_length=10**4)
    plain = encode_prompts(encoder, [parse_prompt({"prompt": "What?"})], tools=env.toolbox.schemas)
    assert plain.rows.row(0)[0].tolist() == tokens  # a text is the user's turn
    bare = encoder.prompt_tokens(Completion("What?", "."))
    assert "look_up" not in env.tokenizer.decode(bare)
    without = Encoder(env.tokenizer, None, max_seq_length=10**4, plain_completions=True)
    with pytest.raises(InputError, match="no chat template"):
        encode_prompts(without, [parse_prompt({"prompt": "What?"})], tools=env.toolbox.schemas)


def test_schemas_are_those_of_transformers(file):
    from transformers.utils import get_json_schema

    tools = vars(module_of(str(file), "it"))
    wanted = [get_json_schema(tools["look_up"]), get_json_schema(tools["Counter"]().step_by)]
    found = environment(QWEN, file, environment="Counter", tools="look_up", reward="reached").toolbox.schemas
    assert [found[0], found[2]] == wanted
    assert [one["function"]["name"] for one in found] == ["look_up", "peek", "step_by"]


def test_names_of_tools(file, tmp_path):
    def names(text: str) -> list[str]:
        return [tool.__name__ for tool in plain_tools(ObjectiveSettings("grpo", tools=text))]

    assert names(str(file)) == ["look_up", "add", "reached", "said_red"]
    assert names(f"{file}:add, look_up") == ["add", "look_up"]
    assert asked_tools(ObjectiveSettings("grpo", tools="a.py:f,g,b.py,python:h")) == [
        "a.py:f",
        "a.py:g",
        "b.py",
        "python:h",
    ]


BAD = {
    "no schema": ({"tools": "said_red"}, "no tool .*give it type hints"),
    "one name twice": ({"tools": "add,add"}, "2 tools are called add"),
    "no reward": ({"tools": "add"}, "nothing rewards the episodes"),
    "no reward of its own": ({"environment": "Counter"}, "nothing rewards the episodes"),
    "no tool": ({"environment": "Empty", "reward": "reached"}, "it has no step"),
    "no reset": ({"environment": "Resetless", "reward": "reached"}, "it has no reset"),
    "a step beside tools": ({"environment": "Stepped", "tools": "add"}, "no tool would be called"),
    "rewards beside a step": ({"environment": "Stepped", "reward": "reached"}, "leave one of the two out"),
}
MORE = """

class Empty:
    def reset(self, **k): ...


class Resetless:
    def look(self): ...


class Stepped(Empty):
    def step(self, completion): ...
"""


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_one_line(case, file):
    file.write_text(TOOLS + MORE)
    asked, words = BAD[case]
    settings = ObjectiveSettings("grpo", **{name: f"{file}:{value}" for name, value in asked.items()})
    with pytest.raises(InputError, match=words) as refused:
        check_environment(settings)
    assert "\n" not in str(refused.value)


def test_ranks_must_have_the_same_tools(file):
    asked = ObjectiveSettings("grpo", tools=f"{file}:add,look_up")
    before = reward_files(asked)
    assert list(before) == ["code of --tools"]
    file.write_text(TOOLS + "\n# changed\n")
    assert reward_files(asked) != before


def test_python_gives_functions_and_classes(file):
    tools = vars(module_of(str(file), "it"))
    given = {"tools": [tools["add"], f"{file}:look_up"], "environment": tools["Counter"], "reward": tools["reached"]}
    settings, functions = named_functions(given)
    assert settings == {
        "tools": f"python:add,{file}:look_up", "environment": "python:Counter", "reward": "python:reached"
    }  # fmt: skip
    asked = ObjectiveSettings("grpo", **settings)
    check_environment(asked, functions)
    box = toolbox_of(asked, functions)
    assert [one["function"]["name"] for one in box.schemas] == ["add", "look_up", "peek", "step_by"]
    for name in ("tools", "environment"):
        with pytest.raises(InputError, match="given in Python; continue with"):
            toolbox_of(ObjectiveSettings("grpo", **{name: settings[name]}))


def test_failed_calls_are_a_share_of_calls():
    assert failures_of_calls({CALLS: 2.0, FAILED: 0.5}) == {CALLS: 2.0, FAILED: 0.25}
    assert failures_of_calls({CALLS: 0.0, FAILED: 0.0})[FAILED] == 0
    assert failures_of_calls({"reward": 1.0}) == {"reward": 1.0}


def test_an_episode_as_a_person_reads_it(file):
    env = environment(QWEN, file, tools="look_up", reward="said_red")
    [one, _] = played(env, [["I look. " + call("look_up", word="apple"), RED], [RED]]).episodes
    assert talk_text(one.messages) == 'I look.\n→ look_up {"word": "apple"}\n← red\nIt is red.'
