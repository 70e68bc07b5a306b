"""What the values of a configuration may be, and what all of its sections have in common."""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)
_PORTS = re.compile(r"(\d{1,5})-(\d{1,5})")
_LAST_PORT = 65535
_LARGEST_SHARE = 0.95


def parse_bytes(value: object) -> object:
    """``512MiB``, ``2GB`` or a number of bytes. Raises ValueError for anything else."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not a size: write for example 512MiB, 2GiB or 1000000")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def _parse_kv_memory(value: object) -> object:
    """``auto``, bytes as an int, or a fraction as a float. Raises ValueError for anything else."""
    parsed = value if value == "auto" else parse_bytes(value)
    is_size = isinstance(parsed, int) and not isinstance(parsed, bool) and parsed > 0
    if parsed != "auto" and not is_size and not (isinstance(parsed, float) and 0 < parsed <= _LARGEST_SHARE):
        raise ValueError(f"write auto, a size such as 512MiB, or a fraction up to {_LARGEST_SHARE}")
    return parsed


def _parse_ports(value: object) -> object:
    """``30000-30999`` -> (30000, 30999)."""
    if not isinstance(value, str):
        return value
    match = _PORTS.fullmatch(value.strip())
    if match is None or not 0 < int(match[1]) <= int(match[2]) <= _LAST_PORT:
        raise ValueError(f"{value!r} is not a range of ports: write for example 30000-30999")
    return (int(match[1]), int(match[2]))


Port = Annotated[int, Field(ge=0, le=_LAST_PORT)]
Positive = Annotated[int, Field(ge=1)]
PositiveSeconds = Annotated[float, Field(gt=0)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=1)]
KvMemory = Annotated[Literal["auto"] | int | float, BeforeValidator(_parse_kv_memory)]
PortRange = Annotated[tuple[Port, Port], BeforeValidator(_parse_ports)]


class Section(BaseModel):
    """Frozen; its keys are described where they are declared; others are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
