"""The monitor: one leads, others take over; it ends leases and serves agents that wait.

Who leads and how it dies is shown with processes, on a leader's lease of seconds; what it does is
shown with a monitor in this process, behind the shim, since a Valkey that has just started ends
no lease for a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import BINARIES, FOLDER, Server, Shim, at_work, one_engine, until

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
ROOT = "mosaic:queue:project:{p}"
AT_ONCE = 8  # s; a waiter that was not woken would look after 10
RUN = f"import sys; sys.path.insert(0, {FOLDER!r}); import mosaic_queue as mq; "
DEADLINE = "mq.Queue.__init__.__kwdefaults__['deadline'] = {}; "


server = one_engine()


class Monitor:
    """A monitor in a process of its own, whose lease is of `leads` seconds."""

    def __init__(self, url: str, folder: Path, leads: int, more: str, *words: str) -> None:
        self.log = folder / f"log-{os.urandom(4).hex()}"
        environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "MOSAIC_VALKEY_URL": url}
        code = f"{RUN}{more}mq.LEADS = {leads}; sys.exit(mq.main())"
        with open(self.log, "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, "monitor", *words], env=environ, cwd=folder,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip

    def told(self, event: str) -> list[dict[str, Any]]:
        """What it has logged of one kind; every line has to be JSON."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines(keepends=True)]
        return [line for line in lines if line["event"] == event]


Start = Callable[..., Monitor]


@pytest.fixture
def start(db: redis.Redis, server: Server, tmp_path: Path) -> Iterator[Start]:
    started: list[Monitor] = []

    def make(*words: str, url: str = server.url, leads: int = 2, more: str = "") -> Monitor:
        started.append(Monitor(url, tmp_path, leads, more, *words))
        return started[-1]

    yield make
    for one in started:
        one.process.kill()
        one.process.communicate()


@contextlib.asynccontextmanager
async def watching(config: mq.Config, assign: bool = False) -> AsyncIterator[None]:
    """A monitor in this process."""
    async with mq.Queue(config) as queue, at_work(mq.watch_all(queue, assign)):
        yield


async def create(queue: mq.Queue, *names: str, **rest: Any) -> None:
    rows: list[Any] = [
        {"mission": "m", "title": "a task", "taskId": name, **rest} for name in names
    ]
    await queue.create_all(rows, project="p")


def status(db: redis.Redis, name: str) -> str | None:
    return db.hget(f"{ROOT}:task:{name}", "status")


# ---- one leads ----


async def test_one_leads_and_another_takes_over(start: Start, db: redis.Redis) -> None:
    monitors = [start(leads=5) for _ in range(3)]
    await until(lambda: any(one.told("lead") for one in monitors))
    await until(lambda: all(one.told("start") for one in monitors))
    await asyncio.sleep(5 / 3 + 0.5)  # each has looked
    (leader,) = [one for one in monitors if one.told("lead")]
    assert db.get(mq.LEADER) == leader.told("start")[0]["token"]
    assert 0 < db.pttl(mq.LEADER) <= 5000
    leader.process.kill()
    others = [one for one in monitors if one is not leader]
    await until(lambda: any(one.told("lead") for one in others))
    assert len([one for one in others if one.told("lead")]) == 1


async def test_sigterm_hands_over_at_once(start: Start, db: redis.Redis) -> None:
    """Its lease would last for longer than this test waits."""
    leader = start(leads=600)
    await until(lambda: leader.told("lead"))
    other = start()
    await until(lambda: other.told("start"))
    leader.process.send_signal(signal.SIGTERM)
    out, _ = leader.process.communicate(timeout=60)
    assert (leader.process.returncode, out) == (0, b"")
    assert leader.told("stop")
    await until(lambda: other.told("lead"))
    assert db.get(mq.LEADER) == other.told("start")[0]["token"]


async def test_a_leader_that_slept_stands_by(start: Start) -> None:
    """Two that believe they lead would be no harm, but not for long."""
    leader = start()
    await until(lambda: leader.told("lead"))
    other = start(leads=6)
    await until(lambda: other.told("start"))
    leader.process.send_signal(signal.SIGSTOP)
    await until(lambda: other.told("lead"))
    leader.process.send_signal(signal.SIGCONT)
    await until(lambda: leader.told("stand by"))
    assert not other.told("stand by")


