"""The memory calculator: what a model needs in each precision, whether that fits, and how fast to expect it.

A decode step reads every weight once and the cache, so a machine can at most do as many tokens a second as it can read
them in a second; a CPU comes to some 60 to 95 % of that (`python -m neox_lib bench` measures it).
"""

from dataclasses import dataclass

import torch

from neox_lib.checkpoints.quantized import int8_bytes
from neox_lib.config import NeoXConfig, neox_20b, pythia, tiny

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
SPARE = 500_000_000  # bytes for the activations, Python and torch


@dataclass(frozen=True)
class Need:
    """What a model needs in one precision, in bytes; `read` are the weights that each new token reads."""

    precision: str
    weights: int
    cache: int
    read: int

    def fits(self, free: int) -> bool:
        return self.weights + self.cache + SPARE <= free

    def longest(self, free: int, tokens: int) -> int:
        """How many of `tokens`, whose keys and values `cache` is, fit beside the weights."""
        return max(0, min(tokens, (free - SPARE - self.weights) * tokens // self.cache))

    def tokens_per_second(self, bandwidth: float, share: float = 1.0) -> float:
        """At most, behind that share of the text, for memory that is read at `bandwidth` bytes a second."""
        return bandwidth / (self.read + share * self.cache)


def preset(name: str) -> NeoXConfig:
    """ "neox_20b", "tiny" (the shipped model's) or a Pythia such as "1.4b". Raises ValueError for another name."""
    known = {"neox_20b": neox_20b, "20b": neox_20b, "tiny": tiny}
    return known[name]() if name in known else pythia(name.removeprefix("pythia-"))


def needs(config: NeoXConfig, tokens: int, half: torch.dtype = torch.float16) -> list[Need]:
    """A row for each precision: bytes with a text of `tokens`, as this library holds it on a CPU, cache in fp32.

    `half` is the 16-bit dtype of the embedding beside int8. Of the input embedding a token reads one row. A tied output
    matrix is the embedding, and all of it is read.
    """
    cache, rows = config.kv_cache_bytes(tokens, torch.float32), []
    for name, dtype in PRECISIONS.items():
        weights = int8_bytes(config, half) if dtype == torch.int8 else config.weight_bytes(dtype)
        looked_up = half if dtype == torch.int8 else dtype
        embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * looked_up.itemsize
        rows.append(Need(name, weights, cache, weights - embedding))
    return rows


def gib(count: float) -> str:
    """
    >>> gib(41109135360), gib(7045632)
    ('38.29 GiB', '6.7 MiB')
    """
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"


def format_needs(config: NeoXConfig, tokens: int, free: int, bandwidth: float) -> str:
    """The calculator as a table."""
    cache = f"cache of {tokens} tokens"
    lines = [f"{'precision':<10} {'weights':>10} {cache:>21}   {'fits':<20} {'tokens/s at most':>17}"]
    for need in needs(config, tokens):
        longest = need.longest(free, tokens)
        fits = "yes" if longest == tokens else f"up to {longest} tokens" if longest else "no"
        speed = f"{need.tokens_per_second(bandwidth, longest / tokens):.3g}" if longest else "-"
        lines.append(f"{need.precision:<10} {gib(need.weights):>10} {gib(need.cache):>21}   {fits:<20} {speed:>17}")
    lines.append(f"{gib(free)} of memory are free here, read at {bandwidth / 1e9:.0f} GB/s")
    return "\n".join(lines)
