"""What `next` costs in a long queue, and how soon a waiter has a task.

    python tests/bench/next.py [--tasks N] [--wakes N]

Script time is the server's own (`usec_per_call` of commandstats) of 200 `next` each on 1,000 and
on a million ready tasks, in first in, first out order: the least of ten alternating rounds, each
followed by a release of what was taken.  The tasks are copies of one that the shipped script
made, entered by a loop inside the server.

A wake-up is the time from a create until a waiter has its task, beside the time from an LPUSH
until a bare BLPOP returns, on the same socket and with clients of the same kind.  Another process
sends both.

Goals: at most 1.2 times the script time; at most 3 times the wake-up (p50).
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import redis
from conftest import BINARIES, Server
from scripts import ROOT, SAID

import mosaic_queue as mq

SLOWER, LATER = 1.2, 3.0
ROUNDS, CALLS, FEW = 10, 200, 1000

# ARGV: first, last, order of the first.  Task T is there; the others are as it but for their place.
FILL = """
local root, hash = KEYS[1], redis.call('HGETALL', KEYS[1] .. ':task:T')
local text = redis.call('GET', KEYS[1] .. ':text:T')
for n = ARGV[1], ARGV[2] do
  local id, order = string.format('T%07d', n), string.format('%.0f', ARGV[3] + n)
  redis.call('HSET', root .. ':task:' .. id, unpack(hash))
  redis.call('HSET', root .. ':task:' .. id, 'order', order)
  redis.call('SET', root .. ':text:' .. id, text)
  redis.call('ZADD', root .. ':mission:launch', order, id)
  redis.call('ZADD', root .. ':ready:coding', string.format('%.0f', 4503599627370496 + order), id)
end
"""


class Calls:
    """The shipped scripts on one project, called as `Queue` does."""

    def __init__(self, client: redis.Redis, project: str) -> None:
        self.client, self.root, self.count = client, ROOT.replace("bench", project), 0
        self.scripts = {name: mq.script(name) for name in ("create", "next", "release")}
        for lua in self.scripts.values():
            client.script_load(lua.text)

    def command(self, name: str, **said: str) -> list[str]:
        """What `Queue` sends."""
        self.count += 1
        op = hashlib.blake2b(f"{name} {self.count}".encode(), digest_size=12).hexdigest()
        values = SAID | {"op": f"{op} {op[:12]}", "epoch": op, "mission": ""} | said
        lua = self.scripts[name]
        argv = [values.get(word, "") for word in (*lua.args, *lua.each)]
        return ["EVALSHA", lua.sha, "1", self.root, *argv]

    def run(self, name: str, **said: str) -> list[str]:
        reply = self.client.execute_command(*self.command(name, **said))
        assert reply[0] == "OK", reply
        return list(reply)

    def fill(self, tasks: int) -> None:
        self.run("create", task="T", mission="launch")
        order = float(self.client.hget(f"{self.root}:task:T", "order")) + 1
        for first in range(1, tasks, 10_000):
            last = min(first + 9_999, tasks - 1)
            self.client.eval(FILL, 1, self.root, first, last, f"{order:.0f}")
        assert self.client.zcard(f"{self.root}:ready:coding") == tasks

    def next(self) -> float:
        """Microseconds of a `next`, the mean of CALLS; all are released afterwards."""
        self.client.config_resetstat()
        taken = [mq.paired(self.run("next")[1])["taskId"] for _ in range(CALLS)]
        spent = self.client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"]
        for task in taken:
            self.run("release", task=task)
        return float(spent)


def script_times(client: redis.Redis, tasks: int) -> tuple[float, float]:
    few, many = Calls(client, "few"), Calls(client, "many")
    few.fill(FEW)
    many.fill(tasks)
    rounds = [(few.next(), many.next()) for _ in range(ROUNDS)]
    return min(one for one, _ in rounds), min(other for _, other in rounds)


# Sends what stands on each line, and says when; in a process of its own, so that it takes no time
# of the waiter's.
SENDER = """
import json, sys, time
import redis
client = redis.Redis.from_url(sys.argv[1])
for line in sys.stdin:
    command = json.loads(line)
    time.sleep(0.005)
    began = time.perf_counter()
    client.execute_command(*command)
    print(began, flush=True)
"""


async def wake_ups(client: redis.Redis, url: str, times: int) -> tuple[float, float]:
    """p50 of a bare BLPOP and of a waiter, in microseconds, in turns."""
    config = mq.Config(environ={}).set("redis.url", url, "bench").set("project", "w", "bench")
    calls, bare, ours = Calls(client, "w"), [], []
    calls.run("create", task="later", mission="m", delay="604800")
    popper = mq.connect(url)
    sender = subprocess.Popen(
        [sys.executable, "-c", SENDER, url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    assert sender.stdin
    assert sender.stdout

    async def took(waiting: asyncio.Task[object], *command: str) -> float:
        await asyncio.sleep(0)  # it goes to wait
        print(json.dumps(command), file=sender.stdin)
        await waiting
        arrived = time.perf_counter()
        return arrived - float(sender.stdout.readline())

    async with mq.Queue(config, session="s") as queue:
        for n in range(times):
            popping = asyncio.create_task(popper.execute_command("BLPOP", "bell", "10"))
            bare.append(await took(popping, "LPUSH", "bell", "1"))
            waiting = asyncio.create_task(queue.next("alice", wait=10))
            command = calls.command("create", task=f"T{n}", mission="m")
            ours.append(await took(waiting, *command))
            await queue.complete(waiting.result()["tasks"][0]["id"], agent="alice")
    await popper.aclose()
    sender.stdin.close()
    sender.wait()
    return statistics.median(bare) * 1e6, statistics.median(ours) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--wakes", type=int, default=500)
    given = parser.parse_args()
    server = Server(str(BINARIES["valkey"]()))
    try:
        with server.client() as client:
            bare, ours = asyncio.run(wake_ups(client, server.url, given.wakes))
            few, many = script_times(client, given.tasks)
    finally:
        server.close()
    print(f"next among {FEW:>9,} ready tasks      {few:8.1f} us")
    print(f"next among {given.tasks:>9,} ready tasks      {many:8.1f} us")
    print(f"ratio                                {many / few:8.2f}    (goal: {SLOWER})")
    print(f"wake-up of a bare BLPOP, p50         {bare:8.1f} us")
    print(f"wake-up of a waiter, p50             {ours:8.1f} us")
    print(f"ratio                                {ours / bare:8.2f}    (goal: {LATER})")


if __name__ == "__main__":
    main()
