"""Make small pictures for pages: decoded, shrunk and encoded again here, so that nothing of a file's own bytes is shown."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 224  # pixels
MOST_BYTES = 20_000
QUALITIES = (82, 70, 55, 40)  # of JPEG, the best one that fits


def thumbnail(picture: Image) -> bytes:
    """Return a JPEG of at most MOST_BYTES.

    Args:
        picture: Pillow's, in RGB.
    """
    side = SIDE
    while True:
        small = picture.copy()
        small.thumbnail((side, side))
        for quality in QUALITIES:
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=quality, optimize=True)
            if buffer.tell() <= MOST_BYTES:
                return buffer.getvalue()
        side //= 2  # noise, which compresses badly


def jpeg_url(content: bytes) -> str:
    """Return a JPEG as a data URL."""
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()
