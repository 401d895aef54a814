# type: ignore  # what these functions take, Numba finds out
"""Tokens through the whole model in loops that Numba compiles, weights read where they lie.

One token's time is the time in which memory delivers the weights, so each weight is read once, in its stored form, and
nothing is copied. Many tokens' time is arithmetic, so weights meet four rows at a time (`products`).

Every thread runs `forward`, from the first layer to the last. A step of a layer is cut into chunks; a thread takes the
next chunk that nobody has, and goes on to the next step when all chunks are done. So nothing is shared out in advance:
a thread that another program holds up finds its work done by the others.

Letters: R rows, the B x T new tokens; C hidden, I inner, H heads, D head size, S cached + new, V vocabulary. Weights
are `[out, in]`; their `address` stands in for a model's tensors, of which Numba knows nothing. *Factors* are
activations as a product takes them: fp32, or, beside int8 and int4 weights, whole numbers, each row with a step of its
own.
"""

import math
import sys
from typing import NamedTuple

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from neox_lib.decoding.products import LANES, add_group, add_products, no_sums, total

# An activation beside int8 weights is rounded to so many steps: 2^-15 of a row's largest activation, 1/256 of what
# rounding the weights to int8 cost. Of a block's products, a lane adds up one in LANES: 127 x 16383 x 8192 / 8 < 2^31.
STEPS, BLOCK = 16383, 8192
ROWS, OUTPUTS = 4, LANES // 4  # multiplied at once
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
    """How many rows of weights a thread takes at once: fours of some bytes, in not more than 256 chunks."""
    return 4 * max(1, chunk_bytes // row_bytes // 4, rows // 1024)


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
    """What the threads share: fp32, but for factors."""

    hidden: np.ndarray  # [R, C], the residual stream
    normed: np.ndarray  # [2, R, C], factors: of attention, of the MLP
    projected: np.ndarray  # [R, 3C], queries, keys and values
    attended: np.ndarray  # [R, C]
    inner: np.ndarray  # [R, I]
    gathered: np.ndarray  # [R, C] and ...
    widened: np.ndarray  # ... [R, I]: the last two as factors
    steps: np.ndarray  # [4, R], of the rows of `normed`, `gathered` and `widened`
    scored: np.ndarray  # [N], int64: the rows whose logits are wanted
    last: np.ndarray  # [N, C], factors: their last norm
    last_steps: np.ndarray  # [N]
    logits: np.ndarray  # [N, V]
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


def to_factors(row, out):
    """Make one row of activations factors, in the dtype of `out`; returns their step."""


@overload(to_factors)
def choose_factors(row, out):
    def keep(row, out):
        for i in range(row.size):
            out[i] = row[i]
        return np.float32(1)

    def round_row(row, out):
        largest, broken = np.float32(0), np.float32(0)
        for i in range(row.size):
            largest = max(largest, abs(row[i]))
            broken += row[i] * np.float32(0)  # NaN where a number is NaN or infinite, and then so is all that follows
        inverse = np.float32(STEPS) / max(largest, np.float32(1e-30))
        for i in range(row.size):
            out[i] = np.int16(np.rint(row[i] * inverse))
        return largest / np.float32(STEPS) + broken

    return round_row if out.dtype == types.int16 else keep


@compiled
def sum_products(weight, first, last, numbers, r, sums):
    """Rows first .. last - 1 of weights times ROWS rows of factors from r on, or times the only one, to sums `[ROWS,
    last - first]`, which has room for OUTPUTS more.
    """
    sums[:] = 0
    for start in range(0, numbers.shape[1], BLOCK):
        stop = min(numbers.shape[1], start + BLOCK)
        if len(numbers) == 1:
            for row in range(first, last):  # one after the other, as they lie: the processor reads ahead
                add_products(sums, row - first, weight, row, numbers, 0, start, stop, 1, 1)
        else:
            for row in range(first, last, OUTPUTS):
                add_products(sums, row - first, weight, row, numbers, r, start, stop, OUTPUTS, ROWS)


@compiled
def dot_int4(nibbles, scales, numbers):
    one, other, groups = no_sums(), no_sums(), len(scales)
    for g in range(0, groups - 1, 2):  # in two sums, since an addition has to wait for the one before it
        one = add_group(one, nibbles, scales, numbers, g)
        other = add_group(other, nibbles, scales, numbers, g + 1)
    if groups % 2:
        one = add_group(one, nibbles, scales, numbers, groups - 1)
    return total(one) + total(other)


def scaled_products(matrix, first, last, numbers, r, sums):
    """`sum_products` with the weights' scales; int4 weights meet one row at a time."""


@overload(scaled_products)
def choose_products(matrix, first, last, numbers, r, sums):
    def of_rows(matrix, first, last, numbers, r, sums):
        sum_products(matrix.weight, first, last, numbers, r, sums)
        for n in range(min(ROWS, len(numbers) - r)):
            for i in range(last - first):
                sums[n, i] *= matrix.scale[first + i, 0]

    def of_groups(matrix, first, last, numbers, r, sums):
        for n in range(min(ROWS, len(numbers) - r)):
            for i in range(last - first):
                sums[n, i] = dot_int4(matrix.weight[first + i], matrix.scale[first + i], numbers[r + n])

    return of_groups if matrix[0].dtype == types.uint8 else of_rows


@compiled
def multiply(matrix, first, last, numbers, steps, out, add):
    """Outputs first .. last - 1 of rows of factors `[R, in]`, to out `[R, out]`; or added to what is there."""
    sums = np.empty((ROWS, max(0, last - first) + OUTPUTS), np.float32)
    for block in range(0, len(numbers), ROWS):
        scaled_products(matrix, first, last, numbers, block, sums)
        for r in range(block, min(len(numbers), block + ROWS)):
            found, row, step = sums[r - block], out[r], steps[r]
            for i in range(last - first):
                output = step * found[i] + matrix.bias[first + i]
                row[first + i] = row[first + i] + output if add else output


@compiled
def multiply_alone(matrix, rows, numbers, out):
    """rows `[R, in]` times a whole matrix -> out `[R, out]`, on one thread. `numbers` is room for factors."""
    steps, outputs, chunk = np.empty(len(rows), np.float32), len(matrix.weight), 4 * OUTPUTS
    for r in range(len(rows)):
        steps[r] = to_factors(rows[r], numbers[r])
    for first in range(0, outputs, chunk):  # which stays in the cache for all rows
        multiply(matrix, first, min(outputs, first + chunk), numbers, steps, out, False)


@compiled
def normalize(row, weight, bias, epsilon, out):
    """LayerNorm of a row."""
    mean, variance = np.float32(0), np.float32(0)
    for i in range(row.size):
        mean += row[i]
    mean /= np.float32(row.size)
    for i in range(row.size):
        variance += (row[i] - mean) * (row[i] - mean)
    spread = np.float32(1) / np.sqrt(variance / np.float32(row.size) + epsilon)
    for i in range(row.size):
        out[i] = (row[i] - mean) * spread * weight[i] + bias[i]


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
def normal_tail(x):
    """The share of a normal distribution beyond |x|, to 1e-7, without a branch: Abramowitz and Stegun 1964, 7.1.26."""
    z = abs(x) * np.float32(math.sqrt(0.5))
    t, series = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * z), np.float32(0)
    for term in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + np.float32(term)) * t
    return np.float32(0.5) * series * exponential(-z * z)


