"""The messages that a page may send, and what each does. Nothing else comes from a page."""

from typing import Any

from neox_lib.playground.session import Session


def perform(session: Session, message: dict) -> None:
    """Do what a message such as {"do": "look", "position": 7} asks for.

    Text and settings travel with the message that needs them, so what runs is what the screen showed. Raises ValueError
    for an invalid message, naming what it holds and what was expected.
    """
    action = message.get("do")
    if action in ("generate", "continue", "prompt", "settings", "take", "send"):
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
        case "send":
            session.send(expect(message, "text", str))
        case "stop":
            session.stop()
        case "clear":
            session.clear()
        case "restore":
            session.restore(expect(message, "saved", dict))
        case "look":
            session.look(expect(message, "position", int))
        case "take":
            session.take(expect(message, "token", int))
        case "branch":
            session.choose_branch(expect(message, "branch", int))
        case "watch":
            session.watch(expect(message, "view", str))
        case "head":
            session.choose_head(expect(message, "layer", int), expect(message, "head", int))
        case _:
            raise ValueError(f"the page asked for {action!r}, which the playground does not know")


def expect(message: dict, key: str, kind: type) -> Any:
    """A field of a message. Raises ValueError if its type is wrong."""
    value = message.get(key)
    if type(value) is not kind:
        raise ValueError(f"{message.get('do')}: {key} should be {kind.__name__}, got {value!r}")
    return value
