"""replace() and restore(): changed and unchanged parts of a model, and the report."""

import copy
import inspect
import warnings

import pytest
import torch
from support.training import assert_same_training

import dlkit
from dlkit.surgery import TWINS


class OwnLayerNorm(torch.nn.LayerNorm):
    def forward(self, input):
        return super().forward(input) * 2


def model():
    return torch.nn.Sequential(
        torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Sequential(torch.nn.RMSNorm(8), OwnLayerNorm(8))
    )


def test_replace_and_restore_change_classes_and_nothing_else():
    net = model().double().eval()
    net[1].weight.requires_grad_(False)
    net[1].bias.note = "kept"
    calls = []
    net[1].register_forward_hook(lambda *_: calls.append("hook"))
    before = {name: (p, p.clone()) for name, p in net.state_dict(keep_vars=True).items()}
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = net(x)
    assert dlkit.replace(net) is net
    assert type(net[1]) is dlkit.nn.LayerNorm and type(net[2][0]) is dlkit.nn.RMSNorm
    assert type(net[2][1]) is OwnLayerNorm
    assert torch.allclose(net(x), expected) and calls == ["hook", "hook"] and not net[1].training
    after = net.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is p and torch.equal(p, value) for name, (p, value) in before.items())
    assert not net[1].weight.requires_grad and net[1].bias.note == "kept"
    assert dlkit.restore(net) is net
    assert type(net[1]) is torch.nn.LayerNorm and type(net[2][0]) is torch.nn.RMSNorm


def test_report_names_what_was_changed_and_what_was_left():
    net, report = model(), []
    net[2][0].forward = net[2][0].forward
    dlkit.replace(net, report=report)
    assert [(change.name, change.before is change.after) for change in report] == [
        ("1", False),
        ("2.0", True),
        ("2.1", True),
    ]
    assert str(report[0]) == (
        "1: torch.nn.modules.normalization.LayerNorm, now dlkit.nn.layer_norm.LayerNorm: has a fused twin"
    )
    assert "replaced on the instance" in str(report[1]) and "subclass of torch.nn" in str(report[2])
    again: list = []
    dlkit.replace(net, report=again)
    assert [change.name for change in again] == ["2.0", "2.1"]


@pytest.mark.parametrize("original", TWINS, ids=lambda cls: cls.__name__)
def test_every_twin_is_a_subclass_with_the_same_attributes(original):
    losses = {torch.nn.CrossEntropyLoss: (), getattr(torch.nn, "LinearCrossEntropyLoss", None): (6, 2)}
    arguments = {torch.nn.GroupNorm: (2, 6), torch.nn.MultiheadAttention: (6, 2)} | losses
    dropout = issubclass(original, torch.nn.modules.dropout._DropoutNd)
    layer = original(*arguments.get(original, (0.3,) if dropout else (6,)))
    attributes, text, keys = dict(vars(layer)), repr(layer), list(layer.state_dict())
    twin = dlkit.replace(layer)
    assert twin is layer and type(layer) is TWINS[original]
    assert dict(vars(layer)) == attributes and repr(layer) == f"dlkit.{text}" and list(layer.state_dict()) == keys
    theirs, ours = (list(inspect.signature(cls).parameters) for cls in (original, type(layer)))
    assert theirs == (ours[: len(theirs)] if original in losses else ours) or original is torch.nn.SyncBatchNorm
    if original is torch.nn.SyncBatchNorm:  # DistributedDataParallel would refuse a subclass of it on CPU
        assert list(vars(TWINS[original](6))) == list(attributes)
        return
    assert isinstance(layer, original)
    # Of torch's attributes only forward differs; losses have further arguments.
    changed = {name for name in vars(TWINS[original]) if hasattr(original, name)} - {"__module__", "__doc__"}
    assert changed - ({"__init__"} if original in losses else set()) <= {
        "forward",
        "__annotations__",
        "__static_attributes__",
        "__firstlineno__",
        "__parameters__",
    }


def test_shared_layers_copies_and_optimizers_keep_working():
    norm = torch.nn.LayerNorm(4)
    net = torch.nn.Sequential(norm, torch.nn.Linear(4, 4), norm)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    dlkit.replace(net)
    assert net[0] is net[2]
    clone = copy.deepcopy(net)
    assert type(clone[0]) is dlkit.nn.LayerNorm
    before = norm.weight.clone()
    net(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(norm.weight, before)
    clone.load_state_dict(net.state_dict())


def test_transformer_encoder_gives_the_same_results():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0, norm_first=True)
    net = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 16)
    for mode in (True, False):
        net.train(mode)
        expected = dlkit.restore(net)(x)
        assert torch.allclose(dlkit.replace(net)(x), expected, atol=1e-5)


