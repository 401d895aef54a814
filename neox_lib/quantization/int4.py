"""Weight-only int4: every 32 weights of a row become whole numbers from -8 to 7 and one scale of their own.

Sixteen numbers can't serve a whole row: one large weight would make the step too wide for all others. So each group of
32 has a scale, in 16 bits, which makes 4.5 bits per weight.

Built in notebook 08.
"""

import torch
from torch import Tensor

GROUP = 32  # weights that share a scale
BLOCK_WEIGHTS = 2**20  # quantized at a time: 4 MB in fp32, which stays in a processor's cache


def fit_scales(groups: Tensor) -> Tensor:
    """The scale of each group `[N, 32]` in fp32: `[N]`, negative where the largest weight is positive.

    The largest weight, by its absolute value, is tried at -8, at -7 and at -9, where it is cut off at -8 and the others
    have finer steps. With the numbers that this gives, the least squared error is that of the scale (sum of weight x
    number) / (sum of number x number), and it is lower by (sum of weight x number)^2 / (sum of number x number) than
    that of no numbers at all: the try for which this is most wins.
    """
    low, high = groups.aminmax(dim=1)
    largest = torch.where(high > -low, high, low)
    unit = groups / torch.where(largest == 0, 1, largest)[:, None]  # from -1 to 1, and the largest is 1
    best, scale = torch.zeros_like(largest), torch.zeros_like(largest)
    for end in (-8, -7, -9):
        numbers = (unit * end).round_().clamp_(-8, 7)
        product, square = (unit * numbers).sum(dim=1), numbers.square().sum(dim=1).clamp_(min=1)
        gain = product.square() / square
        scale = torch.where(gain <= best, scale, largest * (product / square))
        best = torch.maximum(best, gain)
    return scale


def quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Nibbles `[out, in / 32, 16]` uint8 and bfloat16 scales `[out, in / 32]` of a matrix `[out, in]`.

    A byte holds two numbers, each + 8: in its low four bits one of the group's first 16, in its high four one of the
    last 16. Number x scale is within half a step of every weight from -8 to 7 steps. bfloat16 has fp32's range, and
    what its rounding costs is small beside a step. Takes fp32, fp16 and bfloat16. Raises ValueError for another dtype
    or shape, and for NaN or infinity.

    >>> nibbles, scales = quantize_groups(torch.tensor([[-1.0, 0.5] + 14 * [0.0] + [0.25] + 15 * [0.0]]))
    >>> nibbles[0, 0, :3].tolist(), scales.tolist()  # -8 + 8 and 2 + 8 in the first byte
    ([160, 140, 136], [[0.125]])
    """
    known = weight.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if weight.dim() != 2 or weight.numel() == 0 or weight.shape[1] % GROUP or not known:
        raise ValueError(
            f"only a matrix [out, in] in float32, float16 or bfloat16, in a multiple of {GROUP}, can be quantized to "
            f"int4, got {weight.dtype} {list(weight.shape)}"
        )
    outputs, inputs = weight.shape
    nibbles = torch.empty(outputs, inputs // GROUP, GROUP // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(outputs, inputs // GROUP, dtype=torch.bfloat16, device=weight.device)
    rows = max(1, BLOCK_WEIGHTS // inputs)
    for block, nibble, scale in zip(weight.split(rows), nibbles.split(rows), scales.split(rows), strict=True):
        groups = block.float().reshape(-1, GROUP)
        scale.copy_(fit_scales(groups).view(scale.shape))
        step = scale.float().view(-1, 1)
        numbers = torch.where(step == 0, 0, groups / step).round_().clamp_(-8, 7).add_(8).to(torch.uint8)
        nibble.copy_((numbers[:, : GROUP // 2] | numbers[:, GROUP // 2 :] << 4).view(nibble.shape))
    if not scales.isfinite().all():
        row = int(scales.isfinite().all(dim=1).logical_not().nonzero()[0])
        raise ValueError(f"row {row} holds NaN or infinity; the weights are damaged, fetch them again")
    return nibbles, scales


def dequantize_groups(nibbles: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights `[out, in]` in `dtype` that nibbles `[out, in / 32, 16]` and scales `[out, in / 32]` stand for."""
    numbers = torch.cat([nibbles & 15, nibbles >> 4], dim=-1).float() - 8
    return (numbers * scales.float()[..., None]).flatten(1).to(dtype)
