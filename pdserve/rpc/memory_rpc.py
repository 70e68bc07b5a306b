"""Rpc within one process: no thread, no socket and no real time, so it runs in virtual time as well.

Messages are passed as they are. Every MemoryRpc is a process on a host of a MemoryNetwork; addresses are
host:port. The network can be told to kill and freeze hosts, to cut connections, and how each message travels.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from pdserve.contract.errors import ConfigError
from pdserve.contract.messages import Message
from pdserve.contract.ports import Call, Handler, Refusal
from pdserve.rpc.channel import PEER_LOST_S
from pdserve.rpc.stream import BufferedStream, Direction, serve_stream
from pdserve.rpc.window import Window

WINDOW_MESSAGES = 16
"""Messages under way in one direction of a stream before its sender waits."""

Latency = Callable[[str, str, Message | None], float]
"""(from host, to host, message) -> seconds it travels; None is the news that a stream is broken."""


class Arrival(NamedTuple):
    """One coming of a message at its target."""

    delay_s: float
    message: Message | None
    """What comes; None are bytes that cannot be decoded, which breaks the stream."""
    in_order: bool = True
    """Not before what was sent earlier nor after what is sent later. Else it overtakes or is overtaken."""


class Leg(NamedTuple):
    """One direction of one stream."""

    stream: int
    """Streams of a network are numbered from 1."""
    call: Call
    source: str
    target: str


Carriage = Callable[[Leg, Message], Sequence[Arrival]]
"""How a message arrives: once as a rule, never, or more than once."""


def no_latency(source: str, target: str, message: Message | None) -> float:
    return 0.0


class MemoryNetwork:
    """The hosts that can reach each other, and what goes wrong between them. Hosts are named by their
    name or by any of their addresses."""

    def __init__(
        self,
        latency: Latency = no_latency,
        carriage: Carriage | None = None,
        peer_lost_s: float = PEER_LOST_S,
    ):
        """`carriage` says how messages travel, `latency` how long everything else does, and messages too
        when there is no `carriage`. A silent peer is given up after `peer_lost_s`."""
        self.latency = latency
        self.carriage = carriage or self._carry_once
        self.peer_lost_s = peer_lost_s
        self._processes: dict[MemoryRpc, None] = {}
        self._frozen: dict[str, list[Callable[[], None]]] = {}  # host -> what waits there, in order
        self._servers: dict[str, MemoryServer] = {}
        self._num_streams = 0
        self._links: dict[_Link, None] = {}  # in the order of opening, for reproducible runs
        self._cuts: set[frozenset[str]] = set()

    def kill(self, host: str) -> None:
        """As SIGKILL: nothing listens there any more, its streams break at both ends, its handlers are
        cancelled. A new MemoryRpc of that name may serve at the same addresses."""
        name = _host_of(host)
        for server in [server for server in self._servers.values() if server.host == name]:
            server.close_door()
        for process in [process for process in self._processes if process.host == name]:
            process.dead = True
            del self._processes[process]
        for link in [link for link in self._links if name in link.hosts]:
            link.lose(name)
        self.thaw(name)  # what waited there finds everything broken

    def freeze(self, host: str) -> None:
        """As SIGSTOP: whatever reaches the host waits. Its peers give it up as they give up a silent one."""
        name = _host_of(host)
        if name not in self._frozen:
            self._frozen[name] = []
            for link in self._links:
                link.expect_silence()

    def thaw(self, host: str) -> None:
        """As SIGCONT: everything that has waited arrives now, late, in the order in which it came."""
        waiting = self._frozen.pop(_host_of(host), [])
        for link in self._links:
            link.expect_silence()
        for event in waiting:
            event()

    def is_frozen(self, host: str) -> bool:
        return host in self._frozen

    def happen(self, host: str, event: Callable[[], None]) -> None:
        """Let `event` happen at a host: a message, news of a stream, a timer. At a frozen one it waits."""
        waiting = self._frozen.get(host)
        if waiting is None:
            event()
        else:
            waiting.append(event)

    def cut(self, a: str, b: str) -> None:
        """Nothing passes between two hosts. New streams fail; open ones break when keepalive notices,
        unless the cut heals before."""
        pair = frozenset((_host_of(a), _host_of(b)))
        self._cuts.add(pair)
        for link in self._between(pair):
            link.stall()

    def heal(self, a: str, b: str) -> None:
        pair = frozenset((_host_of(a), _host_of(b)))
        self._cuts.discard(pair)
        for link in self._between(pair):
            link.resume()

    def listen(self, server: "MemoryServer", port: int) -> str:
        """Register a server; port 0 takes a free one. Raises ConfigError when the address is in use."""
        address = f"{server.host}:{port or self._free_port(server.host)}"
        if address in self._servers:
            raise ConfigError(f"{address} is in use; choose another port or 0 for a free one")
        self._servers[address] = server
        return address

    def unlisten(self, server: "MemoryServer") -> None:
        if self._servers.get(server.address) is server:
            del self._servers[server.address]

    def connect(self, opener: "MemoryRpc", address: str, call: Call) -> BufferedStream[Message]:
        """Open a stream; it is broken from the start when nobody can be reached at `address`."""
        self._num_streams += 1
        link = _Link(self, self._num_streams, opener, address, call)
        server = self._servers.get(address)
        if opener.dead:
            link.client.break_off("this process was killed")
        elif frozenset(link.hosts) in self._cuts:
            link.client.break_off(f"{address} cannot be reached from {opener.host}")
        elif server is None:
            link.client.break_off(f"nothing listens at {address}")
        elif call not in server.handlers:
            link.client.break_off(f"{address} does not serve {call}")
        else:
            self._links[link] = None
            link.start(server)
            link.expect_silence()
        return link.client

    def opened_by(self, opener: "MemoryRpc") -> list[BufferedStream[Message]]:
        """The clients' sides of the streams that `opener` has opened and that are not over."""
        return [link.client for link in self._links if link.opener is opener]

    def join(self, process: "MemoryRpc") -> None:
        """A process that may open streams."""
        self._processes[process] = None

    def leave(self, process: "MemoryRpc") -> None:
        self._processes.pop(process, None)

    def forget(self, link: "_Link") -> None:
        self._links.pop(link, None)

    def _free_port(self, host: str) -> int:
        return next(port for port in itertools.count(1) if f"{host}:{port}" not in self._servers)

    def _between(self, pair: frozenset[str]) -> list["_Link"]:
        return [link for link in self._links if frozenset(link.hosts) == pair]

    def _carry_once(self, leg: Leg, message: Message) -> Sequence[Arrival]:
        return (Arrival(self.latency(leg.source, leg.target, message), message),)


