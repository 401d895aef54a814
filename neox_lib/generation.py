"""One loop that writes text: score, choose, append, and stream each step as it is made."""

import codecs
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_lib.cache import KVCache
from neox_lib.model import NeoXModel, Stopped, check_token_ids
from neox_lib.sampling import GREEDY, Sampling
from neox_lib.tokenizer import ENDOFTEXT, PADDING, encode_text, token_to_bytes

ENDOFTEXT_ID = 0  # the release's own; Hugging Face's class default, 2, is another token


class StreamDecoder:
    """Turns token ids into text one at a time; bytes of an unfinished character wait for the rest of it.

    >>> from neox_lib.tokenizer import train_tokenizer
    >>> tokenizer = train_tokenizer([""], 281)
    >>> decoder = StreamDecoder(tokenizer)
    >>> [decoder.push(token_id) for token_id in tokenizer.encode("né")]
    ['n', '', 'é']
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.silent = {tokenizer.token_to_id(token) for token in (ENDOFTEXT, PADDING)}
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; none for a control token."""
        token = self.tokenizer.id_to_token(token_id)
        if token_id in self.silent or token is None:
            return ""
        return self.utf8.decode(token_to_bytes(token))

    def flush(self) -> str:
        """What waits, as U+FFFD: for the end of the text."""
        return self.utf8.decode(b"", final=True)


@dataclass(frozen=True)
class Step:
    """One new token for each of the B prompts.

    `log_probabilities` are the model's own, before temperature and cuts; `seconds` is what the step took to compute,
    the first one with the prefill. `texts` is empty strings without a tokenizer. A row that has already ended repeats
    its stop token with no text and log-probability 0.
    """

    token_ids: list[int]
    texts: list[str]
    log_probabilities: list[float]
    seconds: float

    @property
    def token_id(self) -> int:
        return self.token_ids[0]

    @property
    def text(self) -> str:
        return self.texts[0]

    @property
    def log_probability(self) -> float:
        return self.log_probabilities[0]


def next_token_logits(
    model: NeoXModel,
    input_ids: Tensor,
    cache: KVCache | None,
    chunk_size: int = 1024,
    on_progress: Callable[[int, int], bool | None] | None = None,
) -> Tensor:
    """Scores for the token after the last one: ids `[B, T]` -> `[B, tokenizer_vocab_size]`, fp32.

    With a cache the T tokens follow what it holds and go through in pieces of at most `chunk_size`, which bounds the
    memory of a long prompt. Only the last position meets the output matrix. Padded rows, tokens that do not exist, are
    cut off. `on_progress(done, total)` hears of each layer; returning False raises Stopped.
    """
    chunks = input_ids.split(chunk_size, dim=1) if cache is not None else (input_ids,)
    layers = model.config.num_hidden_layers
    logits = None
    for index, chunk in enumerate(chunks):

        def report(depth: int, hidden: Tensor, before: int = index * layers) -> bool | None:
            return None if on_progress is None or depth == 0 else on_progress(before + depth, len(chunks) * layers)

        logits = model(chunk, cache, last_only=True, on_layer=report)
    assert logits is not None
    return logits[:, -1, : model.config.tokenizer_vocab_size].float()


class _Row:
    """One text of a batch while it is written: whether it has ended, and the characters that wait for their rest."""

    def __init__(self, tokenizer, stop_token_ids: tuple[int, ...]):
        self.decoder = StreamDecoder(tokenizer) if tokenizer is not None else None
        self.stop_token_ids = stop_token_ids
        self.ended_with: int | None = None

    def take(self, token_id: int, log_probability: float, last: bool) -> tuple[int, str, float]:
        """Token, text and log-probability of this row's next step; after its end it only repeats its stop token."""
        if self.ended_with is not None:
            return self.ended_with, "", 0.0
        if token_id in self.stop_token_ids:
            self.ended_with = token_id
        text = ""
        if self.decoder is not None:
            text = self.decoder.push(token_id)
            if last or self.ended_with is not None:
                text += self.decoder.flush()
        return token_id, text, log_probability


