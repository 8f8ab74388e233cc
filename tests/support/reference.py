"""The formulas of layer_norm/kernel.h in NumPy's longdouble (more exact than float64), short enough to check by eye."""

import numpy as np
import torch
from torch import Tensor


def exact(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy().astype(np.longdouble)


def layer_norm_forward(x: Tensor, weight, bias, eps: float, rms: bool):
    """(y, mean, rstd) for x [rows, cols]."""
    x = exact(x)
    mean = np.zeros((len(x), 1), np.longdouble) if rms else x.mean(1, keepdims=True)
    rstd = 1 / np.sqrt(((x - mean) ** 2).mean(1, keepdims=True) + eps)
    y = (x - mean) * rstd
    if weight is not None:
        y = y * exact(weight)
    if bias is not None:
        y = y + exact(bias)
    return y, mean, rstd


def layer_norm_backward(grad_output: Tensor, grad_sum, x: Tensor, weight, eps: float, rms: bool):
    """(grad_input, grad_weight, grad_bias)."""
    _, mean, rstd = layer_norm_forward(x, None, None, eps, rms)
    dy, xhat = exact(grad_output), (exact(x) - mean) * rstd
    wdy = dy if weight is None else dy * exact(weight)
    mean_wdy = 0 if rms else wdy.mean(1, keepdims=True)
    grad_input = rstd * (wdy - mean_wdy - xhat * (wdy * xhat).mean(1, keepdims=True))
    if grad_sum is not None:
        grad_input = grad_input + exact(grad_sum)
    return grad_input, (dy * xhat).sum(0), dy.sum(0)


def add(x: Tensor, residual: Tensor) -> Tensor:
    """x + residual rounded once to their dtype."""
    wide = torch.float64 if x.dtype != torch.float64 else x.dtype
    return (x.to(wide) + residual.to(wide)).to(x.dtype)
