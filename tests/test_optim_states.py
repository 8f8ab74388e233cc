"""Masters, states of other types, 8 bits, averages and stochastic rounding in each backend's op of the optimizers."""

import pytest
import torch
from support.optimizers import (
    ALGORITHMS,
    DTYPES,
    SIZES,
    STATES,
    VARIANTS,
    Op,
    gradients,
    is_signed,
    join,
    laid_out,
    name_of,
    starting_params,
    with_codes,
)

from dlkit._dynamic_map import dynamic_map
from dlkit.optim import _int8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[6]], ids=name_of)
def test_a_remainder_makes_16_bits_exact(backend, variant, dtype):
    """The two halves together take exactly the steps of an fp32 parameter."""
    params = starting_params(dtype)
    halves = [torch.zeros_like(p, dtype=torch.int16, device=backend.device) for p in params]
    ours = Op(backend, variant, params, torch.float32, remainders=halves)
    theirs = Op(backend, variant, [p.float() for p in params])
    for step in range(4):
        grads = [grad.to(backend.device) for grad in gradients(SIZES, dtype, step)]
        ours.step(grads)
        theirs.step([grad.float() for grad in grads])
        for high, rest, whole in zip(ours.params, halves, theirs.params, strict=True):
            joined = join(high.cpu(), rest.cpu())
            if dtype == torch.float16:
                torch.testing.assert_close(joined, whole.cpu(), rtol=1e-7, atol=2.0**-40)
                assert torch.equal(joined.half(), high.cpu())
            else:
                assert torch.equal(joined, whole.cpu())
                assert ((joined - high.cpu().float()).abs() <= 2.0**-8 * joined.abs()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_parameter_written_to_keeps_what_was_written(backend, dtype):
    """All 16-bit values, with remainders of other values: steps of zero change none of their bits."""
    high = torch.arange(-(2**15), 2**15).short()
    marks = torch.tensor([0, 1, -1, 32767, -32767, -32768, 16384, -16384, -16385]).short()
    rests = []
    for _ in range(max(1, backend.draws // 16)):
        any_rest, mark = torch.randint_like(high, -(2**15), 2**15), marks[torch.randint(len(marks), high.shape)]
        rests.append(torch.where(torch.rand(high.shape) < 0.5, any_rest, mark))
    params = [high.view(dtype)] * len(rests)
    halves = [rest.to(backend.device, copy=True) for rest in rests]
    ema = [torch.zeros(high.shape, device=backend.device) for _ in rests]
    ours = Op(backend, ("SGD", {"lr": 1.0}), params, torch.float32, remainders=halves, ema=ema)
    grads = [torch.zeros_like(p) for p in ours.params]
    ours.step(grads)
    kept = [(p.clone(), rest.clone()) for p, rest in zip(ours.params, halves, strict=True)]
    finite = params[0].isfinite()
    for p, rest, average in zip(ours.params, rests, ema, strict=True):
        assert torch.equal(p.cpu().isnan(), params[0].isnan())
        assert torch.equal(p.cpu().view(torch.int16)[~p.cpu().isnan()], high[~params[0].isnan()])
        value = join(params[0], rest)[finite]  # the average of an infinity is not compared
        assert torch.equal(average.cpu()[finite].view(torch.int32), value.view(torch.int32))
    # The next step reads the last one's remainders, also in the parameter's own dtype.
    ours.extras["remainders"] = [rest.view(dtype) for rest in halves]
    ours.step(grads)
    for p, rest, (p_before, rest_before) in zip(ours.params, halves, kept, strict=True):
        assert torch.equal(p.view(torch.int16), p_before.view(torch.int16)) and torch.equal(rest, rest_before)
    assert not any(rest[~finite].any() or rest[high == 0].any() for rest in halves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_near_zero(backend, dtype):
    """fp16 masters keep values of either sign that fp16 itself cannot hold; values too small for bf16 become zero."""
    least = 2.0**-25 if dtype == torch.float16 else 2.0**-134  # the least magnitude that does not round to 0 in bf16
    steps = torch.tensor([[0.75, -0.75, 2, 0.5, -1.25], [-1.5, 1.25, 0.25, 0.25, 0.75], [0.5, -0.25, -2.75, -0.5, 0]])
    halves = [torch.zeros(5, dtype=torch.int16, device=backend.device)]
    ours = Op(backend, ("SGD", {"lr": least}), [torch.zeros(5, dtype=dtype)], torch.float32, remainders=halves)
    expected = torch.zeros(5, dtype=torch.float64)
    for step in steps:
        ours.step([-step.to(dtype).to(backend.device)])
        expected += step
        if dtype == torch.bfloat16:
            expected[expected.abs() < 1] = 0
        assert torch.equal(join(ours.params[0].cpu(), halves[0].cpu()).double(), expected * least)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_in_another_type(backend, dtype, state_dtype):
    for variant in (VARIANTS[3], VARIANTS[11]):
        params = starting_params(dtype)
        ours, wide = Op(backend, variant, params, state_dtype), Op(backend, variant, params, torch.float32)
        grads = [grad.to(backend.device) for grad in gradients(SIZES, dtype, 0)]
        ours.step(grads)
        wide.step(grads)
        for key in ours.states:
            for a, b in zip(ours.states[key], wide.states[key], strict=True):
                assert a.dtype == state_dtype and torch.equal(a, b.to(state_dtype)), key
        assert all(torch.equal(a, b) for a, b in zip(ours.params, wide.params, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_states(backend, dtype):
    """Each step is that of fp32 states, decoded before it and encoded after it."""
    for variant in (VARIANTS[1], VARIANTS[6], VARIANTS[11]):
        params = starting_params(dtype)
        ours = with_codes(backend, variant, params)
        signed = {key: is_signed(key) for key in ours.states}
        theirs = Op(backend, variant, params, torch.float32)
        for step in range(2):
            for key, codes in ours.states.items():
                scales = ours.scales[key]
                theirs.states[key] = [_int8.decode(c, s, signed[key]) for c, s in zip(codes, scales, strict=True)]
            grads = [grad.to(backend.device) for grad in gradients(SIZES, dtype, step)]
            ours.step(grads)
            theirs.step(grads)
            assert all(torch.equal(a, b) for a, b in zip(ours.params, theirs.params, strict=True))
            for key, wide in theirs.states.items():
                for code, scale, values in zip(ours.states[key], ours.scales[key], wide, strict=True):
                    expected_code, expected_scale = _int8.encode(values, signed[key])
                    assert torch.equal(code, expected_code) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("variant", [("SGD", {"momentum": 0.5}), ("RMSprop", {"alpha": 0.0})], ids=name_of)
def test_8_bit_codes_are_the_nearest(backend, variant):
    """States at the midpoints between the values of the map, and a step of fp32 to either side."""
    signed = variant[0] == "SGD"
    table = dynamic_map(signed)
    middle = (table[1:] + table[:-1]) / 2
    near = torch.cat([middle, middle.nextafter(torch.tensor(9.0)), middle.nextafter(torch.tensor(-9.0)), table, -table])
    near = near if signed else near.clamp(min=0).sqrt()
    blocks = [torch.cat([torch.ones(1), part]) for part in near.split(255)]
    grads = [torch.cat(blocks).to(backend.device)]
    params = [torch.zeros_like(grads[0], device="cpu")]
    ours, theirs = with_codes(backend, variant, params), Op(backend, variant, params, torch.float32)
    (key,) = ours.states
    ours.step(grads)
    theirs.step(grads)
    code, scale = _int8.encode(theirs.states[key][0], signed)
    assert torch.equal(ours.states[key][0], code) and torch.equal(ours.scales[key][0], scale)


def test_a_positive_second_moment_is_never_the_code_of_0(backend):
    """However small it is beside the largest of its block: a root of 0 would make its step arbitrarily long."""
    grad = torch.logspace(-18, 15, 400)  # squares from 1e-36 to 1e30, some of which underflow over the largest
    grad[::9] = 0
    grad[256:] = grad[256:].clamp(max=1e-18)
    ours = with_codes(backend, ("RMSprop", {"alpha": 0.0}), [torch.zeros(400)])
    ours.step([grad.to(backend.device)])
    codes, scale = ours.states["square_avg"][0].cpu(), ours.scales["square_avg"][0].cpu()
    assert torch.equal(codes > 0, grad > 0)
    expected_codes, expected_scale = _int8.encode(grad.square(), False)
    assert torch.equal(codes, expected_codes) and torch.equal(scale, expected_scale)
    # A block with an infinity is NaN throughout.
    ours.step([torch.full_like(grad, 1e30).where(torch.arange(400) == 7, grad).to(backend.device)])
    value = _int8.decode(ours.states["square_avg"][0].cpu(), ours.scales["square_avg"][0].cpu(), False)
    assert value[:7].isnan().all() and value[256:].isfinite().all()


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_8_bit_blocks_are_of_the_logical_order(backend, layout):
    """Codes and scales do not depend on how the parameter, its gradient or the codes lie in memory."""
    sizes = [(20, 30), (8, 6, 5, 3), (3,), (1, 300, 2)]
    params = starting_params(torch.float32, sizes)
    for variant in (VARIANTS[1], VARIANTS[11]):
        ours, theirs = (with_codes(backend, variant, params, how) for how in (layout, "contiguous"))
        mixed = with_codes(backend, variant, params)
        mixed.params = [laid_out(p, layout) for p in mixed.params]
        for step in range(2):
            grads = [grad.to(backend.device) for grad in gradients(sizes, torch.float32, step)]
            ours.step([laid_out(grad, layout) for grad in grads])
            theirs.step(grads)
            mixed.step(grads)
        for op in (ours, mixed):
            for (key, a), (_, b) in zip(op.results(), theirs.results(), strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), key
            for key, scales in op.scales.items():
                assert all(torch.equal(x, y) for x, y in zip(scales, theirs.scales[key], strict=True)), key
        assert not ours.params[1].is_contiguous()


def test_8_bit_conversions_know_neither_layout_nor_default_device():
    values = torch.randn(24, 40)
    with torch.device("meta"):
        codes, scale = _int8.encode(values, True)
    assert codes.device.type == "cpu" and codes.is_contiguous() and dynamic_map(True).device.type == "cpu"
    turned_codes, turned_scale = _int8.encode(laid_out(values, "transposed"), True)
    assert torch.equal(codes, turned_codes) and torch.equal(scale, turned_scale) and turned_codes.is_contiguous()
    decoded = _int8.decode(codes, scale, True)
    turned = _int8.decode(laid_out(codes, "transposed"), scale, True)
    assert torch.equal(turned, decoded) and not turned.is_contiguous()
    # Memory order, in which version 0.1 cut blocks.
    old_codes, old_scale = _int8.encode(values.t(), True)
    assert torch.equal(
        _int8.decode_memory_order(old_codes.t(), old_scale, True).t(), _int8.decode(old_codes, old_scale, True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_average_of_the_weights(backend, dtype):
    params = starting_params(dtype)
    average = torch.float64 if dtype == torch.float64 else torch.float32
    ema = [p.to(backend.device, average, copy=True) for p in params]
    ours = Op(backend, VARIANTS[0], params, ema=ema, ema_decay=0.7)
    expected = [t.clone() for t in ema]
    for step in range(3):
        ours.step([grad.to(backend.device) for grad in gradients(SIZES, dtype, step)])
        for a, b in zip(expected, ours.params, strict=True):
            a.lerp_(b.to(average), 1 - 0.7)
    for a, b in zip(ema, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding(backend, dtype):
    """Rounds to a neighbour, up with a probability equal to the part cut off, by bits of the defined stream."""
    start = torch.cat([torch.full((4000,), 1.0), torch.full((4000,), -3.0), torch.full((96,), 2.0**-20)]).to(dtype)
    lr = 0.25 * torch.finfo(dtype).eps
    grad = torch.ones_like(start)
    variant = ("SGD", {"lr": lr})
    ours = Op(backend, variant, [start, start], seed=1234, stochastic_rounding=True)
    ours.step([grad.to(backend.device)] * 2)
    found = [p.cpu() for p in ours.params]
    whole = start.float() - lr
    for index, param in enumerate(found):
        bits = stochastic_bits(1234, index, len(start))
        assert torch.equal(param, round_stochastically(whole, bits, dtype))
        assert abs(float(param[:8000].double().mean()) + 1.0 + lr) < 0.1 * torch.finfo(dtype).eps
    assert not torch.equal(*found)
    again = Op(backend, variant, [start, start], seed=1234, stochastic_rounding=True)
    again.step([grad.to(backend.device)] * 2)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(again.params, found, strict=True))
    for arguments in ({"seed": 1234}, {"stochastic_rounding": True}):  # both are needed
        nearest = Op(backend, variant, [start], **arguments)
        nearest.step([grad.to(backend.device)])
        assert torch.equal(nearest.params[0].cpu(), whole.to(dtype))


TYPES_OF_STATES = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)]


@pytest.mark.parametrize(("dtype", "state_dtype"), TYPES_OF_STATES)
def test_stochastic_states(backend, dtype, state_dtype):
    """Each such state uses its own stream, the others round to nearest, and the parameter sees exact states."""
    sizes = [(2000,), (40,)]
    params = starting_params(dtype, sizes)
    for variant, chosen in ((VARIANTS[1], (0, 1)), (VARIANTS[11], (1, 2)), (VARIANTS[6], (0,))):
        ours = Op(backend, variant, params, state_dtype, seed=99, stochastic_states=chosen)
        wide = Op(backend, variant, params, torch.float32)
        grads = [grad.to(backend.device) for grad in gradients(sizes, dtype, 0)]
        ours.step(grads)
        wide.step(grads)
        names = STATES[ALGORITHMS[variant[0]]]
        for key, states in ours.states.items():
            for index, (a, b) in enumerate(zip(states, wide.states[key], strict=True)):
                state = names.index(key)
                expected = b.cpu().to(state_dtype)
                if state in chosen:
                    counted = bool(ours.steps) and not backend.name.startswith("cpu-")
                    bits = stochastic_bits(99, index, len(a), state + 1, int(counted))
                    expected = round_stochastically(b.cpu(), bits, state_dtype)
                assert torch.equal(a.cpu(), expected), key
        assert all(torch.equal(a, b) for a, b in zip(ours.params, wide.params, strict=True))


def test_stochastic_states_let_a_second_moment_shrink(backend):
    """Rounded to nearest, a bf16 value times 0.999 is unchanged."""
    start, steps = torch.ones(1024), 40
    variant = ("AdamW", {"lr": 0.0})
    means = []
    for state_dtype, chosen in ((torch.float32, ()), (torch.bfloat16, (1,)), (torch.bfloat16, ())):
        ours = Op(backend, variant, [start], state_dtype, stochastic_states=chosen)
        ours.states["exp_avg_sq"][0].fill_(1)
        for seed in range(steps):
            ours.step([torch.full_like(ours.params[0], 0.01)], seed=seed)
        means.append(float(ours.states["exp_avg_sq"][0].double().mean()))
    assert abs(means[1] - means[0]) < 0.003 and means[0] < 0.97 and means[2] == 1


def stochastic_bits(seed, index, count, stream=0, step=0):
    """16 bits an element, from Philox4x32-10 in Python's integers. `step`: 0 where its counter is on the host."""
    result = []
    for block in range(-(-count // 8)):
        c = [index, step, block & 0xFFFFFFFF, block >> 32 | stream << 28]
        k = [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        result += [word >> shift & 0xFFFF for word in c for shift in (0, 16)]
    return torch.tensor(result[:count])


def round_stochastically(values, bits, dtype):
    if dtype == torch.bfloat16:
        return ((values.view(torch.int32).long() + bits) >> 16 << 16).int().view(torch.float32).to(dtype)
    exponent = torch.frexp(values.double().abs().clamp(min=2.0**-14)).exponent - 1
    unit = torch.ldexp(torch.ones(len(values), dtype=torch.float64), exponent - 10)
    return ((values.double().abs() / unit + (bits >> 3) / 8192).floor() * unit * values.sign()).to(dtype)
