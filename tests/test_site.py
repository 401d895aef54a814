"""The site: the series as pages that a phone shows, offline, with every link alive and every solution folded."""

import io
import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from neox_lib.classroom.student import write_student_edition
from neox_lib.course.figures import plots
from neox_lib.course.site import dark_heat_map
from tests.browsing import Visit, needs_chromium
from tests.browsing import browser as browser  # a fixture

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CHAPTERS = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
GUIDES = sorted(NOTEBOOKS.glob("guides/*.md"))
NAMES = [
    path.relative_to(NOTEBOOKS).with_suffix("").as_posix() for path in (*CHAPTERS, *GUIDES, NOTEBOOKS / "TEACHING.md")
]
CUT_OFF = """[...document.querySelectorAll("article pre, article .cell_output *")]
    .filter((part) => part.scrollWidth > part.clientWidth + 1)
    .filter((part) => ["auto", "scroll"].includes(getComputedStyle(part).overflowX))
    .filter((part) => !part.closest(".columns, .table-wrapper, .math-block, .map"))
    .map((part) => part.textContent.slice(0, 80))"""  # what scrolls sideways, other than columns, formulas and the map
TERM = re.compile(r'<a class="term[^"]*" href="[^"#]*#([\w-]+)"[^>]*>([^<]*)</a>')  # a link to the glossary
LOADED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "link": "href"}  # what a page fetches itself


class Page(HTMLParser):
    """What a page holds: its anchors, its links, what it fetches, and which parts are folded."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.anchors, self.links, self.fetched = path, set[str](), set[str](), set[str]()
        self.tags: Counter[str] = Counter()
        self.unfolded: list[str] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags[tag] += 1
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        if tag in LOADED and values.get(LOADED[tag]) and values.get("rel") not in ("author", "canonical"):
            self.fetched.add(values[LOADED[tag]])
        if tag == "details" and "open" in values:
            self.unfolded.append(self.get_starttag_text() or tag)


def build(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The site in `folder` / "html", as `make site` builds it."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", *options, "-d", str(folder / "parts")]
    return subprocess.run([*command, str(NOTEBOOKS), str(folder / "html")], capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, where a warning is an error: a link without a target is one."""
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def is_outside(link: str) -> bool:
    return bool(urlsplit(link).scheme or urlsplit(link).netloc)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_there_and_the_first_page_leads_to_it(site, pages, name):
    assert site / f"{name}.html" in pages
    assert f"{name}.html" in pages[site / "index.html"].links


def test_every_link_inside_the_site_leads_somewhere(site, pages):
    """A reader who follows a word to the glossary must not land on an error, or at the top of a long page."""
    dead = []
    for path, page in pages.items():
        for link in filter(lambda link: not is_outside(link), page.links):
            place, anchor = unquote(urlsplit(link).path), unquote(urlsplit(link).fragment)
            target = (path.parent / place).resolve() if place else path
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].anchors):
                dead.append(f"{path.name}: {link}")
    assert not dead


def test_every_term_of_the_glossary_is_linked_where_lessons_use_it(site, pages):
    """A reader who meets a word again, six notebooks after it was explained, is one tap from what it means."""
    source = "\n".join(cell.source for cell in nbformat.read(CHAPTERS[0], as_version=4).cells)
    entries = set(re.findall(r'<a id="([\w-]+)"></a>\*\*', source))
    lessons = [site / f"{chapter.stem}.html" for chapter in CHAPTERS]
    linked = [term for lesson in lessons for term in TERM.findall(lesson.read_text("utf-8"))]
    led_to = {link.partition("#")[2] for lesson in lessons for link in pages[lesson].links}  # by hand too
    assert len(entries) > 30
    assert {anchor for anchor, _ in linked} <= entries <= led_to
    for anchor, shown in linked:  # the word is the term, in the plural too
        assert any(name[:3] == shown.lower()[:3] for name in [anchor.replace("-", " "), *anchor.split("-")]), shown


def test_a_term_is_linked_once_in_a_section_and_never_in_code_or_in_another_sense(site):
    text = (site / "01_tokenizer.html").read_text("utf-8")
    sections = [[anchor for anchor, _ in TERM.findall(section)] for section in text.split("<section")]
    assert sum(map(len, sections)) > 20 and all(len(set(anchors)) == len(anchors) for anchors in sections)
    assert not any("rank" in anchors for anchors in sections)  # here it is a merge's
    assert not re.search(r'<(?:h\d|pre|code)[^>]*>[^<]*<a class="term', text)


