"""Checks of every op's tensor arguments, found by the ops' schemas, and layers whose parameters come from elsewhere."""

import copy
import re

import pytest
import torch
from support import of_ops

import dlkit
import dlkit.functional as fused

pytestmark = pytest.mark.sanitize

X = torch.linspace(-2, 3, 120).sin().view(4, 6, 5) * torch.arange(1.0, 6)
ROW, CHANNELS = torch.ones(5), torch.ones(6)
STATS, ROW_STATS = torch.ones(6), torch.ones(4, 6, 1)
STATE = torch.tensor([3, 4])
COUNTER = torch.tensor(0)
CLASSES, ROWS, WEIGHT = torch.tensor([[1, 0, 5, 2, 3]] * 4), torch.ones(2, 20), torch.ones(6, 3)
FEATURES, LABELS = X[0, :, :3], torch.arange(6)
LOSS = (1, -100, 0.1, 0.1, 4.0)

# Valid positional arguments, with every optional tensor present.
CALLS = {
    "layer_norm": (X, (5,), ROW, ROW, 1e-5),
    "rms_norm": (X, (5,), ROW, 1e-5),
    "add_layer_norm": (X, X, (5,), ROW, ROW, 1e-5),
    "add_rms_norm": (X, X, (5,), ROW, 1e-5),
    "dropout_add_layer_norm": (X, X, (5,), 0.5, ROW, ROW, 1e-5, None, STATE),
    "dropout_add_rms_norm": (X, X, (5,), 0.5, ROW, 1e-5, None, STATE),
    "layer_norm_forward": (X, X, 1, ROW, ROW, 1e-5, False, True),
    "layer_norm_backward": (X, X, X, ROW_STATS, ROW_STATS, ROW, ROW, 1, [True] * 3),
    "dropout_layer_norm_forward": (X, X, STATE, 0.5, 1, ROW, ROW, 1e-5, False, True, None),
    "dropout_layer_norm_backward": (X, X, X, ROW_STATS, ROW_STATS, ROW, ROW, STATE, 0.5, 1, [True] * 4),
    "batch_norm": (X, STATS, STATS, CHANNELS, CHANNELS, X, COUNTER, True, 0.1, 1e-5, True),
    "group_norm": (X, 2, CHANNELS, CHANNELS, 1e-5, X),
    "instance_norm": (X, STATS, STATS, CHANNELS, CHANNELS, True, 0.1, 1e-5),
    "batch_norm_forward": (X, X, CHANNELS, CHANNELS, STATS, STATS, COUNTER, 0, True, 0.1, 1e-5, True),
    "batch_norm_backward": (X, X, X, CHANNELS, CHANNELS, STATS, STATS, 0, True, True, [True] * 4),
    "batch_norm_apply": (X, X, CHANNELS, CHANNELS, STATS, STATS, True),
    "batch_norm_backward_sums": (X, X, X, CHANNELS, CHANNELS, STATS, STATS, True, [True] * 2),
    "batch_norm_backward_apply": (X, X, X, CHANNELS, CHANNELS, STATS, STATS, torch.ones(2, 6), True, [True] * 2),
    "dropout": (X, 0.5, -1, False, None, STATE),
    "dropout_": (X, 0.5, -1, False, None, STATE),
    "dropout_mask": (X, 0.5, None, STATE),
    "dropout_add": (X, X, 0.5, None, STATE),
    "dropout_forward_": (X, STATE, 0.5, 1, 2.0, 0.0, 0.0, None),
    "dropout_apply": (X, STATE, 0.5, 1, 2.0, 0.0, 0.0),
    "dropout_add_forward": (X, X, STATE, 0.5, None),
    "bias_act_dropout": (X, ROW, 1, 0.5, None, STATE),
    "bias_act_dropout_forward": (X, ROW, STATE, 1, 0.5, None),
    "bias_act_dropout_backward": (X, X, ROW, STATE, 1, 0.5, True),
    "cross_entropy": (X, CLASSES, CHANNELS, *LOSS, False, False),
    "cross_entropy_forward": (X, CLASSES, CHANNELS, *LOSS, False),
    "cross_entropy_backward": (torch.ones(()), X, CLASSES, CHANNELS, ROWS, torch.ones(2), *LOSS),
    "cross_entropy_backward_": (torch.ones(()), X, CLASSES, CHANNELS, ROWS, torch.ones(2), *LOSS),
    "linear_cross_entropy": (FEATURES, WEIGHT, LABELS, CHANNELS, CHANNELS, *LOSS, False),
    "linear_cross_entropy_forward": (FEATURES, WEIGHT, LABELS, CHANNELS, CHANNELS, *LOSS, False, [True] * 3),
    "linear_cross_entropy_backward": (CHANNELS, FEATURES, WEIGHT, LABELS, CHANNELS, CHANNELS, *LOSS[1:], [True] * 3),
} | of_ops.table("OP_ARGUMENTS")


