"""What the rooms agree on: frozen dataclasses, Protocols and typed errors.

Nothing here does I/O, reads a clock or draws a random number; time and randomness are arguments.
The only library used is `xxhash`, for the names of blocks.

- `ids`: the names of things.
- `tokens`: token ids as uint32 bytes.
- `block_names`: how a KV block gets its chained name.
- `sampling`: what a request asks of the sampler.
- `messages`: what travels between router, decode worker and prefill worker.
- `work`: what a scheduler asks of the engine for one step, and what comes back.
- `ports`: the Protocols through which journeys, loops and hand-off see the world.
- `errors`: every way in which a request can fail.
"""
