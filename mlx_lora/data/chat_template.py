"""Choose the chat template, encode prompts and conversations with it, and split what it rendered into turns again.

Without a template, a prompt is encoded as plain text. Rendering itself is in data/sandbox.py.

A user may type `<|im_end|>`. A chat template puts its markers and the messages' content into one text, and the tokenizer
cannot tell them apart. So content is rendered with stand-ins for such tokens, of the same length (`Controls`). Their places
are known in the finished text, where the tokenizer's control tokens are then replaced by the tokens of the same characters
as ordinary text. All other tokens stay as they are, and content without control tokens is not touched at all.

`Specials` finds the special tokens in a rendered text, and tells which of them end a turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mlx_lora.data.examples import FormatError
from mlx_lora.data.sandbox import MAX_TEMPLATE_CHARACTERS, render_chat, tokenizer_panics
from mlx_lora.data.template_worker import DATE_FUNCTION
from mlx_lora.utils.errors import InputError

# What content may rightly have: thinking, calls, and places of images and sounds. These tokens end no turn.
OF_CONTENT = re.compile(r"think|reason|tool|function|image|img|vision|video|audio|sound", re.IGNORECASE)
STAND_INS = 0xF0000  # characters for private use, which no text has: the first one's number
ESCAPED = re.compile(r"\\udb[89ab]", re.IGNORECASE)  # such a character in JSON that a template escaped
LEAD = "a"  # a tokenizer may put a space before a text's first word


@dataclass(frozen=True)
class Hidden:
    """Messages with stand-ins for control tokens.

    Attributes:
        messages: To render.
        names: The control tokens that the content has, as text, sorted.
        texts: All control tokens; the n-th one's stand-in is the n-th character for private use, repeated.
    """

    messages: list[dict[str, Any]]
    names: tuple[str, ...]
    texts: Sequence[str]

    def shown(self, rendered: str) -> tuple[str, list[tuple[int, int]]]:
        """Return a rendered text with its control tokens again, and the spans of characters of those from content.

        Raises:
            FormatError: the template changed a stand-in.
        """
        if not self.names:
            return rendered, []
        characters, spans = list(rendered), []
        at = 0
        while at < len(rendered):
            number = ord(rendered[at]) - STAND_INS
            if not 0 <= number < len(self.texts):
                at += 1
                continue
            text = self.texts[number]
            end = at + len(text)
            if rendered[at:end] != rendered[at] * len(text):
                raise FormatError(f"the chat template changes {text} in a message; remove it from the data")
            characters[at:end] = text
            spans.append((at, end))
            at = end
        if ESCAPED.search(rendered):
            raise FormatError(f"the chat template escapes {self.names[0]} in a message; remove it from the data")
        return "".join(characters), spans


class Controls:
    """The control tokens of a tokenizer that content must not bring in."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        """Read them from a tokenizer."""
        special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        kept = {
            text: number
            for text, number in special.items()
            if text and text != tokenizer.unk_token and not OF_CONTENT.search(text)
        }
        self.texts = sorted(kept, key=len, reverse=True)
        self._ids = frozenset(kept.values())
        self._any = re.compile("|".join(map(re.escape, self.texts)) or r"(?!)")
        self._tokenizer = tokenizer

    def found(self, messages: Sequence[dict[str, Any]]) -> tuple[str, ...]:
        """Return the control tokens that messages have in their content, sorted."""
        given = [value for one in messages for key, value in one.items() if key not in ("role", "type")]
        return tuple(sorted({text for leaf in _leaves(given) for text in self._any.findall(leaf)}))

    def hide(self, messages: list[dict[str, Any]]) -> Hidden:
        """Return messages with stand-ins for control tokens; the same messages if they have none."""
        names = self.found(messages)
        if not names:
            return Hidden(messages, (), self.texts)
        number_of = {text: number for number, text in enumerate(self.texts)}

        def stand_in(match: re.Match[str]) -> str:
            return chr(STAND_INS + number_of[match[0]]) * len(match[0])

        def hidden(value: Any) -> Any:
            if isinstance(value, str):
                return self._any.sub(stand_in, value)
            if isinstance(value, dict):
                return {key: value[key] if key in ("role", "type") else hidden(value[key]) for key in value}
            return [hidden(item) for item in value] if isinstance(value, list) else value

        return Hidden([hidden(message) for message in messages], names, self.texts)

    def as_text(
        self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
    ) -> tuple[list[int], np.ndarray]:
        """Return tokens in which control tokens inside some spans are replaced by those of ordinary text.

        Args:
            text: What was tokenized.
            ids, offsets: Its tokens, and the characters of each.
            spans: Where control tokens are content.

        Returns:
            The tokens, and for each the number of the token that it stands for, int64.
        """
        found: list[int] = []
        origin: list[int] = []
        for number, (token, (start, end)) in enumerate(zip(ids, offsets, strict=True)):
            inside = token in self._ids and any(start < after and first < end for first, after in spans)
            new = self._ordinary(text[start:end]) if inside else [token]
            found += new
            origin += [number] * len(new)
        return found, np.array(origin, np.int64)

    @cached_property
    def _plain(self) -> Tokenizer:
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
            raise FormatError("control tokens in a message require a fast tokenizer (a tokenizer.json)")
        backend = plain_backend(self._tokenizer)
        backend.encode_special_tokens = True
        return backend

    def _ordinary(self, text: str) -> list[int]:
        """Return the tokens of a control token's characters as ordinary text."""
        led = self._plain.encode(LEAD + text, add_special_tokens=False)
        apart = bool(led.ids) and led.offsets[0] == (0, len(LEAD))
        ids = led.ids[1:] if apart else self._plain.encode(text, add_special_tokens=False).ids
        if self._ids.isdisjoint(ids) or len(text) < 2:
            return ids
        return self._ordinary(text[:1]) + self._ordinary(text[1:])  # the vocabulary has the text as an ordinary piece


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a copy of a tokenizer's core that neither adds, cuts nor pads, with exact offsets.

    The post-processor is removed: GPT-2's trims white space from offsets, so that "\\n" would have no position.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    return backend


