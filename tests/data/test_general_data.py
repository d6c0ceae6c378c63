"""The general held-out data: what its README promises, and that no probe gives its answer away."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import mlx_lora.data

FOLDER = Path(mlx_lora.data.__file__).parent / "general"
CODE_STARTS = ("from collections", "// ", "CREATE TABLE", "<!DOCTYPE html>")


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def repeated_runs(texts: list[str], length: int = 8) -> set[tuple[str, ...]]:
    """Runs of `length` words that stand in more than one text."""
    seen, repeated = set(), set()
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        own = {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
        repeated |= own & seen
        seen |= own
    return repeated


def test_passages_have_the_promised_number_and_length():
    texts = [row["text"] for row in rows("text.jsonl")]
    code = [text for text in texts if text.startswith(CODE_STARTS)]
    prose = [text for text in texts if text not in code]
    assert (len(prose), len(code)) == (32, 4)
    assert [text for text in prose if not 90 <= len(text.split()) <= 140] == []
    assert [text for text in code if not 15 <= len(text.splitlines()) <= 25] == []


def test_conversations_have_the_promised_turns_and_length():
    chats = [row["messages"] for row in rows("chat.jsonl")]
    roles = [[message["role"] for message in chat] for chat in chats]
    assert roles.count(["user", "assistant"]) == 40
    assert roles.count(["user", "assistant"] * 2) == 8
    assert len(chats) == 48
    answers = [message["content"] for chat in chats for message in chat if message["role"] == "assistant"]
    assert [answer for answer in answers if not 40 <= len(answer.split()) <= 110] == []


@pytest.mark.parametrize("key", ["question", "completion"])
def test_no_probe_gives_its_answer_away(key):
    probes = rows("probes.jsonl")
    assert len({probe[key] for probe in probes}) == len(probes) == 24
    assert all(probe["answers"] for probe in probes)
    given = [(probe[key], answer) for probe in probes for answer in probe["answers"] if has_word(probe[key], answer)]
    assert given == []


def test_nothing_is_there_twice():
    questions = [row["messages"][0]["content"] for row in rows("chat.jsonl")]
    assert len(set(questions)) == len(questions)
    answers = [m["content"] for row in rows("chat.jsonl") for m in row["messages"] if m["role"] == "assistant"]
    assert repeated_runs([*(row["text"] for row in rows("text.jsonl")), *answers]) == set()


def test_the_checks_can_fail():
    assert has_word("The sun is hot", "Sun")
    assert not has_word("Sunday is hot", "Sun")
    assert repeated_runs(["one two three four five six seven eight"] * 2)
