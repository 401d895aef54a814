"""Int8 weights in FBGEMM's layout: products of whole numbers, with activations of two digits.

FBGEMM multiplies 8-bit numbers by 8-bit numbers, 2.5 times as fast as torch converts them to floating point, but
rounding an activation to 8 bits costs more accuracy than rounding a weight. So each activation is written as two digits
in base 126, as 437 is 4 and 37 hundredths times 100, and both go through the same product as two rows:

    x = step (high + low / 126)    W x = step (W high + W low / 126)

A decode step is bound by reading W, which is read once for both rows: the second digit costs nothing there.
"""

import warnings

import torch
from torch import Tensor

from neox_lib.decoding.linear import Model
from neox_lib.decoding.packing import PackedWeight, has_fbgemm, pack_half, pack_layers
from neox_lib.quantization.int8_linear import Int8Linear, multiply_dequantized

# AVX2 adds two products of 8 bits in 16 bits: (63 + ZERO) x 127 x 2 = 32258 still fits, 64 would not
LARGEST_DIGIT = 63
BASE = 2 * LARGEST_DIGIT
ZERO = 64  # FBGEMM's activations have no sign: it stores digit + ZERO
SMALLEST = 1e-30  # lower bound on a row's largest value, so that a row of zeros has a step too
LARGE_WEIGHT = 2**22  # numbers; below it, computing the digits costs more than the faster product saves
BLOCK_ROWS = 64  # multiplied at a time: their digits and sums stay in the cache


def to_digits(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows `[R, in]` fp32 -> digits `[2, R, in]`, all from -63 to 63, and steps `[R, 1]`.

    step * (digits[0] + digits[1] / BASE) is within step / 252 of the row once the second digit is rounded, as FBGEMM
    does: 2^-14 of the row's largest absolute value.
    """
    step = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True).clamp_(min=SMALLEST).div_(LARGEST_DIGIT)
    digits = rows.new_empty(2, *rows.shape)
    high, low = digits
    torch.div(rows, step, out=low)
    torch.round(low, out=high)
    low.sub_(high).mul_(BASE)
    return digits, step


class PackedInt8Linear(PackedWeight):
    """An Int8Linear whose numbers live only in FBGEMM's layout: `[..., in]` -> `[..., out]`, for inference.

    `weight` unpacks them each time it is read, for saving and for the plain formula. The last bits differ from
    Int8Linear's, which rounds few rows to bfloat16; here rows are rounded to 14 bits.
    """

    itemsize = 1

    def __init__(self, layer: Int8Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale, self.bias = layer.scale, layer.bias
        zeros = torch.zeros(self.out_features, dtype=torch.int64)
        make_quantized = torch._make_per_channel_quantized_tensor  # pyright: ignore[reportPrivateImportUsage]
        quantized = make_quantized(layer.weight, layer.scale.double(), zeros, 0)
        self.packed = torch.ops.quantized.linear_prepack(quantized, None)

    @property
    def weight(self) -> Tensor:
        """The original int8 numbers `[out, in]`: a new tensor."""
        return torch.ops.quantized.linear_unpack(self.packed)[0].int_repr()

    def multiply(self, rows: Tensor) -> Tensor:
        """rows `[R, in]` fp32 -> `[R, out]`."""
        digits, step = to_digits(rows)
        exact = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        high, low = exact(digits.flatten(0, 1), 1.0, ZERO, self.packed).view(2, len(rows), self.out_features)
        high.add_(low, alpha=1 / BASE)
        return high.mul_(step) if self.bias is None else torch.addcmul(self.bias, high, step)

    def forward(self, input: Tensor) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and input.requires_grad
        if needs_gradient or input.dtype != torch.float32 or not input.is_cpu or input.numel() == 0:
            weight, scale = self.weight.to(input.device), self.scale.to(input.device)
            output = multiply_dequantized(input, weight, scale)
            return output if self.bias is None else output + self.bias.to(input.device, input.dtype)
        rows = input.reshape(-1, self.in_features)
        if len(rows) <= BLOCK_ROWS:
            product = self.multiply(rows)
        else:
            product = torch.cat([self.multiply(block) for block in rows.split(BLOCK_ROWS)])
        return product.view(*input.shape[:-1], self.out_features)


def pack_int8(model: Model) -> Model:
    """Replace every large Int8Linear inside `model` with a PackedInt8Linear, in place, and return the model.

    For long sessions on a CPU with FBGEMM; elsewhere nothing changes. A model from an int8 file then has its weights
    in its own memory and no longer shares them with other processes. Packed weights can't be replaced.
    """
    if not has_fbgemm():
        return model
    with warnings.catch_warnings():  # torch plans to remove quantized tensors
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
        pack_layers(
            model,
            lambda child: isinstance(child, Int8Linear) and child.weight.numel() >= LARGE_WEIGHT,
            PackedInt8Linear,
        )
    return model


def pack(model: Model) -> Model:
    """Pack whatever can be packed, fp16 as `pack_half` and int8 as `pack_int8` do, and return the model."""
    return pack_int8(pack_half(model))
