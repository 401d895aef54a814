"""What the library has to say, as lines on stderr."""

import logging
import sys


class MessageLines(logging.Handler):
    """One line for each message, on what is stderr at that moment: ranks other than the first redirect theirs."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"neox_lib: {' '.join(record.getMessage().split())}", file=sys.stderr, flush=True)


LINES = MessageLines()


def show_messages() -> None:
    """Show the messages of the library's modules from now on."""
    logger = logging.getLogger("neox_lib")
    logger.addHandler(LINES)  # once, however often it is called
    logger.setLevel(logging.INFO)
