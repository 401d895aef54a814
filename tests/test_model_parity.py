"""The whole model against Hugging Face's GPTNeoXForCausalLM, which we did not write, on the same random weights."""

from dataclasses import replace

import pytest
import torch

from neox_lib.cache import KVCache
from neox_lib.config import NeoXConfig
from neox_lib.inspection.attention import model_attention_weights
from neox_lib.model import Stopped

BASE = NeoXConfig(
    vocab_size=128,
    tokenizer_vocab_size=120,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=256,
    rotary_pct=0.25,
)

# name: (config, batch, tokens)
CASES = {
    "20b rules": (BASE, 2, 33),
    "pythia rules": (replace(BASE, hidden_act="gelu"), 2, 33),
    "one token": (BASE, 1, 1),
    "two tokens": (replace(BASE, hidden_act="gelu"), 3, 2),
    "rotary everywhere": (replace(BASE, rotary_pct=1.0), 2, 65),
    "half rotary, exact": (replace(BASE, rotary_pct=0.5, hidden_act="gelu"), 1, 100),
    "sequential residual": (replace(BASE, use_parallel_residual=False), 2, 40),
    "sequential, exact, rotary everywhere": (
        replace(BASE, use_parallel_residual=False, hidden_act="gelu", rotary_pct=1.0),
        1,
        40,
    ),
    "tied": (replace(BASE, tie_word_embeddings=True), 2, 40),
    "tied, sequential": (replace(BASE, tie_word_embeddings=True, use_parallel_residual=False), 1, 40),
    "three heads": (replace(BASE, hidden_size=72, num_attention_heads=3), 2, 50),
    "five heads, narrow mlp": (replace(BASE, hidden_size=40, num_attention_heads=5, intermediate_size=56), 2, 50),
    "one head": (replace(BASE, hidden_size=24, num_attention_heads=1, intermediate_size=96), 1, 64),
    "another base, another epsilon": (replace(BASE, rotary_emb_base=500, layer_norm_eps=1e-3), 1, 300),
    "700 tokens": (replace(BASE, num_hidden_layers=2), 1, 700),
    "the whole context": (replace(BASE, num_hidden_layers=1), 1, 2048),
    "the whole context, rotary everywhere": (replace(BASE, num_hidden_layers=2, rotary_pct=1.0), 1, 2048),
}


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_logits_equal_hugging_face(twins, token_ids, case):
    """Without this no figure of a lesson need be GPT-NeoX's. Bound: 1e-5 of the widest logit, in fp32."""
    config, batch, tokens = CASES[case]
    ours, theirs = twins(config, seed=len(case))
    ids = token_ids(config, batch, tokens)
    found, expected = ours(ids), theirs(ids).logits
    width = expected.abs().max().item()
    assert width > 2, "with tiny logits the bound would mean nothing"
    assert (found - expected).abs().max().item() <= 1e-5 * width


@pytest.mark.parametrize("case", ["20b rules", "sequential, exact, rotary everywhere", "three heads"])
@torch.inference_mode()
def test_every_layer_equals_hugging_face(twins, token_ids, case):
    """The lesson shows parity layer by layer: two mistakes that cancel, or a late one, must have an address."""
    config, batch, tokens = CASES[case]
    ours, theirs = twins(config, attention="sdpa")
    seen: dict[str, list[torch.Tensor]] = {"ours": [], "theirs": []}

    def keep(whose):
        return lambda module, inputs, output: seen[whose].append(output[0] if isinstance(output, tuple) else output)

    for whose, parts in (
        ("ours", [ours.word_embeddings, *ours.layers, ours.norm]),
        ("theirs", [theirs.gpt_neox.embed_in, *theirs.gpt_neox.layers, theirs.gpt_neox.final_layer_norm]),
    ):
        for part in parts:
            part.register_forward_hook(keep(whose))
    ids = token_ids(config, batch, tokens)
    ours(ids), theirs(ids)
    assert len(seen["ours"]) == config.num_hidden_layers + 2
    for depth, (found, expected) in enumerate(zip(seen["ours"], seen["theirs"], strict=True)):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), f"they part after step {depth}"


@pytest.mark.parametrize("case", ["20b rules", "pythia rules", "sequential residual"])
@torch.inference_mode()
def test_greedy_tokens_equal_hugging_face(twins, token_ids, case):
    """100 tokens one by one: a small error of position would grow and change a word."""
    config = CASES[case][0]
    ours, theirs = twins(config, seed=7, attention="sdpa")
    ids = token_ids(config, 1, 5)
    expected = theirs.generate(ids, max_new_tokens=100, min_new_tokens=100, do_sample=False, eos_token_id=None)
    for _ in range(100):
        ids = torch.cat([ids, ours(ids)[:, -1:].argmax(dim=-1)], dim=1)
    assert len(set(ids[0].tolist())) > 20, "a model that repeats itself would prove little"
    assert ids.tolist() == expected.tolist()


