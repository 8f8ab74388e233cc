"""What a sequence of operations acts on: one library's parameters, optimizers, scaler and schedulers.

Everything is built from plain data (see `Setup`) and from numbers, so that two sides are the same to the bit, and so
that a sequence can be written down as JSON.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor, nn

# Setup: {"kind": "AdamW", "options": torch's arguments, "extras": dlkit's own, "groups": [{"params": [spec], ...}],
#         "second": [spec]}; a spec is [shape, dtype, layout, requires_grad].
Setup = dict[str, Any]

KINDS = ("AdamW", "SGD", "RMSprop", "Adam")
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
FLOATING = (torch.float32, torch.float64, *SIXTEEN_BITS)

# Normal numbers over a few powers of two; slices of it are all values there are.
_POOL = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.exp2(
    torch.randn(1 << 14, generator=torch.Generator().manual_seed(1)).round()
)


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)


def values(seed: int, shape: Any, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """The same numbers for the same seed."""
    count = math.prod(shape)
    if not (dtype.is_floating_point or dtype.is_complex):
        return (torch.arange(count) % 7).to(dtype).view(shape)
    parts = 2 if dtype.is_complex else 1
    start = seed * 131 % (len(_POOL) - parts * count)
    drawn = _POOL[start : start + parts * count] * scale
    if dtype.is_complex:
        return torch.view_as_complex(drawn.view(-1, 2)).to(dtype).view(shape)
    return drawn.to(dtype, copy=True).view(shape)


LAYOUTS = ("contiguous", "transposed", "channels_last", "odd offset", "strided", "part of more")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """A fresh tensor of the same values, laid out in another way; what a layout cannot hold stays contiguous."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1).clone(memory_format=torch.preserve_format)
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.clone(memory_format=torch.channels_last)
    if layout == "odd offset":
        padded = tensor.new_zeros(tensor.numel() + 1)
        padded[1:] = tensor.reshape(-1)
        return padded[1:].view(tensor.shape)
    if layout == "strided" and tensor.dim() > 0:
        return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]
    if layout == "part of more" and tensor.dim() > 1:
        more = tensor.new_zeros(tensor.shape[0], tensor.shape[1] + 2, *tensor.shape[2:])
        more[:, 1:-1] = tensor
        return more[:, 1:-1]
    return tensor.clone(memory_format=torch.contiguous_format)


def resolve(value: Any) -> Any:
    """From JSON: {"tensor": 0.1, "dtype": "float64"} is a tensor, a list a tuple."""
    if isinstance(value, dict):
        return torch.tensor(value["tensor"], dtype=dtype_of(value.get("dtype", "float32")))
    if isinstance(value, (list, tuple)):
        return tuple(resolve(item) for item in value)
    return value


def resolved(options: dict[str, Any]) -> dict[str, Any]:
    return {key: resolve(value) for key, value in options.items()}


class Side:
    """One library's half of a run."""

    def __init__(self, classes: dict[str, Any], setup: Setup, extras: dict[str, Any], oracle: bool = False) -> None:
        self.setup, self.oracle = setup, oracle  # an oracle's optimizer is not saved, loaded or copied
        self.still = False  # nor is a still side's layout or state replaced
        self.kind = setup["kind"]
        self.make = classes[self.kind]
        self.torch_class = getattr(torch.optim, self.kind)
        self.extras = extras
        self.params: list[Tensor] = []
        self.names: dict[int, int] = {}  # id of a parameter: its index
        self.schedulers: list[Any] = []
        self.hooks: list[Any] = []
        self.kept: Any = None  # a state dict of earlier
        self.old: list[Any] = []  # replaced optimizers: GradScaler knows one by its id, which must not be used again
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        self.writes: set[int] = set()  # indices of parameters whose weights were written by the user
        groups = [
            {**resolved({k: v for k, v in group.items() if k != "params"}), "params": self.new(group["params"])}
            for group in setup["groups"]
        ]
        self.optimizers = [self.build(groups)]
        if setup.get("second"):
            self.optimizers.append(self.build([{"params": self.new(setup["second"])}]))

    def build(self, groups: Any) -> Any:
        return self.make(groups, **resolved(self.setup["options"]), **self.extras)

    def new(self, specs: list[Any]) -> list[Tensor]:
        """New parameters; their values follow from how many there were before."""
        made = []
        for shape, dtype, layout, trainable in specs:
            tensor = laid_out(values(7 * len(self.params) + 3, shape, dtype_of(dtype)), layout)
            can = tensor.is_floating_point() or tensor.is_complex()
            param = nn.Parameter(tensor, requires_grad=bool(trainable and can))
            self.names[id(param)] = len(self.params)
            self.params.append(param)
            made.append(param)
        return made

    @property
    def optimizer(self) -> Any:
        return self.optimizers[0]

    def trained(self) -> list[Tensor]:
        """The first optimizer's parameters, each once."""
        return list({id(p): p for group in self.optimizer.param_groups for p in group["params"]}.values())

    def pick(self, index: int) -> Tensor | None:
        trained = self.trained()
        return trained[index % len(trained)] if trained else None

    def group(self, index: int) -> dict[str, Any]:
        groups = self.optimizer.param_groups
        return groups[index % len(groups)]

    def everything(self) -> list[Tensor]:
        """Parameters of all optimizers, in the order of their making; removed ones too."""
        return self.params

    def index(self, param: Any) -> int:
        return self.names[id(param)]

    def renamed(self, params: list[Tensor]) -> None:
        """`params` take the places of the parameters there were."""
        self.params = params
        self.names = {id(p): i for i, p in enumerate(params)}

    def forget_helpers(self) -> None:
        """Hooks and schedulers belong to one optimizer; a new one has none."""
        self.schedulers, self.kept = [], None
        if self.oracle:  # the oracle's optimizer stays; a GradScaler would know it again
            states = self.scaler._per_optimizer_states
            if id(self.optimizer) in states:
                self.old.append(object())
                states[id(self.old[-1])] = states.pop(id(self.optimizer))
        for handle in self.hooks:
            handle.remove()
        self.hooks = []


