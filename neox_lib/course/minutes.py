"""How long a notebook takes one person, computed from the notebook, and written to the pages that say it.

Words are read at 200 per minute and a line of code takes 4 seconds; an exercise takes what its stub says ("# about 10
minutes"). Folds (hints, solutions, answers) and the sections that are looked up, Glossary and Sources, are left out.
"""

import re
from pathlib import Path

import nbformat

from neox_lib.checkpoints.atomic import write_bytes_atomically

WORDS_PER_MINUTE = 200
SECONDS_PER_LINE = 4
LOOKED_UP = ("## Glossary", "## Sources")
STATED = re.compile(r"^# about (\d+) minutes$", re.MULTILINE)
PAGES = {  # where minutes are said, relative to the repository: the pattern of the line, the number between two groups
    "notebooks/{stem}.ipynb": r"(^About )\d+( minutes)",
    "notebooks/00_start_here.ipynb": r"(^\| \[{number} .*\| )\d+( \|$)",
    "README.md": r"(^\| \[{number} .*\| )\d+( \|$)",
    "notebooks/TEACHING.md": r"(^\| \[{number} [^|]*\| )\d+( \|)",
}


def words_in(markdown: str) -> int:
    """The words that are read: without folds, addresses and tags.

    >>> words_in("See [the map](a.ipynb). <details>Long, folded</details>")
    3
    """
    text = re.sub(r"<details.*?</details>", "", markdown, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)|<[^>]+>", " ", text)
    return len(re.findall(r"\w\S*", text))


def minutes_of(notebook: nbformat.NotebookNode) -> int:
    """Minutes to read, run and solve, to the nearest five. Raises ValueError for an exercise without its time."""
    minutes, looked_up = 0.0, False
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown":
            if re.match("## ", cell.source):
                looked_up = cell.source.startswith(LOOKED_UP)
            minutes += 0 if looked_up else words_in(cell.source) / WORDS_PER_MINUTE
        elif "exercise" in tags:
            stated = STATED.search(cell.source)
            if stated is None:
                raise ValueError(f"cell {cell.id}: an exercise's stub begins with a line such as '# about 10 minutes'")
            minutes += int(stated[1])
        elif "predict" in tags:  # the question and its options are in the output
            shown = " ".join(output.get("data", {}).get("text/plain", "") for output in cell.outputs)
            minutes += words_in(shown) / WORDS_PER_MINUTE
        else:
            minutes += sum(bool(line.strip()) for line in cell.source.splitlines()) * SECONDS_PER_LINE / 60
    return 5 * round(minutes / 5)


def with_minutes(text: str, pattern: str, minutes: int) -> str:
    return re.sub(pattern, rf"\g<1>{minutes}\g<2>", text, flags=re.MULTILINE)


def write_minutes(path: Path) -> None:
    """Write a notebook's minutes to every page of the repository that says them."""
    minutes = minutes_of(nbformat.read(path, as_version=4))
    for name, pattern in PAGES.items():
        page = path.parents[1] / name.format(stem=path.stem)
        pattern = pattern.format(number=path.stem[:2])
        if page.suffix == ".ipynb":
            notebook = nbformat.read(page, as_version=4)
            for cell in notebook.cells:
                if cell.cell_type == "markdown":
                    cell.source = with_minutes(cell.source, pattern, minutes)
            text = nbformat.writes(notebook).rstrip("\n") + "\n"
        else:
            text = with_minutes(page.read_text("utf-8"), pattern, minutes)
        write_bytes_atomically(page, text.encode("utf-8"))
