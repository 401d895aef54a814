"""Prompts of unequal length in one batch: padding before the shorter ones, and a mask that hides it.

Built in notebook 06.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from neox_lib.attention import causal_mask


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device | None = None) -> tuple[Tensor, Tensor | None]:
    """Prompts of any lengths as one tensor: -> ids `[B, T]`, and how many of each row are padding, `[B]`.

    Padding goes on the left, so all rows end, and continue, in the same column. Its id, 0, is arbitrary. Prompts of
    equal length need none: then the second is None.

    >>> pad_left([[5, 6, 7], [8]])
    (tensor([[5, 6, 7],
            [0, 0, 8]]), tensor([0, 2]))
    """
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = [[0] * pads + list(prompt) for pads, prompt in zip(padding, prompts, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(padding, device=device) if any(padding) else None


def without_padding(input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor) -> list[Tensor]:
    """Each row's own tokens: ids `[B, T]` and a mask of their shape, 0 for padding -> B tensors of 1 to T ids.

    Raises ValueError unless each row of the mask is 0s and then 1s: padding on the left, without holes.
    """
    mask = torch.as_tensor(attention_mask).cpu()
    if not isinstance(input_ids, Tensor) or mask.dim() != 2 or mask.shape != input_ids.shape:
        found = f"ids {list(input_ids.shape)}" if isinstance(input_ids, Tensor) else f"a {type(input_ids).__name__}"
        raise ValueError(f"an attention_mask must have the shape [B, T] of its ids; got {list(mask.shape)} for {found}")
    wrong = (mask != 0) & (mask != 1)
    wrong[:, 1:] |= (mask[:, :-1] == 1) & (mask[:, 1:] == 0)
    if wrong.any():
        row, place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"each row of an attention_mask must be 0s (padding), then 1s, but row {row} has {mask[row, place].item()} "
            f"at token {place}; pad on the left, or give the prompts as a list of lists"
        )
    return [ids[own == 1] for ids, own in zip(input_ids.cpu(), mask, strict=True)]


def padding_mask(padding: Tensor, queries: int, keys: int) -> Tensor:
    """True where a query may look in a batch with padding: `[B]` padding tokens -> `[B, 1, T, S]`.

    A token sees what the causal mask allows, except padding. A padding token sees itself: its output is never read, but
    the weights of a query that sees nothing would be 0 / 0, and a NaN spreads even through a mask.

    >>> padding_mask(torch.tensor([0, 2]), 2, 3)[:, 0].int()
    tensor([[[1, 1, 0],
             [1, 1, 1]],
    <BLANKLINE>
            [[0, 1, 0],
             [0, 0, 1]]], dtype=torch.int32)
    """
    column = torch.arange(keys, device=padding.device)
    own = column >= padding[:, None]  # [B, S]
    itself = column == column[-queries:, None]  # [T, S]
    return (causal_mask(queries, keys, padding.device) & own[:, None] | itself)[:, None]
