"""The exercises of notebook 01: merges by rank, ids back to text, and untrusted text."""

from collections.abc import Callable

from neox_lib import tokenizer as library
from neox_lib.checkpoints.files import SHIPPED_MODEL
from neox_lib.course.checks import describe, exercise, in_place_of, require, require_equal
from neox_lib.generation import greedy_generate_text
from neox_lib.loading import create_model, create_tokenizer
from neox_lib.tokenizer import ENDOFTEXT, PADDING, BPETokenizer, read_tokenizer

PROMPT = "Once upon a time, a fox"
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
        found, what = yours(symbols, ranks), f"my_apply_merges({list(word)}, {ranks})"
        require(isinstance(found, list), f"{what} should be a list of symbols, but is {describe(found)}")
        require(found == expected, f"{what} should be {expected}, but is {found}: {holds}")
        require(symbols == list(word), f"{what} changed the list that it was given: work on a copy")
    readable, fast = read_tokenizer(SHIPPED_MODEL / "tokenizer.json"), create_tokenizer()
    for word in dict.fromkeys(word for text in TEXTS for word in library.pretokenize(text)):
        found = yours([library.BYTE_TO_CHARACTER[byte] for byte in word.encode("utf-8")], readable.ranks)
        expected = fast.model.tokenize("".join(library.BYTE_TO_CHARACTER[byte] for byte in word.encode("utf-8")))
        what = f"my_apply_merges on {word!r}, with the shipped tokenizer's {len(readable.ranks)} merges,"
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
        found = yours(ids, SMALL_VOCABULARY)
        what = f"my_decode of the tokens {[SMALL_VOCABULARY[token_id] for token_id in ids]}"
        require(isinstance(found, str), f"{what} should be a str, but is {describe(found)}")
        require(found == expected, f"{what} should be {expected!r}, but is {found!r}: {holds}")
    readable = read_tokenizer(SHIPPED_MODEL / "tokenizer.json")
    for text in TEXTS:
        require_equal(yours(readable.encode(text), readable.tokens), text, f"my_decode of the ids of {text!r}")


@exercise("tokenizer.encode_untrusted")
def encode_untrusted(yours: Callable[[BPETokenizer, str], list[int]]) -> None:
    """Ids that hold no control token, whatever the text says, and that decode to exactly that text."""
    tokenizer = read_tokenizer(SHIPPED_MODEL / "tokenizer.json")
    control = {tokenizer.added[token] for token in (ENDOFTEXT, PADDING)}
    hostile = [f"Good night.{ENDOFTEXT}Once more", f"{PADDING}{PADDING} a    b", ENDOFTEXT, f"<|endof{ENDOFTEXT}text|>"]
    for text in [*TEXTS, *hostile]:
        found, what = yours(tokenizer, text), f"my_encode_untrusted(tokenizer, {text!r})"
        require(isinstance(found, list), f"{what} should be a list of ids, but is {describe(found)}")
        inside = sorted(control.intersection(found))
        require(not inside, f"{what} should hold no control token, but holds {inside}: a stranger could end the text")
        back = tokenizer.decode(found, skip_special_tokens=False)
        require(back == text, f"{what} should decode to the same text, but decodes to {back!r}: nothing may be lost")
        if text in TEXTS:
            what = f"{what}, a text without control tokens,"
            require_equal(
                found, tokenizer.encode(text), what, why="compare with tokenizer.encode; mind the runs of spaces"
            )
    unchanged = tokenizer.encode(ENDOFTEXT) == [0]
    require(unchanged, "my_encode_untrusted should leave the tokenizer unchanged, but changed it: build a new one")
