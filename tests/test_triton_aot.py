"""Triton's kernels compiled for GPUs, none of which is needed: no spills, wide accesses where addresses allow them."""

import importlib
import importlib.util
import os
import pkgutil
import types

import pytest
from support import triton_aot

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


def test_no_kernel_is_compiled_anew_for_another_eps():
    import dlkit.triton

    kernels = set()
    for name in [module.name for module in pkgutil.iter_modules(dlkit.triton.__path__)]:
        for kernel in vars(importlib.import_module(f"dlkit.triton.{name}")).values():
            function = getattr(kernel, "fn", None)
            annotations = function.__annotations__ if isinstance(function, types.FunctionType) else {}
            for parameter in annotations.keys() & {"eps", "EPS"}:
                kernels.add(function.__name__)
                assert "constexpr" not in str(annotations[parameter]), function.__name__
    assert len(kernels) >= 4


# Hopper for all dtypes. bf16 shows what Ampere's compiler does otherwise.
@pytest.mark.parametrize(("capability", "dtype"), [*((90, dtype) for dtype in triton_aot.DTYPES), (80, "bfloat16")])
def test_kernels_compile_without_spills_and_with_wide_accesses(capability, dtype):
    if capability != 90 and not os.environ.get("CI"):
        pytest.skip("a minute more, which CI takes")
    results = triton_aot.compile_all(capability, dtype)
    assert len(results) > 50
    for result in results:
        if not result.vectorised or result.dtype == "float64":
            continue  # odd widths and fp64 may use a few bytes of stack; they are no fast paths
        assert result.spills == 0, result
        if result.kernel in ("_sum_partials", "finish_norm", "advance") or result.kernel.startswith("_merge"):
            continue  # small second stages
        assert result.wide_loads > 0, result
        writes_sums_alone = any(
            part in result.kernel for part in ("backward_columns", "_pieces", "sum_squares", "_losses")
        )
        assert result.wide_stores > 0 or writes_sums_alone, result
