"""DropBlock: the paper's definition on every backend, then the torch-facing side."""

import contextlib
import functools
import math

import numpy as np
import pytest
import torch
from support import reference

import dlkit
import dlkit.functional as fused
from dlkit.random import Philox, use

P, SEED, OFFSET = 0.3, 5, 24
# Planes with and without whole words, several tasks on the CPU, rows wider than one read.
SHAPES = ((3, 4, 12, 9), (2, 70, 7, 7), (5, 3, 28, 28), (1, 3, 5, 130), (1, 2, 150, 121), (2, 1, 1, 1))

# Tables for the tests that run over all ops: see support/of_ops.py.
PLANES, STATE = torch.ones(2, 3, 6, 6), torch.tensor([3, 4])
OP_ARGUMENTS = {
    "dropblock2d": (PLANES, 0.5, 2, None, STATE),
    "dropblock2d_": (PLANES, 0.5, 2, None, STATE),
    "dropblock2d_forward": (PLANES, STATE, 0.5, 2, None),
    "dropblock2d_forward_": (PLANES, STATE, 0.5, 2, None),
    "dropblock2d_apply": (PLANES, torch.tensor([3, 4, 9]), 0.5, 2),
}
OP_RANDOM = {
    "dropblock2d": (lambda F, x, **more: F.dropblock2d(x, 0.3, 2, **more), ("NCLL",)),
    "dropblock2d, in place": (lambda F, x, **more: F.dropblock2d(x * 1, 0.3, 2, inplace=True, **more), ("NCLL",)),
}
OP_LAYERS = {"DropBlock2d": ((0.4, 2), ((4, 8, 4, 4),))}


def aot_cases(op, dtype):
    """Cases that count and apply, with the state drawn and given."""
    x = torch.zeros(2, 3, 28, 28, dtype=dtype)
    yield "forward", False, functools.partial(op.dropblock2d_forward, x, None, 0.1, 7)
    if dtype == torch.float32:
        yield "apply", False, functools.partial(op.dropblock2d_apply, x, torch.zeros(3, dtype=torch.int64), 0.1, 3)


SIZES = (1, 2, 3, 7, 9, 50, 70)
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other": lambda x: torch.stack([x, x], -1)[..., 0],
}


def seed_probability(p, height, width, size):
    return p / size**2 * height * width / ((height - size + 1) * (width - size + 1))


@functools.cache
def kept(shape, p, block_size, seed=SEED, offset=OFFSET):
    """The elements that are kept by the paper's Algorithm 1, with seeds from the stream."""
    samples, channels, height, width = shape
    size = min(block_size, height, width)
    rows, columns = height - size + 1, width - size + 1
    gamma = seed_probability(p, height, width, size)
    seeds = ~reference.keep_mask(seed, offset, gamma, samples * channels * rows * columns)
    keep = np.ones(shape, bool)
    for n, c, i, j in np.argwhere(seeds.reshape(samples, channels, rows, columns)):
        keep[n, c, i : i + size, j : j + size] = False
    return torch.from_numpy(keep)


