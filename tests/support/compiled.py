"""Architectures of support.architectures under torch.compile's backend "dlkit".

    PYTHONPATH=tests python -m support.compiled [name ...]

prints a row of the table of docs/fuse_and_replace.md for each: the fused ops of a training step with dropout.

    PYTHONPATH=tests python -m support.compiled --fused [name ...]

prints a row of the second table of docs/architectures.md for each, of all architectures if none is named: what
dlkit.fuse fuses, what the backend does, and how far a training step in float64 is from the original's, without dropout.
"""

import contextlib
import copy
import sys
from collections import Counter

import torch
from torch._subclasses.fake_tensor import FakeTensor

import dlkit
from dlkit.dynamo import fuse_graph
from dlkit.fusion._layers import NORMS
from support.architectures import TIMM, TRANSFORMERS, distances, make, results

NARROW = (torch.float32, torch.bfloat16, torch.float16)
SHOWN = ["bert", "roberta", "gpt2", "llama", "qwen3", "gemma2", "t5", "vit_tiny_patch16_224", "convnext_atto"]
SHOWN += ["swin_tiny_patch4_window7_224", "efficientnet_b0"]
COLUMNS = {
    "add and norm": ("add_layer_norm", "add_rms_norm"),
    "dropout, add and norm": ("dropout_add_layer_norm", "dropout_add_rms_norm"),
    "norm and activation": ("batch_norm_act", "group_norm_act"),
    "norm": ("layer_norm", "rms_norm", "batch_norm", "group_norm"),
    "dropout and add": ("dropout_add",),
    "activation and dropout": ("bias_act_dropout",),
    "dropout, drop path": ("dropout",),
}


class _Again(torch.fx.Interpreter):
    def run_node(self, node):
        value = super().run_node(node)
        if "example_value" in node.meta:
            node.meta["example_value"] = value
        return value


def widen(module):
    """Turns casts to fp32 or less into casts to float64, which lets modules that compute in fp32 be compared too."""

    def wide(argument):
        return torch.float64 if isinstance(argument, torch.dtype) and argument in NARROW else argument

    for node in module.graph.nodes:
        if node.op == "call_method" and node.target in ("float", "half", "bfloat16"):
            node.target = "double"
        node.args, node.kwargs = (torch.fx.node.map_aggregate(given, wide) for given in (node.args, node.kwargs))
    values = [node.meta.get("example_value") for node in module.graph.nodes if node.op == "placeholder"]
    with next((value.fake_mode for value in values if isinstance(value, FakeTensor)), contextlib.nullcontext()):
        _Again(module).run(*values)
    module.recompile()


def backend(fused=None, widened=False):
    """A backend that runs the captured graph; it fuses the graph first if there is a list to record the fusions."""

    def compile(module, inputs):
        if widened:
            widen(module)
        if fused is not None:
            fuse_graph(module, fused)
        return module.forward

    return compile


def step(model, example, dtype, fused=None, widened=False):
    """:func:`support.architectures.results` of the compiled model."""
    torch._dynamo.reset()
    return results(model, example, dtype, lambda model: model.compile(backend=backend(fused, widened)))


def kind_of(entry):
    return f"{entry.op}_act" if entry.op in ("batch_norm", "group_norm") and " and " in entry.replaced else entry.op


def fused_by_layers(model):
    """(norms that dlkit.fuse gives their activation, BatchNorms and GroupNorms that there are)."""
    norms, report = sum(isinstance(module, NORMS) for module in model.modules()), []
    dlkit.fuse(copy.deepcopy(model), report=report)
    return sum(issubclass(one.before, NORMS) and one.before is not one.after for one in report), norms


def print_fused(names):
    """The second table of docs/architectures.md."""
    print("| architecture | fuse: of BatchNorms and GroupNorms | " + " | ".join(COLUMNS) + " | largest difference |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for name in names or [*TIMM, *TRANSFORMERS]:
        fused, report = [], []
        model, example = make(name, 0.0)
        step(*make(name, 0.1), torch.float32, fused)
        count = Counter(map(kind_of, fused))
        cells = [sum(count[op] for op in ops) for ops in COLUMNS.values()]
        found, expected = (step(model, example, torch.float64, into, widened=True) for into in (report, None))
        taken, norms = fused_by_layers(model)
        cells = [f"{taken} of {norms}" if norms else "none", *map(str, cells), f"{distances(found, expected)[0]:.0e}"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main(names):
    torch.set_num_threads(1)
    if names[:1] == ["--fused"]:
        return print_fused(names[1:])
    print("| architecture | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name in names or SHOWN:
        fused = []
        step(*make(name, 0.1), torch.float32, fused)
        count = Counter(map(kind_of, fused))
        cells = [sum(count[op] for op in ops) for ops in COLUMNS.values()]
        print(f"| {name} | " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
