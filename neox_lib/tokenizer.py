"""Byte-level BPE: text becomes bytes, and frequent neighbours become one token."""

import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import regex
from tokenizers import Tokenizer

from neox_lib.files import write_text_atomically

SHIPPED_TOKENIZER = Path(__file__).parent / "assets" / "tiny" / "tokenizer.json"
ENDOFTEXT, PADDING = "<|endoftext|>", "<|padding|>"
WHITESPACE_RUNS = [" " * length for length in range(24, 1, -1)]  # the order of 20B's ids 50254 .. 50276

# GPT-2's rule (openai/gpt-2, `src/encoder.py`): a merge never crosses from a word into the next.
PRETOKEN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def byte_characters() -> dict[int, str]:
    """A printable character for each of the 256 bytes, so that every token can be written in a JSON file.

    Printable bytes stand for themselves; the others take the characters from 256 on (openai/gpt-2, `src/encoder.py`).

    >>> byte_characters()[ord("a")], byte_characters()[ord(" ")]
    ('a', 'Ġ')
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    table = {byte: chr(byte) for byte in printable}
    table.update({byte: chr(256 + offset) for offset, byte in enumerate(others)})
    return table


BYTE_TO_CHARACTER = byte_characters()
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}


def pretokenize(text: str) -> list[str]:
    """Cut text into pieces that are merged on their own; each keeps its leading space.

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
        raise ValueError(f"character {error.start} is a lone surrogate, {surrogate!r}: no text in UTF-8 holds one") from None


def byte_symbols(piece: str) -> list[str]:
    """One character for each UTF-8 byte. Raises ValueError for a lone surrogate.

    >>> byte_symbols(" é")
    ['Ġ', 'Ã', '©']
    """
    return [BYTE_TO_CHARACTER[byte] for byte in utf8_bytes(piece)]


def token_to_bytes(token: str) -> bytes:
    """The bytes of a token as the JSON file spells it; space runs are spelled as they are.

    >>> token_to_bytes("Ġthe"), token_to_bytes("  ")
    (b' the', b'  ')
    """
    if all(character in CHARACTER_TO_BYTE for character in token):
        return bytes(CHARACTER_TO_BYTE[character] for character in token)
    return token.encode("utf-8")


