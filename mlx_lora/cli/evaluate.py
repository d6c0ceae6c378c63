"""Measure a model with and without an adapter on a data file, side by side; or what an adapter made it forget.

python -m mlx_lora evaluate --model DIR --adapter-path my-adapter --data data/alpaca/valid.jsonl --json
python -m mlx_lora evaluate --model DIR --adapter-path my-adapter --data questions.jsonl --show 20 --report answers.html
python -m mlx_lora evaluate --model DIR --adapter-path my-adapter                      the rows that the run held out
python -m mlx_lora evaluate --objective embed --model DIR --adapter-path my-adapter --data pairs.jsonl --corpus notes
python -m mlx_lora evaluate --model DIR --adapter-path my-adapter --data my-data --forgetting --report forgetting.html

With --tasks, --metric or --judge it scores a base and adapters on tasks of lm-eval, and on rows of your own:

python -m mlx_lora evaluate --model DIR --tasks arc_easy hellaswag --adapter mine=my-adapter --limit 200
python -m mlx_lora evaluate --model DIR --tasks my-task.yaml --adapter a=runs/a --adapter b=runs/b --report scores.html
python -m mlx_lora evaluate --model DIR --data questions.jsonl --metric exact_match rouge_l --adapter mine=my-adapter
python -m mlx_lora evaluate --model DIR --data questions.jsonl --judge mlx-community/Qwen3-4B-4bit --adapter mine=my-adapter
"""

from __future__ import annotations

import math
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click

from mlx_lora.api import options as flags
from mlx_lora.api.evaluate import (
    CHAT,
    TEXT,
    EvaluationRequest,
    TasksRequest,
    check_evaluation,
    check_tasks,
    measure_forgetting,
    measure_loss,
    measure_tasks,
    settings_of_run,
    verdict_rows,
    with_settings_of_run,
    with_settings_of_runs,
    write_page,
)
from mlx_lora.api.texts import measure_embeddings
from mlx_lora.cli import PAGES
from mlx_lora.config.fields import flag_of
from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import UNITS
from mlx_lora.config.rules import check_options
from mlx_lora.config.settings import DataSettings, TrainSettings
from mlx_lora.engine.adapter_store import adapter_sources
from mlx_lora.models.load import load_base
from mlx_lora.parallel.ranks import sharing_ranks
from mlx_lora.parallel.strategy import dividing_flag
from mlx_lora.reports.run_report import (
    REPORT_FILE,
    keep_evaluation,
    label_tables,
    loss_words,
    read_report,
    shown_evaluation,
    write_evaluation_page,
)
from mlx_lora.reports.sweep_page import write_task_page
from mlx_lora.trainer.callbacks import MOST_SHOWN
from mlx_lora.trainer.checkpoint import lock_holder
from mlx_lora.trainer.guards import interrupt_flag
from mlx_lora.utils import console, device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_adapter
from mlx_lora.utils.text import this_command, words_of

STOPPING = "Stopping; what is measured so far is printed. Press Ctrl-C again to quit at once"
STOPPED = "Interrupted: these figures are of a part of the data"
STOPPING_TASKS = "Stopping; nothing is measured yet that could be compared. Press Ctrl-C again to quit at once"
OF_TASKS = ("--tasks", "--metric", "--judge")
OF_TASKS_ONLY = {"fewshot": "--num-fewshot", "apply_chat_template": "--apply-chat-template"}
SEVERAL = ("--tasks", "--metric", "--adapter", "--adapter-path")  # take all the values that follow them

