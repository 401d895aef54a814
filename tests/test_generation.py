"""The one loop that writes text: what it emits, when it stops, what it refuses, and what it leaves behind."""

import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neox_lib import generation
from neox_lib.__main__ import build_parser
from neox_lib.attention import Attention
from neox_lib.cache import KVCache
from neox_lib.cli import generate
from neox_lib.config import NeoXConfig
from neox_lib.evaluation.likelihood import token_log_probabilities
from neox_lib.generation import Step, greedy_generate, prefill, stream_generate
from neox_lib.model import NeoXModel
from neox_lib.sampling import Sampling

SMALL = NeoXConfig(
    vocab_size=64,
    tokenizer_vocab_size=60,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=128,
)
WARM = Sampling(temperature=1.3, top_k=20, seed=11)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, ...]]:
    """The shape of the ids of every forward pass that any model runs from here on."""
    seen: list[tuple[int, ...]] = []
    real = NeoXModel.forward

    def counted(self, input_ids, *more, **named):
        seen.append(tuple(input_ids.shape))
        return real(self, input_ids, *more, **named)

    monkeypatch.setattr(NeoXModel, "forward", counted)
    return seen


def write(model: NeoXModel, ids: Tensor, new: int, **how) -> list[Step]:
    return list(stream_generate(model, ids, new, **{"stop_token_ids": (), **how}))


def tokens_of(steps: list[Step]) -> list[list[int]]:
    return [step.token_ids for step in steps]


def assert_same(found: list[Step], expected: list[Step]) -> None:
    """The same tokens, and log-probabilities that agree to 1e-5."""
    assert tokens_of(found) == tokens_of(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.log_probabilities == pytest.approx(theirs.log_probabilities, abs=1e-5)


def finished(ids: Tensor, steps: list[Step]) -> Tensor:
    """Prompt and new tokens, `[B, T + steps]`."""
    return torch.cat([ids, torch.tensor(tokens_of(steps)).T], dim=1)


def room(model: NeoXModel, batch: int, capacity: int) -> KVCache:
    return KVCache(model.config, batch, capacity, torch.device("cpu"), torch.float32)


def chain_model(follows: dict[int, int], padded_wins: bool = False) -> NeoXModel:
    """A model that always puts `follows[i]` after token i: no layer adds anything, the output matrix is a table.

    With `padded_wins` the rows past the tokenizer's 10 tokens, which stand for no token, get the largest logits.
    """
    config = replace(SMALL, vocab_size=16, tokenizer_vocab_size=10, num_hidden_layers=1)
    model = NeoXModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.word_embeddings.weight.copy_(torch.eye(16, config.hidden_size))
        model.norm.weight.fill_(1)
        model.norm.bias.fill_(1)
        for token, following in follows.items():
            model.final_linear.weight[following, token] = 3.0
        if padded_wins:
            model.final_linear.weight[10:] = 100.0
    return model


COUNTDOWN = {token: token - 1 for token in range(1, 10)} | {0: 9}


# Equality with a model that we did not write.


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "shape",
    [{}, {"rotary_pct": 1.0, "hidden_act": "gelu"}, {"use_parallel_residual": False}],
    ids=["20b rules", "exact, rotary 100 %", "sequential"],
)
@torch.inference_mode()
def test_greedy_equals_hugging_face_for_100_steps(twins, token_ids, batch, shape):
    """Without this no text that the lessons show need be the model's own."""
    config = replace(SMALL, vocab_size=512, tokenizer_vocab_size=512, **shape)
    ours, theirs = twins(config, seed=batch, attention="sdpa")
    ids = token_ids(config, batch, 20)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=100, do_sample=False, use_cache=True, pad_token_id=1
    )
    found = finished(ids, write(ours, ids, 100))
    assert len(found[:, 20:].unique()) > 10, "a model that repeats itself would prove little"
    assert torch.equal(found, expected)


