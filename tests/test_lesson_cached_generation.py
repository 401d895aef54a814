"""Notebook 06: its checks help a learner, its solutions hold, and its wrong versions are caught where it says so."""

import pytest
import torch

from neox_lib.cache import KVCache
from neox_lib.course.checks import in_place_of
from neox_lib.course.exercises import cached_generation as exercises
from neox_lib.course.figures.cached_generation import cache_filling
from neox_lib.recall import Recall
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
    "all positions at once": """
def my_greedy(model, input_ids, new_tokens):
    ids = input_ids
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids).argmax(dim=-1)], dim=1)
    return ids
""",
    "leaves the prompt out": """
def my_greedy(model, input_ids, new_tokens):
    ids = input_ids
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return ids[:, input_ids.shape[1] :]
""",
    "never reads what it chose": """
def my_greedy(model, input_ids, new_tokens):
    ids = input_ids
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(input_ids)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return ids
""",
    "no dimension kept": """
def my_greedy(model, input_ids, new_tokens):
    ids = input_ids
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(dim=-1)], dim=1)
    return ids
""",
    "one token too few": """
def my_greedy(model, input_ids, new_tokens):
    ids = input_ids
    for _ in range(new_tokens - 1):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return ids
""",
    "no return": """
def my_greedy(model, input_ids, new_tokens):
    for _ in range(new_tokens):
        input_ids = torch.cat([input_ids, model(input_ids)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
""",
}
CACHED = """
def my_cached_greedy(model, input_ids, new_tokens, cache):
    ids = unread = input_ids
    for _ in range(new_tokens):
        logits = model(unread, cache, last_only=True)
        unread = logits[:, -1].argmax(dim=-1, keepdim=True)
        ids = torch.cat([ids, unread], dim=1)
    return ids
"""
WRONG_CACHED_GREEDY = {  # a word of what the check should say: what is changed in CACHED, and into what
    "without the cache": ("unread, cache,", "unread,"),
    "its passes read [2, 3, 4, 5] tokens": ("unread, cache,", "ids, cache,"),
    "read the whole prompt, 2 tokens, in its first pass, but read 1": ("= input_ids", "= input_ids[:, -1:]"),
    "its passes read [2, 2, 2, 2] tokens": ("model(unread,", "model(input_ids,"),
    "only 4 tokens": ("return ids", "return ids[:, input_ids.shape[1] :]"),
    "should have shape [1, 6], but has [1, 5]": ("range(new_tokens)", "range(new_tokens - 1)"),
    "should be a tensor, but is None": ("    return ids\n", ""),
    "your code raised RuntimeError": (", keepdim=True", ""),
    "1 + 2 = 3": ("argmax(", "argmin("),
    "but never called it": ("range(new_tokens)", "()"),
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
    "does not renormalise": """
def my_top_p(probabilities, p):
    ordered, places = probabilities.sort(descending=True)
    kept = torch.zeros_like(probabilities)
    kept[places] = ordered.where(ordered.cumsum(0) - ordered < p, 0)
    return kept
""",
    "from the unlikeliest up": """
def my_top_p(probabilities, p):
    ordered, places = probabilities.sort()
    kept = torch.zeros_like(probabilities)
    kept[places] = ordered.where(ordered.cumsum(0) - ordered < p, 0)
    return kept / kept.sum()
""",
    "in the order of the ids": """
def my_top_p(probabilities, p):
    kept = probabilities.where(probabilities.cumsum(0) - probabilities < p, 0)
    return kept / kept.sum()
""",
    "p as a bound for each token": """
def my_top_p(probabilities, p):
    kept = probabilities.where(probabilities >= p, 0)
    return kept / kept.sum()
""",
    "overwrites what it was handed": """
def my_top_p(probabilities, p):
    ordered, places = probabilities.sort(descending=True)
    probabilities[places] = ordered.where(ordered.cumsum(0) - ordered < p, 0)
    return probabilities / probabilities.sum()
""",
    "nothing returned": """
def my_top_p(probabilities, p):
    ordered, places = probabilities.sort(descending=True)
""",
    "a list is cut, not a tensor": """
def my_top_p(probabilities, p):
    return probabilities.tolist().sort(descending=True)
""",
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    """The notebook without its two timings: nothing else uses them, and they are most of its work."""
    lesson = Lesson("06_cached_generation")
    lesson.cells = [cell for cell in lesson.cells if "nbval-ignore-output" not in cell.metadata.get("tags", [])]
    return lesson


CHECKS = {
    "my_greedy": exercises.greedy,
    "MyKVCache": exercises.cache,
    "my_cached_greedy": exercises.cached_greedy,
    "my_top_p": exercises.top_p,
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_stub_is_told_kindly_and_the_solution_passes(lesson, name):
    """Otherwise a learner would be stuck at a check that no one can pass, or the heart would end without its story."""
    assert CHECKS[name](lesson.stub(name)).message.startswith("Not written yet")
    result = CHECKS[name](lesson.solution(name))
    assert result.passed, result.message
    assert (exercises.PROMPT in result.message) == (name != "my_greedy"), "three of them end with a story"


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


@pytest.mark.parametrize("told", WRONG_CACHED_GREEDY)
def test_a_wrong_loop_with_a_cache_is_told_what_failed(told):
    """Most wrong loops still write something: the check looks at what each pass reads."""
    old, new = WRONG_CACHED_GREEDY[told]
    assert old in CACHED
    (message,) = messages_of_wrong(exercises.cached_greedy, {told: CACHED.replace(old, new, 1)}, "my_cached_greedy")
    assert told in message and "my_cached_greedy(tally, [[1, 2]], 4, cache)" in message, message


def test_right_loops_written_otherwise_pass():
    """`last_only` is a hint, and a loop may read its last token too."""
    others = {
        "rereads with last_only": (
            exercises.greedy,
            "my_greedy",
            """
def my_greedy(model, input_ids, new_tokens):
    for _ in range(new_tokens):
        chosen = model(input_ids, last_only=True).argmax(dim=-1)
        input_ids = torch.cat([input_ids, chosen], dim=1)
    return input_ids
""",
        ),
        "reads its last token": (
            exercises.cached_greedy,
            "my_cached_greedy",
            """
def my_cached_greedy(model, input_ids, new_tokens, cache):
    logits = model(input_ids, cache)
    for _ in range(new_tokens):
        chosen = logits[:, -1:].argmax(dim=-1)
        input_ids = torch.cat([input_ids, chosen], dim=1)
        logits = model(chosen, cache)
    return input_ids
""",
        ),
    }
    for check, name, source in others.values():
        names = {"torch": torch}
        exec(source, names)
        result = check(names[name])
        assert result.passed, result.message


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

    class OneTokenAtATime(right):
        def update(self, layer_index, key, value):
            self.keys[layer_index, :, :, self.length] = key[:, :, 0]
            self.values[layer_index, :, :, self.length] = value[:, :, 0]
            return self.keys[layer_index, :, :, : self.length + 1], self.values[layer_index, :, :, : self.length + 1]

    class WrongWord(right):
        def update(self, layer_index, key, value):
            return self.key[layer_index], value

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
        "the keys from update with tokens 0 and 1": OneTokenAtATime,
        "advance(2), update with token 2: your code raised AttributeError": WrongWord,
    }


def test_wrong_caches_are_told_what_failed_and_get_no_story(lesson):
    """The heart: each fault is named, and the reward is only for a right piece."""
    for message, wrong in wrong_caches(lesson.solution("MyKVCache")).items():
        result = exercises.cache(wrong)
        assert not result.passed and message in result.message, (message, result.message)
        assert "wrote" not in result.message


def test_a_cache_from_before_the_stub_had_check_room_is_told_to_take_it_over(lesson):
    """Its methods are right; promoted, it would stop the library with an AttributeError."""
    names = {"torch": torch}
    source = text_of_solution(lesson).replace("def check_room", "def check_the_room")
    exec("from torch import Tensor\n" + source, names)
    assert "has no check_room, which the library uses" in exercises.cache(names["MyKVCache"]).message


def text_of_solution(lesson) -> str:
    """The folded solution of the cache, as text."""
    (folded,) = [cell.source for cell in lesson.cells if "```python\nclass MyKVCache" in cell.source]
    return folded.split("```python\n")[1].split("```")[0]


def test_the_cache_of_the_solution_grows_in_the_playground(lesson):
    """`recall.py` asks for its capacity, which generation does not."""
    with in_place_of(KVCache, lesson.solution("MyKVCache")):
        recall = Recall(exercises.shipped_model())
        capacities = [recall.room_for([5, 6, 7], capacity).capacity for capacity in (8, 300)]
    assert capacities == [256, 512]


def test_the_cache_fills_pass_by_pass():
    """The slider's last step is what is stored: a page without a kernel shows all passes."""
    steps = cache_filling(["a", "b", "c"], [2, 1], capacity=4)
    assert list(steps.pictures) == ["start", "prefill", "decode 1"] and steps.still == "decode 1"
    assert "a pass reads 2 tokens and fills positions up to 1; a pass reads 1 token" in steps.pictures["decode 1"].alt
    assert "reads 1 token" not in steps.pictures["prefill"].alt


def test_a_cache_that_is_right_for_numbered_rows_only_does_not_get_its_story(lesson):
    """The story itself is the last property: it must be the library's own."""

    class Rounded(lesson.solution("MyKVCache")):
        def update(self, layer_index, key, value):
            longer = self.length > 30  # longer than the texts of the check, shorter than the story
            return super().update(layer_index, key * 0 if longer else key, value)

    result = exercises.cache(Rounded)
    assert not result.passed and "wrote another story" in result.message


EXHIBITS = {
    "by_rows": {"prompt, then singles", "random splittings"},
    "by_offset": {"random splittings"},
    "by_reuse": {"second prompt"},
}


@pytest.mark.parametrize("name", EXHIBITS)
def test_a_bug_exhibit_is_caught_where_the_notebook_says_so(lesson, name):
    """The lesson of the exhibits is which check is blind: what the notebook's own table found has to be true."""
    assert any(f"def {name}(" in source for source in lesson.exhibits())
    versions = [version.__name__ for version in lesson.names["versions"]]
    verdicts = {check: dict(zip(versions, row, strict=True)) for check, row in lesson.names["verdicts"].items()}
    assert {check for check, passed in verdicts.items() if not passed[name]} == EXHIBITS[name]
    assert all(passed["read_in_passes"] for passed in verdicts.values())
