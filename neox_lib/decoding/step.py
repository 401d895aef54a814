"""The plug of `NeoXModel.forward`: new tokens through the compiled loops, where the model allows it.

What the loops can't do goes through the modules, as ever: another device, pieces that were replaced, hooks, a gradient,
a look at the layers, another cache or none, no Numba.
"""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from neox_lib.attention import Attention
from neox_lib.block import MLP, Block
from neox_lib.cache import KVCache
from neox_lib.config import SMALL_MODEL_PARAMETERS, NeoXConfig
from neox_lib.model import NeoXModel, OnLayer
from neox_lib.quantization.linear import QUANTIZED, CastLinear, QuantizedLinear, multiply_blocks
from neox_lib.rotary import RotaryTable

logger = logging.getLogger(__name__)

# Rows go through the loops however many they are. For 64 and more, torch's fp32 product is as fast as that of the loops
# in fp32 and fp16 (some 45 billion products a second per thread of an AMD EPYC), and half as fast as theirs in int8.
ROWS_AT_ONCE = 256  # the rest waits: what lies between two steps stays in a processor's cache, and memory is bounded
CHUNK_BYTES = 2**16  # of weights, in a thread's hands at a time: some microseconds, far more than it costs to take them
# A weight's dtype as the loops see it: on a CPU Numba has no 16-bit floating point, only its bits.
SEEN_AS = {torch.float16: torch.uint16, torch.bfloat16: torch.int16}
LINEAR = (nn.Linear, CastLinear, QuantizedLinear)
PIECES = (NeoXModel, RotaryTable, Block, Attention, MLP, nn.ModuleList, nn.Embedding, nn.LayerNorm, *LINEAR)


@dataclass
class Addresses:
    """Where a model's tensors lie, for the loops, and what tells that they are no longer there."""

    layers: np.ndarray  # [L, 16]: two norms, four matrices
    final: np.ndarray  # [5]: the last norm and the output matrix
    like: np.ndarray  # empty, in the dtype of the layers' matrices
    like_final: np.ndarray
    stand_ins: list[Tensor]  # ones for scales and zeros for biases that a layer lacks
    children: list[tuple[dict[str, Any], str, Any]]  # each module and parameter, and under which name it is found where
    tensors: list[tuple[Tensor, int]]
    attributes: list[dict[str, Any]]  # each module's own: its hooks, and a `forward` that replaces its class's

    def hold(self) -> bool:
        """Whether the model still consists of the same modules and tensors."""
        same = all(owner.get(name) is child for owner, name, child in self.children)
        return same and all(tensor.data_ptr() == address for tensor, address in self.tensors)

    def are_watched(self) -> bool:
        """Whether the modules themselves are wanted: for a hook, a replaced `forward`, or a gradient."""
        for own in self.attributes:
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or "forward" in own:
                return True
        wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor, _ in self.tensors)
        return wants_gradient or bool(_has_any_global_hook())


