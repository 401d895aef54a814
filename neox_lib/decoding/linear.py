"""Linear layers for a CPU: the same product, by the path that is fastest for its number of rows.

The pieces use plain `nn.Linear`; `use_fast_linear` swaps these layers into a loaded model. A decode step reads every
weight once, so memory limits its speed; a prefill is limited by arithmetic, slow in half precision on a CPU:

- fp32 weights, few rows: oneDNN, up to 1.7 times as fast as torch's own choice, MKL, at streaming a large matrix.
- fp16 weights, up to HALF_ROWS rows: torch's fp16 matrix-vector product, half the bytes of fp32; a result out of its
  range is computed again as below.
- 16-bit weights otherwise: the weight is cast to fp32 a block at a time, and the block multiplied while it is in cache.
- fp16 weights after `pack_half` (packing.py): FBGEMM, which reads fp16 and computes in fp32, the fastest of all.

Activations are fp32 in all of these. For inference: where a gradient is needed, the plain formula is used.
"""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALF_ROWS = 3  # from 4 rows on, casting an fp16 weight once beats reading it once per row
FEW_ROWS = 128  # up to about here oneDNN beats MKL (hidden size 768: 100 rows, 1024: 400), above it MKL wins
LARGE_WEIGHT = 2**19  # numbers; below it the 25 us that a call of oneDNN costs outweigh what it saves
BLOCK_BYTES = 16 * 2**20  # of fp32 weight: within a desktop CPU's last-level cache, and large enough to be efficient

Model = TypeVar("Model", bound=nn.Module)

if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    onednn_linear = torch.ops.mkldnn._linear_pointwise.default
else:
    onednn_linear = None


def multiply_float(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input `[..., in]`, weight `[out, in]` and bias `[out]`, all fp32 -> `[..., out]`."""
    few_rows = input.numel() <= FEW_ROWS * weight.shape[1]
    if few_rows and onednn_linear is not None and weight.numel() >= LARGE_WEIGHT:
        return onednn_linear(input, weight, bias, "none", [], "")
    return F.linear(input, weight, bias)


def multiply_blocks(input: Tensor, weight: Tensor) -> Tensor:
    """input `[..., in]` fp32 times a 16-bit weight `[out, in]` -> `[..., out]` fp32, in fp32 arithmetic throughout."""
    block_rows = max(1, BLOCK_BYTES // (4 * weight.shape[1]))
    products = [multiply_float(input, block.float()) for block in weight.split(block_rows)]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def multiply_half(input: Tensor, weight: Tensor) -> Tensor:
    """input `[..., in]` fp32 times weight `[out, in]` fp16 -> `[..., out]` fp32, for a few rows.

    The rows and the result are rounded to fp16, a relative error of up to 2^-11 each; sums are kept in fp32. A number
    past 65504 in a row or the result makes the result infinite or NaN: then the product is computed again in fp32.
    """
    product = F.linear(input.half(), weight).float()
    return product if math.isfinite(product.sum().item()) else multiply_blocks(input, weight)


class FastLinear(nn.Linear):
    """`nn.Linear` for inference on a CPU: `[..., in]` -> `[..., out]`, sharing the weight and bias of `linear`.

    Takes fp32 activations with fp32, fp16 or bfloat16 weights. Anything else (another device, half-precision
    activations, a gradient needed) goes through the plain formula, with the weight in the activations' dtype.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight of the same size
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        needs_gradient = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        if needs_gradient or input.dtype != torch.float32 or not weight.is_cpu:
            return F.linear(input, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))
        if weight.dtype == torch.float32:
            return multiply_float(input, weight, bias)
        if weight.dtype == torch.float16 and input.numel() <= HALF_ROWS * self.in_features:
            output = multiply_half(input, weight)
        else:
            output = multiply_blocks(input, weight)
        return output if bias is None else output + bias


def use_fast_linear(model: Model) -> Model:
    """Replace every `nn.Linear` inside `model` with a FastLinear, in place, and return the model.

    Names, parameters and memory stay as they are: each new layer holds the very tensors of the old one, a tied output
    matrix included.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, FastLinear(child))
    return model
