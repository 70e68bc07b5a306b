"""What the router believes, and what makes it stop believing."""

from collections import Counter
from dataclasses import replace

import pytest

from pdserve.clock import SeededRng
from pdserve.contract.ids import BlockHash, Incarnation, SubmitNumber, WorkerId
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
from pdserve.contract.work import BlockCounts, ModelInfo
from pdserve.engine.fake_engine import DEFAULT_COST, FakeEngine
from router.bookings import Booked, Sum
from router.fleet import PAIR_TIMEOUT_S, Fate, Fleet, Identity, WorkerView
from router.placement.longest_prefix import LongestPrefix
from router.placement.policy import PlacementRequest
from router.placement.predicted import Predicted

INFO = FakeEngine(num_blocks=8).info
LOAD = WorkerLoad(
    WorkerState.READY,
    0,
    0,
    0,
    0,
    BlockCounts(8, 0, 0, 0),
    0,
    SubmitNumber(0),
    prefill_tokens_per_s=0,
    decode_step_s=0,
    prefill_slowdown=1,
    decode_slowdown=1,
)


def member(name: str, incarnation: int = 1, role: Role = Role.DECODE) -> Member:
    return Member(WorkerId(name), f"{name}:1", Incarnation(incarnation), role, "", WorkerState.READY)


def report(incarnation: int, stored: tuple[int, ...] = (), **fields: object) -> Report:
    names = tuple(BlockHash(name) for name in stored)
    xor = 0
    for name in names:
        xor ^= name
    base = Report(Incarnation(incarnation), names, (), len(names), xor, LOAD)
    return replace(base, **fields)  # type: ignore[arg-type]


def hello_of(view: WorkerView, incarnation: int, info: ModelInfo) -> Hello:
    member = view.member
    return Hello(member.worker_id, Incarnation(incarnation), member.role, info, b"", DEFAULT_COST, 0.5)


def connect(
    fleet: Fleet, name: str, incarnation: int = 1, stored: tuple[int, ...] = (), num_blocks: int = 8
) -> WorkerView:
    view = fleet.workers[WorkerId(name)]
    info = replace(INFO, num_blocks=num_blocks)
    fleet.hello(view, hello_of(view, incarnation, info))
    assert fleet.report(view, report(incarnation, stored), now=1.0)
    fleet.connected(view)
    return view


def test_a_worker_is_usable_only_while_connected_and_ready() -> None:
    fleet = Fleet()
    fleet.set_members(Members(1, (member("d0"),)))
    view = connect(fleet, "d0", stored=(5, 6))
    assert view.usable
    names = [BlockHash(5), BlockHash(6)]
    seen = fleet.view(names, 4, now=1.0)
    (candidate,) = seen.decode
    assert seen.held.tokens(candidate) == 8
    assert list(seen.prefill) == []
    fleet.report(
        view, report(1, load=replace(LOAD, state=WorkerState.DRAINING), num_names=2, xor_names=3), now=2.0
    )
    assert not view.usable
    fleet.lost(view)
    assert list(fleet.view(names, 4, now=3.0).decode) == []
    assert fleet.index.holders(names) == []


def test_an_old_membership_is_dropped_and_a_new_incarnation_starts_afresh() -> None:
    fleet = Fleet()
    fleet.set_members(Members(2, (member("d0"), member("d1"))))
    old = connect(fleet, "d0")
    fleet.set_members(Members(1, ()))
    assert set(fleet.workers) == {"d0", "d1"}
    fleet.set_members(Members(3, (member("d0", incarnation=2),)))
    assert set(fleet.workers) == {"d0"}
    assert fleet.workers[WorkerId("d0")] is not old
    assert not old.usable


def test_an_index_that_lost_count_is_noticed() -> None:
    fleet = Fleet()
    fleet.set_members(Members(1, (member("d0"),)))
    view = connect(fleet, "d0", stored=(5,))
    assert not fleet.report(view, report(1, num_names=7), now=2.0)
    assert fleet.num_index_mismatches == 1


