"""The command line: pdserve up | down | status | top | admin | check | generate | bench, and those of
`operations_cli`."""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pdserve
from controller.operations_cli import add_operations, parse_setting
from controller.simulate_cli import add_simulate
from controller.terminal import complain
from pdserve.config import load_config
from pdserve.contract.errors import PdserveError

if TYPE_CHECKING:
    from load_generator.prompts import Vocabulary

_EXAMPLES = """\
examples:
  pdserve up                                     the built-in model, one prefill and one decode worker
  pdserve up --model Qwen/Qwen3-0.6B --decode 2  a model of the hub
  pdserve up --prefill 0 --decode 2              unsplit workers behind the same router
  pdserve up --config deploy/laptop.yaml         everything from a file (see docs/configuration.md)
  pdserve up --address auto --detach             on a running Ray cluster
  pdserve generate "Once upon a time"
  pdserve status --json
  pdserve top                                    workers, load and latency, live
  pdserve admin                                  the live page's URL, with its token
  pdserve check
  pdserve scale prefill=3 decode=5               larger or smaller pools, no request is lost
  pdserve drain decode-1                         empty one worker and replace it
  pdserve rollout serve.yaml                     another configuration, worker by worker
  pdserve bench --rate 4 --count 200
  pdserve simulate --trace trace.jsonl           placement policies on recorded load, in virtual time
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
    _add_top(commands)
    _add_admin(commands)
    _add_check(commands)
    add_operations(commands, _command)
    _add_generate(commands)
    _add_bench(commands)
    add_simulate(commands)
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


def _add_top(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    examples = "  pdserve top\n  pdserve top --once\n  pdserve top --router router-1\n"
    top = _command(commands, "top", "show live what a router sees: workers, load and latency", examples)
    top.add_argument("--once", action="store_true", help="show it once and end")
    top.add_argument("--router", metavar="ID", help="which one sees it (default: the first)")
    top.add_argument("--address", help="of the Ray cluster, for a system that was started on another machine")
    top.set_defaults(run=_top)


def _add_admin(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "show the URL of each router's live page, with the token that lets in whoever has it"
    admin = _command(commands, "admin", text, "  pdserve admin\n")
    admin.add_argument(
        "--address", help="of the Ray cluster, for a system that was started on another machine"
    )
    admin.set_defaults(run=_admin)


def _add_check(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    examples = "  pdserve check\n  pdserve check --json\n"
    check = _command(commands, "check", "let every process check its books, and show who holds KV", examples)
    check.add_argument("--json", action="store_true", help="everything, as one JSON object")
    check.add_argument(
        "--address", help="of the Ray cluster, for a system that was started on another machine"
    )
    check.set_defaults(run=_check)


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


def _add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    examples = (
        "  pdserve bench --rate 4 --count 200 --ttft 500 --itl 100\n"
        "  pdserve bench --trace requests.jsonl --speed 2 --json result.json --page result.html\n"
        "  pdserve bench --sweep --prompt-tokens 512 --output-tokens 32 --ttft 1000 --tpot 80\n"
        "  pdserve bench --url http://other:8000 --concurrency 16\n"
    )
    bench = _command(commands, "bench", "put load on an OpenAI-compatible server and measure it", examples)
    bench.add_argument("--url", help="of the server, without /v1 (default: the system that runs here)")
    bench.add_argument("--model", metavar="NAME", help="as the server calls it (default: the first it lists)")

    load = bench.add_argument_group("load (default: --rate 1)")
    load.add_argument(
        "--trace", metavar="FILE", type=Path, help="recorded arrivals: pdserve, Mooncake or Azure"
    )
    load.add_argument("--speed", type=_positive, default=1.0, help="replay the trace so many times as fast")
    load.add_argument("--rate", metavar="R", type=_positive, help="draw arrivals, R requests a second")
    load.add_argument(
        "--burstiness",
        metavar="B",
        type=_positive,
        default=1.0,
        help="gamma shape: 1 Poisson (default), below 1 bursts",
    )
    load.add_argument("--concurrency", metavar="N", type=int, help="keep N requests in flight instead")
    load.add_argument("--sweep", action="store_true", help="raise the rate, from --rate on, to find the knee")
    load.add_argument(
        "--good", metavar="SHARE", type=float, default=0.9, help="good requests that a rate needs"
    )
    load.add_argument("--max-runs", metavar="N", type=int, default=12, help="of a sweep (default 12)")
    load.add_argument(
        "--count", metavar="N", type=int, help="requests per run (default 200, or the whole trace)"
    )
    load.add_argument("--seed", type=int, default=0, help="of arrivals and prompts")

    prompts = bench.add_argument_group("requests")
    prompts.add_argument("--prompt-tokens", metavar="N", type=int, default=512, help="default 512")
    prompts.add_argument("--output-tokens", metavar="N", type=int, default=64, help="default 64")
    prompts.add_argument("--spread", type=float, default=0.0, help="of both lengths, as a share of the mean")
    prompts.add_argument("--shared-tokens", metavar="N", type=int, default=0, help="of a common prefix")
    prompts.add_argument("--groups", metavar="N", type=int, default=1, help="how many different prefixes")
    prompts.add_argument(
        "--form", choices=["tokens", "text", "chat"], default="tokens", help="default tokens"
    )
    prompts.add_argument(
        "--vocabulary", metavar="A:B", help="ids of prompts (default: as the server tells, else 1000:20000)"
    )
    prompts.add_argument("--temperature", type=float, default=0.0, help="default 0")
    prompts.add_argument(
        "--stop-early", action="store_true", help="let answers end where the model ends them"
    )
    prompts.add_argument("--timeout", metavar="S", type=_positive, default=600.0, help="of one request")
    prompts.add_argument(
        "--body", metavar="JSON", default="{}", help='further fields of every request, as in {"priority": 1}'
    )

    slo = bench.add_argument_group("what a request must keep to be good, in milliseconds")
    slo.add_argument("--ttft", metavar="MS", type=_positive, help="time to first token")
    slo.add_argument(
        "--tpot", metavar="MS", type=_positive, help="mean time per output token after the first"
    )
    slo.add_argument("--itl", metavar="MS", type=_positive, help="longest wait between two tokens")
    slo.add_argument("--e2e", metavar="MS", type=_positive, help="end to end")

    results = bench.add_argument_group("results")
    results.add_argument("--skip", metavar="S", type=float, default=0.0, help="leave the first S seconds out")
    results.add_argument(
        "--json", metavar="FILE", type=Path, help="everything, with the times of each request"
    )
    results.add_argument(
        "--page", metavar="FILE", type=Path, help="plots as one HTML file (needs pdserve[bench])"
    )
    bench.set_defaults(run=_bench)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


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
    return given | dict(map(parse_setting, options.set))


def _down(options: argparse.Namespace) -> int:
    from controller.commands import end_system

    asyncio.run(end_system(options.name or "default", options.address))
    return 0


def _status(options: argparse.Namespace) -> int:
    from controller.commands import show_status

    return asyncio.run(show_status(options.name or "default", options.address, options.json))


def _top(options: argparse.Namespace) -> int:
    from controller.commands import show_top

    asyncio.run(show_top(options.name or "default", options.address, options.router, options.once))
    return 0


def _admin(options: argparse.Namespace) -> int:
    from controller.commands import show_admin

    asyncio.run(show_admin(options.name or "default", options.address))
    return 0


def _check(options: argparse.Namespace) -> int:
    from controller.commands import check_integrity

    return asyncio.run(check_integrity(options.name or "default", options.address, options.json))


def _generate(options: argparse.Namespace) -> int:
    from controller.commands import url_of
    from controller.generate import Question, stream_answer

    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    question = Question(
        prompt, options.max_tokens, options.temperature, options.seed, options.chat, options.raw
    )
    asyncio.run(stream_answer(options.url or url_of(options.name or "default"), question))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from controller.bench import BenchOptions, run_bench
    from load_generator.arrivals import Lengths
    from load_generator.prompts import PromptForm
    from load_generator.summary import Slo
    from pdserve.config import api_key

    _check_bench(options)
    bench = BenchOptions(
        url=(options.url or _own_url(options.name or "default")).rstrip("/").removesuffix("/v1"),
        model=options.model,
        api_key=api_key(),
        trace=options.trace,
        speed=options.speed,
        rate=options.rate or (None if options.trace or options.concurrency else 1.0),
        burstiness=options.burstiness,
        concurrency=options.concurrency,
        sweep=options.sweep,
        min_good_share=options.good,
        max_runs=options.max_runs,
        count=options.count,
        lengths=Lengths(
            options.prompt_tokens,
            options.output_tokens,
            options.spread,
            options.shared_tokens,
            options.groups,
        ),
        form=PromptForm(options.form),
        vocabulary=_parse_vocabulary(options.vocabulary) if options.vocabulary else None,
        temperature=options.temperature,
        ignore_eos=not options.stop_early,
        timeout_s=options.timeout,
        extra_body=_parse_body(options.body),
        slo=Slo(options.ttft, options.tpot, options.itl, options.e2e),
        skip_s=options.skip,
        seed=options.seed,
        json_file=options.json,
        page_file=options.page,
    )
    return asyncio.run(run_bench(bench))


def _own_url(name: str) -> str:
    from controller.commands import url_of

    return url_of(name)


def _check_bench(options: argparse.Namespace) -> None:
    """Raises ConfigError for what makes no sense together or at all."""
    from pdserve.contract.errors import ConfigError

    given = [f"--{name}" for name in ("trace", "rate", "concurrency") if getattr(options, name) is not None]
    if len(given) > 1 and not (options.sweep and "--concurrency" not in given):
        raise ConfigError(f"{' and '.join(given)} exclude each other: give one")
    if options.sweep and options.concurrency is not None:
        raise ConfigError("--sweep raises a rate, and --concurrency has none: leave one out")
    for name in ("concurrency", "count", "prompt_tokens", "output_tokens", "groups", "max_runs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def _parse_vocabulary(text: str) -> "Vocabulary":
    from load_generator.prompts import Vocabulary
    from pdserve.contract.errors import ConfigError

    first, _, stop = text.partition(":")
    if not (first.isdigit() and stop.isdigit() and int(first) < int(stop)):
        raise ConfigError(f"--vocabulary {text!r} is not A:B with A < B: write for example 1000:20000")
    return Vocabulary(int(first), int(stop))


def _parse_body(text: str) -> tuple[tuple[str, object], ...]:
    import json

    from pdserve.contract.errors import ConfigError

    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError('--body must be a JSON object, such as {"priority": 1}')
    return tuple(fields.items())


if __name__ == "__main__":
    sys.exit(main())
