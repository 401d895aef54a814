"""One rank's part of a model, read from a checkpoint of any layout and any number of ranks."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neox_lib.checkpoints.checkpoint import open_weights
from neox_lib.checkpoints.files import SHIPPED_MODEL
from neox_lib.checkpoints.slim.layout import WithoutInitialValues, find_shards, is_slim, parameter_shapes, place_of
from neox_lib.checkpoints.slim.reader import check_tied, open_layer
from neox_lib.config import NeoXConfig
from neox_lib.decoding.linear import use_fast_linear
from neox_lib.distributed.ranks import rank_device
from neox_lib.distributed.tensor_parallel import SplitBlock, SplitEmbedding, SplitOutput, own_part, share_of
from neox_lib.hub.names import local_path
from neox_lib.loading import check_memory, choose_precision
from neox_lib.model import NeoXModel


def stored_parts(path: Path, config: NeoXConfig) -> Iterator[tuple[str, list[Tensor]]]:
    """Parameter names and their parts as the files hold them, memory-mapped where the format allows, a layer at a time.

    Raises CheckpointError, naming the file, for weights that are not the config's.
    """
    if not is_slim(path):
        yield from ((name, [tensor]) for name, tensor in open_weights(path).tensors())
        return
    shards, layers, shapes = find_shards(path), config.num_hidden_layers, parameter_shapes(config)
    if config.tie_word_embeddings:
        check_tied(shards, config)
    for index, group in groupby(shapes, key=lambda name: place_of(name, layers)[0]):
        names = {place_of(name, layers)[1]: name for name in group}
        for key, parts in open_layer(shards[index], {key: shapes[name] for key, name in names.items()}).items():
            yield names[key], parts


def build_rank(
    config: NeoXConfig,
    stored: Iterable[tuple[str, list[Tensor]]],
    rank: int,
    ranks: int,
    device: torch.device,
    dtype: Callable[[str], torch.dtype],
) -> NeoXModel:
    """One rank's model, its parameters on `device` in `dtype(name)`; of `stored`, the others' matrices are not read.

    Raises CheckpointError as `share_of` does, and what `stored` raises.
    """
    share = share_of(config, ranks)
    with torch.device("meta"), WithoutInitialValues():
        model = NeoXModel(share)
        model.layers = nn.ModuleList(SplitBlock(share, index) for index in range(share.num_hidden_layers))
    for name, parts in stored:
        part = own_part(name, parts, rank, ranks)
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if part is not None:
            part = nn.Parameter(part.to(device, dtype(name)), requires_grad=False)
            if isinstance(module, nn.Linear) and leaf == "weight":
                module.out_features, module.in_features = part.shape
        setattr(module, leaf, part)
    model.rotary.fill(device)
    if config.tie_word_embeddings:
        model.final_linear.weight = model.word_embeddings.weight
    first = rank * len(model.word_embeddings.weight)
    model.word_embeddings = SplitEmbedding(model.word_embeddings, first)  # type: ignore[assignment]
    model.final_linear = SplitOutput(model.final_linear)
    return model.eval()


def create_rank_model(
    path: str | Path | None = None,
    use_cache: bool = True,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> NeoXModel:
    """`create_model` for ranks that have met: every rank calls it, and gets its own part of the model.

    On GPUs each rank takes the one of its number. What has to be downloaded, one rank of each machine downloads. Raises
    what `create_model` raises, and CheckpointError for int8 weights, which run in one process.
    """
    if path is not None and os.environ["LOCAL_RANK"] == "0":
        local_path(path)
    dist.barrier()
    folder = SHIPPED_MODEL if path is None else local_path(path)
    rank, ranks, chosen_device = dist.get_rank(), dist.get_world_size(), rank_device(device)
    weights = open_weights(folder)
    precision = choose_precision(weights.config, weights.dtype, chosen_device, dtype)
    together = 1 if chosen_device.type == "cuda" else int(os.environ["LOCAL_WORLD_SIZE"])  # ranks that share a memory
    check_memory(share_of(weights.config, ranks // together), precision, chosen_device)
    if precision.matrices != precision.others:
        print(f"neox_lib: {precision.reason}", file=sys.stderr)
    stored = stored_parts(folder, weights.config)
    model = build_rank(weights.config, stored, rank, ranks, chosen_device, precision.dtype_of)
    model.use_cache = use_cache
    return use_fast_linear(model) if chosen_device.type == "cpu" else model
