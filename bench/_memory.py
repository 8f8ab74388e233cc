"""Gain and cost of reuse_cpu_memory(): time and page faults of a call, and the resident memory of the process; and the
cost of a mask: the resident peak of training through dropout.

Each runs in a fresh process: with default memory, and after dlkit.reuse_cpu_memory(); torch's dropout, and dlkit's.
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
from typing import Any

import torch
import torch.nn.functional as F

import dlkit

from . import _arguments, _machine, _report

WAYS = ("default", "reuse")
LIBRARIES = ("torch", "dlkit")


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


def _dropouts(library: Any) -> Callable[[], object]:
    """A training step through four dropouts of 8192x4096 in fp32; a tensor is 128 MB."""
    layers = torch.nn.Sequential(*(library.Dropout(0.3) for _ in range(4)))
    inputs, gradient = torch.ones(8192, 4096, requires_grad=True), torch.ones(8192, 4096)
    return lambda: layers(inputs).backward(gradient)


def peak(library: str) -> None:
    """Prints by how much `_dropouts` raises the resident peak of this fresh process. To be run on its own."""
    step = _dropouts(torch.nn if library == "torch" else dlkit.nn)
    before = _resident_mb()
    step()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    print(f"four Dropout(0.3), 8192x4096 fp32: resident peak above the inputs\t{used:,.0f} MB")


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


def markdown(report: dict[str, Any]) -> str:
    """A table of the kinds of memory, and one of the libraries."""
    found = report["found"]
    parts = [
        _report.table(["", *heads], [[name, *(found[way][name] for way in pair)] for name in found[pair[0]]])
        for pair, heads in ((WAYS, ("as it comes", "reuse_cpu_memory()")), (LIBRARIES, LIBRARIES))
        if pair[0] in found
    ]
    return "\n\n".join(parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--way", choices=(*WAYS, *LIBRARIES), help="measure one in this process; default: a process each"
    )
    _arguments.add_json(parser)


def main(args: argparse.Namespace) -> int:
    if args.way:
        (measure if args.way in WAYS else peak)(args.way)
        return 0
    found = {}
    for way in (*WAYS, *LIBRARIES):
        command = [sys.executable, "-m", "dlkit", "bench", "memory", "--way", way]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if finished.returncode:
            print(f"bench: memory --way {way} ended with status {finished.returncode}", file=sys.stderr)
            return 1
        found[way] = dict(line.split("\t") for line in finished.stdout.splitlines())
    report = {"bench": "memory", **_machine.header("cpu"), "found": found}
    print(markdown(report))
    path = _arguments.result_path(args, "memory", _machine.slug(report["machine"]))
    return int(not _report.save(path, report))
