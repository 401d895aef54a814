"""The attention weights of a whole text, or of its last token only.

Built in notebook 04.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from neox_lib.attention import attention_weights
from neox_lib.block import Block
from neox_lib.model import NeoXModel


def model_attention_weights(model: NeoXModel, input_ids: Tensor) -> Tensor:
    """Who looks at whom, in every layer and head: ids `[B, T]` -> `[L, B, H, T, T]`, fp32, rows sum to 1."""
    weights = []

    def look(depth: int, hidden: Tensor) -> None:
        if depth < len(model.layers):
            layer = model.layers[depth]
            assert isinstance(layer, Block)
            cos, sin = model.rotary.rows(0, hidden.shape[1], like=hidden)
            weights.append(layer.attention.weights(layer.input_layernorm(hidden), cos, sin))

    model(input_ids, last_only=True, on_layer=look)
    return torch.stack(weights)


@torch.inference_mode()
def attention_of_last(
    model: NeoXModel, ids: list[int], on_progress: Callable[[int, int], bool | None] | None = None
) -> Tensor:
    """At what the last token looks, in every layer and head: T ids -> `[L, H, T]`, fp32, on the CPU; rows sum to 1.

    Only the last token's queries meet the keys, so a long text needs no `[T, T]` table. `on_progress(done, total)` is
    called after each layer; when it returns False the pass ends with Stopped.
    """
    rows, layers = [], len(model.layers)

    def look(depth: int, hidden: Tensor) -> bool | None:
        if depth < layers:
            layer = model.layers[depth]
            assert isinstance(layer, Block)
            cos, sin = model.rotary.rows(0, len(ids), like=hidden)
            query, key, _ = layer.attention.project(layer.input_layernorm(hidden), cos, sin)
            rows.append(attention_weights(query[:, :, -1:], key)[0, :, 0].cpu())
        return on_progress(depth, layers) if on_progress is not None and depth > 0 else None

    model(torch.tensor([ids], device=model.norm.weight.device), last_only=True, on_layer=look)
    return torch.stack(rows)
