"""Prompts whose KV comes from a prefill worker: one fetch per request, and what it changes here."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from decode_worker.request import DecodeRequest, Phase
from decode_worker.room import Room
from pdserve.contract.errors import ErrorCode, ErrorInfo, PdserveError, PrefillFailed, ProtocolViolation
from pdserve.contract.ids import WorkerId
from pdserve.contract.messages import (
    Busy,
    FirstToken,
    PairTransport,
    PrefillOpen,
    PrefillSource,
    RequestTimings,
)
from pdserve.contract.ports import Clock, Rpc
from pdserve.contract.work import ModelInfo, SampledToken
from pdserve.handoff.receiving import FetchStats, PrefillFetch
from pdserve.handoff.transports.negotiation import Transports
from pdserve.metrics import WorkerMetrics
from pdserve.tasks import outlast

log = logging.getLogger(__name__)


_PASSED_ON = (ErrorCode.REQUEST_TOO_LONG, ErrorCode.FINGERPRINT_MISMATCH, ErrorCode.DRAINING)
"""Errors of a source that the router acts upon; any other is a failed prefill to it."""


class RequestEvents(Protocol):
    """What the loop does with what arrives."""

    def first_token(self, request: DecodeRequest, sampled: SampledToken) -> None: ...
    def source_failed(self, request: DecodeRequest, error: ErrorInfo) -> None: ...


class Arrivals:
    """The fetches of one decode worker."""

    def __init__(
        self,
        worker_id: WorkerId,
        info: ModelInfo,
        room: Room,
        events: RequestEvents,
        transports: Transports,
        rpc: Rpc,
        clock: Clock,
        metrics: WorkerMetrics,
        wake: Callable[[], None],
    ) -> None:
        self._worker_id = worker_id
        self._info = info
        self._room = room
        self._events = events
        self._transports = transports
        self._rpc = rpc
        self._clock = clock
        self._metrics = metrics
        self._wake = wake
        self._fetches: dict[asyncio.Task[None], None] = {}  # in order, for reproducible runs
        self.pairs: dict[WorkerId, PairTransport] = {}
        """Source -> the transport that it chose last."""

    def start(self, request: DecodeRequest, source: PrefillSource) -> None:
        """Ask `source` for the prompt's KV; `request.fetch` is the task that follows it."""
        request.fetch = asyncio.create_task(self._fetch(request, source))
        self._fetches[request.fetch] = None
        request.fetch.add_done_callback(self._fetches.pop)

    async def over(self) -> None:
        """Wait until every fetch has ended; they end with their requests."""
        await outlast(*self._fetches)

    async def _fetch(self, request: DecodeRequest, source: PrefillSource) -> None:
        fetch = PrefillFetch(
            source.address,
            self._prefill_open(request, source),
            request.root,
            request.hold,
            _Arrival(request, self._room, self._events, self._wake, self._info.vocab_size),
            self._rpc,
            self._transports,
            self._clock,
            self._metrics,
            self._info.block_size,
            self._info.num_layers,
        )
        outcome = ErrorCode.CANCELLED.value
        try:
            await fetch.run()
            outcome = "verified"
        except PdserveError as error:
            outcome = error.info.code.value
            if error.info.code is ErrorCode.FINGERPRINT_MISMATCH:
                self.pairs[source.worker_id] = PairTransport(source.worker_id, "none", error.info.message)
            self._failed(request, source, error.info)
        except Exception as error:  # an error of ours must end the request, not strand it
            log.exception("fetching the KV of %s from %s", request.submit.request_id, source.worker_id)
            outcome = ErrorCode.INTERNAL.value
            self._failed(request, source, PrefillFailed(f"{type(error).__name__}: {error}").info)
        finally:
            self._note_transfer(source.worker_id, fetch.stats, outcome)
            self._wake()  # blocks may be free now

    def _note_transfer(self, source: WorkerId, stats: FetchStats, outcome: str) -> None:
        if not stats.transport:  # it ended before its turn had come
            return
        self.pairs[source] = PairTransport(source, stats.transport, stats.transport_reason)
        self._metrics.count_transfer(stats.transport, outcome)

    def _prefill_open(self, request: DecodeRequest, source: PrefillSource) -> PrefillOpen:
        submit = request.submit
        return PrefillOpen(
            request_id=submit.request_id,
            attempt=submit.attempt,
            decode_worker_id=self._worker_id,
            source_incarnation=source.incarnation,
            fingerprint=self._info.fingerprint,
            tokens=request.prefill_tokens,
            num_prompt_tokens=request.num_prompt,
            transports=self._transports.offers(),
            sampling=submit.sampling if request.prefill_samples else None,
            seed=submit.seed,
            cache_salt=submit.cache_salt,
            priority=submit.priority,
            trace=request.trace.context,
        )

    def _failed(self, request: DecodeRequest, source: PrefillSource, error: ErrorInfo) -> None:
        if request.phase not in (Phase.WAITING, Phase.RECEIVING):
            return  # everything had arrived; how the call ended does not matter any more
        if error.code not in _PASSED_ON:
            error = PrefillFailed(f"prefill at {source.worker_id} failed: {error.message}").info
        self._events.source_failed(request, error)


class _Arrival:
    """The FetchListener of one request."""

    def __init__(
        self,
        request: DecodeRequest,
        room: Room,
        events: RequestEvents,
        wake: Callable[[], None],
        vocab_size: int,
    ) -> None:
        self._request = request
        self._room = room
        self._events = events
        self._wake = wake
        self._vocab_size = vocab_size

    def reserve(self) -> int | Busy:
        request = self._request
        if request.ended or not self._room.reserve(request):
            return Busy(self._room.ask_again_ms(request))
        request.move(Phase.RECEIVING)
        return request.num_held_blocks

    def over(self) -> bool:
        return self._request.ended

    def first_token(self, first: FirstToken, stats: FetchStats) -> None:
        request = self._request
        if request.ended:
            return
        if not request.prefill_samples or request.num_tokens != request.num_to_prefill:
            raise ProtocolViolation("a first token came that was not asked for")
        if not 0 <= first.token < self._vocab_size:
            raise ProtocolViolation(f"first token {first.token} of a vocabulary of {self._vocab_size}")
        request.timings = _timings(request, stats)
        self._events.first_token(request, SampledToken(first.token, first.logprobs))

    def sealed(self, stats: FetchStats) -> None:
        request = self._request
        if request.ended:
            return
        if request.prefill_samples and request.num_tokens == request.num_to_prefill:
            raise ProtocolViolation("the source sealed the KV without a first token")
        request.timings = replace(_timings(request, stats), transfer_is_whole=True)
        request.computed(request.num_to_prefill)
        request.start_decoding()
        self._wake()


def _timings(request: DecodeRequest, stats: FetchStats) -> RequestTimings:
    return replace(
        request.timings,
        cached_prompt_tokens_prefill=stats.cached_tokens_at_source,
        queue_s=stats.queue_s,
        prefill_s=stats.prefill_s,
        transfer_s=stats.transfer_s,
        transfer_bytes=stats.transfer_bytes,
        transport=stats.transport,
        transport_reason=stats.transport_reason,
        transfer_hidden_s=stats.transfer_hidden_s,
        transfer_exposed_s=stats.transfer_exposed_s,
    )
