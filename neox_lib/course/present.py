"""A notebook as live slides in the browser.

JupyterLab's RISE shows them, at /rise/NAME.ipynb; `FILES` holds what it lacks for widgets.
"""

import json
import os
import re
from pathlib import Path

FILES = Path(__file__).parents[1] / "assets" / "slides"


def find_notebook(beginning: str, folder: Path) -> Path:
    """The only notebook of a folder whose name begins with `beginning`. Raises FileNotFoundError naming those there
    are.
    """
    names = sorted(path.name for path in folder.glob("[0-9][0-9]_*.ipynb") if ".new" not in path.name)
    fitting = [name for name in names if name.startswith(beginning)]
    if beginning and len(fitting) == 1:
        return folder / fitting[0]
    raise FileNotFoundError(
        f"{beginning or 'no name'}: say which notebook, by the beginning of its name: {', '.join(names)}"
    )


def find_lesson(number: int, folder: Path, plan: Path) -> tuple[Path, int]:
    """The notebook of a lesson, and the cell that its first section begins with; the first on a notebook begins at 0.

    `plan` is the text of TEACHING.md. Raises ValueError for a lesson that it doesn't have.
    """
    lessons = re.split(r"^## Lesson \d+\..*$", plan.read_text("utf-8"), flags=re.MULTILINE)[1:]
    starts = [re.findall(r"\((\w+)\.ipynb#([^)]+)\)", lesson)[0] for lesson in lessons]
    if not 1 <= number <= len(starts):
        raise ValueError(f"no lesson {number}: {plan.name} has 1 to {len(starts)}")
    stem, section = starts[number - 1]
    notebook = find_notebook(stem, folder)
    if number == 1 or starts[number - 2][0] != stem:
        return notebook, 0
    for index, cell in enumerate(json.loads(notebook.read_text("utf-8"))["cells"]):
        headings = re.findall(r"^#+ +(.+?) *$", "".join(cell["source"]), re.MULTILINE)
        if cell["cell_type"] == "markdown" and section in [each.replace(" ", "-") for each in headings]:
            return notebook, index
    return notebook, 0  # a copy in which the section has another name


def show(notebook: Path, cell: int, arguments: list[str]) -> None:
    """Serve a notebook's slides and open the one of a cell in the browser, until it is interrupted.

    `arguments` go to JupyterLab; it listens on 127.0.0.1 unless one of them says otherwise.
    """
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(FILES), os.environ.get("JUPYTER_PATH")]))
    from jupyterlab.labapp import LabApp  # imported here, because it reads its paths on import

    place = [
        f"--ServerApp.root_dir={notebook.parent}",
        f"--LabApp.default_url=/rise/{notebook.name}?activeCellIndex={cell}",
    ]
    LabApp.launch_instance([*place, "--ServerApp.ip=127.0.0.1", *arguments])
