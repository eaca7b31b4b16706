"""Whole records, and a project that is made of them again.

A flushed Valkey is restored from its records; what stands there afterwards is what stood there
before, key by key, but for receipts, bells and what no task needs any more.
"""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import redis
from conftest import Server, Shim, key_space
from invariants import problems, read_project

import mosaic_queue as mq

pytestmark = pytest.mark.anyio


async def create(queue: mq.Queue, task: str, *dependencies: str, **options: Any) -> Any:
    return await queue.create(
        "p", "m", task, title="a task", dependencies=list(dependencies), **options
    )


# ---- records ----


async def test_a_record_is_the_task_and_what_it_hides(queue: mq.Queue) -> None:
    await create(queue, "T", description="more", metadata={"a": [1, {}]}, max_runtime=900)
    await queue.claim("T", "alice", session="s1")
    await queue.heartbeat("T", progress="half", checkpoint="page 3")
    await queue.fail("T", reason="no")
    meta, records = await queue.records("p", ["T", "none"])
    shown = await queue.get("T")
    assert records.keys() == {"T"}
    record = records["T"]
    assert {name: value for name, value in record.items() if name in shown} == shown
    assert record.keys() - shown.keys() == {"order", "hidden"}
    assert record["order"] // 1000 == shown["createdAt"]
    assert record["hidden"].keys() == {"claimedBy", "claimedAt", "claimTTL", "session", "fence"}
    assert meta["fence"] == record["hidden"]["fence"]
    assert meta["rev"] == record["rev"] == 4
    assert meta["epoch"]
    assert meta["lanes"] == "any coding planning"
    assert json.loads(json.dumps(record)) == record


async def test_a_record_says_what_a_task_waits_for(queue: mq.Queue) -> None:
    await create(queue, "A")
    await create(queue, "B")
    await create(queue, "T", "A", "B")
    await queue.complete("A", force=True)
    await queue.reopen("A", reason="blank")
    _, records = await queue.records("p", ["A", "B", "T"])
    assert records["T"]["waits"] == ["B"]
    assert records["A"]["freed"] == ["T"]
    assert "freed" not in records["B"]


# ---- a project made again ----


async def populate(queue: mq.Queue) -> None:
    """A project with a task of every kind there is."""
    await create(queue, "ready", priority="high", description="täglich", metadata={"n": [1, None]})
    await create(queue, "later", delay=5000)
    await create(queue, "by-hand")
    await queue.block("by-hand", reason="wait")
    await create(queue, "held", lane="coding", max_runtime=9000)
    await queue.claim("held", "alice", ttl=900, session="s1")
    await create(queue, "running", "held")
    await queue.complete("held", agent="alice", session="s1", summary="done\twell")
    await queue.claim("running", "bob", ttl=900)
    await queue.start("running")
    await queue.heartbeat("running", progress="half", checkpoint="page 3")
    await create(queue, "assigned")
    await queue.assign("assigned", agent="carol")
    await create(queue, "dead")
    await queue.fail("dead", reason="no", retry=False, force=True)
    await create(queue, "again")
    await queue.claim("again", "dan")
    await queue.fail("again", reason="broken", delay=300)
    await create(queue, "waits", "ready", "held", "dead")
    await create(queue, "freed", "ready")
    await queue.complete("ready", force=True)
    await queue.reopen("ready", reason="blank")
    await create(queue, "anew", "ready")
    await create(queue, "old")
    await queue.complete("old", force=True, summary="old")


TRANSIENT = ("op", "bell", "inbox", "waiting", "events")


def kept(found: Any) -> dict[str, Any]:
    """What a restore has to bring back of a key space."""
    named = {kind: values for kind, values in found.named.items() if kind not in TRANSIENT}
    plain = {kind: values for kind, values in found.plain.items() if kind not in TRANSIENT}
    meta = {name: value for name, value in found.meta.items() if not name.startswith("follow:")}
    empty = {"", "0"}
    tasks = {
        task: {name: v for name, v in values.items() if v not in empty and name != "op"}
        for task, values in found.tasks.items()
    }
    return {"meta": meta, "tasks": tasks, "plain": plain, **named}


async def taken(queue: mq.Queue, project: str = "p") -> tuple[mq.Meta, list[mq.Record]]:
    meta, found = await queue.records(project, await queue.ids(project))
    return meta, list(found.values())


async def source(*batches: list[mq.Record]) -> mq.Records:
    for batch in batches:
        yield batch


