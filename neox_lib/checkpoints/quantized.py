"""An int8 or int4 model in one file: quantized and written tensor by tensor, loaded by mapping it into memory."""

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
from neox_lib.quantization.int4 import GROUP
from neox_lib.quantization.linear import QUANTIZED, QuantizedLinear, dtype_name, quantize, stored_in

ENDINGS = {dtype: f".{name}.safetensors" for name, dtype in QUANTIZED.items()}
FORMATS = {f"neox_lib {name}": dtype for name, dtype in QUANTIZED.items()}
VERSION = "1"


def file_in_folder(dtype: torch.dtype) -> str:
    """The name of a folder's model in a dtype of QUANTIZED.

    >>> file_in_folder(torch.int8)
    'model.int8.safetensors'
    """
    return f"model{ENDINGS[dtype]}"


def is_quantized(name: str, dimensions: int) -> bool:
    """Whether a parameter is quantized: every matrix that is multiplied. The embedding is looked up row by row."""
    return dimensions == 2 and name != "word_embeddings.weight"


def scale_name(name: str) -> str:
    """The name of a matrix's scales.

    >>> scale_name("layers.0.attention.dense.weight")
    'layers.0.attention.dense.scale'
    """
    return name.removesuffix("weight") + "scale"


def quantized_specs(config: NeoXConfig, dtype: torch.dtype, embedding: torch.dtype = torch.float16) -> dict[str, Spec]:
    """Every tensor of a model quantized to `dtype`, with dtype and shape: the matrices' numbers as `quantize` returns
    them, their scales, biases and norms in fp32, the embedding in the dtype that it had. A tied model has no output
    matrix of its own.
    """
    specs: dict[str, Spec] = {}
    for name, shape in parameter_shapes(config).items():
        if not is_quantized(name, len(shape)):
            specs[name] = (embedding if len(shape) == 2 else torch.float32, shape)
        elif stored_in(name, dtype) == torch.int8:
            specs |= {name: (torch.int8, shape), scale_name(name): (torch.float32, shape[:1])}
        else:
            groups = (shape[0], shape[1] // GROUP)
            specs |= {name: (torch.uint8, (*groups, GROUP // 2)), scale_name(name): (torch.bfloat16, groups)}
    return specs


def quantized_bytes(config: NeoXConfig, dtype: torch.dtype = torch.int8, embedding: torch.dtype = torch.float16) -> int:
    """Bytes of a model quantized to `dtype`, the embedding in `embedding`."""
    specs = quantized_specs(config, dtype, embedding)
    return sum(torch.Size(shape).numel() * stored.itemsize for stored, shape in specs.values())


def quantized_metadata(config: NeoXConfig, dtype: torch.dtype, source: torch.dtype = torch.float16) -> dict[str, str]:
    """What the file says about itself; `source` is the dtype that was quantized to `dtype`."""
    known = {"format": f"neox_lib {dtype_name(dtype)}", "version": VERSION, "source_dtype": dtype_name(source)}
    return known | {"config": json.dumps(config.stored_fields())}


def quantized(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, embedding: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Turn named parameters, one at a time, into the tensors of `quantized_specs`; `embedding` is its dtype, None keeps
    it.

    Raises CheckpointError, naming the tensor, for NaN or infinity.
    """
    for name, tensor in tensors:
        if is_quantized(name, tensor.dim()):
            try:
                numbers, scales = quantize(tensor, stored_in(name, dtype))
            except ValueError as error:
                raise CheckpointError(f"{name}: {error}") from None
            yield name, numbers
            yield scale_name(name), scales
        elif not math.isfinite(largest_value(tensor)):
            raise CheckpointError(f"{name} holds NaN or infinity; the weights are damaged, fetch them again")
        else:
            yield name, tensor.to(embedding) if tensor.dim() == 2 else tensor.float()
        del tensor  # before reading the next one


def write_quantized(
    checkpoint: Checkpoint,
    path: str | Path,
    tokenizer: str | Path | None = None,
    freed_meanwhile: int = 0,
    dtype: torch.dtype = torch.int8,
) -> Path:
    """Quantize a checkpoint into one file, holding one tensor at a time, and return the file's path.

    `path` is NAME.int8.safetensors, for int4 NAME.int4.safetensors, or a folder, which then holds the model under that
    ending and a copy of the `tokenizer` file with the small files beside it. An existing file of that name is replaced
    once the new one is complete; on Windows not while a model has it mapped. `freed_meanwhile` as in
    `write_safetensors`. Raises CheckpointError when the disk has no room and for weights that can't be used.
    """
    path, ending = Path(path), ENDINGS[dtype]
    file = path if path.name.endswith(ending) else path / file_in_folder(dtype)
    if file != path and (path.is_file() or path.suffix == ".safetensors"):
        raise CheckpointError(f"{path}: give a folder or a name that ends in {ending}")
    check_convertible(checkpoint)
    config, source = checkpoint.config, checkpoint.dtype
    specs, tensors = quantized_specs(config, dtype, source), quantized(checkpoint.tensors(), dtype, source)
    write_safetensors(file, specs, tensors, quantized_metadata(config, dtype, source), freed_meanwhile)
    write_beside(file.parent, config, None if tokenizer is None else Path(tokenizer), checkpoint.folder)
    return file


def find_quantized(path: str | Path) -> Path | None:
    """The int8 or int4 file that a path means: itself, or the one in a folder; None where there is none.

    Raises CheckpointError for a folder with several.
    """
    path, endings = Path(path), tuple(ENDINGS.values())
    if path.is_file():
        return path if path.name.endswith(endings) else None
    found = sorted(each for each in path.iterdir() if each.name.endswith(endings)) if path.is_dir() else []
    if len(found) > 1:
        raise CheckpointError(f"{path}: holds {', '.join(each.name for each in found)}; give the path of one of them")
    return found[0] if found else None


def read_metadata(file: Path, metadata: Mapping[str, str]) -> tuple[NeoXConfig, torch.dtype, torch.dtype]:
    """The config, the dtype of the quantized weights and the source's. Raises CheckpointError for another format or
    version.
    """
    dtype = FORMATS.get(metadata.get("format", ""))
    if dtype is None:
        raise CheckpointError(
            f"{file}: not a quantized file of this library; expected format {' or '.join(FORMATS)} in its metadata"
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{file}: {dtype_name(dtype)} file of version {metadata.get('version')}, expected {VERSION}; convert the "
            "checkpoint again"
        )
    try:
        fields = json.loads(metadata["config"])
        config = with_vocabulary(NeoXConfig(**fields), file.parent, fields)
        return config, dtype, WEIGHT_DTYPES[metadata["source_dtype"]]
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


class QuantizedCheckpoint:
    """An int8 or int4 file, opened: see `Checkpoint`. Its tensors are those of `quantized_specs`.

    The file is mapped into memory: pages are read when they are first used, and processes that open the same file share
    them. It stays mapped as long as any of the tensors lives; they don't see it replaced (which Windows refuses). What
    a program writes into them never reaches the file. Raises CheckpointError for a file that is damaged, of another
    version, or doesn't match its config.
    """

    def __init__(self, file: Path):
        self.file = file
        with open_safetensors(file) as opened:
            metadata = opened.metadata() or {}
            self.config, self.dtype, self.float_dtype = read_metadata(file, metadata)
            self.mapped = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no dict
        found: dict[str, Spec] = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.mapped.items()}
        check_specs(file, found, quantized_specs(self.config, self.dtype, self.float_dtype))

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
        return ((name, self.mapped[name]) for name in quantized_specs(self.config, self.dtype))

    def files(self) -> list[LayerFile]:
        return [LayerFile(self.file.name, 0, "the whole model", self.file.stat().st_size)]


def empty_quantized_model(config: NeoXConfig, dtype: torch.dtype) -> NeoXModel:
    """An empty model with a QuantizedLinear in place of each layer that is quantized to `dtype`."""
    model, specs = empty_model(config), quantized_specs(config, dtype)
    for name, shape in parameter_shapes(config).items():
        if is_quantized(name, len(shape)):
            path, _, _ = name.rpartition(".")
            parent, _, child = path.rpartition(".")
            numbers, scales = (
                torch.empty(shape, dtype=stored, device="meta")
                for stored, shape in (specs[name], specs[scale_name(name)])
            )
            layer = QuantizedLinear(numbers, scales, model.get_submodule(path).bias)  # type: ignore[arg-type]
            setattr(model.get_submodule(parent), child, layer)
    return model


def quantized_tensors(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `quantized_specs` of any checkpoint, quantized one at a time as they are read unless they are so
    already, so that the process never holds much more than the quantized model. Raises CheckpointError for NaN or
    infinity.
    """
    if checkpoint.dtype == dtype:
        return checkpoint.tensors()
    own = {*QUANTIZED.values()}
    rounded = quantized(checkpoint.tensors(), dtype)  # what is not rounded may still be mapped from the files
    return ((name, tensor if tensor.dtype in own else tensor.clone()) for name, tensor in rounded)


def build_quantized_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    others: torch.dtype = torch.float32,
) -> NeoXModel:
    """The model of any checkpoint, quantized to `dtype`: embedding in its stored dtype, biases and norms in `others`.

    On a CPU the weights of a quantized file stay memory-mapped. Raises CheckpointError as `quantized_tensors` and
    `cast` do.
    """
    matrices = {name for name, (_, shape) in quantized_specs(checkpoint.config, dtype).items() if len(shape) > 1}

    def dtype_of(name: str, tensor: Tensor) -> torch.dtype:
        return tensor.dtype if name in matrices or name.endswith("scale") else others

    tensors = quantized_tensors(checkpoint, dtype)
    placed = ((name, cast(name, tensor, device, dtype_of(name, tensor))) for name, tensor in tensors)
    return fill_model(empty_quantized_model(checkpoint.config, dtype), placed)
