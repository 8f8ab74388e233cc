"""The optimizers' classes compared with torch's: results, states, groups, copies, and bad input."""

import copy
import math
import pickle

import pytest
import torch
from support.optimizers import (
    CLASSES,
    VARIANTS,
    Exact,
    Torch,
    assert_agree,
    compare,
    gradients,
    name_of,
    pair,
    params_like,
    params_of,
    set_gradients,
    starting_params,
)

import dlkit
from dlkit.optim._options import OPTIONS


def assert_same_state_form(ours, theirs):
    """Checks that keys, types, dtypes, devices and shapes of two state dicts agree."""
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


def torchs_info(name):
    pytest.importorskip("expecttest", reason="torch's database of optimizers needs expecttest")
    from torch.testing._internal.common_optimizers import optim_db

    return next(info for info in optim_db if info.optim_cls is getattr(torch.optim, name))


@pytest.mark.parametrize("name", CLASSES)
def test_parity_over_torchs_database(name):
    info = torchs_info(name)
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


def step_both(ours, theirs, step, leave=()):
    for optimizer in (ours, theirs):
        set_gradients(params_of(optimizer), step, leave)
        optimizer.step()


@pytest.mark.parametrize("variant", VARIANTS[1::2], ids=name_of)
def test_a_run_goes_on_with_torchs_class_and_back(variant, tmp_path):
    name, arguments = variant
    ours, theirs = pair(variant)
    for step in range(2):
        step_both(ours, theirs, step)
    for kind in ("torch", "dlkit"):
        torch.save(ours.state_dict(), tmp_path / "state")
        loaded = torch.load(tmp_path / "state", weights_only=True)
        library = torch.optim if kind == "torch" else dlkit.optim
        following = getattr(library, name)([p.detach().clone().requires_grad_() for p in params_of(ours)])
        following.load_state_dict(loaded)
        assert following.param_groups[0]["lr"] == arguments.get("lr", following.param_groups[0]["lr"])
        for step in range(2, 4):
            step_both(following, theirs, step)
        assert_agree(following, theirs)
        assert_same_state_form(following.state_dict(), theirs.state_dict())
        ours = following


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("default_dtype", [torch.float32, torch.float64], ids=str)
def test_step_counters_are_torchs(default_dtype, fused):
    torch.set_default_dtype(default_dtype)
    try:
        ours, theirs = pair(("AdamW", {"fused": fused}))
        for step in range(3):
            step_both(ours, theirs, step)
        assert_same_state_form(ours.state_dict(), theirs.state_dict())
        assert_agree(ours, theirs)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("variant", [VARIANTS[1], VARIANTS[6], VARIANTS[11]], ids=name_of)
def test_parameters_without_gradients_have_no_state(variant):
    ours, theirs = pair(variant)
    for step, leave in enumerate([{0, 2}, {1}, (), {0, 1, 2}, ()]):
        step_both(ours, theirs, step, leave)
        assert_agree(ours, theirs)
        assert len(ours.state) == len(theirs.state)


@pytest.mark.parametrize("variant", [VARIANTS[1], VARIANTS[6], VARIANTS[4]], ids=name_of)
def test_groups_added_later_and_hyperparameters_changed(variant):
    ours, theirs = pair(variant)
    for optimizer in (ours, theirs):
        optimizer.add_param_group({"params": params_like(((4, 4), (1000,))), "lr": 0.3, "weight_decay": 0.5})
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in (ours, theirs)]
    for step in range(5):
        step_both(ours, theirs, step)
        for scheduler in schedulers:
            scheduler.step()
        if step == 2:
            for optimizer in (ours, theirs):
                optimizer.param_groups[0]["maximize"] = True
                optimizer.add_param_group({"params": params_like(((9,),))})
    assert_agree(ours, theirs)
    assert ours.param_groups[1]["lr"] == theirs.param_groups[1]["lr"] != 0.3


