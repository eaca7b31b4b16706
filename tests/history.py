"""What every client of a run asked and was told, and whether some order of the calls explains it.

A `Recorder` writes a line when a call begins and one when its answer comes, with times of one
monotonic clock; processes append to one file.  A call without an answer (its client was killed,
the server was unreachable) may have been carried out at any time after it began, or never.

`unexplained` is a search in the manner of Wing and Gong, as Porcupine does it, for each task by
itself: calls that overlap may have happened in any order, others only in theirs, and each answer
has to be what a small model of the state machine says at that place.  What the queue does without
a call (a lease ends, a dependency is completed) may happen anywhere.

`judge` also holds the calls against the event stream, which claims to be that order: no
change number is missing, every acknowledged change is there once, every change was asked for, no
call comes before one that had ended when it began, no lease ends early, and no read is stale.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import redis
from invariants import HELD, Event, event

import mosaic_queue as mq

NEVER = float("inf")
OPEN = {"UNREACHABLE"}  # codes that leave open whether the call was carried out


@dataclass
class Call:
    """What a client asked, and what it was told: code OK, a refusal's, or '' for no answer."""

    number: str
    op: str
    task: str  # '' when the queue was to choose one
    agent: str
    began: float
    fence: int = 0  # that the call named
    force: bool = False
    ended: float = NEVER
    code: str = ""
    answer: dict[str, Any] = field(default_factory=dict)
    surely: bool = False  # it had no answer, and the event stream shows that it was carried out

    @property
    def changed(self) -> bool:
        """Whether its client was told the number of the change that it made."""
        return self.code == "OK" and self.op not in SILENT and "rev" in self.answer


SILENT = {"get", "heartbeat"}  # what no event tells; a heartbeat with progress is a `progress`


