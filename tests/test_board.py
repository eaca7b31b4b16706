"""The board in a real browser: headless Chromium, against a real `serve`.

Without a browser these tests skip and say so, unless MOSAIC_BROWSER=required.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from conftest import Serve, one_engine

import mosaic_queue as mq

server = one_engine()


def chromium() -> str | None:
    """The browser of this machine, where there is one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        not chromium() and os.environ.get("MOSAIC_BROWSER") != "required",
        reason="there is no Chromium here: apt-get install chromium",
    ),
]


class Board:
    """A page on the board; `finish` fails where the browser has found fault with it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: self.errors.append(f"a dialog: {dialog.message}"))
        page.on("console", lambda said: said.type == "error" and self.errors.append(said.text))

    async def go(self, place: str = "", text: str = "") -> Any:
        """Open a place of the board, and wait until it shows a text."""
        await self.page.goto(f"{self.url}/{place}")
        if text:
            await self.page.wait_for_selector(f"text={text}")
        return self.page

    async def cards(self, column: str) -> list[str]:
        """The ids of the cards of a column, in their order."""
        cards = self.page.locator(f"section[data-key={column}] li")
        found = await cards.evaluate_all("all => all.map((one) => one.dataset.key)")
        return list(found)

    async def finish(self) -> None:
        assert await self.page.evaluate("window.broken") == []
        assert self.errors == []


Open = Callable[..., Any]


@pytest.fixture
async def board(serve: Serve) -> AsyncIterator[Board]:
    from playwright.async_api import async_playwright

    path = chromium()
    assert path, "MOSAIC_BROWSER=required, and there is no Chromium"
    async with async_playwright() as tools:
        browser = await tools.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = await browser.new_page()
        await page.add_init_script(
            "window.broken = []; addEventListener('securitypolicyviolation', (event) =>"
            " window.broken.push(event.violatedDirective));"
        )
        made = Board(page, serve().url)
        yield made
        await made.finish()
        await browser.close()


async def create(queue: mq.Queue, *names: str, **more: Any) -> None:
    for name in names:
        await queue.create("p", "m", name, **{"title": f"title of {name}", **more})


async def test_a_task_moves_without_reload(board: Board, queue: mq.Queue) -> None:
    await create(queue, "T1", "T2")
    await create(queue, "T3", priority="critical")
    page = await board.go("#project=p", "title of T1")
    assert await board.cards("ready") == ["T3", "T1", "T2"]
    await page.evaluate("window.same = true")
    await queue.claim("T1", "a1")
    await page.wait_for_selector("section[data-key=held] li[data-key=T1]")
    await queue.complete("T1", agent="a1")
    await page.wait_for_selector("section[data-key=done] li[data-key=T1]")
    assert await board.cards("held") == []
    await page.goto(f"{board.url}/#")
    await page.wait_for_selector("text=last hour: 1 completed")
    await queue.complete("T2", force=True)
    await page.wait_for_selector("text=last hour: 2 completed")
    assert await page.evaluate("window.same")
