"""The optimizers: each backend's op against exact formulas by the yardstick of torch, then the classes."""

import math

import pytest
import torch
from support.reference import exact, optimizer_step
from support.tolerance import Yardstick

import dlkit
from dlkit.optim import _int8
from dlkit.optim._optimizer import OPTIONS

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
    if high.dtype == torch.bfloat16:
        return ((high.view(torch.int16).int() << 16) + rest.int()).view(torch.float32)
    exponent = torch.frexp(high.double().abs().clamp(min=2.0**-14)).exponent - 1
    return (high.double() + torch.ldexp(rest.double(), exponent - 26)).float()


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
        ours = Op(backend, variant, params, torch.uint8)
        signed = {key: not key.endswith(("_sq", "square_avg")) for key in ours.states}
        for key, codes in ours.states.items():
            ours.scales[key] = [_int8.scales(p) for p in ours.params]
            for code in codes:
                code.fill_(_int8.zero(signed[key]))
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
    ours = Op(backend, variant, [start, start], seed=1234)
    ours.step([grad.to(backend.device)] * 2)
    found = [p.cpu() for p in ours.params]
    whole = start.float() - lr
    for index, param in enumerate(found):
        bits = stochastic_bits(1234, index, len(start))
        assert torch.equal(param, round_stochastically(whole, bits, dtype))
        assert abs(float(param[:8000].double().mean()) + 1.0 + lr) < 0.1 * torch.finfo(dtype).eps
    assert not torch.equal(*found)
    again = Op(backend, variant, [start, start], seed=1234)
    again.step([grad.to(backend.device)] * 2)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(again.params, found, strict=True))


def stochastic_bits(seed, index, count):
    """16 bits an element, from Philox4x32-10 in Python's integers; the step's counter is on the host."""
    result = []
    for block in range(-(-count // 8)):
        c = [index, 0, block & 0xFFFFFFFF, block >> 32]
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
    "gradient of another dtype": lambda op, grads: (op, [grads[0].double(), *grads[1:]]),
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


@pytest.mark.parametrize("name", CLASSES)
def test_parity_over_torchs_database(name):
    from torch.testing._internal.common_optimizers import optim_db

    info = next(info for info in optim_db if info.optim_cls is getattr(torch.optim, name))
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
