"""Every operation from every status, as one table; and who may do it to a held task.

A cell is the status afterwards, `-` for a task that is gone or never was, or the code of the
refusal.  A refusal leaves every byte of the key space as it was, receipts included; whatever
happens, the key space is sound afterwards.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
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
    """A queue whose project has one task `other` that nothing depends on."""
    async with mq.Queue(config) as opened:
        await create(opened, "other")
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
    "fail delay force": lambda queue: queue.fail("T", reason="broken", force=True, delay=50),
    "fail hard force": lambda queue: queue.fail("T", reason="x", force=True, retry=False),
    "reap": lambda queue: queue.reap(),
    "reap later": lambda queue: queue.reap(),
    "delete": lambda queue: queue.delete("T"),
    "delete force": lambda queue: queue.delete("T", force=True),
}

SHORT = {"N": "NOT_FOUND", "W": "WRONG_STATUS"}
MATRIX = """
                 absent  pending   delayed   blocked   claimed     in-progress completed failed
create           pending EXISTS    EXISTS    EXISTS    EXISTS      EXISTS      EXISTS    EXISTS
claim            N       claimed   NOT_DUE   BLOCKED   HELD        HELD        W         W
start            N       W         W         W         in-progress W           W         W
heartbeat        N       W         W         W         claimed     in-progress W         W
progress         N       W         W         W         claimed     in-progress W         W
release          N       W         W         W         pending     pending     W         W
release_delay    N       W         W         W         pending     pending     W         W
complete         N       W         W         W         completed   completed   W         W
complete_force   N       completed completed completed completed   completed   W         completed
fail             N       W         W         W         pending     pending     W         W
fail_hard        N       W         W         W         failed      failed      W         W
fail_force       N       pending   pending   blocked   pending     pending     W         pending
fail_delay_force N       pending   pending   blocked   pending     pending     W         pending
fail_hard_force  N       failed    failed    failed    failed      failed      W         failed
reap             -       pending   pending   blocked   claimed     in-progress completed failed
reap_later       -       pending   pending   blocked   pending     pending     completed failed
delete           N       -         -         -         HELD        HELD        -         -
delete_force     N       -         -         -         -           -           -         -
"""


def cells() -> list[Any]:
    head, *rows = MATRIX.strip("\n").splitlines()
    made = []
    for row in rows:
        name, *outcomes = row.split()
        for status, outcome in zip(head.split(), outcomes, strict=True):
            outcome = SHORT.get(outcome, outcome)
            name = name.replace("_", " ")
            made.append(pytest.param(name, status, outcome, id=f"{name}-{status}"))
    assert len({case.values[0] for case in made}) == len(OPERATIONS)
    return made


@pytest.mark.parametrize(("operation", "status", "outcome"), cells())
async def test_matrix(
    queue: mq.Queue, db: redis.Redis, server: Server, shim: Shim,
    operation: str, status: str, outcome: str,
) -> None:
    await reach(queue, status)
    assert sound(db, shim) == []
    if operation == "reap later":
        shim.seconds = LATER

    if outcome in mq.CODES:
        assert await refused(server, OPERATIONS[operation](queue)) == outcome
    else:
        answer = await OPERATIONS[operation](queue)
        assert await fate(db) == outcome
        if operation not in ("reap", "reap later", "delete", "delete force"):
            assert answer["status"] == outcome
    assert sound(db, shim) == []


async def test_what_create_refuses(
    queue: mq.Queue, db: redis.Redis, server: Server, shim: Shim
) -> None:
    new = {"mission": "m", "title": "a task"}
    for code, tasks in (
        ("NOT_FOUND", [new | {"taskId": "A", "dependencies": ["nobody"]}]),
        ("CYCLE", [new | {"taskId": "A", "dependencies": ["A"]}]),
        ("CYCLE", [new | {"taskId": "A", "dependencies": ["B"]},
                   new | {"taskId": "B", "dependencies": ["A"]}]),
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


async def test_an_unfinished_dependent_protects_its_dependency(
    queue: mq.Queue, db: redis.Redis, server: Server, shim: Shim
) -> None:
    await reach(queue, "blocked")
    assert await refused(server, queue.delete("other")) == "HAS_DEPENDENTS"
    await queue.complete("other", force=True)
    assert await refused(server, queue.delete("other")) == "HAS_DEPENDENTS"
    await queue.complete("T", force=True)
    await queue.delete("other")
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
        {"agent": "alice", "session": "s1", "fence": 1}, "STALE_FENCE",
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


async def test_an_old_fence_is_stale_after_the_next_claim(
    queue: mq.Queue, server: Server
) -> None:
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


async def test_late_completion_by_the_holder(
    queue: mq.Queue, db: redis.Redis, shim: Shim
) -> None:
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
    assert await refused(server, queue.claim("T", "bob")) == "HELD"
    shim.uptime = 60
    assert (await queue.reap())["reaped"] == ["p/T"]
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
