"""What a norm of another library computes, found by running it: it is taken for the form of dlkit that gives the same.

A specimen of the module, on the CPU with random parameters, runs forward and backward beside each form that it might
be, in training and in evaluation. In float64 outputs, gradients and buffers must agree within rounding. A norm that
computes in fp32 whatever it is given does so in float64 here, for this proof alone. Then the order of rounding is found
for each pair of dtypes: the one that gives the same bits in 16 bits, or else one that is no farther from float64 than
the original. Dtypes, shapes and options for which nothing was proven stay with the original forward().

The module itself is only read, no hook is called, and torch's generators are where they were.
"""

import contextlib
import copy
import itertools
import math
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from dlkit import functional
from dlkit._forms import ROUNDINGS, Dtypes, Form, computes

EPS = ("eps", "variance_epsilon", "epsilon", "layer_norm_eps", "norm_eps")
LOW = (torch.bfloat16, torch.float16)
PAIRS: list[tuple[torch.dtype, torch.dtype]] = [
    *((dtype, dtype) for dtype in (torch.float64, torch.float32, *LOW)),
    *((dtype, torch.float32) for dtype in LOW),
    *((torch.float32, dtype) for dtype in LOW),
]
LARGEST = 2**17  # elements of a parameter: a trial takes 100 times as many
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Proof(NamedTuple):
    """A form, and where it was seen to hold."""

    form: Form
    rounding: dict[Dtypes, str]
    ranks: tuple[int, ...]
    guards: tuple[tuple[str, Any], ...]  # what forward() read, and what it was
    difference: float  # the largest in float64, relative to the largest element

    def __str__(self) -> str:
        return f"verified: {self.form}, largest difference {self.difference:.0e} in fp64"


class Differs(Exception):
    """Why a module is none of the forms."""


class _Widened(TorchFunctionMode):
    """Casts to fp32 or less are casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.bfloat16, Tensor.half):
            func = Tensor.double
        narrow = (torch.float32, *LOW)
        args = tuple(torch.float64 if isinstance(a, torch.dtype) and a in narrow else a for a in args)
        kwargs = {
            name: torch.float64 if isinstance(a, torch.dtype) and a in narrow else a
            for name, a in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


def _specimen(module: torch.nn.Module, cls: type, dtype: torch.dtype, seed: int) -> torch.nn.Module:
    """A module of ``cls`` like this one, on the CPU, without hooks, its parameters and buffers drawn at random."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return None if tensor is None else torch.zeros(tensor.shape, dtype=tensor.dtype)
        value = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
        return (value if "bias" not in name else value - 1).to(dtype)

    made: Any = object.__new__(cls)
    empty = vars(torch.nn.Module())
    made.__dict__.update({name: value for name, value in vars(module).items() if name not in empty})
    made.__dict__.update(empty, training=module.training)
    made.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    made._parameters = {
        name: value if value is None else torch.nn.Parameter(drawn(name, value))  # type: ignore[arg-type]
        for name, value in module._parameters.items()
    }
    made._buffers = {name: drawn(name, value) for name, value in module._buffers.items()}
    made._modules = {name: copy.deepcopy(child) for name, child in module._modules.items()}
    return made


def _watched(cls: Any, reads: dict[str, Any]) -> Any:
    """``cls``, which notes in ``reads`` the plain attributes that are read from a module of it."""
    ordinary = vars(torch.nn.Module())

    def read(self: Any, name: str) -> Any:
        value = cls.__getattribute__(self, name)
        if name not in ordinary and name in object.__getattribute__(self, "__dict__"):
            reads[name] = value
        return value

    return type(cls)(cls.__name__, (cls,), {"__getattribute__": read})


