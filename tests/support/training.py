"""The comparison for tests of dlkit.replace() and dlkit.fuse()."""

import torch


def assert_same_training(one, other, x, modes=(True, True, False)):
    """Compares results, gradients and buffers of two modules over training steps and evaluation."""
    for training in modes:
        results = []
        for module in (one.train(training), other.train(training)):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            (y * torch.linspace(0, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
            results.append([y, leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()])
        torch.testing.assert_close(results[1], results[0])
