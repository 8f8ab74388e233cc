"""fuse(): modules that it leaves unchanged, and modules that it looks through."""

import copy
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from support.fusible import LEFT, Block, Plain, assert_same_results, counting, fused_layers, hooked, randomised
from torch import nn

import dlkit


class UsedTwice(Block, reason="is used by something else"):
    def forward(self, x):
        out = self.bn(x)
        return self.relu(out) + out


class CalledTwice(Block, reason="calls it 2 times"):
    def forward(self, x):
        return self.relu(self.bn(self.relu(self.bn(x))))


class NeverCalled(Block, reason="calls it 0 times"):
    def forward(self, x):
        return self.relu(x)


class OtherActivation(Block, reason="no activation follows it"):
    def forward(self, x):
        return F.softplus(self.bn(x))


class AddOnly(Block, reason="an add follows it, and no activation"):
    def forward(self, x):
        return (self.bn(x) + x) * 2


class AddNumber(Block, reason="not the sum of two tensors"):
    def forward(self, x):
        return self.relu(self.bn(x) + 1)


class AddScaled(Block, reason="not the sum of two tensors"):
    def forward(self, x):
        return self.relu(torch.add(self.bn(x), x, alpha=2))


class AddItself(Block, reason="added to itself"):
    def forward(self, x):
        out = self.bn(x)
        return self.relu(out + out)


class AddIntoOther(Block, reason="added to another tensor in place"):
    def forward(self, x):
        other = self.conv(x)
        seen = other
        other += self.bn(x)
        return self.relu(other) + seen


class InputUsedBetween(Block, reason="its input is used between"):
    def forward(self, x):
        y = self.conv(x)
        out = self.bn(y)
        return self.relu(out + y.mul_(2))


class DependsOnTraining(Block, reason="depends on training"):
    def forward(self, x):
        out = self.relu(self.bn(x))
        return out * 2 if self.training else out


class DependsOnGradMode(Block, reason="depends on training"):
    def forward(self, x):
        out = self.relu(self.bn(x))
        return out * 2 if torch.is_grad_enabled() else out


class DependsOnValues(Block, reason="control flow"):
    def forward(self, x):
        return self.relu(self.bn(x)) if x.sum() > 0 else x


class DependsOnShape(Block, reason="control flow"):
    def forward(self, x):
        return self.relu(self.bn(x)) if x.shape[0] > 1 else x


class DependsOnType(Block, reason="asks for the type"):
    def forward(self, x):
        return self.relu(self.bn(torch.cat(x) if isinstance(x, (list, tuple)) else x))


class OptionalArgument(Block, reason="optional arguments"):
    def forward(self, x, scale=None):
        out = self.relu(self.bn(x))
        return out if scale is None else out * scale


class ManyArguments(Block, reason="optional arguments"):
    def forward(self, *xs):
        return self.relu(self.bn(xs[0]))


class DrawsInPython(Block, reason="draws random numbers"):
    def forward(self, x):
        return x if random.random() < 0.5 else self.relu(self.bn(x))


class DrawsTensor(Block, reason="calls rand on no input"):
    def forward(self, x):
        return self.relu(self.bn(x)) * torch.rand(1)


class MakesTensor(Block, reason="calls tensor on no input"):
    def forward(self, x):
        return self.relu(self.bn(x)) * torch.tensor(2.0)


class SwitchesGradients(Block, reason="_set_grad_enabled"):
    def forward(self, x):
        with torch.no_grad():
            x = self.conv(x)
        return self.relu(self.bn(x))


class Checkpoints(Block, reason="torch.fx cannot trace"):  # which of its calls is traced first depends on torch
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(lambda x: self.relu(self.bn(x)), x, use_reentrant=False)


class CheckpointsReentrantly(Block, reason="torch.fx cannot trace"):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(lambda x: self.relu(self.bn(x)), x, use_reentrant=True)


class SetsAttribute(Block, reason="sets the attribute kept"):
    def forward(self, x):
        self.kept = self.relu(self.bn(x))
        return self.kept


