"""Deterministic simulation: whole systems with faults, one per seed, in one process and in virtual time.

    python -m tests.simulation --seeds 0:20000 --jobs 2
    python -m tests.simulation --seeds 4711:4712 --events

Routers, worker loops and hand-off are the shipped code; only what lies below the Protocols of
`pdserve.contract.ports` is simulated: clock, network, executor and engine. One seed is one `Run`:

1. `scenario` draws from the seed what the system looks like, what is asked of it, and which faults are to
   strike whom in which state.
2. `system` builds it: two routers, six workers and a caretaker that replaces dead processes, on a
   `SimulatedNetwork`.
3. `clients` ask, read, leave, are slow; each compares every token with the single process's at once.
4. `faults` strike when somebody is in the state that they are meant for; `coverage` notes everybody whom
   they concern, in which state.
5. `invariants` look at a worker's books before every event that reaches it (O(1)) and after each of its
   engine steps (completely), and when all is over at everything.
6. `run` reports: what went wrong, what was covered, and the event log by which two runs of a seed are
   compared.
"""
