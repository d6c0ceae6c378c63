"""Label texts with a classifier, and say which answers to leave to a person.

python -m mlx_lora predict --model DIR --adapter-path my-mails --text "Where is my parcel?"
python -m mlx_lora predict --model DIR --adapter-path my-mails --data new-mails.csv --out sorted.csv --answer-above 0.9
python -m mlx_lora predict --model DIR --adapter-path my-mails --data new-mails.csv --out label-these.csv --doubtful 20
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mlx_lora.api import options as flags
from mlx_lora.api.evaluate import with_settings_of_run
from mlx_lora.api.texts import data_columns, example_of, load_scorer, predicted_records
from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import CLASSIFY
from mlx_lora.config.rules import check_options
from mlx_lora.data.data_sets import all_files
from mlx_lora.data.examples import Fields
from mlx_lora.models.load import load_base
from mlx_lora.objectives.questions import Acting
from mlx_lora.objectives.scored_texts import ERROR
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import counted

FORMS = (".jsonl", ".csv")


@click.command(cls=flags.ShortCommand)
@flags.settings_options("model", leave_out=("decode_weights",))
@flags.adapter_options(help="Adapter folder, or hub id, of a run with --objective classify.", required=True)
@click.option("--text", "texts", multiple=True, help="A text to label; may be repeated.")
@click.option(
    "--image", "images", multiple=True, help="A picture to label, if the model sees pictures; may be repeated."
)
@flags.setting_option("data")
@flags.setting_option("text_column")
@flags.setting_option("chat_column")
@flags.setting_option("max_seq_length")
@flags.setting_option("chat_template")
@click.option(
    "--out",
    type=str,
    default=None,
    help="Write to this .jsonl or .csv file (default: lines of JSON on standard output).",
)
@click.option("--force", is_flag=True, help="Replace --out.")
@click.option(
    "--answer-above",
    type=click.FloatRange(0, 1, max_open=True),
    default=None,
    help="Mark answers that are less likely right than this with ask_a_person; the run's report has a table to choose by.",
)
@click.option(
    "--coverage",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=None,
    help="Also write the labels that have the right one with this probability, such as 0.95.",
)
@click.option(
    "--doubtful",
    type=click.IntRange(min=1),
    default=None,
    help="Write only this many records, those with the most doubtful answers first.",
)
@click.option("--batch-tokens", type=click.IntRange(min=2), default=None, help="Tokens per batch, padding included.")
def main(
    adapter: flags.OneAdapter,
    texts: tuple[str, ...],
    images: tuple[str, ...],
    out: str | None,
    force: bool,
    batch_tokens: int | None,
    **given: Any,
) -> None:
    """Label each --text or --image, or each record of --data, with a classifier."""
    acting, doubtful = Acting(given.pop("answer_above"), given.pop("coverage")), given.pop("doubtful")
    asked = [{"text": one} for one in texts] + [{"image": str(Path(one).expanduser().resolve())} for one in images]
    check_options(
        "predict", {"adapter_path": adapter.adapter_path, "text": (*texts, *images), "data": given.get("data")}
    )
    settings = train_settings({**given, "objective": CLASSIFY})
    path, columns = Path(out).expanduser() if out else None, None
    if path is not None:
        if path.suffix.lower() not in FORMS or not path.parent.is_dir():
            raise InputError(f"--out {out}: give a file that ends in {' or '.join(FORMS)}, in an existing folder")
        read = [] if asked else all_files(settings.data.data or "")
        flags.NewFile(path, force).check(one.path for one in read)
        if path.suffix.lower() == ".csv":
            columns = (
                list({name: None for one in asked for name in one})
                if asked
                else [name for name in data_columns(settings.data) if name != ERROR]
            )
    folder: Any = adapter.folder()
    settings = with_settings_of_run(settings, given, folder)
    examples, plain = [], replace(settings.data, text_column=None, chat_column=None)
    for record in asked:
        if isinstance(found := example_of(record, plain, "image" in record), str):
            raise InputError(f"--text {record['text']!r}: {found}")
        examples.append(found)
    scorer = load_scorer(load_base(settings.model), folder, settings.data, batch_tokens, adapter.ignore_fingerprint)
    if asked:
        answered = zip(asked, scorer.predict(examples, acting), strict=True)
        records: Iterable[tuple[Fields, bool]] = (({**record, **one}, ERROR in one) for record, one in answered)
    else:
        records = predicted_records(scorer, settings.data, acting)
    if doubtful is not None:
        records = sorted(records, key=lambda one: -scorer.doubt(one[0]))[:doubtful]
    if (
        columns is not None
    ):  # those of the answers, and one for the error; JSON also has the probabilities of all labels
        columns = [*dict.fromkeys([*columns, *scorer.columns(acting)]), ERROR]
    done = refused = 0

    def show(record: Fields) -> None:
        click.echo(json.dumps(record, ensure_ascii=False))

    with flags.NewFile(path, True).records(columns) if path else nullcontext(show) as write:
        for record, failed in records:
            done, refused = done + 1, refused + failed
            write(
                record if columns is None else {name: _cell(value) for name, value in scorer.in_columns(record).items()}
            )
    if path is not None:
        console.echo(f"{counted(done, 'text')} in {path}")
    if refused:
        console.echo(f"Note: {counted(refused, 'text')} could not be labeled; the column {ERROR} says why")


def _cell(value: Any) -> Any:
    """Return a value for CSV, in which labels of a text are joined with semicolons."""
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ";".join(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
