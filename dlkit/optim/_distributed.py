"""The norm of gradients that are spread over processes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dlkit.optim._tensors import is_dtensor, local

_grad_norm = torch.ops.dlkit.optim_grad_norm.default


def group_of_zero_optimizer() -> Any:
    """The process group of the ZeroRedundancyOptimizer that is making an optimizer at this moment, or None.

    It hands each process some of the parameters, and has no way to hand on an argument named process_group.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe(1) if module is not None else None
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, module.ZeroRedundancyOptimizer):  # type: ignore[union-attr]
            return owner.process_group
        frame = frame.f_back
    return None


def norm(params: Iterable[Any], process_group: Any) -> Tensor:
    """The norm of the gradients of all processes.

    Local sums of squares are added up over the mesh dimensions along which a DTensor is cut, and the sum of all that
    over `process_group` (a ProcessGroup or a DeviceMesh), if there is one.
    """
    wide = False
    kinds: dict[Any, list[Tensor]] = {}
    for param in params:
        grad = param.grad
        if grad is None:
            continue
        kind: Any = grad.device
        if is_dtensor(param):
            kind = (param.device_mesh, tuple(param.placements))
            if is_dtensor(grad) and grad.placements != param.placements:
                grad = grad.redistribute(placements=param.placements)
        kinds.setdefault(kind, []).append(local(grad))
    squares: list[Tensor] = []
    for kind, grads in kinds.items():
        part = _grad_norm(grads)
        wide = wide or part.dtype == torch.float64
        square = part.double().square()
        if isinstance(kind, tuple):
            from torch.distributed.tensor import DTensor, Partial, Replicate

            mesh, placements = kind
            parts = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
            square = DTensor.from_local(square, mesh, parts).full_tensor()
        squares.append(square)
    if process_group is None:
        device = squares[0].device if squares else torch.device("cpu")
    else:
        device = _device_of(process_group)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for square in squares:
        total += square.to(device)
    for group in _groups_of(process_group):
        dist.all_reduce(total, group=group)
    result = total.sqrt()
    return result if wide else result.float()


def _groups_of(process_group: Any) -> list[Any]:
    if process_group is None:
        return []
    if hasattr(process_group, "get_all_groups"):  # a DeviceMesh
        return process_group.get_all_groups()
    return [process_group]


def _device_of(process_group: Any) -> torch.device:
    """The device whose tensors this group's backend takes; the same in every process, with gradients or without."""
    if hasattr(process_group, "device_type"):
        kind = process_group.device_type
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    found = dist.distributed_c10d._get_pg_default_device(process_group)
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" else found
