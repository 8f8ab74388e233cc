"""batch_norm, group_norm and instance_norm for torch: graphs, compilers, layers and bad input."""

import itertools

import pytest
import torch
import torch.nn.functional as native
from support.inputs import lay_out, make
from torch import Tensor

import dlkit
import dlkit.functional as fused
from dlkit._activation import ACTIVATIONS, activated
from dlkit._ops import op

EPS, SLOPE = 1e-5, 0.2


def both_layouts(x: Tensor) -> list[Tensor]:
    return [x, x.contiguous(memory_format=torch.channels_last)] if x.dim() == 4 else [x]


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_change_no_bit(threads):
    before = torch.get_num_threads()
    for shape, memory_format in itertools.product(
        [(3, 70, 40, 40), (2, 3, 150, 150)], [torch.contiguous_format, torch.channels_last]
    ):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(shape, generator=generator).contiguous(memory_format=memory_format).requires_grad_()
        weight = torch.randn(shape[1], generator=generator, requires_grad=True)
        results = []
        for count in (1, threads):
            torch.set_num_threads(count)
            try:
                y = fused.batch_norm_relu(x, None, None, weight, training=True)
                z = fused.group_norm(x, shape[1], weight)
                results.append([y, z, *torch.autograd.grad((y * z).sum(), (x, weight))])
            finally:
                torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradients_of_gradients(training, relu, with_residual):
    for x in both_layouts(torch.randn(3, 2, 4, 3, dtype=torch.float64)):
        x.requires_grad_()
        weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in "ab")
        residual = torch.randn(3, 2, 4, 3, dtype=torch.float64, requires_grad=True) if with_residual else None
        running = (torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))

        def call(x, weight, bias, residual=None):
            function = fused.batch_norm_relu if relu else fused.batch_norm
            extra = {"residual": residual} if relu else {}
            y = function(x, running[0].clone(), running[1].clone(), weight, bias, training, **extra)  # noqa: B023
            return y if relu or residual is None else y + residual

        inputs = (x, weight, bias) + ((residual,) if with_residual else ())
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


def test_gradients_of_gradients_in_groups():
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in "ab")
    for call in (
        lambda *t: fused.group_norm(t[0], 2, *t[1:]),
        lambda *t: fused.instance_norm(t[0], None, None, *t[1:]),
    ):
        assert torch.autograd.gradcheck(call, (x, weight, bias))
        assert torch.autograd.gradgradcheck(call, (x, weight, bias))
        assert torch.autograd.gradgradcheck(lambda a, b, call=call: call(a, None, b), (x, bias))
    assert torch.autograd.gradgradcheck(lambda a, b: fused.batch_norm(a, None, None, None, b, True), (x, bias))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["group_norm", "instance_norm", "batch_norm"])
def test_gradients_in_any_order(name, channels_last, create_graph):
    """Strides of a gradient may differ from its input's; torch's batch_norm then exchanges the gradient's elements."""
    for shape, order in itertools.product([(1, 2, 3, 1), (2, 4, 3, 5)], itertools.permutations(range(4))):
        x, grad = lay_out(make(shape, torch.float32), channels_last), make(shape, torch.float32)
        there_and_back = [order.index(d) for d in range(4)]
        permuted = grad.permute(order).contiguous().permute(there_and_back)
        assert torch.equal(permuted, grad)
        weight, bias = (make(shape[1:2], torch.float32).requires_grad_() for _ in "wb")
        found = []
        for functional, dtype, given in ((fused, torch.float32, permuted), (native, torch.float64, grad)):
            leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (x, weight, bias)]
            if name == "group_norm":
                y = functional.group_norm(leaves[0], 2, *leaves[1:])
            elif name == "instance_norm":
                y = functional.instance_norm(leaves[0], None, None, *leaves[1:])
            else:
                y = functional.batch_norm(leaves[0], None, None, *leaves[1:], training=True)
            found.append(torch.autograd.grad(y, leaves, given.to(dtype), create_graph=create_graph))
        for ours, right in zip(*found, strict=True):
            torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"])
