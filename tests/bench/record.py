"""How fast the record in Postgres catches up, and how far it lags while agents work.

    python tests/bench/record.py [--transitions N] [--json]

First N transitions (create, claim, complete) are made while nobody follows; then one follower
records them.  In the end N more are made by ten agents at once while it follows, and its lag is
looked at twenty times a second.  Both times rows equal tasks and every event is recorded once.

Goal: at least 5,000 events per second when catching up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import asyncpg
from conftest import BINARIES, Server
from test_record import SCHEMA, Cluster

import mosaic_queue as mq

GOAL = 5000
AGENTS = 10


async def transitions(config: mq.Config, agent: str, count: int) -> None:
    """Create tasks, claim and complete them; three transitions each."""
    async with mq.Queue(config) as queue:
        for at in range(0, count, 150):
            rows: list[Any] = [
                {"mission": "m", "taskId": f"{agent}-{at + n}", "title": "a task of the bench",
                 "description": "What has to be done, in a line or two. " * 5}
                for n in range(min(50, (count - at) // 3))
            ]  # fmt: skip
            await queue.create_all(rows, project="p")
            for row in rows:
                task = await queue.claim(row["taskId"], agent, project="p")
                name, fence = row["taskId"], task["fence"]
                await queue.complete(name, project="p", summary="done", fence=fence)


async def compared(queue: mq.Queue, postgres: mq.Postgres, url: str, count: int) -> None:
    """Rows equal tasks, and there are so many events."""
    _, tasks = await queue.records("p", await queue.ids("p"))
    _, recorded = await postgres.records("p")
    assert recorded == tasks
    db = await asyncpg.connect(url, server_settings={"search_path": SCHEMA})
    facts = await db.fetchrow("select count(*), max(rev) from task_events")
    assert (*facts, await db.fetchval("select lost from projects")) == (count, count, 0)
    await db.close()


async def measured(config: mq.Config, url: str, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {"transitions": count}
    share = count // AGENTS // 3 * 3
    count = share * AGENTS
    postgres = mq.Postgres(config)
    async with mq.Queue(config) as queue:
        await queue.create_all([{"mission": "m", "taskId": "T", "title": "t"}], project="p")
        await mq.catch_up(queue, postgres, "p", None)  # from now on events wait for it
        began = time.perf_counter()
        await asyncio.gather(*(transitions(config, f"a{n}", share) for n in range(AGENTS)))
        found["load_alone_per_s"] = round(count / (time.perf_counter() - began))
        began = time.perf_counter()
        since = await postgres.cursor("p")
        while (reached := await mq.catch_up(queue, postgres, "p", since)) != since:
            since = reached
        found["catching_up_per_s"] = round(count / (time.perf_counter() - began))
        await compared(queue, postgres, url, count + 1)

        following = asyncio.create_task(mq.record(queue, config))
        working = asyncio.gather(*(transitions(config, f"b{n}", share) for n in range(AGENTS)))
        lags, began = [], time.perf_counter()
        while not working.done():
            await asyncio.sleep(0.05)
            (project,) = (await mq.status(queue, project="p"))["projects"]
            lags.append(project["followers"][0]["lag"])
        await working
        found["load_beside_per_s"] = round(count / (time.perf_counter() - began))
        found["lag_median"], found["lag_most"] = round(statistics.median(lags)), max(lags)
        began = time.perf_counter()
        while (await postgres.cursor("p") or ("", 0))[1] < 2 * count + 1:
            await asyncio.sleep(0.02)
        found["lag_after_the_load_s"] = round(time.perf_counter() - began, 2)
        await compared(queue, postgres, url, 2 * count + 1)
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following
    await postgres.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--transitions", type=int, default=100_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    server, cluster = Server(str(BINARIES["valkey"]())), Cluster()
    try:
        config = mq.Config(environ={}).set("redis.url", server.url, "bench")
        config.set("postgres.url", cluster.url, "bench")
        found = asyncio.run(measured(config, cluster.url, arguments.transitions))
    finally:
        server.close()
        cluster.close()
    if arguments.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name:<22} {value:>8}" for name, value in found.items()))
    return 0 if found["catching_up_per_s"] >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
