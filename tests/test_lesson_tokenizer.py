"""Notebook 01: its exercises tell wrong from right, and its bug exhibits are caught where the notebook says."""

import pytest

from neox_lib.course.exercises import tokenizer as exercises
from neox_lib.course.real_tokenizer import real_tokenizer_path
from neox_lib.loading import create_tokenizer
from neox_lib.tokenizer import BPETokenizer, token_to_bytes
from tests.lessons import Lesson

EXERCISES = ["my_apply_merges", "my_decode", "my_encode_untrusted"]


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


def encode_trustingly(tokenizer: BPETokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)


WRONG = [
    ("my_apply_merges", merge_leftmost, "the lowest rank goes first, not the leftmost pair"),
    ("my_apply_merges", merge_one_pair_only, "no learned pair is left at the end"),
    ("my_apply_merges", merge_in_place, "changed the list that it was given"),
    ("my_decode", decode_one_by_one, "the bytes of one character can lie in several tokens"),
    ("my_decode", decode_by_spelling, "Ġ is how the vocabulary writes the byte of a space"),
    ("my_decode", decode_strictly, "UnicodeDecodeError"),
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
    assert exercises.PROMPT in result.message and {"Once", "Ġupon", "Ġfox"} <= set(asked)
