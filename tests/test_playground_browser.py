"""The playground in a real browser, in JupyterLab and as an app: what a class would press, see and break."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TOKEN = "a-test-of-the-playground"
SWITCHES = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
IDLE = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
PATIENCE = 60_000  # milliseconds: a busy machine is slow, not wrong
CELLS = [
    "from neox_lib.playground import Playground\n\none = Playground(tokens=40)\none",
    "two = Playground(tokens=9, prompt='Tom')\ntwo",
    """
import time
from neox_lib import NeoXConfig, NeoXModel, create_tokenizer

slow_reader = NeoXModel(NeoXConfig(2048, 2048, 64, 40, 2, 128)).eval()
for layer in slow_reader.layers:
    layer.register_forward_hook(lambda *_: time.sleep(0.25))
three = Playground(slow_reader, create_tokenizer(), tokens=5)
three
""",
]
HARD_PROMPT = (
    "<script>window.hacked = 1</script></pre><img src=x onerror='window.hacked=1'> 🦊👩‍👩‍👧 e\u0301 <|endoftext|>"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None and os.environ.get("NEOX_BROWSER") != "required",
        reason="no chromium on this machine (Debian and Ubuntu: apt-get install chromium)",
    ),
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_until_served(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"no answer from {url}:\n{log.read_text('utf-8')[-2000:]}")


def serve(folder: Path, module: str, *arguments: str) -> subprocess.Popen:
    """A server in a process of its own, whose settings and whose kernels' files lie in `folder`."""
    here = {
        name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR")
    }
    environment = os.environ | here | {"JUPYTER_PLATFORM_DIRS": "1", "no_proxy": "127.0.0.1"}
    log = (folder / "log").open("w")
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[str]:
    """The address of a JupyterLab with one notebook, a playground in each cell; the third one's model reads slowly."""
    folder = tmp_path_factory.mktemp("lab")
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), folder / "play.ipynb")
    settings = folder / "jupyter_config_dir" / "labconfig"
    settings.mkdir(parents=True)
    quiet = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
    (settings / "default_setting_overrides.json").write_text(json.dumps(quiet), encoding="utf-8")
    port = free_port()
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={TOKEN}", "--allow-root"]
    options += ["--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder}"]
    process = serve(folder, "jupyterlab", *options)
    wait_until_served(f"http://127.0.0.1:{port}/api", process, folder / "log")
    yield f"http://127.0.0.1:{port}/lab/tree/play.ipynb?token={TOKEN}"
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def app(tmp_path_factory) -> Iterator[str]:
    """The address of what `make playground` serves."""
    folder, port = tmp_path_factory.mktemp("app"), free_port()
    process = serve(folder, "neox_lib.play.serve", f"--port={port}", "--no-browser")
    wait_until_served(f"http://127.0.0.1:{port}/voila/static/favicons/favicon.ico", process, folder / "log")
    yield f"http://127.0.0.1:{port}/"
    process.terminate()
    process.wait(30)


