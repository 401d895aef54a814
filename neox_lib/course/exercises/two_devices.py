"""The exercises of notebook 09: a pair of matrices and a block on several devices, an embedding, and the bytes sent."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox_lib.config import NeoXConfig, neox_20b, pythia
from neox_lib.course.checks import (
    PropertyFailed,
    describe,
    exercise,
    given,
    require,
    require_count,
    require_equal,
    require_same_story,
    story,
)
from neox_lib.course.figures.plots import seeded
from neox_lib.course.two_devices import CPU, BlockOnDevices, Wire, model_on_devices, shipped_parts, write
from neox_lib.distributed.loading import build_rank
from neox_lib.model import NeoXModel
from neox_lib.rotary import rotary_table

PROMPT = "Once upon a time, two friends"  # no other notebook's
SMALL = NeoXConfig(
    vocab_size=40,
    tokenizer_vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
)


class RecordingCache:
    """A cache that records which layer updates it, with how many heads, and keeps nothing else."""

    def __init__(self):
        self.updates: list[tuple[int, int]] = []  # layer, heads

    def update(self, layer_index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.updates.append((layer_index, key.shape[1]))
        return key, value


class StrictWire(Wire):
    """A wire whose all_reduce takes one tensor from each device, and raises PropertyFailed for anything else."""

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks = ranks

    def all_reduce(self, partials: Sequence[Tensor]) -> Tensor:
        a_list = isinstance(partials, list | tuple)
        given = f"{len(partials)} tensors" if a_list else describe(partials)
        right = a_list and len(partials) == self.ranks
        require(
            right, f"all_reduce should get a list with one tensor from each of {self.ranks} devices, but got {given}"
        )
        return super().all_reduce(partials)


@torch.no_grad()
def random_blocks(ranks: int) -> tuple[nn.Module, list[nn.Module]]:
    """The last block of a small random model: whole, and its part on each device."""
    model = NeoXModel(SMALL)
    for number, parameter in enumerate(model.parameters()):
        parameter.copy_(0.3 * seeded(*parameter.shape, seed=number))
    stored = [(name, [parameter.detach()]) for name, parameter in model.named_parameters()]
    parts = [build_rank(SMALL, stored, rank, ranks, CPU, lambda name: torch.float32) for rank in range(ranks)]
    return model.layers[1], [part.layers[1] for part in parts]


def possible_sums(blocks: list[nn.Module], x: Tensor, table: tuple[Tensor, Tensor]) -> dict:
    """The output of a block whose parts are put together in each of the usual wrong ways: what is wrong -> output."""
    attended = [block.attention(block.input_layernorm(x), *table) for block in blocks]  # type: ignore[operator]
    mlps = [block.mlp(block.post_attention_layernorm(x)) for block in blocks]  # type: ignore[operator]
    partials = [first + second for first, second in zip(attended, mlps, strict=True)]
    whole_attention, ranks = sum(attended), len(blocks)
    late = [block.mlp(block.post_attention_layernorm(x + whole_attention)) for block in blocks]  # type: ignore[operator]
    early = [
        block.mlp(block.post_attention_layernorm(x + own))  # type: ignore[operator]
        for block, own in zip(blocks, attended, strict=True)
    ]
    one_norm = [block.mlp(block.input_layernorm(x)) for block in blocks]  # type: ignore[operator]
    return {
        f"x is added on each device, {ranks} times in all: add it once, after the all-reduce": ranks * x
        + sum(partials),
        "x itself is missing: the block adds the sum to it": sum(partials),
        "the partial sums are averaged: add them up": x + sum(partials) / ranks,
        "only device 0's partial sum is added to x": x + partials[0],
        "the MLP's output is missing from the sum": x + whole_attention,
        "attention's output is missing from the sum": x + sum(mlps),
        "the residual is sequential: the MLP reads x plus attention's output, but should read x": x
        + whole_attention
        + sum(late),
        "each MLP reads x plus its own device's part of attention, but should read x": x + whole_attention + sum(early),
        "the branches share one norm: the MLP should read through post_attention_layernorm": x
        + whole_attention
        + sum(one_norm),
    }


def wrong_parts(x: Tensor, widen: Tensor, narrow: Tensor) -> dict[str, list[Tensor]]:
    """An MLP cut for `len(x)` devices in the usual wrong ways: what is wrong -> each device's part."""
    inner, devices = widen @ x, len(x)
    cuts = [slice(start, start + len(inner) // devices) for start in range(0, len(inner), len(inner) // devices)]
    strides = [slice(device, None, devices) for device in range(devices)]
    return {
        "ReLU is missing: it belongs between the two matrices": [narrow[:, cut] @ inner[cut] for cut in cuts],
        "ReLU comes after the second matrix, but belongs between the two": [
            (narrow[:, cut] @ inner[cut]).relu() for cut in cuts
        ],
        "each device computes the whole MLP, so the sum counts it once for each": [narrow @ inner.relu()] * devices,
        "the first matrix is cut by its inputs: give each device some of widen's rows, and all of x": [
            narrow @ (widen[:, device] * x[device]).relu() for device in range(devices)
        ],
        "device 0 should have the first rows, device 1 the next ones, and so on": [
            narrow[:, cut] @ inner[cut].relu() for cut in strides
        ],
    }


@exercise("two_devices.split_mlp")
def split_mlp(yours: Callable[[Tensor, Tensor, Tensor, int], Sequence[Tensor]]) -> str:
    """`yours(x, widen, narrow, devices)` gives each device's part of `narrow @ (widen @ x).relu()`."""
    by_hand = torch.tensor([3.0, 1.0]), torch.tensor([[1.0, 1.0], [2.0, -1.0]]), torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    random = seeded(3, seed=1), seeded(12, 3, seed=2), seeded(3, 12, seed=3)
    for name, case in {"the two matrices above": by_hand, "random matrices [12, 3] and [3, 12]": random}.items():
        x, widen, narrow = case
        devices, size = len(x), len(widen) // len(x)
        what = f"my_split_mlp on {name}, devices={devices}"
        with given(what):
            found = yours(x, widen, narrow, devices)
        a_list = isinstance(found, list | tuple)
        told = f"{what} should return a list with one part for each of {devices} devices, but returned"
        require(a_list and len(found) == devices, f"{told} {f'{len(found)} parts' if a_list else describe(found)}")
        for device, part in enumerate(found):
            own = slice(device * size, (device + 1) * size)
            expected, why = narrow[:, own] @ (widen[own] @ x).relu(), ""
            if isinstance(part, Tensor) and part.shape == expected.shape and not torch.allclose(part, expected):
                parts = wrong_parts(x, widen, narrow)
                why = next((why for why, wrong in parts.items() if torch.allclose(part, wrong[device])), "")
            require_equal(part, expected, f"device {device}'s part in {what}", tolerance=1e-5, why=why)
    return "Whatever the number of devices, the parts add up to the whole MLP, with one sum at the end."


@exercise("two_devices.block")
@torch.no_grad()
def block(yours: BlockOnDevices) -> str:
    """`yours(hidden, blocks, cos, sin, caches, all_reduce)` is the output of a block that the devices share."""
    for ranks in (2, 4):
        whole, blocks = random_blocks(ranks)
        x, wire, caches = seeded(2, 5, SMALL.hidden_size), StrictWire(ranks), [RecordingCache() for _ in range(ranks)]
        table = rotary_table(5, SMALL.rotary_ndims, SMALL.rotary_emb_base, CPU, torch.float32)
        before, what = x.clone(), f"my_block on {ranks} devices and a [2, 5, 32] input"
        with given(what):
            found = yours(x, blocks, *table, caches, wire.all_reduce)
        expected = whole(x, *table)
        require(torch.equal(x, before), f"{what} changes its input: write hidden + ..., not hidden += ...")
        if isinstance(found, Tensor) and found.shape == expected.shape:
            for mistake, output in possible_sums(blocks, x, table).items():
                require(
                    (found - output).abs().max().item() > 1e-4, f"The output of {what} has the wrong values: {mistake}"
                )
        require_equal(found, expected, f"the output of {what}", tolerance=1e-4)
        updates, right = [cache.updates for cache in caches], [[(1, 4 // ranks)]] * ranks
        told = f"{what} should update the devices' caches with (layer, heads) {right}, but updates them with {updates}"
        require(updates == right, f"{told}: give each device's attention its own cache")
        told = f"{what} gives the right values, but never calls all_reduce"
        require(wire.all_reduces > 0, f"{told}: a device can read another's partial sum only through it")
        told = f"{what} gives the right values, but calls all_reduce {wire.all_reduces} times where once is enough"
        require(wire.all_reduces == 1, f"{told}: first add attention's and the MLP's part on each device")
    expected, wire = story(PROMPT), Wire()
    written = write(model_on_devices(shipped_parts(2), yours, wire), PROMPT, 40)
    require_same_story(written, expected, "on two devices with your block")
    return (
        f"The shipped model wrote this on two devices, with your block and {wire.all_reduces} all-reduces:\n{written}"
    )


@exercise("two_devices.embed")
def embed(yours: Callable[[Tensor, Tensor, int], Tensor]) -> str:
    """`yours(input_ids, rows, first)` gives the vectors of tokens whose rows are on this device, zeros for others."""
    table, ids = torch.tensor([[1.0, 1.5], [2.0, 2.5], [3.0, 3.5], [4.0, 4.5]]), torch.tensor([[2, 0, 3]])
    for first, expected in (
        (0, torch.tensor([[[0.0, 0.0], [1.0, 1.5], [0.0, 0.0]]])),
        (2, torch.tensor([[[3.0, 3.5], [0.0, 0.0], [4.0, 4.5]]])),
    ):
        rows, mine = table[first : first + 2].clone(), ids.clone()
        what = f"my_embed([[2, 0, 3]], rows {first} and {first + 1} of four, first={first})"
        try:
            with given(what):
                found = yours(mine, rows, first)
        except IndexError as error:
            message = "a token whose row is elsewhere must not be looked up here: look up any row, then set it to zeros"
            raise PropertyFailed(f"{what} raised IndexError ({error}): {message}") from None
        if first == 2 and isinstance(found, Tensor) and found.shape == expected.shape:
            wrapped = torch.equal(found[0, 1], rows[0])
            told = f"{what} should give token 0 zeros, but gives it row -2, counted from the end"
            require(not wrapped, f"{told}: test for ids below `first` too")
        require_equal(found, expected, what)
        require(torch.equal(mine, ids), f"{what} changes the ids that it was given: work on a copy")
        require(
            torch.equal(rows, table[first : first + 2]), f"{what} changes the rows that it was given: work on a copy"
        )
    large, many = seeded(12, 4), torch.randint(12, (2, 7), generator=torch.Generator().manual_seed(0))
    what = "my_embed, summed over three devices of four rows each,"
    with given(what):
        total = sum(yours(many, large[first : first + 4], first) for first in (0, 4, 8))
    require_equal(total, F.embedding(many, large), what, tolerance=1e-6)
    return "Each token's vector comes from one device, and the sum is the embedding."


def bytes_on_the_wire(config: NeoXConfig, tokens: int, ranks: int, dtype: torch.dtype) -> int:
    """Bytes that each rank sends in one pass over `tokens` tokens, of which only the last is scored."""
    all_reduces = 1 + config.num_hidden_layers * (1 if config.use_parallel_residual else 2)
    summed = all_reduces * 2 * (ranks - 1) * tokens * config.hidden_size // ranks
    scores = (ranks - 1) * config.vocab_size // ranks
    return (summed + scores) * dtype.itemsize


@exercise("two_devices.bytes_sent")
def bytes_sent(yours: Callable[[NeoXConfig, int, int, torch.dtype], int]) -> str:
    """`yours(config, tokens, ranks, dtype)` is the number of bytes that each rank sends in one pass."""
    sequential = NeoXConfig(use_parallel_residual=False)
    cases: list[tuple[str, NeoXConfig, int, int, torch.dtype]] = [
        ("neox_20b(), 1 token, 2 ranks, float16", neox_20b(), 1, 2, torch.float16),
        ("neox_20b(), 2048 tokens, 2 ranks, float16", neox_20b(), 2048, 2, torch.float16),
        ("neox_20b(), 1 token, 4 ranks, float16", neox_20b(), 1, 4, torch.float16),
        ('pythia("1.4b"), 10 tokens, 2 ranks, float32', pythia("1.4b"), 10, 2, torch.float32),
        ("20B with a sequential residual, 1 token, 2 ranks, float16", sequential, 1, 2, torch.float16),
        ("neox_20b(), 1 token, 1 rank, float16", neox_20b(), 1, 1, torch.float16),
    ]
    for arguments, config, tokens, ranks, dtype in cases:
        hidden, scores = tokens * config.hidden_size * dtype.itemsize, config.vocab_size // ranks * dtype.itemsize
        per_reduce = 2 * (ranks - 1) * hidden // ranks
        reasons = {
            -per_reduce: "the all-reduce of the embeddings left out",
            per_reduce: "one all-reduce more than there are",
            -(ranks - 1) * scores: "the scores left out",
            (ranks - 1) * scores: "the scores sent both ways, but each rank sends only its own",
            (tokens - 1) * (ranks - 1) * scores: "scores counted for every token, but only the last is scored",
        }
        if not config.use_parallel_residual:
            reasons[-config.num_hidden_layers * per_reduce] = "a sequential block needs two all-reduces"
        expected = bytes_on_the_wire(config, tokens, ranks, dtype)
        with given(f"my_bytes_sent({arguments})"):
            found = yours(config, tokens, ranks, dtype)
        require_count(found, expected, f"my_bytes_sent({arguments})", reasons)
    sent = bytes_on_the_wire(neox_20b(), 1, 2, torch.float16)
    return f"With 20B on two devices, each sends {sent:,} bytes per new token."
