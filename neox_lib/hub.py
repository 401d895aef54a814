"""Models on the Hugging Face Hub, by name: looked up, fetched by `huggingface_hub`, and kept in its cache.

This adds what that library lacks (2.4.0, measured over plain HTTP). It compares only sizes: a file with one byte
flipped in transit was accepted and stayed in the cache. It starts although the disk has no room. It publishes files one
by one, where a folder must hold a complete model or none. Like it, we keep no partial file for the next run.

May import checkpoints and every room above it; loading and every room below may import it.
"""

import contextlib
import hashlib
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub  # its parts are imported when they are first used
from huggingface_hub import constants

from neox_lib.checkpoints.files import CheckpointError, check_free_disk, free_bytes
from neox_lib.checkpoints.huggingface.config import read_huggingface_config, stored_dtype
from neox_lib.checkpoints.huggingface.layout import WEIGHT_FILES, find_files, read_index
from neox_lib.checkpoints.int8_stream import Int8Stream
from neox_lib.checkpoints.quantized import INT8_FILE
from neox_lib.checkpoints.tokenizer_files import GENERATION, TOKENIZER_FILES

logger = logging.getLogger(__name__)

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
FILE_ENDINGS = (".safetensors", ".gguf", ".json", ".bin", ".pt", ".yml")
SMALL_FILES = (*TOKENIZER_FILES, GENERATION, "config.json")


class DownloadError(OSError):
    """A download that failed: says what, why, and what to do next."""


@dataclass(frozen=True)
class HubFile:
    """A file on the Hub. `checksum` is the sha256 of a large file (Git LFS), and git's blob id of any other."""

    size: int
    checksum: str


@dataclass(frozen=True)
class Listing:
    """The files of a model, by name, at the newest commit of a revision."""

    model: str
    revision: str
    commit: str
    files: dict[str, HubFile]

    def file(self, name: str) -> HubFile:
        """Raises DownloadError for a name that isn't listed."""
        if name not in self.files:
            raise DownloadError(f"{self.model}: the Hub has no {name!r} for it; tell its owners, or give another model")
        return self.files[name]


@contextlib.contextmanager
def clear_errors(model: str, revision: str) -> Iterator[None]:
    """Turn an error of `huggingface_hub` into a DownloadError of one line that says what to do."""
    from huggingface_hub import errors

    hub, login = constants.ENDPOINT, "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        match cause:
            case errors.GatedRepoError():
                said = f"its owners must grant access; ask for it at {hub}/{model}, then {login}"
            case errors.RevisionNotFoundError():
                said = f"there is no revision {revision!r} at {hub}; the default is main"
            case errors.RepositoryNotFoundError():
                said = f"there is no such model at {hub}; check the name or, if it is private, {login}"
            case errors.OfflineModeIsEnabled():
                said = f"HF_HUB_OFFLINE is set, so {hub} is not contacted; unset it to download"
            case errors.HfHubHTTPError():
                status = cause.response.status_code
                advice = login if status in (401, 403) else "try again later"
                said = f"{hub} answered with HTTP status {status}; {advice}"
            case errors.HFValidationError():
                said = "not a model's name on the Hub; expected one such as EleutherAI/pythia-70m"
            case ValueError() | KeyError() | TypeError() | AttributeError():
                said = f"{hub} did not answer like the Hub ({reason}); is a login page or proxy in between?"
            case _:  # a connection that fails, or the disk
                said = f"can't be fetched from {hub} ({reason}); fix that and run it again: complete files are kept"
        raise DownloadError(f"{model}: {said}") from error


def list_files(model: str, revision: str) -> Listing:
    """Ask the Hub for a model's files, in one request. Raises DownloadError."""
    with clear_errors(model, revision):
        info = huggingface_hub.HfApi().model_info(model, revision=revision, files_metadata=True, timeout=30)
        if not info.sha:
            raise ValueError("no commit")
        files = {
            entry.rfilename: HubFile(entry.lfs.size if entry.lfs else entry.size or 0, checksum)
            for entry in info.siblings or []
            if (checksum := entry.lfs.sha256 if entry.lfs else entry.blob_id)
        }
    return Listing(model, revision, info.sha, files)