class Recorder:
    """Appends calls to a file; several processes may have the same."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "a", buffering=1)  # noqa: SIM115
        self.made = 0

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, **values: Any) -> None:
        self.file.write(json.dumps(values) + "\n")

    @contextlib.contextmanager
    def call(self, op: str, task: str = "", agent: str = "", **named: Any) -> Iterator[Any]:
        """A call and its answer: the block fills the dictionary, or raises the refusal.  Whatever
        else ends the block leaves it open whether the call was carried out."""
        self.made += 1
        number = f"{os.getpid()}-{id(self)}-{self.made}"
        answer: dict[str, Any] = {}
        self.write(number=number, began=time.monotonic(), op=op, task=task, agent=agent, **named)
        try:
            yield answer
        except mq.Refused as problem:
            code = "" if problem.code in OPEN else problem.code
            self.write(number=number, ended=time.monotonic(), code=code, said=problem.message)
            raise
        code = answer.pop("code", "OK")
        self.write(number=number, ended=time.monotonic(), code=code, answer=answer)


def told_of(task: Mapping[str, Any]) -> dict[str, Any]:
    """What the checker looks at in a task that a call answered with; times in ms."""
    names = ["taskId", "status", "rev", "fence", "claimedBy", "leaseExpiresAt", "retryCount"]
    names = names[:4] if task.get("superseded") else names
    told = {name: task[name] for name in names if name in task}
    told["taskId"] = task["id"].rpartition("/")[2]
    if isinstance(told.get("leaseExpiresAt"), str):
        ends = datetime.fromisoformat(told["leaseExpiresAt"].split(" ")[0])
        told["leaseExpiresAt"] = int(ends.timestamp() * 1000)
    return told


def read_history(path: Path) -> list[Call]:
    """The calls of a file, in the order in which they began."""
    calls: dict[str, Call] = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        if "began" in values:
            calls[values["number"]] = Call(**values)
            continue
        call = calls[values["number"]]
        call.code, call.answer = values["code"], values.get("answer", {})
        call.ended = values["ended"] if call.code else NEVER
        call.task = call.task or call.answer.get("taskId", "")
    return sorted(calls.values(), key=lambda call: call.began)


def read_events(db: redis.Redis, project: str, after: int = 0) -> list[Event]:
    """The events of a project behind a change number."""
    rows = db.xrange(f"mosaic:queue:project:{{{project}}}:events", f"({after}-0")
    return [event(entry, [word for pair in fields.items() for word in pair])
            for entry, fields in rows]  # fmt: skip


# ---- the model: what a call may find, and what becomes of it ----

OFF = {"pending", "blocked"}
ANY = {"pending", "claimed", "in-progress", "completed", "failed", "blocked"}
MOVES: dict[str, tuple[Collection[str], Collection[str] | None]] = {  # None: as it was
    "create": ({""}, OFF),
    "claim": ({"pending", *HELD}, {"claimed"}),  # held: again by the same agent
    "assign": ({"pending"}, {"claimed"}),
    "start": ({"claimed"}, {"in-progress"}),
    "heartbeat": (HELD, None),
    "progress": (HELD, None),
    "note": (ANY, None),
    "release": (HELD, OFF),
    "complete": (ANY - {"completed"}, {"completed"}),  # also by force, and late
    "fail": (ANY - {"completed"}, {*OFF, "failed"}),
    "block": ({*HELD, *OFF}, {"blocked"}),
    "unblock": ({"blocked"}, OFF),
    "redrive": ({"failed"}, OFF),
    "reopen": ({"completed"}, OFF),
    "update": (ANY - {"completed"}, None),
    "delete": (ANY, {""}),
    "get": (ANY, None),
}
# What the queue does without a call.
OWN = {"reap": (HELD, {*OFF, "failed"}), "free": ({"blocked"}, {"pending"})}
OWN_TEXTS = {"update": "dependencies", "release": "did not pick it up"}  # how those texts end
HOLDERS = ("start", "heartbeat", "progress", "release", "complete", "fail", "block")


@dataclass(frozen=True)
class State:
    """A task in the model; what nobody was told is None."""

    status: str = ""
    agent: str | None = ""
    fence: int | None = 0
    above: int = 0  # the next fence is higher than this
    rev: int = 0
    exact: bool = True  # rev is that of the last change, not one below it
    retries: int | None = 0
    reaped: str | None = ""  # whose lease was the last to end


def hidden(state: State) -> Iterator[State]:
    """The state, and what the queue may have made of it by itself."""
    yield state
    later = replace(state, rev=state.rev + 1, exact=False)
    if state.status in HELD:
        ended = replace(later, reaped=state.agent)
        yield from (replace(ended, status=status) for status in (*sorted(OFF), "failed"))
    if state.status == "blocked":
        yield replace(later, status="pending")


def after(state: State, call: Call) -> Iterator[State]:
    """What the task may be when the call is made in this state and answers as it did."""
    if call.code not in ("", "OK"):
        if suits_refusal(state, call):
            yield state
        return
    before, targets = MOVES[call.op]
    if state.status in before and may(state, call):
        for status in [state.status] if targets is None else targets:
            made = agreed(moved(state, call, status), call.answer)
            if made:
                yield made


def may(state: State, call: Call) -> bool:
    """Whether the call is its caller's to make: the holder's; late, of whoever held it last."""
    same = not call.agent or call.agent == state.agent or state.agent is None
    if call.force:
        return True
    if state.status not in HELD:
        late = state.reaped in (None, call.agent)
        return late if call.op == "complete" else call.op != "fail"
    if call.op in HOLDERS and call.fence and state.fence not in (None, call.fence):
        return False
    return same or call.op not in ("claim", *HOLDERS)


def moved(state: State, call: Call, status: str) -> State:
    made = replace(state, status=status)
    if call.op not in SILENT:
        made = replace(made, rev=state.rev + 1, exact=False)
    if call.op in ("claim", "assign"):
        made = replace(made, agent=call.agent, fence=None, reaped="")
    if call.op == "fail" and status != "failed":
        made = replace(made, retries=None if state.retries is None else state.retries + 1)
    if call.op in ("redrive", "create"):
        made = replace(made, retries=0, reaped="")
    return made


def agreed(state: State, answer: Mapping[str, Any]) -> State | None:
    """The state with what an answer says of it; None where they differ."""
    held = state.status in HELD
    rev, fence = answer.get("rev", state.rev), answer.get("fence") if held else None
    exact = state.exact or "rev" in answer
    agent = answer.get("claimedBy", state.agent) if held else state.agent
    retries = answer.get("retryCount", state.retries)
    if (
        answer.get("status", state.status) != state.status
        or rev < state.rev
        or (state.exact and rev != state.rev)
        or (fence and state.fence is None and fence <= state.above)
        or (fence and state.fence not in (None, fence))
        or state.agent not in (None, agent)
        or state.retries not in (None, retries)
    ):
        return None
    return replace(
        state, rev=rev, exact=exact, agent=agent, retries=retries,
        fence=fence or state.fence, above=max(state.above, fence or 0),
    )  # fmt: skip


def suits_refusal(state: State, call: Call) -> bool:
    """Whether a refusal may be said of a task in this state."""
    held = state.status in HELD
    narrow = {"claim": {"pending"}, "complete": HELD, "fail": HELD}
    of_task = {
        "NOT_FOUND": state.status == "",
        "EXISTS": state.status != "",
        "HELD": held,
        "BLOCKED": state.status == "blocked",
        "NOT_DUE": state.status == "pending",
        "NOT_OWNER": held and (state.agent is None or state.agent != call.agent),
        "STALE_SESSION": held,
        "STALE_FENCE": held and (state.fence is None or state.fence != call.fence),
        "WRONG_STATUS": state.status not in ("", *narrow.get(call.op, MOVES[call.op][0])),
    }
    return of_task.get(call.code, True)  # others are of the project, the lane, the caller


# ---- the search ----


def by_task(calls: Iterable[Call]) -> dict[str, list[Call]]:
    """The calls on each task; one that was to choose a task and has no answer is on none."""
    found: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        if call.task:
            found[call.task].append(call)
    return found


def unexplained(calls: Iterable[Call]) -> list[str]:
    """The tasks whose answers no order of the calls explains, and where the longest one ends."""
    wrong, calls = [], list(calls)
    anywhere = [call for call in calls if not call.task and not call.code]
    for task, own in sorted(by_task(calls).items()):
        stuck = Search([*own, *anywhere]).run()
        if stuck is not None:
            wrong.append(f"{task}: no order explains {describe(stuck)}")
    return wrong


def describe(call: Call) -> str:
    fence = f" with fence {call.fence}" if call.fence else ""
    span = f"{call.began:.3f} to {call.ended:.3f}"
    return f"{call.op} by {call.agent}{fence} ({span}): {call.code or 'no answer'} {call.answer}"


class Search:
    """An order of one task's calls, by depth first; states that were reached with the same calls
    done are tried once."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls = sorted(calls, key=lambda call: call.began)
        self.certain = {i for i, call in enumerate(self.calls) if call.code or call.surely}

    def open(self, done: frozenset[int]) -> list[int]:
        """The calls that may be the next: no other had ended before they began."""
        left = [i for i in range(len(self.calls)) if i not in done]
        ends = min((self.calls[i].ended for i in left), default=NEVER)
        return [i for i in left if self.calls[i].began <= ends]

    def run(self) -> Call | None:
        """None when there is an order; else the call that the longest one could not explain."""
        todo = [(frozenset[int](), State())]
        seen, furthest, stuck = set(todo), -1, None
        while todo:
            done, state = todo.pop()
            if self.certain <= done:
                return None
            candidates = self.open(done)
            if len(done) > furthest:
                furthest = len(done)
                first = [i for i in candidates if i in self.certain]
                stuck = self.calls[min(first, key=lambda i: self.calls[i].ended)]
            # The one that ended first is tried first, so it is put down last.
            for i in sorted(candidates, key=lambda i: -self.calls[i].ended):
                for before in hidden(state):
                    for made in after(before, self.calls[i]):
                        entry = (done | {i}, made)
                        if entry not in seen:
                            seen.add(entry)
                            todo.append(entry)
        return stuck


