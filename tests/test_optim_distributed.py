"""The optimizers in 2 processes (gloo) against torch's in one: DDP, FSDP2, tensor parallelism, ZeRO, checkpoints.

Every case runs in each process, with the whole batch at hand; the processes are started once for all cases.
"""

import copy
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.processes import run_cases, start
from torch import nn

import dlkit

PROCESSES = 2
CASES: dict = {}


def case(function):
    CASES[function.__name__] = function
    return function


def run(rank, folder):
    """What each process does."""
    torch.set_num_threads(1)
    meeting, timeout = f"file://{folder}/start", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES, timeout=timeout)
    run_cases(CASES, (rank, folder), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optim")
    start(run, folder, PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def make_model():
    """Sizes that two processes cannot share evenly, down to one element."""
    return nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 1))


def batches(count=4):
    return [torch.randn(8, 6) for _ in range(count)]


def loss_of(model, x):
    return model(x).square().mean()


def part(x, rank):
    return x.chunk(PROCESSES)[rank]


def reference(model, data, max_norm, name="AdamW", **arguments):
    """The whole batch in one process by torch's optimizer: (parameters, norms)."""
    model = copy.deepcopy(model)
    optimizer = getattr(torch.optim, name)(model.parameters(), **arguments)
    norms = []
    for x in data:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
        optimizer.step()
    return list(model.parameters()), norms


def train(model, optimizer, data, rank):
    norms = []
    for x in data:
        optimizer.zero_grad()
        loss_of(model, part(x, rank)).backward()
        optimizer.step()
        norms.append(getattr(optimizer, "grad_norm", None))
    return norms


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(whole(a).detach(), b.detach(), rtol=1e-4, atol=1e-5, check_dtype=False)


@case
def ddp(rank, folder):
    model, data = make_model(), batches()
    expected, norms = reference(model, data, 0.1, lr=0.05)
    model = nn.parallel.DistributedDataParallel(model)
    optimizer = dlkit.optim.AdamW(model.parameters(), lr=0.05, max_norm=0.1)
    assert_same(train(model, optimizer, data, rank), norms)
    assert_same(model.parameters(), expected)


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


@case
def fsdp2(rank, folder):
    for name, arguments in (
        ("AdamW", {}),
        ("SGD", {"momentum": 0.9, "dampening": 0.5}),
        ("RMSprop", {"centered": True}),
    ):
        model, data = make_model(), batches()
        expected, norms = reference(model, data, 0.1, name, lr=0.05, **arguments)
        model = sharded(model)
        optimizer = getattr(dlkit.optim, name)(model.parameters(), lr=0.05, max_norm=0.1, **arguments)
        assert_same(train(model, optimizer, data, rank), norms)
        assert_same(model.parameters(), expected)
        for param in model.parameters():
            for key, state in optimizer.state[param].items():
                assert key == "step" or state.placements == param.placements


@case
def fsdp2_and_torchs_class(rank, folder):
    model, data = make_model(), batches()
    expected, _ = reference(model, data, 1e9, lr=0.05)
    model = sharded(model)
    optimizer = None
    for i, library in enumerate((torch.optim, dlkit.optim, torch.optim, dlkit.optim)):
        following = library.AdamW(model.parameters(), lr=0.05)
        if optimizer is not None:
            following.load_state_dict(optimizer.state_dict())
        optimizer = following
        train(model, optimizer, data[i : i + 1], rank)
    assert_same(model.parameters(), expected)


