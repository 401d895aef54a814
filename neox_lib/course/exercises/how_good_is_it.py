"""The exercises of notebook 12: log-likelihoods, a question as tokens, windows over a long text, a standard error."""

import functools
import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from neox_lib.course.checks import describe, exercise, given, require, require_equal
from neox_lib.generation import prompt_ids, stream_generate
from neox_lib.loading import create_model, create_tokenizer
from neox_lib.model import NeoXModel
from neox_lib.sampling import Sampling
from neox_lib.tokenizer import encode_text

PROMPT = "One night, a little owl"  # no other notebook's
DRAWN = 4  # stories, of which the learner's code chooses one


@functools.cache
def shipped_model() -> NeoXModel:
    return create_model(device="cpu", dtype="float32")


class Dice:
    """Stands in for a model of 4 tokens: after token i comes i + 1 with probability 1/2, each other with 1/6.

    Its two rows more stand for no token, and have the highest scores of all. It reads 3 tokens at most.
    """

    config = SimpleNamespace(vocab_size=6, tokenizer_vocab_size=4, max_position_embeddings=3)

    def __call__(self, input_ids: Tensor) -> Tensor:
        if input_ids.shape[1] > 3:
            raise ValueError(f"dice reads 3 tokens at most, but was given {input_ids.shape[1]}")
        likely = torch.nn.functional.one_hot((input_ids + 1) % 4, 4) * (1 / 2 - 1 / 6) + 1 / 6
        return torch.cat([likely.log(), torch.full((*input_ids.shape, 2), 3.0)], dim=-1)


@exercise("how_good_is_it.token_log_probabilities")
def token_log_probabilities(yours: Callable[[NeoXModel, Tensor], Tensor]) -> str:
    """`yours(model, input_ids)` -> the log-probability of each token given those before it, `[B, T - 1]`."""
    dice = Dice()
    for ids in ([[0, 1, 3]], [[0, 1, 3, 0]], [[2, 3, 0], [1, 1, 2]]):
        what = f"my_token_log_probabilities(dice, {ids})"
        rule = "dice gives 1/2 to the token after the last one read, and 1/6 to each other"
        with given(what):
            found = yours(dice, torch.tensor(ids))  # type: ignore[arg-type]
        expected = [[math.log(1 / 2 if b == (a + 1) % 4 else 1 / 6) for a, b in itertools.pairwise(row)] for row in ids]
        require(isinstance(found, Tensor), f"{what} should be a tensor, but is {describe(found)}")
        require_equal(found, torch.tensor(expected), what, tolerance=1e-4, why=why_wrong(found, expected, ids, rule))
    model, ids = shipped_model(), prompt_ids(create_tokenizer(), PROMPT + " sat in a tree.")
    what = f"my_token_log_probabilities(model, ids) with the shipped model and {PROMPT + ' sat in a tree.'!r}"
    with torch.inference_mode(), given(what):
        found = yours(model, ids)
        scores = model(ids[:, :-1])[0].log_softmax(dim=-1)
    require_equal(found, scores.gather(1, ids[0, 1:, None])[:, 0][None], what, tolerance=1e-3)
    return chosen_story(yours)


