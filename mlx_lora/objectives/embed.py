"""Embeddings for search: make the vector of a query like that of its document, and unlike those of other documents.

The examples of a step are each other's negatives, whatever micro-batches they are in, so --grad-accumulation-steps makes more
of them. One step, if it has several micro-batches (GradCache, arXiv 2101.06983):

    all texts of the step       their vectors, a micro-batch at a time, without a graph
    all vectors                 the loss, and its gradient by each vector (losses/scores.py)
    each micro-batch again      its vectors with their graph; the inner product with that gradient has the gradient of the loss

So a step takes the memory of one micro-batch and of its vectors, and a forward pass more. A single micro-batch needs none of
this. `prepare` does the first two, and the loss that the step differentiates is the third; to the trainer it is a loss like
any other.

A row's vector is the mean of its tokens' last hidden states, or that of its last or first token. It is compared by its cosine.

Shapes: E examples, K rows of each (the query, its document, negatives), B rows, T columns, D width.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapters.base import base_dims
from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, DataSettings, TrainSettings
from mlx_lora.data.pairs import TextForm, load_pairs
from mlx_lora.exporters.adapter_folder import load_adapter, run_of, vectors_of_start
from mlx_lora.exporters.sentence_transformers import EmbeddingForm
from mlx_lora.kernels.choose import training_kernels
from mlx_lora.losses.agree import choose_compute
from mlx_lora.losses.cross_entropy import Arrays, Loss, LossFunction
from mlx_lora.losses.scores import (
    COSENT,
    INFONCE,
    SCORED,
    TRIPLET,
    ContrastiveOptions,
    Texts,
    loss_and_gradient,
    losses_of,
    normalized,
    retrieval,
    spearman,
)
from mlx_lora.models.config import is_encoder
from mlx_lora.models.head import Head, find_head, with_last_block
from mlx_lora.models.load import Base, check_token_ids
from mlx_lora.objectives.base import BoundObjective, Objective, RunContext, WholeSet
from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.progress import tracked

if TYPE_CHECKING:
    from mlx_lora.data.batch import Batch
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.data.load import DataSplits

MEAN, LAST, CLS = "mean", "last", "cls"
POOLED = {
    MEAN: ("mean", "mean_tokens"),
    LAST: ("lasttoken",),
    CLS: ("cls", "cls_token"),
}  # sentence-transformers' names
MODE = "pooling_mode_"
PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}  # its names, of which the first counts
COMPUTED = {"Transformer", "Pooling", "Normalize", "Dropout"}  # modules of sentence-transformers
ACCURACY = "accuracy"  # the share of queries whose own document is nearer than all other documents of the step
# Widths to which queries are cut in their batch, where documents are longer: each is a shape that is compiled once.
STEPS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
GRADIENT, LOSSES, TOLD = "gradient", "losses", "told"  # what a prepared batch has of its rows


# Vectors


@dataclass(frozen=True)
class Embedder:
    """Computes the vectors of rows.

    Attributes:
        body: gives hidden states.
        pooling: mean, last or cls.
        both_ways: whether a token sees those behind it, so that the model has to know the lengths of rows.
    """

    body: Head
    pooling: str
    both_ways: bool = False

    @classmethod
    def of(cls, model: nn.Module, pooling: str, part_of_last: bool = False) -> Embedder:
        """Return the embedder of a model.

        Args:
            model: adapted or not.
            pooling: mean, last or cls.
            part_of_last: whether the last block may be computed at the pooled token alone, as was tried on this model.

        Raises:
            InputError: its hidden states cannot be read.
        """
        body = find_head(model, {})  # the config only decides what is done to logits
        if isinstance(body, str):
            raise InputError(
                f"--objective embed: the last hidden states of this model cannot be read ({body}); do not train or adapt its "
                "embedding or output head, or choose another model"
            )
        body = with_last_block(body, model)[0] if part_of_last and pooling != MEAN else body
        return cls(body, pooling, is_encoder(model))

    @property
    def width(self) -> int:
        """The numbers of a vector, D."""
        layer = self.body.layer
        return base_dims(layer)[isinstance(layer, nn.Embedding | nn.QuantizedEmbedding)]

    def __call__(self, inputs: mx.array, lengths: mx.array) -> mx.array:
        """Return pooled hidden states, (B, D) float32, not normalized.

        Args:
            inputs: (B, T) token ids, padded on the right.
            lengths: (B,) int32, tokens of each row; 0 for a row of padding.
        """
        rows, width = inputs.shape
        padded = {"lengths": lengths} if self.both_ways else {}  # else no token sees the padding behind it
        if self.pooling == MEAN:
            hidden = self.body.hidden(inputs, **padded).astype(mx.float32)  # (B, T, D)
            there = (mx.arange(width)[None, :] < lengths[:, None]).astype(mx.float32)[..., None]
            return (hidden * there).sum(axis=1) / mx.maximum(lengths[:, None], 1)
        at = mx.maximum(lengths - 1, 0) if self.pooling == LAST else mx.zeros_like(lengths)
        return self.body.hidden_at(mx.arange(rows) * width + at, inputs, **padded).astype(mx.float32)


def stored_choices(folder: Path) -> dict[str, Any]:
    """Return what a model's sentence-transformers files say: `pooling`, `query_prompt`, `document_prompt`, where they do.

    Args:
        folder: of the model.

    Raises:
        InputError: its vectors are computed in another way.
    """
    found: dict[str, Any] = {}
    modules = _read_json(folder / "modules.json", list)
    if strange := {str(one.get("type")).rpartition(".")[2] for one in modules if isinstance(one, dict)} - COMPUTED:
        raise InputError(
            f"{folder / 'modules.json'}: has {', '.join(sorted(strange))}, which is not supported; choose another model"
        )
    file = folder / "1_Pooling" / "config.json"
    pooled = _read_json(file)
    modes = [name.removeprefix(MODE) for name, on in pooled.items() if name.startswith(MODE) and on is True]
    modes += [str(pooled["pooling_mode"])] if "pooling_mode" in pooled else []
    known = {next((ours for ours, names in POOLED.items() if mode in names), mode) for mode in modes}
    if len(known) > 1 or known - POOLED.keys():
        raise InputError(f"{file}: pools by {' and '.join(modes)}, which is not supported; choose another model")
    found |= {"pooling": known.pop()} if known else {}
    if pooled.get("include_prompt") is False:
        raise InputError(
            f"{file}: leaves the prompt out of the mean (include_prompt), which is not supported; choose another model"
        )
    prompts = _read_json(folder / "config_sentence_transformers.json").get("prompts")
    for side, names in PROMPTS.items() if isinstance(prompts, dict) else ():
        if texts := [prompts[name] for name in names if isinstance(prompts.get(name), str)]:
            found[f"{side}_prompt"] = texts[0]
    return found


def _read_json(file: Path, kind: type = dict) -> Any:
    """Return what a file holds; an empty `kind` without the file, or if it holds something else."""
    if not file.is_file():
        return kind()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error}); download the model again") from None
    return content if isinstance(content, kind) else kind()


@dataclass(frozen=True)
class ModelFiles:
    """What is known of a model before its weights are loaded.

    Attributes:
        folder: of its files.
        longest: of an encoder, the most tokens of a text; None: it is no encoder.
    """

    folder: Path
    longest: int | None

    @classmethod
    def of(cls, base: Base) -> ModelFiles:
        """Return those of a loaded model."""
        return cls(base.folder, base.model.args.longest if is_encoder(base.model) else None)

    @property
    def longest_text(self) -> int:
        """The most tokens of a text that the model takes, or was made for."""
        limits = [_read_json(self.folder / "sentence_bert_config.json").get("max_seq_length"), self.longest]
        return min([int(limit) for limit in limits if limit], default=10**8)


def with_choices(settings: ObjectiveSettings, model: ModelFiles) -> ObjectiveSettings:
    """Return the settings with pooling and prompts, where they are open, as the model's own files say."""
    usual = {"pooling": LAST if model.longest is None else MEAN, "query_prompt": "", "document_prompt": ""}
    found = usual | stored_choices(model.folder)
    return replace(settings, **{name: value for name, value in found.items() if getattr(settings, name) is None})


