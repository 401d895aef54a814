"""The playground in a real browser, in JupyterLab and as an app: what a class would press, see and break."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from tests.browsing import TOKEN, free_port, needs_chromium, serve, serve_lab, wait_until_served
from tests.browsing import browser as browser  # a fixture
from tests.playground_page import IDLE, PlaygroundVisit
from tests.small_models import write_chat_model

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
    "four = Playground('chatty', tokens=5)\nfour",
]
HARD_PROMPT = (
    "<script>window.hacked = 1</script></pre><img src=x onerror='window.hacked=1'> 🦊👩‍👩‍👧 e\u0301 <|endoftext|>"
)

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def notebook(tmp_path_factory) -> Path:
    """A notebook with a playground in each cell; the third one's model reads slowly, the fourth one's takes turns."""
    file = tmp_path_factory.mktemp("lab") / "play.ipynb"
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    write_chat_model(file.with_name("chatty"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), file)
    return file


@pytest.fixture(scope="module")
def lab(notebook) -> Iterator[str]:
    """The address of the notebook in a JupyterLab."""
    with serve_lab(notebook.parent, notebook.parent, "--LabApp.expose_app_in_browser=True") as address:
        yield f"{address}lab/tree/play.ipynb?token={TOKEN}"


@pytest.fixture(scope="module")
def app(tmp_path_factory) -> Iterator[str]:
    """The address of what `make playground` serves."""
    folder, port = tmp_path_factory.mktemp("app"), free_port()
    process = serve(folder, "neox_lib", "playground", f"--port={port}", "--no-browser")
    wait_until_served(f"http://127.0.0.1:{port}/voila/static/favicons/favicon.ico", process, folder / "log")
    yield f"http://127.0.0.1:{port}/"
    process.terminate()
    process.wait(30)


SLOW = """
from neox_lib.playground import jobs
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
    visit.page.locator(".np textarea").first.fill("The king said")  # of its own, it would not end either
    yield
    visit.execute("jobs.stream_generate = quick")


@pytest.fixture(scope="module")
def visit(browser, lab) -> Iterator[PlaygroundVisit]:
    visit = PlaygroundVisit(browser, lab + "&reset")
    visit.run_cells(len(CELLS))
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
    visit.phase("writing")  # until then the text of the test before may stand there
    visit.wait("document.querySelectorAll('.np-text .np-token').length > 9")
    visit.page.locator(".np-text .np-token").nth(8).click()
    visit.wait("document.querySelector('.np-panel p').textContent.startsWith('Position 8,')")
    assert visit.page.locator(".np").first.get_attribute("data-phase") == "writing"
    visit.page.locator(".np").first.locator(".np-bars button").first.click()
    visit.wait("document.querySelector('.np').querySelectorAll('.np-branches li').length === 2")
    visit.button("Stop").click()
    visit.settled()


# Whether the newest token is what a person sees at its place, in the window and not below another part of the page.
SEES_THE_END = """() => {
    const newest = [...document.querySelector(".np-text").querySelectorAll(".np-token")].at(-1);
    const {left, right, top, bottom} = newest.getBoundingClientRect();
    return newest.contains(document.elementFromPoint((left + right) / 2, (top + bottom) / 2));
}"""


@pytest.mark.usefixtures("slow_model")
def test_the_text_stays_in_view_below_a_long_prompt_and_a_reader_is_left_in_peace(visit):
    """The newest token is in the window, however many there are, until somebody scrolls up to read."""
    visit.set_tokens(1000)
    visit.page.locator(".np textarea").first.fill(("The king said to a little fox that he was glad. " * 63)[:3000])
    visit.button("Generate").click()
    visit.phase("writing")
    for count in (5, 60):
        visit.wait(f"document.querySelector('.np-text').querySelectorAll('.np-token:not(.np-given)').length > {count}")
        visit.wait(SEES_THE_END)  # the page draws when the machine lets it
    visit.page.evaluate("document.querySelector('.np-text').scrollTop = 0")
    before = visit.tokens()
    visit.wait(f"document.querySelector('.np-text').querySelectorAll('.np-token').length > {before + 20}")
    assert visit.page.evaluate("document.querySelector('.np-text').scrollTop") == 0
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
    slow.locator(".np-status", has_text="Stopped while reading the prompt").wait_for()
    assert time.monotonic() - started < 3


