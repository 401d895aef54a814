"""An int8 model in one file: quantized and written tensor by tensor, loaded by mapping it into memory."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from neox_lib.checkpoints.build import empty_model, fill_model
from neox_lib.checkpoints.checkpoint import Checkpoint, LayerFile, cast, check_convertible, largest_value
from neox_lib.checkpoints.files import WEIGHT_DTYPES, CheckpointError
from neox_lib.checkpoints.safetensors_writer import Spec, write_safetensors
from neox_lib.checkpoints.tensor_files import open_safetensors, read_ahead
from neox_lib.checkpoints.tokenizer_files import with_vocabulary, write_beside
from neox_lib.config import NeoXConfig, parameter_shapes
from neox_lib.model import NeoXModel
from neox_lib.quantization.int8 import quantize_rows
from neox_lib.quantization.linear import Int8Linear

INT8_ENDING = ".int8.safetensors"
INT8_FILE = f"model{INT8_ENDING}"  # its name in a folder
FORMAT = "neox_lib int8"
VERSION = "1"


def is_quantized(name: str, dimensions: int) -> bool:
    """Whether a parameter becomes int8: every matrix that is multiplied. The embedding is looked up row by row."""
    return dimensions == 2 and name != "word_embeddings.weight"


def scale_name(name: str) -> str:
    """The name of a matrix's scales.

    >>> scale_name("layers.0.attention.dense.weight")
    'layers.0.attention.dense.scale'
    """
    return name.removesuffix("weight") + "scale"


def int8_specs(config: NeoXConfig, embedding: torch.dtype = torch.float16) -> dict[str, Spec]:
    """Every tensor of an int8 model with its dtype and shape: matrices in int8, their scales, biases and norms in fp32,
    the embedding in the dtype that it had. A tied model has no output matrix of its own.
    """
    specs: dict[str, Spec] = {}
    for name, shape in parameter_shapes(config).items():
        if is_quantized(name, len(shape)):
            specs |= {name: (torch.int8, shape), scale_name(name): (torch.float32, shape[:1])}
        else:
            specs[name] = (embedding if len(shape) == 2 else torch.float32, shape)
    return specs


def int8_bytes(config: NeoXConfig, embedding: torch.dtype = torch.float16) -> int:
    """Bytes of a model in int8, the embedding in `embedding`."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in int8_specs(config, embedding).values())


def int8_metadata(config: NeoXConfig, source: torch.dtype = torch.float16) -> dict[str, str]:
    """What the file says about itself; `source` is the dtype that was quantized."""
    dtype = str(source).removeprefix("torch.")
    return {"format": FORMAT, "version": VERSION, "config": json.dumps(config.stored_fields()), "source_dtype": dtype}


def quantized(
    tensors: Iterable[tuple[str, Tensor]], embedding: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Turn named parameters, one at a time, into the tensors of `int8_specs`; `embedding` is its dtype, None keeps it.

    Raises CheckpointError, naming the tensor, for NaN or infinity.
    """
    for name, tensor in tensors:
        if is_quantized(name, tensor.dim()):
            try:
                numbers, scales = quantize_rows(tensor)
            except ValueError as error:
                raise CheckpointError(f"{name}: {error}") from None
            yield name, numbers
            yield scale_name(name), scales
        elif not math.isfinite(largest_value(tensor)):
            raise CheckpointError(f"{name} holds NaN or infinity; the weights are damaged, fetch them again")
        else:
            yield name, tensor.to(embedding) if tensor.dim() == 2 else tensor.float()
        del tensor  # before reading the next one


def write_int8(
    checkpoint: Checkpoint, path: str | Path, tokenizer: str | Path | None = None, freed_meanwhile: int = 0
) -> Path:
    """Quantize a checkpoint into one file, holding one tensor at a time, and return the file's path.

    `path` is NAME.int8.safetensors, or a folder, which then holds model.int8.safetensors and a copy of the `tokenizer`
    file with the small files beside it. An existing file of that name is replaced once the new one is complete; on
    Windows not while a model has it mapped. `freed_meanwhile` as in `write_safetensors`. Raises CheckpointError when
    the disk has no room and for weights that can't be used.
    """
    path = Path(path)
    file = path if path.name.endswith(INT8_ENDING) else path / INT8_FILE
    if path.is_file() and file != path:
        raise CheckpointError(f"{path}: a file; give a folder or a name that ends in {INT8_ENDING}")
    check_convertible(checkpoint)
    config, dtype = checkpoint.config, checkpoint.dtype
    specs, tensors = int8_specs(config, dtype), quantized(checkpoint.tensors(), dtype)
    write_safetensors(file, specs, tensors, int8_metadata(config, dtype), freed_meanwhile)
    write_beside(file.parent, config, None if tokenizer is None else Path(tokenizer), checkpoint.folder)
    return file


def find_int8(path: str | Path) -> Path | None:
    """The int8 file that a path means: itself, or the one in a folder; None where there is none.

    Raises CheckpointError for a folder with several.
    """
    path = Path(path)
    if path.is_file():
        return path if path.name.endswith(INT8_ENDING) else None
    found = sorted(path.glob(f"*{INT8_ENDING}")) if path.is_dir() else []
    if len(found) > 1:
        raise CheckpointError(f"{path}: holds {', '.join(each.name for each in found)}; give the path of one of them")
    return found[0] if found else None


def read_metadata(file: Path, metadata: Mapping[str, str]) -> tuple[NeoXConfig, torch.dtype]:
    """The config and the source's dtype. Raises CheckpointError for another format or version."""
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{file}: not an int8 file of this library; expected format {FORMAT!r} in its metadata")
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{file}: int8 file of version {metadata.get('version')}, expected {VERSION}; convert the checkpoint again"
        )
    try:
        fields = json.loads(metadata["config"])
        config = with_vocabulary(NeoXConfig(**fields), file.parent, fields)
        return config, WEIGHT_DTYPES[metadata["source_dtype"]]
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged metadata ({error}); convert the checkpoint again") from error


