"""How long the board takes to its first paint and to its cards, and a picture of it.

python tests/bench/board.py [TASKS]: a `serve` on a server of its own, with TASKS (10,000) tasks of
a fleet at work, looked at in headless Chromium.  Writes tests/pictures/board.png.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import BINARIES, Process, Server
from playwright.async_api import async_playwright
from test_board import chromium

import mosaic_queue as mq

PICTURE = Path(__file__).parent.parent / "pictures" / "board.png"
VERBS = ["Write", "Fix", "Measure", "Review", "Test", "Move", "Split", "Document"]
THINGS = ["login page", "billing export", "search index", "invoice upload", "retry worker"]
ROUNDS = 5


def new_tasks(count: int) -> list[dict[str, Any]]:
    """Tasks as people enter them; some of the first 60 depend on others."""
    rows = []
    for at in range(count):
        title = f"{random.choice(VERBS)} the {random.choice(THINGS)}"
        row: dict[str, Any] = {"taskId": f"T{at}", "mission": "launch", "title": title}
        row["priority"] = random.choices(mq.PRIORITIES, [1, 3, 10, 4])[0]
        row["lane"] = random.choice(("coding", "planning", "any"))
        if 3 < at < 60 and at % 2:
            row["dependencies"] = sorted({f"T{random.randrange(at - 3, at)}" for _ in range(2)})
        rows.append(row)
    return rows


async def work(queue: mq.Queue, at: int) -> None:
    """What an agent does with the next task: it completes it, fails, or is still at work."""
    agent = f"agent-{at % 5}"
    offer = await queue.next(agent, ttl=random.choice((300, 900, 3600)))
    for task in offer["tasks"]:
        if at % 4 == 1:
            reason = random.choice(("the build is broken: exit 1", "timeout after 600 s"))
            await queue.fail(task["id"], agent=agent, reason=reason, retry=False)
        elif at % 4 == 2:
            await queue.heartbeat(task["id"], agent=agent, progress=f"{at} of 40 files")
        else:
            await queue.complete(task["id"], agent=agent, summary="it is live")


async def fill(url: str, count: int) -> None:
    config = mq.Config(environ={}).set("redis.url", url, "bench").set("project", "web", "bench")
    for lane, most in (("coding", 6), ("planning", 4)):
        config.set(f"lanes.{lane}.maxConcurrent", most, "bench")
    async with mq.Queue(config) as queue:
        rows = new_tasks(count)
        for at in range(0, count, 200):
            await queue.create_all(rows[at : at + 200], project="web")
        await queue.policy(apply=True)
        for at in range(min(28, count // 4)):
            await work(queue, at)


async def look(browser: Any, url: str) -> tuple[float, float]:
    """Milliseconds until the first paint, and until cards are there."""
    page = await (await browser.new_context(viewport={"width": 1400, "height": 900})).new_page()
    await page.goto(f"{url}/#project=web")
    await page.wait_for_selector("article")
    cards = await page.evaluate("performance.now()")
    paint = await page.evaluate("performance.getEntriesByName('first-paint')[0]?.startTime ?? 0")
    await page.screenshot(path=PICTURE)
    await page.context.close()
    return paint, cards


async def measure(url: str) -> None:
    async with async_playwright() as tools:
        path = chromium()
        browser = await tools.chromium.launch(executable_path=path, args=["--no-sandbox"])
        rounds = [await look(browser, url) for _ in range(ROUNDS)]
        for name, times in zip(("first paint", "cards"), zip(*rounds, strict=True), strict=True):
            print(f"{name}: {statistics.median(times):.0f} ms, the best {min(times):.0f} ms")


def main() -> None:
    random.seed(7)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    server = Server(str(BINARIES["valkey"]()))
    PICTURE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        environ = {"PATH": os.environ["PATH"], "HOME": home, "MOSAIC_VALKEY_URL": server.url}
        asyncio.run(fill(server.url, count))
        process = Process(environ, Path(home))
        try:
            asyncio.run(measure(process.url))
        finally:
            process.stop()
            server.close()


if __name__ == "__main__":
    main()