def test_another_branch_is_taken_from_a_bar(visit):
    visit.set_tokens(12)
    visit.generate("Once upon a time, a fox")
    visit.page.locator(".np-text .np-token").nth(9).click()
    visit.wait("document.querySelectorAll('.np-bars .np-share').length >= 10")
    visit.wait("document.querySelector('.np-panel p').textContent.startsWith('Position 9,')")
    bars = visit.page.locator(".np").first.locator(".np-bars li")
    assert bars.locator("button").count() == bars.count() - 1 == 9, "what stands there is no button"
    for bar in bars.all():
        width = bar.locator(".np-bar").evaluate("(bar) => bar.firstChild.offsetWidth / bar.offsetWidth")
        said = bar.locator(".np-share").inner_text()
        assert abs(100 * width - float(re.search(r"[\d.]+", said)[0])) < 1.5, f"a bar of {width:.0%} says {said}"
    bars.locator("button").nth(2).focus()
    visit.page.keyboard.press("Enter")
    visit.wait("document.querySelector('.np').querySelectorAll('.np-branches li').length === 2")
    visit.settled()
    held = "[...document.querySelectorAll('.np-bars button')].indexOf(document.activeElement)"
    assert visit.page.evaluate(held) == 2, "the hand stays at the third bar"
    branches = visit.page.locator(".np-branches").first.locator("button")
    one, two = (branches.nth(number).bounding_box() for number in range(2))
    assert one["y"] == two["y"] and one["x"] + one["width"] <= two["x"], "side by side"
    branches.first.press("Enter")
    visit.wait("document.querySelector('.np-branches button').getAttribute('aria-pressed') === 'true'")
    assert visit.page.evaluate("document.activeElement === document.querySelector('.np-branches button')")


TYPE_AND_LEAVE = """(field, text) => {
    const root = field.closest(".np"), prompt = root.querySelector("textarea");
    prompt.focus();
    prompt.value = text;
    prompt.dispatchEvent(new Event("input"));
    field.focus();
    return root.dataset.answered === "false";
}"""


def test_an_emptied_field_keeps_its_last_value_and_a_prompt_is_never_lost_to_another_field(visit):
    """No value is not a value to write with; and whoever types fast changes a setting before the kernel has heard."""
    visit.set_tokens(7)
    field = visit.page.get_by_label("tokens", exact=True).first
    field.fill("")
    field.press("Tab")
    assert field.input_value() == "7"
    sent = field.evaluate(TYPE_AND_LEAVE, "Anna had a kite")
    assert sent, "the prompt goes up before any other field's value, whose answer would bring the old prompt back"
    visit.generate()
    assert visit.page.locator(".np-status").first.inner_text() == "Wrote 7 tokens."
    assert visit.page.locator(".np-text").first.inner_text().startswith("Anna had a kite")


def test_stop_strings_are_typed_one_per_line(visit):
    """A line break is typed as a backslash and n, and comes back so."""
    visit.set_tokens(40)
    field = visit.page.get_by_label("stop before").first
    field.fill(" \n.\n\\n")
    field.press("Tab")
    visit.generate()
    assert visit.page.locator(".np-status").first.inner_text().endswith(": a stop string comes next.")
    assert field.input_value() == " \n.\n\\n"
    field.fill("")
    field.press("Tab")
    visit.generate()
    assert visit.page.locator(".np-status").first.inner_text() == "Wrote 40 tokens."


