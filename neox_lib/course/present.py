"""A notebook as live slides in the browser.

JupyterLab's RISE shows them, at /rise/NAME.ipynb; `FILES` holds what it lacks for widgets.
"""

import os
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


def show(notebook: Path, arguments: list[str]) -> None:
    """Serve a notebook's slides and open them in the browser, until it is interrupted.

    `arguments` go to JupyterLab; it listens on 127.0.0.1 unless one of them says otherwise.
    """
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(FILES), os.environ.get("JUPYTER_PATH")]))
    from jupyterlab.labapp import LabApp  # imported here, because it reads its paths on import

    place = [f"--ServerApp.root_dir={notebook.parent}", f"--LabApp.default_url=/rise/{notebook.name}"]
    LabApp.launch_instance([*place, "--ServerApp.ip=127.0.0.1", *arguments])
