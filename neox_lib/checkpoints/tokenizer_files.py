"""The tokenizer beside a model's weights: which file it is, and opened."""

from pathlib import Path

from tokenizers import Tokenizer

from neox_lib.checkpoints.files import check_no_pointer


def find_tokenizer(path: str | Path) -> Path:
    """The tokenizer file meant by a path: the file itself, or the one of a folder or of a file of weights.

    20B's release keeps its `20B_tokenizer.json` one level above the weights. Raises FileNotFoundError for none.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        path = path.parent
    if path.is_dir():
        places = [path / "tokenizer.json", path / "20B_tokenizer.json", path.absolute().parent / "20B_tokenizer.json"]
        path = next((place for place in places if place.is_file()), places[0])
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no tokenizer there; give a tokenizer JSON, such as 20B_tokenizer.json")
    return path


def open_tokenizer(file: str | Path) -> Tokenizer:
    """The fast tokenizer (Hugging Face `tokenizers`) of a file; its ids are `BPETokenizer.encode`'s.

    Raises ValueError when the file is no tokenizer.
    """
    if Path(file).is_file():
        check_no_pointer(Path(file))
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{file}: not a tokenizer file: {error}") from error
