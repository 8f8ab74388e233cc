"""batch_norm, group_norm and instance_norm: each backend against exact results, by the yardstick of torch."""

import ctypes
import dataclasses
import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as native
from support.inputs import TYPES, lay_out, make
from support.reference import activation, exact
from support.tolerance import Yardstick, max_error, ulp
from torch import Tensor

import dlkit.functional as fused
from dlkit._activation import ACTIVATIONS, activated

EPS, SLOPE = 1e-5, 0.2
KINKS = {"relu": (0,), "leaky_relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3)}

SHAPES = [
    (2, 1),
    (3, 5),
    (128, 17),
    (300, 64),
    (2, 3, 1),
    (3, 20, 7),
    (2, 1, 40),
    (5, 64, 3, 3),
    (4, 16, 7, 9),
    (2, 3, 33, 31),
]
SHAPES += [(2, 130, 5, 4), (1, 2, 70, 70), (2, 5, 2, 3, 4), (1, 24, 200), (4, 3, 32, 24), (2, 12, 16, 33)]


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of call. `groups` 0 is batch_norm; `training` false takes the running statistics."""

    groups: int = 0
    training: bool = True
    activation: str = "none"
    residual: bool = False
    affine: bool = True

    def __str__(self) -> str:
        parts = [self.activation]
        if self.residual:
            parts.append("residual")
        if not self.training:
            parts.append("evaluation")
        if not self.affine:
            parts.append("no weight")
        return "+".join(parts)

    @property
    def number(self) -> int:
        return ACTIVATIONS.get(self.activation, 0)

    def native(self, x, residual, weight, bias, running_mean, running_var):
        """torch's ops on the CPU."""
        if self.groups:
            y = native.group_norm(x, self.groups, weight, bias, EPS)
        else:
            y = native.batch_norm(x, running_mean, running_var, weight, bias, self.training, 0.3, EPS)
        if residual is not None:
            y = y + residual
        return activated(y, self.number, SLOPE)


def reference_forward(case: Case, x: Tensor, residual, weight, bias, running_mean, running_var):
    """(z, mean, rstd, var) by kernel.h's formulas."""
    wide = exact(x)
    channels = (1, -1, *[1] * (x.dim() - 2))
    if case.groups:
        folded = wide.reshape(x.shape[0], case.groups, -1)
        mean, var = folded.mean(2), folded.var(2)
        full = [
            np.repeat(s, x.shape[1] // case.groups, axis=1).reshape(*x.shape[:2], *channels[2:]) for s in (mean, var)
        ]
    elif case.training:
        mean, var = (getattr(wide, name)(tuple(i for i in range(x.dim()) if i != 1)) for name in ("mean", "var"))
        full = [s.reshape(channels) for s in (mean, var)]
    else:
        mean, var = exact(running_mean), exact(running_var)
        full = [s.reshape(channels) for s in (mean, var)]
    y = (wide - full[0]) / np.sqrt(full[1] + EPS)
    if weight is not None:
        y = y * exact(weight).reshape(channels) + exact(bias).reshape(channels)
    if residual is not None:
        y = y + exact(residual)
    return y, mean, 1 / np.sqrt(var + EPS), var


def reference_backward(case: Case, grad_output: np.ndarray, x: Tensor, weight, mean, rstd):
    """(grad_input, grad_weight, grad_bias) of what lies before the residual and the activation."""
    channels = (1, -1, *[1] * (x.dim() - 2))
    others = tuple(i for i in range(x.dim()) if i != 1)
    if case.groups:
        repeat = x.shape[1] // case.groups
        mean, rstd = (np.repeat(s, repeat, axis=1).reshape(*x.shape[:2], *channels[2:]) for s in (mean, rstd))
    else:
        mean, rstd = mean.reshape(channels), rstd.reshape(channels)
    xhat = (exact(x) - mean) * rstd
    grad_weight, grad_bias = (grad_output * xhat).sum(others), grad_output.sum(others)
    wg = grad_output if weight is None else grad_output * exact(weight).reshape(channels)
    if not case.training:
        return rstd * wg, grad_weight, grad_bias

    def average(t):
        if not case.groups:
            return t.mean(others, keepdims=True)
        means = t.reshape(x.shape[0], case.groups, -1).mean(2)
        return np.repeat(means, x.shape[1] // case.groups, axis=1).reshape(*x.shape[:2], *channels[2:])

    return rstd * (wg - average(wg) - xhat * average(wg * xhat)), grad_weight, grad_bias


def undecided(case: Case, z: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Where z is so near a kink that rounding decides the activation's derivative."""
    near = [
        np.abs(z - kink) < 64 * torch.finfo(dtype).eps * max(1, abs(kink)) for kink in KINKS.get(case.activation, ())
    ]
    return np.any(near, 0) if near else np.zeros(z.shape, bool)


def check(backend, shape, types, case: Case, channels_last: bool, scale=1.0, shift=0.0):
    names = ("y", "running_mean", "running_var", "grad_input", "grad_residual", "grad_weight", "grad_bias")
    yardsticks = {name: Yardstick(name) for name in names}
    draws = max(1, min(16, 8192 // math.prod(shape)))
    ours_draws = min(draws, backend.draws)
    # Torch gets more draws than ours where ours is worse so far: more of them show its worst case better.
    for draw in range(30 * draws):
        if draw >= ours_draws and all(yardstick.holds(backend.ulps) for yardstick in yardsticks.values()):
            break
        ours = backend if draw < ours_draws else None
        check_draw(ours, shape, types, case, channels_last, scale, shift, yardsticks)
    for yardstick in yardsticks.values():
        assert yardstick.holds(backend.ulps), yardstick


def check_draw(backend, shape, types, case: Case, channels_last, scale, shift, yardsticks):
    dtype, parameter_dtype = types
    channels = shape[1]
    x = lay_out(make(shape, dtype, scale=scale, shift=shift), channels_last)
    residual = lay_out(make(shape, dtype), channels_last) if case.residual else None
    wide = 3.0 if case.number > 1 else 1.0  # for both tails of the activation
    weight = make((channels,), parameter_dtype, shift=1.0, scale=wide) if case.affine else None
    bias = make((channels,), parameter_dtype) if case.affine else None
    grad_output = lay_out(make(shape, dtype), channels_last)
    running = [make((channels,), parameter_dtype), make((channels,), parameter_dtype).abs() + 0.5]
    if case.groups:
        running = [None, None]

    z, mean, rstd, var = reference_forward(case, x, residual, weight, bias, *running)
    # Where rounding decides the derivative no gradient comes, so that all agree on it.
    grad_output[torch.from_numpy(undecided(case, z, dtype))] = 0
    value, slope = activation(case.activation, z, SLOPE)
    masked = exact(grad_output) * slope
    grads = reference_backward(case, masked, x, weight, mean, rstd)
    expected = {"y": value, "grad_input": grads[0]}
    if case.residual:
        expected["grad_residual"] = masked
    if case.affine:
        expected |= {"grad_weight": grads[1], "grad_bias": grads[2]}
    if case.training and not case.groups:
        count = x.numel() // channels
        expected["running_mean"] = 0.7 * exact(running[0]) + 0.3 * mean
        expected["running_var"] = 0.7 * exact(running[1]) + 0.3 * var * count / (count - 1)

    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, residual, weight, bias)]
    their_running = [None if t is None else t.clone() for t in running]
    theirs = {"y": case.native(*leaves, *their_running)}
    found = iter(torch.autograd.grad(theirs["y"], [t for t in leaves if t is not None], grad_output))
    for name, leaf in zip(("grad_input", "grad_residual", "grad_weight", "grad_bias"), leaves, strict=True):
        if leaf is not None:
            theirs[name] = next(found)
    theirs |= {"running_mean": their_running[0], "running_var": their_running[1]}
    for name in expected:
        yardsticks[name].add_native(theirs[name], expected[name])
    if backend is None:
        return

    place = [None if t is None else t.to(backend.device) for t in (x, residual, weight, bias, *running)]
    x_, residual_, weight_, bias_, mean_, var_ = place
    momentum, tracked = 0.3, None
    y, saved_mean, saved_rstd = backend.call(
        "batch_norm_forward", input=x_, residual=residual_, weight=weight_, bias=bias_, running_mean=mean_,
        running_var=var_, num_batches_tracked=tracked, groups=case.groups, training=case.training, momentum=momentum,
        eps=EPS, activation=case.number, negative_slope=SLOPE,
    )  # fmt: skip
    ours = {"y": y, "running_mean": mean_, "running_var": var_}
    assert y.stride() == theirs["y"].stride()
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    for statistic, wanted in ((saved_mean, mean), (saved_rstd, rstd)):
        assert statistic.dtype == accumulate and tuple(statistic.shape) == wanted.shape
        size = float(np.abs(exact(x)).max()) if statistic is saved_mean else float(wanted.max())
        assert max_error(statistic, wanted) <= 4 * ulp(size, accumulate)
    mask = [True, case.residual, case.affine, case.affine]
    known = None if not case.residual or not case.number else y if case.activation == "relu" else residual_
    found = backend.call(
        "batch_norm_backward", grad_output=grad_output.to(backend.device), input=x_, y_or_residual=known,
        weight=weight_, bias=bias_, mean=saved_mean, rstd=saved_rstd, groups=case.groups, training=case.training,
        activation=case.number, output_mask=mask, negative_slope=SLOPE,
    )  # fmt: skip
    for name, grad, wanted in zip(
        ("grad_input", "grad_residual", "grad_weight", "grad_bias"), found, mask, strict=True
    ):
        assert (grad is not None) == wanted
        ours[name] = grad
    for name in expected:
        yardsticks[name].add(ours[name], theirs[name], expected[name])


BATCH_CASES = [
    Case(),
    Case(activation="relu"),
    Case(activation="relu", residual=True),
    Case(training=False),
    Case(training=False, activation="relu", residual=True),
    Case(affine=False),
    Case(activation="relu", affine=False),
    Case(residual=True),
]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "types", "case"),
    [
        (shape, types, BATCH_CASES[(i + j + 3 * k) % len(BATCH_CASES)])
        for (i, shape), (j, types) in itertools.product(enumerate(SHAPES), enumerate(TYPES))
        for k in range(2)
    ],
    ids=lambda value: str(value) if isinstance(value, Case) else None,
)
def test_batch_norm(backend, shape, types, case, channels_last):
    if channels_last and len(shape) < 4:
        pytest.skip("one layout")
    check(backend, shape, types, case, channels_last)


# (shape, groups): contiguous in few long slices and in many short ones, in parts, and rows of one element a channel.
# Those have 12 elements: groups of 3 now and then have so small a variance that rounding the mean decides the error,
# torch's too (1e-14 in y at worst of 3,000 draws, both).
ACTIVATED_SHAPES = [((4, 16, 7, 9), 0), ((2, 3, 33, 31), 0), ((128, 17), 0), ((1, 2, 70, 70), 0), ((5, 64, 3, 3), 0)]
ACTIVATED_SHAPES += [((2, 12, 16, 33), 4), ((3, 12, 3, 3), 4), ((3, 24), 2), ((2, 4, 20, 20), 2), ((2, 6, 7), 3)]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "groups", "types", "case"),
    [
        (
            *ACTIVATED_SHAPES[(3 * i + 5 * j + k) % 10],
            types,
            Case(activation=name, residual=(i + j + k) % 2 == 0, training=(j + k) % 3 > 0, affine=(i + j) % 4 > 0),
        )
        for (i, name), (j, types) in itertools.product(enumerate(ACTIVATIONS), enumerate(TYPES))
        for k in range(2)
    ],
    ids=lambda value: str(value) if isinstance(value, Case) else None,
)
def test_activation_behind(backend, shape, groups, types, case, channels_last):
    if channels_last and len(shape) < 4:
        pytest.skip("one layout")
    case = dataclasses.replace(case, groups=groups, training=case.training or groups > 0)
    check(backend, shape, types, case, channels_last)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((3, 6), 2), ((2, 20, 7), 5), ((3, 32, 5, 5), 32), ((2, 64, 4, 6), 1), ((3, 12, 3, 3), 4), ((2, 4, 2, 3, 4), 2)]
    + [((2, 2, 61, 67), 1), ((20, 3, 6), 3), ((2, 6, 32, 33), 3)],
)
def test_group_norm(backend, shape, groups, types, channels_last):
    if channels_last and len(shape) < 4:
        pytest.skip("one layout")
    check(backend, shape, types, Case(groups=groups, affine=sum(shape) % 2 == 0), channels_last)


