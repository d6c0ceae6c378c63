"""A user's file with tools, an environment of TRL's form and rewards, and tokenizers of known families to call them with."""

from __future__ import annotations

import json
from typing import Any

from byte_tokenizer import GEMMA, HARMONY, MISTRAL, SPECIAL_TOKENS, byte_tokenizer, template

TOOLS = '''
"""Tools as a user writes them for TRL."""

from __future__ import annotations

import random


def look_up(word: str) -> str:
    """
    Look up a word.

    Args:
        word: The word.

    Returns:
        What it means.
    """
    return {"apple": "red", "pear": "green"}[word]


async def add(a: int, b: int = 1) -> int:
    """
    Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def _helper():
    pass


class Counter:
    """Counts up to a number: as for TRL's environment_factory."""

    made = 0

    def __init__(self):
        Counter.made += 1
        self.value = None

    def reset(self, **kwargs) -> str | None:
        self.value, self.calls = 0, 0
        self.start = kwargs.get("start", 0)
        self.luck = random.randint(0, 10**9)
        return f" Begin at {self.start}." if "start" in kwargs else None

    def step_by(self, count: int) -> str:
        """
        Count on.

        Args:
            count: How far.

        Returns:
            The number that is reached.
        """
        if count < 0:
            raise ValueError("only upwards")
        self.value += count
        self.calls += 1
        return f"at {self.start + self.value}"

    def peek(self) -> list:
        """
        See where it is.
        """
        return [{"type": "text", "text": f"at {self.start + self.value}"}]

    @property
    def far(self):
        return self.value > 5

    def _inner(self):
        pass


class Scored(Counter):
    """Rewards itself."""

    def get_reward(self) -> float:
        return float(self.value)


def reached(environments, **kwargs):
    return [float(env.value) for env in environments]


def said_red(completions, **kwargs):
    return [float("red" in completion[-1]["content"]) for completion in completions]
'''
# By the name of a template in tests/templates: the tokens that end what a model of this family says.
FAMILIES = {
    "qwen3_thinking": ("<|im_end|>",),
    "qwen3_5": ("<|im_end|>",),
    "llama3_2": ("<|eot_id|>",),
    "mistral_tools": ("</s>",),
    "gemma4": ("<turn|>", "<|tool_response>"),
    "harmony": ("<|return|>", "<|call|>"),
}


def family_tokenizer(name: str):
    """Return a byte tokenizer with a family's template, and the ids of its end tokens."""
    ends = FAMILIES[name]
    tokenizer = byte_tokenizer(
        template(name), eos=ends[0], special_tokens=(*SPECIAL_TOKENS, *HARMONY, *GEMMA, *MISTRAL)
    )
    return tokenizer, frozenset(tokenizer.convert_tokens_to_ids(list(ends)))


def call_text(family: str, name: str, arguments: dict[str, Any]) -> str:
    """Return how a model of a family writes a call, with its end token."""
    as_json = json.dumps(arguments)
    if family == "qwen3_5":
        inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
        return f"\n</think>\n\n<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call><|im_end|>"
    if family == "gemma4":
        inner = ",".join(f"{key}:{_gemma(value)}" for key, value in sorted(arguments.items()))
        return f"<|tool_call>call:{name}{{{inner}}}<tool_call|><|tool_response>"
    return {
        "qwen3_thinking": f'<tool_call>\n{{"name": "{name}", "arguments": {as_json}}}\n</tool_call><|im_end|>',
        "llama3_2": f'{{"name": "{name}", "parameters": {as_json}}}<|eot_id|>',
        "mistral_tools": f'[TOOL_CALLS][{{"name": "{name}", "arguments": {as_json}, "id": "call00000"}}]</s>',
        "harmony": f" to=functions.{name}<|channel|>commentary json<|message|>{as_json}<|call|>",
    }[family]


def answer_text(family: str, text: str) -> str:
    """Return how a model of a family writes an answer, with its end token."""
    before = {"qwen3_5": "\n</think>\n\n", "harmony": "<|channel|>final<|message|>"}.get(family, "")
    return before + text + FAMILIES[family][0]


def _gemma(value: Any) -> str:
    return f'<|"|>{value}<|"|>' if isinstance(value, str) else json.dumps(value)
