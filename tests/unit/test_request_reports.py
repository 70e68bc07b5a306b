"""Which reports are kept, and what becomes of them on the way out."""

import json
from dataclasses import dataclass, replace

import pytest

from pdserve.contract.errors import ErrorCode, ErrorInfo
from pdserve.contract.ids import RequestId, WorkerId
from pdserve.contract.messages import RequestTimings
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import pack_tokens
from router.grpc_convert import timings_from
from router.placement.policy import Placement
from router.progress import Progress
from router.report_json import log_fields, report_json, timings_json
from router.request_reports import (
    MAX_ATTEMPTS,
    MAX_TEXT,
    AttemptReport,
    Origin,
    RequestReport,
    RequestReports,
    refused_report,
    shortened,
)
from router.requests import Closing, GenerateRequest

LOST = AttemptReport(
    number=1,
    decode_worker=WorkerId("decode-1"),
    prefill_worker=WorkerId("prefill-0"),
    placement="split: secret load",
    submitted_s=0.001,
    first_token_s=None,
    second_token_s=None,
    ended_s=0.5,
    end="worker_lost",
    message="10.0.0.7:5000 said nothing",
    timings=None,
)
SERVED = AttemptReport(
    number=2,
    decode_worker=WorkerId("decode-0"),
    prefill_worker=WorkerId("prefill-0"),
    placement="split: secret load",
    submitted_s=0.6,
    first_token_s=0.9,
    second_token_s=0.95,
    ended_s=1.5,
    end="length",
    message=None,
    timings=RequestTimings(
        cached_prompt_tokens_prefill=16,
        queue_s=0.1,
        prefill_s=0.2,
        transfer_bytes=4096,
        transport="grpc",
        transfer_hidden_s=0.05,
        transfer_exposed_s=0.0123456789,
        transport_reason="other host: secret",
        transfer_is_whole=True,
    ),
)
REPORT = RequestReport(
    request_id=RequestId("r-1"),
    origin=Origin("chat", "small", "chatcmpl-r-1", 0, "mine"),
    arrived_at=1_700_000_000.5,
    num_prompt_tokens=33,
    num_output_tokens=9,
    attempts=(LOST, SERVED),
    num_attempts=2,
    recoveries={"worker_lost": 1},
    first_token_s=0.9,
    second_token_s=1.0,
    last_token_s=1.5,
    ended_s=1.5,
    outcome="length",
    message=None,
)


@dataclass
class Running:
    """A request on its way."""

    request_id: RequestId

    def report(self) -> RequestReport:
        return replace(REPORT, request_id=self.request_id, outcome=None)


def ended(name: str) -> RequestReport:
    return replace(REPORT, request_id=RequestId(name))


def names(reports: list[RequestReport]) -> list[str]:
    return [report.request_id for report in reports]


def test_the_last_ones_that_ended_are_kept() -> None:
    reports = RequestReports(max_ended=3)
    for number in range(5):
        reports.begin(Running(RequestId(f"{number}")))
        reports.end(ended(f"{number}"))
    assert names(reports.recent(10)) == ["4", "3", "2"]
    assert names(reports.recent(2)) == ["4", "3"]
    assert reports.recent(0) == []
    assert [reports.find(f"{number}") is None for number in range(5)] == [True, True, False, False, False]


def test_those_that_run_are_never_forgotten() -> None:
    reports = RequestReports(max_ended=1)
    for number in range(5):
        reports.begin(Running(RequestId(f"{number}")))
    reports.end(ended("3"))
    reports.end(ended("1"))
    assert names(reports.running()) == ["4", "2", "0"]
    assert names(reports.recent(10)) == ["1"]
    running, gone = reports.find("2"), reports.find("3")
    assert running is not None
    assert running.outcome is None
    assert gone is None
    assert reports.find("who") is None


def test_the_json_of_a_report() -> None:
    told = json.loads(json.dumps(report_json(REPORT)))
    assert told["state"] == "ended"
    assert told["recoveries"] == {"worker_lost": 1}
    lost, served = told["attempts"]
    assert (lost["message"], lost["transfer"], lost["cached_tokens"]) == (LOST.message, None, None)
    assert served["cached_tokens"] == {"prefill": 16, "decode": 0}
    assert served["transfer"] == {
        "transport": "grpc",
        "bytes": 4096,
        "is_whole": True,
        "hidden_s": 0.05,
        "exposed_s": 0.012346,
        "reason": "other host: secret",
    }
    assert [(stage["name"], stage["start_s"], stage["end_s"]) for stage in told["stages"]] == [
        ("router queue", 0.0, 0.001),
        ("prompt", 0.001, 0.5),
        ("router queue", 0.5, 0.6),
        ("prefill queue", 0.6, 0.7),
        ("prefill", 0.7, 0.9),
        ("transfer", 0.9, 0.912346),
        ("decode", 0.9, 1.5),
    ]


