"""Weight-only int8: each row of a matrix becomes whole numbers from -127 to 127 and one scale.

Built in notebook 08.
"""

import torch
from torch import Tensor

LARGEST = 127  # -128 stays unused, so that a row and its negative quantize alike
BLOCK_NUMBERS = 2**22  # quantized at a time: 16 MB in fp32, however large the matrix


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 numbers `[out, in]` and fp32 scales `[out]`, so that number x scale is within scale / 2 of the weight.

    A row's scale is its largest absolute value / 127: that value becomes 127 or -127, nothing overflows, and 0 stays 0.
    Takes fp32, fp16 and bfloat16. Raises ValueError for another dtype or shape, and for NaN or infinity.

    >>> quantize_rows(torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0]]))[0].tolist()
    [[127, -50, 0], [0, 0, 0]]
    """
    if weight.dim() != 2 or weight.numel() == 0 or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"only a matrix [out, in] in float32, float16 or bfloat16 can be quantized, got {weight.dtype} "
            f"{list(weight.shape)}"
        )
    numbers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    rows = max(1, BLOCK_NUMBERS // weight.shape[1])
    for block, number, scale in zip(weight.split(rows), numbers.split(rows), scales.split(rows), strict=True):
        block = block.float()
        torch.div(block.abs().amax(dim=1), LARGEST, out=scale)
        scale.clamp_(min=torch.finfo(torch.float32).tiny)  # a row of zeros divides by this and stays zeros
        number.copy_((block / scale[:, None]).round_())
    if not scales.isfinite().all():
        row = int(scales.isfinite().logical_not().nonzero()[0])
        raise ValueError(f"row {row} holds NaN or infinity; the weights are damaged, fetch them again")
    return numbers, scales


def dequantize_rows(numbers: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that int8 `numbers` `[out, in]` and `scales` `[out]` stand for: `[out, in]` in `dtype`."""
    return (numbers.float() * scales[:, None]).to(dtype)
