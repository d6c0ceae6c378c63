"""Train an adapter.

python -m mlx_lora.train --model HuggingFaceTB/SmolLM2-135M-Instruct --data data/alpaca --adapter-path my-adapter
python -m mlx_lora.train --model model.Q4_1.gguf --data tiny-shakespeare --adapter-path bard --iters 200
python -m mlx_lora.train --config run.yaml --learning-rate 1e-4
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.inject import adapter_parameters
from mlx_lora.artifacts.adapter import CONFIG_FILE, save_adapter
from mlx_lora.artifacts.checkpoint import Checkpoint
from mlx_lora.artifacts.run_folder import (
    RunFolder,
    check_continuation,
    check_room,
    find_checkpoint,
    first_day,
    found_by_first,
    identity_of,
    own_folder,
    write_settings,
)
from mlx_lora.data.encode import EncodedSet
from mlx_lora.data.loading import DataSplits, load_data
from mlx_lora.models.load import Base, check_token_ids, load_base
from mlx_lora.runs.composition import (
    adapt,
    adapt_for_test,
    choose_forms,
    choose_step,
    make_step,
    shape_to_plan,
    training_plan,
    validation_plan,
)
from mlx_lora.runs.report_page import RunPage
from mlx_lora.runs.reporting import leave_card, reporting
from mlx_lora.runs.words import describe_run, interrupted_line, outcome_line
from mlx_lora.settings import flags
from mlx_lora.settings.config import TrainSettings
from mlx_lora.settings.resolve import train_settings
from mlx_lora.settings.settings_file import read_settings
from mlx_lora.system import console, device
from mlx_lora.system.distributed import Ranks, leads, together
from mlx_lora.system.errors import InputError
from mlx_lora.system.files import check_writable
from mlx_lora.system.supervise import run_supervised
from mlx_lora.training.agreement import check_one_run, take_first_ranks
from mlx_lora.training.loggers import reporting_sinks
from mlx_lora.training.losses import choose_loss
from mlx_lora.training.memory_guard import MemoryGuard
from mlx_lora.training.run_fit import check_base_fits, fit_run
from mlx_lora.training.state import Diverged, Position, restore_arrays
from mlx_lora.training.step import Step
from mlx_lora.training.trainer import Outcome, mean_loss, total_steps, train


@click.command(cls=flags.Command)
@flags.config_option
@flags.settings_options("model", "data", "adapter", "optimizer", "loop")
def main(config_file: str | None, **options: Any) -> int:
    """Train a LoRA adapter on --data over the frozen --model and write it to --adapter-path."""
    given = flags.given(options)
    settings = train_settings(given, read_settings(config_file, given, console.echo))
    if settings.loop.max_restarts:
        run_supervised(settings.loop.max_restarts)
    if settings.loop.short_buffers:
        device.restart_with_short_buffers()
    with together(console.describe_error) as ranks:
        return run(settings, ranks)


def run(settings: TrainSettings, ranks: Ranks | None) -> int:
    """Do what the settings ask for, in this process or as one of several, and return the exit code."""
    check_run_folder(settings, ranks)
    if wants_training(settings):
        check_base_fits(settings)
    base = load_base(settings.model)
    if not wants_training(settings):
        adapt_for_test(settings, base)
    today = first_day(settings.loop, ranks)
    splits = load_data(settings.data, base.hf_tokenizer, settings.loop.seed, console.echo, today)
    if splits.chat_day:  # for run.yaml, and so for --resume on another day
        settings = replace(settings, data=replace(settings.data, chat_date=splits.chat_day.isoformat()))
    check_test_split(settings, splits)
    for rows in filter(None, (splits.train, splits.valid, splits.test)):
        check_token_ids(base, int(rows.tokens.max(initial=0)), f"--data {settings.data.data}")
    console.echo(device.current_device().header())
    console.echo(f"Base: {base.model_id}: {base.describe()}")
    console.echo(splits.report.render(color=console.wants_color()))
    outcome = None
    if wants_training(settings):
        with own_folder(Path(settings.loop.adapter_path)) if leads(ranks) else nullcontext():
            outcome = run_training(settings, base, splits, ranks)
    if settings.loop.test and not (outcome and outcome.interrupted):
        report_test_loss(settings, base, splits.test, ranks)
    if outcome and outcome.interrupted:
        console.echo(interrupted_line(settings.loop.adapter_path, outcome))
        return 130
    return 0


def wants_training(settings: TrainSettings) -> bool:
    """Train unless only --test was asked for, as in mlx_lm.lora."""
    return not settings.loop.test if settings.loop.train is None else settings.loop.train


def check_run_folder(settings: TrainSettings, ranks: Ranks | None) -> None:
    """Refuse, before anything is loaded, a run whose results could not be written or would overwrite others'."""
    needed = {
        "--model": settings.model.model,
        "--data": settings.data.data,
        "--adapter-path": settings.loop.adapter_path,
    }
    missing = [flag for flag, value in needed.items() if not value]
    alone = [flag for flag, asked in (("--no-train", not wants_training(settings)),
                                      ("--max-restarts", settings.loop.max_restarts)) if asked and ranks]  # fmt: skip
    if alone:
        raise InputError(
            f"{' and '.join(alone)} in {ranks.size} processes: for a single one; start it without a launcher"
        )
    if missing:
        raise InputError(
            f"{', '.join(missing[:-1])}{' and ' if missing[1:] else ''}{missing[-1]} "
            f"{'are' if missing[1:] else 'is'} required (--help says what each takes)"
        )
    if not wants_training(settings):
        if not settings.loop.test:
            raise InputError("--no-train without --test: nothing to do; give --test, or leave --no-train out")
        return
    if not leads(ranks):
        return
    folder = Path(settings.loop.adapter_path)
    check_writable(folder, "--adapter-path", needed_bytes=1_000_000)
    if (folder / CONFIG_FILE).exists() and not settings.loop.force and settings.loop.resume is None:
        raise InputError(
            f"--adapter-path {folder}: already holds an adapter; choose another folder, --resume to go on, or --force to overwrite it"
        )


