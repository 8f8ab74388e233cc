"""Cross entropy: parity on every backend, torch's own cases, then the torch-facing side."""

import contextlib
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as native
import torch.utils.checkpoint
from support import reference
from support.inputs import TYPES, make
from support.tolerance import Yardstick

import dlkit
import dlkit.functional as fused
from dlkit import _native

INF, NAN = math.inf, math.nan
SHAPES = ((5, 7), (3, 1), (16, 2500), (70, 33), (2, 7, 3), (2, 21, 9, 33), (1, 40, 300))
# (probabilities, weight, reduction, label_smoothing, z_scale, softcap)
OPTIONS = {
    "mean": (False, False, 1, 0.0, 0.0, 0.0),
    "none": (False, False, 0, 0.0, 0.0, 0.0),
    "weighted": (False, True, 1, 0.0, 0.0, 0.0),
    "smoothed": (False, False, 2, 0.1, 0.0, 0.0),
    "smoothed, weighted": (False, True, 1, 0.3, 1e-3, 0.0),
    "z-loss, softcap": (False, False, 1, 0.0, 1e-3, 5.0),
    "smoothed z-loss, softcap, none": (False, True, 0, 0.1, 1e-2, 3.0),
    "probabilities": (True, False, 1, 0.0, 0.0, 0.0),
    "probabilities, all": (True, True, 0, 0.2, 1e-3, 4.0),
}


def rows_of(tensor):
    """Turns [N, C, ...] into rows of classes."""
    return tensor.movedim(1, -1).reshape(-1, tensor.shape[1])


def like_rows(tensor):
    """The same for a tensor with one element a row."""
    return tensor.reshape(-1) if tensor.dim() else tensor


def targets(shape, dtype, probabilities, ignored=-100):
    if probabilities:
        return make(shape, torch.float64).softmax(1).to(dtype)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    return torch.where(torch.rand(target.shape) < 0.2, ignored, target).index_fill_(0, torch.tensor(0), 0)


@functools.cache
def problem(dtype, weight_dtype, shape, draw, option, last):
    probabilities, weighted, reduction, *rest = OPTIONS[option]
    torch.manual_seed(draw + 100 * shape[1])
    x = make(shape, dtype, scale=3.0, shift=10.0 * (draw % 2))
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    target = targets(shape, dtype, probabilities)
    weight = make(shape[1:2], torch.float64).abs().add(0.1).to(weight_dtype) if weighted else None
    grad = make((shape[0], *shape[2:]) if reduction == 0 else (), dtype)
    flat = rows_of(target) if probabilities else target.reshape(-1)
    exact = reference.cross_entropy(rows_of(x), flat, weight, like_rows(grad), reduction, -100, *rest)
    leaf = x.clone().requires_grad_()
    loss, z = _native.cross_entropy(leaf, target, weight, reduction, -100, *rest)
    (grad_input,) = torch.autograd.grad(loss, leaf, grad)
    return x, target, weight, grad, exact, (loss.detach(), z, grad_input)


def draws_of(backend, shape):
    return min(backend.draws, 24 if math.prod(shape) < 300 else 4)


def run(backend, x, target, weight, grad, reduction, *rest):
    """(loss, z_loss, grad_input) by the kernel ops."""
    x, target, weight, grad = (t if t is None else t.to(backend.device) for t in (x, target, weight, grad))
    options = (reduction, -100, *rest)
    loss, z, stats, total = backend.op("cross_entropy_forward")(x, target, weight, *options, False)
    grad_input = backend.op("cross_entropy_backward")(grad, x, target, weight, stats, total, *options)
    return tuple(t if t is None else t.cpu() for t in (loss, z, grad_input))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("dtype", "weight_dtype"), TYPES)
def test_errors_stay_below_torch_s(backend, dtype, weight_dtype, option):
    """Errors over all shapes, divided by each tensor's largest element, rounded to a power of two."""
    if dtype != weight_dtype and not OPTIONS[option][1]:
        pytest.skip("has no weight")
    yardsticks = [Yardstick(part) for part in ("loss", "z_loss", "grad_input")]
    for shape in SHAPES:
        for draw, last in itertools.product(range(draws_of(backend, shape)), (False, True)):
            if last and len(shape) == 2:
                continue
            *arguments, exact, torchs = problem(dtype, weight_dtype, shape, draw, option, last)
            found = run(backend, *arguments, *OPTIONS[option][2:])
            assert found[0].shape == arguments[-1].shape and (found[1] is None) == (OPTIONS[option][4] == 0)
            for i, (yardstick, ours, theirs, expected) in enumerate(zip(yardsticks, found, torchs, exact, strict=True)):
                if ours is None:
                    continue
                as_rows = rows_of if i == 2 else like_rows
                scale = 2.0 ** -math.floor(math.log2(max(abs(expected).max(), 1e-30)))
                ours, theirs = (as_rows(t).double().mul(scale).to(dtype) for t in (ours, theirs))
                yardstick.add(ours, theirs, expected * scale)
                yardstick.add_native(theirs, expected * scale)
    for yardstick in yardsticks:
        assert yardstick.holds(backend.ulps), yardstick


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_of_few_classes(backend, dtype):
    """CPU kernels transpose blocks of them: every remainder of rows and classes, adjacent rows and slices."""
    precision = torch.finfo(dtype).eps
    for classes, probabilities, sliced in itertools.product((*range(1, 19), 31, 33, 40, 41), *[(False, True)] * 2):
        rows = int(torch.randint(1, 290, ()))
        x = make((rows, classes + 3), dtype)[:, 2 : 2 + classes] if sliced else make((rows, classes), dtype)
        target, grad = targets((rows, classes), dtype, probabilities), make((rows,), dtype)
        loss, _, grad_input = run(backend, x, target, None, grad, 0, 0.0, 0.0, 0.0)
        leaf = x.double().requires_grad_()
        expected = native.cross_entropy(leaf, target.double() if probabilities else target, reduction="none")
        (expected_grad,) = torch.autograd.grad(expected, leaf, grad.double())
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=2 * precision, atol=8 * precision)
        torch.testing.assert_close(grad_input.double(), expected_grad, rtol=2 * precision, atol=8 * precision)


