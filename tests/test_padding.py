"""Batches of prompts of unequal length: each row gives what it gives alone, and the padding is seen by nobody."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neox_lib import create_model, create_tokenizer, greedy_generate, greedy_generate_text
from neox_lib.cache import KVCache
from neox_lib.generation import stream_generate
from neox_lib.model import NeoXModel
from neox_lib.padding import pad_left, padding_mask
from neox_lib.quantization.linear import use_cast_linear, use_quantized_linear
from neox_lib.sampling import GREEDY, Sampling
from tests.small_models import BASE, family

WARM = Sampling(temperature=1.3, top_k=20, seed=11)
FAMILY = family(replace(BASE, tokenizer_vocab_size=120))  # with dead rows

pytestmark = pytest.mark.usefixtures("one_thread")


def columns(model: NeoXModel, prompts, new, **how) -> list[tuple[list[int], list[float]]]:
    """What each row of a batch writes: its tokens and their log-probabilities, up to its end."""
    rows: list[tuple[list[int], list[float]]] = [([], []) for _ in range(len(prompts))]
    ended = [False] * len(prompts)
    for step in stream_generate(model, prompts, new, **how):
        for row, (tokens, log_probabilities) in enumerate(rows):
            if ended[row]:
                assert (step.token_ids[row], step.log_probabilities[row]) == (tokens[-1], 0)
            else:
                tokens.append(step.token_ids[row])
                log_probabilities.append(step.log_probabilities[row])
        ended = step.ended
    assert all(ended)
    return rows


def assert_alone(model: NeoXModel, prompts: list[list[int]], found, new: int, **how) -> None:
    """Each row's tokens are those of its prompt alone, its log-probabilities to 1e-5."""
    for prompt, (tokens, log_probabilities) in zip(prompts, found, strict=True):
        (alone,) = columns(model, torch.tensor([prompt]), new, **how)
        assert tokens == alone[0]
        assert log_probabilities == pytest.approx(alone[1], abs=1e-5)


def padded(prompts: list[list[int]], lowest: int, highest: int, seed: int, more: int = 0) -> tuple[Tensor, Tensor]:
    """The prompts as a tensor and its mask, padded on the left with random ids; `more` columns are padding only."""
    longest = max(map(len, prompts)) + more
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(lowest, highest, (len(prompts), longest), generator=generator)
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


@st.composite
def batches(draw) -> list[list[int]]:
    prompt = st.lists(st.integers(0, 119), min_size=1, max_size=14)
    return draw(st.lists(prompt, min_size=1, max_size=4, unique_by=tuple))


@pytest.mark.parametrize("shape", FAMILY)
def test_each_row_gives_what_it_gives_alone(random_model, shape):
    """Else what the model says to one prompt would depend on which others happened to be asked."""
    model = random_model(FAMILY[shape], gain=1.0)

    @settings(max_examples=15, deadline=None)
    @given(
        prompts=batches(),
        sampling=st.sampled_from([GREEDY, WARM, replace(WARM, repetition_penalty=1.5), Sampling(repetition_penalty=4)]),
        use_cache=st.booleans(),
        chunk_size=st.integers(1, 16),
        stop=st.sets(st.integers(0, 119), max_size=20).map(tuple),
        data=st.data(),
    )
    def check(prompts, sampling, use_cache, chunk_size, stop, data):
        given, how = prompts, {"sampling": sampling, "stop_token_ids": stop}
        ways = how | {"use_cache": use_cache, "chunk_size": chunk_size}
        if data.draw(st.booleans(), "with a mask"):
            given, mask = padded(prompts, -5, 300, data.draw(st.integers(0, 99)), data.draw(st.integers(0, 3)))
            ways["attention_mask"] = mask if data.draw(st.booleans(), "as numbers") else mask.bool()
        assert_alone(model, prompts, columns(model, given, 6, **ways), 6, **how)

    check()


@torch.inference_mode()
def test_rows_are_those_of_hugging_face(twins):
    """The same tokens and scores as transformers gives with an attention mask, a penalty for repetition included."""
    for seed, name in enumerate(FAMILY):
        penalty = (1.0, 1.6, 0.8)[seed % 3]
        ours, theirs = twins(FAMILY[name], seed=seed, attention="sdpa")
        theirs.generation_config.eos_token_id = None
        generator = torch.Generator().manual_seed(seed)
        prompts = [torch.randint(120, (length,), generator=generator).tolist() for length in (3, 17, 1, 9)]
        ids, mask = padded(prompts, 0, 120, seed)
        expected = theirs.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=1,
            suppress_tokens=list(range(120, 128)),
            repetition_penalty=penalty,
            return_dict_in_generate=True,
            output_logits=True,
        )
        scores = torch.stack(expected.logits, dim=1)[..., :120].log_softmax(dim=-1)  # [B, 12, V], no dead rows
        chosen = expected.sequences[:, 17:]
        likely = scores.gather(-1, chosen[..., None])[..., 0].tolist()
        how = {"sampling": Sampling(repetition_penalty=penalty), "stop_token_ids": (), "use_cache": bool(seed % 2)}
        for row, (tokens, log_probabilities) in enumerate(columns(ours, prompts, 12, **how)):
            assert tokens == chosen[row].tolist()
            assert log_probabilities == pytest.approx(likely[row], abs=2e-5)