# What --json prints: of a loss, of --forgetting, and of --objective embed.
LOSSES = {
    "loss": "number|null: mean per trained token, of the adapter if there is one",
    "perplexity?": "number|null: exp(loss)",
    "supervised_tokens?": "integer: that were measured",
    "answers?": "integer: that were rewarded, instead of tokens",
    "rows": "integer: that were measured",
    "model": "string: the base",
    "adapter_path": "string|null: as it was given",
    "data": "string|null: as it was given",
    "base_loss?": "number|null: of the base without the adapter",
    "base_perplexity?": "number|null: exp(base_loss)",
    "change?": "object: of the loss from base to adapter: change, with the ends low and high of its 95% interval, and rows",
    "right?": "object|null: with --show, of the answers that can be checked: right, of, base (right answers of the base)",
    "examples?": "array: with --show, of each question: question, expected, base, adapter (the answers), base_right, right",
    "near_training?": "object: how many of the rows nearly repeat training rows, which makes the figures void",
    "partial?": "boolean: whether it was interrupted",
}
FORGOTTEN = {
    "model": "string: the base",
    "adapters": "object: name -> folder",
    "sets": "object: task, general text and general chat -> source, and adapters: name -> base_loss, loss, change, kl, verdict",
    "probes?": "object: questions that were asked, and right: how many each model answers",
    "partial": "boolean: whether it was interrupted",
}
FOUND = {
    "rows": "integer: pairs that were measured",
    "queries?": "integer: that searched",
    "documents?": "integer: that were searched in",
    "model": "string: the base",
    "adapter_path": "string|null: as it was given",
    "data": "string|null: as it was given",
}


class EvaluateCommand(flags.SettingsCommand):
    """The command; with --tasks, --metric or --judge it is `tasks_command`, which has options of its own."""

    def chosen(self, args: Sequence[str]) -> click.Command:
        """Return the command that these arguments are for."""
        return tasks_command if any(arg.partition("=")[0] in OF_TASKS for arg in args) else self

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        command = self.chosen(args)
        return (super() if command is self else command).make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


