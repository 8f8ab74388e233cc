"""Averages of the weights, as people use them: swapped, shared, saved, warmed up."""

import copy
import pickle

import pytest
import torch
from support.optimizers import SIXTEEN_BITS, parameter, step
from torch import nn

import dlkit

pytestmark = pytest.mark.sanitize


def test_the_average_moves_without_a_gradient():
    for arguments in ({"lr": 1.0}, {"lr": 1.0, "momentum": 0.5}):
        frozen, active = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
        ours = dlkit.optim.SGD([frozen, active], ema_decay=0.9, **arguments)
        averages = [torch.zeros(3), torch.zeros(2)]
        for i in range(60):
            grads = (-torch.ones(3) if i < 20 else None, torch.randn(2) if i % 3 else None)
            step(ours, *grads)
            for average, param in zip(averages, (frozen, active), strict=True):
                average.lerp_(param.detach(), 0.1)
        for found, expected in zip(ours.ema_parameters(), averages, strict=True):
            torch.testing.assert_close(found, expected)


@SIXTEEN_BITS
def test_the_average_of_idle_masters_is_of_the_masters(dtype):
    param = parameter(300, dtype=dtype)
    ours = dlkit.optim.SGD([param], lr=1e-3, ema_decay=0.5, master_weights=True)
    step(ours, torch.randn(300).to(dtype))
    expected = next(ours.ema_parameters()).clone()
    step(ours, None)
    torch.testing.assert_close(next(ours.ema_parameters()), expected.lerp(next(ours.master_parameters()), 0.5))


def averaged(model, **arguments):
    ours = dlkit.optim.AdamW(model.parameters(), lr=0.1, ema_decay=0.9, **arguments)
    for _ in range(3):
        ours.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        ours.step()
    return ours


def test_swapped_averages_are_a_state_that_everything_knows():
    model = nn.Linear(4, 1)
    ours = averaged(model)
    raw = model.weight.detach().clone()
    saved = copy.deepcopy(ours.state_dict())
    with ours.ema():
        assert not torch.equal(raw, model.weight)
        for refused in (ours.step, ours.state_dict, lambda: ours.load_state_dict(saved), ours.ema().__enter__):
            with pytest.raises(RuntimeError, match="averaged weights are swapped in"):
                refused()
        copies = [copy.deepcopy((model, ours)), pickle.loads(pickle.dumps((model, ours)))]
    assert torch.equal(raw, model.weight)
    for other, optimizer in copies:
        assert not torch.equal(raw, other.weight)
        with pytest.raises(RuntimeError, match="swapped in"):
            optimizer.step()
        optimizer.swap_ema()
        assert torch.equal(raw, other.weight)
        optimizer.step()
    with pytest.raises(ZeroDivisionError), ours.ema():
        raise ZeroDivisionError
    assert torch.equal(raw, model.weight)


@pytest.mark.parametrize("how", ["in place", "through data"])
def test_weights_that_are_written_while_averages_are_swapped_in_are_not_lost(how):
    model = nn.Linear(4, 1)
    ours = averaged(model)
    raw = model.weight.detach().clone()
    ours.swap_ema()
    with torch.no_grad():
        (model.weight if how == "in place" else model.weight.data).fill_(2.0)
    with pytest.raises(RuntimeError, match="written while averaged weights were swapped in; call swap_ema"):
        ours.swap_ema()
    ours.swap_ema(discard=True)
    assert torch.equal(raw, model.weight)
    ours.swap_ema()
    model.load_state_dict({"weight": torch.full((1, 4), 2.0), "bias": torch.zeros(1)})
    ours.reset_ema()
    assert (model.weight == 2).all() and (next(ours.ema_parameters()) == 2).all()
    ours.step()
    raw = model.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), ours.ema(), torch.no_grad():
        model.weight.fill_(3.0)
        raise ZeroDivisionError
    assert torch.equal(raw, model.weight)


def test_averages_of_parameters_that_share_memory_are_swapped():
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))]
    ours = dlkit.optim.SGD(params, lr=0.1, ema_decay=0.5)
    step(ours, torch.ones(3), torch.ones(3))
    params[1].data = params[0].data
    before = params[0].detach().clone()
    with ours.ema():
        pass
    assert torch.equal(params[0], before)


def test_a_swap_that_cannot_be_done_changes_nothing():
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    ours = dlkit.optim.SGD(params, lr=0.1, ema_decay=0.5)
    step(ours, torch.ones(3), torch.ones(3))
    before = [param.detach().clone() for param in params]
    ours.state[params[1]]["ema"] = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"an average of shape \[3\] as its parameter, got \[1\]"):
        ours.swap_ema()
    assert all(map(torch.equal, params, before)) and ours._shared.swapped is None


