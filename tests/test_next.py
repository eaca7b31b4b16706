"""`next`: waiting for work, being told why there is none, and giving up without a trace.

What 200 waiters cost is counted in commands of clients (EVALSHA, BLPOP), as the server's own
statistics have them: a script's inner calls are another matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import BINARIES, FOLDER, PROGRAM, Server, Shim, one_engine, until

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
ROOT = "mosaic:queue:project:{p}"
AT_ONCE = 8  # s; a waiter that was not woken would look after 10
WAITERS = 200
OURS = ("evalsha", "eval", "blpop", "info")  # all that a waiter may send
Offers = Sequence["asyncio.Task[mq.Offer]"]


server = one_engine()


def commands(db: redis.Redis) -> Counter[str]:
    """How often clients have sent each command of a waiter."""
    stats = db.info("commandstats")
    rows = {name: stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in OURS}
    return Counter(rows)


async def create(queue: mq.Queue, *names: str, **rest: Any) -> None:
    for at in range(0, len(names), mq.BATCH):
        rows: list[Any] = [
            {"mission": "m", "title": "a task", "taskId": name, **rest}
            for name in names[at : at + mq.BATCH]
        ]
        await queue.create_all(rows, project="p")


def blocked(db: redis.Redis) -> int:
    return int(db.info("clients")["blocked_clients"])


@contextlib.asynccontextmanager
async def waiters(
    config: mq.Config, db: redis.Redis, many: int = WAITERS, **wants: Any
) -> AsyncIterator[list[asyncio.Task[mq.Offer]]]:
    """Agents that wait for a task, each with connections of its own as if in its own process.

    They are connected before the first one asks: all have to wait before any asks again.
    """
    async with contextlib.AsyncExitStack() as stack:
        queues = [mq.Queue(config, session=f"s{n}") for n in range(many)]
        for queue in queues:
            await stack.enter_async_context(queue)
            await queue.link.check()
        asked = {"wait": 300} | wants
        waiting = [
            asyncio.create_task(queue.next(f"agent-{n}", **asked)) for n, queue in enumerate(queues)
        ]
        try:
            if "mission" not in wants:
                await until(lambda: blocked(db) + sum(map(asyncio.Task.done, waiting)) == many)
            yield waiting
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)


def given(waiting: Offers) -> list[str]:
    """The tasks that were handed out so far."""
    done = [task.result() for task in waiting if task.done()]
    return [task["taskId"] for offer in done for task in offer["tasks"]]


# ---- 200 waiters ----


async def test_one_task_wakes_one_of_200_waiters(
    queue: mq.Queue, config: mq.Config, db: redis.Redis
) -> None:
    await create(queue, "T0", delay=604800)  # the project is there, and nothing is ready
    async with waiters(config, db) as waiting:
        before = commands(db)
        await create(queue, "T1")
        await until(lambda: given(waiting))
        await asyncio.sleep(0.5)
        assert given(waiting) == ["T1"]
        assert blocked(db) == WAITERS - 1
        sent = commands(db) - before
        # create, next of the one, and a next of one more whom its ring may have woken.
        assert sent["evalsha"] <= 4, sent
        assert sent["blpop"] <= 2, sent


async def test_200_waiters_and_200_tasks(
    queue: mq.Queue, config: mq.Config, db: redis.Redis
) -> None:
    names = [f"T{n}" for n in range(WAITERS)]
    await create(queue, "later", delay=604800)
    async with waiters(config, db) as waiting:
        await create(queue, *names)
        await until(lambda: all(task.done() for task in waiting))
        assert sorted(given(waiting)) == sorted(names)
    assert db.zcard(f"{ROOT}:running:any") == WAITERS
    assert not db.exists(f"{ROOT}:ready:any")


async def test_200_idle_waiters_cost_45_commands_a_second_at_most(
    queue: mq.Queue, config: mq.Config, db: redis.Redis
) -> None:
    """They began together and so ask together, every 10 s: the window is a round and a bit."""
    await create(queue, "later", delay=604800)
    async with waiters(config, db) as waiting:
        before, began = commands(db), time.monotonic()
        await asyncio.sleep(11)
        sent = (commands(db) - before).total()
        assert not given(waiting)
        took = time.monotonic() - began
    assert WAITERS <= sent <= 45 * took, f"{sent / took:.1f} commands a second"


async def test_a_mission_without_work_beside_one_with_work_is_no_busy_loop(
    queue: mq.Queue, config: mq.Config, db: redis.Redis
) -> None:
    """Bells ring for every mission; who wants one alone asks once a second."""
    await create(queue, *(f"T{n}" for n in range(50)), mission="other")
    async with waiters(config, db, 20, mission="mine") as waiting:
        await asyncio.sleep(0.5)
        before, began = commands(db), time.monotonic()
        await asyncio.sleep(3)
        sent = (commands(db) - before).total()
        took = time.monotonic() - began
        assert sent <= 20 * (took + 1), f"{sent} in {took:.1f} s"
        await create(queue, "M1", mission="mine")
        await until(lambda: given(waiting), AT_ONCE)
        assert given(waiting) == ["M1"]


async def test_150_waiters_of_one_process(queue: mq.Queue, db: redis.Redis) -> None:
    """A server for many agents has one Queue; each of its waiters needs a connection."""
    await create(queue, "later", delay=604800)
    waiting = [asyncio.create_task(queue.next(f"agent-{n}", wait=300)) for n in range(150)]
    try:
        await until(lambda: blocked(db) == 150)
        await create(queue, *(f"T{n}" for n in range(150)))
        await until(lambda: all(task.done() for task in waiting))
        assert len(set(given(waiting))) == 150
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


# ---- a project that is not there yet ----


async def test_a_worker_may_start_before_the_first_task(config: mq.Config) -> None:
    """Its project is not there: nothing is ready, and it waits until somebody creates one."""
    async with mq.Queue(config, session="s") as worker, mq.Queue(config) as boss:
        nothing = await worker.next("alice")
        assert nothing == {"tasks": [], "why": "there is no project p yet"}
        waiting = asyncio.create_task(worker.next("alice", wait=60))
        await asyncio.sleep(0.2)
        await boss.create("p", "m", "T1", title="a task")
        (task,) = (await asyncio.wait_for(waiting, AT_ONCE))["tasks"]
        assert task["taskId"] == "T1"


async def test_asking_for_work_makes_no_project(queue: mq.Queue, db: redis.Redis) -> None:
    await queue.next("alice", lane="coding", mission="m")
    assert db.keys("*") == []


async def test_a_project_that_was_mistyped_is_told(queue: mq.Queue) -> None:
    await queue.create("fleet", "m", "T1", title="a task")
    nothing = await queue.next("alice", project="flet")
    assert nothing["why"] == "there is no project flet yet; did you mean fleet?"
    assert await queue.assign(agent="bob", project="flet") == nothing


# ---- what wakes a waiter ----


async def test_waiters_survive_a_killed_server(tmp_path: Path) -> None:
    own = Server(str(BINARIES["valkey"]()), "--appendonly", "yes", "--appendfsync", "always")
    config = mq.Config(environ={}).set("redis.url", own.url, "t").set("project", "p", "t")
    try:
        async with mq.Queue(config, session="boss") as queue:
            await create(queue, "later", delay=604800)
            async with waiters(config, own.client(), 20) as waiting:
                own.kill()
                await asyncio.sleep(1)
                own.start()
                assert not any(task.done() for task in waiting)
                await create(queue, *(f"T{n}" for n in range(20)))
                await until(lambda: all(task.done() for task in waiting))
                assert len(set(given(waiting))) == 20
    finally:
        own.close()


async def test_a_delayed_task_reaches_a_waiter_without_a_monitor(
    queue: mq.Queue, config: mq.Config, db: redis.Redis
) -> None:
    await create(queue, "T1", delay=3)
    due = (await queue.get("T1"))["notBefore"]
    async with waiters(config, db, 3) as waiting:
        await until(lambda: given(waiting), AT_ONCE)
        assert (await queue.get("T1"))["claimedAt"] >= due


async def test_what_makes_a_task_ready_wakes_a_waiter_at_once(
    queue: mq.Queue, config: mq.Config, db: redis.Redis
) -> None:
    """Release, redrive, reopen, unblock, unpause, completion, room in a lane."""
    await create(queue, "done", "T1")
    await queue.claim("done", "x")
    await queue.complete("done", agent="x")
    await queue.claim("T1", "x")
    await create(queue, "after", dependencies=["T1"])

    async def wakes(step: Any, name: str) -> None:
        """The step makes the task ready, and a waiter has it in no time."""
        async with waiters(config, db, 2) as waiting:
            await step
            await until(lambda: given(waiting), AT_ONCE)
            assert given(waiting) == [name]
        await queue.release(name, force=True)
        await queue.claim(name, "x")

    await wakes(queue.release("T1", agent="x"), "T1")
    await queue.fail("T1", agent="x", reason="no", retry=False)
    await wakes(queue.redrive("T1"), "T1")
    await queue.block("T1", agent="x", reason="wait")
    await wakes(queue.unblock("T1"), "T1")
    await wakes(queue.reopen("done", reason="not yet"), "done")
    await wakes(queue.complete("T1", agent="x"), "after")
    await queue.release("after", agent="x")
    await queue.pause()
    await wakes(queue.unpause(), "after")


async def test_room_in_a_full_lane_wakes_a_waiter(
    queue: mq.Queue, config: mq.Config, db: redis.Redis
) -> None:
    config.set("lanes.coding.maxConcurrent", 1, "file")
    await create(queue, "T1", "T2", lane="coding")
    await queue.claim("T1", "x")
    async with waiters(config, db, 2, lane="coding") as waiting:
        await queue.complete("T1", agent="x")
        await until(lambda: given(waiting), AT_ONCE)
        assert given(waiting) == ["T2"]


# ---- why there is nothing ----


async def why(queue: mq.Queue, **wants: Any) -> str:
    offer = await queue.next("alice", **wants)
    assert offer["tasks"] == []
    return offer["why"]


async def test_it_says_that_nothing_is_ready(queue: mq.Queue) -> None:
    await create(queue, "T1")
    await queue.claim("T1", "bob")
    assert await why(queue) == "nothing is ready"


async def test_it_says_who_fills_a_lane(queue: mq.Queue, config: mq.Config) -> None:
    config.set("lanes.coding.maxConcurrent", 1, "file")
    await create(queue, "T1", "T2", lane="coding")
    await queue.claim("T1", "bob")
    said = await why(queue, lane="coding")
    for part in ("coding", "1 held", "T1", "bob"):
        assert part in said, said


async def test_it_does_not_blame_a_full_lane_that_has_nothing_ready(
    queue: mq.Queue, config: mq.Config
) -> None:
    config.set("lanes.coding.maxConcurrent", 1, "file")
    await create(queue, "T1", lane="coding")
    await queue.claim("T1", "bob")
    assert (await why(queue)).startswith("nothing is ready")


async def test_it_says_since_when_a_project_is_paused(queue: mq.Queue) -> None:
    await create(queue, "T1")
    await queue.pause()
    said = await why(queue)
    assert "paused since 2" in said
    assert "ago)" in said


async def test_it_says_when_the_next_task_is_due(queue: mq.Queue) -> None:
    await create(queue, "T1", delay=90)
    said = await why(queue)
    assert "due at 2" in said
    assert "(1 min from now)" in said


async def test_it_says_that_a_mission_is_not_among_the_first_1000(queue: mq.Queue) -> None:
    """Looking further would cost everybody time; the claimer learns why its task is not found."""
    await create(queue, *(f"T{n}" for n in range(1000)), mission="other")
    await create(queue, "M1", mission="mine")
    said = await why(queue, mission="mine")
    assert said == "nothing of mission mine is among the first 1000 ready tasks"
    await queue.claim("T0", "bob")
    assert (await queue.next("alice", mission="mine"))["tasks"][0]["taskId"] == "M1"


@pytest.mark.parametrize("wait", [-1, 10**9, 3601])
async def test_a_wait_out_of_range_is_refused(queue: mq.Queue, wait: int) -> None:
    await create(queue, "T1")
    with pytest.raises(mq.Refused, match=f"wait is '?{wait}'?; accepted: .*0 to 3600") as refused:
        await queue.next("alice", wait=wait)
    assert refused.value.code == "INVALID"


@pytest.mark.parametrize("wait", ["-1", "1000000000", "1.5", "x"])
def test_a_wait_out_of_range_ends_a_command_with_2(
    config: mq.Config, tmp_path: Path, wait: str
) -> None:
    words = ["next", "--project", "p", "--url", config["redis.url"], "--wait", wait]
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *words], capture_output=True, text=True, env=environ
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("INVALID: ")


# ---- assignments ----


async def test_with_policy_assign_a_waiter_takes_nothing_itself(
    queue: mq.Queue, config: mq.Config
) -> None:
    """Also not in the last moment of its wait: the orchestrator decides who gets what."""
    config.set("defaults.assign", True, "file")
    await create(queue, "T1")
    assert await queue.next("alice", wait=1) == {"tasks": [], "why": "nothing was assigned"}


async def test_who_does_not_wait_takes_the_best_itself(queue: mq.Queue, config: mq.Config) -> None:
    config.set("defaults.assign", True, "file")
    await create(queue, "T1")
    assert (await queue.next("alice"))["tasks"][0]["taskId"] == "T1"


# ---- one name, two processes ----

TWIN = f"""
import asyncio, json, sys
sys.path.insert(0, {FOLDER!r})
import mosaic_queue as mq

