"""What every Engine does, whether it has a model or only pretends to: one suite over both."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pdserve.contract.ids import BlockId
from pdserve.contract.ports import Engine
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import pack_tokens, slice_tokens
from pdserve.contract.work import LayerRange, SampleRequest, SequenceStep, StepBatch
from pdserve.engine.engine import ModelEngine
from pdserve.engine.fake_engine import FakeEngine
from pdserve.engine.settings import EngineSettings
from tests.small_models import make_model

MakeEngine = Callable[[], Engine]
PROMPT = list(range(3, 48))
NUM_BLOCKS = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    return {
        architecture: make_model(architecture, tmp_path_factory.mktemp(architecture), seed=1).folder
        for architecture in ("llama", "phi3")
    }


@pytest.fixture(params=["fake", "llama", "phi3"], ids=["fake", "lean pass", "model's own modules"])
def make_engine(request: pytest.FixtureRequest, folders: dict[str, Path]) -> MakeEngine:
    if request.param == "fake":
        return lambda: FakeEngine(NUM_BLOCKS)
    settings = EngineSettings(
        str(folders[request.param]),
        dtype="float32",
        threads=1,
        block_size=4,
        chunk_tokens=8,
        kv_memory_bytes=NUM_BLOCKS * 3072,
    )
    return lambda: ModelEngine.load(settings)


def sample(position: int, temperature: float = 0.0) -> SampleRequest:
    params = SamplingParams(temperature=temperature)
    return SampleRequest(params, seed=5, position=position, output_index=position - len(PROMPT))


def blocks(engine: Engine, num_tokens: int, first: int = 0) -> list[BlockId]:
    return [BlockId(first + index) for index in range(-(-num_tokens // engine.info.block_size))]


def prefill(engine: Engine, table: list[BlockId], cuts: tuple[int, ...]) -> int:
    """Compute PROMPT in chunks that end at `cuts`; the first output token."""
    tokens, start = pack_tokens(PROMPT), 0
    for stop in (*cuts, len(PROMPT)):
        request = sample(stop) if stop == len(PROMPT) else None
        step = SequenceStep(slice_tokens(tokens, start, stop), start, table, request)
        (sampled,) = engine.step(StepBatch([step])).sampled
        start = stop
    assert sampled is not None
    return sampled.token


def decode(
    engine: Engine, table: list[BlockId], token: int, num_tokens: int, temperature: float = 0.0
) -> list[int]:
    """`num_tokens` output tokens, `token` the first of them."""
    output = [token]
    while len(output) < num_tokens:
        start = len(PROMPT) + len(output) - 1
        request = sample(start + 1, temperature)
        step = SequenceStep(pack_tokens(output[-1:]), start, table, request, as_decode=True)
        (sampled,) = engine.step(StepBatch([step])).sampled
        assert sampled is not None
        output.append(sampled.token)
    return output


def test_the_sizes_fit_each_other(make_engine: MakeEngine) -> None:
    engine = make_engine()
    info, store = engine.info, engine.blocks
    assert store.num_blocks == info.num_blocks == NUM_BLOCKS
    assert store.block_bytes == info.block_bytes
    assert info.block_bytes % (2 * info.num_layers * info.block_size * info.num_kv_heads * info.head_dim) == 0
    assert len(store.read([BlockId(0), BlockId(2)], LayerRange(0, info.num_layers))) == 2 * info.block_bytes
    assert len(store.read([BlockId(0)], LayerRange(1, 2))) == info.block_bytes // info.num_layers
    assert info.chunk_tokens % info.block_size == 0
    assert engine.cost.predict_s(100, 0) > engine.cost.predict_s(1, 0) > 0


def test_chunks_and_batch_mates_change_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    table = blocks(engine, len(PROMPT) + 12)
    whole = decode(engine, table, prefill(engine, table, ()), 12)
    other = blocks(engine, 20, first=len(table))
    mate = SequenceStep(pack_tokens(range(100, 120)), 0, other, sample(20))
    tokens = pack_tokens(PROMPT)
    for cuts in ((8, 16, 24, 32, 40), (16, 40)):
        assert decode(engine, table, prefill(engine, table, cuts), 12) == whole
    batch = StepBatch([mate, SequenceStep(tokens, 0, table, sample(len(PROMPT)))])
    _, sampled = engine.step(batch).sampled
    assert sampled is not None
    assert sampled.token == whole[0]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_blocks_shipped_to_another_engine_continue_there(make_engine: MakeEngine, temperature: float) -> None:
    source, target = make_engine(), make_engine()
    assert source.info.fingerprint == target.info.fingerprint
    here, there = blocks(source, len(PROMPT) + 9), blocks(target, len(PROMPT) + 9, first=3)
    first = prefill(source, here, (16,))
    num_shipped = -(-len(PROMPT) // source.info.block_size)
    for layer in range(source.info.num_layers):  # layer by layer, last block first
        layers = LayerRange(layer, layer + 1)
        for index in reversed(range(num_shipped)):
            payload = source.blocks.read(here[index : index + 1], layers)
            target.blocks.write(there[index : index + 1], layers, memoryview(payload))
    assert decode(target, there, first, 9, temperature) == decode(source, here, first, 9, temperature)
    everything = LayerRange(0, source.info.num_layers)
    full = len(PROMPT) // source.info.block_size
    assert source.blocks.read(here[:full], everything) == target.blocks.read(there[:full], everything)


def test_layers_are_final_when_they_are_told_of(make_engine: MakeEngine) -> None:
    engine = make_engine()
    table, num_layers = blocks(engine, len(PROMPT)), engine.info.num_layers
    mate = SequenceStep(pack_tokens(range(100, 120)), 0, blocks(engine, 20, first=len(table)), sample(20))
    step = StepBatch([mate, SequenceStep(pack_tokens(PROMPT), 0, table, sample(len(PROMPT)))])
    seen: dict[int, bytearray] = {}

    def layers_done(stop: int) -> None:
        seen[stop] = engine.blocks.read(table, LayerRange(0, stop))

    engine.blocks.write(
        table, LayerRange(0, num_layers), memoryview(bytes(len(table) * engine.info.block_bytes))
    )
    told = engine.step(step, layers_done)
    assert list(seen) == sorted(seen)
    assert list(seen)[-1] == num_layers
    assert len(seen) == min(4, num_layers)
    final = {stop: engine.blocks.read(table, LayerRange(0, stop)) for stop in seen}
    assert seen == final
    assert told.sampled == engine.step(step).sampled  # telling changes nothing


def test_a_step_that_is_refused_tells_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    told: list[int] = []
    step = SequenceStep(pack_tokens(PROMPT), 0, blocks(engine, len(PROMPT))[:-1], sample(len(PROMPT)))
    with pytest.raises(ValueError, match="block"):
        engine.step(StepBatch([step]), told.append)
    prefill(engine, blocks(engine, len(PROMPT)), ())  # and the next step tells nobody
    assert told == []


def test_known_output_is_replayed_in_one_step(make_engine: MakeEngine) -> None:
    engine = make_engine()
    table = blocks(engine, len(PROMPT) + 12)
    output = decode(engine, table, prefill(engine, table, ()), 12)
    again = blocks(engine, len(PROMPT) + 12, first=1)
    prefill(engine, again, (8,))
    replay = SequenceStep(
        pack_tokens(output[:-1]), len(PROMPT), again, sample(len(PROMPT) + 11), as_decode=True
    )
    (sampled,) = engine.step(StepBatch([replay])).sampled
    assert sampled is not None
    assert sampled.token == output[-1]


def test_a_payload_of_the_wrong_size_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match="bytes"):
        engine.blocks.write([BlockId(0)], LayerRange(0, 1), memoryview(bytes(7)))


def test_blocks_that_do_not_cover_the_tokens_are_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    step = SequenceStep(pack_tokens(PROMPT), 0, blocks(engine, len(PROMPT))[:-1], sample(len(PROMPT)))
    with pytest.raises(ValueError, match="block"):
        engine.step(StepBatch([step]))
