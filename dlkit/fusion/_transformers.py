"""torch's transformer layers: dropout, residual add and norm in one pass, by a change of class."""

import torch

import dlkit.nn
from dlkit.nn.transformer import why_not_fused
from dlkit.surgery import why_not_plain

TRANSFORMERS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.TransformerEncoderLayer: dlkit.nn.TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: dlkit.nn.TransformerDecoderLayer,
}


def fuse_transformers(model: torch.nn.Module) -> dict[str, str]:
    reasons = {}
    for name, module in model.named_modules():
        related = next((cls for cls in TRANSFORMERS if isinstance(module, cls)), None)
        if related is None or isinstance(module, tuple(TRANSFORMERS.values())):
            continue
        why = why_not_plain(module, related) or why_not_fused(module)
        if not why:
            module.__class__ = TRANSFORMERS[related]
        reasons[name] = why or "its dropouts, residual adds and norms run fused in training"
    return reasons


def unfuse_transformer(layer: torch.nn.Module) -> dict[str, str]:
    cls = next((plain for plain, fused in TRANSFORMERS.items() if type(layer) is fused), None)
    if cls is None:
        return {}
    layer.__class__ = cls
    return {"": "is torch's layer again"}