def test_the_first_page_leads_to_glossary_teacher_and_playground(site, pages):
    first = pages[site / "index.html"]
    assert first.links >= {"00_start_here.html#glossary", "TEACHING.html", "guides/playground_for_a_room.html"}
    assert "_images/playground_branches.png" in first.fetched


def test_the_search_holds_every_section_at_an_address_that_exists(site, pages):
    """A page is an hour's reading: an answer that names a page is none."""
    script = (site / "_static" / "sections.js").read_text("utf-8")
    found = json.loads(script.removeprefix("const SECTIONS = ").removesuffix(";\n"))
    for address, *_ in found:
        place, _, anchor = address.partition("#")
        assert anchor in pages[site / place].anchors, address
    for chapter in CHAPTERS:
        text = "\n".join(c.source for c in nbformat.read(chapter, as_version=4).cells if c.cell_type == "markdown")
        titles = {title for address, _, title, *_ in found if address.startswith(chapter.stem)}
        assert len(titles) >= len(set(re.findall(r"^#{1,3} .+", text, re.MULTILINE)))


def test_a_heat_map_keeps_its_colours_on_a_dark_page():
    """They are numbers: in the negative the highest would be the darkest, and "the bright line" in the text wrong."""
    numbers, names = torch.tensor([[0.0, 0.5], [0.5, 1.0]]), ["little", "illimitable"]
    picture = plots.heat_map(numbers, "T", "x", "y", "alt", "unit", names, names, annotate=True)
    buffer = io.BytesIO(picture.png())
    made = dark_heat_map(buffer.getvalue())
    assert made is not None
    light, dark = (np.asarray(Image.open(each).convert("RGB")).astype(int) for each in (buffer, io.BytesIO(made)))
    turned = np.abs(255 - 0.93 * light - dark).max(axis=2) < 2
    for box in (each.get_window_extent() for each in picture.figure.axes):
        top, bottom, left, right = len(light) - box.y1, len(light) - box.y0, box.x0, box.x1
        inside = np.s_[int(top) + 3 : int(bottom) - 3, int(left) + 3 : int(right) - 3]
        assert (dark[inside] == light[inside]).all()  # the numbers in the cells too
        turned[int(top) - 3 : int(bottom) + 3, int(left) - 3 : int(right) + 3] = True
    assert turned.all()  # all around is the negative: ink is bright, white is the ground of the page

    assert dark_heat_map(plots.bars({"a": 1, "b": 2}, "T", "y", "alt").png()) is None


def test_a_page_fetches_nothing_from_another_machine(site, pages):
    found = {link for page in pages.values() for link in page.fetched if is_outside(link) and link[:5] != "data:"}
    style = [path.read_text("utf-8") for path in site.rglob("*.css")]
    assert not found and not [text for text in style if "url(http" in text or "@import" in text]


def test_figures_are_there_with_their_words(site, pages):
    """A figure is an <img> in the stored output, with its text for those who can't see it."""
    for notebook in CHAPTERS:
        cells = nbformat.read(notebook, as_version=4).cells
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        stored = sum(output.get("data", {}).get("text/html", "").count("<img ") for output in outputs)
        assert pages[site / f"{notebook.stem}.html"].tags["img"] >= stored


def test_hints_and_solutions_stay_folded(site, pages):
    for notebook in CHAPTERS:
        page = pages[site / f"{notebook.stem}.html"]
        source = "\n".join(cell.source for cell in nbformat.read(notebook, as_version=4).cells)
        assert page.tags["details"] >= source.count("<details>") > 0
        assert not page.unfolded


def test_formulas_are_mathematics_without_a_script(site, pages):
    assert pages[site / "04_parallel_residual.html"].tags["math"] > 0


def test_a_site_for_students_holds_no_answer(tmp_path):
    """What a teacher publishes, the whole class reads: no page, search or script may give anything away."""
    write_student_edition(tmp_path / "edition")
    done = build(tmp_path, "-D", f"edition={tmp_path / 'edition'}")
    assert done.returncode == 0, done.stderr[-3000:]
    files = [path for path in (tmp_path / "html").rglob("*") if path.suffix in (".html", ".js", ".ipynb", ".md")]
    text = "\n".join(path.read_text("utf-8") for path in files)
    assert text.count("<summary>Hint 1</summary>") > 20
    assert not re.findall("<summary>Solution|<summary>A good answer|Good answer:|<b>Right|<b>Not so", text)
    assert len((tmp_path / "html" / "TEACHING.html").read_text("utf-8").split("<article")[1].split()) < 100


