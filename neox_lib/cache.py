"""The KV cache: keys and values of the tokens so far, so that a new token costs one token's work.

Built in notebook 06.
"""

import torch
from torch import Tensor

from neox_lib.config import NeoXConfig


class KVCache:
    """Room for the keys and values of `capacity` tokens in every layer, allocated once and filled in place.

    Each pass of the model stores its T tokens at `length` .. `length + T - 1` layer by layer and then advances, so the
    result is the same however a text is split into passes. Raises ValueError when a pass does not fit.
    """

    def __init__(self, config: NeoXConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype):
        if batch_size < 1 or capacity < 1:
            raise ValueError(f"a cache needs room for at least 1 x 1 tokens, got {batch_size} x {capacity}")
        shape = (config.num_hidden_layers, batch_size, config.num_attention_heads, capacity, config.head_dim)
        with torch.inference_mode(False):  # a cache made inside inference mode can then be used outside it too
            self.keys = torch.empty(shape, device=device, dtype=dtype)  # [L, B, H, capacity, D]
            self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held so far, not counting empty room."""
        return self.length * (self.keys.nbytes + self.values.nbytes) // self.capacity

    def check_room(self, batch_size: int, tokens: int) -> None:
        """Raise ValueError unless the cache is for that many rows and can hold `tokens` in each."""
        if batch_size != self.keys.shape[1] or tokens > self.capacity:
            raise ValueError(
                f"the cache has room for {self.keys.shape[1]} x {self.capacity} tokens (batch x capacity); "
                f"{batch_size} x {tokens} do not fit: make a larger one, or truncate it for another text"
            )

    def update(self, layer_index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the T new tokens of one layer, `[B, H, T, D]`; return all S so far, `[B, H, S, D]` each."""
        end = self.length + key.shape[2]
        self.check_room(len(key), end)
        keys, values = self.keys[layer_index, :, :, :end], self.values[layer_index, :, :, :end]
        keys[:, :, self.length :], values[:, :, self.length :] = key, value
        return keys, values

    def advance(self, tokens: int) -> None:
        """Count `tokens` as held, once every layer has stored them."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens; 0 empties the cache for another prompt."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot keep {length} tokens of a cache that holds {self.length}")
        self.length = length