COUNT_SAVES = """() => {
    window.saves = 0;  // with their checkpoints: until then, Lab hears no second one
    const count = (_, {id, result}) => id === "docmanager:save" && result.then(() => (window.saves += 1));
    window.jupyterapp.commands.commandExecuted.connect(count);
}"""


def test_ctrl_s_saves_the_notebook_from_within_the_playground(visit, notebook):
    """Whoever has learned it presses it where the hand is, and a reload then brings back what was saved."""
    visit.page.evaluate(COUNT_SAVES)
    for number, part in enumerate((".np textarea", ".np-text", ".np-tabs button"), 1):
        visit.page.evaluate("part => window.jupyterapp.shell.currentWidget.model.setMetadata('saved_from', part)", part)
        visit.page.locator(part).first.press("Control+s")
        visit.wait(f"window.saves === {number}")
        assert nbformat.read(notebook, 4).metadata["saved_from"] == part


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


def test_the_lens_has_a_row_for_each_layer(visit):
    visit.generate()
    visit.page.get_by_role("tab", name="Lens").first.click()
    visit.page.locator(".np-text .np-token").nth(5).click()
    visit.wait("document.querySelectorAll('.np-panel:not([hidden]) p')[0].textContent.startsWith('Position 5,')")
    first, *_, last = visit.page.locator(".np-lens tbody tr").all_inner_texts()
    assert first.startswith("embedding") and last.startswith("layer 5")
    shares = last.split("\t")
    assert shares[2].strip() == shares[3].strip(), "the last layer's likeliest token is the one that the bars follow"
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


def test_a_conversation_is_typed_turn_by_turn_where_the_model_has_a_template(visit):
    """What can't be sent stays in the field."""
    assert visit.page.get_by_label("Say", exact=True).count() == 1, "only where the model takes turns"
    chatty = visit.page.locator(".np").nth(3)
    field, prompt = chatty.get_by_label("Say", exact=True), chatty.get_by_label("Prompt", exact=True)
    state = "document.querySelectorAll('.np')[3].dataset"
    answered = f"{state}.answered === 'true' && {state}.phase === 'idle'"
    field.fill("the fox")
    field.press("Shift+Enter")
    field.press_sequentially("and")
    assert field.input_value() == "the fox\nand" and prompt.input_value().startswith("Once")
    field.press("Enter")
    visit.wait(answered)
    first = "<user>the fox\nand<|endoftext|><assistant>"
    assert (field.input_value(), prompt.input_value()) == ("", first)
    written = "".join(chatty.locator(".np-text .np-token").all_text_contents())
    assert written.startswith(first) and len(written) > len(first)
    field.fill("the hen")
    chatty.get_by_role("button", name="Send").click()
    visit.wait(answered)
    assert prompt.input_value() == f"{written}<|endoftext|><user>the hen<|endoftext|><assistant>"
    field.fill("the fox " * 200)
    field.press("Enter")
    chatty.get_by_role("alert").get_by_text("The conversation would have").wait_for()
    assert field.input_value() == "the fox " * 200
    field.fill("the")
    field.press("Enter")
    visit.wait(answered)
    assert field.input_value() == "" and prompt.input_value().count("<user>") == 3


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
        "from neox_lib.playground import jobs; kept = jobs.stream_generate\n"
        "jobs.stream_generate = lambda *a, **k: 1 / 0"
    )
    visit.page.locator(".np textarea").first.fill("Tom")
    visit.button("Generate").click()
    visit.wait("document.querySelector('.np-error').textContent.includes('ZeroDivisionError')")
    visit.execute("jobs.stream_generate = kept")
    visit.generate("Tom")
    assert visit.page.locator(".np-error").first.is_hidden()


def serious_findings(visit: PlaygroundVisit) -> list[dict]:
    """What axe finds serious in the playground's own part of the page, in each of its views."""
    return [found for _ in visit.views() for found in visit.serious_findings(".np")]