def schema_of(name):
    return getattr(torch.ops.dlkit, name).default._schema


def tensors_of(name):
    """(position, name) of each tensor argument."""
    arguments = enumerate(schema_of(name).arguments)
    return [(i, a.name) for i, a in arguments if "Tensor" in str(a.type) and "List" not in str(a.type)]


def call(name, arguments):
    keywords = [a.name for a in schema_of(name).arguments if a.kwarg_only]
    positional = len(arguments) - len(keywords) if keywords else len(arguments)
    own = [a.clone() if isinstance(a, torch.Tensor) and a.device.type == "cpu" else a for a in arguments]
    op = getattr(torch.ops.dlkit, name).default
    return op(*own[:positional], **dict(zip(keywords, own[positional:], strict=True)))


def test_every_op_is_in_the_table():
    names = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("dlkit::")}
    wanted = {name for name in names if not name.startswith("optim") and hasattr(torch.ops.dlkit, name)}
    assert {name for name in wanted if len(tensors_of(name)) > 1} == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_tensors_are_checked_by_schema(name):
    """Each argument in turn is on another device, in another layout and, where a kernel reads it, of another type."""
    call(name, CALLS[name])
    tensors = tensors_of(name)
    input_at = next((i for i, argument in tensors if argument == "input"), tensors[0][0])
    public = hasattr(fused, name.rstrip("_")) or name == "bias_act_dropout"
    for i, argument in tensors:
        if i == input_at or (public and argument == "num_batches_tracked"):
            continue
        tensor = CALLS[name][i]
        bad = {"device": tensor.to("meta")}
        if tensor.dim() > 0:
            bad["layout"] = tensor.to_sparse()
        if not public or argument in ("weight", "bias", "stream"):
            bad["type"] = tensor.double() if argument != "num_batches_tracked" else tensor.int()
        if "rms" in name and public and argument == "weight":
            del bad["type"]  # any floating type is accepted, as in torch
        for kind, value in bad.items():
            if kind == "type" and argument in ("mean", "rstd", "sums", "running_mean", "running_var"):
                continue
            arguments = [value if j == i else a for j, a in enumerate(CALLS[name])]
            # A kernel op has no kernel for other layouts; a residual that the op does not fuse is checked by torch's
            # own addition.
            apart = argument == "residual" and name in ("dropout_add", "batch_norm") and kind != "device"
            named = not apart and (public or kind != "layout")
            with pytest.raises((RuntimeError, NotImplementedError), match=re.escape(argument) if named else None):
                call(name, arguments)


@pytest.mark.parametrize(
    "name",
    [
        "dropout_mask",
        "dropout_add_forward",
        "dropout_forward_",
        "dropout_layer_norm_forward",
        "dropout_layer_norm_backward",
        "batch_norm_forward",
        "batch_norm_backward",
    ],
)
def test_opcheck_with_every_tensor_present(name):
    torch.utils.deterministic.fill_uninitialized_memory = False
    arguments = [a.clone() if isinstance(a, torch.Tensor) else a for a in CALLS[name]]
    keywords = [a.name for a in schema_of(name).arguments if a.kwarg_only]
    positional = arguments[: len(arguments) - len(keywords)]
    named = dict(zip(keywords, arguments[len(positional) :], strict=True))
    torch.library.opcheck(getattr(torch.ops.dlkit, name).default, tuple(positional), named)


