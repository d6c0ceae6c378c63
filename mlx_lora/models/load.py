"""Load a base model for a run: find it, convert it if it is a GGUF file, check it, cast it and freeze it.

The number of token ids that a model has rows for is found by watching its embeddings, because a config may not say it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerBase

from mlx_lora.compat.foreign import TOKENIZER
from mlx_lora.compat.functions import answering
from mlx_lora.kernels.quantized_matmul import MatmulPaths, use_measured_matmul
from mlx_lora.models.convert import cast_model, folder_of
from mlx_lora.models.folder import StoredTensor, Watched, base_fingerprint, load_classifier_weights, load_weights
from mlx_lora.models.quantize import AFFINE
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_model

if TYPE_CHECKING:
    from mlx_lora.config.settings import ModelSettings

log = logging.getLogger(__name__)


@dataclass
class Base:
    """A loaded base model, whose weights are frozen.

    Attributes:
        model: the mlx-lm model, in eval mode, every parameter frozen.
        tokenizer: mlx-lm's wrapper, for generation.
        config: config.json as mlx-lm read it.
        folder: the folder with its files; for a GGUF file, the folder that it was converted to.
        model_id: what the user gave: hub id, folder or file.
        revision: the hub commit, if it came from the hub.
        fingerprint: see `base_fingerprint`.
        matmul_paths: which product its quantized layers use.
        size_bytes: of its parameters, without any adapter.
        dtypes: of its float parameters, likewise: an adapter's are float32 on a base that computes in bfloat16.
        decode_weights: --decode-weights: the form of its quantized weights while it generates (models/generator.py).
        stored: where parameters that were not read yet are stored, by path; only those that are as stored.
        source: the folder or GGUF file that `model_id` names; None: `folder`.
        adapter: the folder of the adapter that was loaded onto the model; None: none was.
        draft: of which model and adapter a head that drafts tokens was looked for, and what was found (`held_draft`).
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    folder: Path
    model_id: str
    revision: str | None
    fingerprint: str
    matmul_paths: MatmulPaths
    size_bytes: int
    dtypes: str
    decode_weights: str = "auto"
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)
    source: Path | None = None
    adapter: Path | None = None
    draft: Any = None

    @property
    def hf_tokenizer(self) -> PreTrainedTokenizerBase:
        """The transformers tokenizer inside mlx-lm's wrapper."""
        return TOKENIZER.of(self.tokenizer)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The config's quantization entry, None for a float model."""
        return self.config.get("quantization")

    @cached_property
    def token_rows(self) -> int | None:
        """The number of token ids that the embedding has rows for, None if that cannot be told."""
        return embedding_rows(self.model, self.config)

    @contextmanager
    def lent(self) -> Iterator[Base]:
        """Yield a base that shares this one's arrays and may be adapted and trained; this one stays as it is."""
        template = self.hf_tokenizer.chat_template
        try:
            yield replace(self, model=copy.deepcopy(self.model))  # copies modules, not their arrays
        finally:
            self.hf_tokenizer.chat_template = template  # an adapter may have brought its own

    def describe(self) -> str:
        """Return one line for the run header: type, blocks, size, quantization, dtypes."""
        q = self.quantization
        packing = f"{q['bits']}-bit {q.get('mode', AFFINE)} (group {q['group_size']})" if q else "not quantized"
        return f"{self.config.get('model_type')}, {len(self.model.layers)} blocks, {self.size_bytes / 1e6:.0f} MB in memory, {packing}, {self.dtypes}"


def load_base(settings: ModelSettings, read: bool = True) -> Base:
    """Return the model that `settings.model` names, cast to the compute dtype and frozen.

    A .gguf file is first converted into the cache, once per file, with its blocks carried over. So is a 16-bit model that
    --bits quantizes.

    Args:
        settings: what to load, and how.
        read: whether to read all weights now; otherwise they stay lazy, for ranks that keep only a part of them.

    Raises:
        InputError: the model, architecture or dtype is unknown, files are damaged, or a matmul path is forced on a
            float model.
    """
    if not settings.model:
        raise InputError("--model is required: a hub id, a folder or a .gguf file")
    source = resolve_model(settings.model, settings.revision, trust_remote_code=settings.trust_remote_code)
    folder = folder_of(settings, source)
    if source.kind == "gguf" and (towers := sorted(source.path.parent.glob("*mmproj*.gguf"))):
        log.info(
            f"Note: {towers[0].name}, beside the model, is not read: a GGUF model sees no pictures here. Its Hugging Face "
            "weights do"
        )
    watched = None if read else Watched()
    model, config = load_weights(folder, settings.trust_remote_code, watched)
    stored = {} if watched is None else watched.unchanged(model, folder)
    named = replace(settings, model=source.model_id, revision=source.revision)
    return replace(_base_of(model, config, folder, named, read), stored=stored, source=source.path)


