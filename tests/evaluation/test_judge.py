"""A judge that is asked in both orders: an answer wins if both prefer it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from byte_tokenizer import byte_tokenizer

from mlx_lora.evaluation import judge as judging
from mlx_lora.evaluation.judge import AnswerPair, judge_pairs
from mlx_lora.evaluation.models import LogLikelihood
from mlx_lora.utils.errors import InputError

TOKENIZER = byte_tokenizer()


class StandIn:
    """Prefers the longer answer, or always the first one."""

    def __init__(self, longer=True, template=TOKENIZER.chat_template, context_tokens=2048):
        self.base = SimpleNamespace(hf_tokenizer=TOKENIZER, model_id="stand-in")
        self.templates, self.longer, self.asked = {"base": template}, longer, 0
        self.context_tokens = context_tokens

    def log_likelihoods(self, asked, stopped):
        found, self.asked = [], self.asked + len(asked)
        for one in asked:
            assert len(one.context) <= self.context_tokens
            text = TOKENIZER.decode(list(one.context))
            first = text.partition("[Answer A]")[2].partition("[Answer B]")[0]
            second = text.partition("[Answer B]")[2].partition("Which answer")[0]
            prefers_a = len(first.strip()) > len(second.strip()) if self.longer else True
            is_a = TOKENIZER.decode(list(one.continuation)) == "A"
            found.append(LogLikelihood(-0.1 if is_a == prefers_a else -3.0, True))
        return found


PAIRS = [
    AnswerPair("Q", "short", "much longer"),
    AnswerPair("Q", "very long answer", "no"),
    AnswerPair("Q", "same", "same "),
    AnswerPair("Q", "a", "bb", "bb"),
]


def test_wins_losses_and_ties():
    judge = StandIn()
    found = judge_pairs(judge, PAIRS)
    assert found.verdicts == (1, -1, 0, 1)
    assert (found.wins, found.losses, found.asked, found.agreement) == (2, 1, 3, 1.0)
    assert judge.asked == 3 * 4
    score = found.score("rows", "stand-in", "mine")
    assert score.scores["mine"].value == 0.5
    assert score.compared["mine"].difference == 0.25


def test_a_judge_that_always_prefers_the_first_says_nothing():
    found = judge_pairs(StandIn(longer=False), PAIRS)
    assert found.verdicts == (0, 0, 0, 0)
    assert found.agreement == 0
    assert judge_pairs(StandIn(), PAIRS[2:3]).agreement is None


def test_letters_that_are_equally_likely_are_a_tie(monkeypatch):
    judge, before = StandIn(), StandIn.log_likelihoods

    def undecided(self, asked, stopped):
        found = before(self, asked, stopped)
        return found[:-2] + [LogLikelihood(-0.7, True)] * 2  # the last of the two orders

    assert judge_pairs(judge, PAIRS[1:2]).verdicts == (-1,)
    monkeypatch.setattr(StandIn, "log_likelihoods", undecided)
    found = judge_pairs(judge, PAIRS[1:2])
    assert (found.verdicts, found.agreement) == ((0,), 0)


def test_long_answers_are_cut_and_the_question_stays(monkeypatch):
    read, tokens = [], judging.chat_tokens
    monkeypatch.setattr(judging, "chat_tokens", lambda tokenizer, messages, template: (
        read.append(messages[0]["content"]) or tokens(tokenizer, messages, template)))  # fmt: skip
    pairs = [AnswerPair("What is it?", "a" * 5000, "b" * 200), AnswerPair("Q" * 900, "a", "b"), *PAIRS[2:]]
    found = judge_pairs(StandIn(context_tokens=1024), pairs)
    assert found.verdicts == (-1, None, 0, 1)
    assert (found.rows, found.asked, found.shortened, found.wins, found.losses) == (3, 2, 1, 1, 1)
    assert all("What is it?" in text for text in read if "aaa" in text)
    line = found.notes("stand-in", "mine")[1]
    assert "1 pair could not be judged" in line
    assert len(judge_pairs(StandIn(), PAIRS).notes("stand-in", "mine")) == 1


def test_a_judge_needs_a_chat_template():
    with pytest.raises(InputError, match="no chat template"):
        judge_pairs(StandIn(template=None), PAIRS)
