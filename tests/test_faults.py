"""The k-th call of every script fails, for every k.

Valkey has no rollback, so what a script wrote before it was cut off stays.  The promise (DESIGN
section 5) is that every such prefix is either invisible or finished, by the same call sent again
or by `reap` without it.  For each scenario and each k:

- nothing written before k: the key space is as it was;
- the same call is sent again: it answers, and after the lease everything is as if nothing had
  happened in between;
- it is never sent again: after the lease every task looks as if the call had been made, or as if
  it had not, and `repair` leaves nothing for `doctor` to find;
- it is sent again and work goes on at once: every task can be brought to its end.

A follower reads along: what it copied when the last event came is what stands in Valkey at the
end, so no change goes without an event after it.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import redis
from conftest import READS, Server, Shim, key_space
from invariants import Project, problems, read_project

import mosaic_queue as mq

pytestmark = pytest.mark.anyio

TTL, EXPIRED, LATER = 60, 100, 10_000  # s: a lease; when it is over; when all leases and delays are
MOST = 200  # calls of a script in these scenarios
Call = Callable[[mq.Queue], Awaitable[Any]]
ROOT = "mosaic:queue:project:{p}"


# ---- scenarios ----


async def create(queue: mq.Queue, task: str, *dependencies: str, **options: Any) -> Any:
    return await queue.create(
        "p", "m", task, title="a task", dependencies=list(dependencies), **options
    )


async def reach(queue: mq.Queue, status: str, shape: str) -> None:
    """Task `T` in a status: `plain`, or `linked` - in a capped lane with another task ready, after
    a dependency, before three tasks that wait for it, two of them for it alone."""
    linked = shape == "linked"
    who = {"session": "s1"} if linked else {}
    options: dict[str, Any] = {"delay": 1000} if status == "delayed" else {}
    before = ["done"] if linked else []
    if linked:
        await create(queue, "done")
        await queue.complete("done", force=True)
        await create(queue, "rival", lane="coding")
        options |= {"lane": "coding", "priority": "high"}
    if status == "blocked":
        await create(queue, "first")
        before.append("first")
    await create(queue, "T", *before, **options)
    if linked:
        for waiter, others in (("W1", []), ("W2", ["rival"]), ("W3", ["done"])):
            await create(queue, waiter, "T", *others)
    if status in ("claimed", "in-progress", "completed", "failed"):
        await queue.claim("T", "alice", ttl=TTL, **who)
    if status == "by-hand":
        await queue.block("T", reason="wait")
    elif status == "assigned":
        await queue.assign("T", agent="alice")
    if status == "in-progress":
        await queue.heartbeat("T", checkpoint="page 3", progress="half", **who)
        await queue.start("T", **who)
    elif status == "completed":
        await queue.complete("T", summary="done", **who)
    elif status == "failed":
        await queue.fail("T", reason="no", retry=False, **who)


@dataclass
class Scenario:
    """What stands there, the call that is cut off, and when it comes (s after the start)."""

    name: str
    status: str
    shape: str
    call: Call
    seconds: int = 0
    extra: Callable[[mq.Queue, Shim], Awaitable[Any]] | None = None
    gone: set[str] = field(default_factory=set)  # tasks that the call takes away
    mixed: bool = False  # cut off, it may have changed some of what it says of a task already
    chooses: bool = False  # sent again, it may choose another task: `T` is back after its lease
    broken: bool = False  # the key space is not sound before

    async def prepare(self, queue: mq.Queue, shim: Shim) -> None:
        await create(queue, "bystander")
        if self.status != "absent":
            await reach(queue, self.status, self.shape)
        if self.extra:
            await self.extra(queue, shim)


async def reap(queue: mq.Queue) -> mq.Reaped:
    """Of the one project: over all, one that cannot be read is passed over, and told."""
    return await queue.reap(project="p")


def scenarios() -> list[Scenario]:
    made: list[Scenario] = []

    def add(
        name: str, statuses: str, call: Call, shapes: str = "plain linked", **more: Any
    ) -> None:
        for status in statuses.split():
            for shape in shapes.split():
                made.append(Scenario(f"{name} {status} {shape}", status, shape, call, **more))

    def vary(name: str, call: Call, **more: Any) -> None:
        """A variation of a holder's call, from each status and in each shape once."""
        add(name, "claimed", call, "plain", **more)
        add(name, "in-progress", call, "linked", **more)

    def by_holder(method: str, **options: Any) -> Call:
        """The call as its holder makes it: in a linked scenario he names his session."""

        async def call(queue: mq.Queue) -> Any:
            return await getattr(queue, method)("T", agent="alice", op="same", **options)

        return call

    held = "claimed in-progress"
    add("create", "absent", lambda q: create(q, "T", op="same"), "plain")
    add("create delayed", "absent", lambda q: create(q, "T", delay=50, op="same"), "plain")
    add("create blocked", "absent", lambda q: create(q, "T", "bystander", op="same"), "plain")
    add("create after", "completed", lambda q: create(q, "N", "T", op="same"))
    add("create before", "blocked", lambda q: create(q, "N", "T", "first", op="same"))
    add("create batch", "absent", batch, "plain")

    add("claim", "pending", lambda q: q.claim("T", "alice", ttl=TTL, op="same"))
    add("claim due", "delayed", lambda q: q.claim("T", "alice", ttl=TTL, op="same"), seconds=2000)
    add(
        "claim again",
        "claimed",
        lambda q: q.claim("T", "bob", ttl=TTL, op="same"),
        seconds=EXPIRED,
        extra=reap_later,
    )
    add("start", "claimed", by_holder("start"))
    add("heartbeat", held, by_holder("heartbeat"))
    vary("heartbeat ttl", by_holder("heartbeat", ttl=2 * TTL))
    vary("progress", by_holder("heartbeat", progress="more", checkpoint="page 4"))
    add("release", held, by_holder("release"))
    vary("release delay", by_holder("release", delay=50))
    add("complete", held, by_holder("complete"))
    vary("complete summary", by_holder("complete", summary="it works"))
    by_hand = by_holder("complete", force=True, summary="by hand")
    add("complete force", "pending blocked", by_hand)
    add("complete force", "delayed failed", by_hand, "plain")
    vary("complete late", by_holder("complete"), seconds=EXPIRED, extra=reap_later)
    add("fail", held, by_holder("fail", reason="broken"))
    vary("fail delay", by_holder("fail", reason="broken", delay=50))
    vary("fail hard", by_holder("fail", reason="broken", retry=False))
    force = by_holder("fail", reason="broken", force=True)
    add("fail force", "pending delayed blocked", force)
    add("fail force", "failed", force, mixed=True)
    hard = by_holder("fail", reason="broken", force=True, retry=False)
    add("fail hard force", "pending delayed", hard, "plain")
    add("fail hard force", "blocked failed", hard, "linked")
    later = {"resume": True, "ttl": 2 * TTL, "op": "same"}
    add("claim resume", "in-progress", lambda q: q.claim("T", "alice", **later), "linked")
    add("claim assigned", "assigned", lambda q: q.claim("T", "alice", ttl=TTL, op="same"))
    add("next", "pending", lambda q: q.next("alice", ttl=TTL, op="same"), chooses=True)
    add("next two", "pending", lambda q: q.next("alice", ttl=TTL, count=2, op="same"), chooses=True)
    add(
        "next due",
        "delayed",
        lambda q: q.next("alice", lane="coding", ttl=TTL, op="same"),
        seconds=2000,
        chooses=True,
    )
    add("next resume", "claimed", lambda q: q.next("alice", **later), "linked", chooses=True)
    add("next assigned", "assigned", lambda q: q.next("alice", ttl=TTL, op="same"), chooses=True)
    add(
        "next stale",
        "pending",
        lambda q: q.next("alice", ttl=TTL, op="same"),
        "plain",
        extra=stale_entries,
        chooses=True,
        broken=True,
    )
    add("assign", "pending", lambda q: q.assign("T", agent="alice", op="same"))
    add(
        "assign best",
        "pending",
        lambda q: q.assign(agent="alice", op="same"),
        "linked",
        chooses=True,
    )
    add("start assigned", "assigned", by_holder("start"))
    add("heartbeat assigned", "assigned", by_holder("heartbeat"))
    add("reap assigned", "assigned", reap, seconds=EXPIRED)
    add("note", "pending", lambda q: q.note("T", "seen", op="same"), "plain")
    add("note", "claimed", lambda q: q.note("T", "seen", op="same"), "linked")

    def update(**options: Any) -> Call:
        return lambda q: q.update("T", op="same", **options)

    texts = update(title="new", description="more", priority="low", mission="n")
    add("update", "pending blocked", texts, "plain", mixed=True)
    add("update", "delayed in-progress", texts, "linked", mixed=True)
    add("update lane", "pending claimed", update(lane="planning"))
    add("update delay", "pending delayed", update(delay=500))
    edges = {"mixed": True, "extra": two_more}
    add("update edges", "pending blocked claimed failed", update(dependencies=["X", "Y"]), **edges)
    add("update no edges", "blocked in-progress", update(dependencies=[]), "linked", **edges)
    block = by_holder("block", reason="stop")
    add("block", "pending claimed", block)
    add("block", "delayed blocked in-progress", block, "linked")
    add("block", "by-hand", block, "plain", mixed=True)
    add("unblock", "by-hand", lambda q: q.unblock("T", op="same"))
    add("redrive", "failed", lambda q: q.redrive("T", op="same"))
    add("redrive delay", "failed", lambda q: q.redrive("T", delay=50, op="same"), "plain")
    add("reopen", "completed", lambda q: q.reopen("T", reason="blank", op="same"))
    add("purge", "completed", lambda q: q.purge(older=0), "plain", gone={"T"}, chooses=True)
    add(
        "purge failed",
        "failed",
        lambda q: q.purge(older=0, status="failed"),
        "plain",
        gone={"T"},
        chooses=True,
    )
    add("pause", "pending", lambda q: q.pause(), "plain")
    add("unpause", "pending", lambda q: q.unpause(), "plain", extra=paused)
    ids = {"ids": "T W1"}
    add(
        "repair",
        "blocked claimed",
        lambda q: q.call("repair", "p", ids),
        "linked",
        extra=damage,
        broken=True,
    )
    vary("reap", reap, seconds=EXPIRED)
    add("reap two", "claimed", reap, seconds=EXPIRED, extra=another_lease)
    add("reap dead", "claimed", reap, seconds=5 * EXPIRED, extra=last_lease)
    add(
        "delete",
        "pending delayed blocked completed failed",
        partial(mq.Queue.delete, task="T", op="same"),
        "plain",
        gone={"T"},
    )
    gone = partial(mq.Queue.delete, task="T", op="same", force=True)
    add("delete force", "pending blocked completed", gone, gone={"T"})
    add("delete force", "delayed claimed", gone, "plain", gone={"T"})
    add("delete force", "failed in-progress", gone, "linked", gone={"T"})
    return made


