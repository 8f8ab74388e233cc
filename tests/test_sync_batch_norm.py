"""SyncBatchNorm in 2 and 3 processes against one BatchNorm over the whole batch, and errors when processes disagree.

Every case runs in each process, with the whole batch at hand; the processes are started once for all cases.
"""

import copy
import inspect
import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.processes import new_cases, run_cases, start
from torch import nn

import dlkit

TIMEOUT = timedelta(seconds=60)
SHORT = timedelta(seconds=2)
CASES, case = new_cases()


def run(rank, folder):
    """Runs in each process: every case in turn, among three processes and then two."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for processes in (3, 2):
        if rank >= processes:
            break
        meeting = f"file://{folder}/start-{processes}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes, timeout=TIMEOUT)
        run_cases(CASES, (rank, processes), f"{folder}/{processes}-{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sync")
    start(run, folder, 3)
    return {
        processes: [torch.load(folder / f"{processes}-{rank}.pt") for rank in range(processes)] for processes in (2, 3)
    }


def sizes(processes, *pattern):
    return [pattern[rank % len(pattern)] for rank in range(processes)]


def parts(rank, batch_sizes, shape, dtype=torch.float64):
    """A whole batch, the slice of it that this process has, and a gradient for its result."""
    x = torch.randn(sum(batch_sizes), *shape, dtype=dtype) * 3 + 2
    start = sum(batch_sizes[:rank])
    return x, slice(start, start + batch_sizes[rank]), torch.randn_like(x)


def layers(channels, cls=nn.BatchNorm2d, dtype=torch.float64, **options):
    """A BatchNorm over the whole batch, and its synchronised copy."""
    whole = cls(channels, dtype=dtype, **options)
    for tensor in (whole.weight, whole.bias, whole.running_mean, whole.running_var):
        if tensor is not None:
            nn.init.uniform_(tensor, 0.5, 1.5)
    return whole, dlkit.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(whole))


def compare(whole, sync, x, own, grad, residual=None, relu=False, steps=1, tolerance=None):
    """Compares a training step on the whole batch in one process with one on this process's own part."""
    tolerance = tolerance or {"atol": 1e-11, "rtol": 1e-11}
    for _ in range(steps):
        leaf, mine = x.clone().requires_grad_(), x[own].clone().requires_grad_()
        tensors, own_tensors = (leaf,), (mine,)
        if residual is not None:
            tensors += (residual.clone().requires_grad_(),)
            own_tensors += (residual[own].clone().requires_grad_(),)
        y = whole(leaf) if residual is None else whole(leaf) + tensors[1]
        y = y.relu() if relu else y
        own_y = sync(*own_tensors)
        torch.testing.assert_close(own_y, y[own], **tolerance)
        assert own_y.stride() == y[own].stride() or own_y.numel() == 0
        y.backward(grad)
        own_y.backward(grad[own])
        for mine, all in zip(own_tensors, tensors, strict=True):
            torch.testing.assert_close(mine.grad, all.grad[own], **tolerance)
        for (name, mine), all in zip(sync.named_parameters(), whole.parameters(), strict=True):
            assert mine.grad is not None, name
            total = mine.grad.clone()
            dist.all_reduce(total)
            torch.testing.assert_close(total, all.grad, **tolerance)
            mine.grad = all.grad = None
        torch.testing.assert_close(list(sync.buffers()), list(whole.buffers()), **tolerance)
        x = x * 1.5 + 1
    with torch.no_grad():
        y = sync.eval()(x[own])
        expected = whole.eval()(x[own])
        torch.testing.assert_close(y, expected.relu() if relu else expected, **tolerance)


@case
def equal_parts(rank, processes):
    compare(*layers(5), *parts(rank, sizes(processes, 4), (5, 3, 3)), steps=3)


@case
def unequal_parts(rank, processes):
    compare(*layers(5), *parts(rank, sizes(processes, 4, 1, 7), (5, 3, 3)), steps=2)


@case
def an_empty_part(rank, processes):
    compare(*layers(5), *parts(rank, sizes(processes, 4, 0), (5, 3, 3)), steps=2)
    compare(*layers(5), *parts(rank, sizes(processes, 0, 2), (5, 3, 3)))


@case
def features_and_sequences(rank, processes):
    compare(*layers(5, nn.BatchNorm1d), *parts(rank, sizes(processes, 4, 1), (5,)))
    compare(*layers(5, nn.BatchNorm1d), *parts(rank, sizes(processes, 3, 1), (5, 7)))
    compare(*layers(5, nn.BatchNorm3d), *parts(rank, sizes(processes, 3, 1), (5, 2, 2, 2)))


