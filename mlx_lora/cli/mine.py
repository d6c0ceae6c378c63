"""Find documents that look like answers and are none, to train embeddings with.

python -m mlx_lora mine --model DIR --data pairs.jsonl --corpus notes --count 3 --out with-negatives.jsonl
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_lora.api import options as flags
from mlx_lora.api.texts import MineOptions, mine
from mlx_lora.config.load import train_settings
from mlx_lora.data.data_sets import all_files
from mlx_lora.data.pairs import passage_files, read_eval_pairs, read_passages
from mlx_lora.models.load import load_base
from mlx_lora.objectives.embed import open_embedder
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import counted


@click.command(cls=flags.ShortCommand)
@flags.settings_options("model", leave_out=("decode_weights",))
@flags.setting_option("data")
@flags.setting_option("prompt_column")
@flags.setting_option("completion_column")
@flags.setting_option("max_seq_length")
@flags.setting_option("pooling")
@flags.setting_option("query_prompt")
@flags.setting_option("document_prompt")
@flags.adapter_options(help="Adapter folder, or hub id, to put on the model; its pooling and prompts are used.")
@click.option("--corpus", type=str, default=None, help="Files or folder with more documents to search in.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON-lines file to write.")
@click.option(
    "--count", "negatives", type=click.IntRange(min=1), default=5, show_default=True,
    help="Negatives to add to each pair, at most.",
)  # fmt: skip
@click.option(
    "--skip", type=click.IntRange(min=0), default=0, show_default=True,
    help="Leave out this many of the nearest documents, which are often answers that nobody marked.",
)  # fmt: skip
@click.option(
    "--margin", type=click.FloatRange(min=0, max=1), default=0.05, show_default=True,
    help="Leave out documents that are nearly as near as the query's own: with a cosine above (1 - this) times its cosine.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace --out.")
@flags.json_option({
    "rows": "integer: of --data",
    "with_negatives": "integer: rows that have some now",
    "negatives": "integer: that were found",
    "kept": "integer: that the data had before",
    "out": "string: the file",
})  # fmt: skip
@flags.as_one("how", MineOptions)
@flags.as_one("file", flags.NewFile)
def main(
    adapter: flags.OneAdapter, corpus: str | None, file: flags.NewFile, how: MineOptions, as_json: bool, **given: Any
) -> None:
    """Write the queries of --data and their documents, each with its negatives and the nearest documents that are not its own."""
    settings = train_settings(given | {"objective": "embed"})
    read = all_files(settings.data.data) if settings.data.data else []
    file.check(one.path for one in [*read, *(passage_files(corpus) if corpus else [])])
    base = load_base(settings.model)
    embedder = open_embedder(settings, base, adapter.folder(), adapter.ignore_fingerprint, given)
    rows, scored = read_eval_pairs(settings.data, embedder.form)
    if scored:
        raise InputError(f"--data {settings.data.data}: its pairs have scores; give queries and their documents")
    more = [one.text for one in read_passages(corpus)] if corpus else []
    with file.records() as write:
        mined = mine(embedder, rows, more, how, write)
    if as_json:
        facts = {"rows": len(rows.pairs), "with_negatives": mined.with_some, "negatives": mined.found}
        console.print_json(facts | {"kept": mined.kept, "out": str(file.out)})
        return
    own = f" and {mined.kept:,} of the data's own" if mined.kept else ""
    found, rows_in = counted(mined.found, "negative"), counted(len(rows.pairs), "row")
    click.echo(f"{found}{own} for {mined.with_some:,} of {rows_in} in {file.out}")
