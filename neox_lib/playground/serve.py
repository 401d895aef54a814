"""The playground as a page of its own, served by Voila on this machine. Each visitor has their own kernel."""

import os
from pathlib import Path

FILES = Path(__file__).parents[1] / "assets" / "playground"


def only_from_here(self) -> None:
    """Let a closed page end its kernel, as Voila means it to: its referrer shows that it is a page of this server.

    It asks by a beacon, which can't carry the token that Voila 0.5 wants, and the kernel would be left running.
    """
    if not self.check_referer():
        from tornado.web import HTTPError

        raise HTTPError(403)


def serve(arguments: list[str]) -> None:
    """Serve until it is interrupted, on 127.0.0.1 unless an argument says otherwise; `arguments` go to Voila."""
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(FILES), os.environ.get("JUPYTER_PATH")]))
    from voila.app import main  # imported here, because it reads its paths on import
    from voila.shutdown_kernel_handler import VoilaShutdownKernelHandler

    VoilaShutdownKernelHandler.check_xsrf_cookie = only_from_here  # type: ignore[method-assign]
    options = ["--Voila.ip=127.0.0.1", "--template=playground", "--VoilaConfiguration.show_tracebacks=True"]
    main([str(FILES / "app.ipynb"), *options, *arguments])
