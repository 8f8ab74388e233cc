"""The optimizers: each backend's op against torch's formulas in fp64, by the yardstick of torch, then the classes."""

import pytest
import torch
from support.reference import exact, optimizer_step
from support.tolerance import Yardstick

import dlkit
import dlkit.optim
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
