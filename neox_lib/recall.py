"""A KV cache kept between one text and the next, so that what they share is read once."""

from collections.abc import Callable

import torch

from neox_lib.cache import KVCache
from neox_lib.generation import prefill
from neox_lib.model import NeoXModel
from neox_lib.sampling import check_scores

GROWTH = 256  # the capacity grows in steps of this many tokens


def shared_beginning(one: list[int], other: list[int]) -> int:
    """The length of the longest common prefix of two texts, in tokens.

    >>> shared_beginning([5, 6, 7], [5, 6, 8, 9])
    2
    """
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


class Recall:
    """One cache and the ids it holds. It grows on demand, up to the model's context."""

    def __init__(self, model: NeoXModel):
        self.model = model
        self.cache: KVCache | None = None
        self.ids: list[int] = []

    def room_for(self, ids: list[int], capacity: int) -> KVCache:
        """A cache with room for `capacity` tokens, holding the part of `ids` it already has.

        Call `keep` with all ids afterwards: only then does it know which ids the new entries belong to.
        """
        shared = shared_beginning(self.ids, ids)
        if self.cache is None or self.cache.capacity < capacity:
            config, weight = self.model.config, self.model.norm.weight
            capacity = min(config.max_position_embeddings, -(-capacity // GROWTH) * GROWTH)
            larger = KVCache(config, 1, capacity, weight.device, weight.dtype)
            if self.cache is not None:
                larger.keys[:, :, :, :shared] = self.cache.keys[:, :, :, :shared]
                larger.values[:, :, :, :shared] = self.cache.values[:, :, :, :shared]
            larger.advance(shared)
            self.cache = larger
        self.cache.truncate(shared)
        self.ids = ids[:shared]
        return self.cache

    def keep(self, ids: list[int]) -> None:
        """Record which ids the cache holds: the first of `ids`, as many as the model has read."""
        self.ids = ids[: self.cache.length] if self.cache is not None else []

    def forget(self) -> None:
        """Drop everything, for example after an error in the middle of a pass."""
        self.cache, self.ids = None, []

    @torch.inference_mode()
    def logits_after(
        self, ids: list[int], on_progress: Callable[[int, int], bool | None] | None = None
    ) -> torch.Tensor:
        """Scores for the token after `ids`: `[1, V]`, fp32. Costs a one-token pass if the text is cached.

        Raises Stopped when `on_progress` returns False, and ValueError for NaN or infinite scores.
        """
        known = self.ids if shared_beginning(self.ids, ids) == len(ids) else None
        cache = self.cache if known and self.cache is not None else self.room_for(ids, len(ids))
        cache.truncate(min(cache.length, len(ids) - 1))
        new = torch.tensor([ids[cache.length :]], device=self.model.norm.weight.device)
        try:
            scores = prefill(self.model, new, cache, on_progress=on_progress)
        finally:
            if known:  # the later rows are intact: the pass rewrote only its own
                cache.length = len(known)
            else:
                self.keep(ids)
        check_scores(scores)
        return scores
