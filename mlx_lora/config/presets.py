"""The tables of LoRA methods (`PRESETS`) and of optimizers (`OPTIMIZERS`), one row each.

A method is a preset of independent axes, not a layer class. The axes are the layer type (the function of base and
factors), the scale of the product, the initial factors, the learning rate of B relative to A's, and events between steps
(trainer/method_events.py). QLoRA is not in the table: it is any of these methods over a quantized base.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal


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


# The table of optimizers.
#
# A row says how an optimizer of mlx.optimizers is built, and the memory that the planner counts for it. To add one, add a
# row: the flag's choices, the step and the planner read this table.


@dataclass(frozen=True)
class Optimizer:
    """One optimizer.

    Attributes:
        class_name: of the class.
        state_copies: float32 numbers that it keeps for each trained number.
        update_copies: float32 numbers that one update allocates for each trained number, in addition to the state and
            the gradient; measured on arrays of at least a megabyte.
        elementwise: whether it treats every number alike, independent of its array; then it gets one flat array.
        takes_decay: whether it has a decoupled weight decay.
        takes_betas: whether it is an Adam.
        uncompiled_copies: `update_copies` in a step that is not compiled (utils/device.py); None: as many.
        options: further arguments of the class.
        module: that has the class.
    """

    class_name: str
    state_copies: int
    update_copies: float
    elementwise: bool
    takes_decay: bool
    uncompiled_copies: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    takes_betas: bool = False
    module: str = "mlx.optimizers"

    def mlx_class(self) -> type:
        """Return the class; mlx is imported here, not above, because the planner works without it."""
        return getattr(import_module(self.module), self.class_name)

    def build(self, learning_rate: Any, settings: Any) -> Any:
        """Return a new mlx optimizer.

        Args:
            learning_rate: a float, or a callable from step to rate.
            settings: an OptimizerSettings, whose other numbers are used, each only by optimizers that have it.
        """
        own: dict[str, Any] = {"weight_decay": settings.weight_decay} if self.takes_decay else {}
        if self.takes_betas:
            own |= {"betas": [settings.adam_beta1, settings.adam_beta2], "eps": settings.adam_epsilon}
            own["bias_correction"] = settings.bias_correction
        return self.mlx_class()(learning_rate, **own, **self.options)


# AdamW under its names elsewhere; what these say in addition is how its state is stored.
ADAMW = re.compile(r"(paged_)?adamw(_(torch|hf|fused|bnb|anyprecision|apex|npu|xla|mlx))*(_(4|8|32)bit)?(_fused)?")
# Adam and AdamW: arXiv 1412.6980, algorithm 1; 1711.05101. Adafactor's state of rows and columns is too small to count.
OPTIMIZERS = {
    "adamw": Optimizer("AdamW", 2, 9.0, uncompiled_copies=11.0, elementwise=True, takes_decay=True, takes_betas=True),
    "adam": Optimizer("Adam", 2, 9.0, uncompiled_copies=10.0, elementwise=True, takes_decay=False, takes_betas=True),
    "muon": Optimizer("Muon", 1, 8.5, elementwise=False, takes_decay=True, module="mlx_lora.trainer.optimizer"),
    "sgd": Optimizer("SGD", 1, 4.0, uncompiled_copies=5.0, elementwise=True, takes_decay=True),
    "adafactor": Optimizer(
        "Adafactor",
        0,
        5.5,
        elementwise=False,
        takes_decay=False,
        options={"relative_step": False, "scale_parameter": False},
    ),
}
