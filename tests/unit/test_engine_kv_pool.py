"""The KV pool: bytes in canonical order, mapped by a peer, sized from what is free."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pdserve.contract.errors import ConfigError
from pdserve.contract.ids import BlockId
from pdserve.contract.work import LayerRange
from pdserve.engine.host import available_bytes, host_id
from pdserve.engine.kv_pool import KvLayout, KvPool, plan_num_blocks, require_room
from pdserve.engine.settings import EngineSettings

LAYOUT = KvLayout(num_layers=3, block_size=4, num_kv_heads=2, head_dim=8, dtype=torch.bfloat16)
CPU = torch.device("cpu")
ALL = LayerRange(0, 3)


@pytest.fixture
def pool() -> KvPool:
    pool = KvPool(LAYOUT, 10, CPU)
    pool.tensor.copy_(torch.randn(pool.tensor.shape))
    return pool


def blocks(*numbers: int) -> list[BlockId]:
    return [BlockId(number) for number in numbers]


def canonical(pool: KvPool, numbers: list[BlockId], layers: LayerRange) -> bytes:
    """Straight from the definition: block by block, layer by layer."""
    rows = [
        pool.tensor[number, layer].contiguous().view(torch.uint8).numpy().tobytes()
        for number in numbers
        for layer in range(layers.start, layers.stop)
    ]
    return b"".join(rows)


@pytest.mark.parametrize("layers", [ALL, LayerRange(1, 3), LayerRange(0, 1), LayerRange(1, 1)])
def test_read_and_write_are_canonical_and_opposite(pool: KvPool, layers: LayerRange) -> None:
    picked = blocks(7, 0, 3)
    payload = pool.read(picked, layers)
    assert bytes(payload) == canonical(pool, picked, layers)

    other = KvPool(LAYOUT, 10, CPU)
    targets = blocks(2, 9, 5)
    other.write(targets, layers, memoryview(bytes(payload)))  # read-only, as it comes from the wire
    assert canonical(other, targets, layers) == bytes(payload)
    untouched = [number for number in range(10) if number not in targets]
    assert not other.tensor[untouched].any()
    outside = [layer for layer in range(3) if not layers.start <= layer < layers.stop]
    assert not other.tensor[targets][:, outside].any()


def test_a_payload_of_the_wrong_size_is_refused(pool: KvPool) -> None:
    with pytest.raises(ValueError, match="2 blocks of 3 layers are 1536 bytes, not 10"):
        pool.write(blocks(1, 2), ALL, memoryview(bytes(10)))


def test_clear_zeroes_whole_blocks_only(pool: KvPool) -> None:
    before = pool.tensor.clone()
    pool.clear([4, 6])
    before[[4, 6]] = 0
    assert torch.equal(pool.tensor, before)


def test_another_process_maps_the_exported_pool(pool: KvPool) -> None:
    export = pool.export()
    assert export is not None
    assert export.host_id == host_id()
    script = (
        "import mmap, sys\n"
        "path, size, token = sys.argv[1], int(sys.argv[2]), bytes.fromhex(sys.argv[3])\n"
        "with open(path, 'r+b') as file:\n"
        "    view = mmap.mmap(file.fileno(), size + len(token), prot=mmap.PROT_READ)\n"
        "assert view[size:] == token\n"
        "sys.stdout.buffer.write(view[:size])\n"
    )
    path = f"/proc/{export.pid}/fd/{export.fd}"
    result = subprocess.run(
        [sys.executable, "-c", script, path, str(export.num_bytes), export.token],
        capture_output=True,
        check=True,
    )
    assert result.stdout == canonical(pool, blocks(*range(10)), ALL)


def test_the_memory_file_goes_with_its_pool() -> None:
    pool = KvPool(LAYOUT, 2, CPU)
    export = pool.export()
    assert export is not None
    path = f"/proc/self/fd/{export.fd}"
    assert "pdserve-kv" in os.readlink(path)
    file = os.stat(path)
    assert is_open_or_mapped(file)
    del pool
    assert not is_open_or_mapped(file)


def is_open_or_mapped(file: os.stat_result) -> bool:
    """By this process; a number of a descriptor would not do, since another thread may be given it next."""
    mapped = [line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines()]
    return str(file.st_ino) in mapped or any(is_same(link, file) for link in Path("/proc/self/fd").iterdir())


def is_same(link: Path, file: os.stat_result) -> bool:
    try:
        return os.path.samestat(link.stat(), file)
    except FileNotFoundError:  # closed meanwhile, or the listing's own
        return False


def test_the_size_is_a_share_of_what_is_free_or_exact() -> None:
    exact = EngineSettings("m", kv_memory_bytes=100 * LAYOUT.block_bytes + 5)
    assert plan_num_blocks(LAYOUT, exact, CPU) == 100
    share = EngineSettings("m", kv_memory_fraction=0.25)
    expected = available_bytes(CPU) // 4 // LAYOUT.block_bytes
    assert plan_num_blocks(LAYOUT, share, CPU) == pytest.approx(expected, rel=0.5)


def test_what_does_not_fit_is_refused_with_numbers() -> None:
    with pytest.raises(ConfigError, match=r"does not fit in the .* GiB .* lower engine\.kv_memory"):
        plan_num_blocks(LAYOUT, EngineSettings("m", kv_memory_bytes=2**60), CPU)
    with pytest.raises(ConfigError, match=r"holds 4 tokens, the least is 256 .* raise engine\.kv_memory"):
        plan_num_blocks(LAYOUT, EngineSettings("m", kv_memory_bytes=LAYOUT.block_bytes), CPU)
    with pytest.raises(ConfigError, match="model 'm' does not fit: its weights take"):
        require_room(2**60, EngineSettings("m"), CPU)


def test_what_was_read_is_a_copy(pool: KvPool) -> None:
    payload = pool.read(blocks(1), ALL)
    before = bytes(payload)
    pool.clear([1])
    assert bytes(payload) == before
