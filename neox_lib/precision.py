"""What a model needs in each precision, which precision is chosen, and how fast to expect the model to be.

A decode step reads every weight once and the cache, so the speed of memory bounds the tokens per second; a CPU reaches
60 to 95 % of that bound (`python -m neox_lib bench` measures it).
"""

from dataclasses import dataclass

import torch

from neox_lib.checkpoints.checkpoint import Checkpoint
from neox_lib.checkpoints.files import WEIGHT_DTYPES, CheckpointError
from neox_lib.checkpoints.quantized import quantized_bytes
from neox_lib.config import SMALL_MODEL_PARAMETERS, NeoXConfig, format_bytes
from neox_lib.memory import available_memory
from neox_lib.quantization.int4 import GROUP
from neox_lib.quantization.linear import QUANTIZED, dtype_name

SPARE = 500_000_000  # bytes left for activations, Python and torch
DTYPES = WEIGHT_DTYPES | QUANTIZED  # dtypes for a model, by the name a user types


@dataclass(frozen=True)
class Precision:
    """How a model is stored: the dtype of its matrices, that of everything else, and what to tell the user about it.

    Biases and norms are a thousandth of the weights. On a CPU they, the activations and the KV cache stay in fp32
    whatever the matrices are, because half-precision attention is slow there (16 times slower after 1,024 tokens).
    """

    matrices: torch.dtype
    others: torch.dtype
    notice: str = ""

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a parameter, by its name: only matrices, the embeddings among them, may be in half precision."""
        return self.others if name.endswith((".bias", "norm.weight")) else self.matrices


def weight_bytes(config: NeoXConfig, dtype: torch.dtype, embedding: torch.dtype = torch.float16) -> int:
    """Bytes of a model with matrices in `dtype`; the word embeddings beside quantized ones are in `embedding`. Biases
    and norms count as if they were in the matrices' dtype, unless that is a quantized one.
    """
    return quantized_bytes(config, dtype, embedding) if dtype in QUANTIZED.values() else config.weight_bytes(dtype)


def quantized_dtypes(config: NeoXConfig) -> list[torch.dtype]:
    """What a model of this shape can be quantized to, from more bytes to fewer: int4 needs rows of whole groups."""
    in_groups = config.hidden_size % GROUP == 0 == config.intermediate_size % GROUP
    return [dtype for dtype in QUANTIZED.values() if dtype == torch.int8 or in_groups]


def choose_precision(checkpoint: Checkpoint, device: torch.device, dtype: str | torch.dtype) -> Precision:
    """The rule for dtype="auto", in one place: the file's own on a GPU; on a CPU fp32 for small models, else as stored.

    A CPU spends a decode step on reading weights, so half the bytes make up to twice the speed; below 100 million
    parameters that matters less than fp32's exactness. Raises ValueError for an unknown dtype, and for another than
    that of quantized weights.
    """
    matrices = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype != "auto" and matrices not in DTYPES.values():
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)} or one of these torch dtypes, got {dtype!r}")
    stored, on_cpu = checkpoint.dtype, device.type == "cpu"
    if stored in QUANTIZED.values() and matrices not in (None, stored):
        name = dtype_name(stored)
        raise ValueError(
            f"{checkpoint} holds {name} weights; dtype must be auto or {name}, got {dtype!r}; "
            "for another dtype, load the model they were made from"
        )
    chosen = stored if matrices is None else matrices
    if chosen in QUANTIZED.values():
        return Precision(chosen, torch.float32 if on_cpu else checkpoint.float_dtype)
    if matrices is not None:
        return Precision(matrices, torch.float32 if on_cpu else matrices)
    if not on_cpu:
        return Precision(stored, stored)
    if checkpoint.config.parameter_count() <= SMALL_MODEL_PARAMETERS or stored == torch.float32:
        return Precision(torch.float32, torch.float32)
    return Precision(stored, torch.float32, f"matrices in {stored} for speed and memory, the rest in float32")


def free_memory(device: torch.device) -> int:
    """Bytes free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def shrink_to_fit(config: NeoXConfig, precision: Precision, device: torch.device) -> Precision:
    """The given precision if the weights fit into a CPU's free memory, else int8, else int4; the given one if none
    fits.
    """
    free, needed = free_memory(device), weight_bytes(config, precision.matrices)
    if device.type != "cpu" or needed <= free or precision.matrices in QUANTIZED.values():
        return precision
    for dtype in quantized_dtypes(config):
        if (small := quantized_bytes(config, dtype)) <= free:
            notice = f"{format_bytes(needed)} in {precision.matrices} do not fit into {format_bytes(free)}: "
            return Precision(dtype, precision.others, f"{notice}{dtype_name(dtype)}, {format_bytes(small)}")
    return precision


