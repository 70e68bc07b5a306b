"""The router: real admission, fleet, prefix index and placement, without text, streams and clients."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pdserve.contract.block_names import ChainRoot, max_shared_blocks, name_blocks
from pdserve.contract.errors import PdserveError
from pdserve.contract.ids import BlockHash, SubmitNumber, WorkerId
from pdserve.contract.messages import RequestTimings
from pdserve.contract.tokens import slice_tokens
from pdserve.contract.work import ModelInfo
from router.admission import Admission
from router.booking import Booking
from router.bounds import check_length
from router.fleet import Fleet
from router.journey import JourneySettings
from router.output_lengths import OutputLengths
from router.placement.policy import Placement, PlacementPolicy, PlacementRequest
from simulator.attempt import Attempt, Course
from simulator.decode import DecodeWorker
from simulator.events import Events
from simulator.reports import Reports
from simulator.workload import Request


@dataclass(slots=True)
class Progress:
    """One request at the router, as `router.progress.Progress`."""

    course: Course
    names: list[BlockHash]
    num_known: int = 0
    booking: Booking | None = None


@dataclass(slots=True)
class Front:
    """Places requests and takes what comes back."""

    fleet: Fleet
    policy: PlacementPolicy
    admission: Admission
    model: ModelInfo
    root: ChainRoot
    workers: Mapping[WorkerId, DecodeWorker]
    reports: Mapping[WorkerId, Reports]
    message_s: float
    events: Events
    courses: list[Course] = field(default_factory=list)
    inside: dict[int, Progress] = field(default_factory=dict)  # request index -> its progress
    _output_lengths: OutputLengths = field(default_factory=OutputLengths)
    _num_submits: dict[WorkerId, int] = field(default_factory=dict)

    def arrive(self, request: Request) -> None:
        """A client sends a request."""
        course = Course(request)
        self.courses.append(course)
        most_tokens = request.num_prompt + request.num_output
        try:
            check_length(most_tokens, self.model, f"{most_tokens} tokens were asked for")
            self.admission.enter(request.num_prompt)
        except PdserveError as error:
            course.error = f"{error.info.code.value}: {error.info.message}"
            return
        prompt = slice_tokens(
            request.block_ids, 0, max_shared_blocks(request.num_prompt, self.model.block_size)
        )
        progress = Progress(course, name_blocks(prompt, 1, self.root.seed))
        self.inside[request.index] = progress
        self._place(progress)

    # What workers tell.

    def first_token(self, attempt: Attempt) -> None:
        booking = self._booking(attempt)
        if booking is not None:
            booking.prefill_is_done()

    def kv_has_come(self, attempt: Attempt, timings: RequestTimings) -> None:
        booking = self._booking(attempt)
        if booking is not None:
            booking.kv_has_come(timings)

    def finished(self, attempt: Attempt) -> None:
        progress = self.inside.pop(attempt.request.index)
        self._clear_booking(progress)
        self.admission.leave(attempt.request.num_prompt)
        self._output_lengths.note(attempt.request.num_output)

    def preempted(self, attempt: Attempt) -> None:
        """Its tokens are with the client: they are a part of the prompt of the next attempt."""
        progress = self.inside[attempt.request.index]
        self._clear_booking(progress)
        if attempt.left_step is not None:
            progress.num_known = attempt.num_made_at(attempt.left_step)
        elif attempt.first_token_at is not None:
            progress.num_known = attempt.num_known + 1
        self.events.after(JourneySettings().refusal_pause_s, lambda: self._place(progress))

    def _place(self, progress: Progress) -> None:
        request = progress.course.request
        num_tokens = request.num_prompt + progress.num_known
        most_tokens = request.num_prompt + request.num_output
        view = self.fleet.view(progress.names, self.model.block_size, self.events.now)
        expected_tokens = self._output_lengths.expected(most_tokens - num_tokens)
        asked = PlacementRequest(num_tokens, most_tokens, expected_tokens)
        placement = self.policy.choose(asked, view)
        assert placement is not None, "no worker takes a request that the largest pool has room for"
        attempt = self._attempt(progress, placement)
        number = SubmitNumber(attempt.submit_number)
        progress.booking = Booking(self.fleet, placement, num_tokens, number, progress.names)
        self.events.after(self.message_s, lambda: self._arrived(attempt))

    def _attempt(self, progress: Progress, placement: Placement) -> Attempt:
        number = self._num_submits[placement.decode] = self._num_submits.get(placement.decode, 0) + 1
        attempts = progress.course.attempts
        attempt = Attempt(
            request=progress.course.request,
            number=len(attempts) + 1,
            num_known=progress.num_known,
            block_tokens=self.model.block_size,
            prefill=placement.prefill,
            decode=placement.decode,
            submit_number=number,
        )
        attempts.append(attempt)
        return attempt

    def _arrived(self, attempt: Attempt) -> None:
        """At its decode worker."""
        self.workers[attempt.decode].submit(attempt)
        self.reports[attempt.decode].wake()
        if attempt.prefill is not None:
            self.reports[attempt.prefill].wake()

    def _booking(self, attempt: Attempt) -> Booking | None:
        """Of an attempt that has not ended; what comes later concerns nobody."""
        progress = self.inside.get(attempt.request.index)
        if progress is None or progress.course.attempts[-1] is not attempt:
            return None
        return progress.booking

    def _clear_booking(self, progress: Progress) -> None:
        if progress.booking is not None:
            progress.booking.clear()
            progress.booking = None
