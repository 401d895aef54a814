"""How the next token is chosen from its scores, and the strings at which a text stops."""

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


def min_p_mask(probabilities: Tensor, p: float) -> Tensor:
    """True for the tokens at least p times as likely as the likeliest (Nguyen et al. 2024,
    https://arxiv.org/abs/2407.01082): `[B, V]` -> `[B, V]`.

    >>> min_p_mask(torch.tensor([[0.25, 0.125, 0.625]]), p=0.25)
    tensor([[ True, False,  True]])
    """
    return probabilities >= p * probabilities.amax(dim=-1, keepdim=True)


def renormalize(probabilities: Tensor, kept: Tensor) -> Tensor:
    """Set the tokens that are not `kept` to 0, and scale each row to sum to 1 again: `[B, V]`."""
    probabilities = probabilities.where(kept, 0)
    return probabilities / probabilities.sum(dim=-1, keepdim=True)


def penalize_repetition(logits: Tensor, penalty: float, ids: Tensor, padding: Tensor | None = None) -> Tensor:
    """Make the tokens that stand in a text less likely: logits `[B, V]`, the texts' ids `[B, S]` -> logits `[B, V]`.

    A positive logit is divided by the penalty, a negative one multiplied (Keskar et al. 2019,
    https://arxiv.org/abs/1909.05858), once however often the token stands there. The first `padding` ids of a row,
    `[B]`, are no part of its text.

    >>> penalize_repetition(torch.tensor([[3.0, -1.0, 2.0]]), 2.0, torch.tensor([[2, 2, 1]]), torch.tensor([1]))
    tensor([[ 3., -2.,  1.]])
    """
    size = logits.shape[-1]
    ids = ids.clamp(max=size)  # ids past the logits, and padding, are marked in a column that is cut off
    if padding is not None:
        ids = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) < padding[:, None], size)
    seen = logits.new_zeros(len(logits), size + 1, dtype=torch.bool).scatter(-1, ids, True)[:, :size]
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


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
    """How a text goes on: the likeliest token at temperature 0, else one drawn with `seed`, up to a stop string.

    `repetition_penalty` changes the scores first: see `penalize_repetition`; 1 leaves them. `top_k` keeps the k
    likeliest; `top_p` the fewest whose probabilities reach p (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751),
    among those that `top_k` keeps; `min_p` those at least p times as likely as the likeliest. A text ends before the
    first of `stop_strings` that it writes: see `stop_at`. Raises ValueError, naming the setting, for one out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"top_k must be a whole number of at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 to 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be above 0 (1 changes nothing), got {self.repetition_penalty}")
        stops = (self.stop_strings,) if isinstance(self.stop_strings, str) else self.stop_strings
        if not isinstance(stops, list | tuple) or not all(isinstance(each, str) and each for each in stops):
            raise ValueError(f"stop_strings must be texts of at least one character, got {self.stop_strings!r}")
        object.__setattr__(self, "stop_strings", tuple(stops))
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0 to 2^63 - 1, got {self.seed}")

    def penalized(self, logits: Tensor, ids: Tensor | None, padding: Tensor | None) -> Tensor:
        """The logits `[B, V]` that are chosen from. Raises ValueError without the ids that a penalty needs, and as
        `check_scores` does.
        """
        if self.repetition_penalty != 1:
            if ids is None:
                raise ValueError(
                    f"repetition_penalty is {self.repetition_penalty}, which needs the ids so far; pass ids=..., [B, S]"
                )
            logits = penalize_repetition(logits, self.repetition_penalty, ids, padding)
        check_scores(logits)
        return logits

    def probabilities(self, logits: Tensor, ids: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        """What the next token is drawn from: logits `[B, V]` -> `[B, V]`, float64 on the CPU, rows sum to 1.

        `ids` `[B, S]` are the texts so far, which only a repetition penalty needs; the first `padding` of each row,
        `[B]`, don't count. Raises ValueError as `penalized` does.
        """
        logits = self.penalized(logits, ids, padding)
        logits = logits.cpu().double()  # so a temperature that would be 0 in fp32 still divides
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1)
        probabilities = ((logits - logits.amax(dim=-1, keepdim=True)) / self.temperature).softmax(dim=-1)
        k, p = self.top_k or logits.shape[-1], self.top_p or 1.0
        if k < logits.shape[-1] or p < 1:  # sorting would take longer than all the rest
            order = probabilities.argsort(dim=-1, descending=True, stable=True)  # the lower id first among equals
            if k < logits.shape[-1]:
                probabilities = renormalize(probabilities, top_k_mask(order, k))
            if p < 1:
                probabilities = renormalize(probabilities, top_p_mask(probabilities, order, p))
        return renormalize(probabilities, min_p_mask(probabilities, self.min_p)) if self.min_p else probabilities

    def choose(
        self, logits: Tensor, *generators: torch.Generator, ids: Tensor | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """Logits `[B, V]` -> token ids `[B]`. Draws on the CPU, so that a seed means the same on every device.

        The B random numbers come from one generator, or from one per row, which then draws as it would alone.
        Laid end to end, the probabilities cover the line from 0 to 1; the token under a random point of it is drawn.
        `ids`, `padding` and what is raised are as in `probabilities`.
        """
        if self.temperature == 0:
            return self.penalized(logits, ids, padding).argmax(dim=-1)
        ends = self.probabilities(logits, ids, padding).cumsum(dim=-1)
        shape = (len(ends) // len(generators), 1)
        points = torch.cat([torch.rand(*shape, dtype=ends.dtype, generator=generator) for generator in generators])
        return torch.searchsorted(ends, points * ends[:, -1:], right=True)[:, 0].to(logits.device)


GREEDY = Sampling()
