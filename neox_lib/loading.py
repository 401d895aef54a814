"""Any checkpoint to a model that is ready to run: what is in the folder, on which device, in which precision."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from neox_lib.checkpoints.checkpoint import SlimWeights, Weights, open_weights
from neox_lib.checkpoints.files import SHIPPED_MODEL, CheckpointError
from neox_lib.checkpoints.huggingface.layout import is_huggingface
from neox_lib.checkpoints.quantized import find_int8, int8_bytes, load_int8, open_int8, quantize_while_loading
from neox_lib.checkpoints.slim.layout import empty_model, is_slim
from neox_lib.checkpoints.slim.reader import load_slim
from neox_lib.config import NeoXConfig
from neox_lib.decoding.linear import use_fast_linear
from neox_lib.hub.names import local_path
from neox_lib.model import NeoXModel

SMALL_MODEL_PARAMETERS = 100_000_000
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}  # of stored weights
PRECISIONS = DTYPES | {"int8": torch.int8}  # that a model can be held in


@dataclass(frozen=True)
class Precision:
    """How a model is held: the dtype of its matrices, that of everything else, and why, in words.

    Biases and norms are a thousandth of the weights. On a CPU they, the activations and the KV cache stay in fp32
    whatever the matrices are, because half-precision attention is slow there (16 times, behind 1,024 tokens).
    """

    matrices: torch.dtype
    others: torch.dtype
    reason: str

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a parameter, by its name: only matrices, the embeddings among them, may be in half precision."""
        return self.others if name.endswith((".bias", "norm.weight")) else self.matrices

    def weight_bytes(self, config: NeoXConfig) -> int:
        """Bytes of the weights; biases and norms count as if they were in the matrices' dtype, except beside int8."""
        return int8_bytes(config) if self.matrices == torch.int8 else config.weight_bytes(self.matrices)


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU. Raises ValueError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"no device is called {device!r}; use auto, cpu, cuda or cuda:0") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no CUDA GPU; use device='auto' or 'cpu'")
    return chosen


def choose_precision(
    config: NeoXConfig, stored: torch.dtype, device: torch.device, dtype: str | torch.dtype
) -> Precision:
    """The rule for dtype="auto", in one place: the file's own on a GPU; on a CPU fp32 for small models, else as stored.

    A CPU spends a decode step on reading weights, so half the bytes make up to twice the speed; below 100 million
    parameters that matters less than fp32's exactness. Raises ValueError for a dtype that is none of ours.
    """
    if dtype == "auto":
        if device.type != "cpu":
            return Precision(stored, stored, "the file's own precision")
        if config.parameter_count() <= SMALL_MODEL_PARAMETERS or stored == torch.float32:
            return Precision(torch.float32, torch.float32, "fp32 arithmetic, as the model is small or stored so")
        return Precision(stored, torch.float32, f"matrices in {stored} for speed and memory, the rest in float32")
    matrices = PRECISIONS.get(dtype) if isinstance(dtype, str) else dtype
    if matrices is None or matrices not in PRECISIONS.values():
        raise ValueError(f"dtype must be auto, {', '.join(PRECISIONS)} or one of these torch dtypes, got {dtype!r}")
    if device.type == "cpu":
        return Precision(matrices, torch.float32, "as asked for")
    return Precision(matrices, stored if matrices == torch.int8 else matrices, "as asked for")


def free_memory(device: torch.device) -> int:
    """Bytes free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def shrink_to_fit(config: NeoXConfig, precision: Precision, device: torch.device) -> Precision:
    """The same precision where the weights fit into a CPU's free memory, or where even int8 does not; else int8."""
    free = free_memory(device)
    if device.type != "cpu" or precision.weight_bytes(config) <= free or int8_bytes(config) > free:
        return precision
    gib, small = precision.weight_bytes(config) / 2**30, int8_bytes(config) / 2**30
    reason = f"{gib:.1f} GiB in {precision.matrices} do not fit into {free / 2**30:.1f} GiB: int8, {small:.1f} GiB"
    return Precision(torch.int8, precision.others, reason)


