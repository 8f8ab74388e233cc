"""The variants of dropout: torch's values, shapes and errors, the stream's masks."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as native
from support import reference

import dlkit
import dlkit.functional as fused
from dlkit.random import Philox, use

P = 0.4
SATURATED = 1.7580993408473766

# Shape, number of the mask's leading dimensions, alpha, whether torch has the variant.
VARIANTS = {
    "dropout1d": ((6, 5, 7), 2, False, True),
    "dropout1d of one sample": ((5, 7), 1, False, True),
    "dropout2d": ((6, 5, 4, 3), 2, False, True),
    "dropout2d of 5-D": ((3, 5, 2, 2, 3), 2, False, True),
    "dropout2d of 3-D": ((6, 5, 4), 2, False, True),
    "dropout2d of 2-D": ((6, 5), 2, False, True),
    "dropout3d": ((6, 5, 2, 3, 4), 2, False, True),
    "dropout3d of one sample": ((5, 2, 3, 4), 1, False, True),
    "dropout3d of 3-D": ((5, 2, 3), 1, False, True),
    "alpha_dropout": ((6, 5, 7), 3, True, True),
    "feature_alpha_dropout": ((6, 5, 7), 2, True, True),
    "drop_path": ((6, 5, 7), 1, False, False),
}
MODULES = {
    "dropout1d": "Dropout1d",
    "dropout2d": "Dropout2d",
    "dropout3d": "Dropout3d",
    "alpha_dropout": "AlphaDropout",
    "feature_alpha_dropout": "FeatureAlphaDropout",
    "drop_path": "DropPath",
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def expected(x, mask_ndim, alpha, p=P, seed=3):
    """The variant in fp64: torch's formula on the stream's mask."""
    lead = x.shape[:mask_ndim]
    keep = torch.from_numpy(reference.keep_mask(seed, 0, p, math.prod(lead)))
    keep = keep.view(*lead, *[1] * (x.dim() - mask_ndim))
    if not alpha:
        return torch.where(keep, x.double() / (1 - p), 0)
    a = 1 / math.sqrt((SATURATED**2 * p + 1) * (1 - p))
    return torch.where(keep, x.double(), -SATURATED) * a + SATURATED * a * p


def call(variant, x, *arguments, **named):
    return getattr(fused, variant.split()[0])(x, *arguments, **named)


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients(variant):
    shape, mask_ndim, alpha, _ = VARIANTS[variant]
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        wanted = expected(x.detach(), mask_ndim, alpha)
        y = call(variant, x, P, True, generator=Philox(3))
        torch.testing.assert_close(y.detach(), wanted.to(dtype))
        weights = torch.randn(shape, dtype=dtype)
        (grad,) = torch.autograd.grad(y, x, weights)
        slope = expected(torch.ones(shape), mask_ndim, alpha) - expected(torch.zeros(shape), mask_ndim, alpha)
        torch.testing.assert_close(grad, (weights.double() * slope).to(dtype), atol=1e-6, rtol=1.6e-2)
        again = x.detach().clone()
        result = call(variant, again, P, True, True, generator=Philox(3))
        assert result is again and torch.equal(again, y.detach())


@pytest.mark.parametrize("variant", [name for name, (*_, known) in VARIANTS.items() if known])
def test_kept_and_dropped_are_torch_s(variant):
    """For an input of ones, the two output values and the granularity of the mask are those of torch's op."""
    shape, mask_ndim, _, _ = VARIANTS[variant]
    torch.manual_seed(2)
    theirs = getattr(native, variant.split()[0])(torch.ones(shape), P, True)
    ours = call(variant, torch.ones(shape), P, True)
    torch.testing.assert_close(ours.unique(), theirs.unique())
    for y in (ours, theirs):
        runs = y.flatten(mask_ndim).flatten(0, mask_ndim - 1) if mask_ndim < y.dim() else y.view(-1, 1)
        assert (runs == runs[:, :1]).all()