def check_test_split(settings: TrainSettings, splits: DataSplits) -> None:
    """Refuse --test without test data before the training, not after it."""
    if settings.loop.test and splits.test is None:
        raise InputError(
            f"--test: {settings.data.data} has no test split; add a test file to the folder, or leave --test out"
        )


def run_training(settings: TrainSettings, base: Base, splits: DataSplits, ranks: Ranks | None) -> Outcome:
    """Adapt the base, train, and write the run folder."""
    folder = Path(settings.loop.adapter_path)
    mx.random.seed(settings.loop.seed)
    adapted, info = adapt(settings, base, splits.chat_template)
    forms = choose_forms(settings, base, splits.train, console.echo)
    settings, memory = fit_run(settings, shape_to_plan(settings, base, forms), splits.train, forms.terms)
    loop = settings.loop
    found = found_by_first(lambda: find_checkpoint(loop, console.echo), ranks)
    plan, epochs = training_plan(loop, splits.train, found)
    identity = identity_of(settings, base.fingerprint, splits.train.fingerprint, plan, epochs)
    validation = validation_plan(splits.valid, settings)
    steps = total_steps(plan, loop)
    if found:
        check_continuation(found, identity)
    form, notes = choose_step(settings, base, forms, memory, ranks)
    step = make_step(settings, base, form, steps, ranks)
    agree(ranks, settings, identity, step, base.model)
    if leads(ranks):
        check_room(loop, steps, sum(p.nbytes for p in adapter_parameters(base.model).values()))
    device.set_cache_limit(loop.clear_cache_threshold, memory.budget_bytes)
    device.wire_working_set()
    loggers = reporting_sinks(settings) if leads(ranks) else []
    words = describe_run(settings, base, adapted, plan, steps, notes)
    console.echo("\n".join(words))
    page = None
    if leads(ranks):
        page = RunPage.begin(settings, base, splits, words[0], memory.peak_bytes, goes_on=bool(found))
    run, at = RunFolder(loop, info, identity, ranks), found.position if found else Position()
    begin(run, found, base, step, steps)
    if leads(ranks):
        write_settings(folder, settings)
    at.parts = max(at.parts, loop.batch_parts)
    guard = MemoryGuard(at, memory.budget_bytes, console.echo)

    def save(step_number: int) -> None:
        take_first_ranks(ranks, step, base.model, console.echo)
        run.save(base.model, step, at)
        if page is not None:
            page.write()

    try:
        with (
            run.kept_if_it_fails(),
            reporting(loop, steps, at.taken if found else None, ranks, loggers, console.echo) as (report, shown),
        ):
            outcome = train(
                base.model, step, form.loss.measure, plan, validation, loop, report, shown, save, at, guard, ranks
            )
            best = None if outcome.interrupted else run.put_best(base.model, step, at)
            take_first_ranks(ranks, step, base.model)  # who has the best put back is rank 0
    except Diverged as diverged:
        raise run.roll_back(base.model, step, diverged) from diverged
    if page is not None:
        page.end(outcome.interrupted)
        leave_card(folder, base, info, console.echo)
        console.echo(outcome_line(folder, outcome, best))
    return outcome


def agree(ranks: Ranks | None, settings: TrainSettings, identity: dict[str, Any], step: Step, model: nn.Module) -> None:
    """See that several processes are one run, and give all of them rank 0's parameters; nothing for one process."""
    if ranks is not None:
        check_one_run(ranks, settings, identity)
        take_first_ranks(ranks, step, model, console.echo)


def begin(run: RunFolder, found: Checkpoint | None, base: Base, step: Step, steps: int) -> None:
    """Go on from the checkpoint that was found, or start in a folder without another run's checkpoints."""
    run.clear_leftovers()
    if found:
        taken = found.position.taken
        restore_arrays(step, base.model, found.arrays)
        left = "" if taken < steps else f"; all {steps} steps are done, raise --iters or --epochs for more"
        console.echo(f"Going on from step {taken} ({found.folder}){left}")
        if left and leads(run.ranks):
            save_adapter(Path(run.loop.adapter_path), base.model, run.info)
    elif run.loop.resume is None:
        run.start_anew()


def report_test_loss(settings: TrainSettings, base: Base, test: EncodedSet, ranks: Ranks | None) -> None:
    """Measure and print the loss on the test split."""
    plan = validation_plan(test, settings)
    batches = plan.batches(settings.loop.test_batches)
    chosen = choose_loss(base.model, base.config, settings.loop.kernels)
    loss, tokens = mean_loss(base.model, chosen.measure, batches, ranks)
    console.echo(f"Test loss {loss:.4f}, perplexity {console.perplexity(loss):.3f}, {tokens} supervised tokens")


if __name__ == "__main__":
    main()
