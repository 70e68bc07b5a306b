"""What came of each request."""

from dataclasses import dataclass, field

from load_generator.traces import PlannedRequest


@dataclass(slots=True)
class Record:
    """One request. All times are seconds since the run's start; None for what never happened."""

    index: int
    planned: PlannedRequest
    sent_at: float | None = None
    token_times: list[float] = field(default_factory=list)
    """When each event of the answer that carried tokens came."""
    ended_at: float | None = None
    num_prompt_tokens: int = 0
    """As the server counts them."""
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens that the server had in its prefix cache, where it says so."""
    error: str | None = None
    """Of a request that did not end well: the HTTP status or the kind of failure, and the server's words."""

    @property
    def succeeded(self) -> bool:
        return self.ended_at is not None and self.error is None and bool(self.token_times)

    @property
    def send_delay_s(self) -> float:
        """How late the generator itself was."""
        return 0.0 if self.sent_at is None else self.sent_at - self.planned.due_s

    @property
    def time_to_first_token_s(self) -> float:
        """From when the request was due. Only of a request that succeeded, like all that follow."""
        return self.token_times[0] - self.planned.due_s

    @property
    def time_to_second_token_s(self) -> float | None:
        return self.token_times[1] - self.planned.due_s if len(self.token_times) > 1 else None

    @property
    def end_to_end_s(self) -> float:
        return self.token_times[-1] - self.planned.due_s

    @property
    def time_per_output_token_s(self) -> float | None:
        """Mean time of the tokens after the first; None when there is none."""
        later = self.num_output_tokens - 1
        return (self.token_times[-1] - self.token_times[0]) / later if later > 0 else None

    @property
    def inter_token_s(self) -> list[float]:
        """Between events that carried tokens. A server that sends several tokens in one event has fewer."""
        return [after - before for before, after in zip(self.token_times, self.token_times[1:], strict=False)]
