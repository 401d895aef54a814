"""Token ids to bytes of text, one at a time: what a tokenizer's own decoding gives for all of them.

An added token is literal text. Any other token of a byte-level tokenizer stands for its own bytes; any other kind of
tokenizer has a decoder, which reads tokens together.
"""

import json
import re

from tokenizers import Tokenizer

from neox_lib.tokenizer import BPETokenizer, token_to_bytes

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # a byte, where characters without a token fall back to bytes


def control_ids(tokenizer: Tokenizer | BPETokenizer) -> set[int]:
    """The ids of the tokens that are marked special: signals, not text."""
    if isinstance(tokenizer, Tokenizer):
        return {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return {tokenizer.added[token] for token in tokenizer.special}


def added_tokens(tokenizer: Tokenizer | BPETokenizer) -> dict[int, str]:
    """The added tokens by their ids, as they were typed."""
    if isinstance(tokenizer, Tokenizer):
        return {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    return {token_id: token for token, token_id in tokenizer.added.items()}


def count_ids(tokenizer: Tokenizer | BPETokenizer) -> int:
    """How many rows of a model's table the tokenizer reaches: its largest id + 1."""
    ids = tokenizer.get_vocab().values() if isinstance(tokenizer, Tokenizer) else tokenizer.tokens
    return max(ids, default=-1) + 1


def decoder_kinds(tokenizer: Tokenizer) -> list[dict]:
    """The decoders that the tokenizer's file names, in order."""
    if tokenizer.decoder is None:
        return []
    fields = json.loads(tokenizer.decoder.__getstate__())
    return fields.get("decoders", [fields])


def is_byte_level(tokenizer: Tokenizer | BPETokenizer) -> bool:
    """Whether tokens spell bytes and nothing else is done to them; `BPETokenizer` knows no other kind."""
    if not isinstance(tokenizer, Tokenizer):
        return True
    return {each["type"] for each in decoder_kinds(tokenizer)} - {"Fuse"} == {"ByteLevel"}


class ByteSpelling:
    """A byte-level tokenizer's: each token at once, since its bytes don't depend on its neighbours."""

    def __init__(self, tokenizer: Tokenizer | BPETokenizer):
        self.tokenizer, self.control, self.added = tokenizer, control_ids(tokenizer), added_tokens(tokenizer)

    def push(self, token_id: int) -> bytes:
        """The bytes of the next token; none for a control token, nor for an id that stands for no token."""
        token = self.tokenizer.id_to_token(token_id)
        if token is None or token_id in self.control:
            return b""
        return self.added[token_id].encode("utf-8") if token_id in self.added else token_to_bytes(token)

    def flush(self) -> bytes:
        return b""


class DecodedSpelling:
    """Any other tokenizer's: what a token adds to the decoded text of those before it, once nothing can change it.

    What can change waits: a run of byte tokens, which is decoded as a whole (one bad byte spoils all of it), and a text
    that ends in U+FFFD. `shown` are the last tokens before the waiting ones, enough for a decoder that treats the
    beginning of a text differently.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.control = tokenizer, control_ids(tokenizer)
        self.shown: list[int] = []
        self.waiting: list[int] = []
        kinds = decoder_kinds(tokenizer)
        fused = next((place for place, each in enumerate(kinds) if each["type"] == "Fuse"), len(kinds))
        # a replacement in the joined text may reach across any border of tokens
        self.to_the_end = any(
            each["type"] == "Replace" and len(each["pattern"].get("String", "any")) != 1 for each in kinds[fused:]
        )

    def push(self, token_id: int) -> bytes:
        """The bytes that are settled now; none for a control token, nor for an id that stands for no token."""
        token = self.tokenizer.id_to_token(token_id)
        if token is None or token_id in self.control:
            return b""
        self.waiting.append(token_id)
        if self.to_the_end or BYTE_TOKEN.fullmatch(token) or self.text().endswith("\ufffd"):
            return b""
        return self.flush()

    def text(self) -> str:
        """What waits, decoded."""
        known, decode = len(self.tokenizer.decode(self.shown)), self.tokenizer.decode
        return decode(self.shown + self.waiting)[known:]

    def flush(self) -> bytes:
        """All that waits."""
        text = self.text()
        if text:
            self.shown = self.waiting if self.tokenizer.decode(self.waiting) else self.shown + self.waiting
            self.waiting = []
        return text.encode("utf-8")


def spelling_of(tokenizer: Tokenizer | BPETokenizer) -> ByteSpelling | DecodedSpelling:
    return ByteSpelling(tokenizer) if is_byte_level(tokenizer) else DecodedSpelling(tokenizer)  # type: ignore[arg-type]


def token_alone(tokenizer: Tokenizer | BPETokenizer, token_id: int) -> bytes:
    """The bytes of one token within a text; its name for a control token and where a decoder gives no characters."""
    name = (tokenizer.id_to_token(token_id) or "").encode("utf-8")
    if token_id in control_ids(tokenizer):
        return name
    spelling = spelling_of(tokenizer)
    if isinstance(spelling, ByteSpelling):
        return spelling.push(token_id)
    spelling.push(token_id)
    spelling.flush()  # a text's first token may lose its space
    raw = spelling.push(token_id) or spelling.flush()
    return name if not raw or "\ufffd".encode() in raw else raw
