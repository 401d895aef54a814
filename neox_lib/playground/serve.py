"""The playground as a page of its own, served by Voila on this machine:

    python -m neox_lib.playground.serve --port=8866

Every visitor gets a kernel, and so a text, of their own. Further arguments go to Voila.
"""

import os
import sys
from pathlib import Path

FILES = Path(__file__).parents[1] / "assets" / "playground"


def main(arguments: list[str]) -> None:
    """Serve until it is interrupted, on 127.0.0.1 unless an argument says otherwise."""
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(FILES), os.environ.get("JUPYTER_PATH")]))
    from voila.app import main as serve  # only now: it reads its paths when it is imported

    options = ["--Voila.ip=127.0.0.1", "--template=playground", "--VoilaConfiguration.show_tracebacks=True"]
    serve([str(FILES / "app.ipynb"), *options, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
