"""dropout(act(x + bias)): parity on every backend, then the torch-facing side."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as native
from support import reference
from support.inputs import TYPES, make
from support.tolerance import Yardstick

import dlkit.functional as fused
from dlkit._activation import ACTIVATIONS as NUMBERS
from dlkit.random import Philox

ACTIVATIONS = ("relu", "gelu", "gelu_tanh")
SHAPES = ((19, 37), (7, 3, 64), (5, 1), (1, 300))
P, SEED, OFFSET = 0.3, 5, 24


def plain(name, x):
    return native.relu(x) if name == "relu" else native.gelu(x, approximate="none" if name == "gelu" else "tanh")


def ours(name, x, bias=None, p=P, training=True, generator=None):
    if name == "relu":
        return fused.bias_relu_dropout(x, bias, p, training, generator=generator)
    return fused.bias_gelu_dropout(x, bias, p, training, "none" if name == "gelu" else "tanh", generator=generator)


@functools.cache
def problem(name, dtype, bias_dtype, shape, draw):
    """Inputs that include both tails of the activation, the exact results, and torch's own with the same mask."""
    torch.manual_seed(100 * draw + shape[-1])
    x, bias, grad = make(shape, dtype, scale=3.0), make(shape[-1:], bias_dtype), make(shape, dtype)
    keep = reference.keep_mask(SEED, OFFSET, P, x.numel()).reshape(shape)
    scale = 1 / (1 - np.longdouble(P))
    value, slope = reference.activation(name, reference.exact(x) + reference.exact(bias))
    y = np.where(keep, value * scale, 0)
    grad_input = np.where(keep, reference.exact(grad) * slope * scale, 0)
    exact = y, grad_input, grad_input.reshape(-1, shape[-1]).sum(0)
    leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
    native_y = plain(name, leaves[0] + leaves[1].to(dtype)) * torch.from_numpy(keep).to(dtype) / (1 - P)
    return x, bias, grad, exact, (native_y.detach(), *torch.autograd.grad(native_y, leaves, grad))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "bias_dtype"), TYPES)
def test_errors_stay_below_torch_s(backend, dtype, bias_dtype, name):
    yardsticks = [Yardstick(part) for part in ("y", "grad_input", "grad_bias")]
    state = torch.tensor([SEED, OFFSET], device=backend.device)
    activation = NUMBERS[name]
    for shape, draw in itertools.product(SHAPES, range(3)):
        x, bias, grad, exact, torchs = problem(name, dtype, bias_dtype, shape, draw)
        x, bias, grad = (t.to(backend.device) for t in (x, bias, grad))
        y, returned = backend.call(
            "bias_act_dropout_forward", input=x, bias=bias, rng_state=state, activation=activation, p=P
        )
        gradients = backend.call(
            "bias_act_dropout_backward", grad_output=grad, input=x, bias=bias, rng_state=state, activation=activation,
            p=P, needs_bias=True,
        )  # fmt: skip
        assert torch.equal(returned, state)
        for yardstick, found, own, expected in zip(yardsticks, (y, *gradients), torchs, exact, strict=True):
            yardstick.add(found.cpu(), own, expected)
            yardstick.add_native(own, expected)
    for yardstick in yardsticks:
        assert yardstick.holds(backend.ulps), yardstick


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_without_bias_without_dropout_and_at_any_address(backend, name):
    activation = NUMBERS[name]
    state = torch.zeros(2, dtype=torch.int64, device=backend.device)
    for count, offset in ((1, 0), (9, 1), (256, 0), (2048 + 257, 3)):
        x = make((count + offset,), torch.float32, backend.device, scale=2.0)[offset:]
        grad = make((count,), torch.float32, backend.device)
        y, _ = backend.call("bias_act_dropout_forward", input=x, activation=activation, p=0.0)
        found, none = backend.call(
            "bias_act_dropout_backward", grad_output=grad, input=x, rng_state=state, activation=activation, p=0.0,
            needs_bias=True,
        )  # fmt: skip
        leaf = x.double().requires_grad_()
        expected = plain(name, leaf)
        (slopes,) = torch.autograd.grad(expected, leaf, grad.double())
        torch.testing.assert_close(y, expected.detach().float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found, slopes.float(), rtol=1e-6, atol=1e-6)
        assert none is None


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_extremes(backend, name):
    """Limits, NaN where torch has it (except gelu(inf), which is inf everywhere in torch but on the CPU in fp32)."""
    x = torch.tensor([math.inf, -math.inf, math.nan, 1e30, -1e30, 0.0, 1e-30, 20.0, -20.0, 3e38, -3e38] * 2)
    leaf = x.clone().double().requires_grad_()
    expected = plain(name, leaf)
    with torch.no_grad():
        expected[0] = expected[11] = math.inf
    (slopes,) = torch.autograd.grad(plain(name, leaf).sum(), leaf)
    x = x.to(backend.device)
    state = torch.zeros(2, dtype=torch.int64, device=backend.device)
    activation = NUMBERS[name]
    y, _ = backend.call("bias_act_dropout_forward", input=x, rng_state=state, activation=activation, p=0.0)
    grad, _ = backend.call(
        "bias_act_dropout_backward", grad_output=torch.ones_like(x), input=x, rng_state=state, activation=activation,
        p=0.0, needs_bias=False,
    )  # fmt: skip
    assert torch.equal(y.cpu().isnan(), expected.isnan())
    torch.testing.assert_close(y.cpu(), expected.detach().float(), equal_nan=True)
    finite = x.cpu().abs() < 1e15  # squares beyond fp32 make NaN in torch's fp32 too
    torch.testing.assert_close(grad.cpu()[finite], slopes.float()[finite])
    # A dropped element is 0, even if it was NaN.
    everything = torch.full((300,), math.nan, device=backend.device)
    assert not backend.call(
        "bias_act_dropout_forward", input=everything, rng_state=state, activation=activation, p=1.0
    )[0].any()