@lru_cache(maxsize=4)
def controls_of(tokenizer: PreTrainedTokenizerBase) -> Controls:
    """Return the control tokens of a tokenizer; kept, because some have thousands."""
    return Controls(tokenizer)


def _leaves(value: Any) -> list[str]:
    """Return all texts in plain data, without the keys of its objects."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [leaf for part in parts for leaf in _leaves(part)]


class Specials:
    """The texts of a tokenizer's special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        """Read them from a tokenizer."""
        texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        texts |= set(tokenizer.all_special_tokens)
        ordered = sorted(texts, key=len, reverse=True)
        closing = [text for text in ordered if text != tokenizer.bos_token or text == tokenizer.eos_token]
        self._any = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        self._closing = re.compile("|".join(map(re.escape, closing)) or r"(?!)")
        self._texts = closing

    def end_after(self, text: str, end: int) -> int | None:
        """Return the end of the special token that closes a turn whose content ends at `end`."""
        for special in self._any.finditer(text, max(0, end - 64), end + 64):
            if special.start() < end < special.end():  # two end tokens that share their last letters
                return special.end()
        while text[end : end + 1].isspace():
            end += 1
        match = self._closing.match(text, end)
        return match.end() if match else None

    def closing(self, text: str) -> str:
        """Return the special token that a text ends with, or an empty string."""
        return next((special for special in self._texts if text.endswith(special)), "")

    def closing_at(self, text: str, start: int) -> str:
        """Return the special token that begins at `start`, or an empty string."""
        found = self._closing.match(text, start)
        return found[0] if found else ""

    def are_all(self, text: str) -> bool:
        """Return whether a text only has special tokens and white space."""
        return not self._any.sub("", text).strip()

    def tail(self, text: str) -> str:
        """Return a text from its last special token on; an empty string if it has none."""
        return text[max((found.start() for found in self._any.finditer(text)), default=len(text)) :]

    def last_end(self, text: str) -> int:
        """Return where the last special token ends; 0 if there is none."""
        return max((found.end() for found in self._any.finditer(text)), default=0)

    def next_in(self, text: str, start: int) -> int:
        """Return where the next special token begins, or the text's end."""
        found = self._any.search(text, start)
        return found.start() if found else len(text)


