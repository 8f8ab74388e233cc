"""The class of a module whose forward() was rewritten: derived from the module's own, shared by modules of equal code.

A class and not an attribute of the module: it survives deepcopy, DataParallel and torch.compile as any method does.
Numbers and flags that forward() read from its module when it was traced are remembered, and the new forward() raises if
they have changed.
"""

import contextlib
import functools
import linecache
import pkgutil
import types
import zlib
from typing import Any

import torch

from dlkit.fusion._layers import Left
from dlkit.surgery import label


def class_for(
    owner: torch.nn.Module, graph: torch.fx.Graph, guards: tuple[tuple[str, Any], ...], layers: tuple[str, ...]
) -> type:
    for node in graph.nodes:
        node.type = None  # annotations would have to be imported
    code = graph.python_code("self")
    head, _, body = code.src.partition(":\n")
    source = f"{head}:\n    dlkit_check(self)\n{body}" if guards else code.src
    forward = next(c for c in compile(source, "", "exec").co_consts if isinstance(c, types.CodeType))
    imports = tuple((name, _import_path(code.globals[name])) for name in forward.co_names if name in code.globals)
    original = vars(type(owner)).get("_dlkit_fused", (type(owner),))[0]
    try:
        return _derived(original, source, imports, guards, layers)
    except Exception as error:  # a metaclass or __init_subclass__ may have its own ideas
        raise Left(f"no class can be derived from {label(original)}: {error}") from error


def _import_path(value: Any) -> str:
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, float):
        return f"math:{value}"  # torch.fx writes inf and nan as names
    path = f"{value.__module__}:{value.__qualname__}"
    with contextlib.suppress(Exception):
        if pkgutil.resolve_name(path) is value:
            return path
    raise Left(f"it is called together with {path}, which cannot be imported")


@functools.cache
def _derived(
    original: type,
    source: str,
    imports: tuple[tuple[str, str], ...],
    guards: tuple[tuple[str, Any], ...],
    layers: tuple[str, ...] = (),
) -> type:
    """The class of modules of class ``original`` whose forward() is ``source``, and whose ``layers`` are fused."""
    filename = f"<dlkit.fuse {original.__qualname__} {zlib.crc32(source.encode()):08x}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)  # for tracebacks

    paths = [(name.split("."), name, value) for name, value in guards]

    def check(module: torch.nn.Module) -> None:
        for path, name, value in paths:
            found: Any = module
            for part in path:
                found = getattr(found, part, None)
            if found is not value and found != value:
                then = f"{original.__qualname__}.{name} was {value!r} when dlkit.fuse() rewrote forward()"
                raise RuntimeError(f"{then}, and is {found!r}: set it before fusing")

    namespace: dict[str, Any] = {name: pkgutil.resolve_name(path) for name, path in imports}
    namespace["dlkit_check"] = check
    exec(compile(source, filename, "exec"), namespace)
    forward = namespace["forward"]
    forward.__module__, forward.__qualname__ = original.__module__, f"{original.__qualname__}.forward"
    body = {
        "forward": forward,
        "__reduce_ex__": _reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_dlkit_fused": (original, source, imports, guards, layers),
    }
    return type(original)(original.__name__, (original,), body)


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickles a module of a derived class as one of its original class with the source of its forward()."""
    original = self._dlkit_fused[0]
    function, arguments, *rest = original.__reduce_ex__(self, max(protocol, 2))
    # As object pickles; and not a class derived from this one.
    if arguments == (type(self),) and "_dlkit_fused" in vars(type(self)):
        function, arguments = _new, self._dlkit_fused
    return function, arguments, *rest


def _new(*spec: Any) -> torch.nn.Module:
    return object.__new__(_derived(*spec))


_new.__module__ = "dlkit.fusion"  # by which pickles name it
