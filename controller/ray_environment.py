"""What has to be arranged in a process before it imports Ray: what Ray reads from the environment, and
where its libraries write."""

import os
import sys
from functools import cache

AUTH_MODE = "RAY_AUTH_MODE"
HEAD_AWAY_S = 600
"""How long the processes of a local Ray, and this one, outlive Ray's head; Ray's own value is 60 s."""

_SETTINGS = {
    # No reports about this machine to anybody.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray would print a stack trace at SIGTERM, which is how systems are ended.
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    # Everything that Ray would print at a driver about its actors; pdserve says itself what happens.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
    # Nothing of a request goes through the head, so they are served without it.
    "RAY_gcs_rpc_server_reconnect_timeout_s": str(HEAD_AWAY_S),
    # Ray's own 15 is for batch work: whatever else runs on the machine would come long before who serves.
    "RAY_worker_niceness": "0",
}


def prepare_ray(auth_mode: str = "") -> None:
    """`auth_mode` is that of the cluster to join, where it is known; else the user's own settings apply."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if auth_mode:
        os.environ[AUTH_MODE] = auth_mode
    _keep_stderr()


@cache
def _keep_stderr() -> None:
    """From now on only Python writes to this process' stderr. Libraries in C, which write to file descriptor
    2, would put lines of their own between ours; what matters of them is also in Ray's logs."""
    sys.stderr.flush()
    kept = os.dup(2)
    sys.stderr = os.fdopen(kept, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def auth_mode() -> str:
    """Of the cluster that this process has started or joined."""
    return os.environ.get(AUTH_MODE, "")