@compiled
def gelu(numbers, exact):
    """GELU, exact or by its tanh form, in place. 1/2 (1 + tanh u) is 1 / (1 + e^-2u)."""
    if exact:
        for i in range(numbers.size):
            x = numbers[i]
            numbers[i] = max(x, np.float32(0)) - abs(x) * normal_tail(x) + x * np.float32(0)  # NaN stays NaN
    else:
        for i in range(numbers.size):
            x = numbers[i]
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
def softmax(scores, scale):
    """Of scores x scale, a row, in place."""
    largest, total = np.float32(-np.inf), np.float32(0)
    for s in range(scores.size):
        scores[s] *= scale
        largest = max(largest, scores[s])
    for s in range(scores.size):
        total += scores[s] * np.float32(0)  # NaN where a score is NaN or infinite
        scores[s] = exponential(scores[s] - largest)
        total += scores[s]
    for s in range(scores.size):
        scores[s] /= total


@compiled
def add_values(weights, values, out):
    """out `[N, D]` += weights `[N, S]` x values `[S, D]`."""
    fours = len(values) // 4 * 4
    for s in range(0, fours, 4):  # four at a time: `out` is loaded and stored once for them
        one, two, three, four = values[s], values[s + 1], values[s + 2], values[s + 3]
        for n in range(len(out)):
            a, b, c, d = weights[n, s], weights[n, s + 1], weights[n, s + 2], weights[n, s + 3]
            row = out[n]
            for i in range(row.size):
                row[i] += a * one[i] + b * two[i] + c * three[i] + d * four[i]
    for s in range(fours, len(values)):
        for n in range(len(out)):
            for i in range(out.shape[1]):
                out[n, i] += weights[n, s] * values[s, i]


