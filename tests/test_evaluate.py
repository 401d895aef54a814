"""Scores on benchmarks: the answers of lm-evaluation-harness's own Hugging Face backend, and none computed twice."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import neox_lib.evaluation.harness as harness
from neox_lib.__main__ import main
from neox_lib.checkpoints.convert import convert_to_huggingface
from neox_lib.checkpoints.files import SHIPPED_MODEL
from neox_lib.checkpoints.huggingface.writer import write_huggingface
from neox_lib.evaluation.harness import HarnessModel, evaluate
from neox_lib.evaluation.items import TEXTS, endings, last_words
from neox_lib.loading import create_model, create_tokenizer
from neox_lib.model import NeoXModel
from neox_lib.tokenizer import save_tokenizer, train_tokenizer
from tests.small_models import WITH_TOKENIZER, load, randomize

pytestmark = pytest.mark.usefixtures("one_thread")

STORED = SHIPPED_MODEL.parent / "scores.json"
SENTENCE = "Once upon a time, there was a little fox who lived in a big, dark forest. "
PAIRS = [
    ("Once upon a", " time"),  # one token
    ("", "Once upon a time"),  # no context
    ("", "<|endoftext|>Once upon a time"),  # nor one to be put before it
    ("The fox and ", "the hen"),  # space at the end of the context
    ("The fox\n\n  ", "the hen"),
    ("In a bi", "g forest. The end"),  # the cut is inside a word
    (SENTENCE * 20, "The end"),  # longer than the small model's context
    (SENTENCE, SENTENCE),
    ("Once", " upon"),
    ("A café", " = 🦊!"),
]


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    """A random model with a context of 128, all of whose rows stand for tokens, in Hugging Face's layout."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = NeoXModel(replace(WITH_TOKENIZER, vocab_size=300, max_position_embeddings=128)).eval()
    randomize(model, seed=2)
    save_tokenizer(train_tokenizer([SENTENCE], 300), folder / "own.json")
    write_huggingface(model, folder / "model", folder / "own.json")
    return folder / "model"


@pytest.fixture(scope="module")
def shipped_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate_shipped") / "model"
    convert_to_huggingface(SHIPPED_MODEL, folder)
    return folder


@pytest.fixture(scope="module", params=["random", "shipped"])
def both(request):
    """(a function from a batch size to our model for the harness, the harness's own of the same weights)."""
    from lm_eval.models.huggingface import HFLM

    folder = request.getfixturevalue(f"{request.param}_folder")
    model, tokenizer = load(folder, torch.float32), create_tokenizer(folder)
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)
    return lambda batch_size: HarnessModel(model, tokenizer, batch_size), theirs


def requests(kind: str, *arguments: tuple):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, place) for place, each in enumerate(arguments)]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_same_log_likelihoods_as_the_harness(both, batch_size):
    """One at a time or side by side with longer ones: a score is that of the question."""
    ours, theirs = both
    asked = requests("loglikelihood", *PAIRS)
    for pair, found, expected in zip(
        PAIRS, ours(batch_size).loglikelihood(asked), theirs.loglikelihood(asked), strict=True
    ):
        assert found == (pytest.approx(expected[0], abs=1e-4), expected[1]), pair


def test_what_greedy_decoding_would_write_is_said_to_be(both):
    """The accuracy of LAMBADA is made of nothing else."""
    ours, theirs = both
    (text,) = ours(1).generate_until(requests("generate_until", (SENTENCE, {"max_gen_toks": 6})))
    asked = requests("loglikelihood", (SENTENCE.strip(), " " + text.lstrip()), (SENTENCE.strip(), text + " zz"))
    found = ours(2).loglikelihood(asked)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in theirs.loglikelihood(asked)]
    assert not found[1][1]


