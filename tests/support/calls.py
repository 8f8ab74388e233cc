"""One call of every layer function, for tests that run over all of them."""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as native
from torch import Tensor

import dlkit.functional as fused
from dlkit._activation import ACTIVATIONS, activated
from support import of_ops


@dataclasses.dataclass(frozen=True)
class Call:
    """``function(F, *tensors)`` with ``F`` dlkit.functional or REFERENCE. A shape has a letter for each dimension."""

    function: Callable
    shapes: tuple[str, ...]
    native: Callable | None = None  # called with the tensors, where REFERENCE has no such function

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """dlkit's results."""
        return as_tuple(self.function(fused, *tensors))

    def reference(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """torch's results; only for functions that draw nothing."""
        return as_tuple(self.native(*tensors) if self.native else self.function(REFERENCE, *tensors))

    def tensors(self, sizes: dict[str, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn([sizes[letter] for letter in shape]).to(dtype).requires_grad_() for shape in self.shapes]


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def results_and_gradients(call: Callable, tensors: list[Tensor]) -> list[Tensor]:
    """Results of ``call``, and the gradients of their weighted sum, with a different weight for each element."""
    results = call(*tensors)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    total = sum((y * torch.linspace(0, 1, y.numel()).view(y.shape)).sum() for y in results)
    return [*results, *(g for g in torch.autograd.grad(total, wanted, allow_unused=True) if g is not None)]


def _add_layer_norm(input, residual, normalized_shape, weight, bias):
    return native.layer_norm(input + residual, normalized_shape, weight, bias), input + residual


def _add_rms_norm(input, residual, normalized_shape, weight):
    return native.rms_norm(input + residual, normalized_shape, weight), input + residual


def _batch_norm_relu(*arguments, residual=None):
    y = native.batch_norm(*arguments)
    return native.relu(y if residual is None else y + residual)


def _batch_norm_act(*arguments, residual=None, activation="silu"):
    y = native.batch_norm(*arguments)
    return activated(y if residual is None else y + residual, ACTIVATIONS[activation], 0.01)


def _group_norm_act(*arguments, residual=None, activation="silu"):
    y = native.group_norm(*arguments)
    return activated(y if residual is None else y + residual, ACTIVATIONS[activation], 0.01)


REFERENCE = SimpleNamespace(
    layer_norm=native.layer_norm,
    rms_norm=native.rms_norm,
    batch_norm=native.batch_norm,
    group_norm=native.group_norm,
    instance_norm=native.instance_norm,
    add_layer_norm=_add_layer_norm,
    add_rms_norm=_add_rms_norm,
    batch_norm_relu=_batch_norm_relu,
    batch_norm_act=_batch_norm_act,
    group_norm_act=_group_norm_act,
    bias_gelu_dropout=lambda input, bias, p: native.gelu(input + bias),
    bias_relu_dropout=lambda input, bias, p: native.relu(input + bias),
    cross_entropy=native.cross_entropy,
    linear_cross_entropy=lambda x, w, target, linear_bias: native.cross_entropy(
        native.linear(x, w, linear_bias), target
    ),
)


def _running(mean: Tensor) -> tuple[Tensor, Tensor]:
    return mean.detach().clone(), mean.detach().square() + 0.5


def _with_running(norm: Callable) -> Callable:
    """Adds the running statistics that ``norm`` updates to its results."""

    def function(F, x, mean, weight, bias):
        running = _running(mean)
        return norm(F)(x, *running, weight, bias, True), *running

    return function


def _classes(x: Tensor, count: int | None = None) -> Tensor:
    """Targets of every class in turn."""
    shape = [*x.shape[:1], *x.shape[2:]] if count is None else [x.shape[0]]
    rows = torch.arange(math.prod(shape), device=x.device)
    return (rows % (x.shape[1] if count is None else count)).view(shape)


NORMS = {
    "layer_norm": Call(lambda F, x, w, b: F.layer_norm(x, w.shape, w, b), ("NLC", "C", "C")),
    "layer_norm, two dimensions": Call(lambda F, x, w, b: F.layer_norm(x, w.shape, w, b), ("NLC", "LC", "LC")),
    "rms_norm": Call(lambda F, x, w: F.rms_norm(x, w.shape, w), ("NLC", "C")),
    "add_layer_norm": Call(lambda F, x, r, w, b: F.add_layer_norm(x, r, w.shape, w, b), ("NLC", "NLC", "C", "C")),
    "add_layer_norm, broadcast": Call(
        lambda F, x, r, w, b: F.add_layer_norm(x, r, w.shape, w, b), ("NLC", "LC", "C", "C")
    ),
    "add_rms_norm": Call(lambda F, x, r, w: F.add_rms_norm(x, r, w.shape, w), ("NLC", "NLC", "C")),
    "batch_norm": Call(lambda F, x, w, b: F.batch_norm(x, None, None, w, b, True), ("NCL", "C", "C")),
    "batch_norm, running": Call(_with_running(lambda F: F.batch_norm), ("NCL", "C", "C", "C")),
    "batch_norm, evaluation": Call(
        lambda F, x, m, w, b: F.batch_norm(x, *_running(m), w, b, False), ("NCLL", "C", "C", "C")
    ),
    "batch_norm_relu": Call(lambda F, x, w, b: F.batch_norm_relu(x, None, None, w, b, True), ("NCL", "C", "C")),
    "batch_norm_relu, residual": Call(
        lambda F, x, r, w, b: F.batch_norm_relu(x, None, None, w, b, True, residual=r), ("NCLL", "NCLL", "C", "C")
    ),
    "batch_norm_act": Call(lambda F, x, w, b: F.batch_norm_act(x, None, None, w, b, True), ("NCL", "C", "C")),
    "batch_norm_act, residual": Call(
        lambda F, x, r, w, b: F.batch_norm_act(x, None, None, w, b, True, residual=r, activation="gelu"),
        ("NCLL", "NCLL", "C", "C"),
    ),
    "group_norm": Call(lambda F, x, w, b: F.group_norm(x, 2, w, b), ("NCL", "C", "C")),
    "group_norm_act": Call(lambda F, x, w, b: F.group_norm_act(x, 2, w, b), ("NCL", "C", "C")),
    "group_norm_act, residual": Call(
        lambda F, x, r, w, b: F.group_norm_act(x, 2, w, b, residual=r, activation="gelu_tanh"),
        ("NCLL", "NCLL", "C", "C"),
    ),
    "instance_norm": Call(lambda F, x, w, b: F.instance_norm(x, None, None, w, b), ("NCL", "C", "C")),
    "instance_norm, running": Call(_with_running(lambda F: F.instance_norm), ("NCL", "C", "C", "C")),
    "instance_norm, evaluation": Call(
        lambda F, x, m, w, b: F.instance_norm(x, *_running(m), w, b, False), ("NCL", "C", "C", "C")
    ),
    "bias_gelu": Call(lambda F, x, b: F.bias_gelu_dropout(x, b, 0.0), ("NLC", "C")),
    "cross_entropy": Call(lambda F, x: F.cross_entropy(x, _classes(x), label_smoothing=0.1), ("NCL",)),
    "cross_entropy, none": Call(lambda F, x: F.cross_entropy(x, _classes(x), reduction="none"), ("NC",)),
    "cross_entropy, probabilities": Call(lambda F, x, t: F.cross_entropy(x, t.detach().sigmoid()), ("NCL", "NCL")),
    "linear_cross_entropy": Call(
        lambda F, x, w, b: F.linear_cross_entropy(x, w, _classes(x, w.shape[0]), linear_bias=b), ("NC", "LC", "L")
    ),
    "bias_relu": Call(lambda F, x, b: F.bias_relu_dropout(x, b, 0.0), ("NLC", "C")),
}
# The last keyword arguments reach the call: a generator.
RANDOM = {
    "dropout": Call(lambda F, x, **more: F.dropout(x, 0.5, **more), ("NLC",)),
    "dropout, in place": Call(lambda F, x, **more: F.dropout(x * 1, 0.5, inplace=True, **more), ("NLC",)),
    "dropout1d": Call(lambda F, x, **more: F.dropout1d(x, 0.5, **more), ("NCL",)),
    "dropout2d": Call(lambda F, x, **more: F.dropout2d(x, 0.5, **more), ("NCLL",)),
    "dropout3d": Call(lambda F, x, **more: F.dropout3d(x, 0.5, **more), ("NCLLL",)),
    "alpha_dropout": Call(lambda F, x, **more: F.alpha_dropout(x, 0.5, True, **more), ("NLC",)),
    "feature_alpha_dropout": Call(lambda F, x, **more: F.feature_alpha_dropout(x, 0.5, True, **more), ("NCL",)),
    "drop_path": Call(lambda F, x, **more: F.drop_path(x, 0.5, **more), ("NLC",)),
    "dropout_add": Call(lambda F, x, r, **more: F.dropout_add(x, r, 0.5, **more), ("NLC", "NLC")),
    "dropout_add, broadcast": Call(lambda F, x, r, **more: F.dropout_add(x, r, 0.5, **more), ("NLC", "LC")),
    "dropout_add_layer_norm": Call(
        lambda F, x, r, w, b, **more: F.dropout_add_layer_norm(x, r, w.shape, w, b, prenorm=True, **more),
        ("NLC", "NLC", "C", "C"),
    ),
    "dropout_add_rms_norm": Call(
        lambda F, x, r, w, **more: F.dropout_add_rms_norm(x, r, w.shape, w, prenorm=True, **more),
        ("NLC", "NLC", "C"),
    ),
    "bias_gelu_dropout": Call(lambda F, x, b, **more: F.bias_gelu_dropout(x, b, 0.5, **more), ("NLC", "C")),
    "bias_relu_dropout": Call(lambda F, x, b, **more: F.bias_relu_dropout(x, b, 0.5, **more), ("NLC", "C")),
}
NORMS |= {name: Call(*row) for name, row in of_ops.table("OP_CALLS").items()}
RANDOM |= {name: Call(*row) for name, row in of_ops.table("OP_RANDOM").items()}
CALLS = NORMS | RANDOM
