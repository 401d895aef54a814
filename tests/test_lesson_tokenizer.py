"""Notebook 01: its exercises tell wrong from right, and its bug exhibits are caught where the notebook says."""

from itertools import pairwise

import pytest

from neox_lib.course.exercises import tokenizer as exercises
from neox_lib.course.figures.tokenizer import box_rows
from neox_lib.course.real_tokenizer import real_tokenizer_path
from neox_lib.loading import create_tokenizer
from neox_lib.tokenizer import (
    ENDOFTEXT,
    BPETokenizer,
    apply_merges,
    byte_symbols,
    join_pair,
    pretokenize,
    token_to_bytes,
)
from tests.lessons import Lesson

EXERCISES = ["my_apply_merges", "my_encode", "my_decode", "my_encode_untrusted"]


@pytest.fixture(scope="module", autouse=True)
def real_file(tokenizer_20b_path):
    """The notebook reads the released file, wherever the tests found it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEOX_20B_TOKENIZER", str(tokenizer_20b_path))
        yield tokenizer_20b_path


@pytest.fixture(scope="module")
def lesson(real_file) -> Lesson:
    return Lesson("01_tokenizer")


@pytest.fixture(scope="module")
def folded_merges(lesson) -> tuple:
    """What the check says of the folded merges, and the pretokens that it had them merge; the story is written once."""
    asked, solution = [], lesson.solution("my_apply_merges")

    def my_merges(symbols, ranks):
        asked.append("".join(symbols))
        return solution(symbols, ranks)

    return exercises.apply_merges(my_merges), asked


def check_of(name: str):
    return getattr(exercises, name.removeprefix("my_"))


@pytest.mark.parametrize("name", EXERCISES)
def test_a_stub_is_told_kindly(lesson, name):
    result = check_of(name)(lesson.stub(name))
    assert not result.passed and f"Not written yet: {name}" in result.message


@pytest.mark.parametrize("name", EXERCISES)
def test_the_folded_solution_passes(lesson, folded_merges, name):
    """A reader who gives up must be given something that works."""
    result = folded_merges[0] if name == "my_apply_merges" else check_of(name)(lesson.solution(name))
    assert result.passed, result.message


def merge_leftmost(symbols: list[str], ranks: dict) -> list[str]:
    """Joins the first learned pair that it meets, whatever its rank."""
    symbols = list(symbols)
    while places := [place for place in range(len(symbols) - 1) if (symbols[place], symbols[place + 1]) in ranks]:
        symbols[places[0] : places[0] + 2] = [symbols[places[0]] + symbols[places[0] + 1]]
    return symbols


def merge_one_pair_only(symbols: list[str], ranks: dict) -> list[str]:
    """Forgets to go on: what was joined is not joined again."""
    learned = [place for place in range(len(symbols) - 1) if (symbols[place], symbols[place + 1]) in ranks]
    if not learned:
        return list(symbols)
    place = min(learned, key=lambda place: ranks[symbols[place], symbols[place + 1]])
    return [*symbols[:place], symbols[place] + symbols[place + 1], *symbols[place + 2 :]]


def merge_in_place(symbols: list[str], ranks: dict) -> list[str]:
    """Right, but changes the caller's list."""
    while learned := [place for place in range(len(symbols) - 1) if (symbols[place], symbols[place + 1]) in ranks]:
        place = min(learned, key=lambda place: ranks[symbols[place], symbols[place + 1]])
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    return symbols


def merge_letter_by_letter(symbols: list[str], ranks: dict) -> list[str]:
    """Looks for the best pair even where there is none."""
    while len(symbols) > 1:
        symbols = join_pair(symbols, min((pair for pair in pairwise(symbols) if pair in ranks), key=ranks.get))
    return list(symbols)


def merge_last_learned_first(symbols: list[str], ranks: dict) -> list[str]:
    while learned := [pair for pair in pairwise(symbols) if pair in ranks]:
        symbols = join_pair(symbols, max(learned, key=ranks.get))
    return list(symbols)


def merge_from_the_right(symbols: list[str], ranks: dict) -> list[str]:
    symbols = list(symbols)
    while learned := [place for place in range(len(symbols) - 1) if (symbols[place], symbols[place + 1]) in ranks]:
        place = min(reversed(learned), key=lambda place: ranks[symbols[place], symbols[place + 1]])
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    return symbols


def merge_into_a_text(symbols: list[str], ranks: dict) -> str:
    return " ".join(apply_merges(symbols, ranks))


def replay_all_merges(symbols: list[str], ranks: dict) -> list[str]:
    """Slow and right: every merge in the order of training, as the notebook does it first."""
    for pair in sorted(ranks, key=ranks.__getitem__):
        symbols = join_pair(symbols, pair)
    return list(symbols)


