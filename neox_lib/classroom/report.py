"""The report on a class: who solved what, the first property that is still wrong, and the predictions."""

import csv
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from neox_lib.classroom.asked import exercises_of, sources, without_comments
from neox_lib.classroom.handed_in import Student, read_class
from neox_lib.classroom.kernel import Limits
from neox_lib.classroom.run_checks import Work, judge, plan
from neox_lib.course.learner_copy import NOTEBOOKS
from neox_lib.course.predictions import QUESTIONS, questions

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
    """One student: a sheet per notebook handed in, and remarks."""

    student: str
    sheets: dict[str, Sheet]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """The class. `series` maps each notebook with exercises to the names that they ask for."""

    lines: tuple[Line, ...]
    series: dict[str, tuple[str, ...]]

    def table(self) -> str:
        """A row per student: solved of asked, per notebook that anybody handed in and in total; predictions."""
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
        """A line for each attempt that is not solved, and for each remark."""
        found = []
        for line in self.lines:
            for sheet in line.sheets.values():
                for name, (state, words) in sheet.outcomes.items():
                    if words or state not in ("solved", "not written"):
                        found.append(f"{line.student}, {sheet.notebook[:2]} {name}: {state}. {words}")
            found += [f"{line.student}: {remark}" for remark in line.remarks]
        return "\n".join(map(printable, found))

    def write_csv(self, path: Path) -> None:
        """A row per student and exercise, in UTF-8 with the byte order mark that spreadsheets expect."""
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
    """A text without characters that control a terminal."""
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
    return sum(chosen[each.key] == each.right_key for each in answered), len(answered)


def alike(answers: dict[str, dict[str, str]], references: dict[str, str]) -> dict[str, list[str]]:
    """Remarks on answers equal to the reference or another student's, comments aside: student -> remarks.

    `answers` maps student -> exercise -> text. Short answers are left out: they are alike by chance.
    """
    found: dict[str, list[str]] = {}
    plain = {
        who: {name: without_comments(text, name) for name, text in texts.items()}
        for who, texts in {"the reference": references, **answers}.items()
    }
    for student in answers:
        same: dict[str, list[str]] = {}
        for name, text in plain[student].items():
            others = [other for other in plain if other != student and text and plain[other].get(name) == text]
            for other in others[:1] if "the reference" in others else others:
                same.setdefault(other, []).append(name)
        found[student] = [f"same as {other}: {', '.join(names)}" for other, names in same.items()]
    return found


def planned(student: Student, files: dict[str, str], notebooks: dict, exercises: dict) -> Iterator[Work]:
    """What to check of a student's work; `files` maps a notebook's stem to the student's file."""
    for stem, file in files.items():
        try:
            texts = sources(json.loads(student.files[file]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            words = f"{file} can't be read as a notebook ({type(error).__name__})"
            yield from (Work(stem, each, outcome=("unreadable", words)) for each in exercises[stem])
        else:
            yield from (plan(stem, each, texts, sources(notebooks[stem])) for each in exercises[stem])


def class_report(
    folder: Path, limits: Limits | None = None, jobs: int | None = None, originals: Path = NOTEBOOKS
) -> Report:
    """Check everything that a class has handed in. Nothing in `folder` is changed; the checks use copies.

    Raises ValueError when there is nothing to check.
    """
    limits, notebooks = limits or Limits(), series_of(originals)
    exercises = {stem: exercises_of(notebook) for stem, notebook in notebooks.items()}
    series = {stem: tuple(each.name for each in asked) for stem, asked in exercises.items()}
    students = list(read_class(folder, list(series)))

    files = {each.name: each.notebooks({stem: set(names) for stem, names in series.items()}) for each in students}
    work = {each.name: list(planned(each, files[each.name], notebooks, exercises)) for each in students}
    with ThreadPoolExecutor(jobs or min(4, os.cpu_count() or 1)) as pool:
        judged = pool.map(lambda student: judge(student, work[student.name], limits), students)
        checked = tqdm(judged, total=len(students), desc="Checking", unit="student", disable=None)
        outcomes = {student.name: each for student, each in zip(students, checked, strict=True)}
    references = {each.name: each.reference for asked in exercises.values() for each in asked}
    solved = {
        who: {
            each.exercise.name: each.answer for each in work[who] if found[each.stem, each.exercise.name][0] == "solved"
        }
        for who, found in outcomes.items()
    }
    remarks, lines = alike(solved, references), []
    for student in students:
        found = outcomes[student.name]
        sheets = {
            stem: Sheet(stem, {name: found[stem, name] for name in series[stem]}, predictions_of(student, stem))
            for stem in sorted(files[student.name])
        }
        nothing = [] if sheets else ["no notebook of the series was handed in"]
        lines.append(Line(student.name, sheets, (*student.remarks, *remarks[student.name], *nothing)))
    return Report(tuple(lines), series)
