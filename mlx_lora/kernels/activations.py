"""Compute the gated activation silu(gate) * up for training, with less to keep for the backward pass and fast exponentials.

mlx keeps gate, up, sigmoid, silu and the product: five arrays of the widest layer. Three or four are enough:

    s = sigmoid(g),  y = g s u
    dg = dy u s (1 + g (1 - s)),  du = dy g s

On a CPU, the forward pass can compute both derivatives in one compiled kernel. Keeping them instead of gate and up takes no
more memory than gate and up alone, and the backward pass only multiplies.

mlx's CPU backend computes exp(x) number by number, 8e7 a second, and its compiled kernels call the same function. They
vectorize sums and products, so a polynomial is over ten times as fast there:

    exp(-z) = C / p(z / 64)^16,   p(x) = (x'1^2 + b1) (x'2^2 + b2) (x'3^2 + b3) (x'4^2 + b4),   x'i = x + ai

p has degree 8 and approximates exp(4 x) up to a constant with an error of 1e-8 for z up to 32; the roundings, sixteen times as
large by the power, make 8e-6 at most and 1.5e-6 on average. Beyond 32, where exp(-z) is below 1e-14, p grows on: the result is
2 parts in 10^4 too large at 40 and 5% at 64, falls to 0 around 100, and is 0 for infinity. This takes no comparison, which
would not be vectorized. NaN remains NaN.

The shape of the formula is made for mlx's compiler, which fuses expressions of up to 11 levels, constants included. Four
quadratic factors, four squarings and a division are 10; with the product by 1 / 64 among them, mlx makes several slow kernels.

mlx does not compile what it differentiates: a compiled function that gets an array of a trace is inlined there. In the
forward pass of an `mx.custom_function` nothing is to be differentiated, so the trace can be left (`_untraced`). In a backward
pass, mlx treats every array as traced, so a checkpointed block that is repeated there cannot use these functions.

Shapes: any, the same for gate and up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

from mlx_lora.utils import device

# The gated activation


def lean_swiglu(keep_sigmoid: bool, gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up, differentiable in both.

    Args:
        keep_sigmoid: keep s for the backward pass; otherwise it is computed again, which saves memory, and
            time on a GPU, where an exponential costs no more than reading a number.
        gate, up: float, of one shape and dtype.
    """

    @mx.custom_function
    def forward(gate: mx.array, up: mx.array) -> list[mx.array]:
        s = device.sigmoid(gate)
        return [gate * s * up, s] if keep_sigmoid else [gate * s * up]

    @forward.vjp
    def forward_vjp(primals, cotangents, outputs):
        d = cotangents[0]
        # Depend on d: otherwise compiling would merge this sigmoid with the forward pass's, and keep it.
        gate, up = mx.depends(list(primals), d)
        s = outputs[1] if keep_sigmoid else device.sigmoid(gate)
        return [d * up * s * (1 + gate * (1 - s)), d * gate * s]

    return forward(gate, up)[0]


def polynomial_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up, differentiable in both, by polynomials where mlx compiles them, else as `lean_swiglu` does.

    Args:
        gate, up: float, of one shape and dtype.
    """

    @mx.custom_function
    def forward(gate: mx.array, up: mx.array) -> list[mx.array]:
        if usable(gate, up):
            return list(gated_silu(gate, up))
        s = device.sigmoid(gate)
        return [gate * s * up, up * s * (1 + gate * (1 - s)), gate * s]

    @forward.vjp
    def forward_vjp(primals, cotangents, outputs):
        return [cotangents[0] * slope for slope in outputs[1:]]

    return forward(gate, up)[0]


def gated_silu(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return silu(gate) * up and its derivatives by gate and by up; not differentiable.

    Args:
        gate, up: float32, of one shape; only where `usable`.
    """
    slope, silu = _compiled(_silu_slopes, gate, up, exp_minus(gate * SCALE))
    return silu * up, slope, silu


@mx.compile
def _silu_slopes(gate: mx.array, up: mx.array, power: mx.array) -> tuple[mx.array, mx.array]:
    """Return the derivatives of silu(gate) * up by gate and by up, from exp(-|gate|), without comparisons.

    s - 1/2 has gate's sign; 1e-30 beside |gate| prevents 0 / 0. Both results are one kernel only because the second is
    a part of the first, and with a third g++ would not vectorize it: too many arrays might overlap.
    """
    s = 0.5 + gate / (mx.abs(gate) + 1e-30) * (0.5 - power / (1 + power))
    silu = gate * s
    return up * (s + silu * (1 - s)), silu


# Exponentials

SCALE = 1 / 64  # exact in binary: scaling by it does not round
# Fitted by Lawson's iteration on exp(y), y in [0, 2], relative; the roots of the polynomial are -a +- i sqrt(b).
_FACTORS = (
    (0.516863536, 0.038791146),
    (-0.043133753, 0.85958444),
    (0.340985367, 0.337478156),
    (-0.758477837, 1.365307275),
)
_CONSTANT = 7.076439434428039e-11  # p(0)^16 as it is rounded in float32, so that exp(-0) is 1


def usable(*arrays: mx.array) -> bool:
    """Return whether this file's kernels are compiled here, and these arrays have the dtype that they are made for.

    mlx is asked by a function that notices whether it was inlined: it does not compile in a backward pass, without a
    C++ compiler, or if the user disabled it. A compiler that does not work counts as none.
    """
    if any(array.dtype != mx.float32 for array in arrays):
        return False
    called: list[None] = []

    @mx.compile
    def probe(x: mx.array) -> mx.array:
        called.append(None)
        return x

    with device.compiling_kernels():
        probe(mx.array(0.0))
        probe(mx.array(0.0))
        return len(called) == 1 and _compiler_works()


@cache
def _compiler_works() -> bool:
    """Compile the first kernel, once per process: g++ may lack its headers, or /tmp may refuse to hold programs."""
    try:
        mx.eval(_exp_minus(mx.zeros((8,))))
    except RuntimeError:
        return False
    return True


def exp_minus(x: mx.array) -> mx.array:
    """Return exp(-64 |x|), where x was scaled by `SCALE` beforehand; not differentiable.

    Args:
        x: float32, contiguous; only where `usable`.
    """
    return _compiled(_exp_minus, x)


def softmax(scores: mx.array) -> mx.array:
    """Return the softmax along the last axis of 64 times the scores, which were scaled by `SCALE`; not differentiable.

    Args:
        scores: float32; only where `usable`.
    """
    powers = exp_minus(scores.max(axis=-1, keepdims=True) - scores)
    return powers * (1 / powers.sum(axis=-1, keepdims=True))


@mx.compile
def _exp_minus(x: mx.array) -> mx.array:
    x = mx.abs(x)
    first, second, third, fourth = (mx.square(x + a) + b for a, b in _FACTORS)
    power = (first * second) * (third * fourth)
    for _ in range(4):
        power = mx.square(power)
    return _CONSTANT / power


def _compiled(kernel: Callable[..., Any], *arrays: mx.array) -> Any:
    with device.compiling_kernels():
        return kernel(*map(_untraced, arrays))


def _untraced(x: mx.array) -> mx.array:
    """Return the same numbers as an array that mlx does not regard as part of a trace.

    Differentiating a function ends the trace of its own arrays. Nothing is computed: the copy shares x's buffer.
    """
    [same], _ = mx.vjp(lambda x: [x], [x], [x])
    return same
