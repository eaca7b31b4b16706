"""Twenty agents, and everything around them killed at random.

    python tests/storm.py [--seconds N] [--restarts N] [--agents N] [--seed N]

Agents in processes of their own loop next, start, heartbeat and complete, now and then fail or
release; all the while one of them or the monitor is killed with SIGKILL and started again, and in
the first half of the time the server too, which keeps an append-only file.  Then it is quiet, and
the agents finish what there is.  In the end every task has one accepted completion, as the event
stream has it, no slot of a lane is taken, and `doctor` finds nothing.

After a start of the server no lease is ended for a minute, so a run takes that much longer than
its seconds; with --no-grace leases are ended from here, as by a server that has been up for long.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import redis

import mosaic_queue as mq

ROOT = "mosaic:queue:project:{p}"
TTL = 3  # s of an agent's lease
CAP = 4  # held tasks of lane coding
EXPECTED = {"UNREACHABLE", "NOT_OWNER", "STALE_SESSION", "STALE_FENCE", "WRONG_STATUS"}


def configured(url: str) -> mq.Config:
    config = mq.Config(environ={}).set("redis.url", url, "storm").set("project", "p", "storm")
    return config.set("lanes.coding.maxConcurrent", CAP, "storm")


# ---- an agent ----


async def agent(url: str, name: str, accepted: Path) -> None:
    """Works until it is killed; writes down every completion that was accepted."""
    rng = random.Random()
    lane = rng.choice([None, "coding"])
    async with mq.Queue(configured(url), session=os.urandom(8).hex()) as queue:
        while True:
            try:
                offer = await queue.next(name, wait=2, ttl=TTL, lane=lane)
                for task in offer["tasks"]:
                    await work(queue, task, name, rng, accepted)
            except mq.Refused as problem:
                if problem.code not in EXPECTED:
                    raise
                await asyncio.sleep(0.05)


async def work(
    queue: mq.Queue, task: mq.Task, name: str, rng: random.Random, accepted: Path
) -> None:
    of: dict[str, Any] = {"agent": name, "fence": task["fence"]}
    await queue.start(task["id"], **of)
    for _ in range(rng.randrange(3)):
        await asyncio.sleep(rng.uniform(0, 0.05))
        await queue.heartbeat(task["id"], progress="on it" if rng.random() < 0.5 else None, **of)
    end = rng.random()
    if end < 0.05:
        await queue.fail(task["id"], reason="bad luck", retry_delay=0, **of)
    elif end < 0.1:
        await queue.release(task["id"], **of)
    elif end > 0.99:
        await asyncio.sleep(2 * TTL)  # sleeps through its lease, and completes late or not at all
        await queue.complete(task["id"], **of)
    else:
        await queue.complete(task["id"], summary="done", **of)
        with open(accepted, "a") as file:
            file.write(f"{task['taskId']} {task['fence']}\n")


# ---- the storm ----


class Follower(threading.Thread):
    """Reads every event before the stream is trimmed."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.client = redis.Redis.from_url(url, decode_responses=True)
        self.events: list[list[str]] = []
        self.full = 0  # the most tasks of lane coding that were held at a time
        self.stopped = False

    def run(self) -> None:
        rev = 0
        while True:
            try:
                rows = self.client.xrange(f"{ROOT}:events", f"({rev}-0", "+", 1000)
                self.full = max(self.full, self.client.zcard(f"{ROOT}:running:coding"))
            except redis.RedisError:
                time.sleep(0.1)
                continue
            for key, fields in rows:
                rev = int(key.partition("-")[0])
                self.events.append(fields["e"].split("\t"))
            if not rows and self.stopped:
                return
            if len(rows) < 1000:
                time.sleep(0.05)


