"""A graph that TorchDynamo captured, as the patterns read and change it.

A node is read as a name and its operands, whichever of torch's spellings it has. The values that TorchDynamo computed
in fake tensors (``meta["example_value"]``) say which dtypes, shapes and storages there are. A change is made only if
the new op, run on these values, gives tensors of the same shape, strides and dtype, and if nothing between the first
and the last node of the pattern could tell the difference: a write to memory that the pattern reads, autocast or
gradients switched on or off.
"""

import contextlib
import functools
import inspect
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from dlkit import functional

CALLS = ("call_function", "call_method", "call_module")
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDE = (torch.float64, torch.float32)

# The functions and methods that go by each name.
SPELLINGS: dict[str, tuple[Any, ...]] = {
    "add": (operator.add, torch.add, "add"),
    "iadd": (operator.iadd, "add_"),
    "sub": (operator.sub, torch.sub, "sub"),
    "mul": (operator.mul, torch.mul, torch.multiply, "mul"),
    "div": (operator.truediv, torch.div, "div"),
    "pow": (operator.pow, torch.pow, "pow"),
    "square": (torch.square, "square"),
    "sqrt": (torch.sqrt, "sqrt"),
    "rsqrt": (torch.rsqrt, "rsqrt"),
    "mean": (torch.mean, "mean"),
    "var": (torch.var, "var"),
    "tanh": (torch.tanh, "tanh", F.tanh),
    "cast": ("to", "float", "double", "half", "bfloat16", "type_as", "type"),
    "relu": (torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"),
    "gelu": (F.gelu,),
    "silu": (F.silu,),
    "hardswish": (F.hardswish,),
    "relu6": (F.relu6,),
    "hardtanh": (F.hardtanh,),
    "leaky_relu": (F.leaky_relu,),
    "sigmoid": (torch.sigmoid, F.sigmoid, "sigmoid"),
    "layer_norm": (F.layer_norm, torch.layer_norm),
    "rms_norm": (F.rms_norm, torch.rms_norm),
    "batch_norm": (F.batch_norm,),
    "group_norm": (F.group_norm,),
    "instance_norm": (F.instance_norm,),
    "cross_entropy": (F.cross_entropy,),
    "dropout": (F.dropout,),
    "dropout1d": (F.dropout1d,),
    "dropout2d": (F.dropout2d,),
    "dropout3d": (F.dropout3d,),
    "alpha_dropout": (F.alpha_dropout,),
    "feature_alpha_dropout": (F.feature_alpha_dropout,),
    "empty": (torch.empty, "new_empty"),
    "rand": (torch.rand,),
    "bernoulli_": ("bernoulli_",),
    "div_": ("div_", operator.itruediv),
    "floor_": (torch.floor_, "floor_"),
}
PERMUTING = ("permute", "transpose", "movedim", torch.permute, torch.transpose, torch.movedim)
# Whoever reads these looks at their keywords.
READ_AS_THEY_STAND = {
    "gelu", "relu", "silu", "hardswish", "relu6", "hardtanh", "leaky_relu", "empty", "rand", "bernoulli_", "div_",
    "floor_",
}  # fmt: skip
NAMES = {target: name for name, targets in SPELLINGS.items() for target in targets}
# Of torch's functions and of dlkit's, which have the same.
SIGNATURES = {name: inspect.signature(getattr(functional, name)) for name in SPELLINGS if name in functional.__all__}
IN_PLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.ipow, operator.imod,
    operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.setitem,
}  # fmt: skip


class Fused(NamedTuple):
    """What a backend replaced: dlkit's op, what stood there, and the module whose code it is."""

    op: str
    replaced: str
    module: str
    cls: type | None

    def __str__(self) -> str:
        return f"{self.module or '(the model itself)'}: {self.replaced}, now dlkit's {self.op}"


