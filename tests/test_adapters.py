"""LoRA adapters as PEFT saves them: the model is its base plus scaling * B @ A, in every form that it is read in."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neox_lib import create_model, create_tokenizer
from neox_lib.__main__ import main
from neox_lib.checkpoints.adapters.layout import ADAPTER_CONFIG, ADAPTER_FILES
from neox_lib.checkpoints.convert import convert_to_quantized, convert_to_slim
from neox_lib.checkpoints.files import CheckpointError
from neox_lib.checkpoints.huggingface.layout import their_name
from neox_lib.checkpoints.huggingface.writer import write_huggingface
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.checkpoints.quantized import write_quantized
from neox_lib.config import parameter_shapes
from neox_lib.tokenizer import save_tokenizer, train_tokenizer
from tests.small_models import BASE, WITH_TOKENIZER

SHAPES = parameter_shapes(BASE)
MATRICES = [name for name, shape in SHAPES.items() if len(shape) == 2 and name.startswith("layers")]
EMBEDDING = "word_embeddings.weight"
IDS = torch.arange(40)[None] * 3 % 128
# What PEFT 0.21 writes for every LoRA, as far as it is not empty.
PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "r": 4, "lora_alpha": 8, "bias": "none"}
PLAIN |= {"fan_in_fan_out": False, "lora_dropout": 0.05, "target_modules": ["dense"], "init_lora_weights": True}
PLAIN |= {"megatron_core": "megatron.core", "qalora_group_size": 16, "peft_version": "0.21.2", "use_dora": False}


@pytest.fixture(scope="module", autouse=True)
def small(one_thread):
    """One thread for all of these."""


@pytest.fixture
def base(tmp_path, random_model) -> Path:
    write_huggingface(random_model(BASE), tmp_path / "base")
    return tmp_path / "base"


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


def lora(name: str, rank: int = 4, vocab_size: int = BASE.vocab_size) -> dict[str, Tensor]:
    """A and B of one matrix, under PEFT's names."""
    out, into = SHAPES[name]
    module = "base_model.model." + their_name(name).removesuffix(".weight")
    if name == EMBEDDING:
        return {f"{module}.lora_embedding_A": draw(rank, vocab_size), f"{module}.lora_embedding_B": draw(into, rank)}
    return {f"{module}.lora_A.weight": draw(rank, into), f"{module}.lora_B.weight": draw(out, rank)}


def write_adapter(base: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A folder beside `base`, as PEFT's save_pretrained leaves it; a key of None is left out of the config."""
    folder = base.with_name("adapter")
    folder.mkdir(exist_ok=True)
    fields = PLAIN | {"base_model_name_or_path": str(base)} | config
    fields = {key: value for key, value in fields.items() if value is not None}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(fields))
    save_file(tensors, folder / ADAPTER_FILES[0])
    return folder


def tensors_of(path: Path) -> dict[str, Tensor]:
    return dict(open_checkpoint(path).tensors())


