"""Leases that nobody has to think of: an MCP server renews what it was granted.

The servers are real processes on short leases.  After its start a Valkey ends no lease for a
minute, so where a test needs one ended it reaps from this process, behind the shim, which says
that the server has been up for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import BINARIES, FOLDER, PROGRAM, Server, Shim, one_engine, until
from mcp import Client, StdioServerParameters

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
ROOT = "mosaic:queue:project:{p}"


server = one_engine()


@pytest.fixture
def environ(environ: dict[str, str]) -> dict[str, str]:
    return environ | {"MOSAIC_PROJECT": "p", "MOSAIC_AGENT": "alice"}


@pytest.fixture
async def boss(config: mq.Config, shim: Shim) -> AsyncIterator[mq.Queue]:
    """A queue of this process that knows of no grace after a start of the server."""
    async with mq.Queue(config) as queue:
        yield queue


Connect = Callable[..., Client]


@pytest.fixture
def connect(environ: dict[str, str], tmp_path: Path) -> Connect:
    """A client of a new server process, whose claims last `ttl` seconds."""

    def make(ttl: int = 2, setting: str = "pass", **more: str) -> Client:
        (tmp_path / "queue.yaml").write_text(f"defaults: {{mcpTTL: {ttl}}}\n")
        run = f"import sys; sys.path.insert(0, {FOLDER!r}); import mosaic_queue as mq"
        code = f"{run}; {setting}; sys.exit(mq.main())"
        words = ["-c", code, "mcp", "--config", str(tmp_path / "queue.yaml")]
        parameters = StdioServerParameters(
            command=sys.executable, args=words, env=environ | more, cwd=tmp_path
        )
        return Client(parameters, mode="legacy", read_timeout_seconds=60)

    return make


def text_of(result: Any) -> str:
    assert len(result.content) == 1
    return str(result.content[0].text)


async def create(queue: mq.Queue, *names: str, **rest: Any) -> None:
    rows: list[Any] = [
        {"mission": "m", "title": "a task", "taskId": name, **rest} for name in names
    ]
    await queue.create_all(rows, project="p")


async def ends(queue: mq.Queue) -> int:
    """When the lease of T1 ends."""
    return int((await queue.get("T1"))["leaseExpiresAt"])


async def taken(client: Client, **wants: Any) -> dict[str, Any]:
    """The task that `queue_next` hands out, read whole."""
    text = text_of(await client.call_tool("queue_next", wants))
    found = re.search(r"\bp/(T\d+)", text)
    assert found, text
    return dict(json.loads(text_of(await client.call_tool("queue_get", {"task": found[1]}))))


# ---- an agent that thinks ----


async def test_who_thinks_for_several_leases_keeps_its_task(
    connect: Connect, boss: mq.Queue
) -> None:
    """Without any tool call; somebody looks for ended leases all the while."""
    await create(boss, "T1")
    async with connect(ttl=5) as client:
        claim = json.loads(text_of(await client.call_tool("queue_claim", {"task": "T1"})))
        assert claim["claimTTL"] == 5
        much_later = (await boss.get("T1"))["leaseExpiresAt"] + 10_000
        while (lease := (await boss.get("T1"))["leaseExpiresAt"]) < much_later:
            assert (await boss.reap(project="p"))["reaped"] == [], lease
            await asyncio.sleep(0.1)
        done = await client.call_tool("queue_complete", {"task": "T1"})
        assert "late" not in json.loads(text_of(done))
        assert not done.is_error


async def test_next_hands_an_agent_its_whole_task(connect: Connect, boss: mq.Queue) -> None:
    """The instructions say so: description, checkpoint and metadata are what the work needs."""
    await create(boss, "T1", description="all of it", metadata={"a": 1})
    await boss.claim("T1", "bob")
    await boss.heartbeat("T1", agent="bob", checkpoint="at page 3")
    await boss.release("T1", agent="bob")
    async with connect() as client:
        text = text_of(await client.call_tool("queue_next", {}))
        for part in ("p/T1", "all of it", '"a":1', "at page 3"):
            assert part in text, text


async def test_next_tells_an_agent_why_there_is_nothing(connect: Connect, boss: mq.Queue) -> None:
    await create(boss, "T1", delay=90)
    async with connect() as client:
        result = await client.call_tool("queue_next", {})
        assert not result.is_error, "no refusal: an answer"
        assert "nothing is ready; the next task is due at 2" in text_of(result)


async def test_claims_over_stdio_are_short_by_default(
    environ: dict[str, str], tmp_path: Path, boss: mq.Queue
) -> None:
    """300 s, so that a crashed agent's work is back in minutes; `ttl` asks for another."""
    await create(boss, "T1", "T2")
    words = [str(PROGRAM), "mcp"]
    of = StdioServerParameters(command=sys.executable, args=words, env=environ, cwd=tmp_path)
    async with Client(of, mode="legacy", read_timeout_seconds=60) as client:
        claim = await client.call_tool("queue_claim", {"task": "T1"})
        assert json.loads(text_of(claim))["claimTTL"] == 300
        claim = await client.call_tool("queue_claim", {"task": "T2", "ttl": 900})
        assert json.loads(text_of(claim))["claimTTL"] == 900


