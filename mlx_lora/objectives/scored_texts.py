"""What classifiers and rerankers have in common: a score head over a language model or over an encoder, in training and afterwards.

An encoder cannot take a text that is longer than its table of positions, so --max-seq-length is at most that.

A trained head scores texts in batches of similar length. A text's scores do not depend on the others in its batch but for
rounding.

Shapes: N texts, K outputs of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, DataSettings
from mlx_lora.data.chat_template import resolve_template
from mlx_lora.data.data_sets import all_files
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import Conversation, Text
from mlx_lora.data.labeled import LABEL, encode_texts, query_with
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.data.tokenize import Encoder
from mlx_lora.losses.cross_entropy import Arrays, Loss, token_arrays
from mlx_lora.losses.scores import NUMBER, ORDINAL, SEVERAL, SINGLE
from mlx_lora.models.config import is_encoder
from mlx_lora.models.head import SCORE, body_of, scores_at, with_last_block
from mlx_lora.models.image_inputs import prepare_rotation, with_images
from mlx_lora.models.load import Base
from mlx_lora.objectives.base import Objective
from mlx_lora.objectives.questions import AS_THEY_ARE, CONFIDENCE, PREDICTED, Acting, in_head, parts
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.data.batch import Batch
    from mlx_lora.data.image_tokens import ImageReader
    from mlx_lora.data.load import DataSplits
    from mlx_lora.objectives.base import RunContext
    from mlx_lora.objectives.vision_encoder import VisionEncoder

ANSWERS, ERROR = "answers", "error"


@dataclass(eq=False)
class ScoredTexts(Objective):
    """An objective whose score head an encoder may have, too."""

    def open(self, ctx: RunContext) -> None:
        super().open(ctx)
        if ctx.settings.loop.cache_trunk == "on" and is_encoder(ctx.base.model):
            raise InputError(
                f"--cache-trunk on with --model {ctx.base.model_id}: an encoder's blocks depend on the length of a row; leave it out"
            )

    def load_data(self, ctx: RunContext) -> DataSplits:
        data, head = super().load_data(ctx), self.head
        if head and is_encoder(ctx.base.model):
            from mlx_lora.models.encoder import start_words

            ctx.record.lines.append(start_words(ctx.base.model, head.outputs))
        return data

    def read_data(self, ctx: RunContext, data: DataSettings) -> DataSplits:
        return super().read_data(ctx, within_positions(data, ctx.base.model))

    def read_set(self, ctx: RunContext, data: DataSettings) -> EncodedSet:
        return super().read_set(ctx, within_positions(data, ctx.base.model))

    def scores_of(self, ctx: RunContext, loss: Loss) -> tuple[Callable[[nn.Module, Arrays], mx.array], str]:
        """Return what computes the scores of a batch at its positions, (P, K), and words on it; arguments as for `bind`."""
        body = body_of(ctx.base.model)
        body = with_last_block(body, ctx.base.model)[0] if loss.part_of_last else body
        words = f"last block {'whole' if body.last is None else 'where scored'}"
        return lambda model, arrays: scores_at(model, body, arrays), words


def as_share(means: dict[str, float], name: str, count: str) -> dict[str, float]:
    """Turn the sums of a step into a share, because the loss may be divided by something else than what is counted."""
    return {name: means[name] / means[count]} if means.get(count) else means


def within_positions(data: DataSettings, model: nn.Module) -> DataSettings:
    """Return the settings with a length that the model can take."""
    if not is_encoder(model):
        return data
    return replace(data, max_seq_length=min(data.max_seq_length, model.args.longest))


# Scores of a trained head


@dataclass(frozen=True)
class TextScorer:
    """A model with a score head, which is ready to score texts.

    Attributes:
        base: with the adapter on it.
        head: what the outputs mean, as `ScoreHead.about` has it.
        data: template and length.
        batch_tokens: the most positions of a batch, padding included.
    """

    base: Base
    head: dict[str, Any]
    data: DataSettings = field(default_factory=DataSettings)
    batch_tokens: int = DEFAULT_BATCH_TOKENS

    @classmethod
    def of(
        cls, base: Base, head: dict[str, Any] | None, data: DataSettings, batch_tokens: int | None = None
    ) -> TextScorer:
        """Return the scorer of a model with an adapter; outputs without names get transformers', LABEL_0 and so on.

        Raises:
            InputError: the model has no score head.
        """
        if SCORE not in base.model:
            raise InputError(f"--model {base.model_id}: has no score head; give an adapter of --objective classify")
        outputs = base.model.score.weight.shape[0]
        if head is None:
            named = [f"LABEL_{number}" for number in range(outputs)] if outputs > 1 else []
            head = {"objective": "classify", "problem_type": SINGLE if outputs > 1 else NUMBER, "labels": named}
        return cls(base, head, data, batch_tokens or DEFAULT_BATCH_TOKENS)

    @property
    def sees(self) -> bool:
        """Whether it may be asked about pictures."""
        return "vision_config" in self.base.config

    @cached_property
    def _eyes(self) -> tuple[ImageReader, VisionEncoder]:
        """What reads pictures and sees them: those below the folders of --data, or of Python's caller all."""
        from mlx_lora.data.image_tokens import ImageReader, ImageTable  # texts need none of it
        from mlx_lora.models.vision import open_tower
        from mlx_lora.objectives.vision_encoder import VisionEncoder, put_template

        vision = VisionEncoder.of(self.base, self.data, ImageTable.empty(), open_tower(self.base))
        put_template(self.base.hf_tokenizer, self.base.folder, self.data, vision.processor.family)
        prepare_rotation(self.base.model, vision.spec)
        roots = [one.path.parent for one in all_files(self.data.data)] if self.data.data else [Path.cwd(), Path("/")]
        reader = ImageReader(vision.processor, list(dict.fromkeys(roots)), vision.table, vision.tower.token)
        return reader.fetching(self.data.fetch_images), vision

    def encode(
        self, texts: Sequence[Text | Conversation]
    ) -> tuple[dict[int, np.ndarray], dict[int, str], dict[int, int]]:
        """Return number -> tokens of texts, why others have none, and number -> that of their pictures.

        Raises:
            InputError: there is a chat, and no template; or the model cannot see pictures.
        """
        tokenizer: Any = self.base.hf_tokenizer
        chats = any(isinstance(text, Conversation) for text in texts)
        reader = self._eyes[0] if chats and any(hasattr(text, "sources") for text in texts) else None
        template = resolve_template(self.data.chat_template, tokenizer)[0] if chats else None
        encoder = Encoder(
            tokenizer,
            template,
            max_seq_length=within_positions(self.data, self.base.model).max_seq_length,
            allow_special_tokens=self.data.allow_special_tokens,
        )
        tokens, dropped, _, shown = encode_texts(encoder if reader is None else reader.encoder(encoder), texts)
        return tokens, dropped, shown

    def score(
        self, encoded: Mapping[int, np.ndarray], count: int, shown: Mapping[int, int] | None = None
    ) -> np.ndarray:
        """Return the scores of texts, (count, K) float32, NaN for numbers without tokens.

        Args:
            encoded: number -> tokens.
            count: of all numbers.
            shown: number -> that of its pictures.
        """
        model, rows, places = self.base.model, list(encoded.values()), list(encoded)
        scores = np.full((count, model.score.weight.shape[0]), np.nan, np.float32)
        if not rows:
            return scores
        texts = EncodedSet.from_rows([(tokens, np.zeros(len(tokens), bool)) for tokens in rows]).with_end_scores()
        if shown:
            texts = replace(texts, pictures=np.array([shown.get(number, 0) for number in places], np.int32))
        plan = BatchPlan(texts, batch_tokens=self.batch_tokens, batch_size=None, seed=0)
        body, at = body_of(model), np.array(places)
        for batch in plan.batches():
            with self._shown(batch) if shown else nullcontext():
                found = np.array(scores_at(model, body, token_arrays(batch)))  # (P, K)
            real: Any = batch.weights > 0
            numbers: Any = batch.numbers
            scores[at[numbers[batch.positions[real] // batch.inputs.shape[1]]]] = found[real]
        return scores

    def _shown(self, batch: Batch) -> AbstractContextManager[None]:
        """Let the model read the pictures of a batch inside the context."""
        vision = self._eyes[1]
        rows = vision.table.of_numbers(batch.columns["pictures"], len(batch.inputs))
        arrays = vision.arrays(batch.inputs, rows, batch.mask.argmax(axis=1) + 1)
        return with_images(self.base.model, vision.spec, vision.shown(arrays))

    def answers(
        self, scores: np.ndarray, dropped: dict[int, str], acting: Acting = AS_THEY_ARE
    ) -> list[dict[str, Any]]:
        """Return what is predicted of each text, as JSON values; see `Question.answers`.

        Of several questions, `answers` has these values by the questions' names. A text that cannot be used has only `error`.

        Raises:
            InputError: the calibration has too few rows for the coverage.
        """
        told = [(one.name, one.answers(scores[:, columns], acting)) for one, columns, _ in parts(in_head(self.head))]
        rows = [{name: own[number] for name, own in told} for number in range(len(scores))]
        found = [row.get("", {ANSWERS: row}) for row in rows]
        return [{ERROR: dropped[number]} if number in dropped else one for number, one in enumerate(found)]

    def columns(self, acting: Acting) -> list[str]:
        """Return the columns of a table of answers; `in_columns` gives their values."""
        told = ["predicted", CONFIDENCE, *acting.adds]
        return [_column(name, one.name) for one in in_head(self.head) for name in told]

    @staticmethod
    def in_columns(record: Mapping[str, Any]) -> dict[str, Any]:
        """Return a record with its answers to several questions as columns."""
        answers = record.get(ANSWERS) or {}
        return {**record} | {_column(name, one): value for one, own in answers.items() for name, value in own.items()}

    @staticmethod
    def doubt(answer: Mapping[str, Any]) -> float:
        """Return how doubtful an answer is, between 0 and 1: the mean over its questions; 0 if none has a confidence."""
        told = (answer.get(ANSWERS) or {"": answer}).values()
        sure = [one[CONFIDENCE] for one in told if CONFIDENCE in one]
        return 1 - sum(sure) / len(sure) if sure else 0.0

    def rank(self, query: str, documents: Sequence[str]) -> tuple[np.ndarray, int]:
        """Return how well documents answer a query, (N,) float64 between 0 and 1, and the number of tokens that were read."""
        encoded, dropped, _ = self.encode([query_with(query, one) for one in documents])
        if dropped:
            raise InputError(f"a document cannot be used: {next(iter(dropped.values()))}")
        scores = self.score(encoded, len(documents))[:, 0].astype(np.float64)
        return 1 / (1 + np.exp(-scores)), sum(map(len, encoded.values()))

    def predict(self, texts: Sequence[Text | Conversation], acting: Acting = AS_THEY_ARE) -> list[dict[str, Any]]:
        """Return what is predicted of each text; see `answers`."""
        encoded, dropped, shown = self.encode(texts)
        return self.answers(self.score(encoded, len(texts), shown), dropped, acting)


def _column(name: str, question: str) -> str:
    """Return the column of what is told of a question; the only question of an adapter has no name."""
    return f"{name}_{question}" if question else name


def vllm_form(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer as vLLM has it, with `labels` for several labels, `value` for a number, and what we say besides.

    Of several questions, `answers` has these values by the questions' names.
    """
    if ANSWERS in answer:
        return {ANSWERS: {name: vllm_form(one) for name, one in answer[ANSWERS].items()}}
    chances, found = list(answer.get("probabilities", {}).values()), answer[PREDICTED]
    named = "value" if not chances else "labels" if isinstance(found, list) else "label"
    more = {name: value for name, value in answer.items() if name not in (PREDICTED, "probabilities")}
    return {named: found, "probs": chances, "num_classes": len(chances), **more}


# Types of mlx-vlm's decisions, by the problem that a question is.
DECISIONS = {SINGLE: "choice", ORDINAL: "score", SEVERAL: "multi_label", NUMBER: "number"}
YES = ("yes", "true", "1")


def decision_form(head: Mapping[str, Any], answer: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return a text's answers as mlx-vlm's /v1/decisions has them: of each question its type, value and probabilities.

    Args:
        head: of the adapter, whose questions these are.
        answer: as `TextScorer.answers` gives it.
        asked: name -> mapping with the `type` that the client asked for; a `bool` or `noul` gets the probability of yes.

    Raises:
        InputError: the adapter does not answer a question, or not as a `bool`.
    """
    found, told = {}, answer.get(ANSWERS) or {LABEL: answer}
    known = {one.name or LABEL: one for one in in_head(head)}
    for name in asked or known:
        if name not in known:
            raise InputError(f"questions: {name} is not among those of the adapter, {', '.join(known)}")
        own, kind = told[name], DECISIONS[known[name].problem_type]
        chances: dict[str, float] = own.get("probabilities", {})
        if (asked.get(name) or {}).get("type") in ("bool", "noul"):
            sure = next((chance for label, chance in chances.items() if label.lower() in YES), None)
            if kind != "choice" or sure is None:
                raise InputError(f"questions: {name} is no bool, its answers are {', '.join(chances) or 'numbers'}")
            found[name] = {"type": "bool", "value": sure >= 0.5, "probability": sure}
            continue
        found[name] = {"type": kind, "value": own[PREDICTED], "metadata": {"confidence": own.get(CONFIDENCE)}}
        if kind == "score":  # the mean level, from 0
            found[name]["value"] = sum(level * chance for level, chance in enumerate(chances.values()))
            found[name]["metadata"]["legend"] = dict(enumerate(chances))
            chances = dict(zip(map(str, range(len(chances))), chances.values(), strict=True))
        found[name]["probabilities"] = chances
    return found


def in_order(scores: np.ndarray) -> list[tuple[int, float]]:
    """Return (number, score) of documents, the highest score first; equal ones keep their order."""
    return [(int(i), float(scores[i])) for i in np.argsort(-scores, kind="stable")]
