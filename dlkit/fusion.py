"""fuse(): BatchNorm and the ReLU behind it, or the residual add and the ReLU behind it, become one layer, in place.
torch's transformer layers become those that do dropout, residual add and norm in one pass, by a change of class.

Between the two may stand what does nothing: an Identity, a dropout or stochastic depth with a probability of 0. It
stays where it is, since it does nothing to a ReLU's result either. Before a residual add it is left out, and the new
forward() raises if it has begun to do something. A BatchNorm that has a ReLU of its own takes it in.

Neighbours in torch.nn.Sequential are fused as they stand. Elsewhere the forward() that calls the BatchNorm is traced by
torch.fx, one level deep: whatever it calls stays a call, with its hooks. That forward(), without the add and the ReLU,
becomes the forward() of a class derived from the module's own, which modules of equal code share. A class and not an
attribute of the module: it survives deepcopy, DataParallel and torch.compile as any method does.

What a trace would get wrong is left alone: a forward() that depends on training, on gradients being recorded, on random
numbers or on the type of an input, that sets attributes, or computes tensors from no input. Numbers and flags that it
reads from its module are remembered, and the new forward() raises if they have changed.
"""

import contextlib
import functools
import inspect
import linecache
import operator
import pkgutil
import random
import sys
import types
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch.fx.proxy import TraceError
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

import dlkit.nn
from dlkit import _adopt, _forms
from dlkit.nn._layer import HOOKS
from dlkit.nn.transformer import why_not_fused
from dlkit.surgery import TWINS, Change, _replacement, drop_probability, label, why_not_plain

FUSED: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.BatchNorm1d: dlkit.nn.BatchNormReLU1d,
    torch.nn.BatchNorm2d: dlkit.nn.BatchNormReLU2d,
    torch.nn.BatchNorm3d: dlkit.nn.BatchNormReLU3d,
    torch.nn.SyncBatchNorm: dlkit.nn.SyncBatchNormReLU,
    dlkit.nn.BatchNorm1d: dlkit.nn.BatchNormReLU1d,
    dlkit.nn.BatchNorm2d: dlkit.nn.BatchNormReLU2d,
    dlkit.nn.BatchNorm3d: dlkit.nn.BatchNormReLU3d,
    dlkit.nn.SyncBatchNorm: dlkit.nn.SyncBatchNormReLU,
}
TRANSFORMERS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.TransformerEncoderLayer: dlkit.nn.TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: dlkit.nn.TransformerDecoderLayer,
}
RELUS = (torch.relu, torch.relu_, torch.nn.functional.relu, "relu", "relu_")
ADDS = (operator.add, torch.add, "add")
ADDS_IN_PLACE = (operator.iadd, "add_")

Model = TypeVar("Model", bound=torch.nn.Module)


class Left(Exception):
    """Why a layer, or every layer that a forward() calls, is left as it is."""


def fuse(model: Model, *, report: list[Change] | None = None) -> Model:
    """Fuses every BatchNorm that a ReLU follows, with or without a residual add between, and in torch's transformer
    layers dropout, residual add and LayerNorm, in place.

    The BatchNorm becomes :class:`dlkit.nn.BatchNormReLU2d` (``1d``, ``3d``, :class:`dlkit.nn.SyncBatchNormReLU`) by a
    change of its class: names, parameters, buffers, state_dict and results stay what they are, in training and in
    evaluation. In a Sequential, which is taken to be called as a whole, an Identity takes the ReLU's place. A module
    whose forward() loses its add and ReLU gets a class derived from its own, of the same name; it can be copied,
    pickled and compiled as before. :class:`torch.nn.TransformerEncoderLayer` and ``TransformerDecoderLayer``, norm
    first or last, become :class:`dlkit.nn.TransformerEncoderLayer` and ``TransformerDecoderLayer``: the same layers, of
    which training runs fused, and evaluation as in torch.

    Left as they are: layers of other classes, with hooks, registered or called more than once, or whose result is used
    by something else as well, and what is called by a forward() that torch.fx cannot trace faithfully. Fusing again
    changes nothing. :func:`dlkit.restore` undoes it. Tools that would make another layer of a fused one, and lose the
    ReLU, are refused: ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, ``fuse_conv_bn_eval`` and their like.

    Args:
        model: any module, complete: a fused forward() does not see what is added to its module later.
        report: a list that receives a :class:`Change` for everything changed, and for each BatchNorm and transformer
            layer left. ``print(*report, sep="\\n")`` shows it.

    Returns:
        The same object, ``model``.
    """
    before = {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}
    registrations = Counter(id(child) for module in model.modules() for child in module._modules.values())
    reasons: dict[str, str] = {}
    for owner_name, paths in _layers_by_owner(model).items():
        owner = model.get_submodule(owner_name)
        prefix = owner_name + "." if owner_name else ""
        usable = []
        for path in paths:
            layer = owner.get_submodule(path)
            why = _why_left(layer)
            if layer is model:
                why = why or "it is the whole model"
            elif registrations[id(layer)] > 1:
                why = why or "it is registered in several places"
            if why:
                reasons[prefix + path] = why
            else:
                usable.append(path)
        if not usable:
            continue
        if _is_sequential(owner):
            found = _fuse_sequential(owner, usable)
        else:
            try:
                found = _fuse_traced(owner, usable)
            except Left as left:
                found = dict.fromkeys(usable, str(left))
        reasons.update({(prefix + path).rstrip("."): reason for path, reason in found.items()})
    reasons.update(_fuse_own_relus(model))
    reasons.update(_fuse_transformers(model))
    if report is not None:
        report.extend(
            Change(name, before[name], type(module), reasons[name])
            for name, module in model.named_modules()
            if name in reasons
        )
    return model


