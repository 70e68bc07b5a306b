"""What a router has sent to one worker and is not done yet, and how that adds to its own reports. Pure.

A worker's report covers what came up to its `last_submit`. What was sent since is added to it. Requests and
their context that were sent before may be missing in it all the same, because a decode worker does not report
prompts that are still computed elsewhere; so the larger of report and books counts of these. Prompt tokens
that are still to be computed are in the report, and fewer with every step; so it alone counts, but for the
newest prompts of a prefill worker: they come there by way of decode workers and may have missed one report.
"""

from collections.abc import Iterator
from typing import NamedTuple

from pdserve.contract.ids import SubmitNumber


class Booked(NamedTuple):
    """What one attempt has sent to a worker."""

    prefill_tokens: int
    """Prompt tokens that it is to compute."""
    context_tokens: int
    """Tokens of KV that it is to hold for a sequence that decodes there; 0 at a prefill worker."""
    number: SubmitNumber | None = None
    """Of the Submit that a decode worker got; a prefill worker hears of the attempt from that worker."""


class Sum(NamedTuple):
    """Of several bookings."""

    requests: int = 0
    prefill_tokens: int = 0
    context_tokens: int = 0

    def plus(self, booked: Booked) -> "Sum":
        return Sum(
            self.requests + 1,
            self.prefill_tokens + booked.prefill_tokens,
            self.context_tokens + booked.context_tokens,
        )

    def minus(self, booked: Booked) -> "Sum":
        return Sum(
            self.requests - 1,
            self.prefill_tokens - booked.prefill_tokens,
            self.context_tokens - booked.context_tokens,
        )


class Bookings:
    """Attempt -> what of it was sent to one worker."""

    def __init__(self) -> None:
        self._booked: dict[object, Booked] = {}
        self._last_submit = 0
        self._total = Sum()
        self._unreported = Sum()  # sent after the last report
        # Attempt -> prompt tokens, of those without a number that were sent after the last report, and of
        # those that were sent between the last two.
        self._newest: dict[object, int] = {}
        self._newer: dict[object, int] = {}

    def __len__(self) -> int:
        return len(self._booked)

    def __iter__(self) -> Iterator[object]:
        return iter(self._booked)

    def add(self, attempt: object, booked: Booked) -> None:
        self._booked[attempt] = booked
        self._total = self._total.plus(booked)
        if booked.number is None:
            self._newest[attempt] = booked.prefill_tokens
        elif self._is_unreported(booked):
            self._unreported = self._unreported.plus(booked)

    def prefill_is_done(self, attempt: object) -> None:
        """The prompt of an attempt has been computed here."""
        booked = self._booked.get(attempt)
        if booked is not None and booked.prefill_tokens:
            self.drop(attempt)
            self.add(attempt, booked._replace(prefill_tokens=0))

    def drop(self, attempt: object) -> None:
        """An attempt is over, or was never here."""
        booked = self._booked.pop(attempt, None)
        if booked is not None:
            self._total = self._total.minus(booked)
            self._newest.pop(attempt, None)
            self._newer.pop(attempt, None)
            if self._is_unreported(booked):
                self._unreported = self._unreported.minus(booked)

    def reported(self, last_submit: SubmitNumber) -> None:
        """A report has come that covers all Submits up to this one."""
        self._last_submit = last_submit
        self._newest, self._newer = {}, self._newest
        self._unreported = Sum()
        for booked in self._booked.values():
            if self._is_unreported(booked):
                self._unreported = self._unreported.plus(booked)

    def with_report(self, reported: Sum) -> Sum:
        """What the worker has to do, when it has reported so much."""
        total, since = self._total, self._unreported
        return Sum(
            max(reported.requests + since.requests, total.requests),
            max(reported.prefill_tokens, sum(self._newer.values()))
            + since.prefill_tokens
            + sum(self._newest.values()),
            max(reported.context_tokens + since.context_tokens, total.context_tokens),
        )

    def check_integrity(self) -> None:
        """Raises AssertionError unless the sums are those of the bookings."""
        total, since = Sum(), Sum()
        for booked in self._booked.values():
            total = total.plus(booked)
            if self._is_unreported(booked):
                since = since.plus(booked)
        assert (total, since) == (self._total, self._unreported), "booked sums do not add up"

    def _is_unreported(self, booked: Booked) -> bool:
        return booked.number is not None and booked.number > self._last_submit
