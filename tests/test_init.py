"""Layer-sequential unit variance: the weights it sets, the modules it leaves unchanged, and its errors."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import dlkit


def mlp(depth: int = 6, width: int = 64) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def outputs(model: nn.Module, *batch: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of the Linear and Conv layers, in the order in which they run."""
    seen: list[torch.Tensor] = []
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    handles = [
        layer.register_forward_hook(lambda layer, args, output: seen.append(output))
        for layer in model.modules()
        if isinstance(layer, kinds)
    ]
    with torch.no_grad():
        model(*batch)
    for handle in handles:
        handle.remove()
    return seen


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def assert_unit_variance(model: nn.Module, *batch: torch.Tensor, tolerance: float = 0.1) -> None:
    for output in outputs(model, *batch):
        assert abs(output.float().var(correction=0).item() - 1) <= tolerance * 1.001


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_every_layer_has_unit_variance(scale):
    model, batch = mlp(), scale * torch.randn(200, 64)
    assert dlkit.init.lsuv_(model, batch) is model
    assert_unit_variance(model, batch)
    assert hooks(model) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model, batch = mlp(3).to(dtype), torch.randn(200, 64, dtype=dtype)
    dlkit.init.lsuv_(model, batch)
    assert_unit_variance(model, batch)
    assert {param.dtype for param in model.parameters()} == {dtype}


def test_weights_are_orthogonal_up_to_the_scale_and_biases_zero():
    model = mlp(2)
    dlkit.init.lsuv_(model, torch.randn(100, 64))
    for layer in (model[0], model[2], model[4]):
        product = layer.weight @ layer.weight.T
        scale = product.diagonal().mean()
        torch.testing.assert_close(product / scale, torch.eye(len(product)), rtol=0, atol=1e-5)
        assert not layer.bias.any()


def test_convolutions():
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Flatten(2), nn.Conv1d(4, 3, 5), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip
    batch = torch.randn(8, 1, 10, 10)
    model(batch)
    dlkit.init.lsuv_(model, batch, tolerance=1e-3)
    assert len(outputs(model, batch)) == 5
    assert_unit_variance(model, batch, tolerance=1e-3)