def form_of(settings: TrainSettings, model: ModelFiles) -> TextForm:
    """Return how texts become rows.

    Args:
        settings: with pooling and prompts.
        model: whose limit a text is cut to.
    """
    asked, data = settings.objective, settings.data
    return TextForm(
        asked.query_prompt or "",
        asked.document_prompt or "",
        min(data.max_seq_length, model.longest_text),
        asked.embed_loss == TRIPLET,
        asked.negatives,
        data.prompt_column,
        data.completion_column,
    )


# The objective


@dataclass(eq=False)
class Embed(Objective):
    """Trains the vectors of texts.

    Attributes:
        compared: how vectors are compared.
        chosen: the settings, in which nothing is open once the data is read; None: nothing is known of the model.
    """

    compared: ContrastiveOptions
    chosen: ObjectiveSettings | None = None

    def open(self, ctx: RunContext) -> None:
        width = Embedder.of(ctx.base.model, self.settings_of(ctx).pooling or LAST).width
        if too_wide := [dim for dim in self.compared.dims if dim > width]:
            raise InputError(f"--matryoshka-dims {too_wide[0]}: the model's vectors have {width} numbers; give less")

    def settings_of(self, ctx: RunContext) -> ObjectiveSettings:
        """Return the settings with what the model's own files, and the adapter to start from, say of vectors."""
        if self.chosen is None:
            kept = vectors_of_start(ctx.settings) if ctx.trains else {}
            self.chosen = with_choices(replace(ctx.settings.objective, **kept), ModelFiles.of(ctx.base))
            if words := ", ".join(f"{name.replace('_', ' ')} {text!r}" for name, text in kept.items()):
                ctx.record.lines.append(
                    f"As in the run that trained {ctx.settings.adapter.resume_adapter_file}: {words}"
                )
        return self.chosen

    def read_data(self, ctx: RunContext, data: DataSettings) -> DataSplits:
        """Read texts that belong together, and choose the loss by their kind, if it is open.

        Raises:
            InputError: scores without a loss for them, or the other way around.
        """
        asked = self.settings_of(ctx)
        form = form_of(replace(ctx.settings, objective=asked), ModelFiles.of(ctx.base))
        splits, scored = load_pairs(data, form, ctx.base.hf_tokenizer, ctx.settings.loop.seed)
        loss = asked.embed_loss or (COSENT if scored else INFONCE)
        if scored != (loss in SCORED):
            have = "the rows have a score" if scored else "the rows have no score"
            other = " or ".join(SCORED if scored else (INFONCE, TRIPLET))
            raise InputError(f"--embed-loss {loss}: {have}; give {other}, or leave it out")
        self.chosen = replace(asked, embed_loss=loss, negatives=splits.train.group - 2)
        self.compared = replace(self.compared, loss=loss)
        return splits

    def settle(self, ctx: RunContext, data: DataSplits) -> DataSplits:
        """Leave out what writes text, or starts rows above frozen blocks."""
        loop = replace(ctx.settings.loop, sample_tokens=0, cache_trunk="off")
        ctx.settings = replace(ctx.settings, objective=self.settings_of(ctx), loop=loop)
        compute = choose_compute(ctx.settings, ctx.base, data.train, ctx.strategy)
        whole = ctx.settings.objective.pooling == MEAN  # then the last block is computed at all positions
        ctx.compute = replace(compute, loss=replace(compute.loss, part_of_last=False)) if whole else compute
        return data

    def bind(self, ctx: RunContext, loss: Loss, rows: EncodedSet) -> BoundObjective:
        model, options, pooling = ctx.base.model, self.compared, self.settings_of(ctx).pooling or LAST
        embedder = Embedder.of(model, pooling, loss.part_of_last)
        reports = () if options.loss in SCORED else (ACCURACY,)
        summed = step_loss(embedder, options, reports)
        where = "last block where pooled" if embedder.body.last is not None else "whole last block"
        kernels = None if ctx.compute is None else ctx.compute.kernels

        def prepare(batches: list[Batch], strategy: Strategy) -> list[Batch]:
            if len(batches) == 1 and strategy.ranks.size == 1:
                return batches
            with nullcontext() if kernels is None else training_kernels(model, choose=kernels):
                return with_gradients(model, embedder, batches, options, strategy)

        def examples(vectors: np.ndarray, batch: Batch, arrays: Arrays) -> np.ndarray:
            numbers = np.array(arrays["numbers"])[..., None]
            return np.concatenate([vectors, numbers], axis=2)[np.array(arrays["real"]) > 0]  # (E, K, D + 1)

        return BoundObjective(
            replace(loss, train=summed, measure=summed, description=f"{self._words(pooling)}; {where}"),
            arrays_of,
            prepare,
            reports,
            whole_set=WholeSet(
                lambda model, arrays: vectors_of(embedder, arrays),
                examples,
                lambda found: measured(found[..., :-1], found[..., -1], options),
            ),
        )

    def _words(self, pooling: str) -> str:
        options = self.compared
        number = f"margin {options.margin:g}" if options.loss == TRIPLET else f"temperature {options.temperature:g}"
        widths = f", widths {', '.join(map(str, options.dims))}" if options.dims else ""
        return f"embed: {options.loss}, {number}, {pooling} pooling{widths}"


