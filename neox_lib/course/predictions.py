"""Questions before a surprising result: the learner predicts, then reads why each option is right or wrong."""

import hashlib
import html
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from neox_lib.course.progress import read_progress, record

QUESTIONS = Path(__file__).parent / "questions"
SEED = 1220  # of the order in which options are shown; a test holds the letters of right ones balanced


@dataclass(frozen=True)
class Prediction:
    """A multiple-choice question. `options` holds (text, explanation) pairs in the order in which they are shown;
    `answer` is the right one's number from 0.

    What is recorded of a choice is the option's key, from `keys`, which does not depend on the order shown. As a cell's
    last expression a question shows buttons where a kernel runs; its text form, one fold per option, can be read
    anywhere.
    """

    key: str
    question: str
    options: tuple[tuple[str, str], ...]
    answer: int
    keys: tuple[str, ...]

    @property
    def right_key(self) -> str:
        return self.keys[self.answer]

    def choose(self, number: int) -> str:
        """Record a choice and return the answer to it, as HTML."""
        record("predictions", self.key, self.keys[number])
        right = "<b>Right.</b>" if number == self.answer else "<b>Not so.</b>"
        return f"<p>{right} {self.options[number][1]}</p>" + self.folded(without=number)

    def folded(self, without: int | None = None) -> str:
        """Each option as a fold that holds its explanation."""
        rows = []
        for number, (text, explanation) in enumerate(self.options):
            if number != without:
                verdict = "<b>Right.</b>" if number == self.answer else "<b>Not so.</b>"
                summary = f"<summary>{letter(number)}. {text}</summary>"
                rows.append(f"<details>{summary}<p>{verdict} {explanation}</p></details>")
        return "".join(rows)

    def _repr_mimebundle_(self, **_) -> dict:
        static = f"<p><b>Predict.</b> {self.question}</p>{self.folded()}"
        options = [f"{letter(number)}. {text}" for number, (text, _) in enumerate(self.options)]
        bundle = {"text/plain": "\n".join(["Predict. " + self.question, *options]), "text/html": static}
        return (self.widget()._repr_mimebundle_() or {}) | bundle

    def widget(self):
        """Buttons that record the choice and then explain every option; an earlier choice is shown at once."""
        import ipywidgets

        choices = [(f"{letter(number)}. {plain(text)}", number) for number, (text, _) in enumerate(self.options)]
        radio = ipywidgets.RadioButtons(options=choices, index=None, layout={"width": "max-content"})
        shown = ipywidgets.HTML()
        radio.observe(lambda change: setattr(shown, "value", self.choose(change["new"])), "value")
        earlier = read_progress()["predictions"].get(self.key)
        if earlier in self.keys:
            radio.value = self.keys.index(earlier)
        return ipywidgets.VBox([ipywidgets.HTML(f"<p><b>Predict.</b> {self.question}</p>"), radio, shown])


def plain(text: str) -> str:
    """The text that HTML shows, since the label of a button can't hold tags.

    >>> plain("<code>a</code> &lt; b")
    'a < b'
    """
    return html.unescape(re.sub(r"</?[a-z]+>", "", text))


def letter(number: int) -> str:
    return chr(ord("A") + number)


def shuffled(key: str, options: int) -> list[int]:
    """The numbers of a question's options in the order in which they are shown: always the same for the same key."""
    return sorted(range(options), key=lambda number: hashlib.sha256(f"{SEED} {key} {number}".encode()).digest())


@cache
def questions(chapter: str) -> dict[str, Prediction]:
    """The questions of a notebook, by name, with their options shuffled. An option's key is the letter of its place in
    the file: new ones go to the end, so that an answer recorded earlier keeps its meaning. Raises ValueError if a
    question has no right option.
    """
    data = tomllib.loads((QUESTIONS / f"{chapter}.toml").read_text("utf-8"))
    found = {}
    for name, entry in data.items():
        options = tuple((option["text"], option["why"]) for option in entry["options"])
        right = [number for number, option in enumerate(entry["options"]) if option.get("right")]
        if len(right) != 1 or len(options) < 2:
            raise ValueError(
                f"questions/{chapter}.toml: {name} needs at least two options and exactly one that is right"
            )
        key = f"{chapter}.{name}"
        order = shuffled(key, len(options))
        shown, keys = tuple(options[number] for number in order), tuple(map(letter, order))
        found[name] = Prediction(key, entry["question"], shown, order.index(right[0]), keys)
    return found


def predict(chapter: str, name: str) -> Prediction:
    """The question `name` of a notebook, such as `predict("02_rotary_embeddings", "wrong_pairing")`.

    Raises KeyError naming the existing questions.
    """
    found = questions(chapter)
    if name not in found:
        raise KeyError(f"{chapter} has no question {name}; it has {', '.join(found)}")
    return found[name]
