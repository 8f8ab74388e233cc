"""Each backend's op of the optimizers against exact formulas, with torch's error as the yardstick."""

import math

import pytest
import torch
from support.backends import Backend
from support.optimizers import (
    DTYPES,
    SIZES,
    VARIANTS,
    Exact,
    Op,
    Torch,
    compare,
    gradients,
    laid_out,
    name_of,
    starting_params,
    with_codes,
)
from support.reference import exact

from dlkit._optim_row import Row


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


@pytest.mark.parametrize(("dtype", "grad_dtype"), MIXED)
def test_gradients_of_another_dtype(backend, dtype, grad_dtype):
    """They are not rounded to the parameter's dtype first; fp64 on either side is converted."""
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
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_gradients_of_another_dtype_are_not_rounded(backend, state_dtype, layout):
    """Bit for bit the step of fp32 parameters and gradients, except for the parameters' own rounding."""
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(backend, dtype):
    grads = [grad.to(backend.device) for grad in gradients([*SIZES, (40_000,)], dtype, 0)]
    expected = math.sqrt(sum(float((exact(grad) ** 2).sum()) for grad in grads))
    found = backend.op("optim_grad_norm_kernel")(grads)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and found.shape == ()
    assert abs(float(found) - expected) <= 2 * torch.finfo(found.dtype).eps * expected
    assert torch.equal(found, backend.op("optim_grad_norm_kernel")(grads))


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_clip_grads(backend, dtype):
    grads = [grad.to(backend.device) for grad in gradients(SIZES, dtype, 0)]
    norm = backend.op("optim_grad_norm_kernel")(grads)
    for max_norm in (0.3 * float(norm), 2 * float(norm)):
        ours = [grad.clone() for grad in grads]
        backend.op("optim_clip_grads_kernel_")(ours, norm, max_norm)
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
        norm = backend.op("optim_grad_norm_kernel")(grads)
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


@pytest.mark.parametrize("variant", [VARIANTS[1], VARIANTS[3], VARIANTS[7], VARIANTS[11]], ids=name_of)
def test_nan_and_infinity_reach_what_they_reach_in_torch(backend, variant):
    """amsgrad's maximum keeps a NaN too."""
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


def test_options_have_one_order_everywhere():
    assert tuple(torch.ops.dlkit.optim_options()) == Row._fields


# The public ops, whose checks are the same for every backend.
PUBLIC = Backend("public", "cpu", lambda name: getattr(torch.ops.dlkit, name.replace("_kernel", "")).default)


@pytest.mark.parametrize("case", BAD_STEPS)
def test_bad_arguments_of_the_op_change_nothing(case):
    sizes = [(7,), (300,)]
    params = starting_params(torch.float32, sizes)
    op, grads = BAD_STEPS[case](Op(PUBLIC, VARIANTS[0], params), gradients(sizes, torch.float32, 0))
    with pytest.raises((RuntimeError, ValueError), match=r"optim_step_\(\): expected"):
        op.step(grads)
    assert all(torch.equal(a, b) for a, b in zip(op.params, params, strict=True)) and not any(op.steps)


def test_bad_arguments_of_the_norm_and_the_clipping_change_nothing():
    grads, norm = [torch.ones(3)], torch.tensor(2.0)
    with pytest.raises(ValueError, match=r"optim_grad_norm\(\): expected at least one gradient"):
        torch.ops.dlkit.optim_grad_norm([])
    for bad in (torch.ones(3).int(), torch.ones(3).to_sparse()):
        with pytest.raises(RuntimeError, match=r"optim_grad_norm\(\): expected grads\[1\] dense"):
            torch.ops.dlkit.optim_grad_norm([*grads, bad])
        with pytest.raises(RuntimeError, match=r"optim_clip_grads_\(\): expected grads\[1\] dense"):
            torch.ops.dlkit.optim_clip_grads_([*grads, bad], norm, 1.0)
    with pytest.raises(RuntimeError, match=r"optim_clip_grads_\(\): expected grad_norm of one Float or Double"):
        torch.ops.dlkit.optim_clip_grads_(grads, norm.half(), 1.0)
    assert torch.equal(grads[0], torch.ones(3))


def test_a_parameter_of_one_element_at_many_places_raises():
    params = starting_params(torch.float32, [(7,), (3, 5)])
    op = Op(PUBLIC, VARIANTS[0], params)
    op.params[1] = op.params[1][:, :1].expand(3, 5)
    before = [p.clone() for p in op.params]
    with pytest.raises(RuntimeError, match=r"optim_step_\(\): expected params\[1\] without elements that share memory"):
        op.step([torch.ones_like(p) for p in op.params])
    assert all(torch.equal(a, b) for a, b in zip(op.params, before, strict=True)) and not any(op.steps)
    op.params[1] = before[1].clone()
    with pytest.raises(RuntimeError, match=r"optim_step_\(\): expected grads\[0\] without elements that share memory"):
        op.step([torch.ones_like(p[..., :1]).expand(p.shape) for p in op.params], write_grads=True)
    assert all(torch.equal(a, b) for a, b in zip(op.params, before, strict=True)) and not any(op.steps)
    op.params[1] = op.params[1][:, :1].expand(3, 1)  # of one column, whose elements share no memory
    op.states = {key: [first, rest[:, :1].clone()] for key, (first, rest) in op.states.items()}
    op.step([torch.ones_like(p) for p in op.params])
