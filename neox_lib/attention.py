"""Causal self-attention as GPT-NeoX lays it out: queries, keys and values interleaved head by head.

Built in notebook 03.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox_lib.config import NeoXConfig
from neox_lib.rotary import apply_rotary


class KeyValueStore(Protocol):
    """What attention needs from a cache (notebook 06 builds one): store the new rows, return all rows so far."""

    def update(self, layer_index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store `[B, H, T, D]` keys and values of one layer; return all S of them, `[B, H, S, D]` each."""
        ...


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the fused projection into queries, keys and values: `[B, T, 3C]` -> three `[B, H, T, D]`.

    Its last dimension runs [q_0 k_0 v_0 q_1 k_1 v_1 ...], head after head (gpt-neox, `megatron/model/transformer.py`).
    A flat split into thirds has the same shapes but mixes up the heads.
    """
    batch, tokens, width = qkv.shape
    per_head = qkv.view(batch, tokens, num_heads, width // num_heads).transpose(1, 2)  # [B, H, T, 3D]
    query, key, value = per_head.chunk(3, dim=-1)
    return query, key, value


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """True where a query may look: `[T, S]`. The T queries are the last T of the S positions.

    >>> causal_mask(2, 3, torch.device("cpu"))
    tensor([[ True,  True, False],
            [ True,  True,  True]])
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(diagonal=keys - queries)


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """How much each query takes from each key: `[B, H, T, D]`, `[B, H, S, D]` -> `[B, H, T, S]`, fp32, rows sum to 1.

    Scores are divided by sqrt(D) (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762) and kept in fp32: in half
    precision the product of a large query and a large key overflows.
    """
    scores = query.float() @ key.float().transpose(-1, -2) / query.shape[-1] ** 0.5
    allowed = causal_mask(query.shape[-2], key.shape[-2], query.device)
    return scores.masked_fill(~allowed, torch.finfo(torch.float32).min).softmax(dim=-1)


def explicit_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention step by step, to read and to check the fused one against: -> `[B, H, T, D]` in the value's dtype."""
    return (attention_weights(query, key) @ value.float()).to(value.dtype)


def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same through torch's `scaled_dot_product_attention`, which need not store the `[T, S]` weights."""
    queries, keys = query.shape[-2], key.shape[-2]
    if queries == 1:  # one new token sees everything: no mask to build
        return F.scaled_dot_product_attention(query, key, value)
    if queries == keys:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    mask = causal_mask(queries, keys, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Attention(nn.Module):
    """Multi-head causal self-attention with rotary positions: `[B, T, C]` -> `[B, T, C]`.

    cos and sin are the rotary table's rows for the T positions. Without a cache the T tokens are the whole sequence;
    with one, any KeyValueStore, they follow the tokens that it holds. A padded batch has a `mask`, `[B, 1, T, S]`,
    True where a query may look (`padding_mask`, notebook 06).
    """

    def __init__(self, config: NeoXConfig, layer_index: int):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.layer_index = layer_index
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def project(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned by position, and values: `[B, T, C]` -> three `[B, H, T, D]`."""
        query, key, value = split_heads(self.query_key_value(hidden), self.num_heads)
        return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: KeyValueStore | None = None, mask: Tensor | None = None
    ) -> Tensor:
        query, key, value = self.project(hidden, cos, sin)
        if cache is not None:
            key, value = cache.update(self.layer_index, key, value)
        if mask is None:
            attended = fused_attention(query, key, value)
        else:
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        merged = attended.transpose(1, 2).flatten(start_dim=2)  # [B, T, C]
        return self.dense(merged)

    def weights(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The attention weights of a whole sequence, to look at: `[B, T, C]` -> `[B, H, T, T]`, fp32."""
        query, key, _ = self.project(hidden, cos, sin)
        return attention_weights(query, key)
