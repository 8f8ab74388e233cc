"""Uses of saved tensors around every layer: checkpointing in each of its modes, offloading, users' own hooks. The
gradients must be those of the plain run, bit for bit, with the same masks."""

import copy
import functools
import pickle

import pytest
import torch
from support import layers
from torch.utils import checkpoint as checkpointing

import dlkit
import dlkit.functional as F

pytestmark = pytest.mark.sanitize

FEATURES = 8
ROWS, PLANES = (6, FEATURES), (4, FEATURES, 4, 4)
CLASSES = torch.tensor([0, 6, 2, 3, -100, 5])


class Twice(torch.nn.Module):
    """A layer with a residual, called with one input and a tensor computed from it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x, x.sin())
        return y if isinstance(y, torch.Tensor) else y[0] + 2 * y[1]


class Function(torch.nn.Module):
    def __init__(self, function, *shape):
        super().__init__()
        self.function = function
        self.bias = torch.nn.Parameter(torch.randn(shape)) if shape else None

    def forward(self, x):
        return self.function(x) if self.bias is None else self.function(x, self.bias)


class Attention(torch.nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.attention = dlkit.nn.MultiheadAttention(FEATURES, 2, dropout=0.3, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x):
        x = x.unflatten(0, (2, 3))
        return self.attention(x, x, x, need_weights=self.need_weights)[0].flatten(0, 1)


class Encoder(torch.nn.Module):
    def __init__(self, norm_first):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(FEATURES, 2, 16, 0.3, batch_first=True, norm_first=norm_first)
        self.layer = dlkit.fuse(dlkit.replace(layer))

    def forward(self, x):
        return self.layer(x.unflatten(0, (2, 3))).flatten(0, 1)


NN = dlkit.nn
LAYERS = {
    "LayerNorm": (ROWS, lambda: NN.LayerNorm(FEATURES)),
    "RMSNorm": (ROWS, lambda: NN.RMSNorm(FEATURES)),
    "AddLayerNorm": (ROWS, lambda: Twice(NN.AddLayerNorm(FEATURES))),
    "AddRMSNorm": (ROWS, lambda: Twice(NN.AddRMSNorm(FEATURES))),
    "DropoutAddLayerNorm": (ROWS, lambda: Twice(NN.DropoutAddLayerNorm(FEATURES, 0.3))),
    "DropoutAddRMSNorm-prenorm": (ROWS, lambda: Twice(NN.DropoutAddRMSNorm(FEATURES, 0.3, prenorm=True))),
    "BatchNorm1d": (ROWS, lambda: NN.BatchNorm1d(FEATURES)),
    "BatchNormReLU2d": (PLANES, lambda: NN.BatchNormReLU2d(FEATURES)),
    "BatchNormReLU2d-residual": (PLANES, lambda: Twice(NN.BatchNormReLU2d(FEATURES))),
    "BatchNormAct2d": (PLANES, lambda: NN.BatchNormAct2d(FEATURES)),
    "BatchNormAct2d-residual": (PLANES, lambda: Twice(NN.BatchNormAct2d(FEATURES))),
    "GroupNorm": (PLANES, lambda: NN.GroupNorm(2, FEATURES)),
    "GroupNormAct-residual": (PLANES, lambda: Twice(NN.GroupNormAct(2, FEATURES))),
    "InstanceNorm2d": (PLANES, lambda: NN.InstanceNorm2d(FEATURES, affine=True)),
    "Dropout": (ROWS, lambda: NN.Dropout(0.3)),
    "Dropout2d": (PLANES, lambda: NN.Dropout2d(0.3)),
    "AlphaDropout": (ROWS, lambda: NN.AlphaDropout(0.3)),
    "FeatureAlphaDropout": (PLANES, lambda: NN.FeatureAlphaDropout(0.3)),
    "DropoutAdd": (ROWS, lambda: Twice(NN.DropoutAdd(0.3))),
    "DropPath": (ROWS, lambda: NN.DropPath(0.3)),
    "DropConnectLinear": (ROWS, lambda: NN.DropConnectLinear(FEATURES, FEATURES, p=0.3)),
    "bias_gelu_dropout": (ROWS, lambda: Function(functools.partial(F.bias_gelu_dropout, p=0.3), FEATURES)),
    "bias_relu_dropout": (ROWS, lambda: Function(functools.partial(F.bias_relu_dropout, p=0.3), FEATURES)),
    "cross_entropy": (ROWS, lambda: Function(lambda x: F.cross_entropy(x, CLASSES, reduction="none")[:, None] * x)),
    "linear_cross_entropy": (
        ROWS,
        lambda: Function(lambda x, w: F.linear_cross_entropy(x, w, CLASSES, label_smoothing=0.1) * x, 7, FEATURES),
    ),
    "dropout-inplace": (ROWS, lambda: Function(lambda x: F.dropout(x * 2, 0.3, inplace=True))),
    "dropblock-inplace": (PLANES, lambda: Function(lambda x: F.dropblock2d(x * 2, 0.3, 2, inplace=True))),
    "MultiheadAttention": (ROWS, lambda: Attention(False)),
    "MultiheadAttention-weights": (ROWS, lambda: Attention(True)),
    "TransformerEncoderLayer": (ROWS, lambda: Encoder(False)),
    "TransformerEncoderLayer-norm_first": (ROWS, lambda: Encoder(True)),
}
for name, case in layers.OF_OPS.items():
    assert case.shapes in ((ROWS,), (PLANES,), (ROWS, ROWS), (PLANES, PLANES)), f"{name}: expected {ROWS} or {PLANES}"
    LAYERS[name] = case.shapes[0], case.make if len(case.shapes) == 1 else lambda case=case: Twice(case.make())


def mixing(shape):
    """Matrix products among the features, as a network has between its layers."""
    return torch.nn.Linear(FEATURES, FEATURES) if len(shape) == 2 else torch.nn.Conv2d(FEATURES, FEATURES, 1)


BLOCKS = {
    "alone": lambda layer, mix: layer,
    "first": lambda layer, mix: torch.nn.Sequential(layer, mix),
    "last": lambda layer, mix: torch.nn.Sequential(mix, layer),
    "branch": lambda layer, mix: Function(lambda x: x + layer(mix(x))),
    "both": lambda layer, mix: torch.nn.Sequential(layer, mix, copy.deepcopy(layer)),
}


def checkpointed(use_reentrant):
    return lambda block, x: checkpointing.checkpoint(block, x, use_reentrant=use_reentrant)


def nested(block, x):
    def inner(t):
        return checkpointing.checkpoint(block, t.cos(), use_reentrant=False).sin()

    return checkpointing.checkpoint(inner, x, use_reentrant=False)


def without_early_stop(block, x):
    with checkpointing.set_checkpoint_early_stop(False):
        return checkpointing.checkpoint(block, x, use_reentrant=False)


def selective(block, x):
    """Keeps the results of matrix products and recomputes the rest."""
    keep = [torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten.convolution.default]
    contexts = functools.partial(checkpointing.create_selective_checkpoint_contexts, keep)
    return checkpointing.checkpoint(block, x, use_reentrant=False, context_fn=contexts)


def offloaded(block, x):
    with torch.autograd.graph.save_on_cpu():
        return block(x)


def hooked(block, x):
    """Hooks that compute, as compressing ones do."""
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda t: (t, (t * 2).sum()), lambda packed: torch.where(packed[1] == packed[1], packed[0], packed[0])):
        return block(x)


def offloaded_and_checkpointed(block, x):
    with torch.autograd.graph.save_on_cpu():
        return checkpointing.checkpoint(block, x, use_reentrant=False)


MODES = {
    "reentrant": checkpointed(True),
    "non_reentrant": checkpointed(False),
    "without_early_stop": without_early_stop,
    "nested": nested,
    "selective": selective,
    "offloaded": offloaded,
    "hooked": hooked,
    "offloaded_and_checkpointed": offloaded_and_checkpointed,
}


def gradients(block, call, x, seed):
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    call(block, x).square().sum().backward()
    return [x.grad, *(p.grad for p in block.parameters())]


@pytest.mark.parametrize("where", BLOCKS)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_plain_run(name, where, seed, one_thread):
    shape, make_layer = LAYERS[name]
    block = BLOCKS[where](make_layer(), mixing(shape))
    x = torch.randn(shape)
    for mode, call in MODES.items():
        plain = (lambda b, t: b(t.cos()).sin()) if mode == "nested" else (lambda b, t: b(t))
        expected = gradients(copy.deepcopy(block), plain, x, seed)
        found = gradients(copy.deepcopy(block), call, x, seed)
        for got, wanted in zip(found, expected, strict=True):
            assert torch.equal(got, wanted), mode


def drawing_from(generator, *layers):
    """A function that draws from ``generator``, torch's default one, and it again, in layers with weights."""

    def function(x):
        x = F.dropout(layers[0](x).sin(), 0.3, generator=generator)
        x = F.bias_gelu_dropout(layers[1](F.dropout(x, 0.4)), None, 0.2, generator=generator)
        return F.dropout_add(x, x.cos(), 0.3, generator=generator)

    block = Function(function)
    block.layers = torch.nn.ModuleList(layers)
    return block


