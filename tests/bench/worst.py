"""How long one call holds the server, with the worst data that is legal.

    python tests/bench/worst.py

Texts of 64 KiB, 200 dependencies a task, 1,000 held tasks, chains and dense graphs.  For each
operation the longest script or command that it made the server run, from the server's slow log.

Goal: none over 250 ms.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import redis
from conftest import BINARIES, Server

import mosaic_queue as mq

GOAL = 250.0  # ms
LARGE = {"description": 'x\u00fc"/' * 13_000, "metadata": {"notes": 'y"' * 21_000}}


async def longest(client: redis.Redis, call: Callable[[], Awaitable[Any]]) -> float:
    """The longest entry of the slow log during a call, in ms."""
    client.slowlog_reset()
    with contextlib.suppress(mq.Refused):  # a search may end with TOO_LARGE
        await call()
    return max((one["duration"] for one in client.slowlog_get(1000)), default=0) / 1000


async def create(queue: mq.Queue, names: list[str], project: str = "p", **rest: Any) -> None:
    edges = len(rest.get("dependencies", ()))
    step = min(mq.BATCH, 3000 // edges) if edges else 20 if "description" in rest else mq.BATCH
    for at in range(0, len(names), step):
        rows: list[Any] = [
            {"mission": "m", "title": "t" * 500, "taskId": name, **rest}
            for name in names[at : at + step]
        ]
        await queue.create_all(rows, project=project)


def layer(n: int) -> list[str]:
    return [f"L{n}-{i:03}" for i in range(200)]


async def measure(queue: mq.Queue, client: redis.Redis) -> dict[str, float]:
    """Operation -> the longest that it held the server, ms."""
    found: dict[str, float] = {}

    async def note(name: str, call: Callable[[], Awaitable[Any]]) -> None:
        found[name] = await longest(client, call)
        print(f"{name:48}{found[name]:8.1f} ms" + ("  OVER" if found[name] > GOAL else ""))

    large = [f"T{n:03}" for n in range(300)]
    await create(queue, large, **LARGE)
    await note(
        "list --full of 300 tasks with 128 KiB each",
        lambda: queue.list(project="p", limit=1000, full=True),
    )
    await note("list of the same", lambda: queue.list(project="p", limit=1000))
    await note(
        "list --text that nothing has", lambda: queue.list(project="p", text="nowhere to be found")
    )
    await note("records of 100 of them", lambda: queue.records("p", large[:100]))
    await note("get", lambda: queue.get("T000"))
    await note("doctor, of them", lambda: mq.doctor(queue, project="p"))

    await create(queue, ["root"], "q")
    await create(queue, [f"D{n:03}" for n in range(100)], "q", dependencies=["root"], **LARGE)
    await note(
        "delete --force with 100 dependents of 128 KiB", lambda: queue.delete("q/root", force=True)
    )

    await create(queue, ["root"], "d")
    await create(queue, [f"D{n:04}" for n in range(1000)], "d", dependencies=["root"])
    await note("complete with 1,000 dependents", lambda: queue.complete("d/root", force=True))
    await note("reap, which frees the rest", lambda: queue.reap(project="d"))

    await create(queue, layer(0), "g")
    for n in range(1, 5):
        await create(queue, layer(n), "g", dependencies=layer(n - 1))
    await create(queue, ["top"], "g")
    await create(queue, ["above"], "g", dependencies=["top"])
    await note(
        "update with a graph of 160,000 edges to search",
        lambda: queue.update("g/top", dependencies=layer(4)[:199]),
    )
    await note("doctor, of 200 dependencies each", lambda: mq.doctor(queue, project="g"))
    await note("explain", lambda: mq.explain(queue, "g/top"))
    rows: list[Any] = [
        {
            "mission": "m",
            "title": "t",
            "taskId": f"R{n:03}",
            "dependencies": [f"R{k:03}" for k in range(n + 1, min(n + 16, 200))],
        }
        for n in range(200)
    ]
    await note("create of 200 in reverse order", lambda: queue.create_all(rows, project="r"))

    held = [f"H{n:04}" for n in range(1000)]
    await create(queue, held, "h")
    for _ in range(10):
        await note("next --count 100", lambda: queue.next("alice", project="h", count=100, ttl=1))
    await note("status with 1,000 held", lambda: mq.status(queue, project="h"))
    await note("agents", lambda: mq.agents(queue, project="h"))
    await note("explain --project", lambda: mq.explain(queue, project="h"))
    await asyncio.sleep(1.5)
    await note("reap of 100 of 1,000", lambda: queue.reap(project="h"))
    heavy = [f"E{n:03}" for n in range(200)]
    await create(queue, heavy, "e", **LARGE)
    queue.config.set("defaults.deadLetterAfter", 1, "bench")
    await queue.policy(project="e", apply=True)
    for name in heavy:
        await queue.claim(name, "alice", project="e", ttl=1)
        await queue.heartbeat(name, project="e", progress="p" * 4000, checkpoint='c"' * 32_000)
    await asyncio.sleep(1.5)
    await note("reap of 100 of 200 KiB each to the dead letters", lambda: queue.reap(project="e"))
    assert len((await queue.list(project="e", status="failed", limit=1000))["tasks"]) >= 100
    await note("purge", lambda: queue.purge(project="d", older=0))
    meta, records = await queue.records("p", large[:100])
    client.flushall()

    async def source() -> Any:
        yield [*records.values()]

    await note(
        "restore of 100 with 128 KiB each", lambda: mq.enter_records(queue, "p", meta, source())
    )
    return found


def main() -> None:
    server = Server(str(BINARIES["valkey"]()))
    try:
        client = server.client()
        client.config_set("slowlog-log-slower-than", 1000)
        client.config_set("slowlog-max-len", 1000)
        config = mq.Config(environ={}).set("redis.url", server.url, "bench")

        async def run() -> dict[str, float]:
            async with mq.Queue(config, session="bench", deadline=60) as queue:
                return await measure(queue, client)

        worst = max(asyncio.run(run()).values())
        print(f"\nlongest: {worst:.1f} ms (goal: {GOAL:.0f} ms)")
    finally:
        server.close()


if __name__ == "__main__":
    main()
