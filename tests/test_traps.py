"""The mistakes that real implementations of this model made, each put in on purpose: the shapes fit, a test notices.

Every trap here is a wrong version of one definition. First the check passes with the right version; then the wrong one
takes its place: the shape check still passes, and the named check must fail.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import test_attention
import test_rotary
import test_scoring
import torch
import torch.nn.functional as F
from torch import Tensor

from neox_lib.attention import causal_mask, explicit_attention, fused_attention, split_heads
from neox_lib.block import Block
from neox_lib.config import NeoXConfig
from neox_lib.loading import create_tokenizer
from neox_lib.model import NeoXModel
from neox_lib.rotary import apply_rotary, rotary_angles
from neox_lib.tokenizer import BPETokenizer, read_tokenizer

SMALL = NeoXConfig(
    vocab_size=128,
    tokenizer_vocab_size=120,
    hidden_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=256,
    rotary_pct=0.5,
)


def notices(check: Callable, *arguments) -> None:
    """The check must fail; where it expects an error of ours, any other error or none is a failure too."""
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(*arguments)


def shapes_fit(model: NeoXModel, ids: Tensor) -> None:
    """All that many a test suite asks."""
    logits = model(ids)
    assert logits.shape == (*ids.shape, model.config.vocab_size)
    assert logits.isfinite().all()


def equals_hugging_face(ours: NeoXModel, theirs, ids: Tensor) -> None:
    """The check of test_model_parity: 1e-5 of the widest logit."""
    expected = theirs(ids).logits
    assert (ours(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


def flat_split(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Trap 1: all queries, then all keys, then all values, as in most other models."""
    thirds = [part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)]
    return thirds[0], thirds[1], thirds[2]


def turn_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Trap 2: dimension 2i is paired with 2i + 1, as in GPT-J."""
    rotary_ndims = cos.shape[-1]
    cos, sin = (table[:, : rotary_ndims // 2].repeat_interleave(2, dim=-1) for table in (cos, sin))
    turned, passed = x[..., :rotary_ndims], x[..., rotary_ndims:]
    quarter = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([turned * cos + quarter * sin, passed], dim=-1)


def turn_the_last_dimensions(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Trap 2: the right number of dimensions turn, at the wrong end of the head."""
    return apply_rotary(x.roll(cos.shape[-1], dims=-1), cos, sin).roll(-cos.shape[-1], dims=-1)


def half_angles(positions: Tensor, rotary_ndims: int, base: float = 10000) -> Tensor:
    """Trap 3: the table is made after the model went to fp16."""
    frequencies = (base ** (-torch.arange(0, rotary_ndims, 2) / rotary_ndims)).half()
    return torch.outer(positions.half(), frequencies).repeat(1, 2).float()


def sequential_block(self: Block, hidden: Tensor, cos: Tensor, sin: Tensor, cache=None) -> Tensor:
    """Trap 4: the name post_attention_layernorm is taken at its word."""
    hidden = hidden + self.attention(self.input_layernorm(hidden), cos, sin, cache)
    return hidden + self.mlp(self.post_attention_layernorm(hidden))


def one_norm_block(self: Block, hidden: Tensor, cos: Tensor, sin: Tensor, cache=None) -> Tensor:
    """Trap 4: both branches share a norm, as in GPT-J."""
    normed = self.input_layernorm(hidden)
    return hidden + self.attention(normed, cos, sin, cache) + self.mlp(normed)


def swapped_norms_block(self: Block, hidden: Tensor, cos: Tensor, sin: Tensor, cache=None) -> Tensor:
    """Trap 4: each branch reads the other's norm."""
    attended = self.attention(self.post_attention_layernorm(hidden), cos, sin, cache)
    return hidden + attended + self.mlp(self.input_layernorm(hidden))


def any_gelu(kind: str) -> SimpleNamespace:
    """Trap 5: a `torch.nn.functional` with one GELU for all models."""
    return SimpleNamespace(gelu=lambda x, approximate: F.gelu(x, approximate=kind))