class Visit:
    """A page, and what it must not do: write errors to the console, ask another machine for anything."""

    def __init__(self, browser, address: str, width: int = 1280, height: int = 720, scale: int = 1):
        viewport = {"width": width, "height": height}
        self.context = browser.new_context(viewport=viewport, device_scale_factor=scale)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.errors: list[str] = []
        self.outside: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.note(request.url))
        self.page.goto(address)

    def note(self, url: str) -> None:
        if not url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            self.outside.append(url)

    def run_cells(self) -> None:
        self.page.wait_for_function(IDLE)
        self.command("notebook:run-all-cells")
        self.wait(f"document.querySelectorAll('.np').length === {len(CELLS)}")

    def wait(self, condition: str) -> None:
        """Wait until a condition holds in the page; if it never does, say what the first playground shows instead."""
        try:
            self.page.wait_for_function(condition, polling=50)  # not with each frame: a busy machine draws none
        except Exception as error:
            shown = self.page.locator(".np").first.inner_text() if self.page.locator(".np").count() else "no playground"
            raise AssertionError(f"{condition} never came; shown was:\n{shown[:1500]}") from error

    def phase(self, phase: str) -> None:
        self.wait(f"document.querySelector('.np').dataset.phase === '{phase}'")

    def settled(self) -> None:
        """Wait until the kernel has heard all that the page has sent, and has done it."""
        state = "document.querySelector('.np').dataset"
        self.wait(f"{state}.answered === 'true' && {state}.phase === 'idle'")

    def command(self, name: str, **arguments) -> None:
        """Do one of JupyterLab's own commands, and wait for it."""
        self.page.evaluate("([name, more]) => window.jupyterapp.commands.execute(name, more)", [name, arguments])

    def execute(self, code: str) -> None:
        """Run code in the notebook's kernel, past all cells; what it raises fails the test."""
        kernel = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel"
        content = self.page.evaluate(f"code => {kernel}.requestExecute({{code}}).done.then(r => r.content)", code)
        assert content["status"] == "ok", content

    def tokens(self) -> int:
        return self.page.locator(".np").first.locator(".np-text .np-token").count()

    def button(self, name: str):
        return self.page.get_by_role("button", name=name, exact=True).first

    def set_tokens(self, count: int) -> None:
        field = self.page.get_by_label("tokens", exact=True).first
        field.fill(str(count))
        field.press("Tab")

    def generate(self, prompt: str | None = None) -> None:
        """Press Generate and wait for the end."""
        if prompt is not None:
            self.page.locator(".np textarea").first.fill(prompt)
        self.button("Generate").click()
        self.settled()

    def views(self) -> Iterator[str]:
        """Open each of the first playground's three views in turn; its name. At the end the first is open again."""
        tabs = self.page.locator(".np").first.locator(".np-tabs button")
        for number in range(3):
            tabs.nth(number).click()
            yield tabs.nth(number).inner_text()
        tabs.nth(0).click()

    def close(self) -> None:
        self.context.close()


SLOW = """
from neox_lib.play import jobs
import time

def slowly(*arguments, original=jobs.stream_generate, **options):
    for step in original(*arguments, stop_token_ids=(), **options):
        time.sleep(0.02)
        yield step

quick, jobs.stream_generate = jobs.stream_generate, slowly
"""


@pytest.fixture
def slow_model(visit) -> Iterator[None]:
    """A model that writes for half a minute and does not end its text: time enough to press buttons."""
    visit.execute(SLOW)
    yield
    visit.execute("jobs.stream_generate = quick")


@pytest.fixture(scope="module")
def visit(browser, lab) -> Iterator[Visit]:
    visit = Visit(browser, lab + "&reset")
    visit.run_cells()
    yield visit
    visit.close()


@pytest.mark.usefixtures("slow_model")
def test_generate_and_stop_and_generate_and_stop_again(visit):
    """Lab handles the first messages on another thread than later ones: once proves nothing."""
    visit.set_tokens(1500)
    for _ in range(10):
        visit.button("Generate").click()
        visit.phase("writing")
        visit.button("Stop").click()
        visit.phase("idle")
        assert visit.page.locator(".np-status").first.inner_text().startswith("Stopped after")
        assert visit.tokens() < 1500
    before = visit.tokens()
    visit.set_tokens(5)
    visit.button("Continue").click()
    visit.wait("document.querySelector('.np-status').textContent === 'Wrote 5 tokens.'")
    assert visit.tokens() == before + 5


@pytest.mark.usefixtures("slow_model")
def test_the_cell_and_the_kernel_stay_free_while_it_streams(visit):
    visit.set_tokens(1500)
    visit.button("Generate").click()
    visit.phase("writing")
    done = visit.page.evaluate(
        """async () => {
            const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
            const reply = await kernel.requestExecute({code: "2 + 2"}).done;
            return [reply.content.status, document.querySelector('.np').dataset.phase];
        }"""
    )
    visit.button("Stop").click()
    visit.phase("idle")
    assert done == ["ok", "writing"]


@pytest.mark.usefixtures("slow_model")
def test_a_token_can_be_looked_at_and_left_while_the_text_grows(visit):
    """20B writes for minutes: whoever wonders about a token should not have to wait for the last one."""
    visit.set_tokens(1500)
    visit.button("Generate").click()
    visit.wait("document.querySelectorAll('.np-text .np-token').length > 9")
    visit.page.locator(".np-text .np-token").nth(8).click()
    visit.wait("document.querySelector('.np-panel p').textContent.startsWith('Position 8,')")
    assert visit.page.locator(".np").first.get_attribute("data-phase") == "writing"
    visit.page.locator(".np").first.locator(".np-bars button:not(.np-here)").first.click()
    visit.wait("document.querySelectorAll('.np-roads li').length === 2")
    visit.button("Stop").click()
    visit.settled()


