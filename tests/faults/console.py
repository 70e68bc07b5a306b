"""The main of a process that talks to a running system through Ray, as pdserve's own commands do, for a test
that does so often: a line of JSON per question on stdin, and one per answer on stdout."""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controller.commands import running_controller
from controller.model_files import resolve_model
from controller.pool_commands import has_left, have_their_size, is_rolled_out
from controller.status import SystemStatus
from pdserve.config import FaultConfig, load_config
from pdserve.contract.errors import PdserveError

if TYPE_CHECKING:  # it imports Ray, whose settings have to be in the environment by then
    from controller.remote import RemoteController


CONFIG_NAME = "rehearsal.yaml"
"""The system's configuration, in its runtime folder."""


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
        case {"scale": sizes, "deadline_s": deadline_s}:
            await _until(controller, await controller.scale(sizes, deadline_s), have_their_size)
            return {"done": True}
        case {"drain": worker, "deadline_s": deadline_s}:
            pid = await controller.drain(worker, deadline_s)
            await _until(controller, await controller.status(), lambda status: has_left(status, worker, pid))
            return {"done": True}
        case {"roll_out": settings, "deadline_s": deadline_s}:
            config = load_config(Path(os.environ["XDG_RUNTIME_DIR"]) / CONFIG_NAME, settings)
            status = await controller.roll_out(config, resolve_model(config, fetch=True), deadline_s)
            await _until(controller, status, is_rolled_out)
            return {"done": True}
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


async def _until(
    controller: "RemoteController", status: SystemStatus, is_done: Callable[[SystemStatus], bool]
) -> None:
    while not is_done(status):
        status = await controller.follow(status.version)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
