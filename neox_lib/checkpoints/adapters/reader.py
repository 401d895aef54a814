"""Reads a LoRA adapter: the checkpoint of its base model, each tensor changed as the adapter says when it is read."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from neox_lib.checkpoints.adapters.layout import ADAPTER_CONFIG, LoraConfig, find_adapter, read_lora
from neox_lib.checkpoints.checkpoint import Checkpoint, LayerFile, cast, check_convertible
from neox_lib.checkpoints.files import CheckpointError, unwrap_keys
from neox_lib.checkpoints.huggingface.layout import FIRST_WORDS, is_huggingface, names_by_key
from neox_lib.checkpoints.tensor_files import Stored, TensorReader, describe_file
from neox_lib.checkpoints.tokenizer_files import GENERATION, with_vocabulary
from neox_lib.config import NeoXConfig, parameter_shapes

# A key, once the names of PEFT's wrappers are taken away: the module, and which of its tensors.
KEY = re.compile(
    r"(?P<module>.+?)\.(?:base_layer\.|modules_to_save\.)?"
    r"(?P<part>lora_[AB](?:\.default)?\.weight|lora_B(?:\.default)?\.bias|lora_embedding_[AB](?:\.default)?|weight|bias)"
)
ORIGINALS = (".original_module.weight", ".original_module.bias")  # the base model's, saved beside what replaced it
EMBEDDING, OUTPUT = "word_embeddings.weight", "final_linear.weight"


@dataclass(frozen=True)
class Change:
    """What an adapter does to one parameter: `whole` takes its place, then scaling * B @ A is added, for a bias
    scaling * B.
    """

    whole: Stored | None = None
    a: Stored | None = None
    b: Stored | None = None
    scaling: float = 0.0

    def apply(self, name: str, tensor: Tensor, reader: TensorReader) -> Tensor:
        """The parameter `name` changed: as the adapter stores it, or computed in fp32 and not rounded yet."""
        changed = tensor if self.whole is None else reader.read(self.whole)
        if self.b is not None:
            b = reader.read(self.b).float()
            if self.a is None:
                changed = changed.float().add(b, alpha=self.scaling)
            else:
                a = reader.read(self.a).float()
                left, right = (a.T, b.T) if name == EMBEDDING else (b, a)
                changed = torch.addmm(changed.float(), left, right, alpha=self.scaling)
        return changed


class AdapterCheckpoint:
    """A LoRA adapter, opened, on the checkpoint of its base model: see `Checkpoint`.

    Raises CheckpointError for a base in int8, for tensors that don't fit it, and as `read_lora` does.
    """

    def __init__(self, folder: str | Path, base: Checkpoint):
        folder = Path(folder)
        if is_huggingface(folder):
            raise CheckpointError(f"{folder}: holds a whole model and an adapter; keep each in a folder of its own")
        self.lora, self.file, self.base = read_lora(folder), find_adapter(folder), base
        check_convertible(base)
        self.changes = find_changes(self.file, self.lora, base.config)
        self.config = with_vocabulary(
            self.resized(), folder, {"eos_token_id": list(base.config.eos_token_ids)}
        )  # PEFT leaves the ends of a text to the base model's files
        self.dtype, self.float_dtype = base.dtype, base.float_dtype

    def __str__(self) -> str:
        rank = sorted({change.a.shape[0] for change in self.changes.values() if change.a})
        return f"{self.file.parent}, LoRA of rank {' and '.join(map(str, rank))} on {self.base}"

    def resized(self) -> NeoXConfig:
        """The base model's config, with the rows of the embeddings that the adapter puts in the place of its own."""
        change = self.changes.get(EMBEDDING)
        if change is None or change.whole is None or change.whole.shape[0] == self.base.config.vocab_size:
            return self.base.config
        rows = change.whole.shape[0]
        return replace(self.base.config, vocab_size=rows, tokenizer_vocab_size=rows)

    @property
    def folder(self) -> Path | None:
        """Of the base model, or the adapter's where that says itself how it writes."""
        own = self.file.parent
        return own if (own / GENERATION).is_file() else self.base.folder

    @property
    def nbytes(self) -> int:
        return self.base.nbytes

    def dtypes(self) -> dict[str, torch.dtype]:
        return self.base.dtypes()

    def parts(self) -> Iterator[tuple[str, list[Tensor]]]:
        return ((name, [tensor]) for name, tensor, _ in self.merged())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, cast(name, tensor, "cpu", dtype)) for name, tensor, dtype in self.merged())

    def merged(self) -> Iterator[tuple[str, Tensor, torch.dtype]]:
        """Each tensor and its dtype in the base model, to which one that is changed is not rounded yet: a model in fp32
        keeps all of a change, a file has the base's dtypes.
        """
        reader = TensorReader()
        for name, tensor in self.base.tensors():
            change = self.changes.get(name)
            yield name, tensor if change is None else change.apply(name, tensor, reader), tensor.dtype
            del tensor  # or its file would stay mapped while the next one is opened

    def files(self) -> list[LayerFile]:
        part = f"adapter of {len(self.changes)} tensors"
        return [*self.base.files(), LayerFile(self.file.name, 0, part, self.file.stat().st_size)]


