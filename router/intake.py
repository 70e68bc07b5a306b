"""The door of the router: a well-formed body becomes a job whose every value has been checked.

Workers rely on these checks: token ids are within the vocabulary, lengths within the model's, numbers
within bounds. Nothing here waits or keeps state; the only effect is the draw of a seed.
"""

from dataclasses import dataclass, replace

import xxhash

from pdserve.contract.errors import InvalidRequest, NotFound
from pdserve.contract.ports import Rng
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import num_tokens
from pdserve.contract.work import ModelInfo
from router.api_settings import ApiLimits, ApiSettings
from router.bounds import check_count, check_int_range, check_length, most_tokens
from router.openai_schema import ChatBody, CompletionBody, SamplingBody
from router.prompts import Prompt, read_prompts
from router.requests import GenerateRequest
from router.sampling_fields import check_stops, given_or, read_sampling
from router.text import TextModel

DEFAULT_COMPLETION_TOKENS = 16
SEED_BITS = 63
_MAX_PRIORITY = 2**31 - 1


@dataclass(frozen=True, slots=True)
class ChoiceJob:
    """One answer to one prompt."""

    index: int
    """Position among the job's choices: the prompt's number times n, plus which of the n."""
    prompt: Prompt
    request: GenerateRequest
    stops: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """All that one API request asks for."""

    model: str
    prompts: tuple[Prompt, ...]
    choices: tuple[ChoiceJob, ...]
    stream: bool
    include_usage: bool
    continuous_usage: bool
    """Every event tells the usage so far; only with `include_usage`."""
    return_token_ids: bool
    timings: bool
    """The answer tells how each choice went."""
    logprobs: int | None
    echo: bool = False

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt counted once, however many choices it has."""
        return sum(num_tokens(prompt.tokens) for prompt in self.prompts)

    @property
    def deadline_s(self) -> float | None:
        """The time that all choices have, counted from the job's arrival."""
        return self.choices[0].request.deadline_s


@dataclass(frozen=True, slots=True)
class _Output:
    """The fields that the two kinds of request spell differently."""

    max_tokens: int | None
    default_max_tokens: int
    logprobs: int | None
    echo: bool = False


class Intake:
    """Turns bodies into jobs for one model."""

    def __init__(self, text_model: TextModel, settings: ApiSettings, rng: Rng):
        self._text_model = text_model
        self._served_model_name = settings.served_model_name
        self._limits = settings.limits
        self._rng = rng

    def completion(self, body: CompletionBody, info: ModelInfo, deadline_s: float | None = None) -> Job:
        """Raises InvalidRequest, RequestTooLong or NotFound."""
        self._check_model(body, info)
        output = _completion_output(body, self._limits)
        prompts = read_prompts(body.prompt, self._text_model, info, self._limits)
        return self._job(body, info, prompts, output, deadline_s)

    def chat(self, body: ChatBody, info: ModelInfo, deadline_s: float | None = None) -> Job:
        """Raises InvalidRequest, RequestTooLong or NotFound."""
        self._check_model(body, info)
        output = _chat_output(body, info, self._limits)
        prompt = Prompt(self._text_model.encode_chat([message.model_dump() for message in body.messages]))
        return self._job(body, info, (prompt,), output, deadline_s)

    def model_name(self, info: ModelInfo) -> str:
        """What clients call the model."""
        return self._served_model_name or info.name

    def _check_model(self, body: SamplingBody, info: ModelInfo) -> None:
        served = self.model_name(info)
        if body.model is not None and body.model != served:
            raise NotFound(f"model '{body.model}' is not served here; the model is '{served}'", param="model")

    def _job(
        self,
        body: SamplingBody,
        info: ModelInfo,
        prompts: tuple[Prompt, ...],
        output: _Output,
        deadline_s: float | None,
    ) -> Job:
        n = _read_n(body, len(prompts), self._limits)
        check_stops(body.stop, self._limits)
        check_int_range("priority", body.priority, -_MAX_PRIORITY, _MAX_PRIORITY)
        sampling = read_sampling(body, output.logprobs, info, self._limits)
        template = GenerateRequest(b"", sampling, deadline_s=deadline_s, priority=given_or(body.priority, 0))
        choices: list[ChoiceJob] = []
        for prompt in prompts:
            request = replace(
                template,
                prompt_tokens=prompt.tokens,
                sampling=_fit(sampling, prompt, output, info),
                seed=self._seed(body),
            )
            choices += _choices(prompt, request, n, body.stop, first_index=len(choices))
        return Job(
            model=self.model_name(info),
            prompts=prompts,
            choices=tuple(choices),
            stream=given_or(body.stream, False),
            include_usage=_read_include_usage(body),
            continuous_usage=_read_continuous_usage(body),
            return_token_ids=given_or(body.return_token_ids, False),
            timings=given_or(body.timings, False),
            logprobs=output.logprobs,
            echo=output.echo,
        )

    def _seed(self, body: SamplingBody) -> int:
        return self._rng.random_bits(SEED_BITS) if body.seed is None else body.seed % 2**SEED_BITS


