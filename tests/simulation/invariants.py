"""What must hold of a worker at any moment, and of everything when all is over."""

from collections.abc import Iterator

from controller.integrity import inspect
from controller.worker import Worker
from decode_worker.loop import DecodeLoop
from pdserve.contract.tokens import unpack_tokens
from pdserve.contract.work import LayerRange
from pdserve.engine.fake_engine import FakeEngine
from router.router import Router


def books_balance(worker: Worker) -> bool:
    """As many references to blocks as blocks in holds. Cheap enough to be asked before every event."""
    num_held = 0
    for hold in worker.ledger._holds:
        num_held += len(hold.block_ids)
    return num_held == sum(worker._allocator._references)


def check_books(worker: Worker) -> None:
    """Everything that owns something, after a step. Raises AssertionError."""
    worker.ledger.check_integrity()
    worker.calls.check_integrity()
    worker._check_holds()
    if isinstance(worker.loop, DecodeLoop) and worker._sessions is not None:
        worker.loop.check_integrity()
        open_sessions = list(worker._sessions._sessions.values())
        for request in worker.loop._requests:
            name = request.submit.request_id
            assert request.sink in open_sessions, f"{name} is live and its Session is not"


def left_at(worker: Worker, engine: FakeEngine) -> Iterator[str]:
    """What a worker at rest should not have."""
    yield from worker.inspect().problems
    yield from (f"{owner} holds blocks" for owner in worker.ledger.owners())
    yield from (f"job of {job.request.request_id} in {job.state}" for job in worker.calls.jobs)
    counts = worker.block_counts()
    if counts.free + counts.cached != engine.info.num_blocks:
        yield f"{counts} at rest"
    if isinstance(worker.loop, DecodeLoop):
        yield from (f"fetch {fetch.get_name()}" for fetch in worker.loop._arrivals._fetches)


def left_in(router: Router, workers: list[Worker]) -> Iterator[str]:
    """What a router at rest should not have, and what it should know of living workers."""
    yield from inspect(router.owners()).problems
    admission = router._journey._admission
    if admission.num_requests or admission.num_prompt_tokens or router._journey._live:
        yield f"{admission.num_requests} requests are inside"
    for view in router.fleet.workers.values():
        if view.booked:
            yield f"{len(view.booked)} attempts are booked at {view.member.worker_id}"
    yield from (f"{worker.worker_id} is not usable" for worker in workers if not _is_usable(router, worker))


def _is_usable(router: Router, worker: Worker) -> bool:
    view = router.fleet.workers.get(worker.worker_id)
    return view is not None and view.usable and view.member.incarnation == worker.incarnation


def wrong_cache(worker: Worker, engine: FakeEngine) -> Iterator[str]:
    """Blocks of the prefix cache that do not hold the KV of the tokens that their name stands for."""
    named = worker._allocator._named
    for block_id, record in named.items():
        tokens = [record.tokens]
        parent = record.parent
        while parent is not None:
            tokens.append(named[parent].tokens)
            parent = named[parent].parent
        expected = engine.reference_kv(unpack_tokens(b"".join(reversed(tokens))))
        block_bytes = engine.info.block_bytes
        whole = LayerRange(0, engine.info.num_layers)
        if bytes(engine.blocks.read([block_id], whole)) != expected[-block_bytes:]:
            yield f"cached block {block_id} of {worker.worker_id} is not the KV of its {len(tokens)} blocks"