def check_specs(file: Path, found: Mapping[str, Spec], expected: Mapping[str, Spec]) -> None:
    """Raise CheckpointError, naming the tensor, unless the file holds exactly what its config asks for."""
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            there, wanted = (
                f"{spec[0]} {list(spec[1])}" if spec else "nothing" for spec in (found.get(name), expected.get(name))
            )
            raise CheckpointError(
                f"{file}: {name} is {there}, the config in the file expects {wanted}; convert the checkpoint again"
            )


class Int8Checkpoint:
    """An int8 file, opened: see `Checkpoint`. Its tensors are those of `int8_specs`.

    The file is mapped into memory: pages are read when they are first used, and processes that open the same file share
    them. It stays mapped as long as any of the tensors lives; they don't see it replaced (which Windows refuses). What
    a program writes into them never reaches the file. Raises CheckpointError for a file that is damaged, of another
    version, or doesn't match its config.
    """

    dtype = torch.int8

    def __init__(self, file: Path):
        self.file = file
        with open_safetensors(file) as opened:
            metadata = opened.metadata() or {}
            self.config, self.float_dtype = read_metadata(file, metadata)
            self.mapped = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no dict
        found: dict[str, Spec] = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.mapped.items()}
        check_specs(file, found, int8_specs(self.config, self.float_dtype))

    def __str__(self) -> str:
        return str(self.file)

    @property
    def folder(self) -> Path:
        return self.file.parent

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.mapped.values())

    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.mapped.items()}

    def parts(self) -> Iterator[tuple[str, list[Tensor]]]:
        return ((name, [tensor]) for name, tensor in self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        read_ahead(self.file)
        return ((name, self.mapped[name]) for name in int8_specs(self.config))

    def files(self) -> list[LayerFile]:
        return [LayerFile(self.file.name, 0, "the whole model", self.file.stat().st_size)]


def empty_int8_model(config: NeoXConfig) -> NeoXModel:
    """An empty model with an Int8Linear in place of each layer that becomes int8."""
    model = empty_model(config)
    for name, shape in parameter_shapes(config).items():
        if is_quantized(name, len(shape)):
            path, _, _ = name.rpartition(".")
            parent, _, child = path.rpartition(".")
            numbers = torch.empty(shape, dtype=torch.int8, device="meta")
            bias = model.get_submodule(path).bias
            layer = Int8Linear(numbers, torch.empty(shape[0], device="meta"), bias)  # type: ignore[arg-type]
            setattr(model.get_submodule(parent), child, layer)
    return model


def int8_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `int8_specs` of any checkpoint, quantized one at a time as they are read unless they are int8
    already, so that the process never holds much more than the int8 model. Raises CheckpointError for NaN or infinity.
    """
    if checkpoint.dtype == torch.int8:
        return checkpoint.tensors()
    rounded = quantized(checkpoint.tensors())  # what is not rounded may still be mapped from the checkpoint's files
    return ((name, tensor if tensor.dtype == torch.int8 else tensor.clone()) for name, tensor in rounded)


def build_int8_model(
    checkpoint: Checkpoint, device: str | torch.device = "cpu", others: torch.dtype = torch.float32
) -> NeoXModel:
    """The int8 model of any checkpoint: its embedding in its stored dtype, biases and norms in `others`.

    On a CPU the weights of an int8 file stay memory-mapped. Raises CheckpointError as `int8_tensors` and `cast` do.
    """

    def dtype_of(name: str, tensor: Tensor) -> torch.dtype:
        as_stored = tensor.dtype == torch.int8 or name.endswith("scale") or name == "word_embeddings.weight"
        return tensor.dtype if as_stored else others

    tensors = ((name, cast(name, tensor, device, dtype_of(name, tensor))) for name, tensor in int8_tensors(checkpoint))
    return fill_model(empty_int8_model(checkpoint.config), tensors)
