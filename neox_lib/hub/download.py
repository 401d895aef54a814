"""Models from the Hugging Face Hub: into the cache that all programs share, or into a folder of your own."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import tqdm

from neox_lib.checkpoints.atomic import write_text_atomically
from neox_lib.checkpoints.files import CheckpointError, check_free_disk, free_bytes
from neox_lib.hub.fetch import Place, fetch, holds
from neox_lib.hub.listing import SMALL_FILES, DownloadError, HubFile, Listing, hub_errors, list_files, weight_files

logger = logging.getLogger(__name__)

SPARE = 50_000_000  # bytes of disk that a download leaves alone
PlaceOf = Callable[[HubFile], Place]


def cache_place(model: str, file: HubFile) -> Place:
    """A file's place in the Hub's cache, by the layout that huggingface_hub documents: blobs by their checksum."""
    cache, repo = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=model, repo_type="model")
    blob = cache / repo / "blobs" / file.checksum
    return Place(blob, blob.with_name(f"{blob.name}.incomplete"), cache / ".locks" / repo / f"{blob.name}.lock")


def folder_place(folder: Path, file: HubFile) -> Place:
    """A file's place in a folder of the user's; what is unfinished carries the checksum that it shall have."""
    unfinished = folder / f".{file.name}.{file.checksum[:12]}.partial"
    return Place(folder / file.name, unfinished, unfinished.with_name(f"{unfinished.name}.lock"))


def choose_files(listing: Listing, place_of: PlaceOf) -> list[HubFile]:
    """The files that we need of a model, small ones first; an index of shards is fetched to learn their names.

    Raises DownloadError when the model has no weights of a kind that we read.
    """

    def read_index(name: str) -> Path:
        file = listing.files[name]
        if not place_of(file).target.exists():
            fetch(listing, file, place_of(file), tqdm(disable=True))
        return place_of(file).target

    weights = weight_files(set(listing.files), read_index)
    if not weights or "config.json" not in listing.files:
        found = ", ".join(sorted(listing.files)[:8]) or "nothing"
        raise DownloadError(
            f"{listing.model}: expected config.json and model*.safetensors or pytorch_model*.bin there, found {found}"
        )
    return listing.pick([name for name in SMALL_FILES if name in listing.files] + weights)


def bring(listing: Listing, files: list[HubFile], place_of: PlaceOf, folder: Path) -> None:
    """Fetch what is missing of `files`, after a message that says how much that is and what the disk has free.

    Raises CheckpointError, before anything is fetched, when the disk of `folder` has no room for it.
    """
    missing = [file for file in files if not place_of(file).target.exists()]
    total, there = sum(file.size for file in missing), sum(place_of(file).bytes_there() for file in missing)
    if not missing:
        logger.info("%s (%s): all of it is there already", listing.model, listing.commit[:8])
        return
    resumed = f" ({there / 1e6:,.1f} MB of them have arrived before)" if there else ""
    logger.info(
        f"{listing.model} ({listing.commit[:8]}): {total / 1e6:,.1f} MB in {len(missing)} file(s) to fetch{resumed}; "
        f"the disk of {folder} has {free_bytes(folder) / 1e9:,.1f} GB free"
    )
    check_free_disk(folder, total - there + SPARE)
    with tqdm(total=total, initial=there, unit="B", unit_scale=True, desc=listing.model, mininterval=0.5) as bar:
        for file in missing:
            fetch(listing, file, place_of(file), bar)


def publish(listing: Listing, files: list[HubFile], revision: str) -> Path:
    """Give blobs in the cache the names of a snapshot, as any program looks for them, and return its folder."""
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=listing.model, repo_type="model")
    with hub_errors(listing.model, revision):
        for file in files:  # the blob is there, so this downloads nothing
            hf_hub_download(listing.model, file.name, revision=listing.commit)
    if revision != listing.commit:
        write_text_atomically(folder / "refs" / revision, listing.commit)
    return folder / "snapshots" / listing.commit


def cached_folder(model: str, revision: str = "main") -> Path | None:
    """The snapshot of a model in the cache, when its config and all of its weights are there. Asks nobody."""
    try:
        config = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        weights = weight_files({path.name for path in folder.iterdir()}, lambda name: folder / name)
    except DownloadError:
        return None
    return folder if weights and all((folder / name).is_file() for name in weights) else None


def download_to_cache(model: str, revision: str = "main") -> Path:
    """Bring a model's newest files of `revision` into the cache and return their folder.

    When the Hub doesn't answer, a whole copy in the cache is taken, and a message says so. Raises DownloadError,
    and CheckpointError when the disk has no room.
    """
    place_of = partial(cache_place, model)
    try:
        listing = list_files(model, revision)
    except DownloadError as error:
        folder = cached_folder(model, revision)
        if folder is None:
            raise
        logger.warning(f"{error}. Taking the copy in the cache")
        return folder
    files = choose_files(listing, place_of)
    bring(listing, files, place_of, Path(constants.HF_HUB_CACHE))
    return publish(listing, files, revision)


def download_tokenizer(model: str, revision: str = "main") -> Path:
    """Bring a model's tokenizer.json alone into the cache and return its path. Raises DownloadError."""
    place_of = partial(cache_place, model)
    listing = list_files(model, revision)
    if "tokenizer.json" not in listing.files:
        raise DownloadError(f"{model}: has no tokenizer.json on the Hub; give a tokenizer file")
    files = listing.pick(["tokenizer.json"])
    bring(listing, files, place_of, Path(constants.HF_HUB_CACHE))
    return publish(listing, files, revision) / "tokenizer.json"


def download_to_folder(model: str, folder: str | Path, revision: str = "main") -> Path:
    """Bring a model's files into a folder, past the cache, and return it.

    A file that is there already is checked, not fetched. Raises DownloadError, and CheckpointError when the disk has no
    room or the folder holds another model's files.
    """
    folder = Path(folder)
    place_of = partial(folder_place, folder)
    listing = list_files(model, revision)
    small = [file for name, file in listing.files.items() if name in SMALL_FILES or name.endswith(".index.json")]
    check_same(folder, small)
    files = choose_files(listing, place_of)
    check_same(folder, files)
    bring(listing, files, place_of, folder)
    return folder


def check_same(folder: Path, files: list[HubFile]) -> None:
    """Raise CheckpointError unless each of `files` that lies in the folder is exactly the Hub's."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: a file; give a folder to download into")
    for file in files:
        path = folder / file.name
        if path.exists() and not holds(path, file):
            raise CheckpointError(
                f"{path}: differs from the Hub's; give another folder, or remove this model's files there first"
            )
