"""Linear layers for a CPU: the same product, each time on the path that is fastest for its number of rows.

The pieces use plain `nn.Linear`; `use_fast_linear` swaps these layers into a loaded model. One decode step reads every
weight once, so its floor is the memory's speed; a prefill does arithmetic, and half precision is slow at that on a CPU:

- fp32 weights, few rows: oneDNN, which streams a matrix at up to twice the speed of torch's own choice, MKL.
- fp16 weights, up to HALF_ROWS rows: torch's fp16 matrix-vector product, half the bytes of fp32.
- 16-bit weights otherwise: the weight is cast to fp32 a block at a time, and the block multiplied while it is in cache.

Activations are fp32 in all of these. For inference: where a gradient is asked for, the plain formula is used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALF_ROWS = 3  # from 4 rows on, casting a fp16 weight once beats reading it row by row
FEW_ROWS = 32  # up to here oneDNN is as fast as MKL or faster, above it MKL is
BLOCK_BYTES = 16 * 2**20  # of fp32 weight: within a desktop CPU's last cache, and large enough for an efficient product

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def multiply_float(rows: Tensor, weight: Tensor) -> Tensor:
    """rows `[N, in]` times weight `[out, in]`, both fp32 -> `[N, out]`."""
    if HAS_ONEDNN and len(rows) <= FEW_ROWS:
        return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    return F.linear(rows, weight)


def multiply_half(rows: Tensor, weight: Tensor) -> Tensor:
    """rows `[N, in]` fp32 times weight `[out, in]` fp16 -> `[N, out]` fp32, for a few rows.

    The rows and the result are rounded to fp16, a relative error of up to 2^-11 each; sums are kept in fp32. Activations
    past 65504 become infinite, as they would in a model that runs in fp16 altogether.
    """
    return F.linear(rows.half(), weight).float()


def multiply_blocks(rows: Tensor, weight: Tensor) -> Tensor:
    """rows `[N, in]` fp32 times a 16-bit weight `[out, in]` -> `[N, out]` fp32, in fp32 arithmetic throughout."""
    block_rows = max(1, BLOCK_BYTES // (4 * weight.shape[1]))
    products = [multiply_float(rows, block.float()) for block in weight.split(block_rows)]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


class FastLinear(nn.Linear):
    """`nn.Linear` for inference on a CPU: `[..., in]` -> `[..., out]`, sharing the weight and bias of `linear`.

    Takes fp32 activations with fp32, fp16 or bfloat16 weights. Anything else (another device, half-precision
    activations, a gradient asked for) goes through the plain formula, with the weight in the activations' dtype.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)  # nn.Linear's own would make a weight of the same size first
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        needs_gradient = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        if needs_gradient or input.dtype != torch.float32 or not weight.is_cpu:
            bias = None if self.bias is None else self.bias.to(input.dtype)
            return F.linear(input, weight.to(input.dtype), bias)
        rows = input.reshape(-1, self.in_features)
        if weight.dtype == torch.float32:
            output = multiply_float(rows, weight)
        elif weight.dtype == torch.float16 and len(rows) <= HALF_ROWS:
            output = multiply_half(rows, weight)
        else:
            output = multiply_blocks(rows, weight)
        if self.bias is not None:
            output = output + self.bias
        return output.view(*input.shape[:-1], self.out_features)


def use_fast_linear(model: nn.Module) -> nn.Module:
    """Replace every `nn.Linear` inside `model` by a FastLinear, in place, and return the model.

    Names, parameters and memory stay as they are: each new layer holds the very tensors of the old one, a tied output
    matrix included.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, FastLinear(child))
    return model
