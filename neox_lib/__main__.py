"""The command line: python -m neox_lib COMMAND."""

import argparse
import io
import os
import sys

from neox_lib.cli import (
    bench,
    class_report,
    convert,
    doctor,
    download,
    evaluate,
    full_size,
    generate,
    info,
    learner_copy,
    playground,
    promote,
    slides,
    store_outputs,
    student,
    train,
    write_stories,
)
from neox_lib.cli.messages import show_messages

COMMANDS = {
    "to learn": (generate, playground, learner_copy, promote),
    "models and weights": (info, download, convert, train, write_stories, evaluate, bench, full_size),
    "to teach": (doctor, slides, student, class_report),
    "for authors": (store_outputs,),
}


class GroupedHelp(argparse.HelpFormatter):
    """Writes a heading above the first command of each group."""

    def __init__(self, prog: str):
        super().__init__(prog)
        self._action_max_length = 18  # or the longest names stand on a line of their own

    def _format_action(self, action: argparse.Action) -> str:
        headings = {commands[0].__name__.split(".")[-1]: heading for heading, commands in COMMANDS.items()}
        heading = headings.get(action.dest.replace("-", "_"))
        return (f"\n  {heading}\n" if heading else "") + super()._format_action(action)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m neox_lib",
        description="Run and rebuild GPT-NeoX models. COMMAND --help says more about each.",
        formatter_class=GroupedHelp,
    )
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for group in COMMANDS.values():
        for command in group:
            command.add(commands)
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The parsed arguments. For a command that passes arguments on, those it doesn't know are in `further`."""
    parser = build_parser()
    arguments, further = parser.parse_known_args(argv)
    if further and not getattr(arguments, "passes_on", False):
        parser.error(f"unrecognized arguments: {' '.join(further)}")
    arguments.further = further
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run a command. Errors that a user can fix give one line on stderr and exit code 2; Ctrl-C gives 130."""
    arguments = parse(argv)
    show_messages()
    if isinstance(sys.stdout, io.TextIOWrapper):  # what the terminal can't spell is shown as ? and ends nothing
        sys.stdout.reconfigure(errors="replace")
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
