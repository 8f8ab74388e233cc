"""fuse(): which modules are fused; results, checkpoints, copies and compiled code stay the same; restore() undoes
it."""

import copy
import io
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.fusible import Block, Plain, assert_same_results, counting, fused_layers, randomised
from torch import nn

import dlkit
from dlkit._activation import layer_activation
from dlkit.nn.transformer import feed_forward


class BasicBlock(nn.Module):
    """As torchvision writes it."""

    def __init__(self, inputs, channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or inputs != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class Bottleneck(nn.Module):
    """As papers' code writes it: functional ReLU, an add that is not in place, the shortcut last."""

    def __init__(self, inputs, channels, stride=1):
        super().__init__()
        outputs = 2 * channels
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.project = stride != 1 or inputs != outputs
        if self.project:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut_bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out = out + (self.shortcut_bn(self.shortcut(x)) if self.project else x)
        return F.relu(out, inplace=True)


class ResNet(nn.Module):
    def __init__(self, block=BasicBlock, outputs=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(block(8, 8), block(outputs, 8))
        self.layer2 = nn.Sequential(block(outputs, 16, 2), block(2 * outputs, 16))
        self.fc = nn.Linear(2 * outputs, 10)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def sequential():
    return nn.Sequential(
        nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8)), nn.ReLU()
    )


MODELS = {
    "sequential": (sequential, (6, 12), 1),
    "basic": (ResNet, (4, 3, 12, 12), 9),
    "bottleneck": (lambda: ResNet(Bottleneck, 16), (4, 3, 12, 12), 13),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, shape, fused = MODELS[request.param]
    return randomised(make().double()), torch.randn(shape, dtype=torch.float64), fused


def test_results_gradients_buffers_and_checkpoints_stay_the_same(case):
    model, x, count = case
    fused = copy.deepcopy(model)
    assert dlkit.fuse(fused) is fused
    assert len(fused_layers(fused)) == count
    assert_same_results(model, fused, x)
    assert list(fused.state_dict()) == list(model.state_dict())
    other = randomised(copy.deepcopy(model))
    fused.load_state_dict(other.state_dict())
    torch.testing.assert_close(fused(x), other(x))
    model.load_state_dict(fused.state_dict())
    torch.testing.assert_close(model(x), fused(x))


def test_residual_and_relu_are_gone_from_the_blocks():
    model = dlkit.fuse(ResNet())
    dlkit.replace(model.layer2[0].downsample)
    calls = []
    with counting(calls):
        model(torch.randn(2, 3, 8, 8))
    assert not [name for name in calls if "relu" in name or "add" in name.lower()]
    block = model.layer2[0]
    assert (
        isinstance(block, BasicBlock) and type(block).__name__ == "BasicBlock" and repr(block).startswith("BasicBlock(")
    )
    assert type(block.downsample[1]) is dlkit.nn.BatchNorm2d and type(block.relu) is nn.ReLU
    assert type(model.layer1[1]) is not type(block)  # with a downsampling and without
    assert type(model.layer1[1]) is type(model.layer2[1]) is type(model.layer1[0])


def test_report_names_what_was_fused_and_what_was_left():
    model, report = ResNet(), []
    dlkit.fuse(model, report=report)
    lines = {change.name: str(change) for change in report}
    assert len(lines) == len(report)
    assert lines["layer2.0.bn2"] == (
        "layer2.0.bn2: torch.nn.modules.batchnorm.BatchNorm2d, now dlkit.nn.batch_norm.BatchNormReLU2d: "
        "takes in the add and the ReLU after it in forward() of test_fuse.BasicBlock"
    )
    assert (
        "takes in the ReLU after it" in lines["bn1"]
        and "left as it is: no activation follows" in lines["layer2.0.downsample.1"]
    )
    assert "its forward() leaves adds and activations to the fused layers" in lines["layer1.0"]
    assert list(lines) == [name for name, _ in model.named_modules() if name in lines]
    again: list = []
    classes = [type(module) for module in model.modules()]
    dlkit.fuse(model, report=again)
    assert [change.name for change in again] == ["layer2.0.downsample.1"]
    assert [type(module) for module in model.modules()] == classes


class Layers(nn.Sequential):
    """As torchvision's Conv2dNormActivation: another name, the same forward()."""


def test_sequential_keeps_its_places():
    model, report = sequential(), []
    dlkit.fuse(model, report=report)
    assert type(model[1]) is dlkit.nn.BatchNormReLU1d and type(model[2]) is nn.Identity and type(model[4]) is nn.ReLU
    assert [(change.name, change.before is change.after) for change in report] == [
        ("1", False),
        ("2", False),
        ("3.1", True),
    ]
    assert type(dlkit.fuse(nn.BatchNorm2d(3))) is nn.BatchNorm2d
    assert fused_layers(dlkit.fuse(Layers(nn.BatchNorm1d(3), nn.ReLU()))) == ["0"]
    shared = nn.ReLU()
    net = nn.Sequential(nn.BatchNorm1d(3), shared, nn.Linear(3, 3), shared)
    dlkit.fuse(net)
    assert type(net[1]) is nn.Identity and net[3] is shared


def test_copies_and_pickles_are_models_of_their_own(case):
    model, x, _ = case
    dlkit.fuse(model.eval())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model)), torch.load(file, weights_only=False)]
    expected = model(x)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    for clone in copies:
        assert [type(a) for a in clone.modules()] == [type(a) for a in model.modules()]
        torch.testing.assert_close(clone(x), expected)
        clone.train()(x).sum().backward()