@pytest.mark.parametrize("mode", MODES)
def test_streams_and_generators_give_again_what_they_gave(mode, seed, one_thread):
    """torch restores only its default generators."""
    x = torch.randn(ROWS)
    layers = [mixing(ROWS), mixing(ROWS)]
    plain = (lambda b, t: b(t.cos()).sin()) if mode == "nested" else (lambda b, t: b(t))
    for source in (lambda: dlkit.random.Philox(3), lambda: torch.Generator().manual_seed(3)):
        results = []
        for call in (plain, MODES[mode]):
            generator = source()
            block = drawing_from(generator, *copy.deepcopy(layers))
            grads = [g for _ in range(2) for g in gradients(block, call, x, seed)]  # the second continues the stream
            where = generator.state_dict() if isinstance(generator, dlkit.random.Philox) else generator.get_state()
            results.append((grads, where))
        torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["Dropout", "DropoutAddLayerNorm", "DropBlock2d", "MultiheadAttention"])
def test_a_stream_in_use_need_not_be_in_backward(name, mode, seed, one_thread):
    shape, make_layer = LAYERS[name]
    block = torch.nn.Sequential(mixing(shape), make_layer(), mixing(shape), make_layer())
    x = torch.randn(shape)
    results = []
    for call in ((lambda b, t: b(t.cos()).sin()) if mode == "nested" else (lambda b, t: b(t)), MODES[mode]):
        for outside in (True, False):
            own, stream, leaf = copy.deepcopy(block), dlkit.random.Philox(5), x.clone().requires_grad_()
            with dlkit.random.use(stream):
                y = call(own, leaf).square().sum()
                if not outside:
                    y.backward()
            if outside and mode == "selective" and call is MODES[mode] and name in ("Dropout", "MultiheadAttention"):
                # torch compares the ops, which differ for another source of random numbers.
                with pytest.raises(RuntimeError, match="depend on global state that changed"):
                    y.backward()
                continue
            if outside:
                y.backward()
            results.append(([leaf.grad, *(p.grad for p in own.parameters())], stream.state_dict()))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_in_turn_and_backward_twice(use_reentrant):
    x = torch.ones(500, requires_grad=True)
    stream, other = dlkit.random.Philox(1), dlkit.random.Philox(2)
    call = functools.partial(checkpointing.checkpoint, use_reentrant=use_reentrant)
    y = x
    for generator in (stream, other, stream):
        y = call(lambda t, g=generator: F.dropout(t.exp().log(), 0.2, generator=g), y)
    for _ in range(2):
        x.grad = None
        y.sum().backward(retain_graph=True)
        torch.testing.assert_close(x.grad, y.detach())
    stream.manual_seed(1), other.manual_seed(2)
    plain = F.dropout(F.dropout(F.dropout(x, 0.2, generator=stream), 0.2, generator=other), 0.2, generator=stream)
    torch.testing.assert_close(y, plain)


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("in_backward", [True, False])
def test_streams_and_compiled_functions_in_checkpoints(where, in_backward, one_thread):
    torch._dynamo.reset()

    def function(t):
        return F.dropout(F.dropout(t.exp().log(), 0.3).exp().log(), 0.3)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    if where == "outside":
        call = lambda t: checkpointing.checkpoint(compiled, t, use_reentrant=False)  # noqa: E731
    else:
        call = torch.compile(
            lambda t: checkpointing.checkpoint(function, t, use_reentrant=False), backend="aot_eager", fullgraph=True
        )
    x = torch.ones(500, requires_grad=True)
    with dlkit.random.use(dlkit.random.Philox(7)):
        expected = function(x.detach())
    for _ in range(2):
        x.grad = None
        with dlkit.random.use(dlkit.random.Philox(7)):
            y = call(x)
            if in_backward and where == "outside":
                y.sum().backward()
        torch.testing.assert_close(y, expected)
        if where == "inside":  # the compiler draws again in the backward graph, from a stream that has advanced
            with pytest.raises(RuntimeError, match=r"Put torch.compile inside"):
                y.sum().backward()
            continue
        if not in_backward:
            y.sum().backward()
        torch.testing.assert_close(x.grad, expected)


