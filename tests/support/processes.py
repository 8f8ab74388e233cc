"""Tests in several processes, which are started once for all cases of a file.

Imports take most of their time (torch.distributed.tensor imports TorchDynamo): a server imports once and forks them.
"""

import multiprocessing
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

IMPORTED = ["torch", "torch._dynamo", "torch.distributed.tensor.parallel", "torch.distributed.fsdp", "pytest"]


def start(run, folder: Path, count: int, seconds: float = 1200) -> None:
    """Calls run(rank, folder) in `count` processes and waits for them; after `seconds`, which only a hang can take,
    they are killed."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    context = mp.start_processes(run, (str(folder),), count, join=False, start_method="forkserver")
    deadline = time.monotonic() + seconds
    while not context.join(timeout=1) and time.monotonic() < deadline:
        pass
    for process in context.processes:
        process.kill()


def new_cases() -> tuple[dict[str, Callable], Callable]:
    """The cases of a file, by name, and the decorator that adds one."""
    cases: dict[str, Callable] = {}
    return cases, lambda function: cases.setdefault(function.__name__, function)


def problems_of(run, folder: Path, count: int) -> list[dict]:
    """:func:`start` for a run() whose :func:`run_cases` writes rank.pt in the folder; returns all results."""
    start(run, folder, count)
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def join_group(rank: int, folder: str, count: int) -> None:
    """In a process: one thread, and a gloo group of all."""
    torch.set_num_threads(1)
    meeting, timeout = f"file://{folder}/start", timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count, timeout=timeout)


def run_cases(cases: dict, arguments: tuple, results: str) -> None:
    """In a process: every case in turn. `results` holds, by name, the error of each finished case or None."""
    problems = {}
    for seed, (name, function) in enumerate(cases.items()):
        torch.manual_seed(seed)
        try:
            function(*arguments)
            problems[name] = None
        except BaseException:  # pytest's own failures are not Exceptions
            problems[name] = traceback.format_exc()
        torch.save(problems, results)
