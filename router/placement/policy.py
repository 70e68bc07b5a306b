"""What a placement policy is asked and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from pdserve.contract.ids import WorkerId
from router.placement.candidates import Candidate, Held, Pool


class PlacementRequest(NamedTuple):
    """What is to be placed. A tuple, like all that is made for every decision: a frozen dataclass takes three
    times as long to make."""

    num_tokens: int
    """Whose KV is needed: the prompt and, in a recovery, the output so far."""
    most_tokens: int
    """Prompt and output when the request runs to max_tokens."""
    expected_output_tokens: float = 1.0
    """How many output tokens are still to come, as far as one can tell."""
    alone: bool = False
    """It may have killed workers: it is not to use a prefill worker."""


@dataclass(frozen=True, slots=True)
class KvSpeeds:
    """How fast KV travels between workers, as measured."""

    default_s_per_token: float = 0.0
    """Of pairs that have not met yet."""
    s_per_token: Mapping[tuple[WorkerId, WorkerId], float] = field(default_factory=dict)
    """(prefill, decode) -> seconds per token."""

    def seconds(self, prefill: WorkerId, decode: WorkerId, num_tokens: int) -> float:
        """How long the KV of so many tokens travels."""
        return num_tokens * self.s_per_token.get((prefill, decode), self.default_s_per_token)


class FleetView(NamedTuple):
    """What the router believes about its workers while it places one request."""

    decode: Pool
    prefill: Pool
    held: Held = Held()
    """Of this request's prompt."""
    unusable_pairs: frozenset[tuple[WorkerId, WorkerId]] = frozenset()
    """(prefill, decode) pairs that must not be used: their last hand-off failed a moment ago."""
    kv_speeds: KvSpeeds = KvSpeeds()

    def may_pair(self, prefill: Candidate, decode: Candidate) -> bool:
        """Whether one can use the other's KV, and the hand-off between them works."""
        return (
            prefill.fingerprint == decode.fingerprint
            and (prefill.worker_id, decode.worker_id) not in self.unusable_pairs
        )


class Prediction(NamedTuple):
    """Of one way to serve a request. Seconds from its submission."""

    first_token_s: float
    second_token_s: float
    harm_s: float
    """By how much all sequences that run at the decode worker are delayed together."""


class Option(NamedTuple):
    """One way to serve a request. `prefill` None: the decode worker computes the prompt itself."""

    decode: WorkerId
    prefill: WorkerId | None
    predicted: Prediction


class Placement(NamedTuple):
    """`prefill` None: the decode worker computes the prompt itself."""

    decode: WorkerId
    prefill: WorkerId | None
    reason: str
    num_to_compute: int
    """Tokens that whoever computes the prompt does not hold yet."""
    predicted: Prediction | None = None
    """None where the policy itself does not predict; `foretold` does it for those."""
    runner_up: Option | None = None
    """The best of those not chosen; None where there is none, or the policy does not compare predictions."""


class PlacementPolicy(Protocol):
    """Chooses workers. Its only state is what it needs to rotate; its only randomness comes from an Rng."""

    def choose(self, request: PlacementRequest, fleet: FleetView) -> Placement | None:
        """Place a request; None when no decode worker can take it."""
        ...