@pytest.mark.slow
def test_a_pickle_loads_in_another_process(tmp_path):
    model = dlkit.fuse(ResNet().eval())
    x = torch.randn(2, 3, 8, 8)
    torch.save((model, x, model(x)), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, x, y = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(model(x), y)\n"
    )
    here = os.path.dirname(__file__)
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], cwd=here, check=True, timeout=120)


@pytest.mark.slow
def test_compiles_without_breaks():
    model = dlkit.fuse(ResNet())
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        model.train(training), twin.train(training)
        y = compiled(x)
        torch.testing.assert_close(y, twin(x))
        y.sum().backward()
    torch.testing.assert_close(list(model.buffers()), list(twin.buffers()))


def test_hooks_of_blocks_and_of_other_layers_are_kept():
    model, calls = ResNet(), []
    model.layer1[0].register_forward_hook(lambda *_: calls.append("block"))
    model.layer1[0].conv2.register_forward_hook(lambda *_: calls.append("conv"))
    model.layer2[0].downsample.register_forward_hook(lambda *_: calls.append("downsample"))
    dlkit.fuse(model)(torch.randn(2, 3, 8, 8))
    assert calls == ["conv", "block", "downsample"]


ACTIVATIONS = [nn.ReLU(), nn.ReLU6(True), nn.LeakyReLU(0.2, True), nn.SiLU(True), nn.Hardswish(True)]
ACTIVATIONS += [nn.GELU(), nn.GELU("tanh")]


class Other(nn.Module):
    """An activation of another library, as timm writes them."""

    def __init__(self, inplace=False):
        super().__init__()
        self.inplace = inplace


class GELU(Other):
    def forward(self, x):
        return F.gelu(x)


class GELUTanh(Other):
    def forward(self, x):
        return F.gelu(x, approximate="tanh")


class Swish(Other):
    def forward(self, x):
        return x.mul_(x.sigmoid()) if self.inplace else x.mul(x.sigmoid())


class HardSwish(Other):
    def forward(self, x):
        inner = F.relu6(x + 3.0).div_(6.0)
        return x.mul_(inner) if self.inplace else x.mul(inner)


class SwishFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.mul(torch.sigmoid(x))

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        sigmoid = torch.sigmoid(x)
        return grad_output * (sigmoid * (1 + x * (1 - sigmoid)))


class SwishMe(Other):
    def forward(self, x):
        return SwishFunction.apply(x)


class OwnReLU(nn.ReLU):
    """Has another forward(), which does the same."""

    def forward(self, x):
        return x.clamp(min=0)


