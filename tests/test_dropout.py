"""Dropout: the stream bit for bit on every backend, then the torch-facing side."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as native
from support import reference
from support.inputs import make
from torch.utils._python_dispatch import TorchDispatchMode

import dlkit
import dlkit.functional as fused
from dlkit import random
from dlkit.random import Philox, use

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# From Random123's kat_vectors: counter, key, result.
PUBLISHED = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def state_of(seed, offset, device="cpu"):
    return torch.tensor([random._signed(seed), random._signed(offset)], device=device)


def apply(backend, x, seed, offset, p, inner=1, scale=1.0, shift=0.0, dropped=0.0):
    state = state_of(seed, offset, x.device)
    return backend.call(
        "dropout_apply", input=x, rng_state=state, p=p, inner=inner, scale=scale, shift=shift, dropped=dropped
    )


def mask_of(backend, count, seed, offset, p, inner=1):
    return apply(backend, torch.ones(count, device=backend.device), seed, offset, p, inner).cpu().numpy() != 0


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_reference_gives_the_published_vectors(counter, key, expected):
    found = reference.philox(np.array(key, np.uint64), np.array(counter, np.uint64))
    assert found.tolist() == expected


def test_kernels_give_a_published_vector(backend):
    """Seed 0, offset 0, block 0: every 16 bits of the first published vector, found as the p at which a lane flips."""
    for lane, bits in enumerate(word >> shift & 0xFFFF for word in PUBLISHED[0][2] for shift in (0, 16)):
        assert mask_of(backend, 8, 0, 0, bits / 2**16)[lane]
        assert not mask_of(backend, 8, 0, 0, (bits + 1) / 2**16)[lane]


@pytest.mark.parametrize("p", [0.3, 0.5, 2**-20, 1 - 2**-20, 0.1 + 2**-33, 0.0, 1.0])
def test_mask_is_the_reference_s(backend, p):
    """Keys and counters with all their words in use; sizes with and without whole vectors."""
    for seed, offset, count in (
        (0x0123456789ABCDEF, 0, 4999),
        (2**64 - 1, 2**64 - 8, 1024),
        (7, 4 * (2**32 - 1), 33),
        (2**63, 8 * 3**20, 1),
    ):
        assert (mask_of(backend, count, seed, offset, p) == reference.keep_mask(seed, offset, p, count)).all()


def test_ties_are_broken_by_the_second_block(backend):
    """Where the upper 16 bits of p equal an element's, the second 16 bits decide, to the last bit."""
    count, seed, offset = 3000, 99, 16
    for lane in (0, 5, 1234, 2999):
        high, low = (int(reference.lane_bits(seed, offset // 4 + k, np.array([lane]))[0]) for k in range(2))
        for threshold, kept in ((high * 2**16 + low, True), (high * 2**16 + low + 1, False)):
            mask = mask_of(backend, count, seed, offset, threshold / 2**32)
            assert mask[lane] == kept
            assert (mask == reference.keep_mask(seed, offset, threshold / 2**32, count)).all()


@pytest.mark.parametrize("inner", [1, 2, 3, 7, 16, 49, 64, 784, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(backend, dtype, inner):
    """y = keep ? x * scale + shift : dropped, rounded once; dropped NaN and infinity become 0 like all others."""
    count = {1: 2531, 5000: 15000}.get(inner, 37 * inner)
    seed, offset, p = 5, 24, 0.4
    mask = np.repeat(reference.keep_mask(seed, offset, p, -(-count // inner)), inner)[:count]
    x = make((count,), dtype, backend.device)
    x[torch.from_numpy(~mask).to(backend.device)] = math.nan
    for scale, shift, dropped in ((1 / (1 - p), 0.0, 0.0), (0.75, -0.5, 1.25)):
        y = apply(backend, x, seed, offset, p, inner, scale, shift, dropped)
        assert y.dtype == dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scale, shift, dropped = (torch.tensor(value, dtype=wide).item() for value in (scale, shift, dropped))
        exact = reference.exact(x) * scale + shift
        expected = torch.from_numpy(np.where(mask, exact, dropped).astype(np.float64))
        # A product and a sum in the accumulation type, then a rounding to the dtype.
        allowed = torch.finfo(dtype).eps / 2 * expected.abs() + torch.finfo(wide).eps * 4
        assert ((y.cpu().double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_any_alignment_and_inner(backend, dtype, offset):
    for count in (1, 7, 8, 9, 255, 257, 1000, 4099):
        memory = torch.ones(count + 3, dtype=dtype, device=backend.device)
        x = memory[offset : offset + count]
        y = apply(backend, x, 11, 0, 0.5)
        assert (y.cpu().float().numpy() != 0).tolist() == reference.keep_mask(11, 0, 0.5, count).tolist()
        if count % 3 == 0:
            y = apply(backend, x, 11, 0, 0.5, 3)
            expected = np.repeat(reference.keep_mask(11, 0, 0.5, count // 3), 3)
            assert (y.cpu().float().numpy() != 0).tolist() == expected.tolist()


def test_forward_returns_the_state_it_drew(backend):
    x = make((1234,), torch.float32, backend.device)
    states = []
    for _ in range(2):
        y, state = backend.call("dropout_forward", input=x, p=0.25, inner=1, scale=4 / 3, shift=0.0, dropped=0.0)
        assert state.dtype == torch.int64 and state.shape == (2,) and state.device == x.device
        assert torch.equal(
            y,
            backend.call(
                "dropout_apply", input=x, rng_state=state, p=0.25, inner=1, scale=4 / 3, shift=0.0, dropped=0.0
            ),
        )
        again = x.clone()
        backend.call(
            "dropout_forward_", input=again, rng_state=state, p=0.25, inner=1, scale=4 / 3, shift=0.0, dropped=0.0
        )
        assert torch.equal(y, again)
        states.append(state.tolist())
    assert states[0] != states[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_add(backend, dtype):
    """dropout_add: x * scale + residual, rounded once; the mask of plain dropout."""
    for count in (1, 13, 1000, 4099):
        x, residual = make((count,), dtype, backend.device), make((count,), dtype, backend.device)
        mask = reference.keep_mask(5, 8, 0.3, count)
        x[torch.from_numpy(~mask).to(backend.device)] = math.nan
        state = state_of(5, 8, backend.device)
        y, returned = backend.call("dropout_add_forward", input=x, residual=residual, rng_state=state, p=0.3)
        assert torch.equal(returned, state) and y.dtype == dtype
        exact = np.where(mask, reference.exact(x) / 0.7, 0) + reference.exact(residual)
        expected = torch.from_numpy(exact.astype(np.float64))
        wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        allowed = torch.finfo(dtype).eps / 2 * expected.abs() + 8 * wide
        assert ((y.cpu().double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_add_gives_the_same_bits_wherever_an_element_lies(backend, dtype):
    """Covers ends of less than a pack and odd addresses."""
    count = 4104
    x, residual = make((count,), dtype, backend.device), make((count,), dtype, backend.device)
    op, state = backend.op("dropout_add_forward"), state_of(5, 8, backend.device)
    whole = op(x, residual, state, 0.3, None)[0]
    for part in (1, 13, 4097, 4103):
        assert torch.equal(op(x[:part], residual[:part], state, 0.3, None)[0], whole[:part])
    odd = torch.cat([x[:1], x])[1:]
    assert torch.equal(op(odd, residual, state, 0.3, None)[0], whole)


FUSED_SHAPES = [(3, 1), (5, 8), (33, 60), (6, 257), (9, 1000), (4, 1024), (2, 4096), (2, 5004), (1, 17000)]


RESIDUALS = {
    "a number of fp64": torch.tensor(0.5, dtype=torch.float64),
    "a number of an integer": torch.tensor(2),
    "fp64": torch.randn(4, 6, dtype=torch.float64),
    "bf16": torch.randn(4, 6).bfloat16(),
    "integers": torch.arange(24).view(4, 6),
    "a row": torch.randn(6),
    "more dimensions": torch.randn(2, 1, 6),
    "complex": torch.randn(4, 6) * 1j,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", RESIDUALS)
def test_residuals_promote_as_in_an_addition(name, dtype):
    x, residual = torch.randn(4, 6).to(dtype), RESIDUALS[name]
    shape, call = (6,), lambda: Philox(3)
    expected = fused.dropout(x, 0.4, generator=call()) + residual
    once = 8 * torch.finfo(dtype).eps  # the sum is rounded once, not twice
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=once)
    close(fused.dropout_add(x, residual, 0.4, generator=call()), expected)
    torch.testing.assert_close(fused.dropout_add(x, residual, 0.4, False), x + residual)
    if expected.is_complex():
        return
    for function in (fused.dropout_add_layer_norm, fused.dropout_add_rms_norm):
        y, total = function(x, residual, shape, p=0.4, prenorm=True, generator=call())
        close(total, expected)
        assert y.dtype == expected.dtype
    for function in (fused.add_layer_norm, fused.add_rms_norm):
        torch.testing.assert_close(function(x, residual, shape)[1], x + residual)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"), [(shape, DTYPES[i % 4]) for i, shape in enumerate(FUSED_SHAPES)] + [((6, 2048), DTYPES[2])]
)
def test_dropout_add_and_norm_in_one_pass(backend, shape, dtype, rms):
    """The sum is dropout_add's bit for bit; the norm's result may differ only by the order of summation.

    Backward is the norm's bit for bit, then the dropout's with one rounding fewer.
    """
    cols, p, device = shape[1], 0.3, backend.device
    x, residual, grad, grad_sum = (make(shape, dtype, device) for _ in range(4))
    weight, bias = make((cols,), dtype, device), None if rms else make((cols,), dtype, device)
    y, total, mean, rstd, state = backend.call(
        "dropout_layer_norm_forward", input=x, residual=residual, rng_state=state_of(9, 0, device), p=p,
        normalized_ndim=1, weight=weight, bias=bias, eps=1e-5, rms=rms, stats=True,
    )  # fmt: skip
    expected_total = backend.call("dropout_add_forward", input=x, residual=residual, rng_state=state, p=p)[0]
    assert torch.equal(total, expected_total)
    expected = backend.call(
        "layer_norm_forward", input=total, normalized_ndim=1, weight=weight, bias=bias, eps=1e-5, rms=rms, stats=True
    )
    for found, wanted in ((y, expected[0]), (mean, expected[2]), (rstd, expected[3])):
        # Sums in another order may tip a rounding to the output's dtype.
        assert (found is None and wanted is None) or torch.allclose(
            found, wanted, rtol=max(1e-5, torch.finfo(found.dtype).eps), atol=1e-5
        )
    mask = [True, True, True, not rms]
    found = backend.call(
        "dropout_layer_norm_backward", grad_output=grad, grad_sum=grad_sum, input=total, mean=mean, rstd=rstd,
        weight=weight, bias=bias, rng_state=state, p=p, normalized_ndim=1, output_mask=mask,
    )  # fmt: skip
    wanted = backend.call(
        "layer_norm_backward", grad_output=grad, grad_sum=grad_sum, input=total, mean=mean, rstd=rstd, weight=weight,
        bias=bias, normalized_ndim=1, output_mask=mask[1:],
    )  # fmt: skip
    assert torch.equal(found[1], wanted[0])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found[2:], wanted[1:], strict=True))
    dropped = backend.call(
        "dropout_apply", input=wanted[0], rng_state=state, p=p, inner=1, scale=1 / (1 - p), shift=0.0, dropped=0.0
    )
    assert torch.equal(found[0] == 0, dropped == 0)
    assert torch.allclose(found[0], dropped, rtol=2 * torch.finfo(dtype).eps, atol=0)


# The torch-facing side.


def kept(y):
    return y.detach().cpu() != 0


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "odd offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inplace", [False, True])
def test_mask_goes_by_the_logical_index(layout, inplace):
    """Values, strides and gradients as in torch, whose mask depends on the strides; here it does not."""
    plain = torch.randn(3, 5, 4, 6)
    expected_mask = torch.from_numpy(reference.keep_mask(3, 0, 0.4, plain.numel()).reshape(plain.shape))
    x = LAYOUTS[layout](plain)
    if inplace and layout == "expanded":
        with pytest.raises(RuntimeError, match="single memory location"):
            fused.dropout(x, 0.4, inplace=True, generator=Philox(3))
        return
    before = x.clone()
    x = x.requires_grad_()
    y = fused.dropout(x * 1 if inplace else x, 0.4, inplace=inplace, generator=Philox(3))
    assert torch.equal(y, torch.where(expected_mask, before * torch.tensor(1 / 0.6), 0))
    if not inplace:
        assert y.stride() == native.dropout(x, 0.4).stride()
    weights = LAYOUTS[layout](torch.randn(plain.shape))
    (grad,) = torch.autograd.grad(y, x, weights)
    assert torch.equal(grad, torch.where(expected_mask, weights * torch.tensor(1 / 0.6), 0))


def test_thread_count_does_not_change_the_mask():
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(fused.dropout(torch.ones(300_001), 0.3, generator=Philox(1)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [1, 256])
def test_streaming_stores_write_what_plain_ones_do(dtype, inner):
    op, state = torch.ops.dlkit.dropout_apply, state_of(8, 0)
    count = 2**26 // dtype.itemsize
    whole = op(torch.ones(count, dtype=dtype), state, 0.3, inner, 1.5, 0.0, 0.0)
    for size in (4096 * 256 + 1, 1000):
        part = op(torch.ones(size * inner, dtype=dtype)[:count], state, 0.3, inner, 1.5, 0.0, 0.0)
        assert torch.equal(whole[: part.numel()], part)


def test_evaluation_and_p_0_are_the_same_tensor_and_p_1_is_zero():
    x = torch.randn(5, 7, requires_grad=True)
    generator = torch.Generator().manual_seed(3)
    stream = Philox(3)
    before = generator.get_state()
    for source in (generator, stream):
        for inplace in (False, True):
            assert fused.dropout(x, 0.5, False, inplace, generator=source) is x
            assert fused.dropout(x, 0.0, True, inplace, generator=source) is x
        nothing = fused.dropout(torch.full((9,), math.nan, requires_grad=True), 1.0, generator=source)
        assert torch.equal(nothing, torch.zeros(9)) and nothing.requires_grad
        assert fused.dropout(torch.ones(0, 3), 0.5, generator=source).shape == (0, 3)
    assert torch.equal(generator.get_state(), before) and stream.state_dict() == {"seed": 3, "offset": 0}
    assert torch.autograd.grad(fused.dropout(x, 1.0).sum(), x)[0].abs().sum() == 0
    assert dlkit.nn.Dropout(0.5).eval()(x) is x


def test_a_scalar():
    x = torch.tensor(2.0, requires_grad=True)
    y = fused.dropout(x, 0.5, generator=Philox(1))
    assert y.shape == () and y.item() in (0.0, 4.0)
    assert torch.autograd.grad(y, x)[0].item() == y.item() / 2


@pytest.mark.parametrize("device", DEVICES)
def test_manual_seed_generators_and_fork(device):
    x = torch.ones(1000, device=device)
    torch.manual_seed(7)
    first, second = fused.dropout(x), fused.dropout(x)
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(fused.dropout(x), first)
    with torch.random.fork_rng():
        fused.dropout(x)
    assert torch.equal(fused.dropout(x), second)
    draws = [fused.dropout(x, generator=torch.Generator(device).manual_seed(7)) for _ in range(2)]
    assert torch.equal(*draws)
    torch.manual_seed(8)  # as another rank has
    assert not torch.equal(fused.dropout(x), first)


@pytest.mark.parametrize("device", DEVICES)
def test_philox_is_the_same_on_every_device_and_can_be_resumed(device):
    x = torch.ones(777, device=device)
    stream = Philox(2**63 + 5)
    for call in range(3):
        expected = reference.keep_mask(2**63 + 5, 8 * call, 0.5, 777)
        assert kept(fused.dropout(x, generator=stream)).tolist() == expected.tolist()
    saved = stream.state_dict()
    assert saved == {"seed": 2**63 + 5, "offset": 24}
    following = fused.dropout(x, generator=stream)
    resumed = Philox()
    resumed.load_state_dict(saved)
    with use(resumed) as active:
        assert active is resumed
        assert torch.equal(fused.dropout(x), following)
        with use(Philox(1)):
            inner = dlkit.nn.Dropout()(x)
        assert resumed.state_dict()["offset"] == 32
    assert torch.equal(inner, fused.dropout(x, generator=Philox(1)))
    assert dlkit.random.default() is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    x = torch.randn(64, 8, requires_grad=True)
    layer = dlkit.nn.Dropout(0.5)

    def block(t):
        return layer(t).sin()

    torch.manual_seed(1)
    y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=use_reentrant)
    (grad,) = torch.autograd.grad(y.sum(), x) if not use_reentrant else (y.sum().backward(), x.grad)[1:]
    torch.manual_seed(1)
    assert torch.equal(grad, torch.autograd.grad(block(x).sum(), x)[0])


@pytest.mark.parametrize("inplace", [False, True])
def test_gradients(inplace):
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)

    def call(t):
        return fused.dropout(t * 1, 0.4, inplace=inplace, generator=Philox(2)) * 2

    assert torch.autograd.gradcheck(call, x) and torch.autograd.gradgradcheck(call, x)
    y = call(x)
    (grad,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    assert torch.allclose(grad, 8 * x * kept(y) / 0.36)


class States(TorchDispatchMode):
    """Records the states of dropouts called under it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.name().startswith("dlkit::") and "forward" in func.name():
            self.found.append(result if isinstance(result, torch.Tensor) else result[-1])
        return result


def state_bytes(call):
    with States() as states:
        call()
    return [t.nbytes for t in states.found]


def test_what_is_kept():
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    few = 16 + x.numel() // 8 + 8  # seed and offset, a bit an element, room at the end
    assert state_bytes(lambda: fused.dropout(x)) == [few]
    assert state_bytes(lambda: fused.dropout(x * 1, inplace=True)) == [few]
    assert state_bytes(lambda: fused.dropout_add(x, x, 0.5)) == [few]
    assert state_bytes(lambda: fused.dropout_add_layer_norm(x, x, (16, 16))) == [few]
    odd = x[..., :3]  # rows of 48 bits would be whole bytes, rows of 3 are not
    assert state_bytes(lambda: fused.dropout_add_layer_norm(odd, odd, (16, 3))) == [16 + odd.numel() // 8 + 8]
    assert state_bytes(lambda: fused.dropout_add_rms_norm(odd, odd, (3,))) == [16]
    assert state_bytes(lambda: fused.dropout_add_layer_norm(x.detach(), x.detach(), (16,))) == [16]
    assert state_bytes(lambda: fused.dropout2d(x)) == [16]
    assert state_bytes(lambda: fused.dropout(x.to(memory_format=torch.channels_last))) == [few]
    assert state_bytes(lambda: fused.dropout(x, p=1.0)) == [16]
    assert state_bytes(lambda: fused.dropout(x.detach())) == [16]
    saved = []  # hooks get no bits: checkpoints compare sizes, offloading needs small tensors
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused.dropout(x)
    assert [t.nbytes for t in saved] == [16]


KEEPING = {  # dropout by a call that keeps its bits, and the factor of its gradient
    "dropout": (lambda x, p: fused.dropout(x, p), lambda p: 1 / (1 - p)),
    "in place": (lambda x, p: fused.dropout(x * 1, p, inplace=True), lambda p: 1 / (1 - p)),
    "add": (lambda x, p: fused.dropout_add(x, torch.ones_like(x), p), lambda p: 1 / (1 - p)),
    "alpha": (
        lambda x, p: fused.alpha_dropout(x, p, True),
        lambda p: ((1.7580993408473766**2 * p + 1) * (1 - p)) ** -0.5,
    ),
}


# Layouts of a tensor whose size is a multiple of six.
LAYOUTS_OF_SIX = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.t().contiguous().t(),
    "channels_last": lambda t: t.reshape(-1, 2, 3, 1).contiguous(memory_format=torch.channels_last),
    "channels_last, 19 channels": lambda t: torch.cat([t] * 19, 1).view(-1, 19, 3, 2).contiguous(
        memory_format=torch.channels_last
    ),
    "channels_last, large": lambda t: t.reshape(1, 3, -1, 2).contiguous(memory_format=torch.channels_last),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS_OF_SIX)
@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7, 64, 255, 4099])
def test_kept_bits_are_those_that_would_be_drawn(backend, dtype, count, name, layout):
    if not backend.instruction_set:
        pytest.skip("bits are kept on the CPU only")
    p, (call, factor) = 0.3, KEEPING[name]
    x = LAYOUTS_OF_SIX[layout](torch.randn(count, 6, dtype=dtype)).requires_grad_()
    torch.manual_seed(count)
    with States() as states:
        y = call(x, p)
    torch.manual_seed(count)
    with torch.no_grad():
        assert torch.equal(y, call(x, p))  # without a graph no bits are kept
    (state,) = states.found
    assert state.numel() > 2
    kept = torch.from_numpy(mask_of(backend, x.numel(), *state[:2].tolist(), p)).view(x.shape)
    # Gradients in the order of x's memory, in logical order, and in the reverse.
    reverse = torch.randn(x.shape[::-1], dtype=dtype).permute(*reversed(range(x.dim())))
    for grad in (torch.randn_like(x), torch.randn(x.shape, dtype=dtype), reverse):
        (found,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        wanted = (grad.to(wide) * factor(p)).to(dtype) * kept
        torch.testing.assert_close(found, wanted)
        assert torch.equal(found != 0, wanted != 0)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
# Short rows, groups of four rows with some left over, one row, and rows for which dropout and norm are two kernels.
@pytest.mark.parametrize("shape", [(3, 8), (131, 40), (1, 5000), (7, 1024), (3, 17_000)], ids=str)
def test_norms_keep_the_bits_that_would_be_drawn(backend, shape, dtype, rms):
    if not backend.instruction_set:
        pytest.skip("bits are kept on the CPU only")
    x, residual, grad = (torch.randn(shape, dtype=dtype) for _ in range(3))
    weight = torch.randn(shape[1:], dtype=dtype)

    def run(keep_bits):
        torch.manual_seed(3)
        y, total, mean, rstd, state = backend.call(
            "dropout_layer_norm_forward", input=x, residual=residual, p=0.3, normalized_ndim=1, weight=weight, eps=1e-5,
            rms=rms, stats=True, keep_bits=keep_bits,
        )  # fmt: skip
        gradients = backend.call(
            "dropout_layer_norm_backward", grad_output=grad, grad_sum=grad, input=total, mean=mean, rstd=rstd,
            weight=weight, rng_state=state, p=0.3, normalized_ndim=1, output_mask=[True] * 3 + [False],
        )  # fmt: skip
        return state, (y, total, rstd, *gradients[:3])

    (bits, kept), (plain, drawn) = run(True), run(False)
    assert plain.numel() == 2 < bits.numel() and torch.equal(plain, bits[:2])
    assert all(map(torch.equal, kept, drawn))
    mask = torch.from_numpy(mask_of(backend, x.numel(), *plain.tolist(), 0.3)).view(shape)
    assert torch.equal(kept[3] != 0, mask & (kept[4] != 0))


def test_function_transforms_have_the_same_mask():
    x = torch.randn(3, 8, dtype=torch.float64)

    def call(t):
        return fused.dropout(t, 0.4, generator=Philox(4))

    mask = kept(call(torch.ones_like(x)))
    scaled = mask.double() / 0.6
    assert torch.allclose(torch.func.grad(lambda t: call(t).sum())(x), scaled)
    assert torch.allclose(torch.func.jvp(call, (x,), (x * 2,))[1], x * 2 * scaled)
    assert torch.allclose(torch.func.jacrev(lambda t: call(t).sum())(x), scaled)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x.sin())
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(call(dual)).tangent, x.sin() * scaled)


def outcome(call):
    try:
        return call()
    except Exception as error:
        assert str(error).strip()
        return error


BAD_CALLS = {
    "p above 1": lambda f: f(torch.ones(3), 1.5),
    "p below 0": lambda f: f(torch.ones(3), -0.1),
    "p below 0 in evaluation": lambda f: f(torch.ones(3), -0.1, False),
    "p is NaN": lambda f: f(torch.ones(3), math.nan),
    "p is a string": lambda f: f(torch.ones(3), "a"),
    "p is None": lambda f: f(torch.ones(3), None),
    "no tensor": lambda f: f([1.0], 0.5),
    "None": lambda f: f(None, 0.5),
    "integers": lambda f: f(torch.ones(3, dtype=torch.int64), 0.5),
    "booleans": lambda f: f(torch.ones(3, dtype=torch.bool), 0.5),
    "in place on integers": lambda f: f(torch.ones(3, dtype=torch.int64), 0.5, True, True),
    "in place on a leaf": lambda f: f(torch.ones(3, requires_grad=True), 0.5, True, True),
    "in place on a view of a leaf": lambda f: f(torch.ones(3, requires_grad=True)[:2], 0.5, True, True),
    "in place on expanded": lambda f: f(torch.ones(1).expand(3), 0.5, True, True),
    "sparse": lambda f: f(torch.ones(3).to_sparse(), 0.5),
    "fp8": lambda f: f(torch.ones(3).to(torch.float8_e4m3fn), 0.5),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_raises_what_torch_raises(case):
    ours, theirs = (outcome(lambda f=f: BAD_CALLS[case](f)) for f in (fused.dropout, native.dropout))
    assert type(ours) is type(theirs), f"ours: {ours!r}, torch's: {theirs!r}"


@pytest.mark.parametrize("case", [name for name in BAD_CALLS if name not in ("sparse", "fp8", "integers", "booleans")])
def test_bad_input_leaves_generators_untouched(case):
    state, stream = torch.get_rng_state(), Philox(1)
    outcome(lambda: BAD_CALLS[case](fused.dropout))
    assert torch.equal(torch.get_rng_state(), state) or "integers" in case
    with use(stream):
        outcome(lambda: BAD_CALLS[case](fused.dropout))
    assert stream.state_dict() == {"seed": 1, "offset": 0}


def test_bad_generators():
    x = torch.ones(3)
    with pytest.raises(TypeError, match="generator"):
        fused.dropout(x, generator=3)
    with pytest.raises(TypeError, match="stream"), use(torch.Generator()):
        pass
    with pytest.raises(ValueError, match="64 bits"):
        Philox(2**64)
    with pytest.raises(ValueError, match="multiple of 4"):
        Philox().load_state_dict({"seed": 0, "offset": 3})
    with pytest.raises(TypeError, match="seed"):
        Philox(1.5)
    if torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="generator"):
            fused.dropout(x, generator=torch.Generator("cuda"))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    x, state = torch.randn(4, 6, requires_grad=grad), state_of(1, 0)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")  # aot_dispatch draws another mask
    ops = torch.ops.dlkit
    torch.library.opcheck(ops.dropout.default, (x, 0.5), test_utils=tests)
    torch.library.opcheck(ops.dropout.default, (x, 0.5), {"stream": state_of(1, 0)}, test_utils=tests)
    torch.library.opcheck(ops.dropout_apply.default, (x, state, 0.5, 1, 2.0, 0.0, 0.0))
    if not grad:
        torch.library.opcheck(ops.dropout_forward.default, (x, 0.5, 1, 2.0, 0.0, 0.0), test_utils=tests)
        torch.library.opcheck(ops.dropout_forward_.default, (x, None, 0.5, 1, 2.0, 0.0, 0.0), test_utils=tests)
        torch.library.opcheck(ops.philox_draw.default, (state,))


class Block(torch.nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.linear, self.first, self.second = (
            torch.nn.Linear(6, 6),
            dlkit.nn.Dropout(0.4),
            dlkit.nn.Dropout(0.2, inplace),
        )

    def forward(self, x):
        return self.second(torch.sin(self.linear(self.first(x))))


@pytest.mark.slow
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("mode", ["train", "no_grad", "inference"])
@pytest.mark.parametrize("stream", [False, True])
def test_compiled_masks_are_eager_s(inplace, mode, stream):
    """With fullgraph, dynamic shapes and several calls: each call draws the same masks as eager."""
    torch._dynamo.reset()
    block = Block(inplace)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    results = []
    inputs = [torch.randn(rows, 6) for rows in (3, 5, 8)]
    for run in (block, compiled):
        torch.manual_seed(5)
        source = Philox(5)
        with use(source) if stream else torch.enable_grad():
            for x in inputs:
                x = x.clone().requires_grad_(mode == "train")
                with {"train": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]():
                    y = run(x)
                results.append(y)
                if mode == "train":
                    results.extend(torch.autograd.grad(y.square().sum(), [x, *block.parameters()]))
        assert source.state_dict()["offset"] == (48 if stream else 0)
    half = len(results) // 2
    assert all(torch.equal(a, b) for a, b in zip(results[:half], results[half:], strict=True))


@pytest.mark.slow
def test_inductor_draws_eager_s_masks():
    torch._dynamo.reset()
    block = Block()
    compiled = torch.compile(block, fullgraph=True)
    x = torch.randn(16, 6, requires_grad=True)
    results = []
    for run in (block, compiled):
        torch.manual_seed(5)
        for _ in range(2):
            y = run(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])))
    for eager, fast in zip(results[:2], results[2:], strict=True):
        assert torch.equal(kept(eager[0]), kept(fast[0]))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(eager, fast, strict=True))


def test_modules_are_torchs_own():
    ours, theirs = dlkit.nn.Dropout(0.3, True), torch.nn.Dropout(0.3, True)
    assert isinstance(ours, torch.nn.Dropout) and repr(ours) == f"dlkit.{theirs!r}"
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.3))
    assert type(dlkit.replace(model)[1]) is dlkit.nn.Dropout
    assert type(dlkit.restore(model)[1]) is torch.nn.Dropout


def test_changed_input_in_place_is_noticed():
    x = torch.randn(8, requires_grad=True)
    y = x.exp()
    fused.dropout(y, 0.5, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# The fused ops, torch-facing.


def add_norm(function, x, residual, weight, bias, prenorm=True, **options):
    arguments = [(x.shape[-1],), weight, *([bias] if "layer" in function else [])]
    return getattr(fused, function)(x, residual, *arguments, p=0.4, prenorm=prenorm, **options)


FUSED = ["dropout_add_layer_norm", "dropout_add_rms_norm"]


@pytest.mark.parametrize("function", FUSED)
def test_fused_gradients(function):
    x, residual = (torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = (x, residual, weight, bias)[: 4 if "layer" in function else 3]

    def call(*tensors):
        return add_norm(function, *(*tensors, None)[:4], generator=Philox(2))

    assert torch.autograd.gradcheck(call, inputs) and torch.autograd.gradgradcheck(call, inputs)
    assert torch.autograd.gradcheck(lambda a, b: fused.dropout_add(a, b, 0.4, generator=Philox(2)), (x, residual))
    assert torch.autograd.gradgradcheck(lambda a, b: fused.dropout_add(a, b, 0.4, generator=Philox(2)), (x, residual))
    for needs in ((True, False), (False, True)):
        a, b = x.detach().requires_grad_(needs[0]), residual.detach().requires_grad_(needs[1])
        y, total = add_norm(function, a, b, weight, bias, generator=Philox(2))
        mask = kept(fused.dropout(torch.ones_like(x), 0.4, generator=Philox(2)))
        (grad,) = torch.autograd.grad(total.sum() + 0 * y.sum(), a if needs[0] else b)
        assert torch.allclose(grad, mask.double() / 0.6 if needs[0] else torch.ones_like(x))


@pytest.mark.parametrize("function", FUSED)
def test_fused_is_the_sum_of_its_parts(function):
    """As the three calls, with broadcasting, promotion, evaluation, p of 0 and 1, strided input, integers."""
    weight, bias = torch.randn(6), torch.randn(6)
    for x, residual in (
        (torch.randn(4, 5, 6), torch.randn(4, 5, 6)),
        (torch.randn(4, 5, 6), torch.randn(5, 6)),
        (torch.randn(4, 5, 6).bfloat16(), torch.randn(4, 5, 6)),
        (torch.randn(6, 5, 4).transpose(0, 2), torch.randn(4, 5, 12)[..., ::2]),
        (torch.randn(0, 6), torch.randn(0, 6)),
    ):
        for p, training in ((0.4, True), (0.0, True), (1.0, True), (0.4, False)):
            total = fused.dropout(x, p, training, generator=Philox(3)) + residual
            assert torch.allclose(fused.dropout_add(x, residual, p, training, generator=Philox(3)), total, atol=1e-6)
            arguments = [(6,), weight, *([bias] if "layer" in function else [])]
            options = {"p": p, "training": training, "prenorm": True, "generator": Philox(3)}
            y, found = getattr(fused, function)(x, residual, *arguments, **options)
            assert torch.allclose(found, total, atol=1e-6) and found.dtype == total.dtype
            expected = getattr(fused, function.removeprefix("dropout_add_"))(total, *arguments)
            assert torch.allclose(y, expected, atol=1e-4)
            assert torch.equal(
                getattr(fused, function)(
                    x, residual, *arguments, **{**options, "prenorm": False, "generator": Philox(3)}
                ),
                y,
            )


@pytest.mark.parametrize("function", [*FUSED, "dropout_add"])
def test_fused_ops_draw_what_dropout_draws_and_compile(function):
    x, residual, weight = torch.randn(7, 6), torch.randn(7, 6), torch.ones(6, requires_grad=True)

    def run(x, residual):
        if function == "dropout_add":
            return fused.dropout_add(x, residual, 0.4) * weight
        return add_norm(function, x, residual, weight, None)[1] * weight

    torch.manual_seed(4)
    mask = kept(fused.dropout(torch.ones(7, 6), 0.4))
    torch._dynamo.reset()
    results = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(4)
        leaf = x.clone().requires_grad_()
        y = call(leaf, residual)
        results.append((y, *torch.autograd.grad(y.square().sum(), (leaf, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(results[0][0].detach(), torch.where(mask, x / 0.6 + residual, residual)) or torch.allclose(
        results[0][0].detach(), torch.where(mask, x / 0.6 + residual, residual)
    )
    if function != "dropout_add":
        op = getattr(torch.ops.dlkit, function).default
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op, (x, residual, (6,), 0.4, weight), test_utils=tests)


def test_fused_modules():
    x, residual = torch.randn(5, 12), torch.randn(5, 12)
    for kind, plain in (("DropoutAddLayerNorm", dlkit.nn.LayerNorm), ("DropoutAddRMSNorm", dlkit.nn.RMSNorm)):
        module = getattr(dlkit.nn, kind)(12, 0.3, prenorm=True)
        torch.nn.init.normal_(module.weight)
        norm = plain(12)
        norm.load_state_dict(module.state_dict())
        with use(Philox(6)):
            y, total = module(x, residual)
        expected = dlkit.nn.DropoutAdd(0.3)
        with use(Philox(6)):
            assert torch.allclose(expected(x, residual), total, atol=1e-6)
        assert torch.allclose(y, norm(total), atol=1e-5)
        module.prenorm = False
        assert torch.allclose(module.eval()(x, residual), norm(x + residual), atol=1e-5)
        assert "p=0.3" in repr(module) and "p=0.3" in repr(expected)
        with pytest.raises(ValueError, match="between 0 and 1"):
            getattr(dlkit.nn, kind)(12, 1.5)
