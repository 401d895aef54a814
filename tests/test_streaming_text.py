"""Text that appears token by token: all of it, in order, and never a part of a character."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from neox_lib.config import NeoXConfig
from neox_lib.generation import StreamDecoder, prompt_ids, stream_generate
from neox_lib.inspection.tokens import token_label
from neox_lib.loading import create_tokenizer
from neox_lib.playground.token_text import spell
from neox_lib.sampling import Sampling
from neox_lib.stop_strings import StopText
from neox_lib.tokenizer import (
    BYTE_TO_CHARACTER,
    ENDOFTEXT,
    BPETokenizer,
    encode_text,
    read_tokenizer,
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
    return [*shown[:-1], shown[-1] + decoder.flush()]


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


few_letters = st.text("ab\n", max_size=6)


@settings(max_examples=300, deadline=None)
@given(st.lists(few_letters, min_size=1, max_size=8), st.lists(few_letters.filter(bool), min_size=1, max_size=3))
def test_a_stop_string_ends_a_text_at_the_same_place_however_it_is_cut(pieces, stops):
    """No character of it is ever shown, and nothing waits that can't be the beginning of one."""
    whole = "".join(pieces)
    complete = [end for end in range(len(whole) + 1) if whole[:end].endswith(tuple(stops))]
    expected = whole
    if complete:
        before = whole[: complete[0]]
        expected = before[: min(len(before) - len(stop) for stop in stops if before.endswith(stop))]
    text, shown, said = StopText(stops), "", ""
    for number, piece in enumerate(pieces, 1):
        said += piece
        shown += text.push(piece, last=number == len(pieces))
        if text.stopped:
            break
        assert shown + text.waiting == said
        assert not text.waiting or any(stop.startswith(text.waiting) for stop in stops)
        assert "".join(pieces[number - text.held : number]).endswith(text.waiting)
    assert (shown, text.stopped) == (expected, bool(complete))
    assert "".join(pieces[: number - text.held]) == expected[: len("".join(pieces[: number - text.held]))]


def test_half_a_character_before_a_stop_string_is_held_with_it():
    """A program that drops the tokens that are held would else leave the first byte of é."""
    held, text = [], StopText(["éa"])
    decoder = StreamDecoder(BYTES_ONLY)
    for token_id in BYTES_ONLY.encode("néa"):
        text.push(decoder.push(token_id))
        held.append(text.held)
    assert text.stopped and held == [0, 1, 2, 3]


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


# Tokenizers of other kinds, with a decoder of their own

SENTENCES = ["the quick brown fox doesn't jump . " * 9, "日本語の文章を書きます。 " * 9]
MARKED = ["<unk>", "<s>", "</s>"]
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]


