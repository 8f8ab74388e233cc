"""torch.func over every function: torch's own values where nothing is random, and masks as `randomness` asks."""

import copy
import functools

import pytest
import torch
from support.calls import CALLS, NORMS, RANDOM
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import dlkit
from dlkit.random import Philox

SIZES = {"N": 2, "L": 3, "C": 4}
SAMPLES = 3


def scalar(call):
    def weighted(y):
        return y * torch.linspace(0, 1, y.numel()).view(y.shape)

    return lambda *tensors: sum(weighted(y).square().sum() for y in call(*tensors))


def plain(call, samples=0):
    torch.manual_seed(1)
    tensors = [tensor.detach() for tensor in call.tensors(SIZES)]
    return [torch.stack([t * (i + 1) for i in range(samples)]) for t in tensors] if samples else tensors


def every(call):
    return tuple(range(len(call.shapes)))


TRANSFORMS = {
    "grad": lambda f, c: grad(scalar(f), every(c))(*plain(c)),
    "grad of grad": lambda f, c: grad(lambda *t: grad(scalar(f))(*t).sin().sum(), every(c))(*plain(c)),
    "vjp": lambda f, c: vjp(f, *plain(c))[1](tuple(torch.ones_like(y).cumsum(0) for y in c(*plain(c)))),
    "jvp": lambda f, c: jvp(f, tuple(plain(c)), tuple(t.cos() for t in plain(c))),
    "jvp of jvp": lambda f, c: jvp(
        lambda x, *t: jvp(lambda y: f(y, *t), (x,), (x.sin(),))[1], tuple(plain(c)), tuple(s.cos() for s in plain(c))
    ),
    "jacrev": lambda f, c: jacrev(f, every(c))(*plain(c)),
    "jacfwd": lambda f, c: jacfwd(f, every(c))(*plain(c)),
    "hessian": lambda f, c: hessian(scalar(f))(*plain(c)),
    "vmap": lambda f, c: vmap(f)(*plain(c, SAMPLES)),
    "vmap over the input": lambda f, c: vmap(f, (0,) + (None,) * (len(c.shapes) - 1))(
        plain(c, SAMPLES)[0], *plain(c)[1:]
    ),
    "vmap over the parameters": lambda f, c: vmap(f, (None,) + (0,) * (len(c.shapes) - 1))(
        plain(c)[0], *plain(c, SAMPLES)[1:]
    ),
    "vmap along the last dimension": lambda f, c: vmap(f, -1, -1)(*(t.movedim(0, -1) for t in plain(c, SAMPLES))),
    "vmap of vmap": lambda f, c: vmap(vmap(f))(*(t.unflatten(0, (1, SAMPLES)) for t in plain(c, SAMPLES))),
    "vmap of grad": lambda f, c: vmap(grad(scalar(f), every(c)))(*plain(c, SAMPLES)),
    "grad of vmap": lambda f, c: grad(scalar(vmap(f)), every(c))(*plain(c, SAMPLES)),
    "vmap of jvp": lambda f, c: vmap(lambda *t: jvp(f, t, tuple(s.cos() for s in t)))(*plain(c, SAMPLES)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", NORMS)
def test_transforms_give_what_torch_s_do(name, transform):
    call = NORMS[name]
    if transform == "vmap over the parameters" and len(call.shapes) == 1:
        pytest.skip("it has none")
    if "running" in name and transform == "vmap over the input":
        for function in (call, call.reference):
            with pytest.raises(RuntimeError, match="running_mean or running_var, which will be updated in place"):
                TRANSFORMS[transform](function, call)
        return
    found, wanted = (TRANSFORMS[transform](function, call) for function in (call, call.reference))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def seeded(function, *tensors):
    torch.manual_seed(5)
    return function(*tensors)


KINDS = {"value": lambda f: f, "grad": lambda f: grad(scalar(f)), "jvp": lambda f: lambda *t: jvp(f, t, t)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RANDOM)
def test_randomness_of_vmap(name, kind):
    """A seed's first mask is the same with and without vmap."""
    function = KINDS[kind](RANDOM[name])
    batch = [torch.stack([t] * SAMPLES) for t in plain(RANDOM[name])]
    sample = [t[0] for t in batch]
    wanted = seeded(function, *sample)
    same = seeded(vmap(function, randomness="same"), *batch)
    different = seeded(vmap(function, randomness="different"), *batch)
    flat = [torch.utils._pytree.tree_leaves(tree) for tree in (wanted, same, different)]
    for alone, one, own in zip(*flat, strict=True):
        for i in range(SAMPLES):
            torch.testing.assert_close(one[i], alone)
        torch.testing.assert_close(own[0], alone)
    assert any(not torch.equal(own[i], own[0]) for own in flat[2] for i in range(1, SAMPLES))
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(function, randomness="error")(*batch)


@pytest.mark.parametrize("name", RANDOM)
def test_streams_and_generators_under_vmap(name):
    call = RANDOM[name]
    batch = [torch.stack([t] * SAMPLES) for t in plain(call)]
    sources = (lambda: Philox(3), lambda: torch.Generator().manual_seed(3))
    for source in sources:
        run = lambda *t, g: call.function(dlkit.functional, *t, generator=g)  # noqa: E731
        alone = run(*(t[0] for t in batch), g=source())
        alone = alone if isinstance(alone, tuple) else (alone,)
        for randomness in ("same", "different"):
            generator = source()
            result = vmap(functools.partial(run, g=generator), randomness=randomness)(*batch)
            result = result if isinstance(result, tuple) else (result,)
            for y, wanted in zip(result, alone, strict=True):
                torch.testing.assert_close(y[0], wanted)
                assert torch.equal(y[0], y[1]) or randomness == "different"
            assert randomness == "same" or any(not torch.equal(y[0], other) for y in result for other in y)
            if isinstance(generator, Philox):
                assert generator.state_dict()["offset"] > 0
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(functools.partial(run, g=source()), randomness="error")(*batch)


def test_different_masks_are_those_of_the_whole_batch():
    x = torch.randn(4, 5, 6)
    for name in ("dropout", "alpha_dropout"):
        function = functools.partial(getattr(dlkit.functional, name), p=0.4, training=True)
        torch.testing.assert_close(seeded(vmap(function, randomness="different"), x), seeded(function, x))
        nested = vmap(vmap(function, randomness="different"), randomness="different")
        torch.testing.assert_close(seeded(nested, x), seeded(function, x))
    for outer, inner, dim in (("different", "same", 1), ("same", "different", 0)):
        masks = vmap(vmap(dlkit.functional.dropout, randomness=inner), randomness=outer)(torch.ones(4, 5, 6))
        assert masks.eq(masks.narrow(dim, 0, 1)).all() and not masks.eq(masks.narrow(1 - dim, 0, 1)).all()


def test_what_has_no_batch_is_random_too():
    """Dropout of weights under a vmap over samples."""
    weight = torch.ones(30)
    function = lambda x: dlkit.functional.dropout(weight) * x  # noqa: E731
    same, different = (vmap(function, randomness=r)(torch.ones(2)) for r in ("same", "different"))
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(function)(torch.ones(2))
    dropped = lambda x: dlkit.functional.dropout(weight, 1.0) * x  # noqa: E731
    assert vmap(dropped)(torch.ones(2)).eq(0).all()  # draws nothing


@pytest.mark.parametrize("name", CALLS)
def test_backward_under_vmap(name):
    """vmap over autograd.grad, and is_grads_batched: the backward of results computed outside the vmap."""
    call = CALLS[name]
    tensors = call.tensors(SIZES)
    y = call(*tensors)[0]
    wanted_of = [t for t in tensors if t is not None]
    grads = torch.randn(SAMPLES, *y.shape)

    def backward(g):
        found = torch.autograd.grad(y, wanted_of, g, retain_graph=True, allow_unused=True)
        return [t for t in found if t is not None]

    wanted = [torch.stack(rows) for rows in zip(*map(backward, grads), strict=True)]
    torch.testing.assert_close(vmap(backward)(grads), wanted, rtol=1e-4, atol=1e-5)
    batched = torch.autograd.grad(y, wanted_of, grads, retain_graph=True, allow_unused=True, is_grads_batched=True)
    torch.testing.assert_close([t for t in batched if t is not None], wanted, rtol=1e-4, atol=1e-5)


def model(nn):
    first, second = torch.nn.Linear(6, 8), torch.nn.Linear(8, 8)
    return torch.nn.Sequential(first, nn.LayerNorm(8), nn.Dropout(0.5), second, nn.RMSNorm(8), nn.GroupNorm(2, 8))


def test_gradients_of_each_sample():
    """The per-sample gradients of torch's tutorial, through dropout."""
    net = model(dlkit.nn)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    x, y = torch.randn(5, 6), torch.randn(5, 8)

    def loss(parameters, sample, target):
        return (functional_call(net, parameters, (sample[None],)) - target[None]).square().mean()

    found = seeded(vmap(grad(loss), (None, 0, 0), randomness="same"), parameters, x, y)
    for i in range(len(x)):
        wanted = seeded(grad(loss), parameters, x[i], y[i])
        torch.testing.assert_close({k: g[i] for k, g in found.items()}, wanted, rtol=1e-4, atol=1e-5)
    different = vmap(grad(loss), (None, 0, 0), randomness="different")(parameters, x, y)
    assert all(torch.isfinite(g).all() for g in different.values())


@pytest.mark.parametrize("training", [True, False])
def test_ensembles_of_models(training):
    """vmap over stacked parameters and buffers, running statistics among them."""

    def make(nn):
        return torch.nn.Sequential(
            torch.nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6), nn.InstanceNorm1d(6, affine=True, track_running_stats=True)
        ).train(training)

    theirs = [make(torch.nn) for _ in range(3)]
    ours = [dlkit.replace(copy.deepcopy(net)) for net in theirs]
    x = torch.randn(5, 4, 7)
    results = []
    for nets in (theirs, ours):
        parameters, buffers = stack_module_state(nets)
        base = copy.deepcopy(nets[0]).to("meta")
        y = vmap(lambda p, b, base=base: functional_call(base, (p, b), (x,)))(parameters, buffers)
        results.append((y, buffers))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["layer_norm", "instance_norm", "batch_norm, evaluation"])
def test_compiled_transforms(name, one_thread):
    torch._dynamo.reset()
    call = NORMS[name]
    function = vmap(grad(scalar(call), every(call)))
    tensors = plain(call, SAMPLES)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), function(*tensors), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dropout", "dropout1d", "dropblock2d", "bias_gelu_dropout"])
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_compiled_randomness(name, randomness, one_thread):
    torch._dynamo.reset()
    call = RANDOM[name]
    function = vmap(grad(scalar(call)), randomness=randomness)
    tensors = [torch.stack([t] * SAMPLES) for t in plain(call)]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(seeded(compiled, *tensors), seeded(function, *tensors), rtol=1e-4, atol=1e-5)
