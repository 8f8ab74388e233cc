"""The masks are random enough: rates, positions, patterns, and correlations of neighbours, rows, calls and ranks.

Seeds are fixed, so a test passes or fails for good. Bounds are those of the exact distribution under independence, at
4.5 standard deviations (7 in a million, two-sided); chi-square ones by Wilson and Hilferty's approximation. Masks have
the same bits on every backend (test_dropout.py): one backend is enough here.
"""

import math

import pytest
import torch

import dlkit.functional as fused
from dlkit.random import Philox

DEVIATIONS = 4.5


def mask(seed, offset, p, *shape):
    """uint8: 1 where an element is kept."""
    state = torch.tensor([seed, offset])
    ones = torch.ones(shape, dtype=torch.bfloat16)
    return torch.ops.dlkit.dropout_apply(ones, state, p, 1, 1.0, 0.0, 0.0).bool().view(torch.uint8)


def check_normal(z):
    assert abs(z) < DEVIATIONS, z


def check_chi_square(z):
    """z: independent standard normal values under the hypothesis."""
    z = z.double().flatten()
    assert z.abs().max() < DEVIATIONS + math.sqrt(2 * math.log(len(z)))  # the largest of many values
    count, found = len(z), z.square().sum().item()
    spread = 2 / (9 * count)
    check_normal(((found / count) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))


def correlations(a, b, p):
    """Correlations of pairs of masks, as standard normal values: a and b are [pairs, n] of 0 and 1."""
    centred = (a.float() - (1 - p)) * (b.float() - (1 - p))
    return centred.double().sum(-1) / (p * (1 - p) * math.sqrt(a.shape[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.1, 0.5, 2**-20])
def test_keep_rate_over_1e8_draws(p):
    """For p = 2^-20 only the second 16 bits drop elements: 96 of 10^8 are expected to be dropped."""
    draws = dropped = 0
    for call in range(6):
        kept = mask(1, 8 * call, p, 2**24)
        draws, dropped = draws + kept.numel(), dropped + kept.numel() - kept.sum().item()
    assert draws > 10**8
    check_normal((dropped - draws * p) / math.sqrt(draws * p * (1 - p)))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_every_position_of_a_vector_and_every_pattern_of_a_block(p):
    kept = mask(2, 0, p, 2**24)
    count = kept.numel() // 256
    rates = kept.view(-1, 256).sum(0).double()  # 256: what the widest CPU kernel draws in a step
    check_chi_square((rates - count * (1 - p)) / math.sqrt(count * p * (1 - p)))
    patterns = (kept.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1)
    blocks = len(patterns)
    found = torch.bincount(patterns, minlength=256).double()
    ones = (torch.arange(256)[:, None] >> torch.arange(8) & 1).sum(1)
    expected = blocks * (1 - p) ** ones * p ** (8 - ones)
    enough = expected > 50
    # A multinomial's standardized counts: independent normal values less one degree of freedom.
    check_chi_square(((found - expected) / expected.sqrt())[enough])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_independent(p):
    kept = mask(3, 0, p, 2**22)
    lags = [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 32, 63, 64, 128, 256, 512, 1024, 4096, 65536]
    size = kept.numel() - max(lags)
    check_chi_square(torch.stack([correlations(kept[:size], kept[lag : lag + size], p) for lag in lags]))


def check_rows(rows, p):
    """Checks every pair of rows of [rows, n]."""
    centred = rows.float() - (1 - p)
    products = centred @ centred.T / (p * (1 - p) * math.sqrt(rows.shape[1]))
    check_chi_square(products[torch.ones_like(products, dtype=torch.bool).triu(1)])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rows_calls_and_ranks_are_independent(p):
    check_rows(mask(4, 0, p, 256, 8192), p)
    stream = Philox(5)
    ones = torch.ones(8192)
    check_rows(torch.stack([fused.dropout(ones, p, generator=stream) for _ in range(256)]) != 0, p)
    for draw in (lambda seed: torch.Generator().manual_seed(seed), Philox):  # ranks count up from a seed
        check_rows(torch.stack([fused.dropout(ones, p, generator=draw(seed)) for seed in range(256)]) != 0, p)


def check_moment(values, expected):
    values = values.double()
    check_normal((values.mean() - expected) / (values.std() / math.sqrt(values.numel())))


def test_mean_and_variance_of_the_output():
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2**22, generator=generator)
    y = fused.dropout(x + 1, 0.3, generator=generator)
    check_moment(y, 1)
    check_moment(y.square(), 2 / 0.7)  # E[x^2] / (1 - p)
    y = fused.alpha_dropout(x, 0.3, True, generator=generator)
    check_moment(y, 0)
    check_moment(y.square(), 1)
    images = x.view(2**12, 2**8, 2, 2) + 1
    for y in (
        fused.dropout2d(images, 0.3, generator=generator).mean((2, 3)),
        fused.drop_path(images, 0.3, generator=generator).mean((1, 2, 3)),
    ):
        check_moment(y, 1)
