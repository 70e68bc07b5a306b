"""The system under simulation: two routers, three prefill and three decode workers, and their caretaker."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from controller.worker import Worker, WorkerSettings
from decode_worker.loop import DecodeLoop
from decode_worker.request import DecodeRequest
from pdserve.clock import SeededRng
from pdserve.contract.errors import EngineBroken
from pdserve.contract.ids import Incarnation, RouterId, WorkerId
from pdserve.contract.messages import Members, Role
from pdserve.engine.fake_engine import FakeEngine
from pdserve.handoff.prefill_job import PrefillJob
from pdserve.handoff.sending import SendingSettings
from pdserve.rpc.memory_rpc import MemoryRpc
from router.journey import JourneySettings
from router.router import Router, RouterSettings
from tests.simulation import invariants
from tests.simulation.events import EventLog
from tests.simulation.hosts import EngineFailure, HostClock, SimulatedExecutor
from tests.simulation.network import SimulatedNetwork, Try
from tests.simulation.scenario import BLOCK_SIZE, EOS_TOKENS, Scenario

ROUTERS = ("router-0", "router-1")
PREFILL = ("prefill-0", "prefill-1", "prefill-2")
DECODE = ("decode-0", "decode-1", "decode-2")

MAX_EVENTS = 100_000
"""Far above what a run needs."""

CANCEL_S = 0.02
"""A Cancel that nothing holds up has arrived after this time."""

HUNG_S = 1.0
"""After so long a process whose engine hangs is mostly ended from outside, so that runs are short."""

WATCHDOG_SHARE = 0.15
"""Of hung engines that are left to the worker's own watchdog."""


@dataclass(eq=False)
class Machine:
    """A worker's process."""

    name: str
    worker: Worker
    engine: FakeEngine
    executor: SimulatedExecutor


@dataclass(eq=False)
class Desk:
    """A router's process."""

    name: str
    router: Router
    dead: bool = False
    when_dead: list[Callable[[], object]] = field(default_factory=list)
    """Of those who talk to it."""


