"""Models of timm and transformers as workloads: `timm:resnet50`, `hf:llama`, options after commas.

`timm:deit_tiny_patch16_224,drop_path_rate=0.1` gives timm.create_model that option; `hf:llama,hidden_size=512` the
configuration. Weights are random, nothing is downloaded.
"""

from __future__ import annotations

import ast
import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
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
DROPOUT_WORDS = ("dropout", "pdrop", "dropout_prob", "drop_rate", "layerdrop")


def is_name(name: str) -> bool:
    return name.startswith(("timm:", "hf:"))


def load(name: str) -> tuple[Callable[[bool], nn.Module], Callable[[], list[tuple[Tensor, Tensor]]], int]:
    """(the model with its dropouts or without, batches of it, the size of one). BadInput where there is none."""
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
    return _timm(model, options) if library == "timm" else _transformers(model, options)


def _import(library: str) -> ModuleType:
    try:
        return importlib.import_module(library)
    except ImportError:
        raise BadInput(f"{library} is not installed; run: pip install {library}") from None
    except Exception as error:  # one of its own dependencies does not fit
        raise BadInput(f"{library} cannot be imported: {str(error).splitlines()[0]}") from None


def _timm(model: str, options: dict[str, Any]) -> Any:
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
        generator = torch.Generator().manual_seed(0)
        return [
            (
                torch.randn(IMAGES, 3, size, size, generator=generator),
                torch.randint(CLASSES, (IMAGES,), generator=generator),
            )
            for _ in range(4)
        ]

    return make, batches, IMAGES


class Logits(nn.Module):
    """Token ids [batch, context] to logits of all tokens, without transformers' other outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits.flatten(0, 1)


def _transformers(kind: str, options: dict[str, Any]) -> Any:
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
        generator = torch.Generator().manual_seed(0)
        size = (TEXTS, CONTEXT + 1)
        tokens = [torch.randint(3, config.vocab_size, size, generator=generator) for _ in range(4)]
        return [(some[:, :-1], some[:, 1:].flatten()) for some in tokens]

    return make, batches, TEXTS
