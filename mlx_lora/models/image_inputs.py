"""Let a language model read pictures: put their embeddings where their tokens are, and let attention see them as it should.

A row has tokens of text and, for each picture, a run of the model's image tokens. Inside `with_images`, a call of the model with
such rows differs from one of text in up to five places, depending on the family:

    embedding    a picture's embeddings take the place of what the embedding gives for its tokens       all
    deep         more of them are added to the output of the first blocks, at these tokens              Qwen3-VL
    positions    a token has three, for time, row and column; text counts on from the largest of them   Qwen-VL, Qwen3.5
    mask         the tokens of one picture see one another, also those that follow                      Gemma 3
                 the same, in layers with a sliding window only                                         Gemma 4 26B, 31B
                 all tokens of the prompt see one another                                               PaliGemma
    per layer    what each block gets of a token by its id is that of the padding token                 Gemma 4 E2B, E4B

The model's own code runs. Its parts are changed for the duration of the context: the classes of these instances get another
`__call__`, and blocks get positions and mask through the cache argument that they have for generation, as with shared
prompts (models/prefix_attention.py).

Shapes: B rows, T columns, F embeddings of all pictures of a batch, D width, L blocks that get more, d rotated features.
Source: M-RoPE is arXiv 2409.12191 (section 2.1), DeepStack arXiv 2406.04334; Gemma's masks are transformers'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlx_lora.compat.functions import answering, mix_in
from mlx_lora.models.head import EMBEDDINGS
from mlx_lora.utils.errors import InputError

AXES = 3  # time, row, column
# Families whose pictures' tokens see one another in both directions, in every layer.
BOTH_WAYS = ("gemma3",)
PER_LAYER = "embed_tokens_per_layer"  # Gemma 4's second embedding, whose rows the blocks get


@dataclass(frozen=True)
class ImageInputSpec:
    """How a language model reads pictures.

    Attributes:
        sections: how many pairs of rotated features belong to time, row and column; None: a token has one position.
        interleaved: whether these pairs alternate, as in Qwen3-VL, or follow one another.
        both_ways: whether a picture's tokens see one another in both directions.
        windows_only: whether they do so only in layers with a sliding window.
        prompt: whether all tokens of a prompt do so, not only those of one picture.
        grouped: whether scores have an axis for the heads that share keys, as in mlx-lm's Gemma 2.
        deep: L, the number of blocks that get more of a picture.
        padding: id of the token whose per-layer embedding an image token gets, in models that have such embeddings.
    """

    sections: tuple[int, ...] | None = None
    interleaved: bool = False
    both_ways: bool = False
    windows_only: bool = False
    prompt: bool = False
    grouped: bool = False
    deep: int = 0
    padding: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ImageInputSpec:
        """Return it for a model's config.json."""
        text = config.get("text_config") or config
        rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
        sections = rope.get("mrope_section")
        vision = config.get("vision_config") or {}
        windows = text.get("use_bidirectional_attention") == "vision"
        prompt = config.get("model_type") == "paligemma"
        heads = text.get("num_attention_heads"), text.get("num_key_value_heads")
        return cls(
            sections=None if sections is None else tuple(sections),
            interleaved=bool(rope.get("mrope_interleaved")),
            both_ways=windows or prompt or config.get("model_type") in BOTH_WAYS,
            windows_only=windows,
            prompt=prompt,
            grouped=text.get("model_type") == "gemma2" and heads[0] != heads[1],
            deep=len(vision.get("deepstack_visual_indexes") or ()),
            padding=(text.get("pad_token_id") or 0) if text.get("hidden_size_per_layer_input") else None,
        )

    @property
    def layout(self) -> type[PositionsAndMask]:
        """What takes the role of the caches."""
        return PositionsAndWindowMask if self.windows_only else GroupedMask if self.grouped else PositionsAndMask

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the arrays that a batch needs, in the order of `ImageArrays`."""
        asked = {"pictures": self.both_ways, "positions": self.sections is not None, "deep": self.deep > 0}
        return ("embeddings", "places", *(name for name, needed in asked.items() if needed))


class PositionsAndMask(NamedTuple):
    """Positions and mask of a batch with pictures, in the role of every layer's cache.

    It holds only arrays and never changes, so a checkpointed block may take it as an argument.

    Attributes:
        positions: (3, B, T) int32, or an empty array: as in text.
        pictures: (B, T) int32, the number of the picture that a token belongs to, 0 for text, or 1 in a prompt that sees
            itself; or an empty array: each token sees those before it.
    """

    positions: mx.array
    pictures: mx.array

    @property
    def offset(self) -> Any:
        """What rotating layers take as the offset."""
        return self.positions if self.positions.size else 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the keys and values to attend to: those of the row itself."""
        return keys, values

    def make_mask(self, tokens: int, window_size: int | None = None, return_array: bool = False) -> Any:
        """Return the mask: (B, 1, T, T) bool, or `causal` where that is all; arguments as mlx-lm's.

        Args:
            tokens: T.
            window_size: of a sliding window: the number of positions seen, the token's own included.
            return_array: whether the mask must be an array.
        """
        seen_whole = self.pictures.size and self.shows_pictures(window_size)
        if not seen_whole and window_size is None and not return_array:
            return "causal"
        query, key = mx.arange(tokens)[:, None], mx.arange(tokens)
        seen = query >= key
        if seen_whole:
            own, other = self.pictures[:, None, :, None], self.pictures[:, None, None, :]
            seen = seen | ((own == other) & (own > 0))
        return seen if window_size is None else seen & (query < key + window_size)

    def shows_pictures(self, window_size: int | None) -> bool:
        """Return whether the tokens of a picture see one another in a layer with this window, or without one."""
        return True


