"""The digest of `pdserve.handoff.digest`, computed where the bytes lie: on a GPU, by torch's own operators.

The arithmetic is the same modulo 2**64, in torch's int64, which wraps.
"""

import functools

import torch

from pdserve.handoff.digest import RUN_LANES


def digest_tensor(lanes: torch.Tensor) -> int:
    """The digest of `lanes`, int64 of shape [n], which are taken as uint64; in [0, 2**64).

    Works on the current stream and waits for it.
    """
    if not len(lanes):
        return 0
    num_runs = -(-len(lanes) // RUN_LANES)
    weights = _run_weights(num_runs, lanes.device)[:, None] * _lane_weights(lanes.device)[None, :]
    total = (lanes * weights.reshape(-1)[: len(lanes)]).sum()
    return int(total) % 2**64


@functools.cache
def _lane_weights(device: torch.device) -> torch.Tensor:
    columns = torch.arange(RUN_LANES, device=device)
    return (_mix(columns) << 14) + 2 * columns + 1


@functools.lru_cache(maxsize=64)
def _run_weights(num_runs: int, device: torch.device) -> torch.Tensor:
    runs = torch.arange(num_runs, device=device)
    low = ((runs << 14) + 1) & (2**33 - 1)
    return (_mix(runs + RUN_LANES) << 33) + low


def _mix(numbers: torch.Tensor) -> torch.Tensor:
    """splitmix64."""
    mixed = (numbers + 1) * _signed(0x9E3779B97F4A7C15)
    mixed = (mixed ^ _shift_right(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shift_right(mixed, 27)) * _signed(0x94D049BB133111EB)
    return mixed ^ _shift_right(mixed, 31)


def _signed(number: int) -> int:
    """The int64 with the same bits."""
    return number - 2**64


def _shift_right(numbers: torch.Tensor, num_bits: int) -> torch.Tensor:
    """As of unsigned numbers: zeros come in, not the sign."""
    mask: int = (1 << (64 - num_bits)) - 1
    return (numbers >> num_bits) & mask