async def main():
    config = mq.Config(environ={{}}).set("redis.url", sys.argv[1], "t").set("project", "p", "t")
    async with mq.Queue(config, session=sys.argv[2]) as queue:
        sys.stdin.readline()
        while tasks := (await queue.next("twin"))["tasks"]:
            print(json.dumps([tasks[0]["taskId"], tasks[0]["fence"]]), flush=True)

asyncio.run(main())
"""


async def test_two_processes_of_one_name_never_hold_one_task(
    queue: mq.Queue, server: Server
) -> None:
    names = [f"T{n}" for n in range(200)]
    await create(queue, *names)
    twins = [
        subprocess.Popen(
            [sys.executable, "-c", TWIN, server.url, f"session{n}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for n in range(3)
    ]  # fmt: skip
    for twin in twins:
        assert twin.stdin
        twin.stdin.write("go\n")
        twin.stdin.flush()
    said = [twin.communicate(timeout=120)[0].splitlines() for twin in twins]
    held = [json.loads(line) for lines in said for line in lines]
    assert sorted(task for task, _ in held) == sorted(names)
    assert len({fence for _, fence in held}) == 200


# ---- what an earlier session left behind ----


async def test_a_later_session_takes_over_what_an_earlier_one_left(config: mq.Config) -> None:
    async with mq.Queue(config, session="s1") as old, mq.Queue(config, session="s2") as new:
        await create(old, "T1", "T2")
        first = (await old.next("alice"))["tasks"][0]
        await mq.leave(old)
        again = (await new.next("alice"))["tasks"][0]
        assert again["taskId"] == first["taskId"] == "T1"
        assert again["fence"] > first["fence"]
        with pytest.raises(mq.Refused) as refused:
            await old.complete("T1", agent="alice")
        assert refused.value.code == "STALE_SESSION"
        assert (await new.next("alice"))["tasks"][0]["taskId"] == "T2"
        assert (await new.complete("T1", agent="alice"))["status"] == "completed"


async def test_what_a_living_session_holds_is_not_taken_over(config: mq.Config) -> None:
    async with mq.Queue(config, session="s1") as old, mq.Queue(config, session="s2") as new:
        await create(old, "T1")
        await old.next("alice")
        assert not (await new.next("alice"))["tasks"]
        assert not (await old.next("alice"))["tasks"]


async def test_two_thirds_of_a_lease_without_renewal_are_as_good_as_a_word(
    config: mq.Config, shim: Shim
) -> None:
    async with mq.Queue(config, session="s1") as old:
        await create(old, "T1")
        await old.next("alice", ttl=3000)
        shim.seconds = 1900
        async with mq.Queue(config, session="s2") as other:
            assert not (await other.next("bob"))["tasks"]
        shim.seconds = 2100
        async with mq.Queue(config, session="s3") as new:
            assert (await new.next("alice"))["tasks"][0]["taskId"] == "T1"


async def test_resume_gives_back_what_this_session_holds(config: mq.Config) -> None:
    async with mq.Queue(config, session="s1") as queue:
        await create(queue, "T1", "T2")
        first = (await queue.next("alice"))["tasks"][0]
        again = (await queue.next("alice", resume=True))["tasks"][0]
        assert again["taskId"] == first["taskId"]
        assert again["fence"] > first["fence"]


async def test_what_was_left_behind_is_of_the_lane_and_mission_asked_for(
    config: mq.Config, shim: Shim
) -> None:
    """A command for coding tasks, or for one mission, is not run for any other task."""
    async with mq.Queue(config, session="s1") as old:
        await old.create("p", "m", "P1", title="a plan", lane="planning")
        await old.create("p", "m", "T1", title="a task")
        for name in ("P1", "T1"):
            await old.claim(name, "alice", ttl=600)
    shim.seconds = 500
    async with mq.Queue(config, session="s2") as new:
        assert not (await new.next("alice", mission="other"))["tasks"]
    async with mq.Queue(config, session="s3") as new:
        offer = await new.next("alice", lane="coding", mission="m")
        assert [task["taskId"] for task in offer["tasks"]] == ["T1"], "any is of every lane"
    async with mq.Queue(config, session="s4") as new:
        offer = await new.next("alice", lane="planning", mission="m")
        assert [task["taskId"] for task in offer["tasks"]] == ["P1"]


async def test_a_restarted_agent_gets_its_task_whenever_that_is_due_to_it(
    config: mq.Config, shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks before two thirds of the lease are over, and again afterwards."""
    monkeypatch.setattr(mq, "LOOK_BACK", 0)
    async with mq.Queue(config, session="s1") as old:
        await old.create("p", "m", "T1", title="a task")
        await old.claim("T1", "alice", ttl=30)
    async with mq.Queue(config, session="s2") as new:
        shim.seconds = 1
        assert not (await new.next("alice"))["tasks"]
        shim.seconds = 21
        (task,) = (await new.next("alice"))["tasks"]
        assert (task["taskId"], task["session"]) == ("T1", "s2")
        shim.seconds = 50
        assert not (await new.next("alice"))["tasks"], "what it holds is its own"


