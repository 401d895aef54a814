"""Byte-level BPE: text becomes bytes, and frequent neighbours become one token.

Built in notebook 01.
"""

import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path

import regex
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

ENDOFTEXT = "<|endoftext|>"
PADDING = "<|padding|>"
WHITESPACE_RUNS = [" " * length for length in range(24, 1, -1)]  # the order of 20B's ids 50254 .. 50276

# GPT-2's rule (openai/gpt-2, `src/encoder.py`): a merge never crosses from a word into the next.
PRETOKEN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def byte_characters() -> dict[int, str]:
    """A printable character for each of the 256 bytes, so that every token can be written in a JSON file.

    Printable bytes stand for themselves; the others take the characters from 256 on (openai/gpt-2, `src/encoder.py`).

    >>> byte_characters()[ord("a")], byte_characters()[ord(" ")]
    ('a', 'Ġ')
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


BYTE_TO_CHARACTER = byte_characters()
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}


def pretokenize(text: str) -> list[str]:
    """Cut text into pretokens, which are merged on their own; each keeps its leading space.

    >>> pretokenize("We're off, 3 of us")
    ['We', "'re", ' off', ',', ' 3', ' of', ' us']
    """
    return PRETOKEN.findall(text)


def utf8_bytes(text: str) -> bytes:
    """The text's UTF-8 bytes. Raises ValueError for a lone surrogate, which has none."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = text[error.start]
        raise ValueError(f"character {error.start} is a lone surrogate, {surrogate!r}: no UTF-8 text has one") from None


def byte_symbols(pretoken: str) -> list[str]:
    """One character for each UTF-8 byte. Raises ValueError for a lone surrogate.

    >>> byte_symbols(" é")
    ['Ġ', 'Ã', '©']
    """
    return [BYTE_TO_CHARACTER[byte] for byte in utf8_bytes(pretoken)]


def token_to_bytes(token: str) -> bytes:
    """The bytes of a token as the JSON file spells it; space runs are spelled as they are.

    >>> token_to_bytes("Ġthe"), token_to_bytes("  ")
    (b' the', b'  ')
    """
    if all(character in CHARACTER_TO_BYTE for character in token):
        return bytes(CHARACTER_TO_BYTE[character] for character in token)
    return token.encode("utf-8")


