"""The layers in tools that trace, export, quantize or rewrite models: they behave as torch's own, or are refused with a
remedy."""

import contextlib
import copy
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from support.layers import CASES
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import dlkit
from dlkit import _native
from dlkit import functional as F
from dlkit._ops import op
from dlkit.surgery import TWINS

PLAIN = {twin: original for original, twin in TWINS.items()}
REMEDY = r"call dlkit\.restore\(model\) first"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


class Model(nn.Module):
    """A layer in a model, for tools that treat the outermost module as no layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


class OfTwo(Model):
    def forward(self, x, y):
        return self.layer(x, y)


class OfThree(Model):
    def forward(self, x, y, z):
        return self.layer(x, y, z)


def model_of(case):
    return (Model, OfTwo, OfThree)[len(case.shapes) - 1](case.make())


def assert_same(one, other, inputs, seed=0, **tolerance):
    torch.manual_seed(seed)
    expected = one(*inputs)
    torch.manual_seed(seed)
    torch.testing.assert_close(other(*inputs), expected, **tolerance)


def targets(graph):
    return [node.target for node in graph.nodes if node.op == "call_function"]


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request, one_thread):
    return request.param


# torch.fx


def test_every_layer_is_one_call_that_obeys_train_and_eval(case):
    model, inputs = model_of(case), case.inputs()
    traced = torch.fx.symbolic_trace(model.train())
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["layer"]
    for training in (False, True):
        assert_same(model.train(training), traced.train(training), inputs)


def test_what_is_around_a_layer_is_traced_once():
    class Doubled(dlkit.nn.LayerNorm):
        def forward(self, input):
            return super().forward(input) * 2

    hooked, dropout = dlkit.nn.LayerNorm(8), dlkit.nn.Dropout(0.5)
    hooked.register_forward_hook(lambda module, args, result: result * 2)
    dropout.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    given = dlkit.nn.LayerNorm(8)
    given.forward = lambda input: dlkit.nn.LayerNorm.forward(given, input) * 2
    model = nn.Sequential(Doubled(8), hooked, given, dropout).train()
    traced = torch.fx.symbolic_trace(model)
    for training in (True, False):
        assert_same(model.train(training), traced.train(training), (torch.randn(4, 8),))


def test_functions_are_traced():
    def function(x):
        x = F.dropout1d(x.flatten(2), 0.3) + F.dropout3d(x, 0.3).flatten(2)
        x = F.dropblock2d(F.dropout2d(x.unflatten(2, (4, 4)), 0.3), 0.3, 2)
        return F.group_norm(F.dropout(x), 2)

    x = torch.randn(4, 6, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(function, torch.fx.symbolic_trace(function), (x,))


# Programs for other places


class Several(nn.Module):
    """Each layer on inputs of its own: one export serves all."""

    def __init__(self, cases):
        super().__init__()
        self.layers = nn.ModuleDict({case.name: case.make() for case in cases})
        self.counts = [len(case.shapes) for case in cases]

    def forward(self, *inputs):
        results = []
        for layer, count in zip(self.layers.values(), self.counts, strict=True):
            results.append(layer(*inputs[:count]))
            inputs = inputs[count:]
        return tuple(results)


APART = ("MultiheadAttention", "LinearCrossEntropyLoss")  # their torch forms take other steps
TWIN_CASES = [case for case in CASES.values() if case.cls in PLAIN and case.name not in APART]
OTHER_CASES = [case for case in CASES.values() if case not in TWIN_CASES]


@pytest.mark.parametrize("training", [True, False])
def test_exported_twins_are_what_torch_exports(training):
    model, inputs = Several(TWIN_CASES).train(training), [x for case in TWIN_CASES for x in case.inputs()]
    plain = dlkit.restore(copy.deepcopy(model))
    exported = torch.export.export(model, tuple(inputs))
    assert targets(exported.graph) == targets(torch.export.export(plain, tuple(inputs)).graph)
    assert_same(plain, exported.module(), inputs)


def test_strict_export():
    model = nn.Sequential(dlkit.nn.LayerNorm(4), dlkit.nn.BatchNorm2d(3), dlkit.nn.Dropout())
    x = torch.randn(2, 3, 6, 4)
    exported = torch.export.export(model, (x,), strict=True)
    assert_same(dlkit.restore(copy.deepcopy(model)), exported.module(), (x,))
    names = [str(target) for target in targets(exported.graph)]
    assert names == ["aten.layer_norm.default", "aten.add_.Tensor", "aten.batch_norm.default", "aten.dropout.default"]


@pytest.mark.slow
def test_other_layers_are_exported_in_torch_s_terms():
    model, inputs = Several(OTHER_CASES), [x for case in OTHER_CASES for x in case.inputs()]
    for training in (True, False):
        exported = torch.export.export(model.train(training), tuple(inputs))
        assert {target.namespace for target in targets(exported.graph) if hasattr(target, "namespace")} == {"aten"}
    assert_same(model, exported.module(), inputs)


def test_traced_programs_hold_torch_s_ops(case):
    model, inputs = model_of(case), case.inputs()
    for training in (True, False):
        traced = torch.jit.trace(model.train(training), inputs, check_trace=False)
        assert "dlkit::" not in str(traced.inlined_graph)
    assert_same(model, traced, inputs)


@pytest.mark.slow
def test_programs_run_where_dlkit_is_not(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.GroupNorm(2, 6), nn.LayerNorm(4))
    model, x = dlkit.fuse(dlkit.replace(model)).eval(), torch.randn(2, 3, 6, 6)
    torch.jit.trace(model, x).save(tmp_path / "traced.pt")
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "exported.pt2")
    torch.save((x, model(x)), tmp_path / "expected.pt")
    program = """if True:
        import sys, torch
        x, expected = torch.load("expected.pt")
        for loaded in (torch.jit.load("traced.pt"), torch.export.load("exported.pt2").module()):
            torch.testing.assert_close(loaded(x), expected)
        assert "dlkit" not in sys.modules"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, check=True, env={"PYTHONPATH": ""})


