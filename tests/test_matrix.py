"""Every operation from every status, as one table; and who may do it to a held task.

A cell is the status afterwards, `-` for a task that is gone or never was, or the code of the
refusal.  A refusal leaves every byte of the key space as it was, receipts included; whatever
happens, the key space is sound afterwards.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import redis
from conftest import Server, Shim, key_space
from invariants import problems

import mosaic_queue as mq

pytestmark = pytest.mark.anyio

TTL, LATER = 60, 100  # s: a lease, and a time when it is over


@pytest.fixture
async def queue(config: mq.Config, shim: Shim) -> AsyncIterator[mq.Queue]:
    """A queue whose project has one task `other` that nothing depends on and few are offered."""
    async with mq.Queue(config) as opened:
        await create(opened, "other", lane="planning")
        yield opened


async def create(queue: mq.Queue, task: str, **options: Any) -> Any:
    return await queue.create("p", "m", task, title="a task", **options)


async def fate(db: redis.Redis) -> str:
    """The status of `T`, as its hash says."""
    return db.hget("mosaic:queue:project:{p}:task:T", "status") or "-"


def sound(db: redis.Redis, shim: Shim) -> list[str]:
    turned = shim.seconds > 0
    now = int((time.time() + shim.seconds) * 1000)
    return problems(db, "p", now, locks=not turned, bells=True)


async def refusal_of(call: Any) -> mq.Refused:
    with pytest.raises(mq.Refused) as caught:
        await call
    return caught.value


async def refused(server: Server, call: Any) -> str:
    """The code of a refusal that changed nothing."""
    before = key_space(server)
    said = await refusal_of(call)
    assert key_space(server) == before
    assert said.message
    return said.code


# ---- the matrix ----


async def reach(queue: mq.Queue, status: str) -> None:
    """Bring task `T` into a status."""
    if status == "absent":
        return
    options: dict[str, Any] = {"delayed": {"delay": 1000}, "blocked": {"dependencies": ["other"]}}
    await create(queue, "T", **options.get(status, {}))
    if status in ("claimed", "in-progress", "completed", "failed"):
        await queue.claim("T", "alice", ttl=TTL)
    if status == "by hand":
        await queue.block("T", reason="wait")
    if status == "assigned":
        await queue.assign("T", agent="alice")
    if status == "in-progress":
        await queue.start("T", agent="alice")
    elif status == "completed":
        await queue.complete("T", agent="alice")
    elif status == "failed":
        await queue.fail("T", agent="alice", reason="no", retry=False)


OPERATIONS = {
    "create": lambda queue: create(queue, "T"),
    "claim": lambda queue: queue.claim("T", "alice"),
    "start": lambda queue: queue.start("T"),
    "heartbeat": lambda queue: queue.heartbeat("T"),
    "progress": lambda queue: queue.heartbeat("T", progress="half", checkpoint="page 3"),
    "release": lambda queue: queue.release("T"),
    "release delay": lambda queue: queue.release("T", delay=50),
    "complete": lambda queue: queue.complete("T", summary="done"),
    "complete force": lambda queue: queue.complete("T", summary="done", force=True),
    "fail": lambda queue: queue.fail("T", reason="broken"),
    "fail hard": lambda queue: queue.fail("T", reason="broken", retry=False),
    "fail force": lambda queue: queue.fail("T", reason="broken", force=True),
    "fail wait force": lambda queue: queue.fail("T", reason="broken", force=True, delay=50),
    "fail hard force": lambda queue: queue.fail("T", reason="x", force=True, retry=False),
    "next": lambda queue: queue.next("bob", lane="coding"),
    "assign": lambda queue: queue.assign("T", agent="bob"),
    "note": lambda queue: queue.note("T", "seen"),
    "update": lambda queue: queue.update("T", title="new", metadata={"a": 1}, mission="n"),
    "update place": lambda queue: queue.update("T", lane="coding", priority="high"),
    "update edges": lambda queue: queue.update("T", dependencies=["other"]),
    "update no edges": lambda queue: queue.update("T", dependencies=[]),
    "update delay": lambda queue: queue.update("T", delay=500),
    "block": lambda queue: queue.block("T", reason="wait"),
    "unblock": lambda queue: queue.unblock("T"),
    "redrive": lambda queue: queue.redrive("T"),
    "redrive delay": lambda queue: queue.redrive("T", delay=50),
    "reopen": lambda queue: queue.reopen("T", reason="blank"),
    "purge": lambda queue: queue.purge(older=0),
    "purge failed": lambda queue: queue.purge(older=0, status="failed"),
    "pause": lambda queue: queue.pause(),
    "unpause": lambda queue: queue.unpause(),
    "doctor": lambda queue: mq.doctor(queue),
    "repair": lambda queue: mq.repair(queue),
    "reap": lambda queue: queue.reap(),
    "reap later": lambda queue: queue.reap(),
    "delete": lambda queue: queue.delete("T"),
    "delete force": lambda queue: queue.delete("T", force=True),
}

SHORT = {
    "P": "pending",
    "C": "claimed",
    "I": "in-progress",
    "D": "completed",
    "F": "failed",
    "B": "blocked",
    "N": "NOT_FOUND",
    "W": "WRONG_STATUS",
}
MATRIX = """
                absent pending delayed blocked by_hand assigned claimed in-progress completed failed