def test_few_long_groups(backend):
    """Groups of one element a channel are rows of LayerNorm's kernel, which cuts long ones into pieces."""
    if not backend.instruction_set:
        pytest.skip("the other kernels have no path of their own for them")
    for types in (TYPES[0], TYPES[3]):
        check(backend, (1, 131_074), types, Case(groups=2), False)


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize(
    ("shape", "groups", "channels_last"),
    [((4, 64), 2, False), ((3, 6, 5), 3, False), ((2, 8, 3, 3), 2, True), ((2, 4, 20, 20), 2, False)]
    + [((5, 6, 7), 0, False), ((2, 8, 3, 3), 0, True)],
)
def test_any_parameter_may_be_missing(backend, shape, groups, channels_last, types):
    """Every subset of parameters with every subset of gradients. `make sanitize` sees who writes past a workspace."""
    dtype, parameter_dtype = types
    x, grad_output = (lay_out(make(shape, dtype), channels_last) for _ in range(2))
    parameters = [make((shape[1],), parameter_dtype) for _ in range(2)]
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 5e-2)
    for present in itertools.product([True, False], repeat=2):
        weight, bias = (p if here else None for p, here in zip(parameters, present, strict=True))
        # torch's own group_norm fails with a bias and no weight.
        given = (
            x,
            *(p if here else torch.full_like(p, i) for p, here, i in zip(parameters, present, (1, 0), strict=True)),
        )
        leaves = [t.double().requires_grad_() for t in given]
        expected = Case(groups).native(leaves[0], None, *leaves[1:], None, None)
        wanted = torch.autograd.grad(expected, leaves, grad_output.double())
        weight, bias = (None if t is None else t.to(backend.device) for t in (weight, bias))
        x_ = x.to(backend.device)
        y, mean, rstd = backend.call(
            "batch_norm_forward", input=x_, weight=weight, bias=bias, groups=groups, training=True, momentum=0.1,
            eps=EPS, activation=0,
        )  # fmt: skip
        torch.testing.assert_close(y.cpu().double(), expected.detach(), atol=tolerance, rtol=tolerance)
        for mask in itertools.product(*([True, False] if here else [False] for here in (True, *present))):
            grads = backend.call(
                "batch_norm_backward", grad_output=grad_output.to(backend.device), input=x_, weight=weight, bias=bias,
                mean=mean, rstd=rstd, groups=groups, training=True, activation=0,
                output_mask=[mask[0], False, *mask[1:]],
            )  # fmt: skip
            for grad, value, asked in zip((grads[0], *grads[2:]), wanted, mask, strict=True):
                assert (grad is not None) == asked
                if asked:
                    size = max(1.0, value.abs().max().item())
                    torch.testing.assert_close(grad.cpu().double() / size, value / size, atol=tolerance, rtol=tolerance)
        if all(present):  # no kernel reads the bias: autograd's node leaves it out
            given = (grad_output.to(backend.device), x_, None, weight)
            rest = (mean, rstd, groups, True, False, [True, False, True, True])
            op = backend.op("batch_norm_backward")
            for whole, without in zip(op(*given, bias, *rest), op(*given, None, *rest), strict=True):
                assert (whole is None) == (without is None)
                assert whole is None or (torch.equal(whole, without) and whole.dtype == without.dtype)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's checks")
