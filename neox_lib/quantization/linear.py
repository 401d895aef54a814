"""Linear layers whose weights are stored in fewer bits than they are multiplied with: 16-bit numbers, int8 or int4.

One path for any device: a block of the weights is brought into the activations' dtype and multiplied while it is in the
cache. Gradients reach the activations. Writing on a CPU need not come here: see `decoding`.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox_lib.quantization.int4 import GROUP, dequantize_groups, quantize_groups
from neox_lib.quantization.int8 import quantize_rows

QUANTIZED = {"int8": torch.int8, "int4": torch.uint8}  # by name, what the numbers are stored in: of int4 two in a byte
BLOCK_BYTES = 8 * 2**20  # of fp32 weights: still in a desktop CPU's last-level cache when they are multiplied

Model = TypeVar("Model", bound=nn.Module)


def dtype_name(dtype: torch.dtype) -> str:
    """What weights stored in `dtype` are called.

    >>> dtype_name(torch.float16), dtype_name(torch.uint8)
    ('float16', 'int4')
    """
    return next((name for name, stored in QUANTIZED.items() if stored == dtype), str(dtype).removeprefix("torch."))


def stored_in(layer: str, dtype: torch.dtype) -> torch.dtype:
    """In which dtype a linear layer of this name is stored in a model that is quantized to `dtype`. The output matrix
    has the rounding of int8 at most: it is 1.5 % of 20B, and in int4 the logits' error is a third larger.
    """
    return torch.int8 if layer.startswith("final_linear") else dtype


def quantize(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix `[out, in]` as numbers stored in `dtype`, one of QUANTIZED, and their scales. Raises as `quantize_rows`
    and `quantize_groups` do.
    """
    return quantize_rows(weight) if dtype == torch.int8 else quantize_groups(weight)


def multiply_blocks(input: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """input `[..., in]` times a stored weight, `[out, in]` or int4's nibbles, with its `scale` -> `[..., out]`.

    The scales of rows belong to the product's columns. fp16 would overflow first, so there the weights are scaled.
    """
    rows = max(1, BLOCK_BYTES // (4 * input.shape[-1]))
    products = []
    for start in range(0, len(weight), rows):
        block, after = weight[start : start + rows], None if scale is None else scale[start : start + rows]
        if after is not None and after.dim() == 2:
            block, after = dequantize_groups(block, after, input.dtype), None
        elif after is not None and input.dtype != torch.float32:
            block, after = block.float().mul_(after[:, None]), None
        product = F.linear(input, block.to(input.dtype))
        products.append(product if after is None else product * after)
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


class CastLinear(nn.Linear):
    """`nn.Linear` for weights that may have another dtype than the activations, as fp16 beside fp32: `[..., in]` ->
    `[..., out]`. Shares the weight and the bias of `linear`.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight of the same size
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        product = multiply_blocks(input, self.weight)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class QuantizedLinear(nn.Module):
    """`nn.Linear` from what `quantize` returns and an optional bias: `[..., in]` -> `[..., out]`.

    For inference. Holds the given tensors without a copy: they may be memory-mapped. Raises ValueError for numbers and
    scales that don't match.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        in_rows = weight.dtype == torch.int8 and weight.dim() == 2 and scale.shape == weight.shape[:1]
        in_groups = weight.dtype == torch.uint8 and weight.dim() == 3 and scale.shape == weight.shape[:2]
        if not in_rows and not (in_groups and weight.shape[2] == GROUP // 2):
            raise ValueError(
                f"expected int8 [out, in] and one scale per row, or uint8 [out, in / {GROUP}, {GROUP // 2}] and one "
                f"per group, got {weight.dtype} {list(weight.shape)} and scales {list(scale.shape)}"
            )
        self.out_features, self.in_features = len(weight), weight.shape[1] * (1 if in_rows else GROUP)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        product = multiply_blocks(input, self.weight, self.scale)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def use_cast_linear(model: Model) -> Model:
    """Make every linear layer inside `model` that has a 16-bit weight a CastLinear, in place, and return the model.

    Names, parameters and memory stay as they are: each new layer holds the very tensors of the old one, a tied output
    matrix included.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.weight.dtype != torch.float32:
                setattr(module, name, CastLinear(child))
    return model


def use_quantized_linear(model: Model, dtype: torch.dtype = torch.int8) -> Model:
    """Quantize every linear layer inside `model` to a dtype of QUANTIZED, in place, one at a time; return the model.

    An output matrix stays as it is where it is tied to the embedding, which is looked up, not multiplied; beside int4
    it becomes int8. Raises ValueError as `quantize` does, naming the layer.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for path, module in list(model.named_modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and id(child.weight) not in embeddings:
                stored = stored_in(f"{path}.{name}".removeprefix("."), dtype)
                try:
                    setattr(module, name, QuantizedLinear(*quantize(child.weight.detach(), stored), child.bias))
                except ValueError as error:
                    raise ValueError(f"{path}.{name}: {error}".removeprefix(".")) from None
    return model
