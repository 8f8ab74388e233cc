"""Every architecture of support.architectures: the share that dlkit reaches, and results equal to the original's."""

import copy
import importlib.util

import pytest
import torch
from support import architectures
from support.architectures import assert_equal_in_float64, distances, make, results, shares

import dlkit

NAMES = [*architectures.TRANSFORMERS] if importlib.util.find_spec("transformers") else []
NAMES += architectures.TIMM if importlib.util.find_spec("timm") else []
ALL = pytest.mark.parametrize("name", NAMES)


@ALL
def test_what_is_reached(name):
    found = shares(name)
    assert found["replace"][0] >= 0.95 and found["override"][0] >= 0.95
    assert found["override"][1] >= 0.95


@ALL
def test_float64_is_the_original_s(name):
    """Outputs, gradients and buffers of a training step; state_dict and classes stay; restore() undoes it."""
    model, example = make(name, 0.0)
    ours = dlkit.replace(copy.deepcopy(model))
    assert_equal_in_float64(ours, model, example)
    assert list(ours.state_dict()) == list(model.state_dict())
    for one, other in zip(ours.modules(), model.modules(), strict=True):
        assert isinstance(one, type(other))
    dlkit.restore(ours)
    assert [type(module) for module in ours.modules()] == [type(module) for module in model.modules()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if name in architectures.TRANSFORMERS])
def test_other_dtypes_are_no_farther_from_float64(name, dtype):
    model, example = make(name, 0.0)
    ours = dlkit.replace(copy.deepcopy(model))
    with dlkit._trial._Widened():  # also modules that compute in fp32 for any input
        exact = results(model, example, torch.float64)
    error, allowed = (distances(results(net, example, dtype), exact)[1] for net in (ours, model))
    assert error < 1.25 * allowed  # a mean over few tensors