def test_a_changed_state_or_parameter_is_noticed():
    def replace_state(optimizer):
        state = optimizer.state[params_of(optimizer)[0]]
        state["exp_avg"] = state["exp_avg"] * 2

    def forget_state(optimizer):
        del optimizer.state[params_of(optimizer)[1]]

    def clear_state(optimizer):
        optimizer.state.clear()

    def move_data(optimizer):
        for param in params_of(optimizer):
            param.data = param.data.clone() + 1

    def replace_parameter(optimizer):
        old = optimizer.param_groups[0]["params"][1]
        new = optimizer.param_groups[0]["params"][1] = (old.detach() * 3).requires_grad_()
        optimizer.state[new] = optimizer.state.pop(old)

    def load(optimizer):
        optimizer.load_state_dict(optimizer.state_dict())

    def set_amsgrad(optimizer):
        optimizer.param_groups[0]["amsgrad"] = False

    ours, theirs = pair(VARIANTS[1])
    changes = (replace_state, forget_state, clear_state, move_data, replace_parameter, load, set_amsgrad)
    for step, change in enumerate([*changes, move_data]):
        step_both(ours, theirs, step)
        for optimizer in (ours, theirs):
            change(optimizer)
    step_both(ours, theirs, 9)
    assert_agree(ours, theirs)


def test_moving_to_another_dtype():
    ours, theirs = pair(VARIANTS[0])
    for step in range(2):
        step_both(ours, theirs, step)
        for optimizer in (ours, theirs):
            for param in params_of(optimizer):
                param.grad = None
                param.data = param.data.double()
            optimizer.load_state_dict(optimizer.state_dict())  # casts the state, as torch's users do
    assert_agree(ours, theirs)


def test_one_optimizer_of_many_dtypes():
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float16)
    runs = []
    for library in (dlkit.optim, torch.optim):
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(40, generator=generator).to(dtype).requires_grad_() for dtype in dtypes]
        optimizer = library.AdamW(params, lr=0.1)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(40, generator=generator).to(param.dtype)
            optimizer.step()
        runs.append(params)
    for a, b in zip(*runs, strict=True):  # torch rounds to 16 bits after each of its ops
        tolerance = {"rtol": 0, "atol": 4 * torch.finfo(a.dtype).eps} if a.dtype.itemsize == 2 else {}
        torch.testing.assert_close(a, b, **tolerance)


def test_tensors_for_learning_rate_and_betas():
    arguments = {"lr": torch.tensor(0.01), "betas": (torch.tensor(0.8), torch.tensor(0.95))}
    ours, theirs = pair(("AdamW", arguments))
    for step in range(3):
        step_both(ours, theirs, step)
    assert_agree(ours, theirs)


def test_hooks_and_closures():
    seen = []
    ours, theirs = pair(VARIANTS[0])
    for optimizer in (ours, theirs):
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
        optimizer.register_step_post_hook(lambda *_: seen.append("post"))

        def closure(optimizer=optimizer):
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in params_of(optimizer))
            loss.backward()
            return loss

        with torch.no_grad():
            losses = [optimizer.step(closure) for _ in range(3)]
        assert losses[0] > losses[2]
    assert seen == ["pre", "post"] * 6
    assert_agree(ours, theirs)


def test_autograd_notices_a_changed_parameter():
    (param,) = params = params_like(((4,),))
    optimizer = dlkit.optim.SGD(params, lr=0.1)
    loss = (param * param).sum()
    param.grad = torch.ones(4)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_are_let_go():
    import weakref

    ours, _ = pair(VARIANTS[0])
    set_gradients(params_of(ours), 0)
    grads = [weakref.ref(p.grad) for p in params_of(ours)]
    ours.step()
    ours.zero_grad()
    assert all(grad() is None for grad in grads)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies(how):
    ours = dlkit.optim.AdamW(params_like(), lr=0.1, max_norm=0.5, ema_decay=0.5)
    set_gradients(params_of(ours), 0)
    ours.step()
    other = pickle.loads(pickle.dumps(ours)) if how == "pickle" else copy.deepcopy(ours)
    assert other.max_norm == 0.5
    for optimizer in (ours, other):
        set_gradients(params_of(optimizer), 1)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params_of(ours), params_of(other), strict=True))


def test_differentiable_takes_torchs_path():
    results = []
    for library in (dlkit.optim, torch.optim):
        start = torch.ones(3, requires_grad=True, dtype=torch.float64)
        param = start.clone()
        param.grad = start * 3
        optimizer = library.SGD([torch.ones(1, requires_grad=True)], lr=0.1, differentiable=True)
        optimizer.param_groups[0]["params"] = [param]
        optimizer.step()
        results.append(torch.autograd.grad(param.sum(), start)[0])
    assert torch.equal(*results)


