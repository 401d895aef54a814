"""Models on the Hugging Face Hub, by name: looked up, fetched by `huggingface_hub`, and kept in its cache.

This adds what that library lacks (2.4.0, measured over plain HTTP). It compares only sizes: a file with one byte
flipped in transit was accepted and stayed in the cache. It starts although the disk has no room. It publishes files one
by one, where a folder must hold a complete model or none. Like it, we keep no partial file for the next run.

May import checkpoints and every room above it; loading and every room below may import it.
"""

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub  # its parts are imported when they are first used
import torch
from huggingface_hub import constants

from neox_lib.checkpoints.adapters.layout import ADAPTER_CONFIG, ADAPTER_FILES, is_adapter, read_lora
from neox_lib.checkpoints.cached import cached_folder, is_hub_name
from neox_lib.checkpoints.checkpoint import Checkpoint, LayerFile
from neox_lib.checkpoints.files import CheckpointError, check_free_disk, free_bytes, read_object
from neox_lib.checkpoints.huggingface.config import read_huggingface_config, stored_dtype
from neox_lib.checkpoints.huggingface.layout import WEIGHT_FILES, read_index
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.checkpoints.quantized import file_in_folder
from neox_lib.checkpoints.quantized_by_others import check_own_config, check_size
from neox_lib.checkpoints.quantized_stream import QuantizedStream
from neox_lib.checkpoints.tokenizer_files import GENERATION, OLDER_FILES, TOKENIZER_FILES, TOKENIZERS
from neox_lib.config import NeoXConfig
from neox_lib.quantization.linear import dtype_name

logger = logging.getLogger(__name__)


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


def fetch_small(listing: Listing, folder: Path | None = None) -> Path:
    """Fetch the files that say what a model is, config and tokenizer, and return the config's path. An adapter's is its
    own: the base model has a name of its own.

    Raises DownloadError for a model without weights that we can read, and CheckpointError for one that can't be run, so
    that nothing large is fetched in vain.
    """
    adapter = ADAPTER_CONFIG in listing.files
    config, weights = (ADAPTER_CONFIG, ADAPTER_FILES) if adapter else ("config.json", WEIGHT_FILES)
    if config not in listing.files or listing.files.keys().isdisjoint(weights):
        check_own_config(listing.model, listing.files, {})
        found = ", ".join(sorted(listing.files)[:8]) or "nothing"
        raise DownloadError(
            f"{listing.model}: expected config.json and model*.safetensors or pytorch_model*.bin there, or a LoRA "
            f"adapter's files, found {found}"
        )
    older = () if "tokenizer.json" in listing.files else OLDER_FILES
    names = [name for name in (*TOKENIZER_FILES, *older, GENERATION) if name in listing.files]
    path = [fetch(listing, name, folder) for name in (*names, config)][-1]
    if adapter:
        read_lora(path.parent)
    else:
        read_huggingface_config(path.parent)
    return path


def weight_files(listing: Listing, config: Path, folder: Path | None) -> list[str]:
    """The names of one format's weights; an index of shards, whose files come after it, is fetched into `folder`.

    Raises CheckpointError for a damaged index, for quantized weights, and for a whole model beside an adapter.
    """
    known = ADAPTER_FILES if config.name == ADAPTER_CONFIG else WEIGHT_FILES
    first = next(name for name in known if name in listing.files)
    if known is ADAPTER_FILES:
        if not listing.files.keys().isdisjoint(WEIGHT_FILES):
            raise CheckpointError(f"{listing.model}: holds a whole model and an adapter; give one that has only one")
        return [first]
    shards = sorted(set(read_index(fetch(listing, first, folder)).values())) if first.endswith(".json") else []
    nbytes = sum(listing.file(name).size for name in shards or [first])
    half_precision = read_huggingface_config(config.parent).weight_bytes(torch.float16)
    check_size(listing.model, read_object(config), nbytes, half_precision)
    return [first, *shards]