def test_scripting_is_refused(case):
    model = model_of(case)
    remedy = REMEDY if type(model.layer) in PLAIN else r"torch\.jit\.trace"
    with pytest.raises(TypeError, match=remedy):
        torch.jit.script(model)
    if type(model.layer) in PLAIN and case.name not in ("SyncBatchNorm", "LinearCrossEntropyLoss"):  # nor can torch
        torch.jit.script(dlkit.restore(model))


def test_a_generator_is_not_exported():
    x, generator = torch.randn(8), torch.Generator()
    model = Model(dlkit.nn.Dropout())
    with dlkit.random.use(dlkit.random.Philox(1)), pytest.raises(RuntimeError, match="default generator"):
        torch.export.export(model, (x,))
    with pytest.raises(RuntimeError, match="default generator"):
        torch.jit.trace(lambda x: F.dropblock2d(x, 0.5, 2, generator=generator), torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "group_norm"])
def test_norms_in_torch_s_terms(name, dtype):
    x, residual = torch.randn(4, 6, dtype=dtype), torch.randn(4, 6, dtype=dtype)
    weight, bias = torch.randn(6), torch.randn(6)
    affine = (weight, 1e-3) if "rms" in name else (weight, bias, 1e-3)
    arguments = (x, residual) if "add" in name else (x,)
    arguments += (2 if name == "group_norm" else (6,), *affine)
    torch.testing.assert_close(getattr(_native, name)(*arguments), getattr(F, name)(*arguments))


def test_batch_norm_in_torch_s_terms():
    x, residual, weight, bias = torch.randn(4, 6, 5), torch.randn(4, 6, 5), torch.randn(6), torch.randn(6)
    for training, momentum in ((True, 0.3), (True, None), (False, 0.3)):
        results = []
        for function in (_native.batch_norm, op("batch_norm")):
            mean, var, count = torch.zeros(6), torch.ones(6), torch.tensor(2)
            for _ in range(2):
                y = function(x, mean, var, weight, bias, residual, count, training, momentum, 1e-3, True)
            results.append((y, mean, var, count))
        torch.testing.assert_close(*results)


DROPOUTS = {
    "dropout": (-1, False, (40, 50, 2)),
    "channels": (2, False, (40, 50, 4)),
    "samples": (1, False, (2000, 3)),
    "alpha": (-1, True, (40, 50, 2)),
    "alpha channels": (2, True, (40, 50, 4)),
}


