"""The sources that a decode worker's NIXL agent knows."""

import asyncio
from typing import NamedTuple

from pdserve.contract.errors import ProtocolViolation, StreamBroken
from pdserve.handoff.transports.nixl_agent import Descriptors, Memory, NixlAgent, ReadFailed

MAX_IDLE_REMOTES = 32
"""To how many sources a worker stays connected while no call uses them."""


class Source(NamedTuple):
    """A source's agent and where its pool lies."""

    agent: str
    metadata: bytes
    pool: Memory


class Remote:
    """A source, in use by some calls."""

    def __init__(self, agent: NixlAgent, source: Source) -> None:
        self.source = source
        self.num_calls = 0
        self.num_reads = 0  # posted and not ended
        self.broken = False  # a read has failed, or has not ended in time
        self._agent = agent

    @property
    def is_idle(self) -> bool:
        return not self.num_calls and not self.num_reads

    def read(self, sources: Descriptors, targets: Descriptors) -> "asyncio.Future[None]":
        """As `NixlAgent.read`."""
        self.num_reads += 1
        ended = self._agent.read(self.source.agent, self.source.pool.kind, sources, targets)
        ended.add_done_callback(self._count_ended)
        return ended

    def _count_ended(self, ended: "asyncio.Future[None]") -> None:
        self.num_reads -= 1
        if not ended.cancelled() and ended.exception() is not None:
            self.broken = True


class Remotes:
    """The sources that `agent` knows, by name, the least recently acquired first."""

    def __init__(self, agent: NixlAgent) -> None:
        self.agent = agent
        self._remotes: dict[str, Remote] = {}
        self._acquiring = asyncio.Lock()

    @property
    def broken(self) -> tuple[str, ...]:
        """Agents that nothing can be read from until everything that was has ended."""
        self._tidy()
        return tuple(name for name, remote in self._remotes.items() if remote.broken)

    async def acquire(self, source: Source) -> Remote:
        """The remote for one more call. Raises StreamBroken when it is broken, and ProtocolViolation when
        its description makes no sense."""
        async with self._acquiring:
            self._tidy()
            remote = self._remotes.pop(source.agent, None) or await self._add(source)
            self._remotes[source.agent] = remote
        if remote.source != source:
            raise ProtocolViolation(f"NIXL agent {source.agent} describes itself in two ways")
        if remote.broken:
            raise StreamBroken(f"an earlier read from NIXL agent {source.agent} failed and has not ended")
        remote.num_calls += 1
        return remote

    def release(self, remote: Remote) -> None:
        remote.num_calls -= 1
        self._tidy()

    async def _add(self, source: Source) -> Remote:
        try:
            name = await self.agent.add_remote(source.metadata)
        except ReadFailed as error:
            raise ProtocolViolation(str(error)) from error
        if name != source.agent:
            raise ProtocolViolation(f"NIXL agent {source.agent} gives the metadata of {name}")
        return Remote(self.agent, source)

    def _tidy(self) -> None:
        """Disconnect from the broken ones that nothing uses, and from idle ones that are too many."""
        idle = [remote for remote in self._remotes.values() if remote.is_idle]
        surplus = idle[: max(0, len(idle) - MAX_IDLE_REMOTES)]
        for remote in idle:
            if remote.broken or remote in surplus:
                del self._remotes[remote.source.agent]
                self.agent.forget_remote(remote.source.agent)
