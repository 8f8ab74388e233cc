"""dlkit's layers on DTensors in 4 processes (gloo) against the same in one: every op, forward and backward.

Every case runs in each process, with whole tensors at hand; the processes are started once for all cases.
"""

import copy
import itertools
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from support.processes import join_group, new_cases, problems_of, run_cases
from torch import nn

import dlkit
from dlkit import functional as F

PROCESSES = 4
CASES, case = new_cases()


def run(rank, folder):
    """Runs in each process."""
    join_group(rank, folder, PROCESSES)
    torch.set_default_dtype(torch.float64)
    line = dist.init_device_mesh("cpu", (PROCESSES,))
    square = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    run_cases(CASES, (rank, line, square), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dtensor")
    return problems_of(run, folder, PROCESSES)


def placed(tensor, mesh, placements):
    """A DTensor leaf; with Partial its parts add up to the tensor."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    whole = tensor.detach().clone()
    if any(placement.is_partial() for placement in placements):
        part = distribute_tensor(whole, mesh, [Replicate() if p.is_partial() else p for p in placements]).to_local()
        for dim, placement in enumerate(placements):
            if placement.is_partial():
                part = part * (mesh.get_local_rank(dim) + 1)
                part = part / sum(range(1, mesh.size(dim) + 1))
        result = DTensor.from_local(part, mesh, placements, run_check=False)
    else:
        result = distribute_tensor(whole, mesh, placements)
    return result.requires_grad_(tensor.requires_grad)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_near(found, expected, what=""):
    torch.testing.assert_close(whole(found), expected, rtol=1e-10, atol=1e-10, msg=lambda text: f"{what}: {text}")


def outputs_and_gradients(function, tensors):
    torch.manual_seed(5)
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    following = torch.rand(2)
    weights = [torch.linspace(-1, 2, y.numel()).view(y.shape) for y in outputs]
    if hasattr(outputs[0], "device_mesh"):
        mesh = outputs[0].device_mesh
        weights = [placed(w, mesh, replicated(mesh)) for w in weights]
    loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    return *outputs, *torch.autograd.grad(loss, leaves), following


def replicated(mesh):
    from torch.distributed.tensor import Replicate

    return [Replicate()] * mesh.ndim


def check(function, tensors, mesh, *placements):
    """`placements` holds one for each tensor; a tensor with None or without one is replicated."""
    expected = outputs_and_gradients(function, tensors)
    given = [
        tensor if tensor is None else placed(tensor, mesh, where or replicated(mesh))
        for tensor, where in itertools.zip_longest(tensors, placements)
    ]
    found = outputs_and_gradients(function, given)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_near(a, b, f"result {i} of {function} at {placements}")
    return found


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def layouts(line, square, ndim):
    """(mesh, placements) for a tensor of `ndim` dimensions."""
    from torch.distributed.tensor import Partial, Shard

    for placement in (Partial(), *map(Shard, range(ndim))):
        yield line, [placement]
    for pair in ([Shard(ndim - 1), Shard(0)], [Shard(0), Shard(0)], [Shard(1), Partial()]):
        yield square, pair


def few_layouts(line, square, ndim):
    from torch.distributed.tensor import Shard

    yield line, [Shard(0)]
    yield square, [Shard(1), Shard(ndim - 1)]


@case
def row_norms(rank, line, square):
    x, w, b = leaf(4, 6, 8), leaf(8), leaf(8)
    norm = lambda x, w=None, b=None: F.layer_norm(x, (8,), w, b)  # noqa: E731
    rms = lambda x, w=None: F.rms_norm(x, (8,), w)  # noqa: E731
    for mesh, placements in layouts(line, square, 3):
        check(norm, (x, w, b), mesh, placements)
        check(rms, (x, w), mesh, placements)
    for mesh, placements in few_layouts(line, square, 3):
        for tensors in ((x,), (x, w), (x, None, b), (x.detach(), w, b), (x, w.detach(), b.detach())):
            check(norm, tensors, mesh, placements)
        check(rms, (x,), mesh, placements)
        check(lambda x: F.layer_norm(x, (6, 8)), (x,), mesh, placements)


@case
def residual_norms(rank, line, square):
    from torch.distributed.tensor import Partial, Shard

    x, residual, w, b = leaf(4, 6, 8), leaf(4, 6, 8), leaf(8), leaf(8)
    row = leaf(8)
    norm = lambda x, r, w=None, b=None: F.add_layer_norm(x, r, (8,), w, b)  # noqa: E731
    rms = lambda x, r, w=None: F.add_rms_norm(x, r, (8,), w)  # noqa: E731
    for mesh, placements in layouts(line, square, 3):
        check(norm, (x, residual, w, b), mesh, placements, placements)
    for mesh, placements in few_layouts(line, square, 3):
        check(norm, (x, row), mesh, placements)
        check(rms, (x, residual, w), mesh, placements)
    check(norm, (x, residual, w, b), line, [Partial()], [Shard(1)])  # RowwiseParallel before sequence parallelism


@case
def gradients_are_placed_as_those_of_torch(rank, line, square):
    """With sharded rows a weight's gradient is a sum that is not yet reduced."""
    from torch.distributed.tensor import Shard

    found = []
    for function in (F.layer_norm, nn.functional.layer_norm):
        x = placed(leaf(4, 8, 8), line, [Shard(1)])
        w, b = (placed(leaf(8), line, replicated(line)) for _ in range(2))
        y = function(x, (8,), w, b)
        y.sum().backward()
        found.append([t.placements for t in (y, x.grad, w.grad, b.grad)])
    assert found[0] == found[1]


@case
def channel_norms(rank, line, square):
    x, w, b, residual = leaf(4, 8, 3, 5), leaf(8), leaf(8), leaf(4, 8, 3, 5)
    mean, var = torch.randn(8), torch.rand(8) + 0.5
    for mesh, placements in layouts(line, square, 4):
        check(lambda x, w, b: F.group_norm(x, 2, w, b), (x, w, b), mesh, placements)
        check(lambda x, w, b: F.batch_norm(x, None, None, w, b, True), (x, w, b), mesh, placements)
        check(lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b), (x, mean, var, w, b), mesh, placements)
    for mesh, placements in few_layouts(line, square, 4):
        check(lambda x, b: F.group_norm(x, 4, None, b), (x, b), mesh, placements)
        check(F.instance_norm, (x,), mesh, placements)
        relu = lambda x, r, w, b: F.batch_norm_relu(x, None, None, w, b, True, residual=r)  # noqa: E731
        check(relu, (x, residual, w, b), mesh, placements, placements)
        relu = lambda x, m, v, w, b: F.batch_norm_relu(x, m, v, w, b)  # noqa: E731
        check(relu, (x, mean, var, w, b), mesh, placements)