@pytest.mark.parametrize(("mask_ndim", "alpha", "shape"), DROPOUTS.values(), ids=DROPOUTS)
def test_dropout_in_torch_s_terms(mask_ndim, alpha, shape):
    """torch's form gives the same values, the same within each channel or sample, and drops as many."""
    ours = op("dropout")(torch.ones(shape), 0.3, mask_ndim, alpha, None, None)
    torchs = _native.dropout(torch.ones(shape), 0.3, mask_ndim, alpha, generator=None, stream=None)
    torch.testing.assert_close(torchs.unique(), ours.unique())
    rows = torchs.flatten(mask_ndim) if mask_ndim > 0 else torchs.flatten()[:, None]
    assert (rows == rows[..., :1]).all()
    dropped = (rows[..., 0] == rows.min()).float()
    assert abs(dropped.mean() - 0.3) < 4 * (0.21 / dropped.numel()) ** 0.5
    in_place = torch.ones(shape)
    torch.manual_seed(1)
    _native.dropout_(in_place, 0.3, mask_ndim, alpha, generator=None, stream=None)
    torch.manual_seed(1)
    assert torch.equal(in_place, _native.dropout(torch.ones(shape), 0.3, mask_ndim, alpha))


@pytest.mark.parametrize("size", [1, 3, 9])
def test_dropblock_in_torch_s_terms(size):
    ours, torchs = (
        function(torch.ones(60, 8, 9, 7), 0.3, size, **options)
        for function, options in ((F.dropblock2d, {}), (_native.dropblock2d, {"generator": None, "stream": None}))
    )
    dropped = [(y == 0).float().mean() for y in (ours, torchs)]
    assert abs(dropped[0] - dropped[1]) < 0.08
    torch.testing.assert_close(torchs.mean(), torch.tensor(1.0))
    squares = torch.nn.functional.max_pool2d((torchs == 0).float(), min(size, 7), 1)  # where a square may be
    inside = 1 - torch.nn.functional.max_pool2d((torchs != 0).float(), min(size, 7), 1)  # where one is
    assert inside.sum() > 0 and (squares >= inside).all()


@pytest.mark.parametrize("name", ["bias_relu_dropout", "bias_gelu_dropout"])
def test_activations_in_torch_s_terms(name):
    x, bias = torch.randn(6, 8, dtype=torch.bfloat16), torch.randn(8)
    for approximate in ("none", "tanh") if "gelu" in name else (None,):
        options = {} if approximate is None else {"approximate": approximate}
        number = {None: 1, "none": 2, "tanh": 3}[approximate]
        found = _native.bias_act_dropout(x, bias, number, 0.0, generator=None, stream=None)
        torch.testing.assert_close(found, getattr(F, name)(x, bias, 0.0, **options))


# torch.ao.quantization and torch.fx's fusers


def convolutions():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Linear(4, 6), nn.BatchNorm2d(6))


def quantization():
    return __import__("torch.ao.quantization", fromlist=["fuse_modules"])


@pytest.mark.parametrize("training", [True, False])
def test_fuse_modules_makes_torch_s_of_ours(training):
    fuse = getattr(quantization(), "fuse_modules_qat" if training else "fuse_modules")
    model, x = convolutions()[:3].train(training), torch.randn(4, 3, 6, 6)
    for names in (["0", "1"], ["0", "1", "2"]):
        expected = fuse(copy.deepcopy(model), [names])
        found = fuse(dlkit.replace(copy.deepcopy(model)), [names])
        assert [type(layer) for layer in found.modules()] == [type(layer) for layer in expected.modules()]
        assert_same(expected, found, (x,))
        with pytest.raises(TypeError, match=REMEDY):
            fuse(dlkit.fuse(copy.deepcopy(model)), [names])


