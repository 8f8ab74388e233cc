"""Tensors of the layers' machine: sizes, values and layouts, each drawn by name so that a case is plain data."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = ("float32", "float64", "bfloat16", "float16")
SIZES = (1, 1, 2, 2, 3, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 256, 257, 300)

# Values of which a difference of rounding says something come first.
VALUES = ("normal", "shifted", "wide", "constant", "zeros", "denormal", "tiny", "huge", "one nan", "one infinity")
LAYOUTS = ("contiguous", "channels_last", "reversed", "rotated", "sliced", "sliced_rows", "offset", "expanded")


def draw_values(rng: random.Random) -> str:
    return rng.choice(VALUES[:1] * 12 + VALUES[:3] * 2 + VALUES)


def draw_layout(rng: random.Random) -> str:
    return rng.choice(LAYOUTS[:1] * 6 + LAYOUTS)


def draw_spec(rng: random.Random, plain: bool = False) -> dict[str, str]:
    return {"values": "normal" if plain else draw_values(rng), "layout": draw_layout(rng)}


def draw_shape(rng: random.Random, least: int, most: int, elements: int) -> list[int]:
    """Of `least` to `most` dimensions and at most about `elements` elements; now and then empty."""
    shape: list[int] = []
    rank = rng.randint(least, most)
    for _ in range(rank):
        left = elements // max(1, math.prod(shape))
        fitting = [size for size in SIZES if size <= left] or [1]
        shape.append(rng.choice(fitting))
    rng.shuffle(shape)
    if shape and rng.random() < 0.02:
        shape[rng.randrange(rank)] = 0
    return shape


def make(shape: list[int], dtype: str, spec: dict[str, str], generator: torch.Generator) -> Tensor:
    kind = getattr(torch, dtype)
    info = torch.finfo(kind)
    wide = torch.randn(shape, dtype=torch.float64, generator=generator)
    name = spec["values"]
    if name == "shifted":
        wide += 1 / info.eps**0.5 / 4
    elif name == "wide":
        wide *= 10 ** (6 * torch.rand(shape, dtype=torch.float64, generator=generator) - 3)
    elif name == "constant":
        wide = torch.full(shape, 0.7, dtype=torch.float64)
    elif name == "zeros":
        wide = torch.zeros(shape, dtype=torch.float64)
    elif name == "denormal":
        wide *= info.smallest_normal / 8
    elif name == "tiny":
        wide *= info.smallest_normal**0.5
    elif name == "huge":
        wide *= info.max / (32 if kind != torch.float64 else 2**64)  # nothing is wider than fp64 to add it up in
    elif name == "positive":
        wide = wide.abs() + 0.5
    tensor = wide.to(kind)
    if name.startswith("one ") and tensor.numel():
        place = int(torch.randint(tensor.numel(), (), generator=generator))
        tensor.view(-1)[place] = math.nan if name == "one nan" else math.inf
    return lay_out(tensor, spec["layout"])


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another place in memory (expanded: the first ones in place of the others), NaN around them."""
    rank = tensor.dim()
    if rank == 0 or tensor.numel() == 0:
        return tensor
    if layout == "channels_last" and rank in (4, 5):
        return tensor.contiguous(memory_format=torch.channels_last if rank == 4 else torch.channels_last_3d)
    if layout == "reversed":
        return tensor.permute(*reversed(range(rank))).contiguous().permute(*reversed(range(rank)))
    if layout == "rotated":
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout in ("sliced", "sliced_rows"):
        sizes, places = list(tensor.shape), [slice(None)] * rank
        for d in range(rank) if layout == "sliced" else [0]:
            sizes[d] = 2 * sizes[d] + 1
            places[d] = slice(1, None, 2)
        view = tensor.new_full(sizes, math.nan)[tuple(places)]
        return view.copy_(tensor)
    if layout == "offset":
        view = tensor.new_full((tensor.numel() + 3,), math.nan)[1:-2].view(tensor.shape)
        return view.copy_(tensor)
    if layout == "expanded":
        widest = max(range(rank), key=lambda d: tensor.size(d))
        return tensor.narrow(widest, 0, 1).clone().expand(tensor.shape)
    return tensor


def exact(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().astype(np.longdouble)


def stand_in(tensor: Tensor) -> Any:
    """The same values as a leaf of its own, strides kept."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype) if tensor.numel() else tensor.clone()
    if copy.numel() and 0 in copy.stride():
        return tensor.detach()
    return copy.copy_(tensor.detach())