@case
def losses(rank, line, square):
    from torch.distributed.tensor import Replicate, Shard

    x, images, target, weight = leaf(8, 6), leaf(8, 6, 3), torch.arange(8) % 6, torch.linspace(1, 2, 6)
    target[3], pixels = -100, torch.arange(24).view(8, 3) % 6
    hidden, table, bias = leaf(8, 4), leaf(6, 4), leaf(6)
    for mesh, rows in ((line, [Shard(0)]), (square, [Shard(0), Replicate()]), (line, [Shard(1)])):
        for reduction in ("mean", "sum", "none"):
            loss = partial(F.cross_entropy, reduction=reduction, label_smoothing=0.1, lse_square_scale=0.1)
            check(loss, (x, target), mesh, rows, [Replicate()] * mesh.ndim)
            check(lambda x, t, w, loss=loss: loss(x, t, w), (x, target, weight), mesh, rows)
            check(loss, (images, pixels), mesh, rows)
            soft = lambda x, t, loss=loss: loss(x, t.detach().softmax(1))  # noqa: E731
            check(soft, (x, x.detach().sin()), mesh, rows, rows)
            linear = partial(F.linear_cross_entropy, reduction=reduction, label_smoothing=0.1)
            fused = lambda h, w, b, t, linear=linear: linear(h, w, t, linear_bias=b)  # noqa: E731
            check(fused, (hidden, table, bias, target), mesh, rows)
            scored = lambda h, w, t, c, linear=linear: linear(h, w, t, weight=c, lse_square_scale=0.1)  # noqa: E731
            check(scored, (hidden, table, target, weight), mesh, rows)


