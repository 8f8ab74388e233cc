"""The optimizers: each backend's op against exact formulas by the yardstick of torch, then the classes."""

import copy
import math
import pickle

import pytest
import torch
from support.reference import exact, optimizer_step
from support.tolerance import Yardstick

import dlkit
from dlkit._dynamic_map import dynamic_map
from dlkit.optim import _int8
from dlkit.optim._options import OPTIONS

CLASSES = ("Adam", "AdamW", "SGD", "RMSprop")
ALGORITHMS = {"Adam": "adam", "AdamW": "adam", "SGD": "sgd", "RMSprop": "rmsprop"}
STATES = {
    "adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "rmsprop": ("square_avg", "grad_avg", "momentum_buffer"),
}
VARIANTS = [  # class, torch's arguments
    ("AdamW", {}),
    ("AdamW", {"lr": 0.05, "amsgrad": True, "maximize": True, "betas": (0.3, 0.7)}),
    ("Adam", {"weight_decay": 0.1, "eps": 1e-3}),
    ("Adam", {"weight_decay": 0.2, "amsgrad": True, "betas": (0.8, 0.4)}),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.3, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    ("SGD", {"lr": 0.1, "momentum": 0.7, "nesterov": True, "weight_decay": 0.1}),
    ("RMSprop", {}),
    ("RMSprop", {"weight_decay": 0.1, "centered": True, "alpha": 0.7}),
    ("RMSprop", {"momentum": 0.9, "maximize": True}),
    ("RMSprop", {"momentum": 0.5, "centered": True, "weight_decay": 0.1}),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = [(1,), (3,), (17, 15), (256,), (257,), (0,), (1000,), (2, 2, 1279)]


def name_of(variant):
    return "-".join([variant[0], *(f"{key}={value}" for key, value in variant[1].items())])


def gradients(sizes, dtype, step):
    """The gradients of one step, over a few decades, the same for whoever asks."""
    generator = torch.Generator().manual_seed(1000 + step)
    draw = [torch.randn((2, *size), generator=generator, dtype=torch.float64) for size in sizes]
    return [(a * torch.exp2(b.round())).to(dtype) for a, b in draw]


class Torch:
    """torch's optimizer on tensors of its own."""

    def __init__(self, variant, params, dtype):
        self.params = [p.detach().to(dtype, copy=True).requires_grad_() for p in params]
        name, arguments = variant
        self.optimizer = getattr(torch.optim, name)(self.params, **arguments)

    def step(self, grads):
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad.to(param.dtype)
        self.optimizer.step()

    def results(self):
        """[(what, tensors)]: the parameters and each state."""
        states = [self.optimizer.state[p] for p in self.params]
        keys = [key for key in states[0] if key != "step"]
        return [("param", [p.detach() for p in self.params])] + [(key, [s[key] for s in states]) for key in keys]


class Exact:
    """The formulas in longdouble."""

    def __init__(self, variant, params):
        self.name = variant[0]
        probe = getattr(torch.optim, self.name)([torch.zeros(1, requires_grad=True)], **variant[1])
        self.arguments = {key: value for key, value in probe.param_groups[0].items() if key != "params"}
        self.arguments["lr"] = float(self.arguments["lr"])
        self.params = [exact(p) for p in params]
        self.states = [{} for _ in params]
        self.t = 0

    def step(self, grads):
        self.t += 1
        for i, (grad, state) in enumerate(zip(grads, self.states, strict=True)):
            self.params[i] = optimizer_step(self.name, self.arguments, self.t, self.params[i], exact(grad), state)

    def results(self):
        return [("param", self.params), *((key, [s[key] for s in self.states]) for key in self.states[0])]


class Op:
    """The op of a backend on plain lists of tensors."""

    def __init__(self, backend, variant, params, state_dtype=None, layout="contiguous", **extras):
        self.name, self.backend = variant[0], backend
        self.algorithm = ALGORITHMS[self.name]
        probe = getattr(torch.optim, self.name)([torch.zeros(1, requires_grad=True)], **variant[1])
        group = probe.param_groups[0]
        beta1, beta2 = group.get("betas", (0, 0))
        row = {**{key: group.get(key, 0) for key in OPTIONS}, "beta1": beta1, "beta2": beta2}
        row["ema_decay"] = extras.pop("ema_decay", 0)
        row["stochastic_rounding"] = extras.pop("stochastic_rounding", False)
        row["stochastic_states"] = sum(1 << s for s in extras.pop("stochastic_states", ()))
        self.row = [float(row[key]) for key in OPTIONS]
        self.place = lambda tensor: laid_out(tensor.to(backend.device), layout)
        self.params = [self.place(p.detach().clone()) for p in params]
        used = {
            "adam": [True, True, group.get("amsgrad")],
            "sgd": [group.get("momentum", 0) != 0],
            "rmsprop": [True, group.get("centered"), group.get("momentum", 0) > 0],
        }[self.algorithm]
        self.states = {
            key: [self.place(torch.zeros_like(p, dtype=state_dtype or p.dtype)) for p in params]
            for key, wanted in zip(STATES[self.algorithm], used, strict=True)
            if wanted
        }
        steps = self.algorithm != "sgd"
        self.steps = [torch.zeros((), device=backend.device) for _ in params] if steps else []
        self.first = self.algorithm == "sgd"
        self.scales = extras.pop("scales", {})
        self.extras = {"remainders": [], "ema": [], "grad_norm": None, "max_norm": 0.0, "seed": None, **extras}

    def step(self, grads, grad_scale=None, found_inf=None, write_grads=False, **changes):
        extras = {**self.extras, **changes}
        row = list(self.row)
        if self.first:  # torch's first step fills the buffer with the gradient, undamped
            row[OPTIONS.index("dampening")] = 0.0
        states = [self.states.get(key, []) for key in STATES[self.algorithm]] + [[], []]
        scales = [self.scales.get(key, []) for key in STATES[self.algorithm]] + [[], []]
        self.backend.op("optim_step_")(
            self.algorithm, self.params, grads, *states[:3], *scales[:3], extras["remainders"], extras["ema"],
            self.steps, [0] * len(grads), row, [], extras["grad_norm"], extras["max_norm"], grad_scale, found_inf,
            write_grads, extras["seed"],
        )  # fmt: skip
        self.first = False

    def results(self):
        return [("param", self.params), *self.states.items()]


def laid_out(tensor, layout):
    """The same values, laid out in another way."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "odd offset":
        padded = tensor.new_zeros(tensor.numel() + 1)
        padded[1:] = tensor.reshape(-1)
        return padded[1:].view(tensor.shape)
    if layout == "strided" and tensor.dim() > 0:
        return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]
    return tensor


def compare(ours, theirs, reference, ulps=1):
    """Parameters and states of ours against exact ones, by the error of torch's."""
    results = [dict(run.results()) for run in (ours, theirs, reference)]
    assert results[0].keys() == results[1].keys() == results[2].keys()
    for name in results[0]:
        yardstick = Yardstick(name)
        for a, b, c in zip(*(result[name] for result in results), strict=True):
            yardstick.add(a.detach().cpu(), b, c)
            yardstick.add_native(b, c)
        assert yardstick.holds(ulps), yardstick


def starting_params(dtype, sizes=SIZES):
    return [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]


def run_parity(backend, variant, dtype, layout="contiguous", steps=3):
    params = starting_params(dtype)
    ours = Op(backend, variant, params, layout=layout)
    theirs, reference = Torch(variant, params, dtype), Exact(variant, params)
    for step in range(steps):
        grads = gradients(SIZES, dtype, step)
        ours.step([ours.place(grad) for grad in grads])
        theirs.step(grads)
        reference.step(grads)
    compare(ours, theirs, reference, backend.ulps)
    assert all(float(step) == steps for step in ours.steps)


CASES = [(v, DTYPES[(i + j) % 4]) for i, v in enumerate(VARIANTS) for j in range(2)]


@pytest.mark.parametrize(("variant", "dtype"), [pytest.param(v, d, id=f"{name_of(v)}-{str(d)[6:]}") for v, d in CASES])
def test_parity(backend, variant, dtype):
    run_parity(backend, variant, dtype)


MIXED = [(a, b) for a in DTYPES for b in DTYPES if a != b]


@pytest.mark.parametrize(("dtype", "grad_dtype"), MIXED, ids=lambda dtype: str(dtype)[6:])
def test_gradients_of_another_dtype(backend, dtype, grad_dtype):
    """Taken as they are, not rounded to the parameter's dtype first; fp64 on either side is converted."""
    for variant in (VARIANTS[0], VARIANTS[7], VARIANTS[10]):
        params = starting_params(dtype)
        ours, theirs, reference = Op(backend, variant, params), Torch(variant, params, dtype), Exact(variant, params)
        for step in range(2):
            grads = gradients(SIZES, grad_dtype, step)
            ours.step([grad.to(backend.device) for grad in grads])
            theirs.step(grads)
            reference.step(grads)
        compare(ours, theirs, reference, backend.ulps)


@pytest.mark.parametrize("layout", ["contiguous", "odd offset", "strided"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=lambda dtype: str(dtype)[6:])
def test_gradients_of_another_dtype_are_not_rounded(backend, state_dtype, layout):
    """Bit for bit the step of fp32 parameters and gradients, but for the parameters' own rounding."""
    pairs = [(a, b) for a, b in MIXED if a != torch.float64]
    sizes = [(3,), (17, 15), (257,), (1000,)]
    for dtype, grad_dtype in pairs if backend.draws > 2 else pairs[::2]:
        for variant in (VARIANTS[1], VARIANTS[6]):
            params = starting_params(dtype, sizes)
            make = with_codes if state_dtype == torch.uint8 else Op
            rest = () if state_dtype == torch.uint8 else (state_dtype,)
            ours = make(backend, variant, params, *rest)
            theirs = make(backend, variant, [p.float() for p in params], *rest)
            grads = [grad.to(backend.device) for grad in gradients(sizes, grad_dtype, 0)]
            given = [laid_out(grad.clone(), layout) for grad in grads]
            wide = [grad.to(torch.float32, copy=True) for grad in grads]
            arguments = {"grad_norm": scalar(4.0, backend), "max_norm": 3.0, "write_grads": layout != "odd offset"}
            ours.step(given, **arguments)
            theirs.step(wide, **arguments)
            for key, states in ours.states.items():
                assert all(torch.equal(a, b) for a, b in zip(states, theirs.states[key], strict=True)), key
            for a, b in zip(ours.params, theirs.params, strict=True):
                assert torch.equal(a, b.to(dtype))
            for a, b, before in zip(given, wide, grads, strict=True):
                assert torch.equal(a, b.to(grad_dtype) if arguments["write_grads"] else before)


@pytest.mark.parametrize("layout", ["transposed", "odd offset", "strided"])
def test_layouts(backend, layout):
    for variant, dtype in ((VARIANTS[0], torch.float32), (VARIANTS[11], torch.bfloat16), (VARIANTS[3], torch.float64)):
        run_parity(backend, variant, dtype, layout, steps=2)


def scalar(value, backend, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=backend.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_norm(backend, dtype):
    grads = [grad.to(backend.device) for grad in gradients([*SIZES, (40_000,)], dtype, 0)]
    expected = math.sqrt(sum(float((exact(grad) ** 2).sum()) for grad in grads))
    found = backend.op("optim_grad_norm")(grads)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and found.shape == ()
    assert abs(float(found) - expected) <= 2 * torch.finfo(found.dtype).eps * expected
    assert torch.equal(found, backend.op("optim_grad_norm")(grads))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda dtype: str(dtype)[6:])
def test_clip_grads(backend, dtype):
    grads = [grad.to(backend.device) for grad in gradients(SIZES, dtype, 0)]
    norm = backend.op("optim_grad_norm")(grads)
    for max_norm in (0.3 * float(norm), 2 * float(norm)):
        ours = [grad.clone() for grad in grads]
        backend.op("optim_clip_grads_")(ours, norm, max_norm)
        factor = min(1.0, max_norm / (float(norm) + 1e-6))
        for a, b in zip(ours, grads, strict=True):
            torch.testing.assert_close(a, (b.double() * factor).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("write_grads", [False, True])
@pytest.mark.parametrize(("variant", "dtype"), [(VARIANTS[1], DTYPES[0]), (VARIANTS[7], DTYPES[2])], ids=str)
def test_scaled_and_clipped_gradients(backend, variant, dtype, write_grads):
    params, scale, max_norm = starting_params(dtype), 1024.0, 0.5
    ours, theirs = Op(backend, variant, params), Op(backend, variant, params)
    for step in range(2):
        grads = [grad.to(backend.device) for grad in gradients(SIZES, dtype, step)]
        norm = backend.op("optim_grad_norm")(grads)
        factor = max_norm / (float(norm) + 1e-6)
        scaled, clipped = [g * scale for g in grads], [(g.double() * factor).to(dtype) for g in grads]
        given = [g.clone() for g in scaled]
        arguments = {"grad_norm": norm, "max_norm": max_norm, "grad_scale": scalar(scale, backend)}
        ours.step(scaled, **arguments, write_grads=write_grads)
        theirs.step(clipped)
        tolerance = 4 * torch.finfo(dtype).eps
        for left, wanted in zip(scaled, clipped if write_grads else given, strict=True):
            torch.testing.assert_close(left, wanted, rtol=tolerance if write_grads else 0, atol=0)
    for (name, a), (_, b) in zip(ours.results(), theirs.results(), strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=8 * tolerance, atol=8 * tolerance, msg=name)


def test_nothing_is_written_where_an_infinity_was_found(backend):
    params = starting_params(torch.float32)
    ours = Op(backend, VARIANTS[1], params)
    grads = [grad.to(backend.device) for grad in gradients(SIZES, torch.float32, 0)]
    found_inf, scale = scalar(1.0, backend), scalar(4.0, backend)
    kept = [t.clone() for t in grads]
    ours.step(grads, grad_scale=scale, found_inf=found_inf, write_grads=True)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours.params, params, strict=True))
    assert not any(state.any() for states in ours.states.values() for state in states)
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True)) and not any(ours.steps)
    found_inf.zero_()
    ours.step(grads, grad_scale=scale, found_inf=found_inf)
    assert all(float(step) == 1 for step in ours.steps)
    assert not torch.equal(ours.params[0].cpu(), params[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[6]], ids=name_of)