def join_pair(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of one pair of neighbours, from the left.

    >>> join_pair(["l", "o", "l", "o", "w"], ("l", "o"))
    ['lo', 'lo', 'w']
    """
    joined, place = [], 0
    while place < len(symbols):
        width = 2 if tuple(symbols[place : place + 2]) == pair else 1
        joined.append("".join(symbols[place : place + width]))
        place += width
    return joined


def apply_merges(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Join neighbours, always the pair that was learned first (its rank is lowest), until no learned pair is left.

    Looking at all pairs again after each merge would take days for a word of a million letters. Here pairs wait in a
    heap, which always has its smallest entry at hand: (rank, place of the left symbol). `before` and `after` give the
    places of a symbol's neighbours, so a merge moves nothing: the left symbol absorbs the right one, two links change,
    and only the pairs on either side are new. An entry whose symbols have since been merged with others is ignored.

    >>> apply_merges(["l", "o", "w", "e", "r"], {("l", "o"): 0, ("lo", "w"): 1, ("e", "r"): 2})
    ['low', 'er']
    """
    symbols, end = list(symbols), len(symbols)
    before, after = list(range(-1, end)), list(range(1, end + 1))
    waiting: list[tuple[int, int]] = []

    def offer(left: int) -> None:
        if left >= 0 and after[left] < end and (rank := ranks.get((symbols[left], symbols[after[left]]))) is not None:
            heappush(waiting, (rank, left))

    for left in range(end):
        offer(left)
    while waiting:
        rank, left = heappop(waiting)
        right = after[left]
        if right == end or ranks.get((symbols[left], symbols[right])) != rank:
            continue  # out of date: another pair stands here now
        symbols[left], symbols[right] = symbols[left] + symbols[right], ""
        after[left] = after[right]
        before[after[left]] = left
        offer(before[left])
        offer(left)
    return [symbol for symbol in symbols if symbol]


def train_merges(texts: Iterable[str], num_merges: int) -> list[tuple[str, str]]:
    """Learn BPE merges: again and again join the most frequent pair of neighbours (Sennrich et al. 2016).

    Among equally frequent pairs the one with the older symbols wins. Stops early when no pair is left.

    >>> train_merges(["low lower lowest"], 2)
    [('l', 'o'), ('lo', 'w')]
    """
    counts = Counter(pretoken for text in texts for pretoken in pretokenize(unicodedata.normalize("NFC", text)))
    pretokens = [(byte_symbols(pretoken), count) for pretoken, count in counts.items()]
    age = {character: index for index, character in enumerate(sorted(CHARACTER_TO_BYTE))}
    pair_counts: Counter[tuple[str, str]] = Counter()
    pretokens_with: dict[tuple[str, str], set[int]] = defaultdict(set)

    def count_pairs(index: int, sign: int) -> None:
        symbols, count = pretokens[index]
        for pair in pairwise(symbols):
            pair_counts[pair] += sign * count
            pretokens_with[pair].add(index)

    for index in range(len(pretokens)):
        count_pairs(index, +1)
    merges = []
    for _ in range(num_merges):
        best = max(pair_counts, key=lambda pair: (pair_counts[pair], -age[pair[0]], -age[pair[1]]), default=None)
        if best is None or pair_counts[best] < 1:
            break
        merges.append(best)
        age.setdefault(best[0] + best[1], len(age))
        for index in pretokens_with.pop(best):  # only these pretokens change
            count_pairs(index, -1)
            pretokens[index] = (join_pair(pretokens[index][0], best), pretokens[index][1])
            count_pairs(index, +1)
        del pair_counts[best]
    return merges


def pattern_of_any(tokens: Iterable[str]) -> regex.Pattern:
    """Splits a text at these tokens and keeps them; the longest match wins.

    >>> pattern_of_any(["  ", "   "]).split("if    x")
    ['if', '   ', ' x']
    """
    longest_first = sorted(tokens, key=len, reverse=True)
    return regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")" if longest_first else r"(?!)")


class BPETokenizer:
    """A byte-level BPE tokenizer of the GPT-NeoX family, readable, not fast; `create_tokenizer` gives the fast one.

    `vocab` maps token to id, `merges` are in the order in which they were learned, `added` maps a token that is matched
    in the text itself, before any merging, to its id; those in `special` are control tokens that decoding leaves out.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], added: dict[str, int], special: set[str]):
        self.vocab, self.merges, self.added, self.special = vocab, merges, added, special
        self.to_nfc = True  # else a text is read as it is
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.tokens = {token_id: token for token, token_id in (vocab | added).items()}
        self.special_pattern = pattern_of_any(special)
        self.added_pattern = pattern_of_any(added.keys() - special)
        self.pretoken_ids = lru_cache(maxsize=65536)(self._pretoken_ids)

    def _pretoken_ids(self, pretoken: str) -> list[int]:
        return [self.vocab[symbol] for symbol in apply_merges(byte_symbols(pretoken), self.ranks)]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; specials in it become their ids. Raises ValueError for a lone surrogate.

        Added tokens go first: specials are cut out of the raw text, space runs out of its NFC form. The merges see only
        what lies between: "  a" is a two-space token and an "a" without its space.
        """
        ids: list[int] = []
        for part in self.special_pattern.split(text):
            normal = unicodedata.normalize("NFC", part) if self.to_nfc else part
            for span in [part] if part in self.special else self.added_pattern.split(normal):
                if span in self.added:
                    ids.append(self.added[span])
                else:
                    ids += [token_id for pretoken in pretokenize(span) for token_id in self.pretoken_ids(pretoken)]
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD. Raises ValueError for an unknown id."""
        parts = []
        for token_id in ids:
            if (token := self.tokens.get(token_id)) is None:
                raise ValueError(f"token id {token_id} stands for no token: ids run from 0 to {max(self.tokens)}")
            if not (skip_special_tokens and token in self.special):
                parts.append(token.encode("utf-8") if token in self.added else token_to_bytes(token))
        return b"".join(parts).decode("utf-8", errors="replace")

    def id_to_token(self, token_id: int) -> str | None:
        return self.tokens.get(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self.added.get(token, self.vocab.get(token))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Learn a tokenizer with the layout of 20B's: specials 0 and 1, bytes, merges, then the whitespace runs."""
    base = [ENDOFTEXT, PADDING, *sorted(CHARACTER_TO_BYTE)]
    num_merges = vocab_size - len(base) - len(WHITESPACE_RUNS)
    if num_merges < 0:
        raise ValueError(f"vocab_size {vocab_size} has no room for {len(base)} bytes, specials and 23 space runs")
    merges = train_merges(texts, num_merges)
    tokens = dict.fromkeys(base + [left + right for left, right in merges])
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    runs = {run: len(vocab) + index for index, run in enumerate(WHITESPACE_RUNS)}
    return BPETokenizer(vocab, merges, {ENDOFTEXT: 0, PADDING: 1} | runs, {ENDOFTEXT, PADDING})


