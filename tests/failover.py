"""What a failover loses, and what it does not.

    python tests/failover.py [--seconds S]

A primary with two replicas behind a Sentinel, and three primaries with a replica each as a cluster.
Agents claim and complete on them while the primary is killed, or stopped until its replica has
taken over and then let go on, or while the project's slot moves to another primary.  For a moment
before its end its replicas hear nothing, so that there is something to lose.  Each is done without
and with `defaults.wait`, which acknowledges nothing that a replica has not got.

Counted is what the agents were told and the event stream does not have afterwards, how often two
agents had a task at a time inside the leases that they were told, and how many tasks were completed
by two.  What must hold always: no fence is granted twice or falls, and the queue is sound in the
end.  Nothing is lost with `defaults.wait.replicas` 1 when a primary dies for good, and with as many
as there are when it is cut off and comes back: a primary that some replicas still follow would
acknowledge what the one that took over never heard of.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import redis
from conftest import BINARIES, Server, Shim, free_port
from history import Call, Recorder, judge, lost_changes, read_events, read_history, told_of
from invariants import problems

import mosaic_queue as mq

AGENTS, TASKS, TTL = 6, 4000, 120
DEAF = 0.3  # s for which the replica hears nothing before the primary ends
SLOTS, ROOT = 16384, "mosaic:queue:project:{p}"


class Node(Server):
    """A server on a port of its own."""

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        given = ("--port", str(self.port), "--bind", "127.0.0.1", "--appendonly", "yes")
        given += ("--repl-diskless-sync-delay", "0")
        super().__init__(str(BINARIES["valkey"]()), *given, *options)

    def ask(self, *command: Any) -> Any:
        with self.client() as client:
            return client.execute_command(*command)

    def send(self, sent: int) -> None:
        os.kill(self.process.pid, sent)


def wait_for(true: Callable[[], Any], limit: float = 60) -> None:
    give_up = time.monotonic() + limit
    while True:
        with contextlib.suppress(redis.RedisError):
            if true():
                return
        assert time.monotonic() < give_up, "it did not come true"
        time.sleep(0.05)


@dataclass
class Stage:
    """Servers with the project on one of them."""

    url: str
    nodes: list[Node]

    def primary(self) -> Node:
        """The one that has the project's events and takes writes."""
        for node in self.nodes:
            with contextlib.suppress(redis.RedisError):
                if node.ask("ROLE")[0] == "master" and node.ask("EXISTS", ROOT):
                    return node
        raise AssertionError("no primary has the project")

    def replicas_of(self, primary: Node) -> list[Node]:
        roles = [(node, node.ask("ROLE")) for node in self.nodes]
        return [node for node, role in roles if role[0] == "slave" and role[2] == primary.port]


