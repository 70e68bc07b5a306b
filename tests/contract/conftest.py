"""Fixtures of the contract suites."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import pytest

from pdserve.contract.ports import Rpc
from pdserve.rpc.grpc_rpc import GrpcRpc
from pdserve.rpc.memory_rpc import MemoryNetwork, MemoryRpc
from tests.contract.rpc_pair import Pair, no_new_tasks
from tests.credentials import OURS


@pytest.fixture(params=["memory", "grpc"])
async def pair(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Pair]:
    """Whatever a test does to streams, nothing is left running and nobody complains in the log."""
    network = MemoryNetwork()
    makers: dict[str, Callable[[str], Rpc]] = {
        "memory": lambda host: MemoryRpc(network, host),
        "grpc": lambda host: GrpcRpc(OURS),
    }
    pair = Pair(makers[request.param])
    before = asyncio.all_tasks()
    yield pair
    await pair.close()
    await no_new_tasks(before)
    assert not [record for record in caplog.get_records("call") if record.levelno >= logging.WARNING]
