"""What notebook 09 runs: two pretended devices in one process, and the work of two real ones."""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neox_lib.attention import KeyValueStore
from neox_lib.cache import KVCache
from neox_lib.checkpoints.files import SHIPPED_MODEL
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.distributed.loading import build_rank, create_rank_model
from neox_lib.generation import prompt_ids, stream_generate
from neox_lib.loading import create_model, create_tokenizer
from neox_lib.model import NeoXModel

CPU = torch.device("cpu")
# (hidden [B, T, C], each device's block, cos, sin, each device's cache, all_reduce) -> hidden [B, T, C]
BlockOnDevices = Callable[..., Tensor]


class Wire:
    """What connects pretended devices: it counts the all-reduces, and the numbers that each device brings."""

    def __init__(self):
        self.all_reduces, self.numbers = 0, 0

    def all_reduce(self, partials: Sequence[Tensor]) -> Tensor:
        """The sum of the devices' tensors, one from each."""
        self.all_reduces += 1
        self.numbers += partials[0].numel()
        return torch.stack(list(partials)).sum(dim=0)


class OwnHeads:
    """One device's share of a cache in the same process: its own heads of every layer."""

    def __init__(self, cache: KVCache, rank: int):
        self.cache, self.rank = cache, rank

    def update(self, layer_index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store `[B, H / ranks, T, D]` keys and values; return all S so far, `[B, H / ranks, S, D]` each."""
        heads, start, end = key.shape[1], self.cache.length, self.cache.length + key.shape[2]
        own = slice(self.rank * heads, (self.rank + 1) * heads)
        keys = self.cache.keys[layer_index, :, own, :end]
        values = self.cache.values[layer_index, :, own, :end]
        keys[:, :, start:], values[:, :, start:] = key, value
        return keys, values


class _BlockOnDevices(nn.Module):
    """Replaces a block of a model; the devices compute it."""

    def __init__(self, blocks: Sequence[nn.Module], compute: BlockOnDevices, wire: Wire):
        super().__init__()
        self.blocks, self.compute, self.wire = nn.ModuleList(blocks), compute, wire

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: KeyValueStore | None = None) -> Tensor:
        caches = [OwnHeads(cache, rank) if isinstance(cache, KVCache) else None for rank in range(len(self.blocks))]
        return self.compute(hidden, list(self.blocks), cos, sin, caches, self.wire.all_reduce)


def shipped_parts(ranks: int) -> list[NeoXModel]:
    """The shipped model cut for `ranks` devices, all in this process, in fp32 on the CPU."""
    checkpoint = open_checkpoint(SHIPPED_MODEL)
    return [
        build_rank(checkpoint.config, checkpoint.parts(), rank, ranks, CPU, lambda name: torch.float32)
        for rank in range(ranks)
    ]


def model_on_devices(parts: Sequence[NeoXModel], compute: BlockOnDevices, wire: Wire) -> NeoXModel:
    """The shipped model, its blocks computed by `compute` from the devices' parts, the rest whole."""
    model = create_model(device=CPU, dtype="float32")
    blocks_of_layers = zip(*(part.layers for part in parts), strict=True)
    model.layers = nn.ModuleList(_BlockOnDevices(blocks, compute, wire) for blocks in blocks_of_layers)
    return model


def right_block(hidden: Tensor, blocks: list, cos: Tensor, sin: Tensor, caches: list, all_reduce: Callable) -> Tensor:
    """The parallel block on several devices, with one all-reduce: hidden `[B, T, C]` -> `[B, T, C]`."""
    partials = []
    for block, cache in zip(blocks, caches, strict=True):
        attended = block.attention(block.input_layernorm(hidden), cos, sin, cache)
        partials.append(attended + block.mlp(block.post_attention_layernorm(hidden)))
    return hidden + all_reduce(partials)


def exchanges(model: NeoXModel, ids: Tensor) -> dict[str, int]:
    """How often the real ranks communicate in one pass over `ids`: kind of exchange -> times."""
    from torch.distributed.tensor.debug import CommDebugMode  # slow to import

    with CommDebugMode() as seen:
        model(ids)
    kinds = {"allreduce_": "all-reduce", "all_reduce": "all-reduce", "allgather_": "all-gather"}
    kinds["all_gather_into_tensor"] = "all-gather"
    counts = {str(kind).split(".")[-1]: count for kind, count in seen.get_comm_counts().items()}
    return {kinds.get(kind, kind): count for kind, count in counts.items()}


def write(model: NeoXModel, prompt: str, new_tokens: int) -> str:
    """The prompt and its greedy continuation."""
    tokenizer = create_tokenizer()
    steps = stream_generate(model, prompt_ids(tokenizer, prompt), new_tokens, tokenizer=tokenizer)
    return prompt + "".join(step.text for step in steps)


def tell_a_story(prompt: str, new_tokens: int) -> dict:
    """The work of one rank: load its part, write, and report."""
    model = create_rank_model(device="cpu", dtype="float32")
    return {
        "rank": dist.get_rank(),
        "heads": model.config.num_attention_heads,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "story": write(model, prompt, new_tokens),
    }


def count_exchanges(ids: Tensor) -> dict[str, dict[str, int]]:
    """The work of one rank: exchanges in one pass of three models, ours, ours made sequential, and PyTorch's plan."""
    ours = create_rank_model(device="cpu", dtype="float32")
    checkpoint, rank, ranks = open_checkpoint(SHIPPED_MODEL), dist.get_rank(), dist.get_world_size()
    config = dataclasses.replace(checkpoint.config, use_parallel_residual=False)
    sequential = build_rank(config, checkpoint.parts(), rank, ranks, CPU, lambda name: torch.float32)
    planned = by_pytorchs_plan()
    assert torch.allclose(planned(ids), ours(ids), rtol=0, atol=1e-4)
    models = {"parallel residual": ours, "sequential residual": sequential, "parallel, PyTorch's plan": planned}
    return {name: exchanges(model, ids) for name, model in models.items()}


def by_pytorchs_plan() -> NeoXModel:
    """The shipped model cut by PyTorch's `parallelize_module`, which sums behind each row-parallel layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, ranks = create_model(device=CPU, dtype="float32"), dist.get_world_size()
    plain = NeoXModel(model.config).eval().requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    plan = {
        "word_embeddings": RowwiseParallel(input_layouts=Replicate()),
        "layers.*.attention.query_key_value": ColwiseParallel(),
        "layers.*.attention.dense": RowwiseParallel(),
        "layers.*.mlp.dense_h_to_4h": ColwiseParallel(),
        "layers.*.mlp.dense_4h_to_h": RowwiseParallel(),
        "final_linear": ColwiseParallel(output_layouts=Replicate()),
    }
    for layer in plain.layers:
        layer.attention.num_heads //= ranks  # type: ignore[union-attr,operator]
    parallelize_module(plain, init_device_mesh("cpu", (ranks,)), plan)  # type: ignore[arg-type]
    return plain


def differ_a_little(prompt: str, new_tokens: int) -> dict:
    """The work of one rank, where rank 1's arithmetic is off: its last hidden states, its scores, its story."""
    model = create_rank_model(device="cpu", dtype="float32")
    if dist.get_rank() == 1:
        model.norm.weight.mul_(1.001)
    ids = prompt_ids(create_tokenizer(), prompt)
    streams: list[Tensor] = []
    scores = model(ids, on_layer=lambda depth, hidden: streams.append(hidden))
    return {"hidden": model.norm(streams[-1]), "scores": scores, "story": write(model, prompt, new_tokens)}


def time_all_reduces(sizes: Sequence[int], times: int = 9) -> list[float]:
    """The work of one rank: the seconds of an all-reduce of each size in bytes, the quickest of `times`.

    The quickest, since other programs can only make one slower.
    """
    quickest = []
    for size in sizes:
        numbers, seconds = torch.ones(size // torch.float32.itemsize), []
        for _ in range(times):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(numbers)
            seconds.append(time.perf_counter() - started)
        quickest.append(min(seconds))
    return quickest


def leave_early() -> None:
    """The work of two ranks, of which rank 1 exits silently."""
    if dist.get_rank() == 1:
        os._exit(1)
    dist.barrier()
