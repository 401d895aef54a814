"""The exercises of notebook 06: the greedy loop, the cache, the loop with a cache, and top-p."""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from neox_lib.cache import KVCache
from neox_lib.config import NeoXConfig
from neox_lib.course.checks import describe, exercise, given, require, require_equal, story_with
from neox_lib.generation import prefill, prompt_ids
from neox_lib.loading import create_model, create_tokenizer
from neox_lib.model import NeoXModel
from neox_lib.sampling import renormalize, top_p_mask

PROMPT = "One day, a little rabbit"  # no other notebook's
BOUND = 1e-3  # fp32 rounding moves these logits by about 1e-5, a wrong cache by whole units
ONE_LAYER = NeoXConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32)
TWO_LAYERS = NeoXConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=32)


@functools.cache
def shipped_model() -> NeoXModel:
    return create_model(device="cpu", dtype="float32")


def countdown(input_ids: Tensor, last_only: bool = False) -> Tensor:
    """Stands in for a model that puts 4 after 5, 3 after 4, and 9 after 0: ids `[B, T]` -> logits `[B, T, 10]`."""
    logits = torch.nn.functional.one_hot((input_ids - 1) % 10, 10).float()
    return logits[:, -1:] if last_only else logits


@exercise("cached_generation.greedy")
def greedy(yours: Callable[[NeoXModel, Tensor, int], Tensor]) -> str:
    """`yours(model, input_ids, new_tokens)` -> the prompt and its likeliest continuation, `[1, T + new_tokens]`."""
    prompt = torch.tensor([[7, 2, 5]])
    what = "my_greedy(countdown, [[7, 2, 5]], 4), where countdown puts i - 1 after i,"
    with given(what):
        found = yours(countdown, prompt, 4)  # type: ignore[arg-type]
    require(isinstance(found, Tensor), f"{what} should be a tensor, but is {describe(found)}")
    require(found.shape != (1, 4), f"{what} should begin with the prompt, but has only 4 tokens: {found.tolist()}")
    require_equal(found, torch.tensor([[7, 2, 5, 4, 3, 2, 1]]), what)
    require_equal(prompt, torch.tensor([[7, 2, 5]]), "the prompt that my_greedy was given, after the call,")
    what = "my_greedy(countdown, [[7, 2, 5]], 0)"
    with given(what):
        require_equal(yours(countdown, prompt, 0), prompt, what)  # type: ignore[arg-type]
    prompt = prompt_ids(create_tokenizer(), PROMPT)
    model, expected = shipped_model(), likeliest(prompt, 12)
    what = f"my_greedy(model, prompt, 12) with the shipped model and the prompt {PROMPT!r}"
    with torch.inference_mode(), given(what):
        found = yours(model, prompt, 12)
    require_equal(list(found.shape), list(expected.shape), f"the shape of {what}")
    same = int((found == expected).long().cumprod(dim=1).sum()) - prompt.shape[1]
    require(
        same == 12,
        f"{what} should add the 12 likeliest tokens, but only the first {same} are right, though countdown came out "
        "right: does every pass read the whole text so far, prompt included?",
    )
    return "Your loop writes what the library's writes, with countdown and with the shipped model."


@torch.inference_mode()
def likeliest(prompt: Tensor, new_tokens: int) -> Tensor:
    """The shipped model's greedy text, each token from a pass over all before it: `[1, T]` -> `[1, T + new_tokens]`."""
    for _ in range(new_tokens):
        chosen = shipped_model()(prompt, last_only=True)[:, -1].argmax(dim=-1, keepdim=True)
        prompt = torch.cat([prompt, chosen], dim=1)
    return prompt


class Tally:
    """Stands in for a model with a cache: what comes next is the last digit of the sum of all tokens so far.

    `passes` records how many tokens each pass was given, and whether with the cache.
    """

    def __init__(self):
        self.passes: list[tuple[int, bool]] = []
        self.held = 0  # the sum of the tokens that went in with the cache

    def __call__(self, input_ids: Tensor, cache=None, last_only: bool = False) -> Tensor:
        self.passes.append((input_ids.shape[1], cache is not None))
        sums = input_ids.cumsum(dim=1) + (0 if cache is None else self.held)
        self.held = int(sums[0, -1]) if cache is not None else self.held
        logits = torch.nn.functional.one_hot(sums % 10, 10).float()
        return logits[:, -1:] if last_only else logits


