"""What steps cost, against torch's own count of a forward pass and against counting one by one."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from pdserve.contract.ids import BlockId
from pdserve.contract.model_work import Experts, ModelWork
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import SampleRequest, SequenceStep, StepBatch
from pdserve.engine.attention_probe import probe_attention
from pdserve.engine.device_peak import find_peak, known_peak
from pdserve.engine.model_shape import model_work
from tests.small_models import make_model

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm}


def part(start: int, num: int, samples: bool = False) -> SequenceStep:
    sample = SampleRequest(SamplingParams(), 1, start + num, 0) if samples else None
    return SequenceStep(pack_tokens([1] * num), start, [BlockId(0)], sample)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma2", "qwen3_moe", "mixtral"])
def test_weights_are_those_that_torch_counts(architecture: str, tmp_path: Path) -> None:
    """The model's own forward pass over 12 tokens multiplies each with every weight, and makes all logits."""
    small = make_model(architecture, tmp_path / architecture)
    model = AutoModelForCausalLM.from_pretrained(
        small.folder, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    config = model.config.get_text_config(decoder=True)
    work = model_work(model, config, probe_attention(architecture, model, config))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(12).unsqueeze(0), use_cache=False)
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if op in PRODUCTS)
    per_token = work.num_weights + work.experts.num_weights_per_token + work.num_head_weights
    assert counted == 2 * per_token * 12


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_attention_counts_every_pair_and_every_token_of_kv(window: int | None) -> None:
    work = ModelWork(0, 0, 2, num_heads=4, num_kv_heads=2, head_dim=8, windows=((window, 3),))
    shapes = [(0, 7), (5, 1), (90, 20), (3, 2)]
    pairs = kv = 0
    for start, num in shapes:
        seen: set[int] = set()
        for position in range(start, start + num):
            visible = range(max(0, position + 1 - (window or position + 1)), position + 1)
            pairs += len(visible)
            seen |= set(visible)
        kv += len(seen)
    found = work.of(StepBatch([part(start, num) for start, num in shapes]))
    assert found.flops == 4 * 3 * 4 * 8 * pairs
    assert found.num_bytes == 2 * 2 * 3 * 2 * 8 * kv


def test_only_sampled_rows_are_multiplied_with_the_head() -> None:
    work = ModelWork(100, 1000, 4, 0, 0, 0, ())
    assert work.of(StepBatch([part(0, 5), part(9, 1)])).flops == 2 * 100 * 6
    sampled = work.of(StepBatch([part(0, 5), part(9, 1, samples=True)]))
    assert sampled.flops == 2 * (100 * 6 + 1000)
    assert sampled.num_bytes == 4 * (100 + 1000)


def test_a_step_reads_the_experts_that_its_tokens_are_sent_to() -> None:
    experts = Experts(count=8, per_token=2, num_weights=800)
    assert experts.share_used(1) == pytest.approx(2 / 8)
    assert experts.share_used(1000) == pytest.approx(1)
    # of 8 experts, 2 tokens miss the same one with probability (6/8)^2
    assert experts.share_used(2) == pytest.approx(1 - 0.75**2)
    assert Experts().share_used(5) == 0


def test_peaks_that_are_told_are_taken_and_others_measured() -> None:
    cpu = torch.device("cpu")
    told = find_peak(cpu, torch.float32, tflops=2.0, gb_per_s=50.0)
    assert (told.flops_per_s, told.bytes_per_s) == (2e12, 50e9)
    measured = find_peak(cpu, torch.float32, tflops=2.0)
    assert measured.flops_per_s == 2e12
    assert measured.bytes_per_s > 0


@pytest.mark.parametrize(
    ("name", "gb_per_s"),
    [
        ("NVIDIA L4", 300),
        ("NVIDIA L40", 864),
        ("NVIDIA L40S", 864),
        ("NVIDIA A100-SXM4-40GB", 1555),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA A1000", None),
    ],
)
def test_gpus_are_known_by_their_whole_name(name: str, gb_per_s: float | None) -> None:
    """Figures of NVIDIA's data sheets."""
    peak = known_peak(name, torch.bfloat16)
    assert (None if peak is None else peak.bytes_per_s / 1e9) == gb_per_s
