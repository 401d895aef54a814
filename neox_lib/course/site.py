"""A Sphinx extension for `make site`: what MyST and Furo lack for these notebooks."""

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.transforms import Transform
from latex2mathml.converter import convert
from sphinx.errors import ExtensionError

TEACHERS_PAGE = "# Teaching from these notebooks\n\nThe plan for a teacher comes with the repository."
ANCHOR = re.compile(r'<a id="([\w-]+)">')
GLOSSARY = "00_start_here"  # its entries are paragraphs that begin `<a id="token"></a>**token**: `
FIGURE = re.compile(r'<img ([^>]*)src="data:image/png;base64,([^"]+)"([^>]*)>')
MAP = re.compile(r'<img [^>]*alt="Map of [^>]*>')


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


# The glossary: the first time that a section uses one of its terms, the word leads there.
# Some words have another sense too: how they are said where the term is meant, and pages on which they never mean it.
SAID_AS = {"key": "keys and value", "value": "keys and value", "head": "(?<!your )head"}
OTHER_SENSE = {
    "block": ("02_rotary_embeddings", "07_prompt_playground", "08_20b_on_a_small_machine"),
    "decode": ("00_start_here", "01_tokenizer", "index"),  # a tokenizer's
    "rank": ("01_tokenizer",),  # a merge's
}


@dataclass(frozen=True)
class Entry:
    anchor: str
    name: str
    meaning: str

    def pattern(self) -> str:
        """A regular expression for the name, or for each of several that share the entry, in the plural too.

        >>> Entry("", "query, token id", "").pattern()
        'quer(?:y|ies)|token[\\\\s-]ids?'
        """
        words = [SAID_AS.get(word, re.escape(word).replace("\\ ", "[\\s-]")) for word in self.name.split(", ")]
        return "|".join(f"{word[:-1]}(?:y|ies)" if word[-1] == "y" else f"{word}s?" for word in words)


def text_of(node: nodes.Node) -> str:
    """What a reader sees: the text without the tags that MyST passes on as they are."""
    return "".join(text.astext() for text in node.findall(nodes.Text) if not isinstance(text.parent, nodes.raw))


def entry_of(paragraph: nodes.Element) -> Entry | None:
    found = ANCHOR.match("".join(raw.astext() for raw in paragraph.children[:1] if isinstance(raw, nodes.raw)))
    name, _, meaning = text_of(paragraph).partition(": ")
    return Entry(found[1], name, meaning) if found and meaning else None


def glossary(env) -> list[Entry]:
    if GLOSSARY not in env.found_docs:
        return []
    return list(filter(None, map(entry_of, env.get_doctree(GLOSSARY).findall(nodes.paragraph))))


def is_prose(text: nodes.Text) -> bool:
    """Running text: no heading, link, code, output or entry of the glossary."""
    node = text.parent
    while isinstance(node, nodes.emphasis | nodes.strong):
        node = node.parent
    return isinstance(node, nodes.paragraph) and entry_of(node) is None


def link_terms(app, doctree: nodes.document, page: str) -> None:
    entries = {entry.anchor: entry for entry in glossary(app.env) if page not in OTHER_SENSE.get(entry.anchor, ())}
    if not entries or page.startswith("guides/"):  # which speak of blocks of commands, and of positions of files
        return
    longest_first = sorted(entries.values(), key=lambda entry: -len(entry.name))
    names = "|".join(f"({entry.pattern()})" for entry in longest_first)
    term = re.compile(rf"(?<![\w-])(?:{names})(?![\w-])", re.IGNORECASE)
    place = "" if page == GLOSSARY else app.builder.get_relative_uri(page, GLOSSARY)
    linked: set[str] = set()
    for node in list(doctree.findall()):
        if isinstance(node, nodes.section):
            linked = set(entries) if text_of(node[0]) == "Sources" else set()
        elif isinstance(node, nodes.reference):  # by hand
            linked.add(node.get("refuri", "").partition("#")[2])
        elif isinstance(node, nodes.Text) and is_prose(node):
            parts, end = [], 0
            for found in term.finditer(node):
                entry = longest_first[(found.lastindex or 0) - 1]
                if entry.anchor not in linked:
                    linked.add(entry.anchor)
                    parts += [nodes.Text(node[end : found.start()]), link_to(entry, place, found[0])]
                    end = found.end()
            if parts:
                node.parent.replace(node, [*parts, nodes.Text(node[end:])])


def link_to(entry: Entry, place: str, shown: str) -> nodes.reference:
    uri, words = f"{place}#{entry.anchor}", f"{entry.name}: {entry.meaning}"
    return nodes.reference("", shown, internal=True, refuri=uri, reftitle=words, classes=["term"])


def link_all_anew(_app, env, added: set[str], changed: set[str], removed: set[str]) -> set[str]:
    """Every page shows the glossary's words: when they change, all pages do."""
    return set(env.found_docs) if GLOSSARY in added | changed | removed else set()


