"""Notebook 11: its exercises judge rightly, the strict checks catch its bug exhibits, its tools fit the model."""

import pytest
import torch
from torch import nn

from neox_lib.course.exercises import look_inside as exercises
from neox_lib.course.figures import look_inside as figures
from neox_lib.inspection import copier
from neox_lib.inspection.attention import model_attention_weights
from neox_lib.inspection.heads import ablate_head, head_outputs, induction_scores, previous_token_scores, token_losses
from neox_lib.inspection.lens import attribute, logit_lens, residual_parts, residual_streams, split_dense
from neox_lib.inspection.patching import patch, patch_grid
from tests.lessons import Lesson

pytestmark = pytest.mark.usefixtures("one_thread")
CHECKS = {
    "my_logit_lens": exercises.logit_lens,
    "my_attribute": exercises.attribute,
    "my_patch": exercises.patch,
    "my_split_dense": exercises.split_dense,
}


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    return Lesson("11_look_inside")


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_a_stub_is_told_that_it_is_one(lesson, name):
    lesson.stub_is_told(CHECKS[name], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_the_folded_solution_passes(lesson, name):
    lesson.solution_passes(CHECKS[name], name, story=name == "my_patch")


def read_each(model, ids, read):
    rows = []
    model(ids, on_layer=lambda depth, hidden: rows.append(read(hidden)))
    return torch.stack(rows)


def without_norm(model, ids):
    return read_each(model, ids, model.final_linear)


def norm_twice(model, ids):
    return read_each(model, ids, lambda hidden: model.final_linear(model.norm(model.norm(hidden))))


def probabilities(model, ids):
    return logit_lens(model, ids).softmax(dim=-1)


def no_embedding(model, ids):
    return logit_lens(model, ids)[1:]


def last_position(model, ids):
    return logit_lens(model, ids)[:, :, -1:]


def a_list(model, ids):
    return list(logit_lens(model, ids))


def first_text_only(model, ids):
    return logit_lens(model, ids)[:, :1]


def raises_by_name(model, ids):
    return model.lm_head(residual_streams(model, ids))


def attributed(parts, norm, row, mean=True, weight=True, bias=True, eps=True, unbiased=False):
    deviation = (parts.sum(dim=0).var(unbiased=unbiased) + norm.eps * eps).sqrt()
    parts = parts - parts.mean(dim=-1, keepdim=True) if mean else parts
    last = (norm.bias @ row)[None] if bias else torch.zeros(1)
    return torch.cat([((norm.weight if weight else 1) * parts / deviation) @ row, last])


def forgets_the_mean(parts, norm, row):
    return attributed(parts, norm, row, mean=False)


def forgets_the_weight(parts, norm, row):
    return attributed(parts, norm, row, weight=False)


def forgets_the_bias(parts, norm, row):
    return attributed(parts, norm, row, bias=False)


def drops_the_bias(parts, norm, row):
    return attributed(parts, norm, row)[:-1]


def forgets_eps(parts, norm, row):
    return attributed(parts, norm, row, eps=False)


def divides_by_one_less(parts, norm, row):
    return attributed(parts, norm, row, unbiased=True)


def norms_each_part(parts, norm, row):
    return torch.cat([norm(parts) @ row, (norm.bias @ row)[None]])


def multiplies_a_module(parts, norm, row):
    return parts @ norm @ row


def patch_with(model, depth, replace):
    return model.layers[depth].register_forward_pre_hook(replace)


def every_position(model, depth, position, value):
    return patch_with(model, depth, lambda _, args: (value.expand_as(args[0]), *args[1:]))


def next_layer(model, depth, position, value):
    return patch(model, 1 - depth, position, value)


def returns_nothing(model, depth, position, value):
    patch(model, depth, position, value)


def adds(model, depth, position, value):
    def replace(_, args):
        hidden = args[0].clone()
        hidden[:, position] += value
        return hidden, *args[1:]

    return patch_with(model, depth, replace)


def in_place(model, depth, position, value):
    def replace(_, args):
        args[0][:, position] = value

    return patch_with(model, depth, replace)


def changes_nothing(model, depth, position, value):
    def replace(_, args):
        hidden = args[0].clone()
        hidden[:, position] = value

    return patch_with(model, depth, replace)


def sets_two_hooks(model, depth, position, value):
    patch(model, depth, position, value)
    return patch(model, depth, position, value)


def drops_cos_and_sin(model, depth, position, value):
    def replace(_, args):
        hidden = args[0].clone()
        hidden[:, position] = value
        return hidden

    return patch_with(model, depth, replace)


def by_rows(merged, weight, heads):
    pairs = zip(merged.chunk(heads, dim=-1), weight.chunk(heads, dim=0), strict=True)
    return torch.stack([each @ rows for each, rows in pairs])


def in_turns(merged, weight, heads):
    return torch.stack([merged[..., head::heads] @ weight[:, head::heads].T for head in range(heads)])


def all_of_it(merged, weight, heads):
    return torch.stack([merged @ weight.T] * heads)


def heads_behind(merged, weight, heads):
    return split_dense(merged, weight, heads).movedim(0, -2)


def not_stacked(merged, weight, heads):
    return list(split_dense(merged, weight, heads))


def not_transposed(merged, weight, heads):
    pairs = zip(merged.chunk(heads, dim=-1), weight.chunk(heads, dim=1), strict=True)
    return torch.stack([each @ columns for each, columns in pairs])


WRONG = {
    "my_logit_lens": {
        without_norm: "the last norm is missing",
        norm_twice: "through the last norm twice",
        probabilities: "leave out the softmax",
        no_embedding: "L + 1",
        last_position: "all positions are wanted",
        a_list: "stack the layers",
        first_text_only: "for a batch of two texts",
        raises_by_name: "my_logit_lens(a model of 2 layers, ids [1, 5]): your code raised AttributeError",
    },
    "my_attribute": {
        forgets_the_mean: "means are not subtracted",
        forgets_the_weight: "the norm's weight is left out",
        forgets_the_bias: "the norm's bias is left out",
        drops_the_bias: "comes last",
        forgets_eps: "eps is left out",
        divides_by_one_less: "by n, not by n - 1",
        norms_each_part: "its own deviation",
        multiplies_a_module: "a plain norm, row [1, -1]): your code raised",
    },
    "my_patch": {
        every_position: "every position is replaced",
        next_layer: "another layer reads it",
        returns_nothing: "should return the handle",
        adds: "added to what was there",
        in_place: "changed in place",
        changes_nothing: "has to return the new inputs",
        sets_two_hooks: "set one only",
        drops_cos_and_sin: "With my_patch(model, 0, 1, value): your code raised TypeError",
    },
    "my_split_dense": {
        by_rows: "cut by rows",
        in_turns: "not in turns",
        all_of_it: "its own slice",
        heads_behind: "heads come first",
        not_stacked: "stack the heads",
        not_transposed: "2 heads): your code raised RuntimeError",
    },
}
TRIES = [(name, wrong, says) for name, tries in WRONG.items() for wrong, says in tries.items()]


@pytest.mark.parametrize(("name", "wrong", "says"), TRIES, ids=lambda value: getattr(value, "__name__", None))
def test_a_wrong_try_hears_which_property_failed(name, wrong, says):
    """And its hooks are gone: the right one passes after it."""
    result = CHECKS[name](wrong)
    assert not result.passed and says in result.message, result.message
    assert "Once upon" not in result.message
    model = exercises.small_model()
    assert not any(layer._forward_pre_hooks for layer in model.layers)


def test_wrong_tries_are_told_apart():
    for name, tries in WRONG.items():
        assert len({CHECKS[name](wrong).message for wrong in tries}) == len(tries), name


@pytest.mark.slow
def test_each_bug_exhibit_looks_right_and_is_caught_by_the_strict_check(lesson):
    names, exhibits = lesson.names, lesson.exhibits()
    for name, exhibit in zip(
        ("lens_at_one_scale", "attribute_without_weight", "patch_and_stay"), exhibits, strict=True
    ):
        assert f"def {name}(" in exhibit and names["verdicts"][name] == [True, True, False]


@pytest.mark.slow
def test_what_the_prose_says_of_the_shipped_model_is_so(lesson):
    """The numbers are printed; these are the words around them."""
    names = lesson.names
    lens, grid, by_part, at = names["lens"][:, 0, -1], names["grid"], names["by_part"], names["name_at"]
    assert [int(row.argmax()) == names["she"] for row in lens] == [False, False] + [True] * 5, "after two layers"
    assert sorted(by_part, key=by_part.get)[-2:] == ["attention 1", "attention 5"]
    assert (grid[:2, at] < 0).all() and (grid[2:, -1] < 0).all() and (grid[:2, -1] > 4).all()
    assert (grid[:, :at] - names["difference"]).abs().max() < 1e-3, "nothing matters before the name"
    assert names["previous"].argmax() == 1 * 6 + 1 and names["inducing"].argmax() // 6 == 4
    assert {divmod(each, 6) for each in names["by_head"].flatten().topk(2).indices.tolist()} == {(1, 2), (5, 4)}
    assert names["looks"][1, 2] > 0.9 and names["looks"][5, 4] > 0.9


def test_the_tools_agree_with_the_model():
    model, ids = exercises.small_model(), exercises.IDS
    logits, streams, parts = model(ids), residual_streams(model, ids), residual_parts(model, ids)
    assert torch.equal(logit_lens(model, ids)[-1], logits)
    assert list(parts) == ["embedding", "attention 0", "mlp 0", "attention 1", "mlp 1"]
    torch.testing.assert_close(sum(parts.values()), streams[-1])
    last = torch.stack([part[0, -1] for part in parts.values()])
    added = attribute(last, model.norm, model.final_linear.weight[7])
    assert added.shape == (6,) and abs(added.sum() - logits[0, -1, 7]) < 1e-4
    outputs, dense = head_outputs(model, ids), model.layers[1].attention.dense
    by_head = split_dense(outputs[1].flatten(start_dim=-2), dense.weight, 2)  # [H, B, T, C]
    torch.testing.assert_close(by_head.sum(dim=0) + dense.bias, parts["attention 1"])
    ungrafted = patch_grid(model, ids, streams, lambda row: row[3])
    assert ungrafted.shape == (2, 5) and torch.allclose(ungrafted, logits[0, -1, 3].expand(2, 5), atol=1e-5)
    with ablate_head(model, 0, 1, outputs[0, 0, 2, 1]):
        assert torch.equal(head_outputs(model, ids)[0, 0, :, 1], outputs[0, 0, 2, 1].expand(5, -1))
    assert torch.equal(model(ids), logits), "no hook is left"


def test_tools_refuse_what_would_give_silent_nonsense():
    model, ids = exercises.small_model(), exercises.IDS
    with pytest.raises(ValueError, match=r"\[3, 1, 4, 8\], expected \[3, 1, 5, 8\]: the other text must have as many"):
        patch_grid(model, ids, torch.zeros(3, 1, 4, 8), lambda row: row[0])
    with pytest.raises(ValueError, match="period is 5; expected 2 to 4"):
        induction_scores(torch.zeros(5, 5), 5)
    with pytest.raises(ValueError, match="int8, expected floating point"):
        split_dense(torch.zeros(2, 8), torch.zeros(8, 8, dtype=torch.int8), 2)
    model.step = lambda *_: None
    try:
        for tool in (lambda: residual_parts(model, ids), lambda: patch(model, 0, 0, torch.zeros(8))):
            with pytest.raises(ValueError, match=r"call no hooks: set model\.step = None"):
                tool()
    finally:
        model.step = None


def test_scores_are_one_for_a_head_that_does_nothing_else():
    previous, inducing = torch.zeros(2, 6, 6)
    previous[range(1, 6), range(5)] = 1
    inducing[range(3, 6), range(1, 4)] = 1
    both = torch.stack([previous, inducing])
    assert previous_token_scores(both).tolist() == [1, 0] and induction_scores(both, 3).tolist() == [0, 1]


def test_the_shipped_copier_copies_with_the_heads_that_the_lesson_names():
    model, history = copier.load_copier()
    ids = copier.repeated_ids(128, 4, 24, 48, torch.Generator().manual_seed(5))
    losses, weights = token_losses(model, ids).mean(dim=0), model_attention_weights(model, ids).mean(dim=1)
    assert losses[:23].mean() > 4.5 and losses[25:].mean() < 0.2
    assert previous_token_scores(weights)[0].max() > 0.95 and induction_scores(weights, 24)[1].min() > 0.9
    assert history[0]["repeated"] > 4.5 and history[-1]["repeated"] < 0.1 and len(history) == 31
    assert copier.WEIGHTS.stat().st_size < 1_000_000
    above, below = figures.learning_to_copy(history).figure.axes
    assert [len(axes.lines) for axes in (above, below)] == [2, 2]


def test_a_copier_is_trained_and_saved_by_the_documented_call(tmp_path):
    model, history = copier.train_copier(steps=2)
    copier.save_copier(tmp_path / "copier.safetensors", model, history)
    again, known = copier.load_copier(tmp_path / "copier.safetensors")
    assert known == history and [row["step"] for row in history] == [0]
    pairs = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.allclose(before, after, atol=1e-2) for before, after in pairs)


def test_a_grid_frames_what_is_below_zero():
    values = torch.tensor([[1.0, -1.0], [2.0, -3.0]])
    picture = figures.token_grid(values, [["a", "b"], ["c", "d"]], ["x", " y"], "title", "layer", "unit", "alt text")
    axes = picture.figure.axes[0]
    assert len(axes.patches) == 2 and axes.get_xticklabels()[1].get_text() == "_y\n1"


def test_bars_end_with_their_sum():
    picture = figures.contributions({"one": 1.0, "two": -0.25}, "title", "logits")
    assert picture.figure.axes[0].get_yticklabels()[-1].get_text() == "sum" and "+0.75" in picture.alt


def test_a_plain_norm_gives_the_numbers_of_the_lesson():
    parts = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    with torch.no_grad():
        added = attribute(parts, nn.LayerNorm(2, eps=0.0), torch.tensor([1.0, -1.0]))
    assert added.tolist() == [1.0, 2.0, -1.0, 0.0]
