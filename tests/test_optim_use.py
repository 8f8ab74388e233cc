"""The optimizers as people use them: weights written between steps, states moved, averages swapped, formats exchanged.

Each test asks for the right value: that of torch's optimizer in the same situation, or of fp32 masters kept beside.
"""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

import dlkit
from dlkit.optim import _int8, _masters

pytestmark = pytest.mark.sanitize

SIXTEEN_BITS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
CLASSES = ("Adam", "AdamW", "SGD", "RMSprop")


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter(torch.randn(*shape).to(dtype))


def step(optimizer, *grads):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()


def same(a, b):
    """Bit for bit, NaN included."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.detach().view(kind), b.detach().view(kind))


# Masters: half of a parameter is the user's.


class WithMasters:
    """The oracle: torch's optimizer on fp32 masters, of which those restart whose 16 bits were written."""

    def __init__(self, param, name, **arguments):
        self.master = nn.Parameter(param.detach().float())
        self.optimizer = getattr(torch.optim, name)([self.master], **arguments)
        self.dtype = param.dtype
        self.stored = param.detach().clone()

    def step(self, param, grad, all_of_it=False):
        written = (param != self.stored) | all_of_it
        with torch.no_grad():
            self.master.copy_(torch.where(written, param.float(), self.master))
        self.master.grad = grad.float()
        self.optimizer.step()
        self.stored = _masters.split(self.master.detach(), self.dtype)[0]


WRITES = {
    "zero": lambda p: p.zero_(),
    "mask": lambda p: p.mul_(torch.arange(p.numel()) % 3 != 0),
    "clamp": lambda p: p.clamp_(-0.4, 0.4),
    "relu": lambda p: p.clamp_(min=0),
    "fill": lambda p: p.fill_(1.5),
    "one element": lambda p: p[3].fill_(0.7),
    "infinity": lambda p: p[5].fill_(float("inf")),
    "halved": lambda p: p.mul_(0.5),
    "loaded": lambda p: p.copy_(torch.linspace(-2, 2, p.numel())),
}


@SIXTEEN_BITS
@pytest.mark.parametrize("write", WRITES)
def test_a_written_weight_keeps_what_was_written(write, dtype):
    """After the first write, which restarts all of the parameter's remainders, those not written keep theirs."""
    param = parameter(600, dtype=dtype)
    ours = dlkit.optim.AdamW([param], lr=1e-3, weight_decay=0, master_weights=True)
    oracle = WithMasters(param, "AdamW", lr=1e-3, weight_decay=0)
    for i in range(9):
        first_write = i == 3
        if i in (3, 6, 7):
            with torch.no_grad():
                WRITES[write](param)
            before = param.detach().clone()
        grad = torch.randn(600).to(dtype)
        step(ours, grad)
        oracle.step(before if i in (3, 6, 7) else oracle.stored, grad, all_of_it=first_write)
        kept = ~oracle.master.isinf()  # an infinite weight moves by infinity less a step
        assert not param.isnan().any()
        torch.testing.assert_close(
            next(ours.master_parameters())[kept], oracle.master[kept].detach(), rtol=1e-6, atol=1e-9
        )


@SIXTEEN_BITS
def test_a_write_through_data_is_seen_once_there_is_a_copy(dtype):
    param = parameter(600, dtype=dtype)
    ours = dlkit.optim.AdamW([param], lr=1e-3, weight_decay=0, master_weights=True)
    for i in range(6):
        if i == 2:
            with torch.no_grad():
                param[0] = 1.0
        if i == 4:
            param.data[7] = 0.75
            before = ours.state[param]["remainder"].clone()
            step(ours, torch.zeros(600, dtype=dtype))  # moves by its momentum
            assert "param_copy" in ours.state[param] and not same(before, ours.state[param]["remainder"])
        step(ours, torch.randn(600).to(dtype))
    ours.param_groups[0].update(lr=0.0)
    param.data[9] = 0.75
    step(ours, torch.zeros(600, dtype=dtype))
    assert float(param[9]) == 0.75 and next(ours.master_parameters())[9] == 0.75