async def test_a_flushed_project_is_as_before(queue: mq.Queue, db: redis.Redis) -> None:
    await populate(queue)
    before = kept(read_project(db, "p"))
    meta, records = await taken(queue)
    db.flushall()
    assert await queue.restore("p", meta, source(records)) == len(records)
    assert kept(read_project(db, "p")) == before
    assert problems(db, "p", since=meta["rev"], bells=True, locks=True) == []
    assert await queue.projects() == ["p"]
    assert (await queue.doctor())["findings"][1:] == []


async def test_a_restored_project_goes_on(queue: mq.Queue, db: redis.Redis) -> None:
    """Claims, fences and events continue where the record ends; a holder still holds."""
    await populate(queue)
    meta, records = await taken(queue)
    db.flushall()
    await queue.restore("p", meta, source(records))
    await queue.complete("running", agent="bob")
    first = (await queue.events(project="p", since=meta["rev"]))["events"][0]
    assert (first["rev"], first["op"], first["task"]) == (meta["rev"] + 1, "complete", "running")
    taken_now = (await queue.next("erin"))["tasks"][0]
    assert taken_now["taskId"] == "ready"
    assert taken_now["fence"] > meta["fence"]
    assert (await queue.claim("assigned", "carol", ttl=77))["claimTTL"] == 77
    await queue.complete("ready", agent="erin")
    assert (await queue.get("anew"))["status"] == "pending"
    assert problems(db, "p", since=meta["rev"]) == []


async def test_what_a_record_says_of_leases(queue: mq.Queue, db: redis.Redis, shim: Shim) -> None:
    """One that runs is kept; one near its end, or past it, leaves time for a renewal."""
    for task, ttl in (("long", 3000), ("short", 30), ("bounded", 900)):
        await create(queue, task, max_runtime=901 if task == "bounded" else None)
        await queue.claim(task, "alice", ttl=ttl)
    meta, records = await taken(queue)
    ends = {record["taskId"]: record["leaseExpiresAt"] for record in records}
    db.flushall()
    shim.seconds = 2500
    await queue.restore("p", meta, source(records))
    now = (await queue.status(project="p"))["projects"][0]["now"]
    after = {task: (await queue.get(task))["leaseExpiresAt"] for task in ends}
    assert after["long"] == pytest.approx(now + 1000_000, abs=5000)
    assert after["short"] == pytest.approx(now + 30_000, abs=5000)
    assert after["bounded"] < now
    assert (await queue.reap())["reaped"] == ["p/bounded"]
    shim.seconds = 3600
    assert set((await queue.reap())["reaped"]) == {"p/long", "p/short"}


async def test_the_order_of_the_records_is_free(queue: mq.Queue, db: redis.Redis) -> None:
    await populate(queue)
    before = kept(read_project(db, "p"))
    meta, records = await taken(queue)
    rng = random.Random(7)
    for _ in range(5):
        rng.shuffle(records)
        db.flushall()
        await queue.restore("p", meta, source(*([record] for record in records)))
        assert kept(read_project(db, "p")) == before


async def test_a_record_that_is_not_of_one_moment_is_set_right(
    queue: mq.Queue, db: redis.Redis
) -> None:
    """While it was written a task was completed: what waited for it is free, and its rev counts."""
    await create(queue, "A")
    await create(queue, "T", "A")
    meta, records = await taken(queue)
    await queue.complete("A", force=True)
    _, later = await queue.records("p", ["A"])
    db.flushall()
    await queue.restore("p", meta, source([later["A"], records[1]]))
    assert (await queue.get("T"))["status"] == "pending"
    assert (await queue.get("T"))["rev"] == 4
    assert problems(db, "p", since=3) == []


# ---- who sees what, and who may ----


async def test_nobody_sees_half_a_project(queue: mq.Queue, db: redis.Redis) -> None:
    await populate(queue)
    meta, records = await taken(queue)
    before = kept(read_project(db, "p"))
    db.flushall()
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: queue.get("ready", project="p"),
        lambda: queue.claim("p/ready", "eve"),
        lambda: queue.next("eve", project="p"),
        lambda: queue.create("p", "m", "new", title="t"),
        lambda: queue.reap(project="p"),
        lambda: queue.policy(project="p", apply=True),
        lambda: queue.status(project="p"),
    ]

    async def watched() -> mq.Records:
        for record in records:
            yield [record]
            for call in calls:
                with pytest.raises(mq.Refused, match="it is being restored") as refused:
                    await call()
                assert refused.value.code == "NOT_FOUND"
        assert (await queue.status())["projects"] == []

    await queue.restore("p", meta, watched())
    assert kept(read_project(db, "p")) == before


