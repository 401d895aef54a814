"""Tensor parallelism the other way: one tensor becomes the ranks' parts, which merge to exactly itself."""

import zlib

import torch
from torch import Tensor

from neox_lib.sharding import merge_rule, merge_shards, shard_shape


def spacing(values: Tensor) -> Tensor:
    """The distance from each number to the next larger one of its dtype, in fp64."""
    info = torch.finfo(values.dtype)
    exponent = torch.frexp(values.double()).exponent
    steps = torch.ldexp(torch.full_like(values, info.eps, dtype=torch.float64), exponent - 1)
    return steps.clamp(min=info.smallest_normal * info.eps)


def split_sum(total: Tensor, ranks: int, generator: torch.Generator | None) -> list[Tensor]:
    """Parts that add up to `total`, equal or at random.

    All but the last are whole steps of `total`'s own precision, and the last takes the remainder: so parts and partial
    sums are all exact. Halving alone is not: half of the smallest number is none.
    """
    shares = torch.full((ranks, *total.shape), 1.0, dtype=torch.float64)
    if generator is not None:
        shares.uniform_(generator=generator)
    shares /= shares.sum(dim=0)
    step = spacing(total)
    parts = [(total.double() * share / step).round() * step for share in shares[:-1]]
    return [*parts, total.double() - sum(parts)]


def split_average(mean: Tensor, ranks: int, generator: torch.Generator | None) -> list[Tensor]:
    """Parts whose mean is `mean`: all equal, or spread around it by about 5 % and the last one making up for it."""
    if generator is None:
        return [mean.double()] * ranks
    step = spacing(mean)
    noise = torch.randn((ranks - 1, *mean.shape), generator=generator, dtype=torch.float64)
    parts = [mean + (0.05 * mean.double().abs() * row / step).round() * step for row in noise]
    return [*parts, ranks * mean.double() - sum(parts)]


def split_tensor(key: str, tensor: Tensor, ranks: int, spread_seed: int | None = None) -> list[Tensor]:
    """The inverse of `merge_shards`, exact to the bit for finite numbers: one part for each rank, on the CPU.

    With `spread_seed` the ranks' row-parallel biases and norms differ at random, as a trained model's do. Where a
    number can't be spread exactly, the last rank takes all of a bias, and every rank takes the norm as it is. Raises
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
