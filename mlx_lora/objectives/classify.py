"""Classification: answer questions about a text with a label, several labels, a level of a scale, or a number (--objective classify).

It is transformers' model for sequence classification: a linear layer without a bias reads the last token after the
model's last norm, and is trained in full beside the adapter (models/head.py). Each question has its own outputs of this layer
(objectives/questions.py). Losses and measures are in losses/scores.py. The labels, in the order of the outputs, are kept with
the adapter.

What a validation learns about the scores is kept with the adapter, too: for several labels a threshold of each one's probability,
and how confidences are calibrated (losses/calibration.py). Rows that choose (which adapter is the best one, and thresholds)
are not those that calibrate; their loss is that of the calibrated scores. What the run reports is with thresholds of 1/2, because one that was chosen on the rows it is measured
on looks better than it is.

Shapes: B rows, T columns, P positions (one for each row, then padding), N texts of a set, K outputs, C columns of targets.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.labeled import LABEL, asked_columns
from mlx_lora.losses.calibration import FEWEST, Calibration
from mlx_lora.losses.cross_entropy import Arrays, Loss, token_arrays
from mlx_lora.losses.scores import NUMBER, SEVERAL
from mlx_lora.objectives.base import BoundObjective, RunContext, ScoreHead, WholeSet
from mlx_lora.objectives.questions import ACCURACY, BALANCED, Question, given_weights, in_head, listed, parts
from mlx_lora.objectives.scored_texts import ScoredTexts
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.config.objectives import ObjectiveSettings
    from mlx_lora.data.batch import Batch
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.data.load import DataSplits

TEXTS = "texts"
HELD_OUT = 0.2  # of the rows, without a validation file and --valid-fraction: a confidence needs more rows than a loss
MOST_HELD_OUT = 500  # of which each validation measures all
CHOOSING = 3  # of so many held-out rows, one chooses and the others calibrate
ENOUGH = FEWEST * CHOOSING // (CHOOSING - 1)


@dataclass(eq=False)
class Classify(ScoredTexts):
    """An objective whose rows are texts with answers to questions.

    Attributes:
        questions: what is asked of each text; what is open in them is that of the first rows that are read.
    """

    questions: list[Question]
    _settled: bool = False
    _trained_on: str = ""
    _details: dict[str, Any] = field(default_factory=dict)

    # What the labels are

    @property
    def head(self) -> ScoreHead:
        return ScoreHead(sum(one.outputs for one in self.questions), encoder_rate=3, about=self._about())

    def _about(self) -> dict[str, Any]:
        about: dict[str, Any] = {"objective": self.options.objective}
        if self.questions[0].name:  # to transformers, all labels of all questions are labels that a text may have
            labels = [
                f"{one.name}: {label}" if label else one.name for one in self.questions for label in one.labels or [""]
            ]
            return about | {
                "problem_type": SEVERAL,
                "labels": labels,
                "questions": [one.to_dict() for one in self.questions],
            }
        return about | self.questions[0].to_dict()

    def open(self, ctx: RunContext) -> None:
        super().open(ctx)
        if (head := ctx.score_head) is not None:
            named = self.questions[0].labels
            self.questions = in_head(head)
            if named:
                self.questions[0] = replace(self.questions[0], labels=named)

    def settle(self, ctx: RunContext, data: DataSplits) -> DataSplits:
        """Go on with what a validation of the run chose, and measure all held-out rows in each one if they are few."""
        self._trained_on = data.train.fingerprint
        if ctx.score_head is not None:
            self.questions = in_head(ctx.score_head)
        if ctx.settings.loop.val_batches is None and data.valid and data.valid.examples <= MOST_HELD_OUT:
            ctx.settings = replace(ctx.settings, loop=replace(ctx.settings.loop, val_batches=-1))
        return super().settle(ctx, data)

    def read_data(self, ctx: RunContext, data: DataSettings) -> DataSplits:
        if columns := asked_columns(data.label_columns):
            if self.options.labels or self.options.class_weights not in (None, BALANCED) or data.label_column:
                raise InputError(
                    "--label-columns with --labels, --label-column, or --class-weights of single labels: they are of one question; "
                    "write the labels as in --label-columns folder:work/home, and leave the others out"
                )
            self.questions = [Question.asked(one) for one in columns]
        if data.valid_fraction == DataSettings().valid_fraction:
            data = replace(data, valid_fraction=HELD_OUT)
        splits = super().read_data(ctx, data)
        # A rare label may be in held-out rows alone; in a validation file, it is a mistake.
        held_out = splits.valid if splits.report.valid_source == "held out" else None
        self._settle(list(filter(None, (splits.train, held_out))))
        return splits.changed(lambda sets: {name: self._targets(rows) for name, rows in sets.items()})

    def read_set(self, ctx: RunContext, data: DataSettings) -> EncodedSet:
        names = [one.name for one in self.questions if one.name]  # as the adapter has them
        if data.label_columns and names != [one.name for one in asked_columns(data.label_columns)]:
            raise InputError(
                f"--label-columns {data.label_columns}: the adapter answers {listed(names) or 'one question alone'}; leave it out"
            )
        rows = super().read_set(ctx, replace(data, label_columns=",".join(names) or None))
        self._settle([rows])
        return self._targets(rows)

    def _with_targets(self, rows: EncodedSet) -> EncodedSet:
        return rows  # which `_targets` gives them, when the labels of all sets are known

    def _answers(self, rows: EncodedSet) -> list[list[Any]]:
        """Return the answers of rows to each question, as records have them."""
        found = [fact[LABEL] for fact in rows.facts or ()]
        return [[one[question.name] if question.name else one for one in found] for question in self.questions]

    def _settle(self, sets: list[EncodedSet]) -> None:
        """Decide what is open in the questions by the first rows that are read; later rows change nothing."""
        if not self._settled:
            answers = [list(chain(*own)) for own in zip(*map(self._answers, sets), strict=True)]
            pairs = zip(self.questions, answers, strict=True)
            self.questions = [one.settled(own, self.options.class_weights) for one, own in pairs]
            self._settled = True

    def _targets(self, rows: EncodedSet) -> EncodedSet:
        """Return rows with the last token as their only position, and what is to be found of each text.

        Raises:
            InputError: a label is none of the question's.
        """
        targets = [one.targets(own) for one, own in zip(self.questions, self._answers(rows), strict=True)]
        return rows.with_end_scores().grouped(1, np.concatenate(targets, axis=1))

    def load_data(self, ctx: RunContext) -> DataSplits:
        data = super().load_data(ctx)
        about = self._about()
        ctx.record.identity["head"] = {name: about[name] for name in ("objective", "problem_type", "labels")}
        metric = ctx.settings.loop.metric_for_best_model
        if metric != "loss" and all(one.problem_type == NUMBER for one in self.questions):
            raise InputError(
                f"--metric-for-best-model {metric} with labels that are numbers: they have a loss only; leave it out"
            )
        targets: Any = data.train.labels
        for one, _, own in parts(self.questions):
            ctx.record.lines.append(f"{one.name or 'Labels'}: {one.counted(targets[:, own])}")
        if (held_out := data.valid.examples if data.valid else 0) < ENOUGH:
            ctx.record.lines.append(
                f"Confidence: not calibrated, which takes {ENOUGH} held-out rows; there are {held_out} (--valid-fraction "
                f"{ENOUGH} holds out as many)"
            )
        return data

    # The loss

    def bind(self, ctx: RunContext, loss: Loss, rows: EncodedSet) -> BoundObjective:
        scored, words = self.scores_of(ctx, loss)
        divided, fits = parts(self.questions), ctx.trains and rows.fingerprint == self._trained_on  # not a test set
        chooses = bool(ctx.settings.loop.keep_best)
        rated = [one for one in self.questions if one.problem_type != NUMBER]
        # A name that is reported -> that of the number of texts which it is a mean of.
        shares = {ACCURACY: TEXTS} if rated else {}
        for one in self.questions if self.questions[0].name else ():
            shares[f"loss/{one.name}"] = f"{TEXTS}/{one.name}"
        shares |= {f"{ACCURACY}/{one.name}": f"{TEXTS}/{one.name}" for one in rated if one.name}

        def summed(model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
            scores, real = scored(model, arrays), arrays["weights"]
            own = arrays["labels"][arrays["positions"] // arrays["inputs"].shape[1]]  # (P, C)
            total, count, found = mx.array(0.0), mx.array(0.0), {ACCURACY: mx.array(0.0), TEXTS: mx.array(0.0)}
            for one, columns, targets in divided:
                lost, weight, right, have = (
                    (each * real).sum() for each in one.trained(scores[:, columns], own[:, targets])
                )
                total, count = total + one.share * lost, count + one.share * weight
                found |= {f"loss/{one.name}": lost, f"{ACCURACY}/{one.name}": right, f"{TEXTS}/{one.name}": have}
                if one in rated:
                    found |= {ACCURACY: found[ACCURACY] + right, TEXTS: found[TEXTS] + have}
            return total, count, {name: found[name] for name in {**shares, **dict.fromkeys(shares.values())}}

        def examples(scores: np.ndarray, batch: Batch, arrays: Arrays) -> np.ndarray:
            real, labels, numbers = batch.weights > 0, np.array(arrays["labels"]), np.array(batch.numbers)
            rows = (batch.positions // batch.inputs.shape[1])[real]
            return np.concatenate([scores[real], labels[rows], numbers[rows, None]], axis=1)

        def measured(found: np.ndarray) -> tuple[float, dict[str, float]]:
            found = found[np.argsort(found[:, -1], kind="stable")]
            outputs = self.head.outputs
            return self.measured(found[:, :outputs], found[:, outputs:-1], fits, chooses)

        def finish(means: dict[str, float]) -> dict[str, float]:
            if not shares or not all(count in means for count in shares.values()):
                return means  # of a whole set
            return {name: means[name] / means[count] for name, count in shares.items() if means[count]}

        kinds = ", ".join(dict.fromkeys(one.problem_type for one in self.questions))
        bound = BoundObjective(
            replace(loss, train=summed, measure=summed, description=f"classify ({kinds}); {words}"),
            arrays_of,
            reports=tuple({**shares, **dict.fromkeys(shares.values())}),
            finish=finish,
            whole_set=WholeSet(scored, examples, measured),
            details=lambda: self._details,
        )
        return bound if self.pictures is None else self.pictures.shown_to(bound, ctx.base.model)

    # What is measured of a whole set

    def measured(
        self, scores: np.ndarray, targets: np.ndarray, fits: bool, chooses: bool = False
    ) -> tuple[float, dict[str, float]]:
        """Return the mean loss of a set and what is reported of it; tables of labels and confidences become details.

        Args:
            scores: (N, K).
            targets: (N, C).
            fits: choose thresholds and calibrate; else those of the adapter are measured.
            chooses: the adapter is chosen by what is reported.
        """
        chooses |= self.questions[0].problem_type == SEVERAL and not self.questions[0].name
        choosing = calibrating = np.full(len(scores), True)
        if apart := fits and chooses and len(scores) >= ENOUGH:
            calibrating = np.random.default_rng(0).permutation(len(scores)) % CHOOSING > 0
            choosing = ~calibrating
        total, count, details, reports = 0.0, 0.0, {}, dict[str, list[float]]()
        found: dict[str, float] = {}
        for number, (one, columns, own) in enumerate(parts(self.questions)):
            have = ~np.isnan(targets[:, own][:, 0])
            mine, others = (
                (scores[rows][:, columns], targets[rows][:, own]) for rows in (have & choosing, have & calibrating)
            )
            if not len(mine[0]):
                continue
            question = replace(one, calibration=Calibration(), thresholds=()) if fits else one
            question, told, tables = question.measured(*mine, not question.thresholds)
            if fits:
                question, sure = question.calibrated(*others)
                self.questions[number] = question
            else:
                sure = question.confidences(*mine)
            # As calibrated by other rows: a model that grows too sure of itself may still become more right (arXiv 2501.19195).
            how = question.calibration if apart or not fits else Calibration()
            losses, weight, _, _ = one.trained(mx.array(how.scaled(one.problem_type, mine[0])), mx.array(mine[1]))
            lost, weights = (float(np.array(each).sum(dtype=np.float64)) for each in (losses, weight))
            total, count = total + one.share * lost, count + one.share * weights
            if sure is not None:
                told |= {name: sure["after"][name][0] for name in ("ece", "brier")}
                tables["confidence"] = sure
            found |= {f"{name}/{one.name}": value for name, value in told.items()} if one.name else {}
            for name, value in told.items():
                reports.setdefault(name, []).append(value)
            details[one.name] = tables
        self._details = details.get("", {"questions": details})
        loss = total / count if count else float("nan")
        return loss, {name: float(np.mean(values)) for name, values in reports.items()} | found


def classify(settings: ObjectiveSettings) -> Classify:
    """Return the objective of --objective classify.

    Raises:
        InputError: --labels or --class-weights cannot be read.
    """
    labels = tuple(label.strip() for label in (settings.labels or "").split(",") if label.strip())
    if settings.labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
        raise InputError(f"--labels {settings.labels!r}: give at least two labels, each once, separated by commas")
    given_weights(settings.class_weights)
    return Classify(settings, [Question(problem_type=settings.problem_type, labels=labels)])


def arrays_of(batch: Batch) -> Arrays:
    """Copy a batch to the device, with what is to be found of its rows: `labels`, (B, C) float32."""
    return token_arrays(batch) | {"labels": mx.array(batch.columns["labels"].astype(np.float32))}