# ---- the event stream ----


def judge(
    calls: list[Call],
    events: list[Event],
    caps: Mapping[str, int] | None = None,
    lanes: Mapping[str, str] | None = None,
    others: Collection[str] = (),
) -> list[str]:
    """Everything that is wrong in a history.  `caps` of lanes, with the lane of each task; what
    `others` did, who write no history, is known from the events alone."""
    told = [call for call in calls if call.code]
    resolved, unasked = resolve(calls, events, others)
    return [
        *broken_chains(events, caps or {}, lanes or {}),
        *without_event(told, events),
        *unasked,
        *out_of_order(told),
        *early_ends(told, events),
        *stale_reads(told, events),
        *unexplained(resolved),
    ]


def broken_chains(
    events: list[Event], caps: Mapping[str, int], lanes: Mapping[str, str]
) -> Iterator[str]:
    """Numbers without a gap; each event begins where the last of its task ended; fences rise; no
    lane has more held tasks than its cap."""
    last: dict[str, Event] = {}
    holders: dict[str, str] = {}
    held: Counter[str] = Counter()
    fence, number = 0, 0
    for one in events:
        if one.number != number + 1:
            yield f"event {one.number} follows {number}"
        number = one.number
        before = last[one.task].after if one.task in last else ""
        if one.before != before:
            yield f"event {number}: {one.task} {one.op} from {one.before!r}, it was {before!r}"
        if not any(
            one.before in sources and one.after in ([one.before] if targets is None else targets)
            for sources, targets in rules(one)
        ):
            yield f"event {number}: {one.op} of {one.task} from {one.before!r} to {one.after!r}"
        if one.op in ("claim", "assign"):
            if one.fence <= fence:
                yield f"event {number}: fence {one.fence} of {one.task} after {fence}"
            if one.before in HELD and holders[one.task] != one.agent:
                yield f"event {number}: {one.task} of {holders[one.task]} given to {one.agent}"
            fence, holders[one.task] = max(fence, one.fence), one.agent
        lane = lanes.get(one.task, "")
        held[lane] += (one.after in HELD) - (one.before in HELD)
        if lane in caps and held[lane] > caps[lane]:
            yield f"event {number}: lane {lane} has {held[lane]} held tasks of {caps[lane]}"
        last[one.task] = one


