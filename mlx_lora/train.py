"""Train an adapter.

python -m mlx_lora.train --model HuggingFaceTB/SmolLM2-135M-Instruct --data data/alpaca --adapter-path my-adapter
python -m mlx_lora.train --model model.Q4_1.gguf --data tiny-shakespeare --adapter-path bard --iters 200
python -m mlx_lora.train --config run.yaml --learning-rate 1e-4
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import yaml
from mlx.utils import tree_flatten

from mlx_lora import cli, device
from mlx_lora.adapters.inject import adapter_parameters
from mlx_lora.adapters.methods import PRESETS
from mlx_lora.adapters.setup import Adapted, adapt_model, starting_rank
from mlx_lora.artifacts.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterInfo,
    check_base,
    load_adapter,
    load_factors,
    read_adapter_config,
    save_adapter,
)
from mlx_lora.artifacts.card import CARD_FILE, read_facts, write_card
from mlx_lora.artifacts.checkpoint import Checkpoint, locked
from mlx_lora.artifacts.run_folder import RunFolder, check_continuation, find_checkpoint, identity_of
from mlx_lora.config import DEFAULT_BATCH_TOKENS, AdapterSettings, LoopSettings, TrainSettings, train_settings
from mlx_lora.data.batches import BatchPlan
from mlx_lora.data.encode import EncodedSet
from mlx_lora.data.loading import DataSplits, load_data
from mlx_lora.data.widths import ShapePrice
from mlx_lora.errors import InputError
from mlx_lora.files import check_writable, replacing_file
from mlx_lora.memory import MemoryPlan
from mlx_lora.models.attention import AttentionCall, tiled_attention
from mlx_lora.models.load import Base, load_base
from mlx_lora.supervise import run_supervised
from mlx_lora.training.checkpointing import apply_checkpointing
from mlx_lora.training.guard import MemoryGuard
from mlx_lora.training.losses import Loss, choose_kernels, choose_loss
from mlx_lora.training.method_events import make_events, restart_every, restart_warmup
from mlx_lora.training.optim import build_optimizer
from mlx_lora.training.planning import adapted_shape, check_base_fits, fit_run, gigabytes
from mlx_lora.training.report import Metrics, MetricsFile, make_progress
from mlx_lora.training.state import Diverged, Position, restore_arrays
from mlx_lora.training.step import Step
from mlx_lora.training.trainer import Outcome, mean_loss, total_steps, train


@click.command(cls=cli.Command)
@click.option(
    "-c",
    "--config",
    "config_file",
    type=str,
    help="YAML file of settings, ours, mlx-lm's, Axolotl's or LLaMA-Factory's; flags beat it.",
)
@cli.settings_options("model", "data", "adapter", "optimizer", "loop")
def main(config_file: str | None, **options: Any) -> int:
    """Train a LoRA adapter on --data over the frozen --model and write it to --adapter-path."""
    settings = train_settings(cli.given(options), config_file, cli.echo)
    if settings.loop.max_restarts:
        run_supervised(settings.loop.max_restarts)
    if settings.loop.short_buffers:
        device.restart_with_short_buffers()
    check_run_folder(settings)
    if wants_training(settings):
        check_base_fits(settings)
    base = load_base(settings.model)
    if not wants_training(settings):
        adapt_for_test(settings, base)
    splits = load_data(settings.data, base.hf_tokenizer, settings.loop.seed, cli.echo)
    check_test_split(settings, splits)
    cli.echo(device.current_device().header())
    cli.echo(f"Base: {base.model_id}: {base.describe()}")
    cli.echo(splits.report.render(color=cli.wants_color()))
    outcome = None
    if wants_training(settings):
        with locked(Path(settings.loop.adapter_path)):
            outcome = run_training(settings, base, splits)
    if settings.loop.test and not (outcome and outcome.interrupted):
        report_test_loss(settings, base, splits.test)
    if outcome and outcome.interrupted:
        saved = f"the adapter is saved in {settings.loop.adapter_path}" if outcome.steps else "nothing to save yet"
        cli.echo(f"Interrupted after {outcome.steps} steps; {saved}")
        return 130
    return 0


def wants_training(settings: TrainSettings) -> bool:
    """Train unless only --test was asked for, as in mlx_lm.lora."""
    return not settings.loop.test if settings.loop.train is None else settings.loop.train


def check_run_folder(settings: TrainSettings) -> None:
    """Refuse, before anything is loaded, a run whose results could not be written or would overwrite others'."""
    needed = {
        "--model": settings.model.model,
        "--data": settings.data.data,
        "--adapter-path": settings.loop.adapter_path,
    }
    missing = [flag for flag, value in needed.items() if not value]
    if missing:
        raise InputError(
            f"{' and '.join(missing)}: missing; give a model, a data file and a folder (--help lists the forms)"
        )
    if not wants_training(settings):
        if not settings.loop.test:
            raise InputError("--no-train without --test: nothing to do; give --test, or leave --no-train out")
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