def _fuse_own_relus(model: torch.nn.Module) -> dict[str, str]:
    """BatchNorms of other libraries that have their activation as a child."""
    reasons = {}
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or not module._modules:
            continue
        served = type(module) if _adopt.adopted(type(module)) else _replacement(module, True)[0]
        adopted = _adopt.adopted(served) if served else None
        if served is None or adopted is None or adopted[2][0].norm != "twin" or adopted[2][0].relu:
            continue
        *_, last = module._modules.values()
        if _forms.ends_in_relu(module):
            module.__class__ = _adopt.class_with_relu(served)
            reasons[name] = "takes in its ReLU"
        else:
            reasons[name] = f"no plain ReLU follows its norm: it ends in a {type(last).__name__}"
    return reasons


def _fuse_transformers(model: torch.nn.Module) -> dict[str, str]:
    reasons = {}
    for name, module in model.named_modules():
        related = next((cls for cls in TRANSFORMERS if isinstance(module, cls)), None)
        if related is None or isinstance(module, tuple(TRANSFORMERS.values())):
            continue
        why = why_not_plain(module, related) or why_not_fused(module)
        if not why:
            module.__class__ = TRANSFORMERS[related]
        reasons[name] = why or "its dropouts, residual adds and norms run fused in training"
    return reasons


def _layers_by_owner(model: torch.nn.Module) -> dict[str, list[str]]:
    """The name of each module whose forward() calls BatchNorm layers, by all appearances, and their names inside it."""
    owners: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or isinstance(module, tuple(FUSED.values())):
            continue
        owner = name.rpartition(".")[0]
        while owner and isinstance(model.get_submodule(owner), (torch.nn.ModuleList, torch.nn.ModuleDict)):
            owner = owner.rpartition(".")[0]
        owners.setdefault(owner, []).append(name[len(owner) :].lstrip("."))
    return owners


def _why_left(layer: torch.nn.Module) -> str:
    """Why a BatchNorm or ReLU layer may not be taken for what its class says; empty if it may."""
    if type(layer) not in FUSED and type(layer) is not torch.nn.ReLU:
        return why_not_plain(layer, next((cls for cls in FUSED if isinstance(layer, cls)), _BatchNorm))
    if "forward" in vars(layer):
        return "its forward was replaced on the instance"
    return "it has hooks, which would see other values" if any(getattr(layer, hooks) for hooks in HOOKS) else ""


def _become_fused(layer: torch.nn.Module) -> None:
    layer.__class__ = FUSED[type(layer)]
    vars(layer)["_dlkit_took_in"] = True  # not made so: restore() may put the ReLU back


# By what a fused layer is now: it may have been synchronised since.
PLAIN: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    fused: plain for plain, fused in FUSED.items() if plain.__module__.startswith("dlkit.")
}


def _become_plain(layer: torch.nn.Module) -> None:
    del vars(layer)["_dlkit_took_in"]
    layer.__class__ = PLAIN[type(layer)]


def _took_in(layer: torch.nn.Module) -> bool:
    return "_dlkit_took_in" in vars(layer) and type(layer) in PLAIN