def test_no_workspace_is_overrun():
    """glibc's own checks of the heap abort the process: what the kernels take is what was planned."""
    library = "libc_malloc_debug.so.0"
    try:
        ctypes.CDLL(library)
    except OSError:
        pytest.skip(f"no {library}")
    code = """
import itertools, torch, dlkit.functional as F
shapes = (4, 64), (9, 6, 5), (2, 8, 3, 3)
for dtype, shape in itertools.product((torch.bfloat16, torch.float16, torch.float32), shapes):
    for which in itertools.product((True, False), repeat=3):
        needs_weight, has_weight, has_bias = which
        x = torch.randn(shape).to(dtype).requires_grad_()
        w = torch.ones(shape[1], dtype=dtype, requires_grad=needs_weight) if has_weight else None
        b = torch.zeros(shape[1], dtype=dtype, requires_grad=True) if has_bias else None
        for _ in range(3):
            F.group_norm(x, 2, w, b).sum().backward()
            F.batch_norm(x, None, None, w, b, True).sum().backward()
            F.layer_norm(x, shape[1:], w if len(shape) == 2 else None, b if len(shape) == 2 else None).sum().backward()
            F.bias_gelu_dropout(x, b if len(shape) == 2 else None, 0.5).sum().backward()
print("intact")
"""
    environment = {**os.environ, "MALLOC_CHECK_": "3", "LD_PRELOAD": library, "PYTHONPATH": os.pathsep.join(sys.path)}
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer checks more")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "intact" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_large_mean(backend, channels_last):
    """A mean a thousand deviations away: the statistics must not cancel."""
    check(backend, (4, 5, 9, 11), TYPES[0], Case(), channels_last, scale=1.0, shift=1000.0)
    check(backend, (4, 6, 9, 11), TYPES[0], Case(groups=2), channels_last, scale=1.0, shift=1000.0)