@torch.inference_mode()
def test_endings_equal_hugging_face(twins, token_ids):
    """Each row of a batch stops at its own endoftext, as in Hugging Face when told that it is 0 and not 2."""
    config = replace(SMALL, vocab_size=24, tokenizer_vocab_size=24)
    ours, theirs = twins(config, seed=2, attention="sdpa")
    ids = token_ids(config, 8, 5) % 22 + 2
    theirs.generation_config.eos_token_id = 0
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False, pad_token_id=0
    ).tolist()
    found = greedy_generate(ours, ids, 65)
    lengths = {len(row) for row in found}
    assert len(lengths) > 2, "the rows must end at different steps"
    for row, theirs_row in zip(found, expected, strict=True):
        assert row == theirs_row[: len(row)]
        assert not any(theirs_row[len(row) :])


# Where it stops.


def test_stops_at_endoftext_unless_told_otherwise():
    """The reference implementation never stops; Hugging Face's class default, 2, is another token."""
    model, prompt = chain_model(COUNTDOWN), torch.tensor([[5]])
    assert tokens_of(list(stream_generate(model, prompt, 20))) == [[4], [3], [2], [1], [0]]
    assert tokens_of(write(model, prompt, 8)) == [[4], [3], [2], [1], [0], [9], [8], [7]]
    assert tokens_of(write(model, prompt, 8, stop_token_ids=(2,))) == [[4], [3], [2]]
    assert tokens_of(write(model, prompt, 8, stop_token_ids=(1, 3))) == [[4], [3]]


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_each_row_of_a_batch_ends_on_its_own(random_model, token_ids, use_cache, sampling):
    """A row that has ended repeats its stop token at log-probability 0, and does not end or change the others."""
    model, ids = random_model(SMALL), token_ids(SMALL, 3, 5)
    endless = write(model, ids, 20, use_cache=use_cache, sampling=sampling)
    rows = [list(row) for row in zip(*tokens_of(endless), strict=True)]  # what each row writes if nothing ends it
    stops = (rows[0][2], rows[1][6])
    ends = [next((index for index, token in enumerate(row) if token in stops), 19) for row in rows]
    assert len(set(ends)) > 1, "the rows must end at different steps"
    found = write(model, ids, 20, use_cache=use_cache, sampling=sampling, stop_token_ids=stops)
    assert len(found) == max(ends) + 1
    for index, step in enumerate(found):
        for row in range(3):
            if index <= ends[row]:
                assert step.token_ids[row] == rows[row][index]
                assert step.log_probabilities[row] == pytest.approx(endless[index].log_probabilities[row], abs=1e-5)
            else:
                assert (step.token_ids[row], step.log_probabilities[row]) == (rows[row][ends[row]], 0.0)


@pytest.mark.parametrize("new", [0, 1, 7])
def test_no_more_tokens_than_asked_for(random_model, token_ids, new):
    assert len(write(random_model(SMALL), token_ids(SMALL, 2, 5), new)) == new


# Rows of the vocabulary that stand for no token.


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0), Sampling(temperature=50.0, top_p=0.99)], ids=repr
)
def test_a_padded_row_is_never_emitted(sampling):
    """155 rows of 20B belong to no token and no tokenizer can decode them, however large their logits are."""
    model = chain_model(COUNTDOWN, padded_wins=True)
    for seed in range(5):
        steps = write(model, torch.tensor([[5], [7]]), 40, sampling=replace(sampling, seed=seed))
        assert max(max(step.token_ids) for step in steps) < 10


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)], ids=repr)
def test_without_the_rule_a_padded_row_would_come_out(sampling):
    """The same model with the rule taken out: it does prefer the rows that stand for nothing."""
    model = chain_model(COUNTDOWN, padded_wins=True)
    model.config = replace(model.config, tokenizer_vocab_size=model.config.vocab_size)
    assert all(step.token_id >= 10 for step in write(model, torch.tensor([[5]]), 10, sampling=sampling))


