"""Answers with a form: calls of tools, JSON in a schema, grammars; and several choices, penalties and biases."""

from __future__ import annotations

import json
from importlib import resources

import mlx.core as mx
import numpy as np
import openai
import pytest
from conftest import tiny_model, write_folder
from serving_rows import started
from starlette.testclient import TestClient

from mlx_lora.engine.engine import Event, Usage
from mlx_lora.evaluation.metrics import _allowed
from mlx_lora.models.generator import Piece, Sampler, Sampling, sample_rows
from mlx_lora.rollouts.tool_calls import NO_CALLS, CallReader, ToolTurns, call_form
from mlx_lora.serving.app import AnswerLimits, ChatReply, make_app
from mlx_lora.utils.guard import GuardLimits

pytest.importorskip("llguidance")
pytestmark = pytest.mark.float32("texts are compared: bfloat16 takes either of two tokens nearly as likely")
CHATML = (resources.files("mlx_lora.data") / "templates" / "chatml.jinja").read_text(encoding="utf-8")
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "unit": {"enum": ["m", "km"]}},
    "required": ["a", "unit"],
    "additionalProperties": False,
}
LOOK = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": ADD}},
    {"type": "function", "function": {"name": "look", "parameters": LOOK}},
]
SCHEMAS = {"add": ADD, "look": LOOK}
TURN = [{"role": "user", "content": "What?"}]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model = tiny_model(tie_word_embeddings=False)
    folder = write_folder(tmp_path_factory.mktemp("forms") / "tiny", model, {"tie_word_embeddings": False})
    engine = started(folder)
    engine.base.hf_tokenizer.chat_template = CHATML
    return engine


@pytest.fixture(scope="module")
def client(engine):
    app = make_app(engine, GuardLimits(None, False), AnswerLimits(400, 4096, 60.0), 0)
    with TestClient(app, base_url="http://127.0.0.1") as http:
        yield openai.OpenAI(base_url="http://127.0.0.1/v1", api_key="x", http_client=http, max_retries=0)


def ask(client, **options):
    messages = options.pop("messages", TURN)
    return client.chat.completions.create(
        **{"model": "tiny", "messages": messages, "max_tokens": 300, "temperature": 1.0, "seed": 1, **options}
    )


def put_together(chunks) -> list[dict]:
    """The choices of a stream, as a client adds up their changes."""
    found: dict[int, dict] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            own = found.setdefault(choice.index, {"content": "", "calls": {}, "finish": None})
            assert own["finish"] is None
            own["finish"] = choice.finish_reason
            own["content"] += choice.delta.content or ""
            for part in choice.delta.tool_calls or []:
                call = own["calls"].setdefault(part.index, {"id": part.id, "name": part.function.name, "arguments": ""})
                call["arguments"] += part.function.arguments
    return [found[index] for index in sorted(found)]


def calls_of(message) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or []]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_tool_that_must_be_called_is_called_and_its_arguments_fit(client, choice):
    for seed in range(4):
        options = {"tools": TOOLS, "tool_choice": choice, "seed": seed}
        whole = ask(client, **options).choices[0]
        calls = calls_of(whole.message)
        assert calls
        assert whole.finish_reason in ("tool_calls", "length")
        for name, text in calls:
            assert _allowed(SCHEMAS[name], json.loads(text))
            assert choice == "required" or name == "look"
        ids = {call.id for call in whole.message.tool_calls}
        assert len(ids) == len(calls)
        [streamed] = put_together(ask(client, stream=True, **options))
        assert [(call["name"], call["arguments"]) for call in streamed["calls"].values()] == calls
        assert (streamed["content"], streamed["finish"]) == (whole.message.content or "", whole.finish_reason)
    one = ask(client, parallel_tool_calls=False, tools=TOOLS, tool_choice=choice).choices[0]
    assert (len(one.message.tool_calls), one.finish_reason) == (1, "tool_calls")