async def batch(queue: mq.Queue) -> Any:
    """Four tasks in one call, named before what they depend on."""
    new = {"mission": "m", "title": "a task", "lane": "coding"}
    edges = {"B4": ["B2", "B3"], "B3": ["B1"], "B2": ["B1", "bystander"], "B1": []}
    tasks: Any = [new | {"taskId": task, "dependencies": on} for task, on in edges.items()]
    return await queue.create_all(tasks, project="p", op="same")


async def reap_later(queue: mq.Queue, shim: Shim) -> None:
    shim.seconds = EXPIRED
    await queue.reap(project="p")


async def another_lease(queue: mq.Queue, shim: Shim) -> None:
    await create(queue, "U", lane="coding")
    await queue.claim("U", "bob", ttl=TTL)
    await queue.heartbeat("U", checkpoint="page 7")


async def two_more(queue: mq.Queue, shim: Shim) -> None:
    await create(queue, "X")
    await queue.complete("X", force=True)
    await create(queue, "Y")


async def stale_entries(queue: mq.Queue, shim: Shim) -> None:
    """What is in front of `T` among the ready and does not exist."""
    with redis.Redis.from_url(queue.config["redis.url"]) as raw:
        raw.zadd("mosaic:queue:project:{p}:ready:any", {"ghost": 1, "spook": 2})
        raw.sadd("mosaic:queue:project:{p}:assigned:alice", "ghost", "T")


