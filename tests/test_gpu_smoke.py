"""Each op once on a GPU against torch's, at widths that take every path: the first test to run on a new one."""

import pytest
import torch
import torch.nn.functional as native
from support.inputs import make

import dlkit
import dlkit.functional as fused

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE, ROWS = "cuda", 33
WIDTHS = (64, 768, 1024, 3072, 4096, 12288)
DTYPES = (torch.float32, torch.bfloat16)

# Functions of (module, x, residual, weight, bias); the module is dlkit's functional or torch's.
NORMS = {
    "layer_norm": lambda m, x, r, w, b: m.layer_norm(x, x.shape[1:], w, b),
    "rms_norm": lambda m, x, r, w, b: m.rms_norm(x, x.shape[1:], w, 1e-6),
    "add_layer_norm": lambda m, x, r, w, b: (
        m.layer_norm(x + r, x.shape[1:], w, b) + x + r
        if m is native
        else sum(m.add_layer_norm(x, r, x.shape[1:], w, b))
    ),
    "batch_norm": lambda m, x, r, w, b: m.batch_norm(x, None, None, w, b, True),
    "group_norm": lambda m, x, r, w, b: m.group_norm(x, 8, w, b),
}


def check_norm(name, shape, dtype, layout=torch.contiguous_format):
    """Compares output and gradients with torch's in fp64."""
    tensors = [make(shape, dtype, DEVICE).contiguous(memory_format=layout) for _ in range(2)]
    tensors += [make(shape[1:2], dtype, DEVICE, shift=1.0), make(shape[1:2], dtype, DEVICE)]
    grad = make(shape, dtype, DEVICE)
    results = []
    for module, to in ((fused, dtype), (native, torch.float64)):
        leaves = [t.detach().to(to, copy=True).requires_grad_() for t in tensors]
        y = NORMS[name](module, *leaves)
        results.append((y, *torch.autograd.grad(y, leaves, grad.to(to), allow_unused=True)))
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            error = (found.double() - expected).abs().max() / expected.abs().max()
            assert error <= 8 * torch.finfo(dtype).eps, (name, shape, dtype, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms(width, dtype):
    for name in NORMS:
        check_norm(name, (ROWS, width), dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_norms_of_images(layout):
    for name in ("batch_norm", "group_norm"):
        for size in (14, 56):
            check_norm(name, (8, 64, size, size), torch.float32, layout)


@pytest.mark.parametrize("width", WIDTHS)
def test_dropouts(width):
    """Checks kept values and their number; the masks themselves are tested elsewhere."""
    x, residual = (make((ROWS, width), torch.float32, DEVICE) for _ in range(2))
    x.requires_grad_()
    y = fused.dropout(x, 0.25)
    torch.testing.assert_close(y, torch.where(y != 0, x / 0.75, 0))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad != 0, y != 0) and abs(float((y != 0).float().mean()) - 0.75) < 0.05
    z, total = fused.dropout_add_layer_norm(x, residual, (width,), p=0.25, prenorm=True)
    torch.testing.assert_close(z, native.layer_norm(total, (width,)), rtol=1e-5, atol=1e-5)
    bias = make((width,), torch.float32, DEVICE)
    y = fused.bias_gelu_dropout(x, bias, 0.25)
    torch.testing.assert_close(y, torch.where(y != 0, native.gelu(x + bias) / 0.75, 0))
    image = x.detach()[:32].reshape(4, 8, -1, 8)
    y = fused.dropblock2d(image, 0.1, 3)
    kept = y != 0
    torch.testing.assert_close(y, image * kept * (kept.numel() / kept.sum()))


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop"])
def test_optimizers(name):
    arguments = {"momentum": 0.9} if name == "SGD" else {}
    results = []
    for library in (dlkit.optim, torch.optim):
        params = [torch.linspace(-1, 1, n, device=DEVICE).requires_grad_() for n in (5, 4096, 100_001)]
        optimizer = getattr(library, name)(params, lr=0.1, **arguments)
        for step in range(2):
            for param in params:
                param.grad = param.detach() * (3 + step)
            optimizer.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_captured_dropout():
    x = torch.ones(1000, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fused.dropout(x, 0.5)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused.dropout(x, 0.5)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y) and set(y.tolist()) == {0.0, 2.0}