def test_what_was_sent_after_the_last_report_comes_on_top_of_it() -> None:
    fleet = Fleet()
    fleet.set_members(Members(1, (member("d0"),)))
    view = connect(fleet, "d0")
    fleet.book(WorkerId("d0"), "a", Booked(0, 30, SubmitNumber(1)))
    fleet.book(WorkerId("d0"), "b", Booked(5, 12, SubmitNumber(2)))
    assert view.to_do == Sum(2, 5, 42)  # it has reported neither
    busy = replace(LOAD, running_sequences=3, waiting_tokens=40, running_context_tokens=60)
    fleet.report(view, report(1, load=replace(busy, last_submit=SubmitNumber(1))), now=2.0)
    assert view.to_do == Sum(3 + 1, 40 + 5, 60 + 12)  # of others it has more, and b is on its way
    (candidate,) = fleet.view([], 4, now=2.0).decode
    assert (candidate.queued_prefill_tokens, candidate.running_sequences) == (45, 4)
    assert (candidate.context_tokens, candidate.queued_tokens) == (72, 45 + 72)
    fleet.report(view, report(1, load=replace(busy, last_submit=SubmitNumber(2))), now=3.0)
    assert view.to_do == Sum(3, 40, 60)
    fleet.report(view, report(1, load=replace(LOAD, last_submit=SubmitNumber(2))), now=4.0)
    assert view.to_do == Sum(2, 0, 42)  # a is computed elsewhere at the moment, b's prompt has been computed
    fleet.prefill_is_done(view, "b")
    assert view.to_do == Sum(2, 0, 42)
    view.booked.check_integrity()
    fleet.release(view, "a")
    fleet.release(view, "b")
    assert (len(view.booked), view.to_do) == (0, Sum())


def test_a_prefill_worker_counts_what_it_reports_or_what_was_sent_there() -> None:
    fleet = Fleet()
    fleet.set_members(Members(1, (member("p0", role=Role.PREFILL),)))
    view = connect(fleet, "p0")
    fleet.book(WorkerId("p0"), "a", Booked(30, 0))
    assert view.to_do == Sum(1, 30, 0)
    load = replace(LOAD, waiting_tokens=40, running_context_tokens=60)
    fleet.report(view, report(1, load=load), now=2.0)
    assert view.to_do == Sum(1, 40, 0)
    (candidate,) = fleet.view([], 4, now=2.0).prefill
    assert (candidate.queued_tokens, candidate.running_sequences) == (40, 0)


def test_of_a_prompt_that_is_being_computed_only_the_rest_counts() -> None:
    fleet = Fleet()
    fleet.set_members(Members(1, (member("p0", role=Role.PREFILL), member("d0", 2))))
    prefill, decode = connect(fleet, "p0"), connect(fleet, "d0", 2)

    def waiting(view: WorkerView, num_tokens: int) -> int:
        load = replace(LOAD, waiting_tokens=num_tokens, last_submit=SubmitNumber(1))
        fleet.report(view, report(view.member.incarnation, load=load), now=2.0)
        return view.to_do.prefill_tokens

    fleet.book(WorkerId("p0"), "a", Booked(1000, 0))
    assert waiting(prefill, 0) == 1000  # it may not have heard of it yet
    assert waiting(prefill, 900) == 900
    assert waiting(prefill, 100) == 100
    fleet.book(WorkerId("p0"), "b", Booked(50, 0))
    assert prefill.to_do.prefill_tokens == 150
    fleet.book(WorkerId("d0"), "c", Booked(1000, 1000, SubmitNumber(1)))
    assert waiting(decode, 100) == 100
    fleet.release(prefill, "b")
    assert prefill.to_do.prefill_tokens == 100
    assert waiting(prefill, 0) == 0


