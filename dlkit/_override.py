"""override(): dlkit's kernels serve torch's own functions. patch(): models are replaced when they are built."""

import functools
import importlib
import inspect
import pkgutil
import sys
import threading
from types import ModuleType
from typing import Any

import torch

from dlkit import _C
from dlkit._undo import Undo

FUNCTIONS = tuple(_C.override_calls())  # kServed in csrc/glue/override.cpp names them

_lock = threading.Lock()
_depth = 0


class Override(Undo):
    """The result of :func:`override`: it undoes the change, and counts the calls that dlkit served."""

    def __init__(self) -> None:
        super().__init__(_leave, f"dlkit.override(): {', '.join(FUNCTIONS)}")
        self._before = _C.override_calls()

    @property
    def calls(self) -> dict[str, tuple[int, int]]:
        """By function: (calls served, calls left to torch) since this began. Variants of dropout count together."""
        now = _C.override_calls()
        return {name: (now[name][0] - a, now[name][1] - b) for name, (a, b) in self._before.items()}


def override() -> Override:
    """Has dlkit's kernels serve torch's own functions, in the whole process, until it is undone.

        with dlkit.override():
            loss = model(x)

        dlkit.override()            # or without a block, until .undo()

    The functions are layer_norm, rms_norm, batch_norm, group_norm, instance_norm, dropout and its variants, and
    cross_entropy. Any caller gets dlkit's kernels: a forward() that calls ``F.dropout``, a subclass that calls
    ``F.layer_norm``, and the dropout inside of ``scaled_dot_product_attention`` where torch computes attention step by
    step, as it does on a CPU. Results are torch's to rounding; masks come from torch's generators, and are those of
    :func:`dlkit.functional.dropout`. Cross entropy of a target that dlkit refuses goes to torch, which raises its own
    exception.

    torch still serves tensors for which dlkit has no kernel, subclasses of Tensor, ``torch.func``, forward-mode
    derivatives, and code that is compiled or exported: a program that ``torch.compile`` made holds torch's ops.
    A backward pass may run after the block. Blocks may be nested: the end of the outermost one ends the override. It
    changes torch's dispatcher: begin and end it while no other thread computes.

    Returns:
        An ``Override``, which is a context manager; ``undo()`` ends it, ``calls`` counts the calls that dlkit served.
    """
    global _depth
    with _lock:
        if _depth == 0:
            _switch(True)
        _depth += 1
    return Override()


def _leave() -> None:
    global _depth
    with _lock:
        _depth -= 1
        if _depth == 0:
            _switch(False)


def _switch(on: bool) -> None:
    """Also clears the kernels that torch's Python dispatcher keeps: a later trace would call the wrong ones."""
    _C.override_torch(on)
    names = set(FUNCTIONS) - {"cross_entropy"} | {"cross_entropy_loss"}  # as the dispatcher knows it
    for name in (*names, "feature_dropout", "alpha_dropout", "feature_alpha_dropout"):
        for packet in (getattr(torch.ops.aten, name), getattr(torch.ops.aten, f"{name}_", None)):
            for overload in [] if packet is None else packet.overloads():
                getattr(packet, overload)._dispatch_cache.clear()


# Models built later


_building = threading.local()


def patch(*names: str | type | ModuleType) -> Undo:
    """Replaces, as :func:`dlkit.replace` does, every model that is built from now on by the classes named.

        with dlkit.patch("transformers.models.llama"):
            model = AutoModelForCausalLM.from_pretrained(path)

    The layers are replaced when the constructor of the outermost module ends. Models that were built stay replaced when
    the patch is undone; :func:`dlkit.restore` undoes that.

    Args:
        names: classes; or packages and modules, as objects or names, for all classes in them.

    Returns:
        A context manager; ``undo()`` ends it too.

    Raises:
        ImportError: a module cannot be imported.
        ValueError: one of the names holds no subclass of :class:`torch.nn.Module`.
    """
    classes: dict[type[torch.nn.Module], None] = {}
    for name in names:
        found = _classes(name)
        if not found:
            raise ValueError(f"patch(): expected modules that define subclasses of torch.nn.Module, got {name!r}")
        classes.update(dict.fromkeys(found))
    undone = [(cls, vars(cls).get("__init__")) for cls in classes]
    for cls in classes:
        cls.__init__ = _replacing(cls.__init__)  # type: ignore[method-assign]

    def undo() -> None:
        for cls, before in reversed(undone):
            if before is None:
                del cls.__init__
            else:
                cls.__init__ = before  # type: ignore[method-assign]

    return Undo(undo, f"dlkit.patch({', '.join(map(repr, names))}): {len(classes)} classes")


def _classes(named: str | type | ModuleType) -> list[type[torch.nn.Module]]:
    if isinstance(named, type):
        return [named] if issubclass(named, torch.nn.Module) else []
    module = importlib.import_module(named) if isinstance(named, str) else named
    for info in pkgutil.iter_modules(getattr(module, "__path__", ()), module.__name__ + "."):
        try:
            importlib.import_module(info.name)
        except ImportError:
            continue  # a package that it needs is not installed: its models cannot be built either
    found: list[type[torch.nn.Module]] = []
    for name, part in list(sys.modules.items()):
        if name == module.__name__ or name.startswith(module.__name__ + "."):
            values = [value for value in vars(part).values() if inspect.isclass(value)]
            found += [v for v in values if issubclass(v, torch.nn.Module) and v.__module__ == name]
    return list(dict.fromkeys(found))


def _replacing(init: Any) -> Any:
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **keywords: Any) -> None:
        from dlkit.surgery import replace

        outermost = not getattr(_building, "inside", False)
        _building.inside = True
        try:
            init(self, *args, **keywords)
        finally:
            if outermost:
                _building.inside = False
        if outermost:
            replace(self)

    return __init__
