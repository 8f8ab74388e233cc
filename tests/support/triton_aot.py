"""Compiles the Triton kernels for GPUs, none of which is needed, and reads registers, spills and access widths.

The public functions are called on CPU tensors with every launch turned into Triton's own warm-up, under a driver that
only names the architecture: signatures, constants, alignment hints and warps are then exactly those a GPU would get.
`python tests/support/triton_aot.py [80 90 ...]` prints the table, for all dtypes.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Result:
    """One compiled kernel: the call that led to it and what its machine code holds."""

    capability: int
    kernel: str
    case: str
    dtype: str
    vectorised: bool  # whether the case's rows keep 16-byte alignment, which makes wide accesses due
    warps: int
    registers: int
    shared: int  # bytes
    spills: int  # loads and stores of local memory in the code, plus the stack frame's bytes
    wide_loads: int  # 128-bit loads from global memory
    wide_stores: int
    barriers: int


def compile_all(capability: int, dtype: str, timeout: float = 7200) -> list[Result]:
    """Every case of ``dtype`` for compute capability ``capability`` (80, 90, ...), compiled in its own process.

    That process has neither TRITON_INTERPRET nor the driver of a GPU in this machine.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, "--json", str(capability), dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        raise RuntimeError(f"compiling {dtype} for sm_{capability} failed:\n{done.stderr[-4000:]}")
    return [Result(**row) for row in json.loads(done.stdout)]


def _load(name: str) -> ModuleType:
    """Loads a module of dlkit.triton in a package of another name, which does not need dlkit's extension."""
    package = "dlkit_unbuilt"
    if package not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(ROOT / "dlkit")]
    return importlib.import_module(f"{package}.triton.{name}")


