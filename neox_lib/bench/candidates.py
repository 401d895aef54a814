"""The candidates: our models with random weights, in any precision."""

from collections.abc import Callable

import torch
from torch import Tensor

from neox_lib.checkpoints.build import empty_model, fill_model
from neox_lib.checkpoints.checkpoint import ModelCheckpoint
from neox_lib.checkpoints.files import WEIGHT_DTYPES
from neox_lib.config import NeoXConfig
from neox_lib.decoding.step import use_compiled_step
from neox_lib.generation import stream_generate
from neox_lib.model import NeoXModel
from neox_lib.precision import Precision
from neox_lib.quantization.linear import QUANTIZED, use_cast_linear, use_quantized_linear

OURS = (*WEIGHT_DTYPES, *QUANTIZED)
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


def our_model(model: NeoXModel, dtype: str) -> NeoXModel:
    """The same weights as `create_model` holds them in one of OURS on a CPU, with its compiled loops."""
    precision = Precision(WEIGHT_DTYPES.get(dtype, torch.float16), torch.float32)
    stored = ModelCheckpoint(model).tensors()
    held = ((name, tensor.to(precision.dtype_of(name))) for name, tensor in stored)
    filled = fill_model(empty_model(model.config), held)
    return use_compiled_step(
        use_quantized_linear(filled, QUANTIZED[dtype]) if dtype in QUANTIZED else use_cast_linear(filled)
    )


def our_generate(model: NeoXModel) -> Generate:
    def generate(ids: Tensor, new_tokens: int) -> list[int]:
        return [step.token_id for step in stream_generate(model, ids, new_tokens, stop_token_ids=())]

    return generate