@case
def fsdp2_with_masters_and_averages(rank, folder):
    model, data = make_model().bfloat16(), [x.bfloat16() for x in batches()]
    alone = copy.deepcopy(model)
    one = dlkit.optim.AdamW(alone.parameters(), lr=0.05, master_weights=True, ema_decay=0.5)
    model = sharded(model)
    two = dlkit.optim.AdamW(model.parameters(), lr=0.05, master_weights=True, ema_decay=0.5)
    for _ in data:
        for a, b in zip(alone.parameters(), model.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            dist.broadcast(a.grad, 0)
            b.grad = torch.distributed.tensor.distribute_tensor(a.grad, b.device_mesh, b.placements)
        one.step()
        two.step()
    for a, b in zip(alone.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, whole(b.detach()))
        for key in ("remainder", "ema"):  # gloo gathers no int16
            assert torch.equal(one.state[a][key].float(), whole(two.state[b][key].float()))
    two.swap_ema()
    for a, b in zip(one.ema_parameters(), model.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), whole(b.detach()))
    eight = dlkit.optim.AdamW(model.parameters(), state_dtype="int8")
    with pytest.raises(ValueError, match="DTensors, and parameter 0 of group 0 is one"):
        eight.step()


@case
def tensor_parallel(rank, folder):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, data = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.LayerNorm(4)), batches()
    model, data = model.double(), [x.double() for x in data]  # other orders of summation lie within the tolerance
    expected, norms = reference(model, data, 0.1, lr=0.05)
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = dlkit.optim.AdamW(model.parameters(), lr=0.05, max_norm=0.1)
    found = []
    for x in data:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
        found.append(optimizer.grad_norm)
    assert_same(found, norms)
    assert_same(model.parameters(), expected)


@case
def zero_redundancy(rank, folder):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, data = make_model(), batches()
    expected, _ = reference(model, data, 1e9, lr=0.05)
    model = nn.parallel.DistributedDataParallel(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = ZeroRedundancyOptimizer(model.parameters(), dlkit.optim.AdamW, lr=0.05)
    train(model, optimizer, data, rank)
    assert_same(model.parameters(), expected)


@case
def checkpoint(rank, folder):
    model, data = make_model(), batches()
    expected, _ = reference(model, data, 1e9, lr=0.05)
    model = sharded(model)
    optimizer = dlkit.optim.AdamW(model.parameters(), lr=0.05)
    train(model, optimizer, data[:2], rank)
    model, optimizer = saved_and_loaded(model, optimizer, f"{folder}/checkpoint", lr=1.0)
    train(model, optimizer, data[2:], rank)
    assert_same(model.parameters(), expected)


def saved_and_loaded(model, optimizer, path, **arguments):
    """A new model and AdamW that hold what a distributed checkpoint of these gave them."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
    model = sharded(make_model().to(next(model.parameters()).dtype))
    optimizer = dlkit.optim.AdamW(model.parameters(), **arguments)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    return model, optimizer


@case
def checkpoint_of_masters_and_averages(rank, folder):
    """A run that was saved half way and loaded goes on with the bits of one that was not."""
    data, arguments = [x.bfloat16() for x in batches()], {"master_weights": True, "ema_decay": 0.5}
    model = make_model().bfloat16()
    first, second = sharded(copy.deepcopy(model)), sharded(model)
    one = dlkit.optim.AdamW(first.parameters(), lr=0.05, **arguments)
    two = dlkit.optim.AdamW(second.parameters(), lr=0.05, **arguments)
    train(first, one, data, rank)
    train(second, two, data[:2], rank)
    second, two = saved_and_loaded(second, two, f"{folder}/masters", lr=1.0, **arguments)
    train(second, two, data[2:], rank)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a.to_local(), b.to_local())
        assert one.state[a].keys() == two.state[b].keys()
        for key, state in one.state[a].items():
            other = two.state[b][key]
            assert state.dtype == other.dtype
            if key != "step":
                assert other.placements == a.placements, key
                state, other = state.to_local(), other.to_local()
            assert torch.equal(state, other), key


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built in")
@pytest.mark.parametrize("name", CASES)
def test_case(problems, name):
    for rank, found in enumerate(problems):
        assert name in found, f"process {rank} did not get to it"
        assert found[name] is None, f"process {rank}: {found[name]}"
