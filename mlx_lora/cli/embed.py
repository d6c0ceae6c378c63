"""Compute the vectors of texts, for search.

python -m mlx_lora embed notes --model DIR --adapter-path my-adapter --out notes.npy        the passages of a folder of Markdown
python -m mlx_lora embed questions.jsonl --model DIR --query --out questions.parquet
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click
import numpy as np

from mlx_lora.api import options as flags
from mlx_lora.config.load import train_settings
from mlx_lora.config.rules import check_options
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS
from mlx_lora.data.pairs import passage_files, read_passages
from mlx_lora.models.load import load_base
from mlx_lora.objectives.embed import VectorOptions, open_embedder
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import replacing_file
from mlx_lora.utils.text import counted

SUFFIXES = (".npy", ".parquet")
TEXTS = ".jsonl"  # beside a .npy file


class FileCommand(flags.ShortCommand):
    """A command whose first word may be the file to read."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-"):
            args = ["--data", *args]
        return super().parse_args(ctx, args)


@click.command(cls=FileCommand)
@flags.settings_options("model", leave_out=("decode_weights",))
@flags.setting_option("max_seq_length")
@flags.setting_option("pooling")
@flags.setting_option("query_prompt")
@flags.setting_option("document_prompt")
@flags.adapter_options(help="Adapter folder, or hub id, to put on the model; its pooling and prompts are used.")
@click.option(
    "--data",
    type=str,
    required=True,
    help="File or folder of texts; Markdown and .txt files are divided into passages.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write: .npy or .parquet.")
@click.option(
    "--text-column",
    type=str,
    default=None,
    help="Column of the text [default: text, or a usual name; with --query, first those of queries].",
)
@click.option(
    "--query", is_flag=True, help="The texts are queries, not documents; this chooses the prompt before them."
)
@click.option("--dims", type=click.IntRange(min=1), default=None, help="Keep only the first N numbers of each vector.")
@click.option(
    "--no-normalize", "normalize", is_flag=True, callback=lambda ctx, param, value: not value,
    help="Do not scale the vectors to length one.",
)  # fmt: skip
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=2),
    default=DEFAULT_BATCH_TOKENS,
    show_default=True,
    help="Tokens per batch.",
)
@click.option("--force", is_flag=True, help="Replace --out, and the texts beside it.")
@flags.json_option({
    "texts": "integer: number of vectors",
    "width": "integer: numbers of a vector",
    "model": "string: the base",
    "out": "string: the file",
    "columns": "array: columns that were read",
    "pooling": "string: how a text's vector is made of those of its tokens",
    "adapter_path": "string|null: as it was given",
})  # fmt: skip
@flags.as_one("how", VectorOptions)
@flags.as_one("file", flags.NewFile)
def main(
    adapter: flags.OneAdapter, data: str, file: flags.NewFile, text_column: str | None, query: bool, how: VectorOptions,
    as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Write the vectors of texts: a .npy file with the texts in a .jsonl file beside it, or one .parquet file with both."""
    out = file.out
    if out.suffix not in SUFFIXES:
        raise InputError(f"--out {out}: its name must end in {' or '.join(SUFFIXES)}")
    texts = [out.with_suffix(TEXTS)] if out.suffix == ".npy" else []
    file.check([one.path for one in passage_files(data)], texts)
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise InputError(
            "--out: .parquet requires pyarrow, which is not installed; pip install 'mlx-lora[parquet]', or give a .npy file"
        )
    check_options("embed", given | {"query": query})
    settings = train_settings(given | {"objective": "embed"})
    passages = read_passages(data, text_column, query)
    base = load_base(settings.model)
    embedder = open_embedder(settings, base, adapter.folder(), adapter.ignore_fingerprint, given, how)
    vectors = embedder([one.text for one in passages], query)
    with replacing_file(out) as temporary, temporary.open("wb") as opened:
        if out.suffix == ".npy":
            np.save(opened, vectors)
        else:
            import pyarrow
            import pyarrow.parquet

            table = {
                "text": [one.text for one in passages],
                "file": [one.file for one in passages],
                "embedding": pyarrow.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1]),
            }
            pyarrow.parquet.write_table(pyarrow.table(table), opened)
    for beside in texts:
        with flags.NewFile(beside, True).records() as write:
            for one in passages:
                write({"text": one.text, "file": one.file})
    columns = list(dict.fromkeys(one.column for one in passages if one.column))
    if as_json:
        facts = {
            "texts": len(vectors),
            "width": vectors.shape[1],
            "model": base.model_id,
            "out": str(out),
            "columns": columns,
        }
        console.print_json(facts | {"pooling": embedder.embedder.pooling, "adapter_path": adapter.adapter_path})
    else:
        also = f", and the texts in {texts[0]}" if texts else ""
        of = f"; the column {' and '.join(columns)} was read" if columns else ""
        click.echo(f"{counted(len(vectors), 'vector')} of {vectors.shape[1]} numbers in {out}{also}{of}")