@contextlib.contextmanager
def sentinel() -> Iterator[Stage]:
    """A primary, two replicas, and a Sentinel that gives up on it after half a second."""
    with ExitStack() as stack:
        first = Node()
        stack.callback(first.close)
        replicas = [Node("--replicaof", "127.0.0.1", str(first.port)) for _ in range(2)]
        for one in replicas:
            stack.callback(one.close)
        folder = Path(tempfile.mkdtemp(prefix="mq-sentinel-"))
        port = free_port()
        lines = [f"port {port}", f"dir {folder}", f"sentinel monitor main 127.0.0.1 {first.port} 1"]
        lines += [
            "sentinel down-after-milliseconds main 500",
            "sentinel failover-timeout main 2000",
        ]
        (folder / "sentinel.conf").write_text("\n".join(lines) + "\n")
        process = subprocess.Popen(
            [str(BINARIES["valkey"]()), str(folder / "sentinel.conf"), "--sentinel"],
            stdout=subprocess.DEVNULL,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        watcher = stack.enter_context(contextlib.closing(redis.Redis(port=port)))
        wait_for(lambda: watcher.sentinel_master("main")["num-slaves"] == 2)
        wait_for(lambda: all(one.ask("ROLE")[3:4] == ["connected"] for one in replicas))
        yield Stage(f"redis+sentinel://127.0.0.1:{port}/main", [first, *replicas])


@contextlib.contextmanager
def cluster() -> Iterator[Stage]:
    """Three primaries with a replica each."""
    with ExitStack() as stack:
        nodes = []
        for _ in range(6):
            options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000")
            nodes.append(Node(*options))
            stack.callback(nodes[-1].close)
        first, *others = nodes
        for other in others:
            first.ask("CLUSTER", "MEET", "127.0.0.1", other.port)
        bounds = [0, SLOTS // 3, 2 * SLOTS // 3, SLOTS]
        for n, node in enumerate(nodes[:3]):
            node.ask("CLUSTER", "ADDSLOTSRANGE", bounds[n], bounds[n + 1] - 1)
        wait_for(lambda: all("cluster_known_nodes:6" in node.ask("CLUSTER", "INFO")
                             for node in nodes))  # fmt: skip
        for n, node in enumerate(nodes[3:]):
            wait_for(lambda node=node, n=n: node.ask(
                "CLUSTER", "REPLICATE", nodes[n].ask("CLUSTER", "MYID")))  # fmt: skip
        wait_for(lambda: all("cluster_state:ok" in node.ask("CLUSTER", "INFO")
                             for node in nodes))  # fmt: skip
        wait_for(lambda: all(node.ask("ROLE")[3:4] == ["connected"] for node in nodes[3:]))
        yield Stage(f"redis+cluster://127.0.0.1:{first.port},127.0.0.1:{nodes[1].port}", nodes)


# ---- what happens ----


async def deafen(stage: Stage) -> tuple[Node, list[Node]]:
    """The primary, and its replicas, which have stopped and are sent nothing for a moment."""
    primary = stage.primary()
    replicas = stage.replicas_of(primary)
    for one in replicas:
        one.send(signal.SIGSTOP)
    primary.ask("CLIENT", "KILL", "TYPE", "replica")
    await asyncio.sleep(DEAF)
    return primary, replicas


async def taken_over(replicas: list[Node]) -> None:
    for one in replicas:
        one.send(signal.SIGCONT)
    await asyncio.to_thread(
        wait_for, lambda: any(one.ask("ROLE")[0] == "master" for one in replicas)
    )


async def killed(stage: Stage) -> None:
    """For good, if another replica is left."""
    primary, replicas = await deafen(stage)
    primary.kill()
    await taken_over(replicas)
    stage.nodes.remove(primary)
    if len(replicas) == 1:
        await asyncio.to_thread(primary.start)
        stage.nodes.append(primary)


async def stopped(stage: Stage) -> None:
    """Cut off until another is the primary; then for a moment there are two."""
    primary, replicas = await deafen(stage)
    primary.send(signal.SIGSTOP)
    await taken_over(replicas)
    primary.send(signal.SIGCONT)
    await asyncio.to_thread(wait_for, lambda: primary.ask("ROLE")[3:4] == ["connected"])


async def moved(stage: Stage) -> None:
    """The project's slot goes to the next primary, key by key, and back at once."""
    source = stage.primary()
    slot = source.ask("CLUSTER", "KEYSLOT", "{p}")
    targets = [node for node in stage.nodes if node.ask("ROLE")[0] == "master"]
    target = next(node for node in targets if node is not source)
    ids = {node.port: node.ask("CLUSTER", "MYID") for node in (source, target)}
    target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source.port])
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target.port])
    while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 50):
        await asyncio.to_thread(
            source.ask, "MIGRATE", "127.0.0.1", target.port, "", 0, 60_000, "KEYS", *keys
        )
        await asyncio.sleep(0)
    for node in (target, source):
        node.ask("CLUSTER", "SETSLOT", slot, "NODE", ids[target.port])
    await asyncio.sleep(0.5)
    target.ask("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", ids[source.port])
    await asyncio.to_thread(wait_for, lambda: source.ask("CLUSTER", "COUNTKEYSINSLOT", slot))
    await asyncio.to_thread(wait_for, lambda: not target.ask("CLUSTER", "COUNTKEYSINSLOT", slot))


# ---- the agents ----


async def agent(config: mq.Config, recorder: Recorder, name: str, over: asyncio.Event) -> None:
    async with mq.Queue(config, session=name, deadline=6) as queue:
        while not over.is_set():
            with contextlib.suppress(mq.Refused):
                with recorder.call("claim", "", name) as answer:
                    tasks = (await queue.next(name, ttl=TTL))["tasks"]
                    answer |= told_of(tasks[0]) if tasks else {"code": "NOTHING"}
                for task in tasks:
                    await asyncio.sleep(0.01)
                    named = {"agent": name, "fence": task["fence"]}
                    with recorder.call("complete", task["taskId"], **named) as answer:
                        answer |= told_of(await queue.complete(task["id"], **named))


@contextlib.asynccontextmanager
async def at_work(config: mq.Config, recorder: Recorder) -> AsyncIterator[None]:
    over = asyncio.Event()
    working = [
        asyncio.create_task(agent(config, recorder, f"agent-{n}", over)) for n in range(AGENTS)
    ]
    try:
        yield
    finally:
        over.set()
        await asyncio.gather(*working)


@dataclass
class Outcome:
    """What was told, lost and held twice; what must never be."""

    told: int
    lost: dict[str, int]
    twice: int
    done: int
    wrong: list[str]