async def told(client: Client, what: str, tool: str, arguments: dict[str, Any]) -> str:
    """The first result of a tool that says it."""
    give_up = time.monotonic() + 60
    while what not in (said := text_of(await client.call_tool(tool, arguments))):
        assert time.monotonic() < give_up, said
        await asyncio.sleep(0.1)
    return said


async def test_a_lost_lease_is_said_in_the_next_result_of_any_tool(
    connect: Connect, boss: mq.Queue
) -> None:
    await create(boss, "T1", "T2")
    async with connect(ttl=2) as client:
        for name, tool, arguments in (
            ("T1", "queue_status", {}),
            ("T2", "queue_get", {"task": "none"}),
        ):
            await client.call_tool("queue_claim", {"task": name})
            await boss.release(name, force=True)
            await boss.claim(name, "bob")
            said = await told(client, f"you lost p/{name}", tool, arguments)
            assert f"you lost p/{name}" in said.splitlines()[0]
            assert "bob" in said.splitlines()[0]
            again = text_of(await client.call_tool(tool, arguments))
            assert "you lost" not in again, "once is enough"


async def test_who_is_idle_for_too_long_is_renewed_no_more(
    connect: Connect, boss: mq.Queue
) -> None:
    """A window left open over the weekend shall not hold a task until Monday: 4 h, here 1 s."""
    assert mq.IDLE == 4 * 3600
    await create(boss, "T1")
    async with connect(ttl=2, setting="mq.IDLE = 1") as client:
        await client.call_tool("queue_claim", {"task": "T1"})

        async def back() -> bool:
            return (await boss.reap(project="p"))["reaped"] == ["p/T1"]

        await until(back)
        assert (await boss.get("T1"))["status"] == "pending"
        await boss.claim("T1", "bob")
        assert await told(client, "you lost p/T1", "queue_status", {})


async def test_idleness_is_measured_from_the_last_call(config: mq.Config, boss: mq.Queue) -> None:
    """In this process: the hours are an argument."""
    await create(boss, "T1")
    hours = 3.9
    async with mq.Queue(config, session="s") as queue:
        before = (await queue.claim("T1", "alice", ttl=3))["leaseExpiresAt"]
        renewing = asyncio.create_task(mq.renew_leases(queue, lambda: hours * 3600))

        async def renewed() -> bool:
            return bool((await boss.get("T1"))["leaseExpiresAt"] > before)

        await until(renewed)
        hours = 4.1
        after = (await boss.get("T1"))["leaseExpiresAt"]
        await asyncio.sleep(1.5)
        assert (await boss.get("T1"))["leaseExpiresAt"] == after
        renewing.cancel()