def test_padded_rows_take_no_share_of_the_probability():
    """Log-probabilities are over real tokens only, or a padded model would look worse than it is."""
    sure, padded = chain_model(COUNTDOWN), chain_model(COUNTDOWN, padded_wins=True)
    prompt = torch.tensor([[5]])
    assert_same(write(padded, prompt, 5), write(sure, prompt, 5))


# Where the context ends.


def test_the_whole_context_can_be_used(random_model, token_ids):
    """2,048 tokens, new ones included, and not one less."""
    config = replace(SMALL, num_hidden_layers=1, max_position_embeddings=2048)
    model, ids = random_model(config), token_ids(config, 1, 2041)
    steps = write(model, ids, 7)
    assert len(steps) == 7
    with torch.inference_mode():
        logits = model(finished(ids, steps))[0, 2040:-1, :60]
    assert logits.argmax(-1).tolist() == [step.token_id for step in steps]


@pytest.mark.parametrize(("prompt", "new"), [(128, 1), (120, 9), (1, 128), (129, 0), (200, 5)])
def test_past_the_context_is_refused_before_any_work(random_model, token_ids, passes, prompt, new):
    """Indexing beyond the rotary table, or minutes of prefill first, would be the alternatives."""
    model = random_model(SMALL)
    with pytest.raises(ValueError, match=rf"{prompt} tokens \+ {new} new ones = {prompt + new}, .* holds 128"):
        stream_generate(model, token_ids(SMALL, 1, prompt), new)
    assert passes == []


def test_a_negative_count_is_refused(random_model, token_ids, passes):
    with pytest.raises(ValueError, match="max_new_tokens must be 0 or more, got -1"):
        stream_generate(random_model(SMALL), token_ids(SMALL, 1, 4), -1)
    assert passes == []


@pytest.mark.parametrize("chunk_size", [0, -4])
def test_a_chunk_of_no_tokens_is_refused(random_model, token_ids, chunk_size):
    with pytest.raises(ValueError, match=rf"chunk_size must be at least 1 token, got {chunk_size}"):
        stream_generate(random_model(SMALL), token_ids(SMALL, 1, 4), 1, chunk_size=chunk_size)


BAD_IDS = {
    "too large": (torch.tensor([[3, 64]]), r"token id 64 .* 0 to 63"),
    "negative": (torch.tensor([[3, -2]]), r"token id -2 .* 0 to 63"),
    "one row": (torch.tensor([3, 4]), r"\[batch, tokens\] .* got \[2\]"),
    "three dimensions": (torch.tensor([[[3]]]), r"\[batch, tokens\] .* got \[1, 1, 1\]"),
    "a number": (torch.tensor(3), r"\[batch, tokens\] .* got \[\]"),
    "no token": (torch.empty(1, 0, dtype=torch.long), r"at least one token, got \[1, 0\]"),
    "no row": (torch.empty(0, 3, dtype=torch.long), r"at least one token, got \[0, 3\]"),
    "fractions": (torch.tensor([[1.0]]), r"int64 or int32, got torch.float32"),
    "truth values": (torch.tensor([[True]]), r"int64 or int32, got torch.bool"),
    "one list": ([3, 4], r"\[batch, tokens\] .* got \[1\]"),
}


@pytest.mark.parametrize("case", BAD_IDS)
@pytest.mark.parametrize("generate", [stream_generate, greedy_generate])
def test_bad_ids_are_named_with_their_range(random_model, passes, case, generate):
    """An index error from the depths of the embedding tells a learner nothing."""
    ids, message = BAD_IDS[case]
    with pytest.raises(ValueError, match=message):
        generate(random_model(SMALL), ids, 5)
    assert passes == []


