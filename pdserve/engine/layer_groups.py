"""Where a step stops to tell how far it is. Pure.

The KV of a prompt's last chunk leaves by groups of layers while later layers are computed. The groups are
few: each costs a message, a digest and an answer, so many small ones would gain nothing.
"""

NUM_GROUPS = 4


def group_stops(num_layers: int) -> tuple[int, ...]:
    """Where the groups of layers end; the last at `num_layers`. Models of fewer layers have fewer groups."""
    num_groups = min(NUM_GROUPS, num_layers)
    return tuple(num_layers * (group + 1) // num_groups for group in range(num_groups))