def test_first_values_far_off(backend):
    """The first rows say nothing about the rest: deviations from them would be large."""
    x = make((64, 3, 8, 8), torch.float32)
    x[:1] += 1e4
    for memory_format in (torch.contiguous_format, torch.channels_last):
        laid_out = x.contiguous(memory_format=memory_format).to(backend.device)
        mean, var = backend.op("batch_norm_statistics")(laid_out, 0)
        wanted = exact(x).transpose(1, 0, 2, 3).reshape(3, -1)
        assert np.abs(exact(mean) / wanted.mean(1) - 1).max() < 1e-6
        assert np.abs(exact(var) / wanted.var(1) - 1).max() < 1e-6


@pytest.mark.parametrize("shape", [(64, 2), (7, 3, 3), (16, 2, 9, 9), (32, 4, 40, 40)], ids=str)
@pytest.mark.parametrize("mean", [1e3, 1e7])
def test_fp64_variance_of_a_large_mean(backend, shape, mean):
    """Means of runs and parts are rounded; their differences must not be. The CUDA and Triton kernels round as torch's
    CUDA kernel does."""
    x = torch.randn(shape, dtype=torch.float64) + mean
    wanted = exact(x).swapaxes(0, 1).reshape(shape[1], -1).var(1, ddof=1, dtype=np.longdouble)
    bound = 1e-14 if backend.name.startswith("cpu") else 1e-13 + 2e-16 * mean
    layouts = (torch.contiguous_format, torch.channels_last)[: 2 if len(shape) == 4 else 1]
    for laid_out in (x.contiguous(memory_format=layout).to(backend.device) for layout in layouts):
        means, variances = (torch.zeros(shape[1], dtype=torch.float64, device=backend.device) for _ in range(2))
        backend.call(
            "batch_norm_forward", input=laid_out, running_mean=means, running_var=variances, groups=0, training=True,
            momentum=1.0, eps=EPS, activation=0,
        )  # fmt: skip
        assert np.abs(exact(variances) / wanted - 1).max() < bound


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_fp32_means_are_exact_to_their_last_bit(backend, channels_last):
    """A steep activation multiplies what rounding the sums of a mean took: 2 ulp in it were 100 in grad_input."""
    for _ in range(5):
        x = lay_out(make((5, 64, 3, 3), torch.float32), channels_last)
        mean = backend.call(
            "batch_norm_forward", input=x.to(backend.device), groups=0, training=True, momentum=0.1, eps=EPS,
            activation=ACTIVATIONS["gelu"],
        )[1]  # fmt: skip
        assert max_error(mean, exact(x).mean((0, 2, 3))) <= ulp(1.0, torch.float32)