class ReadsDictionary(Block, reason="reads the attribute options"):
    def forward(self, x):
        return self.relu(self.bn(x)) if self.options["act"] else self.bn(x)


class Broken(Block, reason="ZeroDivisionError"):
    def forward(self, x):
        return self.relu(self.bn(x)) * (1 // 0)


@pytest.mark.parametrize("cls", LEFT, ids=lambda cls: cls.__name__)
def test_what_a_rewrite_would_change_is_left(cls):
    block, report = cls(), []
    before, python_state, torch_state = dict(vars(block)), random.getstate(), torch.get_rng_state()
    for training in (True, False):
        block.train(training)
        dlkit.fuse(block, report=report)
        assert type(block) is cls and type(block.bn) is nn.BatchNorm2d and block.training is training
    assert LEFT[cls] in report[0].reason and report[0].name == "bn" and len(report) == 2
    assert list(vars(block)) == list(before) and block.kept is None
    assert random.getstate() == python_state and torch.equal(torch.get_rng_state(), torch_state)


class ZeroDropPath(nn.Module):
    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training or not self.drop_prob:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype) >= self.drop_prob
        return x * keep / (1 - self.drop_prob)


class LooksThrough(Block):
    """Modules that do nothing stand wherever they can, and the training flag is passed on."""

    def __init__(self):
        super().__init__()
        self.bn2, self.identity = nn.BatchNorm2d(4), nn.Identity()
        self.drop, self.path = nn.Dropout2d(0.0), ZeroDropPath()

    def forward(self, x):
        y = self.drop(self.relu(self.identity(self.drop(self.bn(x)))))
        y = F.dropout(y, 0.0, self.training)
        y = self.path(self.identity(self.bn2(self.conv(y))))
        y += x
        return self.relu(self.identity(y))


def test_what_does_nothing_is_looked_through():
    model = randomised(LooksThrough().double())
    fused = dlkit.fuse(copy.deepcopy(model))
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    assert fused_layers(fused) == ["bn", "bn2"]
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_same_results(copy.deepcopy(model), copied, x)
    fused.drop.p = 1.0  # stands before and after a ReLU, and is called there
    zero = torch.zeros_like(x)
    model.drop.p = 1.0
    torch.testing.assert_close(fused.train()(x), model.train()(x))
    fused.drop.p = model.drop.p = 0.0
    fused.path.drop_prob = 0.5
    with pytest.raises(RuntimeError, match=r"path\.drop_prob was 0\.0 .* and is 0\.5"):
        fused(x)
    fused.path.drop_prob, fused.identity = 0.0, nn.Hardtanh()
    with pytest.raises(RuntimeError, match=r"identity\.__class__"):
        fused(zero)
    fused.identity = nn.Identity()
    restored = dlkit.restore(fused)
    assert type(restored) is LooksThrough and not fused_layers(restored)
    assert_same_results(model, restored, x)


@pytest.mark.parametrize("change", ["dropout", "path", "hook", "subclass"])
def test_what_does_something_is_not_looked_through(change):
    model = LooksThrough()
    if change == "dropout":
        model.drop.p = 0.1
    elif change == "path":
        model.path.drop_prob = 0.1
    elif change == "hook":
        model.identity.register_forward_hook(lambda *_: None)
    else:
        model.identity = nn.Sequential()
    assert fused_layers(dlkit.fuse(model)) == {"dropout": ["bn2"], "path": ["bn"]}.get(change, [])


