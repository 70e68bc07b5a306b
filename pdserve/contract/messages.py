"""What travels between router, decode worker and prefill worker.

Three kinds of stream, each on its own HTTP/2 connection, and a fourth for KV bytes:

- Session, router <-> decode worker, one long-lived per pair:
  up `SessionOpen`, `Submit`, `Cancel`; down `SessionReady`, `Frame`, `Refused`, `Failed`, `Alone`, and once a
  second `Holding`.
- Watch, worker -> router or controller: up `WatchOpen`; down `Hello`, then `Report`s.
- Prefill, decode worker -> any worker that is to compute or already holds the prompt's KV:
  up `PrefillOpen`, `Reserved` or `Busy`, `Ack`s; down `Starting`, `Segment`s, `FirstToken`, `Sealed`,
  and once a second `Working`.
- Kv: raw bytes, only used by the gRPC transport.

Every stream ends with `End` from each side that had something to say; a stream that stops without it is
broken, on both sides. Durations travel as remaining milliseconds because clocks differ.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from pdserve.contract.errors import ErrorInfo
from pdserve.contract.ids import BlockHash, Incarnation, RequestId, RouterId, SubmitNumber, WorkerId
from pdserve.contract.sampling import FinishReason, SamplingParams
from pdserve.contract.tokens import TokenBytes
from pdserve.contract.tracing import TraceContext
from pdserve.contract.work import BlockCounts, LayerRange, ModelInfo, PoolExport, StepCost, TokenLogprobs

PROTOCOL_VERSION = 1

SIGN_OF_LIFE_S = 1.0
"""How often a worker says on a Session what it holds, and on a Prefill call that it still works."""
SILENCE_S = 10.0
"""Whoever hears nothing for so long from a peer that says something every second gives the call up. Longer
than a dead peer needs to be noticed (`pdserve.rpc.channel`): it is for messages that are lost."""


class Role(StrEnum):
    """What a worker is for. An unsplit worker is a decode worker that prefills everything itself."""

    PREFILL = "prefill"
    DECODE = "decode"
    UNSPLIT = "unsplit"


class WorkerState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class End:
    """The last message of one side. `error` None means that all went well."""

    error: ErrorInfo | None = None


# Session


@dataclass(frozen=True, slots=True)
class SessionOpen:
    router_id: RouterId
    router_incarnation: Incarnation
    worker_incarnation: Incarnation
    """The incarnation the router learned from Watch; another one refuses the stream."""
    number: int = 1
    """Counts this router's Sessions with this worker. A Session ends the one before it, and one whose number
    is not above all earlier ones' is refused."""


@dataclass(frozen=True, slots=True)
class SessionReady:
    worker_incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class PrefillSource:
    """The worker that a decode worker asks for a prompt's KV."""

    worker_id: WorkerId
    address: str
    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class Submit:
    """Serve one attempt of a request. Answered by Frames, or by one Refused or Failed."""

    number: SubmitNumber
    request_id: RequestId
    attempt: int
    """Counts from 1; a re-placed request is the next attempt."""
    prompt_tokens: TokenBytes
    known_output_tokens: TokenBytes
    """Output tokens that earlier attempts have given the client: facts, never sampled again."""
    sampling: SamplingParams
    seed: int
    prefill: PrefillSource | None
    """None: the decode worker computes the prompt itself (local prefill)."""
    cache_salt: str = ""
    priority: int = 0
    """Smaller is more urgent."""
    deadline_ms: int | None = None
    """Remaining time; None when the client gave no deadline. When it has passed the decode worker ends the
    request by itself, and its Prefill call with it, so that call carries no deadline of its own."""
    alone: bool = False
    """It may have killed workers: the decode worker computes everything itself, beside nothing else."""
    trace: TraceContext | None = None
    """The span of this attempt; None when the router traces nothing."""


class CancelReason(StrEnum):
    """Why a router does not want a submission any more; the value is the outcome that metrics count."""

    CLIENT_LEFT = "cancelled"
    STOP_STRING = "stop"
    CLIENT_TOO_SLOW = "client_too_slow"
    DEADLINE = "deadline_exceeded"
    STALLED = "stalled"
    """The attempt was given up and the request placed again."""
    UNKNOWN_HERE = "unknown"
    """The router does not know the submission (any more): an earlier Cancel was lost."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop serving a submission. No answer; nothing more arrives for it after what is on its way."""

    number: SubmitNumber
    reason: CancelReason = CancelReason.CLIENT_LEFT