def test_a_remainder_makes_16_bits_exact(backend, variant, dtype):
    """The halves together take the very steps of an fp32 parameter."""
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


def join(high, rest):
    """The fp32 value of a 16-bit parameter and its remainder, as csrc/optim/math.h defines it."""
    whole = high.float()
    if high.dtype == torch.bfloat16:
        joined = ((high.view(torch.int16).int() << 16) + rest.int()).view(torch.float32)
        return torch.where((high == 0) | ~high.isfinite(), whole, joined)
    exponent = torch.frexp(high.double().abs().clamp(min=2.0**-14)).exponent - 1
    joined = (high.double() + torch.ldexp(rest.double(), exponent - 26)).float()
    return torch.where((joined.half() == high) & (high.view(torch.int16) != 0) & (rest != 0), joined, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_a_parameter_written_to_keeps_what_was_written(backend, dtype):
    """All 16-bit values, with remainders that are left from others: steps of zero change no bit of them."""
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
        value = join(params[0], rest)[finite]  # the average of an infinity is none
        assert torch.equal(average.cpu()[finite].view(torch.int32), value.view(torch.int32))
    # What a step has made is what the next one finds, in the parameter's own dtype too.
    ours.extras["remainders"] = [rest.view(dtype) for rest in halves]
    ours.step(grads)
    for p, rest, (p_before, rest_before) in zip(ours.params, halves, kept, strict=True):
        assert torch.equal(p.view(torch.int16), p_before.view(torch.int16)) and torch.equal(rest, rest_before)
    assert not any(rest[~finite].any() or rest[high == 0].any() for rest in halves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_masters_near_zero(backend, dtype):
    """fp16 keeps what is too small for it, of either sign; what is too small for bf16 is zero."""
    least = 2.0**-25 if dtype == torch.float16 else 2.0**-134  # in magnitude, of what bf16's rounding does not make 0
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


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_8_bit_states(backend, dtype):
    """Each step is that of fp32 states, from the decoded and to the encoded ones."""
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


def with_codes(backend, variant, params, layout="contiguous"):
    """An op with 8-bit states that are 0 throughout."""
    op = Op(backend, variant, params, torch.uint8, layout)
    for key, codes in op.states.items():
        for code in codes:
            code.fill_(_int8.zero(is_signed(key)))
        op.scales[key] = [_int8.scales(p) for p in op.params]
    return op


def is_signed(key):
    return not key.endswith(("_sq", "square_avg"))


def test_a_positive_second_moment_is_never_the_code_of_0(backend):
    """As small as it may be beside the largest one of its block: a root of 0 would make a step of any length."""
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
    # The order of memory, where blocks were formerly cut.
    old_codes, old_scale = _int8.encode(values.t(), True)
    assert torch.equal(
        _int8.decode_memory_order(old_codes.t(), old_scale, True).t(), _int8.decode(old_codes, old_scale, True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_stochastic_rounding(backend, dtype):
    """Up as often as the part cut off says, to a neighbour always, by the definition of the stream."""
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


@pytest.mark.parametrize(("dtype", "state_dtype"), TYPES_OF_STATES, ids=lambda dtype: str(dtype)[6:])
def test_stochastic_states(backend, dtype, state_dtype):
    """Each state by a stream of its own, the others to nearest, and the parameter as if they were exact."""
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
    """To nearest, bf16 times 0.999 is what it was."""
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


@pytest.mark.parametrize("variant", [VARIANTS[1], VARIANTS[3], VARIANTS[7], VARIANTS[11]], ids=name_of)
def test_nan_and_infinity_reach_what_they_reach_in_torch(backend, variant):
    """amsgrad's maximum keeps a NaN, too."""
    sizes = [(9,), (300,)]
    params = starting_params(torch.float32, sizes)
    ours, theirs = Op(backend, variant, params), Torch(variant, params, torch.float32)
    for step in range(3):
        grads = gradients(sizes, torch.float32, step)
        if step == 1:
            for grad in grads:
                grad[:3] = torch.tensor([math.nan, math.inf, -math.inf])
        ours.step([grad.to(backend.device) for grad in grads])
        theirs.step(grads)
    for (name, found), (_, expected) in zip(ours.results(), theirs.results(), strict=True):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.isnan().cpu(), b.isnan()) and torch.equal(a.isinf().cpu(), b.isinf()), name


def test_a_tensor_does_not_depend_on_the_others(backend):
    sizes = [(700,), (5,), (40_000,), (255,)]
    params = starting_params(torch.float32, sizes)
    grads = [grad.to(backend.device) for grad in gradients(sizes, torch.float32, 0)]
    together = Op(backend, VARIANTS[1], params)
    together.step(grads)
    for i, param in enumerate(params):
        alone = Op(backend, VARIANTS[1], [param])
        alone.step([grads[i]])
        assert torch.equal(alone.params[0], together.params[i])


BAD_STEPS = {
    "gradient of another shape": lambda op, grads: (op, [grads[0][:2], *grads[1:]]),
    "gradient of integers": lambda op, grads: (op, [grads[0].int(), *grads[1:]]),
    "complex gradient": lambda op, grads: (op, [grads[0].to(torch.complex64), *grads[1:]]),
    "one gradient too few": lambda op, grads: (op, grads[1:]),
    "state of another shape": lambda op, grads: (setattr(op, "states", cut(op.states)) or op, grads),
    "state of an odd dtype": lambda op, grads: (setattr(op, "states", cast(op.states)) or op, grads),
    "no step counters": lambda op, grads: (setattr(op, "steps", []) or op, grads),
    "options of another length": lambda op, grads: (setattr(op, "row", op.row[1:]) or op, grads),
}


def cut(states):
    return {key: [t[:2] for t in value] for key, value in states.items()}


def cast(states):
    return {key: [t.double() for t in value] for key, value in states.items()}


@pytest.mark.parametrize("case", BAD_STEPS)
def test_bad_arguments_of_the_op_change_nothing(backend, case):
    sizes = [(7,), (300,)]
    params = starting_params(torch.float32, sizes)
    grads = [grad.to(backend.device) for grad in gradients(sizes, torch.float32, 0)]
    op, grads = BAD_STEPS[case](Op(backend, VARIANTS[0], params), grads)
    with pytest.raises((RuntimeError, ValueError), match=r"optim_step_\(\): expected"):
        op.step(grads)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(op.params, params, strict=True)) and not any(op.steps)


def test_a_parameter_of_one_element_at_many_places_raises(backend):
    params = starting_params(torch.float32, [(7,), (3, 5)])
    op = Op(backend, VARIANTS[0], params)
    op.params[1] = op.params[1][:, :1].expand(3, 5)
    before = [p.clone() for p in op.params]
    with pytest.raises(RuntimeError, match=r"optim_step_\(\): expected params\[1\] without elements that share memory"):
        op.step([torch.ones_like(p) for p in op.params])
    assert all(torch.equal(a, b) for a, b in zip(op.params, before, strict=True)) and not any(op.steps)
    op.params[1] = before[1].clone()
    with pytest.raises(RuntimeError, match=r"optim_step_\(\): expected grads\[0\] without elements that share memory"):
        op.step([torch.ones_like(p[..., :1]).expand(p.shape) for p in op.params], write_grads=True)
    assert all(torch.equal(a, b) for a, b in zip(op.params, before, strict=True)) and not any(op.steps)
    op.params[1] = op.params[1][:, :1].expand(3, 1)  # of one column, which shares nothing
    op.states = {key: [first, rest[:, :1].clone()] for key, (first, rest) in op.states.items()}
    op.step([torch.ones_like(p) for p in op.params])


# The classes.


def assert_same_state_form(ours, theirs):
    """Keys, types, dtypes, devices and shapes of two state dicts agree."""
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in ours["state"].items():
        assert list(state) == list(theirs["state"][index])
        for key, value in state.items():
            other = theirs["state"][index][key]
            if isinstance(other, torch.Tensor):
                assert (value.dtype, value.device, value.shape) == (other.dtype, other.device, other.shape), key
            else:
                assert type(value) is type(other)
    for a, b in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert list(a) == list(b)


class Ours(Torch):
    """dlkit's optimizer, run as torch's is."""

    def __init__(self, variant, params, dtype, **extras):
        self.params = [p.detach().to(dtype, copy=True).requires_grad_() for p in params]
        name, arguments = variant
        self.optimizer = getattr(dlkit.optim, name)(self.params, **arguments, **extras)


def run_classes(variant, dtype, steps, sizes=((3, 5), (7,), (300,)), ulps=1):
    params = starting_params(dtype, sizes)
    runs = Ours(variant, params, dtype), Torch(variant, params, dtype), Exact(variant, params)
    for step in range(steps):
        grads = gradients(sizes, dtype, step)
        for run in runs:
            run.step(grads)
    compare(*runs, ulps)
    assert_same_state_form(runs[0].optimizer.state_dict(), runs[1].optimizer.state_dict())
    return runs


def torchs_info(name):
    pytest.importorskip("expecttest", reason="torch's database of optimizers needs expecttest")
    from torch.testing._internal.common_optimizers import optim_db

    return next(info for info in optim_db if info.optim_cls is getattr(torch.optim, name))


@pytest.mark.parametrize("name", CLASSES)
def test_parity_over_torchs_database(name):
    info = torchs_info(name)
    inputs = [
        (input.kwargs, flag)
        for input in info.optim_inputs_func(device="cpu", dtype=torch.float32)
        for flag in ({}, {"foreach": True}, {"fused": True})
        if not (isinstance(input.kwargs.get("lr"), torch.Tensor) and flag)
    ]
    for i, (arguments, flag) in enumerate(inputs):
        if "fused" in flag and name == "RMSprop":
            continue
        dtype = (torch.float32, torch.float64, torch.bfloat16)[i % 3]
        for steps in (1, 10):
            run_classes((name, {**arguments, **flag}), dtype, steps, sizes=((10, 5), (10,)))


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_a_thousand_steps(variant):
    run_classes(variant, torch.float32, 1000, sizes=((9, 5), (7,)))


@pytest.mark.parametrize("variant", [VARIANTS[1], VARIANTS[7], VARIANTS[11]], ids=name_of)
def test_complex_parameters(variant):
    sizes = ((3, 5), (300,))
    params = [torch.randn(size, dtype=torch.complex64) for size in sizes]
    runs = [kind(variant, params, torch.complex64) for kind in (Ours, Torch)]
    for _ in range(5):
        grads = [torch.randn(size, dtype=torch.complex64) for size in sizes]
        for run in runs:
            run.step([g.conj() if i else g for i, g in enumerate(grads)])
    for (_, a), (_, b) in zip(*(run.results() for run in runs), strict=True):
        torch.testing.assert_close(a, b)
    assert_same_state_form(*(run.optimizer.state_dict() for run in runs))


def params_like(sizes=((3, 5), (7,), (300,)), dtype=torch.float32):
    """Parameters that are the same at every call of a test."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def set_gradients(params, step, leave=()):
    for i, (param, grad) in enumerate(
        zip(params, gradients([p.shape for p in params], params[0].dtype, step), strict=True)
    ):
        param.grad = None if i in leave else grad


def pair(variant, sizes=((3, 5), (7,), (300,)), **extras):
    """(dlkit's, torch's) optimizer of one kind, each on parameters of its own."""
    name, arguments = variant
    ours = getattr(dlkit.optim, name)(params_like(sizes), **arguments, **extras)
    return ours, getattr(torch.optim, name)(params_like(sizes), **arguments)


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_agree(ours, theirs, rtol=1e-5, atol=1e-6):
    for a, b in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
        state, other = ours.state.get(a, {}), theirs.state.get(b, {})
        assert state.keys() == other.keys()
        for key, value in other.items():
            torch.testing.assert_close(state[key], value, rtol=rtol, atol=atol)


def step_both(ours, theirs, step, leave=()):
    for optimizer in (ours, theirs):
        set_gradients(params_of(optimizer), step, leave)
        optimizer.step()


@pytest.mark.parametrize("variant", VARIANTS[1::2], ids=name_of)
def test_a_run_goes_on_with_torchs_class_and_back(variant, tmp_path):
    name, arguments = variant
    ours, theirs = pair(variant)
    for step in range(2):
        step_both(ours, theirs, step)
    for kind in ("torch", "dlkit"):
        torch.save(ours.state_dict(), tmp_path / "state")
        loaded = torch.load(tmp_path / "state", weights_only=True)
        library = torch.optim if kind == "torch" else dlkit.optim
        following = getattr(library, name)([p.detach().clone().requires_grad_() for p in params_of(ours)])
        following.load_state_dict(loaded)
        assert following.param_groups[0]["lr"] == arguments.get("lr", following.param_groups[0]["lr"])
        for step in range(2, 4):
            step_both(following, theirs, step)
        assert_agree(following, theirs)
        assert_same_state_form(following.state_dict(), theirs.state_dict())
        ours = following


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("default_dtype", [torch.float32, torch.float64], ids=str)
def test_step_counters_are_torchs(default_dtype, fused):
    torch.set_default_dtype(default_dtype)
    try:
        ours, theirs = pair(("AdamW", {"fused": fused}))
        for step in range(3):
            step_both(ours, theirs, step)
        assert_same_state_form(ours.state_dict(), theirs.state_dict())
        assert_agree(ours, theirs)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("variant", [VARIANTS[1], VARIANTS[6], VARIANTS[11]], ids=name_of)
def test_parameters_without_gradients_have_no_state(variant):
    ours, theirs = pair(variant)
    for step, leave in enumerate([{0, 2}, {1}, (), {0, 1, 2}, ()]):
        step_both(ours, theirs, step, leave)
        assert_agree(ours, theirs)
        assert len(ours.state) == len(theirs.state)


@pytest.mark.parametrize("variant", [VARIANTS[1], VARIANTS[6], VARIANTS[4]], ids=name_of)
def test_groups_added_later_and_hyperparameters_changed(variant):
    ours, theirs = pair(variant)
    for optimizer in (ours, theirs):
        optimizer.add_param_group({"params": params_like(((4, 4), (1000,))), "lr": 0.3, "weight_decay": 0.5})
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in (ours, theirs)]
    for step in range(5):
        step_both(ours, theirs, step)
        for scheduler in schedulers:
            scheduler.step()
        if step == 2:
            for optimizer in (ours, theirs):
                optimizer.param_groups[0]["maximize"] = True
                optimizer.add_param_group({"params": params_like(((9,),))})
    assert_agree(ours, theirs)
    assert ours.param_groups[1]["lr"] == theirs.param_groups[1]["lr"] != 0.3


def test_a_changed_state_or_parameter_is_noticed():
    def replace_state(optimizer):
        state = optimizer.state[params_of(optimizer)[0]]
        state["exp_avg"] = state["exp_avg"] * 2

    def forget_state(optimizer):
        del optimizer.state[params_of(optimizer)[1]]

    def clear_state(optimizer):
        optimizer.state.clear()

    def move_data(optimizer):
        for param in params_of(optimizer):
            param.data = param.data.clone() + 1

    def replace_parameter(optimizer):
        old = optimizer.param_groups[0]["params"][1]
        new = optimizer.param_groups[0]["params"][1] = (old.detach() * 3).requires_grad_()
        optimizer.state[new] = optimizer.state.pop(old)

    def load(optimizer):
        optimizer.load_state_dict(optimizer.state_dict())

    def set_amsgrad(optimizer):
        optimizer.param_groups[0]["amsgrad"] = False

    ours, theirs = pair(VARIANTS[1])
    changes = (replace_state, forget_state, clear_state, move_data, replace_parameter, load, set_amsgrad)
    for step, change in enumerate([*changes, move_data]):
        step_both(ours, theirs, step)
        for optimizer in (ours, theirs):
            change(optimizer)
    step_both(ours, theirs, 9)
    assert_agree(ours, theirs)


def test_moving_to_another_dtype():
    ours, theirs = pair(VARIANTS[0])
    for step in range(2):
        step_both(ours, theirs, step)
        for optimizer in (ours, theirs):
            for param in params_of(optimizer):
                param.grad = None
                param.data = param.data.double()
            optimizer.load_state_dict(optimizer.state_dict())  # casts the state, as torch's users do
    assert_agree(ours, theirs)


def test_one_optimizer_of_many_dtypes():
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float16)
    runs = []
    for library in (dlkit.optim, torch.optim):
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(40, generator=generator).to(dtype).requires_grad_() for dtype in dtypes]
        optimizer = library.AdamW(params, lr=0.1)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(40, generator=generator).to(param.dtype)
            optimizer.step()
        runs.append(params)
    for a, b in zip(*runs, strict=True):  # torch rounds to 16 bits after each of its ops
        tolerance = {"rtol": 0, "atol": 4 * torch.finfo(a.dtype).eps} if a.dtype.itemsize == 2 else {}
        torch.testing.assert_close(a, b, **tolerance)


def test_tensors_for_learning_rate_and_betas():
    arguments = {"lr": torch.tensor(0.01), "betas": (torch.tensor(0.8), torch.tensor(0.95))}
    ours, theirs = pair(("AdamW", arguments))
    for step in range(3):
        step_both(ours, theirs, step)
    assert_agree(ours, theirs)


def test_hooks_and_closures():
    seen = []
    ours, theirs = pair(VARIANTS[0])
    for optimizer in (ours, theirs):
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
        optimizer.register_step_post_hook(lambda *_: seen.append("post"))

        def closure(optimizer=optimizer):
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in params_of(optimizer))
            loss.backward()
            return loss

        with torch.no_grad():
            losses = [optimizer.step(closure) for _ in range(3)]
        assert losses[0] > losses[2]
    assert seen == ["pre", "post"] * 6
    assert_agree(ours, theirs)


def test_autograd_notices_a_changed_parameter():
    (param,) = params = params_like(((4,),))
    optimizer = dlkit.optim.SGD(params, lr=0.1)
    loss = (param * param).sum()
    param.grad = torch.ones(4)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_are_let_go():
    import weakref

    ours, _ = pair(VARIANTS[0])
    set_gradients(params_of(ours), 0)
    grads = [weakref.ref(p.grad) for p in params_of(ours)]
    ours.step()
    ours.zero_grad()
    assert all(grad() is None for grad in grads)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies(how):
    ours = dlkit.optim.AdamW(params_like(), lr=0.1, max_norm=0.5, ema_decay=0.5)
    set_gradients(params_of(ours), 0)
    ours.step()
    other = pickle.loads(pickle.dumps(ours)) if how == "pickle" else copy.deepcopy(ours)
    assert other.max_norm == 0.5
    for optimizer in (ours, other):
        set_gradients(params_of(optimizer), 1)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params_of(ours), params_of(other), strict=True))


def test_differentiable_takes_torchs_path():
    results = []
    for library in (dlkit.optim, torch.optim):
        start = torch.ones(3, requires_grad=True, dtype=torch.float64)
        param = start.clone()
        param.grad = start * 3
        optimizer = library.SGD([torch.ones(1, requires_grad=True)], lr=0.1, differentiable=True)
        optimizer.param_groups[0]["params"] = [param]
        optimizer.step()
        results.append(torch.autograd.grad(param.sum(), start)[0])
    assert torch.equal(*results)


def test_compiled_step():
    for extras in ({}, {"max_norm": 1e9}):
        torch._dynamo.reset()
        ours, theirs = pair(("AdamW", {}), **extras)
        step = torch.compile(ours.step, backend="eager")
        for i in range(2):
            set_gradients(params_of(ours), i)
            step()
            set_gradients(params_of(theirs), i)
            theirs.step()
        assert_agree(ours, theirs)


def test_the_order_of_threads_changes_nothing():
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            ours, _ = pair(VARIANTS[1], sizes=((70_001,), (3,), (257, 129), (20,)), max_norm=0.1)
            for step in range(2):
                set_gradients(params_of(ours), step)
                ours.step()
            results.append([*params_of(ours), ours.grad_norm])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Bad input.


@pytest.mark.parametrize("name", CLASSES)
def test_bad_arguments_raise_what_torch_raises(name):
    info = torchs_info(name)
    for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        if case.error_type is UserWarning:
            continue
        with pytest.raises(case.error_type, match=case.error_regex):
            given = case.optimizer_error_input
            optimizer = getattr(dlkit.optim, name)(given.params, **given.kwargs)
            optimizer.step()
    with pytest.raises(ValueError, match="empty parameter list"):
        getattr(dlkit.optim, name)([])
    with pytest.raises(ValueError, match="non-leaf"):
        getattr(dlkit.optim, name)([torch.ones(2, requires_grad=True) * 2])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_norm": -1.0}, ValueError, "max_norm of at least 0, got -1.0"),
        ({"max_norm": 1.0, "norm_type": 1}, ValueError, "norm_type of 2, got 1"),
        ({"state_dtype": torch.int8}, ValueError, "state_dtype of torch.float32, torch.bfloat16 or 'int8'"),
        ({"ema_decay": 1.5}, ValueError, "ema_decay between 0 and 1, got 1.5"),
        ({"master_weights": True, "stochastic_rounding": True}, ValueError, "got both"),
        ({"max_nrom": 1.0}, TypeError, "unexpected keyword argument 'max_nrom'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_bad_arguments_of_our_own(name, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(dlkit.optim, name)(params_like(), **arguments)


def test_duplicates():
    param, other = params_like(((5,), (6,)))
    with pytest.warns(UserWarning, match="duplicate"):
        ours = dlkit.optim.SGD([param, param], lr=0.1)
    param.grad = torch.ones(5)
    expected = param.detach() - 0.2
    ours.step()
    torch.testing.assert_close(param.detach(), expected)
    with pytest.raises(ValueError, match="more than one parameter group"):
        dlkit.optim.SGD([{"params": [param, other]}, {"params": [other]}])


def test_sparse_gradients():
    weight = torch.nn.Embedding(10, 3, sparse=True).weight
    dense = torch.nn.Parameter(torch.ones(4))
    start = weight.detach().clone()
    for name, message in (("AdamW", "SparseAdam instead"), ("RMSprop", "does not support sparse")):
        optimizer = getattr(dlkit.optim, name)([dense, weight])
        dense.grad = torch.ones(4)
        weight.grad = torch.sparse_coo_tensor([[1, 4]], torch.ones(2, 3), (10, 3))
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert torch.equal(weight, start) and torch.equal(dense, torch.ones(4)) and not optimizer.state
    optimizer = dlkit.optim.SGD([dense, weight], lr=0.5)
    optimizer.step()
    start[[1, 4]] -= 0.5
    assert torch.equal(weight, start) and torch.equal(dense, torch.full((4,), 0.5))
    with pytest.raises(RuntimeError, match="max_norm needs dlkit's kernels, which do not serve a gradient is sparse"):
        dlkit.optim.SGD([dense, weight], lr=0.5, max_norm=1.0).step()


def test_a_step_that_raises_changes_nothing_and_names_the_parameter():
    named = [("first", torch.nn.Parameter(torch.ones(4))), ("second.weight", torch.nn.Parameter(torch.ones(3)))]
    optimizer = dlkit.optim.AdamW([{"params": named[:1]}, {"params": named[1:]}])
    (_, first), (_, second) = named
    first.grad, second.grad = torch.ones(4), torch.ones(3)
    second.data = torch.ones(2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"parameter 0 of group 1 \('second.weight'\) to be Float \[2\]"):
            optimizer.step()
        assert torch.equal(first, torch.ones(4)) and torch.equal(second, torch.ones(2)) and not optimizer.state
    second.grad = None
    optimizer.step()
    assert not torch.equal(first, torch.ones(4)) and optimizer.state.keys() == {first}


def test_loaded_state_of_another_shape():
    ours, _ = pair(VARIANTS[0])
    set_gradients(params_of(ours), 0)
    ours.step()
    saved = ours.state_dict()
    saved["state"][1]["exp_avg"] = torch.zeros(8)
    ours.load_state_dict(saved)
    before = [p.detach().clone() for p in params_of(ours)]
    with pytest.raises(RuntimeError, match=r"exp_avg of parameter 1 of group 0 to be \[7\]"):
        ours.step()
    assert all(torch.equal(a, b) for a, b in zip(params_of(ours), before, strict=True))


# Clipping.


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[7], VARIANTS[10]], ids=name_of)
def test_clipping_is_that_of_torch(variant, max_norm):
    ours, theirs = pair(variant, max_norm=max_norm)
    for step in range(3):
        set_gradients(params_of(ours), step)
        before = [p.grad.clone() for p in params_of(ours)]
        ours.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(params_of(ours), before, strict=True))
        set_gradients(params_of(theirs), step)
        norm = torch.nn.utils.clip_grad_norm_(params_of(theirs), max_norm)
        theirs.step()
        torch.testing.assert_close(ours.grad_norm, norm)
    assert_agree(ours, theirs)


def test_clipping_in_place():
    ours, theirs = pair(VARIANTS[0], max_norm=0.5, clip_gradients_in_place=True)
    for optimizer in (ours, theirs):
        set_gradients(params_of(optimizer), 0)
    ours.step()
    torch.nn.utils.clip_grad_norm_(params_of(theirs), 0.5)
    for a, b in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_gradients_that_are_not_finite():
    for error in (False, True):
        ours, theirs = pair(VARIANTS[0], max_norm=0.5, error_if_nonfinite=error)
        for optimizer in (ours, theirs):
            set_gradients(params_of(optimizer), 0)
            params_of(optimizer)[1].grad[3] = math.nan
        if error:
            before = [p.detach().clone() for p in params_of(ours)]
            with pytest.raises(RuntimeError, match="non-finite"):
                ours.step()
            assert all(torch.equal(a, b) for a, b in zip(params_of(ours), before, strict=True)) and not ours.state
        else:
            ours.step()
            torch.nn.utils.clip_grad_norm_(params_of(theirs), 0.5)
            theirs.step()
            for a, b in zip(params_of(ours), params_of(theirs), strict=True):
                torch.testing.assert_close(a, b, equal_nan=True)
    ours, theirs = pair(VARIANTS[0])
    for optimizer in (ours, theirs):
        set_gradients(params_of(optimizer), 0)
        params_of(optimizer)[1].grad[3:5] = torch.tensor([math.inf, math.nan])
        optimizer.step()
    for a, b in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_clip_grad_norm(dtype):
    for max_norm, norm_type in ((0.5, 2.0), (1e6, 2), (0.5, math.inf)):
        ours, theirs = (
            [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size in ((5, 3), (200,))] for _ in range(2)
        )
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, dtype=dtype)
            b.grad = a.grad.clone()
        found = dlkit.optim.clip_grad_norm_(ours, max_norm, norm_type)
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
        torch.testing.assert_close(found, expected)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    ours[0].grad[0, 0] = math.inf
    with pytest.raises(RuntimeError, match="non-finite"):
        dlkit.optim.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True)
    assert dlkit.optim.clip_grad_norm_(torch.nn.Parameter(torch.zeros(2)), 1.0) == 0


def test_clip_grad_norm_of_two_types():
    """Squares of fp32 gradients are added up in fp32, by torch too, which takes the root of their sum there as well."""
    errors = {"ours": 0.0, "torch's": 0.0}
    for _ in range(20):
        grads = [torch.randn(300, dtype=torch.float64), torch.randn(7)]
        norm = math.sqrt(math.fsum(float(value) ** 2 for grad in grads for value in grad))
        for name, clip in (("ours", dlkit.optim.clip_grad_norm_), ("torch's", torch.nn.utils.clip_grad_norm_)):
            params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            clip(params, 1.0)
            error = params[0].grad / (grads[0] / (norm + 1e-6)) - 1
            errors[name] = max(errors[name], error.abs().max().item())
    assert errors["ours"] <= errors["torch's"]


def test_a_first_step_that_raises_leaves_the_second_to_be_the_first():
    ours, theirs = pair(VARIANTS[6], max_norm=0.5, error_if_nonfinite=True)
    set_gradients(params_of(ours), 0)
    params_of(ours)[1].grad[3] = math.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        ours.step()
    for step in range(2):
        set_gradients(params_of(theirs), step)
        torch.nn.utils.clip_grad_norm_(params_of(theirs), 0.5)
        theirs.step()
        set_gradients(params_of(ours), step)
        ours.step()
    assert_agree(ours, theirs)


# Mixed precision.


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[6]], ids=name_of)
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(variant, unscale):
    ours, theirs = pair(variant)
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2) for _ in range(2)]
    for step in range(5):
        for optimizer, scaler in zip((ours, theirs), scalers, strict=True):
            set_gradients(params_of(optimizer), step)
            scaler.scale(torch.ones(()))
            for param in params_of(optimizer):
                param.grad *= scaler.get_scale()
            if step in (0, 2):
                params_of(optimizer)[1].grad[0] = math.inf
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        for a, b in zip(params_of(ours), params_of(theirs), strict=True):
            torch.testing.assert_close(a, b)
            if step not in (0, 2):
                torch.testing.assert_close(a.grad, b.grad)
    if variant[0] == "AdamW":
        assert float(ours.state[params_of(ours)[0]]["step"]) == 3


def test_grad_scaler_with_clipping():
    ours, theirs = pair(VARIANTS[0], max_norm=0.5)
    for optimizer in (ours, theirs):
        scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
        set_gradients(params_of(optimizer), 0)
        scaler.scale(torch.ones(()))
        for param in params_of(optimizer):
            param.grad *= 512
        if optimizer is theirs:
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(params_of(optimizer), 0.5)
        scaler.step(optimizer)
    torch.testing.assert_close(ours.grad_norm, norm)
    assert_agree(ours, theirs)


@pytest.mark.parametrize("name", CLASSES)
def test_master_weights(name):
    """16-bit parameters with masters follow fp32 parameters to which the same 16-bit gradients come."""
    for dtype in (torch.bfloat16, torch.float16):
        ours = getattr(dlkit.optim, name)(params_like(dtype=dtype), lr=1e-4, master_weights=True)
        copies = [p.detach().float().requires_grad_() for p in params_like(dtype=dtype)]
        wide = getattr(torch.optim, name)(copies, lr=1e-4)
        for step in range(20):
            set_gradients(params_of(ours), step)
            for a, b in zip(params_of(ours), params_of(wide), strict=True):
                b.grad = a.grad.float()
            ours.step()
            wide.step()
            if step == 10:
                ours.load_state_dict(copy.deepcopy(ours.state_dict()))
        for a, b in zip(params_of(ours), params_of(wide), strict=True):
            state = ours.state[a]
            assert state["remainder"].dtype == dtype
            assert all(v.dtype == torch.float32 for k, v in state.items() if k != "remainder")
            rest = state["remainder"].view(torch.int16)
            torch.testing.assert_close(join(a.detach(), rest), b.detach(), rtol=1e-6, atol=1e-7)


def test_stochastic_rounding_lets_small_updates_count():
    for stochastic in (False, True):
        param = torch.nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
        ours = dlkit.optim.SGD([param], lr=1e-3, stochastic_rounding=stochastic)
        torch.manual_seed(1)
        for _ in range(16):
            param.grad = torch.ones_like(param)
            ours.step()
        moved = 1 - float(param.detach().double().mean())
        assert abs(moved - 0.016) < 1e-3 if stochastic else moved == 0


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32, "int8"], ids=str)
@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop"])
def test_state_dtype(name, state_dtype):
    arguments = {"momentum": 0.9} if name != "AdamW" else {}
    sizes, dtype = ((64, 64), (300,)), torch.bfloat16 if state_dtype == torch.float32 else torch.float32
    target = [torch.randn(size) for size in sizes]
    lr = 0.05 if name == "AdamW" else 0.01
    ours = getattr(dlkit.optim, name)(params_like(sizes, dtype), lr=lr, state_dtype=state_dtype, **arguments)
    losses = []
    for step in range(60):
        losses.append(sum(float((p - t).square().sum()) for p, t in zip(params_of(ours), target, strict=True)))
        for param, goal in zip(params_of(ours), target, strict=True):
            param.grad = (param.detach() - goal).to(dtype)
        ours.step()
        if step == 30:
            saved = copy.deepcopy(ours.state_dict())
            assert saved["param_groups"][0]["state_dtype"] == str(state_dtype).removeprefix("torch.")
            ours.load_state_dict(saved)
    assert losses[-1] < 0.5 * losses[0]
    for param in params_of(ours):
        wanted = state_dtype
        if state_dtype == "int8":
            wanted = torch.uint8 if param.numel() >= 4096 else torch.float32
        kept = {k: v for k, v in ours.state[param].items() if k != "step" and not k.endswith("_scale")}
        assert kept and all(value.dtype == wanted for value in kept.values())
    if state_dtype == "int8" and name == "AdamW":
        param = params_of(ours)[0]
        assert sum(v.nbytes for v in ours.state[param].values()) <= 0.26 * 8 * param.numel()


def test_states_change_their_type_when_loaded():
    sizes = ((60, 80),)
    eight = dlkit.optim.AdamW(params_like(sizes), state_dtype="int8")
    set_gradients(params_of(eight), 0)
    eight.step()
    plain = torch.optim.AdamW(params_like(sizes))
    set_gradients(params_of(plain), 0)
    plain.step()
    saved = plain.state_dict()
    saved["param_groups"][0]["state_dtype"] = "int8"
    eight.load_state_dict(saved)
    state, wanted = eight.state[params_of(eight)[0]], plain.state[params_of(plain)[0]]
    assert state["exp_avg_codes"].dtype == state["exp_avg_sq_codes"].dtype == torch.uint8
    decoded = {
        key: _int8.decode(state[f"{key}_codes"], state[f"{key}_scale"], key == "exp_avg")
        for key in ("exp_avg", "exp_avg_sq")
    }
    for key, value in decoded.items():
        torch.testing.assert_close(value, wanted[key], rtol=0.2, atol=float(wanted[key].abs().max()) * 2e-2)
    saved = eight.state_dict()
    assert "exp_avg" not in saved["state"][0]
    saved["param_groups"][0]["state_dtype"] = None
    whole = dlkit.optim.AdamW(params_like(sizes))
    whole.load_state_dict(saved)
    loaded = whole.state[params_of(whole)[0]]
    assert all(torch.equal(loaded[key], value) for key, value in decoded.items())
    assert loaded.keys() == {"step", "exp_avg", "exp_avg_sq"}
    set_gradients(params_of(whole), 1)
    whole.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_averaged_weights(dtype):
    ours = dlkit.optim.AdamW(params_like(dtype=dtype), lr=0.1, ema_decay=0.9)
    expected = [p.detach().to(torch.float32, copy=True) for p in params_of(ours)]
    for step in range(4):
        set_gradients(params_of(ours), step)
        ours.step()
        for average, param in zip(expected, params_of(ours), strict=True):
            average.lerp_(param.detach().float(), 0.1)
    for a, b in zip(ours.ema_parameters(), expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)
    before = [p.detach().clone() for p in params_of(ours)]
    ours.swap_ema()
    assert all(torch.equal(p, a.to(dtype)) for p, a in zip(params_of(ours), ours.ema_parameters(), strict=True))
    with pytest.raises(RuntimeError, match="call swap_ema"):
        ours.step()
    ours.swap_ema()
    assert all(torch.equal(p, b) for p, b in zip(params_of(ours), before, strict=True))
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert all(a.dtype == torch.float32 for a in ours.ema_parameters())
    with pytest.raises(RuntimeError, match="ema_decay"):
        dlkit.optim.SGD(params_like()).swap_ema()


def test_param_groups():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 4))
    model.append(dlkit.nn.LayerNorm((4, 4)))
    model[2].bias.requires_grad_(False)
    groups = dlkit.optim.param_groups(model, weight_decay=0.1, lr=0.5)
    assert [[name for name, _ in group["params"]] for group in groups] == [
        ["0.weight", "2.weight"],
        ["0.bias", "1.weight", "1.bias", "3.weight", "3.bias"],
    ]
    optimizer = dlkit.optim.AdamW(groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert len(dlkit.optim.param_groups([("w", torch.nn.Parameter(torch.ones(2, 2)))], 0.1)) == 1


@pytest.mark.parametrize("name", CLASSES)
def test_a_rate_on_a_device_is_not_asked_for(name):
    """The meta device has no values to ask for; a GPU would be waited for, which a graph's recording refuses."""
    optimizer = getattr(dlkit.optim, name)([torch.zeros(3, requires_grad=True)], lr=0.1)
    (group,) = optimizer.param_groups
    group["lr"] = torch.tensor(0.1, device="meta")
    optimizer.add_param_group({"params": [torch.zeros(3, requires_grad=True)], "lr": 0.5})
    assert [optimizer._row(group)[OPTIONS.index("lr")] for group in optimizer.param_groups] == [0.0, 0.5]
    assert [(rate.device.type, rate.dtype) for rate in optimizer._device_rates()] == [("meta", torch.float32)] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "name, arguments",
    [
        ("AdamW", {"capturable": True, "amsgrad": True}),
        ("Adam", {"capturable": True, "max_norm": 1.0, "ema_decay": 0.5}),
        ("SGD", {"momentum": 0.9, "max_norm": 1.0}),
        ("RMSprop", {"capturable": True, "centered": True}),
    ],
)
def test_a_cuda_graph_replays_as_steps_do(name, arguments):
    """Learning rate, gradients, clipping and step counters are read on the device at every replay."""

    def make():
        params = [torch.linspace(-1, 1, n, device="cuda").requires_grad_() for n in (5, 4096, 100_001)]
        for param in params:
            param.grad = param.detach() * 3
        rate = torch.tensor(0.1, device="cuda")
        return params, rate, getattr(dlkit.optim, name)(params, lr=rate, **arguments)

    (params, rate, optimizer), (expected, expected_rate, eager) = make(), make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # makes the states, and SGD's buffers full ones
        for _ in range(2):
            optimizer.step()
            eager.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for i in range(3):
        for param, other in zip(params, expected, strict=True):
            param.grad.mul_(i + 0.5)
            other.grad.mul_(i + 0.5)
        rate.mul_(0.7)
        expected_rate.mul_(0.7)
        graph.replay()
        torch.cuda.set_sync_debug_mode("error")  # nor does a step outside a graph wait
        try:
            eager.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for param, other in zip(params, expected, strict=True):
            assert torch.equal(param, other)
            for key, state in eager.state[other].items():
                assert torch.equal(optimizer.state[param][key], state), key
        if "max_norm" in arguments:
            assert torch.equal(optimizer.grad_norm, eager.grad_norm)
