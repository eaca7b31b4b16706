"""Every order of what two agents, a reaper and the clock may do with two tasks in a lane of one.

    python tests/exhaustive.py [--seconds S] [--depth N]

Breadth first over the shipped scripts on a real server: each state of the key space, with what
the agents remember, is put back and every action is tried in it.  States that differ in nothing
but the numbers of changes and fences and the time of day are one.  Task `B` waits for `A`; the
lane takes one at a time; a claim lasts 60 s and the clock is turned by 45, so that a lease is
young, nearly over, or over.  An agent acts on what it last heard: it may have lost its claim long
ago.  It may also send its last call again, as one does that had no answer.

In every state the invariants of the key space are checked, and at every step: a call that is sent
again makes no second change, nobody loses a claim before its end, no task is completed but by
who holds it or held it last, fences rise, a refusal changes nothing, and the answer says what
became of the task.  From the last states both tasks can still be completed.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import BINARIES, Server, Shim
from invariants import DUMP, HELD, Project, problems_of, project_from

import mosaic_queue as mq

ROOT, CLOCK = "mosaic:queue:project:{p}", "clock"
BEGAN = 4_000_000_000  # s; the locks expire by the real clock, which never gets there
FENCES = 9_000_000_000_000  # before the first, so that none looks like a time
TTL, TURN = 60, 45  # s
AGENTS, TASKS = ("alice", "bob"), ("A", "B")


# Puts a state back: the clock, then keys and what DUMP made of each.
PUT = """
redis.call('FLUSHDB')
redis.call('SET', 'clock', ARGV[1])
for i = 2, #ARGV, 2 do redis.call('RESTORE', ARGV[i], 0, ARGV[i + 1]) end
"""
# All keys, decoded and as DUMP has them; nothing where they are as they were put back, which
# their hash in ARGV[1] says.
LOOK = f"""
local function decoded()
{DUMP}
end
local keys, kept = redis.call('KEYS', KEYS[1] .. '*'), {{}}
table.sort(keys)
for _, key in ipairs(keys) do
  kept[#kept + 1] = key
  kept[#kept + 1] = redis.call('DUMP', key)
end
if redis.sha1hex(table.concat(kept)) == ARGV[1] then return false end
return {{decoded(), kept}}
"""
MARK = re.compile(r"[0-9a-f]{24} [0-9a-f]{12}")


@dataclass(frozen=True)
class Told:
    """What an agent remembers: the fence of its last claim of each task, and its last call that
    was carried out."""

    fences: tuple[tuple[str, int], ...] = ()
    last: tuple[str, tuple[str, ...]] | None = None  # the script and what it was given
    made: int = 0  # such calls

    @property
    def mark(self) -> str:
        """The op id of the last call."""
        return (
            next((one[:24] for one in self.last[1] if MARK.fullmatch(one)), "") if self.last else ""
        )


@dataclass
class World:
    """One state: the keys as DUMP gives them, the clock, and what the agents remember."""

    keys: list[bytes]  # and behind each its value
    found: Project
    now: int
    minds: dict[str, Told]
    path: tuple[str, ...] = ()


@dataclass
class Action:
    """Something that may happen next."""

    who: str
    name: str  # a script, or `turn`
    task: str = ""
    again: bool = False

    def __str__(self) -> str:
        said = " ".join(filter(None, (self.who, self.name, self.task)))
        return said + (" again" if self.again else "")


def actions(world: World) -> Iterator[Action]:
    yield Action("clock", "turn")
    yield Action("reaper", "reap")
    yield from (Action("person", "note", task) for task in TASKS)
    for agent in AGENTS:
        mind = world.minds[agent]
        yield Action(agent, "next")
        yield from (Action(agent, "claim", task) for task in TASKS)
        for task, _ in mind.fences:
            for name in ("start", "heartbeat", "release", "complete", "fail"):
                yield Action(agent, name, task)
        if mind.last:
            yield Action(agent, mind.last[0], again=True)


class Exhaustion:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.db = server.client(decode_responses=False)
        self.shim = Shim()
        self.shim.clock = CLOCK
        self.scripts: dict[str, mq.Script] = {}
        self.sha = {text: self.db.script_load(text) for text in (PUT, LOOK)}
        self.steps = 0
        self.accepted: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.wrong: list[str] = []

    # ---- the stage ----

    def begin(self) -> World:
        """Two tasks in a lane of one."""
        self.db.flushall()
        self.db.set(CLOCK, BEGAN)
        self.db.hset(ROOT, "fence", FENCES)
        shipped, mq.script = mq.script, self.shim.script  # type: ignore[assignment]
        try:
            asyncio.run(self.create())
        finally:
            mq.script = shipped
        world = World([], Project(), BEGAN, dict.fromkeys(AGENTS, Told()))
        return self.look(world, self.db.evalsha(self.sha[LOOK], 1, ROOT, ""))

    async def create(self) -> None:
        config = mq.Config(environ={}).set("redis.url", self.server.url, "t")
        limits = {"claimTTL": TTL, "maxRetries": 1, "retryDelay": TURN, "deadLetterAfter": 2}
        for name, value in limits.items():
            config.set(f"defaults.{name}", value, "t")
        config.set("lanes.coding.maxConcurrent", 1, "t")
        async with mq.Queue(config) as queue:
            for task, on in (("A", []), ("B", ["A"])):
                named: dict[str, Any] = {"title": "a task", "lane": "coding", "dependencies": on}
                await queue.create("p", "m", task, **named)

    def look(self, world: World, looked: Any) -> World:
        """Give a world its keys, but for the receipts of calls that nobody sends again."""
        marks = {mind.mark for mind in world.minds.values() if mind.last}
        world.found = project_from(decoded(looked[0]))
        receipts = world.found.named.pop("op", {})
        world.found.named["op"] = {op: one for op, one in receipts.items() if op in marks}
        for key, value in zip(looked[1][::2], looked[1][1::2], strict=True):
            if b":op:" not in key or key[-24:].decode() in marks:
                world.keys += [key, value]
        return world

    def script(self, name: str) -> mq.Script:
        if name not in self.scripts:
            self.scripts[name] = self.shim.script(name)
            self.db.script_load(self.scripts[name].text)
        return self.scripts[name]

    def play(self, world: World, todo: list[Action]) -> Iterator[tuple[Action, Any, World]]:
        """Put the state back for each action and do it: the reply, and the world that comes."""
        calls: list[Any] = []
        same = hashlib.sha1(b"".join(world.keys)).hexdigest()
        with self.db.pipeline(transaction=False) as pipe:
            for action in todo:
                mind = world.minds.get(action.who, Told())
                call = mind.last if action.again else self.call(world, mind, action)
                now = world.now + TURN if action.name == "turn" else world.now
                calls.append((action, mind, now, call))
                pipe.evalsha(self.sha[PUT], 0, now, *world.keys)
                if action.name == "turn":
                    pipe.ping()
                else:
                    pipe.evalsha(self.script(call[0]).sha, 1, ROOT, *call[1])
                pipe.evalsha(self.sha[LOOK], 1, ROOT, same)
            replies = pipe.execute(raise_on_error=False)
        for i, (action, mind, now, call) in enumerate(calls):
            _, reply, looked = replies[3 * i : 3 * i + 3]
            reply = [b"OK"] if action.name == "turn" else reply
            minds = dict(world.minds)
            if action.who in AGENTS:
                minds[action.who] = remember(mind, action, call, reply)
            made = World(
                world.keys if not looked else [],
                world.found,
                now,
                minds,
                (*world.path, str(action)),
            )
            yield action, reply, self.look(made, looked) if looked else made

    def call(self, world: World, mind: Told, action: Action) -> tuple[str, tuple[str, ...]]:
        number = mind.made if action.who in AGENTS else world.path
        mark = hashlib.sha1(f"{action.who} {number}".encode()).hexdigest()[:24]
        used_for = hashlib.sha1(str(action).encode()).hexdigest()[:12]
        if action.name == "turn":
            return "turn", ()
        values = {"actor": action.who, "task": action.task, "op": f"{mark} {used_for}"}
        if action.who in AGENTS:
            values |= {"agent": action.who, "session": f"s-{action.who}"}
            values["fence"] = str(dict(mind.fences).get(action.task, ""))
        values |= {"progress": "on it"} if action.name == "heartbeat" else {}
        values |= {"text": "seen"} if action.name == "note" else {}
        values |= {"reason": "no"} if action.name == "fail" else {}
        return action.name, tuple(values.get(name, "") for name in self.script(action.name).args)

    # ---- states that are one ----

    def digest(self, found: Project, world: World) -> str:
        """The state without the numbers that only ever grow and the time of day."""
        ops = {mind.mark: agent for agent, mind in world.minds.items() if mind.last}
        dropped = ("rev", "updatedAt", "op", "noteCount")
        tasks = {
            task: {name: value for name, value in values.items() if name not in dropped}
            | {"op": ops.get(values.get("op", "").split(" ")[0], "")}
            for task, values in found.tasks.items()
        }
        named = {
            kind: values
            for kind, values in found.named.items()
            if kind not in ("op", "text", "notes")
        }
        kept = {ops[op]: receipt.split(" ")[1:-1] for op, receipt in found.of("op").items()
                if op in ops}  # fmt: skip
        minds = {
            agent: (mind.fences, mind.last and [mind.last[0], *mind.last[1][2:]])
            for agent, mind in world.minds.items()
        }
        plain = {kind: value for kind, value in found.plain.items() if kind != "events"}
        text = json.dumps([tasks, named, kept, plain, minds], sort_keys=True, default=sorted)
        fences = sorted(set(re.findall(r"\b9\d{12}\b", text)))

        def relative(match: re.Match[str]) -> str:
            if match[0] in fences:
                return f"F{fences.index(match[0])}"
            return f"T{max(-2 * TURN, min(int(match[0]) // 1000 - world.now, 2 * TURN))}"

        text = re.sub(r"\b[49]\d{12}\b", relative, text)
        return hashlib.sha1(text.encode()).hexdigest()

    # ---- the search ----

    def run(self, seconds: float, depth: int) -> None:
        """To that depth, or for so long."""
        give_up = time.monotonic() + seconds
        first = self.begin()
        self.seen = {self.digest(first.found, first)}
        self.last, self.depth = [first], 0
        while self.last and self.depth < depth:
            following: list[World] = []
            for world in self.last:
                if time.monotonic() > give_up or len(self.wrong) > 20:
                    return
                for action, reply, made in self.play(world, list(actions(world))):
                    following += self.step(world, action, reply, made)
            self.last, self.depth = following, self.depth + 1

    def step(self, world: World, action: Action, reply: Any, made: World) -> list[World]:
        """Judge an action in a state; the state that came of it, if it is new."""
        self.steps += 1
        if isinstance(reply, Exception):
            self.complain(made, [str(reply)])
            return []
        code = reply[0].decode()
        (self.refused if code in mq.CODES else self.accepted)[f"{action.name} {code}"] += 1
        self.complain(made, [*of_step(action, code, reply, world, made.found)])
        if made.found is world.found and action.name != "turn":
            return []  # nothing has changed, and nobody heard of a change
        mark = self.digest(made.found, made)
        if mark in self.seen:
            return []
        self.seen.add(mark)
        self.complain(made, problems_of(made.found, made.now * 1000, bells=True))
        return [made]

    def complain(self, world: World, told: list[str]) -> None:
        self.wrong += [f"{' > '.join(world.path)}: {one}" for one in told]

    def finish(self, world: World) -> list[str]:
        """Complete both tasks from a state, whatever it is."""
        path = world.path
        todo = [Action("clock", "turn"), Action("reaper", "reap"), Action("alice", "next")]
        todo += [Action("alice", "complete", task) for task in TASKS]
        for _ in range(12):
            for action in todo:
                ((_, _, world),) = self.play(world, [action])
            for task in TASKS:
                if world.found.status(task) == "failed":
                    ((_, _, world),) = self.play(world, [Action("person", "redrive", task)])
            if all(world.found.status(task) == "completed" for task in TASKS):
                return []
        return [f"{' > '.join(path)}: {[world.found.status(task) for task in TASKS]}"]


def decoded(value: Any) -> Any:
    """Bytes as text, in lists too."""
    if isinstance(value, list):
        return [decoded(one) for one in value]
    return value.decode() if isinstance(value, bytes) else value


def row_of(reply: list[bytes]) -> dict[str, str]:
    """Names and values of the first row of a reply."""
    words = reply[1].decode().split("\t")
    return dict(zip(words[::2], words[1::2], strict=True))


def remember(mind: Told, action: Action, call: Any, reply: Any) -> Told:
    """What an agent knows when it has heard the reply.  A call that changed nothing is forgotten:
    to send it again is to make it."""
    fences = dict(mind.fences)
    if isinstance(reply, Exception) or reply[0] not in (b"OK", b"REPEATED"):
        return mind
    if action.name in ("claim", "next"):
        row = row_of(reply)
        fences[row["taskId"]] = int(row.get("opFence") or row["fence"])
    elif action.name in ("release", "complete", "fail"):
        fences.pop(action.task, None)
    return Told(tuple(sorted(fences.items())), call, mind.made + 1)


def of_step(
    action: Action, code: str, reply: list[bytes], world: World, found: Project
) -> Iterator[str]:
    """What is wrong with what came of an action."""
    before = world.found
    events = found.events[len(before.events) :]
    if action.again and events:
        yield f"carried out twice: {events}"
    if action.again and code in mq.CODES:
        yield f"refused with {code}, and it had been carried out"
    if code in mq.CODES and found != before:
        yield f"{code}, and the key space has changed"
    for one in events:
        values = before.tasks[one.task]
        lease = before.of("running").get(values["lane"], {}).get(one.task, 0)
        if one.op == "claim" and values["status"] in HELD and lease - world.now * 1000 >= 20_000:
            yield f"{one.task} was taken from {values['claimedBy']} before its time"
        if one.op == "reap" and lease > world.now * 1000:
            yield f"{one.task} was reaped before its end"
        if one.op == "complete":
            holder = [values.get("claimedBy"), values["fence"]]
            late = values.get("reaped", "").split(" ")[::2][::-1]
            owned = holder if values["status"] in HELD else late
            claimed = [action.who, str(dict(world.minds[action.who].fences).get(one.task, ""))]
            if not action.again and owned != claimed:
                yield f"{one.task} of {owned} was completed by {claimed}"
    if code == "OK" and action.who in AGENTS:
        row = row_of(reply)
        if row["status"] != found.status(row["taskId"]):
            yield f"the answer is {row}, the task {found.tasks[row['taskId']]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--depth", type=int, default=100)
    given = parser.parse_args()
    server = Server(str(BINARIES["valkey"]()))
    try:
        return report(Exhaustion(server), given.seconds, given.depth)
    finally:
        server.close()


def report(made: Exhaustion, seconds: float, depth: int) -> int:
    began = time.monotonic()
    made.run(seconds, depth)
    took = time.monotonic() - began
    for world in made.last[:: len(made.last) // 100 + 1]:
        made.wrong += made.finish(world)
    print(f"{len(made.seen):,} states, {made.steps:,} steps, to depth {made.depth}, {took:.0f} s")
    print(f"accepted: {dict(made.accepted.most_common())}")
    print(f"refused: {dict(made.refused.most_common())}")
    for one in made.wrong:
        print("WRONG:", one)
    print("nothing is wrong" if not made.wrong else f"{len(made.wrong)} things are wrong")
    return bool(made.wrong)


if __name__ == "__main__":
    sys.exit(main())
