"""The warm-up of notebook 00: from a row of scores to the next token."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from neox_lib.course.checks import describe, exercise, given, numbers, require
from neox_lib.course.figures.plots import seeded
from neox_lib.generation import prompt_ids, stream_generate
from neox_lib.loading import create_model, create_tokenizer
from neox_lib.sampling import Sampling

PROMPT = "Once upon a time, there was a little fox"
ROWS = [[0.1, 2.5, -1.0], [-3.0, -0.5, -2.0], [1.0, -4.0, 2.0]]


@dataclass(frozen=True)
class YourChoice(Sampling):
    """Chooses each new token by the learner's function: `pick` takes one row of scores `[V]`."""

    pick: Callable[[Tensor], int] = lambda scores: int(scores.argmax())

    def choose(self, logits: Tensor, *generators: torch.Generator, **texts: Tensor | None) -> Tensor:
        return torch.tensor([self.pick(row) for row in logits], device=logits.device)


@exercise("start_here.next_token")
def next_token(yours: Callable[[Tensor], int]) -> str:
    """The id with the highest score, as an int: for short rows, for a long one, then for the shipped model's scores."""
    for values in ROWS:
        row = torch.tensor(values)
        what = f"my_next_token({numbers(row)})"
        with given(what):
            found = yours(row)
        needs = "should be a token id, an int"
        require(not isinstance(found, Tensor), f"{what} {needs}, but is a tensor: .item() takes the number out of it")
        why = ": return the index of the highest score, not the score" if isinstance(found, float) else ""
        require(
            isinstance(found, Integral) and not isinstance(found, bool),
            f"{what} {needs}, but is {describe(found)}{why}",
        )
        best = int(row.argmax())
        require(found == best, f"{what} should be {best}, the index of the highest score, but is {found}")
    row = seeded(2048)
    with given("my_next_token of 2048 random scores"):
        found, best = yours(row), int(row.argmax())
    require(found == best, f"my_next_token of 2048 random scores should be {best}, but is {found}")
    tokenizer, model = create_tokenizer(), create_model(device="cpu", dtype="float32")
    chosen = YourChoice(pick=yours)
    steps = stream_generate(model, prompt_ids(tokenizer, PROMPT), 20, tokenizer=tokenizer, sampling=chosen)
    text = PROMPT + "".join(step.text for step in steps)
    return f"The shipped model scored, your code chose, twenty times over:\n{text}"
