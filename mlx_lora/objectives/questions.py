"""Questions about a text, which one score head answers: what an answer is, how it is trained, and what scores say of it.

Each question has some outputs of the head of its own: one for each label, or one for a number. The labels of a scale are in order,
and a wrong label costs more the farther it is from the right one.

A text may have no answer to a question. Then its target is NaN, and the question does not train on this text.

Shapes: N texts, K outputs of a question, C columns of its targets (K for several labels, else 1).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.data.labeled import AskedColumn
from mlx_lora.losses.calibration import (
    FEWEST,
    Calibration,
    brier,
    calibrate,
    calibration_error,
    decided,
    interval,
    reliability,
)
from mlx_lora.losses.scores import (
    NUMBER,
    ORDINAL,
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
from mlx_lora.utils.errors import InputError

ACCURACY, PREDICTED, CONFIDENCE = "accuracy", "predicted", "probability"
BALANCED = "balanced"
MOST_NAMED = 12  # labels in a message
MOST_LEVELS = 100  # of a scale
SEPARATOR = re.compile(r"[,;|]")  # between several labels in one cell
KINDS = {
    "several": SEVERAL,
    "number": NUMBER,
    "choice": SINGLE,
}  # of --label-columns, beside labels that are written out
RANGE = re.compile(r"(-?\d+)-(-?\d+)")


@dataclass(frozen=True)
class Acting:
    """How answers are given, beside the most likely one.

    Attributes:
        answer_above: mark answers with a lower confidence as ones to ask a person; None: mark none.
        coverage: add the set, or the interval, that has the true answer with this probability; None: add none.
    """

    answer_above: float | None = None
    coverage: float | None = None

    @property
    def adds(self) -> list[str]:
        """What answers have besides, by name."""
        asks = ["ask_a_person"] if self.answer_above is not None else []
        return asks + (["set", "between"] if self.coverage is not None else [])


AS_THEY_ARE = Acting()


@dataclass(frozen=True)
class Question:
    """A question with the outputs that answer it.

    Attributes:
        name: of its column; empty: the only question of a data set.
        problem_type: one of losses/scores.py, or `auto`: as the first answers are.
        labels: of the outputs; none for a number, and before the first answers were seen.
        weight: of the question in the loss.
        middle, spread: outputs of numbers are (number - middle) / spread; a spread of None: not known yet, or 1.
        thresholds: of several labels' probabilities, before they are calibrated; empty: 1/2.
        weights: (K,) of the labels in the loss; None: 1.
        calibration: of the scores.
    """

    name: str = ""
    problem_type: str = "auto"
    labels: tuple[str, ...] = ()
    weight: float = 1.0
    middle: float = 0.0
    spread: float | None = None
    thresholds: tuple[float, ...] = ()
    weights: tuple[float, ...] | None = None
    calibration: Calibration = field(default_factory=Calibration)

    @classmethod
    def asked(cls, column: AskedColumn) -> Question:
        """Return the question of a column that --label-columns names.

        Raises:
            InputError: its kind is unknown, or its labels are not at least two, each once.
        """
        kind, found = column.kind, cls(column.name, weight=column.weight)
        if kind in ("", *KINDS):
            return replace(found, problem_type=KINDS.get(kind, "auto"))
        if numbers := RANGE.fullmatch(kind):
            low, high = map(int, numbers.groups())
            labels = tuple(map(str, range(low, min(high, low + MOST_LEVELS) + 1)))
        else:
            labels = tuple(label.strip() for label in re.split("[</]", kind))
        if len(set(labels)) < max(2, len(labels)) or len(labels) > MOST_LEVELS or not all(labels):
            raise InputError(
                f"--label-columns {column.name}:{kind}: found no kind of answer; write a scale (1-5, or low<middle<high), a choice "
                f"(yes/no), {', '.join(KINDS)}, or only the column's name"
            )
        return replace(found, problem_type=SINGLE if "/" in kind else ORDINAL, labels=labels)

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Question:
        """Return a question from the JSON values that are kept with an adapter."""
        own = {name: kept[name] for name in ("name", "problem_type", "weight", "middle", "spread") if name in kept}
        own |= {name: tuple(kept[name]) for name in ("labels", "thresholds", "weights") if kept.get(name)}
        return cls(**own, calibration=Calibration.of(kept["calibration"]) if "calibration" in kept else Calibration())

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON values that are kept with an adapter."""
        kept = {name: value for name, value in asdict(self).items() if value not in ((), None)}
        if not self.calibration.rows:
            del kept["calibration"]
        return kept | {"labels": list(self.labels)}

    @property
    def outputs(self) -> int:
        """The numbers that the head gives a text for it, K."""
        return len(self.labels) or 1

    @property
    def columns(self) -> int:
        """The numbers that stand for an answer, C."""
        return self.outputs if self.problem_type == SEVERAL else 1

    @property
    def share(self) -> float:
        """Its weight among questions: each of several labels is an answer, as is the one label of others."""
        return self.weight * self.columns

    @property
    def _unit(self) -> float:
        """What a difference of 1 between outputs is for a number."""
        return self.spread or 1.0

    @property
    def words(self) -> str:
        """How messages call it."""
        return f"--label-columns {self.name}" if self.name else "--labels"

    # Answers of records

    def settled(self, values: Sequence[Any], class_weights: str | None) -> Question:
        """Return the question with what the first answers decide: kind, labels, their weights, and the spread of numbers.

        Args:
            values: of the texts; None: no answer.
            class_weights: as --class-weights has them.

        Raises:
            InputError: there is no answer, or there are fewer than two labels, or a weight cannot be used.
        """
        have = [value for value in values if value is not None]
        if not have:
            raise InputError(f"{self.words}: found no answer in {len(values)} texts; correct the name of the column")
        found = replace(self, problem_type=problem_of(have)) if self.problem_type == "auto" else self
        if found.problem_type == NUMBER:
            numbers = np.array([found._number(value) for value in have])
            if (
                not self.name or self.spread is not None
            ):  # the only number is what the output is, as transformers has it
                return found
            return replace(found, middle=float(numbers.mean()), spread=float(numbers.std()) or 1.0)
        counts = Counter(name for value in have for name in names_of(value, found.problem_type))
        labels = found.labels or tuple(sorted(counts, key=_in_order))
        if len(labels) < 2:
            only = f"only the label {listed(labels)}" if labels else "no label"
            raise InputError(f"{self.words}: found {only} in {len(have)} texts; a classifier needs at least two labels")
        if self.weights is None or class_weights != BALANCED:
            weights = weights_of(class_weights, labels, counts, len(have), found.problem_type)
            found = replace(found, weights=weights)
        return replace(found, labels=labels)

    def targets(self, values: Sequence[Any]) -> np.ndarray:
        """Return what stands for answers, (N, C) float32, NaN for those that are missing.

        Raises:
            InputError: a label is none of the question's, or a number is none.
        """
        found = np.full((len(values), self.columns), np.nan, np.float32)
        place = {label: number for number, label in enumerate(self.labels)}
        for row, value in enumerate(values):
            if value is None:
                continue
            if self.problem_type == NUMBER:
                found[row] = (self._number(value) - self.middle) / self._unit
                continue
            names = names_of(value, self.problem_type)
            if unknown := sorted(set(names) - set(place)):
                raise InputError(
                    f"{self.words}: found the label {listed(unknown)}, which is not among {listed(self.labels)}; correct it, add "
                    "texts with it to the training data, or name all labels here"
                )
            if self.problem_type == SEVERAL:
                found[row] = 0
                found[row, [place[name] for name in names]] = 1
            else:
                found[row] = place[names[0]]
        return found

    def _number(self, value: Any) -> float:
        number = as_number(value)
        if number is None:
            raise InputError(f"{self.words} as {NUMBER}: found {value!r}, which is no number; correct it")
        return number

    def counted(self, targets: np.ndarray) -> str:
        """Return the answers of training texts in words: how many have each label, or where numbers lie."""
        have = targets[~np.isnan(targets[:, 0])]
        if self.problem_type == NUMBER:
            numbers = have * self._unit + self.middle
            words = f"numbers from {numbers.min():g} to {numbers.max():g}, mean {numbers.mean():.4g}"
        else:
            counts = (
                have.sum(axis=0)
                if self.problem_type == SEVERAL
                else np.bincount(have[:, 0].astype(int), minlength=self.outputs)
            )
            words = listed([f"{name} {count:.0f}" for name, count in zip(self.labels, counts, strict=True)])
        missing = len(targets) - len(have)
        return words + (f"; {missing} texts without an answer" if missing else "")

    # Losses

    def trained(self, scores: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Return of each text the loss, its weight in the mean, 1 if the answer is right, and 1 if there is one; (N,) float32.

        Without an answer, all four are 0.

        Args:
            scores: (N, K).
            targets: (N, C).
        """
        have = targets[:, 0] == targets[:, 0]  # NaN is not itself
        own = mx.where(have[:, None], targets, 0.0)
        labels = own if self.problem_type == SEVERAL else own[:, 0]
        weights = None if self.weights is None else mx.array(self.weights)
        losses, weight = classification_losses(self.problem_type, scores, labels, weights)
        right = mx.zeros(len(own)) if self.problem_type == NUMBER else all_right(self.problem_type, scores, labels)
        have = have.astype(mx.float32)
        return losses * have, weight * have, right * have, have

    # Measures of whole sets

    def measured(
        self, scores: np.ndarray, targets: np.ndarray, choose: bool
    ) -> tuple[Question, dict[str, float], dict[str, Any]]:
        """Return the question with thresholds that fit best, numbers to report, and tables of the labels.

        Args:
            scores: (N, K).
            targets: (N, C), without missing ones.
            choose: choose thresholds with the highest F1; then these are not used for what is reported. A question among several
                keeps 1/2, where the most answers are right.
        """
        if self.problem_type == NUMBER:
            found, wanted = (one[:, 0].astype(np.float64) * self._unit for one in (scores, targets))
            return self, {"mse": float(((found - wanted) ** 2).mean()), "pearson": pearson(found, wanted), "spearman": spearman(found, wanted)}, {}  # fmt: skip
        names, chosen = list(self.labels), self
        got, _ = self._told(scores, [] if choose else self.thresholds)
        if self.problem_type == SEVERAL:
            truth = targets > 0.5
            if choose and not self.name:
                chosen = replace(self, thresholds=tuple(best_thresholds(probabilities(SEVERAL, scores), truth)))
            tables: dict[str, Any] = {"classes": class_measures(truth, got, names)}
            tables["thresholds"] = dict(zip(names, chosen.thresholds or [0.5] * len(names), strict=True))
            right, most = (truth == got).all(axis=1), Counter(map(bytes, truth)).most_common(1)[0][1] / len(truth)
        else:
            own = targets[:, 0].astype(int)
            truth = np.eye(self.outputs, dtype=bool)[own]
            tables = {
                "classes": class_measures(truth, got, names),
                "confusion": confusion(own, got.argmax(axis=1), self.outputs),
            }
            right, most = (truth == got).all(axis=1), float(truth.mean(axis=0).max())
        reports = {ACCURACY: float(right.mean()), "macro_f1": macro_f1(tables["classes"], self.problem_type)}
        if self.problem_type == ORDINAL:
            reports["mean_distance"] = float(np.abs(got.argmax(axis=1) - targets[:, 0]).mean())
        return chosen, reports | ({} if self.problem_type == SEVERAL and not self.name else {"majority": most}), tables

    def _told(self, scores: np.ndarray, thresholds: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """Return which labels texts get, (N, K) bool, and the calibrated probabilities, (N, K)."""
        chances = self.calibration.chances(self.problem_type, scores)
        if self.problem_type == SEVERAL:
            return probabilities(SEVERAL, scores) > np.array(thresholds or 0.5), chances
        return np.eye(self.outputs, dtype=bool)[chances.argmax(axis=1)], chances

    def calibrated(self, scores: np.ndarray, targets: np.ndarray) -> tuple[Question, dict[str, Any] | None]:
        """Return the question with a calibration on held-out rows, and how good it is; arguments as for `measured`."""
        if len(scores) < FEWEST:
            return replace(self, calibration=Calibration()), None
        wanted = targets if self.problem_type == SEVERAL else targets[:, 0]
        told = self._told(scores, self.thresholds)[0]
        calibration, chances, sure = calibrate(self.problem_type, scores, wanted, told)
        found = replace(self, calibration=calibration)
        return found, found.confidences(scores, targets, (chances, sure))

    def confidences(
        self, scores: np.ndarray, targets: np.ndarray, fitted: tuple[np.ndarray, np.ndarray] | None = None
    ) -> dict[str, Any] | None:
        """Return how far confidences are off before and after calibration, as JSON values; None for numbers.

        Args:
            scores, targets: as for `measured`.
            fitted: probabilities of the labels, (N, K), and confidences, (N,), after calibration; None: by the question's own.
        """
        if self.problem_type == NUMBER:
            return None
        wanted: np.ndarray = targets if self.problem_type == SEVERAL else targets[:, 0]
        truth = targets > 0.5 if self.problem_type == SEVERAL else np.eye(self.outputs, dtype=bool)[wanted.astype(int)]
        found: dict[str, Any] = {"answers": len(scores)}
        for when, one in {"before": replace(self, calibration=Calibration()), "after": self}.items():
            told, own = one._told(scores, self.thresholds)
            sure = one.calibration.confidence(self.problem_type, own, told)
            if when == "after" and fitted is not None:
                own, sure = fitted
                told = told if self.problem_type == SEVERAL else np.eye(self.outputs, dtype=bool)[own.argmax(axis=1)]
            right = (told == truth).all(axis=1)
            found[when] = {
                "ece": interval(
                    lambda rows, sure=sure, right=right: calibration_error(sure[rows], right[rows]), len(sure)
                ),
                "brier": interval(lambda rows, own=own: brier(self.problem_type, own[rows], wanted[rows]), len(own)),
                "bins": reliability(sure, right),
            }
            found["decided"] = decided(sure, right)
        return found

    # Answers of the model

    def answers(self, scores: np.ndarray, acting: Acting) -> list[dict[str, Any]]:
        """Return the answer to the question about each text, as JSON values.

        `predicted` is a label, a list of labels, or a number; `probability` is that of the whole answer to be right, and
        `probabilities` are those of the labels. With a coverage, `set` has the labels of the conformal set (for several labels,
        those which a text may have), and `between` the ends of a number's interval. With `answer_above`, `ask_a_person`
        says whether the probability is lower.

        Raises:
            InputError: the calibration has too few rows for the coverage.
        """
        misfit = None
        if acting.coverage is not None and (misfit := self.calibration.most_misfit(acting.coverage)) is None:
            raise InputError(
                f"coverage {acting.coverage:g} of {self.name or 'the labels'}: the adapter was calibrated on "
                f"{self.calibration.rows} held-out answers, and {math.ceil(acting.coverage / (1 - acting.coverage))} are needed; "
                "hold out more rows with --valid-fraction"
            )
        if self.problem_type == NUMBER:
            numbers = [float(one) * self._unit + self.middle for one in scores[:, 0]]
            reach = None if misfit is None else misfit * self._unit
            return [
                {PREDICTED: one} | ({} if reach is None else {"between": [one - reach, one + reach]}) for one in numbers
            ]
        got, chances = self._told(scores, self.thresholds)
        sure = self.calibration.confidence(self.problem_type, chances, got)
        found = []
        for told, own, confidence in zip(got, chances, map(float, sure), strict=True):
            labels = [label for label, is_told in zip(self.labels, told, strict=True) if is_told]
            answer: dict[str, Any] = {
                PREDICTED: labels if self.problem_type == SEVERAL else labels[0],
                CONFIDENCE: confidence,
            }
            if acting.answer_above is not None:
                answer["ask_a_person"] = confidence < acting.answer_above
            if misfit is not None:
                possible = (1 - own <= misfit) | told
                answer["set"] = [label for label, is_in in zip(self.labels, possible, strict=True) if is_in]
            found.append(answer | {"probabilities": dict(zip(self.labels, map(float, own), strict=True))})
        return found


def in_head(head: Mapping[str, Any]) -> list[Question]:
    """Return the questions of a score head, by what is kept of it with an adapter."""
    return [Question.of(one) for one in head.get("questions") or [head]]


def parts(questions: Iterable[Question]) -> list[tuple[Question, slice, slice]]:
    """Return each question with its columns of all scores, and its columns of all targets."""
    found, score, target = [], 0, 0
    for one in questions:
        found.append((one, slice(score, score + one.outputs), slice(target, target + one.columns)))
        score, target = score + one.outputs, target + one.columns
    return found


# Labels


def problem_of(values: Sequence[Any]) -> str:
    """Return what labels are, by transformers' names: lists are several labels, numbers that are not all whole numbers."""
    if any(isinstance(value, list) for value in values):
        return SEVERAL
    numbers = [as_number(value) for value in values]
    if all(number is not None for number in numbers) and any(number != int(number or 0) for number in numbers):
        return NUMBER
    return SINGLE


def as_number(value: Any) -> float | None:
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
    if problem in (SINGLE, ORDINAL):
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
    number = as_number(name)
    return (math.inf if number is None else number, name)


def listed(names: Sequence[str]) -> str:
    """Return names in words, the first dozen of them."""
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
        number = as_number(weight)
        if not name.strip() or number is None or not 0 < number < 1e6:
            raise InputError(
                f"--class-weights {text}: write balanced, or labels with weights above 0, as in spam=2,ham=1"
            )
        found[name.strip()] = number
    return found


def weights_of(
    text: str | None, labels: Sequence[str], counts: Counter[str], texts: int, problem: str
) -> tuple[float, ...] | None:
    """Return the weights of labels, (K,); None: all are 1.

    `balanced` is scikit-learn's N / (K n) for one label, and (N - n) / n for several, where n of N texts have a label.

    Raises:
        InputError: a weight is for no label, or no text has a label that is to be balanced.
    """
    if text is None:
        return None
    if text == BALANCED:
        if lost := [label for label in labels if not counts[label]]:
            raise InputError(
                f"--class-weights balanced: no text has the label {listed(lost)}; leave it out of --labels"
            )
        have = np.array([counts[label] for label in labels], float)
        return tuple(np.maximum(texts - have, 1) / have if problem == SEVERAL else texts / (len(labels) * have))
    found = given_weights(text)
    if strange := sorted(set(found) - set(labels)):
        raise InputError(f"--class-weights {text}: {listed(strange)} is not among the labels {listed(labels)}")
    return tuple(found.get(label, 1.0) for label in labels)