class Captured:
    """One graph, and what was replaced in it: ``made`` has dlkit's nodes."""

    def __init__(self, module: GraphModule) -> None:
        self.graph = module.graph
        self.made: dict[Node, Fused] = {}
        values = [node.meta.get("example_value") for node in self.graph.nodes]
        # That of the capture; the one of torch._guards.detect_fake_mode() is another, for the backends.
        self.fake: Any = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
        self.memory: dict[Node, set[int]] = {}
        # To what memory a node writes, and whether it is a barrier.
        self.effects: dict[Node, tuple[set[int], bool]] = {}
        self.transformed: set[Node] = set()  # inside of torch.func, where tensors are not what they seem
        depth = 0
        for node in self.graph.nodes:
            if _transforms(node):
                depth += {"_increment_nesting": 1, "_decrement_nesting": -1}.get(str(node.target.__name__)[-18:], 0)
            if depth > 0 or _transforms(node):
                self.transformed.add(node)
        self._number()

    def _number(self) -> None:
        """Where each node stands, which write to memory, and where autocast or the like changes."""
        self.order = {node: place for place, node in enumerate(self.graph.nodes)}
        self.nodes = list(self.order)
        for node in self.nodes:
            if node not in self.effects:
                written = {storage for one in _written(node) for storage in self.storages(one)}
                self.effects[node] = (written, node.op in CALLS and _changes_mode(node))
        effects = [(place, *self.effects[node]) for place, node in enumerate(self.nodes)]
        self.writes = [(place, written) for place, written, _ in effects if written]
        self.barriers = [place for place, _, barrier in effects if barrier]

    def autocasts(self, place: int) -> list[Node]:
        """What has entered autocast, and not left it, before a place."""
        entered: list[Node] = []
        for node in (self.nodes[barrier] for barrier in self.barriers if barrier < place):
            if node.target is torch.amp.autocast_mode._enter_autocast:
                entered.append(node)
            elif node.target is torch.amp.autocast_mode._exit_autocast:
                entered.remove(node.args[0])
        return entered

    # Values

    def value(self, node: Any) -> Any:
        """The fake tensor of a node, if it is a plain one of a floating type; None for everything else."""
        known = isinstance(node, Node) and node not in self.transformed
        value: Any = node.meta.get("example_value") if known else None
        plain = isinstance(value, FakeTensor) and value.dtype in FLOATING and value.device.type in ("cpu", "cuda")
        return value if plain and value.layout is torch.strided else None

    def dtype(self, node: Any) -> torch.dtype | None:
        value = self.value(node)
        return None if value is None else value.dtype

    def alike(self, *nodes: Any) -> bool:
        """Whether all are tensors of one shape and dtype."""
        values = [self.value(node) for node in nodes]
        return all(value is not None for value in values) and all(
            value.dtype == values[0].dtype and _same(value.shape, values[0].shape) for value in values
        )

    def is_vector(self, node: Any, of: Any) -> bool:
        """Whether a tensor has one element for each column of another, and its dtype."""
        value, other = self.value(node), self.value(of)
        return (
            value is not None
            and other is not None
            and other.dim() > 0
            and value.dtype == other.dtype
            and _same(value.shape, other.shape[-1:])
        )

    def contiguous(self, node: Any) -> bool:
        value = self.value(node)
        return _same(value.stride(), _dense_strides(value.shape))

    def storages(self, node: Node) -> set[int]:
        """The memory that a node's tensors lie in."""
        if node not in self.memory:
            value = node.meta.get("example_value")
            parts = value if isinstance(value, (tuple, list)) else (value,)
            with contextlib.suppress(NotImplementedError):  # a sparse tensor has none
                self.memory[node] = {part.untyped_storage()._cdata for part in parts if isinstance(part, Tensor)}
        return self.memory.setdefault(node, set())

    # Reading

    def read(self, node: Any) -> tuple[str, tuple[Any, ...]]:
        """A name and the operands. Several spellings of one idea give the same; ("", ()) is none of them."""
        if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
            return "", ()
        name, args, keywords = NAMES.get(node.target, ""), node.args, node.kwargs
        if name in ("mean", "var"):
            return _read_moment(self, name, node)
        if name in ("add", "sub", "mul", "iadd") and not keywords and len(args) == 2:
            return ("square", args[:1]) if name == "mul" and args[0] is args[1] else (name, args)
        if name == "pow" and not keywords and len(args) == 2:
            return {2: ("square", args[:1]), -0.5: ("rsqrt", args[:1])}.get(_constant(args[1]), ("pow", args))
        if name == "div" and not keywords and len(args) == 2:
            root, operands = self.read(args[1])
            return ("rsqrt", operands) if root == "sqrt" and _constant(args[0]) == 1 else (name, args)
        if name in ("square", "sqrt", "rsqrt", "tanh") and not keywords and len(args) == 1:
            return name, args
        if name == "cast" and self.dtype(node) and self.value(args[0]) is not None:
            return (name, args[:1]) if self.value(node).device == self.value(args[0]).device else ("", ())
        if name in ("bernoulli_", "div_", "floor_") and keywords:
            return "", ()
        if name == "sigmoid" and (keywords or len(args) != 1):
            return "", ()
        return (name, args) if name in READ_AS_THEY_STAND or name == "sigmoid" else ("", ())

    def arguments(self, node: Any, *names: str) -> dict[str, Any] | None:
        """The arguments of a call of one of these functions by name, None for another node."""
        if not isinstance(node, Node) or node.op != "call_function":
            return None
        name = NAMES.get(node.target, "")
        if name not in names:
            return None
        if node.target in (torch.layer_norm, torch.rms_norm):
            args, keywords = node.args[:5], {k: v for k, v in node.kwargs.items() if k != "cudnn_enable"}
        else:
            args, keywords = node.args, node.kwargs
        try:
            bound = SIGNATURES[name].bind(*args, **keywords)
        except TypeError:
            return None
        bound.apply_defaults()
        return bound.arguments

    def widened(self, node: Any) -> Any:
        """What a node was before casts that lose nothing."""
        while self.read(node)[0] == "cast":
            before, after = self.dtype(node.args[0]), self.dtype(node)
            if before != after and (before in WIDE or after != torch.float32):
                break
            node = node.args[0]
        return node

    def narrowed(self, node: Any) -> bool:
        """Whether a tensor is another one in fewer bits, or was computed from one."""
        name, operands = self.read(node)
        return name == "cast" and self.dtype(operands[0]) == torch.float64 != self.dtype(node)

    def only_user(self, node: Node) -> Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def consumed(self, node: Any, by: Node) -> bool:
        """Whether ``by`` is all that ever sees this tensor and its memory: then in place or not is the same."""
        mine = self.storages(node) if isinstance(node, Node) else set()
        chain = [by]  # back to where the memory comes from, each seen by the next alone
        while isinstance(node, Node) and self.only_user(node) is chain[-1]:
            chain.append(node)
            node = next((one for one in node.all_input_nodes if self.storages(one) & mine), None)
        if len(chain) == 1 or node is not None or chain[-1].op not in ("call_function", "call_method"):
            return False
        after = self._sharing(by, mine)
        return all(one in chain or one in after or not self.storages(one) & mine for one in self.order)

    def _sharing(self, node: Node, storages: set[int]) -> set[Node]:
        """What comes of ``node`` and shares its memory."""
        found: set[Node] = set()
        waiting = [node]
        while waiting:
            for user in waiting.pop().users:
                if user not in found and self.storages(user) & storages:
                    found.add(user)
                    waiting.append(user)
        return found

    def promoted(self, node: Any, *operands: Any) -> bool:
        """Whether tensors of one shape and several dtypes give a node that has a gradient, in the widest of these."""
        values = [self.value(one) for one in (node, *operands)]
        if any(value is None for value in values) or not values[0].requires_grad:
            return False
        wide = functools.reduce(torch.promote_types, [value.dtype for value in values[1:]])
        return bool(values[0].dtype == wide) and all(_same(value.shape, values[0].shape) for value in values)

    def addends(self, node: Any, mixed: bool = False) -> tuple[Node, Node] | None:
        """The two tensors of one shape and dtype of which a node is the sum; with ``mixed`` the dtypes may differ."""
        name, operands = self.read(node)
        if name not in ("add", "iadd"):
            return None
        if not self.alike(node, *operands) and not (mixed and self.promoted(node, *operands)):
            return None
        if name == "iadd" and (operands[0] is operands[1] or not self.consumed(operands[0], node)):
            return None
        return operands[0], operands[1]

    def dropped(self, node: Any, by: Node | None) -> tuple[Node, float] | None:
        """(input, p) of a plain dropout that drops something, and that ``by`` alone sees."""
        found = self.arguments(node, "dropout")
        if found is None or (by is not None and self.only_user(node) is not by):
            return None
        p = _constant(found["p"])
        if found["training"] is not True or p is None or not 0 < p < 1 or not self.alike(node, found["input"]):
            return None
        return None if found["inplace"] and not self.consumed(found["input"], node) else (found["input"], p)

    def is_shape(self, node: Any, sizes: Sequence[Any]) -> bool:
        return _same(self.value(node).shape, sizes)

    # Changing

    def sum_views(self, node: Node) -> None:
        """Makes of a view of a sum, which nothing else sees, the sum of two views."""
        total: Any = node.args[0]
        terms = self.addends(total, mixed=True)
        if terms is None or self.only_user(total) is not node or not all(map(self.contiguous, (node, *terms))):
            return
        if _same(self.value(node).shape[-1:], self.value(total).shape[-1:]):
            self._sum_views(node, terms, None)

    def sum_permutations(self, node: Node) -> None:
        """Makes of a permuted sum the sum of two permuted tensors, if their memory is in that order already.

        What else sees the sum is given the new one, permuted back.
        """
        total: Any = node.args[0]
        terms, order = self.addends(total, mixed=True), self.permutation(node)
        if terms is None or order is None:
            return
        permuted = [self.value(one).permute(order) for one in (total, *terms)]
        if all(_same(value.stride(), _dense_strides(value.shape)) for value in (self.value(node), *permuted)):
            self._sum_views(node, terms, tuple(order.index(i) for i in range(len(order))))

    def _sum_views(self, node: Node, terms: tuple[Node, Node], back: tuple[int, ...] | None) -> None:
        total: Any = node.args[0]
        others = [user for user in total.users if user is not node]
        place = self._place({node, total}, [*terms, *node.all_input_nodes[1:]], [*node.users, *others], set())
        if place is None:
            return
        with self.graph.inserting_before(place):
            arguments = [((term, *node.args[1:]), node.kwargs) for term in terms]
            views = [self.graph.create_node(node.op, node.target, *given) for given in arguments]
            new = self.graph.call_function(operator.add, tuple(views))
            again = self.graph.call_method("permute", (new, back)) if others else None
        value = self.value(node)
        with self.fake, torch.no_grad():
            for made, old in ((new, total), *zip(views, terms, strict=True)):
                storage = self.value(old)
                self._describe(made, old, storage.as_strided(value.shape, value.stride(), storage.storage_offset()))
        if again is not None:
            self._describe(again, total, self.value(total))
            total.replace_all_uses_with(again, delete_user_cb=lambda user: user is not node)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        self.graph.erase_node(total)
        self._number()

    def permutation(self, node: Any) -> tuple[int, ...] | None:
        """Where each dimension comes from, if a node is its first operand with the dimensions in another order."""
        if not isinstance(node, Node) or node.target not in PERMUTING or not node.args:
            return None
        value = self.value(node.args[0])
        if value is None or self.value(node) is None:
            return None
        sizes = torch.empty(tuple(range(2, 2 + value.dim())), device="meta")  # which tell the dimensions apart
        call: Any = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
        return tuple(size - 2 for size in call(sizes, *node.args[1:], **node.kwargs).shape)

    def erase(self, node: Node) -> None:
        self.graph.erase_node(node)
        self._number()

    def replace(
        self, what: str, replaced: dict[Node, int | None], erased: Iterable[Node], op: str, *args: Any
    ) -> Node | None:
        """Puts ``torch.ops.dlkit.<op>(*args)`` in the place of nodes, if it can stand there; else None.

        Args:
            what: what stood there, for the report.
            replaced: the nodes whose values it gives; to each the number of the result, None where it is the only one.
                The first stands for the pattern in the report.
            erased: the other nodes of the pattern.
        """
        target = getattr(torch.ops.dlkit, op).default
        nodes = {*replaced, *erased}
        gone = set(nodes)  # without what others use too
        while staying := [n for n in gone if n not in replaced and any(user not in gone for user in n.users)]:
            gone -= set(staying)
        inputs = [arg for arg in args if isinstance(arg, Node)]
        inputs += [arg for several in args if isinstance(several, (tuple, list)) for arg in several]
        inputs = [arg for arg in inputs if isinstance(arg, Node)]
        users = [user for node in replaced for user in node.users if user not in gone]
        kept = {storage for node in (*inputs, *list(replaced)[1:]) for storage in self.storages(node)}
        place = self._place(nodes, inputs, users, kept)
        if place is None or not self._gives_the_same(target, args, replaced):
            return None
        first = next(iter(replaced))
        with self.graph.inserting_before(place):
            new = self.graph.call_function(target, args)
            self._describe(new, first, None)
            for node, number in replaced.items():
                result = new
                if number is not None:
                    if not any(user not in gone for user in node.users):
                        continue
                    result = self.graph.call_function(operator.getitem, (new, number))
                self._describe(result, node, node.meta["example_value"])
                node.replace_all_uses_with(result)
        for node in sorted(gone, key=self.order.__getitem__, reverse=True):
            self.graph.erase_node(node)
        for earlier in (self.made.pop(node) for node in nodes if node in self.made):  # what took the first step
            what = what.replace(earlier.replaced.split()[0], earlier.replaced)
        path, cls = list((new.meta.get("nn_module_stack") or {"": ("", None)}).values())[-1]
        self.made[new] = Fused(op, what, _module_name(path), cls if isinstance(cls, type) else None)
        self._number()
        return new

    def _place(self, nodes: set[Node], inputs: Sequence[Node], users: Sequence[Node], kept: set[int]) -> Node | None:
        """Before which node the new op can stand: after what it reads, before what reads it."""
        places = [self.order[node] for node in nodes]
        first, last = min(places), max(places)
        ready = max((self.order[node] for node in inputs), default=-1)
        needed = min((self.order[node] for node in users), default=last + 1)
        if ready >= needed:
            return None
        own = {self.order[node] for node in nodes}
        mine = {storage for node in nodes for storage in self.effects[node][0]}
        statistics = mine - {storage for node in nodes for storage in self.storages(node)}
        touched = {storage for node in (*nodes, *inputs) for storage in self.storages(node)}
        for node in self.nodes[first + 1 : last]:
            if self.order[node] not in own and any(self.storages(one) & mine for one in node.all_input_nodes):
                return None
        if any(first < place < last and place not in own for place in self.barriers):
            return None
        for place, written in self.writes:
            if first < place < last and place not in own and written & touched:
                return None
            # What is kept for backward: torch's ops may keep something else, which can be written to.
            if place > last and written & (kept - statistics) and torch.is_grad_enabled():
                return None
        place = last if last < needed else max(ready, first - 1) + 1
        return self.nodes[place]

    def _gives_the_same(self, target: Any, args: Any, replaced: dict[Node, int | None]) -> bool:
        """Whether the op takes these arguments, and gives tensors like those that it stands for."""
        if self.fake is None:
            return False
        values = torch.fx.node.map_arg(args, lambda node: node.meta.get("example_value"))
        node = next(iter(replaced))
        suppressed = self.fake.shape_env.suppress_guards() if self.fake.shape_env else contextlib.nullcontext()
        with contextlib.ExitStack() as stack:
            stack.enter_context(suppressed)
            stack.enter_context(self.fake)
            for entered in self.autocasts(self.order[node]):
                arguments: Any = entered.args
                stack.enter_context(torch.autocast(*arguments))
            stack.enter_context(torch.no_grad())
            try:
                results = target(*values)
            except (RuntimeError, ValueError, TypeError, NotImplementedError):  # an argument that dlkit refuses
                return False
            for node, number in replaced.items():
                result, expected = results if number is None else results[number], node.meta["example_value"]
                same = result.dtype == expected.dtype and _same(result.shape, expected.shape)
                if not same or not _same(result.stride(), expected.stride()):
                    return False
        return True

    def _describe(self, new: Node, old: Node, value: Any) -> None:
        new.meta.update({key: old.meta[key] for key in ("nn_module_stack", "stack_trace") if key in old.meta})
        new.meta["example_value"] = () if value is None else value