create          P      EXISTS  EXISTS  EXISTS  EXISTS  EXISTS   EXISTS  EXISTS      EXISTS    EXISTS
claim           N      C       NOT_DUE BLOCKED BLOCKED C        HELD    HELD        W         W
next            -      C       P       B       B       C        C       I           D         F
assign          N      C       NOT_DUE BLOCKED BLOCKED HELD     HELD    HELD        W         W
start           N      W       W       W       W       I        I       W           W         W
heartbeat       N      W       W       W       W       C        C       I           W         W
progress        N      W       W       W       W       C        C       I           W         W
note            N      P       P       B       B       C        C       I           D         F
release         N      W       W       W       W       P        P       P           W         W
release_delay   N      W       W       W       W       P        P       P           W         W
complete        N      W       W       W       W       D        D       D           W         W
complete_force  N      D       D       D       D       D        D       D           W         D
fail            N      W       W       W       W       P        P       P           W         W
fail_hard       N      W       W       W       W       F        F       F           W         W
fail_force      N      P       P       B       B       P        P       P           W         P
fail_wait_force N      P       P       B       B       P        P       P           W         P
fail_hard_force N      F       F       F       F       F        F       F           W         F
update          N      P       P       B       B       C        C       I           W         F
update_place    N      P       P       B       B       C        C       I           W         F
update_edges    N      B       B       B       B       C        C       I           W         F
update_no_edges N      P       P       P       B       C        C       I           W         F
update_delay    N      P       P       B       B       W        W       W           W         F
block           N      B       B       B       B       B        B       B           W         W
unblock         N      W       W       W       P       W        W       W           W         W
redrive         N      W       W       W       W       W        W       W           W         P
redrive_delay   N      W       W       W       W       W        W       W           W         P
reopen          N      W       W       W       W       W        W       W           P         W
purge           -      P       P       B       B       C        C       I           -         F
purge_failed    -      P       P       B       B       C        C       I           D         -
pause           -      P       P       B       B       C        C       I           D         F
unpause         -      P       P       B       B       C        C       I           D         F
doctor          -      P       P       B       B       C        C       I           D         F
repair          -      P       P       B       B       C        C       I           D         F
reap            -      P       P       B       B       C        C       I           D         F
reap_later      -      P       P       B       B       P        P       P           D         F
delete          N      -       -       -       -       HELD     HELD    HELD        -         -
delete_force    N      -       -       -       -       -        -       -           -         -
"""


def cells() -> list[Any]:
    head, *rows = MATRIX.strip("\n").splitlines()
    statuses = [status.replace("_", " ") for status in head.split()]
    made = []
    for row in rows:
        name, *outcomes = row.split()
        name = name.replace("_", " ")
        for status, outcome in zip(statuses, outcomes, strict=True):
            outcome = SHORT.get(outcome, outcome)
            made.append(pytest.param(name, status, outcome, id=f"{name}-{status}"))
    assert len({case.values[0] for case in made}) == len(OPERATIONS)
    return made


@pytest.mark.parametrize(("operation", "status", "outcome"), cells())
async def test_matrix(
    queue: mq.Queue,
    db: redis.Redis,
    server: Server,
    shim: Shim,
    operation: str,
    status: str,
    outcome: str,
) -> None:
    await reach(queue, status)
    assert sound(db, shim) == []
    if operation == "reap later":
        shim.seconds = LATER

    if outcome in mq.CODES:
        assert await refused(server, OPERATIONS[operation](queue)) == outcome
    else:
        answer: Any = await OPERATIONS[operation](queue)
        assert await fate(db) == outcome
        for task in answer.get("tasks", [answer]):
            assert task.get("status", outcome) == outcome
    assert sound(db, shim) == []


async def test_what_create_refuses(
    queue: mq.Queue, db: redis.Redis, server: Server, shim: Shim
) -> None:
    new = {"mission": "m", "title": "a task"}
    for code, tasks in (
        ("NOT_FOUND", [new | {"taskId": "A", "dependencies": ["nobody"]}]),
        ("CYCLE", [new | {"taskId": "A", "dependencies": ["A"]}]),
        (
            "CYCLE",
            [
                new | {"taskId": "A", "dependencies": ["B"]},
                new | {"taskId": "B", "dependencies": ["A"]},
            ],
        ),
        ("EXISTS", [new | {"taskId": "A"}, new | {"taskId": "A"}]),
        ("EXISTS", [new | {"taskId": "A"}, new | {"taskId": "other"}]),
        ("INVALID", [new | {"taskId": "A", "lane": "cooking"}]),
        ("INVALID", [new | {"taskId": "A:B"}]),
        ("INVALID", [new | {"taskId": "A", "dependencies": ["other other"]}]),
        ("TOO_LARGE", [new | {"taskId": "A", "title": "x" * 501}]),
        ("TOO_LARGE", [new | {"taskId": f"A{i}"} for i in range(201)]),
    ):
        assert await refused(server, queue.create_all(tasks, project="p")) == code, tasks
    assert sound(db, shim) == []


@pytest.mark.parametrize("then", ["freed", "reopened", "created after", "updated", "purged"])
async def test_an_unfinished_task_protects_what_it_depends_on(
    queue: mq.Queue, db: redis.Redis, server: Server, shim: Shim, then: str
) -> None:
    """Whether it waits for it or was freed by it: until it is done, or names it no more."""
    if then == "created after":
        await queue.complete("other", force=True)
        await create(queue, "T", dependencies=["other"])
    else:
        await reach(queue, "blocked")
        assert await refused(server, queue.delete("other")) == "HAS_DEPENDENTS"
        await queue.complete("other", force=True)
    if then == "reopened":
        await queue.complete("T", force=True)
        await queue.reopen("T", reason="not done")
    if then == "updated":
        await create(queue, "another")
        await queue.update("T", dependencies=["another", "other"])
    assert await refused(server, queue.delete("other")) == "HAS_DEPENDENTS"
    assert await queue.purge(older=0) == {"purged": 0, "kept": 1}
    assert sound(db, shim) == []
    if then == "updated":
        await queue.update("T", dependencies=["another"])
    else:
        await queue.complete("T", force=True)
    if then == "purged":
        assert (await queue.purge(older=0)) == {"purged": 2, "kept": 0}
    else:
        await queue.delete("other")
    assert sound(db, shim) == []


async def test_doctor_misses_whoever_depends_and_repair_enters_it(
    queue: mq.Queue, db: redis.Redis, server: Server, shim: Shim
) -> None:
    """Projects of earlier days have none of those that a completion freed."""
    await reach(queue, "blocked")
    await queue.complete("other", force=True)
    db.delete("mosaic:queue:project:{p}:dependents:other")
    found = (await mq.doctor(queue, project="p"))["findings"]
    assert "p/T is missing among the dependents of other" in found
    await mq.repair(queue, project="p")
    assert await refused(server, queue.delete("other")) == "HAS_DEPENDENTS"
    assert sound(db, shim) == []


async def test_delete_force_takes_the_edge_out(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    await reach(queue, "blocked")
    await queue.delete("other", force=True)
    assert (await queue.get("T"))["dependencies"] == []
    assert await fate(db) == "pending"
    assert sound(db, shim) == []


async def test_a_completed_dependency_frees_who_waits_for_it_alone(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    await create(queue, "second")
    await create(queue, "T", dependencies=["other", "second", "other"])
    assert (await queue.complete("other", force=True)).get("freed", []) == []
    assert await fate(db) == "blocked"
    assert (await queue.complete("second", force=True))["freed"] == ["T"]
    assert await fate(db) == "pending"
    assert sound(db, shim) == []


async def test_a_task_completed_by_force_waits_for_nothing_more(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    await reach(queue, "blocked")
    await queue.complete("T", force=True)
    await queue.complete("other", force=True)
    assert sound(db, shim) == []


# ---- whose task it is ----

BY_HOLDER = {
    "start": lambda queue, who: queue.start("T", **who),
    "heartbeat": lambda queue, who: queue.heartbeat("T", **who),
    "progress": lambda queue, who: queue.heartbeat("T", progress="half", **who),
    "release": lambda queue, who: queue.release("T", **who),
    "complete": lambda queue, who: queue.complete("T", **who),
    "fail": lambda queue, who: queue.fail("T", reason="broken", **who),
}
STRANGERS = {
    "wrong agent": ({"agent": "bob"}, "NOT_OWNER"),
    "wrong session": ({"session": "s2"}, "STALE_SESSION"),
    "wrong fence": ({"fence": 1}, "STALE_FENCE"),
    "right agent, wrong session": ({"agent": "alice", "session": "s2"}, "STALE_SESSION"),
    "right agent and session, wrong fence": (
        {"agent": "alice", "session": "s1", "fence": 1},
        "STALE_FENCE",
    ),
}


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("operation", BY_HOLDER)
async def test_a_stranger_is_refused(
    queue: mq.Queue, db: redis.Redis, server: Server, shim: Shim, operation: str, stranger: str
) -> None:
    await create(queue, "T")
    await queue.claim("T", "alice", session="s1", ttl=TTL)
    who, code = STRANGERS[stranger]
    assert await refused(server, BY_HOLDER[operation](queue, who)) == code
    assert sound(db, shim) == []


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("operation", BY_HOLDER)
async def test_force_overrides(
    queue: mq.Queue, db: redis.Redis, shim: Shim, operation: str, stranger: str
) -> None:
    await create(queue, "T")
    await queue.claim("T", "alice", session="s1", ttl=TTL)
    who, _ = STRANGERS[stranger]
    await BY_HOLDER[operation](queue, who | {"force": True})
    assert sound(db, shim) == []


@pytest.mark.parametrize("operation", BY_HOLDER)
@pytest.mark.parametrize("named", ["nothing", "agent", "session", "fence", "all"])
async def test_the_holder_may(
    queue: mq.Queue, db: redis.Redis, shim: Shim, operation: str, named: str
) -> None:
    await create(queue, "T")
    claim = await queue.claim("T", "alice", session="s1", ttl=TTL)
    everything = {"agent": "alice", "session": "s1", "fence": claim["fence"]}
    who = {name: value for name, value in everything.items() if named in (name, "all")}
    await BY_HOLDER[operation](queue, who)
    assert sound(db, shim) == []


async def test_an_old_fence_is_stale_after_the_next_claim(queue: mq.Queue, server: Server) -> None:
    await create(queue, "T")
    first = await queue.claim("T", "alice", session="s1", ttl=TTL)
    await queue.release("T", agent="alice")
    second = await queue.claim("T", "alice", session="s1", ttl=TTL)
    assert second["fence"] > first["fence"]
    for operation in BY_HOLDER.values():
        assert await refused(server, operation(queue, {"fence": first["fence"]})) == "STALE_FENCE"


# ---- leases that end ----


async def lapse(queue: mq.Queue, shim: Shim, **claim: Any) -> Any:
    """Claim `T` for alice and let the lease end."""
    claimed = await queue.claim("T", "alice", ttl=TTL, **claim)
    shim.seconds += LATER
    assert (await queue.reap())["reaped"] == ["p/T"]
    return claimed


async def test_late_completion_by_the_holder(queue: mq.Queue, db: redis.Redis, shim: Shim) -> None:
    await create(queue, "T")
    claim = await lapse(queue, shim, session="s1")
    who = {"agent": "alice", "session": "s1", "fence": claim["fence"]}
    done = await queue.complete("T", summary="done", **who)
    assert done["late"]
    assert await fate(db) == "completed"
    assert sound(db, shim) == []


async def test_a_dead_letter_may_be_completed_late(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    await create(queue, "T")
    for _ in range(3):
        await lapse(queue, shim)
    assert await fate(db) == "failed"
    assert (await queue.complete("T", agent="alice"))["late"]
    assert await fate(db) == "completed"
    assert sound(db, shim) == []


@pytest.mark.parametrize(
    "who",
    [{}, {"agent": "bob"}, {"agent": "alice", "session": "s2"}, {"agent": "alice", "fence": 1}],
)
async def test_late_completion_by_another_is_refused(
    queue: mq.Queue, server: Server, shim: Shim, who: dict[str, Any]
) -> None:
    await create(queue, "T")
    await lapse(queue, shim, session="s1")
    queue.leases.clear()  # as of another process: this one would act as the agent that claimed
    assert await refused(server, queue.complete("T", **who)) == "WRONG_STATUS"


async def test_late_completion_is_refused_once_somebody_claimed(
    queue: mq.Queue, db: redis.Redis, server: Server, shim: Shim
) -> None:
    await create(queue, "T")
    claim = await lapse(queue, shim, session="s1")
    late = {"agent": "alice", "session": "s1", "fence": claim["fence"]}
    await queue.claim("T", "bob", session="s2")
    assert await refused(server, queue.complete("T", **late)) == "NOT_OWNER"
    await queue.release("T", agent="bob")
    assert await refused(server, queue.complete("T", **late)) == "WRONG_STATUS"
    assert sound(db, shim) == []


async def test_late_completion_of_what_is_completed_is_refused(
    queue: mq.Queue, db: redis.Redis, server: Server, shim: Shim
) -> None:
    """No row of the machine leads from completed to completed."""
    await create(queue, "T")
    await lapse(queue, shim)
    await queue.complete("T", agent="boss", summary="by hand", force=True)
    code = await refused(server, queue.complete("T", agent="alice", summary="mine"))
    assert code == "WRONG_STATUS"
    assert (await queue.get("T"))["summary"] == "by hand"
    assert sound(db, shim) == []


@pytest.mark.parametrize("operation", ["start", "heartbeat", "release", "fail"])
async def test_nothing_but_complete_may_be_late(
    queue: mq.Queue, server: Server, shim: Shim, operation: str
) -> None:
    await create(queue, "T")
    await lapse(queue, shim)
    code = await refused(server, BY_HOLDER[operation](queue, {"agent": "alice"}))
    assert code == "WRONG_STATUS"


async def test_a_late_heartbeat_counts_until_the_task_is_reaped(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    await create(queue, "T")
    await queue.claim("T", "alice", ttl=TTL)
    shim.seconds = LATER
    await queue.heartbeat("T", agent="alice")
    assert (await queue.reap())["reaped"] == []
    assert await fate(db) == "claimed"


async def test_a_lease_never_reaches_past_max_runtime(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    await create(queue, "T", max_runtime=90)
    claim = await queue.claim("T", "alice", ttl=TTL)
    shim.seconds = 50
    beat = await queue.heartbeat("T", agent="alice")
    assert beat["leaseExpiresAt"] == claim["claimedAt"] + 90_000
    shim.seconds = LATER
    assert (await queue.reap())["reaped"] == ["p/T"]
    assert sound(db, shim) == []


async def test_a_claim_ends_the_leases_that_are_in_its_way(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    """The watchdog is down: whoever is refused for an expired lease reaps it and asks again."""
    await create(queue, "T")
    await queue.claim("T", "alice", ttl=TTL)
    shim.seconds = LATER
    assert (await queue.claim("T", "bob"))["claimedBy"] == "bob"
    assert sound(db, shim) == []


@pytest.mark.parametrize("uptime", [0, 10, 59])
async def test_no_lease_is_reaped_in_the_first_minute_of_a_server(
    queue: mq.Queue, db: redis.Redis, server: Server, shim: Shim, uptime: int
) -> None:
    await create(queue, "T")
    await queue.claim("T", "alice", ttl=TTL)
    shim.seconds, shim.uptime = LATER, uptime
    before = key_space(server)
    answer = await queue.reap()
    assert (answer["reaped"], answer["settled"], answer["grace"]) == ([], 0, 60 - uptime)
    assert key_space(server) == before
    until = time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time() + LATER + 60 - uptime))
    said = (await refusal_of(queue.claim("T", "bob"))).message
    why = (await queue.next("bob", lane="coding"))["why"]
    explained = await mq.explain(queue, "T")
    for sentence in (said, why, explained["why"][1]):
        assert "the server was started at" in sentence
        assert f"are ended from {until}" in sentence
    assert explained["todo"] == []
    assert key_space(server) == before
    shim.uptime = 60
    assert (await queue.reap())["reaped"] == ["p/T"]
    assert sound(db, shim) == []


async def test_a_server_that_was_just_made_has_no_grace(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    """Its leases are younger than it is: their holders could renew them all the time."""
    await create(queue, "T")
    await queue.claim("T", "alice", ttl=2)
    shim.seconds, shim.uptime = 5, 6
    assert (await queue.claim("T", "bob"))["claimedBy"] == "bob"
    assert sound(db, shim) == []


@pytest.mark.parametrize("limit", [1, 3])
async def test_so_many_expired_leases_make_a_dead_letter(
    config: mq.Config, db: redis.Redis, shim: Shim, limit: int
) -> None:
    config.set("defaults.deadLetterAfter", limit, "test")
    async with mq.Queue(config) as queue:
        await create(queue, "T")
        for expiries in range(1, limit + 1):
            await lapse(queue, shim)
            task = await queue.get("T")
            assert (task["expiryCount"], task["retryCount"]) == (expiries, 0)
            assert task["status"] == ("failed" if expiries == limit else "pending")
            assert sound(db, shim) == []
        assert "alice" in task["failureReason"]


@pytest.mark.parametrize("limit", [0, 1, 3])
async def test_so_many_failures_make_a_dead_letter(
    config: mq.Config, db: redis.Redis, shim: Shim, limit: int
) -> None:
    config.set("defaults.maxRetries", limit, "test")
    async with mq.Queue(config) as queue:
        await create(queue, "T")
        for failures in range(1, limit + 2):
            await queue.claim("T", "alice")
            await queue.fail("T", agent="alice", reason=f"broken {failures}")
            task = await queue.get("T")
            assert task["failureReason"] == f"broken {failures}"
            assert task["retryCount"] == min(failures, limit)
            assert task["status"] == ("failed" if failures > limit else "pending")
            assert sound(db, shim) == []
            shim.seconds += 30 * 2**failures


async def test_the_wait_before_a_retry_doubles(
    queue: mq.Queue, db: redis.Redis, server: Server, shim: Shim
) -> None:
    await create(queue, "T")
    for wait in (100, 200, 400):
        await queue.claim("T", "alice", ttl=TTL)
        failed = await queue.fail("T", agent="alice", reason="broken", retry_delay=100)
        assert failed["notBefore"] == failed["updatedAt"] + wait * 1000
        assert await refused(server, queue.claim("T", "alice")) == "NOT_DUE"
        assert sound(db, shim) == []
        shim.seconds += wait


async def test_a_retry_waits_30_s_and_goes_to_another_agent_first(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    """Whoever failed a task last waits twice as long: a broken worker leaves it to others."""
    await create(queue, "T", lane="coding")
    await queue.claim("T", "alice")
    failed = await queue.fail("T", agent="alice", reason="broken")
    assert failed["notBefore"] == failed["failedAt"] + 30_000
    shim.seconds = 31
    nothing = await queue.next("alice", lane="coding")
    assert nothing["tasks"] == []
    assert "others get T first" in nothing["why"]
    (task,) = (await queue.next("bob", lane="coding"))["tasks"]
    assert task["taskId"] == "T"
    await queue.release("T", agent="bob")
    assert (await queue.next("alice", lane="coding"))["tasks"], "its last claim did not fail"
    assert sound(db, shim) == []


async def test_an_agent_alone_gets_back_what_it_failed(queue: mq.Queue, shim: Shim) -> None:
    await create(queue, "T", lane="coding")
    await queue.claim("T", "alice")
    await queue.fail("T", agent="alice", reason="broken")
    shim.seconds = 61
    (task,) = (await queue.next("alice", lane="coding"))["tasks"]
    assert task["retryCount"] == 1


# ---- lanes ----


async def test_a_lane_never_holds_more_than_its_cap(
    config: mq.Config, db: redis.Redis, server: Server, shim: Shim
) -> None:
    config.set("lanes.coding.maxConcurrent", 2, "test")
    async with mq.Queue(config) as queue:
        for name in ("A", "B", "C"):
            await create(queue, name, lane="coding")
        await create(queue, "free")
        await queue.claim("A", "alice", ttl=TTL)
        await queue.claim("B", "bob", ttl=10 * TTL)
        assert await refused(server, queue.claim("C", "carol")) == "LANE_FULL"
        await queue.claim("free", "carol")
        assert sound(db, shim) == []
        await queue.release("B")
        assert sound(db, shim) == []
        await queue.claim("C", "carol", ttl=10 * TTL)
        assert await refused(server, queue.claim("B", "bob")) == "LANE_FULL"
        shim.seconds = LATER
        await queue.claim("B", "bob")
        assert await refused(server, queue.claim("A", "alice")) == "LANE_FULL"
        assert sound(db, shim) == []


@pytest.mark.parametrize("ending", ["release", "complete", "fail"])
async def test_whatever_ends_a_claim_makes_room(
    config: mq.Config, db: redis.Redis, shim: Shim, ending: str
) -> None:
    config.set("lanes.coding.maxConcurrent", 1, "test")
    async with mq.Queue(config) as queue:
        await create(queue, "T", lane="coding")
        await create(queue, "next", lane="coding")
        await queue.claim("T", "alice")
        db.delete("mosaic:queue:project:{p}:bell:coding")
        await BY_HOLDER[ending](queue, {"agent": "alice"})
        assert sound(db, shim) == []
        await queue.claim("next", "bob")
        assert sound(db, shim) == []


# ---- next: which task, and whose ----


async def given(queue: mq.Queue, **options: Any) -> str:
    """The id of the task that `next` gives to bob, or ''."""
    offer = await queue.next("bob", **options)
    return offer["tasks"][0]["taskId"] if offer["tasks"] else ""


async def test_priority_goes_before_age_and_a_task_that_comes_back_keeps_its_place(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    for task, priority in (("M1", "medium"), ("L", "low"), ("M2", "medium"), ("C", "critical")):
        await create(queue, task, priority=priority, lane="coding")
    assert [await given(queue, lane="coding") for _ in "ab"] == ["C", "M1"]
    await queue.release("M1")
    await queue.fail("C", reason="broken", delay=0)
    order = [await given(queue, lane="coding") for _ in range(5)]
    assert order == ["C", "M1", "M2", "L", ""]
    assert sound(db, shim) == []


@pytest.mark.parametrize(
    ("changes", "order"),
    [
        ({"priority": "critical"}, ["T", "A", "B"]),
        ({"priority": "low"}, ["A", "B", "T"]),
        ({"lane": "any"}, ["A", "T", "B"]),
        ({"lane": "planning"}, ["A", "B"]),
        ({"dependencies": ["A"]}, ["A", "B"]),
        ({"delay": 50}, ["A", "B"]),
        ({"title": "new"}, ["A", "T", "B"]),
    ],
)
async def test_a_ready_task_that_is_updated_stands_in_its_new_place(
    queue: mq.Queue, db: redis.Redis, shim: Shim, changes: Any, order: list[str]
) -> None:
    for task in ("A", "T", "B"):
        await create(queue, task, lane="coding")
    await queue.update("T", **changes)
    assert sound(db, shim) == []
    assert [await given(queue, lane="coding") for _ in order] == order
    assert sound(db, shim) == []


async def test_a_lane_gives_its_own_tasks_and_those_of_any(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    for task, lane in (("P", "planning"), ("C", "coding"), ("A", "any")):
        await create(queue, task, lane=lane)
    assert [await given(queue, lane="coding") for _ in range(3)] == ["C", "A", ""]
    assert [await given(queue) for _ in range(3)] == ["other", "P", ""]
    assert sound(db, shim) == []


async def test_a_mission_gives_its_own_tasks(queue: mq.Queue, db: redis.Redis, shim: Shim) -> None:
    await queue.create("p", "second", "S", title="a task", priority="low")
    assert [await given(queue, mission="second") for _ in "ab"] == ["S", ""]
    assert sound(db, shim) == []


async def test_full_lanes_are_passed_over(config: mq.Config, db: redis.Redis, shim: Shim) -> None:
    config.set("lanes.coding.maxConcurrent", 1, "test")
    async with mq.Queue(config) as queue:
        for task in ("C1", "C2"):
            await create(queue, task, lane="coding", priority="critical")
        await create(queue, "A")
        assert [await given(queue) for _ in range(3)] == ["C1", "A", ""]
        assert "C1" in (await queue.next("bob"))["why"]
        await queue.complete("C1")
        assert await given(queue, lane="coding") == "C2"
        assert sound(db, shim) == []


async def test_a_delayed_task_is_given_when_it_is_due(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    await create(queue, "T", delay=50, lane="coding")
    assert await given(queue, lane="coding") == ""
    shim.seconds = 51
    assert await given(queue, lane="coding") == "T"
    assert sound(db, shim) == []


async def test_entries_without_a_task_are_cleaned(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    """What a creation that was cut off leaves among the ready."""
    await create(queue, "T", lane="coding")
    db.zadd("mosaic:queue:project:{p}:ready:coding", {"ghost": 1, "other": 2})
    assert await given(queue, lane="coding") == "T"
    assert sound(db, shim) == []


@pytest.mark.parametrize("how", ["claim", "next"])
@pytest.mark.parametrize(
    ("seconds", "stamp", "same", "outcome"),
    [
        (0, False, False, "HELD"),  # another session of the same agent: it lives
        (41, False, False, "s2"),  # two thirds of its lease passed
        (0, True, False, "s2"),  # it said that it ends
        (41, False, True, "HELD"),  # never inside one session
        (0, True, True, "HELD"),
    ],
)
async def test_what_an_earlier_session_left_behind(
    config: mq.Config,
    db: redis.Redis,
    shim: Shim,
    how: str,
    seconds: int,
    stamp: bool,
    same: bool,
    outcome: str,
) -> None:
    async with mq.Queue(config, session="s1") as first, mq.Queue(config, session="s2") as second:
        await create(first, "T")
        before = await first.claim("T", "alice", ttl=TTL)
        await first.start("T", agent="alice")
        if stamp:
            await mq.leave(first)
        shim.seconds = seconds
        queue = first if same else second
        if how == "next":
            tasks = (await queue.next("alice"))["tasks"]
        else:
            try:
                tasks = [await queue.claim("T", "alice")]
            except mq.Refused as problem:
                assert problem.code == outcome  # noqa: PT017 - both ways are in the table
                tasks = []
        assert [task["session"] for task in tasks] == ([outcome] if outcome == "s2" else [])
        if tasks:
            assert tasks[0]["fence"] > before["fence"]
            assert await refusal_code(first.complete("T", agent="alice")) == "STALE_SESSION"
        assert sound(db, shim) == []


async def refusal_code(call: Any) -> str:
    return (await refusal_of(call)).code


# ---- assignments ----

PICK_UPS = {
    "next": lambda queue: queue.next("alice"),
    "claim": lambda queue: queue.claim("T", "alice"),
    "start": lambda queue: queue.start("T", agent="alice"),
    "heartbeat": lambda queue: queue.heartbeat("T", agent="alice"),
}


@pytest.mark.parametrize("how", PICK_UPS)
async def test_an_assignment_is_picked_up(
    config: mq.Config, db: redis.Redis, shim: Shim, how: str
) -> None:
    """From then on it is a claim of that session like any other, with a lease of full length."""
    async with mq.Queue(config, session="s1") as queue:
        await create(queue, "T")
        assigned = (await queue.assign("T", agent="alice"))["tasks"][0]
        assert "session" not in assigned
        assert assigned["claimTTL"] == 60
        await PICK_UPS[how](queue)
        assert db.keys("*:assigned:*") == []
        shim.seconds = LATER
        assert (await queue.reap())["settled"] == 0
        task = await queue.get("T")
        assert (task["session"], task["claimTTL"]) == ("s1", 3600)
        assert sound(db, shim) == []


async def test_an_assignment_that_nobody_picks_up_is_released_without_blame(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    await create(queue, "T")
    for _ in range(5):
        await queue.assign("T", agent="alice")
        shim.seconds += 61
        assert (await queue.reap())["reaped"] == []
        task = await queue.get("T")
        assert (task["status"], task["retryCount"]) == ("pending", 0)
        assert "expiryCount" not in task
        assert db.keys("*:assigned:*") == []
        assert sound(db, shim) == []
    assert await refusal_code(queue.complete("T", agent="alice")) == "WRONG_STATUS"


async def test_assign_chooses_by_priority_then_by_who_waits_for_it(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    for task, on in (("A", []), ("B", []), ("W", ["B"])):
        await create(queue, task, dependencies=on, lane="coding")
    await create(queue, "H", lane="coding", priority="high")
    for expected in ("H", "B", "A"):
        offer = await queue.assign(agent="alice", lane="coding")
        assert offer["tasks"][0]["taskId"] == expected
    assert "nothing" in (await queue.assign(agent="alice", lane="coding"))["why"]
    assert sound(db, shim) == []


async def test_assign_takes_nothing_from_the_agent(
    config: mq.Config, db: redis.Redis, server: Server, shim: Shim
) -> None:
    """However old its lease, what the agent works on is no pending task."""
    async with mq.Queue(config) as boss, mq.Queue(config, session="s1") as queue:
        await create(queue, "T")
        await queue.claim("T", "alice", ttl=TTL)
        shim.seconds = 50
        assert await refused(server, boss.assign("T", agent="alice")) == "HELD"


# ---- what a task says of itself ----


async def test_update_changes_and_clears_every_field(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    await create(queue, "T", description="old", metadata={"a": 1}, dependencies=["other"])
    new: dict[str, Any] = {
        "title": "new",
        "description": "more",
        "priority": "low",
        "lane": "coding",
        "mission": "n",
        "dependencies": [],
        "metadata": {"b": [{}, None]},
    }
    await queue.update("T", delay=500, **new)
    task = await queue.get("T")
    assert {name: task[name] for name in new} == new
    assert task["notBefore"] == task["updatedAt"] + 500_000
    assert sound(db, shim) == []
    await queue.update("T", clear=["description", "metadata", "delay"])
    assert not {"description", "metadata", "notBefore"} & (await queue.get("T")).keys()
    assert sound(db, shim) == []


async def test_update_refuses_another_rev(queue: mq.Queue, server: Server) -> None:
    task = await create(queue, "T")
    await queue.note("T", "something")
    stale = queue.update("T", title="new", if_rev=task["rev"])
    assert await refused(server, stale) == "STALE_REV"
    await queue.update("T", title="new", if_rev=(await queue.get("T"))["rev"])


@pytest.mark.parametrize("length", [1, 2, 200])
async def test_update_refuses_a_cycle(queue: mq.Queue, server: Server, length: int) -> None:
    rows: Any = [
        {
            "taskId": f"A{i}",
            "mission": "m",
            "title": "a task",
            "dependencies": [f"A{i - 1}"] if i else [],
        }
        for i in range(length)
    ]
    await queue.create_all(rows, project="p")
    last = f"A{length - 1}"
    assert await refused(server, queue.update("A0", dependencies=[last])) == "CYCLE"


async def test_update_takes_200_dependencies(
    queue: mq.Queue, db: redis.Redis, server: Server, shim: Shim
) -> None:
    await create(queue, "T")
    rows: Any = [{"taskId": f"A{i}", "mission": "m", "title": "a task"} for i in range(200)]
    await queue.create_all(rows, project="p")
    names = [row["taskId"] for row in rows]
    assert await refused(server, queue.update("T", dependencies=[*names, "other"])) == "TOO_LARGE"
    await queue.update("T", dependencies=names)
    assert await fate(db) == "blocked"
    assert sound(db, shim) == []


async def test_a_held_task_may_get_a_lane_and_dependencies(
    config: mq.Config, db: redis.Redis, shim: Shim
) -> None:
    """It counts in its new lane at once; it waits once its holder gives it back."""
    config.set("lanes.coding.maxConcurrent", 1, "test")
    async with mq.Queue(config) as queue:
        await create(queue, "first")
        await create(queue, "rival", lane="coding")
        await create(queue, "T")
        await queue.claim("T", "alice", ttl=TTL)
        await queue.update("T", lane="coding", dependencies=["first"])
        assert await refusal_code(queue.claim("rival", "bob")) == "LANE_FULL"
        assert sound(db, shim) == []
        await queue.release("T", agent="alice")
        assert await fate(db) == "blocked"
        assert sound(db, shim) == []


@pytest.mark.parametrize("before", ["claimed", "failed"])
async def test_what_a_completed_task_waited_for_is_forgotten(
    queue: mq.Queue, db: redis.Redis, shim: Shim, before: str
) -> None:
    await reach(queue, before)
    await queue.update("T", dependencies=["other"])
    await queue.complete("T", force=True)
    assert sound(db, shim) == []
    await queue.complete("other", force=True)
    assert sound(db, shim) == []


# ---- blocked by hand ----


async def test_only_the_holder_blocks_what_is_held(
    queue: mq.Queue, db: redis.Redis, server: Server, shim: Shim
) -> None:
    await reach(queue, "claimed")
    assert await refused(server, queue.block("T", reason="x", agent="bob")) == "NOT_OWNER"
    await queue.block("T", reason="waits for a key", agent="alice")
    task = await queue.get("T")
    assert (task["status"], task["blockedReason"]) == ("blocked", "waits for a key")
    assert "claimedBy" not in task
    assert sound(db, shim) == []
    await queue.unblock("T")
    task = await queue.get("T")
    assert task["status"] == "pending"
    assert "blockedReason" not in task
    assert sound(db, shim) == []


async def test_hand_and_dependency_block_each_for_itself(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    for freed_first in (True, False):
        task = f"T{freed_first}"
        await create(queue, f"A{freed_first}")
        await create(queue, task, dependencies=[f"A{freed_first}"])
        await queue.block(task, reason="wait")
        steps = [
            lambda on=f"A{freed_first}": queue.complete(on, force=True),
            lambda task=task: queue.unblock(task),
        ]
        for step, status in zip(
            steps if freed_first else steps[::-1], ("blocked", "pending"), strict=True
        ):
            await step()
            assert (await queue.get(task))["status"] == status
            assert sound(db, shim) == []


# ---- second lives ----


async def test_redrive_starts_the_counters_again(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    await create(queue, "T")
    await lapse(queue, shim)
    for _ in range(4):
        await queue.claim("T", "alice")
        await queue.fail("T", agent="alice", reason="broken", delay=0)
    assert await fate(db) == "failed"
    page = await queue.redrive(mission="m")
    assert [task["taskId"] for task in page["tasks"]] == ["T"]
    task = await queue.get("T")
    assert (task["status"], task["retryCount"]) == ("pending", 0)
    assert not {"expiryCount", "failedAt", "failureReason"} & task.keys()
    assert sound(db, shim) == []


async def test_reopen_leaves_the_freed_free(queue: mq.Queue, db: redis.Redis, shim: Shim) -> None:
    await create(queue, "first")
    await create(queue, "T", dependencies=["first"])
    await create(queue, "N", dependencies=["T"])
    for task in ("first", "T"):
        await queue.complete(task, force=True)
    await queue.reopen("T", reason="blank")
    await queue.reopen("first", reason="blank")
    assert [(await queue.get(task))["status"] for task in ("first", "T", "N")] == ["pending"] * 3
    assert sound(db, shim) == []
    await queue.complete("T", force=True)
    await queue.reopen("T", reason="it needs the first")
    assert (await queue.get("T"))["status"] == "blocked"
    assert sound(db, shim) == []
    await queue.complete("first", force=True)
    assert [(await queue.get(task))["status"] for task in ("T", "N")] == ["pending"] * 2
    assert sound(db, shim) == []


async def test_reopen_without_what_it_depended_on(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    """A dependency that was purged was completed, and a new task of its name is another."""
    await reach(queue, "blocked")
    await queue.complete("other", force=True)
    await queue.complete("T", force=True)
    await queue.delete("other")
    await queue.reopen("T", reason="blank")
    await create(queue, "other")
    task = await queue.get("T")
    assert (task["status"], task["dependencies"]) == ("pending", [])
    assert sound(db, shim) == []


async def test_purge_keeps_what_others_wait_for(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    await reach(queue, "blocked")
    await queue.fail("other", reason="no", retry=False, force=True)
    assert await queue.purge(older=0, status="failed") == {"purged": 0, "kept": 1}
    assert await queue.purge(older=1000, status="failed") == {"purged": 0, "kept": 0}
    await queue.complete("T", force=True)
    assert await queue.purge(older=0, status="failed") == {"purged": 1, "kept": 0}
    assert await queue.purge(older=0) == {"purged": 1, "kept": 0}
    assert sound(db, shim) == []


async def test_a_pause_grants_no_claims_and_ends_none(
    queue: mq.Queue, db: redis.Redis, server: Server, shim: Shim
) -> None:
    await reach(queue, "claimed")
    await create(queue, "N", lane="coding")
    await queue.pause()
    assert await refused(server, queue.claim("N", "bob")) == "PAUSED"
    assert await refused(server, queue.assign("N", agent="bob")) == "PAUSED"
    assert "paused" in (await queue.next("bob"))["why"]
    assert (await queue.assign(agent="bob"))["tasks"] == []
    await queue.heartbeat("T", agent="alice")
    await queue.complete("T", agent="alice")
    await queue.unpause()
    assert await given(queue, lane="coding") == "N"
    assert sound(db, shim) == []


async def test_a_thousand_dependents_are_freed_a_hundred_at_a_time(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    await create(queue, "T")
    for start in range(0, 1000, 200):
        rows: Any = [
            {"taskId": f"D{i}", "mission": "m", "title": "a task", "dependencies": ["T"]}
            for i in range(start, start + 200)
        ]
        await queue.create_all(rows, project="p")
    ready = "mosaic:queue:project:{p}:ready:any"
    done = await queue.complete("T", force=True)
    assert (len(done["freed"]), db.zcard(ready)) == (100, 100)
    assert sound(db, shim) == []
    for step in range(2, 11):
        assert (await queue.reap())["settled"] == 1
        assert db.zcard(ready) == 100 * step
    assert (await queue.reap())["settled"] == 0
    assert sound(db, shim) == []


# ---- ids and missions that are not named ----


async def test_a_task_without_an_id_gets_one(queue: mq.Queue, db: redis.Redis, shim: Shim) -> None:
    """Initials of the mission and a number: short, sortable, unique in the project."""
    named = [await queue.create("p", "big-launch", title="a task") for _ in range(2)]
    assert [task["taskId"] for task in named] == ["BL-001", "BL-002"]
    await queue.create("p", "big-launch", "BL-004", title="a task")
    rows: list[mq.NewTask] = [{"mission": "big-launch", "title": f"task {n}"} for n in range(3)]
    made = [task["taskId"] for task in await queue.create_all(rows, project="p")]
    assert len({*made, "BL-004"}) == 4
    assert made == sorted(made)
    assert (await queue.get(made[2]))["title"] == "task 2"
    assert sound(db, shim) == []


async def test_a_repeat_makes_no_second_id(queue: mq.Queue, server: Server) -> None:
    rows: list[mq.NewTask] = [{"mission": "m", "title": "a task"} for _ in range(2)]
    made = await queue.create_all(rows, project="p", op="same")
    await queue.create("p", "m", title="another")
    before = key_space(server)
    again = await queue.create_all(rows, project="p", op="same")
    assert [task["taskId"] for task in again] == [task["taskId"] for task in made]
    assert key_space(server) == before


async def test_a_project_with_one_mission_needs_none_named(
    queue: mq.Queue, server: Server, config: mq.Config
) -> None:
    assert (await refusal_of(queue.create("new", title="a task"))).code == "INVALID"
    assert (await queue.create("p", title="a task"))["mission"] == "m"
    await create(queue, "done")
    await queue.complete("done", force=True)
    assert (await queue.create("p", title="a task"))["mission"] == "m"
    await queue.create("p", "another", title="a task")
    assert await refused(server, queue.create("p", title="a task")) == "INVALID"
    config.set("mission", "another", "test")
    assert (await queue.create("p", title="a task"))["mission"] == "another"


# ---- lists ----


async def test_a_list_of_what_has_these_words(queue: mq.Queue) -> None:
    """In taskId, title or description, each of them, whatever its case."""
    await queue.create("p", "m", "API-1", title="Write the page", description='über/all "quoted"')
    await queue.create("p", "m", "API-2", title="ÜBER the top")
    await queue.create("p", "n", "UI-1", title="nothing", metadata={"note": "page"})

    async def named(text: str, **more: Any) -> list[str]:
        page = await queue.list(project="p", text=text, **more)
        assert page["total"] == len(page["tasks"])
        return sorted(task["taskId"] for task in page["tasks"])

    assert await named("PAGE") == ["API-1"]
    assert await named("api the") == ["API-1", "API-2"]
    assert await named("über") == ["API-1", "API-2"]
    assert await named('über/all "quoted"') == ["API-1"]
    assert await named("%a+ .*") == []
    assert await named("1", mission="n") == ["UI-1"]


async def test_a_list_shows_titles_and_dependencies_of_every_text(
    queue: mq.Queue, db: redis.Redis
) -> None:
    """Of a text whose beginning has neither, of quotes and backslashes, and of an older program."""
    titles = ["plain", 'a "quote"', "back\\", '\\"', "\x01" * 500, "ü" * 250]
    for n, title in enumerate(titles):
        other = [f"T{n - 1}"] if n else []
        await queue.create(
            "p", "m", f"T{n}", title=title, description="x" * 2000, dependencies=other
        )
    many = [f"dependency-with-a-long-name-{n}" for n in range(200)]
    for name in many:
        await create(queue, name)
    await queue.create("p", "m", "many", title="many", dependencies=many)
    old = {"dependencies": "T0", "description": "d", "title": "old"}
    await queue.create("p", "m", "old", title="old", dependencies=["T0"])
    db.set("mosaic:queue:project:{p}:text:old", json.dumps(old))
    found = {task["taskId"]: task for task in (await queue.list(project="p", limit=1000))["tasks"]}
    for task in [*(f"T{n}" for n in range(len(titles))), "many", "old"]:
        whole = await queue.get(task)
        assert found[task]["title"] == whole["title"]
        assert found[task]["dependencies"] == whole["dependencies"], task


async def test_a_list_ends_after_4_mib_of_texts(queue: mq.Queue) -> None:
    size = 60_000
    for n in range(100):
        await queue.create("p", "m", f"T{n:03}", title="a task", description="x" * size)
    first = await queue.list(project="p", mission="m", limit=1000, full=True)
    assert len(first["tasks"]) < 4 * 2**20 / size + 3
    rest = await queue.list(project="p", mission="m", limit=1000, full=True, cursor=first["cursor"])
    assert len({task["id"] for page in (first, rest) for task in page["tasks"]}) == 101
    _, records = await queue.records("p", [f"T{n:03}" for n in range(100)])
    assert len(records) == 100


async def test_a_list_goes_on_until_it_has_a_page(queue: mq.Queue) -> None:
    rows: list[mq.NewTask] = [{"mission": "m", "title": "a task"} for _ in range(200)]
    for _ in range(6):
        await queue.create_all(rows, project="p")
    await queue.create("p", "m", "rare", title="a task", priority="low")
    page = await queue.list(project="p", priority="low")
    assert ([task["taskId"] for task in page["tasks"]], page["total"]) == (["rare"], 1)


# ---- what doctor finds, and repair sets right ----


async def test_a_lost_lease_is_that_of_the_lock(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    """A living agent's entry among the running was lost: it goes on with its task."""
    await create(queue, "T")
    claimed = await queue.claim("T", "alice", ttl=600)
    db.zrem("mosaic:queue:project:{p}:running:any", "T")
    assert (await mq.repair(queue, project="p"))["repaired"] == 1
    assert abs((await queue.get("T"))["leaseExpiresAt"] - claimed["leaseExpiresAt"]) < 50
    assert (await queue.reap())["reaped"] == []
    assert sound(db, shim) == []


