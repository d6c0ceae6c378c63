"""The pictures on the page: those of a preview's rows, as thumbnails, and those of a run's texts.

FOLDER/pictures.npy                the number of each row's pictures
       pictures.json               by number their digests; of each picture its file, size and image tokens
       thumbnails/DIGEST.jpg       of those that a page has shown, or whose bytes are in the data

Only pictures that the data's reader has opened are shown, so a path was checked before it is here; a file that has changed since is
not shown again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_lora.data.images import ImageFile
from mlx_lora.data.thumbnails import jpeg_url, thumbnail
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import replacing_file
from mlx_lora.utils.parsing import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.data.image_tokens import ImageReader, ImageTable

NUMBERS, FACTS, THUMBNAILS = "pictures.npy", "pictures.json", "thumbnails"
MOST_OF_ROW = 4  # pictures of a row, or of a text's prompt, that are shown
MOST_KEPT = 2000  # thumbnails of pictures that are no files; further ones are not shown


def reader_for(settings: TrainSettings, folder: Path, tokenizer: PreTrainedTokenizerBase) -> ImageReader | None:
    """Return what reads the pictures of a run's data; None if the run has none.

    Args:
        settings: of the run.
        folder: of the model, with config.json and its image processor.
        tokenizer: gets the template that shows pictures.

    Raises:
        InputError: the model sees no pictures.
    """
    if not (settings.objective.images or settings.objective.objective == "vision_sft"):
        return None
    from mlx_lora.data.image_tokens import ImageProcessor
    from mlx_lora.objectives.pictures import WithPictures
    from mlx_lora.objectives.table import objective_of
    from mlx_lora.objectives.vision_encoder import put_template

    objective, config = objective_of(settings.objective), read_json(folder / "config.json", "download the model again")
    if not isinstance(objective, WithPictures):
        return None
    processor = ImageProcessor(folder, config, settings.data.max_pixels)
    put_template(tokenizer, folder, settings.data, processor.family)
    reader = objective.reader(settings.data, processor, config)
    return reader.fetching(settings.data.fetch_images)


def write_pictures(folder: Path, numbers: np.ndarray, table: ImageTable, token: int) -> None:
    """Write what a preview needs of its rows' pictures.

    Args:
        folder: of the index.
        numbers: (R,) int32, of each row in the table.
        table: of the pictures.
        token: id of the image token.
    """
    np.save(folder / NUMBERS, numbers)
    pictures = {}
    (folder / THUMBNAILS).mkdir()
    for digest, picture in table.pictures.items():
        is_file = isinstance(picture.source, Path)
        pictures[digest] = [str(picture.source) if is_file else None, *picture.size, table.shown[digest].tokens]
        if not is_file and len(pictures) <= MOST_KEPT:
            (folder / THUMBNAILS / f"{digest}.jpg").write_bytes(thumbnail(picture.pixels()))
    (folder / FACTS).write_text(
        json.dumps({"rows": table.rows, "pictures": pictures, "token": token}), encoding="utf-8"
    )


@dataclass(frozen=True)
class RowPictures:
    """The pictures of an index.

    Attributes:
        folder: of the index.
        numbers: (R,) of each row.
    """

    folder: Path
    numbers: np.ndarray

    @classmethod
    def of(cls, folder: Path) -> RowPictures | None:
        """Return those of an index; None if its rows have none."""
        file = folder / NUMBERS
        return cls(folder, np.load(file, mmap_mode="r")) if file.is_file() else None

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return json.loads((self.folder / FACTS).read_text(encoding="utf-8"))

    @property
    def token(self) -> int:
        """The id of the image token."""
        return self._facts["token"]

    def of_row(self, number: int) -> list[dict[str, Any]]:
        """Return the pictures of a row for the page, in order, the first few with their thumbnails."""
        found = []
        for place, digest in enumerate(self._facts["rows"][int(self.numbers[number])]):
            file, width, height, tokens = self._facts["pictures"][digest]
            name = "" if file is None else Path(file).name
            url = self._url(digest, file) if place < MOST_OF_ROW else None
            found.append({"name": name, "width": width, "height": height, "tokens": tokens, "url": url})
        return found

    def _url(self, digest: str, file: str | None) -> str | None:
        """Return a thumbnail as a data URL; None if the picture cannot be shown any more."""
        kept = self.folder / THUMBNAILS / f"{digest}.jpg"
        try:
            if not kept.is_file():
                if file is None:
                    return None
                content = thumbnail(ImageFile(Path(file), digest, (0, 0)).pixels())
                with replacing_file(kept) as temporary:
                    temporary.write_bytes(content)
            return jpeg_url(kept.read_bytes())
        except (InputError, OSError):
            return None


def in_runs(tokens: np.ndarray, mask: np.ndarray, token: int) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Return a row's tokens and mask in parts, each with how many image tokens it is; 0 for text.

    Args:
        tokens, mask: (T,).
        token: id of the image token.
    """
    edges = [0, *(np.flatnonzero(np.diff(tokens == token)) + 1).tolist(), len(tokens)]
    return [(tokens[a:b], mask[a:b], b - a if tokens[a] == token else 0) for a, b in pairwise(edges) if b > a]


def pictures_of_text(one: dict[str, Any], facts: dict[str, Any]) -> dict[str, list[str]]:
    """Return the pictures of a text's prompt as the report keeps them, small JPEGs as data URLs; nothing else is shown."""
    kept, digests = facts.get("pictures"), one.get("pictures")
    if not isinstance(kept, dict) or not isinstance(digests, list):
        return {}
    urls = [kept[digest] for digest in digests[:MOST_OF_ROW] if isinstance(digest, str) and digest in kept]
    found = [url for url in urls if isinstance(url, str) and url.startswith("data:image/jpeg;base64,")]
    return {"pictures": found} if found else {}