# name: (what to replace, the wrong version, the config, how many tokens)
MODEL_TRAPS = {
    "1: flat query-key-value": ("neox_lib.attention.split_heads", flat_split, SMALL, 20),
    "2: neighbours turn": ("neox_lib.attention.apply_rotary", turn_neighbours, SMALL, 20),
    "2: wrong end turns": ("neox_lib.attention.apply_rotary", turn_the_last_dimensions, SMALL, 20),
    "3: fp16 angles": ("neox_lib.rotary.rotary_angles", half_angles, SMALL, 600),
    "4: sequential": ("neox_lib.block.Block.forward", sequential_block, SMALL, 20),
    "4: one norm": ("neox_lib.block.Block.forward", one_norm_block, SMALL, 20),
    "4: swapped norms": ("neox_lib.block.Block.forward", swapped_norms_block, SMALL, 20),
    "5: exact for 20B": ("neox_lib.block.F", any_gelu("none"), SMALL, 20),
    "5: tanh for Pythia": ("neox_lib.block.F", any_gelu("tanh"), replace(SMALL, hidden_act="gelu"), 20),
}


@pytest.mark.parametrize("trap", MODEL_TRAPS)
@torch.inference_mode()
def test_parity_notices_and_shapes_do_not(twins, token_ids, monkeypatch, trap):
    """A model with one of these loads the released weights without a word and writes worse, or nonsense."""
    target, wrong, config, tokens = MODEL_TRAPS[trap]
    ids = token_ids(config, 2, tokens)
    ours, theirs = twins(config)
    equals_hugging_face(ours, theirs, ids)
    monkeypatch.setattr(target, wrong)
    ours.rotary.fill(torch.device("cpu"))  # with the wrong angles, where they are wrong
    shapes_fit(ours, ids)
    notices(equals_hugging_face, ours, theirs, ids)


def test_flat_split_has_the_right_shapes_and_the_layout_check_notices(monkeypatch):
    """Trap 1 once more without a model: only numbered rows tell the two cuts apart."""
    qkv = torch.randn(2, 5, 36)
    assert [part.shape for part in flat_split(qkv, 3)] == [part.shape for part in split_heads(qkv, 3)]
    monkeypatch.setattr(test_attention, "split_heads", flat_split)
    notices(test_attention.test_split_follows_the_release_layout)


@torch.inference_mode()
def test_a_single_token_does_not_show_the_wrong_pairing(twins, token_ids, monkeypatch):
    """Trap 2 agrees at position 0, where every angle is 0, and drifts after it: a smoke test with one token passes."""
    ours, theirs = twins(SMALL)
    monkeypatch.setattr("neox_lib.attention.apply_rotary", turn_neighbours)
    ids = token_ids(SMALL, 1, 30)
    equals_hugging_face(ours, theirs, ids[:, :1])
    notices(equals_hugging_face, ours, theirs, ids[:, :3])


def test_the_wrong_pairing_keeps_lengths_and_distances_and_the_pair_check_notices(monkeypatch):
    """Trap 2 is a proper rotation too: only the check of which dimensions are partners can tell."""
    monkeypatch.setattr(test_rotary, "apply_rotary", turn_neighbours)
    test_rotary.test_turning_keeps_lengths()
    test_rotary.test_the_first_position_is_unchanged_and_the_last_dimensions_pass_through()
    notices(test_rotary.test_a_pair_is_half_the_rotary_dimensions_apart)


