"""The fake engine: right KV gives the reference output, wrong KV never does."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.contract.ids import BlockId
from pdserve.contract.ports import Engine
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import TokenBytes, num_tokens, pack_tokens, slice_tokens, unpack_tokens
from pdserve.contract.work import LayerRange, SampledToken, SampleRequest, SequenceStep, StepBatch, StepCost
from pdserve.engine.fake_engine import FakeEngine

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
PROMPT = pack_tokens(range(100, 121))  # 21 tokens: five full blocks of 4 and one token
BLOCKS = tuple(BlockId(row) for row in (3, 9, 1, 12, 7, 0, 5, 14, 2))
ALL_LAYERS = LayerRange(0, 2)


def request_for(tokens: TokenBytes, num_prompt: int, params: SamplingParams, seed: int) -> SampleRequest:
    """The request for the token after `tokens`, as a scheduler builds it."""
    position = num_tokens(tokens)
    if not params.needs_history:
        return SampleRequest(params, seed, position, position - num_prompt)
    return SampleRequest(params, seed, position, position - num_prompt, tokens, num_prompt)


def run_step(engine: Engine, step: SequenceStep) -> SampledToken | None:
    return engine.step(StepBatch([step])).sampled[0]


def generate(
    engine: Engine,
    prompt: TokenBytes,
    params: SamplingParams = GREEDY,
    seed: int = 0,
    block_ids: tuple[BlockId, ...] = BLOCKS,
    start: int = 0,
    chunk: int = 8,
) -> list[int]:
    """Prefill [start, len(prompt)) in chunks, then decode `max_tokens` tokens. Ignores end tokens."""
    tokens, num_prompt = prompt, num_tokens(prompt)
    output: list[int] = []
    computed = start
    while len(output) < params.max_tokens:
        stop = min(computed + chunk, num_tokens(tokens))
        last = stop == num_tokens(tokens)
        sample = request_for(tokens, num_prompt, params, seed) if last else None
        new = slice_tokens(tokens, computed, stop)
        sampled = run_step(engine, SequenceStep(new, computed, block_ids, sample, as_decode=bool(output)))
        computed = stop
        if sampled is not None:
            output.append(sampled.token)
            tokens += pack_tokens([sampled.token])
    return output


@pytest.mark.parametrize("num_prompt", [1, 3, 4, 5, 8, 9, 21])
@pytest.mark.parametrize("chunk", [1, 4, 8, 64])
def test_chunks_and_decode_steps_give_the_reference_output(num_prompt: int, chunk: int) -> None:
    engine = FakeEngine(16)
    prompt = slice_tokens(PROMPT, 0, num_prompt)
    assert generate(engine, prompt, chunk=chunk) == engine.reference_output(prompt, GREEDY, 0)


def test_other_prompts_seeds_positions_give_other_outputs() -> None:
    engine = FakeEngine(16)
    sampled = replace(GREEDY, temperature=0.7)
    outputs = {
        tuple(engine.reference_output(prompt, params, seed))
        for prompt in (PROMPT, PROMPT[4:], PROMPT[:-4])
        for params, seed in ((GREEDY, 0), (sampled, 1), (sampled, 2))
    }
    assert len(outputs) == 9
    assert engine.reference_output(PROMPT, GREEDY, 1) == engine.reference_output(PROMPT, GREEDY, 2)


@pytest.mark.parametrize(
    "params",
    [
        replace(GREEDY, temperature=1.0),
        replace(GREEDY, presence_penalty=0.5),
        replace(GREEDY, repetition_penalty=1.1, temperature=0.3),
    ],
)
def test_seed_and_history_reach_the_sampler(params: SamplingParams) -> None:
    engine = FakeEngine(16)
    assert generate(engine, PROMPT, params, seed=5) == engine.reference_output(PROMPT, params, 5)


def test_wrong_history_gives_another_token() -> None:
    engine = FakeEngine(16)
    params = replace(GREEDY, presence_penalty=0.5, max_tokens=1)
    right = request_for(PROMPT, num_tokens(PROMPT), params, 0)
    wrong = replace(right, history=PROMPT[:-4] + pack_tokens([1]))
    tokens = [run_step(engine, SequenceStep(PROMPT, 0, BLOCKS, request)) for request in (right, wrong)]
    assert tokens[0] == SampledToken(engine.reference_output(PROMPT, params, 0)[0])
    assert tokens[0] != tokens[1]


def test_replay_of_known_tokens_continues_the_output() -> None:
    engine = FakeEngine(16)
    expected = engine.reference_output(PROMPT, GREEDY, 0)
    run_step(engine, SequenceStep(PROMPT, 0, BLOCKS))
    tokens = PROMPT + pack_tokens(expected[:5])
    sample = request_for(tokens, 21, GREEDY, 0)
    step = SequenceStep(pack_tokens(expected[:5]), 21, BLOCKS, sample, as_decode=True)
    assert run_step(engine, step) == SampledToken(expected[5])


def test_a_batch_gives_each_sequence_what_it_gets_alone() -> None:
    engine = FakeEngine(16)
    prompts = [slice_tokens(PROMPT, 0, length) for length in (2, 5, 16)]
    tables = [BLOCKS[:1], BLOCKS[1:3], BLOCKS[3:7]]
    samples = [request_for(prompt, num_tokens(prompt), GREEDY, 0) for prompt in prompts]
    steps = [SequenceStep(*row) for row in zip(prompts, [0] * 3, tables, samples, strict=True)]
    result = engine.step(StepBatch([*steps, SequenceStep(PROMPT[:4], 0, BLOCKS[7:])]))
    expected = [SampledToken(engine.reference_output(prompt, GREEDY, 0)[0]) for prompt in prompts]
    assert list(result.sampled) == [*expected, None]


def test_two_sequences_that_write_one_block_are_noticed() -> None:
    engine = FakeEngine(16)
    samples = [request_for(prompt, 4, GREEDY, 0) for prompt in (PROMPT[:16], PROMPT[16:32])]
    steps = [
        SequenceStep(PROMPT[:16], 0, BLOCKS[:1], samples[0]),
        SequenceStep(PROMPT[16:32], 0, BLOCKS[:1], samples[1]),
    ]
    first, second = engine.step(StepBatch(steps)).sampled
    assert first != SampledToken(engine.reference_output(PROMPT[:16], GREEDY, 0)[0])
    assert second == SampledToken(engine.reference_output(PROMPT[16:32], GREEDY, 0)[0])


def test_a_shared_prefix_is_read_where_it_lies() -> None:
    engine = FakeEngine(16)
    generate(engine, PROMPT)
    other = slice_tokens(PROMPT, 0, 8) + pack_tokens([1, 2, 3])
    table = (*BLOCKS[:2], *(BlockId(row) for row in (15, 13, 11, 10)))
    expected = engine.reference_output(other, GREEDY, 0)
    assert generate(engine, other, block_ids=table, start=8) == expected


def test_kv_moved_in_layer_groups_to_other_rows_continues_the_output() -> None:
    source, target = FakeEngine(16), FakeEngine(32)
    expected = source.reference_output(PROMPT, GREEDY, 0)
    generate(source, PROMPT, replace(GREEDY, max_tokens=1))
    rows = tuple(BlockId(row) for row in range(30, 21, -1))
    for layers in (LayerRange(1, 2), LayerRange(0, 1)):
        payload = source.blocks.read(BLOCKS[:6], layers)
        target.blocks.write(rows[:6], layers, memoryview(payload))
    assert continue_with(target, expected[:1], rows) == expected[1:]


def continue_with(engine: Engine, known: list[int], block_ids: tuple[BlockId, ...]) -> list[int]:
    """Decode the rest of PROMPT's output over KV that is already in the pool."""
    prompt = PROMPT + pack_tokens(known)
    params = replace(GREEDY, max_tokens=GREEDY.max_tokens - len(known))
    return generate(engine, prompt, params, block_ids=block_ids, start=num_tokens(prompt) - 1)