class TokenEvent(NamedTuple):
    """New output tokens of one submission. `first_index` counts output tokens of the request from 0,
    those of earlier attempts included.

    A tuple, because one is made per sequence and step on both sides, and a frozen dataclass takes three times
    as long to make."""

    number: SubmitNumber
    first_index: int
    tokens: TokenBytes
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token when the request asked for them, else empty."""
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class RequestTimings:
    """How one attempt went at its workers, for metrics and per-request answers. Seconds."""

    cached_prompt_tokens_prefill: int = 0
    """Prompt tokens that the prefill worker found in its cache."""
    cached_prompt_tokens_decode: int = 0
    """Prompt tokens that the decode worker held and that did not travel."""
    queue_s: float = 0.0
    """Until the prompt's computation began."""
    prefill_s: float = 0.0
    """Of that computation, other prompts' turns in between included."""
    transfer_s: float = 0.0
    """Sum over segments: from taking the announcement to the verified copy."""
    transfer_bytes: int = 0
    transport: str = ""
    """Empty when nothing is to travel, or nothing has been chosen yet."""
    transfer_hidden_s: float = 0.0
    """Of `transfer_s`, what passed before the prompt's last forward pass had ended."""
    transfer_exposed_s: float = 0.0
    """From the end of that pass until everything was verified: what the second token waited for."""
    transport_reason: str = ""
    """Why that transport and none before it in the order."""
    transfer_is_whole: bool = False
    """Everything was verified: the numbers of the transfer are final."""


@dataclass(frozen=True, slots=True)
class Frame:
    """All that one engine step (or one first token) has to tell one router."""

    step: int
    """The worker's step counter."""
    events: tuple[TokenEvent, ...]
    timings: tuple[tuple[SubmitNumber, RequestTimings], ...] = ()
    """Of submissions that finish in this frame, or of which there is something new to tell."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The submission was not started; place it elsewhere or later."""

    number: SubmitNumber
    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class Failed:
    """The submission ended without finishing. What was emitted before stays emitted."""

    number: SubmitNumber
    error: ErrorInfo
    lost_source: bool = False
    """The prefill side failed, not this worker; the router learns that the pair does not work."""


@dataclass(frozen=True, slots=True)
class Holding:
    """All that a decode worker has of a router; said every SIGN_OF_LIFE_S. What the router believes to be
    there and is not named here was lost on the way, in one direction or the other."""

    last_submit: SubmitNumber
    """The newest Submit that has been taken."""
    numbers: tuple[SubmitNumber, ...]
    """Submissions that have not ended."""


@dataclass(frozen=True, slots=True)
class Alone:
    """A submission that is to run alone has begun to, or does not run alone any more."""

    number: SubmitNumber
    alone: bool


SessionUp = SessionOpen | Submit | Cancel | End
SessionDown = SessionReady | Frame | Refused | Failed | Holding | Alone | End

# Watch


@dataclass(frozen=True, slots=True)
class WatchOpen:
    watcher_id: str
    """A router id, or ``controller``. Names whose last Submit the reports acknowledge."""
    watcher_incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class Hello:
    worker_id: WorkerId
    incarnation: Incarnation
    role: Role
    model: ModelInfo
    root_digest: bytes
    """`ChainRoot.digest` of the empty salt. A router with another one would look for other names."""
    cost: StepCost
    """How long steps take there, as its calibration found."""
    prefill_share: float
    """Most of its time that it spends on prompts while sequences run beside them."""


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a worker has to do and to give."""

    state: WorkerState
    waiting_requests: int
    """Prefill: not started. Decode: admitted and waiting for blocks, prefill or the batch."""
    waiting_tokens: int
    """Prompt tokens still to be computed here, those of running prefills included."""
    running_sequences: int
    running_context_tokens: int
    blocks: BlockCounts
    step: int
    """Engine steps since start. With work pending and a stale counter the worker counts as hung."""
    last_submit: SubmitNumber
    """Highest Submit number taken from this watcher's Session: of what the watcher has sent, this report
    covers what came up to it, and not what came later."""
    prefill_tokens_per_s: float
    """Of the last step that only computed prompts; 0 before the first."""
    decode_step_s: float
    """How long the last step took that only decoded; 0 before the first."""
    prefill_slowdown: float
    """How many times as long prompts take of late as `Hello.cost` says."""
    decode_slowdown: float
    """How many times as long steps take of late that only decode."""


@dataclass(frozen=True, slots=True)
class Report:
    """One delta. The first after Hello is a snapshot: `stored` holds every name, `removed` nothing."""

    incarnation: Incarnation
    stored: tuple[BlockHash, ...]
    removed: tuple[BlockHash, ...]
    num_names: int
    """How many names the worker holds after this report."""
    xor_names: int
    """Xor of all those names, so that a wrong index is noticed."""
    load: WorkerLoad


WatchUp = WatchOpen | End
WatchDown = Hello | Report | End

# Prefill


@dataclass(frozen=True, slots=True)
class TransportOffer:
    """A transport that the decode worker can receive with, best first in `PrefillOpen.transports`."""

    name: str
    host_id: str = ""
    """Of the offering process, for transports that need one host."""
    endpoint: bytes = b""
    """What else the source must know of the receiver; only the transport itself reads it."""


@dataclass(frozen=True, slots=True)
class TransportChoice:
    """The transport that the source chose, and why not a better one."""

    name: str
    reason: str
    pool: PoolExport | None = None
    """shared_memory: where the source's pool can be mapped."""
    transfer_id: str = ""
    """grpc: names the Kv stream that the decode worker opens."""
    endpoint: bytes = b""
    """What else the receiver must know of the source; only the transport itself reads it."""


