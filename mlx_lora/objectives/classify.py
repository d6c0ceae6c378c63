"""Classification: give a text one of K labels, several of them, or a number (--objective classify).

It is transformers' model for sequence classification: a linear layer of K outputs without a bias reads the last token after the
model's last norm, and is trained in full beside the adapter (models/head.py). Losses and measures are in
losses/scores.py. The labels, in the order of the outputs, are kept with the adapter.

For several labels, each has a threshold of its probability. It is chosen on the validation rows, at every validation, and kept with
the adapter; what the run reports of these rows is with thresholds of 1/2, because one that was chosen on the rows it is
measured on looks better than it is.

Shapes: B rows, T columns, P positions (one for each row, then padding), N texts of a set, K labels.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.data.labeled import LABEL
from mlx_lora.losses.cross_entropy import Arrays, Loss, token_arrays
from mlx_lora.losses.scores import (
    NUMBER,
    SEVERAL,
    SINGLE,
    all_right,
    best_thresholds,
    class_measures,
    classification_losses,
    confusion,
    macro_f1,
    pearson,
    probabilities,
    spearman,
)
from mlx_lora.objectives.base import BoundObjective, RunContext, ScoreHead, WholeSet
from mlx_lora.objectives.scored_texts import ScoredTexts, as_share
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.config.objectives import ObjectiveSettings
    from mlx_lora.data.batch import Batch
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.data.load import DataSplits

ACCURACY, TEXTS = "accuracy", "texts"
BALANCED = "balanced"
MOST_NAMED = 12  # labels in a message
SEPARATOR = re.compile(r"[,;|]")  # between several labels in one cell


@dataclass(eq=False)
class Classify(ScoredTexts):
    """An objective whose rows are texts with labels.

    Attributes:
        problem: by transformers' names, or `auto`: that of the first rows that are read.
        labels: their names, in the order of the head's outputs; empty: those of the first rows that are read.
        weights: (K,) of the labels in the loss; None: 1.
        thresholds: (K,) of probabilities, that the adapter which is measured was trained with; None: choose them at each
            measurement.
    """

    labels: tuple[str, ...]
    problem: str = field(init=False)
    weights: np.ndarray | None = None
    thresholds: list[float] | None = None
    _outputs: int = 1
    _chosen: list[float] | None = None
    _kept_weights: np.ndarray | None = None
    _details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.problem = self.options.problem_type

    # What the labels are

    @property
    def head(self) -> ScoreHead:
        about: dict[str, Any] = {
            "objective": self.options.objective,
            "problem_type": self.problem,
            "labels": list(self.labels),
        }
        if self.problem == SEVERAL:
            about["thresholds"] = self._chosen or [0.5] * len(self.labels)
        if self.options.class_weights == BALANCED and self.weights is not None:
            about["weights"] = self.weights.tolist()
        return ScoreHead(self._outputs, about=about)

    def open(self, ctx: RunContext) -> None:
        super().open(ctx)
        if (head := ctx.score_head) is not None:
            self.problem, self.labels = head["problem_type"], self.labels or tuple(head["labels"])
            self.thresholds = head.get("thresholds")
            if self.options.class_weights == BALANCED and head.get("weights"):
                self._kept_weights = np.array(
                    head["weights"]
                )  # of the training rows, and not of those that are measured

    def settle(self, ctx: RunContext, data: DataSplits) -> DataSplits:
        """Go on with the thresholds that a validation of the run chose."""
        self._chosen = (ctx.score_head or {}).get("thresholds")
        return super().settle(ctx, data)

    def _with_targets(self, rows: EncodedSet) -> EncodedSet:
        """Return rows with the last token as their only position, and what is to be found of each text.

        Raises:
            InputError: there are fewer than two labels, or one that the labels of the first rows do not have.
        """
        found = [fact[LABEL] for fact in rows.facts or ()]
        if self.problem == "auto":
            self.problem = problem_of(found)
        if self.problem == NUMBER:
            return rows.with_end_scores().grouped(1, np.array([self._number(value) for value in found]))
        names = [names_of(value, self.problem) for value in found]
        counts = Counter(name for own in names for name in own)
        self._take_labels(counts, len(found))
        if unknown := sorted(set(counts) - set(self.labels)):
            raise InputError(
                f"--objective {self.options.objective}: found the label {_listed(unknown)}, which is not among {_listed(self.labels)}; "
                "correct it, add texts with it to the training data, or name all labels with --labels"
            )
        place = {label: number for number, label in enumerate(self.labels)}
        if self.problem == SINGLE:
            return rows.with_end_scores().grouped(1, np.array([place[own[0]] for own in names]))
        several = np.zeros((len(found), len(self.labels)), np.float32)
        for row, own in enumerate(names):
            several[row, [place[name] for name in own]] = 1.0
        return rows.with_end_scores().grouped(1, several)

    def _number(self, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"--problem-type {NUMBER}: found the label {value!r}, which is no number; correct it")
        return number

    def _take_labels(self, counts: Counter[str], texts: int) -> None:
        """Choose labels and weights by the first rows; later rows change nothing."""
        if self._outputs == len(self.labels) > 1:
            return
        self.labels = self.labels or tuple(sorted(counts, key=_in_order))
        self._outputs = len(self.labels)
        if self._outputs < 2:
            only = f"only the label {_listed(self.labels)}" if self.labels else "no label"
            raise InputError(
                f"--objective {self.options.objective}: found {only} in {texts} texts; a classifier needs at least two labels"
            )
        if self._kept_weights is not None and len(self._kept_weights) == self._outputs:
            self.weights = self._kept_weights
        else:
            self.weights = weights_of(self.options.class_weights, self.labels, counts, texts, self.problem)

    def load_data(self, ctx: RunContext) -> DataSplits:
        data = super().load_data(ctx)
        ctx.record.identity["head"] = {
            name: value for name, value in (self.head.about or {}).items() if name not in ("thresholds", "weights")
        }
        if self.problem == NUMBER:
            if ctx.settings.loop.metric_for_best_model != "loss":
                raise InputError(
                    f"--metric-for-best-model {ctx.settings.loop.metric_for_best_model} with labels that are numbers: they "
                    "have a loss only; leave it out"
                )
            values: Any = data.train.labels
            ctx.record.lines.append(
                f"Labels: numbers from {values.min():g} to {values.max():g}, mean {values.mean():.4g}"
            )
        else:
            ctx.record.lines.append(f"Labels: {self._counted(data.train)}")
        return data

    def _counted(self, rows: EncodedSet) -> str:
        """Return the labels with the number of training texts that have each."""
        labels: Any = rows.labels
        counts = (
            np.bincount(labels.astype(int), minlength=self._outputs) if self.problem == SINGLE else labels.sum(axis=0)
        )
        return _listed([f"{name} {count:.0f}" for name, count in zip(self.labels, counts, strict=True)])

    # The loss

    def bind(self, ctx: RunContext, loss: Loss, rows: EncodedSet) -> BoundObjective:
        scored, words = self.scores_of(ctx, loss)
        weights = None if self.weights is None else mx.array(self.weights.astype(np.float32))
        reports = () if self.problem == NUMBER else (ACCURACY, TEXTS)

        def summed(model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
            scores, real = scored(model, arrays), arrays["weights"]
            own = arrays["labels"][arrays["positions"] // arrays["inputs"].shape[1]]
            losses, weight = classification_losses(self.problem, scores, own, weights)  # (P,), (P,)
            found = {}
            if reports:
                found = {ACCURACY: (all_right(self.problem, scores, own) * real).sum(), TEXTS: real.sum()}
            return (losses * real).sum(), (weight * real).sum(), found

        def examples(scores: np.ndarray, batch: Batch, arrays: Arrays) -> np.ndarray:
            real, labels = batch.weights > 0, np.array(arrays["labels"])
            own = labels[(batch.positions // batch.inputs.shape[1])[real]]
            return np.concatenate([scores[real], own.reshape(len(own), -1)], axis=1)  # scores, then labels

        def measured(found: np.ndarray) -> tuple[float, dict[str, float]]:
            scores, targets = found[:, : self._outputs], found[:, self._outputs :]
            return self.measured(scores, targets if self.problem == SEVERAL else targets[:, 0])

        return BoundObjective(
            replace(loss, train=summed, measure=summed, description=f"classify ({self.problem}); {words}"),
            arrays_of,
            reports=reports,
            finish=lambda means: as_share(means, ACCURACY, TEXTS),
            whole_set=WholeSet(scored, examples, measured),
            details=lambda: self._details,
        )

    # What is measured of a whole set

    def measured(self, scores: np.ndarray, targets: np.ndarray) -> tuple[float, dict[str, float]]:
        """Return the mean loss of a set and what is reported of it; tables of labels become details.

        Args:
            scores: (N, K).
            targets: (N,), or (N, K) for several labels.
        """
        weights = None if self.weights is None else mx.array(self.weights.astype(np.float32))
        losses, weight = classification_losses(self.problem, mx.array(scores), mx.array(targets), weights)
        loss = float(np.array(losses).sum(dtype=np.float64) / np.array(weight).sum(dtype=np.float64))
        chances = probabilities(self.problem, scores)
        if self.problem == NUMBER:
            found, wanted = chances[:, 0], targets.astype(np.float64)
            return loss, {"mse": loss, "pearson": pearson(found, wanted), "spearman": spearman(found, wanted)}
        names, more = list(self.labels), {}
        if self.problem == SEVERAL:
            truth = targets > 0.5
            self._chosen = self.thresholds or best_thresholds(chances, truth)
            got = chances > np.array(self.thresholds or 0.5)
            self._details = {
                "classes": class_measures(truth, got, names),
                "thresholds": dict(zip(names, self._chosen, strict=True)),
            }
            right = (truth == got).all(axis=1)
        else:
            own, best = targets.astype(int), chances.argmax(axis=1)
            hot = np.eye(self._outputs, dtype=bool)
            self._details = {"classes": class_measures(hot[own], hot[best], names)}
            self._details["confusion"] = confusion(own, best, self._outputs)
            right = own == best
            more = {"majority": float(hot[own].mean(axis=0).max())}
        return loss, {
            ACCURACY: float(right.mean()),
            "macro_f1": macro_f1(self._details["classes"], self.problem),
            **more,
        }


def classify(settings: ObjectiveSettings) -> Classify:
    """Return the objective of --objective classify.

    Raises:
        InputError: --labels or --class-weights cannot be read.
    """
    labels = tuple(label.strip() for label in (settings.labels or "").split(",") if label.strip())
    if settings.labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
        raise InputError(f"--labels {settings.labels!r}: give at least two labels, each once, separated by commas")
    given_weights(settings.class_weights)
    return Classify(settings, labels)


def arrays_of(batch: Batch) -> Arrays:
    """Copy a batch to the device, with what is to be found of its rows: `labels`, (B,) or (B, K) float32."""
    return token_arrays(batch) | {"labels": mx.array(batch.columns["labels"].astype(np.float32))}


# Labels


def problem_of(values: Sequence[Any]) -> str:
    """Return what labels are, by transformers' names: lists are several labels, numbers that are not all whole numbers."""
    if any(isinstance(value, list) for value in values):
        return SEVERAL
    numbers = [_as_number(value) for value in values]
    if all(number is not None for number in numbers) and any(number != int(number or 0) for number in numbers):
        return NUMBER
    return SINGLE