async def paused(queue: mq.Queue, shim: Shim) -> None:
    await queue.pause()


async def damage(queue: mq.Queue, shim: Shim) -> None:
    """Something for `repair`: indexes of `T` and of the tasks around it that are gone."""
    with redis.Redis.from_url(queue.config["redis.url"]) as raw:
        raw.zrem("mosaic:queue:project:{p}:blocked", "T", "W1")
        raw.delete("mosaic:queue:project:{p}:waits:T")
        raw.zadd("mosaic:queue:project:{p}:failed", {"T": 7})


async def last_lease(queue: mq.Queue, shim: Shim) -> None:
    """Two leases of `T` ended, the third is running out: deadLetterAfter is 3."""
    for seconds in (EXPIRED, 2 * EXPIRED):
        shim.seconds = seconds
        await queue.reap(project="p")
        await queue.claim("T", "alice", ttl=TTL)


# ---- the stage: a prepared key space, as often as it is needed ----


class Follower:
    """Copies the tasks that new events name, as a follower of the stream does."""

    def __init__(self, db: redis.Redis) -> None:
        self.db, self.cursor = db, "0-0"
        self.copies: dict[str, Any] = {}

    def read(self) -> None:
        events = self.db.xrange("mosaic:queue:project:{p}:events", f"({self.cursor}")
        now = seen(read_project(self.db, "p")) if events else {}
        for entry, fields in events:
            self.cursor, task = entry, fields["e"].split("\t")[0]
            self.copies[task] = now.get(task)

    def behind(self) -> list[str]:
        now = seen(read_project(self.db, "p"))
        copies = {task: copy for task, copy in self.copies.items() if copy}
        return [
            f"a follower has {task} as {copies.get(task)}, it is {now.get(task)}"
            for task in sorted(now.keys() | copies.keys())
            if now.get(task) != copies.get(task)
        ]