@case
def running_statistics(rank, line, square):
    """Running statistics are those of the whole batch, written in place."""
    from torch.distributed.tensor import Shard

    batch, instance = nn.BatchNorm1d, partial(nn.InstanceNorm1d, track_running_stats=True)
    for channels, mesh, placements, own, make in (
        (8, line, [Shard(0)], None, batch),
        (8, line, [Shard(1)], None, batch),
        (8, line, [Shard(2)], [Shard(0)], partial(batch, momentum=None)),
        (8, line, [Shard(1)], [Shard(0)], batch),
        (3, line, [Shard(1)], None, partial(batch, momentum=None)),  # fewer channels than processes
        (8, square, [Shard(0), Shard(1)], None, batch),
        (8, line, [Shard(0)], None, instance),
        (8, line, [Shard(1)], None, instance),
    ):
        alone, x = make(channels), torch.randn(4, channels, 5)
        layer = dlkit.replace(copy.deepcopy(alone))
        for tensors in (layer._parameters, layer._buffers):
            for name, tensor in tensors.items():
                where = own if own and tensor.dim() == 1 else replicated(mesh)
                tensors[name] = tensor if tensor is None else placed(tensor, mesh, where)
        assert_near(layer(placed(x, mesh, placements)), alone(x), placements)
        for one, other in zip(layer.buffers(), alone.buffers(), strict=True):
            assert_near(one, other, (alone, placements))


# Dropout.

DROPOUTS = {
    "dropout": F.dropout,
    "dropout1d": F.dropout1d,
    "dropout2d": F.dropout2d,
    "dropout3d": F.dropout3d,
    "alpha_dropout": partial(F.alpha_dropout, training=True),
    "feature_alpha_dropout": partial(F.feature_alpha_dropout, training=True),
    "drop_path": F.drop_path,
    "dropblock2d": partial(F.dropblock2d, p=0.3, block_size=2),
    "everything": partial(F.dropout, p=1.0),
}
SHAPES = {"dropout1d": (4, 6, 5), "dropout3d": (4, 6, 2, 3, 2)}


@case
def masks(rank, line, square):
    """On any mesh the mask is that of one process with the same seed, and all generators advance alike."""
    for name, function in DROPOUTS.items():
        shape = SHAPES.get(name, (4, 6, 5, 7))
        for mesh, placements in (layouts if name == "dropout" else few_layouts)(line, square, len(shape)):
            check(function, (leaf(*shape),), mesh, placements)
    for mesh, placements in layouts(line, square, 2):
        check(F.dropout, (leaf(3, 2),), mesh, placements)  # some processes have no part
        check(F.dropout, (leaf(0, 2),), mesh, placements)


@case
def masks_in_place(rank, line, square):
    from torch.distributed.tensor import Partial

    for function in (F.dropout, F.dropout2d, DROPOUTS["dropblock2d"]):
        for mesh, placements in few_layouts(line, square, 4):
            check(lambda x, f=function: f(x * 2, inplace=True), (leaf(4, 6, 5, 7),), mesh, placements)
        with pytest.raises(RuntimeError, match="redistribute"):
            function(placed(torch.randn(4, 6, 5, 7), line, [Partial()]), inplace=True)


@case
def masks_of_fused_ops(rank, line, square):
    x, residual, w, b, bias = leaf(4, 6, 8), leaf(4, 6, 8), leaf(8), leaf(8), leaf(8)
    prenorm = partial(F.dropout_add_layer_norm, p=0.4, normalized_shape=(8,), prenorm=True)
    for mesh, placements in few_layouts(line, square, 3):
        check(partial(F.dropout_add, p=0.4), (x, residual), mesh, placements)
        check(partial(F.dropout_add, p=0.4), (x, leaf(8)), mesh, placements)
        check(lambda x, r, w, b: prenorm(x, r, weight=w, bias=b), (x, residual, w, b), mesh, placements, placements)
        check(lambda x, r, w, b: F.dropout_add_layer_norm(x, r, (8,), w, b, 0.4), (x, residual, w, b), mesh, placements)
        check(lambda x, r, w: F.dropout_add_rms_norm(x, r, (8,), w, 0.4), (x, residual, w), mesh, None, placements)
        for p in (0.0, 0.4):
            for function in (F.bias_gelu_dropout, F.bias_relu_dropout):
                check(partial(function, p=p), (x, bias), mesh, placements)
                check(partial(function, p=p), (x,), mesh, placements)


@case
def a_bias_that_is_cut_with_the_columns(rank, line, square):
    from torch.distributed.tensor import Shard

    for p in (0.0, 0.4):
        check(partial(F.bias_gelu_dropout, p=p), (leaf(4, 6, 8), leaf(8)), line, [Shard(2)], [Shard(0)])