@pytest.mark.parametrize("use_cache", [True, False])
def test_int32_ids_do_as_well(random_model, token_ids, use_cache):
    model, ids = random_model(SMALL), token_ids(SMALL, 2, 6)
    assert_same(write(model, ids.int(), 6, use_cache=use_cache), write(model, ids, 6))


# The cache changes the time, not the text.


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
def test_every_chunk_size_writes_the_same(random_model, token_ids, passes, sampling):
    """How a long prompt is cut is a matter of memory alone; so is whether there is a cache."""
    model = random_model(SMALL)

    @settings(max_examples=25, deadline=None)
    @given(prompt=st.integers(1, 40), chunk_size=st.integers(1, 45), batch=st.integers(1, 3), seed=st.integers(0, 999))
    def check(prompt, chunk_size, batch, seed):
        ids = token_ids(SMALL, batch, prompt, seed)
        expected = write(model, ids, 6, sampling=sampling, use_cache=False)
        passes.clear()
        assert_same(write(model, ids, 6, sampling=sampling, chunk_size=chunk_size), expected)
        assert max(tokens for _, tokens in passes) == min(prompt, chunk_size)

    check()


def test_a_step_after_the_first_sends_one_token(random_model, token_ids, passes):
    """Otherwise every new token would cost the whole text again."""
    model, ids = random_model(SMALL), token_ids(SMALL, 2, 10)
    write(model, ids, 4)
    assert passes == [(2, 10), (2, 1), (2, 1), (2, 1)]
    passes.clear()
    write(model, ids, 4, use_cache=False)
    assert passes == [(2, 10), (2, 11), (2, 12), (2, 13)]


def test_the_model_says_whether_to_cache_by_default(random_model, token_ids, passes):
    """`create_model(path, use_cache=False)` means what it says."""
    model = random_model(SMALL)
    model.use_cache = False
    write(model, token_ids(SMALL, 1, 5), 3)
    assert passes == [(1, 5), (1, 6), (1, 7)]
    passes.clear()
    write(model, token_ids(SMALL, 1, 5), 3, use_cache=True)
    assert passes == [(1, 5), (1, 1), (1, 1)]


def test_a_held_prefix_is_not_computed_again(random_model, token_ids, passes):
    """To continue a text, or to branch off it, gives what starting anew gives, for less."""
    model = random_model(SMALL)

    @settings(max_examples=25, deadline=None)
    @given(first=st.integers(1, 20), more=st.integers(1, 20), keep=st.integers(0, 60), seed=st.integers(0, 999))
    def check(first, more, keep, seed):
        cache = room(model, 1, 80)
        ids = token_ids(SMALL, 1, first, seed)
        text = finished(ids, write(model, ids, 8, cache=cache))
        assert cache.length == text.shape[1] - 1
        longer = torch.cat([text, token_ids(SMALL, 1, more, seed + 1)], dim=1)
        expected = write(model, longer, 6, use_cache=False)
        passes.clear()
        assert_same(write(model, longer, 6, cache=cache), expected)
        assert passes[0] == (1, more + 1)
        keep = min(keep, first)  # then another way on from the prompt
        cache.truncate(keep)
        branch = torch.cat([ids[:, :keep], token_ids(SMALL, 1, more, seed + 2)], dim=1)
        assert_same(write(model, branch, 6, cache=cache), write(model, branch, 6, use_cache=False))

    check()


def test_a_cache_that_holds_the_whole_prompt_is_enough(random_model, token_ids, passes):
    """Asking again, or rewriting the end: the last token goes through once more, since its scores were not kept."""
    model, ids = random_model(SMALL), token_ids(SMALL, 2, 10)
    cache = room(model, 2, 20)
    first = write(model, ids, 10, cache=cache)
    passes.clear()
    assert_same(write(model, ids, 10, cache=cache), first)
    assert passes[0] == (2, 1)
    shorter = ids[:, :4]
    assert_same(write(model, shorter, 5, cache=cache), write(model, shorter, 5))


