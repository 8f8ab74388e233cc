"""dlkit.fuse on architectures of timm, with dropouts and drop paths of 0."""

import copy
import importlib.util
import statistics

import pytest
import torch
from support.architectures import assert_equal_in_float64, distances, make, results

import dlkit
from dlkit.fusion._layers import NORMS

FUSED = {  # norms that take in an activation, of all
    "resnet18": (17, 20),
    "resnet50": (49, 53),
    "resnet50d": (51, 55),
    "seresnet50": (33, 53),
    "regnety_002": (27, 44),
    "regnetz_005": (44, 65),
    "efficientnet_b0": (33, 49),
    "tf_efficientnetv2_b0": (39, 59),
    "mobilenetv2_050": (35, 52),
    "mobilenetv3_small_050": (23, 34),
    "mobilenetv4_conv_small": (30, 46),
}
ALL = pytest.mark.parametrize("name", FUSED if importlib.util.find_spec("timm") else [])


def evaluated(model, example, dtype):
    with torch.no_grad():
        return [copy.deepcopy(model).eval().to(dtype)(example.to(dtype)).double()]


@pytest.mark.parametrize("replaced", [False, True])
@ALL
def test_float64_is_the_original_s(name, replaced):
    """Outputs, gradients and buffers of a training step, and evaluation; restore() undoes it."""
    model, example = make(name, 0.0)
    for parameter in model.parameters():  # weights of norms are 1 in a new model, or 0
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.0)
    ours, report = copy.deepcopy(model), []
    dlkit.fuse(dlkit.replace(ours) if replaced else ours, report=report)
    norms = [change for change in report if issubclass(change.before, NORMS)]
    fused = sum(change.before is not change.after for change in norms)
    assert (fused, sum(isinstance(module, NORMS) for module in model.modules())) == FUSED[name]
    assert_equal_in_float64(ours, model, example)
    assert distances(evaluated(ours, example, torch.float64), evaluated(model, example, torch.float64))[0] < 1e-12
    assert list(ours.state_dict()) == list(model.state_dict())
    dlkit.restore(ours)
    assert [type(module) for module in ours.modules()] == [type(module) for module in model.modules()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ALL
def test_other_dtypes_are_no_farther_from_float64(name, dtype):
    """By the median of the shares over nine inputs. In one of them an element may stand so near to the kink of a ReLU
    that a rounding decides its gradient: torch's own results by another convolution kernel are then 4,000 times as
    far."""
    model, example = make(name, 0.0)
    ours, generator = dlkit.fuse(copy.deepcopy(model)), torch.Generator().manual_seed(9)
    inputs = [torch.randn(example.shape, generator=generator) for _ in range(9)]
    for run in (results, evaluated):
        shares = []
        for x in inputs:
            exact = run(model, x, torch.float64)
            error, allowed = (distances(run(net, x, dtype), exact)[1] for net in (ours, model))
            shares.append(error / allowed)
        assert statistics.median(shares) < 1.25
