"""Layers of other libraries on dlkit's kernels: each stays an instance of its class, by a class derived from that.

The derived class serves the dtypes, shapes, arguments and settings that were proven; the original forward() serves all
others. A layer is pickled and copied as its original class with the facts that the derived class is made from.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlkit import _forms, _trial
from dlkit.nn._layer import Layer

# By class: converter(module) -> forward(module, *inputs), or None to leave it.
REGISTERED: dict[type[torch.nn.Module], Callable[[Any], Callable[..., Any] | None]] = {}


def register(cls: type[torch.nn.Module], converter: Callable[[Any], Callable[..., Any] | None]) -> None:
    """Gives :func:`dlkit.replace` a function, made of dlkit's functions, for modules of exactly this class.

        dlkit.register(MyNorm, lambda module: my_norm)

        def my_norm(module, x):
            return dlkit.functional.rms_norm(x, module.gain.shape, module.gain, module.epsilon)

    The function is not compared with the module's own ``forward``. A second registration of a class replaces the first;
    models that were replaced before do not change.

    Args:
        cls: a subclass of :class:`torch.nn.Module`.
        converter: called with a module, returns a function that is called as its ``forward`` is, with the module
            first; or None, and the module is left as it is.

    Raises:
        TypeError: ``cls`` is not a module's class, or ``converter`` cannot be called.
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise TypeError(f"register(): expected cls to be a subclass of torch.nn.Module, got {cls!r}")
    if not callable(converter):
        raise TypeError(f"register(): expected converter to be callable, got {type(converter).__name__}")
    REGISTERED[cls] = converter


def adopted(cls: type) -> tuple[Any, ...] | None:
    """(original class, kind, facts) of a derived class, else None."""
    return vars(cls).get("_dlkit_adopted")


def class_for_norm(cls: type, proof: _trial.Proof, twin: type | None) -> type:
    rounding = tuple(sorted(proof.rounding.items(), key=str))
    return _derived(cls, "norm", (proof.form, rounding, proof.ranks, proof.guards, twin))


def class_with_activation(cls: type, proven: tuple[type, str] | None) -> type:
    """The derived class for norms that also compute the activation with which the original class ends; ``proven`` as in
    ``Form``."""
    original, kind, (form, *facts) = vars(cls)["_dlkit_adopted"]
    return _derived(original, kind, (form._replace(acts=True, proven=proven), *facts))


def class_for_drop(cls: type, drop: _trial.Drop) -> type:
    return _derived(cls, "drop", (drop,))


def class_for_registered(cls: type, forward: Callable[..., Any]) -> type:
    return _derived(cls, "registered", (forward,))


@functools.cache
def _derived(original: Any, kind: str, facts: tuple[Any, ...]) -> type:
    makers: dict[str, Any] = {"norm": _norm, "drop": _drop, "registered": _registered}
    forward, says = makers[kind](original, *facts)

    def extra_repr(self: Any) -> str:
        return ", ".join(filter(None, (original.extra_repr(self), f"dlkit: {says}")))

    forward.__name__, forward.__module__ = "forward", original.__module__
    forward.__qualname__, forward.__doc__ = f"{original.__qualname__}.forward", original.forward.__doc__
    body = {
        "forward": forward,
        "extra_repr": extra_repr,
        "__reduce_ex__": _reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_dlkit_adopted": (original, kind, facts),
    }
    return type(original)(original.__name__, (Layer, original), body)


def _norm(
    original: Any, form: _forms.Form, rounding: Any, ranks: tuple[int, ...], guards: tuple[Any, ...], twin: Any
) -> tuple[Any, str]:
    orders = dict(rounding)
    compute = _forms.computes(form, orders, twin)
    weight = form.weight or ("weight" if form.norm == "twin" else "")

    def serves(module: Any, x: Any, others: int) -> bool:
        if not isinstance(x, Tensor) or x.dim() not in ranks or others != bool(form.gate):
            return False
        if form.layout == "dense" and x.is_contiguous():
            return False
        if form.norm == "twin" and tuple(module._modules) != form.children:
            return False
        parameter = getattr(module, weight, None) if weight else None
        if (x.dtype, x.dtype if parameter is None else parameter.dtype) not in orders:
            return False
        return all(getattr(module, name, None) == value for name, value in guards)

    def forward(self: Any, *args: Any, **keywords: Any) -> Any:
        if args and serves(self, args[0], len(args) - 1 + len(keywords)):
            return compute(self, *args, *keywords.values())
        return original.forward(self, *args, **keywords)

    return forward, str(form)


def _drop(original: Any, drop: _trial.Drop) -> tuple[Any, str]:
    compute = _forms.drops(drop.kind, drop.p)

    def forward(self: Any, *args: Any, **keywords: Any) -> Any:
        same = all(getattr(self, name, None) == value for name, value in drop.guards)
        if same and len(args) == 1 and not keywords and isinstance(args[0], Tensor):
            return compute(self, args[0])
        return original.forward(self, *args, **keywords)

    return forward, str(drop)


def _registered(original: Any, compute: Callable[..., Any]) -> tuple[Any, str]:
    def forward(self: Any, *args: Any, **keywords: Any) -> Any:
        return compute(self, *args, **keywords)

    return forward, getattr(compute, "__name__", "registered")


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickles a module of a derived class as one of its original class, with the facts to derive it again."""
    original, kind, facts = self._dlkit_adopted
    function, arguments, *rest = original.__reduce_ex__(self, max(protocol, 2))
    # Only where the class pickles as object does, and only for the derived class itself, not for its subclasses.
    if arguments == (type(self),) and "_dlkit_adopted" in vars(type(self)):
        function, arguments = _new, (original, kind, facts)
    return function, arguments, *rest


def _new(original: type, kind: str, facts: tuple[Any, ...]) -> torch.nn.Module:
    return object.__new__(_derived(original, kind, facts))