def test_a_stream_that_is_never_read_leaves_the_cache_alone(random_model, token_ids):
    model, ids = random_model(SMALL), token_ids(SMALL, 1, 10)
    cache = room(model, 1, 20)
    write(model, ids, 5, cache=cache)
    stream_generate(model, ids, 5, cache=cache)
    assert cache.length == 14


@pytest.mark.parametrize(("batch", "capacity"), [(1, 13), (2, 14), (1, 3)])
def test_a_cache_that_is_too_small_is_refused_before_any_work(random_model, token_ids, passes, batch, capacity):
    """Breaking off in the middle of a text would be late to say so."""
    model = random_model(SMALL)
    with pytest.raises(ValueError, match=rf"{batch} x {capacity} tokens .* 1 x 14 do not fit"):
        stream_generate(model, token_ids(SMALL, 1, 10), 5, cache=room(model, batch, capacity))
    assert passes == []


def test_the_smallest_cache_that_fits_is_enough(random_model, token_ids):
    """The last new token never goes through the model."""
    model, ids = random_model(SMALL), token_ids(SMALL, 1, 10)
    assert_same(write(model, ids, 5, cache=room(model, 1, 14)), write(model, ids, 5))


def test_rows_of_a_batch_do_not_see_each_other(random_model, token_ids):
    model, ids = random_model(SMALL), token_ids(SMALL, 3, 9)
    together = tokens_of(write(model, ids, 12))
    for row in range(3):
        assert [[tokens[row]] for tokens in together] == tokens_of(write(model, ids[row : row + 1], 12))


