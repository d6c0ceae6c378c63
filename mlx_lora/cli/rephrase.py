"""Write other wordings of the questions in a data file, to look at and edit before training.

python -m mlx_lora rephrase --model DIR --data faq.csv --out faq-3.csv
python -m mlx_lora rephrase --model http://127.0.0.1:1234/v1 --data faq.csv --out faq-3.csv --number 5
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from mlx_lora.api import options as flags
from mlx_lora.config.defaults import UPDATES_OF_WORDINGS, epochs_for, rows_per_step
from mlx_lora.config.load import train_settings
from mlx_lora.data.data_sets import find_sets
from mlx_lora.objectives.rephrase import read_questions, rephrase
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import command_line

TABLES = (".csv", ".tsv", ".xlsx")


@click.command(cls=flags.ShortCommand)
@flags.settings_options("model", leave_out=("decode_weights",))
@flags.setting_option("data")
@flags.setting_option("data_format")
@flags.setting_option("prompt_column")
@flags.setting_option("completion_column")
@flags.setting_option("chat_column")
@flags.setting_option("turn_names")
@flags.setting_option("seed")
@click.option("--number", type=click.IntRange(1, 100), default=3, show_default=True, help="Wordings of each question.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="File to write: .csv for a table, else .jsonl."
)
@click.option("--force", is_flag=True, help="Replace --out.")
@flags.as_one("file", flags.NewFile)
def main(file: flags.NewFile, number: int, **given: Any) -> None:
    """Write the records of --data, each followed by itself with other wordings of its question.

    --model is a model, or the address of a server with OpenAI's protocol, such as LM Studio's or Ollama's. Only training
    rows are read.
    """
    settings = train_settings(given)
    read = [one for data in find_sets(settings.data.data or "") for one in data.splits.get("train", ())]
    file.check(one.path for one in read)
    table = all(one.path.suffix.lower() in TABLES for one in read)
    if file.out.suffix.lower() != (form := ".csv" if table else ".jsonl"):
        raise InputError(f"--out {file.out}: the rows of --data are written as {form}; give a name that ends so")
    questions = read_questions(read, settings.data)
    asked = [question for question in questions if question.text]
    lines = rephrase(asked, [number] * len(asked), settings, None)
    records = [record for question in questions for record in question.records()]
    names = list(dict.fromkeys(name for record in records for name in record)) if table else None
    with file.records(names) as write:
        for record in records:
            write(record)
    click.echo("\n  ".join([f"{len(records):,} rows in {file.out}: {lines[0]}", *lines[1:]]))
    rows = rows_per_step(len(asked))  # as a run with --rephrase has them: wordings are no further examples
    epochs = epochs_for(math.ceil(len(records) / rows), UPDATES_OF_WORDINGS)
    command = ["train", "--data", str(file.out), "--batch-size", str(rows), "--epochs", f"{epochs:g}"]
    click.echo(f"Look at them, change what you do not like, and train: {command_line(command)}")