def _as_number(value: Any) -> float | None:
    """Return a finite number, or a text that is one; else None."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def names_of(value: Any, problem: str) -> list[str]:
    """Return the names of a text's labels: one, or those of a list, or of a text that has several between commas.

    Raises:
        InputError: there is a list where one label is expected, or none.
    """
    if problem == SINGLE:
        name = _name(value)
        if isinstance(value, list | dict) or not name:
            raise InputError(
                f"--problem-type {SINGLE}: found the label {value!r}; each text needs one label, or give {SEVERAL}"
            )
        return [name]
    if isinstance(value, str):
        value = json.loads(value) if _is_list(value) else SEPARATOR.split(value)
    values = value if isinstance(value, list) else [value]
    return list(dict.fromkeys(name for name in map(_name, values) if name))


def _is_list(text: str) -> bool:
    """Tell whether a cell has a JSON list."""
    try:
        return isinstance(json.loads(text), list)
    except ValueError:
        return False


def _name(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def _in_order(name: str) -> tuple[float, str]:
    """Return what sorts labels: whole numbers by their size, before all others."""
    number = _as_number(name)
    return (math.inf if number is None else number, name)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


# Weights


def given_weights(text: str | None) -> dict[str, float]:
    """Return the weights that --class-weights gives by name; none for `balanced`.

    Raises:
        InputError: it cannot be read.
    """
    found: dict[str, float] = {}
    for part in [] if text in (None, BALANCED) else str(text).split(","):
        name, _, weight = part.rpartition("=")
        number = _as_number(weight)
        if not name.strip() or number is None or not 0 < number < 1e6:
            raise InputError(
                f"--class-weights {text}: write balanced, or labels with weights above 0, as in spam=2,ham=1"
            )
        found[name.strip()] = number
    return found


def weights_of(
    text: str | None, labels: Sequence[str], counts: Counter[str], texts: int, problem: str
) -> np.ndarray | None:
    """Return the weights of labels, (K,) float64; None: all are 1.

    `balanced` is scikit-learn's N / (K n) for one label, and (N - n) / n for several, where n of N texts have a label.

    Raises:
        InputError: a weight is for no label, or no text has a label that is to be balanced.
    """
    if text is None:
        return None
    if text == BALANCED:
        if lost := [label for label in labels if not counts[label]]:
            raise InputError(
                f"--class-weights balanced: no text has the label {_listed(lost)}; leave it out of --labels"
            )
        have = np.array([counts[label] for label in labels], float)
        return texts / (len(labels) * have) if problem == SINGLE else np.maximum(texts - have, 1) / have
    found = given_weights(text)
    if strange := sorted(set(found) - set(labels)):
        raise InputError(f"--class-weights {text}: {_listed(strange)} is not among the labels {_listed(labels)}")
    return np.array([found.get(label, 1.0) for label in labels])
