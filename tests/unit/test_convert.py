"""Every message that may travel arrives as it was, and nothing that arrives makes a decoder stumble."""

import functools
import typing
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.contract.errors import ProtocolViolation
from pdserve.contract.ids import BlockHash, Incarnation, RequestId, RouterId, SubmitNumber, WorkerId
from pdserve.contract.messages import End, Frame, Message, SessionOpen, TokenEvent
from pdserve.contract.ports import Call
from pdserve.contract.tokens import pack_tokens
from pdserve.rpc.convert import Codec, codec_for
from pdserve.rpc.stream import MESSAGE_KINDS, Direction
from pdserve.rpc.v1 import session_pb2, watch_pb2

UINT32 = st.integers(0, 2**32 - 1)
UINT64 = st.integers(0, 2**64 - 1)
DOUBLE = st.floats(allow_nan=False)
TOKENS = st.lists(UINT32, max_size=5).map(pack_tokens)

BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    int: UINT32,
    float: DOUBLE,
    bool: st.booleans(),
    str: st.text(),
    bytes: st.binary(),
    tuple[int, float]: st.tuples(UINT32, DOUBLE),
    RequestId: st.text(),
    RouterId: st.text(),
    WorkerId: st.text(),
    Incarnation: st.integers(0, 2**63 - 1),
    SubmitNumber: UINT64,
    BlockHash: UINT64,
}
BY_NAME = {
    "tokens": TOKENS,
    "digest": UINT64,
    "xor_names": UINT64,
    "seed": UINT64,
    "block_bytes": UINT64,
    "num_bytes": UINT64,
    "priority": st.integers(-(2**31), 2**31),
}
DIRECTED = [(call, direction) for call, direction in MESSAGE_KINDS if call is not Call.KV]
KINDS = [(call, direction, kind) for call, direction in DIRECTED for kind in MESSAGE_KINDS[call, direction]]


@functools.cache
def instances(kind: Any) -> st.SearchStrategy[Any]:
    """Any value that the type hint `kind` allows."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in BY_TYPE:
        return BY_TYPE[kind]
    if origin in (UnionType, typing.Union):
        return st.none() | instances(next(arg for arg in args if arg is not NoneType))
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(instances(args[0]), max_size=4).map(tuple)
    if origin is tuple:
        return st.tuples(*map(instances, args))
    if issubclass(kind, StrEnum):
        return st.sampled_from(kind)
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{name: BY_NAME.get(name, instances(hint)) for name, hint in hints.items()})


def travel(message: Message, sender: Codec, receiver: Codec) -> list[Message]:
    decoded = [receiver.decode(raw) for raw in sender.encode(message)]
    return [part for part in decoded if part is not None]


@pytest.mark.parametrize(("call", "direction", "kind"), KINDS)
@given(data=st.data())
def test_every_message_arrives_as_it_was(
    call: Call, direction: Direction, kind: type, data: st.DataObject
) -> None:
    message = data.draw(instances(kind))
    codec = codec_for(call, direction)
    arrived = travel(message, codec, codec)
    assert arrived == [message]
    assert repr(arrived) == repr([message])  # 0 and 0.0, 1 and True are equal but not the same


@given(payloads=st.lists(st.binary(min_size=1), max_size=5), end=instances(End))
def test_kv_payloads_are_not_touched_and_end_follows_them(payloads: list[bytes], end: End) -> None:
    sender, receiver = (codec_for(Call.KV, Direction.DOWN) for _ in range(2))
    for payload in payloads:
        (raw,) = sender.encode(payload)
        assert raw is payload
        assert receiver.decode(raw) is payload
    assert travel(end, sender, receiver) == [end]


@pytest.mark.parametrize(("call", "direction"), list(MESSAGE_KINDS))
@given(raw=st.lists(st.binary(), min_size=1, max_size=3))
def test_anything_that_arrives_is_a_message_or_a_violation(
    call: Call, direction: Direction, raw: list[bytes]
) -> None:
    codec = codec_for(call, direction)
    try:
        decoded = [codec.decode(part) for part in raw]
    except ProtocolViolation:
        return
    kinds = (*MESSAGE_KINDS[call, direction], NoneType)
    assert all(type(message) in kinds for message in decoded)


NO_REASON = session_pb2.EventFinish(event=0)


def frame_proto(**columns: Any) -> bytes:
    return session_pb2.SessionDown(frame=session_pb2.Frame(**columns)).SerializeToString()


@pytest.mark.parametrize(
    "raw",
    [
        frame_proto(number=[1, 2], first_index=[0], tokens=bytes(8)),
        frame_proto(number=[1], first_index=[0], tokens=bytes(8)),
        frame_proto(number=[1], first_index=[0], tokens=bytes(6)),
        frame_proto(number=[1], first_index=[0], num_tokens=[1, 1], tokens=bytes(8)),
        frame_proto(tokens=bytes(4)),
        frame_proto(finishes=[session_pb2.EventFinish(event=0, reason="FINISH_REASON_STOP")]),
        frame_proto(number=[1], first_index=[0], tokens=bytes(4), finishes=[NO_REASON]),
        frame_proto(logprobs=[session_pb2.EventLogprobs(event=3)]),
    ],
)
def test_a_frame_whose_columns_do_not_fit_is_a_violation(raw: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        codec_for(Call.SESSION, Direction.DOWN).decode(raw)


def test_a_missing_part_an_unknown_enum_number_and_an_unknown_message_are_violations() -> None:
    down = codec_for(Call.SESSION, Direction.DOWN)
    refused = session_pb2.SessionDown(refused=session_pb2.Refused(number=1))
    with pytest.raises(ProtocolViolation, match=r"Refused\.error is missing"):
        down.decode(refused.SerializeToString())
    refused.refused.error.message = "its code was never set"
    with pytest.raises(ProtocolViolation, match="ErrorCode number 0"):
        down.decode(refused.SerializeToString())
    with pytest.raises(ProtocolViolation, match="not known"):
        down.decode(b"")
    hello = watch_pb2.WatchDown(hello=watch_pb2.Hello())
    with pytest.raises(ProtocolViolation):
        codec_for(Call.WATCH, Direction.DOWN).decode(hello.SerializeToString())


def test_a_value_that_does_not_fit_is_refused_at_the_sender() -> None:
    too_large = SessionOpen(RouterId("router-0"), Incarnation(2**64), Incarnation(0))
    with pytest.raises(ValueError, match="range"):
        codec_for(Call.SESSION, Direction.UP).encode(too_large)


def test_a_frame_costs_few_bytes_per_event() -> None:
    """One of 64 sequences: 4 bytes for the token, 2 for the number, 1 or 2 for the index."""
    events = tuple(TokenEvent(SubmitNumber(1000 + i), 50 + i, pack_tokens([70_000])) for i in range(64))
    (raw,) = codec_for(Call.SESSION, Direction.DOWN).encode(Frame(1, events))
    assert len(raw) <= 64 * 8 + 20