# ---- cancelled ----


async def moment(seconds: float) -> None:
    """Let others run so long; a timer of the loop is no finer than a millisecond."""
    over = time.monotonic() + seconds
    while time.monotonic() < over:
        await asyncio.sleep(0)


async def test_a_cancelled_next_leaves_nothing_claimed(queue: mq.Queue, db: redis.Redis) -> None:
    """At 200 random moments, sooner after each that was too late and later else; what was answered
    in time is released by hand."""
    await create(queue, "T1", "T2")
    await queue.get("T1")
    rng, cut, most = random.Random(3), 0, 0.0015
    for n in range(200):
        asked = asyncio.create_task(queue.next("alice"))
        await moment(rng.uniform(0, most))
        asked.cancel()
        try:
            await queue.release((await asked)["tasks"][0]["id"], agent="alice")
            most *= 0.8
        except asyncio.CancelledError:
            cut += 1
            most *= 1.25
        assert not db.exists(f"{ROOT}:running:any"), f"round {n}"
        assert db.zcard(f"{ROOT}:ready:any") == 2
    assert cut > 20, "hardly anything was cut off: no test"
    assert not queue.leases


async def test_a_cancelled_wait_leaves_nothing_claimed(
    queue: mq.Queue, config: mq.Config, db: redis.Redis
) -> None:
    """The task comes at about the moment of the cancellation, which comes from asyncio itself."""
    await create(queue, "later", delay=604800)
    rng = random.Random(4)
    async with mq.Queue(config, session="s") as other:
        for n in range(100):
            waiting = asyncio.create_task(other.next("alice", wait=20))
            await moment(rng.uniform(0, 0.003))
            await create(queue, f"T{n}")
            await moment(rng.uniform(0, 0.002))
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                offer = await waiting
                await other.release(offer["tasks"][0]["id"], agent="alice")
            assert not db.exists(f"{ROOT}:running:any"), f"round {n}"
            await queue.delete(f"T{n}")


