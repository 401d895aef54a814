"""Where names went that older notebooks import: a learner's copy may be older than the library.

Copies are never changed: `make lab` reports what has moved, and promoting looks each name up in its new place.
"""

import hashlib

# Modules, below neox_lib; the longest match counts.
MODULES = {
    "checkpoint": "checkpoints.slim.reader",
    "decoding.linear": "quantization.linear",
    "files": "checkpoints.files",
    "layout": "checkpoints.slim.layout",
    "lesson": "course",
    "lesson.diagrams": "course.figures.diagrams",
    "lesson.figures_attention": "course.figures.attention",
    "lesson.figures_cached_generation": "course.figures.cached_generation",
    "lesson.figures_checkpoint_loading": "course.figures.checkpoint_loading",
    "lesson.figures_parallel_residual": "course.figures.parallel_residual",
    "lesson.figures_rotary": "course.figures.rotary",
    "lesson.figures_start_here": "course.figures.start_here",
    "lesson.figures_tokenizer": "course.figures.tokenizer",
    "lesson.figures_two_devices": "course.figures.two_devices",
    "lesson.plots": "course.figures.plots",
    "play": "playground",
    "playground.recall": "recall",
    "quantization.int8_linear": "quantization.linear",
    "release": "checkpoints.slim.config",
    "scale.bench": "bench.measure",
    "scale.int8_file": "checkpoints.quantized",
    "scale.int8_linear": "quantization.linear",
    "scale.linear": "quantization.linear",
    "scale.loading": "loading",
    "scale.parallel": "distributed.tensor_parallel",
    "scale.quantization": "quantization.int8",
    "scale.ranks": "distributed.ranks",
    "scale.weights": "checkpoints.checkpoint",
    "scoring": "evaluation.likelihood",
    "sharding": "checkpoints.slim.partition",
    "slim_writer": "checkpoints.slim.writer",
    "splitting": "checkpoints.slim.partition",
    "streaming": "playground.streaming",
}

# Names that did not move with their module.
NAMES = {
    "checkpoint.BUFFERS": "checkpoints.files.BUFFERS",
    "checkpoint.LayerFile": "checkpoints.checkpoint.LayerFile",
    "checkpoints.quantized.int8_bytes": "checkpoints.quantized.quantized_bytes",
    "checkpoints.quantized.write_int8": "checkpoints.quantized.write_quantized",
    "course.figures.two_devices.meetings": "course.figures.two_devices.all_reduces",
    "decoding.linear.FastLinear": "quantization.linear.CastLinear",
    "decoding.linear.use_fast_linear": "quantization.linear.use_cast_linear",
    "files.write_text_atomically": "checkpoints.atomic.write_text_atomically",
    "layout.empty_model": "checkpoints.build.empty_model",
    "layout.parameter_shapes": "config.parameter_shapes",
    "lesson.figures_two_devices.meetings": "course.figures.two_devices.all_reduces",
    "model.model_attention_weights": "inspection.attention.model_attention_weights",
    "quantization.int8_linear.use_int8_linear": "quantization.linear.use_quantized_linear",
    "quantization.linear.use_int8_linear": "quantization.linear.use_quantized_linear",
    "scale.fits.preset": "config.preset",
    "scale.int8_file.int8_bytes": "checkpoints.quantized.quantized_bytes",
    "scale.int8_file.write_int8": "checkpoints.quantized.write_quantized",
    "scale.int8_linear.Int8Linear": "quantization.linear.QuantizedLinear",
    "scale.int8_linear.use_int8_linear": "quantization.linear.use_quantized_linear",
    "scale.linear.FastLinear": "quantization.linear.CastLinear",
    "scale.linear.use_fast_linear": "quantization.linear.use_cast_linear",
    "scale.named.create_tokenizer": "loading.create_tokenizer",
    "tokenizer.create_tokenizer": "loading.create_tokenizer",
    "tokenizer.find_tokenizer": "checkpoints.tokenizer_files.find_tokenizer",
}

# Names that are gone, and what replaces them.
GONE = {
    "checkpoint.describe_slim": "checkpoints.slim.reader.inventory",
    "checkpoint.load_slim": "loading.create_model",
    "checkpoint.read_tensors": "checkpoints.slim.reader.SlimCheckpoint",
    "checkpoint.stored_dtype": "checkpoints.slim.reader.SlimCheckpoint",
    "generation.ENDOFTEXT_ID": "config.NeoXConfig",
    "generation.PrefillStopped": "model.Stopped",
    "generation._Row": "generation.generate_tokens",
    "generation._steps": "generation.generate_tokens",
    "generation.next_token_logits": "generation.prefill",
    "lesson.figures_tokenizer.byte_table": "course.figures.tokenizer.box_rows",
    "sampling.fewest_reaching": "sampling.top_p_mask",
    "scale.int8_file.load_int8": "loading.create_model",
    "scale.weights.open_weights": "checkpoints.opening.open_checkpoint",
}