@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3)])
@pytest.mark.parametrize("option", ["mean", "none", "smoothed", "weighted", "probabilities"])
def test_infinities_and_nan_are_torch_s(backend, shape, option):
    probabilities, weighted, reduction, smoothing, *_ = OPTIONS[option]
    weight = torch.rand(5) if weighted else None
    for special, everywhere in itertools.product((INF, -INF, NAN), (False, True)):
        x = torch.randn(shape)
        if everywhere:
            x[1] = special
        else:
            x[1, 2] = x[0, 0] = special
        target = targets(shape, torch.float32, probabilities)
        if not probabilities:
            target[1] = 1  # not ignored, and not the special class
        grad = torch.randn((shape[0], *shape[2:]) if reduction == 0 else ())
        leaf = x.clone().requires_grad_()
        expected = native.cross_entropy(
            leaf, target, weight, reduction=("none", "mean", "sum")[reduction], label_smoothing=smoothing
        )
        (expected_grad,) = torch.autograd.grad(expected, leaf, grad)
        loss, _, found = run(backend, x, target, weight, grad, reduction, smoothing, 0.0, 0.0)
        torch.testing.assert_close(loss, expected.detach(), equal_nan=True, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found, expected_grad, equal_nan=True, rtol=1e-5, atol=1e-6)


