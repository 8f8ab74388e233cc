"""The optimizers in 2 processes (gloo) against torch's in one: DDP, FSDP2, tensor parallelism, ZeRO, checkpoints.

Every case runs in each process, with the whole batch at hand; the processes are started once for all cases.
"""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from support.processes import join_group, new_cases, problems_of, run_cases
from torch import nn

import dlkit

PROCESSES = 2
CASES, case = new_cases()


def run(rank, folder):
    """Runs in each process."""
    join_group(rank, folder, PROCESSES)
    run_cases(CASES, (rank, folder), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optim")
    return problems_of(run, folder, PROCESSES)


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
        assert torch.equal(one.state[a]["ema"], whole(two.state[b]["ema"]))
        rest = whole(two.state[b]["remainder"])
        assert torch.equal(one.state[a]["remainder"].view(torch.int16), rest.view(torch.int16))
    two.swap_ema()
    for a, b in zip(one.ema_parameters(), model.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), whole(b.detach()))


@case
def fsdp2_moved_between_steps(rank, folder):
    """model.to() gives the same parameters new local tensors."""
    for moved in (lambda model: model._apply(lambda t: t.clone()), lambda model: model.to(torch.float64).float()):
        model, data = make_model(), batches()
        expected, norms = reference(model, data, 0.1, "SGD", lr=0.05)
        model = sharded(model)
        optimizer = dlkit.optim.SGD(model.parameters(), lr=0.05, max_norm=0.1)
        train(model, optimizer, data[:2], rank)
        optimizer.zero_grad()
        moved(model)
        assert_same(train(model, optimizer, data[2:], rank), norms[2:])
        assert_same(model.parameters(), expected)


def big_model():
    """Two weights, whose half in each process has 8-bit states, and biases without them."""
    return nn.Sequential(nn.Linear(96, 130), nn.Tanh(), nn.Linear(130, 96))


def set_gradients(model, step):
    """Sets the same gradients in each process, over a few decades, sharded as the parameters are."""
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        grad = torch.randn(param.shape, generator=generator) * torch.logspace(-2, 0, param.shape[0]).view(
            -1, *[1] * (param.dim() - 1)
        )
        if hasattr(param, "placements"):
            grad = torch.distributed.tensor.distribute_tensor(grad, param.device_mesh, param.placements)
        param.grad = grad


@case
def fsdp2_with_8_bit_states(rank, folder):
    """Each process has its own blocks; results are near those of fp32 states, and a checkpoint can be resharded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    model = big_model()
    alone = copy.deepcopy(model)
    plain = torch.optim.AdamW(alone.parameters(), lr=0.01)
    model = sharded_linear(model)
    optimizer = dlkit.optim.AdamW(model.parameters(), lr=0.01, state_dtype="int8")
    for step in range(5):
        set_gradients(alone, step)
        set_gradients(model, step)
        plain.step()
        optimizer.step()
    weight = model[0].weight
    assert optimizer.state[weight]["exp_avg_codes"].placements == weight.placements
    assert optimizer.state[weight]["exp_avg_codes"].to_local().dtype == torch.uint8
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        assert (whole(a.detach()) - b).abs().mean() < 0.1 * 5 * 0.01

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_optimizer_state_dict(model, optimizer, options=options)  # on process 0
    saved = optimizer.state_dict()
    for number, (name, _) in enumerate(model.named_parameters()):
        whole_state = whole(saved["state"][number]["exp_avg"]).cpu()
        assert rank > 0 or torch.equal(gathered["state"][name]["exp_avg"], whole_state), name
    again = sharded_linear(big_model())
    again.load_state_dict(model.state_dict())
    following = dlkit.optim.AdamW(again.parameters(), lr=0.01, state_dtype="int8")
    following.load_state_dict(copy.deepcopy(saved))
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        for key, value in optimizer.state[one].items():
            other = following.state[two][key]
            value, other = (v.to_local() if hasattr(v, "to_local") else v for v in (value, other))
            assert torch.equal(value, other), key
    set_gradients(model, 9)
    set_gradients(again, 9)
    optimizer.step()
    following.step()
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.to_local(), two.to_local())


def sharded_linear(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


@case
def whole_state_dicts_of_masters(rank, folder):
    """gloo gathers remainders, and a tool may set them in another model."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    arguments = {"lr": 0.05, "master_weights": True, "ema_decay": 0.5, "state_dtype": torch.bfloat16}
    data = [x.bfloat16() for x in batches()]
    model = sharded(make_model().bfloat16())
    optimizer = dlkit.optim.AdamW(model.parameters(), **arguments)
    train(model, optimizer, data[:2], rank)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    again = sharded(make_model().bfloat16())
    again.load_state_dict(model.state_dict())
    following = dlkit.optim.AdamW(again.parameters(), **arguments)
    set_optimizer_state_dict(again, following, copy.deepcopy(saved), options=options)  # loading copies nothing
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        for key in ("remainder", "ema", "exp_avg", "exp_avg_sq"):
            assert torch.equal(bits_of(optimizer.state[a][key]), bits_of(following.state[b][key])), key
    torch.manual_seed(3)
    train(model, optimizer, data[2:], rank)
    torch.manual_seed(3)
    train(again, following, data[2:], rank)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.to_local(), b.to_local())


