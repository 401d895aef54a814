"""What the tests in a real browser share: chromium, servers on 127.0.0.1, and what a page must not do."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
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
LAB_SETTINGS = Path(__file__).resolve().parents[1] / "neox_lib" / "assets" / "lab"  # as `make lab` has them
TOKEN = "a-test-of-the-pages"
PATIENCE = 60_000  # milliseconds: a busy machine is slow, not wrong

needs_chromium = [
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
    here |= {"JUPYTER_CONFIG_PATH": str(LAB_SETTINGS), "JUPYTER_PLATFORM_DIRS": "1", "no_proxy": "127.0.0.1"}
    environment = os.environ | here
    log = (folder / "log").open("w")
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


@contextmanager
def serve_lab(own: Path, root: Path, *more: str) -> Iterator[str]:
    """JupyterLab on the notebooks in `root`, its files in `own`: the address, ending in a slash; TOKEN opens it."""
    settings = own / "jupyter_config_dir" / "labconfig"
    settings.mkdir(parents=True)
    by_hand = {"@jupyterlab/docmanager-extension:plugin": {"autosave": False}}  # what is saved, a test has saved
    (settings / "default_setting_overrides.json").write_text(json.dumps(by_hand), encoding="utf-8")
    port = free_port()
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={TOKEN}", "--allow-root"]
    process = serve(own, "jupyterlab", *options, f"--ServerApp.root_dir={root}", *more)
    wait_until_served(f"http://127.0.0.1:{port}/api", process, own / "log")
    yield f"http://127.0.0.1:{port}/"
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


class Visit:
    """A page, and what it must not do: write errors to the console, ask another machine for anything.

    `context` goes to the browser: `color_scheme`, `device_scale_factor`.
    """

    def __init__(self, browser, address: str, width: int = 1280, height: int = 720, **context):
        self.context = browser.new_context(viewport={"width": width, "height": height}, **context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.errors: list[str] = []
        self.outside: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.note(request.url))
        self.page.goto(address)

    def note(self, url: str) -> None:
        if not url.startswith(("http://127.0.0.1:", "file:", "data:", "blob:")):
            self.outside.append(url)

    def serious_findings(self, part: str | None = None) -> list[dict]:
        """What axe finds that shuts people out, contrast included, in the part that a selector names or in all."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page, context=part).response["violations"]
        return [each for each in found if each["impact"] in ("serious", "critical")]

    def close(self) -> None:
        self.context.close()