@pytest.mark.parametrize("space", [5, 49, 257, 5000])
def test_sums_of_equal_terms(backend, space):
    """A lane that adds up equal terms errs the same way each time."""
    x = make((4, 2, 1), torch.float32).expand(4, 2, space).to(backend.device)
    rstd = backend.call("batch_norm_forward", input=x, groups=0, training=True, momentum=0.1, eps=EPS, activation=0)[2]
    wanted = 1 / np.sqrt(exact(x).swapaxes(0, 1).reshape(2, -1).var(1) + EPS)
    assert np.abs(exact(rstd) / wanted - 1).max() < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_slices_past_the_caches(backend, dtype, residual):
    """A channel's bits are those among fewer channels, which are not written past the caches."""
    if not backend.instruction_set:
        pytest.skip("the CPU's kernels write so")
    channels = 2048
    batch = (5 << 23) // (dtype.itemsize * channels * 49)  # 40 MB
    x, other, grad = (torch.randn(batch, channels, 7, 7).to(dtype) for _ in range(3))
    weight, bias = torch.randn(channels), torch.randn(channels)

    def run(first, last):
        part = slice(first, last)
        here, added, gradient = (t[:, part].contiguous() for t in (x, other, grad))
        y, mean, rstd = backend.call(
            "batch_norm_forward", input=here, residual=added if residual else None, weight=weight[part],
            bias=bias[part], groups=0, training=True, momentum=0.1, eps=EPS, activation=ACTIVATIONS["relu"],
        )  # fmt: skip
        gradients = backend.call(
            "batch_norm_backward", grad_output=gradient, input=here, y_or_residual=y if residual else None,
            weight=weight[part], bias=bias[part], mean=mean, rstd=rstd, groups=0, training=True,
            activation=ACTIVATIONS["relu"], output_mask=[True, residual, True, True],
        )  # fmt: skip
        return [t for t in (y, *gradients) if t is not None]

    whole = run(0, channels)
    for first, last in ((0, 512), (1000, 1521), (channels - 512, channels)):
        for mine, of_all in zip(run(first, last), whole, strict=True):
            assert torch.equal(mine, of_all[first:last] if of_all.dim() == 1 else of_all[:, first:last])