@compiled
def attend_to(queries, keys, values, padding, position, out):
    """Queries `[T, D]` from a position on, over keys and values `[S, D]` -> out `[T, D]`, ROWS queries at a time."""
    weights, found = np.empty((ROWS, len(keys) + OUTPUTS), np.float32), np.empty((ROWS, out.shape[1]), np.float32)
    for t in range(0, len(queries), ROWS):
        rows = min(ROWS, len(queries) - t)
        first, last = min(padding, position + t), position + t + rows
        sum_products(keys, first, last, queries, t, weights)
        for n in range(rows):
            own = position + t + n
            sees = min(padding, own) - first  # padding sees itself
            softmax(weights[n, sees : own + 1 - first], np.float32(1 / math.sqrt(keys.shape[1])))
            weights[n, :sees], weights[n, own + 1 - first :] = 0, 0
        found[:] = 0
        add_values(weights[:rows], values[first:last], found[:rows])
        for n in range(rows):
            for i in range(found.shape[1]):
                out[t + n, i] = found[n, i]


# The steps of a layer, for the branches begin .. end - 1: 0 is attention, 1 the MLP.


@compiled
def norm(counters, phase, places, shape, buffers, begin, end):
    """`hidden` -> `normed`, a row at a time."""
    normed = np.empty(shape.hidden, np.float32)
    chunk = take(counters, phase)
    while chunk < len(buffers.hidden):
        for branch in range(begin, end):
            weight, bias = vector(places[2 * branch], shape.hidden), vector(places[2 * branch + 1], shape.hidden)
            normalize(buffers.hidden[chunk], weight, bias, shape.epsilon, normed)
            buffers.steps[branch, chunk] = to_factors(normed, buffers.normed[branch, chunk])
        done(counters, phase)
        chunk = take(counters, phase)
    wait(counters, phase, len(buffers.hidden))


@compiled
def expand(counters, phase, places, like, shape, buffers, begin, end):
    """The two matrices that read a norm, one under the other: 3C outputs, queries, keys and values, -> `projected`, and
    I of the MLP, with its GELU, -> `inner`.
    """
    attention = 3 * shape.hidden
    project = matrix(places[4:7], attention, shape.hidden, like)
    widen_mlp = matrix(places[10:13], shape.inner, shape.hidden, like)
    first, last = attention * begin, attention + shape.inner * (end - 1)
    step = rows_of_a_chunk(last - first, shape.hidden * like.itemsize, shape.chunk)
    chunks = (last - first + step - 1) // step
    chunk = take(counters, phase)
    while chunk < chunks:
        start, stop = first + chunk * step, min(last, first + (chunk + 1) * step)
        multiply(project, start, min(stop, attention), buffers.normed[0], buffers.steps[0], buffers.projected, False)
        start, stop = max(start, attention) - attention, max(stop, attention) - attention
        multiply(widen_mlp, start, stop, buffers.normed[1], buffers.steps[1], buffers.inner, False)
        for r in range(len(buffers.inner)):
            gelu(buffers.inner[r, start:stop], shape.exact)
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
        own = buffers.projected[b * tokens : (b + 1) * tokens, 3 * h * size : 3 * (h + 1) * size]
        for t in range(tokens):
            rotate(own[t, :size], buffers.cos[b, t], buffers.sin[b, t])
            rotate(own[t, size : 2 * size], buffers.cos[b, t], buffers.sin[b, t])
            for i in range(size):
                keys[held + t, i], values[held + t, i] = own[t, size + i], own[t, 2 * size + i]
        out = buffers.attended[b * tokens : (b + 1) * tokens, h * size : (h + 1) * size]
        attend_to(own[:, :size], keys[: held + tokens], values[: held + tokens], buffers.padding[b], held, out)
        done(counters, phase)
        chunk = take(counters, phase)
    wait(counters, phase, batch * heads)


