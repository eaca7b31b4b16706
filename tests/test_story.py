"""One story through every surface: the same outcomes, the same tasks, the same events."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
import redis
from conftest import Server, one_engine
from mcp import Client
from test_http import Process

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
server = one_engine()
NEW = {"project": "p", "mission": "m"}
ONE, TWO, THREE = ({"task": f"p/T{i}"} for i in (1, 2, 3))
A1, A2 = {"agent": "a1"}, {"agent": "a2"}
STORY: list[tuple[str, dict[str, Any], str]] = [
    ("create", {**NEW, "task": "T1", "title": "one", "priority": "high"}, "ok"),
    ("create", {**NEW, "task": "T2", "title": "two", "dependencies": ["T1"]}, "ok"),
    ("create", {**NEW, "task": "T3", "title": "three", "metadata": {"a": [1]}}, "ok"),
    ("create", {**NEW, "task": "T3", "title": "again"}, "EXISTS"),
    ("next", {"project": "p", **A1}, "ok"),
    ("start", {**ONE, **A1}, "ok"),
    ("heartbeat", {**ONE, **A1, "progress": "half", "ttl": 600}, "ok"),
    ("note", {**ONE, "text": "it leaks", **A1}, "ok"),
    ("claim", {**ONE, **A2}, "HELD"),
    ("claim", {**TWO, **A2}, "BLOCKED"),
    ("complete", {**ONE, **A2}, "NOT_OWNER"),
    ("complete", {**ONE, **A1, "summary": "did it"}, "ok"),
    ("start", {**ONE, **A1}, "WRONG_STATUS"),
    ("claim", {**TWO, **A2, "ttl": 60}, "ok"),
    ("fail", {**TWO, **A2, "reason": "broken", "delay": 0}, "ok"),
    ("claim", {**TWO, **A1}, "ok"),
    ("release", {**TWO, **A1, "reason": "not mine"}, "ok"),
    ("claim", {**TWO, **A2}, "ok"),
    ("fail", {**TWO, **A2, "reason": "hopeless", "retry": False}, "ok"),
    ("redrive", TWO, "ok"),
    ("update", {**THREE, "title": "three, better"}, "ok"),
    ("update", {**THREE, "dependencies": ["T3"]}, "CYCLE"),
    ("block", {**THREE, "reason": "wait"}, "ok"),
    ("unblock", THREE, "ok"),
    ("pause", {"project": "p"}, "ok"),
    ("claim", {**TWO, **A1}, "PAUSED"),
    ("unpause", {"project": "p"}, "ok"),
    ("reopen", {**ONE, "reason": "blank"}, "ok"),
    ("get", {"task": "p/none"}, "NOT_FOUND"),
    ("get", {"task": "p/no such"}, "INVALID"),
    ("explain", TWO, "ok"),
    ("list", {"project": "p", "status": "pending"}, "ok"),
    ("status", {"project": "p"}, "ok"),
    ("delete", THREE, "ok"),
]
Tell = Callable[[str, dict[str, Any]], Awaitable[str]]


def code_of(text: str) -> str:
    """The code with which a refusal begins, or ok."""
    found = re.match(r"([A-Z_]+): ", text)
    return found[1] if found and found[1] in mq.CODES else "ok"


@contextlib.asynccontextmanager
async def by_command(server: Server, _process: Process | None) -> AsyncIterator[Tell]:
    def line(name: str, given: dict[str, Any]) -> list[str]:
        of, places, flags = mq.OPERATIONS[name], [], []
        for key, value in given.items():
            text = mq.compact(value) if isinstance(value, dict) else str(value)
            if mq.is_positional(key, of.parameters[key]):
                places.append(text)
            elif value is False:
                flags.append("--no" + mq.flag(key)[1:])
            else:
                flags += [mq.flag(key), value[0] if isinstance(value, list) else text]
        return [of.command, *places, *flags, "--url", server.url]

    def run(words: list[str]) -> str:
        err = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            mq.main(words)
        return code_of(err.getvalue())

    async def tell(name: str, given: dict[str, Any]) -> str:
        return await anyio.to_thread.run_sync(run, line(name, given))

    yield tell


@contextlib.asynccontextmanager
async def by_tools(client: Client) -> AsyncIterator[Tell]:
    async with client:

        async def tell(name: str, given: dict[str, Any]) -> str:
            result = await client.call_tool(f"queue_{name}", given)
            return code_of(result.content[0].text) if result.is_error else "ok"

        yield tell


@contextlib.asynccontextmanager
async def by_stdio_tools(server: Server, _process: Process | None) -> AsyncIterator[Tell]:
    config = mq.Config(environ={}).set("redis.url", server.url, "test")
    async with (
        mq.Queue(config) as queue,
        by_tools(Client(mq.mcp_server(queue, "orchestrator"), mode="legacy")) as tell,
    ):
        yield tell


@contextlib.asynccontextmanager
async def by_http_tools(_server: Server, process: Process | None) -> AsyncIterator[Tell]:
    assert process
    async with by_tools(Client(process.url + "/mcp")) as tell:
        yield tell


@contextlib.asynccontextmanager
async def by_request(_server: Server, process: Process | None) -> AsyncIterator[Tell]:
    assert process
    async with httpx2.AsyncClient(base_url=process.url, timeout=60) as one:

        async def tell(name: str, given: dict[str, Any]) -> str:
            given = dict(given)
            if "/" in given.get("task", ""):
                given["project"], _, given["task"] = given["task"].partition("/")
            for method, path in mq.places_of(mq.OPERATIONS[name]):
                inside = re.findall(r"{(\w+)}", path)
                if given.keys() >= set(inside):
                    rest = {key: given[key] for key in given if key not in inside}
                    how: dict[str, Any] = {"params" if method == "GET" else "json": rest}
                    if name == "update":
                        method, path = "PATCH", path.removesuffix("/update")
                    if method == "DELETE":
                        how = {}
                    answer = await one.request(method, path.format_map(given), **how)
                    return "ok" if answer.is_success else str(answer.json()["code"])
            raise AssertionError(name)

        yield tell


SURFACES = {
    "command line": by_command,
    "MCP over stdio": by_stdio_tools,
    "MCP over HTTP": by_http_tools,
    "REST": by_request,
}


async def test_the_same_story_on_every_surface(
    server: Server, db: redis.Redis, tmp_path: Path
) -> None:
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    environ["MOSAIC_VALKEY_URL"] = server.url
    process = Process(environ, tmp_path, "--tools", "orchestrator")
    told = {}
    try:
        for name, surface in SURFACES.items():
            db.flushall()
            async with surface(server, process) as tell:
                for step, (operation, given, outcome) in enumerate(STORY):
                    assert await tell(operation, given) == outcome, (name, step, operation)
            config = mq.Config(environ={}).set("redis.url", server.url, "test")
            async with mq.Queue(config) as queue:
                events = (await queue.events(project="p", limit=1000))["events"]
                tasks = await queue.tasks_of("p")
            facts = ("op", "task", "from", "to", "agent", "text", "rev")
            rows = [tuple(event.get(fact) for fact in facts) for event in events]
            shown = ("taskId", "status", "title", "rev", "priority", "metadata")
            kept = [[one.get(field) for field in shown] for one in tasks.values()]
            told[name] = (rows, sorted(kept, key=str))
    finally:
        process.stop()
    first, *others = told
    for other in others:
        assert told[other] == told[first], other
