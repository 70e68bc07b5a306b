"""The live page in a real browser, on a router with real workers."""

from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from playwright.async_api import Browser, Page, expect

from pdserve.engine.settings import EngineSettings
from tests.browser import chromium, needs_browser
from tests.imagined_fleet import IDLE, ImaginedFleet, ImaginedRequest
from tests.local_system import ADMIN_TOKEN, LocalSystem
from tests.small_models import SmallModel

pytestmark = needs_browser

PROMPT = "Tell me of the sea."
NOTE_CHANGES = """() => {
    window.changed = [];
    const cardOf = ({ target }) => target.parentElement.closest(".card, .pool");
    const nameOf = (record) => cardOf(record).querySelector("h3, h4").textContent;
    const watcher = new MutationObserver((records) => window.changed.push(...records.map(nameOf)));
    const anything = { subtree: true, childList: true, characterData: true, attributes: true };
    watcher.observe(document.getElementById("fleet"), anything);
}"""
NOTE_CHANGED_ROWS = """() => {
    window.changed = [];
    const nameOf = ({ target }) => (target.closest ? target : target.parentElement)
        .closest("#recent-requests > li").querySelector("[data-field=id]").textContent;
    const watcher = new MutationObserver((records) => window.changed.push(...records.map(nameOf)));
    const anything = { subtree: true, childList: true, characterData: true, attributes: true };
    watcher.observe(document.getElementById("recent-requests"), anything);
}"""
FAINT_TEXTS = Path(__file__).parents[1].joinpath("contrast.js").read_text()


@pytest.fixture
async def system(chat_model: SmallModel) -> AsyncIterator[LocalSystem]:
    torch.set_num_threads(1)
    settings = EngineSettings(
        str(chat_model.folder), served_name="small", dtype="float32", threads=1, kv_memory_bytes=4 << 20
    )
    async with LocalSystem(settings) as system:
        yield system
        await system.at_rest()


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest.fixture
async def page(browser: Browser, system: LocalSystem) -> AsyncIterator[Page]:
    """A tab that has not gone anywhere. At the end it has complained of nothing and asked nobody else."""
    context = await browser.new_context()
    page = await context.new_page()
    complaints: list[str] = []
    asked: set[str] = set()
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.add(request.url))
    yield page
    expected = (
        "401 (Unauth",
        "400 (Bad Req",
        "net::ERR_CONNECTION_REFUSED",
        "net::ERR_INCOMPLETE_CHUNKED_ENCODING",
    )
    assert [each for each in complaints if not any(words in each for words in expected)] == []
    assert [url for url in asked if not url.startswith(f"{system.admin_url}/admin/")] == []
    assert [url for url in asked if ADMIN_TOKEN.secret in url.partition("#")[0]] == []


def address(system: LocalSystem) -> str:
    """As `pdserve admin` shows it."""
    return f"{system.admin_url}/admin/#token={ADMIN_TOKEN.secret}"


async def open_page(page: Page, system: LocalSystem) -> None:
    await page.goto(address(system))
    await expect(page.get_by_text("live", exact=True)).to_be_visible()


async def the_answer(system: LocalSystem, max_tokens: int) -> str:
    """What the API itself gives for PROMPT."""
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": max_tokens, "temperature": 0}
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        answer = await client.post(f"{system.url}/v1/chat/completions", json=body)
    return str(answer.json()["choices"][0]["message"]["content"])


# --- who is let in ---


async def test_the_token_leaves_the_address_and_stays_with_the_tab(page: Page, system: LocalSystem) -> None:
    await open_page(page, system)
    assert page.url == f"{system.admin_url}/admin/"
    await page.reload()
    await expect(page.get_by_text("live", exact=True)).to_be_visible()
    stranger = await page.context.new_page()
    await stranger.goto(page.url)
    await expect(stranger.get_by_label("Admin token")).to_be_visible()


async def test_without_a_token_it_asks_for_one_and_a_wrong_one_is_refused(
    page: Page, system: LocalSystem
) -> None:
    await page.goto(f"{system.admin_url}/admin/")
    field = page.get_by_label("Admin token")
    await expect(field).to_be_focused()
    await page.keyboard.type("of somebody else")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert")).to_have_text("The server does not know this token.")
    await expect(page.get_by_role("heading", name="Workers")).to_be_hidden()
    await expect(field).to_be_focused()
    await page.keyboard.type(ADMIN_TOKEN.secret)
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", name="Workers")).to_be_visible()
    await expect(field).to_be_hidden()


