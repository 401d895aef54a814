"""Rotary position embeddings: position is an angle, and a query-key product depends on the difference of two angles.

Built in notebook 02.
"""

import torch
from torch import Tensor, nn


def rotary_angles(positions: Tensor, rotary_ndims: int, base: float = 10000) -> Tensor:
    """The angle of every pair at every position, in radians, always fp32: `[T]` -> `[T, rotary_ndims]`.

    Pair i turns by base^(-2i / rotary_ndims) per position (Su et al. 2021, https://arxiv.org/abs/2104.09864). The
    second half repeats the first, since dimension i is paired with i + rotary_ndims / 2. In fp16 the product of a
    position near 2048 and a frequency would be off by a third of a radian, so angles are always computed in fp32.

    >>> rotary_angles(torch.tensor([0, 1]), rotary_ndims=2)
    tensor([[0., 0.],
            [1., 1.]])
    """
    exponents = torch.arange(0, rotary_ndims, 2, dtype=torch.float32, device=positions.device) / rotary_ndims
    angles = torch.outer(positions.float(), 1 / base**exponents)
    return torch.cat([angles, angles], dim=-1)


def rotary_table(length: int, rotary_ndims: int, base: float, device: torch.device, dtype: torch.dtype):
    """cos and sin of all angles up to position `length`, each `[length, rotary_ndims]`: computed in fp32, then cast."""
    angles = rotary_angles(torch.arange(length, device=device), rotary_ndims, base)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class RotaryTable(nn.Module):
    """cos and sin of every position in a model's context: two buffers `[max_positions, rotary_ndims]`, always fp32.

    They follow the model to another device, where they are computed again. They are not persistent: no checkpoint holds
    them. `half()` and `to(dtype)` leave them in fp32, so a model cast to half precision and back loses nothing. `fill`
    computes them for a model built on the meta device. `table` is the function that computes them; the few models with
    scaled frequencies bring another one (`rope_scaling.py`).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, max_positions: int, rotary_ndims: int, base: float, table=rotary_table):
        super().__init__()
        self.max_positions, self.rotary_ndims, self.base, self.table = max_positions, rotary_ndims, base, table
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(max_positions, rotary_ndims, dtype=torch.float32), persistent=False)
        if not self.cos.is_meta:
            self.fill(self.cos.device)

    def fill(self, device: torch.device) -> None:
        """Compute both buffers on `device`."""
        length, rotary_ndims = self.max_positions, self.rotary_ndims
        with torch.inference_mode(False):  # the table outlives the call, and training may use it next
            self.cos, self.sin = self.table(length, rotary_ndims, self.base, device, torch.float32)

    def _apply(self, fn, recurse: bool = True):
        """Called by `to`, `half`, `cuda` and the like: follows a new device, ignores a new dtype."""
        device = fn(self.cos).device
        if device != self.cos.device:
            self.fill(device)
        return self

    def rows(self, start: int | Tensor, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of positions start .. start + tokens - 1, each `[T, rotary_ndims]`, in `like`'s dtype and device.

        With one start per text, `[B]`, they are `[B, 1, T, rotary_ndims]`; positions below 0, padding, count as 0.
        Raises ValueError past the context: the model has never seen a later position.
        """
        latest = start if isinstance(start, int) else int(start.max())
        if latest + tokens > self.max_positions:
            raise ValueError(f"{latest} cached + {tokens} new tokens exceed the context of {self.max_positions} tokens")
        if self.cos.device != like.device:  # a loader that put the parameters in one by one left the table behind
            self.fill(like.device)
        positions = slice(start, start + tokens)
        if isinstance(start, Tensor):
            positions = (start[:, None, None] + torch.arange(tokens, device=like.device)).clamp(min=0)  # [B, 1, T]
        return self.cos[positions].to(like.dtype), self.sin[positions].to(like.dtype)


def rotate_half(x: Tensor) -> Tensor:
    """Turn every pair (i, i + D/2) by 90 degrees: `[..., D]` -> `[..., D]`.

    >>> rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([-3., -4.,  1.,  2.])
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first `rotary_ndims` dimensions of each head by its position's angles; the others pass through.

    x: `[B, H, T, D]`; cos and sin: `[T, rotary_ndims]`, the rows of the T positions, or `[B, 1, T, rotary_ndims]` where
    each text has its own. Returns `[B, H, T, D]`.
    """
    rotary_ndims = cos.shape[-1]
    turned, passed = x[..., :rotary_ndims], x[..., rotary_ndims:]
    turned = turned * cos + rotate_half(turned) * sin
    return torch.cat([turned, passed], dim=-1)
