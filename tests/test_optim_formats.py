"""Masters that the user writes to, and states in 8 and 16 bits, as people use them."""

import copy

import pytest
import torch
from support.optimizers import SIXTEEN_BITS, parameter, same, step
from torch import nn

import dlkit
from dlkit.optim import _int8, _masters

pytestmark = pytest.mark.sanitize


class WithMasters:
    """The oracle: torch's optimizer on fp32 masters; a master restarts when its 16 bits are written."""

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
    """The first write restarts all of the parameter's remainders; later ones restart only those of written elements."""
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
        kept = ~oracle.master.isinf()  # an infinite weight minus a step is infinite
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
    """All 65,536 values, with remainders of all kinds."""
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
    # The first mask restarts the remainders once, with an error of at most half an ulp.
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
    """It stored codes under torch's name, cut blocks in memory order, and had a torch.dtype as state_dtype."""
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
    """Rounded to nearest they never change: a step takes away less than half an ulp."""
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
