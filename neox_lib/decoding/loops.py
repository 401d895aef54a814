# type: ignore  # what these functions take, Numba finds out
"""A few tokens through the whole model in loops that Numba compiles, weights read where they lie.

A token's time is the time in which memory delivers the weights, so each weight is read once, in its stored form, and
nothing is copied. Every thread runs `forward`, from the first layer to the last. A step of a layer is cut into chunks;
a thread takes the next chunk that nobody has, and goes on to the next step when all chunks are done. So nothing is
shared out in advance: a thread that another program holds up finds its work done by the others.

Letters: R rows, the B x T new tokens; C hidden, I inner, H heads, D head size, S cached + new, V vocabulary. Weights
are `[out, in]`; their `address` stands in for a model's tensors, of which Numba knows nothing.
"""

import math
import sys
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

# An activation beside int8 weights is rounded to so many steps, and so many products fit into 32 bits: 127 x 16383 x
# 1024 < 2^31. The rounding is 2^-15 of a row's largest activation, 1/256 of what rounding the weights to int8 cost.
STEPS, BLOCK = 16383, 1024
PLACES = 16  # addresses per layer: two norms of 2 tensors, four matrices of 3

# Sums may be reordered, which is what makes eight additions one instruction; NaN and infinity stay what they are.
OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz", "arcp"}}


def compiled(function):
    """Compile a function when it is first called, and keep the result on disk, where there is a place to write."""
    try:
        return njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # no cache directory
        return njit(**OPTIONS)(function)


@intrinsic
def widen(typingctx, weight):
    """A weight as fp32: int8 is a whole number, uint16 holds the bits of an fp16 number, int16 those of a bfloat16."""

    def generate(context, builder, signature, arguments):
        (bits,) = arguments
        if weight == types.int8:
            return builder.sitofp(bits, ir.FloatType())
        if weight == types.uint16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
        if weight == types.int16:
            word = ir.IntType(32)
            return builder.bitcast(builder.shl(builder.zext(bits, word), ir.Constant(word, 16)), ir.FloatType())
        return bits

    return types.float32(weight), generate


@intrinsic
def multiply_add(typingctx, total, weight, factor):
    """total + weight x factor in 32 bits: a processor multiplies 16-bit numbers and adds them pair by pair at once."""

    def generate(context, builder, signature, arguments):
        total, *factors = arguments
        return builder.add(total, builder.mul(*(builder.sext(each, ir.IntType(32)) for each in factors)))

    return types.int32(types.int32, types.int8, types.int16), generate


@intrinsic
def pointer(typingctx, address, like):
    """An address as a pointer to numbers of an array's dtype."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), generate


@intrinsic
def add_atomically(typingctx, counters, index, amount):
    """counters[index] += amount, in one go for all threads; returns the count before."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(counters)(context, builder, arguments[0])
        place = cgutils.get_item_pointer(context, builder, counters, array, [arguments[1]])
        return builder.atomic_rmw("add", place, arguments[2], "seq_cst")

    return types.int64(counters, types.int64, types.int64), generate