def choice_seed(seed: int, i: int) -> int:
    """The seed of the i-th of n choices: the request's own for the first, hashes of it for the others."""
    if i == 0:
        return seed
    return xxhash.xxh3_64_intdigest(i.to_bytes(8, "little"), seed) >> (64 - SEED_BITS)


def _choices(
    prompt: Prompt, request: GenerateRequest, n: int, stops: tuple[str, ...], first_index: int
) -> list[ChoiceJob]:
    """The n choices of one prompt, which differ in their seeds only. `request` has the first one's."""
    seed = request.seed or 0
    requests = (replace(request, seed=choice_seed(seed, i)) for i in range(n))
    return [ChoiceJob(first_index + i, prompt, each, stops) for i, each in enumerate(requests)]


def _completion_output(body: CompletionBody, limits: ApiLimits) -> _Output:
    if body.best_of is not None and body.best_of != given_or(body.n, 1):
        raise InvalidRequest("'best_of' is only supported when it equals 'n'", param="best_of")
    if body.echo and body.logprobs is not None:
        message = "'echo' with 'logprobs' is not supported: prompts get no log probabilities"
        raise InvalidRequest(message, param="echo")
    check_int_range("logprobs", body.logprobs, 0, limits.max_logprobs)
    return _Output(body.max_tokens, DEFAULT_COMPLETION_TOKENS, body.logprobs, given_or(body.echo, False))


def _chat_output(body: ChatBody, info: ModelInfo, limits: ApiLimits) -> _Output:
    if not body.messages:
        raise InvalidRequest("'messages' must have at least one message", param="messages")
    check_count("messages", len(body.messages), limits.max_messages)
    check_int_range("top_logprobs", body.top_logprobs, 0, limits.max_logprobs)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
    asked = {tokens for tokens in (body.max_tokens, body.max_completion_tokens) if tokens is not None}
    if len(asked) > 1:
        message = "'max_tokens' and 'max_completion_tokens' mean the same and must not differ"
        raise InvalidRequest(message, param="max_completion_tokens")
    logprobs = given_or(body.top_logprobs, 0) if body.logprobs else None
    return _Output(asked.pop() if asked else None, info.max_model_len, logprobs)


def _read_n(body: SamplingBody, num_prompts: int, limits: ApiLimits) -> int:
    n = given_or(body.n, 1)
    check_int_range("n", n, 1, limits.max_n)
    if n * num_prompts > limits.max_choices:
        message = (
            f"'n' times the number of prompts must be at most {limits.max_choices}, got {n} x {num_prompts}"
        )
        raise InvalidRequest(message, param="n")
    return n


def _read_include_usage(body: SamplingBody) -> bool:
    if body.stream_options is None:
        return False
    if not body.stream:
        raise InvalidRequest("'stream_options' needs 'stream': true", param="stream_options")
    return body.stream_options.include_usage


def _read_continuous_usage(body: SamplingBody) -> bool:
    options = body.stream_options
    if options is None or not options.continuous_usage_stats:
        return False
    if not options.include_usage:
        raise InvalidRequest(
            "'stream_options.continuous_usage_stats' needs 'include_usage': true",
            param="stream_options.continuous_usage_stats",
        )
    return True


def _fit(sampling: SamplingParams, prompt: Prompt, output: _Output, info: ModelInfo) -> SamplingParams:
    """Fill in `max_tokens`: as asked, or the default as far as there is room."""
    prompt_length = num_tokens(prompt.tokens)
    what = f"the prompt has {prompt_length} tokens and leaves no room for an answer"
    check_length(prompt_length + 1, info, what, param="prompt")
    if output.max_tokens is not None:
        check_int_range("max_tokens", output.max_tokens, 1, 2**31 - 1)
    room = most_tokens(info) - prompt_length
    max_tokens = given_or(output.max_tokens, min(output.default_max_tokens, room))
    what = (
        f"the prompt has {prompt_length} tokens and 'max_tokens' is {max_tokens}, "
        f"together {prompt_length + max_tokens}; shorten one of them"
    )
    check_length(prompt_length + max_tokens, info, what, param="max_tokens")
    if sampling.min_tokens > max_tokens:
        message = f"'min_tokens' must be at most 'max_tokens' ({max_tokens}), got {sampling.min_tokens}"
        raise InvalidRequest(message, param="min_tokens")
    return replace(sampling, max_tokens=max_tokens)