class MemoryRpc:
    """Rpc of one process on a host of a MemoryNetwork."""

    def __init__(self, network: MemoryNetwork, host: str):
        self.host = host
        self.dead = False
        """Killed: it reaches nobody any more."""
        self._network = network
        network.join(self)

    async def open(self, address: str, call: Call) -> BufferedStream[Message]:
        return self._network.connect(self, address, call)

    async def serve(
        self, address: str, handlers: Mapping[Call, Handler], on_refusal: Refusal | None = None
    ) -> "MemoryServer":
        """Serve at the port of `address`; the host is always this one."""
        port = int(address.rpartition(":")[2])
        return MemoryServer(self._network, self.host, port, handlers, on_refusal)

    async def close(self) -> None:
        for stream in self._network.opened_by(self):
            stream.cancel()
        self._network.leave(self)


class MemoryServer:
    """Serves streams of a MemoryNetwork at one address."""

    def __init__(
        self,
        network: MemoryNetwork,
        host: str,
        port: int,
        handlers: Mapping[Call, Handler],
        on_refusal: Refusal | None,
    ):
        self.host = host
        self.handlers = dict(handlers)
        self._network = network
        self._on_refusal = on_refusal
        self._serving: dict[asyncio.Task[None], None] = {}  # in order, for reproducible runs
        self._closed = False
        self._address = network.listen(self, port)

    @property
    def address(self) -> str:
        return self._address

    def accept(self, call: Call, link: "_Link") -> None:
        """A stream has arrived."""
        if self._closed or link.server.broken:
            link.complete()
            return
        task = asyncio.ensure_future(self._serve(self.handlers[call], link))
        self._serving[task] = None
        task.add_done_callback(self._serving.pop)

    def close_door(self) -> None:
        """Take no new streams."""
        self._closed = True
        self._network.unlisten(self)

    async def stop(self, grace_s: float) -> None:
        self.close_door()
        if self._serving:
            await asyncio.wait(self._serving, timeout=grace_s)
        still_open = list(self._serving)
        for task in still_open:
            task.cancel()
        await asyncio.gather(*still_open, return_exceptions=True)

    async def _serve(self, handler: Handler, link: "_Link") -> None:
        try:
            await serve_stream(handler, link.server, self._on_refusal)
        finally:
            link.complete()


