"""The activations of `kernels.activations.ACTIVATIONS` inside kernels, in float32.

Only builtins of `triton.language` are used (see kernels/symmetric/triton.py), so sigmoid and tanh are written out.
"""

# Triton reads annotations of kernel arguments, and only `tl.constexpr` means something to it.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def function_and_slope(z, ACTIVATION: tl.constexpr):
    """f(z) and f'(z), elementwise."""
    if ACTIVATION == "swiglu":
        s = 1.0 / (1.0 + tl.exp(-z))
        f = z * s
        slope = s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "geglu" or ACTIVATION == "gelu":
        s = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        f = z * s
        slope = s + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "geglu-tanh" or ACTIVATION == "gelu-tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u): exact, and without the cancellation of 1 + tanh(u) at negative u.
        s = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
        f = z * s
        slope = s + f * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACTIVATION == "relu":
        f = tl.where(z < 0.0, 0.0, z)  # unlike a maximum, this keeps NaN
        slope = tl.where(z > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        r = tl.where(z < 0.0, 0.0, z)
        f = r * r
        slope = 2.0 * r
    return f, slope
