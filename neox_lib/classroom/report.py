"""The report on a class: who solved what, the first property that is still wrong, and the predictions."""

import csv
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from neox_lib.classroom.asked import exercises_of, sources, without_comments
from neox_lib.classroom.handed_in import Student, read_class
from neox_lib.classroom.kernel import Limits
from neox_lib.classroom.run_checks import Work, judge
from neox_lib.course.learner_copy import NOTEBOOKS
from neox_lib.course.predictions import QUESTIONS, letter, questions

COLUMNS = (
    "student",
    "notebook",
    "exercise",
    "result",
    "first wrong property",
    "predictions right",
    "answered",
    "remarks",
)


@dataclass(frozen=True)
class Sheet:
    """One student's notebook: the outcome of each exercise, name -> (state, words); predictions, (right, answered)."""

    notebook: str
    outcomes: dict[str, tuple[str, str]]
    predictions: tuple[int, int] | None  # None without a progress file

    @property
    def solved(self) -> int:
        return sum(state == "solved" for state, _ in self.outcomes.values())


@dataclass(frozen=True)
class Line:
    """All of one student: a sheet for each notebook that was handed in, and remarks."""

    student: str
    sheets: dict[str, Sheet]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """The class. `series` maps each notebook with exercises to the names that they ask for."""

    lines: tuple[Line, ...]
    series: dict[str, tuple[str, ...]]

    def table(self) -> str:
        """A row for each student: solved of asked in each notebook that somebody handed in and in all; predictions."""
        shown = [stem for stem in self.series if any(stem in line.sheets for line in self.lines)]
        rows = [("student", *(stem[:2] for stem in shown), "solved", "predictions")]
        for line in self.lines:
            counts = [
                f"{line.sheets[stem].solved}/{len(self.series[stem])}" if stem in line.sheets else "-" for stem in shown
            ]
            there_are = sum(len(self.series[stem]) for stem in shown)
            total = f"{sum(each.solved for each in line.sheets.values())}/{there_are}"
            predictions = [each.predictions for each in line.sheets.values() if each.predictions]
            right, answered = sum(each[0] for each in predictions), sum(each[1] for each in predictions)
            rows.append((printable(line.student), *counts, total, f"{right}/{answered}" if predictions else "-"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        padded = ("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in padded)

    def details(self) -> str:
        """What is not solved and not a mere stub, and every remark: a line each."""
        found = []
        for line in self.lines:
            for sheet in line.sheets.values():
                for name, (state, words) in sheet.outcomes.items():
                    if words or state not in ("solved", "not written"):
                        found.append(f"{line.student}, {sheet.notebook[:2]} {name}: {state}. {words}")
            found += [f"{line.student}: {remark}" for remark in line.remarks]
        return "\n".join(map(printable, found))

    def write_csv(self, path: Path) -> None:
        """A row for each student and exercise, in UTF-8 with the mark that a spreadsheet looks for."""
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for line in self.lines:
                for stem, names in self.series.items():
                    sheet = line.sheets.get(stem)
                    right, answered = (sheet.predictions if sheet else None) or ("", "")
                    for name in names:
                        state, words = sheet.outcomes[name] if sheet else ("not handed in", "")
                        row = (line.student, stem, name, state, words, right, answered, "; ".join(line.remarks))
                        writer.writerow([harmless(str(each)) for each in row])


def printable(text: str) -> str:
    """A text without the signs that move a terminal's cursor or colour it."""
    return "".join(sign if sign.isprintable() or sign == " " else "�" for sign in text)


def harmless(text: str) -> str:
    """A cell's text that no spreadsheet takes for a formula.

    >>> harmless("=1+1"), harmless("my_decode")
    ("'=1+1", 'my_decode')
    """
    text = printable(text)
    return "'" + text if text.startswith(("=", "+", "-", "@")) else text


def series_of(originals: Path) -> dict[str, dict]:
    """The notebooks of a folder that have exercises: stem -> the notebook as JSON."""
    paths = sorted(path for path in originals.glob("[0-9][0-9]_*.ipynb") if ".new" not in path.name)
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in paths}
    return {stem: notebook for stem, notebook in found.items() if exercises_of(notebook)}


def predictions_of(student: Student, stem: str) -> tuple[int, int] | None:
    """How many of a notebook's predictions a student got right, and how many were answered."""
    chosen = student.predictions()
    if chosen is None or not (QUESTIONS / f"{stem}.toml").is_file():
        return None
    answered = [each for each in questions(stem).values() if each.key in chosen]
    return sum(chosen[each.key] == letter(each.answer) for each in answered), len(answered)


def alike(answers: dict[str, dict[str, str]], references: dict[str, str]) -> dict[str, list[str]]:
    """Remarks on answers that are the reference or another student's, but for comments: student -> remarks.

    `answers` maps student -> exercise -> text. Short answers are left out: they are alike by chance.
    """
    found: dict[str, list[str]] = {}
    for student, texts in answers.items():
        same: dict[str, list[str]] = {}
        for name, text in texts.items():
            own = without_comments(text, name)
            others = {"the reference": references[name]} if name in references else {}
            others |= {other: theirs[name] for other, theirs in answers.items() if other != student and name in theirs}
            whose = [other for other, theirs in others.items() if own and own == without_comments(theirs, name)]
            for other in whose[:1] if whose[:1] == ["the reference"] else whose:
                same.setdefault(other, []).append(name)
        found[student] = [f"same as {other}: {', '.join(names)}" for other, names in same.items()]
    return found


def class_report(
    folder: Path, limits: Limits | None = None, jobs: int | None = None, originals: Path = NOTEBOOKS
) -> Report:
    """Check everything that a class has handed in. Nothing in `folder` is changed; the work is done in copies.

    Raises ValueError when there is nothing to check.
    """
    limits, notebooks = limits or Limits(), series_of(originals)
    exercises = {stem: exercises_of(notebook) for stem, notebook in notebooks.items()}
    series = {stem: tuple(each.name for each in asked) for stem, asked in exercises.items()}
    students = list(read_class(folder, list(series)))

    def check(student: Student) -> tuple[dict[str, Sheet], dict[str, str]]:
        files = student.notebooks({stem: set(names) for stem, names in series.items()})
        outcomes, work = {}, []
        for stem, file in sorted(files.items()):
            try:
                texts = sources(json.loads(student.files[file]))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                words = f"{file} is no notebook that can be read ({type(error).__name__})"
                outcomes |= {(stem, name): ("unreadable", words) for name in series[stem]}
            else:
                given = sources(notebooks[stem])
                work += [Work(stem, each, texts, given) for each in exercises[stem]]
        outcomes |= judge(student, work, limits)
        sheets = {
            stem: Sheet(stem, {name: outcomes[stem, name] for name in series[stem]}, predictions_of(student, stem))
            for stem in sorted(files)
        }
        solved = [each for each in work if outcomes[each.stem, each.exercise.name][0] == "solved"]
        if not files:
            student.remark("no notebook of the series was handed in")
        return sheets, {each.exercise.name: each.answer for each in solved}

    with ThreadPoolExecutor(jobs or min(4, os.cpu_count() or 1)) as pool:
        checked = tqdm(pool.map(check, students), total=len(students), desc="Checking", unit="student", disable=None)
        found = {student.name: each for student, each in zip(students, checked, strict=True)}
    references = {each.name: each.reference for asked in exercises.values() for each in asked}
    remarks = alike({name: answers for name, (_, answers) in found.items()}, references)
    lines = [Line(each.name, found[each.name][0], (*each.remarks, *remarks[each.name])) for each in students]
    return Report(tuple(lines), series)
