"""The Hugging Face Hub, asked through `huggingface_hub`: which files a model has there, which of them we need."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, errors
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

HTTPError = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]  # httpx's or httpx2's, by version
SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
INDEX_OF = {
    "model.safetensors": "model.safetensors.index.json",
    "pytorch_model.bin": "pytorch_model.bin.index.json",
}  # the weights in one file, and the index of shards in its place; the better format first
PLAIN_NAME = re.compile(r"[\w-][\w.-]*")


class DownloadError(OSError):
    """A download that did not happen or did not finish: says what, why, and what to do next."""


@dataclass(frozen=True)
class HubFile:
    """One file of a model on the Hub: its name, its bytes, and by what they are known.

    A large file (Git LFS) is known by the sha256 of its content, any other by git's id of a blob.
    """

    name: str
    size: int
    checksum: str

    @property
    def is_large(self) -> bool:
        return len(self.checksum) == 64


@dataclass(frozen=True)
class Listing:
    """The files of a model at one commit."""

    model: str
    commit: str
    files: dict[str, HubFile]

    def pick(self, names: list[str]) -> list[HubFile]:
        """The files of these names. Raises DownloadError for one that the Hub doesn't have."""
        for name in names:
            if name not in self.files:
                raise DownloadError(f"{self.model}: its index names {name!r}, which is not among the model's files")
        return [self.files[name] for name in names]


@contextlib.contextmanager
def hub_errors(model: str, revision: str) -> Iterator[None]:
    """Turn what `huggingface_hub` raises into a DownloadError of one line that says what to do."""
    where = constants.ENDPOINT
    try:
        yield
    except GatedRepoError as error:
        advice = f"ask for it at {where}/{model}, then log in with `hf auth login` or set HF_TOKEN"
        raise DownloadError(f"{model}: its owners give access one by one; {advice}") from error
    except RevisionNotFoundError as error:
        raise DownloadError(f"{model}: there is no revision {revision!r} at {where}; the usual one is main") from error
    except RepositoryNotFoundError as error:
        advice = "check the name, or log in with `hf auth login` if it is private"
        raise DownloadError(f"{model}: there is no such model at {where}; {advice}") from error
    except OfflineModeIsEnabled as error:
        raise DownloadError(f"{model}: HF_HUB_OFFLINE is set, so {where} is not asked; unset it to download") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = "log in with `hf auth login` or set HF_TOKEN" if status in (401, 403) else "try again later"
        raise DownloadError(f"{model}: {where} answers with HTTP status {status}; {advice}") from error
    except HTTPError as error:
        reason = str(error) or type(error).__name__
        raise DownloadError(f"{model}: {where} can't be reached ({reason}); check the network and try again") from error
    except HFValidationError as error:
        raise DownloadError(f"{model}: not a model's name on the Hub, such as EleutherAI/pythia-70m") from error


def list_files(model: str, revision: str) -> Listing:
    """Ask the Hub for a model's files, one request. Raises DownloadError."""
    with hub_errors(model, revision):
        try:
            info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=30)
            files = [
                HubFile(entry.rfilename, entry.lfs.size if entry.lfs else entry.size or 0, checksum)
                for entry in info.siblings or []
                if (checksum := entry.lfs.sha256 if entry.lfs else entry.blob_id)
            ]
            if not info.sha:
                raise ValueError("no commit")
        except HFValidationError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DownloadError(
                f"{model}: {constants.ENDPOINT} does not answer as the Hub does; is there a login page or a proxy "
                "between?"
            ) from error
    return Listing(model, info.sha, {file.name: file for file in files if PLAIN_NAME.fullmatch(file.name)})


def weight_files(names: set[str], read_index: Callable[[str], Path]) -> list[str]:
    """Which of a folder's files hold its weights: safetensors before .bin, whole before shards; an index comes first.

    `read_index(name)` gives the path of an index, which names the shards. Empty where there are no weights of a kind
    that we read. Raises DownloadError for an index that is none.
    """
    for single, index in INDEX_OF.items():
        if single in names:
            return [single]
        if index in names:
            try:
                shards = json.loads(read_index(index).read_text("utf-8"))["weight_map"].values()
                return [index, *sorted(set(shards))]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DownloadError(f"{index}: not an index of shards ({type(error).__name__}: {error})") from error
    return []
