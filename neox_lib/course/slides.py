"""The notebooks as slides: each cell's `slide_type` in its metadata says on which slide it stands.

An author sets it in JupyterLab (Property Inspector, *Slide Type*) and looks at the slide, on a page of 1280 x 720:
`tests/test_slides_browser.py` finds what is cut off. `store-outputs` gives a new cell the type that `slide_type` says.
"""

import re

SECTION = re.compile(r"^##? ", re.MULTILINE)

# A page as notebooks/rise.css expects it, scaled to the screen; this theme is the one that asks nobody for fonts
SHOW = {
    "theme": "white",
    "transition": "none",
    "width": 1280,
    "height": 720,
    "margin": 0,
    "minScale": 0.2,
    "center": False,
    "slideNumber": "c/t",
    "start_slideshow_at": "selected",  # where the page's address says; without it, at the beginning
}


def slide_type(cell) -> str:
    """Of a cell that has none yet: a section begins a slide, all else gets one below it; solutions are left out."""
    if "<summary>Solution</summary>" in cell.source or "solution" in cell.metadata.get("tags", []):
        return "skip"
    return "slide" if cell.cell_type == "markdown" and SECTION.search(cell.source) else "subslide"


def mark_new_cells(notebook) -> None:
    """Give each cell that has none a slide type, and the notebook the look of the show."""
    for cell in notebook.cells:
        cell.metadata.setdefault("slideshow", {"slide_type": slide_type(cell)})
    notebook.metadata["rise"] = dict(SHOW)
