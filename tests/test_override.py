"""override(): dlkit's kernels serve torch's own functions. patch(): models built later."""

import copy
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import dlkit

SHAPES = {"rows": (2, 3, 4), "images": (2, 4, 2, 3)}
NORMS = {
    "layer_norm": ("rows", lambda x, w, b: F.layer_norm(x, (4,), w, b, 1e-4)),
    "rms_norm": ("rows", lambda x, w, b: F.rms_norm(x, (4,), w, 1e-4) + b.sum()),
    "group_norm": ("images", lambda x, w, b: F.group_norm(x, 2, w, b, 1e-4)),
    "batch_norm": ("images", lambda x, w, b: F.batch_norm(x, None, None, w, b, True, 0.3, 1e-4)),
    "instance_norm": ("images", lambda x, w, b: F.instance_norm(x, None, None, w, b, True, 0.3, 1e-4)),
}
CASES = pytest.mark.parametrize("name", NORMS)
DROPOUTS = {
    "dropout": (F.dropout, (6, 5), {}),
    "dropout1d": (F.dropout1d, (4, 8, 3), {}),
    "dropout2d": (F.dropout2d, (4, 8, 3, 2), {}),
    "dropout3d": (F.dropout3d, (4, 8, 3, 2, 2), {}),
    "alpha_dropout": (F.alpha_dropout, (6, 5), {"training": True}),
    "feature_alpha_dropout": (F.feature_alpha_dropout, (4, 8, 3), {"training": True}),
}


def inputs(name, dtype=torch.float64):
    shape = SHAPES[NORMS[name][0]]
    channels = shape[-1] if NORMS[name][0] == "rows" else shape[1]
    made = torch.randn(shape), torch.rand(channels) + 0.5, torch.randn(channels)
    return [t.to(dtype).requires_grad_() for t in made]


def run(function, leaves):
    y = function(*leaves)
    return [y, *torch.autograd.grad(y.sin().sum(), leaves)]


@pytest.fixture(autouse=True)
def nothing_is_left_on():
    yield
    assert dlkit._override._depth == 0
    assert "Native" in F.layer_norm(torch.ones(2, 4, requires_grad=True), (4,)).grad_fn.name()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@CASES
def test_norms_are_served(name, dtype):
    leaves, function = inputs(name, dtype), NORMS[name][1]
    expected = run(function, leaves)
    with dlkit.override() as on:
        found = run(function, leaves)
    assert on.calls[name] == (1, 0) and sum(map(sum, on.calls.values())) == 1
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("soft", [False, True], ids=["classes", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_served(reduction, soft):
    x = torch.randn(5, 7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(7, dtype=torch.float64) + 0.5
    target = torch.randn(5, 7, 3, dtype=torch.float64).softmax(1) if soft else torch.randint(0, 7, (5, 3))
    layer = nn.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=0.1)

    def derivatives():
        loss = layer(x, target)
        (first,) = torch.autograd.grad(loss.sin().sum(), x, create_graph=True)
        return [loss, first, *torch.autograd.grad(first.square().sum(), x)]

    expected = derivatives()
    with dlkit.override() as on:
        found = derivatives()
    assert on.calls["cross_entropy"] == (1, 1)  # its second derivative is that of torch's own
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_cross_entropy_that_dlkit_refuses_raises_as_torch_s():
    x = torch.randn(4, 3)
    for target in (torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1]), torch.zeros(4, dtype=torch.int32)):
        with pytest.raises(Exception) as theirs:
            F.cross_entropy(x, target)
        with dlkit.override(), pytest.raises(type(theirs.value)) as ours:
            F.cross_entropy(x, target)
        assert str(ours.value) == str(theirs.value)
    with dlkit.override() as on, torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(x.bfloat16(), torch.tensor([0, 1, 2, -100]))
    assert loss.dtype == torch.float32 and on.calls["cross_entropy"] == (1, 0)


