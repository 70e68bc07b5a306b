"""An engine without a model: KV bytes are a hash of everything before them, tokens a hash of the KV.

It serves simulations of whole systems in virtual time, and any test that must see a wrong block. The KV of
a token is a function of the token, its position and all KV bytes of the sequence before it, as they are
read back from the pool; a sampled token is a function of the sequence's KV bytes in the pool. So one block
that is missing, stale, swapped or put into the wrong layers changes every later token, and comparing a
request's output with `FakeEngine.reference_output` proves the KV that it was served from. The engine itself
checks no content.
"""

import hashlib
import itertools
import struct
from collections.abc import Generator, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from pdserve.contract.block_names import blocks_for
from pdserve.contract.ids import BlockId
from pdserve.contract.model_work import DevicePeak, ModelWork, Roofline
from pdserve.contract.ports import LayersDone
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import TokenBytes, num_tokens, pack_tokens, unpack_tokens
from pdserve.contract.work import (
    LayerRange,
    ModelInfo,
    PoolExport,
    SampledToken,
    SampleRequest,
    SequenceStep,
    StepBatch,
    StepCost,
    StepResult,
    TokenLogprobs,
)
from pdserve.engine.executor import Stage
from pdserve.engine.layer_groups import group_stops

DEFAULT_COST = StepCost(fixed_s=0.004, per_prefill_token_s=0.0001, per_decode_sequence_s=0.0002)

FAKE_WEIGHTS = 1000

_LANE_BYTES = 8
"""KV bytes of one token, layer and key or value: one KV head of two float32."""


