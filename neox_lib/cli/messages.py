"""The library's log messages, as lines on stderr."""

import logging
import sys


class MessageLines(logging.Handler):
    """Writes one line per message to the current sys.stderr, which ranks other than the first redirect."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"neox_lib: {' '.join(record.getMessage().split())}", file=sys.stderr, flush=True)


LINES = MessageLines()


def show_messages() -> None:
    """Show the messages of the library's modules."""
    logger = logging.getLogger("neox_lib")
    logger.addHandler(LINES)  # once, however often it is called
    logger.setLevel(logging.INFO)
