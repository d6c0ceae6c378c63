"""Write a folder for `ollama create NAME -f FOLDER/Modelfile`: the Modelfile, and the GGUF that it names.

Ollama has Go templates, so a chat template cannot be copied. Well-known formats are recognized by what the Jinja template
renders for the same conversations, character by character. For other formats no TEMPLATE is written, and Ollama looks
for a format that it knows in the GGUF's metadata.

Source: ollama/ollama, docs/modelfile.md, parser/parser.go and template/template.go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase

from mlx_lora.data.chat_template import own_template, prefix_tokens
from mlx_lora.data.sandbox import render_chat
from mlx_lora.exporters.adapter_folder import AdapterInfo
from mlx_lora.gguf.write import write_gguf_adapter, write_gguf_model
from mlx_lora.models.load import Base
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import check_new_folder, replacing_folder

Messages = list[dict[str, str]]
MODELFILE = "Modelfile"


@dataclass(frozen=True)
class TemplateFamily:
    """One chat format. In the turns `{}` is the content, and `{eos}` the end token's text.

    Attributes:
        name: for messages.
        system, user, assistant: one turn each.
        prompt: the start of an answer, which the model continues.
        stops: texts that end an answer, in addition to the model's end tokens.
        folded: whether the system text is put into the next user turn, before its content.
    """

    name: str
    system: str
    user: str
    assistant: str
    prompt: str
    stops: tuple[str, ...]
    folded: bool = False


FAMILIES = (
    TemplateFamily(
        "chatml",
        "<|im_start|>system\n{}<|im_end|>\n",
        "<|im_start|>user\n{}<|im_end|>\n",
        "<|im_start|>assistant\n{}<|im_end|>\n",
        "<|im_start|>assistant\n",
        ("<|im_end|>",),
    ),
    TemplateFamily(
        "llama3",
        "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|eot_id|>",),
    ),
    TemplateFamily(
        "gemma",
        "{}\n\n",
        "<start_of_turn>user\n{}<end_of_turn>\n",
        "<start_of_turn>model\n{}<end_of_turn>\n",
        "<start_of_turn>model\n",
        ("<end_of_turn>",),
        folded=True,
    ),
    TemplateFamily(
        "alpaca",
        "{}\n\n",
        "### Instruction:\n{}\n\n",
        "### Response:\n{}{eos}\n\n",
        "### Response:\n",
        ("### Instruction:",),
    ),
    TemplateFamily("mistral", "{}\n\n", "[INST] {} [/INST]", " {}{eos}", "", ("[INST]",), folded=True),
    TemplateFamily("mistral v3", "{}\n\n", "[INST] {}[/INST]", " {}{eos}", "", ("[INST]",), folded=True),
    TemplateFamily(
        "zephyr",
        "<|system|>\n{}{eos}\n",
        "<|user|>\n{}{eos}\n",
        "<|assistant|>\n{}{eos}\n",
        "<|assistant|>\n",
        ("<|user|>",),
    ),
)
_TURNS: Messages = [
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four, as always."},
    {"role": "user", "content": "And three more?"},
]
_SYSTEM = {"role": "system", "content": "Answer in few words."}
_PROBES: tuple[Messages, ...] = (_TURNS[:1], _TURNS)


@dataclass(frozen=True)
class Chat:
    """A recognized chat template.

    Attributes:
        family: its format.
        eos: the end token's text.
        system: the system text that it adds to a conversation without one, or None.
        before: what the template must put before the text (a bos that the tokenizer does not add).
    """

    family: TemplateFamily
    eos: str
    system: str | None
    before: str

    def render(self, messages: Messages) -> str:
        """Return the conversation with the prompt for an answer, as Ollama will render it."""
        family, text, folded = self.family, self.before, ""
        for message in messages:
            content = message["content"]
            if message["role"] == "system" and family.folded:
                folded = family.system.replace("{}", content)
            elif message["role"] == "user":
                text, folded = text + self._turn(family.user, folded + content), ""
            else:
                text += self._turn(family.system if message["role"] == "system" else family.assistant, content)
        return text + family.prompt

    def go_template(self) -> str:
        """Return the same as a Go template over `.Messages`, without `{{-`, so that every character is kept."""
        family, content = self.family, "{{ .Content }}"
        system, user = self._turn(family.system, content), self._turn(family.user, content)
        start = ""
        if family.folded:
            start, system = '{{ $system := "" }}', "{{ $system = .Content }}"
            inside = "{{ if $system }}" + family.system.replace("{}", "{{ $system }}") + '{{ $system = "" }}{{ end }}'
            user = user.replace(content, inside + content)
        return (
            f'{start}{self.before}{{{{ range .Messages }}}}{{{{ if eq .Role "system" }}}}{system}'
            f'{{{{ else if eq .Role "user" }}}}{user}'
            f'{{{{ else if eq .Role "assistant" }}}}{self._turn(family.assistant, content)}'
            f"{{{{ end }}}}{{{{ end }}}}{family.prompt}"
        )

    def _turn(self, pattern: str, content: str) -> str:
        return content.join(part.replace("{eos}", self.eos) for part in pattern.split("{}"))


def recognize(tokenizer: PreTrainedTokenizerBase, template: str) -> Chat | None:
    """Return the well-known format that a Jinja chat template renders, or None.

    Args:
        tokenizer: renders the template, and has the bos and end tokens.
        template: Jinja text.
    """

    def render(messages: Messages) -> str | None:
        try:
            return render_chat(tokenizer, messages, template, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError, ValueError):
            return None  # many templates refuse a system turn

    # Try it unchanged first: ChatML's <|im_start|> is the bos of some models, and belongs to the turn.
    renderers: list[tuple[Callable[[Messages], str | None], str]] = [(render, "")]
    if isinstance(bos := tokenizer.bos_token, str) and bos:
        # Ollama's tokenizer adds it if the model says so.
        added = prefix_tokens(tokenizer) == [tokenizer.bos_token_id]
        renderers.append((_without(render, bos), "" if added else bos))
    for text, before in renderers:
        for family in FAMILIES:
            chat = Chat(family, str(tokenizer.eos_token or ""), None, "")
            # The system text that the template adds to a conversation without one.
            found, system = text(_TURNS) or "", None
            start, end = chat.render([{"role": "system", "content": "\0"}, *_TURNS]).split("\0")
            if found.startswith(start) and found.endswith(end) and len(found) > len(start) + len(end):
                system = found[len(start) : len(found) - len(end)]
            added = [{"role": "system", "content": system}] if system is not None else []
            if any(text(probe) != chat.render([*added, *probe]) for probe in _PROBES):
                continue
            # A template that refuses system turns agrees with any format of them.
            if all(text([_SYSTEM, *probe]) in (None, chat.render([_SYSTEM, *probe])) for probe in _PROBES):
                return Chat(family, chat.eos, system, before)
    return None


def _without(render: Callable[[Messages], str | None], start: str) -> Callable[[Messages], str | None]:
    def rest(messages: Messages) -> str | None:
        text = render(messages) or ""
        return text.removeprefix(start) if text.startswith(start) else None

    return rest


def write_ollama(
    out: Path, base: Base, info: AdapterInfo | None, *, gguf_type: str, ollama_base: str | None, force: bool
) -> list[str]:
    """Write Modelfile and GGUF as a folder, atomically.

    Args:
        out: the folder to write.
        base: adapted or not.
        info: of the adapter.
        gguf_type: of a merged model.
        ollama_base: an Ollama model or a .gguf file that the adapter is applied to; None: the merged model is written.
        force: replace a folder with a Modelfile.

    Returns:
        Notes for the user, one line each.

    Raises:
        InputError: `out` must not be written, or a writer refuses.
    """
    out = out.resolve()
    check_new_folder(out, force, MODELFILE)
    for folder in (base.folder, Path(base.model_id).expanduser()):
        if folder.resolve().is_relative_to(out):
            raise InputError(f"--out {out}: holds the base {folder}; give another folder")
    source = ollama_base or "./model.gguf"
    if ollama_base is not None and (path := Path(ollama_base).expanduser()).is_file():
        source = str(path.resolve())
    elif source.endswith(".gguf") and ollama_base is not None:
        raise InputError(
            f"--ollama-base {ollama_base}: no such file; give a .gguf file, or a name that `ollama list` shows"
        )
    own = info.chat_template if info else None
    with replacing_folder(out) as folder:
        if ollama_base is None:
            write_gguf_model(
                folder / "model.gguf", base, gguf_type=gguf_type, name=out.name, chat_template=own, asked=out
            )
        elif info is not None:
            write_gguf_adapter(folder / "adapter.gguf", base.model, info.base_model, info.full)
        lines, notes = [f"FROM {source}"], []
        lines += ["ADAPTER ./adapter.gguf"] if ollama_base else []
        inherits = ollama_base is not None and not source.endswith(".gguf") and own is None
        if inherits:
            notes.append(f"Ollama uses the chat template of {source}")
        else:
            chat_lines, notes = _chat_lines(base.hf_tokenizer, own or own_template(base.hf_tokenizer))
            lines += chat_lines
        if ollama_base:
            notes.append("Ollama from 0.34.1 on refuses ADAPTER in a Modelfile; for it, leave --ollama-base out")
        (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return notes


def _chat_lines(tokenizer: PreTrainedTokenizerBase, template: str | None) -> tuple[list[str], list[str]]:
    """Return the Modelfile's lines about chats, and notes for the user."""
    if template is None:
        return [], ["the model has no chat template, so the Modelfile has none, and Ollama does not change prompts"]
    chat = recognize(tokenizer, template)
    # Ollama runs the contents of {{ }}, and three quotes end a text, so a tokenizer's tokens must not contain them.
    parts = () if chat is None else (chat.system or "", chat.eos, chat.before)
    if chat is None or any(mark in part for mark in ('"""', "{{", "}}") for part in parts):
        names = ", ".join(family.name for family in FAMILIES)
        return [], [
            f"the chat template renders none of the formats that we can write for Ollama ({names}), so the Modelfile has no "
            "TEMPLATE, and Ollama chooses one from the GGUF's template; check it with `ollama show --template`"
        ]
    lines = [f'TEMPLATE """{chat.go_template()}"""']
    lines += [f'SYSTEM """{chat.system}"""'] if chat.system else []
    lines += [f'PARAMETER stop "{stop}"' for stop in chat.family.stops]
    return lines, [f"the TEMPLATE is for {chat.family.name}, without tool calls"]
