"""Multi-head attention whose weights are dropped without a stored mask.

torch's module draws its dropout in two places: in a dropout call where the weights are asked for (need_weights, the
default), and inside scaled_dot_product_attention where they are not. dlkit replaces the first on every device. It
replaces the second on a CPU, where torch also computes the weights in memory if there is a dropout; on a GPU torch's
kernels keep the weights on chip and draw there.
"""

import math

import torch
from torch import Tensor
from torch.fx import Proxy

from dlkit import functional as F
from dlkit.nn._layer import Layer


class MultiheadAttention(Layer, torch.nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` with :func:`dlkit.functional.dropout` on its weights.

    Arguments, parameters and state_dict are torch's. Shapes: query ``[L, N, E]``, key ``[S, N, kdim]`` and value
    ``[S, N, vdim]``, batch first with ``batch_first=True``; the output has the query's shape. The rest is torch's own:
    evaluation, ``dropout=0``, ``bias_k``, ``add_zero_attn``, one sample without a batch, and every argument that it
    refuses.

    Source: `Attention Is All You Need <https://arxiv.org/abs/1706.03762>`_.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(query, Proxy) and self._is_leaf(query):
            return self._call_node(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        drops = self.training and self.dropout > 0 and (need_weights or query.device.type == "cpu")
        if not (drops and self._is_plain(query, key, value, key_padding_mask, attn_mask, is_causal)):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        q, k, v = (self._heads(tensor) for tensor in self._project(query, key, value))
        products = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)  # [N, heads, L, S]
        if attn_mask is not None:
            mask = _additive(attn_mask, query.dtype)
            products = products + (mask if mask.dim() == 2 else mask.view(products.shape))
        if key_padding_mask is not None:
            products = products + _additive(key_padding_mask, query.dtype)[:, None, None, :]
        masked = attn_mask is not None or key_padding_mask is not None
        # A row that is masked as a whole is 0 in scaled_dot_product_attention, and NaN where torch returns weights.
        # Called by its operator, which TorchDynamo can trace.
        softmax = torch.ops.aten._safe_softmax.default if masked and not need_weights else torch.softmax
        weights = F.dropout(softmax(products, -1), self.dropout)
        joined = (weights @ v).transpose(1, 2).flatten(2)  # [N, L, E]
        output = self.out_proj(joined if self.batch_first else joined.transpose(0, 1))
        if not need_weights:
            return output, None
        return output, weights.mean(1) if average_attn_weights else weights

    def _is_plain(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Whether the shapes are those of the common case. torch's own forward() serves or refuses all others."""
        if self.bias_k is not None or self.add_zero_attn or (is_causal and attn_mask is None):
            return False
        if query.is_nested or not query.dim() == key.dim() == value.dim() == 3:
            return False
        batch, length = query.shape[:2] if self.batch_first else query.shape[1::-1]
        others, source = key.shape[:2] if self.batch_first else key.shape[1::-1]
        masks = (None, (length, source), (batch * self.num_heads, length, source))
        return (
            batch == others
            and key.shape[:2] == value.shape[:2]
            and (query.shape[-1], key.shape[-1], value.shape[-1]) == (self.embed_dim, self.kdim, self.vdim)
            and (None if attn_mask is None else tuple(attn_mask.shape)) in masks
            and (key_padding_mask is None or tuple(key_padding_mask.shape) == (batch, source))
            and all(mask is None or mask.dtype in (torch.bool, query.dtype) for mask in (attn_mask, key_padding_mask))
        )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        linear = torch.nn.functional.linear
        if self._qkv_same_embed_dim and query is key and key is value:
            return linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(map(linear, (query, key, value), weights, biases))

    def _heads(self, tensor: Tensor) -> Tensor:
        """[N, L, E], or [L, N, E], to [N, heads, L, E / heads]."""
        tensor = tensor.unflatten(-1, (self.num_heads, self.head_dim))
        return tensor.transpose(1, 2) if self.batch_first else tensor.permute(1, 2, 0, 3)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as an addend: a bool mask becomes -inf where it is True."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
