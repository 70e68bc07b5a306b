"""Who may come in. Pure.

A router holds a bounded number of requests and of prompt tokens; beyond that a request is refused at once
with the time after which to try again, instead of waiting in a queue that never drains.
"""

from dataclasses import dataclass

from pdserve.contract.errors import Overloaded


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    max_requests: int = 4096
    max_prompt_tokens: int = 4_000_000
    retry_after_s: float = 1.0


class Refused(Overloaded):
    """There is no room; `limit` is the field of AdmissionLimits that says so."""

    def __init__(self, message: str, limit: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.limit = limit


class Admission:
    """Counts what is inside."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self.num_requests = 0
        self.num_prompt_tokens = 0
        self._limits = limits

    def enter(self, num_prompt_tokens: int) -> None:
        """Let a request in. Raises Overloaded when it does not fit; an empty router takes any."""
        limits = self._limits
        if self.num_requests >= limits.max_requests:
            self._refuse(
                f"{self.num_requests} requests are in progress, the limit of this router", "max_requests"
            )
        if self.num_requests and self.num_prompt_tokens + num_prompt_tokens > limits.max_prompt_tokens:
            self._refuse(
                f"{self.num_prompt_tokens} prompt tokens are in progress, near this router's limit",
                "max_prompt_tokens",
            )
        self.num_requests += 1
        self.num_prompt_tokens += num_prompt_tokens

    def leave(self, num_prompt_tokens: int) -> None:
        """An admitted request has ended."""
        self.num_requests -= 1
        self.num_prompt_tokens -= num_prompt_tokens

    def _refuse(self, why: str, limit: str) -> None:
        raise Refused(f"{why}; try again later", limit, self._limits.retry_after_s)
