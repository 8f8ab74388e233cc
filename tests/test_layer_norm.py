"""LayerNorm and RMSNorm: each backend against exact results, with torch's error as the yardstick; then the torch-facing
side."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as native
from support import reference
from support.backends import DEVICE_MODELS
from support.inputs import TYPES, make
from support.tolerance import Yardstick, max_error, ulp
from torch._subclasses import FakeTensorMode

import dlkit
import dlkit.functional as fused

SHAPES = [(1, 1), (3, 1), (5, 2), (2, 7), (67, 16), (9, 31), (33, 64), (17, 100), (6, 255), (130, 256), (5, 768)]
SHAPES += [(3, 1000), (40, 1024), (2, 1025), (7, 4096), (3, 5003), (2, 9000), (1, 17000)]
# rms, residual, weight, bias
VARIANTS = [
    (False, False, True, True),
    (True, False, True, False),
    (False, True, True, True),
    (True, True, True, False),
    (False, False, False, False),
    (False, False, True, False),
    (False, True, False, True),
    (True, True, False, False),
]
CASES = [
    (shape, types, VARIANTS[(i + j + 3 * k) % len(VARIANTS)])
    for (i, shape), (j, types) in itertools.product(enumerate(SHAPES), enumerate(TYPES))
    for k in range(3 if shape[1] < 4096 else 1)
]


def variant_name(value):
    """rms+weight, of a variant."""
    if value not in VARIANTS:
        return None
    rms, *there = value
    return "+".join(["rms" if rms else "layer", *itertools.compress(("residual", "weight", "bias"), there)])


def strided(tensor, kind):
    """The same values in another layout."""
    rows, cols = tensor.shape
    if kind == "row-strided":
        return torch.cat([tensor, tensor.new_full((rows, 3), math.nan)], 1)[:, :cols]
    if kind == "odd offset":
        padded = tensor.new_full((rows * cols + 1,), math.nan)
        padded[1:] = tensor.reshape(-1)
        return padded[1:].view(rows, cols)
    if kind == "transposed":
        return tensor.t().contiguous().t()
    return tensor


def native_norm(x, residual, weight, bias, eps, rms):
    """torch's ops on the CPU."""
    total = x if residual is None else x + residual
    if rms:
        return native.rms_norm(total, total.shape[1:], weight, eps)
    return native.layer_norm(total, total.shape[1:], weight, bias, eps)


def native_gradients(grad_output, grad_sum, x, weight, bias, eps, rms):
    """(grad_input, grad_weight, grad_bias) of torch's ops on the CPU, None where there is no parameter."""
    lone_bias = weight is None and bias is not None
    if lone_bias:
        weight = torch.ones_like(bias)  # torch's backward refuses a bias of another dtype without a weight
    sources = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = native_norm(sources[0], None, sources[1], sources[2], eps, rms)
    found = iter(torch.autograd.grad(y, [t for t in sources if t is not None], grad_output))
    grads = [None if t is None else next(found) for t in sources]
    if grad_sum is not None:
        grads[0] = grads[0] + grad_sum
    return grads


