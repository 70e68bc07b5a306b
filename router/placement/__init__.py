"""Which workers serve a request. Pure: everything that a policy looks at is an argument or its own state.

1. `fleet.Fleet.view` lays out what the router believes: the usable workers of both pools as `Candidate`s,
   what each holds of this prompt (`Held`), which pairs must not be used, how fast KV travels.
2. A `PlacementPolicy` chooses a decode worker and a prefill worker, or a decode worker alone, from that view
   and the `PlacementRequest`, and says why: a `Placement`.
3. `policies.make_policy` knows them all by name (`router.policy` in the configuration).
"""
