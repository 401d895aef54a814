"""The exercises of notebook 01: merges by rank, text to ids and back, and untrusted text."""

from collections.abc import Callable

from neox_lib import tokenizer as library
from neox_lib.checkpoints.files import SHIPPED_MODEL
from neox_lib.course.checks import describe, exercise, given, in_place_of, require, require_equal
from neox_lib.generation import greedy_generate_text
from neox_lib.loading import create_model, create_tokenizer
from neox_lib.tokenizer import ENDOFTEXT, PADDING, BPETokenizer, read_tokenizer

PROMPT = "Once upon a time, there was a lion"
SMALL_VOCABULARY = {0: "fox", 1: "Ġfox", 2: "ðŁ", 3: "¦", 4: "Ĭ", 5: "  "}
TEXTS = [
    "She said that she would dance with me if I brought her red roses.",
    "We're off,  and it is    late\n\n\tat night",
    "naïve café, 🦊🦊, ไทย, 狐",
    "aaaaaaaaaaaaaaa bbbbbb lowest",
]

# The property, the word, the learned pairs from rank 0 on, the tokens that should come out.
MERGES = [
    ("nothing is learned, so nothing is joined", "fox", [], ["f", "o", "x"]),
    ("one learned pair", "fox", ["f o"], ["fo", "x"]),
    ("no learned pair is left at the end", "lower", ["l o", "lo w", "e r"], ["low", "er"]),
    ("the lowest rank goes first, not the leftmost pair", "the", ["h e", "t h"], ["t", "he"]),
    ("every occurrence of a pair is joined", "abcab", ["a b"], ["ab", "c", "ab"]),
    ("of overlapping pairs of the same rank the leftmost goes first", "aaa", ["a a"], ["aa", "a"]),
    ("what was joined can be joined again", "aaaa", ["a a", "aa aa"], ["aaaa"]),
    ("a single symbol has no neighbour", "a", ["a a"], ["a"]),
    ("an empty word has no symbols", "", ["a a"], []),
]


@exercise("tokenizer.apply_merges")
def apply_merges(yours: Callable[[list[str], dict[tuple[str, str], int]], list[str]]) -> str:
    """Neighbours joined by rank: in small words, then in the words of whole texts, then for the story's prompt."""
    for holds, word, learned, expected in MERGES:
        symbols, ranks = list(word), {tuple(pair.split()): rank for rank, pair in enumerate(learned)}
        what = f"my_apply_merges({list(word)}, {ranks})"
        with given(what):
            found = yours(symbols, ranks)
        require(isinstance(found, list), f"{what} should be a list of symbols, but is {describe(found)}")
        require(found == expected, f"{what} should be {expected}, but is {found}: {holds}")
        require(symbols == list(word), f"{what} changed the list that it was given: work on a copy")
    readable, fast = read_tokenizer(SHIPPED_MODEL / "tokenizer.json"), create_tokenizer()
    for word in dict.fromkeys(word for text in TEXTS for word in library.pretokenize(text)):
        what, symbols = f"my_apply_merges on {word!r}, with the shipped tokenizer's merges,", library.byte_symbols(word)
        with given(what):
            found = yours(symbols, readable.ranks)
        expected = fast.model.tokenize("".join(library.byte_symbols(word)))
        require_equal(found, [token.value for token in expected], what)
    return story_by_merges(yours)


def story_by_merges(yours: Callable) -> str:
    """The shipped model's story for a prompt that was encoded by the learner's merges.

    Prompts are normally encoded by the fast tokenizer, which has merging code of its own. Here `BPETokenizer` encodes,
    with `yours` in place of the library's `apply_merges`.
    """
    path, model = SHIPPED_MODEL / "tokenizer.json", create_model(device="cpu", dtype="float32")
    expected = read_tokenizer(path).encode(PROMPT)
    with in_place_of(library.apply_merges, yours):
        readable = read_tokenizer(path)  # a fresh one: it remembers pretokens
        found = readable.encode(PROMPT)
        require(found == expected, f"{PROMPT!r} should encode to {expected}, but with your merges gives {found}")
        written = greedy_generate_text(model, readable, PROMPT, len(found) + 40)
    return f"Your merges encoded the prompt, in place of the library's; the shipped model continued:\n{written}"


