"""What is true of the key space of a project between two calls, checked from outside.

`problems` shares no code with the scripts: it reads every key of the project at once and derives
from the tasks' hashes and texts what each index has to hold.  The names and types of the keys
come from the dictionary at the top of plumbing.lua, so that a key which is not written down there
is a problem of its own.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any

import redis

import mosaic_queue as mq

STATUSES = {"pending", "claimed", "in-progress", "completed", "failed", "blocked"}
HELD = {"claimed", "in-progress"}
RANK = {"critical": 0, "high": 2**51, "medium": 2 * 2**51, "low": 3 * 2**51}
BUILT_IN_LANES = "any coding planning"
TRIMMED = 9_000  # events; a longer stream may have lost its head

# Every key of the project with its type and value.
DUMP = """
local keys, all = redis.call('KEYS', KEYS[1] .. '*'), {}
local readers = {
  string = function(key) return redis.call('GET', key) end,
  hash = function(key) return redis.call('HGETALL', key) end,
  set = function(key) return redis.call('SMEMBERS', key) end,
  zset = function(key) return redis.call('ZRANGE', key, 0, -1, 'WITHSCORES') end,
  list = function(key) return redis.call('LRANGE', key, 0, -1) end,
  stream = function(key) return redis.call('XRANGE', key, '-', '+') end,
}
for i, key in ipairs(keys) do
  local kind = redis.call('TYPE', key).ok
  all[i] = {key:sub(#KEYS[1] + 1), kind, readers[kind](key)}
end
return all
"""


def pairs(flat: list[Any]) -> dict[str, Any]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def scores(flat: list[Any]) -> dict[str, int]:
    return {name: int(float(score)) for name, score in pairs(flat).items()}


@functools.cache
def dictionary() -> dict[str, tuple[str, bool]]:
    """Kind of key -> its type and whether a name follows it, as the prelude's head says."""
    text = (mq.lua_folder() / "plumbing.lua").read_text()
    rows = re.findall(r"^--   <root>(?::(\w+))?(:<\w+>)? +(\w+) ", text, re.MULTILINE)
    return {kind: (type_, bool(name)) for kind, name, type_ in rows}


@dataclass
class Event:
    """One line of the log."""

    number: int
    task: str
    op: str
    before: str
    after: str
    fence: int
    agent: str
    at: int  # ms
    text: str


@dataclass
class Project:
    """All keys of one project, decoded."""

    meta: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, dict[str, str]] = field(default_factory=dict)
    named: dict[str, dict[str, Any]] = field(default_factory=dict)  # kind -> name -> value
    plain: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    since: int = 0  # the rev after which the log begins

    def of(self, kind: str) -> dict[str, Any]:
        return self.named.get(kind, {})

    def dependencies(self, task: str) -> list[str]:
        return self.of("text").get(task, {}).get("dependencies", "").split()

    def status(self, task: str) -> str | None:
        """None for a task that does not exist (any more)."""
        return self.tasks.get(task, {}).get("status")

    def unfinished(self) -> Iterator[str]:
        return (task for task in self.tasks if self.status(task) != "completed")

    def forget(self, task: str) -> None:
        """Take the entries of a task that does not exist out of every index."""
        for kind in ("text", "waits"):
            self.of(kind).pop(task, None)
        for kind in ("ready", "mission", "dependents"):
            for entries in self.of(kind).values():
                entries.pop(task, None)
        for kind in ("delayed", "blocked"):
            self.plain.get(kind, {}).pop(task, None)

    @property
    def reopened(self) -> set[str]:
        """Tasks that were completed once more than they are, or were another task of that name:
        what they freed stays free.  All may be where the log does not go back to the beginning."""
        if self.since:
            return set(self.tasks)
        return {one.task for one in self.events if one.op in ("reopen", "delete", "purge")}

    @property
    def lanes(self) -> dict[str, int | None]:
        words = (self.meta.get("lanes") or BUILT_IN_LANES).split()
        split = (word.partition("=") for word in words)
        return {lane: int(most) if most else None for lane, _, most in split}


def read_project(db: redis.Redis, project: str) -> Project:
    """The key space of a project, in one call."""
    return project_from(db.eval(DUMP, 1, f"mosaic:queue:project:{{{project}}}"))


def project_from(rows: list[Any]) -> Project:
    """The same, from what DUMP returned."""
    decode = {"zset": scores, "hash": pairs, "list": list, "stream": list, "set": set}
    found, known = Project(), dictionary()
    for key, type_, value in rows:
        kind, _, name = key.removeprefix(":").partition(":")
        if known.get(kind) != (type_, bool(name)):
            found.strange.append(f"{key} ({type_}) is not in the dictionary")
            continue
        if type_ == "string":
            value = json.loads(value) if kind in ("text", "work") else value
        else:
            value = decode[type_](value)
        if kind == "task":
            found.tasks[name] = value
        elif kind == "events":
            found.events = [event(*entry) for entry in value]
        elif name:
            found.named.setdefault(kind, {})[name] = value
        elif kind:
            found.plain[kind] = value
        else:
            found.meta = value
    return found


def event(entry: str, fields: list[str]) -> Event:
    number, _, rest = entry.partition("-")
    task, op, before, after, rev, fence, agent, at, text = fields[1].split("\t", 8)
    assert rest == "0", f"event id {entry}"
    assert rev == number, f"event {entry} says rev {rev}"
    return Event(int(number), task, op, before, after, int(fence or 0), agent, int(at), text)


def problems(
    db: redis.Redis,
    project: str,
    now_ms: int | None = None,
    *,
    gaps: int = 0,
    cut: bool = False,
    unborn: Collection[str] = (),
    locks: bool = False,
    bells: bool = False,
    since: int = 0,
) -> list[str]:
    """What is wrong in the key space of a project; an empty list when all is well.

    With `now_ms`, what is not due yet may not be ready.  `gaps` changes may have no event and with
    `cut` the log may tell of changes that were never made: what a call leaves that was cut off
    in the middle.  A task that is `unborn`, since its creation was cut off before its hash was
    written, may have left entries that nobody can see.  `locks`: the locks have not expired (by
    real time, so not when a test turned the clock).  `bells`: nobody waited, so every bell that
    was rung still sounds.  The log begins after `since`, where the project was restored.
    """
    found = read_project(db, project)
    found.since = since
    for task in set(unborn) - found.tasks.keys():
        found.forget(task)
    return problems_of(found, now_ms, gaps=gaps, cut=cut, locks=locks, bells=bells)


def problems_of(
    found: Project,
    now_ms: int | None = None,
    *,
    gaps: int = 0,
    cut: bool = False,
    locks: bool = False,
    bells: bool = False,
) -> list[str]:
    """The same, of a key space that was read."""
    return [
        *found.strange,
        *of_tasks(found),
        *of_places(found, now_ms),
        *of_missions(found),
        *of_edges(found),
        *of_locks(found, locks),
        *of_lanes(found, bells),
        *of_assignments(found),
        *of_events(found, gaps),
        *([] if cut or found.since else of_histories(found)),
    ]


def of_tasks(found: Project) -> Iterator[str]:
    """Each hash has the fields of its status; nothing is kept for a task that is gone."""
    needed = {"claimed": "claimedBy claimedAt claimTTL fence", "completed": "completedAt"}
    needed |= {"in-progress": needed["claimed"], "failed": "failedAt"}
    for task, values in found.tasks.items():
        status = values.get("status")
        if status not in STATUSES:
            yield f"task {task} has status {status}"
        for name in ("rev updatedAt order mission " + needed.get(status, "")).split():
            if not values.get(name):
                yield f"task {task} is {status} and has no {name}"
        if values.get("lane") not in found.lanes or values.get("priority") not in RANK:
            yield f"task {task} has lane {values.get('lane')}, priority {values.get('priority')}"
        if int(values.get("rev", 0)) > int(found.meta.get("rev", 0)):
            yield f"task {task} has rev {values['rev']}, the project {found.meta.get('rev')}"
        if not found.of("text").get(task, {}).get("title"):
            yield f"task {task} has no title"
        if len(found.dependencies(task)) != int(values.get("edges") or 0):
            yield f"task {task} has {found.dependencies(task)} and edges {values.get('edges')!r}"
        if status == "completed" and task in found.of("work"):
            yield f"task {task} is completed and has {found.of('work')[task]}"
    for kind in ("text", "work", "summary", "waits", "dependents"):
        for name in found.of(kind):
            if name not in found.tasks:
                yield f"{kind}:{name} belongs to no task"


def places(found: Project) -> Iterator[tuple[str, str, int]]:
    """Every entry of an index: the index, the task, the score."""
    for kind in ("ready", "running"):
        for lane, entries in found.of(kind).items():
            for task, score in entries.items():
                yield f"{kind}:{lane}", task, score
    for kind in ("delayed", "blocked", "failed", "completed"):
        for task, score in found.plain.get(kind, {}).items():
            yield kind, task, score


def place_of(values: dict[str, str], index: str) -> tuple[set[str], int | None]:
    """Where a task may stand by its hash, and with which score (None: any) in `index`."""
    status, lane, order = values["status"], values["lane"], int(values["order"])
    if status == "pending" and values.get("notBefore"):
        # Once it is due, it stays among the delayed until somebody asks for work.
        ready = RANK[values["priority"]] + order
        score = int(values["notBefore"]) if index == "delayed" else ready
        return {"delayed", f"ready:{lane}"}, score
    if status == "pending":
        return {f"ready:{lane}"}, RANK[values["priority"]] + order
    if status in HELD:
        return {f"running:{lane}"}, None
    return {status}, order if status == "blocked" else int(values[f"{status}At"])


def of_places(found: Project, now_ms: int | None) -> Iterator[str]:
    """Every task stands in the one index of its status, with the score of that index."""
    standing: dict[str, list[str]] = {task: [] for task in found.tasks}
    for index, task, score in places(found):
        if task not in found.tasks:
            yield f"{index} has {task}, which does not exist"
            continue
        values = found.tasks[task]
        allowed, expected = place_of(values, index)
        standing[task].append(index)
        if index not in allowed:
            yield f"{index} has {task}, which is {values['status']} in lane {values['lane']}"
        elif expected is not None and score != expected:
            yield f"{index} has {task} with score {score}, not {expected}"
        due = int(values.get("notBefore") or 0)
        if now_ms and index.startswith("ready:") and due > now_ms:
            yield f"{index} has {task}, which is not due before {due}"
    for task, indexes in standing.items():
        if len(indexes) != 1:
            yield f"{task} is {found.status(task)} and stands in {indexes or 'no index'}"
    for task in found.plain.get("unsettled", {}):
        if not any(score == 0 for score in found.of("dependents").get(task, {}).values()):
            yield f"unsettled has {task}, which nothing waits for"


def of_missions(found: Project) -> Iterator[str]:
    entered = {
        (mission, task, score)
        for mission, tasks in found.of("mission").items()
        for task, score in tasks.items()
    }
    expected = {
        (values.get("mission", ""), task, int(values.get("order", 0)))
        for task, values in found.tasks.items()
    }
    yield from (f"mission has {entry}, which no task says" for entry in entered - expected)
    yield from (f"mission lacks {entry}" for entry in expected - entered)


def of_edges(found: Project) -> Iterator[str]:
    """`waits`, `dependents` and `blocked` follow from the dependencies; no task waits for itself.

    What a completion freed stays free when it is taken back.
    """
    graph = {task: found.dependencies(task) for task in found.tasks}
    unsettled, reopened = found.plain.get("unsettled", {}), found.reopened
    try:
        TopologicalSorter(found.of("waits")).prepare()
    except CycleError as cycle:
        yield f"cycle: {cycle.args[1]}"

    for task, values in found.tasks.items():
        waits = found.of("waits").get(task, set())
        needed = {one for one in graph[task] if found.status(one) not in (None, "completed")}
        late = {one for one in graph[task] if one in unsettled}
        status = values["status"]
        if status == "completed":
            if waits:
                yield f"waits:{task} has {waits}, and {task} is completed"
            continue
        if not needed - reopened <= waits <= needed | late:
            yield f"waits:{task} is {waits}, not {needed}"
        held_up = bool(waits or values.get("blocked"))
        if status in ("pending", "blocked") and held_up != (status == "blocked"):
            yield f"{task} is {status}; waits {waits}, blocked {values.get('blocked')!r}"

    expected: dict[str, dict[str, int]] = {}
    for task in found.unfinished():
        waits = found.of("waits").get(task, set())
        for other in found.tasks.keys() & {*graph[task], *waits}:
            expected.setdefault(other, {})[task] = 0 if other in waits else 1
    for other in expected.keys() | found.of("dependents").keys():
        has, wanted = found.of("dependents").get(other, {}), expected.get(other, {})
        if has.keys() != wanted.keys() or (other not in unsettled and has != wanted):
            yield f"dependents:{other} is {has}, not {wanted}"


def of_locks(found: Project, complete: bool) -> Iterator[str]:
    """A lock names the holder; a task that nobody holds has none."""
    for task, holder in found.of("lock").items():
        if task not in found.tasks:
            if complete:
                yield f"lock:{task} belongs to no task"
        elif found.status(task) not in HELD or found.tasks[task]["claimedBy"] != holder:
            yield f"lock:{task} is {holder}'s and the task {found.status(task)}"
    for task, values in found.tasks.items():
        if complete and values["status"] in HELD and task not in found.of("lock"):
            yield f"{task} is held and has no lock"


def of_lanes(found: Project, bells: bool) -> Iterator[str]:
    """No lane over its cap; one token at most in a bell, and one where somebody could claim."""
    for kind in ("ready", "running", "bell"):
        for lane in found.of(kind).keys() - found.lanes.keys():
            yield f"{kind}:{lane} belongs to no lane"
    for lane, cap in found.lanes.items():
        held, tokens = len(found.of("running").get(lane, {})), len(found.of("bell").get(lane, []))
        if cap is not None and held > cap:
            yield f"lane {lane} has {held} held tasks, its cap is {cap}"
        if tokens > 1:
            yield f"bell:{lane} has {tokens} tokens"
        room = cap is None or held < cap
        if bells and room and found.of("ready").get(lane) and not tokens:
            yield f"bell:{lane} is silent, and lane {lane} has work and room"


def of_assignments(found: Project) -> Iterator[str]:
    """What is assigned and not picked up stands in the set of its agent; one token at most in an
    inbox.  What stands there besides is taken out by the agent's next look."""
    for task, values in found.tasks.items():
        if values["status"] in HELD and values.get("assigned"):
            if task not in found.of("assigned").get(values["claimedBy"], set()):
                yield f"{task} is assigned and not among those of {values['claimedBy']}"
            if values.get("session") or values["status"] != "claimed":
                yield f"{task} is assigned, {values['status']}, session {values.get('session')}"
    for agent, tokens in found.of("inbox").items():
        if len(tokens) > 32:
            yield f"inbox:{agent} has {len(tokens)} tokens"


def of_events(found: Project, gaps: int) -> Iterator[str]:
    """One event per change number up to the project's own; every claim has a higher fence."""
    numbers = [one.number for one in found.events]
    last = int(found.meta.get("rev", 0))
    first = found.since + 1 if len(numbers) < TRIMMED else numbers[0]
    missing = set(range(first, last + 1)) - set(numbers)
    if len(missing) > gaps or (numbers and numbers[-1] > last):
        yield f"events end at {numbers[-1:]}, rev is {last}, {sorted(missing)} are missing"
    fences = [one.fence for one in found.events if one.op in ("claim", "assign")]
    if any(later <= earlier for earlier, later in pairwise(fences)):
        yield f"fences of the claims do not rise: {fences}"
    if fences and max(fences) > int(found.meta.get("fence", 0)):
        yield f"meta has fence {found.meta.get('fence')}, a claim {max(fences)}"


def of_histories(found: Project) -> Iterator[str]:
    """The events of a task are a chain from its creation to what its hash says."""
    if len(found.events) >= TRIMMED:
        return
    last: dict[str, Event] = {}
    for one in found.events:
        before = last[one.task].after if one.task in last else ""
        if one.before != before:
            yield f"event {one.number}: {one.task} {one.op} from {one.before!r}, it was {before!r}"
        last[one.task] = one
    for task, values in found.tasks.items():
        if task not in last:
            yield f"{task} has no event"
        elif (last[task].after, str(last[task].number)) != (values["status"], values["rev"]):
            yield f"{task} is {values['status']} at {values['rev']}; its last event: {last[task]}"
    for task, one in last.items():
        if one.after and task not in found.tasks:
            yield f"{task} is gone; its last event: {one}"