def test_a_sequential_is_looked_through():
    model = randomised(
        nn.Sequential(nn.BatchNorm2d(4), nn.Identity(), nn.Dropout(0.0), nn.ReLU(), nn.Dropout(0.0), nn.ReLU()).double()
    )
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    fused = dlkit.fuse(copy.deepcopy(model))
    assert fused_layers(fused) == ["0"] and [type(layer) for layer in fused][3:] == [nn.Identity, nn.Dropout, nn.ReLU]
    assert_same_results(model, fused, x)
    restored = dlkit.restore(fused)
    assert [type(layer) for layer in restored] == [type(layer) for layer in model]
    assert_same_results(model, restored, x)


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with its activation, as timm has."""

    def __init__(self, size, act, drop=None):
        super().__init__(size)
        self.drop, self.act = drop or nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Swish(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return x.mul_(x.sigmoid()) if self.inplace else x.mul(x.sigmoid())


class Silu(nn.Module):
    def forward(self, x):
        return F.silu(x)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("act", [Swish(True), Swish(False), Silu()], ids=repr)
def test_a_norm_takes_in_an_activation_of_another_library(act, replaced):
    model, report = randomised(nn.Sequential(NormAct(4, copy.deepcopy(act)), NormAct(4, act)).double()), []
    fused = copy.deepcopy(model)
    dlkit.fuse(dlkit.replace(fused) if replaced else fused, report=report)
    assert [change.reason for change in report] == [f"takes in its {type(act).__name__}"] * 2
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    calls, again = [], pickle.loads(pickle.dumps(fused))
    with counting(calls):
        copy.deepcopy(again)(x)
    assert not {"sigmoid", "mul", "mul_", "silu"} & set(calls)
    assert_same_results(copy.deepcopy(model), copy.deepcopy(again), x)
    fused[0].act = model[0].act = nn.Tanh()
    assert_same_results(model, fused, x)
    assert [type(layer) for layer in dlkit.restore(again)] == [NormAct] * 2


@pytest.mark.parametrize("replaced", [False, True])
def test_a_norm_takes_in_a_relu_of_its_own(replaced):
    model = nn.Sequential(
        NormAct(4, nn.ReLU(inplace=True)), NormAct(4, nn.Softplus()), NormAct(4, nn.ReLU(), nn.Dropout(0.1))
    )
    model, report = randomised(model.double()), []
    fused = copy.deepcopy(model)
    dlkit.fuse(dlkit.replace(fused) if replaced else fused, report=report)
    assert [change.reason for change in report][:1] == ["takes in its ReLU"] and "Softplus" in report[1].reason
    assert "with its activation" in repr(fused[0]) and isinstance(fused[0], NormAct)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    calls, again = [], pickle.loads(pickle.dumps(fused))
    with counting(calls):
        copy.deepcopy(fused[0])(x)
    assert not [name for name in calls if "relu" in name]
    assert_same_results(copy.deepcopy(model[:2]), copy.deepcopy(again[:2]), x)
    fused[0].act = model[0].act = nn.Hardtanh()  # whatever it is now, it is called
    assert_same_results(model[:2], fused[:2], x)
    report.clear()
    dlkit.fuse(again, report=report)
    assert [type(layer) for layer in dlkit.restore(again)] == [NormAct] * 3


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return F.relu(x)


class Sloped(nn.ReLU):
    """Whatever its base does."""

    def forward(self, x):
        return torch.where(x > 0, x, 0.1 * x)


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return F.relu(x)


class Noisy(nn.Module):
    def forward(self, x):
        return F.rrelu(x, 0.0, 0.1, self.training)


class OnlyInTraining(nn.Module):
    def forward(self, x):
        return F.silu(x) if self.training else F.hardswish(x)


class Wide(nn.Module):
    def forward(self, x):
        return F.silu(x.float()).to(torch.promote_types(x.dtype, torch.float32))


class Cubic(nn.Module):
    """GELU by tanh with a power, which autocast on a GPU leaves in fp32."""

    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


class Coarse(nn.Module):
    """Right in float64 alone."""

    def forward(self, x):
        return F.silu(x) if x.dtype == torch.float64 else F.hardswish(x)


class OfImages(nn.Module):
    def forward(self, x):
        return x * F.adaptive_avg_pool2d(x, 1).sigmoid()


class Complains(nn.Module):
    def forward(self, x):
        raise ValueError("it wants another input")


@pytest.mark.parametrize(
    "make", [Counting, Sloped, Lists, Noisy, OnlyInTraining, Wide, Cubic, Coarse, OfImages, Complains, nn.Mish]
)
def test_other_activations_that_are_left(make):
    """None leaves a trace: neither in the layer nor in torch's generator."""
    model = nn.Sequential(nn.BatchNorm2d(4), make(), Plain(relu=make()), NormAct(4, make()))
    before, state = copy.deepcopy([vars(module) for module in model.modules()]), torch.get_rng_state()
    report = []
    dlkit.fuse(model, report=report)
    assert not fused_layers(model) and "with its activation" not in repr(model)
    assert [change.after for change in report] == [change.before for change in report] and len(report) == 3
    assert torch.equal(torch.get_rng_state(), state)
    for module, old in zip(model.modules(), before, strict=True):
        assert {n: v for n, v in vars(module).items() if n[0] != "_"} == {n: v for n, v in old.items() if n[0] != "_"}


