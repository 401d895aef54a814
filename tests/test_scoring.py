"""Scores of given text: against Hugging Face's loss, by hand, and without a share for rows that stand for no token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_lib.config import NeoXConfig
from neox_lib.evaluation.likelihood import (
    bits_per_byte,
    negative_log_likelihood,
    perplexity,
    stories_of,
    story_stream,
    token_log_probabilities,
    windows,
)

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
@given(tokens=st.integers(0, 60), length=st.integers(1, 20))
def test_windows_predict_every_token_once(tokens, length):
    """All but the first: twice would count a hard word double, never would hide it."""
    stream = torch.arange(tokens)
    cut = list(windows(stream, length))
    assert all(window.shape[0] == 1 and 2 <= window.shape[1] <= length + 1 for window in cut)
    assert [token for window in cut for token in window[0, 1:].tolist()] == list(range(1, tokens))
    assert all(window[0, 0] + 1 == window[0, 1] for window in cut)


@torch.inference_mode()
def test_negative_log_likelihood_reads_window_by_window(random_model, token_ids):
    """Each window starts without memory, so the length is part of any figure that we publish."""
    model, stream = random_model(SMALL), token_ids(SMALL, 1, 25)[0]
    found = negative_log_likelihood(model, stream, 10)
    expected = [-token_log_probabilities(model, stream[None, a:b])[0] for a, b in ((0, 11), (10, 21), (20, 25))]
    torch.testing.assert_close(found, torch.cat(expected))
    assert found.shape == (24,)


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
