"""Loading and saving of the optimizers: between groups, versions, dlkit and torch."""

import copy

import pytest
import torch
from support.optimizers import CLASSES, parameter, same, step
from torch import nn

import dlkit

pytestmark = pytest.mark.sanitize


@pytest.mark.parametrize("of", ["torch", "consolidated"])
def test_options_of_groups_outlive_a_state_dict_without_them(of):
    model = nn.Linear(64, 64).bfloat16()
    options = {"master_weights": True, "ema_decay": 0.999}
    ours = dlkit.optim.AdamW(dlkit.optim.param_groups(model, 0.01, **options))
    step(ours, *(torch.ones_like(param) for param in model.parameters()))
    saved = ours.state_dict(consolidate=True)
    if of == "torch":
        saved = torch.optim.AdamW(dlkit.optim.param_groups(model, 0.01)).state_dict()
    ours.load_state_dict(copy.deepcopy(saved))
    for group in ours.param_groups:
        assert {key: group.get(key) for key in options} == options


def test_state_dtype_may_change_between_steps():
    param = parameter(5000)
    ours = dlkit.optim.AdamW([param], lr=1e-3)
    for given, dtype in (
        (torch.bfloat16, torch.bfloat16),
        ("int8", torch.uint8),
        (None, torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.float32, torch.float32),
    ):
        ours.param_groups[0]["state_dtype"] = given
        step(ours, torch.randn(5000))
        state = ours.state[param]
        assert {state.get(f"{key}_codes", state.get(key)).dtype for key in ("exp_avg", "exp_avg_sq")} == {dtype}
    ours.param_groups[0]["ema_decay"] = 1.5
    with pytest.raises(ValueError, match="ema_decay between 0 and 1"):
        step(ours, torch.randn(5000))


def test_the_seed_is_the_number_of_the_step():
    params = [nn.Parameter(torch.ones(64, dtype=torch.bfloat16)) for _ in range(2)]
    ours = dlkit.optim.SGD(params, lr=1e-3, momentum=0.9, stochastic_rounding=True)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for i in range(6):
        step(ours, torch.ones(64).bfloat16(), torch.ones(64).bfloat16() if i > 2 else None)
    assert ours.param_groups[0]["rounding_steps"] == 6 and torch.equal(before, torch.get_rng_state())


def test_hooks_after_loading_have_the_last_word():
    for library in (torch.optim, dlkit.optim):
        param = nn.Parameter(torch.ones(2))
        optimizer = library.AdamW([param])
        step(optimizer, torch.ones(2))
        seen = []

        def hook(opt, param=param, seen=seen):
            seen.append(opt.state[param]["exp_avg"].clone())
            opt.state[param].update(exp_avg=torch.zeros(2))

        optimizer.register_load_state_dict_post_hook(hook)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        torch.testing.assert_close(seen[0], torch.full((2,), 0.1))
        assert not optimizer.state[param]["exp_avg"].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "SGD"])
def test_torchs_optimizer_takes_8_bit_states_for_no_numbers(name):
    arguments = {"momentum": 0.9} if name != "AdamW" else {}
    param = parameter(64, 80)
    ours = getattr(dlkit.optim, name)([param], state_dtype="int8", **arguments)
    step(ours, torch.randn(64, 80))
    theirs = getattr(torch.optim, name)([nn.Parameter(param.detach().clone())], **arguments)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    with pytest.raises((KeyError, RuntimeError)):
        step(theirs, torch.randn(64, 80))
    following = getattr(dlkit.optim, name)([nn.Parameter(param.detach().clone())], state_dtype="int8", **arguments)
    following.load_state_dict(copy.deepcopy(ours.state_dict()))
    grad = torch.randn(64, 80)
    step(ours, grad)
    step(following, grad)
    assert torch.equal(param, following.param_groups[0]["params"][0])


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_a_run_leaves_dlkit_and_comes_back(name, state_dtype, tmp_path):
    torch.manual_seed(0)
    arguments = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    param = parameter(64, 80, dtype=torch.bfloat16)
    options = {"master_weights": True, "state_dtype": state_dtype}
    ours = getattr(dlkit.optim, name)([param], lr=1e-3, **arguments, **options)
    for _ in range(3):
        step(ours, torch.randn(64, 80).bfloat16())
    torch.save(ours.state_dict(consolidate=True), tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    assert not {"master_weights", "state_dtype"} & saved["param_groups"][0].keys()
    wide = nn.Parameter(next(ours.master_parameters()))
    theirs = getattr(torch.optim, name)([wide], lr=1e-3, **arguments)
    theirs.load_state_dict(copy.deepcopy(saved))
    back = nn.Parameter(wide.detach().bfloat16())
    following = getattr(dlkit.optim, name)([back], lr=1e-3, **arguments, master_weights=True)
    following.load_state_dict(copy.deepcopy(saved))
    assert torch.equal(next(following.master_parameters()), wide)
    for _ in range(2):
        grad = torch.randn(64, 80).bfloat16()
        step(theirs, grad.float())
        step(following, grad)
    torch.testing.assert_close(next(following.master_parameters()), wide.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32, "int8"], ids=str)
def test_tools_for_checkpoints_take_what_is_in_groups(state_dtype):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    model = nn.Linear(80, 64).bfloat16()
    ours = dlkit.optim.AdamW(
        model.parameters(), state_dtype=state_dtype, master_weights=True, ema_decay=0.5, max_norm=1.0
    )
    model(torch.ones(2, 80).bfloat16()).sum().backward()
    ours.step()
    found = get_optimizer_state_dict(model, ours, options=StateDictOptions(cpu_offload=True))
    assert found["param_groups"][0]["state_dtype"] == str(state_dtype).removeprefix("torch.")
    assert found["state"]["weight"]["remainder"].dtype == torch.bfloat16


def test_a_state_that_is_not_in_use_keeps_its_dtype():
    param = parameter(50, dtype=torch.bfloat16)
    ours = dlkit.optim.AdamW([param], master_weights=True, amsgrad=True)
    step(ours, torch.randn(50).bfloat16())
    ours.param_groups[0]["amsgrad"] = False
    before = {key: value.clone() for key, value in ours.state[param].items()}
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert list(ours.state[param]) == list(before)
    for key, value in before.items():
        assert same(ours.state[param][key], value), key


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_is_cast_and_its_states_are_left(name):
    """torch's SGD and RMSprop then go on, as does dlkit; a momentum buffer does not count as new."""
    arguments = {"momentum": 0.5, "dampening": 0.5} if name == "SGD" else {}
    params = [parameter(50), parameter(50)]
    params[1].data = params[0].data.double()
    runs = [getattr(dlkit.optim, name)([param], lr=0.01, **arguments) for param in params]
    for i in range(4):
        if i == 2:
            params[0].grad = None
            params[0].data = params[0].data.double()
        grad = torch.randn(50)
        for param, run in zip(params, runs, strict=True):
            step(run, grad.to(param.dtype))
    torch.testing.assert_close(*params, rtol=1e-5, atol=1e-6)


def test_a_state_that_was_taken_out_begins_anew():
    param = parameter(50, dtype=torch.bfloat16)
    ours = dlkit.optim.SGD([param], lr=1e-3, master_weights=True)
    step(ours, torch.randn(50).bfloat16())
    del ours.state[param]
    with torch.no_grad():
        param.fill_(1.0)
    step(ours, torch.ones(50).bfloat16())
    torch.testing.assert_close(next(ours.master_parameters()), torch.full((50,), 1 - 1e-3), rtol=1e-6, atol=0)
