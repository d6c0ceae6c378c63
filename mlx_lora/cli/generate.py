"""Generate text with a model, with or without an adapter.

python -m mlx_lora generate --model DIR --adapter-path my-adapter --prompt "O Romeo," --max-tokens 64
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import click
from mlx_lm.generate import GenerationResponse

from mlx_lora.api.base import TextSettings, text_pieces
from mlx_lora.cli import options as flags
from mlx_lora.config.load import train_settings
from mlx_lora.data.chat_template import own_template
from mlx_lora.data.files import read_tools
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.models.load import load_base
from mlx_lora.parallel.agreement import check_one_run
from mlx_lora.parallel.ranks import sharing_ranks
from mlx_lora.trainer.fit import share_among
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_adapter


@click.command(cls=flags.ShortCommand)
@flags.settings_options("model")
@flags.adapter_option(help="Adapter folder, or hub id, to put on the model.")
@click.option("--adapter-revision", type=str, default=None, help="Hub branch, tag or commit of the adapter.")
@flags.ignore_fingerprint_option
@click.option("-p", "--prompt", type=str, required=True, help="The prompt; - reads standard input.")
@click.option("--system-prompt", type=str, default=None, help="System message for the chat template.")
@click.option(
    "--tools",
    "tools_file",
    default=None,
    metavar="FILE",
    help="Tools that the model may call: a JSON list, or a data file with tools.",
)
@click.option(
    "-m",
    "--max-tokens",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Maximum number of tokens to generate.",
)
@click.option(
    "--temp",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0 always takes the most likely token.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1),
    default=1.0,
    show_default=True,
    help="Sample from the most likely tokens whose probabilities add up to this.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Sample from the k most likely tokens; 0: all.",
)
@click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), default=None, help="Seed of the sampling.")
@click.option("--ignore-chat-template", is_flag=True, help="Give the prompt to the model unchanged.")
@flags.setting_option("shard_base")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    adapter_path: str | None, adapter_revision: str | None, ignore_fingerprint: bool, prompt: str, system_prompt: str | None,
    tools_file: str | None, max_tokens: int,
    temp: float, top_p: float, top_k: int, seed: int | None, ignore_chat_template: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Generate the answer to --prompt, or its continuation if the model has no chat template."""
    text = read_prompt(prompt)
    tools = read_tools(tools_file) if tools_file else None
    how = TextSettings(max_tokens, temp, top_p, top_k, seed)
    adapter = resolve_adapter(adapter_path, adapter_revision)
    settings = train_settings(flags.given(options))
    whole = settings.loop.shard_base == "off"
    with sharing_ranks(settings.loop.shard_base, console.describe_error) as ranks:
        base = load_base(settings.model, read=whole)
        template = load_adapter(base, adapter, ignore_fingerprint).chat_template if adapter else None
        template = None if ignore_chat_template else template or own_template(base.hf_tokenizer)
        _, shared = share_among(settings, base, ranks)
        if shared.words:
            console.echo(shared.words)
            check_one_run(ranks, settings, {"base": base.fingerprint, "prompt": text, **asdict(how)})
        print_text(base.model_id, text_pieces(base, text, template, system_prompt, how, tools), as_json, ranks.leads)


def print_text(model_id: str, responses: Iterable[GenerationResponse], as_json: bool, leads: bool) -> None:
    """Print a text as it is generated, or all of it as one JSON object.

    Args:
        model_id: the name of the model.
        responses: at least one.
        as_json: print the object.
        leads: whether this process prints; others only take part.
    """
    pieces: list[str] = []
    last: Any = None
    for last in responses:
        pieces.append(last.text)
        if leads and not as_json:
            click.echo(last.text, nl=False)
    if leads and as_json:
        speed = {
            "tokens": last.generation_tokens,
            "tokens_per_s": last.generation_tps,
            "finish_reason": last.finish_reason,
        }
        console.print_json({"text": "".join(pieces), **speed, "prompt_tokens": last.prompt_tokens, "model": model_id})
    elif leads:
        click.echo()


def read_prompt(prompt: str) -> str:
    """Return the prompt's text, from standard input for `-`.

    Raises:
        InputError: it is empty, or not UTF-8.
    """
    try:
        text = sys.stdin.buffer.read().decode() if prompt == "-" else prompt
        text.encode()  # bytes of an argument that are not UTF-8 become lone surrogates
    except UnicodeError:
        raise InputError("--prompt: not UTF-8; give it as UTF-8 text") from None
    if not text:
        raise InputError("--prompt: empty; give some text")
    return text
