"""The placement policies by name."""

from collections.abc import Callable, Mapping

from pdserve.contract.ports import Rng
from router.placement.balancing import LeastLoaded, PowerOfTwo, RoundRobin
from router.placement.block_cost import DynamoCost
from router.placement.cache_aware import SglangCacheAware
from router.placement.foretold import Foretold
from router.placement.longest_prefix import LongestPrefix
from router.placement.policy import PlacementPolicy
from router.placement.predicted import Predicted

DEFAULT_POLICY = "longest_prefix"

POLICIES: Mapping[str, Callable[[Rng], PlacementPolicy]] = {
    "predicted": Predicted,
    "longest_prefix": lambda _: LongestPrefix(),
    "round_robin": lambda _: RoundRobin(),
    "least_loaded": lambda _: LeastLoaded(),
    "power_of_two": PowerOfTwo,
    "sglang_cache_aware": lambda _: SglangCacheAware(),
    "dynamo": lambda _: DynamoCost(),
}


def make_policy(name: str, rng: Rng) -> PlacementPolicy:
    """A policy of that name, all of whose placements have a prediction; `rng` is what it draws from. Raises
    KeyError for a name that is none."""
    policy = POLICIES[name](rng)
    return policy if isinstance(policy, Predicted) else Foretold(policy)
