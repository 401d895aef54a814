"""A notebook's own code for tests: its names, its solutions and its bug exhibits, run outside a kernel."""

import ast
import functools
import os
import re
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def defines(source: str, name: str) -> bool:
    return any(getattr(node, "name", None) == name for node in ast.parse(source).body)


class Lesson:
    """One notebook; `names` are what its imports, definitions and promoted cells bind (not its stubs)."""

    def __init__(self, stem: str):
        self.cells = nbformat.read(NOTEBOOKS / f"{stem}.ipynb", as_version=4).cells

    @functools.cached_property
    def names(self) -> dict:
        """Every name that its code cells bind, after running them in order. Stubs are what they are: stubs."""
        names: dict = {"__name__": "lesson"}
        before = Path.cwd()
        os.chdir(NOTEBOOKS)
        try:
            for cell in self.cells:
                if cell.cell_type == "code":
                    exec(compile(cell.source, "lesson", "exec"), names)
        finally:
            os.chdir(before)
        return names

    def stub(self, name: str):
        return self.names[name]

    def solution(self, name: str):
        """What the folded solution of the exercise `name` defines, in the notebook's own surroundings."""
        cells = self.cells
        (index,) = [
            index
            for index, cell in enumerate(cells)
            if "exercise" in cell.metadata.get("tags", []) and defines(cell.source, name)
        ]
        folded = cells[index + 2].source
        (text,) = re.findall(r"```python\n(.*?)```", folded[folded.index("<summary>Solution</summary>") :], re.DOTALL)
        names = dict(self.names)
        exec(compile(text, "solution", "exec"), names)
        return names[name]

    def exhibits(self) -> list[str]:
        """The sources of the bug exhibits, in order."""
        return [cell.source for cell in self.cells if "museum" in cell.metadata.get("tags", [])]

    def stub_is_told(self, check, name: str) -> None:
        """The first run of every learner: it must not look like an error of theirs."""
        result = check(self.stub(name))
        assert not result.passed
        assert result.message == f"Not written yet: {name} is still a stub."

    def solution_passes(self, check, name: str, story: bool) -> None:
        """A solution that fails its own check would leave a stuck learner with nothing; the heart ends with a story."""
        result = check(self.solution(name))
        assert result.passed, result.message
        assert ("Once upon a time" in result.message) == story, "the heart, and nothing else, ends with a story"