def test_averages_of_a_model_whose_state_dict_has_other_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4)), nn.Linear(4, 1))
    ours = averaged(model)
    found, raw = ours.ema_state_dict(model), model.state_dict()
    assert found.keys() == raw.keys() and not any(torch.equal(found[name], raw[name]) for name in raw)
    model.state_dict = lambda **_: {}
    with pytest.raises(RuntimeError, match="does not hold its parameter"):
        ours.ema_state_dict(model)


def test_a_consolidated_state_keeps_a_warmed_up_average():
    param = nn.Parameter(torch.zeros(1))
    ours = dlkit.optim.SGD([param], lr=1.0, ema_decay=0.999, ema_warmup=True)
    for _ in range(200):
        step(ours, -torch.ones(1))
    before = float(next(ours.ema_parameters()))
    ours.load_state_dict(copy.deepcopy(ours.state_dict(consolidate=True)))
    step(ours, -torch.ones(1))
    assert abs(float(next(ours.ema_parameters())) - before) < 0.1 * (float(param) - before)


def test_averages_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    groups = dlkit.optim.param_groups(model, weight_decay=0.1)
    ours = dlkit.optim.AdamW(groups, lr=0.1, ema_decay=0.5)
    for _ in range(3):
        ours.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        ours.step()
    found = ours.ema_state_dict(model)
    assert found.keys() == model.state_dict().keys()
    assert torch.equal(found["1.running_mean"], model[1].running_mean) and found["1.num_batches_tracked"] == 3
    with ours.ema():
        for name, param in model.named_parameters():
            assert torch.equal(param, found[name]), name
    for (name, param), average in zip(model.named_parameters(), ours.ema_parameters(model), strict=True):
        assert average.shape == param.shape and torch.equal(average, found[name])
    copy.deepcopy(model).load_state_dict(found)


def test_warm_up_of_the_average():
    param = nn.Parameter(torch.zeros(5))
    ours = dlkit.optim.SGD([param], lr=1.0, ema_decay=0.6, ema_warmup=True)
    expected = torch.zeros(5)
    for n in range(30):
        step(ours, torch.randn(5))
        expected.lerp_(param.detach(), 1 - min(0.6, (1 + n) / (10 + n)))
        if n == 10:
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    torch.testing.assert_close(next(ours.ema_parameters()), expected)
    ours.reset_ema()
    assert torch.equal(next(ours.ema_parameters()), param) and ours.param_groups[0]["ema_steps"] == 0
    with pytest.raises(ValueError, match="ema_decay with ema_warmup"):
        dlkit.optim.SGD([param], ema_warmup=True)


def test_an_average_goes_on_in_a_new_group():
    param, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    ours = dlkit.optim.SGD([param], lr=1.0, ema_decay=0.9)
    expected = torch.zeros(3)
    for i in range(4):
        if i == 2:
            ours.add_param_group({"params": [other]})
            ours.param_groups[1]["params"].append(ours.param_groups[0]["params"].pop())
        step(ours, *([None] if i > 1 else []), -torch.ones(3))
        expected.lerp_(param.detach(), 0.1)
    torch.testing.assert_close(ours.state[param]["ema"], expected)


def test_an_average_that_keeps_nothing_is_an_average():
    param = nn.Parameter(torch.zeros(3))
    frozen = nn.Parameter(torch.zeros(3, dtype=torch.float8_e4m3fn), requires_grad=False)
    ours = dlkit.optim.SGD([param, frozen], lr=1.0, ema_decay=0.0)
    param.grad = torch.ones(3)
    ours.step()
    assert torch.equal(next(ours.ema_parameters()), param)
    with ours.ema(), pytest.raises(RuntimeError, match="swapped in"):
        ours.step()
    elsewhere = nn.Parameter(torch.zeros(3, device="meta"))
    ours = dlkit.optim.SGD([elsewhere], lr=1.0, ema_decay=0.0)
    with pytest.raises(RuntimeError, match="ema_decay needs dlkit's kernels"):
        step(ours, torch.ones(3, device="meta"))


def test_a_state_made_before_weights_are_loaded_does_not_hold_old_weights():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = nn.Linear(4, 2)
    ours = dlkit.optim.AdamW(model.parameters(), lr=0.1, ema_decay=0.9)
    get_optimizer_state_dict(model, ours)  # makes states by a step with learning rate 0
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(7.0)
    expected = [param.detach().clone() for param in model.parameters()]
    for _ in range(2):
        step(ours, *(torch.randn_like(param) for param in model.parameters()))
        for average, param in zip(expected, model.parameters(), strict=True):
            average.lerp_(param.detach(), 0.1)
    for found, average in zip(ours.ema_parameters(), expected, strict=True):
        torch.testing.assert_close(found, average)
