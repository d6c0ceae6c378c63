"""The metrics of answers, comparisons of paired rows, and a judge's verdicts."""

from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from tiers import by_default

from mlx_lora.evaluation import metrics as judging
from mlx_lora.evaluation.metrics import AnswerPair, AskedRow, ModelAnswer, judge_pairs, metric_of, rouge_l
from mlx_lora.evaluation.models import LogLikelihood
from mlx_lora.evaluation.paired import Comparison, compare, compare_weighted, score_interval, standard_error
from mlx_lora.rollouts.tool_calls import Said
from mlx_lora.utils.errors import InputError, RunError


def row(answer=None, **more) -> AskedRow:
    return AskedRow("What?", False, {} if answer is None else {"answer": answer}, **more)


def said(text, calls=()) -> ModelAnswer:
    return ModelAnswer(text, (1, 2), Said(text, list(calls)))


def values(name, pairs):
    rows, answers = zip(*[(row(right), said(text)) for right, text in pairs], strict=True)
    return metric_of(name).of(list(rows), list(answers))


def test_metrics_by_name():
    assert values("exact_match", [("4", " 4\n"), ("4", "5"), (None, "4")]) == {"exact_match": [1.0, 0.0, None]}
    assert values("number_match", [("#### 1,200", "so 1200"), ("3", "none"), ("x", "3")]) == {
        "number_match": [1, 0, None]
    }
    assert values("json", [("", '{"a": 1}'), ("", "{a: 1}"), ("", "")]) == {"json": [1.0, 0.0, 0.0]}
    assert values(r"regex:^\d+$", [("", "12"), ("", "a1")]) == {r"regex:^\d+$": [1.0, 0.0]}


ROUGE = [
    ("The cat sat on the mat.", "the cat lay on a mat"),
    ("police killed the gunman", "the gunman killed police"),
    ("one two three", "one two three"),
    ("one", "two"),
    ("a b c d e f", "f e d c b a"),
    ("", "something"),
]


def test_rouge_l():
    assert rouge_l(*ROUGE[1]) == pytest.approx(0.5)
    assert rouge_l(*ROUGE[2]) == 1
    assert rouge_l(*ROUGE[3]) == rouge_l(*ROUGE[5]) == 0
    assert rouge_l("Größe über alles", "die größe") == pytest.approx(2 / 5)


@pytest.mark.slow
def test_rouge_l_is_the_packages():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for expected, text in ROUGE:
        assert rouge_l(expected, text) == pytest.approx(scorer.score(expected, text)["rougeL"].fmeasure)


def test_functions_of_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def short(prompts, completions, answer, **columns):\n    return [float(len(c) < len(a)) for c, a in zip(completions, answer)]\n"
        "def wrong(completions, **columns):\n    return ['x' for _ in completions]\n"
        "def fails(completions, **columns):\n    raise KeyError('no')\n"
        "def ends(completions, **columns):\n    raise SystemExit(0)\n"
    )
    assert values(f"{file}:short", [("four", "two"), ("a", "long")]) == {"short": [1.0, 0.0]}
    with pytest.raises(RunError, match="a str, not a number"):
        values(f"{file}:wrong", [("a", "b")])
    with pytest.raises(RunError, match="KeyError"):
        values(f"{file}:fails", [("a", "b")])
    with pytest.raises(RunError, match="SystemExit"):
        values(f"{file}:ends", [("a", "b")])
    with pytest.raises(InputError, match="it has short, wrong, fails, ends"):
        metric_of(f"{file}:other")


@pytest.mark.parametrize(
    ("name", "words"), [("exact", "did you mean exact_match"), ("x:y", "rouge_l"), ("gone.py:f", "gone.py")]
)
def test_an_unknown_metric_is_answered(name, words):
    with pytest.raises(InputError, match=words) as caught:
        metric_of(name)
    assert "\n" not in str(caught.value)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
                "days": {"type": "integer"},
            },
            "required": ["city"],
        },
    },
}


