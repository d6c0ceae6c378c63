"""The table of optimizers, one row each.

A row says how an optimizer of mlx.optimizers is built, and the memory that the planner counts for it. To add one, add a
row: the flag's choices, the step and the planner read this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


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
    module: str = "mlx.optimizers"

    def mlx_class(self) -> type:
        """Return the class; mlx is imported here, not above, because the planner works without it."""
        return getattr(import_module(self.module), self.class_name)

    def build(self, learning_rate: Any, weight_decay: float) -> Any:
        """Return a new mlx optimizer.

        Args:
            learning_rate: a float, or a callable from step to rate.
            weight_decay: used only by optimizers that have it.
        """
        decay = {"weight_decay": weight_decay} if self.takes_decay else {}
        return self.mlx_class()(learning_rate, **decay, **self.options)


# Adam and AdamW correct their bias, as in torch; by default, mlx does not (arXiv 1412.6980, algorithm 1;
# 1711.05101). Adafactor's state of rows and columns is too small to count.
OPTIMIZERS = {
    "adamw": Optimizer(
        "AdamW", 2, 9.0, uncompiled_copies=11.0, elementwise=True, takes_decay=True, options={"bias_correction": True}
    ),
    "adam": Optimizer(
        "Adam", 2, 9.0, uncompiled_copies=10.0, elementwise=True, takes_decay=False, options={"bias_correction": True}
    ),
    "muon": Optimizer("Muon", 1, 8.5, elementwise=False, takes_decay=True, module="mlx_lora.trainer.muon"),
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