def scale_of(keep):
    return keep.numel() / max(int(keep.sum()), 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", SIZES)
def test_the_paper_s_mask_and_scale(backend, block_size, layout):
    largest = {"triton": 2000, "cuda-on-cpu": 9000}.get(backend.name, math.inf)
    shapes = [shape for shape in SHAPES if math.prod(shape) <= largest]
    for shape in shapes:
        keep = kept(shape, P, block_size)
        x = LAYOUTS[layout](torch.randn(shape)).to(backend.device)
        given = torch.tensor([SEED, OFFSET], device=backend.device)
        y, state = backend.call("dropblock2d_forward", input=x, rng_state=given, p=P, block_size=block_size)
        assert state.tolist() == [SEED, OFFSET, keep.numel() - int(keep.sum())]
        expected = torch.where(keep, x.cpu() * scale_of(keep), 0)
        assert torch.equal(y.cpu(), expected)
        assert y.stride() == torch.empty_like(x).stride()
        assert torch.equal(backend.op("dropblock2d_apply")(x, state, P, block_size), y)
        again = x.clone()
        assert torch.equal(
            backend.call("dropblock2d_forward_", input=again, rng_state=given, p=P, block_size=block_size), state
        )
        assert torch.equal(again, y)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
def test_types_addresses_and_what_is_not_a_number(backend, dtype):
    shape = (2, 5, 9, 11)
    keep = kept(shape, P, 3)
    given = torch.tensor([SEED, OFFSET], device=backend.device)
    for offset in (0, 1, 3):
        flat = torch.randn(math.prod(shape) + offset, dtype=dtype)
        x = flat[offset:].view(shape)
        x[~keep] = math.nan
        x = flat.to(backend.device)[offset:].view(shape)
        y, _ = backend.call("dropblock2d_forward", input=x, rng_state=given, p=P, block_size=3)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        expected = torch.where(keep, x.cpu().to(wide) * scale_of(keep), 0).to(dtype)
        assert y.dtype == dtype
        assert torch.equal(y.cpu(), expected)


def test_everything_and_nothing_dropped(backend):
    op = backend.op("dropblock2d_forward")
    for layout in ("contiguous", "channels_last"):
        x = LAYOUTS[layout](torch.full((2, 3, 4, 4), math.nan, device=backend.device))
        for size in (1, 4):  # every corner is a seed
            y, state = op(x, None, 1.0, size, None)
            assert torch.equal(y, torch.zeros_like(x))
            assert state.tolist() == [0, 0, x.numel()]
        y, state = op(torch.ones_like(x), None, 1e-12, 3, None)
        assert torch.equal(y, torch.ones_like(x)) and state[2] == 0
        y, state = op(x[:0], None, P, 3, None)
        assert y.shape == (0, 3, 4, 4) and not state.any()


def test_streaming_stores_and_tasks_change_nothing():
    shape = (64, 65, 56, 57)
    x = torch.randn(shape)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(fused.dropblock2d(x, P, 7, generator=Philox(1)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(fused.dropblock2d(last, P, 7, generator=Philox(1)), results[0])
    part = fused.dropblock2d(x[:2], P, 7, generator=Philox(1)) != 0  # the first planes have the first seeds
    assert torch.equal(results[0][:2] != 0, part)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout):
    keep = kept((3, 4, 12, 9), P, 3, offset=0)
    x = LAYOUTS[layout](torch.randn(keep.shape)).requires_grad_()
    y = fused.dropblock2d(x, P, 3, generator=Philox(SEED))
    weights = torch.randn(keep.shape)
    (grad,) = torch.autograd.grad(y, x, weights, retain_graph=True)
    assert torch.equal(grad, torch.where(keep, weights * scale_of(keep), 0))
    inner = x * 1.0
    z = fused.dropblock2d(inner, P, 3, inplace=True, generator=Philox(SEED))
    assert z is inner and torch.equal(z, y)
    assert torch.equal(torch.autograd.grad(z, x, weights)[0], grad)


def test_derivatives_of_every_kind():
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)

    def function(x):
        return fused.dropblock2d(x, P, 2, generator=Philox(SEED)).sin()

    assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, x)


def test_nothing_is_saved_but_three_numbers():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused.dropblock2d(torch.randn(2, 3, 8, 8, requires_grad=True), P, 3)
    assert [(t.dtype, t.shape) for t in saved] == [(torch.int64, (3,))]