# The torch-facing side.


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_mask_is_that_of_dropout(name):
    x, bias = torch.randn(33, 20) + 3, torch.randn(20)
    for p in (0.3, 1.0):
        expected = fused.dropout(plain(name, x + bias), p, generator=Philox(7))
        torch.testing.assert_close(ours(name, x, bias, p, generator=Philox(7)), expected)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    for _ in range(2):
        dropped = fused.dropout(torch.ones_like(x), 0.5, generator=generators[0]) == 0
        assert torch.equal(ours("gelu", x, bias, 0.5, generator=generators[1]) == 0, dropped)


def test_evaluation_and_p_0_draw_nothing():
    x, bias, stream = torch.randn(4, 8), torch.randn(8), Philox(1)
    before = torch.get_rng_state()
    for p, training in ((0.5, False), (0.0, True), (0, True)):
        for generator in (None, stream):
            y = ours("gelu", x, bias, p, training, generator)
            torch.testing.assert_close(y, native.gelu(x + bias))
    assert torch.equal(torch.get_rng_state(), before) and stream.state_dict()["offset"] == 0


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients(name):
    x, bias = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, bias)]

    def call(*tensors):
        return ours(name, *tensors, generator=Philox(2))

    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)
    assert torch.autograd.gradcheck(call, (leaves[0].detach(), leaves[1]))
    assert torch.autograd.gradcheck(call, leaves[:1])
    jacobian = torch.func.jacrev(call)(*leaves)
    torch.testing.assert_close(jacobian, torch.func.jacfwd(call, randomness="same")(*leaves))
    batched = torch.vmap(lambda row: ours(name, row, bias, 0.5), randomness="different")(x)
    assert batched.shape == x.shape


def test_inputs_and_the_state_are_all_that_is_kept():
    saved = []
    x, bias = torch.randn(40, 25, requires_grad=True), torch.randn(25, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused.bias_gelu_dropout(x, bias, 0.1)
    assert [t.nbytes for t in saved] == [4000, 100, 16]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_kept_bits_are_those_that_would_be_drawn(backend, dtype, activation):
    if not backend.instruction_set:
        pytest.skip("bits are kept on the CPU only")
    forward, backward = (backend.op(f"bias_act_dropout_{name}") for name in ("forward", "backward"))
    code = NUMBERS[activation]
    for shape in ((3, 5), (129, 33), (1, 5000)):
        x, grad, bias = (torch.randn(size, dtype=dtype) for size in (shape, shape, shape[1:]))
        torch.manual_seed(3)
        y, state = forward(x, bias, None, code, P, None, True)
        torch.manual_seed(3)
        again, plain = forward(x, bias, None, code, P)
        assert plain.numel() == 2 < state.numel()
        assert torch.equal(plain, state[:2])
        assert torch.equal(y, again)
        found, wanted = (backward(grad, x, bias, known, code, P, True) for known in (state, plain))
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("cols", [3, 40])
def test_the_sum_of_many_equal_gradients(backend, cols):
    """One fp32 sum over all rows of a block would be off by 1e-4."""
    rows = 200_000 if backend.name.startswith("cpu") else 2_000
    x, bias, grad = torch.ones(rows, cols), torch.ones(cols), torch.full((rows, cols), 0.1)
    arguments = (t.to(backend.device) for t in (grad, x, bias, torch.tensor([SEED, OFFSET])))
    _, grad_bias = backend.op("bias_act_dropout_backward")(*arguments, NUMBERS["relu"], 0.0, True)
    torch.testing.assert_close(grad_bias.cpu(), grad[0] * rows, rtol=1e-5, atol=0)


def test_threads_and_streaming_stores_change_nothing():
    x, bias, grad = torch.randn(4096, 2304), torch.randn(2304), torch.randn(4096, 2304)
    assert x.nbytes > 2**25  # more than half of common last-level caches: written past them
    forward, backward = torch.ops.dlkit.bias_act_dropout_forward, torch.ops.dlkit.bias_act_dropout_backward
    state = torch.tensor([SEED, OFFSET])
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            y, _ = forward(x, bias, state, 1, P)
            results.append((y, *backward(grad, x, bias, state, 1, P, True)))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))
    part = forward(x[:50], bias, state, 1, P)[0], backward(grad[:50], x[:50], bias, state, 1, P, False)[0]
    assert all(torch.equal(whole[:50], some) for whole, some in zip(results[0], part, strict=False))