def test_each_row_is_written_to_its_own_length(random_model):
    """Beside a prompt that fills the context a short one still gets all its tokens, and the long one no error."""
    model = random_model(BASE)
    prompts = [list(range(5, 65)), [7], list(range(30, 50)), list(range(64))]
    for limit in (64, 20, 1):
        alone = [greedy_generate(model, [prompt], limit)[0] for prompt in prompts]
        assert greedy_generate(model, prompts, limit) == alone
        assert all(len(row) <= max(limit, len(prompt)) for row, prompt in zip(alone, prompts, strict=True))
        model.use_cache = not model.use_cache
    ids, mask = padded(prompts, 0, 128, seed=1)
    found = greedy_generate(model, ids, 64, attention_mask=mask)
    assert [row[:64] for row in found] == ids.tolist()
    assert [row[64:] for row in found] == [greedy_generate(model, [prompt], 64)[0][len(prompt) :] for prompt in prompts]


def test_rows_may_be_given_numbers_of_their_own(random_model):
    model, prompts = random_model(BASE), [[3, 4, 5], [6], [7, 8]]
    found = columns(model, prompts, [2, 0, 5], stop_token_ids=())[::2]  # row 1 writes nothing
    for (tokens, _), prompt, new in zip(found, prompts[::2], (2, 5), strict=True):
        assert tokens == columns(model, [prompt], new, stop_token_ids=())[0][0]
    assert [step.ended for step in stream_generate(model, prompts, [2, 0, 3], stop_token_ids=())] == [
        [False, True, False],
        [True, True, False],
        [True, True, True],
    ]
    assert list(stream_generate(model, prompts, [0, 0, 0])) == []


def test_texts_of_a_list_are_those_of_each_alone():
    model, tokenizer = create_model(device="cpu", dtype="float32"), create_tokenizer()
    texts = ["Once upon a time, a fox", "", "The 🦊", "The king said to his son that"]
    alone = [greedy_generate_text(model, tokenizer, text, 24) for text in texts]
    assert greedy_generate_text(model, tokenizer, texts, 24) == alone
    assert len(set(alone)) == 4


def test_equal_prompts_are_drawn_with_seeds_one_after_the_other(random_model):
    """Four drafts of one prompt must not be four times the same; and each can be had again alone."""
    model, prompt, other = random_model(BASE), [5, 9, 2], [8]
    found = columns(model, [prompt, other, prompt, prompt], 12, sampling=WARM, stop_token_ids=())
    for (tokens, _), (row, seed) in zip(found, [(prompt, 11), (other, 11), (prompt, 12), (prompt, 13)], strict=True):
        alone = columns(model, [row], 12, sampling=replace(WARM, seed=seed), stop_token_ids=())
        assert tokens == alone[0][0]
    assert len({tuple(tokens) for tokens, _ in found}) == 4


@pytest.mark.parametrize("chunk_size", [3, 100])
def test_a_batch_goes_on_from_its_cache(random_model, chunk_size):
    """What a chat does, many at a time."""
    model, prompts = random_model(BASE), [[3, 4, 5, 6, 7], [6], [7, 8]]
    cache = KVCache(BASE, 3, 40, torch.device("cpu"), torch.float32)
    first = columns(model, prompts, 6, cache=cache, stop_token_ids=(), chunk_size=chunk_size)
    assert cache.length == 10
    longer = [[*prompt, *tokens, 9] for prompt, (tokens, _) in zip(prompts, first, strict=True)]
    found = columns(model, longer, 5, cache=cache, stop_token_ids=())
    assert_alone(model, longer, found, 5, stop_token_ids=())


def test_prompts_of_equal_length_meet_no_mask(random_model, token_ids, monkeypatch):
    """Nobody pays for padding that is not there."""
    model, ids = random_model(BASE), token_ids(BASE, 3, 7)
    expected = columns(model, ids, 5)
    monkeypatch.setattr("neox_lib.model.padding_mask", lambda *_: 1 / 0)
    assert columns(model, ids.tolist(), 5) == columns(model, ids, 5, attention_mask=torch.ones(3, 7)) == expected
    wider, mask = padded(ids.tolist(), 0, 128, seed=0, more=4)
    assert columns(model, wider, 5, attention_mask=mask) == expected
    with pytest.raises(ZeroDivisionError):
        columns(model, [[1], [2, 3]], 1)


# What each half of the remedy is for, put in and seen.


@torch.inference_mode()
def test_without_the_mask_padding_is_seen(random_model):
    model = random_model(BASE, gain=1.0)
    ids, padding = pad_left([[5, 6, 7, 8, 9], [20, 21]])
    alone = model(ids[1:, 3:])
    assert (model(ids, padding=padding)[1:, 3:] - alone).abs().max() <= 1e-5
    assert (model(ids)[1:, 3:] - alone).abs().max() > 0.1


