"""Token ids as packed little-endian uint32 bytes, from the tokeniser to the engine.

A list of Python integers costs 28 bytes and one allocation per token, and hashing it is more than twice
as slow; so hot paths carry `TokenBytes` and only edges that need integers unpack them.
"""

import sys
from array import array
from collections.abc import Iterable

TokenBytes = bytes
"""Packed token ids, 4 bytes each, little-endian uint32."""

BYTES_PER_TOKEN = 4

_TYPECODE = "I" if array("I").itemsize == BYTES_PER_TOKEN else "L"


def pack_tokens(token_ids: Iterable[int]) -> TokenBytes:
    """Pack integers into token bytes. Raises OverflowError for ids outside [0, 2**32)."""
    return _little_endian(array(_TYPECODE, token_ids)).tobytes()


def unpack_tokens(tokens: TokenBytes) -> list[int]:
    """The ids in `tokens`, as Python integers."""
    ids = array(_TYPECODE)
    ids.frombytes(tokens)
    return _little_endian(ids).tolist()


def num_tokens(tokens: TokenBytes | bytearray | memoryview) -> int:
    """How many ids `tokens` holds."""
    return len(tokens) // BYTES_PER_TOKEN


def slice_tokens(tokens: TokenBytes | bytearray, start: int, stop: int) -> TokenBytes:
    """The ids in the half-open range [start, stop)."""
    return bytes(tokens[start * BYTES_PER_TOKEN : stop * BYTES_PER_TOKEN])


def _little_endian(ids: "array[int]") -> "array[int]":
    if sys.byteorder == "big":
        ids.byteswap()
    return ids
