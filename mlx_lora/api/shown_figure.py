"""A matplotlib figure that a notebook shows; importing this file needs matplotlib, which is an extra."""

from __future__ import annotations

from io import BytesIO

from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports] # an extra

DOTS_PER_INCH = 120


class ShownFigure(Figure):
    """A figure with its picture: plain ones are only shown in notebooks that have imported pyplot and drawn with it."""

    def _repr_png_(self) -> bytes:
        """Return the picture, as IPython asks for it."""
        picture = BytesIO()
        self.savefig(picture, format="png", dpi=DOTS_PER_INCH)
        return picture.getvalue()