def test_clients_are_told_nothing_of_the_deployment_but_the_names_of_their_workers() -> None:
    told = json.dumps(timings_json(REPORT))
    assert "decode-1" in told
    assert "worker_lost" in told
    for secret in ("10.0.0.7", "said nothing", "secret", "mine"):
        assert secret not in told


def test_the_grpc_api_tells_clients_the_same() -> None:
    timings = timings_from(REPORT)
    lost, served = timings.attempts
    assert (timings.request_id, timings.num_attempts, timings.second_token_s) == ("r-1", 2, 1.0)
    assert (lost.decode_worker, lost.end, lost.HasField("transfer")) == ("decode-1", "worker_lost", False)
    assert (served.transfer.transport, served.transfer.bytes) == ("grpc", 4096)
    assert (served.cached_tokens.prefill, served.prefill_queue_s, served.prefill_s) == (16, 0.1, 0.2)


def test_a_transfer_that_goes_on_has_no_times_yet() -> None:
    assert SERVED.timings is not None
    going_on = replace(SERVED, timings=replace(SERVED.timings, transfer_is_whole=False))
    report = replace(REPORT, attempts=(going_on,))
    (attempt,) = timings_json(report)["attempts"]
    assert (attempt["transfer"]["bytes"], attempt["transfer"]["exposed_s"]) == (4096, None)
    assert "transfer" not in [stage["name"] for stage in report_json(report)["stages"]]


def test_a_log_line_is_flat_and_has_only_what_is_known() -> None:
    fields = log_fields(REPORT)
    assert all(isinstance(value, str | int | float) for value in fields.values())
    assert (fields["decode_worker"], fields["recoveries"]) == ("decode-0", "worker_lost:1")
    nothing = log_fields(replace(REPORT, attempts=(), recoveries={}, first_token_s=None))
    assert not {"decode_worker", "prefill_s", "first_token_s", "recoveries"} & set(nothing)


def test_of_many_attempts_the_last_are_told_and_all_are_counted() -> None:
    request = GenerateRequest(pack_tokens([5] * 33), SamplingParams(max_tokens=9), origin=REPORT.origin)
    progress = Progress(RequestId("r-2"), request, 1, REPORT.arrived_at, 100.0, None, Closing())
    for number in range(1, MAX_ATTEMPTS + 5):
        attempt = progress.next_attempt(Placement(WorkerId("decode-0"), None, "local", 1), 100.0 + number)
        attempt.ended("preempted", 100.5 + number, "x" * 10_000)
        progress.recoveries["preempted"] += 1
    report = progress.report()
    assert (report.num_attempts, report.recoveries) == (MAX_ATTEMPTS + 4, {"preempted": MAX_ATTEMPTS + 4})
    assert [attempt.number for attempt in report.attempts] == list(range(5, MAX_ATTEMPTS + 5))
    assert {len(attempt.message or "") for attempt in report.attempts} == {MAX_TEXT}
    # since when the first that is told had waited is not known; now it waits again, for one more
    told = [(stage.name.value, stage.attempt, stage.start_s) for stage in report.stages]
    assert told[:2] == [("prompt", 5, 5.0), ("router queue", 6, 5.5)]
    assert told[-1] == ("router queue", MAX_ATTEMPTS + 5, MAX_ATTEMPTS + 4.5)


@pytest.mark.parametrize("length", [0, MAX_TEXT, MAX_TEXT + 1, 10 * MAX_TEXT])
def test_texts_are_bounded(length: int) -> None:
    assert len(shortened("x" * length)) == min(length, MAX_TEXT)


def test_a_flood_of_refusals_pushes_no_served_request_out() -> None:
    reports = RequestReports()
    reports.begin(Running(REPORT.request_id))
    reports.end(REPORT)
    for number in range(3000):
        error = ErrorInfo(ErrorCode.OVERLOADED, "full")
        request_id = RequestId(f"refused-{number}")
        reports.refuse(refused_report(request_id, Origin(), error, REPORT.arrived_at + 100, 0.5, None))
    assert reports.find(REPORT.request_id) == REPORT
    assert [report.request_id for report in reports.recent(2)] == ["refused-2999", "refused-2998"]
    assert reports.recent(5000)[-1] == REPORT
    assert reports.find("refused-0") is None