async def test_whatever_sets_a_leases_length_sets_its_renewal(
    config: mq.Config, boss: mq.Queue
) -> None:
    await create(boss, "T1", "T2")
    async with mq.Queue(config, session="s") as queue:
        before = (await queue.claim("T1", "alice", ttl=300))["leaseExpiresAt"]
        assert await beat(queue, "T1", ttl=60) >= before, "a heartbeat shortens no lease"
        lease = queue.leases["p/T1"]
        assert (lease.ttl, lease.due <= time.monotonic() + 20) == (60, True)
        await boss.heartbeat("T1", ttl=30)  # somebody else: it is learnt at the next renewal
        await mq.renew(queue, "p/T1")
        assert lease.ttl == 30
        await boss.assign("T2", agent="alice")
        queue.agent, queue.ttl = "alice", 120
        await queue.start("T2")
        assert queue.leases["p/T2"].ttl == 120


async def beat(queue: mq.Queue, name: str, **more: Any) -> int:
    return int((await queue.heartbeat(name, **more))["leaseExpiresAt"])


async def test_a_machine_that_slept_looks_at_its_leases_at_once(
    config: mq.Config, boss: mq.Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Monotonic time stands still meanwhile: by it the next renewal is far away."""
    await create(boss, "T1")
    async with mq.Queue(config, session="s") as queue:
        await queue.claim("T1", "alice", ttl=2700)
        await boss.release("T1", force=True)
        renewing = asyncio.create_task(mq.renew_leases(queue))
        await asyncio.sleep(0.1)
        assert queue.leases
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 3600)

        def lost() -> bool:
            return bool(queue.lost)

        await until(lost)
        renewing.cancel()


async def test_who_names_nobody_acts_as_the_one_who_claimed(
    connect: Connect, boss: mq.Queue
) -> None:
    """Sub-agents of one server: one claims, and does not repeat its name afterwards."""
    await create(boss, "T1", "T2")
    async with connect() as client:
        for name in ("T1", "T2"):
            await client.call_tool("queue_claim", {"task": name, "agent": f"sub-{name}"})
        assert not (await client.call_tool("queue_start", {"task": "T1"})).is_error
        assert not (await client.call_tool("queue_complete", {"task": "T1"})).is_error
        named = {"task": "T2", "agent": "sub-T1"}
        assert (await client.call_tool("queue_complete", named)).is_error
    assert (await boss.get("T1"))["claimedBy"] == "sub-T1"


async def test_what_a_minted_name_holds_is_released_at_the_end(
    connect: Connect, boss: mq.Queue
) -> None:
    """Nobody can come back under it."""
    await create(boss, "T1", "T2")
    async with connect(MOSAIC_AGENT="") as client:
        await client.call_tool("queue_claim", {"task": "T1"})
        await client.call_tool("queue_claim", {"task": "T2", "agent": "sub-1"})
        assert (await boss.get("T1"))["status"] == "claimed"

    async def back() -> bool:
        return (await boss.get("T1"))["status"] == "pending"

    await until(back)
    left = (await boss.list(status="claimed"))["tasks"]
    assert [(one["taskId"], one["orphaned"]) for one in left] == [("T2", True)]
    why = (await mq.explain(boss, "T2"))["why"]
    assert "its session has ended" in " ".join(why)
    holders = (await mq.agents(boss))["agents"]
    assert holders[0]["tasks"][0]["orphaned"]


async def test_a_completion_waits_for_a_server_that_is_away(connect: Connect) -> None:
    """Longer than any other call does, and within the time that a client gives a tool."""
    away = Server(str(BINARIES["valkey"]()), "--appendonly", "yes", "--appendfsync", "always")
    try:
        async with connect(ttl=300, MOSAIC_VALKEY_URL=away.url) as client:
            new = {"mission": "m", "task": "T1", "title": "t"}
            await client.call_tool("queue_create", new)
            await client.call_tool("queue_claim", {"task": "T1"})
            away.kill()
            done = asyncio.create_task(
                client.call_tool("queue_complete", {"task": "T1", "summary": "did"})
            )
            await asyncio.sleep(mq.DEADLINE + 2)
            assert not done.done()
            away.start()
            assert not (await done).is_error
    finally:
        away.close()


# ---- an agent that dies ----

CLIENT = """
import json, subprocess, sys, time
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
def ask(number, method, **params):
    line = json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params})
    server.stdin.write(line.encode() + b"\\n")
    return server.stdout.readline().decode()
