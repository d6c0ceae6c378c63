"""Write an adapter, or a model with it, for other programs.

python -m mlx_lora export --model DIR --adapter-path my-adapter --to peft --out peft-adapter     PEFT, transformers
python -m mlx_lora export --model DIR --adapter-path my-adapter --to mlx-lm --out mlx-adapter    stock mlx-lm, any method
python -m mlx_lora export --model DIR --adapter-path my-adapter --to hf   --out merged           transformers
python -m mlx_lora export --model DIR --adapter-path my-adapter --to gguf-adapter --out a.gguf   llama.cpp --lora
python -m mlx_lora export --model DIR --adapter-path my-adapter --to gguf --out m.gguf           llama.cpp, LM Studio
python -m mlx_lora export --model DIR --adapter-path my-adapter --to ollama --out folder         ollama create
python -m mlx_lora export --model DIR --adapter-path my-adapter --to lmstudio --out my-model     LM Studio
python -m mlx_lora export --model DIR --adapter-path my-adapter --to mlx-swift --out folder      apps with mlx-swift-lm

The merged GGUF is F16 unless --gguf-type says otherwise; without --adapter-path it is the model itself.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from mlx_lora.api import options as flags
from mlx_lora.api.export import FORMATS, ExportSettings, commands, write_export
from mlx_lora.api.fuse import FADED, GainMeter, read_back
from mlx_lora.config.load import train_settings
from mlx_lora.config.rules import check_options
from mlx_lora.data.data_sets import look_at_data
from mlx_lora.gguf.write import DEFAULT_TYPE, GGUF_TYPES, STORED
from mlx_lora.models.load import load_base
from mlx_lora.utils import console


@click.command(cls=flags.ShortCommand)
@flags.settings_options("model", leave_out=("quantized_matmul", "decode_weights"))
@flags.adapter_options(
    help="Adapter folder or hub id, ours, mlx-lm's or PEFT's; optional for gguf and ollama.",
)
@click.option(
    "--to",
    "to",
    type=click.Choice(tuple(FORMATS), False),  # in any case
    required=True,
    help="PEFT or stock mlx-lm adapter, merged Hugging Face folder, llama.cpp adapter, merged GGUF, Ollama's Modelfile, or a model in LM Studio.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder or .gguf file to write; lmstudio: NAME or PUBLISHER/NAME there.",
)
@click.option(
    "--base-id", type=str, default=None, help="Hub id that a PEFT adapter names as its base [default: the base's own]."
)
@click.option(
    "--gguf-type",
    type=str,
    callback=lambda _, __, text: text and text.lower(),
    default=None,
    metavar="[" + "|".join(GGUF_TYPES) + "]",
    help=f"Type of the weights of a merged GGUF; norms and biases stay f32 [default: {DEFAULT_TYPE}].",
)
@click.option(
    "--ollama-base",
    type=str,
    default=None,
    help="Ollama model or .gguf file that a Modelfile applies the adapter to [default: none, the merged model].",
)
@click.option(
    "--data",
    type=str,
    default=None,
    help="Measure on these rows what a merged model keeps of the adapter [default: if --gguf-type is below 16 bits, what "
    "the adapter's run held out].",
)
@click.option("--create", is_flag=True, help="ollama: create the model in Ollama as well, and ask it a question.")
@click.option("--force", is_flag=True, help="Replace what is in --out.")
@click.option(
    "--push-to-hub", type=str, default=None, help="Also upload the result to this hub repository, owner/name."
)
@click.option("--private", is_flag=True, help="Create that repository as private.")
@flags.json_option({
    "to": "string: the format",
    "out": "string: the folder or file",
    "files": "array: what was written, to hand on",
    "next_commands": "array: what uses it in the other program",
    "kept": "number|null: share of the adapter's gain that a merged model has; null if it was not measured, or there is no gain",
})  # fmt: skip
def main(adapter: flags.OneAdapter, data: str | None, as_json: bool, **given: Any) -> None:
    """Write the adapter on --model in another program's format."""
    asked = ExportSettings(**{field.name: given.pop(field.name) for field in fields(ExportSettings)})
    check_options("export", {"data": data, "adapter_path": adapter.adapter_path, **vars(asked)})
    asked.check(bool(adapter.adapter_path))
    folder = adapter.folder()
    in_ollama = asked.to == "ollama" and asked.ollama_base is None
    look_at_data(data)  # refused before the work if it is not there
    settings = train_settings(given).model
    keep_dtype = settings.dtype != "auto"
    base = load_base(
        settings, read=FORMATS[asked.to].holds_base
    )  # a base that ranks share may be too large for this machine
    written = write_export(asked, base, folder, adapter.ignore_fingerprint, keep_dtype)
    del base  # the next lines load models
    kind, rounds = written.gguf_type if FORMATS[asked.to].merged_gguf else "float", written.rounds
    asked = written.settings  # with LM Studio's folder
    scores, qat = written.scores, written.info is not None and written.info.qat
    facts = {"to": asked.to, "out": str(asked.out), "files": [str(path) for path in FORMATS[asked.to].files(written)]}
    facts |= {"next_commands": commands(written), "kept": None}
    del written  # it holds the base
    merged_of = folder if not scores and (in_ollama or asked.to in ("gguf", "hf", "lmstudio")) else None
    if merged_of and not data and not rounds:
        kind = "the base's own numbers" if kind == STORED else kind
        console.echo(f"The merged weights are {kind}, which keeps the update; --data FILE measures it")
    elif merged_of:
        merged = next(asked.out.glob("*.gguf")) if in_ollama else asked.out
        gain = GainMeter(settings, merged_of, data, adapter.ignore_fingerprint).compare(read_back(merged))
        console.echo(f"{asked.out}: {gain.words()}")
        facts["kept"] = gain.kept
        if gain.kept is not None and gain.kept < FADED:
            ways = ["--gguf-type q8_0 or f16 (larger)"] if FORMATS[asked.to].merged_gguf else []
            ways += [] if qat else ["--to gguf-adapter or peft (the adapter apart from the base)"]
            more = f". To keep more: {', or '.join(ways)}" if ways else ""
            console.echo(f"Warning: that is less than {FADED:.0%}{more}")
    if as_json:
        console.print_json(facts)
