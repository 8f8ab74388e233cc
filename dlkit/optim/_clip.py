"""torch.nn.utils.clip_grad_norm_: one pass reads the gradients, and one writes them only if there is need to clip."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dlkit.optim._tensors import SERVED, has_kernels, is_dtensor

_grad_norm = torch.ops.dlkit.optim_grad_norm.default
_clip_grads_ = torch.ops.dlkit.optim_clip_grads_.default


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scales gradients in place so that their norm is at most ``max_norm``, as :func:`torch.nn.utils.clip_grad_norm_`.

    The sum of squares is added up in fp32 and fp64 for every dtype of gradients. torch's function serves calls for
    which dlkit has no kernel: other norms than 2, DTensors, other dtypes and devices. torch refuses DTensors beside
    plain tensors or on several meshes. dlkit takes them: the norm is that of all gradients, and plain tensors are taken
    to be whole on each process.

    Args:
        parameters: a tensor or several; those without a gradient are skipped.
        max_norm: the largest norm of all gradients together that is not scaled.
        norm_type: the order of the norm; dlkit's kernels serve 2.
        error_if_nonfinite: raise where the norm is NaN or infinite.
        foreach: passed on to torch's function, where that is called.

    Returns:
        The norm before scaling, a tensor of the gradients' dtype.

    Raises:
        RuntimeError: ``error_if_nonfinite`` and the norm is NaN or infinite; no gradient is changed then.

    Source: `On the difficulty of training Recurrent Neural Networks <https://arxiv.org/abs/1211.5063>`_.
    """
    listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in listed if p.grad is not None]
    if len({_mesh_of(grad) for grad in grads}) > 1:
        return _clip_over_meshes(listed, max_norm, norm_type, error_if_nonfinite, foreach)
    if not grads or norm_type != 2 or not _is_served(grads):
        arguments = (max_norm, norm_type, error_if_nonfinite, foreach)
        return torch.nn.utils.clip_grad_norm_(listed or parameters, *arguments)
    norm = _grad_norm(grads)
    if error_if_nonfinite:
        check_finite(norm, norm_type)
    _clip_grads_(grads, norm, max_norm)
    dtypes = {grad.dtype for grad in grads}
    return norm.to(dtypes.pop()) if len(dtypes) == 1 and not grads[0].is_complex() else norm


def check_finite(norm: Tensor, norm_type: float) -> None:
    """torch's error, in its words, for a norm that is infinite or NaN."""
    if not math.isfinite(norm.item()):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )


def _mesh_of(grad: Any) -> Any:
    return grad.device_mesh if is_dtensor(grad) else None


def _clip_over_meshes(
    params: list[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool, foreach: bool | None
) -> Tensor:
    kinds: dict[Any, list[Tensor]] = {}
    for param in params:
        if param.grad is not None:
            kinds.setdefault(_mesh_of(param.grad), []).append(param)
    norms: list[Any] = [
        torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None], norm_type, foreach=foreach)
        for kind in kinds.values()
    ]
    parts = [norm.full_tensor() if is_dtensor(norm) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack([part.to(parts[0].device) for part in parts]), norm_type)
    if error_if_nonfinite:
        check_finite(total, norm_type)
    for kind in kinds.values():
        torch.nn.utils.clip_grads_with_norm_(kind, max_norm, total, foreach)
    return total


def _is_served(grads: list[Tensor]) -> bool:
    device = grads[0].device
    return has_kernels(device, "optim_grad_norm_kernel") and all(
        type(grad) is Tensor and grad.layout == torch.strided and grad.dtype in SERVED and grad.device == device
        for grad in grads
    )
