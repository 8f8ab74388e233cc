"""docs/torch_differences.md, row by row: where torch is wrong, dlkit's result is the right one.

`python tests/test_torch_differences.py` prints torch's results next to dlkit's.
"""

import math

import pytest
import torch
import torch.nn.functional as native
from support import backends
from torch._subclasses import FakeTensorMode

import dlkit
import dlkit.functional as fused

CPU_KERNELS = [backend for backend in backends.HERE if backend.instruction_set]


def relative_error(actual, expected):
    return float((actual.double() - expected).abs().max() / expected.abs().max())


def instance_norm_errors(functional):
    x, grad = torch.randn(1, 3, 4, 5), torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last)

    def gradients(function, dtype, grad):
        inputs = [t.to(dtype).requires_grad_() for t in (x, torch.ones(3), torch.zeros(3))]
        output = function(inputs[0], weight=inputs[1], bias=inputs[2])
        return torch.autograd.grad(output, inputs, grad.to(dtype))

    exact = gradients(native.instance_norm, torch.float64, grad.contiguous())
    ours = gradients(functional.instance_norm, torch.float32, grad)
    return [relative_error(a, e) for a, e in zip(ours, exact, strict=True)]


def test_instance_norm_of_one_sample_with_a_channels_last_gradient():
    assert max(instance_norm_errors(fused)) < 1e-6


def weight_gradient_error(functional, create_graph):
    x, weight = torch.randn(1, 4, 3, 5), torch.randn(4)
    grad = torch.randn(3, 5, 4, 1).permute(3, 2, 0, 1)  # strides 1, 1, 20, 4

    def gradient(function, dtype, grad, **options):
        leaf = weight.to(dtype, copy=True).requires_grad_()
        return torch.autograd.grad(function(x.to(dtype), None, None, leaf, training=True), leaf, grad, **options)[0]

    exact = gradient(native.batch_norm, torch.float64, grad.double().contiguous())
    return relative_error(gradient(functional.batch_norm, torch.float32, grad, create_graph=create_graph), exact)


@pytest.mark.parametrize("create_graph", [False, True])
def test_batch_norm_of_one_sample_with_a_permuted_gradient(create_graph):
    assert weight_gradient_error(fused, create_graph) < 1e-5


def second_derivative_error(functional):
    x, grad = torch.randn(4, 16) * 2e-3, torch.randn(4, 16).half()

    def second(function, dtype):
        leaf = x.half().to(dtype).requires_grad_()
        first = torch.autograd.grad(function(leaf, (16,)), leaf, grad.to(dtype), create_graph=True)[0]
        return torch.autograd.grad((first.double() * 1e-3).square().sum(), leaf)[0]

    return relative_error(second(functional.layer_norm, torch.float16), second(native.layer_norm, torch.float64))


def test_gradients_of_gradients_in_fp16():
    assert second_derivative_error(fused) < 1e-2


LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 4, 6, 8),
    "channels_last": lambda: torch.randn(2, 4, 6, 8).to(memory_format=torch.channels_last),
    "last two exchanged": lambda: torch.randn(2, 4, 8, 6).transpose(2, 3),
    "first two exchanged": lambda: torch.randn(4, 2, 6, 8).transpose(0, 1),
    "every other element": lambda: torch.randn(2, 4, 6, 16)[..., ::2],
    "expanded": lambda: torch.randn(2, 4, 1, 8).expand(2, 4, 6, 8),
}
CALLS = {
    "layer_norm": lambda f, x: f.layer_norm(x, (8,)),
    "rms_norm": lambda f, x: f.rms_norm(x, (8,)),
    "group_norm": lambda f, x: f.group_norm(x, 2),
    "instance_norm": lambda f, x: f.instance_norm(x),
    "batch_norm": lambda f, x: f.batch_norm(x, None, None, training=True),
    "dropout": lambda f, x: f.dropout(x, 0.5),
    "dropout2d": lambda f, x: f.dropout2d(x, 0.5),
    "alpha_dropout": lambda f, x: f.alpha_dropout(x, 0.5, training=True),
}


def real_and_fake_strides(functional, call, layout):
    def strides():
        x = LAYOUTS[layout]().detach().requires_grad_()
        y = CALLS[call](functional, x)
        return y.stride(), torch.autograd.grad(y, x, torch.ones_like(y))[0].stride()

    real = strides()
    with FakeTensorMode():
        return real, strides()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", CALLS)
def test_fake_tensors_have_the_strides_of_real_ones(call, layout):
    real, fake = real_and_fake_strides(fused, call, layout)
    assert real == fake


def compiled_average(cls):
    batches = [torch.randn(4, 3, 2, 2) + i for i in range(3)]
    eager, traced = cls(3, momentum=None), cls(3, momentum=None)
    step = torch.compile(traced, fullgraph=True, backend="eager")
    for batch in batches:
        eager(batch)
        step(batch)
    return eager, traced, batches


def test_batch_norm_without_momentum_compiles_whole():
    eager, traced, batches = compiled_average(dlkit.nn.BatchNorm2d)
    mean = torch.stack([b.double().mean((0, 2, 3)) for b in batches]).mean(0)
    assert relative_error(traced.running_mean, mean) < 1e-6
    assert torch.equal(traced.running_mean, eager.running_mean)
    assert torch.equal(traced.running_var, eager.running_var)
    assert int(traced.num_batches_tracked) == 3


