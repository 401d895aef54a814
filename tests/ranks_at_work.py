"""What the ranks of test_parallel.py do: functions of a module, which a new process can import."""

import os
import re
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from neox_lib.cache import KVCache
from neox_lib.checkpoints.slim import reader
from neox_lib.course.peak_memory import hand_back_free_memory, own_bytes
from neox_lib.distributed.loading import create_rank_model
from neox_lib.generation import stream_generate
from neox_lib.model import NeoXModel
from neox_lib.sampling import GREEDY, Sampling

PROMPT = [[5, 9, 2, 11, 7, 30, 4]]
WARM = Sampling(temperature=1.3, top_p=0.95, seed=3)


def write(model: NeoXModel, sampling: Sampling, use_cache: bool = True, stop: tuple[int, ...] = ()) -> list[int]:
    """Token ids of up to 24 steps after PROMPT."""
    ids = torch.tensor(PROMPT)
    steps = stream_generate(model, ids, 24, sampling=sampling, stop_token_ids=stop, use_cache=use_cache)
    return [step.token_id for step in steps]


def texts(model: NeoXModel) -> dict[str, list[int]]:
    """What a model writes in every way that matters: greedy, drawn, without a cache, and up to a stop token."""
    greedy = write(model, GREEDY)
    return {
        "greedy": greedy,
        "drawn": write(model, WARM),
        "no cache": write(model, GREEDY, use_cache=False),
        "stopped": write(model, GREEDY, stop=(greedy[5],)),
        "padded": [step.token_ids[1] for step in stream_generate(model, [*PROMPT, [4, 8]], 8, stop_token_ids=())],
    }


def collectives(model: NeoXModel, ids: torch.Tensor, cache: KVCache | None = None) -> dict[str, int]:
    """How many of each kind of exchange one pass makes."""
    with CommDebugMode() as seen:
        model(ids, cache)
    return {str(kind).split(".")[-1]: count for kind, count in seen.get_comm_counts().items()}


@torch.inference_mode()
def examine(folder: Path, ids: torch.Tensor, device: str = "cpu") -> dict:
    """All that one rank tells of a checkpoint's model."""
    model = create_rank_model(folder, device=device, dtype="float32")
    weight = model.norm.weight
    ids = ids.to(weight.device)
    cache = KVCache(model.config, len(ids), ids.shape[1], weight.device, weight.dtype)
    in_passes = [model(chunk, cache) for chunk in ids.split([5, 1, 1, ids.shape[1] - 7], dim=1)]
    cache.truncate(ids.shape[1] - 1)
    return {
        "logits": model(ids).cpu(),
        "cached": torch.cat(in_passes, dim=1).cpu(),
        "cache shape": tuple(cache.keys.shape),
        "cache bytes counted": model.config.kv_cache_bytes(cache.capacity, weight.dtype),
        "parameter bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "prefill": collectives(model, ids),
        "decode": collectives(model, ids[:, -1:], cache),
        "texts": texts(model),
    }


@torch.inference_mode()
def disagree(folder: Path) -> dict:
    """Rank 1's arithmetic is off a little, as another processor's may be: what each rank scores and draws."""
    model = create_rank_model(folder, dtype="float32")
    if dist.get_rank() == 1:
        model.norm.weight.mul_(1.01)
    streams = []
    logits = model(torch.tensor(PROMPT), on_layer=lambda depth, hidden: streams.append(hidden))
    return {"hidden": model.norm(streams[-1]), "logits": logits} | texts(model)


def grow(folder: Path) -> int:
    """Private bytes that this process gains by loading its part."""
    create_rank_model(folder, dtype="float32")  # what torch needs once is here now
    hand_back_free_memory()
    before = own_bytes()
    model = create_rank_model(folder, dtype="float32")
    hand_back_free_memory()
    assert model is not None
    return own_bytes() - before


def pages_touched(folder: Path) -> dict[str, float]:
    """The share of each layer file's pages that this process has read while it loaded its part (Linux)."""
    opened, real = [], reader.open_layer

    def held_open(*arguments):
        layer = real(*arguments)
        opened.append(dict(layer))
        return layer

    reader.open_layer = held_open
    create_rank_model(folder, dtype="float32")
    text, shares = Path("/proc/self/smaps").read_text(), {}
    for name, size, resident in re.findall(r"(layer_\S+\.pt)\nSize: +(\d+) kB\n(?:.*\n)*?Rss: +(\d+) kB", text):
        shares[name] = max(shares.get(name, 0), int(resident) / int(size))
    return shares


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the fox is\nnot at home")
    dist.barrier()


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on_rank_0() -> None:
    """Rank 0 computes on and on while rank 1 dies."""
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