def test_gradients_of_gradients_in_16_bits(name, dtype):
    """torch's formulas contain rstd^3, which overflows fp16 for deviations below 0.025; here they run in fp32."""
    x = make((4, 6, 8), dtype, scale=2e-3)
    arguments = {
        "layer_norm": ((8,),),
        "rms_norm": ((8,), None, EPS),
        "group_norm": (3,),
        "batch_norm": (None, None),
    }.get(name, ())
    options = {"training": True} if name == "batch_norm" else {}
    grad, direction = make(x.shape, dtype), torch.randn(x.shape, dtype=torch.float64) * 1e-3

    def gradients(functional, dtype):
        leaf = x.to(dtype, copy=True).requires_grad_()
        y = getattr(functional, name)(leaf, *arguments, **options)
        first = torch.autograd.grad(y, leaf, grad.to(dtype), create_graph=True)[0]
        return first, torch.autograd.grad((first.double() * direction).sum(), leaf)[0]

    for ours, right in zip(gradients(fused, dtype), gradients(native, torch.float64), strict=True):
        size = right.abs().max().item()
        torch.testing.assert_close(ours.double(), right, rtol=0, atol=8 * torch.finfo(dtype).eps * size)


def test_graphs_of_gradients_where_torch_goes_wrong():
    """torch's batch_norm reads past a weight with gaps, its group_norm crashes where the input needs no gradient."""
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    grad, weight = torch.randn_like(x), torch.randn(5, dtype=torch.float64)[1::2]
    for call in (
        lambda x, w: fused.batch_norm(x, None, None, w, None, True),
        lambda x, w: fused.group_norm(x, 1, w),
    ):
        for frozen in (False, True):
            found = []
            for given, create_graph in ((weight, True), (weight.clone(), False)):
                leaf, own = x.clone().requires_grad_(not frozen), given.detach().requires_grad_()
                wanted = [own] if frozen else [leaf, own]
                found.append(torch.autograd.grad(call(leaf, own), wanted, grad, create_graph=create_graph))
            torch.testing.assert_close(*found)


@pytest.mark.parametrize(("dtype", "scale", "eps"), [(torch.float32, 1, 1e10), (torch.float16, 300, 1e-5)], ids=str)
def test_running_statistics_of_instances(dtype, scale, eps):
    """The variance is not computed from rstd, and only running statistics are rounded: a variance may overflow fp16."""
    x = make((3, 4, 50), dtype, scale=scale)
    ours = [torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)]
    right = [t.double() for t in ours]
    fused.instance_norm(x, *ours, momentum=0.1, eps=eps)
    native.instance_norm(x.double(), *right, momentum=0.1, eps=eps)
    for one, other in zip(ours, right, strict=True):
        torch.testing.assert_close(one, other.to(dtype))