@click.command(cls=EvaluateCommand)
@flags.settings_options(
    "model",
    "data",
    "objective",
    leave_out=("decode_weights", "valid_fraction", "shared_prefix", "ask", "rephrase", "rephrase_model"),
)
@flags.adapter_options(help="Adapter folder, or hub id, to put on the model.")
@click.option("--batch-tokens", type=click.IntRange(min=2), default=None, help="Tokens per batch, padding included.")
@click.option(
    *OF_TASKS,
    multiple=True,
    expose_value=False,
    metavar="NAME ...",
    help="Score answers to tasks, or to --data, and compare adapters; `mlx-lora evaluate --tasks list --help` has the options.",
)
@click.option(
    "--forgetting", is_flag=True, help="Compare with the base on --data, general text and chat, and probe questions."
)
@click.option("--against", multiple=True, help="With --forgetting: another adapter to measure; may be repeated.")
@click.option("--general-text", type=str, default=None, help="With --forgetting: data instead of the built-in texts.")
@click.option("--general-chat", type=str, default=None, help="With --forgetting: data instead of the built-in chats.")
@click.option("--report", type=str, default=None, help="Write an HTML page with the results to this file.")
@click.option(
    "--show", type=click.IntRange(min=0), default=None,
    help="Ask base and adapter this many of the questions, and show their answers (default: 5 on a terminal and with "
    "--report, else 0).",
)  # fmt: skip
@click.option("--corpus", type=str, default=None, help="embed: files or folder with more documents to search in.")
@flags.setting_option("shard_base")
@flags.setting_option("offload_base")
@flags.json_option(LOSSES, FORGOTTEN, FOUND)
def main(
    adapter: flags.OneAdapter, batch_tokens: int | None, forgetting: bool, report: str | None, show: int | None, as_json: bool,
    **given: Any,
) -> int:  # fmt: skip
    """Measure loss and perplexity of base and adapter on --data, or with --forgetting what the adapter made the model forget.

    Without --data, the rows that the adapter's run held out are measured.
    """
    only = {name: given.pop(name) for name in ("against", "general_text", "general_chat")}
    corpus = given.pop("corpus")
    settings = train_settings(given)
    options = {**given, **only, "corpus": corpus, "forgetting": forgetting, "report": report, "show": show or None}
    check_options("evaluate", options | {"adapter_path": adapter.adapter_path})
    page = flags.report_page(report)
    folder, held_out = adapter.folder(), not settings.data.data
    if forgetting and folder is not None:
        general = {TEXT: only["general_text"], CHAT: only["general_chat"]}
        general = {name: source for name, source in general.items() if source}
        more = [resolve_adapter(flags.adapter_source(one)) for one in only["against"]]
        settings = settings_of_run(folder, given) if held_out else with_settings_of_run(settings, given, folder)
        against = [one for one in more if one]
        asked = EvaluationRequest(folder, against, general, adapter.ignore_fingerprint, batch_tokens, 0, held_out)
        return _forgetting(settings, asked, page, as_json)
    facts = {"adapter_path": adapter.adapter_path, "data": settings.data.data}
    if settings.objective.objective == "embed":
        base = load_base(settings.model)
        found = measure_embeddings(settings, base, folder, adapter.ignore_fingerprint, corpus, given, batch_tokens)
        console.print_json(found | facts) if as_json else print_retrieval(found, folder is not None)
        return 0
    if held_out:
        settings = settings_of_run(folder, given)
    check_evaluation(settings, folder, show or 0)
    check_options("evaluate", {**settings.to_flat(), "report": report})
    if not held_out:
        settings = with_settings_of_run(settings, given, folder)
    if show is None and not (page is not None or (sys.stdout.isatty() and not as_json)):
        show = 0  # answers take long, and a script asks for them
    with sharing_ranks(settings.loop.shard_base, console.describe_error) as ranks, interrupt_flag(STOPPING) as stopped:
        base = load_base(settings.model, read=not dividing_flag(settings.loop))
        asked = EvaluationRequest(folder, (), {}, adapter.ignore_fingerprint, batch_tokens, show, held_out, stopped)
        result = measure_loss(settings, base, asked, ranks)
        if ranks.leads:
            facts = {**result, **facts, "data": settings.data.data}
            console.print_json(facts) if as_json else print_loss(settings, facts)
            if "loss" in facts:
                _keep(facts | {"held_out": held_out}, folder, page)
    return 130 if result.get("partial") else 0


def _write(page: Path, write: Callable[..., None], facts: dict[str, Any]) -> None:
    """Write the page of --report."""
    write(page, facts, this_command(), device.current_device().header())
    console.echo(f"page   {page}")


def print_retrieval(found: dict[str, Any], compared: bool) -> None:
    """Print how well vectors find documents; `compared`: those of an adapter, beside the base's."""
    measured = [name for name, value in found.items() if isinstance(value, float) and not name.startswith("base_")]
    shown = {"base": "base_", "adapter": ""} if compared else {"model": ""}
    print_table(
        [{"measure": words_of(name)} | {who: _figure(found[of + name], 4) for who, of in shown.items()} for name in measured]
    )  # fmt: skip
    if "queries" in found:
        click.echo(f"{found['queries']:,} queries in {found['documents']:,} documents")


def _keep(facts: dict[str, Any], adapter: Path | None, page: Path | None) -> None:
    """Write the page of --report, and keep whole results in the folder of the adapter's run, with its report page."""
    if page is not None:
        _write(page, write_evaluation_page, facts)
    if adapter is None or "base_loss" not in facts or facts["partial"] or not (adapter / "run.yaml").is_file():
        return
    if lock_holder(adapter) is not None:
        console.echo(f"Note: the run in {adapter} goes on, so these results are not kept there")
        return
    try:
        keep_evaluation(adapter, facts)
        if (report := read_report(adapter)) is not None:
            report.write(adapter)
            console.echo(f"report {adapter / REPORT_FILE}: {report.verdict['headline']}")
    except OSError as error:
        console.echo(f"Note: these results cannot be kept in {adapter}: {error.strerror}")