# Rows of bf16 logits of every kind, and the gradients of their losses.
BF16_ROWS = {
    "normal": (lambda x: x * 3, 1.0),
    "negative": (lambda x: -x.abs() - 5, -1.0),
    "zeros": (lambda x: x * 0, 1e-3),
    "negative zeros": (lambda x: -(x * 0).abs(), 1.0),
    "far from 0": (lambda x: x + 700, 0.1),
    "beyond any bound": (lambda x: x * 1e3 + 3e4, 1.0),
    "far apart": (lambda x: x * 40, -7.0),
    "huge": (lambda x: x * 1e34, 1.0),
    "masked": (lambda x: x.where(x > 0, -INF), -2.0),
    "masked but one": (lambda x: x.where(x == x.max(), -INF), 1.0),
    "all masked but the smallest": (lambda x: x.where(x < 3, -1e30), 1.0),
    "a large gradient": (lambda x: x, 3e30),
    "a small gradient": (lambda x: x, 1e-30),
    "no gradient": (lambda x: x, 0.0),
    "an infinite gradient": (lambda x: x, INF),
    "+inf": (lambda x: x.where(x < x.max(), INF), 1.0),
    "NaN": (lambda x: x.where(x > x.min(), NAN), 1.0),
    "-NaN": (lambda x: (-x.abs()).where(x > x.min(), -NAN), 1.0),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", BF16_ROWS)
def test_bf16_rows_of_any_kind(backend, kind, smoothing):
    """Each element of the gradient differs from the exact one by at most half an ulp of bf16 and a 20th of that."""
    row, factor = BF16_ROWS[kind]
    for classes in (41, 256, 2500):
        x = torch.stack([row(torch.randn(classes)) for _ in range(3)]).bfloat16()
        target, grad = x.nan_to_num(nan=-INF).argmax(1), torch.full((3,), factor)
        target[2] = -100
        leaf = x.double().requires_grad_()
        expected = native.cross_entropy(leaf, target, reduction="none", label_smoothing=smoothing)
        (expected_grad,) = torch.autograd.grad(expected, leaf, grad.double())
        options = (0, -100, smoothing, 0.0, 0.0)
        loss, _, stats, total = backend.op("cross_entropy_forward")(x, target, None, *options, True)
        found = backend.op("cross_entropy_backward")(grad, x, target, None, stats, total, *options).double()
        torch.testing.assert_close(loss.double(), expected.detach(), equal_nan=True, rtol=1e-5, atol=1e-5)
        # At the target, and with smoothing everywhere, terms cancel whose relative error is some 1e-6. Exponentials
        # that would be subnormal may be 0.
        terms = abs(factor) * (1e-6 * expected_grad.detach().abs() + (4e-6 / classes if smoothing else 0))
        terms[range(3), target.clamp(min=0)] += 1e-6 * abs(factor)
        bound = expected_grad.abs() * (1.05 * 2**-8) + terms + max(1, abs(factor)) * 2.0**-126
        same = (found == expected_grad) | (found.isnan() & expected_grad.isnan())
        if kind != "an infinite gradient":  # torch's 0 * inf is not compared
            wrong = ~(same | ((found - expected_grad).abs() <= bound))
            assert not wrong.any(), (found[wrong], expected_grad[wrong])


@pytest.mark.parametrize("shape", [(2, 5000), (2, 70, 3)])
def test_masked_classes_and_late_maxima(backend, shape):
    """-inf in the first classes, which fill whole chunks, then small logits, then the maximum."""
    x, half = torch.randn(shape), shape[1] // 2
    x[:, :half], x[1, half:], x[:, -2] = -INF, x[1, half:] - 1000, 60.0
    target, grad = torch.full((2, *shape[2:]), shape[1] - 1), torch.ones(2, *shape[2:])
    leaf = x.double().requires_grad_()
    expected = native.cross_entropy(leaf, target, reduction="none")
    (expected_grad,) = torch.autograd.grad(expected, leaf, grad.double())
    loss, _, found = run(backend, x, target, None, grad, 0, 0.0, 0.0, 0.0)
    torch.testing.assert_close(loss, expected.detach().float())
    torch.testing.assert_close(found, expected_grad.float())


def test_any_address_and_distance_of_rows(backend):
    for classes, offset, stride in ((1, 1, 3), (9, 3, 9), (64, 0, 65), (257, 2, 300)):
        memory = make((offset + 4 * stride,), torch.float32, backend.device)
        x = memory[offset:].as_strided((4, classes), (stride, 1), offset)
        target = torch.arange(4, device=backend.device) % classes
        options = (1, -100, 0.1, 0.0, 0.0)
        loss, _, stats, total = backend.op("cross_entropy_forward")(x, target, None, *options, False)
        found = backend.op("cross_entropy_backward")(torch.ones_like(loss), x, target, None, stats, total, *options)
        leaf = x.detach().clone().requires_grad_()
        expected = native.cross_entropy(leaf, target, label_smoothing=0.1)
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(found, torch.autograd.grad(expected, leaf)[0])
        copy = memory.clone()[offset:].as_strided((4, classes), (stride, 1), offset)
        before = copy._base.clone() if copy._base is not None else None
        backend.op("cross_entropy_backward_")(torch.ones_like(loss), copy, target, None, stats, total, *options)
        assert torch.equal(copy, found)
        if before is not None:  # memory between the rows is unchanged
            mask = torch.ones_like(before, dtype=torch.bool)
            mask[offset:].as_strided((4, classes), (stride, 1), offset).fill_(False)
            assert torch.equal(copy._base[mask], before[mask])


# The torch-facing side.


def test_torch_s_module_cases():
    modules = pytest.importorskip("torch.testing._internal.common_modules")
    (info,) = (info for info in modules.module_db if info.module_cls is torch.nn.CrossEntropyLoss)
    cases = 0
    for dtype in (torch.float32, torch.float64):
        for case in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True):
            arguments, keywords = case.constructor_input.args, case.constructor_input.kwargs
            results = []
            for cls in (torch.nn.CrossEntropyLoss, dlkit.nn.CrossEntropyLoss):
                layer = cls(*arguments, **keywords).to(dtype)
                x, target = (t.detach().clone().requires_grad_(t.requires_grad) for t in case.forward_input.args)
                loss = layer(x, target, **case.forward_input.kwargs)
                results.append(
                    (loss.detach(), *torch.autograd.grad(loss.sum(), [t for t in (x, target) if t.requires_grad]))
                )
            torch.testing.assert_close(
                *results[::-1], equal_nan=True, msg=lambda text, case=case: f"{case.desc}: {text}"
            )
            cases += 1
    assert cases > 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_torch_s_operator_cases(dtype):
    methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    (info,) = (info for info in methods.op_db if info.name == "nn.functional.cross_entropy")
    samples = list(info.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) > 10
    for sample in samples:
        results = []
        for function in (native.cross_entropy, fused.cross_entropy):
            x, *others = (
                t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t
                for t in (sample.input, *sample.args)
            )
            loss = function(x, *others, **sample.kwargs)
            wanted = [t for t in (x, *others) if isinstance(t, torch.Tensor) and t.requires_grad]
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), wanted)))
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype.itemsize == 2 else {}
        torch.testing.assert_close(*results[::-1], **tolerance)


CALLS = {
    "classes": lambda x, t: fused.cross_entropy(x, t, label_smoothing=0.1),
    "none": lambda x, t: fused.cross_entropy(x, t, reduction="none", ignore_index=1),
    "weighted": lambda x, t: fused.cross_entropy(x, t, torch.linspace(1, 2, x.shape[1], dtype=x.dtype)),
    "probabilities": lambda x, t: fused.cross_entropy(x, torch.ones_like(x).cumsum(1).softmax(1), reduction="sum"),
    "language model": lambda x, t: fused.cross_entropy(x, t, lse_square_scale=0.01, softcap=2.0),
}


