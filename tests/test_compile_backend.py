"""torch.compile's backends "dlkit" and "dlkit_inductor": what they replace, what they leave, and equal results."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support import layers
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import dlkit
from dlkit.dynamo import Fused, fuse_graph

C = 16


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Of(nn.Module):
    """A forward() with some parameters of C elements, a BatchNorm's buffers and a matrix."""

    def __init__(self, function, p=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name in ("w", "b", "w2", "b2"):
            setattr(self, name, nn.Parameter(torch.rand(C, generator=generator, dtype=torch.float64) + 0.5))
        self.matrix = nn.Parameter(torch.randn(C, C, generator=generator, dtype=torch.float64) / 4)
        self.register_buffer("mean", torch.zeros(C, dtype=torch.float64))
        self.register_buffer("var", torch.ones(C, dtype=torch.float64))
        self.function, self.p = function, p

    def forward(self, *inputs):
        return self.function(self, *inputs)


def run(model, inputs, backend=None, **options):
    """Outputs, gradients and buffers, and what was fused."""
    model, fused = copy.deepcopy(model), []
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    call = model
    if backend:
        known = {"report": fused} if backend.startswith("dlkit") else None
        call = torch.compile(model, backend=backend, fullgraph=True, options=known, **options)
    torch.manual_seed(11)
    outputs = call(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = [y.detach().clone() for y in outputs]
    wanted = [y for y in outputs if y.requires_grad]
    if wanted:
        weights = [torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype) for y in wanted]
        sum((y * w).sum() for y, w in zip(wanted, weights, strict=True)).backward()
    leaves = [*inputs, *model.parameters()]
    found += [torch.zeros(()) if leaf.grad is None else leaf.grad for leaf in leaves]
    return found + [buffer.clone() for buffer in model.buffers()], fused


def assert_same(model, inputs, backend="dlkit", **options):
    """Equal to eager within rounding of float64. Returns dlkit's ops, in the order of the graph."""
    expected, _ = run(model, inputs)
    found, fused = run(model, inputs, backend, **options)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    return [entry.op for entry in fused]


def data(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def llama(x, w, eps=1e-6, wide=torch.float32):
    h = x.to(wide)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return w * h.to(x.dtype)


def llama_other_order(x, w, eps=1e-6, wide=torch.float32):
    h = x.to(wide)
    variance = torch.mean(h * h, dim=-1, keepdim=True)
    return (torch.rsqrt(eps + variance) * h).type_as(x) * w


def gemma(x, w, eps=1e-6, wide=torch.float32):
    h = x.to(wide)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * (1.0 + w.to(wide))).type_as(x)


def t5(x, w, eps=1e-6, wide=torch.float32):
    h = x * torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + eps)
    return w * (h.to(w.dtype) if w.dtype in (torch.float16, torch.bfloat16) else h)


def cohere(x, w, eps=1e-6, wide=torch.float32):
    h = x.to(wide)
    mean = h.mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt((h - mean).pow(2).mean(-1, keepdim=True) + eps)
    return (w.to(wide) * h).to(x.dtype)


def divided(x, w, eps=1e-6, wide=torch.float32):
    return w * (x.to(wide) / torch.sqrt((x.to(wide) ** 2).mean((-1,), True) + eps)).to(x.dtype)


ELEMENTARY = [llama, llama_other_order, gemma, t5, cohere, divided]


def pre_norm(m, x):
    for w, b in ((m.w, m.b), (m.w2, m.b2)):
        h = F.layer_norm(x, (C,), w, b)
        x = x + F.dropout(F.gelu(h @ m.matrix), m.p, m.training)
    return F.layer_norm(x, (C,), m.w, m.b), x


def post_norm(m, x):
    for w, b in ((m.w, m.b), (m.w2, m.b2)):
        x = F.layer_norm(F.dropout(F.relu(x @ m.matrix), m.p, m.training) + x, (C,), w, b)
    return x


def rms_blocks(m, x):
    for w in (m.w, m.w2):
        x = x + F.silu(F.rms_norm(x, (C,), w, 1e-6) @ m.matrix)
    return F.rms_norm(x, (C,), m.w)


def residual_in_place(m, x):
    y = F.batch_norm(x @ m.matrix, m.mean, m.var, m.w, m.b, m.training)
    y += x
    return F.relu(y, inplace=True)


def layer_scale(m, x):
    """timm's LayerScale, in place and not; dinov2's; the gamma of ConvNeXt."""
    x = x + (F.layer_norm(x, (C,), m.w, m.b) @ m.matrix).mul_(m.w2)
    x = m.w2 * (F.layer_norm(x, (C,), m.w, m.b) @ m.matrix) + x
    x = x + (F.layer_norm(x, (C,), m.w, m.b) @ m.matrix) * m.b2
    x = images(x)
    x = x.sin().mul(m.w2.reshape(1, -1, 1, 1)) + x
    return layer_norm_2d(m, x)