def seen(found: Project) -> dict[str, Any]:
    """What people can see of each task, without the numbers that depend on when it happened.

    A task whose deletion was cut off is as good as gone; a reason is that of a mark in the hash.
    """
    while_held = ("claimedBy", "claimTTL", "session")
    always = ("status", "lane", "priority", "mission", "retryCount", "expiryCount", "late")
    views = {}
    for task, values in found.tasks.items():
        if values["status"] == "deleted":
            continue
        held = values["status"] in ("claimed", "in-progress")
        names = always + (while_held if held else ())
        view = {name: values[name] for name in names if values.get(name)}
        view |= {name: "yes" for name in ("notBefore", "failedAt") if values.get(name)}
        marks = {"failureReason": "failedAt", "blockedReason": "blocked"}
        work = found.of("work").get(task, {}) if values["status"] != "completed" else {}
        view |= {name: text for name, text in work.items() if values.get(marks.get(name, "rev"))}
        if values["status"] == "completed":
            view["summary"] = found.of("summary").get(task)
        views[task] = view | found.of("text").get(task, {})
    return views


@dataclass
class Stage:
    """The prepared key space of a scenario, which can be set up again in one round trip."""

    scenario: Scenario
    queue: mq.Queue
    server: Server
    db: redis.Redis
    shim: Shim

    async def prepare(self) -> None:
        await self.scenario.prepare(self.queue, self.shim)
        with self.server.client(encoding="latin-1") as raw:
            keys = list(raw.scan_iter(count=1000))
            dumped = [(key, max(raw.pttl(key), 0), self.dump(key)) for key in keys]
        self.dumped = dumped
        self.follower = Follower(self.db)

    def dump(self, key: str) -> bytes:
        with self.server.client(decode_responses=False) as raw:
            value = raw.dump(key)
        assert isinstance(value, bytes)
        return value

    def reset(self) -> None:
        pipe = self.db.pipeline(transaction=False)
        pipe.flushall()
        for key, ttl, value in self.dumped:
            pipe.restore(key, ttl, value)
        pipe.execute()
        self.shim.seconds, self.shim.fail_at = self.scenario.seconds, 0
        self.queue.leases.clear()
        self.follower = Follower(self.db)
        self.follower.read()

    async def cut(self, k: int) -> str | None:
        """Make the call with its k-th Valkey call failing: that command, or None if it got by."""
        self.reset()
        self.shim.fail_at, said = k, ""
        try:
            await self.scenario.call(self.queue)
        except mq.Refused as problem:
            said = str(problem)
        self.shim.fail_at = 0
        if not said:
            return None
        self.follower.read()
        found = re.search(r"SHIM call (\d+) (\w+) fails", said)
        assert found, said
        assert int(found[1]) == k
        return found[2]

    async def settle(self) -> None:
        """Turn the clock past every lease and delay, and reap until nothing is left to do."""
        self.shim.seconds = LATER
        for _ in range(10):
            answer = await self.queue.reap(project="p")
            self.follower.read()
            if not answer["reaped"] and not answer["settled"]:
                return
        raise AssertionError("reap finds work forever")

    def seen(self) -> dict[str, Any]:
        return seen(read_project(self.db, "p"))

    def problems(self, unborn: Collection[str] = ()) -> list[str]:
        self.follower.read()
        found = problems(self.db, "p", gaps=1, cut=True, unborn=unborn)
        if self.scenario.mixed:  # the mission that it left, or was to enter, may still list it
            found = [one for one in found if not one.startswith("mission has")]
        return found + self.follower.behind()

    async def drain(self) -> None:
        """Bring every task to its end, as agents and a person would."""
        for _ in range(10):
            statuses = {task: view["status"] for task, view in self.seen().items()}
            self.follower.read()
            if set(statuses.values()) <= {"completed"}:
                break
            for task, status in statuses.items():
                if status == "pending":
                    try:
                        await self.queue.claim(task, "carol")
                    except mq.Refused as problem:
                        if problem.code != "NOT_DUE":
                            raise
                    else:
                        await self.queue.complete(task, agent="carol")
                elif status in ("claimed", "in-progress"):
                    await self.queue.complete(task)
                elif status == "failed":
                    await self.queue.complete(task, force=True)
                elif self.blocked_by_hand(task):
                    await self.queue.unblock(task)

    def blocked_by_hand(self, task: str) -> bool:
        return bool(self.db.hget(f"mosaic:queue:project:{{p}}:task:{task}", "blocked"))

    def unended(self) -> list[str]:
        return [
            f"{task} is {view['status']} and cannot be brought to its end"
            for task, view in self.seen().items()
            if view["status"] != "completed"
        ]


