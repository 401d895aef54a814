"""One layer of GPT-NeoX: attention and an MLP that both read the same input.

Built in notebook 04.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from neox_lib.attention import Attention, KeyValueStore
from neox_lib.config import NeoXConfig


class MLP(nn.Module):
    """Expand, apply GELU, project back: `[B, T, C]` -> `[B, T, C]` by way of `intermediate_size`, 4C in all releases.

    20B was trained with the tanh approximation of GELU (`bias_gelu_fusion` in gpt-neox's `configs/20B.yml`), Pythia
    with the exact function, so the config decides.
    """

    def __init__(self, config: NeoXConfig):
        super().__init__()
        self.approximate = "tanh" if config.hidden_act == "gelu_fast" else "none"
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden), approximate=self.approximate))


class Block(nn.Module):
    """One transformer layer: `[B, T, C]` -> `[B, T, C]`.

    Parallel residual (20B, Pythia): x + attention(norm1(x)) + mlp(norm2(x)). Both read x, each through its own norm, in
    spite of the name `post_attention_layernorm`. Sequential residual (RedPajama-INCITE): the MLP reads the sum of x and
    attention. (gpt-neox, `megatron/model/transformer.py`, `gpt_j_residual`.)
    """

    def __init__(self, config: NeoXConfig, layer_index: int):
        super().__init__()
        self.use_parallel_residual = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config, layer_index)
        self.mlp = MLP(config)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: KeyValueStore | None = None, mask: Tensor | None = None
    ) -> Tensor:
        attended = self.attention(self.input_layernorm(hidden), cos, sin, cache, mask)
        if self.use_parallel_residual:
            return hidden + attended + self.mlp(self.post_attention_layernorm(hidden))
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))
