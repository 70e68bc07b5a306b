"""Stores that pass the cache by, inside compiled loops.

An ordinary store to memory that is not in the cache reads the line first, only to overwrite it. A copy that
is far larger than the cache pays for three transfers then where two would do, and throws out what others
would have found there. `copy_lines` stores whole lines without reading them (non-temporal stores, LLVM's
`nontemporal`: MOVNT on x86, STNP on ARM), which numba cannot express, so this one loop is written in LLVM's
own terms.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LINE_LANES = 8
"""uint64 lanes in a line of the cache."""

LINE_BYTES = 64

_LANE = ir.IntType(64)
_LINE = ir.VectorType(_LANE, LINE_LANES)


@intrinsic  # type: ignore[untyped-decorator]
def copy_lines(
    context: Any,
    target: Any,
    target_at: Any,
    source: Any,
    source_at: Any,
    weights: Any,
    weights_at: Any,
    num: Any,
) -> Any:
    """copy_lines(target, target_at, source, source_at, weights, weights_at, num) in compiled code.

    Copies `num` lines of `source` from lane `source_at` on to `target`, whose lane `target_at` begins a line
    (its address is a multiple of 64). Each lane is loaded once; returns the sum of what was stored, lane by
    lane times `weights`, modulo 2**64. Other threads may see it only behind `fence`.
    """
    signature = types.uint64(target, target_at, source, source_at, weights, weights_at, num)
    return signature, _generate_copy_lines


@intrinsic  # type: ignore[untyped-decorator]
def fence(context: Any) -> Any:
    """All stores before it, also those that passed the cache by, are seen before those after it."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def _generate_copy_lines(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    def lane_pointer(which: int) -> ir.Value:
        array = context.make_array(signature.args[which])(context, builder, arguments[which])
        return builder.gep(array.data, [arguments[which + 1]])

    def line_pointer(first_lane: ir.Value, line: ir.Value) -> ir.Value:
        lane = builder.mul(line, ir.Constant(_LANE, LINE_LANES))
        return builder.bitcast(builder.gep(first_lane, [lane]), _LINE.as_pointer())

    target, source, weights = lane_pointer(0), lane_pointer(2), lane_pointer(4)
    sums = cgutils.alloca_once_value(builder, ir.Constant(_LINE, [0] * LINE_LANES))
    passing = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
    with cgutils.for_range(builder, arguments[6], intp=_LANE) as loop:
        line = builder.load(line_pointer(source, loop.index), align=8)
        weight = builder.load(line_pointer(weights, loop.index), align=8)
        stored = builder.store(line, line_pointer(target, loop.index), align=LINE_BYTES)
        stored.set_metadata("nontemporal", passing)
        builder.store(builder.add(builder.load(sums), builder.mul(line, weight)), sums)
    total = ir.Constant(_LANE, 0)
    for lane in range(LINE_LANES):
        number = ir.Constant(ir.IntType(32), lane)
        total = builder.add(total, builder.extract_element(builder.load(sums), number))
    return total