OTHERS = {
    GELU(): "gelu",
    GELUTanh(): "gelu_tanh",
    Swish(): "silu",
    Swish(inplace=True): "silu",
    SwishMe(): "silu",
    HardSwish(): "hardswish",
    HardSwish(inplace=True): "hardswish",
    OwnReLU(): "relu",
}


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm2d(4), lambda: nn.GroupNorm(2, 4)], ids=["batch", "group"])
@pytest.mark.parametrize("act", [*ACTIVATIONS, *OTHERS], ids=repr)
def test_each_activation_is_taken_in(act, make):
    """As a neighbour, after an add in a traced forward(), and as a norm's own."""
    residual = AddAct(make(), act)
    own = OwnAct(make(), act)
    model = randomised(nn.Sequential(nn.Conv2d(4, 4, 1), make(), act, residual, own).double())
    fused = dlkit.fuse(copy.deepcopy(model))
    assert isinstance(fused[2], nn.Identity)
    layers = fused[1], fused[3].norm, fused[4].norm
    for layer in layers:
        name, slope = layer_activation(act) or (OTHERS[act], 0.0)
        if type(layer) is not dlkit.nn.BatchNormReLU2d:
            assert layer.activation == name and (name != "leaky_relu" or layer.negative_slope == slope)
            assert type(layer) in (dlkit.nn.BatchNormAct2d, dlkit.nn.GroupNormAct)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    assert_same_results(copy.deepcopy(model), copy.deepcopy(fused), x)
    again = pickle.loads(pickle.dumps(fused))
    assert_same_results(copy.deepcopy(model), copy.deepcopy(again), x)
    dlkit.restore(again)
    assert [type(layer) for layer in again.modules()] == [type(layer) for layer in model.modules()]
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(again.modules(), model.modules(), strict=True))


class AddAct(nn.Module):
    def __init__(self, norm, act):
        super().__init__()
        self.norm, self.act = norm, act

    def forward(self, x):
        return self.act(self.norm(x * 2) + x)


class OwnAct(AddAct):
    """Calls its activation as a function."""

    def forward(self, x):
        y = self.norm(x)
        return FUNCTIONS.get(type(self.act), lambda y, act: act(y))(y, self.act)


FUNCTIONS = {
    nn.ReLU: lambda y, _: F.relu(y),
    nn.ReLU6: lambda y, _: F.relu6(y),
    nn.LeakyReLU: lambda y, act: F.leaky_relu(y, 0.2, inplace=True),
    nn.SiLU: lambda y, _: F.silu(y, inplace=True),
    nn.Hardswish: lambda y, _: F.hardswish(y),
    nn.GELU: lambda y, act: F.gelu(y, approximate=act.approximate),
}


def test_an_activation_that_changes_after_fusing_raises():
    block = AddAct(nn.GroupNorm(2, 4), nn.LeakyReLU(0.1))
    dlkit.fuse(block)
    block(torch.randn(2, 4, 3))
    block.act.negative_slope = 0.3
    with pytest.raises(RuntimeError, match=r"act.negative_slope was 0.1"):
        block(torch.randn(2, 4, 3))


