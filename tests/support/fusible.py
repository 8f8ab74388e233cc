"""Models that fuse() can fuse, and checks of fused ones."""

import contextlib

import torch
from torch import nn

import dlkit
from support.training import assert_same_training


def randomised(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def fused_layers(model):
    kinds = (dlkit.nn.BatchNormReLU1d, dlkit.nn.BatchNormReLU2d, dlkit.nn.BatchNormReLU3d, dlkit.nn.SyncBatchNormReLU)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def assert_same_results(model, fused, x):
    """Compares in training, then in evaluation with and without gradients."""
    assert_same_training(model, fused, x)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))


@contextlib.contextmanager
def counting(calls):
    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    with Count():
        yield


class Block(nn.Module):
    """One BatchNorm; the subclasses differ in the code around it."""

    def __init__(self):
        super().__init__()
        self.bn, self.relu, self.conv = nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)
        self.rate, self.kept, self.options = 0.0, None, {"act": True}

    def __init_subclass__(cls, reason=None, **kwargs):
        super().__init_subclass__(**kwargs)
        if reason:
            LEFT[cls] = reason


LEFT: dict = {}


def hooked(register, cls=nn.BatchNorm2d):
    layer = cls(4)
    getattr(layer, register)(lambda *_: None)
    return layer


class Plain(nn.Module):
    def __init__(self, bn=None, relu=None):
        super().__init__()
        self.bn, self.relu = bn or nn.BatchNorm2d(4), relu or nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(x))
