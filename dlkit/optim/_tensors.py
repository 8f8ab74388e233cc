"""Small functions of tensors that the other files here share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
FLOATING = (torch.float32, torch.float64, *SIXTEEN_BITS)
SERVED = (*FLOATING, torch.complex64, torch.complex128)


def average_dtype(param: Tensor) -> torch.dtype:
    """The dtype in which the running average of a parameter is kept."""
    return torch.float32 if param.dtype in SIXTEEN_BITS else param.dtype


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor, found without an import of torch.distributed."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return not plain and hasattr(tensor, "_local_tensor") and hasattr(tensor, "placements")


def local(tensor: Any) -> Tensor:
    """This process's part of a DTensor; any other tensor itself."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def like(whole: Any, part: Tensor) -> Tensor:
    """`part` as a DTensor with the mesh, placements and shape of `whole`, if that is a DTensor; else `part` itself."""
    if not is_dtensor(whole):
        return part
    kept = {"run_check": False, "shape": whole.shape, "stride": whole.stride()}
    return type(whole).from_local(part, whole.device_mesh, whole.placements, **kept)


def is_flat_shard(param: Any) -> bool:
    """Whether FSDP1 made this parameter: a piece of many, flattened, or a view into such a piece."""
    return getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False)


def has_kernels(device: torch.device, op: str) -> bool:
    """Whether dlkit has kernels for this op on this device. Every other device is left to torch."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"dlkit::{op}", key)


def layers_without_overlap(tensors: Sequence[Tensor]) -> list[int]:
    """A number for each tensor. Tensors that overlap in memory have different ones, ascending in their order."""
    extents = []
    for i, tensor in enumerate(tensors):
        if tensor.numel() > 0:
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            extents.append((str(tensor.device), start, start + (reach + 1) * tensor.element_size(), i))
    extents.sort()
    layers = [0] * len(tensors)
    cluster: list[tuple[str, int, int, int]] = []
    end = 0

    def number_cluster() -> None:
        done: list[tuple[str, int, int, int]] = []
        for extent in sorted(cluster, key=lambda extent: extent[3]):
            below = [layers[other[3]] for other in done if other[1] < extent[2] and extent[1] < other[2]]
            layers[extent[3]] = max(below, default=-1) + 1
            done.append(extent)

    for extent in extents:
        if cluster and (extent[0] != cluster[0][0] or extent[1] >= end):
            if len(cluster) > 1:
                number_cluster()
            cluster, end = [], 0
        cluster.append(extent)
        end = max(end, extent[2])
    if len(cluster) > 1:
        number_cluster()
    return layers