def rules(one: Event) -> Iterator[tuple[Collection[str], Collection[str] | None]]:
    """The moves that an event may tell of."""
    yield from (table[one.op] for table in (MOVES, OWN) if one.op in table)
    if of_the_queue(one):
        yield (HELD | OFF, OFF)


def of_the_queue(one: Event) -> bool:
    """Whether the queue did it by itself."""
    return one.op in OWN or (one.op in OWN_TEXTS and one.text.endswith(OWN_TEXTS[one.op]))


def without_event(calls: list[Call], events: list[Event]) -> Iterator[str]:
    """Every acknowledged change has the event with its number, and shares it with no other."""
    numbers = {one.number: one for one in events}
    taken: dict[int, Call] = {}
    later = defaultdict(list)
    for known in events:
        later[known.task].append(known)
    for call in (call for call in calls if call.changed):
        rev = call.answer["rev"]
        one = numbers.get(rev)
        if one is None:
            yield f"{describe(call)}: no event has its number"
        elif (one.task, one.op) != (call.task, call.op):
            yield f"{describe(call)}: its event is {one.op} of {one.task}"
        elif call.op == "claim" and call.answer["fence"] != one.fence:
            yield f"{describe(call)}: its event has fence {one.fence}"
        elif rev in taken:
            yield f"{describe(call)}: {describe(taken[rev])} has the same number"
        elif call.answer["status"] not in [
            one.after for one in later[call.task] if one.number >= rev
        ]:
            yield f"{describe(call)}: it never was that"
        taken[rev] = call


