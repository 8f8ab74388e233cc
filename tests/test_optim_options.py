"""Options of the optimizers' classes beyond torch's: clipping, scaling, masters, types of states, averages."""

import copy
import math

import pytest
import torch
from support.optimizers import (
    CLASSES,
    VARIANTS,
    assert_agree,
    join,
    name_of,
    pair,
    params_like,
    params_of,
    set_gradients,
)

import dlkit
from dlkit.optim import _int8


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
    # RMSprop's momentum adds up terms of about 20: torch's own error against float64 is 2.7e-6.
    assert_agree(ours, theirs, atol=6e-6 if variant[0] == "RMSprop" else 1e-6)


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
    """Squares of fp32 gradients are added up in fp32, as torch does; torch takes the root in fp32 too."""
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
    """16-bit parameters with masters follow fp32 parameters that get the same 16-bit gradients."""
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