@settings(max_examples=60)
@given(block=st.integers(0, 4), byte=st.integers(0, 127), bit=st.integers(0, 7))
def test_one_wrong_bit_changes_the_output_at_once(block: int, byte: int, bit: int) -> None:
    engine = FakeEngine(16, vocab_size=2**31)  # no token is right by chance
    expected = engine.reference_output(PROMPT, GREEDY, 0)
    generate(engine, PROMPT, replace(GREEDY, max_tokens=1))
    payload = engine.blocks.read([BLOCKS[block]], ALL_LAYERS)
    payload[byte] ^= 1 << bit
    engine.blocks.write([BLOCKS[block]], ALL_LAYERS, memoryview(payload))
    output = continue_with(engine, expected[:1], BLOCKS)
    assert not any(a == b for a, b in zip(output, expected[1:], strict=True))


def test_swapped_stale_missing_and_mislayered_blocks_change_the_output() -> None:
    expected = FakeEngine(16).reference_output(PROMPT, GREEDY, 0)
    swapped = (BLOCKS[1], BLOCKS[0], *BLOCKS[2:])
    assert output_after(lambda engine: None, swapped) != expected[1:]
    assert output_after(lambda engine: copy(engine, 4, 2, ALL_LAYERS, ALL_LAYERS)) != expected[1:]
    assert output_after(lambda engine: copy(engine, 7, 2, ALL_LAYERS, ALL_LAYERS)) != expected[1:]
    first, second = LayerRange(0, 1), LayerRange(1, 2)
    assert output_after(lambda engine: copy(engine, 2, 2, first, second)) != expected[1:]
    assert output_after(lambda engine: copy(engine, 2, 2, first, first)) == expected[1:]


def output_after(harm: Callable[[FakeEngine], None], block_ids: tuple[BlockId, ...] = BLOCKS) -> list[int]:
    engine = FakeEngine(16)
    first = generate(engine, PROMPT, replace(GREEDY, max_tokens=1))
    harm(engine)
    return continue_with(engine, first, block_ids)


