"""Tensor parallelism: one model on several devices, each with some of the heads, of the MLP and of the vocabulary.

Built in notebook 09.

Every rank runs the same program on the same tokens, with its own part of each matrix, cut as the release's files are
(`slim.partition.MERGE_RULES`, after Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053). There is one all-reduce for
the embeddings and one per block (two where the residual is sequential), and an all-gather for the scores. All ranks
have the same hidden states and exactly the same scores, so all choose the same next token.

PyTorch's `parallelize_module` cuts a model from a plan. It needs two all-reduces per block, and its overhead per layer
exceeds the time of a small pass; here ranks work on plain tensors, so that the layers of `quantization` serve too.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from neox_lib.attention import KeyValueStore
from neox_lib.block import Block
from neox_lib.checkpoints.slim.partition import merge_rule, merge_shards
from neox_lib.checkpoints.slim.writer import check_ranks
from neox_lib.config import NeoXConfig
from neox_lib.quantization.linear import CastLinear


def sum_over_ranks(partial: Tensor) -> Tensor:
    """The sum of all ranks' tensors, on every rank, in place of each one's own: an all-reduce."""
    dist.all_reduce(partial)
    return partial


def gather_scores(own: Tensor) -> Tensor:
    """All ranks' scores side by side, the very same on every rank: `[..., V / ranks]` -> `[..., V]`: an all-gather."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.contiguous())
    return torch.cat(parts, dim=-1)


class SplitEmbedding(nn.Module):
    """The word embeddings' rows from `first` on: ids `[B, T]` -> `[B, T, C]`.

    Each token's vector lies on one rank. The others give zeros for it, and the sum is the vector.
    """

    def __init__(self, embedding: nn.Embedding, first: int):
        super().__init__()
        self.weight = embedding.weight
        self.first = first

    def forward(self, input_ids: Tensor) -> Tensor:
        row = input_ids - self.first
        elsewhere = (row < 0) | (row >= len(self.weight))
        vectors = F.embedding(row.masked_fill(elsewhere, 0), self.weight)
        return sum_over_ranks(vectors.masked_fill(elsewhere[..., None], 0))


class SplitOutput(CastLinear):
    """The output matrix's rows of one rank: `[..., C]` -> `[..., V]`; it scores its own tokens and asks the others."""

    def forward(self, input: Tensor) -> Tensor:
        return gather_scores(super().forward(input))


class SplitBlock(Block):
    """One rank's part of a transformer layer: `[B, T, C]` -> `[B, T, C]`, the same on every rank.

    Attention and MLP are Block's own, on fewer heads and fewer inner numbers; what they give is this rank's part of a
    sum. Both branches of a parallel residual read the same input, so their parts are added first and exchanged once. A
    sequential MLP reads the finished sum of attention, and so needs an exchange before it.
    """

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: KeyValueStore | None = None, mask: Tensor | None = None
    ) -> Tensor:
        attended = self.attention(self.input_layernorm(hidden), cos, sin, cache, mask)
        if self.use_parallel_residual:
            return hidden + sum_over_ranks(attended + self.mlp(self.post_attention_layernorm(hidden)))
        hidden = hidden + sum_over_ranks(attended)
        return hidden + sum_over_ranks(self.mlp(self.post_attention_layernorm(hidden)))


@dataclass(frozen=True)
class RankConfig(NeoXConfig):
    """The config of one of `ranks` equal shares: its own heads, of the size that they have in the whole model.

    Layers, hidden size, vocabulary and context are the whole model's.
    """

    ranks: int = 1

    def __post_init__(self):
        if type(self.ranks) is not int or self.ranks < 1:
            raise ValueError(f"ranks must be a positive whole number, got {self.ranks!r}")
        super().__post_init__()

    @property
    def head_dim(self) -> int:
        return self.hidden_size // (self.num_attention_heads * self.ranks)

    def weight_bytes(self, dtype: torch.dtype) -> int:
        return -(-super().weight_bytes(dtype) // self.ranks)

    def kv_cache_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        return super().kv_cache_bytes(tokens, dtype) // self.ranks


def share_of(config: NeoXConfig, ranks: int) -> RankConfig:
    """What each of `ranks` devices has. Raises CheckpointError unless they divide heads, MLP and padded vocabulary."""
    check_ranks(config, ranks)
    fields = dataclasses.asdict(config)
    fields["num_attention_heads"] //= ranks
    return RankConfig(**fields, ranks=ranks)


def own_part(key: str, parts: list[Tensor], rank: int, ranks: int) -> Tensor | None:
    """What one of `ranks` devices keeps of a tensor; `parts` are those that the files hold, a single one if whole.

    Of a matrix its own rows or columns, however the files cut it: no other number is read. All of a norm. A
    row-parallel bias belongs to the sum of all ranks and is added once: rank 0 has it, the others None.
    """
    rule = merge_rule(key)
    if rule == "sum" and rank > 0:
        return None
    if rule not in ("rows", "columns"):
        return merge_shards(key, parts)
    dim = 0 if rule == "rows" else 1
    size = sum(part.shape[dim] for part in parts) // ranks
    kept, start = [], -rank * size  # where a part starts, counted from the first number that is kept
    for part in parts:
        first, last = max(0, -start), min(part.shape[dim], size - start)
        if first < last:
            kept.append(part.narrow(dim, first, last - first))
        start += part.shape[dim]
    return torch.cat(kept, dim)
