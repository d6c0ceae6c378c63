"""Choose what the user leaves open, from the model and the data: learning rate, tokens per step, epochs, early stopping.

The rate follows the width and the family of the model, the length follows the number of examples, both as in "LoRA Without
Regret" (Schulman et al., Thinking Machines, 2025) and the formula in its cookbook. A step has few rows if there are few, since
LoRA learns less from large batches (same source); an epoch of a small set then has enough updates, and epochs are added until
there are about a hundred.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from mlx_lora.config.objectives import IMITATION
from mlx_lora.config.presets import PRESETS
from mlx_lora.config.settings import AUTO, DEFAULT_BATCH_TOKENS, LoopSettings, TrainSettings
from mlx_lora.utils.text import counted

FULL_RATE = 5e-5  # of full fine-tuning, at a width of 2,000
ALPHA = 32  # of the formula; an update is proportional to alpha times the rate
LORA_OVER_FULL = 10  # LoRA's best rate over that of full fine-tuning, at any rank with this alpha
WIDTH = 2000
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}  # of WIDTH / width; fitted on models of these families
MIDDLE = 0.43  # for families that nobody fitted
LEAST_RATE, MOST_RATE = 1e-5, 2e-3  # the formula's fit ends far above a width of 100
# Preferences and rewards are learned at about a seventh of the rate of imitation (cookbook: 2.9e-4, 4e-5 for an 8B llama).
OTHER_OBJECTIVES = 0.15
# Labels of texts at under half of it: 4e-4 to 5e-4 for a model of 125M (LoRA, 2106.09685, table 9: RoBERTa base on GLUE).
OF_LABELS = 0.4
# B of lora-plus has 16 times A's rate; PiSSA begins with large factors, so that the same step moves the weights further.
OF_METHOD = {"lora-plus": 1 / 8, "pissa": 1 / 5, "full": 1 / LORA_OVER_FULL}
TOO_LOW, TOO_HIGH = 1 / 40, 6  # times the chosen rate: outside, training hardly moves or diverges

FEWEST_ROWS, MOST_ROWS = 4, 32  # per step
UPDATES = 100  # that a small set is trained for
UPDATES_OF_WORDINGS = 250  # with --rephrase, after which each fact is known under its other wordings, too
UPDATES_OF_QUESTIONS = 350  # of one text, each of which learns from a few numbers alone
MOST_EPOCHS = 20
FEW_STEPS = 40  # with fewer, a model hardly changes
FEW_STEPS_OF_HEAD = 10  # a new head with its higher rate fits a handful of texts in 20
ENOUGH_HELD_OUT = 20  # examples; a loss over fewer is too noisy to end a run by
VALIDATIONS = 10  # of a run that may end early
PATIENCE = 3  # of them without a better one
STEPS_PER_EVAL = 200  # of other runs


@dataclass(frozen=True)
class DataFacts:
    """The size of the data to train on.

    Attributes:
        examples: rows, or pairs.
        positions: of all rows.
        held_out: examples that are not trained on.
    """

    examples: int
    positions: int
    held_out: int = 0


def learning_rate_for(model_type: str, width: int, settings: TrainSettings) -> float:
    """Return the peak learning rate for a model, with two digits.

    Args:
        model_type: mlx-lm's.
        width: the hidden size; 0: not known.
        settings: of the run, for its method, rank and objective.

    Source: 5e-5 x 10 x (2000 / width)^e, e by family (tinker-cookbook, hyperparam_utils).
    """
    adapter, family = settings.adapter, model_type.lower()
    # Qwen's own code is derived from Llama's, so names tell the families apart, not layers.
    exponent = next((e for name, e in EXPONENTS.items() if name in family), MIDDLE)
    if family in ("mistral", "ministral", "ministral3", "smollm3"):  # Llama's architecture under other names
        exponent = EXPONENTS["llama"]
    rate = FULL_RATE * LORA_OVER_FULL * (WIDTH / (width or WIDTH)) ** exponent
    rate *= OF_METHOD.get(adapter.method, 1)
    if PRESETS[adapter.method].scale == "sqrt_rank":  # the update is sqrt(r) times as large as with alpha / r
        rate /= math.sqrt(adapter.rank)
    if settings.objective.row.scores_texts:
        # A step that serves Q questions goes 1 / sqrt(Q) as far for each, if they have nothing in common.
        rate *= OF_LABELS * math.sqrt(1 + (settings.data.label_columns or "").count(","))
    elif settings.objective.objective not in IMITATION:
        rate *= OTHER_OBJECTIVES
    return float(f"{min(MOST_RATE, max(LEAST_RATE, rate)):.1e}")


def rows_per_step(examples: int) -> int:
    """Return how many examples an update should see: half the square root of all, from 4 to 32."""
    return max(FEWEST_ROWS, min(MOST_ROWS, round(math.sqrt(examples) / 2)))


def batch_tokens_for(settings: TrainSettings, data: DataFacts | None, hidden_from: int = 0) -> int:
    """Return the positions of a micro-batch to aim at; the planner may have to take less.

    Args:
        settings: of the run.
        data: to train on; None: not known.
        hidden_from: positions from which a micro-batch computes for longer than its base takes to be read from the disk; 0: it is
            in memory. Smaller batches are raised to it, as far as the most epochs still have UPDATES updates.
    """
    if data is None or settings.objective.samples or not data.examples:
        return DEFAULT_BATCH_TOKENS
    # Padding, and rows that do not fit a batch any more, leave a batch about a quarter short.
    mean = 1.25 * data.positions / data.examples
    # Other wordings of a question are not further examples.
    rows = rows_per_step(data.examples // (1 + (settings.data.rephrase or 0)))
    wanted, most = (
        count * mean / settings.loop.grad_accumulation_steps
        for count in (rows, max(rows, min(MOST_ROWS, data.examples * MOST_EPOCHS // UPDATES)))
    )
    wanted = max(wanted, min(hidden_from, most))
    return max(2, min(DEFAULT_BATCH_TOKENS, math.ceil(wanted)))


def with_learning_rate(settings: TrainSettings, model_type: str, width: int) -> TrainSettings:
    """Return the settings with a learning rate, which stays as it is if it was given as a number."""
    if settings.optimizer.learning_rate not in (None, AUTO):
        return settings
    rate = learning_rate_for(model_type, width, settings)
    return replace(settings, optimizer=replace(settings.optimizer, learning_rate=rate))


def with_length(
    settings: TrainSettings, batch_tokens: int, data: DataFacts | None, begun_with: float | None = None
) -> TrainSettings:
    """Return the settings with tokens per batch, length, validations and early stopping, where they were open.

    Args:
        settings: of the run.
        batch_tokens: of a micro-batch, as planned.
        data: to train on; None: not known, so that the run has one epoch.
        begun_with: epochs that a resumed run was begun with; None: it begins.
    """
    loop = replace(settings.loop, batch_tokens=batch_tokens)
    open_length, several = loop.iters is None and loop.epochs is None, not settings.objective.samples
    if open_length:
        per_epoch = steps_per_epoch(loop, data)
        updates = UPDATES_OF_WORDINGS if settings.data.rephrase else UPDATES
        updates = UPDATES_OF_QUESTIONS if settings.data.label_columns else updates
        loop = replace(loop, epochs=begun_with or epochs_for(per_epoch if several else 0, updates))
    defaults = {"steps_per_eval": STEPS_PER_EVAL, "keep_best": False, "early_stopping_patience": 0}
    whole = PRESETS[settings.adapter.method].events != "none"  # AdaLoRA's and ReLoRA's schedules need their end
    validates = loop.val_batches != 0 and loop.steps_per_eval != 0 and loop.save_every != 0
    enough = data is not None and data.held_out >= ENOUGH_HELD_OUT
    if open_length and several and enough and validates and not whole:  # it ends when its held-out loss no longer falls
        steps = steps_per_epoch(loop, data) * int(loop.epochs or 1)
        defaults = {
            "steps_per_eval": validated_every(steps), "keep_best": True, "early_stopping_patience": PATIENCE,
        }  # fmt: skip
    open_too = {name: value for name, value in defaults.items() if getattr(loop, name) is None}
    return replace(settings, loop=replace(loop, **open_too))


def epochs_for(per_epoch: int, updates: int) -> float:
    """Return how many epochs make about so many updates; 1 if an epoch has as many, or is not known to have any (0)."""
    return float(max(1, min(MOST_EPOCHS, round(updates / per_epoch)))) if per_epoch else 1.0


def steps_per_epoch(loop: LoopSettings, data: DataFacts | None) -> int:
    """Return about how many updates an epoch has; 0: not known."""
    if data is None or not data.examples:
        return 0
    if loop.batch_size is not None:
        batches = math.ceil(data.examples / loop.batch_size)
    else:
        batches = math.ceil(1.25 * data.positions / (loop.batch_tokens or DEFAULT_BATCH_TOKENS))
    return max(1, math.ceil(min(batches, data.examples) / loop.grad_accumulation_steps))


def validated_every(steps: int) -> int:
    """Return the steps between validations of a run that looks for its lowest held-out loss."""
    return max(5, math.ceil(steps / VALIDATIONS))


def chosen_words(asked: TrainSettings, chosen: TrainSettings, model: str, data: DataFacts, steps: int) -> str:
    """Return one line on what was chosen and why, for the run header; empty if everything was given.

    Args:
        asked, chosen: settings before and after.
        model: a name for the kind of model, such as `llama of width 576`.
        data: to train on.
        steps: of the run.
    """
    parts = []
    if asked.optimizer.learning_rate is None:
        parts.append(f"learning rate {chosen.optimizer.learning_rate:g} for a {model}")
    loop, given = chosen.loop, asked.loop
    if given.batch_tokens is None and given.batch_size is None:
        parts.append(f"batches of up to {loop.batch_tokens:,} tokens")
    if given.iters is None and given.epochs is None:
        parts.append(f"{counted(int(loop.epochs or 1), 'epoch')} ({counted(steps, 'step')})")
    if loop.early_stopping_patience and given.early_stopping_patience is None:
        parts.append("ends early if the held-out loss no longer falls, and keeps the best adapter")
    return f"Chosen for {counted(data.examples, 'example')}: {', '.join(parts)}." if parts else ""


def rate_problem(settings: TrainSettings, model_type: str, width: int) -> str:
    """Return a warning of a learning rate that a plan does not know, or that is far from what suits the model; empty: it may do."""
    given, usual = settings.optimizer.learning_rate, learning_rate_for(model_type, width, settings)
    strength = 1 if settings.adapter.method == "full" else settings.adapter.alpha / ALPHA
    if given == AUTO:
        return "--learning-rate auto: planned with the default rate; trying others takes up to a fifth more steps"
    if given is None or TOO_LOW <= given * strength / usual <= TOO_HIGH:
        return ""
    usual = float(f"{usual / strength:.1e}")
    effect = "the run will probably diverge" if given > usual else "the model will hardly change"
    return f"--learning-rate {given:g}: {effect}; about {usual:g} suits this model"


def length_problem(asked: TrainSettings, steps: int, per_epoch: float) -> str:
    """Return a warning of a run that is too short to change the model; empty: it is long enough.

    Args:
        asked: settings of the run, as they were given.
        steps: of the run.
        per_epoch: its steps in one epoch.
    """
    few = FEW_STEPS_OF_HEAD if asked.objective.row.scores_texts else FEW_STEPS
    if steps >= few or asked.objective.samples:
        return ""
    epochs = math.ceil(1.5 * few / per_epoch)
    longer = math.ceil(epochs * per_epoch)
    flag = f"--epochs {epochs}" if asked.loop.iters is None else f"--iters {longer}"
    short = f"{counted(steps, 'step')} will hardly change the model"
    gives = f"{flag} gives {longer}, which takes {longer / steps:.1f} times as long"
    if asked.loop.iters is None and asked.loop.epochs is None:  # there are so few rows
        return f"{short}; add rows to the data, or {gives}"
    return f"{short}; {gives}, and without it the run chooses its length"


def preset_settings(name: str, data: DataFacts | None) -> dict[str, Any]:
    """Return a preset as settings over the defaults: `balanced` is the defaults, the others are half and twice its updates.

    Args:
        name: quick, balanced or thorough.
        data: to train on; None: not known.
    """
    if name == "balanced":
        return {}
    factor, rank = {"quick": (0.5, 8), "thorough": (2.0, 32)}[name]
    settings: dict[str, Any] = {"rank": rank, "keep_best": True} if factor > 1 else {"rank": rank}
    if data is None or not data.examples:
        return settings
    wanted = factor * epochs_for(math.ceil(data.examples / rows_per_step(data.examples)), UPDATES)
    # Half of one epoch, where one is usual.
    return settings | {"epochs": float(math.ceil(wanted)) if wanted > 1 else wanted}