@exercise("cached_generation.cached_greedy")
def cached_greedy(yours: Callable[..., Tensor]) -> str:
    """`yours(model, input_ids, new_tokens, cache)` -> ids `[1, T + new_tokens]`: prompt once, then token by token."""
    tally, prompt = Tally(), torch.tensor([[1, 2]])
    what = "my_cached_greedy(tally, [[1, 2]], 4, cache), where tally puts the last digit of the sum of all tokens next,"
    with given(what):
        found = yours(tally, prompt, 4, object())
    sizes = [size for size, _ in tally.passes]
    require(bool(sizes), f"{what} should ask the model, but never called it")
    require(all(cached for _, cached in tally.passes), f"{what} called the model without the cache: model(ids, cache)")
    require(sizes[0] == 2, f"{what} should read the whole prompt, 2 tokens, in its first pass, but read {sizes[0]}")
    later = f"{what} should read one token in each later pass, the one just chosen, but its passes read {sizes} tokens"
    require(set(sizes[1:]) <= {1}, f"{later}: the cache holds the others")
    require(len(sizes) <= 5, f"{what} should need 4 passes (5 if it reads the last token too), but made {len(sizes)}")
    require(isinstance(found, Tensor), f"{what} should be a tensor, but is {describe(found)}")
    require(found.shape != (1, 4), f"{what} should begin with the prompt, but has only 4 tokens: {found.tolist()}")
    require_equal(found, torch.tensor([[1, 2, 3, 6, 2, 4]]), what, why="1 + 2 = 3, 1 + 2 + 3 = 6, then 12, then 14")
    require_equal(prompt, torch.tensor([[1, 2]]), "the prompt that my_cached_greedy was given, after the call,")
    what = "my_cached_greedy(tally, [[1, 2]], 0, cache)"
    with given(what):
        require_equal(yours(Tally(), prompt, 0, object()), prompt, what)
    model, tokenizer = shipped_model(), create_tokenizer()
    prompt = prompt_ids(tokenizer, PROMPT)
    room = KVCache(model.config, 1, prompt.shape[1] + 40, torch.device("cpu"), torch.float32)
    what = f"my_cached_greedy(model, prompt, 40, cache) with the shipped model and the prompt {PROMPT!r}"
    with torch.inference_mode(), given(what):
        found = yours(model, prompt, 40, room)
    require_equal(found, likeliest(prompt, 40), what, why="expected is what rereading the whole text gives")
    return f"The shipped model wrote this with your loop:\n{tokenizer.decode(found[0].tolist())}"


def random_splitting(tokens: int, generator: torch.Generator) -> list[int]:
    """Sizes of the passes that a text of `tokens` tokens is cut into: after each token with probability 1/3."""
    cuts = [place for place in range(1, tokens) if torch.rand(1, generator=generator) < 1 / 3]
    edges = [0, *cuts, tokens]
    return [end - start for start, end in itertools.pairwise(edges)]


def random_text(tokens: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, 2048, (1, tokens), generator=generator)


def numbered(tokens: int, first: int = 0) -> Tensor:
    """Rows that can be told apart: `[1, 1, T, 8]`, token t filled with the number first + t."""
    return torch.arange(first, first + tokens).float()[None, None, :, None].expand(1, 1, tokens, 8).contiguous()