# --- what is shown ---


async def test_workers_are_cards_in_their_pools(page: Page, system: LocalSystem) -> None:
    await open_page(page, system)
    for pool in ("Prefill", "Decode"):
        cards = page.get_by_role("list", name=f"{pool} workers").get_by_role("listitem")
        await expect(cards).to_have_count(1)
        await expect(cards.get_by_role("heading", name=f"{pool.lower()}-0")).to_be_visible()
        await expect(cards.get_by_text("ready", exact=True)).to_be_visible()
        worker = system.workers[f"{pool.lower()}-0"]
        await expect(cards.get_by_role("img")).to_have_attribute(
            "aria-label",
            f"KV 0 % held: 0 active, 0 reserved, 0 cached of {worker.ledger.counts().free} blocks",
        )


async def test_a_lost_worker_is_shown_and_announced_and_another_takes_its_place(
    page: Page, system: LocalSystem
) -> None:
    await open_page(page, system)
    await system.workers["prefill-0"].stop()
    card = page.get_by_role("list", name="Prefill workers").get_by_role("listitem")
    await expect(card.get_by_text("unreachable")).to_be_visible()
    await expect(page.get_by_role("status").get_by_text("prefill-0 is unreachable")).to_be_attached()
    await expect(page.get_by_text("degraded: no prefill worker is ready")).to_be_visible()
    await system.replace_worker("prefill-0")
    await expect(card.get_by_text("ready", exact=True)).to_be_visible()
    await expect(page.get_by_text("degraded: no prefill worker is ready")).to_be_hidden()


async def test_percentiles_follow_the_requests(page: Page, system: LocalSystem) -> None:
    await open_page(page, system)
    await the_answer(system, 8)
    row = page.get_by_role("row", name="First token")
    await expect(row.get_by_role("cell").last).to_have_text("1")
    await expect(row.get_by_role("cell").first).to_contain_text("ms")
    between = page.get_by_role("row", name="Between tokens")
    await expect(between.get_by_role("cell").last).to_have_text("7")


async def test_a_prompt_is_tried_with_the_keyboard_alone(page: Page, system: LocalSystem) -> None:
    expected = await the_answer(system, 24)
    await open_page(page, system)
    await page.get_by_label("Prompt", exact=True).focus()
    await page.keyboard.type(PROMPT)
    await page.keyboard.press("Tab")
    await page.keyboard.type("24")  # a field that gets the focus by Tab is selected
    await page.keyboard.press("Enter")
    await expect(page.get_by_text("Complete: 24 tokens, the first after")).to_be_visible()
    assert await page.get_by_label("Answer").text_content() == expected
    here = page.get_by_role("list", name="When tokens came to this browser").get_by_role("listitem")
    await expect(here).to_have_count(2)
    there = page.get_by_role("list", name="When what happened at the router").get_by_role("listitem")
    for stage in ("prefill", "transfer, exposed", "decode"):
        await expect(there.get_by_text(stage, exact=True)).to_be_visible()


async def test_recent_requests_open_to_a_waterfall_by_keyboard(page: Page, system: LocalSystem) -> None:
    await open_page(page, system)
    await expect(page.get_by_text("None yet.")).to_be_visible()
    await the_answer(system, 8)
    row = page.get_by_role("region", name="Recent requests").locator("summary")
    await expect(row).to_have_count(1)
    await expect(row).to_contain_text("length")
    await expect(page.get_by_text("None yet.")).to_be_hidden()
    bars = row.locator(".stage-bar")
    lengths = [box["width"] for bar in await bars.all() if (box := await bar.bounding_box())]
    assert len(lengths) >= 4
    await row.focus()
    await page.keyboard.press("Enter")
    await expect(
        page.get_by_text("Attempt 1: prompt at prefill-0, answer at decode-0; KV by ")
    ).to_be_visible()
    await expect(
        page.get_by_role("list", name="When what happened").get_by_text("prefill queue")
    ).to_be_visible()


async def test_a_stopped_prompt_is_cancelled_everywhere(page: Page, system: LocalSystem) -> None:
    await open_page(page, system)
    await page.get_by_label("Prompt", exact=True).fill(PROMPT)
    await page.get_by_label("Most tokens").fill("200")
    await page.get_by_role("button", name="Send").click()
    await expect(page.get_by_role("list", name="When tokens came to this browser")).to_be_visible()
    await page.get_by_role("button", name="Stop").click()
    await expect(page.get_by_text("Stopped: ")).to_be_visible()
    await expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    await system.at_rest()


