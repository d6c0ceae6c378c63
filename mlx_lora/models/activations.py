"""Compute the gated activation silu(gate) * up for training, and keep less for the backward pass.

mlx keeps gate, up, sigmoid, silu and the product: five arrays of the widest layer. Three or four are enough:

    s = sigmoid(g),  y = g s u
    dg = dy u s (1 + g (1 - s)),  du = dy g s

On a CPU, the forward pass can compute both derivatives in one compiled kernel (system/exponentials.py). Keeping them instead of
gate and up takes no more memory than gate and up alone, and the backward pass only multiplies.

Shapes: any, the same for gate and up.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_lora.system import device, exponentials


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
        if exponentials.usable(gate, up):
            return list(exponentials.gated_silu(gate, up))
        s = device.sigmoid(gate)
        return [gate * s * up, up * s * (1 + gate * (1 - s)), gate * s]

    @forward.vjp
    def forward_vjp(primals, cotangents, outputs):
        return [cotangents[0] * slope for slope in outputs[1:]]

    return forward(gate, up)[0]