@pytest.mark.parametrize(("shape", "groups"), [((0, 6, 3, 3), 0), ((2, 6, 0, 3), 0), ((0, 6, 3), 2), ((2, 6, 0), 3)])
def test_empty_input(backend, shape, groups):
    """It reaches the kernels' ops where a compiler did not know its size."""
    x, weight, bias = torch.empty(shape), torch.ones(6), torch.zeros(6)
    tracked = torch.tensor(3, device=backend.device)
    x, weight, bias = (t.to(backend.device) for t in (x, weight, bias))
    y, mean, rstd = backend.call(
        "batch_norm_forward", input=x, weight=weight, bias=bias, num_batches_tracked=None if groups else tracked,
        groups=groups, training=True, momentum=0.1, eps=EPS, activation=0,
    )  # fmt: skip
    assert y.shape == x.shape and mean.shape == rstd.shape == ((shape[0], groups) if groups else (6,))
    assert not mean.any() and not rstd.any()
    assert tracked == (3 if groups else 4)  # as torch's layer counts it
    grad_input, _, *grads = backend.call(
        "batch_norm_backward", grad_output=x, input=x, weight=weight, bias=bias, mean=mean, rstd=rstd, groups=groups,
        training=True, activation=0, output_mask=[True, False, True, True],
    )  # fmt: skip
    assert grad_input.shape == x.shape
    assert all(grad.shape == (6,) and not grad.any() for grad in grads)
    if groups:
        return
    assert not any(t.any() for t in backend.op("batch_norm_statistics")(x, 0))
    sums, *grads = backend.call(
        "batch_norm_backward_sums", grad_output=x, input=x, weight=weight, bias=bias, mean=mean, rstd=rstd,
        activation=0, output_mask=[True, True],
    )  # fmt: skip
    assert sums.shape == (2, 6) and not any(t.any() for t in (sums, *grads))


def test_cumulative_average(backend):
    tracked = torch.tensor(4, device=backend.device)
    x = make((6, 5), torch.float32).to(backend.device)
    mean, var = torch.ones(5, device=backend.device), torch.ones(5, device=backend.device)
    backend.call(
        "batch_norm_forward", input=x, running_mean=mean, running_var=var, num_batches_tracked=tracked, groups=0,
        training=True, momentum=-1.0, eps=EPS, activation=0,
    )  # fmt: skip
    assert tracked.item() == 5
    torch.testing.assert_close(mean, 0.8 + 0.2 * x.mean(0))
    torch.testing.assert_close(var, 0.8 + 0.2 * x.var(0))