@compiled
def gather(counters, phase, buffers, begin, end):
    """`attended` -> `gathered` and `inner` -> `widened`, a row at a time."""
    chunk = take(counters, phase)
    while chunk < len(buffers.hidden):
        if begin == 0:
            buffers.steps[2, chunk] = to_factors(buffers.attended[chunk], buffers.gathered[chunk])
        if end == 2:
            buffers.steps[3, chunk] = to_factors(buffers.inner[chunk], buffers.widened[chunk])
        done(counters, phase)
        chunk = take(counters, phase)
    wait(counters, phase, len(buffers.hidden))


@compiled
def reduce(counters, phase, places, like, shape, buffers, begin, end):
    """Add the outputs of attention, of the MLP or of both to `hidden`."""
    dense = matrix(places[7:10], shape.hidden, shape.hidden, like)
    narrow_mlp = matrix(places[13:16], shape.hidden, shape.inner, like)
    step = rows_of_a_chunk(shape.hidden, (shape.hidden + shape.inner) * like.itemsize, shape.chunk)
    chunks = (shape.hidden + step - 1) // step
    chunk = take(counters, phase)
    while chunk < chunks:
        start, stop = chunk * step, min(shape.hidden, (chunk + 1) * step)
        if begin == 0:
            multiply(dense, start, stop, buffers.gathered, buffers.steps[2], buffers.hidden, True)
        if end == 2:
            multiply(narrow_mlp, start, stop, buffers.widened, buffers.steps[3], buffers.hidden, True)
        done(counters, phase)
        chunk = take(counters, phase)
    wait(counters, phase, chunks)


@compiled
def score(counters, phase, places, like, shape, buffers):
    """The last norm and the output matrix."""
    final = matrix(places[2:5], shape.vocabulary, shape.hidden, like)
    weight, bias = vector(places[0], shape.hidden), vector(places[1], shape.hidden)
    normed = np.empty(shape.hidden, np.float32)
    chunk = take(counters, phase)
    while chunk < len(buffers.scored):
        normalize(buffers.hidden[buffers.scored[chunk]], weight, bias, shape.epsilon, normed)
        buffers.last_steps[chunk] = to_factors(normed, buffers.last[chunk])
        done(counters, phase)
        chunk = take(counters, phase)
    wait(counters, phase, len(buffers.scored))
    step = rows_of_a_chunk(shape.vocabulary, shape.hidden * like.itemsize, shape.chunk)
    chunks = (shape.vocabulary + step - 1) // step
    chunk = take(counters, phase + 1)
    while chunk < chunks:
        start, end = chunk * step, min(shape.vocabulary, (chunk + 1) * step)
        multiply(final, start, end, buffers.last, buffers.last_steps, buffers.logits, False)
        done(counters, phase + 1)
        chunk = take(counters, phase + 1)
    wait(counters, phase + 1, chunks)


PHASES = 5  # of a pass through one branch of a layer, or both


@compiled
def forward(counters, layers, final, like, like_final, shape, buffers, held):
    """One thread's part of a pass. `counters` are zeros, 2 x (2 x PHASES x L + 2); `layers` are addresses `[L,
    PLACES]`, `final` those of the last norm and the output matrix; `held` tokens are in the cache.
    """
    together = 2 if shape.parallel else 1  # branches that read the same hidden state, whose matrices are read in one go
    phase = np.int64(0)
    for layer in range(len(layers)):
        places = layers[layer]
        for begin in range(0, 2, together):
            end = begin + together
            norm(counters, phase, places, shape, buffers, begin, end)
            expand(counters, phase + 1, places, like, shape, buffers, begin, end)
            if begin == 0:
                attend(counters, phase + 2, layer, shape, buffers, held)
            gather(counters, phase + 3, buffers, begin, end)
            reduce(counters, phase + 4, places, like, shape, buffers, begin, end)
            phase += PHASES
    score(counters, phase, final, like_final, shape, buffers)
