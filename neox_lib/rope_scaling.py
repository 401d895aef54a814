"""Rotary frequencies of models extended to longer texts: some pairs of dimensions turn more slowly.

- linear: all pairs, by the same factor (Chen et al. 2023, https://arxiv.org/abs/2306.15595).
- yarn: pairs that turn less than `beta_slow` times within the original context are slowed by the factor, those that
  turn more than `beta_fast` times are not, and those between are blended. Scores grow a little too, since cos and sin
  are multiplied by `attention_factor` (Peng et al. 2023, https://arxiv.org/abs/2309.00071).
- dynamic: none within the model's context, and this library goes no further. Beyond it the frequencies depend on the
  length of the text, so the keys in a cache would have been turned by outdated ones.

The numbers are those of `transformers` (`modeling_rope_utils.py`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROPE_TYPES = ("linear", "dynamic", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How a model's rotary frequencies differ from the plain ones, with the names of a Hugging Face `config.json`.

    All but `rope_type` and `factor` belong to yarn, which needs `original_max_position_embeddings`, in tokens; an
    `attention_factor` of None is the paper's. Raises ValueError, naming the field, for a value out of range.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32
    beta_slow: float = 1
    truncate: bool = True

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_scaling of type {self.rope_type!r} can't be run, only {', '.join(ROPE_TYPES)}")
        numbers = {"factor": self.factor, "beta_fast": self.beta_fast, "beta_slow": self.beta_slow}
        numbers["attention_factor"] = 1 if self.attention_factor is None else self.attention_factor
        for name, value in numbers.items():
            if type(value) not in (int, float) or not 1e-18 < value < 1e18:
                raise ValueError(f"rope_scaling: {name} must be a positive number, from 1e-18 to 1e18, got {value!r}")
        length = self.original_max_position_embeddings
        if self.rope_type == "yarn" and (type(length) is not int or not 1 <= length < 1e18):
            raise ValueError(
                f"rope_scaling: original_max_position_embeddings must be a positive whole number, got {length!r}"
            )
        if type(self.truncate) is not bool:
            raise ValueError(f"rope_scaling: truncate must be true or false, got {self.truncate!r}")

    def inverse_frequencies(self, rotary_ndims: int, base: float) -> Tensor:
        """How far each pair turns, in radians per position: `[rotary_ndims / 2]`, fp32."""
        plain = 1 / base ** (torch.arange(0, rotary_ndims, 2, dtype=torch.float32) / rotary_ndims)
        if self.rope_type == "dynamic":
            return plain
        if self.rope_type == "linear":
            return plain / self.factor
        first, last = (self.pair_that_turns(times, rotary_ndims, base) for times in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotary_ndims - 1)
        width = last - first or 0.001
        slowed = ((torch.arange(rotary_ndims // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
        return plain / self.factor * slowed + plain * (1 - slowed)

    def pair_that_turns(self, times: float, rotary_ndims: int, base: float) -> float:
        """The index, with a fraction, of the pair that turns so many times within the original context."""
        assert self.original_max_position_embeddings is not None
        turn = self.original_max_position_embeddings / (times * 2 * math.pi)
        return rotary_ndims * math.log(turn) / (2 * math.log(base))

    def size(self) -> float:
        """What cos and sin are multiplied by."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return yarn_attention_factor(self.factor)

    def table(self, length: int, rotary_ndims: int, base: float, device: torch.device, dtype: torch.dtype):
        """cos and sin of the first `length` positions, each `[length, rotary_ndims]`, in place of `rotary_table`'s."""
        frequencies = self.inverse_frequencies(rotary_ndims, base).to(device)
        angles = torch.outer(torch.arange(length, device=device).float(), frequencies).repeat(1, 2)
        return (angles.cos() * self.size()).to(dtype), (angles.sin() * self.size()).to(dtype)


def yarn_attention_factor(factor: float, mscale: float = 1) -> float:
    """The paper's factor on cos and sin (equation 22); `mscale`, which some models set, scales its growth."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1
