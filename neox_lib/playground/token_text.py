"""The text of each token as it is shown: whole characters only, control tokens by name."""

from collections.abc import Iterable
from dataclasses import dataclass

from neox_lib.generation import StreamDecoder
from neox_lib.spelling import control_ids


@dataclass(frozen=True)
class TokenText:
    """A token and the characters that it completes: none while a character still waits for its last byte.

    `control` marks tokens such as <|endoftext|>, whose `text` is their name, not part of the story.
    """

    token_id: int
    text: str
    control: bool = False


class Speller:
    """Turns token ids into text one at a time; the bytes of an unfinished character are held back until it is whole."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decoder = StreamDecoder(tokenizer)
        self.control = control_ids(tokenizer)

    def push(self, token_id: int) -> TokenText:
        if token_id in self.control:
            return TokenText(token_id, self.tokenizer.id_to_token(token_id), control=True)
        return TokenText(token_id, self.decoder.push(token_id))


def spell(tokenizer, ids: Iterable[int]) -> list[TokenText]:
    """The text of each id of a whole text, in order."""
    speller = Speller(tokenizer)
    return [speller.push(token_id) for token_id in ids]


def text_of(tokens: Iterable[TokenText], control: bool = True) -> str:
    """The tokens' text joined; without the names of control tokens if `control` is False."""
    return "".join(token.text for token in tokens if control or not token.control)


def without_surrogates(text: str) -> str:
    """The text with each lone surrogate, which UTF-8 can't encode, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
