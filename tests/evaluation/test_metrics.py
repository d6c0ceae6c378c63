"""Metrics of answers: those by name, functions of a file, and calls of tools."""

from __future__ import annotations

import pytest

from mlx_lora.evaluation.metrics import AskedRow, ModelAnswer, metric_of, rouge_l
from mlx_lora.rollouts.tools import Said
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
