"""How many tasks a second are read whole and restored, beside how many are created.

`python tests/bench/restore.py [TASKS]`; every fourth task depends on another.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from conftest import Server

import mosaic_queue as mq

TASKS = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000


def told(what: str, began: float) -> None:
    took = time.perf_counter() - began
    print(f"{what:<8} {TASKS / took:>8,.0f} tasks/s")


async def run(server: Server) -> None:
    config = mq.Config(environ={}).set("redis.url", server.url, "bench")
    rows: list[Any] = [
        {
            "taskId": f"T{n}",
            "mission": f"m{n % 10}",
            "title": "a task",
            "description": "x" * 300,
            "dependencies": [f"T{n - 1}"] if n % 4 == 3 else [],
        }
        for n in range(TASKS)
    ]
    async with mq.Queue(config) as queue:
        began = time.perf_counter()
        for at in range(0, TASKS, mq.BATCH):
            await queue.create_all(rows[at : at + mq.BATCH], project="p")
        told("create", began)
        began = time.perf_counter()
        meta, found = await queue.records("p", await queue.ids("p"))
        told("records", began)
        server.client().flushall()

        async def records() -> mq.Records:
            yield list(found.values())

        began = time.perf_counter()
        await mq.enter_records(queue, "p", meta, records())
        told("restore", began)


if __name__ == "__main__":
    running = Server(str(mq.server_binary()))
    try:
        asyncio.run(run(running))
    finally:
        running.close()
