"""More tensors and groups than one launch of the GPU kernels holds, of all alignments, compared with single steps."""

import pytest
import torch

SGD = [0.1, 0.01, 0.0, 0.0, 0.0, 0.9, *[0.0] * 8]  # a row of options: lr, weight decay, momentum
ADAM = [1e-2, 0.1, 1e-8, 0.9, 0.99, 0.0, 0.0, 0.0, 0.0, 1.0, *[0.0] * 4]


def tensors(count, dtype, device):
    """Views into one buffer, some of them at odd offsets."""
    sizes = [1 + 37 * i % 61 for i in range(count)]
    return [part.view(-1) for part in torch.randn(sum(sizes), dtype=dtype, device=device).split(sizes)]


def cloned(lists):
    return [[t.clone() for t in tensors] for tensors in lists]


@pytest.mark.parametrize("algorithm", ["sgd", "adam"])
def test_many_tensors_of_many_groups(backend, algorithm):
    count = 24 if backend.name == "triton" and backend.device == "cpu" else 150
    group_count = min(40, count)
    row = SGD if algorithm == "sgd" else ADAM
    options = [value * (1 + g / 100) if k < 2 else value for g in range(group_count) for k, value in enumerate(row)]
    param, grad, first = (tensors(count, torch.float32, backend.device) for _ in range(3))
    second = [t.square() for t in tensors(count, torch.float32, backend.device)] if algorithm == "adam" else []
    steps = [torch.full((), float(i % 5), device=backend.device) for i in range(count)] if algorithm == "adam" else []
    together, alone = cloned((param, grad, first, second, steps)), cloned((param, grad, first, second, steps))
    groups = [i % group_count for i in range(count)]

    def run(lists, groups, options):
        p, g, s1, s2, t = lists
        backend.call(
            "optim_step_kernel_", algorithm=algorithm, params=p, grads=g, state1=s1, state2=s2, steps=t, groups=groups,
            options=options, max_norm=0.0, write_grads=False,
        )  # fmt: skip

    run(together, groups, options)
    for i, group in enumerate(groups):
        run([tensors[i : i + 1] for tensors in alone], [0], options[14 * group : 14 * group + 14])
    for a, b in zip(together, alone, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(together[0], param, strict=True))


def test_norm_and_clipping_of_many_gradients(backend):
    count = 24 if backend.name == "triton" and backend.device == "cpu" else 300
    grads = tensors(count, torch.bfloat16, backend.device) + tensors(5, torch.float32, backend.device)
    norm = backend.op("optim_grad_norm_kernel")(grads)
    expected = torch.cat([grad.double() for grad in grads]).norm()
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
    clipped = [grad.clone() for grad in grads]
    backend.op("optim_clip_grads_kernel_")(clipped, norm, 0.5)
    for a, b in zip(clipped, grads, strict=True):
        torch.testing.assert_close(a, (b.float() * float(0.5 / (norm + 1e-6))).to(b.dtype), rtol=1e-2, atol=0)
