"""One attempt on the books of its workers."""

from collections.abc import Sequence

from pdserve.contract.ids import BlockHash, SubmitNumber
from pdserve.contract.messages import RequestTimings
from router.bookings import Booked
from router.fleet import Fleet, WorkerView
from router.placement.policy import Placement


class Booking:
    """Its tokens count there from its submission to its end."""

    def __init__(
        self,
        fleet: Fleet,
        placement: Placement,
        num_tokens: int,
        number: SubmitNumber,
        names: Sequence[BlockHash],
    ) -> None:
        """`names` are those of the prompt's blocks that caches may have."""
        self._fleet = fleet
        to_compute = placement.num_to_compute
        here = to_compute if placement.prefill is None else 0
        receives = placement.prefill is not None
        self._decode = fleet.book(placement.decode, self, Booked(here, num_tokens, number), names, receives)
        self._prefill: WorkerView | None = None
        if placement.prefill is not None:
            self._prefill = fleet.book(placement.prefill, self, Booked(to_compute, 0), names)
        self._computing = True
        self._traveling = receives

    def prefill_is_done(self) -> None:
        """The first token is there: the prompt has been worked off."""
        if not self._computing:
            return
        self._computing = False
        self._fleet.prefill_is_done(self._prefill or self._decode, self)
        if self._prefill is not None:
            self._fleet.release(self._prefill, self)

    def kv_has_come(self, timings: RequestTimings) -> None:
        """What the workers tell of the KV's way; counts once, when it is whole."""
        if self._traveling and self._prefill is not None and timings.transfer_is_whole:
            self._traveling = False
            self._fleet.kv_has_come(self._prefill, self._decode, self, timings)

    def clear(self) -> None:
        """The attempt has ended, however."""
        if self._prefill is not None:
            self._fleet.release(self._prefill, self)
        self._fleet.release(self._decode, self)