@pytest.fixture
async def stage(
    config: mq.Config, server: Server, db: redis.Redis, shim: Shim, request: pytest.FixtureRequest
) -> AsyncIterator[Stage]:
    config.set("lanes.coding.maxConcurrent", 2, "test")
    scenario = request.param
    session = "s1" if scenario.shape == "linked" else None
    async with mq.Queue(config, session=session) as queue:
        made = Stage(scenario, queue, server, db, shim)
        await made.prepare()
        yield made


# ---- the tests ----

POINTS: dict[tuple[str, str], int] = {}  # (binary, scenario) -> points after the first write
SCENARIOS = scenarios()


@pytest.mark.parametrize("stage", SCENARIOS, indirect=True, ids=lambda scenario: scenario.name)
async def test_every_prefix_is_invisible_or_finished(stage: Stage) -> None:
    stage.reset()
    start = key_space(stage.server)
    tasks = set(stage.seen())
    assert stage.scenario.broken or problems(stage.db, "p") == []
    await stage.settle()
    not_made = stage.seen()
    stage.reset()
    await stage.scenario.call(stage.queue)
    done = stage.seen()
    await stage.settle()
    made = stage.seen()
    assert stage.problems() == []

    expected = Expected(tasks, not_made, done, made)
    points, wrote = 0, False
    found: dict[str, list[str]] = {}  # what is wrong -> the calls whose failure led to it
    for k in range(1, MOST):
        command = await stage.cut(k)
        if command is None:
            break
        if not wrote:
            assert key_space(stage.server) == start, f"call {k}, {command}"
        else:
            points += 1
            ways = (sent_again, left_alone, worked_on)
            lives = "T" in made and "T" in not_made and k % 4 == 0
            for way in ways if lives else ways[:2]:
                if way is not sent_again:
                    await stage.cut(k)
                for told in await way(stage, expected):
                    found.setdefault(f"{way.__name__}: {told}", []).append(f"{k} {command}")
        wrote = wrote or command not in READS
    else:
        pytest.fail("the script makes more calls than expected")
    POINTS[stage.server.binary, stage.scenario.name] = points
    told = [f"calls {', '.join(calls)}: {what}" for what, calls in found.items()]
    assert not found, f"{len(found)} problems at {points} points\n" + "\n".join(told)
    assert wrote, "the call writes"