def images(x):
    """[2, C, H, 3] with the channels last in memory."""
    return x.view(2, -1, 3, C).permute(0, 3, 1, 2)


def layer_norm_2d(m, x):
    return F.layer_norm(x.permute(0, 2, 3, 1), (C,), m.w, m.b).permute(0, 3, 1, 2)


def channels_last_blocks(m, x):
    x = images(x)
    for _ in range(2):
        x = x + layer_norm_2d(m, x).tanh()
    return layer_norm_2d(m, x), x


def channels_last_in_place(m, x):
    x = images(x)
    y = x.sin()
    y += x
    y = layer_norm_2d(m, y)
    y = y.cos() + x
    return F.layer_norm(y.movedim(1, -1), (C,), m.w, m.b), y.square()


def drop_path_timm(m, x, p=0.25):
    keep = 1 - p
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
    mask.div_(keep)
    return x * mask


def drop_path_transformers(m, x, p=0.25):
    keep = 1 - p
    mask = keep + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
    mask.floor_()
    return x.div(keep) * mask


def new_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


CASES = {
    "pre-norm": (pre_norm, ["layer_norm", "add_layer_norm", "add_layer_norm"]),
    "post-norm": (post_norm, ["add_layer_norm", "add_layer_norm"]),
    "rms_norm": (rms_blocks, ["rms_norm", "add_rms_norm", "add_rms_norm"]),
    "batch_norm": (lambda m, x: F.batch_norm(x, m.mean, m.var, m.w, m.b, m.training), ["batch_norm"]),
    "batch_norm, relu": (
        lambda m, x: torch.relu(F.batch_norm(x, m.mean, m.var, m.w, m.b, m.training, 0.2)),
        ["batch_norm"],
    ),
    "batch_norm, add, relu": (
        lambda m, x: F.relu(x.tanh() + F.batch_norm(x, m.mean, m.var, m.w, m.b, m.training)),
        ["batch_norm"],
    ),
    "in place": (residual_in_place, ["batch_norm"]),
    "group_norm": (lambda m, x: F.group_norm(x, 4, m.w, m.b), ["group_norm"]),
    "instance_norm": (lambda m, x: F.instance_norm(x.T.reshape(1, C, -1), weight=m.w, bias=m.b), ["instance_norm"]),
    "bias, gelu": (lambda m, x: F.gelu(x @ m.matrix + m.b), ["bias_act_dropout"]),
    "bias, tanh": (lambda m, x: F.gelu(m.b + x @ m.matrix, approximate="tanh"), ["bias_act_dropout"]),
    "bias, relu": (lambda m, x: F.relu(x @ m.matrix + m.b), ["bias_act_dropout"]),
    "gelu in elementary ops": (lambda m, x: new_gelu(x @ m.matrix), ["bias_act_dropout"]),
    "gelu": (lambda m, x: F.gelu(x @ m.matrix), []),
    "cast that is used too": (lambda m, x: cast_used_too(m, x), ["add_layer_norm"]),
    "layer scale": (layer_scale, ["layer_norm", *["add_layer_norm"] * 3]),
    "layer scale, rms_norm": (
        lambda m, x: F.rms_norm(x + m.w2 * x.sin(), (C,), m.w),
        ["add_rms_norm"],
    ),
    "channels last": (channels_last_blocks, ["layer_norm", *["add_layer_norm"] * 2]),
    "channels last, in place": (channels_last_in_place, ["add_layer_norm"] * 2),
    "channels last, rms_norm": (
        lambda m, x: F.rms_norm((images(x) + images(x).sin()).permute((0, 2, 3, 1)), (C,), m.w),
        ["add_rms_norm"],
    ),
    "transposed": (
        lambda m, x: F.layer_norm(torch.transpose((x + x.sin()).view(6, C).T + x.cos().T, 0, 1), (C,), m.w, m.b),
        ["add_layer_norm"],
    ),
    "view before the norm": (lambda m, x: swin(m, x), ["add_layer_norm"]),
    "cast before the norm": (
        lambda m, x: F.layer_norm((x + x.sin()).to(x.dtype), (C,), m.w, m.b),
        ["add_layer_norm"],
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", CASES)
def test_patterns(name, training):
    function, expected = CASES[name]
    assert assert_same(Of(function).train(training), [data(6, C)]) == expected


@pytest.mark.parametrize("norm", ELEMENTARY, ids=lambda norm: norm.__name__)
def test_elementary_norms(norm):
    """In float64 throughout, with the residual add before."""

    def blocks(m, x):
        for w in (m.w, m.w2):
            x = x + norm(x, w, wide=torch.float64).tanh()
        return norm(x, m.w, wide=torch.float64), x

    ops = assert_same(Of(blocks), [data(2, 5, C)])
    kind = "layer_norm" if norm is cohere else "rms_norm"
    assert ops == [kind, f"add_{kind}", f"add_{kind}"]


@pytest.mark.parametrize("weight", [torch.float32, None], ids=["fp32 weight", "same weight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("norm", ELEMENTARY, ids=lambda norm: norm.__name__)
def test_elementary_norms_round_as_they_are_written(norm, dtype, weight):
    def block(m, x, w, r):
        return norm(x + r, w, 1e-6)

    inputs = [data(64, C, dtype=dtype), data(C, dtype=weight or dtype, seed=1), data(64, C, dtype=dtype, seed=2)]
    exact = norm(inputs[0].double() + inputs[2].double(), inputs[1].double(), wide=torch.float64)
    expected, _ = run(Of(block), inputs)
    found, fused = run(Of(block), inputs, "dlkit")
    assert [entry.op for entry in fused] in (["add_rms_norm"], ["add_layer_norm"]) or found[0].dtype != dtype
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    error, allowed = ((ys[0].double() - exact).abs().max() for ys in (found, expected))
    assert error <= allowed + torch.finfo(found[0].dtype).eps * exact.abs().max()
    if found[0].dtype != torch.float32:  # the order of rounding decides most of the last bits
        assert (found[0] == expected[0]).double().mean() > 0.99
    for one, other in zip(found[1:], expected[1:], strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(one, other, rtol=8 * eps, atol=16 * eps * float(other.abs().max() + 1))


def test_weights_are_taken_in_where_nothing_is_rounded():
    _, fused = run(Of(lambda m, x: llama(x, m.w.float())), [data(4, C, dtype=torch.float32)], "dlkit")
    assert [entry.op for entry in fused] == ["rms_norm"]
    nodes = []

    def backend(module, inputs):
        fuse_graph(module)
        nodes.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    w = data(C, dtype=torch.float32)
    torch.compile(lambda x: llama(x, w), backend=backend)(data(4, C, dtype=torch.float32))
    assert nodes == ["dlkit.rms_norm.default"]


def test_float64_that_is_computed_in_fp32_is_left():
    assert assert_same(Of(lambda m, x: llama(x, m.w)), [data(4, C)]) == []


def narrowed(m, x):
    y = x + x.sin()
    return F.layer_norm(y, (C,), m.w, m.b), y.add_(1.0)


def written_between(m, x):
    y = x.cos()
    z = x + y
    y.mul_(2)
    return F.layer_norm(z, (C,), m.w, m.b) * y


def written_before_the_norm(m, x):
    z = x + x.cos()
    z.mul_(2)
    return F.layer_norm(z, (C,), m.w, m.b)


def statistics_read_between(m, x):
    y = F.batch_norm(x, m.mean, m.var, m.w, m.b, True)
    seen = m.mean.clone()
    return torch.relu(y), seen


def seen_elsewhere(m, x):
    y = x.cos()
    view = y.view(-1)
    y += x
    return F.layer_norm(y, (C,), m.w, m.b), view


def cast_used_too(m, x):
    total = x + x.cos()
    same = total.to(x.dtype)
    return F.layer_norm(same, (C,), m.w, m.b), same * 2


def widened_before_a_write(m, x):
    x = x.cos()
    wide = x.float()
    x.add_(1)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype), wide.sum(), x


def swin(m, x):
    x = x.view(2, 3, C) + x.view(2, 3, C).cos()
    x = x.reshape(6, -1)
    x = x + F.layer_norm(x, (C,), m.w, m.b)
    return x.view(3, 2, C).permute(1, 0, 2)


def channels_first_in_memory(m, x):
    x = images(x).contiguous()
    return layer_norm_2d(m, x + x.sin())


def one_term_channels_first(m, x):
    x = images(x)
    return layer_norm_2d(m, x + x.contiguous().sin()), layer_norm_2d(m, x.contiguous().sin() + x)


def permuted_sum_written_to(m, x):
    x = images(x)
    total = x + x.sin()
    view = total.permute(0, 2, 3, 1)
    total.mul_(2)
    return F.layer_norm(view, (C,), m.w, m.b), total


LEFT = {
    "channels first in memory": (channels_first_in_memory, ["layer_norm"]),
    "one term with channels first": (one_term_channels_first, ["layer_norm", "layer_norm"]),
    "a permuted sum that is written to": (permuted_sum_written_to, ["layer_norm"]),
    "another permutation": (
        lambda m, x: F.layer_norm((x.view(4, 4, 6) + x.view(4, 4, 6).sin()).permute(1, 0, 2), (6,)),
        ["layer_norm"],
    ),
    "written between": (written_between, ["layer_norm"]),
    "written before the norm": (written_before_the_norm, ["layer_norm"]),
    "statistics read between": (statistics_read_between, ["batch_norm"]),
    "seen elsewhere": (seen_elsewhere, ["layer_norm"]),
    "gradients off between": (
        lambda m, x: _with_no_grad(x + x.cos(), lambda y: F.layer_norm(y, (C,), m.w, m.b)),
        ["layer_norm"],
    ),
    "a view that moves": (
        lambda m, x: F.layer_norm((x.T + x.T.cos()).reshape(6, C), (C,), m.w, m.b),
        ["layer_norm"],
    ),
    "a view of other rows": (lambda m, x: F.layer_norm((x + x.cos()).view(12, 8), (8,)), ["layer_norm"]),
    "broadcast": (lambda m, x: F.layer_norm(x + m.b2, (C,), m.w, m.b), ["layer_norm"]),
    "alpha": (lambda m, x: F.layer_norm(torch.add(x, x.cos(), alpha=2), (C,), m.w, m.b), ["layer_norm"]),
    "another dimension": (lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6)), []),
    "no mean": (lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)), []),
    "another power": (lambda m, x: m.w * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6)), []),
    "another tensor": (lambda m, x: m.w * (x.cos() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), []),
    "unbiased variance": (
        lambda m, x: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6),
        [],
    ),
    "another gelu": (lambda m, x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3.0)))), []),
    "deviation used": (
        lambda m, x: (x * (r := torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), r),
        [],
    ),
}