class Variants(Block):
    """A block in which everything is fused."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(6))
        self.register_buffer("shift", torch.ones(4, 1, 1))
        self.scale = nn.Parameter(torch.full((1,), 0.5))
        self.act = F.relu

    def helper(self, x, i):
        return self.act(self.norms[i](x))

    def forward(self, x):
        a = self.helper(x, 0)
        b = self.conv(x).add_(self.norms[1](a)).relu()  # left: an in-place add into the convolution's result
        c = self.norms[2](a).add_(b).relu_()
        d = torch.add(x * self.scale, self.norms[3](c)).relu()
        e = self.norms[4](d)
        e += self.shift
        e = F.relu_(e)
        f = torch.relu(self.norms[5](e * 1) + e)
        return {"out": f, "sizes": (x.size(0), x.shape[-1])}


def test_the_ways_to_write_it():
    model = randomised(Variants().double())
    fused = dlkit.fuse(copy.deepcopy(model))
    assert fused_layers(fused) == ["norms.0", "norms.2", "norms.3", "norms.4", "norms.5"]
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    for training in (True, False):
        expected, found = model.train(training)(x), fused.train(training)(x)
        torch.testing.assert_close(found["out"], expected["out"])
        assert found["sizes"] == expected["sizes"] == (3, 5)
    assert_same_results(nn.Sequential(model, Out()), nn.Sequential(fused, Out()), x)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        clone = pickle.loads(pickle.dumps(fused, protocol))
        assert type(clone) is type(fused)
        torch.testing.assert_close(clone(x)["out"], fused(x)["out"])


class Out(nn.Module):
    def forward(self, x):
        return x["out"]


@pytest.mark.parametrize("first, second", [("bn", "other"), ("other", "bn")])
def test_of_two_terms_the_first_is_fused(first, second):
    class Sum(Block):
        def __init__(self):
            super().__init__()
            self.other = nn.BatchNorm2d(4)

        def forward(self, x):
            a = getattr(self, first)(self.conv(x))
            return self.relu(a + getattr(self, second)(x))

    model, report = Sum(), []
    expected = copy.deepcopy(model)
    dlkit.fuse(model, report=report)
    assert fused_layers(model) == [first]
    assert "done by another layer" in next(change.reason for change in report if change.name == second)
    assert_same_results(expected, model, torch.randn(2, 4, 3, 3))


class Rated(Block):
    def forward(self, x):
        out = self.relu(self.bn(x))
        return out * self.rate if self.rate > 0 else out


def test_an_attribute_that_changed_after_fusing_raises():
    model = dlkit.fuse(Rated())
    x = torch.randn(2, 4, 3, 3)
    model(x)
    model.rate = 0.5
    with pytest.raises(
        RuntimeError, match=r"Rated\.rate was 0\.0 when dlkit\.fuse\(\) rewrote forward\(\), and is 0\.5"
    ):
        model(x)
    clone = pickle.loads(pickle.dumps(model))
    with pytest.raises(RuntimeError, match="set it before fusing"):
        clone(x)


def test_an_in_place_add_of_a_wider_residual_keeps_the_type():
    class Wide(Block):
        def forward(self, x, wide):
            out = self.bn(x)
            out += wide
            return self.relu(out)

    model = Wide()
    fused = dlkit.fuse(copy.deepcopy(model))
    assert fused_layers(fused) == ["bn"]
    x, wide = torch.randn(2, 4, 3, 3).bfloat16(), torch.randn(2, 4, 3, 3)
    expected = model(x, wide)
    assert fused(x, wide).dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(fused(x, wide), expected)


def test_dlkit_layers_and_synchronised_ones_are_fused_too():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.SyncBatchNorm(4), nn.ReLU(), nn.SyncBatchNorm(4), nn.ReLU())
    dlkit.replace(model[:4])
    dlkit.fuse(model)
    kinds = [dlkit.nn.BatchNormReLU1d, dlkit.nn.SyncBatchNormReLU, dlkit.nn.SyncBatchNormReLU]
    assert [type(layer) for layer in model[::2]] == kinds
    x = torch.randn(5, 4)
    assert (model(x) >= 0).all() and (model.eval()(x) >= 0).all()
    report: list = []
    dlkit.replace(model, report=report)
    assert not report
    dlkit.restore(model[::2], report=report)  # without the places of the ReLUs
    assert [type(layer) for layer in model[::2]] == kinds
    assert all("cannot be put back" in change.reason for change in report) and len(report) == 3
    dlkit.restore(model)
    assert [type(layer) for layer in model] == [nn.BatchNorm1d, nn.ReLU, *[nn.SyncBatchNorm, nn.ReLU] * 2]


def test_a_model_in_parts_that_cannot_be_traced():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.block = nn.BatchNorm2d(4), Plain()

        def forward(self, x):
            return F.relu(self.bn(self.block(x))) if x.mean() > 0 else x

    model, report = Root(), []
    dlkit.fuse(model, report=report)
    assert fused_layers(model) == ["block.bn"] and type(model) is Root
    left = next(change for change in report if change.name == "bn")
    assert "torch.fx cannot trace forward() of" in left.reason and "TraceError" in left.reason


def test_a_fused_module_is_fused_further():
    model = ResNet().layer2[0]
    handle = model.bn1.register_forward_hook(lambda *_: None)
    expected = copy.deepcopy(model)
    assert fused_layers(dlkit.fuse(model)) == ["bn2"]
    handle.remove()
    assert fused_layers(dlkit.fuse(model)) == ["bn1", "bn2"]
    assert type(model).__mro__[1] is BasicBlock
    assert_same_results(expected, copy.deepcopy(model), torch.randn(2, 8, 6, 6))


def test_fused_models_are_traced_themselves():
    model = dlkit.fuse(ResNet()).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    norms = dlkit.replace(nn.Sequential(nn.InstanceNorm2d(3), nn.GroupNorm(1, 3), nn.BatchNorm2d(3)))
    torch.testing.assert_close(torch.fx.symbolic_trace(norms)(x), norms(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x))


def transformer_inputs(decoder):
    x, memory = torch.randn(3, 7, 16, requires_grad=True), torch.randn(3, 5, 16)
    mask = torch.triu(torch.full((7, 7), -torch.inf), 1)
    padding = torch.zeros(3, 7)
    padding[1, 5:] = -torch.inf
    if decoder:
        return (x, memory), {"tgt_mask": mask, "tgt_key_padding_mask": padding, "tgt_is_causal": True}
    return (x,), {"src_mask": mask, "src_key_padding_mask": padding}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_transformer_layers_fuse_and_draw_the_same_masks(kind, norm_first):
    """Compared with the same layer made of dlkit's single layers: masks, results and gradients, and evaluation."""
    options = {"batch_first": True, "norm_first": norm_first, "dropout": 0.3, "activation": "gelu"}
    plain = dlkit.replace(getattr(torch.nn, kind)(16, 2, 32, **options))
    fused = copy.deepcopy(plain)
    report = []
    assert dlkit.fuse(fused, report=report) is fused and type(fused) is getattr(dlkit.nn, kind)
    assert [change.name for change in report] == [""] and "fused" in report[0].reason
    assert list(fused.state_dict()) == list(plain.state_dict())
    dlkit.fuse(fused, report=(again := []))
    assert not again
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    arguments, masks = transformer_inputs("Decoder" in kind)
    results = []
    for layer in (plain, fused, compiled):
        torch.manual_seed(2)
        y = layer(*arguments, **masks)
        results.append((y, *torch.autograd.grad(y.sin().sum(), [arguments[0], *layer.parameters()])))
    for found in results[1:]:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, results[0], strict=True))
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            assert torch.allclose(fused.eval()(*arguments), plain.eval()(*arguments), atol=1e-6)


