from pdserve.rpc.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillUp(_message.Message):
    __slots__ = ("prefill_open", "reserved", "busy", "ack", "end")
    PREFILL_OPEN_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    prefill_open: PrefillOpen
    reserved: Reserved
    busy: Busy
    ack: Ack
    end: _common_pb2.End
    def __init__(self, prefill_open: _Optional[_Union[PrefillOpen, _Mapping]] = ..., reserved: _Optional[_Union[Reserved, _Mapping]] = ..., busy: _Optional[_Union[Busy, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., end: _Optional[_Union[_common_pb2.End, _Mapping]] = ...) -> None: ...

class PrefillDown(_message.Message):
    __slots__ = ("starting", "segment", "first_token", "sealed", "working", "end")
    STARTING_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    WORKING_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    starting: Starting
    segment: Segment
    first_token: FirstToken
    sealed: Sealed
    working: Working
    end: _common_pb2.End
    def __init__(self, starting: _Optional[_Union[Starting, _Mapping]] = ..., segment: _Optional[_Union[Segment, _Mapping]] = ..., first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., sealed: _Optional[_Union[Sealed, _Mapping]] = ..., working: _Optional[_Union[Working, _Mapping]] = ..., end: _Optional[_Union[_common_pb2.End, _Mapping]] = ...) -> None: ...

class TransportOffer(_message.Message):
    __slots__ = ("name", "host_id", "endpoint")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    name: str
    host_id: str
    endpoint: bytes
    def __init__(self, name: _Optional[str] = ..., host_id: _Optional[str] = ..., endpoint: _Optional[bytes] = ...) -> None: ...

class TransportChoice(_message.Message):
    __slots__ = ("name", "reason", "pool", "transfer_id", "endpoint")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    name: str
    reason: str
    pool: PoolExport
    transfer_id: str
    endpoint: bytes
    def __init__(self, name: _Optional[str] = ..., reason: _Optional[str] = ..., pool: _Optional[_Union[PoolExport, _Mapping]] = ..., transfer_id: _Optional[str] = ..., endpoint: _Optional[bytes] = ...) -> None: ...

class PoolExport(_message.Message):
    __slots__ = ("host_id", "pid", "fd", "num_bytes", "token")
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    host_id: str
    pid: int
    fd: int
    num_bytes: int
    token: str
    def __init__(self, host_id: _Optional[str] = ..., pid: _Optional[int] = ..., fd: _Optional[int] = ..., num_bytes: _Optional[int] = ..., token: _Optional[str] = ...) -> None: ...

class PrefillOpen(_message.Message):
    __slots__ = ("request_id", "attempt", "decode_worker_id", "source_incarnation", "fingerprint", "tokens", "num_prompt_tokens", "transports", "sampling", "seed", "cache_salt", "priority", "trace")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    decode_worker_id: str
    source_incarnation: int
    fingerprint: str
    tokens: bytes
    num_prompt_tokens: int
    transports: _containers.RepeatedCompositeFieldContainer[TransportOffer]
    sampling: _common_pb2.SamplingParams
    seed: int
    cache_salt: str
    priority: int
    trace: _common_pb2.TraceContext
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., decode_worker_id: _Optional[str] = ..., source_incarnation: _Optional[int] = ..., fingerprint: _Optional[str] = ..., tokens: _Optional[bytes] = ..., num_prompt_tokens: _Optional[int] = ..., transports: _Optional[_Iterable[_Union[TransportOffer, _Mapping]]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., seed: _Optional[int] = ..., cache_salt: _Optional[str] = ..., priority: _Optional[int] = ..., trace: _Optional[_Union[_common_pb2.TraceContext, _Mapping]] = ...) -> None: ...

class Working(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Starting(_message.Message):
    __slots__ = ("transport", "cached_tokens")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    transport: TransportChoice
    cached_tokens: int
    def __init__(self, transport: _Optional[_Union[TransportChoice, _Mapping]] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("first_missing_block",)
    FIRST_MISSING_BLOCK_FIELD_NUMBER: _ClassVar[int]
    first_missing_block: int
    def __init__(self, first_missing_block: _Optional[int] = ...) -> None: ...

class Busy(_message.Message):
    __slots__ = ("retry_after_ms",)
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    retry_after_ms: int
    def __init__(self, retry_after_ms: _Optional[int] = ...) -> None: ...

class LayerRange(_message.Message):
    __slots__ = ("start", "stop")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("index", "first_block", "num_blocks", "layers", "digest", "num_bytes", "source_blocks")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    SOURCE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    index: int
    first_block: int
    num_blocks: int
    layers: LayerRange
    digest: int
    num_bytes: int
    source_blocks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, index: _Optional[int] = ..., first_block: _Optional[int] = ..., num_blocks: _Optional[int] = ..., layers: _Optional[_Union[LayerRange, _Mapping]] = ..., digest: _Optional[int] = ..., num_bytes: _Optional[int] = ..., source_blocks: _Optional[_Iterable[int]] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("index", "ok")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    index: int
    ok: bool
    def __init__(self, index: _Optional[int] = ..., ok: bool = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("token", "logprobs")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token: int
    logprobs: _common_pb2.TokenLogprobs
    def __init__(self, token: _Optional[int] = ..., logprobs: _Optional[_Union[_common_pb2.TokenLogprobs, _Mapping]] = ...) -> None: ...

class Sealed(_message.Message):
    __slots__ = ("num_segments", "digest", "queue_s", "prefill_s", "since_computed_s")
    NUM_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    SINCE_COMPUTED_S_FIELD_NUMBER: _ClassVar[int]
    num_segments: int
    digest: int
    queue_s: float
    prefill_s: float
    since_computed_s: float
    def __init__(self, num_segments: _Optional[int] = ..., digest: _Optional[int] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., since_computed_s: _Optional[float] = ...) -> None: ...
