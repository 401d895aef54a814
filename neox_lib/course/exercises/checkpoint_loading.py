"""The exercises of notebook 05: which file holds a parameter, how shards merge, how long a text fits into memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from neox_lib.checkpoints.slim import partition as sharding
from neox_lib.checkpoints.slim.layout import place_of as library_place_of
from neox_lib.config import NeoXConfig, neox_20b, pythia, tiny
from neox_lib.course.checks import PropertyFailed, describe, exercise, given, require, require_equal, story_with
from neox_lib.course.figures.plots import seeded

GIB = 2**30
PROMPT = "Once upon a time, a little bear"  # no other notebook's


@exercise("checkpoint_loading.place_of")
def place_of(yours: Callable[[str, int], tuple[int, str]]) -> str:
    """The file index and the key of parameters all over a short and a long model."""
    block = ("attention.dense.bias", "input_layernorm.weight", "mlp.dense_h_to_4h.weight")
    for layers in (6, 44):
        inside = [f"layers.{index}.{key}" for index in (0, 1, layers - 1) for key in block]
        for name in ["word_embeddings.weight", *inside, "norm.bias", "final_linear.weight"]:
            what = f"my_place_of({name!r}, {layers})"
            with given(what):
                found = yours(name, layers)
            require(
                isinstance(found, tuple) and len(found) == 2,
                f"{what} should be a pair, file index and key, but is {found!r}",
            )
            index, key = library_place_of(name, layers)
            require(found[0] == index, f"{what} should name file index {index}, but names {found[0]!r}")
            require(found[1] == key, f"{what} should name the key {key!r}, but names {found[1]!r}")
    return "Every parameter of a 6-layer and of a 44-layer model has its file."


def parts_for(key: str, ranks: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parts that differ from rank to rank: `[4, 6]` for a matrix, `[4]` for a vector."""
    shape = (4, 6) if key.endswith("weight") and "norm" not in key else (4,)
    return [seeded(*shape, seed=rank + 1).to(dtype) for rank in range(ranks)]


def expected_merge(rule: str, parts: list[Tensor]) -> Tensor:
    if rule in ("rows", "columns"):
        return torch.cat(parts, dim=0 if rule == "rows" else 1)
    total = torch.stack(parts).double().sum(dim=0)
    return total if rule == "sum" else total / len(parts)


@exercise("checkpoint_loading.merge_shards")
def merge_shards(yours: Callable[[str, list[Tensor]], Tensor]) -> str:
    """Each rule with two and three ranks, fp16 parts, an unknown key; then the shipped model loads with it."""
    keys = [f"attention.{key}" if key.startswith(("query", "dense.")) else key for key in sharding.MERGE_RULES]
    keys = [f"mlp.{key}" if key.startswith(("dense_h", "dense_4h")) else key for key in keys]
    for ranks in (2, 3):
        for key in keys:
            parts = parts_for(key, ranks)
            expected = expected_merge(sharding.merge_rule(key), parts)
            what = f"my_merge_shards({key!r}, {ranks} parts of shape {list(parts[0].shape)})"
            with given(what):
                found = yours(key, parts)
            require_equal(found, expected, what, tolerance=1e-5)
            same = all(torch.equal(now, then) for now, then in zip(parts, parts_for(key, ranks), strict=True))
            require(
                same, f"{what} should leave its parts as they are, but changed one of them: they belong to the file"
            )
    for key in ("attention.query_key_value.weight", "attention.dense.weight"):
        found = yours(key, parts_for(key, 2, torch.float16))
        what = f"my_merge_shards({key!r}, two fp16 parts)"
        require(found.dtype == torch.float16, f"{what} should stay in fp16, but is in {found.dtype}: twice the memory")
    for key, wanted in (("attention.dense.bias", 1 + 2**-11), ("norm.bias", (1 + 2**-11) / 2)):
        what = f"my_merge_shards({key!r}, two fp16 parts: 1 and 1/2048)"
        with given(what):
            found = yours(key, [torch.tensor([value], dtype=torch.float16) for value in (1.0, 2**-11)])
        why = f"{what} should be {wanted} in float32, but is {found.item()} in {found.dtype}: fp16 loses the small part"
        require(found.dtype == torch.float32 and found.item() == wanted, why)
    key = "attention.masked_bias"
    try:
        guessed = yours(key, parts_for(key, 2))
    except Exception:  # whatever the learner raises, NotImplementedError too: it has to refuse
        return story_with(sharding.merge_shards, yours, "merge_shards", PROMPT)
    told = f"my_merge_shards({key!r}, ...) should raise ValueError, but returned {describe(guessed)}"
    raise PropertyFailed(f"{told}: no rule covers that key, so don't guess")


@exercise("checkpoint_loading.longest_context")
def longest_context(yours: Callable[[NeoXConfig, torch.dtype, int, int], int]) -> str:
    """Three models, four sizes of memory: room for the whole context, for part of it, or not even for the weights."""
    margin, answers = 3 * GIB // 2, []
    for name, config in {"tiny": tiny(), "Pythia 12B": pythia("12b"), "20B": neox_20b()}.items():
        for dtype in (torch.float16, torch.int8):
            for memory in (8, 22, 24, 40):
                room = memory * GIB - margin - config.weight_bytes(dtype)
                fitting = room // config.kv_cache_bytes(1, torch.float16)
                expected = max(0, min(config.max_position_embeddings, fitting))
                what = f"my_longest_context of {name}, {dtype}, {memory} GiB, margin 1.5 GiB"
                with given(what):
                    found = yours(config, dtype, memory * GIB, margin)
                require(type(found) is int, f"{what} should be a whole number, but is {describe(found)}")
                require_equal(found, expected, what, why=reason(found, config, dtype, room))
                if name == "20B" and memory != 24:
                    answers.append(f"20B in {str(dtype).removeprefix('torch.')}, {memory} GiB: {found} tokens")
    return "\n".join(answers)


def reason(found: int, config: NeoXConfig, dtype: torch.dtype, room: int) -> str:
    """Why a length is wrong, where that can be told; else an empty string. `room` is what weights and margin leave."""
    limit, fitting = config.max_position_embeddings, room // config.kv_cache_bytes(1, torch.float16)
    if found < 0:
        return "where the weights alone don't fit, no token does"
    if found > limit:
        return f"the model's context ends at {limit}"
    if dtype != torch.float16 and found == max(0, min(limit, room // config.kv_cache_bytes(1, dtype))):
        return "the cache is in fp16, whatever the weights are in"
    return "each token keeps a key and a value in every layer" if fitting > 0 and found > fitting else ""
