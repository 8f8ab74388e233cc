"""Models of torchvision and transformers with dlkit's layers: losses equal to torch's over several steps.

torch draws other masks from its generator: dropout is off where runs are compared with torch, and on where a run is
compared with itself.
"""

import copy

import pytest
import torch
from support.models import MODELS, losses_of, make

import dlkit

CHECKPOINTED = [name for name in MODELS if name in ("gpt2", "bert", "llama")]


def assert_same(found, expected):
    """Compares in float64, since a step of resnet18 on four images multiplies a rounding error by a thousand."""
    assert abs(expected[-1] - expected[0]) > 1e-3 * abs(expected[0]), expected
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def twins(name, p=0.0):
    """(dlkit's, torch's)."""
    model = make(name, p)
    ours = dlkit.fuse(dlkit.replace(copy.deepcopy(model)))
    assert any(type(module).__module__.startswith("dlkit.") for module in ours.modules()) or name == "llama"
    return ours, model


@pytest.mark.parametrize("name", MODELS)
def test_losses(name):
    ours, theirs = twins(name)
    assert_same(losses_of(ours, name), losses_of(theirs, name))
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing(name, reentrant):
    ours, theirs = twins(name)
    expected = losses_of(theirs, name)
    for model in (ours, theirs):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.load_state_dict(make(name, 0.0).state_dict())
        assert_same(losses_of(model, name), expected)


@pytest.mark.parametrize("name", MODELS)
def test_dropout(name):
    """Losses are finite and depend only on the seed; a checkpoint draws the first pass's masks again."""
    model = twins(name, 0.3)[0]
    start = copy.deepcopy(model.state_dict())
    runs = []
    for seed in (1, 1, 2):
        model.load_state_dict(start)
        torch.manual_seed(seed)
        runs.append(losses_of(model, name))
    assert all(torch.tensor(runs[0]).isfinite())
    assert runs[0] == runs[1]
    assert runs[0] != runs[2] or name in ("resnet18", "llama")  # these drop nothing outside attention
    if name in CHECKPOINTED:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.load_state_dict(start)
        torch.manual_seed(1)
        torch.testing.assert_close(losses_of(model, name), runs[0], rtol=1e-12, atol=0)


COMPILED = [("resnet18", "aot_eager"), ("bert", "aot_eager"), ("bert", "inductor")]


@pytest.mark.parametrize(("name", "backend"), [pair for pair in COMPILED if pair[0] in MODELS])
def test_compiled(name, backend):
    ours, theirs = twins(name)
    torch._dynamo.reset()
    assert_same(losses_of(torch.compile(ours, backend=backend), name), losses_of(theirs, name))
