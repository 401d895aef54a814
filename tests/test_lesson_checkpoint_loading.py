"""Notebook 05: its exercises judge rightly, and the named checks catch its bug exhibits."""

import functools
import time

import pytest
import torch

from neox_lib.checkpoints.slim import partition as sharding
from neox_lib.checkpoints.slim.layout import place_of as library_place_of
from neox_lib.checkpoints.slim.partition import merge_shards as library_merge
from neox_lib.config import tiny
from neox_lib.course.exercises import checkpoint_loading as exercises
from neox_lib.course.figures.checkpoint_loading import MemoryCalculator, pair_picture
from neox_lib.course.peak_memory import peak_of
from tests.lessons import Lesson

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def lesson() -> Lesson:
    return Lesson("05_checkpoint_loading")


@functools.cache
def result_of_solution(name: str):
    """What the check says of the folded solution; the heart's writes two stories for it, so once is enough."""
    check, _ = WRONG[name]
    return check(lesson().solution(name))


def blocks_from_one(name, num_layers):
    first, *rest = name.split(".")
    if first == "layers":
        return int(rest[0]) + 1, ".".join(rest[1:])
    return {"word_embeddings": 0, "norm": num_layers + 3, "final_linear": num_layers + 4}[first], name


def whole_names_as_keys(name, num_layers):
    first, *rest = name.split(".")
    if first == "layers":
        return int(rest[0]) + 2, name
    return {"word_embeddings": 0, "norm": num_layers + 3, "final_linear": num_layers + 4}[first], name


def without_a_gap(name, num_layers):
    """Counts on after the last block, as if no number were skipped."""
    first, *rest = name.split(".")
    if first == "layers":
        return int(rest[0]) + 2, ".".join(rest[1:])
    return {"word_embeddings": 0, "norm": num_layers + 2, "final_linear": num_layers + 3}[first], name


def only_for_20b(name, num_layers):
    first, *rest = name.split(".")
    if first == "layers":
        return int(rest[0]) + 2, ".".join(rest[1:])
    return {"word_embeddings": 0, "norm": 47, "final_linear": 48}[first], name


def index_as_text(name, num_layers):
    index, key = library_place_of(name, num_layers)
    return f"{index:02d}", key


def index_alone(name, num_layers):
    return library_place_of(name, num_layers)[0]


def takes_every_second_part_for_a_number(name, num_layers):
    words = name.split(".")
    return int(words[1]) + 2, ".".join(words[2:])


def averaged_biases(key, parts):
    return sharding.average(parts) if sharding.merge_rule(key) == "sum" else library_merge(key, parts)


def columns_joined_as_rows(key, parts):
    return torch.cat(parts) if sharding.merge_rule(key) == "columns" else library_merge(key, parts)


def dense_in_any_name(key, parts):
    """Takes `dense_h_to_4h`, a column-parallel layer, for a row-parallel one."""
    if "dense" in key and key.endswith("weight"):
        return torch.cat(parts, dim=1)
    return library_merge(key, parts)


def summed_in_half_precision(key, parts):
    return sum(parts) if sharding.merge_rule(key) == "sum" else library_merge(key, parts)


def joined_in_fp32(key, parts):
    return library_merge(key, parts).float()


def adds_in_place(key, parts):
    if sharding.merge_rule(key) != "sum":
        return library_merge(key, parts)
    total = parts[0] = parts[0].float()
    for part in parts[1:]:
        total += part
    return total


def first_norm(key, parts):
    return parts[0].float() if sharding.merge_rule(key) == "average" else library_merge(key, parts)


def forgets_the_last_norm(key, parts):
    module = key.split(".")[-2]
    joined = {"input_layernorm": None, "post_attention_layernorm": None}
    return library_merge(key, parts) if module != "norm" else joined[module]


def guesses_what_it_does_not_know(key, parts):
    return library_merge(key if "masked" not in key else "norm.bias", parts)


