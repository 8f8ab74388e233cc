"""What DTensor parameters need beside their local parts: the norm over all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from dlkit.optim._optimizer import is_dtensor, local

_grad_norm = torch.ops.dlkit.optim_grad_norm.default


def norm(params: list[Any]) -> Tensor:
    """The norm of all gradients: local sums of squares, added up over the mesh dimensions along which they are cut."""
    wide = False
    kinds: dict[Any, list[Tensor]] = {}
    for param in params:
        grad = param.grad
        if grad is None:
            continue
        kind = None
        if is_dtensor(param):
            kind = (param.device_mesh, tuple(param.placements))
            if is_dtensor(grad) and grad.placements != param.placements:
                grad = grad.redistribute(placements=param.placements)
        kinds.setdefault(kind, []).append(local(grad))
    total: Any = 0.0
    for kind, grads in kinds.items():
        part = _grad_norm(grads)
        wide = wide or part.dtype == torch.float64
        square = part.double().square()
        if kind is not None:
            mesh, placements = kind
            parts = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
            square = DTensor.from_local(square, mesh, parts).full_tensor()
        total = total + square
    result = torch.as_tensor(total, dtype=torch.float64).sqrt()
    return result if wide else result.float()