def trained(model, trainer, before=None, decoder=None, normalizer=None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if before is not None:
        tokenizer.pre_tokenizer = before
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_tokens(["café", " two words "])
    return tokenizer


def sentencepiece(*after) -> Tokenizer:
    """As Llama's and LINE's: what has no token falls back to bytes, and text begins with a space that is stripped."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=MARKED + FALLBACK, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES[:1], trainer)
    fields = json.loads(tokenizer.to_str())
    fields["added_tokens"] = fields["added_tokens"][: len(MARKED)]  # bytes are text, no control tokens
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    before = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*before, *after])
    return tokenizer


def other_tokenizers() -> dict[str, Tokenizer]:
    quiet = {"special_tokens": MARKED, "show_progress": False}
    unigram = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", **quiet)
    pieces = trainers.WordPieceTrainer(vocab_size=120, **quiet)
    words = trainers.BpeTrainer(vocab_size=150, end_of_word_suffix="</w>", **quiet)
    byte_level = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **quiet)
    metaspace, space = pre_tokenizers.Metaspace(), pre_tokenizers.Whitespace()
    return {
        "unigram": trained(models.Unigram(), unigram, metaspace, decoders.Metaspace(), normalizers.NFKC()),
        "sentencepiece": sentencepiece(decoders.Strip(" ", 1, 0)),
        "three spaces stripped": sentencepiece(decoders.Strip(" ", 3, 0)),
        "replaced in the joined text": sentencepiece(decoders.Replace(" .", ".")),
        "replaced by a pattern": sentencepiece(decoders.Replace(Regex("o+x|\\s+"), "#")),
        "word pieces": trained(models.WordPiece(unk_token="<unk>"), pieces, space, decoders.WordPiece()),
        "word ends": trained(models.BPE(unk_token="<unk>"), words, space, decoders.BPEDecoder("</w>")),
        "repeats dropped": trained(models.Unigram(), unigram, metaspace, decoders.CTC("<s>", "▁")),
        "no decoder": trained(models.Unigram(), unigram, metaspace, normalizer=normalizers.NFC()),
        "bytes among others": trained(
            models.BPE(),
            byte_level,
            pre_tokenizers.ByteLevel(),
            decoders.Sequence([decoders.ByteLevel(), decoders.Replace("z", "zz")]),
        ),
    }


OTHERS = other_tokenizers()


@pytest.mark.parametrize("name", OTHERS)
def test_any_decoders_text_is_streamed_as_it_decodes_all_tokens(name):
    """The space before a word, a byte that spoils its neighbours, a suffix: all that a decoder does with tokens."""
    tokenizer = OTHERS[name]
    some_bytes = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in (0x41, 0xE6, 0x97, 0xA5, 0xFF)]
    usual = st.integers(0, tokenizer.get_vocab_size())  # one past the last too
    ids = usual if None in some_bytes else usual | st.sampled_from(some_bytes)

    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(ids, min_size=1, max_size=12)
        | st.text("ab é日本x🦊 .'▁", min_size=1).map(lambda t: tokenizer.encode(t).ids or [0])
    )
    def check(ids):
        assert "".join(shown_by(tokenizer, ids)) == tokenizer.decode(ids)

    check()


def test_words_appear_as_they_are_written_and_with_their_spaces():
    """Nothing waits that is settled; a run of byte tokens waits for its end, as one bad byte would spoil it all."""
    tokenizer = OTHERS["sentencepiece"]
    byte = {value: tokenizer.token_to_id(f"<0x{value:02X}>") for value in (0xE6, 0x97, 0xA5)}
    space, x = tokenizer.token_to_id("▁"), tokenizer.token_to_id("x")
    assert shown_by(tokenizer, [space, x, space, x, *byte.values(), x]) == ["", "x", " ", "x", "", "", "", "日x"]
    assert shown_by(tokenizer, [x, byte[0xE6], byte[0x97]]) == ["x", "", "\ufffd\ufffd"]
    assert [token_label(tokenizer, token_id) for token_id in (space, 2, byte[0xE6])] == [" ", "</s>", "<0xE6>"]


@given(words=st.lists(st.text("éüÿđÀñabĠ ÅŁ", min_size=2, max_size=6), min_size=1, max_size=4, unique=True))
@settings(max_examples=60, deadline=None)
def test_an_added_token_is_spelled_as_it_was_typed(tmp_path_factory, words):
    """ "café" is text: read as bytes, as other tokens are, its é would be one byte and no character."""
    path = tmp_path_factory.mktemp("added") / "tokenizer.json"
    save_tokenizer(BYTES_ONLY, path)
    fast = Tokenizer.from_file(str(path))
    fast.add_tokens(words)
    fast.save(str(path))
    fast, ours = create_tokenizer(path), read_tokenizer(path)
    for word in words:
        ids = encode_text(fast, word)
        assert ids == ours.encode(word)
        assert "".join(shown_by(fast, ids)) == "".join(shown_by(ours, ids)) == ours.decode(ids) == word


def test_every_token_that_is_marked_special_is_silent(tmp_path):
    path = tmp_path / "tokenizer.json"
    save_tokenizer(BYTES_ONLY, path)
    fast = Tokenizer.from_file(str(path))
    fast.add_special_tokens(["<|user|>"])
    fast.save(str(path))
    for tokenizer in (create_tokenizer(path), read_tokenizer(path)):
        assert shown_by(tokenizer, encode_text(tokenizer, "a<|user|>b")) == ["a", "", "b"]
        assert [token.control for token in spell(tokenizer, encode_text(tokenizer, "a<|user|>"))] == [False, True]
