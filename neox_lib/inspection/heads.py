"""Heads told by where they look, and what the model is without one.

Built in notebook 11.
"""

from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from neox_lib.inspection.hooks import require_hooks
from neox_lib.model import NeoXModel


def previous_token_scores(weights: Tensor) -> Tensor:
    """How much of its attention each head gives to the token before: `[..., T, T]` -> `[...]`, a mean from 0 to 1."""
    return weights.diagonal(offset=-1, dim1=-2, dim2=-1).mean(dim=-1)


def induction_scores(weights: Tensor, period: int) -> Tensor:
    """How much attention a text that repeats after `period` tokens gives to what came after the earlier occurrence:
    `[..., T, T]` -> `[...]`, a mean from 0 to 1 over the tokens that have one.

    That token lies `period - 1` back. (Olsson et al. 2022, "In-context Learning and Induction Heads".) Raises
    ValueError for a text without a repeated token.
    """
    if not 1 < period < weights.shape[-1]:
        raise ValueError(f"period is {period}; expected 2 to {weights.shape[-1] - 1}, so that a token comes twice")
    return weights.diagonal(offset=1 - period, dim1=-2, dim2=-1)[..., 1:].mean(dim=-1)


@torch.inference_mode()
def token_losses(model: NeoXModel, input_ids: Tensor) -> Tensor:
    """How surprised the model is by each token but the first: ids `[B, T]` -> `[B, T - 1]`, in nats."""
    log_probabilities = model(input_ids)[:, :-1].float().log_softmax(dim=-1)
    return -log_probabilities.gather(-1, input_ids[:, 1:, None])[..., 0]


@torch.inference_mode()
def head_outputs(model: NeoXModel, input_ids: Tensor) -> Tensor:
    """What `dense` reads, head by head: ids `[B, T]` -> `[L, B, T, H, D]`. Raises ValueError for a model whose passes
    call no hooks.
    """
    require_hooks(model)
    merged: list[Tensor] = []
    with ExitStack() as hooks:
        for layer in model.layers:
            dense: nn.Linear = layer.attention.dense  # type: ignore[assignment, union-attr]
            hooks.enter_context(dense.register_forward_pre_hook(lambda _module, args: merged.append(args[0])))
        model(input_ids, last_only=True)
    return torch.stack(merged).unflatten(-1, (model.config.num_attention_heads, -1))


def ablate_head(model: NeoXModel, layer: int, head: int, value: Tensor) -> RemovableHandle:
    """From now on a head says `value` `[D]` at every position, until the handle that is returned is removed.

        with ablate_head(model, 1, 1, mean):
            logits = model(ids)

    Zeros are a value that the later layers may never have met; the head's mean over a text takes away what depends on
    the text, and leaves what does not. Raises ValueError for a model whose passes call no hooks.
    """
    require_hooks(model)
    size = model.config.head_dim

    def replace(_module, args: tuple[Tensor]) -> tuple[Tensor]:
        merged = args[0].clone()  # [B, T, C]
        merged[..., head * size : (head + 1) * size] = value
        return (merged,)

    return model.layers[layer].attention.dense.register_forward_pre_hook(replace)  # type: ignore[union-attr]