def unfuse(model: torch.nn.Module) -> dict[str, str]:
    """Undoes :func:`fuse` wherever all that it changed is in ``model``, and says what became of it."""
    reasons = {}
    for name, owner in list(model.named_modules()):
        prefix = name + "." if name else ""
        spec = vars(type(owner)).get("_dlkit_fused", ())
        paths = spec[4] if len(spec) > 4 else ()  # a class made before restore() could undo it has none
        layers = {path: owner.get_submodule(path) for path in paths}
        if layers and all(map(_took_in, layers.values())):
            for path, layer in layers.items():
                _become_plain(layer)
                reasons[prefix + path] = f"leaves the ReLU to forward() of {label(spec[0])} again"
            owner.__class__ = spec[0]
            reasons[name] = "its own forward() is back"
        if _is_sequential(owner):
            children = list(owner._modules.items())
            last: Any = None
            for relu_path, relu in children:
                (path, layer), original = last or ("", None), None
                if relu is not None:
                    original = vars(relu).get("_dlkit_relu")
                    last = last if original is None and _does_nothing(relu) is not None else (relu_path, relu)
                if layer is None or original is None or not _took_in(layer):
                    continue
                _become_plain(layer)
                owner.register_module(relu_path, original.train(relu.training))
                reasons[prefix + path] = f"leaves the ReLU to the layer after it ({relu_path}) again"
                reasons[prefix + relu_path] = "is back"
        cls = next((plain for plain, fused in TRANSFORMERS.items() if type(owner) is fused), None)
        if cls is not None:
            owner.__class__ = cls
            reasons[name] = "is torch's layer again"
    return reasons


# Sequential


def _is_sequential(module: torch.nn.Module) -> bool:
    return type(module).forward is torch.nn.Sequential.forward and "forward" not in vars(module)


def _fuse_sequential(owner: torch.nn.Module, paths: list[str]) -> dict[str, str]:
    reasons = {}
    children = list(owner._modules.items())
    following = dict(zip((name for name, _ in children), children[1:], strict=False))
    for path in paths:
        name, relu = following.get(path, ("", None))
        while name and _does_nothing(relu) is not None:
            name, relu = following.get(name, ("", None))
        if type(relu) is not torch.nn.ReLU:
            reasons[path] = "no ReLU follows it"
        elif _why_left(relu):
            reasons[path] = f"the ReLU after it is left: {_why_left(relu)}"
        else:
            _become_fused(owner.get_submodule(path))
            identity = torch.nn.Identity().train(relu.training)
            vars(identity)["_dlkit_relu"] = relu  # for restore(); no child of it, so that names and hooks stay
            owner.register_module(name, identity)
            reasons[path] = f"takes in the ReLU after it ({name})"
            reasons[name] = f"its work is done by the layer before it ({path})"
    return reasons


# Traced modules


class _Match(NamedTuple):
    """A BatchNorm call and what follows it."""

    norm: torch.fx.Node
    add: torch.fx.Node | None
    relu: torch.fx.Node
    between: list[torch.fx.Node]  # calls that do nothing, between norm and add
    guards: list[tuple[str, Any]]  # what tells that they do nothing


def _fuse_traced(owner: torch.nn.Module, paths: list[str]) -> dict[str, str]:
    """Fuses what it can among the layers at ``paths``, and says for each what became of it."""
    graph, guards = _trace(owner)
    calls: dict[str, list[torch.fx.Node]] = {path: [] for path in paths}
    layers = {id(owner.get_submodule(path)): path for path in paths}
    for node in graph.nodes:
        if node.op == "call_module":
            path = layers.get(id(owner.get_submodule(node.target)))
            if path is not None:
                calls[path].append(node)
    reasons = {}
    matches: dict[str, _Match] = {}
    taken: set[torch.fx.Node] = set()
    where = f"forward() of {label(type(owner))}"
    for path in sorted(paths, key=lambda path: _is_later_operand(calls[path])):
        try:
            if len(calls[path]) != 1:
                raise Left(f"{where} calls it {len(calls[path])} times")
            match = _match(owner, calls[path][0])
            if match.relu in taken:
                raise Left("the ReLU after it is done by another layer")
        except Left as left:
            reasons[path] = str(left)
        else:
            matches[path] = match
            taken.add(match.relu)
            reasons[path] = f"takes in the {'add and the ReLU' if match.add else 'ReLU'} after it in {where}"
    if matches:
        for match in matches.values():
            _rewrite(graph, match)
        earlier: Any = vars(type(owner)).get("_dlkit_fused", ())[4:5]
        fused = {*matches, *(path for paths in earlier for path in paths)}
        guards += tuple(guard for match in matches.values() for guard in match.guards)
        owner_class = _class_for(owner, graph, guards, tuple(sorted(fused)))
        for path in matches:
            _become_fused(owner.get_submodule(path))
        owner.__class__ = owner_class
        reasons[""] = "its forward() leaves adds and ReLUs to the fused layers"
    return reasons


