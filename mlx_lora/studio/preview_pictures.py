"""The pictures on the page: those of a preview's rows, as thumbnails, and those of a run's texts.

FOLDER/pictures.npy                the number of each row's pictures
       pictures.json               by number their digests; of each picture its file, size and image tokens
       thumbnails/DIGEST.jpg       of those that a page has shown, or whose bytes are in the data

Only pictures that the data's reader has opened are shown, so a path was checked before it is here; a file that has changed since is
not shown again.
"""

from __future__ import annotations

import contextlib
import json
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


def reader_for(
    settings: TrainSettings, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> tuple[ImageReader, str] | None:
    """Return what reads the pictures of a run's data, and the kind of its records; None if the run has no pictures.

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
    return reader.fetching(settings.data.fetch_images), objective.read_as


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


class RowPictures:
    """The pictures of an index.

    Attributes:
        token: id of the image token.
    """

    def __init__(self, folder: Path):
        self._folder, self._numbers = folder, np.load(folder / NUMBERS, mmap_mode="r")
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self.token, self._rows, self._pictures = facts["token"], facts["rows"], facts["pictures"]

    def of_row(self, number: int) -> list[dict[str, Any]]:
        """Return the pictures of a row for the page, in order, the first few with their thumbnails."""
        found = []
        for place, digest in enumerate(self._rows[int(self._numbers[number])]):
            file, width, height, tokens = self._pictures[digest]
            url, kept = None, self._folder / THUMBNAILS / f"{digest}.jpg"
            with contextlib.suppress(InputError, OSError):  # the picture cannot be shown any more
                if place < MOST_OF_ROW and file is not None and not kept.is_file():
                    content = thumbnail(ImageFile(Path(file), digest, (0, 0)).pixels())
                    with replacing_file(kept) as temporary:
                        temporary.write_bytes(content)
                url = jpeg_url(kept.read_bytes()) if place < MOST_OF_ROW else None
            name = "" if file is None else Path(file).name
            found.append({"name": name, "width": width, "height": height, "tokens": tokens, "url": url})
        return found


def pictures_of_text(one: dict[str, Any], facts: dict[str, Any]) -> dict[str, list[str]]:
    """Return the pictures of a text's prompt as the report keeps them, small JPEGs as data URLs; nothing else is shown."""
    kept, digests = facts.get("pictures"), one.get("pictures")
    if not isinstance(kept, dict) or not isinstance(digests, list):
        return {}
    urls = [kept[digest] for digest in digests[:MOST_OF_ROW] if isinstance(digest, str) and digest in kept]
    found = [url for url in urls if isinstance(url, str) and url.startswith("data:image/jpeg;base64,")]
    return {"pictures": found} if found else {}
