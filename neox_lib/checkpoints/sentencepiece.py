"""A sentencepiece model (spiece.model, tokenizer.model) as a tokenizer of the `tokenizers` library.

`transformers` has a converter too, but it drops what models such as rinna's were trained with: pieces for single bytes
where a character is unknown, line breaks and runs of spaces, and a text without a space put before it.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers

from neox_lib.checkpoints.files import CheckpointError
from neox_lib.checkpoints.vocab_and_merges import SAVE_AS_JSON, add_tokens

# A piece's type, and the numbers of the fields that are read (google/sentencepiece, `src/sentencepiece_model.proto`).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE_TEXT, PIECE_SCORE, PIECE_TYPE = 1, 2, 3
MODEL_TYPE, SUFFIX, BYTE_FALLBACK = 3, 24, 35
CHARSMAP, DUMMY_PREFIX, EXTRA_SPACES, ESCAPE = 2, 3, 4, 5
SPACE = "\u2581"  # how a piece spells a space


def read_fields_of(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: number, and value: an int, 4 or 8 bytes, or the bytes of a string or message.

    Raises ValueError for bytes that are none.

    >>> list(read_fields_of(bytes([0x08, 0x96, 0x01, 0x12, 0x02, 0x68, 0x69])))
    [(1, 150), (2, b'hi')]
    """
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            value, place, shift = value | (byte & 127) << shift, place + 1, shift + 7
            if byte < 128:
                return value

    try:
        while place < len(message):
            number, kind = divmod(varint(), 8)
            if kind == 0:
                yield number, varint()
                continue
            length = {1: 8, 5: 4}[kind] if kind != 2 else varint()
            if place + length > len(message):
                raise IndexError
            yield number, message[place : place + length]
            place += length
    except (IndexError, KeyError):
        raise ValueError("truncated or damaged, expected a sentencepiece model") from None


def read_pieces(messages: list[bytes]) -> list[tuple[str, float, int]]:
    """Each piece's text, score and type, in the order of their ids."""
    pieces = []
    for message in messages:
        fields = dict(read_fields_of(message))
        score = struct.unpack("<f", fields.get(PIECE_SCORE, bytes(4)))[0]
        pieces.append((fields[PIECE_TEXT].decode("utf-8"), score, fields.get(PIECE_TYPE, NORMAL)))
    return pieces


def scores_of(pieces: list[tuple[str, float, int]]) -> list[tuple[str, float]]:
    """The pieces and their scores as the search for the likeliest pieces needs them: a symbol of the user's always
    wins, as in sentencepiece, and what no text is cut into never does.
    """
    scores = [score for _, score, kind in pieces if kind == NORMAL]
    highest, never = max(scores, default=0.0), min(scores, default=0.0) - 1000

    def score_of(text: str, score: float, kind: int) -> float:
        if kind == USER_DEFINED:
            return len(text.encode("utf-8")) * highest - 0.1
        return score if kind == NORMAL else never

    return [(text, score_of(text, score, kind)) for text, score, kind in pieces]


def read_sentencepiece(file: Path) -> Tokenizer:
    """The tokenizer of a sentencepiece model; nothing is put before or behind a text. Its control pieces are special,
    and so are tokens to which the small files beside it give a role; those may add tokens, too.

    Raises CheckpointError for a model of another algorithm than unigram, ValueError for bytes that are none.
    """
    parts: dict[int, list[Any]] = {}
    for number, value in read_fields_of(file.read_bytes()):
        parts.setdefault(number, []).append(value)
    trainer, normalizer = (dict(read_fields_of(b"".join(parts.get(number, [])))) for number in (TRAINER, NORMALIZER))
    if trainer.get(MODEL_TYPE, 1) != 1 or trainer.get(SUFFIX) or not normalizer.get(ESCAPE, 1):
        raise CheckpointError(
            f"{file}: of sentencepiece's models only unigram ones with spaces before words are read; {SAVE_AS_JSON}"
        )
    pieces = read_pieces(parts.get(PIECES, []))
    unknown = next((index for index, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN), None)
    byte_fallback = bool(trainer.get(BYTE_FALLBACK))
    tokenizer = Tokenizer(models.Unigram(scores_of(pieces), unk_id=unknown, byte_fallback=byte_fallback))
    steps: list[Any] = [normalizers.Precompiled(normalizer[CHARSMAP])] if normalizer.get(CHARSMAP) else []
    if normalizer.get(EXTRA_SPACES, 1):
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix := bool(normalizer.get(DUMMY_PREFIX, 1)):
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
    add_tokens(
        tokenizer, file.parent, {"control_special_tokens": [text for text, _, kind in pieces if kind == CONTROL]}
    )
    return tokenizer