async def test_overviews_show_who_waits(queue: mq.Queue, db: redis.Redis) -> None:
    """By lane, with the mission; who has given up, was cancelled or got a task is not shown."""
    await create(queue, "T1", lane="coding")
    explained = await queue_explain(queue)
    assert "lane coding: 1 ready, 0 held; nobody works there" in explained["why"]
    assert any("next --project p --lane coding" in step for step in explained["todo"])
    assert "nobody works there" in mq.status_text(await mq.status(queue, project="p"))
    assert (await queue.next("ann", project="p", wait=5))["tasks"], "it never waited"
    wants = [{"lane": "coding"}, {"lane": "planning"}, {"mission": "other"}, {}]
    asked = [asyncio.create_task(queue.next(f"w{n}", project="p", wait=60, **want))
             for n, want in enumerate(wants)]  # type: ignore[arg-type]  # fmt: skip
    await until(lambda: db.zcard(f"{ROOT}:claimers") == len(asked))
    named = {"project": "p"}
    found = await mq.agents(queue, project="p")
    assert sorted(found["waiting"], key=lambda one: one["agent"]) == [
        {"agent": "w0", "lane": "coding"} | named, {"agent": "w1", "lane": "planning"} | named,
        {"agent": "w2", "mission": "other"} | named, {"agent": "w3"} | named,
    ]  # fmt: skip
    text = mq.agents_text(found)
    assert "lane coding: w0" in text
    assert "any lane: w2 (mission other), w3" in text
    why = (await queue_explain(queue))["why"]
    assert any("lane coding" in one and one.endswith("w0, w2 (mission other), w3") for one in why)
    await create(queue, "T2", lane="planning")
    assert (await asyncio.wait_for(asked[1], AT_ONCE))["tasks"]
    for one in asked:
        one.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    assert not (await mq.status(queue, project="p"))["projects"][0]["waiting"]
    assert (await queue.next("w9", project="p", wait=1))["tasks"] == []
    await asyncio.sleep(0.01)  # the last look may count as waiting for a millisecond
    assert not (await mq.agents(queue, project="p"))["waiting"]


