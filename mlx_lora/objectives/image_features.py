"""Keep what a frozen tower sees of each picture, so that a picture costs once and not once per epoch.

In memory up to a bound, the least recently used ones leave first; and on disk:

    <cache>/pictures/<key>/<digest>.safetensors     embeddings (n, D), and deep (L, n, D) for models that have them

The key covers everything that the numbers depend on besides the picture: tower and connector, image processor, dtype,
--max-pixels, the version of mlx-vlm and this package's code for towers and for files. All keys together hold at most MOST_DISK_BYTES; when it is full,
pictures are seen again in each epoch unless memory holds them. Numbers are stored as they were computed, so a run that reads
them, or is resumed, takes the same steps.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import OrderedDict
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_lora.data.images import DECODING
from mlx_lora.models.vision import ImageFeatures, VisionTower, arrays_of
from mlx_lora.utils import device
from mlx_lora.utils.files import cache_dir
from mlx_lora.utils.text import package_version

if TYPE_CHECKING:
    from mlx_lora.data.image_tokens import ImageProcessor, ImageTable

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
            if _folder_bytes(self._folder.parent) + _size(seen) > MOST_DISK_BYTES or free < 2 * _size(seen) + (1 << 30):
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


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


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
