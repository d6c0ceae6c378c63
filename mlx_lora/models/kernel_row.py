"""One row of the table of kernels (models/kernel_table.py): what it stands for, its candidates, on what they are tried.

A class of shapes is (size, ...): the size rounded to a power of two, then what must be equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_lora.planner.shapes import KernelTerms
from mlx_lora.system.measuring import Figures, Outputs, Trial

ShapeClass = tuple[int | str, ...]
MLX = "mlx"


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Attributes:
        name: for people, and in the cache.
        shared: the name under which mlx-lm's architectures import the function.
        theirs: mlx-lm's own function.
        candidates: name -> function of the same signature; `mlx` computes as theirs does.
        assumed: the candidate of ours that is used where nothing was measured.
        class_of: takes a call's arguments and returns its class; None for a call that is always left to `theirs`.
        trial: makes what a class is tried on, in a dtype, and the exact float32 outputs of it.
        words: tells a class to people.
        count: adds to the planner's terms what a class's chosen candidate takes, by its figures or, without, by the table.
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
