"""A user's rows: what is asked, what is expected, and calls of tools in the form of each family's template."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from tool_files import FAMILIES, answer_text, call_text, family_tokenizer

from mlx_lora.config.settings import DataSettings
from mlx_lora.evaluation.metrics import metric_of
from mlx_lora.evaluation.models import BASE, Written
from mlx_lora.evaluation.own_rows import answer_rows, score_rows
from mlx_lora.utils.errors import InputError

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


def asked(tmp_path, rows) -> DataSettings:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return DataSettings(data=str(file))


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_are_read_in_the_form_of_the_template(family, tmp_path):
    tokenizer, ends = family_tokenizer(family)
    calls = call_text(family, "weather", {"city": "Rome"})
    models = StandIn(tokenizer, ends, {BASE: answer_text(family, "Hi."), "mine": calls})
    metrics = [metric_of("tool_calls")]
    given = asked(tmp_path, [{**row, "tools": [SCHEMA]} for row in ROWS])
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
        answer_rows(StandIn(tokenizer, ends, {BASE: "x"}), asked(tmp_path, ROWS[1:]), [metric_of("tool_calls")])


def test_models_with_other_templates_are_asked_in_their_own(tmp_path):
    tokenizer, ends = family_tokenizer("qwen3_thinking")
    models = StandIn(tokenizer, ends, {BASE: "Hi.", "mine": "Ho."})
    models.templates["mine"] = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    before = tokenizer.chat_template
    found = answer_rows(models, asked(tmp_path, ROWS[1:]), [metric_of("exact_match")])
    texts = [tokenizer.decode(list(one.tokens)) for one in models.prompts]
    assert texts[1] == "[Hello]"
    assert texts[0] != texts[1]
    assert tokenizer.chat_template == before
    [score] = score_rows("rows", *found, [metric_of("exact_match")]).scores
    assert {name: one.value for name, one in score.scores.items()} == {BASE: 1, "mine": 0}


def test_a_limit_takes_the_first_rows(tmp_path):
    tokenizer, ends = family_tokenizer("qwen3_thinking")
    given = asked(tmp_path, [{"prompt": f"{n}", "completion": f"{n}"} for n in range(5)])
    models = StandIn(tokenizer, ends, {BASE: "1"})
    rows, _ = answer_rows(models, given, [], 3, limit=2)
    assert [row.columns["answer"] for row in rows] == ["0", "1"]