@dataclass(frozen=True, slots=True)
class PairTransport:
    """How KV came from a prefill worker the last time, for people; not on the wire."""

    source: WorkerId
    transport: str
    reason: str
    """Why this transport and none that would be faster; or, of "none", why the source refuses the pair."""


@dataclass(frozen=True, slots=True)
class PrefillOpen:
    """Ask for a prompt's KV. Nothing is reserved for it yet on either side but what the decode worker
    already holds and has pinned."""

    request_id: RequestId
    attempt: int
    decode_worker_id: WorkerId
    source_incarnation: Incarnation
    """Whom the decode worker means to talk to."""
    fingerprint: str
    tokens: TokenBytes
    """Prompt, and in a recovery outside deterministic mode the known output tokens after it."""
    num_prompt_tokens: int
    transports: tuple[TransportOffer, ...]
    sampling: SamplingParams | None
    """None: the token after `tokens` is known already, nothing is sampled."""
    seed: int = 0
    cache_salt: str = ""
    priority: int = 0
    trace: TraceContext | None = None
    """The span of the request at the decode worker."""


@dataclass(frozen=True, slots=True)
class Starting:
    """The request is next in line and its blocks are reserved here. Answer Reserved or Busy."""

    transport: TransportChoice
    cached_tokens: int
    """Prompt tokens whose KV this worker already holds."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """The decode worker has reserved every block from `first_missing_block` on."""

    first_missing_block: int


@dataclass(frozen=True, slots=True)
class Busy:
    """No room at the decode worker now. The source lets the request wait and takes another."""

    retry_after_ms: int


@dataclass(frozen=True, slots=True)
class Segment:
    """KV of some whole blocks and layers is ready; its bytes go over the transport.

    The canonical order of a segment's bytes is [block, layer, key/value, token in block, KV head, head dim].
    """

    index: int
    """Counts from 0; a segment that is sent again keeps its index."""
    first_block: int
    """Index in the sequence's block table, not a pool row."""
    num_blocks: int
    layers: LayerRange
    digest: int
    """Of the canonical bytes; see `pdserve.handoff.digest`."""
    num_bytes: int
    source_blocks: tuple[int, ...] = ()
    """Pool rows at the source, for transports that read them from there."""


@dataclass(frozen=True, slots=True)
class Ack:
    """The receiver is done with a segment's source: copied and verified, or (`ok` False) to be sent again."""

    index: int
    ok: bool = True


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Output token 0, sent as soon as it is sampled, before the last KV bytes."""

    token: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Sealed:
    """All segments have been sent. The sequence may start once they are all verified and End(None) came."""

    num_segments: int
    digest: int
    """Sum modulo 2**64 of all segments' digests."""
    queue_s: float = 0.0
    prefill_s: float = 0.0
    since_computed_s: float = 0.0
    """How long ago, when this was sent, the prompt's last forward pass had ended."""


@dataclass(frozen=True, slots=True)
class Working:
    """Nothing new, but the call is alive; said every SIGN_OF_LIFE_S, also while the request waits."""


PrefillUp = PrefillOpen | Reserved | Busy | Ack | End
PrefillDown = Starting | Segment | FirstToken | Sealed | Working | End

Message = (
    SessionOpen
    | SessionReady
    | Submit
    | Cancel
    | Frame
    | Refused
    | Failed
    | Holding
    | Alone
    | WatchOpen
    | Hello
    | Report
    | PrefillOpen
    | Starting
    | Reserved
    | Busy
    | Segment
    | Ack
    | FirstToken
    | Sealed
    | Working
    | End
    | bytes
)
"""Anything that a stream carries; plain bytes only on Kv streams."""


@dataclass(frozen=True, slots=True)
class Member:
    """One worker as the controller knows it."""

    worker_id: WorkerId
    address: str
    incarnation: Incarnation
    role: Role
    revision: str
    state: WorkerState


@dataclass(frozen=True, slots=True)
class Members:
    """The whole membership, level-triggered; a smaller epoch than the last seen is dropped."""

    epoch: int
    members: tuple[Member, ...]