def test_a_loop_of_calls_and_results(client):
    messages = list(TURN)
    for number in range(3):
        options = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": number}
        message = ask(client, messages=messages, **options).choices[0].message
        [call] = message.tool_calls
        messages += [message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "7"}]
    last = ask(client, messages=messages, tools=TOOLS, max_tokens=5)
    assert last.usage.prompt_tokens > 3 * len("<tool_call>")


def test_strict_tools_bind_the_arguments_of_calls_that_the_model_makes_by_itself(client, engine, monkeypatch):
    submit, grammars = engine.submit, []

    def submitted(request, emit):
        grammars.append(request.sampling.grammar)
        return submit(request, emit)

    monkeypatch.setattr(engine, "submit", submitted)
    strict = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
    for tools in (TOOLS, strict):
        assert ask(client, tools=tools, max_tokens=5).choices[0].message.content
    assert grammars[0] is None
    matcher = engine.grammars.matcher(grammars[1])
    tokenizer = engine.base.hf_tokenizer
    for name, given, taken in (("add", '{"a": 3', True), ("add", '{"x', False), ("look", '{"x": 1}', True)):
        text = f'Well: <tool_call>\n{{"name": "{name}", "arguments": {given}'
        tokens = tokenizer.encode(text, add_special_tokens=False)
        matcher.reset()
        assert (matcher.try_consume_tokens(tokens) == len(tokens)) == taken


def test_answers_fit_a_schema_or_say_that_they_are_cut(client):
    form = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": ADD}}
    for choice in ask(client, response_format=form, n=8).choices:
        assert choice.finish_reason == "stop"
        assert _allowed(ADD, json.loads(choice.message.content))
    [cut] = ask(client, response_format=form, max_tokens=4).choices
    assert cut.finish_reason == "length"
    [stopped] = ask(client, response_format=form, stop=['"']).choices
    assert stopped.finish_reason == "length"  # no invalid JSON is called done
    words = ask(client, extra_body={"regex": "(yes|no)!{3}"}, n=4).choices
    assert {choice.message.content for choice in words} <= {"yes!!!", "no!!!"}
    [old] = client.completions.create(
        model="tiny", prompt="x", max_tokens=20, extra_body={"grammar": 'root ::= "a" "b"{2}'}
    ).choices
    assert (old.text, old.finish_reason) == ("abb", "stop")
    free = ask(client, max_tokens=20).choices[0]
    assert free.message.content.strip() not in ("yes!!!", "no!!!")
    called = ask(client, response_format=form, tools=TOOLS).choices[0]  # a call, or an answer in the schema
    assert called.message.tool_calls or _allowed(ADD, json.loads(called.message.content))


def test_rows_with_and_without_a_grammar_do_not_change_each_other(client, engine):
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": ADD}}
    plain, formed = (
        [ask(client, seed=seed, max_tokens=60, **options).choices[0].message.content for seed in range(3)]
        for options in ({}, {"response_format": form})
    )
    from concurrent.futures import ThreadPoolExecutor

    def one(number: int) -> str:
        options = {"response_format": form} if number % 2 else {}
        return ask(client, seed=number // 2, max_tokens=60, **options).choices[0].message.content

    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(one, range(6)))
    assert together[::2] == plain
    assert together[1::2] == formed


@pytest.mark.parametrize("stream", [False, True])
def test_each_choice_has_a_seed_of_its_own(client, stream):
    alone = [ask(client, seed=seed, max_tokens=12).choices[0].message.content for seed in (5, 6, 7)]
    answer = ask(client, seed=5, n=3, max_tokens=12, stream=stream)
    if stream:
        texts = [choice["content"] for choice in put_together(answer)]
    else:
        texts = [choice.message.content for choice in answer.choices]
        assert answer.usage.completion_tokens <= 36
    assert texts == alone
    assert len(set(texts)) > 1


