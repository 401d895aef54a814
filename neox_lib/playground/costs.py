"""What writing costs: milliseconds per token by position, speed, memory, and what 20B would need for the text."""

from statistics import median

import torch

from neox_lib.config import NeoXConfig, format_bytes, neox_20b
from neox_lib.machines import MACHINES, format_seconds

POINTS = 120  # at most this many points per curve: a screen shows no more


class Costs:
    """Seconds per token by position, with and without the cache; a later run replaces an earlier one."""

    def __init__(self):
        self.seconds: dict[bool, dict[int, float]] = {True: {}, False: {}}

    def add(self, use_cache: bool, position: int, seconds: float) -> None:
        self.seconds[use_cache][position] = seconds

    def curve(self, use_cache: bool) -> list[list[float]]:
        """[position, milliseconds] pairs in order, thinned to POINTS by the median of neighbours."""
        points = sorted(self.seconds[use_cache].items())
        size = -(-len(points) // POINTS)
        groups = [points[start : start + size] for start in range(0, len(points), size or 1)]
        return [
            [median(position for position, _ in group), round(1e3 * median(value for _, value in group), 3)]
            for group in groups
        ]


def describe_model(name: str, config: NeoXConfig, dtype: torch.dtype) -> str:
    parameters = config.parameter_count()
    size = f"{parameters / 1e9:.3g} billion" if parameters >= 1e9 else f"{parameters / 1e6:.3g} million"
    return f"{name}: {size} parameters, {str(dtype).removeprefix('torch.')}"


def needs_of_20b(tokens: int) -> str:
    """What GPT-NeoX-20B needs for a text of `tokens` tokens, in fp16 as released: computed, not measured.

    Reading it takes two operations per weight and token (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361;
    attention adds 3 % at 2048 tokens), and takes at least as long as a new token, which reads every weight once (only
    one row of the input embedding), and the cache.
    """
    config, half = neox_20b(), torch.float16
    weights, cache = config.weight_bytes(half), config.kv_cache_bytes(tokens, half)
    operations = 2 * config.parameter_count() * tokens
    moved = weights - config.vocab_size * config.hidden_size * half.itemsize + cache
    lines = [
        f"20B in fp16, by arithmetic: {format_bytes(weights)} of weights.",
        f"This text of {tokens:,} token{'s' if tokens > 1 else ''}: {format_bytes(cache)} of KV cache, "
        f"{operations / 1e12:.3g} trillion operations to read it.",
        f"Each new token after it: {format_bytes(moved)} to move.",
    ]
    for name in ("laptop", "graphics card"):
        machine = MACHINES[name]
        token = moved / machine.memory
        reading = format_seconds(max(token, operations / machine.operations))
        lines.append(f"{name.capitalize()} ({machine}): {reading} to read it, {format_seconds(token)} per new token.")
    return "\n".join(lines)
