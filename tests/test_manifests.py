"""Manifests: the record as files, written by a follower, and a project restored from them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import itertools
import json
import os
import stat
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import conftest
import pytest
import redis
from conftest import BINARIES, PROGRAM, Server, at_work
from invariants import problems

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
LIMIT = 30  # s for what takes a moment
EVERY = 0.2  # s between two writes of a file, in place of one second


def read_back(folder: Path, project: str) -> tuple[str, mq.Meta, mq.Records]:
    return mq.read_project(mq.manifests_of(folder, project), project)


@pytest.fixture(scope="module")
def server() -> Any:
    """One engine: what is tested here knows of none."""
    running = Server(str(BINARIES["valkey"]()))
    yield running
    running.close()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mq.Manifests, "every", EVERY)
    monkeypatch.setattr(mq, "FOLLOW_EVERY", EVERY)


@contextlib.asynccontextmanager
async def following(queue: mq.Queue, follower: mq.Manifests) -> AsyncIterator[None]:
    async with at_work(mq.follow(queue, follower)):
        yield


until = functools.partial(conftest.until, limit=LIMIT)


async def create(queue: mq.Queue, *names: str, mission: str = "m", **rest: Any) -> None:
    rows: list[Any] = [
        {"mission": mission, "title": "a task", "taskId": name, **rest} for name in names
    ]
    await queue.create_all(rows, project="p")


def manifest(folder: Path, mission: str = "m") -> list[Any]:
    """The records of a mission."""
    return lines_in(folder / "p" / f"{mission}.jsonl")[1:]


def lines_in(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def titles(folder: Path, mission: str = "m") -> dict[str, str]:
    with contextlib.suppress(FileNotFoundError):
        return {one["taskId"]: one["status"] for one in manifest(folder, mission)}
    return {}


def cursor(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError):
        return int(json.loads((folder / "p" / "project.jsonl").read_bytes())["cursor"])
    return -1


async def in_step(queue: mq.Queue, folder: Path) -> None:
    """Wait until the files have everything, then hold them against the queue."""
    meta, found = await queue.records("p", await queue.ids("p"))
    await until(lambda: cursor(folder) == meta["rev"])
    files = mq.missions_of(folder / "p")
    tasks = [task for path in files for task in lines_in(path)[1:]]
    assert len(tasks) == len(found)
    written = {task["taskId"]: task for task in tasks}
    for one in (*written.values(), *found.values()):
        # A completion changes nothing of a task that goes on waiting for others.
        waits = one.pop("waits", ())
        one["waits"] = [name for name in waits if found.get(name, one)["status"] != "completed"]
    assert written == found


# ---- what is written ----


async def test_every_change_is_in_its_mission(queue: mq.Queue, tmp_path: Path) -> None:
    folder = tmp_path / "manifests"
    async with following(queue, mq.Manifests(folder)):
        await create(queue, "A", "B", description="täglich\n☃", metadata={"a": {}})
        await create(queue, "C", mission="n", dependencies=["A"])
        await queue.claim("A", "alice")
        await in_step(queue, folder)
        assert titles(folder) == {"A": "claimed", "B": "pending"}
        await queue.complete("A", agent="alice", summary="done")
        await queue.update("B", mission="n")
        await in_step(queue, folder)
        assert titles(folder, "n") == {"B": "pending", "C": "pending"}
        await queue.delete("B")
        await queue.delete("C")
        await in_step(queue, folder)
        assert not (folder / "p" / "n.jsonl").exists()
        await queue.purge(older=0)
        await in_step(queue, folder)


async def test_a_manifest_is_for_people(queue: mq.Queue, tmp_path: Path) -> None:
    """A line for each task, oldest first, the same bytes for the same tasks; private."""
    folder = tmp_path / "manifests"
    await create(queue, "Z", "A", "M")
    follower = mq.Manifests(folder)
    async with following(queue, follower):
        await in_step(queue, folder)
    path = folder / "p" / "m.jsonl"
    head, *tasks = lines_in(path)
    assert {name: head[name] for name in ("v", "project", "mission", "rev")} == {
        "v": 1, "project": "p", "mission": "m", "rev": 3,
    }  # fmt: skip
    assert [task["taskId"] for task in tasks] == ["Z", "A", "M"]
    (meta,) = lines_in(folder / "p" / "project.jsonl")
    assert (meta["v"], meta["rev"], meta["cursor"]) == (1, 3, 3)
    for one, mode in ((folder, 0o700), (folder / "p", 0o700), (path, 0o600)):
        assert stat.S_IMODE(one.stat().st_mode) == mode
    before = path.read_bytes()
    (folder / "p" / "project.jsonl").unlink()
    async with following(queue, follower):
        await in_step(queue, folder)
    assert path.read_bytes() == before


async def test_names_that_differ_in_case_alone(queue: mq.Queue, tmp_path: Path) -> None:
    names = ["launch", "Launch", "LAUNCH", "project", "x" * 128, "X" * 128]
    for name in names:
        await create(queue, name, mission=name)
    async with following(queue, mq.Manifests(tmp_path)):
        await in_step(queue, tmp_path)
    files = {path.name.lower() for path in mq.missions_of(tmp_path / "p")}
    assert len(files) == len(names)
    assert "launch.jsonl" in files


async def test_a_busy_mission_is_written_now_and_then(
    queue: mq.Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[float, str]] = []
    drafted = mq.draft_of

    def counted(path: Path) -> Any:
        written.append((asyncio_time(), path.name))
        return drafted(path)

    loop = asyncio.get_running_loop()
    asyncio_time = loop.time
    monkeypatch.setattr(mq, "draft_of", counted)
    await create(queue, "A")
    await create(queue, "quiet", mission="n")
    async with following(queue, mq.Manifests(tmp_path)):
        await in_step(queue, tmp_path)
        written.clear()
        began = loop.time()
        for n in range(1500):
            await queue.note("A", f"note {n}")
        took = loop.time() - began
        await in_step(queue, tmp_path)
    times = [at for at, name in written if name == "m.jsonl"]
    assert 1 <= len(times) <= took / EVERY + 3
    assert all(later - earlier >= 0.95 * EVERY for earlier, later in itertools.pairwise(times))
    assert {name for _, name in written} == {"m.jsonl", "project.jsonl"}


async def test_it_is_kept_while_it_is_wanted(queue: mq.Queue, tmp_path: Path) -> None:
    """As when the database is away: nothing before, everything from then on."""
    wanted = False
    await create(queue, "A")
    async with following(queue, mq.Manifests(tmp_path, lambda: wanted)):
        await asyncio.sleep(0.3)
        assert not (tmp_path / "p").exists()
        wanted = True
        await in_step(queue, tmp_path)
        wanted = False
        await asyncio.sleep(5 * EVERY)
        await queue.note("A", "unseen")
        await asyncio.sleep(0.3)
        assert cursor(tmp_path) == 1
        wanted = True
        await in_step(queue, tmp_path)


# ---- what goes wrong ----


@pytest.mark.parametrize("content", [b"", b'{"v": 1, "project"', b"[]", b'{"v": 1}', b"\xff"])
@pytest.mark.parametrize("name", ["m.jsonl", "project.jsonl"])
async def test_a_broken_file_is_written_anew(
    queue: mq.Queue, tmp_path: Path, name: str, content: bytes
) -> None:
    await create(queue, "A", "B")
    follower = mq.Manifests(tmp_path)
    async with following(queue, follower):
        await in_step(queue, tmp_path)
    (tmp_path / "p" / name).write_bytes(content)
    with pytest.raises(mq.Refused, match=name):
        read_back(tmp_path, "p")
    await queue.claim("A", "alice")
    async with following(queue, follower):
        await in_step(queue, tmp_path)


async def test_a_full_disk_leaves_the_old_file(
    queue: mq.Queue,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is said with the path, and tried again until there is room."""
    await create(queue, "A")
    full = False
    sync = os.fsync

    def no_room(number: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(number)

    monkeypatch.setattr(os, "fsync", no_room)
    async with following(queue, mq.Manifests(tmp_path)):
        await in_step(queue, tmp_path)
        before = (tmp_path / "p" / "m.jsonl").read_bytes()
        full = True
        await queue.claim("A", "alice")
        said = await until(lambda: [line for line in capsys.readouterr().err.splitlines() if line])
        assert json.loads(said[0])["message"] == (
            f"{tmp_path}/p/m.jsonl cannot be written: No space left on device"
        )
        assert (tmp_path / "p" / "m.jsonl").read_bytes() == before
        assert not [*(tmp_path / "p").glob(".*.draft")]
        full = False
        await in_step(queue, tmp_path)


async def test_killed_at_every_write(
    queue: mq.Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whatever file of a batch it ended: the next process brings all in step."""
    replace = Path.replace
    left = 0

    def killed(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    for mission in ("a", "b", "c"):
        await create(queue, mission + "1", mission=mission)
    async with following(queue, mq.Manifests(tmp_path)):
        await in_step(queue, tmp_path)
    for at in (1, 2, 3, 4):
        left = 0
        for n, mission in enumerate("abc"):
            await queue.update(f"{mission}1", mission="abc"[(n + 1) % 3])
            await queue.note(f"{mission}1", "x")
        left = at
        since = await mq.Manifests(tmp_path).cursor("p")
        follower = mq.Manifests(tmp_path)
        monkeypatch.setattr(asyncio, "to_thread", inline)
        with pytest.raises(KeyboardInterrupt):
            await mq.catch_up(queue, follower, "p", since)
        left = 0
        _, _meta, records = read_back(tmp_path, "p")
        found = [one["taskId"] async for part in records for one in part]
        assert sorted(set(found)) == ["a1", "b1", "c1"], "restore would have each of them"
        async with following(queue, mq.Manifests(tmp_path)):
            await in_step(queue, tmp_path)


async def inline(call: Any, *args: Any) -> Any:
    return call(*args)


async def test_another_epoch_overwrites_nothing(
    queue: mq.Queue, db: redis.Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a flush somebody created the project again: the files are kept, and it is said."""
    await create(queue, "A", "B")
    follower = mq.Manifests(tmp_path)
    async with following(queue, follower):
        await in_step(queue, tmp_path)
    before = (tmp_path / "p" / "m.jsonl").read_bytes()
    db.flushall()
    await create(queue, "X")
    for broken in (False, True):
        if broken:
            (tmp_path / "p" / "project.jsonl").write_text("{")
        async with following(queue, follower):
            said = await until(lambda: capsys.readouterr().err)
        assert "epoch" in said
        assert "mosaic-queue restore --project p" in said
        assert (tmp_path / "p" / "m.jsonl").read_bytes() == before


# ---- and back ----


async def test_a_flushed_project_comes_back_from_manifests(
    queue: mq.Queue, db: redis.Redis, tmp_path: Path
) -> None:
    """The follower goes on with the same files; what happens next is in them too."""
    await create(queue, "A", "B")
    await create(queue, "C", mission="n", dependencies=["A", "B"])
    await queue.claim("A", "alice", ttl=600)
    follower = mq.Manifests(tmp_path)
    async with following(queue, follower):
        await in_step(queue, tmp_path)
        before = await queue.records("p", ["A", "B", "C"])
        db.flushall()
        _, meta, source = read_back(tmp_path, "p")
        assert await mq.enter_records(queue, "p", meta, source) == 3
        assert await queue.records("p", ["A", "B", "C"]) == before
        await queue.complete("A", agent="alice")
        await in_step(queue, tmp_path)
    assert problems(db, "p", since=before[0]["rev"]) == []


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("m.jsonl", {"epoch": "other"}, "m.jsonl: its epoch is 'other'"),
        ("m.jsonl", {"project": "q"}, "m.jsonl: its project is 'q', not p"),
        ("m.jsonl", {"v": 2}, "version 2; this program knows version 1"),
        ("m.jsonl", [{"taskId": "A"}], "m.jsonl: mission is missing"),
        ("m.jsonl", [7], "m.jsonl: a record is '7'"),
        ("project.jsonl", {"v": 9}, "version 9"),
        ("project.jsonl", {"rev": "1"}, "project.jsonl: rev is '1'"),
        ("project.jsonl", {"lanes": None}, "lanes is 'null'"),
    ],
)
async def test_what_is_refused_is_said_with_its_path(
    queue: mq.Queue, tmp_path: Path, name: str, change: Any, said: str
) -> None:
    await create(queue, "A")
    async with following(queue, mq.Manifests(tmp_path)):
        await in_step(queue, tmp_path)
    path = tmp_path / "p" / name
    head, *records = lines_in(path)
    new = [head | change, *records] if isinstance(change, dict) else [head, *change]
    path.write_text("".join(json.dumps(line) + "\n" for line in new))
    with pytest.raises(mq.Refused) as refused:
        read_back(tmp_path, "p")
    assert said in refused.value.message
    assert str(path) in refused.value.message