def _changes_mode(node: Node) -> bool:
    """Whether a call changes what others do: autocast, whether gradients are recorded, and all that gives no value."""
    return "example_value" not in node.meta or node.target is torch._C._set_grad_enabled or _transforms(node)


def _transforms(node: Node) -> bool:
    """Whether it belongs to torch.func."""
    return node.op == "call_function" and (getattr(node.target, "__module__", "") or "").startswith(
        ("torch._C._functorch", "torch._functorch")
    )


def _written(node: Node) -> Iterator[Node]:
    """The tensors among a call's arguments to which it may write."""
    target, tensors = node.target, node.all_input_nodes
    out: Any = node.kwargs.get("out")
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if _is_unknown(node):
        yield from tensors
    elif isinstance(target, torch._ops.OpOverload):
        schema = target._schema.arguments
        given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | node.kwargs
        written: list[Node] = []
        torch.fx.node.map_arg([given.get(argument.name) for argument in schema if argument.is_write], written.append)
        yield from written
    elif target in IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__")):
        yield from tensors[:1]
    elif target in (F.batch_norm, torch.batch_norm, F.instance_norm):
        yield from tensors[1:3]
    elif isinstance(out, Node):
        yield out
    elif _in_place(node):
        yield from tensors[:1]


def _is_unknown(node: Node) -> bool:
    """Whether a call may write to any of its arguments, for all that is known."""
    target: Any = node.target
    if node.op == "call_module" or isinstance(target, torch._ops.HigherOrderOperator):
        return True
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    home = (getattr(target, "__module__", None) or "torch").partition(".")[0]
    return node.op == "call_function" and home not in ("torch", "_operator", "builtins", "math")


