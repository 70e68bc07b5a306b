"""What processes answer to a controller that finds them: how they are, not how they started."""

import asyncio
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from controller.plan import Deployment, ModelSource, ProcessPlan
from controller.router_actor import RouterActor
from controller.status import ProcessReport, ProcessSpec
from controller.worker_actor import WorkerActor
from pdserve.config import load_config
from pdserve.contract.messages import Members, WorkerState
from pdserve.contract.tracing import NO_SPAN, Span
from pdserve.demo import demo_model_path
from pdserve.engine.fake_engine import FakeEngine

OPTIONS = {"router.http_port": 0, "router.grpc_port": None, "router.admin.port": None}


@pytest.fixture(autouse=True)
def logging_stays_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)


def plan(process_id: str) -> ProcessPlan:
    model = ModelSource(str(demo_model_path()), None, "demo")
    return ProcessPlan(ProcessSpec.of(process_id), Deployment(load_config(None, OPTIONS), model), 1)


async def started(actor: RouterActor | WorkerActor) -> ProcessReport:
    report = await actor.start()
    assert isinstance(report, ProcessReport), report
    return report


def test_a_router_that_is_found_tells_the_membership_that_it_has_by_now() -> None:
    """Else its new controller would number memberships from the start, and the router would ignore them."""

    async def scenario() -> None:
        router = RouterActor(plan("router-0"), controller=None)
        first = await started(router)
        await router.set_members(Members(7, ()))
        again = await started(router)
        assert (first.epoch, again.epoch) == (-1, 7)
        assert (again.pid, again.address) == (first.pid, first.address)
        await router.stop()

    asyncio.run(scenario())


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> WorkerActor:
    monkeypatch.setattr(WorkerActor, "_load_engine", lambda _: FakeEngine(64))
    nobody: Any = SimpleNamespace(tell=SimpleNamespace(remote=lambda *_: None))
    return WorkerActor(plan("decode-0"), nobody)


def test_a_worker_that_is_found_while_it_leaves_says_so(worker: WorkerActor) -> None:
    """Else its new controller would take its end for a death."""

    async def scenario() -> None:
        first = await started(worker)
        await worker.drain(3600.0)
        again = await started(worker)
        assert first.member is not None
        assert again.member is not None
        assert (first.member.state, again.member.state) == (WorkerState.READY, WorkerState.DRAINING)
        assert again.member.incarnation == first.member.incarnation
        assert await worker.ended() == "stopped"
        await worker.stop()

    asyncio.run(scenario())


class ClosingTracer:
    """Traces nothing, and remembers whether it was closed."""

    def __init__(self) -> None:
        self.is_closed = False

    def begin(self, *_: object) -> Span:
        return NO_SPAN

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.is_closed = True


def test_a_worker_that_leaves_sends_its_spans_first(
    worker: WorkerActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process is killed as soon as it says that it has ended."""
    tracer = ClosingTracer()
    monkeypatch.setattr("controller.worker_actor.tracer_of", lambda *_: tracer)

    async def scenario() -> None:
        await started(worker)
        await worker.drain(3600.0)
        assert await worker.ended() == "stopped"
        assert tracer.is_closed
        await worker.stop()

    asyncio.run(scenario())