async def test_of_100_workers_only_what_changes_is_written(browser: Browser) -> None:
    async with ImaginedFleet(50, 50) as fleet:
        page = await (await browser.new_context()).new_page()
        await page.goto(fleet.url)
        await expect(page.get_by_role("listitem").filter(has_text="KV 0 % held")).to_have_count(100)
        await page.evaluate(NOTE_CHANGES)
        fleet.report("decode-31", replace(IDLE, running_sequences=7))
        await expect(page.get_by_text("7 sequences", exact=True)).to_be_visible()
        changed = await page.evaluate("window.changed")
        await page.close()
    assert set(changed) == {"decode-31", "Decode 50 of 50 workers ready"}


async def test_of_recent_requests_only_what_changes_is_written(browser: Browser) -> None:
    async with ImaginedFleet(1, 1) as fleet:
        running = ImaginedRequest(fleet, "running")
        for number in range(19):
            ImaginedRequest(fleet, f"ended-{number}").end()
        page = await (await browser.new_context()).new_page()
        await page.goto(fleet.url)
        await expect(page.locator("#recent-requests > li")).to_have_count(20)
        await page.evaluate(NOTE_CHANGED_ROWS)
        running.num_tokens = 777
        await expect(page.get_by_text("777 out")).to_be_visible()
        changed = await page.evaluate("window.changed")
        await page.close()
    assert set(changed) == {"running"}


async def test_a_request_that_was_refused_at_the_door_is_a_row_too(page: Page, system: LocalSystem) -> None:
    await the_answer(system, 8)
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        await client.post(f"{system.url}/v1/chat/completions", content="{")
    await open_page(page, system)
    rows = page.get_by_role("region", name="Recent requests").locator("summary")
    await expect(rows).to_have_count(2)
    await expect(rows.first).to_contain_text("invalid_request")
    await rows.first.click()
    await expect(page.get_by_text("the client was told what is wrong")).to_be_visible()


async def test_what_the_router_refuses_is_told(page: Page, system: LocalSystem) -> None:
    await open_page(page, system)
    await page.get_by_label("Prompt", exact=True).fill(PROMPT)
    await page.get_by_label("Most tokens").fill("100000")
    await page.get_by_role("button", name="Send").click()
    await expect(page.get_by_text("Failed: ")).to_contain_text("max_tokens")


async def test_a_page_that_loses_its_router_says_so_and_comes_back(page: Page, system: LocalSystem) -> None:
    await open_page(page, system)
    port = await system.stop_admin()
    await expect(page.get_by_text("connection lost, trying again")).to_be_visible()
    await system.start_admin(port)
    await expect(page.get_by_text("live", exact=True)).to_be_visible()


# --- for whom ---


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_text_stands_out_from_its_ground(page: Page, system: LocalSystem, scheme: Any) -> None:
    """WCAG 2.2 AA: a contrast of at least 4.5."""
    await page.emulate_media(color_scheme=scheme)
    await open_page(page, system)
    faint = await page.evaluate(FAINT_TEXTS)
    assert faint == []
    ground = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(244, 245, 247)") is (scheme == "light")


@pytest.mark.parametrize("width", [320, 375, 768])
async def test_nothing_is_wider_than_a_phone(page: Page, system: LocalSystem, width: int) -> None:
    await page.set_viewport_size({"width": width, "height": 700})
    await open_page(page, system)
    assert await page.evaluate("document.scrollingElement.scrollWidth") <= width


async def test_everything_that_acts_can_be_reached_by_tab_and_has_a_name(
    page: Page, system: LocalSystem
) -> None:
    await open_page(page, system)
    reached = []
    for _ in range(12):
        await page.keyboard.press("Tab")
        reached.append(await page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    links = ["Requests", "Workers", "Recent", "Try"]
    assert reached[:9] == ["Skip to the content", *links, "prompt", "max-tokens", "temperature", "Send"]
    assert "answer" in reached
    levels = await page.evaluate(
        "[...document.querySelectorAll('#live :is(h2, h3, h4), h1')].map((each) => Number(each.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))
    names = await page.evaluate(
        "[...document.querySelectorAll('input, textarea')].map((each) => each.labels.length)"
    )
    assert all(names)