def check_memory(config: NeoXConfig, precision: Precision, device: torch.device) -> None:
    """Raise CheckpointError, before anything is read, when the weights cannot fit: with the numbers and what would."""
    needed = precision.weight_bytes(config)
    available = free_memory(device)
    if needed <= available:
        return
    sizes = {name: Precision(option, precision.others, "").weight_bytes(config) for name, option in PRECISIONS.items()}
    smaller = [f"{name} ({size / 2**30:.1f} GiB)" for name, size in sizes.items() if size < min(needed, available)]
    advice = f"dtype {' or '.join(smaller)} fits" if smaller else "no dtype of ours fits; use a smaller model"
    raise CheckpointError(
        f"the weights need {needed / 2**30:.1f} GiB in {precision.matrices} and {device} has "
        f"{available / 2**30:.1f} GiB free: {advice}"
    )


def load_weights(weights: Weights, device: str | torch.device, dtype_of: Callable[[str], torch.dtype]) -> NeoXModel:
    """The model of an opened checkpoint, in eval mode and with gradients off, every parameter on `device`.

    `dtype_of` gives a parameter's dtype by its name. The model starts on the meta device, without memory, and each
    tensor is copied to its final place, so that the process never holds much more than the model itself, and no file
    stays mapped. Raises CheckpointError as `Weights.tensors` does.
    """
    model = empty_model(weights.config)
    for name, tensor in weights.tensors():
        own = tensor.to(device, dtype_of(name), copy=True, memory_format=torch.contiguous_format)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(own, requires_grad=False))
    model.rotary.fill(torch.device(device))
    if weights.config.tie_word_embeddings:
        model.final_linear.weight = model.word_embeddings.weight
    return model.eval()


def open_quantized(file: Path, use_cache: bool, device: torch.device, dtype: str | torch.dtype) -> NeoXModel:
    """The model of an int8 file. Raises ValueError when another dtype than int8 is asked for, CheckpointError when it
    does not fit into memory and as `load_int8` does.
    """
    if dtype not in ("auto", "int8", torch.int8):
        raise ValueError(f"{file} holds int8 weights; dtype must be auto or int8, got {dtype!r}: load their source")
    _, config, source, _ = open_int8(file)
    others = torch.float32 if device.type == "cpu" else source
    check_memory(config, Precision(torch.int8, others, "int8 weights, as stored"), device)
    model = load_int8(file, device)
    model.use_cache = use_cache
    return model


def create_model(
    path: str | Path | None = None,
    use_cache: bool = True,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> NeoXModel:
    """Load a model for inference: from a slim, Hugging Face or int8 folder, or an int8 file; without a path, ours.

    A name on the Hub does too, such as "EleutherAI/pythia-70m": see `local_path`.
    `use_cache` is what generation with this model does unless told otherwise. `device` "auto" is CUDA, else the CPU.
    `dtype` "auto": see `choose_precision` and `shrink_to_fit`; when a CPU keeps large matrices in half precision or in
    int8, a line on stderr says so. "int8" quantizes while it loads, unless the weights are in int8 already.
    Raises CheckpointError for a folder that holds no whole checkpoint or does not fit into memory, ValueError for a
    device or dtype that is not there, DownloadError for a name on the Hub that can't be fetched.
    """
    folder = SHIPPED_MODEL if path is None else local_path(path)
    chosen_device = choose_device(device)
    if find_int8(folder) is not None and not (is_slim(folder) or is_huggingface(folder)):
        return open_quantized(folder, use_cache, chosen_device, dtype)
    weights = open_weights(folder)
    precision = choose_precision(weights.config, weights.dtype, chosen_device, dtype)
    if dtype == "auto":
        precision = shrink_to_fit(weights.config, precision, chosen_device)
    check_memory(weights.config, precision, chosen_device)
    if dtype == "auto" and precision.matrices != precision.others:
        print(f"neox_lib: {precision.reason}", file=sys.stderr)
    if precision.matrices == torch.int8:
        model = quantize_while_loading(weights, chosen_device)
    elif isinstance(weights, SlimWeights):
        model = load_slim(folder, chosen_device, precision.dtype_of)
    else:
        model = load_weights(weights, chosen_device, precision.dtype_of)
    model.use_cache = use_cache
    if chosen_device.type == "cpu":
        use_fast_linear(model)
    return model.eval()
