"""The exercises of notebook 06: the greedy loop, the cache, and top-p."""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from neox_lib.cache import KVCache
from neox_lib.config import NeoXConfig
from neox_lib.course.checks import exercise, require, require_equal, story_with
from neox_lib.generation import prompt_ids
from neox_lib.loading import create_model, create_tokenizer
from neox_lib.model import NeoXModel
from neox_lib.sampling import Sampling

BOUND = 1e-3  # fp32 rounding moves these logits by about 1e-5, a wrong cache by whole units
ONE_LAYER = NeoXConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32)
TWO_LAYERS = NeoXConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=32)


@functools.cache
def shipped_model() -> NeoXModel:
    return create_model(device="cpu", dtype="float32")


def countdown(input_ids: Tensor) -> Tensor:
    """Stands in for a model that puts 4 after 5, 3 after 4, and 9 after 0: ids `[B, T]` -> logits `[B, T, 10]`."""
    return torch.nn.functional.one_hot((input_ids - 1) % 10, 10).float()


@exercise("cached_generation.greedy")
def greedy(yours: Callable[[NeoXModel, Tensor, int], Tensor]) -> str:
    """`yours(model, input_ids, new_tokens)` -> the prompt and its likeliest continuation, `[1, T + new_tokens]`."""
    prompt = torch.tensor([[7, 2, 5]])
    found = yours(countdown, prompt, 4)  # type: ignore[arg-type]
    what = "my_greedy(countdown, [[7, 2, 5]], 4), where countdown puts i - 1 after i,"
    require_equal(found, torch.tensor([[7, 2, 5, 4, 3, 2, 1]]), what)
    require_equal(prompt, torch.tensor([[7, 2, 5]]), "the prompt that my_greedy was given, after the call,")
    require_equal(yours(countdown, prompt, 0), prompt, "my_greedy(countdown, [[7, 2, 5]], 0)")  # type: ignore[arg-type]
    prompt = prompt_ids(create_tokenizer(), "Once upon a time, a fox")
    model, expected = shipped_model(), prompt
    with torch.inference_mode():
        for _ in range(12):
            chosen = model(expected, last_only=True)[:, -1].argmax(dim=-1, keepdim=True)
            expected = torch.cat([expected, chosen], dim=1)
        found = yours(model, prompt, 12)
    same = int((found == expected).long().cumprod(dim=1).sum()) - prompt.shape[1]
    require(
        same == 12,
        f"my_greedy with the shipped model should add the 12 likeliest tokens, but only the first {same} are right, "
        "though countdown came out right: does every pass read the whole text so far, prompt included?",
    )
    return "Your loop writes what the library's writes, with countdown and with the shipped model."


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
    require_first_steps(yours(ONE_LAYER, 1, 6, device, torch.float32))
    require_layers_apart(yours(TWO_LAYERS, 1, 6, device, torch.float32))
    require_texts_apart(yours(ONE_LAYER, 2, 6, device, torch.float32))
    require_truncation(yours(ONE_LAYER, 1, 6, device, torch.float32))
    require_any_splitting(yours)

    class Fitted(yours):  # type: ignore[misc, valid-type]
        """The learner's cache, with the method that the library's loop calls before it starts."""

        def check_room(self, batch_size: int, tokens: int) -> None:
            pass

    return story_with(KVCache, Fitted, "MyKVCache")


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
def top_p(yours: Callable[[Tensor, float], Tensor]) -> None:
    """`yours(probabilities, p)` keeps the fewest tokens that together reach p, renormalised: `[V]` -> `[V]`."""
    four = torch.tensor([0.125, 0.5, 0.25, 0.125])
    cases = [
        (0.625, [0.0, 2 / 3, 1 / 3, 0.0], "0.5 alone falls short of 0.625, so the token that crosses it stays too"),
        (0.75, [0.0, 2 / 3, 1 / 3, 0.0], "0.5 + 0.25 reach 0.75 exactly, so nothing more is kept"),
        (0.25, [0.0, 1.0, 0.0, 0.0], "one token is always kept"),
        (1.0, [0.125, 0.5, 0.25, 0.125], "all are needed to reach 1"),
    ]
    for p, expected, reason in cases:
        found = yours(four.clone(), p)
        require_equal(found, torch.tensor(expected), f"my_top_p([0.125, 0.5, 0.25, 0.125], {p})", 1e-6, reason)
    probabilities = torch.randn(50, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    expected = Sampling(temperature=1, top_p=0.8).probabilities(probabilities.log()[None])[0].float()
    kept = int((expected > 0).sum())
    what = f"my_top_p of 50 random probabilities with p = 0.8, which keeps {kept} of them,"
    require_equal(yours(probabilities, 0.8), expected, what, 1e-5)
