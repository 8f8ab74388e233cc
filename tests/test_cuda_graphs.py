"""Norms and dropout inside a captured CUDA graph: a replay gives the results of a call."""

import math

import pytest
import torch
from support import reference
from support.inputs import make

import dlkit.functional as fused

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SEED, DRAWN = 11, 8  # DRAWN: a call advances the generator's offset by it


def captured(function):
    """Returns a graph of function() and the tensors that a replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # lazy initialization happens here, before the capture
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


NORMS = {
    "layer_norm": lambda x, w, b: fused.layer_norm(x, x.shape[1:], w, b),
    "rms_norm": lambda x, w, b: fused.rms_norm(x, x.shape[1:], w),
    "batch_norm": lambda x, w, b: fused.batch_norm(x, None, None, w, b, training=True),
    "group_norm": lambda x, w, b: fused.group_norm(x, 4, w, b),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_replays_forward_and_backward(name, dtype):
    x, grad = make((37, 768), dtype, "cuda"), make((37, 768), dtype, "cuda")
    weight, bias = (make((768,), torch.float32, "cuda", shift=1.0) for _ in range(2))
    inputs = [t.requires_grad_() for t in (x, weight, bias)]

    def both():
        y = NORMS[name](*inputs)
        return y, *torch.autograd.grad(y, inputs, grad, allow_unused=True, materialize_grads=True)

    graph, results = captured(both)
    for _ in range(2):
        with torch.no_grad():
            x.copy_(make((37, 768), dtype, "cuda"))
            grad.copy_(make((37, 768), dtype, "cuda"))
        for result in results:
            result.detach().fill_(math.nan)
        graph.replay()
        for found, expected in zip(results, both(), strict=True):
            assert torch.equal(found, expected)


def test_dropout_draws_anew_at_each_replay():
    """A replay uses the generator's current offset and advances it; backward has forward's mask."""
    shape, p = (17, 768), 0.4
    x, nothing = make(shape, torch.float32, "cuda").requires_grad_(), torch.zeros(shape, device="cuda")

    def three():
        y = fused.dropout(x, p)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        added = fused.dropout_add(x, nothing, p)
        _, total = fused.dropout_add_layer_norm(x, nothing, shape[1:], p=p, prenorm=True)
        return y.detach(), grad, added.detach(), total.detach()

    torch.cuda.manual_seed(SEED)
    graph, results = captured(three)
    masks = []
    for _ in range(2):
        seed, offset = torch.cuda.get_rng_state().view(torch.int64).tolist()
        assert seed == SEED
        graph.replay()
        assert torch.cuda.get_rng_state().view(torch.int64).tolist() == [SEED, offset + 3 * DRAWN]
        for call, result in ((0, results[0]), (0, results[1]), (1, results[2]), (2, results[3])):
            mask = reference.keep_mask(SEED, offset + call * DRAWN, p, x.numel()).reshape(shape)
            assert ((result != 0).cpu().numpy() == mask).all()
            masks.append(mask)
    assert (masks[0] != masks[4]).any() and (masks[0] != masks[2]).any()