def why_wrong(found: Tensor, expected: list[list[float]], ids: list[list[int]], rule: str) -> str:
    """What a wrong answer for dice looks like, if it is one of the usual ones; else the rule."""
    right, tokens = torch.tensor(expected), torch.tensor(ids)
    if found.shape != right.shape:
        return rule
    scores = torch.cat([dice_row(tokens), torch.full((*tokens.shape, 2), 3.0)], dim=-1)
    own = dice_row(tokens).gather(-1, tokens[..., None])[..., 0][:, 1:]
    dead = scores.log_softmax(dim=-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    usual = {
        "these are probabilities; take the logarithm": right.exp(),
        "the sign is wrong: a log-probability is 0 or less": -right,
        "the logarithm is the natural one, in nats": right / math.log(2),
        "each token was scored by the logits at its own place, which are about the token after it": own,
        "the rows that stand for no token got a share; keep the first tokenizer_vocab_size": dead,
        "these are running sums; one number for each token": right.cumsum(dim=1),
    }
    return next((why for why, wrong in usual.items() if torch.allclose(found.float(), wrong, atol=1e-3)), rule)


def dice_row(tokens: Tensor) -> Tensor:
    return (torch.nn.functional.one_hot((tokens + 1) % 4, 4) * (1 / 2 - 1 / 6) + 1 / 6).log()


def chosen_story(yours: Callable[[NeoXModel, Tensor], Tensor]) -> str:
    """The shipped model draws several stories, and the learner's code chooses the one that it finds likeliest."""
    model, tokenizer = shipped_model(), create_tokenizer()
    prompt = prompt_ids(tokenizer, PROMPT)
    texts, means = [], []
    for seed in range(DRAWN):
        sampling = Sampling(temperature=1.0, top_p=0.95, seed=seed)
        drawn = [step.token_id for step in stream_generate(model, prompt, 28, sampling=sampling)]
        ids = torch.cat([prompt, torch.tensor([drawn])], dim=1)
        with (
            torch.inference_mode(),
            given(f"my_token_log_probabilities(model, ids) with a story of {ids.shape[1]} tokens"),
        ):
            means.append(yours(model, ids)[0, prompt.shape[1] - 1 :].mean().item())
        texts.append(" ".join(tokenizer.decode(ids[0].tolist()).split()))
    best = max(range(DRAWN), key=means.__getitem__)
    lines = [f"{'->' if place == best else '  '} {means[place]:6.2f}  {text}" for place, text in enumerate(texts)]
    head = f"The shipped model drew {DRAWN} stories; your code found this one likeliest, in nats per token:"
    return "\n".join([head, *lines])


@exercise("how_good_is_it.pair_ids")
def pair_ids(yours: Callable[..., tuple[list[int], list[int]]]) -> str:
    """`yours(tokenizer, context, continuation, begin)` -> (ids of the context, ids of the continuation)."""
    tokenizer = create_tokenizer()
    for context, continuation, why in (
        ("Once upon", " a time", "nothing special here: the tokens of the whole text, cut after those of the context"),
        (
            "Once upon ",
            "a time",
            "space at the end of the context belongs to the continuation, where ' a' is one token",
        ),
        ("Once upon a ti", "me there was", "the two are encoded as one text, then cut after the context's own tokens"),
        ("The end.\n\n", "Once", "line ends at the end of the context are space too"),
        ("", "Once upon", "without a context, the token `begin` stands for it"),
        (" ", "Once upon", "space alone is no context: it goes to the continuation, and `begin` comes before it"),
    ):
        before, whole = encode_text(tokenizer, context.rstrip()), encode_text(tokenizer, context + continuation)
        expected = (before or [0], whole[len(before) :])
        what = f"my_pair_ids(tokenizer, {context!r}, {continuation!r}, begin=0)"
        with given(what):
            found = yours(tokenizer, context, continuation, 0)
        require(
            isinstance(found, tuple | list) and len(found) == 2 and all(isinstance(part, list) for part in found),
            f"{what} should be two lists of ids, but is {describe(found)}",
        )
        require(tuple(found) == expected, f"{what} should be {expected}, but is {tuple(found)}: {why}")
    return "A question is cut where lm-evaluation-harness cuts it."


@exercise("how_good_is_it.windows")
def windows(yours: Callable) -> str:
    """`yours(tokens, length, stride)` -> (context, continuation) pairs of lists."""
    for tokens, length, stride in ((9, 4, 4), (10, 4, 4), (10, 4, 2), (4, 8, 8), (7, 3, 1), (1, 4, 4), (30, 7, 5)):
        text = list(range(tokens))
        what = f"my_windows({'[]' if not text else f'[0, ..., {tokens - 1}]'}, length={length}, stride={stride})"
        with given(what):
            pairs = list(itertools.islice(yours(text, length, stride), 100))
        require(len(pairs) < 100, f"{what} should end, but goes on after 100 pairs")
        odd = [
            pair for pair in pairs if not isinstance(pair, tuple | list) or len(pair) != 2 or isinstance(pair[0], int)
        ]
        require(
            not odd, f"{what} should give pairs (context, continuation) of tokens, but gives {odd[0] if odd else ''}"
        )
        require_windows(
            [(list(context), list(continuation)) for context, continuation in pairs], text, length, stride, what
        )
    return "Every token but the first is scored once, with as much before it as fits."


def require_windows(found: list, text: list[int], length: int, stride: int, what: str) -> None:
    scored = [token for _, continuation in found for token in continuation]
    told = f"{what} gives {found}"
    twice = sorted({token for token in scored if scored.count(token) > 1})
    require(not twice, f"{told}: token {twice[0] if twice else ''} is scored more than once")
    require(0 not in scored, f"{told}: token 0 has nothing before it, so it is no continuation")
    left = [token for token in text[1:] if token not in scored]
    require(not left, f"{told}: token {left[0] if left else ''} is never scored")
    require(scored == text[1:], f"{told}: the continuations should come in the order of the text")
    for number, (context, continuation) in enumerate(found):
        end, new = continuation[-1], length if number == 0 else stride
        require(bool(context), f"{told}: pair {number} has no context, so its first token can't be scored")
        joined = context + continuation
        require(
            joined == text[joined[0] : end + 1], f"{told}: pair {number} should be a piece of the text, without gaps"
        )
        size = f"{told}: pair {number} scores {len(continuation)} tokens"
        require(len(continuation) <= new, f"{size}, more than {new}")
        require(len(continuation) == new or end == text[-1], f"{size}, fewer than {new}, and it is not the last")
        most = min(length, end) + 1
        require(
            len(joined) <= most,
            f"{told}: pair {number} has {len(joined)} tokens; the model reads all but the last, so {most} at most",
        )
        require(
            len(joined) == most,
            f"{told}: pair {number} has {len(joined)} tokens, but {most} fit: begin its context further back",
        )


@exercise("how_good_is_it.standard_error")
def standard_error(yours: Callable[[list[float]], float]) -> str:
    """`yours(scores)` -> the standard error of their mean."""
    for scores in ([1.0, 1.0, 1.0, 0.0], [1.0, 0.0] * 50, [2.0, 4.0, 9.0], [1.0, 1.0, 1.0], [-1.5, -0.5]):
        shown = str(scores) if len(scores) < 9 else "[1.0, 0.0] * 50"
        what = f"my_standard_error({shown})"
        with given(what):
            found = yours(list(scores))
        n, mean = len(scores), sum(scores) / len(scores)
        squares = sum((score - mean) ** 2 for score in scores)
        expected = math.sqrt(squares / (n - 1) / n)
        require(isinstance(found, int | float), f"{what} should be a number, but is {describe(found)}")
        usual = {
            "divide the squares by n - 1, not by n": math.sqrt(squares / n / n),
            "this is the spread of single scores; divide by the square root of n": math.sqrt(squares / (n - 1)),
            "this is its square": squares / (n - 1) / n,
            "the square root of n divides, not n": math.sqrt(squares / (n - 1)) / n,
            "p (1 - p) is the spread of right and wrong answers only": math.sqrt(abs(mean * (1 - mean)) / (n - 1)),
        }
        near = [why for why, wrong in usual.items() if abs(found - wrong) < 1e-6 and abs(wrong - expected) > 1e-6]
        why = f": {near[0]}" if near else ""
        require(abs(found - expected) < 1e-6, f"{what} should be {expected:.4f}, but is {found:.4f}{why}")
    return "It is the formula behind every plus-minus of a table of scores."