class SimulatedSystem:
    """Use inside `run_virtual`. What goes wrong is kept in `failures`; `failed` is set with the first."""

    def __init__(self, scenario: Scenario, random: Random, log: EventLog) -> None:
        self.scenario = scenario
        self.random = random
        self.log = log
        self.loop = asyncio.get_running_loop()
        self.network = SimulatedNetwork(random, scenario.latency_s, log)
        self.network.before_event = self._check_before
        self.network.violated = self.fail
        self.network.incarnation_of = self._incarnation_of
        self.machines: dict[str, Machine] = {}
        self.desks: dict[str, Desk] = {}
        self.desks_changed = asyncio.Event()
        self.failures: list[str] = []
        self.failed = asyncio.Event()
        self.preempted: Callable[[DecodeRequest], None] = lambda request: None
        self.caretaker = Caretaker(self)
        self._background: dict[asyncio.Task[None], None] = {}
        self._num_ongoing = 0  # faults that end by themselves, later

    async def start(self) -> None:
        for name in ROUTERS:
            self.start_router(name)
        for name in (*PREFILL, *DECODE):
            await self.start_worker(name)
        for known_from_s in sorted({self.scenario.members_from_s, self.scenario.prefill_from_s}):
            self.loop.call_later(known_from_s, self.caretaker.push)

    def start_router(self, name: str) -> None:
        settings = RouterSettings(journey=JourneySettings(queue_timeout_s=30.0))
        rpc, clock = MemoryRpc(self.network, name), HostClock(self.network, name)
        self.desks[name] = Desk(name, Router(RouterId(name), rpc, clock, self._rng(), settings))
        self.desks_changed.set()
        self.log.note("start", name)

    async def start_worker(self, name: str) -> None:
        scenario, clock = self.scenario, HostClock(self.network, name)
        engine = FakeEngine(scenario.num_blocks, block_size=BLOCK_SIZE, eos_token_ids=EOS_TOKENS)
        executor = SimulatedExecutor(
            engine, clock, self.random, scenario.late_s, lambda: self._check_after_step(name)
        )
        worker = Worker(
            WorkerId(name),
            Role.PREFILL if name in PREFILL else Role.DECODE,
            engine,
            executor,
            MemoryRpc(self.network, name),
            clock,
            self._rng(),
            self._worker_settings(engine.info.block_bytes),
        )
        self._note_preemptions(worker)
        await worker.start(f"{name}:1")
        machine = self.machines[name] = Machine(name, worker, engine, executor)
        self.in_background(self._until_it_fails(machine))
        self.log.note("start", name)

    # What faults do.

    def kill(self, name: str) -> None:
        """As SIGKILL. The caretaker puts a new process in its place."""
        if name in self.desks:
            self._kill_router(self.desks.pop(name))
        elif name in self.machines:
            self._kill_worker(self.machines.pop(name))

    def freeze(self, name: str, seconds: float, resumed: Callable[[], None]) -> None:
        process = self.process(name)
        if process is None or self.network.is_frozen(name):
            return
        self.network.freeze(name)

        def thaw() -> None:
            if self.process(name) is process:
                self.log.note("thaw", name)
                resumed()
                self.network.thaw(name)

        self._later(seconds, thaw)

    def hang(self, name: str) -> None:
        machine = self.machines[name]
        machine.executor.hang()
        if self.random.random() >= WATCHDOG_SHARE:
            self._later(HUNG_S, lambda: self._kill_if_same(machine))

    def cut(self, one: str, other: str, seconds: float, healed: Callable[[], None]) -> None:
        self.network.cut(one, other)

        def heal() -> None:
            self.log.note("heal", one, other)
            healed()
            self.network.heal(one, other)

        self._later(seconds, heal)

    def slow_copies(self, name: str, seconds: float) -> None:
        executor = self.machines[name].executor
        executor.copy_s = 0.03
        self._later(seconds, lambda: setattr(executor, "copy_s", 0.0))

    # What is there.

    def process(self, name: str) -> Machine | Desk | None:
        return self.machines.get(name) or self.desks.get(name)

    def decode_requests(self, name: str) -> list[DecodeRequest]:
        """Live ones of a worker, oldest first."""
        machine = self.machines.get(name)
        if machine is None or not isinstance(machine.worker.loop, DecodeLoop):
            return []
        return list(machine.worker.loop._requests)

    def jobs(self, name: str) -> list[PrefillJob]:
        """Open Prefill calls that a worker serves, oldest first."""
        machine = self.machines.get(name)
        return [] if machine is None else machine.worker.calls.jobs

    # How it ends.

    def fail(self, what: str) -> None:
        """Something that must never happen has happened."""
        self.log.note("FAILURE", what)
        self.failures.append(what)
        self.failed.set()

    def leftovers(self) -> Iterator[str]:
        """What would not be there if the system were whole and at rest."""
        workers = [machine.worker for machine in self.machines.values()]
        if len(workers) < len(PREFILL) + len(DECODE) or len(self.desks) < len(ROUTERS):
            yield "a process is missing"
        if self._num_ongoing or self.caretaker.is_away:
            yield "a fault is not over"
        yield from (f"{machine.name} hangs" for machine in self.machines.values() if machine.executor.hangs)
        for machine in self.machines.values():
            yield from (
                f"{machine.name}: {left}" for left in invariants.left_at(machine.worker, machine.engine)
            )
        for desk in self.desks.values():
            yield from (f"{desk.name}: {left}" for left in invariants.left_in(desk.router, workers))
        yield from (f"open: {stream}" for stream in self.network.open_streams())

    def check_caches(self) -> None:
        for machine in self.machines.values():
            for problem in invariants.wrong_cache(machine.worker, machine.engine):
                self.fail(problem)

    async def stop(self) -> None:
        for desk in self.desks.values():
            desk.dead = True
            await desk.router.close()
        for machine in self.machines.values():
            await machine.worker.stop()
        await asyncio.gather(*self._background)

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background[task] = None
        task.add_done_callback(self._background.pop)

    def _later(self, seconds: float, end: Callable[[], None]) -> None:
        """A fault ends later; until then the system is not at rest."""
        self._num_ongoing += 1

        def end_it() -> None:
            self._num_ongoing -= 1
            end()

        self.loop.call_later(seconds, end_it)

    def _worker_settings(self, block_bytes: int) -> WorkerSettings:
        sending = SendingSettings(
            window_segments=self.scenario.window_segments,
            max_segment_bytes=self.scenario.max_segment_blocks * block_bytes,
            answer_timeout_s=2.0,
        )
        return WorkerSettings(sending=sending, transports=("grpc",))

    def _rng(self) -> SeededRng:
        return SeededRng(self.random.getrandbits(64))

    def _note_preemptions(self, worker: Worker) -> None:
        if not isinstance(worker.loop, DecodeLoop):
            return
        room = worker.loop._room
        preempt = room._preempt

        def noted(request: DecodeRequest) -> None:
            self.preempted(request)
            preempt(request)

        room._preempt = noted

    def _kill_router(self, desk: Desk) -> None:
        desk.dead = True
        self.network.kill(desk.name)
        for tell in desk.when_dead:
            tell()
        self.in_background(desk.router.close())
        self.caretaker.replace(desk.name)

    def _kill_worker(self, machine: Machine) -> None:
        self.network.kill(machine.name)
        machine.executor.die()
        self.in_background(self._bury(machine))
        self.caretaker.replace(machine.name)

    def _kill_if_same(self, machine: Machine) -> None:
        if self.machines.get(machine.name) is machine:
            self.log.note("ended", machine.name)
            self.kill(machine.name)

    async def _bury(self, machine: Machine) -> None:
        """The call tree is the lease: also what is left of a dead process gives everything back."""
        await machine.worker.stop()
        for left in invariants.left_at(machine.worker, machine.engine):
            self.fail(f"dead {machine.name}: {left}")

    async def _until_it_fails(self, machine: Machine) -> None:
        try:
            await machine.worker.ended()
        except (EngineBroken, EngineFailure):
            self._kill_if_same(machine)
        except Exception as error:  # noqa: BLE001
            self.fail(f"the loop of {machine.name} failed: {error!r}")
            self._kill_if_same(machine)

    def _check_before(self, host: str) -> None:
        if self.network.num_events == MAX_EVENTS:
            self.fail(f"{MAX_EVENTS} events: something goes round in circles")
        if host in self.desks:
            self._check_links(host)
        machine = self.machines.get(host)
        if machine is not None and not invariants.books_balance(machine.worker):
            self.fail(f"the books of {host} do not balance")

    def _check_links(self, router: str) -> None:
        try:
            self.desks[router].router._links.check_integrity()
        except AssertionError as error:
            self.fail(f"{router}: {error}")

    def _check_after_step(self, name: str) -> None:
        machine = self.machines.get(name)
        if machine is None:
            return
        self._check_cancels(name)
        try:
            invariants.check_books(machine.worker)
        except AssertionError as error:
            self.fail(f"{name}: {error}")

    def _check_cancels(self, name: str) -> None:
        """What a router has cancelled is gone, unless something kept the word from coming."""
        now, network = self.loop.time(), self.network
        for request in self.decode_requests(name):
            tried = Try(request.submit.request_id, request.submit.attempt)
            cancelled_at = network.cancelled.get(tried, now)
            if network.disturbed_at < cancelled_at < now - CANCEL_S:
                self.fail(f"{name} still has {tried} in {request.phase}, cancelled at {cancelled_at:.6f}")

    def _incarnation_of(self, host: str) -> Incarnation | None:
        machine = self.machines.get(host)
        return None if machine is None else machine.worker.incarnation


