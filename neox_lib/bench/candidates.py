"""The candidates: our models with random weights, in any precision."""

from collections.abc import Callable

import torch
from torch import Tensor

from neox_lib.checkpoints.build import empty_model, fill_model
from neox_lib.checkpoints.checkpoint import ModelCheckpoint
from neox_lib.checkpoints.files import WEIGHT_DTYPES
from neox_lib.config import NeoXConfig
from neox_lib.decoding.int8_packing import pack_int8
from neox_lib.decoding.linear import use_fast_linear
from neox_lib.decoding.packing import pack_half
from neox_lib.generation import stream_generate
from neox_lib.model import NeoXModel
from neox_lib.precision import Precision
from neox_lib.quantization.int8_linear import use_int8_linear

OURS = (*WEIGHT_DTYPES, "packed", "int8", "packed-int8")
# generate(ids [1, T], new_tokens) -> token ids written
Generate = Callable[[Tensor, int], list[int]]


def random_model(config: NeoXConfig, seed: int = 0) -> NeoXModel:
    """An fp32 model with matrices of standard deviation 0.02, as GPT-NeoX is initialized."""
    torch.manual_seed(seed)
    model = NeoXModel(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.02)
    return model


def in_precision(model: NeoXModel, dtype: torch.dtype) -> NeoXModel:
    """The same weights as `create_model` holds them in `dtype` on a CPU, with its fast layers."""
    precision = Precision(dtype, torch.float32)
    stored = ModelCheckpoint(model).tensors()
    held = ((name, tensor.to(precision.dtype_of(name))) for name, tensor in stored)
    return use_fast_linear(fill_model(empty_model(model.config), held))


def our_model(model: NeoXModel, dtype: str) -> NeoXModel:
    """The same weights in one of OURS: a dtype of the matrices, "packed" (float16), "int8" or "packed-int8"."""
    if dtype.endswith("int8"):
        quantized = use_int8_linear(in_precision(model, torch.float16))
        return pack_int8(quantized) if dtype == "packed-int8" else quantized
    if dtype == "packed":
        return pack_half(in_precision(model, torch.float16))
    return in_precision(model, WEIGHT_DTYPES[dtype])


def our_generate(model: NeoXModel) -> Generate:
    def generate(ids: Tensor, new_tokens: int) -> list[int]:
        return [step.token_id for step in stream_generate(model, ids, new_tokens, stop_token_ids=())]

    return generate