# What a step says.


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_log_probabilities_are_those_of_the_finished_text(random_model, token_ids, sampling, use_cache):
    """They are the model's own, before temperature and cuts, so that texts can be compared."""
    model, ids = random_model(SMALL), token_ids(SMALL, 2, 9)
    steps = write(model, ids, 15, sampling=sampling, use_cache=use_cache)
    expected = token_log_probabilities(model, finished(ids, steps))[:, 8:]
    found = torch.tensor([step.log_probabilities for step in steps]).T
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [Sampling(), WARM, Sampling(temperature=1.0)], ids=["greedy", "cut", "drawn"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_scores_that_are_no_numbers_end_the_text_at_their_step(random_model, token_ids, bad, sampling, use_cache):
    """Of NaN the highest is token 0, the end of the text: a damaged model would seem to have nothing to say."""
    model, ids = random_model(SMALL), token_ids(SMALL, 2, 5)
    good = tokens_of(write(model, ids, 4, sampling=sampling, use_cache=use_cache))
    read = [*ids.tolist(), *good]  # what both rows have read, prompts and then steps
    last = next(step for step in range(3) if all(good[step][1] not in each for each in read[: 2 + step]))
    model.word_embeddings.weight.data[good[last][1]] = bad
    seen = []
    with pytest.raises(ValueError, match=r"scores of row \d are NaN or infinite: .* dtype float32"):
        for step in stream_generate(model, ids, 4, sampling=sampling, use_cache=use_cache, stop_token_ids=()):
            seen.append(step.token_ids)
    assert seen == good[: last + 1]


def test_a_row_that_has_ended_may_have_any_scores(random_model, token_ids):
    """What an ended row goes on to compute is nobody's text, and must not cost the others theirs."""
    model, ids = random_model(SMALL), token_ids(SMALL, 2, 5)
    for sampling in (Sampling(), WARM):
        good = tokens_of(write(model, ids, 8, sampling=sampling))
        stop = good[0][0]
        assert all(stop not in (step[1], *ids.flatten().tolist()) for step in good)
        broken = random_model(SMALL)
        broken.word_embeddings.weight.data[stop] = float("nan")
        found = tokens_of(write(broken, ids, 8, sampling=sampling, stop_token_ids=(stop,)))
        assert [step[1] for step in found] == [step[1] for step in good]


def test_a_step_is_made_of_plain_python_values(random_model, token_ids):
    """The reference implementation's 0-d tensors hold memory, print badly and are no dictionary keys."""
    steps = write(random_model(SMALL), token_ids(SMALL, 2, 4), 3)
    for step in steps:
        assert {type(value) for value in step.token_ids} == {int}
        assert {type(value) for value in step.log_probabilities} == {float}
        assert step.texts == ["", ""]
        assert type(step.seconds) is float
        assert step.seconds > 0
        assert (step.token_id, step.text) == (step.token_ids[0], step.texts[0])
        assert step.log_probability == step.log_probabilities[0] < 0


def test_seconds_count_the_prefill_but_not_the_reader(random_model, token_ids, monkeypatch):
    """Tokens per second must be the model's, however long someone looks at a step."""
    clock = [0.0]
    monkeypatch.setattr(generation, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def a_second_each_layer(module, inputs, output):
        clock[0] += 1.0

    model = random_model(SMALL)
    for layer in model.layers:
        layer.register_forward_hook(a_second_each_layer)
    seconds = []
    for step in stream_generate(model, token_ids(SMALL, 1, 10), 3, chunk_size=4, stop_token_ids=()):
        seconds.append(step.seconds)
        clock[0] += 1000.0
    assert seconds == [9.0, 3.0, 3.0]


def test_a_seed_gives_the_same_text_again_and_another_seed_another(random_model, token_ids):
    model, ids = random_model(SMALL), token_ids(SMALL, 1, 5)

    def text(seed: int) -> list[list[int]]:
        return tokens_of(write(model, ids, 12, sampling=Sampling(temperature=1.0, seed=seed)))

    assert text(1) == text(1)
    assert len({str(text(seed)) for seed in range(10)}) == 10


def test_sampling_leaves_the_global_random_numbers_alone(random_model, token_ids):
    """A seed that depended on what ran before in the notebook would be no seed."""
    model, ids = random_model(SMALL), token_ids(SMALL, 1, 5)
    torch.manual_seed(3)
    first, state = write(model, ids, 8, sampling=WARM), torch.get_rng_state()
    torch.manual_seed(4)
    assert tokens_of(write(model, ids, 8, sampling=WARM)) == tokens_of(first)
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sampling", [Sampling(temperature=1e-6), Sampling(temperature=2.0, top_k=1)], ids=repr)
def test_the_limits_of_sampling_write_the_greedy_text(random_model, token_ids, sampling):
    model, ids = random_model(SMALL), token_ids(SMALL, 2, 5)
    assert_same(write(model, ids, 30, sampling=sampling), write(model, ids, 30))


@pytest.mark.parametrize("use_cache", [True, False])
@torch.inference_mode()
def test_prefill_scores_real_tokens_in_fp32(random_model, token_ids, use_cache):
    model, ids = random_model(SMALL).half(), token_ids(SMALL, 2, 5)
    cache = KVCache(SMALL, 2, 5, torch.device("cpu"), torch.float16) if use_cache else None
    scores = prefill(model, ids, cache, chunk_size=2)
    assert (scores.shape, scores.dtype) == ((2, 60), torch.float32)
    torch.testing.assert_close(scores, model(ids)[:, -1, :60].float(), atol=2e-2, rtol=0)


# The way from a command to attention.


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("chunk_size", "passes"), [(1024, 1), (4, 3)])
def test_a_forward_hook_on_the_model_fires_once_a_pass(random_model, token_ids, use_cache, chunk_size, passes):
    """Whoever hooks the model to look at its logits would see nothing of a loop that goes around `forward`."""
    model, shapes = random_model(SMALL), []
    model.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    write(model, token_ids(SMALL, 2, 10), 4, use_cache=use_cache, chunk_size=chunk_size)
    assert shapes == [(2, 1, 64)] * ((passes if use_cache else 1) + 3)


def test_five_calls_at_most_lead_from_the_command_to_attention(monkeypatch, capsys):
    """Few enough to read in one sitting, and to keep in mind while one steps through them in a debugger."""
    real, ways = Attention.forward, []

    def watched(self, *given):
        names, frame = [], sys._getframe(1)
        while frame is not None and frame.f_code is not generate.run.__code__:
            if Path(frame.f_code.co_filename).is_relative_to(Path(generation.__file__).parent):
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        assert frame is not None, "the command's run must be on the way"
        ways.append(names[::-1])
        return real(self, *given)

    monkeypatch.setattr(Attention, "forward", watched)
    generate.run(build_parser().parse_args(["generate", "Once upon a time", "--tokens", "3", "--no-stop"]))
    assert "3 new tokens" in capsys.readouterr().err
    assert len({tuple(way) for way in ways}) == 2, "one way for prefill, one for decode"
    assert max(map(len, ways)) <= 5, max(ways, key=len)


# Progress, and stopping in the middle.


@pytest.mark.parametrize("use_cache", [True, False])
def test_progress_is_told_after_each_layer_and_only_in_the_prefill(random_model, token_ids, use_cache):
    """A bar over a long prompt has to move, and to end at its end."""
    model, events = random_model(SMALL), []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: events.append("layer"))
    steps = stream_generate(
        model,
        token_ids(SMALL, 1, 10),
        2,
        chunk_size=4,
        on_progress=lambda *told: events.append(told),
        use_cache=use_cache,
    )
    next(steps)
    total = 9 if use_cache else 3
    expected = [event for done in range(1, total + 1) for event in ("layer", (done, total))]
    assert events == expected
    next(steps)
    assert events == [*expected, "layer", "layer", "layer"]


