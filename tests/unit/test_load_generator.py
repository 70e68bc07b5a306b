"""The load generator's pure parts, and its driver in virtual time."""

import asyncio
import gzip
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

from load_generator.arrivals import Lengths, drawn
from load_generator.driver import Progress, Run
from load_generator.prompts import PromptForm, Prompts, Vocabulary
from load_generator.records import Record
from load_generator.report import Result, sweep_table, table
from load_generator.summary import Slo, summarise
from load_generator.sweep import Tried, find_knee, next_rate
from load_generator.traces import PlannedRequest, read_trace, scaled
from pdserve.clock import VirtualClock, run_virtual
from pdserve.contract.errors import ConfigError

# Traces


def test_the_three_schemas_say_the_same(tmp_path: Path) -> None:
    common = tmp_path / "a.jsonl"
    common.write_text(
        '{"t":500,"in":700,"out":3,"hash":[0,1]}\n\n{"t":0,"in":20,"out":2,"hash":[5],"block":32}\n'
    )
    mooncake = tmp_path / "b.jsonl.gz"
    with gzip.open(mooncake, "wt") as file:
        file.write('{"timestamp": 27000, "input_length": 700, "output_length": 3, "hash_ids": [0, 1]}\n')
    azure = tmp_path / "c.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,110,27\n"
    )
    first, second = read_trace(common)
    assert first == PlannedRequest(0.0, 20, 2, (5,), 32)
    assert second == PlannedRequest(0.5, 700, 3, (0, 1), 512)
    assert read_trace(mooncake) == [PlannedRequest(0.0, 700, 3, (0, 1), 512)]
    one, two = read_trace(azure)
    assert (one.due_s, one.num_prompt_tokens, one.num_output_tokens) == (0.0, 4808, 10)
    assert two.due_s == pytest.approx(0.052)
    assert [request.due_s for request in scaled([first, second], 2.0)] == [0.0, 0.25]
    assert len(read_trace(common, limit=1)) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no requests"),
        ("hello\n", "no trace that is known here"),
        ('{"t":0,"in":5}\n', "line 1: 'out' is missing"),
        ('{"t":0,"in":0,"out":1}\n', "line 1: a request has at least one token"),
        ('{"t":0,"in":600,"out":1,"hash":[1]}\n', "line 1: 600 tokens are 2 blocks of 512, 1 ids are given"),
        ('{"t":0,"in":6,"out":1}\n{"t":\n', "line 2: "),
    ],
)
def test_a_bad_trace_is_named_with_its_line(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")) as raised:
        read_trace(file)
    assert str(file) in str(raised.value)


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the trace"):
        read_trace(tmp_path / "none.jsonl")


# Arrivals


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_variation_that_were_asked_for(burstiness: float) -> None:
    requests = drawn(20001, 5.0, burstiness, Lengths(10, 3), np.random.default_rng(1))
    gaps = np.diff([request.due_s for request in requests])
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_steady_and_all_at_once() -> None:
    steady = drawn(4, 2.0, float("inf"), Lengths(), np.random.default_rng(1))
    assert [request.due_s for request in steady] == [0.0, 0.5, 1.0, 1.5]
    at_once = drawn(4, float("inf"), 1.0, Lengths(), np.random.default_rng(1))
    assert {request.due_s for request in at_once} == {0.0}


def test_lengths_spread_around_their_mean() -> None:
    requests = drawn(5000, 1.0, 1.0, Lengths(200, 50, spread=0.2), np.random.default_rng(2))
    prompts = np.array([request.num_prompt_tokens for request in requests])
    assert prompts.mean() == pytest.approx(200, rel=0.02)
    assert prompts.std() == pytest.approx(40, rel=0.05)


# Prompts


def shared(one: list[int], other: list[int]) -> int:
    """Leading tokens in common."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def test_prompts_share_what_their_ids_share_and_no_more() -> None:
    prompts = Prompts(PromptForm.TOKENS, Vocabulary(1000, 20000), seed=3)
    one = prompts.make(0, PlannedRequest(0, 60, 1, (0, 1, 2, 3), 16))
    other = prompts.make(1, PlannedRequest(0, 41, 1, (0, 1, 7), 16))
    alone = prompts.make(2, PlannedRequest(0, 50, 1))
    assert isinstance(one, list)
    assert isinstance(other, list)
    assert isinstance(alone, list)
    assert (len(one), len(other), len(alone)) == (60, 41, 50)
    assert shared(one, other) == 32
    assert shared(one, alone) == 0
    assert all(1000 <= token < 20000 for token in [*one, *other, *alone])
    again = Prompts(PromptForm.TOKENS, Vocabulary(1000, 20000), seed=3)
    assert again.make(1, PlannedRequest(9, 41, 5, (0, 1, 7), 16)) == other
    assert (
        Prompts(PromptForm.TOKENS, Vocabulary(), 4).make(1, PlannedRequest(0, 41, 1, (0, 1, 7), 16)) != other
    )


def test_drawn_requests_share_exactly_the_prefix_that_was_asked_for() -> None:
    lengths = Lengths(100, 5, num_shared_tokens=40, num_groups=2)
    requests = drawn(30, 1.0, 1.0, lengths, np.random.default_rng(4))
    prompts = Prompts(PromptForm.TOKENS, Vocabulary(), seed=0)
    made = [prompts.make(index, request) for index, request in enumerate(requests)]
    overlaps = {shared(a, b) for i, a in enumerate(made) for b in made[:i]}  # type: ignore[arg-type]
    assert overlaps == {0, 40}


def test_texts_have_a_word_per_token() -> None:
    text = Prompts(PromptForm.TEXT, Vocabulary(), seed=0).make(0, PlannedRequest(0, 12, 1))
    assert isinstance(text, str)
    assert len(text.split()) == 12


# Driver


class FakeTarget:
    """Serves one request at a time, 10 ms each, and stands still for a while."""

    def __init__(self, clock: VirtualClock, frozen: tuple[float, float] = (0.0, 0.0)) -> None:
        self.num_running = self.most_running = 0
        self._clock = clock
        self._frozen = frozen
        self._lock = asyncio.Lock()

    def body(self, record: Record) -> bytes:
        return b""

    async def send(self, record: Record, body: bytes, now: object) -> None:
        assert callable(now)
        record.sent_at = now()
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        async with self._lock:
            begin, end = self._frozen
            if begin <= self._clock.now() < end:
                await self._clock.sleep(end - self._clock.now())
            await self._clock.sleep(0.01)
        self.num_running -= 1
        record.token_times.append(now())
        record.num_output_tokens = 1
        record.ended_at = now()


def test_a_server_that_stands_still_is_charged_for_every_request_that_was_due_meanwhile() -> None:
    async def story() -> None:
        clock = VirtualClock()
        planned = [PlannedRequest(0.1 * i, 1, 1) for i in range(100)]
        target = FakeTarget(clock, frozen=(2.0, 4.0))
        records = await Run(target, planned, clock).open_loop()  # type: ignore[arg-type]
        waits = [record.time_to_first_token_s for record in records]
        # 20 requests were due while it stood still; the first of them waited for all of it.
        assert sum(wait > 0.05 for wait in waits) >= 20
        assert max(waits) == pytest.approx(2.01)
        assert all(record.send_delay_s == pytest.approx(0) for record in records)
        summary = summarise(records, Slo(ttft_ms=50))
        assert summary.good_share == sum(wait <= 0.05 for wait in waits) / 100
        assert summary.offered_rate == pytest.approx(10)

    run_virtual(story())


def test_a_closed_loop_keeps_its_number_in_flight() -> None:
    async def story() -> None:
        clock = VirtualClock()
        target = FakeTarget(clock)
        seen: list[Progress] = []
        planned = [PlannedRequest(0, 1, 1)] * 300
        records = await Run(target, planned, clock, seen.append).closed_loop(5)  # type: ignore[arg-type]
        assert target.most_running == 5
        assert [record.index for record in records] == list(range(300))
        assert records[-1].time_to_first_token_s == pytest.approx(0.05)  # the four before it, and itself
        assert [round(progress.seconds) for progress in seen[:2]] == [1, 2]
        assert {progress.num_running for progress in seen[:2]} == {5}
        assert seen[1].num_ended == pytest.approx(200, abs=1)

    run_virtual(story())


# Summary


def random_records(count: int, seed: int) -> list[Record]:
    random = Random(seed)
    records = []
    for index in range(count):
        record = Record(index, PlannedRequest(index * 0.1, 10, 4))
        record.sent_at = index * 0.1 + random.random() * 0.001
        at = record.sent_at
        for _ in range(random.randrange(1, 6)):
            at += random.random()
            record.token_times.append(at)
        record.num_output_tokens = len(record.token_times)
        record.num_prompt_tokens, record.num_cached_tokens = 10, 4
        record.ended_at = at
        if random.random() < 0.1:
            record.error = f"HTTP {random.choice([429, 503])}: words {index}"
        records.append(record)
    return records


def test_a_summary_is_what_counting_by_hand_gives() -> None:
    records = random_records(200, 5)
    slo = Slo(ttft_ms=700, tpot_ms=600, itl_ms=900, e2e_ms=3000)
    summary = summarise(records, slo, skip_s=2.0)
    counted = [r for r in records if r.planned.due_s >= 2.0]
    good = [r for r in counted if r.error is None]
    firsts = sorted((r.token_times[0] - r.planned.due_s) * 1000 for r in good)
    assert summary.num_requests == len(counted) == 180
    assert summary.num_succeeded == len(good)
    assert sum(summary.errors.values()) == len(counted) - len(good)
    assert set(summary.errors) == {"HTTP 429", "HTTP 503"}
    assert summary.time_to_first_token is not None
    assert summary.time_to_first_token.max_ms == firsts[-1]
    assert summary.time_to_first_token.percentiles_ms[50] == pytest.approx(float(np.median(firsts)))
    assert summary.inter_token is not None
    assert summary.inter_token.count == sum(len(r.token_times) - 1 for r in good)
    kept = 0
    for r in good:
        between = [b - a for a, b in zip(r.token_times, r.token_times[1:], strict=False)]
        kept += (
            r.token_times[0] - r.planned.due_s <= 0.7
            and (not between or sum(between) / len(between) <= 0.6)
            and max(between, default=0) <= 0.9
            and r.token_times[-1] - r.planned.due_s <= 3
        )
    assert summary.good_share == kept / 180
    duration_s = max(r.token_times[-1] for r in counted) - 2.0
    assert summary.duration_s == pytest.approx(duration_s)
    assert summary.goodput == pytest.approx(kept / duration_s)
    assert summary.cached_share == pytest.approx(0.4)


def test_a_run_without_a_single_answer_is_told_too() -> None:
    record = Record(0, PlannedRequest(0, 1, 1), sent_at=0.0, ended_at=1.0, error="connection: refused")
    summary = summarise([record], Slo(ttft_ms=100))
    assert summary.time_to_first_token is None
    assert summary.errors == {"connection": 1}
    text = table(Result("one", {}, Slo(ttft_ms=100), summary, [record]))
    assert "0 of 1 requests succeeded" in text
    assert "1 x connection" in text
    with pytest.raises(ValueError, match="no request was due after"):
        summarise([record], Slo(), skip_s=5)


def test_results_can_be_written_as_json_and_read_back() -> None:
    records = random_records(20, 6)
    result = Result("run", {"seed": 1}, Slo(ttft_ms=100), summarise(records, Slo(ttft_ms=100)), records)
    content = json.loads(json.dumps(result.as_json(with_requests=True)))
    assert len(content["requests"]) == 20
    assert content["requests"][3]["due"] == 300.0
    assert content["summary"]["num_requests"] == 20
    assert "p99" in table(result)
    assert len(sweep_table([result, result]).splitlines()) == 3


# Sweep


@pytest.mark.parametrize("capacity", [0.3, 1.0, 7.3, 40.0])
def test_a_sweep_finds_the_knee(capacity: float) -> None:
    tried: list[Tried] = []
    while (rate := next_rate(tried, 1.0, 0.9, max_runs=30)) is not None:
        tried.append(Tried(rate, 1.0 if rate <= capacity else 0.5))
    knee = find_knee(tried, 0.9)
    assert knee.good_rate is not None
    assert knee.bad_rate is not None
    assert knee.good_rate <= capacity < knee.bad_rate
    assert knee.bad_rate / knee.good_rate <= 1.1 + 1e-9


def test_a_sweep_ends_after_its_runs() -> None:
    tried = [Tried(1.5**i, 1.0) for i in range(4)]
    assert next_rate(tried, 1.0, 0.9, max_runs=4) is None
    assert find_knee(tried, 0.9).bad_rate is None
