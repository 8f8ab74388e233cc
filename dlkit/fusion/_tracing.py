"""What a forward() computes, by torch.fx, one level deep: whatever it calls stays a call, with its hooks.

What a trace would get wrong is refused: a forward() that depends on training, on gradients being recorded, on random
numbers or on the type of an input, that sets attributes, or computes tensors from no input. Numbers and flags that it
reads from its module are noted.
"""

import contextlib
import inspect
import operator
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode

from dlkit.fusion._layers import Left
from dlkit.surgery import label


def trace(owner: torch.nn.Module) -> tuple[torch.fx.Graph, tuple[tuple[str, Any], ...]]:
    """What forward() computes, and the attributes that it read to know that. Raises Left where a trace may be wrong."""
    cls = type(owner)
    where = f"forward() of {label(cls)}"
    if cls.__module__.partition(".")[0] == "torch":
        raise Left(f"it is called by {label(cls)} or from outside")
    if "forward" in vars(owner):
        raise Left(f"{where} was replaced on the instance")
    arguments = list(inspect.signature(cls.forward).parameters.values())[1:]
    if any(a.default is not a.empty or a.kind is not a.POSITIONAL_OR_KEYWORD for a in arguments):
        raise Left(f"{where} takes optional arguments, which a trace would settle")
    reads: dict[str, Any] = {}
    try:
        graph = _trace_once(owner, True, reads)
        with torch.no_grad():
            evaluation = _trace_once(owner, False, reads)
        if graph.python_code("self").src != evaluation.python_code("self").src:
            raise TraceError("it depends on training or on gradients being recorded")
        for name, value in reads.items():
            if not _is_constant(value):
                raise TraceError(f"it reads the attribute {name}, a {label(type(value))}")
    except Exception as error:
        lines = str(error).splitlines() or [""]
        raise Left(f"torch.fx cannot trace {where}: {type(error).__name__}: {lines[0]}") from error
    # Modules and tensors are looked up again in every call.
    live = (torch.nn.Module, torch.Tensor)
    return graph, tuple((name, value) for name, value in sorted(reads.items()) if not isinstance(value, live))


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    plain = (bool, int, float, str, torch.dtype, torch.nn.Module, torch.Tensor, type)
    return value is None or isinstance(value, (*plain, types.FunctionType, types.BuiltinFunctionType))


def _trace_once(owner: torch.nn.Module, training: bool, reads: dict[str, Any]) -> torch.fx.Graph:
    modules = list(owner.modules())
    flags = [module.training for module in modules]
    hooks = torch.autograd.graph.saved_tensors_hooks
    enter = hooks.__enter__
    try:
        for module in modules:
            module.training = training
        hooks.__enter__ = _refuse("it uses hooks on saved tensors, as checkpointing does")  # type: ignore[method-assign]
        with _random_untouched(), _OnlyInputs():
            tracer = _Tracer(training)
            return tracer.trace(_watched(owner, reads, tracer))
    finally:
        hooks.__enter__ = enter  # type: ignore[method-assign]
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


def _refuse(reason: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> None:
        raise TraceError(reason)

    return refuse


def _watched(owner: torch.nn.Module, reads: dict[str, Any], tracer: torch.fx.Tracer) -> torch.nn.Module:
    """A copy of ``owner`` that shares its layers, notes in ``reads`` what is read from it, and cannot be changed.

    Its training flag is looked up in each call where it is handed on, as to F.dropout.
    """
    cls = type(owner)
    ordinary = vars(torch.nn.Module())

    def read(self: Any, name: str) -> Any:
        if name == "training" and hasattr(tracer, "graph"):
            return tracer.create_proxy("get_attr", "training", (), {})
        value = cls.__getattribute__(self, name)
        if name not in ordinary and name in object.__getattribute__(self, "__dict__"):
            reads[name] = value
        return value

    def write(self: Any, name: str, value: Any) -> None:
        raise TraceError(f"it sets the attribute {name}")

    metaclass: Any = type(cls)
    watched = object.__new__(metaclass(cls.__name__, (cls,), {"__getattribute__": read, "__setattr__": write}))
    watched.__dict__.update(vars(owner))
    return watched


class _Tracer(torch.fx.Tracer):
    def __init__(self, training: bool) -> None:
        super().__init__()
        self.training = training

    def to_bool(self, obj: torch.fx.Proxy) -> bool:
        # A branch: the graph of the other mode tells whether it matters.
        return self.training if obj.node.op == "get_attr" and obj.node.target == "training" else super().to_bool(obj)

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)


class _Proxy(torch.fx.Proxy):
    """Keeps ``+=`` in place where torch.fx makes it ``+``, and does not let code ask what it is."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance() asks for it
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] == "torch":
            return type(self)
        raise TraceError("it asks for the type of an input")


def _in_place(function: Any) -> Callable[..., torch.fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in [
    "add",
    "and",
    "floordiv",
    "lshift",
    "matmul",
    "mod",
    "mul",
    "or",
    "pow",
    "rshift",
    "sub",
    "truediv",
    "xor",
]:
    setattr(_Proxy, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class _OnlyInputs(TorchFunctionMode):
    """Refuses what torch.fx would compute once and for all: tensors made from no input, and changes of grad mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(issubclass(cls, torch.fx.Proxy) for cls in types):
            raise TraceError(f"it calls {getattr(func, '__name__', func)} on no input")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _random_untouched() -> Iterator[None]:
    """Refuses code that draws from Python's or NumPy's generator, and puts the numbers back."""
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        yield
        drawn = random.getstate() != python_state
        if numpy:
            drawn = drawn or repr(numpy.random.get_state()) != repr(numpy_state)
        if drawn:
            raise TraceError("it draws random numbers")
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