@pytest.mark.parametrize("variant", ["dropout2d", "drop_path", "feature_alpha_dropout", "alpha_dropout"])
def test_mask_goes_by_the_logical_index(variant):
    _, mask_ndim, alpha, _ = VARIANTS[variant]
    plain = torch.randn(5, 6, 4, 3)
    mask_ndim = 4 if variant == "alpha_dropout" else mask_ndim
    wanted = expected(plain, mask_ndim, alpha).float()
    for x in (
        plain.contiguous(memory_format=torch.channels_last),
        plain.transpose(0, 3).contiguous().transpose(0, 3),
        torch.stack([plain, plain], -1)[..., 0],
    ):
        y = call(variant, x, P, True, generator=Philox(3))
        torch.testing.assert_close(y, wanted)
        assert y.stride() == torch.empty_like(x).stride()
        again = x.clone(memory_format=torch.preserve_format)
        torch.testing.assert_close(call(variant, again, P, True, True, generator=Philox(3)), wanted)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if " " not in name])
def test_p_0_p_1_and_evaluation(variant):
    shape = VARIANTS[variant][0]
    x = torch.randn(shape)
    assert call(variant, x, P, False) is x and call(variant, x, 0.0, True) is x
    nothing = call(variant, torch.full(shape, math.nan), 1.0, True)
    assert torch.equal(nothing, torch.zeros(shape))
    assert call(variant, torch.ones(0, *shape[1:]), P, True).shape == (0, *shape[1:])


@pytest.mark.parametrize("variant", MODULES)
def test_modules(variant):
    shape, known = VARIANTS[variant][0], VARIANTS[variant][3]
    module = getattr(dlkit.nn, MODULES[variant])(P)
    x = torch.randn(shape)
    with use(Philox(3)):
        assert torch.equal(module(x), call(variant, x, P, True, generator=Philox(3)))
    assert module.eval()(x) is x
    if known:
        theirs = getattr(torch.nn, MODULES[variant])
        assert isinstance(module, theirs) and repr(module) == f"dlkit.{theirs(P)!r}"
        model = torch.nn.Sequential(theirs(P))
        assert type(dlkit.replace(model)[0]) is type(module)
        assert type(dlkit.restore(model)[0]) is theirs
    with pytest.raises(ValueError, match="between 0 and 1"):
        getattr(dlkit.nn, MODULES[variant])(1.5)


BAD_CALLS = {
    "p above 1": lambda f, shape: f(torch.ones(shape), 1.5, True),
    "p below 0 in evaluation": lambda f, shape: f(torch.ones(shape), -0.1, False),
    "p is NaN": lambda f, shape: f(torch.ones(shape), math.nan, True),
    "p is a string": lambda f, shape: f(torch.ones(shape), "a", True),
    "no tensor": lambda f, shape: f([1.0], 0.5, True),
    "no tensor, p of 0": lambda f, shape: f([1.0], 0.0, True),
    "no tensor in evaluation": lambda f, shape: f([1.0], 0.5, False),
    "integers": lambda f, shape: f(torch.ones(shape, dtype=torch.int64), 0.5, True),
    "in place on a leaf": lambda f, shape: f(torch.ones(shape, requires_grad=True), 0.5, True, True),
    "1-D": lambda f, shape: f(torch.ones(3), 0.5, True),
    "0-D": lambda f, shape: f(torch.tensor(1.0), 0.5, True),
    "1-D in evaluation": lambda f, shape: f(torch.ones(3), 0.5, False),
    "5-D": lambda f, shape: f(torch.ones(2, 1, 1, 1, 2), 0.5, True),
}


@pytest.mark.parametrize("variant", [name for name, (*_, known) in VARIANTS.items() if known and " " not in name])
def test_bad_input_raises_and_warns_what_torch_does(variant):
    shape = VARIANTS[variant][0]
    for case, bad in BAD_CALLS.items():
        outcomes = []
        for library in (fused, native):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    outcome = type(bad(getattr(library, variant), shape))
                except Exception as error:
                    outcome = type(error)
                    assert str(error).strip()
            outcomes.append((outcome, {warning.category for warning in caught}))
        assert outcomes[0] == outcomes[1], case