def _forgetting(settings: TrainSettings, asked: EvaluationRequest, page: Path | None, as_json: bool) -> int:
    """Measure and print what adapters made the model forget, and return the exit code."""
    base = load_base(settings.model)
    with interrupt_flag(STOPPING) as stopped:
        facts = measure_forgetting(settings.data, base, replace(asked, stopped=stopped)) | {"partial": stopped()}
    if page is not None and facts["sets"]:
        _write(page, write_page, facts)
    if as_json:
        console.print_json(facts)
    elif facts["sets"]:
        print_table(verdict_rows(facts))
    if facts["partial"]:
        console.echo(STOPPED)
    return 130 if facts["partial"] else 0


def print_loss(settings: TrainSettings, result: dict[str, Any]) -> None:
    """Print what `measure_loss` found."""
    if result.get("partial") and "loss" not in result:
        console.echo("Interrupted before anything was measured")
        return
    sampled = settings.objective.samples  # then the loss is minus the reward
    labeled = settings.objective.row.scores_texts  # which train no token
    unit_name = "answers" if "answers" in result else "supervised_tokens"
    aside = (unit_name, "rows", "model", "base_loss", "base_perplexity")
    words = ", ".join(
        f"{words_of(name)} {_figure(value, 3 if name == 'perplexity' else 4)}"
        for name, value in result.items()
        if isinstance(value, float) and name not in aside and (name != "loss" or not sampled)
    )
    unit = UNITS[settings.objective.records][: -1 if result["rows"] == 1 else None]
    for line in side_by_side(shown_evaluation(result)) if "examples" in result else ():
        click.echo(line)
    counted_tokens = "" if labeled else f"{result[unit_name]} {words_of(unit_name)} in "
    click.echo(f"{words}, {counted_tokens}{result['rows']} {unit}")
    for title, rows in label_tables(result):
        click.echo(f"\n{title[0].upper()}{title[1:]}")
        print_table(rows)
    if "base_loss" in result:
        click.echo(loss_words(result))
    if result.get("partial"):
        console.echo(STOPPED)


def side_by_side(found: Mapping[str, Any]) -> list[str]:
    """Return lines with question, expected answer and the models' answers under each other, and how many are right.

    Args:
        found: as `shown_evaluation` returns it.
    """
    lines, marks = list[str](), {None: "", True: "  (right)", False: "  (not right)"}
    for number, row in enumerate(found["rows"], 1):
        said = [(name, *one) for name, one in zip(found["models"], row["said"], strict=True)]
        said = [("question", row["question"], None), ("expected", row["expected"], None), *said]
        for place, (name, text, right) in enumerate(said):
            line = textwrap.shorten(console.printable(text, 10**6), MOST_SHOWN, placeholder=" ...")
            lines.append(f"{'   ' if place else f'{number}. '}{name:<10}{line}{marks[right]}")
    return [*lines, *filter(None, [found["right"]]), ""]


def _figure(value: float, digits: int) -> str:
    """Return a mean in words; `-` if there was nothing to take it of."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def print_table(rows: list[dict[str, str]]) -> None:
    """Print rows of equal columns, each as wide as its widest cell."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for cells in ({name: name for name in rows[0]}, *rows):
        click.echo("  ".join(cells[name].ljust(width) for name, width in widths.items()).rstrip())


# Scores of tasks, and of answers to rows


