"""Grammars of answers: schemas, texts, thinking, and calls of tools as chat templates write them."""

from __future__ import annotations

import json
import random

import mlx.core as mx
import numpy as np
import pytest
from byte_tokenizer import GEMMA, HARMONY, MISTRAL, SPECIAL_TOKENS, byte_tokenizer
from tokenizers import AddedToken
from tool_files import FAMILIES, call_text, template

from mlx_lora.evaluation.metrics import _allowed
from mlx_lora.models.grammar import Grammars, fill_masks, masked
from mlx_lora.rollouts.tool_calls import CallReader, ToolTurns, call_rules
from mlx_lora.utils.errors import InputError

pytest.importorskip("llguidance")
ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3}},
    "required": ["name", "sizes"],
    "additionalProperties": False,
}  # fmt: skip
COUNT = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["count"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "store", "parameters": ITEM, "strict": True}},
    {"type": "function", "function": {"name": "step_by", "parameters": COUNT, "strict": True}},
]
SCHEMAS = {"store": ITEM, "step_by": COUNT}


def grammars_of(tokenizer) -> Grammars:
    return Grammars(tokenizer, len(tokenizer) + 5, [tokenizer.eos_token_id])


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return grammars_of(tokenizer)


def takes(grammars: Grammars, tokenizer, grammar: str, text: str) -> str:
    """Whether a grammar takes a text: `whole`, `begun`, or `no`."""
    matcher, tokens = grammars.matcher(grammar), tokenizer.encode(text, add_special_tokens=False)
    if matcher.try_consume_tokens(tokens) < len(tokens):
        return "no"
    return "whole" if matcher.is_accepting() else "begun"


def drawn(grammars: Grammars, tokenizer, grammar: str, draw: random.Random, most: int = 3000) -> str | None:
    """A text that is drawn at random from the tokens that masks allow; None if it is not done after many tokens."""
    matcher, tokens = grammars.matcher(grammar), []
    while len(tokens) < most:
        bits = np.unpackbits(fill_masks([matcher], (len(tokenizer) + 36) // 32).view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits[: len(tokenizer)]).tolist()
        assert allowed
        going_on = [token for token in allowed if token not in grammars._tokenizer.eos_tokens]
        if len(going_on) < len(allowed) and (not going_on or draw.random() < 0.3):
            return tokenizer.decode(tokens)
        tokens.append(draw.choice(going_on))
        assert matcher.consume_token(tokens[-1])
    return None


def family_grammars(family: str):
    """A tokenizer with a family's template and special tokens, its grammars, and its end tokens."""
    own = {"gemma4": GEMMA, "harmony": HARMONY, "mistral_tools": MISTRAL}.get(family, ())
    tokenizer = byte_tokenizer(template(family), eos=FAMILIES[family][0], special_tokens=(*SPECIAL_TOKENS, *own))
    ends = frozenset(tokenizer.convert_tokens_to_ids(list(FAMILIES[family])))
    return tokenizer, Grammars(tokenizer, len(tokenizer) + 5, sorted(ends)), ends


def without_end(written: str, family: str) -> str:
    """A call without the token that ends the turn."""
    return written.removesuffix(next(end for end in FAMILIES[family] if written.endswith(end)))


def test_json_is_written_as_json_dumps_writes_it(grammars, tokenizer):
    grammar = grammars.of_schema(ITEM, "schema")
    value = {"name": "a b", "sizes": [1, 22]}
    for indent in (None, 2, 4, "\t"):
        assert takes(grammars, tokenizer, grammar, json.dumps(value, indent=indent)) == "whole"
    assert takes(grammars, tokenizer, grammar, json.dumps(value, separators=(",", ":"))) == "whole"
    for text in ("{\n\n\n", '{"name":  "a"', '{"sizes"', '{"name": "a", "sizes": [100', "x", '{"name": "123456789'):
        assert takes(grammars, tokenizer, grammar, text) == "no"
    for seed in range(20):
        assert _allowed(ITEM, json.loads(drawn(grammars, tokenizer, grammar, random.Random(seed))))


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "strin"}, "s: "),
        ({"properties": {"a": {"items": {"type": "strin"}}}}, "s.properties.a.items: "),
        ({"$defs": {"x": {"uniqueItems": True}}, "$ref": "#/$defs/x"}, "s.$defs.x: "),
        ({"$defs": {"x": {}}, "properties": {"a": {"$ref": "#/$defs/y"}}}, "s.properties.a: "),
        ({"anyOf": [{"type": "string"}, {"type": "string", "pattern": "("}]}, "s.anyOf[1]: "),
        ({"properties": {"a": 5}}, "s.properties.a: "),
        ([], "s: "),
        ("x", "s: "),
    ],
)
def test_an_invalid_schema_names_its_innermost_place(grammars, schema, place):
    with pytest.raises(InputError) as error:
        grammars.of_schema(schema, "s")
    assert str(error.value).startswith(place)


def test_a_schema_that_is_nested_deep_is_refused_or_taken(grammars):
    schema: dict = {"type": "strin"}
    for _ in range(200):
        schema = {"properties": {"a": schema}}
    with pytest.raises(InputError, match=r"properties\.a\.properties"):
        grammars.of_schema(schema, "s")


