"""A real cluster of two nodes: one project is one slot, and may move while agents work."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from conftest import BINARIES, Server, free_port

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
SLOTS = 16384


class Node:
    """One node, on a port of its own."""

    def __init__(self, binary: str) -> None:
        self.port = free_port()
        self.server = Server(
            binary, "--port", str(self.port), "--cluster-enabled", "yes",
            "--bind", "127.0.0.1", "--cluster-config-file", tempfile.mktemp(prefix="mq-nodes-"),
        )  # fmt: skip
        self.db = self.server.client()
        self.id = str(self.db.execute_command("CLUSTER MYID"))


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    with ExitStack() as stack:
        made = [Node(str(BINARIES["valkey"]())) for _ in range(2)]
        for node in made:
            stack.callback(node.server.close)
        half = SLOTS // 2
        made[0].db.execute_command("CLUSTER ADDSLOTSRANGE", 0, half - 1)
        made[1].db.execute_command("CLUSTER ADDSLOTSRANGE", half, SLOTS - 1)
        made[0].db.execute_command("CLUSTER MEET", "127.0.0.1", made[1].port)
        give_up = time.monotonic() + 120
        while any(node.db.cluster("INFO")["cluster_state"] != "ok" for node in made):
            assert time.monotonic() < give_up
            time.sleep(0.1)
        yield made


@pytest.fixture
def config(nodes: list[Node]) -> mq.Config:
    for node in nodes:
        node.db.flushall()
    return mq.Config(environ={}).set(
        "redis.url", f"redis+cluster://127.0.0.1:{nodes[0].port}", "test"
    )


async def test_a_life_cycle_on_either_node(config: mq.Config) -> None:
    async with mq.Queue(config) as queue:
        for project in ("a", "b", "c", "d"):
            await queue.create(project, "m", "T1", title="first")
            await queue.create(project, "m", "T2", title="second", dependencies=["T1"])
            waiting = asyncio.create_task(queue.next("bob", project=project, wait=60))
            assert (await waiting)["tasks"][0]["taskId"] == "T1"
            waiting = asyncio.create_task(queue.next("bob", project=project, wait=60))
            await asyncio.sleep(0.1)
            assert (await queue.complete("T1", project=project))["freed"] == ["T2"]
            assert (await waiting)["tasks"][0]["taskId"] == "T2"
        assert await queue.projects() == ["a", "b", "c", "d"]
        assert len((await queue.list())["tasks"]) == 8
        found = await mq.doctor(queue)
        assert [line for line in found["findings"] if "/" in line] == []


def move_some(source: Node, target: Node, slot: int, share: float) -> None:
    """Move a part of a slot's keys, as a resharding does, one key after the other."""
    keys = source.db.execute_command("CLUSTER GETKEYSINSLOT", slot, 10_000)
    for key in sorted(keys)[: round(len(keys) * share)]:
        source.db.execute_command("MIGRATE", "127.0.0.1", target.port, key, 0, 60_000)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
async def test_a_half_moved_root_is_waited_for(
    nodes: list[Node], config: mq.Config, share: float
) -> None:
    """While the slot moves nothing is answered from half of the keys: every call waits, and is
    carried out once when the slot has arrived."""
    slot = int(nodes[0].db.execute_command("CLUSTER KEYSLOT", "{p}"))
    rows = nodes[0].db.execute_command("CLUSTER SLOTS")
    port = next(row[2][1] for row in rows if row[0] <= slot <= row[1])
    owner = next(node for node in nodes if node.port == port)
    other = next(node for node in nodes if node is not owner)
    async with mq.Queue(config) as queue:
        for i in range(20):
            await queue.create("p", "m", f"T{i}", title="t")
        other.db.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", owner.id)
        owner.db.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", other.id)
        move_some(owner, other, slot, share)
        calls = [
            asyncio.create_task(queue.create("p", "m", "new", title="t")),
            *(asyncio.create_task(queue.claim(f"T{i}", f"a{i}", project="p")) for i in range(10)),
        ]
        await asyncio.sleep(0.5)
        await asyncio.to_thread(move_some, owner, other, slot, 1.0)
        for node in (other, owner):
            node.db.execute_command("CLUSTER SETSLOT", slot, "NODE", other.id)
        tasks = await asyncio.gather(*calls)
        assert [task["status"] for task in tasks] == ["pending"] + ["claimed"] * 10
        status = (await mq.status(queue, project="p"))["projects"][0]
        assert status["tasks"] | {"pending": 11, "claimed": 10} == status["tasks"]
        # A call that was cut off has told of its change, and tells again when it is carried out.
        events = (await queue.events(project="p", limit=1000))["events"]
        claims = {event["task"] for event in events if event["op"] == "claim"}
        assert claims == {f"T{i}" for i in range(10)}
        await queue.reap(project="p")
        found = await mq.doctor(queue, project="p")
        assert [line for line in found["findings"] if "/" in line] == []
