"""The ways in which KV bytes get from a source to a decode worker.

- `base`: the interface and its rules; read it first.
- `negotiation`: which transport a pair of workers uses, and why.
- `grpc_stream`: raw bytes over a gRPC stream. Works everywhere.
- `shared_memory`: straight out of the source's pool, on one host.
- `process_group`: through torch's gloo or NCCL, one group per pair of workers; `pair_groups` keeps them.
- `nixl`: by RDMA, NVLink or what else UCX finds, into `staging` memory; `nixl_agent` and `nixl_remotes`
  keep what NIXL knows. An optional extra.
- `cuda_ipc`: from GPU to GPU on one host. `ipc_driver` is what it needs of CUDA, `cuda_driver` and
  `device_digest` do it, `open_peers` keeps what is open of other processes.
- `pool_bytes`: the own blocks, as all of them read and write them.
- `announcing`: the source's end where receivers read the source's pool by themselves.
- `endpoints`: base of what two ends tell each other.
- `kv_streams`: incoming Kv streams, handed to the transport that opened them.
- `pieces`: how a segment is cut that moves in several steps.

To add one: implement `base.Transport` in a file of its own, name it in `negotiation`, add a world to
tests/contract/transport_pair.py. What the two ends must tell each other is in `TransportChoice` and
`Segment`.
"""
