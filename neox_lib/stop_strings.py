"""Texts that end before a stop string, wherever its characters are cut into tokens."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from neox_lib.spelling import control_ids


class StopText:
    """The text of one row, token by token; what may be the beginning of a stop string waits.

    Of several stop strings the first to be complete counts, so a text ends at the same place however it is cut into
    tokens.

    >>> text = StopText(["The end"])
    >>> [text.push(piece) for piece in ("He", " left. Th", "ere, T", "he en", "d. Or")], text.stopped, text.held
    (['He', ' left. ', 'There, ', '', ''], True, 3)
    """

    def __init__(self, stop_strings: tuple[str, ...] | list[str]):
        self.stop_strings = stop_strings
        self.waiting = ""
        self.lengths: list[int] = []  # characters of the last tokens, those that are held
        self.stopped = False

    @property
    def held(self) -> int:
        """How many of the last tokens have characters that wait or, once stopped, stand in the stop string or after
        it. A token without any belongs to the next, of which it may be the first bytes.
        """
        return len(self.lengths)

    def push(self, text: str, last: bool = False) -> str:
        """A token's characters -> those that are settled now: all, if it is the row's last and completes no stop."""
        self.waiting += text
        self.lengths.append(len(text))
        found = [(place + len(stop), place) for stop in self.stop_strings if (place := self.waiting.find(stop)) >= 0]
        self.stopped = bool(found)
        settled = min(found)[1] if found else len(self.waiting) - (0 if last else self.overlap())
        text, self.waiting = self.waiting[:settled], self.waiting[settled:]
        while self.lengths:
            after = sum(self.lengths[1:])
            if after < len(self.waiting) or (after == len(self.waiting) and not self.lengths[0] and not last):
                break
            self.lengths.pop(0)
        return text

    def overlap(self) -> int:
        """How many characters at the end are the beginning of a stop string."""
        longest = min(len(self.waiting), max(map(len, self.stop_strings)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self.waiting[-length:]) for stop in self.stop_strings):
                return length
        return 0


def stop_at(steps: Iterator[Any], stop_strings: tuple[str, ...], tokenizer: Any, batch_size: int) -> Iterator[Any]:
    """The steps of `decode_text`, each row ending with the token that completes one of `stop_strings` in its new text.

    `texts` then have no character of the stop string or after it, and `held` is set. A control token has no text, but
    ends a row whose stop strings have its name. Raises ValueError without a tokenizer.
    """
    if tokenizer is None:
        raise ValueError(f"stop_strings {list(stop_strings)} are found in text; give the tokenizer too")
    names = {token_id for token_id in control_ids(tokenizer) if tokenizer.id_to_token(token_id) in stop_strings}
    return stopping_steps(steps, [StopText(stop_strings) for _ in range(batch_size)], names)


def stopping_steps(steps: Iterator[Any], rows: list[StopText], names: set[int]) -> Iterator[Any]:
    """The loop of `stop_at`, `names` being the ids of control tokens that end a row."""
    ended, token_ids = [False] * len(rows), [0] * len(rows)
    for step in steps:
        texts, log_probabilities = [""] * len(rows), [0.0] * len(rows)
        for row, text in enumerate(rows):
            if ended[row]:
                continue
            token_ids[row], log_probabilities[row] = step.token_ids[row], step.log_probabilities[row]
            ended[row] = step.ended[row] or token_ids[row] in names
            texts[row] = text.push(step.texts[row], last=ended[row])
            ended[row] = ended[row] or text.stopped
        held = [text.held for text in rows]
        yield replace(
            step,
            token_ids=list(token_ids),
            texts=texts,
            log_probabilities=log_probabilities,
            ended=list(ended),
            held=held,
        )
        if all(ended):
            return
