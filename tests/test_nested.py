"""Nested tensors: torch's values where torch's layers accept them, else a message with the remedy."""

import pytest
import torch

import dlkit
import dlkit.functional as F
from dlkit.random import Philox

FEATURES = 8
LAYERS = {
    "LayerNorm": lambda nn: nn.LayerNorm(FEATURES),
    "LayerNorm, no bias": lambda nn: nn.LayerNorm(FEATURES, bias=False),
    "RMSNorm": lambda nn: nn.RMSNorm(FEATURES),
    "BatchNorm1d": lambda nn: nn.BatchNorm1d(FEATURES),
    "BatchNorm1d, evaluation": lambda nn: nn.BatchNorm1d(FEATURES).eval(),
    "GroupNorm": lambda nn: nn.GroupNorm(2, FEATURES),
    "InstanceNorm1d": lambda nn: nn.InstanceNorm1d(FEATURES),
    "Dropout": lambda nn: nn.Dropout(),
    "Dropout, evaluation": lambda nn: nn.Dropout().eval(),
    "Dropout, all": lambda nn: nn.Dropout(1.0),
    "Dropout, in place": lambda nn: nn.Dropout(inplace=True),
    "Dropout1d": lambda nn: nn.Dropout1d(),
    "Dropout2d": lambda nn: nn.Dropout2d(),
    "Dropout3d": lambda nn: nn.Dropout3d(),
    "AlphaDropout": lambda nn: nn.AlphaDropout(),
    "FeatureAlphaDropout": lambda nn: nn.FeatureAlphaDropout(),
}
LAYOUTS = [torch.strided, torch.jagged]
REFUSED = r"nested tensor|NestedTensor|irregular|inplace"  # the last two are torch's own words


def nested(layout, requires_grad=False):
    rows = [torch.linspace(-2, 3, n * FEATURES).sin().view(n, FEATURES) for n in (3, 5)]
    return torch.nested.nested_tensor(rows, layout=layout, requires_grad=requires_grad)


def outcome(layer, x):
    torch.manual_seed(1)
    try:
        results = list(layer(x).unbind())
        if x.requires_grad:
            grads = torch.autograd.grad(sum(y.sin().sum() for y in results), [x, *layer.parameters()])
            results += [t for g in grads for t in (g.unbind() if g.is_nested else [g])]
    except Exception as error:
        return error
    return results


@pytest.mark.filterwarnings("ignore:dropout")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_give_what_torch_s_do_or_say_why_not(name, layout):
    for requires_grad in (False, True):
        theirs, ours = LAYERS[name](torch.nn), dlkit.replace(LAYERS[name](torch.nn))
        wanted, found = (outcome(layer, nested(layout, requires_grad)) for layer in (theirs, ours))
        if isinstance(wanted, Exception):
            if isinstance(found, Exception):
                assert "Internal error" not in str(found) and "Could not run" not in str(found)
                with pytest.raises((RuntimeError, ValueError), match=REFUSED):
                    raise found
        else:
            torch.testing.assert_close(found, wanted)  # the same seed: torch's own mask


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_fused_functions_are_their_formulas(layout):
    x = nested(layout)
    residual = x * 1  # has the same rows
    weight, bias = torch.rand(FEATURES), torch.rand(FEATURES)
    norm = torch.nn.functional.layer_norm
    y, total = F.add_layer_norm(x, residual, (FEATURES,), weight, bias)
    for a, b, c in zip(y.unbind(), total.unbind(), x.unbind(), strict=True):
        torch.testing.assert_close(b, 2 * c)
        torch.testing.assert_close(a, norm(b, (FEATURES,), weight, bias))
    for a, c in zip(F.dropout_add(x, residual, 0.5).unbind(), x.unbind(), strict=True):
        kept = (a - c != 0) | (c == 0)
        torch.testing.assert_close(a, torch.where(kept, 3 * c, c))
    y, total = F.dropout_add_layer_norm(x, residual, (FEATURES,), weight, bias, prenorm=True)
    for a, b in zip(y.unbind(), total.unbind(), strict=True):
        torch.testing.assert_close(a, norm(b, (FEATURES,), weight, bias))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.batch_norm_relu(x, None, None, training=True),
        lambda x: F.drop_path(x, 0.5),
        lambda x: F.dropblock2d(x, 0.5, 2),
        lambda x: F.dropout(x, generator=Philox(1)),
        lambda x: F.dropout(x, generator=torch.Generator()),
    ],
)
def test_what_is_refused(call, layout):
    with pytest.raises((NotImplementedError, ValueError), match=r"nested|layout Jagged|layout Strided"):
        call(nested(layout))


def test_rms_norms_of_strided_nested_tensors_are_refused():
    for call in (
        lambda x: F.rms_norm(x, (FEATURES,)),
        lambda x: F.add_rms_norm(x, x, (FEATURES,)),
        lambda x: F.dropout_add_rms_norm(x, x, (FEATURES,)),
        lambda x: F.bias_gelu_dropout(x, torch.ones(FEATURES)),
    ):
        with pytest.raises(NotImplementedError, match="nested"):
            call(nested(torch.strided))
