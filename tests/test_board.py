"""The board in a real browser: headless Chromium, against a real `serve`.

Without a browser these tests skip and say so, unless MOSAIC_BROWSER=required.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from conftest import SECRETS, Serve, one_engine

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
async def browser() -> AsyncIterator[Any]:
    from playwright.async_api import async_playwright

    path = chromium()
    assert path, "MOSAIC_BROWSER=required, and there is no Chromium"
    async with async_playwright() as tools:
        yield await tools.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture
async def open_board(browser: Any, serve: Serve) -> AsyncIterator[Open]:
    boards: list[Board] = []

    async def start(tokens: bool = False, **context: Any) -> Board:
        page = await (await browser.new_context(**context)).new_page()
        await page.add_init_script(
            "window.broken = []; addEventListener('securitypolicyviolation', (event) =>"
            " window.broken.push(event.violatedDirective));"
        )
        boards.append(Board(page, serve(tokens=tokens).url))
        return boards[-1]

    yield start
    for board in boards:
        await board.finish()


@pytest.fixture
async def board(open_board: Open) -> Board:
    made: Board = await open_board()
    return made


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


async def test_all_that_is_shown_is_in_the_address(board: Board, queue: mq.Queue) -> None:
    await create(queue, "T1", "T2", "T3")
    await create(queue, "L1", priority="low")
    await queue.block("T3", reason="by hand")
    page = await board.go("#project=p&text=title&priority=low", "title of L1")
    assert await board.cards("ready") == ["L1"]
    assert await page.input_value("input[name=text]") == "title"
    await page.click("text=show all")
    await page.wait_for_selector("li[data-key=T1]")
    await page.check("input[name=hide]")
    await page.wait_for_selector("section[data-key=blocked]", state="detached")
    await page.fill("input[name=text]", "T2")
    await page.keyboard.press("Enter")
    await page.wait_for_selector("li[data-key=T1]", state="detached")
    assert await page.inner_text("#column-ready .number") == "1"
    await page.go_back()
    await page.wait_for_selector("li[data-key=T1]")
    again = await board.page.context.new_page()
    await again.goto(page.url)
    await again.wait_for_selector("li[data-key=T1]")
    assert await again.is_checked("input[name=hide]")


async def test_the_keyboard_is_enough(board: Board, queue: mq.Queue) -> None:
    await create(queue, "T1", "T2", description="# Why\n\nsee **this** and https://example.com/x")
    page = await board.go("#project=p", "title of T1")
    focus = "document.activeElement.closest('[data-key]')?.dataset.key"
    for _ in range(40):
        if await page.evaluate(focus) == "T2":
            break
        await page.keyboard.press("Tab")
    await page.keyboard.press("Enter")
    await page.wait_for_selector("#task h1")
    assert await page.evaluate("document.activeElement.id") == "task"
    assert await page.get_attribute("#task a[target]", "href") == "https://example.com/x"
    await page.keyboard.press("Escape")
    await page.wait_for_selector("#task", state="detached")
    assert await page.evaluate(focus) == "T2"
    await page.keyboard.press("/")
    assert await page.evaluate("document.activeElement.name") == "text"


EVIL = """<img src=x onerror=alert(1)><script>alert(2)</script> [a](javascript:alert(3))
[b](https://x.example/"onmouseover="alert(4)) `<svg onload=alert(5)>` ```
<iframe srcdoc="<script>alert(6)</script>"></iframe>"""


async def test_what_users_wrote_is_text(board: Board, queue: mq.Queue) -> None:
    for name in ("T1", "T2", "T3", "T4"):
        await create(queue, name, description=EVIL, metadata={"<b>": EVIL})
        await queue.update(name, title=EVIL.replace("\n", " ")[:300])
        await queue.claim(name, "a")
    await create(queue, "T5", dependencies=["T1"])
    await queue.heartbeat("T1", agent="a", progress=EVIL, checkpoint=EVIL)
    await queue.note("T1", EVIL, agent="a")
    await queue.fail("T2", agent="a", reason=EVIL, retry=False)
    await queue.complete("T3", agent="a", summary=EVIL)
    await queue.block("T4", reason=EVIL, agent="a")
    places = ["#", "#project=p", "#project=p&view=graph", "#project=p&view=dead"]
    places += [f"#project=p&task=T{i}" for i in range(1, 6)] + ["#project=p&task=T1&do=edit"]
    places += ["#project=<img src=x onerror=alert(1)>&task=<b>", "#project=p&do=<b>&view=__proto__"]
    for place in places:
        page = await board.go(place)
        await page.wait_for_selector("main h1, main .alert, main .sheet")
        await page.wait_for_timeout(200)
        strange = "main :is(img, script, iframe, svg[onload]), [onmouseover], [onerror]"
        assert await page.locator(strange).count() == 0
        links = page.locator("a")
        for one in await links.evaluate_all("all => all.map((a) => a.getAttribute('href'))"):
            assert one.startswith(("#", "https://x.example/"))
    board.errors[:] = [one for one in board.errors if "404" not in one and "400" not in one]


async def test_an_operator_acts_and_a_refusal_says_why(board: Board, queue: mq.Queue) -> None:
    page = await board.go("#project=p&do=create", "There is no project p")
    await create(queue, "T1", "T2")
    await board.go("?#project=p&do=create", "New task")

    async def press(name: str, scope: str = "#dialog") -> None:
        await page.click(f"{scope} >> button:text-is('{name}')")

    await page.fill("#dialog [name=title]", "made here")
    await page.fill("#dialog [name=taskId]", "T1")
    await page.fill("#dialog [name=mission]", "m")
    await press("Create")
    await page.wait_for_selector("#refused >> text=T1")
    await page.fill("#dialog [name=taskId]", "T9")
    await press("Create")
    await page.wait_for_selector("section[data-key=ready] li[data-key=T9]")
    assert (await queue.get("T9"))["title"] == "made here"

    await page.click("li[data-key=T1] a")
    await press("Edit", "#task")
    await page.fill("#dialog [name=title]", "mine")
    await queue.update("T1", title="theirs")
    await press("Save")
    await page.wait_for_selector("#theirs-title >> text=theirs")
    await press("Save")
    await page.wait_for_selector("li[data-key=T1] >> text=mine")

    for name, reason, status in [("Block", "later", "blocked"), ("Unblock", "", "pending")]:
        await press(name, "#task")
        if reason:
            await page.fill("#dialog [name=reason]", reason)
        await press(name)
        await page.wait_for_selector(f"#task .tag.{status}")
    await queue.claim("T1", "a1")
    await page.wait_for_selector("#task .tag.claimed")
    await press("Delete", "#task")
    await press("Delete")
    await page.wait_for_selector("#refused >> text=a1")
    await page.check("#dialog [name=force]")
    await press("Delete")
    await page.wait_for_selector("li[data-key=T1]", state="detached")

    await page.locator("li[data-key=T2] article").drag_to(page.locator("[data-value=critical]"))
    await page.wait_for_selector("li[data-key=T2] .tag.critical")
    await press("Pause", "main")
    await page.wait_for_selector("text=paused since")
    await press("Go on", "main")
    await page.wait_for_selector("main >> button:text-is('Pause')")
    for name in ("T2", "T9"):
        await queue.claim(name, "a1")
        await queue.fail(name, agent="a1", reason="broken\nline 2", retry=False)
    await page.click("nav >> text=Dead letters")
    await press("Redrive these 2", "main")
    await page.wait_for_selector("text=There are no dead letters.")
    assert (await queue.get("T2"))["status"] == "pending"
    board.errors[:] = [one for one in board.errors if "404" not in one and "409" not in one]


async def test_a_token_is_asked_for_and_kept_in_the_tab(open_board: Open, queue: mq.Queue) -> None:
    await create(queue, "T1")
    board = await open_board(tokens=True)
    page = await board.go("#project=p", "Log in")
    for token in ("nosuch", SECRETS["eye"]):
        await page.fill("[name=token]", token)
        await page.keyboard.press("Enter")
        then = "text=not accepted" if token == "nosuch" else "li[data-key=T1]"
        await page.wait_for_selector(then)
    await page.wait_for_selector("text=eye, read")
    assert await page.locator("button").all_inner_texts() == ["Log out", "Filter"]
    kept = "[Object.keys(localStorage).length, document.cookie, sessionStorage.token.length]"
    assert await page.evaluate(kept) == [0, "", 40]
    board.errors[:] = [one for one in board.errors if "401" not in one]


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.long)])
async def test_axe_finds_nothing(open_board: Open, queue: mq.Queue, scheme: str) -> None:
    from axe_playwright_python.async_playwright import Axe

    await create(queue, "T1", "T2", "T3", priority="high", description="# A\n\n- b\n\n`c`")
    await create(queue, "T4", dependencies=["T1", "T2"])
    await queue.claim("T2", "a1")
    await queue.note("T2", "a finding", agent="a1")
    await queue.claim("T3", "a1")
    await queue.fail("T3", agent="a1", reason="broken", retry=False)
    width = {"light": 1400, "dark": 360}[scheme]
    size = {"width": width, "height": 900}
    board = await open_board(color_scheme=scheme, viewport=size, bypass_csp=True)
    for place in ("#", "#project=p", "#project=p&task=T2", "#project=p&view=graph",
                  "#project=p&view=dead", "#project=p&task=T1&do=edit"):  # fmt: skip
        page = await board.go(place)
        await page.wait_for_selector("main h1")
        await page.wait_for_timeout(300)
        found = await Axe().run(page)
        assert found.violations_count == 0, f"{place}\n{found.generate_report()}"
        assert await page.evaluate("document.documentElement.scrollWidth") <= width, place


async def test_the_graph_of_a_mission_that_is_worked_on(board: Board, queue: mq.Queue) -> None:
    await create(queue, "T1", "T2")
    await create(queue, "T3", dependencies=["T1"])
    await create(queue, "T4", dependencies=["T3"])
    await queue.claim("T1", "a1")
    page = await board.go("#project=p&view=graph&mission=m", "The longest way left")
    assert "T1 → T3 → T4" in await page.inner_text("main")
    assert await page.locator("svg a.claimed.critical, svg a.blocked.critical").count() == 3
    tasks = (await queue.list(project="p", mission="m"))["tasks"]
    assert [one["taskId"] for one in tasks if "leaseExpiresAt" in one] == ["T1"]
