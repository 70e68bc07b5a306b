"""Taking a port, or saying why it cannot be had."""

import errno
import socket

from pdserve.contract.errors import ConfigError


def bind(host: str, port: int, setting: str) -> socket.socket:
    """A TCP socket bound to host:port, 0 for any free port. Raises ConfigError that names the port and
    `setting`, which is what the operator can change."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP: only then asyncio turns Nagle's algorithm off for what it accepts. Else a stream's first
    # token waits until the client has acknowledged the headers, 40 ms.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(1)  # with SO_REUSEADDR only this finds out whether somebody else listens there
    except OSError as error:
        bound.close()
        raise ConfigError(why_not(host, port, setting, error)) from error
    return bound


def why_not(host: str, port: int, setting: str, error: OSError) -> str:
    """The cause and the fix in one line."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use: choose another {setting}, or stop the process that holds it"
    if error.errno == errno.EACCES:
        return f"port {port} on {host} needs privileges: choose an {setting} above 1023"
    return f"cannot listen on {host}:{port} ({error.strerror or error}): check host and {setting}"
