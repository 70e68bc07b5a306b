"""The router put together: everything behind the HTTP and gRPC edges. Implements `requests.Desk`."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from pdserve.contract.errors import ErrorInfo
from pdserve.contract.ids import Incarnation, RequestId, RouterId
from pdserve.contract.messages import Members, Role
from pdserve.contract.ports import Clock, Rng, Rpc
from pdserve.contract.tracing import NO_TRACER, Tracer
from pdserve.contract.work import ModelInfo
from pdserve.metrics import RouterMetrics
from router.admission import Admission, AdmissionLimits
from router.fleet import Fleet
from router.journey import Journey, JourneySettings
from router.links import Links, LinkSettings, RouterIdentity
from router.recent_times import RecentLatencies
from router.request_reports import Origin, RequestReport, RequestReports
from router.requests import Closing, GenerateRequest, OutputDelta, Readiness


@dataclass(frozen=True, slots=True)
class RouterSettings:
    admission: AdmissionLimits = field(default_factory=AdmissionLimits)
    journey: JourneySettings = field(default_factory=JourneySettings)
    links: LinkSettings = field(default_factory=LinkSettings)


class Router:
    """Serves requests on the workers that `set_members` names."""

    def __init__(
        self,
        router_id: RouterId,
        rpc: Rpc,
        clock: Clock,
        rng: Rng,
        settings: RouterSettings | None = None,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        settings = settings or RouterSettings()
        self.identity = RouterIdentity(router_id, Incarnation(rng.random_bits(63)))
        self._rpc = rpc
        self.registry = CollectorRegistry()
        self.metrics = RouterMetrics(self.registry)
        self.recent = RecentLatencies()
        self.objectives = settings.journey.objectives
        self.fleet = Fleet()
        self._links = Links(self.identity, self.fleet, rpc, clock, self.metrics, settings.links)
        self.reports = RequestReports()
        self._journey = Journey(
            self.fleet,
            self._links,
            Admission(settings.admission),
            clock,
            rng,
            self.metrics,
            self.reports,
            self.recent,
            settings.journey,
            tracer,
        )
        self._num_requests = 0
        self.metrics.follow_index_mismatches(lambda: self.fleet.num_index_mismatches)
        self.metrics.follow_oldest_waiting(self._journey.oldest_waiting_s)
        self.metrics.follow_degraded(lambda: self.fleet.is_degraded)
        self.metrics.follow_workers(lambda: sum(view.usable for view in self.fleet.workers.values()))

    def set_members(self, members: Members) -> None:
        """Take over a membership: connect to new workers, let go of old ones."""
        self._links.set_members(members)

    def model_info(self) -> ModelInfo | None:
        return self.fleet.model_info()

    def readiness(self) -> Readiness:
        """Ready as soon as one worker can decode; a missing prefill pool only makes it slower."""
        workers = {role.value: self.fleet.num_usable(role) for role in Role}
        if workers[Role.DECODE] + workers[Role.UNSPLIT]:
            why = "degraded: no prefill worker is ready, decode workers compute the prompts"
            return Readiness(True, why if self.fleet.is_degraded else "ready", workers)
        known = len(self.fleet.workers)
        reason = f"none of {known} workers can decode yet" if known else "no worker is known yet"
        return Readiness(False, reason, workers)

    def new_request_id(self) -> RequestId:
        self._num_requests += 1
        return RequestId(f"{self.identity.incarnation:016x}-{self._num_requests}")

    def generate(
        self, request_id: RequestId, request: GenerateRequest, closing: Closing | None = None
    ) -> AsyncGenerator[OutputDelta, None]:
        return self._journey.generate(request_id, request, closing)

    def refuse(self, request_id: RequestId, origin: Origin, error: ErrorInfo, waited_s: float) -> None:
        self._journey.refuse(request_id, origin, error, waited_s, None)

    def report(self, request_id: RequestId) -> RequestReport | None:
        return self.reports.find(request_id)

    def owners(self) -> dict[str, Callable[[], None]]:
        """Who owns something here, and how each checks itself (AssertionError when something is off)."""
        return {
            "prefix index": self.fleet.index.check_integrity,
            "live requests": self._journey.check_integrity,
            "submissions": self._links.check_integrity,
        }

    async def close(self) -> None:
        """Let go of all workers; what still runs there is cancelled with the streams."""
        await self._links.close()
        await self._rpc.close()
