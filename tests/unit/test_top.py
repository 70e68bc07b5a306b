"""What `pdserve top` shows, from snapshots."""

import json

from pydantic import TypeAdapter

from controller.top import lines_of
from pdserve.contract.work import BlockCounts
from router.admin.state import (
    LatencySnapshot,
    PoolSnapshot,
    RequestsSnapshot,
    SloSnapshot,
    Snapshot,
    WorkerSnapshot,
)
from router.recent_times import Percentiles

WORKER = WorkerSnapshot(
    id="decode-0",
    role="decode",
    address="127.0.0.1:1",
    state="ready",
    waiting_requests=3,
    waiting_tokens=1200,
    running_sequences=8,
    context_tokens=4096,
    blocks=BlockCounts(free=50, cached=25, reserved=5, active=20),
    block_size=16,
    steps_per_s=21.4,
    output_tokens_per_s=170.6,
    prefill_tokens_per_s=0,
    decode_step_s=0.0467,
    report_age_s=0.05,
)
POOL = PoolSnapshot("decode", 1, 1, 3, 1200, 8, WORKER.blocks or BlockCounts(0, 0, 0, 0), 170.6)
STATE = Snapshot(
    router="router-0",
    model="small",
    takes="chat",
    ready=True,
    reason="ready",
    requests=RequestsSnapshot(11, 2, 800, 1.5, 1000.0, 170.6),
    latency=LatencySnapshot(
        300.0, Percentiles(40, 0.12, 0.3, 1.5), Percentiles(999, 0.0047, 0.05, 0.09), Percentiles(0)
    ),
    slo=SloSnapshot({"ttft": 2.0}, 0.99, 40, 39, 1.46),
    pools=(POOL,),
    workers=(WORKER,),
)


def test_all_of_a_snapshot_is_shown_in_columns() -> None:
    assert lines_of(STATE) == [
        "small as router-0 sees it: ready",
        "requests: 11 running, 2 waiting for a worker, 1.5 ended/s",
        "tokens/s: 1000 of prompts, 171 of answers",
        "good by slo: 1.5 requests/s, 97% of 40 in 5 minutes",
        "",
        "LAST 5 MINUTES     P50     P90     P99  COUNT",
        "first token     120 ms  300 ms  1.50 s     40",
        "between tokens  4.7 ms   50 ms   90 ms    999",
        "whole request        -       -       -      0",
        "",
        "POOL    READY  QUEUE  TOKENS  BATCH  KV HELD  TOKENS/S",
        "decode    1/1      3    1200      8      25%       171",
        "",
        "WORKER    STATE  QUEUE  TOKENS  BATCH  KV HELD  STEPS/S  TOKENS/S  LAST STEP",
        "decode-0  ready      3    1200      8      25%       21       171      47 ms",
    ]


def test_a_snapshot_is_the_same_after_its_way_as_json() -> None:
    assert TypeAdapter(Snapshot).validate_json(json.dumps(STATE.as_json())) == STATE