def difference(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().max().item()


@pytest.mark.parametrize(
    ("config", "scalings"),
    [
        ({}, {"": 8 / 4}),
        ({"use_rslora": True, "lora_alpha": 3}, {"": 3 / 4**0.5}),
        ({"fan_in_fan_out": True}, {"": 8 / 4}),  # belongs to GPT-2's Conv1D: PEFT, too, passes over it
        ({"alpha_pattern": {"attention.dense": 20}}, {"attention.dense": 20 / 4, "": 8 / 4}),
        ({"alpha_pattern": {"^gpt_neox.layers.1.mlp.dense_h_to_4h": 1}}, {"layers.1.mlp.dense_h_to_4h": 1 / 4, "": 2}),
    ],
)
def test_every_matrix_is_the_bases_plus_scaling_times_b_a(base, config, scalings):
    names = [*MATRICES, EMBEDDING, "final_linear.weight"]
    adapter = write_adapter(base, {key: tensor for name in names for key, tensor in lora(name).items()}, **config)
    before, after = tensors_of(base), tensors_of(adapter)
    for name, weight in before.items():
        scaling = next(value for module, value in scalings.items() if name.removesuffix(".weight").endswith(module))
        a, b = lora(name).values() if name in names else (torch.zeros(1, 1), torch.zeros(1, 1))
        change = scaling * b @ a
        expected = weight + (change.T if name == EMBEDDING else change) if name in names else weight
        assert difference(after[name], expected) < 1e-5, name
    assert list(after) == list(before), "in file order"


def test_a_rank_of_its_own(base):
    """The output matrix has two names, and a pattern may go by the one in memory."""
    one, other = "final_linear.weight", MATRICES[0]
    renamed = {key.replace("embed_out", "lm_head"): tensor for key, tensor in lora(one, 2).items()}
    adapter = write_adapter(base, renamed | lora(other, 4), rank_pattern={"lm_head": 2})
    a, b = lora(one, 2).values()
    assert difference(tensors_of(adapter)[one], tensors_of(base)[one] + 8 / 2 * b @ a) < 1e-5


def test_trained_biases_and_modules_take_the_place_of_the_bases(base):
    """bias="all", modules_to_save, and lora_bias, in every spelling that PEFT has for them."""
    prefix, block = "base_model.model.gpt_neox.", "layers.0.attention.dense"
    whole = {
        f"{prefix}layers.0.attention.dense.base_layer.bias": ("layers.0.attention.dense.bias", draw(32)),
        f"{prefix}layers.1.attention.dense.bias": ("layers.1.attention.dense.bias", draw(32)),
        f"{prefix}final_layer_norm.weight": ("norm.weight", draw(32)),
        "base_model.model.lm_head.modules_to_save.weight": ("final_linear.weight", draw(128, 32)),
    }
    more = {f"{prefix}{block}.lora_B.bias": draw(32) + 1, f"{prefix}final_layer_norm.original_module.weight": draw(32)}
    kept = {key: tensor for key, (_, tensor) in whole.items()}
    adapter = write_adapter(base, lora(f"{block}.weight") | kept | more, bias="all", modules_to_save=["lm_head"])
    after = tensors_of(adapter)
    for name, tensor in whole.values():
        added = 8 / 4 * (draw(32) + 1) if name == f"{block}.bias" else 0
        assert difference(after[name], tensor + added) < 1e-6, name


def test_a_vocabulary_that_grew_with_the_adapter(base):
    """Tokens of a chat format are added, and both embeddings saved whole: the model has their rows."""
    rows = {"base_model.model.gpt_neox.embed_in.base_layer.weight": draw(140, 32)}
    rows |= {"base_model.model.lm_head.weight": draw(140, 32)}
    adapter = write_adapter(base, rows | lora(EMBEDDING, vocab_size=140))
    model = create_model(adapter, device="cpu", dtype="float32")
    a, b = lora(EMBEDDING, vocab_size=140).values()
    assert difference(model.word_embeddings.weight, draw(140, 32) + 2 * (b @ a).T) < 1e-5
    assert model(torch.tensor([[139]])).shape[-1] == model.config.vocab_size == 140


def dense(rank: int = 4) -> dict[str, Tensor]:
    return {key: tensor for name in MATRICES for key, tensor in lora(name, rank).items()}


def test_an_adapter_is_read_like_any_other_checkpoint(base, tmp_path):
    """In one precision or another, from either file, converted: always the model that the merge gives in fp32."""
    adapter = write_adapter(base, dense())
    expected = create_model(adapter, device="cpu", dtype="float32")(IDS)
    assert difference(expected, create_model(base, device="cpu", dtype="float32")(IDS)) > 1
    assert main(["convert", str(adapter), str(tmp_path / "merged"), "--to", "huggingface"]) == 0
    convert_to_slim(adapter, tmp_path / "slim", ranks=2)
    torch.save(load_file(adapter / ADAPTER_FILES[0]), adapter / ADAPTER_FILES[1])
    (adapter / ADAPTER_FILES[0]).unlink()
    for path in (adapter, tmp_path / "merged", tmp_path / "slim"):
        assert torch.equal(create_model(path, device="cpu", dtype="float32")(IDS), expected), path
    quantized = convert_to_quantized(adapter, tmp_path / "int8")
    assert torch.equal(create_model(adapter, dtype="int8")(IDS), create_model(quantized)(IDS))


def test_a_change_is_rounded_once_to_the_models_precision_or_a_files_and_never_overflows(tmp_path, random_model):
    """Rounded to the base's half precision before a model is made in fp32, small changes would be lost."""
    write_huggingface(random_model(BASE).half(), tmp_path / "half")
    adapter, name = write_adapter(tmp_path / "half", dense()), MATRICES[0]
    a, b = lora(name).values()
    merged = torch.addmm(tensors_of(tmp_path / "half")[name].float(), b, a, alpha=2)
    checkpoint = open_checkpoint(adapter)
    assert checkpoint.dtype == torch.float16
    assert torch.equal(tensors_of(adapter)[name], merged.half())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = create_model(adapter, device="cpu", dtype=dtype)
        assert torch.equal(model.get_parameter(name), merged.to(dtype))
    assert {key: tensor.dtype for key, tensor in checkpoint.tensors()} == checkpoint.dtypes()
    write_adapter(tmp_path / "half", dense(), lora_alpha=10**7)
    with pytest.raises(CheckpointError, match=r"holds [\d,]+, but torch\.float16 ends at 65,504"):
        tensors_of(adapter)


def test_info_names_the_adapter_and_its_base(base, capsys):
    adapter = write_adapter(base, dense())
    assert main(["info", str(adapter)]) == 0
    said = capsys.readouterr().out
    assert f"{adapter}, LoRA of rank 4 on {base}" in said and f"adapter of {len(MATRICES)} tensors" in said


def test_the_tokenizer_is_the_adapters_own_or_its_bases(tmp_path, random_model):
    for name, text in (("base", "the fox and the hen"), ("own", "a house and a garden in it")):
        (tmp_path / name).mkdir()
        save_tokenizer(train_tokenizer([text], 290), tmp_path / name / "tokenizer.json")
    write_huggingface(random_model(WITH_TOKENIZER), tmp_path / "model", tmp_path / "base" / "tokenizer.json")
    adapter = write_adapter(tmp_path / "model", lora(MATRICES[0]))
    assert create_tokenizer(adapter).to_str() == create_tokenizer(tmp_path / "base").to_str()
    base = open_checkpoint(tmp_path / "model").config
    assert open_checkpoint(adapter).config == base and base.tokenizer_vocab_size < base.vocab_size
    (tmp_path / "own" / "tokenizer.json").rename(adapter / "tokenizer.json")
    (adapter / "generation_config.json").write_text('{"eos_token_id": 7, "top_k": 5}')
    assert create_tokenizer(adapter).to_str() != create_tokenizer(tmp_path / "base").to_str()
    assert open_checkpoint(adapter).config.eos_token_ids == (7,)
    convert_to_slim(adapter, tmp_path / "slim", ranks=1)
    assert json.loads((tmp_path / "slim" / "generation_config.json").read_text())["top_k"] == 5


def as_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        fields = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))

    return edit