def test_a_momentum_of_one_forgets_all(backend):
    """Large statistics leave nothing in small ones, not even their rounding."""
    x = make((6, 3, 5), torch.float32, scale=1e-6)
    running = [torch.full((3,), 1e6, device=backend.device) for _ in "mv"]
    backend.op("batch_norm_forward")(
        x.to(backend.device), None, None, None, *running, None, 0, True, 1.0, EPS, False
    )  # fmt: skip
    mean, var = x.double().mean((0, 2)), x.double().var((0, 2))
    torch.testing.assert_close(running[0].cpu().double(), mean, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(running[1].cpu().double(), var, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("shape", "groups"), [((4, 12, 4, 4), 6), ((5, 40, 3, 3), 20), ((2, 9, 5, 5), 0)], ids=str)
def test_the_number_of_multiprocessors_changes_no_bit(backend, shape, groups, monkeypatch):
    """Small groups share a block only where there are enough of them for all."""
    if backend.name != "cuda-on-cpu":
        pytest.skip("a device has as many as it has")
    x, grad = make(shape, torch.float32), make(shape, torch.float32)
    weight, bias = make(shape[1:2], torch.float32), make(shape[1:2], torch.float32)
    results = []
    for count in ("1", "8", "200"):
        monkeypatch.setenv("DLKIT_CUDA_ON_CPU_SMS", count)
        y, mean, rstd = backend.call(
            "batch_norm_forward", input=x, weight=weight, bias=bias, groups=groups, training=True, momentum=0.1,
            eps=EPS, activation=0,
        )  # fmt: skip
        grads = backend.call(
            "batch_norm_backward", grad_output=grad, input=x, weight=weight, bias=bias, mean=mean, rstd=rstd,
            groups=groups, training=True, activation=0, output_mask=[True, False, True, True],
        )  # fmt: skip
        results.append([y, mean, rstd, *grads])
    for other in results[1:]:
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_shared_statistics(backend, channels_last, relu):
    """The halves that synchronised statistics are made of give, put together, what the whole op gives."""
    formats = torch.channels_last if channels_last else torch.contiguous_format
    x, residual, grad = (
        make((4, 6, 5, 3), torch.float32).contiguous(memory_format=formats).to(backend.device) for _ in "abc"
    )
    weight, bias = make((6,), torch.float32).to(backend.device), make((6,), torch.float32).to(backend.device)
    y, mean, rstd = backend.call(
        "batch_norm_forward", input=x, residual=residual, weight=weight, bias=bias, groups=0, training=True,
        momentum=0.1, eps=EPS, activation=relu,
    )  # fmt: skip
    found_mean, var = backend.op("batch_norm_statistics")(x, 0)
    torch.testing.assert_close(found_mean, mean)
    torch.testing.assert_close((var + EPS).rsqrt(), rstd)
    again = backend.call(
        "batch_norm_apply", input=x, residual=residual, weight=weight, bias=bias, mean=mean, rstd=rstd, activation=relu
    )
    assert torch.equal(again, y)
    saved = y if relu else None
    wanted = backend.call(
        "batch_norm_backward", grad_output=grad, input=x, y_or_residual=saved, weight=weight, bias=bias, mean=mean,
        rstd=rstd, groups=0, training=True, activation=relu, output_mask=[True] * 4,
    )  # fmt: skip
    sums, grad_weight, grad_bias = backend.call(
        "batch_norm_backward_sums", grad_output=grad, input=x, y_or_residual=saved, weight=weight, bias=bias, mean=mean,
        rstd=rstd, activation=relu, output_mask=[True, True],
    )  # fmt: skip
    grad_input, grad_residual = backend.call(
        "batch_norm_backward_apply", grad_output=grad, input=x, y_or_residual=saved, weight=weight, bias=bias,
        mean=mean, rstd=rstd, sums=sums / 60, activation=relu, output_mask=[True, True],
    )  # fmt: skip
    for one, other in zip((grad_input, grad_residual, grad_weight, grad_bias), wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("where", ["one value", "infinity"])
def test_nan_spreads_as_in_torch(backend, where):
    x = make((4, 3, 5, 5), torch.float32)
    x[1, 1, 2, 2] = math.nan if where == "one value" else math.inf
    running = [torch.zeros(3), torch.ones(3)]
    theirs = [t.clone() for t in running]
    wanted = native.batch_norm(x, *theirs, training=True)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        ours = [t.clone().to(backend.device) for t in running]
        y, _, _ = backend.op("batch_norm_forward")(
            x.contiguous(memory_format=memory_format).to(backend.device),
            None,
            None,
            None,
            *ours,
            None,
            0,
            True,
            0.1,
            EPS,
            True,
        )
        assert torch.equal(torch.isnan(y.cpu()), torch.isnan(wanted))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.cpu(), other, equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("where", ["residual", "bias"])
def test_gradients_pass_a_relu_where_it_is_nan(backend, where, channels_last):
    """As through torch's: what is not a number is not below 0."""
    x, residual, grad = (lay_out(make((4, 3, 5, 7), torch.float32), channels_last) for _ in "abc")
    weight, bias = make((3,), torch.float32), make((3,), torch.float32)
    if where == "residual":
        residual[1, 2, 3, 4] = math.nan
    else:
        bias[1], residual = math.nan, None
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, residual, weight, bias)]
    z = native.batch_norm(leaves[0], None, None, *leaves[2:], True)
    y = native.relu(z if residual is None else z + leaves[1])
    wanted = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], grad))
    place = [None if t is None else t.to(backend.device) for t in (x, residual, weight, bias)]
    y, mean, rstd = backend.op("batch_norm_forward")(*place, None, None, None, 0, True, 0.1, EPS, True)
    found = backend.op("batch_norm_backward")(
        grad.to(backend.device), place[0], None if residual is None else y, *place[2:], mean, rstd, 0, True, True,
        [True, residual is not None, True, True],
    )  # fmt: skip
    for ours, leaf in zip(found, leaves, strict=True):
        if leaf is not None:
            torch.testing.assert_close(ours.cpu(), next(wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "channels_last"), [((3, 5, 7), False), ((2, 3, 20, 30), False), ((2, 6, 5, 4), True)], ids=str
)
def test_running_statistics_of_each_group(backend, shape, channels_last):
    """Mean and unbiased variance themselves, however large eps is."""
    x = lay_out(make(shape, torch.float32), channels_last)
    mean, var = (torch.zeros(shape[:2], device=backend.device) for _ in "ab")
    backend.call(
        "batch_norm_forward", input=x.to(backend.device), running_mean=mean, running_var=var, groups=shape[1],
        training=True, momentum=1.0, eps=1e6, activation=0,
    )  # fmt: skip
    wanted = exact(x).reshape(*shape[:2], -1)
    assert max_error(mean, wanted.mean(2)) <= 4 * ulp(1, torch.float32)
    assert np.abs(exact(var) / wanted.var(2, ddof=1) - 1).max() <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("groups", [0, 2])