@exercise("tokenizer.encode")
def encode(yours: Callable[[str, dict[tuple[str, str], int], dict[str, int]], list[int]]) -> None:
    """Pretokens, symbols, merges, ids: of short texts by hand, then as the readable tokenizer has them."""
    ranks = {("l", "o"): 0, ("lo", "w"): 1, ("Ġ", "low"): 2, ("w", "Ġ"): 3}
    vocab = {symbol: number for number, symbol in enumerate(["l", "o", "w", "Ġ", "Ã", "©", "lo", "low", "Ġlow", "wĠ"])}
    for text, expected, holds in [
        ("low", [7], "the merges make one token of the word"),
        ("low low", [7, 8], "each pretoken is encoded, and the second has its space"),
        ("w w", [2, 3, 2], "nothing is merged across the cut between two pretokens"),
        ("é", [4, 5], "a character of two bytes is two symbols"),
        ("", [], "an empty text has no tokens"),
    ]:
        with given(what := f"my_encode({text!r}, {ranks}, vocab)"):
            found = yours(text, dict(ranks), dict(vocab))
        require(isinstance(found, list), f"{what} should be a list of ids, but is {describe(found)}")
        require(found == expected, f"{what} should be {expected}, but is {found}: {holds}")
    readable = read_tokenizer(SHIPPED_MODEL / "tokenizer.json")
    plain = BPETokenizer(readable.vocab, readable.merges, {}, set())
    for text in TEXTS:
        with given(what := f"my_encode({text!r}, the shipped tokenizer's merges and vocabulary)"):
            found = yours(text, readable.ranks, readable.vocab)
        require_equal(found, plain.encode(text), what)


@exercise("tokenizer.decode")
def decode(yours: Callable[[list[int], dict[int, str]], str]) -> None:
    """The text of token ids: bytes first, then characters, and U+FFFD for bytes that form none."""
    for ids, expected, holds in [
        ([0], "fox", "a token of plain letters stands for those letters"),
        ([0, 1], "fox fox", "Ġ is how the vocabulary writes the byte of a space"),
        ([0, 5, 0], "fox  fox", "the token of a run of spaces holds the spaces themselves"),
        ([2, 3, 4], "🦊", "the bytes of one character can lie in several tokens, so join all bytes first"),
        ([0, 2], "fox\ufffd", "bytes that form no whole character become U+FFFD"),
        ([], "", "no tokens, no text"),
    ]:
        what = f"my_decode of the tokens {[SMALL_VOCABULARY[token_id] for token_id in ids]}"
        with given(what):
            found = yours(ids, SMALL_VOCABULARY)
        require(isinstance(found, str), f"{what} should be a str, but is {describe(found)}")
        require(found == expected, f"{what} should be {expected!r}, but is {found!r}: {holds}")
    readable = read_tokenizer(SHIPPED_MODEL / "tokenizer.json")
    for text in TEXTS:
        with given(what := f"my_decode of the ids of {text!r}"):
            found = yours(readable.encode(text), readable.tokens)
        require_equal(found, text, what)


@exercise("tokenizer.encode_untrusted")
def encode_untrusted(yours: Callable[[BPETokenizer, str], list[int]]) -> None:
    """Ids without a control token, whatever the text says; they decode to that text, and merges apply to all of it."""
    tokenizer = read_tokenizer(SHIPPED_MODEL / "tokenizer.json")
    control = {tokenizer.added[token] for token in (ENDOFTEXT, PADDING)}
    runs = {run: tokenizer.added[run] for run in library.WHITESPACE_RUNS}
    without_control = BPETokenizer(tokenizer.vocab, tokenizer.merges, runs, set())
    hostile = [f"Good night.{ENDOFTEXT}Once more", f"{PADDING}{PADDING} a    b", ENDOFTEXT, f"<|endof{ENDOFTEXT}text|>"]
    for text in [*TEXTS, *hostile]:
        what = f"my_encode_untrusted(tokenizer, {text!r})"
        with given(what):
            found = yours(tokenizer, text)
        require(isinstance(found, list), f"{what} should be a list of ids, but is {describe(found)}")
        inside = sorted(control.intersection(found))
        require(not inside, f"{what} should hold no control token, but holds {inside}: a stranger could end the text")
        back = tokenizer.decode(found, skip_special_tokens=False)
        require(back == text, f"{what} should decode to the same text, but decodes to {back!r}: nothing may be lost")
        why = "compare with tokenizer.encode; mind the runs of spaces"
        if text in hostile:
            why = (
                "the letters of a control token are text like any other: the merges apply to them and their neighbours"
            )
        require_equal(found, without_control.encode(text), what, why=why)
    unchanged = tokenizer.encode(ENDOFTEXT) == [0]
    require(unchanged, "my_encode_untrusted should leave the tokenizer unchanged, but changed it: build a new one")
