"""Run notebooks and keep their outputs, in a form that does not change when nothing has: for authors.

No timings, and no live widgets: those need the kernel that made them. What a widget displays without one is kept.
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

from neox_lib.checkpoints.atomic import write_bytes_atomically
from neox_lib.course.slides import mark_new_cells

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def without_live_widgets(notebook: nbformat.NotebookNode) -> None:
    """Remove widget views from outputs that have another form, and the widgets' state from the metadata."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if len(output.get("data", {})) > 1:
                output.data.pop(WIDGET_VIEW, None)


def run_and_store(path: Path, timeout: int = 120) -> None:
    """Execute a notebook in its own folder and write it back with its outputs.

    An error in a cell raises nbclient's CellExecutionError and leaves the file as it was.
    """
    notebook = nbformat.read(path, as_version=4)
    runner = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,  # a streamed story is one output, not one per token
        resources={"metadata": {"path": str(path.parent)}},
    )
    runner.execute()
    without_live_widgets(notebook)
    notebook.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata.language_info = {"name": "python"}
    mark_new_cells(notebook)
    write_bytes_atomically(path, (nbformat.writes(notebook).rstrip("\n") + "\n").encode("utf-8"))
