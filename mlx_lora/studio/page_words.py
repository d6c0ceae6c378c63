"""Say in the page's words what the settings say in the command's: a field's label instead of its flag.

The command shown on the page keeps its flags, and so does anything between backticks.
"""

from __future__ import annotations

import re

from mlx_lora.config.fields import flag_of
from mlx_lora.config.settings import FIELDS

# Labels that are not simply the setting's name.
LABELS = {
    "iters": "Steps",
    "epochs": "Passes over the data",
    "lr_schedule": "Learning rate schedule",
    "max_seq_length": "Longest row, in tokens",
    "mask_prompt": "Train on answers only",
    "batch_size": "Rows per micro-batch",
    "batch_tokens": "Tokens per micro-batch",
    "grad_accumulation_steps": "Micro-batches per step",
    "max_grad_norm": "Largest gradient norm",
    "num_layers": "Adapted blocks, from the last",
    "val_batches": "Batches per validation",
    "valid_fraction": "Share of rows held out",
    "prompt_column": "Column of the prompt",
    "completion_column": "Column of the answer",
    "system_column": "Column of a system prompt",
    "chat_column": "Column of a chat",
    "text_column": "Column of plain text",
    "speaker": "Speaker to learn from",
    "temp": "Sampling temperature",
    "resume_adapter_file": "Start from adapter",
    "loraplus_lr_ratio": "LoRA+ learning rate ratio",
    "rpo_alpha": "RPO alpha",
    "cpo_alpha": "CPO alpha",
    "simpo_gamma": "SimPO gamma",
    "kl_beta": "KL beta",
    "jsd_beta": "JSD beta",
    "grpo_loss": "GRPO loss",
}
# Help whose own words read badly where there are no flags.
HELP = {
    "iters": "Number of optimizer steps, instead of passes over the data.",
    "mask_prompt": "Train on the assistant's turns. Off: on every token, prompts too.",
    "memory_check": "Refuse a run that does not fit by the plan. Off: try it anyway.",
}
_ONLY_THERE = re.compile(r"[;,]? ?\(?(?:also |as )?the flag without a value\)?(?=[,);])|, as convert --bits does")
_FLAG = re.compile(r"`[^`]*`|(?<![\w-])--(no-)?([a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?![\w-])")


def label_of(name: str) -> str:
    """Return what the page calls a setting."""
    return LABELS.get(name) or name.replace("_", " ").capitalize()


def in_page_words(text: str) -> str:
    """Return a message with fields instead of the flags of settings; other flags stay.

    “Steps” and “Passes over the data”: both given; keep one
    """

    def said(found: re.Match[str]) -> str:
        name = (found[2] or "").replace("-", "_")
        if name not in FIELDS:
            return found[0]
        return f"“{label_of(name)}”{' off' if found[1] else ''}"

    return _FLAG.sub(said, text)


def help_words(name: str, text: str) -> str:
    """Return a setting's help without what only a command line has.

    Args:
        name: of the setting.
        text: the help of its flag.
    """
    return HELP.get(name) or in_page_words(_ONLY_THERE.sub("", text))


def fields_in(text: str) -> list[str]:
    """Return the settings whose flags a message names, each once, in its order."""
    names = [found[2].replace("-", "_") for found in _FLAG.finditer(text) if found[2]]
    return [name for name in dict.fromkeys(names) if name in FIELDS and f"--{name}".replace("_", "-") == flag_of(name)]
