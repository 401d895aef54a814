"""One loop that writes text: prefill, then choose and append; each step is streamed as it is made.

Built in notebook 06.
"""

import codecs
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar

import torch
from torch import Tensor

from neox_lib.cache import KVCache
from neox_lib.config import NeoXConfig
from neox_lib.model import NeoXModel, Stopped, check_token_ids
from neox_lib.padding import pad_left, without_padding
from neox_lib.sampling import GREEDY, Sampling
from neox_lib.spelling import spelling_of
from neox_lib.stop_strings import stop_at
from neox_lib.tokenizer import ENDOFTEXT, encode_text


def next_token_scores(logits: Tensor, config: NeoXConfig) -> Tensor:
    """The last position's scores for tokens that exist: logits `[B, T, V]` -> `[B, tokenizer_vocab_size]`, fp32.

    The dead rows after them stand for no token: cut off, they can't be chosen and get no probability.
    """
    return logits[:, -1, : config.tokenizer_vocab_size].float()


@dataclass
class Progress:
    """Counts finished layers over all the passes of a prefill: an `on_layer` of the model.

    `report(done, total)` is called for each; returning False stops the pass.
    """

    report: Callable[[int, int], bool | None]
    total: int
    done: int = 0

    def __call__(self, depth: int, hidden: Tensor) -> bool | None:
        if depth == 0:  # a pass begins: no layer is done
            return None
        self.done += 1
        return self.report(self.done, self.total)


