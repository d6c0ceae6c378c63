"""Compute the vectors of texts with a model, and with an adapter of --objective embed.

What a vector is (pooling, prompts, how long a text may be) is kept in the run.yaml of an adapter, and in a model's own
sentence-transformers files; here it is read from there, so that search uses what was trained.

Shapes: N texts, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, TrainSettings
from mlx_lora.data.pairs import TextForm
from mlx_lora.exporters.adapter_folder import load_adapter, run_of
from mlx_lora.exporters.sentence_transformers import EmbeddingForm
from mlx_lora.losses.contrastive import normalized
from mlx_lora.models.load import Base, check_token_ids
from mlx_lora.objectives.embed import Embedder, ModelFiles, form_of, kept_choices, with_choices
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.progress import tracked

STEP = 8  # widths of batches are multiples of this


@dataclass(frozen=True)
class VectorOptions:
    """What is kept of vectors, and how many are computed together.

    Attributes:
        dims: the first so many numbers are kept; None: all.
        normalize: whether vectors have length one.
        batch_tokens: most positions of a batch.
    """

    dims: int | None = None
    normalize: bool = True
    batch_tokens: int = DEFAULT_BATCH_TOKENS


WHOLE_VECTORS = VectorOptions()


@dataclass(frozen=True)
class TextEmbedder:
    """Computes the vectors of texts.

    Attributes:
        base: the model, with or without an adapter.
        form: how texts become rows.
        embedder: of the model.
        how: what is kept of the vectors.
    """

    base: Base
    form: TextForm
    embedder: Embedder
    how: VectorOptions = WHOLE_VECTORS

    def __call__(self, texts: Sequence[str], query: bool = False, words: str = "Computing vectors") -> np.ndarray:
        """Return the vectors of texts, (N, D) float32, in their order.

        Args:
            texts: to embed.
            query: whether they are queries, or documents.
            words: what a display calls the work.

        Raises:
            InputError: a text has no tokens, or some that the model does not have.
        """
        return self.of_rows(self.form.encode(texts, self.base.hf_tokenizer, query) if texts else [], words)

    def of_rows(self, rows: Sequence[np.ndarray], words: str = "Computing vectors") -> np.ndarray:
        """Return the vectors of texts that are token ids, (N, D) float32; as for texts."""
        if empty := [number for number, row in enumerate(rows) if not len(row)]:
            raise InputError(f"text {empty[0] + 1}: is empty; fill it, or remove it")
        check_token_ids(self.base, max((int(row.max()) for row in rows), default=0), "the texts")
        found = np.zeros((len(rows), self.how.dims or self.embedder.width), np.float32)
        batches = batches_of([len(row) for row in rows], self.how.batch_tokens)
        self.base.model.eval()
        for numbers in tracked(batches, words, len(batches), "batches"):
            found[numbers] = np.array(self._vectors([rows[number] for number in numbers]))
        return found

    def _vectors(self, rows: Sequence[np.ndarray]) -> mx.array:
        lengths = np.array([len(row) for row in rows], np.int32)
        inputs = np.zeros((len(rows), -(-int(lengths.max()) // STEP) * STEP), np.int32)
        for place, row in enumerate(rows):
            inputs[place, : len(row)] = row
        vectors = self.embedder(mx.array(inputs), mx.array(lengths))[:, : self.how.dims]
        return normalized(vectors) if self.how.normalize else vectors


def batches_of(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return the numbers of rows in batches, long rows first, so that rows of similar length are together.

    Args:
        lengths: of the rows.
        batch_tokens: most positions of a batch, which has at least one row.
    """
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        widest = -(-lengths[batches[-1][0]] // STEP) * STEP if batches else 0
        if batches and (len(batches[-1]) + 1) * widest <= batch_tokens:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def form_of_run(base: Base, adapter: Path) -> EmbeddingForm | None:
    """Return what makes the vectors of the run that trained an adapter; None: it trained no vectors.

    Args:
        base: with or without the adapter.
        adapter: its folder.
    """
    run = run_of(adapter)
    if run.get("objective") != "embed":
        return None
    settings, model = train_settings({**kept_choices(run), "objective": "embed"}), ModelFiles.of(base)
    asked = with_choices(settings.objective, model)
    width, longest = Embedder.of(base.model, asked.pooling or "").width, form_of(settings, model).max_length
    return EmbeddingForm(asked.pooling or "", width, asked.query_prompt or "", asked.document_prompt or "", longest)


def open_embedder(
    settings: TrainSettings,
    base: Base,
    adapter: Path | None = None,
    ignore_fingerprint: bool = False,
    given: Collection[str] = (),
    how: VectorOptions = WHOLE_VECTORS,
) -> TextEmbedder:
    """Return what computes the vectors of a model, with an adapter's choices of pooling and prompts if it has one.

    Args:
        settings: what the user gave of pooling and prompts decides.
        base: the model; it gets the adapter.
        adapter: its folder.
        ignore_fingerprint: as for `load_adapter`.
        given: names of the settings that the user gave; if --max-seq-length is among them, it decides, too.
        how: what is kept of the vectors.

    Raises:
        InputError: the adapter does not fit the base, or the model's hidden states cannot be read.
    """
    kept = kept_choices(run_of(adapter)) if adapter else {}
    asked = settings.objective
    chosen = {name: kept[name] for name in kept if name != "max_seq_length" and getattr(asked, name) is None}
    data = settings.data
    if "max_seq_length" in kept and "max_seq_length" not in given:
        data = replace(data, max_seq_length=int(kept["max_seq_length"]))
    asked = with_choices(replace(asked, **chosen), ModelFiles.of(base))
    form = form_of(replace(settings, objective=replace(asked, embed_loss=None), data=data), ModelFiles.of(base))
    if adapter:
        load_adapter(base, adapter, ignore_fingerprint)
    embedder = Embedder.of(base.model, asked.pooling or "")
    if how.dims and how.dims > embedder.width:
        raise InputError(
            f"--dims {how.dims}: the model's vectors have {embedder.width} numbers; give at most that many"
        )
    return TextEmbedder(base, form, embedder, how)
