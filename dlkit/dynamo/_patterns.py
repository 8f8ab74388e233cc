"""What is replaced. Each function takes a node and replaces the pattern that ends in it, or does nothing.

``PATTERNS`` are tried one after another, each on every node: norms that are written in elementary ops first, so that
the others find them; then the fusions, the largest first; then the calls that remain.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from dlkit._activation import ACTIVATIONS, GELUS
from dlkit.dynamo._graph import WIDE, Captured, _constant
from dlkit.functional._cross_entropy import reduction_number

# Norms in elementary ops. "x" stands for one tensor, before casts that lose nothing, and "eps" for a number.

_ROOT = ("rsqrt", ("add", ("mean", ("square", "x")), "eps"))
_CENTERED = ("sub", "x", ("mean", "x"))
_DEVIATIONS = [("add", ("mean", ("square", _CENTERED)), "eps"), ("add", ("var", "x"), "eps")]
ELEMENTARY: list[tuple[str, Any]] = [
    ("rms_norm", ("mul", "x", _ROOT)),
    ("rms_norm", ("div", "x", ("sqrt", _ROOT[1]))),
    *(("layer_norm", ("mul", _CENTERED, ("rsqrt", deviation))) for deviation in _DEVIATIONS),
    *(("layer_norm", ("div", _CENTERED, ("sqrt", deviation))) for deviation in _DEVIATIONS),
]
# transformers' NewGELUActivation
_CUBE = ("add", "x", ("mul", 0.044715, ("pow", "x", 3)))
TANH_GELU = ("mul", ("mul", 0.5, "x"), ("add", 1.0, ("tanh", ("mul", math.sqrt(2 / math.pi), _CUBE))))
# timm's Swish and HardSwish
_SIXTH = ("relu6", ("add", "x", 3.0))
SPELLED_OUT = [
    ("gelu_tanh", TANH_GELU),
    ("silu", ("mul", "x", ("sigmoid", "x"))),
    ("hardswish", ("mul", "x", ("div", _SIXTH, 6.0))),
    ("hardswish", ("mul", "x", ("div_", _SIXTH, 6.0))),
]
COMMUTATIVE = ("add", "mul")


class Found(dict[str, Any]):
    """What the letters of a pattern stand for; ``nodes``: all that was matched."""

    def __init__(self) -> None:
        self.nodes: dict[Node, bool] = {}  # whether it is a cast


def matched(graph: Captured, pattern: Any, node: Any) -> Found | None:
    return next(_matches(graph, pattern, node, Found()), None)


def _matches(graph: Captured, pattern: Any, node: Any, found: Found) -> Iterator[Found]:
    if pattern == "eps":
        if _constant(node) is not None and found.get("eps", node) == node:
            yield _with(found, eps=node)
    elif isinstance(pattern, str):
        bare = graph.widened(node)
        if graph.value(bare) is not None and found.get(pattern, bare) is bare:
            casts = []
            while node is not bare:
                casts.append(node)
                node = node.args[0]
            yield _with(found, casts, **{pattern: bare})
    elif not isinstance(pattern, tuple):
        if _constant(node) is not None and math.isclose(node, pattern, rel_tol=1e-15):
            yield found
    else:
        casts = []
        while graph.widened(node) is not node:
            casts.append(node)
            node = node.args[0]
        name, operands = graph.read(node)
        if name != pattern[0] or len(operands) != len(pattern) - 1:
            return
        orders = (operands, operands[::-1]) if name in COMMUTATIVE else (operands,)
        for order in orders:
            states = [_with(found, casts)]
            states[0].nodes[node] = False
            for part, operand in zip(pattern[1:], order, strict=True):
                states = [after for state in states for after in _matches(graph, part, operand, state)]
            yield from states


def _with(found: Found, casts: Any = (), **letters: Any) -> Found:
    copy = Found()
    copy.update(found, **letters)
    copy.nodes = {**found.nodes, **dict.fromkeys(casts, True)}
    return copy


def elementary_norm(graph: Captured, node: Node) -> Node | None:
    """RMSNorm and LayerNorm of the last dimension, with the weight where rounding allows it.

    What is computed in fp32 and then rounded to 16 bits is rounded there by dlkit too: weights of before are taken in,
    weights of after stay. What computes in fp32 though it is given float64 is left.
    """
    if graph.read(node)[0] not in ("mul", "div"):
        return None
    tried = ((op, matched(graph, pattern, node)) for op, pattern in ELEMENTARY)
    op, found = next(((op, found) for op, found in tried if found is not None), ("", Found()))
    if not op:
        return None
    x, work = found["x"], graph.dtype(node)
    inner = [one for one, cast in found.nodes.items() if not cast]
    if any(graph.dtype(one) != work for one in inner) or work not in WIDE or graph.narrowed(x):
        return None
    if any(user not in found.nodes for one in inner if one is not node for user in one.users):
        return None
    columns = graph.value(x).shape[-1]
    if not isinstance(columns, int):
        return None
    affine: dict[str, Node] = {}
    last, taken = node, dict(found.nodes)
    rounded = graph.dtype(x) == work
    while (user := graph.only_user(last)) is not None:
        name, operands = graph.read(user)
        other = [one for one in operands if one is not last]
        if name == "mul" and not affine and len(other) == 1 and graph.is_vector(other[0], last):
            affine["weight"] = other[0]
        elif name == "add" and op == "layer_norm" and list(affine) == ["weight"] and graph.is_vector(other[0], last):
            affine["bias"] = other[0]
        elif name == "cast" and graph.dtype(user) == (graph.dtype(last) if rounded else graph.dtype(x)):
            rounded = True
        else:
            break
        taken[user] = False
        last = user
        if rounded and graph.dtype(x) != work:
            break
    if not rounded:  # its result stays in fp32: so does what it is given
        x = next((one for one, cast in found.nodes.items() if cast and graph.dtype(one) == work), None)
        if x is None:
            return None
        taken.pop(x)
    arguments = (affine.get("weight"), *((affine.get("bias"),) if op == "layer_norm" else ()), float(found["eps"]))
    name = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm"}[op]
    erased = [one for one in taken if one is not last]
    return graph.replace(f"{name} in elementary ops", {last: None}, erased, op, x, [columns], *arguments)


# Norms of rows, and what is before them

NORMS = ("layer_norm", "rms_norm")
OURS: dict[Any, str] = {torch.ops.dlkit.layer_norm.default: "layer_norm", torch.ops.dlkit.rms_norm.default: "rms_norm"}


def _norm(graph: Captured, node: Node) -> tuple[str, Any, list[Any]] | None:
    """(op, input, [normalized_shape, weight, (bias,) eps]) of a norm, torch's or dlkit's."""
    if node.target in OURS:
        return OURS[node.target], node.args[0], list(node.args[1:])
    found = graph.arguments(node, *NORMS)
    if found is None:
        return None
    name = "layer_norm" if "bias" in found else "rms_norm"
    return name, found["input"], [value for key, value in found.items() if key != "input"]


def view_of_sum(graph: Captured, node: Node) -> None:
    """Between a residual add and its norm may stand a view that keeps the last dimension, as in Swin, or a permutation
    of a sum whose channels lie last in memory, as in ConvNeXt."""
    views = node.op == "call_method" and node.target in ("view", "reshape")
    if not (views or graph.permutation(node)) or graph.value(node) is None:
        return
    terms = graph.addends(node.args[0], mixed=True) or ()
    if not any(_norm(graph, user) for user in node.users) or any(graph.dropped(term, None) for term in terms):
        return
    (graph.sum_views if views else graph.sum_permutations)(node)


def add_norm(graph: Captured, node: Node) -> Node | None:
    """The residual add, with or without a dropout of one of its terms, and the norm of the sum.

    Where autocast adds a branch in 16 bits to a residual in fp32, the op casts the branch first. A pass over the branch
    more in forward, one over the sum's gradient less in backward: it is worth while in training alone.
    """
    norm = _norm(graph, node)
    if norm is None:
        return None
    name, total, (shape, *affine, eps) = norm
    casts = []
    while graph.read(total)[0] == "cast" and graph.alike(total, total.args[0]):  # to the dtype that it has
        casts.append(total)
        total = total.args[0]
    terms = graph.addends(total, mixed=True)
    if terms is None or graph.dtype(node) != graph.dtype(total):
        return None
    replaced: dict[Node, int | None] = {node: 0, total: 1}
    words = {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm"}[name]
    for branch, residual in (terms[::-1], terms) if graph.alike(*terms) else ():
        dropout = graph.dropped(branch, total)
        if dropout is not None and branch is not residual:
            x, p = dropout
            return graph.replace(
                f"dropout, add and {words}", replaced, [*casts, branch],
                f"dropout_add_{name}", x, residual, shape, p, *affine, eps,
            )  # fmt: skip
    return graph.replace(f"add and {words}", replaced, casts, f"add_{name}", *terms, shape, *affine, eps)


def row_norm(graph: Captured, node: Node) -> Node | None:
    norm = _norm(graph, node) if node.target not in OURS else None
    if norm is None or graph.value(norm[1]) is None:
        return None
    return graph.replace(f"F.{norm[0]}", {node: None}, [], norm[0], norm[1], *norm[2])


# Norms of channels


class Activation(NamedTuple):
    """A call of an activation, or the last op of one in elementary ops."""

    name: str  # as in ACTIVATIONS
    input: Node
    slope: float
    nodes: list[Node]  # what computes it
    consumes: bool  # whether it writes to its input

    def title(self) -> str:
        return TITLES[self.name] + " in elementary ops" * (len(self.nodes) > 1)


TITLES = {"relu": "ReLU", "gelu": "GELU", "gelu_tanh": "GELU", "silu": "SiLU", "hardswish": "Hardswish"}
TITLES |= {"relu6": "ReLU6", "leaky_relu": "LeakyReLU"}
# The arguments after the input, with torch's values for them.
ACTIVATION_ARGUMENTS: dict[str, dict[str, Any]] = {
    **{name: {"inplace": False} for name in ("relu", "silu", "hardswish", "relu6")},
    "leaky_relu": {"negative_slope": 0.01, "inplace": False},
    "hardtanh": {"min_val": -1.0, "max_val": 1.0, "inplace": False},
    "gelu": {"approximate": "none"},
}


def _activation(graph: Captured, node: Node) -> Activation | None:
    """The activation that a node ends, if its result has the shape and dtype of its input."""
    name, operands = graph.read(node)
    if name == "mul":
        for spelled, pattern in SPELLED_OUT:
            found = matched(graph, pattern, node)
            if found is None or any(found.nodes.values()) or not graph.alike(node, found["x"]):
                continue
            inner = [one for one in found.nodes if one is not node]
            if not any(user not in found.nodes for one in inner for user in one.users):
                return Activation(spelled, found["x"], 0.0, [node, *inner], False)
        return None
    if name not in ACTIVATION_ARGUMENTS:
        return None
    defaults = ACTIVATION_ARGUMENTS[name]
    given = dict(zip(("input", *defaults), operands, strict=False)) | node.kwargs
    x, settings = given.pop("input", None), defaults | given
    if not isinstance(x, Node) or len(operands) > 1 + len(defaults) or settings.keys() != defaults.keys():
        return None
    if name == "gelu":
        name = GELUS.get(settings["approximate"], "")
    elif name == "hardtanh":
        name = "relu6" if (settings["min_val"], settings["max_val"]) == (0, 6) else ""
    slope = _constant(settings.get("negative_slope", 0.0))
    if not name or slope is None or not graph.alike(node, x):
        return None
    written = settings.get("inplace") or getattr(node.target, "__name__", str(node.target)).endswith("_")
    return Activation(name, x, float(slope), [node], bool(written))


def _activation_alone(graph: Captured, node: Node) -> Activation | None:
    """The same, if it is all that sees what it is given."""
    act = _activation(graph, node)
    if act is None:
        return None
    if len(act.nodes) > 1:
        return act if not any(user not in act.nodes for user in act.input.users) else None
    return act if graph.consumed(act.input, node) else None


def _batch_norm(graph: Captured, node: Any) -> tuple[Any, ...] | None:
    """(input, running_mean, running_var, weight, bias), (training, momentum, eps)."""
    found = graph.arguments(node, "batch_norm")
    if found is None or graph.value(found["input"]) is None:
        return None
    names = ("input", "running_mean", "running_var", "weight", "bias")
    numbers = (found["training"], found["momentum"], found["eps"])
    if not isinstance(numbers[0], bool) or any(_constant(number) is None for number in numbers[1:]):
        return None
    return tuple(found[name] for name in names), numbers


def _group_norm(graph: Captured, node: Any) -> tuple[Any, ...] | None:
    """input, num_groups, weight, bias, eps."""
    found = graph.arguments(node, "group_norm")
    return None if found is None or graph.value(found["input"]) is None else tuple(found.values())


def norm_act(graph: Captured, node: Node) -> Node | None:
    """BatchNorm or GroupNorm and an activation, with or without a residual add between."""
    act = _activation_alone(graph, node)
    if act is None:
        return None
    given = norm = act.input
    residual, between = None, ""
    terms = graph.addends(given)
    if terms is not None:
        orders = [pair for pair in (terms, terms[::-1]) if graph.arguments(pair[0], "batch_norm", "group_norm")]
        if not orders or orders[0][0] is orders[0][1]:
            return None
        (norm, residual), between = orders[0], ", add"
        if graph.only_user(norm) is not given:
            return None
    what = f"{between} and {act.title()}"
    erased = [*act.nodes[1:], *([norm] if norm is given else [given, norm])]
    number = ACTIVATIONS[act.name]
    batch, group = _batch_norm(graph, norm), _group_norm(graph, norm)
    if batch is not None and graph.alike(node, batch[0][0]):
        tensors, numbers = batch
        return graph.replace(
            f"BatchNorm{what}", {node: None}, erased,
            "batch_norm", *tensors, residual, None, *numbers, number, act.slope,
        )  # fmt: skip
    if group is not None and graph.alike(node, group[0]):
        return graph.replace(
            f"GroupNorm{what}", {node: None}, erased, "group_norm", *group, residual, number, act.slope
        )
    return None


def batch_norm(graph: Captured, node: Node) -> Node | None:
    found = _batch_norm(graph, node)
    if found is None:
        return None
    return graph.replace("F.batch_norm", {node: None}, [], "batch_norm", *found[0], None, None, *found[1], 0)


def channel_norm(graph: Captured, node: Node) -> Node | None:
    for name in ("group_norm", "instance_norm"):
        found = graph.arguments(node, name)
        if found is not None:
            return graph.replace(f"F.{name}", {node: None}, [], name, *found.values())
    return None


# Dropouts


def dropout_of_nothing(graph: Captured, node: Node) -> Node | None:
    """A dropout in evaluation, or with a probability of 0, gives its input itself."""
    found = graph.arguments(node, *DROPOUTS)
    if found is None or found["inplace"] or (found["training"] is not False and _constant(found["p"]) != 0):
        return None
    same = isinstance(found["input"], Node) and graph.storages(node) == graph.storages(found["input"])
    if not same or any(user.op == "output" for user in node.users):
        return None
    node.replace_all_uses_with(found["input"])
    graph.erase(node)
    return None


AFTER_BIAS = ("relu", "gelu", "gelu_tanh")  # what dlkit's op takes


def act_dropout(graph: Captured, node: Node) -> Node | None:
    """An activation, with the bias before it and the dropout after it.

    Alone an activation is torch's, but for the GELU that is written in ten elementary ops.
    """
    dropout = graph.dropped(node, None)
    act, p = dropout or (node, 0.0)
    if not isinstance(act, Node) or (dropout and graph.only_user(act) is not node):
        return None
    found = _activation(graph, act)
    if found is None or found.name not in AFTER_BIAS or not graph.alike(node, act):
        return None
    if found.consumes and not graph.consumed(found.input, act):
        return None
    x, what = found.input, found.title()
    erased = [*([act] if dropout else []), *found.nodes[1:]]
    sum_name, terms = graph.read(x)
    bias = None
    if sum_name == "add" and all(user in found.nodes for user in x.users):
        pairs = [(h, b) for h, b in (terms, terms[::-1]) if graph.alike(x, h) and graph.is_vector(b, x)]
        if pairs:
            erased.append(x)
            (x, bias), what = pairs[0], f"bias and {what}"
    if dropout is None and bias is None and len(found.nodes) == 1:
        return None
    what += " and dropout" if dropout else ""
    return graph.replace(what, {node: None}, erased, "bias_act_dropout", x, bias, ACTIVATIONS[found.name], p)


def dropout_add(graph: Captured, node: Node) -> Node | None:
    terms = graph.addends(node)
    for branch, residual in () if terms is None else (terms[::-1], terms):
        dropout = graph.dropped(branch, node)
        if dropout is not None and branch is not residual:
            x, p = dropout
            return graph.replace("dropout and add", {node: None}, [branch], "dropout_add", x, residual, p)
    return None


# By name: of how many dimensions the input may be, to each the dimensions of the mask, and whether it is alpha's.
DROPOUTS: dict[str, tuple[dict[int, int] | None, bool]] = {
    "dropout": (None, False),
    "dropout1d": ({2: 1, 3: 2}, False),
    "dropout2d": ({4: 2}, False),
    "dropout3d": ({4: 1, 5: 2}, False),
    "alpha_dropout": (None, True),
    "feature_alpha_dropout": ({2: 2, 3: 2, 4: 2, 5: 2}, True),
}


def dropout(graph: Captured, node: Node) -> Node | None:
    for name, (dimensions, alpha) in DROPOUTS.items():
        found = graph.arguments(node, name)
        if found is None or graph.value(found["input"]) is None:
            continue
        p, dim = _constant(found["p"]), graph.value(found["input"]).dim()
        if found["training"] is not True or p is None or not 0 < p <= 1:
            return None
        if found["inplace"] and not graph.consumed(found["input"], node):
            return None
        if dimensions is not None and dim not in dimensions:
            return None
        mask = -1 if dimensions is None else dimensions[dim]
        return graph.replace(f"F.{name}", {node: None}, [], "dropout", found["input"], float(p), mask, alpha)
    return None


# How a mask of whole samples is made, in place: the names of the ops that its memory sees, and whether it is scaled.
MASKS = {("empty", "bernoulli_", "div_"): True, ("empty", "bernoulli_"): False, ("add", "floor_"): False}


def drop_path(graph: Captured, node: Node) -> Node | None:
    """Stochastic depth as timm, torchvision and transformers write it: times a random tensor of [N, 1, ...]."""
    name, operands = graph.read(node)
    for x, mask in (operands, operands[::-1]) if name == "mul" else ():
        value, drawn = graph.value(x), graph.value(mask)
        if value is None or drawn is None or value.dim() < 2 or drawn.dim() != value.dim():
            continue
        if not graph.is_shape(mask, (value.shape[0], *[1] * (value.dim() - 1))) or graph.is_shape(mask, value.shape):
            continue
        made = [one for one in graph.nodes if graph.storages(one) & graph.storages(mask)]
        reads = [graph.read(one) for one in made]
        scaled = MASKS.get(tuple(name for name, _ in reads))
        if scaled is None or any(user not in (*made, node) for one in made for user in one.users):
            continue
        erased, keeps = list(made), [_constant(read[1][1]) for read in reads if read[0] in ("bernoulli_", "div_")]
        if reads[0][0] == "add":
            rand = [one for one in reads[0][1] if graph.read(one)[0] == "rand"]
            keeps += [_constant(one) for one in reads[0][1] if one not in rand]
            if len(rand) != 1 or graph.only_user(rand[0]) is not made[0]:
                continue
            erased += rand
        if not scaled:
            quotient, parts = graph.read(x)
            if quotient != "div" or graph.only_user(x) is not node:
                continue
            erased.append(x)
            keeps.append(_constant(parts[1]))
            x = parts[0]
        keep = keeps[0]
        if any(one is None or one != keep for one in keeps) or not 0 < keep < 1 or not graph.alike(node, x):
            continue
        return graph.replace("DropPath", {node: None}, erased, "dropout", x, 1.0 - keep, 1, False)
    return None


# Losses


def cross_entropy(graph: Captured, node: Node) -> Node | None:
    found = graph.arguments(node, "cross_entropy")
    if found is None or graph.value(found["input"]) is None:
        return None
    if found["size_average"] is not None or found["reduce"] is not None:
        return None
    smoothing = _constant(found["label_smoothing"])
    if smoothing is None or found["reduction"] not in ("none", "mean", "sum"):
        return None
    return graph.replace(
        "F.cross_entropy", {node: 0}, [], "cross_entropy",
        found["input"], found["target"], found["weight"], reduction_number(found["reduction"]), found["ignore_index"],
        float(smoothing),
    )  # fmt: skip


PATTERNS = (
    dropout_of_nothing,
    elementary_norm,
    drop_path,
    view_of_sum,
    add_norm,
    norm_act,
    act_dropout,
    dropout_add,
    row_norm,
    batch_norm,
    channel_norm,
    dropout,
    cross_entropy,
)
