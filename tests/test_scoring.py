"""Scores of given text: against Hugging Face's loss, by hand, and without a share for rows that stand for no token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_lib.config import NeoXConfig
from neox_lib.evaluation.corpus import stories_of, story_stream
from neox_lib.evaluation.likelihood import (
    bits_per_byte,
    negative_log_likelihood,
    pair_ids,
    perplexity,
    score_batch,
    standard_error,
    token_log_probabilities,
    windows,
)
from neox_lib.loading import create_tokenizer

SMALL = NeoXConfig(
    vocab_size=64,
    tokenizer_vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=128,
    rotary_pct=0.5,
)
PADDED = NeoXConfig(**(vars(SMALL) | {"tokenizer_vocab_size": 50}))


class Letters:
    """A tokenizer for which every byte is a token: id = byte - 95, so that a is 2."""

    def token_to_id(self, token: str) -> int:
        return 0

    def encode(self, text: str) -> list[int]:
        return [byte - 95 for byte in text.encode("utf-8")]


class Uniform(torch.nn.Module):
    """A model that finds every token equally likely: its negative log-likelihood is log(V), whatever the text."""

    def __init__(self, config: NeoXConfig):
        super().__init__()
        self.config = config
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*input_ids.shape, self.config.vocab_size)


@torch.inference_mode()
def test_perplexity_equals_hugging_face(twins, token_ids):
    """The published figure is exp of Hugging Face's loss; ours must be the same number."""
    ours, theirs = twins(SMALL)
    ids = token_ids(SMALL, 2, 60)
    assert perplexity(ours, ids) == pytest.approx(math.exp(theirs(ids, labels=ids).loss.item()), rel=1e-5)


@torch.inference_mode()
def test_log_probabilities_belong_to_the_next_token(random_model, token_ids):
    """Off by one, and a model gets credit for the token that it has just read."""
    model, ids = random_model(SMALL), token_ids(SMALL, 2, 12)
    scores = token_log_probabilities(model, ids)
    assert scores.shape == (2, 11)
    for row in range(2):
        for position in range(11):
            shares = model(ids[[row], : position + 1])[0, -1].softmax(dim=-1)
            assert scores[row, position].item() == pytest.approx(shares[ids[row, position + 1]].log().item(), abs=1e-4)