# Special tokens
BUILT_IN, OWN = ("alpaca", "chatml", "chatml_ended", "chatml_thoughts", "llama3"), "own"
PROBE = [{"role": "user", "content": "x"}]


def resolve_template(name_or_file: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the chat template that was asked for, else the model's own, else the built-in alpaca.

    Args:
        name_or_file: A built-in name (alpaca, chatml, llama3), a Jinja file, `own`, or None.
        tokenizer: Has the model's own `chat_template`, which is None in most base models.

    Returns:
        The Jinja text, and its origin: `model`, `built-in alpaca` or of another name, or the file's path.

    Raises:
        InputError: there is no such file, or Jinja cannot parse it; or the model has no template of its own.
    """
    if name_or_file in (None, OWN) and tokenizer.chat_template and (own := own_template(tokenizer)):
        text, origin = own, "model"
    elif name_or_file == OWN:
        raise InputError("--chat-template own: the model has no chat template; name one, such as chatml")
    elif name_or_file is None or name_or_file in BUILT_IN:
        name = name_or_file or "alpaca"
        text, origin = _built_in(name, tokenizer), f"built-in {name}"
    else:
        text, origin = _read(name_or_file), name_or_file
    try:
        render_chat(tokenizer, PROBE, text, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        # A template may refuse this chat, for example without a system turn. Only a syntax error makes it unusable.
        if isinstance(error, jinja2.TemplateSyntaxError):
            raise InputError(
                f"chat template ({origin}), line {error.lineno}: {error.message}; use another with --chat-template"
            ) from error
    return text, origin


def shows_date(name_or_file: str | None, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the template that `resolve_template` would choose shows today's date.

    Args:
        name_or_file, tokenizer: As for `resolve_template`.
    """
    if name_or_file in (None, OWN):
        return DATE_FUNCTION in str(tokenizer.chat_template)
    path = Path(name_or_file).expanduser()
    return name_or_file not in BUILT_IN and path.is_file() and DATE_FUNCTION in _read(name_or_file)


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the model's own chat template, or, if it has several, the one named `default`; None if it has none.

    Raises:
        InputError: it has several, and none is named `default`.
    """
    chat_template: str | dict[str, str] | None = tokenizer.chat_template
    if chat_template is None or isinstance(chat_template, str):
        return chat_template
    if not isinstance(chat_template, dict) or not all(isinstance(part, str) for part in chat_template.values()):
        raise InputError("the model's chat template is not a string; give one with --chat-template")
    if "default" in chat_template:
        return chat_template["default"]
    names = ", ".join(map(str, chat_template))
    raise InputError(
        f"the model has several chat templates ({names}), none of them default; train with --chat-template, or generate with --ignore-chat-template"
    )


def _built_in(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if name == "alpaca" and tokenizer.eos_token is None:
        raise InputError("the built-in alpaca template requires an end token, and the tokenizer has none; use chatml")
    text = (resources.files("mlx_lora.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    # A chat is encoded as rendered, so the template must write the BOS that the tokenizer puts before a text.
    prefix = prefix_tokens(tokenizer)
    return (
        "{{- bos_token }}" + text if "bos_token" not in text and prefix and prefix == [tokenizer.bos_token_id] else text
    )


def _read(name: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(
            f"--chat-template {name}: no such file or built-in template; give a Jinja file, {' or '.join(BUILT_IN)}"
        )
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_TEMPLATE_CHARACTERS + 1)  # one more is refused when it is rendered
    except UnicodeDecodeError as error:
        raise InputError(f"--chat-template {name} is not UTF-8; save it as UTF-8") from error


def prefix_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids that the tokenizer puts before every text (a BOS, or nothing)."""
    with_special = tokenizer("x", add_special_tokens=True)["input_ids"]
    plain = tokenizer("x", add_special_tokens=False)["input_ids"]
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


# Encoding


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    template: str | None,
    system_prompt: str | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """Return a prompt's tokens: as a chat turn if there is a template, else as plain text with the tokenizer's BOS.

    Args:
        tokenizer: the base's tokenizer, not mlx-lm's wrapper.
        text: the user's prompt.
        template: Jinja text, or None.
        system_prompt: a system message before it, for templates that support one.
        tools: that the model may call, for templates that show them.

    Raises:
        InputError: there is a system prompt or a tool but no template, or the template refuses these turns or shows no tools.
    """
    if not template:
        if system_prompt:
            raise InputError("--system-prompt: no chat template is in use; put the text into --prompt")
        if tools:
            raise InputError(
                "--tools: no chat template is in use, so the model cannot be shown tools; leave --tools out"
            )
        with tokenizer_panics("--prompt"):
            return tokenizer.encode(text)
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": text})
    if tools and not template_shows(tokenizer, messages, template, tools):
        raise InputError(
            "--tools: the chat template does not show tools; train with --chat-template chatml, which does"
        )
    return encode_chat(
        tokenizer, messages, template, tools, advice="; leave --system-prompt out, or give --ignore-chat-template"
    )


def template_shows(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], template: str, tools: list[dict[str, Any]]
) -> bool:
    """Return whether a template shows tools to the model; True if it refuses the chat, which `encode_chat` reports."""
    try:
        shown = [render_chat(tokenizer, messages, template, some, add_generation_prompt=True) for some in (tools, None)]
    except (jinja2.TemplateError, TypeError, ValueError):
        return True
    return shown[0] != shown[1]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    template: str,
    tools: list[dict[str, Any]] | None = None,
    advice: str = "",
) -> list[int]:
    """Return a conversation's tokens, up to where the model answers.

    Args:
        tokenizer: the base's tokenizer.
        messages, tools: plain data, which may be untrusted.
        template: Jinja text.
        advice: ends the error message if the template refuses the conversation.

    Raises:
        InputError: the template refuses the conversation, or takes too much time or memory.
    """
    try:
        return chat_tokens(tokenizer, messages, template, tools)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InputError(f"the chat template refuses the conversation ({error}){advice}") from None


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    template: str,
    tools: list[dict[str, Any]] | None = None,
    day: date | None = None,
    allow_special_tokens: bool = False,
) -> list[int]:
    """Return a conversation's tokens, up to where the model answers.

    Args:
        tokenizer: fast, unless the messages have no control tokens.
        messages, tools: plain data.
        template: Jinja text.
        day: the day that the template shows as today; None: today.
        allow_special_tokens: a message that spells a control token brings that token in.

    Raises:
        jinja2.TemplateError, TypeError, ValueError: the template refuses the conversation.
        InputError: it takes too much time or memory.
    """
    text, spans = rendered_chat(tokenizer, messages, template, tools, day, allow_special_tokens)
    return tokens_of_rendered(tokenizer, text, spans)