def check_memory(config: NeoXConfig, precision: Precision, device: torch.device) -> None:
    """Raise CheckpointError, before anything is read, if the weights cannot fit, naming the sizes and a dtype that
    fits.
    """
    needed, free = weight_bytes(config, precision.matrices), free_memory(device)
    if needed <= free:
        return
    dtypes = [*WEIGHT_DTYPES.values(), *quantized_dtypes(config)]
    sizes = {dtype_name(dtype): weight_bytes(config, dtype) for dtype in dtypes}
    smaller = [f"{name} ({format_bytes(size)})" for name, size in sizes.items() if size < min(needed, free)]
    advice = f"dtype {' or '.join(smaller)} fits" if smaller else "no dtype fits; use a smaller model"
    raise CheckpointError(
        f"the weights need {format_bytes(needed)} in {dtype_name(precision.matrices)} and {device} has "
        f"{format_bytes(free)} free: {advice}"
    )


@dataclass(frozen=True)
class Need:
    """What a model needs in one precision, in bytes; `read` are the weights that each new token reads."""

    precision: str
    weights: int
    cache: int
    read: int

    def fits(self, free: int) -> bool:
        return self.weights + self.cache + SPARE <= free

    def longest(self, free: int, tokens: int) -> int:
        """How many of `tokens`, whose keys and values take `cache` bytes, fit beside the weights."""
        return max(0, min(tokens, (free - SPARE - self.weights) * tokens // self.cache))

    def tokens_per_second(self, bandwidth: float, share: float = 1.0) -> float:
        """The upper bound after that share of the text, with memory read at `bandwidth` bytes per second."""
        return bandwidth / (self.read + share * self.cache)


def needs(config: NeoXConfig, tokens: int, half: torch.dtype = torch.float16) -> list[Need]:
    """A row for each precision: bytes with a text of `tokens`, as this library holds it on a CPU, cache in fp32.

    `half` is the 16-bit dtype, also for the embedding beside quantized matrices. A token reads one row of the input
    embedding, unless it is tied to the output matrix: then all of it is read.
    """
    cache, rows = config.kv_cache_bytes(tokens, torch.float32), []
    for dtype in (torch.float32, half, *quantized_dtypes(config)):
        weights, looked_up = weight_bytes(config, dtype, half), half if dtype in QUANTIZED.values() else dtype
        embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * looked_up.itemsize
        rows.append(Need(dtype_name(dtype), weights, cache, weights - embedding))
    return rows


def format_card(config: NeoXConfig, free: int) -> str:
    """What is left on a GPU with `free` bytes: for each precision, how many tokens a cache beside the weights has room
    for, in one text or several. The cache is in 16 bits, with fp32 weights in fp32.
    """
    lines = [f"{'precision':<10} {'weights':>10}   room for a cache of"]
    for need in needs(config, 1):
        cache = config.kv_cache_bytes(1, torch.float32 if need.precision == "float32" else torch.float16)
        tokens = max(0, free - SPARE - need.weights) // cache
        room = f"{tokens:,} tokens" if tokens else "none"
        lines.append(f"{need.precision:<10} {format_bytes(need.weights):>10}   {room}")
    return "\n".join(lines)


def format_needs(config: NeoXConfig, tokens: int, free: int, bandwidth: float) -> str:
    """The calculator as a table."""
    cache = f"cache of {tokens} tokens"
    lines = [f"{'precision':<10} {'weights':>10} {cache:>21}   {'fits':<20} {'tokens/s at most':>17}"]
    for need in needs(config, tokens):
        longest = need.longest(free, tokens)
        fits = "yes" if longest == tokens else f"up to {longest} tokens" if longest else "no"
        speed = f"{need.tokens_per_second(bandwidth, longest / tokens):.3g}" if longest else "-"
        sizes = f"{format_bytes(need.weights):>10} {format_bytes(need.cache):>21}"
        lines.append(f"{need.precision:<10} {sizes}   {fits:<20} {speed:>17}")
    lines.append(f"{format_bytes(free)} of memory are free, read at {bandwidth / 1e9:.0f} GB/s")
    return "\n".join(lines)
