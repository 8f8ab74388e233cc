"""dlkit._ops: calling an op without torch.ops' own Python must change nothing that a caller can see."""

import sys

import pytest
import torch
from support.calls import CALLS, as_tuple, results_and_gradients
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dlkit
from dlkit import _C
from dlkit._ops import op
from dlkit.functional import add_layer_norm, dropout, dropout_add_rms_norm, layer_norm


@pytest.fixture
def arguments():
    return torch.randn(4, 16), (16,), torch.randn(16), torch.randn(16), 1e-5


def test_the_same_result_by_either_way(arguments):
    expected = torch.ops.dlkit.layer_norm(*arguments)
    for shape in ((16,), [16], torch.Size([16])):
        assert torch.equal(op("layer_norm")(arguments[0], shape, *arguments[2:]), expected)
    fewer = arguments[:3]  # the schema's defaults for the rest
    assert torch.equal(op("layer_norm")(*fewer), torch.ops.dlkit.layer_norm(*fewer))
    y, total = add_layer_norm(arguments[0], arguments[0], (16,))
    assert torch.equal(total, 2 * arguments[0])
    assert torch.equal(y, layer_norm(total, (16,)))


def test_keyword_only_arguments_keep_their_place():
    x = torch.randn(64)
    drawn = [dropout(x, 0.5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    stream = dlkit.random.Philox(1)
    with dlkit.random.use(stream):
        dropout(x, 0.5)
    assert stream.state_dict()["offset"] > 0

    class Tagged(torch.Tensor):
        pass

    # Through torch.ops, which needs them by name.
    again = dropout(x.as_subclass(Tagged), 0.5, generator=torch.Generator().manual_seed(1))
    assert type(again) is Tagged
    assert torch.equal(again.as_subclass(torch.Tensor), drawn[0])


def test_function_modes_and_subclasses_see_the_op(arguments):
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        layer_norm(*arguments)
    assert seen == [torch.ops.dlkit.layer_norm.default]


def test_dispatch_modes_see_the_op(arguments):
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        layer_norm(*arguments)
    assert torch.ops.dlkit.layer_norm.default in seen or torch.ops.dlkit.layer_norm_forward.default in seen


def test_graphs_hold_the_op(arguments):
    x, shape, weight, bias, eps = arguments
    function = lambda x: layer_norm(x, shape, weight, bias, eps)  # noqa: E731
    expected = function(x)
    symbolic = torch.fx.symbolic_trace(function)
    assert any(node.target is torch.ops.dlkit.layer_norm.default for node in symbolic.graph.nodes)
    assert torch.equal(symbolic(x), expected)
    assert torch.equal(make_fx(function)(x)(x), expected)
    other = torch.randn(4, 16)
    batched = torch.vmap(function)(torch.stack([x, other]))
    torch.testing.assert_close(batched, torch.stack([function(x), function(other)]))  # vmap takes torch's own op


def test_errors_are_those_of_torch_ops(arguments):
    function = op("layer_norm")
    wrong = [(), (arguments[0],), (*arguments, 1, 2), ("x", *arguments[1:]), (arguments[0], (8,))]
    for args in wrong:
        with pytest.raises(Exception) as expected:
            torch.ops.dlkit.layer_norm.default(*args)
        with pytest.raises(type(expected.value)) as got:
            function(*args)
        assert str(got.value).splitlines()[0] == str(expected.value).splitlines()[0]
    with pytest.raises(TypeError, match="by position"):
        _C.Call(torch.ops.dlkit.layer_norm.default, "dlkit::layer_norm")(input=arguments[0])
    with pytest.raises(RuntimeError, match="no_such_op"):
        _C.Call(None, "dlkit::no_such_op")


def test_nothing_is_kept(arguments):
    before = [sys.getrefcount(item) for item in arguments]
    for _ in range(100):
        layer_norm(*arguments)
        dropout_add_rms_norm(arguments[0], arguments[0], (16,), arguments[2])
    assert [sys.getrefcount(item) for item in arguments] == before


SIZES = {"N": 4, "L": 6, "C": 8}
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "permuted": lambda t: t.permute(*range(t.dim() - 1, -1, -1)).contiguous().permute(*range(t.dim() - 1, -1, -1)),
    "sliced": lambda t: torch.cat([t, t], -1)[..., ::2] if t.dim() > 1 else t,
    "expanded": lambda t: t[:1].expand_as(t) if t.dim() > 1 else t,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_lie_in_memory_as_real_ones_do(name, layout):
    call = CALLS[name]
    tensors = [LAYOUTS[layout](t.detach()).requires_grad_() for t in call.tensors({**SIZES, "L": 8, "N": 8})]
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t).detach().requires_grad_() for t in tensors]
    found = results_and_gradients(call, tensors)
    with mode:
        described = results_and_gradients(call, fakes)
    for fake, real in zip(described, found, strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


class Tagged(torch.Tensor):
    pass


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class PassingFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_modes_subclasses_and_inference_change_nothing(name):
    call = CALLS[name]
    tensors = call.tensors(SIZES)

    def run(function):
        torch.manual_seed(2)
        return function()

    wanted = run(lambda: results_and_gradients(call, tensors))
    for mode in (Passing(), PassingFunctions()):
        with mode:
            found = run(lambda: results_and_gradients(call, tensors))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    tagged = [t.detach().as_subclass(Tagged).requires_grad_() for t in tensors]
    found = run(lambda: results_and_gradients(call, tagged))
    assert all(type(t) is Tagged for t in found[: len(call(*tensors))])
    for mine, plain in zip(found, wanted, strict=True):
        assert torch.equal(mine.as_subclass(torch.Tensor), plain)
    with torch.inference_mode():
        found = run(lambda: call(*(t.clone() for t in tensors)))
    for mine, plain in zip(as_tuple(found), wanted, strict=False):
        assert mine.is_inference() and torch.equal(mine, plain)
