"""One process of the drain bench: a side's own way to enqueue, or to work on tasks that do nothing.

    python tests/bench/drain_worker.py SIDE fill N | SIDE drain CONCURRENCY

Runs on an interpreter that has the side installed.  It says that it is ready, and begins with the
first line of its standard input; a worker goes on until it is killed.  How many tasks it has done
stands in its slot of a file that the bench maps too, so that counting them costs no round trip.
"""

from __future__ import annotations

import asyncio
import importlib
import mmap
import os
import struct
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

URL = os.environ["DRAIN_URL"]
SLOT = 8 * int(os.environ["DRAIN_SLOT"])
HERE = Path(__file__).parent
Work = Callable[[int], Awaitable[Any]]

with open(os.environ["DRAIN_COUNTS"], "r+b") as file:
    counts = mmap.mmap(file.fileno(), 0)


def count() -> None:
    """One task more is done."""
    struct.pack_into("q", counts, SLOT, struct.unpack_from("q", counts, SLOT)[0] + 1)


def ours() -> tuple[Work, Work]:
    sys.path[:0] = [str(HERE.parents[1])]
    import mosaic_queue as mq

    config = mq.Config(environ={}).set("redis.url", URL, "bench").set("project", "p", "bench")

    async def fill(n: int) -> None:
        async with mq.Queue(config) as queue:
            for at in range(0, n, 200):
                rows: Any = [
                    {"mission": "m", "taskId": f"T{k}", "title": "noop"}
                    for k in range(at, min(n, at + 200))
                ]
                await queue.create_all(rows, project="p")

    async def drain(concurrency: int) -> None:
        async def work(agent: str) -> None:
            while True:
                found = (await queue.next(agent, count=ours.at_once))["tasks"]
                await asyncio.gather(*(queue.complete(t["taskId"], agent=agent) for t in found))
                for _ in found:
                    count()
                await asyncio.sleep(0 if found else 0.01)

        async with mq.Queue(config, session=f"s{SLOT}") as queue:
            workers = max(1, concurrency // ours.at_once)
            await asyncio.gather(*(work(f"a{SLOT}.{k}") for k in range(workers)))

    return fill, drain


ours.at_once = 1  # type: ignore[attr-defined]


def ours_in_tens() -> tuple[Work, Work]:
    ours.at_once = 10  # type: ignore[attr-defined]
    return ours()


def floor() -> tuple[Work, Work]:
    """Bare scripts that do the least, over the connection that is ours too."""
    sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
    from scripts import FLOOR

    import mosaic_queue as mq

    config = mq.Config(environ={}).set("redis.url", URL, "bench")

    async def fill(n: int) -> None:
        async with mq.Queue(config) as queue:
            sha = await queue.link.send("SCRIPT", "LOAD", FLOOR["create"])
            for k in range(n):
                said = (f"T{k}", "noop", "medium", "any", "m", str(k))
                await queue.link.send("EVALSHA", sha, "1", "f:", *said)

    async def drain(concurrency: int) -> None:
        async def work(agent: str) -> None:
            while True:
                found = await queue.link.send("EVALSHA", take, "1", "f:", agent, "60")
                if found == "NOTHING":
                    await asyncio.sleep(0.01)
                    continue
                task, fence = map(str, found)
                said = (task, agent, fence, "1")
                assert await queue.link.send("EVALSHA", end, "1", "f:", *said) == "OK"
                count()

        async with mq.Queue(config) as queue:
            take = await queue.link.send("SCRIPT", "LOAD", FLOOR["next"])
            end = await queue.link.send("SCRIPT", "LOAD", FLOOR["complete"])
            await asyncio.gather(*(work(f"a{SLOT}.{k}") for k in range(concurrency)))

    return fill, drain


def bullmq_py() -> tuple[Work, Work]:
    from bullmq import Queue, Worker

    async def fill(n: int) -> None:
        queue = Queue("drain", {"connection": URL})
        for _ in range(n):
            await queue.add("noop", {}, {})

    async def process(job: Any, token: str) -> None:
        count()

    async def drain(concurrency: int) -> None:
        _worker = Worker("drain", process, {"connection": URL, "concurrency": concurrency})
        await asyncio.Event().wait()

    return fill, drain


def taskiq() -> tuple[Work, Work]:
    from taskiq.api import run_receiver_task
    from taskiq_redis import RedisStreamBroker

    broker = RedisStreamBroker(URL)

    @broker.task
    async def noop() -> None:
        count()

    async def fill(n: int) -> None:
        await broker.startup()
        for _ in range(n):
            await noop.kiq()

    async def drain(concurrency: int) -> None:
        broker.is_worker_process = True
        await run_receiver_task(broker, max_async_tasks=concurrency, run_startup=True)

    return fill, drain


def arq() -> tuple[Work, Work]:
    from arq import create_pool
    from arq.connections import RedisSettings
    from arq.worker import Worker

    settings = RedisSettings.from_dsn(URL)

    async def noop(ctx: Any) -> None:
        count()

    async def fill(n: int) -> None:
        pool = await create_pool(settings)
        for _ in range(n):
            await pool.enqueue_job("noop")

    async def drain(concurrency: int) -> None:
        # It looks for work every 0.5 s unless told otherwise, which would be all that is measured.
        how = {"max_jobs": concurrency, "poll_delay": 0.01, "handle_signals": False}
        noop.__qualname__ = "noop"
        await Worker([noop], redis_settings=settings, **how).async_run()

    return fill, drain


def saq() -> tuple[Work, Work]:
    from saq import Queue, Worker

    queue = Queue.from_url(URL)

    async def noop(ctx: Any) -> None:
        count()

    async def fill(n: int) -> None:
        await queue.connect()
        for _ in range(n):
            await queue.enqueue("noop")

    async def drain(concurrency: int) -> None:
        await Worker(queue, functions=[("noop", noop)], concurrency=concurrency).start()

    return fill, drain


def streaq() -> tuple[Work, Work]:
    from streaq import Worker

    def made(concurrency: int) -> tuple[Any, Any]:
        worker = Worker(redis_url=URL, concurrency=concurrency, handle_signals=False)

        @worker.task()
        async def noop() -> None:
            count()

        return worker, noop

    async def fill(n: int) -> None:
        worker, noop = made(1)
        async with worker:
            for _ in range(n):
                await noop.enqueue()

    async def drain(concurrency: int) -> None:
        await made(concurrency)[0].run_async()

    return fill, drain


def rq() -> tuple[Work, Work]:
    from redis import Redis
    from rq import Queue, SimpleWorker

    sys.path[:0] = [str(HERE)]
    queue = Queue(connection=Redis.from_url(URL))

    async def fill(n: int) -> None:
        for _ in range(n):
            queue.enqueue("drain_worker.count")

    async def drain(concurrency: int) -> None:
        importlib.import_module("drain_worker")
        SimpleWorker([queue], connection=queue.connection).work(logging_level="ERROR")

    return fill, drain


def celery() -> tuple[Work, Work]:
    from celery import Celery

    app = Celery(broker=URL)

    @app.task(name="noop", ignore_result=True)
    def noop() -> None:
        count()

    async def fill(n: int) -> None:
        for _ in range(n):
            noop.delay()

    async def drain(concurrency: int) -> None:
        alone = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        app.worker_main(["worker", "-P", "solo", "-l", "error", *alone])

    return fill, drain


def main() -> None:
    _, side, what, number = sys.argv
    fill, drain = globals()[side]()
    print("ready", flush=True)
    sys.stdin.readline()
    asyncio.run({"fill": fill, "drain": drain}[what](int(number)))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