def check_settings(data: dict) -> None:
    """Raise ValueError, naming the setting, for one that would change what `BPETokenizer` reads or writes."""
    model, before = data["model"], data.get("pre_tokenizer") or {}
    after = data.get("post_processor") or {"type": "ByteLevel"}  # a template without special tokens adds nothing
    found = {
        "model": (model["type"], "BPE"),
        "normalizer": ((data.get("normalizer") or {"type": "NFC"})["type"], "NFC"),
        "pre_tokenizer": (before.get("type"), "ByteLevel"),
        "add_prefix_space": (before.get("add_prefix_space"), False),
        "use_regex": (before.get("use_regex", True), True),
        "post_processor": (after["type"] if after.get("special_tokens", True) else "ByteLevel", "ByteLevel"),
        "decoder": ((data.get("decoder") or {}).get("type"), "ByteLevel"),
    }
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "byte_fallback"):
        found[name] = (model.get(name) or None, None)
    for token in data["added_tokens"]:
        flags = dict.fromkeys(("lstrip", "rstrip", "single_word"), False) | {"normalized": not token["special"]}
        found |= {f"{name} of {token['content']!r}": (token.get(name, flag), flag) for name, flag in flags.items()}
    for name, (value, expected) in found.items():
        if value != expected:
            raise ValueError(f"{name} is {value!r}, expected {expected!r}; create_tokenizer reads such a file")


def read_tokenizer(path: str | Path) -> BPETokenizer:
    """Read a `tokenizers` JSON of this family. Raises ValueError naming what it lacks or does differently."""
    try:
        data = json.loads(Path(path).read_text("utf-8"))
        check_settings(data)
        model = data["model"]
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        added = {token["content"]: token["id"] for token in data["added_tokens"]}
        special = {token["content"] for token in data["added_tokens"] if token["special"]}
        lacking = {left + right for left, right in merges} - model["vocab"].keys()
        if lacking:
            raise ValueError(f"its vocab lacks {min(lacking)!r}, which its merges make")
        tokenizer = BPETokenizer(model["vocab"], [(left, right) for left, right in merges], added, special)
        tokenizer.to_nfc = data.get("normalizer") is not None
        return tokenizer
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a GPT-NeoX tokenizer file: {error}") from error


def save_tokenizer(tokenizer: BPETokenizer, path: str | Path) -> None:
    """Write the JSON that the `tokenizers` library and `read_tokenizer` read."""
    fast = Tokenizer(models.BPE(vocab=tokenizer.vocab, merges=tokenizer.merges))
    if tokenizer.to_nfc:
        fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.post_processor = processors.ByteLevel(trim_offsets=True)
    fast.decoder = decoders.ByteLevel()
    for token in sorted(tokenizer.added, key=tokenizer.added.__getitem__):
        special = token in tokenizer.special
        fast.add_tokens([AddedToken(token, special=special, normalized=not special)])
    Path(path).write_bytes((fast.to_str(pretty=True) + "\n").encode("utf-8"))


def encode_text(tokenizer: Tokenizer | BPETokenizer, text: str) -> list[int]:
    """Token ids of a text from either tokenizer. Raises ValueError for a lone surrogate, and where that fails."""
    utf8_bytes(text)
    try:
        encoded = tokenizer.encode(text)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"the tokenizer can't read this text: {error}") from error
    return encoded if isinstance(encoded, list) else encoded.ids