def tokens_after_turn(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    content: str,
    template: str,
    day: date | None = None,
    allow_special_tokens: bool = False,
) -> list[int]:
    """Return the tokens after a turn and its end token, up to where the model answers.

    Args:
        content: of the turn, which no other text has.
        tokenizer, messages, template, day, allow_special_tokens: as for `chat_tokens`; errors too.
    """
    text, spans = rendered_chat(tokenizer, messages, template, None, day, allow_special_tokens)
    if content not in text:
        raise FormatError("it leaves out an earlier answer")
    after = text.index(content) + len(content)
    cut = Specials(tokenizer).end_after(text, after) or after
    return tokens_of_rendered(tokenizer, text[cut:], [(first - cut, end - cut) for first, end in spans])


def rendered_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    template: str,
    tools: list[dict[str, Any]] | None,
    day: date | None,
    allow_special_tokens: bool,
) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation's text up to where the model answers, and the spans of control tokens in its content."""
    hidden = controls_of(tokenizer).hide([] if allow_special_tokens else messages)
    shown = hidden.messages if hidden.names else messages
    return hidden.shown(render_chat(tokenizer, shown, template, tools, add_generation_prompt=True, day=day))


def tokens_of_rendered(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]) -> list[int]:
    """Return a rendered text's tokens; control tokens in the spans are ordinary text."""
    # Encode without special tokens: the template has already written its BOS.
    with tokenizer_panics("the conversation"):
        if not spans:
            return tokenizer.encode(text, add_special_tokens=False)
        encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return controls_of(tokenizer).as_text(text, encoded["input_ids"], encoded["offset_mapping"], spans)[0]