class PositionsAndWindowMask(PositionsAndMask):
    """The same, of models whose pictures' tokens see one another only in layers with a sliding window."""

    def shows_pictures(self, window_size: int | None) -> bool:
        """Return whether the layer has a window."""
        return window_size is not None


class GroupedMask(PositionsAndMask):
    """The same, of models whose scores are (B, heads of keys, heads that share them, T, T)."""

    def make_mask(self, tokens: int, window_size: int | None = None, return_array: bool = False) -> Any:
        """Return the mask, (B, 1, 1, T, T) if rows have different ones."""
        mask = super().make_mask(tokens, window_size, return_array)
        return mask[:, None] if isinstance(mask, mx.array) and mask.ndim == 4 else mask


NONE = mx.zeros((0,), mx.int32)


@contextmanager
def with_images(model: nn.Module, spec: ImageInputSpec, arrays: Sequence[mx.array]) -> Iterator[None]:
    """Let a model read the pictures of a batch inside the context.

    Args:
        model: an mlx-lm model with a text part, adapted or not.
        spec: of the model.
        arrays: those that `spec.names` names: embeddings (F, D); places (B, T) int32, the number of the embedding that
            takes a token's place, from 1, 0 for text; pictures (B, T) and positions (3, B, T) as in `PositionsAndMask`;
            deep (L, F, D).
    """
    given = dict(zip(spec.names, arrays, strict=True))
    body = text_body(model)
    embedding = next(body[name] for name in EMBEDDINGS if name in body)
    places = given["places"]
    picked, real = mx.maximum(places - 1, 0), (places > 0)[..., None]
    layout = spec.layout(given.get("positions", NONE), given.get("pictures", NONE))

    def embed(own: Any, tokens: mx.array) -> mx.array:
        embedded = own(tokens)
        return mx.where(real, given["embeddings"][picked].astype(embedded.dtype), embedded)

    def embed_layers(padding: int, own: Any, tokens: mx.array) -> mx.array:
        return own(mx.where(places > 0, padding, tokens))

    def compute_body(own: Any, inputs: mx.array, cache: Any = None, *args: Any, **kwargs: Any) -> mx.array:
        # Recurrent blocks ask no cache for positions.
        caches = [None if getattr(block, "is_linear", False) else layout for block in body.layers]
        return own(inputs, cache or caches, *args, **kwargs)

    def compute_block(deep: mx.array, own: Any, *args: Any, **kwargs: Any) -> mx.array:
        out = own(*args, **kwargs)
        return out + mx.where(real, deep[picked].astype(out.dtype), 0)

    calls: list[tuple[nn.Module, Any]] = [(embedding, embed)]
    if layout.positions.size or layout.pictures.size:
        calls.append((body, compute_body))
    if spec.padding is not None:
        calls.append((body[PER_LAYER], partial(embed_layers, spec.padding)))
    for number in range(spec.deep):
        calls.append((model.layers[number], partial(compute_block, given["deep"][number])))
    with answering(*calls):
        yield


def text_body(model: nn.Module) -> Any:
    """Return the part of a model that embeds tokens and calls its blocks.

    Raises:
        InputError: it has an unknown name.
    """
    part: Any = model
    for name in ("language_model", "model"):
        part = part.get(name) if isinstance(part, nn.Module) else None
    if not isinstance(part, nn.Module) or not any(name in part for name in EMBEDDINGS):
        raise InputError(f"the text part of this {type(model).__module__} cannot be found; choose another model")
    return part


# Three positions


