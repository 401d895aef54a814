"""One file from the Hub to the disk: goes on where it stopped, and gets its name only with the right checksum."""

import contextlib
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import WeakFileLock, build_hf_headers, get_session, hf_raise_for_status

from neox_lib.hub.listing import DownloadError, HTTPError, HubFile, Listing, hub_errors

PAUSES = (0.5, 1, 2, 4, 8)  # seconds before each new try after a connection that brought nothing
PASSING = (408, 429, 500, 502, 503, 504)  # HTTP statuses that may be gone at the next try


class Progress(Protocol):
    """What a fetch reports bytes to: tqdm's bar, or anything with its `update`."""

    def update(self, n: int, /) -> object: ...


@dataclass(frozen=True)
class Place:
    """Where a file goes: its final path, where its bytes gather until they are whole, and who may write them."""

    target: Path
    partial: Path
    lock: Path

    def bytes_there(self) -> int:
        """How many bytes of the file have arrived before now."""
        path = self.target if self.target.exists() else self.partial
        return path.stat().st_size if path.exists() else 0


def holds(path: Path, file: HubFile) -> bool:
    """Whether `path` holds exactly the bytes of `file`; reads all of it."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    # git's id of a blob is the sha1 of a short header and the content
    digest = hashlib.sha256() if file.is_large else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as stored:
        while block := stored.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == file.checksum


def fetch(listing: Listing, file: HubFile, place: Place, progress: Progress) -> None:
    """Bring `file` to `place.target`. What has arrived stays in `place.partial` when this is interrupted.

    Other processes that want the same file wait for this one. Raises DownloadError when the network, the Hub or the
    disk fails, and when the checksum is not the Hub's: then the partial file is removed.
    """
    try:
        for path in (place.target, place.partial, place.lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        with hub_errors(listing.model, listing.commit), WeakFileLock(place.lock):
            if place.target.exists():  # through another process, while this one waited
                return
            with place.partial.open("ab") as stored:
                receive(listing, file, stored, progress)
                os.fsync(stored.fileno())
            if not holds(place.partial, file):
                place.partial.unlink()
                raise DownloadError(
                    f"{listing.model}: {file.name} arrived damaged (not the Hub's checksum {file.checksum[:12]}...) "
                    "and was removed; run the same again. If it recurs, something on the way changes the data"
                )
            os.replace(place.partial, place.target)
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(
            f"{place.target}: can't be written ({error.strerror or error}); what has arrived is kept: mend that and "
            "run the same again"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # on Windows one that another process waits for stays
            place.lock.unlink()


def receive(listing: Listing, file: HubFile, stored: BinaryIO, progress: Progress) -> None:
    """Append what is missing of a file, over as many connections as it takes.

    One that breaks is followed by the next, from the byte where it broke. Raises DownloadError after five in a row that
    brought nothing.
    """
    if stored.tell() > file.size:
        stored.seek(0)
        stored.truncate()
    fruitless = 0
    while (have := stored.tell()) < file.size:
        reason = "it ended early"
        try:
            receive_once(listing, file, stored, progress)
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code not in PASSING:
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
        if stored.tell() > have:
            fruitless = 0
        elif fruitless == len(PAUSES):
            raise DownloadError(
                f"{listing.model}: the connection breaks off at {have:,} of the {file.size:,} bytes of {file.name} "
                f"({reason}); they are kept: run the same again to go on"
            )
        else:
            time.sleep(PAUSES[fruitless])
            fruitless += 1


def receive_once(listing: Listing, file: HubFile, stored: BinaryIO, progress: Progress) -> None:
    """What one connection brings. Every piece is written as it comes, so that none is lost with the process."""
    have = stored.tell()
    url = hf_hub_url(listing.model, file.name, revision=listing.commit, endpoint=constants.ENDPOINT)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        if have and response.status_code == 200:  # a server without ranges sends the whole file again
            stored.seek(0)
            stored.truncate()
            progress.update(-have)
        for piece in response.iter_bytes():
            stored.write(piece)
            stored.flush()
            progress.update(len(piece))
            if stored.tell() > file.size:
                return  # no file of ours, as its checksum will say; don't let it fill the disk