def check(backend, shape, types, variant, layout="contiguous", scale=1.0, shift=0.0, eps=1e-5):
    """Checks forward and backward of `backend` against the reference on several draws; returns the last results."""
    yardsticks = {name: Yardstick(name) for name in ("y", "grad_input", "grad_weight", "grad_bias")}
    results = None
    draws = max(1, min(32, 16384 // max(1, shape[0] * shape[1])))
    ours_draws = min(draws, backend.draws)
    # Torch gets more draws than ours where ours is worse so far: more of them show its worst case better.
    for draw in range(30 * draws):
        if draw >= ours_draws and all(yardstick.holds(backend.ulps) for yardstick in yardsticks.values()):
            break
        ours = backend if draw < ours_draws else None
        results = check_draw(ours, shape, types, variant, layout, scale, shift, eps, yardsticks) or results
    for yardstick in yardsticks.values():
        assert yardstick.holds(backend.ulps), yardstick
    return results


def check_draw(backend, shape, types, variant, layout, scale, shift, eps, yardsticks):
    dtype, parameter_dtype = types
    rms, with_residual, with_weight, with_bias = variant
    rows, cols = shape
    x = make(shape, dtype, scale=scale, shift=shift)
    residual = make(shape, dtype) if with_residual else None
    weight = make((cols,), parameter_dtype, shift=1.0) if with_weight else None
    bias = make((cols,), parameter_dtype) if with_bias else None
    grad_output, grad_sum = make(shape, dtype), make(shape, dtype) if with_residual else None

    normalized = reference.add(x, residual) if with_residual else x
    exact_y, exact_mean, exact_rstd = reference.layer_norm_forward(normalized, weight, bias, eps, rms)
    exact_grads = reference.layer_norm_backward(grad_output, grad_sum, normalized, weight, eps, rms)
    wanted = {"y": True, "grad_input": True, "grad_weight": with_weight, "grad_bias": with_bias}
    expected = dict(zip(wanted, (exact_y, *exact_grads), strict=True))
    theirs = (
        native_norm(x, residual, weight, bias, eps, rms),
        *native_gradients(grad_output, grad_sum, normalized, weight, bias, eps, rms),
    )
    for name, tensor in zip(wanted, theirs, strict=True):
        if wanted[name]:
            yardsticks[name].add_native(tensor, expected[name])
    if cols == 1 and rows:
        # grad_input is the rounded difference of two equal terms: its error is counted in ulps of rstd * weight *
        # grad_output.
        terms = exact_rstd * reference.exact(grad_output) * (1 if weight is None else reference.exact(weight))
        yardsticks["grad_input"].one_ulp = max(yardsticks["grad_input"].one_ulp, ulp(float(abs(terms).max()), dtype))
    if backend is None:
        return None

    def place(tensor):
        if tensor is None:
            return None
        tensor = tensor.to(backend.device)
        return strided(tensor, layout) if tensor.dim() == 2 else tensor

    y, total, mean, rstd = backend.call(
        "layer_norm_forward", input=place(x), residual=place(residual), normalized_ndim=1, weight=place(weight),
        bias=place(bias), eps=eps, rms=rms, stats=True,
    )  # fmt: skip
    assert y.is_contiguous()
    assert torch.equal(total.cpu(), normalized) if with_residual else total is None
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    largest = float(normalized.double().abs().max()) if rows else 0.0
    assert (mean is None) == rms
    for statistic, exact_statistic in ((rstd, exact_rstd), *([] if rms else [(mean, exact_mean)])):
        assert statistic.dtype == accumulate and statistic.shape == (rows, 1)
        size = largest if statistic is mean else float(exact_statistic.max(initial=0))
        assert max_error(statistic, exact_statistic) <= 4 * ulp(size, accumulate)

    mask = [True, with_weight, with_bias]
    grads = backend.call(
        "layer_norm_backward", grad_output=place(grad_output), grad_sum=place(grad_sum), input=place(normalized),
        mean=mean, rstd=rstd, weight=place(weight), bias=place(bias), normalized_ndim=1, output_mask=mask,
    )  # fmt: skip
    for name, ours, native_result in zip(wanted, (y, *grads), theirs, strict=True):
        assert (ours is not None) == wanted[name], name
        if wanted[name]:
            yardsticks[name].add(ours, native_result, expected[name])
    return y, total, mean, rstd, *grads


@pytest.mark.parametrize(("shape", "types", "variant"), CASES, ids=variant_name)
def test_parity(backend, shape, types, variant):
    check(backend, shape, types, variant)


@pytest.mark.parametrize("types", [TYPES[0], TYPES[1], TYPES[3]])
def test_very_long_rows(backend, types):
    if backend.name == "triton" and backend.device == "cpu":
        pytest.skip("minutes in the interpreter; 17,000 columns take the same path there")
    check(backend, (2, 70_000), types, VARIANTS[2])
    check(backend, (1, 1_000_003), types, VARIANTS[1])
    check(backend, (1, 131_072), types, VARIANTS[2])
    check(backend, (40, 20_000), types, VARIANTS[0])  # several blocks sum the parameters' gradients
    if backend.instruction_set:  # where long rows are cut into pieces, and several batches of them add up
        check(backend, (3, 65_549), types, (False, True, True, True), "row-strided")
        check(backend, (35, 65_549), types, VARIANTS[1], "row-strided")
        check(backend, (35, 65_600), types, VARIANTS[0])


@pytest.mark.parametrize("layout", ["row-strided", "odd offset", "transposed"])
@pytest.mark.parametrize("types", TYPES[:3] + TYPES[4:5])
@pytest.mark.parametrize("shape", [(5, 16), (3, 33), (4, 1024), (2, 5000)], ids=str)
def test_layouts(backend, shape, types, layout):
    check(backend, shape, types, VARIANTS[2], layout)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 1000.0), (1e-3, 10.0), (100.0, 0.0), (0.0, 3.0)])