@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=3)))
def test_subsets_that_require_gradients(frozen):
    x, weight, bias = (
        t.requires_grad_(not f)
        for t, f in zip((torch.randn(4, 3, 5), torch.randn(3), torch.randn(3)), frozen, strict=True)
    )
    y = fused.batch_norm(x, None, None, weight, bias, True)
    wanted = native.batch_norm(x, None, None, weight, bias, True)
    assert y.requires_grad == wanted.requires_grad == (not all(frozen))
    leaves = [t for t in (x, weight, bias) if t.requires_grad]
    if leaves:
        grad = torch.randn_like(y)
        for a, b in zip(torch.autograd.grad(y, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def normal(*shape):
    return torch.randn(shape)


ZERO, ONE = torch.zeros(3), torch.ones(3)
OPCHECK = {
    "batch_norm": (normal(4, 3, 5), ZERO, ONE, normal(3), normal(3), None, None, True, 0.1, EPS, True),
    "group_norm": (normal(4, 6, 5), 2, normal(6), normal(6), EPS),
    "instance_norm": (normal(4, 6, 5), None, None, normal(6), normal(6), True, 0.1, EPS),
    "batch_norm_forward": (
        normal(4, 3, 5), None, normal(3), None, ZERO, ONE, torch.tensor(1), 0, True, 0.1, EPS, False,
    ),
    "batch_norm_backward": (
        normal(4, 3, 5), normal(4, 3, 5), None, normal(3), ZERO, ZERO, ONE, 0, True, True, [True, False, True, True]
    ),
    "batch_norm_statistics": (normal(4, 6, 5), 2),
    "batch_norm_apply": (normal(4, 3, 5), None, normal(3), None, ZERO, ONE, True),
    "batch_norm_backward_sums": (normal(4, 3, 5), normal(4, 3, 5), None, None, None, ZERO, ONE, False, [True, False]),
    "batch_norm_backward_apply": (
        normal(4, 3, 5), normal(4, 3, 5), None, None, None, ZERO, ONE, torch.zeros(2, 3), False, [True, False],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name):
    torch.utils.deterministic.fill_uninitialized_memory = False
    arguments = [a.clone() if isinstance(a, Tensor) else a for a in OPCHECK[name]]
    if name in ("batch_norm", "group_norm", "instance_norm"):
        arguments[0].requires_grad_()
    torch.library.opcheck(getattr(torch.ops.dlkit, name).default, tuple(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), dlkit.nn.BatchNormReLU2d(8), torch.nn.Conv2d(8, 8, 3), dlkit.nn.GroupNorm(2, 8),
        dlkit.nn.BatchNorm2d(8, momentum=None),
    )  # fmt: skip
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (9, 11):
        x = torch.randn(2, 3, size, size)
        model.load_state_dict(state := {key: value.clone() for key, value in model.state_dict().items()})
        wanted = model(x)
        wanted_grads = torch.autograd.grad(wanted.sin().sum(), list(model.parameters()))
        wanted_state = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(state)
        found = compiled(x)
        torch.testing.assert_close(found, wanted)
        for a, b in zip(torch.autograd.grad(found.sin().sum(), list(model.parameters())), wanted_grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, wanted_state[key], msg=key)


def test_export():
    layer = dlkit.nn.BatchNorm2d(4).eval()
    x = torch.randn(2, 4, 3, 3)
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), layer(x))


def test_func_transforms():
    weight, bias = torch.randn(4), torch.randn(4)
    x = torch.randn(5, 3, 4, 6)
    for ours, theirs in (
        (lambda t: fused.group_norm(t, 2, weight, bias), lambda t: native.group_norm(t, 2, weight, bias)),
        (
            lambda t: fused.batch_norm(t, None, None, weight, bias, True),
            lambda t: native.batch_norm(t, None, None, weight, bias, True),
        ),
    ):
        torch.testing.assert_close(torch.func.vmap(ours)(x), torch.func.vmap(theirs)(x), atol=1e-5, rtol=1e-5)
        _, tangent = torch.func.jvp(ours, (x[0],), (x[1],))
        torch.testing.assert_close(tangent, torch.func.jvp(theirs, (x[0],), (x[1],))[1], atol=1e-5, rtol=1e-5)


LAYERS = {
    "BatchNorm1d": [((8, 5), {}), ((4, 5, 7), {"affine": False}), ((3, 5, 4), {"track_running_stats": False})],
    "BatchNorm2d": [((4, 5, 3, 6), {"momentum": None}), ((4, 5, 3, 6), {"momentum": 0.25, "eps": 1e-3})],
    "BatchNorm3d": [((2, 5, 3, 2, 4), {})],
    "InstanceNorm1d": [((3, 5, 7), {}), ((5, 7), {"affine": True})],
    "InstanceNorm2d": [((3, 5, 4, 7), {"affine": True, "track_running_stats": True})],
    "InstanceNorm3d": [((3, 5, 4, 2, 3), {"track_running_stats": True, "momentum": 0.3})],
}


@pytest.mark.parametrize(("name", "shape", "options"), [(n, s, o) for n, cases in LAYERS.items() for s, o in cases])
def test_layers_train_and_evaluate_as_torchs(name, shape, options):
    theirs = getattr(torch.nn, name)(5, **options)
    ours = getattr(dlkit.nn, name)(5, **options)
    ours.load_state_dict(theirs.state_dict())
    for training in (True, True, False, True, False):
        ours.train(training), theirs.train(training)
        for x in both_layouts(torch.randn(shape) * 3 + 1):
            inputs = [x.clone().requires_grad_() for _ in "ab"]
            results = [layer(t) for layer, t in zip((ours, theirs), inputs, strict=True)]
            grad = torch.randn_like(results[0])
            for result in results:
                result.backward(grad)
            torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-5, rtol=1e-5)
            if not name.startswith("Instance"):  # torch's InstanceNorm makes channels_last contiguous, ours keeps it
                assert results[0].stride() == results[1].stride()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key], atol=1e-5, rtol=1e-5)


def test_half_layers():
    """Running statistics and parameters in the input's type, as module.half() makes them."""
    for dtype in (torch.float16, torch.bfloat16):
        theirs, ours = torch.nn.BatchNorm2d(6).to(dtype), dlkit.nn.BatchNorm2d(6).to(dtype)
        x = (torch.randn(4, 6, 5, 5) * 2 + 1).to(dtype)
        step = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours(x), theirs(x), atol=step, rtol=step)
        torch.testing.assert_close(ours.running_var, theirs.running_var, atol=step, rtol=step)