def test_a_site_for_students_is_not_made_of_the_originals(tmp_path):
    """A wrong folder must not publish the answers in silence."""
    done = build(tmp_path, "-D", f"edition={tmp_path / 'absent'}")
    assert done.returncode != 0 and "give the folder that `python -m neox_lib student OUT` wrote" in done.stderr


class TestInABrowser:
    pytestmark = needs_chromium

    @pytest.mark.parametrize("name", ["index", *NAMES])
    def test_a_phone_shows_a_page_whole_and_everybody_can_use_it(self, site, browser, name):
        visit = Visit(browser, (site / f"{name}.html").as_uri(), width=390, height=844)
        width, shown = visit.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width <= shown, "the page is wider than the phone"
        assert visit.page.evaluate(CUT_OFF) == [], "code or a story is read by scrolling sideways"
        assert not visit.errors and not visit.outside
        assert visit.serious_findings() == []  # after the errors: axe itself asks for style sheets, and may not
        visit.page.set_viewport_size({"width": 1280, "height": 720})
        assert visit.page.evaluate(CUT_OFF) == []
        visit.close()

    def test_printed_columns_keep_their_lines_on_a_phone(self, site, browser):
        visit = Visit(browser, (site / "01_tokenizer.html").as_uri(), width=390, height=844)
        table = visit.page.locator(".columns pre", has_text="round trip").first
        lines = table.inner_text().strip().splitlines()
        assert visit.page.locator(".columns pre").count() > 5
        assert table.evaluate("e => e.getBoundingClientRect().height") < 26 * len(lines)
        visit.close()

    def test_the_search_finds_sections_and_shows_the_words_around(self, site, browser):
        visit = Visit(browser, (site / "search.html").as_uri() + "?q=KV caches", width=390, height=844)
        visit.context.set_offline(True)
        visit.page.wait_for_selector("[role=status]")
        found = visit.page.locator(".found li")
        assert "KV cache" in found.first.inner_text() and "Glossary" in found.first.inner_text()
        addresses = visit.page.eval_on_selector_all(".found a", "links => links.map((link) => link.href)")
        assert len(set(addresses)) == len(addresses) > len(CHAPTERS) and all("#" in address for address in addresses)
        for item in found.all()[1:6]:
            marked = {word.lower() for word in item.locator("mark").all_inner_texts()}
            assert marked & {"kv", "cache", "caches", "cached"} and len(item.locator("p").inner_text()) > 60
        assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert not visit.errors and not visit.outside
        assert visit.serious_findings() == []
        found.nth(1).locator("a").click()
        visit.page.wait_for_selector("h2")
        assert "#" in visit.page.url
        visit.close()

    @pytest.mark.parametrize("query", ["xyzzy", "<img src=x onerror=alert(1)>", ""])
    def test_a_search_without_an_answer_says_so(self, site, browser, query):
        visit = Visit(browser, (site / "search.html").as_uri())
        visit.page.get_by_label("Search").fill(query)
        visit.page.keyboard.press("Enter")
        if query:
            visit.page.wait_for_selector("[role=status]")
        assert visit.page.locator("#search-results img").count() == 0
        assert not visit.errors and not visit.outside
        visit.close()

    @pytest.mark.parametrize("name", ["index", "03_attention", "07_prompt_playground", "guides/playground_for_a_room"])
    def test_the_page_can_be_dark(self, site, browser, name):
        """A dark theme whose text can't be read is worse than none, and a white figure blinds who reads at night."""
        visit = Visit(browser, (site / f"{name}.html").as_uri(), color_scheme="dark")
        pictures = visit.page.locator("article img:visible, .np-still")
        assert pictures.count() >= 1
        for picture in pictures.all():
            pixels = np.asarray(Image.open(io.BytesIO(picture.screenshot())).convert("L"))
            assert np.median(pixels[[8, -8]]) < 40 and pixels.mean() < 128
        assert visit.serious_findings() == []
        visit.close()