@dataclass
class Expected:
    """What the scenario leads to without a fault; `made` and `not_made` with its leases over."""

    tasks: set[str]
    not_made: dict[str, Any]
    done: dict[str, Any]
    made: dict[str, Any]


async def sent_again(stage: Stage, expected: Expected) -> list[str]:
    """The cut-off call is sent again with its op id: it is as if it had been made once."""
    try:
        answer = await stage.scenario.call(stage.queue)
        stage.follower.read()
        before = stage.seen()
        told = [
            f"{task} is {before.get(task)}, not {expected.done.get(task)}"
            for task in ("T", "N")
            if before.get(task) != expected.done.get(task) and not stage.scenario.chooses
        ]
        await stage.settle()
    except (mq.Refused, redis.ResponseError) as problem:
        return [f"{problem}"]
    if stage.scenario.chooses:
        return (["it gives nothing"] if answer.get("tasks") == [] else []) + stage.problems()
    return told + differences(stage.seen(), expected.made) + stage.problems()


async def worked_on(stage: Stage, expected: Expected) -> list[str]:
    """It is sent again, and work goes on at once, long before a lease ends."""
    try:
        await stage.scenario.call(stage.queue)
        await stage.drain()
        await stage.settle()
        await stage.drain()
    except (mq.Refused, redis.ResponseError) as problem:
        return [f"{problem}"]
    return stage.problems() + stage.unended()


async def left_alone(stage: Stage, expected: Expected) -> list[str]:
    """Nobody sends it again: each task is as before or as after, and work goes on.  What a
    creation left that nobody can see is taken away by `repair`."""
    unborn = {"ghost", "spook", *expected.made} - expected.tasks
    try:
        await stage.settle()
        wanted = (expected.made, expected.not_made)
        told = differences(stage.seen(), *wanted, mixed=stage.scenario.mixed)
        told += stage.problems(unborn) if not stage.scenario.broken else []
        await mq.repair(stage.queue)
        findings = (await mq.doctor(stage.queue))["findings"]
        told += [f"doctor: {one}" for one in findings if one.startswith("p/")]
    except (mq.Refused, redis.ResponseError) as problem:
        return [f"{problem}"]
    lost = expected.tasks - stage.scenario.gone - stage.seen().keys()
    told += stage.problems(unborn)
    return sorted({*told, *(f"lost: {task}" for task in lost)})


async def points_of(stage: Stage) -> AsyncIterator[str]:
    """Each point after the first write of the call, cut off there."""
    wrote = False
    for k in range(1, MOST):
        command = await stage.cut(k)
        if command is None:
            return
        if wrote:
            yield f"{k} {command}"
        wrote = wrote or command not in READS


def differences(has: dict[str, Any], *wanted: dict[str, Any], mixed: bool = False) -> list[str]:
    """Tasks that look as in none of the wanted; if `mixed`, each field as in one of them."""

    def suits(view: dict[str, Any] | None, among: list[dict[str, Any] | None]) -> bool:
        if view in among or not (mixed and view):
            return view in among
        names = set(view).union(*(one or {} for one in among))
        return all(view.get(name) in [(one or {}).get(name) for one in among] for name in names)

    return [
        f"{task} is {has.get(task)}, not " + " or ".join(str(one.get(task)) for one in wanted)
        for task in sorted(set(has).union(*wanted))
        if not suits(has.get(task), [one.get(task) for one in wanted])
    ]


CREATIONS = [one for one in SCENARIOS if one.name.startswith("create ") and one.status == "absent"]
creations = pytest.mark.parametrize(
    "stage", CREATIONS, indirect=True, ids=[scenario.name for scenario in CREATIONS]
)


