"""How likely the model finds a given text: log-probabilities, perplexity, bits per byte."""

import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from neox_lib.model import NeoXModel
from neox_lib.sampling import check_scores
from neox_lib.tokenizer import ENDOFTEXT, encode_text


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


def stories_of(text: str) -> list[str]:
    """The stories of a corpus file: `<|endoftext|>` alone on a line stands between them."""
    stories = re.split(f"^{re.escape(ENDOFTEXT)}$", text, flags=re.MULTILINE)
    return [story.strip("\n") for story in stories if story.strip()]


def story_stream(tokenizer, stories: list[str], end: int | None = None) -> Tensor:
    """One row of token ids, `[N]`, with an end token, by default `<|endoftext|>`, before each story and after the last.

    Raises ValueError for a tokenizer that has none.
    """
    end = tokenizer.token_to_id(ENDOFTEXT) if end is None else end
    if end is None:
        raise ValueError(f"the tokenizer has no {ENDOFTEXT} to stand between stories")
    ids = [end]
    for story in stories:
        ids += [*encode_text(tokenizer, story), end]
    return torch.tensor(ids)


def windows(stream: Tensor, length: int) -> Iterator[Tensor]:
    """Cut `[N]` ids into `[1, length + 1]` windows that overlap by one, so that each token is predicted once."""
    for start in range(0, len(stream) - 1, length):
        yield stream[None, start : start + length + 1]


@torch.inference_mode()
def negative_log_likelihood(model: NeoXModel, stream: Tensor, length: int) -> Tensor:
    """Negative log-likelihood in nats of each token of a stream but the first, read in windows of `length`: `[N]` ->
    `[N - 1]`, on the CPU.
    """
    device = next(model.parameters()).device
    parts = [-token_log_probabilities(model, window.to(device))[0].cpu() for window in windows(stream, length)]
    return torch.cat(parts)


def bits_per_byte(model: NeoXModel, tokenizer, stories: list[str], length: int = 2048) -> float:
    """Negative log-likelihood of the stories in bits per byte of their UTF-8 text; the ends of stories count too.

    Unlike a loss per token, it can compare models with different tokenizers.
    """
    stream = story_stream(tokenizer, stories, *model.config.eos_token_ids[:1])
    nats = negative_log_likelihood(model, stream, length).sum().item()
    return nats / math.log(2) / sum(len(story.encode("utf-8")) for story in stories)
