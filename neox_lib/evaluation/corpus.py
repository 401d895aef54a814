"""Texts to measure a model on: the stories of a file, as one row of tokens."""

import re

import torch
from torch import Tensor

from neox_lib.tokenizer import ENDOFTEXT, encode_text


def stories_of(text: str) -> list[str]:
    """The stories of a corpus file: `<|endoftext|>` alone on a line stands between them."""
    stories = re.split(f"^{re.escape(ENDOFTEXT)}$", text, flags=re.MULTILINE)
    return [story.strip("\n") for story in stories if story.strip()]


def story_stream(tokenizer, stories: list[str], end: int | None = None) -> Tensor:
    """One row of token ids, `[N]`, with an end token, by default `<|endoftext|>`, before each story and after the last.

    Raises ValueError for a tokenizer that has none.
    """
    end = tokenizer.token_to_id(ENDOFTEXT) if end is None else end
    if end is None:
        raise ValueError(f"the tokenizer has no {ENDOFTEXT} to stand between stories")
    ids = [end]
    for story in stories:
        ids += [*encode_text(tokenizer, story), end]
    return torch.tensor(ids)