def says(**changes: Any) -> Callable[[Path], None]:
    return as_json(ADAPTER_CONFIG, **changes)


def holds(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / ADAPTER_FILES[0])
        change(tensors)
        save_file(tensors, folder / ADAPTER_FILES[0])

    return edit


def base_of_its_own(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def int8_base(folder: Path) -> None:
    write_quantized(open_checkpoint(folder.with_name("base")), folder.with_name("int8"))
    says(base_model_name_or_path=str(folder.with_name("int8")))(folder)


FIRST = "base_model.model." + their_name(MATRICES[0]).removesuffix("weight")
REFUSED = {
    "IA3": (says(peft_type="IA3"), "an adapter of type IA3; only LORA is read"),
    "prefix tuning": (says(peft_type="PREFIX_TUNING", r=None), "an adapter of type PREFIX_TUNING"),
    "LoHa": (says(peft_type="LOHA"), "an adapter of type LOHA"),
    "DoRA": (says(use_dora=True), "DoRA: use_dora is True; only plain LoRA"),
    "PiSSA": (says(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'"),
    "tokens trained one by one": (says(trainable_token_indices=[1, 2]), "trainable_token_indices is "),
    "layers repeated": (says(layer_replication=[[0, 2], [1, 2]]), "layer_replication is "),
    "a setting of later versions": (says(use_something=True), "use_something is True; only plain LoRA"),
    "no base": (says(base_model_name_or_path=None), "names no base model"),
    "a base elsewhere": (says(base_model_name_or_path="/home/me/pythia"), "/home/me/pythia is not at /home/me/pythia;"),
    "a base that is not fetched": (
        says(base_model_name_or_path="someone/never-fetched", revision="step7"),
        "not in the Hub's cache; fetch it with: python -m neox_lib download someone/never-fetched --revision step7",
    ),
    "an adapter of itself": (lambda folder: says(base_model_name_or_path=str(folder))(folder), "an adapter itself"),
    "a base in int8": (int8_base, "int8 weights, which can be run but not converted"),
    "a whole model beside it": (base_of_its_own, "holds a whole model and an adapter"),
    "a rank that is none": (says(r="4"), r"not a LoRA config: its ranks are \['4'\]"),
    "another rank": (says(r=8), r"lora_A\.weight has shape \[4, 32\], expected \[8, 32\] from the base model"),
    "another base": (
        holds(lambda tensors: tensors.update({f"{FIRST}lora_B.weight": draw(64, 4)})),
        r"lora_B\.weight has shape \[64, 4\], expected",
    ),
    "half of a pair": (holds(lambda tensors: tensors.pop(f"{FIRST}lora_B.weight")), "only one of lora_A and lora_B"),
    "a tensor of another model": (
        holds(lambda tensors: tensors.update({"base_model.model.model.layers.0.q_proj.lora_A.weight": draw(4, 32)})),
        r"unexpected \S+q_proj\.lora_A\.weight; the base model has no place for it",
    ),
    "nothing": (holds(lambda tensors: tensors.clear()), "holds no LoRA tensors"),
    "no weights": (lambda folder: (folder / ADAPTER_FILES[0]).unlink(), "an adapter without its weights"),
}


@pytest.mark.parametrize(("damage", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_merged_exactly_is_one_line_that_names_it(base, monkeypatch, tmp_path, damage, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    adapter = write_adapter(base, dense())
    damage(adapter)
    with pytest.raises(CheckpointError, match=said) as error:
        open_checkpoint(adapter)
    assert len(str(error.value).splitlines()) == 1


def test_an_embedding_that_is_the_output_too_is_left_alone(tmp_path, random_model):
    """PEFT adds to the embedding alone; merged into a tied matrix, the scores would change with it."""
    write_huggingface(random_model(replace(BASE, tie_word_embeddings=True)), tmp_path / "tied")
    adapter = write_adapter(tmp_path / "tied", lora(EMBEDDING))
    with pytest.raises(CheckpointError, match="changes the embedding, which the base model ties to its output"):
        open_checkpoint(adapter)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"attention.dense": 2}, "bias": "all"},
        {"target_modules": ["embed_in", "lm_head", "dense"], "alpha_pattern": {"dense": 3, "lm_head": 5}},
        {"target_modules": ["dense"], "lora_bias": True},
        {"target_modules": ["dense"], "modules_to_save": ["embed_in", "lm_head", "final_layer_norm"]},
    ],
)
def test_peft_itself_merges_to_the_same_model(base, settings):
    peft = pytest.importorskip("peft", reason="needs PEFT")
    from transformers import GPTNeoXForCausalLM

    theirs = peft.get_peft_model(GPTNeoXForCausalLM.from_pretrained(base), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3) if "lora" in name else parameter.add_(0.2)
    theirs.save_pretrained(base.with_name("adapter"))
    with torch.inference_mode():
        expected = theirs.merge_and_unload().eval()(IDS).logits
        ours = create_model(base.with_name("adapter"), device="cpu", dtype="float32")
        assert difference(ours(IDS), expected) < 1e-4 * expected.abs().max()
