"""Score a base and adapters on tasks of lm-eval, and on rows of your own: `mlx-lora evaluate` with --tasks or --metric.

python -m mlx_lora evaluate --model DIR --tasks arc_easy hellaswag --adapter mine=my-adapter --limit 200
python -m mlx_lora evaluate --model DIR --tasks my-task.yaml --adapter a=runs/a --adapter b=runs/b --report scores.html
python -m mlx_lora evaluate --model DIR --data questions.jsonl --metric exact_match rouge_l --adapter mine=my-adapter
python -m mlx_lora evaluate --model DIR --data questions.jsonl --judge mlx-community/Qwen3-4B-4bit --adapter mine=my-adapter
"""

from __future__ import annotations

import time
from dataclasses import fields
from typing import Any

import click

from mlx_lora.api.evaluate_tasks import TasksRequest, check_tasks, measure_tasks
from mlx_lora.api.run_data import with_settings_of_runs
from mlx_lora.cli import options as flags
from mlx_lora.config.fields import flag_of
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import DataSettings
from mlx_lora.evaluation.paired import TaskResults
from mlx_lora.models.load import load_base
from mlx_lora.reports.task_page import write_task_page
from mlx_lora.serving.adapter_store import adapter_sources
from mlx_lora.trainer.guards import interrupt_flag
from mlx_lora.utils import console, device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import this_command

SEVERAL = ("--tasks", "--metric", "--adapter", "--adapter-path")  # take all the values that follow them
LIST = "list"
STOPPING = "Stopping; nothing is measured yet that could be compared. Press Ctrl-C again to quit at once"


class TasksCommand(flags.SettingsCommand):
    """The command, whose --tasks takes all the names that follow it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(flags.repeated(args, SEVERAL)))


OF_TASKS_ONLY = {"fewshot": "--num-fewshot", "apply_chat_template": "--apply-chat-template"}


@click.command(cls=TasksCommand)
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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    named: flags.NamedAdapters, tasks: tuple[str, ...], metrics: tuple[str, ...], report: str | None, as_json: bool,
    **options: Any,
) -> int:  # fmt: skip
    """Score --model and each --adapter on --tasks, and on --data by --metric or --judge, and compare them.

    Every adapter is compared with the base on the same rows. A difference is called one only if its 95% interval leaves out 0.
    """  # fmt: skip
    own = {name: options.pop(name) for name in ("judge", "fewshot", "limit", "apply_chat_template", "max_tokens")}
    batch_tokens = options.pop("batch_tokens")
    split = [name.strip() for text in tasks for name in text.split(",") if name.strip()]
    if split == [LIST]:
        print_names(as_json)
        return 0
    page = flags.report_page(report)
    given = flags.given(options)
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
        sources, named.ignore_fingerprint, batch_tokens,
    )  # fmt: skip
    known = check_tasks(asked)
    begun = time.monotonic()
    base = load_base(settings.model)
    with interrupt_flag(STOPPING) as stopped:
        found = measure_tasks(base, TasksRequest(**{**vars(asked), "stopped": stopped}), known)
    facts = found.to_dict() | {"model": base.model_id, "seconds": round(time.monotonic() - begun, 3)}
    if page is not None:
        write_task_page(page, facts, this_command(), device.current_device().header())
        console.echo(f"page   {page}")
    if as_json:
        console.print_json(facts)
    else:
        print_scores(found)
    return 0


def print_names(as_json: bool) -> None:
    """Print the names of all tasks of lm-eval."""
    check_tasks(TasksRequest(tasks=[LIST]))
    from mlx_lora.evaluation.harness import known_tasks  # lm-eval may not be installed

    names = known_tasks()
    if as_json:
        console.print_json({"tasks": names})
        return
    for name in names:
        click.echo(name)


def print_scores(found: TaskResults) -> None:
    """Print the scores of each task, and a sentence about each comparison."""
    for score in found.scores:
        arrow = "" if score.better else ", lower is better"
        click.echo(f"{score.task}: {score.metric} of {score.rows} rows{arrow}")
        width = max(map(len, score.scores))
        for name, one in score.scores.items():
            error = "" if one.error is None else f" ± {one.error:.4f}"
            compared = score.compared.get(name)
            words = f"  {compared.words()}" if compared else ""
            click.echo(f"  {name.ljust(width)}  {one.value:.4f}{error}{words}")
    for line in found.notes:
        click.echo(f"Note: {line}")