async def test_a_name_that_the_registry_lost(queue: mq.Queue, db: redis.Redis) -> None:
    """doctor finds its project by its root, repair enters it, and so does work now and then."""
    await queue.create("web", "m", "T1", title="a task")
    registry = "mosaic:queue:projects"
    db.srem(registry, "web")
    queue.config.values.pop("project")
    found = await mq.doctor(queue)
    assert [line for line in found["findings"] if "project web" in line]
    assert found["repairable"] == 1
    await mq.repair(queue)
    assert db.sismember(registry, "web")
    assert (await mq.doctor(queue))["repairable"] == 0
    db.srem(registry, "web")
    async with mq.Queue(queue.config) as other:
        for _ in range(mq.REGISTER):
            await other.note("web/T1", "seen")
            await other.claim("web/T1", "alice")
            await other.release("web/T1")
    assert db.sismember(registry, "web")


HUGE = "18446744073709551615-5"
AHEAD: dict[str, Callable[[redis.Redis, str], object]] = {
    "huge": lambda db, events: db.xadd(events, {"e": "x"}, id=HUGE),
    "clock": lambda db, events: [db.xadd(events, {"a": "b"}) for _ in range(3)],
    "deleted": lambda db, events: db.xdel(events, db.xadd(events, {"a": "b"})),
    "lost": lambda db, _: db.hset("mosaic:queue:project:{p}", "rev", 0),
}