class FakeEngine:
    """Implements `Engine`. `StepResult.seconds` is what `cost` predicts; nothing waits for it here.

    Honours of the sampling parameters what decides when a request ends (`max_tokens`, `min_tokens`, stop
    and end tokens), `seed` when `temperature` is above 0, `logprobs`, and the history when penalties ask
    for it; the rest does not change the tokens.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 4,
        num_layers: int = 2,
        vocab_size: int = 1000,
        eos_token_ids: tuple[int, ...] = (),
        cost: StepCost = DEFAULT_COST,
        chunk_tokens: int = 8,
        max_model_len: int = 4096,
    ):
        self._cost = cost
        self._num_layers = num_layers
        self._store = FakeBlockStore(num_blocks, num_layers, block_size)
        self._info = ModelInfo(
            name="fake",
            architecture="FakeEngine",
            revision="1",
            dtype="float32",
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            num_layers=num_layers,
            num_kv_heads=1,
            head_dim=2,
            block_size=block_size,
            num_blocks=num_blocks,
            block_bytes=self._store.block_bytes,
            eos_token_ids=eos_token_ids,
            fingerprint=_fingerprint(block_size, num_layers, vocab_size),
            chunk_tokens=chunk_tokens,
            deterministic=True,
        )

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def blocks(self) -> "FakeBlockStore":
        return self._store

    @property
    def cost(self) -> StepCost:
        return self._cost

    @property
    def roofline(self) -> Roofline:
        """As if it multiplied each token with FAKE_WEIGHTS weights, and attended with its one KV head."""
        work = ModelWork(
            num_weights=FAKE_WEIGHTS,
            num_head_weights=0,
            weight_bytes=4,
            num_heads=1,
            num_kv_heads=1,
            head_dim=2,
            windows=((None, self._num_layers),),
        )
        return Roofline(work, DevicePeak(flops_per_s=1e9, bytes_per_s=1e9))

    def step(self, batch: StepBatch, layers_done: LayersDone | None = None) -> StepResult:
        """Write all new KV into the pool, then sample from what stands there.

        Raises ValueError when a sequence's blocks do not cover its tokens.
        """
        computed = [self._compute(sequence) for sequence in batch.sequences]
        if layers_done is None:
            self._write(batch, computed, LayerRange(0, self._num_layers))
        else:
            for layers in self._layer_groups():
                self._write(batch, computed, layers)
                layers_done(layers.stop)
        return self._result(batch)

    def stages(self, batch: StepBatch) -> Generator[Stage, None, StepResult]:
        """The same, stopping after each group of layers; sampling takes as long as one layer."""
        computed = [self._compute(sequence) for sequence in batch.sequences]
        layer_s = _predict_s(self._cost, batch) / (self._num_layers + 1)
        for layers in self._layer_groups():
            self._write(batch, computed, layers)
            yield Stage(layers.stop, layers.stop * layer_s)
        return self._result(batch)

    def reference_output(
        self, prompt: TokenBytes, sampling: SamplingParams, seed: int, n: int | None = None
    ) -> list[int]:
        """The output that a request must get, computed without a pool.

        Ends as the system does: after an end or stop token (which is part of it), at `max_tokens` or at
        the model's length; and after `n` tokens when `n` is given.
        """
        limit = sampling.max_tokens if n is None else min(n, sampling.max_tokens)
        output: list[int] = []
        for token in self._reference_tokens(prompt, sampling, seed):
            if len(output) == limit:
                break
            output.append(token)
            if token in self._ending_tokens(sampling):
                break
        return output

    def reference_kv(self, tokens: Sequence[int]) -> bytes:
        """The KV of all blocks that `tokens` fill, in canonical order, computed without a pool."""
        chain = _KvChain(self._num_layers, b"")
        lanes = np.frombuffer(b"".join(chain.append(token) for token in tokens), "<u8")
        of_blocks = lanes.reshape(-1, self._info.block_size, self._num_layers, 2)
        return of_blocks.transpose(0, 2, 3, 1).tobytes()

    def _layer_groups(self) -> Iterator[LayerRange]:
        return itertools.starmap(LayerRange, itertools.pairwise((0, *group_stops(self._num_layers))))

    def _result(self, batch: StepBatch) -> StepResult:
        sampled = [self._sample(sequence) for sequence in batch.sequences]
        return StepResult(sampled, _predict_s(self._cost, batch))

    def _compute(self, sequence: SequenceStep) -> bytes:
        """The new KV of one sequence: lanes in order [token, layer, key/value]."""
        stop = sequence.start + sequence.num_new_tokens
        if blocks_for(stop, self._info.block_size) > len(sequence.block_ids):
            raise ValueError(f"{len(sequence.block_ids)} blocks do not cover {stop} tokens; allocate more")
        chain = _KvChain(self._num_layers, self._store.read_tokens(sequence.block_ids, sequence.start))
        tokens = unpack_tokens(sequence.tokens)
        return b"".join(chain.append(token) for token in tokens)

    def _write(self, batch: StepBatch, computed: Sequence[bytes], layers: LayerRange) -> None:
        for sequence, kv in zip(batch.sequences, computed, strict=True):
            self._store.write_tokens(sequence.block_ids, sequence.start, kv, layers)

    def _sample(self, sequence: SequenceStep) -> SampledToken | None:
        if sequence.sample is None:
            return None
        length = sequence.start + sequence.num_new_tokens
        state = xxhash.xxh3_64_intdigest(self._store.read_tokens(sequence.block_ids, length))
        token = self._choose(state, sequence.sample)
        logprobs = sequence.sample.params.logprobs
        return SampledToken(token, None if logprobs is None else self._logprobs(state, token, logprobs))

    def _choose(self, state: int, request: SampleRequest) -> int:
        """The first of an endless row of drawn tokens that `min_tokens` does not forbid."""
        params = request.params
        seed = request.seed if params.temperature > 0 else 0
        history = xxhash.xxh3_64_intdigest(request.history) if params.needs_history else 0
        banned = self._ending_tokens(params) if request.output_index < params.min_tokens else frozenset()
        draw = _mix(state, seed, request.position, history, request.num_prompt_tokens if history else 0)
        while draw % self._info.vocab_size in banned:
            draw = _mix(draw)
        return draw % self._info.vocab_size

    def _ending_tokens(self, params: SamplingParams) -> frozenset[int]:
        eos = () if params.ignore_eos else self._info.eos_token_ids
        return frozenset(eos) | frozenset(params.stop_token_ids)

    def _logprobs(self, state: int, token: int, num_top: int) -> TokenLogprobs:
        chosen = -(state % 1024) / 1024
        top = (
            ((token + rank) % self._info.vocab_size, chosen - rank)
            for rank in range(min(num_top, self._info.vocab_size))
        )
        return TokenLogprobs(chosen, tuple(top))

    def _reference_tokens(self, prompt: TokenBytes, sampling: SamplingParams, seed: int) -> Iterator[int]:
        """Output tokens up to the model's length, whatever they are."""
        chain = _KvChain(self._num_layers, b"")
        history = unpack_tokens(prompt)
        for token in history:
            chain.append(token)
        while len(history) < self._info.max_model_len:
            history.append(self._choose(chain.state, _request(history, num_tokens(prompt), sampling, seed)))
            chain.append(history[-1])
            yield history[-1]