@pytest.mark.parametrize("num_workers", [5, 20])
def test_idle_workers_take_turns_so_that_all_caches_fill(num_workers: int) -> None:
    fleet = Fleet()
    fleet.set_members(Members(1, tuple(member(f"d{number}", number) for number in range(num_workers))))
    for number in range(num_workers):
        connect(fleet, f"d{number}", number)
    policy = Predicted(SeededRng(1))
    placed: Counter[str] = Counter()
    for number in range(1, 10 * num_workers + 1):
        placement = policy.choose(PlacementRequest(8, 10, 2.0), fleet.view([], 4, now=2.0))
        assert placement is not None
        placed[placement.decode] += 1
        view = fleet.book(placement.decode, number, Booked(8, 8, SubmitNumber(number)))
        fleet.release(view, number)
    assert len(placed) == num_workers
    assert max(placed.values()) <= 20


def test_a_replaced_worker_loses_its_place_to_the_new_process_alone() -> None:
    fleet = Fleet()
    fleet.set_members(Members(1, (member("d0"),)))
    old = connect(fleet, "d0")
    fleet.book(WorkerId("d0"), "a", Booked(0, 30, SubmitNumber(1)))
    fleet.set_members(Members(2, (member("d0", incarnation=2),)))
    assert list(fleet.view([], 4, now=1.0).decode) == []
    connect(fleet, "d0", incarnation=2)
    fleet.release(old, "a")
    (candidate,) = fleet.view([], 4, now=1.0).decode
    assert candidate.num_requests == 0


def test_a_prompt_on_its_way_counts_as_held_until_the_worker_reports_that_it_is() -> None:
    fleet = Fleet()
    fleet.set_members(Members(1, (member("p0", role=Role.PREFILL),)))
    view = connect(fleet, "p0", num_blocks=100)
    names = [BlockHash(number) for number in range(1, 41)]
    sibling = [*names[:33], BlockHash(99)]

    def held() -> int:
        seen = fleet.view(sibling, 4, now=1.0)
        (candidate,) = seen.prefill
        return seen.held.tokens(candidate)

    assert held() == 0
    fleet.book(WorkerId("p0"), "a", Booked(160, 0), names)
    assert held() == 32 * 4  # noted at every 32nd block
    fleet.book(WorkerId("p0"), "b", Booked(8, 0), sibling)
    fleet.release(view, "b")
    assert held() == 32 * 4
    fleet.prefill_is_done(view, "a")
    fleet.release(view, "a")
    assert held() == 32 * 4  # computed, and not reported yet
    fleet.report(view, report(1, tuple(names)), now=2.0)
    assert held() == 33 * 4
    fleet.book(WorkerId("p0"), "c", Booked(160, 0), [BlockHash(7), BlockHash(8)])
    fleet.lost(view)
    assert not view.pending


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 31, 32, 33, 50])
def test_a_twin_follows_a_prompt_on_its_way_to_its_end_and_siblings_as_far_as_they_share(
    num_blocks: int,
) -> None:
    fleet = Fleet()
    fleet.set_members(Members(1, (member("p0", role=Role.PREFILL),)))
    connect(fleet, "p0")
    names = [BlockHash(number) for number in range(1, num_blocks + 1)]
    fleet.book(WorkerId("p0"), "a", Booked(4 * num_blocks, 0), names)
    assert fleet.view(names, 4, now=2.0).held.depths == [(4 * num_blocks, 1)]
    longer = [*names, BlockHash(98), BlockHash(99)]
    ((depth, _),) = fleet.view(longer, 4, now=2.0).held.depths
    assert num_blocks / 2 <= depth / 4 <= num_blocks


def test_a_sibling_on_its_way_is_still_followed_when_the_first_one_is_cancelled() -> None:
    fleet = Fleet()
    fleet.set_members(Members(1, (member("p0", role=Role.PREFILL),)))
    view = connect(fleet, "p0")
    names = [BlockHash(1), BlockHash(2)]
    attempts = ("a", "b", "c")
    for attempt in attempts:
        fleet.book(WorkerId("p0"), attempt, Booked(8, 0), names)
    held = []
    for attempt in attempts:
        held.append(fleet.view(names, 4, now=2.0).held.depths)
        fleet.release(view, attempt)
    assert held == [[(8, 1)]] * 3
    assert fleet.view(names, 4, now=2.0).held.depths == []


