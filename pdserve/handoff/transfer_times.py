"""How much of a transfer the computation hid. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Overlap:
    """Of one prompt's transfer, seen from the end of the prompt's last forward pass. Seconds.

    Clocks differ, so the end is taken for one message's way later than it was at the source.
    """

    hidden_s: float
    """Spent copying and verifying before it."""
    exposed_s: float
    """From it until everything was verified and sealed: what the second token had to wait for."""
    share_ahead: float
    """Of the bytes, those that were verified before it."""


class TransferTimes:
    """When the segments of one transfer came. Times are the decode worker's."""

    def __init__(self) -> None:
        self._copies: list[tuple[float, float, int]] = []  # begun, verified, bytes

    def add(self, begun_at: float, verified_at: float, num_bytes: int) -> None:
        self._copies.append((begun_at, verified_at, num_bytes))

    def overlap(self, computed_at: float, proven_at: float) -> Overlap | None:
        """Split at `computed_at`, the end of the last forward pass. None when nothing was copied."""
        num_bytes = sum(num_bytes for _, _, num_bytes in self._copies)
        if not num_bytes:
            return None
        ahead = sum(num_bytes for _, verified_at, num_bytes in self._copies if verified_at <= computed_at)
        hidden_s = sum(
            max(0.0, min(verified_at, computed_at) - begun_at) for begun_at, verified_at, _ in self._copies
        )
        return Overlap(hidden_s, max(0.0, proven_at - computed_at), ahead / num_bytes)
