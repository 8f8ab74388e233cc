"""Checks of one's own BatchNorm, LayerNorm, Dropout or optimizer: whether it is right, and if not, what is wrong.

    from dlkit.lab import checks
    checks.run(BatchNorm=MyBatchNorm, LayerNorm=MyLayerNorm, Dropout=MyDropout, optimizer=MyAdam)

The yardstick is torch's definition, computed in float64. A result that differs is compared with the formulas of known
mistakes, alone and together, those with the fewest mistakes first; the message is that of the formulas that give it.

What a class looks like. It may be a ``torch.nn.Module`` or a plain class, on torch tensors or on NumPy arrays; which of
the two is told from the arrays that an instance holds, else from the names that its methods use.

* A layer is called: ``layer(x)`` or ``layer.forward(x)``. Its mode is set by ``layer.train()`` and ``layer.eval()``, or
  by ``layer.training``, or given as ``layer(x, training=True)``. Gradients are autograd's, or those that
  ``layer.backward(grad_output)`` returns; without either they are not checked.
* ``BatchNorm(num_features, eps=1e-5, momentum=0.1)`` takes ``[batch, features]`` and has ``weight`` and ``bias`` (or
  ``gamma`` and ``beta``), ``running_mean`` and ``running_var``.
* ``LayerNorm(normalized_shape, eps=1e-5)`` takes ``[*, features]`` and has ``weight`` and ``bias`` likewise.
* ``Dropout(p=0.5)``: ``p`` is the probability that an element becomes 0.
* An optimizer has one of the names of :data:`RULES` within its own, else say ``rule=``. Either
  ``Optimizer(params, lr=...)`` with ``step()`` reads ``param.grad`` of torch parameters, or ``Optimizer(lr=...)`` with
  ``step(params, grads)`` takes two lists of NumPy arrays, changes them in place or returns the new ones. ``betas``,
  ``eps``, ``momentum``, ``alpha`` and ``weight_decay`` are those of ``torch.optim``; one that it does not take is not
  checked.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Array = np.ndarray

RULES = ("adamw", "adam", "rmsprop", "sgd")  # found in a class's name in this order

WEIGHT, BIAS = ("weight", "gamma", "scale"), ("bias", "beta", "shift")
RUNNING_MEAN, RUNNING_VAR = ("running_mean", "moving_mean"), ("running_var", "moving_var", "running_variance")
# What optimizers of one's own call their arguments, and the value that is given here. Large: each has its part.
NAMES = {
    "lr": ("lr", "learning_rate", "alpha"),
    "betas": ("betas",),
    "beta1": ("beta1", "beta_1"),
    "beta2": ("beta2", "beta_2"),
    "eps": ("eps", "epsilon"),
    "momentum": ("momentum",),
    "alpha": ("alpha", "rho", "decay_rate", "decay"),
    "weight_decay": ("weight_decay", "wd", "decay"),
}


@dataclass(frozen=True)
class Finding:
    """``message`` is empty where ``check`` of ``subject`` was passed."""

    subject: str
    check: str
    message: str = ""


@dataclass
class Report:
    """What :func:`run` found. ``str(report)`` has a line for each check."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.messages

    @property
    def messages(self) -> list[str]:
        """What is wrong, each thing once."""
        return list(dict.fromkeys(f"{each.subject}: {each.message}" for each in self.findings if each.message))

    def __str__(self) -> str:
        lines = []
        for each in self.findings:
            lines.append(f"{'wrong' if each.message else 'right':<6}{each.subject}: {each.check}")
            if each.message:
                lines.append(f"      {each.message}")
        wrong = len(self.messages)
        lines.append("All right." if not wrong else f"{wrong} thing{'s' * (wrong > 1)} to mend.")
        return "\n".join(lines)


def run(
    *,
    BatchNorm: Callable[..., Any] | None = None,
    LayerNorm: Callable[..., Any] | None = None,
    Dropout: Callable[..., Any] | None = None,
    optimizer: Callable[..., Any] | None = None,
    rule: str | None = None,
    show: Callable[[str], Any] | None = print,
) -> Report:
    """Checks implementations of one's own against torch's definitions in float64.

    Args:
        BatchNorm: a class to check, as this module's text describes it; None: there is none.
        LayerNorm: likewise.
        Dropout: likewise.
        optimizer: likewise.
        rule: which of :data:`RULES` the optimizer is (default: the one in its name).
        show: is called with the report as text; None: nothing is shown.

    Returns:
        The :class:`Report`: ``report.ok``, and ``report.messages`` with what is wrong.

    Raises:
        ValueError: nothing to check, or an optimizer of no known rule.
    """
    report = Report()
    layers = {
        "BatchNorm": (BatchNorm, _batch_norm),
        "LayerNorm": (LayerNorm, _layer_norm),
        "Dropout": (Dropout, _dropout),
    }
    if optimizer is None and all(given is None for given, _ in layers.values()):
        raise ValueError("checks.run(): expected at least one of BatchNorm=, LayerNorm=, Dropout=, optimizer=")
    if optimizer is not None:
        name = getattr(optimizer, "__name__", type(optimizer).__name__)
        rule = rule or next((each for each in RULES if each in name.lower()), None)
        if rule not in RULES:
            raise ValueError(f"checks.run(): expected rule to be one of {', '.join(RULES)}, got {rule} for {name}")
    for name, (given, check) in layers.items():
        if given is not None:
            _collect(report, name, check(given))
    if optimizer is not None and rule is not None:
        _collect(report, type(optimizer).__name__ if not hasattr(optimizer, "__name__") else optimizer.__name__,
                 _optimizer(optimizer, rule))  # fmt: skip
    if show is not None:
        show(str(report))
    return report


