"""A slim checkpoint of random weights of any size, to try out what real weights of that shape would need."""

import math
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from neox_lib.checkpoints.saving import whole_or_gone
from neox_lib.checkpoints.slim.reader import SlimCheckpoint
from neox_lib.checkpoints.slim.writer import write_tensors
from neox_lib.config import NeoXConfig, neox_20b, parameter_shapes, preset, tiny

SMALL = replace(tiny(), vocab_size=512, tokenizer_vocab_size=500, hidden_size=128, num_attention_heads=4)
SMALL = replace(SMALL, num_hidden_layers=3, intermediate_size=512)
MIDDLE = replace(neox_20b(), num_hidden_layers=2)  # 20B's own matrices, two layers of them
BLOCK_NUMBERS = 2**24 + 37  # drawn once and reused from different offsets; odd, so that no two rows are equal


def shape_named(name: str) -> NeoXConfig:
    """ "middle" (two layers of 20B), "small" (for tests), or a `preset`."""
    own = {"middle": MIDDLE, "small": SMALL}
    return own[name] if name in own else preset(name)


def random_tensors(config: NeoXConfig) -> Iterator[tuple[str, Tensor]]:
    """fp16 parameters in file order, one at a time: matrices of standard deviation 0.02, norms 1, biases 0.

    Drawing 20 billion numbers takes minutes, so one block is drawn, and each matrix repeats it from an offset of its
    own.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = parameter_shapes(config)
    size = min(BLOCK_NUMBERS, 37 + max(math.prod(shape) for shape in shapes.values()))
    block = torch.empty(size).normal_(std=0.02, generator=generator).half()
    for name, shape in shapes.items():
        if len(shape) == 1:
            yield name, torch.full(shape, float(name.endswith("norm.weight")), dtype=torch.float16)
            continue
        numbers = torch.empty(math.prod(shape), dtype=torch.float16)
        block = block.roll(zlib.crc32(name.encode()) % size)
        for part in numbers.split(size):
            part.copy_(block[: len(part)])
        yield name, numbers.view(shape)


def write_random(folder: str | Path, config: NeoXConfig) -> None:
    """Write a random checkpoint in the slim layout, of one rank, a layer at a time. Raises CheckpointError before
    writing anything, if the disk is too small or the folder already holds a model.
    """
    folder = Path(folder)
    with whole_or_gone(folder, config.weight_bytes(torch.float16)):
        write_tensors(folder, config, random_tensors(config), ranks=1, spread_seed=None)


class ConsumedCheckpoint(SlimCheckpoint):
    """A slim folder that can be read once: each file is deleted after its layer was read. An interruption loses the
    model.
    """

    def opened_layers(self) -> Iterator[tuple[dict[str, str], dict[str, list[Tensor]]]]:
        for (index, _, _), opened in zip(self.layers(), super().opened_layers(), strict=True):
            yield opened
            for path in self.shards.paths[index]:
                path.unlink()
        (self.folder / "config.json").unlink(missing_ok=True)