@click.command(cls=flags.SettingsCommand, several=SEVERAL)
@flags.settings_options("model", "data", leave_out=("valid_fraction", "ask", "rephrase", "rephrase_model"))
@flags.named_adapters_options(" All are measured in the same batches as the base.")
@click.option(
    "--tasks",
    multiple=True,
    metavar="NAME|FILE.yaml ...",
    help="lm-eval's tasks by name, or YAML files; `--tasks list` prints all names.",
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME ...",
    help="How answers to --data are scored: exact_match, number_match, json, rouge_l, tool_calls, math-verify, "
    "regex:PATTERN, json_schema:FILE, or a function as FILE.py:NAME.",
)
@click.option(
    "--schema", default=None, metavar="FILE", help="Let answers to --data be JSON that fits this JSON schema."
)
@click.option(
    "--judge", default=None, help="Another model, which compares each adapter's answers to --data with the base's."
)
@click.option(
    "--num-fewshot",
    "--num-shots",
    "fewshot",
    type=click.IntRange(min=0),
    default=None,
    help="Solved examples before each question of a task [default: as the task says].",
)
@click.option("--limit", type=click.IntRange(min=1), default=None, help="Rows of each task [default: all].")
@click.option(
    "--apply-chat-template", is_flag=True, help="Ask tasks in the form of the chat template, as --data always is."
)
@click.option(
    "-m",
    "--max-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Maximum number of tokens of an answer to --data.",
)
@click.option("--batch-tokens", type=click.IntRange(min=2), default=None, help="Tokens per batch, padding included.")
@click.option(
    "--report", type=str, default=None, help="Write an HTML page with the scores and changed answers to this file."
)
@flags.json_option({
    "tasks": "array: of each task and metric its name, rows, the score of each model, and its difference from the base",
    "model?": "string: the base; missing with --tasks list",
    "seconds?": "number: that it took",
})  # fmt: skip
def tasks_command(
    named: flags.NamedAdapters, tasks: tuple[str, ...], metrics: tuple[str, ...], report: str | None, as_json: bool,
    **given: Any,
) -> int:  # fmt: skip
    """Score --model and each --adapter on --tasks, and on --data by --metric or --judge, and compare them.

    Every adapter is compared with the base on the same rows. A difference is called one only if its 95% interval leaves out 0.
    """  # fmt: skip
    own = {name: given.pop(name) for name in ("judge", "fewshot", "limit", "apply_chat_template", "max_tokens")}
    batch_tokens, schema = given.pop("batch_tokens"), given.pop("schema")
    split = [name.strip() for text in tasks for name in text.split(",") if name.strip()]
    if split == ["list"]:
        check_tasks(TasksRequest(tasks=split))
        from mlx_lora.evaluation.harness import known_tasks  # lm-eval may not be installed

        console.print_json({"tasks": known_tasks()}) if as_json else click.echo("\n".join(known_tasks()))
        return 0
    page = flags.report_page(report)
    settings, sources = train_settings(given), adapter_sources(named.adapters, named.blends)
    if settings.data.data:
        if not split and (useless := [flag for name, flag in OF_TASKS_ONLY.items() if own[name]]):
            raise InputError(f"{', '.join(useless)}: only with --tasks; leave it out")
        folders = [source.folder for source in sources.values() if source.folder]
        settings = with_settings_of_runs(settings, given, folders)
        rows = settings.data
    else:
        if useless := [flag_of(name) for name in given if name in {field.name for field in fields(DataSettings)}]:
            raise InputError(f"{', '.join(useless)}: only with --data, and tasks have their own rows; leave it out")
        rows = None
    asked = TasksRequest(
        split, rows, own["max_tokens"], metrics, own["judge"], own["apply_chat_template"], own["fewshot"], own["limit"],
        sources, named.ignore_fingerprint, batch_tokens, schema=schema,
    )  # fmt: skip
    known, begun = check_tasks(asked), time.monotonic()
    base = load_base(settings.model)
    with interrupt_flag(STOPPING_TASKS) as stopped:
        found = measure_tasks(base, replace(asked, stopped=stopped), known)
    facts = found.to_dict() | {"model": base.model_id, "seconds": round(time.monotonic() - begun, 3)}
    if page is not None:
        _write(page, write_task_page, facts)
    console.print_json(facts) if as_json else click.echo(flags.render(PAGES / "scores.txt", vars(found)))
    return 0
