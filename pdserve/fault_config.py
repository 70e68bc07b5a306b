"""Faults to rehearse: what a process is to suffer at which event, and which of them go together."""

from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from pdserve.config_values import Positive, PositiveSeconds, Section
from pdserve.contract.messages import Message
from pdserve.contract.ports import Call

MESSAGE_NAMES = tuple("Kv" if kind is bytes else kind.__name__ for kind in get_args(Message))
"""What travels between processes, by the names that `faults` uses; Kv is a piece of KV bytes."""
FaultAction = Literal[
    "kill", "freeze", "delay", "hang", "fail", "break", "cut", "corrupt", "lose", "repeat", "swap"
]
_AT_ANY_MESSAGE: tuple[FaultAction, ...] = ("kill", "freeze", "delay", "break", "cut")
_ACTIONS_AT: Mapping[str, tuple[FaultAction, ...]] = {
    "now": ("kill", "freeze"),
    "step": ("kill", "freeze", "delay", "hang", "fail"),
    "sent": _AT_ANY_MESSAGE,
    "received": (*_AT_ANY_MESSAGE, "corrupt", "lose", "repeat", "swap"),
}


def _check_event(value: str) -> str:
    """Raises ValueError when no process has such an event."""
    kind, _, message = value.partition(" ")
    if value not in ("now", "step") and (kind not in ("sent", "received") or message not in MESSAGE_NAMES):
        raise ValueError(
            f"{value!r} is no event: write now, step, or sent or received and one of "
            f"{', '.join(MESSAGE_NAMES)}"
        )
    return value


class FaultConfig(Section):
    """Faults that processes are to suffer, for rehearsals: [game days](game-days.md) has the events, the
    actions and which go together. Refused unless `pdserve up --allow-faults`."""

    process: Annotated[str, Field(pattern=r"^(router|prefill|decode|unsplit)(-\d+)?$")]
    """Which process, for example `decode-0`; a pool (`decode`) means each of its processes."""
    at: Annotated[str, AfterValidator(_check_event)]
    """The event: `sent` or `received` and a message's name, for example `sent Reserved`; `step`; or `now`,
    once it serves."""
    do: FaultAction
    """What happens then."""
    nth: Positive = 1
    """The event's number in that process from which on it happens."""
    count: Positive = 1
    """At how many such events in a row it happens."""
    seconds: PositiveSeconds | None = None
    """How long a `delay` or a `cut` lasts, which need it, or a `freeze` or a `hang`; those have no end of
    their own without it."""
    stream: Call | None = None
    """Messages: only those of this kind of stream. Empty: of all."""
    token: Annotated[int, Field(ge=0)] | None = None
    """`step`: only steps that compute this token, as those of one poisonous prompt. Empty: all."""
    in_replacements: bool = False
    """Also in the processes that replace those that died."""

    def is_for(self, process_id: str) -> bool:
        """Whether the process of that id (`decode-0`) is to suffer it."""
        return self.process in (process_id, process_id.rpartition("-")[0])

    @model_validator(mode="after")
    def _action_fits_event(self) -> "FaultConfig":
        kind, _, message = self.at.partition(" ")
        if self.do not in _ACTIONS_AT[kind]:
            allowed = ", ".join(_ACTIONS_AT[kind])
            raise ValueError(f"do: {self.do} cannot happen at {self.at!r}: allowed there are {allowed}")
        if self.do == "corrupt" and message not in ("Segment", "Kv"):
            raise ValueError(
                "do: corrupt is for what carries KV: at must be 'received Segment' or 'received Kv'"
            )
        if self.seconds is None and self.do in ("delay", "cut"):
            raise ValueError(f"do: {self.do} needs seconds: how long it lasts")
        if self.seconds is not None and self.do not in ("delay", "cut", "freeze", "hang"):
            raise ValueError(f"do: {self.do} takes no seconds: leave them out")
        if self.token is not None and self.at != "step":
            raise ValueError("token is for at: step: leave it out")
        if self.stream is not None and not message:
            raise ValueError("stream is for at: sent or received: leave it out")
        return self