hello = {"name": "test", "version": "1"}
ask(0, "initialize", protocolVersion="2025-06-18", capabilities={}, clientInfo=hello)
server.stdin.write(b'{"jsonrpc":"2.0","method":"notifications/initialized"}\\n')
ask(1, "tools/call", name="queue_claim", arguments={"task": "T1", "ttl": 2})
print(server.pid, flush=True)
time.sleep(600)
"""


PATIENT = f"""
import sys
sys.path.insert(0, {FOLDER!r})
import anyio
import mosaic_queue
move_on_after = anyio.move_on_after
anyio.move_on_after = lambda seconds, **more: move_on_after(60, **more)
sys.exit(mosaic_queue.main())
"""


@contextlib.contextmanager
def agent(environ: dict[str, str], folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A client in a process of its own that has claimed T1 for 2 s; it, and its server's pid.
    When the server ends, it has all the time that it needs to say so."""
    words = [sys.executable, "-c", CLIENT, sys.executable, "-c", PATIENT, "mcp"]
    with subprocess.Popen(
        words, env=environ, cwd=folder, text=True, stdout=subprocess.PIPE
    ) as client:
        assert client.stdout
        pid = int(client.stdout.readline())
        try:
            yield client, pid
        finally:
            client.kill()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("both", [False, True], ids=["client", "client and server"])
async def test_a_killed_agents_task_is_back_within_its_lease(
    environ: dict[str, str], tmp_path: Path, boss: mq.Queue, both: bool
) -> None:
    await create(boss, "T1")
    with agent(environ, tmp_path) as (client, pid):
        first = await ends(boss)

        async def renewed() -> bool:
            return await ends(boss) > first

        await until(renewed)
        client.kill()
        if both:
            os.kill(pid, signal.SIGKILL)
        else:
            await until(lambda: orphaned(boss))
        end, tasks = await ends(boss), []
        while not tasks:
            asked = time.time() * 1000
            tasks = (await boss.next("bob"))["tasks"]
            answered = time.time() * 1000
            assert answered >= end if tasks else asked <= end, "it is bob's when the lease is over"
            await asyncio.sleep(0.05)
        assert tasks[0]["taskId"] == "T1"


async def test_the_next_session_of_a_killed_agent_goes_on_at_once(
    environ: dict[str, str], tmp_path: Path, connect: Connect, boss: mq.Queue
) -> None:
    """Its server saw the end of its input and said so: no lease has to run out."""
    await create(boss, "T1", "T2")
    with agent(environ, tmp_path) as (client, _):
        client.kill()
        await until(lambda: orphaned(boss))
        async with connect() as again:
            assert (await taken(again))["id"] == "p/T1"
            assert (await taken(again))["id"] == "p/T2"
            assert not (await again.call_tool("queue_complete", {"task": "T1"})).is_error