def test_prompts_on_their_way_to_a_worker_that_is_counted_anew_are_not_taken_for_anothers() -> None:
    fleet = Fleet()
    fleet.set_members(Members(1, (member("p0", 1, Role.PREFILL), member("p1", 2, Role.PREFILL))))
    view = connect(fleet, "p0", 1)
    names = [BlockHash(1), BlockHash(2)]
    fleet.book(WorkerId("p0"), "a", Booked(8, 0), names)
    fleet.hello(view, hello_of(view, 1, INFO))  # its Watch stream starts anew, and it gets another bit
    for now in range(256):  # its former bit is swept and given away
        fleet.report(view, report(1), now=2.0 + now)
    connect(fleet, "p1", 2)
    seen = fleet.view(names, 4, now=300.0)
    held = {each.worker_id: seen.held.tokens(each) for each in seen.prefill}
    assert held == {"p0": 8, "p1": 0}
    fleet.prefill_is_done(view, "a")
    fleet.release(view, "a")
    fleet.report(view, report(1), now=301.0)
    assert fleet.view(names, 4, now=302.0).held.depths == []


def test_the_largest_pool_that_decodes_bounds_requests_and_small_pools_get_no_long_ones() -> None:
    fleet = Fleet()
    assert fleet.model_info() is None
    fleet.set_members(Members(1, (member("p0", role=Role.PREFILL), member("d0"), member("d1"))))
    connect(fleet, "p0", num_blocks=64)
    connect(fleet, "d0", num_blocks=8)
    connect(fleet, "d1", num_blocks=16)
    info = fleet.model_info()
    assert info is not None
    assert info.num_blocks == 16
    policy = LongestPrefix()
    seen = fleet.view([], 4, now=1.0)
    chosen = {num: [policy.choose(PlacementRequest(1, num), seen) for _ in "12"] for num in (32, 33, 65)}
    names = {num: {placed.decode for placed in both if placed} for num, both in chosen.items()}
    assert names == {32: {"d0", "d1"}, 33: {"d1"}, 65: set()}


@pytest.mark.parametrize(("later_s", "usable"), [(PAIR_TIMEOUT_S - 0.1, False), (PAIR_TIMEOUT_S, True)])
def test_a_failed_pair_rests_for_a_while(later_s: float, usable: bool) -> None:
    fleet = Fleet()
    fleet.pair_failed(WorkerId("p0"), WorkerId("d0"), now=10.0)
    assert (fleet.unusable_pairs(10.0 + later_s) == frozenset()) is usable


def test_a_pair_that_was_refused_rests_until_a_worker_is_replaced() -> None:
    fleet = Fleet()
    fleet.set_members(Members(1, (member("p0", role=Role.PREFILL), member("d0"))))
    fleet.pair_refused(WorkerId("p0"), WorkerId("d0"))
    fleet.pair_failed(WorkerId("p0"), WorkerId("d0"), now=10.0)  # what was under way fails later
    assert fleet.unusable_pairs(1e9) == {("p0", "d0")}
    fleet.set_members(Members(2, (member("p0", 2, Role.PREFILL), member("d0"))))
    assert fleet.unusable_pairs(10.0) == frozenset()


def test_of_workers_that_have_gone_nothing_is_kept() -> None:
    fleet = Fleet()
    fleet.set_members(Members(1, (member("p0", role=Role.PREFILL), member("d0", 2))))
    prefill, decode = connect(fleet, "p0"), connect(fleet, "d0", 2)
    default = fleet.view([], 4, now=1.0).kv_speeds.default_s_per_token
    fleet.pair_refused(WorkerId("p0"), WorkerId("d0"))
    fleet.set_members(Members(2, (member("d0", 2),)))
    timings = RequestTimings(transfer_s=1.0, transfer_bytes=10, transfer_is_whole=True)
    fleet.kv_has_come(prefill, decode, "a", timings)  # its last words come after it
    assert fleet.unusable_pairs(2.0) == frozenset()
    speeds = fleet.view([], 4, now=2.0).kv_speeds
    assert speeds.s_per_token == {}
    assert speeds.default_s_per_token == default