# For every promoted definition of an older original: the first 8 digits of its text's SHA-256. In a learner's copy such
# a text is not their own work, so promoting must not put it back into the library.
OLDER_TEXTS = """
    4faf9d90 7689868c 1ab2624b 7cf38376 2fb28f6a ff88abca dcd70231 1c062b11 11a546ba 0c1e5d0a c84981fe a85fd331
    19881b20 e7692925 b14e7af8 3f46918a 949ef859 84d270e0 99704545 6b12fbce 36a22b2f 14b62d8f c2100411 78e1c975
    5fb0a69c 2b72bac1 880ab54c 1b9fec65 600486e4 74c8b832 75da1093 83e9e3dc 61875ece 21d06dda 51871891 876b20c2
    aef438ee 325ef5b4 e697de42 4145b4c4 4b37261a bf4309b9 9d7e593d 4fe48d5e 200792bd ae2444dd cae5b6bc dfd17923
    108635ee 6446703a 2d3c35b3 60a3ae67 8e70e9d0 c6ca1285 1170c839 42a05dc7 39946011 171eeab0 28d9e2d1 c7635725
    1a336e73 e36ee5e2 4ae49ffc 07530b98 721fb3e4 d85bbd56 ace07721 be305c06 f0055f2a a9d74c20 c31834e2 448a66dd
    79b0c640 759e9e99 12d338f3 fee23aa6 78387467 38979cb0 3b35c4ec 7c77c584 3c0be8db 754ea05a 825acf87 730458d3
    1503f2a2 eed272fd 8c7bd3f8 b168c0e2 9992fdaf 4b0fc4f1 3b134a2e a87d7027 185ab58f 7a805121 006ca07e 05b5d927
    05d2496e 0da010a2 1014b064 1351cbdb 1566ba66 16b206b7 1778de3c 1901c8c4 1c0f90df 23ede561 298386f9 2c83eac8
    3130097b 33191082 34231ffd 360b92aa 3c496b0b 3d592f63 41a9d840 43795b75 43f193d7 489c6b08 4a0c9e28 4a2342fb
    4c4957f7 50f33967 52b1f016 580b10fc 5882f037 5946582b 5ab20cb8 607c02cb 63163ae4 6368e320 63998321 6e6af817
    6f4bdeac 700f5800 710a6cd1 72e1de97 747e6e49 74acc642 7c171cd2 7f7eb9d8 830ea038 89b50e7b 8a0a5e9e 8b53d44c
    996be67f 999d031b a1efa4af a98173c4 ab8cf9ed ae0068e1 b9b5fb66 bc4414cb c2cf30eb c9ea2a80 cae59866 cd3aba20
    cd726bd1 d3f7aa50 d99271f2 da0805aa db788d96 f11c6ab3 f2d64d33 f3c03adb f52afd68 f78d89cb 6d5f52bb bb38e63a
    78e3d486 b801beaa d278fd42
"""


def step(name: str) -> tuple[str, str] | None:
    """The entry that moves a dotted name, as (old, new); None for a name that has not moved."""
    if name in NAMES:
        return name, NAMES[name]
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        old = ".".join(parts[:length])
        if old in MODULES:
            return old, MODULES[old]
    return None


def current(name: str) -> str:
    """The current place of a dotted name below neox_lib.

    >>> current("lesson.plots.lines"), current("attention.Attention")
    ('course.figures.plots.lines', 'attention.Attention')
    """
    entry = step(name)
    return name if entry is None else entry[1] + name.removeprefix(entry[0])


def current_origin(origin: str) -> str:
    """The same for a name from any package; only those of neox_lib can have moved."""
    return f"neox_lib.{current(origin[9:])}" if origin.startswith("neox_lib.") else origin


def successor(name: str) -> str | None:
    """What replaces a name that is gone, whether given by its old or its current module; None for any other name."""
    return {current(old): new for old, new in GONE.items()}.get(current(name))


def is_older_text(text: str) -> bool:
    """Whether a definition's text is that of an older original."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:8] in OLDER_TEXTS.split()