def test_nobody_is_asked_about_news(visit):
    """A class that opens a lesson must not be greeted by a question about something else."""
    assert visit.page.locator(".Toastify__toast").all_inner_texts() == []


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


def layout_faults(visit: PlaygroundVisit) -> list[str]:
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
    visit.page.locator(".np-text").first.press("Control+s")
    visit.wait("!window.jupyterapp.shell.currentWidget.context.model.dirty")
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
    visit.execute("one.page.close()\nassert one.session.worker.join(5) and len(one.state.branches.branch.ids) < 1500")
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
    visit.run_cells(len(CELLS))
    visit.page.get_by_text("Back as it was before the page was reloaded.").first.wait_for()
    assert visit.page.locator(".np-text").first.inner_text().startswith("The king said")
    visit.set_tokens(5)
    visit.generate("Tom and Anna")
    assert visit.page.locator(".np-status").first.inner_text() == "Wrote 5 tokens."


def test_nothing_was_asked_of_another_machine_and_no_error_was_logged(visit):
    assert visit.outside == []
    # Of a reopened notebook whose kernel is gone ipywidgets says so, some seconds after the page is back.
    assert [error for error in visit.errors if "widget model not found" not in error] == []


# Collects every text that a visitor can read while a page loads.
READ = """const read = (window.read = new Set());
const look = () => document.body && read.add(document.body.innerText);
new MutationObserver(look).observe(document, {childList: true, subtree: true});
"""


def reload_and_compare(visit: PlaygroundVisit) -> None:
    """A reload of the app starts another kernel, and brings text, branches and settings back all the same."""
    visit.page.locator(".np-text .np-token").nth(7).click()
    visit.page.get_by_text("Position 7,").wait_for()
    visit.page.locator(".np-bars button").first.click()
    visit.wait("document.querySelectorAll('.np-branches li').length === 2")
    visit.settled()
    written = [visit.page.locator(part).inner_text() for part in (".np-text", ".np-branches")]
    visit.page.add_init_script(READ)
    visit.page.reload()
    visit.page.wait_for_selector(".np-branches li")
    visit.settled()
    assert [visit.page.locator(part).inner_text() for part in (".np-text", ".np-branches")] == written
    assert visit.page.get_by_label("tokens", exact=True).input_value() == "6"
    assert visit.page.locator(".np textarea").first.input_value() == "Tom went to the sea"
    read = visit.page.evaluate("[...window.read]")
    assert any("Loading the model" in text for text in read)
    assert not [text for text in read if "un this cell" in text or "Executing" in text or "Running" in text]


def test_the_app_gives_each_visitor_a_text_of_their_own(browser, app):
    """What one student writes is nobody else's; the app shows no code and asks nobody for fonts."""
    one, two = PlaygroundVisit(browser, app), PlaygroundVisit(browser, app)
    for visit in (one, two):
        visit.page.wait_for_selector(".np")
    one.set_tokens(6)
    one.generate("Tom went to the sea")
    assert two.page.locator(".np-text .np-token").count() == 0
    two.set_tokens(7)
    two.generate("Anna had a kite")
    assert "Tom" in one.page.locator(".np-text").inner_text() and "Anna" in two.page.locator(".np-text").inner_text()
    assert one.page.locator("text=import").count() == 0
    assert one.page.title() == one.page.get_by_role("heading", level=1).inner_text().rstrip("¶") == "Prompt playground"
    reload_and_compare(one)
    for visit in (one, two):
        visit.set_tokens(1000)
        visit.button("Generate").click()
        visit.phase("writing")
        visit.button("Stop").click(force=True)
        visit.settled()
        assert visit.outside == [] and visit.errors == []
        visit.close()


@pytest.fixture(scope="module")
def zoomed(browser, app) -> Iterator[PlaygroundVisit]:
    """The app at 200 % on a projector of 1280 x 720, with a text."""
    visit = PlaygroundVisit(browser, app, 640, 360, device_scale_factor=2)
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
