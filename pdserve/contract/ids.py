"""The names of things. Ids are never reused within one incarnation of the process that made them."""

from typing import NewType

RequestId = NewType("RequestId", str)
"""One user request, made by the router: its incarnation and a counter. Survives every attempt."""

WorkerId = NewType("WorkerId", str)
"""One worker, for example ``prefill-0``. A replaced worker may keep the name; its incarnation differs."""

RouterId = NewType("RouterId", str)
"""One router, for example ``router-0``."""

Incarnation = NewType("Incarnation", int)
"""63 random bits drawn when a process starts. Messages of another incarnation are dropped."""

BlockHash = NewType("BlockHash", int)
"""The 64-bit chained name of a full block. A name, not a proof: reuse compares tokens and parent."""

BlockId = NewType("BlockId", int)
"""Row of a worker's KV pool."""

SubmitNumber = NewType("SubmitNumber", int)
"""Counts the Submits of one Session stream from 1. Names one (request, attempt) on that stream."""
