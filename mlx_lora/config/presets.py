"""The table of LoRA methods, one row each.

A method is a preset of independent axes, not a layer class. The axes are the layer type (the function of base and
factors), the scale of the product, the initial factors, the learning rate of B relative to A's, and events between steps
(trainer/method_events.py). QLoRA is not in the table: it is any of these methods over a quantized base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """One LoRA method.

    Attributes:
        layer_type: `lora` (arXiv 2106.09685), `dora` (2402.09353) or `qa-lora` (2309.14717), a class of adapters/; `full`
            trains the weights themselves.
        scale: `rank` for alpha / r (2106.09685), `sqrt_rank` for alpha / sqrt(r) (rsLoRA, 2312.03732).
        init: `kaiming`; `pissa`, the base's principal directions (2404.02948); `svd`, random directions with
            gains of zero (AdaLoRA, 2303.10512).
        rate_of_b: learning rate of lora_b as a multiple of lora_a's; LoRA+ recommends 16 (2402.12354, section 5).
        events: `rank-budget` moves ranks to the most important layers (AdaLoRA); `restarts` merges the factors and
            starts new ones (ReLoRA, 2307.05695).
    """

    layer_type: str = "lora"
    scale: Literal["rank", "sqrt_rank"] = "rank"
    init: Literal["kaiming", "pissa", "svd"] = "kaiming"
    rate_of_b: float = 1.0
    events: Literal["none", "rank-budget", "restarts"] = "none"

    def scale_of(self, alpha: float, rank: int) -> float:
        """Return the factor on the low-rank product."""
        return alpha / (rank if self.scale == "rank" else math.sqrt(rank))


PRESETS = {
    "lora": Method(),
    "rslora": Method(scale="sqrt_rank"),
    "dora": Method(layer_type="dora"),
    "lora-plus": Method(rate_of_b=16.0),
    "qa-lora": Method(layer_type="qa-lora"),
    "pissa": Method(init="pissa"),
    "adalora": Method(init="svd", events="rank-budget"),
    "relora": Method(events="restarts"),
    "full": Method(layer_type="full"),
}
START_ANEW = (
    "pissa",
    "adalora",
    "relora",
)  # methods that have a start of their own, and cannot begin from plain factors