async def test_a_manifest_is_an_export_of_its_mission(
    queue: mq.Queue, db: redis.Redis, tmp_path: Path
) -> None:
    """It is imported like any other."""
    await create(queue, "A", "B")
    await create(queue, "C", mission="n", dependencies=["A"])
    async with following(queue, mq.Manifests(tmp_path)):
        await in_step(queue, tmp_path)
    _, tasks = await queue.records("p", ["A", "B"])
    db.flushall()
    answer = await mq.import_(queue, str(tmp_path / "p" / "m.jsonl"))
    assert answer["restored"] == 2
    _, found = await queue.records("p", ["A", "B", "C"])
    assert {**found["A"], "freed": []} == {**tasks["A"], "freed": []}
    assert found["B"] == tasks["B"]


async def test_manifests_of_an_older_program(
    queue: mq.Queue, db: redis.Redis, tmp_path: Path
) -> None:
    """They are one JSON object each: they restore a project, and are written anew."""
    await create(queue, "A", "B")
    await create(queue, "C", mission="n", dependencies=["A"])
    meta, tasks = await queue.records("p", ["A", "B", "C"])
    folder = tmp_path / "p"
    folder.mkdir()
    head = {"v": 1, "project": "p", "epoch": meta["epoch"]}
    for mission in ("m", "n"):
        own = [task for task in tasks.values() if task["mission"] == mission]
        text = json.dumps(head | {"mission": mission, "tasks": own})
        (folder / f"{mission}.json").write_text(text)
    (folder / "project.json").write_text(json.dumps(head | meta | {"cursor": meta["rev"]}))
    db.flushall()
    _, its_meta, source = read_back(tmp_path, "p")
    assert await mq.enter_records(queue, "p", its_meta, source) == 3
    assert await queue.records("p", ["A", "B", "C"]) == (meta, tasks)
    async with following(queue, mq.Manifests(tmp_path)):
        await in_step(queue, tmp_path)
        await until(lambda: not [*folder.glob("*.json")])
    assert sorted(one.name for one in folder.iterdir()) == ["m.jsonl", "n.jsonl", "project.jsonl"]
    db.flushall()
    (folder / "project.jsonl").unlink()
    (folder / "m.jsonl").rename(folder / "m.json")
    (folder / "m.json").write_text(json.dumps(head | {"mission": "m", "tasks": []}))
    await create(queue, "X")
    with pytest.raises(mq.Refused, match="of another epoch"):
        await mq.catch_up(queue, mq.Manifests(tmp_path), "p", None)


