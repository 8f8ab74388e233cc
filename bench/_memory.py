"""What reuse_cpu_memory() gains and costs: time and page faults of a call, and the resident memory of the process.

Each way runs in a fresh process of its own: memory as it comes, and after dlkit.reuse_cpu_memory().
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import dlkit

WAYS = ("default", "reuse")


def _calls() -> dict[str, Callable[[], object]]:
    rows, large = torch.randn(8192, 1024), torch.randn(16, 1 << 20)
    weight, bias = torch.randn(1024), torch.randn(1024)
    model, image = _cnn(), torch.randn(128, 28, 28)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(image).square().mean().backward()
        optimizer.step()

    return {
        "torch layer_norm, 8192x1024 fp32": lambda: F.layer_norm(rows, (1024,), weight, bias),
        "dlkit layer_norm, 8192x1024 fp32": lambda: dlkit.functional.layer_norm(rows, (1024,), weight, bias),
        "x + x, 64 MB": lambda: large + large,
        "training step of a CNN, 128 images, torch": step,
    }


def _cnn() -> torch.nn.Module:
    from ._models import cnn

    return cnn((28, 28), 10)


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(way: str) -> None:
    """Prints a tab-separated line for each call: median time in ms and page faults of a call. To be run on its own."""
    if way == "reuse":
        dlkit.reuse_cpu_memory()
    for name, call in _calls().items():
        for _ in range(3):
            call()
        times, faults = [], []
        for _ in range(15):
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        print(f"{name}\t{statistics.median(times) * 1e3:.2f} ms, {statistics.median(faults):,.0f} page faults")
    print(f"resident after all of these\t{_resident_mb():,.0f} MB")
    kept, large = [], torch.randn(16, 1 << 20)
    for _ in range(48):  # a list of losses, as training loops keep one
        kept.append((large + large)[0, :8].clone())
    print(f"resident after 48 times x + x of 64 MB, a small tensor kept each time\t{_resident_mb():,.0f} MB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process; default: both, one process each")


def main(args: argparse.Namespace) -> int:
    if args.way:
        measure(args.way)
        return 0
    found = {}
    for way in WAYS:
        command = [sys.executable, "-m", "dlkit", "bench", "memory", "--way", way]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[way] = dict(line.split("\t") for line in output.splitlines())
    rows = [
        ("", "as it comes", "reuse_cpu_memory()"),
        *((name, *(found[way][name] for way in WAYS)) for name in found["default"]),
    ]
    for row in rows:
        print("| " + " | ".join(row) + " |")
        if row is rows[0]:
            print("| --- | ---: | ---: |")
    return 0