@pytest.mark.parametrize("case", AHEAD)
async def test_events_beyond_the_rev_of_their_project(
    queue: mq.Queue, db: redis.Redis, shim: Shim, case: str
) -> None:
    """A tenant's event, which no event can follow, or a rev that was lost: doctor says that nothing
    can change, repair takes the foreign event away or the rev back."""
    events = "mosaic:queue:project:{p}:events"
    await create(queue, "T")
    await queue.note("T", "a finding")
    AHEAD[case](db, events)
    with pytest.raises(mq.Refused) as refused:
        await queue.claim("T", "alice")
    assert "mosaic-queue doctor" in refused.value.hint
    found = await mq.doctor(queue, project="p")
    assert [one for one in found["findings"] if one.startswith("project p cannot change")], found
    assert found["repairable"] == 1 or case == "lost"
    mended = await mq.repair(queue, project="p")
    assert not [one for one in mended["findings"] if "cannot be examined" in one], mended
    await queue.claim("T", "alice")
    revs = [int(entry[0].split("-")[0]) for entry in db.xrange(events)]
    assert revs == sorted(revs)
    assert revs[:2] + revs[-1:] == [1, 2, int((await queue.get("T"))["rev"])]
    assert "project p" not in str((await mq.doctor(queue, project="p"))["findings"])