class FakeBlockStore:
    """Implements `BlockStore` over one array of uint64 lanes [block, layer, key/value, token]."""

    def __init__(self, num_blocks: int, num_layers: int, block_size: int):
        self._lanes: npt.NDArray[np.uint64] = np.zeros((num_blocks, num_layers, 2, block_size), "<u8")

    @property
    def num_blocks(self) -> int:
        return len(self._lanes)

    @property
    def block_bytes(self) -> int:
        return int(self._lanes[0].nbytes)

    def read(self, block_ids: Sequence[BlockId], layers: LayerRange) -> bytearray:
        """A copy in canonical order [block, layer, key/value, token, KV head, head dim]."""
        self._check(layers)
        return bytearray(self._lanes[list(block_ids), layers.start : layers.stop].tobytes())

    def write(self, block_ids: Sequence[BlockId], layers: LayerRange, payload: memoryview) -> None:
        """Copy canonical bytes into the blocks. Raises ValueError when the size is wrong."""
        self._check(layers)
        shape = (len(block_ids), len(layers), *self._lanes.shape[2:])
        expected = int(np.prod(shape)) * _LANE_BYTES
        if payload.nbytes != expected:
            raise ValueError(
                f"{len(block_ids)} blocks of {layers} take {expected} bytes, got {payload.nbytes}"
            )
        lanes = np.frombuffer(payload, "<u8").reshape(shape)
        self._lanes[list(block_ids), layers.start : layers.stop] = lanes

    def export(self) -> PoolExport | None:
        return None

    def read_tokens(self, block_ids: Sequence[BlockId], count: int) -> bytes:
        """The lanes of a sequence's first `count` tokens, in order [token, layer, key/value]."""
        _, num_layers, keys_and_values, block_size = self._lanes.shape
        of_blocks = self._lanes[list(block_ids[: blocks_for(count, block_size)])]
        of_tokens = of_blocks.transpose(0, 3, 1, 2).reshape(-1, num_layers, keys_and_values)
        return of_tokens[:count].tobytes()

    def write_tokens(self, block_ids: Sequence[BlockId], start: int, kv: bytes, layers: LayerRange) -> None:
        """Put those of `layers` of lanes in order [token, layer, key/value] at positions from `start` on."""
        lanes = np.frombuffer(kv, "<u8").reshape(-1, *self._lanes.shape[1:3])
        rows, offsets = self._locate(block_ids, start, start + len(lanes))
        chosen = slice(layers.start, layers.stop)
        self._lanes[rows, chosen, :, offsets] = lanes[:, chosen]

    def _locate(
        self, block_ids: Sequence[BlockId], start: int, stop: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Pool rows and offsets in them of the positions [start, stop)."""
        positions = np.arange(start, stop)
        table = np.asarray(block_ids, np.int64)
        block_size = self._lanes.shape[3]
        return table[positions // block_size], positions % block_size

    def _check(self, layers: LayerRange) -> None:
        num_layers = self._lanes.shape[1]
        if not 0 <= layers.start <= layers.stop <= num_layers:
            raise ValueError(f"{layers} is not within the {num_layers} layers of this pool")


class _KvChain:
    """The KV bytes of one sequence, token after token."""

    def __init__(self, num_layers: int, past: bytes):
        lanes_per_token = num_layers * 2
        self._position = len(past) // (lanes_per_token * _LANE_BYTES)
        self._lane_keys = [struct.pack("<Q", lane) for lane in range(lanes_per_token)]
        self._all_bytes = xxhash.xxh3_64(past)

    @property
    def state(self) -> int:
        """Hash of all KV bytes so far."""
        return self._all_bytes.intdigest()

    def append(self, token: int) -> bytes:
        """KV bytes of the next token: one lane per layer and key or value, each different."""
        cause = _mix(self.state, token, self._position)
        kv = b"".join([xxhash.xxh3_64_digest(key, cause) for key in self._lane_keys])
        self._all_bytes.update(kv)
        self._position += 1
        return kv


def _mix(*numbers: int) -> int:
    """64-bit hash of numbers in [0, 2**64)."""
    return xxhash.xxh3_64_intdigest(struct.pack(f"<{len(numbers)}Q", *numbers))


def _fingerprint(*shape: int) -> str:
    return hashlib.sha256(f"fake engine {shape}".encode()).hexdigest()


def _request(
    history: list[int], num_prompt_tokens: int, sampling: SamplingParams, seed: int
) -> SampleRequest:
    return SampleRequest(
        params=sampling,
        seed=seed,
        position=len(history),
        output_index=len(history) - num_prompt_tokens,
        history=pack_tokens(history) if sampling.needs_history else b"",
        num_prompt_tokens=num_prompt_tokens if sampling.needs_history else 0,
    )


def _predict_s(cost: StepCost, batch: StepBatch) -> float:
    """Predicted time of a step: tokens of `as_decode` sequences are decode rows, all others prefill."""
    replayed = [sequence for sequence in batch.sequences if sequence.as_decode]
    decode_rows = sum(sequence.num_new_tokens for sequence in replayed)
    context = sum(sum(_context_lengths(sequence)) for sequence in replayed)
    return cost.predict_s(batch.num_new_tokens - decode_rows, decode_rows, context)


def _context_lengths(sequence: SequenceStep) -> range:
    """How many tokens of KV each new row of a sequence reads, itself included."""
    return range(sequence.start + 1, sequence.start + sequence.num_new_tokens + 1)
