"""The training loop: it learns, it draws what the plan says, and a stop in the middle costs nothing."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from neox_lib.config import NeoXConfig
from neox_lib.model import NeoXModel
from neox_lib.training import loop
from neox_lib.training import run as training
from neox_lib.training.loop import initialize, learning_rate_at, make_optimizer, sample_batch, training_step
from neox_lib.training.plan import TrainingPlan
from neox_lib.training.run import curve, hold_out, spread_sample, train

CONFIG = NeoXConfig(
    vocab_size=32,
    tokenizer_vocab_size=30,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
    rotary_pct=0.5,
)
PLAN = TrainingPlan(
    total_tokens=8 * 64, batch_tokens=64, warmup_steps=2, windows=((0.0, (8,)), (0.5, (16,))), learning_rate=1e-2
)
STORIES, MIX, VALIDATION = torch.arange(200) % 20, torch.arange(90) % 10 + 20, torch.arange(40) % 20


class Interrupted(Exception):
    """Someone pulls the plug."""


def run(folder, plan=PLAN, config=CONFIG):
    return train(config, plan, STORIES, MIX, VALIDATION, folder)


def a_save_after_every_step(monkeypatch) -> None:
    """Time flies: five minutes pass whenever the loop looks at the clock."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += 301
        return now[0]

    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=monotonic))


@pytest.mark.parametrize("stop_at", [1, 3, 5, 7])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, monkeypatch, stop_at):
    """Hours of training get interrupted; what comes out must not depend on it, to the last bit."""
    whole, _ = run(tmp_path / "whole")
    with monkeypatch.context() as context:
        a_save_after_every_step(context)
        calls = []

        def step_until(*arguments) -> float:
            if len(calls) == stop_at:
                raise Interrupted
            calls.append(1)
            return training_step(*arguments)

        context.setattr(loop, "training_step", step_until)
        with pytest.raises(Interrupted):
            run(tmp_path / "parts")
    assert torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["step"] == stop_at
    resumed, history = run(tmp_path / "parts")
    for (name, expected), found in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert history[-1]["step"] == PLAN.steps
    assert history[-1]["tokens"] == PLAN.total_tokens


