"""The optimizers as people use them: outdated plans, scalers, kinds of gradients and parameters, subclasses.

Each test checks for the right value: torch's in the same situation, or that of fp32 masters.
"""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from support.optimizers import CLASSES, parameter, same, step
from torch import nn

import dlkit

pytestmark = pytest.mark.sanitize


def both(make, steps, change, sizes=((5,), (3, 4), (700,)), rtol=1e-5):
    """Runs dlkit's and torch's optimizer through the same changes; parameters are compared after each step."""
    runs = []
    for library in (torch.optim, dlkit.optim):
        torch.manual_seed(3)
        params = [parameter(*size) for size in sizes]
        optimizer = make(library, params)
        generator = torch.Generator().manual_seed(5)
        found = []
        for i in range(steps):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            optimizer.step()
            found.append([param.detach().clone() for param in params])
            change(i, optimizer, params)
        runs.append(found)
    for a, b in zip(*runs, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=rtol, atol=5e-7)


def two_groups(library, params, **arguments):
    return library.SGD([{"params": params[:2], "lr": 1.0}, {"params": params[2:], "lr": 0.01}], **arguments)


MOVES = {
    "to the next group": lambda g, h, p: h["params"].insert(0, g["params"].pop()),
    "to the end of the next": lambda g, h, p: h["params"].append(g["params"].pop()),
    "back": lambda g, h, p: g["params"].append(h["params"].pop(0)),
    "swapped": lambda g, h, p: (g["params"].append(h["params"].pop()), h["params"].append(g["params"].pop(0))),
    "taken out": lambda g, h, p: g["params"].pop(),
    "groups in another order": lambda g, h, p: g.update(params=h["params"]) or h.update(params=p[:2]),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("arguments", [{}, {"momentum": 0.9}], ids=str)
def test_parameters_that_move_between_groups(move, arguments):
    def change(i, optimizer, params):
        if i == 1:
            MOVES[move](*optimizer.param_groups, params)

    both(lambda library, params: two_groups(library, params, **arguments), 4, change)


@pytest.mark.slow
def test_nothing_is_kept_alive():
    param = parameter(9)
    ours = dlkit.optim.AdamW([param])
    step(ours, torch.ones(9))
    step(ours, torch.ones(9))
    old = weakref.ref(ours.state[param]["exp_avg"])
    ours.state[param] = {key: value.clone() for key, value in ours.state[param].items()}
    gc.collect()
    assert old() is None
    gone = weakref.ref(param)
    ours.param_groups[0]["params"] = [parameter(3)]
    ours.state.clear()
    del param
    gc.collect()
    assert gone() is None
    step(ours, torch.ones(3))


@pytest.mark.parametrize("kind", [tuple, nn.ParameterList])
def test_parameters_that_are_not_in_a_list(kind):
    first, second = parameter(1000), parameter(1000)
    ours = dlkit.optim.SGD([first], lr=0.1)
    for param in (first, second):
        ours.param_groups[0]["params"] = kind((param,))
        before = param.detach().clone()
        step(ours, torch.ones(1000))
        torch.testing.assert_close(param.detach(), before - 0.1)


def test_states_that_are_exchanged():
    """The same objects in the same order, under other keys."""
    runs = []
    for library in (torch.optim, dlkit.optim):
        params = [nn.Parameter(torch.full((3,), float(i + 1))) for i in range(2)]
        optimizer = library.SGD(params, lr=0.1, momentum=0.9)
        for i in range(3):
            if i == 2:
                first, second = params
                states = {second: optimizer.state[first], first: optimizer.state[second]}
                optimizer.state.clear()
                optimizer.state.update(states)
            step(optimizer, torch.ones(3), torch.full((3,), 10.0))
        runs.append(params)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


def test_parameters_are_converted_by_swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        runs = []
        for library in (torch.optim, dlkit.optim):
            torch.manual_seed(0)
            model = nn.Linear(4, 3)
            optimizer = library.SGD(model.parameters(), lr=0.1)
            for i in range(4):
                if i == 2:
                    model.double()
                optimizer.zero_grad()
                model(torch.ones(2, 4, dtype=model.weight.dtype)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            runs.append(model.weight.detach())
        assert runs[1].dtype == torch.float64
        torch.testing.assert_close(*runs)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_storage_that_is_shared_later():
    """Tied by .data after a step; the second update sees the first."""

    def change(i, optimizer, params):
        if i == 1:
            params[1].data = params[2].data[:12].view(3, 4)

    both(lambda library, params: library.SGD(params, lr=0.5, foreach=False), 4, change)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_parameters_that_overlap_are_stepped_one_after_the_other(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(20):
            runs = []
            for library in (torch.optim, dlkit.optim):
                torch.manual_seed(1)
                whole = torch.zeros(1 << 17)
                params = [nn.Parameter(torch.empty(0)) for _ in range(4)]
                parts = (whole, whole[100:5000], whole[: 1 << 16], whole)
                for param, part in zip(params, parts, strict=True):
                    param.data = part
                optimizer = library.SGD(params, lr=1.0, foreach=False)
                step(optimizer, *(torch.randn(param.shape) for param in params))
                runs.append(whole)
            torch.testing.assert_close(*runs)
    finally:
        torch.set_num_threads(before)


def test_layers_without_overlap():
    from dlkit.optim._tensors import layers_without_overlap

    whole = torch.zeros(100)
    parts = [whole[:10], whole[10:20], whole[5:15], whole[14:30], torch.zeros(3), whole[:0], whole[::2]]
    assert layers_without_overlap(parts) == [0, 0, 1, 2, 0, 0, 3]


def test_states_on_another_device_are_an_error_that_names_the_remedy():
    param = parameter(5)
    ours = dlkit.optim.AdamW([param])
    step(ours, torch.ones(5))
    ours.offload_states()  # nothing to do on the CPU
    step(ours, torch.ones(5))
    ours.onload_states()
    state = ours.state[param]
    state["exp_avg"] = state["exp_avg"].to("meta")
    with pytest.raises(RuntimeError, match=r"exp_avg of parameter 0 of group 0 on cpu .* call onload_states"):
        step(ours, torch.ones(5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("state_dtype", [None, "int8"])
def test_offloaded_states(state_dtype):
    runs = []
    for offload in (False, True):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(100, 100, device="cuda"))
        ours = dlkit.optim.AdamW([param], state_dtype=state_dtype, ema_decay=0.5)
        for i in range(4):
            if offload and i == 2:
                ours.offload_states()
                assert all(value.is_cpu for value in ours.state[param].values())
                assert ours.state[param]["ema"].is_pinned()
                with pytest.raises(RuntimeError, match="onload_states"):
                    step(ours, torch.ones(100, 100, device="cuda"))
                ours.onload_states()
            step(ours, torch.randn(100, 100, device="cuda"))
        runs.append(param.detach())
    assert torch.equal(*runs)


@pytest.mark.parametrize("key", ["max_norm", "error_if_nonfinite", "process_group"])
def test_what_is_of_the_whole_optimizer_is_refused_in_a_group(key):
    with pytest.raises(ValueError, match=f"{key} is of the whole optimizer"):
        dlkit.optim.SGD([{"params": [parameter(4)], key: 1.0}], lr=1.0)


@pytest.mark.parametrize("how", ["expanded", "conjugate", "shared"])
def test_clipping_in_place_of_gradients_that_are_not_plain(how):
    """Refused before anything changes, or written where the user sees it, once."""
    dtype = torch.complex64 if how == "conjugate" else torch.float32
    params = [nn.Parameter(torch.ones(4, dtype=dtype)), nn.Parameter(torch.ones(4, dtype=dtype))]
    plain = torch.randn(4, dtype=dtype)
    grads = {
        "expanded": [torch.ones(1).expand(4), torch.ones(4)],
        "conjugate": [plain.clone().conj(), plain.clone()],
        "shared": [plain] * 2,
    }[how]
    wanted = [grad.clone() for grad in grads]
    ours = dlkit.optim.SGD(params, lr=1.0, max_norm=0.5, clip_gradients_in_place=True)
    if how == "expanded":
        with pytest.raises(RuntimeError, match="elements share memory"):
            step(ours, *grads)
        assert all((param == 1).all() for param in params) and not ours.state
        return
    step(ours, *grads)
    norm = torch.cat(wanted).abs().norm()
    torch.testing.assert_close(ours.grad_norm, norm)
    for param, grad, given in zip(params, wanted, grads, strict=True):
        torch.testing.assert_close(given.resolve_conj(), grad.resolve_conj() * 0.5 / norm)
        torch.testing.assert_close(param.detach(), 1 - grad.resolve_conj() * 0.5 / norm)


# GradScaler.


@pytest.mark.parametrize("name", CLASSES)
def test_support_for_scaling_is_announced_where_torchs_is(name):
    for arguments in ({}, {"foreach": True}, {"fused": True}):
        if name == "RMSprop" and "fused" in arguments:
            continue
        found = [
            getattr(getattr(library, name)([parameter(3)], **arguments), "_step_supports_amp_scaling", False)
            for library in (torch.optim, dlkit.optim)
        ]
        assert found[0] == found[1]


def test_two_optimizers_on_one_scaler():
    runs = []
    for library in (torch.optim, dlkit.optim):
        torch.manual_seed(0)
        params = [parameter(3), parameter(4)]
        optimizers = [library.AdamW([param], fused=True) for param in params]
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        for i in range(4):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = params[0].square().sum() + (params[1].square().sum() if i % 2 else 0)
            scaler.scale(loss).backward()
            for optimizer in optimizers:  # every second time the other one has no gradient: found_inf is the number 0
                scaler.step(optimizer)
            scaler.update()
        runs.append(params)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("found", [0, 0.0, 1, 2.0, torch.tensor(0.0), torch.tensor([1.0])], ids=str)
def test_found_inf_may_be_a_number(found):
    param = nn.Parameter(torch.ones(3))
    ours = dlkit.optim.SGD([param], lr=0.5)
    ours.grad_scale, ours.found_inf = 2, found
    step(ours, torch.full((3,), 2.0))
    assert (param == (0.5 if not found else 1.0)).all()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_raises_leaves_no_scale_behind(fused):
    param, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    ours = dlkit.optim.SGD([param, other], lr=1.0, max_norm=9.0, error_if_nonfinite=True, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    param.grad, other.grad = torch.full((1,), 3e38), torch.full((1,), 3e38)
    ours.process_group = "lost"  # makes the step raise, whatever the norm is
    with pytest.raises(RuntimeError):
        scaler.step(ours)
    assert not hasattr(ours, "grad_scale") and not hasattr(ours, "found_inf")
    ours.process_group = None
    scaler.update()
    other.grad = None
    param.grad = torch.full((1,), scaler.get_scale() / 2)
    scaler.step(ours)
    assert float(param) == 0.5


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float16),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
    ],
)
def test_gradients_of_another_dtype(name, dtype, grad_dtype):
    """The step is as if parameter, state and gradient had the wider dtype, and the parameter were rounded after it."""
    wider = torch.promote_types(dtype, grad_dtype)
    start, grads = torch.randn(300), [torch.randn(300) for _ in range(3)]
    param = nn.Parameter(start.to(dtype))
    param.grad_dtype = None
    options = {"master_weights": True} if dtype.itemsize == 2 else {}
    ours = getattr(dlkit.optim, name)([param], lr=0.01, max_norm=3.0, clip_gradients_in_place=True, **options)
    wide = nn.Parameter(start.to(dtype).to(wider))
    theirs = getattr(torch.optim, name)([wide], lr=0.01)
    for grad in grads:
        given = grad.to(grad_dtype)
        wide.grad = given.to(wider, copy=True)
        norm = nn.utils.clip_grad_norm_([wide], 3.0)
        param.grad = given
        ours.step()
        theirs.step()
        torch.testing.assert_close(ours.grad_norm.float(), norm.float(), rtol=1e-3, atol=0)
        eps = 4 * max(torch.finfo(grad_dtype).eps, torch.finfo(dtype).eps if grad_dtype.itemsize == 8 else 0)
        torch.testing.assert_close(given.float(), wide.grad.float(), rtol=eps, atol=eps)
        assert given.dtype == grad_dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype.itemsize < 8 else {"rtol": 1e-5, "atol": 1e-8}
    exact = next(ours.master_parameters()).to(wider)
    torch.testing.assert_close(exact, wide.detach(), **tolerance)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_frozen_parameters_of_any_dtype_do_no_harm(dtype):
    frozen = nn.Parameter(torch.zeros(4).to(dtype), requires_grad=False)
    param = nn.Parameter(torch.ones(4))
    ours = dlkit.optim.AdamW([frozen, param], max_norm=1.0)
    for _ in range(2):
        param.grad = torch.ones(4)
        ours.step()
    assert ours._plan is not None and float(ours.grad_norm) == 2.0 and (param < 1).all()


def test_devices_without_kernels_take_torchs_step():
    param = nn.Parameter(torch.ones(2, device="meta"))
    for name in CLASSES:
        ours = getattr(dlkit.optim, name)([param])
        step(ours, torch.ones(2, device="meta"))
    with pytest.raises(RuntimeError, match=r"max_norm needs dlkit's kernels, .* parameter 0 .* on meta"):
        step(dlkit.optim.SGD([param], max_norm=1.0), torch.ones(2, device="meta"))
    param.grad = torch.ones(2, device="meta")
    dlkit.optim.clip_grad_norm_([param], 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_poisons_nothing(device):
    options = [
        {"max_norm": 1.0},
        {"master_weights": True},
        {"stochastic_rounding": True},
        {"state_dtype": "int8"},
        {"state_dtype": torch.bfloat16},
        {"ema_decay": 0.5, "ema_warmup": True},
    ]
    for name in CLASSES:
        for option in options:
            results = []
            for context in (torch.device("cpu"), torch.device(device)):
                torch.manual_seed(0)
                dtype = torch.bfloat16 if "rounding" in str(option) or "master" in str(option) else torch.float32
                params = [parameter(70, 80, dtype=dtype), parameter(5, dtype=dtype)]
                grads = [torch.randn_like(param) for param in params]
                with context:
                    ours = getattr(dlkit.optim, name)(params, **option)
                    for _ in range(2):
                        step(ours, *grads)
                    ours.load_state_dict(copy.deepcopy(ours.state_dict(consolidate=True)))
                    step(ours, *grads)
                assert all(value.is_cpu for state in ours.state.values() for value in state.values())
                results.append(params)
            for a, b in zip(*results, strict=True):
                assert same(a, b), (name, option)


# Compiled, subclassed, grouped.


@pytest.mark.parametrize("name", CLASSES)
def test_compiled_steps_have_no_more_graphs_than_torchs(name):
    from torch._dynamo.testing import CompileCounter
    from torch._dynamo.utils import counters

    found = []
    for library in (torch.optim, dlkit.optim):
        torch._dynamo.reset()
        counters.clear()
        params = [parameter(4), parameter(3)]
        optimizer = getattr(library, name)(params)
        step(optimizer, torch.ones(4), torch.ones(3))
        counter = CompileCounter()
        compiled = torch.compile(optimizer.step, backend=counter)
        for _ in range(2):
            compiled()
        found.append((counter.frame_count, sum(counters["graph_break"].values())))
    assert found[1][0] <= found[0][0] and found[1][1] <= found[0][1]


def test_a_subclasss_step_runs_once():
    calls = []

    class Counting(dlkit.optim.AdamW):
        def step(self, closure=None):
            calls.append(1)
            return super().step(closure)

    for options in ({}, {"max_norm": 1.0}):
        torch._dynamo.reset()
        calls.clear()
        param = parameter(4)
        ours = Counting([param], **options)
        param.grad = torch.ones(4)
        torch.compile(ours.step, backend="eager")()
        assert len(calls) == 1 and float(ours.state[param]["step"]) == 1


def test_param_groups_says_what_it_cannot_take():
    model = nn.Linear(3, 3)
    for wrong in (model.parameters(), [model.weight], [("weight",)], [(0, model.weight)]):
        with pytest.raises(TypeError, match="pairs of a name and a parameter"):
            dlkit.optim.param_groups(wrong, 0.1)
    with pytest.raises(ValueError, match=r"'0\.weight' is lazy; run the model once before"):
        dlkit.optim.param_groups(nn.Sequential(nn.LazyLinear(3)), 0.1)


def test_param_groups_knows_no_weight_decay():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = nn.Parameter(torch.ones(1, 4, 4))
            self.head = nn.Linear(4, 4)

        def no_weight_decay(self):
            return {"pos_embed", "absent"}

    groups = dlkit.optim.param_groups(nn.Sequential(Model()), 0.1)
    assert [[name for name, _ in group["params"]] for group in groups] == [
        ["0.head.weight"],
        ["0.pos_embed", "0.head.bias"],
    ]


def test_a_gradient_of_another_shape_names_its_parameter():
    params = [("first", parameter(4)), ("second", parameter(3))]
    for extras in ({}, {"max_norm": 1.0}, {"ema_decay": 0.5}):
        ours = dlkit.optim.AdamW(params, **extras)
        step(ours, torch.ones(4), torch.ones(3))
        params[1][1].data = torch.ones(2)
        params[1][1].grad = torch.ones(2)
        before = params[0][1].detach().clone()
        with pytest.raises(RuntimeError, match=r"exp_avg of parameter 1 of group 0 \('second'\) to be \[2\]"):
            ours.step()
        assert torch.equal(before, params[0][1])
        params[1][1].grad = None
        params[1][1].data = torch.ones(3)


def test_a_parameter_that_overlaps_itself_is_refused():
    param = nn.Parameter(torch.zeros(3))
    param.data = torch.zeros(1).expand(3)
    for library in (torch.optim, dlkit.optim):
        with pytest.raises(RuntimeError), warnings.catch_warnings():
            step(library.SGD([param], lr=0.1), torch.ones(3))
