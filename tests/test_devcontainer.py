"""The container that opens the series in one click sets itself up by a command that exists."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONTAINER = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text("utf-8"))


def test_it_sets_up_by_a_command_that_the_makefile_has():
    command, target = CONTAINER["updateContentCommand"].split()
    assert command == "make"
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


def test_every_forwarded_port_says_what_it_is_for():
    assert {str(port) for port in CONTAINER["forwardPorts"]} == set(CONTAINER["portsAttributes"])