def test_large_mean_over_small_variance(backend, scale, shift):
    for variant in (VARIANTS[0], VARIANTS[1]):
        check(backend, (6, 1024), TYPES[0], variant, scale=scale, shift=shift)


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("cols", [48, 3000, 20_000])
def test_only_the_gradients_asked_for(backend, mask, cols):
    op = backend.op("layer_norm_backward")
    rows = (
        3 if cols == 20_000 and backend.name == "triton" and backend.device == "cpu" else 20
    )  # the interpreter takes 8 s for 20
    x, grad_output = (make((rows, cols), torch.float32, backend.device) for _ in range(2))
    weight, bias = (make((cols,), torch.float32, backend.device) for _ in range(2))
    _, _, mean, rstd = backend.call(
        "layer_norm_forward", input=x, normalized_ndim=1, weight=weight, bias=bias, eps=1e-5, rms=False, stats=True
    )
    everything = op(grad_output, None, x, mean, rstd, weight, bias, 1, [True] * 3)
    some = op(grad_output, None, x, mean, rstd, weight, bias, 1, list(mask))
    for wanted, all_of_it, part in zip(mask, everything, some, strict=True):
        assert (part is not None) == wanted
        if part is not None:
            torch.testing.assert_close(part, all_of_it, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("types", TYPES, ids=[f"{str(a)[6:]}-{str(b)[6:]}" for a, b in TYPES])
def test_backward_needs_no_bias_beside_a_weight(backend, types):
    """Autograd's node does not save it: no kernel reads it, and the weight has its dtype."""
    x, dy = make((9, 40), types[0], backend.device), make((9, 40), types[0], backend.device)
    weight, bias = (make((40,), types[1], backend.device) for _ in range(2))
    _, _, mean, rstd = backend.call(
        "layer_norm_forward", input=x, normalized_ndim=1, weight=weight, bias=bias, eps=1e-5, rms=False, stats=True
    )
    op = backend.op("layer_norm_backward")
    whole = op(dy, None, x, mean, rstd, weight, bias, 1, [True] * 3)
    without = op(dy, None, x, mean, rstd, weight, None, 1, [True] * 3)
    for a, b in zip(whole, without, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    state = torch.tensor([3, 4], device=backend.device)
    op = backend.op("dropout_layer_norm_backward")
    whole = op(dy, None, x, mean, rstd, weight, bias, state, 0.5, 1, [True] * 4)
    without = op(dy, None, x, mean, rstd, weight, None, state, 0.5, 1, [True] * 4)
    for a, b in zip(whole, without, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("arch", DEVICE_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_widths_that_fill_the_shared_memory_of_a_launch(backend, dtype, arch, monkeypatch):
    """Static shared memory counts too, both for the 48 KB available by default and for all that a device has."""
    if backend.name == "cuda-on-cpu":
        monkeypatch.setenv("DLKIT_CUDA_ON_CPU_ARCH", arch)
    elif arch != DEVICE_MODELS[0]:
        pytest.skip("the device is what it is")
    forward, backward = backend.op("layer_norm_forward"), backend.op("layer_norm_backward")
    plain = [1536, 3072, 6144, 12288, 48 << 10, 98 << 10, 162 << 10, 226 << 10]
    for row_bytes, with_sum in [*((n, False) for n in plain), *((n, True) for n in (64, 256, 512, 1024, 8192))]:
        shape = (1, row_bytes // dtype.itemsize)
        x, grad, grad_sum = (make(shape, dtype, backend.device) for _ in range(3))
        y, _, mean, rstd = forward(x, None, 1, None, None, 1e-5, False, True)
        mask = [True, False, False]
        dx = backward(grad, grad_sum if with_sum else None, x, mean, rstd, None, None, 1, mask)[0]
        wide = x.double().requires_grad_()
        expected = native.layer_norm(wide, shape[1:])
        expected_dx = torch.autograd.grad(expected, wide, grad.double())[0] + with_sum * grad_sum.double()
        for found, wanted in ((y, expected), (dx, expected_dx)):
            assert ((found.double() - wanted).abs() <= 4 * torch.finfo(dtype).eps * (wanted.abs() + 1)).all()


def test_more_rows_than_a_grid_dimension_holds(backend):
    check(backend, (70_001, 8), TYPES[0], VARIANTS[0])


def test_parameters_may_be_views(backend):
    x, grad = make((3, 7), torch.float32).to(backend.device), make((3, 7), torch.float32).to(backend.device)
    weight, bias = (make((7,), torch.float32).to(backend.device) for _ in "ab")

    def run(weight, bias):
        y, _, mean, rstd = backend.call(
            "layer_norm_forward", input=x, normalized_ndim=1, weight=weight, bias=bias, eps=1e-5, rms=False, stats=True
        )
        return y, *backend.call(
            "layer_norm_backward", grad_output=grad, input=x, mean=mean, rstd=rstd, weight=weight, bias=bias,
            normalized_ndim=1, output_mask=[True] * 3,
        )  # fmt: skip

    strided = [torch.stack([t] * 3, 1)[:, 1] for t in (weight, bias)]
    for one, other in zip(run(*strided), run(weight, bias), strict=True):
        assert torch.equal(one, other)


def test_no_rows(backend):
    for variant in VARIANTS:
        y, _, _, _, grad_input, grad_weight, grad_bias = check(backend, (0, 12), TYPES[0], variant)
        assert y.shape == grad_input.shape == (0, 12)
        for grad in (grad_weight, grad_bias):
            assert grad is None or torch.equal(grad.cpu(), torch.zeros(12))


@pytest.mark.parametrize("rms", [False, True])
def test_rows_without_columns(backend, rms):
    x, weight = torch.empty(3, 0, device=backend.device), torch.empty(0, device=backend.device)
    y, _, mean, rstd = backend.call(
        "layer_norm_forward", input=x, normalized_ndim=1, weight=weight, bias=weight, eps=1e-5, rms=rms, stats=True
    )
    assert y.shape == (3, 0) and rstd.shape == (3, 1)
    gradients = backend.call(
        "layer_norm_backward", grad_output=y, input=x, mean=mean, rstd=rstd, weight=weight, bias=weight,
        normalized_ndim=1, output_mask=[True, True, True],
    )  # fmt: skip
    assert [gradient.shape for gradient in gradients] == [(3, 0), (0,), (0,)]


def test_same_bits_every_run(backend):
    for shape in ((300, 96), (37, 1500)):
        results = []
        for _ in range(2):
            torch.manual_seed(5)
            results.append(check(backend, shape, TYPES[0], VARIANTS[2]))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cols", [700, 701, 60_001, 70_001])  # 701: rows that begin anywhere in 16 bytes
def test_a_row_does_not_depend_on_the_others(backend, cols, dtype):
    if cols > 20_000 and backend.name == "triton" and backend.device == "cpu":
        pytest.skip("minutes in the interpreter")
    rows = 50 if cols < 1000 else 9
    x, grad = make((rows, cols), dtype, backend.device), make((rows, cols), dtype, backend.device)
    weight = make((cols,), torch.float32, backend.device)

    def run(x, grad):
        y, _, mean, rstd = backend.call(
            "layer_norm_forward", input=x, normalized_ndim=1, weight=weight, eps=1e-5, rms=False, stats=True
        )
        mask = [True, True, False]
        return y, backend.call(
            "layer_norm_backward", grad_output=grad, input=x, mean=mean, rstd=rstd, weight=weight, normalized_ndim=1,
            output_mask=mask,
        )[0]  # fmt: skip

    whole = run(x, grad)
    for begin, end in ((0, 1), (2, 7), (rows - 1, rows)):
        in_place = run(x[begin:end], grad[begin:end])
        copied = run(x[begin:end].clone(), grad[begin:end].clone())
        for all_rows, one, other in zip(whole, in_place, copied, strict=True):
            assert torch.equal(one, all_rows[begin:end]) and torch.equal(other, one)


@pytest.mark.parametrize("cols", [40, 9000, 60_000])
@pytest.mark.parametrize("rms", [False, True])
def test_nan_and_infinity_spread_as_in_torch(backend, rms, cols):
    x = make((5, cols), torch.float32)
    x[1, 3], x[2, 7], x[3, 9] = math.nan, math.inf, -math.inf
    y = backend.call(
        "layer_norm_forward", input=x.to(backend.device), normalized_ndim=1, eps=1e-5, rms=rms, stats=False
    )[0].cpu()
    expected = native_norm(x, None, None, None, 1e-5, rms)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.allclose(y[expected.isfinite()], expected[expected.isfinite()], atol=1e-5)


@pytest.mark.parametrize("shape", [(1003, 515), (3, 200_003)], ids=str)
def test_thread_count_does_not_change_bits(shape):
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            torch.manual_seed(3)
            x = torch.randn(shape, requires_grad=True)
            layer = dlkit.nn.LayerNorm(shape[1])
            y = layer(x)
            results.append((y, *torch.autograd.grad(y, (x, *layer.parameters()), torch.randn_like(y))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_streaming_stores_write_what_plain_ones_do():
    """Large outputs take the streaming path; its bits are those of the small path, row by row."""
    x = torch.randn(8192, 1040)
    whole = fused.layer_norm(x, (1040,))
    parts = torch.cat([fused.layer_norm(part, (1040,)) for part in x.split(64)])
    assert torch.equal(whole, parts)


# The torch-facing side.

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def functions():
    """(name, fused function of (x, weight, bias), torch's) for the four public ops."""
    shape = (6,)

    def add(norm):
        def run(x, weight, bias):
            total = x + x.flip(0)
            return norm(total, weight, bias), total

        return run

    def layer(x, w, b):
        return native.layer_norm(x, shape, w, b)

    def rms(x, w, b):
        return native.rms_norm(x, shape, w)

    return {
        "layer_norm": (lambda x, w, b: fused.layer_norm(x, shape, w, b), layer),
        "rms_norm": (lambda x, w, b: fused.rms_norm(x, shape, w), rms),
        "add_layer_norm": (lambda x, w, b: fused.add_layer_norm(x, x.flip(0), shape, w, b), add(layer)),
        "add_rms_norm": (lambda x, w, b: fused.add_rms_norm(x, x.flip(0), shape, w), add(rms)),
    }


FUNCTIONS = functions()


def leaves(dtype=torch.float64, device="cpu"):
    return [make(shape, dtype, device).requires_grad_() for shape in ((3, 4, 6), (6,), (6,))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck_and_gradgradcheck(name, device):
    inputs = leaves(device=device)
    function = FUNCTIONS[name][0]
    unused = 1 if "rms" in name else 0
    inputs = inputs[: 3 - unused]
    call = (lambda x, w: function(x, w, None)) if unused else function
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    if not unused:
        assert torch.autograd.gradgradcheck(lambda x, b: function(x, None, b), (inputs[0], inputs[2]))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_any_subset(name, needs):
    ours, theirs = (
        [t.detach().clone().requires_grad_(need) for t, need in zip(leaves(), needs, strict=True)] for _ in range(2)
    )
    for a, b in zip(ours, theirs, strict=True):
        b.data.copy_(a.data)
    outputs = [
        torch.cat([t.flatten() for t in pair]) if isinstance(pair := f(*inputs), tuple) else pair.flatten()
        for f, inputs in zip(FUNCTIONS[name], (ours, theirs), strict=True)
    ]
    assert outputs[0].requires_grad == outputs[1].requires_grad
    if not outputs[0].requires_grad:
        return
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-12)


def test_gradient_through_one_output_only():
    x, residual = (make((4, 6), torch.float64).requires_grad_() for _ in range(2))
    weight = make((6,), torch.float64).requires_grad_()
    y, total = fused.add_layer_norm(x, residual, (6,), weight)
    grads = torch.autograd.grad(total.sum(), (x, residual), retain_graph=True)
    assert all(torch.equal(grad, torch.ones_like(grad)) for grad in grads)
    assert torch.autograd.grad(total.sum(), weight, retain_graph=True, allow_unused=True) == (None,)
    expected = torch.autograd.grad(native.layer_norm(x + residual, (6,), weight).square().sum(), (x, residual, weight))
    found = torch.autograd.grad(y.square().sum(), (x, residual, weight))
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("function", ["layer_norm", "rms_norm"])
def test_expanded_gradient_and_non_contiguous_gradient(function):
    x = make((2, 5, 6), torch.float32).requires_grad_()
    y, expected = getattr(fused, function)(x, (6,)), getattr(native, function)(x, (6,))
    for reduce in (torch.sum, lambda t: (t.transpose(0, 2).contiguous() ** 2).sum(), lambda t: t[:, ::2, 1:].sum()):
        ours, theirs = (torch.autograd.grad(reduce(t), x, retain_graph=True)[0] for t in (y, expected))
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 4, 5), (4, 5), (5,)], ids=str)
@pytest.mark.parametrize("normalized_ndim", [1, 2, 3])
def test_normalized_shapes_and_memory_formats(shape, normalized_ndim):
    if normalized_ndim > len(shape):
        pytest.skip("more normalized dimensions than dimensions")
    x = make(shape, torch.float32)
    variants = [
        x,
        x.transpose(0, -1).contiguous().transpose(0, -1),
        x[..., ::2].repeat_interleave(2, -1)[..., : shape[-1]],
    ]
    if len(shape) == 4:
        variants.append(x.contiguous(memory_format=torch.channels_last))
        variants.append(x[:, :, :, :1].expand(shape))
    normalized = shape[-normalized_ndim:]
    weight, bias = make(normalized, torch.float32), make(normalized, torch.float32)
    for variant in variants:
        expected = native.layer_norm(variant, normalized, weight, bias)
        found = fused.layer_norm(variant, normalized, weight, bias)
        assert torch.allclose(found, expected, atol=2e-6) and found.stride() == expected.stride()
        expected = native.rms_norm(variant, normalized, weight)
        found = fused.rms_norm(variant, normalized, weight)
        assert torch.allclose(found, expected, atol=2e-6) and found.stride() == expected.stride()


def test_row_strided_input_is_not_copied():
    wide = torch.randn(512, 3 * 256)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fused.layer_norm(wide[:, 256:512], (256,))
    allocated = sum(event.self_cpu_memory_usage for event in profile.key_averages() if event.self_cpu_memory_usage > 0)
    assert allocated == 512 * 256 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_allocated_beyond_outputs_statistics_and_partials(dtype):
    rows, cols = 512, 256
    x = torch.randn(rows, cols, dtype=dtype, requires_grad=True)
    layer = dlkit.nn.LayerNorm(cols, dtype=dtype)
    grad = torch.randn(rows, cols, dtype=dtype)
    inputs = [x, *layer.parameters()]
    torch.use_deterministic_algorithms(False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.autograd.grad(layer(x), inputs, grad)
    allocated = sum(event.self_cpu_memory_usage for event in profile.key_averages() if event.self_cpu_memory_usage > 0)
    element = dtype.itemsize
    outputs, statistics = (2 * rows * cols + 2 * cols) * element, 2 * rows * 4
    partials = 64 * 2 * cols * 4
    assert allocated <= outputs + statistics + partials


def test_zero_width_rows_and_scalars():
    for function in ("layer_norm", "rms_norm"):
        for shape in ((3, 0), (0, 0), (0, 4), (1, 1), (1,)):
            x = torch.randn(shape, requires_grad=True)
            ours, theirs = (getattr(module, function)(x, shape[-1:]) for module in (fused, native))
            assert ours.shape == theirs.shape and torch.allclose(ours, theirs)
            assert torch.autograd.grad(ours.sum(), x)[0].shape == shape
    weight, bias = torch.ones(0, requires_grad=True), torch.ones(0, requires_grad=True)
    fused.layer_norm(torch.randn(3, 0), (0,), weight, bias).sum().backward()
    assert weight.grad.shape == bias.grad.shape == (0,)


BAD_CALLS = {
    "wrong normalized_shape": lambda f, x, w: f(x, (5,), None),
    "empty normalized_shape": lambda f, x, w: f(x, (), None),
    "too many dimensions": lambda f, x, w: f(x, (2, 3, 4), None),
    "negative size": lambda f, x, w: f(x, (-1,), None),
    "int for normalized_shape": lambda f, x, w: f(x, 4, None),
    "float in normalized_shape": lambda f, x, w: f(x, (4.0,), None),
    "no input": lambda f, x, w: f(None, (4,), None),
    "no input of a shape too long": lambda f, x, w: f(None, (3, 4), None),
    "list for input": lambda f, x, w: f([1.0], (4,), None),
    "weight of another shape": lambda f, x, w: f(x, (4,), torch.ones(5)),
    "weight and input of other shapes": lambda f, x, w: f(x[0], (3, 4), w),
    "weight of another rank": lambda f, x, w: f(x, (4,), torch.ones(1, 4)),
    "weight on another device": lambda f, x, w: f(x, (4,), torch.ones(4, device="meta")),
    "fp64 weight": lambda f, x, w: f(x, (4,), w.double()),
    "bf16 weight": lambda f, x, w: f(x, (4,), w.bfloat16()),
    "fp32 weight for fp64": lambda f, x, w: f(x.double(), (4,), w),
    "fp16 weight for bf16": lambda f, x, w: f(x.bfloat16(), (4,), w.half()),
    "integer input": lambda f, x, w: f(x.long(), (4,), None),
    "bool input": lambda f, x, w: f(x.bool(), (4,), None),
    "complex input": lambda f, x, w: f(x.to(torch.complex64), (4,), None),
    "fp8 input": lambda f, x, w: f(x.to(torch.float8_e4m3fn), (4,), None),
    "sparse input": lambda f, x, w: f(x.to_sparse(), (4,), None),
    "string for eps": lambda f, x, w: f(x, (4,), None, eps="a"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize("function", ["layer_norm", "rms_norm"])
def test_bad_input_raises_what_torch_raises(function, case):
    x, w = torch.randn(3, 4), torch.ones(4)

    def outcome(module):
        try:
            return BAD_CALLS[case](getattr(module, function), x, w)
        except Exception as error:
            assert str(error).strip()
            return error

    ours, theirs = outcome(fused), outcome(native)
    assert type(ours) is type(theirs), f"ours: {ours!r}, torch's: {theirs!r}"
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.allclose(ours, theirs, rtol=1e-3)


@pytest.mark.parametrize("function", ["add_layer_norm", "add_rms_norm"])
def test_residual_broadcasts_and_promotes_as_addition_does(function):
    plain = getattr(native, function.removeprefix("add_"))
    for x, residual in (
        (make((4, 3, 6), torch.bfloat16), make((4, 3, 6), torch.float32)),
        (make((4, 3, 6), torch.float32), make((3, 6), torch.float32)),
        (make((1, 6), torch.float32), make((5, 6), torch.float64)),
    ):
        x, residual = x.requires_grad_(), residual.requires_grad_()
        y, total = getattr(fused, function)(x, residual, (6,))
        assert total.dtype == (x + residual).dtype and torch.equal(total, x + residual)
        expected = plain(x + residual, (6,))
        assert y.dtype == expected.dtype and torch.allclose(y, expected, atol=1e-5)
        ours, theirs = (torch.autograd.grad((t**2).sum(), (x, residual)) for t in (y, expected))
        assert all(a.dtype == b.dtype and torch.allclose(a, b, atol=1e-2) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("function", ["add_layer_norm", "add_rms_norm", "dropout_add_layer_norm"])
def test_a_residual_without_dimensions_counts_for_less(function):
    for dtype, wider in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        x, residual = make((4, 6), dtype), make((), wider).requires_grad_()
        options = {"p": 0.0, "prenorm": True} if "dropout" in function else {}
        y, total = getattr(fused, function)(x, residual, (6,), torch.ones(6, dtype=dtype), **options)
        assert y.dtype == total.dtype == dtype
        assert torch.equal(total, x + residual)
        (grad,) = torch.autograd.grad(total.sum(), residual)
        assert grad.dtype == wider and grad == 24


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_opcheck(name, device):
    x, weight, bias = leaves(torch.float32, device)
    residual = make(x.shape, torch.float32, device).requires_grad_()
    arguments = [x, *([residual] if name.startswith("add") else []), (6,), weight, *([] if "rms" in name else [bias])]
    torch.library.opcheck(getattr(torch.ops.dlkit, name).default, arguments)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_opcheck_of_the_kernel_ops(rms, residual):
    x, weight, bias = (t.detach() for t in leaves(torch.float32))
    other = make(x.shape, torch.float32) if residual else None
    forward, backward = torch.ops.dlkit.layer_norm_forward.default, torch.ops.dlkit.layer_norm_backward.default
    torch.library.opcheck(forward, (x, other, 1, weight, bias, 1e-5, rms, True))
    _, _, mean, rstd = forward(x, None, 1, weight, bias, 1e-5, rms, True)
    torch.library.opcheck(backward, (x, other, x, mean, rstd, weight, bias, 1, [True, True, not rms]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_without_graph_breaks(name, dynamic, device):
    torch._dynamo.reset()
    function = FUNCTIONS[name][0]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5, 8):
        inputs = [make(shape, torch.float32, device).requires_grad_() for shape in ((rows, 4, 6), (6,), (6,))]
        inputs = inputs[:2] if "rms" in name else inputs
        padded = [*inputs, None][:3]
        results = []
        for run in (function, compiled):
            outputs = run(*padded)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = sum((t * torch.arange(t.numel(), device=device).view_as(t)).sum() for t in outputs)
            results.append((*outputs, *torch.autograd.grad(loss, inputs)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_inductor_runs_a_block_that_uses_it():
    torch._dynamo.reset()
    block = torch.nn.Sequential(torch.nn.Linear(16, 16), dlkit.nn.LayerNorm(16), torch.nn.GELU(), dlkit.nn.RMSNorm(16))
    compiled = torch.compile(block, fullgraph=True)
    x = torch.randn(5, 16)
    results = []
    for run in (block, compiled):
        block.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in block.parameters())])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


def test_exports_with_a_dynamic_batch():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.add = dlkit.nn.LayerNorm(6), dlkit.nn.AddRMSNorm(6)

        def forward(self, x):
            return self.add(self.norm(x), x)

    block = Block()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(block, (torch.randn(4, 6),), dynamic_shapes={"x": {0: batch}})
    x = torch.randn(9, 6)
    for exported in (program, program.run_decompositions()):
        torch.testing.assert_close(exported.module()(x), block(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_autocast_behaves_as_in_torch(device, dtype):
    x, weight = make((3, 4), dtype, device), make((4,), torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        for function in ("layer_norm", "rms_norm"):
            ours, theirs = (getattr(module, function)(x, (4,), weight) for module in (fused, native))
            assert ours.dtype == theirs.dtype and torch.allclose(ours, theirs, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm"])
def test_autocast_on_a_gpu_gives_torchs_dtypes(name, dtype):
    """The casts of autocast depend on torch's version. Fake tensors need no GPU."""
    enabled, to = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode():
            x, weight = torch.empty(3, 4, device="cuda", dtype=dtype), torch.empty(4, device="cuda")
            where = 2 if name == "group_norm" else (4,)
            expected = getattr(native, name)(x, where, weight)
            assert getattr(fused, name)(x, where, weight).dtype == expected.dtype
            if name != "group_norm":
                for prefix, options in (("add_", {}), ("dropout_add_", {"prenorm": True})):
                    y, total = getattr(fused, prefix + name)(x, x, where, weight=weight, **options)
                    assert (y.dtype, total.dtype) == (expected.dtype, dtype)
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", to)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_function_transforms(name):
    ours, theirs = FUNCTIONS[name]
    x, weight, bias = (t.detach() for t in leaves())
    for transform in (
        lambda f: torch.func.grad(lambda a: f(a, weight, bias).pow(3).sum())(x),
        lambda f: torch.func.vmap(lambda a: f(a, weight, bias))(x),
        lambda f: torch.func.vmap(torch.func.grad(lambda a: f(a, weight, bias).pow(3).sum()))(x),
        lambda f: torch.func.jvp(lambda a: f(a, weight, bias), (x,), (x * 2,))[1],
        lambda f: torch.func.hessian(lambda a: f(a, weight, bias).pow(3).sum())(x[0, 0]),
    ):
        assert torch.allclose(transform(ours), transform(theirs))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x.sin())
        tangents = [torch.autograd.forward_ad.unpack_dual(f(dual, weight, bias)).tangent for f in (ours, theirs)]
    assert torch.allclose(*tangents)


def test_inference_mode_and_no_grad():
    x = torch.randn(4, 8)
    layer = dlkit.nn.LayerNorm(8)
    expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    with torch.no_grad():
        y = layer(x)
    assert torch.equal(y, expected) and not y.requires_grad


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_modules_are_torchs_own(kind):
    ours, theirs = getattr(dlkit.nn, kind)(12), getattr(torch.nn, kind)(12)
    assert isinstance(ours, getattr(torch.nn, kind)) and repr(ours) == f"dlkit.{theirs!r}"
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 12)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_add_modules(kind):
    module = getattr(dlkit.nn, f"Add{kind}")(12)
    torch.nn.init.normal_(module.weight)
    plain = getattr(torch.nn, kind)(12)
    plain.load_state_dict(module.state_dict())
    x, residual = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    y, total = module(x, residual)
    assert torch.equal(total, x + residual) and torch.allclose(y, plain(total), atol=1e-6)


def test_activation_checkpointing():
    layer = dlkit.nn.LayerNorm(8)
    x = torch.randn(4, 8, requires_grad=True)
    plain = torch.autograd.grad(layer(x).sin().sum(), x)[0]
    again = torch.utils.checkpoint.checkpoint(lambda t: layer(t).sin(), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], plain)


def test_changed_input_is_noticed():
    x = torch.randn(4, 8, requires_grad=True)
    y = x * 1
    z = fused.layer_norm(y, (8,))
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize(
    "layer", [dlkit.nn.LayerNorm(8), dlkit.nn.GroupNorm(2, 8)], ids=lambda layer: type(layer).__name__
)
def test_parametrized_weight_is_used(layer):
    x = torch.randn(4, 8)
    plain = layer(x)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Softplus())
    torch.testing.assert_close(layer(x), plain * torch.nn.functional.softplus(torch.ones(())))