@pytest.mark.parametrize("channels", [1, 2, 3, 16, 60, 300])
def test_channels_that_take_turns(backend, channels):
    """channels_last without a copy: samples that begin anywhere in a block, widths with and without whole vectors."""
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ((5, channels, 4, 7), (3, channels, 2, 3, 3)):
            rank = torch.channels_last if len(layout) == 4 else torch.channels_last_3d
            x = torch.randn(layout, dtype=dtype).to(memory_format=rank).to(backend.device)
            x[0, 0] = math.nan
            state = torch.tensor([3, 0], device=backend.device)
            inner = math.prod(layout[2:])
            for constants in ((1.25, 0.0, 0.0), (0.5, -0.25, 2.0)):
                y = backend.op("dropout_apply")(x, state, P, inner, *constants)
                wanted = backend.op("dropout_apply")(x.contiguous(), state, P, inner, *constants)
                assert y.stride() == x.stride()
                torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
                # Whole samples: the order within one does not matter.
                y = backend.op("dropout_apply")(x, state, P, inner * channels, *constants)
                wanted = backend.op("dropout_apply")(x.contiguous(), state, P, inner * channels, *constants)
                torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)


SPATIAL = [(1, 1), (7, 7), (28, 28), (2, 3, 5), (1, 2)]


