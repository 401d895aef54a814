"""Notebook 06: its checks help a learner, its solutions hold, and its wrong versions are caught where it says so."""

import pytest
import torch

from neox_lib.course.exercises import cached_generation as exercises
from tests.lessons import Lesson

WRONG_GREEDY = {
    "first position": """
def my_greedy(model, input_ids, new_tokens):
    ids = input_ids
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids)[:, 0].argmax(dim=-1, keepdim=True)], dim=1)
    return ids
""",
    "reads the last token only": """
def my_greedy(model, input_ids, new_tokens):
    ids = input_ids
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids[:, -1:])[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return ids
""",
}
WRONG_TOP_P = {
    "drops the token that crosses": """
def my_top_p(probabilities, p):
    ordered, places = probabilities.sort(descending=True)
    kept = torch.zeros_like(probabilities)
    kept[places] = ordered.where(ordered.cumsum(0) <= p, 0)
    return kept / kept.sum()
""",
    "keeps one too many": """
def my_top_p(probabilities, p):
    ordered, places = probabilities.sort(descending=True)
    kept = torch.zeros_like(probabilities)
    kept[places] = ordered.where(ordered.cumsum(0) - ordered <= p, 0)
    return kept / kept.sum()
""",
    "returns them sorted": """
def my_top_p(probabilities, p):
    ordered, places = probabilities.sort(descending=True)
    kept = ordered.where(ordered.cumsum(0) - ordered < p, 0)
    return kept / kept.sum()
""",
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    """The notebook without its two timings: nothing else uses them, and they are most of its work."""
    lesson = Lesson("06_cached_generation")
    lesson.cells = [cell for cell in lesson.cells if "nbval-ignore-output" not in cell.metadata.get("tags", [])]
    return lesson


CHECKS = {"my_greedy": exercises.greedy, "MyKVCache": exercises.cache, "my_top_p": exercises.top_p}


@pytest.mark.parametrize("name", CHECKS)
def test_a_stub_is_told_kindly_and_the_solution_passes(lesson, name):
    """Otherwise a learner would be stuck at a check that no one can pass, or the heart would end without its story."""
    assert CHECKS[name](lesson.stub(name)).message.startswith("Not written yet")
    result = CHECKS[name](lesson.solution(name))
    assert result.passed, result.message
    story = "MyKVCache in place of the library's:\nOnce upon a time, a fox"
    assert (story in result.message) == (name == "MyKVCache")


def messages_of_wrong(check, sources: dict[str, str], name: str) -> list[str]:
    messages = []
    for source in sources.values():
        names = {"torch": torch}
        exec(source, names)
        result = check(names[name])
        assert not result.passed
        messages.append(result.message)
    return messages


@pytest.mark.parametrize(
    ("name", "check", "wrong"),
    [("my_greedy", exercises.greedy, WRONG_GREEDY), ("my_top_p", exercises.top_p, WRONG_TOP_P)],
)
def test_wrong_tries_are_told_different_things(name, check, wrong):
    """A check that says the same to everybody helps nobody."""
    messages = messages_of_wrong(check, wrong, name)
    assert len(set(messages)) == len(wrong), messages


def wrong_caches(right: type) -> dict[str, type]:
    """The solution with one method done wrong, as learners do it, and a word of what the check should then say."""

    class CountsInUpdate(right):
        def update(self, layer_index, key, value):
            rows = super().update(layer_index, key, value)
            self.length += key.shape[2]
            return rows

        def advance(self, tokens):
            pass

    class OneLayerForAll(right):
        def update(self, layer_index, key, value):
            return super().update(0, key, value)

    class FirstTextForAll(right):
        def update(self, layer_index, key, value):
            end = self.length + key.shape[2]
            for rows, new in ((self.keys, key), (self.values, value)):
                rows[layer_index, 0, :, self.length : end] = new[0]
            keys, values = self.keys[layer_index, :1, :, :end], self.values[layer_index, :1, :, :end]
            return keys.expand(len(key), -1, -1, -1), values.expand(len(key), -1, -1, -1)

    class NewRowsOnly(right):
        def update(self, layer_index, key, value):
            super().update(layer_index, key, value)
            return key, value

    class Grows(right):
        def update(self, layer_index, key, value):
            keys, values = super().update(layer_index, key, value)
            self.keys, self.values = self.keys.clone(), self.values.clone()
            return keys, values

    class ForgetsAll(right):
        def truncate(self, length):
            self.length = 0

    class KeepsAll(right):
        def truncate(self, length):
            pass

    class MixesUp(right):
        def update(self, layer_index, key, value):
            keys, values = super().update(layer_index, key, value)
            return (keys.flip(1), values) if keys.shape[1] > 1 and key.shape[2] > 1 else (keys, values)

    return {
        "only advance counts": CountsInUpdate,
        "layer 0, after layer 1": OneLayerForAll,
        "keys of text 1": FirstTextForAll,
        "token 2, after tokens 0 and 1": NewRowsOnly,
        "another tensor": Grows,
        "after truncate(3) of 4 tokens, length should be 3, but is 0": ForgetsAll,
        "after truncate(3) of 4 tokens, length should be 3, but is 4": KeepsAll,
        "24 tokens read in passes of": MixesUp,
    }


def test_wrong_caches_are_told_what_failed_and_get_no_story(lesson):
    """The heart: each fault is named, and the reward is only for a right piece."""
    for message, wrong in wrong_caches(lesson.solution("MyKVCache")).items():
        result = exercises.cache(wrong)
        assert not result.passed and message in result.message, (message, result.message)
        assert "wrote" not in result.message


def test_a_cache_that_is_right_for_numbered_rows_only_does_not_get_its_story(lesson):
    """The story itself is the last property: it must be the library's own."""

    class Rounded(lesson.solution("MyKVCache")):
        def update(self, layer_index, key, value):
            longer = self.length > 30  # longer than the texts of the check, shorter than the story
            return super().update(layer_index, key * 0 if longer else key, value)

    result = exercises.cache(Rounded)
    assert not result.passed and "wrote another story" in result.message


EXHIBITS = {
    "rows_from_zero": {"prompt, then singles", "random splittings"},
    "square_mask": {"random splittings"},
    "keeps_old_text": {"second prompt"},
}


@pytest.mark.parametrize("name", EXHIBITS)
def test_a_bug_exhibit_is_caught_where_the_notebook_says_so(lesson, name):
    """The lesson of the exhibits is which check is blind: what the notebook's own table found has to be true."""
    assert any(f"def {name}(" in source for source in lesson.exhibits())
    versions = [version.__name__ for version in lesson.names["versions"]]
    verdicts = {check: dict(zip(versions, row, strict=True)) for check, row in lesson.names["verdicts"].items()}
    assert {check for check, passed in verdicts.items() if not passed[name]} == EXHIBITS[name]
    assert all(passed["read_in_passes"] for passed in verdicts.values())