async def test_who_waits_and_dies_is_forgotten(queue: mq.Queue, db: redis.Redis) -> None:
    await create(queue, "T1")
    await queue.claim("T1", agent="ann", project="p")
    waiting = asyncio.create_task(queue.next("bob", project="p", wait=60))
    await until(lambda: db.zcard(f"{ROOT}:claimers") == 1)
    (score,) = [score for _, score in db.zrange(f"{ROOT}:claimers", 0, -1, withscores=True)]
    assert score - 1000 * db.time()[0] <= 16_000
    explained = await mq.explain(queue, "T1", project="p")
    assert explained["why"]
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def queue_explain(queue: mq.Queue) -> mq.Explanation:
    return await mq.explain(queue, project="p")


async def test_a_claim_costs_by_the_lanes_that_have_work(
    server: Server, config: mq.Config, db: redis.Redis
) -> None:
    """Of 32 lanes with caps three have ready tasks, which come by priority and age; a lane whose
    cap is reached is passed over, and said when nothing else is left."""
    for n in range(29):
        config.set(f"lanes.l{n}.maxConcurrent", 2, "file")
    async with mq.Queue(config) as queue:
        for n, lane in enumerate(("l28", "l3", "l28", "l17", "l28")):
            priority = "high" if lane == "l17" else "medium"
            await queue.create("p", "m", f"T{n}", title="t", lane=lane, priority=priority)
        assert (await queue.next("alice"))["tasks"][0]["taskId"] == "T3"
        db.config_resetstat()
        got = [(await queue.next("alice"))["tasks"][0]["taskId"] for _ in range(3)]
        calls = {name: row["calls"] for name, row in db.info("commandstats").items()}
        assert got == ["T0", "T1", "T2"]
        own = ("cmdstat_evalsha", "cmdstat_config|resetstat", "cmdstat_info")
        assert sum(count for name, count in calls.items() if name not in own) <= 3 * 40
        answer = await queue.next("alice")
        assert answer["tasks"] == []
        assert answer["why"].startswith("lane l28 has its 2 held tasks: T0 of alice, T2 of alice")
