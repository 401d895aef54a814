"""Writes a GGUF file of any of our models, tensor by tensor, with PyPI's `gguf`."""

import logging
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from neox_lib.checkpoints.atomic import write_atomically
from neox_lib.checkpoints.checkpoint import Checkpoint, cast, check_convertible, largest_value
from neox_lib.checkpoints.files import CheckpointError, check_free_disk
from neox_lib.checkpoints.gguf.config import ARCHITECTURE, gguf_fields, rows_by_kind, their_name
from neox_lib.checkpoints.gguf.file import BLOCK, ENDING, FLOATS
from neox_lib.checkpoints.gguf.tokenizer import CHAT_TEMPLATE, read_bpe, tokenizer_fields
from neox_lib.checkpoints.tokenizer_files import OLDER_FILES, chat_template, open_tokenizer, role_fields
from neox_lib.config import NeoXConfig, parameter_shapes
from neox_lib.tokenizer import BPETokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

logger = logging.getLogger(__name__)

# What matrices can be written in, by the names of our own dtypes and of llama.cpp's blocks, and the format's names.
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
MOST_Q4_0 = 8 * 65504  # the largest number whose scale fits into fp16
MOST_METADATA = 10_000_000  # bytes
GGUFSpec = tuple[str, tuple[int, ...]]  # type and shape


def plan(config: NeoXConfig, matrices: str) -> dict[str, GGUFSpec]:
    """Type and shape of every tensor by our names. llama.cpp needs all biases, in F32, and an output matrix, also where
    a model has no biases of attention or is tied. Beside Q4_0 both embeddings are in Q8_0, since they are the most
    sensitive to rounding. Raises CheckpointError for rows that do not divide into blocks.
    """
    whole = replace(config, tie_word_embeddings=False, attention_bias=True)
    types = {}
    for name, shape in parameter_shapes(whole).items():
        outer = matrices == "Q4_0" and not name.startswith("layers.")
        types[name] = ("F32" if len(shape) == 1 else "Q8_0" if outer else matrices, shape)
        if matrices not in FLOATS and len(shape) == 2 and shape[1] % BLOCK:
            raise CheckpointError(
                f"{name} has rows of {shape[1]} numbers, and {matrices} needs multiples of {BLOCK}; give dtype float16"
            )
    return types


def all_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `plan`, in its order: with zeros for missing biases, and a tied output matrix at the end."""
    given, config = checkpoint.tensors(), checkpoint.config
    expected = parameter_shapes(config)
    for name, (_, shape) in plan(config, "F32").items():
        if name in expected:
            yield next(given)
        elif name.endswith("bias"):
            yield name, torch.zeros(shape)
        else:
            yield name, next(checkpoint.tensors())[1]  # the embedding comes first


def encoded(name: str, tensor: Tensor, kind: str) -> np.ndarray[Any, Any]:
    """A tensor's bytes in a type. Raises CheckpointError for numbers that it can't hold."""
    import gguf

    if kind in FLOATS:
        return cast(name, tensor, "cpu", FLOATS[kind]).view(torch.uint8).numpy()
    if not (largest := largest_value(tensor)) <= MOST_Q4_0:
        raise CheckpointError(
            f"{name} holds {largest:,.0f}, which {kind} can't; if it is no damage, give dtype float32"
        )
    return gguf.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[kind])


def write_gguf(
    checkpoint: Checkpoint, path: str | Path, tokenizer: str | Path | None, dtype: str | None = None
) -> Path:
    """Write a checkpoint and its tokenizer as one GGUF file, holding one tensor at a time, and return the file's path.

    `path` is NAME.gguf, or a folder, which then holds model.gguf; a file of that name is replaced once the new one is
    complete. `dtype` is one of `TYPES`, by default the matrices' own. Raises CheckpointError for a model or a tokenizer
    that llama.cpp does not run, without PyPI's `gguf`, when the disk has no room, and for weights that can't be used.
    """
    path = Path(path)
    file = path if path.suffix == ENDING and not path.is_dir() else path / f"model{ENDING}"
    if path.is_file() and file != path:
        raise CheckpointError(f"{path}: a file; give a folder or a name that ends in {ENDING}")
    if file.resolve() == Path(str(checkpoint)).resolve():
        raise CheckpointError(f"{file}: is the file to read from; give another one to write to")
    check_convertible(checkpoint)
    if tokenizer is None:
        raise CheckpointError(f"{checkpoint}: no tokenizer beside it, and a GGUF file holds one; put its JSON there")
    config, tokenizer = checkpoint.config, Path(tokenizer)
    matrices = TYPES[dtype or str(checkpoint.dtype).removeprefix("torch.")]
    types = plan(config, matrices)
    fields = gguf_fields(config)
    fields |= tokenizer_fields(read_any_bpe(tokenizer), config, role_fields(config, checkpoint.folder))
    if template := chat_template(tokenizer)[0]:
        fields[CHAT_TEMPLATE] = template
    writer = new_writer(file, matrices, fields, types)
    check_free_disk(file.parent, sum(tensor.nbytes for tensor in writer.tensors[0].values()) + MOST_METADATA)
    if config.hidden_act == "gelu":
        logger.warning(
            "%s: llama.cpp computes GELU by its tanh form, and this model was trained with the exact one: its scores "
            "will differ by some thousandths",
            file,
        )

    def write(temporary: Path) -> None:
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in all_tensors(checkpoint):
                rows = rows_by_kind(name, tensor, config.num_attention_heads)
                writer.write_tensor_data(encoded(name, rows, types[name][0]))
        finally:
            writer.close()

    try:
        write_atomically(file, write)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{file}: could not be written ({reason}); check its folder and free space") from error
    return file


def read_any_bpe(tokenizer: Path) -> BPETokenizer:
    """`read_bpe`, of files in an older layout too. Raises CheckpointError, naming the file, for another kind."""
    if tokenizer.name not in OLDER_FILES:
        return read_bpe(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        open_tokenizer(tokenizer).save(newer := f"{folder}/tokenizer.json")
        try:
            return read_bpe(Path(newer))
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(newer, str(tokenizer))) from error


def new_writer(file: Path, matrices: str, fields: Mapping[str, Any], types: Mapping[str, GGUFSpec]) -> "GGUFWriter":
    """The package's writer, which knows the metadata and the tensors to come. Raises CheckpointError without it."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{file}: is written by the package gguf; install it by `pip install gguf`") from error
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if matrices == 'F32' else 'MOSTLY'}_{matrices}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in fields.items():
        add_field(writer, key, value)
    for name, (kind, shape) in types.items():
        number = gguf.GGMLQuantizationType[kind]
        block, nbytes = gguf.GGML_QUANT_SIZES[number]
        writer.add_tensor_info(their_name(name), shape, np.dtype("f4"), math.prod(shape) // block * nbytes, number)
    return writer


def add_field(writer: "GGUFWriter", key: str, value: Any) -> None:
    """Add a key with a value of the type that llama.cpp expects of one such."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
