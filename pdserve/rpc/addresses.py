"""Where calls between routers and workers may go: without TLS they stay within private networks."""

import asyncio
import ipaddress
import re
import socket

import psutil

from pdserve.contract.errors import ConfigError

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_LAST_PORT = 65535
_NAME = re.compile(r"[\w.:%-]+", re.ASCII)


class UnprotectedAddress(ConfigError):
    """Calls without encryption would leave the private networks."""


def split_address(address: str) -> tuple[str, int]:
    """host:port or [host]:port. Raises ConfigError for anything else, in particular for gRPC's other kinds
    of target, such as ``unix:/path``."""
    host, _, port = address.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    name = host[1:-1] if is_bracketed else host
    is_port = port.isascii() and port.isdigit() and int(port) <= _LAST_PORT
    if not is_port or not _NAME.fullmatch(name) or (":" in name) is not is_bracketed:
        raise ConfigError(f"{address!r} is not an address: give host:port, or [host]:port for IPv6")
    return name, int(port)


async def require_private(host: str) -> None:
    """Raises UnprotectedAddress unless every address of `host` is private, loopback or link-local. All of
    this machine's are meant by 0.0.0.0 and ::. A name that cannot be resolved passes: it leads nowhere."""
    public = [ip for ip in await _addresses(host) if not is_private(ip)]
    if public:
        raise UnprotectedAddress(
            f"{host} is reached at {public[0]}, which is not a private address, and calls between routers "
            "and workers are not encrypted: configure network.tls (docs/security.md), or keep "
            "network.address and network.bind within a private network",
            param="network.tls",
        )


def is_private(ip: IpAddress) -> bool:
    """Whether `ip` is of a private network, loopback or link-local."""
    mapped = getattr(ip, "ipv4_mapped", None)
    if mapped is not None:
        return is_private(mapped)
    return ip.is_private or ip.is_loopback or ip.is_link_local


async def _addresses(host: str) -> list[IpAddress]:
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return await _resolve(host)
    return _own_addresses() if ip.is_unspecified else [ip]


async def _resolve(name: str) -> list[IpAddress]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [_parse(str(entry[4][0])) for entry in found]


def _own_addresses() -> list[IpAddress]:
    """Of all network interfaces of this machine."""
    families = (socket.AF_INET, socket.AF_INET6)
    entries = (entry for interface in psutil.net_if_addrs().values() for entry in interface)
    return [_parse(entry.address) for entry in entries if entry.family in families]


def _parse(address: str) -> IpAddress:
    return ipaddress.ip_address(address.partition("%")[0])  # without the name of the interface
