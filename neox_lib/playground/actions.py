"""The messages that a page may send, and what each does. Nothing else comes from a page."""

from typing import Any

from neox_lib.playground.session import Session


def perform(session: Session, message: dict) -> None:
    """Do what a message such as {"do": "look", "position": 7} asks for.

    Text and settings travel with the messages that need them, so that what runs is what was on the screen. Raises
    ValueError for a message that makes no sense, naming what it has and what it should have.
    """
    action = message.get("do")
    if action in ("generate", "continue", "prompt", "settings", "take"):
        if "settings" in message:
            session.set(**expect(message, "settings", dict))
        if "prompt" in message:
            session.set_prompt(expect(message, "prompt", str))
    match action:
        case "prompt" | "settings":
            pass
        case "generate":
            session.generate()
        case "continue":
            session.go_on()
        case "stop":
            session.stop()
        case "clear":
            session.clear()
        case "look":
            session.look(expect(message, "position", int))
        case "take":
            session.take(expect(message, "token", int))
        case "branch":
            session.choose_branch(expect(message, "branch", int))
        case "watch":
            session.watch(expect(message, "on", bool))
        case "head":
            session.choose_head(expect(message, "layer", int), expect(message, "head", int))
        case _:
            raise ValueError(f"the page asked for {action!r}, which the playground can't do")


def expect(message: dict, key: str, kind: type) -> Any:
    """A message's value, of the right type. Raises ValueError."""
    value = message.get(key)
    if type(value) is not kind:
        raise ValueError(f"{message.get('do')}: {key} should be {kind.__name__}, got {value!r}")
    return value