def test_a_slow_right_way_of_merging_is_not_called_wrong():
    """The notebook itself replays all merges; the words of the check are short enough for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exercises, "story_by_merges", lambda yours: "")
        patch.setattr(exercises, "TEXTS", exercises.TEXTS[:1])
        assert exercises.apply_merges(replay_all_merges).passed


def encode_across_words(text: str, ranks: dict, vocab: dict) -> list[int]:
    return [vocab[token] for token in apply_merges(byte_symbols(text), ranks)]


def encode_characters(text: str, ranks: dict, vocab: dict) -> list[int]:
    words = [list(pretoken.replace(" ", "Ġ")) for pretoken in pretokenize(text)]
    return [vocab[token] for word in words for token in apply_merges(word, ranks)]


def encode_without_merging(text: str, ranks: dict, vocab: dict) -> list[int]:
    return [vocab[token] for pretoken in pretokenize(text) for token in byte_symbols(pretoken)]


def encode_to_tokens(text: str, ranks: dict, vocab: dict) -> list[str]:
    return [token for pretoken in pretokenize(text) for token in apply_merges(byte_symbols(pretoken), ranks)]


def encode_the_last_word(text: str, ranks: dict, vocab: dict) -> list[int]:
    ids = []
    for pretoken in pretokenize(text):
        ids = [vocab[token] for token in apply_merges(byte_symbols(pretoken), ranks)]
    return ids


def encode_without_spaces(text: str, ranks: dict, vocab: dict) -> list[int]:
    return [vocab[token] for word in text.split() for token in apply_merges(byte_symbols(word), ranks)]


def decode_and_drop(ids: list[int], tokens: dict[int, str]) -> str:
    return b"".join(token_to_bytes(tokens[token_id]) for token_id in ids).decode("utf-8", errors="ignore")


def decode_to_bytes(ids: list[int], tokens: dict[int, str]) -> bytes:
    return b"".join(token_to_bytes(tokens[token_id]) for token_id in ids)


def decode_as_latin_1(ids: list[int], tokens: dict[int, str]) -> str:
    return decode_to_bytes(ids, tokens).decode("latin-1")


def decode_one_by_one(ids: list[int], tokens: dict[int, str]) -> str:
    return "".join(token_to_bytes(tokens[token_id]).decode("utf-8", errors="replace") for token_id in ids)


def decode_by_spelling(ids: list[int], tokens: dict[int, str]) -> str:
    return "".join(tokens[token_id] for token_id in ids)


def decode_strictly(ids: list[int], tokens: dict[int, str]) -> str:
    return b"".join(token_to_bytes(tokens[token_id]) for token_id in ids).decode("utf-8")


def encode_and_drop(tokenizer: BPETokenizer, text: str) -> list[int]:
    return [token_id for token_id in tokenizer.encode(text) if token_id > 1]


def encode_without_added(tokenizer: BPETokenizer, text: str) -> list[int]:
    return BPETokenizer(tokenizer.vocab, tokenizer.merges, {}, set()).encode(text)


def encode_letter_by_letter(tokenizer: BPETokenizer, text: str) -> list[int]:
    """No control token comes out and nothing is lost, but these are ids that the model has hardly ever seen."""
    parts = tokenizer.special_pattern.split(text)
    ids = [
        tokenizer.encode(part) if part not in tokenizer.special else map(tokenizer.vocab.get, part) for part in parts
    ]
    return [token_id for part in ids for token_id in part]


def encode_after_changing_the_tokenizer(tokenizer: BPETokenizer, text: str) -> list[int]:
    tokenizer.special.clear()
    tokenizer.special_pattern = tokenizer.added_pattern
    for token in (ENDOFTEXT, "<|padding|>"):
        tokenizer.added.pop(token, None)
    return encode_without_control(tokenizer, text)


def encode_without_control(tokenizer: BPETokenizer, text: str) -> list[int]:
    runs = {token: number for token, number in tokenizer.added.items() if token.isspace()}
    return BPETokenizer(tokenizer.vocab, tokenizer.merges, runs, set()).encode(text)


def encode_with_a_space_inside(tokenizer: BPETokenizer, text: str) -> list[int]:
    return tokenizer.encode(text.replace("<|", "< |"))


def encode_trustingly(tokenizer: BPETokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)


WRONG = [
    ("my_apply_merges", merge_leftmost, "the lowest rank goes first, not the leftmost pair"),
    ("my_apply_merges", merge_one_pair_only, "no learned pair is left at the end"),
    ("my_apply_merges", merge_in_place, "changed the list that it was given"),
    ("my_apply_merges", merge_letter_by_letter, "my_apply_merges(['f', 'o', 'x'], {}): your code raised ValueError"),
    ("my_apply_merges", merge_last_learned_first, "the lowest rank goes first"),
    ("my_apply_merges", merge_from_the_right, "of overlapping pairs of the same rank the leftmost goes first"),
    ("my_apply_merges", merge_into_a_text, "should be a list of symbols, but is a str"),
    ("my_encode", encode_across_words, "nothing is merged across the cut between two pretokens"),
    ("my_encode", encode_characters, "my_encode('é', "),
    ("my_encode", encode_without_merging, "the merges make one token of the word"),
    ("my_encode", encode_to_tokens, "should be [7], but is ['low']"),
    ("my_encode", encode_the_last_word, "each pretoken is encoded"),
    ("my_encode", encode_without_spaces, "the second has its space"),
    ("my_decode", decode_and_drop, "bytes that form no whole character become U+FFFD"),
    ("my_decode", decode_to_bytes, "should be a str, but is a bytes"),
    ("my_decode", decode_as_latin_1, "so join all bytes first"),
    ("my_decode", decode_one_by_one, "the bytes of one character can lie in several tokens"),
    ("my_decode", decode_by_spelling, "Ġ is how the vocabulary writes the byte of a space"),
    ("my_decode", decode_strictly, "my_decode of the tokens ['fox', 'ðŁ']: your code raised UnicodeDecodeError"),
    ("my_encode_untrusted", encode_letter_by_letter, "the letters of a control token are text like any other"),
    ("my_encode_untrusted", encode_after_changing_the_tokenizer, "should leave the tokenizer unchanged"),
    ("my_encode_untrusted", encode_with_a_space_inside, "nothing may be lost"),
    ("my_encode_untrusted", encode_and_drop, "nothing may be lost"),
    ("my_encode_untrusted", encode_without_added, "mind the runs of spaces"),
    ("my_encode_untrusted", encode_trustingly, "should hold no control token, but holds [0]"),
]


@pytest.mark.parametrize(("name", "wrong", "message"), WRONG, ids=[wrong.__name__ for _, wrong, _ in WRONG])
def test_a_wrong_try_is_told_what_failed(name, wrong, message):
    """Each plausible mistake has its own message, and none is given a story."""
    result = check_of(name)(wrong)
    assert not result.passed and message in result.message
    assert exercises.PROMPT not in result.message


EXHIBITS = ["DecodesTokenByToken", "TakesTheLongestToken", "MergesRunsOfSpaces"]


def test_the_bug_exhibits_are_the_ones_that_are_named(lesson):
    assert [source.split()[1].split("(")[0] for source in lesson.exhibits()] == EXHIBITS


@pytest.mark.parametrize(
    ("exhibit", "caught_by"),
    [
        ("DecodesTokenByToken", "round trip, emoji"),
        ("TakesTheLongestToken", "ids of a page as the real ones"),
        ("MergesRunsOfSpaces", "ids of code as the real ones"),
        ("right", None),
    ],
)
def test_each_wrong_version_is_caught_by_one_check_and_by_no_other(lesson, exhibit, caught_by):
    """The notebook says so; the range of the ids and a plain round trip are blind to all three."""
    version, checks = lesson.names["versions"][exhibit], lesson.names["checks"]
    assert [name for name, check in checks.items() if not check(version)] == ([caught_by] if caught_by else [])


def test_the_notebook_builds_the_tokenizer_of_the_release(lesson):
    """What the learner built in the promoted cells, not only the library's copy, gives the real ids."""
    fast, built = create_tokenizer(real_tokenizer_path()), lesson.names["real"]
    assert type(built) is not BPETokenizer
    for text in lesson.names["hard"].values():
        assert built.encode(text) == fast.encode(text).ids


def test_the_real_file_is_found_by_name_or_its_absence_says_how_to_fetch_it(monkeypatch, tmp_path):
    """A learner without the file reads one line, not a traceback's riddle."""
    place = tmp_path / "20B_tokenizer.json"
    monkeypatch.setenv("NEOX_20B_TOKENIZER", str(place))
    with pytest.raises(FileNotFoundError, match=r"`make test` or `python .ci/set_up.py tokenizer` fetches it"):
        real_tokenizer_path()
    place.write_text("{}", "utf-8")
    assert real_tokenizer_path() == place


def test_the_right_merges_begin_the_story(folded_merges):
    """The reward must be earned: were the prompt encoded by the fast library, any merges would tell the same story."""
    result, asked = folded_merges
    assert "Your merges encoded the prompt, in place of the library's" in result.message
    assert exercises.PROMPT in result.message and {"Once", "Ġlion"} <= set(asked)


def test_the_figure_names_its_rows_and_gives_each_box_its_width():
    shown = box_rows({"bytes": [("195", 1), ("169", 1)], "text": [("é", 2)]}, "é")
    assert [patch.get_width() for patch in shown.figure.axes[0].patches] == [1, 1, 2]
    assert "bytes: 195 | 169; text: é" in shown.alt
