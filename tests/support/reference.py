"""The formulas of the kernel.h files in NumPy's longdouble (more exact than float64), short enough to check by eye."""

import mpmath
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


def philox(key: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """Philox4x32-10: key [..., 2] and counter [..., 4] of 32-bit words to 4 words."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (key[..., i].astype(np.uint64) for i in range(2))
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> np.uint64(32)) ^ c1 ^ k0, b & low, (a >> np.uint64(32)) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack([c0, c1, c2, c3], -1)


def words(*values: int) -> np.ndarray:
    """Numbers of 64 bits as 32-bit words, the low word first."""
    return np.array([value >> shift & 0xFFFFFFFF for value in values for shift in (0, 32)], np.uint64)


def lane_bits(seed: int, counter: int, index: np.ndarray) -> np.ndarray:
    """The 16 bits of csrc/common/philox.h's stream that belong to each element, at a counter (offset / 4)."""
    index = index.astype(np.uint64)
    block, lane = index // np.uint64(8), index % np.uint64(8)
    low, high = (np.broadcast_to(word, index.shape) for word in words(counter))
    drawn = philox(
        np.broadcast_to(words(seed), (*index.shape, 2)),
        np.stack([low, high, block & np.uint64(0xFFFFFFFF), block >> np.uint64(32)], -1),
    )
    word = np.take_along_axis(drawn, (lane // np.uint64(2)).astype(np.int64)[..., None], -1)[..., 0]
    return word >> (lane % np.uint64(2) * np.uint64(16)) & np.uint64(0xFFFF)


def keep_mask(seed: int, offset: int, p: float, count: int, first: int = 0) -> np.ndarray:
    """Which of the elements first ... first + count - 1 are kept."""
    index = np.arange(first, first + count, dtype=np.uint64)
    high, low = divmod(int(p * 2**32 + 0.5), 2**16)
    bits, tie_bits = (lane_bits(seed, (offset // 4 + i) % 2**64, index) for i in range(2))
    return ~((bits < high) | ((bits == high) & (tie_bits < low)))


def optimizer_step(name: str, h: dict, t: int, param, grad, state: dict):
    """One step of the optimizer of that name: the new parameter. `h`: torch's arguments, all of them; `t` from 1 on;
    `state`: filled at the first step, changed."""
    lr, decay = h["lr"], h["weight_decay"]
    g = -grad if h["maximize"] else grad
    if name == "AdamW":
        param = param * (1 - np.longdouble(lr) * decay)
    else:
        g = g + decay * param
    zero = np.zeros_like(g)
    if name in ("Adam", "AdamW"):
        beta1, beta2 = map(np.longdouble, h["betas"])
        state["exp_avg"] = beta1 * state.get("exp_avg", zero) + (1 - beta1) * g
        square = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", zero) + (1 - beta2) * g**2
        if h["amsgrad"]:
            square = state["max_exp_avg_sq"] = np.maximum(state.get("max_exp_avg_sq", zero), square)
        return param - lr / (1 - beta1**t) * state["exp_avg"] / (np.sqrt(square / (1 - beta2**t)) + h["eps"])
    if name == "SGD":
        momentum = np.longdouble(h["momentum"])
        if momentum != 0:
            buffer = state.get("momentum_buffer")
            buffer = g if buffer is None else momentum * buffer + (1 - np.longdouble(h["dampening"])) * g
            state["momentum_buffer"] = buffer
            g = g + momentum * buffer if h["nesterov"] else buffer
        return param - np.longdouble(lr) * g
    alpha = np.longdouble(h["alpha"])
    square = state["square_avg"] = alpha * state.get("square_avg", zero) + (1 - alpha) * g**2
    if h["centered"]:
        state["grad_avg"] = alpha * state.get("grad_avg", zero) + (1 - alpha) * g
        square = square - state["grad_avg"] ** 2
    update = g / (np.sqrt(square) + h["eps"])
    if h["momentum"] > 0:
        update = state["momentum_buffer"] = np.longdouble(h["momentum"]) * state.get("momentum_buffer", zero) + update
    return param - np.longdouble(lr) * update


def _normal_distribution(x: np.longdouble) -> np.longdouble:
    return np.longdouble(mpmath.nstr(mpmath.ncdf(mpmath.mpf(float(x)) + float(x - np.longdouble(float(x)))), 25))


def activation(name: str, x: np.ndarray, negative_slope: float = 0.01):
    """The activation that dlkit calls `name`, of x, and its derivative."""
    if name in ("none", "relu", "leaky_relu"):
        slope = np.longdouble({"none": 1, "relu": 0, "leaky_relu": negative_slope}[name])
        slope = np.where(x > 0, 1, slope)
        return x * slope, slope
    if name == "relu6":
        return np.clip(x, 0, 6), ((x > 0) & (x < 6)).astype(np.longdouble)
    if name == "hardswish":
        slope = np.where(x <= -3, 0, np.where(x < 3, x / 3 + np.longdouble(0.5), 1))
        return x * np.clip(x + 3, 0, 6) / 6, slope
    if name == "silu":
        share = 1 / (1 + np.exp(-x))
        return x * share, share + x * share * (1 - share)
    if name == "gelu":
        with mpmath.workdps(30):
            distribution = np.vectorize(_normal_distribution, [np.longdouble])(x)
        return x * distribution, distribution + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.longdouble(np.pi))
    # (1 + tanh(u)) / 2 is the logistic function of 2 u.
    factor, cubic = np.sqrt(8 / np.longdouble(np.pi)), np.longdouble(0.044715)
    share = 1 / (1 + np.exp(-factor * (x + cubic * x**3)))
    return x * share, share + x * share * (1 - share) * factor * (1 + 3 * cubic * x**2)


def cross_entropy(
    x: Tensor, target: Tensor, weight, grad_loss: Tensor, reduction: int, ignore_index: int = -100,
    label_smoothing: float = 0.0, z_scale: float = 0.0, softcap: float = 0.0,
):  # fmt: skip
    """(loss, z_loss, grad_input) for x [rows, classes], target [rows] (classes) or [rows, classes] (probabilities)."""
    values, slope, (rows, classes) = exact(x), 1, x.shape
    if softcap:
        tanh = np.tanh(values / softcap)
        values, slope = softcap * tanh, 1 - tanh**2
    w = np.ones(classes, np.longdouble) if weight is None else exact(weight)
    smooth = np.longdouble(label_smoothing) / classes
    if target.is_floating_point():
        kept = counted = np.ones(rows, np.longdouble)
        u = w * ((1 - np.longdouble(label_smoothing)) * exact(target) + smooth)
    else:
        kept = (target != ignore_index).cpu().numpy().astype(np.longdouble)
        index = np.where(kept == 1, target.cpu().numpy(), 0)
        counted = w[index] * kept
        u = np.tile(w * smooth, (rows, 1))
        u[np.arange(rows), index] += (1 - np.longdouble(label_smoothing)) * w[index]
        u *= kept[:, None]
    largest = values.max(1)
    lse = largest + np.log(np.exp(values - largest[:, None]).sum(1))
    softmax = np.exp(values - lse[:, None])
    loss, z = (u * (lse[:, None] - values)).sum(1), z_scale * lse**2 * kept
    share, z_share = (1 / counted.sum(), 1 / kept.sum()) if reduction == 1 else (1, 1)
    grad = exact(grad_loss)[..., None]
    grad_input = grad * share * (softmax * u.sum(1, keepdims=True) - u)
    grad_input = (grad_input + grad * z_share * 2 * z_scale * (lse * kept)[:, None] * softmax) * slope
    loss, z = loss * share, z * z_share
    if reduction:
        loss, z = loss.sum(), z.sum()
    return loss + z, z, grad_input
