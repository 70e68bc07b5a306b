"""How a KV block gets its name.

A full block is named by the xxh3-64 of its token bytes, seeded with its parent's name; the chain starts
from everything that changes what a KV byte means (`ChainRoot`). Two equal names therefore mean, but do
not prove, equal whole prefixes: reuse compares the block's tokens and its physical parent as well, so a
collision costs a cache miss and never a wrong answer.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from struct import iter_unpack
from typing import cast

import xxhash

from pdserve.contract.ids import BlockHash
from pdserve.contract.tokens import BYTES_PER_TOKEN, TokenBytes


@dataclass(frozen=True)
class ChainRoot:
    """What a chain of block names starts from. `fingerprint` covers model, revision, dtype, rope and
    block size (see `pdserve.contract.work.ModelInfo`); `salt` keeps tenants' caches apart."""

    fingerprint: str
    salt: str = ""

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the root, compared before any block of the chain is reused."""
        return hashlib.sha256(f"{self.fingerprint}\0{self.salt}".encode()).digest()

    @cached_property
    def seed(self) -> int:
        """Where the chained hash starts: the first 64 bits of the digest."""
        return int.from_bytes(self.digest[:8], "little")


def name_blocks(tokens: TokenBytes, block_size: int, parent: int) -> list[BlockHash]:
    """Names of the full blocks of `tokens`; `parent` is the name before them or `ChainRoot.seed`.

    Tokens after the last full block are left out. For every block one call of C from Python; that is what it
    costs, so nothing else is done there.
    """
    stride = block_size * BYTES_PER_TOKEN
    full = memoryview(tokens)[: len(tokens) // stride * stride]
    name = parent
    digest = cast("Callable[[bytes, int], BlockHash]", xxhash.xxh3_64_intdigest)
    return [name := digest(block, name) for (block,) in iter_unpack(f"{stride}s", full)]


def max_shared_blocks(num_tokens: int, block_size: int) -> int:
    """How many leading blocks of a prompt may come from a cache.

    At least the last token is always computed, and a shared block is never written again.
    """
    return max(0, (num_tokens - 1) // block_size)


def blocks_for(num_tokens: int, block_size: int) -> int:
    """How many blocks hold `num_tokens` tokens, the last one possibly partly filled."""
    return -(-num_tokens // block_size)