@torch.inference_mode()
def _steps(
    model: NeoXModel,
    input_ids: Tensor,
    max_new_tokens: int,
    rows: list[_Row],
    sampling: Sampling,
    cache: KVCache | None,
    chunk_size: int,
    on_progress: Callable[[int, int], bool | None] | None,
) -> Iterator[Step]:
    """The loop: score, choose, append. `stream_generate` has checked what it is given."""
    generator = torch.Generator().manual_seed(sampling.seed)
    unseen = input_ids  # [B, T]: what the model has yet to read
    if cache is not None:  # the last token goes through once more if need be: its scores were not kept
        cache.truncate(min(cache.length, input_ids.shape[1] - 1))
        unseen = input_ids[:, cache.length :]
    for number in range(max_new_tokens):
        started = time.perf_counter()
        try:  # score: [B, V]
            logits = next_token_logits(model, unseen, cache, chunk_size, on_progress if number == 0 else None)
        except Stopped:
            return
        chosen = sampling.choose(logits, generator)  # choose: [B]
        log_probabilities = logits.log_softmax(dim=-1).gather(-1, chosen[:, None])[:, 0]  # [B]
        last = number == max_new_tokens - 1
        of_rows = zip(rows, chosen.tolist(), log_probabilities.tolist(), strict=True)
        taken = [row.take(token_id, log_probability, last) for row, token_id, log_probability in of_rows]
        token_ids, texts, values = (list(column) for column in zip(*taken, strict=True))
        new = torch.tensor(token_ids, device=input_ids.device)[:, None]  # [B, 1]
        unseen = new if cache is not None else torch.cat([unseen, new], dim=1)  # append
        yield Step(token_ids, texts, values, time.perf_counter() - started)
        if all(row.ended_with is not None for row in rows):
            return


def stream_generate(
    model: NeoXModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    tokenizer=None,
    sampling: Sampling = GREEDY,
    stop_token_ids: tuple[int, ...] = (ENDOFTEXT_ID,),
    use_cache: bool | None = None,
    cache: KVCache | None = None,
    chunk_size: int = 1024,
    on_progress: Callable[[int, int], bool | None] | None = None,
) -> Iterator[Step]:
    """Write up to `max_new_tokens` after each prompt of `input_ids` `[B, T]`, one Step at a time.

    Ends when every row has given a token of `stop_token_ids` (pass () to go on past them). `use_cache` defaults to the
    model's own. A `cache` that already holds the first tokens of `input_ids` saves computing them again, and is used
    whatever `use_cache` says. `on_progress(done, total)` is called between layers during prefill; when it returns False
    the stream ends without a step. Raises ValueError, before any work, for bad ids, when prompt and new tokens exceed
    the context, and for a cache that is too small or of another batch size.
    """
    check_token_ids(input_ids, model.config.vocab_size)
    limit, (batch, prompt) = model.config.max_position_embeddings, input_ids.shape
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
    if prompt + max_new_tokens > limit:
        raise ValueError(
            f"prompt of {prompt} tokens + {max_new_tokens} new ones = {prompt + max_new_tokens}, but this model's "
            f"context holds {limit}; shorten the prompt or ask for fewer"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")
    weight = model.norm.weight
    input_ids = input_ids.to(weight.device)
    if cache is None and (model.use_cache if use_cache is None else use_cache):
        cache = KVCache(model.config, batch, prompt + max_new_tokens, weight.device, weight.dtype)
    if cache is not None:
        cache.check_room(batch, prompt + max(0, max_new_tokens - 1))  # the last new token never goes through the model
    rows = [_Row(tokenizer, stop_token_ids) for _ in input_ids]
    return _steps(model, input_ids, max_new_tokens, rows, sampling, cache, chunk_size, on_progress)


def prompt_ids(tokenizer, text: str) -> Tensor:
    """Token ids of a prompt, `[1, T]`; an empty one becomes endoftext, which stood before every text in training."""
    return torch.tensor([encode_text(tokenizer, text) or [ENDOFTEXT_ID]])


def greedy_generate(model: NeoXModel, input_ids: Tensor, max_seq_len: int) -> list[list[int]]:
    """Continue each prompt with its likeliest tokens until it is `max_seq_len` long, prompt included, or ends.

    ids `[B, T]` -> B lists of ids that start with the prompt. A row that ends early closes with endoftext. Raises
    ValueError as `stream_generate` does.
    """
    check_token_ids(input_ids, model.config.vocab_size)
    rows = input_ids.tolist()
    ended = [False] * len(rows)
    for step in stream_generate(model, input_ids, max(0, max_seq_len - input_ids.shape[1])):
        for row, token_id in enumerate(step.token_ids):
            if not ended[row]:
                rows[row].append(token_id)
            ended[row] = ended[row] or token_id == ENDOFTEXT_ID
    return rows


def greedy_generate_text(model: NeoXModel, tokenizer, text: str, max_seq_len: int) -> str:
    """Continue a text until it is `max_seq_len` tokens long, the prompt's included, or ends. Starts with the prompt."""
    input_ids = prompt_ids(tokenizer, text)
    new_tokens = max(0, max_seq_len - input_ids.shape[1])
    steps = stream_generate(model, input_ids, new_tokens, tokenizer=tokenizer)
    return text + "".join(step.text for step in steps)