def test_turning_every_dimension_is_noticed(monkeypatch):
    """Trap 2: 20B turns 24 of 96 dimensions; with all of them turned the shapes are the same."""

    def turn_all(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        angles = rotary_angles(torch.arange(x.shape[-2]), x.shape[-1])
        return apply_rotary(x, angles.cos(), angles.sin())

    monkeypatch.setattr(test_rotary, "apply_rotary", turn_all)
    notices(test_rotary.test_the_first_position_is_unchanged_and_the_last_dimensions_pass_through)


def test_fp16_angles_are_a_third_of_a_radian_off_and_noticed(monkeypatch):
    """Trap 3: near 2048 the far end of the context turns by the wrong angle; cos and sin look as they always do."""
    wrong = half_angles(torch.arange(2048), 24)
    error = (wrong.double() - test_rotary.exact_angles(2048, 24)).abs().max()
    assert wrong.shape == rotary_angles(torch.arange(2048), 24).shape
    assert 0.3 < error < 0.4
    monkeypatch.setattr("neox_lib.rotary.rotary_angles", half_angles)
    monkeypatch.setattr(test_rotary, "rotary_angles", half_angles)
    notices(test_rotary.test_angles_follow_the_formula_over_the_whole_context, 24)
    notices(test_rotary.test_a_half_precision_table_is_the_exact_one_rounded_once, torch.float16)


def test_a_share_for_padded_rows_is_noticed(random_model, token_ids, monkeypatch):
    """Trap 8: a softmax over all 50,432 rows gives 155 of them a share that belongs to real tokens."""

    def all_rows(model: NeoXModel, input_ids: Tensor) -> Tensor:
        logits = model(input_ids)[:, :-1].float()
        return logits.log_softmax(dim=-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)

    monkeypatch.setattr(test_scoring, "token_log_probabilities", all_rows)
    notices(test_scoring.test_rows_of_no_token_get_no_share, random_model, token_ids)


def large_half_heads(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """fp16 queries and keys of 96 dimensions whose products pass 65,504, the largest fp16 number."""
    query, key, value = torch.randn(3, 1, 2, tokens, 96, generator=torch.Generator().manual_seed(0))
    query, key = 40 * query, 40 * key
    assert (query @ key.transpose(-1, -2)).abs().max() > 65504
    return query.half(), key.half(), value.half()


def half_scores(query: Tensor, key: Tensor, value: Tensor, fill: float = torch.finfo(torch.float16).min) -> Tensor:
    """Trap 9: everything stays in the model's dtype."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    allowed = causal_mask(query.shape[-2], key.shape[-2], query.device)
    return scores.masked_fill(~allowed, fill).softmax(dim=-1) @ value


def survives_large_scores(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """More than 500 tokens with large scores, against float64."""
    query, key, value = large_half_heads(600)
    found = attend(query, key, value)
    expected = explicit_in_float64(query, key, value)
    assert found.shape == expected.shape
    assert found.dtype == torch.float16
    assert (found.double() - expected).abs().max() < 2**-8  # values are below 8: one rounding to fp16


def explicit_in_float64(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(diagonal=1)
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ value.double()


@pytest.mark.parametrize("attend", [explicit_attention, fused_attention])
def test_large_scores_past_500_tokens_survive_fp16(attend):
    """Both paths keep scores and softmax in fp32: else one large score makes a whole row nan."""
    survives_large_scores(attend)


def test_fp16_scores_are_noticed():
    """Trap 9: on ordinary queries nothing is to be seen, on large ones the output is nan."""
    query, key, value = large_half_heads(600)
    assert half_scores(query / 40, key / 40, value).isfinite().all()
    notices(survives_large_scores, half_scores)


def test_minus_a_billion_is_no_fp16_number_and_noticed():
    """Trap 9: as a mask to add, -1e9 turns into -inf, and 0 x -inf on the allowed places into nan."""
    fill = torch.tensor(-1e9).half()
    assert fill == -torch.inf

    def billion_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query.float() @ key.float().transpose(-1, -2) / query.shape[-1] ** 0.5
        hidden = (~causal_mask(query.shape[-2], key.shape[-2], query.device)).half()
        return ((scores + hidden * fill).softmax(dim=-1) @ value.float()).half()

    notices(survives_large_scores, billion_mask)


def test_the_fill_values_of_release_and_hugging_face_agree_on_causal_rows():
    """-10000 in the release, the dtype's minimum in Hugging Face: the first token of a row is always allowed."""
    query, key, value = torch.randn(3, 1, 2, 50, 16, generator=torch.Generator().manual_seed(0))
    ours = explicit_attention(query, key, value)
    for fill in (-10000.0, torch.finfo(torch.float32).min):
        torch.testing.assert_close(half_scores(query, key, value, fill), ours, atol=1e-6, rtol=1e-6)


class Holding:
    """A cache that says it holds `length` tokens, for models that must refuse before they ask it for one."""

    def __init__(self, length: int):
        self.length = length

    def update(self, layer_index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return key, value

    def advance(self, tokens: int) -> None:
        self.length += tokens


def refuses_past_the_context(model: NeoXModel) -> None:
    limit = model.config.max_position_embeddings
    for held, new in ((limit, 1), (limit - 1, 2), (0, limit + 1)):
        with pytest.raises(ValueError, match=rf"{held} cached \+ {new} new tokens exceed the context of {limit}"):
            model(torch.zeros(1, new, dtype=torch.int64), Holding(held))
    model(torch.zeros(1, 1, dtype=torch.int64), Holding(limit - 1))  # the last position is still inside


@torch.inference_mode()
def test_a_model_without_the_wall_is_noticed(random_model, monkeypatch):
    """Trap 10: repeating the last position gives logits of the right shape, and text that falls apart."""
    model = random_model(replace(SMALL, max_position_embeddings=32))
    refuses_past_the_context(model)
    right = model.rotary.rows

    def clamped(start: int, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = right(0, 32, like)
        rows = torch.arange(start, start + tokens).clamp(max=31)
        return cos[rows], sin[rows]

    monkeypatch.setattr(model.rotary, "rows", clamped)
    shapes_fit(model, torch.zeros(1, 40, dtype=torch.int64))
    notices(refuses_past_the_context, model)


def top_left_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Trap 11: `is_causal` with cached keys puts the diagonal at the top left, as if the chunk came first."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[-2] > 1)


def no_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Trap 11: right for one new token, so nobody misses the mask until a chunk comes."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[-2] == key.shape[-2] > 1)


@pytest.mark.parametrize("wrong", [top_left_mask, no_mask])
def test_a_wrong_mask_behind_a_cache_is_noticed(monkeypatch, wrong):
    """Trap 11: whole prompts and single tokens are right with either, chunks behind a cache are not."""
    query, key, value = torch.randn(3, 1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    for new in (6, 1):
        torch.testing.assert_close(
            wrong(query[:, :, -new:], key, value), fused_attention(query[:, :, -new:], key, value)
        )
    monkeypatch.setattr("neox_lib.attention.fused_attention", wrong)
    notices(test_attention.test_a_cache_gets_the_new_rows_and_its_rows_are_used)


TEXT = {"spaces": "  hello" + " " * 25 + "x", "marks": "cafe\u0301 \u212b", "specials": "a<|endoftext|>\u0338b"}


def nothing_added(tokenizer: BPETokenizer, monkeypatch) -> str:
    """Trap 12: runs of spaces go through the merges like any other text."""
    monkeypatch.setattr(tokenizer, "added_pattern", tokenizer.special_pattern)
    return "spaces"


def no_nfc(tokenizer: BPETokenizer, monkeypatch) -> str:
    """Trap 12: e and its accent stay two characters."""
    monkeypatch.setattr("neox_lib.tokenizer.unicodedata", SimpleNamespace(normalize=lambda form, text: text))
    return "marks"


def nfc_before_specials(tokenizer: BPETokenizer, monkeypatch) -> str:
    """Trap 12: normalising first lets a mark swallow the last character of a special."""
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: encode(unicodedata.normalize("NFC", text)))
    return "specials"


@pytest.mark.parametrize("trap", [nothing_added, no_nfc, nfc_before_specials])
def test_a_tokenizer_that_only_round_trips_is_noticed(tokenizer_20b_path, monkeypatch, trap):
    """Trap 12: the text comes back, so a round trip passes; but the model was trained on other ids."""
    ours, fast = read_tokenizer(tokenizer_20b_path), create_tokenizer(tokenizer_20b_path)

    def equals_library(text: str) -> None:
        assert ours.encode(text) == fast.encode(text).ids

    for text in TEXT.values():
        equals_library(text)
    text = TEXT[trap(ours, monkeypatch)]
    back = ours.decode(ours.encode(text), skip_special_tokens=False)
    assert unicodedata.normalize("NFC", back) == unicodedata.normalize("NFC", text)
    notices(equals_library, text)