# Turns of a rendered text

ROLES = {
    "system": "System", "developer": "System", "user": "User", "human": "User", "assistant": "Assistant", "model": "Assistant",
    "tool": "Tool", "ipython": "Tool", "observation": "Tool",
}  # fmt: skip
# Markers of families whose role is not written between two markers.
OWN_ROLE = {"[INST]": "User", "[/INST]": "Assistant", "[SYSTEM_PROMPT]": "System"}
HEADINGS = {"Instruction": "User", "Input": "User", "Response": "Assistant"}  # of the Alpaca template
ANY_MARKER = r"<[|｜][^<>\n]{1,40}[|｜]>|<(?:start|end)_of_turn>|<\|turn>|<turn\|>|\[/?(?:INST|SYSTEM_PROMPT)\]"
HEADING = rf"(?m:^### (?:{'|'.join(HEADINGS)}):)"
HEADER = re.compile(rf"\s*({'|'.join(ROLES)})[ \t]*(?:\n+|$)")
BETWEEN_TURNS = re.compile(r"start|end(?!_header)|eot|<\|turn>|<turn\|>", re.IGNORECASE)
EMPTY_THINKING = re.compile(r"<think>\s*</think>\s*|<think>\s*$")


def spoken_turns(text: str, specials: Iterable[str] = ()) -> list[tuple[str, str]]:
    """Return the turns of a rendered conversation.

    Args:
        text: as the template rendered it; its beginning may be cut off.
        specials: the tokenizer's special tokens; the markers of known families are found without them.

    Returns:
        (role, content) of each turn with content: System, User, Assistant or Tool; an empty role for text outside turns.
    """
    known = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
    parts = re.split(f"({'|'.join(filter(None, (known, ANY_MARKER, HEADING)))})", text)
    turns: list[tuple[str, str]] = []
    role, dropping, fresh = "", False, True
    for number, part in enumerate(parts):
        if number % 2:
            # The role that a marker names by itself.
            heading = HEADINGS[part[4:-1]] if part.startswith("### ") else OWN_ROLE.get(part)
            own = heading or ROLES.get(part.strip("<>|｜").lower(), "")
            if own:
                role, fresh = own, True
            elif BETWEEN_TURNS.search(part):
                role, fresh = "", True
            # Between these two, gpt-oss names the channel; the words after `message` are the content.
            dropping = part == "<|channel|>" or (dropping and part != "<|message|>")
            continue
        header = HEADER.match(part) if number and not role and not dropping else None
        if header:
            role, fresh, part = ROLES[header[1]], True, part[header.end() :]
        content = EMPTY_THINKING.sub("", part)
        if dropping or not content.strip():
            continue
        if turns and not fresh and turns[-1][0] == role:
            turns[-1] = (role, turns[-1][1] + content)
        else:
            turns.append((role, content))
        fresh = False
    return [(role, content.strip()) for role, content in turns]


def without_markers(text: str, specials: Iterable[str] = ()) -> str:
    """Return a model's answer without special tokens."""
    return "\n".join(content for _, content in spoken_turns(text, specials))
