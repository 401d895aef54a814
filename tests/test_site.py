"""The site: the series as pages that a phone shows, offline, with every link alive and every solution folded."""

import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from neox_lib.classroom.student import write_student_edition
from tests.browsing import Visit, needs_chromium
from tests.browsing import browser as browser  # a fixture

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CHAPTERS = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
GUIDES = sorted(NOTEBOOKS.glob("guides/*.md"))
NAMES = [
    path.relative_to(NOTEBOOKS).with_suffix("").as_posix() for path in (*CHAPTERS, *GUIDES, NOTEBOOKS / "TEACHING.md")
]
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
    assert not re.findall("<summary>Solution|Teacher: a good answer|Good answer:|<b>Right|<b>Not so", text)
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
        assert not visit.errors and not visit.outside
        assert visit.serious_findings() == []  # after the errors: axe itself asks for style sheets, and may not
        visit.close()

    def test_the_search_finds_a_word_without_a_network(self, site, browser):
        visit = Visit(browser, (site / "search.html").as_uri() + "?q=rotary", width=390, height=844)
        visit.context.set_offline(True)
        visit.page.wait_for_selector("#search-results li a")
        assert "02_rotary_embeddings" in visit.page.inner_html("#search-results")
        assert not visit.errors and not visit.outside
        visit.close()

    def test_the_page_can_be_dark(self, site, browser):
        """A dark theme whose text can't be read is worse than none."""
        visit = Visit(browser, (site / "03_attention.html").as_uri(), color_scheme="dark")
        assert visit.serious_findings() == []
        visit.close()