async def test_it_outlives_the_server(start: Start, tmp_path: Path) -> None:
    own = Server(str(BINARIES["valkey"]()))
    try:
        one = start(url=own.url, more=DEADLINE.format(2))
        await until(lambda: one.told("lead"))
        own.kill()
        await until(lambda: one.told("error"))
        assert one.told("error")[0]["code"] == "UNREACHABLE"
        own.start()
        await until(lambda: own.client().get(mq.LEADER))
        assert one.process.poll() is None
        one.process.terminate()
        assert one.process.wait(60) == 0
    finally:
        own.close()


async def test_it_stops_at_once_without_a_server(start: Start) -> None:
    """Also in the middle of an operation, which would be tried for ten minutes here."""
    one = start("--url", "redis://127.0.0.1:1", more=DEADLINE.format(600))
    await until(lambda: one.told("start"))
    await asyncio.sleep(0.3)
    one.process.terminate()
    assert one.process.wait(60) == 0
    assert not one.told("error")


# ---- it ends leases ----


async def test_a_lease_ends_within_the_interval(
    queue: mq.Queue, config: mq.Config, db: redis.Redis, shim: Shim
) -> None:
    """In every project, and although the claim came after the monitor's last look; without the
    setting it would look a minute later."""
    config.set("watchdog.interval", 1, "test")
    await create(queue, "T1")
    await queue.create("q", "m", "T2", title="t")
    everywhere = mq.Config(dict(config.values), {}).set("project", "p", "test")
    everywhere.values.pop("project")
    async with watching(everywhere):
        await asyncio.sleep(0.3)
        ends = (await queue.claim("T1", "bob", ttl=1))["leaseExpiresAt"]
        await queue.claim("q/T2", "bob", ttl=1)
        await until(lambda: status(db, "T1") == "pending", 30)
        assert time.time() * 1000 >= ends
        other = ROOT.replace("{p}", "{q}")
        await until(lambda: db.hget(f"{other}:task:T2", "status") == "pending", 30)
    assert (await queue.get("T1"))["expiryCount"] == 1


async def test_a_lease_that_it_knows_of_ends_on_time(
    queue: mq.Queue, config: mq.Config, db: redis.Redis, shim: Shim
) -> None:
    """The interval is a minute; it looks again when the next lease ends."""
    await create(queue, "T1")
    await queue.claim("T1", "bob", ttl=1)
    async with watching(config):
        await until(lambda: status(db, "T1") == "pending", 30)


async def test_a_lease_that_is_renewed_is_left_alone(
    queue: mq.Queue, config: mq.Config, db: redis.Redis, shim: Shim
) -> None:
    config.set("watchdog.interval", 1, "test")
    await create(queue, "T1")
    first = (await queue.claim("T1", "bob", ttl=4))["leaseExpiresAt"]
    renewing = asyncio.create_task(mq.renew_leases(queue))
    async with watching(config):
        await until(lambda: db.zscore(f"{ROOT}:running:any", "T1") > first + 4000)
        await asyncio.sleep(1)
        assert status(db, "T1") == "claimed"
    renewing.cancel()


async def test_hundreds_of_leases_end_in_one_look(
    queue: mq.Queue, config: mq.Config, db: redis.Redis, shim: Shim
) -> None:
    names = [f"T{n}" for n in range(150)]
    await create(queue, *names)
    for name in names:
        await queue.claim(name, "bob", ttl=60)
    shim.seconds = 61
    async with watching(config):
        await until(lambda: db.zcard(f"{ROOT}:ready:any") == 150, 30)


# ---- it assigns ----


@pytest.fixture
def assigning(config: mq.Config) -> mq.Config:
    return config.set("defaults.assign", True, "file")


async def handed(queue: mq.Queue, agent: str, **wants: Any) -> str | None:
    tasks = (await queue.next(agent, **{"wait": 60} | wants))["tasks"]
    return tasks[0]["taskId"] if tasks else None


