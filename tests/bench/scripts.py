"""What each script costs inside the server, beside the least that could do the same.

    python tests/bench/scripts.py [--callgrind] [--json] [--tasks N] [--rounds N]

Three measures.  Microseconds are the server's own (`usec_per_call` of commandstats, the least of
alternating rounds): what a user waits for, and noisy.  Inner calls are exact.  With --callgrind a
server under valgrind counts instructions, which no neighbour on the machine can disturb: they are
what the goal is about.

The floor is bare Lua: a create, a claim of the best task and a fenced complete with nothing around
them; short keys, seven short fields, no text, receipt, event, session, lane, dependency or lock.
A cycle is create + next + complete, as a worker goes through them; calls are sent 50 at a time, so
that what is counted is scripts and not system calls.

Goal: a cycle of at most 4.0 floors in instructions, and at most 12 + 18 + 13 inner calls.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import redis
from conftest import Server

import mosaic_queue as mq

GOAL = 4.0
CALLS = {"create": 12, "next": 18, "complete": 13}
CYCLE = tuple(CALLS)
ROOT = "mosaic:queue:project:{bench}"

FLOOR = {
    # ARGV: id, title, priority, lane, mission, order
    "create": """
local task = KEYS[1] .. 't:' .. ARGV[1]
if redis.call('EXISTS', task) == 1 then return 'EXISTS' end
redis.call('HSET', task, 'title', ARGV[2], 'priority', ARGV[3], 'lane', ARGV[4],
           'mission', ARGV[5], 'status', 'pending', 'order', ARGV[6], 'rev', '1')
redis.call('ZADD', KEYS[1] .. 'ready', ARGV[6], ARGV[1])
return 'OK'
""",
    # ARGV: agent, ttl
    "next": """
local first = redis.call('ZPOPMIN', KEYS[1] .. 'ready')
if not first[1] then return 'NOTHING' end
local time = redis.call('TIME')
local fence = redis.call('HINCRBY', KEYS[1], 'fence', 1)
redis.call('HSET', KEYS[1] .. 't:' .. first[1], 'status', 'claimed', 'claimedBy', ARGV[1],
           'claimedAt', time[1], 'fence', fence)
redis.call('ZADD', KEYS[1] .. 'running', time[1] + ARGV[2], first[1])
return {first[1], fence}
""",
    # ARGV: id, agent, fence, time
    "complete": """
local task = KEYS[1] .. 't:' .. ARGV[1]
local now = redis.call('HMGET', task, 'status', 'claimedBy', 'fence')
if now[1] ~= 'claimed' or now[2] ~= ARGV[2] or now[3] ~= ARGV[3] then return 'STALE' end
redis.call('ZREM', KEYS[1] .. 'running', ARGV[1])
redis.call('HSET', task, 'status', 'completed', 'completedAt', ARGV[4])
redis.call('ZADD', KEYS[1] .. 'completed', ARGV[4], ARGV[1])
return 'OK'
""",
}

# What an agent would say.  `{n}` is the task's number.
SAID: dict[str, Any] = {
    "actor": "claude-7f3a@build-2",
    "agent": "claude-7f3a@build-2",
    "session": "5b1c0a7e9d2f4c38",
    "mission": "launch",
    "title": "Write the page that explains the release to our customers ok"[:60],
    "description": ("Collect what changed since the last version and say it shortly. " * 6)[:340],
    "priority": "medium",
    "lane": "coding",
    "summary": "page is live",
}


class Ours:
    """The shipped scripts, with the arguments in the order of their headers."""

    name = "ours"
    steps = ("create", "next", "release", "claim", "start", "heartbeat", "complete")

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.scripts = {step: mq.script(step) for step in self.steps}
        for lua in self.scripts.values():
            client.script_load(lua.text)
        self.fences: dict[int, str] = {}

    def run(self, step: str, *numbers: int) -> None:
        with self.client.pipeline(transaction=False) as pipe:
            for n in numbers:
                lua = self.scripts[step]
                pipe.evalsha(lua.sha, 1, ROOT, *self.argv(lua, step, n))
            replies = pipe.execute()
        for n, reply in zip(numbers, replies, strict=True):
            assert reply[0] == "OK", (step, reply)
            if step in ("next", "claim"):
                row = reply[1].split("\t")
                self.fences[n] = dict(zip(row[::2], row[1::2], strict=True))["fence"]

    def argv(self, lua: mq.Script, step: str, n: int) -> list[Any]:
        """What Queue sends, one value for each word of the header."""
        op = hashlib.blake2b(f"{step} {n}".encode(), digest_size=12).hexdigest()
        said = SAID | {"task": f"T{n:05}", "op": f"{op} {op[:12]}", "epoch": op}
        # Queue names the fence of a claim of its own, as every session does.
        said["fence"] = self.fences.get(n, "")
        if step == "next":
            # What a worker asks that neither waits nor resumes: every task of every mission.
            said |= dict.fromkeys(("lane", "mission"), "")
        return [said.get(word, "") for word in (*lua.args, *lua.each)]


class Floor:
    """The bare scripts.  A claim takes the oldest, so tasks are taken in the order of their n."""

    name = "floor"
    steps = CYCLE

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.shas = {step: client.script_load(text) for step, text in FLOOR.items()}
        self.fences: dict[int, int] = {}

    def run(self, step: str, *numbers: int) -> None:
        with self.client.pipeline(transaction=False) as pipe:
            for n in numbers:
                pipe.evalsha(self.shas[step], 1, "{b}", *self.argv(step, n))
            replies = pipe.execute()
        for n, reply in zip(numbers, replies, strict=True):
            if step == "next":
                assert reply[0] == f"T{n:05}", reply
                self.fences[n] = reply[1]
            else:
                assert reply == "OK", (step, reply)

    def argv(self, step: str, n: int) -> tuple[Any, ...]:
        task, order = f"T{n:05}", 1_700_000_000_000 + n
        said: dict[str, tuple[Any, ...]] = {
            "create": (task, "noop", *map(SAID.get, ("priority", "lane", "mission")), order),
            "next": ("agent", 3600),
            "complete": (task, "agent", self.fences.get(n, 0), order),
        }
        return said[step]


Count = Callable[[Callable[[], None]], float]


def measured(client: redis.Redis, tasks: int, rounds: int, count: Count) -> dict[str, Any]:
    """The least of `count` per call, for each step of both sides, in alternating rounds."""
    least: dict[str, dict[str, float]] = {"ours": {}, "floor": {}}
    for _ in range(rounds):
        for side in (Floor(client), Ours(client)):
            client.flushall()
            for step in side.steps:
                value = count(functools.partial(over, side, step, tasks)) / tasks
                row = least[side.name]
                row[step] = min(row.get(step, value), value)
    return least


def over(side: Ours | Floor, step: str, tasks: int) -> None:
    """A step of every task."""
    for at in range(0, tasks, 50):
        side.run(step, *range(at, min(at + 50, tasks)))


def commandstats(client: redis.Redis, phase: Callable[[], None]) -> dict[str, Any]:
    client.config_resetstat()
    phase()
    return dict(client.info("commandstats"))


def microseconds(client: redis.Redis) -> Count:
    return lambda phase: commandstats(client, phase)["cmdstat_evalsha"]["usec"]


def inner_calls(client: redis.Redis) -> Count:
    def count(phase: Callable[[], None]) -> float:
        stats = commandstats(client, phase)
        outside = ("cmdstat_evalsha", "cmdstat_config|resetstat", "cmdstat_info")
        return sum(row["calls"] for name, row in stats.items() if name not in outside)

    return count


def instructions(pid: int, folder: Path) -> Count:
    """Instructions of the server's process between two dumps of callgrind."""
    control = ["callgrind_control", f"--vgdb-prefix={folder / 'vgdb'}"]

    def count(phase: Callable[[], None]) -> float:
        subprocess.run([*control, "--zero", str(pid)], check=True, capture_output=True)
        phase()
        subprocess.run([*control, "--dump=bench", str(pid)], check=True, capture_output=True)
        (dump,) = folder.glob("callgrind.out.*")
        found = re.search(r"^summary: (\d+)", dump.read_text(), re.MULTILINE)
        assert found, dump
        dump.unlink()
        return int(found[1])

    return count