def merge_pair(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of `pair`, from left to right.

    >>> merge_pair(["a", "b", "a", "b", "a"], ("a", "b"))
    ['ab', 'ab', 'a']
    """
    merged, index = [], 0
    while index < len(symbols):
        if tuple(symbols[index : index + 2]) == pair:
            merged.append(pair[0] + pair[1])
            index += 2
        else:
            merged.append(symbols[index])
            index += 1
    return merged


def train_merges(texts: Iterable[str], num_merges: int) -> list[tuple[str, str]]:
    """Learn BPE merges: again and again join the most frequent pair of neighbours (Sennrich et al. 2016).

    Of equally frequent pairs the one whose symbols are older wins. Stops early when no pair is left.

    >>> train_merges(["low lower lowest"], 2)
    [('l', 'o'), ('lo', 'w')]
    """
    piece_counts = Counter(piece for text in texts for piece in pretokenize(unicodedata.normalize("NFC", text)))
    words = [(byte_symbols(piece), count) for piece, count in piece_counts.items()]
    age = {character: index for index, character in enumerate(sorted(CHARACTER_TO_BYTE))}
    pair_counts: Counter[tuple[str, str]] = Counter()
    words_with: dict[tuple[str, str], set[int]] = defaultdict(set)

    def count_pairs(index: int, sign: int) -> None:
        symbols, count = words[index]
        for pair in zip(symbols, symbols[1:], strict=False):
            pair_counts[pair] += sign * count
            words_with[pair].add(index)

    for index in range(len(words)):
        count_pairs(index, +1)
    merges = []
    while len(merges) < num_merges and pair_counts:
        best = max(pair_counts, key=lambda pair: (pair_counts[pair], -age[pair[0]], -age[pair[1]]))
        if pair_counts[best] < 1:
            break
        merges.append(best)
        age.setdefault(best[0] + best[1], len(age))
        for index in words_with.pop(best):  # only these words change
            count_pairs(index, -1)
            words[index] = (merge_pair(words[index][0], best), words[index][1])
            count_pairs(index, +1)
        del pair_counts[best]
    return merges


class BPETokenizer:
    """A byte-level BPE tokenizer of the GPT-NeoX family, readable rather than fast; `create_tokenizer` gives the fast one.

    `vocab` maps token to id, `merges` are in the order in which they were learned, `added` maps a token that is matched
    in the text itself, before any merging, to its id; those in `special` are control tokens that decoding leaves out.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], added: dict[str, int], special: set[str]):
        self.vocab, self.merges, self.added, self.special = vocab, merges, added, special
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.tokens = {token_id: token for token, token_id in (vocab | added).items()}
        self.split_special = self._splitter(special)
        self.split_added = self._splitter(added.keys() - special)
        self.merged_ids = lru_cache(maxsize=65536)(self._merged_ids)

    @staticmethod
    def _splitter(tokens: Iterable[str]) -> regex.Pattern:
        longest_first = sorted(tokens, key=len, reverse=True)
        return regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")" if longest_first else r"(?!)")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn a tokenizer with the layout of 20B's: specials 0 and 1, bytes, merges, then the whitespace runs."""
        base = [ENDOFTEXT, PADDING, *sorted(CHARACTER_TO_BYTE)]
        num_merges = vocab_size - len(base) - len(WHITESPACE_RUNS)
        if num_merges < 0:
            raise ValueError(f"vocab_size {vocab_size} has no room for {len(base)} bytes and specials and 23 space runs")
        merges = train_merges(texts, num_merges)
        tokens = base + [left + right for left, right in merges]
        vocab = {token: token_id for token_id, token in enumerate(tokens)}
        runs = {run: len(vocab) + index for index, run in enumerate(WHITESPACE_RUNS)}
        return cls(vocab, merges, {ENDOFTEXT: 0, PADDING: 1} | runs, {ENDOFTEXT, PADDING})

    @classmethod
    def from_file(cls, path: str | Path) -> "BPETokenizer":
        """Read a `tokenizers` JSON of this family. Raises ValueError naming what it lacks or does differently."""
        try:
            data = json.loads(Path(path).read_text("utf-8"))
            model = data["model"]
            kinds = (model["type"], data["pre_tokenizer"]["type"], data["normalizer"]["type"])
            if kinds != ("BPE", "ByteLevel", "NFC"):
                raise ValueError(f"expected BPE with ByteLevel pre-tokens and NFC, found {kinds}")
            merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
            added = {token["content"]: token["id"] for token in data["added_tokens"]}
            special = {token["content"] for token in data["added_tokens"] if token["special"]}
            return cls(model["vocab"], merges, added, special)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a GPT-NeoX tokenizer file: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the JSON that the `tokenizers` library and `from_file` read."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        added = [
            {"id": token_id, "content": token, "special": token in self.special, "normalized": token not in self.special}
            | {"single_word": False, "lstrip": False, "rstrip": False}
            for token, token_id in self.added.items()
        ]
        model = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False}
        model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
        model |= {"vocab": self.vocab, "merges": [f"{left} {right}" for left, right in self.merges]}
        data = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
        data |= {"normalizer": {"type": "NFC"}, "pre_tokenizer": byte_level, "post_processor": byte_level}
        data |= {"decoder": byte_level, "model": model}
        write_text_atomically(Path(path), json.dumps(data, ensure_ascii=False, indent=1) + "\n")

    def _merged_ids(self, piece: str) -> list[int]:
        symbols = byte_symbols(piece)
        while len(symbols) > 1:
            pairs = zip(symbols, symbols[1:], strict=False)
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            symbols = merge_pair(symbols, best)
        return [self.vocab[symbol] for symbol in symbols]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; specials in it become their ids. Raises ValueError for a lone surrogate.

        Added tokens go first: specials are cut out of the raw text, space runs out of its NFC form; the merges then
        see only what lies between them, which is why "  a" is a two-space token and an "a" without its space.
        """
        ids: list[int] = []
        for part in self.split_special.split(text):
            if part in self.special:
                ids.append(self.added[part])
                continue
            for piece in self.split_added.split(unicodedata.normalize("NFC", part)):
                if piece in self.added:
                    ids.append(self.added[piece])
                else:
                    for word in pretokenize(piece):
                        ids.extend(self.merged_ids(word))
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of some token ids; bytes that are no UTF-8 become U+FFFD. Raises ValueError for an id of no token."""
        pieces = []
        for token_id in ids:
            if token_id not in self.tokens:
                raise ValueError(f"token id {token_id} stands for no token: ids run from 0 to {max(self.tokens)}")
            if not (skip_special_tokens and self.tokens[token_id] in self.special):
                pieces.append(token_to_bytes(self.tokens[token_id]))
        return b"".join(pieces).decode("utf-8", errors="replace")

    def id_to_token(self, token_id: int) -> str | None:
        return self.tokens.get(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self.added.get(token, self.vocab.get(token))


def create_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """The fast tokenizer (Hugging Face `tokenizers`) of a JSON file or of the folder that holds one.

    Without a path: the shipped model's. Its `encode(text).ids` equals `BPETokenizer.encode`. Raises
    FileNotFoundError when there is no such file and ValueError when it is no tokenizer.
    """
    path = SHIPPED_TOKENIZER if path is None else Path(path)
    if path.is_dir():
        names = [name for name in ("tokenizer.json", "20B_tokenizer.json") if (path / name).is_file()]
        path = path / (names[0] if names else "tokenizer.json")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no tokenizer there; give a tokenizer JSON, such as 20B_tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{path}: not a tokenizer file: {error}") from error


def encode_text(tokenizer: Tokenizer | BPETokenizer, text: str) -> list[int]:
    """Token ids of a text from either tokenizer. Raises ValueError for a lone surrogate."""
    utf8_bytes(text)
    encoded = tokenizer.encode(text)
    return encoded if isinstance(encoded, list) else encoded.ids