def test_compiled_step():
    for extras in ({}, {"max_norm": 1e9}):
        torch._dynamo.reset()
        ours, theirs = pair(("AdamW", {}), **extras)
        step = torch.compile(ours.step, backend="eager")
        for i in range(2):
            set_gradients(params_of(ours), i)
            step()
            set_gradients(params_of(theirs), i)
            theirs.step()
        assert_agree(ours, theirs)


def test_the_order_of_threads_changes_nothing():
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            ours, _ = pair(VARIANTS[1], sizes=((70_001,), (3,), (257, 129), (20,)), max_norm=0.1)
            for step in range(2):
                set_gradients(params_of(ours), step)
                ours.step()
            results.append([*params_of(ours), ours.grad_norm])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Bad input.


@pytest.mark.parametrize("name", CLASSES)
def test_bad_arguments_raise_what_torch_raises(name):
    info = torchs_info(name)
    for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        if case.error_type is UserWarning:
            continue
        with pytest.raises(case.error_type, match=case.error_regex):
            given = case.optimizer_error_input
            optimizer = getattr(dlkit.optim, name)(given.params, **given.kwargs)
            optimizer.step()
    with pytest.raises(ValueError, match="empty parameter list"):
        getattr(dlkit.optim, name)([])
    with pytest.raises(ValueError, match="non-leaf"):
        getattr(dlkit.optim, name)([torch.ones(2, requires_grad=True) * 2])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_norm": -1.0}, ValueError, "max_norm of at least 0, got -1.0"),
        ({"max_norm": 1.0, "norm_type": 1}, ValueError, "norm_type of 2, got 1"),
        ({"state_dtype": torch.int8}, ValueError, "state_dtype of torch.float32, torch.bfloat16 or 'int8'"),
        ({"ema_decay": 1.5}, ValueError, "ema_decay between 0 and 1, got 1.5"),
        ({"master_weights": True, "stochastic_rounding": True}, ValueError, "got both"),
        ({"max_nrom": 1.0}, TypeError, "unexpected keyword argument 'max_nrom'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_bad_arguments_of_our_own(name, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(dlkit.optim, name)(params_like(), **arguments)


def test_duplicates():
    param, other = params_like(((5,), (6,)))
    with pytest.warns(UserWarning, match="duplicate"):
        ours = dlkit.optim.SGD([param, param], lr=0.1)
    param.grad = torch.ones(5)
    expected = param.detach() - 0.2
    ours.step()
    torch.testing.assert_close(param.detach(), expected)
    with pytest.raises(ValueError, match="more than one parameter group"):
        dlkit.optim.SGD([{"params": [param, other]}, {"params": [other]}])


def test_sparse_gradients():
    weight = torch.nn.Embedding(10, 3, sparse=True).weight
    dense = torch.nn.Parameter(torch.ones(4))
    start = weight.detach().clone()
    for name, message in (("AdamW", "SparseAdam instead"), ("RMSprop", "does not support sparse")):
        optimizer = getattr(dlkit.optim, name)([dense, weight])
        dense.grad = torch.ones(4)
        weight.grad = torch.sparse_coo_tensor([[1, 4]], torch.ones(2, 3), (10, 3))
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert torch.equal(weight, start) and torch.equal(dense, torch.ones(4)) and not optimizer.state
    optimizer = dlkit.optim.SGD([dense, weight], lr=0.5)
    optimizer.step()
    start[[1, 4]] -= 0.5
    assert torch.equal(weight, start) and torch.equal(dense, torch.full((4,), 0.5))
    with pytest.raises(RuntimeError, match="max_norm needs dlkit's kernels, which do not serve a gradient is sparse"):
        dlkit.optim.SGD([dense, weight], lr=0.5, max_norm=1.0).step()


def test_a_step_that_raises_changes_nothing_and_names_the_parameter():
    named = [("first", torch.nn.Parameter(torch.ones(4))), ("second.weight", torch.nn.Parameter(torch.ones(3)))]
    optimizer = dlkit.optim.AdamW([{"params": named[:1]}, {"params": named[1:]}])
    (_, first), (_, second) = named
    first.grad, second.grad = torch.ones(4), torch.ones(3)
    second.data = torch.ones(2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"parameter 0 of group 1 \('second.weight'\) to be Float \[2\]"):
            optimizer.step()
        assert torch.equal(first, torch.ones(4)) and torch.equal(second, torch.ones(2)) and not optimizer.state
    second.grad = None
    optimizer.step()
    assert not torch.equal(first, torch.ones(4)) and optimizer.state.keys() == {first}


def test_loaded_state_of_another_shape():
    ours, _ = pair(VARIANTS[0])
    set_gradients(params_of(ours), 0)
    ours.step()
    saved = ours.state_dict()
    saved["state"][1]["exp_avg"] = torch.zeros(8)
    ours.load_state_dict(saved)
    before = [p.detach().clone() for p in params_of(ours)]
    with pytest.raises(RuntimeError, match=r"exp_avg of parameter 1 of group 0 to be \[7\]"):
        ours.step()
    assert all(torch.equal(a, b) for a, b in zip(params_of(ours), before, strict=True))


def test_a_first_step_that_raises_leaves_the_second_to_be_the_first():
    ours, theirs = pair(VARIANTS[6], max_norm=0.5, error_if_nonfinite=True)
    set_gradients(params_of(ours), 0)
    params_of(ours)[1].grad[3] = math.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        ours.step()
    for step in range(2):
        set_gradients(params_of(theirs), step)
        torch.nn.utils.clip_grad_norm_(params_of(theirs), 0.5)
        theirs.step()
        set_gradients(params_of(ours), step)
        ours.step()
    assert_agree(ours, theirs)


def test_param_groups():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 4))
    model.append(dlkit.nn.LayerNorm((4, 4)))
    model[2].bias.requires_grad_(False)
    groups = dlkit.optim.param_groups(model, weight_decay=0.1, lr=0.5)
    assert [[name for name, _ in group["params"]] for group in groups] == [
        ["0.weight", "2.weight"],
        ["0.bias", "1.weight", "1.bias", "3.weight", "3.bias"],
    ]
    optimizer = dlkit.optim.AdamW(groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert len(dlkit.optim.param_groups([("w", torch.nn.Parameter(torch.ones(2, 2)))], 0.1)) == 1


@pytest.mark.parametrize("name", CLASSES)
def test_a_rate_on_a_device_is_not_asked_for(name):
    """The meta device has no values; reading one from a GPU would wait, which a graph's capture refuses."""
    optimizer = getattr(dlkit.optim, name)([torch.zeros(3, requires_grad=True)], lr=0.1)
    (group,) = optimizer.param_groups
    group["lr"] = torch.tensor(0.1, device="meta")
    optimizer.add_param_group({"params": [torch.zeros(3, requires_grad=True)], "lr": 0.5})
    assert [optimizer._row(group)[OPTIONS.index("lr")] for group in optimizer.param_groups] == [0.0, 0.5]
    assert [(rate.device.type, rate.dtype) for rate in optimizer._device_rates()] == [("meta", torch.float32)] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "name, arguments",
    [
        ("AdamW", {"capturable": True, "amsgrad": True}),
        ("Adam", {"capturable": True, "max_norm": 1.0, "ema_decay": 0.5}),
        ("SGD", {"momentum": 0.9, "max_norm": 1.0}),
        ("RMSprop", {"capturable": True, "centered": True}),
    ],
)
def test_a_cuda_graph_replays_as_steps_do(name, arguments):
    """Learning rate, gradients, clipping and step counters are read on the device at every replay."""

    def make():
        params = [torch.linspace(-1, 1, n, device="cuda").requires_grad_() for n in (5, 4096, 100_001)]
        for param in params:
            param.grad = param.detach() * 3
        rate = torch.tensor(0.1, device="cuda")
        return params, rate, getattr(dlkit.optim, name)(params, lr=rate, **arguments)

    (params, rate, optimizer), (expected, expected_rate, eager) = make(), make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # makes the states, and fills SGD's buffers
        for _ in range(2):
            optimizer.step()
            eager.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for i in range(3):
        for param, other in zip(params, expected, strict=True):
            param.grad.mul_(i + 0.5)
            other.grad.mul_(i + 0.5)
        rate.mul_(0.7)
        expected_rate.mul_(0.7)
        graph.replay()
        torch.cuda.set_sync_debug_mode("error")  # a step outside a graph does not wait either
        try:
            eager.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for param, other in zip(params, expected, strict=True):
            assert torch.equal(param, other)
            for key, state in eager.state[other].items():
                assert torch.equal(optimizer.state[param][key], state), key
        if "max_norm" in arguments:
            assert torch.equal(optimizer.grad_norm, eager.grad_norm)