@torch.inference_mode()
def test_each_row_has_positions_of_its_own(random_model):
    """Rotary scores hang on distances alone, so a shift hardly shows in them; where the context ends it does."""
    model = random_model(BASE)
    short = list(range(60, 100))
    ids, padding = pad_left([[5] * 60, short])
    cache = KVCache(BASE, 2, 84, torch.device("cpu"), torch.float32)
    model(ids, cache, padding=padding)
    with pytest.raises(ValueError, match="60 cached \\+ 24 new tokens exceed the context of 64"):
        model(torch.full((2, 24), 9), cache, padding=padding)
    cache.truncate(60)
    found = model(torch.full((2, 24), 9), cache, padding=padding + torch.tensor([60, 0]))[1:]
    assert (found - model(torch.tensor([[*short, *[9] * 24]]))[:, 40:]).abs().max() <= 1e-5


@torch.inference_mode()
def test_every_splitting_of_a_padded_batch_gives_the_same(random_model):
    """Passes of padding alone among them: nobody reads what they compute, and none of it may be NaN."""
    model = random_model(BASE, gain=1.0)
    ids, padding = pad_left([list(range(12)), [20, 21]])
    assert padding_mask(padding, 12, 12).any(dim=-1).all(), "some attention kernels give NaN for a query without a key"
    whole = model(ids, padding=padding)
    for sizes in ([1] * 12, [4, 8], [5, 1, 6], [11, 1]):
        cache = KVCache(BASE, 2, 12, torch.device("cpu"), torch.float32)
        parts = torch.cat([model(part, cache, padding=padding) for part in ids.split(sizes, dim=1)], dim=1)
        assert (parts - whole).abs().max() <= 1e-5


# Other arithmetic.


def halves(model: NeoXModel) -> NeoXModel:
    return model.half()


def mixed(model: NeoXModel) -> NeoXModel:
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.half()
    return use_cast_linear(model)


@pytest.mark.parametrize("form", [halves, mixed, use_quantized_linear])
@torch.inference_mode()
def test_half_and_int8_models_read_padding_too(random_model, form):
    model = form(random_model(replace(BASE, hidden_size=64, intermediate_size=128), gain=1.0).requires_grad_(False))
    prompts = [list(range(12)), [20, 21]]
    ids, padding = pad_left(prompts)
    alone = torch.cat([model(torch.tensor([prompt]), last_only=True) for prompt in prompts]).float()
    assert (model(ids, padding=padding, last_only=True).float() - alone).abs().max() < 0.05
    assert all(len(tokens) == 5 for tokens, _ in columns(model, prompts, 5, stop_token_ids=()))


# What is refused, before any work.

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
BAD = {
    "an empty row": ([[1, 2], []], None, "prompt 1 of the batch has no token"),
    "no row": ([], None, "batch has no prompt"),
    "one list": ([3, 4], None, r"\[batch, tokens\] .* got \[1\]"),
    "words": (["fox"], None, "a list of lists of token ids"),
    "nothing": (None, None, "a list of lists of token ids"),
    "a fraction": ([[3, 4.5]], None, "int64 or int32, got torch.float32"),
    "too large": ([[3], [4, 128]], None, r"token id 128 .* 0 to 127"),
    "negative": ([[3], [4, -1]], None, r"token id -1 .* 0 to 127"),
    "a mask of another shape": (IDS, torch.ones(2, 4), r"got \[2, 4\] for ids \[2, 3\]"),
    "a mask of a list": ([[1, 2], [3]], torch.ones(2, 2), r"got \[2, 2\] for a list"),
    "a hole": (IDS, torch.tensor([[1, 1, 1], [1, 0, 1]]), "row 1 has 0 at token 1; pad on the left"),
    "padded on the right": (IDS, torch.tensor([[1, 1, 0], [1, 1, 1]]), "row 0 has 0 at token 2; pad on the left"),
    "other numbers": (IDS, torch.tensor([[1, 1, 1], [0, 2, 1]]), "row 1 has 2 at token 1"),
    "a mask of scores": (IDS, torch.tensor([[0, -1e4, 0], [0.0, 0, 0]]), "row 0 has -10000.0 at token 1"),
    "all hidden": (IDS, torch.tensor([[1, 1, 1], [0, 0, 0]]), "prompt 1 of the batch has no token"),
    "too large, not hidden": (torch.tensor([[999, 200]]), torch.tensor([[0, 1]]), "token id 200"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("generate", [stream_generate, greedy_generate])
def test_a_bad_batch_is_one_clear_error(random_model, case, generate):
    prompts, mask, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        generate(random_model(BASE), prompts, 5, attention_mask=mask)


def test_limits_of_rows_are_checked(random_model):
    model = random_model(BASE)
    with pytest.raises(ValueError, match=r"prompt of 60 tokens \+ 5 new ones = 65, .* holds 64"):
        stream_generate(model, [[1], [2] * 60], 5)
    with pytest.raises(ValueError, match="one for each of 2 rows, got 3"):
        stream_generate(model, [[1], [2]], [1, 2, 3])
    with pytest.raises(ValueError, match="0 or more, got -1"):
        stream_generate(model, [[1], [2]], [1, -1])