def resolve(
    calls: list[Call], events: list[Event], others: Collection[str]
) -> tuple[list[Call], list[str]]:
    """The calls with what the events tell of those without an answer: one that made a change
    gets its number, any other was never carried out.  And the changes that nobody asked for."""
    told = {call.answer["rev"] for call in calls if call.changed}
    numbers = {one.number: one for one in events}
    known = [as_it_was(call, numbers) for call in calls if call.code and call.task]
    unknown: dict[tuple[str, str], list[Call]] = defaultdict(list)
    for call in calls:
        if not call.code:
            unknown[call.op, call.agent].append(call)
    unasked, taken_back = [], {}
    for one in events:
        if one.number in told or of_the_queue(one):
            continue
        among = unknown[one.op, one.agent]
        suited = [call for call in among if call.task in (one.task, "")]
        call = max(suited, key=lambda call: (bool(call.task), -call.began), default=None)
        if call:
            among.remove(call)
            taken_back[one.fence] = call.op == "claim"
        elif one.agent not in others and not (one.op == "release" and taken_back.get(one.fence)):
            unasked.append(f"event {one.number}: {one.agent} never asked for {one.op} {one.task}")
        made = call or Call(f"event {one.number}", one.op, one.task, one.agent, 0, force=True)
        answer = {"rev": one.number, "status": one.after, "fence": one.fence}
        known.append(replace(made, task=one.task, answer=answer, surely=True))
    return known, unasked


def as_it_was(call: Call, numbers: Mapping[int, Event]) -> Call:
    """A call that was sent again is answered with the task as it is by then; its event says what
    became of it at first."""
    one = numbers.get(call.answer.get("rev", 0))
    if not (call.changed and one and one.after != call.answer["status"]):
        return call
    return replace(call, answer={"rev": one.number, "status": one.after, "fence": one.fence})


def out_of_order(calls: list[Call]) -> Iterator[str]:
    """A call that began when another had ended has the higher number, whatever their tasks."""
    changes = [call for call in calls if call.changed]
    ends = sorted(changes, key=lambda call: call.ended)
    highest, at = 0, 0
    for call in sorted(changes, key=lambda call: call.began):
        while at < len(ends) and ends[at].ended < call.began:
            highest = max(highest, ends[at].answer["rev"])
            at += 1
        if call.answer["rev"] < highest:
            yield f"{call.op} of {call.task} has number {call.answer['rev']}, {highest} was told"


def early_ends(calls: list[Call], events: list[Event]) -> Iterator[str]:
    """No lease ends before the time that its holder was told last."""
    told: dict[int, int] = defaultdict(int)
    for call in calls:
        if call.code == "OK" and "leaseExpiresAt" in call.answer and "fence" in call.answer:
            fence = call.answer["fence"]
            told[fence] = max(told[fence], call.answer["leaseExpiresAt"])
    for one in events:
        if one.op == "reap" and one.at < told[one.fence]:
            yield f"event {one.number}: {one.task} reaped {told[one.fence] - one.at} ms early"


def stale_reads(calls: list[Call], events: list[Event]) -> Iterator[str]:
    """A read shows the task as it was at some moment between the question and the answer."""
    by_number = {one.number: one for one in events}
    for task, own in by_task(calls).items():
        changes = [call for call in own if call.changed]
        for read in (call for call in own if call.op == "get" and call.code == "OK"):
            rev, status = read.answer["rev"], read.answer["status"]
            older = [call.answer["rev"] for call in changes if call.ended < read.began]
            newer = [call.answer["rev"] for call in changes if call.began > read.ended]
            if rev < max(older, default=0):
                yield f"{task} was read at {rev}, and {max(older)} was told before"
            if rev >= min(newer, default=NEVER):
                yield f"{task} was read at {rev}, and {min(newer)} came later"
            one = by_number.get(rev)
            if one and (one.task, one.after) != (task, status):
                yield f"{task} was read as {status} at {rev}: event {one}"


def lost_changes(calls: list[Call], events: list[Event]) -> Counter[str]:
    """How many acknowledged changes, by operation, the event stream does not have."""
    there = {(one.number, one.task, one.op): one.fence for one in events}
    lost: Counter[str] = Counter()
    for call in (call for call in calls if call.changed):
        fence = there.get((call.answer["rev"], call.task, call.op))
        lost[call.op] += fence is None or (call.op == "claim" and fence != call.answer["fence"])
    return lost
