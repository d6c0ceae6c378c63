"""What a run computes with: the adapted model, the step, the held-out batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_lora.adapters.adapt import Adapted, adapt_model
from mlx_lora.artifacts.adapter import (
    CONFIG_FILE,
    AdapterInfo,
    check_base,
    load_adapter,
    load_factors,
    read_adapter_config,
)
from mlx_lora.artifacts.checkpoint import Checkpoint
from mlx_lora.data.batches import BatchPlan
from mlx_lora.data.encode import EncodedSet
from mlx_lora.data.widths import ShapePrice
from mlx_lora.models.attention import attend
from mlx_lora.models.kernel_choice import KernelChoice, choose_model_kernels
from mlx_lora.models.kernel_row import MLX
from mlx_lora.models.kernels import assumed
from mlx_lora.models.load import Base
from mlx_lora.planner.fitting import planned_words
from mlx_lora.planner.memory import MemoryPlan
from mlx_lora.planner.shapes import KernelTerms, ModelShape
from mlx_lora.settings.config import DEFAULT_BATCH_TOKENS, LoopSettings, TrainSettings
from mlx_lora.system import device
from mlx_lora.system.distributed import Ranks
from mlx_lora.training.checkpointing import apply_checkpointing
from mlx_lora.training.hooks_from_settings import make_events, rates_of, restart_every, restart_warmup
from mlx_lora.training.loss_choice import PLAIN_LOGITS
from mlx_lora.training.losses import Loss, check_kernels, choose_loss
from mlx_lora.training.optim import build_optimizer
from mlx_lora.training.run_fit import adapted_shape
from mlx_lora.training.sharing import Sharing
from mlx_lora.training.step import Step
from mlx_lora.training.trial import StepForm, choose_step_form


@dataclass(frozen=True)
class Forms:
    """What computes a run's numbers.

    Attributes:
        loss: of the supervised positions.
        kernels: of the model's layers; None: its own.
        terms: what they take, for the planner.
        words: on the kernels, for the run header.
    """

    loss: Loss
    kernels: KernelChoice | None
    terms: KernelTerms
    words: str


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
        choose=form.choose,
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


def choose_forms(settings: TrainSettings, base: Base, rows: EncodedSet, say: Callable[[str], None]) -> Forms:
    """Choose loss and kernels: the best that were measured here, and that agree with the model's own on this model.

    Args:
        settings: of the run.
        base: adapted.
        rows: training data, whose lengths the kernels are chosen for.
        say: takes a line before something is measured.
    """
    asked = settings.loop.kernels
    loss = choose_loss(base.model, base.config, asked, say)
    dtype = device.compute_dtype(settings.model.dtype)
    lengths = sorted({max(1, int(length) - 1) for length in rows.lengths})
    choice = choose_model_kernels(base.model, lengths, asked, dtype, say)
    kernels, words = check_kernels(base.model, base.config, loss, choice)
    terms = replace((kernels or choice.of_mlx()).terms(), loss=loss.form)
    return Forms(loss, kernels, terms, words)


def shape_to_plan(settings: TrainSettings, base: Base, forms: Forms) -> ModelShape:
    """Return the adapted model's shape, its logits whole where the loss makes them so."""
    kernels = forms.kernels or KernelChoice(MLX)
    shape = adapted_shape(base.model, base.config, settings, kernels=kernels)
    return replace(shape, plain_loss=forms.loss.form == PLAIN_LOGITS)


def choose_step(
    settings: TrainSettings, base: Base, forms: Forms, memory: MemoryPlan, ranks: Ranks | None
) -> tuple[StepForm, list[str]]:
    """Apply the checkpointing, and try all that was chosen on a few tokens.

    Returns:
        What the step computes with, and words for the run header.

    Raises:
        InputError: the model cannot be trained.
    """
    tape = apply_checkpointing(base.model, settings.loop.grad_checkpoint)
    attention = (tape.attend if tape else attend) if forms.kernels else None
    form = choose_step_form(base.model, base.config, forms.loss, attention, base.model_id, forms.kernels or assumed)
    notes = [*form.notes, planned_words(memory)]
    notes += ["blocks that share a state keep everything"] if tape is not None and tape.left_out else []
    notes += ["a pause after each micro-batch"] if settings.loop.short_buffers else []
    notes += [f"rows shared by {ranks.size} processes"] if ranks else []
    return form, [forms.loss.description, forms.words, f"checkpointing {settings.loop.grad_checkpoint}", *notes]