class _Stop(Exception):
    """Nothing more can be checked; the text is the last message."""


def _collect(report: Report, subject: str, findings: Iterator[tuple[str, list[str]]]) -> None:
    """Runs the checks of one class: each gives its name and what is wrong."""
    try:
        for check, messages in findings:
            report.findings += [Finding(subject, check, message) for message in messages] or [Finding(subject, check)]
    except _Stop as stop:
        report.findings.append(Finding(subject, "can be used", str(stop)))


# What a wrong formula looks like.


@dataclass(frozen=True)
class Choice:
    """A point at which a formula can go wrong: the right way, and (wrong way, what it is called)."""

    right: Any
    wrong: tuple[tuple[Any, str], ...]


def _same(got: Any, expected: Array) -> bool:
    got = np.asarray(got, np.float64)
    if got.shape != expected.shape or not np.isfinite(got).all():
        return False
    return float(np.abs(got - expected).max(initial=0.0)) <= 1e-4 * float(np.abs(expected).max(initial=0.0)) + 1e-12


def _explain(
    got: Array, formula: Callable[..., Array], choices: Mapping[str, Choice], what: str, most: int = 3
) -> list[str]:
    """What is wrong with ``got``: [] if it is ``formula`` with all choices right."""
    right = {name: choice.right for name, choice in choices.items()}
    expected = formula(**right)
    if np.shape(got) != expected.shape:
        return [f"{what} has the shape {tuple(np.shape(got))}, expected {expected.shape}"]
    if _same(got, expected):
        return []
    for count in range(1, most + 1):
        for names in itertools.combinations(choices, count):
            for wrong in itertools.product(*(choices[name].wrong for name in names)):
                with np.errstate(all="ignore"):
                    result = formula(**{**right, **{name: each[0] for name, each in zip(names, wrong, strict=True)}})
                if np.isfinite(result).all() and _same(got, result):
                    return [each[1] for each in wrong]
    got = np.asarray(got, np.float64)
    if not np.isfinite(got).all():
        return [
            f"{what} is not finite: {np.count_nonzero(~np.isfinite(got))} of {got.size} numbers are NaN or infinite"
        ]
    worst = np.unravel_index(np.abs(got - expected).argmax(), expected.shape)
    return [
        f"{what} differs from the reference, and no known mistake explains it; the largest difference: expected "
        f"{expected[worst]:.6g}, got {got[worst]:.6g} at {tuple(map(int, worst))}"
    ]


# How a class is used.


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def _takes(function: Callable[..., Any], names: Sequence[str]) -> str | None:
    """The first of ``names`` that is an argument of the function."""
    parameters = _parameters(function)
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return names[0]
    return next((name for name in names if name in parameters), None)


def _array(value: Any) -> Array:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    return np.array(value, np.float64)


def _names_used(cls: Any) -> set[str]:
    """Global names that the methods of a class use: np and torch are among them."""
    bases = inspect.getmro(cls) if inspect.isclass(cls) else ()
    methods = [each for base in bases for each in vars(base).values() if inspect.isfunction(each)] or [cls]
    return {name for method in methods if hasattr(method, "__code__") for name in method.__code__.co_names}


class _Layer:
    """An instance of the class to check."""

    def __init__(self, cls: Callable[..., Any], *args: Any, **options: float) -> None:
        self.options = {name: value for name, value in options.items() if _takes(cls, (name,))}
        try:
            self.layer = cls(*args, **self.options)
        except Exception as error:
            raise _Stop(f"making it with {self._text(*args, **self.options)} raised {_error(error)}") from error
        held = [*vars(self.layer).values()] if hasattr(self.layer, "__dict__") else []
        names = _names_used(cls)
        if isinstance(self.layer, torch.nn.Module) or any(isinstance(each, torch.Tensor) for each in held):
            self.torch = True
        elif any(isinstance(each, np.ndarray) for each in held):
            self.torch = False
        else:
            self.torch = not names & {"np", "numpy"}
        self.call = self.layer if callable(self.layer) else getattr(self.layer, "forward", None)
        if self.call is None:
            raise _Stop("cannot be called: it needs __call__ or forward")
        self.flag = None
        function = getattr(self.layer, "forward", self.call) if isinstance(self.layer, torch.nn.Module) else self.call
        explicit = [name for name in ("training", "train", "is_training") if name in _parameters(function)]
        switched = all(callable(getattr(self.layer, name, None)) for name in ("train", "eval"))
        if not switched and not hasattr(self.layer, "training"):
            self.flag = explicit[0] if explicit else None
        self.has_mode = switched or hasattr(self.layer, "training") or self.flag is not None
        self.training = True

    @staticmethod
    def _text(*args: Any, **options: Any) -> str:
        return ", ".join([*map(repr, args), *(f"{name}={value}" for name, value in options.items())]) or "no arguments"

    def mode(self, training: bool) -> None:
        self.training = training
        if self.flag is not None:
            return
        change = getattr(self.layer, "train" if training else "eval", None)
        if callable(change):
            change()
        elif hasattr(self.layer, "training"):
            self.layer.training = training

    def __call__(self, x: Array) -> Array:
        """The output in float64; the input is float32. Raises _Stop where the class raises, or changes its input."""
        given: Any = np.asarray(x, np.float32)
        if self.torch:
            self.input: Any = torch.tensor(given, requires_grad=True)
            given = self.input * 1  # no leaf: one that works in place is told by the comparison below, not by autograd
        options = {self.flag: self.training} if self.flag else {}
        before = _array(given)
        assert self.call is not None
        try:
            self.output = self.call(given, **options)
        except Exception as error:
            where = "training" if self.training else "evaluation"
            raise _Stop(f"calling it with an array of shape {x.shape} in {where} raised {_error(error)}") from error
        if not isinstance(self.output, (torch.Tensor, np.ndarray)):
            raise _Stop(f"returns a {type(self.output).__name__}, expected an array")
        if not np.array_equal(before, _array(given)):
            raise _Stop("changes its input in place")
        return _array(self.output)

    def gradient(self, grad_output: Array) -> Array | None:
        """Of the last call's input; None where the class has none."""
        try:
            if isinstance(self.output, torch.Tensor) and self.output.requires_grad:
                given = torch.tensor(grad_output, dtype=self.output.dtype)
                (grad,) = torch.autograd.grad(self.output, self.input, given, allow_unused=True)
                return np.zeros_like(grad_output) if grad is None else _array(grad)
            if callable(getattr(self.layer, "backward", None)):
                arrays = torch.tensor if self.torch else np.array
                result = self.layer.backward(arrays(grad_output.astype(np.float32)))
                return _array(result[0] if isinstance(result, tuple) else result)
        except Exception as error:
            raise _Stop(f"its backward pass raised {_error(error)}") from error
        return None

    def _raw(self, names: Sequence[str]) -> Any:
        return next((getattr(self.layer, name) for name in names if hasattr(self.layer, name)), None)

    def get(self, names: Sequence[str]) -> Array | None:
        value = self._raw(names)
        return None if value is None or callable(value) else _array(value)

    def set(self, names: Sequence[str], value: Array) -> bool:
        held = self._raw(names)
        if isinstance(held, torch.Tensor):
            with torch.no_grad():
                held.copy_(torch.as_tensor(value).reshape(held.shape))
        elif isinstance(held, np.ndarray) and held.size == value.size:
            held[...] = value.reshape(held.shape)
        else:
            return False
        return True