@pytest.mark.parametrize("tool", ["queue_next", "queue_claim", "queue_complete"])
async def test_the_next_session_on_this_host_knows_a_killed_one(
    environ: dict[str, str], tmp_path: Path, connect: Connect, boss: mq.Queue, tool: str
) -> None:
    """It could not say that it ends; its process is gone, and its lease has long to run."""
    await create(boss, "T1", "T2")
    with agent(environ, tmp_path) as (client, pid):
        client.kill()
        os.kill(pid, signal.SIGKILL)
        await boss.heartbeat("T1", ttl=3000)
        async with connect() as again:
            arguments = {} if tool == "queue_next" else {"task": "T1"}
            said = await again.call_tool(tool, arguments)
            if tool == "queue_complete":
                assert text_of(said).startswith("STALE_SESSION: ")
                call = text_of(said).rpartition(": queue_claim ")[2]
                said = await again.call_tool("queue_claim", json.loads(call))
            assert json.loads(text_of(said))["id"] == "p/T1"
            assert not (await again.call_tool("queue_complete", {"task": "T1"})).is_error


def orphaned(queue: mq.Queue) -> bool:
    """Whether a session has said that it ends."""
    with redis.Redis.from_url(queue.config["redis.url"], decode_responses=True) as client:
        return client.hget(f"{ROOT}:task:T1", "orphaned") == "1"


async def test_a_session_that_slept_is_refused(
    tmp_path: Path, connect: Connect, boss: mq.Queue
) -> None:
    """A laptop that was closed: what it wakes up with is another session's by now."""
    await create(boss, "T1")
    note_pid = "import os, pathlib; pathlib.Path('pid').write_text(str(os.getpid()))"
    async with connect(ttl=3, setting=note_pid) as old, connect(ttl=60) as new:
        pid = int((tmp_path / "pid").read_text())
        assert (await taken(old))["id"] == "p/T1"
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(2.2)
            assert (await taken(new))["id"] == "p/T1"
        finally:
            os.kill(pid, signal.SIGCONT)
        refused = await old.call_tool("queue_complete", {"task": "T1"})
        assert refused.is_error
        assert "STALE_" in text_of(refused)
        assert not (await new.call_tool("queue_complete", {"task": "T1"})).is_error


async def test_work_that_comes_late_is_accepted_while_nobody_took_it_up(
    config: mq.Config, boss: mq.Queue, shim: Shim
) -> None:
    await create(boss, "T1", "T2")
    async with mq.Queue(config, session="s1") as queue:
        await queue.claim("T1", "alice", ttl=10)
        await queue.claim("T2", "alice", ttl=10)
        shim.seconds = 11
        assert (await boss.reap(project="p"))["reaped"] == ["p/T1", "p/T2"]
        late = await queue.complete("T1", agent="alice", summary="done")
        assert (late["status"], late.get("late")) == ("completed", True)
        await boss.claim("T2", "bob")
        with pytest.raises(mq.Refused) as refused:
            await queue.complete("T2", agent="alice")
        assert refused.value.code == "NOT_OWNER"
    assert (await boss.get("T1"))["summary"] == "done"


# ---- many calls at once ----


async def test_two_sub_agents_that_ask_at_once_get_two_tasks(
    connect: Connect, boss: mq.Queue
) -> None:
    await create(boss, "T1", "T2", "T3", "T4")
    async with connect() as client:
        got = await asyncio.gather(*(taken(client) for _ in range(4)))
        assert {task["id"][2:] for task in got} == {"T1", "T2", "T3", "T4"}
        assert len({task["fence"] for task in got}) == 4


async def test_two_sub_agents_that_wait_get_two_tasks(connect: Connect, boss: mq.Queue) -> None:
    await create(boss, "T0")
    async with connect() as client:
        await taken(client)
        waiting = [asyncio.create_task(taken(client, wait=20)) for _ in range(2)]
        await asyncio.sleep(0.5)
        await create(boss, "T1", "T2")
        got = await asyncio.wait_for(asyncio.gather(*waiting), 8)  # unwoken, they look after 10
        assert {task["id"][2:] for task in got} == {"T1", "T2"}


