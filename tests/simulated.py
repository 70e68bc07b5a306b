"""Workloads and workers for tests of the simulator, simple enough to be computed by hand."""

from collections.abc import Sequence
from dataclasses import replace

from load_generator.records import Record
from load_generator.summary import Slo
from load_generator.traces import PlannedRequest
from pdserve.contract.work import StepCost
from simulator.outcome import outcome_of
from simulator.system import Finished, SimulatedSystem, simulate
from simulator.timing import Timing

TIMING = Timing(
    name="by hand",
    source="chosen",
    cost=StepCost(fixed_s=0.010, per_prefill_token_s=0.001, per_decode_sequence_s=0.002),
    per_attention_pair_s=0.0,
    kv_bytes_per_token=100,
    link_bytes_per_s=100_000,
    pool_tokens=16 * 1000,
    chunk_tokens=64,
    step_budget_s=0.2,
    message_s=0.0,
    tail_share=0.25,
)
"""A step takes 10 ms, 1 ms more per prompt token and 2 ms more per sequence; a token's KV travels 1 ms."""


def asked(
    due_s: float, num_prompt: int, num_output: int, ids: Sequence[int] = (), block: int = 16
) -> PlannedRequest:
    return PlannedRequest(due_s, num_prompt, num_output, tuple(ids), block)


def unsplit(timing: Timing = TIMING, count: int = 1, policy: str = "round_robin") -> SimulatedSystem:
    return SimulatedSystem(timing, policy, num_unsplit=count, block_tokens=16)


def split(timing: Timing = TIMING, policy: str = "round_robin", pairs: int = 1) -> SimulatedSystem:
    return SimulatedSystem(timing, policy, pairs, pairs, block_tokens=16)


def served(planned: Sequence[PlannedRequest], system: SimulatedSystem) -> tuple[Finished, Sequence[Record]]:
    """The run and its records, after everything has come back."""
    finished = simulate(planned, system)
    finished.check_empty()
    return finished, outcome_of(finished, Slo(), "test", {}).result.records


def with_cost(**changes: float) -> Timing:
    return replace(TIMING, cost=replace(TIMING.cost, **changes))
