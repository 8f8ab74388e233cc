"""Transformer layers whose dropouts, residual adds and norms run in one pass each. :func:`dlkit.fuse` makes them."""

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
            part = getattr(layer, path)
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

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(
                x,
                x,
                x,
                attn_mask=src_mask,
                key_padding_mask=src_key_padding_mask,
                need_weights=False,
                is_causal=is_causal,
            )[0]

        def feed_forward(x: Tensor) -> Tensor:
            return self.linear2(self.dropout(self.activation(self.linear1(x))))

        if self.norm_first:
            y, x = add_then_norm(self.norm2, self.dropout1, attend(self.norm1(src)), src)
            return add(self.dropout2, feed_forward(y), x)
        x = add_norm(self.norm1, self.dropout1, attend(src), src)
        return add_norm(self.norm2, self.dropout2, feed_forward(x), x)


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

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(
                x,
                x,
                x,
                attn_mask=tgt_mask,
                key_padding_mask=tgt_key_padding_mask,
                is_causal=tgt_is_causal,
                need_weights=False,
            )[0]

        def attend_memory(x: Tensor) -> Tensor:
            return self.multihead_attn(
                x,
                memory,
                memory,
                attn_mask=memory_mask,
                key_padding_mask=memory_key_padding_mask,
                is_causal=memory_is_causal,
                need_weights=False,
            )[0]

        def feed_forward(x: Tensor) -> Tensor:
            return self.linear2(self.dropout(self.activation(self.linear1(x))))

        if self.norm_first:
            y, x = add_then_norm(self.norm2, self.dropout1, attend(self.norm1(tgt)), tgt)
            y, x = add_then_norm(self.norm3, self.dropout2, attend_memory(y), x)
            return add(self.dropout3, feed_forward(y), x)
        x = add_norm(self.norm1, self.dropout1, attend(tgt), tgt)
        x = add_norm(self.norm2, self.dropout2, attend_memory(x), x)
        return add_norm(self.norm3, self.dropout3, feed_forward(x), x)
