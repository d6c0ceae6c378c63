"""A model's tower with its image processor, and what a batch gets of the pictures of its rows.

Shapes: B rows, T columns, F embeddings of a batch's pictures, padded to a power of two so that few shapes are compiled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.data.chat_template import OWN, own_template
from mlx_lora.data.image_tokens import Family, ImageProcessor, ImageTable
from mlx_lora.data.images import DECODING, jpeg_url, thumbnail
from mlx_lora.models.image_inputs import ImageInputSpec, ModelWithImages, counted_positions, positions_of
from mlx_lora.models.vision import ImageFeatures, VisionTower, arrays_of
from mlx_lora.utils import device
from mlx_lora.utils.files import cache_dir
from mlx_lora.utils.parsing import read_json
from mlx_lora.utils.text import counted, package_version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mlx_lora.config.settings import DataSettings
    from mlx_lora.models.load import Base

# Keep what a frozen tower sees of each picture, so that a picture costs once and not once per epoch.
#
# In memory up to a bound, the least recently used ones leave first; and on disk:
#
#     <cache>/pictures/<key>/<digest>.safetensors     embeddings (n, D), and deep (L, n, D) for models that have them
#
# The key covers everything that the numbers depend on besides the picture: tower and connector, image processor, dtype,
# --max-pixels, the version of mlx-vlm and this package's code for towers and for files. All keys together hold at most MOST_DISK_BYTES; when it is full,
# pictures are seen again in each epoch unless memory holds them. Numbers are stored as they were computed, so a run that reads
# them, or is resumed, takes the same steps.

log = logging.getLogger(__name__)

KIND = "pictures"
MOST_DISK_BYTES = 10 << 30
MEMORY_SHARE = 1 / 32  # of the machine's memory
SAMPLED = 64  # numbers of each of the tower's arrays that its key covers


class ImageFeatureCache:
    """Returns what the tower sees of pictures, computed at most once while there is room to keep it."""

    def __init__(
        self,
        tower: VisionTower,
        processor: ImageProcessor,
        table: ImageTable,
        most_bytes: int | None = None,
        writes: bool = True,
    ):
        """Prepare to see.

        Args:
            tower, processor: of the model.
            table: of the pictures.
            most_bytes: to keep in memory; None: a share of the machine's.
            writes: whether the disk is used.
        """
        self.tower, self.processor, self.table = tower, processor, table
        self._most = most_kept_bytes() if most_bytes is None else most_bytes
        self._kept: OrderedDict[str, ImageFeatures] = OrderedDict()
        self._bytes = 0
        self._uses_disk = self._writes = writes
        self.computed = self.read = 0

    @cached_property
    def _folder(self) -> Path:
        """Named when a picture is first seen: an adapter may be put on the tower until then."""
        return cache_dir(KIND) / tower_key(self.tower, self.processor)

    def of(self, digest: str) -> ImageFeatures:
        """Return what is seen of a picture.

        Raises:
            InputError: its file has changed, or the tower fails.
        """
        found = self._kept.get(digest)
        if found is None:
            found = (self._stored(digest) if self._uses_disk else None) or self._computed(digest)
            self._keep(digest, found)
        self._kept.move_to_end(digest)
        return found

    def _keep(self, digest: str, seen: ImageFeatures) -> None:
        self._kept[digest] = seen
        self._bytes += _size(seen)
        while self._bytes > self._most and len(self._kept) > 1:
            self._bytes -= _size(self._kept.popitem(last=False)[1])

    def _computed(self, digest: str) -> ImageFeatures:
        pixels = self.processor.pixels(self.table.pictures[digest].pixels())
        seen = self.tower.features(pixels, self.table.shown[digest].tokens)
        self.computed += 1
        self._store(digest, seen)
        return seen

    def _stored(self, digest: str) -> ImageFeatures | None:
        """Return what is on disk of a picture; None if nothing is, or something else."""
        file = self._folder / f"{digest}.safetensors"
        if not file.is_file():
            return None
        try:
            arrays = mx.load(str(file))
            if not isinstance(arrays, dict):
                return None
            seen = ImageFeatures(arrays["embeddings"], arrays.get("deep"))
            mx.eval(seen.embeddings, seen.deep if seen.deep is not None else ())
        except (RuntimeError, KeyError, ValueError):
            return None
        if seen.embeddings.shape != (self.table.shown[digest].tokens, self.tower.width):
            return None
        self.read += 1
        return seen

    def _store(self, digest: str, seen: ImageFeatures) -> None:
        """Write what is seen of a picture, completely or not at all; without room, nothing more is written in this run."""
        if not self._writes:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._folder).free
            stored = sum(file.stat().st_size for file in self._folder.parent.rglob("*.safetensors"))
            if stored + _size(seen) > MOST_DISK_BYTES or free < 2 * _size(seen) + (1 << 30):
                self._writes = False
                log.info(
                    f"Pictures: no more room in {self._folder.parent}; what does not fit in memory is computed again "
                    "in each epoch"
                )
                return
            deep = {} if seen.deep is None else {"deep": seen.deep}
            temporary = self._folder / f".{digest}.safetensors"
            mx.save_safetensors(str(temporary), {"embeddings": seen.embeddings, **deep})
            temporary.replace(self._folder / f"{digest}.safetensors")
        except (OSError, RuntimeError) as error:
            self._writes = False
            log.info(f"Note: pictures cannot be kept for the next epoch: {self._folder}: {error}")


def most_kept_bytes() -> int:
    """Return the bytes that are kept in this machine's memory at most."""
    return int(device.current_device().memory_bytes * MEMORY_SHARE)