@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 3)])
@pytest.mark.parametrize("name", CALLS)
def test_gradients(name, shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 5, (shape[0], *shape[2:]))
    call = functools.partial(CALLS[name], t=target)
    assert torch.autograd.gradcheck(call, x) and torch.autograd.gradgradcheck(call, x)
    jacobian = torch.func.jacrev(call)(x)
    torch.testing.assert_close(jacobian, torch.func.jacfwd(call)(x))
    torch.testing.assert_close(torch.vmap(call)(torch.stack([x, x * 2])), torch.stack([call(x), call(x * 2)]))


def test_gradients_of_probabilities_and_weights_are_torch_s():
    x, target, weight = torch.randn(4, 5), torch.randn(4, 5).softmax(1), torch.rand(5)
    results = []
    for function in (native.cross_entropy, fused.cross_entropy):
        leaves = [t.clone().requires_grad_() for t in (x, target, weight)]
        results.append(torch.autograd.grad(function(*leaves, label_smoothing=0.1), leaves))
    torch.testing.assert_close(*results)


def test_logits_target_and_two_numbers_a_row_are_all_that_is_kept():
    saved = []
    x, target = torch.randn(40, 25, requires_grad=True), torch.randint(0, 25, (40,))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused.cross_entropy(x, target, label_smoothing=0.1)
    assert saved[0] is x and [t.nbytes for t in saved[1:]] == [320, 320, 8]


def test_z_loss():
    x, target = torch.randn(6, 9, requires_grad=True), torch.randint(0, 9, (6,))
    plain = fused.cross_entropy(x, target)
    loss, z_loss = fused.cross_entropy(x, target, lse_square_scale=0.1, return_z_loss=True)
    torch.testing.assert_close(z_loss, 0.1 * x.detach().logsumexp(1).square().mean())
    torch.testing.assert_close(loss, plain + z_loss)
    assert loss.requires_grad and not z_loss.requires_grad
    loss, z_loss = fused.cross_entropy(x, target, return_z_loss=True, reduction="none")
    assert loss.shape == z_loss.shape == (6,) and not z_loss.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 9), (2, 5, 4, 4)])
def test_inplace_backward(shape, dtype):
    weights, x = torch.randn(shape), torch.randn(shape)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(fused.cross_entropy((leaf * weights).to(dtype), target), leaf)
    leaf = x.clone().requires_grad_()
    logits = (leaf * weights).to(dtype)
    loss = fused.cross_entropy(logits, target, inplace_backward=True)
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, expected) and torch.equal(leaf.grad, logits.detach() * weights)
    with pytest.raises(RuntimeError, match="inplace_backward"):
        loss.backward()


def test_inplace_backward_is_seen_by_who_needs_the_logits():
    x, target = torch.randn(6, 9, requires_grad=True), torch.randint(0, 9, (6,))
    logits = x.exp()  # exp's backward needs its result
    loss = fused.cross_entropy(logits, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    for leaf in (x, x.view(6, 9)):
        with pytest.raises(RuntimeError, match="leaf"):
            fused.cross_entropy(leaf, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="call contiguous"):
        fused.cross_entropy((x * 2).t(), torch.zeros(9, dtype=torch.int64), inplace_backward=True)
    logits = x * 2
    loss = fused.cross_entropy(logits, target, inplace_backward=True)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)  # by torch's formula, and not in place
    assert torch.equal(logits, x * 2) and grad.requires_grad


def test_threads_rows_and_streaming_stores_change_nothing():
    x, target = torch.randn(3000, 4096), torch.randint(0, 4096, (3000,))
    assert x.nbytes > 2**25  # more than half of common last-level caches: written past them
    ops, options = torch.ops.dlkit, (1, -100, 0.1, 0.0, 0.0)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            loss, _, stats, total = ops.cross_entropy_forward(x, target, None, *options, False)
            results.append((loss, stats, ops.cross_entropy_backward(loss, x, target, None, stats, total, *options)))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))
    _, stats, grad = results[0]
    assert torch.equal(stats[:, 7:9], ops.cross_entropy_forward(x[7:9], target[7:9], None, *options, False)[2])
    part = ops.cross_entropy_backward(loss, x[:9], target[:9], None, stats[:, :9], total, *options)
    assert torch.equal(part, grad[:9])


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 5, 2, 2), (2, 5, 0, 3), (0,)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_empty_input(shape, reduction):
    target = torch.zeros((*shape[:1], *shape[2:]), dtype=torch.int64) if len(shape) > 1 else torch.tensor(-100)
    results = []
    for function in (native.cross_entropy, fused.cross_entropy):
        x = torch.zeros(shape, requires_grad=True)
        with contextlib.suppress(RuntimeError, IndexError):
            loss = function(x, target, reduction=reduction)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), x)))
    assert len(results) in (0, 2)
    if results:
        torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 5), (0, 500), (0, 5, 3)])
def test_kernels_take_no_rows(backend, shape):
    """Compiled programs whose sizes depend on data call kernels without rows."""
    x, target = torch.zeros(shape), torch.zeros((0, *shape[2:]), dtype=torch.int64)
    for reduction, wanted in ((1, torch.tensor(NAN)), (2, torch.tensor(0.0)), (0, target.float())):
        loss, _, grad = run(backend, x, target, None, torch.ones_like(wanted), reduction, 0.0, 0.0, 0.0)
        assert torch.equal(loss.nan_to_num(7), wanted.nan_to_num(7)) and grad.shape == shape


