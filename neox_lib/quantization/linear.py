"""Linear layers whose weights are stored in fewer bits than they are multiplied with: 16-bit numbers, or int8.

One path for any device: a block of the weights is brought into the activations' dtype and multiplied while it is in the
cache. Gradients reach the activations. Writing on a CPU need not come here: see `decoding`.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox_lib.quantization.int8 import quantize_rows

BLOCK_BYTES = 8 * 2**20  # of fp32 weights: still in a desktop CPU's last-level cache when they are multiplied

Model = TypeVar("Model", bound=nn.Module)


def multiply_blocks(input: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """input `[..., in]` times a stored weight `[out, in]`, with the `scale` `[out]` of its rows -> `[..., out]`.

    The scales belong to the product's columns. fp16 would overflow first, so there the weights are scaled.
    """
    rows = max(1, BLOCK_BYTES // (4 * weight.shape[1]))
    products = []
    for start in range(0, len(weight), rows):
        block, after = weight[start : start + rows], None if scale is None else scale[start : start + rows]
        if after is not None and input.dtype != torch.float32:
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