@pytest.mark.usefixtures("slow_model")
def test_what_is_set_while_it_streams_is_for_the_next_run(visit):
    visit.set_tokens(40)
    visit.button("Generate").click()
    visit.phase("writing")
    visit.set_tokens(4)
    visit.page.get_by_text("Wrote 40 tokens.", exact=True).first.wait_for()
    visit.button("Continue").click()
    visit.page.get_by_text("Wrote 4 tokens.", exact=True).first.wait_for()
    visit.settled()


def test_a_slow_model_tells_how_far_it_reads_and_can_be_stopped_meanwhile(visit):
    """The first token of a model of 20B's size may take a minute. This one would read for ten seconds."""
    slow = visit.page.locator(".np").nth(2)
    slow.get_by_role("button", name="Generate").click()
    for layers in (r"\d+", r"[12]\d"):
        slow.locator(".np-status", has_text=re.compile(f"Reading the prompt: {layers} of 40 layers")).wait_for()
    started = time.monotonic()
    slow.get_by_role("button", name="Stop").click()
    slow.locator(".np-status", has_text="Stopped while the prompt was read").wait_for()
    assert time.monotonic() - started < 3


def test_another_road_is_taken_from_a_bar(visit):
    visit.set_tokens(12)
    visit.generate("Once upon a time, a fox")
    visit.page.locator(".np-text .np-token").nth(9).click()
    visit.wait("document.querySelectorAll('.np-bars button').length >= 10")
    visit.wait("document.querySelector('.np-panel p').textContent.startsWith('Position 9,')")
    visit.page.locator(".np").first.locator(".np-bars button:not(.np-here)").first.click()
    visit.wait("document.querySelectorAll('.np-roads li').length === 2")
    visit.phase("idle")
    visit.page.locator(".np-roads button").first.click()
    visit.wait("document.querySelector('.np-roads button').getAttribute('aria-pressed') === 'true'")


def test_attention_by_keyboard_alone(visit):
    """Nobody needs a mouse, and no key reaches the notebook's own shortcuts."""
    visit.phase("idle")
    cells = "window.jupyterapp.shell.currentWidget.content.widgets.length"
    before = visit.page.evaluate(cells)
    visit.page.get_by_role("tab", name="Next token").first.focus()
    visit.page.keyboard.press("ArrowRight")
    visit.page.locator(".np-text").first.focus()
    visit.page.keyboard.press("Home")
    for _ in range(5):
        visit.page.keyboard.press("ArrowRight")
    visit.wait("document.querySelectorAll('.np-heat .np-glow').length === 6")
    visit.page.locator("select[id$=-layer]").first.focus()
    visit.page.keyboard.press("ArrowDown")
    visit.wait("document.querySelectorAll('.np-panel:not([hidden]) p')[0].textContent.includes('of layer 1')")
    for key in ("a", "b", "d", "d"):
        visit.page.locator(".np-text").first.press(key)
    assert visit.page.evaluate(cells) == before
    visit.page.get_by_role("tab", name="Next token").first.click()


def test_hard_text_is_shown_as_text(visit):
    visit.set_tokens(6)
    visit.generate(HARD_PROMPT)
    shown = visit.page.locator(".np-text").first.inner_text()
    assert "<script>window.hacked = 1</script></pre>" in shown and "🦊👩‍👩‍👧" in shown and "<|endoftext|>" in shown
    assert visit.page.evaluate("window.hacked") is None
    assert "\ufffd" not in shown
    for prompt in ("", "   "):
        visit.generate(prompt)
    visit.generate("🦊" * 1250)
    assert "No room to write" in visit.page.locator(".np-status").first.inner_text()
    assert visit.page.locator(".np textarea").first.input_value() == "🦊" * 1250


def test_two_playgrounds_in_one_notebook_keep_apart(visit):
    first, second = (visit.page.locator(".np").nth(number) for number in (0, 1))
    before = first.locator(".np-text").inner_text()
    second.get_by_role("button", name="Generate").dblclick()
    second.get_by_text("Wrote 9 tokens.", exact=True).wait_for()
    assert second.locator(".np-text .np-token:not(.np-given)").count() == 9, "a double click writes once"
    assert second.locator(".np-text").inner_text().startswith("Tom")
    assert first.locator(".np-text").inner_text() == before


