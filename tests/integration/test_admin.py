"""The admin server of a router with real workers, asked by a real HTTP client."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import httpx
import pytest
import torch

from pdserve.engine.settings import EngineSettings
from tests.local_system import ADMIN_TOKEN, LocalSystem
from tests.small_models import VOCAB_SIZE, SmallModel, make_model
from tests.small_tokenizers import byte_level_tokenizer

KV_BYTES = 4 << 20
TOKEN = {"authorization": f"Bearer {ADMIN_TOKEN.secret}"}
DATA = [
    "/admin/state",
    "/admin/events",
    "/admin/requests",
    "/admin/requests/7",
    "/admin/decisions",
    "/admin/api/v1/models",
]
PROMPT = {"model": "small", "prompt": list(range(40, 80)), "max_tokens": 8, "temperature": 0}
PROMPT |= {"ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    torch.set_num_threads(1)
    model = make_model("llama", tmp_path_factory.mktemp("llama"), seed=1)
    byte_level_tokenizer(VOCAB_SIZE).save(str(model.folder / "tokenizer.json"))
    return model


@pytest.fixture
async def system(model: SmallModel) -> AsyncIterator[LocalSystem]:
    settings = EngineSettings(
        str(model.folder), served_name="small", dtype="float32", threads=1, kv_memory_bytes=KV_BYTES
    )
    async with LocalSystem(settings) as system:
        yield system
        await system.at_rest()


@pytest.fixture
async def client(system: LocalSystem) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=system.admin_url, trust_env=False, timeout=20) as client:
        yield client


async def next_event(lines: AsyncIterator[str]) -> dict[str, Any]:
    async for line in lines:
        if line.startswith("data: "):
            content: dict[str, Any] = json.loads(line.removeprefix("data: "))
            return content
    raise AssertionError("the stream has ended")


# --- who is let in ---


async def test_data_is_only_for_those_who_show_the_token(client: httpx.AsyncClient) -> None:
    secret = ADMIN_TOKEN.secret
    wrong = ["", "Bearer", "Bearer of somebody else", f"Bearer {secret}x", f"Bearer {secret[:-1]}"]
    wrong += [f"Basic {secret}", secret]
    for path in DATA:
        for headers in ({}, *({"authorization": each} for each in wrong)):
            answer = await client.get(path, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), headers
            assert "pdserve admin" in answer.json()["error"]["message"]


async def test_the_token_in_a_url_or_a_cookie_opens_nothing(client: httpx.AsyncClient) -> None:
    for query in ({"token": ADMIN_TOKEN.secret}, {"access_token": ADMIN_TOKEN.secret}):
        assert (await client.get("/admin/state", params=query)).status_code == 401
    cookie = {"cookie": f"token={ADMIN_TOKEN.secret}"}
    assert (await client.get("/admin/state", headers=cookie)).status_code == 401


async def test_own_names_are_answered_at_any_port(client: httpx.AsyncClient) -> None:
    """Any port: an ssh tunnel has another one at the browser's end."""
    for host in ("127.0.0.1", "localhost:9", "[::1]:9", "LOCALHOST", "admin.example:443"):
        answer = await client.get("/admin/state", headers=TOKEN | {"host": host})
        assert answer.status_code == 200, host


async def test_other_names_are_refused(client: httpx.AsyncClient) -> None:
    names = ["evil.example", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "", "[::1", "localhost:x"]
    for host in names:
        for path in ("/admin/state", "/admin/", "/nothing"):
            answer = await client.get(path, headers=TOKEN | {"host": host})
            assert answer.status_code == 403, host
            assert "router.admin.allowed_hosts" in answer.text


async def test_other_origins_are_refused(client: httpx.AsyncClient) -> None:
    foreign = ["http://evil.example", "null", "http://127.0.0.1", "http://127.0.0.1:1", "http://localhost"]
    for origin in foreign:
        headers = TOKEN | {"origin": origin}
        answer = await client.post("/admin/api/v1/completions", json=PROMPT, headers=headers)
        assert answer.status_code == 403, origin
        assert "origin" in answer.json()["error"]["message"]


async def test_its_own_origin_is_let_in(client: httpx.AsyncClient, system: LocalSystem) -> None:
    for host in (system.admin_url.removeprefix("http://"), "admin.example"):
        for scheme in ("http", "https"):
            headers = TOKEN | {"host": host, "origin": f"{scheme}://{host}"}
            assert (await client.get("/admin/state", headers=headers)).status_code == 200


async def test_every_answer_tells_browsers_to_be_strict(client: httpx.AsyncClient) -> None:
    for path, headers in (("/admin/state", TOKEN), ("/admin/state", {}), ("/admin/none", TOKEN), ("/", {})):
        answer = await client.get(path, headers=headers)
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in answer.headers