def run_training(settings: TrainSettings, base: Base, splits: DataSplits) -> Outcome:
    """Adapt the base, train, and write the run folder."""
    folder = Path(settings.loop.adapter_path)
    mx.random.seed(settings.loop.seed)
    # Kept with the adapter when it is not the model's own, so that generate renders prompts the same way.
    own_template = splits.chat_template == base.hf_tokenizer.chat_template
    adapted, info = adapt(settings, base, None if own_template else splits.chat_template)
    settings, memory = fit_run(settings, adapted_shape(base.model, base.config, settings), splits.train)
    loop = settings.loop
    found = find_checkpoint(loop, cli.echo)
    epochs = found.identity.get("price_epochs", 1.0) if found else loop.epochs or 1.0
    price = ShapePrice(epochs=epochs)
    plan = BatchPlan(
        splits.train, batch_tokens=loop.batch_tokens, batch_size=loop.batch_size, seed=loop.seed, price=price
    )
    identity = identity_of(settings, base.fingerprint, splits.train.fingerprint, plan, epochs)
    validation = validation_plan(splits.valid, settings)
    steps = total_steps(plan, loop)
    if found:
        check_continuation(found, identity)
    loss = choose_loss(base.model, base.config)
    attend, forms = choose_forms(settings, base, loss, memory)
    step = make_step(settings, base, loss, attend, steps)
    factors = adapter_parameters(base.model)
    check_room(loop, sum(p.nbytes for p in factors.values()), steps)
    device.set_cache_limit(loop.clear_cache_threshold, memory.budget_bytes)
    device.wire_working_set()
    describe_run(settings, base, adapted, factors, plan, steps, forms)
    del factors  # the step has its own from here on, and these would stay in memory beside them
    run, at = RunFolder(loop, info, identity), found.position if found else Position()
    begin(run, found, base, step, steps)
    at.parts = max(at.parts, loop.batch_parts)
    guard = MemoryGuard(at, memory.budget_bytes, cli.echo)

    def save(step_number: int) -> None:
        run.save(base.model, step, at)

    try:
        with run.kept_if_it_fails(), reporting(settings, steps, at.taken if found else None) as (report, on_step):
            write_settings(folder, settings)
            outcome = train(base.model, step, loss.measure, plan, validation, loop, report, on_step, save, at, guard)
            best = None if outcome.interrupted else run.put_best(base.model, step, at)
    except Diverged as diverged:
        raise run.roll_back(base.model, step, diverged) from diverged
    say_outcome(folder, outcome, base, info, best)
    return outcome


def begin(run: RunFolder, found: Checkpoint | None, base: Base, step: Step, steps: int) -> None:
    """Go on from the checkpoint that was found, or start in a folder without another run's checkpoints."""
    run.clear_leftovers()
    if found:
        taken = found.position.taken
        restore_arrays(step, base.model, found.arrays)
        left = "" if taken < steps else f"; all {steps} steps are done, raise --iters or --epochs for more"
        cli.echo(f"Going on from step {taken} ({found.folder}){left}")
        if left:
            save_adapter(Path(run.loop.adapter_path), base.model, run.info)
    elif run.loop.resume is None:
        run.start_anew()


@contextmanager
def reporting(
    settings: TrainSettings, steps: int, resumed_at: int | None
) -> Iterator[tuple[Callable[[Metrics], None], Callable[[int], None]]]:
    """Open where a run's records go: metrics.jsonl, the display, --report-to; yield what takes a record, and a step."""
    loggers = reporting_sinks(settings)
    metrics = MetricsFile(Path(settings.loop.adapter_path) / "metrics.jsonl", resumed_at)
    progress = make_progress(steps, cli.echo)
    sinks = [metrics, progress.report, *loggers]

    def report(record: Metrics) -> None:
        for sink in sinks:
            sink(record)

    try:
        yield report, progress.step
    finally:
        progress.close()
        metrics.close()


