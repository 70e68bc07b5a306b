"""Clients: each asks for one answer, compares what it reads with the single process's, and ends once."""

import asyncio
from contextlib import aclosing
from enum import StrEnum

from pdserve.contract.errors import ClientTooSlow, DeadlineExceeded, PdserveError, Poisonous
from pdserve.contract.ids import RequestId
from pdserve.contract.tokens import unpack_tokens
from router.requests import OutputDelta
from router.unread import Unread
from tests.simulation.coverage import Stage
from tests.simulation.scenario import Asked
from tests.simulation.system import Desk, SimulatedSystem

DEATHS_OF_THE_CONDEMNED = 3
"""Faults strike whom they like: who has lost its worker so often, and alone at last, looks poisonous."""


class Outcome(StrEnum):
    FINISHED = "finished"
    LEFT = "client left"
    DEADLINE = "deadline"
    TOO_SLOW = "client too slow"
    CONDEMNED = "condemned"
    ROUTER_LOST = "router lost"
    FAILED = "failed"


class Client:
    """Asks again at another router when its own dies, from the beginning."""

    def __init__(self, index: int, asked: Asked, expected: list[int], system: SimulatedSystem) -> None:
        self.name = f"client-{index}"
        self.asked = asked
        self.is_live = False
        self.router: str | None = None
        self.request_id: RequestId | None = None
        self.outcome: Outcome | None = None
        self._expected = expected
        self._system = system
        self._output: list[int] = []
        self._finished = False
        self._left = False
        self._error: PdserveError | None = None
        self._streaming_attempt = 0
        self._reader: asyncio.Task[None] | None = None

    @property
    def _num_attempts(self) -> int:
        attempt = None if self.request_id is None else self._system.network.attempts.get(self.request_id)
        return 0 if attempt is None else attempt.submit.attempt

    @property
    def stage(self) -> Stage:
        """Where the request is at its router."""
        network = self._system.network
        attempt = None if self.request_id is None else network.attempts.get(self.request_id)
        if attempt is None or not network.is_live(attempt):
            return Stage.WAITING
        is_streaming = attempt.submit.attempt == self._streaming_attempt
        return Stage.STREAMING if is_streaming else Stage.SUBMITTED

    async def run(self) -> Outcome:
        """Until it has all, or leaves, or is told that there will be no more."""
        await asyncio.sleep(self.asked.at_s)
        self.is_live = True
        outcome = Outcome.ROUTER_LOST
        while outcome is Outcome.ROUTER_LOST:
            outcome = await self._ask(await self._desk())
        self.is_live = False
        self.outcome = outcome
        self._system.log.note("end", self.name, outcome.value, str(len(self._output)))
        return outcome

    def leave(self) -> None:
        """Close the connection; the router notices when it runs."""
        self._left = True
        if self._reader is not None and self.router is not None:
            self._system.network.happen(self.router, self._reader.cancel)

    async def _desk(self) -> Desk:
        """The router of its choice, or another while that is away."""
        system = self._system
        while not system.desks:
            system.desks_changed.clear()
            await system.desks_changed.wait()
        wanted = f"router-{self.asked.router}"
        return system.desks.get(wanted) or next(iter(system.desks.values()))

    async def _ask(self, desk: Desk) -> Outcome:
        await self._reach(desk)
        if self._left:
            return Outcome.LEFT
        if desk.dead:
            return Outcome.ROUTER_LOST
        self.router, self.request_id = desk.name, desk.router.new_request_id()
        self._output, self._finished, self._streaming_attempt, self._error = [], False, 0, None
        self._system.network.outputs[self.request_id] = self._output
        self._system.log.note("ask", self.name, desk.name, self.request_id)
        unread = Unread(1, self.asked.max_unread_tokens)
        reader = self._reader = asyncio.ensure_future(self._read(desk, self.request_id, unread))
        reader.add_done_callback(lambda _: unread.end(self._error))
        desk.when_dead.append(reader.cancel)
        try:
            await self._take(unread)
        except PdserveError as error:
            return self._judge(error)
        finally:
            if self._system.failures:
                reader.cancel()  # the run is over
            await asyncio.gather(reader, return_exceptions=True)
            desk.when_dead.remove(reader.cancel)
            self._reader = None
        return self._ended(desk)

    async def _reach(self, desk: Desk) -> None:
        """A frozen router lets its clients wait."""
        reached: asyncio.Future[None] = self._system.loop.create_future()
        self._system.network.happen(desk.name, lambda: reached.set_result(None))
        await reached

    async def _read(self, desk: Desk, request_id: RequestId, unread: Unread) -> None:
        """At the router, as `router.choices` does it: never waits for the client."""
        try:
            async with aclosing(desk.router.generate(request_id, self.asked.request)) as deltas:
                async for delta in deltas:
                    self._compare(delta, desk)
                    unread.put(0, delta)
        except PdserveError as error:
            self._error = error

    def _compare(self, delta: OutputDelta, desk: Desk) -> None:
        if desk.dead:
            return
        tokens = unpack_tokens(delta.tokens)
        self._system.log.note("tokens", self.name, str(len(self._output)), str(tokens))
        if self._finished:
            self._system.fail(f"{self.name} got tokens after the last one")
        self._output += tokens
        if self._output != self._expected[: len(self._output)]:
            self._system.fail(
                f"{self.name} got {self._output} where {self._expected} is right ({self.request_id})"
            )
        if delta.finish is not None:
            self._finished = True
            if len(self._output) != len(self._expected):
                self._system.fail(f"{self.name} was finished after {len(self._output)} tokens")
        self._streaming_attempt = self._num_attempts

    async def _take(self, unread: Unread) -> None:
        while await unread.take() is not None:
            if self.asked.read_pause_s:
                await asyncio.sleep(self.asked.read_pause_s)

    def _judge(self, error: PdserveError) -> Outcome:
        if isinstance(error, DeadlineExceeded) and self.asked.request.deadline_s is not None:
            return Outcome.DEADLINE
        if isinstance(error, ClientTooSlow) and self.asked.read_pause_s:
            return Outcome.TOO_SLOW
        if isinstance(error, Poisonous) and self._num_attempts >= DEATHS_OF_THE_CONDEMNED:
            return Outcome.CONDEMNED
        self._system.fail(f"{self.name} ({self.request_id}) got {type(error).__name__}: {error}")
        return Outcome.FAILED

    def _ended(self, desk: Desk) -> Outcome:
        if self._finished:
            return Outcome.FINISHED
        if self._left:
            return Outcome.LEFT
        if desk.dead:
            return Outcome.ROUTER_LOST
        self._system.fail(f"{self.name} ({self.request_id}) ended without a reason")
        return Outcome.FAILED