step_aside = types.ExternalFunction("SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32())


@compiled
def take(counters, phase):
    """The next chunk of a step that no thread has yet; past the last one, any larger number."""
    return add_atomically(counters, 2 * phase, 1)


@compiled
def done(counters, phase):
    """Count a chunk as done."""
    add_atomically(counters, 2 * phase + 1, 1)


@compiled
def wait(counters, phase, chunks):
    """Return when all chunks of a step are done. Only the last ones, in other threads' hands, are waited for."""
    looks = 0
    while add_atomically(counters, 2 * phase + 1, 0) < chunks:
        looks += 1
        if looks > 1000:
            step_aside()


@compiled
def rows_of_a_chunk(rows, row_bytes, chunk_bytes):
    """How many rows of weights a thread takes at once: chunks of some bytes, and not more than 256 of them."""
    return max(1, chunk_bytes // row_bytes, rows // 256)


class Matrix(NamedTuple):
    """Weights `[out, in]`, of int4 as nibbles `[out, in / 2]`; the scales of each output `[out, 1]`, 1 where there is
    none, of int4 bfloat16's bits `[out, in / 32]`; and its bias, 0 where there is none.
    """

    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


class Shape(NamedTuple):
    """The model's sizes and kinds: `exact` GELU or its tanh form, `parallel` residual or sequential."""

    hidden: int
    inner: int
    heads: int
    vocabulary: int
    epsilon: np.float32
    exact: bool
    parallel: bool
    chunk: int  # bytes of weights in a chunk of work


class Buffers(NamedTuple):
    """What the threads share, all fp32 but `padding`: the R rows, the cache, the rotary rows of the new tokens."""

    hidden: np.ndarray  # [R, C], the residual stream
    projected: np.ndarray  # [R, 3C], queries, keys and values
    attended: np.ndarray  # [R, C]
    inner: np.ndarray  # [R, I]
    logits: np.ndarray  # [R, V], or [B, V] for the last tokens only
    keys: np.ndarray  # [L, B, H, capacity, D]
    values: np.ndarray
    cos: np.ndarray  # [B, T, rotary dimensions]
    sin: np.ndarray
    padding: np.ndarray  # [B], int64: cached tokens to leave out at the start


@compiled
def vector(address, size):
    return carray(pointer(address, np.empty(0, np.float32)), (size,))


def matrix(places, outputs, inputs, like):
    """The matrix at three addresses, its weights in the dtype of `like`."""


@overload(matrix)
def choose_matrix(places, outputs, inputs, like):
    def whole(places, outputs, inputs, like):
        weight, scale = pointer(places[0], like), pointer(places[1], np.empty(0, np.float32))
        return Matrix(carray(weight, (outputs, inputs)), carray(scale, (outputs, 1)), vector(places[2], outputs))

    def in_groups(places, outputs, inputs, like):
        weight, scale = pointer(places[0], like), pointer(places[1], np.empty(0, np.int16))
        groups = carray(scale, (outputs, inputs // 32))
        return Matrix(carray(weight, (outputs, inputs // 2)), groups, vector(places[2], outputs))

    return in_groups if like.dtype == types.uint8 else whole


@compiled
def dot_float(weights, numbers):
    total = np.float32(0)
    for i in range(numbers.size):
        total += widen(weights[i]) * numbers[i]
    return total


@compiled
def dot_block(weights, numbers):
    total = np.int32(0)
    for i in range(numbers.size):
        total = multiply_add(total, weights[i], numbers[i])
    return total


@compiled
def dot_int8(weights, numbers):
    total = np.float32(0)
    for start in range(0, numbers.size, BLOCK):
        total += np.float32(dot_block(weights[start : start + BLOCK], numbers[start : start + BLOCK]))
    return total


class Lanes(types.Type):
    """Eight fp32 sums side by side."""


FLOATS, lanes = ir.VectorType(ir.FloatType(), 8), Lanes("lanes")


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, FLOATS)


@intrinsic
def no_sums(typingctx):
    return lanes(), lambda context, builder, signature, arguments: ir.Constant(FLOATS, [0.0] * 8)


@intrinsic
def add_group(typingctx, sums, nibbles, scales, numbers, group):
    """sums + the scale of a group x the products of its 32 weights and activations, four products in each lane.

    Written in vectors, which compilers do not make of a loop as short as this one. A pair of products and their sum are
    one instruction as long as no other sum is mixed into theirs: the fence keeps it out.
    """

    def generate(context, builder, signature, arguments):
        def whole(bits, size, numbers=None):
            kind = ir.VectorType(ir.IntType(bits), size)
            return kind if numbers is None else ir.Constant(kind, list(numbers))

        def load(which, kind, part=0, parts=1):
            array = context.make_array(signature.args[which])(context, builder, arguments[which])
            place = builder.mul(arguments[4], ir.Constant(ir.IntType(64), parts))
            place = builder.add(place, ir.Constant(ir.IntType(64), part))
            loaded = builder.load(builder.gep(builder.bitcast(array.data, kind.as_pointer()), [place]))
            loaded.align = 1
            return loaded

        def pairs(half, part):
            factors = builder.sub(half, whole(16, 16, [8] * 16)), load(3, whole(16, 16), part, 2)
            products = builder.mul(*(builder.sext(each, whole(32, 16)) for each in factors))
            even, odd = (builder.shuffle_vector(products, products, whole(32, 8, range(at, 16, 2))) for at in (0, 1))
            return builder.add(even, odd)

        both = builder.zext(load(1, whole(8, 16)), whole(16, 16))
        low = pairs(builder.and_(both, whole(16, 16, [15] * 16)), 0)
        high = pairs(builder.lshr(both, whole(16, 16, [4] * 16)), 1)
        kind = ir.FunctionType(FLOATS, [FLOATS])
        fence = cgutils.get_or_insert_function(builder.module, kind, "llvm.arithmetic.fence.v8f32")
        low = builder.bitcast(builder.call(fence, [builder.bitcast(low, FLOATS)]), whole(32, 8))
        bits = load(2, whole(16, 1))  # bfloat16 is the upper half of fp32
        bits = builder.bitcast(builder.shuffle_vector(bits, bits, whole(32, 16, [0] * 16)), whole(32, 8))
        scale = builder.bitcast(builder.and_(bits, whole(32, 8, [0xFFFF0000] * 8)), FLOATS)
        scaled = builder.fmul(builder.sitofp(builder.add(low, high), FLOATS), scale, flags=("contract",))
        return builder.fadd(arguments[0], scaled, flags=("contract",))

    return lanes(sums, nibbles, scales, numbers, types.int64), generate


@intrinsic
def total(typingctx, sums):
    """The sum of all lanes."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), FLOATS])
        add_up = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v8f32")
        return builder.call(add_up, [ir.Constant(ir.FloatType(), 0.0), *arguments], fastmath=("reassoc",))

    return types.float32(sums), generate


@compiled
def dot_int4(nibbles, scales, numbers):
    one, other, groups = no_sums(), no_sums(), len(scales)
    for g in range(0, groups - 1, 2):  # in two sums, since an addition has to wait for the one before it
        one = add_group(one, nibbles, scales, numbers, g)
        other = add_group(other, nibbles, scales, numbers, g + 1)
    if groups % 2:
        one = add_group(one, nibbles, scales, numbers, groups - 1)
    return total(one) + total(other)


@compiled
def round_rows(rows):
    """rows `[R, in]` fp32 -> whole numbers `[R, in]` int16 and each row's step: number x step is the activation."""
    numbers, steps = np.empty(rows.shape, np.int16), np.empty(len(rows), np.float32)
    for r in range(len(rows)):
        row, largest, broken = rows[r], np.float32(0), np.float32(0)
        for i in range(row.size):
            largest = max(largest, abs(row[i]))
            broken += row[i] * np.float32(0)  # NaN where a number is NaN or infinite, and then so is all that follows
        steps[r] = largest / np.float32(STEPS) + broken
        inverse = np.float32(STEPS) / max(largest, np.float32(1e-30))
        for i in range(row.size):
            numbers[r, i] = np.int16(np.rint(row[i] * inverse))
    return numbers, steps


@compiled
def keep_rows(rows):
    return rows, np.ones(len(rows), np.float32)


def factors(rows, like):
    """Activations `[R, in]` as the product with weights like these takes them, and the step of each row."""


def dot(weights, scales, numbers):
    """The sum of products of a row of weights, with their scales, and a row of `factors`."""


@overload(factors)
def choose_factors(rows, like):
    if like.dtype in (types.int8, types.uint8):
        return lambda rows, like: round_rows(rows)
    return lambda rows, like: keep_rows(rows)


@overload(dot)
def choose_dot(weights, scales, numbers):
    if weights.dtype == types.uint8:
        return lambda weights, scales, numbers: dot_int4(weights, scales, numbers)
    if weights.dtype == types.int8:
        return lambda weights, scales, numbers: scales[0] * dot_int8(weights, numbers)
    return lambda weights, scales, numbers: scales[0] * dot_float(weights, numbers)


@compiled
def output(matrix, row, numbers, step):
    """One output number: a row of the matrix times a row of `factors`."""
    return step * dot(matrix.weight[row], matrix.scale[row], numbers) + matrix.bias[row]


@compiled
def multiply(matrix, rows, out):
    """rows `[R, in]` times a whole matrix -> out `[R, out]`, on one thread: the product alone."""
    numbers, steps = factors(rows, matrix.weight)
    for r in range(len(rows)):
        for row in range(len(matrix.weight)):
            out[r, row] = output(matrix, row, numbers[r], steps[r])


@compiled
def normalize(rows, weight_place, bias_place, epsilon):
    """LayerNorm of each row: `[R, C]` -> `[R, C]`."""
    normed = np.empty(rows.shape, np.float32)
    weight, bias = vector(weight_place, rows.shape[1]), vector(bias_place, rows.shape[1])
    for r in range(len(rows)):
        row, mean, variance = rows[r], np.float32(0), np.float32(0)
        for i in range(row.size):
            mean += row[i]
        mean /= np.float32(row.size)
        for i in range(row.size):
            variance += (row[i] - mean) * (row[i] - mean)
        spread = np.float32(1) / np.sqrt(variance / np.float32(row.size) + epsilon)
        for i in range(row.size):
            normed[r, i] = (row[i] - mean) * spread * weight[i] + bias[i]
    return normed


@compiled
def exponential(x):
    """e^x in fp32 without a branch, so that eight are computed at once: 2^n e^r with |r| at most half of ln 2."""
    x = max(np.float32(-87), min(np.float32(88), x))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693147181)
    series = np.float32(1 / 720)
    for term in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        series = series * r + np.float32(term)
    return series * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled
def gelu(numbers, exact):
    """GELU, exact or by its tanh form, in place. 1/2 (1 + tanh u) is 1 / (1 + e^-2u)."""
    for i in range(numbers.size):
        x = numbers[i]
        if exact:
            numbers[i] = np.float32(0.5) * x * (np.float32(1) + math.erf(x * np.float32(math.sqrt(0.5))))
        else:
            u = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
            numbers[i] = x / (np.float32(1) + exponential(np.float32(-2) * u))


@compiled
def rotate(vector, cos, sin):
    """Turn the pairs (i, i + half) by their angles, in place."""
    half = cos.size // 2
    for i in range(half):
        first, second = vector[i], vector[i + half]
        vector[i] = first * cos[i] - second * sin[i]
        vector[i + half] = second * cos[i] + first * sin[i]


@compiled
def attend_to(query, keys, values, out):
    """One query `[D]` over keys and values `[S, D]` -> out `[D]`: softmax of the scaled scores, then the sum."""
    positions = len(keys)
    weights, largest = np.empty(positions, np.float32), np.float32(-np.inf)
    scale = np.float32(1 / math.sqrt(query.size))
    for s in range(positions):
        weights[s] = dot_float(keys[s], query) * scale
        largest = max(largest, weights[s])
    total = np.float32(0)
    for s in range(positions):
        total += weights[s] * np.float32(0)  # NaN where a score is NaN or infinite
        weights[s] = exponential(weights[s] - largest)
        total += weights[s]
    for i in range(out.size):
        out[i] = 0
    fours = positions // 4 * 4
    for s in range(0, fours, 4):  # four at a time: `out` is loaded and stored once for them
        a, b, c, d = weights[s], weights[s + 1], weights[s + 2], weights[s + 3]
        one, two, three, four = values[s], values[s + 1], values[s + 2], values[s + 3]
        for i in range(out.size):
            out[i] += a * one[i] + b * two[i] + c * three[i] + d * four[i]
    for s in range(fours, positions):
        weight, value = weights[s], values[s]
        for i in range(out.size):
            out[i] += weight * value[i]
    for i in range(out.size):
        out[i] /= total


@compiled
def expand(counters, phase, places, like, shape, buffers, first, last):
    """Rows first .. last - 1 of the two matrices that read a norm, one under the other: 3C of queries, keys and values,
    and I of the MLP, with its GELU.
    """
    hidden, attention = shape.hidden, 3 * shape.hidden
    project = matrix(places[4:7], attention, hidden, like)
    widen_mlp = matrix(places[10:13], shape.inner, hidden, like)
    step = rows_of_a_chunk(last - first, hidden * like.itemsize, shape.chunk)
    chunks = (last - first + step - 1) // step
    numbers, steps = factors(normalize(buffers.hidden, places[0], places[1], shape.epsilon), like)
    second, second_steps = factors(normalize(buffers.hidden, places[2], places[3], shape.epsilon), like)
    chunk = take(counters, phase)
    while chunk < chunks:
        start, end = first + chunk * step, min(last, first + (chunk + 1) * step)
        for r in range(len(numbers)):
            for row in range(start, min(end, attention)):
                buffers.projected[r, row] = output(project, row, numbers[r], steps[r])
            start_inner, end_inner = max(start, attention) - attention, max(end, attention) - attention
            for row in range(start_inner, end_inner):
                buffers.inner[r, row] = output(widen_mlp, row, second[r], second_steps[r])
            gelu(buffers.inner[r, start_inner:end_inner], shape.exact)
        done(counters, phase)
        chunk = take(counters, phase)
    wait(counters, phase, chunks)


@compiled
def attend(counters, phase, layer, shape, buffers, held):
    """Rotary, the cache and attention, a head at a time: `projected` -> `attended`."""
    batch, tokens, _ = buffers.cos.shape
    size, heads = buffers.keys.shape[4], shape.heads
    chunk = take(counters, phase)
    while chunk < batch * heads:
        b, h = chunk // heads, chunk % heads
        keys, values = buffers.keys[layer, b, h], buffers.values[layer, b, h]
        for t in range(tokens):
            own = buffers.projected[b * tokens + t, 3 * h * size : 3 * (h + 1) * size]  # query, key and value
            rotate(own[:size], buffers.cos[b, t], buffers.sin[b, t])
            rotate(own[size : 2 * size], buffers.cos[b, t], buffers.sin[b, t])
            for i in range(size):
                keys[held + t, i], values[held + t, i] = own[size + i], own[2 * size + i]
        for t in range(tokens):
            query = buffers.projected[b * tokens + t, 3 * h * size : (3 * h + 1) * size]
            first, last = min(buffers.padding[b], held + t), held + t + 1  # padding sees itself
            out = buffers.attended[b * tokens + t, h * size : (h + 1) * size]
            attend_to(query, keys[first:last], values[first:last], out)
        done(counters, phase)
        chunk = take(counters, phase)
    wait(counters, phase, batch * heads)


@compiled
def reduce(counters, phase, places, like, shape, buffers, attention, mlp):
    """Add the outputs of attention, of the MLP or of both to the residual stream."""
    dense = matrix(places[7:10], shape.hidden, shape.hidden, like)
    narrow_mlp = matrix(places[13:16], shape.hidden, shape.inner, like)
    step = rows_of_a_chunk(shape.hidden, (shape.hidden + shape.inner) * like.itemsize, shape.chunk)
    chunks = (shape.hidden + step - 1) // step
    attended, steps = factors(buffers.attended, like)
    inner, inner_steps = factors(buffers.inner, like)
    chunk = take(counters, phase)
    while chunk < chunks:
        for r in range(len(attended)):
            for row in range(chunk * step, min(shape.hidden, (chunk + 1) * step)):
                if attention:
                    buffers.hidden[r, row] += output(dense, row, attended[r], steps[r])
                if mlp:
                    buffers.hidden[r, row] += output(narrow_mlp, row, inner[r], inner_steps[r])
        done(counters, phase)
        chunk = take(counters, phase)
    wait(counters, phase, chunks)


@compiled
def score(counters, phase, places, like, shape, buffers):
    """The last norm and the output matrix: of each row, or of the last of each text."""
    final = matrix(places[2:5], shape.vocabulary, shape.hidden, like)
    every = len(buffers.hidden) // len(buffers.logits)
    last = np.empty((len(buffers.logits), shape.hidden), np.float32)
    for r in range(len(last)):
        for i in range(shape.hidden):
            last[r, i] = buffers.hidden[(r + 1) * every - 1, i]
    numbers, steps = factors(normalize(last, places[0], places[1], shape.epsilon), like)
    step = rows_of_a_chunk(shape.vocabulary, shape.hidden * like.itemsize, shape.chunk)
    chunks = (shape.vocabulary + step - 1) // step
    chunk = take(counters, phase)
    while chunk < chunks:
        for r in range(len(numbers)):
            for row in range(chunk * step, min(shape.vocabulary, (chunk + 1) * step)):
                buffers.logits[r, row] = output(final, row, numbers[r], steps[r])
        done(counters, phase)
        chunk = take(counters, phase)
    wait(counters, phase, chunks)


PHASES = 5  # per layer, of a sequential residual; a parallel one leaves two out


@compiled
def forward(counters, layers, final, like, like_final, shape, buffers, held):
    """One thread's part of a pass. `counters` are zeros, `2 * (PHASES * L + 1)` of them; `layers` are addresses `[L,
    PLACES]`, `final` those of the last norm and the output matrix; `held` tokens are in the cache.
    """
    both = 3 * shape.hidden + shape.inner
    for layer in range(len(layers)):
        places, phase = layers[layer], PHASES * layer
        if shape.parallel:  # both branches read the same hidden state, so their matrices are read in one go
            expand(counters, phase, places, like, shape, buffers, 0, both)
            attend(counters, phase + 1, layer, shape, buffers, held)
            reduce(counters, phase + 2, places, like, shape, buffers, True, True)
        else:
            expand(counters, phase, places, like, shape, buffers, 0, 3 * shape.hidden)
            attend(counters, phase + 1, layer, shape, buffers, held)
            reduce(counters, phase + 2, places, like, shape, buffers, True, False)
            expand(counters, phase + 3, places, like, shape, buffers, 3 * shape.hidden, both)
            reduce(counters, phase + 4, places, like, shape, buffers, False, True)
    score(counters, PHASES * len(layers), final, like_final, shape, buffers)
