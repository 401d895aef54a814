"""The checks of one student's notebooks: each answer is run with what it needs, then a cell of ours checks it.

Only the statements that an answer needs are run: 15 s per student, where whole notebooks take 180 s, and nothing else
in a notebook can hang or kill a check.
"""

import ast
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from neox_lib.classroom.asked import Exercise, needed, place_of
from neox_lib.classroom.handed_in import Student
from neox_lib.classroom.kernel import Gone, Kernel, Limits, error_in, started

REMARKED = 2**20  # bytes of output that are worth a remark
Outcome = tuple[str, str]  # a state, such as "solved", and words


@dataclass(frozen=True)
class Work:
    """One exercise, and the texts to run: what the answer needs from the original and the student's notebook, then it.

    `outcome` is set if there is nothing to run. Made before threads start: `ast` in Python 3.11 is not thread-safe.
    """

    stem: str
    exercise: Exercise
    needs: tuple[str, ...] = ()
    answer: str = ""
    outcome: Outcome | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.stem, self.exercise.name


def plan(stem: str, exercise: Exercise, texts: list[str], originals: list[str]) -> Work:
    """What to run of a student's notebook, given its code cells and the original's."""
    cell = place_of(exercise.name, texts, exercise.stub)
    if cell is not None:
        needs = ("\n".join(ast.unparse(each.node) for each in part) for part in needed(texts, cell, originals))
        return Work(stem, exercise, tuple(needs), texts[cell])
    broken = [text for text in texts if f" {exercise.name}(" in text]
    words = syntax_error(broken[-1]) if broken else ""
    missing = "missing", f"nothing in the notebook defines {exercise.name}"
    return Work(stem, exercise, outcome=("error", words) if words else missing)


def judge(student: Student, work: list[Work], limits: Limits) -> dict[tuple[str, str], Outcome]:
    """(notebook, exercise) -> outcome; adds remarks to the student; a kernel that is gone is replaced.

    Raises RuntimeError, with the reason, when the library itself can't be started: no student is to blame for that.
    """
    outcomes = {each.key: each.outcome for each in work if each.outcome}
    while left := [each for each in work if each.key not in outcomes]:
        with tempfile.TemporaryDirectory(prefix="handed-in-", ignore_cleanup_errors=True) as scratch:
            folder = Path(scratch, "work")
            folder.mkdir()
            for name, content in student.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            check_in_one_kernel(student, left, outcomes, folder, limits)
            gone = [name for name in sorted(student.files) if not (folder / name).is_file()]
            if gone:
                student.remark(f"deletes files in its folder, here a copy: {', '.join(gone[:3])}")
    return outcomes


def check_in_one_kernel(student: Student, work: list[Work], outcomes: dict, folder: Path, limits: Limits) -> None:
    """Check one exercise after another, until the kernel is gone."""
    modules = sorted({each.exercise.module for each in work})
    with started(folder, limits, NEOX_PROGRESS=str(folder.parent / "progress.json")) as kernel:
        try:
            ready = kernel.ours(f"prepare({str(folder)!r}, {limits.memory}, {modules}, names)")
        except Gone as gone:
            ready = {"error": gone.outcome[1]}
        if "error" in ready:
            raise RuntimeError(f"the checks can't be started: {ready['error']}")
        for each in work:
            try:
                outcomes[each.key] = outcome(student, kernel, each, ready)
            except Gone as gone:
                outcomes[each.key] = gone.outcome
                break
        if kernel.printed > REMARKED:
            student.remark("prints more than 1 MiB")


def outcome(student: Student, kernel: Kernel, work: Work, ready: dict) -> Outcome:
    """State and words: "solved", "not yet" with the first wrong property, "not written", "missing" or "error".

    Raises Gone when the kernel can't be used afterwards, as when an answer changes the judges.
    """
    exercise = work.exercise
    kernel.deadline = time.monotonic() + kernel.limits.seconds
    kernel.ours(f"forget(names, {ready['names']})")
    for text in work.needs:
        trouble = error_in(kernel.run(text))
        if trouble:
            return "error", f"code that it needs fails: {trouble}"
    trouble = error_in(kernel.run(work.answer))  # perhaps from the student's own test, below a right definition
    found = kernel.ours(f"check(names, {exercise.name!r}, {exercise.module!r}, {exercise.check!r})")
    if "error" in found:
        return "error", found["error"]
    if found["state"] == "absent":
        return "error", trouble
    for state in found["judges"]:
        changed = next((name for name, value in ready["judges"].items() if state.get(name) != value), None)
        if changed:
            raise Gone("tampered", f"changes {changed} while it is checked")
    if found["borrowed"]:
        student.remark(f"the library's own object: {exercise.name}")
    if found["state"] == "solved" and trouble:
        return "solved", f"its cell then fails: {trouble}"
    return found["state"], found["words"]


def syntax_error(text: str) -> str:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
