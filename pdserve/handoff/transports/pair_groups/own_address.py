"""Under which of its addresses a peer reaches this host."""

import socket

from pdserve.contract.errors import StreamBroken


def own_address_towards(host: str) -> str:
    """The local IP address of the way to `host`. May wait for a name to be looked up; sends nothing.

    Raises StreamBroken when there is no way.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # chooses a route, no more
            return str(probe.getsockname()[0])
    except OSError as error:
        raise StreamBroken(f"there is no way to {host!r} ({error})") from error
