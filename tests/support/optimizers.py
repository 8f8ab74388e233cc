"""The optimizers in tests: variants and gradients; runs of torch's, dlkit's and exact ones; the op on plain lists."""

import pytest
import torch
from torch import nn

import dlkit
from dlkit.optim import _int8
from dlkit.optim._options import OPTIONS
from support.reference import exact, optimizer_step
from support.tolerance import Yardstick

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
    """The gradients of one step, over a few decades, the same at every call."""
    generator = torch.Generator().manual_seed(1000 + step)
    draw = [torch.randn((2, *size), generator=generator, dtype=torch.float64) for size in sizes]
    return [(a * torch.exp2(b.round())).to(dtype) for a, b in draw]


class Torch:
    """torch's optimizer on its own tensors."""

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

    op = "optim_step_kernel_"  # it does not check its arguments

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
        numbered = {}
        for number, key in enumerate(STATES[self.algorithm], 1):
            numbered |= {f"state{number}": self.states.get(key, []), f"scales{number}": self.scales.get(key, [])}
        self.backend.call(
            self.op, algorithm=self.algorithm, params=self.params, grads=grads, steps=self.steps,
            groups=[0] * len(grads), options=row, grad_scale=grad_scale, found_inf=found_inf, write_grads=write_grads,
            **numbered, **extras,
        )  # fmt: skip
        self.first = False

    def results(self):
        return [("param", self.params), *self.states.items()]


def laid_out(tensor, layout):
    """The same values in another layout."""
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
    """Compares our parameters and states with exact ones, by the error of torch's."""
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


def join(high, rest):
    """The fp32 value of a 16-bit parameter and its remainder, as csrc/optim/math.h defines it."""
    whole = high.float()
    if high.dtype == torch.bfloat16:
        joined = ((high.view(torch.int16).int() << 16) + rest.int()).view(torch.float32)
        return torch.where((high == 0) | ~high.isfinite(), whole, joined)
    exponent = torch.frexp(high.double().abs().clamp(min=2.0**-14)).exponent - 1
    joined = (high.double() + torch.ldexp(rest.double(), exponent - 26)).float()
    return torch.where((joined.half() == high) & (high.view(torch.int16) != 0) & (rest != 0), joined, whole)


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


SIXTEEN_BITS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter(torch.randn(*shape).to(dtype))


def step(optimizer, *grads):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()


def same(a, b):
    """Bit for bit, NaN included."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.detach().view(kind), b.detach().view(kind))
