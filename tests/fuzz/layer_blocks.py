"""Layers that are made of several ops, against torch's: no exact result, torch's in fp64 takes its place."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
import torch.nn.functional as native
from torch import Tensor

import dlkit
from fuzz.layer_operations import Case, Named, Operation, keep, scale_of, stream

RATES = (0.0, 0.1, 0.5)


def dropped(x: Tensor, o: Named) -> Tensor:
    if not o["training"] or o["p"] == 0:
        return x
    return torch.where(torch.from_numpy(keep(o, x.shape)), x * scale_of(o["p"]), torch.zeros((), dtype=x.dtype))


def drop_connect() -> Operation:
    def draw(rng: random.Random, shape: list[int]) -> Named:
        return {"p": rng.choice(RATES), "training": rng.random() < 0.9, "out": rng.choice([1, 3, 8, 17])}

    def shapes(case: Case) -> dict[str, list[int]]:
        width, out = case["shape"][-1], case["options"]["out"]
        return {"input": case["shape"], "weight": [out, width], "bias": [out]}

    def ours(t: Named, o: Named) -> Any:
        layer = dlkit.nn.DropConnectLinear(t["input"].size(-1), o["out"], p=o["p"]).train(o["training"])
        with dlkit.random.use(stream(o)):
            y = torch.func.functional_call(layer, {"weight": t["weight"], "bias": t["bias"]}, t["input"])
        return {"y": y}

    def torchs(t: Named, o: Named) -> Any:
        return {"y": native.linear(t["input"], dropped(t["weight"], o), t["bias"])}

    return Operation("drop_connect_linear", (1, 3), draw, shapes, ours, torchs, weight=1)


def attention() -> Operation:
    def draw(rng: random.Random, shape: list[int]) -> Named:
        return {
            "p": rng.choice(RATES),
            "training": rng.random() < 0.9,
            "heads": rng.choice([1, 2, 4]),
            "head_dim": rng.choice([1, 2, 5, 8]),
            "need_weights": rng.random() < 0.5,
            "batch_first": rng.random() < 0.5,
            "mask": rng.choice(["none", "none", "causal", "padding"]),
        }

    def shapes(case: Case) -> dict[str, list[int]]:
        o = case["options"]
        width = o["heads"] * o["head_dim"]
        given = {"in_proj_weight": [3 * width, width], "in_proj_bias": [3 * width]}
        return {"input": [*case["shape"], width]} | given | {"out_weight": [width, width], "out_bias": [width]}

    def masks(t: Named, o: Named) -> tuple[Tensor | None, Tensor | None]:
        """(attn_mask, key_padding_mask); no row is masked as a whole."""
        batch, length = t["input"].shape[:2] if o["batch_first"] else t["input"].shape[1::-1]
        causal = torch.ones(length, length, dtype=torch.bool).triu(1) if o["mask"] == "causal" else None
        padding = (torch.arange(length) > length // 2).expand(batch, length) if o["mask"] == "padding" else None
        return causal, padding

    def ours(t: Named, o: Named) -> Any:
        width = o["heads"] * o["head_dim"]
        layer = dlkit.nn.MultiheadAttention(width, o["heads"], o["p"], batch_first=o["batch_first"])
        names = {"in_proj_weight": "in_proj_weight", "in_proj_bias": "in_proj_bias"}
        names |= {"out_proj.weight": "out_weight", "out_proj.bias": "out_bias"}
        causal, padding = masks(t, o)
        with dlkit.random.use(stream(o)):
            found, _ = torch.func.functional_call(
                layer.train(o["training"]),
                {name: t[mine] for name, mine in names.items()},
                (t["input"], t["input"], t["input"]),
                {"need_weights": o["need_weights"], "attn_mask": causal, "key_padding_mask": padding},
            )
        return {"y": found}

    def torchs(t: Named, o: Named) -> Any:
        x = t["input"] if o["batch_first"] else t["input"].transpose(0, 1)
        q, k, v = (
            part.unflatten(-1, (o["heads"], o["head_dim"])).transpose(1, 2)
            for part in native.linear(x, t["in_proj_weight"], t["in_proj_bias"]).chunk(3, -1)
        )
        products = q * math.sqrt(1 / o["head_dim"]) @ k.transpose(-2, -1)
        causal, padding = masks(t, o)
        if causal is not None:
            products = products.masked_fill(causal, -math.inf)
        if padding is not None:
            products = products.masked_fill(padding[:, None, None, :], -math.inf)
        y = (dropped(products.softmax(-1), o) @ v).transpose(1, 2).flatten(2)
        y = native.linear(y, t["out_weight"], t["out_bias"])
        return {"y": y if o["batch_first"] else y.transpose(0, 1)}

    return Operation("multihead_attention", (2, 2), draw, shapes, ours, torchs, weight=1)


def transformer(name: str) -> Operation:
    decoder = "Decoder" in name

    def draw(rng: random.Random, shape: list[int]) -> Named:
        return {
            "training": rng.random() < 0.8,
            "norm_first": rng.random() < 0.5,
            "activation": rng.choice(["relu", "gelu"]),
            "heads": rng.choice([1, 2]),
            "init": rng.randrange(1000),
        }

    def shapes(case: Case) -> dict[str, list[int]]:
        shape = [*case["shape"], 4 * case["options"]["heads"]]
        return {"input": shape, "memory": shape} if decoder else {"input": shape}

    def run(library: Any) -> Any:
        def call(t: Named, o: Named) -> Any:
            with torch.random.fork_rng():
                torch.manual_seed(o["init"])
                layer = getattr(library, name)(
                    t["input"].size(-1), o["heads"], 16, 0.0, o["activation"], batch_first=True,
                    norm_first=o["norm_first"],
                )  # fmt: skip
            layer = layer.to(torch.bfloat16).to(t["input"].dtype).train(o["training"])  # exact in every type
            return {"y": layer(t["input"], t["memory"]) if decoder else layer(t["input"])}

        return call

    return Operation(name, (2, 2), draw, shapes, run(dlkit.nn), run(torch.nn), weight=1)


ALL = (drop_connect(), attention(), transformer("TransformerEncoderLayer"), transformer("TransformerDecoderLayer"))
BLOCKS = {operation.name: operation for operation in ALL}