class _LikeAutocast(TorchFunctionMode):
    """Norms of torch give fp32, as under autocast on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        functions = torch.nn.functional
        norms = (functions.layer_norm, functions.rms_norm, functions.group_norm)
        return result.float() if func in norms else result


class _Run(NamedTuple):
    results: list[Tensor]  # output, gradients of inputs and of parameters, buffers

    def distance(self, other: "_Run") -> list[float]:
        """The largest differences, each relative to the largest element."""
        found = []
        for one, two in zip(self.results, other.results, strict=True):
            if one.shape != two.shape:
                return [math.inf]
            one, two = one.double(), two.double()
            scale = max(float(two.abs().max()) if two.numel() else 0.0, 1e-30)
            found.append(float((one - two).abs().max()) / scale if two.numel() else 0.0)
        return [math.inf if value != value else value for value in found]


def _run(forward: Callable[..., Tensor], module: torch.nn.Module, inputs: Sequence[Tensor]) -> _Run:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = forward(module, *leaves)
    if not isinstance(y, Tensor) or y.shape != inputs[0].shape:
        raise Differs("its result has another shape than its input")
    parameters = [p for p in module._parameters.values() if p is not None]
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().reshape(y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, [*leaves, *parameters], weights, allow_unused=True)
    results = [y, *(torch.zeros(()) if grad is None else grad for grad in grads)]
    return _Run([t.detach() for t in results] + [b.clone() for b in module._buffers.values() if b is not None])


def _inputs(module: torch.nn.Module, form: Form, dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """Inputs of several shapes. Some rows are so small that eps counts."""
    generator = torch.Generator().manual_seed(7)
    if form.norm in ("twin", "frozen") or form.layout in ("first", "dense"):
        channels = _channels(module)
        shapes = [(2, channels, 3, 4), (3, channels, 5, 5), (3, channels, 5), (6, channels), (2, channels, 2, 3, 2)]
        if form.norm == "twin" and form.layout == "last" and isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm)):
            shapes = [(*head, *module.normalized_shape) for head in ((3, 5), (7,), (2, 3, 4), (2, 1, 2, 3))]
    else:
        weight = getattr(module, form.weight) if form.weight else None
        normalized = getattr(module, "normalized_shape", (24,))
        rows = tuple(normalized if weight is None else weight.shape)
        shapes = [(*head, *rows) for head in ((3, 5), (7,), (2, 3, 4), (2, 1, 2, 3))]
    for shape in shapes:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        small = torch.logspace(-4, 0.5, shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
        x = (x + 0.3) * small
        if form.layout == "dense":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        gate = torch.randn(shape, generator=generator, dtype=torch.float64)
        yield [t.to(dtype) for t in ((x, gate) if form.gate else (x,))]


def _channels(module: torch.nn.Module) -> int:
    for name in ("num_features", "num_channels"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    vectors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None and t.dim() == 1]
    return vectors[0].numel() if vectors else 24


def _forms(module: torch.nn.Module, twin: type | None, parameters: int) -> Iterator[Form]:
    """What a module with these parameters might compute, the likely first."""
    vectors = [name for name, p in module._parameters.items() if p is not None]
    children = tuple(module._modules)
    named = tuple(name for name in EPS if isinstance(getattr(module, name, None), float))
    eps: list[str | float] = list(named) or [1e-5, 1e-6, 1e-8, 1e-12]
    if twin is not None:
        for layout in ("last", "first"):
            yield Form("twin", layout, children=children)
    if children and twin is None and not {"running_mean", "running_var"} <= set(module._buffers):
        return
    if {"running_mean", "running_var", "weight", "bias"} <= set(module._buffers):
        yield from (Form("frozen", weight="weight", bias="bias", eps=value, children=children) for value in eps)
        return
    gates = ("before", "after", "") if parameters == 2 else ("",)
    weights = [name for name in vectors if "bias" not in name][:1] or [""]
    biases = [name for name in vectors if "bias" in name][:1] or [""]
    if children or len(vectors) != sum(map(bool, (*weights, *biases))):
        return
    layouts = ["last", "first", "dense"] if weights[0] else ["last"]
    if weights[0] and getattr(module, weights[0]).dim() > 1:
        layouts = ["last", "heads"]
    for value, layout, one_plus, norm in itertools.product(eps, layouts, (False, True), ("rms", "layer")):
        if (one_plus and not weights[0]) or (norm == "rms" and biases[0]):
            continue
        for gate in gates if norm == "rms" and weights[0] else ("",):
            yield Form(norm, layout, weights[0], biases[0], value, one_plus, gate)


def _agrees(form: Form, forward: Any, module: torch.nn.Module, cls: type, twin: Any, widened: bool) -> float:
    """The largest difference in float64; infinite if the two differ by more than rounding."""
    pair = (torch.float64, torch.float64)
    ours, largest = computes(form, {pair: "end"}, twin), 0.0
    for training in (True, False):
        held = 0
        for number, inputs in enumerate(_inputs(module, form, torch.float64)):
            runs = []
            for function in (forward, ours):
                specimen = _specimen(module, cls, torch.float64, number)
                specimen.training = training
                try:
                    if function is forward and widened:
                        with _Widened():
                            runs.append(_run(function, specimen, inputs))
                    else:
                        runs.append(_run(function, specimen, inputs))
                except Exception:
                    if function is forward:
                        break  # the original refuses this shape
                    return math.inf
            if not runs:
                continue
            held += 1
            largest = max(largest, *runs[1].distance(runs[0]))
            if largest > 1e-12:
                return math.inf
        if not held:
            return math.inf
    return largest


def _rounding(form: Form, forward: Any, module: torch.nn.Module, cls: type, twin: Any) -> dict[Dtypes, str]:
    """For each pair of dtypes that the original takes, the order of rounding that gives what it gives."""
    found: dict[Dtypes, str] = {}
    for pair in PAIRS:
        orders = ROUNDINGS if form.norm in ("rms", "layer") and form.weight else ROUNDINGS[:1]
        if orders == ROUNDINGS[:1] and pair[0] != pair[1] and form.norm in ("rms", "layer"):
            continue  # without a weight there is no second dtype
        second = None
        for order in orders:
            verdict = _verdict(form, pair, order, forward, module, cls, twin)
            if verdict == "bits":
                found[pair] = order
                break
            second = second or (order if verdict == "close" else None)
        else:
            if second:
                found[pair] = second
    return found


def _verdict(form: Form, pair: Any, order: str, forward: Any, module: torch.nn.Module, cls: type, twin: Any) -> str:
    ours, verdict = computes(form, {pair: order}, twin), ""
    runs: list[_Run]
    for number, inputs in enumerate(_inputs(module, form, pair[0])):
        runs = []
        for function in (forward, ours, ours):
            exact = len(runs) == 2
            specimen = _specimen(module, cls, pair[1], number)
            given = inputs
            if exact:
                given = [x.double() for x in inputs]
                specimen = specimen.double()
                function = computes(form, {(torch.float64, torch.float64): "end"}, twin)
            try:
                runs.append(_run(function, specimen, given))
            except Exception:
                if not runs:
                    break
                return ""
        if not runs:
            continue
        original, found, reference = runs
        same_types = all(a.dtype == b.dtype for a, b in zip(original.results, found.results, strict=True))
        if not same_types or original.results[0].stride() != found.results[0].stride():
            return ""
        if pair[0] == torch.float64:
            if max(found.distance(original)) > 1e-12:
                return ""
            verdict = "bits"
            continue
        # In 16 bits the last rounding decides, which is the same for both. In fp32 it is the order of sums, so that one
        # draw says little: of gradients that cancel, ours were off by 1.8e-6 here where torch's were by 1.2e-6.
        factor, ulps = (4, 16) if found.results[0].dtype == torch.float32 else (1.05, 2)
        eps = torch.finfo(found.results[0].dtype).eps
        errors = zip(found.distance(reference), original.distance(reference), strict=True)
        if any(one > factor * other + ulps * eps for one, other in errors):
            return ""
        equal = float((original.results[0] == found.results[0]).double().mean())
        bits = equal > 0.99 or found.results[0].dtype == torch.float32
        verdict = "bits" if bits and verdict in ("", "bits") else "close"
    return verdict


def _casts_back(form: Form, forward: Any, module: torch.nn.Module, cls: type) -> bool:
    """Whether a norm that calls torch's casts what that made fp32 under autocast."""
    for inputs in _inputs(module, form, torch.bfloat16):
        try:
            with _LikeAutocast():
                y = forward(_specimen(module, cls, torch.bfloat16, 0), *inputs)
        except Exception:
            continue
        return bool(y.dtype == torch.bfloat16)
    return False


