"""Transformer layers whose dropouts, residual adds and norms run in one pass each. :func:`dlkit.fuse` makes them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from dlkit import functional as F
from dlkit.nn._layer import Layer
from dlkit.nn.dropout import Dropout
from dlkit.nn.layer_norm import LayerNorm

NORMS: tuple[type, ...] = (torch.nn.LayerNorm, LayerNorm)
DROPOUTS: tuple[type, ...] = (torch.nn.Dropout, Dropout)


def why_not_fused(layer: torch.nn.Module) -> str:
    """The reason why the fused forward() cannot serve a transformer layer, which names the part; empty if it can."""
    count = 3 if isinstance(layer, torch.nn.TransformerDecoderLayer) else 2
    for kinds, name in ((NORMS, "norm"), (DROPOUTS, "dropout")):
        for path in (f"{name}{i + 1}" for i in range(count)):
            reason = why_not_plain(getattr(layer, path), kinds, path)
            if reason:
                return reason
    return ""


def why_not_plain(part: torch.nn.Module, kinds: tuple[type, ...], path: str) -> str:
    """The reason why ``part`` does more than the function of its kind; empty if it does not."""
    if type(part) not in kinds:
        return f"its {path} is a {type(part).__module__}.{type(part).__qualname__}"
    if "forward" in vars(part):
        return f"the forward of its {path} was replaced on the instance"
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        return f"its {path} has hooks, which would not be called"
    return ""


def add_norm(norm: torch.nn.LayerNorm, dropout: torch.nn.Dropout, branch: Tensor, x: Tensor, prenorm: bool) -> Any:
    """``norm(sum)`` of ``sum = x + dropout(branch)``, or ``(norm(sum), sum)`` if ``prenorm``."""
    return F.dropout_add_layer_norm(
        branch, x, norm.normalized_shape, norm.weight, norm.bias, dropout.p, norm.eps, dropout.training, prenorm
    )


def run(layer: Any, x: Tensor, *branches: Callable[[Tensor], Tensor]) -> Tensor:
    """Runs the residual branches of a layer in turn, each with the norm and the dropout of its number."""
    norms = [getattr(layer, f"norm{i + 1}") for i in range(len(branches))]
    dropouts = [getattr(layer, f"dropout{i + 1}") for i in range(len(branches))]
    if not layer.norm_first:
        for branch, norm, dropout in zip(branches, norms, dropouts, strict=True):
            x = add_norm(norm, dropout, branch(x), x, False)
        return x
    y = norms[0](x)
    for branch, norm, dropout in zip(branches[:-1], norms[1:], dropouts[:-1], strict=True):
        y, x = add_norm(norm, dropout, branch(y), x, True)
    return F.dropout_add(branches[-1](y), x, dropouts[-1].p, dropouts[-1].training)


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

    The bias stays with ``linear1``: a matrix product adds it at no cost.
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


class TransformerEncoderLayer(Layer, torch.nn.TransformerEncoderLayer):
    """:class:`torch.nn.TransformerEncoderLayer` with :func:`dlkit.functional.dropout_add_layer_norm` in training.

    Arguments, parameters and state_dict are torch's. Shapes: src and output ``[S, N, E]``, batch first with
    ``batch_first=True``. Evaluation, and layers whose norms or dropouts are of other classes or have hooks, run torch's
    own forward().

    Source: `Attention Is All You Need <https://arxiv.org/abs/1706.03762>`_.
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if isinstance(src, Proxy) and self._is_leaf(src):
            return self._call_node(src, src_mask, src_key_padding_mask, is_causal)
        if not self.training or why_not_fused(self):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)

        def attend_self(x: Tensor) -> Tensor:
            return attend(self.self_attn, x, x, src_mask, src_key_padding_mask, is_causal)

        return run(self, src, attend_self, partial(feed_forward, self))


class TransformerDecoderLayer(Layer, torch.nn.TransformerDecoderLayer):
    """:class:`torch.nn.TransformerDecoderLayer` with :func:`dlkit.functional.dropout_add_layer_norm` in training.

    Arguments, parameters and state_dict are torch's. Shapes: tgt and output ``[T, N, E]``, memory ``[S, N, E]``, batch
    first with ``batch_first=True``. The rest is as in :class:`TransformerEncoderLayer`.
    """

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
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal, memory_is_causal)
        if isinstance(tgt, Proxy) and self._is_leaf(tgt):
            return self._call_node(tgt, memory, *masks)
        if not self.training or why_not_fused(self):
            return super().forward(tgt, memory, *masks)

        def attend_self(x: Tensor) -> Tensor:
            return attend(self.self_attn, x, x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

        def attend_memory(x: Tensor) -> Tensor:
            return attend(self.multihead_attn, x, memory, memory_mask, memory_key_padding_mask, memory_is_causal)

        return run(self, tgt, attend_self, attend_memory, partial(feed_forward, self))