class Steep(nn.Module):
    def __init__(self, ceiling):
        super().__init__()
        self.ceiling = ceiling

    def forward(self, x):
        return x.clamp(0, self.ceiling)


def test_an_attribute_decides():
    """Which is remembered; a norm that has it as a child of its own leaves it."""
    model = nn.Sequential(Plain(relu=Steep(6)), Plain(relu=Steep(5)), NormAct(4, Steep(6)))
    dlkit.fuse(model)
    assert [type(module.bn) for module in model[:2]] == [dlkit.nn.BatchNormAct2d, nn.BatchNorm2d]
    assert "with its activation" not in repr(model)
    x = torch.randn(2, 4, 3, 3)
    model(x)
    model[0].relu.ceiling = 5
    with pytest.raises(RuntimeError, match="ceiling was 6"):
        model(x)


class OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def replaced_forward():
    layer = nn.BatchNorm2d(4)
    layer.forward = layer.forward
    return layer


UNUSUAL = {
    "subclass": (lambda: OwnBatchNorm(4), "subclass of torch.nn"),
    "replaced": (replaced_forward, "replaced on the instance"),
    "lazy": (nn.LazyBatchNorm2d, "not initialised"),
    "hook": (lambda: hooked("register_forward_hook"), "hooks"),
    "pre_hook": (lambda: hooked("register_forward_pre_hook"), "hooks"),
    "backward_hook": (lambda: hooked("register_full_backward_hook"), "hooks"),
    "parametrized": (
        lambda: nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(4), "weight", nn.Identity()),
        "subclass of torch.nn",
    ),
}


@pytest.mark.parametrize("make, reason", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_layers_are_left(make, reason):
    for wrap in (lambda layer: nn.Sequential(layer, nn.ReLU()), Plain):
        layer, report = make(), []
        model, cls = wrap(layer), type(layer)
        dlkit.fuse(model, report=report)
        assert type(layer) is cls and reason in report[0].reason and len(report) == 1
        assert not any(
            isinstance(module, nn.Identity) and "parametrizations" not in n for n, module in model.named_modules()
        )


def test_shared_layers_and_unusual_relus_are_left():
    shared = nn.BatchNorm2d(4)
    pair = nn.Sequential(Plain(shared), Plain(shared))
    block = Plain()
    twice = nn.Sequential(block, block)
    hooked_relu = hooked("register_forward_hook", lambda _: nn.ReLU())
    report: list = []
    for model in (pair, nn.Sequential(nn.BatchNorm2d(4), hooked_relu), Plain(relu=hooked_relu), Plain(relu=nn.CELU())):
        dlkit.fuse(model, report=report)
        assert not fused_layers(model)
    assert "registered in several places" in report[0].reason
    assert "the activation after it is left: it has hooks" in report[-3].reason
    dlkit.fuse(twice)  # a block in two places has its layers only once
    assert fused_layers(twice) == ["0.bn"]
    x = torch.randn(2, 4, 3, 3)
    assert twice(x).shape == x.shape


def test_owners_that_are_not_plain_modules_are_left():
    replaced = Plain()
    replaced.forward = replaced.forward
    report: list = []
    for model in (replaced, nn.ModuleList([nn.BatchNorm2d(4), nn.ReLU()]), torch.fx.symbolic_trace(Plain())):
        dlkit.fuse(model, report=report)
        assert not fused_layers(model)
    assert [("replaced" in c.reason, "from outside" in c.reason) for c in report] == [(True, False)] + 2 * [
        (False, True)
    ]
