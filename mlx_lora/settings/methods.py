"""Methods as presets over independent axes; a method is a row of this table, not a layer class.

Layer type: which function of base and factors. Scale: of the product. Init: where the factors start. The learning
rate of B beside A's. Events: what happens between steps (training/method_hooks.py). QLoRA is not here: it is any of
these over a quantized base, so a property of the base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """One preset.

    Attributes:
        layer_type: `lora` (arXiv 2106.09685) or `dora` (2402.09353), a row of adapters/registry.py. `full`: no layer, the
            weights themselves.
        scale: `rank` for alpha / r (2106.09685), `sqrt_rank` for alpha / sqrt(r) (rsLoRA, 2312.03732).
        init: `kaiming`; `pissa`, the base's principal directions (2404.02948); `svd`, random directions with
            gains of zero (AdaLoRA, 2303.10512).
        rate_of_b: learning rate of lora_b as a multiple of lora_a's; LoRA+ advises 16 (2402.12354, section 5).
        events: `rank-budget` moves ranks to where they matter (AdaLoRA); `restarts` merges the factors and
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
    "pissa": Method(init="pissa"),
    "adalora": Method(init="svd", events="rank-budget"),
    "relora": Method(events="restarts"),
    "full": Method(layer_type="full"),
}
