"""The checker finds every planted fault, and no fault in histories that real clients wrote."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import Shim, one_engine
from history import Call, Recorder, judge, lost_changes, read_events, read_history, told_of
from history import unexplained as search
from invariants import Event

import mosaic_queue as mq

server = one_engine()


class Story:
    """Calls one after the other, and the event of each change."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.events: list[Event] = []
        self.clock = 0.0

    def call(self, op: str, agent: str = "", code: str = "OK", **answer: Any) -> Call:
        """A call of one second on task T; two seconds after the last one's beginning."""
        self.clock += 2
        call = Call(str(len(self.calls)), op, "T", agent, self.clock)
        call.ended = self.clock + 1 if code else float("inf")
        call.code, call.answer = code, answer
        call.fence = answer.pop("named", 0)
        self.calls.append(call)
        return call

    def change(self, op: str, before: str, after: str, agent: str = "", fence: int = 0) -> Call:
        """The same, carried out: its event has the next number."""
        number = len(self.events) + 1
        call = self.call(op, agent, rev=number, status=after)
        if op == "claim":
            call.answer |= {"fence": fence, "leaseExpiresAt": 9_000}
        at = int(self.clock * 1000)
        self.events.append(Event(number, "T", op, before, after, fence, agent, at, ""))
        return call

    def reap(self, fence: int, at: int = 10_000) -> None:
        number = len(self.events) + 1
        self.events.append(
            Event(number, "T", "reap", "claimed", "pending", fence, "monitor", at, "")
        )
        self.clock += 2

    def claimed(self) -> Call:
        self.change("create", "", "pending", "alice")
        return self.change("claim", "pending", "claimed", "alice", 7)


def told(story: Story) -> list[str]:
    """What is wrong, by the search alone and with the events."""
    return [*search(story.calls), *judge(story.calls, story.events)]


def test_a_life_cycle_is_explained() -> None:
    story = Story()
    story.claimed()
    story.call("claim", "bob", "HELD")
    story.call("heartbeat", "alice", status="claimed", rev=2, fence=7, named=7)
    story.change("start", "claimed", "in-progress", "alice", 7)
    story.call("get", status="in-progress", rev=3, fence=7, claimedBy="alice")
    story.change("complete", "in-progress", "completed", "alice", 7)
    story.call("complete", "alice", "WRONG_STATUS")
    assert told(story) == []


def double_claim(story: Story) -> None:
    story.claimed()
    story.change("claim", "claimed", "claimed", "bob", 8)


def double_claim_of_one_change(story: Story) -> None:
    story.claimed()
    story.call("claim", "bob", rev=2, status="claimed", fence=7, leaseExpiresAt=9_000)


def lost_completion(story: Story) -> None:
    story.claimed()
    story.call("complete", "alice", rev=3, status="completed")
    story.call("get", status="claimed", rev=2, fence=7)


def completed_twice(story: Story) -> None:
    story.claimed()
    story.change("complete", "claimed", "completed", "alice", 7)
    story.change("complete", "completed", "completed", "alice", 7)


def completed_by_another(story: Story) -> None:
    story.claimed()
    story.change("complete", "claimed", "completed", "bob", 7)


def fell_fence(story: Story) -> None:
    story.claimed()
    story.change("release", "claimed", "pending", "alice", 7)
    story.change("claim", "pending", "claimed", "bob", 6)


def old_fence_accepted(story: Story) -> None:
    story.claimed()
    story.change("release", "claimed", "pending", "alice", 7)
    story.change("claim", "pending", "claimed", "alice", 8)
    story.call("heartbeat", "alice", status="claimed", rev=4, named=7)


def stale_read(story: Story) -> None:
    story.claimed()
    story.change("complete", "claimed", "completed", "alice", 7)
    story.call("get", status="claimed", rev=2, fence=7)


def read_before_its_time(story: Story) -> None:
    story.claimed()
    story.call("get", status="completed", rev=3)
    story.change("complete", "claimed", "completed", "alice", 7)


def carried_out_twice(story: Story) -> None:
    story.claimed()
    story.change("fail", "claimed", "pending", "alice", 7)
    story.call("get", status="pending", rev=3, retryCount=2)


def refused_and_carried_out(story: Story) -> None:
    story.claimed()
    story.call("complete", "alice", "NOT_OWNER")
    story.call("get", status="completed", rev=3)


def numbers_against_time(story: Story) -> None:
    story.claimed()
    first, second = story.calls[-1], story.change("note", "claimed", "claimed", "carol")
    first.answer["rev"], second.answer["rev"] = 3, 2


