"""What the two ends of a process group's link say to each other on its Kv stream, and its form there.

```
decode worker                                      source
Hello, Build{generation}    -------------------->
           Entry{key, value} of the rendezvous, in both directions
Begin{transfer}             -------------------->
Want{transfer, sequence}    -------------------->  by group: the bytes leave through it, in order of the Wants
                            <--------------------  else Pieces{count}, and so many messages of bare bytes
                            <--------------------  Gone: nothing of that transfer is here any more
Echo{number}                -------------------->  answered by the same, behind any Gone said before
Leave{transfer}             -------------------->
           Dropped{generation}: the group is of no use any more, in both directions
```

A message is a JSON list of its name and its fields. Bare bytes follow Pieces only, so the two are never
mixed up.
"""

import json
import typing
from dataclasses import astuple, dataclass, fields

from pdserve.contract.errors import ProtocolViolation

NO_GROUP = 0
"""As a generation: by the stream, not by a group."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The greeting of the stream."""

    host: str
    """The address of the decode worker that the source can reach."""


@dataclass(frozen=True, slots=True)
class Build:
    """Make a group. The generation grows with every attempt of a link."""

    generation: int


@dataclass(frozen=True, slots=True)
class Entry:
    """What one rank has set in the rendezvous store."""

    generation: int
    key: str
    value: str
    """In hexadecimal."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """The group of this generation has failed, could not be made or is closed."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Begin:
    """The decode worker is here for a transfer."""

    transfer: str


@dataclass(frozen=True, slots=True)
class Want:
    """Send the segment that was the `sequence`th of its transfer, from its `first_piece`th piece on."""

    transfer: str
    sequence: int
    first_piece: int
    sizes: list[int]
    """Bytes of those pieces."""
    generation: int
    """Of the group that is to carry it; NO_GROUP: this stream."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """The next `count` messages are pieces of that segment."""

    transfer: str
    sequence: int
    count: int


@dataclass(frozen=True, slots=True)
class Gone:
    """The segment is not here: the transfer has ended. What a group carries for it is filler."""

    transfer: str
    sequence: int


@dataclass(frozen=True, slots=True)
class Echo:
    """Say this back. What a group delivers may overtake the Gone that says that it is filler."""

    number: int


@dataclass(frozen=True, slots=True)
class Leave:
    """The decode worker needs nothing more of a transfer."""

    transfer: str


LinkMessage = Hello | Build | Entry | Dropped | Begin | Want | Pieces | Gone | Echo | Leave

_KINDS: dict[str, type[LinkMessage]] = {kind.__name__: kind for kind in typing.get_args(LinkMessage)}


def encode(message: LinkMessage) -> bytes:
    return json.dumps([type(message).__name__, *astuple(message)]).encode()


def decode(raw: object) -> LinkMessage:
    """Raises ProtocolViolation for anything that `encode` would not have made."""
    try:
        if not isinstance(raw, bytes):
            raise ValueError(f"{type(raw).__name__} is not bytes")
        name, *values = json.loads(raw)
        kind = _KINDS[name]
        if not _fit(values, [field.type for field in fields(kind)]):
            raise ValueError(f"{name} has other fields")
        return kind(*values)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProtocolViolation(f"not a message of a process group's link ({error})") from None


def _fit(values: list[object], types: list[object]) -> bool:
    return len(values) == len(types) and all(map(_is_of, values, types))


def _is_of(value: object, expected: object) -> bool:
    if expected == list[int]:
        return isinstance(value, list) and all(type(item) is int for item in value)
    return type(value) is expected