def call(name="weather", **arguments):
    return {"name": name, "arguments": arguments}


def expected(*calls):
    return [{"type": "function", "function": {"name": one["name"], "arguments": one["arguments"]}} for one in calls]


def scored(wanted, made, tools=(WEATHER,)):
    found = metric_of("tool_calls").of([row(calls=wanted and expected(*wanted), tools=tools)], [said("", made)])
    return tuple(found[name][0] for name in ("tool_calls", "tool_names", "tool_arguments", "tool_schema"))


ONE, TWO = call(city="Rome"), call(city="Oslo", days=2)


@pytest.mark.parametrize(
    ("wanted", "made", "result"),
    [
        ([ONE], [ONE], (1, 1, 1, 1)),
        ([ONE], [call(city="Rome", unit="C")], (1, 1, 1, 1)),  # the schema's default
        ([ONE], [call(city="Rome", unit="F")], (0, 1, 0, 1)),
        ([ONE], [call(city="Rome", unit="K")], (0, 1, 0, 0)),  # not a listed value
        ([ONE], [call(town="Rome")], (0, 1, 0, 0)),
        ([TWO], [call(city="Oslo", days="2")], (0, 1, 0, 0)),
        ([TWO], [call(city="Oslo", days=2.0)], (1, 1, 1, 1)),
        ([ONE, TWO], [ONE, TWO], (1, 1, 1, 1)),
        ([ONE, TWO], [TWO, ONE], (0, 1, 0, 1)),  # the order counts
        ([ONE, TWO], [ONE], (0, 0, 0.5, 1)),
        ([ONE], [ONE, TWO], (0, 0, 1, 1)),  # one too many
        ([ONE], [call("wether", city="Rome")], (0, 0, 0, 0)),
        ([ONE], [], (0, 0, 0, None)),
        ([], [], (1, 1, None, None)),
        ([], [ONE], (0, 0, None, 1)),
    ],
)
def test_calls_of_tools(wanted, made, result):
    assert scored(wanted, made) == result


def test_a_row_without_tools_has_no_calls_to_compare():
    assert metric_of("tool_calls").of([row("x")], [said("x")])["tool_calls"] == [None]


SIMULATED = 2000


@cache
def called(gained: int, lost: int, rows: int) -> bool:
    low, high = score_interval(gained, lost, rows)
    return low > 0 or high < 0


@pytest.mark.parametrize("rows", [30, 100, 500])
@pytest.mark.parametrize(
    ("accuracy", "alike"), [(0.3, 0.0), (0.5, 0.5), (0.7, 0.5), (0.8, 0.0), (0.8, 0.5), (0.9, 0.0)]
)
def test_equal_models_are_called_different_in_three_to_seven_of_a_hundred(rows, accuracy, alike):
    """`alike` is the share of rows on which two models always answer the same."""
    rng = np.random.default_rng([rows, int(100 * accuracy), int(10 * alike)])
    first = rng.random((SIMULATED, rows)) < accuracy
    second = np.where(rng.random((SIMULATED, rows)) < alike, first, rng.random((SIMULATED, rows)) < accuracy)
    gained, lost = (second & ~first).sum(1).tolist(), (first & ~second).sum(1).tolist()
    share = np.mean([called(a, b, rows) for a, b in zip(gained, lost, strict=True)])
    assert 0.03 <= share <= 0.07


@pytest.mark.parametrize("rows", by_default([30, 100, 500], 30))
@pytest.mark.parametrize("kind", ["normal", "skewed", "thirds"])
def test_equal_models_with_other_numbers(rows, kind):
    rng = np.random.default_rng(rows)
    draw = {
        "normal": lambda: rng.normal(size=rows),
        "skewed": lambda: rng.beta(0.5, 1.5, size=rows),
        "thirds": lambda: rng.choice([0, 1 / 3, 2 / 3, 1], size=rows, p=[0.4, 0.1, 0.1, 0.4]),
    }[kind]
    assert 0.03 <= np.mean([compare(draw(), draw()).certain for _ in range(SIMULATED)]) <= 0.07