def test_rows_that_are_all_ignored():
    for reduction, shape in itertools.product(("none", "mean", "sum"), ((3, 4), (2, 4, 3))):
        results = []
        for function in (native.cross_entropy, fused.cross_entropy):
            x = torch.linspace(0, 1, math.prod(shape)).view(shape).requires_grad_()
            target = torch.full((shape[0], *shape[2:]), 7)
            loss = function(x, target, ignore_index=7, reduction=reduction, label_smoothing=0.1)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), x)))
        torch.testing.assert_close(*results, equal_nan=True)


def test_layouts():
    target = torch.randint(0, 5, (4, 3))
    wide = torch.randn(4, 7, 5)
    for x in (
        wide[:, :3].transpose(1, 2),  # shifted logits of a language model
        torch.randn(3, 5, 4).permute(2, 1, 0),
        torch.randn(4, 10, 3)[:, ::2],
        torch.randn(1, 5, 3).expand(4, 5, 3),
    ):
        results = []
        for function in (native.cross_entropy, fused.cross_entropy):
            leaf = x.detach().requires_grad_()
            loss = function(leaf, target, label_smoothing=0.1)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        torch.testing.assert_close(*results)
    x = torch.randn(5)
    torch.testing.assert_close(fused.cross_entropy(x, torch.tensor(3)), native.cross_entropy(x, torch.tensor(3)))
    x, bytes_ = torch.randn(4, 5), torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    torch.testing.assert_close(fused.cross_entropy(x, bytes_), native.cross_entropy(x, bytes_))


