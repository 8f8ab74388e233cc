"""A forward() that calls norms: its graph is matched, and loses the adds and activations that the norms take in."""

import operator
from typing import Any, NamedTuple

import torch

from dlkit._activation import GELUS
from dlkit.fusion._derived import class_for
from dlkit.fusion._layers import Left, become_fused, become_plain, does_nothing, took_in, why_left
from dlkit.fusion._other_activations import activation_of, is_constant, settings
from dlkit.fusion._tracing import trace
from dlkit.surgery import label

FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((torch.relu, torch.relu_, torch.nn.functional.relu, "relu", "relu_"), "relu"),
    torch.nn.functional.silu: "silu",
    torch.nn.functional.hardswish: "hardswish",
    torch.nn.functional.relu6: "relu6",
    torch.nn.functional.gelu: "gelu",
    torch.nn.functional.leaky_relu: "leaky_relu",
}
ADDS = (operator.add, torch.add, "add")
ADDS_IN_PLACE = (operator.iadd, "add_")


class _Match(NamedTuple):
    """The call of a norm and what follows it."""

    norm: torch.fx.Node
    add: torch.fx.Node | None
    relu: torch.fx.Node
    between: list[torch.fx.Node]  # calls that do nothing, between norm and add
    guards: list[tuple[str, Any]]  # what tells that they do nothing, and what the activation does
    activation: tuple[str, float]


def fuse_traced(owner: torch.nn.Module, paths: list[str]) -> dict[str, str]:
    """Fuses what it can among the layers at ``paths``, and says for each what became of it."""
    graph, guards = trace(owner)
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
                raise Left("the activation after it is done by another layer")
        except Left as left:
            reasons[path] = str(left)
        else:
            matches[path] = match
            taken.add(match.relu)
            what = "ReLU" if match.activation[0] == "relu" else match.activation[0]
            reasons[path] = f"takes in the {'add and the ' * bool(match.add)}{what} after it in {where}"
    if matches:
        for match in matches.values():
            _rewrite(graph, match)
        earlier: Any = vars(type(owner)).get("_dlkit_fused", ())[4:5]
        fused = {*matches, *(path for paths in earlier for path in paths)}
        guards += tuple(guard for match in matches.values() for guard in match.guards)
        owner_class = class_for(owner, graph, guards, tuple(sorted(fused)))
        for path, match in matches.items():
            become_fused(owner.get_submodule(path), match.activation)
        owner.__class__ = owner_class
        reasons[""] = "its forward() leaves adds and activations to the fused layers"
    return reasons


def unfuse_traced(owner: torch.nn.Module) -> dict[str, str]:
    spec = vars(type(owner)).get("_dlkit_fused", ())
    paths = spec[4] if len(spec) > 4 else ()  # a class made before restore() could undo it has none
    layers = {path: owner.get_submodule(path) for path in paths}
    if not layers or not all(map(took_in, layers.values())):
        return {}
    for layer in layers.values():
        become_plain(layer)
    owner.__class__ = spec[0]
    leaves = f"leaves the activation to forward() of {label(spec[0])} again"
    return {**dict.fromkeys(layers, leaves), "": "its own forward() is back"}


def _is_later_operand(calls: list[torch.fx.Node]) -> bool:
    """Where both terms of an add are calls of norms, the first is the one to fuse."""
    users = list(calls[0].users) if calls else []
    return bool(users) and users[0].args[:1] != (calls[0],)


def _match(owner: torch.nn.Module, norm: torch.fx.Node) -> _Match:
    if len(norm.args) != 1 or norm.kwargs:
        raise Left("it is called with other arguments than its input")
    between, guards = [norm], []
    after = _only_user(norm)
    while after.op == "call_module" and (found := does_nothing(owner.get_submodule(str(after.target)))) is not None:
        between.append(after)
        guards += [(f"{after.target}.{name}", value) for name, value in found]
        after = _only_user(after)
    if (activation := _activation_at(owner, after)) is not None:
        return _Match(norm, None, after, [], _settings(owner, after), activation)
    if after.op == "call_module" or after.target not in (*ADDS, *ADDS_IN_PLACE):
        raise Left("no activation follows it")
    if after.kwargs or len(after.args) != 2 or not all(isinstance(term, torch.fx.Node) for term in after.args):
        raise Left("what follows it is not the sum of two tensors")
    if len(after.all_input_nodes) != 2:
        raise Left("it is added to itself")
    if after.target in ADDS_IN_PLACE and after.args[0] is not between[-1]:
        raise Left("its result is added to another tensor in place")
    relu = _only_user(after)
    while relu.op == "call_module" and does_nothing(owner.get_submodule(str(relu.target))) is not None:
        relu = _only_user(relu)
    if (activation := _activation_at(owner, relu)) is None:
        raise Left("an add follows it, and no activation")
    # The call moves to where the add is; on the way its input could change in place.
    node = norm.next
    while node is not after:
        if norm.args[0] in node.all_input_nodes:
            raise Left("its input is used between it and the add")
        node = node.next
    return _Match(norm, after, relu, between[1:], guards + _settings(owner, relu), activation)


def _only_user(node: torch.fx.Node) -> torch.fx.Node:
    if len(node.users) != 1:
        raise Left("its result, or the sum's, is used by something else as well" if node.users else "it is unused")
    return next(iter(node.users))


def _activation_at(owner: torch.nn.Module, node: torch.fx.Node) -> tuple[str, float] | None:
    """(name, negative_slope) of the activation that a node computes; None if it computes something else."""
    if node.op == "call_module":
        layer = owner.get_submodule(str(node.target))
        return None if why_left(layer) else activation_of(layer)
    name = FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    if name is None or name == "relu":
        return None if name is None else (name, 0.0)
    if len(node.args) < 1 or any(isinstance(value, torch.fx.Node) for value in (*node.args[1:], *node.kwargs.values())):
        return None
    if name == "gelu":
        form = GELUS.get(str(node.kwargs.get("approximate", "none")))
        return None if form is None else (form, 0.0)
    slope = (*node.args[1:2], 0.01)[0] if name == "leaky_relu" else 0.0
    slope = node.kwargs.get("negative_slope", slope)
    return (name, float(slope)) if isinstance(slope, (int, float)) else None


def _settings(owner: torch.nn.Module, node: torch.fx.Node) -> list[tuple[str, Any]]:
    """The attributes of an activation's layer, by name and value, that a fused layer has taken over."""
    if node.op != "call_module":
        return []
    found = settings(owner.get_submodule(str(node.target)))
    return [(f"{node.target}.{name}", value) for name, value in found.items() if is_constant(value)]


def _rewrite(graph: torch.fx.Graph, match: _Match) -> None:
    norm, add, relu, between, *_ = match
    residual = tuple(term for term in add.all_input_nodes if term is not (between or [norm])[-1]) if add else ()
    with graph.inserting_before(add or norm):
        fused = graph.call_module(str(norm.target), norm.args + residual)
        if add is not None and add.target in ADDS_IN_PLACE:
            fused = graph.call_method("type_as", (fused, norm.args[0]))  # a wider residual does not promote the sum
    # What does nothing between norm and activation, or add and activation, is called on the result.
    relu.replace_all_uses_with(relu.args[0] if isinstance(relu.args[0], torch.fx.Node) else fused)
    (add or norm).replace_all_uses_with(fused)
    for node in (relu, add, *reversed(between), norm):
        if node is not None:
            graph.erase_node(node)