@case
def streams_and_generators(rank, line, square):
    x = leaf(4, 6)
    for mesh, placements in few_layouts(line, square, 2):
        check(lambda x: F.dropout(x, generator=dlkit.random.Philox(3)), (x,), mesh, placements)
        check(lambda x: F.dropout_add(x, x, generator=dlkit.random.Philox(3)), (x,), mesh, placements)
        check(lambda x: F.dropout(x, generator=torch.Generator().manual_seed(3)), (x,), mesh, placements)


@case
def sixteen_bits(rank, line, square):
    """Where results are not sums over processes, their bits are those of one process."""
    for name, function in DROPOUTS.items():
        x = torch.randn(SHAPES.get(name, (4, 6, 5, 7)), dtype=torch.bfloat16)
        for mesh, placements in few_layouts(line, square, x.dim()):
            torch.manual_seed(7)
            expected = function(x)
            torch.manual_seed(7)
            assert torch.equal(function(placed(x, mesh, placements)).full_tensor(), expected), (name, placements)


@case
def other_seeds(rank, line, square):
    """All processes of a mesh use the first one's seed."""
    x = torch.randn(4, 6, 5, 7)
    for mesh, function in itertools.product((line, square), (F.dropout, DROPOUTS["dropblock2d"])):
        torch.manual_seed(0)
        expected = function(x)
        torch.manual_seed(rank)
        assert torch.equal(function(placed(x, mesh, replicated(mesh))).to_local(), expected)
    # Each row of the mesh is a mesh of its own.
    torch.manual_seed(rank // 2 * 2)
    expected = F.dropout(x)
    torch.manual_seed(rank)
    assert torch.equal(F.dropout(placed(x, square["model"], replicated(line))).to_local(), expected)


# Other uses of the ops.


@case
def no_graph(rank, line, square):
    from torch.distributed.tensor import Shard

    x, w = torch.randn(4, 6, 8), torch.randn(8)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            given = placed(x, line, [Shard(0)]), placed(w, line, replicated(line))
            assert_near(F.layer_norm(given[0], (8,), given[1]), F.layer_norm(x, (8,), w))
            assert_near(F.group_norm(given[0], 2), F.group_norm(x, 2))
            for function in (F.dropout, F.drop_path, F.bias_gelu_dropout):
                torch.manual_seed(1)
                expected = function(x)
                torch.manual_seed(1)
                assert_near(function(given[0]), expected)


@case
def twice_differentiated(rank, line, square):
    from torch.distributed.tensor import Shard

    def second(function, *tensors):
        torch.manual_seed(2)
        y = function(*tensors).square().sum()
        first = torch.autograd.grad(y, tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    x, w, b = leaf(4, 6, 8), leaf(8), leaf(8)
    for function, tensors in (
        (lambda x, w, b: F.layer_norm(x, (8,), w, b), (x, w, b)),
        (F.dropout, (x,)),
    ):
        expected = second(function, *tensors)
        given = [placed(t, line, [Shard(0)] if t is x else replicated(line)) for t in tensors]
        for a, b_ in zip(second(function, *given), expected, strict=True):
            assert_near(a, b_)


@case
def every_op_has_an_answer(rank, line, square):
    from dlkit import _dtensor

    names = {
        name.removeprefix("dlkit::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("dlkit::")
    }
    assert _dtensor._sharded | _dtensor._ruled == names
    x = placed(torch.randn(4, 6), line, replicated(line))
    with pytest.raises(NotImplementedError, match="to_local"):
        torch.ops.dlkit.optim_grad_norm([x])
    with pytest.raises(RuntimeError, match="take BatchNorm"):
        dlkit.nn.SyncBatchNorm(6)(x)
    with pytest.raises(RuntimeError, match="mixed"):
        F.layer_norm(x, (6,), torch.randn(6))
    for pair in ((x, torch.randn(4, 6)), (torch.randn(4, 6), x), (x, placed(x.to_local(), square, replicated(square)))):
        with pytest.raises(RuntimeError, match="on one mesh"):
            F.dropout_add(*pair)


# Whole layers.


class Block(nn.Module):
    """A feed-forward block as in models, before dlkit.replace()."""

    def __init__(self, p):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.RMSNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.inner, self.outer = nn.Dropout(p), nn.Dropout(p)

    def forward(self, x):
        hidden = self.inner(torch.relu(self.up(self.norm1(x))))
        return self.norm2(x + self.outer(self.down(hidden)))


def make_block(p):
    torch.manual_seed(4)
    return dlkit.replace(Block(p))


def sequence_parallel(block, mesh):
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    return parallelize_module(
        block,
        mesh,
        {
            "": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Shard(1)),
            "norm1": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
            "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
            "outer": SequenceParallel(),
            "norm2": SequenceParallel(use_local_output=True),
        },
    )


@case
def tensor_and_sequence_parallelism(rank, line, square):
    """With dropout too: the processes together drop the same elements as one process."""
    x = torch.randn(2, 8, 8)
    for p in (0.0, 0.4):
        alone, block = make_block(p), sequence_parallel(make_block(p), line)
        torch.manual_seed(6)
        expected = alone(x)
        torch.manual_seed(6)
        y = block(x.chunk(PROCESSES, 1)[rank])
        assert_near(y, expected.chunk(PROCESSES, 1)[rank])
        expected.square().sum().backward()
        y.square().sum().backward()
        for (name, one), other in zip(block.named_parameters(), alone.parameters(), strict=True):
            assert_near(one.grad, other.grad, name)


@case
def sharded_data_and_tensor_parallelism(rank, line, square):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    batch = torch.randn(4, 8, 8)
    own = batch.chunk(2)[square.get_local_rank("data")].chunk(2, 1)[square.get_local_rank("model")]
    alone, block = (
        make_block(0.0),
        fully_shard(sequence_parallel(make_block(0.0), square["model"]), mesh=square["data"]),
    )
    alone(batch).square().sum().backward()
    (block(own).square().sum() * 2).backward()  # gradients are averaged over the data's dimension
    for (name, one), other in zip(block.named_parameters(), alone.parameters(), strict=True):
        assert_near(one.grad, other.grad, name)

    # Mixed precision, against torch's own layers.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results = []
    for make in (make_block, lambda p: dlkit.restore(make_block(p))):
        block = fully_shard(make(0.0).float(), mesh=line, mp_policy=policy)
        y = block(batch.float()[rank : rank + 1])
        y.square().sum().backward()
        results.append([y, *(whole(param.grad) for param in block.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@case
def a_fused_encoder_layer(rank, line, square):
    from torch.distributed.tensor import Shard, distribute_module

    torch.manual_seed(8)
    alone = dlkit.fuse(dlkit.replace(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)))
    assert isinstance(alone, dlkit.nn.TransformerEncoderLayer)
    layer, x = distribute_module(copy.deepcopy(alone), line), torch.randn(4, 6, 8)
    torch.manual_seed(9)
    expected = alone(x)
    torch.manual_seed(9)
    y = layer(placed(x, line, [Shard(0)]))
    assert_near(y, expected)
    expected.square().sum().backward()
    y.square().sum().backward()
    for (name, one), other in zip(layer.named_parameters(), alone.named_parameters(), strict=True):
        assert_near(one.grad, other[1].grad, name)


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built in")
@pytest.mark.parametrize("name", CASES)
def test_case(problems, name):
    for rank, found in enumerate(problems):
        assert name in found, f"process {rank} did not get to it"
        assert found[name] is None, f"process {rank}: {found[name]}"


def test_nobody_waits_for_an_import():
    code = """if True:
        import sys, torch, dlkit
        class Tagged(torch.Tensor):
            pass
        dlkit.functional.layer_norm(torch.ones(2, 4).as_subclass(Tagged), (4,))
        assert not {"torch.distributed.tensor", "dlkit._dtensor"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built in")
def test_shardings_in_the_file_of_a_function():
    code = """if True:
        import torch, dlkit
        torch.library.define("dlkit::doubled", "(Tensor input) -> Tensor")
        dlkit.functional._dropblock2d.SHARDINGS = {"doubled": lambda given: []}
        from dlkit import _dtensor
        assert "doubled" in _dtensor._sharded
    """
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built in")
def test_compiled(tmp_path):
    """Uses a mesh of this process only, since importing TorchDynamo in others takes seconds."""
    from torch.distributed.tensor import Shard

    def function(x, w):
        return F.layer_norm(F.dropout(x, 0.4), (8,), w)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/start", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        x, w = leaf(4, 6, 8), leaf(8)
        expected = outputs_and_gradients(function, (x, w))
        given = placed(x, mesh, [Shard(1)]), placed(w, mesh, replicated(mesh))
        found = outputs_and_gradients(torch.compile(function, backend="aot_eager", fullgraph=True), given)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(whole(a), b)
    finally:
        dist.destroy_process_group()
