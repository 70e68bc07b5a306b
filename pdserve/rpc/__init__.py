"""Streams of messages between processes: the two implementations of the contract's Rpc.

The life of a stream:

1. `open` makes the client's side at once; nobody waits for the peer, a peer that is not there breaks it.
2. The server's side starts the handler of the Call (`stream.serve_stream`).
3. `send` puts a message into the outbox, waiting while the window is full; the carrier (`grpc_stream`,
   `memory_rpc`) brings it into the other side's inbox, where `receive` takes it (`window`).
4. Each side says End once, and the stream is over when both have. A handler that raises or returns
   without it has End said for it, with the error.
5. A stream that stops without both Ends is broken: peer killed, frozen (`channel` says how long a silent
   peer is believed), cut off, or it gave up. Every send and receive then raises StreamBroken; a handler
   that waits in neither is cancelled.

`convert` is the only file that knows both protobuf and the contract; `v1` is generated from proto/.
"""