@case
def channels_last(rank, processes):
    x, own, grad = parts(rank, sizes(processes, 4, 2), (5, 3, 3))
    compare(*layers(5), x.to(memory_format=torch.channels_last), own, grad)


@case
def single_and_half_precision(rank, processes):
    x, own, grad = parts(rank, sizes(processes, 4, 2), (5, 3, 3), torch.float32)
    compare(*layers(5, dtype=torch.float32), x, own, grad, tolerance={"atol": 1e-5, "rtol": 1e-5})
    x, grad = x.bfloat16(), grad.bfloat16()
    compare(*layers(5, dtype=torch.float32), x, own, grad, tolerance={"atol": 0.05, "rtol": 0.02})


@case
def a_large_mean_over_a_small_variance(rank, processes):
    x, own, _ = parts(rank, sizes(processes, 40, 20), (5,), torch.float32)
    x = x * 0.01 + 1000
    sync = dlkit.nn.SyncBatchNorm(5)
    y = sync(x[own])
    expected = nn.functional.batch_norm(x.double(), None, None, training=True)[own]
    torch.testing.assert_close(y.double(), expected, atol=1e-2, rtol=0)
    native = nn.functional.batch_norm(x, None, None, training=True)[own]
    assert (y - expected).abs().max() <= 2 * (native - expected).abs().max()


@case
def wider_than_one_message(rank, processes):
    compare(*layers(4500, nn.BatchNorm1d), *parts(rank, sizes(processes, 3, 2), (4500,)))


@case
def without_parameters_or_running_statistics(rank, processes):
    args = parts(rank, sizes(processes, 4, 2), (5, 3, 3))
    compare(*layers(5, affine=False), *args)
    whole, sync = layers(5, track_running_stats=False)
    compare(whole, sync, *args)
    assert sync.num_batches_tracked is None
    if "bias" in inspect.signature(nn.BatchNorm2d).parameters:
        compare(*layers(5, bias=False), *args)


@case
def cumulative_average(rank, processes):
    whole, sync = layers(5, momentum=None)
    compare(whole, sync, *parts(rank, sizes(processes, 4, 2), (5, 3, 3)), steps=3)
    assert sync.num_batches_tracked == 3


@case
def residual_and_relu(rank, processes):
    for pattern in ((4, 2), (3, 0)):
        for residual in (False, True):
            x, own, grad = parts(rank, sizes(processes, *pattern), (5, 3, 3))
            whole, sync = layers(5)
            dlkit.fuse(net := nn.Sequential(sync, nn.ReLU()))
            assert type(net[0]) is dlkit.nn.SyncBatchNormReLU
            compare(whole, net[0], x, own, grad, torch.randn_like(x) if residual else None, relu=True, steps=2)
    x, own, _ = parts(rank, sizes(processes, 4, 2), (5, 3, 3))
    wide = torch.randn(5, 1, 1, dtype=torch.float64)
    whole, sync = layers(5)
    sync.__class__ = dlkit.nn.SyncBatchNormReLU
    torch.testing.assert_close(sync(x[own], wide), (whole(x) + wide).relu()[own])


@case
def frozen_input_or_parameters(rank, processes):
    x, own, grad = parts(rank, sizes(processes, 4, 2), (5, 3, 3))
    whole, sync = layers(5)
    sync.bias.requires_grad_(False)
    whole(x).backward(grad)
    sync(x[own]).backward(grad[own])
    assert sync.bias.grad is None
    dist.all_reduce(sync.weight.grad)
    torch.testing.assert_close(sync.weight.grad, whole.weight.grad)
    assert not sync.requires_grad_(False)(x[own]).requires_grad


