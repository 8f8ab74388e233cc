"""reuse_cpu_memory(): the memory of freed CPU tensors serves the next ones and does not go back to the system."""

from __future__ import annotations

import ctypes
import platform
import re
import warnings
from pathlib import Path
from types import TracebackType

import torch

_set_limit = torch.ops.dlkit.set_cpu_memory_limit.default
_kept = torch.ops.dlkit.kept_cpu_memory.default

_OFF, _UNBOUNDED = -1, (1 << 63) - 1  # csrc/memory/op.cpp


class ReusedMemory:
    """The result of :func:`reuse_cpu_memory`: ``print`` shows it, ``with`` takes it back at the end of the block."""

    def __init__(self, before: int | None, report: str) -> None:
        self._before = before
        self._report = report

    @property
    def active(self) -> bool:
        """Whether anything was changed."""
        return self._before is not None

    @property
    def kept_bytes(self) -> int:
        """Bytes that no tensor holds now and the next ones will get."""
        return _kept()

    def __str__(self) -> str:
        return self._report

    def __enter__(self) -> ReusedMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            _set_limit(self._before)
            self._before = None


def reuse_cpu_memory(limit: int | None = None) -> ReusedMemory:
    """Lets the next CPU tensors have the memory of freed ones. One call at start-up, or ``with reuse_cpu_memory():``.

    glibc returns blocks above 32 MB to the operating system at every free, and every page of a fresh block is a page
    fault. The page faults cost more time than most ops. From this call on, tensors of 128 KB and more take blocks that
    are kept when tensors are freed: the smallest block that fits and has at most twice the size. Blocks are in huge
    pages where the system gives them on request. Smaller tensors, and memory that is no CPU tensor, are not affected.

    Where malloc is not glibc's, the call does nothing and warns once: jemalloc and tcmalloc keep freed memory
    themselves, and musl and macOS were not measured.

    Args:
        limit: bytes to keep at most while no tensor holds them; the block that was kept longest goes back to the system
            first. None keeps everything: the process stays as large as its tensors ever were together.

    Returns:
        A :class:`ReusedMemory`, whose string describes what was done, with ``active`` and ``kept_bytes``. As a context
        manager it restores the earlier setting at its end and gives kept memory back to the system; tensors that live
        on stay valid.

    Raises:
        ValueError: ``limit`` is negative.
        TypeError: ``limit`` is not an integer.
    """
    if limit is not None:
        if isinstance(limit, bool) or not isinstance(limit, int):
            raise TypeError(f"reuse_cpu_memory(): expected limit to be an int or None, got {limit!r}")
        if limit < 0:
            raise ValueError(f"reuse_cpu_memory(): expected limit of at least 0, got {limit}")
    other = _other_allocator()
    if other:
        report = f"CPU memory is left as it is: malloc is {other}, not glibc's"
        _warn_once(report)
        return ReusedMemory(None, report)
    before = _set_limit(_UNBOUNDED if limit is None else min(limit, _UNBOUNDED))
    bound = "all of it" if limit is None else f"at most {limit / 2**20:,.0f} MB"
    pages = _huge_pages()
    report = f"CPU tensors of 128 KB and more reuse freed memory: {bound} is kept; " + (
        "in huge pages" if pages in ("always", "madvise") else f"no huge pages (this system's setting: {pages})"
    )
    return ReusedMemory(before, report)


class _SharedObject(ctypes.Structure):
    """Dl_info of dladdr(3)."""

    _fields_ = [  # noqa: RUF012
        ("path", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def _other_allocator() -> str:
    """The allocator behind malloc, as a file name or a system; empty for glibc itself."""
    if platform.system() != "Linux":
        return f"{platform.system()}'s"
    program = ctypes.CDLL(None)
    if not hasattr(program, "gnu_get_libc_version"):
        return "another C library's"
    found = _SharedObject()
    if not program.dladdr(ctypes.cast(program.malloc, ctypes.c_void_p), ctypes.byref(found)) or not found.path:
        return "unknown"
    path = found.path.decode(errors="replace")
    return "" if re.match(r"libc(\.so|-\d)", Path(path).name) else f"of {path}"


def _huge_pages() -> str:
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "absent"
    match = re.search(r"\[(\w+)\]", setting)
    return match.group(1) if match else "unknown"


_warned = False


def _warn_once(message: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"reuse_cpu_memory(): {message}", stacklevel=3)
