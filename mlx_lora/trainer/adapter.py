"""Put an adapter on a run's base, a new one or one that was trained before, and let quantization-aware training begin."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.nn as nn

from mlx_lora.adapters.inject import Adapted, adapt_model
from mlx_lora.adapters.qat import begin_qat, end_qat, rounded_to
from mlx_lora.exporters.adapter_config import head_of, own_entries, template_beside
from mlx_lora.exporters.adapter_folder import (
    AdapterInfo,
    check_writes_text,
    load_adapter,
    put_start,
    read_adapter_config,
    read_start,
    run_of,
)
from mlx_lora.exporters.peft import is_peft
from mlx_lora.models.head import head_parameters, put_head
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.config.objectives import ObjectiveSettings
    from mlx_lora.config.settings import AdapterSettings, DataSettings, TrainSettings
    from mlx_lora.models.load import Base
    from mlx_lora.objectives.base import Objective
    from mlx_lora.trainer.guards import Position


def adapt(
    settings: TrainSettings, base: Base, objective: Objective, chat_template: str | None
) -> tuple[Adapted, AdapterInfo]:
    """Adapt the base, and return the facts about the adapter.

    Args:
        settings: of the run.
        base: gets adapter layers.
        objective: of the run; one that scores gets a score head.
        chat_template: that the data were rendered with; kept with the adapter when it is not the model's own, so that
            generate renders prompts the same way.
    """
    own_template = chat_template == base.hf_tokenizer.chat_template
    adapter = settings.adapter
    head = objective.head
    start = read_start(base, adapter.resume_adapter_file, head is not None) if adapter.resume_adapter_file else None
    if start and start.qat and adapter.qat < 1:
        raise InputError(
            f"--resume-adapter-file {adapter.resume_adapter_file}: was trained with --qat, and is right with its rounding "
            "only; give --qat, without a share"
        )
    asked = adapter if objective.pictures is None else objective.pictures.adapted(adapter)
    adapted, full = adapt_model(base.model, asked, settings.loop.seed), ()
    if head is not None:
        put_head(base, settings.loop.seed, head.outputs, head.scale, (head.about or {}).get("labels", ()))
        full = head_parameters(base.model)
    if start:
        put_start(base.model, start, full, about_head(objective))
    if adapter.qat:
        begin_qat(base.model)
    return adapted, AdapterInfo(
        method=adapter.method,
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
        full=adapted.full + full,
        qat=bool(adapter.qat),
        rounded_to=rounded_to(base.model) if adapter.qat else None,
        head=about_head(objective),
    )


def about_head(objective: Objective) -> dict[str, Any] | None:
    """Return what is kept with an adapter about the score head that it was trained with; None: there is nothing to say."""
    return objective.head.about if objective.head else None


def put_adapter(
    base: Base, folder: Path, data: DataSettings, objective: ObjectiveSettings, ignore_fingerprint: bool = False
) -> None:
    """Put a trained adapter on the base, and its chat template on the tokenizer unless the settings name another.

    Raises:
        InputError: the adapter cannot be read, or does not fit the base.
    """
    template = load_adapter(base, folder, ignore_fingerprint, objective.row.scores).chat_template
    if template and not data.chat_template:
        base.hf_tokenizer.chat_template = template


def adapter_head(folder: Path, objective: ObjectiveSettings) -> dict[str, Any] | None:
    """Return what an adapter says of its score head; None if it says nothing.

    Raises:
        InputError: another objective made the head, or the adapter gives vectors and not text.
    """
    if not objective.row.vectors:
        check_writes_text(folder)
    head = head_of(read_adapter_config(folder), folder)
    made_by = (head or {}).get("objective", objective.objective)
    if made_by != objective.objective:
        raise InputError(
            f"--objective {objective.objective}: the adapter was trained with --objective {made_by}; give that"
        )
    return head


def with_reference_of_run(settings: TrainSettings, adapter: Path) -> TrainSettings:
    """Return the settings of a measurement with what the reference of an adapter's run was, if it had the same objective.

    A run.yaml may be a stranger's. Only paths of adapters are taken from it, which are read from this disk, as data.

    Args:
        settings: of the measurement; what they name already is kept.
        adapter: the folder of the adapter that is measured.
    """
    run, objective, own = run_of(adapter), settings.objective, settings.adapter
    if run.get("objective") != objective.objective:
        return settings
    reference, start = (run.get(name) for name in ("reference_adapter", "resume_adapter_file"))
    if not objective.reference_adapter and not own.resume_adapter_file and isinstance(reference, str):
        objective = replace(objective, reference_adapter=reference)
    if not own.resume_adapter_file and isinstance(start, str):
        own = replace(own, resume_adapter_file=start)
    if own.resume_adapter_file and run.get("qat") == 1:  # then the start was rounded, too
        own = replace(own, qat=1.0)
    return replace(settings, objective=objective, adapter=own)


def adapter_template(folder: Path | None) -> str | None:
    """Return the chat template that an adapter was trained with, None where it is the model's own."""
    if folder is None:
        return None
    config = read_adapter_config(folder)
    return template_beside(folder) if is_peft(config) else own_entries(config).get("chat_template")


# Quantization-aware training


def first_qat_step(share: float, steps: int) -> int | None:
    """Return how many of a run's steps are without it (--qat SHARE), from 0; None: all are."""
    return steps - math.ceil(share * steps) if share else None


def qat_from(
    settings: AdapterSettings, model: nn.Module, steps: int, at: Position, on_step: Callable[[int], None]
) -> Callable[[int], None]:
    """Set an adapted model to what its next step needs, and return what is to be called after each step.

    Args:
        settings: of the adapter.
        model: that is trained.
        steps: of the whole run.
        at: the run's position; where rounding begins, the best validation is looked for anew.
        on_step: is called with the number of steps done, after the change.
    """
    first = first_qat_step(settings.qat, steps)
    if first is None or at.taken >= first:
        return on_step
    end_qat(model)

    def after(step: int) -> None:
        if step == first:
            begin_qat(model)
            at.compare_anew()
        on_step(step)

    return after