def test_transformer_layers_that_cannot_be_fused_are_left():
    def made():
        return torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    class Own(torch.nn.TransformerEncoderLayer):
        pass

    hooked, other = made(), made()
    hooked.norm1.register_forward_hook(lambda *_: None)
    other.dropout2 = torch.nn.Identity()
    net, report = torch.nn.ModuleList([hooked, other, Own(16, 2, 32), made()]), []
    dlkit.fuse(net, report=report)
    assert [change.before is change.after for change in report] == [True, True, True, False]
    for change, word in zip(report, ("hooks", "dropout2", "subclass", "fused"), strict=True):
        assert word in change.reason
    net[3].norm1 = torch.nn.Identity()  # a later change is noticed
    net[3](torch.randn(2, 3, 16))
    stack = dlkit.fuse(torch.nn.TransformerEncoder(made(), 2, enable_nested_tensor=False))
    assert all(type(layer) is dlkit.nn.TransformerEncoderLayer for layer in stack.layers)
    stack(torch.randn(2, 3, 16)).sum().backward()


@pytest.mark.parametrize("activation", ["relu", "gelu", torch.tanh, "hooked"])
def test_feed_forward_takes_the_activation_along(activation):
    """The same mask and values as with the dropout after the activation; a dropout with a hook is called."""
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, 0.4, "relu" if activation == "hooked" else activation)
    seen = []
    if activation == "hooked":
        layer.dropout.register_forward_hook(lambda *arguments: seen.append(1))
    x = torch.randn(5, 3, 16)
    with dlkit.random.use(dlkit.random.Philox(1)):
        y = feed_forward(dlkit.replace(layer), x)
    with dlkit.random.use(dlkit.random.Philox(1)):
        hidden = dlkit.functional.dropout(layer.activation(layer.linear1(x)), 0.4)
    torch.testing.assert_close(y, layer.linear2(hidden))
    assert len(seen) == (activation == "hooked")


# restore(), and tools that know only the base class.


