"""Loads the compiled library and chooses the backend that serves each op on each device.

CPU tensors are served by the C++ kernels, CUDA tensors by the CUDA kernels where they were built and by Triton's where
they were not. DLKIT_BACKEND=cuda|triton|native forces one; native leaves every device to torch's own ops.
"""

import importlib
import importlib.util
import os
import warnings
from pathlib import Path

import torch

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
BACKENDS = ("cuda", "triton", "native")
CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16")  # each has the instructions of those before it


def ops() -> list[str]:
    """The families of ops, each a file of the Triton backend and a folder of csrc/."""
    return sorted(path.stem for path in (Path(__file__).parent / "triton").glob("[!_]*.py"))


def load() -> None:
    """Imports dlkit._C, which registers the ops, then Triton's kernels where they are to serve CUDA tensors."""
    try:
        facts = importlib.import_module("dlkit._build_facts")
    except ImportError:
        raise ImportError(f"dlkit's compiled part is missing; in dlkit's source folder run: {REBUILD}") from None
    problem = mismatch(facts.TORCH_VERSION, facts.CUDA_VERSION, torch.__version__, torch.version.cuda)
    if problem:
        raise ImportError(problem)
    library = importlib.import_module("dlkit._C")  # registers the ops
    left_out = left_out_kernels(facts.BUILD_CAPABILITY, library.processor_capability())
    if left_out:
        warnings.warn(left_out, stacklevel=3)
    forced = forced_backend()
    if forced == "cuda" and not cuda_architectures():
        raise ImportError(
            f"DLKIT_BACKEND=cuda, but dlkit was built without CUDA kernels; run: DLKIT_BUILD=cuda {REBUILD}"
        )
    if forced == "triton" and not has_triton():
        raise ImportError("DLKIT_BACKEND=triton, but triton is not installed; run: pip install triton")
    if triton_serves_cuda():
        importlib.import_module("dlkit.triton").register()


def left_out_kernels(built_for: str | None, processor: str) -> str | None:
    """What to do if the library was built for a processor with fewer instructions, else None.

    `built_for` is None if it was built for all or, by the user's choice, for the lowest.
    """
    if built_for is None or CAPABILITIES.index(processor) <= CAPABILITIES.index(built_for):
        return None
    return (
        f"dlkit's CPU kernels were built on a processor that has at most {built_for}; this one has {processor}: "
        f"they would be faster. In dlkit's source folder run: DLKIT_CPU_KERNELS=all {REBUILD}"
    )


def mismatch(built_torch: str, built_cuda: str | None, torch_version: str, cuda_version: str | None) -> str | None:
    """One sentence if a library built against one torch cannot be loaded into another, else None."""
    built, found = built_torch, torch_version
    same_torch = built.split("+")[0] == found.split("+")[0]
    same_cuda = built_cuda is None or built_cuda == cuda_version
    if same_torch and same_cuda:
        return None
    if not same_cuda:
        built, found = f"{built} with CUDA {built_cuda}", f"{found} with CUDA {cuda_version or 'absent'}"
    return f"dlkit was built against torch {built}, found torch {found}; in dlkit's source folder run: {REBUILD}"


def forced_backend() -> str | None:
    """DLKIT_BACKEND, checked."""
    name = os.environ.get("DLKIT_BACKEND", "")
    if name and name not in BACKENDS:
        raise ImportError(f"DLKIT_BACKEND={name} is not one of {', '.join(BACKENDS)}")
    return name or None


def cuda_architectures() -> list[str]:
    """The CUDA architectures built in, e.g. ["8.0", "9.0+PTX"]; empty without CUDA kernels."""
    from dlkit import _C  # imported here: load() explains a missing library first

    text = _C.cuda_architectures()
    return text.split(";") if text else []


def cpu_capability() -> str:
    """The instruction set of the CPU kernels in use: default, avx2, avx512 or avx512_bf16."""
    from dlkit import _C

    return _C.cpu_capability()


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_serves_cuda() -> bool:
    forced = forced_backend()
    if torch.version.cuda is None:
        return False
    return forced == "triton" or (forced is None and not cuda_architectures() and has_triton())


def serving(device: str) -> tuple[str, str]:
    """(backend, reason) for tensors on "cpu" or "cuda"."""
    forced = forced_backend()
    if forced == "native":
        return "native", "DLKIT_BACKEND=native"
    if device == "cpu":
        return f"C++ ({cpu_capability()})", "the best instruction set of this processor that was built in" + (
            ", lowered by DLKIT_CPU_CAPABILITY" if os.environ.get("DLKIT_CPU_CAPABILITY") else ""
        )
    if torch.version.cuda is None:
        return "none", f"torch {torch.__version__} is a build without CUDA"
    if triton_serves_cuda():
        return "Triton", "DLKIT_BACKEND=triton" if forced else "dlkit was built without CUDA kernels"
    if cuda_architectures():
        return "CUDA", "DLKIT_BACKEND=cuda" if forced else "CUDA kernels were built in"
    return "native", "dlkit was built without CUDA kernels and triton is not installed"