def _size(seen: ImageFeatures) -> int:
    return seen.embeddings.nbytes + (0 if seen.deep is None else seen.deep.nbytes)


def tower_key(tower: VisionTower, processor: ImageProcessor) -> str:
    """Return what tells towers apart, 32 hex digits."""
    digest = hashlib.sha256()
    for name, array in arrays_of(tower.model).items():
        flat = array.reshape(-1)
        step = max(1, flat.size // SAMPLED)
        picked = flat[::step] if not mx.issubdtype(flat.dtype, mx.floating) else flat[::step].astype(mx.float32)
        digest.update(f"{name} {array.shape} {array.dtype}".encode() + np.asarray(picked).tobytes())
    code = resources.files("mlx_lora.models").joinpath("vision.py").read_bytes()
    versions = [package_version(name) for name in ("mlx", "mlx-vlm", "transformers", "pillow")]
    # The same weights see something else with another window or epsilon.
    own = {name: v for name, v in processor.config.items() if name == "vision_config" or not isinstance(v, dict)}
    facts = [processor.identity, own, versions, device.measured_on(), tower.rescale, DECODING]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode() + code)
    return digest.hexdigest()[:32]


# A model's tower with its image processor, and what a batch gets of the pictures of its rows

FEWEST = 16  # embeddings that a batch has room for