def _with_no_grad(y, function):
    with torch.no_grad():
        return y, function(y)


@pytest.mark.parametrize("name", LEFT)
def test_left(name):
    function, expected = LEFT[name]
    assert assert_same(Of(function), [data(6, C)]) == expected


def test_a_sum_that_is_written_to_later():
    """In evaluation: with gradients torch refuses it itself."""
    with torch.no_grad():
        assert assert_same(Of(narrowed), [data(6, C)]) == ["add_layer_norm"]


def test_a_write_after_the_cast():
    """The norm is of what was there before it."""
    inputs = [data(6, C, dtype=torch.bfloat16)]
    expected, found = run(Of(widened_before_a_write), inputs)[0], run(Of(widened_before_a_write), inputs, "dlkit")[0]
    torch.testing.assert_close(found[:3], expected[:3])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction, smoothing):
    target = torch.tensor([0, 3, -100, 15, 2, 2])
    model = Of(lambda m, x: F.cross_entropy(x, target, m.w.detach(), reduction=reduction, label_smoothing=smoothing))
    assert assert_same(model, [data(6, C)]) == ["cross_entropy"]


# Dropout: the masks are dlkit's, so dlkit's own functions on the same state are what to compare with

D = dlkit.functional


def pre_norm_of_dlkit(m, x):
    h = D.layer_norm(x, (C,), m.w, m.b)
    for w, b in ((m.w2, m.b2), (m.w, m.b)):
        h, x = D.dropout_add_layer_norm(F.gelu(h @ m.matrix), x, (C,), w, b, m.p, prenorm=True)
    return h, x