# --- what is shown ---


async def test_the_state_is_that_of_the_fleet(client: httpx.AsyncClient, system: LocalSystem) -> None:
    state = (await client.get("/admin/state", headers=TOKEN)).json()
    assert (state["router"], state["ready"], state["takes"]) == ("router-0", True, "chat")
    assert [(pool["role"], pool["num_workers"], pool["num_usable"]) for pool in state["pools"]] == [
        ("prefill", 1, 1),
        ("decode", 1, 1),
    ]
    assert [(each["id"], each["state"]) for each in state["workers"]] == [
        ("decode-0", "ready"),
        ("prefill-0", "ready"),
    ]
    for each in state["workers"]:
        worker = system.workers[each["id"]]
        assert each["address"] == worker.address
        assert sum(each["blocks"].values()) == sum(asdict(worker.block_counts()).values())
        assert each["waiting_requests"] == each["running_sequences"] == 0


async def test_requests_show_in_percentiles_and_blocks(
    client: httpx.AsyncClient, system: LocalSystem
) -> None:
    for first in range(3):
        body = PROMPT | {"prompt": [first, *range(40, 80)]}
        assert (await client.post(f"{system.url}/v1/completions", json=body)).status_code == 200
    state = (await client.get("/admin/state", headers=TOKEN)).json()
    latency = state["latency"]
    assert latency["time_to_first_token"]["count"] == latency["end_to_end"]["count"] == 3
    assert latency["inter_token"]["count"] == 3 * (8 - 1)
    for kind in ("time_to_first_token", "inter_token", "end_to_end"):
        assert 0 < latency[kind]["p50_s"] <= latency[kind]["p90_s"] <= latency[kind]["p99_s"]
    assert latency["time_to_first_token"]["p99_s"] <= latency["end_to_end"]["p99_s"]
    assert state["slo"]["limits_s"] == {}  # so that every whole answer is good
    assert (state["slo"]["num_good"], state["slo"]["num_counted"]) == (3, 3)
    assert system.router.fleet.workers["decode-0"].num_output_tokens == 3 * 8


async def test_a_worker_that_goes_away_is_shown_as_such(
    client: httpx.AsyncClient, system: LocalSystem
) -> None:
    await system.workers["prefill-0"].stop()
    async with client.stream("GET", "/admin/events", headers=TOKEN) as answer:
        lines = answer.aiter_lines()
        while (state := await next_event(lines))["workers"][1]["state"] == "ready":
            pass
    assert state["workers"][1]["state"] == "unreachable"
    assert state["workers"][1]["blocks"] is None
    assert state["pools"][0]["num_usable"] == 0
    assert state["reason"].startswith("degraded")


async def test_events_come_to_all_who_watch_and_end_with_the_last_of_them(
    client: httpx.AsyncClient, system: LocalSystem
) -> None:
    async with (
        client.stream("GET", "/admin/events", headers=TOKEN) as one,
        client.stream("GET", "/admin/events", headers=TOKEN) as other,
    ):
        assert one.headers["content-type"].startswith("text/event-stream")
        first, second = one.aiter_lines(), other.aiter_lines()
        for _ in range(2):
            assert (await next_event(first))["router"] == (await next_event(second))["router"] == "router-0"
        assert system.live.num_followers == 2
    async with asyncio.timeout(10):
        while system.live.num_followers:  # noqa: ASYNC110  the server hears of it in its own time
            await asyncio.sleep(0.01)


async def test_rates_show_who_is_at_work(client: httpx.AsyncClient, system: LocalSystem) -> None:
    async with client.stream("GET", "/admin/events", headers=TOKEN) as answer:
        lines = answer.aiter_lines()
        await next_event(lines)
        body = PROMPT | {"max_tokens": 40}
        assert (await client.post(f"{system.url}/v1/completions", json=body)).status_code == 200
        while not (state := await next_event(lines))["requests"]["ended_per_s"]:
            pass
    decode, prefill = state["workers"]
    assert decode["steps_per_s"] > 0
    assert decode["output_tokens_per_s"] > 0
    assert prefill["output_tokens_per_s"] == 0
    assert state["requests"]["output_tokens_per_s"] == pytest.approx(decode["output_tokens_per_s"])