async def some_work(recorder: Recorder, seconds: float) -> None:
    """Wait, on a machine that is busy elsewhere until something has been done."""
    before, until = recorder.made, time.monotonic() + 30
    await asyncio.sleep(seconds)
    while recorder.made < before + 60 and time.monotonic() < until:
        await asyncio.sleep(0.1)


async def play(
    stage: Stage, event: Callable[[Stage], Any], wait: int, seconds: float = 1
) -> Outcome:
    """Agents at work, and something happens to their servers."""
    config = mq.Config(environ={}).set("redis.url", stage.url, "t").set("project", "p", "t")
    config.set("defaults.wait.replicas", wait, "t").set("defaults.wait.ms", 200, "t")
    folder = Path(tempfile.mkdtemp(prefix="mq-failover-"))
    shim = Shim()
    with mock.patch.object(mq, "script", shim.script), Recorder(folder / "history") as recorder:
        async with mq.Queue(config, deadline=60) as queue:
            for at in range(0, TASKS, 200):
                rows: list[Any] = [
                    {"taskId": f"T{n}", "mission": "m", "title": "t"} for n in range(at, at + 200)
                ]
                await queue.create_all(rows, project="p")
            async with at_work(config, recorder):
                await some_work(recorder, seconds)
                await event(stage)
                await some_work(recorder, seconds)
            # What a moving slot has cut off is finished when the lease has ended.
            shim.seconds = 2 * TTL
            await queue.reap(project="p")
            doctor = (await mq.doctor(queue, project="p"))["findings"]
    db = stage.primary().client()
    calls, events = read_history(folder / "history"), read_events(db, "p")
    shutil.rmtree(folder)
    lost = {op: count for op, count in lost_changes(calls, events).items() if count}
    wrong = [*fallen_fences(calls), *problems(db, "p"), *[one for one in doctor if "/" in one]]
    if not lost:
        wrong += judge(
            calls, events, others={"root@vm", *(one.agent for one in events if one.op == "create")}
        )
    db.close()
    completed = Counter(call.task for call in calls if call.op == "complete" and call.changed)
    done = sum(count > 1 for count in completed.values())
    return Outcome(
        sum(call.changed for call in calls), lost, len(list(held_twice(calls))), done, wrong
    )


def fallen_fences(calls: list[Call]) -> Iterator[str]:
    """A claim that began when another had been granted has the higher fence; none is granted
    twice.  Of what was lost, too."""
    claims = [call for call in calls if call.op == "claim" and call.changed]
    granted: set[int] = set()
    highest, ends = 0, sorted(claims, key=lambda call: -call.ended)
    for call in sorted(claims, key=lambda call: call.began):
        while ends and ends[-1].ended < call.began:
            highest = max(highest, ends.pop().answer["fence"])
        if call.answer["fence"] <= highest or call.answer["fence"] in granted:
            yield f"fence {call.answer['fence']} of {call.task} after {highest}"
        granted.add(call.answer["fence"])


def held_twice(calls: list[Call]) -> Iterator[Call]:
    """Claims of a task that another agent had claimed and not completed, inside its lease."""
    held: dict[str, Call] = {}
    for call in sorted(calls, key=lambda call: call.ended):
        if call.op == "claim" and call.changed:
            if call.task in held and call.began < held[call.task].ended + TTL:
                yield call
            held[call.task] = call
        elif call.op == "complete" and call.code == "OK":
            held.pop(call.task, None)


CASES: dict[str, tuple[Any, Any, int]] = {  # and from how many replicas on nothing is lost
    "Sentinel, primary killed": (sentinel, killed, 1),
    "Sentinel, primary stopped and back": (sentinel, stopped, 2),
    "Cluster, primary killed": (cluster, killed, 1),
    "Cluster, slot moved and back": (cluster, moved, 0),
}


def outcome(name: str, wait: int, seconds: float) -> Outcome:
    stage, event, _ = CASES[name]
    with stage() as made:
        return asyncio.run(play(made, event, wait, seconds))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3)
    given = parser.parse_args()
    print(f"{'':36} wait   told   lost  held twice  done twice")
    bad = False
    for name, (_, _, enough) in CASES.items():
        for wait in range(enough + 1):
            found = outcome(name, wait, given.seconds)
            lost = sum(found.lost.values())
            print(f"{name:36} {wait:4} {found.told:6} {lost:6} {found.twice:11} {found.done:11}")
            print(*found.wrong[:10], sep="\n", end="\n" * bool(found.wrong), flush=True)
            kept = not (found.lost or found.twice or found.done)
            bad = bad or bool(found.wrong or (wait == enough and not kept))
    return bad


if __name__ == "__main__":
    sys.exit(main())
