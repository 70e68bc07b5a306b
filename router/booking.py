"""One attempt on the books of its workers."""

from pdserve.contract.ids import SubmitNumber
from router.bookings import Booked
from router.fleet import Fleet
from router.placement.policy import Placement


class Booking:
    """Its tokens count there from its submission to its end."""

    def __init__(self, fleet: Fleet, placement: Placement, num_tokens: int, number: SubmitNumber) -> None:
        self._fleet = fleet
        computes = placement.prefill is None
        to_compute = placement.num_to_compute
        booked = Booked(to_compute if computes else 0, num_tokens, number)
        self._decode = fleet.book(placement.decode, self, booked)
        self._prefill = None
        if placement.prefill is not None:
            self._prefill = fleet.book(placement.prefill, self, Booked(to_compute, 0))
        self._computing = True

    def prefill_is_done(self) -> None:
        """The first token is there: the prompt has been worked off."""
        if not self._computing:
            return
        self._computing = False
        if self._prefill is None:
            self._fleet.prefill_is_done(self._decode, self)
        else:
            self._fleet.release(self._prefill, self)

    def clear(self) -> None:
        self.prefill_is_done()
        self._fleet.release(self._decode, self)
