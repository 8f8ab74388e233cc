"""Every function under compile and export with all sizes dynamic gives eager's results from one graph."""

import pytest
import torch
from support.calls import CALLS, RANDOM, results_and_gradients

import dlkit

SIZES = [{"N": 4, "L": 6, "C": 8}, {"N": 5, "L": 7, "C": 10}, {"N": 3, "L": 5, "C": 12}]
# Sizes that a compiler treats as constants: each needs its own graph.
ONE_OR_NONE = [{"N": 1, "L": 6, "C": 8}, {"N": 0, "L": 6, "C": 8}, {"N": 4, "L": 1, "C": 8}]


def outcome(call, tensors):
    torch.manual_seed(1)
    try:
        return results_and_gradients(call, tensors)
    except (RuntimeError, ValueError, IndexError) as error:
        return error


def assert_same(call, other, tensors):
    """Both give the same values and strides, or both raise."""
    wanted, found = outcome(call, tensors), outcome(other, tensors)
    if isinstance(wanted, Exception) or isinstance(found, Exception):
        assert isinstance(wanted, Exception) and isinstance(found, Exception), (wanted, found)
        return
    for mine, eager in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, eager, equal_nan=True)
        assert mine.stride() == eager.stride() or mine.numel() < 2


@pytest.mark.parametrize("name", CALLS)
def test_compiled_once_for_all_sizes(name, one_thread):
    torch._dynamo.reset()
    call, graphs = CALLS[name], []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for sizes in SIZES:
        tensors = call.tensors(sizes)
        for tensor in tensors:
            for dim in range(tensor.dim()):
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        assert_same(call, compiled, tensors)
    assert len(graphs) == 1
    for sizes in ONE_OR_NONE:
        assert_same(call, compiled, call.tensors(sizes))


@pytest.mark.parametrize("name", CALLS)
def test_exported_once_for_all_sizes(name, one_thread):
    call = CALLS[name]

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return call(*tensors)

    def export(tensors, dynamic_shapes=None):
        return torch.export.export(Module(), tuple(tensors), dynamic_shapes=dynamic_shapes)

    tensors = [tensor.detach() for tensor in call.tensors(SIZES[0])]
    program = export(tensors, (tuple(dict.fromkeys(range(t.dim()), torch.export.Dim.AUTO) for t in tensors),))
    for module in (program.module(), program.run_decompositions().module()):
        for sizes in SIZES:
            tensors = [tensor.detach() for tensor in call.tensors(sizes)]
            # A program draws by torch's own ops: its masks are those of a program for fixed sizes, not eager's.
            expected = export(tensors).module() if name in RANDOM else call
            torch.manual_seed(1)
            wanted = expected(*tensors)
            torch.manual_seed(1)
            for mine, theirs in zip(module(*tensors), wanted, strict=True):
                torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", CALLS)
def test_sizes_that_depend_on_data(name, one_thread):
    """Includes 0 rows, which a graph cannot know in advance: kernels accept empty input."""
    torch._dynamo.reset()
    call = CALLS[name]

    def on_some(keep, *tensors):
        picked = [t[keep] if shape[0] == "N" else t for t, shape in zip(tensors, call.shapes, strict=True)]
        return call(*picked)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(on_some, backend="aot_eager", fullgraph=True)
        for chosen in (2, 0):
            keep = torch.arange(4) < chosen
            call_eager, call_compiled = (lambda *t, f=f, k=keep: f(k, *t) for f in (on_some, compiled))
            tensors = call.tensors(SIZES[0])
            if chosen == 0 and name in ("instance_norm", "instance_norm, running"):
                # torch's own op fails in eager; running statistics of an empty batch are refused.
                y = outcome(call_compiled, tensors)
                assert isinstance(y, RuntimeError) if "running" in name else y[0].numel() == 0
            else:
                assert_same(call_eager, call_compiled, tensors)


@pytest.mark.parametrize("name", ["BatchNorm1d", "InstanceNorm1d", "SyncBatchNorm"])
def test_layers_with_statistics_train_at_any_size(name, one_thread):
    torch._dynamo.reset()
    layers = [getattr(dlkit.nn, name)(8, momentum=momentum, track_running_stats=True) for momentum in (0.1, 0.1)]
    compiled = torch.compile(layers[0], backend="aot_eager", fullgraph=True)
    for batch in (4, 5, 1):
        x = torch.randn(batch, 8, 6)
        torch.testing.assert_close(compiled(x), layers[1](x))
    for mine, eager in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
        torch.testing.assert_close(mine, eager)
