"""A process with one side of a stream, for tests that kill or freeze it.

python -m tests.contract.rpc_peer serve          prints its address, answers each message, takes KV bytes
python -m tests.contract.rpc_peer open ADDRESS   opens a Session, sends one message and waits
python -m tests.contract.rpc_peer end ADDRESS    the same, then sends End and waits
"""

import asyncio
import sys

from pdserve.contract.ids import Incarnation, RouterId
from pdserve.contract.messages import End, SessionOpen, SessionReady
from pdserve.contract.ports import Call, MessageStream
from pdserve.rpc.grpc_rpc import GrpcRpc
from tests.credentials import OURS


async def main(role: str, address: str) -> None:
    if role == "serve":
        server = await GrpcRpc(OURS).serve("127.0.0.1:0", {Call.SESSION: answer, Call.KV: take})
        print(server.address, flush=True)  # noqa: T201
        await asyncio.Event().wait()
    stream = await GrpcRpc(OURS).open(address, Call.SESSION)
    await stream.send(SessionOpen(RouterId("router-0"), Incarnation(1), Incarnation(2)))
    if role == "end":
        await stream.send(End())
    await asyncio.Event().wait()


async def answer(stream: MessageStream) -> None:
    while not isinstance(await stream.receive(), End):
        await stream.send(SessionReady(Incarnation(2)))
    await stream.send(End())


async def take(stream: MessageStream) -> None:
    while not isinstance(await stream.receive(), End):
        pass


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[-1]))