FAULTS: list[Callable[[Story], None]] = [
    double_claim, double_claim_of_one_change, lost_completion, completed_twice,
    completed_by_another, fell_fence, old_fence_accepted, stale_read, read_before_its_time,
    carried_out_twice, refused_and_carried_out, numbers_against_time,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_search_alone_finds_a_planted_fault(fault: Callable[[Story], None]) -> None:
    story = Story()
    fault(story)
    assert search(story.calls) != []


def event_missing(story: Story) -> None:
    story.claimed()
    story.change("note", "claimed", "claimed", "bob")
    story.change("complete", "claimed", "completed", "alice", 7)
    del story.events[2]


def event_of_another_call(story: Story) -> None:
    story.claimed()
    story.events[-1] = replace(story.events[-1], op="assign")


def event_with_another_fence(story: Story) -> None:
    story.claimed()
    story.events[-1] = replace(story.events[-1], fence=9)


def one_call_two_changes(story: Story) -> None:
    story.claimed()
    story.change("note", "claimed", "claimed", "bob").code = ""
    story.change("note", "claimed", "claimed", "bob")
    del story.calls[-1]


def lease_ended_early(story: Story) -> None:
    story.claimed()
    story.reap(7, at=8_999)


def full_lane(story: Story) -> None:
    story.claimed()
    number = len(story.events)
    for n, (op, before, after) in enumerate(
        [("create", "", "pending"), ("claim", "pending", "claimed")], number + 1
    ):
        story.events.append(Event(n, "U", op, before, after, 6 + n, "bob", 9_000, ""))
        answer = {"rev": n, "status": after, "fence": 6 + n}
        story.calls.append(Call(f"U{n}", op, "U", "bob", 50 + n, 0, False, 51 + n, "OK", answer))


@pytest.mark.parametrize(
    "fault",
    [*FAULTS, event_missing, event_of_another_call, event_with_another_fence,
     one_call_two_changes, lease_ended_early, full_lane],
)  # fmt: skip
def test_the_events_tell_of_a_planted_fault(fault: Callable[[Story], None]) -> None:
    story = Story()
    fault(story)
    lanes = {"T": "coding", "U": "coding"}
    assert judge(story.calls, story.events, {"coding": 1}, lanes) != []


def test_a_call_without_an_answer_explains_one_change_or_none() -> None:
    for carried_out in (True, False):
        story = Story()
        story.claimed()
        story.call("complete", "alice", "")
        if carried_out:
            story.events.append(
                Event(3, "T", "complete", "claimed", "completed", 7, "alice", 7_000, "")
            )
        status, rev = ("completed", 3) if carried_out else ("claimed", 2)
        story.call("get", status=status, rev=rev)
        assert told(story) == []


def test_who_had_no_answer_to_next_may_hold_the_task() -> None:
    story = Story()
    story.change("create", "", "pending", "alice")
    story.call("claim", "bob", "").task = ""
    story.events.append(Event(2, "T", "claim", "pending", "claimed", 7, "bob", 5_000, ""))
    story.call("claim", "alice", "HELD")
    assert told(story) == []


def test_a_lease_that_ended_lets_another_claim_and_the_late_one_complete() -> None:
    story = Story()
    story.claimed()
    story.reap(7)
    story.change("complete", "pending", "completed", "alice", 7)
    assert told(story) == []
    story.calls[-1].agent = "bob"
    assert search(story.calls) != []


def test_what_a_failover_lost_is_counted() -> None:
    story = Story()
    story.claimed()
    story.change("complete", "claimed", "completed", "alice", 7)
    del story.events[1:]
    assert lost_changes(story.calls, story.events) == {"create": 0, "claim": 1, "complete": 1}


AGENTS, TASKS, CALLS = 6, 5, 60
OPS = "claim claim start progress release complete fail get note"


async def agent(config: mq.Config, recorder: Recorder, name: str, seed: int) -> None:
    """Calls of all kinds on few tasks, so that they meet."""
    rng = random.Random(seed)
    fences: dict[str, int] = {}
    async with mq.Queue(config, session=name) as queue:
        for _ in range(CALLS):
            task = f"T{rng.randrange(TASKS)}"
            op = rng.choice(OPS.split())
            op = rng.choice([op, op, "redrive", "reopen"]) if rng.random() < 0.2 else op
            named: dict[str, Any] = {"agent": name, "fence": fences.get(task)}
            of: dict[str, dict[str, Any]] = {
                "claim": {"agent": name, "ttl": 300}, "progress": {**named, "progress": "on it"},
                "fail": {**named, "reason": "no", "retry_delay": 0}, "get": {},
                "note": {"text": f"by {name}"}, "redrive": {}, "reopen": {"reason": "again"},
            }  # fmt: skip
            method = getattr(queue, {"progress": "heartbeat"}.get(op, op))
            given = (
                {"fence": fences[task]} if task in fences and "fence" in of.get(op, named) else {}
            )
            who = queue.actor if op in ("redrive", "reopen", "note", "get") else name
            try:
                with recorder.call(op, task, who, **given) as answer:
                    made = await method(task, **of.get(op, named))
                    answer |= told_of(made)
                    fences |= {task: made["fence"]} if op == "claim" else {}
            except mq.Refused:
                pass


def test_real_clients_are_explained(
    config: mq.Config, db: redis.Redis, tmp_path: Path, shim: Shim
) -> None:

    async def run(recorder: Recorder) -> None:
        async with mq.Queue(config) as queue:
            for n in range(TASKS):
                with recorder.call("create", f"T{n}", queue.actor) as answer:
                    answer |= told_of(await queue.create("p", "m", f"T{n}", title="a task"))
            async with asyncio.TaskGroup() as group:
                for n in range(AGENTS):
                    group.create_task(agent(config, recorder, f"agent-{n}", n))
                for _ in range(5):
                    await asyncio.sleep(0.05)
                    shim.seconds += 200
                    await queue.reap(project="p")

    with Recorder(tmp_path / "history") as recorder:
        asyncio.run(run(recorder))
    calls, events = read_history(tmp_path / "history"), read_events(db, "p")
    assert sum(call.changed for call in calls) > 30
    assert judge(calls, events) == []
    # One answer that is made wrong is seen.
    for call in [call for call in calls if call.op == "complete" and call.code == "OK"][:5]:
        status, call.answer["status"] = call.answer["status"], "pending"
        assert search(calls) != []
        call.answer["status"] = status
