"""pdserve: disaggregated prefill/decode serving of large language models.

This package is the foundation that the rooms (`router`, `prefill_worker`, `decode_worker`) and the
caretaker (`controller`) stand on. It imports none of them.

- `pdserve.contract`: what the rooms agree on. Data, Protocols and typed errors; no I/O.
- `pdserve.engine`: models, the paged KV pool, attention and sampling.
- `pdserve.handoff`: both ends of the KV hand-off and its transports.
- `pdserve.rpc`: streams of contract messages over gRPC and in memory.
"""

__version__ = "0.1.0"
