"""Tensor parallelism: how the ranks' parts of a tensor become one.

Built in notebook 05.
"""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from neox_lib.checkpoints.files import CheckpointError

# How each tensor lies on the ranks (gpt-neox, `tools/ckpts/merge20b.py`). A column-parallel layer gives each rank some
# of its outputs, so rows of the weight and of the bias. A row-parallel layer gives each rank some of its inputs, so
# columns of the weight; every rank adds its own bias before the ranks' results are summed. Every rank keeps all norms.
MERGE_RULES = {
    "word_embeddings.weight": "rows",
    "input_layernorm.weight": "average",
    "input_layernorm.bias": "average",
    "query_key_value.weight": "rows",
    "query_key_value.bias": "rows",
    "dense.weight": "columns",
    "dense.bias": "sum",
    "post_attention_layernorm.weight": "average",
    "post_attention_layernorm.bias": "average",
    "dense_h_to_4h.weight": "rows",
    "dense_h_to_4h.bias": "rows",
    "dense_4h_to_h.weight": "columns",
    "dense_4h_to_h.bias": "sum",
    "norm.weight": "average",
    "norm.bias": "average",
    "final_linear.weight": "rows",
}


def merge_rule(key: str) -> str:
    """The rule of a tensor, found by the last two parts of its key. Raises CheckpointError for a tensor without one."""
    ending = ".".join(key.split(".")[-2:])
    if ending not in MERGE_RULES:
        raise CheckpointError(f"{key}: not a tensor of GPT-NeoX; expected one of {', '.join(MERGE_RULES)}")
    return MERGE_RULES[ending]


def join_rows(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=0)


def join_columns(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=1)


def add_up(parts: list[Tensor]) -> Tensor:
    """The sum, in fp32."""
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total += part
    return total


def average(parts: list[Tensor]) -> Tensor:
    """The mean, in fp32: the first part minus its mean distance from the others.

    So the mean of equal parts is exact; (x + x + x) / 3 can differ from x by a rounding.
    """
    first, *others = [part.float() for part in parts]
    return first - sum(first - other for other in others) / len(parts)


MERGE: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "rows": join_rows,
    "columns": join_columns,
    "sum": add_up,
    "average": average,
}


def merge_shards(key: str, parts: list[Tensor]) -> Tensor:
    """One tensor from the ranks' parts, in its own memory: joined in their dtype, summed or averaged in fp32.

    Nothing is rounded to fp16 here: a sum of fp16 numbers need not be one, and a caller can cast the result once.
    Heads stay whole: the rows of `query_key_value` are interleaved head by head, and a rank holds some of the heads.
    Averaging the norms is an approximation, the one that the model's authors chose (`merge20b.py`).
    """
    return MERGE[merge_rule(key)](parts)


def merge_as_stored(key: str, parts: list[Tensor]) -> Tensor:
    """`merge_shards` for writing files: cast back to the parts' dtype, unless that would round."""
    merged = merge_shards(key, parts)
    stored = merged.to(parts[0].dtype)
    return stored if stored is merged or torch.equal(stored.float(), merged) else merged


def shard_shape(key: str, shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """The shape of one rank's part. Raises CheckpointError when the ranks don't divide it."""
    rule = merge_rule(key)
    if rule not in ("rows", "columns"):
        return shape
    dim = 0 if rule == "rows" else 1
    if shape[dim] % ranks:
        raise CheckpointError(f"{key}: {shape[dim]} {rule} do not divide into {ranks} ranks")
    return (*shape[:dim], shape[dim] // ranks, *shape[dim + 1 :])


def spacing(values: Tensor) -> Tensor:
    """The distance from each number to the next larger one of its dtype, in fp64."""
    info = torch.finfo(values.dtype)
    exponent = torch.frexp(values.double()).exponent
    steps = torch.ldexp(torch.full_like(values, info.eps, dtype=torch.float64), exponent - 1)
    return steps.clamp(min=info.smallest_normal * info.eps)


def split_sum(total: Tensor, ranks: int, generator: torch.Generator | None) -> list[Tensor]:
    """Parts that add up to `total`, equal or at random.

    All but the last are multiples of `total`'s `spacing`, and the last takes the remainder, so parts and partial sums
    are exact. Halving is not: half of the smallest number can't be represented.
    """
    shares = torch.full((ranks, *total.shape), 1.0, dtype=torch.float64)
    if generator is not None:
        shares.uniform_(generator=generator)
    shares /= shares.sum(dim=0)
    step = spacing(total)
    parts = [(total.double() * share / step).round() * step for share in shares[:-1]]
    return [*parts, total.double() - sum(parts)]


def split_average(mean: Tensor, ranks: int, generator: torch.Generator | None) -> list[Tensor]:
    """Parts whose mean is `mean`: all equal, or spread around it by about 5 %, with the last making up for it."""
    if generator is None:
        return [mean.double()] * ranks
    step = spacing(mean)
    noise = torch.randn((ranks - 1, *mean.shape), generator=generator, dtype=torch.float64)
    parts = [mean + (0.05 * mean.double().abs() * row / step).round() * step for row in noise]
    return [*parts, ranks * mean.double() - sum(parts)]


def split_tensor(key: str, tensor: Tensor, ranks: int, spread_seed: int | None = None) -> list[Tensor]:
    """The inverse of `merge_as_stored`, exact to the bit for finite numbers: one part for each rank, on the CPU.

    With `spread_seed` the ranks' row-parallel biases and norms differ at random, as a trained model's do. Where a
    number can't be spread exactly, the last rank takes all of a bias, and every rank the unchanged norm. Raises
    CheckpointError when the ranks don't divide the tensor.
    """
    rule, tensor = merge_rule(key), tensor.detach().cpu()
    part_shape = shard_shape(key, tuple(tensor.shape), ranks)
    if rule in ("rows", "columns"):
        dim = 0 if rule == "rows" else 1
        return list(tensor.split(part_shape[dim], dim=dim))
    generator = None
    if spread_seed is not None:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{spread_seed} {key}".encode()))
    wanted = torch.stack((split_sum if rule == "sum" else split_average)(tensor, ranks, generator))
    parts = wanted.to(tensor.dtype)
    nothing = torch.full_like(tensor, -0.0)  # x + -0.0 is x for every x, -0.0 too; -0.0 + 0.0 is not
    plain = [nothing] * (ranks - 1) + [tensor] if rule == "sum" else [tensor] * ranks
    exact = (parts.double() == wanted).all(dim=0) & (merge_shards(key, list(parts)) == tensor) & (tensor != 0)
    return list(torch.where(exact, parts, torch.stack(plain)))
