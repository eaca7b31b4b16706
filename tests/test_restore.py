"""Whole records, and a project that is made of them again.

A flushed Valkey is restored from its records; what stands there afterwards is what stood there
before, key by key, but for receipts, bells and what no task needs any more.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

import mosaic_queue as mq

pytestmark = pytest.mark.anyio


async def create(queue: mq.Queue, task: str, *dependencies: str, **options: Any) -> Any:
    return await queue.create(
        "p", "m", task, title="a task", dependencies=list(dependencies), **options
    )


# ---- records ----


async def test_a_record_is_the_task_and_what_it_hides(queue: mq.Queue) -> None:
    await create(queue, "T", description="more", metadata={"a": [1, {}]}, max_runtime=900)
    await queue.claim("T", "alice", session="s1")
    await queue.heartbeat("T", progress="half", checkpoint="page 3")
    await queue.fail("T", reason="no")
    meta, records = await queue.records("p", ["T", "none"])
    shown = await queue.get("T")
    assert records.keys() == {"T"}
    record = records["T"]
    assert {name: value for name, value in record.items() if name in shown} == shown
    assert record.keys() - shown.keys() == {"order", "hidden"}
    assert record["order"] // 1000 == shown["createdAt"]
    assert record["hidden"].keys() == {"claimedBy", "claimedAt", "claimTTL", "session", "fence"}
    assert meta["fence"] == record["hidden"]["fence"]
    assert meta["rev"] == record["rev"] == 4
    assert meta["epoch"]
    assert meta["lanes"] == "any coding planning"
    assert json.loads(json.dumps(record)) == record


async def test_a_record_says_what_a_task_waits_for(queue: mq.Queue) -> None:
    await create(queue, "A")
    await create(queue, "B")
    await create(queue, "T", "A", "B")
    await queue.complete("A", force=True)
    await queue.reopen("A", reason="blank")
    _, records = await queue.records("p", ["A", "B", "T"])
    assert records["T"]["waits"] == ["B"]
    assert records["A"]["freed"] == ["T"]
    assert "freed" not in records["B"]