@SIXTEEN_BITS
@pytest.mark.parametrize("seen", [False, True])
def test_a_step_of_rate_0_changes_no_bit_that_was_written(dtype, seen):
    """All 65,536 of them, on remainders of all kinds."""
    every = torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    param = nn.Parameter(torch.randn(65536).to(dtype))
    ours = dlkit.optim.SGD([param], lr=1e-3, master_weights=True)
    step(ours, torch.randn(65536).to(dtype))
    ours.param_groups[0]["lr"] = 0.0
    for shift in (0, 12345):
        with torch.no_grad():
            (param if seen else param.data).copy_(every.roll(shift))
        step(ours, torch.ones(65536, dtype=dtype))
        written = every.roll(shift)
        finite = written.isfinite()
        assert torch.equal(param[finite], written[finite])  # -0 and 0 are equal
        assert torch.equal(param.isnan(), written.isnan() | written.isinf() & param.isnan())
        assert not next(ours.master_parameters())[finite].isnan().any()


def test_masters_survive_a_mask_at_every_step():
    """The usual loop of pruning: weights that are not masked go on as with fp32 masters."""
    mask = torch.rand(1000) > 0.5
    param = nn.Parameter((torch.randn(1000) * mask).bfloat16())
    wide = nn.Parameter(param.detach().float())
    ours = dlkit.optim.AdamW([param], lr=1e-5, master_weights=True)
    theirs = torch.optim.AdamW([wide], lr=1e-5)
    for _ in range(30):
        grad = torch.randn(1000).bfloat16()
        step(ours, grad)
        step(theirs, grad.float())
        with torch.no_grad():
            param.mul_(mask)
            wide.mul_(mask)
    exact = next(ours.master_parameters())
    assert not param[~mask].any()
    # The first mask restarts the remainders, within half a unit of the last place, once.
    assert (exact - wide)[mask].abs().max() <= 2.0**-8 * wide[mask].abs().max()
    moved = (wide.detach() - theirs.param_groups[0]["lr"] * 0)[mask]
    torch.testing.assert_close(exact[mask] - param[mask].float(), moved - param[mask].float(), rtol=0, atol=2.0**-9)


def test_readers_see_what_was_written_to_a_weight():
    param = parameter(50, dtype=torch.bfloat16)
    ours = dlkit.optim.AdamW([param], master_weights=True, ema_decay=0.5)
    step(ours, torch.randn(50).bfloat16())
    for i, read in enumerate(
        (
            lambda: next(ours.master_parameters()),
            lambda: ours.state_dict(consolidate=True)["state"][0]["master_param"],
            lambda: ours.reset_ema() or next(ours.ema_parameters()),
        )
    ):
        step(ours, torch.randn(50).bfloat16())
        with torch.no_grad():
            param.fill_(1.0 + i)
        assert (read() == 1 + i).all()
    with ours.ema(), pytest.raises(RuntimeError, match="swapped in"):
        ours.master_parameters()


@pytest.mark.parametrize("how", ["cast", "switched off"])
def test_masters_that_were_written_and_then_given_up(how):
    model = nn.Linear(4, 4).bfloat16()
    ours = dlkit.optim.SGD(model.parameters(), lr=0.5, master_weights=True)
    for i in range(4):
        grads = [torch.ones_like(param) for param in model.parameters()]
        before = [param.detach().clone() for param in model.parameters()]
        step(ours, *grads)
        for param, old in zip(model.parameters(), before, strict=True):
            assert not torch.equal(param, old)
        model.zero_grad()
        if i == 0:
            with torch.no_grad():
                model.weight.mul_(0.5)
        if i == 1 and how == "cast":
            model.float()
        elif i == 1:
            ours.param_groups[0]["master_weights"] = False
    for found, param in zip(ours.master_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, param.float())


def test_join_and_split_in_torchs_ops_are_inverse():
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.cat([torch.randn(5000) * 2.0**e for e in range(-60, 15, 5)])
        values = torch.cat([values, torch.tensor([0.0, -0.0, float("inf"), -float("inf")])])
        high, rest = _masters.split(values, dtype)
        joined = _masters.join(high, rest)
        tolerance = {"rtol": 0, "atol": 0} if dtype == torch.bfloat16 else {"rtol": 2.0**-23, "atol": 2.0**-40}
        torch.testing.assert_close(joined, values, equal_nan=True, **tolerance)
        again, rest_again = _masters.split(joined, dtype)
        assert same(again, high) and same(rest_again.view(torch.int16), rest.view(torch.int16))


