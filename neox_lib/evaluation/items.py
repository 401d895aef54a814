"""Questions in the shape of well-known benchmarks, built from the two texts that ship with the package.

The tales are Oscar Wilde's, which the shipped model never read; it wrote the stories itself. The same text gives the
same questions, in the same order. `tasks/` hands them to lm-evaluation-harness.
"""

import random
import re
from collections.abc import Callable

from neox_lib.checkpoints.files import SHIPPED_MODEL
from neox_lib.evaluation.corpus import stories_of

TEXTS = {"tales": "wilde_tales.txt", "stories": "stories.txt"}
CHOICES = 4


def texts(name: str) -> list[str]:
    """The four "tales", or the "stories"."""
    return stories_of((SHIPPED_MODEL.parent / TEXTS[name]).read_text("utf-8"))


def passages(name: str, sentences: int) -> list[list[str]]:
    """Pieces of so many sentences, each sentence without the space around it; of a tale one after another, of a story
    only the first.
    """
    found = []
    for text in texts(name):
        cut = [each for each in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if each]
        starts = range(0, len(cut) - sentences + 1, sentences)
        found += [cut[start : start + sentences] for start in (starts if name == "tales" else starts[:1])]
    return found


def spread(items: list, number: int) -> list:
    """So many of the items, evenly spread over all of them."""
    return [items[place * len(items) // number] for place in range(number)]


def last_words(name: str, number: int = 100) -> list[dict]:
    """In the shape of LAMBADA: passages of three sentences that end in a word of four letters or more, without the full
    stop. [{"text"}]
    """
    found = []
    for passage in passages(name, 3):
        text = " ".join(passage)
        if re.search(r" [a-z]{4,}[.!?]$", text):
            found.append({"text": text[:-1]})
    return spread(found, number)


def endings(name: str, number: int = 100) -> list[dict]:
    """In the shape of HellaSwag: two sentences, the one that follows them, and three that follow other ones.
    [{"context", "choices", "label"}]
    """
    chosen = spread([passage for passage in passages(name, 3) if 20 <= len(passage[2]) <= 120], number)
    found = []
    for place, passage in enumerate(chosen):
        draw = random.Random(place)
        others = draw.sample([each[2] for each in chosen if each[2] != passage[2]], CHOICES - 1)
        choices = draw.sample([passage[2], *others], CHOICES)
        label = choices.index(passage[2])
        found.append({"context": " ".join(passage[:2]), "choices": choices, "label": label})
    return found


def whole_texts(name: str, number: int = 1) -> list[dict]:
    """In the shape of WikiText: documents to read from end to end. [{"page"}]"""
    return [{"page": text} for text in spread(texts(name), number)]


BUILDERS: dict[str, Callable[..., list[dict]]] = {
    "last_words": last_words,
    "endings": endings,
    "whole_texts": whole_texts,
}


def dataset(kind: str, source: str, **_) -> dict:
    """What a task file of the harness asks for with `custom_dataset`, its `dataset_kwargs` being kind and source."""
    import datasets

    return {"test": datasets.Dataset.from_list(BUILDERS[kind](source))}


def per_size(doc: dict, results: list[float]) -> dict:
    """The log-likelihood of a document beside the number of its words or of its UTF-8 bytes."""
    size, words = len(doc["page"].encode("utf-8")), len(doc["page"].split())
    return {
        "word_perplexity": (results[0], words),
        "byte_perplexity": (results[0], size),
        "bits_per_byte": (results[0], size),
    }
