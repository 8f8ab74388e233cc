"""Activations and their derivatives: the one definition for Triton. KIND as csrc/common/activation.h numbers them."""

import triton
import triton.language as tl


@triton.jit
def _logistic(u):
    """(exp(-|u|), 1 / (1 + exp(-u))), which does not overflow."""
    e = tl.exp(-tl.abs(u))
    return e, tl.where(u < 0, e, 1.0) / (1.0 + e)


@triton.jit
def activation(x, negative_slope, KIND: tl.constexpr):
    """act(x). negative_slope is the slope of a leaky ReLU below 0. NaN stays NaN."""
    if KIND == 0:
        return x
    elif KIND == 1:
        return tl.where(x <= 0, 0.0, x)
    elif KIND == 2:
        return x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    elif KIND == 3:
        _, share = _logistic(x * (1.5957691216057308 + 0.07135481627260025 * (x * x)))
        return x * share
    elif KIND == 4:
        _, share = _logistic(x)
        return x * share
    elif KIND == 5:
        shifted = x + 3.0
        return x * tl.where(shifted <= 0, 0.0, tl.where(shifted < 6, shifted, 6.0)) / 6.0
    elif KIND == 6:
        return tl.where(x <= 0, 0.0, tl.where(x >= 6, 6.0, x))
    else:
        return tl.where(x > 0, x, x * negative_slope)


@triton.jit
def activation_gradient(g, x, negative_slope, KIND: tl.constexpr):
    """g * act'(x)."""
    if KIND == 0:
        return g
    elif KIND == 1:
        return tl.where(x <= 0, 0.0, g)
    elif KIND == 2:
        distribution = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return g * (distribution + x * 0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif KIND == 3:
        square = x * x
        e, share = _logistic(x * (1.5957691216057308 + 0.07135481627260025 * square))
        inverse = 1.0 / (1.0 + e)
        slope = 1.5957691216057308 + 0.21406444881780073 * square
        return g * (share + x * slope * (e * inverse * inverse))
    elif KIND == 4:
        e, share = _logistic(x)
        inverse = 1.0 / (1.0 + e)
        return g * (share + x * (e * inverse * inverse))
    elif KIND == 5:
        return tl.where(x <= -3, 0.0, tl.where(x < 3, g * (x * 0.3333333333333333 + 0.5), g))
    elif KIND == 6:
        return tl.where((x <= 0) | (x >= 6), 0.0, g)
    else:
        return tl.where(x > 0, g, g * negative_slope)
