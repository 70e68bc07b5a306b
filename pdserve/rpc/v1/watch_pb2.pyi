from pdserve.rpc.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]
    ROLE_UNSPLIT: _ClassVar[Role]

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_STARTING: _ClassVar[WorkerState]
    WORKER_STATE_READY: _ClassVar[WorkerState]
    WORKER_STATE_DRAINING: _ClassVar[WorkerState]
    WORKER_STATE_STOPPED: _ClassVar[WorkerState]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
ROLE_UNSPLIT: Role
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_STARTING: WorkerState
WORKER_STATE_READY: WorkerState
WORKER_STATE_DRAINING: WorkerState
WORKER_STATE_STOPPED: WorkerState

class WatchUp(_message.Message):
    __slots__ = ("watch_open", "end")
    WATCH_OPEN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    watch_open: WatchOpen
    end: _common_pb2.End
    def __init__(self, watch_open: _Optional[_Union[WatchOpen, _Mapping]] = ..., end: _Optional[_Union[_common_pb2.End, _Mapping]] = ...) -> None: ...

class WatchDown(_message.Message):
    __slots__ = ("hello", "report", "end")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    report: Report
    end: _common_pb2.End
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., end: _Optional[_Union[_common_pb2.End, _Mapping]] = ...) -> None: ...

class WatchOpen(_message.Message):
    __slots__ = ("watcher_id", "watcher_incarnation")
    WATCHER_ID_FIELD_NUMBER: _ClassVar[int]
    WATCHER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    watcher_id: str
    watcher_incarnation: int
    def __init__(self, watcher_id: _Optional[str] = ..., watcher_incarnation: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("worker_id", "incarnation", "role", "model", "root_digest", "cost", "prefill_share")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROOT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SHARE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    role: Role
    model: ModelInfo
    root_digest: bytes
    cost: StepCost
    prefill_share: float
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., role: _Optional[_Union[Role, str]] = ..., model: _Optional[_Union[ModelInfo, _Mapping]] = ..., root_digest: _Optional[bytes] = ..., cost: _Optional[_Union[StepCost, _Mapping]] = ..., prefill_share: _Optional[float] = ...) -> None: ...

class StepCost(_message.Message):
    __slots__ = ("fixed_s", "per_prefill_token_s", "per_decode_sequence_s", "per_context_token_s")
    FIXED_S_FIELD_NUMBER: _ClassVar[int]
    PER_PREFILL_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    PER_DECODE_SEQUENCE_S_FIELD_NUMBER: _ClassVar[int]
    PER_CONTEXT_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    fixed_s: float
    per_prefill_token_s: float
    per_decode_sequence_s: float
    per_context_token_s: float
    def __init__(self, fixed_s: _Optional[float] = ..., per_prefill_token_s: _Optional[float] = ..., per_decode_sequence_s: _Optional[float] = ..., per_context_token_s: _Optional[float] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "architecture", "revision", "dtype", "vocab_size", "max_model_len", "num_layers", "num_kv_heads", "head_dim", "block_size", "num_blocks", "block_bytes", "eos_token_ids", "fingerprint", "chunk_tokens", "deterministic")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    name: str
    architecture: str
    revision: str
    dtype: str
    vocab_size: int
    max_model_len: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    num_blocks: int
    block_bytes: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    fingerprint: str
    chunk_tokens: int
    deterministic: bool
    def __init__(self, name: _Optional[str] = ..., architecture: _Optional[str] = ..., revision: _Optional[str] = ..., dtype: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., block_bytes: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., fingerprint: _Optional[str] = ..., chunk_tokens: _Optional[int] = ..., deterministic: bool = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("incarnation", "stored", "removed", "num_names", "xor_names", "load")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    NUM_NAMES_FIELD_NUMBER: _ClassVar[int]
    XOR_NAMES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    stored: _containers.RepeatedScalarFieldContainer[int]
    removed: _containers.RepeatedScalarFieldContainer[int]
    num_names: int
    xor_names: int
    load: WorkerLoad
    def __init__(self, incarnation: _Optional[int] = ..., stored: _Optional[_Iterable[int]] = ..., removed: _Optional[_Iterable[int]] = ..., num_names: _Optional[int] = ..., xor_names: _Optional[int] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("state", "waiting_requests", "waiting_tokens", "running_sequences", "running_context_tokens", "blocks", "step", "last_submit", "prefill_tokens_per_s", "decode_step_s", "prefill_slowdown", "decode_slowdown")
    STATE_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_SUBMIT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_STEP_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SLOWDOWN_FIELD_NUMBER: _ClassVar[int]
    DECODE_SLOWDOWN_FIELD_NUMBER: _ClassVar[int]
    state: WorkerState
    waiting_requests: int
    waiting_tokens: int
    running_sequences: int
    running_context_tokens: int
    blocks: BlockCounts
    step: int
    last_submit: int
    prefill_tokens_per_s: float
    decode_step_s: float
    prefill_slowdown: float
    decode_slowdown: float
    def __init__(self, state: _Optional[_Union[WorkerState, str]] = ..., waiting_requests: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., running_sequences: _Optional[int] = ..., running_context_tokens: _Optional[int] = ..., blocks: _Optional[_Union[BlockCounts, _Mapping]] = ..., step: _Optional[int] = ..., last_submit: _Optional[int] = ..., prefill_tokens_per_s: _Optional[float] = ..., decode_step_s: _Optional[float] = ..., prefill_slowdown: _Optional[float] = ..., decode_slowdown: _Optional[float] = ...) -> None: ...

class BlockCounts(_message.Message):
    __slots__ = ("free", "cached", "reserved", "active")
    FREE_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    free: int
    cached: int
    reserved: int
    active: int
    def __init__(self, free: _Optional[int] = ..., cached: _Optional[int] = ..., reserved: _Optional[int] = ..., active: _Optional[int] = ...) -> None: ...