def test_16_bit_input_takes_an_fp32_weight_and_autocast_gives_an_fp32_loss():
    x, target, weight = torch.randn(8, 16).bfloat16().requires_grad_(), torch.randint(0, 16, (8,)), torch.rand(16)
    loss = fused.cross_entropy(x, target, weight)
    assert loss.dtype == torch.bfloat16
    expected = native.cross_entropy(x.float(), target, weight)
    torch.testing.assert_close(loss, expected.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide, theirs = fused.cross_entropy(x, target), native.cross_entropy(x, target)
        torch.testing.assert_close(wide, theirs)  # its dtype too
        soft = target.float().softmax(0)[:, None].expand(8, 16)
        torch.testing.assert_close(fused.cross_entropy(x, soft), native.cross_entropy(x, soft))
    torch.testing.assert_close(torch.autograd.grad(wide, x), torch.autograd.grad(theirs, x))


@pytest.mark.parametrize("shape", [(6, 10), (2, 10, 3, 3)])
def test_compiled_and_checked(shape, one_thread):
    def step(x, target, soft):
        plain = fused.cross_entropy(x, target, label_smoothing=0.1, softcap=3.0, lse_square_scale=0.1)
        return plain + fused.cross_entropy(x * 2, soft, reduction="none", inplace_backward=True).square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (shape[0], shape[0] + 3):
        x = torch.randn(rows, *shape[1:], requires_grad=True)
        target, soft = torch.randint(0, 10, (rows, *shape[2:])), torch.randn(rows, *shape[1:]).softmax(1)
        results = []
        for function in (step, compiled):
            loss = function(x, target, soft)
            results.append((loss, *torch.autograd.grad(loss, x)))
        torch.testing.assert_close(*results)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("probabilities", [False, True])
def test_opcheck(reduction, probabilities):
    torch.utils.deterministic.fill_uninitialized_memory = False
    ops = torch.ops.dlkit
    for x in (torch.randn(6, 10), torch.randn(2, 4, 3, 5), torch.randn(2, 3, 5, 4).movedim(-1, 1)):
        target = targets(x.shape, torch.float32, probabilities)
        weight, options = torch.rand(x.shape[1]), (reduction, -100, 0.1, 0.1, 4.0)
        leaf = x.clone().requires_grad_()
        torch.library.opcheck(ops.cross_entropy, (leaf, target, weight, *options))
        torch.library.opcheck(ops.cross_entropy, (leaf, target))
        torch.library.opcheck(ops.cross_entropy_forward, (x, target, weight, *options, False))
        loss, _, stats, total = ops.cross_entropy_forward(x, target, weight, *options, False)
        arguments = (torch.ones_like(loss), x, target, weight, stats, total, *options)
        torch.library.opcheck(ops.cross_entropy_backward, arguments)
        torch.library.opcheck(ops.cross_entropy_backward_, arguments)


T = torch.tensor([1, 0, 3, 2])
BAD = {
    "target too large": lambda f, x: f(x, torch.tensor([1, 0, 4, 9])),
    "target negative": lambda f, x: f(x, torch.tensor([1, 0, -1, 2])),
    "target too large, pixels": lambda f, x: f(torch.ones(1, 4, 2, 2), torch.tensor([[[1, 2], [7, 4]]])),
    "another batch": lambda f, x: f(x, T[:3]),
    "another batch, pixels": lambda f, x: f(torch.ones(1, 4, 2), torch.ones(2, 2, dtype=torch.int64)),
    "more dimensions": lambda f, x: f(x, T[:, None]),
    "another width": lambda f, x: f(torch.ones(1, 4, 2), torch.ones(1, 3, dtype=torch.int64)),
    "a target of Int": lambda f, x: f(x, T.int()),
    "a floating target": lambda f, x: f(x, T.float()),
    "classes in the input's shape": lambda f, x: f(x, torch.ones(4, 4, dtype=torch.int64)),
    "ignore_index for probabilities": lambda f, x: f(x, x.softmax(1), ignore_index=2),
    "probabilities of another width": lambda f, x: f(x, torch.ones(4, 3)),
    "a short weight": lambda f, x: f(x, T, torch.ones(3)),
    "a matrix of weights": lambda f, x: f(x, T, torch.ones(4, 1)),
    "a weight of double": lambda f, x: f(x, T, torch.ones(4).double()),
    "a weight on another device": lambda f, x: f(x, T, torch.ones(4, device="meta")),
    "label_smoothing above 1": lambda f, x: f(x, T, label_smoothing=1.5),
    "an unknown reduction": lambda f, x: f(x, T, reduction="average"),
    "integer logits": lambda f, x: f(x.long(), T),
    "complex logits": lambda f, x: f(x.cfloat(), T),
    "a list": lambda f, x: f([1.0], T),
    "no target": lambda f, x: f(x, None),
    "a weight of another kind": lambda f, x: f(x, T, [1.0] * 4),
    "label_smoothing of another kind": lambda f, x: f(x, T, label_smoothing="a"),
    "ignore_index of another kind": lambda f, x: f(x, T, ignore_index=1.5),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_what_torch_raises(name):
    call, x = BAD[name], torch.randn(4, 4)
    with pytest.raises(Exception) as theirs:
        call(native.cross_entropy, x)
    with pytest.raises(type(theirs.value)) as ours:
        call(fused.cross_entropy, x)
    assert type(ours.value) is type(theirs.value), (ours.value, theirs.value)


MESSAGES = [
    (IndexError, r"targets from 0 to 3 .* got 9 in row 2", {"target": T * 3}),
    (RuntimeError, "label_smoothing between 0 and 1, got -0.5", {"label_smoothing": -0.5}),
    (RuntimeError, "label_smoothing between 0 and 1, got nan", {"label_smoothing": NAN}),
    (ValueError, "softcap above 0", {"softcap": 0.0}),
    (ValueError, "softcap above 0", {"softcap": INF}),
    (ValueError, "finite lse_square_scale", {"lse_square_scale": NAN}),
    (RuntimeError, r"target of shape \[4\] \(classes\) or \[4, 4\]", {"target": T[:, None]}),
    (RuntimeError, r"weight of shape \[4\].*got \[3\]", {"weight": torch.ones(3)}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), MESSAGES)
def test_messages(error, message, arguments):
    with pytest.raises(error, match=message):
        fused.cross_entropy(torch.randn(4, 4), **{"target": T} | arguments)


def test_layer():
    x, target = torch.randn(4, 5), torch.tensor([1, 0, 3, 2])
    plain = torch.nn.CrossEntropyLoss(torch.rand(5), label_smoothing=0.1, reduction="sum")
    expected = plain(x, target)
    layer = dlkit.replace(plain)
    assert type(layer) is dlkit.nn.CrossEntropyLoss and isinstance(layer, torch.nn.CrossEntropyLoss)
    torch.testing.assert_close(layer(x, target), expected)
    assert type(dlkit.restore(layer)) is torch.nn.CrossEntropyLoss
    full = dlkit.nn.CrossEntropyLoss(lse_square_scale=0.1, softcap=3.0, return_z_loss=True)
    loss, z_loss = full(x, target)
    assert torch.equal(loss, fused.cross_entropy(x, target, lse_square_scale=0.1, softcap=3.0)) and z_loss > 0
    report = []
    assert type(dlkit.restore(full, report=report)) is dlkit.nn.CrossEntropyLoss
    assert "options that torch's layer has not" in report[0].reason
    with pytest.warns(UserWarning, match="size_average"):
        summed = dlkit.nn.CrossEntropyLoss(size_average=False)
    torch.testing.assert_close(summed(x, target), native.cross_entropy(x, target, reduction="sum"))


# Linear + cross entropy.


def linear_problem(dtype, rows=300, features=16, classes=33, bias=True):
    """Inputs with more rows than a chunk."""
    x, weight = make((rows, features), dtype), make((classes, features), dtype, scale=0.3)
    target = torch.randint(0, classes, (rows,))
    target[rows // 2] = -100
    leaves = [x, weight, make((classes,), dtype)] if bias else [x, weight]
    return [leaf.requires_grad_() for leaf in leaves], target


def both_ways(leaves, target, grad=None, **options):
    """(loss, gradients) fused and unfused; the latter with logits and losses in fp64."""
    results = []
    for fuse in (True, False):
        x, weight, *bias = leaves if fuse else [leaf.detach().double().requires_grad_() for leaf in leaves]
        if fuse:
            loss = fused.linear_cross_entropy(x, weight, target, linear_bias=bias[0] if bias else None, **options)
        else:
            double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            soft = target.double() if target.is_floating_point() else target
            loss = fused.cross_entropy(native.linear(x, weight, *bias), soft, **double)
        wanted = [leaf for leaf in (x, weight, *bias) if leaf.requires_grad]
        result = (
            loss,
            *torch.autograd.grad(loss, wanted, torch.ones_like(loss) if grad is None else grad.to(loss.dtype)),
        )
        results.append([t.detach() for t in result])
    return results


LINEAR_OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum", "label_smoothing": 0.1},
    "none": {"reduction": "none"},
    "weighted": {"weight": torch.linspace(0.5, 2, 33), "label_smoothing": 0.2},
    "language model": {"lse_square_scale": 1e-2, "softcap": 3.0, "weight": torch.linspace(0.5, 2, 33)},
}


@pytest.mark.parametrize("name", LINEAR_OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_linear_gives_what_the_unfused_ops_give(dtype, name):
    options = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in LINEAR_OPTIONS[name].items()}
    leaves, target = linear_problem(dtype)
    grad = torch.rand(300) if name == "none" else torch.tensor(0.75)
    found, expected = both_ways(leaves, target, grad, **options)
    # In fp64 the unfused ops round as well: with rows in another order they are up to 7 eps from themselves.
    tolerance = (16 if dtype == torch.float64 else 8) * torch.finfo(dtype).eps
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_linear_with_probabilities_k_dimensions_and_one_row():
    leaves, _ = linear_problem(torch.float32)
    found, expected = both_ways(leaves, torch.randn(300, 33).softmax(1))
    torch.testing.assert_close(found, [t.float() for t in expected])
    x, weight = torch.randn(5, 4), torch.randn(7, 2, 3, 4)
    target = torch.randint(0, 7, (5, 2, 3))
    logits = native.linear(x, weight.flatten(0, -2)).view(5, 7, 2, 3)
    torch.testing.assert_close(fused.linear_cross_entropy(x, weight, target), native.cross_entropy(logits, target))
    for reduction in ("none", "mean"):
        loss = fused.linear_cross_entropy(x[0], weight[:, 0, 0], torch.tensor(3), reduction=reduction)
        expected = native.cross_entropy(x[0] @ weight[:, 0, 0].t(), torch.tensor(3))
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_linear_with_frozen_parts(frozen, reduction):
    leaves, target = linear_problem(torch.float32)
    leaves[frozen].requires_grad_(False)
    x, weight, bias = leaves
    loss = fused.linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction).sum()
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    expected = native.cross_entropy(native.linear(x, weight, bias), target, reduction=reduction).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted))
    with torch.no_grad():
        assert not fused.linear_cross_entropy(x, weight, target).requires_grad


