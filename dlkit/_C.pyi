"""What csrc/module.cpp defines. Importing it registers the ops with torch."""

from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload

class Call:
    """torch.ops' overload of that name, its arguments by position."""

    def __init__(self, overload: OpOverload | Callable[..., Any], name: str) -> None: ...
    def __call__(self, *args: Any) -> Any: ...

class Contents: ...

def cpu_capability() -> str:
    """The instruction set in use: default, avx2, avx512 or avx512_bf16."""

def processor_capability() -> str:
    """The best of these instruction sets that the processor has, whether or not kernels were built for it."""

def set_cpu_capability(name: str, /) -> None:
    """Lowers the instruction set in use to the named one. For tests."""

def cuda_architectures() -> str:
    """The CUDA architectures built in, as in TORCH_CUDA_ARCH_LIST; empty in a build without CUDA."""

def contents(*containers: list[Any] | dict[Any, Any]) -> Contents:
    """Which objects these hold, dicts of dicts opened; keeps none of them alive."""

def holds(contents: Contents, /, *containers: list[Any] | dict[Any, Any]) -> bool:
    """Whether they still hold the same tensors, in the same dtypes and places."""

def watch_draws(replay: Callable[..., tuple[int, int] | None], record: Callable[..., None], /) -> None:
    """Whom the ops ask for random numbers inside torch.utils.checkpoint."""

def replay_draw(kind: int, /) -> tuple[int, int] | None:
    """(seed, offset) of a draw made before, or None."""

def record_draw(kind: int, seed: int, offset: int, /) -> None:
    """What was drawn just now."""

def others_draw() -> None:
    """There is a random stream that torch does not know."""

def override_torch(on: bool, /) -> None:
    """Whether torch's functions are served by dlkit's ops."""

def override_calls() -> dict[str, tuple[int, int]]:
    """By function of torch: (calls served, calls declined)."""
