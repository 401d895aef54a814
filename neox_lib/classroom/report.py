"""The report on a class: who solved what, the first property that is still wrong, and how many bets were right."""

import csv
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from neox_lib.classroom.asked import exercises_of
from neox_lib.classroom.handed_in import Student, read_class
from neox_lib.classroom.watch import Limits, Task, judge
from neox_lib.course.learner_copy import NOTEBOOKS
from neox_lib.course.predictions import QUESTIONS, letter, questions

COLUMNS = ("student", "notebook", "exercise", "result", "first wrong property", "predictions right", "of", "remarks")


@dataclass(frozen=True)
class Sheet:
    """One student's notebook: the outcome of each exercise, name -> (state, words), and the bets, (right, asked)."""

    notebook: str
    outcomes: dict[str, tuple[str, str]]
    bets: tuple[int, int] | None  # None without a progress file

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
        """A row for each student: solved of asked in each notebook that somebody handed in, all of them, the bets."""
        shown = [stem for stem in self.series if any(stem in line.sheets for line in self.lines)]
        rows = [("student", *(stem[:2] for stem in shown), "solved", "bets right")]
        for line in self.lines:
            counts = [
                f"{line.sheets[stem].solved}/{len(self.series[stem])}" if stem in line.sheets else "-" for stem in shown
            ]
            there_are = sum(len(self.series[stem]) for stem in shown)
            total = f"{sum(each.solved for each in line.sheets.values())}/{there_are}"
            bets = [each.bets for each in line.sheets.values() if each.bets]
            right, asked = sum(each[0] for each in bets), sum(each[1] for each in bets)
            rows.append((printable(line.student), *counts, total, f"{right}/{asked}" if bets else "-"))
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
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for line in self.lines:
                for stem, names in self.series.items():
                    sheet = line.sheets.get(stem)
                    right, asked = (sheet.bets if sheet else None) or ("", "")
                    for name in names:
                        state, words = sheet.outcomes[name] if sheet else ("not handed in", "")
                        row = (line.student, stem, name, state, words, right, asked, "; ".join(line.remarks))
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


def series_of(originals: Path) -> dict[str, tuple[str, ...]]:
    """The notebooks of a folder that have exercises, and what those ask for."""
    paths = sorted(path for path in originals.glob("[0-9][0-9]_*.ipynb") if ".new" not in path.name)
    found = {path.stem: exercises_of(json.loads(path.read_text("utf-8"))) for path in paths}
    return {stem: tuple(each.name for each in exercises) for stem, exercises in found.items() if exercises}


def bets_of(student: Student, stem: str) -> tuple[int, int] | None:
    """How many of a notebook's predictions a student got right, and how many there are."""
    chosen = student.predictions()
    if chosen is None or not (QUESTIONS / f"{stem}.toml").is_file():
        return None
    asked = questions(stem).values()
    return sum(chosen.get(each.key) == letter(each.answer) for each in asked), len(asked)


def class_report(
    folder: Path, limits: Limits | None = None, jobs: int | None = None, originals: Path = NOTEBOOKS
) -> Report:
    """Check everything that a class has handed in. Nothing in `folder` is changed; the work is done in copies.

    Raises ValueError when there is nothing to check.
    """
    limits, series = limits or Limits(), series_of(originals)
    students = list(read_class(folder, list(series)))

    def check(student: Student) -> Line:
        found = student.notebooks({stem: set(names) for stem, names in series.items()})
        tasks = [Task(stem, found[stem], series[stem]) for stem in series if stem in found]
        verdict = judge(student, tasks, originals, limits)
        sheets = {
            task.stem: Sheet(
                task.stem,
                {name: verdict.outcomes[task.stem, name] for name in task.names},
                bets_of(student, task.stem),
            )
            for task in tasks
        }
        nothing = [] if tasks else ["no notebook of the series was handed in"]
        return Line(student.name, sheets, tuple(dict.fromkeys([*student.remarks, *verdict.remarks, *nothing])))

    with ThreadPoolExecutor(jobs or min(4, os.cpu_count() or 1)) as pool:
        lines = tqdm(pool.map(check, students), total=len(students), desc="Checking", unit="student", disable=None)
        return Report(tuple(lines), series)
