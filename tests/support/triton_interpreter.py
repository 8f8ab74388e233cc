"""Triton's interpreter with the right bf16 rounding, and with sums in the order a GPU takes.

tl.sum: NumPy adds up a leading axis in sequence, and a sum of n terms in fp32 loses n/2 ulps; a GPU adds halves to
halves, as is done here.

bf16: up to 3.8 at least it truncates fp32 to bf16, where every device rounds to nearest even (triton issue 8322, pull
request 11897); NaN may come out as infinity. torch's own conversion takes its place.

Nested functions: each call replaces all of triton.language again, though the launch has done it; that takes half of a
kernel's time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def fix_bf16_rounding() -> None:
    """Replaces the interpreter's conversions between fp32 and bf16 in this process. Harmless to call twice."""
    original = getattr(interpreter._convert_float, "original", interpreter._convert_float)

    def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding_mode: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            values = torch.from_numpy(np.array(data, dtype=np.float32))
            return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return (np.asarray(data).astype(np.uint32) << 16).view(np.uint32)
        return original(data, source, target, rounding_mode)

    convert.original = original  # type: ignore[attr-defined]
    interpreter._convert_float = convert


def sum_by_halves() -> None:
    """Replaces the interpreter's tl.sum along an axis of a power of two in this process."""

    def tree_sum(self: Any, value: Any) -> Any:
        data = value.handle.data
        axis = self.axis
        if axis is None:
            data, axis = data.reshape(-1), 0
        data = np.moveaxis(data, axis, 0)
        while len(data) > 1:
            half = len(data) // 2
            data = data[:half] + data[half:]
        data = np.moveaxis(data, 0, axis)
        return self.to_tensor(data if self.keep_dims else np.squeeze(data, axis), value.dtype)

    interpreter.ReduceOps.sum = tree_sum


def patch_language_once() -> None:
    """In this process triton.language is replaced at a launch, not again at each call of a function within it."""
    original = interpreter._patch_lang
    patched: set[Any] = set()  # the modules that the launch under way has replaced

    def patch(fn: Any) -> Any:
        modules = {module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())}
        if patched and modules <= patched:
            return interpreter._LangPatchScope()
        scope = original(fn)
        if not patched:
            restore = scope.restore

            def restore_all() -> None:
                restore()
                patched.clear()

            scope.restore = restore_all
        patched.update(modules)
        return scope

    interpreter._patch_lang = patch