def embed(settings: ObjectiveSettings) -> Embed:
    """Return the objective of --objective embed."""
    loss, dims = settings.embed_loss or INFONCE, _dims(settings.matryoshka_dims)
    return Embed(settings, ContrastiveOptions(loss, settings.embed_temp, settings.triplet_margin, dims))


def _dims(text: str | None) -> tuple[int, ...]:
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not all(part.isdigit() and int(part) for part in parts):
        raise InputError(f"--matryoshka-dims {text!r}: write whole numbers separated by commas, as in 384,128,64")
    return tuple(sorted({int(part) for part in parts}, reverse=True))


# A step


def arrays_of(batch: Batch) -> Arrays:
    """Copy the sides of a batch to the device, and if it is prepared, the gradient by its vectors and what was found.

    Queries and documents have widths of their own, because one side is often much shorter.
    """
    group = batch.group
    lengths = np.where(batch.mask.any(axis=1), batch.mask.argmax(axis=1) + 1, 0).astype(np.int32)
    first = np.arange(len(batch.inputs)) % group == 0
    numbers = batch.columns.get("labels", np.zeros(len(batch.inputs), np.float32))
    real = batch.real[::group].astype(np.float32)
    arrays = {"numbers": numbers.reshape(-1, group), "real": real}
    for name, of in (("queries", first), ("documents", ~first)):
        width, longest = batch.inputs.shape[1], int(lengths[of].max(initial=1))
        arrays[name] = batch.inputs[of][:, : next((step for step in STEPS if longest <= step <= width), width)]
        arrays[f"{name}_lengths"] = lengths[of]
    arrays |= {name: batch.columns[name] for name in (GRADIENT, LOSSES, TOLD) if name in batch.columns}
    return {name: mx.array(values) for name, values in arrays.items()}


