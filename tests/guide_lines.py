"""Types lines of the guides into one process, in the current folder: a list of lines comes in as JSON, results go out.

`python -m neox_lib ...` runs as the command line runs it, but without a new process, whose start takes longer than most
of these commands; a block of Python is executed; everything else goes to bash. A result is the exit code and the end of
what was said.
"""

import contextlib
import io
import json
import shlex
import subprocess
import sys
import traceback

VERB = "python -m neox_lib "


def run_verb(line: str) -> int:
    from neox_lib.__main__ import main

    try:
        return main(shlex.split(line.removeprefix(VERB), comments=True))
    except SystemExit as end:
        return int(end.code or 0) if isinstance(end.code, int | None) else 1


def run(line: str) -> tuple[int, str]:
    if "\n" not in line and not line.startswith(VERB):
        done = subprocess.run(["bash", "-c", line], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = run_verb(line) if line.startswith(VERB) else exec(line, {}) or 0
        except Exception:
            code = 1
            traceback.print_exc()
    return code, said.getvalue()


if __name__ == "__main__":
    results = {line: run(line) for line in json.load(sys.stdin)}
    print(json.dumps({line: (code, said[-2000:]) for line, (code, said) in results.items()}))