def bring(listing: Listing, folder: Path | None) -> Path:
    """Fetch a model's files one after another, so an interruption loses only the current one, and return its config's
    path. The weights come last: without them a folder is not a model. Raises DownloadError and, before fetching
    weights, CheckpointError as `fetch_small` does and when the disk has no room.
    """

    def is_missing(name: str) -> bool:
        if folder is not None:
            return not (folder / name).exists()
        with clear_errors(listing.model, listing.revision):
            plan = huggingface_hub.hf_hub_download(listing.model, name, revision=listing.commit, dry_run=True)
        return plan.will_download

    config, disk = fetch_small(listing, folder), folder or Path(constants.HF_HUB_CACHE)
    names = weight_files(listing, config, folder)
    missing = [file.size for name in names if (file := listing.file(name)) and is_missing(name)]
    logger.info(
        f"{listing.model} ({listing.commit[:8]}): {sum(missing) / 1e6:,.1f} MB in {len(missing)} file(s) to fetch; the "
        f"disk of {disk} has {free_bytes(disk) / 1e9:,.1f} GB free"
    )
    check_free_disk(disk, sum(missing))
    for name in names:
        fetch(listing, name, folder)
    return config


def publish(listing: Listing, path: Path) -> Path:
    """Record in the cache that the commit of `path`, now complete, is its revision's newest, and return `path`."""
    with clear_errors(listing.model, listing.revision):
        huggingface_hub.hf_hub_download(listing.model, path.name, revision=listing.revision)
    return path


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
    return publish(listing, bring(listing, None)).parent


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


def download_quantized(
    model: str, folder: str | Path | None = None, revision: str = "main", dtype: torch.dtype = torch.int8
) -> Path:
    """Fetch a model into a new folder shard by shard, quantizing and deleting each before fetching the next.

    The folder, by default the model's name and -int8 (or -int4), gets the quantized file, the config and the tokenizer.
    Called again after an interruption, it continues after the last finished shard. Raises DownloadError; and
    CheckpointError when the disk has no room, when the folder exists, and for weights that don't match the config.
    """
    kind = dtype_name(dtype)
    folder = Path(folder or f"{model.rpartition('/')[2]}-{kind}")
    listing = list_files(model, revision)
    with new_folder(folder, listing.commit) as place:
        parts = place / "parts"  # the unfinished file, and the current shard
        parts.mkdir(exist_ok=True)
        config = fetch_small(listing, place)
        if config.name == ADAPTER_CONFIG:
            raise DownloadError(f"{model}: an adapter; download it without --to, then convert it to {kind}")
        first, *shards = weight_files(listing, config, parts)
        stream = QuantizedStream(parts, read_huggingface_config(place), stored_dtype(place), dtype)
        if first.endswith(".json"):
            stream.check_complete(first, read_index(parts / first))
        shards = shards or [first]
        sizes = [listing.file(name).size for name in shards if name not in stream.done]
        largest = max(sizes, default=0)
        held = sum(path.stat().st_size for path in parts.iterdir() if path.name in shards)
        logger.info(
            f"{model} ({listing.commit[:8]}): {sum(sizes) / 1e9:,.2f} GB in {len(sizes)} of {len(shards)} shard(s) to "
            f"fetch; the {kind} file takes {stream.nbytes / 1e9:,.2f} GB, the largest shard {largest / 1e9:,.2f} GB; "
            f"the disk has {free_bytes(place) / 1e9:,.1f} GB free"
        )
        check_free_disk(place, stream.missing_bytes() + largest - held)
        for name in shards:
            if name not in stream.done:
                stream.add(fetch(listing, name, parts))
            (parts / name).unlink(missing_ok=True)
        stream.finish(place / file_in_folder(dtype))
        shutil.rmtree(parts)
    return folder


def is_on_the_hub(path: str | Path, revision: str) -> bool:
    """`is_hub_name`. Raises ValueError for a revision of what is on this disk: another one would be used, unnoticed."""
    found = is_hub_name(path)
    if revision != "main" and not found:
        raise ValueError(
            f"{path}: looked for on this disk, where models have no revision {revision!r}; leave it out, or give a "
            "name on the Hub"
        )
    return found


def local_path(path: str | Path, revision: str = "main") -> Path:
    """The local path of a checkpoint, which may be given by its name on the Hub. The base model of an adapter is on
    this machine as well then.

    A model in the Hub's cache is used from there without the network; otherwise it is downloaded, and messages say so.
    Raises DownloadError, CheckpointError when the disk has no room, and ValueError for a revision of another path.
    """
    folder = Path(path)
    if is_on_the_hub(path, revision):
        try:
            folder = cached_folder(str(path), revision) or download(str(path), revision)
        except DownloadError as error:
            raise DownloadError(f"no folder {path} here; on the Hub: {error}") from error
    bring_base(folder)
    return folder