BATCH_NORMS = {
    "1d": (torch.nn.BatchNorm1d, (6, 4)),
    "1d_sequence": (torch.nn.BatchNorm1d, (3, 4, 5)),
    "2d": (torch.nn.BatchNorm2d, (3, 4, 5, 2)),
    "3d": (torch.nn.BatchNorm3d, (3, 4, 2, 3, 2)),
    "sync": (torch.nn.SyncBatchNorm, (3, 4, 5)),
}
OPTIONS = [
    {},
    {"affine": False},
    {"track_running_stats": False},
    {"momentum": None},
    {"momentum": 0.7, "eps": 0.1},
    {"momentum": None, "track_running_stats": False, "affine": False},
]


def assert_twins_agree(layer, x, modes=(True, True, False)):
    twin = dlkit.replace(copy.deepcopy(layer))
    assert type(twin) is TWINS[type(layer)]
    assert_same_training(layer, twin, x, modes)
    assert [type(buffer) for buffer in twin.buffers()] == [type(buffer) for buffer in layer.buffers()]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls, shape", BATCH_NORMS.values(), ids=BATCH_NORMS)
def test_batch_norm_layers_do_what_torch_does(cls, shape, options):
    assert_twins_agree(cls(4, **options, dtype=torch.float64), torch.randn(shape, dtype=torch.float64) + 2)


def test_batch_norm_layers_obey_attributes_set_later():
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    frozen = torch.nn.BatchNorm2d(4).double()
    frozen.track_running_stats = False  # training leaves the buffers unchanged, evaluation uses them
    assert_twins_agree(frozen, x)
    uncounted = torch.nn.BatchNorm2d(4, momentum=None).double()
    uncounted.num_batches_tracked = None
    assert_twins_agree(uncounted, x)
    emptied = torch.nn.BatchNorm2d(4).double()
    emptied.running_mean = emptied.running_var = None
    assert_twins_agree(emptied, x)


INSTANCE_NORMS = {
    "1d": (torch.nn.InstanceNorm1d, (3, 4, 5)),
    "1d_unbatched": (torch.nn.InstanceNorm1d, (4, 5)),
    "2d": (torch.nn.InstanceNorm2d, (3, 4, 5, 2)),
    "2d_unbatched": (torch.nn.InstanceNorm2d, (4, 5, 2)),
    "3d": (torch.nn.InstanceNorm3d, (3, 4, 2, 3, 2)),
    "3d_unbatched": (torch.nn.InstanceNorm3d, (4, 2, 3, 2)),
}