def test_layouts_and_empty_inputs():
    bias = torch.randn(6)
    for x in (torch.randn(6, 5).t(), torch.randn(5, 12)[:, ::2], torch.randn(1, 6).expand(5, 6), torch.randn(6)):
        y = fused.bias_gelu_dropout(x, bias, 0.4, generator=Philox(3))
        torch.testing.assert_close(y, fused.dropout(native.gelu(x + bias), 0.4, generator=Philox(3)))
    assert fused.bias_relu_dropout(torch.tensor(2.0), None, 0.0).item() == 2
    for shape in ((0, 6), (3, 0)):
        x, bias = torch.randn(shape, requires_grad=True), torch.randn(shape[1], requires_grad=True)
        fused.bias_gelu_dropout(x, bias).sum().backward()
        assert x.grad.shape == shape and not bias.grad.any()


def test_16_bit_input_takes_an_fp32_bias():
    x = torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(16, requires_grad=True)
    y = fused.bias_gelu_dropout(x, bias, 0.0)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, native.gelu(x.float() + bias).bfloat16())
    grads = torch.autograd.grad(y.float().square().sum(), (x, bias), create_graph=True)
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32]


def test_compiled_exported_and_checked():
    x, bias = torch.randn(6, 10, requires_grad=True), torch.randn(10, requires_grad=True)

    def step(x, bias):
        return fused.bias_gelu_dropout(x, bias, 0.25) + fused.bias_relu_dropout(x, None, 0.25)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 9):
        x = torch.randn(rows, 10, requires_grad=True)
        results = []
        for function in (step, compiled):
            torch.manual_seed(5)
            y = function(x, bias)
            results.append((y, *torch.autograd.grad(y.sum(), (x, bias))))
        torch.testing.assert_close(*results)
    state = torch.tensor([SEED, OFFSET])
    ops = torch.ops.dlkit
    torch.library.opcheck(ops.bias_act_dropout, (x, bias, 1, 0.0))
    for gelu in (1, 2):
        torch.library.opcheck(ops.bias_act_dropout_forward, (x.detach(), bias.detach(), state, gelu, 0.5))
        for needs_bias in (True, False):
            torch.library.opcheck(
                ops.bias_act_dropout_backward, (x.detach(), x.detach(), bias.detach(), state, gelu, 0.5, needs_bias)
            )


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "p between 0 and 1", lambda x, b: fused.bias_gelu_dropout(x, b, 1.5)),
        (TypeError, "p to be a float", lambda x, b: fused.bias_gelu_dropout(x, b, "a")),
        (RuntimeError, "approximate", lambda x, b: fused.bias_gelu_dropout(x, b, 0.5, approximate="erf")),
        (RuntimeError, "bias of one dimension", lambda x, b: fused.bias_gelu_dropout(x, b[:3])),
        (RuntimeError, "bias of one dimension", lambda x, b: fused.bias_relu_dropout(x, b[None])),
        (RuntimeError, "bias of Float", lambda x, b: fused.bias_relu_dropout(x, b.double())),
        (TypeError, "bias to be a Tensor", lambda x, b: fused.bias_relu_dropout(x, [1.0])),
        (TypeError, "input to be a Tensor", lambda x, b: fused.bias_relu_dropout(None, b)),
        (TypeError, "generator", lambda x, b: fused.bias_relu_dropout(x, b, generator=3)),
        (NotImplementedError, "", lambda x, b: fused.bias_gelu_dropout(x.long())),
        (NotImplementedError, "", lambda x, b: fused.bias_gelu_dropout(x.long(), None, 0.5, False)),
    ],
)
def test_bad_input(error, message, call):
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        call(torch.ones(3, 4), torch.ones(4))
    assert torch.equal(torch.get_rng_state(), before)
