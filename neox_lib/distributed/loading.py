"""One rank's part of a model, read from a checkpoint of any layout and any number of ranks."""

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neox_lib.checkpoints.build import WithoutInitialValues, empty_model, fill_model
from neox_lib.checkpoints.checkpoint import cast
from neox_lib.checkpoints.files import SHIPPED_MODEL, CheckpointError
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.checkpoints.slim.partition import merge_rule, shard_shape
from neox_lib.config import NeoXConfig
from neox_lib.distributed.ranks import rank_device
from neox_lib.distributed.tensor_parallel import SplitBlock, SplitEmbedding, SplitOutput, own_part, share_of
from neox_lib.hub import local_path
from neox_lib.model import NeoXModel
from neox_lib.precision import check_memory, choose_precision
from neox_lib.quantization.linear import QUANTIZED, dtype_name, use_cast_linear

logger = logging.getLogger(__name__)


def empty_rank_model(config: NeoXConfig, rank: int, ranks: int) -> NeoXModel:
    """One rank's model without weights: its blocks, its rows of both embeddings, and the shapes of its matrices.

    Raises CheckpointError as `share_of` does.
    """
    share = share_of(config, ranks)
    model = empty_model(share)
    with torch.device("meta"), WithoutInitialValues():
        model.layers = nn.ModuleList(SplitBlock(share, index) for index in range(share.num_hidden_layers))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = shard_shape(f"{name}.weight", tuple(module.weight.shape), ranks)
            if rank > 0 and module.bias is not None and merge_rule(f"{name}.bias") == "sum":
                module.bias = None  # type: ignore[assignment]  # added once to the sum of all ranks, by rank 0
    first = rank * share.vocab_size // ranks
    model.word_embeddings = SplitEmbedding(model.word_embeddings, first)  # type: ignore[assignment]
    model.final_linear = SplitOutput(model.final_linear)
    return model


def build_rank(
    config: NeoXConfig,
    stored: Iterable[tuple[str, list[Tensor]]],
    rank: int,
    ranks: int,
    device: torch.device,
    dtype_of: Callable[[str], torch.dtype],
) -> NeoXModel:
    """One rank's model, its parameters on `device` in `dtype_of(name)`. Of the `stored` parts, the other ranks'
    matrices are not read. Raises CheckpointError as `share_of` and `cast` do, and what `stored` raises.
    """
    model = empty_rank_model(config, rank, ranks)
    own = ((name, own_part(name, parts, rank, ranks)) for name, parts in stored)
    return fill_model(
        model, ((name, cast(name, part, device, dtype_of(name))) for name, part in own if part is not None)
    )


def create_rank_model(
    path: str | Path | None = None,
    use_cache: bool = True,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str = "main",
) -> NeoXModel:
    """`create_model` for the ranks of a process group: every rank calls it, and gets its own part of the model.

    On GPUs each rank uses the GPU with its number. If files must be downloaded, one rank per machine does it. Raises
    what `create_model` raises, and CheckpointError for int8 and int4, which run in one process.
    """
    source = SHIPPED_MODEL if path is None else path
    if os.environ["LOCAL_RANK"] == "0":
        local_path(source, revision)
    dist.barrier()
    rank, ranks, chosen_device = dist.get_rank(), dist.get_world_size(), rank_device(device)
    checkpoint = open_checkpoint(local_path(source, revision))
    precision = choose_precision(checkpoint, chosen_device, dtype)
    if precision.matrices in QUANTIZED.values():
        name = dtype_name(precision.matrices)
        raise CheckpointError(f"{checkpoint}: {name} weights run in one process; give weights in another dtype")
    together = 1 if chosen_device.type == "cuda" else int(os.environ["LOCAL_WORLD_SIZE"])  # ranks on the same machine
    check_memory(share_of(checkpoint.config, ranks // together), precision, chosen_device)
    if precision.notice:
        logger.info(precision.notice)
    model = build_rank(checkpoint.config, checkpoint.parts(), rank, ranks, chosen_device, precision.dtype_of)
    model.use_cache = use_cache
    return use_cast_linear(model) if chosen_device.type == "cpu" else model
