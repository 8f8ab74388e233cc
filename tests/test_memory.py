"""reuse_cpu_memory(): page faults, its cost, and allocators other than glibc's, which it leaves unchanged."""

import os
import platform
import shutil
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import dlkit
from dlkit import memory

MB = 1 << 20
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")

SCRIPT = """
import resource, sys, warnings
import torch, dlkit
if sys.argv[1] == "reuse":
    reused = dlkit.reuse_cpu_memory()
x = torch.ones(8 << 20)
x + x
before, losses = resource.getrusage(resource.RUSAGE_SELF), []
for step in range(12):
    y = x + x
    losses.append(y[0].clone())  # small tensors that stay
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_minflt - before.ru_minflt, after.ru_maxrss - before.ru_maxrss)
"""


def run(code, *arguments, **environment):
    finished = subprocess.run(
        [sys.executable, "-W", "always", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert finished.returncode == 0, finished.stderr
    return finished


@pytest.mark.slow
def test_page_faults_and_what_a_process_grows_by():
    reused, default = (list(map(int, run(SCRIPT, mode).stdout.split())) for mode in ("reuse", "default"))
    assert default[0] > 12 * 8192
    assert reused[0] < default[0] / 20, (reused, default)
    # Small tensors that are kept do not make it lose freed blocks: one more block of 32 MB is all it needs.
    assert reused[1] < 48 * 1024, reused


def test_context_manager_gives_back():
    size = 40 * MB
    with dlkit.reuse_cpu_memory() as reused:
        assert reused.active
        x = torch.empty(size, dtype=torch.uint8)
        first = x.data_ptr()
        y = torch.arange(MB)
        del x
        assert reused.kept_bytes == size
        x = torch.empty(size - 4096 * 3, dtype=torch.uint8)
        assert x.data_ptr() == first and reused.kept_bytes == 0
        assert torch.empty(size, dtype=torch.uint8).data_ptr() != first
        assert reused.kept_bytes == size
    assert reused.kept_bytes == 0
    assert torch.equal(y, torch.arange(MB))  # y outlives the context
    del x, y
    assert reused.kept_bytes == 0  # freed afterwards: not kept
    assert torch.zeros(size // 4).sum() == 0


def test_nested_uses_restore_the_outer_one():
    with dlkit.reuse_cpu_memory() as outer:
        with dlkit.reuse_cpu_memory(limit=0):
            torch.empty(MB)
            assert outer.kept_bytes == 0
        torch.empty(MB)
        assert outer.kept_bytes == 4 * MB
    assert outer.kept_bytes == 0


def test_limit_gives_back_what_was_kept_longest():
    with dlkit.reuse_cpu_memory(limit=5 * MB) as reused:
        blocks = [torch.empty(size * MB, dtype=torch.uint8) for size in (1, 2, 3)]
        while blocks:
            del blocks[0]
        assert reused.kept_bytes == 5 * MB  # blocks of 2 and 3 MB
        torch.empty(8 * MB, dtype=torch.uint8)
        assert reused.kept_bytes == 0
        torch.empty(5 * MB, dtype=torch.uint8)
        assert reused.kept_bytes == 5 * MB


def test_only_blocks_of_one_to_two_times_the_size_serve():
    with dlkit.reuse_cpu_memory() as reused:
        torch.empty(4 * MB, dtype=torch.uint8)
        small, large = torch.empty(2 * MB - 4096, dtype=torch.uint8), torch.empty(4 * MB + 1, dtype=torch.uint8)
        assert reused.kept_bytes == 4 * MB
        half = torch.empty(2 * MB, dtype=torch.uint8)
        assert reused.kept_bytes == 0
        del small, large, half


def test_blocks_begin_at_different_places_and_leave_nothing_behind():
    def mapped_kb():
        return int(open("/proc/self/status").read().split("VmSize:")[1].split()[0])

    sizes = [200 << 10, 3 * MB + 4096, 2 * MB] * 6
    with dlkit.reuse_cpu_memory():
        assert torch.ones(8 * MB).sum() == 8 * MB  # starts the threads
    before = mapped_kb()
    with dlkit.reuse_cpu_memory():
        blocks = [torch.ones(size, dtype=torch.uint8) for size in sizes]
        assert all(block.sum() == size for block, size in zip(blocks, sizes, strict=True))
        places = [block.data_ptr() % 4096 for block in blocks]
        assert all(place % 64 == 0 for place in places) and len(set(places)) == len(places)
        assert all(block.data_ptr() % (2 * MB) < 4096 for block in blocks if len(block) >= 2 * MB)
        del blocks
    assert mapped_kb() < before + 1024


def test_resize_clone_and_small_tensors():
    with dlkit.reuse_cpu_memory():
        x = torch.arange(100)
        x.resize_(MB)
        x[100:] = 1
        x.resize_(4 * MB)
        assert torch.equal(x[:100], torch.arange(100)) and x[100:MB].eq(1).all()
        assert torch.equal(x.clone(), x)
    x.resize_(8 * MB)
    assert torch.equal(x[:100], torch.arange(100))


def test_the_profiler_sees_it():
    with dlkit.reuse_cpu_memory():
        torch.empty(MB)
        with torch.profiler.profile(profile_memory=True) as profiler:
            x = torch.empty(MB)
            del x
    events = {event.key: event.self_cpu_memory_usage for event in profiler.key_averages()}
    assert events["aten::empty"] == 4 * MB and events["[memory]"] == -4 * MB, events


def test_threads():
    wrong = []

    def work(value):
        for size in range(40):
            x = torch.full((MB // 8 + size * 4096,), value)
            if not x.eq(value).all():
                wrong.append(value)

    with dlkit.reuse_cpu_memory(limit=3 * MB):
        threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.slow
def test_forked_process():
    code = """
import os, torch, dlkit
dlkit.reuse_cpu_memory()
torch.set_num_threads(1)
x = torch.ones(1 << 20)
torch.ones(1 << 20)
child = os.fork()
y = torch.full((1 << 20,), 2.0)
right = bool(x.eq(1).all() and y.eq(2).all())
if child == 0:
    os._exit(0 if right else 1)
assert right and os.waitpid(child, 0)[1] == 0
"""
    run(code)


def test_says_what_it_did():
    with dlkit.reuse_cpu_memory() as reused:
        assert "all of it is kept" in str(reused)
    with dlkit.reuse_cpu_memory(limit=1 << 30) as reused:
        assert "at most 1,024 MB" in str(reused)


@pytest.mark.parametrize(
    ("limit", "error", "text"),
    [
        (-1, ValueError, "expected limit of at least 0, got -1"),
        (1.5, TypeError, "expected limit to be an int or None, got 1.5"),
        (True, TypeError, "expected limit to be an int or None, got True"),
    ],
)
def test_bad_limit(limit, error, text):
    with pytest.raises(error, match=text):
        dlkit.reuse_cpu_memory(limit)


def test_warns_once_and_does_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(memory, "_warned", False)
    monkeypatch.setattr(memory.platform, "system", lambda: "Darwin")
    with pytest.warns(UserWarning, match="malloc is Darwin's, not glibc's"):
        reused = dlkit.reuse_cpu_memory()
    assert not reused.active
    with warnings.catch_warnings(), dlkit.reuse_cpu_memory() as reused:
        warnings.simplefilter("error")
        torch.empty(MB)
        assert reused.kept_bytes == 0 and "left as it is" in str(reused)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_preloaded_allocator(tmp_path):
    source = tmp_path / "other.c"
    source.write_text(
        "#include <stddef.h>\nvoid* __libc_malloc(size_t);\nvoid* malloc(size_t n) { return __libc_malloc(n); }\n"
    )
    library = tmp_path / "libother_malloc.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    code = """
import torch, dlkit
for _ in range(2):
    reused = dlkit.reuse_cpu_memory()
torch.empty(1 << 20)
print(reused.active, reused.kept_bytes)
"""
    finished = run(code, LD_PRELOAD=str(library))
    assert finished.stdout == "False 0\n"
    assert finished.stderr.count("libother_malloc.so, not glibc's") == 1, finished.stderr
