"""How fast KV travels between workers, learnt from what decode workers tell of each request. Pure."""

from dataclasses import dataclass

from pdserve.contract.ids import WorkerId
from pdserve.contract.messages import RequestTimings
from router.placement.policy import KvSpeeds

FIRST_GUESS_S_PER_BYTE = 1e-9
"""Before anything has travelled: 1 GB/s, what gRPC reaches between processes of one host."""
_FIRST_GUESS_BYTES = 1_000_000
"""How much the guess counts against what was measured."""
_DECAY = 0.9
"""A transfer's weight after the next of its pair."""


@dataclass(slots=True)
class _Sum:
    seconds: float = FIRST_GUESS_S_PER_BYTE * _FIRST_GUESS_BYTES
    num_bytes: float = _FIRST_GUESS_BYTES

    @property
    def s_per_byte(self) -> float:
        return self.seconds / self.num_bytes

    def add(self, seconds: float, num_bytes: int) -> None:
        self.seconds = _DECAY * self.seconds + seconds
        self.num_bytes = _DECAY * self.num_bytes + num_bytes


class KvTravel:
    """Of all pairs that one router has used."""

    def __init__(self) -> None:
        self._bytes_per_token = 0.0
        self._all = _Sum()
        self._pairs: dict[tuple[WorkerId, WorkerId], _Sum] = {}  # (prefill, decode) ->
        self._s_per_token: dict[tuple[WorkerId, WorkerId], float] = {}
        self.speeds = KvSpeeds()
        """As measured until now."""

    def set_size(self, bytes_per_token: float) -> None:
        """How many bytes of KV one token has."""
        if bytes_per_token != self._bytes_per_token:
            self._bytes_per_token = bytes_per_token
            for pair in self._pairs:
                self._tell(pair)
            self._tell_all()

    def note(self, prefill: WorkerId, decode: WorkerId, timings: RequestTimings) -> None:
        """A prompt's KV has come."""
        if not timings.transfer_bytes or not timings.transfer_is_whole:
            return
        pair = (prefill, decode)
        for measured in (self._all, self._pairs.setdefault(pair, _Sum())):
            measured.add(timings.transfer_s, timings.transfer_bytes)
        self._tell(pair)
        self._tell_all()

    def forget(self, gone: WorkerId) -> None:
        """It is no member any more."""
        for pair in [pair for pair in self._pairs if gone in pair]:
            del self._pairs[pair], self._s_per_token[pair]

    def _tell(self, pair: tuple[WorkerId, WorkerId]) -> None:
        self._s_per_token[pair] = self._pairs[pair].s_per_byte * self._bytes_per_token

    def _tell_all(self) -> None:
        self.speeds = KvSpeeds(self._all.s_per_byte * self._bytes_per_token, self._s_per_token)