async def test_a_project_without_manifests(tmp_path: Path) -> None:
    with pytest.raises(mq.Refused, match="has no record of none") as refused:
        read_back(tmp_path, "none")
    assert refused.value.code == "NOT_FOUND"


async def test_a_monitor_keeps_them_and_a_command_restores(
    queue: mq.Queue, db: redis.Redis, server: Server, tmp_path: Path
) -> None:
    """As people do it: a configuration, a monitor, a flush, `restore`."""
    file = tmp_path / "queue.yaml"
    file.write_text(f"project: p\nmanifests: {tmp_path / 'kept'}\n")
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MOSAIC_VALKEY_URL": server.url}
    program = [str(PROGRAM)]
    await create(queue, "A", "B")
    await queue.claim("A", "alice", ttl=900)
    before = await queue.records("p", ["A", "B"])
    with subprocess.Popen(
        [*program, "monitor", "--config", str(file)], env=environ, stderr=subprocess.DEVNULL
    ) as running:
        try:
            await until(lambda: cursor(tmp_path / "kept") == 3)
            db.flushall()
            done = await asyncio.to_thread(
                subprocess.run, [*program, "restore", "--config", str(file)],
                env=environ, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout == "project p: 2 tasks, rev 3\n"
            assert await queue.records("p", ["A", "B"]) == before
            await queue.complete("A", agent="alice")
            await until(lambda: titles(tmp_path / "kept") == {"A": "completed", "B": "pending"})
        finally:
            running.terminate()


async def test_they_stand_in_while_postgres_is_away(
    queue: mq.Queue,
    db: redis.Redis,
    config: mq.Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    folder = tmp_path / "mosaic-queue" / "manifests"
    config.set("postgres.url", "postgresql://nobody@127.0.0.1:1/none", "test")
    await create(queue, "A")
    async with at_work(mq.watch_all(queue)):
        await in_step(queue, folder)
    db.flushall()
    with pytest.raises(mq.Refused) as refused:
        await mq.restore(queue)
    assert refused.value.code == "UNREACHABLE"
    assert refused.value.hint.endswith(f"restore --from {folder}")
    assert (await mq.restore(queue, source=str(folder)))["restored"] == 1
    assert (await queue.get("A"))["status"] == "pending"