@exercise("cached_generation.cache")
def cache(yours: type) -> str:
    """`yours(config, batch_size, capacity, device, dtype)` with update, advance and truncate, as KVCache has them."""
    device = torch.device("cpu")

    def new(config: NeoXConfig, batch_size: int):
        return yours(config, batch_size, 6, device, torch.float32)

    with given("MyKVCache of one layer: update with tokens 0 and 1, advance(2), update with token 2"):
        require_first_steps(new(ONE_LAYER, 1))
    with given("MyKVCache of two layers: update of layer 0, then of layer 1, with two tokens"):
        require_layers_apart(new(TWO_LAYERS, 1))
    with given("MyKVCache with a batch of two texts: update with two tokens each, then with one"):
        require_texts_apart(new(ONE_LAYER, 2))
    with given("MyKVCache of one layer: four tokens, truncate(3), one more token, truncate(0)"):
        require_truncation(new(ONE_LAYER, 1))
    with given("MyKVCache in the shipped model, which reads 24 random tokens in random passes"):
        require_any_splitting(yours)
    for name in ("check_room", "capacity"):
        told = f"MyKVCache has no {name}, which the library uses: take it over from the stub"
        require(hasattr(new(ONE_LAYER, 1), name), told)
    with given(f"MyKVCache in the library's loop, with the prompt {PROMPT!r}"):
        return story_with(KVCache, yours, "MyKVCache", PROMPT)


def require_first_steps(cache) -> None:
    """Two passes through one layer."""
    room = cache.keys.data_ptr()
    key, value = cache.update(0, numbered(2), -numbered(2))
    require_equal(
        key[0, 0, :, 0], torch.tensor([0.0, 1.0]), "the keys from update with tokens 0 and 1, on an empty cache,"
    )
    require(cache.length == 0, f"update alone should leave length at 0, but it is {cache.length}: only advance counts")
    cache.advance(2)
    require(cache.length == 2, f"after advance(2), length should be 2, but is {cache.length}")
    key, value = cache.update(0, numbered(1, 2), -numbered(1, 2))
    what = "update with token 2, after tokens 0 and 1"
    require_equal(key[0, 0, :, 0], torch.tensor([0.0, 1.0, 2.0]), f"the keys from {what},")
    require_equal(value[0, 0, :, 0], torch.tensor([0.0, -1.0, -2.0]), f"the values from {what},")
    shape = list(key.shape)
    require(shape == [1, 1, 3, 8], f"the keys from {what}, should have shape [1, 1, 3, 8], but have {shape}")
    cache.advance(1)
    in_place = cache.keys.data_ptr() == room
    require(in_place, "self.keys was replaced by another tensor: write into the one that __init__ allocated")


def require_layers_apart(cache) -> None:
    """Both layers store the same tokens before anyone counts them."""
    cache.update(0, numbered(2), numbered(2))
    second, _ = cache.update(1, numbered(2, 10), numbered(2, 10))
    require_equal(
        second[0, 0, :, 0], torch.tensor([10.0, 11.0]), "the keys from update of layer 1, after layer 0 stored its own,"
    )
    cache.advance(2)
    first, _ = cache.update(0, numbered(1, 2), numbered(1, 2))
    what = "the keys from update of layer 0, after layer 1 stored its own,"
    require_equal(first[0, 0, :, 0], torch.tensor([0.0, 1.0, 2.0]), what)


def require_texts_apart(cache) -> None:
    """A batch of two texts, each with keys and values of its own."""
    for tokens, held in ((2, 0), (1, 2)):
        rows = torch.cat([numbered(tokens, held), numbered(tokens, 10 + held)])  # [2, 1, T, 8]
        key, value = cache.update(0, rows, -rows)
        cache.advance(tokens)
    for name, found, sign in (("keys", key, 1), ("values", value, -1)):
        for text in (0, 1):
            expected = sign * torch.tensor([0.0, 1.0, 2.0]) + sign * 10 * text
            what = f"the {name} of text {text}, in a batch of two texts with three tokens each,"
            require_equal(found[text, 0, :, 0], expected, what)


def require_truncation(cache) -> None:
    """Going back to a shorter text, and to none."""
    cache.update(0, numbered(4), numbered(4))
    cache.advance(4)
    cache.truncate(3)
    require(cache.length == 3, f"after truncate(3) of 4 tokens, length should be 3, but is {cache.length}")
    key, _ = cache.update(0, numbered(1, 30), numbered(1, 30))
    expected = torch.tensor([0.0, 1.0, 2.0, 30.0])
    require_equal(key[0, 0, :, 0], expected, "the keys from update with token 30, after tokens 0 to 3 and truncate(3),")
    cache.advance(1)
    cache.truncate(0)
    key, _ = cache.update(0, numbered(1, 50), numbered(1, 50))
    require_equal(key[0, 0, :, 0], torch.tensor([50.0]), "the keys from update with token 50, after truncate(0),")


