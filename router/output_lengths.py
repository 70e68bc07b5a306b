"""How long outputs will be, as far as those that have ended tell. Pure."""

_FIRST_GUESS = 128.0
"""Tokens, before any request has ended."""
_WEIGHT = 0.02
"""Of the newest output in the mean."""


class OutputLengths:
    """A moving mean of one router's outputs, in tokens."""

    def __init__(self) -> None:
        self._mean = _FIRST_GUESS

    def note(self, num_tokens: int) -> None:
        """An output has ended. One without tokens tells nothing: its request has failed before."""
        if num_tokens:
            self._mean += _WEIGHT * (num_tokens - self._mean)

    def expected(self, most_tokens: int) -> float:
        """Of an output that may still have `most_tokens`."""
        return max(1.0, min(float(most_tokens), self._mean))
