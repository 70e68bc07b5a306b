"""Faults: each waits for somebody in the state that it is meant for, strikes, and notes whom it concerned."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from decode_worker.request import DecodeRequest, Phase
from pdserve.contract.ids import RequestId
from pdserve.contract.messages import Message
from pdserve.contract.ports import Call
from pdserve.handoff.prefill_job import PrefillJob
from pdserve.rpc.memory_rpc import Leg
from tests.simulation.clients import Client, Outcome
from tests.simulation.coverage import MESSAGE_FAULTS, Combination, Coverage, Stage
from tests.simulation.network import Armed, Attempt
from tests.simulation.scenario import Aim
from tests.simulation.system import DECODE, PREFILL, ROUTERS, SimulatedSystem

ROLE_HOSTS = {"router": ROUTERS, "decode": DECODE, "prefill": PREFILL}

FAULT_LASTS_S = (0.004, 0.05, 0.4, 1.5)
"""How long a host is frozen or two are cut off: less than a step, some steps, and more than peers wait."""

_FETCHING = (Phase.WAITING, Phase.RECEIVING)


@dataclass(frozen=True, slots=True)
class Target:
    """Whom a fault is to meet: a process, its peers by what they are for it, and a request."""

    own: str
    request_id: RequestId | None
    peers: dict[str, str] = field(default_factory=dict)


class Faults:
    """The faults of one run."""

    def __init__(
        self, aims: Sequence[Aim], clients: Sequence[Client], system: SimulatedSystem, coverage: Coverage
    ) -> None:
        self.num_struck = 0
        self._system = system
        self._clients = clients
        self._coverage = coverage
        self._random = Random(system.random.getrandbits(64))
        self._to_come = list(aims)
        self._waiting: list[Aim] = []  # for somebody in their state
        self._all_ended = False
        system.preempted = lambda request: self._note_request(request.submit.request_id, "preempted")
        for aim in aims:
            system.loop.call_later(aim.at_s, self._begin, aim)
        self._look_further = system.network.before_event
        system.network.before_event = self._before_event

    def strike_the_rest(self) -> None:
        """When all requests have ended: what has found nobody, or was to come later, meets anybody."""
        for aim in list(self._to_come):
            self._begin(aim)
        for aim in list(self._waiting):
            self._strike(aim, self._anybody(aim))
        self._all_ended = True
        for armed in self._system.network.armed:
            armed.suits = lambda leg, message: True

    @property
    def is_pending(self) -> bool:
        """A fault still waits for its message."""
        return bool(self._system.network.armed)

    def note_deadlines(self) -> None:
        """Requests end at their deadlines by themselves; note where they are then."""
        for client in self._clients:
            if client.asked.request.deadline_s is not None:
                self._system.loop.call_at(
                    client.asked.at_s + client.asked.request.deadline_s, self._note_deadline, client
                )

    def note_slow_clients(self) -> None:
        """Those that were cut were cut while tokens came."""
        for client in self._clients:
            if client.outcome is Outcome.TOO_SLOW:
                self._coverage.note("router", Stage.STREAMING, "client too slow")

    # Waiting for the moment.

    def _begin(self, aim: Aim) -> None:
        if aim not in self._to_come:
            return  # all requests had ended before its time
        self._to_come.remove(aim)
        if aim.at.event.endswith(MESSAGE_FAULTS):
            self._arm(aim)
            return
        self._waiting.append(aim)
        self._system.loop.call_later(aim.patience_s, self._lose_patience, aim)
        for host in ROLE_HOSTS[aim.at.role]:
            self._look(host)

    def _lose_patience(self, aim: Aim) -> None:
        if aim in self._waiting:
            self._strike(aim, self._anybody(aim))

    def _before_event(self, host: str) -> None:
        self._look_further(host)
        if self._waiting:
            self._look(host)

    def _look(self, host: str) -> None:
        """Strike when somebody at `host` is in the state that is waited for."""
        for aim in list(self._waiting):
            if host in ROLE_HOSTS[aim.at.role]:
                target = next(self._targets(aim, host), None)
                if target is not None:
                    self._waiting.remove(aim)
                    self._system.loop.call_soon(self._strike, aim, target)

    def _targets(self, aim: Aim, host: str) -> Iterator[Target]:
        needed = aim.at.event.split()[0]
        for target in self._things(aim.at, host):
            if needed not in _PEERS or needed in target.peers:
                yield target

    def _things(self, at: Combination, host: str) -> Iterator[Target]:
        """All of that role at a host that are in that state."""
        if at.role == "decode":
            for request in self._system.decode_requests(host):
                if request.phase == at.state:
                    yield Target(host, request.submit.request_id, _peers_of(request))
        elif at.role == "prefill":
            for job in self._system.jobs(host):
                if job.state == at.state:
                    peers = {"taker": str(job.request.decode_worker_id)}
                    yield Target(host, job.request.request_id, peers)
        else:
            for client in self._live_clients():
                if client.router == host and client.stage == at.state:
                    yield Target(host, client.request_id, self._peers_of_client(client))

    def _anybody(self, aim: Aim) -> Target:
        """For a fault that has waited too long."""
        hosts = ROLE_HOSTS[aim.at.role]
        live = [client.request_id for client in self._live_clients()]
        peers = {who: self._any_of(ROLE_HOSTS[role]) for who, role in _PEERS.items()}
        return Target(self._any_of(hosts), self._random.choice(live) if live else None, peers)

    def _any_of(self, hosts: Sequence[str]) -> str:
        """A living process if there is one."""
        living = [host for host in hosts if self._system.process(host) is not None]
        return self._random.choice(living or hosts)

    # Striking.

    def _strike(self, aim: Aim, target: Target) -> None:
        if aim in self._waiting:
            self._waiting.remove(aim)
        self.num_struck += 1
        event = aim.at.event
        self._system.log.note(
            "FAULT", event, str(aim.at), target.own, str(target.request_id), str(target.peers)
        )
        who, _, fault = event.partition(" ") if " " in event else ("", "", event)
        match event:
            case "slow copies":
                self._slow_copies(target.own)
            case "client left":
                if not self._left(target.request_id):
                    self._strike_process(target.own, "killed")
            case "members late":
                self._note_members(event)
                self._system.caretaker.leave(self._random.choice((0.2, 1.0)))
                self._system.kill(self._random.choice((*PREFILL, *DECODE)))
            case "members doubled":
                self._note_members(event)
                self._system.caretaker.double()
            case _ if fault in ("killed", "frozen", "hung", "failed"):
                self._strike_process(target.peers[who] if who else target.own, fault)
            case _:
                self._cut(target.own, target.peers[who])

    def _strike_process(self, name: str, fault: str) -> None:
        system = self._system
        if system.process(name) is None:
            return
        self._note_process(name, fault)
        if fault == "killed":
            system.kill(name)
        elif fault == "frozen":
            seconds = self._random.choice(FAULT_LASTS_S)
            system.freeze(name, seconds, lambda: self._note_process(name, "resumed"))
        elif fault == "hung":
            system.hang(name)
        else:
            system.machines[name].executor.fails = True

    def _slow_copies(self, name: str) -> None:
        if name in self._system.machines:
            self._note_own(name, "slow copies")
            self._system.slow_copies(name, 0.2)

    def _cut(self, one: str, other: str) -> None:
        self._note_cut(one, other, "cut off")
        seconds = self._random.choice(FAULT_LASTS_S)
        self._system.cut(one, other, seconds, lambda: self._note_cut(one, other, "healed"))

    def _left(self, request_id: RequestId | None) -> bool:
        for client in self._live_clients():
            if client.request_id == request_id:
                self._note_client(client, "client left")
                client.leave()
                return True
        return False

    # Faults of messages.

    def _arm(self, aim: Aim) -> None:
        call, kind = aim.at.event.split()
        aimed = Armed(kind, lambda leg, _: leg.call == call and self._meets(aim, leg), self._message_struck)
        self._system.network.armed.append(aimed)

        def lose_patience() -> None:
            if not self._all_ended:
                aimed.suits = lambda leg, _: leg.call == call

        self._system.loop.call_later(aim.patience_s, lose_patience)

    def _message_struck(self, leg: Leg, message: Message, kind: str) -> None:
        self.num_struck += 1
        for role, state in self._served(leg):
            self._coverage.note(role, state, f"{leg.call} {kind}")

    def _meets(self, aim: Aim, leg: Leg) -> bool:
        return (aim.at.role, aim.at.state) in self._served(leg)

    def _served(self, leg: Leg) -> list[tuple[str, str]]:
        """(role, state) of all that a stream serves."""
        if leg.call in (Call.PREFILL, Call.KV):
            return list(self._served_by_fetch(leg))
        return list(self._served_by_router_stream(leg))

    def _served_by_fetch(self, leg: Leg) -> Iterator[tuple[str, str]]:
        fetched = self._system.network.fetched_by(leg)
        for host in (leg.source, leg.target):
            for request in self._system.decode_requests(host):
                if (request.submit.request_id, request.submit.attempt) == fetched:
                    yield "decode", request.phase
            for job in self._system.jobs(host):
                if (job.request.request_id, job.request.attempt) == fetched:
                    yield "prefill", job.state

    def _served_by_router_stream(self, leg: Leg) -> Iterator[tuple[str, str]]:
        router, worker = (leg.source, leg.target) if leg.source in ROUTERS else (leg.target, leg.source)
        for client, attempt in self._attempts():
            if client.router == router and worker in (attempt.decode, _source_of(attempt)):
                yield "router", client.stage
        if leg.call is Call.SESSION:
            for request in self._system.decode_requests(worker):
                if _router_of(request) == router:
                    yield "decode", request.phase

    # Who is concerned.

    def _note_process(self, name: str, fault: str) -> None:
        self._note_own(name, fault)
        if name in ROUTERS:
            self._note_routed(name, f"router {fault}")
        elif name in DECODE:
            self._note_attempts(lambda attempt: attempt.decode == name, f"decode {fault}")
            self._note_taken(name, PREFILL, f"taker {fault}")
        else:
            self._note_attempts(lambda attempt: _source_of(attempt) == name, f"prefill {fault}")
            self._note_fetching(name, DECODE, f"source {fault}")

    def _note_own(self, name: str, fault: str) -> None:
        for client in self._live_clients():
            if client.router == name:
                self._coverage.note("router", client.stage, fault)
        for request in self._system.decode_requests(name):
            self._coverage.note("decode", request.phase, fault)
        for job in self._system.jobs(name):
            self._coverage.note("prefill", job.state, fault)

    def _note_cut(self, one: str, other: str, fault: str) -> None:
        for near, far in ((one, other), (other, one)):
            if near in ROUTERS:
                self._note_attempts(
                    lambda attempt, near=near, far=far: (attempt.router, attempt.decode) == (near, far),
                    f"decode {fault}",
                )
                self._note_routed(near, f"router {fault}", (far,))
            elif near in PREFILL:
                self._note_fetching(near, (far,), f"source {fault}")
                self._note_taken(far, (near,), f"taker {fault}")

    def _note_routed(self, router: str, event: str, hosts: Sequence[str] = DECODE) -> None:
        for host in hosts:
            for request in self._system.decode_requests(host):
                if _router_of(request) == router:
                    self._coverage.note("decode", request.phase, event)

    def _note_fetching(self, source: str, hosts: Sequence[str], event: str) -> None:
        for host in hosts:
            for request in self._system.decode_requests(host):
                if _peers_of(request).get("source") == source:
                    self._coverage.note("decode", request.phase, event)

    def _note_taken(self, taker: str, hosts: Sequence[str], event: str) -> None:
        for host in hosts:
            for job in self._system.jobs(host):
                if job.request.decode_worker_id == taker:
                    self._coverage.note("prefill", job.state, event)

    def _note_attempts(self, concerned: Callable[[Attempt], bool], event: str) -> None:
        for client, attempt in self._attempts():
            if concerned(attempt):
                self._coverage.note("router", client.stage, event)

    def _note_members(self, event: str) -> None:
        for client in self._live_clients():
            self._coverage.note("router", client.stage, event)

    def _note_deadline(self, client: Client) -> None:
        if client.is_live:
            self._note_client(client, "deadline")

    def _note_client(self, client: Client, event: str) -> None:
        self._coverage.note("router", client.stage, event)
        if client.request_id is not None:
            self._note_request(client.request_id, event)

    def _note_request(self, request_id: RequestId, event: str) -> None:
        """At the workers that have it."""
        for host in DECODE:
            for request in self._system.decode_requests(host):
                if request.submit.request_id == request_id:
                    self._coverage.note("decode", request.phase, event)
        for job in self._all_jobs():
            if job.request.request_id == request_id:
                self._coverage.note("prefill", job.state, event)

    # What there is.

    def _live_clients(self) -> list[Client]:
        return [client for client in self._clients if client.is_live]

    def _attempts(self) -> Iterator[tuple[Client, Attempt]]:
        network = self._system.network
        for client in self._live_clients():
            attempt = None if client.request_id is None else network.attempts.get(client.request_id)
            if attempt is not None and network.is_live(attempt):
                yield client, attempt

    def _all_jobs(self) -> Iterator[PrefillJob]:
        for host in PREFILL:
            yield from self._system.jobs(host)

    def _peers_of_client(self, client: Client) -> dict[str, str]:
        network = self._system.network
        attempt = None if client.request_id is None else network.attempts.get(client.request_id)
        if attempt is None or not network.is_live(attempt):
            return {}
        source = _source_of(attempt)
        return {"decode": attempt.decode} | ({} if source is None else {"prefill": source})


_PEERS = {
    "router": "router",
    "source": "prefill",
    "decode": "decode",
    "prefill": "prefill",
    "taker": "decode",
}
"""What a process may be for another -> its role."""


def _peers_of(request: DecodeRequest) -> dict[str, str]:
    """Of a request at a decode worker; its source only while something is fetched from there."""
    peers = {"router": _router_of(request)}
    source = request.submit.prefill
    if source is not None and request.phase in _FETCHING:
        peers["source"] = str(source.worker_id)
    return peers


def _router_of(request: DecodeRequest) -> str:
    return str(request.sink.router_id)  # type: ignore[attr-defined]


def _source_of(attempt: Attempt) -> str | None:
    source = attempt.submit.prefill
    return None if source is None else str(source.worker_id)