async def test_a_restore_that_was_cut_off_is_begun_anew(queue: mq.Queue, db: redis.Redis) -> None:
    """At whatever record it ended; what it had entered and the next has not is gone."""
    await populate(queue)
    before = kept(read_project(db, "p"))
    meta, records = await taken(queue)

    async def cut(at: int) -> mq.Records:
        yield [{**record, "taskId": "X" + record["taskId"]} for record in records[:at]]
        raise RuntimeError("killed")

    db.flushall()
    for at in range(1, len(records), 4):
        with pytest.raises(RuntimeError):
            await queue.restore("p", meta | {"rev": meta["rev"] + at}, cut(at))
    assert await queue.restore("p", meta, source(records)) == len(records)
    assert kept(read_project(db, "p")) == before
    assert await queue.restore("p", meta, source(records)) == -1


async def test_the_later_of_two_restores_wins(queue: mq.Queue, db: redis.Redis) -> None:
    await populate(queue)
    before = kept(read_project(db, "p"))
    meta, records = await taken(queue)
    db.flushall()

    async def overtaken() -> mq.Records:
        yield records[:5]
        await queue.restore("p", meta, source(records))
        yield records[5:]

    assert await queue.restore("p", meta, overtaken()) == -1
    assert kept(read_project(db, "p")) == before

    async def and_worked_on() -> mq.Records:
        yield records[:5]
        await queue.restore("p", meta, source(records))
        await queue.note("ready", "hello")
        yield records[5:]

    db.flushall()
    with pytest.raises(mq.Refused, match="has newer changes") as refused:
        await queue.restore("p", meta, and_worked_on())
    assert refused.value.code == "EXISTS"

    async def half() -> mq.Records:
        yield records[:5]
        await queue.call("restore", "p", {**meta, "mark": "other", "step": "begin"})
        yield records[5:]

    db.flushall()
    with pytest.raises(mq.Refused, match="by somebody else"):
        await queue.restore("p", meta, half())


async def test_a_project_that_lives_is_left_alone(
    queue: mq.Queue, db: redis.Redis, server: Server
) -> None:
    await populate(queue)
    meta, records = await taken(queue)
    for other, said in (
        ({"epoch": "another"}, "with another epoch"),
        ({"rev": meta["rev"] - 1}, "has newer changes"),
        ({"rev": meta["rev"] + 1}, "lacks the last changes"),
    ):
        before = key_space(server)
        with pytest.raises(mq.Refused, match=said) as refused:
            await queue.restore("p", {**meta, **other}, source(records))
        assert refused.value.code == "EXISTS"
        assert key_space(server) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"taskId": "a b"}, "not an id"),
        ({"mission": "a b"}, "not an id"),
        ({"lane": "none"}, "no lane none"),
        ({"priority": "urgent"}, "priority is urgent"),
        ({"status": "done"}, "status of T is done"),
        ({"order": "soon"}, "order of T is soon"),
        ({"rev": 10**17}, "rev of T"),
        ({"leaseExpiresAt": "nan"}, "leaseExpiresAt is nan"),
        ({"claimTTL": ""}, "claimTTL of T is missing"),
        ({"claimedBy": "\n"}, "not an id"),
        ({"notBefore": "1e9"}, "notBefore of T is 1e9"),
    ],
)
async def test_a_script_refuses_a_record_that_would_do_harm(
    queue: mq.Queue, db: redis.Redis, server: Server, changes: Any, said: str
) -> None:
    await create(queue, "T")
    await queue.claim("T", "alice")
    meta, records = await taken(queue)
    db.flushall()
    with pytest.raises(mq.Refused, match=said):
        await queue.restore("p", meta, source([{**records[0], **changes}]))
    left = [key for key in key_space(server) if not key.endswith(b"{p}")]
    assert left == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epoch": ""}, "epoch is not an id"),
        ({"limits": "none"}, "limits are none"),
        ({"limits": "schema=2"}, "schema 2"),
        ({"lanes": "any coding=x"}, "coding.maxConcurrent is x"),
        ({"lanes": " ".join(f"l{n}" for n in range(33))}, "33 lanes"),
        ({"rev": -1}, "rev is -1"),
    ],
)
async def test_facts_of_a_project_that_cannot_be_are_refused(
    queue: mq.Queue, db: redis.Redis, server: Server, changes: Any, said: str
) -> None:
    await create(queue, "T")
    meta, records = await taken(queue)
    db.flushall()
    with pytest.raises(mq.Refused, match=said):
        await queue.restore("p", {**meta, **changes}, source(records))
    assert key_space(server) == {}
