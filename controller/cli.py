"""The command line: pdserve up | down | status | check | fault | generate."""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import pdserve
from controller.terminal import complain
from pdserve.config import load_config
from pdserve.contract.errors import PdserveError

_EXAMPLES = """\
examples:
  pdserve up                                     the built-in model, one prefill and one decode worker
  pdserve up --model Qwen/Qwen3-0.6B --decode 2  a model of the hub
  pdserve up --prefill 0 --decode 2              unsplit workers behind the same router
  pdserve up --config deploy/laptop.yaml         everything from a file (see docs/configuration.md)
  pdserve up --address auto --detach             on a running Ray cluster
  pdserve generate "Once upon a time"
  pdserve status --json
  pdserve check
  pdserve down
"""
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Errors are one line on stderr."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    options.words = words
    try:
        return int(options.run(options))
    except PdserveError as error:
        complain(str(error))
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pdserve",
        description="Serves a large language model with prefill and decode on separate workers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pdserve {pdserve.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_up(commands)
    _add_down(commands)
    _add_status(commands)
    _add_check(commands)
    _add_fault(commands)
    _add_generate(commands)
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str, examples: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--name", default=None, help="which system, where several run (default: default)")
    return parser


def _add_up(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    examples = (
        "  pdserve up\n  pdserve up --model ./my-model --dtype bfloat16 --port 9000\n"
        "  pdserve up --prefill 2 --decode 2\n"
        "  pdserve up --config deploy/laptop.yaml --set engine.kv_memory=512MiB\n"
    )
    up = _command(commands, "up", "start a system and stay with it until Ctrl-C", examples)
    up.add_argument(
        "--model", metavar="ID|PATH", help="hub id or folder (default: the model that comes with pdserve)"
    )
    up.add_argument("--revision", help="branch, tag or commit of a hub id")
    up.add_argument("--served-name", metavar="NAME", help="what clients call the model")
    up.add_argument("--config", metavar="FILE", type=Path, help="YAML file; options given here win over it")
    up.add_argument(
        "--prefill", metavar="N", type=int, help="prefill workers (default 1; 0: unsplit workers)"
    )
    up.add_argument(
        "--decode", metavar="M", type=int, help="decode workers, unsplit ones with --prefill 0 (default 1)"
    )
    up.add_argument("--dtype", help="auto, float32, bfloat16 or float16 (default: the checkpoint's own)")
    up.add_argument("--max-model-len", metavar="N", type=int, help="most tokens of prompt and output")
    up.add_argument("--threads", metavar="N", type=int, help="CPU threads of each worker")
    up.add_argument("--host", help="where the APIs listen (default 127.0.0.1; 0.0.0.0: everywhere)")
    up.add_argument("--port", type=int, help="of the HTTP API (default 8000; 0: any free one)")
    up.add_argument("--grpc-port", type=int, help="of the gRPC API (default: any free one)")
    up.add_argument(
        "--address", help="auto, host:port or ray://host:port of a Ray cluster (default: a local one)"
    )
    up.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="any key of the configuration, as in YAML",
    )
    up.add_argument(
        "--detach", action="store_true", help="return when the system is ready, and leave it running"
    )
    up.add_argument(
        "--allow-faults", action="store_true", help="let processes suffer faults on purpose, to rehearse"
    )
    up.set_defaults(run=_up)


