"""The main of a process that talks to a running system through Ray, as pdserve's own commands do, for a test
that does so often: a line of JSON per question on stdin, and one per answer on stdout."""

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

from controller.commands import running_controller
from pdserve.config import FaultConfig
from pdserve.contract.errors import PdserveError

if TYPE_CHECKING:  # it imports Ray, whose settings have to be in the environment by then
    from controller.remote import RemoteController


async def main() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    async with running_controller("default", None) as controller:
        _say({"ready": True})
        while line := await reader.readline():
            try:
                _say(await _answer(controller, json.loads(line)))
            except PdserveError as error:
                _say({"error": str(error)})


async def _answer(controller: "RemoteController", question: dict[str, Any]) -> dict[str, Any]:
    match question:
        case {"arm": fields}:
            return {"armed": await controller.arm(FaultConfig.model_validate(fields))}
        case {"follow": version, "within_s": seconds}:
            try:
                async with asyncio.timeout(seconds):
                    status = await controller.follow(version)
            except TimeoutError:
                return {}
            return {"version": status.version, **status.as_json()}
        case {"status": _}:
            status = await controller.status()
            return {"version": status.version, **status.as_json()}
        case {"check": _}:
            return {"processes": [answer.as_json() for answer in await controller.check_integrity()]}
        case other:
            raise ValueError(f"{other} is no question")


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
