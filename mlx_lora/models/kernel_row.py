"""The row type of the table of kernels (models/kernel_table.py).

A shape class is (size, ...): a size rounded to a power of two, then properties that must be equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_lora.planner.shapes import KernelTerms
from mlx_lora.system.measuring import Figures, Outputs, Trial

ShapeClass = tuple[Any, ...]  # of numbers and words
MLX, POLYNOMIAL = "mlx", "polynomial"


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Attributes:
        name: shown to users, and used in the cache's keys.
        shared: the name under which mlx-lm's architectures import the function.
        theirs: mlx-lm's own function.
        candidates: name -> function of the same signature; `mlx` is the same as `theirs`.
        assumed: the candidate of ours that is used if nothing was measured.
        class_of: takes a call's arguments and returns its shape class, or None if the call always uses `theirs`.
        trial: takes a shape class and a dtype, returns the trial to measure and a function for its exact float32 outputs.
        words: describes a shape class to users.
        count: adds a candidate's memory for a shape class to the planner's terms, from its figures, or defaults if None.
    """

    name: str
    shared: str
    theirs: Callable[..., Any]
    candidates: Mapping[str, Callable[..., Any]]
    assumed: str
    class_of: Callable[..., ShapeClass | None]
    trial: Callable[[ShapeClass, mx.Dtype], tuple[Trial, Outputs]]
    words: Callable[[ShapeClass], str]
    count: Callable[[KernelTerms, ShapeClass, str, Figures | None], KernelTerms]


def size_class(size: int, least: int, most: int) -> int:
    """Return the power of two nearest to a size, within bounds."""
    return min(max(1 << round(math.log2(max(1, size))), least), most)
