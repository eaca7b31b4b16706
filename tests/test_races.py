"""Fifty real processes want the same task: one gets it, and the others are told who.

The processes live as long as a race; what starts a round is a barrier in Valkey, so that all
claims of a round are on their way at once.  Through the command line every round needs processes
of its own; each waits for the end of a configuration file that is a pipe.  Fifty that load their
libraries at once are slow: the deadline of an operation is a minute here.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import BINARIES, FOLDER, Server

import mosaic_queue as mq

PROCESSES, ROUNDS, DRAINED = 50, 100, 2000

# The last argument is a pipe at which all of them wait.
COMMAND = (
    f"import sys; open(sys.argv.pop()).read(); sys.path.insert(0, {FOLDER!r}); "
    "import mosaic_queue as mq; "
    "mq.Queue.__init__.__kwdefaults__['deadline'] = 60; sys.exit(mq.main())"
)

# argv: url, agent, rounds, tasks to drain.  The last to arrive at the barrier lets all pass.  Each
# drains in an order of its own, so that at every task some come first and some too late.
WORKER = f"""
import asyncio, json, random, sys
sys.path.insert(0, {FOLDER!r})
import redis
import mosaic_queue as mq

url, agent, rounds, drained = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
client = redis.Redis.from_url(url, socket_timeout=None)

def barrier(name):
    if client.incr("here:" + name) == {PROCESSES}:
        client.rpush("go:" + name, *range({PROCESSES}))
    client.blpop("go:" + name)

async def claim(queue, task):
    try:
        return ["OK", (await queue.claim(task, agent))["fence"], agent]
    except mq.Refused as problem:
        return [problem.code, problem.message, agent]

async def main():
    config = mq.Config(environ={{}}).set("redis.url", url, "test").set("project", "p", "test")
    async with mq.Queue(config, deadline=60) as queue:
        await queue.get("R0")
        for n in range(rounds):
            barrier(f"round {{n}}")
            client.rpush(f"said:{{n}}", json.dumps(await claim(queue, f"R{{n}}")))
        barrier("drain")
        for tried, n in enumerate(random.sample(range(drained), drained)):
            if tried % 20 == 0 and not client.exists("mosaic:queue:project:{{p}}:ready:any"):
                break
            code, fence, _ = await claim(queue, f"D{{n}}")
            if code == "OK":
                client.rpush("drained", json.dumps([f"D{{n}}", fence, agent]))
            elif code != "HELD":
                client.rpush("drained", json.dumps([f"D{{n}}", code, agent]))

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    """A server that belongs to the races alone; what they show does not depend on its kind."""
    running = Server(str(BINARIES["valkey"]()))
    yield running
    running.close()


@pytest.fixture
def db(valkey: Server) -> Iterator[redis.Redis]:
    with valkey.client() as client:
        client.flushall()
        yield client


def enter(valkey: Server, names: list[str]) -> None:
    """Create tasks of these names in project `p`."""

    async def create() -> None:
        config = mq.Config(environ={}).set("redis.url", valkey.url, "test")
        async with mq.Queue(config) as queue:
            for at in range(0, len(names), mq.BATCH):
                rows: list[Any] = [
                    {"taskId": name, "mission": "m", "title": "a task"}
                    for name in names[at : at + mq.BATCH]
                ]
                await queue.create_all(rows, project="p")

    asyncio.run(create())


def claims(db: redis.Redis) -> dict[str, list[tuple[int, str]]]:
    """Of each task the fence and the agent of every claim that the event stream tells of."""
    told: dict[str, list[tuple[int, str]]] = {}
    for _, fields in db.xrange("mosaic:queue:project:{p}:events"):
        task, op, _, _, _, fence, agent, *_ = fields["e"].split("\t")
        if op == "claim":
            told.setdefault(task, []).append((int(fence), agent))
    return told


def test_fifty_processes(valkey: Server, db: redis.Redis) -> None:
    """100 rounds with one winner each; then 2,000 tasks, each taken once."""
    enter(valkey, [f"R{n}" for n in range(ROUNDS)] + [f"D{n}" for n in range(DRAINED)])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, valkey.url, f"agent-{n}.", str(ROUNDS), str(DRAINED)],
            stderr=subprocess.PIPE, text=True,
        )
        for n in range(PROCESSES)
    ]  # fmt: skip
    try:
        for worker in workers:
            _, problem = worker.communicate(timeout=300)
            assert worker.returncode == 0, problem
    finally:
        for worker in workers:
            worker.kill()

    told = claims(db)
    for n in range(ROUNDS):
        said = [json.loads(one) for one in db.lrange(f"said:{n}", 0, -1)]
        ((_, fence, winner),) = [one for one in said if one[0] == "OK"]
        losers = [one for one in said if one[0] == "HELD"]
        assert len(losers) == PROCESSES - 1
        assert all(f"is held by {winner} " in message for _, message, _ in losers)
        assert told[f"R{n}"] == [(fence, winner)]

    drained = [json.loads(one) for one in db.lrange("drained", 0, -1)]
    assert sorted(task for task, _, _ in drained) == sorted(f"D{n}" for n in range(DRAINED))
    assert all(told[task] == [(fence, agent)] for task, fence, agent in drained)
    fences = [fence for rows in told.values() for fence, _ in rows]
    assert len(set(fences)) == ROUNDS + DRAINED
    held = db.zcard("mosaic:queue:project:{p}:running:any")
    assert held == ROUNDS + DRAINED
    assert len({agent for _, _, agent in drained}) > 1, "one process took everything: no race"


@pytest.mark.long
def test_fifty_command_lines(valkey: Server, db: redis.Redis, tmp_path: Path) -> None:
    """One exits with 0; 49 exit with 4, and name the one."""
    enter(valkey, ["T0", "T1"])
    clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    for task in ("T0", "T1"):
        pipes = [tmp_path / f"{task}-{n}.yaml" for n in range(PROCESSES)]
        for pipe in pipes:
            os.mkfifo(pipe)
        running = [
            subprocess.Popen(
                [sys.executable, "-c", COMMAND, "claim", task, "--agent", f"agent-{n}.",
                 "--project", "p", "--url", valkey.url, str(pipe)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean, cwd=tmp_path,
            )
            for n, pipe in enumerate(pipes)
        ]  # fmt: skip
        # Opening waits for the reader; the end of the file comes when all have arrived.
        ends = [os.open(pipe, os.O_WRONLY) for pipe in pipes]
        for end in ends:
            os.close(end)
        said = [process.communicate(timeout=300) for process in running]
        statuses = [process.returncode for process in running]
        assert Counter(statuses) == {0: 1, 4: PROCESSES - 1}, said
        winner = f"agent-{statuses.index(0)}."
        for status, (_, stderr) in zip(statuses, said, strict=True):
            assert status == 0 or f"is held by {winner} " in stderr
        assert [agent for _, agent in claims(db)[task]] == [winner]
