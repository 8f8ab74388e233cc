"""Tables of addresses for the optimizers' kernels.

A launch serves all tensors of the same dtypes, group, step count and alignment. Their addresses lie in a table on the
device, 112 bytes per tensor. It is copied again when an address has changed. That copy comes from pinned memory and
waits for nothing, but Python walks over the tensors at each step (some 5 us each): for many small tensors the compiled
kernels are better. CUDA graphs capture a step only if its table is there already, from an earlier step with the same
addresses.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ._common import TRITON_TYPE, accumulate_type

CHUNK_TILES = 8  # tiles a program walks over
TILE = 1024  # elements: 8 a thread with 4 warps
WARPS = 4

# The columns of a table. Addresses are 0 where the step has no such array.
FIRST_CHUNK, NUMEL, INDEX, PARAM, GRAD, STATE, SCALE, REMAINDER, EMA, STEP = 0, 1, 2, 3, 4, 5, 8, 11, 12, 13
ROW = 14

TYPE = {
    **TRITON_TYPE,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}
CONSTANTS = {"TILE": TILE, "TILES": CHUNK_TILES, "num_warps": WARPS}

_tables: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
_MOST_TABLES = 64


def bits_of(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def real_type(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


class Arranger:
    """Addresses of a parameter's arrays in one common layout. Arrays in another are copied, and copied back."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.changed: list[tuple[Tensor, Tensor]] = []

    def begin(self, param: Tensor, logical_order: bool = False) -> None:
        """Begins a parameter. 8-bit states need their elements in logical order."""
        param = _as_real(param)
        self.numel = param.numel()
        self.contiguous = logical_order or param.is_contiguous()
        layout = torch.contiguous_format if self.contiguous else torch.preserve_format
        self.strides = torch.empty_like(param, device="meta", memory_format=layout).stride()

    def place(self, tensor: Tensor, changes: bool, dtype: torch.dtype | None = None) -> int:
        """The address of a tensor, or of a copy if its layout or dtype is another."""
        real = _as_real(tensor)
        dtype = dtype or real.dtype
        fits = real.is_contiguous() if self.contiguous else real.stride() == self.strides
        if fits and real.dtype == dtype and not real.is_neg():
            return real.data_ptr()
        copy = torch.empty_strided(real.shape, self.strides, dtype=dtype, device=real.device)
        copy.copy_(real)
        self.kept.append(copy)
        if changes:
            self.changed.append((real, copy))
        return copy.data_ptr()

    def finish(self) -> None:
        for original, copy in self.changed:
            original.copy_(copy)


def vector(dtype: torch.dtype, numel: int, addresses: Sequence[int]) -> tuple[int, int]:
    """(elements an access holds, bytes that every address is a multiple of): 16 bytes of dtype where all allow them."""
    vec = 16 // dtype.itemsize
    if numel % vec or any(address % 16 for address in addresses):
        return 1, 1
    return vec, 16


def table_of(rows: list[list[int]], vec: int, device: torch.device) -> tuple[Tensor, int]:
    """(the rows on the device, how many chunks their tensors have)."""
    chunks = 0
    flat: list[int] = []
    for row in rows:
        row[FIRST_CHUNK] = chunks
        chunks += -(-row[NUMEL] * vec // (TILE * CHUNK_TILES))
        flat += row
    return _on_device(flat, device), chunks


def _on_device(rows: list[int], device: torch.device) -> Tensor:
    """A table of addresses, from the cache where no address changed."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, *rows)
    table = _tables.get(key)
    if table is None:
        table = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        table = table.to(device, non_blocking=True)
        _tables[key] = table
        if len(_tables) > _MOST_TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return table


def gradient_launches(
    grads: list[Tensor], arranger: Arranger, changes: bool
) -> tuple[list[tuple[Tensor, int, int, dict[str, Any]]], int]:
    """([(table, tensors, chunks, constants)], chunks of all): one launch per dtype and alignment."""
    launches: dict[tuple[torch.dtype, int, int], list[list[int]]] = {}
    before = 0
    for grad in grads:
        dtype = real_type(grad.dtype)
        arranger.begin(grad)
        address = arranger.place(grad, changes)
        if arranger.numel == 0:
            continue
        vec, align = vector(dtype, arranger.numel, [address])
        launches.setdefault((dtype, vec, align), []).append([0, arranger.numel // vec, before, address])
        before += -(-arranger.numel // (TILE * CHUNK_TILES))
    result = []
    for (dtype, vec, align), rows in launches.items():
        table, chunks = table_of(rows, vec, grads[0].device)
        acc = TRITON_TYPE[accumulate_type(dtype)]
        constants = {"TYPE": TYPE[dtype], "ACC": acc, "VEC": vec, "ALIGN": align, "ROW": 4, **CONSTANTS}
        result.append((table, len(rows), chunks, constants))
    return result, before
