"""What a run computes with: the adapted model, the step, the held-out batches."""

from __future__ import annotations

from pathlib import Path

from mlx_lora.adapters.setup import Adapted, adapt_model
from mlx_lora.artifacts.adapter import (
    CONFIG_FILE,
    AdapterInfo,
    check_base,
    load_adapter,
    load_factors,
    read_adapter_config,
)
from mlx_lora.artifacts.checkpoint import Checkpoint
from mlx_lora.config import DEFAULT_BATCH_TOKENS, LoopSettings, TrainSettings
from mlx_lora.data.batches import BatchPlan
from mlx_lora.data.encode import EncodedSet
from mlx_lora.data.widths import ShapePrice
from mlx_lora.distributed import Ranks
from mlx_lora.memory import MemoryPlan
from mlx_lora.models.attention import tiled_attention
from mlx_lora.models.load import Base
from mlx_lora.training.checkpointing import apply_checkpointing
from mlx_lora.training.losses import choose_kernels, choose_loss
from mlx_lora.training.method_events import make_events, rates_of, restart_every, restart_warmup
from mlx_lora.training.optim import build_optimizer
from mlx_lora.training.planning import planned_words
from mlx_lora.training.sharing import Sharing
from mlx_lora.training.step import Step
from mlx_lora.training.trial import StepForm, choose_step_form


def make_step(settings: TrainSettings, base: Base, form: StepForm, steps: int, ranks: Ranks | None) -> Step:
    """Build the optimizer and the compiled step of a run."""
    optimizer = build_optimizer(
        settings.optimizer, steps, restart_every(settings.adapter, steps), restart_warmup(settings.adapter, steps)
    )
    return Step(
        base.model,
        optimizer,
        form.loss.train,
        settings.optimizer.max_grad_norm,
        form.attend,
        wait=settings.loop.short_buffers,
        rate_of=rates_of(settings.adapter),
        events=make_events(settings.adapter, base.model, steps, settings.loop.seed),
        sharing=None if ranks is None else Sharing(ranks, settings.loop.seed),
        compiled=form.compiled,
    )


def adapt(settings: TrainSettings, base: Base, chat_template: str | None) -> tuple[Adapted, AdapterInfo]:
    """Adapt the base and say what the adapter is.

    Args:
        settings: of the run.
        base: gets adapter layers.
        chat_template: that the data were rendered with; kept with the adapter when it is not the model's own, so that
            generate renders prompts the same way.
    """
    own_template = chat_template == base.hf_tokenizer.chat_template
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
        chat_template=None if own_template else chat_template,
        full=adapted.full,
    )


def adapt_for_test(settings: TrainSettings, base: Base) -> None:
    """Put the trained adapter of --adapter-path on the base, for --test alone, and its chat template."""
    template = load_adapter(base, Path(settings.loop.adapter_path)).chat_template
    if template and not settings.data.chat_template:
        base.hf_tokenizer.chat_template = template


def training_plan(loop: LoopSettings, rows: EncodedSet, found: Checkpoint | None) -> tuple[BatchPlan, float]:
    """Plan the batches; return them and the epochs that a new shape's price was weighed against.

    A run that goes on for longer keeps the shapes it began with.
    """
    epochs = found.identity.get("price_epochs", 1.0) if found else loop.epochs or 1.0
    price = ShapePrice(epochs=epochs)
    return BatchPlan(
        rows, batch_tokens=loop.batch_tokens, batch_size=loop.batch_size, seed=loop.seed, price=price
    ), epochs


def validation_plan(rows: EncodedSet | None, settings: TrainSettings) -> BatchPlan | None:
    """Plan held-out batches; the seed is fixed so that every validation sees the same ones."""
    if rows is None or len(rows) == 0:
        return None
    tokens = settings.loop.batch_tokens or DEFAULT_BATCH_TOKENS
    return BatchPlan(rows, batch_tokens=tokens, batch_size=settings.loop.batch_size, seed=0)


def choose_forms(
    settings: TrainSettings, base: Base, memory: MemoryPlan, ranks: Ranks | None
) -> tuple[StepForm, list[str]]:
    """Choose loss and kernels for this model, apply the checkpointing, and try all of it on a few tokens.

    Returns:
        What the step computes with, and words for the run header.

    Raises:
        InputError: the model cannot be trained.
    """
    loss = choose_loss(base.model, base.config)
    use_kernels, kernels = choose_kernels(base.model, base.config, loss)
    tape = apply_checkpointing(base.model, settings.loop.grad_checkpoint)
    attend = (tape.attend if tape else tiled_attention) if use_kernels else None
    form = choose_step_form(base.model, base.config, loss, attend, base.model_id)
    notes = [*form.notes, planned_words(memory)]
    notes += ["blocks that share a state keep everything"] if tape is not None and tape.left_out else []
    notes += ["a pause after each micro-batch"] if settings.loop.short_buffers else []
    notes += [f"rows shared by {ranks.size} processes"] if ranks else []
    return form, [loss.description, kernels, f"checkpointing {settings.loop.grad_checkpoint}", *notes]
