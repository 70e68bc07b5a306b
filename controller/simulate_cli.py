"""The command line of `pdserve simulate`."""

import argparse
from pathlib import Path

from router.placement.policies import DEFAULT_POLICY, POLICIES
from simulator.timing import DEVICES

_EXAMPLES = """\
  pdserve simulate --trace conversation.jsonl.gz --prefill 4 --decode 4 --ttft 5000 --tpot 50
  pdserve simulate --trace conversation.jsonl.gz --speed 3 --policy round_robin --json
  pdserve simulate --trace conversation.jsonl.gz --unsplit 8 --page unsplit.html
"""
_TEXT = "serve a recorded trace in virtual time, and tell latencies and goodput"


def add_simulate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "simulate",
        help=_TEXT,
        description=f"{_TEXT[0].upper()}{_TEXT[1:]}. The decisions are real; what takes time is a formula.",
        epilog=f"examples:\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--trace", metavar="FILE", type=Path, required=True, help="recorded requests (docs/simulate.md)"
    )
    parser.add_argument("--limit", metavar="N", type=_count, help="only the first N requests")
    parser.add_argument(
        "--speed", metavar="X", type=_positive, default=1.0, help="replay the trace X times as fast"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random")
    system = parser.add_argument_group("the system")
    system.add_argument("--prefill", metavar="N", type=int, default=4, help="prefill workers (default 4)")
    system.add_argument("--decode", metavar="M", type=int, default=4, help="decode workers (default 4)")
    system.add_argument("--unsplit", metavar="N", type=int, default=0, help="unsplit workers instead of both")
    system.add_argument(
        "--policy",
        choices=list(POLICIES),
        default=DEFAULT_POLICY,
        help=f"of placement (default {DEFAULT_POLICY})",
    )
    system.add_argument(
        "--device", choices=list(DEVICES), default="h100-8b", help="how fast each worker is (default h100-8b)"
    )
    system.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="step times measured by benchmarks.engine, instead of the device's",
    )
    system.add_argument(
        "--block-size", metavar="N", type=_count, help="tokens of a KV block (default: as the trace's ids)"
    )
    system.add_argument(
        "--pool-tokens", metavar="N", type=_count, help="size of each KV pool (default: the device's)"
    )
    slo = parser.add_argument_group("what a request must keep to be good, in milliseconds")
    slo.add_argument("--ttft", metavar="MS", type=_positive, help="time to first token")
    slo.add_argument(
        "--tpot", metavar="MS", type=_positive, help="mean time per output token after the first"
    )
    slo.add_argument("--itl", metavar="MS", type=_positive, help="longest wait between two tokens")
    slo.add_argument("--e2e", metavar="MS", type=_positive, help="end to end")
    results = parser.add_argument_group("results")
    results.add_argument(
        "--json", action="store_true", help="one JSON object on standard output instead of a table"
    )
    results.add_argument(
        "--page", metavar="FILE", type=Path, help="plots as one HTML file (needs pdserve[bench])"
    )
    parser.set_defaults(run=_simulate)


def _simulate(options: argparse.Namespace) -> int:
    from controller.simulate import run_simulate

    return run_simulate(options)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value
