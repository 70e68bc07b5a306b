"""One seed from its scenario to the report of what went wrong."""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from pdserve.clock import run_virtual
from pdserve.engine.fake_engine import FakeEngine
from pdserve.virtual_loop import VirtualDeadlock
from tests.simulation.clients import Client, Outcome
from tests.simulation.coverage import Coverage
from tests.simulation.events import EventLog
from tests.simulation.faults import Faults
from tests.simulation.hosts import EngineFailure
from tests.simulation.scenario import BLOCK_SIZE, EOS_TOKENS, Scenario, draw_scenario
from tests.simulation.system import SimulatedSystem

LIMIT_S = 60.0
"""A request that has not ended after this virtual time hangs."""

REST_S = 20.0
"""A system that is not at rest this long after its last request never will be."""


@dataclass(slots=True)
class Report:
    """What one seed showed."""

    seed: int
    failures: list[str] = field(default_factory=list)
    coverage: Coverage = field(default_factory=Coverage)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    num_faults: int = 0
    num_events: int = 0
    virtual_s: float = 0.0
    log: EventLog = field(default_factory=lambda: EventLog(lambda: 0.0))

    @property
    def passed(self) -> bool:
        return not self.failures


def run_seed(seed: int) -> Report:
    """Run one simulation to its end. Never raises for what goes wrong in it."""
    report = Report(seed)
    errors = _ErrorLog(report)
    logging.getLogger().addHandler(errors)
    try:
        run_virtual(_run(report))
    except VirtualDeadlock as deadlock:
        report.failures.append(f"deadlock: {deadlock}")
    finally:
        logging.getLogger().removeHandler(errors)
    return report


async def _run(report: Report) -> None:
    random = Random(report.seed)
    scenario = draw_scenario(random)
    report.log = EventLog(asyncio.get_running_loop().time)
    system = SimulatedSystem(scenario, random, report.log)
    report.failures = system.failures
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: system.fail(f"unhandled: {context.get('message')} {context.get('exception')!r}")
    )
    await system.start()
    clients = _clients(scenario, system)
    faults = Faults(scenario.aims, clients, system, report.coverage)
    faults.note_deadlines()
    await _serve(clients, faults, system, report)
    report.num_faults = faults.num_struck
    report.num_events = system.network.num_events
    report.virtual_s = system.loop.time()


def _clients(scenario: Scenario, system: SimulatedSystem) -> list[Client]:
    engine = FakeEngine(1, block_size=BLOCK_SIZE, eos_token_ids=EOS_TOKENS)
    clients = []
    for index, asked in enumerate(scenario.asked):
        request = asked.request
        expected = engine.reference_output(
            request.prompt_tokens, request.sampling, request.seed or 0, request.sampling.max_tokens
        )
        clients.append(Client(index, asked, expected, system))
    return clients


async def _serve(clients: Sequence[Client], faults: Faults, system: SimulatedSystem, report: Report) -> None:
    served = [asyncio.ensure_future(client.run()) for client in clients]
    failed = asyncio.ensure_future(system.failed.wait())
    everything = asyncio.ensure_future(_all_ended_and_at_rest(served, faults, system))
    await asyncio.wait((everything, failed), return_when=asyncio.FIRST_COMPLETED)
    for task in (*served, everything, failed):
        task.cancel()
    await asyncio.gather(*served, everything, failed, return_exceptions=True)
    faults.note_slow_clients()
    report.outcomes = Counter(client.outcome for client in clients if client.outcome is not None)
    if not system.failures:
        await _stop(system)


async def _all_ended_and_at_rest(
    served: "Sequence[asyncio.Task[Outcome]]", faults: Faults, system: SimulatedSystem
) -> None:
    _, pending = await asyncio.wait(served, timeout=LIMIT_S)
    if pending:
        system.fail(f"{len(pending)} requests have not ended after {LIMIT_S:g} s")
        return
    faults.strike_the_rest()
    await _at_rest(faults, system)
    system.check_caches()


async def _at_rest(faults: Faults, system: SimulatedSystem) -> None:
    until = system.loop.time() + REST_S
    while left := ["a fault waits for its message"] * faults.is_pending + list(system.leftovers()):
        if system.loop.time() > until:
            for each in left:
                system.fail(f"never at rest: {each}")
            return
        await asyncio.sleep(0.25)


async def _stop(system: SimulatedSystem) -> None:
    """The end of every process leaves nothing: no hold and no task."""
    workers = [(machine.name, machine.worker) for machine in system.machines.values()]
    await system.stop()
    for name, worker in workers:
        if worker.ledger.owners():
            system.fail(f"stopped {name} still has {worker.ledger.owners()}")
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    if left:
        system.fail(f"{len(left)} tasks are left: {sorted(str(task.get_coro()) for task in left)}")


class _ErrorLog(logging.Handler):
    """What the system itself calls an error is one, unless it was put there on purpose."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.ERROR)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, EngineFailure):
            self._report.failures.append(f"logged: {record.getMessage()} {error!r}")
