from pdserve.rpc.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CancelReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CANCEL_REASON_UNSPECIFIED: _ClassVar[CancelReason]
    CANCEL_REASON_CLIENT_LEFT: _ClassVar[CancelReason]
    CANCEL_REASON_STOP_STRING: _ClassVar[CancelReason]
    CANCEL_REASON_CLIENT_TOO_SLOW: _ClassVar[CancelReason]
    CANCEL_REASON_DEADLINE: _ClassVar[CancelReason]
    CANCEL_REASON_STALLED: _ClassVar[CancelReason]
    CANCEL_REASON_UNKNOWN_HERE: _ClassVar[CancelReason]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
CANCEL_REASON_UNSPECIFIED: CancelReason
CANCEL_REASON_CLIENT_LEFT: CancelReason
CANCEL_REASON_STOP_STRING: CancelReason
CANCEL_REASON_CLIENT_TOO_SLOW: CancelReason
CANCEL_REASON_DEADLINE: CancelReason
CANCEL_REASON_STALLED: CancelReason
CANCEL_REASON_UNKNOWN_HERE: CancelReason
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason

class SessionUp(_message.Message):
    __slots__ = ("session_open", "submit", "cancel", "end")
    SESSION_OPEN_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    session_open: SessionOpen
    submit: Submit
    cancel: Cancel
    end: _common_pb2.End
    def __init__(self, session_open: _Optional[_Union[SessionOpen, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., end: _Optional[_Union[_common_pb2.End, _Mapping]] = ...) -> None: ...

class SessionDown(_message.Message):
    __slots__ = ("session_ready", "frame", "refused", "failed", "holding", "alone", "end")
    SESSION_READY_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    HOLDING_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    session_ready: SessionReady
    frame: Frame
    refused: Refused
    failed: Failed
    holding: Holding
    alone: Alone
    end: _common_pb2.End
    def __init__(self, session_ready: _Optional[_Union[SessionReady, _Mapping]] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., holding: _Optional[_Union[Holding, _Mapping]] = ..., alone: _Optional[_Union[Alone, _Mapping]] = ..., end: _Optional[_Union[_common_pb2.End, _Mapping]] = ...) -> None: ...

class SessionOpen(_message.Message):
    __slots__ = ("router_id", "router_incarnation", "worker_incarnation", "number")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WORKER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    router_incarnation: int
    worker_incarnation: int
    number: int
    def __init__(self, router_id: _Optional[str] = ..., router_incarnation: _Optional[int] = ..., worker_incarnation: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class SessionReady(_message.Message):
    __slots__ = ("worker_incarnation",)
    WORKER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    worker_incarnation: int
    def __init__(self, worker_incarnation: _Optional[int] = ...) -> None: ...

class PrefillSource(_message.Message):
    __slots__ = ("worker_id", "address", "incarnation")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    address: str
    incarnation: int
    def __init__(self, worker_id: _Optional[str] = ..., address: _Optional[str] = ..., incarnation: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("number", "request_id", "attempt", "prompt_tokens", "known_output_tokens", "sampling", "seed", "prefill", "cache_salt", "priority", "deadline_ms", "alone", "trace")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KNOWN_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    number: int
    request_id: str
    attempt: int
    prompt_tokens: bytes
    known_output_tokens: bytes
    sampling: _common_pb2.SamplingParams
    seed: int
    prefill: PrefillSource
    cache_salt: str
    priority: int
    deadline_ms: int
    alone: bool
    trace: _common_pb2.TraceContext
    def __init__(self, number: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., prompt_tokens: _Optional[bytes] = ..., known_output_tokens: _Optional[bytes] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., seed: _Optional[int] = ..., prefill: _Optional[_Union[PrefillSource, _Mapping]] = ..., cache_salt: _Optional[str] = ..., priority: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., alone: bool = ..., trace: _Optional[_Union[_common_pb2.TraceContext, _Mapping]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("number", "reason")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    number: int
    reason: CancelReason
    def __init__(self, number: _Optional[int] = ..., reason: _Optional[_Union[CancelReason, str]] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("step", "number", "first_index", "num_tokens", "tokens", "finishes", "logprobs", "timings")
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHES_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    step: int
    number: _containers.RepeatedScalarFieldContainer[int]
    first_index: _containers.RepeatedScalarFieldContainer[int]
    num_tokens: _containers.RepeatedScalarFieldContainer[int]
    tokens: bytes
    finishes: _containers.RepeatedCompositeFieldContainer[EventFinish]
    logprobs: _containers.RepeatedCompositeFieldContainer[EventLogprobs]
    timings: _containers.RepeatedCompositeFieldContainer[SubmissionTimings]
    def __init__(self, step: _Optional[int] = ..., number: _Optional[_Iterable[int]] = ..., first_index: _Optional[_Iterable[int]] = ..., num_tokens: _Optional[_Iterable[int]] = ..., tokens: _Optional[bytes] = ..., finishes: _Optional[_Iterable[_Union[EventFinish, _Mapping]]] = ..., logprobs: _Optional[_Iterable[_Union[EventLogprobs, _Mapping]]] = ..., timings: _Optional[_Iterable[_Union[SubmissionTimings, _Mapping]]] = ...) -> None: ...

class EventFinish(_message.Message):
    __slots__ = ("event", "reason")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    event: int
    reason: FinishReason
    def __init__(self, event: _Optional[int] = ..., reason: _Optional[_Union[FinishReason, str]] = ...) -> None: ...

class EventLogprobs(_message.Message):
    __slots__ = ("event", "tokens")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    event: int
    tokens: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
    def __init__(self, event: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class SubmissionTimings(_message.Message):
    __slots__ = ("number", "timings")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    number: int
    timings: RequestTimings
    def __init__(self, number: _Optional[int] = ..., timings: _Optional[_Union[RequestTimings, _Mapping]] = ...) -> None: ...

class RequestTimings(_message.Message):
    __slots__ = ("cached_prompt_tokens_prefill", "cached_prompt_tokens_decode", "queue_s", "prefill_s", "transfer_s", "transfer_bytes", "transport", "transfer_hidden_s", "transfer_exposed_s", "transport_reason", "transfer_is_whole")
    CACHED_PROMPT_TOKENS_PREFILL_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_DECODE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_HIDDEN_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_EXPOSED_S_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_REASON_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_IS_WHOLE_FIELD_NUMBER: _ClassVar[int]
    cached_prompt_tokens_prefill: int
    cached_prompt_tokens_decode: int
    queue_s: float
    prefill_s: float
    transfer_s: float
    transfer_bytes: int
    transport: str
    transfer_hidden_s: float
    transfer_exposed_s: float
    transport_reason: str
    transfer_is_whole: bool
    def __init__(self, cached_prompt_tokens_prefill: _Optional[int] = ..., cached_prompt_tokens_decode: _Optional[int] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., transfer_bytes: _Optional[int] = ..., transport: _Optional[str] = ..., transfer_hidden_s: _Optional[float] = ..., transfer_exposed_s: _Optional[float] = ..., transport_reason: _Optional[str] = ..., transfer_is_whole: bool = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("number", "error")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    number: int
    error: _common_pb2.ErrorInfo
    def __init__(self, number: _Optional[int] = ..., error: _Optional[_Union[_common_pb2.ErrorInfo, _Mapping]] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("number", "error", "lost_source")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LOST_SOURCE_FIELD_NUMBER: _ClassVar[int]
    number: int
    error: _common_pb2.ErrorInfo
    lost_source: bool
    def __init__(self, number: _Optional[int] = ..., error: _Optional[_Union[_common_pb2.ErrorInfo, _Mapping]] = ..., lost_source: bool = ...) -> None: ...

class Holding(_message.Message):
    __slots__ = ("last_submit", "numbers")
    LAST_SUBMIT_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    last_submit: int
    numbers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, last_submit: _Optional[int] = ..., numbers: _Optional[_Iterable[int]] = ...) -> None: ...

class Alone(_message.Message):
    __slots__ = ("number", "alone")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    number: int
    alone: bool
    def __init__(self, number: _Optional[int] = ..., alone: bool = ...) -> None: ...
