"""The four functions of the reference implementation, used as its README uses them, and prompts of every kind."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import neox_lib
from neox_lib.config import NeoXConfig
from neox_lib.generation import prompt_ids, stream_generate
from neox_lib.model import NeoXModel
from neox_lib.tokenizer import ENDOFTEXT, encode_text, save_tokenizer, train_tokenizer

README_PROMPT = "GPTNeoX20B is a 20B-parameter autoregressive Transformer model developed by EleutherAI."
SMALL = NeoXConfig(
    vocab_size=320,
    tokenizer_vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=256,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of 300 tokens, from its file through `create_tokenizer`."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save_tokenizer(train_tokenizer([README_PROMPT], 300), path)
    return neox_lib.create_tokenizer(path)


def greedy_by_hand(model: NeoXModel, ids: list[int], max_seq_len: int) -> list[int]:
    """The definition: the likeliest real token after a whole pass over everything, until endoftext or the length."""
    ids = list(ids)
    with torch.inference_mode():
        while len(ids) < max_seq_len:
            ids.append(int(model(torch.tensor([ids]))[0, -1, : model.config.tokenizer_vocab_size].argmax()))
            if ids[-1] == 0:
                break
    return ids


def test_the_readme_of_the_reference_runs(random_model, tokenizer_20b_path):
    """Code written for the reference implementation works with its import changed."""
    config = NeoXConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, rotary_pct=0.5
    )
    model = random_model(config)
    tokenizer = neox_lib.create_tokenizer(tokenizer_20b_path)
    with torch.inference_mode():
        text = neox_lib.greedy_generate_text(model, tokenizer, README_PROMPT, max_seq_len=100)
    prompt = tokenizer.encode(README_PROMPT).ids
    expected = greedy_by_hand(model, prompt, 100)
    assert text == README_PROMPT + tokenizer.decode(expected[len(prompt) :])
    assert len(expected) > len(prompt)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generate_gives_lists_of_ids_that_start_with_the_prompt(random_model, token_ids, use_cache):
    """Plain whole numbers, `max_seq_len` of them with the prompt's; the reference gave 0-d tensors."""
    model, ids = random_model(SMALL), token_ids(SMALL, 3, 12)
    model.use_cache = use_cache
    rows = neox_lib.greedy_generate(model, ids, max_seq_len=40)
    assert [type(value) for row in rows for value in row] == [int] * sum(map(len, rows))
    assert rows == [greedy_by_hand(model, prompt, 40) for prompt in ids.tolist()]
    assert max(map(len, rows)) == 40


def test_a_row_that_ends_closes_with_endoftext_and_is_not_padded(random_model, token_ids):
    """The reference wrote on past the end of the text."""
    model, ids = random_model(SMALL), token_ids(SMALL, 4, 6)
    ends = greedy_by_hand(model, ids[1].tolist(), 12)[-3]  # the token that row 1 gives fourth shall end a text
    rename = {0: ends, ends: 0}
    with torch.no_grad():
        for weight in (model.word_embeddings.weight, model.final_linear.weight):
            weight[[0, ends]] = weight[[ends, 0]]
    ids = torch.tensor([[rename.get(value, value) for value in row] for row in ids.tolist()])
    rows = neox_lib.greedy_generate(model, ids, max_seq_len=30)
    assert rows == [greedy_by_hand(model, prompt, 30) for prompt in ids.tolist()]
    assert (len(rows[1]), rows[1][-1]) == (10, 0)
    assert {len(row) for row in rows} != {10}


@pytest.mark.parametrize("max_seq_len", [0, 3, 6])
def test_no_room_for_more_returns_the_prompt(random_model, token_ids, tokenizer, max_seq_len):
    model, ids = random_model(SMALL), token_ids(SMALL, 2, 6)
    assert neox_lib.greedy_generate(model, ids, max_seq_len) == ids.tolist()
    assert neox_lib.greedy_generate_text(model, tokenizer, "e\u0301  abcdefg", max_seq_len) == "e\u0301  abcdefg"