@pytest.mark.parametrize("case", ["20b rules", "pythia rules", "sequential residual", "tied", "700 tokens"])
@torch.inference_mode()
def test_fp16_stays_within_its_rounding(twins, token_ids, case):
    """The released weights are fp16, so this is how people run them.

    Bound: rounding to fp16 moves a number by at most 2^-11 of its size. On its way through a block it is rounded about
    eight times in a row (norm, projection, rotary, attention, output, two MLP layers, sum), and three times outside.
    The roundings are independent, so they add up like the steps of a random walk: the square root of their number,
    times 2 for the worst of many logits.
    """
    config, batch, tokens = CASES[case]
    ours, theirs = twins(config, seed=3)
    ids = token_ids(config, batch, tokens)
    ours, theirs = ours.half(), theirs.half()
    found, expected = ours(ids), theirs(ids).logits
    exact = ours.float()(ids)  # the same fp16 weights, exact arithmetic
    assert found.dtype == torch.float16
    bound = 2 * (8 * config.num_hidden_layers + 3) ** 0.5 / 2**11 * exact.abs().max()
    assert (found.float() - expected.float()).abs().max() <= bound
    assert (found.float() - exact).abs().max() <= bound


@torch.inference_mode()
def test_every_sequence_of_a_batch_is_on_its_own(random_model, token_ids):
    """A batch is only a way to save time: no sequence may feel its neighbours."""
    model = random_model(BASE)
    ids = token_ids(BASE, 3, 20)
    alone = torch.cat([model(row[None]) for row in ids])
    torch.testing.assert_close(model(ids), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[3, 128]]), "token id 128 .* 0 to 127"),
        (torch.tensor([[-1, 3]]), "token id -1 .* 0 to 127"),
        (torch.tensor([1, 2]), r"\[batch, tokens\].* got \[2\]"),
        (torch.zeros(1, 0, dtype=torch.int64), r"at least one token, got \[1, 0\]"),
        (torch.zeros(1, 2), "int64 or int32, got torch.float32"),
        ([[1, 2]], "got list"),
    ],
    ids=["too large", "negative", "no batch", "empty", "floats", "a list"],
)
def test_ids_that_are_none_get_a_clear_error(random_model, ids, message):
    """A wrong tokenizer is a common mistake; an IndexError from deep inside would not say so."""
    with pytest.raises(ValueError, match=message):
        random_model(BASE)(ids)


@torch.inference_mode()
def test_int32_ids_give_the_same_logits(random_model, token_ids):
    """Ids often come from numpy as int32."""
    model, ids = random_model(BASE), token_ids(BASE, 1, 9)
    assert torch.equal(model(ids.int()), model(ids))


@torch.inference_mode()
def test_attention_weights_are_those_that_made_the_logits(twins, token_ids):
    """Plots show `model_attention_weights`: they must be what Hugging Face reports for the same pass."""
    config, batch, tokens = CASES["20b rules"]
    ours, theirs = twins(config)
    ids = token_ids(config, batch, tokens)
    expected = torch.stack(theirs(ids, output_attentions=True).attentions)
    assert (model_attention_weights(ours, ids) - expected).abs().max() <= 1e-5


def test_parts_of_a_model_can_be_watched(random_model, token_ids):
    """A progress bar and a look inside need every layer, in order, and the stream that the last norm reads."""
    model, ids, seen = random_model(BASE), token_ids(BASE, 2, 4), []
    logits = model(ids, on_layer=lambda depth, hidden: seen.append((depth, hidden)))
    assert [depth for depth, _ in seen] == list(range(BASE.num_hidden_layers + 1))
    assert torch.equal(seen[0][1], model.word_embeddings(ids))
    assert torch.equal(model.final_linear(model.norm(seen[-1][1])), logits)


@pytest.mark.parametrize("last", range(BASE.num_hidden_layers + 1))
def test_a_pass_can_be_stopped_between_any_two_layers(random_model, token_ids, last):
    """Stop must really end the work, and the cache must not count tokens that did not go through."""
    model, ids, seen = random_model(BASE), token_ids(BASE, 1, 4), []
    cache = KVCache(BASE, 1, 8, torch.device("cpu"), torch.float32)
    model(ids, cache)
    with pytest.raises(Stopped):
        model(ids, cache, on_layer=lambda depth, hidden: seen.append(depth) or depth < last)
    assert seen == list(range(last + 1))
    assert cache.length == 4


@torch.inference_mode()
def test_the_last_position_alone_gets_the_same_scores(random_model, token_ids):
    """Generation needs one row of 50,432 scores, not one for each token of the prompt."""
    model, ids = random_model(BASE), token_ids(BASE, 2, 9)
    last = model(ids, last_only=True)
    assert last.shape == (2, 1, BASE.vocab_size)
    torch.testing.assert_close(last, model(ids)[:, -1:])
