"""The command line: python -m neox_lib COMMAND."""

import argparse
import os
import sys

from neox_lib.cli import bench, class_report, convert, doctor, download, generate, info, promote, student, train
from neox_lib.cli.messages import show_messages

COMMANDS = (generate, info, train, convert, download, bench, promote, student, class_report, doctor)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m neox_lib", description="Run and rebuild GPT-NeoX models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(words: list[str] | None = None) -> int:
    """Run a command. Errors that a user can mend are one line on stderr and exit code 2; Ctrl-C is 130."""
    arguments = build_parser().parse_args(words)
    show_messages()
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"neox_lib: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
