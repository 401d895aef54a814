"""`playground`: the prompt playground as a page of its own."""

import argparse


def add(commands) -> None:
    description = (
        "Serve the prompt playground as a page on this machine and open it in a browser. Arguments go to Voila, such "
        "as --no-browser or --port=8866."
    )
    parser = commands.add_parser(
        "playground", help="a page to play with the model", description=description, allow_abbrev=False
    )
    parser.set_defaults(run=run, passes_on=True)


def run(arguments: argparse.Namespace) -> None:
    from neox_lib.playground.serve import serve

    serve(arguments.further)