def prepare_rotation(model: nn.Module, spec: ImageInputSpec) -> None:
    """Let the rotating layers take three positions for each token, if the model needs that; a second call changes nothing."""
    if spec.sections is None:
        return
    for module in model.modules():
        if isinstance(module, nn.RoPE):
            module.axes = axes_of_pairs(spec.sections, spec.interleaved)
            mix_in(SectionRotation, module)


def axes_of_pairs(sections: Sequence[int], interleaved: bool) -> np.ndarray:
    """Return which of the three positions turns each pair of features, (d / 2,) int32."""
    if not interleaved:
        return np.repeat(np.arange(len(sections), dtype=np.int32) % AXES, sections)
    axes = np.zeros(sum(sections), np.int32)
    for axis in (1, 2):
        axes[axis : sections[axis] * AXES : AXES] = axis
    return axes


class SectionRotation(nn.Module):
    """A mix-in for the class of a rotating layer, which then also takes three positions for each token."""

    axes: np.ndarray

    def __call__(self, x: mx.array, offset: Any = 0, **kwargs: Any) -> mx.array:
        if not isinstance(offset, mx.array) or offset.ndim != AXES:
            return super().__call__(x, offset=offset, **kwargs)
        half = len(self.axes)
        frequencies = self.base ** (-mx.arange(half, dtype=mx.float32) / half)
        offset = offset[..., : x.shape[2]]  # a prompt's, of which this may be a part
        angles = offset.astype(mx.float32)[mx.array(self.axes)].transpose(1, 2, 0) * frequencies  # (B, T, d / 2)
        cos, sin = mx.cos(angles)[:, None], mx.sin(angles)[:, None]
        one, two, rest = (x[..., a:b].astype(mx.float32) for a, b in ((0, half), (half, 2 * half), (2 * half, None)))
        return mx.concatenate([one * cos - two * sin, two * cos + one * sin, rest], axis=-1).astype(x.dtype)


