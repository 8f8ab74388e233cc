"""Training runs that tests/integration compares: one with dlkit's optimizer, and the same with torch's."""

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

import dlkit

OURS, THEIRS = dlkit.optim, torch.optim

# Rates are high enough that a step that is lost, doubled or taken with other gradients changes every later loss by
# percents. Adam would turn gradients that are only rounding errors into whole, random steps; its eps of 1e-5 damps
# those.
ARGUMENTS = {
    "AdamW": {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-5},
    "SGD": {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.01},
}

# Options that add other data to an optimizer's checkpoint.
EXTRAS = {
    "plain": {},
    "average": {"ema_decay": 0.9},
    "bf16 states": {"state_dtype": torch.bfloat16},
    "8-bit states": {"state_dtype": "int8"},
}

SKIPS = 2.0**19  # a scale that overflows fp16 at first, and again after it has grown

with_either_library = pytest.mark.parametrize("library", [OURS, THEIRS], ids=["dlkit", "torch"])
from_one_to_the_other = pytest.mark.parametrize(
    "libraries", [(OURS, THEIRS), (THEIRS, OURS)], ids=["dlkit to torch", "torch to dlkit"]
)

# The runs differ by the rounding of updates, an ulp of an fp32 weight at each of some ten steps: measured on AVX-512,
# AVX2 and plain x86-64, 3e-7 of the losses and 2e-6 of the weights. This is five to thirty times that, and a thousandth
# of a step, which moves weights by 0.02: a rate that is off by 0.05 % fails.
EXACT = {"rtol": 1e-5, "atol": 1e-5}
# Under autocast an ulp of an fp32 weight can change the rounding of its 16-bit copy, which moves that weight by 2^-8
# (bf16) or 2^-11 (fp16) of itself for all layers. Measured: 7e-4 of the losses, 5e-4 of the weights.
ROUNDED = {"rtol": 5e-3, "atol": 4e-3}


@dataclass
class Run:
    """The record of a run; fields that a test does not fill stay empty on both sides."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # of all gradients, before clipping
    rates: list[float] = field(default_factory=list)  # the learning rate after each step
    skipped: list[bool] = field(default_factory=list)  # steps that the scaler left out
    scales: list[float] = field(default_factory=list)  # the scaler's
    weights: list[Tensor] = field(default_factory=list)

    def keep_weights(self, module: nn.Module) -> "Run":
        self.weights = [param.detach().clone() for param in module.parameters()]
        return self


def make_optimizer(library, name, params, **extras):
    return getattr(library, name)(params, **{**ARGUMENTS[name], **extras})


def make_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=SKIPS, growth_interval=2)


def make_scheduler(optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))


def make_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 4))


def make_batches(count: int, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Inputs and classes by a linear rule, which can be learned."""
    generator = torch.Generator().manual_seed(2)
    rule = torch.randn(8, 4, generator=generator)
    inputs = [torch.randn(size, 8, generator=generator) for _ in range(count)]
    return [(x, (x @ rule).argmax(1)) for x in inputs]


def loss_of(model: nn.Module, batch) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x).float(), y)


def assert_same_run(ours: Run, theirs: Run, rtol: float, atol: float) -> None:
    """Compares losses step by step, then the rest. The losses must have fallen, else the comparison shows nothing."""
    assert min(theirs.losses) < 0.9 * theirs.losses[0], theirs.losses
    tolerance = {"rtol": rtol, "atol": atol}
    assert ours.skipped == theirs.skipped
    assert ours.scales == theirs.scales
    torch.testing.assert_close(ours.losses, theirs.losses, **tolerance)
    torch.testing.assert_close(ours.norms, theirs.norms, **tolerance)
    torch.testing.assert_close(ours.rates, theirs.rates, rtol=1e-12, atol=0)
    for a, b in zip(ours.weights, theirs.weights, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def assert_equal_run(one: Run, other: Run) -> None:
    """The same optimizer on the same numbers gives the same bits."""
    assert one.losses == other.losses
    assert one.rates == other.rates
    for a, b in itertools.zip_longest(one.weights, other.weights):
        assert torch.equal(a, b)
