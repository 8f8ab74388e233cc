"""The backends that the parity tests run over, as one: backend.call("layer_norm_forward", input=x, eps=1e-5, ...).

cpu-default, cpu-avx2, cpu-avx512, cpu-avx512_bf16   the C++ kernels, by instruction set
cuda-on-cpu                         the CUDA kernels' own source on fibers (python setup.py build_cuda_on_cpu)
triton                              Triton's kernels: its interpreter on CPU tensors, or a GPU where there is one
cuda                                the compiled CUDA kernels, on a GPU
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: by dlkit, with a CUDA build of torch

import dlkit  # noqa: E402
from dlkit import _C  # noqa: E402

DEVICE_MODELS = ("80", "90", "100", "120")  # their limits are in the CUDA-on-CPU harness: DLKIT_CUDA_ON_CPU_ARCH


@dataclasses.dataclass
class Backend:
    name: str
    device: str
    op: Callable[[str], Callable]
    missing: str = ""  # the reason why it cannot run here; its tests are skipped
    foreign: bool = False  # this machine's hardware has no such thing; there are no tests of it
    instruction_set: str = ""
    draws: int = 32  # draws of inputs in a parity test of small tensors: fewer where a call is slow
    ulps: int = 1  # beyond torch's own error

    def call(self, name: str, **given):
        """The op with arguments by the names of its schema. Optional tensors may be left out, and lists of tensors."""
        values = []
        for argument in getattr(torch.ops.dlkit, name).default._schema.arguments:
            if argument.name in given:
                values.append(given.pop(argument.name))
            elif argument.has_default_value():
                values.append(argument.default_value)
            elif str(argument.type).startswith("Optional"):
                values.append(None)
            elif str(argument.type) == "List[Tensor]":
                values.append([])
            else:
                raise TypeError(f"{name}: {argument.name} is missing")
        if given:
            raise TypeError(f"{name} has no {', '.join(given)}")
        return self.op(name)(*values)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        before = _C.cpu_capability()
        try:
            if self.instruction_set:
                _C.set_cpu_capability(self.instruction_set)
            yield
        finally:
            _C.set_cpu_capability(before)


def _torch_op(library: str) -> Callable[[str], Callable]:
    return lambda name: getattr(getattr(torch.ops, library), name).default


def _triton_op(name: str) -> Callable:
    return importlib.import_module("dlkit.triton").FUNCTIONS[name]


def _cpu(instruction_set: str) -> Backend:
    _C.set_cpu_capability(instruction_set)
    order = dlkit._backends.CAPABILITIES.index
    foreign = order(instruction_set) > order(_C.processor_capability())
    missing = "" if _C.cpu_capability() == instruction_set else f"dlkit was built without kernels for {instruction_set}"
    return Backend(f"cpu-{instruction_set}", "cpu", _torch_op("dlkit"), missing, foreign, instruction_set)


def _cuda_on_cpu() -> Backend:
    built = Path(__file__).parents[2] / "build" / "cuda_on_cpu" / "libdlkit_cuda_on_cpu.so"
    library = Path(os.environ.get("DLKIT_CUDA_ON_CPU_LIBRARY", built))
    missing = ""
    if library.exists():
        torch.ops.load_library(str(library))
    elif os.environ.get("CI"):
        raise RuntimeError("the CUDA-on-CPU library is missing; run: python setup.py build_cuda_on_cpu")
    else:
        missing = "run: python setup.py build_cuda_on_cpu"
    return Backend("cuda-on-cpu", "cpu", _torch_op("dlkit_cuda_on_cpu"), missing, draws=4)


def _triton() -> Backend:
    missing = "" if importlib.util.find_spec("triton") else "triton is not installed"
    if not missing and not HAS_GPU:
        from support import triton_interpreter  # imports triton, so only once TRITON_INTERPRET is set

        triton_interpreter.fix_bf16_rounding()
        triton_interpreter.sum_by_halves()
        triton_interpreter.patch_language_once()
    if HAS_GPU:
        return Backend("triton", "cuda", _triton_op, missing)
    # Unlike every device, the interpreter has no fused multiply-add: products in a sum are rounded once more.
    return Backend("triton", "cpu", _triton_op, missing, draws=2, ulps=2)


def _cuda() -> Backend:
    missing = "" if dlkit._backends.cuda_architectures() else "dlkit was built without CUDA kernels"
    return Backend("cuda", "cuda", _torch_op("dlkit"), missing, foreign=not HAS_GPU)


_native_set = _C.cpu_capability()
_sets = dlkit._backends.CAPABILITIES if platform.machine() in ("x86_64", "AMD64") else ("default",)
_ALL = [*(_cpu(name) for name in _sets), _cuda_on_cpu(), _triton(), _cuda()]
HERE = [backend for backend in _ALL if not backend.foreign]
ELSEWHERE = [backend for backend in _ALL if backend.foreign]
_C.set_cpu_capability(_native_set)