def check_room(loop: LoopSettings, adapter_bytes: int, steps: int) -> None:
    """Refuse a run whose checkpoints the disk will not hold: each has the adapter, its masters, and Adam's moments."""
    checkpoints = min(steps // loop.save_every + 1, loop.keep + 1 if loop.keep else steps) if loop.save_every else 0
    check_writable(Path(loop.adapter_path), "--adapter-path", adapter_bytes * (4 * checkpoints + 1))


def make_step(settings: TrainSettings, base: Base, loss: Loss, attend: AttentionCall | None, steps: int) -> Step:
    """Build the optimizer and the compiled step of a run."""
    optimizer = build_optimizer(
        settings.optimizer, steps, restart_every(settings.adapter, steps), restart_warmup(settings.adapter, steps)
    )
    return Step(
        base.model,
        optimizer,
        loss.train,
        settings.optimizer.max_grad_norm,
        attend,
        wait=settings.loop.short_buffers,
        rate_of=rates_of(settings.adapter),
        events=make_events(settings.adapter, base.model, steps, settings.loop.seed),
    )


def adapt(settings: TrainSettings, base: Base, chat_template: str | None) -> tuple[Adapted, AdapterInfo]:
    """Adapt the base and say what the adapter is."""
    adapter = settings.adapter
    adapted = adapt_model(base.model, adapter, settings.loop.seed)
    if adapter.resume_adapter_file:
        file, stored_scale = Path(adapter.resume_adapter_file), None
        if (file.parent / CONFIG_FILE).exists():
            config = read_adapter_config(file.parent)
            check_base(base, config, file)
            stored_scale = config.get("lora_parameters", {}).get("scale")
        load_factors(base.model, file, stored_scale)
    return adapted, AdapterInfo(
        method=adapter.method_name,
        rank=adapted.rank,
        alpha=adapter.alpha,
        scale=adapted.scale,
        dropout=adapter.dropout,
        num_layers=adapted.targets.num_layers,
        keys=adapted.targets.keys,
        base_model=base.model_id,
        base_revision=base.revision,
        base_fingerprint=base.fingerprint,
        chat_template=chat_template,
        full=adapted.full,
    )


def rates_of(adapter: AdapterSettings) -> Callable[[str], float] | None:
    """Return each parameter's multiple of the learning rate, None when all have the same."""
    preset = PRESETS[adapter.method_name]
    ratio = preset.rate_of_b if adapter.loraplus_lr_ratio is None else adapter.loraplus_lr_ratio
    return None if ratio == 1 else lambda name: ratio if name.endswith("lora_b") else 1.0


def adapt_for_test(settings: TrainSettings, base: Base) -> None:
    """Put the trained adapter of --adapter-path on the base, for --test alone, and its chat template."""
    template = load_adapter(base, Path(settings.loop.adapter_path)).chat_template
    if template and not settings.data.chat_template:
        base.hf_tokenizer.chat_template = template


def validation_plan(rows: EncodedSet | None, settings: TrainSettings) -> BatchPlan | None:
    """Plan held-out batches; the seed is fixed so that every validation sees the same ones."""
    if rows is None or len(rows) == 0:
        return None
    tokens = settings.loop.batch_tokens or DEFAULT_BATCH_TOKENS
    return BatchPlan(rows, batch_tokens=tokens, batch_size=settings.loop.batch_size, seed=0)


def choose_forms(
    settings: TrainSettings, base: Base, loss: Loss, memory: MemoryPlan
) -> tuple[AttentionCall | None, list[str]]:
    """Choose kernels for this model, apply them and the checkpointing.

    Returns:
        What computes attention in the step, None for the model's own; and words for the run header.
    """
    use_kernels, kernels = choose_kernels(base.model, base.config, loss)
    tape = apply_checkpointing(base.model, settings.loop.grad_checkpoint)
    attend = (tape.attend if tape else tiled_attention) if use_kernels else None
    notes = [f"{gigabytes(memory.peak_bytes)} planned at the peak, of {gigabytes(memory.budget_bytes)}"]
    notes += ["a pause after each micro-batch"] if settings.loop.short_buffers else []
    return attend, [loss.description, kernels, f"checkpointing {settings.loop.grad_checkpoint}", *notes]


def describe_method(adapter: AdapterSettings, steps: int) -> str:
    """Return the method and its own numbers, for the run header."""
    if adapter.method_name == "full":
        return "full"
    words = f"{adapter.method_name}, rank {adapter.rank}, alpha {adapter.alpha:g}"
    if adapter.method_name == "adalora":
        words += f", from rank {starting_rank(adapter)} down"
    if adapter.method_name == "relora":
        words += f", a restart every {restart_every(adapter, steps)} steps"
    return words


def describe_run(
    settings: TrainSettings,
    base: Base,
    adapted: Adapted,
    factors: dict[str, mx.array],
    plan: BatchPlan,
    steps: int,
    forms: list[str],
) -> None:
    """Print what will be trained, before the first step."""
    trainable = sum(p.size for p in factors.values())
    total = sum(p.size for _, p in tree_flatten(base.model.parameters()))
    adapter, optimizer = settings.adapter, settings.optimizer
    names = ", ".join(dict.fromkeys(key.rsplit(".", 1)[-1] for key in adapted.targets.keys))
    cli.echo(
        f"Adapter: {describe_method(adapter, steps)}, "
        f"{len(adapted.targets.paths)} layers ({names}), {trainable:,} trainable parameters, {trainable * 4 / 1e6:.1f} MB"
        + (f" ({trainable / total:.2%} of what is in memory)" if not base.quantisation else "")
    )
    cli.echo(
        f"Run: {steps} steps, {len(plan)} batches per epoch, {optimizer.optimizer}, lr {optimizer.learning_rate:g} "
        f"{optimizer.lr_schedule}, warm-up {optimizer.warmup:g}, clip {optimizer.max_grad_norm:g}, seed {settings.loop.seed}"
    )
    forms = [*forms, f"{len(plan.shapes)} batch shapes", f"{plan.padding_fraction:.1%} padding"]
    cli.echo("Step: " + "; ".join([*forms, *base.matmul_paths.describe()]))


def write_settings(folder: Path, settings: TrainSettings) -> None:
    """Write run.yaml: every resolved setting; `--config run.yaml` repeats the run."""
    with replacing_file(folder / "run.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(settings.to_flat(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def reporting_sinks(settings: TrainSettings) -> list[Any]:
    """Return sinks for --report-to, through mlx-lm's own wandb and swanlab callbacks."""
    if not settings.loop.report_to:
        return []
    from mlx_lm.tuner.callbacks import get_reporting_callbacks

    folder, name = settings.loop.adapter_path, settings.loop.project_name
    try:
        callback = get_reporting_callbacks(
            settings.loop.report_to, project_name=name, log_dir=folder, config=settings.to_flat()
        )
    except (ImportError, ValueError) as error:
        raise InputError(f"--report-to {settings.loop.report_to}: {error}; install it, or leave the flag out") from None

    def sink(record: Metrics) -> None:
        if record.val_loss is not None:
            callback.on_val_loss_report({"iteration": record.step, "val_loss": record.val_loss})
        if record.loss is not None:
            callback.on_train_loss_report(
                {"iteration": record.step, "train_loss": record.loss, "learning_rate": record.learning_rate}
            )

    return [sink]


def say_outcome(folder: Path, outcome: Outcome, base: Base, info: AdapterInfo, best: str | None) -> None:
    """Write the model card, and print where the result lies."""
    file = folder / WEIGHTS_FILE
    if file.exists() and not write_card(folder, "mlx", base, info, read_facts(folder)):
        cli.echo(f"{folder / CARD_FILE}: yours, left as it is")
    size = f"adapter of {file.stat().st_size / 1e6:.1f} MB" if file.exists() else "nothing to save"
    val = "" if outcome.val_loss is None else f", held-out loss {outcome.val_loss:.4f}"
    early = ", ended early: the held-out loss no longer falls" if outcome.stopped_early else ""
    cli.echo(f"{outcome.steps} steps done{early}{val}; {size} in {folder}{f'; {best}' if best else ''}")


def report_test_loss(settings: TrainSettings, base: Base, test: EncodedSet) -> None:
    """Measure and print the loss on the test split."""
    plan = validation_plan(test, settings)
    loss, tokens = mean_loss(
        base.model, choose_loss(base.model, base.config).measure, plan.batches(settings.loop.test_batches)
    )
    cli.echo(f"Test loss {loss:.4f}, perplexity {cli.perplexity(loss):.3f}, {tokens} supervised tokens")


if __name__ == "__main__":
    main()
