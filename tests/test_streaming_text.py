"""Text that appears token by token: all of it, in order, and never a part of a character."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from neox_lib.config import NeoXConfig
from neox_lib.generation import StreamDecoder, prompt_ids, stream_generate
from neox_lib.loading import create_tokenizer
from neox_lib.sampling import Sampling
from neox_lib.tokenizer import (
    BYTE_TO_CHARACTER,
    ENDOFTEXT,
    BPETokenizer,
    encode_text,
    save_tokenizer,
    train_tokenizer,
)

# Characters of one to four bytes; emoji of several code points, combining marks, scripts that 20B spells byte by byte.
HARD_TEXTS = [
    "plain words, and  two   spaces",
    "né è ü ñ",
    "e\u0301 a\u0308\u0323",
    "🦊 🏳️‍🌈 👩‍👩‍👧‍👦 👍🏽 🇳🇱",
    "ภาษาไทย ก็",
    "日本語 한국어 Ελληνικά עברית",
    "𐍈 𓀀 𝄞",
    "tab\tnew\nline\r\n\x00end",
    f"a{ENDOFTEXT}b",
    "\ufffd already there",
]
BYTES_ONLY = train_tokenizer([""], 281)


def as_read(text: str) -> str:
    """What the tokenizer makes of a text: composed (NFC), without its control tokens."""
    return BYTES_ONLY.decode(BYTES_ONLY.encode(text))


@pytest.fixture(scope="module")
def tokenizers(tokenizer_20b_path, tmp_path_factory) -> dict[str, Tokenizer | BPETokenizer]:
    """Ours with bytes alone, ours with some merges, the same through the fast library, and the released one."""
    small = train_tokenizer(HARD_TEXTS, 400)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save_tokenizer(small, path)
    return {
        "bytes only": BYTES_ONLY,
        "small": small,
        "small, fast": create_tokenizer(path),
        "20b": create_tokenizer(tokenizer_20b_path),
    }


NAMES = ["bytes only", "small", "small, fast", "20b"]


def shown_by(tokenizer, ids: list[int]) -> list[str]:
    """What each token shows; the last one also what never became a character."""
    decoder = StreamDecoder(tokenizer)
    shown = [decoder.push(token_id) for token_id in ids]
    return [*shown[:-1], shown[-1] + decoder.end()]


def size_of(tokenizer) -> int:
    return tokenizer.get_vocab_size() if isinstance(tokenizer, Tokenizer) else len(tokenizer.tokens)


@pytest.mark.parametrize("name", NAMES)
def test_any_tokens_give_the_text_that_decoding_all_of_them_gives(tokenizers, name):
    """A model may write any sequence of tokens, broken characters and control tokens included."""
    tokenizer = tokenizers[name]

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(0, size_of(tokenizer) - 1), min_size=1, max_size=40))
    def check(ids):
        assert "".join(shown_by(tokenizer, ids)) == tokenizer.decode(ids)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_after_each_byte_all_whole_characters_are_shown_and_no_part_of_one(tokenizers, name):
    """Half of an emoji on the screen is a black diamond that never goes away; text held back looks like a hang.

    Random ids of 50,277 are mostly words; these are single bytes, where broken characters are the rule.
    """
    tokenizer = tokenizers[name]
    byte_ids = [tokenizer.token_to_id(token) for token in BYTES_ONLY.vocab if len(token) == 1]
    byte_ids = [
        token_id for token_id in byte_ids if token_id is not None
    ]  # 20B has no token for bytes UTF-8 never uses

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.sampled_from(byte_ids), min_size=1, max_size=30))
    def check(ids):
        shown = shown_by(tokenizer, ids)
        assert "".join(shown) == tokenizer.decode(ids)
        for count in range(1, len(ids)):
            so_far, decoded = "".join(shown[:count]), tokenizer.decode(ids[:count])
            # Decoding marks an unfinished character at the end with one U+FFFD; with two if it is the first two bytes
            # of an encoded surrogate (ED A0 .. ED BF), which Python's reader judges when it has the third.
            assert decoded in (so_far, so_far + "\ufffd", so_far + "\ufffd\ufffd")

    check()


@pytest.mark.parametrize("name", NAMES)
def test_a_text_of_whole_characters_never_shows_a_broken_one(tokenizers, name):
    """However its characters are cut into tokens."""
    tokenizer = tokenizers[name]

    @settings(max_examples=100, deadline=None)
    @given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), min_size=1))
    def check(text):
        ids = encode_text(tokenizer, text)
        shown = shown_by(tokenizer, ids)
        assert "".join(shown) == as_read(text)
        assert "\ufffd" not in "".join(shown)

    check()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_stream_whole(tokenizers, name, text):
    assert "".join(shown_by(tokenizers[name], encode_text(tokenizers[name], text))) == as_read(text)


def test_a_character_appears_with_its_last_byte():
    """Bytes of an unfinished character wait, and what waited comes with the byte that completes it."""
    assert shown_by(BYTES_ONLY, BYTES_ONLY.encode("aé€🦊")) == ["a", "", "é", "", "", "€", "", "", "", "🦊"]


def test_a_byte_that_breaks_a_character_off_shows_what_can_be_shown():
    """The mark for the broken one comes as soon as it is certain, and the next character is not lost."""
    fox, letter = BYTES_ONLY.encode("🦊"), BYTES_ONLY.encode("a")
    assert shown_by(BYTES_ONLY, fox[:2] + letter) == ["", "", "\ufffda"]
    assert shown_by(BYTES_ONLY, fox[:3]) == ["", "", "\ufffd"]
    assert shown_by(BYTES_ONLY, fox[1:2] + letter) == ["\ufffd", "a"]


def test_bytes_of_a_surrogate_become_marks_and_swallow_nothing():
    """ED A0 80 looks like a character of three bytes and is none: three marks, then the letter."""
    surrogate = [BYTES_ONLY.vocab[BYTE_TO_CHARACTER[byte]] for byte in (0xED, 0xA0, 0x80)]
    letter = BYTES_ONLY.encode("a")
    assert (
        "".join(shown_by(BYTES_ONLY, surrogate + letter)) == BYTES_ONLY.decode(surrogate + letter) == "\ufffd" * 3 + "a"
    )
    assert "".join(shown_by(BYTES_ONLY, surrogate[:2] + letter)) == "\ufffd\ufffda"


def test_a_control_token_shows_nothing_and_loses_nothing():
    fox = BYTES_ONLY.encode("🦊")
    assert shown_by(BYTES_ONLY, [*fox[:2], 0, 1, *fox[2:]]) == ["", "", "", "", "", "🦊"]


def test_a_row_that_stands_for_no_token_shows_nothing():
    """A model may be wider than its tokenizer; that is no reason to break off in the middle of a story."""
    assert shown_by(BYTES_ONLY, [5000, *BYTES_ONLY.encode("a")]) == ["", "a"]


def test_decoding_each_token_alone_is_noticed():
    """The plain way to stream, put in: it breaks every character that is more than one token."""
    ids = BYTES_ONLY.encode("né 🦊")
    assert "".join(BYTES_ONLY.decode([token_id]) for token_id in ids) != "né 🦊" == "".join(shown_by(BYTES_ONLY, ids))


# The same through the loop that writes text.


def model_for(random_model, tokenizer):
    size = size_of(tokenizer)
    config = NeoXConfig(
        vocab_size=size + 11,
        tokenizer_vocab_size=size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        rotary_pct=0.5,
    )
    return random_model(config)


@pytest.mark.parametrize("name", NAMES)
def test_the_texts_of_all_steps_are_the_decoding_of_all_new_tokens(random_model, tokenizers, name):
    """In a batch each row has a decoder of its own, which is emptied when the row ends or the tokens run out."""
    tokenizer = tokenizers[name]
    model = model_for(random_model, tokenizer)
    prompt = prompt_ids(tokenizer, "Once upon a time").expand(3, -1)
    for seed in range(4 if size_of(tokenizer) < 1000 else 2):
        sampling = Sampling(temperature=1.5, top_k=300, seed=seed)
        stops = (0, *range(2, size_of(tokenizer), 9))  # so that rows end at different steps, also on visible tokens
        ids: list[list[int]] = [[], [], []]
        texts = ["", "", ""]
        ended = [False] * 3
        for step in stream_generate(
            model, prompt, 30, tokenizer=tokenizer, sampling=sampling, stop_token_ids=stops if seed % 2 else ()
        ):
            for row in range(3):
                if ended[row]:
                    assert step.texts[row] == ""
                    continue
                ids[row].append(step.token_ids[row])
                texts[row] += step.texts[row]
                ended[row] = bool(seed % 2) and step.token_ids[row] in stops
        assert texts == [tokenizer.decode(row) for row in ids]


def test_without_a_tokenizer_texts_are_empty(random_model):
    steps = list(stream_generate(model_for(random_model, BYTES_ONLY), torch.tensor([[5, 6]]), 3, stop_token_ids=()))
    assert [step.texts for step in steps] == [[""]] * 3
