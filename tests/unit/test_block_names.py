"""How blocks get their names."""

import random

import pytest
import xxhash

from pdserve.contract.block_names import ChainRoot, name_blocks
from pdserve.contract.tokens import pack_tokens


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 32, 100])
def test_full_blocks_are_named_in_a_chain_and_what_is_left_is_not(num_tokens: int) -> None:
    tokens = pack_tokens(random.Random(num_tokens).sample(range(2**32), num_tokens))
    expected = []
    parent = ChainRoot("model").seed
    for block in range(num_tokens // 16):
        parent = xxhash.xxh3_64(tokens[64 * block : 64 * (block + 1)], seed=parent).intdigest()
        expected.append(parent)
    assert name_blocks(tokens, 16, ChainRoot("model").seed) == expected
