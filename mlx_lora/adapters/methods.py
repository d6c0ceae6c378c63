"""Methods as presets over independent axes; a method is a row of this table, not a layer class.

The axes of today: form (LoRA, DoRA), scale (alpha / r, or alpha / sqrt(r)), and the learning rate of B beside
A's (LoRA+). Init and events join as their methods do. QLoRA is not here: it is any of these over a quantised
base, so a property of the base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """One preset.

    Attributes:
        form: `lora` (arXiv 2106.09685) or `dora` (2402.09353): which layer.
        scale: `rank` for alpha / r (2106.09685), `sqrt_rank` for alpha / sqrt(r) (rsLoRA, 2312.03732).
        rate_of_b: learning rate of lora_b as a multiple of lora_a's; LoRA+ advises 16 (2402.12354, section 5).
    """

    form: Literal["lora", "dora"] = "lora"
    scale: Literal["rank", "sqrt_rank"] = "rank"
    rate_of_b: float = 1.0

    def scale_of(self, alpha: float, rank: int) -> float:
        """Return the factor on the low-rank product."""
        return alpha / (rank if self.scale == "rank" else math.sqrt(rank))


PRESETS = {
    "lora": Method(),
    "rslora": Method(scale="sqrt_rank"),
    "dora": Method(form="dora"),
    "lora-plus": Method(rate_of_b=16.0),
}