def prefill(
    model: NeoXModel,
    input_ids: Tensor,
    cache: KVCache | None = None,
    chunk_size: int = 1024,
    on_progress: Callable[[int, int], bool | None] | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """Read a prompt and score the token after it: ids `[B, T]` -> `[B, tokenizer_vocab_size]`, fp32.

    With a cache the T tokens follow what it holds and are read in chunks of at most `chunk_size`, which bounds the
    memory that a long prompt takes. `padding` is as in NeoXModel. `on_progress(layers done, layers in total)` is
    called after each layer; when it returns False, Stopped is raised and the cache holds the completed chunks.
    """
    chunks = (input_ids,) if cache is None else input_ids.split(chunk_size, dim=1)
    layers = len(chunks) * model.config.num_hidden_layers
    progress = None if on_progress is None else Progress(on_progress, layers)
    logits = []
    for chunk in chunks:
        logits.append(model(chunk, cache, last_only=True, padding=padding, on_layer=progress))
    return next_token_scores(logits[-1], model.config)


@torch.inference_mode()
def generate_tokens(
    model: NeoXModel,
    prompts: list[list[int]],
    max_new_tokens: list[int],
    sampling: Sampling = GREEDY,
    stop_token_ids: tuple[int, ...] = (),
    cache: KVCache | None = None,
    chunk_size: int = 1024,
    on_progress: Callable[[int, int], bool | None] | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Prefill, then choose and append: each row's next token, its log-probability, and whether that ends the row.

    Three tensors `[B]` per step, until all rows have ended: at a token of `stop_token_ids` or after their own number of
    new tokens. A row that has ended repeats its last token with log-probability 0. Equal prompts draw with different
    seeds, others as they would alone. Yields nothing if `on_progress` stops the prefill. Raises ValueError at the step
    at which a row's scores are NaN or infinite.
    """
    if not any(max_new_tokens):
        return
    device = model.norm.weight.device
    ids, padding = pad_left(prompts, device)
    seeds = (sampling.seed + prompts[:row].count(prompt) for row, prompt in enumerate(prompts))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    stops, most = (torch.tensor(each, dtype=torch.int64, device=device) for each in (stop_token_ids, max_new_tokens))
    tokens, finished = ids[:, -1], most < 1  # [B]: each row's last token, and whether it has ended
    unread = ids
    if cache is not None:  # the last token is read again even if it is held: its scores were not kept
        cache.truncate(min(cache.length, ids.shape[1] - 1))
        unread = ids[:, cache.length :]
    try:
        scores = prefill(model, unread, cache, chunk_size, on_progress, padding)  # [B, V]
    except Stopped:
        return
    for written in count(1):
        scores = scores.masked_fill(finished[:, None], 0)  # these rows are not used, even if they are NaN
        chosen = sampling.choose(scores, *generators, ids=ids, padding=padding)
        log_probabilities = scores.log_softmax(dim=-1).gather(-1, chosen[:, None])[:, 0].masked_fill(finished, 0)
        tokens = tokens.where(finished, chosen)
        finished = finished | torch.isin(tokens, stops) | (written >= most)
        yield tokens, log_probabilities, finished
        if finished.all():
            return
        if padding is not None:  # a row past its limit takes no new position: its context may be full
            padding = padding + (written >= most)
        ids = torch.cat([ids, tokens[:, None]], dim=1)  # append
        unread = ids if cache is None else ids[:, -1:]
        scores = next_token_scores(model(unread, cache, last_only=True, padding=padding), model.config)


class StreamDecoder:
    """Turns token ids into text one at a time; bytes of an unfinished character wait for the rest of it.

    >>> from neox_lib.tokenizer import train_tokenizer
    >>> tokenizer = train_tokenizer([""], 281)
    >>> decoder = StreamDecoder(tokenizer)
    >>> [decoder.push(token_id) for token_id in tokenizer.encode("né")]
    ['n', '', 'é']
    """

    def __init__(self, tokenizer):
        self.spelling = spelling_of(tokenizer)  # token ids to bytes
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.ended = False

    def push(self, token_id: int) -> str:
        """The characters that this token completes; none for a control token, or once the text has ended."""
        return "" if self.ended else self.utf8.decode(self.spelling.push(token_id))

    def flush(self) -> str:
        """End the text: what is still waiting, an unfinished character as U+FFFD."""
        self.ended = True
        return self.utf8.decode(self.spelling.flush(), final=True)


@dataclass(frozen=True)
class Step:
    """One new token for each of the B prompts.

    `log_probabilities` are the model's own, before temperature and cuts; `seconds` is the step's computing time, in
    the first step with the prefill. Without a tokenizer, `texts` are empty strings. `ended` is true for a row from its
    last token on; later steps repeat that token with no text and log-probability 0. With stop strings, `held` tells how
    many of a row's last tokens have text that is held back.
    """

    token_ids: list[int]
    texts: list[str]
    log_probabilities: list[float]
    seconds: float
    ended: list[bool] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    @property
    def token_id(self) -> int:
        return self.token_ids[0]

    @property
    def text(self) -> str:
        return self.texts[0]

    @property
    def log_probability(self) -> float:
        return self.log_probabilities[0]


def decode_text(tokens: Iterator[tuple[Tensor, Tensor, Tensor]], decoders: Sequence[StreamDecoder]) -> Iterator[Step]:
    """The steps of `generate_tokens`, each with its texts and the seconds that it took.

    `decoders` has one per row, or none: then the texts are empty.
    """
    while True:
        started = time.perf_counter()
        step = next(tokens, None)
        if step is None:
            return
        token_ids, log_probabilities, ended = (each.tolist() for each in step)
        texts = [""] * len(token_ids)
        for row, decoder in enumerate(decoders):
            texts[row] = decoder.push(token_ids[row]) + (decoder.flush() if ended[row] else "")
        yield Step(token_ids, texts, log_probabilities, time.perf_counter() - started, ended)


def prompt_rows(
    input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None, vocab_size: int
) -> list[list[int]]:
    """Each prompt's own tokens: ids `[B, T]`, all of them or where the mask is 1, or a list of lists -> B lists.

    Raises ValueError for bad ids, for a prompt without a token, and as `without_padding` does.
    """
    if attention_mask is not None:
        rows = without_padding(input_ids, attention_mask)
    elif isinstance(input_ids, Tensor):
        check_token_ids(input_ids, vocab_size)
        return input_ids.tolist()
    else:
        try:
            rows = [torch.as_tensor(row) for row in input_ids]
        except (TypeError, ValueError, RuntimeError):
            raise ValueError("prompts must be a [batch, tokens] tensor or a list of lists of token ids") from None
    if not rows:
        raise ValueError("the batch has no prompt; give one or more")
    for number, row in enumerate(rows):
        if row.numel() == 0:
            raise ValueError(f"prompt {number} of the batch has no token; leave it out, or begin it with endoftext")
        check_token_ids(row[None], vocab_size)
    return [row.tolist() for row in rows]


def stream_generate(
    model: NeoXModel,
    input_ids: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    *,
    attention_mask: Tensor | None = None,
    tokenizer=None,
    sampling: Sampling = GREEDY,
    stop_token_ids: tuple[int, ...] | None = None,
    use_cache: bool | None = None,
    cache: KVCache | None = None,
    chunk_size: int = 1024,
    on_progress: Callable[[int, int], bool | None] | None = None,
) -> Iterator[Step]:
    """Write up to `max_new_tokens` (one number, or one per row) after each prompt, one Step at a time.

    Prompts are ids `[B, T]`, a list of lists of any lengths, or ids with an `attention_mask` `[B, T]` that is 0 for
    padding on the left. Each row is written as it would be alone, but repeated prompts draw with `seed` + 1, `seed` + 2
    and so on. Ends when every row has a token of `stop_token_ids`, by default the model's own; () for none; or, with a
    tokenizer, one of `sampling.stop_strings`.
    `use_cache` defaults to the model's own. A `cache` that already holds the first tokens of the rows, and padding
    before them, saves computing them again, and is used whatever `use_cache` says. `on_progress(done, total)` is called
    after each layer of the prefill; when it returns False, the stream ends without a step. Raises ValueError, before
    any work, for bad ids or masks, when a prompt and its new tokens exceed the context, and for a cache that does not
    fit; and at a step whose scores are NaN or infinite.
    """
    stop_token_ids = model.config.eos_token_ids if stop_token_ids is None else stop_token_ids
    prompts = prompt_rows(input_ids, attention_mask, model.config.vocab_size)
    most = list(max_new_tokens) if isinstance(max_new_tokens, Sequence) else [max_new_tokens] * len(prompts)
    if len(most) != len(prompts):
        raise ValueError(f"max_new_tokens must be one number or one for each of {len(prompts)} rows, got {len(most)}")
    limit, longest = model.config.max_position_embeddings, max(map(len, prompts))
    for prompt, new in zip(prompts, most, strict=True):
        if new < 0:
            raise ValueError(f"max_new_tokens must be 0 or more, got {new}")
        if len(prompt) + new > limit:
            raise ValueError(
                f"prompt of {len(prompt)} tokens + {new} new ones = {len(prompt) + new}, but this model's context "
                f"holds {limit}; shorten the prompt or ask for fewer"
            )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")
    weight = model.norm.weight
    if cache is None and (model.use_cache if use_cache is None else use_cache):
        cache = KVCache(model.config, len(prompts), longest + max(most), weight.device, weight.dtype)
    if cache is not None:  # the last new token never goes through the model
        cache.check_room(len(prompts), longest + max(0, max(most) - 1))
    tokens = generate_tokens(model, prompts, most, sampling, stop_token_ids, cache, chunk_size, on_progress)
    steps = decode_text(tokens, [] if tokenizer is None else [StreamDecoder(tokenizer) for _ in prompts])
    return stop_at(steps, sampling.stop_strings, tokenizer, len(prompts)) if sampling.stop_strings else steps


def prompt_ids(tokenizer, text: str, config: NeoXConfig | None = None) -> Tensor:
    """Token ids of a prompt, `[1, T]`; an empty one becomes the token that stood before every text in training.

    That is the first of `config.eos_token_ids`, or `<|endoftext|>` where no config is given. Raises ValueError for an
    empty prompt when there is no such token.
    """
    ids = encode_text(tokenizer, text)
    if not ids:
        ends = config.eos_token_ids if config else (tokenizer.token_to_id(ENDOFTEXT),)
        if not ends or ends[0] is None:
            raise ValueError("the prompt is empty, and the model has no token that begins a text; give a word")
        ids = [ends[0]]
    return torch.tensor([ids])


def greedy_generate(
    model: NeoXModel,
    input_ids: Tensor | Sequence[Sequence[int]],
    max_seq_len: int,
    attention_mask: Tensor | None = None,
) -> list[list[int]]:
    """Continue each prompt with its likeliest tokens until it is `max_seq_len` long, prompt included, or ends.

    Prompts as in `stream_generate` -> B lists of ids that start with the prompt as given. Padding doesn't count.
    A row that ends early has its end token last. Raises ValueError as `stream_generate` does.
    """
    prompts = prompt_rows(input_ids, attention_mask, model.config.vocab_size)
    most = [max(0, max_seq_len - len(prompt)) for prompt in prompts]
    rows = prompts if attention_mask is None else torch.as_tensor(input_ids).tolist()
    ended = [new == 0 for new in most]
    for step in stream_generate(model, prompts, most):
        for row, token_id in enumerate(step.token_ids):
            if not ended[row]:
                rows[row].append(token_id)
        ended = step.ended
    return rows


Text = TypeVar("Text", str, list[str])  # a list of texts is written in one batch


def greedy_generate_text(model: NeoXModel, tokenizer, text: Text, max_seq_len: int) -> Text:
    """Continue a text until it is `max_seq_len` tokens long, the prompt's included, or ends. Starts with the prompt.

    A list of texts gives a list, each continued as it is alone.
    """
    texts = [text] if isinstance(text, str) else list(text)
    prompts = [prompt_ids(tokenizer, each, model.config)[0].tolist() for each in texts]
    most = [max(0, max_seq_len - len(prompt)) for prompt in prompts]
    for step in stream_generate(model, prompts, most, tokenizer=tokenizer):
        texts = [before + piece for before, piece in zip(texts, step.texts, strict=True)]
    return texts[0] if isinstance(text, str) else texts  # type: ignore[return-value]
