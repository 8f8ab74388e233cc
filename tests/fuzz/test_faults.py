"""What goes wrong around an op: signals, forks, threads, no memory. Limits guard against hangs alone."""

import contextlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import dlkit
import dlkit.functional as fused
from dlkit.random import Philox

SECONDS = 300
UNDER_ASAN = "asan" in os.environ.get("LD_PRELOAD", "")
REUSE = pytest.mark.parametrize("reuse", [False, True], ids=["", "reuse_cpu_memory"])

# A step of every family, of tensors large enough for several threads; `run(i)` gives the same bits for the same i.
STEP = """
import torch, dlkit, dlkit.functional as F
from dlkit.random import Philox

def run(i, rows=512, width=256):
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(rows, width, generator=generator).requires_grad_()
    w, b = (torch.randn(width, generator=generator).requires_grad_() for _ in range(2))
    mean, var = torch.zeros(width), torch.ones(width)
    y = F.dropout_add_layer_norm(F.bias_gelu_dropout(x, b, 0.3, generator=Philox(i)), x, (width,), w, b, 0.1,
                                 generator=Philox(i + 1))
    y = F.batch_norm_relu(F.rms_norm(y, (width,), w), mean, var, w, b, True)
    y = F.group_norm(y.view(rows, 16, -1), 4) + F.dropout(x, 0.2, generator=Philox(i)).view(rows, 16, -1)
    return [t.detach() for t in (y, mean, var, *torch.autograd.grad(y.square().sum(), (x, w, b)))]

def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
"""
space: dict = {}
exec(STEP, space)
run, same = space["run"], space["same"]


def script(code: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([*sys.path, str(Path(__file__).parents[1])])
    return subprocess.run(
        [sys.executable, "-c", STEP + code], capture_output=True, text=True, timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


def prepare(reuse: bool) -> str:
    return "dlkit.memory.reuse_cpu_memory()\n" if reuse else ""


@pytest.mark.slow
@REUSE
def test_interrupted(reuse):
    """SIGINT during an op: KeyboardInterrupt once it is done, and right results afterwards."""
    code = """
import os, signal, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
torch.set_num_threads(2)
expected, interrupted = run(1), 0
big = torch.randn(4096, 2048)
for i in range(4):
    timer = threading.Timer(0.01 + 0.02 * i, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        while True:
            F.layer_norm(big, (2048,))
            F.dropout(big, 0.5)
    except KeyboardInterrupt:
        interrupted += 1
    timer.join()
    assert same(run(1), expected)
print("interrupted", interrupted)
"""
    done = script(prepare(reuse) + code)
    assert done.returncode == 0 and "interrupted 4" in done.stdout, done.stderr[-2000:]


class _Noise(torch.utils.data.Dataset):
    def __init__(self):
        self.norm = dlkit.nn.LayerNorm(256)

    def __len__(self):
        return 8

    def __getitem__(self, i):
        with torch.no_grad():
            x = torch.full((64, 256), float(i)) + torch.arange(256)
            return self.norm(x), fused.dropout(x, 0.5, generator=Philox(i))


@pytest.mark.slow
@REUSE
def test_forked_workers(reuse):
    """DataLoader's workers are forked from a process whose threads have run."""
    before = torch.get_num_threads()
    with dlkit.memory.reuse_cpu_memory() if reuse else contextlib.nullcontext():
        try:
            torch.set_num_threads(2)
            expected = run(3, 4096)
            data = _Noise()
            loader = torch.utils.data.DataLoader(
                data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=SECONDS
            )
            for i, (normal, dropped) in enumerate(loader):
                assert torch.equal(normal, data[i][0]) and torch.equal(dropped, data[i][1])
            assert same(run(3, 4096), expected)
        finally:
            torch.set_num_threads(before)


@REUSE
def test_threads_share_modules(reuse):
    """Eight threads of Python on the same layers, forward and backward: the results of one thread."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.BatchNorm1d(64), torch.nn.GroupNorm(8, 64)
    )
    layers = dlkit.replace(layers).eval()
    inputs = [torch.randn(300, 64) for _ in range(8)]

    def work(i):
        x = inputs[i].clone().requires_grad_()
        y = layers(x)
        dropped = fused.dropout_add(y, x, 0.3, generator=Philox(i))
        return [y.detach(), dropped.detach(), *torch.autograd.grad(dropped.square().sum(), [x, *layers.parameters()])]

    expected, wrong = [work(i) for i in range(8)], []

    def repeat(i):
        for _ in range(20):
            if not same(work(i), expected[i]):
                wrong.append(i)

    with dlkit.memory.reuse_cpu_memory() if reuse else contextlib.nullcontext():
        threads = [threading.Thread(target=repeat, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@pytest.mark.slow
@pytest.mark.skipif(UNDER_ASAN or sys.platform != "linux", reason="ASan takes terabytes of address space")
@REUSE
def test_no_memory(reuse):
    """An allocation that fails within an op, at each of many places: an error, what was written stays, and afterwards
    the results are right."""
    code = """
import resource
torch.set_num_threads(1)
expected, failed = run(1), 0
mean, var, tracked = torch.zeros(64), torch.ones(64), torch.tensor(3)
x = torch.randn(4096, 64, 16).requires_grad_()
w = torch.ones(64, requires_grad=True)
stream = Philox(5)

def step(mean, var, tracked):
    y = torch.ops.dlkit.batch_norm(x, mean, var, w, None, None, tracked, True, 0.1, 1e-5, True)
    return [y, F.dropout(y, 0.5, generator=stream), *torch.autograd.grad(y.sum(), (x, w))]

wanted = [t.detach() for t in step(mean.clone(), var.clone(), tracked.clone())]
stream.manual_seed(5)
size = 4 * x.numel()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
for spare in range(0, 5 * size, size):
    mine = mean.clone(), var.clone(), tracked.clone()
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, hard))
    try:
        found = step(*mine)
    except (RuntimeError, MemoryError):
        failed += 1
        found = None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert mine[2] in (3, 4) and (mine[2] == 4) == bool((mine[0] != 0).any()), "a part was written"
    del found
    stream.manual_seed(5)
    assert same([t.detach() for t in step(mean.clone(), var.clone(), tracked.clone())], wanted)
    stream.manual_seed(5)
    assert same(run(1), expected)
print("failed", failed)
"""
    done = script(prepare(reuse) + code)
    assert done.returncode == 0, done.stderr[-2000:]
    failed = int(re.search(r"failed (\d+)", done.stdout)[1])
    assert failed >= 1


@pytest.mark.slow
@pytest.mark.skipif(UNDER_ASAN or sys.platform != "linux", reason="glibc's checks; AddressSanitizer checks more")
def test_no_call_overruns_its_memory():
    """glibc's own checks of the heap over random calls abort the process."""
    code = """
from fuzz import layers
found = layers.run(250, 0, show=lambda *_: None)
print("intact")
"""
    done = script(code, MALLOC_CHECK_="3", LD_PRELOAD="libc_malloc_debug.so.0")
    if "cannot be preloaded" in done.stderr:
        pytest.skip("no libc_malloc_debug.so.0")
    assert done.returncode == 0 and "intact" in done.stdout, done.stderr[-2000:]