def test_linear_keeps_no_logits():
    saved = []
    leaves, target = linear_problem(torch.bfloat16, bias=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = fused.linear_cross_entropy(*leaves, target)
    assert [t.numel() for t in saved] == [300 * 16, 33 * 16, 300, 300 * 16, 33 * 16]
    assert [t.dtype for t in saved[3:]] == [torch.float32] * 2
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss * 2, leaves), tuple(grad * 2 for grad in first))


@pytest.mark.parametrize("name", ["mean", "none", "language model"])
def test_linear_gradients_of_gradients_and_transforms(name):
    options = {k: v[:5].double() if isinstance(v, torch.Tensor) else v for k, v in LINEAR_OPTIONS[name].items()}
    leaves, target = linear_problem(torch.float64, 4, 3, 5)

    def call(x, weight, bias):
        return fused.linear_cross_entropy(x, weight, target % 5, linear_bias=bias, **options)

    target[:] = torch.tensor([0, 1, 4, 3])
    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)
    torch.testing.assert_close(torch.func.jacrev(call)(*leaves), torch.func.jacfwd(call)(*leaves))
    batch = torch.stack([leaves[0], leaves[0] * 2])
    wanted = torch.stack([call(x, *leaves[1:]) for x in batch])
    torch.testing.assert_close(torch.vmap(call, (0, None, None))(batch, *leaves[1:]), wanted)


SIXTEEN_OR_MORE = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("weight_dtype", SIXTEEN_OR_MORE, ids=str)
@pytest.mark.parametrize("target_dtype", [None, *SIXTEEN_OR_MORE], ids=str)
@pytest.mark.parametrize("dtype", SIXTEEN_OR_MORE, ids=str)
def test_autocast_takes_any_types_together(dtype, target_dtype, weight_dtype):
    x = torch.randn(6, 5).to(dtype).requires_grad_()
    target = torch.randint(0, 5, (6,)) if target_dtype is None else torch.randn(6, 5).softmax(1).to(target_dtype)
    weight = (torch.rand(5) + 0.5).to(weight_dtype)
    results = []
    for cross_entropy in (native.cross_entropy, fused.cross_entropy):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = cross_entropy(x, target, weight, label_smoothing=0.1)
        results.append([loss, *torch.autograd.grad(loss, [x])])
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weight_dtype", SIXTEEN_OR_MORE, ids=str)
def test_linear_under_autocast_takes_any_class_weights(weight_dtype):
    x, rows, target = torch.randn(6, 8), torch.randn(5, 8), torch.randint(0, 5, (6,))
    weight = (torch.rand(5) + 0.5).to(weight_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = native.cross_entropy(native.linear(x, rows), target, weight)
        found = fused.linear_cross_entropy(x, rows, target, weight=weight)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_linear_under_autocast_and_checkpointing():
    leaves, target = linear_problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused.linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2])
        expected = native.cross_entropy(native.linear(*leaves), target)
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() < 2e-2 * theirs.norm()
    plain = torch.autograd.grad(fused.linear_cross_entropy(*leaves[:2], target), leaves[:2])
    for reentrant in (False, True):
        loss = torch.utils.checkpoint.checkpoint(
            fused.linear_cross_entropy, *leaves[:2], target, use_reentrant=reentrant
        )
        for leaf in leaves:
            leaf.grad = None
        loss.backward()
        assert torch.equal(leaves[0].grad, plain[0]) and torch.equal(leaves[1].grad, plain[1])