def bits_of(tensor):
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


@case
def tensor_parallel(rank, folder):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, data = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.LayerNorm(4)), batches()
    model, data = model.double(), [x.double() for x in data]  # other orders of summation stay within the tolerance
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
def clipping_of_plain_and_sharded_gradients(rank, folder):
    """torch's function refuses to take both together."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for norm_type in (2.0, 1.0, float("inf")):
        torch.manual_seed(1)
        alone = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.LayerNorm(4)).double()
        model, x = copy.deepcopy(alone), torch.randn(8, 6).double()
        parallelize_module(
            model, dist.init_device_mesh("cpu", (PROCESSES,)), {"0": ColwiseParallel(), "2": RowwiseParallel()}
        )
        norms = []
        for each, clip in ((model, dlkit.optim.clip_grad_norm_), (alone, nn.utils.clip_grad_norm_)):
            loss_of(each, x).backward()
            norms.append(clip(each.parameters(), 0.01, norm_type))
        assert norms[1] > 0.01
        assert_same(
            [norms[0], *(p.grad for p in model.parameters())], [norms[1], *(p.grad for p in alone.parameters())]
        )
        model[3].weight.grad.fill_(float("nan"))
        with pytest.raises(RuntimeError, match="non-finite"):
            dlkit.optim.clip_grad_norm_(model.parameters(), 0.01, norm_type, error_if_nonfinite=True)


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
def zero_redundancy_with_clipping(rank, folder):
    """The norm is that of all gradients, though each process steps some of the parameters."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, data = make_model(), batches()
    expected, norms = reference(model, data, 0.1, "SGD", lr=0.05)
    model = nn.parallel.DistributedDataParallel(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = ZeroRedundancyOptimizer(model.parameters(), dlkit.optim.SGD, lr=0.05, max_norm=0.1)
    found = []
    for x in data:
        optimizer.zero_grad()
        loss_of(model, part(x, rank)).backward()
        optimizer.step()
        found.append(optimizer.optim.grad_norm)
    assert_same(found, norms)
    assert_same(model.parameters(), expected)


@case
def fsdp1(rank, folder):
    """Flat parameters: the norm needs a process group, and the error says that."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for originals in (False, True):
        model, data = make_model(), batches()
        expected, norms = reference(model, data, 0.1, lr=0.05)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = FullyShardedDataParallel(model, use_orig_params=originals, device_id=torch.device("cpu"))
        optimizer = dlkit.optim.AdamW(model.parameters(), lr=0.05, max_norm=0.1)
        loss_of(model, part(data[0], rank)).backward()
        with pytest.raises(RuntimeError, match="max_norm needs the process group of all gradients"):
            optimizer.step()
        optimizer = dlkit.optim.AdamW(model.parameters(), lr=0.05, max_norm=0.1, process_group=dist.group.WORLD)
        assert_same(train(model, optimizer, data, rank), norms)
        with FullyShardedDataParallel.summon_full_params(model):
            assert_same(model.parameters(), expected)


@case
def pipeline_stages(rank, folder):
    """Each process has other parameters, and clips by the norm of all."""
    for process_group in (dist.group.WORLD, dist.init_device_mesh("cpu", (PROCESSES,))):
        torch.manual_seed(11)
        params = [nn.Parameter(torch.randn(5)) for _ in range(3)]
        grads = [torch.randn(5) for _ in params]
        own = params[:1] if rank == 0 else params[1:]
        optimizer = dlkit.optim.SGD(own, lr=1.0, max_norm=0.1, process_group=process_group)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        before = [param.detach().clone() for param in own]
        optimizer.step()
        total = torch.cat(grads).norm()
        torch.testing.assert_close(optimizer.grad_norm, total)
        for param, old in zip(own, before, strict=True):
            torch.testing.assert_close(param.detach(), old - param.grad * 0.1 / total)
        if rank == 1:  # a stage without gradients takes part
            for param in own:
                param.grad = None
        optimizer.step()
        torch.testing.assert_close(optimizer.grad_norm, grads[0].norm())
        other = copy.deepcopy(optimizer)
        with pytest.raises(RuntimeError, match="a copy has none"):
            other.step()


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
            assert torch.equal(bits_of(state), bits_of(other)), key


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built in")
@pytest.mark.parametrize("name", CASES)
def test_case(problems, name):
    for rank, found in enumerate(problems):
        assert name in found, f"process {rank} did not get to it"
        assert found[name] is None, f"process {rank}: {found[name]}"