def fetch(listing: Listing, name: str, folder: Path | None = None) -> Path:
    """Fetch a file into `folder`, or into the cache, unless it is there, and return its path.

    Raises DownloadError; for a file whose checksum is not the Hub's, after removing it.
    """
    file = listing.file(name)
    with clear_errors(listing.model, listing.revision):
        found = huggingface_hub.hf_hub_download(listing.model, name, revision=listing.commit, local_dir=folder)
    path = Path(found)
    with path.open("rb") as stored:
        if len(file.checksum) == 64:
            digest = hashlib.file_digest(stored, "sha256")
        else:
            digest = hashlib.sha1(b"blob %d\0" % file.size + stored.read(), usedforsecurity=False)
    if digest.hexdigest() != file.checksum:
        for each in {path.resolve(), path}:  # in the cache a file is a link to its blob
            each.unlink(missing_ok=True)
        raise DownloadError(
            f"{listing.model}: {name} arrived damaged (not the Hub's checksum {file.checksum[:12]}...) and was "
            "removed; run the same again. If it recurs, something in between changes the data"
        )
    return path


def choose_files(listing: Listing, folder: Path | None) -> list[str]:
    """The files to fetch: one format of the weights, then the small files, and config.json last: without it a folder is
    not a model. Fetches an index of shards to learn their names. Raises DownloadError for a model without weights that
    we can read, CheckpointError for a damaged index.
    """
    weights = next((name for name in WEIGHT_FILES if name in listing.files), None)
    if weights is None or "config.json" not in listing.files:
        found = ", ".join(sorted(listing.files)[:8]) or "nothing"
        raise DownloadError(
            f"{listing.model}: expected config.json and model*.safetensors or pytorch_model*.bin there, found {found}"
        )
    shards = read_index(fetch(listing, weights, folder)).values() if weights.endswith(".json") else ()
    return [weights, *sorted(set(shards)), *(name for name in SMALL_FILES if name in listing.files)]


def bring(listing: Listing, folder: Path | None) -> Path:
    """Fetch the files of `choose_files` one after another, so an interruption loses only the current one, and return
    their folder. Raises DownloadError and, before fetching weights, CheckpointError when the disk has no room.
    """

    def is_missing(name: str) -> bool:
        if folder is not None:
            return not (folder / name).exists()
        with clear_errors(listing.model, listing.revision):
            plan = huggingface_hub.hf_hub_download(listing.model, name, revision=listing.commit, dry_run=True)
        return plan.will_download

    names, disk = choose_files(listing, folder), folder or Path(constants.HF_HUB_CACHE)
    missing = [file.size for name in names if (file := listing.file(name)) and is_missing(name)]
    logger.info(
        f"{listing.model} ({listing.commit[:8]}): {sum(missing) / 1e6:,.1f} MB in {len(missing)} file(s) to fetch; the "
        f"disk of {disk} has {free_bytes(disk) / 1e9:,.1f} GB free"
    )
    check_free_disk(disk, sum(missing))
    return [fetch(listing, name, folder) for name in names][-1].parent


def publish(listing: Listing, path: Path) -> Path:
    """Record in the cache that the commit of `path`, now complete, is its revision's newest, and return `path`."""
    with clear_errors(listing.model, listing.revision):
        huggingface_hub.hf_hub_download(listing.model, path.name, revision=listing.revision)
    return path


def cached_folder(model: str, revision: str = "main") -> Path | None:
    """A model's snapshot in the cache, if its config and all of its weights are there. Uses no network."""
    try:
        config = huggingface_hub.try_to_load_from_cache(model, "config.json", revision=revision)
        if not isinstance(config, str):
            return None
        find_files(Path(config).parent)
    except ValueError:  # not a name on the Hub; or a CheckpointError: something is missing
        return None
    return Path(config).parent


def download(model: str, revision: str = "main") -> Path:
    """Fetch a model's newest files of `revision` into the cache and return their folder.

    When the Hub doesn't answer, a complete copy in the cache is used, and a message says so. Raises DownloadError,
    and CheckpointError when the disk has no room.
    """
    try:
        listing = list_files(model, revision)
    except DownloadError as error:
        if (folder := cached_folder(model, revision)) is None:
            raise
        logger.warning(f"{error}. Using the copy in the cache")
        return folder
    return publish(listing, bring(listing, None) / "config.json").parent


@contextlib.contextmanager
def new_folder(folder: Path, commit: str) -> Iterator[Path]:
    """A place to fetch into, for one process at a time; renamed to `folder` when everything is there.

    Until then it is inside FOLDER.unfinished, where the next run continues; leftovers of another commit are removed.
    Raises CheckpointError when `folder` exists: files of two models must not mix.
    """
    from huggingface_hub.utils import WeakFileLock

    if folder.exists():
        raise CheckpointError(f"{folder}: already exists; give a new folder, or remove it first")
    work = folder.with_name(f"{folder.name}.unfinished")
    work.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(work / "lock"):
        for other in work.iterdir():
            if other.is_dir() and other.name != commit:
                shutil.rmtree(other)
        for partial in work.rglob("*.incomplete"):  # left by a process that was killed
            partial.unlink()
        place = work / commit
        place.mkdir(exist_ok=True)
        yield place
        shutil.rmtree(place / ".cache", ignore_errors=True)  # huggingface_hub's own records
        place.replace(folder)
        shutil.rmtree(work, ignore_errors=True)


