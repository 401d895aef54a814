"""The model that ships: small, whole, trained, and loaded by the very loader that 20B uses."""

import math

import pytest
import torch

import neox_lib
from neox_lib.checkpoints.files import SHIPPED_MODEL, open_tensors
from neox_lib.checkpoints.slim.layout import find_shards
from neox_lib.config import NeoXConfig, tiny
from neox_lib.evaluation.corpus import stories_of, story_stream
from neox_lib.evaluation.likelihood import bits_per_byte, token_log_probabilities
from neox_lib.generation import greedy_generate_text, prompt_ids, stream_generate
from neox_lib.loading import create_model, create_tokenizer

HELD_OUT = stories_of((SHIPPED_MODEL.parent / "wilde_tales.txt").read_text("utf-8"))


@pytest.fixture(scope="module")
def model():
    return create_model(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return create_tokenizer()


def test_the_files_are_small_and_of_the_tiny_shape():
    assert NeoXConfig.from_json(SHIPPED_MODEL / "config.json") == tiny()
    weights = sum(path.stat().st_size for path in SHIPPED_MODEL.glob("*.pt"))
    assert tiny().weight_bytes(torch.float16) < weights < 7.5e6


def test_two_ranks_with_biases_and_norms_of_their_own():
    """Otherwise a loader that averages biases, or takes rank 0's norms, would go unnoticed."""
    for index, ranks in find_shards(SHIPPED_MODEL).items():
        first, second = (open_tensors(path) for path in ranks)
        assert {tensor.dtype for tensor in first.values()} == {torch.float16}
        for key in first:
            if key.endswith(("norm.weight", "norm.bias", "dense.bias", "dense_4h_to_h.bias")):
                differing = (first[key] != second[key]).float().mean()
                assert differing > 0.8, (index, key)


def test_the_tokenizer_has_the_layout_of_20b(tokenizer):
    assert tokenizer.get_vocab_size() == tiny().vocab_size
    assert tokenizer.token_to_id("<|endoftext|>") == 0 and tokenizer.token_to_id("<|padding|>") == 1
    assert tokenizer.encode("  hello").tokens[0] == "  "


def test_the_model_has_learned(model, tokenizer):
    """Bits per byte on tales that it never saw: an untrained model needs about 2.9, this one far less."""
    assert bits_per_byte(model, tokenizer, HELD_OUT) < 1.6


def test_a_story_stays_a_story(model, tokenizer):
    text = greedy_generate_text(model, tokenizer, "Once upon a time, there was a little fox", 80)
    assert text.startswith("Once upon a time, there was a little fox") and len(text.split()) > 30
    assert len(set(text.split())) > 15, "it repeats itself"


def test_it_ends_its_stories(model, tokenizer):
    steps = list(stream_generate(model, prompt_ids(tokenizer, "Once upon a time"), 1200, tokenizer=tokenizer))
    assert steps[-1].token_id == 0 and len(steps) < 1200


def test_perplexity_notices_a_wrong_loader(model, tokenizer):
    """Row-parallel biases averaged instead of summed fit every shape; the text is then markedly worse."""
    ids = story_stream(tokenizer, HELD_OUT)[None, :512]
    right = -token_log_probabilities(model, ids).mean()
    wrong_model = create_model(device="cpu", dtype="float32")
    for name, parameter in wrong_model.named_parameters():
        if name.endswith(("dense.bias", "dense_4h_to_h.bias")):
            parameter.mul_(0.5)
    assert -token_log_probabilities(wrong_model, ids).mean() > right + 0.01


def test_the_stories_that_it_wrote_are_whole_different_and_its_own(model, tokenizer):
    """Text to train on that breaks off, repeats itself or comes from another model would teach that."""
    text = (SHIPPED_MODEL.parent / "stories.txt").read_text("utf-8")
    stories = stories_of(text)
    assert 1_000_000 <= len(text.encode()) < 1_030_000
    assert len(set(stories)) == len(stories)
    assert all(story.rstrip('"')[-1] in ".!?" for story in stories)
    assert bits_per_byte(model, tokenizer, stories[:20]) < 0.55, "its own cost it 0.45, held-out TinyStories 0.74"


def test_the_public_face_is_all_there():
    for name in neox_lib.__all__:
        assert getattr(neox_lib, name) is not None
    assert set(neox_lib.__all__) <= set(dir(neox_lib))
    assert math.isclose(tiny().parameter_count(), 3.5e6, rel_tol=0.02)


def test_the_whole_context_works(model, tokenizer):
    """The same tokens, with a short and with a long context before them: the long one must not hurt."""
    stream = story_stream(tokenizer, HELD_OUT)[: 4 * 2048]
    long = -torch.cat([token_log_probabilities(model, row[None])[:, 1024:] for row in stream.view(-1, 2048)])
    starts = [
        row[1024 + offset - 127 : 1024 + offset + 129] for row in stream.view(-1, 2048) for offset in range(0, 896, 128)
    ]
    short = -token_log_probabilities(model, torch.stack(starts))[:, 127:]
    same_tokens = long[:, : 7 * 128].reshape(-1, 128)
    assert same_tokens.shape[0] == short.shape[0]
    assert same_tokens.mean() < short[:, :128].mean() + 0.1