class _Link:
    """Both sides of one stream and the two directions between them."""

    def __init__(self, network: MemoryNetwork, number: int, opener: MemoryRpc, address: str, call: Call):
        self.opener = opener
        self._network = network
        self._call = call
        self._client_host = opener.host
        self._server_host = _host_of(address)
        self._up = _Route(network, Leg(number, call, self._client_host, self._server_host))
        self._down = _Route(network, Leg(number, call, self._server_host, self._client_host))
        self._is_cut = False
        self._keepalive: asyncio.TimerHandle | None = None
        self.client = _MemoryStream(address, call, Direction.UP, self._up, self._down)
        self.server = _MemoryStream(self._client_host, call, Direction.DOWN, self._down, self._up)
        self.client.connect(self.server, self._client_cancelled)
        self.server.connect(self.client, self._server_cancelled)

    @property
    def hosts(self) -> tuple[str, str]:
        return self._client_host, self._server_host

    def start(self, server: MemoryServer) -> None:
        self._up.carry(lambda: server.accept(self._call, self))

    def complete(self) -> None:
        """The server's side has ended, well or not."""
        self._down.carry(self._server_left)

    def lose(self, host: str) -> None:
        """The process at `host` is gone: its side breaks now, the other one when the news arrives."""
        if host == self._client_host:
            self.client.break_off("this process was killed", drop=True)
            self._client_cancelled()
        if host == self._server_host:
            self.server.break_off("this process was killed", drop=True)
            self._server_cancelled()

    def stall(self) -> None:
        """Nothing passes; when that lasts, both sides notice."""
        self._is_cut = True
        self._up.stall()
        self._down.stall()
        self.expect_silence()

    def resume(self) -> None:
        if self._is_cut:
            self._is_cut = False
            self.expect_silence()
            self._up.resume()
            self._down.resume()

    def expect_silence(self) -> None:
        """Begin or end the wait for a sign of life, as the link is cut or an end of it is frozen or not."""
        silent = self._is_cut or any(map(self._network.is_frozen, self.hosts))
        if silent and self._keepalive is None:
            loop = asyncio.get_running_loop()
            self._keepalive = loop.call_later(self._network.peer_lost_s, self._time_out)
        elif not silent and self._keepalive is not None:
            self._keepalive.cancel()
            self._keepalive = None

    def _client_cancelled(self) -> None:
        self._up.carry(lambda: self.server.break_off(f"{self._client_host} gave up or died"))

    def _server_cancelled(self) -> None:
        self._down.carry(lambda: self.client.break_off(f"{self._server_host} gave up or died"))

    def _server_left(self) -> None:
        self._forget()
        how = "has ended the stream" if self.client.end_arrived else "left without an End message"
        self.client.break_off(f"{self._server_host} {how}")

    def _time_out(self) -> None:
        self._forget()
        client, server = self._client_host, self._server_host
        self._network.happen(client, lambda: self.client.break_off(f"{server} does not answer"))
        self._network.happen(server, lambda: self.server.break_off(f"{client} does not answer"))

    def _forget(self) -> None:
        if self._keepalive is not None:
            self._keepalive.cancel()
        self._network.forget(self)


