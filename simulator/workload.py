"""What is asked for: rows of a trace as blocks instead of tokens.

The block allocator, the block ledger and the names of blocks work on sequences of numbers and do not mind
what a number stands for. Here each stands for a whole KV block: a block's id in the trace, or one that no
other request has. With blocks of one such number the real code does for a prompt of 100,000 tokens what it
would do for one of 200, and the prefixes that are shared are exactly those of the trace.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from load_generator.traces import PlannedRequest
from pdserve.contract.block_names import blocks_for
from pdserve.contract.errors import ConfigError
from pdserve.contract.tokens import TokenBytes, pack_tokens

DEFAULT_BLOCK_TOKENS = 64
"""Tokens of a KV block where the trace has no prefix ids that would say."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request with the ids of its blocks, prompt and answer."""

    index: int
    planned: PlannedRequest
    block_ids: TokenBytes
    """Packed, one of every block of prompt and answer together."""

    @property
    def num_prompt(self) -> int:
        return self.planned.num_prompt_tokens

    @property
    def num_output(self) -> int:
        return self.planned.num_output_tokens


def block_tokens_of(planned: Sequence[PlannedRequest], wanted: int | None) -> int:
    """How many tokens a KV block holds: `wanted`, or as many as the trace's ids stand for. Raises ConfigError
    when the trace's prefixes cannot be told in such blocks."""
    sizes = {each.block_tokens for each in planned if each.prefix_ids}
    if wanted is None:
        wanted = min(sizes, default=DEFAULT_BLOCK_TOKENS)
    misfits = [size for size in sizes if size % wanted]
    if misfits:
        raise ConfigError(
            f"--block-size {wanted} does not divide the {misfits[0]} tokens that each prefix id of the trace "
            "stands for: choose a divisor"
        )
    return wanted


def requests_of(planned: Sequence[PlannedRequest], block_tokens: int) -> list[Request]:
    """Every row as a `Request`. Raises ConfigError when there are more blocks than 32 bits can count."""
    per_row = [_shared_ids(row, block_tokens) for row in planned]
    numbers = {wide: number for number, wide in enumerate(dict.fromkeys(itertools.chain(*per_row)))}
    unused = itertools.count(len(numbers))
    try:
        return [
            Request(index, row, _packed([numbers[wide] for wide in shared], row, block_tokens, unused))
            for index, (row, shared) in enumerate(zip(planned, per_row, strict=True))
        ]
    except OverflowError as error:
        raise ConfigError(
            "the trace has more than 2**32 blocks: use --limit or a larger --block-size"
        ) from error


def _shared_ids(row: PlannedRequest, block_tokens: int) -> list[tuple[int, int]]:
    """What names the full blocks of a prompt: a prefix id and which part of it. A block that the prompt fills
    only in part is completed by the answer, so it is nobody else's."""
    parts = row.block_tokens // block_tokens
    num_full = row.num_prompt_tokens // block_tokens
    every = ((prefix_id, part) for prefix_id in row.prefix_ids for part in range(parts))
    return list(itertools.islice(every, num_full))


def _packed(
    shared: Iterable[int], row: PlannedRequest, block_tokens: int, unused: Iterator[int]
) -> TokenBytes:
    known = list(shared)
    num_blocks = blocks_for(row.num_prompt_tokens + row.num_output_tokens, block_tokens)
    return pack_tokens([*known, *itertools.islice(unused, num_blocks - len(known))])
