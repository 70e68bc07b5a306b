"""Room 2: computes the KV of prompts and ships it.

The life of a request here (its queues are the states of `pdserve.handoff.prefill_job.PrefillJob`):

1. A decode worker's `Prefill` call arrives at `PrefillSource.serve`; the job is QUEUED.
2. `PrefillLoop` takes it when it is next in line: the cached prefix is pinned, blocks for the rest of the
   prompt are reserved, and the decode worker is asked to do the same: STARTING.
3. Both have reserved: READY. `scheduler.plan_chunks` mixes chunks of several prompts into each step.
4. After each step the finished blocks get their names, and the call ships them while the next step runs.
5. The last chunk samples the first token: COMPUTED. When the call ends the blocks become prefix cache.
"""