@pytest.mark.parametrize("options", [{}, {"affine": True}, {"track_running_stats": True}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("cls, shape", INSTANCE_NORMS.values(), ids=INSTANCE_NORMS)
def test_instance_norm_layers_do_what_torch_does(cls, shape, options, monkeypatch):
    calls = []
    own = dlkit.functional.instance_norm
    monkeypatch.setattr(dlkit.functional, "instance_norm", lambda *args: calls.append(1) or own(*args))
    layer, x = cls(4, **options, dtype=torch.float64), torch.randn(shape, dtype=torch.float64) + 2
    assert_twins_agree(layer, x)
    assert len(calls) == 3  # torch's forward() still goes through dlkit's
    twin = dlkit.replace(layer)
    wrong = torch.randn(*shape[:-1], 5, 2, 2, 2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected"):
        twin(wrong)


def test_group_norm_layers_do_what_torch_does():
    for options in ({}, {"affine": False}, {"eps": 0.1}):
        assert_twins_agree(torch.nn.GroupNorm(2, 4, **options).double(), torch.randn(3, 4, 5, dtype=torch.float64))


@pytest.mark.parametrize("number, rank", [(1, 4), (2, 3), (3, 4)])
def test_batch_norm_layers_refuse_what_torch_refuses(number, rank):
    layer = dlkit.replace(getattr(torch.nn, f"BatchNorm{number}d")(4))
    with pytest.raises(ValueError, match="expected"):
        layer(torch.randn(3, *[4] * (rank - 1)))
    single = torch.randn(1, 4, *[1] * (1 if number == 1 else number))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(single)
    assert layer.num_batches_tracked == 0 and not layer.running_mean.any()
    assert layer.eval()(single).shape == single.shape


def test_fused_layers_are_batch_norms():
    x, residual = torch.randn(3, 4, 5, 2), torch.randn(3, 4, 5, 2)
    layer, fused = torch.nn.BatchNorm2d(4), dlkit.nn.BatchNormReLU2d(4)
    assert isinstance(fused, (dlkit.nn.BatchNorm2d, torch.nn.BatchNorm2d)) and repr(fused).startswith(
        "dlkit.BatchNormReLU2d(4,"
    )
    fused.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fused(x), layer(x).relu())
    torch.testing.assert_close(fused(x, residual), (layer(x) + residual).relu())
    torch.testing.assert_close(fused(x, residual=residual[:1, :, :1]), (layer(x) + residual[:1, :, :1]).relu())
    torch.testing.assert_close(list(fused.buffers()), list(layer.buffers()))
    report: list = []
    assert type(dlkit.replace(fused, report=report)) is dlkit.nn.BatchNormReLU2d and not report
    assert type(dlkit.restore(fused, report=report)) is dlkit.nn.BatchNormReLU2d
    assert "cannot be put back" in str(report[0])


@pytest.mark.parametrize("lazy, shape", [("LazyBatchNorm2d", (3, 4, 5, 2)), ("LazyInstanceNorm1d", (3, 4, 5))])
def test_lazy_layers_become_ours_once_they_have_seen_an_input(lazy, shape):
    net, report = torch.nn.Sequential(getattr(torch.nn, lazy)(), torch.nn.LazyLinear(2)), []
    dlkit.replace(net, report=report)
    assert type(net[0]).__name__ == lazy
    assert ["not initialised" in str(change) for change in report] == [True] and report[0].name == "0"
    plain = net[0].cls_to_become
    net(torch.randn(shape))
    assert type(net[0]) is plain
    state = {name: torch.full_like(value, 2) for name, value in net.state_dict().items()}
    assert type(dlkit.replace(net)[0]) is TWINS[plain]
    net.load_state_dict(state)
    if "Instance" in lazy:  # torch itself cannot run one whose state was loaded before it saw an input
        return
    unseen = dlkit.replace(torch.nn.Sequential(getattr(torch.nn, lazy)(), torch.nn.LazyLinear(2)))
    unseen.load_state_dict(net.state_dict())
    torch.testing.assert_close(dlkit.replace(unseen.eval())(torch.ones(shape)), net.eval()(torch.ones(shape)))


def test_conversion_to_synchronised_layers_keeps_everything():
    net = torch.nn.Sequential(
        torch.nn.BatchNorm1d(4, momentum=None, eps=0.1), dlkit.nn.BatchNorm2d(4), torch.nn.SyncBatchNorm(4)
    )
    net.append(dlkit.nn.BatchNormReLU3d(4, affine=False)).append(torch.nn.InstanceNorm1d(4))
    net[1].eval()
    calls = []
    net[1].register_forward_hook(lambda *_: calls.append("hook"))
    state, layers, group = net.state_dict(keep_vars=True), list(net), object()
    assert dlkit.nn.SyncBatchNorm.convert_sync_batchnorm(net, group) is net
    sync, sync_relu = dlkit.nn.SyncBatchNorm, dlkit.nn.SyncBatchNormReLU
    assert [type(layer) for layer in net] == [sync, sync, sync, sync_relu, torch.nn.InstanceNorm1d]
    assert all(after is before for after, before in zip(net, layers, strict=True))
    assert all(layer.process_group is group for layer in net[:4]) and not net[1].training and net[0].momentum is None
    after = net.state_dict(keep_vars=True)
    assert list(after) == list(state) and all(after[name] is state[name] for name in state)
    dlkit.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert all(layer.process_group is None for layer in net[:4])
    net[1](torch.randn(2, 4, 3, 3))
    assert calls == ["hook"]
    assert type(sync.convert_sync_batchnorm(torch.nn.BatchNorm2d(3))) is sync


def test_conversion_warns_of_layers_that_it_leaves():
    class Own(torch.nn.BatchNorm2d):
        pass

    for layer in (Own(4), torch.nn.LazyBatchNorm2d()):
        net, cls = torch.nn.Sequential(layer), type(layer)
        with pytest.warns(
            UserWarning, match=rf"0 \(.*{cls.__qualname__}\) is not exactly a BatchNorm layer and is not synchronised"
        ):
            dlkit.nn.SyncBatchNorm.convert_sync_batchnorm(net)
        assert type(net[0]) is cls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dlkit.nn.SyncBatchNorm.convert_sync_batchnorm(
            torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.GroupNorm(1, 3))
        )
