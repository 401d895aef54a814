"""The exercises of notebook 11: the logit lens, what each part adds to a logit, a patch, and attention head by head."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from neox_lib.config import NeoXConfig
from neox_lib.course.checks import PropertyFailed, describe, exercise, given, require, require_equal
from neox_lib.course.figures.plots import seeded
from neox_lib.model import NeoXModel

PROMPT, OTHER = ("Once upon a time there was a " + who + ". One day," for who in ("girl", "boy"))
SMALL = NeoXConfig(
    vocab_size=12,
    tokenizer_vocab_size=12,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    rotary_pct=0.5,
)
IDS = torch.tensor([[3, 1, 4, 1, 5]])


@functools.cache
@torch.no_grad()
def small_model() -> NeoXModel:
    """Two layers with random weights: its norms and biases do something, as trained ones do."""
    model = NeoXModel(SMALL).requires_grad_(False)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        parameter.copy_(0.5 * seeded(*parameter.shape, seed=number) + (1.0 if name.endswith("norm.weight") else 0.2))
    return model


def streams_of(model: NeoXModel, ids: Tensor) -> Tensor:
    """What `on_layer` sees: `[L + 1, B, T, C]`."""
    seen: list[Tensor] = []
    model(ids, on_layer=lambda depth, hidden: seen.append(hidden.clone()))
    return torch.stack(seen)


def require_none_of(found, expected: Tensor, mistakes: dict[str, Tensor], what: str) -> None:
    """Raise PropertyFailed, naming the mistake, if `found` is one of the usual wrong answers and not the right one."""
    if isinstance(found, Tensor) and found.is_floating_point():
        for mistake, wrong in mistakes.items():
            same, right = (
                found.shape == each.shape and torch.allclose(found.double(), each.double(), atol=1e-5)
                for each in (wrong, expected)
            )
            require(right or not same, f"{what} has the wrong values: {mistake}")


@exercise("look_inside.logit_lens")
@torch.no_grad()
def logit_lens(yours: Callable[[NeoXModel, Tensor], Tensor]) -> str:
    """`yours(model, input_ids)` is the model's reading of the stream after each layer: `[L + 1, B, T, V]`."""
    model, what = small_model(), "my_logit_lens(a model of 2 layers, ids [1, 5])"
    streams = streams_of(model, IDS)
    read = lambda stream: model.final_linear(model.norm(stream))  # noqa: E731
    expected = read(streams)
    with given(what):
        found = yours(model, IDS.clone())
    if isinstance(found, list | tuple):
        raise PropertyFailed(f"{what} should be a tensor, but is {describe(found)}: stack the layers")
    shapes = {
        (2, 1, 5, 12): "there should be a row before the first layer, one between, and one after the last: L + 1",
        (3, 1, 5, 8): "these are still streams: the output matrix makes logits of them",
        (3, 5, 12): "the batch is missing",
        (3, 1, 1, 12): "all positions are wanted, not the last one only",
    }
    if isinstance(found, Tensor) and (why := shapes.get(tuple(found.shape))):
        raise PropertyFailed(f"{what} has shape {list(found.shape)}, expected [3, 1, 5, 12]: {why}")
    mistakes = {
        "the last norm is missing before the output matrix": model.final_linear(streams),
        "the stream goes through the last norm twice": read(model.norm(streams)),
        "these are probabilities: leave out the softmax": expected.softmax(dim=-1),
        "these are log-probabilities: leave out the softmax": expected.log_softmax(dim=-1),
        "every row is the same layer: read each stream": expected[-1:].expand_as(expected),
        "the rows are in the wrong order: the embedding comes first": expected.flip(0),
        "a layer's own norm stands where the model's last norm belongs": model.final_linear(
            model.layers[0].input_layernorm(streams)  # type: ignore[operator, union-attr]
        ),
    }
    require_none_of(found, expected, mistakes, what)
    require_equal(found, expected, what, tolerance=1e-4)
    with given("my_logit_lens(a model of 2 layers, ids [2, 3])"):
        found = yours(model, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    require_equal(tuple(found.shape), (3, 2, 3, 12), "the shape of my_logit_lens for a batch of two texts of 3 tokens")
    return "The last row is the model's own answer; the others are what it would say if it stopped there."


@exercise("look_inside.attribute")
@torch.no_grad()
def attribute(yours: Callable[[Tensor, nn.LayerNorm, Tensor], Tensor]) -> str:
    """`yours(parts, norm, row)` is what each part adds to a logit, and the norm's bias at the end: `[N + 1]`."""
    by_hand = nn.LayerNorm(2, eps=0.0)
    plain = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), by_hand, torch.tensor([1.0, -1.0])
    learned = nn.LayerNorm(6, eps=0.1)
    learned.weight.copy_(1 + 0.5 * seeded(6, seed=1))
    learned.bias.copy_(seeded(6, seed=2))
    random = seeded(4, 6) + 0.7, learned, seeded(6, seed=3)
    cases = (
        ("my_attribute([[1, 0], [2, 0], [0, 1]], a plain norm, row [1, -1])", *plain),
        ("my_attribute(four random parts, a norm with weight and bias, a random row)", *random),
    )
    for what, parts, norm, row in cases:
        total = parts.sum(dim=0)
        deviation = (total.var(unbiased=False) + norm.eps).sqrt()
        centred, bias = parts - parts.mean(dim=-1, keepdim=True), (norm.bias @ row)[None]
        expected = torch.cat([(norm.weight * centred / deviation) @ row, bias])
        with given(what):
            found = yours(parts.clone(), norm, row.clone())
        right_but = lambda added, bias=bias: torch.cat([added @ row, bias])  # noqa: E731, B023
        scaled = norm.weight * centred
        own = (parts.var(dim=-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        mistakes = {
            "the parts' own means are not subtracted": right_but(norm.weight * parts / deviation),
            "each part is divided by its own deviation: the norm divides all by that of their sum": right_but(
                scaled / own
            ),
            "each part goes through the norm by itself: its deviation and its bias belong to the sum": torch.cat(
                [norm(parts) @ row, bias]
            ),
            "the norm's weight is left out": right_but(centred / deviation),
            "the norm's bias is left out": torch.cat([expected[:-1], torch.zeros(1)]),
            "the deviation is that of `unbiased=True`; a LayerNorm divides by n, not by n - 1": right_but(
                scaled / (total.var() + norm.eps).sqrt()
            ),
            "eps is left out": right_but(scaled / total.var(unbiased=False).sqrt()),
        }
        require_none_of(found, expected, mistakes, what)
        count = len(parts)
        if isinstance(found, Tensor) and tuple(found.shape) == (count,):
            told = f"{what} gives {count} numbers, expected {count + 1}"
            raise PropertyFailed(f"{told}: what the norm's bias adds, row times bias, comes last")
        require_equal(found, expected, what, tolerance=1e-4)
        require_equal(found.sum(), norm(total) @ row, f"the sum of {what}, which should be the logit,", tolerance=1e-4)
    return "What you attribute adds up to the logit."


def read_with(model: NeoXModel, ids: Tensor, depth: int, position: int | slice, value: Tensor) -> Tensor:
    """The logits when layer `depth` reads `value` at a position, computed without a hook."""
    cos, sin = model.rotary.rows(0, ids.shape[1], like=model.norm.weight)
    hidden = model.word_embeddings(ids)
    for number, layer in enumerate(model.layers):
        if number == depth:
            hidden = hidden.clone()
            hidden[:, position] = value
        hidden = layer(hidden, cos, sin)
    return model.final_linear(model.norm(hidden))


@exercise("look_inside.patch")
@torch.no_grad()
def patch(yours: Callable) -> str:
    """`yours(model, depth, position, value)` lets a layer read `value` at a position, until its handle is removed."""
    model = small_model()
    before, value = model(IDS), seeded(8, seed=9)
    try:
        for depth, position in ((0, 1), (1, 2)):
            what, seen = f"With my_patch(model, {depth}, {position}, value)", []
            with given(what):
                handle = yours(model, depth, position, value.clone())
            told = f"my_patch should return the handle of its pre-hook, but returns {describe(handle)}"
            require(hasattr(handle, "remove"), told)
            with given(what):
                found = model(IDS, on_layer=lambda _, hidden, seen=seen: seen.append((hidden, hidden.clone())))
            whole, plain = slice(None), model_without(model)
            expected = read_with(plain, IDS, depth, position, value)
            mistakes = {
                "nothing has changed: the hook has to return the new inputs": before,
                "every position is replaced: only one should be": read_with(plain, IDS, depth, whole, value),
                "another layer reads it: `depth` counts layers from 0": read_with(
                    plain, IDS, 1 - depth, position, value
                ),
                "it is added to what was there: put it in its place": read_with(
                    plain, IDS, depth, position, streams_of(plain, IDS)[depth, 0, position] + value
                ),
            }
            require_none_of(found, expected, mistakes, f"{what}, the logits")
            require_equal(found, expected, f"{what}, the logits", tolerance=1e-4)
            untouched = all(torch.equal(now, then) for now, then in seen)
            told = f"{what}, the stream that came in is changed in place, for all who hold it"
            require(untouched, f"{told}: write into a clone")
            handle.remove()
            told = f"{what}, then handle.remove(), the model should be as before, but is not"
            require(torch.equal(model(IDS), before), f"{told}: return the handle of your own hook, and set one only")
    finally:
        clear_hooks(model)
    return story_with_patch(yours)


def model_without(model: NeoXModel) -> NeoXModel:
    """The same weights in a model without hooks."""
    other = NeoXModel(SMALL).requires_grad_(False)
    other.load_state_dict(model.state_dict())
    return other


def clear_hooks(model: NeoXModel) -> None:
    """Remove what a wrong try has left on the layers: the next try must not meet it."""
    for layer in model.layers:
        layer._forward_pre_hooks.clear()
        layer._forward_hooks.clear()


def story_with_patch(yours: Callable) -> str:
    """The shipped model reads one word, and your patch puts another's vector there: what it writes."""
    from neox_lib.generation import prompt_ids, stream_generate
    from neox_lib.loading import create_model, create_tokenizer

    model, tokenizer = create_model(device="cpu", dtype="float32"), create_tokenizer()
    ids, other = prompt_ids(tokenizer, PROMPT), prompt_ids(tokenizer, OTHER)
    position = int((ids != other)[0].nonzero()[0])
    with yours(model, 0, position, streams_of(model, other)[0, 0, position]):
        steps = stream_generate(model, ids, 40, tokenizer=tokenizer, use_cache=False)
        written = PROMPT + "".join(step.text for step in steps)
    return f'The shipped model read "girl", with the vector of "boy" patched in by you, and wrote this:\n{written}'


@exercise("look_inside.split_dense")
@torch.no_grad()
def split_dense(yours: Callable[[Tensor, Tensor, int], Tensor]) -> str:
    """`yours(merged, weight, num_heads)` is what each head adds through `dense`: `[H, ..., C]`."""
    small = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 10.0], [100.0, 1000.0]]), 2
    cases = (
        ("my_split_dense([1, 2], [[1, 10], [100, 1000]], 2 heads)", *small),
        ("my_split_dense(random [2, 3, 8], random [8, 8], 4 heads)", seeded(2, 3, 8), seeded(8, 8, seed=1), 4),
    )
    for what, merged, weight, heads in cases:
        size = merged.shape[-1] // heads
        ranges = [slice(head * size, (head + 1) * size) for head in range(heads)]
        expected = torch.stack([merged[..., own] @ weight[:, own].T for own in ranges])
        with given(what):
            found = yours(merged.clone(), weight.clone(), heads)
        if isinstance(found, list | tuple):
            raise PropertyFailed(f"{what} should be a tensor, but is {describe(found)}: stack the heads")
        every_nth = torch.stack([merged[..., head::heads] @ weight[:, head::heads].T for head in range(heads)])
        mistakes = {
            "the weight is cut by rows, which are outputs: a head's numbers meet columns": torch.stack(
                [merged[..., own] @ weight[own] for own in ranges]
            ),
            "the heads lie one after the other, not in turns": every_nth,
            "every head has all of attention's output: give each its own slice": torch.stack(
                [merged @ weight.T] * heads
            ),
        }
        require_none_of(found, expected, mistakes, what)
        if isinstance(found, Tensor) and tuple(found.shape) == (2, 3, 4, 8):
            raise PropertyFailed(f"{what} has shape {list(found.shape)}: heads come first, [4, 2, 3, 8]")
        require_equal(found, expected, what, tolerance=1e-4)
        told = f"the sum over heads of {what}, which should be what dense gives,"
        require_equal(found.sum(dim=0), merged @ weight.T, told, tolerance=1e-4)
    return "The heads' parts add up to what dense gives."
