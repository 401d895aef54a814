"""Looks into the model at one position: what could come next, and at what each head looks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_lib.attention import attention_weights
from neox_lib.block import Block
from neox_lib.model import NeoXModel
from neox_lib.playground.pieces import label


@dataclass(frozen=True)
class Candidate:
    """A token that could stand at a position, and its log-probability there. `rank` 1 is the likeliest."""

    token_id: int
    text: str
    score: float
    rank: int


def likeliest(logits: Tensor, tokenizer, count: int = 10) -> list[Candidate]:
    """The `count` likeliest next tokens, best first: logits `[1, V]` -> Candidates."""
    scores, ids = logits[0].log_softmax(dim=-1).topk(min(count, logits.shape[-1]))
    pairs = zip(ids.tolist(), scores.tolist(), strict=True)
    return [
        Candidate(token_id, label(tokenizer, token_id), score, rank) for rank, (token_id, score) in enumerate(pairs, 1)
    ]


def candidate(logits: Tensor, tokenizer, token_id: int) -> Candidate:
    """One token's score and rank among all: logits `[1, V]`. Raises ValueError for an id outside the vocabulary."""
    if not 0 <= token_id < logits.shape[-1]:
        raise ValueError(f"token id {token_id} is outside the vocabulary: ids run from 0 to {logits.shape[-1] - 1}")
    scores = logits[0].log_softmax(dim=-1)
    rank = int((scores > scores[token_id]).sum()) + 1
    return Candidate(token_id, label(tokenizer, token_id), scores[token_id].item(), rank)


class LookStopped(Exception):
    """Raised between two layers when `on_progress` asks to stop."""


@torch.inference_mode()
def attention_of_last(
    model: NeoXModel, ids: list[int], on_progress: Callable[[int, int], bool | None] | None = None
) -> Tensor:
    """What the last token looks at, in every layer and head: T ids -> `[L, H, T]`, fp32, on the CPU; rows sum to 1.

    Only the last token's queries are compared with the keys, so that a long text needs no `[T, T]` table.
    """
    input_ids = torch.tensor([ids], device=model.norm.weight.device)
    cos, sin = model.rotary.rows(0, len(ids), like=model.norm.weight)
    hidden = model.word_embeddings(input_ids).to(model.norm.weight.dtype)
    rows = []
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        query, key, _ = layer.attention.project(layer.input_layernorm(hidden), cos, sin)
        rows.append(attention_weights(query[:, :, -1:], key)[0, :, 0].cpu())
        hidden = layer(hidden, cos, sin)
        if on_progress is not None and on_progress(index + 1, len(model.layers)) is False:
            raise LookStopped
    return torch.stack(rows)