def post_norm_of_dlkit(m, x):
    for w, b in ((m.w, m.b), (m.w2, m.b2)):
        x = D.dropout_add_layer_norm(F.relu(x @ m.matrix), x, (C,), w, b, m.p)
    return x


def image(x):
    return x.view(1, 6, 4, 4)


DROPOUTS = {
    "pre-norm": (pre_norm, pre_norm_of_dlkit, ["layer_norm", *["dropout_add_layer_norm"] * 2]),
    "post-norm": (post_norm, post_norm_of_dlkit, ["dropout_add_layer_norm"] * 2),
    "rms_norm": (
        lambda m, x: F.rms_norm(x + F.dropout(x.sin(), m.p), (C,), m.w),
        lambda m, x: D.dropout_add_rms_norm(x.sin(), x, (C,), m.w, m.p),
        ["dropout_add_rms_norm"],
    ),
    "llama": (
        lambda m, x: llama(x + F.dropout(x.sin(), m.p), m.w, wide=torch.float64),
        lambda m, x: D.dropout_add_rms_norm(x.sin(), x, (C,), m.w, m.p, 1e-6),
        ["dropout_add_rms_norm"],
    ),
    "dropout, add": (
        lambda m, x: F.dropout(x.sin(), m.p) + x,
        lambda m, x: D.dropout_add(x.sin(), x, m.p),
        ["dropout_add"],
    ),
    "bias, gelu, dropout": (
        lambda m, x: F.dropout(F.gelu(x @ m.matrix + m.b), m.p),
        lambda m, x: D.bias_gelu_dropout(x @ m.matrix, m.b, m.p),
        ["bias_act_dropout"],
    ),
    "tanh, dropout": (
        lambda m, x: F.dropout(new_gelu(x @ m.matrix), m.p),
        lambda m, x: D.bias_gelu_dropout(x @ m.matrix, None, m.p, approximate="tanh"),
        ["bias_act_dropout"],
    ),
    "relu, dropout": (
        lambda m, x: F.dropout(F.relu(x @ m.matrix), m.p),
        lambda m, x: D.bias_relu_dropout(x @ m.matrix, None, m.p),
        ["bias_act_dropout"],
    ),
    "dropout": (lambda m, x: F.dropout(x, m.p), lambda m, x: D.dropout(x, m.p), ["dropout"]),
    "dropout in place": (
        lambda m, x: F.dropout(x.sin(), m.p, inplace=True).cos(),
        lambda m, x: D.dropout(x.sin(), m.p).cos(),
        ["dropout"],
    ),
    "dropout1d": (
        lambda m, x: F.dropout1d(x.view(1, 6, C), m.p),
        lambda m, x: D.dropout1d(x.view(1, 6, C), m.p),
        ["dropout"],
    ),
    "dropout2d": (lambda m, x: F.dropout2d(image(x), m.p), lambda m, x: D.dropout2d(image(x), m.p), ["dropout"]),
    "dropout3d": (
        lambda m, x: F.dropout3d(image(x)[..., None], m.p),
        lambda m, x: D.dropout3d(image(x)[..., None], m.p),
        ["dropout"],
    ),
    "alpha_dropout": (
        lambda m, x: F.alpha_dropout(x, m.p, m.training),
        lambda m, x: D.alpha_dropout(x, m.p, m.training),
        ["dropout"],
    ),
    "feature_alpha_dropout": (
        lambda m, x: F.feature_alpha_dropout(image(x), m.p, m.training),
        lambda m, x: D.feature_alpha_dropout(image(x), m.p, m.training),
        ["dropout"],
    ),
    "drop_path of timm": (
        lambda m, x: x + drop_path_timm(m, x.sin()),
        lambda m, x: x + D.drop_path(x.sin(), 0.25),
        ["dropout"],
    ),
    "drop_path of transformers": (
        lambda m, x: x + drop_path_transformers(m, x.sin()),
        lambda m, x: x + D.drop_path(x.sin(), 0.25),
        ["dropout"],
    ),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropouts(name):
    function, of_dlkit, expected = DROPOUTS[name]
    found, fused = run(Of(function, 0.3), [data(6, C)], "dlkit")
    assert [entry.op for entry in fused] == expected
    for one, other in zip(found, run(Of(of_dlkit, 0.3), [data(6, C)])[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    zeros, _ = run(Of(function, 0.0 if "path" not in name else 0.25).eval(), [data(6, C)])
    assert len(zeros) == len(found)


@pytest.mark.parametrize("name", layers.CASES)
def test_layers_of_dlkit(name):
    """Their ops are in the graph as they are, with keywords: training gives what the layer itself gives."""
    case = layers.CASES[name]
    layer = case.make().train()
    inputs = [x.requires_grad_() for x in case.inputs()]

    def train(model):
        torch.manual_seed(3)
        outputs = model(*inputs)
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
        weights = [p for p in layer.parameters() if p.requires_grad]
        total = sum((y * torch.arange(y.numel()).view_as(y).cos()).sum() for y in outputs)
        return outputs, torch.autograd.grad(total, [*inputs, *weights], allow_unused=True)

    expected = train(layer)
    torch._dynamo.reset()
    torch.testing.assert_close(train(torch.compile(layer, backend="dlkit")), expected)


def test_evaluation_drops_nothing():
    assert assert_same(Of(pre_norm, 0.3).eval(), [data(6, C)]) == CASES["pre-norm"][1]


def test_dropouts_used_twice_stay_apart():
    def function(m, x):
        h = F.dropout(x.sin(), m.p)
        return F.layer_norm(x + h, (C,), m.w, m.b) * (h != 0)

    _, fused = run(Of(function, 0.3), [data(6, C)], "dlkit")
    assert sorted(entry.op for entry in fused) == ["add_layer_norm", "dropout"]


# Beside other features of torch.compile


@pytest.mark.parametrize("name", ["pre-norm", "in place", "bias, gelu", "channels last"])
def test_inductor(name):
    function, expected = CASES[name]
    assert assert_same(Of(function), [data(12, C)], "dlkit_inductor") == expected


def test_inductor_drops_and_takes_options():
    found, fused = run(Of(pre_norm, 0.3), [data(60, C)], "dlkit_inductor")
    assert [entry.op for entry in fused] == DROPOUTS["pre-norm"][2]
    for one, other in zip(found, run(Of(pre_norm_of_dlkit, 0.3), [data(60, C)])[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    compiled = torch.compile(Of(pre_norm), backend="dlkit_inductor", options={"max_fusion_size": 8})
    torch.testing.assert_close(compiled(data(6, C))[0], Of(pre_norm)(data(6, C))[0])


@pytest.mark.parametrize("compiler", ["dlkit", "dlkit_inductor"])
def test_autocast(compiler):
    """Inside of what is compiled, and around it."""

    def inside(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            h = F.linear(F.layer_norm(x, (C,), m.w, m.b), m.matrix)
        return F.layer_norm(x + h, (C,), m.w, m.b)

    for around in (False, True):
        torch._dynamo.reset()
        model, inputs = Of(inside).float(), [data(6, C, dtype=torch.float32)]
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            expected, _ = run(model, inputs)
            found, fused = run(model, inputs, compiler)
        assert [entry.op for entry in fused] == ["layer_norm", "add_layer_norm"]
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def autocast_blocks(m, x):
    """A residual stream in fp32, and branches of fewer bits; of float64 nothing is cast."""
    for w, b in ((m.w, m.b), (m.w2, m.b2)):
        h = F.layer_norm(x, (C,), w, b)
        with torch.autocast("cpu", torch.bfloat16):
            h = F.dropout(F.linear(h, m.matrix), m.p, m.training)
        x = x + h
    x = F.layer_norm(x, (C,), m.w, m.b)
    x = x.sin().to(torch.bfloat16 if x.dtype == torch.float32 else x.dtype) + x
    x = F.rms_norm(x, (C,), m.w)
    y = images(x)
    y = y + y.cos().to(torch.float16 if y.dtype == torch.float32 else y.dtype)
    return layer_norm_2d(m, y), x


@pytest.mark.parametrize("compiler", ["dlkit", "dlkit_inductor"])
def test_branches_of_autocast(compiler):
    """The values are those of torch's promoted sums; without gradients a cast would cost more than it saves."""
    model, inputs = Of(autocast_blocks).float(), [data(12, C, dtype=torch.float32)]
    expected, _ = run(model, inputs)
    found, fused = run(model, inputs, compiler)
    norms = ["layer_norm", "add_layer_norm", "add_layer_norm", "add_rms_norm", "add_layer_norm"]
    assert [entry.op for entry in fused] == norms
    exact, _ = run(Of(autocast_blocks), [data(12, C)])
    for one, other, right in zip(found, expected, exact, strict=True):
        assert one.dtype == other.dtype and (compiler == "dlkit_inductor" or one.stride() == other.stride())
        error, allowed = ((t.double() - right).square().mean().sqrt() for t in (one, other))
        assert error <= 1.25 * allowed
    with torch.no_grad():
        torch._dynamo.reset()
        report = []
        torch.compile(model, backend=compiler, options={"report": report})(*inputs)
    assert [entry.op for entry in report] == [name.removeprefix("add_") for name in norms]


class Swish(nn.Module):
    def forward(self, x):
        return x.mul(x.sigmoid())


class HardSwish(nn.Module):
    def __init__(self, in_place=True):
        super().__init__()
        self.in_place = in_place

    def forward(self, x):
        inner = F.relu6(x + 3.0)
        return x * (inner.div_(6.0) if self.in_place else inner / 6.0)


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "silu": nn.SiLU(),
    "silu in place": nn.SiLU(inplace=True),
    "swish": Swish(),
    "hardswish": nn.Hardswish(),
    "hardswish in place": nn.Hardswish(inplace=True),
    "hardswish in elementary ops": HardSwish(),
    "hardswish in elementary ops, by copies": HardSwish(in_place=False),
    "gelu": nn.GELU(),
    "gelu by tanh": nn.GELU(approximate="tanh"),
    "gelu in elementary ops": new_gelu,
    "relu6": nn.ReLU6(),
    "relu6 in place": nn.ReLU6(inplace=True),
    "relu6 as a function": F.relu6,
    "leaky_relu": nn.LeakyReLU(0.2),
    "leaky_relu in place": nn.LeakyReLU(inplace=True),
    "leaky_relu as a function": lambda x: F.leaky_relu(x, negative_slope=0.3),
}


def batch_normed(m, x):
    return F.batch_norm(x, m.mean, m.var, m.w, m.b, m.training)


def group_normed(m, x):
    return F.group_norm(x, 4, m.w, m.b)


def traced_group_norm_keeps_layout():
    """False with torch 2.14, whose group_norm of channels_last is contiguous when traced, which on the CPU it is not.
    dlkit's, which is channels_last, does not take its place then."""
    with FakeTensorMode():
        x = torch.empty(2, 4, 3, 3, memory_format=torch.channels_last)
        return F.group_norm(x, 2).stride() == x.stride()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("norm", [batch_normed, group_normed], ids=lambda norm: norm.__name__)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_norm_and_activation(norm, name, training):
    """With a residual add between too, and of images in both layouts."""
    act = ACTIVATIONS[name]

    def function(m, x):
        y = images(act(norm(m, x))) + act(norm(m, images(x)))
        return act(y + norm(m, y.contiguous()))

    model = Of(function).train(training)
    count = 3 if norm is batch_normed or traced_group_norm_keeps_layout() else 2
    assert assert_same(model, [3 * data(6, C)]) == [norm.__name__.replace("ed", "")] * count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["swish", "hardswish in elementary ops", "gelu", "relu6", "leaky_relu"])
def test_norm_and_activation_are_no_farther_from_float64(name, dtype):
    act = ACTIVATIONS[name]

    def function(m, x):
        y = act(group_normed(m, x))
        return act(batch_normed(m, y) + x)

    model, x = Of(function), data(48, C, dtype=dtype)
    exact, _ = run(model, [x.double()])
    expected, _ = run(copy.deepcopy(model).to(dtype), [x])
    found, fused = run(copy.deepcopy(model).to(dtype), [x], "dlkit")
    assert [entry.op for entry in fused] == ["group_norm", "batch_norm"]
    errors = [
        sum(
            float(((one.double() - right).square().mean() / (right.square().mean() + 1e-3)).sqrt())
            for one, right in pairs
        )
        for pairs in (list(zip(found, exact, strict=True)), list(zip(expected, exact, strict=True)))
    ]
    assert errors[0] <= 1.05 * errors[1]


ACTIVATIONS_LEFT = {
    "used too": (lambda m, x: ((y := batch_normed(m, x)), F.silu(y)), ["batch_norm"]),
    "sigmoid used too": (lambda m, x: ((s := (y := group_normed(m, x)).sigmoid()), y * s), ["group_norm"]),
    "norm used too": (lambda m, x: (y := group_normed(m, x)) * y.sigmoid() + y, ["group_norm"]),
    "another gate": (lambda m, x: group_normed(m, x) * x.sigmoid(), ["group_norm"]),
    "another ceiling": (lambda m, x: F.hardtanh(batch_normed(m, x), 0, 5), ["batch_norm"]),
    "hardtanh": (lambda m, x: F.hardtanh(batch_normed(m, x)), ["batch_norm"]),
    "another sixth": (lambda m, x: (y := group_normed(m, x)) * (F.relu6(y + 3.0) / 5.0), ["group_norm"]),
    "mish": (lambda m, x: F.mish(batch_normed(m, x)), ["batch_norm"]),
}


@pytest.mark.parametrize("name", ACTIVATIONS_LEFT)
def test_activations_left(name):
    function, expected = ACTIVATIONS_LEFT[name]
    assert assert_same(Of(function), [data(6, C)]) == expected


@pytest.mark.parametrize("name", ["gelu", "gelu by tanh", "gelu in elementary ops", "relu", "relu in place"])
def test_bias_activation_dropout(name):
    act = ACTIVATIONS[name]
    kind = {"approximate": "none" if name == "gelu" else "tanh"}

    def of_dlkit(m, x):
        if "relu" in name:
            return D.bias_relu_dropout(x @ m.matrix, m.b, m.p)
        return D.bias_gelu_dropout(x @ m.matrix, m.b, m.p, **kind)

    function = Of(lambda m, x: F.dropout(act(x @ m.matrix + m.b), m.p), 0.3)
    found, fused = run(function, [data(6, C)], "dlkit")
    assert [entry.op for entry in fused] == ["bias_act_dropout"]
    for one, other in zip(found, run(Of(of_dlkit, 0.3), [data(6, C)])[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_dtypes_that_promote():
    """In float64 beside fp32: to the last bits."""

    def function(m, x, y):
        total = x + y
        both = y + x
        return F.layer_norm(total, (C,), m.w, m.b), total, F.rms_norm(both, (C,), m.w)

    inputs = [data(6, C), data(6, C, dtype=torch.float32, seed=1)]
    expected, _ = run(Of(function), inputs)
    found, fused = run(Of(function), inputs, "dlkit")
    assert [entry.op for entry in fused] == ["add_layer_norm", "add_rms_norm"]
    for one, other in zip(found, expected, strict=True):
        eps = torch.finfo(one.dtype).eps if one.dtype == torch.float32 else 1e-12
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=eps, atol=eps)


def test_a_sum_in_place_does_not_promote():
    def function(m, x, y):
        total = x.sin()
        total += y
        return F.layer_norm(total, (C,), m.w.bfloat16(), m.b.bfloat16())

    inputs = [data(6, C, dtype=torch.bfloat16), data(6, C, dtype=torch.float32, seed=1)]
    expected, _ = run(Of(function), inputs)
    found, fused = run(Of(function), inputs, "dlkit")
    assert [entry.op for entry in fused] == ["layer_norm"]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("compiler", ["dlkit", "dlkit_inductor"])
def test_dynamic_shapes(compiler):
    model, fused = Of(pre_norm), []
    compiled = torch.compile(model, backend=compiler, fullgraph=True, dynamic=True, options={"report": fused})
    for rows in (6, 7, 12, 31):
        torch.testing.assert_close(compiled(data(rows, C)), model(data(rows, C)))
    assert [entry.op for entry in fused] == CASES["pre-norm"][1]  # once
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("compiler", ["dlkit", "dlkit_inductor"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_checkpoint(compiler, p):
    def function(m, x):
        return checkpoint(lambda x: pre_norm(m, x)[0], x, use_reentrant=False)

    if p == 0:
        assert assert_same(Of(function), [data(6, C)], compiler) == CASES["pre-norm"][1]
    else:
        found, _ = run(Of(function, p), [data(6, C)], compiler)
        expected, _ = run(Of(lambda m, x: pre_norm_of_dlkit(m, x)[0], p), [data(6, C)])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_no_more_graphs_and_recompilations_than_eager():
    def function(m, x):
        x = x + F.layer_norm(x, (C,), m.w, m.b)
        torch._dynamo.graph_break()
        return F.layer_norm(x, (C,), m.w, m.b) * m.scale

    found = {}
    for backend in ("eager", "dlkit"):
        torch._dynamo.reset()
        counters.clear()
        model = Of(function)
        compiled = torch.compile(model, backend=backend)
        for model.scale, rows in ((1, 3), (2, 3), (2, 5), (2, 9)):
            compiled(data(rows, C))
        found[backend] = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    assert found["dlkit"] == found["eager"]


def test_torch_func_is_left():
    def function(m, x):
        x = F.layer_norm(x + x.cos(), (C,), m.w, m.b)
        x = x + torch.vmap(lambda row: F.layer_norm(row + row.cos(), (C,), m.w, m.b))(x)
        return F.layer_norm(x + x.sin(), (C,), m.w, m.b)

    assert assert_same(Of(function), [data(6, C)]) == ["add_layer_norm", "add_layer_norm"]


def test_no_grad_and_inference():
    model = Of(pre_norm)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            compiled = torch.compile(model, backend="dlkit", fullgraph=True)
            torch.testing.assert_close(compiled(data(6, C)), model(data(6, C)))


def test_random_use_is_for_functions_of_dlkit():
    """Masks of torch's dropouts come from torch's generators, as under dlkit.override()."""
    x = data(6, C)
    compiled = torch.compile(lambda x: F.dropout(x, 0.3), backend="dlkit")
    stream = dlkit.random.Philox(1)
    with dlkit.random.use(stream):
        torch.manual_seed(3)
        found = compiled(x)
    torch.manual_seed(3)
    assert torch.equal(found, D.dropout(x, 0.3)) and stream.state_dict()["offset"] == 0


# Names, options, report


def test_report():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(C)
            self.linear = nn.Linear(C, C)

        def forward(self, x):
            return x + self.linear(self.norm(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    report = []
    torch.compile(Net(), backend="dlkit", options={"report": report})(torch.randn(3, C))
    assert report == [
        Fused("layer_norm", "F.layer_norm", "blocks.0.norm", nn.LayerNorm),
        Fused("add_layer_norm", "add and LayerNorm", "blocks.1.norm", nn.LayerNorm),
    ]
    assert str(report[1]) == "blocks.1.norm: add and LayerNorm, now dlkit's add_layer_norm"


def test_report_names_the_elementary_ops_once():
    _, fused = run(Of(lambda m, x: llama(x + x.sin(), m.w)), [data(4, C, dtype=torch.bfloat16)], "dlkit")
    assert [(entry.op, entry.replaced) for entry in fused] == [("add_rms_norm", "add and RMSNorm in elementary ops")]


def test_options():
    for backend, options, error in (
        ("dlkit", {"max_fusion_size": 8}, "knows the option report, got max_fusion_size"),
        ("dlkit", {"report": {}}, "expected a list"),
        ("dlkit_inductor", {"report": ()}, "expected a list"),
    ):
        with pytest.raises(Exception, match=error):
            torch.compile(lambda x: x + 1, backend=backend, options=options)(data(3))
    with pytest.raises(Exception, match="got mode"):
        torch.compile(lambda x: x + 1, backend="dlkit", mode="max-autotune")(data(3))


NAMES = """
import sys
{first}
import dlkit
assert ("torch._dynamo" in sys.modules) == {loaded}, "dlkit imports torch._dynamo"
assert "dlkit.dynamo" not in sys.modules
import torch
assert {{"dlkit", "dlkit_inductor"}} <= set(torch.compiler.list_backends())
f = torch.compile(lambda x: torch.nn.functional.layer_norm(x + x.sin(), (4,)), backend="dlkit")
report = []
f(torch.ones(2, 4))
from dlkit.dynamo import dlkit as backend
from torch._dynamo.backends.registry import lookup_backend
assert lookup_backend("dlkit") is backend
"""


@pytest.mark.parametrize("first", ["", "import torch._dynamo", "import torch._dynamo.backends.registry"])
def test_the_names_are_known_and_nothing_is_imported(first):
    code = NAMES.format(first=first, loaded=bool(first))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
