"""A real fast tokenizer that needs no download: one token per UTF-8 byte, plus special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
)
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>", "<|constrain|>")
GEMMA = ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')  # fmt: skip
MISTRAL = ("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
CHATML = """\
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def byte_tokenizer(
    chat_template: str | None = CHATML,
    bos: bool = False,
    eos: str | None = "<|im_end|>",
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    merges: Sequence[tuple[str, str]] = (),
) -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer of 256 byte tokens, the merges and the special tokens, in that order.

    Args:
        chat_template: Jinja text; None makes it a base model's tokenizer.
        bos: Put `<s>` before every text that is encoded with special tokens.
        eos: Text of the end token; it must be among `special_tokens`. None: the tokenizer has none.
        special_tokens: Their texts.
        merges: BPE merges, in the byte alphabet (a space is `Ġ`, a newline is `Ċ`).

    Returns:
        The tokenizer, as `AutoTokenizer` would load it.
    """
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(merges))
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)  # as GPT-2 has it: the harder case
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special_tokens])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if bos else None,
        eos_token=eos,
        pad_token=eos,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def template(name: str) -> str:
    """Return the text of `tests/templates/<name>.jinja`, a small version of a known family's template."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
