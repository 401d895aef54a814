"""Tokens as labels, and the likeliest ones at a position."""

from dataclasses import dataclass

from torch import Tensor

from neox_lib.spelling import token_alone


def token_label(tokenizer, token_id: int) -> str:
    """The text of a single token, or its bytes, such as <E2 82>, where they are not whole characters. A row that stands
    for no token is shown by its id.

    >>> from neox_lib.tokenizer import train_tokenizer
    >>> tokenizer = train_tokenizer([""], 281)
    >>> [token_label(tokenizer, token_id) for token_id in [*tokenizer.encode("né"), 999]]
    ['n', '<C3>', '<A9>', '<999>']
    """
    if tokenizer.id_to_token(token_id) is None:
        return f"<{token_id}>"
    raw = token_alone(tokenizer, token_id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return f"<{raw.hex(' ').upper()}>"


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
    return [
        Candidate(token_id, token_label(tokenizer, token_id), score, rank)
        for rank, (token_id, score) in enumerate(zip(ids.tolist(), scores.tolist(), strict=True), 1)
    ]


def candidate(logits: Tensor, tokenizer, token_id: int) -> Candidate:
    """One token's score and rank among all: logits `[1, V]`. Raises ValueError for an id outside the vocabulary."""
    if not 0 <= token_id < logits.shape[-1]:
        raise ValueError(f"token id {token_id} is outside the vocabulary: ids run from 0 to {logits.shape[-1] - 1}")
    scores = logits[0].log_softmax(dim=-1)
    rank = int((scores > scores[token_id]).sum()) + 1
    return Candidate(token_id, token_label(tokenizer, token_id), scores[token_id].item(), rank)