class Caretaker:
    """Stands for the controller: replaces dead processes and tells the routers of the members."""

    def __init__(self, system: SimulatedSystem) -> None:
        self._system = system
        self._num_absences = 0
        self._epoch = 0
        self._last: Members | None = None

    @property
    def is_away(self) -> bool:
        return self._num_absences > 0

    def push(self) -> None:
        """What the controller does whenever the membership changes, and when it is back."""
        if self.is_away:
            return
        self._epoch += 1
        self._last = Members(self._epoch, tuple(m.worker.member() for m in self._known()))
        for desk in list(self._system.desks.values()):
            self._tell(desk, self._last)

    def double(self) -> None:
        """An old membership comes late, and the present one twice."""
        old = self._last
        self.push()
        for desk in list(self._system.desks.values()):
            for members in (old, self._last):
                if members is not None:
                    self._tell(desk, members)

    def leave(self, seconds: float) -> None:
        """Gone; the routers are told of nothing meanwhile, also not of processes that were started again."""
        self._num_absences += 1
        self._system.loop.call_later(seconds, self._return)

    def replace(self, name: str) -> None:
        """A process has died: start another at its address."""
        random = self._system.random
        if random.random() < 0.7:
            self._system.loop.call_later(random.random() * 0.05, self.push)
        longest_s = random.choice((0.0, 0.004, 0.4))
        self._system.in_background(self._replace(name, random.random() * longest_s))

    async def _replace(self, name: str, after_s: float) -> None:
        system = self._system
        await asyncio.sleep(after_s)
        if system.process(name) is None:
            if name in ROUTERS:
                system.start_router(name)
            else:
                await system.start_worker(name)
        self.push()

    def _known(self) -> list[Machine]:
        system = self._system
        now, scenario = system.loop.time(), system.scenario
        if now < scenario.members_from_s:
            return []
        early = now < scenario.prefill_from_s
        return [machine for name, machine in system.machines.items() if not (early and name in PREFILL)]

    def _tell(self, desk: Desk, members: Members) -> None:
        system = self._system
        system.log.note("members", desk.name, str(members.epoch), str(len(members.members)))

        def arrive() -> None:
            if not desk.dead:
                desk.router.set_members(members)

        delay_s = system.random.random() * 0.002
        system.loop.call_later(delay_s, system.network.happen, desk.name, arrive)

    def _return(self) -> None:
        self._num_absences -= 1
        if not self.is_away:
            self.push()
