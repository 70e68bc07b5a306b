"""Optional packages that a configuration needs."""

import importlib.util

from pdserve.config import DeployConfig
from pdserve.contract.errors import ConfigError


def require_packages(config: DeployConfig) -> None:
    """Raises ConfigError with what to install where a transport is named whose package this machine has not.

    For workers that run on this machine. On a cluster a worker without the package uses the next transport
    and says so in `pdserve status`.
    """
    if "nixl" in config.network.transports and importlib.util.find_spec("nixl") is None:
        raise ConfigError(
            "network.transports names nixl, which is not installed: leave it out, or "
            "pip install 'pdserve[nixl]'",
            param="network.transports",
        )
