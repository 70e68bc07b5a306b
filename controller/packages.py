"""Optional packages that a configuration needs."""

import importlib.util

from pdserve.config import DeployConfig
from pdserve.contract.errors import ConfigError


def require_packages(config: DeployConfig) -> None:
    """Raises ConfigError with what to install where the packages of something configured are missing.

    For processes that run on this machine. On a cluster a worker without a transport's package uses the next
    transport and says so in `pdserve status`; a process without those of traces does not start.
    """
    if "nixl" in config.network.transports and not _is_installed("nixl"):
        raise ConfigError(
            "network.transports names nixl, which is not installed: leave it out, or "
            "pip install 'pdserve[nixl]'",
            param="network.transports",
        )
    if config.tracing.endpoint is not None and not _is_installed("opentelemetry.exporter.otlp.proto.grpc"):
        raise ConfigError(
            "tracing.endpoint is set, and OpenTelemetry is not installed: leave it out, or "
            "pip install 'pdserve[otel]'",
            param="tracing.endpoint",
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False