def test_stopping_in_the_prefill_leaves_a_cache_that_can_go_on(random_model, token_ids):
    """Stopped after any layer there is no step, and what is held is whole chunks, from which the rest goes on."""
    model = random_model(SMALL)

    @settings(max_examples=25, deadline=None)
    @given(prompt=st.integers(1, 30), chunk_size=st.integers(1, 12), data=st.data())
    def check(prompt, chunk_size, data):
        ids, cache = token_ids(SMALL, 1, prompt), room(model, 1, 40)
        chunks = -(-prompt // chunk_size)
        last = data.draw(st.integers(1, 3 * chunks))
        told = []

        def stop(done: int, total: int) -> bool:
            told.append(done)
            return done < last

        assert write(model, ids, 5, cache=cache, chunk_size=chunk_size, on_progress=stop) == []
        assert told == list(range(1, last + 1))
        assert cache.length == (last - 1) // 3 * chunk_size
        assert_same(write(model, ids, 5, cache=cache), write(model, ids, 5))

    check()


# What is left behind when nobody reads to the end.


class ReaderFault(Exception):
    pass


def closed(stream):
    next(stream), next(stream)
    stream.close()


def reader_fails(stream):
    with pytest.raises(ReaderFault):
        for _ in stream:
            raise ReaderFault


def dropped(stream):
    next(stream)  # the last reference to it ends here


@pytest.mark.parametrize("leave", [closed, reader_fails, dropped])
def test_a_stream_left_early_leaves_model_and_cache_usable(random_model, token_ids, leave):
    model, ids, cache = random_model(SMALL), token_ids(SMALL, 1, 8), room(random_model(SMALL), 1, 40)
    expected = write(model, ids, 10)
    leave(stream_generate(model, ids, 10, cache=cache))
    assert not torch.is_inference_mode_enabled()
    assert_same(write(model, ids, 10, cache=cache), expected)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("step", [0, 2])
def test_ctrl_c_in_a_layer_leaves_model_and_cache_usable(random_model, token_ids, layer, step):
    """Half of the layers have then stored the token; the cache must not count it."""
    model, ids, cache = random_model(SMALL), token_ids(SMALL, 1, 8), room(random_model(SMALL), 1, 40)
    expected = write(model, ids, 10)
    stream = stream_generate(model, ids, 10, cache=cache, stop_token_ids=())
    for _ in range(step):
        next(stream)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.layers[layer].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    hook.remove()
    assert cache.length == (0 if step == 0 else 8 + step - 1)
    assert not torch.is_inference_mode_enabled()
    assert_same(write(model, ids, 10, cache=cache), expected)


def test_two_streams_on_one_model_do_not_disturb_each_other(random_model, token_ids):
    """A playground with two panes shares the weights, and nothing else."""
    model = random_model(SMALL)
    first, second = token_ids(SMALL, 1, 8, seed=1), token_ids(SMALL, 2, 13, seed=2)
    expected = write(model, first, 12, sampling=WARM), write(model, second, 12)
    streams = (
        stream_generate(model, first, 12, sampling=WARM, stop_token_ids=()),
        stream_generate(model, second, 12, stop_token_ids=()),
    )
    taken: tuple[list[Step], list[Step]] = ([], [])
    for which in [0, 1, 1, 0, 1, 0, 0, 0, 1, 1] + [0, 1] * 7:
        taken[which].append(next(streams[which]))
    assert_same(taken[0], expected[0])
    assert_same(taken[1], expected[1])


@pytest.mark.parametrize("inside", [True, False])
def test_training_goes_on_after_a_text(random_model, token_ids, inside):
    """The rotary table is kept between calls: made by generation, it must still serve a training step."""
    model, ids = random_model(SMALL), token_ids(SMALL, 2, 8)
    with torch.inference_mode(inside):
        for _ in stream_generate(model, ids, 3, stop_token_ids=()):
            assert torch.is_inference_mode_enabled() is inside
    token_log_probabilities(model, ids).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_nothing_is_kept_for_gradients(random_model, token_ids):
    """A text of 2,000 tokens would otherwise hold the activations of all of its passes."""
    model, tracked = random_model(SMALL), []
    model.norm.register_forward_hook(lambda module, inputs, output: tracked.append(output.requires_grad))
    with torch.enable_grad():
        write(model, token_ids(SMALL, 1, 8), 3)
    assert tracked == [False, False, False]


def test_a_stream_can_be_read_in_and_out_of_inference_mode(random_model, token_ids):
    model, ids = random_model(SMALL), token_ids(SMALL, 1, 8)
    expected, stream, found = write(model, ids, 6), stream_generate(model, ids, 6, stop_token_ids=()), []
    for number in range(6):
        with torch.inference_mode(number % 2 == 0), torch.set_grad_enabled(number % 3 == 0):
            found.append(next(stream))
    assert_same(found, expected)


@pytest.mark.parametrize("inside", [True, False])
def test_a_cache_can_be_used_on_both_sides_of_inference_mode(random_model, token_ids, inside):
    """A lesson fills a cache by hand and then lets the library go on, or the other way round."""
    model, ids = random_model(SMALL), token_ids(SMALL, 1, 12)
    with torch.inference_mode(inside):
        cache = room(model, 1, 30)
        model(ids[:, :6], cache)
    expected = write(model, ids, 5)
    assert_same(write(model, ids, 5, cache=cache), expected)
    cache.truncate(5)
    assert (model(ids[:, 5:], cache) - model(ids)[:, 5:]).abs().max() <= 1e-5


def test_a_thread_writes_the_same(random_model, token_ids):
    """The playground generates in a worker; gradient and inference modes belong to a thread."""
    model, ids = random_model(SMALL), token_ids(SMALL, 1, 8)
    found: list[list[Step]] = []
    worker = threading.Thread(target=lambda: found.append(write(model, ids, 10, sampling=WARM)))
    worker.start()
    worker.join(timeout=60)
    assert_same(found[0], write(model, ids, 10, sampling=WARM))
    model(ids).sum().backward()
