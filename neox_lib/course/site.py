"""A Sphinx extension for `make site`: what MyST does not know about these notebooks."""

import re
from typing import Any

from docutils import nodes
from docutils.transforms import Transform
from latex2mathml.converter import convert

ANCHOR = re.compile(r'<a id="([\w-]+)">')


class NotebookAnchors(Transform):
    """Lets links find two kinds of anchors that MyST does not count: `<a id="token"></a>`, and JupyterLab's own for a
    heading, which keeps its capital letters and signs, as in `#What-is-a-token?`.
    """

    default_priority = 840  # before MyST looks up the links of the page itself, at 879

    def apply(self, **_: Any) -> None:
        slugs = getattr(self.document, "myst_slugs", {})
        for line, anchor, title in list(slugs.values()):
            slugs[title.replace(" ", "-")] = line, anchor, title
        for raw in self.document.findall(nodes.raw):
            slugs |= {name: (raw.line or 0, name, name) for name in ANCHOR.findall(raw.astext())}


def visit_math(translator, node: nodes.math) -> None:
    """MathML, which browsers show by themselves: no script, and nothing to fetch."""
    translator.body.append(convert(node.astext(), display="inline"))
    raise nodes.SkipNode


def visit_math_block(translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math-block" tabindex="0">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def reach_by_keyboard(_app, _page: str, _template: str, context: dict[str, Any], _document) -> None:
    """Lets the keyboard scroll what is wider than the page: code, outputs, formulas and tables."""
    if "body" in context:
        body = context["body"].replace("<pre>", '<pre tabindex="0">')
        context["body"] = body.replace('<div class="table-wrapper', '<div tabindex="0" class="table-wrapper')


def setup(app) -> dict[str, bool]:
    app.add_transform(NotebookAnchors)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("html-page-context", reach_by_keyboard)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
