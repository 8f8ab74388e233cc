"""replace() on layers of other classes: recognized by their results, which are compared by running them, and left where
they differ."""

import copy
import pickle

import pytest
import torch
from support.training import assert_same_training
from torch import nn

import dlkit
from dlkit import _trial

LOW = (torch.bfloat16, torch.float16)


class Norm(nn.Module):
    """Shared by the classes below: a weight, and eps under a name of its own."""

    def __init__(self, size=16, eps=1e-4):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.epsilon = eps


class RoundedFirstNorm(Norm):
    def forward(self, states):
        wide = states.to(torch.float32)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(states.dtype)


class RoundedLastNorm(Norm):
    def forward(self, states):
        wide = states.float()
        wide = wide / (wide.square().mean(-1, keepdim=True) + self.epsilon).sqrt()
        return (wide * (1.0 + self.weight.float())).type_as(states)


class WeightsDtypeNorm(Norm):
    def forward(self, states):
        states = states * torch.rsqrt(states.to(torch.float32).square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * (states.to(self.weight.dtype) if self.weight.dtype in LOW else states)


class PerHeadLayerNorm(Norm):
    def __init__(self):
        super().__init__((2, 8))

    def forward(self, states):
        wide = states.float()
        wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (self.weight.float() * wide).to(states.dtype)


class WeightlessNorm(nn.Module):
    def forward(self, states):
        return nn.functional.layer_norm(states.float(), states.shape[-1:], eps=1e-5).to(states.dtype)


class ChannelsNorm(Norm):
    """Normalizes over channels in elementary ops: the result is channels_last where the input is."""

    def __init__(self, size=16):
        super().__init__(size)
        self.bias = nn.Parameter(torch.randn(size))

    def forward(self, images):
        mean = images.mean(1, keepdim=True)
        variance = (images - mean).square().mean(1, keepdim=True)
        images = (images - mean) / torch.sqrt(variance + self.epsilon)
        return self.weight[:, None, None] * images + self.bias[:, None, None]


class GatedNormBefore(Norm):
    def forward(self, states, gate):
        wide = states.float() * nn.functional.silu(gate.float())
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(states.dtype)


class GatedNormAfter(Norm):
    def forward(self, states, gate):
        wide = states.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        wide = self.weight * wide.to(states.dtype) * nn.functional.silu(gate.float())
        return wide.to(states.dtype)


class FrozenNorm(nn.Module):
    def __init__(self, size=16):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(size) + 0.5)

    def forward(self, images):
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        shift = (self.bias - self.running_mean * scale.flatten()).reshape(1, -1, 1, 1)
        return images * scale + shift


