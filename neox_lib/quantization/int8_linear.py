"""A linear layer with int8 weights: how the product is computed depends on the number of rows and the device.

- CPU, up to PACKED_ROWS rows (decode, short prompts): torch's own int8 product. It reads the int8 numbers in place,
  memory-mapped ones too, and takes bfloat16 rows: for fp32 rows it has no fast version on x86.
- CPU, more rows (prefill): a block of int8 numbers is cast to fp32 and multiplied while it is in the cache, since
  a CPU is fastest at fp32 products.
- Elsewhere, for half-precision activations and where a gradient is needed: dequantize a block and multiply.

The scales belong to the output's columns, so on a CPU they are applied to the product, in fp32.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox_lib.quantization.int8 import dequantize_rows, quantize_rows

PACKED_ROWS = 16  # up to here torch's int8 product is faster; it reads the weights once for every 4 rows
PACKED_COLUMNS = 64  # it reads 32 or 64 numbers of a row at once, past the row's end if fewer are left
BLOCK_BYTES = 8 * 2**20  # of fp32 weight at a time: it must still be in the cache when it is multiplied

Model = TypeVar("Model", bound=nn.Module)


def multiply_packed(input: Tensor, numbers: Tensor) -> Tensor:
    """input `[..., in]` fp32 times int8 `numbers` `[out, in]`, without their scales -> `[..., out]` fp32.

    Rows and results are rounded to bfloat16, a relative error of up to 2^-9 each; sums are kept in fp32. `in` must be a
    multiple of PACKED_COLUMNS.
    """
    rows = input.reshape(-1, numbers.shape[1]).bfloat16()
    ones = torch.ones(len(numbers), dtype=torch.bfloat16)  # the operator's own scales would be rounded to 8 bits
    return torch.ops.aten._weight_int8pack_mm(rows, numbers, ones).float().view(*input.shape[:-1], -1)


def multiply_cast(input: Tensor, numbers: Tensor) -> Tensor:
    """The same in fp32 arithmetic throughout, for many rows.

    All blocks are cast into one buffer: allocating memory for each would take longer than the cast itself.
    """
    block_rows = max(1, BLOCK_BYTES // (4 * numbers.shape[1]))
    buffer = torch.empty(min(block_rows, len(numbers)), numbers.shape[1])
    products = [F.linear(input, buffer[: len(block)].copy_(block)) for block in numbers.split(block_rows)]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def multiply_dequantized(input: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """input `[..., in]` times the weights that `numbers` and `scales` stand for -> `[..., out]`, any device and dtype.

    Needs no special operator. fp16 stays in range, since the weights are scaled before they are multiplied.
    """
    block_rows = max(1, 8 * BLOCK_BYTES // (4 * numbers.shape[1]))
    blocks = zip(numbers.split(block_rows), scales.split(block_rows), strict=True)
    products = [F.linear(input, dequantize_rows(*block, dtype=input.dtype)) for block in blocks]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


class Int8Linear(nn.Module):
    """`nn.Linear` from int8 numbers `[out, in]`, fp32 scales `[out]` and an optional bias: `[..., in]` -> `[..., out]`.

    For inference. Holds the given tensors without a copy: they may be memory-mapped. Raises ValueError for numbers and
    scales that don't match.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        if weight.dtype != torch.int8 or weight.dim() != 2 or scale.shape != weight.shape[:1]:
            raise ValueError(
                f"expected int8 [out, in] and one scale per row, got {weight.dtype} "
                f"{list(weight.shape)} and scales {list(scale.shape)}"
            )
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and input.requires_grad
        if needs_gradient or input.dtype != torch.float32 or not self.weight.is_cpu:
            output = multiply_dequantized(input, self.weight, self.scale)
            return output if self.bias is None else output + self.bias.to(output.dtype)
        few = input.numel() <= PACKED_ROWS * self.in_features
        packed = few and self.in_features % PACKED_COLUMNS == 0
        product = multiply_packed(input, self.weight) if packed else multiply_cast(input, self.weight)
        product *= self.scale
        return product if self.bias is None else product.add_(self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def use_int8_linear(model: Model) -> Model:
    """Quantize every linear layer inside `model`, in place, one at a time, and return the model.

    An output matrix that is tied to the embedding stays as it is: the embedding is looked up, not multiplied, and is
    not quantized. Raises ValueError as `quantize_rows` does, naming the layer.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for path, module in list(model.named_modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and id(child.weight) not in embeddings:
                try:
                    setattr(module, name, Int8Linear(*quantize_rows(child.weight.detach()), child.bias))
                except ValueError as error:
                    raise ValueError(f"{path}.{name}: {error}".removeprefix(".")) from None
    return model