def test_generate_works_while_another_cell_runs(visit):
    """At once where Lab gives messages a thread of their own, else as soon as that cell has ended; never not at all."""
    kernel = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel"
    visit.page.evaluate(f"void {kernel}.requestExecute({{code: 'import time; time.sleep(3)'}})")
    visit.set_tokens(8)
    visit.generate("Anna had a kite")
    assert "Anna had a kite" in visit.page.locator(".np-text").first.inner_text()
    assert visit.page.locator(".np-status").first.inner_text() == "Wrote 8 tokens."


def test_an_error_in_the_worker_is_seen_and_survived(visit):
    visit.execute(
        "from neox_lib.play import jobs; kept = jobs.stream_generate; jobs.stream_generate = lambda *a, **k: 1 / 0"
    )
    visit.page.locator(".np textarea").first.fill("Tom")
    visit.button("Generate").click()
    visit.wait("document.querySelector('.np-error').textContent.includes('ZeroDivisionError')")
    visit.execute("jobs.stream_generate = kept")
    visit.generate("Tom")
    assert visit.page.locator(".np-error").first.is_hidden()


def serious_findings(visit: Visit) -> list[dict]:
    """What axe finds serious in the playground's own part of the page, contrast included, in each of its views."""
    from axe_playwright_python.sync_playwright import Axe

    found = [each for _ in visit.views() for each in Axe().run(visit.page, context=".np").response["violations"]]
    return [each for each in found if each["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("theme", ["JupyterLab Dark", "JupyterLab Light"])
def test_nothing_serious_is_found_by_axe(visit, theme):
    visit.command("apputils:change-theme", theme=theme)
    visit.wait(f"document.body.dataset.jpThemeName === '{theme}'")
    visit.generate("Once upon a time, a fox")
    serious = serious_findings(visit)
    assert not serious, json.dumps(serious, indent=1)[:3000]


LAYOUT = """() => {
    const root = document.querySelector(".np"), box = root.getBoundingClientRect(), faults = [];
    const name = node => node.getAttribute("aria-label") || node.textContent.slice(0, 20) || node.id;
    const seen = [...root.querySelectorAll("button, input, select, textarea, label, [role=listbox]")]
        .filter(node => node.getClientRects().length).map(node => [node, node.getBoundingClientRect()]);
    for (const [node, place] of seen) {
        if (place.left < box.left || place.right > box.right + 0.5) faults.push(`${name(node)} sticks out`);
        if (node.matches("button") && node.scrollWidth > node.clientWidth + 1) faults.push(`${name(node)} is cut off`);
        for (const [other, there] of seen) {
            if (other === node || other.contains(node) || node.contains(other)) continue;
            const wide = Math.min(place.right, there.right) - Math.max(place.left, there.left);
            const high = Math.min(place.bottom, there.bottom) - Math.max(place.top, there.top);
            if (wide > 1 && high > 1) faults.push(`${name(node)} lies over ${name(other)}`);
        }
    }
    if (root.scrollWidth > root.clientWidth) faults.push("the playground scrolls sideways");
    const page = document.scrollingElement;
    if (page.scrollWidth > page.clientWidth) faults.push("the page scrolls sideways");
    return faults;
}"""


def layout_faults(visit: Visit) -> list[str]:
    """Controls that stick out, are cut off or lie over each other, in each view, all settings shown."""
    choice = visit.page.locator("select[id$=-sampled]").first
    choice.select_option("1")
    faults = [f"{view}: {fault}" for view in visit.views() for fault in visit.page.evaluate(LAYOUT)]
    choice.select_option("")
    return faults


def test_at_200_percent_nothing_is_cut_off_in_lab(visit):
    """A projector of 1280 x 720 at 200 % is a window of 640 x 360; the side bar is shut, as one would."""
    visit.command("application:toggle-left-area")
    visit.page.set_viewport_size({"width": 640, "height": 360})
    faults = layout_faults(visit)
    visit.page.set_viewport_size({"width": 1280, "height": 720})
    visit.command("application:toggle-left-area")
    assert faults == []


@pytest.mark.usefixtures("slow_model")
def test_a_reloaded_page_finds_the_text_again_and_can_stop_it(visit):
    """The page keeps nothing that a reload could lose; the thread writes on meanwhile."""
    visit.set_tokens(1500)
    visit.button("Generate").click()
    visit.phase("writing")
    visit.command("docmanager:save")
    visit.page.wait_for_timeout(500)
    visit.page.reload()
    visit.wait(IDLE)
    visit.page.wait_for_selector(".np-text .np-token")
    visit.button("Stop").click()
    visit.phase("idle")
    assert visit.tokens() > 7
    visit.set_tokens(5)
    visit.generate("Tom and Anna")


@pytest.mark.usefixtures("slow_model")
def test_a_playground_that_is_closed_while_it_streams_writes_no_further(visit):
    """Else a thread would write for nobody, and take the processor from the next one."""
    visit.set_tokens(1500)
    visit.button("Generate").click()
    visit.phase("writing")
    visit.execute("one.page.close()\nassert one.session.worker.join(5) and len(one.state.roads.road.ids) < 1500")
    visit.wait(f"document.querySelectorAll('.np').length === {len(CELLS) - 1}")


def test_a_restarted_kernel_is_told_and_a_reopened_notebook_shows_the_still_picture(visit):
    """What was made is not replaced by "model not found", and a dead button says why it is dead."""
    assert visit.errors == [], "until here; a kernel that dies under a page may be logged"
    visit.command("docmanager:save")
    kernel = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel"
    visit.page.evaluate(f"{kernel}.restart()")
    visit.wait(IDLE)
    visit.button("Generate").click()
    visit.page.get_by_text("run this cell again").first.wait_for()
    visit.page.reload()
    visit.wait(IDLE)
    visit.page.get_by_text("A still picture").first.wait_for()
    visit.page.get_by_text("model not found").first.wait_for(state="hidden")
    visit.errors.clear()


def test_after_a_restart_the_cells_make_it_play_again(visit):
    visit.run_cells()
    visit.errors.clear()  # ipywidgets logs that the reopened notebook's widgets had no kernel
    visit.set_tokens(5)
    visit.generate("Tom and Anna")
    assert visit.page.locator(".np-status").first.inner_text() == "Wrote 5 tokens."


def test_nothing_was_asked_of_another_machine_and_no_error_was_logged(visit):
    assert visit.outside == []
    assert visit.errors == []


def test_the_app_gives_each_visitor_a_text_of_their_own(browser, app):
    """What one student writes is nobody else's; the app shows no code and asks nobody for fonts."""
    one, two = Visit(browser, app), Visit(browser, app)
    for visit in (one, two):
        visit.page.wait_for_selector(".np")
    one.set_tokens(6)
    one.generate("Tom went to the sea")
    assert two.page.locator(".np-text .np-token").count() == 0
    two.set_tokens(7)
    two.generate("Anna had a kite")
    assert "Tom" in one.page.locator(".np-text").inner_text() and "Anna" in two.page.locator(".np-text").inner_text()
    assert one.page.locator("text=import").count() == 0
    for visit in (one, two):
        visit.set_tokens(1000)
        visit.button("Generate").click()
        visit.phase("writing")
        visit.button("Stop").click(force=True)
        visit.settled()
        assert visit.outside == [] and visit.errors == []
        visit.close()


@pytest.fixture(scope="module")
def zoomed(browser, app) -> Iterator[Visit]:
    """The app at 200 % on a projector of 1280 x 720, with a text."""
    visit = Visit(browser, app, 640, 360, scale=2)
    visit.page.wait_for_selector(".np")
    visit.set_tokens(30)
    visit.generate("Tom went to the sea")
    yield visit
    visit.close()


def test_at_200_percent_nothing_is_cut_off_in_the_app(zoomed):
    assert layout_faults(zoomed) == []


def test_the_app_is_dark_where_the_system_is_and_can_be_read(zoomed):
    """A dark page in a dark room, without a setting; light again when the system is."""
    ground = "getComputedStyle(document.querySelector('.np')).backgroundColor"
    light = zoomed.page.evaluate(ground)
    zoomed.page.emulate_media(color_scheme="dark")
    zoomed.wait("document.body.dataset.jpThemeLight === 'false'")
    assert zoomed.page.evaluate(ground) != light
    serious = serious_findings(zoomed)
    assert not serious, json.dumps(serious, indent=1)[:3000]
    zoomed.page.emulate_media(color_scheme="light")
    zoomed.wait("document.body.dataset.jpThemeLight === 'true'")
    assert zoomed.page.evaluate(ground) == light
    assert serious_findings(zoomed) == [] and zoomed.errors == []
