"""Keep what a model writes within a grammar: JSON that fits a schema, a regular expression, or a grammar of llguidance.

    schema, regex, Lark, GBNF -> grammar (text) -> Grammars.matcher -> one row's matcher -> a mask of the tokens that may follow

llguidance computes masks on the host, while the device computes the logits that they are for. So rows of a batch may have
different grammars, and rows without one are not slowed down.

A model that thinks before it answers does so outside of the grammar.

Source: https://github.com/guidance-ai/llguidance, docs/syntax.md and docs/json_schema.md.

Shapes: B rows, V vocabulary, W = V / 32 words of a mask.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from transformers import PreTrainedTokenizerBase

from mlx_lora.utils.errors import InputError, first_line
from mlx_lora.utils.parsing import parse_json

if TYPE_CHECKING:
    from mlx_lora.models.load import Base

# White space in JSON: as `json.dumps` writes it, with or without an indentation. Without a limit, a small model that is drawn
# from at temperature 1 may write line breaks up to its last token.
WHITE_SPACE = {"whitespace_pattern": r"(\n[ \t]{0,24})?", "item_separator": ",[ ]?", "key_separator": ":[ ]?"}
# Texts around a model's thinking; harmony's is a channel of its own.
THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>thought", "<channel|>"))


def schema_grammar(schema: Any) -> str:
    """Return the grammar of JSON that fits a schema, with bounded white space.

    Args:
        schema: a JSON Schema; true: any JSON.
    """
    return json.dumps({"grammars": [{"json_schema": with_white_space(schema)}]})


def with_white_space(schema: Any) -> Any:
    """Return a schema that says how much white space its JSON may have."""
    if schema is True:
        schema = {}
    return {"x-guidance": WHITE_SPACE, **schema} if isinstance(schema, dict) else schema


class Grammars:
    """The grammars of one tokenizer; may be used by several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Sequence[int]):
        """Prepare the tokenizer, which takes about a second for a large vocabulary.

        Args:
            tokenizer: of transformers, a fast one.
            vocabulary: V, which may be larger than the tokenizer's.
            ends: tokens that may end a text where its grammar allows an end.

        Raises:
            InputError: llguidance is not installed, or the tokenizer is not a fast one.
        """
        try:
            import llguidance
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise InputError(
                "an answer in a schema or grammar needs llguidance; pip install 'mlx-lora[serve]'"
            ) from None
        self._package: Any = llguidance
        try:
            self._tokenizer = from_tokenizer(tokenizer, vocabulary, list(ends))  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise InputError(f"an answer in a schema or grammar: this tokenizer cannot be used ({error})") from None
        added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        self._special = {text: number for text, number in added.items() if self._tokenizer.is_special_token(number)}
        self._added = added.keys()
        self._known: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def of(cls, base: Base) -> Grammars:
        """Return those of a base; errors as of the constructor."""
        return cls(base.hf_tokenizer, base.token_rows or len(base.hf_tokenizer), sorted(base.tokenizer.eos_token_ids))

    def matcher(self, grammar: str) -> Any:
        """Return a new matcher for a row (llguidance's LLMatcher).

        Raises:
            InputError: the grammar is invalid, which the text describes.
        """
        found = self._known.get(grammar)
        if found is None:  # compiled without the lock, for which the engine may wait
            found = self._package.LLMatcher(self._tokenizer, grammar, log_level=0)
            if found.is_error():
                raise InputError(self._package.LLMatcher.validate_grammar(grammar, self._tokenizer) or "invalid")
        with self._lock:
            self._known[grammar] = found
            self._known.move_to_end(grammar)
            while len(self._known) > 64:
                self._known.popitem(last=False)
            return found.deep_copy()

    def of_schema(self, schema: Any, name: str) -> str:
        """Return the grammar of a schema, after a check.

        Args:
            schema: a JSON Schema.
            name: of its place, for messages.

        Raises:
            InputError: it is invalid, or has what cannot be enforced; the text names the innermost place.
        """
        if why := self._invalid(schema, schema, name):
            raise InputError(why)
        return schema_grammar(schema)

    def _invalid(self, schema: Any, root: Any, name: str) -> str:
        """Return what is wrong with a part of a schema, and its innermost place; empty: nothing."""
        if not isinstance(schema, dict | bool):
            return f"{name}: found {json.dumps(schema)[:60]}; a schema is an object, true or false"
        shared = {key: root[key] for key in ("$defs", "definitions") if isinstance(root, dict) and key in root}
        whole = {**shared, **schema} if isinstance(schema, dict) else schema
        why = self._package.LLMatcher.validate_grammar(schema_grammar(whole), self._tokenizer).partition("\n")[0]
        # A place so deep is not named any further.
        parts = _parts(schema) if why and isinstance(schema, dict) and name.count(".") < 30 else ()
        inner = (self._invalid(part, root, f"{name}.{step}") for step, part in parts)
        return next(filter(None, inner), f"{name}: {why}" if why else "")

    def of_text(self, form: str, text: str, name: str) -> str:
        """Return the grammar of a regular expression (`regex`), or of Lark's or GBNF's text (`grammar`), after a check.

        Raises:
            InputError: it is invalid.
        """
        try:
            lark = (
                f"start: /{self._package.regex_to_lark(text)}/"
                if form == "regex"
                else self._package.grammar_from(form, text)
            )
            grammar = json.dumps({"grammars": [{"lark_grammar": lark}]})
            self.matcher(grammar)
        except (InputError, ValueError) as error:
            raise InputError(f"{name}: {first_line(error)}") from None
        return grammar

    def literal(self, text: str) -> str:
        """Return a text in Lark, with special tokens as tokens."""
        names = sorted(map(re.escape, self._special), key=len, reverse=True)
        parts = re.split(f"({'|'.join(names)})", text) if names else [text]
        return " ".join(
            f"<[{self._special[part]}]>" if part in self._special else json.dumps(part, ensure_ascii=False)
            for part in parts
            if part
        )

    def whole(self, answer: str | None, calls: str = "", opened: bool = False, free: bool = False) -> str:
        """Return the grammar of a turn: calls of tools or an answer, before which a model may think if it is one that does.

        Args:
            answer: the grammar of an answer; None: there is none, or any text is one.
            calls: rules in Lark, `calls` the first of them; empty: there are none.
            opened: the prompt ends inside the thinking.
            free: any text may be around the calls.
        """
        body = [] if answer is None else json.loads(answer)["grammars"][:1]
        harmony = {"<|channel|>", "<|message|>"} <= self._special.keys()
        pair = next((pair for pair in THOUGHTS if opened or set(pair) <= self._added), None)
        if not calls and not harmony and pair is None:
            return json.dumps({"grammars": body})
        final = self.literal("<|channel|>final<|message|>") if harmony else ""
        turns = [*(["calls"] if calls else []), *([f"{final} @answer"] if body else [])]
        rules = [calls, "TEXT: /(.|\\n)*/"]
        if free:  # special tokens are no text; the one that begins a call only begins calls
            begin = map(int, re.findall(r"TEXT <\[(\d+)\]>", calls))
            others = sorted(set(self._special.values()) - {*begin, *self._tokenizer.eos_tokens})
            start = "calls"
            rules.append(f"other: TEXT <[{','.join(map(str, others))}]>" if others else "other: call")
        elif harmony:
            start = f"thought? ({' | '.join(turns)})"
            begun, ended = map(self.literal, ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"))
            rules.append(f"thought: {begun} TEXT {ended}")
        elif pair is not None:
            first, last = map(self.literal, pair)
            start = f"{'thought' if opened else f'({first} thought)?'} /\\s*/ ({' | '.join(turns)})"
            rules.append(f"thought{'' if pair[1] in self._special else '[lazy]'}: TEXT {last}")
        else:
            start = " | ".join(turns)
        lark = "\n".join([f"start: {start}", *rules])
        return json.dumps(
            {"grammars": [{"name": "turn", "lark_grammar": lark}, *({"name": "answer", **one} for one in body)]}
        )


def opens_thinking(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> bool:
    """Return whether a prompt ends inside the thinking that its chat template opens."""
    return str(tokenizer.decode(list(prompt[-8:]))).rstrip().endswith(THOUGHTS[0][0])


def read_schema(file: str) -> Any:
    """Return the JSON schema in a file.

    Raises:
        InputError: it cannot be read, or is not JSON.
    """
    try:
        return parse_json(Path(file).expanduser().read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"--schema {file}: no JSON schema can be read ({first_line(error)}); give a JSON file"
        ) from None


class SchemaProcessor:
    """One of mlx-lm's logits processors, which keeps one text within a schema."""

    def __init__(self, base: Base, schema: Any, prompt: Sequence[int], chat: bool):
        """Prepare.

        Args:
            base: whose tokens the text has.
            schema: a JSON Schema.
            prompt: its tokens.
            chat: it is a chat, so that a model that thinks does so before its answer.

        Raises:
            InputError: as of `Grammars` and `Grammars.of_schema`.
        """
        grammars = Grammars.of(base)
        grammar = grammars.of_schema(schema, "--schema")
        whole = grammars.whole(grammar, opened=opens_thinking(base.hf_tokenizer, prompt)) if chat else grammar
        self._matcher, self._begun = grammars.matcher(whole), False

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Return the logits (1, V) of the tokens that may follow `tokens`."""
        mx.async_eval(logits)
        if self._begun and not self._matcher.is_stopped():
            self._matcher.consume_token(tokens[-1].item())
        self._begun = True
        if self._matcher.is_error():
            raise InputError(f"--schema: too large to be enforced ({self._matcher.get_error().splitlines()[0]})")
        return masked(logits, mx.array(fill_masks([self._matcher], (logits.shape[1] + 31) // 32).view(np.uint32)))


def _parts(schema: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the schemas within a schema, with the steps that lead to them."""
    found = []
    for key in ("properties", "$defs", "definitions", "patternProperties"):
        if isinstance(schema.get(key), dict):
            found += [(f"{key}.{name}", part) for name, part in schema[key].items()]
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(schema.get(key), list):
            found += [(f"{key}[{place}]", part) for place, part in enumerate(schema[key])]
    return found + [(key, schema[key]) for key in ("items", "additionalProperties") if key in schema]


def fill_masks(matchers: Sequence[Any], words: int) -> np.ndarray:
    """Return the masks of rows, (B, W) int32; all bits are set for a row without a matcher, and for one that has failed."""
    masks = np.full((len(matchers), words), -1, np.int32)
    for mask, matcher in zip(masks, matchers, strict=True):
        if matcher is not None and not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    return masks


@mx.compile
def masked(logits: mx.array, masks: mx.array) -> mx.array:
    """Return logits (B, V) in which the tokens that masks (B, W) uint32 leave out are -inf."""
    bits = (masks[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
    return mx.where(bits.flatten(1)[:, : logits.shape[1]].astype(mx.bool_), logits, -mx.inf)
