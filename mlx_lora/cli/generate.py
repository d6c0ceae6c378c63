"""Generate text with a model, with or without an adapter.

python -m mlx_lora generate --model DIR --adapter-path my-adapter --prompt "O Romeo," --max-tokens 64
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import click

from mlx_lora.api import options as flags
from mlx_lora.api.base import TextSettings, image_answer_pieces, text_pieces
from mlx_lora.config.load import train_settings
from mlx_lora.config.rules import check_options
from mlx_lora.data.chat_template import own_template
from mlx_lora.data.data_sets import read_tools
from mlx_lora.data.examples import MOST_CHARACTERS
from mlx_lora.exporters.adapter_folder import check_writes_text, load_adapter, with_limits_of_run
from mlx_lora.models.grammar import read_schema
from mlx_lora.models.load import load_base
from mlx_lora.parallel.ranks import sharing_ranks
from mlx_lora.trainer.fit import strategy_of
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError


@click.command(cls=flags.ShortCommand)
@flags.settings_options("model")
@flags.adapter_options(help="Adapter folder, or hub id, to put on the model.")
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
    "--image",
    "images",
    multiple=True,
    type=click.Path(),
    metavar="FILE|URL",
    help="Picture that the prompt is about; may be given several times. Needs a vision-language model.",
)
@flags.setting_option("max_pixels")
@click.option(
    "--schema", default=None, metavar="FILE", callback=lambda ctx, param, file: read_schema(file) if file else None,
    help="Let the answer be JSON that fits the JSON schema in this file.",
)  # fmt: skip
@flags.text_options(100, TextSettings, top_k=True)
@click.option("--ignore-chat-template", is_flag=True, help="Give the prompt to the model unchanged.")
@flags.setting_option("shard_base")
@flags.setting_option("offload_base")
@flags.json_option({
    "text": "string: the answer",
    "tokens": "integer: of the answer",
    "tokens_per_s": "number: speed of the answer",
    "finish_reason": "string: stop if the model ended it, length if --max-tokens did",
    "prompt_tokens": "integer: of the prompt with its template",
    "model": "string: the base",
})  # fmt: skip
def main(
    adapter: flags.OneAdapter,
    prompt: str,
    how: TextSettings,
    images: tuple[str, ...],
    ignore_chat_template: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Generate the answer to --prompt, or its continuation if the model has no chat template."""
    system_prompt, tools_file, text = given.pop("system_prompt"), given.pop("tools_file"), read_prompt(prompt)
    asked = given | {"image": images, "tools": tools_file, "ignore_chat_template": ignore_chat_template}
    check_options("generate", asked)
    tools, folder = read_tools(tools_file) if tools_file else None, adapter.folder()
    if folder is not None:
        check_writes_text(folder)
    settings = train_settings(given)
    with sharing_ranks(settings.loop.shard_base, console.describe_error) as ranks:
        strategy = strategy_of(settings, ranks)
        base = load_base(settings.model, read=not strategy.divides_base)
        template = load_adapter(base, folder, adapter.ignore_fingerprint).chat_template if folder else None
        if images:
            data = with_limits_of_run(settings.data, given, folder) if folder else settings.data
            pieces = image_answer_pieces(base, text, images, template, system_prompt, how, data.max_pixels)
        else:
            template = None if ignore_chat_template else template or own_template(base.hf_tokenizer)
            strategy.divide(base, settings)
            if strategy.words:
                console.echo(strategy.words)
                strategy.check_same(settings, {"base": base.fingerprint, "prompt": text, **asdict(how)})
            pieces = text_pieces(base, text, template, system_prompt, how, tools, strategy)
        said: list[str] = []
        last: Any = None
        for last in pieces:  # all processes take part, and one prints
            said.append(last.text)
            if ranks.leads and not as_json:
                click.echo(last.text, nl=False)
        if ranks.leads and as_json:
            speed = {
                "tokens": last.generation_tokens,
                "tokens_per_s": last.generation_tps,
                "finish_reason": last.finish_reason,
            }
            facts = {"text": "".join(said), **speed, "prompt_tokens": last.prompt_tokens, "model": base.model_id}
            console.print_json(facts)
        elif ranks.leads:
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
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"--prompt: {len(text):,} characters; give at most {MOST_CHARACTERS:,}")
    if not text:
        raise InputError("--prompt: empty; give some text")
    return text