def positions_of(is_picture: np.ndarray, grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the three positions of each token of a row.

    Args:
        is_picture: (T,) bool, True at image tokens; those of a picture follow one another.
        grids: rows and columns of tokens of each picture.

    Returns:
        (3, T) int32. Text counts on; a picture begins after it, in all three; what follows begins after its largest.
    """
    found = np.zeros((AXES, len(is_picture)), np.int32)
    at = column = 0
    for rows, columns in grids:
        start = column + int(np.argmax(is_picture[column:]))
        found[:, column:start] = at + np.arange(start - column)
        at += start - column
        end = start + rows * columns
        places = np.indices((1, rows, columns)).reshape(AXES, -1)
        found[:, start:end] = at + places
        at, column = at + max(rows, columns), end
    found[:, column:] = at + np.arange(len(is_picture) - column)
    return found


# Generating

KEYS_AND_VALUES = (KVCache, RotatingKVCache)  # caches of attention; a recurrent layer has a state


class ImageKVCache:
    """Keys and values of a prompt with pictures and of what follows it; in the role of mlx-lm's caches.

    While the prompt is read, its tokens have their three positions, and see what its pictures let them see. What follows
    counts on from the largest position.
    """

    def __init__(
        self, positions: np.ndarray | None, pictures: np.ndarray | None, tokens: int, windows_only: bool = False
    ):
        """Prepare for a prompt.

        Args:
            positions: (3, 1, P) int32; None: as in text.
            pictures: (1, P) int32, see `PositionsAndMask`; None: a token sees those before it.
            tokens: P, of the prompt.
            windows_only: whether the tokens of a picture see one another only in layers with a sliding window.
        """
        self._kept, self._tokens = KVCache(), tokens
        self._positions = None if positions is None else mx.array(positions)
        self._beyond = 0 if positions is None else int(positions.max()) + 1 - tokens
        self._pictures, self._windows_only = pictures, windows_only

    @property
    def offset(self) -> Any:
        """What rotating layers take as the offset: the positions from here on, or the next one."""
        done = self._kept.offset
        if self._positions is not None and done < self._tokens:
            return self._positions[..., done:]
        return done + self._beyond

    @property
    def state(self) -> Any:
        """The arrays that it holds."""
        return self._kept.state

    def moved_to(self, cache: Any) -> Any:
        """Give the keys and values to an empty cache of mlx-lm, which counts on from the number of tokens, and return it."""
        kept: Any = self._kept
        cache.update_and_fetch(*(array[..., : kept.offset, :] for array in (kept.keys, kept.values)))
        return cache

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add the next tokens' keys and values, and return all."""
        kept: Any = self._kept
        return kept.update_and_fetch(keys, values)

    def make_mask(self, tokens: int, window_size: int | None = None, return_array: bool = False) -> Any:
        """Return the mask for the next tokens, as `PositionsAndMask.make_mask` does."""
        done = self._kept.offset
        both_ways = self._pictures is not None and done < self._tokens
        both_ways = both_ways and not (self._windows_only and window_size is None)
        if not both_ways and window_size is None and not return_array:
            return None if tokens == 1 else "causal"
        query, key = np.arange(done, done + tokens)[:, None], np.arange(done + tokens)
        seen: Any = query >= key
        if both_ways and self._pictures is not None:
            numbers = np.pad(self._pictures[0], (0, max(0, done + tokens - self._tokens)))
            own = numbers[query]
            seen |= (own == numbers[key]) & (own > 0)
        return mx.array(seen if window_size is None else seen & (query < key + window_size))


def counted_positions(positions: np.ndarray) -> np.ndarray:
    """Move a prompt's positions (3, B, P) so that the next token's is P, as in text.

    A picture's tokens share positions, so the next one is less than P. Rotation only depends on distances, so the prompt may
    begin later than at 0, and what follows it needs no caches of its own.
    """
    return positions + (positions.shape[-1] - 1 - positions.max(axis=(0, 2), keepdims=True))


class ModelWithImages:
    """A model that reads a prompt with pictures, chunk by chunk, and then text; mlx-lm's generators take it as a model."""

    def __init__(self, model: nn.Module, spec: ImageInputSpec, arrays: Sequence[mx.array], tokens: Sequence[int] = ()):
        """Prepare for one prompt.

        Args:
            model: adapted or not.
            spec: of the model.
            arrays: as `with_images` takes them, of the prompt's one row.
            tokens: of the prompt; needed if all of it sees itself (`ImageInputSpec.prompt`).
        """
        self.model, self._sight = model, spec
        self._given = dict(zip(spec.names, arrays, strict=True))
        self._places = self._given["places"]
        self._at, self._tokens = 0, tokens
        self._last: mx.array | None = None  # logits of the last token of a prompt that was computed whole
        prepare_rotation(model, spec)

    def __getattr__(self, name: str) -> Any:
        """Return the model's own attribute, such as its layers."""
        return getattr(self.model, name)

    def caches(self) -> list[Any]:
        """Return the caches of all layers."""
        caches = make_prompt_cache(self.model)  # fewer than layers if some use those of others
        if self._sight.sections is None and not self._sight.both_ways:
            return caches
        of = {name: np.array(self._given[name]) for name in ("positions", "pictures") if name in self._given}
        shape = of.get("positions"), of.get("pictures"), self._places.shape[1], self._sight.windows_only
        return [ImageKVCache(*shape) if isinstance(cache, KEYS_AND_VALUES) else cache for cache in caches]

    def prefilled(self, tokens: Sequence[int]) -> list[Any]:
        """Compute these tokens of the prompt at once, and return mlx-lm's own caches, for what follows.

        The positions are to be those of `counted_positions`, as what follows counts from the number of tokens.
        """
        caches = self.caches()
        if tokens:
            self(mx.array([list(tokens)]), cache=caches)
            own = make_prompt_cache(self.model)
            pairs = zip(own, caches, strict=True)
            caches = [kept.moved_to(new) if isinstance(kept, ImageKVCache) else kept for new, kept in pairs]
            mx.eval([cache.state for cache in caches])
        return caches

    def __call__(self, tokens: mx.array, cache: Any = None, **given: Any) -> mx.array:
        """Return the model's logits (1, T, V) for the next tokens (1, T)."""
        begin, self._at = self._at, self._at + tokens.shape[1]
        if self._sight.prompt and begin < len(self._tokens):
            return self._of_whole_prompt(begin, cache)
        if begin >= self._places.shape[1]:
            return self.model(tokens, cache=cache, **given)
        # Positions and mask are the cache's; a picture that is cut by a chunk still sees itself whole only in one chunk.
        plain = ImageInputSpec(deep=self._sight.deep, padding=self._sight.padding)
        arrays = {**self._given, "places": self._places[:, begin : self._at]}
        with with_images(self.model, plain, [arrays[name] for name in plain.names]):
            return self.model(tokens, cache=cache, **given)

    def _of_whole_prompt(self, begin: int, cache: Any) -> mx.array:
        """Return the logits of the prompt, or of its last token.

        mlx-lm's generators give the last token in a call of its own, and then the others would not see it. So the first
        call computes all of them, and the second one gets what was found.
        """
        if begin == 0:
            whole = ImageInputSpec()
            with with_images(self.model, whole, [self._given[name] for name in whole.names]):
                logits = self.model(mx.array([list(self._tokens)]), cache=cache)
            self._last = logits[:, -1:]
            return logits[:, : self._at]
        if self._last is None or begin != len(self._tokens) - 1:
            raise ValueError("a prompt that sees itself is read in one chunk")
        return self._last