class _Route:
    """One direction of a stream: events arrive in the order in which they were sent, but for messages that
    the network's carriage takes out of it."""

    def __init__(self, network: MemoryNetwork, leg: Leg):
        self.window: Window[Message] = Window(WINDOW_MESSAGES)
        self._network = network
        self._leg = leg
        self._travelling: deque[Callable[[], None]] = deque()  # in order
        self._last_arrival = 0.0
        self._stalled = False
        self._held: list[Callable[[], None]] = []  # arrived while stalled

    def carry(self, event: Callable[[], None]) -> None:
        """Let `event` happen at the target when the news of it has travelled."""
        self._send(event, self._network.latency(self._leg.source, self._leg.target, None))

    def carry_message(
        self, message: Message, arrive: Callable[[Message], None], fail: Callable[[], None]
    ) -> None:
        """Let `message` arrive, as often as the network's carriage says; `fail` when it cannot be decoded."""
        arrivals = self._network.carriage(self._leg, message)
        if len(arrivals) != 1:
            self.window.expect(len(arrivals) - 1)
        for delay_s, arriving, in_order in arrivals:
            event = fail if arriving is None else partial(arrive, arriving)
            self._send(event, delay_s, in_order)

    def stall(self) -> None:
        self._stalled = True

    def resume(self) -> None:
        self._stalled = False
        held, self._held = self._held, []
        for event in held:
            self._network.happen(self._leg.target, event)

    def _send(self, event: Callable[[], None], delay_s: float, in_order: bool = True) -> None:
        if not in_order:
            asyncio.get_running_loop().call_later(delay_s, self._arrive, event)
        elif delay_s <= 0 and not self._travelling:
            self._arrive(event)
        else:
            loop = asyncio.get_running_loop()
            self._last_arrival = max(self._last_arrival, loop.time() + delay_s)
            self._travelling.append(event)
            loop.call_at(self._last_arrival, self._arrive_next)

    def _arrive_next(self) -> None:
        self._arrive(self._travelling.popleft())

    def _arrive(self, event: Callable[[], None]) -> None:
        if self._stalled:
            self._held.append(event)
        else:
            self._network.happen(self._leg.target, event)


class _MemoryStream(BufferedStream[Message]):
    """One side of a link; its outbox is the other side's inbox."""

    def __init__(self, peer: str, call: Call, sends: Direction, outgoing: "_Route", incoming: "_Route"):
        super().__init__(peer, call, sends, inbox=incoming.window, outbox=outgoing.window)
        self._outgoing = outgoing
        self._other: BufferedStream[Message]
        self._tell_other: Callable[[], None]

    def connect(self, other: "_MemoryStream", tell_other: Callable[[], None]) -> None:
        """`tell_other` lets the other side know that this one gave up."""
        self._other = other
        self._tell_other = tell_other

    async def _put(self, message: Message) -> None:
        await self._outbox.reserve()
        self._outgoing.carry_message(message, self._other.arrive, self._fail_to_decode)

    def _on_cancel(self) -> None:
        self._tell_other()

    def _fail_to_decode(self) -> None:
        """At the other side: it breaks the stream, and this side hears of it."""
        if not self._other.finished and not self._other.broken:
            self._other.break_off(f"what {self._other.peer} sent cannot be decoded")
            self._other._on_cancel()


def _host_of(name: str) -> str:
    """`name` is a host or an address of it."""
    return name.rpartition(":")[0] or name