async def test_a_request_is_reported_with_who_served_it_and_when(
    client: httpx.AsyncClient, system: LocalSystem
) -> None:
    answer = await client.post(f"{system.url}/v1/completions", json=PROMPT)
    request_id = answer.headers["x-request-id"]
    report = (await client.get(f"/admin/requests/{request_id}", headers=TOKEN)).json()
    assert (report["request_id"], report["outcome"]) == (request_id, "length")
    assert (report["prompt_tokens"], report["output_tokens"]) == (40, 8)
    (attempt,) = report["attempts"]
    assert (attempt["prefill_worker"], attempt["decode_worker"]) == ("prefill-0", "decode-0")
    assert {stage["name"] for stage in report["stages"]} >= {"prefill", "transfer", "decode"}
    listed = (await client.get("/admin/requests", headers=TOKEN)).json()
    assert listed["requests"] == [report]
    assert listed["now"] >= report["arrived_at"]


async def test_decisions_tell_why_and_what_came_of_them(
    client: httpx.AsyncClient, system: LocalSystem
) -> None:
    asks = {"X-Pdserve-Placement": "1"}
    answer = await client.post(f"{system.url}/v1/completions", json=PROMPT, headers=asks)
    report = (await client.get(f"/admin/requests/{answer.headers['x-request-id']}", headers=TOKEN)).json()
    (attempt,) = report["attempts"]
    workers, _, predicted_s = answer.headers["x-pdserve-placement"].rpartition(";predicted=")
    assert workers == "decode=decode-0;prefill=prefill-0"
    assert float(predicted_s) == pytest.approx(attempt["predicted"]["second_token_s"], abs=6e-5)
    listed = (await client.get("/admin/decisions", headers=TOKEN)).json()
    (decision,) = listed["decisions"]
    assert decision["request_id"] == report["request_id"]
    assert (decision["prefill_worker"], decision["decode_worker"]) == ("prefill-0", "decode-0")
    assert decision["reason"] == attempt["placement"]
    assert (decision["predicted"], decision["runner_up"]) == (attempt["predicted"], attempt["runner_up"])
    actual = decision["actual"]
    assert actual["first_token_s"] == pytest.approx(
        attempt["first_token_s"] - attempt["submitted_s"], abs=2e-6
    )
    assert actual["second_token_s"] == pytest.approx(
        attempt["second_token_s"] - attempt["submitted_s"], abs=2e-6
    )
    refused = await client.get("/admin/decisions", headers=TOKEN, params={"limit": 0})
    assert refused.status_code == 400


async def test_requests_are_listed_newest_first_and_those_that_run_before_all(
    client: httpx.AsyncClient, system: LocalSystem
) -> None:
    ended = [
        (await client.post(f"{system.url}/v1/completions", json=PROMPT)).headers["x-request-id"]
        for _ in range(3)
    ]
    body = PROMPT | {"max_tokens": 80, "stream": True}
    async with client.stream("POST", f"{system.url}/v1/completions", json=body) as running:
        await anext(running.aiter_lines())
        listed = (await client.get("/admin/requests", headers=TOKEN, params={"limit": 3})).json()["requests"]
    assert [each["request_id"] for each in listed] == [running.headers["x-request-id"], *ended[:0:-1]]


async def test_unknown_requests_and_wrong_limits_are_refused(client: httpx.AsyncClient) -> None:
    assert (await client.get("/admin/requests/none", headers=TOKEN)).status_code == 404
    for limit in ("0", "-1", "1025", "x", "", "\u0661"):
        answer = await client.get("/admin/requests", headers=TOKEN, params={"limit": limit})
        assert answer.status_code == 400, limit
        assert "'limit'" in answer.json()["error"]["message"]


async def test_a_prompt_can_be_tried_through_the_routers_own_api(
    client: httpx.AsyncClient, system: LocalSystem
) -> None:
    there = await client.post("/admin/api/v1/completions", json=PROMPT, headers=TOKEN)
    here = await client.post(f"{system.url}/v1/completions", json=PROMPT)
    assert there.status_code == 200
    assert there.headers["x-request-id"]
    assert there.json()["choices"] == here.json()["choices"]
    async with client.stream(
        "POST", "/admin/api/v1/completions", json=PROMPT | {"stream": True}, headers=TOKEN
    ) as answer:
        pieces = [line async for line in answer.aiter_lines() if line.startswith("data: {")]
    text = "".join(json.loads(piece.removeprefix("data: "))["choices"][0]["text"] for piece in pieces)
    assert text == here.json()["choices"][0]["text"]


async def test_the_server_stops_while_somebody_watches(model: SmallModel) -> None:
    settings = EngineSettings(str(model.folder), dtype="float32", threads=1, kv_memory_bytes=KV_BYTES)
    async with httpx.AsyncClient(trust_env=False, timeout=20) as client:
        async with LocalSystem(settings) as system:
            answer = await client.send(
                client.build_request("GET", f"{system.admin_url}/admin/events", headers=TOKEN), stream=True
            )
            lines = answer.aiter_lines()
            await next_event(lines)
        async for _ in lines:
            pass
        await answer.aclose()