def test_what_cannot_be_enforced_is_refused_with_its_place(client):
    def form(schema):
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}

    inner = {"type": "object", "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "strin"}]}}}
    wrong_tool = [{"type": "function", "function": {"name": "f", "parameters": inner}}]
    for options, words in (
        (form(inner), r"json_schema\.schema\.properties\.a\.anyOf\[1\]"),
        (form(5), r"json_schema\.schema"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "xml"}}, "xml"),
        (
            {"tools": wrong_tool, "tool_choice": "required"},
            r"tools\[0\]\.function\.parameters\.properties\.a\.anyOf\[1\]",
        ),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "add, look"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"extra_body": {"regex": "("}}, "regex"),
        ({"extra_body": {"regex": "a", "grammar": "b"}}, "only one"),
        ({"extra_body": {"regex": "a", "ignore_eos": True}}, "ignore_eos"),
        ({"logit_bias": {"99999": 1}}, "from 0 to"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            ask(client, **options)
    assert ask(client, max_tokens=2).choices  # it still serves


def test_a_bias_and_penalties_change_what_is_drawn(client):
    """Against the same arithmetic in numpy, on rows of which one has none of them."""
    logits = mx.random.normal((3, 40), key=mx.random.key(3)) * 2
    best = int(mx.argmax(logits[1]))
    biased = Sampler(Sampling(temperature=0, logit_bias=((best, -100.0),)), 40)
    told = Sampler(Sampling(temperature=0, frequency_penalty=0.5, presence_penalty=0.25), 40)
    history = np.random.default_rng(0).integers(0, 40, 60).tolist()
    for token in history:
        told.take(token)
    counts = np.bincount(history, minlength=40)
    tokens, _ = sample_rows(logits, [Sampler(Sampling(temperature=0), 40), biased, told])
    rows = np.array(logits)
    rows[1, best] -= 100
    rows[2] -= 0.5 * counts + 0.25 * (counts > 0)
    assert tokens.tolist() == rows.argmax(axis=1).tolist() != np.array(logits).argmax(axis=1).tolist()
    assert ask(client, logit_bias={"65": 100}, max_tokens=6, temperature=0).choices[0].message.content.count("a") < 6
    always = ask(client, logit_bias={"65": 100}, max_tokens=6, temperature=0, logprobs=True).choices[0]
    assert len({token.token for token in always.logprobs.content}) == 1


def told_by(reader: CallReader, text: str, parts: int) -> tuple[dict, list[dict]]:
    """A reply in one piece, and the choice of the same text streamed in parts."""
    end = Event(Piece(""), "stop", Usage(1, 0, 1))
    whole = ChatReply("m", reader).whole([(text, [], end)], end.usage)["choices"][0]
    size, streamed = max(1, len(text) // parts), ChatReply("m", reader)
    events = [Event(Piece(text[at : at + size])) for at in range(0, len(text), size)]
    chunks = [chunk for event in [*events, end] for chunk in streamed.chunks(0, event)]
    return whole, [chunk["choices"][0] for chunk in chunks]


def test_thinking_and_calls_that_cannot_be_read(engine):
    turns = ToolTurns(engine.base.hf_tokenizer, CHATML, frozenset(engine.base.tokenizer.eos_token_ids))
    whole, streamed = told_by(CallReader(turns, NO_CALLS, True), "I think.</think>\n\nIt is red.", 30)
    assert (whole["message"]["reasoning_content"], whole["message"]["content"]) == ("I think.", "It is red.")
    assert "".join(one["delta"].get("reasoning_content", "") for one in streamed) == "I think."
    assert "".join(one["delta"].get("content", "") for one in streamed) == "It is red."
    broken = 'Look: <tool_call>\n{"name": "look", "arguments": {"on"\n</tool_call>'
    reader = CallReader(turns, call_form(turns), False)
    whole, streamed = told_by(reader, broken, 60)
    assert "tool_calls" not in whole["message"]
    assert whole["finish_reason"] == streamed[-1]["finish_reason"] == "stop"
    assert whole["message"]["content"] == broken == "".join(one["delta"].get("content", "") for one in streamed)
    reply = ChatReply("m", reader)
    reply.whole([(broken, [], Event(Piece(""), "stop"))], Usage(1, 0, 1))
    assert sum(reply._counts.values()) == 1