def test_draws_that_cannot_be_repeated_are_refused():
    stream = dlkit.random.Philox(1)
    x = torch.ones(5, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: F.dropout(grad, generator=stream))
    with pytest.raises(RuntimeError, match="in a backward pass"):
        y.sum().backward()
    sources = iter((stream, None))
    y = checkpointing.checkpoint(lambda t: F.dropout(t.exp(), generator=next(sources)).exp(), x, use_reentrant=False)
    y.sum().backward()  # as after use() has ended
    sources = iter((None, stream))
    y = checkpointing.checkpoint(lambda t: F.dropout(t.exp(), generator=next(sources)).exp(), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="must draw as it did before"):
        y.sum().backward()


def test_copies_of_streams_go_on_alone():
    stream = dlkit.random.Philox(2**63 + 5)
    F.dropout(torch.ones(4), generator=stream)
    before = stream.state_dict()
    for twin in (copy.deepcopy(stream), pickle.loads(pickle.dumps(stream))):
        assert twin.state_dict() == before
        drawn = F.dropout(torch.ones(100), generator=twin)
        assert stream.state_dict() == before
        third = dlkit.random.Philox()
        third.load_state_dict(before)
        assert torch.equal(drawn, F.dropout(torch.ones(100), generator=third))


@pytest.mark.parametrize(
    "name", ["LayerNorm", "DropoutAddLayerNorm", "BatchNormReLU2d-residual", "Dropout", "DropPath"]
)
def test_compiled(name, seed, one_thread):
    """Checkpointing inside compile, and compile inside checkpointing."""
    shape, make_layer = LAYERS[name]
    block = BLOCKS["branch"](make_layer(), mixing(shape))
    x = torch.randn(shape)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    outside = torch.compile(checkpointed(False), backend="aot_eager")
    expected = gradients(copy.deepcopy(block), lambda b, t: b(t), x, seed)
    for call in (lambda b, t: checkpointed(False)(compiled, t), outside):
        for parameter in block.parameters():
            parameter.grad = None
        for got, wanted in zip(gradients(block, call, x, seed), expected, strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_gradients(name, seed, one_thread):
    """create_graph, which takes another path in backward, through checkpointed blocks."""
    shape, make_layer = LAYERS[name]
    block = BLOCKS["last"](make_layer(), mixing(shape))
    results = []
    for call in (lambda b, t: b(t), checkpointed(False), hooked):
        own = copy.deepcopy(block)
        x = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).requires_grad_()
        torch.manual_seed(seed)
        (grad,) = torch.autograd.grad(call(own, x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), x)[0])
    for got in results[1:]:
        torch.testing.assert_close(got, results[0])