def _is_later_operand(calls: list[torch.fx.Node]) -> bool:
    """Where both terms of an add are BatchNorm calls, the first is the one to fuse."""
    users = list(calls[0].users) if calls else []
    return bool(users) and users[0].args[:1] != (calls[0],)


def _match(owner: torch.nn.Module, norm: torch.fx.Node) -> _Match:
    if len(norm.args) != 1 or norm.kwargs:
        raise Left("it is called with other arguments than its input")
    between, guards = [norm], []
    after = _only_user(norm)
    while after.op == "call_module" and (found := _does_nothing(owner.get_submodule(str(after.target)))) is not None:
        between.append(after)
        guards += [(f"{after.target}.{name}", value) for name, value in found]
        after = _only_user(after)
    if _is_relu(owner, after):
        return _Match(norm, None, after, [], [])
    if after.op == "call_module" or after.target not in (*ADDS, *ADDS_IN_PLACE):
        raise Left("no ReLU follows it")
    if after.kwargs or len(after.args) != 2 or not all(isinstance(term, torch.fx.Node) for term in after.args):
        raise Left("what follows it is not the sum of two tensors")
    if len(after.all_input_nodes) != 2:
        raise Left("it is added to itself")
    if after.target in ADDS_IN_PLACE and after.args[0] is not between[-1]:
        raise Left("its result is added to another tensor in place")
    relu = _only_user(after)
    while relu.op == "call_module" and _does_nothing(owner.get_submodule(str(relu.target))) is not None:
        relu = _only_user(relu)
    if not _is_relu(owner, relu):
        raise Left("an add follows it, and no ReLU")
    # The call moves to where the add is; on the way its input could change in place.
    node = norm.next
    while node is not after:
        if norm.args[0] in node.all_input_nodes:
            raise Left("its input is used between it and the add")
        node = node.next
    return _Match(norm, after, relu, between[1:], guards)


def _does_nothing(layer: Any) -> list[tuple[str, Any]] | None:
    """The attributes, by name and value, that tell that ``layer`` gives its input back; None if it may not."""
    if layer is None or "forward" in vars(layer) or any(getattr(layer, hooks) for hooks in HOOKS):
        return None
    if type(layer) is torch.nn.Identity:
        return [("__class__", torch.nn.Identity)]
    plain = any(
        type(layer) in pair for pair in TWINS.items() if issubclass(pair[0], torch.nn.modules.dropout._DropoutNd)
    )
    p = "p" if plain else drop_probability(layer)
    return [(p, getattr(layer, p))] if p and not getattr(layer, p) else None


def _only_user(node: torch.fx.Node) -> torch.fx.Node:
    if len(node.users) != 1:
        raise Left("its result, or the sum's, is used by something else as well" if node.users else "it is unused")
    return next(iter(node.users))


def _is_relu(owner: torch.nn.Module, node: torch.fx.Node) -> bool:
    if node.op == "call_module":
        layer = owner.get_submodule(str(node.target))
        return type(layer) is torch.nn.ReLU and not _why_left(layer)
    return node.op in ("call_function", "call_method") and node.target in RELUS


def _rewrite(graph: torch.fx.Graph, match: _Match) -> None:
    norm, add, relu, between, _ = match
    residual = tuple(term for term in add.all_input_nodes if term is not (between or [norm])[-1]) if add else ()
    with graph.inserting_before(add or norm):
        fused = graph.call_module(str(norm.target), norm.args + residual)
        if add is not None and add.target in ADDS_IN_PLACE:
            fused = graph.call_method("type_as", (fused, norm.args[0]))  # a wider residual does not promote the sum
    # What does nothing between norm and ReLU, or add and ReLU, is called on the result.
    relu.replace_all_uses_with(relu.args[0] if isinstance(relu.args[0], torch.fx.Node) else fused)
    (add or norm).replace_all_uses_with(fused)
    for node in (relu, add, *reversed(between), norm):
        if node is not None:
            graph.erase_node(node)


# Tracing


def _trace(owner: torch.nn.Module) -> tuple[torch.fx.Graph, tuple[tuple[str, Any], ...]]:
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


# The class of a traced module


def _class_for(
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