def test_quantization_is_refused():
    from torch.ao.quantization import quantize_fx
    from torch.fx.experimental import optimization

    def prepare(model):
        model.qconfig = quantization().get_default_qconfig()
        quantization().prepare(model)

    mapping, x = quantization().get_default_qconfig_mapping(), torch.randn(2, 3, 6, 6)
    for change in (dlkit.replace, dlkit.fuse):
        for convert in (
            prepare,
            optimization.fuse,
            quantize_fx.fuse_fx,
            lambda model: quantize_fx.prepare_fx(model, mapping, (x,)),
            lambda model: quantize_fx.prepare_qat_fx(model.train(), mapping, (x,)),
        ):
            with pytest.raises(TypeError, match=REMEDY):
                convert(change(convolutions().eval()))
    for convert in (prepare, lambda model: quantize_fx.prepare_fx(model, mapping, (x,))):
        with pytest.raises(TypeError, match="LayerNorm"):
            convert(nn.Sequential(nn.Linear(4, 4), dlkit.nn.LayerNorm(4)).eval())
    # Tools that do not touch the layers may run.
    dynamic = quantization().quantize_dynamic(dlkit.replace(convolutions().eval()), {nn.Linear})
    assert type(dynamic[1]) is dlkit.nn.BatchNorm2d and not hasattr(dynamic[1], "qconfig")
    assert len(list(optimization.remove_dropout(nn.Sequential(nn.ReLU(), dlkit.nn.Dropout())).graph.nodes)) == 3


# Per-sample gradients, rewritten weights, compiled autograd


@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "InstanceNorm1d"])
def test_per_sample_gradients(name):
    layer, (x,) = CASES[name].make(), CASES[name].inputs()
    results = []
    for made in (layer, dlkit.restore(copy.deepcopy(layer))):
        call_for_per_sample_grads(made)(x).square().sum().backward()
        results.append([parameter.grad_sample for parameter in made.parameters()])
    torch.testing.assert_close(*results)


def test_functional_call_takes_weights_and_buffers(case):
    layer, other, inputs = case.make(), case.make(), case.inputs()
    before, given = copy.deepcopy(layer.state_dict()), copy.deepcopy(other.state_dict())
    for training in (True, False):
        other.train(training), layer.train(training)
        assert_same(other, lambda *inputs: torch.func.functional_call(layer, given, inputs), inputs)
    torch.testing.assert_close(given, dict(other.state_dict()))
    torch.testing.assert_close(layer.state_dict(), before)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


REWRITES = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "prune bias": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "parametrize bias": lambda layer: parametrize.register_parametrization(layer, "bias", Doubled()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
def test_rewritten_weights(rewrite):
    """Rewriting before and after replace() gives the results of torch's layer."""
    done = []
    for case in CASES.values():
        plain = case.make()
        if case.cls not in PLAIN or getattr(plain, "weight", None) is None:
            continue
        plain = dlkit.restore(plain)
        if getattr(plain, "bias", None) is None and "bias" in rewrite.__code__.co_consts:
            continue
        made = [plain, dlkit.replace(copy.deepcopy(plain)), copy.deepcopy(plain)]
        for layer in made:
            torch.manual_seed(1)
            rewrite(layer)
        dlkit.replace(made[2])
        results = []
        inputs = case.inputs()
        for layer in made:
            y = layer(*inputs)
            y.sin().sum().backward()
            results.append((y, [parameter.grad for parameter in layer.parameters()], dict(layer.state_dict())))
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-4)
        done.append(case.name)
    assert len(done) >= 6


@pytest.mark.slow
def test_compiled_autograd_gives_the_same_gradients():
    """Cached graphs must not confuse different p, eps or random draws."""
    made = (dlkit.nn.Dropout, partial(dlkit.nn.DropoutAddLayerNorm, 8), partial(dlkit.nn.BatchNorm1d, 8))
    layers = [make(number) for number in (0.2, 0.7) for make in made]
    compiler = torch.compile(backend="eager")
    for seed in range(2):
        for layer in layers:
            x, grads = torch.randn(6, 8, requires_grad=True), []
            for context in (contextlib.nullcontext(), torch._dynamo.compiled_autograd._enable(compiler)):
                torch.manual_seed(seed)
                y = layer(x, x * 2) if isinstance(layer, dlkit.nn.DropoutAddLayerNorm) else layer(x)
                with context:
                    y.sin().sum().backward()
                grads.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
                x.grad = None
                layer.zero_grad()
            torch.testing.assert_close(*grads)