def _add_down(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    down = _command(
        commands, "down", "end a running system", "  pdserve down\n  pdserve down --name second\n"
    )
    down.add_argument(
        "--address", help="of the Ray cluster, for a system that was started on another machine"
    )
    down.set_defaults(run=_down)


def _add_status(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    examples = "  pdserve status\n  pdserve status --json\n"
    status = _command(commands, "status", "show routers, workers and their KV blocks", examples)
    status.add_argument("--json", action="store_true", help="everything, as one JSON object")
    status.add_argument(
        "--address", help="of the Ray cluster, for a system that was started on another machine"
    )
    status.set_defaults(run=_status)


def _add_check(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    examples = "  pdserve check\n  pdserve check --json\n"
    check = _command(commands, "check", "let every process check its books, and show who holds KV", examples)
    check.add_argument("--json", action="store_true", help="everything, as one JSON object")
    check.add_argument(
        "--address", help="of the Ray cluster, for a system that was started on another machine"
    )
    check.set_defaults(run=_check)


def _add_fault(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    examples = (
        "  pdserve fault decode-0 'sent Reserved' kill\n  pdserve fault prefill step hang --nth 3\n"
        "  pdserve fault decode-1 now freeze --seconds 8\n"
    )
    fault = _command(
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


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    examples = (
        '  pdserve generate "Tell me a story"\n  pdserve generate --max-tokens 20 --temperature 0 "2 + 2 ="\n'
        "  cat prompt.txt | pdserve generate -\n"
    )
    generate = _command(
        commands, "generate", "send one prompt and stream the answer to the terminal", examples
    )
    generate.add_argument("prompt", help="the prompt; - reads it from stdin")
    generate.add_argument("--url", help="of the system (default: the one that runs here)")
    generate.add_argument(
        "--max-tokens", metavar="N", type=int, default=256, help="most tokens (default 256)"
    )
    generate.add_argument("--temperature", type=float, help="0 takes the likeliest token each time")
    generate.add_argument("--seed", type=int, help="makes sampling repeatable")
    form = generate.add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", help="insist on the chat API")
    form.add_argument(
        "--raw", action="store_true", help="complete the prompt as it is, without a chat template"
    )
    generate.set_defaults(run=_generate)


def _up(options: argparse.Namespace) -> int:
    from controller.detach import start_detached
    from controller.launch import Interrupted, LaunchOptions, run_system

    config = load_config(options.config, _overrides(options))
    is_local = config.ray.address is None
    if options.detach and is_local:
        return start_detached(config.name, [word for word in options.words if word != "--detach"])
    try:
        asyncio.run(run_system(config, LaunchOptions(options.detach, options.allow_faults)))
    except Interrupted:
        return _INTERRUPTED
    return 0


def _overrides(options: argparse.Namespace) -> dict[str, object]:
    """What was given on the command line, by configuration key."""
    keys: dict[str, object] = {
        "name": options.name,
        "model.path": options.model,
        "model.revision": options.revision,
        "model.served_name": options.served_name,
        "model.dtype": options.dtype,
        "model.max_model_len": options.max_model_len,
        "engine.threads": options.threads,
        "pools.prefill.replicas": options.prefill,
        "pools.decode.replicas": options.decode,
        "router.host": options.host,
        "router.http_port": options.port,
        "router.grpc_port": options.grpc_port,
        "ray.address": options.address,
    }
    given = {key: value for key, value in keys.items() if value is not None}
    return given | dict(map(_parse_setting, options.set))


def _parse_setting(text: str) -> tuple[str, object]:
    import yaml

    from pdserve.contract.errors import ConfigError

    key, is_pair, value = text.partition("=")
    if not is_pair or not key:
        raise ConfigError(f"--set {text!r} is not KEY=VALUE: write for example --set engine.kv_memory=512MiB")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {text!r}: the value is not valid YAML: {' '.join(str(error).split())}"
        ) from error


def _down(options: argparse.Namespace) -> int:
    from controller.commands import end_system

    asyncio.run(end_system(options.name or "default", options.address))
    return 0


def _status(options: argparse.Namespace) -> int:
    from controller.commands import show_status

    return asyncio.run(show_status(options.name or "default", options.address, options.json))


def _check(options: argparse.Namespace) -> int:
    from controller.commands import check_integrity

    return asyncio.run(check_integrity(options.name or "default", options.address, options.json))


def _fault(options: argparse.Namespace) -> int:
    from controller.commands import arm_fault

    keys = ("process", "at", "do", "nth", "count", "seconds", "stream", "token")
    given = {key: value for key in keys if (value := getattr(options, key)) is not None}
    (fault,) = load_config(None, {"faults": [given]}).faults
    asyncio.run(arm_fault(options.name or "default", options.address, fault))
    return 0


def _generate(options: argparse.Namespace) -> int:
    from controller.commands import url_of
    from controller.generate import Question, stream_answer

    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    question = Question(
        prompt, options.max_tokens, options.temperature, options.seed, options.chat, options.raw
    )
    asyncio.run(stream_answer(options.url or url_of(options.name or "default"), question))
    return 0


if __name__ == "__main__":
    sys.exit(main())
