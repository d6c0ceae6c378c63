"""Convert a GGUF file or a Hugging Face model into an MLX folder.

python -m mlx_lora convert --model model.gguf --out model-mlx                 GGUF blocks unchanged
python -m mlx_lora convert --model Qwen/Qwen3-0.6B --out qwen3-4bit           4-bit affine, group 64
python -m mlx_lora convert --model DIR --out DIR --no-quantize --dtype bfloat16
python -m mlx_lora convert --model DIR --out DIR --bits 3 --report text.txt   and the loss of quality
python -m mlx_lora convert --model DIR --out DIR --bits 4 --calibrate rows.jsonl --quantizer gptq
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mlx_lora.api.options import ShortCommand, json_option, render
from mlx_lora.cli import PAGES
from mlx_lora.compat.foreign import TOKENIZER
from mlx_lora.config import settings as config
from mlx_lora.config.load import train_settings
from mlx_lora.config.rules import check_options
from mlx_lora.data.load import load_eval_set
from mlx_lora.gguf.weights import Target
from mlx_lora.models.config import names_encoder
from mlx_lora.models.convert import REPORT_TOKENS, Learned, compare_on_text, convert_model
from mlx_lora.models.folder import read_config
from mlx_lora.models.gptq import QUANTIZERS, check_quantizer, learn_quantization
from mlx_lora.models.quantize import MODES, QuantFormat, choose_quantization
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.utils import console
from mlx_lora.utils.device import compute_dtype
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import ModelSource, resolve_model

GENERAL_TEXT = Path(__file__).parents[1] / "data" / "general" / "text.jsonl"


@click.command(cls=ShortCommand)
@click.option("--model", required=True, help="Hub id, local folder or .gguf file.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--bits", type=int, help="Quantize to 2, 3, 4, 5, 6 or 8 bits [default: 4; a GGUF file keeps its own].")
@click.option("--group-size", type=int, help="Number of weights that share a scale: 32, 64 or 128 [default: 64].")
@click.option("--mode", type=click.Choice(MODES), help="Kind of quantization [default: affine].")
@click.option("--no-quantize", is_flag=True, help="Do not quantize: write all weights in --dtype.")
@click.option(
    "--dtype",
    type=click.Choice(config.DTYPES),
    default="auto",
    help="Dtype of float weights and scales; auto: float32 on a CPU, bfloat16 on a GPU.",
)
@click.option("--revision", help="Hub branch, tag or commit of the model.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help=f"Text file: compare perplexity of source and result on its first {REPORT_TOKENS} tokens.",
)
@click.option(
    "--calibrate",
    metavar="DATA",
    help="Learn the quantization on these rows, and report the perplexity beside that of plain rounding.",
)
@click.option(
    "--quantizer",
    type=click.Choice(tuple(QUANTIZERS)),
    help="Which of mlx-lm's learned quantizations, with --calibrate [default: dwq].",
)
@json_option({
    "out": "string: the folder",
    "source": "string: the model that was converted",
    "perplexity?": "object: on a text, of the source and of the converted model",
})  # fmt: skip
@click.option("--trust-remote-code", is_flag=True, help="Let the model's repository run its own code.")
@click.option("--force", is_flag=True, help="Replace an existing model folder.")
def main(model: str, out: Path, revision: str | None, report: Path | None, **flags: Any) -> None:
    """Convert a model into a folder that mlx-lm and mlx-lora load."""
    check_options("convert", flags)
    text, target = None, None
    if report is not None:
        try:
            text = report.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"--report {report}: cannot be read ({error.strerror}); give a text file") from None
        except UnicodeDecodeError:
            raise InputError(f"--report {report}: is not UTF-8; give a text file") from None
        if not text.strip():
            raise InputError(f"--report {report}: is empty; give a text file")
    if flags["no_quantize"]:
        target = "float"
    elif any(flags[name] is not None for name in ("bits", "group_size", "mode")):
        target = choose_quantization(flags["bits"], flags["group_size"], flags["mode"])
    dtype, trust = compute_dtype(flags["dtype"]), flags["trust_remote_code"]
    source = resolve_model(model, revision, trust_remote_code=trust)
    measured = "--report" if text is not None else "--calibrate" if flags["calibrate"] else None
    if measured and source.kind == "folder" and names_encoder(read_config(source.path, trust)):
        raise InputError(f"{measured}: {source.model_id} is an encoder, which predicts no tokens; leave it out")
    learned = _learned(source, target, flags)
    if learned and text is None:
        text = "\n\n".join(row["text"] for row in map(json.loads, GENERAL_TEXT.read_text("utf-8").splitlines()))
    conversion = convert_model(
        source,
        out,
        target=learned or target,
        dtype=dtype,
        force=flags["force"],
        measure=report is not None,
        trust_remote_code=trust,
    )
    result = {"out": str(out), "source": source.model_id, **conversion.summary()}
    console.echo(render(PAGES / "convert.txt", {"out": out, "made": conversion}))
    if text is not None:
        plain = learned.quantization if learned else None
        figures = result["perplexity"] = compare_on_text(source, out, text, trust, plain)
        rounded = f", {figures['rounded']:.4f} by plain rounding" if "rounded" in figures else ""
        console.echo(
            f"  perplexity on {figures['tokens']} tokens of {report or 'general texts'}: {figures['source']:.4f} source in float, "
            f"{figures['converted']:.4f} converted ({figures['converted'] / figures['source'] - 1:+.2%}){rounded}"
        )
    if flags["as_json"]:
        console.print_json(result)


def _learned(source: ModelSource, target: Target | None, flags: dict[str, Any]) -> Learned | None:
    """Return the quantization that is learned; None: it is rounded.

    Raises:
        InputError: it is not a float folder, the quantizer cannot do it, or there are no rows.
    """
    data, name = flags["calibrate"], flags["quantizer"] or "dwq"
    if data is None:
        return None
    if source.kind == "gguf":
        raise InputError(
            f"--calibrate: {source.path} is a GGUF file; convert it with --no-quantize first, and calibrate that"
        )
    config = read_config(source.path, flags["trust_remote_code"])
    if "quantization" in config or "quantization_config" in config:
        raise InputError(f"--calibrate: {source.path} is quantized already; give the float model that it was made from")
    quantization = target if isinstance(target, QuantFormat) else choose_quantization(None, None, None)
    check_quantizer(name, config, quantization)
    tokenizer = TOKENIZER.of(load_folder_tokenizer(source.path, config, flags["trust_remote_code"]))
    rows = load_eval_set(data, train_settings({"data": data}).data, tokenizer)
    several = [rows.row(number)[0] for number in range(len(rows))]
    return Learned(quantization, lambda model, config: learn_quantization(model, config, quantization, name, several))
