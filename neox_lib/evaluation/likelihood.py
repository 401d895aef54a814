"""How likely a model finds a text that is given: log-likelihoods, perplexity, bits per byte, and how sure a score is.

Built in notebook 12.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from neox_lib.evaluation.corpus import story_stream
from neox_lib.model import NeoXModel
from neox_lib.sampling import check_scores
from neox_lib.tokenizer import encode_text


def token_log_probabilities(model: NeoXModel, input_ids: Tensor) -> Tensor:
    """Log-probability of each token given those before it: ids `[B, T]` -> `[B, T - 1]`, fp32, in nats.

    Padded vocabulary rows stand for no token, so they get no probability. The last token is only predicted, never read,
    so T may be one more than the context. Raises ValueError as the model does, and for NaN or infinite scores.
    """
    logits = model(input_ids[:, :-1])[..., : model.config.tokenizer_vocab_size].float()
    found = logits.log_softmax(dim=-1).gather(-1, input_ids[:, 1:, None].long()).squeeze(-1)
    check_scores(-found)
    return found


@torch.inference_mode()
def perplexity(model: NeoXModel, input_ids: Tensor) -> float:
    """exp of the mean negative log-likelihood of the T - 1 tokens that have one before them: ids `[B, T]`."""
    return math.exp(-token_log_probabilities(model, input_ids).mean().item())


Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context, at least one, and of its continuation


@torch.inference_mode()
def score_batch(model: NeoXModel, pairs: Sequence[Pair]) -> list[tuple[Tensor, bool]]:
    """For each (context, continuation) of ids: the log-probability of each token of the continuation, `[n]`, fp32, in
    nats, on the CPU; and whether greedy decoding would write just that.

    Shorter rows are padded on the right: no token looks at what comes after it. A row longer than the model's context
    loses its first tokens. Raises ValueError for an empty part, for a continuation longer than the context, and as
    `token_log_probabilities` does.
    """
    limit = model.config.max_position_embeddings
    for context, continuation in pairs:
        if not context or not 1 <= len(continuation) <= limit:
            raise ValueError(
                f"a pair needs a context of 1 or more tokens and a continuation of 1 to {limit}, the model's context; "
                f"got {len(context)} and {len(continuation)}"
            )
    rows = [[*context, *continuation][-limit - 1 :] for context, continuation in pairs]
    longest = max(map(len, rows))
    padded = [row + [0] * (longest - len(row)) for row in rows]
    ids = torch.tensor(padded, device=next(model.parameters()).device)
    logits = model(ids[:, :-1])[..., : model.config.tokenizer_vocab_size]  # [B, T, V]
    found = []
    for number, (row, (_, continuation)) in enumerate(zip(rows, pairs, strict=True)):
        own = slice(len(row) - len(continuation), len(row))  # where the continuation stands
        scores, targets = logits[number, own.start - 1 : own.stop - 1].float(), ids[number, own]
        log_probabilities = scores.log_softmax(dim=-1).gather(-1, targets[:, None])[:, 0]
        check_scores(-log_probabilities[:, None], f"pair {number}, token")
        found.append((log_probabilities.cpu(), bool((scores.argmax(dim=-1) == targets).all())))
    return found


def pair_ids(tokenizer, context: str, continuation: str, begin: int) -> Pair:
    """Token ids of a context and of what follows it, cut where the tokens of the context alone end.

    The two are encoded as one text, as the model would have read them. Space at the end of the context belongs to the
    continuation: " word" is one token, " " and "word" are two. Where no context is left, `begin` stands for it.
    """
    before = encode_text(tokenizer, context.rstrip())
    whole = encode_text(tokenizer, context + continuation)
    if before or whole[:1] == [begin]:
        return before or whole[:1], whole[max(1, len(before)) :]
    return [begin], whole


def windows(tokens: Sequence[int], length: int, stride: int) -> Iterator[Pair]:
    """Cut a text into pairs for `score_batch`, so that each token but the first is in a continuation once.

    The first pair scores `length` tokens, each later one the next `stride`, the last what is left. The context of each
    is as long as a model that reads `length` tokens has room for. Raises ValueError unless 1 <= stride <= length.
    """
    if not 1 <= stride <= length:
        raise ValueError(f"a window of {length} tokens can't move by {stride}; the stride must be from 1 to {length}")
    start = 1
    while start < len(tokens):
        end = min(start + (length if start == 1 else stride), len(tokens))
        yield tokens[max(0, end - length - 1) : start], tokens[start:end]
        start = end


def negative_log_likelihood(model: NeoXModel, stream: Tensor, length: int, stride: int | None = None) -> Tensor:
    """Negative log-likelihood in nats of each token of a stream but the first, read in windows of `length` that move by
    `stride`, by default their length: `[N]` -> `[N - 1]`, on the CPU.
    """
    pairs = windows(stream.tolist(), length, length if stride is None else stride)
    return torch.cat([-score_batch(model, [pair])[0][0] for pair in pairs])


def bits_per_byte(model: NeoXModel, tokenizer, stories: list[str], length: int = 2048) -> float:
    """Negative log-likelihood of the stories in bits per byte of their UTF-8 text; the ends of stories count too.

    Unlike a loss per token, it can compare models with different tokenizers.
    """
    stream = story_stream(tokenizer, stories, *model.config.eos_token_ids[:1])
    nats = negative_log_likelihood(model, stream, length).sum().item()
    return nats / math.log(2) / sum(len(story.encode("utf-8")) for story in stories)


def standard_error(scores: Sequence[float]) -> float:
    """How far the mean of so many scores typically lies from that of all items of the kind: the standard deviation of a
    score, with n - 1, over the square root of their number. Raises ValueError for fewer than two.

    >>> round(standard_error([1, 1, 1, 0]), 4)
    0.25
    """
    if len(scores) < 2:
        raise ValueError(f"a standard error needs two scores or more, got {len(scores)}")
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
    return math.sqrt(variance / len(scores))
