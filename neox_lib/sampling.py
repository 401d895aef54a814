"""How the next token is chosen from its scores."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def top_k_mask(order: Tensor, k: int) -> Tensor:
    """True for the k likeliest tokens: token ids `[B, V]` from the likeliest down -> `[B, V]`, in vocabulary order.

    >>> top_k_mask(torch.tensor([[2, 0, 1]]), k=2)
    tensor([[ True, False,  True]])
    """
    kept = torch.zeros_like(order, dtype=torch.bool)
    return kept.scatter(-1, order[:, :k], True)


def top_p_mask(probabilities: Tensor, order: Tensor, p: float) -> Tensor:
    """True for the fewest likeliest tokens whose probabilities reach p: `[B, V]` -> `[B, V]`, in vocabulary order.

    `order` is as in `top_k_mask`. A token is kept when those before it fall short of p, so at least one is.

    >>> top_p_mask(torch.tensor([[0.25, 0.25, 0.5]]), torch.tensor([[2, 0, 1]]), p=0.6)
    tensor([[ True, False,  True]])
    """
    reached = probabilities.gather(-1, order).cumsum(dim=-1)
    before = F.pad(reached[:, :-1], (1, 0))  # the sum of all that are likelier; 0 for the likeliest
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before < p)


def renormalize(probabilities: Tensor, kept: Tensor) -> Tensor:
    """Set the tokens that are not `kept` to 0, and scale each row to sum to 1 again: `[B, V]`."""
    probabilities = probabilities.where(kept, 0)
    return probabilities / probabilities.sum(dim=-1, keepdim=True)


def check_scores(scores: Tensor, row: str = "row") -> None:
    """Raise ValueError, with the number of the `row`, where the highest of the scores `[B, N]` is NaN or infinite.

    Such scores can't choose a token. A score of minus infinity rules its token out, as long as another is finite.
    """
    usable = scores.amax(dim=-1).isfinite()
    if not usable.all():
        raise ValueError(
            f"the scores of {row} {usable.tolist().index(False)} are NaN or infinite: a number left the range of its "
            "precision, or the weights are damaged; try dtype float32, else fetch the weights again"
        )


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else drawn with `seed`.

    `top_k` keeps the k likeliest; `top_p` the fewest whose probabilities reach p (Holtzman et al. 2019,
    https://arxiv.org/abs/1904.09751), among those that `top_k` keeps. Raises ValueError, naming the setting, for
    one out of range.
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
        """What the next token is drawn from: logits `[B, V]` -> `[B, V]`, float64 on the CPU, rows sum to 1.

        Raises ValueError as `check_scores` does.
        """
        check_scores(logits)
        logits = logits.cpu().double()  # so a temperature that would be 0 in fp32 still divides
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1)
        probabilities = ((logits - logits.amax(dim=-1, keepdim=True)) / self.temperature).softmax(dim=-1)
        k, p = self.top_k or logits.shape[-1], self.top_p or 1.0
        if k >= logits.shape[-1] and p == 1:
            return probabilities  # sorting would take longer than all the rest
        order = probabilities.argsort(dim=-1, descending=True, stable=True)  # the lower id first among equals
        if k < logits.shape[-1]:
            probabilities = renormalize(probabilities, top_k_mask(order, k))
        if p < 1:
            probabilities = renormalize(probabilities, top_p_mask(probabilities, order, p))
        return probabilities

    def choose(self, logits: Tensor, *generators: torch.Generator) -> Tensor:
        """Logits `[B, V]` -> token ids `[B]`. Draws on the CPU, so that a seed means the same on every device.

        The B random numbers come from one generator, or from one per row, which then draws as it would alone.
        Laid end to end, the probabilities cover the line from 0 to 1; the token under a random point of it is drawn.
        Raises ValueError as `check_scores` does.
        """
        if self.temperature == 0:
            check_scores(logits)
            return logits.argmax(dim=-1)
        ends = self.probabilities(logits).cumsum(dim=-1)
        shape = (len(ends) // len(generators), 1)
        points = torch.cat([torch.rand(*shape, dtype=ends.dtype, generator=generator) for generator in generators])
        return torch.searchsorted(ends, points * ends[:, -1:], right=True)[:, 0].to(logits.device)


GREEDY = Sampling()