@dataclass(frozen=True)
class VisionEncoder:
    """A model's tower with its image processor, and how the language model reads what it sees.

    Attributes:
        tower: frozen.
        processor: makes pixels and tokens of pictures.
        spec: of the language model.
        table: of the pictures.
        seen: what the tower saw.
        trained: whether tower or connector are trained, so that what it sees changes.
    """

    tower: VisionTower
    processor: ImageProcessor
    spec: ImageInputSpec
    table: ImageTable
    seen: ImageFeatureCache
    trained: bool = False

    @classmethod
    def of(
        cls, base: Base, data: DataSettings, table: ImageTable, tower: VisionTower, trained: bool = False
    ) -> VisionEncoder:
        """Put a base's tower and its image processor together.

        Raises:
            InputError: it has a family that is not known here.
        """
        processor, spec = ImageProcessor(base.folder, base.config, data.max_pixels), ImageInputSpec.of(base.config)
        return cls(tower, processor, spec, table, ImageFeatureCache(tower, processor, table), trained)

    def with_tower(self, tower: VisionTower) -> VisionEncoder:
        """Return it with another tower of the same model, by which no picture is seen yet."""
        return replace(self, tower=tower, seen=ImageFeatureCache(tower, self.processor, self.table))

    def identity(self) -> str:
        """Return what tells other pictures, or other pixels of them, apart."""
        facts = [self.table.rows, sorted(self.table.pictures), self.processor.max_pixels]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def words(self) -> str:
        """Return a line on the pictures for the run's header."""
        tokens = [shown.tokens for shown in self.table.shown.values()]
        if not tokens:
            return "Pictures: none in the data"
        sizes = [picture.size for picture in self.table.pictures.values()]
        largest = max(sizes, key=lambda size: size[0] * size[1])
        each = (
            f"{min(tokens)} to {max(tokens)} tokens each" if min(tokens) < max(tokens) else f"{max(tokens)} tokens each"
        )
        limit = f", at most {self.processor.max_pixels:,} pixels" if self.processor.max_pixels else ""
        return (
            f"Pictures: {counted(len(tokens), 'picture')}, the largest {largest[0]} x {largest[1]} pixels{limit}; {each}, "
            f"{np.mean(tokens):.0f} on average"
        )

    def arrays(
        self, inputs: np.ndarray, rows: list[tuple[str, ...]], prompts: np.ndarray | None = None
    ) -> list[mx.array] | UnseenPictures:
        """Return the arrays that `with_images` takes for a batch, or if the tower is trained, what `shown` makes them of.

        Args:
            inputs: (B, T) token ids.
            rows: the digests of each row's pictures.
            prompts: (B,) the number of tokens of each row before its first answer; None: a row is a prompt.

        Raises:
            InputError: a picture's file has changed.
        """
        digests = [digest for row in rows for digest in row]
        each = np.array([sum(self.table.shown[digest].tokens for digest in row) for row in rows], np.int64)
        is_picture, count = inputs == self.tower.token, int(each.sum())  # (B, T)
        is_picture &= np.cumsum(is_picture, axis=1) <= each[:, None]  # one that the model wrote itself is text
        if int(is_picture.sum()) != count:
            raise ValueError(f"{int(is_picture.sum())} image tokens, and {count} embeddings for them")
        places = np.where(is_picture, np.cumsum(is_picture).reshape(is_picture.shape), 0).astype(np.int32)
        given = {"places": mx.array(places)}
        if self.spec.prompt:
            ends = np.full(len(inputs), inputs.shape[1]) if prompts is None else prompts
            given["pictures"] = mx.array((np.arange(inputs.shape[1]) < ends[:, None]).astype(np.int32))
        elif self.spec.both_ways:
            given["pictures"] = mx.array(self._numbers(is_picture, rows))
        if self.spec.sections is not None:
            grids = [[self.table.shown[digest].grid for digest in row] for row in rows]
            found = [positions_of(row, grid) for row, grid in zip(is_picture, grids, strict=True)]
            given["positions"] = mx.array(np.stack(found, axis=1))  # (3, B, T)
        if self.trained:
            each = list(dict.fromkeys(digests))
            which = [each.index(digest) for digest in digests]
            return UnseenPictures(given, [self._pixels(digest) for digest in each], which)
        return self._with_embeddings(given, [self.seen.of(digest) for digest in digests])

    def prompt_arrays(self, tokens: Sequence[int], digests: tuple[str, ...]) -> list[mx.array]:
        """Return the arrays that `with_images` takes for a prompt, whose next token has the position that it has in text.

        Args:
            tokens: of the prompt.
            digests: of its pictures.
        """
        arrays = self.shown(self.arrays(np.array([tokens], np.int32), [digests]))
        given = dict(zip(self.spec.names, arrays, strict=True))
        if "positions" in given:
            given["positions"] = mx.array(counted_positions(np.array(given["positions"])))
        return [given[name] for name in self.spec.names]

    def shown(self, pictures: Sequence[mx.array] | UnseenPictures) -> Sequence[mx.array]:
        """Return the arrays that `with_images` takes; a trained tower is asked about the pictures here."""
        if not isinstance(pictures, UnseenPictures):
            return pictures
        seen = [self.tower(*one) for one in pictures.pixels]
        return self._with_embeddings(pictures.given, [seen[number] for number in pictures.which])

    def _pixels(self, digest: str) -> tuple[dict[str, mx.array], int]:
        """Return what the tower takes of a picture, and the number of its tokens."""
        pixels = self.processor.pixels(self.table.pictures[digest].pixels())
        return {name: mx.array(value) for name, value in pixels.items()}, self.table.shown[digest].tokens

    def _with_embeddings(self, given: dict[str, mx.array], seen: Sequence[ImageFeatures]) -> list[mx.array]:
        """Return a batch's arrays with what is seen of its pictures, padded."""
        count = sum(len(one.embeddings) for one in seen)
        room = max(FEWEST, 1 << max(0, count - 1).bit_length()) - count
        width, dtype = self.tower.width, seen[0].embeddings.dtype if seen else mx.float32
        embeddings = mx.concatenate([*(one.embeddings for one in seen), mx.zeros((room, width), dtype)])
        given = {**given, "embeddings": embeddings}
        if self.spec.deep:
            deep = [one.deep for one in seen if one.deep is not None]
            given["deep"] = mx.concatenate([*deep, mx.zeros((self.spec.deep, room, width), dtype)], axis=1)
        return [given[name] for name in self.spec.names]

    def _numbers(self, is_picture: np.ndarray, rows: list[tuple[str, ...]]) -> np.ndarray:
        """Return the number of the picture that each token belongs to, in its row; (B, T) int32, 0 for text."""
        found = np.zeros(is_picture.shape, np.int32)
        for number, row in enumerate(rows):
            lengths = [self.table.shown[digest].tokens for digest in row]
            found[number][is_picture[number]] = np.repeat(np.arange(1, len(row) + 1), lengths)
        return found