def types_of(model):
    return [(name, type(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_restore_undoes_fuse_whole(case, replaced, copied):
    model, x, _ = case
    expected, before = copy.deepcopy(model), types_of(model)
    dlkit.fuse(dlkit.replace(model) if replaced else model)
    if copied:
        file = io.BytesIO()
        torch.save(copy.deepcopy(model), file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    report: list = []
    assert dlkit.restore(model, report=report) is model
    assert types_of(model) == before
    assert len({change.name for change in report}) == len(report)
    assert_same_results(expected, model, x)
    assert not any(name.startswith("_dlkit") for module in model.modules() for name in vars(module))
    assert fused_layers(dlkit.fuse(model))  # and again


def test_restore_gives_back_the_very_relu_and_the_mode():
    shared = nn.ReLU(inplace=True)
    model = nn.Sequential(nn.BatchNorm1d(3), shared, nn.Linear(3, 3), shared)
    dlkit.fuse(model).eval()
    dlkit.restore(model)
    assert model[1] is shared and model[3] is shared and not model[1].training


def test_restore_after_fusing_in_steps_and_synchronising():
    model = ResNet().layer2[0]
    before = types_of(model)
    handle = model.bn1.register_forward_hook(lambda *_: None)
    assert fused_layers(dlkit.fuse(model)) == ["bn2"]
    handle.remove()
    assert fused_layers(dlkit.fuse(model)) == ["bn1", "bn2"]
    synchronised = dlkit.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert types_of(dlkit.restore(model)) == before
    dlkit.restore(synchronised)
    assert [type(layer) for layer in (synchronised.bn1, synchronised.bn2)] == [nn.SyncBatchNorm] * 2
    assert type(synchronised) is BasicBlock


def test_restore_leaves_what_it_sees_in_part():
    block = dlkit.fuse(Plain())
    fused, left = fused_layers(block), []
    dlkit.restore(block.bn, report=left)
    assert fused_layers(block) == fused and "cannot be put back here" in left[0].reason
    made = nn.Sequential(dlkit.nn.BatchNormReLU2d(4), nn.Identity())
    assert fused_layers(dlkit.restore(made)) == ["0"]
    assert not fused_layers(dlkit.restore(block))


def test_restore_undoes_transformer_layers():
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    before = types_of(model)
    assert types_of(dlkit.restore(dlkit.fuse(dlkit.replace(model)))) == before


class Frozen(nn.Module):
    """Like detectron2's and timm's: its statistics never change."""

    def __init__(self, layer):
        super().__init__()
        self.eps = layer.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(layer, name).detach().clone())

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def replace_children(model, change):
    for name, child in model.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(model, name, change(child))
        else:
            replace_children(child, change)
    return model


def convert_frozen_batchnorm(model):
    def convert(layer):
        layer.eps  # noqa: B018
        return Frozen(layer)

    return replace_children(model, convert)


def fuse_conv_and_bn(model):
    if isinstance(model, nn.Sequential):
        return model  # its BatchNorm follows a Linear
    model.conv1 = torch.nn.utils.fusion.fuse_conv_bn_eval(model.conv1, model.bn1)
    model.bn1 = nn.Identity()
    return model


TOOLS = {
    "convert_sync_batchnorm": torch.nn.SyncBatchNorm.convert_sync_batchnorm,
    "convert_frozen_batchnorm": convert_frozen_batchnorm,
    "fuse_conv_bn_eval": fuse_conv_and_bn,
}


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_that_know_only_the_base_are_refused_until_restored(case, tool):
    model, x, _ = case
    if tool == "fuse_conv_bn_eval" and isinstance(model, nn.Sequential):
        pytest.skip("no convolution")
    expected = copy.deepcopy(model).eval()(x)
    dlkit.fuse(dlkit.replace(model)).eval()
    with pytest.raises(TypeError, match=r"dlkit.restore\(model\) first"):
        TOOLS[tool](copy.deepcopy(model))
    changed = TOOLS[tool](dlkit.restore(model))
    torch.testing.assert_close(changed.eval()(x), expected)


def test_guarded_attributes_read_and_write_as_before():
    layer = dlkit.nn.BatchNormReLU2d(4, eps=1e-3)
    assert (layer.eps, layer.num_features) == (1e-3, 4) and "eps=0.001" in repr(layer)
    layer.eps = 0.5
    x = torch.randn(8, 4, 2, 2)
    torch.testing.assert_close(layer(x), F.batch_norm(x, None, None, training=True, eps=0.5).relu())
    assert copy.deepcopy(layer).eps == 0.5
