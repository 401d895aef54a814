"""The container that opens the series in one click: in the form of its specification, doing what README says."""

import json
import re
from pathlib import Path

import jsonschema
import pytest

ROOT = Path(__file__).resolve().parents[1]
CONTAINER = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text("utf-8"))
TEXT, SIZE = {"type": "string", "minLength": 1}, {"type": "string", "pattern": r"^\d+([tgmk]b)?$"}
PORT = {"type": "integer", "minimum": 0, "maximum": 65535}
# The properties that are used here, with the types of https://containers.dev/implementors/json_reference/
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["image"],
    "properties": {
        "name": TEXT,
        "image": TEXT,
        "hostRequirements": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"cpus": {"type": "integer", "minimum": 1}, "memory": SIZE, "storage": SIZE},
        },
        "updateContentCommand": TEXT,
        "forwardPorts": {"type": "array", "items": PORT},
        "portsAttributes": {
            "type": "object",
            "additionalProperties": {"type": "object", "additionalProperties": False, "properties": {"label": TEXT}},
        },
        "customizations": {"type": "object"},
    },
}


def test_it_has_the_form_that_the_specification_gives():
    jsonschema.validate(CONTAINER, SCHEMA)


def test_the_schema_notices_a_wrong_type():
    with pytest.raises(jsonschema.ValidationError, match="'eight'"):
        jsonschema.validate(CONTAINER | {"forwardPorts": ["eight"]}, SCHEMA)


def test_it_sets_up_by_a_command_that_the_makefile_has():
    command, target = CONTAINER["updateContentCommand"].split()
    assert command == "make"
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


def test_every_forwarded_port_says_what_it_is_for():
    assert {str(port) for port in CONTAINER["forwardPorts"]} == set(CONTAINER["portsAttributes"])
