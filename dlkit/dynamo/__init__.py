"""``torch.compile(model, backend="dlkit")``: norms, dropouts and losses of the captured graph by dlkit's kernels.

TorchDynamo captures what a model computes before autograd sees it. The backend replaces patterns in that graph by
dlkit's ops: a norm that is written in elementary ops, the residual add and the norm after it, across the border of two
blocks too. "dlkit" runs the rest of the graph as it stands; "dlkit_inductor" gives it to torch's compiler.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule, Node
from torch.utils.checkpoint import checkpoint

from dlkit._ops import op
from dlkit.dynamo._graph import Captured, Fused
from dlkit.dynamo._patterns import PATTERNS

__all__ = ["Fused", "dlkit", "dlkit_inductor", "fuse_graph"]

# What runs a graph of its own as if it stood in the place of the call.
BODIES = ("tag_activation_checkpoint", "invoke_subgraph", "wrap")


def fuse_graph(module: GraphModule, fused: list[Fused] | None = None) -> list[Fused]:
    """Replaces what dlkit has an op for in a graph of TorchDynamo's, in place.

    Args:
        module: the graph, with the values of the capture in ``meta["example_value"]``.
        fused: a list to append to.

    Returns:
        The list: a :class:`Fused` for everything replaced.
    """
    fused = [] if fused is None else fused
    for body in _bodies(module):
        fuse_graph(body, fused)
    graph = Captured(module)
    for pattern in PATTERNS:
        for node in list(reversed(graph.graph.nodes)):  # the last of a chain takes in the most
            if node in graph.order and node not in graph.transformed and node.op in ("call_function", "call_method"):
                pattern(graph, node)
    fused += (graph.made[node] for node in graph.graph.nodes if node in graph.made)
    module.recompile()
    return fused


def _bodies(module: GraphModule) -> list[GraphModule]:
    """The graphs inside of a graph that run in the place of a node of it."""
    names = [
        str(argument.target)
        for node in module.graph.nodes
        if node.op == "call_function" and getattr(node.target, "__name__", "") in BODIES
        for argument in node.all_input_nodes
        if argument.op == "get_attr"
    ]
    found = [getattr(module, name, None) for name in dict.fromkeys(names)]
    return [body for body in found if isinstance(body, GraphModule)]


def dlkit(
    module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend "dlkit". ``options={"report": list}``: a list to which a :class:`Fused` for each fusion is added."""
    report, others = _report(options)
    if others or mode:
        given = ", ".join([*others, *(["mode"] if mode else [])])
        raise ValueError(f"backend 'dlkit' knows the option report, got {given}; 'dlkit_inductor' takes inductor's")
    fuse_graph(module, report)
    _make_eager(module)
    return module.forward


def _make_eager(module: GraphModule) -> None:
    for body in _bodies(module):
        _make_eager(body)
    for node in module.graph.nodes:
        if getattr(node.target, "namespace", "") == "dlkit":
            node.args, node.kwargs = _by_position(node), {}
            node.target = _called(node.target._opname)
        elif getattr(node.target, "__name__", "") == "tag_activation_checkpoint":
            node.target = _checkpointed
    module.recompile()


def _by_position(node: Node) -> tuple[Any, ...]:
    """The arguments of an op in its schema's order, as the fast call takes them."""
    arguments = list(node.args)
    for argument in node.target._schema.arguments[len(arguments) :]:  # type: ignore[union-attr]
        given = argument.name in node.kwargs
        arguments.append(node.kwargs[argument.name] if given else argument.default_value)
    return tuple(arguments)


@functools.cache
def _called(name: str) -> Callable[..., Any]:
    """The op by dlkit's fast call, which costs 1.8 us; by ``torch.ops`` it is 4.3, and F.layer_norm's 3.0."""
    return op(name)


def _checkpointed(body: GraphModule, *args: Any, preserve_rng_state: bool = True, **options: Any) -> Any:
    """What torch leaves to its compiler, which draws the same masks in backward; without it they would be others."""
    options["use_reentrant"] = False
    if "_checkpoint_context_fn" in body.meta:
        options["context_fn"] = body.meta["_checkpoint_context_fn"]
    return checkpoint(body, *args, preserve_rng_state=preserve_rng_state, **options)


def dlkit_inductor(
    module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend "dlkit_inductor". Beside ``report`` it takes inductor's options and modes."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    report, others = _report(options)
    fused = fuse_graph(module)
    modes = list_mode_options(mode) if mode else {}
    compiled: Any = compile_fx(module, list(example_inputs), config_patches={**modes, **others})
    if report is not None:  # inductor may have asked for another capture instead
        report += fused
    return compiled


def _report(options: dict[str, Any] | None) -> tuple[list[Fused] | None, dict[str, Any]]:
    others = dict(options or {})
    report = others.pop("report", None)
    if report is not None and not isinstance(report, list):
        raise TypeError(f"the option report: expected a list to append to, got {type(report).__name__}")
    return report, others
