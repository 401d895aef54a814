"""Questions before surprising results: one right option, a reason for each, and no trace but the choice."""

import tomllib
from collections import Counter

import pytest

from neox_lib.course import predictions
from neox_lib.course.predictions import QUESTIONS, Prediction, letter, plain, predict, questions
from neox_lib.course.progress import read_progress, record

CHAPTERS = sorted(path.stem for path in QUESTIONS.glob("*.toml"))
ALL = [(chapter, name) for chapter in CHAPTERS for name in questions(chapter)]
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def question() -> Prediction:
    options = (("two &lt; three", "Two is less indeed."), ("three", "Three is not less than three."), ("four", "No."))
    return Prediction("made_up.less", "What is less than <code>3</code>?", options, 0, ("C", "A", "B"))


# The questions of the series


def test_there_are_questions():
    assert "00_start_here" in CHAPTERS


@pytest.mark.parametrize(("chapter", "name"), ALL)
def test_a_question_explains_each_option(chapter, name):
    """An option without an explanation leaves those who chose it with nothing but a verdict."""
    entry = tomllib.loads((QUESTIONS / f"{chapter}.toml").read_text("utf-8"))[name]
    assert set(entry) == {"question", "options"}
    assert all(set(option) <= {"text", "why", "right"} for option in entry["options"])
    assert 2 <= len(entry["options"]) <= 6
    assert len({option["text"] for option in entry["options"]}) == len(entry["options"])
    for option in entry["options"]:
        assert len(option["why"]) >= 40, option["text"]


@pytest.mark.parametrize(("chapter", "name"), ALL)
def test_a_question_has_exactly_one_right_option(chapter, name):
    entry = tomllib.loads((QUESTIONS / f"{chapter}.toml").read_text("utf-8"))[name]
    assert sum(option.get("right", False) for option in entry["options"]) == 1


def test_the_right_option_stands_at_each_letter_about_equally_often():
    """Whoever has noticed that it is mostly B predicts nothing any more. If a new question fails this, change SEED in
    predictions.py, show the new order (`store-outputs`), and mend the letters in TEACHING.md.
    """
    for options in (3, 4):
        answers = [
            each.answer for name in CHAPTERS for each in questions(name).values() if len(each.options) == options
        ]
        times = Counter(answers)
        assert max(times[place] for place in range(options)) - min(times[place] for place in range(options)) <= 2
    assert all(len({each.answer for each in questions(name).values()}) > 1 for name in CHAPTERS)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_an_options_key_is_its_place_in_the_file(chapter):
    """An old answer keeps its meaning: what is recorded must not depend on the order in which options are shown."""
    data = tomllib.loads((QUESTIONS / f"{chapter}.toml").read_text("utf-8"))
    for name, question in questions(chapter).items():
        texts = {letter(place): option["text"] for place, option in enumerate(data[name]["options"])}
        assert dict(zip(question.keys, (text for text, _ in question.options), strict=True)) == texts
        assert data[name]["options"][ord(question.right_key) - ord("A")]["right"]


@pytest.mark.parametrize(("chapter", "name"), ALL)
def test_the_options_of_a_question_are_of_like_length(chapter, name):
    """The longest, most careful option is right more often than not, and a bare one stands out."""
    lengths = [len(plain(text)) for text, _ in questions(chapter)[name].options]
    assert max(lengths) <= max(1.8 * min(lengths), min(lengths) + 16), lengths


def test_the_longest_option_is_right_about_as_often_as_any():
    longest = [
        max(range(len(each.options)), key=lambda n: len(plain(each.options[n][0]))) == each.answer
        for each in (questions(chapter)[name] for chapter, name in ALL)
    ]
    assert len(longest) / 5 <= sum(longest) <= len(longest) / 2


@pytest.mark.parametrize("rights", [0, 2])
def test_a_question_without_exactly_one_right_option_is_refused_by_name(tmp_path, monkeypatch, rights):
    option = '[[odd.options]]\ntext = "{0}"\nwhy = "because"\nright = {1}\n'
    lines = [option.format(number, str(number < rights).lower()) for number in range(3)]
    (tmp_path / "09_new.toml").write_text('[odd]\nquestion = "?"\n' + "".join(lines))
    monkeypatch.setattr(predictions, "QUESTIONS", tmp_path)
    with pytest.raises(ValueError, match=r"questions/09_new.toml: odd .* exactly one that is right"):
        questions.__wrapped__("09_new")


def test_a_question_that_does_not_exist_is_an_error_that_names_those_that_do():
    with pytest.raises(KeyError, match=r"00_start_here has no question passing; it has .*passes"):
        predict("00_start_here", "passing")


# What a choice does


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_choice_is_kept_and_explained_and_then_every_other_option_is_too(question, number):
    said = question.choose(number)
    assert read_progress()["predictions"] == {"made_up.less": "CAB"[number]}
    assert said.startswith("<p><b>Right.</b>" if number == 0 else "<p><b>Not so.</b>")
    own, rest = said.split("</p>", 1)
    assert question.options[number][1] in own
    assert all(why in rest for other, (_, why) in enumerate(question.options) if other != number)
    assert question.options[number][1] not in rest


def test_a_click_on_an_option_shows_what_is_said_about_it(question):
    _, radio, shown = question.widget().children
    assert [label for label, _ in radio.options] == ["A. two < three", "B. three", "C. four"]
    assert shown.value == "" and radio.index is None
    radio.value = 1
    assert "Three is not less than three." in shown.value
    assert read_progress()["predictions"]["made_up.less"] == "A", "the key of the second option shown"


def test_the_label_of_a_button_shows_words_and_no_tags():
    """A label is shown as it is: <code> in it would stand there in letters."""
    question = Prediction(
        "made_up.less", "?", (("only <code>a</code> &lt; b", "Yes."), ("b <i>c</i>", "No.")), 0, ("A", "B")
    )
    _, radio, _ = question.widget().children
    assert [label for label, _ in radio.options] == ["A. only a < b", "B. b c"]


def test_an_earlier_choice_is_shown_again(question):
    question.choose(2)
    _, radio, shown = question.widget().children
    assert radio.value == 2 and "No." in shown.value


@pytest.mark.parametrize("earlier", ["Z", "", "AB", "@"])
def test_an_earlier_choice_that_is_no_option_any_more_counts_as_none(question, earlier):
    """Questions change between versions, and files are edited by hand."""
    record("predictions", "made_up.less", earlier)
    _, radio, _ = question.widget().children
    assert radio.index is None


# Where it is shown


def test_one_output_holds_the_buttons_and_a_form_that_reads_anywhere(question):
    bundle = question._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", WIDGET_VIEW}
    assert bundle["text/html"].count("<details>") == 3 and "Two is less indeed." in bundle["text/html"]
    assert bundle["text/plain"].splitlines()[1:] == ["A. two &lt; three", "B. three", "C. four"]


def test_the_form_without_a_kernel_does_not_depend_on_what_was_chosen(question):
    """It is stored and compared; an author's choice must not get into it."""
    before = question._repr_mimebundle_()
    question.choose(1)
    after = question._repr_mimebundle_()
    assert all(before[kind] == after[kind] for kind in ("text/html", "text/plain"))


def test_the_text_form_does_not_give_the_answer_away(question):
    assert not any(why in question._repr_mimebundle_()["text/plain"] for _, why in question.options)