def test_masters_of_a_model_that_was_cast():
    model = nn.Linear(4, 4).bfloat16()
    ours = dlkit.optim.AdamW(model.parameters(), master_weights=True, ema_decay=0.5)
    step(ours, *(torch.ones_like(param) for param in model.parameters()))
    model.float()
    model.zero_grad()
    step(ours, *(torch.ones_like(param) for param in model.parameters()))
    for found, param in zip(ours.master_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, param)
    assert "master_param" not in ours.state_dict(consolidate=True)["state"][0]
    with ours.ema():
        pass


# The plan between steps.


def both(make, steps, change, sizes=((5,), (3, 4), (700,)), rtol=1e-5):
    """dlkit's and torch's optimizer through the same changes; parameters are compared after each step."""
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


# 8-bit states.


def test_a_rare_rows_second_moment_is_never_0():
    """A positive second moment that was stored as 0 gave one update of 60,000 times the learning rate."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.zeros(128, 32))
    ours = dlkit.optim.AdamW([param], lr=1e-3, state_dtype="int8", weight_decay=0)
    wide = nn.Parameter(torch.zeros(128, 32))
    theirs = torch.optim.AdamW([wide], lr=1e-3, weight_decay=0)
    for i in range(200):
        grad = torch.zeros(128, 32)
        grad[::2] = torch.randn(64, 32)
        if i % 4 == 0:
            grad[1::2] = 0.01 * torch.randn(64, 32)
        step(ours, grad)
        step(theirs, grad.clone())
    assert (ours.state[param]["exp_avg_sq_codes"] > 0).all()
    assert param[1::2].abs().max() < 2 * wide[1::2].abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["in place", "loaded", "saved"])
def test_8_bit_states_through_a_change_of_layout(how, tmp_path):
    torch.manual_seed(0)
    weight, scale = torch.randn(64, 64, 3, 3), torch.logspace(-3, 0, 64)[:, None, None, None]
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(1)
        param = nn.Parameter(weight.clone())
        ours = dlkit.optim.AdamW([param], lr=1e-3, state_dtype="int8")
        for i in range(6):
            if i == 5:
                param.grad = None
                if how == "in place":
                    param.data = param.data.to(memory_format=layout)
                else:
                    saved = ours.state_dict()
                    if how == "saved":
                        torch.save(saved, tmp_path / "state")
                        saved = torch.load(tmp_path / "state", weights_only=True)
                    param = nn.Parameter(param.detach().to(memory_format=layout))
                    ours = dlkit.optim.AdamW([param], lr=1e-3, state_dtype="int8")
                    ours.load_state_dict(saved)
            step(ours, (torch.randn(64, 64, 3, 3) * scale).to(memory_format=layout))
        results.append(param.detach().contiguous())
    assert torch.equal(*results)


def test_small_tensors_and_embeddings_keep_fp32():
    model = nn.Sequential(nn.Embedding(200, 64), nn.Linear(64, 64), nn.Linear(64, 63))
    ours = dlkit.optim.AdamW(model.parameters(), state_dtype="int8")
    step(ours, *(torch.ones_like(p) for p in model.parameters()))
    coded = [name for name, p in model.named_parameters() if "exp_avg_codes" in ours.state[p]]
    assert coded == ["1.weight"]
    assert all(state["exp_avg"].dtype == torch.float32 for state in ours.state.values() if "exp_avg" in state)


@pytest.mark.parametrize("signed", [True, False])
def test_decoded_states_are_encoded_as_they_were(signed):
    codes = torch.randint(0 if signed else 1, 256, (400, 256), dtype=torch.uint8)
    codes[:100] = codes[:100].clamp(max=130)  # the largest magnitude is negative
    codes[100:] = torch.where(torch.arange(256) == 7, 255, codes[100:]).to(torch.uint8)
    if signed:
        codes[:100, 3] = 0
    else:
        codes[:100, 3] = 255
    codes[-1] = _int8.zero(signed)
    scale = torch.rand(400).clamp(min=1e-3) * 10.0 ** torch.randint(-9, 9, (400,))
    scale[-1] = 0
    values = _int8.decode(codes, scale, signed)
    found, found_scale = _int8.encode_decoded(values, signed)
    assert torch.equal(found, codes) and torch.equal(found_scale, scale)
    assert torch.equal(_int8.decode(found, found_scale, signed), values)


def test_8_bit_states_of_version_0_1_load():
    """Codes stood under torch's name, blocks in the order of memory, and state_dtype was a torch.dtype."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(8, 64, 3, 3).to(memory_format=torch.channels_last))
    ours = dlkit.optim.AdamW([param], state_dtype="int8", ema_decay=0.5)
    moments = {
        "exp_avg": torch.randn(8, 64, 3, 3).to(memory_format=torch.channels_last),
        "exp_avg_sq": torch.rand(8, 64, 3, 3).to(memory_format=torch.channels_last),
    }
    state = {"step": torch.tensor(3.0), "ema": param.detach().clone()}
    for key, values in moments.items():
        in_memory = values.permute(0, 2, 3, 1)
        codes, scale = _int8.encode(in_memory, key == "exp_avg")
        state[key], state[f"{key}_scale"] = codes.permute(0, 3, 1, 2), scale
    groups = [{**ours.state_dict()["param_groups"][0], "state_dtype": "int8"}]
    del groups[0]["ema_steps"]
    ours.load_state_dict({"state": {0: state}, "param_groups": groups})
    found = ours.state[param]
    assert "exp_avg" not in found and ours.param_groups[0]["ema_steps"] == 1
    for key, values in moments.items():
        decoded = _int8.decode(found[f"{key}_codes"], found[f"{key}_scale"], key == "exp_avg")
        assert (decoded - values).abs().max() < 0.03 * values.abs().max()
    step(ours, torch.randn(8, 64, 3, 3))