@case
def one_collective_a_pass(rank, processes):
    counts = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "all_gather_into_tensor")}
    gather = dlkit.nn.sync_batch_norm._all_gather
    sync = layers(5)[1]
    x = torch.randn(3, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    try:
        for name, original in originals.items():
            setattr(dist, name, lambda *a, original=original, name=name, **k: counts.append(name) or original(*a, **k))
        dlkit.nn.sync_batch_norm._all_gather = lambda *a, **k: counts.append("gather") or gather(*a, **k)
        sync(x).sum().backward()
        assert counts == ["gather", "all_reduce"], counts
        sync.eval()(x).sum().backward()
        assert len(counts) == 2
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
        dlkit.nn.sync_batch_norm._all_gather = gather


@case
def a_device_without_kernels(rank, processes):
    has_kernel = dlkit.nn.sync_batch_norm._has_kernel
    try:
        dlkit.nn.sync_batch_norm._has_kernel = lambda device: False
        with pytest.raises(ValueError, match="expected input tensor to be on GPU"):  # torch's own message
            layers(5)[1](torch.randn(3, 5, dtype=torch.float64))
    finally:
        dlkit.nn.sync_batch_norm._has_kernel = has_kernel


@case
def a_group_of_some_processes(rank, processes):
    members = list(range(processes - 1))
    group, alone = dist.new_group(members), dist.new_group([processes - 1])
    whole, sync = layers(5)
    sync.process_group = group if rank in members else alone
    x, own, _ = parts(rank, sizes(processes, 4, 2), (5, 3, 3))
    end = sum(sizes(processes, 4, 2)[:-1])
    whole_x = x[:end] if rank in members else x[own]
    torch.testing.assert_close(sync(x[own]), whole(whole_x)[own if rank in members else slice(None)])
    torch.testing.assert_close(sync.running_var, whole.running_var)


@case
def distributed_data_parallel(rank, processes):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
        ).double()

    x, own, _ = parts(rank, sizes(processes, 3), (3, 6, 6))
    whole = network()
    model = dlkit.fuse(dlkit.nn.SyncBatchNorm.convert_sync_batchnorm(network()))
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (whole, ddp)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        whole(x).square().mean().backward()
        ddp(x[own]).square().mean().backward()
        for mine, all in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, all.grad)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(dict(model.state_dict()), dict(whole.state_dict()))


@case
def empty_everywhere(rank, processes):
    sync = layers(5)[1]
    before = [sync.running_mean.clone(), sync.running_var.clone()]
    x = torch.empty(0, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    y = sync(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    torch.testing.assert_close([sync.running_mean, sync.running_var], before)
    assert not sync.weight.grad.any() and not sync.bias.grad.any()


@case
def nan_reaches_everyone(rank, processes):
    sync = layers(5)[1]
    x = torch.randn(3, 5, dtype=torch.float64)
    if rank == 0:
        x[0, 2] = torch.nan
    y = sync(x)
    assert y.isnan().all(0).tolist() == sync.running_var.isnan().tolist() == [False, False, True, False, False]


@case
def one_value_in_all_processes(rank, processes):
    sync = layers(5)[1]
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        sync(torch.randn(int(rank == 0), 5, dtype=torch.float64))
    assert sync.num_batches_tracked == 0


@case
def different_channels_are_told_to_everyone(rank, processes):
    for channels in (4 + rank, 4000 + rank, (3, 4000)[rank % 2]):
        sync = dlkit.nn.SyncBatchNorm(channels)
        before = [tensor.clone() for tensor in sync.buffers()]
        with pytest.raises(ValueError, match=rf"same number of channels in every process, got \[.*{channels}.*\]"):
            sync(torch.randn(3, channels))
        torch.testing.assert_close(list(sync.buffers()), before)
    torch.manual_seed(0)
    equal_parts(rank, processes)  # the group still works


@case
def bad_input(rank, processes):
    sync = dlkit.nn.SyncBatchNorm(5)
    for error, x in (
        (RuntimeError, torch.randn(3, 4)),
        (ValueError, torch.randn(3)),
        (ValueError, torch.randn(3, 0)),
        (NotImplementedError, torch.ones(3, 5, dtype=torch.int64)),
        (RuntimeError, torch.randn(3, 5, dtype=torch.float64)),
    ):
        with pytest.raises(error):
            sync(x)
    assert sync.num_batches_tracked == 0 and not sync.running_mean.any()
    assert sync.eval()(torch.randn(3, 5)).shape == (3, 5)


@case
def a_process_that_does_not_come(rank, processes):
    group = dist.new_group(timeout=SHORT)
    sync = layers(5)[1]
    sync.process_group = group
    start = time.monotonic()
    if rank > 0:
        with pytest.raises(RuntimeError):
            sync(torch.randn(3, 5, dtype=torch.float64))
        assert time.monotonic() - start < SHORT.total_seconds() + 10
        assert sync.num_batches_tracked == 0


@case
def a_process_that_dies(rank, processes):
    """Must be the last case: processes cannot communicate after it."""
    if processes == 3:
        return
    if rank == 1:
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        layers(5)[1](torch.randn(3, 5, dtype=torch.float64))
    assert time.monotonic() - start < TIMEOUT.total_seconds() / 2


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_processes(problems, name, processes):
    for rank, found in enumerate(problems[processes]):
        if (name, processes, rank) == ("a_process_that_dies", 2, 1):
            continue
        assert name in found, f"process {rank} ended before"
        assert found[name] is None, f"process {rank}:\n{found[name]}"