def load_classifier(folder: Path, settings: ModelSettings, score: str) -> tuple[Base, mx.array]:
    """Return a reward model's folder as a base without a score head, and the head's weight, (1, D).

    Args:
        folder: as transformers writes it.
        settings: how to load it; their model is not read.
        score: the stored name of the head's weight.

    Raises:
        InputError: see `load_classifier_weights`.
    """
    model, config, weight = load_classifier_weights(folder, score)
    return _base_of(model, config, folder, replace(settings, model=str(folder), revision=None)), weight


def _base_of(
    model: nn.Module, config: dict[str, Any], folder: Path, settings: ModelSettings, read: bool = True
) -> Base:
    """Return a base of a folder's model, cast to the compute dtype and frozen; the settings name it."""
    # Before the cast: float32 norms that are rounded to float16 and then to bfloat16 differ from those rounded once.
    fingerprint = base_fingerprint(model, config)
    cast_model(model, device.compute_dtype(settings.dtype), keep_float32=True)
    _check_experts(model, settings.model or "")
    matmul_paths = use_measured_matmul(model, settings.quantized_matmul)
    model.freeze()
    if read:
        mx.eval(model.parameters())
    tokenizer = load_folder_tokenizer(folder, config, settings.trust_remote_code)
    parameters = [p for _, p in tree_flatten(model.parameters())]
    floats = {str(p.dtype).removeprefix("mlx.core.") for p in parameters if mx.issubdtype(p.dtype, mx.floating)}
    return Base(
        model,
        tokenizer,
        config,
        folder,
        settings.model or "",
        settings.revision,
        fingerprint,
        matmul_paths,
        sum(p.nbytes for p in parameters),
        "/".join(sorted(floats)),
        settings.decode_weights,
    )


def _check_experts(model: nn.Module, model_id: str) -> None:
    """Refuse 16-bit experts on a CPU, where mlx only multiplies float32 and quantized experts.

    Raises:
        InputError: the experts are in a 16-bit dtype; the message names the dtype that works.
    """
    experts = [module for module in model.modules() if isinstance(module, SwitchLinear)]
    dtypes = {module.weight.dtype for module in experts} - {mx.float32}
    if dtypes and not device.multiplies_16_bit_experts():
        found = str(dtypes.pop()).removeprefix("mlx.core.")
        raise InputError(
            f"--model {model_id}: a mixture of experts in {found}, which mlx can only compute on a GPU; "
            "give --dtype float32, or leave --dtype out"
        )


# Token ids

EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


def check_token_ids(base: Base, highest: int, source: str) -> None:
    """Refuse token ids that the embedding has no row for: MLX would read memory beyond it.

    Args:
        base: the model.
        highest: the highest token id.
        source: the origin of the ids, for the message.

    Raises:
        InputError: the embedding has too few rows.
    """
    check_highest(base.token_rows, highest, source, base.model_id)


def check_highest(rows: int | None, highest: int, source: str, model_id: str) -> None:
    """Refuse a token id beyond an embedding's rows, if their number is known.

    Raises:
        InputError: the embedding has too few rows.
    """
    if rows is not None and highest >= rows:
        raise InputError(
            f"{source}: has token {highest}, and --model {model_id} only has {rows} tokens; its tokenizer belongs "
            "to another model, or has tokens for inputs other than text"
        )


def embedding_rows(model: nn.Module, config: dict[str, Any]) -> int | None:
    """Return the number of rows of the token embedding: higher ids would read memory beyond it.

    The model is called with two tokens, but nothing is computed.

    Args:
        model: an mlx-lm model, adapted or not; for a multimodal one, this calls its text part.
        config: its config.json, used if the model does not call an embedding with the ids.

    Returns:
        The fewest rows of the embeddings that are called with the ids; else the config's number, None if it has none.
    """
    ids, rows = mx.zeros((1, 2), mx.int32), list[int]()

    def watch(embedding: Any, own: Callable[..., Any], tokens: mx.array) -> mx.array:
        if tokens is ids:
            rows.append(embedding.weight.shape[0])
        return own(tokens)

    embeddings = [module for module in model.modules() if isinstance(module, EMBEDDINGS)]
    with answering(*((module, partial(watch, module)) for module in embeddings)):
        model(ids)
    if rows:
        return min(rows)
    said = config.get("text_config", config).get("vocab_size", config.get("vocab_size"))
    return said if isinstance(said, int) else None
