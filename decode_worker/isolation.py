"""Requests that may have killed workers run alone, so that the next death says who did it.

A suspect's turn comes when everything older has its blocks. Then nobody else is admitted, what runs may
finish for a while and is sent back to its router after that, and the suspect runs beside nothing. When it has
lived for long enough the others join it. When it ends, all who waited go before the next suspect: a stream of
suspects slows a worker down and does not stop it.
"""

from collections.abc import Callable

from decode_worker.request import DecodeRequest, Phase
from decode_worker.room import LiveRequests, Room
from pdserve.contract.messages import Alone
from pdserve.contract.ports import Clock

DRAIN_S = 10.0
"""How long running requests may take to finish before a suspect; then they are sent back."""
NOTICE_S = 0.05
"""Between telling the router that a suspect is alone and its first step, which may be the worker's last."""
ALONE_S = 30.0
"""A suspect that has lived so long alone is no danger for the others any more."""


class Isolation:
    """At most one suspect at a time has the worker, or the next claim to it."""

    def __init__(
        self,
        requests: LiveRequests,
        room: Room,
        clock: Clock,
        preempt: Callable[[DecodeRequest], None],
        computes_for_others: Callable[[], bool],
    ) -> None:
        self._requests = requests
        self._room = room
        self._clock = clock
        self._preempt = preempt
        self._computes_for_others = computes_for_others
        self._next_at = 0.0  # when the drain, the notice or the time alone is over
        self._is_announced = False

    @property
    def suspect(self) -> DecodeRequest | None:
        """Who alone may be admitted; None when there is no such request."""
        return self._room.kept_for

    @property
    def next_at(self) -> float | None:
        """When `advance` has something to do though nothing else happens."""
        return self._next_at if self.suspect is not None else None

    def advance(self) -> None:
        """Do what is due. Called between steps."""
        if self.suspect is not None and self.suspect.ended:
            self._let_others_first()
        if self.suspect is None:
            self._choose()
        if self.suspect is None:
            return
        is_due = self._clock.now() >= self._next_at
        if self.suspect.phase is not Phase.WAITING:
            if is_due:
                self._acquit(self.suspect)
        elif not self._is_announced:
            self._drain(self.suspect, is_due)
        elif is_due:
            self._begin(self.suspect)

    def _choose(self) -> None:
        """The oldest waiting request, if it is to run alone."""
        waiting = self._requests.in_phase(Phase.WAITING)
        if waiting and waiting[0].submit.alone:
            self._room.kept_for = waiting[0]
            self._next_at = self._clock.now() + DRAIN_S
            self._is_announced = False

    def _drain(self, suspect: DecodeRequest, is_due: bool) -> None:
        others = self._others()
        if not others and not self._computes_for_others():
            suspect.sink.answer(Alone(suspect.number, alone=True))
            self._is_announced = True
            self._next_at = self._clock.now() + NOTICE_S
        elif is_due:
            for other in others:
                self._preempt(other)
            self._next_at = self._clock.now() + DRAIN_S

    def _others(self) -> list[DecodeRequest]:
        """Who holds more than pins."""
        return [
            request
            for request in self._requests
            if request is not self.suspect and request.phase is not Phase.WAITING
        ]

    def _begin(self, suspect: DecodeRequest) -> None:
        if self._room.reserve(suspect):
            suspect.start_prefill(self._clock.now())
            self._next_at = self._clock.now() + ALONE_S
        else:  # the blocks of those who have ended come when nothing touches them any more
            self._next_at = self._clock.now() + NOTICE_S

    def _acquit(self, suspect: DecodeRequest) -> None:
        suspect.sink.answer(Alone(suspect.number, alone=False))
        self._let_others_first()

    def _let_others_first(self) -> None:
        self._room.kept_for = None
        for request in self._requests.in_phase(Phase.WAITING):
            if request.submit.alone:
                self._requests.put_last(request)