def test_dropout_is_on_while_training_off_while_judging_and_the_same_after_a_stop(tmp_path, monkeypatch):
    """Dropped branches in a validation loss would make the best model look bad."""
    plan = dataclasses.replace(PLAN, dropout=0.5)
    model = NeoXModel(CONFIG)
    training.add_dropout(model, 0.5)
    ids = STORIES[None, :8]
    assert not torch.equal(model.train()(ids), model.train()(ids))
    assert torch.equal(model.eval()(ids), model.eval()(ids))
    whole, _ = run(tmp_path / "whole", plan)
    assert not whole.training
    assert not torch.equal(whole.final_linear.weight, run(tmp_path / "without")[0].final_linear.weight)
    a_save_after_every_step(monkeypatch)
    with monkeypatch.context() as patch:
        real = loop.training_step
        calls: list[int] = []

        def stop_at_three(*arguments):
            calls.append(1)
            if len(calls) == 4:
                raise Interrupted
            return real(*arguments)

        patch.setattr(loop, "training_step", stop_at_three)
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", plan)
    resumed, _ = run(tmp_path / "parts", plan)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_a_finished_run_is_not_trained_again(tmp_path):
    """Calling again gives the finished model, not a second helping."""
    first, history = run(tmp_path)
    again, same_history = run(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert same_history == history == json.loads((tmp_path / "history.json").read_text())


@pytest.mark.parametrize(
    "other",
    [
        {"plan": dataclasses.replace(PLAN, learning_rate=2e-2)},
        {"plan": dataclasses.replace(PLAN, windows=((0.0, (8,)),))},
        {"config": dataclasses.replace(CONFIG, hidden_act="gelu")},
    ],
    ids=["learning_rate", "windows", "hidden_act"],
)
def test_a_state_of_another_plan_is_refused(tmp_path, other, request):
    """Half a run at one rate and half at another is a model that no command reproduces."""
    run(tmp_path)
    name = request.node.callspec.id
    with pytest.raises(ValueError, match=rf"state\.pt belongs to another config or plan, with another {name}; use"):
        run(tmp_path, **other)


@pytest.mark.parametrize(
    ("stories", "start"), [(STORIES + 1, None), (STORIES, NeoXModel(CONFIG))], ids=["text", "start"]
)
def test_a_state_of_another_text_or_start_is_refused(tmp_path, stories, start):
    """`--start-from B` in the folder of a run from A would go on with A and say nothing."""
    run(tmp_path)
    with pytest.raises(ValueError, match=r"state\.pt belongs to a run on other texts or from other weights; use"):
        train(CONFIG, PLAN, stories, MIX, VALIDATION, tmp_path, start)


def test_a_state_of_an_earlier_version_is_refused_by_what_it_lacks(tmp_path):
    """Whoever updates in the middle of a run has changed neither config nor plan."""
    run(tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    config, plan = json.loads(state["identity"])
    older = {name: value for name, value in plan.items() if name != "dtype"}
    torch.save(state | {"identity": json.dumps([config, older])}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="is of an earlier version, without dtype; use"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mix_share": -1.0}, "mix_share is -1.0; expected a share from 0 to 1"),
        ({"dropout": float("nan")}, "dropout is nan; expected a share from 0 to 1"),
        ({"batch_tokens": 15}, "batch_tokens is 15; expected the longest window's 16 at least"),
        ({"total_tokens": 63}, "total_tokens is 63; expected the 64 of one step at least"),
        ({"total_tokens": -1}, "total_tokens is -1; expected the"),
        ({"windows": ((0.5, (8,)),)}, "expected lengths above 0, the first of them from a share of 0 on"),
        ({"windows": ((0.0, (8, 0)),)}, "expected lengths above 0"),
        ({"warmup_steps": -1}, "warmup_steps is -1; expected 0 or more"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected float32 or bfloat16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_plan_that_can_not_be_followed_is_refused_by_its_setting(changes, said):
    """Some of these ended in a traceback, others in a model that was never trained."""
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(PLAN, **changes)


KILLED_WHILE_SAVING = """
import os, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_training as t
from neox_lib.training import run as training

whole_save = torch.save
saves = []
def save(state, path):
    saves.append(path)
    whole_save(state, path)
    if len(saves) == 3:
        os.truncate(path, 1000)
        os._exit(9)

class Clock:
    now = 0.0
    def monotonic(self):
        Clock.now += 301
        return Clock.now

torch.save, training.time = save, Clock()
t.run(Path({folder!r}))
"""


def test_a_kill_while_saving_leaves_the_last_state_whole(tmp_path):
    """The machine goes down in the middle of a write: the state before it must load, and lead to the same weights."""
    code = KILLED_WHILE_SAVING.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "killed"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert killed.returncode == 9, killed.stderr
    assert torch.load(tmp_path / "killed" / "state.pt", weights_only=True)["step"] == 2
    resumed, whole = run(tmp_path / "killed")[0], run(tmp_path / "whole")[0]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_learning_rate_starts_small_peaks_after_the_warm_up_and_ends_at_nearly_nothing():
    """A full first step wrecks a fresh model; a last one with weight leaves it rough."""
    plan = TrainingPlan(total_tokens=1000 * 8192, warmup_steps=200, learning_rate=3e-3)

    def rate_at(step: int) -> float:
        return learning_rate_at(step, plan.steps, plan.warmup_steps, plan.learning_rate)

    rates = [rate_at(step) for step in range(plan.steps)]
    assert plan.steps == 1000
    assert rates[0] == pytest.approx(3e-3 / 200)
    assert rates[199] == rates[200] == pytest.approx(3e-3)
    assert max(rates) == pytest.approx(3e-3)
    assert rates[600] == pytest.approx(1.5e-3), "half the cosine is half the rate"
    assert 0 < rates[-1] < 1e-7
    assert rate_at(plan.steps) == pytest.approx(0, abs=1e-12)
    assert rates[:200] == sorted(rates[:200])
    assert rates[200:] == sorted(rates[200:], reverse=True)


def test_products_in_bfloat16_leave_the_weights_in_fp32():
    """Small updates vanish in a weight of 8 bits."""
    model = NeoXModel(CONFIG)
    initialize(model, 0)
    seen = []
    model.layers[0].mlp.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    training_step(model, make_optimizer(model, PLAN), sample_batch(STORIES, MIX, PLAN, 0), 1e-2, torch.bfloat16)
    assert seen[0] == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_window_lengths_take_turns_from_their_share_of_the_run_on():
    """Long windows among the short ones are what makes the model hold over 2048 tokens."""
    plan = TrainingPlan(total_tokens=12 * 8192, windows=((0.0, (256, 2048)), (0.5, (1024,))))
    assert [plan.window_length(step) for step in range(plan.steps)] == [256, 2048] * 3 + [1024] * 6
    assert {TrainingPlan().window_length(step) for step in range(8)} == {256, 2048}


def test_the_validation_sample_is_spread_over_the_whole_text():
    """A sample of the beginning alone once looked 0.2 nats better than the text as a whole."""
    sample = spread_sample(torch.arange(1000), windows=3, length=100)
    assert sample.tolist() == [*range(100), *range(450, 550), *range(900, 1000)]
    assert torch.equal(spread_sample(torch.arange(50), 3, 100), torch.arange(50))
    assert len(spread_sample(torch.arange(250), 3, 100)) == 200


def test_a_run_can_start_from_the_weights_of_another(tmp_path):
    """Going on with a model that has learned something must begin where it was, not at random."""
    first, _ = run(tmp_path / "first")
    nothing = dataclasses.replace(PLAN, total_tokens=64, learning_rate=0.0)
    folder = tmp_path / "second"
    second, _ = train(CONFIG, nothing, STORIES, MIX, VALIDATION, folder, start=first)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("step", [0, 5])
def test_a_batch_is_mixed_by_share_and_of_the_planned_length(step):
    """A quarter of the tales: stories hold 0 to 19, the mix 20 to 29, so that each row shows whence it comes."""
    batch = sample_batch(STORIES, MIX, PLAN, step)
    length = {0: 8, 5: 16}[step]
    count = PLAN.batch_tokens // length
    assert batch.shape == (count, length + 1)
    assert (batch >= 20).all(dim=1).sum() == round(0.25 * count)
    assert (batch < 20).all(dim=1).sum() == count - round(0.25 * count)
    for row in batch:
        start = 20 if row[0] >= 20 else 0
        period = 10 if row[0] >= 20 else 20
        assert ((row - start) == (row[0] - start + torch.arange(length + 1)) % period).all()


def test_the_same_step_draws_the_same_batch_and_every_other_step_another():
    """Resuming relies on the first, learning on the second."""
    drawn = [sample_batch(STORIES, MIX, PLAN, step) for step in range(PLAN.steps)]
    again = [sample_batch(STORIES, MIX, PLAN, step) for step in range(PLAN.steps)]
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert len({str(batch.tolist()) for batch in drawn}) == PLAN.steps
    assert not torch.equal(drawn[1], sample_batch(STORIES, MIX, dataclasses.replace(PLAN, seed=1), 1))


def test_without_a_mix_all_windows_are_stories():
    """The mix is optional."""
    assert (sample_batch(STORIES, STORIES[:0], PLAN, 0) < 20).all()


def test_a_run_keeps_a_sample_of_the_start_and_of_every_hundred_steps(tmp_path, monkeypatch, capsys):
    """What the reader watches: the words get better. Writing them must not change what is learned."""
    monkeypatch.setattr(training, "REPORT_EVERY", 3)
    said = iter("abcd")
    model, history = train(CONFIG, PLAN, STORIES, MIX, VALIDATION, tmp_path / "a", write=lambda _: next(said))
    assert [(row["step"], row["sample"], "loss" in row) for row in history] == [
        (0, "a", False),
        (3, "b", True),
        (6, "c", True),
        (8, "d", True),
    ]
    assert capsys.readouterr().out.split("\n\n")[:2] == ["step 0: a", "step 3: b"]
    silent, _ = run(tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), silent.parameters(), strict=True))


def test_a_model_is_judged_in_windows_that_it_was_trained_on(tmp_path, monkeypatch):
    """Past them it has learned nothing: the validation loss of a good run of short windows rose to the end."""
    lengths = []

    def judged(model, stream, length) -> torch.Tensor:
        lengths.append(length)
        return torch.ones(1)

    monkeypatch.setattr(training, "negative_log_likelihood", judged)
    run(tmp_path)
    assert lengths == [16, 16], "at the start and at the end"


def test_the_live_curve_is_as_wide_as_a_line_allows():
    assert curve([2.0]) == "▁" and curve([3.0, 1.0]) == "█▁"
    assert curve([8.0 - step / 100 for step in range(800)]) == "██▇▇▇▆▆▆▆▅▅▅▄▄▄▃▃▃▃▂▂▂▁▁"


def test_the_last_stories_are_held_out():
    """A story that is trained on says nothing about others."""
    stories = [str(number) for number in range(41)]
    assert hold_out(stories) == (stories[:39], stories[39:])
    assert hold_out(["a", "b"]) == (["a"], ["b"])
    with pytest.raises(ValueError, match="only one story, so none can be held out; add more, or give --validation"):
        hold_out(["a"])


def test_every_window_of_the_stories_can_be_drawn():
    """The last token is somebody's ending: an off-by-one would never train on it, or run past it."""
    stream, plan = torch.arange(12), dataclasses.replace(PLAN, batch_tokens=64, mix_share=0.0)
    starts = {row[0].item() for step in range(4) for row in sample_batch(stream, stream[:0], plan, step)}
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("stories", "validation", "context", "said"),
    [
        (STORIES[:16], VALIDATION, 64, r"16 tokens of stories do not fill a window of 16 \+ 1; add more text"),
        (STORIES, VALIDATION[:1], 64, "the held-out text is empty; give some stories"),
        (STORIES, VALIDATION, 15, "a window of 16 tokens exceeds the context of 15; give shorter windows"),
    ],
    ids=["stories", "validation", "context"],
)
def test_what_does_not_fit_the_longest_window_is_said_before_the_first_step(
    tmp_path, stories, validation, context, said
):
    """Long windows may come last: the run would end there after hours."""
    config = dataclasses.replace(CONFIG, max_position_embeddings=context)
    with pytest.raises(ValueError, match=said):
        train(config, PLAN, stories, MIX, validation, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_loss_falls_on_a_toy_text(tmp_path):
    """Numbers that count up are the easiest text there is: from log(32) = 3.4 nats to under 0.5 in 60 steps."""
    plan = dataclasses.replace(PLAN, total_tokens=60 * 128, batch_tokens=128, warmup_steps=5)
    _, history = run(tmp_path, plan)
    start = NeoXModel(CONFIG)
    initialize(start, 0)
    with torch.no_grad():
        logits = start(VALIDATION[None, :-1])
    before = torch.nn.functional.cross_entropy(logits[0], VALIDATION[1:]).item()
    assert before == pytest.approx(3.47, abs=0.3), "a fresh model should find all tokens about equally likely"
    assert history[-1]["validation_loss"] < 0.5


def test_scoring_before_training_does_not_break_it():
    """Scoring runs in inference mode; the rotary table that it builds must serve backward too."""
    model = NeoXModel(CONFIG)
    initialize(model, 0)
    with torch.inference_mode():
        model(STORIES[None, :9])
    loss = training_step(model, make_optimizer(model, PLAN), sample_batch(STORIES, MIX, PLAN, 0), 1e-2)
    assert loss == pytest.approx(3.47, abs=0.3)


def test_a_step_in_parts_is_a_step_in_one():
    """Batches are cut for the caches' sake: gradients must be those of the whole batch's mean loss."""
    windows = torch.randint(30, (5, 901), generator=torch.Generator().manual_seed(0))  # parts of 2, 2 and 1 rows
    config = dataclasses.replace(CONFIG, max_position_embeddings=1024, num_hidden_layers=1)
    model = NeoXModel(config)
    initialize(model, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss = torch.nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    gradients = dict(zip(before, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    found = training_step(model, optimizer, windows, 1.0)
    assert found == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        expected = before[name] - gradients[name] * min(1.0, 1.0 / norm.item())  # clipped to length 1
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-5, rtol=1e-4)


def test_gradients_that_are_no_numbers_leave_the_weights_alone():
    """One such update makes every weight NaN, and the state on the disk after it: hours of training would be lost."""
    model = NeoXModel(CONFIG)
    initialize(model, 0)
    model.norm.bias.data[3] = float("inf")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="the gradients are NaN or infinite, at a loss of nan"):
        training_step(model, make_optimizer(model, PLAN), sample_batch(STORIES, MIX, PLAN, 0), 1e-2)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_initial_deviations_are_20bs():
    """sqrt(2 / 5C), and 2 / (L sqrt(C)) for what writes to the residual; biases 0, norms 1."""
    config = dataclasses.replace(CONFIG, hidden_size=128, num_hidden_layers=4, intermediate_size=512, vocab_size=512)
    model = NeoXModel(config)
    initialize(model, 0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            small = not name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight"))
            expected = (2 / (5 * 128)) ** 0.5 if small else 2 / (4 * 128**0.5)
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(parameter.mean().item()) < 0.03 * expected + 1e-3, name
        else:
            assert (parameter == (1 if name.endswith("norm.weight") else 0)).all(), name


def test_weight_decay_leaves_biases_and_norms_alone():
    """Pulling a norm's weight towards zero silences its layer."""
    groups = make_optimizer(NeoXModel(CONFIG), PLAN).param_groups
    decays = {group["weight_decay"]: {parameter.dim() for parameter in group["params"]} for group in groups}
    assert decays == {0.1: {2}, 0.0: {1}}
    assert sum(len(group["params"]) for group in groups) == len(list(NeoXModel(CONFIG).parameters()))