_proofs: "weakref.WeakKeyDictionary[type, dict[Any, Proof | str]]" = weakref.WeakKeyDictionary()


def _plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def _key(module: torch.nn.Module, sizes: bool) -> str:
    """What two modules of a class share if one's proof is the other's; without ``sizes``, if it is likely to be."""
    plain = {name: value for name, value in vars(module).items() if _plain(value) and name != "training"}
    tensors = {**module._parameters, **module._buffers}
    shapes = {name: None if t is None else tuple(t.shape) for name, t in tensors.items()}
    if not sizes:
        plain = {name: value for name, value in plain.items() if type(value) not in (int, tuple)}
        shapes = {name: None if shape is None else (len(shape),) for name, shape in shapes.items()}
    return repr((sorted(plain.items()), shapes, [(name, repr(child)) for name, child in module._modules.items()]))


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """A trial runs in it: on the CPU with gradients, whatever modes are on, and torch's generators stay as they are."""
    with (
        _disable_current_modes(),
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        yield


def prove(module: torch.nn.Module, twin: type | None) -> Proof:
    """The form of this module, whose class derives from torch's class of which ``twin`` is dlkit's, or from none.

    Raises:
        Differs: it is none of those that dlkit has.
    """
    cls = type(module)
    known, key, kin = _proofs.setdefault(cls, {}), _key(module, True), _key(module, False)
    if key not in known:
        try:
            with apart():
                near = known.get(kin)
                known[key] = _prove(module, cls, twin, near if isinstance(near, Proof) else None)
                known[kin] = known[key]
        except Differs as differs:
            known[key] = str(differs)
    proof = known[key]
    if isinstance(proof, str):
        raise Differs(proof)
    return proof


def _prove(module: torch.nn.Module, cls: Any, twin: type | None, near: Proof | None) -> Proof:
    """``near``: the proof of a module that differs in sizes alone, whose order of rounding is taken as found."""
    forward: Any = cls.forward
    code = getattr(forward, "__code__", None)
    if code is None:
        raise Differs("its forward() is not a function of Python")
    if any(p is not None and p.numel() > LARGEST for p in module._parameters.values()):
        raise Differs(f"its class is not torch's, and parameters of more than {LARGEST} elements are not tried")
    parameters = code.co_argcount - 1
    for form in itertools.chain([near.form] if near else [], _forms(module, twin, parameters)):
        difference = _agrees(form, forward, module, cls, twin, False)
        if difference == math.inf:
            difference = _agrees(form, forward, module, cls, twin, True)
        if difference == math.inf:
            continue
        found = near is not None and form == near.form
        rounding = near.rounding if near and found else _rounding(form, forward, module, cls, twin)
        if not rounding:
            continue
        reads: dict[str, Any] = {}
        ranks = []
        watched = _watched(cls, reads)
        for inputs in _inputs(module, form, torch.float64):
            try:
                _run(watched.forward, _specimen(module, watched, torch.float64, 0), inputs)
                ranks.append(inputs[0].dim())
            except Exception:
                continue
        live = {form.eps, *STATISTICS}
        if form.norm == "twin":
            live |= set(vars(module)) & {"eps", "momentum", "affine", "track_running_stats", "num_groups"}
        if form.norm == "twin":
            form = form._replace(casts=form.casts or _casts_back(form, forward, module, cls))
        guards = tuple(sorted((name, value) for name, value in reads.items() if name not in live))
        if any(isinstance(value, list) or not _plain(value) for _, value in guards):
            raise Differs("its forward() reads what is neither a number nor a name")
        return Proof(form, rounding, tuple(sorted(set(ranks))), guards, difference)
    raise Differs("on random inputs it gives something else than any norm of dlkit")


def looks_like_norm(module: torch.nn.Module) -> bool:
    """Whether it is worth running: a name that says norm, and small parameters of its own alone."""
    name = type(module).__name__
    if not re.search("norm", name, re.IGNORECASE) or type(module).__module__.startswith(("dlkit.", "torch.")):
        return False
    tensors = [t for t in module._parameters.values() if t is not None]
    return (
        len(tensors) <= 2
        and all(t.dim() <= 2 and t.numel() <= LARGEST for t in tensors)
        and not any(p is not None for child in module.children() for p in child.parameters())
    )


# Dropouts, which are random: each is run often, and compared in distribution


class Drop(NamedTuple):
    """A dropout of another library: whole samples ("path") or squares of each channel ("block")."""

    kind: str
    p: str  # the name of the probability
    guards: tuple[tuple[str, Any], ...]  # its other settings

    def __str__(self) -> str:
        return {"path": "drop_path", "block": "dropblock2d"}[self.kind]


def prove_drop(module: torch.nn.Module) -> Drop | None:
    """Which of dlkit's dropouts this module is, None if it is neither."""
    forward: Any = type(module).forward
    settings = {name: value for name, value in vars(module).items() if _plain(value) and name != "training"}
    p = next((name for name in ("drop_prob", "p", "drop_path") if name in settings), "")
    if not p or module._parameters or module._buffers or module._modules:
        return None
    specimen = _specimen(module, type(module), torch.float64, 0)
    guards = tuple((name, value) for name, value in settings.items() if name not in (p, "block_size", "inplace", "eps"))
    with _disable_current_modes(), torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        torch.manual_seed(1)
        setattr(specimen, p, 0.25)
        try:
            if "block_size" in settings:
                return Drop("block", p, guards) if _drops_squares(forward, specimen) else None
            good = all(_drops_samples(forward, specimen, shape) for shape in ((2000, 3, 2), (2000, 2, 1, 2)))
            return Drop("path", p, guards) if good else None
        except Exception:
            return None


def _factors(forward: Any, specimen: torch.nn.Module, shape: tuple[int, ...]) -> Tensor | None:
    """By what the elements were multiplied, and their gradients too; None if evaluation or gradients differ."""
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5).requires_grad_()
    specimen.training = False
    if not torch.equal(forward(specimen, x), x):
        return None
    specimen.training = True
    given = x * 1
    y = forward(specimen, given)
    (grad,) = torch.autograd.grad(y.sum(), x)
    factors = (y / x).detach()
    return factors if torch.allclose(grad, factors) else None