# Drawing a setup.

_SHAPES = [(3,), (2, 3), (5, 4), (), (0,), (1,), (2, 3, 2, 2), (17,), (300,), (4, 1, 3)]
_SHAPE_WEIGHTS = [8, 8, 4, 3, 2, 2, 4, 3, 1, 1]
_DTYPES = ["float32", "float64", "bfloat16", "float16", "complex64", "uint8", "int64", "float8_e4m3fn", "complex128"]
_DTYPE_WEIGHTS = [30, 6, 8, 5, 3, 1, 1, 0.5, 1]
_LAYOUT_WEIGHTS = [24, 2, 2, 2, 1, 1]


def _tensor(value: Any, dtype: str = "float32") -> dict[str, Any]:
    return {"tensor": value, "dtype": dtype}


# What a group's entries can be set to; the simplest first. torch's constructor refuses some of it, both must.
_RATES = [0.1, 0.01, 0.0, 1, -0.1, _tensor(0.05), _tensor(0.05, "float64"), _tensor([0.03])]
_SHARED = {
    "lr": _RATES,
    "weight_decay": [0, 0.1, 0.5, _tensor(0.1)],
    "maximize": [False, True],
    "foreach": [None, True, False],
    "differentiable": [False, True],
}
_ADAM = {
    **_SHARED,
    "betas": [[0.9, 0.999], [0.5, 0.7], [0.0, 0.5], [0.5, 0.0], [_tensor(0.8), _tensor(0.95)]],
    "eps": [1e-8, 1e-3, 0.0, 1.0],
    "amsgrad": [False, True],
    "capturable": [False, True],
    "fused": [None, True, False],
}
ENTRIES: dict[str, dict[str, list[Any]]] = {
    "AdamW": _ADAM,
    "Adam": {**_ADAM, "decoupled_weight_decay": [False, True]},
    "SGD": {
        **_SHARED,
        "momentum": [0, 0.9, 0.5],
        "dampening": [0, 0.5],
        "nesterov": [False, True],
        "fused": [None, True, False],
    },
    "RMSprop": {
        **_SHARED,
        "alpha": [0.99, 0.5, 0.0],
        "eps": [1e-8, 1e-3, 0.0, 1.0],
        "momentum": [0, 0.9],
        "centered": [False, True],
        "capturable": [False, True],
    },
}
# What few people use, and what makes most of a sequence's steps raise.
RARE = {"differentiable": 0.02, "capturable": 0.03, "fused": 0.06, "foreach": 0.1}


def draw_spec(rng: random.Random, dtypes: list[str] | None = None) -> list[Any]:
    (shape,) = rng.choices(_SHAPES, _SHAPE_WEIGHTS)
    (dtype,) = rng.choices(_DTYPES, _DTYPE_WEIGHTS)
    (layout,) = rng.choices(LAYOUTS, _LAYOUT_WEIGHTS)
    return [list(shape), rng.choice(dtypes) if dtypes else dtype, layout, rng.random() < 0.95]


def draw_entries(rng: random.Random, kind: str, chance: float) -> dict[str, Any]:
    drawn = {}
    for key, choices in ENTRIES[kind].items():
        if rng.random() < RARE.get(key, 1.0) * chance:
            drawn[key] = rng.choice(choices)
    return drawn


def draw_setup(rng: random.Random, dtypes: list[str] | None = None, extras: dict[str, Any] | None = None) -> Setup:
    kind = rng.choice(KINDS)
    options = draw_entries(rng, kind, 0.35)
    if options.get("nesterov"):  # the constructor wants these
        options["momentum"], options["dampening"] = 0.9, 0
    if isinstance(options.get("lr"), (int, float)):
        options["lr"] = abs(options["lr"])
    groups = []
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3])):
        own = draw_entries(rng, kind, 0.12)
        groups.append({"params": [draw_spec(rng, dtypes) for _ in range(rng.choice([1, 1, 2, 2, 3, 4]))], **own})
    second = [draw_spec(rng, dtypes)] if rng.random() < 0.1 else []
    return {"kind": kind, "options": options, "extras": extras or {}, "groups": groups, "second": second}