class Storm:
    def __init__(self, seconds: float, agents: int, restarts: int, seed: int, grace: bool) -> None:
        from conftest import BINARIES, Server

        self.rng, self.seconds, self.restarts = random.Random(seed), seconds, restarts
        self.grace = grace
        self.server = Server(
            str(BINARIES["valkey"]()), "--appendonly", "yes", "--appendfsync", "always"
        )
        self.folder = Path(tempfile.mkdtemp(prefix="mq-storm-"))
        (self.folder / "queue.yaml").write_text("watchdog: {interval: 1}\n")
        self.errors = open(self.folder / "stderr", "w")  # noqa: SIM115
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.names = [f"agent-{n}" for n in range(agents)]
        self.kills: Counter[str] = Counter()
        self.created = self.redriven = 0

    def spawn(self, name: str) -> None:
        words = [__file__, "--agent", self.server.url, name, str(self.folder / "accepted")]
        if name.startswith("monitor"):
            words = ["-m", "mosaic_queue", "monitor", "--url", self.server.url]
            words += ["--config", str(self.folder / "queue.yaml")]
        environ = {"PATH": os.environ["PATH"], "HOME": str(self.folder)}
        errors = subprocess.DEVNULL if name.startswith("monitor") else self.errors
        self.processes[name] = subprocess.Popen(
            [sys.executable, *words], env=environ, cwd=self.folder, stderr=errors
        )

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()
        self.kills[name.partition("-")[0]] += 1

    async def feed(self, queue: mq.Queue) -> None:
        """A batch of tasks; a third waits for the one before it."""
        rows: list[Any] = []
        for n in range(self.created, self.created + 50):
            row: dict[str, Any] = {"taskId": f"T{n}", "mission": "m", "title": "a task"}
            row["priority"] = self.rng.choice(mq.PRIORITIES)
            row["lane"] = self.rng.choice(["any", "coding"])
            if n % 3 == 2:
                row["dependencies"] = [f"T{n - 1}"]
            rows.append(row)
        await queue.create_all(rows, project="p")
        self.created += len(rows)

    async def reap(self, queue: mq.Queue) -> None:
        if not self.grace:
            await queue.reap(project="p")

    async def rage(self, queue: mq.Queue) -> None:
        """Feed and kill until the time is over."""
        began = time.monotonic()
        places = range(1, self.restarts + 1)
        restarts = [began + self.seconds / 2 * n / (self.restarts + 1) for n in places]
        while (now := time.monotonic()) < began + self.seconds:
            counts = (await mq.status(queue, project="p"))["projects"][0]["tasks"]
            if counts["pending"] + counts["blocked"] < 100:
                await self.feed(queue)
            if restarts and now > restarts[0]:
                restarts.pop(0)
                self.server.kill()
                self.kills["server"] += 1
                await asyncio.sleep(self.rng.uniform(0, 1))
                self.server.start()
            name = self.rng.choice([*self.names, "monitor-0", "monitor-1"])
            self.kill(name)
            self.spawn(name)
            await self.reap(queue)
            await asyncio.sleep(self.rng.uniform(0.05, 0.5))

    async def calm(self, queue: mq.Queue, limit: float) -> None:
        """Let the agents finish; a person gives the dead letters another chance."""
        give_up = time.monotonic() + limit
        while True:
            counts = (await mq.status(queue, project="p"))["projects"][0]["tasks"]
            if counts["completed"] == self.created:
                return
            assert time.monotonic() < give_up, f"after {limit} s of calm: {counts}"
            if counts["failed"]:
                for task in (await queue.list(status="failed", limit=100))["tasks"]:
                    with contextlib.suppress(mq.Refused):
                        await queue.redrive(task["id"])
                        self.redriven += 1
            await self.reap(queue)
            await asyncio.sleep(0.3)

    async def run(self) -> list[str]:
        """What is wrong in the end, and a report on stdout."""
        follower = Follower(self.server.url)
        follower.start()
        began = time.monotonic()
        async with mq.Queue(configured(self.server.url), deadline=60) as queue:
            await self.feed(queue)
            for name in [*self.names, "monitor-0", "monitor-1"]:
                self.spawn(name)
            await self.rage(queue)
            raged = time.monotonic() - began
            ended = [name for name, one in self.processes.items() if one.poll() is not None]
            wrong = [f"{name} has ended by itself" for name in ended]
            await self.calm(queue, 300)
            for process in self.processes.values():
                process.kill()
                process.wait()
            await queue.reap(project="p")
            doctor = await mq.doctor(queue, project="p")
        follower.stopped = True
        follower.join(60)
        wrong += [f"doctor: {said}" for said in doctor["findings"] if "append-only" not in said]
        wrong += self.judged(follower)
        times = f"{raged:.0f} s of storm, {time.monotonic() - began - raged:.0f} s of calm"
        kills = ", ".join(f"{n} of {name}" for name, n in sorted(self.kills.items()))
        print(f"{times}; SIGKILL: {kills}")
        return wrong

    def judged(self, follower: Follower) -> list[str]:
        """Hold the events against the promises."""
        wrong = []
        revs = [int(event[4]) for event in follower.events]
        if revs != list(range(1, len(revs) + 1)):
            wrong.append("the events have a gap")
        claims: Counter[str] = Counter()
        completed: Counter[str] = Counter()
        fences, holders = [0], {}
        ops = Counter(event[1] for event in follower.events)
        for task, op, before, _, _, fence, who, *_ in follower.events:
            if op == "claim":
                claims[task] += 1
                if int(fence) <= fences[-1]:
                    wrong.append(f"{task}: fence {fence} after {fences[-1]}")
                if before in ("claimed", "in-progress") and holders[task] != who:
                    wrong.append(f"{task}: taken from {holders[task]} by {who}")
                fences.append(int(fence))
                holders[task] = who
            completed[task] += op == "complete"
        for n in range(self.created):
            if completed[f"T{n}"] != 1:
                wrong.append(f"T{n} has {completed[f'T{n}']} accepted completions")
        told = (self.folder / "accepted").read_text().split("\n")[:-1]
        twice = [task for task, n in Counter(line.split()[0] for line in told).items() if n > 1]
        wrong += [f"{task} was accepted twice, say the agents" for task in twice]
        if follower.full > CAP:
            wrong.append(f"{follower.full} tasks of lane coding were held at a time, of {CAP}")
        for kind in ("running", "lock", "assigned", "ready", "unsettled", "delayed", "waits"):
            keys = follower.client.scan_iter(f"{ROOT}:{kind}*", 1000)
            wrong += [f"{key} is left" for key in keys]
        self.errors.flush()
        said = (self.folder / "stderr").read_text()
        if "Traceback" in said:
            wrong.append("an agent says:\n" + said[-3000:])
        times = Counter(claims.values())
        handed = ", ".join(f"{times[n]} x {n}" for n in sorted(times))
        print(f"{self.created} tasks, {len(revs)} events: {dict(ops.most_common())}")
        print(f"handed out (tasks x times): {handed}; dead letters redriven: {self.redriven}")
        print(f"most held at a time in lane coding: {follower.full} of {CAP}")
        return wrong

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        self.errors.close()
        self.server.close()


def storm(
    seconds: float, agents: int = 20, restarts: int = 3, seed: int = 1, grace: bool = True
) -> list[str]:
    """Rage for so long; what is wrong in the end."""
    made = Storm(seconds, agents, restarts, seed, grace)
    try:
        return asyncio.run(made.run())
    finally:
        made.close()


def main() -> int:
    if sys.argv[1:2] == ["--agent"]:
        url, name, accepted = sys.argv[2:]
        asyncio.run(agent(url, name, Path(accepted)))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--agents", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-grace", dest="grace", action="store_false")
    given = parser.parse_args()
    if not given.grace:
        from conftest import Shim

        mq.script = Shim().script
    wrong = storm(given.seconds, given.agents, given.restarts, given.seed, given.grace)
    for sentence in wrong:
        print("WRONG:", sentence)
    print("nothing is wrong" if not wrong else f"{len(wrong)} things are wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
