"""Methods as presets over independent axes; a method is a row of this table, not a layer class.

The axes of today: scale (alpha / r, or alpha / sqrt(r)). Form, init, optimizer groups and events join as
their methods do. QLoRA is not here: it is LoRA over a quantised base, so a property of the base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """One preset.

    Attributes:
        scale: `rank` for alpha / r (arXiv 2106.09685), `sqrt_rank` for alpha / sqrt(r) (rsLoRA, 2312.03732).
    """

    scale: Literal["rank", "sqrt_rank"]

    def scale_of(self, alpha: float, rank: int) -> float:
        """Return the factor on the low-rank product."""
        return alpha / (rank if self.scale == "rank" else math.sqrt(rank))


PRESETS = {
    "lora": Method(scale="rank"),
    "rslora": Method(scale="sqrt_rank"),
}
