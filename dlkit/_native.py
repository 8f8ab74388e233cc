"""dlkit's ops in torch's own ops, for exported and traced programs, which may run where dlkit is not installed.

Signatures are those of the ops' schemas. A function may also stand in the op's own file, and be given to dlkit._ops.op.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlkit._activation import activated


def _widened(norm: Callable[..., Tensor], input: Tensor, *args: Any) -> Tensor:
    """Also takes 16-bit input with fp32 weights, which torch takes only on a CPU."""
    dtype = next((arg.dtype for arg in args if isinstance(arg, Tensor)), input.dtype)
    return norm(input, *args) if dtype == input.dtype else norm(input.to(dtype), *args).to(input.dtype)


def layer_norm(input: Tensor, *args: Any) -> Tensor:
    return _widened(F.layer_norm, input, *args)


def rms_norm(input: Tensor, *args: Any) -> Tensor:
    return _widened(F.rms_norm, input, *args)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: int = 0,
    negative_slope: float = 0.01,
) -> Tensor:
    y = _widened(F.group_norm, input, num_groups, weight, bias, eps)
    return activated(y if residual is None else y + residual, activation, negative_slope)


def instance_norm(input: Tensor, *args: Any) -> Tensor:
    return F.instance_norm(input, *args)


def add_layer_norm(input: Tensor, residual: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    total = input + residual
    return layer_norm(total, *args), total


def add_rms_norm(input: Tensor, residual: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    total = input + residual
    return rms_norm(total, *args), total


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: int,
    negative_slope: float = 0.01,
) -> Tensor:
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        momentum = 1.0 / float(num_batches_tracked) if momentum is None else momentum
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum or 0.0, eps)
    return activated(y if residual is None else y + residual, activation, negative_slope)


def dropout(
    input: Tensor,
    p: float,
    mask_ndim: int,
    alpha: bool,
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
    stream: Tensor | None = None,
) -> Tensor:
    refuse_generator(generator, stream)
    if mask_ndim == -1:
        return (torch.alpha_dropout if alpha else torch.dropout)(input, p, training)
    drop = torch.feature_alpha_dropout if alpha else torch.feature_dropout
    # torch's drop what belongs to the first two dimensions.
    return drop(input, p, training) if mask_ndim == 2 else drop(input.unsqueeze(0), p, training).squeeze(0)


def dropout_(input: Tensor, *args: Any, **generators: Any) -> None:
    input.copy_(dropout(input, *args, **generators))


def dropout_add(input: Tensor, residual: Tensor, p: float, **generators: Any) -> Tensor:
    return dropout(input, p, -1, False, **generators) + residual


def dropout_add_layer_norm(
    input: Tensor, residual: Tensor, shape: Any, p: float, *args: Any, **generators: Any
) -> tuple[Tensor, Tensor]:
    return add_layer_norm(dropout(input, p, -1, False, **generators), residual, shape, *args)


def dropout_add_rms_norm(
    input: Tensor, residual: Tensor, shape: Any, p: float, *args: Any, **generators: Any
) -> tuple[Tensor, Tensor]:
    return add_rms_norm(dropout(input, p, -1, False, **generators), residual, shape, *args)


def bias_act_dropout(
    input: Tensor, bias: Tensor | None, activation: int, p: float, *, generator: Any, stream: Any
) -> Tensor:
    x = input if bias is None else input + bias
    y = activated(x, activation, 0.0).to(input.dtype)
    return y if p == 0 else dropout(y, p, -1, False, generator=generator, stream=stream)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float = 0.0,
    inplace_backward: bool = False,
    wide: bool = False,
) -> tuple[Tensor, Tensor | None]:
    x = input if weight is None or weight.dtype == input.dtype else input.to(weight.dtype)
    x = softcap * torch.tanh(x / softcap) if softcap else x
    name = ("none", "mean", "sum")[reduction]
    loss, z_loss = F.cross_entropy(x, target, weight, None, ignore_index, None, name, label_smoothing), None
    if lse_square_scale:
        z_loss = lse_square_scale * torch.logsumexp(x, 0 if x.dim() == 1 else 1).square()
        rows = target != ignore_index if target.shape != x.shape else torch.ones_like(z_loss, dtype=torch.bool)
        z_loss = z_loss.masked_fill(~rows, 0.0)
        z_loss = z_loss.sum() if reduction else z_loss
        z_loss = z_loss / rows.sum() if reduction == 1 else z_loss
        loss = loss + z_loss
    narrow = loss.dtype if torch.is_autocast_enabled(input.device.type) else input.dtype
    loss = loss if loss.dtype == narrow else loss.to(narrow)
    return loss, None if z_loss is None else z_loss.detach().to(narrow)


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None, *args: Any
) -> tuple[Tensor, Tensor | None]:
    return cross_entropy(F.linear(input, linear_weight, linear_bias), target, *args)


def refuse_generator(generator: torch.Generator | None, stream: Tensor | None) -> None:
    if generator is not None or stream is not None:
        raise RuntimeError(
            "an exported or traced program draws from torch's default generator: leave generator out, and "
            "dlkit.random.use()"
        )
