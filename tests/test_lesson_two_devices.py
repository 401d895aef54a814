"""Notebook 09: its exercises judge rightly, the named checks catch its bug exhibits, its ranks report."""

import pytest
import torch
import torch.nn.functional as F

from neox_lib.course import two_devices
from neox_lib.course.exercises import two_devices as exercises
from neox_lib.course.figures.two_devices import all_reduces, column_then_row, who_keeps_what
from neox_lib.distributed.ranks import RankFailed, on_ranks
from tests.lessons import Lesson

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
CHECKS = {
    "my_split_mlp": exercises.split_mlp,
    "my_block": exercises.block,
    "my_embed": exercises.embed,
    "my_bytes_sent": exercises.bytes_sent,
}


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    return Lesson("09_two_devices")


@pytest.mark.parametrize("name", CHECKS)
def test_a_stub_is_told_that_it_is_one(lesson, name):
    lesson.stub_is_told(CHECKS[name], name)


@pytest.mark.parametrize("name", CHECKS)
def test_the_folded_solution_passes(lesson, name):
    lesson.solution_passes(CHECKS[name], name, story=name == "my_block")


def own_rows(widen, devices):
    size = len(widen) // devices
    return [slice(start, start + size) for start in range(0, len(widen), size)]


def forgets_relu(x, widen, narrow, devices):
    return [narrow[:, own] @ (widen[own] @ x) for own in own_rows(widen, devices)]


def relu_at_the_end(x, widen, narrow, devices):
    return [(narrow[:, own] @ (widen[own] @ x)).relu() for own in own_rows(widen, devices)]


def whole_mlp_everywhere(x, widen, narrow, devices):
    return [narrow @ (widen @ x).relu()] * devices


def inputs_first(x, widen, narrow, devices):
    return [narrow @ (widen[:, device] * x[device]).relu() for device in range(devices)]


def always_two(x, widen, narrow, devices):
    return [narrow[:, own] @ (widen[own] @ x).relu() for own in own_rows(widen, 2)]


def one_row_each(x, widen, narrow, devices):
    return [narrow[:, device] * (widen[device] @ x).relu() for device in range(devices)]


def adds_the_parts(x, widen, narrow, devices):
    return narrow @ (widen @ x).relu()


def takes_turns(x, widen, narrow, devices):
    return [narrow[:, start::devices] @ (widen[start::devices] @ x).relu() for start in range(devices)]


def cuts_the_columns_of_both(x, widen, narrow, devices):
    return [narrow[:, own] @ (widen[:, own] @ x).relu() for own in own_rows(widen, devices)]


def partial_sums(hidden, blocks, cos, sin, caches):
    """What each device adds, its own cache asked."""
    pairs = zip(blocks, caches, strict=True)
    attended = [block.attention(block.input_layernorm(hidden), cos, sin, cache) for block, cache in pairs]
    return [a + block.mlp(block.post_attention_layernorm(hidden)) for a, block in zip(attended, blocks, strict=True)]


def adds_x_everywhere(hidden, blocks, cos, sin, caches, all_reduce):
    return all_reduce([hidden + each for each in partial_sums(hidden, blocks, cos, sin, caches)])


def forgets_x(hidden, blocks, cos, sin, caches, all_reduce):
    return all_reduce(partial_sums(hidden, blocks, cos, sin, caches))


def takes_the_mean(hidden, blocks, cos, sin, caches, all_reduce):
    return hidden + all_reduce(partial_sums(hidden, blocks, cos, sin, caches)) / len(blocks)


def waits_for_attention(hidden, blocks, cos, sin, caches, all_reduce):
    pairs = zip(blocks, caches, strict=True)
    attended = [block.attention(block.input_layernorm(hidden), cos, sin, cache) for block, cache in pairs]
    hidden = hidden + all_reduce(attended)
    return hidden + all_reduce([block.mlp(block.post_attention_layernorm(hidden)) for block in blocks])


def reduces_twice(hidden, blocks, cos, sin, caches, all_reduce):
    pairs = zip(blocks, caches, strict=True)
    attended = all_reduce([block.attention(block.input_layernorm(hidden), cos, sin, cache) for block, cache in pairs])
    return hidden + attended + all_reduce([block.mlp(block.post_attention_layernorm(hidden)) for block in blocks])


