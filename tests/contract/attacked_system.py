"""A small pdserve on real sockets, for tests that send it what they like: a prefill and a decode worker with
fake engines, a router, and peers that speak the protocol as badly as a test wants."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from controller.worker import Worker, WorkerSettings
from pdserve.clock import LoopClock, SystemRng
from pdserve.contract.errors import ErrorCode
from pdserve.contract.ids import Incarnation, RequestId, RouterId, SubmitNumber, WorkerId
from pdserve.contract.messages import (
    Member,
    Members,
    Message,
    PrefillOpen,
    PrefillSource,
    Role,
    SessionOpen,
    SessionReady,
    Submit,
    TransportOffer,
)
from pdserve.contract.ports import Call, MessageStream
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import pack_tokens, unpack_tokens
from pdserve.engine.executor import ThreadExecutor
from pdserve.engine.fake_engine import FakeEngine
from pdserve.rpc.grpc_rpc import GrpcRpc
from router.requests import GenerateRequest
from router.router import Router
from tests.credentials import OURS

PROMPT = pack_tokens(range(1, 31))
SAMPLING = SamplingParams(max_tokens=6, temperature=0.0)
NUM_BLOCKS = 64
ROUTER = Incarnation(77)
"""Of the router that tests pretend to be."""


class AttackedSystem:
    """Use as a context; at its end the workers must serve as before and hold nothing."""

    def __init__(self) -> None:
        self.peer = GrpcRpc(OURS)
        """Of whoever attacks, with the deployment's token."""
        self.router = Router(RouterId("router-0"), GrpcRpc(OURS), LoopClock(), SystemRng())
        self.prefill = _worker("prefill-0", Role.PREFILL)
        self.decode = _worker("decode-0", Role.DECODE)
        self._num_sessions = 0

    @property
    def workers(self) -> tuple[Worker, Worker]:
        return self.prefill, self.decode

    async def __aenter__(self) -> "AttackedSystem":
        members: list[Member] = [await worker.start("127.0.0.1:0") for worker in self.workers]
        self.router.set_members(Members(1, tuple(members)))
        while not all(view.usable for view in self.router.fleet.workers.values()):
            self.router.fleet.changed.clear()
            await self.router.fleet.changed.wait()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        try:
            if exc_info[0] is None:
                await self.at_rest()
                await self.serves()
                await self.at_rest()
        finally:
            await self.peer.close()
            await self.router.close()
            for worker in self.workers:
                await worker.stop()

    async def serves(self) -> None:
        """A request through both workers gets the tokens it must get."""
        request = GenerateRequest(PROMPT, SAMPLING, seed=1)
        output: list[int] = []
        async for delta in self.router.generate(self.router.new_request_id(), request):
            output += unpack_tokens(delta.tokens)
        assert output == FakeEngine(NUM_BLOCKS).reference_output(PROMPT, SAMPLING, 1)

    async def at_rest(self) -> None:
        """Nothing of what was sent is left. Handlers end a moment after their peers have been told."""
        for worker in self.workers:
            while worker.ledger.owners():  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.01)
            worker.check()
            counts = worker.block_counts()
            assert counts.free + counts.cached == NUM_BLOCKS

    def refused(self, worker: Worker, reason: ErrorCode) -> float:
        labels = {"pool": worker.role.value, "reason": reason.value}
        return worker.registry.get_sample_value("pdserve_refused_calls_total", labels) or 0.0

    def num_stale(self, worker: Worker, kind: str) -> float:
        labels = {"pool": worker.role.value, "kind": kind}
        return worker.registry.get_sample_value("pdserve_stale_messages_total", labels) or 0.0

    async def open_session(self, **fields: object) -> MessageStream:
        """A Session that has been accepted."""
        stream = await self.peer.open(self.decode.address, Call.SESSION)
        await stream.send(self.session_open(**fields))
        assert await stream.receive() == SessionReady(self.decode.incarnation)
        return stream

    def session_open(self, **fields: object) -> SessionOpen:
        self._num_sessions += 1
        opened = SessionOpen(RouterId("router-7"), ROUTER, self.decode.incarnation, self._num_sessions)
        return replace(opened, **fields)  # type: ignore[arg-type]

    def submit(self, number: int = 1, **fields: object) -> Submit:
        """To be prefilled by the prefill worker."""
        source = PrefillSource(self.prefill.worker_id, self.prefill.address, self.prefill.incarnation)
        submit = Submit(
            SubmitNumber(number), RequestId(f"attack-{number}"), 1, PROMPT, b"", SAMPLING, 1, source
        )
        return replace(submit, **fields)  # type: ignore[arg-type]

    async def open_prefill(self, **fields: object) -> MessageStream:
        stream = await self.peer.open(self.prefill.address, Call.PREFILL)
        await stream.send(self.prefill_open(**fields))
        return stream

    def prefill_open(self, **fields: object) -> PrefillOpen:
        opened = PrefillOpen(
            request_id=RequestId("attack"),
            attempt=1,
            decode_worker_id=WorkerId("decode-7"),
            source_incarnation=self.prefill.incarnation,
            fingerprint=FakeEngine(1).info.fingerprint,
            tokens=PROMPT,
            num_prompt_tokens=30,
            transports=(TransportOffer("grpc"),),
            sampling=SAMPLING,
        )
        return replace(opened, **fields)  # type: ignore[arg-type]


async def say(stream: MessageStream, messages: Sequence[Message]) -> None:
    for message in messages:
        await stream.send(message)


def _worker(name: str, role: Role) -> Worker:
    engine = FakeEngine(NUM_BLOCKS)
    settings = WorkerSettings(transports=("grpc",))
    return Worker(
        WorkerId(name),
        role,
        engine,
        ThreadExecutor(engine),
        GrpcRpc(OURS),
        LoopClock(),
        SystemRng(),
        settings,
    )
