"""Ten architectures of tests/integration/test_architectures.py, where their libraries are installed."""

import copy

import pytest
from support.architectures import TIMM, assert_equal_in_float64, make, shares

import dlkit

NAMES = ["llama", "gemma2", "t5", "cohere", "bart", "convnext", "resnet18", "vit_tiny_patch16_224", "regnetx_002"]
NAMES += ["lcnet_050"]


@pytest.fixture(params=NAMES)
def name(request):
    pytest.importorskip("timm" if request.param in TIMM else "transformers")
    return request.param


@pytest.mark.filterwarnings("ignore")
def test_architectures(name):
    found = shares(name)
    assert found["override"] == (1, 1) and found["replace"][0] == 1
    model, example = make(name, 0.0)
    ours = dlkit.replace(copy.deepcopy(model))
    assert_equal_in_float64(ours, model, example)