@pytest.mark.parametrize("channels", [1, 2, 3, 16, 60, 64, 65, 300])
def test_elements_whose_channels_take_turns(backend, channels):
    """channels_last, a bit for every element: bit for bit the results of contiguous memory, also in place."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    apply, apply_ = backend.op("dropout_apply"), backend.op("dropout_forward_")
    few = backend.draws < 32
    for i, (samples, spatial) in enumerate([(n, size) for size in SPATIAL for n in (1, 3)]):
        if few and channels * math.prod(spatial) > 20_000:
            continue
        dtype, constants = dtypes[(i + channels) % 4], ((1.25, 0.0, 0.0), (0.5, -0.25, 2.0))[i % 2]
        x = torch.randn(samples, channels, *spatial, dtype=dtype)
        state = torch.tensor([3, 8 * i], device=backend.device)
        dropped = torch.from_numpy(~reference.keep_mask(3, 8 * i, P, x.numel()).reshape(x.shape))
        x[dropped] = math.nan
        rank = torch.channels_last if len(spatial) == 2 else torch.channels_last_3d
        x = x.to(backend.device).contiguous(memory_format=rank)
        wanted = apply(x.contiguous(), state, P, 1, *constants)
        y = apply(x, state, P, 1, *constants)
        assert y.stride() == x.stride() and not y.isnan().any()
        assert torch.equal(y, wanted)
        again = x.clone()
        apply_(again, state, P, 1, *constants, None)
        assert torch.equal(again, wanted)


def test_planes_larger_than_a_tile_and_other_orders():
    """Parts of a plane, whose channels have their own ranges; and any one dimension innermost."""
    apply, state = torch.ops.dlkit.dropout_apply, torch.tensor([5, 0])
    threads = torch.get_num_threads()
    try:
        for shape, dim, dtype in (
            ((1, 66, 141, 143), 1, torch.float32),
            ((2, 64, 160, 160), 1, torch.bfloat16),
            ((1, 2, 1025, 1031), 1, torch.float32),
            ((7000, 301), 0, torch.float32),
            ((20, 3, 50, 4), 2, torch.float64),
            ((64, 301, 14, 33), 1, torch.float32),
        ):
            x = torch.randn(shape, dtype=dtype).movedim(dim, -1).contiguous().movedim(-1, dim)
            wanted = apply(x.contiguous(), state, P, 1, 1.25, 0.0, 0.0)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                y = apply(x, state, P, 1, 1.25, 0.0, 0.0)
                assert y.stride() == x.stride() and torch.equal(y, wanted)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("module", ["Dropout", "AlphaDropout"])
def test_modules_in_channels_last(module):
    layer = getattr(dlkit.nn, module)(P)
    for shape, rank in (((3, 5, 6, 7), torch.channels_last), ((2, 65, 2, 3, 4), torch.channels_last_3d)):
        results = []
        for layout in (torch.contiguous_format, rank):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=layout)
            x.requires_grad_()
            with use(Philox(3)):
                y = layer(x)
            weights = torch.randn(shape, generator=torch.Generator().manual_seed(2)).contiguous(memory_format=layout)
            (grad,) = torch.autograd.grad(y, x, weights)
            assert y.is_contiguous(memory_format=layout) and grad.is_contiguous(memory_format=layout)
            results.append((y, grad))
        for plain, other in zip(*results, strict=True):
            assert torch.equal(plain, other)


def test_every_backend_draws_alike(backend):
    """The same generator gives the same state; nothing is drawn for p = 1 or an empty input."""
    if backend.device != "cpu":
        pytest.skip("another generator")
    op = backend.op("dropout_forward")
    states = []
    for function in (op, torch.ops.dlkit.dropout_forward.default):
        generator = torch.Generator().manual_seed(7)
        for count, p in ((0, 0.5), (3, 1.0), (3, 0.5), (3, 0.5)):
            states.append(function(torch.ones(count), p, 1, 1.0, 0.0, 0.0, generator)[1])
    states = torch.stack(states).view(2, 4, 2)
    assert torch.equal(*states) and not states[0, :2].any() and states[0, 2, 0] != states[0, 3, 0]


def test_dropconnect_drops_weights():
    layer = dlkit.nn.DropConnectLinear(6, 5, p=P, dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    keep = torch.from_numpy(reference.keep_mask(3, 0, P, 30).reshape(5, 6))
    with use(Philox(3)):
        y = layer(x)
    torch.testing.assert_close(y, x @ torch.where(keep, layer.weight / (1 - P), 0).T + layer.bias)
    (grad,) = torch.autograd.grad(y.sum(), layer.weight)
    assert torch.equal(grad != 0, keep)
    plain = torch.nn.Linear(6, 5, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    assert isinstance(layer, torch.nn.Linear) and torch.equal(layer.eval()(x), plain(x))
    assert "p=0.4" in repr(layer)
    with pytest.raises(ValueError, match="between 0 and 1"):
        dlkit.nn.DropConnectLinear(6, 5, p=2.0)


# Attention: where dropout drops nothing, torch and dlkit agree exactly; where it does, dlkit's mask is known.


def attention(**options):
    torch.manual_seed(1)
    ours = dlkit.nn.MultiheadAttention(8, 2, dropout=P, **options)
    theirs = torch.nn.MultiheadAttention(8, 2, dropout=P, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


CAUSAL = torch.nn.Transformer.generate_square_subsequent_mask
CALLS = {
    "self": lambda m, x, z: m(x, x, x),
    "self without weights": lambda m, x, z: m(x, x, x, need_weights=False),
    "cross": lambda m, x, z: m(x, z, z),
    "cross, weights of each head": lambda m, x, z: m(x, z, z, average_attn_weights=False),
    "three": lambda m, x, z: m(x, z, z + 1),
    "causal": lambda m, x, z: m(x, x, x, attn_mask=CAUSAL(4), is_causal=True),
    "causal without weights": lambda m, x, z: m(x, x, x, attn_mask=CAUSAL(4), is_causal=True, need_weights=False),
    "boolean masks": lambda m, x, z: m(
        x, x, x, attn_mask=torch.eye(4, dtype=torch.bool), key_padding_mask=torch.tensor([[False] * 3 + [True]] * 4)
    ),
    "a mask a head": lambda m, x, z: m(x, x, x, attn_mask=torch.arange(8 * 16.0).view(8, 4, 4) / 100),
    "padding of floats": lambda m, x, z: m(x, x, x, key_padding_mask=torch.eye(4), need_weights=False),
}


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}], ids=str)
def test_attention_is_torch_s_with_our_mask(case, options, monkeypatch):
    """torch's own code, with dlkit's dropout in place of its own, gives the same numbers in both of its branches."""
    ours, theirs = attention(**options)
    x, z = torch.randn(4, 4, 8, requires_grad=True), torch.randn(4, 4, 8)

    def attend(q, k, v, mask=None, dropout_p=0.0, is_causal=False):
        products = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if is_causal:
            mask = CAUSAL(q.shape[-2])
        return fused.dropout(torch.softmax(products if mask is None else products + mask, -1), dropout_p) @ v

    monkeypatch.setattr(native, "dropout", fused.dropout)
    monkeypatch.setattr(native, "scaled_dot_product_attention", attend)
    results = []
    for module in (ours, theirs):
        stream = Philox(3)
        with use(stream):
            output, weights = CALLS[case](module, x, z)
        assert stream.state_dict()["offset"] == 8
        results.append((output, weights, *torch.autograd.grad(output.square().sum(), [x, *module.parameters()])))
    for mine, other in zip(*results, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other)


NOTHING = 1e-12  # takes dlkit's path and drops nothing
FULL_ROW = torch.zeros(4, 4, dtype=torch.bool).index_fill_(0, torch.tensor(1), True)
PADDED = torch.zeros(3, 4, dtype=torch.bool).index_fill_(0, torch.tensor(2), True)  # one sample as a whole
PADDED[0, 3] = True


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(mask, -math.inf)


MASKS = {
    "none": {},
    "rows": {"attn_mask": FULL_ROW},
    "rows, floats": {"attn_mask": additive(FULL_ROW)},
    "rows of one head": {"attn_mask": torch.stack([FULL_ROW, torch.zeros_like(FULL_ROW)] * 3)},
    "everything": {"attn_mask": torch.ones(4, 4, dtype=torch.bool)},
    "samples": {"key_padding_mask": PADDED},
    "samples, floats": {"key_padding_mask": additive(PADDED)},
    "rows and samples": {"attn_mask": FULL_ROW, "key_padding_mask": PADDED},
    "rows and samples, mixed": {"attn_mask": additive(FULL_ROW), "key_padding_mask": PADDED},
    "both together": {"attn_mask": CAUSAL(4), "key_padding_mask": torch.tensor([[True, False, False, False]] * 3)},
    "causal and samples": {"attn_mask": CAUSAL(4), "is_causal": True, "key_padding_mask": PADDED},
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("masks", MASKS)
def test_masked_rows_are_torch_s(masks, need_weights, dtype):
    """A row that is masked entirely gives 0 with finite gradients, but NaN where torch returns its weights as NaN."""
    torch.manual_seed(1)
    ours = dlkit.nn.MultiheadAttention(8, 2, dropout=NOTHING, batch_first=True, dtype=dtype)
    theirs = torch.nn.MultiheadAttention(8, 2, dropout=NOTHING, batch_first=True, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    given = {
        name: m.to(dtype) if torch.is_tensor(m) and m.is_floating_point() else m for name, m in MASKS[masks].items()
    }
    x = torch.randn(3, 4, 8, dtype=dtype, requires_grad=True)
    results = []
    for module in (ours, theirs):
        y, weights = module(x, x, x, need_weights=need_weights, **given)
        grads = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
        results.append([y, *grads] if weights is None else [y, weights, *grads])
        assert need_weights or all(tensor.isfinite().all() for tensor in results[-1])
    tolerance = {"atol": 0.05, "rtol": 0.05} if dtype == torch.bfloat16 else {}
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, equal_nan=True, **tolerance)


@pytest.mark.parametrize(
    "change", [dlkit.replace, lambda model: dlkit.fuse(dlkit.replace(model))], ids=["replaced", "fused"]
)
@pytest.mark.parametrize("norm_first", [False, True])
def test_padded_samples_in_transformer_layers(norm_first, change):
    torch.manual_seed(1)
    options = {"dropout": NOTHING, "batch_first": True, "norm_first": norm_first}
    x, memory = torch.randn(3, 4, 8, requires_grad=True), torch.randn(3, 4, 8, requires_grad=True)
    encoder = torch.nn.TransformerEncoderLayer(8, 2, 16, **options)
    decoder = torch.nn.TransformerDecoderLayer(8, 2, 16, **options)
    for layer, call in (
        (encoder, lambda layer: layer(x, src_key_padding_mask=PADDED)),
        (decoder, lambda layer: layer(x, memory, tgt_key_padding_mask=PADDED, memory_key_padding_mask=PADDED)),
    ):
        results = []
        for module in (layer, change(copy.deepcopy(layer))):
            y = call(module)
            results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])])
        for mine, other in zip(*results, strict=True):
            assert other.isfinite().all()
            torch.testing.assert_close(mine, other)


def test_masked_attention_compiles_without_breaks():
    torch._dynamo.reset()
    attention = dlkit.nn.MultiheadAttention(8, 2, dropout=P, batch_first=True)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 8, requires_grad=True)
    results = []
    for run in (attention, compiled):
        torch.manual_seed(5)
        y = run(x, x, x, key_padding_mask=PADDED, need_weights=False)[0]
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *attention.parameters()])))
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(eager, fast)


def test_attention_elsewhere_is_torch_s():
    ours, theirs = attention()
    x = torch.randn(4, 4, 8)
    for call in (
        lambda m: m(x, x, x),
        lambda m: m(x[:, 0], x[:, 0], x[:, 0]),
        lambda m: m(x, x, x, need_weights=False),
    ):
        assert torch.equal(call(ours.eval())[0], call(theirs.eval())[0])
    for bad in (
        lambda m: m(x[..., :7], x, x),
        lambda m: m(x, x[:3], x),
        lambda m: m(x, x[:, :3], x[:, :3]),
        lambda m: m(x, x, x, attn_mask=torch.zeros(3, 3)),
        lambda m: m(x, x, x, key_padding_mask=torch.zeros(3, 3)),
        lambda m: m(x, x, x, is_causal=True),
    ):
        kinds = []
        for module in (ours.train(), theirs.train()):
            with pytest.raises(Exception) as caught:
                bad(module)
            kinds.append(caught.type)
        assert kinds[0] is kinds[1]
    ours, theirs = attention(kdim=3, vdim=5)
    torch.manual_seed(1)
    output, weights = ours.train()(x, torch.randn(4, 4, 3), torch.randn(4, 4, 5))
    assert output.shape == (4, 4, 8) and weights.shape == (4, 4, 4)
    model = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
    assert type(dlkit.replace(model).self_attn) is dlkit.nn.MultiheadAttention
    assert model(x).shape == x.shape and model.eval()(x).shape == x.shape


class Everything(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            dlkit.nn.Dropout2d(P), dlkit.nn.AlphaDropout(P), dlkit.nn.DropPath(0.1), dlkit.nn.DropBlock2d(0.2, 3)
        )
        self.linear = dlkit.nn.DropConnectLinear(6, 8)
        self.attention = dlkit.nn.MultiheadAttention(8, 2, dropout=P)

    def forward(self, x):
        x = self.linear(self.layers(x)).flatten(1, 2)
        return self.attention(x, x, x, need_weights=False)[0]


def test_compiled_variants_draw_eager_s_masks():
    torch._dynamo.reset()
    block = Everything()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 5, 6, requires_grad=True)
    results = []
    for run in (block, compiled):
        torch.manual_seed(5)
        y = run(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])))
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(eager, fast)
