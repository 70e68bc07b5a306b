"""What an operator may set about the HTTP and gRPC APIs, and what they report about their work."""

from dataclasses import dataclass, field
from typing import Protocol

FAREWELL_S = 1.0
"""How long a client may take to read the error that ends its request. After that an HTTP connection is
aborted, and a gRPC call is left to gRPC."""


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """Most that one request may ask for. A request beyond a limit is refused with the number."""

    max_n: int = 128
    max_prompts: int = 256
    """Prompts in one /v1/completions request."""
    max_choices: int = 1024
    """Prompts times n."""
    max_stop_strings: int = 16
    max_stop_characters: int = 1024
    """Of one stop string."""
    max_stop_token_ids: int = 128
    max_logit_bias: int = 1024
    max_logprobs: int = 20
    max_temperature: float = 100.0
    """OpenAI stops at 2; other servers take any value, and high ones are useful for testing samplers."""
    max_messages: int = 4096
    max_body_bytes: int = 32 * 1024 * 1024
    max_unread_tokens: int = 4096
    """Tokens of one choice that may wait, beyond what the connection itself buffers, until its client reads
    on. A client that lets more pile up is cut."""


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """How the APIs present the system."""

    served_model_name: str = ""
    """What clients call the model; empty takes the name that the workers report."""
    limits: ApiLimits = field(default_factory=ApiLimits)
    inline_body_bytes: int = 64 * 1024
    """Larger bodies are parsed and tokenised on a thread, so that they do not delay other streams."""
    log_prompts: bool = False
    """Prompts, and error messages that quote requests, are written to the log."""
    default_retry_after_s: float = 1.0
    """Sent with 429 and 503 answers whose cause names no time."""


class RequestObserver(Protocol):
    """Is told about every generate request, for metrics."""

    def on_request_start(self, api: str) -> None:
        """`api` is ``completions``, ``chat`` or ``grpc``."""
        ...

    def on_tokenised(self, api: str, seconds: float) -> None:
        """A body has become checked tokens."""
        ...

    def on_first_event(self, api: str, seconds: float) -> None:
        """The first tokens of a streamed answer have been written, so long after the request began."""
        ...

    def on_request_end(self, api: str, code: str, status: int) -> None:
        """`code` is ``ok`` or a `pdserve.contract.errors.ErrorCode`; `status` the HTTP status it maps to,
        499 when the client went away."""
        ...


class NoObserver:
    """Listens to nothing."""

    def on_request_start(self, api: str) -> None:
        return

    def on_tokenised(self, api: str, seconds: float) -> None:
        return

    def on_first_event(self, api: str, seconds: float) -> None:
        return

    def on_request_end(self, api: str, code: str, status: int) -> None:
        return
