"""Tasks that are evaluated: named ones, the user's own rows, and through lm-evaluation-harness."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from browser import look
from make_adapters import make_adapter
from run_cli import one_line, run, succeeds
from tool_files import FAMILIES, answer_text, call_text, family_tokenizer

import mlx_lora
from mlx_lora.config.settings import DataSettings
from mlx_lora.evaluation.metrics import answer_rows, metric_of, score_rows
from mlx_lora.evaluation.models import BASE, Written
from mlx_lora.reports.sweep_page import write_task_page
from mlx_lora.utils.errors import InputError

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def adapters(untied_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [make_adapter(untied_folder, root / name, rank=4, seed=seed) for name, seed in (("one", 1), ("two", 2))]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "questions.jsonl"
    lines = [{"prompt": f"{EVIL} {n}?", "completion": str(n)} for n in range(6)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def asked(untied_folder, adapters, rows, tmp_path_factory):
    """One run of the command, with a function that likes long answers, a judge and a page."""
    root = tmp_path_factory.mktemp("asked")
    (root / "own.py").write_text("def letters(completions, **columns):\n    return [len(c) for c in completions]\n")
    page = root / "scores.html"
    ran = succeeds(
        "evaluate", "--model", untied_folder, "--data", rows, "--metric", "rouge_l", f"{root}/own.py:letters", "--adapter",
        f"one={adapters[0]}", f"two={adapters[1]}", "--max-tokens", 12, "--judge", untied_folder, "--report", page, "--json",
        exactly=True,
    )  # fmt: skip
    return json.loads(ran.out), page


def test_every_adapter_is_compared_with_the_base(asked):
    facts, _ = asked
    by_metric = {one["metric"]: one for one in facts["tasks"] if not one["metric"].startswith("judge")}
    assert set(by_metric) == {"rouge_l", "letters"}
    assert list(by_metric["letters"]["models"]) == ["base", "one", "two"]
    for one in by_metric.values():
        assert set(one["compared"]) == {"one", "two"}
        assert one["rows"] == 6
        for name, compared in one["compared"].items():
            difference = one["models"][name]["score"] - one["models"]["base"]["score"]
            assert compared["difference"] == pytest.approx(difference)
            assert compared["low"] <= difference <= compared["high"]
    assert [one["metric"] for one in facts["tasks"]][-2:] == [f"judge {facts['model'].rpartition('/')[2]}"] * 2
    assert any("against base" in note for note in facts["notes"])
    said = facts["answers"]["questions.jsonl"]
    assert len(said) == 6
    assert said[0]["changed"] >= said[-1]["changed"]
    assert len({said[0]["answers"][name] for name in ("base", "one", "two")}) > 1


@pytest.mark.long
def test_the_page(asked):
    _, page = asked
    text = page.read_text()
    assert EVIL not in text
    assert "questions.jsonl" in text
    for width in (1200, 390):
        seen = look(page, width)
        assert not seen.console
        assert seen.found["needed"] <= seen.found["width"]


def test_the_page_without_adapters(tmp_path):
    facts = {
        "model": "m", "notes": [], "answers": {},
        "tasks": [{"task": "t", "metric": "acc", "higher_is_better": True, "rows": 3, "compared": {},
                   "models": {"base": {"score": 0.5, "standard_error": None}}}],
    }  # fmt: skip
    write_task_page(tmp_path / "page.html", facts, "command", "device")
    assert "0.5" in (tmp_path / "page.html").read_text()


def test_in_python(untied_folder, adapters, rows):
    found = mlx_lora.evaluate_tasks(
        untied_folder, data=rows, metrics="json", adapters={"mine": adapters[0]}, limit=2, max_tokens=4
    )
    [one] = found["tasks"]
    assert (one["metric"], one["rows"], list(one["models"])) == ("json", 2, ["base", "mine"])


def test_plain_lines(untied_folder, adapters, rows):
    ran = run("evaluate", "--model", untied_folder, "--data", rows, "--metric", "exact_match,", "--max-tokens", 2)
    one_line(ran, "exact_match")
    given = ("--data", rows, "--metric", "json", "--adapter", f"base={adapters[0]}")  # a name that means the base
    one_line(run("evaluate", "--model", untied_folder, *given), "base")
    ran = succeeds("evaluate", "--model", untied_folder, "--data", rows, "--metric", "exact_match", "--max-tokens", 2)
    assert "questions.jsonl: exact_match of 6 rows" in ran.out
    assert "base" in ran.out


def test_help_and_other_uses_stay(untied_folder):
    assert "--num-fewshot" in run("evaluate", "--tasks", "list", "--help").out
    assert "--forgetting" in run("evaluate", "--help").out


SCHEMA = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
ROWS = [
    {"messages": [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]},
]


class StandIn:
    """A model that says the same to every row, one text for each model."""

    def __init__(self, tokenizer, ends, texts: dict[str, str]):
        self.base = SimpleNamespace(
            hf_tokenizer=tokenizer, tokenizer=SimpleNamespace(eos_token_ids=ends), token_rows=None, model_id="stand-in"
        )
        self.said, self.ends, self.names = texts, ends, list(texts)
        self.templates = dict.fromkeys(texts, tokenizer.chat_template)
        self.prompts = []

    def texts(self, prompts, stopped):
        self.prompts = prompts
        encode = self.base.hf_tokenizer.encode
        found = []
        for prompt in prompts:
            tokens = encode(self.said[prompt.model], add_special_tokens=False)
            found.append(Written("", tuple(tokens[:-1] if tokens[-1] in self.ends else tokens)))
        return found


def asked_of_own_rows(tmp_path, rows) -> DataSettings:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return DataSettings(data=str(file))


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_are_read_in_the_form_of_the_template(family, tmp_path):
    tokenizer, ends = family_tokenizer(family)
    calls = call_text(family, "weather", {"city": "Rome"})
    models = StandIn(tokenizer, ends, {BASE: answer_text(family, "Hi."), "mine": calls})
    metrics = [metric_of("tool_calls")]
    given = asked_of_own_rows(tmp_path, [{**row, "tools": [SCHEMA]} for row in ROWS])
    rows, answers = answer_rows(models, given, metrics, 7)
    assert [one.max_tokens for one in models.prompts] == [7] * 4
    assert [row.calls and row.calls[0]["function"] for row in rows] == [CALL["function"], []]
    measured = score_rows("rows", rows, answers, metrics)
    scores = {one.metric: {name: score.value for name, score in one.scores.items()} for one in measured.scores}
    assert scores["tool_calls"] == {BASE: 0.5, "mine": 0.5}
    assert scores["tool_arguments"] == {BASE: 0, "mine": 1}
    row, other = measured.answers["rows"]
    assert row.values["tool_calls"] == {BASE: 0, "mine": 1}
    assert other.values["tool_calls"] == {BASE: 1, "mine": 0}
    assert "→ weather" in row.answers["mine"]
    assert row.answers[BASE].endswith("Hi.")
    assert row.changed


def test_a_template_without_tools_cannot_be_scored(tmp_path):
    tokenizer, ends = family_tokenizer("qwen3_thinking")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match="--metric tool_calls"):
        answer_rows(
            StandIn(tokenizer, ends, {BASE: "x"}), asked_of_own_rows(tmp_path, ROWS[1:]), [metric_of("tool_calls")]
        )


def test_models_with_other_templates_are_asked_in_their_own(tmp_path):
    tokenizer, ends = family_tokenizer("qwen3_thinking")
    models = StandIn(tokenizer, ends, {BASE: "Hi.", "mine": "Ho."})
    models.templates["mine"] = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    before = tokenizer.chat_template
    found = answer_rows(models, asked_of_own_rows(tmp_path, ROWS[1:]), [metric_of("exact_match")])
    texts = [tokenizer.decode(list(one.tokens)) for one in models.prompts]
    assert texts[1] == "[Hello]"
    assert texts[0] != texts[1]
    assert tokenizer.chat_template == before
    [score] = score_rows("rows", *found, [metric_of("exact_match")]).scores
    assert {name: one.value for name, one in score.scores.items()} == {BASE: 1, "mine": 0}


def test_a_limit_takes_the_first_rows(tmp_path):
    tokenizer, ends = family_tokenizer("qwen3_thinking")
    given = asked_of_own_rows(tmp_path, [{"prompt": f"{n}", "completion": f"{n}"} for n in range(5)])
    models = StandIn(tokenizer, ends, {BASE: "1"})
    rows, _ = answer_rows(models, given, [], 3, limit=2)
    assert [row.columns["answer"] for row in rows] == ["0", "1"]