def test_running_statistics():
    results = []
    for on in (False, True):
        torch.manual_seed(1)
        layers = nn.Sequential(nn.BatchNorm2d(8), nn.InstanceNorm2d(8, affine=True, track_running_stats=True)).double()
        images = torch.randn(4, 8, 5, 3, dtype=torch.float64)
        if on:
            with dlkit.override() as override:
                trained = layers(images), layers.eval()(images)
            assert override.calls["batch_norm"] == (2, 0) and override.calls["instance_norm"] == (2, 0)
        else:
            trained = layers(images), layers.eval()(images)
        results.append([*trained, *layers.state_dict().values()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", DROPOUTS)
def test_dropouts_are_dlkit_s(name, inplace):
    function, shape, options = DROPOUTS[name]
    data = torch.rand(shape, dtype=torch.float64) + 1
    ours = getattr(dlkit.functional, name)
    torch.manual_seed(3)
    expected = ours(data, 0.4, **options)
    torch.manual_seed(3)
    leaf = data.clone().requires_grad_()
    with dlkit.override() as on:
        given = leaf * 1
        y = function(given, 0.4, inplace=inplace, **options)
        assert (y is given) == inplace
        grad = torch.autograd.grad(y.sum(), leaf)[0]
        plain = function(data, 0.4, training=False), function(data, 0.0, **options)
    assert torch.equal(y, expected) and on.calls["dropout"][0] == 1
    assert torch.equal(grad != 0, (y == data.clone().mul_(0)).logical_not()) or "alpha" in name
    assert all(torch.equal(t, data) for t in plain)
    with dlkit.override(), pytest.raises(ValueError, match="probability"):
        function(data, 1.5, **options)


def test_attention_s_dropout_is_dlkit_s():
    q, k, v = (torch.randn(2, 2, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    torch.manual_seed(3)
    weights = dlkit.functional.dropout(torch.softmax(q @ k.transpose(-2, -1) / 8**0.5, -1), 0.3)
    expected = weights @ v
    torch.manual_seed(3)
    with dlkit.override() as on:
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    assert on.calls["dropout"] == (1, 0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v))
    )


@CASES
def test_double_backward(name):
    leaves = inputs(name)
    with dlkit.override():
        assert torch.autograd.gradgradcheck(lambda *t: NORMS[name][1](*t).sin(), leaves)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_repeats_its_masks(reentrant):
    data = torch.rand(50, 20, dtype=torch.float64).requires_grad_()

    def block(t):
        return F.dropout(F.layer_norm(t, (20,)), 0.5) * t

    with dlkit.override():
        torch.manual_seed(1)
        expected = torch.autograd.grad(block(data).sum(), data)[0]
        torch.manual_seed(1)
        found = checkpoint(block, data, use_reentrant=reentrant)
        found.sum().backward()
    torch.testing.assert_close(data.grad, expected)


def test_a_backward_pass_may_run_after_it():
    leaves = inputs("layer_norm")
    with dlkit.override():
        y = NORMS["layer_norm"][1](*leaves)
    found = torch.autograd.grad(y.sin().sum(), leaves)
    torch.testing.assert_close(list(found), run(NORMS["layer_norm"][1], leaves)[1:])


class Wrapped(torch.Tensor):
    """A subclass that has its own dispatch."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        seen.append(func._schema.name)
        inner = torch.utils._pytree.tree_map(lambda t: t.inner if isinstance(t, cls) else t, args)
        out = func(*inner, **(kwargs or {}))
        return torch.utils._pytree.tree_map(lambda t: cls(t) if isinstance(t, torch.Tensor) else t, out)


seen: list = []


def test_what_it_declines():
    data = torch.randn(3, 4, dtype=torch.float64)
    with dlkit.override() as on:
        seen.clear()
        F.layer_norm(Wrapped(data), (4,))
        assert seen and not any("dlkit" in name for name in seen)
        torch.func.grad(lambda t: F.layer_norm(t, (4,)).sin().sum())(data)
        torch.func.vmap(lambda t: F.layer_norm(t, (4,)))(data)
        torch.func.jvp(lambda t: F.layer_norm(t, (4,)), (data,), (data,))
        F.rms_norm(data.to(torch.complex128), (4,))
        F.layer_norm(data.to("meta"), (4,))
        assert on.calls["layer_norm"][0] == on.calls["rms_norm"][0] == 0 and on.calls["layer_norm"][1] >= 3
        with pytest.raises(RuntimeError):
            F.layer_norm(data, (5,))


def test_compiled_programs_hold_torch_s_ops():
    graphs, leaves = [], inputs("layer_norm", torch.float32)

    def function(data, weight, bias):
        return F.dropout(NORMS["layer_norm"][1](data, weight, bias), 0.0).sum()

    def spy(graph, _):
        graphs.append(graph.code)
        return graph

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=spy)
    with dlkit.override() as on:
        torch.compile(function, backend=backend, fullgraph=True)(*leaves).backward()
        assert on.calls["layer_norm"][0] == 0
        program = torch.export.export(nn.LayerNorm(4), (torch.randn(3, 4),))
    assert graphs and not any("dlkit" in code for code in graphs)
    assert "dlkit" not in str(program.graph) and "aten.layer_norm" in str(program.graph)


def test_what_is_traced_afterwards_is_right():
    """torch caches the kernels that its Python dispatcher finds: stale ones made gradients of compiled transforms 0."""

    def function(data, weight):
        return torch.func.grad(lambda x: (F.layer_norm(x, (4,), weight) ** 3).sum())(data)

    data, weight = torch.randn(3, 2, 4), torch.rand(4)
    with dlkit.override():
        torch.export.export(nn.LayerNorm(4), (torch.randn(3, 4),))
    torch._dynamo.reset()
    transformed = torch.func.vmap(function, in_dims=(0, None))
    compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(data, weight), transformed(data, weight))


def test_it_nests_and_counts_from_its_beginning():
    data = torch.randn(3, 4)
    outer = dlkit.override()
    F.layer_norm(data, (4,))
    with dlkit.override() as inner:
        F.layer_norm(data, (4,))
        assert inner.calls["layer_norm"] == (1, 0)
    F.layer_norm(data, (4,))
    assert outer.calls["layer_norm"] == (3, 0) and "layer_norm" in repr(outer)
    outer.undo()
    outer.undo()
    F.layer_norm(data, (4,))
    assert outer.calls["layer_norm"] == (3, 0) and "undone" in repr(outer)
    with pytest.raises(KeyError), dlkit.override():
        raise KeyError


def test_inference_mode_is_served():
    data = torch.randn(3, 4)
    with dlkit.override() as on, torch.inference_mode():
        y = F.layer_norm(data, (4,))
    assert on.calls["layer_norm"] == (1, 0) and y.is_inference()
    torch.testing.assert_close(y.clone(), F.layer_norm(data, (4,)))


# patch()


class Block(nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.norm = nn.LayerNorm(size)


class Network(Block):
    def __init__(self, size=4):
        super().__init__(size)
        self.blocks = nn.ModuleList([Block(size), Block(size)])
        assert type(self.norm) is nn.LayerNorm  # the outermost constructor ends first


class Inheriting(Network):
    pass


@pytest.fixture
def package(monkeypatch):
    """A package with a module ``models`` that defines the classes above."""
    home, models = types.ModuleType("others_package"), types.ModuleType("others_package.models")
    for module in (home, models):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for cls in (Block, Network, Inheriting):
        monkeypatch.setattr(cls, "__module__", models.__name__)
        setattr(models, cls.__name__, cls)
    return home


def norms(model):
    return {type(module) for module in model.modules() if isinstance(module, nn.LayerNorm)}


@pytest.mark.parametrize("named", ["name", "module", "class"])
def test_patch(package, named):
    before = {cls: vars(cls).get("__init__") for cls in (Block, Network, Inheriting)}
    given = {"name": "others_package", "module": package, "class": Inheriting}[named]
    with dlkit.patch(given) as patched:
        model = Inheriting(size=6)
        assert norms(model) == {dlkit.nn.LayerNorm} and model.norm.normalized_shape == (6,)
        assert norms(Network()) == ({nn.LayerNorm} if named == "class" else {dlkit.nn.LayerNorm})
        with torch.device("meta"):
            assert norms(Inheriting()) == {dlkit.nn.LayerNorm}
    assert norms(Inheriting()) == {nn.LayerNorm} and norms(copy.deepcopy(model)) == {dlkit.nn.LayerNorm}
    assert {cls: vars(cls).get("__init__") for cls in before} == before and "undone" in repr(patched)
    assert norms(dlkit.restore(model)) == {nn.LayerNorm}


def test_patch_without_a_block_and_errors(package):
    patched = dlkit.patch("others_package.models")
    assert norms(Network()) == {dlkit.nn.LayerNorm}
    with pytest.raises(TypeError):
        Network(1, 2, 3)
    assert norms(Network()) == {dlkit.nn.LayerNorm}
    patched.undo()
    assert norms(Network()) == {nn.LayerNorm}
    with pytest.raises(ValueError, match=r"subclasses of torch\.nn\.Module"):
        dlkit.patch("json")
    with pytest.raises(ImportError):
        dlkit.patch("no_such_package")
