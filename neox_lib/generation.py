"""One loop that writes text: prefill, then choose and append; each step is streamed as it is made.

Built in notebook 06.
"""

import codecs
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_lib.cache import KVCache
from neox_lib.config import NeoXConfig
from neox_lib.model import NeoXModel, Stopped, check_token_ids
from neox_lib.sampling import GREEDY, Sampling
from neox_lib.tokenizer import ENDOFTEXT, PADDING, encode_text, token_to_bytes

ENDOFTEXT_ID = 0  # the release's own; Hugging Face's class default, 2, is another token


def next_token_scores(logits: Tensor, config: NeoXConfig) -> Tensor:
    """The last position's scores, of tokens that exist: logits `[B, T, V]` -> `[B, tokenizer_vocab_size]`, fp32.

    The dead rows behind them stand for no token. Cut off, they can't be chosen and take no share of the probability.
    """
    return logits[:, -1, : config.tokenizer_vocab_size].float()


@dataclass
class Progress:
    """Counts finished layers over all the passes of a prefill: an `on_layer` of the model.

    `report(done, total)` is told of each; returning False stops the pass.
    """

    report: Callable[[int, int], bool | None]
    total: int
    done: int = 0

    def __call__(self, depth: int, hidden: Tensor) -> bool | None:
        if depth == 0:  # a pass begins, and nothing of it is done
            return None
        self.done += 1
        return self.report(self.done, self.total)


def prefill(
    model: NeoXModel,
    input_ids: Tensor,
    cache: KVCache | None = None,
    chunk_size: int = 1024,
    on_progress: Callable[[int, int], bool | None] | None = None,
) -> Tensor:
    """Read a prompt and score the token after it: ids `[B, T]` -> `[B, tokenizer_vocab_size]`, fp32.

    With a cache the T tokens follow what it holds and go through in chunks of at most `chunk_size`, which bounds the
    memory that a long prompt takes. `on_progress(layers done, layers in all)` is called after each layer; when it
    returns False, Stopped is raised and the cache holds the chunks that went through.
    """
    chunks = (input_ids,) if cache is None else input_ids.split(chunk_size, dim=1)
    layers = len(chunks) * model.config.num_hidden_layers
    progress = None if on_progress is None else Progress(on_progress, layers)
    for chunk in chunks:
        logits = model(chunk, cache, last_only=True, on_layer=progress)
    return next_token_scores(logits, model.config)


@torch.inference_mode()
def generate_tokens(
    model: NeoXModel,
    input_ids: Tensor,
    sampling: Sampling = GREEDY,
    stop_token_ids: tuple[int, ...] = (ENDOFTEXT_ID,),
    cache: KVCache | None = None,
    chunk_size: int = 1024,
    on_progress: Callable[[int, int], bool | None] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Prefill, then choose and append: the next token of each row and its log-probability, `[B]` both, step by step.

    Goes on until each row has given a token of `stop_token_ids`; whoever wants fewer tokens stops asking. A finished
    row repeats its stop token with log-probability 0. Gives nothing if `on_progress` stops the prefill. Raises
    ValueError at the step at which a row's scores are no numbers.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    stops = torch.tensor(stop_token_ids, dtype=torch.int64, device=input_ids.device)
    finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    tokens = input_ids[:, -1]  # [B]: what each row wrote last
    unread = input_ids
    if cache is not None:  # the last token is read again even if it is held: its scores were not kept
        cache.truncate(min(cache.length, input_ids.shape[1] - 1))
        unread = input_ids[:, cache.length :]
    try:
        scores = prefill(model, unread, cache, chunk_size, on_progress)  # [B, V]
    except Stopped:
        return
    while True:
        chosen = sampling.choose(scores, generator)
        log_probabilities = scores.log_softmax(dim=-1).gather(-1, chosen[:, None])[:, 0]
        tokens = tokens.where(finished, chosen)
        yield tokens, log_probabilities.masked_fill(finished, 0)
        finished |= torch.isin(tokens, stops)
        if finished.all():
            return
        new = tokens[:, None]
        unread = new if cache is not None else torch.cat([unread, new], dim=1)  # append
        scores = next_token_scores(model(unread, cache, last_only=True), model.config)
        scores = scores.masked_fill(finished[:, None], 0)  # nobody asks for these rows' tokens, even if they are NaN


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
        self.ended = False

    def push(self, token_id: int) -> str:
        """The characters that this token completes; none for a control token, or once the text has ended."""
        token = self.tokenizer.id_to_token(token_id)
        if self.ended or token_id in self.silent or token is None:
            return ""
        return self.utf8.decode(token_to_bytes(token))

    def end(self) -> str:
        """End the text: what still waits, as U+FFFD."""
        self.ended = True
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


def decode_text(
    tokens: Iterator[tuple[Tensor, Tensor]],
    max_new_tokens: int,
    decoders: Sequence[StreamDecoder],
    stop_token_ids: tuple[int, ...],
) -> Iterator[Step]:
    """At most `max_new_tokens` of `generate_tokens`' steps, each with its texts and the seconds that it took.

    There is a decoder for each row, or none at all: then the texts are empty.
    """
    for remaining in reversed(range(max_new_tokens)):
        started = time.perf_counter()
        step = next(tokens, None)
        if step is None:
            return
        token_ids, log_probabilities = (each.tolist() for each in step)
        texts = [""] * len(token_ids)
        for row, decoder in enumerate(decoders):
            texts[row] = decoder.push(token_ids[row])
            if remaining == 0 or token_ids[row] in stop_token_ids:
                texts[row] += decoder.end()
        yield Step(token_ids, texts, log_probabilities, time.perf_counter() - started)


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
    the context, and for a cache that is too small or of another batch size; and at a step whose scores are no numbers.
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
    tokens = generate_tokens(model, input_ids, sampling, stop_token_ids, cache, chunk_size, on_progress)
    decoders = [] if tokenizer is None else [StreamDecoder(tokenizer) for _ in input_ids]
    return decode_text(tokens, max_new_tokens, decoders, stop_token_ids)


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