def test_generators_and_checkpoints():
    x = torch.randn(4, 8, 12, 12, requires_grad=True)
    drawn = [fused.dropblock2d(x, P, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    stream = Philox(1)
    calls = [fused.dropblock2d(x, P, 3, generator=stream) for _ in range(2)]
    assert not torch.equal(*calls) and stream.state_dict()["offset"] == 16
    for reentrant in (False, True):
        torch.manual_seed(3)
        plain = fused.dropblock2d(x, P, 3)
        expected = torch.autograd.grad(plain.square().sum(), x)[0]
        torch.manual_seed(3)
        y = torch.utils.checkpoint.checkpoint(fused.dropblock2d, x, P, 3, use_reentrant=reentrant)
        x.grad = None
        y.square().sum().backward()
        assert torch.equal(y, plain) and torch.equal(x.grad, expected)


def test_share_and_mean():
    y = fused.dropblock2d(torch.ones(64, 32, 16, 16), 0.2, 5)
    assert abs(y.mean().item() - 1) < 1e-5 and 0.12 < (y == 0).float().mean() < 0.2


def test_each_sample_of_a_vmap_keeps_its_mean():
    x = torch.ones(3, 2, 4, 9, 9)
    for randomness, alike in (("same", True), ("different", False)):
        y = torch.vmap(lambda x: fused.dropblock2d(x, 0.5, 3), randomness=randomness)(x)
        assert (y == 0).any() and torch.equal(y[0], y[1]) == alike
        for sample in y:
            assert sample[sample != 0].unique().numel() == 1 and abs(sample.mean() - 1) < 1e-5


@pytest.mark.slow
def test_compiled_and_checked():
    def step(x):
        return fused.dropblock2d(x, P, 3).square()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 3, 8, 6), (5, 3, 9, 7)):
        x = torch.randn(shape, requires_grad=True)
        results = []
        for function in (step, compiled):
            torch.manual_seed(5)
            y = function(x)
            results.append((y, *torch.autograd.grad(y.sum(), x)))
        for eager, fast in zip(*results, strict=True):
            assert torch.equal(eager, fast)
    ops = torch.ops.dlkit
    x, state = torch.randn(2, 3, 8, 8), torch.tensor([SEED, OFFSET])
    known = ops.dropblock2d_forward(x, state, P, 3)[1]
    for layout in ("contiguous", "channels_last"):
        x = LAYOUTS[layout](x)
        torch.library.opcheck(ops.dropblock2d_forward, (x, state, P, 3))
        torch.library.opcheck(ops.dropblock2d_forward_, (x.clone(), state, P, 3))
        torch.library.opcheck(ops.dropblock2d_apply, (x.clone().requires_grad_(), known, P, 3))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")  # aot_dispatch draws another mask
    torch.library.opcheck(ops.dropblock2d, (x.clone().requires_grad_(), P, 3), test_utils=tests)


def test_module():
    module = dlkit.nn.DropBlock2d(P, 3)
    x = torch.ones(2, 3, 8, 8)
    with use(Philox(1)):
        y = module(x)
    assert torch.equal(y, fused.dropblock2d(x, P, 3, generator=Philox(1)))
    assert repr(module) == "dlkit.DropBlock2d(p=0.3, block_size=3, inplace=False)"
    assert module.eval()(x) is x and fused.dropblock2d(x, 0, 3) is x


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "p between 0 and 1", lambda x: fused.dropblock2d(x, 1.5, 3)),
        (ValueError, "p between 0 and 1", lambda x: fused.dropblock2d(x, -1, 3, False)),
        (TypeError, "p to be a float", lambda x: fused.dropblock2d(x, "a", 3)),
        (ValueError, "block_size of at least 1", lambda x: fused.dropblock2d(x, P, 0)),
        (ValueError, r"\[N, C, H, W\]", lambda x: fused.dropblock2d(x[0], P, 3)),
        (TypeError, "input to be a Tensor", lambda x: fused.dropblock2d([1.0], P, 3)),
        (TypeError, "generator", lambda x: fused.dropblock2d(x, P, 3, generator=3)),
        (RuntimeError, "floating", lambda x: fused.dropblock2d(x.long(), P, 3)),
        (RuntimeError, "leaf", lambda x: fused.dropblock2d(x.requires_grad_(), P, 3, inplace=True)),
        (
            RuntimeError,
            "more than one element",
            lambda x: fused.dropblock2d(x[:1].expand(2, 3, 4, 4), P, 3, True, True),
        ),
    ],
)
def test_bad_input(error, message, call):
    before, stream = torch.get_rng_state(), Philox(1)
    for context in (contextlib.nullcontext(), use(stream)):
        with pytest.raises(error, match=message), context:
            call(torch.ones(2, 3, 4, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert stream.state_dict() == {"seed": 1, "offset": 0}