def _in_place(node: Node) -> bool:
    if node.kwargs.get("inplace"):
        return True
    if node.op != "call_function" or not inspect.isfunction(node.target):
        return False
    place = _place_of_in_place(node.target)
    return place is not None and place < len(node.args) and bool(node.args[place])


@functools.cache
def _place_of_in_place(function: Callable[..., Any]) -> int | None:
    parameters = list(inspect.signature(function).parameters)
    return parameters.index("inplace") if "inplace" in parameters else None


def _read_moment(graph: Captured, name: str, node: Node) -> tuple[str, tuple[Any, ...]]:
    """A mean or a biased variance over the last dimension, which stays."""
    given = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | node.kwargs
    dim, value = given.pop("dim", None), graph.value(node.args[0]) if node.args else None
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    last: Any = value is not None and dim in (-1, value.dim() - 1)
    if name == "var":
        biased = given.pop("unbiased", None) is False or given.pop("correction", 1) == 0
        last = last and biased
    given.pop("input", None)
    return (name, node.args[:1]) if last and given == {"keepdim": True} else ("", ())


def _constant(value: Any) -> Any:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _same(one: Iterable[Any], other: Iterable[Any]) -> bool:
    one, other = tuple(one), tuple(other)
    return len(one) == len(other) and all(statically_known_true(a == b) for a, b in zip(one, other, strict=True))


def _dense_strides(shape: Sequence[Any]) -> list[Any]:
    """The strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return strides[::-1]


def _module_name(path: str) -> str:
    """``L['self'].layers.0`` without what holds the model."""
    return re.sub(r"^[LG]\['\w+'\]\.?", "", path)