def bring_base(folder: Path) -> None:
    """Fetch the base model of an adapter, unless it is here; of another folder nothing. Raises what `download` does."""
    if is_adapter(folder):
        find_base_on_the_hub(folder, cached_folder, download)


Find = Callable[[str, str], Path | None]  # from a model's name and revision


def find_base_on_the_hub(folder: Path, cached: Find, fetch: Find) -> Path | None:
    """What one of these finds of the base model of an adapter; None where the base isn't named as on the Hub. Raises
    DownloadError, naming the adapter.
    """
    lora = read_lora(folder)
    if not is_hub_name(lora.base):
        return None
    try:
        return cached(lora.base, lora.base_revision) or fetch(lora.base, lora.base_revision)
    except DownloadError as error:
        raise DownloadError(f"{folder / ADAPTER_CONFIG}: its base model is not here; on the Hub: {error}") from error


def local_tokenizer(path: str | Path, revision: str = "main") -> Path:
    """The local path of a tokenizer, or of a folder with one; for a name on the Hub only the tokenizer is fetched,
    unless it is in the cache. An adapter without one has its base model's. Raises DownloadError, and ValueError as
    `local_path` does.
    """
    folder = Path(path)
    if is_on_the_hub(path, revision):
        try:
            folder = cached_tokenizer(str(path), revision) or fetch_tokenizer(str(path), revision)
        except DownloadError as error:
            raise DownloadError(f"no file or folder {path} here; on the Hub: {error}") from error
    if is_adapter(folder) and not any((folder / name).is_file() for name in TOKENIZERS):
        folder = find_base_on_the_hub(folder, cached_tokenizer, fetch_tokenizer) or folder
    return folder


def cached_tokenizer(model: str, revision: str) -> Path | None:
    """A model's snapshot in the cache, if it has a tokenizer, or an adapter's config, which leads to one."""
    for name in (*TOKENIZERS, ADAPTER_CONFIG):
        found = huggingface_hub.try_to_load_from_cache(model, name, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def fetch_tokenizer(model: str, revision: str) -> Path:
    """Fetch a model's tokenizer, or an adapter's config, which leads to one, and return its folder in the cache."""
    listing = list_files(model, revision)
    main = next((name for name in (*TOKENIZERS, ADAPTER_CONFIG) if name in listing.files), TOKENIZERS[0])
    beside = (*TOKENIZER_FILES, *OLDER_FILES) if main in OLDER_FILES else ()
    for name in beside:
        if name in listing.files and name != main:
            fetch(listing, name)
    return publish(listing, fetch(listing, main)).parent


@dataclass(frozen=True)
class OnTheHub:
    """What can be said about a model before its weights are fetched; as a string, where it is."""

    listing: Listing
    config: NeoXConfig
    dtype: torch.dtype
    weights: list[str]

    def __str__(self) -> str:
        return f"{self.listing.model} on the Hub, revision {self.listing.revision}, commit {self.listing.commit[:8]}"

    @property
    def float_dtype(self) -> torch.dtype:
        return self.dtype

    def files(self) -> list[LayerFile]:
        return [LayerFile(name, 0, "not fetched yet", self.listing.file(name).size) for name in self.weights]


def look_up(path: str | Path, revision: str = "main") -> Checkpoint | OnTheHub:
    """A checkpoint, opened; or, for a name on the Hub that isn't in the cache, what its small files and the list of its
    weights say. Raises DownloadError, also for an adapter in that list: its base model is another one; and
    CheckpointError as `open_checkpoint` and `fetch_small` do; and ValueError as `local_path` does.
    """
    if not is_on_the_hub(path, revision):
        return open_checkpoint(path)
    if (folder := cached_folder(str(path), revision)) is not None:
        return open_checkpoint(folder)
    listing = list_files(str(path), revision)
    config = fetch_small(listing)
    if config.name == ADAPTER_CONFIG:
        raise DownloadError(f"{path}: an adapter of {read_lora(config.parent).base}; download both, then ask again")
    weights = [name for name in weight_files(listing, config, None) if not name.endswith(".json")]
    return OnTheHub(listing, read_huggingface_config(config.parent), stored_dtype(config.parent), weights)
