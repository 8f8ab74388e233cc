"""More than 2^31 elements through every op, where an index of 32 bits would fail. `make test-big` needs 20 GB free.

An input repeats one block, and an op must repeat its result for the block. A block is a whole row or sample: its
statistics repeat too. Dropout masks are compared with the reference around the index 2^31.
"""

import os
from collections.abc import Callable

import pytest
import torch
from support import reference

import dlkit
import dlkit.functional as fused

pytestmark = pytest.mark.skipif("DLKIT_TEST_BIG" not in os.environ, reason="wants 20 GB: make test-big")

CHUNK = 1 << 24


def repeated(block: torch.Tensor, times: int) -> torch.Tensor:
    return block.expand(times, *block.shape[1:]).contiguous(memory_format=layout_of(block))


def layout_of(block: torch.Tensor) -> torch.memory_format:
    last = block.dim() == 4 and not block.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def assert_repeats(big: torch.Tensor, block: torch.Tensor, rtol: float) -> None:
    """Every sample of big equals block's within rtol, and bit for bit the first sample of big."""
    step = max(1, CHUNK // block.numel())
    first = big[:1].clone()
    for begin in range(0, len(big), step):
        some = big[begin : begin + step]
        assert torch.equal(some, first.expand_as(some)), f"another result from sample {begin} on"
    torch.testing.assert_close(first, block, rtol=rtol, atol=rtol)


def parameters(channels: int) -> list[torch.Tensor]:
    return [(torch.rand(channels) + 0.5).requires_grad_(), torch.randn(channels).requires_grad_()]


ROW, SAMPLE, ONE_CHANNEL = (1, 1024), (1, 4, 512, 512), (1, 1, 1024, 1024)
EPS = torch.finfo(torch.bfloat16).eps


def normalize_batch(x, w, b):
    return fused.batch_norm(x, None, None, w, b, training=True)


def normalize_batch_relu(x, w, b):
    return fused.batch_norm_relu(x, None, None, w, b, training=True)


def evaluate_batch(x, w, b):
    return fused.batch_norm(x, torch.full_like(w, 0.1), torch.full_like(w, 2.0), w, b)


CASES: dict[str, tuple[tuple[int, ...], int, Callable]] = {
    "layer_norm": (ROW, 1024, lambda x, w, b: fused.layer_norm(x, (1024,), w, b)),
    "rms_norm": (ROW, 1024, lambda x, w, b: fused.rms_norm(x, (1024,), w)),
    "add_layer_norm": (ROW, 1024, lambda x, w, b: fused.add_layer_norm(x, x, (1024,), w, b)[0]),
    "batch_norm": (SAMPLE, 4, normalize_batch),
    "batch_norm, one channel": (ONE_CHANNEL, 1, normalize_batch),
    "batch_norm, evaluation": (SAMPLE, 4, evaluate_batch),
    "batch_norm_relu": (SAMPLE, 4, normalize_batch_relu),
    "batch_norm, channels_last": (SAMPLE, 4, normalize_batch),
    "batch_norm_relu, channels_last": (SAMPLE, 4, normalize_batch_relu),
    "batch_norm, evaluation, channels_last": (SAMPLE, 4, evaluate_batch),
    "group_norm": (SAMPLE, 4, lambda x, w, b: fused.group_norm(x, 2, w, b)),
    "group_norm, channels_last": (SAMPLE, 4, lambda x, w, b: fused.group_norm(x, 2, w, b)),
    "instance_norm": (SAMPLE, 4, lambda x, w, b: fused.instance_norm(x, weight=w, bias=b)),
    "bias_gelu_dropout, nothing dropped": (ROW, 1024, lambda x, w, b: fused.bias_gelu_dropout(x, b, 0.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_repeats(case):
    shape, channels, call = CASES[case]
    block, grad = (torch.randn(shape).bfloat16() for _ in range(2))
    if "channels_last" in case:
        block, grad = (t.to(memory_format=torch.channels_last) for t in (block, grad))
    times = (1 << 31) // block.numel() + 3
    weights = parameters(channels)

    def run(x, grad):
        x.requires_grad_()
        y = call(x, *weights)
        return y.detach(), torch.autograd.grad(y, [x, *weights], grad, allow_unused=True)

    # Batch statistics of 4 blocks are those of any number of blocks; only sums grow.
    small, small_grads = run(repeated(block, 4), repeated(grad, 4))
    y, grads = run(repeated(block, times), repeated(grad, times))
    assert y.numel() > 1 << 31
    assert_repeats(y, small[:1], EPS)
    del y
    assert_repeats(grads[0], small_grads[0][:1], EPS)
    for big, few in zip(grads[1:], small_grads[1:], strict=True):
        if few is not None:
            torch.testing.assert_close(big / times, few / 4, rtol=1e-4, atol=1e-4)


def test_statistics_of_one_channel():
    block = torch.randn(ONE_CHANNEL).bfloat16() + 1
    times = (1 << 31) // block.numel() + 3
    mean, var = torch.zeros(1), torch.zeros(1)
    fused.batch_norm(repeated(block, times), mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(mean, block.double().mean().float()[None], rtol=1e-6, atol=0)
    torch.testing.assert_close(var, block.double().var(unbiased=False).float()[None], rtol=1e-6, atol=0)


ROWS = (1 << 21) + 3  # of 1024 elements
P, SEED = 0.3, 0x1234_5678_9ABC
DROPOUTS = {
    "dropout": lambda x, stream: fused.dropout(x, P, generator=stream),
    "alpha_dropout": lambda x, stream: fused.alpha_dropout(x, P, True, generator=stream),
    "dropout_add": lambda x, stream: fused.dropout_add(x, x.detach(), P, generator=stream),
    "bias_relu_dropout": lambda x, stream: fused.bias_relu_dropout(x, None, P, generator=stream),
    "dropout_add_layer_norm": lambda x, stream: fused.dropout_add_layer_norm(
        x, x.detach(), (1024,), p=P, prenorm=True, generator=stream)[1],
}  # fmt: skip


@pytest.mark.parametrize("name", DROPOUTS)
def test_masks(name):
    x = torch.ones(ROWS, 1024, dtype=torch.bfloat16, requires_grad=True)
    y = DROPOUTS[name](x, dlkit.random.Philox(SEED))
    kept = y.detach().amax()
    (grad,) = torch.autograd.grad(y, x, torch.ones(1, dtype=x.dtype).expand(x.shape))
    y, grad = y.detach().view(-1), grad.view(-1)
    assert y.numel() > 1 << 31
    for first in (0, (1 << 31) - 2048, y.numel() - 2048):
        mask = torch.from_numpy(reference.keep_mask(SEED, 0, P, 2048, first))
        assert torch.equal(y[first : first + 2048] == kept, mask)
        assert torch.equal(grad[first : first + 2048] != 0, mask)
    for begin in range(0, y.numel(), CHUNK):
        assert torch.equal(y[begin : begin + CHUNK] == kept, grad[begin : begin + CHUNK] != 0)


def test_dropblock():
    x = torch.ones((1 << 13) + 1, 4, 256, 256, dtype=torch.bfloat16, requires_grad=True)
    y = fused.dropblock2d(x, 0.1, 5)
    (grad,) = torch.autograd.grad(y, x, torch.ones(1, dtype=x.dtype).expand(x.shape))
    assert y.numel() > 1 << 31
    for i in range(0, len(y), 256):
        assert torch.equal(y[i : i + 256].detach() != 0, grad[i : i + 256] != 0)
        kept = (grad[i : i + 256] != 0).float().mean()
        assert 0.88 < kept < 0.93
    assert abs(y.detach().mean(dtype=torch.float32) - 1) < 1e-2


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_one_parameter(optimizer):
    parameter = torch.nn.Parameter(repeated(torch.randn(ROW).bfloat16(), ROWS))
    parameter.grad = repeated(torch.randn(ROW).bfloat16(), ROWS)
    rows = torch.nn.Parameter(parameter.detach()[:4].clone())
    rows.grad = parameter.grad[:4].clone()
    options = {"lr": 0.1} if optimizer == "SGD" else {"lr": 0.1, "state_dtype": torch.bfloat16}
    for one in (parameter, rows):
        getattr(dlkit.optim, optimizer)([one], **options).step()
    if optimizer == "SGD":
        assert_repeats(parameter.detach(), rows.detach()[:1], 0)
    else:  # Adam's first step is lr * sign of the gradient, however states are rounded
        for begin in range(0, ROWS, CHUNK // 1024):
            some = parameter.detach()[begin : begin + CHUNK // 1024]
            torch.testing.assert_close(some, rows.detach()[:1].expand_as(some), rtol=2 * EPS, atol=2e-3)


CLASSES = {
    "rows": (1, 4096), "few classes": (1, 8), "pixels": (1, 8, 512, 512), "pixels, channels_last": (1, 8, 512, 512)
}  # fmt: skip


@pytest.mark.parametrize("case", CLASSES)
def test_cross_entropy(case):
    block = torch.randn(CLASSES[case]).bfloat16()
    if "channels_last" in case:
        block = block.to(memory_format=torch.channels_last)
    target = torch.randint(0, block.shape[1], (1, *block.shape[2:]))

    def run(times):
        x = repeated(block, times).requires_grad_()
        losses = fused.cross_entropy(x, target.expand(times, *target.shape[1:]), reduction="none")
        return losses.detach(), *torch.autograd.grad(losses, x, torch.ones_like(losses))

    loss, grad = run(1)
    losses, grads = run((1 << 31) // block.numel() + 3)
    assert grads.numel() > 1 << 31
    assert_repeats(losses, loss, EPS)
    assert_repeats(grads, grad, EPS)