def test_past_the_context_is_refused(random_model, token_ids, tokenizer):
    """`max_seq_len` may be the whole context, 256 here, and no more."""
    model, ids = random_model(SMALL), token_ids(SMALL, 1, 250)
    assert len(neox_lib.greedy_generate(model, ids, 256)[0]) == 256
    with pytest.raises(ValueError, match=r"250 tokens \+ 7 new ones = 257, .* holds 256"):
        neox_lib.greedy_generate(model, ids, 257)
    with pytest.raises(ValueError, match=r"= 2048, .* holds 256"):
        neox_lib.greedy_generate_text(model, tokenizer, "a", 2048)


def test_any_text_is_continued_and_stays_as_it_was(random_model, tokenizer):
    """Tokens are of composed (NFC) text, and control tokens are not shown: the prompt must not come back changed."""
    model = random_model(SMALL)

    @settings(max_examples=60, deadline=None)
    @given(st.text(st.characters(codec="utf-8"), max_size=20))
    @example("")
    @example("     ")
    @example("\x00")
    @example("e\u0301a\u0308 \u1100\u1161")
    @example("<script>alert('1')</script>")
    @example(f"the end{ENDOFTEXT}once")
    @example("👩‍👩‍👧‍👦 🇳🇱")
    @example("\r\n\t ")
    def check(prompt):
        ids = encode_text(tokenizer, prompt) or [0]
        expected = greedy_by_hand(model, ids, len(ids) + 5)
        text = neox_lib.greedy_generate_text(model, tokenizer, prompt, max_seq_len=len(ids) + 5)
        assert text.startswith(prompt)
        assert text[len(prompt) :] == tokenizer.decode(expected[len(ids) :])

    check()


def test_an_empty_prompt_starts_as_every_text_in_training_did(random_model, tokenizer):
    """After endoftext, which counts as one token of `max_seq_len`."""
    assert prompt_ids(tokenizer, "").tolist() == [[0]]
    model = random_model(SMALL)
    expected = greedy_by_hand(model, [0], 9)
    assert neox_lib.greedy_generate_text(model, tokenizer, "", 9) == tokenizer.decode(expected)


def test_endoftext_in_a_prompt_is_the_control_token(tokenizer):
    """It separates texts; a prompt may hold several."""
    assert prompt_ids(tokenizer, f"a{ENDOFTEXT}b").tolist() == [
        [tokenizer.encode("a").ids[0], 0, *tokenizer.encode("b").ids]
    ]


def test_a_megabyte_of_text_is_refused_with_its_length(random_model, tokenizer):
    """A pasted book is told how long it is, not cut in silence."""
    text = "abcdefghijklmnop " * 60_000
    with pytest.raises(ValueError, match=r"prompt of \d{6,} tokens .* holds 256; shorten the prompt"):
        neox_lib.greedy_generate_text(random_model(SMALL), tokenizer, text, 200)


@pytest.mark.parametrize("fast", [True, False])
def test_a_lone_surrogate_is_refused_by_name(random_model, tokenizer, fast):
    """What a broken copy and paste leaves; the libraries' own error speaks of codecs."""
    chosen = tokenizer if fast else train_tokenizer([""], 281)
    with pytest.raises(ValueError, match=r"character 2 is a lone surrogate, '\\ud83e'"):
        neox_lib.greedy_generate_text(random_model(SMALL), chosen, "ab\ud83e", 20)


def test_both_tokenizers_continue_a_text_alike(random_model, tokenizer, tmp_path):
    """The readable tokenizer of the lesson can take the place of the fast one."""
    readable = train_tokenizer([README_PROMPT], 300)
    model = random_model(SMALL)
    texts = [neox_lib.greedy_generate_text(model, each, "GPT né 🦊", 60) for each in (tokenizer, readable)]
    assert texts[0] == texts[1] != "GPT né 🦊"


def test_the_text_is_the_stream(random_model, tokenizer):
    """There is one loop: what the function returns is what streaming shows."""
    model, prompt = random_model(SMALL), "a parameter"
    ids = prompt_ids(tokenizer, prompt)
    steps = stream_generate(model, ids, 60 - ids.shape[1], tokenizer=tokenizer)
    assert neox_lib.greedy_generate_text(model, tokenizer, prompt, 60) == prompt + "".join(step.text for step in steps)