def test_parameters_may_be_views(backend, groups):
    x, grad = make((3, 4, 5), torch.float32).to(backend.device), make((3, 4, 5), torch.float32).to(backend.device)
    several = make((9, 4), torch.float32, shift=1.0).abs().to(backend.device)

    def run(*arrays):
        weight, bias, running_mean, running_var = arrays
        running = [None, None] if groups else [running_mean, running_var]
        y, mean, rstd = backend.op("batch_norm_forward")(
            x, None, weight, bias, *running, None, groups, True, 0.3, EPS, not groups
        )
        grads = backend.call(
            "batch_norm_backward", grad_output=grad, input=x, weight=weight, bias=bias, mean=mean, rstd=rstd,
            groups=groups, training=True, activation=not groups, output_mask=[True, False, True, True],
        )  # fmt: skip
        return [t for t in (y, *running, *grads) if t is not None]

    views = [several.T[:, i].clone() for i in range(4)]
    strided = [torch.stack([v] * 3, 1)[:, 1] for v in views]
    for one, other in zip(run(*strided), run(*views), strict=True):
        assert torch.equal(one, other)


LARGE = [
    ("batch_norm", (8, 3, 5, 7)),
    ("batch_norm", (40, 3)),
    ("batch_norm", (2, 3, 300, 5)),
    ("instance_norm", (8, 3, 5, 7)),
]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("large", "grad_scale"), [(1e25, 1.0), (1e37, 1.0), (1.0, 1e37), (1e25, 1e25)])
@pytest.mark.parametrize(("name", "shape"), LARGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_whose_squares_overflow(name, shape, large, grad_scale, channels_last, dtype):
    """torch's BatchNorm adds fp32 up in fp64; only one channel is that large. Evaluated in fp64 it is exact."""
    if channels_last and len(shape) < 4:
        pytest.skip("has no channels_last form")
    x = lay_out(make(shape, torch.float32), channels_last)
    x[:, 1] *= large
    x = x.to(dtype).requires_grad_()
    weight, bias = make((3,), torch.float32).requires_grad_(), make((3,), torch.float32).requires_grad_()
    grad = (make(shape, torch.float32) * grad_scale).to(dtype)
    options = {"training": True} if name == "batch_norm" else {}
    running = [torch.zeros(3), torch.ones(3)]
    y = getattr(fused, name)(x, *running, weight, bias, **options)
    found = [y, *running, *torch.autograd.grad(y, (x, weight, bias), grad)]
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    exact_running = [torch.zeros(3).double(), torch.ones(3).double()]
    exact = getattr(native, name)(wide[0], *exact_running, *wide[1:], **options)
    wanted = [exact, *exact_running, *torch.autograd.grad(exact, wide, grad.double())]
    for ours, right in zip(found, wanted, strict=True):
        channels = [1, *(d for d in range(ours.dim()) if d != 1)] if ours.dim() > 1 else [0]
        for one, other in zip(ours.permute(channels), right.permute(channels), strict=True):
            size = other.abs().max().item()
            if size > torch.finfo(ours.dtype).max:
                assert one.abs().max() == math.inf
            else:
                torch.testing.assert_close(
                    one, other.to(ours.dtype), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=2e-6 * size
                )