def test_a_new_incarnation_has_not_failed_yet() -> None:
    fleet = Fleet()
    fleet.set_members(Members(1, (member("p0", role=Role.PREFILL), member("d0"), member("d1"))))
    for decode in ("d0", "d1"):
        fleet.pair_failed(WorkerId("p0"), WorkerId(decode), now=10.0)
    fleet.set_members(
        Members(2, (member("p0", role=Role.PREFILL), member("d0", incarnation=2), member("d1")))
    )
    assert fleet.unusable_pairs(10.0) == {("p0", "d1")}
    fleet.set_members(Members(3, (member("p0", 2, Role.PREFILL), member("d0", incarnation=2), member("d1"))))
    assert fleet.unusable_pairs(10.0) == frozenset()


def test_what_is_served_stays_known_while_all_workers_are_replaced() -> None:
    """So a request that comes in between waits instead of being refused."""
    fleet = Fleet()
    assert fleet.model_info() is None
    fleet.set_members(Members(1, (member("d0"),)))
    assert fleet.model_info() is None
    connect(fleet, "d0", num_blocks=5)
    fleet.set_members(Members(2, ()))
    fleet.set_members(Members(3, (member("d0", incarnation=2),)))
    info = fleet.model_info()
    assert info is not None
    assert info.num_blocks == 5
    connect(fleet, "d0", incarnation=2, num_blocks=7)
    assert fleet.model_info() == replace(INFO, num_blocks=7)


def test_a_worker_whose_steps_stand_still_with_work_to_do_is_not_used_until_they_go_on() -> None:
    fleet = Fleet()
    fleet.set_members(Members(1, (member("d0"),)))
    view = connect(fleet, "d0")
    busy = replace(LOAD, running_sequences=3, step=7)
    for now in (2.0, 8.0, 13.0):
        fleet.report(view, report(1, load=busy), now)
        assert view.usable
    fleet.report(view, report(1, load=busy), now=14.5)
    assert view.hangs
    assert not view.usable
    fleet.lost(view)
    connect(fleet, "d0")
    fleet.report(view, report(1, load=replace(busy, running_sequences=0)), now=16.0)
    assert not view.usable  # its requests were cancelled, and the step still has not ended
    fleet.report(view, report(1, load=replace(busy, step=8)), now=17.0)
    assert view.usable


def test_a_worker_without_work_may_stand_still() -> None:
    fleet = Fleet()
    fleet.set_members(Members(1, (member("d0"),)))
    view = connect(fleet, "d0")
    for now in (2.0, 50.0, 100.0):
        fleet.report(view, report(1), now)
        assert view.usable


def test_a_process_is_dead_only_when_the_controller_has_let_it_go_without_a_word_before() -> None:
    fleet = Fleet()
    fleet.set_members(Members(1, (member("d0"), member("d1", incarnation=5))))
    crashed, stopped = connect(fleet, "d0"), connect(fleet, "d1", 5)
    who = crashed.identity
    assert fleet.fate(who) is Fate.ALIVE
    fleet.lost(crashed)
    assert fleet.fate(who) is Fate.UNKNOWN
    fleet.report(stopped, report(5, load=replace(LOAD, state=WorkerState.DRAINING)), now=2.0)
    fleet.lost(stopped)
    fleet.set_members(Members(2, (member("d0", incarnation=2),)))
    assert fleet.fate(who) is Fate.DEAD
    assert fleet.fate(Identity(WorkerId("d1"), Incarnation(5))) is Fate.EXCUSED


def test_who_goes_with_its_whole_host_is_excused() -> None:
    fleet = Fleet()
    here = [
        replace(member(name, number), address=f"here:{number}") for number, name in enumerate(["d0", "d1"], 1)
    ]
    fleet.set_members(Members(1, (*here, member("d2", 3))))
    first, second, _ = connect(fleet, "d0", 1), connect(fleet, "d1", 2), connect(fleet, "d2", 3)
    fleet.lost(first)
    assert fleet.fate(first.identity) is Fate.UNKNOWN
    fleet.lost(second)
    assert fleet.fate(first.identity) is Fate.EXCUSED
