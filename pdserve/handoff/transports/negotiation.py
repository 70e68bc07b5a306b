"""Which transport a pair of workers uses for a Prefill call."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from pdserve.contract.errors import ConfigError, ProtocolViolation, Unavailable
from pdserve.contract.messages import TransportChoice, TransportOffer
from pdserve.contract.ports import Handler
from pdserve.handoff.transports.base import Accepted, LocalSide, SegmentReceiver, ServesStreams, Transport
from pdserve.handoff.transports.cuda_ipc import CudaIpcTransport
from pdserve.handoff.transports.grpc_stream import GrpcStreamTransport
from pdserve.handoff.transports.kv_streams import KvStreams
from pdserve.handoff.transports.nixl import NixlTransport
from pdserve.handoff.transports.shared_memory import SharedMemoryTransport

DEFAULT_ORDER = (SharedMemoryTransport.name, GrpcStreamTransport.name)
"""Fastest first; gRPC works everywhere and is the last resort. Others are used where they are named."""


class Transports:
    """A worker's transports, best first. One object per worker, in both roles."""

    def __init__(self, side: LocalSide, order: Sequence[str] = DEFAULT_ORDER) -> None:
        """`order` is also the list of what is allowed. Raises ConfigError for an unknown or absent name."""
        known: dict[str, Callable[[LocalSide], Transport]] = {
            SharedMemoryTransport.name: SharedMemoryTransport,
            CudaIpcTransport.name: CudaIpcTransport,
            "process_group": _process_group,
            NixlTransport.name: NixlTransport,
            GrpcStreamTransport.name: GrpcStreamTransport,
        }
        _check_order(order, known)
        self._by_name = {name: known[name](side) for name in order}
        served = {name: one.serve for name, one in self._by_name.items() if isinstance(one, ServesStreams)}
        self.kv_handler: Handler = KvStreams(side.clock, served).serve
        """Serves the Kv streams that receivers open here."""

    def offers(self) -> tuple[TransportOffer, ...]:
        """What this worker can receive with, best first."""
        offers = (transport.offer() for transport in self._by_name.values())
        return tuple(offer for offer in offers if offer is not None)

    def choose(self, offers: Sequence[TransportOffer]) -> Accepted:
        """At the source: the best of its own transports that the receiver offers and the pair can use.

        The choice's reason says why not a better one. Raises Unavailable when nothing is left.
        """
        offered = {offer.name: offer for offer in offers}
        reasons: list[str] = []
        for name, transport in self._by_name.items():
            answer = transport.accept(offered[name]) if name in offered else None
            if isinstance(answer, Accepted):
                return _explain(answer, reasons)
            reasons.append(f"{name}: {answer.reason if answer else 'not offered'}")
        raise Unavailable(
            f"no transport in common ({'; '.join(reasons)}); allow grpc on both workers (transports)"
        )

    async def connect(self, choice: TransportChoice, source_address: str) -> SegmentReceiver:
        """At the decode worker, before Reserved is sent: its end of what the source chose.

        Raises StreamBroken when the source is not there, ProtocolViolation for what was never offered.
        """
        transport = self._by_name.get(choice.name)
        if transport is None:
            raise ProtocolViolation(f"the source chose the transport {choice.name!r}, which was not offered")
        return await transport.connect(choice, source_address)

    async def close(self) -> None:
        for transport in self._by_name.values():
            await transport.close()


def _process_group(side: LocalSide) -> Transport:
    # Only who names it needs torch.
    from pdserve.handoff.transports.process_group import ProcessGroupTransport

    return ProcessGroupTransport(side)


def _check_order(order: Sequence[str], known: Collection[str]) -> None:
    unknown = [name for name in order if name not in known]
    if unknown or not order:
        raise ConfigError(f"transports: {', '.join(unknown) or 'none given'}; choose from {', '.join(known)}")


def _explain(accepted: Accepted, reasons: Sequence[str]) -> Accepted:
    reason = "; ".join((accepted.choice.reason, *reasons))
    return Accepted(replace(accepted.choice, reason=reason), accepted.sender)
