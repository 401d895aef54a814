"""A model from the Hub to an int8 file in one stream: fetch a shard, quantize it, delete it.

The disk holds the int8 file and one shard, never the model as it was released.
"""

import logging
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from huggingface_hub.utils import WeakFileLock, tqdm

from neox_lib.checkpoints.files import CheckpointError, check_free_disk, free_bytes
from neox_lib.checkpoints.huggingface.config import read_huggingface_config
from neox_lib.checkpoints.huggingface.layout import is_huggingface
from neox_lib.checkpoints.quantized import INT8_ENDING, INT8_FILE, int8_metadata, int8_specs, quantized, scale_name
from neox_lib.checkpoints.slim.layout import is_slim
from neox_lib.hub.download import SPARE, PlaceOf, check_same, choose_files, folder_place
from neox_lib.hub.fetch import Place, fetch, holds
from neox_lib.hub.listing import SMALL_FILES, DownloadError, HubFile, Listing, list_files
from neox_lib.hub.shards import WEIGHTS, Shard, find_dtype, parameters_of_shards, read_shard
from neox_lib.hub.unfinished import UnfinishedFile

logger = logging.getLogger(__name__)

WORK = ".unfinished_int8"  # folder inside the target: the file in the making, and the shard in hand


def check_free_place(folder: Path) -> None:
    """Raise CheckpointError when `folder` can't become a new int8 model's."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: a file; give a folder, which will hold {INT8_FILE} and its tokenizer")
    if folder.is_dir() and (is_slim(folder) or is_huggingface(folder) or any(folder.glob(f"*{INT8_ENDING}"))):
        raise CheckpointError(f"{folder}: already holds a model; give another folder, or remove the old files first")


def announce(listing: Listing, todo: list[Shard], file: UnfinishedFile, place_of: PlaceOf) -> tuple[int, int]:
    """Say what will be fetched and what the disk will hold, and return the bytes to fetch, whole and already
    there. Raises CheckpointError when the disk has no room.
    """
    missing = [shard.file.size - place_of(shard.file).bytes_there() for shard in todo]
    total = sum(shard.file.size for shard in todo)
    largest = max((shard.file.size for shard in todo), default=0)
    resumed = f", going on with {len(file.done)} done" if file.done else ""
    logger.info(
        f"{listing.model} ({listing.commit[:8]}): {sum(missing) / 1e9:,.2f} GB in {len(todo)} shard(s) to "
        f"fetch{resumed}; the int8 file takes {file.nbytes / 1e9:,.2f} GB, and while it is made the disk holds at most "
        f"{(file.nbytes + largest) / 1e9:,.2f} GB of this; the disk has {free_bytes(file.path) / 1e9:,.1f} GB free"
    )
    check_free_disk(file.path.parent, file.missing_bytes() + max(missing, default=0) + SPARE)
    return total, total - sum(missing)


def work_place(work: Path, file: HubFile) -> Place:
    """A file's place while the int8 file is made: small ones under their name, shards under their checksum too."""
    place = folder_place(work, file)
    if file.name.endswith(WEIGHTS):
        return replace(place, target=work / f"{file.checksum[:12]}-{file.name}")
    return place


def drop_stale(work: Path, listing: Listing) -> None:
    """Remove what an earlier run left of another revision: a config, a tokenizer or an index that is not the Hub's."""
    for file in listing.files.values():
        path = work_place(work, file).target
        if not file.name.endswith(WEIGHTS) and path.exists() and not holds(path, file):
            path.unlink()


def drop_shards(work: Path, todo: list[Shard]) -> None:
    """Remove the shards, whole or in part, of which nothing is wanted any more: done ones, and another revision's."""
    places = [work_place(work, shard.file) for shard in todo]
    wanted = {path.name for place in places for path in (place.target, place.partial)}
    for path in work.iterdir():
        if path.name.endswith((*WEIGHTS, ".partial")) and path.name not in wanted:
            path.unlink()


def download_int8(model: str, folder: str | Path | None = None, revision: str = "main") -> Path:
    """Fetch a model shard by shard, quantizing each before the next comes, into `folder`, and return that.

    The folder gets `model.int8.safetensors`, the config and the tokenizer; its default is the model's name and -int8.
    Called again after an interruption it goes on: shards that are in the file are not fetched again, and a shard that
    had arrived in part is gone on with. Raises DownloadError; and CheckpointError when the disk has no room, when the
    folder holds a model already, and for weights that are not the config's.
    """
    folder = Path(folder or f"{model.rpartition('/')[2]}-int8")
    work = folder / WORK
    listing = list_files(model, revision)
    check_free_place(folder)
    try:
        work.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(work / "lock"):
            check_free_place(folder)  # once more, after another process may have finished the same
            stream_int8(listing, folder, work)
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(
            f"{folder}: can't be written ({error.strerror or error}); what is done is kept: mend that and run the same "
            "again"
        ) from error
    shutil.rmtree(work, ignore_errors=True)
    return folder


def stream_int8(listing: Listing, folder: Path, work: Path) -> None:
    """The work of `download_int8`, by the one process that does it."""
    place_of = partial(work_place, work)
    drop_stale(work, listing)
    files = choose_files(listing, place_of)
    small = [file for file in files if file.name in SMALL_FILES]
    check_same(folder, small)
    for file in small:
        fetch(listing, file, place_of(file), tqdm(disable=True))
    config = read_huggingface_config(work)
    shards = parameters_of_shards(listing, files, work, config)
    dtype = find_dtype(listing, shards[0].file, work / "config.json")
    parts = [shard.file.checksum for shard in shards]
    unfinished = UnfinishedFile(work, int8_specs(config, dtype), int8_metadata(config, dtype), parts)
    todo = [shard for shard in shards if shard.file.checksum not in unfinished.done]
    drop_shards(work, todo)
    total, there = announce(listing, todo, unfinished, place_of)
    unfinished.begin()
    with tqdm(total=total, initial=there, unit="B", unit_scale=True, desc=listing.model, mininterval=0.5) as bar:
        for shard in todo:
            place = place_of(shard.file)
            fetch(listing, shard.file, place, bar)
            names = shard.names | {scale_name(name) for name in shard.names if scale_name(name) in unfinished.specs}
            parameters = read_shard(place.target, shard, config, dtype)
            unfinished.write_part(shard.file.checksum, names, quantized(parameters, dtype))
            place.target.unlink()
    for file in small:
        os.replace(place_of(file).target, folder / file.name)
    unfinished.finish(folder / INT8_FILE)