def test_what_is_refused_leaves_everything_as_it_was():
    layer = dlkit.nn.BatchNorm1d(6)
    before = copy.deepcopy(layer.state_dict())
    stream = dlkit.random.Philox(3)
    with pytest.raises(RuntimeError, match="residual"):
        fused.batch_norm_relu(X, layer.running_mean, layer.running_var, training=True, residual=X.to("meta"))
    with dlkit.random.use(stream), pytest.raises(RuntimeError, match="residual"):
        fused.dropout_add_layer_norm(X, X.to("meta"), (5,))
    assert stream.state_dict() == {"seed": 3, "offset": 0}
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", ["Long", "float", "double", "int", "one element", "meta"])
@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNormReLU1d", "SyncBatchNorm"])
def test_counters_of_any_kind(name, kind, momentum):
    """An averaged checkpoint has float counters; torch's layer goes on counting in them."""
    counter = {
        "Long": torch.tensor(3),
        "float": torch.tensor(3.0),
        "double": torch.tensor(3.0, dtype=torch.float64),
        "int": torch.tensor(3, dtype=torch.int32),
        "one element": torch.tensor([3]),
        "meta": torch.tensor(3, device="meta"),
    }[kind]
    if kind == "meta" and momentum is None:
        pytest.skip("nothing to divide by")
    ours, theirs = getattr(dlkit.nn, name)(6, momentum=momentum), torch.nn.BatchNorm1d(6, momentum=momentum)
    for layer in (ours, theirs):
        state = {**layer.state_dict(), "num_batches_tracked": counter.clone()}
        layer.load_state_dict(state, assign=True)
        for _ in range(2):
            y = layer(X)
    expected = theirs(X)
    y = ours(X)
    torch.testing.assert_close(y, expected.relu() if "ReLU" in name else expected)
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert mine.dtype == other.dtype and mine.device == other.device
        if mine.device.type != "meta":
            torch.testing.assert_close(mine, other)


MODULES = {
    "LayerNorm": (5,),
    "RMSNorm": (5,),
    "GroupNorm": (2, 6),
    "BatchNorm1d": (6,),
    "BatchNormReLU1d": (6,),
    "BatchNormAct1d": (6,),
    "GroupNormAct": (2, 6),
    "InstanceNorm1d": (6,),
    "SyncBatchNorm": (6,),
    "AddLayerNorm": (5,),
    "AddRMSNorm": (5,),
    "DropoutAddLayerNorm": (5, 0.0),
    "DropoutAddRMSNorm": (5, 0.0),
    "DropConnectLinear": (5, 5),
    "MultiheadAttention": (5, 1),
}


@pytest.mark.parametrize("name", MODULES)
def test_layers_made_without_memory(name):
    """skip_init, meta and to_empty, and assign=True: a layer computes with parameters from elsewhere."""
    make = getattr(dlkit.nn, name)
    plain = make(*MODULES[name]).eval()
    arguments = (X,) * (3 if name == "MultiheadAttention" else 2 if "Add" in name else 1)
    expected = plain(*arguments)
    late = [
        torch.nn.utils.skip_init(make, *MODULES[name]),
        make(*MODULES[name], device="meta").to_empty(device="cpu"),
        make(*MODULES[name], device="meta"),
    ]
    for layer in late:
        layer.load_state_dict(plain.state_dict(), assign=True)
        assert all(not t.is_meta for t in layer.state_dict().values())
        for mine, other in zip(layer.eval()(*arguments), expected, strict=True):
            torch.testing.assert_close(mine, other)