class Wire:
    """A server's pipes, for cancelling at a moment of our own choice."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.rest = process, b""

    def send(self, method: str, number: int | None = None, **params: Any) -> None:
        assert self.process.stdin
        message: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": params}
        if number is not None:
            message["id"] = number
        self.process.stdin.write(json.dumps(message).encode() + b"\n")

    def receive(self, limit: float) -> Any:
        """The next message, or None when none comes in time."""
        assert self.process.stdout
        give_up = time.monotonic() + limit
        while b"\n" not in self.rest:
            left = max(0, give_up - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                return None
            self.rest += os.read(self.process.stdout.fileno(), 65536)
        line, _, self.rest = self.rest.partition(b"\n")
        return json.loads(line)

    def answer(self, number: int) -> Any:
        while (message := self.receive(60)).get("id") != number:
            pass
        return message


@pytest.fixture
def wire(environ: dict[str, str], tmp_path: Path) -> Iterator[Wire]:
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), "mcp"], env=environ, cwd=tmp_path, bufsize=0,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        opened = Wire(process)
        hello = {"name": "test", "version": "1"}
        opened.send(
            "initialize", 0, protocolVersion="2025-06-18", capabilities={}, clientInfo=hello
        )
        opened.answer(0)
        opened.send("notifications/initialized")
        yield opened
        process.kill()


def handed_out(name: str, number: int, answers: list[Any]) -> bool:
    """Whether the answer to this request is among them and hands out the task."""
    return any(one["id"] == number and name in json.dumps(one) for one in answers)


def pause(seconds: float) -> None:
    over = time.monotonic() + seconds
    while time.monotonic() < over:
        pass


async def test_a_cancelled_next_leaves_nothing_claimed(
    wire: Wire, boss: mq.Queue, db: redis.Redis
) -> None:
    """At 200 random moments, half of them while it waits and a task comes: what the client was
    not told of, nobody holds.  They come sooner after each that was too late, and later else."""
    await create(boss, "later", delay=604800)
    rng, told, most = random.Random(5), 0, [0.008, 0.008]
    for n in range(200):
        name, number = f"T{n}", 10 + n
        if n % 2:
            await create(boss, name)
        call = {"name": "queue_next", "arguments": {"wait": 20}}
        wire.send("tools/call", number, **call)
        pause(rng.uniform(0, most[n % 2]))
        if not n % 2:
            await create(boss, name)
            pause(rng.uniform(0, most[n % 2]))
        wire.send("notifications/cancelled", requestId=number)
        wire.send("tools/call", 1000 + n, name="queue_list", arguments={"status": "claimed"})
        answers = []
        while not answers or answers[-1]["id"] != 1000 + n:
            answers.append(wire.receive(60))
        give_up = time.monotonic() + 60
        while not (handed := handed_out(name, number, answers)):
            late = wire.receive(0.005)
            answers += [late] if late else []
            if not late and not db.exists(f"{ROOT}:running:any"):
                break
            assert time.monotonic() < give_up, "it is claimed, and nobody was told"
        told += handed
        most[n % 2] *= 0.8 if handed else 1.25
        await boss.delete(name, force=True)
    assert told < 190, "hardly anything was cut off: no test"


async def test_a_wait_of_more_than_25_s_is_refused(connect: Connect, boss: mq.Queue) -> None:
    """Clients give up on a tool after a minute, and then nobody would know who holds what."""
    await create(boss, "T1")
    async with connect() as client:
        refused = await client.call_tool("queue_next", {"wait": 26})
        assert refused.is_error
        assert "0 to 25" in text_of(refused)


async def test_agents_shows_all_to_whoever_asks(config: mq.Config) -> None:
    async with mq.Queue(config.set("agent", "alice", "test")) as queue:
        await create(queue, "T1")
        await queue.claim("T1", "bob")
        assert [one["agent"] for one in (await mq.agents(queue))["agents"]] == ["bob"]
        assert "T1 of bob" in (await mq.explain(queue, lane="any"))["why"][0]
