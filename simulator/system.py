"""The composition: workers, their reports and the router in front of them, and one run of a workload."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from load_generator.traces import PlannedRequest
from pdserve.clock import SeededRng
from pdserve.contract.block_names import ChainRoot
from pdserve.contract.errors import ConfigError
from pdserve.contract.ids import Incarnation, WorkerId
from pdserve.contract.messages import Hello, Member, Members, Role, WorkerState
from pdserve.contract.work import ModelInfo
from pdserve.rpc.watch import REPORT_INTERVAL_S
from router.admission import Admission, AdmissionLimits
from router.fleet import Fleet
from router.placement.policies import POLICIES, make_policy
from simulator.attempt import Course
from simulator.decode import DecodeWorker
from simulator.events import Events
from simulator.front import Front
from simulator.prefill import PrefillWorker
from simulator.reports import Reports
from simulator.timeline import Timeline
from simulator.timing import Timing
from simulator.workload import Request, block_tokens_of, requests_of

_UNBOUNDED = AdmissionLimits(max_requests=2**62, max_prompt_tokens=2**62)


@dataclass(frozen=True, slots=True)
class SimulatedSystem:
    """What is simulated."""

    timing: Timing
    policy: str
    num_prefill: int = 4
    num_decode: int = 4
    num_unsplit: int = 0
    """Instead of both pools, when it is not 0."""
    block_tokens: int | None = None
    """Tokens of a KV block; None: those of the trace's prefix ids."""
    local_prefill_share: float = 0.5
    """As `engine.local_prefill_share`; unsplit workers have no such limit."""
    limits: AdmissionLimits = _UNBOUNDED
    seed: int = 0


@dataclass(slots=True)
class Finished:
    """A run."""

    system: SimulatedSystem
    block_tokens: int
    courses: list[Course]
    """In order of arrival."""
    decode: dict[WorkerId, DecodeWorker]
    prefill: dict[WorkerId, PrefillWorker]
    timeline: Timeline
    virtual_s: float
    """From the first arrival to the last event."""
    wall_s: float
    """How long the simulation of that took."""

    def check_empty(self) -> None:
        """Raises AssertionError unless every request has ended and every block came back."""
        for source in self.prefill.values():
            source.check_empty()
        for worker in self.decode.values():
            worker.check_empty()


def simulate(planned: Sequence[PlannedRequest], system: SimulatedSystem) -> Finished:
    """Serve `planned` in virtual time. Raises ConfigError for what cannot be simulated."""
    _check(system)
    block_tokens = block_tokens_of(planned, system.block_tokens)
    requests = requests_of(planned, block_tokens)
    run = _Run(system, block_tokens)
    began = time.perf_counter()
    run.serve(requests)
    return Finished(
        system=system,
        block_tokens=block_tokens,
        courses=run.front.courses,
        decode=run.decode,
        prefill=run.prefill,
        timeline=run.timeline,
        virtual_s=run.events.now,
        wall_s=time.perf_counter() - began,
    )


def _check(system: SimulatedSystem) -> None:
    if system.policy not in POLICIES:
        raise ConfigError(f"--policy {system.policy} is not known here: choose one of {', '.join(POLICIES)}")
    if not system.num_unsplit and not system.num_decode:
        raise ConfigError("nobody decodes: give --decode or --unsplit workers")


class _Run:
    """The parts of one simulated system."""

    def __init__(self, system: SimulatedSystem, block_tokens: int) -> None:
        self.events = Events()
        self.prefill: dict[WorkerId, PrefillWorker] = {}
        self.decode: dict[WorkerId, DecodeWorker] = {}
        self._system = system
        self._block_tokens = block_tokens
        self._model = _model(system.timing, block_tokens)
        self._root = ChainRoot(self._model.fingerprint)
        self._fleet = Fleet()
        self._random = random.Random(system.seed)
        self.front = Front(
            fleet=self._fleet,
            policy=make_policy(system.policy, SeededRng(system.seed)),
            admission=Admission(system.limits),
            model=self._model,
            root=self._root,
            workers=self.decode,
            reports={},
            message_s=system.timing.message_s,
            events=self.events,
        )
        self._make_workers()
        self.front.reports = self._introduce()
        self.timeline = Timeline(self.prefill, self.decode)

    def serve(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.events.at(request.planned.due_s, partial(self.front.arrive, request))
        self.timeline.follow(self.events, requests[-1].planned.due_s, lambda: bool(self.front.inside))
        self.events.run()

    def _make_workers(self) -> None:
        system = self._system
        num_prefill = 0 if system.num_unsplit else system.num_prefill
        for index in range(num_prefill):
            worker_id = WorkerId(f"prefill-{index}")
            self.prefill[worker_id] = PrefillWorker(
                worker_id, system.timing, self._block_tokens, self._root, self.events
            )
        role = Role.UNSPLIT if system.num_unsplit else Role.DECODE
        share = 1.0 if system.num_unsplit else system.local_prefill_share
        for index in range(system.num_unsplit or system.num_decode):
            worker_id = WorkerId(f"{role.value}-{index}")
            self.decode[worker_id] = DecodeWorker(
                worker_id,
                role,
                system.timing,
                self._block_tokens,
                self._root,
                share,
                self.prefill,
                self.front,
                self.events,
            )

    def _introduce(self) -> dict[WorkerId, Reports]:
        """Make the router know the workers, as the controller and their first messages would."""
        workers: list[PrefillWorker | DecodeWorker] = [*self.prefill.values(), *self.decode.values()]
        members = tuple(
            Member(worker.worker_id, "simulated:0", Incarnation(number), worker.role, "", WorkerState.READY)
            for number, worker in enumerate(workers, 1)
        )
        self._fleet.set_members(Members(0, members))
        reports = {}
        for worker, member in zip(workers, members, strict=True):
            view = self._fleet.workers[worker.worker_id]
            self._fleet.hello(view, self._hello(worker, member))
            offset_s = self._random.random() * REPORT_INTERVAL_S
            reports[worker.worker_id] = Reports(worker, self._fleet, view, offset_s, self.events)
            reports[worker.worker_id].send()
            self._fleet.connected(view)
        return reports

    def _hello(self, worker: PrefillWorker | DecodeWorker, member: Member) -> Hello:
        return Hello(
            worker_id=member.worker_id,
            incarnation=member.incarnation,
            role=member.role,
            model=self._model,
            root_digest=self._root.digest,
            cost=self._system.timing.cost,
            prefill_share=worker.prefill_share,
        )


def _model(timing: Timing, block_tokens: int) -> ModelInfo:
    """What workers say of the model; of its shape nothing matters but the size of blocks."""
    return ModelInfo(
        name=timing.name,
        architecture="simulated",
        revision="",
        dtype="bfloat16",
        vocab_size=2**32,
        max_model_len=timing.pool_tokens,
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        block_size=block_tokens,
        num_blocks=timing.pool_tokens // block_tokens,
        block_bytes=block_tokens * timing.kv_bytes_per_token,
        eos_token_ids=(),
        fingerprint=f"simulated {timing.name}",
        chunk_tokens=timing.chunk_tokens,
        deterministic=False,
    )
