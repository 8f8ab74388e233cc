"""Models of other libraries as workloads: `timm:resnet50`, `hf:llama`, `diffusers:UNet2DModel`, options after commas.

`timm:deit_tiny_patch16_224,drop_path_rate=0.1` gives timm.create_model that option; `hf:llama,hidden_size=512` the
configuration; `diffusers:UNet2DModel,layers_per_block=2` the class. Weights are random, nothing is downloaded.
"""

from __future__ import annotations

import ast
import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import BadInput

CLASSES = 10
IMAGE = 64  # pixels, where the model takes any size
IMAGES, TEXTS = 16, 4  # of a batch
CONTEXT = 128  # tokens
# A small model of any kind; a configuration ignores options that it does not know.
SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1024,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
# A small one with attention at the second of three sizes.
UNET: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (64, 128, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 16,
    "dropout": 0.1,
}
DROPOUT_WORDS = ("dropout", "pdrop", "dropout_prob", "drop_rate", "layerdrop")


def is_name(name: str) -> bool:
    return name.startswith(("timm:", "hf:", "diffusers:"))


def load(name: str) -> dict[str, Any]:
    """The arguments of a Workload. BadInput where there is no such model."""
    library, _, rest = name.partition(":")
    model, *texts = rest.split(",")
    options: dict[str, Any] = {}
    for text in texts:
        key, found, value = text.partition("=")
        if not found:
            raise BadInput(f"{name}: expected option=value after the comma, got {text!r}")
        try:
            options[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[key] = value
    return {"timm": _timm, "hf": _transformers, "diffusers": _diffusers}[library](model, options)


def _import(library: str) -> ModuleType:
    try:
        return importlib.import_module(library)
    except ImportError:
        raise BadInput(f"{library} is not installed; run: pip install {library}") from None
    except Exception as error:  # one of its own dependencies does not fit
        raise BadInput(f"{library} cannot be imported: {str(error).splitlines()[0]}") from None


def _drawn(draw: Callable[[torch.Generator], tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Four batches, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return [draw(generator) for _ in range(4)]


def _timm(model: str, options: dict[str, Any]) -> dict[str, Any]:
    timm = _import("timm")
    if not timm.is_model(model):
        raise BadInput(f"timm has no model {model!r}; timm.list_models() names them")

    def make(dropout: bool) -> nn.Module:
        without = {} if dropout else {key: 0.0 for key in options if key.startswith("drop")}
        made: nn.Module = timm.create_model(model, num_classes=CLASSES, **{**options, **without})
        return made

    def batches() -> list[tuple[Tensor, Tensor]]:
        known = timm.get_pretrained_cfg(model, allow_unregistered=True)
        size = known.input_size[-1] if known and known.fixed_input_size else IMAGE
        return _drawn(
            lambda generator: (
                torch.randn(IMAGES, 3, size, size, generator=generator),
                torch.randint(CLASSES, (IMAGES,), generator=generator),
            )
        )

    return {"make": make, "batches": batches, "batch": IMAGES}


class Logits(nn.Module):
    """Token ids [batch, context] to logits of all tokens, without transformers' other outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits.flatten(0, 1)


def _transformers(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = _import("transformers")
    try:
        config = transformers.AutoConfig.for_model(kind, **{**SMALL, **options})
    except ValueError as error:
        raise BadInput(f"transformers has no model {kind!r}: {str(error).splitlines()[0]}") from None

    def make(dropout: bool) -> nn.Module:
        chosen = transformers.AutoConfig.for_model(kind, **{**SMALL, **options})
        if not dropout:
            for key, value in list(vars(chosen).items()):
                if key.endswith(DROPOUT_WORDS) and isinstance(value, float):
                    setattr(chosen, key, 0.0)
        causal = type(chosen) in transformers.AutoModelForCausalLM._model_mapping
        auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
        return Logits(auto.from_config(chosen)).train()

    def batches() -> list[tuple[Tensor, Tensor]]:
        def texts(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            tokens = torch.randint(3, config.vocab_size, (TEXTS, CONTEXT + 1), generator=generator)
            return tokens[:, :-1], tokens[:, 1:].flatten()

        return _drawn(texts)

    return {"make": make, "batches": batches, "batch": TEXTS}


class Denoiser(nn.Module):
    """Noisy images, each of a time step of its own, to the noise in them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        steps = torch.arange(len(images), device=images.device) * 50
        noise: Tensor = self.model(images, steps).sample
        return noise


def _diffusers(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    diffusers = _import("diffusers")
    cls = getattr(diffusers, kind, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)) or "UNet" not in kind:
        raise BadInput(f"diffusers has no unconditional UNet {kind!r}; UNet2DModel is one")

    config = {**UNET, **options}
    batch = max(1, IMAGES // 4)
    size = (batch, 3, config["sample_size"], config["sample_size"])

    def make(dropout: bool) -> nn.Module:
        return Denoiser(cls(**(config if dropout else {**config, "dropout": 0.0}))).train()

    def batches() -> list[tuple[Tensor, Tensor]]:
        return _drawn(
            lambda generator: (torch.randn(size, generator=generator), torch.randn(size, generator=generator))
        )

    return {"make": make, "batches": batches, "batch": batch, "loss": F.mse_loss}
