"""The one place that says how long a silent peer is believed and how large a message may be."""

KEEPALIVE_TIME_S = 2.0
"""A connection on which nothing arrived for so long is pinged."""

KEEPALIVE_TIMEOUT_S = 3.0
"""A ping that is not answered for so long ends the connection and breaks its streams."""

PEER_LOST_S = KEEPALIVE_TIME_S + KEEPALIVE_TIMEOUT_S
"""A frozen or cut-off peer is dead for us after at most this time."""

FAREWELL_S = 1.0
"""How long an end waits until what has already been said, also that a stream is broken, is with the peer."""

HANDSHAKE_TIMEOUT_S = 10.0
"""How long a connection may take to show that it speaks HTTP/2 (and TLS, where that is configured)."""

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
"""gRPC's default of 4 MiB refuses prompts of a million tokens."""

CUT_OFF_BYTES = 2 * MAX_MESSAGE_BYTES
"""Of a message that is larger than this gRPC itself ends the call, which to a server looks as if the client
had left. Smaller ones arrive, so that those above `MAX_MESSAGE_BYTES` can be refused and counted."""


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


_BOTH_SIDES = (
    ("grpc.keepalive_time_ms", _ms(KEEPALIVE_TIME_S)),
    ("grpc.keepalive_timeout_ms", _ms(KEEPALIVE_TIMEOUT_S)),
    # Its default of 60 s would make keepalive useless for a frozen peer.
    ("grpc.http2.ping_timeout_ms", _ms(KEEPALIVE_TIMEOUT_S)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", CUT_OFF_BYTES),
)

SERVER_OPTIONS = (
    *_BOTH_SIDES,
    # A default server cuts the connection of a client that pings each second.
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.server_handshake_timeout_ms", _ms(HANDSHAKE_TIMEOUT_S)),
    # Two servers on one port would each get a part of the streams; the second is refused instead.
    ("grpc.so_reuseport", 0),
)

CHANNEL_OPTIONS = (
    *_BOTH_SIDES,
    # Otherwise channels with equal options share one connection, and tokens queue behind KV bytes.
    ("grpc.use_local_subchannel_pool", 1),
    # How long connecting may take (a frozen host accepts and says nothing), and how soon a worker that
    # was restarted at its address is found again.
    ("grpc.min_reconnect_backoff_ms", _ms(PEER_LOST_S)),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Workers talk to each other directly, also where http_proxy is set for the outside.
    ("grpc.enable_http_proxy", 0),
)
