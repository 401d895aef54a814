"""How the next token is chosen from its scores."""

from dataclasses import dataclass

import torch
from torch import Tensor


def keep_likeliest(probabilities: Tensor, count: Tensor | int) -> Tensor:
    """Zero all but the `count` likeliest of each row and share out anew what they leave: `[B, V]` -> `[B, V]`.

    `count` is one number or `[B, 1]`, at least 1. Of equals the lower id stays, as in argmax.

    >>> keep_likeliest(torch.tensor([[0.25, 0.25, 0.5]]), 2)
    tensor([[0.3333, 0.0000, 0.6667]])
    """
    count = torch.as_tensor(count, device=probabilities.device).expand(len(probabilities), 1)
    likeliest = probabilities.topk(int(count.max())).values
    lowest = likeliest.gather(-1, count - 1)
    above, equal = probabilities > lowest, probabilities == lowest
    kept = above | equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True))
    probabilities = probabilities.where(kept, 0)
    return probabilities / probabilities.sum(-1, keepdim=True)


def fewest_reaching(probabilities: Tensor, total: float) -> Tensor:
    """How many of the likeliest it takes to reach `total`: `[B, V]` -> `[B, 1]`.

    >>> fewest_reaching(torch.tensor([[0.25, 0.5, 0.25]]), 0.6)
    tensor([[2]])
    """
    ordered = probabilities.topk(min(1024, probabilities.shape[-1])).values  # sorting 50,000 takes 40 times longer
    if ordered.sum(-1).min() < total:
        ordered = probabilities.sort(descending=True).values
    reached_before = ordered.cumsum(-1).roll(1, dims=-1)
    reached_before[:, 0] = 0
    return (reached_before < total).sum(-1, keepdim=True)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else drawn with `seed`.

    `top_k` keeps the k likeliest; `top_p` the fewest whose probabilities reach p (Holtzman et al. 2019,
    https://arxiv.org/abs/1904.09751), of those that `top_k` left. Raises ValueError naming a setting that makes no
    sense.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"top_k must be a whole number of at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0 to 2^63 - 1, got {self.seed}")

    def probabilities(self, logits: Tensor) -> Tensor:
        """What the next token is drawn from: logits `[B, V]` -> `[B, V]`, float64 on the CPU, rows sum to 1."""
        logits = logits.cpu().double()  # so small a temperature that it is 0 in fp32 still divides
        if self.temperature == 0:
            return keep_likeliest(logits.softmax(dim=-1), 1)
        probabilities = ((logits - logits.amax(dim=-1, keepdim=True)) / self.temperature).softmax(dim=-1)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            probabilities = keep_likeliest(probabilities, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            probabilities = keep_likeliest(probabilities, fewest_reaching(probabilities, self.top_p))
        return probabilities

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Logits `[B, V]` -> token ids `[B]`. Draws on the CPU, so that a seed means the same on every device.

        Laid end to end, the probabilities cover the line from 0 to 1; the token under a random point of it is drawn.
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        ends = self.probabilities(logits).cumsum(dim=-1)
        points = torch.rand(len(ends), 1, dtype=ends.dtype, generator=generator) * ends[:, -1:]
        return torch.searchsorted(ends, points, right=True)[:, 0].to(logits.device)


GREEDY = Sampling()