@pytest.mark.parametrize("name", LAYERS)
def test_backward_twice_is_refused_as_in_torch(name):
    shape, make_layer = LAYERS[name]
    y = make_layer()(torch.randn(shape, requires_grad=True).exp()).sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


CHANGED_BIAS = {
    "BatchNorm1d": (ROWS, lambda: NN.BatchNorm1d(FEATURES)),
    "BatchNorm1d, evaluation": (ROWS, lambda: NN.BatchNorm1d(FEATURES).eval()),
    "BatchNormReLU2d, residual": (PLANES, lambda: Twice(NN.BatchNormReLU2d(FEATURES))),
    "GroupNorm": (PLANES, lambda: NN.GroupNorm(2, FEATURES)),
    "InstanceNorm2d": (PLANES, lambda: NN.InstanceNorm2d(FEATURES, affine=True)),
    "LayerNorm": (ROWS, lambda: NN.LayerNorm(FEATURES)),
    "AddLayerNorm": (ROWS, lambda: Twice(NN.AddLayerNorm(FEATURES))),
    "DropoutAddLayerNorm": (ROWS, lambda: Twice(NN.DropoutAddLayerNorm(FEATURES, 0.3))),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "no weight"])
@pytest.mark.parametrize("name", CHANGED_BIAS)
def test_a_bias_may_change_between_two_backwards(name, weighted, create_graph):
    """No backward reads it except that of a ReLU, which computes its mask from it again and notices the change."""
    shape, make_layer = CHANGED_BIAS[name]
    layer = make_layer()
    norm = getattr(layer, "layer", layer)
    if weighted:
        norm.weight.requires_grad_(False)
    else:
        norm.weight = None
    x = torch.randn(shape, requires_grad=True)
    y = layer(x).sin().sum()
    first = torch.autograd.grad(y, [x, norm.bias], retain_graph=True, create_graph=create_graph)
    with torch.no_grad():
        norm.bias.add_(1)
    for got, wanted in zip(torch.autograd.grad(y, [x, norm.bias], create_graph=create_graph), first, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_relu_notices_a_changed_bias():
    layer = NN.BatchNormReLU2d(FEATURES)
    y = layer(torch.randn(PLANES)).sum()
    y.backward(retain_graph=True)
    with torch.no_grad():
        layer.bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("parameter", [torch.float32, torch.bfloat16])
def test_a_bias_alone_gets_a_gradient_of_its_type(parameter):
    """Without a weight the type comes from the bias, whose values are not kept."""
    x = torch.randn(256, FEATURES).bfloat16()
    bias = torch.zeros(FEATURES, dtype=parameter, requires_grad=True)
    grad_output = torch.randn(256, FEATURES).bfloat16()
    exact = grad_output.double().sum(0)
    for y in (
        F.batch_norm(x, None, None, None, bias, True),
        F.group_norm(x, 2, None, bias),
        F.layer_norm(x, (FEATURES,), None, bias),
        F.add_layer_norm(x, x, (FEATURES,), None, bias)[0],
    ):
        (grad,) = torch.autograd.grad(y, bias, grad_output)
        assert grad.dtype == parameter
        torch.testing.assert_close(grad.double(), exact, rtol=torch.finfo(parameter).eps, atol=1e-4)


def test_only_what_backward_reads_is_kept():
    """Checked by the tensors that hooks see: no bias, except where the ReLU's mask is computed from it."""
    for name, kept in (*((name, False) for name in CHANGED_BIAS), ("BatchNormReLU2d", True)):
        shape, make_layer = CHANGED_BIAS.get(name) or LAYERS[name]
        layer = make_layer()
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: seen.append(t.data_ptr()) or t, lambda t: t):
            layer(torch.randn(shape, requires_grad=True))
        assert (getattr(layer, "layer", layer).bias.data_ptr() in seen) == kept, name