def test_linear_tied_to_an_embedding():
    """The table's gradient is the sum of both uses."""
    tokens, target = torch.randint(0, 33, (300,)), torch.randint(0, 33, (300,))
    results = []
    for fuse in (True, False):
        table = torch.linspace(-1, 1, 33 * 16).sin().view(33, 16).requires_grad_()
        x = native.embedding(tokens, table).tanh()
        loss = fused.linear_cross_entropy(x, table, target) if fuse else native.cross_entropy(x @ table.t(), target)
        loss.backward()
        results.append((loss.detach(), table.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_compiled_and_checked(reduction, one_thread):
    leaves, target = linear_problem(torch.float32, 12, 8, 9)
    code = ("none", "mean").index(reduction)
    torch.utils.deterministic.fill_uninitialized_memory = False
    ops, (x, weight, bias) = torch.ops.dlkit, leaves
    options = (code, -100, 0.1, 0.1, 4.0, False)
    torch.library.opcheck(ops.linear_cross_entropy, (x, weight, target, bias, None, *options))
    plain = [leaf.detach() for leaf in leaves]
    arguments = (plain[0], plain[1], target, plain[2], None, *options, [True, True, False])
    torch.library.opcheck(ops.linear_cross_entropy_forward, arguments)
    backward = (torch.rand(12), *arguments[:5], *options[1:5], [True, False, True])
    torch.library.opcheck(ops.linear_cross_entropy_backward, backward)

    def step(x, weight, bias, target):
        return fused.linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (12, 15):
        leaves, target = linear_problem(torch.float32, rows, 8, 9)
        results = []
        for function in (step, compiled):
            loss = function(*leaves, target)
            results.append((loss, *torch.autograd.grad(loss, leaves)))
        torch.testing.assert_close(*results)


LINEAR_BAD = {
    "a target too large": (
        IndexError,
        "got 50 in row 290",
        lambda x, w, t: (x, w, t.index_fill(0, torch.tensor(290), 50)),
    ),
    "another batch": (ValueError, "target of shape", lambda x, w, t: (x, w, t[:5])),
    "another width": (RuntimeError, r"linear_weight of shape \[C, 16\]", lambda x, w, t: (x, w[:, :3], t)),
    "another type": (RuntimeError, "linear_weight of Float", lambda x, w, t: (x, w.double(), t)),
    "three dimensions": (RuntimeError, "input of shape", lambda x, w, t: (x[None], w, t)),
    "no tensor": (TypeError, "target to be a Tensor", lambda x, w, t: (x, w, None)),
}


@pytest.mark.parametrize("name", LINEAR_BAD)
def test_linear_bad_input(name):
    error, message, arguments = LINEAR_BAD[name]
    leaves, target = linear_problem(torch.float32, bias=False)
    with pytest.raises(error, match=message):
        fused.linear_cross_entropy(*arguments(*leaves, target))
    with pytest.raises(RuntimeError, match="ignore_index is for classes"):
        fused.linear_cross_entropy(*leaves, torch.rand(300, 33), ignore_index=1)


def test_linear_layer():
    x, target = torch.randn(6, 8), torch.randint(0, 5, (6,))
    layer = dlkit.nn.LinearCrossEntropyLoss(8, 5, bias=True, label_smoothing=0.1)
    expected = native.cross_entropy(layer.linear(x), target, label_smoothing=0.1)
    torch.testing.assert_close(layer(x, target), expected)
    spatial = dlkit.nn.LinearCrossEntropyLoss(8, 5, out_features=(2,), bias=True)
    logits = spatial.linear(x).view(6, 5, 2)
    wide = torch.randint(0, 5, (6, 2))
    torch.testing.assert_close(spatial(x, wide), native.cross_entropy(logits, wide))
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        theirs = torch.nn.LinearCrossEntropyLoss(8, 5, bias=True, label_smoothing=0.1)
        theirs.load_state_dict(layer.state_dict())
        torch.testing.assert_close(theirs(x, target), expected)
        assert type(dlkit.replace(theirs)) is dlkit.nn.LinearCrossEntropyLoss
        torch.testing.assert_close(theirs(x, target), expected)
        assert type(dlkit.restore(theirs)) is torch.nn.LinearCrossEntropyLoss
