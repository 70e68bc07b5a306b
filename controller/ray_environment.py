"""What Ray reads from the environment when it is imported. Set here before anything imports it."""

import os

AUTH_MODE = "RAY_AUTH_MODE"

_SETTINGS = {
    # No reports about this machine to anybody.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray would print a stack trace at SIGTERM, which is how systems are ended.
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    # Everything that Ray would print at a driver about its actors; pdserve says itself what happens.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
}


def prepare_ray(auth_mode: str = "") -> None:
    """`auth_mode` is that of the cluster to join, where it is known; else the user's own settings apply."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if auth_mode:
        os.environ[AUTH_MODE] = auth_mode


def auth_mode() -> str:
    """Of the cluster that this process has started or joined."""
    return os.environ.get(AUTH_MODE, "")
