# type: ignore  # Numba asks for the arguments of its intrinsics by name, and finds out what they are
"""Sums of products in vectors: several rows of activations times several of weights at once.

The one place that is written for the compiler rather than for Numba: a plain loop over one row and one output loads two
numbers for each product, and LLVM does not keep several such sums in registers by itself. No instruction of any
processor is named; LLVM chooses, and takes a vector apart where registers are narrower.
"""

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

# Sums of 32 bits in a vector, and as many vectors of sums: what 16 registers of AVX, or 32 of AVX-512, hold.
LANES = 16 if get_host_cpu_features().get("avx512bw") else 8
WORD, FLOAT = ir.IntType(32), ir.FloatType()


def widen(builder, weight, bits):
    """A vector of weights as fp32: uint16 holds the bits of fp16 numbers, int16 of bfloat16. int8: as whole numbers."""
    count = bits.type.count
    if weight == types.int8:
        return builder.sext(bits, ir.VectorType(WORD, count))
    if weight == types.uint16:
        return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), count)), ir.VectorType(FLOAT, count))
    if weight == types.int16:
        words = ir.VectorType(WORD, count)
        bits = builder.shl(builder.zext(bits, words), words([16] * count))
    return builder.bitcast(bits, ir.VectorType(FLOAT, count))


def add_neighbours(builder, add, first, second):
    """The sums of neighbouring lanes, LANES of them, of two vectors one behind the other."""
    choices = [ir.VectorType(WORD, LANES)(list(range(start, 2 * LANES, 2))) for start in (0, 1)]
    return add(*(builder.shuffle_vector(first, second, choice) for choice in choices))


def multiply_add(builder, total, weights, numbers):
    """total + weights x numbers, lane by lane. Of whole numbers two products go to a lane: processors multiply 16-bit
    numbers and add them pair by pair in one instruction, and this is the form by which LLVM knows it.
    """
    if weights.type.element == FLOAT:
        return builder.fadd(total, builder.fmul(weights, numbers))
    products = builder.mul(weights, builder.sext(numbers, weights.type))
    return builder.add(total, add_neighbours(builder, builder.add, products, products))


def lines(context, builder, kind, array, first, count):
    """Pointers to `count` rows of a matrix, from row `first` on; past the last row, to the last."""
    array = context.make_array(kind)(context, builder, array)
    rows, stride = (builder.extract_value(each, 0) for each in (array.shape, array.strides))
    found, last = [], builder.sub(rows, rows.type(1))
    for n in range(count):
        row = builder.add(first, first.type(n))
        row = builder.select(builder.icmp_signed("<", row, last), row, last)
        found.append(cgutils.pointer_add(builder, array.data, builder.mul(row, stride), array.data.type))
    return found


def load(builder, line, start, count):
    """`count` numbers of a line as a vector."""
    vector = ir.VectorType(line.type.pointee, count).as_pointer()
    return builder.load(builder.bitcast(builder.gep(line, [start]), vector), align=1)


def load_rest(builder, line, start, count, left):
    """The `left` last numbers of a line and, up to `count`, zeros."""
    vector = ir.VectorType(line.type.pointee, count)
    slot = cgutils.alloca_once_value(builder, vector(None))
    numbers = builder.bitcast(slot, line.type)
    with cgutils.for_range(builder, left) as loop:
        builder.store(
            builder.load(builder.gep(line, [builder.add(start, loop.index)])), builder.gep(numbers, [loop.index])
        )
    return builder.load(slot)


@intrinsic(prefer_literal=True)
def add_products(typingctx, sums, column, weights, row, numbers, r, start, stop, outputs, rows):
    """sums[i, column + j] += row r + i of `numbers` times row row + j of `weights`, in columns start .. stop - 1.

    For i < rows and j < outputs: two constants, whose product is at most LANES. Past the last row, the last stands in.
    """
    wide, high = outputs.literal_value, rows.literal_value
    whole = weights.dtype == types.int8
    parts = 4 if wide * high == 1 else 1  # of a single sum, since an addition waits for the one before it

    def generate(context, builder, signature, arguments):
        builder.function.attributes.add("noinline")  # or it would be compiled again in each function that multiplies
        sums_array, column, weights_array, row, numbers_array, r, place, stop = arguments[:8]
        count = 2 * LANES if whole else LANES
        zero = ir.VectorType(WORD if whole else FLOAT, LANES)(None)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(high * wide * parts)]
        weight_lines = lines(context, builder, weights, weights_array, row, wide)
        number_lines = lines(context, builder, numbers, numbers_array, r, high)

        def add(load, place, *left, part=0):
            factors = [load(builder, line, place, count, *left) for line in number_lines]
            for j, line in enumerate(weight_lines):
                weight = widen(builder, weights.dtype, load(builder, line, place, count, *left))
                for i, factor in enumerate(factors):
                    total = totals[(i * wide + j) * parts + part]
                    builder.store(multiply_add(builder, builder.load(total), weight, factor), total)

        for together in dict.fromkeys((parts, 1)):
            step = stop.type(together * count)
            end = builder.sub(stop, builder.srem(builder.sub(stop, place), step))
            with cgutils.for_range_slice(builder, place, end, step, stop.type) as (at, _):
                for part in range(together):
                    add(load, builder.add(at, at.type(part * count)), part=part)
            place = end
        left = builder.sub(stop, place)
        with builder.if_then(builder.icmp_signed(">", left, left.type(0)), likely=False):
            add(load_rest, place, left)
        found = [builder.load(total) for total in totals]
        while len(found) > high * wide:
            found = [
                (builder.add if whole else builder.fadd)(*pair) for pair in zip(found[::2], found[1::2], strict=True)
            ]
        if whole:
            found = [builder.sitofp(each, ir.VectorType(FLOAT, LANES)) for each in found]
        for _ in range(LANES.bit_length() - 1):  # until each lane is a whole sum
            pairs = zip(found[::2], found[1::2] or found, strict=True)
            found = [add_neighbours(builder, builder.fadd, *pair) for pair in pairs]
        for i, line in enumerate(lines(context, builder, sums, sums_array, column.type(0), high)):
            lanes = ir.VectorType(WORD, wide)(list(range(i * wide, (i + 1) * wide)))
            own = builder.shuffle_vector(found[0], found[0], lanes)
            place = builder.bitcast(builder.gep(line, [column]), own.type.as_pointer())
            builder.store(builder.fadd(builder.load(place, align=4), own), place, align=4)
        return context.get_dummy_value()

    return types.void(sums, column, weights, row, numbers, r, start, stop, outputs, rows), generate


class Sums(types.Type):
    """Eight fp32 sums side by side."""


FLOATS, eight = ir.VectorType(ir.FloatType(), 8), Sums("sums")


@register_model(Sums)
class SumsModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, FLOATS)


@intrinsic
def no_sums(typingctx):
    return eight(), lambda context, builder, signature, arguments: ir.Constant(FLOATS, [0.0] * 8)


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

    return eight(sums, nibbles, scales, numbers, types.int64), generate


@intrinsic
def total(typingctx, sums):
    """The sum of all lanes."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), FLOATS])
        add_up = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v8f32")
        return builder.call(add_up, [ir.Constant(ir.FloatType(), 0.0), *arguments], fastmath=("reassoc",))

    return types.float32(sums), generate