@creations
async def test_a_creation_that_was_cut_off_is_invisible(stage: Stage) -> None:
    """Of a task without a hash nobody hears, and nothing is refused for its sake."""
    wrong = []
    async for point in points_of(stage):
        found = read_project(stage.db, "p")
        page = await stage.queue.list(project="p")
        if {task["taskId"] for task in page["tasks"]} != found.tasks.keys():
            wrong.append(f"{point}: listed are {page['tasks']}")
        try:
            if not any(map(found.dependencies, found.tasks)):
                await stage.queue.delete("bystander")
        except mq.Refused as problem:
            wrong.append(f"{point}: delete of what it would depend on: {problem}")
    assert not wrong, "\n".join(wrong)


@creations
async def test_a_creation_that_was_cut_off_leaves_the_id_free(stage: Stage) -> None:
    """Another call may create the task otherwise, and nothing of the first shows up but that
    what the first named has the task among its dependents: nothing tells any more that it should
    not."""
    wrong = []
    async for point in points_of(stage):
        found = read_project(stage.db, "p")
        others = {"priority": "low", "lane": "planning", "title": "another"}
        new = {"T", "B1", "B2", "B3", "B4"} - found.tasks.keys()
        for task in new:
            await stage.queue.create("p", "m", task, **others)
        await mq.repair(stage.queue)
        for task in new:
            shown = await stage.queue.get(task)
            wanted = others | {"status": "pending", "dependencies": []}
            if any(shown[name] != value for name, value in wanted.items()):
                wrong.append(f"{point}: {shown}")
        told = [one for one in stage.problems() if not one.startswith("dependents:")]
        wrong += [f"{point}: {problem}" for problem in told]
    assert not wrong, "\n".join(wrong)


@creations
async def test_a_creation_is_repeated_though_its_first_task_moved_on(stage: Stage) -> None:
    """Somebody waited: what exists of a batch is claimed before the call is sent again."""
    wrong = []
    async for point in points_of(stage):
        before = stage.seen()
        for task, view in before.items():
            if view["status"] == "pending" and task != "bystander":
                await stage.queue.claim(task, "carol")
        try:
            await stage.scenario.call(stage.queue)
        except mq.Refused as problem:
            wrong.append(f"{point}: {problem}")
            continue
        wrong += [f"{point}: {problem}" for problem in stage.problems()]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("step", ["begin", "clear", "enter", "settle", "open"])
async def test_a_restore_that_was_cut_off(
    step: str, queue: mq.Queue, db: redis.Redis, shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The k-th call of one of its steps fails: nobody sees the project before it is whole, and the
    same restore begun again ends as one that was never cut off."""
    await reach(queue, "in-progress", "linked")
    meta, found = await queue.records("p", await queue.ids("p"))
    call = queue.call

    cut = 0  # the call of the step that fails

    async def failing(name: str, project: str, arguments: Any, *rest: Any) -> Any:
        shim.fail_at = cut if name == "restore" and arguments["step"] == step else 0
        try:
            return await call(name, project, arguments, *rest)
        finally:
            shim.fail_at = 0

    async def restored() -> bool:
        async def records() -> mq.Records:
            yield list(found.values())

        try:
            await mq.enter_records(queue, "p", meta, records())
        except mq.Refused:
            return False
        return True

    wanted = seen(read_project(db, "p"))
    monkeypatch.setattr(queue, "call", failing)
    for k in range(1, 500):
        db.flushall()
        if step == "clear":
            db.set(f"{ROOT}:text:left", "{}")
        cut = k
        if await restored():
            break
        if not db.hget(ROOT, "limits"):
            for look in (queue.get("T", project="p"), queue.reap(project="p")):
                with pytest.raises(mq.Refused, match="there is no project p"):
                    await look
        cut = 0
        assert await restored(), k
        assert seen(read_project(db, "p")) == wanted, k
        assert problems(db, "p", since=meta["rev"], bells=True) == [], k
    else:
        pytest.fail("the step makes more calls than expected")
    assert k > (20 if step in ("enter", "settle") else 4), "it was cut off at so many points"


async def test_enough_points(server: Server) -> None:
    """When the whole file has run: that the scenarios do reach behind the first writes."""
    counted = [points for (binary, _), points in POINTS.items() if binary == server.binary]
    if len(counted) == len(SCENARIOS):
        assert sum(counted) >= 1500, f"{sum(counted)} points"
