"""Choose the chat template that renders the conversations."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase

from mlx_lora.data.sandbox import DATE_FUNCTION, MAX_TEMPLATE_CHARACTERS, render_chat
from mlx_lora.system.errors import InputError

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


def prefix_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids that the tokenizer puts before every text (a BOS, or nothing)."""
    with_special = tokenizer("x", add_special_tokens=True)["input_ids"]
    plain = tokenizer("x", add_special_tokens=False)["input_ids"]
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


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