def as_array(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor, as the loops see it."""
    return tensor.detach().view(SEEN_AS.get(tensor.dtype, tensor.dtype)).numpy()


def find_addresses(model: NeoXModel) -> Addresses | None:
    """The addresses of a model that the loops can run: our own pieces, matrices of one dtype, the rest in fp32, all in
    this machine's memory. None for any other.
    """
    config, modules = model.config, list(model.modules())
    if any(type(module) not in PIECES for module in modules):
        return None
    blocks: Any = list(model.layers)
    linears = [
        [each.attention.query_key_value, each.attention.dense, each.mlp.dense_h_to_4h, each.mlp.dense_4h_to_h]
        for each in blocks
    ]
    dtypes = {linear.weight.dtype for four in linears for linear in four}
    matrices = {id(linear.weight) for four in linears for linear in four}
    matrices |= {id(linear.scale) for four in linears for linear in four if isinstance(linear, QuantizedLinear)}
    matrices |= {id(model.final_linear.weight), id(model.word_embeddings.weight)}
    tensors = list(model.parameters())
    exact = all(tensor.dtype == torch.float32 for tensor in tensors if id(tensor) not in matrices)
    if len(dtypes) != 1 or not exact or not all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors):
        return None
    longest = max(3 * config.hidden_size, config.intermediate_size, config.vocab_size)
    ones, zeros = torch.ones(longest), torch.zeros(longest)

    def places(*layers: Any) -> list[int]:
        found = []
        for layer in layers:
            scale = [getattr(layer, "scale", ones)] if isinstance(layer, LINEAR) else []
            found += [layer.weight, *scale, zeros if layer.bias is None else layer.bias]
        return [tensor.data_ptr() for tensor in found]

    rows = [
        places(block.input_layernorm, block.post_attention_layernorm, *four)
        for block, four in zip(blocks, linears, strict=True)
    ]
    owners = [vars(module)[kind] for module in modules for kind in ("_modules", "_parameters")]
    return Addresses(
        np.array(rows),
        np.array(places(model.norm, model.final_linear)),
        as_array(torch.empty(0, dtype=dtypes.pop())),
        as_array(torch.empty(0, dtype=model.final_linear.weight.dtype)),
        [ones, zeros],
        [(owner, name, child) for owner in owners for name, child in owner.items()],
        [(tensor, tensor.data_ptr()) for tensor in tensors],
        [vars(module) for module in modules if module is not model],  # the model's own hooks run outside its forward
    )


known: WeakKeyDictionary[NeoXModel, Addresses | None] = WeakKeyDictionary()


def addresses_of(model: NeoXModel) -> Addresses | None:
    """The addresses, looked for once and again when the model has changed; None where the modules have to run."""
    found = known.get(model)
    if model not in known or (found is not None and not found.hold()):
        found = known[model] = find_addresses(model)
    return None if found is None or found.are_watched() else found


@lru_cache
def helpers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="decoding")


if hasattr(os, "register_at_fork"):  # a child process has no threads but its own
    os.register_at_fork(after_in_child=helpers.cache_clear)


def run_part(_found: Addresses, work: tuple) -> None:
    """One thread's part. It holds on to the model's tensors, which a thread that comes late would else find freed."""
    from neox_lib.decoding.loops import forward

    forward(*work)


def compiled_step(
    model: NeoXModel,
    input_ids: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Any,
    last_only: bool,
    padding: Tensor | None,
    on_layer: OnLayer | None,
) -> Tensor | None:
    """The logits that `NeoXModel.forward` returns, or None where the modules have to run.

    cos and sin are the rotary rows of the new tokens, `[T, R]` or `[B, 1, T, R]`.
    """
    if on_layer is not None or type(cache) is not KVCache or cache.keys.dtype != torch.float32 or not cache.keys.is_cpu:
        return None
    found, (batch, tokens) = addresses_of(model), input_ids.shape
    if found is None:
        return None
    cache.check_room(batch, cache.length + tokens)
    turns = [each.expand(batch, 1, tokens, -1)[:, 0] for each in (cos, sin)]
    padding = torch.zeros(batch, dtype=torch.int64) if padding is None else padding.long()
    block, scores = max(1, ROWS_AT_ONCE // batch), []
    for start in range(0, tokens, block):
        stop = min(tokens, start + block)
        ends = torch.arange(1, batch + 1) * (stop - start) - 1
        scored = torch.arange(batch * (stop - start)) if not last_only else ends[: batch if stop == tokens else 0]
        part = [each[:, start:stop].contiguous() for each in (input_ids, *turns)]
        scores.append(run_block(model, found, *part, cache, scored, padding))
    return scores[0] if len(scores) == 1 else torch.cat(scores, dim=1)


def run_block(
    model: NeoXModel,
    found: Addresses,
    input_ids: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KVCache,
    scored: Tensor,
    padding: Tensor,
) -> Tensor:
    """Some tokens `[B, T]` through the loops, on all threads -> the logits `[B, N / B, V]` of the N rows `scored`."""
    from neox_lib.decoding.loops import PHASES, Buffers, Shape

    config, (batch, tokens) = model.config, input_ids.shape
    rows, hidden, inner = batch * tokens, config.hidden_size, config.intermediate_size
    shape = Shape(
        hidden,
        inner,
        config.num_attention_heads,
        config.vocab_size,
        np.float32(config.layer_norm_eps),
        config.hidden_act == "gelu",
        config.use_parallel_residual,
        CHUNK_BYTES,
    )
    factors, last = (
        {"dtype": torch.int16 if each.itemsize == 1 else torch.float32} for each in (found.like, found.like_final)
    )
    logits = torch.empty(len(scored), config.vocab_size)
    shared = Buffers(
        hidden=model.word_embeddings(input_ids).float().view(rows, hidden),
        normed=torch.empty(2, rows, hidden, **factors),
        projected=torch.empty(rows, 3 * hidden),
        attended=torch.empty(rows, hidden),
        inner=torch.empty(rows, inner),
        gathered=torch.empty(rows, hidden, **factors),
        widened=torch.empty(rows, inner, **factors),
        steps=torch.empty(4, rows),
        scored=scored,
        last=torch.empty(len(scored), hidden, **last),
        last_steps=torch.empty(len(scored)),
        logits=logits,
        keys=cache.keys,
        values=cache.values,
        cos=cos,
        sin=sin,
        padding=padding,
    )
    buffers = Buffers(*(tensor.detach().numpy() for tensor in shared))
    counters = np.zeros(2 * (2 * PHASES * len(found.layers) + 2), np.int64)
    work = (counters, found.layers, found.final, found.like, found.like_final, shape, buffers, cache.length)
    threads = torch.get_num_threads()
    for _ in range(threads - 1):  # they are not waited for: one that comes late finds all chunks done
        helpers(threads - 1).submit(run_part, found, work)
    run_part(found, work)
    cache.advance(tokens)
    return logits.view(batch, -1, config.vocab_size)


def multiply_few(input: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """input `[R, in]` fp32 times a stored weight `[out, in]` -> `[R, out]`, as the loops multiply it, on one thread; as
    the modules do where Numba is missing.
    """
    try:
        from neox_lib.decoding.loops import Matrix, multiply_alone
    except ImportError:
        return multiply_blocks(input, weight, scale)
    outputs = len(weight)
    out, scale = torch.empty(len(input), outputs), torch.ones(outputs) if scale is None else scale
    numbers = torch.empty(input.shape, dtype=torch.int16 if weight.dtype in QUANTIZED.values() else torch.float32)
    matrix = Matrix(as_array(weight.flatten(1)), as_array(scale.view(outputs, -1)), np.zeros(outputs, np.float32))
    multiply_alone(matrix, input.numpy(), numbers.numpy(), out.numpy())
    return out


def why_modules(config: NeoXConfig) -> str | None:
    """Why a model of this shape decodes on a CPU through its modules; None if it does so in compiled loops."""
    if config.parameter_count() <= SMALL_MODEL_PARAMETERS:
        return "a small model"
    try:
        from neox_lib.decoding.loops import forward
    except Exception as error:  # Numba is missing, or doesn't fit this Python or NumPy
        return f"no Numba: {error}"
    if not any(Path(forward.stats.cache_path or "").glob("loops.forward-*.nbc")):  # type: ignore[attr-defined]
        logger.info("the decoding loops will be compiled for this processor when they are first used: some 10 s, once")
    return None


def use_compiled_step(model: NeoXModel) -> NeoXModel:
    """Let a large model decode in compiled loops where they apply, and return it."""
    model.step = compiled_step if why_modules(model.config) is None else None
    return model