def _drops_samples(forward: Any, specimen: torch.nn.Module, shape: tuple[int, ...]) -> bool:
    factors = _factors(forward, specimen, shape)
    if factors is None:
        return False
    kept = factors.flatten(1)[:, 0] != 0
    expected = kept.double() / 0.75
    return torch.allclose(factors.flatten(1), expected[:, None]) and abs(float(kept.double().mean()) - 0.75) < 0.05


def _drops_squares(forward: Any, specimen: Any) -> bool:
    """Whether each place is dropped as often as by dlkit, each channel on its own, and the rest scaled alike."""
    shape = (400, 2, 9, 8)
    for size in {3, min(specimen.block_size, 8)}:
        specimen.block_size = size
        factors = _factors(forward, specimen, shape)
        if factors is None:
            return False
        dropped = factors == 0
        scale = torch.tensor(dropped.numel() / (~dropped).sum(), dtype=torch.float64)
        ours = functional.dropblock2d(torch.ones(shape, dtype=torch.float64), 0.25, size) == 0
        often, ours_often = (mask.double().mean((0, 1)) for mask in (dropped, ours))
        # 800 draws: a share of 0.2 has a standard deviation of 0.014.
        if not torch.allclose(factors[~dropped], scale, rtol=1e-4) or (often - ours_often).abs().max() > 0.1:
            return False
        if float((dropped[:, 0] == dropped[:, 1]).double().mean()) > 0.9:
            return False
    return True
