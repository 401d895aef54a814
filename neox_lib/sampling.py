"""How the next token is chosen from its scores."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else drawn with `seed`.

    `top_k` keeps the k likeliest; `top_p` the fewest whose probabilities reach p (Holtzman et al. 2019,
    https://arxiv.org/abs/1904.09751). Raises ValueError naming a setting that makes no sense.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def probabilities(self, logits: Tensor) -> Tensor:
        """What the next token is drawn from: logits `[B, V]` -> `[B, V]`, rows sum to 1."""
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            lowest_kept = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < lowest_kept, float("-inf"))
        probabilities = logits.softmax(dim=-1)
        if self.top_p is not None:
            ordered, order = probabilities.sort(descending=True)
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        return probabilities / probabilities.sum(dim=-1, keepdim=True)

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Logits `[B, V]` -> token ids `[B]`. Draws on the CPU, so that a seed means the same on every device."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        drawn = torch.multinomial(self.probabilities(logits).cpu(), 1, generator=generator)
        return drawn.squeeze(-1).to(logits.device)


GREEDY = Sampling()
