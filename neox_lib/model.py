"""The whole model: token ids in, a score for every possible next token out.

Built in notebook 04.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from neox_lib.attention import KeyValueStore
from neox_lib.block import Block
from neox_lib.config import NeoXConfig
from neox_lib.padding import padding_mask
from neox_lib.rotary import RotaryTable, rotary_table


class SequenceCache(KeyValueStore, Protocol):
    """A key-value store that also knows how many tokens it holds."""

    @property
    def length(self) -> int: ...

    def advance(self, tokens: int) -> None:
        """Count `tokens` as held, once every layer has stored them."""
        ...


def check_token_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless `input_ids` is a `[B, T]` tensor of whole numbers from 0 to vocab_size - 1."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.numel() == 0:
        found = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"token ids must be a [batch, tokens] tensor with at least one token, got {found}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"token ids must be int64 or int32, got {input_ids.dtype}")
    lowest, highest = input_ids.aminmax()
    if lowest < 0 or highest >= vocab_size:
        wrong = int(lowest) if lowest < 0 else int(highest)
        raise ValueError(f"token id {wrong} is outside the vocabulary: ids run from 0 to {vocab_size - 1}")


# on_layer(depth, hidden): the residual stream [B, T, C] after `depth` layers; returning False ends the pass
OnLayer = Callable[[int, Tensor], bool | None]


class Stopped(Exception):
    """Raised between two layers of a forward pass when `on_layer` returns False."""


def show(on_layer: OnLayer | None, depth: int, hidden: Tensor) -> None:
    """Pass the residual stream to `on_layer`, if there is one. Raises Stopped when it returns False."""
    if on_layer is not None and on_layer(depth, hidden) is False:
        raise Stopped


class NeoXModel(nn.Module):
    """GPT-NeoX: embedding, `num_hidden_layers` blocks, a last norm, an output matrix, named as in the release's files.

    `use_cache` is the default for generation. Activations have the norms' dtype: fp32 beside fp16 matrices on a CPU.
    """

    def __init__(self, config: NeoXConfig):
        super().__init__()
        self.config = config
        self.use_cache = True
        self.step: Callable[..., Tensor | None] | None = None  # a plug for a faster pass: None leaves it to the layers
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.final_linear = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.final_linear.weight = self.word_embeddings.weight
        table = config.rope_scaling.table if config.rope_scaling else rotary_table
        self.rotary = RotaryTable(config.max_position_embeddings, config.rotary_ndims, config.rotary_emb_base, table)

    def forward(
        self,
        input_ids: Tensor,
        cache: SequenceCache | None = None,
        *,
        last_only: bool = False,
        padding: Tensor | None = None,
        on_layer: OnLayer | None = None,
    ) -> Tensor:
        """Scores for the token after each position: ids `[B, T]` -> logits `[B, T, V]`.

        With a cache the T tokens follow the ones it holds. `last_only` gives `[B, 1, V]`, the last position. `padding`
        `[B]` hides so many tokens at the start of each row, cached ones included, and counts positions after them.
        `on_layer(depth, hidden)` sees the residual stream `[B, T, C]` before each layer, depth 0 .. L-1, and before the
        last norm, depth L; False ends the pass: Stopped. Raises ValueError for wrong ids, or more than the context.
        """
        check_token_ids(input_ids, self.config.vocab_size)
        held, tokens = 0 if cache is None else cache.length, input_ids.shape[1]
        cos, sin = self.rotary.rows(held if padding is None else held - padding, tokens, like=self.norm.weight)
        if self.step and (out := self.step(self, input_ids, cos, sin, cache, last_only, padding, on_layer)) is not None:
            return out
        masked = {} if padding is None else {"mask": padding_mask(padding, tokens, held + tokens)}
        hidden = self.word_embeddings(input_ids).to(self.norm.weight.dtype)
        for depth, layer in enumerate(self.layers):
            show(on_layer, depth, hidden)
            hidden = layer(hidden, cos, sin, cache, **masked)  # without padding a layer need not know of masks
        show(on_layer, len(self.layers), hidden)
        if cache is not None:
            cache.advance(tokens)
        return self.final_linear(self.norm(hidden[:, -1:] if last_only else hidden))