def bad_batch_norm(x, running_mean, running_var, *others):
    return lambda functional: functional.batch_norm(x, running_mean, running_var, *others, training=True)


FOUR = (torch.zeros(4), torch.ones(4))
BAD = {
    "one value": (bad_batch_norm(normal(1, 4), *FOUR), ValueError),
    "channels": (bad_batch_norm(normal(3, 4), torch.zeros(5), torch.ones(5)), RuntimeError),
    "weight": (bad_batch_norm(normal(3, 4), *FOUR, torch.ones(5)), RuntimeError),
    "one statistic": (bad_batch_norm(normal(3, 4), FOUR[0], None), ValueError),
    "one statistic in evaluation": (lambda f: f.batch_norm(normal(3, 4), FOUR[0], None), RuntimeError),
    "integers": (bad_batch_norm(torch.ones(3, 4, dtype=torch.int64), *FOUR), NotImplementedError),
    "rank": (lambda f: f.batch_norm(torch.randn(3), torch.zeros(3), torch.ones(3)), RuntimeError),
    "no statistics": (lambda f: f.batch_norm(torch.randn(3, 4), None, None), RuntimeError),
    "one value a group": (lambda f: f.group_norm(torch.randn(1, 4), 4), ValueError),
    "groups": (lambda f: f.group_norm(torch.randn(3, 4), 3), RuntimeError),
    "group weight": (lambda f: f.group_norm(torch.randn(3, 4), 2, torch.ones(3)), RuntimeError),
    "group rank": (lambda f: f.group_norm(torch.randn(3), 3), RuntimeError),
    "one spatial value": (lambda f: f.instance_norm(torch.randn(3, 4, 1)), ValueError),
    "one spatial value of no sample": (lambda f: f.instance_norm(torch.randn(0, 4, 1)), ValueError),
    "instance rank": (lambda f: f.instance_norm(torch.randn(3)), ValueError),
    "one value of no channel": (bad_batch_norm(torch.randn(1, 0), None, None), ValueError),
    "one value and channels": (bad_batch_norm(normal(1, 4), torch.zeros(5), torch.ones(5)), ValueError),
    "negative groups": (lambda f: f.group_norm(torch.randn(3, 4), -2), RuntimeError),
    "groups of a float": (lambda f: f.group_norm(torch.randn(3, 4), 2.0), TypeError),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error = BAD[name]
    with pytest.raises(error):
        call(native)
    with pytest.raises(error):
        call(fused)


def test_bad_input_leaves_statistics():
    """An error is raised before running statistics change; the message names the mistake."""
    x, running = torch.randn(3, 4), (torch.full((4,), 7.0), torch.full((4,), 9.0))
    tracked = torch.tensor(3)
    calls = {
        "eps greater than 0 when training, got 0": lambda: fused.batch_norm(x, *running, training=True, eps=0.0),
        "weight of shape": lambda: fused.batch_norm(x, *running, torch.ones(5), training=True),
        "expected weight of Float": lambda: fused.batch_norm(x, *running, torch.ones(4).bfloat16(), training=True),
        "more than 1 value": lambda: op("batch_norm")(
            x[:1], *running, None, None, None, tracked, True, 0.1, EPS, False
        ),
    }
    for message, call in calls.items():
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()
    assert running[0].eq(7).all() and running[1].eq(9).all() and tracked.item() == 3


def test_empty_batch_as_torch():
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3)):
        theirs, ours = torch.nn.BatchNorm2d(4), dlkit.nn.BatchNorm2d(4)
        x = torch.randn(shape, requires_grad=True)
        y, wanted = ours(x), theirs(x)
        assert y.shape == wanted.shape
        y.sum().backward()
        for key, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[key], value), key