def dropout_of_infinity(functional):
    x = torch.full((64,), math.inf, requires_grad=True)
    y = functional.dropout(x, 0.5)
    return y, torch.autograd.grad(y, x, torch.full((64,), math.inf))[0]


def test_dropout_of_infinity_is_zero_or_infinity():
    y, grad = dropout_of_infinity(fused)
    assert set(y.tolist()) == {0.0, math.inf}
    assert torch.equal(y, grad)


LARGE_MEANS = [(100, 1e3), (100, 1e6), (768, 1e6), (1024, 1e4), (4099, 1e5)]


def layer_norm_error(functional, cols, mean):
    x = torch.randn(16, cols) + mean
    return relative_error(functional.layer_norm(x, (cols,)), native.layer_norm(x.double(), (cols,)))


@pytest.mark.parametrize("kernels", CPU_KERNELS, ids=lambda kernels: kernels.name)
@pytest.mark.parametrize(("cols", "mean"), LARGE_MEANS)
def test_layer_norm_of_a_large_mean(kernels, cols, mean):
    if kernels.missing:
        pytest.skip(kernels.missing)
    with kernels.active():
        assert layer_norm_error(fused, cols, mean) < 1e-6


def stepped(optim, grad, **options):
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    parameter.grad = grad
    optim.SGD([parameter], lr=1.0, **options).step()
    return parameter.detach()


GRADIENTS = {"transposed": lambda: torch.arange(12.0).view(4, 3).t(), "expanded": lambda: torch.ones(1).expand(3, 4)}


@pytest.mark.parametrize("strides", GRADIENTS)
def test_gradients_of_other_strides(strides):
    grad = GRADIENTS[strides]()
    assert torch.equal(stepped(dlkit.optim, grad), -grad)


def clipped_fp16(clip):
    parameter = torch.nn.Parameter(torch.zeros(4096, dtype=torch.float16))
    parameter.grad = torch.full((4096,), 2000.0, dtype=torch.float16)  # its norm is 128,000
    return clip([parameter], 1.0), parameter.grad


def test_clipping_of_a_norm_beyond_fp16():
    norm, grad = clipped_fp16(dlkit.optim.clip_grad_norm_)
    assert norm == math.inf
    assert torch.equal(grad, torch.full_like(grad, 1 / 64))


def mean_of_fp16_losses(functional):
    x, target = torch.randn(20_000, 100).half(), torch.randint(0, 100, (20_000,))
    return functional.cross_entropy(x, target), native.cross_entropy(x.double(), target)


def test_mean_of_many_fp16_losses():
    loss, exact = mean_of_fp16_losses(fused)
    assert loss.dtype == torch.float16 and relative_error(loss, exact) < torch.finfo(torch.float16).eps


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", ["layer_norm", "rms_norm", "group_norm"])
def test_fp32_weights_with_16_bit_input(call, dtype, compiled):
    x, weight = torch.randn(4, 8, dtype=dtype), torch.randn(8)

    def function(x, weight):
        return getattr(fused, call)(x, 2 if call == "group_norm" else (8,), weight, eps=1e-5)

    exact = getattr(native, call)(x.double(), 2 if call == "group_norm" else (8,), weight.double(), eps=1e-5)
    y = (torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function)(x, weight)
    assert y.dtype == dtype
    torch.testing.assert_close(y, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def main():
    torch.manual_seed(0)
    for name, functional in (("torch", native), ("dlkit", fused)):
        print(f"{name}: errors of instance_norm's gradients", instance_norm_errors(functional))
        for call in CALLS:
            for layout in LAYOUTS:
                real, fake = real_and_fake_strides(functional, call, layout)
                if real != fake:
                    print(f"{name}: {call}, {layout}: strides of output and gradient {real}, when traced {fake}")
        print(f"{name}: batch_norm, gradient permuted: error {weight_gradient_error(functional, False):.1e}")
        print(f"{name}: fp16 gradients of gradients: error {second_derivative_error(functional):.1e}")
        print(f"{name}: cross_entropy of 20,000 rows in fp16", *map(float, mean_of_fp16_losses(functional)))
        print(f"{name}: dropout of infinity", dropout_of_infinity(functional)[0][:6].tolist())
        for cols, mean in LARGE_MEANS:
            print(f"{name}: layer_norm, {cols} columns, mean {mean:g}: {layer_norm_error(functional, cols, mean):.1e}")
    for name, optim, options in (("torch", torch.optim, {"fused": True}), ("dlkit", dlkit.optim, {})):
        for strides, grad in GRADIENTS.items():
            difference = (stepped(optim, grad(), **options) + grad()).abs().max()
            print(f"{name}: step with a gradient {strides}: largest difference {float(difference):g}")
    for name, clip in (("torch", torch.nn.utils.clip_grad_norm_), ("dlkit", dlkit.optim.clip_grad_norm_)):
        norm, grad = clipped_fp16(clip)
        print(f"{name}: fp16 gradients of norm 128,000, clipped to 1: norm {float(norm)}, elements {float(grad[0])}")
    for name, cls in (("torch", torch.nn.BatchNorm2d), ("dlkit", dlkit.nn.BatchNorm2d)):
        try:
            print(f"{name}: momentum=None, compiled", compiled_average(cls)[1].running_mean.tolist())
        except Exception as error:
            print(f"{name}: momentum=None, compiled: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
