"""Contract messages to wire bytes and back, exactly; the only file that knows both.

A dataclass and its protobuf message have the same field names, so one converter per dataclass is derived
from its type hints when this module is imported: enums by name, tuples as repeated fields, a pair as a
message of two fields, None as an absent field. A field that is missing on one side stops the import. Only
`Frame`, of which there is one per engine step and router, is written out by hand.

A Kv stream carries its bytes as they are; see proto/pdserve/rpc/v1/worker.proto.
"""

import dataclasses
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import StrEnum
from itertools import accumulate, pairwise
from types import NoneType, UnionType
from typing import Any

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Proto

from pdserve.contract.errors import ProtocolViolation
from pdserve.contract.messages import End, Frame, Message, RequestTimings, TokenEvent
from pdserve.contract.ports import Call
from pdserve.contract.sampling import FinishReason
from pdserve.contract.tokens import BYTES_PER_TOKEN
from pdserve.contract.work import TokenLogprobs
from pdserve.rpc.stream import MESSAGE_KINDS, Direction
from pdserve.rpc.v1 import common_pb2, prefill_pb2, session_pb2, watch_pb2, worker_pb2

SERVICE: str = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name

_END_FOLLOWS = b""


class Codec(ABC):
    """Encodes and decodes one direction of one kind of stream."""

    @abstractmethod
    def encode(self, message: Message) -> tuple[bytes, ...]:
        """The gRPC messages, mostly one, that carry `message`, which is one of this stream's
        MESSAGE_KINDS. Raises ValueError when a value does not fit its field."""

    @abstractmethod
    def decode(self, raw: bytes) -> Message | None:
        """The message in the next gRPC message; None when the following one completes it. Raises
        ProtocolViolation."""


def codec_for(call: Call, direction: Direction) -> Codec:
    """A new codec; one per stream and direction."""
    if call is Call.KV:
        return _BytesCodec()
    return _ENVELOPES[call, direction]


class _EnvelopeCodec(Codec):
    """A protobuf message with one oneof, whose fields are named after the dataclasses they carry."""

    def __init__(self, envelope: type[Proto], kinds: tuple[type, ...]):
        self._envelope = envelope
        self._name = envelope.DESCRIPTOR.name
        fields = envelope.DESCRIPTOR.fields_by_name
        self._kinds = {kind: _snake_case(kind.__name__) for kind in kinds}
        self._readers = {name: _reader(kind, fields[name].message_type) for kind, name in self._kinds.items()}
        self._writers = {kind: _writer(kind, fields[name].message_type) for kind, name in self._kinds.items()}

    def encode(self, message: Message) -> tuple[bytes, ...]:
        kind = type(message)
        envelope = self._envelope()
        field = getattr(envelope, self._kinds[kind])
        field.SetInParent()
        self._writers[kind](message, field)
        return (envelope.SerializeToString(),)

    def decode(self, raw: bytes) -> Message:
        envelope = _parse(self._envelope, raw)
        name = envelope.WhichOneof("message")
        if name is None:
            raise ProtocolViolation(f"a {self._name} carries a message that is not known here")
        message: Message = self._readers[name](getattr(envelope, name))
        return message


class _BytesCodec(Codec):
    """Payloads as they are; an empty gRPC message announces End."""

    def __init__(self) -> None:
        self._end_follows = False

    def encode(self, message: Message) -> tuple[bytes, ...]:
        if isinstance(message, End):
            encoded = common_pb2.End()
            _WRITE_END(message, encoded)
            return (_END_FOLLOWS, encoded.SerializeToString())
        return (typing.cast(bytes, message),)

    def decode(self, raw: bytes) -> Message | None:
        if self._end_follows:
            end: End = _READ_END(_parse(common_pb2.End, raw))
            return end
        self._end_follows = raw == _END_FOLLOWS
        return None if self._end_follows else raw


def _parse(kind: type[Proto], raw: bytes) -> Any:
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise ProtocolViolation(f"a {kind.DESCRIPTOR.name} cannot be decoded: {error}") from error


# Frames


