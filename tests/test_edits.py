"""One edit: what somebody outside wants of a task, held against what the queue has.

The table is `base | outside | queue -> calls, or the code of a refusal`; below it every pair of
statuses is tried on a real queue.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from conftest import one_engine

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
server = one_engine()
FORCE = {"force": True}

# What was seen, what is wanted, what the queue has: fields that differ from those of a task.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], Any]] = {
    "nothing": ({}, {}, {}, []),
    "field": ({}, {"title": "x"}, {}, [("update", {"title": "x"})]),
    "one-of-two-is-there": (
        {}, {"title": "x", "lane": "any"}, {"lane": "any"}, [("update", {"title": "x"})],
    ),
    "field-taken-away": (
        {"description": "d"}, {"description": None}, {"description": "d"},
        [("update", {"clear": ["description"]})],
    ),
    "delay-taken-away": (
        {"notBefore": 5}, {"notBefore": None}, {"notBefore": 5}, [("update", {"clear": ["delay"]})],
    ),
    "another-field-has-changed": (
        {}, {"title": "x"}, {"priority": "high"}, [("update", {"title": "x"})],
    ),
    "the-queue-has-it-already": ({}, {"title": "x"}, {"title": "x"}, []),
    "the-queue-alone-has-changed": ({}, {}, {"title": "x"}, []),
    "both-have-changed": ({}, {"title": "x"}, {"title": "y"}, "STALE_REV"),
    "one-of-two-has-changed": (
        {}, {"title": "x", "priority": "low"}, {"priority": "high"}, "STALE_REV",
    ),
    "for-the-queue-to-say": ({}, {"fence": 9}, {}, "INVALID"),
    "no-field": ({}, {"gone": "deleted"}, {}, "INVALID"),
    "a-reason-without-a-status": ({}, {"blockedReason": "r"}, {}, "INVALID"),
    "status": ({}, {"status": "completed"}, {}, [("complete", {"summary": None, **FORCE})]),
    "status-and-field": (
        {}, {"status": "blocked", "title": "x"}, {},
        [("update", {"title": "x"}), ("block", {"reason": "why", **FORCE})],
    ),
    "reopened-before-it-is-changed": (
        {"status": "completed"}, {"status": "pending", "title": "x"}, {"status": "completed"},
        [("reopen", {"reason": "why"}), ("update", {"title": "x"})],
    ),
    "a-reason-with-the-status": (
        {}, {"status": "failed", "failureReason": "r"}, {},
        [("fail", {"reason": "r", "retry": False, **FORCE})],
    ),
    "for-somebody": (
        {}, {"status": "claimed", "claimedBy": "eve"}, {}, [("assign", {"agent": "eve"})],
    ),
    "for-nobody": ({}, {"status": "claimed"}, {}, "INVALID"),
    "no-status": ({}, {"status": "maybe"}, {}, "INVALID"),
    "claimed-meanwhile": ({}, {"status": "blocked"}, {"status": "claimed"}, "STALE_REV"),
    "claimed-meanwhile-and-done": (
        {}, {"status": "completed"}, {"status": "claimed"},
        [("complete", {"summary": None, **FORCE})],
    ),
    "begun-meanwhile-and-taken-back": (
        {"status": "claimed"}, {"status": "pending"}, {"status": "in-progress"},
        [("release", {"reason": "why", **FORCE})],
    ),
    "done-before-and-reopened-by-others": ({"status": "completed"}, {}, {"status": "pending"}, []),
}  # fmt: skip
TASK = {"id": "p/T", "status": "pending", "title": "t", "priority": "medium", "lane": "coding"}


@pytest.mark.parametrize("case", CASES)
def test_what_follows_from_three_values(case: str) -> None:
    base, outside, queue, expected = CASES[case]
    seen = TASK | base
    with pytest.raises(mq.Refused) if isinstance(expected, str) else contextlib.nullcontext() as no:
        assert mq.calls_of(seen, TASK | queue, seen | outside, "why") == expected
    if no:
        assert (no.value.code, bool(no.value.message)) == (expected, True)


async def bring(queue: mq.Queue, name: str, status: str) -> None:
    if status == "blocked":
        await queue.block(name, reason="by hand")
    elif status != "pending":
        await queue.claim(name, "bob")
        end = {"in-progress": queue.start, "completed": queue.complete}.get(status)
        if end:
            await end(name)
        elif status == "failed":
            await queue.fail(name, reason="r", retry=False)


# The pairs of (wanted, now) that no operation joins.
WALLS = {
    *(("claimed", now) for now in ("in-progress", "completed", "failed", "blocked")),
    *(("in-progress", now) for now in ("pending", "completed", "failed", "blocked")),
    *(("blocked", now) for now in ("completed", "failed")), ("failed", "completed"),
}  # fmt: skip


@pytest.mark.parametrize("wanted", mq.STATUSES)
@pytest.mark.parametrize("now", mq.STATUSES)
async def test_every_transition(queue: mq.Queue, now: str, wanted: str) -> None:
    await queue.create("p", "m", "T", title="t")
    await bring(queue, "T", now)
    before: Any = await queue.get("T")
    ours = before if now == wanted else before | {"status": wanted, "claimedBy": "eve"}
    edit = mq.apply_edit(queue.acting_as("person"), "p", "T", before, ours, "because")
    if (wanted, now) in WALLS:
        with pytest.raises(mq.Refused) as no:
            await edit
        assert no.value.code in ("WRONG_STATUS", "HELD", "BLOCKED")
        assert await queue.get("T") == before
    else:
        await edit
        after = await queue.get("T")
        assert after["status"] == wanted
        assert (after == before) == (now == wanted)


async def test_an_edit_whose_task_changes_meanwhile(queue: mq.Queue) -> None:
    """Another field: it is read again, and the edit is carried out; the same field: a conflict."""
    await queue.create("p", "m", "T", title="t")
    before: Any = await queue.get("T")
    seen = mq.Queue.get

    async def changed(self: mq.Queue, *args: Any, **named: Any) -> mq.Task:
        found = await seen(self, *args, **named)
        if found["priority"] == "medium":
            await queue.update("T", priority="high")
        return found

    queue.get = changed.__get__(queue)  # type: ignore[method-assign]
    await mq.apply_edit(queue, "p", "T", before, before | {"title": "x"}, "why")
    after: Any = await seen(queue, "T")
    assert (after["title"], after["priority"]) == ("x", "high")
    with pytest.raises(mq.Refused, match="p/T has changed meanwhile: title"):
        await mq.apply_edit(queue, "p", "T", before, before | {"title": "y"}, "why")