async def test_it_serves_by_priority_then_dependents_then_age(
    queue: mq.Queue, assigning: mq.Config
) -> None:
    await create(queue, "low")
    await queue.update("low", priority="low")
    await create(queue, "old", "young", "one", "two", priority="high")
    await create(queue, "w1", dependencies=["one"])
    await create(queue, "w2", "w3", dependencies=["two"])
    async with watching(assigning, assign=True):
        got = [await handed(queue, f"agent-{n}") for n in range(5)]
        assert got == ["two", "one", "old", "young", "low"]
    events = (await queue.events(project="p", since=0, limit=1000))["events"]
    assert [one["task"] for one in events if one["op"] == "assign"] == got


async def test_waiters_listen_to_their_inbox_alone(
    queue: mq.Queue, assigning: mq.Config, db: redis.Redis
) -> None:
    await create(queue, "T0", delay=604800)
    waiting = [asyncio.create_task(handed(queue, f"agent-{n}")) for n in range(10)]
    await until(lambda: db.zcard(f"{ROOT}:waiting") == 10)
    names = [f"T{n}" for n in range(1, 11)]
    await create(queue, *names)
    await asyncio.sleep(0.5)
    assert not any(task.done() for task in waiting), "nobody has assigned anything yet"
    async with watching(assigning, assign=True):
        got = await asyncio.wait_for(asyncio.gather(*waiting), AT_ONCE)
    assert sorted(map(str, got)) == sorted(names)
    assert not db.exists(f"{ROOT}:waiting")


async def test_who_waits_with_a_lane_gets_its_tasks(queue: mq.Queue, assigning: mq.Config) -> None:
    await create(queue, "C1", lane="coding", priority="critical")
    await create(queue, "P1", lane="planning")
    async with watching(assigning, assign=True):
        assert await handed(queue, "alice", lane="planning") == "P1"
        assert await handed(queue, "alice", lane="planning", wait=1) is None
        assert await handed(queue, "alice", lane="coding") == "C1"


async def test_who_waits_for_a_mission_gets_nothing_of_another(
    queue: mq.Queue, assigning: mq.Config
) -> None:
    await create(queue, "O1", mission="other", priority="critical")
    await create(queue, "M1", mission="mine")
    async with watching(assigning, assign=True):
        assert await handed(queue, "alice", mission="mine") == "M1"


async def test_two_of_one_name_get_a_task_each(queue: mq.Queue, assigning: mq.Config) -> None:
    """Sub-agents of one client share its name."""
    await create(queue, "T1", "T2")
    async with watching(assigning, assign=True):
        both = asyncio.gather(handed(queue, "alice"), handed(queue, "alice"))
        assert sorted(map(str, await asyncio.wait_for(both, AT_ONCE))) == ["T1", "T2"]


async def test_who_was_assigned_a_task_by_hand_waits_no_more(
    queue: mq.Queue, assigning: mq.Config, db: redis.Redis
) -> None:
    """The monitor would give the next task to an agent that does not ask for any."""
    await create(queue, "T1")
    waiting = asyncio.create_task(handed(queue, "alice"))
    await until(lambda: db.zcard(f"{ROOT}:waiting") == 1)
    await queue.assign("T1", agent="alice")
    assert await asyncio.wait_for(waiting, AT_ONCE) == "T1"
    assert not db.exists(f"{ROOT}:waiting")


async def test_one_of_two_of_one_name_waits_on(
    queue: mq.Queue, assigning: mq.Config, db: redis.Redis
) -> None:
    """Whoever of them is given the one task, the other is still among those that wait."""
    await create(queue, "T0", delay=604800)
    async with watching(assigning, assign=True):
        two = [asyncio.create_task(handed(queue, "alice", wait=60 - 50 * n)) for n in range(2)]
        await until(lambda: db.zcard(f"{ROOT}:waiting") == 2)
        await create(queue, "T1")
        done, _ = await asyncio.wait(two, return_when=asyncio.FIRST_COMPLETED)
        (other,) = set(two) - done
        await until(lambda: db.zcard(f"{ROOT}:waiting") == 1, AT_ONCE)
        await create(queue, "T2")
        assert await asyncio.wait_for(other, AT_ONCE) == "T2"
        assert not db.exists(f"{ROOT}:waiting")