def test_masters_of_version_0_1_load():
    param = parameter(50, dtype=torch.bfloat16)
    ours = dlkit.optim.AdamW([param], master_weights=True)
    step(ours, torch.randn(50).bfloat16())
    saved = copy.deepcopy(ours.state_dict())
    saved["state"][0]["remainder"] = saved["state"][0]["remainder"].view(torch.int16)
    saved["param_groups"][0]["state_dtype"] = torch.float32
    other = nn.Parameter(param.detach().clone())
    following = dlkit.optim.AdamW([other], master_weights=True)
    following.load_state_dict(saved)
    for optimizer in (ours, following):
        step(optimizer, torch.ones(50).bfloat16())
    assert same(param, other) and following.param_groups[0]["state_dtype"] == "float32"


# bf16 moments.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "RMSprop"])
@pytest.mark.parametrize("how", ["state_dtype", "stochastic_rounding"])
def test_second_moments_in_bf16_follow_shrinking_gradients(name, how):
    """Rounded to nearest they stay where they are: what a step takes away is less than half a unit."""
    options = {"state_dtype": torch.bfloat16} if how == "state_dtype" else {"stochastic_rounding": True}
    dtype = torch.float32 if how == "state_dtype" else torch.bfloat16
    arguments = {"alpha": 0.999} if name == "RMSprop" else {}
    param, wide = nn.Parameter(torch.zeros(1000, dtype=dtype)), nn.Parameter(torch.zeros(1000))
    ours = getattr(dlkit.optim, name)([param], lr=0.0, **arguments, **options)
    theirs = getattr(torch.optim, name)([wide], lr=0.0, **arguments)
    key = "exp_avg_sq" if name == "AdamW" else "square_avg"
    for i in range(3000):
        grad = torch.randn(1000).to(dtype) * (1.0 if i < 300 else 0.01)
        step(ours, grad)
        step(theirs, grad.float())
    found, expected = ours.state[param][key].float().mean(), theirs.state[wide][key].mean()
    assert ours.state[param][key].dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0)


def test_stochastic_rounding_is_of_the_group_that_asks_for_it():
    params = [nn.Parameter(torch.ones(2000, dtype=torch.bfloat16)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "stochastic_rounding": True}]
    ours = dlkit.optim.SGD(groups, lr=1e-3)
    step(ours, *(torch.ones(2000, dtype=torch.bfloat16) for _ in params))
    assert (params[0] == 1).all() and 0 < float((params[1] != 1).float().mean()) < 0.6


def test_rounding_does_not_depend_on_threads():
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(5)
            param = parameter(70_001)
            ours = dlkit.optim.AdamW([param], state_dtype=torch.bfloat16)
            for _ in range(3):
                step(ours, torch.randn(70_001))
            results.append(ours.state[param]["exp_avg_sq"])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


# Averages of the weights.


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


# Clipping.


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


# Loading and saving.


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
    """torch's SGD and RMSprop go on then, and so does dlkit; a buffer is not taken for a new one."""
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


# Gradients, dtypes and devices.


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
    ids=lambda dtype: str(dtype)[6:],
)
def test_gradients_of_another_dtype(name, dtype, grad_dtype):
    """As if parameter, state and gradient were all in the wider one, and the parameter rounded."""
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
