"""A page with playgrounds, for tests: what one presses, and what one waits for."""

from collections.abc import Iterator

from tests.browsing import Visit

IDLE = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"


class PlaygroundVisit(Visit):
    """A page with playgrounds: the first of them, unless something else is said."""

    def run_cells(self, playgrounds: int) -> None:
        """Run the whole notebook and wait for as many playgrounds."""
        self.page.wait_for_function(IDLE)
        self.command("notebook:run-all-cells")
        self.wait(f"document.querySelectorAll('.np').length === {playgrounds}")

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