def adds_without_the_wire(hidden, blocks, cos, sin, caches, all_reduce):
    return hidden + sum(partial_sums(hidden, blocks, cos, sin, caches))


def one_cache_for_all(hidden, blocks, cos, sin, caches, all_reduce):
    return hidden + all_reduce(partial_sums(hidden, blocks, cos, sin, [caches[0]] * len(blocks)))


def one_tensor_on_the_wire(hidden, blocks, cos, sin, caches, all_reduce):
    return hidden + all_reduce(sum(partial_sums(hidden, blocks, cos, sin, caches)))


def changes_its_input(hidden, blocks, cos, sin, caches, all_reduce):
    hidden += all_reduce(partial_sums(hidden, blocks, cos, sin, caches))
    return hidden


def counts_from_the_end(input_ids, rows, first):
    row = input_ids - first
    return F.embedding(row.where(row < len(rows), 0) % len(rows), rows).masked_fill((row >= len(rows))[..., None], 0)


def looks_up_all(input_ids, rows, first):
    return rows[input_ids]


def zeros_nowhere(input_ids, rows, first):
    return rows[(input_ids - first).clamp(0, len(rows) - 1)]


def changes_the_ids(input_ids, rows, first):
    input_ids -= first
    elsewhere = (input_ids < 0) | (input_ids >= len(rows))
    return F.embedding(input_ids.masked_fill(elsewhere, 0), rows).masked_fill(elsewhere[..., None], 0)


def looks_only_above(input_ids, rows, first):
    row = input_ids - first
    above = row >= len(rows)
    return F.embedding(row.masked_fill(above, 0), rows).masked_fill(above[..., None], 0)


def one_row_off(input_ids, rows, first):
    row = input_ids - first
    elsewhere = (row < 0) | (row > len(rows))
    vectors = F.embedding(row.masked_fill(elsewhere, 0).clamp(max=len(rows) - 1), rows)
    return vectors.masked_fill(elsewhere[..., None], 0)


def forgets_the_embedding(config, tokens, ranks, dtype):
    per_reduce = 2 * (ranks - 1) * tokens * config.hidden_size // ranks
    return exercises.bytes_on_the_wire(config, tokens, ranks, dtype) - per_reduce * dtype.itemsize