# The search: by section, since a page is an hour's reading


def sections(app) -> Iterator[tuple[str, str, str, str, str]]:
    """Address, page, title, text and code of each section and of each entry of the glossary."""
    for page in sorted(app.env.found_docs):
        doctree, uri = app.env.get_doctree(page), app.builder.get_target_uri(page)
        for section in doctree.findall(nodes.section):
            text, code = (
                " ".join(map(text_of, written(section, kind))) for kind in (nodes.paragraph, nodes.literal_block)
            )
            yield f"{uri}#{section['ids'][0]}", app.env.titles[page].astext(), text_of(section[0]), text, code
    for entry in glossary(app.env):
        yield f"{app.builder.get_target_uri(GLOSSARY)}#{entry.anchor}", "Glossary", entry.name, entry.meaning, ""


def written(node: nodes.Element, kind: type[nodes.Element]) -> Iterator[nodes.Element]:
    """The author's own paragraphs, or code: no outputs, no sections below, and no entries of the glossary."""
    for child in node.children:
        if isinstance(child, kind) and entry_of(child) is None:
            yield child
        elif isinstance(child, nodes.Element) and not isinstance(child, nodes.section):
            yield from written(child, kind) if "cell_output" not in child["classes"] else ()


def search_by_section(app) -> None:
    """A script with the texts, which a page opened as a file may load, and the one that searches in them."""
    data = json.dumps(list(sections(app)), ensure_ascii=False)
    target = Path(app.outdir, "_static", "sections.js")
    target.parent.mkdir(exist_ok=True)
    target.write_text(f"const SECTIONS = {data};\n", encoding="utf-8")
    app.add_js_file(target.name, loading_method="defer")
    app.add_js_file("search.js", loading_method="defer")


# Phones, and dark pages


def mark_tables(doctree: nodes.document) -> None:
    """Printed columns keep their lines, which a phone scrolls; all else that is printed wraps."""
    for block in doctree.findall(nodes.literal_block):
        rows = re.findall(r"^.*\S {2,}\S.*$", block.astext(), re.MULTILINE)
        if len(rows) > 1 and not re.search(r"(?:\S ?){60}", block.astext()):
            block["classes"].append("columns")


def dark_heat_map(png: bytes) -> bytes | None:
    """A heat map for a dark page: its colours, which are numbers, as they are, and all around them inverted.

    None for any other figure; a style sheet can turn those round as a whole.
    """
    import numpy as np
    from matplotlib import colormaps
    from PIL import Image, ImageFilter

    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    near = np.stack(np.meshgrid(*[range(-3, 4)] * 3), -1).reshape(-1, 3)  # a colour bar is drawn with blended colours
    colours = colormaps["cividis"](range(256), bytes=True)[:, None, :3].astype(int) + near
    inside = np.isin(pixels.astype(int) @ (1 << 16, 1 << 8, 1), colours @ (1 << 16, 1 << 8, 1))
    if inside.mean() < 0.1:
        return None
    area = Image.fromarray(inside).convert("L")
    area = area.filter(ImageFilter.MinFilter(3)).filter(ImageFilter.MaxFilter(3))  # without grey edges of letters
    area = area.filter(ImageFilter.MaxFilter(9)).filter(ImageFilter.MinFilter(9))  # with the numbers in the cells
    turned = np.where(np.asarray(area)[..., None] > 0, pixels, 255 - (pixels * 0.93).astype(np.uint8))
    buffer = io.BytesIO()
    Image.fromarray(turned).save(buffer, format="png")
    return buffer.getvalue()


def with_dark_twin(found: re.Match) -> str:
    dark = dark_heat_map(base64.b64decode(found[2]))
    if dark is None:
        return found[0]
    twin = f'src="data:image/png;base64,{base64.b64encode(dark).decode("ascii")}"'
    return f'<div class="only-light">{found[0]}</div><div class="only-dark"><img {found[1]}{twin}{found[3]}></div>'


def finish_page(app, page: str, _template: str, context: dict[str, Any], _doctree) -> None:
    """Makes everything wider than the page scrollable by keyboard: code, outputs, formulas, tables and the map."""
    if page == "search":
        search_by_section(app)
    if "body" in context:
        body = context["body"].replace("<pre>", '<pre tabindex="0">')
        body = body.replace('<div class="table-wrapper', '<div tabindex="0" class="table-wrapper')
        body = MAP.sub(r'<span class="map" tabindex="0">\g<0></span>', body)
        context["body"] = FIGURE.sub(with_dark_twin, body)


def finish_doctree(app, doctree: nodes.document, page: str) -> None:
    mark_tables(doctree)
    link_terms(app, doctree, page)


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
    app.connect("env-get-outdated", link_all_anew)
    app.connect("doctree-resolved", finish_doctree)
    app.connect("html-page-context", finish_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