def _write_frame(frame: Frame, proto: Any) -> None:
    events = frame.events
    proto.step = frame.step
    proto.number.extend([event.number for event in events])
    proto.first_index.extend([event.first_index for event in events])
    proto.tokens = b"".join([event.tokens for event in events])
    lengths = [len(event.tokens) for event in events]
    if lengths.count(BYTES_PER_TOKEN) != len(events):
        proto.num_tokens.extend([length // BYTES_PER_TOKEN for length in lengths])
    for index, event in enumerate(events):
        if event.finish is not None:
            proto.finishes.add(event=index, reason=_FINISH_NUMBERS[event.finish])
        if event.logprobs:
            column = proto.logprobs.add(event=index)
            for logprobs in event.logprobs:
                _WRITE_LOGPROBS(logprobs, column.tokens.add())
    for number, timings in frame.timings:
        _WRITE_TIMINGS(timings, proto.timings.add(number=number).timings)


def _read_frame(proto: Any) -> Frame:
    count = len(proto.number)
    finishes = [None] * count
    for of in proto.finishes:
        finishes[_event_index(of, count)] = _READ_FINISH(of.reason)
    logprobs: list[tuple[TokenLogprobs, ...]] = [()] * count
    for of in proto.logprobs:
        logprobs[_event_index(of, count)] = tuple(map(_READ_LOGPROBS, of.tokens))
    events = tuple(map(TokenEvent, proto.number, proto.first_index, _pieces(proto), logprobs, finishes))
    timings = tuple((of.number, _READ_TIMINGS(of.timings)) for of in proto.timings)
    return Frame(proto.step, events, timings)


def _pieces(proto: Any) -> list[bytes]:
    """The tokens of each event."""
    tokens: bytes = proto.tokens
    counts = proto.num_tokens[:] or [1] * len(proto.number)
    if not len(proto.number) == len(proto.first_index) == len(counts):
        raise ProtocolViolation("the columns of a Frame have different lengths")
    ends = [BYTES_PER_TOKEN * end for end in accumulate(counts)]
    if len(tokens) != (ends[-1] if ends else 0):
        raise ProtocolViolation("a Frame's tokens are more or fewer than its events say")
    return [tokens[start:end] for start, end in pairwise([0, *ends])]


def _event_index(of: Any, count: int) -> int:
    index: int = of.event
    if index >= count:
        raise ProtocolViolation(f"a Frame of {count} events says something of event {index}")
    return index


# Converters derived from type hints

_Write = Callable[[Any, Any], None]
_Read = Callable[[Any], Any]
_Descriptor = Any  # of a message, field or enum; protobuf's stubs type those of its C implementation apart


def _writer(kind: type, descriptor: _Descriptor) -> _Write:
    """A function that copies a dataclass into an empty protobuf message."""
    if kind is Frame:
        return _write_frame
    setters = [
        _setter(name, hint, descriptor.fields_by_name[name]) for name, hint in _hints(kind, descriptor)
    ]

    def write(message: Any, proto: Any) -> None:
        for setter in setters:
            setter(message, proto)

    return write


def _reader(kind: type, descriptor: _Descriptor) -> _Read:
    """A function that makes the dataclass out of a protobuf message."""
    if kind is Frame:
        return _read_frame
    getters = [
        _getter(name, hint, descriptor.fields_by_name[name]) for name, hint in _hints(kind, descriptor)
    ]

    def read(proto: Any) -> Any:
        return kind(*[getter(proto) for getter in getters])

    return read


def _hints(kind: type, descriptor: _Descriptor) -> list[tuple[str, Any]]:
    """Field names and types of a dataclass, in order. Raises TypeError unless the message has the same."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    if set(names) != set(descriptor.fields_by_name):
        raise TypeError(f"{kind.__name__} and {descriptor.full_name} have different fields")
    return [(name, hints[name]) for name in names]


def _setter(name: str, hint: Any, field: _Descriptor) -> _Write:
    inner, shape = _shape(hint)
    if field.message_type is not None:
        return _message_setter(name, _message_writer(inner, field.message_type), shape)
    to_wire = _to_wire(inner, field)
    if shape is _Shape.REPEATED:
        return lambda message, proto: getattr(proto, name).extend(map(to_wire, getattr(message, name)))
    if shape is _Shape.SINGLE:
        return lambda message, proto: setattr(proto, name, to_wire(getattr(message, name)))

    def set_if_present(message: Any, proto: Any) -> None:
        if (value := getattr(message, name)) is not None:
            setattr(proto, name, to_wire(value))

    return set_if_present


def _message_setter(name: str, write: _Write, shape: "_Shape") -> _Write:
    def write_each(message: Any, proto: Any) -> None:
        repeated = getattr(proto, name)
        for value in getattr(message, name):
            write(value, repeated.add())

    def write_if_present(message: Any, proto: Any) -> None:
        if (value := getattr(message, name)) is not None:
            inner = getattr(proto, name)
            inner.SetInParent()
            write(value, inner)

    return write_each if shape is _Shape.REPEATED else write_if_present


def _getter(name: str, hint: Any, field: _Descriptor) -> _Read:
    inner, shape = _shape(hint)
    is_message = field.message_type is not None
    read = _message_reader(inner, field.message_type) if is_message else _from_wire(inner, field)
    if shape is _Shape.REPEATED:
        return lambda proto: tuple(map(read, getattr(proto, name)))
    if shape is _Shape.OPTIONAL:
        if not field.has_presence:
            raise TypeError(f"{field.full_name} must be optional, as the dataclass field may be None")
        return lambda proto: read(getattr(proto, name)) if proto.HasField(name) else None
    if not is_message:
        return lambda proto: read(getattr(proto, name))

    def read_required(proto: Any) -> Any:
        if not proto.HasField(name):
            raise ProtocolViolation(f"{field.full_name} is missing")
        return read(getattr(proto, name))

    return read_required


class _Shape(StrEnum):
    SINGLE = "single"
    OPTIONAL = "optional"
    REPEATED = "repeated"


def _shape(hint: Any) -> tuple[Any, _Shape]:
    """What one value of a field is, and how many there are."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is UnionType and NoneType in args:
        (inner,) = [arg for arg in args if arg is not NoneType]
        return inner, _Shape.OPTIONAL
    if origin is tuple and args[-1] is Ellipsis:
        return args[0], _Shape.REPEATED
    return hint, _Shape.SINGLE


def _message_writer(hint: Any, descriptor: _Descriptor) -> _Write:
    if dataclasses.is_dataclass(hint):
        return _writer(typing.cast(type, hint), descriptor)
    first, second = (field.name for field in descriptor.fields)  # a pair, tuple[A, B]

    def write(pair: Any, proto: Any) -> None:
        setattr(proto, first, pair[0])
        setattr(proto, second, pair[1])

    return write


def _message_reader(hint: Any, descriptor: _Descriptor) -> _Read:
    if dataclasses.is_dataclass(hint):
        return _reader(typing.cast(type, hint), descriptor)
    first, second = (field.name for field in descriptor.fields)
    return lambda proto: (getattr(proto, first), getattr(proto, second))


def _to_wire(hint: Any, field: _Descriptor) -> Callable[[Any], Any]:
    if field.enum_type is None:
        return _unchanged
    return _enum_numbers(hint, field.enum_type).__getitem__


def _from_wire(hint: Any, field: _Descriptor) -> Callable[[Any], Any]:
    if field.enum_type is None:
        return _unchanged
    return _enum_reader(hint, field.enum_type)


def _unchanged(value: Any) -> Any:
    return value


def _enum_numbers(kind: type[StrEnum], descriptor: _Descriptor) -> dict[Any, int]:
    """Number of each member; members and values are matched by name. Raises KeyError when one is missing."""
    prefix = _snake_case(kind.__name__).upper()
    return {member: descriptor.values_by_name[f"{prefix}_{member.name}"].number for member in kind}


def _enum_reader(kind: type[StrEnum], descriptor: _Descriptor) -> Callable[[int], Any]:
    members = {number: member for member, number in _enum_numbers(kind, descriptor).items()}

    def read(number: int) -> Any:
        if number not in members:
            raise ProtocolViolation(f"{kind.__name__} number {number} is not known here")
        return members[number]

    return read


def _snake_case(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).removeprefix("_")


_WRITE_END = _writer(End, common_pb2.End.DESCRIPTOR)
_READ_END = _reader(End, common_pb2.End.DESCRIPTOR)
_WRITE_LOGPROBS = _writer(TokenLogprobs, common_pb2.TokenLogprobs.DESCRIPTOR)
_READ_LOGPROBS = _reader(TokenLogprobs, common_pb2.TokenLogprobs.DESCRIPTOR)
_WRITE_TIMINGS = _writer(RequestTimings, session_pb2.RequestTimings.DESCRIPTOR)
_READ_TIMINGS = _reader(RequestTimings, session_pb2.RequestTimings.DESCRIPTOR)
_FINISH_NUMBERS = _enum_numbers(FinishReason, session_pb2.FinishReason.DESCRIPTOR)
_READ_FINISH = _enum_reader(FinishReason, session_pb2.FinishReason.DESCRIPTOR)

_ENVELOPES = {
    (call, direction): _EnvelopeCodec(envelope, MESSAGE_KINDS[call, direction])
    for call, direction, envelope in (
        (Call.SESSION, Direction.UP, session_pb2.SessionUp),
        (Call.SESSION, Direction.DOWN, session_pb2.SessionDown),
        (Call.WATCH, Direction.UP, watch_pb2.WatchUp),
        (Call.WATCH, Direction.DOWN, watch_pb2.WatchDown),
        (Call.PREFILL, Direction.UP, prefill_pb2.PrefillUp),
        (Call.PREFILL, Direction.DOWN, prefill_pb2.PrefillDown),
    )
}