class LayerNorm2d(nn.LayerNorm):
    def forward(self, images):
        return super().forward(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormOfWidened(nn.LayerNorm):
    def forward(self, states):
        weight, bias = self.weight.float(), self.bias.float()
        return nn.functional.layer_norm(states.float(), self.normalized_shape, weight, bias, self.eps).to(states.dtype)


class PlusOne(nn.LayerNorm):
    def forward(self, states):
        return nn.functional.layer_norm(states, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class BatchNormAct(nn.BatchNorm2d):
    def __init__(self, size=16, act=None):
        super().__init__(size)
        self.act = act or nn.SiLU()

    def forward(self, images):
        return self.act(super().forward(images))


class GroupNormAct(nn.GroupNorm):
    def __init__(self):
        super().__init__(4, 16)
        self.act = nn.ReLU(inplace=True)

    def forward(self, images):
        return self.act(nn.functional.group_norm(images, self.num_groups, self.weight, self.bias, self.eps))


ROWS, IMAGES = (3, 5, 16), (3, 16, 4, 5)
OTHERS = {
    "rounded first": (RoundedFirstNorm, ROWS, "RMSNorm"),
    "rounded last": (RoundedLastNorm, ROWS, "RMSNorm, weight 1 + w"),
    "weight's dtype": (WeightsDtypeNorm, ROWS, "RMSNorm"),
    "heads": (PerHeadLayerNorm, (3, 5, 2, 8), "LayerNorm, of each head"),
    "no weight": (WeightlessNorm, ROWS, "LayerNorm, no weight"),
    "channels": (ChannelsNorm, IMAGES, "LayerNorm, over channels of channels_last input"),
    "gated before": (GatedNormBefore, ROWS, "RMSNorm, gated before it"),
    "gated after": (GatedNormAfter, ROWS, "RMSNorm, gated after it"),
    "frozen": (FrozenNorm, IMAGES, "BatchNorm of constants"),
    "permuted": (lambda: LayerNorm2d(16), IMAGES, "torch's norm, over channels"),
    "widened": (lambda: NormOfWidened(16), ROWS, "torch's norm"),
    "plus one": (lambda: PlusOne(16), ROWS, "LayerNorm, weight 1 + w"),
    "batch norm": (BatchNormAct, IMAGES, "torch's norm, then act"),
    "group norm": (GroupNormAct, IMAGES, "torch's norm, then act"),
}
CASES = pytest.mark.parametrize("make, shape, form", OTHERS.values(), ids=OTHERS)
RMS = ["rounded first", "rounded last", "weight's dtype", "gated before", "gated after"]


def replaced(layer):
    report = []
    twin = dlkit.replace(copy.deepcopy(layer), report=report)
    assert [change.before is not change.after for change in report] == [True], report
    return twin, report[0]


def inputs_of(layer, shape, dtype):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    if isinstance(layer, ChannelsNorm):
        x = x.to(memory_format=torch.channels_last)
    return (x, torch.randn_like(x)) if "Gated" in type(layer).__name__ else (x,)


def run(layer, inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = layer(*inputs)
    grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, [*inputs, *layer.parameters()], grad)
    return [y.detach(), *grads, *(b.clone() for b in layer.buffers())]


def widened(layer, inputs):
    """The exact result of a layer that may compute in fp32 for any input dtype."""
    with _trial._Widened():
        return run(copy.deepcopy(layer).double(), [x.double() for x in inputs])


@CASES
def test_others_become_what_they_compute(make, shape, form):
    layer = make()
    cls = type(layer)
    twin, change = replaced(layer)
    assert change.reason.startswith(f"verified: {form}, largest difference ")
    assert float(change.reason.split()[-3]) < 1e-12
    assert isinstance(twin, cls) and type(twin).__name__ == cls.__name__ and type(twin).__module__ == cls.__module__
    assert f"dlkit: {form})" in repr(twin).replace("\n", "")[-200:] or f"dlkit: {form}" in twin.extra_repr()
    assert list(twin.state_dict()) == list(layer.state_dict()) and list(vars(twin)) == list(vars(layer))
    x = inputs_of(layer, shape, torch.float32)
    for found, expected in zip(run(twin, x), run(layer, x), strict=True):
        torch.testing.assert_close(found, expected)
    assert type(dlkit.restore(twin)) is cls


@CASES
def test_float64_is_the_original_s(make, shape, form):
    layer = make().double()
    twin, _ = replaced(layer)
    inputs = inputs_of(layer, shape, torch.float64)
    for found, expected in zip(run(twin, inputs), run(layer, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["fp32 parameters", "same"])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@CASES
def test_other_dtypes_are_no_farther_from_float64(make, shape, form, dtype, parameters):
    """The output also has the original's dtype and strides."""
    layer = make().to(parameters or dtype)
    twin, _ = replaced(layer)
    inputs = inputs_of(layer, shape, dtype)
    exacts = widened(layer, inputs)
    try:
        originals = run(layer, inputs)
    except RuntimeError:
        pytest.skip("the original does not take these dtypes")
    results = run(twin, inputs)
    assert results[0].stride() == originals[0].stride()
    for found, original, exact in zip(results, originals, exacts, strict=True):
        assert found.dtype == original.dtype
        if not found.is_floating_point():
            continue
        scale = float(exact.abs().max())
        error, allowed = ((t.double() - exact).abs().max() / scale for t in (found, original))
        assert error <= 1.05 * allowed + 2 * torch.finfo(found.dtype).eps


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", RMS)
def test_the_order_of_rounding_is_the_original_s(name, dtype):
    make, _, _ = OTHERS[name]
    layer = make().to(dtype)
    twin, _ = replaced(layer)
    inputs = inputs_of(layer, (64, 16), dtype)
    found, expected = twin(*inputs), layer(*inputs)
    assert (found == expected).double().mean() > 0.99
    fused = torch.nn.functional.rms_norm(inputs[0], (16,), layer.weight, layer.epsilon)
    if name in ("rounded first", "weight's dtype"):  # the result of a single rounding at the end
        assert (fused == expected).double().mean() < 0.95


@CASES
def test_kernels_serve(make, shape, form, monkeypatch):
    """Checks that kernels run: results would also be right if the original forward() served every call."""
    layer = make()
    twin, _ = replaced(layer)
    calls = []
    places = [(dlkit.functional, name) for name in ("layer_norm", "rms_norm", "group_norm", "batch_norm")]
    for module, name in (*places, (dlkit.nn.batch_norm, "_batch_norm")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, own=own: calls.append(1) or own(*args))
    for dtype in (torch.float32, torch.bfloat16):
        twin.to(dtype)(*inputs_of(layer, shape, dtype))
    assert len(calls) == 2


@CASES
def test_copies_pickles_hooks_and_meta(make, shape, form):
    layer = make()
    twin, _ = replaced(layer)
    x, seen = inputs_of(layer, shape, torch.float32), []
    twin.register_forward_hook(lambda *_: seen.append(1))
    expected = twin(*x)
    again = copy.deepcopy(twin)
    torch.testing.assert_close(again(*x), expected)
    assert type(again) is type(twin) and len(seen) == 2
    unhooked = dlkit.replace(copy.deepcopy(layer))
    assert type(pickle.loads(pickle.dumps(unhooked))) is type(twin)
    meta = dlkit.replace(copy.deepcopy(layer).to("meta"))
    assert type(meta) is type(twin)
    meta.to_empty(device="cpu").load_state_dict(layer.state_dict())
    torch.testing.assert_close(meta(*x), layer(*x))


@CASES
def test_a_trial_leaves_no_trace(make, shape, form):
    layer, _trial._proofs = make(), type(_trial._proofs)()
    layer.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    layer.register_forward_pre_hook(lambda *_: pytest.fail("a hook was called"))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    random, training, facts = torch.get_rng_state(), layer.training, dict(vars(layer))
    with torch.no_grad():
        dlkit.replace(layer)
    assert torch.equal(torch.get_rng_state(), random) and layer.training == training and vars(layer) == facts
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert all(parameter.grad is None for parameter in layer.parameters())


# Layers that are left


class EpsOutsideNorm(Norm):
    def forward(self, states):
        return self.weight * states / (states.square().mean(-1, keepdim=True).sqrt() + self.epsilon)


class UnbiasedNorm(Norm):
    def forward(self, states):
        return self.weight * (states - states.mean(-1, keepdim=True)) / (states.std(-1, keepdim=True) + self.epsilon)


class DetachedNorm(Norm):
    """Right result, wrong gradient."""

    def forward(self, states):
        scale = torch.rsqrt(states.detach().square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * states * scale


class NoisyNorm(nn.LayerNorm):
    """A norm only in evaluation."""

    def forward(self, states):
        y = super().forward(states)
        return y + 0.01 if self.training else y


class MaskedNorm(nn.LayerNorm):
    def forward(self, states, mask):
        return super().forward(states) * mask


class CountingBatchNorm(nn.BatchNorm2d):
    """Right result, different buffers."""

    def forward(self, images):
        y = super().forward(images)
        with torch.no_grad():
            self.running_mean += 1
        return y


class BarelyNorm(Norm):
    def forward(self, states):
        return self.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.epsilon) * (1 + 1e-7)


LEFT = [EpsOutsideNorm, UnbiasedNorm, DetachedNorm, BarelyNorm]
LEFT += [lambda: NoisyNorm(16), lambda: MaskedNorm(16), lambda: CountingBatchNorm(16)]


@pytest.mark.parametrize("make", LEFT, ids=lambda make: type(make()).__name__)
def test_what_computes_something_else_is_left(make):
    layer, report = make(), []
    cls = type(layer)
    dlkit.replace(layer, report=report)
    assert type(layer) is cls and "gives something else than any norm of dlkit" in report[0].reason


def test_what_was_not_proven_goes_to_the_original():
    calls = []

    class OptionNorm(Norm):
        scale = None

        def __init__(self):
            super().__init__()
            self.twice = False

        def forward(self, states):
            calls.append(1)
            y = self.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.epsilon)
            return 2 * y if self.twice else y

    layer, x = OptionNorm(), torch.randn(3, 16)
    twin = dlkit.replace(copy.deepcopy(layer))
    calls.clear()
    once = twin(x)
    assert not calls
    twin.epsilon = layer.epsilon = 0.5  # is read at each call
    torch.testing.assert_close(twin(x), layer(x))
    twin.epsilon, twin.twice = 1e-4, True
    calls.clear()
    torch.testing.assert_close(twin(x), 2 * once)
    torch.testing.assert_close(twin(states=x), 2 * once)
    assert len(calls) == 2


def test_a_norm_over_channels_of_a_contiguous_input_is_the_original_s(monkeypatch):
    layer, x = ChannelsNorm(), torch.randn(IMAGES)
    twin, _ = replaced(layer)
    monkeypatch.setattr(dlkit.functional, "layer_norm", lambda *_: pytest.fail("it was served"))
    assert torch.equal(twin(x), layer(x))
    left = dlkit.report(nn.Sequential(twin), x).rows
    assert [(row.what, row.reached) for row in left] == [("ChannelsNorm", False)] and "layouts" in left[0].reason


def test_verify_false_leaves_other_classes():
    report = []
    net = dlkit.replace(
        nn.Sequential(RoundedFirstNorm(), nn.LayerNorm(16), LayerNorm2d(16)), report=report, verify=False
    )
    assert [type(layer) for layer in net] == [RoundedFirstNorm, dlkit.nn.LayerNorm, LayerNorm2d]
    assert "verify=False" in report[0].reason and "subclass" in report[2].reason


def test_a_large_parameter_is_not_tried():
    class NormedTable(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2000, 300))

        def forward(self, x):
            raise AssertionError("it was run")

    layer = nn.LayerNorm((1000, 400))
    layer.__class__ = NormOfWidened
    report = []
    assert type(dlkit.replace(NormedTable(), report=report)) is NormedTable and not report
    assert type(dlkit.replace(layer, report=report)) is NormOfWidened and "are not tried" in report[0].reason


def test_children_added_later_are_called():
    layer = BatchNormAct()
    twin, _ = replaced(layer)
    twin.drop = nn.Identity()
    x = torch.randn(IMAGES)
    torch.testing.assert_close(twin(x), layer(x))


# Compilers


@pytest.mark.parametrize("name", ["rounded first", "channels", "gated after", "batch norm", "permuted"])
def test_compiled_exported_and_traced(name):
    make, shape, _ = OTHERS[name]
    layer = make()
    twin, _ = replaced(layer)
    x = inputs_of(layer, shape, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for found, expected in zip(run(compiled, x), run(copy.deepcopy(layer), x), strict=True):
        torch.testing.assert_close(found, expected)
    layer, twin = layer.eval(), twin.eval()
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(torch.export.export(twin, x).module()(*x), layer(*x))
    torch.testing.assert_close(torch.jit.trace(twin, x)(*x), layer(*x))
    with pytest.raises(TypeError, match=r"dlkit\.restore"):
        torch.jit.script(twin)


def test_torch_fx_traces_the_original():
    layer, x = nn.Sequential(RoundedFirstNorm()), torch.randn(ROWS)
    traced = torch.fx.symbolic_trace(dlkit.replace(copy.deepcopy(layer)))
    torch.testing.assert_close(traced(x), layer(x))


def test_autocast_casts_as_the_original():
    """On a GPU norms under autocast return fp32; a layer that casts it back still does."""
    with _trial._LikeAutocast():
        assert LayerNorm2d(16).bfloat16()(torch.randn(IMAGES).bfloat16()).dtype == torch.float32
    twin, _ = replaced(NormOfWidened(16))
    assert dlkit._adopt.adopted(type(twin))[2][0].casts
    twin, _ = replaced(LayerNorm2d(16))
    assert not dlkit._adopt.adopted(type(twin))[2][0].casts


# Stochastic depth


class OwnDropPath(nn.Module):
    def __init__(self, drop_prob=0.3, scale=True):
        super().__init__()
        self.drop_prob, self.scale = drop_prob, scale

    def forward(self, x):
        if not self.training or not self.drop_prob:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype) >= self.drop_prob
        return x * keep / (1 - self.drop_prob if self.scale else 1)


class StochasticDepthOfBatch(OwnDropPath):
    def forward(self, x):
        return x if not self.training or torch.rand(()) > self.drop_prob else x * 0


def test_stochastic_depth():
    layer = dlkit.replace(OwnDropPath())
    assert isinstance(layer, OwnDropPath) and "dlkit: drop_path" in repr(layer)
    x = torch.rand(4000, 3, dtype=torch.float64) + 1
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    assert torch.equal(y, dlkit.functional.drop_path(x, 0.3))
    assert layer.eval()(x) is x
    layer.train().drop_prob = None
    assert layer(x) is x
    for other in (OwnDropPath(scale=False), StochasticDepthOfBatch()):
        report = []
        assert type(dlkit.replace(other, report=report)) is type(other) and "something else than drop_path" in str(
            report[0]
        )
    assert type(dlkit.restore(layer)) is OwnDropPath


class OwnDropBlock(nn.Module):
    def __init__(self, p=0.2, block_size=3, coupled=False):
        super().__init__()
        self.p, self.block_size, self.coupled = p, block_size, coupled

    def forward(self, x):
        if not self.training or not self.p:
            return x
        (height, width), size = x.shape[2:], self.block_size
        starts = (height - size + 1) * (width - size + 1)
        seeds = torch.rand(
            len(x), 1 if self.coupled else x.shape[1], height - size + 1, width - size + 1, dtype=x.dtype
        )
        seeds = (seeds < self.p / size**2 * height * width / starts).to(x.dtype)
        mask = (nn.functional.max_pool2d(nn.functional.pad(seeds, [size - 1] * 4), size, 1) == 0).to(x.dtype)
        return x * mask * (mask.numel() / mask.sum())


class HalfBlocks(OwnDropBlock):
    """Its blocks may reach over the border."""

    def forward(self, x):
        if not self.training or not self.p:
            return x
        seeds = (torch.rand_like(x) < self.p / self.block_size**2).to(x.dtype)
        mask = nn.functional.max_pool2d(nn.functional.pad(seeds, [1] * 4), 3, 1)[..., : x.shape[2], : x.shape[3]] == 0
        return x * mask * (mask.numel() / mask.sum())


class HalfDropBlock(HalfBlocks):
    pass


def test_dropblock():
    layer = dlkit.replace(OwnDropBlock())
    assert isinstance(layer, OwnDropBlock) and "dlkit: dropblock2d" in repr(layer)
    x = torch.rand(4, 3, 8, 7)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    assert torch.equal(y, dlkit.functional.dropblock2d(x, 0.2, 3)) and layer.eval()(x) is x
    layer.train().coupled = True  # was false when the layer was checked
    dropped = layer(x) == 0
    assert torch.equal(dropped[:, :1].expand_as(dropped), dropped)
    for other in (OwnDropBlock(coupled=True), HalfDropBlock()):
        report = []
        assert type(dlkit.replace(other, report=report)) is type(other) and "and dropblock2d" in str(report[0])
    assert pickle.loads(pickle.dumps(dlkit.replace(OwnDropBlock()))).block_size == 3


# register()


def gain_norm(module, x):
    return dlkit.functional.rms_norm(x, (16,), module.weight, module.epsilon)


def test_register(monkeypatch):
    monkeypatch.setattr(dlkit._adopt, "REGISTERED", {})

    class Odd(Norm):
        def forward(self, x):
            raise AssertionError

    assert type(dlkit.replace(Odd())) is Odd
    dlkit.register(Odd, lambda module: gain_norm if module.weight.numel() == 16 else None)
    report = []
    layer = dlkit.replace(Odd(), report=report)
    x = torch.randn(ROWS)
    assert torch.equal(layer(x), gain_norm(layer, x)) and report[0].reason == "its class is registered"
    assert isinstance(layer, Odd) and "dlkit: gain_norm" in repr(layer) and type(dlkit.restore(layer)) is Odd
    assert type(dlkit.replace(Odd(8), report=report)) is Odd and "leaves it" in report[1].reason
    with pytest.raises(TypeError, match=r"subclass of torch\.nn\.Module"):
        dlkit.register(int, gain_norm)
    with pytest.raises(TypeError, match="callable"):
        dlkit.register(Odd, None)


def test_training_goes_on_as_the_original_s():
    for make in (BatchNormAct, FrozenNorm):
        layer = make().double()
        twin = dlkit.replace(copy.deepcopy(layer))
        assert_same_training(layer, twin, torch.randn(IMAGES, dtype=torch.float64), (True, True, False))