def under_callgrind(folder: Path) -> str:
    """A program that is valkey-server under callgrind; `exec` keeps the process id."""
    program = folder / "valkey-under-callgrind"
    program.write_text(
        "#!/bin/sh\n"
        f"exec valgrind --tool=callgrind --dump-instr=no --quiet --vgdb-prefix='{folder}/vgdb'"
        f" --callgrind-out-file='{folder}/callgrind.out' '{mq.server_binary()}' \"$@\"\n"
    )
    program.chmod(0o755)
    return str(program)


def bench(with_callgrind: bool, tasks: int, rounds: int) -> dict[str, Any]:
    """All measures: name -> side -> step -> value per call."""
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.tcache_count=2000"  # as the private server
    found: dict[str, Any] = {}
    server = Server(mq.server_binary())
    try:
        client = server.client()
        found["calls"] = measured(client, 50, 1, inner_calls(client))
        found["us"] = measured(client, tasks, rounds, microseconds(client))
    finally:
        server.close()
    if with_callgrind:
        with tempfile.TemporaryDirectory(prefix="mq-callgrind-") as name:
            folder = Path(name)
            server = Server(under_callgrind(folder))
            try:
                client = server.client()
                count = instructions(server.process.pid, folder)
                measured(client, 50, 1, count)  # what only the first call costs
                found["instructions"] = measured(client, 200, 3, count)
            finally:
                server.close()
    for sides in found.values():
        for side in sides.values():
            side["cycle"] = sum(side[step] for step in CYCLE)
    return found


def table(found: dict[str, Any]) -> str:
    """The measures side by side, then what the goals say."""
    lines = [f"{'':14}" + "".join(f"{name:>16}{'floor':>9}{'ratio':>7}" for name in found)]
    for step in (*Ours.steps, "cycle"):
        line = f"{step:14}"
        for name, sides in found.items():
            unit = 1000 if name == "instructions" else 1
            ours, floor = sides["ours"][step] / unit, sides["floor"].get(step, 0) / unit
            line += f"{ours:16.1f}" + (f"{floor:9.1f}{ours / floor:7.2f}" if floor else " " * 16)
        lines.append(line)
    counted = found.get("instructions", found["us"])
    ratio = counted["ours"]["cycle"] / counted["floor"]["cycle"]
    calls = found["calls"]["ours"]
    lines += [
        "",
        f"cycle / floor in {'instructions' if 'instructions' in found else 'us'}: "
        f"{ratio:.2f} (goal: {GOAL} in instructions)",
        "inner calls: "
        + " + ".join(f"{calls[step]:.1f}" for step in CYCLE)
        + " (goal: "
        + " + ".join(str(most) for most in CALLS.values())
        + ")",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--callgrind", action="store_true", help="count instructions (1 min)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tasks", type=int, default=2000, help="per round and step")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    found = bench(asked.callgrind, asked.tasks, asked.rounds)
    print(json.dumps(found, indent=1) if asked.json else table(found))


if __name__ == "__main__":
    main()
