"""What `pdserve check` says: whose books balance, and who holds KV."""

import asyncio

from controller.integrity import Holder, IntegrityReport, ProcessIntegrity, inspect
from controller.terminal import integrity_table
from pdserve.clock import run_virtual
from pdserve.handoff.ledger import HoldKind
from tests.memory_system import MemorySystem, greedy


def fails() -> None:
    raise AssertionError("2 blocks are missing")


def test_every_owner_is_asked_and_every_problem_named() -> None:
    report = inspect({"ledger": lambda: None, "allocator": fails, "holds": fails})
    assert report.checked == ("ledger", "allocator", "holds")
    assert report.problems == ("allocator: 2 blocks are missing", "holds: 2 blocks are missing")


def test_the_table_names_problems_holders_and_who_is_silent() -> None:
    holder = Holder("decode r-1/1", "active", 7)
    text = integrity_table(
        "default",
        [
            ProcessIntegrity("router-0", "ready", IntegrityReport(("prefix index",), ())),
            ProcessIntegrity("decode-0", "ready", IntegrityReport(("holds",), ("holds: off",), (holder,))),
            ProcessIntegrity("prefill-0", "silent", None),
        ],
    )
    assert text.splitlines() == [
        "default: the books of 1 of 3 processes balance",
        "router-0: ok: prefix index",
        "decode-0: WRONG: holds: off",
        "  7 blocks active for decode r-1/1",
        "prefill-0: no answer (silent)",
    ]


def test_a_running_request_shows_as_a_holder_and_a_stray_hold_as_a_problem() -> None:
    async def story() -> None:
        async with MemorySystem() as system:
            decode = system.workers["decode-0"]
            seen = []

            async def look() -> None:
                while decode.loop.running_sequences == 0:
                    await system.clock.sleep(0.001)
                seen.append(decode.inspect())

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(look())
                await system.generate(list(range(1, 10)), greedy(20))
            (report,) = seen
            assert report.problems == ()
            assert [(holder.kind, holder.num_blocks) for holder in report.holders] == [("active", 3)]
            await system.at_rest()
            stray = decode.ledger.open("decode lost/1", HoldKind.RESERVED)
            assert decode.inspect().problems == ("holds: held by no living call: decode lost/1",)
            stray.release()

    run_virtual(story())


def test_a_router_that_counts_wrong_says_so() -> None:
    async def story() -> None:
        async with MemorySystem() as system:
            await system.generate(list(range(1, 10)), greedy(3))
            await system.clock.sleep(2)
            router = system.router
            assert inspect(router.owners()).problems == ()
            shard = next(shard for shard in router.fleet.index._shards if shard)
            name, owners = shard.popitem()
            (problem,) = inspect(router.owners()).problems
            assert "are counted" in problem
            shard[name] = owners

    run_virtual(story())