def test_a_context_of_space_alone_is_none():
    """The harness's own backend ends there; a task of ours must not."""
    asked = HarnessModel(create_model(dtype=torch.float32), create_tokenizer())
    found = asked.loglikelihood(requests("loglikelihood", (" \n", "Once"), ("", " \nOnce")))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)


def test_a_question_whose_answer_has_no_token_of_its_own_is_named():
    """Among ten thousand questions, nobody finds it by "got 2 and 0"."""
    from lm_eval.api.instance import Instance

    asked = HarnessModel(create_model(dtype=torch.float32), create_tokenizer())
    pairs = [("Once", " upon"), ("On", "ce")]
    questions = [Instance("loglikelihood", {}, pair, 0, ("mine", place, 1)) for place, pair in enumerate(pairs)]
    with pytest.raises(ValueError, match="question 1 of mine: after 'On', the answer 'ce' has 0 tokens of its own"):
        asked.loglikelihood(questions)


def test_the_same_likelihood_of_whole_texts(both):
    """Cut into windows where the harness cuts them; the last one has a full context."""
    ours, theirs = both
    texts = [("Once upon a time",), (SENTENCE * 11,), ("",), (SENTENCE * 4,)]
    asked = requests("loglikelihood_rolling", *texts)
    assert ours(2).loglikelihood_rolling(asked) == pytest.approx(
        theirs.loglikelihood_rolling(asked), abs=2e-3, rel=1e-6
    )


def test_the_same_texts_up_to_the_same_stop_strings(both):
    """Of unequal contexts in one batch, some cut from the left."""
    ours, theirs = both
    short = {"until": [".", "\n"], "max_gen_toks": 12, "do_sample": False}
    contexts = [("Once upon a time", short), (SENTENCE * 5, short), ("The fox", {"until": " a", "max_gen_toks": 9})]
    asked = requests("generate_until", *contexts)
    assert ours(4).generate_until(asked) == theirs.generate_until(asked)


def test_a_way_of_writing_that_we_lack_is_not_passed_over():
    asked = HarnessModel(create_model(), create_tokenizer())
    with pytest.raises(ValueError, match="ask for num_beams, which is not supported"):
        asked.generate_until(requests("generate_until", ("Once", {"num_beams": 4})))


TASKS = ["tales_last_word", "tales_ending", "tales_text"]  # in the shape of LAMBADA, HellaSwag and WikiText


def test_the_same_scores_as_the_harness(shipped_folder, tmp_path):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, tasks, limit = create_model(dtype=torch.float32), create_tokenizer(), TASKS[:2], {"limit": 12}
    found = evaluate(model, tokenizer, tasks, tmp_path, **limit)["results"]
    theirs = HFLM(pretrained=str(shipped_folder), device="cpu", dtype="float32", batch_size=8)
    loaded = harness.load_tasks(tasks)
    expected = harness.ask(theirs, loaded, bootstrap_iters=harness.RESAMPLES, log_samples=False, **limit)["results"]
    for task in tasks:
        for measure, score in expected[task].items():
            assert found[task][measure] == (pytest.approx(score, rel=1e-4) if isinstance(score, float) else score)


def test_the_stored_scores_are_those_of_a_run(tmp_path):
    """Notebook 12 shows them where the harness is not installed, and computes those of `tales_ending` itself."""
    stored, run = json.loads(STORED.read_text("utf-8"))["results"], TASKS[::2]
    found = evaluate(create_model(dtype=torch.float32), create_tokenizer(), run, tmp_path)["results"]
    for task in run:
        numbers = {name: score for name, score in stored[task].items() if isinstance(score, float)}
        assert {name: found[task][name] for name in numbers} == pytest.approx(numbers, rel=1e-3)


@pytest.fixture
def batches(monkeypatch):
    """The sizes of the batches that the model was given; `stop_after` so many, Ctrl-C."""
    real, sizes = harness.score_batch, []

    def counted(model, pairs):
        if len(sizes) == counted.stop_after:
            raise KeyboardInterrupt
        sizes.append(len(pairs))
        return real(model, pairs)

    counted.stop_after, counted.sizes = None, sizes
    monkeypatch.setattr(harness, "score_batch", counted)
    return counted


