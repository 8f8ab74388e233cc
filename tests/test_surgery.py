"""replace() and restore(): what changes, what stays, what is reported."""

import copy

import pytest
import torch

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
    layer = original(6)
    attributes, text = dict(vars(layer)), repr(layer)
    twin = dlkit.replace(layer)
    assert twin is layer and type(layer) is TWINS[original] and isinstance(layer, original)
    assert dict(vars(layer)) == attributes and repr(layer) == text
    assert issubclass(TWINS[original], original) and set(vars(TWINS[original])) - {"__module__", "__doc__"} <= {
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