def _layer_norm_cases(dtype_name: str) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """(case, whether wide accesses are due, the call). Widths: short, one register row, the widest ones, looped."""
    import torch

    op = _load("layer_norm")
    dtype = getattr(torch, dtype_name)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32

    def forward(cols: int, rms: bool, residual: bool, affine: bool = True, parameter: torch.dtype = dtype) -> None:
        x = torch.zeros(2, cols, dtype=dtype)
        weight = torch.zeros(cols, dtype=parameter) if affine else None
        op.layer_norm_forward(x, x if residual else None, 1, weight, None if rms else weight, 1e-5, rms, True)

    def backward(
        cols: int, rms: bool, grad_sum: bool, mask: tuple[bool, ...] = (True,) * 3, parameter: torch.dtype = dtype
    ) -> None:
        x = torch.zeros(2, cols, dtype=dtype)
        statistic = torch.zeros(2, 1, dtype=accumulate)
        weight = torch.zeros(cols, dtype=parameter)
        mean, bias = (None, None) if rms else (statistic, weight)
        op.layer_norm_backward(x, x if grad_sum else None, x, mean, statistic, weight, bias, 1, list(mask))

    for cols in (64, 256, 1000, 1024, 4096, 8192, 16384, 65536):
        if cols % (16 // dtype.itemsize) == 0:
            yield f"forward {cols}", True, partial(forward, cols, False, False)
            yield f"backward {cols}", True, partial(backward, cols, False, False)
    for cols in (64, 1024, 8192, 16384, 65536):
        yield f"add forward {cols}", True, partial(forward, cols, False, True)
        yield f"add backward {cols}", True, partial(backward, cols, False, True)
    for cols in (33, 257, 1001, 4001, 8001, 40001):
        yield f"add forward {cols}", False, partial(forward, cols, False, True)
        yield f"add backward {cols}", False, partial(backward, cols, False, True)
    yield "add rms forward 4096", True, partial(forward, 4096, True, True)
    yield "add rms backward 4096", True, partial(backward, 4096, True, True)
    yield "forward 1024 without weight", True, partial(forward, 1024, False, False, affine=False)
    yield "backward 1024 frozen weight", True, partial(backward, 1024, False, False, (True, False, False))
    yield "backward 1024 weight only", True, partial(backward, 1024, False, False, (False, True, False))
    if dtype.itemsize == 2:
        yield "forward 8192 fp32 weight", True, partial(forward, 8192, False, False, parameter=torch.float32)
        yield "backward 8192 fp32 weight", True, partial(backward, 8192, False, False, parameter=torch.float32)


def _batch_norm_cases(dtype_name: str) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """Views with many columns and with one (channels_last), wide and not; only the variants with the most registers."""
    import torch

    op = _load("batch_norm")
    dtype = getattr(torch, dtype_name)
    parameter = torch.float64 if dtype == torch.float64 else torch.float32

    def both(
        *shape: int,
        last: bool = False,
        groups: int = 0,
        training: bool = True,
        relu: bool = False,
        add: bool = False,
        activation: int = 0,
    ) -> None:
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.empty(shape, dtype=dtype, memory_format=layout)
        weight = torch.ones(shape[1], dtype=parameter)
        tracked = torch.zeros((), dtype=torch.int64)
        running = (None, None, None) if groups else (weight, weight, tracked)
        residual = x if add else None
        kind = activation or int(relu)
        y, mean, rstd = op.batch_norm_forward(x, residual, weight, weight, *running, groups, training, 0.1, 1e-5, kind)
        mask = [True, add, True, True]
        op.batch_norm_backward(x, x, y if add else None, weight, weight, mean, rstd, groups, training, kind, mask)

    yield "add relu 32x64x56x56", True, partial(both, 32, 64, 56, 56, relu=True, add=True)
    if dtype == torch.float64:
        return
    yield "add relu 32x64x56x56 last", True, partial(both, 32, 64, 56, 56, last=True, relu=True, add=True)
    if dtype == torch.float16:
        return
    yield "relu 64x256x7x7", False, partial(both, 64, 256, 7, 7, relu=True)
    yield "add silu 32x64x56x56", True, partial(both, 32, 64, 56, 56, activation=4, add=True)
    yield "group_norm gelu 8x256x28x28", True, partial(both, 8, 256, 28, 28, groups=32, activation=2)
    yield "group_norm 8x256x28x28", True, partial(both, 8, 256, 28, 28, groups=32)
    if dtype == torch.float32:
        yield "evaluation 32x64x56x56", True, partial(both, 32, 64, 56, 56, training=False, relu=True)


def _dropout_cases(dtype_name: str) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """Elements with their own bits, runs of all lengths, the affine form; the state drawn and given."""
    import torch

    op = _load("dropout")
    dtype = getattr(torch, dtype_name)

    def forward(count: int, inner: int, *affine: float) -> None:
        op.dropout_forward(torch.zeros(count, dtype=dtype), 0.1, inner, 1.25, *(affine or (0.0, 0.0)))

    def apply(count: int, inner: int) -> None:
        op.dropout_apply(torch.zeros(count, dtype=dtype), torch.zeros(2, dtype=torch.int64), 0.1, inner, 1.25, 0.0, 0.0)

    def add(count: int) -> None:
        x = torch.zeros(count, dtype=dtype)
        op.dropout_add_forward(x, x, torch.zeros(2, dtype=torch.int64), 0.1)

    yield "forward", True, partial(forward, 4099, 1)
    yield "apply", True, partial(apply, 4099, 1)
    yield "add", True, partial(add, 4099)
    yield "runs of 784", True, partial(forward, 784 * 9, 784)
    yield "runs of 49", False, partial(forward, 49 * 9, 49)
    if dtype_name in ("float32", "bfloat16"):
        yield "affine", True, partial(forward, 4096, 1, 0.5, -0.5)
        yield "runs of 16", True, partial(apply, 16 * 9, 16)
        yield "runs of 65536", True, partial(apply, 65536, 65536)


def _bias_act_dropout_cases(dtype_name: str) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """Both directions of each activation, with a bias and without."""
    import torch

    op = _load("bias_act_dropout")
    x, bias = torch.zeros(16, 512, dtype=getattr(torch, dtype_name)), torch.zeros(512, dtype=getattr(torch, dtype_name))

    def both(activation: int, bias: torch.Tensor | None) -> None:
        _, state = op.bias_act_dropout_forward(x, bias, None, activation, 0.1)
        op.bias_act_dropout_backward(x, x, bias, state, activation, 0.1, False)

    yield "gelu", True, partial(both, 2, bias)
    if dtype_name == "bfloat16":
        yield "relu", True, partial(both, 1, bias)
        yield "tanh, no bias", True, partial(both, 3, None)


def _cross_entropy_cases(dtype_name: str) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """Rows of all widths and pixels; class targets with all options, and probabilities."""
    import torch

    op = _load("cross_entropy")
    dtype = getattr(torch, dtype_name)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32

    def both(*shape: int, soft: bool = False, more: bool = False) -> None:
        x = torch.zeros(shape, dtype=dtype)
        target = x if soft else torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
        weight = torch.ones(shape[1], dtype=accumulate) if more else None
        options = (1, -100, *((0.1, 0.1, 4.0) if more else (0.0, 0.0, 0.0)))
        stats = torch.ones(3 if soft else 2, x.numel() // shape[1], dtype=accumulate)
        op.cross_entropy_forward(x, target, weight, *options, False)
        op.cross_entropy_backward(
            torch.ones((), dtype=accumulate), x, target, weight, stats, torch.ones(2, dtype=accumulate), *options
        )

    yield "32000", True, partial(both, 64, 32000)
    yield "32000, all", True, partial(both, 64, 32000, more=True)
    yield "1000", False, partial(both, 64, 1000)
    yield "21x64x64", False, partial(both, 2, 21, 64, 64)
    if dtype_name in ("float32", "bfloat16"):
        yield "16", True, partial(both, 4096, 16)
        yield "1001", False, partial(both, 64, 1001)
        yield "32000 probabilities", True, partial(both, 64, 32000, soft=True)


def _optim_cases(dtype_name: str) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """Each algorithm with all its states, and the extra code of 16-bit parameters and 8-bit states."""
    import torch

    op = _load("optim")
    dtype = getattr(torch, dtype_name)
    average = torch.float64 if dtype == torch.float64 else torch.float32

    def step(
        algorithm: str, states: int, numel: int = 4096, state: torch.dtype = dtype, remainder: bool = False,
        ema: bool = False, seed: int | None = None, grad: torch.dtype = dtype,
    ) -> None:  # fmt: skip
        def like(kind: torch.dtype, wanted: bool = True) -> list[torch.Tensor]:
            return [torch.zeros(numel, dtype=kind)] if wanted else []

        param, scale = like(dtype), [torch.zeros(-(-numel // 256))]
        moments = [like(state, s < states) for s in range(3)]
        scales = [scale if s < states and state == torch.uint8 else [] for s in range(3)]
        steps = [torch.zeros(())] if algorithm == "adam" else []
        stochastic = 0.0 if seed is None else 1.0
        options = [1e-3, 0.1, 1e-8, 0.9, 0.99, 0.9, 0.0, 0.99, 0.99, 1.0, 0.0, 0.0, stochastic, 7 * stochastic]
        op.optim_step_kernel_(
            algorithm, param, like(grad), *moments, *scales, like(torch.int16, remainder), like(average, ema), steps,
            [0], options, [], None, 0.0, None, None, False, seed,
        )  # fmt: skip

    yield "adam", True, partial(step, "adam", 2)
    if dtype == torch.float32:
        yield "adam 4095", False, partial(step, "adam", 2, 4095)
        yield "amsgrad ema", True, partial(step, "adam", 3, ema=True)
        yield "adam 8 bits", True, partial(step, "adam", 2, state=torch.uint8)
        yield "sgd momentum", True, partial(step, "sgd", 1)
        yield "rmsprop centered momentum", True, partial(step, "rmsprop", 3)
    if dtype.itemsize == 2:
        yield "adam remainder ema", True, partial(step, "adam", 2, state=torch.float32, remainder=True, ema=True)
        yield "sgd stochastic", True, partial(step, "sgd", 0, seed=1)
        yield "adam stochastic", True, partial(step, "adam", 2, seed=1)
        yield "adam fp32 gradient", True, partial(step, "adam", 2, grad=torch.float32)
    if dtype not in (torch.float32, torch.bfloat16):
        return
    grads = [torch.ones(8192, dtype=dtype)]
    yield "norm", True, partial(op.optim_grad_norm_kernel, grads)
    yield "clip", True, partial(op.optim_clip_grads_kernel_, grads, torch.ones((), dtype=average), 1.0)


def _cases(name: str, dtype: str) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """Cases of one file of dlkit/triton: from the functions above, else from aot_cases in the op's test file."""
    if own := globals().get(f"_{name}_cases"):
        return own(dtype)
    sys.path.insert(0, str(ROOT / "tests"))
    import torch

    return importlib.import_module(f"test_{name}").aot_cases(_load(name), getattr(torch, dtype))


def _compile_here(capability: int, dtype: str) -> list[Result]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Named:
        """The attributes that a launch reads from a driver before it has a kernel."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    compiled: list[Any] = []
    run = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    driver.set_active(Named())
    JITFunction.run = warm_up
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    results, seen = [], set()
    for file in sorted((ROOT / "dlkit" / "triton").glob("[!_]*.py")):
        for case, vectorised, call in _cases(file.stem, dtype):
            compiled.clear()
            call()
            for kernel in compiled:
                if kernel.hash in seen:
                    continue
                seen.add(kernel.hash)
                facts = _read(kernel.asm["cubin"], tools)
                facts |= {"warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared}
                results.append(Result(capability, kernel.metadata.name, case, dtype, vectorised, **facts))
    return results


def _read(cubin: bytes, tools: Path) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def show(option: str) -> str:
            command = [str(tools / "cuobjdump"), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = show("-res-usage"), show("-sass")

    def resource(name: str) -> int:
        found = re.search(rf"\b{name}:(\d+)", usage)
        assert found is not None, usage
        return int(found[1])

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    return {
        "registers": resource("REG"),
        "spills": count(r"\b(?:LDL|STL)\b") + resource("STACK"),
        "wide_loads": count(r"\bLDG(?:STS)?\.E\.[\w.]*128\b"),
        "wide_stores": count(r"\bSTG\.E\.[\w.]*128\b"),
        "barriers": count(r"\bBAR\.SYNC"),
    }


def main() -> None:
    if sys.argv[1:2] == ["--json"]:
        print(json.dumps([dataclasses.asdict(result) for result in _compile_here(int(sys.argv[2]), sys.argv[3])]))
        return
    for capability in map(int, sys.argv[1:] or ["80", "90"]):
        print(f"{'sm':3} {'kernel':20} {'case':29} {'dtype':9} warps  regs  shared  spills  ld128  st128  barriers")
        for r in itertools.chain.from_iterable(compile_all(capability, dtype) for dtype in DTYPES):
            print(
                f"{r.capability:3} {r.kernel:20} {r.case:29} {r.dtype:9} {r.warps:5} {r.registers:5} {r.shared:7}"
                f" {r.spills:7} {r.wide_loads:6} {r.wide_stores:6} {r.barriers:9}"
            )


if __name__ == "__main__":
    main()
