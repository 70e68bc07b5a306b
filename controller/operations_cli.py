"""The command line for those who run a system: pdserve scale | drain | rollout | fault."""

import argparse
import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from pdserve.config import load_config
from pdserve.contract.errors import ConfigError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

AddCommand = Callable[["Commands", str, str, str], argparse.ArgumentParser]
"""Adds a command: of which, its name, what it does, and examples."""


def add_operations(commands: "Commands", command: AddCommand) -> None:
    """Add all of them; `command` makes a parser that looks like those of the other commands."""
    _add_scale(commands, command)
    _add_drain(commands, command)
    _add_rollout(commands, command)
    _add_fault(commands, command)


def _add_scale(commands: "Commands", command: AddCommand) -> None:
    examples = "  pdserve scale prefill=3 decode=5\n  pdserve scale decode=2 --deadline 120\n"
    text = "give pools another number of workers, and wait until they have it"
    scale = command(commands, "scale", text, examples)
    scale.add_argument("sizes", metavar="POOL=N", nargs="+", help="prefill=N, decode=M")
    _add_deadline(scale)
    scale.set_defaults(run=_scale)


def _add_drain(commands: "Commands", command: AddCommand) -> None:
    examples = "  pdserve drain decode-1\n  pdserve drain prefill-0 --deadline 0\n"
    text = "let a worker finish what it has, end it, and put another in its place"
    drain = command(commands, "drain", text, examples)
    drain.add_argument("worker", help="such as decode-1")
    _add_deadline(drain)
    drain.set_defaults(run=_drain)


def _add_rollout(commands: "Commands", command: AddCommand) -> None:
    examples = "  pdserve rollout serve.yaml\n  pdserve rollout serve.yaml --set model.revision=v2\n"
    text = "replace the workers one by one by such as another configuration makes them"
    rollout = command(commands, "rollout", text, examples)
    rollout.add_argument("file", type=Path, help="the whole configuration, as for `pdserve up --config`")
    rollout.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="any key of it, as in YAML"
    )
    _add_deadline(rollout)
    rollout.set_defaults(run=_rollout)


def _add_deadline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--deadline",
        metavar="S",
        type=float,
        help="after so many seconds what is left is moved to other workers of the same model; where none is "
        "left, it ends with `unavailable` (default: pools.drain_deadline_s)",
    )
    parser.add_argument(
        "--address", help="of the Ray cluster, for a system that was started on another machine"
    )


def _add_fault(commands: "Commands", command: AddCommand) -> None:
    examples = (
        "  pdserve fault decode-0 'sent Reserved' kill\n  pdserve fault prefill step hang --nth 3\n"
        "  pdserve fault decode-1 now freeze --seconds 8\n"
    )
    fault = command(
        commands, "fault", "let processes of a system that allows faults suffer one, to rehearse", examples
    )
    fault.add_argument("process", help="such as decode-0, or a pool for each of its processes")
    fault.add_argument("at", metavar="event", help="now, step, 'sent MESSAGE' or 'received MESSAGE'")
    fault.add_argument("do", metavar="action", help="what happens then (see docs/game-days.md)")
    fault.add_argument("--nth", metavar="N", type=int, help="the event's number from now on (default 1)")
    fault.add_argument("--count", metavar="N", type=int, help="at how many in a row (default 1)")
    fault.add_argument("--seconds", metavar="S", type=float, help="how long it lasts")
    fault.add_argument("--stream", help="only messages of this kind of stream")
    fault.add_argument("--token", metavar="T", type=int, help="only steps that compute this token")
    fault.add_argument(
        "--address", help="of the Ray cluster, for a system that was started on another machine"
    )
    fault.set_defaults(run=_fault)


def _scale(options: argparse.Namespace) -> int:
    from controller.pool_commands import scale

    sizes = dict(map(_parse_size, options.sizes))
    asyncio.run(scale(options.name or "default", options.address, sizes, _deadline_s(options)))
    return 0


def _drain(options: argparse.Namespace) -> int:
    from controller.pool_commands import drain

    asyncio.run(drain(options.name or "default", options.address, options.worker, _deadline_s(options)))
    return 0


def _rollout(options: argparse.Namespace) -> int:
    from controller.pool_commands import roll_out

    given = {} if options.name is None else {"name": options.name}
    config = load_config(options.file, given | dict(map(parse_setting, options.set)))
    asyncio.run(roll_out(options.address, config, _deadline_s(options)))
    return 0


def parse_setting(text: str) -> tuple[str, object]:
    """KEY=VALUE, the value as in YAML. Raises ConfigError."""
    key, is_pair, value = text.partition("=")
    if not is_pair or not key:
        raise ConfigError(f"--set {text!r} is not KEY=VALUE: write for example --set engine.kv_memory=512MiB")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {text!r}: the value is not valid YAML: {' '.join(str(error).split())}"
        ) from error


def _parse_size(text: str) -> tuple[str, int]:
    pool, _, size = text.partition("=")
    if not size.isdecimal():
        raise ConfigError(f"{text!r} is not POOL=N: write for example decode=3")
    return pool, int(size)


def _deadline_s(options: argparse.Namespace) -> float | None:
    deadline_s: float | None = options.deadline
    if deadline_s is not None and not 0 <= deadline_s < float("inf"):
        raise ConfigError(f"--deadline {deadline_s:g} is no number of seconds from 0 on")
    return deadline_s


def _fault(options: argparse.Namespace) -> int:
    from controller.commands import arm_fault

    keys = ("process", "at", "do", "nth", "count", "seconds", "stream", "token")
    given = {key: value for key in keys if (value := getattr(options, key)) is not None}
    (fault,) = load_config(None, {"faults": [given]}).faults
    asyncio.run(arm_fault(options.name or "default", options.address, fault))
    return 0