def download_to_folder(model: str, folder: str | Path, revision: str = "main") -> Path:
    """Fetch a model's files into a new folder, bypassing the cache, and return it. Called again after an interruption,
    it continues. Raises DownloadError, and CheckpointError when the disk has no room or the folder exists.
    """
    listing = list_files(model, revision)
    with new_folder(Path(folder), listing.commit) as place:
        bring(listing, place)
    return Path(folder)


def download_int8(model: str, folder: str | Path | None = None, revision: str = "main") -> Path:
    """Fetch a model into a new folder shard by shard, quantizing and deleting each before fetching the next.

    The folder, by default the model's name and -int8, gets `model.int8.safetensors`, the config and the tokenizer.
    Called again after an interruption, it continues after the last finished shard. Raises DownloadError; and
    CheckpointError when the disk has no room, when the folder exists, and for weights that don't match the config.
    """
    folder = Path(folder or f"{model.rpartition('/')[2]}-int8")
    listing = list_files(model, revision)
    with new_folder(folder, listing.commit) as place:
        parts = place / "parts"  # the unfinished file, and the current shard
        parts.mkdir(exist_ok=True)
        first, *names = choose_files(listing, parts)
        for name in names:
            if name in SMALL_FILES:
                fetch(listing, name, place)
        stream = Int8Stream(parts, read_huggingface_config(place), stored_dtype(place))
        if first.endswith(".json"):
            stream.check_complete(first, read_index(parts / first))
        shards = [name for name in (first, *names) if name.endswith((".safetensors", ".bin"))]
        sizes = [listing.file(name).size for name in shards if name not in stream.done]
        largest = max(sizes, default=0)
        held = sum(path.stat().st_size for path in parts.iterdir() if path.name in shards)
        logger.info(
            f"{model} ({listing.commit[:8]}): {sum(sizes) / 1e9:,.2f} GB in {len(sizes)} of {len(shards)} shard(s) to "
            f"fetch; the int8 file takes {stream.nbytes / 1e9:,.2f} GB and the largest shard {largest / 1e9:,.2f} GB; "
            f"the disk has {free_bytes(place) / 1e9:,.1f} GB free"
        )
        check_free_disk(place, stream.missing_bytes() + largest - held)
        for name in shards:
            if name not in stream.done:
                stream.add(fetch(listing, name, parts))
            (parts / name).unlink(missing_ok=True)
        stream.finish(place / INT8_FILE)
        shutil.rmtree(parts)
    return folder


def is_hub_name(path: str | Path | None) -> bool:
    """Whether to look for this on the Hub: a string like OWNER/NAME that is no path on this disk.

    >>> is_hub_name("EleutherAI/pythia-70m")
    True
    >>> [is_hub_name(path) for path in ("./runs/model", "runs/first/model", "model", "runs/model.int8.safetensors")]
    [False, False, False, False]
    """
    if not isinstance(path, str) or not HUB_NAME.fullmatch(path) or path.endswith(FILE_ENDINGS):
        return False
    return not Path(path).exists()


def local_path(path: str | Path, revision: str = "main") -> Path:
    """The local path of a checkpoint, which may be given by its name on the Hub.

    A model in the Hub's cache is used from there without the network; otherwise it is downloaded, and messages say so.
    Raises DownloadError, and CheckpointError when the disk has no room.
    """
    if not is_hub_name(path):
        return Path(path)
    try:
        return cached_folder(str(path), revision) or download(str(path), revision)
    except DownloadError as error:
        raise DownloadError(f"no folder {path} here; on the Hub: {error}") from error


def local_tokenizer(path: str | Path, revision: str = "main") -> Path:
    """The local path of a tokenizer, or of a folder with one; for a name on the Hub only the tokenizer is fetched,
    unless it is in the cache. Raises DownloadError.
    """
    if not is_hub_name(path):
        return Path(path)
    try:
        cached = huggingface_hub.try_to_load_from_cache(str(path), "tokenizer.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        listing = list_files(str(path), revision)
        return publish(listing, fetch(listing, "tokenizer.json"))
    except DownloadError as error:
        raise DownloadError(f"no file or folder {path} here; on the Hub: {error}") from error