def _error(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    if "leaf Variable" in text:
        text += " (change parameters under torch.no_grad())"
    return text


# Norms.


def _scaled(
    x: Array, mean: Array, var: Array, eps: float, place: str, centred: bool, root: bool, affine: str, weight: Array,
    bias: Array,
) -> Array:  # fmt: skip
    """weight * (x - mean) / sqrt(var + eps) + bias, and how it can go wrong."""
    scale = {"inside": np.sqrt(var + eps), "outside": np.sqrt(var) + eps, "none": np.sqrt(var)}[place]
    y = (x - mean if centred else x) / (scale if root else var + eps)
    if affine == "swapped":
        return (y + bias) * weight
    return y * (weight if affine in ("both", "no bias") else 1) + (bias if affine in ("both", "no weight") else 0)


def _normalize(x: Array, axes: Any, ddof: int, *rest: Any) -> Array:
    return _scaled(x, x.mean(axes, keepdims=True), x.var(axes, ddof=ddof, keepdims=True), *rest)


def _norm_choices(axes: Choice) -> dict[str, Choice]:
    return {
        "axes": axes,
        "ddof": Choice(0, ((1, "the variance is the unbiased one, divided by n - 1; normalization divides by n"),)),
        "place": Choice("inside", (
            ("outside", "eps is added to the standard deviation; it belongs inside the root: sqrt(var + eps)"),
            ("none", "eps is not used: a constant input would be divided by 0"),
        )),
        "centred": Choice(True, ((False, "the mean is not subtracted"),)),
        "root": Choice(True, ((False, "divides by the variance; it should be by its square root"),)),
        "affine": Choice("both", (
            ("none", "weight and bias are not applied"),
            ("no bias", "the bias is not added"),
            ("no weight", "the weight is not applied"),
            ("swapped", "the bias is added before the weight multiplies; it should be after: x * weight + bias"),
        )),
    }  # fmt: skip


def _norm_gradient(x: Array, g: Array, axes: Any, eps: float, weight: Array, through: str, scaled: bool) -> Array:
    """Of sum(g * norm(x)) by x, with the statistics or some of them taken as constants."""
    if scaled:
        g = g * weight
    mean, rstd = x.mean(axes, keepdims=True), 1 / np.sqrt(x.var(axes, keepdims=True) + eps)
    y = (x - mean) * rstd
    result = g
    if through in ("both", "mean"):
        result = result - g.mean(axes, keepdims=True)
    if through in ("both", "variance"):
        result = result - y * (g * y).mean(axes, keepdims=True)
    return result * rstd


GRADIENT_CHOICES = {
    "through": Choice("both", (
        ("none", "the gradient takes mean and variance as constants; both depend on the input"),
        ("mean", "the gradient takes the variance as a constant; it depends on the input"),
        ("variance", "the gradient takes the mean as a constant; it depends on the input"),
    )),
    "scaled": Choice(True, ((False, "the gradient of the input lacks the factor weight"),)),
}  # fmt: skip


def _affine(layer: _Layer, features: int, random: np.random.Generator) -> tuple[Array, Array, list[str]]:
    """Sets weight and bias to numbers other than 1 and 0 where the class has them."""
    weight, bias = random.uniform(0.5, 2.0, features), random.uniform(-1.0, 1.0, features)
    missing = []
    if not layer.set(WEIGHT, weight):
        weight = np.ones(features)
        missing.append("has no array `weight` (or `gamma`)")
    if not layer.set(BIAS, bias):
        bias = np.zeros(features)
        missing.append("has no array `bias` (or `beta`)")
    return weight, bias, missing


def _gradients(
    layer: _Layer, x: Array, axes: Any, eps: float, weight: Array, g: Array
) -> Iterator[tuple[str, list[str]]]:
    got = layer.gradient(g)
    if got is None:
        return

    def formula(through: str, scaled: bool) -> Array:
        return _norm_gradient(x, g, axes, eps, weight, through, scaled)

    yield "gradient of the input", _explain(got, formula, GRADIENT_CHOICES, "the gradient of the input")


def _stable(layer: _Layer, shape: tuple[int, ...], axes: Any, weight: Array, bias: Array) -> list[str]:
    """A mean of 10,000 over a deviation of 1: exact to 1e-3 by the deviations, lost in E[x^2] - E[x]^2."""
    x = (1e4 + np.random.default_rng(5).standard_normal(shape)).astype(np.float32).astype(np.float64)
    layer.mode(True)
    expected = _normalize(x, axes, 0, 1e-5, "inside", True, True, "both", weight, bias)
    got = layer(x)
    if np.isfinite(got).all() and np.abs(got - expected).max() < 0.05:
        return []
    return [
        "loses its digits where the mean is large: the variance is to be the mean of (x - mean)^2; E[x^2] - E[x]^2 "
        "cancels"
    ]


def _eps_and_scale(layer: _Layer, default: float = 1e-5) -> tuple[float, float]:
    """(eps, the deviation of the input): the variance is about eps, so that its place is seen."""
    eps = layer.options.get("eps", default)
    return eps, float(np.sqrt(eps))


def _layer_norm(cls: Callable[..., Any]) -> Iterator[tuple[str, list[str]]]:
    random = np.random.default_rng(0)
    features = 6
    layer = _Layer(cls, features, eps=0.04)
    eps, scale = _eps_and_scale(layer)
    weight, bias, missing = _affine(layer, features, random)
    yield "weight and bias", missing
    axes = Choice((-1,), (
        ((0,), "normalizes over the batch (axis 0); it should be over the last axis, each sample by itself"),
        (None, "normalizes over the whole array; it should be over the last axis, each sample by itself"),
    ))  # fmt: skip

    def outputs(x: Array, training: bool, axes: Choice) -> list[str]:
        layer.mode(training)

        def formula(axes: Any, ddof: int, place: str, centred: bool, root: bool, affine: str) -> Array:
            return _normalize(x, axes, ddof, eps, place, centred, root, affine, weight, bias)

        return _explain(layer(x), formula, _norm_choices(axes), "the output")

    x = _rounded(scale * (random.standard_normal((8, features)) + random.standard_normal((8, 1))))
    wrong = outputs(x, True, axes)
    yield "output for [batch, features]", wrong
    if wrong:
        return
    g = random.standard_normal(x.shape)
    yield from _gradients(layer, x, (-1,), eps, weight, g)
    if layer.has_mode:
        yield "output in evaluation", outputs(x, False, axes)
    deep = Choice((-1,), (
        ((1,), "normalizes over axis 1; it should be the last axis, whatever the number of axes"),
        ((1, 2), "normalizes over all axes but the first; it should be the last axis alone"),
    ))  # fmt: skip
    x = _rounded(scale * (random.standard_normal((4, 5, features)) + random.standard_normal((4, 5, 1))))
    yield "output for [batch, tokens, features]", outputs(x, True, deep)
    yield "a large mean", _stable(_fresh(cls, features, weight, bias), (8, features), (-1,), weight, bias)


def _rounded(x: Array) -> Array:
    """The numbers as the class sees them: in fp32."""
    return x.astype(np.float32).astype(np.float64)


def _fresh(cls: Callable[..., Any], features: int, weight: Array, bias: Array) -> _Layer:
    layer = _Layer(cls, features)
    layer.set(WEIGHT, weight)
    layer.set(BIAS, bias)
    return layer


def _batch_norm(cls: Callable[..., Any]) -> Iterator[tuple[str, list[str]]]:
    random = np.random.default_rng(1)
    batch, features = 8, 5
    layer = _Layer(cls, features, eps=0.04, momentum=0.3)
    eps, scale = _eps_and_scale(layer)
    momentum = layer.options.get("momentum", 0.1)
    weight, bias, missing = _affine(layer, features, random)
    running = [layer.get(names) for names in (RUNNING_MEAN, RUNNING_VAR)]
    missing += [
        f"has no array `{names[0]}`"
        for names, value in zip((RUNNING_MEAN, RUNNING_VAR), running, strict=True)
        if value is None
    ]
    if not layer.has_mode:
        missing.append(
            "has no train() and eval(), no `training`, and takes no training=: its two modes cannot be told apart"
        )
    yield "weight, bias, running statistics and modes", missing

    axes = Choice((0,), (
        ((1,), "normalizes each sample over its features (that is LayerNorm); it should be over the batch, axis 0"),
        (None, "normalizes over the whole array; it should be over the batch, axis 0, each feature by itself"),
    ))  # fmt: skip
    x = _rounded(scale * (random.standard_normal((batch, features)) + 2 * random.standard_normal(features)))
    layer.mode(True)

    def training(axes: Any, ddof: int, place: str, centred: bool, root: bool, affine: str) -> Array:
        return _normalize(x, axes, ddof, eps, place, centred, root, affine, weight, bias)

    choices = _norm_choices(axes)
    got = layer(x)
    uses_running = _same(got, _scaled(x, np.zeros(1), np.ones(1), eps, "inside", True, True, "both", weight, bias))
    wrong = (
        ["training normalizes by the running statistics; it should be by those of the batch"]
        if uses_running and layer.has_mode
        else _explain(got, training, choices, "the output")
    )
    yield "output in training", wrong
    if not wrong:
        yield from _gradients(layer, x, (0,), eps, weight, random.standard_normal(x.shape))
    if all(value is not None for value in running) and layer.has_mode:
        yield "running statistics", _running_messages(layer, x, momentum)
        yield "output in evaluation", _evaluation_messages(layer, scale, eps, weight, bias, wrong)
    if not wrong:
        yield "a large mean", _stable(_fresh(cls, features, weight, bias), (32, features), (0,), weight, bias)


def _running_messages(layer: _Layer, x: Array, momentum: float) -> list[str]:
    """After one step in training. Statistics in any shape of the right size count."""
    mean, var = (np.asarray(layer.get(names)).reshape(-1) for names in (RUNNING_MEAN, RUNNING_VAR))
    if mean.size != x.shape[1] or var.size != x.shape[1]:
        return [
            f"running_mean and running_var have {mean.size} and {var.size} elements, expected one a feature: "
            f"{x.shape[1]}"
        ]
    if not mean.any() and np.ptp(var) == 0:
        return ["training does not update the running statistics"]
    direction = Choice(1 - momentum, ((
        momentum,
        "momentum is the wrong way round: torch's is the part of the new value, running = (1 - momentum) * running + "
        "momentum * batch",
    ),))  # fmt: skip
    start = Choice(1.0, ((0.0, "running_var begins at 0; it should begin at 1"),))
    ddof = Choice(1, ((
        0, "running_var takes the biased variance; torch puts the unbiased one there, divided by n - 1",
    ),))  # fmt: skip
    of_mean = _explain(mean, lambda keep: (1 - keep) * x.mean(0), {"keep": direction}, "running_mean")
    of_var = _explain(
        var,
        lambda keep, start, ddof: keep * start + (1 - keep) * x.var(0, ddof=ddof),
        {"keep": direction, "start": start, "ddof": ddof},
        "running_var",
    )
    return list(dict.fromkeys(of_mean + of_var))


def _evaluation_messages(
    layer: _Layer, scale: float, eps: float, weight: Array, bias: Array, known: list[str]
) -> list[str]:
    """By the running statistics that the class holds itself, so that one mistake is told once."""
    random = np.random.default_rng(3)
    # Small, so that the place of eps is seen.
    layer.set(RUNNING_MEAN, scale * random.standard_normal(weight.size))
    layer.set(RUNNING_VAR, eps * random.uniform(0.5, 2.0, weight.size))
    mean, var = (np.asarray(layer.get(names)).reshape(-1) for names in (RUNNING_MEAN, RUNNING_VAR))
    x = _rounded(scale * (random.standard_normal((7, weight.size)) + 1))
    layer.mode(False)
    got = layer(x)
    after = [np.asarray(layer.get(names)).reshape(-1) for names in (RUNNING_MEAN, RUNNING_VAR)]
    messages = []
    if not (np.array_equal(after[0], mean) and np.array_equal(after[1], var)):
        messages.append("evaluation changes the running statistics")
        if not _same(got, _scaled(x, mean, var, eps, "inside", True, True, "both", weight, bias)):
            mean, var = after  # it normalizes by what it has just changed

    def formula(place: str, centred: bool, root: bool, affine: str) -> Array:
        return _scaled(x, mean, var, eps, place, centred, root, affine, weight, bias)

    choices = {name: choice for name, choice in _norm_choices(Choice((0,), ())).items() if name not in ("axes", "ddof")}
    wrong = _explain(got, formula, choices, "the output in evaluation")
    for ddof, place, affine in itertools.product((0, 1), ("inside", "outside", "none"), ("both", "none")):
        if wrong and _same(got, _normalize(x, (0,), ddof, eps, place, True, True, affine, weight, bias)):
            wrong = ["evaluation normalizes by the batch; it should be by the running statistics"]
    return messages + [message for message in wrong if message not in known]


# Dropout.


def _dropout(cls: Callable[..., Any]) -> Iterator[tuple[str, list[str]]]:
    p, shape = 0.3, (200, 100)
    layer = _Layer(cls, p=p) if _takes(cls, ("p",)) else _Layer(cls, p)
    x = _rounded(np.random.default_rng(2).uniform(1.0, 2.0, shape))
    missing = [] if layer.has_mode else [
        "has no train() and eval(), no `training`, and takes no training=: its two modes cannot be told apart"
    ]  # fmt: skip
    yield "modes", missing

    layer.mode(True)
    y = layer(x)
    if y.shape != x.shape:
        raise _Stop(f"the output has the shape {y.shape}, expected {x.shape}")
    kept = y != 0
    grad = None if _same(y, x) else layer.gradient(np.ones(shape))
    again = layer(x)
    evaluated = x
    if layer.has_mode:
        layer.mode(False)
        evaluated = layer(x)
    identity = _same(y, x)
    off = _same(evaluated, x)

    training, evaluation = _dropout_messages(p, x, y, kept, evaluated, identity, off)
    if not identity:
        if np.array_equal(kept, again != 0):
            training.append("every call drops the same elements: a mask is to be drawn anew at each call")
        if (kept == kept[:1]).all() or (kept == kept[:, :1]).all():
            training.append("one mask serves the whole batch: each element is to be drawn by itself")
    yield "output in training", training
    if layer.has_mode:
        yield "output in evaluation", evaluation
    if grad is not None and not training:
        yield "gradient of the input", _dropout_gradient(p, grad, kept)
    if not training:
        yield "p = 0 and p = 1", _dropout_limits(cls, x)


def _close(a: float, b: float, by: float = 0.02) -> bool:
    return abs(a - b) < by  # of 20,000 draws at p = 0.3: six deviations


def _dropout_messages(
    p: float, x: Array, y: Array, kept: Array, evaluated: Array, identity: bool, off: bool
) -> tuple[list[str], list[str]]:
    """(what is wrong in training, what is wrong in evaluation)"""
    if identity and not off:
        return ["training and evaluation are the wrong way round: it drops in evaluation and not in training"], []
    if identity:
        return ["training leaves the input as it is: nothing is dropped"], []
    training, evaluation = [], []
    dropped = 1 - kept.mean()
    if _close(dropped, 1 - p):
        training.append("p is taken as the probability to keep; it is the probability to drop")
    elif not _close(dropped, p):
        training.append(f"drops {dropped:.3f} of the elements, expected p = {p}")
    # Where the rate is the layer's own, only its draws tell it: within six of their deviations.
    keep, off_by = 1 - p, 0.03
    if training:
        keep, off_by = 1 - dropped, 6 * float(np.sqrt(dropped / max(kept.sum(), 1)))
    factors = y[kept] / x[kept]
    factor, spread = float(factors.mean()), float(np.ptp(factors))
    scaled_in_evaluation = not off and (_same(evaluated, x * (1 - p)) or _same(evaluated, x * p))
    if not np.isfinite(y).all():
        training.append("the output is not finite")
    elif spread > 1e-4 * abs(factor):
        training.append("the elements that are kept are not all multiplied by the same number")
    elif _close(factor, 1 / keep, off_by / keep):
        pass
    elif abs(factor - 1) < 1e-4 and scaled_in_evaluation:
        training.append(
            "rescales in evaluation (times 1 - p); torch does it in training (divided by 1 - p), and evaluation is the "
            "identity"
        )
    elif abs(factor - 1) < 1e-4:
        training.append("the rescaling is missing: what is kept is to be divided by 1 - p, so that the mean stays")
    elif _close(factor, keep):
        training.append("multiplies what is kept by 1 - p; it should be divided by it")
    elif _close(factor, 1 / (1 - keep), 0.1):
        training.append("divides what is kept by p; it should be by 1 - p")
    else:
        training.append(f"multiplies what is kept by {factor:.4f}, expected 1 / (1 - p) = {1 / (1 - p):.4f}")
    if not off and not (scaled_in_evaluation and any("rescales in evaluation" in each for each in training)):
        if (evaluated == 0).any():
            evaluation.append("is active in evaluation; there it should return its input")
        else:
            evaluation.append("evaluation changes the input; it should return it as it is")
    return training, evaluation


def _dropout_gradient(p: float, grad: Array, kept: Array) -> list[str]:
    return _explain(
        grad,
        lambda masked, scale: np.where(kept | (not masked), scale, 0.0),
        {
            "masked": Choice(True, ((False, "the gradient is not masked: it is 0 where the element was dropped"),)),
            "scale": Choice(1 / (1 - p), ((1.0, "the gradient lacks the factor 1 / (1 - p)"),)),
        },
        "the gradient of the input",
    )


def _dropout_limits(cls: Callable[..., Any], x: Array) -> list[str]:
    messages = []
    for p, expected in ((0.0, x), (1.0, np.zeros_like(x))):
        try:
            layer = _Layer(cls, p=p) if _takes(cls, ("p",)) else _Layer(cls, p)
            layer.mode(True)
            with np.errstate(all="ignore"):
                got = layer(x)
        except _Stop as stop:
            if p == 1 and "ValueError" in str(stop):
                continue  # refused with a reason
            messages.append(f"p = {p:g}: {stop}")
            continue
        if not np.isfinite(got).all():
            messages.append(f"p = {p:g} gives NaN: 1 / (1 - p) is infinite there; return zeros")
        elif not _same(got, expected):
            messages.append(f"p = {p:g} should give {'the input' if p == 0 else 'zeros'}")
    return messages


# Optimizers.

WRONG_SIGN = Choice(-1.0, ((1.0, "adds the step; it should be subtracted, to go downhill"),))
BETAS = (0.7, 0.9)
HYPER = {
    "lr": 0.05, "betas": BETAS, "beta1": BETAS[0], "beta2": BETAS[1], "eps": 0.2, "momentum": 0.7, "alpha": 0.8,
    "weight_decay": 0.3,
}  # fmt: skip
DEFAULTS = {"eps": 1e-8, "momentum": 0.0, "alpha": 0.99, "weight_decay": 0.0}


def _adam(
    params: list[Array], grads: list[list[Array]], hyper: dict[str, Any], *, sign: float, correction: str, eps: str,
    decay: str, square: bool, root: bool, blend: bool, betas: str, count: str,
) -> Array:  # fmt: skip
    """Adam and AdamW; the parameters after all steps, in one row."""
    lr, wd, e = hyper["lr"], hyper["weight_decay"], hyper["eps"]
    b1, b2 = hyper["betas"] if betas == "right" else reversed(hyper["betas"])
    ps = [p.copy() for p in params]
    ms, vs = [np.zeros_like(p) for p in ps], [np.zeros_like(p) for p in ps]
    calls = 0
    for step, gs in enumerate(grads, 1):
        for i, g in enumerate(gs):
            calls += 1
            t = {"step": step, "call": calls, "late": step + 1}[count]
            p = ps[i]
            if decay == "coupled":
                g = g + wd * p
            elif decay == "decoupled":
                p = p * (1 - lr * wd)
            elif decay == "without lr":
                p = p * (1 - wd)
            ms[i] = b1 * ms[i] + ((1 - b1) * g if blend else g)
            vs[i] = b2 * vs[i] + (1 - b2) * (g * g if square else np.abs(g))
            c1 = 1 - b1**t if correction in ("both", "first") else 1.0
            c2 = 1 - b2**t if correction in ("both", "second") else 1.0
            m, v = ms[i] / c1, vs[i] / c2
            if not root:
                scale = v + e
            elif eps == "outside":
                scale = np.sqrt(v) + e
            elif eps == "inside":
                scale = np.sqrt(v + e)
            else:  # before the correction
                scale = (np.sqrt(vs[i]) + e) / np.sqrt(c2)
            new = p + sign * lr * m / scale
            ps[i] = new - lr * wd * new if decay == "after" else new
    return np.concatenate([p.ravel() for p in ps])


def _adam_choices(decoupled: bool) -> dict[str, Choice]:
    coupled_text = "weight decay is coupled (added to the gradient), which is Adam with L2; AdamW's is decoupled"
    decoupled_text = "weight decay is decoupled, which is AdamW; Adam's is added to the gradient"
    return {
        "sign": WRONG_SIGN,
        "correction": Choice("both", (
            ("none", "the bias correction is missing: divide the averages by 1 - beta1^t and 1 - beta2^t"),
            ("first", "the second moment lacks its bias correction: divide it by 1 - beta2^t"),
            ("second", "the first moment lacks its bias correction: divide it by 1 - beta1^t"),
        )),
        "eps": Choice("outside", (
            ("inside", "eps is inside the root; Adam adds it to the root: sqrt(v) + eps"),
            ("before", "eps is added to the root before its bias correction; it belongs after: sqrt(v_hat) + eps"),
        )),
        "decay": Choice("decoupled" if decoupled else "coupled", (
            ("coupled", coupled_text) if decoupled else ("decoupled", decoupled_text),
            ("none", "weight decay is not applied"),
            ("without lr", "weight decay lacks the factor lr"),
            ("after", "weight decay is taken of the parameter after its step; it should be of the one before"),
        )),
        "square": Choice(True, ((False, "the second moment averages |g|; it should be of g^2"),)),
        "root": Choice(True, ((False, "divides by the second moment; it should be by its square root"),)),
        "blend": Choice(True, ((False, "the first moment adds g; it should be (1 - beta1) * g"),)),
        "betas": Choice("right", (("swapped", "beta1 and beta2 are the wrong way round"),)),
        "count": Choice("step", (
            ("call", "t counts parameters; it should count steps, once for all parameters"),
            ("late", "t is 2 in the first step; it should be 1"),
        )),
    }  # fmt: skip


def _rmsprop(
    params: list[Array], grads: list[list[Array]], hyper: dict[str, Any], *, sign: float, eps: str, decay: str,
    average: str, square: bool, root: bool,
) -> Array:  # fmt: skip
    lr, wd, e, a = hyper["lr"], hyper["weight_decay"], hyper["eps"], hyper["alpha"]
    ps = [p.copy() for p in params]
    vs = [np.full_like(p, float(average == "ones")) for p in ps]
    for step, gs in enumerate(grads, 1):
        for i, g in enumerate(gs):
            if decay == "coupled":
                g = g + wd * ps[i]
            elif decay == "decoupled":
                ps[i] = ps[i] * (1 - lr * wd)
            gg = g * g if square else np.abs(g)
            keep, take = {"reversed": (1 - a, a), "sum": (1.0, 1.0)}.get(average, (a, 1 - a))
            vs[i] = keep * vs[i] + take * gg
            v = vs[i] / (1 - a**step) if average == "corrected" else vs[i]
            scale = v + e if not root else np.sqrt(v) + e if eps == "outside" else np.sqrt(v + e)
            ps[i] = ps[i] + sign * lr * g / scale
    return np.concatenate([p.ravel() for p in ps])


RMSPROP_CHOICES = {
    "sign": WRONG_SIGN,
    "eps": Choice("outside", (("inside", "eps is inside the root; RMSprop adds it to the root: sqrt(v) + eps"),)),
    "decay": Choice("coupled", (
        ("decoupled", "weight decay is decoupled; RMSprop's is added to the gradient"),
        ("none", "weight decay is not applied"),
    )),
    "average": Choice("right", (
        ("reversed", "alpha is the wrong way round: v = alpha * v + (1 - alpha) * g^2"),
        ("sum", "sums the squares, which is Adagrad; RMSprop averages: v = alpha * v + (1 - alpha) * g^2"),
        ("corrected", "the average has a bias correction; RMSprop has none"),
        ("ones", "the average begins at 1; it should begin at 0"),
    )),
    "square": Choice(True, ((False, "averages |g|; it should be g^2"),)),
    "root": Choice(True, ((False, "divides by the average; it should be by its square root"),)),
}  # fmt: skip


def _sgd(
    params: list[Array], grads: list[list[Array]], hyper: dict[str, Any], *, sign: float, decay: str, velocity: str
) -> Array:
    lr, wd, m = hyper["lr"], hyper["weight_decay"], hyper["momentum"]
    ps = [p.copy() for p in params]
    vs = [np.zeros_like(p) for p in ps]
    for gs in grads:
        for i, g in enumerate(gs):
            if decay == "coupled":
                g = g + wd * ps[i]
            elif decay == "decoupled":
                ps[i] = ps[i] * (1 - lr * wd)
            elif decay == "without lr":
                ps[i] = ps[i] * (1 - wd)
            if velocity == "one for all":
                vs = [m * (vs[i] if vs[i].shape == g.shape else 0.0) + g] * len(vs)
            else:
                vs[i] = m * vs[i] + ((1 - m) * g if velocity == "damped" else g)
            step = {"nesterov": g + m * vs[i], "none": g}.get(velocity, vs[i])
            ps[i] = ps[i] + sign * lr * step
    return np.concatenate([p.ravel() for p in ps])


SGD_CHOICES = {
    "sign": WRONG_SIGN,
    "decay": Choice("coupled", (
        ("decoupled", "weight decay is decoupled; SGD's is added to the gradient, and so goes through the momentum"),
        ("none", "weight decay is not applied"),
        ("without lr", "weight decay lacks the factor lr"),
    )),
    "velocity": Choice("right", (
        ("none", "momentum is not applied"),
        ("damped", "the velocity takes (1 - momentum) * g; torch's takes g: v = momentum * v + g"),
        ("nesterov", "the step is Nesterov's, which torch takes with nesterov=True alone"),
    )),
}  # fmt: skip


def _optimizer(cls: Callable[..., Any], rule: str) -> Iterator[tuple[str, list[str]]]:
    random = np.random.default_rng(4)
    shapes = [(3, 2), (4,)]
    params = [random.standard_normal(shape) for shape in shapes]
    grads = [[random.standard_normal(shape) for shape in shapes] for _ in range(4)]
    formulas: dict[str, tuple[Callable[..., Array], dict[str, Choice], tuple[str, ...]]] = {
        "adamw": (_adam, _adam_choices(True), ("lr", "betas", "eps", "weight_decay")),
        "adam": (_adam, _adam_choices(False), ("lr", "betas", "eps", "weight_decay")),
        "rmsprop": (_rmsprop, RMSPROP_CHOICES, ("lr", "alpha", "eps", "weight_decay")),
        "sgd": (_sgd, SGD_CHOICES, ("lr", "momentum", "weight_decay")),
    }
    formula, choices, wanted = formulas[rule]
    options, hyper = _options(cls, wanted)
    if rule == "adamw" and hyper["weight_decay"] == 0:
        raise _Stop("takes no weight_decay, which is what AdamW adds to Adam")

    def check(count: int, most: int) -> list[str]:
        some, theirs = params[:count], [gs[:count] for gs in grads]
        got = _run_optimizer(cls, options, some, theirs)
        return _explain(
            got, lambda **c: formula(some, theirs, hyper, **c), choices, "the parameters after 4 steps", most
        )

    wrong = check(2, 3)
    if any("no known mistake" in each or "not finite" in each for each in wrong):
        of_one = check(1, 3)
        if not of_one:
            wrong = [
                "right for one parameter, but not for two: each parameter needs a state (moments, velocity) of its own"
            ]
        elif not any("no known mistake" in each for each in of_one):
            wrong = of_one
    yield f"four steps with {', '.join(f'{k}={v}' for k, v in options.items())}", wrong
    if _reads_grads(cls):
        yield "a parameter without a gradient", _without_gradient(cls, options, params)


def _options(cls: Callable[..., Any], wanted: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the class is given, what the formulas take)"""
    signature = _parameters(cls)
    free = any(each.kind is each.VAR_KEYWORD for each in signature.values())
    options: dict[str, Any] = {}
    hyper: dict[str, Any] = dict(HYPER)

    def give(key: str) -> bool:
        name = next((each for each in NAMES[key] if each in signature and each not in options), None)
        if name is None and free:
            name = key
        if name is not None:
            options[name] = HYPER[key]
        return name is not None

    for key in wanted:
        if key == "betas":
            if not give("betas"):
                first, second = give("beta1"), give("beta2")
                hyper["betas"] = (BETAS[0] if first else 0.9, BETAS[1] if second else 0.999)
        elif key == "lr":
            names = [each for each in ("lr", "learning_rate") if each in signature] or ["alpha"] * (
                "alpha" in signature
            )
            if not names and not free:
                raise _Stop("takes no lr (or learning_rate)")
            options[names[0] if names else "lr"] = HYPER["lr"]
        elif not give(key):
            hyper[key] = DEFAULTS[key]
    return options, hyper


def _takes_params(cls: Callable[..., Any]) -> bool:
    first = next(iter(_parameters(cls).values()), None)
    return first is not None and (first.name in ("params", "parameters") or first.kind is first.VAR_POSITIONAL)


def _required(function: Callable[..., Any]) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in kinds and each.default is each.empty for each in _parameters(function).values())


def _reads_grads(cls: Callable[..., Any]) -> bool:
    step = getattr(cls, "step", None)
    return _takes_params(cls) and callable(step) and _required(step) <= 1  # self


def _run_optimizer(
    cls: Callable[..., Any], options: dict[str, Any], params: list[Array], grads: list[list[Array]]
) -> Array:
    """The parameters after a step by each of ``grads``, in one row."""
    try:
        if _reads_grads(cls):
            held = [torch.nn.Parameter(torch.tensor(param)) for param in params]
            optimizer = cls(held, **options)
            for gs in grads:
                for param, g in zip(held, gs, strict=True):
                    param.grad = torch.tensor(g)
                optimizer.step()
            return np.concatenate([_array(param).ravel() for param in held])
        arrays = [param.copy() for param in params]
        optimizer = cls(arrays, **options) if _takes_params(cls) else cls(**options)
        if not hasattr(optimizer, "step"):
            raise _Stop("has no step()")
        for gs in grads:
            given = [g.copy() for g in gs]
            result = optimizer.step(given) if _required(optimizer.step) == 1 else optimizer.step(arrays, given)
            if isinstance(result, (list, tuple)):
                arrays = [np.asarray(each) for each in result]
        return np.concatenate([_array(array).ravel() for array in arrays])
    except _Stop:
        raise
    except Exception as error:
        raise _Stop(f"taking a step raised {_error(error)}") from error


def _without_gradient(cls: Callable[..., Any], options: dict[str, Any], params: list[Array]) -> list[str]:
    held = [torch.nn.Parameter(torch.tensor(param)) for param in params]
    optimizer = cls(held, **options)
    held[1].grad = torch.ones_like(held[1])
    try:
        optimizer.step()
    except Exception as error:
        return [f"a parameter whose grad is None is to be left out; step() raised {_error(error)}"]
    if not np.array_equal(_array(held[0]), params[0]):
        return ["a parameter whose grad is None is to be left out; it was changed"]
    return []
