"""The facts about machine, build and run that a result file records."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from dlkit import _C


def _first_match(path: str, pattern: str) -> str | None:
    try:
        match = re.search(pattern, Path(path).read_text())
    except OSError:
        return None
    return match.group(1).strip() if match else None


def _caches() -> dict[str, str]:
    """Size of each data cache level of core 0, as the kernel writes it ("32768K")."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (folder / "type").read_text().strip() != "Instruction":
            found["L" + (folder / "level").read_text().strip()] = (folder / "size").read_text().strip()
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that tracks these files, with "-dirty" where it was changed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], check=True, capture_output=True)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def facts(device: str) -> dict[str, Any]:
    """The facts that a reader needs to judge or repeat a measurement."""
    cpu = _first_match("/proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.processor() or platform.machine()
    affinity = getattr(os, "sched_getaffinity", None)
    machine: dict[str, Any] = {
        "cpu": cpu,
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "simd": torch.backends.cpu.get_cpu_capability(),
        "dlkit_simd": _C.cpu_capability(),
        "caches": _caches(),
        "transparent_hugepages": _first_match("/sys/kernel/mm/transparent_hugepage/enabled", r"\[(\w+)\]"),
        "system": f"{platform.system()} {platform.machine()} {' '.join(platform.libc_ver())}".strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dlkit": _version("dlkit"),
        "commit": _commit(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine["gpu"] = properties.name
        machine["gpu_capability"] = f"{properties.major}.{properties.minor}"
        machine["gpu_processors"] = properties.multi_processor_count
        machine["gpu_l2_bytes"] = properties.L2_cache_size
        machine["cuda"] = torch.version.cuda
        machine["triton"] = _version("triton")
        machine["liger_kernel"] = _version("liger_kernel")
        machine["quack"] = _version("quack-kernels")
        machine["bitsandbytes"] = _version("bitsandbytes")
    return machine


def header(device: str) -> dict[str, Any]:
    """The beginning of every result file."""
    return {
        "command": shlex.join(["python", "-m", "dlkit", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": facts(device),
    }


def slug(machine: dict[str, Any]) -> str:
    """A short name for file names: the GPU, or the CPU with its thread count and an instruction set that was chosen."""
    chosen = os.environ.get("DLKIT_CPU_CAPABILITY", "")
    name = machine.get("gpu") or f"{machine['cpu']} {machine['threads']} threads {chosen}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
