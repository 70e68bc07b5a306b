"""What the live page costs a browser that shows 100 workers.

    python -m benchmarks.live_page --json results.json
    python -m benchmarks.live_page --smoke

A router believes in 50 prefill and 50 decode workers whose every number changes before every event, once a
second, which is the worst that can come; 20 recent requests, of which half run, change with them. The page
is open in the machine's own Chromium, at full speed and slowed down four times, as a phone would be. Counted
are long tasks (more than 50 ms on the main thread, as PerformanceObserver tells them) after the page has
been built, how much of the time the main thread was busy, and the longest time between two frames, which an
idle page shows too: what another process takes of the machine is in it.
"""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, CDPSession, Page

from benchmarks.conditions import conditions
from router.admin.state import INTERVAL_S
from router.request_reports import RequestReport
from tests.browser import chromium
from tests.imagined_fleet import ImaginedFleet, ImaginedRequest

NUM_REQUESTS = 20
SLOWDOWNS = (1, 4)
WATCH = """() => {
    window.longTasks = [];
    window.frames = [];
    new PerformanceObserver((list) => {
        for (const { duration } of list.getEntries()) window.longTasks.push(duration);
    }).observe({ type: "longtask" });
    const note = (at) => { window.frames.push(at); requestAnimationFrame(note); };
    requestAnimationFrame(note);
}"""
FORGET = "() => { window.longTasks.length = 0; window.frames.length = 0; }"
TELL = "() => ({ longTasks: window.longTasks, frames: window.frames })"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="how long each page is watched")
    parser.add_argument("--smoke", action="store_true", help="10 workers for 2 seconds, to see that it works")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    num_workers, seconds = (10, 2.0) if options.smoke else (100, options.seconds)
    result = conditions("live_page") | asyncio.run(measure(num_workers, seconds))
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


async def measure(num_workers: int, seconds: float) -> dict[str, Any]:
    """An idle page, and pages on which everything changes, each watched for `seconds`."""
    async with ImaginedFleet(num_workers // 2, num_workers // 2) as fleet, chromium() as browser:
        runs = [await _watch(browser, fleet, seconds, slowdown=1, changes=False)]
        for slowdown in SLOWDOWNS:
            runs.append(await _watch(browser, fleet, seconds, slowdown, changes=True))
        return {"workers": num_workers, "seconds": seconds, "browser": browser.version, "runs": runs}


async def _watch(
    browser: Browser, fleet: ImaginedFleet, seconds: float, slowdown: int, changes: bool
) -> dict[str, Any]:
    async with _changing(fleet, changes):
        page = await (await browser.new_context()).new_page()
        await page.add_init_script(f"({WATCH})()")
        devtools = await page.context.new_cdp_session(page)
        await devtools.send("Performance.enable")
        await devtools.send("Emulation.setCPUThrottlingRate", {"rate": slowdown})
        await page.goto(fleet.url)
        await page.locator(".card").nth(len(fleet.router.fleet.workers) - 1).wait_for()
        built = await page.evaluate(TELL)
        await asyncio.sleep(2 * INTERVAL_S)
        result = await _measure(page, devtools, seconds)
        await page.context.close()
    name = "everything changes" if changes else "idle"
    longest = round(max(built["longTasks"], default=0.0), 1)
    return {"page": name, "slowdown": slowdown, "longest_task_of_the_first_state_ms": longest, **result}


async def _measure(page: Page, devtools: CDPSession, seconds: float) -> dict[str, Any]:
    await page.evaluate(FORGET)
    before = await _busy(devtools)
    await asyncio.sleep(seconds)
    after = await _busy(devtools)
    told = await page.evaluate(TELL)
    frames = told["frames"]
    between = [later - earlier for earlier, later in pairwise(frames)]
    tasks = told["longTasks"]
    return {
        "long_tasks": len(tasks),
        "longest_task_ms": round(max(tasks, default=0.0), 1),
        "busy_ms_per_s": {name: round((after[name] - before[name]) * 1000 / seconds, 2) for name in before},
        "frames_per_s": round(len(frames) / seconds, 1),
        "longest_between_frames_ms": round(max(between, default=0.0), 1),
    }


async def _busy(devtools: CDPSession) -> dict[str, float]:
    """Seconds of the main thread so far, by what it did."""
    told = (await devtools.send("Performance.getMetrics"))["metrics"]
    wanted = {"TaskDuration": "all", "ScriptDuration": "script", "LayoutDuration": "layout"}
    wanted["RecalcStyleDuration"] = "style"
    return {wanted[each["name"]]: each["value"] for each in told if each["name"] in wanted}


@asynccontextmanager
async def _changing(fleet: ImaginedFleet, changes: bool) -> AsyncIterator[None]:
    """Before every event all workers and requests tell something new."""
    if not changes:
        yield
        return
    requests = [_GrowingRequest(fleet, f"running-{number}") for number in range(NUM_REQUESTS // 2)]
    changing = asyncio.create_task(_change(fleet))
    try:
        yield
    finally:
        changing.cancel()
        await asyncio.gather(changing, return_exceptions=True)
        for request in requests:
            request.end()


async def _change(fleet: ImaginedFleet) -> None:
    for number in count():
        fleet.report_anything()
        ImaginedRequest(fleet, f"ended-{number}").end()
        await asyncio.sleep(INTERVAL_S / 2)


class _GrowingRequest(ImaginedRequest):
    """Has a token more each time that it is asked."""

    def report(self) -> RequestReport:
        self.num_tokens += 1
        return super().report()


if __name__ == "__main__":
    main()
