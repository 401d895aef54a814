"""Activation patching: a piece of one pass put into another.

Built in notebook 11.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from neox_lib.inspection.hooks import require_hooks
from neox_lib.model import NeoXModel


def patch(model: NeoXModel, depth: int, position: int, value: Tensor) -> RemovableHandle:
    """From now on layer `depth` reads `value` `[C]` at one position, until the handle that is returned is removed.

        with patch(model, 2, 6, streams[2, 0, 6]):
            logits = model(ids)

    `depth` counts from 0 to L - 1, as for `on_layer`. What other positions hold there stays. Raises ValueError for a
    model whose passes call no hooks.
    """
    require_hooks(model)

    def replace(_module, args: tuple) -> tuple:
        hidden = args[0].clone()  # [B, T, C]: others may hold the tensor that came in
        hidden[:, position] = value
        return hidden, *args[1:]

    return model.layers[depth].register_forward_pre_hook(replace)


@torch.inference_mode()
def patch_grid(
    model: NeoXModel, input_ids: Tensor, streams: Tensor, measure: Callable[[Tensor], float | Tensor]
) -> Tensor:
    """Each place of another text's streams put into this one, one at a time: ids `[1, T]` and streams
    `[L + 1, 1, T, C]` -> `[L, T]`, what `measure` says of the logits `[V]` at the last position.

    Both texts must have as many tokens, and those that mean the same at the same place. (Meng et al. 2022, "Locating
    and Editing Factual Associations in GPT", who call it causal tracing.) Raises ValueError for other shapes.
    """
    layers, tokens = len(model.layers), input_ids.shape[1]
    expected = (layers + 1, 1, tokens, model.config.hidden_size)
    if tuple(streams.shape) != expected:
        raise ValueError(
            f"the streams have shape {list(streams.shape)}, expected {list(expected)}: the other text must have as "
            "many tokens as this one"
        )
    grid = torch.empty(layers, tokens)
    for depth in range(layers):
        for position in range(tokens):
            with patch(model, depth, position, streams[depth, 0, position]):
                grid[depth, position] = measure(model(input_ids, last_only=True)[0, -1])
    return grid
