"""Opacus knows dlkit's layers: it refuses those that cannot be trained privately, and per-sample gradients are
torch's."""

import copy

import pytest
import torch
from torch import nn

import dlkit

opacus = pytest.importorskip("opacus", reason="opacus is not installed (make test-integration)")
Validator = opacus.validators.ModuleValidator

REFUSED = [
    nn.BatchNorm1d(4),
    nn.BatchNorm2d(4),
    nn.BatchNorm2d(4, track_running_stats=False),  # has no buffers by which opacus would find it
    nn.SyncBatchNorm(4),
    nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    nn.MultiheadAttention(4, 2),
]


@pytest.mark.parametrize("layer", REFUSED, ids=str)
def test_layers_are_refused_and_mended_as_torch_s(layer):
    model = nn.Sequential(copy.deepcopy(layer))
    ours = dlkit.replace(copy.deepcopy(model))
    errors, expected = (Validator.validate(net) for net in (ours, model))
    assert [str(error) for error in errors] == [str(error) for error in expected] and errors
    assert str(Validator.fix(ours)) == str(Validator.fix(model))


def test_a_fused_layer_is_refused_and_not_mended():
    model = dlkit.fuse(nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()))
    assert not Validator.is_valid(model)
    with pytest.raises(TypeError, match=r"dlkit\.restore"):
        Validator.fix(model)


def test_gradients_of_samples():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True), nn.LayerNorm(3), nn.RMSNorm(3)
    ).double()
    x, results = torch.randn(5, 4, 5, 5, dtype=torch.float64), []
    for net in (model, dlkit.replace(copy.deepcopy(model))):
        opacus.GradSampleModule(net)(x).sin().sum().backward()
        results.append([parameter.grad_sample for parameter in net.parameters()])
    torch.testing.assert_close(*results)