def copy(engine: FakeEngine, source: int, target: int, layers: LayerRange, into: LayerRange) -> None:
    payload = engine.blocks.read([BLOCKS[source]], layers)
    engine.blocks.write([BLOCKS[target]], into, memoryview(payload))


def test_reference_ends_as_requests_do() -> None:
    free_run = FakeEngine(1).reference_output(PROMPT, GREEDY, 0)
    assert len(free_run) == 12
    end = free_run[3]
    engine = FakeEngine(1, eos_token_ids=(end,))
    assert engine.reference_output(PROMPT, GREEDY, 0) == free_run[:4]
    assert engine.reference_output(PROMPT, GREEDY, 0, n=2) == free_run[:2]
    assert engine.reference_output(PROMPT, replace(GREEDY, ignore_eos=True), 0) == free_run
    stopping = replace(GREEDY, ignore_eos=True, stop_token_ids=(free_run[5],))
    assert engine.reference_output(PROMPT, stopping, 0) == free_run[:6]
    assert len(FakeEngine(1, max_model_len=25).reference_output(PROMPT, GREEDY, 0)) == 4


def test_ending_tokens_are_not_sampled_before_min_tokens() -> None:
    params = replace(GREEDY, min_tokens=6, stop_token_ids=(1,))
    engine = FakeEngine(16, vocab_size=4, eos_token_ids=(0,))
    for seed in range(20):
        sampled = replace(params, temperature=1.0)
        output = engine.reference_output(PROMPT, sampled, seed)
        assert not {0, 1} & set(output[:6])
        assert generate(engine, PROMPT, sampled, seed)[: len(output)] == output


def test_logprobs_come_when_asked_for() -> None:
    engine = FakeEngine(16)
    for asked, num_top in ((0, 0), (3, 3)):
        params = replace(GREEDY, logprobs=asked)
        sampled = run_step(engine, SequenceStep(PROMPT, 0, BLOCKS, request_for(PROMPT, 21, params, 0)))
        assert sampled is not None
        assert sampled.logprobs is not None
        assert len(sampled.logprobs.top) == num_top
        ranked = [logprob for _, logprob in sampled.logprobs.top]
        assert ranked == sorted(ranked, reverse=True)
        assert sampled.logprobs.top[:1] in ((), ((sampled.token, sampled.logprobs.chosen),))


def test_step_takes_the_predicted_time() -> None:
    cost = StepCost(fixed_s=1.0, per_prefill_token_s=0.25, per_decode_sequence_s=4.0, per_context_token_s=0.5)
    engine = FakeEngine(16, cost=cost)
    generate(engine, PROMPT[: 8 * 4], replace(GREEDY, max_tokens=1), block_ids=BLOCKS[:3])
    prefill = SequenceStep(PROMPT[: 5 * 4], 0, BLOCKS[4:])
    decode = SequenceStep(pack_tokens([1]), 8, BLOCKS[:3], as_decode=True)
    result = engine.step(StepBatch([prefill, decode]))
    assert result.seconds == 1.0 + 5 * 0.25 + 4.0 + 9 * 0.5


def test_store_and_info_agree() -> None:
    engine = FakeEngine(6, block_size=8, num_layers=3)
    info = engine.info
    lanes = info.num_layers * 2 * info.block_size * info.num_kv_heads * info.head_dim
    assert info.block_bytes == engine.blocks.block_bytes == lanes * 4
    assert engine.blocks.num_blocks == info.num_blocks == 6
    assert engine.blocks.export() is None
    assert FakeEngine(9, block_size=8, num_layers=3).info.fingerprint == info.fingerprint
    assert FakeEngine(6, block_size=4, num_layers=3).info.fingerprint != info.fingerprint


def test_store_keeps_canonical_order() -> None:
    blocks = FakeEngine(6, block_size=2, num_layers=3).blocks
    per_layer = blocks.block_bytes // 3
    payload = bytes(range(2 * blocks.block_bytes))
    rows = [BlockId(4), BlockId(1)]
    blocks.write(rows, LayerRange(0, 3), memoryview(payload))
    assert blocks.read(rows, LayerRange(0, 3)) == payload
    second = payload[blocks.block_bytes + per_layer :]
    assert blocks.read(rows[1:], LayerRange(1, 3)) == second


def test_misuse_is_refused() -> None:
    engine = FakeEngine(6)
    with pytest.raises(ValueError, match="do not cover"):
        engine.step(StepBatch([SequenceStep(PROMPT, 0, BLOCKS[:5])]))
    with pytest.raises(ValueError, match="got 3"):
        engine.blocks.write([BlockId(0)], ALL_LAYERS, memoryview(b"abc"))
    with pytest.raises(ValueError, match="not within"):
        engine.blocks.read([BlockId(0)], LayerRange(1, 3))


def test_tokens_are_in_the_vocabulary() -> None:
    engine = FakeEngine(16, vocab_size=7)
    assert set(unpack_tokens(pack_tokens(engine.reference_output(PROMPT, GREEDY, 0)))) <= set(range(7))
