"""A Desk that answers from a script, so that the front of the router can be tested without workers."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from pdserve.contract.errors import ErrorInfo
from pdserve.contract.ids import RequestId
from pdserve.contract.messages import RequestTimings
from pdserve.contract.sampling import FinishReason
from pdserve.contract.tokens import num_tokens, pack_tokens, unpack_tokens
from pdserve.contract.work import ModelInfo, TokenLogprobs
from router.request_reports import Origin, RequestReport
from router.requests import Closing, GenerateRequest, OutputDelta, Readiness

MODEL_INFO = ModelInfo(
    name="small-model",
    architecture="LlamaForCausalLM",
    revision="r1",
    dtype="float32",
    vocab_size=400,
    max_model_len=128,
    num_layers=2,
    num_kv_heads=2,
    head_dim=8,
    block_size=16,
    num_blocks=64,
    block_bytes=4096,
    eos_token_ids=(1,),
    fingerprint="f",
    chunk_tokens=64,
    deterministic=True,
)


class Hold:
    """A step of a script that waits until it is released, or until its request is closed."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.released = asyncio.Event()

    async def wait(self) -> None:
        self.reached.set()
        await self.released.wait()


Step = OutputDelta | Exception | Hold
Script = Callable[[GenerateRequest], Iterable[Step]]


def say(
    token_ids: Sequence[int], *, per_delta: int = 1, finish: FinishReason = FinishReason.STOP
) -> list[Step]:
    """A script that gives out `token_ids`, a few at a time."""
    parts = [token_ids[start : start + per_delta] for start in range(0, len(token_ids), per_delta)]
    deltas: list[Step] = [OutputDelta(pack_tokens(part)) for part in parts[:-1]]
    timings = RequestTimings(cached_prompt_tokens_prefill=3)
    return [*deltas, OutputDelta(pack_tokens(parts[-1]), finish=finish, timings=timings)]


def echo(request: GenerateRequest) -> list[Step]:
    """The prompt's tokens over and over, max_tokens of them."""
    prompt = unpack_tokens(request.prompt_tokens)
    wanted = request.sampling.max_tokens
    return say([prompt[i % len(prompt)] for i in range(wanted)], finish=FinishReason.LENGTH)


def endless(request: GenerateRequest) -> Iterator[Step]:
    """Tokens for as long as somebody asks."""
    return itertools.repeat(OutputDelta(pack_tokens([50])))


@dataclass
class FakeDesk:
    """Follows `script` and remembers what it was asked and how each request ended."""

    script: Script = echo
    info: ModelInfo | None = MODEL_INFO
    ready: Readiness = field(default_factory=lambda: Readiness(True, "", {"prefill": 1, "decode": 1}))
    requests: list[GenerateRequest] = field(default_factory=list)
    running: set[RequestId] = field(default_factory=set)
    closed: list[RequestId] = field(default_factory=list)
    """Requests that were closed before their end."""
    reports: dict[RequestId, RequestReport] = field(default_factory=dict)
    """What it has not forgotten."""
    refused: list[tuple[RequestId, Origin, ErrorInfo]] = field(default_factory=list)
    """Requests that came no further than the API."""
    num_ids: int = 0
    started: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the first request has come."""
    at_rest: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever a request has ended and none is running."""

    def model_info(self) -> ModelInfo | None:
        return self.info

    def readiness(self) -> Readiness:
        return self.ready

    def new_request_id(self) -> RequestId:
        self.num_ids += 1
        return RequestId(f"fake-{self.num_ids}")

    def refuse(self, request_id: RequestId, origin: Origin, error: ErrorInfo, waited_s: float) -> None:
        self.refused.append((request_id, origin, error))

    def report(self, request_id: RequestId) -> RequestReport | None:
        return self.reports.get(request_id)

    async def generate(
        self, request_id: RequestId, request: GenerateRequest, closing: Closing | None = None
    ) -> AsyncGenerator[OutputDelta, None]:
        self.requests.append(request)
        self.running.add(request_id)
        self.started.set()
        self.at_rest.clear()
        try:
            for step in self.script(request):
                if isinstance(step, Hold):
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    await asyncio.sleep(0)  # tokens come one by one, and others get their turn
                    yield _with_logprobs(step, request)
        except (asyncio.CancelledError, GeneratorExit):
            self.closed.append(request_id)
            raise
        finally:
            self.running.discard(request_id)
            if not self.running:
                self.at_rest.set()


def _with_logprobs(delta: OutputDelta, request: GenerateRequest) -> OutputDelta:
    """Log probabilities that can be told apart: token t has -t/1000, the others are those from 300 on."""
    wanted = request.sampling.logprobs
    if wanted is None:
        return delta
    top = tuple((token_id, -token_id / 1000) for token_id in range(300, 300 + wanted))
    logprobs = tuple(TokenLogprobs(-token_id / 1000, top) for token_id in unpack_tokens(delta.tokens))
    assert len(logprobs) == num_tokens(delta.tokens)
    return replace(delta, logprobs=logprobs)