class Backwards(nn.Module):
    """Layers run in another order than that of their definition, one of them twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)
        self.first = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor | float = 0.0) -> torch.Tensor:
        return self.last(torch.tanh(self.first(torch.tanh(self.first(x + shift)))))


def test_order_of_execution_first_use_and_layers_out_of_reach():
    model, batch = Backwards(), torch.randn(300, 16)
    unused = {name: value.clone() for name, value in model.unused.state_dict().items()}
    with pytest.warns(UserWarning, match="the batch did not reach 'unused' as a module") as warned:
        dlkit.init.lsuv_(model, batch)
    assert warned[0].filename == __file__
    first, again, last = outputs(model, batch)
    assert abs(first.var().item() - 1) < 0.1
    assert abs(again.var().item() - 1) > 0.1
    assert abs(last.var().item() - 1) < 0.1
    assert all(torch.equal(unused[name], value) for name, value in model.unused.state_dict().items())


def test_arguments_of_the_model():
    model, batch, shift = Backwards(), torch.randn(300, 16), torch.full((16,), 2.0)
    del model.unused
    dlkit.init.lsuv_(model, {"x": batch, "shift": shift})
    assert abs(model.first(batch + shift).var().item() - 1) < 0.1
    dlkit.init.lsuv_(model, (batch,))
    assert abs(model.first(batch).var().item() - 1) < 0.1


def test_own_weights_are_scaled_where_asked():
    model, batch = mlp(2), 5 * torch.randn(200, 64)
    before = [layer.weight.clone() for layer in (model[0], model[2], model[4])]
    biases = [layer.bias.clone() for layer in (model[0], model[2], model[4])]
    state = torch.get_rng_state()
    dlkit.init.lsuv_(model, batch, orthogonal=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert_unit_variance(model, batch)
    for weight, bias, layer in zip(before, biases, (model[0], model[2], model[4]), strict=True):
        ratio = layer.weight / weight
        torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
        assert torch.equal(bias, layer.bias)


class Drawing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, training=True) * (torch.rand(()) + 1)


def test_flags_buffers_and_random_state_are_as_before():
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), Drawing(),
        nn.Flatten(), nn.Linear(288, 10), dlkit.nn.BatchNorm1d(10),
    )  # fmt: skip
    model[1].eval()  # frozen statistics
    flags = [module.training for module in model.modules()]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    identities = {name: id(value) for name, value in model.named_buffers()}

    torch.manual_seed(3)
    for layer in (model[0], model[6]):
        nn.init.orthogonal_(layer.weight)
    after_draws = torch.get_rng_state()
    torch.manual_seed(3)
    dlkit.init.lsuv_(model, torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), after_draws)
    assert [module.training for module in model.modules()] == flags
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name])
        assert id(value) == identities[name]
    assert all(param.grad is None for param in model.parameters())


def test_dropout_is_off_and_batch_norm_normalizes():
    seen = {}
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 8))
    handle = model[3].register_forward_pre_hook(lambda layer, args: seen.setdefault("x", args[0].clone()))
    dlkit.init.lsuv_(model.eval(), 100 + torch.randn(64, 8))
    assert seen["x"].count_nonzero() == seen["x"].numel()
    torch.testing.assert_close(seen["x"].mean(0), torch.zeros(8), rtol=0, atol=1e-4)
    assert not model.training
    assert hooks(model) == 1  # the user's own is still there
    handle.remove()


def test_same_seed_same_weights():
    batch = torch.randn(50, 64)
    models = [dlkit.init.lsuv_(mlp(), batch, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_frozen_layers_are_left_alone():
    model, batch = mlp(2), torch.randn(100, 64)
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    dlkit.init.lsuv_(model, batch)
    assert torch.equal(model[0].weight, before)
    assert abs(outputs(model, batch)[1].var().item() - 1) < 0.1


def test_shared_weight_is_set_once():
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 16, bias=False))
    model[2].weight = model[0].weight
    batch = 7 * torch.randn(400, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dlkit.init.lsuv_(model, batch)
    assert model[2].weight is model[0].weight
    assert abs(outputs(model, batch)[0].var().item() - 1) < 0.1


def test_transformer_layer():
    layer, batch = nn.TransformerEncoderLayer(32, 4, batch_first=True), torch.randn(16, 10, 32)
    with pytest.warns(UserWarning, match="did not reach 'self_attn.out_proj' as a module"):
        dlkit.init.lsuv_(layer, batch)
    feed_forward = [output for output in outputs(layer.eval(), batch) if output.shape[-1] == 2048]
    assert abs(feed_forward[0].var().item() - 1) < 0.1


def test_compiled_model():
    model, batch = mlp(2), 4 * torch.randn(64, 64)
    dlkit.init.lsuv_(torch.compile(model, backend="eager"), batch)
    assert_unit_variance(model, batch)


def test_deep_relu_network_keeps_its_signal():
    model, batch = mlp(50), torch.randn(128, 64)
    default = outputs(model, batch)[-2].std().item()
    dlkit.init.lsuv_(model, batch)
    assert_unit_variance(model, batch)
    assert default < 0.2


# Errors. After each of them the model is as it was.


class Fails(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error


def dead() -> nn.Module:
    model = mlp(1)
    nn.init.zeros_(model[0].weight)
    return model


def huge() -> nn.Module:
    model = mlp(1)
    with torch.no_grad():
        model[0].weight.fill_(1e30)
    return model


CASES = {
    "constant batch": (mlp, torch.zeros(50, 64), {}, r"layer '0' is constant .* a batch of different samples"),
    "zero weights": (dead, torch.randn(50, 64), {"orthogonal": False}, "weight of layer '0' is zero, .* orthogonal="),
    "NaN in the batch": (mlp, torch.full((4, 64), torch.nan), {}, r"input of layer '0' is not finite; look for NaN"),
    "overflow": (huge, 1e30 * torch.randn(4, 64), {"orthogonal": False}, r"output of layer '0' is not finite though"),
    "one element": (lambda: nn.Linear(4, 1), torch.randn(1, 4), {}, r"'Linear' has 1 element, .* more samples"),
    "empty batch": (mlp, torch.randn(0, 64), {}, r"'0' has 0 elements, .* more samples"),
    "wrong shape": (mlp, torch.randn(5, 63), {}, "shapes cannot be multiplied"),
    "error of the model": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), Fails(RuntimeError("its own"))),
                           torch.randn(5, 4), {}, "its own"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_run_time_errors_leave_the_model_as_it_was(case):
    make, batch, options, message = CASES[case]
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        dlkit.init.lsuv_(model, batch, **options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert hooks(model) == 0


def test_interrupt_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), Fails(KeyboardInterrupt()))
    before = model[0].weight.clone()
    with pytest.raises(KeyboardInterrupt):
        dlkit.init.lsuv_(model, torch.randn(5, 4))
    assert torch.equal(model[0].weight, before)
    assert hooks(model) == 0
    assert model.training


def frozen() -> nn.Module:
    return mlp(1).requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.ReLU(), {}, "expected a model with Linear or Conv layers, got a ReLU without any"),
        (frozen(), {}, "are frozen; set requires_grad"),
        (nn.LazyLinear(3), {}, "has no weight yet; run a batch through"),
        (nn.Linear(4, 4, device="meta"), {}, "on the meta device; call model.to_empty"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), {}, "computed from others .* before that is added"),
        (nn.Linear(4, 4), {"tolerance": 0}, "expected tolerance to be above 0, got 0"),
        (nn.Linear(4, 4), {"tolerance": float("nan")}, "expected tolerance to be above 0, got nan"),
        (nn.Linear(4, 4), {"max_iterations": 0}, "expected max_iterations to be at least 1, got 0"),
    ],
)
def test_wrong_arguments(model, options, message):
    with pytest.raises(ValueError, match=message):
        dlkit.init.lsuv_(model, torch.randn(8, 4), **options)


def test_bias_that_no_scaling_can_undo_is_named():
    model = nn.Linear(4, 50)
    nn.init.normal_(model.bias, std=3)
    with pytest.warns(
        UserWarning, match=r"layer 'Linear' has variance .* after max_iterations=4 .* its bias alone gives"
    ):
        dlkit.init.lsuv_(model, torch.randn(20, 4), orthogonal=False, max_iterations=4)


@pytest.mark.slow
def test_init_is_loaded_when_asked_for():
    program = (
        "import sys, dlkit; print('dlkit.init' in sys.modules); dlkit.init.lsuv_; print('dlkit.init' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="no attribute 'inti'"):
        _ = dlkit.inti
