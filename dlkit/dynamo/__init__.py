"""``torch.compile(model, backend="dlkit")``: norms, dropouts and losses of the captured graph by dlkit's kernels.

TorchDynamo captures what a model computes before autograd sees it. The backend replaces patterns in that graph by
dlkit's ops: a norm that is written in elementary ops, the residual add and the norm behind it, across the border of two
blocks too. "dlkit" runs the rest of the graph as it stands; "dlkit_inductor" gives it to torch's compiler.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

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
    bodies = [
        body
        for node in module.graph.nodes
        if node.op == "call_function" and getattr(node.target, "__name__", "") in BODIES
        for argument in node.args
        if isinstance(argument, torch.fx.Node) and argument.op == "get_attr"
        and isinstance(body := getattr(module, str(argument.target), None), GraphModule)
    ]  # fmt: skip
    for body in dict.fromkeys(bodies):
        fuse_graph(body, fused)
    graph = Captured(module, fused)
    if graph.transformed:
        return fused
    for pattern in PATTERNS:
        for node in list(graph.graph.nodes):
            if node in graph.order and node.op in ("call_function", "call_method"):
                pattern(graph, node)
    module.recompile()
    return fused


def dlkit(
    module: GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """The backend "dlkit". ``options={"report": list}``: a list to which a :class:`Fused` for each fusion is added."""
    report, others = _report(options)
    if others or mode:
        given = ", ".join([*others, *(["mode"] if mode else [])])
        raise ValueError(f"backend 'dlkit' knows the option report, got {given}; 'dlkit_inductor' takes inductor's")
    fuse_graph(module, report)
    return module.forward


def dlkit_inductor(
    module: GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """The backend "dlkit_inductor". Beside ``report`` it takes inductor's options and modes."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    report, others = _report(options)
    fuse_graph(module, report)
    return compile_fx(module, list(example_inputs), config_patches={**(list_mode_options(mode) if mode else {}), **others})


def _report(options: dict[str, Any] | None) -> tuple[list[Fused] | None, dict[str, Any]]:
    others = dict(options or {})
    report = others.pop("report", None)
    if report is not None and not isinstance(report, list):
        raise TypeError(f"the option report: expected a list to append to, got {type(report).__name__}")
    return report, others
