"""Numbers as arguments: tables of their types and values, compared with torch."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as native

import dlkit
import dlkit.functional as fused

pytestmark = pytest.mark.sanitize

X = torch.linspace(-2, 3, 120).sin().view(4, 6, 5) * torch.arange(1.0, 6)
PLANES = torch.ones(2, 3, 6, 6)

NUMBERS = {
    "NumPy fp32": np.float32,
    "NumPy fp64": np.float64,
    "NumPy fp16": np.float16,
    "NumPy int": lambda v: np.int64(round(v)),
    "tensor": torch.tensor,
    "fp64 tensor": lambda v: torch.tensor(v, dtype=torch.float64),
    "integer tensor": lambda v: torch.tensor(round(v)),
    "bool": lambda v: bool(round(v)),
    "int": round,
    "string": str,
    "complex": complex,
    "list": lambda v: [v],
    "None": lambda v: None,
}
DROPOUTS = ["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"]
ONES = torch.ones(6)


def statistics():
    return torch.zeros(6), torch.ones(6)


TAKES_NUMBERS = {
    **{f"{n}, training": lambda f, v, n=n: getattr(f, n)(X, v, True) for n in DROPOUTS},
    **{f"{n}, evaluation": lambda f, v, n=n: getattr(f, n)(X, v, False) for n in DROPOUTS},
    "layer_norm eps": lambda f, v: f.layer_norm(X, (5,), None, None, v),
    "rms_norm eps": lambda f, v: f.rms_norm(X, (5,), None, v),
    "group_norm eps": lambda f, v: f.group_norm(X, 2, ONES, ONES, v),
    "batch_norm eps": lambda f, v: f.batch_norm(X, None, None, ONES, ONES, True, 0.1, v),
    "batch_norm eps, evaluation": lambda f, v: f.batch_norm(X, *statistics(), ONES, ONES, False, 0.1, v),
    "batch_norm momentum": lambda f, v: f.batch_norm(X, *statistics(), None, None, True, v),
    "batch_norm momentum, no statistics": lambda f, v: f.batch_norm(X, None, None, None, None, True, v),
    "instance_norm eps": lambda f, v: f.instance_norm(X, None, None, ONES, ONES, True, 0.1, v),
    "instance_norm momentum": lambda f, v: f.instance_norm(X, *statistics(), None, None, True, v),
}


def outcome(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:
        return type(error)


def draws_nothing(p):
    return p is None or float(p) in (0.0, 1.0)


@pytest.mark.filterwarnings("ignore:dropout")
@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("where", TAKES_NUMBERS)
def test_kinds_of_numbers_are_torch_s(where, kind):
    value = NUMBERS[kind](0.75)
    mine, other = (outcome(TAKES_NUMBERS[where], f, value) for f in (fused, native))
    assert isinstance(mine, torch.Tensor) == isinstance(other, torch.Tensor), (mine, other)
    if isinstance(other, type):
        assert mine is other
    elif "dropout" not in where:
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    "number", [np.float32(0.5), torch.tensor(0.5), np.float64(0.5)], ids=["NumPy", "tensor", "fp64"]
)
def test_layers_and_fused_functions_take_any_number(number):
    stream = dlkit.random.Philox(1)

    def masks(p):
        stream.manual_seed(1)
        with dlkit.random.use(stream):
            return [
                *(
                    getattr(dlkit.nn, n)(p)(X)
                    for n in ("Dropout", "Dropout1d", "AlphaDropout", "FeatureAlphaDropout", "DropPath")
                ),
                dlkit.nn.DropBlock2d(p, 2)(PLANES),
                dlkit.nn.DropoutAdd(p)(X, X),
                dlkit.nn.DropoutAddLayerNorm(5, p)(X, X),
                dlkit.nn.DropoutAddRMSNorm(5, p)(X, X),
                fused.bias_gelu_dropout(X, torch.ones(5), p),
                fused.bias_relu_dropout(X, torch.ones(5), p),
            ]

    for mine, other in zip(masks(number), masks(0.5), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.filterwarnings("ignore:dropout")
@pytest.mark.parametrize("value", [-0.5, -1e-9, 0.0, 1e-5, 1.0, 1.5, math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("where", TAKES_NUMBERS)
def test_ranges_of_numbers_are_torch_s(where, value):
    mine, other = (outcome(TAKES_NUMBERS[where], f, value) for f in (fused, native))
    if isinstance(other, type) or isinstance(mine, type):
        assert mine is other, (mine, other)
    elif "dropout" not in where or draws_nothing(value):
        # A negative eps cancels part of the variance.
        torch.testing.assert_close(mine, other, equal_nan=True, rtol=1e-3 if value < 0 else 1e-5, atol=1e-4)


FLAGS = {
    **{n: lambda f, v, n=n: getattr(f, n)(X, 0.0, v) for n in DROPOUTS},
    "batch_norm": lambda f, v: f.batch_norm(X, *statistics(), ONES, ONES, v),
    "instance_norm": lambda f, v: f.instance_norm(X, *statistics(), ONES, ONES, v),
}


@pytest.mark.filterwarnings("ignore:dropout")
@pytest.mark.parametrize("value", [True, False, 1, 0, None, 1.0, "yes", [], torch.tensor(True), np.True_], ids=repr)
@pytest.mark.parametrize("where", FLAGS)
def test_flags_are_torch_s(where, value):
    mine, other = (outcome(FLAGS[where], f, value) for f in (fused, native))
    if isinstance(mine, type) or isinstance(other, type):
        assert mine is other, (mine, other)
    else:
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_fused_functions_and_layers_take_no_other_flags(value):
    rows = (5,)
    for call in (
        lambda: fused.drop_path(X, 0.5, value),
        lambda: fused.dropblock2d(PLANES, 0.5, 2, value),
        lambda: fused.dropout_add(X, X, 0.5, value),
        lambda: fused.bias_gelu_dropout(X, None, 0.5, value),
        lambda: fused.dropout_add_layer_norm(X, X, rows, training=value),
        lambda: fused.dropout_add_rms_norm(X, X, rows, training=value),
        lambda: fused.batch_norm_relu(X, None, None, training=value),
    ):
        with pytest.raises(TypeError, match="training"):
            call()
    for name, arguments in (("InstanceNorm1d", (6, 1e-5, 0.1, True, True)), ("BatchNorm1d", (6,)), ("Dropout", ())):
        results = []
        for nn in (dlkit.nn, torch.nn):
            layer = getattr(nn, name)(*arguments)
            layer.training = value
            results.append(outcome(layer, X))
        mine, other = results
        assert mine is other if isinstance(other, type) else torch.allclose(mine, other, atol=1e-5), name


@pytest.mark.parametrize("value", [2, 2.0, True, None, "2", np.int64(2), torch.tensor(2)], ids=repr)
def test_numbers_of_groups_are_torch_s(value):
    mine, other = (outcome(lambda f: f.group_norm(X, value), f) for f in (fused, native))
    if isinstance(mine, type) or isinstance(other, type):
        assert mine is other, (mine, other)
    else:
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.5, math.nan, math.inf])
def test_running_statistics_with_odd_momenta_are_torch_s(value):
    for name in ("batch_norm", "instance_norm"):
        mine, other = statistics(), statistics()
        getattr(fused, name)(X, *mine, None, None, True, value)
        getattr(native, name)(X, *other, None, None, True, value)
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_inference_tensors():
    """They are changed in place only inside inference mode; running statistics and inputs behave as in torch's ops."""
    with torch.inference_mode():
        x, planes = torch.ones(4, 6, 5), torch.ones(2, 3, 6, 6)
        theirs = torch.ones(4, 6, 5)  # torch writes before it raises
        fused.dropout(torch.ones(9), inplace=True)
        fused.dropblock2d(torch.ones(2, 3, 6, 6), 0.5, 2, inplace=True)
    for name in (*DROPOUTS, "drop_path"):
        with pytest.raises(RuntimeError, match="inference"):
            getattr(fused, name)(x, 0.5, True, True)
        if name != "drop_path":
            with pytest.raises(RuntimeError, match=r"[iI]nference"):
                getattr(native, name)(theirs, 0.5, True, True)
        assert getattr(fused, name)(x, 0.5, True).shape == x.shape
        assert getattr(fused, name)(x, 0.0, True, True) is x
    with pytest.raises(RuntimeError, match="inference"):
        fused.dropblock2d(planes, 0.5, 2, inplace=True)
    assert torch.equal(x, torch.ones(4, 6, 5)) and torch.equal(planes, torch.ones(2, 3, 6, 6))
