"""A Sphinx extension for `make site`: what MyST lacks for these notebooks."""

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.transforms import Transform
from latex2mathml.converter import convert
from sphinx.errors import ExtensionError

TEACHERS_PAGE = "# Teaching from these notebooks\n\nThe plan for a teacher comes with the repository."
ANCHOR = re.compile(r'<a id="([\w-]+)">')


class NotebookAnchors(Transform):
    """Lets links find two kinds of anchors that MyST ignores: `<a id="token"></a>`, and JupyterLab's own for a heading,
    which keeps its capital letters and signs, as in `#What-is-a-token?`.
    """

    default_priority = 840  # before MyST resolves the page's own links, at priority 879

    def apply(self, **_: Any) -> None:
        slugs = getattr(self.document, "myst_slugs", {})
        for line, anchor, title in list(slugs.values()):
            slugs[title.replace(" ", "-")] = line, anchor, title
        for raw in self.document.findall(nodes.raw):
            slugs |= {name: (raw.line or 0, name, name) for name in ANCHOR.findall(raw.astext())}


def visit_math(translator, node: nodes.math) -> None:
    """MathML, which browsers render without a script or a download."""
    translator.body.append(convert(node.astext(), display="inline"))
    raise nodes.SkipNode


def visit_math_block(translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math-block" tabindex="0">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def reach_by_keyboard(_app, _page: str, _template: str, context: dict[str, Any], _document) -> None:
    """Makes everything wider than the page scrollable by keyboard: code, outputs, formulas and tables."""
    if "body" in context:
        body = context["body"].replace("<pre>", '<pre tabindex="0">')
        context["body"] = body.replace('<div class="table-wrapper', '<div tabindex="0" class="table-wrapper')


def read_edition(app, page: str, source: list[str]) -> None:
    """With `edition`, the folder of a student edition, its notebooks stand in for these; the teacher's plan stays out.

    Raises ExtensionError for a notebook that the folder lacks.
    """
    if app.config.edition and page == "TEACHING":
        source[0] = TEACHERS_PAGE
    elif app.config.edition and Path(app.env.doc2path(page)).suffix == ".ipynb":
        path = Path(app.config.edition, f"{page}.ipynb")
        if not path.is_file():
            raise ExtensionError(f"{path}: no such file; give the folder that `python -m neox_lib student OUT` wrote")
        source[0] = path.read_text("utf-8")


def setup(app) -> dict[str, bool]:
    app.add_config_value("edition", "", "env")
    app.connect("source-read", read_edition)
    app.add_transform(NotebookAnchors)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("html-page-context", reach_by_keyboard)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
