"""Random histories of a project against a model of a few lines of state.

The model says of every call whether it is refused, and with which code, and what becomes of each
task.  After every step the tasks are compared and the key space is checked; a refusal and the
repeat of a call leave every byte of it alone.  Leases and delays end on odd multiples of 25 s and
the clock is turned by multiples of 50 s, so that the time a test takes never decides.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
from conftest import Server, Shim, key_space
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from invariants import problems, read_project

import mosaic_queue as mq

IDS = [f"T{i}" for i in range(5)]
CAP, RETRIES, EXPIRIES = 2, 2, 2  # of lane coding; maxRetries; deadLetterAfter
RETRY_DELAY = 25  # s; doubled
TTL, PICK_UP = 375, 60  # s: of claims that name none; for an assignment
RECENT = 8  # calls that may be repeated

task_ids = st.sampled_from(IDS)
picks = st.integers(0, 99)  # which task: mostly one that the call suits, see `History.pick`
agents = st.sampled_from(["alice", "bob"])
callers = st.sampled_from(["whoever holds it"] * 4 + ["alice", "bob"])
spans = st.sampled_from([25, 75, 175])  # s
lanes = st.sampled_from(["any", "coding"])


def of_task(answer: Any) -> Any:
    """The task of an answer: some operations answer with a list of one."""
    return answer["tasks"][0] if "tasks" in answer else answer


@dataclass
class Model:
    """What the model knows of a task; times in seconds of the turned clock."""

    lane: str
    dependencies: list[str]
    age: int = 0  # the older, the smaller
    status: str = ""
    waits: set[str] = field(default_factory=set)  # dependencies that it waits for
    blocked: bool = False  # by hand
    assigned: bool = False  # and not picked up
    holder: str = ""
    ttl: int = 0
    lease: int = 0  # when it ends
    due: int = 0  # notBefore
    failed: int = -1  # when its last claim ended by failing
    failer: str = ""  # and whose that was
    retries: int = 0
    expiries: int = 0
    reaped: str = ""  # whose lease was the last to end, by reap
    late: bool = False

    @property
    def held(self) -> bool:
        return self.status in ("claimed", "in-progress")


class History(RuleBasedStateMachine):
    """Calls of two agents and an operator; `server`, `shim` and `config` come from the test."""

    server: Server
    shim: Shim
    config: mq.Config

    def __init__(self) -> None:
        super().__init__()
        self.tasks: dict[str, Model] = {}
        self.now, self.calls, self.paused = 0, 0, False
        self.made: list[tuple[str, Callable[[], Any], Any]] = []  # task, call, its answer
        self.shim.seconds = 0
        self.db = self.server.client()
        self.db.flushall()
        self.loop = asyncio.new_event_loop()
        self.queue = mq.Queue(self.config)

    def teardown(self) -> None:
        self.loop.run_until_complete(self.queue.close())
        self.loop.close()
        self.db.close()

    # ---- who and what ----

    def pick(self, number: int, suits: Callable[[Model], bool]) -> str:
        """A task that suits the call; now and then, or if there is none, any id."""
        suited = [task for task, one in sorted(self.tasks.items()) if suits(one)]
        among = suited if suited and number % 10 else IDS
        return among[number // 10 % len(among)]

    def pick_held(self, number: int, suits: Callable[[Model], bool] = lambda one: one.held) -> str:
        """A held task, unless told otherwise; if no task is held, one is claimed for it."""
        if number % 10 and not any(one.held for one in self.tasks.values()):
            self.claim(number, "alice", 75)
        return self.pick(number, suits)

    def caller(self, task: str, name: str) -> str:
        one = self.tasks.get(task)
        if name in ("alice", "bob"):
            return name
        return (one and (one.holder or one.reaped)) or "alice"

    # ---- what the model says ----

    def code_of_claim(self, task: str, agent: str) -> str:
        """The refusal of a claim, or '' when it is granted."""
        one = self.tasks.get(task)
        if one is None:
            return "NOT_FOUND"
        if self.paused:
            return "PAUSED"
        if one.held:
            return "HELD" if not one.assigned or one.holder != agent else ""
        if one.status != "pending":
            return "BLOCKED" if one.status == "blocked" else "WRONG_STATUS"
        if one.due > self.now:
            return "NOT_DUE"
        return "LANE_FULL" if self.full(one.lane) else ""

    def code_of_assign(self, task: str, agent: str) -> str:
        one = self.tasks.get(task)
        return "HELD" if one and one.held else self.code_of_claim(task, agent)

    def full(self, lane: str) -> bool:
        held = [one for one in self.tasks.values() if one.held and one.lane == lane]
        return lane == "coding" and len(held) >= CAP

    def code_of_holder(self, task: str, agent: str, *statuses: str) -> str:
        """The refusal of a call that only the holder may make."""
        one = self.tasks.get(task)
        if one is None:
            return "NOT_FOUND"
        if one.status not in (statuses or ("claimed", "in-progress")):
            return "WRONG_STATUS"
        return "NOT_OWNER" if one.holder != agent else ""

    def expired(self, lane: str | None = None) -> list[str]:
        return [
            task
            for task, one in self.tasks.items()
            if one.held and one.lease <= self.now and lane in (None, one.lane)
        ]

    def settle(self, one: Model) -> None:
        one.status = "blocked" if one.waits or one.blocked else "pending"
        one.holder, one.assigned = "", False

    def depend(self, one: Model, on: list[str]) -> None:
        one.dependencies = list(dict.fromkeys(on))
        one.waits = {name for name in on if self.tasks[name].status != "completed"}

    def leads_to(self, task: str, on: list[str]) -> bool:
        seen, todo = set(), [name for name in on if self.tasks[name].status != "completed"]
        while todo:
            name = todo.pop()
            if name in self.tasks and name not in seen:
                seen.add(name)
                todo += self.tasks[name].waits
        return task in seen

    def free(self, task: str) -> None:
        """Nothing waits for the task any more."""
        for one in self.tasks.values():
            one.waits.discard(task)
            if one.status == "blocked":
                self.settle(one)

    def reap_all(self) -> None:
        for task in self.expired():
            one = self.tasks[task]
            one.due = 0
            if one.assigned:
                self.settle(one)
                continue
            one.reaped, one.expiries = one.holder, one.expiries + 1
            self.settle(one)
            if one.expiries >= EXPIRIES:
                one.status = "failed"

    def dependents(self, task: str) -> list[Model]:
        unfinished = (one for one in self.tasks.values() if one.status != "completed")
        return [one for one in unfinished if task in one.dependencies]

    # ---- the call and its comparison ----

    def call(self, expected: str, task: str, method: str, /, *args: Any, **options: Any) -> bool:
        """Make a call, which must be refused with the expected code or, if that is '', be made."""
        self.calls += 1
        op = {"op": f"op-{self.calls}"}
        self.queue.leases.clear()  # nobody's fence is named: each call is a process of its own

        def again() -> Any:
            call = getattr(self.queue, method)(*args, **options, **op)
            return self.loop.run_until_complete(call)

        before = key_space(self.server) if expected else None
        code, answer = "", None
        try:
            answer = of_task(again())
        except mq.Refused as problem:
            code = problem.code
        assert code == expected, f"the queue says {code or 'yes'}, the model {expected or 'yes'}"
        if code:
            assert key_space(self.server) == before
            return False
        if method != "heartbeat" or options["progress"]:  # else it may well act twice
            self.made = [*self.made, (task, again, answer)][-RECENT:]
        return True

    @initialize(lanes=st.tuples(lanes, lanes, lanes))
    def begin(self, lanes: tuple[str, str, str]) -> None:
        """A diamond without its lower end, so that there is something to do."""
        for task, on, lane in zip(IDS, ([], ["T0"], ["T0"]), lanes, strict=False):
            self.create(task, list(on), lane, None)

    @precondition(lambda self: len(self.tasks) < len(IDS))
    @rule(pick=picks, on=st.lists(task_ids, max_size=3), lane=lanes, delay=st.none() | spans)
    def enter(self, pick: int, on: list[str], lane: str, delay: int | None) -> None:
        new = [task for task in IDS if task not in self.tasks or pick % 10 == 0]
        self.create(new[pick // 10 % len(new)], on, lane, delay)

    def create(self, task: str, on: list[str], lane: str, delay: int | None) -> None:
        unknown = [other for other in on if other not in self.tasks]
        first = next((other for other in on if other == task or other in unknown), None)
        code = "" if first is None else "CYCLE" if first == task else "NOT_FOUND"
        code = "EXISTS" if task in self.tasks else code
        options: dict[str, Any] = {"title": "a task", "lane": lane, "delay": delay}
        if self.call(code, task, "create", "p", "m", task, dependencies=on, **options):
            self.tasks[task] = one = Model(lane, [], self.calls)
            self.depend(one, on)
            one.due = self.now + delay if delay else 0
            self.settle(one)

    @rule(pick=picks, agent=agents, ttl=spans)
    def claim(self, pick: int, agent: str, ttl: int) -> None:
        task = self.pick(pick, lambda one: one.status == "pending" and one.due <= self.now)
        if self.take(self.code_of_claim, task, agent, "claim", task, agent, ttl=ttl):
            self.hold(task, agent, ttl)

    @rule(pick=picks, agent=agents)
    def assign(self, pick: int, agent: str) -> None:
        task = self.pick(pick, lambda one: one.status == "pending" and one.due <= self.now)
        if self.take(self.code_of_assign, task, agent, "assign", task, agent=agent):
            self.hold(task, agent, PICK_UP, assigned=True)

    def take(
        self,
        code_of: Callable[[str, str], str],
        task: str,
        agent: str,
        method: str,
        /,
        *args: Any,
        **options: Any,
    ) -> bool:
        one, code = self.tasks.get(task), code_of(task, agent)
        if one and code in ("HELD", "BLOCKED", "LANE_FULL") and self.expired(one.lane):
            # Whoever is in the way may have lost his lease: the queue looks, and asks again.
            self.reap_all()
            code = code_of(task, agent)
            if code:
                with pytest.raises(mq.Refused) as caught:
                    self.loop.run_until_complete(getattr(self.queue, method)(*args, **options))
                assert caught.value.code == code
                return False
        return self.call(code, task, method, *args, **options)

    def hold(self, task: str, agent: str, ttl: int, assigned: bool = False) -> None:
        one = self.tasks[task]
        one.status, one.holder, one.reaped, one.due, one.failer = "claimed", agent, "", 0, ""
        one.ttl, one.lease, one.assigned = ttl, self.now + ttl, assigned

    @rule(agent=agents, lane=st.sampled_from([None, "coding"]), ttl=spans)
    def next(self, agent: str, lane: str | None, ttl: int) -> None:
        """What is assigned to the agent, in any order; else the oldest of what is ready."""
        offered = self.offered(agent, lane)
        if not offered and self.expired():
            self.reap_all()
            offered = self.offered(agent, lane)
        answer = self.loop.run_until_complete(self.queue.next(agent, lane=lane, ttl=ttl))
        if not offered:
            assert answer["tasks"] == []
            assert answer["why"]
            return
        task = answer["tasks"][0]["taskId"]
        assert task in offered
        self.hold(task, agent, ttl)

    def offered(self, agent: str, lane: str | None) -> list[str]:
        if self.paused:
            return []
        mine = [task for task, one in self.tasks.items() if one.assigned and one.holder == agent]
        ready = [
            task
            for task, one in self.tasks.items()
            if one.status == "pending"
            and one.due <= self.now
            and not self.full(one.lane)
            and lane in (None, one.lane, "coding")
            and not self.others_first(one, agent)
        ]
        return mine or sorted(ready, key=lambda task: self.tasks[task].age)[:1]

    def others_first(self, one: Model, agent: str) -> bool:
        """Whoever failed a task last waits twice the delay."""
        mine = one.failer == agent and one.due > 0
        return mine and 2 * one.due - one.failed > self.now

    @rule(paused=st.sampled_from([True, False, False]))
    def pause(self, paused: bool) -> None:
        turn = self.queue.pause if paused else self.queue.unpause
        self.loop.run_until_complete(turn(project="p"))
        self.paused = paused

    @rule(task=task_ids)
    def note(self, task: str) -> None:
        self.call("" if task in self.tasks else "NOT_FOUND", task, "note", task, "seen")

    @rule(pick=picks, agent=callers)
    def block(self, pick: int, agent: str) -> None:
        task = self.pick(pick, lambda one: one.status not in ("completed", "failed"))
        agent = self.caller(task, agent)
        one = self.tasks.get(task)
        code = self.code_of_holder(task, agent, "pending", "blocked", "claimed", "in-progress")
        code = "" if code == "NOT_OWNER" and one and not one.held else code
        if self.call(code, task, "block", task, agent=agent, reason="wait"):
            assert one is not None
            one.blocked = True
            self.settle(one)

    @rule(pick=picks)
    def unblock(self, pick: int) -> None:
        task = self.pick(pick, lambda one: one.status == "blocked" and one.blocked)
        one = self.tasks.get(task)
        code = "" if one and one.status == "blocked" and one.blocked else "WRONG_STATUS"
        if self.call(code if one else "NOT_FOUND", task, "unblock", task):
            assert one is not None
            one.blocked = False
            self.settle(one)

    @rule(pick=picks, on=st.lists(task_ids, max_size=3))
    def update(self, pick: int, on: list[str]) -> None:
        task = self.pick(pick, lambda one: one.status != "completed")
        one = self.tasks.get(task)
        first = next((name for name in on if name == task or name not in self.tasks), None)
        code = "" if first is None else "CYCLE" if first == task else "NOT_FOUND"
        code = code or ("CYCLE" if self.leads_to(task, on) else "")
        if one is None or one.status == "completed":
            code = "WRONG_STATUS" if one else "NOT_FOUND"
        if self.call(code, task, "update", task, dependencies=on):
            assert one is not None
            self.depend(one, on)
            if one.status in ("pending", "blocked"):
                self.settle(one)

    @rule(pick=picks)
    def redrive(self, pick: int) -> None:
        task = self.pick(pick, lambda one: one.status == "failed")
        one = self.tasks.get(task)
        code = "" if one and one.status == "failed" else "WRONG_STATUS"
        if self.call(code if one else "NOT_FOUND", task, "redrive", task):
            assert one is not None
            one.retries = one.expiries = one.due = 0
            one.reaped = ""
            self.settle(one)

    @rule(pick=picks)
    def reopen(self, pick: int) -> None:
        """Whom it freed stays free; what it depended on and is gone is no dependency any more."""
        task = self.pick(pick, lambda one: one.status == "completed")
        one = self.tasks.get(task)
        code = "" if one and one.status == "completed" else "WRONG_STATUS"
        if self.call(code if one else "NOT_FOUND", task, "reopen", task, reason="blank"):
            assert one is not None
            self.depend(one, [name for name in one.dependencies if name in self.tasks])
            one.late = one.blocked = False
            self.settle(one)

    @rule(pick=picks, agent=callers)
    def start(self, pick: int, agent: str) -> None:
        task = self.pick_held(pick, lambda one: one.status == "claimed")
        agent = self.caller(task, agent)
        code = self.code_of_holder(task, agent, "claimed")
        if self.call(code, task, "start", task, agent=agent):
            self.tasks[task].status = "in-progress"
            self.pick_up(task, TTL)

    def pick_up(self, task: str, ttl: int) -> None:
        one = self.tasks[task]
        if one.assigned:
            one.assigned, one.ttl, one.lease = False, ttl, self.now + ttl

    @rule(
        pick=picks, agent=callers, ttl=st.none() | spans, progress=st.sampled_from([None, "half"])
    )
    def heartbeat(self, pick: int, agent: str, ttl: int | None, progress: str | None) -> None:
        task = self.pick_held(pick)
        agent = self.caller(task, agent)
        code = self.code_of_holder(task, agent)
        rev = self.db.hget("mosaic:queue:project:{p}", "rev")
        options = {"ttl": ttl, "progress": progress}
        if self.call(code, task, "heartbeat", task, agent=agent, **options):
            one = self.tasks[task]
            self.pick_up(task, ttl or TTL)
            one.ttl = ttl or one.ttl
            one.lease = max(one.lease, self.now + one.ttl)
            changed = self.db.hget("mosaic:queue:project:{p}", "rev") != rev
            assert changed == (progress is not None)

    @rule(pick=picks, agent=callers, delay=st.none() | spans)
    def release(self, pick: int, agent: str, delay: int | None) -> None:
        task = self.pick_held(pick)
        agent = self.caller(task, agent)
        code = self.code_of_holder(task, agent)
        if self.call(code, task, "release", task, agent=agent, delay=delay):
            one = self.tasks[task]
            self.settle(one)
            one.due = self.now + delay if delay else 0

    @rule(pick=picks, agent=callers, force=st.booleans())
    def complete(self, pick: int, agent: str, force: bool) -> None:
        if force:
            task = self.pick(pick, lambda one: one.status != "completed" and not one.held)
        else:
            task = self.pick_held(pick, lambda one: one.held or bool(one.reaped))
        agent = self.caller(task, agent)
        one, code = self.tasks.get(task), self.code_of_holder(task, agent)
        late = bool(one and not one.held and one.status != "completed" and one.reaped == agent)
        if late or (force and one and one.status != "completed"):
            code = ""
        if self.call(code, task, "complete", task, agent=agent, force=force, summary="done"):
            assert one is not None
            one.status, one.due, one.late, one.assigned = "completed", 0, late, False
            one.reaped = "" if late else one.reaped
            one.waits.clear()
            self.free(task)

    @rule(
        pick=picks,
        agent=callers,
        retry=st.sampled_from([True, True, False]),
        force=st.sampled_from([False, False, True]),
        delay=st.none() | spans,
    )
    def fail(self, pick: int, agent: str, retry: bool, force: bool, delay: int | None) -> None:
        task = self.pick_held(pick, lambda one: one.held or force)
        agent = self.caller(task, agent)
        one, code = self.tasks.get(task), self.code_of_holder(task, agent)
        if force and one and one.status != "completed":
            code = ""
        options = {"reason": "broken", "retry": retry, "force": force, "delay": delay}
        if self.call(code, task, "fail", task, agent=agent, **options):
            assert one is not None
            one.due = 0
            one.failed, one.failer = self.now, one.holder or one.failer
            if retry and one.retries < RETRIES:
                one.due = self.now + (delay or RETRY_DELAY * 2**one.retries)
                one.retries += 1
                self.settle(one)
            else:
                one.status, one.assigned = "failed", False

    @rule(seconds=st.sampled_from([50, 200]))
    def time_passes(self, seconds: int) -> None:
        self.pause(False)  # it would hide the rest if it lasted
        self.now += seconds
        self.shim.seconds = self.now

    @rule()
    def all_leases_end(self) -> None:
        self.time_passes(200)
        self.reap()

    @rule()
    def reap(self) -> None:
        expired = {f"p/{task}" for task in self.expired() if not self.tasks[task].assigned}
        answer = self.loop.run_until_complete(self.queue.reap())
        assert (set(answer["reaped"]), answer["settled"]) == (expired, 0)
        self.reap_all()

    @precondition(lambda self: len(self.tasks) > 2)
    @rule(task=task_ids, force=st.booleans())
    def delete(self, task: str, force: bool) -> None:
        one, code = self.tasks.get(task), ""
        if one is None:
            code = "NOT_FOUND"
        elif not force and one.held:
            code = "HELD"
        elif not force and self.dependents(task):
            code = "HAS_DEPENDENTS"
        if self.call(code, task, "delete", task, force=force):
            for other in self.dependents(task):
                other.dependencies.remove(task)
            del self.tasks[task]
            self.free(task)

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """The last call on a task is sent again: the same answer, and nothing happens."""
        latest = {task: (again, answer) for task, again, answer in self.made}
        task = data.draw(st.sampled_from(sorted(latest)))
        one, (again, answer) = self.tasks.get(task), latest[task]
        if one and self.db.hget(f"mosaic:queue:project:{{p}}:task:{task}", "rev") != str(
            answer["rev"]
        ):
            return  # it changed since by itself: was reaped or freed, or only its lease renewed
        before = key_space(self.server)
        assert of_task(again())["rev"] == answer["rev"]
        assert key_space(self.server) == before

    # ---- after every step ----

    @invariant()
    def as_the_model_says(self) -> None:
        found = read_project(self.db, "p")
        assert found.tasks.keys() == self.tasks.keys()
        for task, one in self.tasks.items():
            values = found.tasks[task]
            assert values["status"] == one.status, task
            if one.held:
                assert (values["claimedBy"], int(values["claimTTL"])) == (one.holder, one.ttl)
            assert found.dependencies(task) == one.dependencies
            assert bool(values.get("blocked")) == one.blocked or one.status == "completed"
            assert int(values.get("retryCount") or 0) == one.retries
            assert int(values.get("expiryCount") or 0) == one.expiries
            assert bool(values.get("late")) == one.late

    @invariant()
    def sound(self) -> None:
        now = int((time.time() + self.now) * 1000)
        assert problems(self.db, "p", now, bells=True) == []


def test_histories(server: Server, shim: Shim, config: mq.Config) -> None:
    config.set("lanes.coding.maxConcurrent", CAP, "test")
    config.set("defaults.claimTTL", TTL, "test")
    config.set("defaults.maxRetries", RETRIES, "test")
    config.set("defaults.retryDelay", RETRY_DELAY, "test")
    config.set("defaults.deadLetterAfter", EXPIRIES, "test")
    bound = type("Bound", (History,), {"server": server, "shim": shim, "config": config})
    run_state_machine_as_test(
        bound,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            report_multiple_bugs=False,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
