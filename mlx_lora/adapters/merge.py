"""Merge the factors that several adapters have for one layer into one pair, in the ways of PEFT's `add_weighted_adapter`.

With D_i = s_i A_i B_i the update of adapter i, s_i its scale and w_i its weight, there are three kinds of ways:

    cat, svd            sum_i w_i D_i, exactly with the sum of all ranks, or as the best approximation of a lower rank
    linear, ties ...    A = f(u_i A_i), B = f(|u_i| B_i), |u_i| = sqrt(|w_i s_i|): the factors are merged apart from each other
    ties_svd ...        f(w_i D_i), as the best approximation of a low rank: the updates are merged

where f adds up, after pruning in one of two ways, and with or without electing signs:

    magnitude   keep the share `density` of the largest numbers, and make the others zero      (TIES, trim)
    random      keep each number with probability `density`, divided by it                     (DARE)
    elect       the sign of a number is that of its sum over the adapters, or of most of them; f is the weighted mean of the
                numbers that have this sign                                                    (TIES, elect and disjoint merge)

The product of two sums is not the sum of the products: `linear` has the terms A_i B_j of different adapters in it. They are
noise, or, for adapters that started from the same A, once more what the others learned: of two with the weights 1/2, `linear` is
about D_1 + D_2. So it is rough, as PEFT's documentation says, too.

The approximation of `svd` never needs a dense update: with QR of both factors, A = Q_a R_a and B^T = Q_b R_b, the singular
values of A B are those of R_a R_b^T, which has as many rows as A has ranks. A pruned update has no low rank, so the ways that
end in `_svd` make one layer's updates dense, and approximate them as PiSSA does (initialize.py): exactly up to a narrower side
of 1,024, by subspace iteration above.

An adapter without the layer counts as zero. Experts are merged each for itself.

Shapes: r rank, N adapters, E experts; in and out are the layer's widths, where an embedding's in is its vocabulary.
Sources: PEFT 0.21, tuners/lora/model.py and utils/merge_utils.py; TIES, arXiv 2306.01708, section 3.2 and algorithm 1; DARE,
arXiv 2311.03099, section 3; task arithmetic, arXiv 2212.04089.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np

from mlx_lora.adapters.base import Factors
from mlx_lora.adapters.inject import path_key, principal_factors
from mlx_lora.utils.errors import InputError

SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class Combination:
    """One way of merging.

    Attributes:
        of: what is added up: the whole sum of the updates, the factors apart from each other, or dense updates.
        prunes: what is done to each adapter before.
        elects: whether numbers whose sign is not the elected one are left out.
        svd: whether the result is an approximation of a rank that one may choose.
    """

    of: Literal["sum", "factors", "updates"]
    prunes: Literal["magnitude", "random"] | None = None
    elects: bool = False
    svd: bool = False


COMBINATIONS = {
    "cat": Combination("sum"),
    "svd": Combination("sum", svd=True),
    "linear": Combination("factors"),
    "magnitude_prune": Combination("factors", "magnitude"),
    "ties": Combination("factors", "magnitude", elects=True),
    "dare_linear": Combination("factors", "random"),
    "dare_ties": Combination("factors", "random", elects=True),
    "magnitude_prune_svd": Combination("updates", "magnitude", svd=True),
    "ties_svd": Combination("updates", "magnitude", elects=True, svd=True),
    "dare_linear_svd": Combination("updates", "random", svd=True),
    "dare_ties_svd": Combination("updates", "random", elects=True, svd=True),
}
ALIASES = {"dare": "dare_linear"}


@dataclass(frozen=True)
class MergeSettings:
    """How adapters are merged. None is the default, and refused otherwise where it would change nothing.

    Attributes:
        how: a key of COMBINATIONS or ALIASES.
        density: the share of numbers that pruning keeps; None: 0.5.
        svd_rank: the rank of the approximation; None: the largest rank of the adapters.
        seed: of what is dropped at random; None: 0.
        majority_sign_method: how signs are elected: by the sum of the numbers (total, the default) or by the count of adapters
            (frequency).
    """

    how: str = "cat"
    density: float | None = None
    svd_rank: int | None = None
    seed: int | None = None
    majority_sign_method: str | None = None

    def __post_init__(self) -> None:
        """Raise InputError for what cannot be used, in one message."""
        if self.how not in (*COMBINATIONS, *ALIASES):
            raise InputError(f"--how {self.how}: not one of {', '.join((*COMBINATIONS, *ALIASES))}")
        way, signs = self.combination, self.majority_sign_method
        applies = {
            "--density": (self.density, way.prunes is not None, "nothing is pruned"),
            "--svd-rank": (self.svd_rank, way.svd, "the ranks of the adapters decide"),
            "--seed": (self.seed, way.prunes == "random", "nothing is drawn at random"),
            "--majority-sign-method": (signs, way.elects, "no signs are elected"),
        }
        problems = [
            f"{flag} with --how {self.how}: {why}; leave it out"
            for flag, (value, used, why) in applies.items()
            if value is not None and not used
        ]
        rules = {
            f"--density {self.density}: must be above 0 and at most 1": self.density is None or 0 < self.density <= 1,
            f"--svd-rank {self.svd_rank}: must be at least 1": self.svd_rank is None or self.svd_rank >= 1,
            f"--seed {self.seed}: must be from 0 to 2^63 - 1": self.seed is None or 0 <= self.seed < 2**63,
            f"--majority-sign-method {signs}: not one of {', '.join(SIGNS)}": signs is None or signs in SIGNS,
        }
        problems += [words for words, kept in rules.items() if not kept]
        if problems:
            raise InputError("; ".join(problems))

    @property
    def name(self) -> str:
        """The key of COMBINATIONS."""
        return ALIASES.get(self.how, self.how)

    @property
    def combination(self) -> Combination:
        """The way of merging."""
        return COMBINATIONS[self.name]

    @property
    def kept(self) -> float:
        """The share of numbers that pruning keeps."""
        return 0.5 if self.density is None else self.density


@dataclass(frozen=True)
class AdapterTerm:
    """What one adapter has for a layer: weight * scale * a b is to be in the sum.

    Attributes:
        a, b: (in, r) and (r, out), for experts (E, in, r) and (E, r, out), float32.
        scale: of the product.
        weight: of the adapter.
    """

    a: mx.array
    b: mx.array
    scale: float
    weight: float

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.a.shape[-1]


def merge_layer(path: str, parts: Sequence[AdapterTerm], settings: MergeSettings, rank: int) -> Factors:
    """Return one pair of factors whose product, without a scale, is the merged update.

    Args:
        path: of the layer; with the seed, it decides what is dropped at random.
        parts: of the adapters that have this layer, at least one.
        settings: how.
        rank: of an approximation; it is never more than what the sum has.

    Returns:
        a (in, r) and b (r, out), float32, for experts (E, in, r) and (E, r, out), evaluated.

    Raises:
        InputError: the factors have several ranks, and are to be merged apart from each other.
    """
    if settings.combination.of == "factors" and len({part.rank for part in parts}) > 1:
        instead = f"{settings.name}_svd" if settings.combination.prunes else "svd"
        raise InputError(
            f"--how {settings.how}: merges factors of one rank, and {path} has {', '.join(str(p.rank) for p in parts)}; use "
            f"--how {instead} or cat, which take any"
        )
    if parts[0].a.ndim == 3:
        each = []
        for expert in range(len(parts[0].a)):
            own = [AdapterTerm(part.a[expert], part.b[expert], part.scale, part.weight) for part in parts]
            each.append(merge_layer(f"{path}.{expert}", own, settings, rank))
        a, b = mx.stack([a for a, _ in each]), mx.stack([b for _, b in each])
    else:
        a, b = _merged(path, parts, settings, rank)
    mx.eval(a, b)  # so that one layer's updates at a time are dense
    return a, b


def _merged(path: str, parts: Sequence[AdapterTerm], settings: MergeSettings, rank: int) -> Factors:
    """Return the merged factors of one matrix."""
    way, scales = settings.combination, [part.weight * part.scale for part in parts]
    keys = mx.random.split(path_key(f"merge:{path}", settings.seed or 0), 2 * len(parts))
    if way.of == "sum":
        a = mx.concatenate([part.a for part in parts], axis=1)
        b = mx.concatenate([scale * part.b for part, scale in zip(parts, scales, strict=True)])
        return low_rank(a, b, rank) if way.svd else (a, b)
    if way.of == "updates":
        updates = [part.scale * (part.a @ part.b) for part in parts]
        pruned = [prune(update, settings, key) for update, key in zip(updates, keys[::2], strict=True)]
        update = add_up(pruned, [part.weight for part in parts], settings)
        return principal_factors(update, min(rank, *update.shape), 1.0, keys[1])
    sizes = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(size, scale) for size, scale in zip(sizes, scales, strict=True)]
    a = [prune(part.a, settings, key) for part, key in zip(parts, keys[::2], strict=True)]
    b = [prune(part.b, settings, key) for part, key in zip(parts, keys[1::2], strict=True)]
    return add_up(a, signed, settings), add_up(b, sizes, settings)


def prune(array: mx.array, settings: MergeSettings, key: mx.array) -> mx.array:
    """Return an array in which pruning has made some numbers zero.

    Args:
        array: float32, of any shape.
        settings: which of them.
        key: random key.
    """
    kept, kind = settings.kept, settings.combination.prunes
    if kind is None or kept == 1:
        return array
    if kind == "random":
        return array * mx.random.bernoulli(kept, array.shape, key=key) / kept
    count = int(kept * array.size)
    if count == 0:
        return mx.zeros_like(array)
    sizes = mx.abs(array)
    # Equal numbers stay or go together, so that the rows of a qa-lora stay equal within their groups.
    least = mx.partition(sizes.reshape(-1), array.size - count)[array.size - count]
    return mx.where(sizes >= least, array, 0)


def add_up(arrays: Sequence[mx.array], weights: Sequence[float], settings: MergeSettings) -> mx.array:
    """Return the weighted sum of arrays of one shape; with elected signs, the mean of the numbers that have them."""
    every = mx.stack(list(arrays))  # (N, ...)
    weighted = every * mx.array(list(weights)).reshape(-1, *[1] * (every.ndim - 1))
    if not settings.combination.elects:
        return weighted.sum(axis=0)
    signs = mx.sign(every)
    votes = (signs if settings.majority_sign_method == "frequency" else every).sum(axis=0)
    agrees = signs == mx.where(votes >= 0, 1, -1)
    return (weighted * agrees).sum(axis=0) / mx.maximum(agrees.sum(axis=0), 1)


def low_rank(a: mx.array, b: mx.array, rank: int) -> Factors:
    """Return the best approximation of a b with a rank, with equally large factors.

    It is computed in float64 on the host, which costs little at these sizes: QR of a long matrix in float32 loses two digits.

    Args:
        a, b: (in, R) and (R, out).
        rank: at least 1; it is lowered to R, in or out.

    Returns:
        (in, rank) and (rank, out), float32.
    """
    outer_a, inner_a = np.linalg.qr(np.array(a, np.float64))
    outer_b, inner_b = np.linalg.qr(np.array(b, np.float64).T)
    left, sizes, right = np.linalg.svd(inner_a @ inner_b.T)
    root = np.sqrt(sizes[:rank])
    narrow, wide = (outer_a @ left[:, : len(root)]) * root, root[:, None] * (right[: len(root)] @ outer_b.T)
    return mx.array(narrow, mx.float32), mx.array(wide, mx.float32)
