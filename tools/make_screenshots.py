"""Take the pictures of the live page that docs/live-page.md shows.

python -m tools.make_screenshots

It starts a router, two prefill and two decode workers with the model that comes with pdserve, puts load on
them through the HTTP API, and photographs the page in the machine's own Chromium. The pictures differ from
run to run, as times do, so nothing checks them.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from playwright.async_api import Browser, Page, expect

from pdserve.demo import demo_model_path, recall_prompt
from pdserve.engine.settings import EngineSettings
from tests.browser import EXECUTABLE, chromium
from tests.local_system import ADMIN_TOKEN, LocalSystem

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "pictures"
MAX_BYTES = 200_000
DESKTOP = {"width": 1200, "height": 1120}
PHONE = {"width": 390, "height": 844}

LENGTHS = (60, 240, 900, 120, 500)
"""Tokens of the prompts, in turn."""
ANSWER_TOKENS = 160
NUM_CLIENTS = 5
WARM_UP_REQUESTS = 30
"""That have ended before the first picture: enough for percentiles."""


async def main() -> int:
    if EXECUTABLE is None:
        print("needs Chromium (Debian: apt-get install chromium)", file=sys.stderr)
        return 1
    FOLDER.mkdir(exist_ok=True)
    async with _system() as system, _load(system), chromium() as browser:
        await _until_warm(system)
        for name, settings in (
            ("desktop-light", {"viewport": DESKTOP, "color_scheme": "light"}),
            ("desktop-dark", {"viewport": DESKTOP, "color_scheme": "dark"}),
            (
                "phone",
                {"viewport": PHONE, "color_scheme": "light", "device_scale_factor": 2, "is_mobile": True},
            ),
        ):
            async with _page(browser, system, settings) as page:
                await _take(page, name)
        async with _page(browser, system, {"viewport": DESKTOP, "color_scheme": "light"}) as page:
            await _take_waterfall(page, "waterfall")
    return 0


@asynccontextmanager
async def _system() -> AsyncIterator[LocalSystem]:
    settings = EngineSettings(
        str(demo_model_path()), served_name="demo", dtype="float32", threads=1, kv_memory_bytes=16 << 20
    )
    async with LocalSystem(settings, num_prefill=2, num_decode=2) as system:
        yield system


@asynccontextmanager
async def _load(system: LocalSystem) -> AsyncIterator[None]:
    """NUM_CLIENTS clients that ask one question after the other."""
    async with httpx.AsyncClient(trust_env=False, timeout=120) as client:
        clients = [asyncio.create_task(_ask_on(client, system, seed)) for seed in range(NUM_CLIENTS)]
        try:
            yield
        finally:
            for each in clients:
                each.cancel()
            await asyncio.gather(*clients, return_exceptions=True)


async def _ask_on(client: httpx.AsyncClient, system: LocalSystem, seed: int) -> None:
    while True:
        for length in LENGTHS[seed:] + LENGTHS[:seed]:
            seed += NUM_CLIENTS
            body = {
                "messages": [{"role": "user", "content": recall_prompt(seed, length).prompt}],
                "max_tokens": ANSWER_TOKENS,
                "ignore_eos": True,
            }
            answer = await client.post(f"{system.url}/v1/chat/completions", json=body)
            answer.raise_for_status()


async def _until_warm(system: LocalSystem) -> None:
    while len(system.router.reports.recent(WARM_UP_REQUESTS)) < WARM_UP_REQUESTS:  # noqa: ASYNC110
        await asyncio.sleep(0.5)


@asynccontextmanager
async def _page(browser: Browser, system: LocalSystem, settings: dict[str, Any]) -> AsyncIterator[Page]:
    """Open, live, and with everything on it that it shows."""
    context = await browser.new_context(**settings)
    page = await context.new_page()
    await page.goto(f"{system.admin_url}/admin/#token={ADMIN_TOKEN.secret}")
    await expect(page.get_by_text("live", exact=True)).to_be_visible()
    await expect(page.locator("#recent-requests summary").first).to_be_visible()
    yield page
    await context.close()


async def _take_waterfall(page: Page, name: str) -> None:
    """Of the longest of the requests that have ended."""
    ended = page.locator("#recent-requests > li").filter(has_text="length").filter(has_text="900")
    await ended.first.locator("summary").click()
    await expect(page.get_by_role("list", name="When what happened").first).to_be_visible()
    await page.locator("#recent").scroll_into_view_if_needed()
    await _take(page.locator("#recent"), name)


async def _take(what: Any, name: str) -> None:
    path = FOLDER / f"live-page-{name}.png"
    await what.screenshot(path=path, animations="disabled")
    size = path.stat().st_size
    print(f"{path}: {size // 1000} kB")
    if size > MAX_BYTES:
        raise SystemExit(f"{path} has {size} bytes, at most {MAX_BYTES} are wanted: show less on it")


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