# ---- notes ----


async def test_whoever_claims_a_task_reads_its_notes(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
    """The last 20, newest last; each way to a task shows them, and they outlive its completion."""
    await create(queue, "T", lane="coding")
    for n in range(25):
        await queue.note("T", f"finding {n}", agent="alice")
    (task,) = (await queue.next("bob", lane="coding"))["tasks"]
    assert [note["text"] for note in task["notes"]] == [f"finding {n}" for n in range(5, 25)]
    assert task["noteCount"] == 25
    assert {note["agent"] for note in task["notes"]} == {"alice"}
    assert abs(task["notes"][-1]["at"] - task["claimedAt"]) < 60_000
    await queue.complete("T")
    for whole in (await queue.get("T"), (await queue.records("p", ["T"]))[1]["T"]):
        assert whole["notes"] == task["notes"]
    assert (await mq.explain(queue, "T"))["task"]["notes"] == task["notes"]
    await queue.delete("T")
    assert not db.keys("*:notes:T")
    assert sound(db, shim) == []


async def test_notes_take_16_kib_at_most(queue: mq.Queue) -> None:
    await create(queue, "T")
    for n in range(6):
        await queue.note("T", f"{n}" * 4000)
    task = await queue.get("T")
    assert [note["text"][0] for note in task["notes"]] == ["2", "3", "4", "5"]
    assert task["noteCount"] == 6


# ---- several at once ----


async def test_next_takes_up_to_so_many(
    config: mq.Config, db: redis.Redis, shim: Shim, server: Server
) -> None:
    """The best of them in their order, each with its own lease, fence, rev and event; a cap holds;
    a repeat tells the same tasks."""
    config.set("lanes.coding.maxConcurrent", 2, "test")
    async with mq.Queue(config) as queue:
        for n in range(4):
            await create(queue, f"C{n}", lane="coding", priority="high")
        for n in range(3):
            await create(queue, f"A{n}")
        db.zadd("mosaic:queue:project:{p}:ready:any", {"ghost": 1})
        taken = (await queue.next("alice", count=4, op="same"))["tasks"]
        assert [task["taskId"] for task in taken] == ["C0", "C1", "A0", "A1"]
        assert len({task["fence"] for task in taken}) == 4
        assert [task["rev"] for task in taken] == [8, 9, 10, 11]
        before = key_space(server)
        again = (await queue.next("alice", count=4, op="same"))["tasks"]
        assert key_space(server) == before
        for name in ("taskId", "fence", "rev"):
            assert [task[name] for task in again] == [task[name] for task in taken]
        assert len(queue.leases) == 4
        assert [task["taskId"] for task in (await queue.next("bob", count=9))["tasks"]] == ["A2"]
        assert (await queue.next("bob", count=9))["tasks"] == []
        for task in taken:
            await queue.complete(task["id"], agent="alice")
        assert sound(db, shim) == []