async def test_who_gave_up_is_assigned_nothing(
    queue: mq.Queue, assigning: mq.Config, db: redis.Redis
) -> None:
    await create(queue, "later", delay=604800)
    assert await handed(queue, "alice", wait=1) is None
    await create(queue, "T1")
    async with watching(assigning, assign=True):
        await asyncio.sleep(1)
        assert status(db, "T1") == "pending"


async def test_a_paused_project_is_assigned_nothing(
    queue: mq.Queue, assigning: mq.Config, db: redis.Redis
) -> None:
    await create(queue, "T1")
    await queue.pause()
    async with watching(assigning, assign=True):
        waiting = asyncio.create_task(handed(queue, "alice"))
        await asyncio.sleep(0.8)
        assert status(db, "T1") == "pending"
        await queue.unpause()
        assert await asyncio.wait_for(waiting, AT_ONCE) == "T1"


async def test_a_monitor_killed_while_it_assigns_loses_nothing(
    queue: mq.Queue, assigning: mq.Config, db: redis.Redis, start: Start, shim: Shim
) -> None:
    """The agents are gone with it: what was assigned and not picked up is back after 60 s."""
    names = [f"T{n}" for n in range(200)]
    await create(queue, *names)
    rng, taken = random.Random(6), set()
    for n in range(4):
        agents = [f"agent-{n}-{i}" for i in range(40)]
        waiting = [asyncio.create_task(handed(queue, agent)) for agent in agents]
        await until(lambda: db.zcard(f"{ROOT}:waiting") == 40)
        before = db.xlen(f"{ROOT}:events")
        one = start("--assign")
        await until(lambda: db.xlen(f"{ROOT}:events") > before + 3)  # noqa: B023
        await asyncio.sleep(rng.uniform(0, 0.02))
        one.process.kill()
        for task in waiting:
            task.cancel()
        got = await asyncio.gather(*waiting, return_exceptions=True)
        taken |= {name for name in got if isinstance(name, str)}
        db.delete(f"{ROOT}:waiting", mq.LEADER)  # both would time out
    shim.seconds = 61
    await queue.reap(project="p")
    for name in names:
        task = await queue.get(name)
        if name in taken:
            assert (task["status"], task["claimTTL"]) == ("claimed", 3600)
        else:
            assert task["status"] == "pending", name
            assert not {"failureReason", "claimedBy", "claimTTL"} & task.keys()
            assert (task["retryCount"], task.get("expiryCount", 0)) == (0, 0), "no blame"
    assert 0 < len(taken) < 200
    assert not db.keys(f"{ROOT}:assigned:*")
    found = (await mq.doctor(queue, project="p"))["findings"]
    assert [one for one in found if "append-only" not in one] == []


# ---- files ----


def configured(tmp_path: Path, server: Server, text: str) -> mq.Config:
    path = tmp_path / "queue.yaml"
    path.write_text(f"redis: {{url: {server.url}}}\nproject: p\n{text}")
    return mq.load_config(str(path), environ={}, start=tmp_path)