def find_changes(file: Path, lora: LoraConfig, config: NeoXConfig) -> dict[str, Change]:
    """What an adapter's file changes, by our parameters' names. Raises CheckpointError, naming the file and the tensor,
    for one that has no place in the base model or another shape, and for an embedding of a model that ties it.
    """
    known, shapes = names_by_key(config), parameter_shapes(config)
    found: dict[str, dict[str, Stored]] = {}
    modules: dict[str, str] = {}
    stored_by_key = unwrap_keys(file, {stored.key: stored for stored in describe_file(file, ORIGINALS)}, FIRST_WORDS)
    for key, stored in stored_by_key.items():
        match = KEY.fullmatch(key)
        leaf = "bias" if match and match["part"].endswith("bias") else "weight"
        name = known.get(f"{match['module']}.{leaf}") if match else None
        if match is None or name is None:
            raise CheckpointError(f"{file}: unexpected {stored.key}; the base model has no place for it")
        if config.tie_word_embeddings and name == EMBEDDING:
            raise CheckpointError(
                f"{file}: {stored.key} changes the embedding, which the base model ties to its output; merge it with "
                "PEFT's merge_and_unload first"
            )
        modules[name] = match["module"]
        part = match["part"].replace(".default", "").removesuffix(".weight").removesuffix(".bias")
        found.setdefault(name, {})[part.removeprefix("lora_embedding_").removeprefix("lora_")] = stored
    if not any("A" in parts for parts in found.values()):
        raise CheckpointError(f"{file}: holds no LoRA tensors; expected keys that end in lora_A.weight")
    rows = {name: parts["weight"].shape[0] for name, parts in found.items() if "weight" in parts}
    if (resized := rows.get(EMBEDDING)) and resized == rows.get(OUTPUT):
        shapes |= {name: (resized, *shapes[name][1:]) for name in (EMBEDDING, OUTPUT)}
    return {name: change_of(file, name, modules[name], parts, shapes[name], lora) for name, parts in found.items()}


def change_of(
    file: Path, name: str, module: str, parts: dict[str, Stored], shape: tuple[int, ...], lora: LoraConfig
) -> Change:
    """The change of one parameter from its tensors in `module`. Raises CheckpointError for one that is missing or has
    another shape.
    """
    leaf = name.rpartition(".")[2]
    expected: dict[str, tuple[int, ...]] = {leaf: shape}
    if len(shape) == 2:  # a matrix [out, in] gets B [out, r] and A [r, in]; an embedding's are those of its transpose
        out, into = reversed(shape) if name == EMBEDDING else shape
        expected |= {"A": (lora.rank(module), into), "B": (out, lora.rank(module))}
    elif leaf == "bias":
        expected["B"] = shape
    for part, stored in parts.items():
        if stored.shape != (wanted := expected.get(part, ())):
            raise CheckpointError(
                f"{file}: {stored.key} has shape {list(stored.shape)}, expected {list(wanted)} from the base model "
                f"{lora.base} and the rank in {ADAPTER_CONFIG}; they belong to different models"
            )
    if len(shape) == 2 and ("A" in parts) != ("B" in parts):
        raise CheckpointError(f"{file}: has only one of lora_A and lora_B for {module}; save the adapter again")
    return Change(parts.get(leaf), parts.get("A"), parts.get("B"), lora.scaling(module) if "B" in parts else 0.0)
