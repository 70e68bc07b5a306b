"""What the router believes about every worker, and how old that belief is. No I/O.

`links` feeds it from the workers' Watch streams, the controller feeds it memberships, and `journey` books
what it has just sent somewhere, because a worker's report about it comes a moment later.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from pdserve.contract.ids import BlockHash, Incarnation, WorkerId
from pdserve.contract.messages import (
    Hello,
    Member,
    Members,
    Report,
    RequestTimings,
    Role,
    WorkerLoad,
    WorkerState,
)
from pdserve.contract.work import ModelInfo, StepCost, hung_after_s
from router.bookings import Booked, Bookings, Sum
from router.kv_travel import KvTravel
from router.pending_owners import PendingOwners
from router.placement.candidates import Candidate, Held, Pool
from router.placement.policy import FleetView
from router.placement.prediction import scaled
from router.prefix_index import PrefixIndex

VERDICT_S = 2.0
"""A worker has so much longer to find out itself that its engine hangs."""
MAX_LEAVING = 4096
"""So many processes that were stopped on purpose are remembered: a request may have been at several."""
PAIR_TIMEOUT_S = 5.0
"""How long a pair whose hand-off failed is not used."""

_NO_PAIRS: frozenset[tuple[WorkerId, WorkerId]] = frozenset()


class Identity(NamedTuple):
    """A worker's process."""

    worker_id: WorkerId
    incarnation: Incarnation


class Fate(StrEnum):
    """What became of a process."""

    ALIVE = "alive"
    UNKNOWN = "unknown"
    """Its streams have broken, and the controller has not said yet that it is gone."""
    DEAD = "dead"
    EXCUSED = "excused"
    """It was stopped on purpose."""


class Pending(NamedTuple):
    """Block names that a worker is noted for in one of the fleet's `PendingOwners`."""

    owners: PendingOwners
    names: Sequence[BlockHash]
    bit: int
    is_computed: bool = False
    """It holds them now; its next report says so."""


@dataclass(slots=True, eq=False)
class WorkerView:
    """One member."""

    member: Member
    hello: Hello | None = None
    load: WorkerLoad | None = None
    reported_at: float = 0.0
    stepped_at: float = 0.0
    """When its step counter was last seen to move, or it had nothing to step for."""
    hung_step: int | None = None
    """The step in which it hangs; it is not used before that step has ended."""
    connected: bool = False
    """Its streams are open: Watch, and for decode workers the Session."""
    is_leaving: bool = False
    """It has said that it will be stopped; its process takes no more work."""
    indexed: bool = False
    """The prefix index counts what it holds."""
    reported: Sum = field(default_factory=Sum)
    """What it has to do, as it said last."""
    cost: StepCost | None = None
    """How long its steps take, as it said last."""
    booked: Bookings = field(default_factory=Bookings)
    """What was sent here and is not done yet."""
    pending: dict[object, Pending] = field(default_factory=dict)
    """Attempt -> what it will hold of a prompt, until it reports that it does."""
    num_output_tokens: int = 0
    """That came from it to this router."""

    @property
    def identity(self) -> Identity:
        return Identity(self.member.worker_id, self.member.incarnation)

    @property
    def usable(self) -> bool:
        ready = self.load is not None and self.load.state is WorkerState.READY
        wanted = self.member.state is WorkerState.READY and not self.is_leaving
        return self.connected and ready and not self.hangs and wanted

    @property
    def hangs(self) -> bool:
        """Its engine hangs, although the worker answers."""
        return self.load is not None and self.load.step == self.hung_step

    def take(self, load: WorkerLoad, now: float) -> None:
        """The load that it reports at `now`."""
        if self.load is None or load.step != self.load.step or not load.running_sequences:
            self.stepped_at = now
        self.load, self.reported_at = load, now
        self.reported = Sum(
            load.running_sequences + load.waiting_requests,
            load.waiting_tokens,
            0 if self.member.role is Role.PREFILL else load.running_context_tokens,
        )
        if self.hello is not None:
            self.cost = scaled(self.hello.cost, load.prefill_slowdown, load.decode_slowdown)
        self.booked.reported(load.last_submit)
        if now - self.stepped_at > hung_after_s(self._predicted_step_s) + VERDICT_S:
            self.hung_step = load.step

    @property
    def _predicted_step_s(self) -> float:
        if self.load is None or self.hello is None:
            return 0.0
        chunk_s = self.hello.model.chunk_tokens / max(self.load.prefill_tokens_per_s, 1.0)
        return max(self.load.decode_step_s, chunk_s if self.load.prefill_tokens_per_s else 0.0)

    @property
    def to_do(self) -> Sum:
        """What it has to do: as it reports, and what this router has sent."""
        return self.booked.with_report(self.reported)


