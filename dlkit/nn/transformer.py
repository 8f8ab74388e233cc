"""Transformer layers whose dropouts, residual adds and norms run in one pass each. :func:`dlkit.fuse` makes them."""

from typing import Any

import torch
from torch import Tensor

from dlkit import functional as F
from dlkit.nn.dropout import Dropout
from dlkit.nn.layer_norm import LayerNorm

NORMS: tuple[type, ...] = (torch.nn.LayerNorm, LayerNorm)
DROPOUTS: tuple[type, ...] = (torch.nn.Dropout, Dropout)


def why_not_fused(layer: torch.nn.Module) -> str:
    """Which part of a transformer layer is not what its fused forward() takes it for; empty if all are."""
    count = 3 if isinstance(layer, torch.nn.TransformerDecoderLayer) else 2
    for kinds, name in ((NORMS, "norm"), (DROPOUTS, "dropout")):
        for path in (f"{name}{i + 1}" for i in range(count)):
            reason = why_not_plain(getattr(layer, path), kinds, path)
            if reason:
                return reason
    return ""


def why_not_plain(part: torch.nn.Module, kinds: tuple[type, ...], path: str) -> str:
    """Why calling ``part`` is more than the function of its kind; empty if it is not."""
    if type(part) not in kinds:
        return f"its {path} is a {type(part).__module__}.{type(part).__qualname__}"
    if "forward" in vars(part):
        return f"the forward of its {path} was replaced on the instance"
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        return f"its {path} has hooks, which would not be called"
    return ""


def add_norm(norm: torch.nn.LayerNorm, dropout: torch.nn.Dropout, branch: Tensor, x: Tensor) -> Tensor:
    """``norm(x + dropout(branch))``."""
    return F.dropout_add_layer_norm(
        branch, x, norm.normalized_shape, norm.weight, norm.bias, dropout.p, norm.eps, dropout.training
    )


def add_then_norm(
    norm: torch.nn.LayerNorm, dropout: torch.nn.Dropout, branch: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """``(norm(sum), sum)`` of ``sum = x + dropout(branch)``."""
    return F.dropout_add_layer_norm(
        branch, x, norm.normalized_shape, norm.weight, norm.bias, dropout.p, norm.eps, dropout.training, True
    )


def add(dropout: torch.nn.Dropout, branch: Tensor, x: Tensor) -> Tensor:
    """``x + dropout(branch)``."""
    return F.dropout_add(branch, x, dropout.p, dropout.training)


def attend(
    attention: torch.nn.MultiheadAttention,
    x: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    padding_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    return attention(
        x, memory, memory, attn_mask=mask, key_padding_mask=padding_mask, is_causal=is_causal, need_weights=False
    )[0]


def feed_forward(layer: Any, x: Tensor) -> Tensor:
    """``linear2(dropout(activation(linear1(x))))``, the activation and the dropout in one pass where they are torch's.

    The bias stays with ``linear1``: a matrix product adds it for nothing, and as fast as the pass behind it could.
    """
    x = layer.linear1(x)
    plain = not why_not_plain(layer.dropout, DROPOUTS, "dropout")
    if plain and layer.activation is torch.nn.functional.gelu:
        x = F.bias_gelu_dropout(x, None, layer.dropout.p, layer.dropout.training)
    elif plain and layer.activation is torch.nn.functional.relu:
        x = F.bias_relu_dropout(x, None, layer.dropout.p, layer.dropout.training)
    else:
        x = layer.dropout(layer.activation(x))
    return layer.linear2(x)


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """:class:`torch.nn.TransformerEncoderLayer` with :func:`dlkit.functional.dropout_add_layer_norm` in training.

    Evaluation, and layers whose norms or dropouts are of other classes or have hooks, run torch's own forward().
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if not self.training or why_not_fused(self):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)

        def attend_self(x: Tensor) -> Tensor:
            return attend(self.self_attn, x, x, src_mask, src_key_padding_mask, is_causal)

        if self.norm_first:
            y, x = add_then_norm(self.norm2, self.dropout1, attend_self(self.norm1(src)), src)
            return add(self.dropout2, feed_forward(self, y), x)
        x = add_norm(self.norm1, self.dropout1, attend_self(src), src)
        return add_norm(self.norm2, self.dropout2, feed_forward(self, x), x)


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """:class:`torch.nn.TransformerDecoderLayer`, as :class:`TransformerEncoderLayer`."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        if not self.training or why_not_fused(self):
            return super().forward(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )

        def attend_self(x: Tensor) -> Tensor:
            return attend(self.self_attn, x, x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

        def attend_memory(x: Tensor) -> Tensor:
            return attend(self.multihead_attn, x, memory, memory_mask, memory_key_padding_mask, memory_is_causal)

        if self.norm_first:
            y, x = add_then_norm(self.norm2, self.dropout1, attend_self(self.norm1(tgt)), tgt)
            y, x = add_then_norm(self.norm3, self.dropout2, attend_memory(y), x)
            return add(self.dropout3, feed_forward(self, y), x)
        x = add_norm(self.norm1, self.dropout1, attend_self(tgt), tgt)
        x = add_norm(self.norm2, self.dropout2, attend_memory(x), x)
        return add_norm(self.norm3, self.dropout3, feed_forward(self, x), x)