def test_texts_of_regular_expressions_and_grammars(grammars, tokenizer):
    for form, text, good, bad in (
        ("regex", r"[a-z]+/\d{2}", "ab/12", "ab/x"),
        ("grammar", 'start: "a" b+\nb: "b" | "c"', "abcb", "ad"),
        ("grammar", 'root ::= "a" ("b" | "c")+', "abcb", "ad"),
    ):
        grammar = grammars.of_text(form, text, "field")
        assert takes(grammars, tokenizer, grammar, good) == "whole"
        assert takes(grammars, tokenizer, grammar, bad) == "no"
        assert takes(grammars, tokenizer, grammar, good[:2]) == "begun" or form == "grammar"
        assert takes(grammars, tokenizer, grammars.whole(grammar, opened=True), f"Hm.</think>{good}") == "whole"
    for form, text in (("regex", "("), ("grammar", "start: x"), ("grammar", "root ::= x")):
        with pytest.raises(InputError, match=r"^field: "):
            grammars.of_text(form, text, "field")


def test_masks_leave_out_what_numpy_leaves_out():
    logits = mx.random.normal((3, 75), key=mx.random.key(0))
    masks = np.random.default_rng(0).integers(-(2**31), 2**31, (3, 3), dtype=np.int64).astype(np.int32)
    allowed = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :75].astype(bool)
    found = np.array(masked(logits, mx.array(masks.view(np.uint32))))
    assert (found == np.where(allowed, np.array(logits), -np.inf)).all()
    assert 0 < allowed.mean() < 1
    assert (fill_masks([None, None], 2) == -1).all()


def test_a_row_of_a_batch_has_its_own_mask(grammars, tokenizer):
    first, other = (grammars.matcher(grammars.of_text("regex", text, "f")) for text in ("a+", "b+"))
    masks = fill_masks([first, None, other], (len(tokenizer) + 36) // 32)
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
    a, b = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ab")
    assert bits[:, [a, b]].tolist() == [[1, 0], [1, 1], [0, 1]]


@pytest.mark.parametrize("special", [True, False])
def test_a_model_that_thinks_does_so_first(special):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text in ("<think>", "</think>")])
    grammars = grammars_of(tokenizer)
    answer = grammars.of_schema(COUNT, "s")
    value, not_opened, opened = '{"count": 7}', grammars.whole(answer), grammars.whole(answer, opened=True)
    assert takes(grammars, tokenizer, not_opened, value) == "whole"
    assert takes(grammars, tokenizer, not_opened, f"<think>It is {{ 7.</think>\n\n{value}") == "whole"
    assert takes(grammars, tokenizer, opened, f"It is 7.</think>\n\n{value}") == "whole"
    assert takes(grammars, tokenizer, opened, value) == "begun"
    assert takes(grammars, tokenizer, not_opened, f"It is 7. {value}") == "no"
    plain = grammars_of(byte_tokenizer())
    assert takes(plain, byte_tokenizer(), plain.whole(answer), "<think>") == "no"


def test_harmony_answers_in_its_final_channel():
    tokenizer = byte_tokenizer(special_tokens=(*SPECIAL_TOKENS, *HARMONY))
    grammars = grammars_of(tokenizer)
    whole = grammars.whole(grammars.of_schema(COUNT, "s"))
    final = '<|channel|>final<|message|>{"count": 7}'
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    assert takes(grammars, tokenizer, whole, final) == takes(grammars, tokenizer, whole, thought + final) == "whole"
    assert takes(grammars, tokenizer, whole, '{"count": 7}') == "no"


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_are_written_as_templates_write_them_and_read_back(family):
    tokenizer, grammars, ends = family_grammars(family)
    reader = CallReader.of(ToolTurns(tokenizer, tokenizer.chat_template, ends, TOOLS))
    form, rules = call_rules(reader, TOOLS, grammars.literal, parallel=True, free=False)
    grammar = grammars.whole(None, rules, reader.opened)
    own = CallReader(reader.turns, form, reader.opened, TOOLS)
    read = 0
    for seed in range(12):
        text = drawn(grammars, tokenizer, grammar, random.Random(seed))
        if text is None:
            continue  # thinking without an end, say
        said = own.said(text)
        assert said.calls, text
        assert said.unread == 0
        assert all(_allowed(SCHEMAS[call["name"]], call["arguments"]) for call in said.calls)
        read += 1
    assert read or reader.opened
    if form.name == reader.form.name and not reader.opened:
        written = call_text(family, "step_by", {"count": 7})
        written = without_end(written, family)
        assert takes(grammars, tokenizer, grammar, written) == "whole"
    one = grammars.whole(
        None, call_rules(reader, TOOLS, grammars.literal, parallel=False, free=False)[1], reader.opened
    )
    for seed in range(5):
        text = drawn(grammars, tokenizer, one, random.Random(seed))
        assert text is None or len(own.said(text).calls) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_free_text_may_have_calls_whose_arguments_fit(family):
    tokenizer, grammars, ends = family_grammars(family)
    reader = CallReader.of(ToolTurns(tokenizer, tokenizer.chat_template, ends, TOOLS))
    form, rules = call_rules(reader, TOOLS, grammars.literal, parallel=True, free=True)
    free = grammars.whole(None, rules, reader.opened, free=True)
    assert takes(grammars, tokenizer, free, "It is { red } and 7.") == "whole"
    begun = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant" if family == "harmony" else "A <s> and "
    assert takes(grammars, tokenizer, free, f"{begun}so it is.") == "whole"  # special tokens are said, too
    if form.name != reader.form.name:
        return
    written = call_text(family, "step_by", {"count": 7})
    written = without_end(written, family)
    assert takes(grammars, tokenizer, free, f"Well, {written}") == "whole"
    assert takes(grammars, tokenizer, free, f"{begun}{written}") == "whole"
    assert takes(grammars, tokenizer, free, f"Well, {written.partition('7')[0]}100") == "no"