def vectors_of(embedder: Embedder, arrays: Arrays) -> mx.array:
    """Return the vectors of a batch that `arrays_of` put on the device, (E, K, D)."""
    asked, found = (embedder(arrays[name], arrays[f"{name}_lengths"]) for name in ("queries", "documents"))
    return mx.concatenate([asked[:, None], found.reshape(len(asked), -1, asked.shape[-1])], axis=1)


def step_loss(embedder: Embedder, options: ContrastiveOptions, reports: tuple[str, ...]) -> LossFunction:
    """Return the loss of a batch that a step differentiates."""

    def summed(model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        vectors, texts = vectors_of(embedder, arrays), Texts(arrays["numbers"], arrays["real"])
        if GRADIENT not in arrays:  # all examples of the step
            losses, told = losses_of(vectors, texts, options)
            total = (losses * texts.real).sum()
        else:
            losses, told = (arrays[name][:: vectors.shape[1]] for name in (LOSSES, TOLD))
            through = (arrays[GRADIENT].reshape(vectors.shape) * vectors).sum()
            total = (losses * texts.real).sum() + through - mx.stop_gradient(through)
        found = ((told == 0) * texts.real).sum()
        return total, texts.real.sum(), dict.fromkeys(reports, found)

    return summed


def with_gradients(
    model: nn.Module, embedder: Embedder, batches: list[Batch], options: ContrastiveOptions, strategy: Strategy
) -> list[Batch]:
    """Return a step's batches, each with the gradient of the step's loss by its vectors.

    Args:
        model: is put in eval mode meanwhile.
        embedder: of the model.
        batches: of the step; all ranks have all of them.
        options: the loss.
        strategy: how ranks divide the vectors; all get all of them.
    """
    vectors, texts = all_vectors(model, embedder, batches, strategy)
    found = loss_and_gradient(vectors, texts, options)
    gradient, losses, told = (np.array(one) for one in (found.gradient, found.losses, found.ranks))
    prepared, first = [], 0
    for batch in batches:
        group = batch.group
        mine = slice(first, first + len(batch.inputs) // group)
        first = mine.stop
        rows: dict[str, np.ndarray] = {LOSSES: np.repeat(losses[mine], group), TOLD: np.repeat(told[mine], group)}
        rows[GRADIENT] = gradient[mine].reshape(-1, gradient.shape[-1])  # (B, D)
        prepared.append(batch.with_columns(**rows))
    return prepared


def all_vectors(
    model: nn.Module, embedder: Embedder, batches: list[Batch], strategy: Strategy = SINGLE_DEVICE
) -> tuple[mx.array, Texts]:
    """Return the vectors of all examples of some batches, (E, K, D) float32, and their texts; without a graph."""
    training = model.training
    model.eval()
    group, counts = batches[0].group, [len(batch.inputs) // batches[0].group for batch in batches]
    found = np.zeros((sum(counts), group, embedder.width), np.float32)
    starts = np.cumsum([0, *counts])
    ranks = strategy.ranks
    mine = list(range(ranks.rank, len(batches), ranks.size))
    for number, batch in enumerate(strategy.dealt(batches)):
        vectors = vectors_of(embedder, arrays_of(batch))
        mx.eval(vectors)  # one batch's activations at a time
        if number < len(mine):
            found[starts[mine[number]] : starts[mine[number] + 1]] = np.array(vectors)
    model.train(training)
    together = ranks.sum(mx.array(found.ravel())).reshape(found.shape)  # a rank has zeros for the others' examples
    texts = [arrays_of(batch) for batch in batches]
    return together, Texts(*(mx.concatenate([one[name] for one in texts]) for name in ("numbers", "real")))


# A held-out set


def measured(vectors: np.ndarray, numbers: np.ndarray, options: ContrastiveOptions) -> tuple[float, dict[str, float]]:
    """Return the mean loss of a whole set, in which each query is compared with all documents, and what is reported.

    Args:
        vectors: (E, K, D) float32.
        numbers: (E, K), see `Texts`.
        options: the loss.
    """
    texts = Texts(mx.array(numbers), mx.ones((len(numbers),)))
    found = loss_and_gradient(mx.array(vectors), texts, options)
    loss, told = float(np.array(found.losses).mean(dtype=np.float64)), np.array(found.ranks)
    if options.loss in SCORED:
        return loss, {"spearman": spearman(told, numbers[:, 0])}
    return loss, {ACCURACY: float((told == 0).mean())} if options.loss == TRIPLET else retrieval(told[:, None])


def kept_choices(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that decide what its vectors are: pooling, prompts, and how long a text may be."""
    names = ("pooling", "query_prompt", "document_prompt", "max_seq_length")
    return {name: run[name] for name in names if run.get(name) is not None}


# Compute the vectors of texts with a model, and with an adapter of --objective embed.
#
# What a vector is (pooling, prompts, how long a text may be) is kept in the run.yaml of an adapter, and in a model's own
# sentence-transformers files; here it is read from there, so that search uses what was trained.
#
# Shapes: N texts, D width.

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
