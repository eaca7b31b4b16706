"""Whole records, and a project that is made of them again.

A flushed Valkey is restored from its records; what stands there afterwards is what stood there
before, key by key, but for receipts, bells and what no task needs any more.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
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
    await queue.note("again", "it needs a key")
    await create(queue, "waits", "ready", "held", "dead")
    await create(queue, "freed", "ready")
    await queue.complete("ready", force=True)
    await queue.reopen("ready", reason="blank")
    await create(queue, "anew", "ready")
    await create(queue, "old")
    await queue.complete("old", force=True, summary="old")


TRANSIENT = ("op", "bell", "inbox", "waiting", "claimers", "events")


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
    assert await mq.enter_records(queue, "p", meta, source(records)) == len(records)
    assert kept(read_project(db, "p")) == before
    assert problems(db, "p", since=meta["rev"], bells=True, locks=True) == []
    assert await queue.projects() == ["p"]
    assert (await mq.doctor(queue))["findings"][1:] == []


async def test_a_restored_project_goes_on(queue: mq.Queue, db: redis.Redis) -> None:
    """Claims, fences and events continue where the record ends; a holder still holds."""
    await populate(queue)
    meta, records = await taken(queue)
    db.flushall()
    await mq.enter_records(queue, "p", meta, source(records))
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
    await mq.enter_records(queue, "p", meta, source(records))
    now = (await mq.status(queue, project="p"))["projects"][0]["now"]
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
        await mq.enter_records(queue, "p", meta, source(*([record] for record in records)))
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
    await mq.enter_records(queue, "p", meta, source([later["A"], records[1]]))
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
        lambda: queue.create("p", "m", "new", title="t"),
        lambda: queue.reap(project="p"),
        lambda: queue.policy(project="p", apply=True),
        lambda: mq.status(queue, project="p"),
    ]

    async def watched() -> mq.Records:
        for record in records:
            yield [record]
            for call in calls:
                with pytest.raises(mq.Refused, match="it is being restored") as refused:
                    await call()
                assert refused.value.code == "NOT_FOUND"
            nothing = await queue.next("eve", project="p")
            assert nothing["why"].endswith("it is being restored")
        assert (await mq.status(queue))["projects"] == []

    await mq.enter_records(queue, "p", meta, watched())
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
            await mq.enter_records(queue, "p", meta | {"rev": meta["rev"] + at}, cut(at))
    assert await mq.enter_records(queue, "p", meta, source(records)) == len(records)
    assert kept(read_project(db, "p")) == before
    assert await mq.enter_records(queue, "p", meta, source(records)) == -1


async def test_the_later_of_two_restores_wins(queue: mq.Queue, db: redis.Redis) -> None:
    await populate(queue)
    before = kept(read_project(db, "p"))
    meta, records = await taken(queue)
    db.flushall()

    async def overtaken() -> mq.Records:
        yield records[:5]
        await mq.enter_records(queue, "p", meta, source(records))
        yield records[5:]

    assert await mq.enter_records(queue, "p", meta, overtaken()) == -1
    assert kept(read_project(db, "p")) == before

    async def and_worked_on() -> mq.Records:
        yield records[:5]
        await mq.enter_records(queue, "p", meta, source(records))
        await queue.note("ready", "hello")
        yield records[5:]

    db.flushall()
    with pytest.raises(mq.Refused, match="has newer changes") as refused:
        await mq.enter_records(queue, "p", meta, and_worked_on())
    assert refused.value.code == "EXISTS"

    async def half() -> mq.Records:
        yield records[:5]
        await queue.call("restore", "p", {**meta, "mark": "other", "step": "begin"})
        yield records[5:]

    db.flushall()
    with pytest.raises(mq.Refused, match="by somebody else"):
        await mq.enter_records(queue, "p", meta, half())


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
            await mq.enter_records(queue, "p", {**meta, **other}, source(records))
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
        await mq.enter_records(queue, "p", meta, source([{**records[0], **changes}]))
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
        await mq.enter_records(queue, "p", {**meta, **changes}, source(records))
    assert key_space(server) == {}


# ---- files ----


def command(config: mq.Config, capsys: Any, *words: str) -> tuple[int, str, str]:
    """A command line in this process: exit status, stdout, stderr."""
    status = mq.main([*words, "--url", config["redis.url"], "--config", "/dev/null"])
    return (status, *capsys.readouterr())


@pytest.fixture
def exported(config: mq.Config, tmp_path: Path) -> tuple[Path, list[Any]]:
    """A populated project as a file, and its lines."""

    async def lines() -> list[Any]:
        async with mq.Queue(config) as queue:
            await populate(queue)
            return [line async for line in mq.export_values(queue, "p")]

    found, path = asyncio.run(lines()), tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in found))
    return path, found


def test_export_and_restore(
    exported: Any, config: mq.Config, db: redis.Redis, tmp_path: Path, capsys: Any
) -> None:
    """A life as command lines: written out, flushed, back, and still the same lines."""
    before = kept(read_project(db, "p"))
    first, again = tmp_path / "first", tmp_path / "again"
    tasks = len(before["tasks"])
    assert command(config, capsys, "export", "--project", "p", "--output", str(first)) == (
        0, f"{tasks} tasks of project p are in {first}\n", "",
    )  # fmt: skip
    assert first.stat().st_mode & 0o777 == 0o600
    db.flushall()
    words = ("restore", "--project", "p", "--from", str(first))
    status, out, err = command(config, capsys, *words)
    assert (status, err) == (0, "")
    assert out.startswith(f"project p: {tasks} tasks, rev ")
    assert kept(read_project(db, "p")) == before
    status, out, _ = command(config, capsys, *words, "--json")
    assert json.loads(out) == {
        "v": 1, "project": "p", "restored": 0, "rev": int(before["meta"]["rev"]), "already": True,
    }  # fmt: skip
    assert command(config, capsys, "export", "--project", "p", "--output", str(again))[0] == 0
    one, two = (path.read_text().splitlines() for path in (first, again))
    assert one[1:] == two[1:], "a stable order"
    assert [json.loads(line)["taskId"] for line in one[1:]] == sorted(before["tasks"])


def test_import_under_another_name(
    exported: Any, config: mq.Config, db: redis.Redis, capsys: Any
) -> None:
    """Another project, of another epoch, beside the first."""
    path, lines = exported
    status, out, err = command(config, capsys, "import", str(path), "--project", "new")
    assert (status, err) == (0, "")
    assert out == f"project new: {len(lines) - 1} tasks, rev {lines[0]['rev']}\n"
    old, new = kept(read_project(db, "p")), kept(read_project(db, "new"))
    assert old["meta"].pop("epoch") != new["meta"].pop("epoch")
    assert old == new
    assert problems(db, "new", since=lines[0]["rev"], locks=True) == []
    status, _, err = command(config, capsys, "import", str(path), "--project", "new")
    assert status == 4
    assert "EXISTS: project new is there already, with another epoch" in err
    status, _, err = command(config, capsys, "restore", "--project", "q", "--from", str(path))
    assert status == 2
    assert f"mosaic-queue import {path} --project q" in err


BAD: list[tuple[Callable[[list[Any]], Any], int, str]] = [
    (lambda lines: lines.pop(0), 1, "no export: it has no version"),
    (lambda lines: lines[0].update(v=2), 1, "version 2"),
    (lambda lines: lines[0].update(epoch=7), 1, "epoch is '7'"),
    (lambda lines: lines[0].update(project="a b"), 1, "project is 'a b'"),
    (lambda lines: lines[3].update(title=""), 4, "title is ''"),
    (lambda lines: lines[3].update(title=None), 4, "title is 'null'"),
    (lambda lines: lines[3].pop("mission"), 4, "mission is missing"),
    (lambda lines: lines[3].update(status="done"), 4, "status is 'done'"),
    (lambda lines: lines[3].update(status="completed"), 4, "completedAt is missing"),
    (lambda lines: lines[3].update(lane="none"), 4, "lane is 'none'"),
    (lambda lines: lines[3].update(rev=-1), 4, "rev is '-1'"),
    (lambda lines: lines[3].update(rev=True), 4, "rev is 'true'"),
    (lambda lines: lines[3].update(order=2**60), 4, "order is"),
    (lambda lines: lines[3].update(tilte="x"), 4, "field of a record is 'tilte'"),
    (lambda lines: lines[3].update(dependencies=["a b"]), 4, "dependencies is 'a b'"),
    (lambda lines: lines[3].update(waits=[1, "a b"]), 4, "waits is"),
    (lambda lines: lines[3].update(hidden={"blocked": "x"}), 4, "blocked is 'x'"),
    (lambda lines: lines[3].update(hidden={"rank": 1}), 4, "field of a record is 'rank'"),
    (lambda lines: lines[3].update(hidden=[1]), 4, "hidden is"),
    (lambda lines: lines[3].update(metadata="{}"), 4, "metadata is '{}'"),
    (lambda lines: lines[3].update(description="\ud800"), 4, "description is"),
    (lambda lines: lines[3].update(session="a\tb"), 4, "session is"),
    (lambda lines: lines.append(lines[3]), 0, "is in two lines"),
    (lambda lines: lines.append([1]), 0, "a record is '[1]'"),
]


@pytest.mark.parametrize(("change", "number", "said"), BAD, ids=[said for _, _, said in BAD])
def test_a_malformed_file_is_refused_with_its_line(
    exported: Any,
    config: mq.Config,
    server: Server,
    capsys: Any,
    change: Callable[[list[Any]], Any],
    number: int,
    said: str,
) -> None:
    path, lines = exported
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = key_space(server)
    status, out, err = command(config, capsys, "import", str(path), "--project", "new")
    assert status in (2, 6)
    assert out == ""
    assert f"line {number or len(lines)} of {path}: " in err
    assert said in err
    assert key_space(server) == before, "nothing was written"


def test_what_is_no_file_of_lines(
    exported: Any, config: mq.Config, server: Server, tmp_path: Path, capsys: Any
) -> None:
    path, lines = exported
    text = path.read_bytes()
    before = key_space(server)
    for content, said in (
        (text[:-40], f"line {len(lines)} of {path} is no JSON"),
        (text + b"\xff\n", f"line {len(lines) + 1} of {path} is no JSON"),
        (b"", f"line 1 of {path} is no JSON"),
    ):
        path.write_bytes(content)
        status, _, err = command(config, capsys, "import", str(path), "--project", "new")
        assert status == 2
        assert said in err
    looped = [dict(line) for line in lines]
    by_id = {line.get("taskId"): line for line in looped}
    by_id["ready"]["dependencies"] = ["waits"]
    path.write_text("".join(json.dumps(line) + "\n" for line in looped))
    status, _, err = command(config, capsys, "import", str(path), "--project", "new")
    assert status == 4
    assert "CYCLE" in err
    for missing in ("restore", "import"):
        where = ("--project", "p", "--from", str(tmp_path / "none"))
        words = where if missing == "restore" else (str(tmp_path / "none"),)
        status, _, err = command(config, capsys, missing, *words)
        assert status == 2
        assert "No such file" in err
    assert key_space(server) == before


def test_export_of_what_is_not_there(config: mq.Config, capsys: Any, tmp_path: Path) -> None:
    """Neither the project nor the place to write it to; what was there is kept."""
    old = tmp_path / "old"
    old.write_text("old")
    status, out, err = command(config, capsys, "export", "--project", "none", "--output", str(old))
    assert (status, out) == (3, "")
    assert "there is no project none" in err
    assert old.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    words = ("export", "--project", "none", "--output", str(tmp_path / "no" / "file"))
    status, _, err = command(config, capsys, *words)
    assert status == 6
    assert "cannot be written: No such file or directory" in err


async def test_export_while_the_project_lives(queue: mq.Queue, db: redis.Redis) -> None:
    """Each task is as it was at one moment; restored, what depends on what is set right."""
    for n in range(150):
        await create(queue, f"T{n:03}", *([f"T{n - 1:03}"] if n % 3 else []))

    async def works() -> None:
        for n in range(150):
            await queue.complete(f"T{n:03}", force=True)

    working = asyncio.create_task(works())
    found = []
    async for line in mq.export_values(queue, "p"):
        found.append(line)
        await asyncio.sleep(0.001)
    await working
    header, records = found[0], found[1:]
    db.flushall()
    meta = mq.meta_of(header)
    assert await mq.enter_records(queue, "p", meta, source(records[:70], records[70:])) == 150
    rev = max(meta["rev"], *(one["rev"] for one in records))
    assert problems(db, "p", since=rev) == []
    assert (await mq.doctor(queue, project="p"))["findings"][1:] == []


async def test_a_record_that_contradicts_itself_is_set_right(
    queue: mq.Queue, db: redis.Redis
) -> None:
    """Blocked by nothing, or pending though somebody blocked it: one event says what became."""
    await create(queue, "idle")
    await create(queue, "busy")
    meta, records = await taken(queue)
    busy, idle = records
    db.flushall()
    changed: Any = [{**idle, "status": "blocked"}, {**busy, "hidden": {"blocked": "1"}}]
    await mq.enter_records(queue, "p", meta, source(changed))
    assert (await queue.get("idle"))["status"] == "pending"
    assert (await queue.get("busy"))["status"] == "blocked"
    events = (await queue.events(project="p", since=meta["rev"]))["events"]
    assert [(one["task"], one["op"]) for one in events] == [("idle", "update"), ("busy", "update")]
    assert problems(db, "p", since=meta["rev"]) == []


async def test_a_file_does_not_enter_anew_what_was_lost(
    tmp_path: Path, server: Server, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a flush the board would be a project of its own, and the record stay where it is."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    board = tmp_path / "TASKS.md"
    board.write_text("| id | status | description |\n|---|---|---|\n| A | not-started | do A |\n")
    config = mq.Config(environ={}).set("redis.url", server.url, "t").set("project", "p", "t")
    config.set("manifests", str(tmp_path / "manifests"), "t")
    async with mq.Queue(config) as queue:
        await mq.sync_file(queue, board, "p")
        await queue.claim("A", "al")
        await mq.catch_up(queue, mq.Manifests(mq.manifest_folder(config)), "p", None)
        db.flushall()
        with pytest.raises(mq.Refused, match="it was lost") as refused:
            await mq.sync_file(queue, board, "p")
        assert refused.value.hint == "mosaic-queue restore --project p"
        assert db.dbsize() == 0
        assert (await mq.restore(queue))["restored"] == 1
        assert (await queue.get("A"))["claimedBy"] == "al"
        await mq.sync_file(queue, board, "p")
        assert (await queue.get("A"))["claimedBy"] == "al"


async def test_a_record_comes_back_beside_the_project_that_took_its_place(
    tmp_path: Path, server: Server, db: Any
) -> None:
    config = mq.Config(environ={}).set("redis.url", server.url, "t").set("project", "p", "t")
    config.set("manifests", str(tmp_path / "manifests"), "t")
    async with mq.Queue(config) as queue:
        await queue.create("p", "m", "A", title="the old one")
        await mq.catch_up(queue, mq.Manifests(mq.manifest_folder(config)), "p", None)
        db.flushall()
        await queue.create("p", "m", "A", title="the new one")
        with pytest.raises(mq.Refused, match="with another epoch") as refused:
            await mq.restore(queue)
        assert refused.value.hint.endswith("mosaic-queue restore --project p --as p-old")
        assert (await mq.restore(queue, named="p-old"))["project"] == "p-old"
        assert (await queue.get("p-old/A"))["title"] == "the old one"
        assert (await queue.get("p/A"))["title"] == "the new one"


async def test_a_process_that_lives_on_registers_a_project_again(
    server: Server, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks at all projects has to see that one has taken another's place."""
    async with mq.Queue(mq.Config(environ={}).set("redis.url", server.url, "t")) as queue:
        await queue.create("q", "m", "A", title="t")
        db.flushall()
        monkeypatch.setattr(mq, "REGISTERED", 0)
        await queue.create("q", "m", "A", title="t")
        assert await queue.projects() == ["q"]