@dataclass(frozen=True)
class UnseenPictures:
    """The pictures of a batch that a trained tower is yet to be asked about.

    Attributes:
        given: the batch's arrays that do not depend on it, by name.
        pixels: for each different picture, what the tower takes, and the number of its tokens.
        which: of `pixels`, for each place of a picture in the batch; answers to one prompt show the same one.
    """

    given: dict[str, mx.array]
    pixels: list[tuple[dict[str, mx.array], int]]
    which: list[int]


def image_template(tokenizer: PreTrainedTokenizerBase, folder: Path, family: Family) -> str | None:
    """Return the chat template of a model that shows pictures; None if it has no template.

    Older folders have two: that of the tokenizer for text alone, and the processor's in chat_template.json.
    """
    own = own_template(tokenizer) or family.template
    file = folder / "chat_template.json"
    if (own is None or family.place not in own) and file.is_file():
        found = read_json(file, "download the model again").get("chat_template")
        return found if isinstance(found, str) else own
    return own


def put_template(tokenizer: PreTrainedTokenizerBase, folder: Path, data: DataSettings, family: Family) -> None:
    """Give a model's tokenizer the template that shows pictures, unless the settings name another."""
    if data.chat_template in (None, OWN) and (template := image_template(tokenizer, folder, family)) is not None:
        tokenizer.chat_template = template


# What a report needs of the pictures of a prompt: thumbnails of them, and a model that reads the prompt with them


@dataclass(frozen=True)
class PromptPictures:
    """The pictures of a prompt.

    Attributes:
        vision: sees them.
        digests: of them, in order.
    """

    vision: VisionEncoder
    digests: tuple[str, ...]

    def within(self, tokens: Sequence[int]) -> PromptPictures | None:
        """Return those that some of a row's first tokens show; None if these end inside a picture, or show none."""
        left, found = sum(token == self.vision.tower.token for token in tokens), []
        for digest in self.digests:
            if left <= 0:
                break
            found.append(digest)
            left -= self.vision.table.shown[digest].tokens
        return None if left or not found else PromptPictures(self.vision, tuple(found))

    def thumbnails(self) -> dict[str, str]:
        """Return the pictures as data URLs of small JPEGs, by digest.

        Raises:
            InputError: a picture's file has changed.
        """
        pictures = self.vision.table.pictures
        return {digest: jpeg_url(thumbnail(pictures[digest].pixels())) for digest in self.digests}

    def model(self, model: nn.Module, tokens: Sequence[int]) -> ModelWithImages:
        """Return what reads a prompt with the pictures, and then text.

        Args:
            model: as it is now, with or without an adapter.
            tokens: of the prompt.

        Raises:
            InputError: a picture's file has changed.
        """
        arrays = self.vision.shown(self.vision.arrays(np.array([list(tokens)], np.int32), [self.digests]))
        return ModelWithImages(model, self.vision.spec, arrays, tokens)