def without_an_end(config, dtype, memory, margin):
    room = memory - margin - config.weight_bytes(dtype)
    return max(0, room // config.kv_cache_bytes(1, torch.float16))


def without_a_floor(config, dtype, memory, margin):
    room = memory - margin - config.weight_bytes(dtype)
    return min(config.max_position_embeddings, room // config.kv_cache_bytes(1, torch.float16))


def keys_only(config, dtype, memory, margin):
    return min(config.max_position_embeddings, 2 * max(0, without_a_floor(config, dtype, memory, margin)))


def cache_like_the_weights(config, dtype, memory, margin):
    room = memory - margin - config.weight_bytes(dtype)
    return max(0, min(config.max_position_embeddings, room // config.kv_cache_bytes(1, dtype)))


def without_the_margin(config, dtype, memory, margin):
    return max(0, without_a_floor(config, dtype, memory, 0))


def parts_of_tokens(config, dtype, memory, margin):
    room = memory - margin - config.weight_bytes(dtype)
    return max(0, min(config.max_position_embeddings, room / config.kv_cache_bytes(1, torch.float16)))


def takes_a_name_for_the_dtype(config, dtype, memory, margin):
    return (memory - margin - config.weight_bytes("float16")) // config.kv_cache_bytes(1, torch.float16)


WRONG = {
    "my_place_of": (
        exercises.place_of,
        [
            blocks_from_one,
            whole_names_as_keys,
            without_a_gap,
            only_for_20b,
            index_as_text,
            index_alone,
            takes_every_second_part_for_a_number,
        ],
    ),
    "my_merge_shards": (
        exercises.merge_shards,
        [
            averaged_biases,
            columns_joined_as_rows,
            dense_in_any_name,
            summed_in_half_precision,
            joined_in_fp32,
            adds_in_place,
            first_norm,
            forgets_the_last_norm,
            guesses_what_it_does_not_know,
        ],
    ),
    "my_longest_context": (
        exercises.longest_context,
        [
            without_an_end,
            without_a_floor,
            keys_only,
            cache_like_the_weights,
            without_the_margin,
            parts_of_tokens,
            takes_a_name_for_the_dtype,
        ],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_stub_is_told_kindly(name):
    check, _ = WRONG[name]
    result = check(lesson().stub(name))
    assert not result.passed and result.message.startswith("Not written yet")


@pytest.mark.parametrize("name", WRONG)
def test_the_folded_solution_passes(name):
    result = result_of_solution(name)
    assert result.passed, result.message


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tries_are_told_apart(name):
    """A learner is helped by what is wrong with the try at hand, not by a general no."""
    check, tries = WRONG[name]
    results = [check(wrong) for wrong in tries]
    assert not any(result.passed for result in results)
    assert len({result.message for result in results}) == len(tries)


RAISED = {
    takes_every_second_part_for_a_number: "my_place_of('word_embeddings.weight', 6): your code raised ValueError",
    forgets_the_last_norm: "my_merge_shards('norm.weight', 2 parts of shape [4]): your code raised KeyError",
    takes_a_name_for_the_dtype: "my_longest_context of tiny, torch.float16, 8 GiB, margin 1.5 GiB: your code raised",
}


@pytest.mark.parametrize("wrong", RAISED, ids=lambda wrong: wrong.__name__)
def test_what_a_try_raises_is_said_with_its_input(wrong):
    """`KeyError: 'norm'` alone sends a learner through all sixteen keys."""
    (check,) = [check for check, tries in WRONG.values() if wrong in tries]
    assert RAISED[wrong] in check(wrong).message


def test_a_cache_in_the_precision_of_the_weights_is_told_so():
    """The one mistake that only int8 weights show, since then the cache is not in the weights' precision."""
    message = exercises.longest_context(cache_like_the_weights).message
    assert "of 20B, torch.int8, 22 GiB" in message and "should be 1347, but is 2048" in message
    assert "the cache is in fp16, whatever the weights are in" in message


def test_any_refusal_of_an_unknown_key_counts_once_the_known_keys_are_right():
    """A `raise NotImplementedError(key)` at the end of a whole solution is no stub."""

    def refuses_with_a_stub_s_error(key, parts):
        if "masked" in key:
            raise NotImplementedError(key)
        return library_merge(key, parts)

    assert exercises.merge_shards(refuses_with_a_stub_s_error).passed


def test_the_heart_lets_the_shipped_model_write():
    assert "Once upon a time" in result_of_solution("my_merge_shards").message
    assert "Once upon a time" not in exercises.merge_shards(averaged_biases).message


CAUGHT = {
    "with_parameter_mean": [True, True, False, True],
    "without_option": [True, True, False, True],
    "by_thirds": [True, False, False, False],
}


def test_each_bug_exhibit_is_caught_by_the_checks_that_the_notebook_names():
    """Shapes; ranks of an untrained model; ranks of a trained one; perplexity."""
    names = lesson().names
    table = names["table"]  # what the notebook's own checks have just found
    assert list(table) == ["shapes", "ranks, untrained", "ranks, trained", "perplexity"]
    assert [version.__name__ for version in names["versions"]] == [*CAUGHT, "merge_shards"]
    assert len(lesson().exhibits()) == len(CAUGHT)
    for (name, passes), source, *found in zip(CAUGHT.items(), lesson().exhibits(), *table.values(), strict=False):
        assert f"def {name}(" in source
        assert found == passes, name
    assert all(found[-1] for found in table.values()), "the right way passes every check"


def test_the_calculator_shows_its_first_answer_without_a_kernel_and_follows_its_controls():
    needs = lesson().names["bytes_needed"]
    calculator = MemoryCalculator({"a": tiny(), "b": tiny()}, ["fp16", "fp32"], needs)
    bundle = calculator._repr_mimebundle_()
    assert bundle["text/plain"].startswith("a, fp16, 2048 tokens: ")
    assert "8 GB yes" in bundle["text/html"]
    model, precision, tokens, shown = calculator.widget().children
    model.value, precision.value, tokens.value = "b", "fp32", 1024
    assert shown.value.startswith('<p style="font-size:16px">b, fp32, 1024 tokens: ')


def test_the_picture_of_a_pair_says_what_each_rank_computes():
    """Its numbers are computed, not drawn by hand: those on the wall must be those in the cell above."""
    first, second, x = torch.eye(4), torch.ones(4, 4), torch.tensor([1.0, 2.0, 3.0, 4.0])
    alt = pair_picture(first, second, x).alt
    assert "3, 3, 3, 3 and 7, 7, 7, 7" in alt and "added up to 10, 10, 10, 10" in alt


def test_the_peak_is_seen_although_it_is_gone_at_the_end():
    """Otherwise a loader that holds everything twice on its way would look as careful as one that doesn't."""
    size = 60_000_000

    def work() -> None:
        numbers = [torch.ones(size // 240) for _ in range(60)]
        time.sleep(0.1)
        del numbers

    assert all(peak_of(work) > 0.8 * size for _ in range(3)), "what was freed before is filled again unseen"
