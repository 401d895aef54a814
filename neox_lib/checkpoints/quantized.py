"""A model in int8, as one file: quantized tensor by tensor, written as it comes, loaded by mapping it into memory."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from neox_lib.checkpoints.checkpoint import INT8_ENDING, Weights
from neox_lib.checkpoints.files import CheckpointError
from neox_lib.checkpoints.mapped_file import map_safetensors, read_ahead
from neox_lib.checkpoints.safetensors_writer import Spec, write_safetensors
from neox_lib.checkpoints.slim.layout import empty_model, parameter_shapes
from neox_lib.config import NeoXConfig
from neox_lib.decoding.linear import use_fast_linear
from neox_lib.model import NeoXModel
from neox_lib.quantization.int8 import quantize_rows
from neox_lib.quantization.int8_linear import Int8Linear

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
    return {"format": FORMAT, "version": VERSION, "config": json.dumps(asdict(config)), "source_dtype": dtype}


def quantized(
    tensors: Iterable[tuple[str, Tensor]], embedding: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Named parameters, one at a time, to the tensors of `int8_specs`; `embedding` is its dtype, None leaves it.

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
        else:
            yield name, tensor.to(embedding) if tensor.dim() == 2 else tensor.float()
        del tensor  # before the next one comes


def write_int8(
    weights: Weights, path: str | Path, tokenizer: str | Path | None = None, freed_meanwhile: int = 0
) -> Path:
    """Quantize a checkpoint into one file, holding one tensor at a time, and return the file's path.

    `path` is NAME.int8.safetensors, or a folder, which then holds model.int8.safetensors and a copy of the `tokenizer`
    file. What was there under that name is replaced when the new file is whole; on Windows not while a model has it
    mapped. `freed_meanwhile` as in `write_safetensors`. Raises CheckpointError when the disk has no room and for
    weights that can't be used.
    """
    path = Path(path)
    file = path if path.name.endswith(INT8_ENDING) else path / INT8_FILE
    if path.is_file() and file != path:
        raise CheckpointError(f"{path}: a file; give a folder or a name that ends in {INT8_ENDING}")
    config, dtype = weights.config, weights.dtype
    weights.dtypes()  # refuses weights that are quantized already
    specs, tensors = int8_specs(config, dtype), quantized(weights.tensors(), dtype)
    write_safetensors(file, specs, tensors, int8_metadata(config, dtype), freed_meanwhile)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, file.parent / "tokenizer.json")
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
            f"{file}: int8 file of version {metadata.get('version')}, expected {VERSION}; convert the checkpoint anew"
        )
    try:
        config = NeoXConfig(**json.loads(metadata["config"]))
        return config, {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[
            metadata["source_dtype"]
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: damaged metadata ({error}); convert the checkpoint anew") from error


def check_specs(file: Path, found: Mapping[str, Spec], expected: Mapping[str, Spec]) -> None:
    """Raise CheckpointError, naming the tensor, unless the file holds exactly what its config asks for."""
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            there, wanted = (
                f"{spec[0]} {list(spec[1])}" if spec else "nothing" for spec in (found.get(name), expected.get(name))
            )
            raise CheckpointError(
                f"{file}: {name} is {there}, the config in the file expects {wanted}; convert the checkpoint anew"
            )


def open_int8(path: str | Path) -> tuple[Path, NeoXConfig, torch.dtype, dict[str, Tensor]]:
    """The path, config, source dtype and tensors of an int8 file, these mapped: nothing but the header is read.

    Raises CheckpointError for a file that is damaged, of another version, or not what its config says.
    """
    file = find_int8(path)
    if file is None:
        raise CheckpointError(f"{path}: no int8 model; expected a NAME{INT8_ENDING} or a folder with one")
    tensors, metadata = map_safetensors(file)
    config, source = read_metadata(file, metadata)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    check_specs(file, found, int8_specs(config, source))
    return file, config, source, tensors


def build_int8(config: NeoXConfig, tensors: Mapping[str, Tensor]) -> NeoXModel:
    """A model around the tensors of `int8_specs`, without copying them: in eval mode, gradients off."""
    model = empty_model(config)
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if tensor.dtype == torch.int8:
            parent, _, child = path.rpartition(".")
            layer = Int8Linear(tensor, tensors[scale_name(name)], tensors.get(f"{path}.bias"))
            setattr(model.get_submodule(parent), child, layer)
        elif leaf != "scale" and f"{path}.scale" not in tensors:
            setattr(model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
    model.rotary.fill(model.norm.weight.device)
    if config.tie_word_embeddings:
        model.final_linear.weight = model.word_embeddings.weight
    return use_fast_linear(model).eval()


def moved(tensors: Iterable[tuple[str, Tensor]], device: str | torch.device, others: torch.dtype) -> dict[str, Tensor]:
    """Tensors of `int8_specs` on a device, biases and norms in the dtype of the activations there, `others`."""
    own = ("scale", "word_embeddings.weight")
    return {
        name: tensor.to(device, None if tensor.dtype == torch.int8 or name.endswith(own) else others)
        for name, tensor in tensors
    }


def activations_on(device: str | torch.device, source: torch.dtype) -> torch.dtype:
    """fp32 on a CPU, elsewhere the dtype that was quantized."""
    return torch.float32 if torch.device(device).type == "cpu" else source


def load_int8(path: str | Path, device: str | torch.device = "cpu") -> NeoXModel:
    """The model of an int8 file or of a folder with one.

    On a CPU the weights stay in the file: it is mapped, its pages are read when they are first used, and processes that
    load the same file share them. The file stays mapped as long as the model lives; it may be replaced meanwhile, which
    the model does not see (Windows refuses to replace a mapped file). Raises CheckpointError as `open_int8` does.
    """
    file, config, source, tensors = open_int8(path)
    if torch.device(device).type == "cpu":
        read_ahead(file)
    return build_int8(config, moved(tensors.items(), device, activations_on(device, source)))


def quantize_while_loading(weights: Weights, device: str | torch.device = "cpu") -> NeoXModel:
    """The int8 model of any checkpoint: each tensor is quantized as it is read, so that the process never holds much
    more than the int8 model. Raises CheckpointError as `Weights.tensors` does, and for NaN or infinity.
    """
    mapped = quantized(weights.tensors())
    owned = ((name, tensor if tensor.dtype == torch.int8 else tensor.clone()) for name, tensor in mapped)
    return build_int8(weights.config, moved(owned, device, activations_on(device, weights.dtype)))