def test_residual_broadcasts_and_promotes():
    x, residual = torch.randn(2, 3, 4, 4), torch.randn(3, 1, 1, dtype=torch.float64)
    y = fused.batch_norm_relu(x, None, None, training=True, residual=residual)
    wanted = native.relu(native.batch_norm(x, None, None, training=True) + residual)
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*ACTIVATIONS, None])
def test_functions_and_layers_with_an_activation(name):
    """The public functions and layers: residuals that broadcast, evaluation, gradients and gradients of gradients."""
    x, residual = (torch.randn(3, 4, 5, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    number, running = ACTIVATIONS.get(name, 0), (torch.randn(4).double(), torch.rand(4).double() + 0.5)
    options = {"activation": name, "negative_slope": SLOPE}
    layer = dlkit.nn.BatchNormAct2d(4, dtype=torch.float64, **options)
    grouped = dlkit.nn.GroupNormAct(2, 4, dtype=torch.float64, **options)
    for norm in (layer, grouped):
        norm.weight, norm.bias = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(bias.detach())
    for added in (None, residual, residual[:1, :, :1].float()):
        z = native.batch_norm(x, None, None, weight, bias, True)
        expected = [activated(z if added is None else z + added, number, SLOPE)]
        found = [fused.batch_norm_act(x, None, None, weight, bias, True, residual=added, **options), layer(x, added)]
        assert all(torch.allclose(y, expected[0]) for y in found)
        z = native.batch_norm(x, *running, weight, bias)
        expected.append(activated(z if added is None else z + added, number, SLOPE))
        assert torch.allclose(fused.batch_norm_act(x, *running, weight, bias, residual=added, **options), expected[1])
        z = native.group_norm(x, 2, weight, bias)
        expected.append(activated(z if added is None else z + added, number, SLOPE))
        assert torch.allclose(fused.group_norm_act(x, 2, weight, bias, residual=added, **options), expected[2])
        assert torch.allclose(grouped(x, added), expected[2])

    def normalize(*leaves):
        y = fused.batch_norm_act(*leaves[:1], None, None, *leaves[2:], True, residual=leaves[1], **options)
        return y + fused.group_norm_act(*leaves[:1], 2, *leaves[2:], residual=leaves[1], **options)

    leaves = [t.detach()[:2, :, :2].clone().requires_grad_() for t in (x, residual)]
    leaves += [t.detach().clone().requires_grad_() for t in (weight, bias)]
    assert torch.autograd.gradcheck(normalize, leaves)
    assert torch.autograd.gradgradcheck(normalize, leaves)
    assert ("leaky_relu" in repr(layer)) == (name == "leaky_relu") and f"activation={name!r}" in repr(grouped)


def test_bad_activations():
    x = torch.randn(3, 4)
    for wrong, error in (("swish2", ValueError), (torch.relu, TypeError), (1, TypeError)):
        with pytest.raises(error, match="expected activation to be"):
            fused.batch_norm_act(x, None, None, training=True, activation=wrong)
        with pytest.raises(error, match=r"GroupNormAct\(\): expected activation to be"):
            dlkit.nn.GroupNormAct(2, 4, activation=wrong)
    with pytest.raises(TypeError, match="negative_slope"):
        fused.group_norm_act(x, 2, activation="leaky_relu", negative_slope="0.1")
    for call in (op("group_norm"), torch.ops.dlkit.group_norm):
        with pytest.raises(ValueError, match="activation from 0 to 7, got 9"):
            call(x, 2, None, None, EPS, None, 9, 0.01)


def test_other_strides():
    x = torch.randn(4, 6, 5, 7)
    for strided in (x[:, ::2], x[..., ::2], x.transpose(2, 3), x.permute(1, 0, 2, 3), x[:1, :3].expand(4, -1, -1, -1)):
        torch.testing.assert_close(
            fused.batch_norm(strided, None, None, training=True), native.batch_norm(strided, None, None, training=True),
            atol=1e-5, rtol=1e-5,
        )  # fmt: skip
        gradient = torch.randn(1).expand(strided.shape)
        leaf = strided.detach().requires_grad_()
        ours, theirs = (f.batch_norm(leaf, None, None, training=True) for f in (fused, native))
        torch.testing.assert_close(
            torch.autograd.grad(ours, leaf, gradient), torch.autograd.grad(theirs, leaf, gradient), atol=1e-5, rtol=1e-5
        )


def test_nothing_but_x_is_kept():
    """Without a residual the ReLU's mask comes from x: y is not saved."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = torch.randn(4, 3, 8, 8, requires_grad=True)
        y = fused.batch_norm_relu(x, None, None, training=True)
    large = {t.data_ptr() for t in kept if t.numel() == x.numel()}
    assert y.grad_fn is not None and large <= {x.data_ptr()}