def test_a_run_that_was_stopped_goes_on_where_it_was(random_folder, tmp_path, batches):
    """Scores of 20B take hours: what was computed is kept."""
    model, tokenizer = load(random_folder, torch.float32), create_tokenizer(random_folder)

    def run(folder):
        return evaluate(model, tokenizer, ["tales_ending"], folder, batch_size=4, limit=5)["results"]["tales_ending"]

    batches.stop_after = 1 + 3  # the first is the probe
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "results.json").exists()
    batches.stop_after = None
    batches.sizes.clear()
    found = run(tmp_path / "stopped")
    assert batches.sizes == [1, 4, 4], "of 20 questions, 12 were answered"
    assert found == run(tmp_path / "whole")
    batches.sizes.clear()
    assert run(tmp_path / "stopped") == found and batches.sizes == [1]


def test_answers_of_another_model_are_not_taken_for_ones_own(random_folder, tmp_path):
    """Nor those of the same weights with another piece promoted."""
    model, tokenizer = load(random_folder, torch.float32), create_tokenizer(random_folder)
    evaluate(model, tokenizer, ["tales_last_word"], tmp_path, limit=1)
    model.layers[0].mlp.dense_h_to_4h.weight.data *= 1.1
    with pytest.raises(ValueError, match="keeps answers of another model"):
        evaluate(model, tokenizer, ["tales_last_word"], tmp_path, limit=1)


def test_the_questions_are_the_same_each_time_and_have_one_answer():
    for name in TEXTS:
        assert endings(name) == endings(name) and len(endings(name)) == len(last_words(name)) == 100
        assert all(len(set(each["choices"])) == 4 for each in endings(name))
        labels = [each["label"] for each in endings(name)]
        assert all(15 <= labels.count(place) <= 35 for place in range(4)), "no place is the right one more often"
        assert all(each["text"].rsplit(" ", 1)[1].isalpha() for each in last_words(name))


def test_the_command_prints_the_scores_and_says_where_they_are_kept(random_folder, tmp_path, capsys):
    argv = ["evaluate", "--tasks", "stories_ending", "--model", str(random_folder), "--limit", "2"]
    assert main([*argv, "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "acc_norm" in out.split("stories_ending", 2)[2] and out.splitlines()[-1] == f"kept in {tmp_path}"
    assert "acc,none" in json.loads((tmp_path / "results.json").read_text("utf-8"))["results"]["stories_ending"]


def test_a_task_of_ones_own_is_a_yaml_file(random_folder, tmp_path, capsys):
    task = tmp_path / "mine.yaml"
    text = (harness.TASKS / "stories_ending.yaml").read_text("utf-8")
    task.write_text(text.replace("task: stories_ending", "task: mine"), "utf-8")
    argv = ["evaluate", "--tasks", str(task), "--model", str(random_folder), "--limit", "1", "--output", str(tmp_path)]
    assert main(argv) == 0
    assert "\nmine  " in capsys.readouterr().out


def test_a_misspelt_task_is_told_apart(random_folder, tmp_path, capsys, monkeypatch):
    """All tasks of the harness take seconds to list: here they are ours."""
    real = harness.TaskManager
    monkeypatch.setattr(
        harness, "TaskManager", lambda include_path, **_: real(include_path=include_path, include_defaults=False)
    )
    argv = ["evaluate", "--tasks", "tales_endin", "--model", str(random_folder), "--output", str(tmp_path)]
    assert main(argv) == 2
    assert "no task 'tales_endin', and there is no such YAML file; near it: tales_ending" in capsys.readouterr().err


def test_without_lm_eval_the_command_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", "--tasks", "lambada_openai"]) == 2
    assert capsys.readouterr().err.endswith("install it: pip install lm-eval\n")