class Fleet:
    """All members, the prefix index, and the pairs that do not work at the moment."""

    def __init__(self) -> None:
        self.workers: dict[WorkerId, WorkerView] = {}
        self.index = PrefixIndex()
        self.num_index_mismatches = 0
        self.epoch = -1
        self.changed = asyncio.Event()
        self._failed_pairs: dict[tuple[WorkerId, WorkerId], float] = {}  # (prefill, decode) -> until
        self._model: ModelInfo | None = None
        self._models: dict[str, ModelInfo] = {}  # fingerprint -> of those that are served now
        self._leaving: dict[Identity, None] = {}  # who has said that it would be stopped, oldest first
        self._computing = PendingOwners()  # of the prompts' blocks that are computed there
        self._receiving = PendingOwners()  # that others compute for them
        self._kv_travel = KvTravel()
        self._booked_anew: dict[WorkerView, None] = {}  # whose bookings the pools do not know yet
        self._prefilling = Pool()  # the usable prefill workers
        self._decoding = Pool()  # the usable workers that decode

    # What the controller says.

    def set_members(self, members: Members) -> None:
        """Take over a membership, unless it is older than the last one."""
        if members.epoch < self.epoch:
            return
        self.epoch = members.epoch
        named = {member.worker_id: member for member in members.members}
        for worker_id in [worker_id for worker_id in self.workers if worker_id not in named]:
            self.lost(self.workers.pop(worker_id))
            self._kv_travel.forget(worker_id)
            self._forget_failures(worker_id)
        for worker_id, member in named.items():
            self._set_member(worker_id, member)
        self._find_model()
        self.changed.set()

    # What the workers say.

    def hello(self, view: WorkerView, hello: Hello) -> None:
        view.hello = hello
        self._find_model()
        view.indexed = True
        self.index.add_worker(hello.incarnation)
        self._move_pending(view, self.index.bit_of(hello.incarnation))
        self._kv_travel.set_size(hello.model.block_bytes / hello.model.block_size)
        self._refresh(view)

    def strangers(self, hello: Hello) -> list[Hello]:
        """Of the workers that `hello`'s would be paired with by role, those whose KV means something else."""
        others = (view.hello for view in self.workers.values() if view.hello is not None)
        return [
            other
            for other in others
            if {other.role, hello.role} == {Role.PREFILL, Role.DECODE}
            and other.model.fingerprint != hello.model.fingerprint
        ]

    def report(self, view: WorkerView, report: Report, now: float) -> bool:
        """Take over a report; False when the index has lost count of the worker and needs a new snapshot."""
        view.take(report.load, now)
        self._note_state(view, report.load.state)
        self.index.store(report.incarnation, report.stored)
        self.index.remove(report.incarnation, report.removed)
        self.index.sweep()
        agrees = self.index.agrees(report.incarnation, report.num_names, report.xor_names)
        self.num_index_mismatches += not agrees
        self._settle(view)
        self._refresh(view)
        self.changed.set()
        return agrees

    def connected(self, view: WorkerView) -> None:
        view.connected = True
        self._refresh(view)
        self.changed.set()

    def lost(self, view: WorkerView) -> None:
        """The worker's streams have broken; nothing that it said counts any more."""
        view.connected = False
        view.load, view.reported = None, Sum()
        if view.indexed and view.hello is not None:  # once: the incarnation may be back in another view
            view.indexed = False
            self.index.remove_worker(view.hello.incarnation)
        for attempt in list(view.pending):
            self._forget_pending(view, attempt)
        self._refresh(view)
        self.changed.set()

    def leaves(self, who: Identity) -> None:
        """A process has refused work or given it back because it will be stopped."""
        self._leaving[who] = None
        if len(self._leaving) > MAX_LEAVING:
            del self._leaving[next(iter(self._leaving))]
        view = self.workers.get(who.worker_id)
        if view is not None and view.identity == who:
            view.is_leaving = True
            self._refresh(view)

    def pair_refused(self, prefill: WorkerId, decode: WorkerId) -> None:
        """Their KV does not mean the same: no such pair until one of them is another incarnation."""
        if prefill in self.workers and decode in self.workers:
            self._failed_pairs[prefill, decode] = math.inf

    def pair_failed(self, prefill: WorkerId, decode: WorkerId, now: float) -> None:
        """A hand-off between two workers failed: do not try that pair for a while."""
        until = self._failed_pairs.get((prefill, decode), now)
        self._failed_pairs[prefill, decode] = max(until, now + PAIR_TIMEOUT_S)

    # What the journey asks.

    def model_info(self, fingerprint: str | None = None) -> ModelInfo | None:
        """None before the first worker has said what it serves. All members serve the same model, but in the
        middle of a rollout, when `fingerprint` tells which is meant; this is how the worker with the largest
        pool does: the longest that can be served must fit there. While all are being replaced it is what the
        former members said, so that requests wait for the new ones."""
        if fingerprint is None:
            return self._model
        return self._models.get(fingerprint, self._model)

    def view(
        self, names: Sequence[BlockHash], block_size: int, now: float, fingerprint: str | None = None
    ) -> FleetView:
        """What is believed of the usable workers, or of those that serve the model of `fingerprint`, while a
        prompt with these block names is placed; only good until something changes."""
        for view in self._booked_anew:
            self._refresh(view)
        self._booked_anew.clear()
        depths = self.index.holders(names)
        computing = self._computing.holders(names)
        if computing:
            depths = sorted(depths + computing, reverse=True)
        held = Held([(num_blocks * block_size, bits) for num_blocks, bits in depths])
        receiving = self._receiving.holders(names)
        if receiving:
            coming = [(num_blocks * block_size, bits) for num_blocks, bits in receiving]
            held = Held(sorted([*held.depths, *coming], reverse=True), held.depths)
        decoding, prefilling = self._decoding, self._prefilling
        if fingerprint is not None:
            decoding, prefilling = decoding.of(fingerprint), prefilling.of(fingerprint)
        return FleetView(decoding, prefilling, held, self.unusable_pairs(now), self._kv_travel.speeds)

    def unusable_pairs(self, now: float) -> frozenset[tuple[WorkerId, WorkerId]]:
        if not self._failed_pairs:
            return _NO_PAIRS
        self._failed_pairs = {pair: until for pair, until in self._failed_pairs.items() if until > now}
        return frozenset(self._failed_pairs)

    # What the journey sends.

    def book(
        self,
        worker_id: WorkerId,
        attempt: object,
        booked: Booked,
        names: Sequence[BlockHash] = (),
        receives: bool = False,
    ) -> WorkerView:
        """An attempt whose prompt has these block names has been sent to a worker, which computes it or
        `receives` its KV from another. What becomes of it is told with the view that is returned."""
        view = self.workers[worker_id]
        view.booked.add(attempt, booked)
        bit = 0 if view.hello is None else self.index.bit_of(view.hello.incarnation)
        if bit and names:
            owners = self._receiving if receives else self._computing
            view.pending[attempt] = Pending(owners, owners.add(names, bit), bit)
        self._booked_anew[view] = None
        return view

    def prefill_is_done(self, view: WorkerView, attempt: object) -> None:
        """The worker has computed the attempt's prompt."""
        view.booked.prefill_is_done(attempt)
        self._kv_is_there(view, attempt)
        self._booked_anew[view] = None

    def kv_has_come(
        self, prefill: WorkerView, decode: WorkerView, attempt: object, timings: RequestTimings
    ) -> None:
        """How the KV of an attempt has travelled, all of it."""
        self._kv_is_there(decode, attempt)
        if all(self.workers.get(view.member.worker_id) is view for view in (prefill, decode)):
            self._kv_travel.note(prefill.member.worker_id, decode.member.worker_id, timings)

    def release(self, view: WorkerView, attempt: object) -> None:
        """The attempt needs nothing more of the worker; what it has computed stays there."""
        view.booked.drop(attempt)
        pending = view.pending.get(attempt)
        if pending is not None and not pending.is_computed:
            self._forget_pending(view, attempt)
        self._booked_anew[view] = None

    def fate(self, who: Identity) -> Fate:
        if who in self._leaving or self._node_is_lost(who.worker_id):
            return Fate.EXCUSED
        view = self.workers.get(who.worker_id)
        if view is None or view.identity != who:
            return Fate.DEAD
        return Fate.ALIVE if view.connected else Fate.UNKNOWN

    def fingerprint(self, worker_id: WorkerId) -> str | None:
        """Of the model that a worker serves, once it has said so."""
        hello = self.workers[worker_id].hello
        return None if hello is None else hello.model.fingerprint

    def has_moved_on(self, fingerprint: str) -> bool:
        """Whether those that decode serve another model, revision or kind of KV by now, and none this one."""
        hellos = [view.hello for view in self.workers.values() if view.hello is not None]
        decoding = [hello for hello in hellos if hello.role is not Role.PREFILL]
        return bool(decoding) and all(hello.model.fingerprint != fingerprint for hello in decoding)

    @property
    def is_degraded(self) -> bool:
        """A whole pool is missing: nobody decodes, or decode workers compute the prompts, too."""
        split = any(view.member.role is Role.DECODE for view in self.workers.values())
        decoding = self.num_usable(Role.DECODE) + self.num_usable(Role.UNSPLIT)
        return not decoding or (split and not self.num_usable(Role.PREFILL))

    def num_usable(self, role: Role) -> int:
        return sum(view.usable and view.member.role is role for view in self.workers.values())

    def _find_model(self) -> None:
        """What `model_info` tells. Requests ask often and workers change rarely."""
        hellos = [view.hello for view in self.workers.values() if view.hello is not None]
        decoding = [hello for hello in hellos if hello.role is not Role.PREFILL]
        models = [hello.model for hello in decoding or hellos]
        self._model = max(models, key=_pool_tokens, default=self._model)
        self._models = {model.fingerprint: model for model in sorted(models, key=_pool_tokens)}

    def _kv_is_there(self, view: WorkerView, attempt: object) -> None:
        pending = view.pending.get(attempt)
        if pending is not None:
            view.pending[attempt] = pending._replace(is_computed=True)

    def _settle(self, view: WorkerView) -> None:
        """A worker has reported: the index knows now what it holds."""
        for attempt in [attempt for attempt, pending in view.pending.items() if pending.is_computed]:
            self._forget_pending(view, attempt)

    def _move_pending(self, view: WorkerView, bit: int) -> None:
        """The index counts the worker anew, under another bit; its former one will be another worker's."""
        for attempt, pending in view.pending.items():
            pending.owners.move(pending.names, pending.bit, bit)
            view.pending[attempt] = pending._replace(bit=bit)

    def _forget_pending(self, view: WorkerView, attempt: object) -> None:
        pending = view.pending.pop(attempt)
        pending.owners.remove(pending.names, pending.bit)

    def _refresh(self, view: WorkerView) -> None:
        """Bring the pools up to date with what is believed of a worker."""
        worker_id = view.member.worker_id
        if self.workers.get(worker_id, view) is not view:  # an earlier process of that name
            return
        mine, other = self._decoding, self._prefilling
        if view.member.role is Role.PREFILL:
            mine, other = other, mine
        other.remove(worker_id)
        if view.usable and view.hello is not None and view.load is not None:
            mine.put(self._candidate(view, view.hello, view.load))
        else:
            mine.remove(worker_id)

    def _candidate(self, view: WorkerView, hello: Hello, load: WorkerLoad) -> Candidate:
        decodes = view.member.role is not Role.PREFILL
        model, to_do = hello.model, view.to_do
        filled = max((load.blocks.active + load.blocks.reserved) * model.block_size, to_do.context_tokens)
        return Candidate(
            worker_id=view.member.worker_id,
            fingerprint=model.fingerprint,
            owner_bit=self.index.bit_of(hello.incarnation),
            pool_tokens=model.pool_tokens,
            free_tokens=max(0, model.pool_tokens - filled),
            num_requests=to_do.requests,
            queued_prefill_tokens=to_do.prefill_tokens,
            running_sequences=to_do.requests if decodes else 0,
            context_tokens=to_do.context_tokens,
            num_cached_blocks=self.index.num_names_of(hello.incarnation),
            chunk_tokens=model.chunk_tokens,
            cost=view.cost or hello.cost,
            prefill_share=hello.prefill_share,
        )

    def _note_state(self, view: WorkerView, state: WorkerState) -> None:
        if state in (WorkerState.DRAINING, WorkerState.STOPPED):
            self.leaves(view.identity)

    def _node_is_lost(self, worker_id: WorkerId) -> bool:
        """Whether all workers at its host, and there are others, cannot be reached."""
        lost = self.workers.get(worker_id)
        if lost is None:
            return False
        host = _host(lost.member)
        there = [view for view in self.workers.values() if _host(view.member) == host]
        return len(there) > 1 and not any(view.connected for view in there)

    def _set_member(self, worker_id: WorkerId, member: Member) -> None:
        view = self.workers.get(worker_id)
        if view is not None and view.member.incarnation == member.incarnation:
            view.member = member
        else:
            if view is not None:
                self.lost(view)
            self._forget_failures(worker_id)
            view = self.workers[worker_id] = WorkerView(member)
        self._refresh(view)
        self._note_state(view, member.state)

    def _forget_failures(self, worker_id: WorkerId) -> None:
        """Of a worker that has gone, or of its earlier incarnation."""
        for pair in [pair for pair in self._failed_pairs if worker_id in pair]:
            del self._failed_pairs[pair]


def _host(member: Member) -> str:
    return member.address.rpartition(":")[0]


def _pool_tokens(model: ModelInfo) -> int:
    return model.pool_tokens
