"""Tests in several processes, which are started once for all cases of a file.

Imports take most of their time (torch.distributed.tensor brings TorchDynamo), so a server imports once and forks them.
"""

import multiprocessing
import time
import traceback
from pathlib import Path

import torch
import torch.multiprocessing as mp

IMPORTED = ["torch", "torch._dynamo", "torch.distributed.tensor.parallel", "torch.distributed.fsdp", "pytest"]


def start(run, folder: Path, count: int, seconds: float = 150) -> None:
    """Calls run(rank, folder) in `count` processes and waits for them; after `seconds` they are killed."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    context = mp.start_processes(run, (str(folder),), count, join=False, start_method="forkserver")
    deadline = time.monotonic() + seconds
    while not context.join(timeout=1) and time.monotonic() < deadline:
        pass
    for process in context.processes:
        process.kill()


def run_cases(cases: dict, arguments: tuple, results: str) -> None:
    """In a process: every case in turn. `results` holds what went wrong in those done so far, or None, by name."""
    problems = {}
    for seed, (name, function) in enumerate(cases.items()):
        torch.manual_seed(seed)
        try:
            function(*arguments)
            problems[name] = None
        except BaseException:  # pytest's own failures are no Exceptions
            problems[name] = traceback.format_exc()
        torch.save(problems, results)
