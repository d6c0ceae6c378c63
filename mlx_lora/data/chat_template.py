"""Choose the chat template, encode prompts and conversations with it, and split what it rendered into turns again.

Without a template, a prompt is encoded as plain text. Rendering itself is in data/sandbox.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from mlx_lora.data.sandbox import DATE_FUNCTION, MAX_TEMPLATE_CHARACTERS, render_chat, tokenizer_panics
from mlx_lora.data.special_tokens import controls_of
from mlx_lora.utils.errors import InputError

BUILT_IN = ("alpaca", "chatml")
PROBE = [{"role": "user", "content": "x"}]


def resolve_template(name_or_file: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the chat template that was asked for, else the model's own, else the built-in alpaca.

    Args:
        name_or_file: A built-in name (alpaca, chatml), a Jinja file, or None.
        tokenizer: Has the model's own `chat_template`, which is None in most base models.

    Returns:
        The Jinja text, and its origin: `model`, `built-in alpaca`, `built-in chatml` or the file's path.

    Raises:
        InputError: there is no such file, or Jinja cannot parse it.
    """
    if name_or_file is None and tokenizer.chat_template and (own := own_template(tokenizer)):
        text, origin = own, "model"
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
    if name_or_file is None:
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
    raise InputError(f"the model has several chat templates ({names}), none of them default; give --chat-template")


def _built_in(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if name == "alpaca" and tokenizer.eos_token is None:
        raise InputError("the built-in alpaca template requires an end token, and the tokenizer has none; use chatml")
    text = (resources.files("mlx_lora.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    # A chat is encoded as rendered, so the template must write the BOS that the tokenizer puts before a text.
    prefix = prefix_tokens(tokenizer)
    return "{{- bos_token }}" + text if prefix and prefix == [tokenizer.bos_token_id] else text


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
    controls = controls_of(tokenizer)
    hidden = controls.hide([] if allow_special_tokens else messages)
    shown = hidden.messages if hidden.names else messages
    text, spans = hidden.shown(render_chat(tokenizer, shown, template, tools, add_generation_prompt=True, day=day))
    # Encode without special tokens: the template has already written its BOS.
    with tokenizer_panics("the conversation"):
        if not spans:
            return tokenizer.encode(text, add_special_tokens=False)
        encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return controls.as_text(text, encoded["input_ids"], encoded["offset_mapping"], spans)[0]


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
            own = _role_in(part)
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


def _role_in(marker: str) -> str:
    """Return the role that a marker names by itself, an empty string if it names none."""
    if marker.startswith("### "):
        return HEADINGS[marker[4:-1]]
    return OWN_ROLE.get(marker) or ROLES.get(marker.strip("<>|｜").lower(), "")
