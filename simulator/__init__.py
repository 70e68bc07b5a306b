"""The simulator: pdserve's own decisions in virtual time, without models.

The router's placement, admission and prefix index, the schedulers of both rooms, the block allocator and
the block ledger are the real ones; only what takes time on a real system, steps and transfers, is a formula.
The life of a request here:

1. `workload` turns a row of a trace into blocks: the trace's prefix ids become the "tokens" of a block
   allocator whose blocks hold one each, so nothing is as long as the prompt.
2. `front.Front` admits it and places it, seeing of each worker only what its last report said (`reports`).
3. `decode.DecodeWorker` pins what it holds of the prompt and asks the chosen `prefill.PrefillWorker`, or
   computes the prompt itself beside its running batch. Both reserve as `room` and the schedulers say.
4. The prompt is computed in chunks, each of which takes as long as `timing` says; its KV travels meanwhile.
5. The sequence joins the batch. Steps are not played one by one: `stretch` knows in one formula when each of
   them ends, until the batch changes.
6. Its end releases its blocks, which stay as prefix cache; `outcome` makes the load generator's records of it
   all, so that `pdserve bench` and the simulator report in the same words.
"""