def test_a_difference_that_is_there_is_found():
    rng = np.random.default_rng(1)
    first, second = rng.random((300, 400)) < 0.5, rng.random((300, 400)) < 0.65
    found = [compare(a.astype(float), b.astype(float)) for a, b in zip(first, second, strict=True)]
    assert np.mean([one.certain for one in found]) > 0.95
    assert np.mean([one.low <= 0.15 <= one.high for one in found]) > 0.9


def test_the_interval_is_the_published_one():
    """Fagerland, Lydersen and Laake (2014), table 4: Tango's interval for 7 and 1 of 21 pairs."""
    low, high = score_interval(1, 7, 21)
    assert (low, high) == pytest.approx((-0.517, -0.026), abs=6e-4)
    assert score_interval(7, 1, 21) == pytest.approx((-high, -low))


@pytest.mark.parametrize("lost", range(9))
@pytest.mark.parametrize("gained", range(9))
def test_the_interval_leaves_out_zero_where_mcnemars_test_says_so(gained, lost):
    differing = gained + lost
    statistic = abs(gained - lost) / math.sqrt(differing) if differing else 0.0
    assert called(gained, lost, 40) == (statistic > 1.959964)


@pytest.mark.parametrize("rows", [5, 40])
def test_nothing_differs(rows):
    found = compare([1] * rows, [1] * rows)
    z = 1.959964
    assert (found.low, found.high) == pytest.approx((-(z**2) / (rows + z**2), z**2 / (rows + z**2)))
    assert found.verdict == "no difference shown"


def test_the_jackknife_of_a_mean_is_students_t():
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=60).tolist(), rng.normal(0.3, size=60).tolist()
    plain, other = compare(first, second), compare(first, second, aggregate=lambda values: float(np.mean(values)))
    assert (other.low, other.high) == pytest.approx((plain.low, plain.high))
    assert standard_error(first) == pytest.approx(standard_error(first, lambda values: float(np.mean(values))))
    assert standard_error(first) == pytest.approx(np.std(first, ddof=1) / math.sqrt(60))
    many = rng.normal(size=1000).tolist()
    assert standard_error(many, lambda values: float(np.mean(values))) == pytest.approx(standard_error(many), rel=0.3)


def test_sentences():
    better = Comparison(0.031, 0.004, 0.058, 500)
    assert better.words() == "better by 3.1 points, 95% interval 0.4 to 5.8"
    assert Comparison(-0.031, -0.058, -0.004, 500).words() == "worse by 3.1 points, 95% interval 0.4 to 5.8"
    assert Comparison(-0.01, -0.03, 0.01, 500).words().startswith("no difference shown: -1.0 points")
    lower = Comparison(-1.5, -2.25, -0.75, 50, better=False, share=False)
    assert lower.words() == "better by 1.50, 95% interval 0.75 to 2.25"
    few = compare([0, 1], [1, 1])
    assert few.verdict == "no difference shown"
    assert "2 rows" in few.words()
    assert few.to_dict()["low"] is None


def test_a_group_is_the_weighted_sum():
    parts = [(0.25, Comparison(0.2, 0.1, 0.3, 10)), (0.75, Comparison(0.0, -0.1, 0.1, 30))]
    whole = compare_weighted(parts)
    assert whole.difference == pytest.approx(0.05)
    assert whole.rows == 40
    assert (whole.high - whole.low) / 2 == pytest.approx(0.1 * math.hypot(0.25, 0.75))


def test_the_rows_must_be_the_same():
    with pytest.raises(ValueError, match="2 and 1 rows"):
        compare([1, 0], [1])


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
