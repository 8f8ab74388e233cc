"""report(): norms and dropouts are found with their places, whoever computes them."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dlkit


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.act = nn.LayerNorm(8), nn.Dropout(0.5), nn.ReLU()
        self.loss = nn.MSELoss()

    def forward(self, x, scale=1.0):
        y = self.act(self.drop(self.norm(x))) * scale
        y = F.dropout(y, 0.5, self.training)
        y = F.dropout(y, 0.0, self.training)
        y = F.rms_norm(y, (8,))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)  # 4 * 8 elements, as in every other
        return F.scaled_dot_product_attention(y, y, y, dropout_p=0.5 * self.training)


X = torch.randn(4, 8)
OVERRIDE = "dlkit.override() serves functions of torch"


def rows(report):
    return {(row.kind, row.what): (row.reached, row.times, row.elements, row.reason) for row in report.rows}


def test_layers_and_functions_are_seen_with_an_example():
    net = Net()
    seen = rows(dlkit.report(net, X))
    layer = "dlkit.replace() serves it, and was not called"
    assert seen == {
        ("norm", "LayerNorm"): (False, 1, 32, layer),
        ("dropout", "Dropout"): (False, 1, 32, layer),
        ("dropout", "F.dropout in Net.forward"): (False, 1, 32, OVERRIDE),
        ("norm", "F.rms_norm in Net.forward"): (False, 1, 32, OVERRIDE),
        ("norm", "code in Net.forward"): (False, 1, 32, "it is written in elementary ops"),
        ("dropout", "F.scaled_dot_product_attention in Net.forward"): (False, 1, 16, OVERRIDE),
        ("activation", "ReLU"): (False, 1, 0, "dlkit has no kernel for it alone"),
        ("loss", "MSELoss"): (False, 1, 0, "dlkit has no kernel for it alone"),
    }
    dlkit.replace(net)
    with dlkit.override():
        report = dlkit.report(net, {"x": X, "scale": 2.0})
    seen = rows(report)
    assert seen["norm", "LayerNorm"] == (True, 1, 32, "dlkit.nn.layer_norm.LayerNorm")
    assert {key for key, row in seen.items() if not row[0] and key[0] in ("norm", "dropout")} == {
        ("norm", "code in Net.forward")
    }
    assert report.share("dropout") == 1 and report.share("norm") == pytest.approx(2 / 3)
    assert (
        str(report).splitlines()[-1]
        == report.summary()
        == (
            "reached 2 of 3 norms (67% of their elements), 3 of 3 dropouts (100% of their elements): "
            "left code in Net.forward"
        )
    )


def test_layers_are_counted_without_an_example():
    net = nn.Sequential(Net(), nn.BatchNorm1d(8), nn.MultiheadAttention(8, 2, dropout=0.1))
    report = dlkit.report(net)
    assert report.summary() == (
        "reached 0 of 2 norms, 0 of 2 dropouts: left LayerNorm, Dropout, BatchNorm1d, MultiheadAttention"
    )
    dlkit.replace(net)
    assert dlkit.report(net).summary() == "reached 2 of 2 norms, 2 of 2 dropouts"
    assert dlkit.report(nn.Linear(2, 2)).share("norm") == 1.0


@pytest.mark.parametrize("example", [X, (X, 2.0), {"x": X}], ids=["tensor", "tuple", "dict"])
def test_the_model_is_left_as_it_was(example):
    net = nn.Sequential() if example is X else Net()
    for module in (nn.BatchNorm1d(8), Net()):
        if example is X:
            net.append(module)
    state, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    classes = [type(module) for module in net.modules()]
    dlkit.report(net, example)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and [type(m) for m in net.modules()] == classes


class HandWritten(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def layer_norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()


def by_deviation(x):
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)


def by_sum(x):
    return x * (x.pow(2).sum(-1, keepdim=True) / 8 + 1e-5).pow(-0.5)


def masks(x):
    return x * (torch.rand(x.shape[0], 1) + 0.5).floor() / 0.5


def compared(x):
    return x * (torch.rand_like(x) > 0.5).to(x.dtype)


WRITTEN = {"norm": [layer_norm, by_deviation, by_sum], "dropout": [masks, compared]}


@pytest.mark.parametrize(
    "kind, function", [(k, f) for k, fs in WRITTEN.items() for f in fs], ids=lambda v: getattr(v, "__name__", v)
)
def test_what_is_written_in_elementary_ops_is_seen(kind, function):
    report = dlkit.report(HandWritten(function), X)
    assert [(row.kind, row.elements, row.reached) for row in report.rows] == [(kind, 32, False)]


def length(x):
    return x / x.norm(dim=-1, keepdim=True)


def weighted(x):
    return x.softmax(-1) * x.mean()


@pytest.mark.parametrize("function", [length, weighted, torch.exp], ids=lambda function: function.__name__)
def test_what_is_neither_is_not(function):
    assert dlkit.report(HandWritten(function), X).rows == []


@pytest.mark.slow
def test_command(tmp_path):
    (tmp_path / "factories.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    return nn.Sequential(nn.LayerNorm(8), nn.Dropout(0.5)), torch.randn(4, 8)\n"
    )
    command = [sys.executable, "-m", "dlkit", "report", "factories:make"]
    for options, last in (
        ([], "reached 1 of 1 norms (100% of their elements), 1 of 1 dropouts (100% of their elements)"),
        (
            ["--as-is"],
            "reached 0 of 1 norms (0% of their elements), 0 of 1 dropouts (0% of their elements): "
            "left LayerNorm, Dropout",
        ),
        (
            ["--as-is", "--override"],
            "reached 1 of 1 norms (100% of their elements), 1 of 1 dropouts (100% of their elements)",
        ),
    ):
        done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == last
    assert subprocess.run([*command[:-1], "factories"], cwd=tmp_path, capture_output=True).returncode == 1