async def test_the_files_of_the_configuration_are_kept_in_step(
    tmp_path: Path, server: Server, queue: mq.Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    head = "| id | status | description |\n|---|---|---|\n"
    one, two = tmp_path / "TASKS.md", tmp_path / "other.md"
    one.write_text(head + "| A | not-started | do A |\n")
    files = "files:\n  - TASKS.md\n  - {path: other.md, project: q, mission: m2}\n"
    config = configured(tmp_path, server, files)
    watched = mq.Queue(config)
    task = asyncio.create_task(mq.watch_all(watched, only=["files"]))
    try:

        async def status(name: str) -> str:
            with contextlib.suppress(mq.Refused):
                return (await queue.get(name))["status"]
            return ""

        async def comes_true(true: Callable[[], Any]) -> None:
            give_up = time.monotonic() + 60
            while not await true():
                assert time.monotonic() < give_up
                assert not task.done(), task
                await asyncio.sleep(0.05)

        async def is_pending() -> bool:
            return await status("p/A") == "pending"

        await comes_true(is_pending)
        await queue.claim("A", "al", project="p")
        await queue.complete("A", project="p")

        async def is_done() -> bool:
            return "| A | done | do A |" in one.read_text()

        await comes_true(is_done)
        two.write_text(head + "| B | not-started | do B |\n")  # it comes later

        async def has_mission() -> bool:
            with contextlib.suppress(mq.Refused):
                return (await queue.get("q/B"))["mission"] == "m2"
            return False

        await comes_true(has_mission)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await watched.close()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ("files: [3]", "a file is 3; accepted: a path, or path, project, mission"),
        ("files: [{project: p}]", "accepted: a path, or path"),
        ("files: [{path: a, owner: x}]", "accepted: a path, or path"),
    ],
)
def test_files_that_cannot_be_meant(tmp_path: Path, server: Server, files: str, said: str) -> None:
    config = configured(tmp_path, server, files)
    with pytest.raises(mq.ConfigError, match="accepted") as error:
        list(mq.workspace_files(config))
    assert said in error.value.message


def test_a_repository_names_no_file_outside_of_it(tmp_path: Path) -> None:
    repository = tmp_path / "cloned"
    (repository / ".mosaic").mkdir(parents=True)
    (repository / "out").symlink_to(tmp_path)
    own = tmp_path / ".config/mosaic/queue.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(f"trust: [{repository}]\n")
    local = repository / ".mosaic" / "queue.yaml"
    for name in ("../../etc/passwd", "/etc/passwd", "out/TASKS.md"):
        local.write_text(f"project: p\nfiles: [{name}]\n")
        config = mq.load_config(environ={"HOME": str(tmp_path)}, start=repository)
        with pytest.raises(mq.ConfigError, match="lies outside of"):
            list(mq.workspace_files(config))
    local.write_text("project: p\nfiles: [docs/TASKS.md]\n")
    config = mq.load_config(environ={"HOME": str(tmp_path)}, start=repository)
    (given,) = mq.workspace_files(config)
    assert given["path"] == repository / "docs/TASKS.md"


async def test_the_monitor_watches_all_projects_whatever_is_configured(
    start: Start, queue: mq.Queue
) -> None:
    """Also where a flag names one."""
    for project in ("p", "other"):
        await queue.create(project, "m", "A", title="a")
        await queue.claim("A", "al", project=project, ttl=1)
    start("--project", "p")

    async def all_pending() -> bool:
        tasks = (await queue.list())["tasks"]
        return [task["status"] for task in tasks] == ["pending", "pending"]

    await until(all_pending)


async def test_status_says_who_leads(start: Start, queue: mq.Queue, db: redis.Redis) -> None:
    """Which version, on which host, with which parts; and that nobody does, or it is hidden."""
    await queue.create("p", "m", "A", title="a")
    assert (await mq.status(queue))["leaders"] == []
    assert "no monitor runs: a lease that ran out" in mq.status_text(await mq.status(queue))
    assert (await mq.doctor(queue))["leaders"] == []
    one = start()
    await until(lambda: one.told("lead"))
    answer = await mq.status(queue)
    assert answer["leaders"] == [{
        "part": "watchdog", "host": socket.gethostname(), "process": one.process.pid,
        "version": mq.__version__, "parts": ["watchdog"],
    }]  # fmt: skip
    assert f"version {mq.__version__}, with watchdog" in mq.status_text(answer)
    assert (await mq.doctor(queue))["leaders"] == answer["leaders"]
    db.set(f"{mq.LEADER}:postgres", "of:an:older:12:ff")
    db.set(f"{mq.LEADER}:manifests", "nonsense")
    found = (await mq.status(queue))["leaders"]
    assert found[1:] == [{"part": "postgres", "host": "of:an:older", "process": 12}]
    db.delete(mq.LEADER)
    db.sadd(mq.LEADER, "x")
    assert "leaders" not in await mq.status(queue)