@torch.inference_mode()
def require_any_splitting(yours: type, tries: int = 6) -> None:
    """The shipped model's logits are the same with this cache as without, however a text is cut into passes."""
    model, generator = shipped_model(), torch.Generator().manual_seed(6)
    cache = yours(model.config, 1, 24, torch.device("cpu"), torch.float32)
    for _ in range(tries):
        ids = random_text(24, generator)
        sizes = random_splitting(24, generator)
        cache.truncate(0)
        found = torch.cat([model(chunk, cache) for chunk in ids.split(sizes, dim=1)], dim=1)
        worst = (found - model(ids)).abs().max().item()
        told = f"24 tokens read in passes of {sizes} should give the logits of one pass without a cache"
        require(worst < BOUND, f"{told} to within {BOUND:g}, but they are off by up to {worst:.3g}")


@exercise("cached_generation.top_p")
def top_p(yours: Callable[[Tensor, float], Tensor]) -> str:
    """`yours(probabilities, p)` keeps the fewest tokens that together reach p, renormalised: `[V]` -> `[V]`."""
    four = torch.tensor([0.125, 0.5, 0.25, 0.125])
    cases = [
        (0.625, [0.0, 2 / 3, 1 / 3, 0.0], "0.5 alone falls short of 0.625, so the token that crosses it stays too"),
        (0.75, [0.0, 2 / 3, 1 / 3, 0.0], "0.5 + 0.25 reach 0.75 exactly, so nothing more is kept"),
        (0.25, [0.0, 1.0, 0.0, 0.0], "one token is always kept"),
        (1.0, [0.125, 0.5, 0.25, 0.125], "all are needed to reach 1"),
    ]
    for p, expected, reason in cases:
        what, given_odds = f"my_top_p([0.125, 0.5, 0.25, 0.125], {p})", four.clone()
        with given(what):
            found = yours(given_odds, p)
        require_equal(found, torch.tensor(expected), what, 1e-6, reason)
        require_equal(given_odds, four, f"the probabilities that were handed to {what}, after the call,")
    probabilities = torch.randn(50, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    expected = library_top_p(probabilities, 0.8)
    what = f"my_top_p of 50 random probabilities with p = 0.8, which keeps {int((expected > 0).sum())} of them,"
    with given(what):
        require_equal(yours(probabilities, 0.8), expected, what, 1e-5)
    with given(f"my_top_p of the shipped model's 2,048 probabilities after {PROMPT!r}, with p = 0.9,"):
        written = drawn_story(yours)
    expected = drawn_story(library_top_p)
    require(written == expected, f"The story drawn with your my_top_p should be\n{expected}\n\nbut is\n{written}")
    return f"The shipped model drew this with your my_top_p, p = 0.9:\n{written}"


def library_top_p(probabilities: Tensor, p: float) -> Tensor:
    rows = probabilities[None]
    return renormalize(rows, top_p_mask(rows, rows.argsort(dim=-1, descending=True, stable=True), p))[0]


@torch.inference_mode()
def drawn_story(cut: Callable[[Tensor, float], Tensor], new_tokens: int = 40) -> str:
    """A text of the shipped model, each token drawn from `cut(probabilities [V], 0.9)`, always with the same seed."""
    model, tokenizer, generator = shipped_model(), create_tokenizer(), torch.Generator().manual_seed(0)
    ids = prompt_ids(tokenizer, PROMPT)
    room = KVCache(model.config, 1, ids.shape[1] + new_tokens, torch.device("cpu"), torch.float32)
    unread = ids
    for _ in range(new_tokens):
        probabilities = prefill(model, unread, room)[0].double().softmax(dim=-1)
        unread = torch.multinomial(cut(probabilities, 0.9), 1, generator=generator)[None]
        ids = torch.cat([ids, unread], dim=1)
    return tokenizer.decode(ids[0].tolist())