@torch.inference_mode()
def test_rows_of_no_token_get_no_share(random_model, token_ids):
    """20B has 155 padded rows: a share for them makes every perplexity too high."""
    model = random_model(PADDED)
    ids = token_ids(PADDED, 1, 10)
    prefix, everything = ids[:, :-1], []
    for token in range(50):
        row = torch.cat([prefix, torch.tensor([[token]])], dim=1)
        everything.append(token_log_probabilities(model, row)[0, -1].exp().item())
    assert sum(everything) == pytest.approx(1, abs=1e-5)
    before = token_log_probabilities(model, ids)
    model.final_linear.weight[50:] *= 100
    assert torch.equal(token_log_probabilities(model, ids), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damaged_model_has_no_perplexity(random_model, token_ids, bad):
    """NaN compares as neither better nor worse, so a score of it passes for a score; the row with it is named."""
    model, ids = random_model(SMALL).requires_grad_(False), token_ids(SMALL, 2, 12)
    model.word_embeddings.weight[ids[1, 7]] = bad
    ids[0] = (ids[1, 7] + 1) % 50
    for score in (perplexity, token_log_probabilities):
        with pytest.raises(ValueError, match="scores of row 1 are NaN"):
            score(model, ids)


@torch.inference_mode()
def test_scores_are_fp32_whatever_the_model(random_model, token_ids):
    """A sum of ten thousand fp16 log-probabilities would be a guess."""
    model = random_model(SMALL).half()
    assert token_log_probabilities(model, token_ids(SMALL, 1, 9)).dtype == torch.float32


@settings(max_examples=200, deadline=None)
@given(tokens=st.integers(0, 60), length=st.integers(1, 20), data=st.data())
def test_windows_predict_every_token_once(tokens, length, data):
    """All but the first: twice would count a hard word double, never would hide it. And each as far back as it can."""
    stride, stream = data.draw(st.integers(1, length)), list(range(tokens))
    cut = list(windows(stream, length, stride))
    assert [token for _, continuation in cut for token in continuation] == stream[1:]
    for context, continuation in cut:
        assert context + continuation == stream[context[0] : continuation[-1] + 1] and context
        assert len(context) + len(continuation) == min(length, continuation[-1]) + 1
    assert all(len(continuation) <= stride for _, continuation in cut[1:])


def test_a_window_does_not_jump_over_tokens():
    with pytest.raises(ValueError, match="a window of 4 tokens can't move by 5"):
        list(windows([1, 2, 3], 4, 5))


@torch.inference_mode()
def test_negative_log_likelihood_reads_window_by_window(random_model, token_ids):
    """A window starts without memory, so the length is part of any figure that we publish; the last has a full one."""
    model, stream = random_model(SMALL), token_ids(SMALL, 1, 25)[0]
    found = negative_log_likelihood(model, stream, 10)
    parts = [-token_log_probabilities(model, stream[None, a:b])[0] for a, b in ((0, 11), (10, 21), (14, 25))]
    torch.testing.assert_close(found, torch.cat([*parts[:2], parts[2][-4:]]))
    assert found.shape == (24,)
    by_one = [token_log_probabilities(model, stream[None, max(0, n - 10) : n + 1])[0, -1] for n in range(1, 25)]
    torch.testing.assert_close(negative_log_likelihood(model, stream, 10, 1), -torch.stack(by_one))


@torch.inference_mode()
def test_a_batch_of_unequal_pairs_scores_each_as_alone(random_model, token_ids):
    """Padding is read by nobody, and a row longer than the context loses its first tokens, not its last."""
    model, ids = random_model(SMALL), token_ids(SMALL, 4, 140).tolist()
    pairs = [(ids[0][:1], ids[0][1:9]), (ids[1][:30], ids[1][30:31]), (ids[2], ids[2][:5]), (ids[3][:2], ids[3][:128])]
    for (found, greedy), (context, continuation) in zip(score_batch(model, pairs), pairs, strict=True):
        row = torch.tensor([[*context, *continuation][-129:]])
        torch.testing.assert_close(found, token_log_probabilities(model, row)[0, -len(continuation) :])
        assert not greedy
        best = model(row[:, : -len(continuation)])[0, -1].argmax().item() if len(row[0]) > len(continuation) else 0
        assert score_batch(model, [(context, [best])])[0][1] or len(row[0]) == 129


@pytest.mark.parametrize(("context", "continuation"), [([], [1]), ([1], []), ([1], [1] * 129)])
def test_a_pair_without_a_score_is_refused(random_model, context, continuation):
    with pytest.raises(ValueError, match="a pair needs a context of 1 or more tokens and a continuation of 1 to 128"):
        score_batch(random_model(SMALL), [(context, continuation)])


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("Once upon", " a time", ("Once upon", " a time")),
        ("Once upon ", "a time", ("Once upon", " a time")),
        ("", "Once", ("<|endoftext|>", "Once")),
        (" ", "Once", ("<|endoftext|>", " Once")),
        ("", "<|endoftext|>Once", ("<|endoftext|>", "Once")),
    ],
)
def test_a_pair_is_encoded_as_one_text(context, continuation, expected):
    """Encoded apart, " " and "a" would be two tokens that the model never saw side by side."""
    tokenizer = create_tokenizer()
    before, after = pair_ids(tokenizer, context, continuation, 0)
    assert tuple(tokenizer.decode(ids, skip_special_tokens=False) for ids in (before, after)) == expected


def test_a_standard_error_by_hand():
    """Of right and wrong answers it is the binomial one, with n - 1."""
    scores = [1.0] * 30 + [0.0] * 70
    assert standard_error(scores) == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    with pytest.raises(ValueError, match="two scores or more, got 1"):
        standard_error([1.0])


def test_a_stream_has_an_end_of_text_on_both_sides_of_a_story():
    """The model learns from it where a story starts, and when to stop."""
    assert story_stream(Letters(), ["ab", "c"]).tolist() == [0, 2, 3, 0, 4, 0]
    assert story_stream(Letters(), []).tolist() == [0]


def test_stories_are_cut_at_the_marker_on_its_own_line():
    """A marker inside a sentence is text; blank stories are none."""
    text = "one\n\ntwo\n<|endoftext|>\nthree <|endoftext|> four\n<|endoftext|>\n\n<|endoftext|>\nfive\n"
    assert stories_of(text) == ["one\n\ntwo", "three <|endoftext|> four", "five"]


@pytest.mark.parametrize("text", ["one\n<|endoftext|>", "<|endoftext|>\none", "<|endoftext|>\none\n<|endoftext|>\n"])
def test_a_marker_at_the_edge_of_a_file_belongs_to_no_story(text):
    """Files may end with a marker, with or without a line end."""
    assert stories_of(text) == ["one"]


def test_bits_per_byte_by_hand():
    """64 equally likely tokens are 6 bits each. 'ab' and 'cdé': 2 + 4 letters' tokens and 2 ends, over 6 bytes."""

    class Bytes(Letters):
        def encode(self, text):
            return [byte % 64 for byte in text.encode("utf-8")]

    expected = 6 * (2 + 4 + 2) / 6
    for length in (3, 128):
        assert bits_per_byte(Uniform(SMALL), Bytes(), ["ab", "cdé"], length) == pytest.approx(expected)


def test_bits_per_byte_do_not_pay_for_padded_rows():
    """50 real tokens of 64: log2(50) bits per token."""
    found = bits_per_byte(Uniform(PADDED), Letters(), ["abc"])
    assert found == pytest.approx(math.log2(50) * 4 / 3)
