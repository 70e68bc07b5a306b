"""Step costs are fitted from steps that were really run, within what the pool holds."""

from pathlib import Path

import torch

from pdserve.contract.work import StepBatch
from pdserve.engine.calibration import calibrate
from tests.engine_runs import load_engine
from tests.small_models import make_model


def test_costs_are_not_negative_and_grow_with_work(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    make_model("llama", tmp_path)
    engine = load_engine(tmp_path, kv_memory_bytes=20 * 3 * 2 * 16 * 2 * 16 * 4)
    batches: list[StepBatch] = []

    def watched(batch: StepBatch, wanted: object) -> torch.Tensor:
        batches.append(batch)
        return engine.logits(batch, [0])

    cost = calibrate(watched, engine.info)
    assert min(cost.fixed_s, cost.per_decode_sequence_s, cost.per_context_token_s) >= 0
    assert cost.per_prefill_token_s > 0
    used = {block for batch in batches for step in batch.sequences for block in step.block_ids}
    assert max(used) < engine.info.num_blocks == 20
    assert {len(batch.sequences) for batch in batches} == {1, 8}