def always_once(config, tokens, ranks, dtype):
    all_reduces = 1 + config.num_hidden_layers
    numbers = all_reduces * 2 * (ranks - 1) * tokens * config.hidden_size // ranks
    return (numbers + (ranks - 1) * config.vocab_size // ranks) * dtype.itemsize


def scores_every_token(config, tokens, ranks, dtype):
    more = (tokens - 1) * (ranks - 1) * config.vocab_size // ranks
    return exercises.bytes_on_the_wire(config, tokens, ranks, dtype) + more * dtype.itemsize


def forgets_the_scores(config, tokens, ranks, dtype):
    scores = (ranks - 1) * config.vocab_size // ranks
    return exercises.bytes_on_the_wire(config, tokens, ranks, dtype) - scores * dtype.itemsize


def counts_numbers(config, tokens, ranks, dtype):
    return exercises.bytes_on_the_wire(config, tokens, ranks, dtype) // dtype.itemsize


def sends_the_whole_tensor(config, tokens, ranks, dtype):
    all_reduces = 1 + config.num_hidden_layers * (1 if config.use_parallel_residual else 2)
    numbers = all_reduces * (ranks - 1) * tokens * config.hidden_size + (ranks - 1) * config.vocab_size // ranks
    return numbers * dtype.itemsize


WRONG = {
    "my_split_mlp": {
        forgets_relu: "ReLU is missing",
        relu_at_the_end: "ReLU comes after the second matrix",
        whole_mlp_everywhere: "each device computes the whole MLP",
        inputs_first: "cut by its inputs",
        always_two: "but returned 2 parts",
        one_row_each: "device 0's part in my_split_mlp on random matrices",
        adds_the_parts: "but returned a Tensor",
        takes_turns: "device 0 should have the first rows",
        cuts_the_columns_of_both: "on the two matrices above, devices=2: your code raised RuntimeError",
    },
    "my_block": {
        adds_x_everywhere: "x is added on each device, 2 times in all",
        forgets_x: "x itself is missing",
        takes_the_mean: "the partial sums are averaged",
        waits_for_attention: "the residual is sequential",
        reduces_twice: "calls all_reduce 2 times where once is enough",
        adds_without_the_wire: "never calls all_reduce",
        one_cache_for_all: "its own cache",
        one_tensor_on_the_wire: "a list with one tensor from each",
        changes_its_input: "changes its input",
    },
    "my_embed": {
        counts_from_the_end: "counted from the end",
        looks_up_all: "first=0) raised IndexError",
        zeros_nowhere: "should be",
        changes_the_ids: "changes the ids",
        looks_only_above: "first=2) raised IndexError",
        one_row_off: "should be",
    },
    "my_bytes_sent": {
        forgets_the_embedding: "the all-reduce of the embeddings left out",
        always_once: "a sequential block needs two all-reduces",
        scores_every_token: "only the last is scored",
        forgets_the_scores: "the scores left out",
        counts_numbers: "too few",
        sends_the_whole_tensor: "1 token, 4 ranks",
    },
}
TRIES = [(name, wrong, says) for name, tries in WRONG.items() for wrong, says in tries.items()]


@pytest.mark.parametrize(("name", "wrong", "says"), TRIES, ids=lambda value: getattr(value, "__name__", None))
def test_a_wrong_try_hears_which_property_failed(name, wrong, says):
    """And no wrong block tells a story."""
    result = CHECKS[name](wrong)
    assert not result.passed and says in result.message, result.message
    assert ("raised" in says) >= ("raised RuntimeError" in result.message) and "Once upon" not in result.message


def test_wrong_tries_are_told_apart():
    for name, tries in WRONG.items():
        assert len({CHECKS[name](wrong).message for wrong in tries}) == len(tries), name


CAUGHT = {  # by: shapes; one device; two devices, untrained; two devices, trained
    "bias_on_every_rank": [True, True, True, False],
    "flat_thirds": [True, True, False, False],
    "stream_on_every_rank": [True, True, False, False],
}


def test_each_bug_exhibit_is_caught_by_the_checks_that_the_notebook_names(lesson):
    names = lesson.names
    assert list(names["found"]) == ["shapes", "one device", "two, untrained", "two, trained"]
    assert list(names["versions"]) == ["right", *CAUGHT]
    columns = list(zip(*names["found"].values(), strict=True))
    assert columns[0] == (True,) * 4, "the right way passes every check"
    for source, (name, passes), column in zip(lesson.exhibits(), CAUGHT.items(), columns[1:], strict=True):
        assert f"def {name}(" in source and list(column) == passes


def test_the_real_ranks_told_what_the_prose_says(lesson):
    names = lesson.names
    assert [report["story"] for report in names["reports"]] == [names["alone"]] * 2
    assert names["counted"]["parallel residual"] == {"all-reduce": 7, "all-gather": 1}
    assert names["counted"]["parallel, PyTorch's plan"] == {"all-reduce": 13, "all-gather": 1}
    assert not torch.equal(names["first"]["hidden"], names["second"]["hidden"])


def test_a_lost_rank_raises_so_that_the_cell_shows_something():
    with pytest.raises(RankFailed, match="lost"):
        on_ranks(2, two_devices.leave_early)


def test_both_sizes_of_an_all_reduce_were_timed(lesson):
    token, prompt = lesson.names["measured"]
    assert 0 < token < prompt


def test_the_figure_of_the_two_matrices_ends_with_their_sum(lesson):
    names = lesson.names
    pictures = list(column_then_row(names["x"], names["widen"], names["narrow"]).pictures.values())
    shown = [[text.get_text() for text in each.figure.axes[0].texts] for each in pictures]
    assert shown[-1].count("14, 17") == 2 and "14, 17" not in shown[-2], "both devices get the sum, and not before"
    assert "= 4, 12" in shown[3] and "= 10, 5" in shown[3]


def test_the_figure_of_the_parts_follows_the_rules_of_merging():
    patches = [patch.get_height() for patch in who_keeps_what().figure.axes[0].patches]
    assert patches.count(1) == 8 and patches.count(2) == 4, "four tensors cut by rows, two by columns"


def test_the_figure_has_one_all_reduce_above_and_two_below():
    above, below = all_reduces().figure.axes
    assert [sum(text.get_text() == "all-reduce" for text in axes.texts) for axes in (above, below)] == [1, 2]
