"""The server carries a call out, and its answer never comes.

A proxy on a socket of its own stands between the queue and a real server.  It lets the chosen
script through, waits for the reply, and either closes the connection or keeps silent until the
caller's patience ends, which is at once, so that no test waits for it or depends on how long it
is.  The call is sent again with the same op id; a twin project in which
nothing was lost says what one execution looks like.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import Server, Shim, key_space
from invariants import problems

import mosaic_queue as mq

pytestmark = pytest.mark.anyio

Act = Callable[[], Awaitable[Any]]


class Proxy:
    """A socket that leads to the server; `lose` arms it for the next reply to a script."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.socket = server, folder / "proxy"
        self.lost = 0
        self.wires: list[mq.Wire] = []  # whose patience may be made to end
        self.sha, self.silent, self.meanwhile = b"", False, None

    def lose(self, name: str, mode: str, meanwhile: Act | None = None) -> None:
        """Lose the next answer of the script `name`; before the caller may notice, something
        else happens `meanwhile`."""
        self.sha, self.silent = mq.script(name).sha.encode(), mode == "silent"
        self.meanwhile = meanwhile

    async def __aenter__(self) -> Proxy:
        self.listener = await asyncio.start_unix_server(self.connected, str(self.socket))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.listener.close()
        await self.listener.wait_closed()

    async def connected(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        replies, server = await asyncio.open_unix_connection(str(self.server.socket))
        chosen = False

        async def commands() -> None:
            nonlocal chosen
            while data := await client.read(1 << 20):
                # EVAL carries the text instead of the hash; nobody else uses it here.
                if self.sha and (self.sha in data or b"\r\nEVAL\r\n" in data):
                    chosen = True
                server.write(data)

        async def answers() -> None:
            nonlocal chosen
            while data := await replies.read(1 << 20):
                if not chosen or data.startswith(b"-NOSCRIPT"):
                    chosen = False
                    back.write(data)
                    continue
                self.sha, self.lost = b"", self.lost + 1
                wires = list(self.wires)
                if self.meanwhile:
                    await self.meanwhile()
                if not self.silent:
                    return
                for wire in wires:
                    wire.close(TimeoutError("no answer in time"))
                while await replies.read(1 << 20):
                    pass

        ways = {asyncio.ensure_future(commands()), asyncio.ensure_future(answers())}
        _, open_ways = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in open_ways:
            way.cancel()
        for writer in (server, back):
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@pytest.fixture
async def proxy(
    server: Server, db: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Proxy]:
    async with Proxy(server, tmp_path) as made:
        begin = mq.Wire.__init__

        def note(wire: mq.Wire, patience: float) -> None:
            begin(wire, patience)
            made.wires.append(wire)

        monkeypatch.setattr(mq.Wire, "__init__", note)
        yield made


@pytest.fixture
async def far(proxy: Proxy) -> AsyncIterator[mq.Queue]:
    """A queue whose way to the server leads through the proxy."""
    config = mq.Config(environ={}).set("redis.url", f"unix://{proxy.socket}", "test")
    config.set("project", "p", "test").set("defaults.maxRetries", 5, "test")
    async with mq.Queue(config) as opened:
        yield opened


def told(db: redis.Redis, project: str) -> list[list[str]]:
    """The events of a project: task op from to rev fence agent at text."""
    entries = db.xrange(f"mosaic:queue:project:{{{project}}}:events")
    return [fields["e"].split("\t") for _, fields in entries]


async def create(queue: mq.Queue, project: str, task: str = "T", **more: Any) -> mq.Task:
    return await queue.create(project, "m", task, title="a task", **more)


async def claimed(queue: mq.Queue, project: str) -> None:
    """Task T, held by alice; task U waits for it."""
    await create(queue, project)
    await create(queue, project, "U", dependencies=["T"])
    await queue.claim("T", "alice", project=project, ttl=60, session="s1")


# What comes before, the script whose answer is lost, the call, and by how much it raises rev.
Case = tuple[Any, str, Callable[..., Awaitable[Any]], int]
BATCH: list[Any] = [
    {"taskId": "B", "mission": "m", "title": "second", "dependencies": ["A"]},
    {"taskId": "A", "mission": "m", "title": "first"},
    {"taskId": "C", "mission": "m", "title": "third", "priority": "low"},
]
ALICE = {"agent": "alice", "session": "s1"}
CASES: dict[str, Case] = {
    "create": (None, "create", lambda q, p, **o: create(q, p, **o), 1),
    "create_all": (None, "create", lambda q, p, **o: q.create_all(BATCH, project=p, **o), 3),
    "claim": (create, "claim", lambda q, p, **o: q.claim("T", "bob", project=p, **o), 1),
    "start": (claimed, "start", lambda q, p, **o: q.start("T", project=p, **o), 1),
    "heartbeat": (
        claimed, "heartbeat",
        lambda q, p, **o: q.heartbeat("T", project=p, progress="half", checkpoint="c", **o), 1,
    ),
    "release": (claimed, "release", lambda q, p, **o: q.release("T", project=p, **o), 1),
    "release with delay, named": (
        claimed, "release", lambda q, p, **o: q.release("T", project=p, delay=9, **ALICE, **o), 1,
    ),
    "complete": (
        claimed, "complete", lambda q, p, **o: q.complete("T", project=p, summary="done", **o), 2,
    ),
    "complete, named": (
        claimed, "complete", lambda q, p, **o: q.complete("T", project=p, **ALICE, **o), 2,
    ),
    "complete by force": (
        create, "complete", lambda q, p, **o: q.complete("T", project=p, force=True, **o), 1,
    ),
    "fail": (
        claimed, "fail", lambda q, p, **o: q.fail("T", project=p, reason="no", delay=0, **o), 1,
    ),
    "fail for good": (
        claimed, "fail",
        lambda q, p, **o: q.fail("T", project=p, reason="no", retry=False, **ALICE, **o), 1,
    ),
    "delete": (
        claimed, "delete", lambda q, p, **o: q.delete("T", project=p, force=True, **o), 2,
    ),
    "reap": (claimed, "reap", lambda q, p: q.reap(project=p), 1),
    "policy": (claimed, "policy", lambda q, p: q.policy(project=p, apply=True), 0),
}  # fmt: skip
NAMED = [name for name in CASES if name not in ("reap", "policy")]


@pytest.mark.parametrize("mode", ["closed", "silent"])
@pytest.mark.parametrize("name", CASES)
async def test_executed_once(
    name: str, mode: str, far: mq.Queue, queue: mq.Queue, proxy: Proxy, db: redis.Redis, shim: Shim
) -> None:
    """One change and one event; the second answer tells what the first execution did."""
    before, script, call, raised = CASES[name]
    queue.config.set("defaults.maxRetries", 5, "test")
    for project in ("p", "q"):
        if before:
            await before(queue, project)
    shim.seconds = 100 if name == "reap" else 0
    count = len(told(db, "p"))

    proxy.lose(script, mode)
    answer = await call(far, "p")
    expected = await call(queue, "q")

    assert proxy.lost == 1
    new, twin = told(db, "p")[count:], told(db, "q")[count:]
    assert len(new) == raised
    assert [event[:5] for event in new] == [event[:5] for event in twin]
    assert db.hget("mosaic:queue:project:{p}", "rev") == str(count + raised)
    for project in ("p", "q"):
        assert problems(db, project) == []
    if name in NAMED:
        rows = zip(answer, expected, strict=True) if name == "create_all" else [(answer, expected)]
        events = {event[0]: event for event in new}
        for got, wanted in rows:
            _, _, _, _, rev, fence, *_ = events[got["taskId"]]
            same = ("taskId", "status", "rev", "priority", "claimedBy", "progress", "failureReason")
            assert {k: got.get(k) for k in same if k in wanted} == {
                k: wanted[k] for k in same if k in wanted
            }
            assert got["rev"] == int(rev)
            assert "fence" not in got or not fence or got["fence"] == int(fence)
            assert name == "delete" or "superseded" not in got


async def test_lost_answer_of_eval(far: mq.Queue, proxy: Proxy, db: redis.Redis) -> None:
    """A server that does not know the script is sent its text; that answer may be lost too."""
    await create(far, "p")
    db.script_flush()
    proxy.lose("claim", "closed")
    task = await far.claim("T", "alice", op="op-1")
    assert proxy.lost == 1
    (event,) = told(db, "p")[1:]
    assert (task["claimedBy"], task["fence"], task["rev"]) == ("alice", int(event[5]), 2)


async def test_silence_lasts_for_a_third_of_the_deadline(
    far: mq.Queue, proxy: Proxy, db: redis.Redis
) -> None:
    """Here nobody ends the caller's patience but the caller."""
    far.link.deadline = 6
    await create(far, "p")
    proxy.wires.clear()
    proxy.lose("claim", "silent")
    began = time.monotonic()
    assert (await far.claim("T", "alice"))["claimedBy"] == "alice"
    assert time.monotonic() - began >= 2
    assert (proxy.lost, len(told(db, "p"))) == (1, 2)


# ---- the same op id, other arguments ----

OTHERS: dict[str, Callable[..., Awaitable[Any]]] = {
    "create": lambda q, p, **o: q.create(p, "m", "T", title="another", **o),
    "create_all": lambda q, p, **o: q.create_all([BATCH[1]], project=p, **o),
    "claim": lambda q, p, **o: q.claim("T", "carol", project=p, **o),
    "start": lambda q, p, **o: q.start("T", project=p, force=True, **o),
    "heartbeat": lambda q, p, **o: q.heartbeat("T", project=p, progress="most", **o),
    "release": lambda q, p, **o: q.release("T", project=p, delay=1, **o),
    "complete": lambda q, p, **o: q.complete("T", project=p, summary="other", **o),
    "fail": lambda q, p, **o: q.fail("T", project=p, reason="other", retry_delay=0, **o),
    "delete": lambda q, p, **o: q.delete("T", project=p, **o),
}


@pytest.mark.parametrize("name", OTHERS)
async def test_op_id_used_for_another_call(
    name: str, queue: mq.Queue, server: Server, db: redis.Redis
) -> None:
    """It is refused, whatever the task is by now, and nothing changes."""
    before, _, call, _ = CASES[name]
    if before:
        await before(queue, "p")
    await call(queue, "p", op="op-1")
    was = key_space(server)
    with pytest.raises(mq.Refused) as refused:
        await OTHERS[name](queue, "p", op="op-1")
    assert refused.value.code == "OP_REUSED"
    assert key_space(server) == was


@pytest.mark.parametrize("name", OTHERS)
async def test_repeat_changes_nothing(
    name: str, queue: mq.Queue, server: Server, db: redis.Redis
) -> None:
    """A repeat finds what the first call did, and not a byte of the key space moves."""
    before, _, call, _ = CASES[name]
    if before:
        await before(queue, "p")
    await call(queue, "p", op="op-1")
    was = key_space(server)
    await call(queue, "p", op="op-1")
    assert key_space(server) == was


# ---- meanwhile ----


@pytest.mark.parametrize("mode", ["closed", "silent"])
async def test_claim_lost_and_taken_over(
    mode: str, far: mq.Queue, queue: mq.Queue, proxy: Proxy, db: redis.Redis
) -> None:
    """Alice never heard that she had the task; when she asks again it is bob's, and she is told."""
    await create(queue, "p")

    async def taken_over() -> None:
        await queue.release("T", reason="no sign of life")
        await queue.claim("T", "bob")

    proxy.lose("claim", mode, taken_over)
    answer = await far.claim("T", "alice")
    task = await queue.get("T")
    assert answer["superseded"]
    assert answer["claimedBy"] == task["claimedBy"] == "bob"
    assert answer["fence"] < task["fence"]
    assert [event[1] for event in told(db, "p")] == ["create", "claim", "release", "claim"]


@pytest.mark.parametrize("end", ["release", "complete", "fail", "delete"])
async def test_anonymous_end_lost_and_taken_over(
    end: str, far: mq.Queue, queue: mq.Queue, proxy: Proxy, db: redis.Redis
) -> None:
    """Whoever acts for "whoever holds it" ends one claim.  When the answer is lost and bob has
    taken the task up since, the call that is sent again must leave bob's claim alone."""
    await claimed(queue, "p")

    async def taken_over() -> None:
        if end == "complete":
            # Until a completed task can be opened again: a new one of the same name.
            await queue.delete("T", force=True)
        if end in ("complete", "delete"):
            await create(queue, "p")
        await queue.claim("T", "bob")

    proxy.lose(end, "closed", taken_over)
    with contextlib.suppress(mq.Refused):
        answer = await CASES[end][2](far, "p")
        assert end == "delete" or answer["superseded"]
    task = await queue.get("T")
    assert (task["status"], task["claimedBy"]) == ("claimed", "bob")
    assert told(db, "p")[-1][1] == "claim"


@pytest.mark.parametrize("end", ["release", "complete", "fail"])
async def test_named_end_lost_and_taken_over(
    end: str, far: mq.Queue, queue: mq.Queue, proxy: Proxy, db: redis.Redis
) -> None:
    """The same for a holder who names herself and her session."""
    await create(queue, "p")
    await queue.claim("T", "alice", session="s1")

    async def taken_over() -> None:
        if end == "complete":
            await queue.delete("T", force=True)
            await create(queue, "p")
        await queue.claim("T", "bob")

    proxy.lose(end, "closed", taken_over)
    more = {"reason": "no", "delay": 0} if end == "fail" else {}
    with contextlib.suppress(mq.Refused):
        await getattr(far, end)("T", **ALICE, **more)
    task = await queue.get("T")
    assert (task["status"], task["claimedBy"]) == ("claimed", "bob")
    assert told(db, "p")[-1][1] == "claim"


@pytest.mark.parametrize("end", ["release", "fail"])
async def test_end_lost_and_claimed_again_by_the_same(
    end: str, far: mq.Queue, queue: mq.Queue, proxy: Proxy, db: redis.Redis
) -> None:
    """Sub-agents of one client share a name and a session.  When one gives the task back and
    another takes it, the first call, sent again, must not end the second's claim."""
    await create(queue, "p")
    await queue.claim("T", **ALICE)

    async def taken_over() -> None:
        await queue.claim("T", **ALICE)

    proxy.lose(end, "closed", taken_over)
    more = {"reason": "no", "delay": 0} if end == "fail" else {}
    with contextlib.suppress(mq.Refused):
        await getattr(far, end)("T", **ALICE, **more)
    assert (await queue.get("T"))["status"] == "claimed"
    assert told(db, "p")[-1][1] == "claim"


@pytest.mark.parametrize("name", ["start", "heartbeat", "release", "complete", "fail", "block"])
async def test_what_others_do_meanwhile_hides_no_receipt(
    name: str, far: mq.Queue, queue: mq.Queue, proxy: Proxy, db: redis.Redis
) -> None:
    """Somebody leaves a note, or takes what was given back and begins with it: whoever sends her
    call again is told that it was carried out, and it is not carried out twice."""
    await create(queue, "p")
    await far.claim("T", "alice")

    async def others() -> None:
        await queue.note("T", "seen")
        if name in ("release", "fail"):
            await queue.claim("T", "bob")
            await queue.start("T", agent="bob")

    proxy.lose(name, "closed", others)
    more: dict[str, dict[str, Any]] = {"fail": {"reason": "no", "delay": 0, "retry_delay": 0}}
    more |= {"heartbeat": {"progress": "half"}, "block": {"reason": "ask"}}
    answer = await getattr(far, name)("T", agent="alice", **more.get(name, {}))
    own = [event for event in told(db, "p") if event[6] == "alice" and event[1] != "claim"]
    assert [int(event[4]) for event in own] == [answer["rev"]]


@pytest.mark.parametrize("name", ["create", "create_all"])
async def test_create_lost_and_claimed_at_once(
    name: str, far: mq.Queue, queue: mq.Queue, proxy: Proxy, db: redis.Redis
) -> None:
    """An agent that waits for work is faster than the creator's second try, who is nevertheless
    told that the tasks are there, not that somebody else made them."""
    task = "T" if name == "create" else "A"

    async def claimed_at_once() -> None:
        await queue.claim(task, "bob")
        await queue.start(task, agent="bob")

    proxy.lose("create", "closed", claimed_at_once)
    answer = await CASES[name][2](far, "p")
    created = [answer] if name == "create" else answer
    assert {one["taskId"]: one["rev"] for one in created} == {
        event[0]: int(event[4]) for event in told(db, "p") if event[1] == "create"
    }
    assert (await queue.get(task))["claimedBy"] == "bob"


async def test_claim_lost_and_released(
    far: mq.Queue, queue: mq.Queue, proxy: Proxy, db: redis.Redis
) -> None:
    """A claim that an operator ended before its answer came is no claim: alice is told so."""
    await create(queue, "p")

    async def released() -> None:
        await queue.release("T", force=True)

    proxy.lose("claim", "closed", released)
    answer = await far.claim("T", "alice")
    assert answer["superseded"]
    assert answer["status"] == (await queue.get("T"))["status"] == "pending"


async def test_next_lost_and_taken_over(
    far: mq.Queue, queue: mq.Queue, proxy: Proxy, db: redis.Redis
) -> None:
    """Whoever wants something to do is given another task, not one that is somebody else's."""
    for task in ("T", "U"):
        await create(queue, "p", task)

    async def taken_over() -> None:
        await queue.release("T", force=True)
        await queue.claim("T", "bob")

    proxy.lose("next", "closed", taken_over)
    (task,) = (await far.next("alice"))["tasks"]
    assert (task["taskId"], task["claimedBy"]) == ("U", "alice")
    assert (await queue.get("T"))["claimedBy"] == "bob"
