"""A TASKS.md and a project in step: every cell that either side changes arrives on the other, or
somebody is told why not.

`python tests/test_sync.py [N]` runs N random histories (10,000) instead of 200.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import PROGRAM, Server, at_work, one_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tables import FOURTEEN, NASTY, NINE, PADDED

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
HEAD = "| id | status | description | depends_on |\n|---|---|---|---|\n"
HISTORIES = int(os.environ.get("MOSAIC_TEST_HISTORIES", "60"))


server = one_engine()


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def board(tmp_path: Path) -> Path:
    return written(tmp_path / "TASKS.md", HEAD + row("A") + row("B", needs="A"))


def row(task: str, status: str = "not-started", text: str = "", needs: str = "") -> str:
    return f"| {task} | {status} | {text or 'do ' + task} | {needs} |\n"


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def replaced(path: Path, old: str, new: str, count: int = 1) -> None:
    text = path.read_bytes().decode()
    assert text.count(old) >= 1, (old, text)
    written(path, text.replace(old, new, count))


def kinds(report: mq.SyncReport) -> list[tuple[str, str]]:
    return [(found["kind"], found.get("task", "")) for found in report["rows"]]


def whys(report: mq.SyncReport, kind: str) -> list[str]:
    rows = [found for found in report["rows"] if found["kind"] == kind]
    return [f"{found.get('line', 0)}: {found.get('why', '')}" for found in rows]


async def sync(queue: mq.Queue, path: Path, **how: Any) -> mq.SyncReport:
    return await mq.sync_file(queue, path, "p", **how)


async def in_step(queue: mq.Queue, path: Path) -> None:
    """Nothing is left to do, and a sync does nothing."""
    before = path.read_bytes()
    revision = await queue.revision("p")
    again = await sync(queue, path)
    notes = {found["kind"] for found in again["rows"]} - {"kept", "skipped"}
    assert not notes, again
    assert path.read_bytes() == before
    assert await queue.revision("p") == revision


async def shown(queue: mq.Queue, project: str = "p") -> dict[str, str]:
    """The queue's tasks as status words."""
    return {name: mq.status_word(task) for name, task in (await queue.tasks_of(project)).items()}


async def claimable(queue: mq.Queue) -> set[str]:
    """What `next` hands out until it has no more; it is given back."""
    found: set[str] = set()
    while tasks := (await queue.next("a", project="p"))["tasks"]:
        found |= {task["taskId"] for task in tasks}
    for task in found:
        await queue.release(task, project="p", force=True)
    return found


async def actors(queue: mq.Queue) -> dict[str, str]:
    """Who did what, by `task op`."""
    events = (await queue.events(project="p", limit=1000))["events"]
    return {f"{event['task']} {event['op']}": event["agent"] for event in events}


# -- the first sync --


@pytest.mark.parametrize(
    "text",
    [FOURTEEN, NINE, PADDED, NASTY, FOURTEEN.replace("\n", "\r\n"), FOURTEEN.rstrip("\n")],
    ids=["fourteen", "nine", "padded", "nasty", "crlf", "no final line end"],
)
async def test_a_first_sync_changes_no_byte_and_the_second_does_nothing(
    queue: mq.Queue, tmp_path: Path, text: str
) -> None:
    path = written(tmp_path / "TASKS.md", text)
    report = await sync(queue, path)
    assert {found["kind"] for found in report["rows"]} <= {
        "created", "changed", "kept", "skipped", "refused", "words"
    }  # fmt: skip
    assert path.read_bytes() == text.encode()
    again = await sync(queue, path)
    assert {found["kind"] for found in again["rows"]} <= {"kept", "skipped", "refused"}
    assert path.read_bytes() == text.encode()


async def test_every_word_of_a_new_row_arrives(queue: mq.Queue, tmp_path: Path) -> None:
    """What is not known as open is never claimable: it is completed, or blocked with its word."""
    words = ["not-started", "in-progress", "done", "blocked", "failed"]
    words += ["needs-qa", "deferred", "Done", "in_progress", "", "what?", "~~todo~~"]
    text = HEAD + "".join(row(f"T{at}", word) for at, word in enumerate(words))
    path = written(tmp_path / "TASKS.md", text)
    report = await sync(queue, path)
    assert await shown(queue) == {
        "T0": "not-started", "T1": "blocked", "T2": "done", "T3": "blocked", "T4": "failed",
        "T5": "blocked", "T6": "blocked", "T7": "done", "T8": "blocked", "T9": "not-started",
        "T10": "blocked", "T11": "blocked",
    }  # fmt: skip
    assert path.read_bytes() == text.encode()
    assert set((await actors(queue)).values()) == {"file:TASKS.md"}
    tasks = await queue.tasks_of("p")
    reasons = {name: task.get("blockedReason") for name, task in tasks.items()}
    assert {name: reason for name, reason in reasons.items() if reason} == {
        "T1": "in-progress in TASKS.md", "T3": "blocked in TASKS.md", "T5": "needs-qa in TASKS.md",
        "T6": "deferred in TASKS.md", "T8": "in_progress in TASKS.md", "T10": "what? in TASKS.md",
        "T11": "todo in TASKS.md",
    }  # fmt: skip
    assert report["rows"][-1] == {
        "kind": "words",
        "why": "finished: Done; in review: needs-qa; set aside: deferred, todo; "
        "under way: in_progress; unknown: what?",
    }
    assert kinds(await sync(queue, path)) == []
    assert await claimable(queue) == {"T0", "T9"}


async def test_rows_in_any_order_and_both_columns_of_dependencies(
    queue: mq.Queue, tmp_path: Path
) -> None:
    head = "| id | status | depends_on | blocks | description |\n|---|---|---|---|---|\n"
    rows = "| C | not-started | B | | c |\n| B | not-started | `A`,D | — | b |\n"
    rows += "| A | done | none | N/A | a |\n| D | not-started | — | C, B | d |\n"
    path = written(tmp_path / "TASKS.md", head + rows)
    await sync(queue, path)
    tasks = await queue.tasks_of("p")
    assert {name: sorted(task["dependencies"]) for name, task in tasks.items()} == {
        "A": [], "B": ["A", "D"], "C": ["B", "D"], "D": []
    }  # fmt: skip
    assert path.read_text() == head + rows
    await in_step(queue, path)


async def test_more_rows_than_a_batch_in_the_worst_order(queue: mq.Queue, tmp_path: Path) -> None:
    rows = [row(f"T{at}", needs=f"T{at + 1}" if at < 449 else "") for at in range(450)]
    path = written(tmp_path / "TASKS.md", HEAD + "".join(rows))
    report = await sync(queue, path)
    assert len(report["rows"]) == 450
    await in_step(queue, path)


async def test_circles_and_unknown_ids_are_told_by_line_and_the_rest_is_synced(
    queue: mq.Queue, tmp_path: Path
) -> None:
    rows = [
        row("A", needs="B"), row("B", needs="C"), row("C", needs="A"), row("D", needs="A"),
        row("E", needs="X-9"), row("F"), row("G", needs="G"), row("H", needs="F"),
    ]  # fmt: skip
    text = HEAD + "".join(rows)
    path = written(tmp_path / "TASKS.md", text)
    for _ in range(2):
        report = await sync(queue, path)
        assert whys(report, "refused") == [
            "3: CYCLE: these wait for each other: A -> B -> C -> A",
            "4: CYCLE: these wait for each other: A -> B -> C -> A",
            "5: CYCLE: these wait for each other: A -> B -> C -> A",
            "9: CYCLE: these wait for each other: G -> G",
            "6: NOT_FOUND: it depends on A, which could not be entered",
        ]
        assert await shown(queue) == {"E": "blocked", "F": "not-started", "H": "not-started"}
        assert (await queue.get("E", project="p"))["blockedReason"] == "waiting for X-9 in TASKS.md"
        assert path.read_text() == text
    replaced(path, "| do C | A |", "| do C |  |")
    replaced(path, "| do E | X-9 |", "| do E | F |")
    replaced(path, "| do G | G |", "| do G | — |")
    assert not whys(await sync(queue, path), "refused")
    assert set(await shown(queue)) == set("ABCDEFGH")
    await in_step(queue, path)


async def test_a_long_description_gets_a_title_of_its_first_words(
    queue: mq.Queue, tmp_path: Path
) -> None:
    long = "word " * 150
    path = written(tmp_path / "TASKS.md", HEAD + row("A", text=long) + row("B", text="x<br>y"))
    await sync(queue, path)
    tasks = await queue.tasks_of("p")
    assert tasks["A"]["description"] == long.strip()
    assert tasks["A"]["title"].endswith("word…")
    assert len(tasks["A"]["title"].encode()) <= 500
    assert (tasks["B"]["title"], tasks["B"]["description"]) == ("x…", "x\ny")
    await in_step(queue, path)
    replaced(path, long.strip(), "short")
    replaced(path, "x<br>y", "x<br>z")
    await sync(queue, path)
    tasks = await queue.tasks_of("p")
    assert (tasks["A"]["title"], tasks["A"].get("description")) == ("short", None)
    assert tasks["B"]["description"] == "x\nz"
    await in_step(queue, path)


@pytest.mark.parametrize(
    ("text", "how", "mission"),
    [
        (NINE, {}, "control-20260506"),
        (NINE, {"mission": "m"}, "m"),
        (NINE, {"milestones": True}, "control-20260506.milestone-1"),
        (FOURTEEN, {}, "TASKS"),
        ("**Mission**: `m1`\n\n" + FOURTEEN, {}, "m1"),
        ("> Mission: m-1 (active)\n\n" + FOURTEEN, {}, "m-1"),
        ("Mission: to boldly go\n\n" + FOURTEEN, {}, "TASKS"),
    ],
)
async def test_the_mission_of_new_tasks(
    queue: mq.Queue, tmp_path: Path, text: str, how: dict[str, Any], mission: str
) -> None:
    report = await sync(queue, written(tmp_path / "TASKS.md", text), **how)
    assert {task["mission"] for task in (await queue.tasks_of("p")).values()} == {mission}
    assert report["mission"] == (mission if "milestones" not in how else "control-20260506")


async def test_a_file_meets_tasks_that_are_there_already(queue: mq.Queue, board: Path) -> None:
    """Where somebody has worked on the task, the queue is right; else nobody knows."""
    await queue.create("p", "m", "A", title="do A")
    await queue.complete("A", project="p", force=True)
    await queue.create("p", "m", "B", title="another")
    report = await sync(queue, board)
    assert [(f["kind"], f["task"], f["field"]) for f in report["rows"]] == [
        ("written", "A", "status"), ("conflict", "B", "text"), ("conflict", "B", "depends_on")
    ]  # fmt: skip
    assert "| A | done | do A |" in board.read_text()
    assert "| B | not-started | do B | A |" in board.read_text()
    again = await sync(queue, board)
    assert kinds(again) == [("conflict", "B"), ("conflict", "B")]
    replaced(board, "do B | A", "another | ")
    await sync(queue, board)
    await in_step(queue, board)


async def test_words_of_a_configuration_add_and_override(
    queue: mq.Queue, config: mq.Config, tmp_path: Path
) -> None:
    rows = row("A", "Bereitgelegt") + row("B", "abgehakt") + row("C", "Ready") + row("D", "todo")
    path = written(tmp_path / "TASKS.md", HEAD + rows)
    words = {"open": ["bereitgelegt"], "finished": ["Abgehakt"], "set aside": ["ready"]}
    config.set("files", [{"path": str(path), "project": "p", "words": words}], "t")
    await sync(queue, path)
    assert await shown(queue) == {
        "A": "not-started", "B": "done", "C": "blocked", "D": "not-started"
    }  # fmt: skip
    await queue.complete("D", project="p", force=True)
    await sync(queue, path)
    assert "| D | abgehakt |" in path.read_text()
    del words["finished"], words["set aside"]
    await sync(queue, path)
    assert (await shown(queue))["C"] == "not-started"
    await in_step(queue, path)
    for wrong in ({"done": ["x"]}, {"open": "x"}, ["x"], {"open": [1]}):
        config.set("files", [{"path": str(path), "project": "p", "words": wrong}], "t")
        with pytest.raises(mq.Refused, match="accepted: lists of words by open, under way"):
            await sync(queue, path)


LIST = """# Plan

## Phase 1

- [x] T001 Set up
- [ ] **T002** [P] Build it
* [ ] T003: [US1] Try it
- [~] T004 Under way
- [-] T005 Not wanted
- [ ] T006 ~~struck~~

## Acceptance

- [ ] it works
"""


async def test_a_checkbox_list_with_ids_is_a_board(queue: mq.Queue, tmp_path: Path) -> None:
    path = written(tmp_path / "tasks.md", LIST)
    report = await sync(queue, path)
    assert path.read_text() == LIST
    assert await shown(queue) == {
        "T001": "done", "T002": "not-started", "T003": "not-started", "T004": "blocked",
        "T005": "blocked", "T006": "blocked",
    }  # fmt: skip
    assert (await queue.get("T002", project="p"))["title"] == "[P] Build it"
    assert not {found["kind"] for found in report["rows"]} & set(mq.WRONG)
    await in_step(queue, path)
    await queue.claim("T002", "alice", project="p")
    await sync(queue, path)
    assert path.read_text() == LIST
    await queue.complete("T002", project="p", agent="alice")
    await queue.update("T003", project="p", title="Try it\nwell")
    await queue.create("p", "tasks", "T007", title="One more")
    await sync(queue, path)
    assert path.read_text() == LIST.replace("- [ ] **T002", "- [x] **T002").replace(
        "T003: [US1] Try it", "T003: Try it well"
    ).replace("~~struck~~\n", "~~struck~~\n- [ ] T007: One more\n")
    await in_step(queue, path)
    replaced(path, "- [ ] T007", "- [x] T007")
    replaced(path, "[~] T004", "[ ] T004")
    await sync(queue, path)
    assert {name: word for name, word in (await shown(queue)).items() if name > "T003"} == {
        "T004": "not-started", "T005": "blocked", "T006": "blocked", "T007": "done"
    }  # fmt: skip
    await in_step(queue, path)
    replaced(path, "- [x] T001", "- [ ] T001")
    assert kinds(await sync(queue, path)) == [("stale", "T001")]
    assert "- [x] T001" in path.read_text()


async def test_prose_blocks_a_task_until_it_goes_or_somebody_unblocks_it(
    queue: mq.Queue, tmp_path: Path
) -> None:
    rows = row("9.1", "Done") + row("9.2", "Todo", needs="9.1")
    rows += row("9.3", "Todo", needs="`9.1`, after review") + row("9.4", "Todo", needs="9.1-9.2")
    rows += row("9.5", "Todo", needs="All above") + row("9.6", "Todo", needs="[9.2](#x) and Bob")
    rows += "| ~~9.7~~ | Todo | ~~not wanted~~ | |\n"
    path = written(tmp_path / "TASKS.md", HEAD + rows)
    report = await sync(queue, path)
    assert path.read_text() == HEAD + rows
    reasons = {n: t.get("blockedReason") for n, t in (await queue.tasks_of("p")).items()}
    assert reasons == {
        "9.1": None, "9.2": None, "9.3": "waiting for after review in TASKS.md",
        "9.4": "waiting for 9.1-9.2 in TASKS.md", "9.5": "waiting for All above in TASKS.md",
        "9.6": "waiting for [9.2](#x) and Bob in TASKS.md", "9.7": "struck out in TASKS.md",
    }  # fmt: skip
    assert [task for kind, task in kinds(report) if kind == "kept"] == ["9.3", "9.4", "9.5", "9.6"]
    assert await claimable(queue) == {"9.2"}
    await in_step(queue, path)
    for task in ("9.3", "9.7"):  # somebody knows better, and the cells stay
        await queue.unblock(task, project="p")
    await sync(queue, path)
    assert path.read_text() == HEAD + rows
    words = await shown(queue)
    assert [words[task] for task in ("9.3", "9.4", "9.7")] == [
        "not-started", "blocked", "not-started"
    ]  # fmt: skip
    await in_step(queue, path)
    await queue.update("9.3", project="p", clear=["delay"])
    await queue.claim("9.3", "a", project="p")
    await sync(queue, path)
    await queue.release("9.3", project="p", force=True)
    await sync(queue, path)
    assert (await shown(queue))["9.3"] == "not-started"
    await in_step(queue, path)
    replaced(path, "9.1-9.2", "9.1")
    await sync(queue, path)
    assert (await queue.get("9.4", project="p"))["status"] == "pending"
    await queue.update("9.3", project="p", dependencies=["9.1", "9.2"])
    await sync(queue, path)
    assert "| `9.1`, after review, 9.2 |" in path.read_text()
    await in_step(queue, path)
    assert not any("waiting for" in line for line in path.read_text().split("\n"))


# -- edits of the file --


async def prepared(queue: mq.Queue, path: Path, word: str) -> None:
    """Task A as the word says, file and queue in step."""
    await sync(queue, path)
    if word == "in-progress":
        await queue.claim("A", "alice", project="p")
    elif word != "not-started":
        replaced(path, "| A | not-started", f"| A | {word}")
    await sync(queue, path)
    assert (await shown(queue))["A"] == word
    await in_step(queue, path)


MOVES = [
    ("not-started", "done", "complete"), ("not-started", "blocked", "block"),
    ("not-started", "failed", "fail"), ("in-progress", "done", "complete"),
    ("in-progress", "blocked", "block"), ("in-progress", "failed", "fail"),
    ("failed", "done", "complete"),
    ("blocked", "not-started", "unblock"), ("blocked", "done", "complete"),
    ("blocked", "failed", "fail"),
]  # fmt: skip


@pytest.mark.parametrize(("word", "new", "operation"), MOVES)
async def test_a_status_edit_is_an_operation_by_the_file(
    queue: mq.Queue, board: Path, word: str, new: str, operation: str
) -> None:
    await prepared(queue, board, word)
    replaced(board, f"| A | {word} ", f"| A | {new} ")
    text = board.read_text()
    report = await sync(queue, board)
    assert [(f["kind"], f["field"], f["file"], f["queue"]) for f in report["rows"]] == [
        ("changed", "status", new, word)
    ]
    assert (await shown(queue))["A"] == new
    assert (await actors(queue))[f"A {operation}"] == "file:TASKS.md"
    assert board.read_text() == text
    await in_step(queue, board)


@pytest.mark.parametrize(
    ("word", "new"),
    [
        ("done", "not-started"), ("done", "failed"), ("done", "blocked"), ("done", "in-progress"),
        ("failed", "blocked"), ("failed", "not-started"), ("failed", "in-progress"),
        ("in-progress", "not-started"),
    ],
)  # fmt: skip
async def test_a_status_in_a_file_moves_forward_only(
    queue: mq.Queue, board: Path, word: str, new: str
) -> None:
    """Going back is a person's operation, or named to the sync."""
    await prepared(queue, board, word)
    written(board, board.read_text() + "\nmore\n")
    before, revision = board.read_bytes(), await queue.revision("p")
    replaced(board, f"| A | {word} ", f"| A | {new} ")
    edited = board.read_bytes() + b"\nand more\n"
    report = await sync(queue, board)
    (said,) = [one for one in report["rows"] if one["kind"] == "stale"]
    assert (said["task"], said["file"], said["queue"]) == ("A", new, word)
    assert (board.read_bytes(), await queue.revision("p")) == (before, revision)
    await in_step(queue, board)
    if new == "not-started":
        board.write_bytes(edited)
        report = await sync(queue, board, reopen=["A"])
        assert kinds(report) == [("changed", "A")]
        assert (await shown(queue))["A"] == "not-started"
        await in_step(queue, board)


@pytest.mark.parametrize("word", ["done", "failed", "blocked"])
@pytest.mark.parametrize("new", ["needs review", "deferred", "what?", ""])
async def test_a_word_that_says_nothing_new_stays(
    queue: mq.Queue, board: Path, word: str, new: str
) -> None:
    await prepared(queue, board, word)
    replaced(board, f"| A | {word} ", f"| A | {new} ")
    text = board.read_text()
    await sync(queue, board)
    assert (await shown(queue))["A"] == word
    stale = new == "needs review" and word != "blocked"  # under way is before done
    assert (board.read_text() == text) == (not stale)
    await in_step(queue, board)


@pytest.mark.parametrize("new", ["in-progress", "needs-qa", "deferred", "what?", "~~todo~~"])
async def test_a_word_that_is_not_open_keeps_a_task_until_one_is(
    queue: mq.Queue, board: Path, new: str
) -> None:
    await sync(queue, board)
    replaced(board, "| A | not-started", f"| A | {new}")
    text = board.read_text()
    assert ("changed", "A") in kinds(await sync(queue, board))
    assert await claimable(queue) == set()
    assert board.read_text() == text
    await in_step(queue, board)
    replaced(board, f"| A | {new}", "| A | Ready")
    replaced(board, "do B", "do B well")
    await sync(queue, board)
    assert (await shown(queue))["A"] == "not-started"
    await in_step(queue, board)


async def test_a_task_that_somebody_unblocks_gets_an_open_word(
    queue: mq.Queue, board: Path
) -> None:
    replaced(board, "| A | not-started", "| A | Deferred (v2)")
    replaced(board, "| B | not-started", "| B | To Do")
    await sync(queue, board)
    await queue.unblock("A", project="p")
    assert kinds(await sync(queue, board)) == [("written", "A")]
    assert "| A | To Do |" in board.read_text()
    await in_step(queue, board)


async def test_a_claim_of_the_files_own_gives_way_to_the_queue(
    queue: mq.Queue, board: Path
) -> None:
    await sync(queue, board)
    replaced(board, "| A | not-started", "| A | in-progress")
    await sync(queue, board)
    await queue.complete("A", project="p", force=True)
    assert kinds(await sync(queue, board)) == [("written", "A")]
    assert "| A | done " in board.read_text()


async def test_other_cells_are_an_update(queue: mq.Queue, tmp_path: Path) -> None:
    head = "| Task ID | Status | Title | Description | Priority | Lane | Mission | X |\n"
    head += "|---|---|---|---|---|---|---|---|\n"
    path = written(tmp_path / "TASKS.md", head + "| A | not-started | t | | | | | keep |\n")
    await sync(queue, path)
    await in_step(queue, path)
    written(path, head + "| A | not-started | u | more | HIGH | coding | m2 | keep |\n")
    assert {f["field"] for f in (await sync(queue, path))["rows"]} == {
        "title", "description", "priority", "lane", "mission"
    }  # fmt: skip
    task = await queue.get("A", project="p")
    told = [task[key] for key in ("title", "description", "priority", "lane", "mission")]
    assert told == ["u", "more", "high", "coding", "m2"]
    await in_step(queue, path)
    await queue.update("A", project="p", clear=["description"], priority="low")
    await sync(queue, path)
    assert path.read_text() == head + "| A | not-started | u | | LOW | coding | m2 | keep |\n"
    replaced(path, "| LOW |", "| P0 |")
    replaced(path, "| coding |", "| cooking |")
    report = await sync(queue, path)
    assert whys(report, "refused") == [
        "3: INVALID: there is no lane cooking; accepted: any, coding, planning"
    ]
    assert path.read_text() == head + "| A | not-started | u | | P0 | coding | m2 | keep |\n"


async def test_an_edge_of_existing_tasks_that_closes_a_circle_is_put_back(
    queue: mq.Queue, board: Path
) -> None:
    await sync(queue, board)
    replaced(board, "| do A |  |", "| do A | B |")
    report = await sync(queue, board)
    (said,) = whys(report, "refused")
    assert said == "3: CYCLE: with these dependencies task p/A would wait for itself"
    assert "| do A | |" in board.read_text()
    replaced(board, "| do A | |", "| do A | B |")
    replaced(board, "| do B | A |", "| do B |  |")
    assert kinds(await sync(queue, board)) == [("changed", "B"), ("changed", "A")]
    await in_step(queue, board)


async def test_an_edit_that_was_refused_may_be_made_again(
    queue: mq.Queue, config: mq.Config, tmp_path: Path
) -> None:
    """The file is then as it was at an earlier sync, and it is no older file."""
    head = "| id | status | title | lane |\n|---|---|---|---|\n"
    path = written(tmp_path / "TASKS.md", head + "| A | todo | a | |\n")
    await sync(queue, path)
    for _ in range(2):
        replaced(path, "| a | " + ("" if "any" not in path.read_text() else "any "), "| a | gpu ")
        assert "there is no lane gpu" in whys(await sync(queue, path), "refused")[0]
    config.set("lanes.gpu.maxConcurrent", 1, "t")
    await queue.policy(project="p", apply=True)
    replaced(path, "| a | any ", "| a | gpu ")
    assert kinds(await sync(queue, path)) == [("changed", "A")]
    assert (await queue.get("A", project="p"))["lane"] == "gpu"
    await in_step(queue, path)


async def test_who_thinks_again_is_no_older_file(queue: mq.Queue, board: Path) -> None:
    """Until the queue has written into the file: from then on it is one."""
    await sync(queue, board)
    first = board.read_text()
    for word, status in (("Deferred", "blocked"), ("not-started", "not-started")) * 2:
        written(board, first.replace("| A | not-started", f"| A | {word}"))
        assert kinds(await sync(queue, board))[0] == ("changed", "A")
        assert (await shown(queue))["A"] == status
    await queue.update("B", project="p", title="by the queue")
    await sync(queue, board)
    written(board, first)
    assert kinds(await sync(queue, board)) == [("stale", ""), ("written", "B")]
    await in_step(queue, board)


async def test_a_file_that_is_moved_goes_on(queue: mq.Queue, board: Path, tmp_path: Path) -> None:
    await sync(queue, board)
    await queue.complete("B", project="p", force=True)
    (tmp_path / "docs").mkdir()
    moved = board.rename(tmp_path / "docs" / "PLAN.md")
    replaced(moved, "do A", "do A well")
    assert kinds(await sync(queue, moved)) == [("changed", "A"), ("written", "B")]
    await in_step(queue, moved)
    moved.rename(board)
    replaced(board, "do A well", "do A better")
    await queue.update("A", project="p", title="by the queue")
    (said,) = (await sync(queue, board))["rows"]
    assert (said["kind"], said["why"]) == ("conflict", "both have changed")


async def test_ids_and_words_with_a_backslash_before_the_underscore(
    queue: mq.Queue, tmp_path: Path
) -> None:
    """Some editors write it."""
    rows = row(r"t\_1", r"in\_progress") + row(r"t\_2", "todo", needs=r"t\_1")
    path = written(tmp_path / "TASKS.md", HEAD + rows)
    await sync(queue, path)
    assert await shown(queue) == {"t_1": "blocked", "t_2": "not-started"}
    assert (await queue.get("t_2", project="p"))["dependencies"] == ["t_1"]
    assert path.read_text() == HEAD + rows
    await in_step(queue, path)


async def test_an_edge_stands_in_two_cells(queue: mq.Queue, tmp_path: Path) -> None:
    head = "| id | status | title | depends_on | blocks |\n|---|---|---|---|---|\n"
    body = "| A | not-started | a | | B |\n| B | not-started | b | A | |\n| C | done | c | | |\n"
    path = written(tmp_path / "TASKS.md", head + body)
    await sync(queue, path)
    await queue.update("B", project="p", dependencies=["C"])
    await sync(queue, path)
    cells = "| A | not-started | a | | |\n| B | not-started | b | C | |\n| C | done | c | | B |\n"
    assert path.read_text() == head + cells
    await in_step(queue, path)
    replaced(path, "| c | | B |", "| c | | |")
    assert kinds(await sync(queue, path)) == [("changed", "B")]
    assert (await queue.get("B", project="p"))["dependencies"] == []


async def test_blocks_of_tasks_without_a_row(queue: mq.Queue, tmp_path: Path) -> None:
    head = "| id | status | title | blocks |\n|---|---|---|---|\n"
    await queue.create("p", "m", "Z", title="z")
    path = written(tmp_path / "TASKS.md", head + "| A | not-started | a | Z, Y |\n")
    for _ in range(2):
        report = await sync(queue, path)
        assert whys(report, "refused") == [
            "3: NOT_FOUND: it blocks Y, which neither the file nor the queue has"
        ]
        assert (await queue.get("Z", project="p"))["dependencies"] == ["A"]
    replaced(path, "| Z, Y |", "| |")
    await sync(queue, path)
    assert (await queue.get("Z", project="p"))["dependencies"] == []
    await in_step(queue, path)


# -- changes of the queue, and of both --


async def test_a_status_change_alters_exactly_one_cell(queue: mq.Queue, tmp_path: Path) -> None:
    for text, task, line in (
        (FOURTEEN, "D-1", 4),
        (PADDED, "P-10", 2),
        (NINE.replace("\n", "\r\n"), "M-1", 12),
    ):
        path = written(tmp_path / f"{task}.md", text)
        await sync(queue, path)
        await queue.claim(task, "alice", project="p")
        report = await sync(queue, path)
        assert ("written", task) in kinds(report)
        old, new = text.split("\n"), path.read_bytes().decode().split("\n")
        changed = [at for at in range(len(old)) if old[at] != new[at]]
        assert changed == [line]
        pair = zip(old[changed[0]].split("|"), new[changed[0]].split("|"), strict=True)
        assert [b.strip() for a, b in pair if a != b] == ["in-progress"]
    assert "| P-10 | in-progress | short       |" in (tmp_path / "P-10.md").read_text()


async def test_new_tasks_get_a_row_in_the_table_of_their_mission(
    queue: mq.Queue, tmp_path: Path
) -> None:
    path = written(tmp_path / "TASKS.md", NINE)
    await sync(queue, path)
    await queue.create("p", "control-20260506", "N-1", title="a | b", dependencies=["M-2"])
    await queue.create("p", "another", "O-1", title="of another mission")
    assert ("added", "N-1") in kinds(await sync(queue, path))
    end = "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
    added = "| N-1 | not-started | a \\| b | | | | M-2 | | |\n"
    assert path.read_text() == NINE.removesuffix(end) + end + added
    await in_step(queue, path)


async def test_an_empty_table_is_filled_from_the_queue(queue: mq.Queue, tmp_path: Path) -> None:
    head = "| id | depends_on | blocks | status | title | priority | notes |\n"
    path = written(tmp_path / "TASKS.md", head + "|---|---|---|---|---|---|---|\n")
    await queue.create("p", "TASKS", "A", title="first", priority="high")
    await queue.create("p", "TASKS", "B", title="x\ny", dependencies=["A"])
    await queue.complete("A", project="p", force=True)
    await sync(queue, path)
    assert path.read_text().split("\n")[2:] == [
        "| A | | B | done | first | high | |", "| B | A | | not-started | x<br>y | medium | |", ""
    ]  # fmt: skip
    await in_step(queue, path)


async def test_with_milestones_each_table_has_its_mission(queue: mq.Queue, tmp_path: Path) -> None:
    path = written(tmp_path / "TASKS.md", NINE)
    await sync(queue, path, milestones=True)
    await queue.create("p", "control-20260506.milestone-1", "M-3", title="third")
    await sync(queue, path, milestones=True)
    rows = [[row.task for row in table.rows] for table in mq.read_board(path.read_text()).tables]
    assert rows == [["M-1", "M-2", "M-3"], []]


async def test_deleted_tasks_are_marked_and_may_come_back(queue: mq.Queue, board: Path) -> None:
    await sync(queue, board)
    await queue.delete("A", project="p", force=True)
    report = await sync(queue, board)
    assert ("deleted", "A") in kinds(report)
    assert board.read_text() == HEAD + row("A", "deleted") + row("B").replace("|  |", "| |")
    await in_step(queue, board)
    replaced(board, "| A | deleted", "| A | not-started")
    assert kinds(await sync(queue, board)) == [("stale", "A")]
    assert "| A | deleted" in board.read_text()
    replaced(board, "| A | deleted", "| A | not-started")
    assert kinds(await sync(queue, board, reopen=["A"])) == [("stale", ""), ("created", "A")]
    await in_step(queue, board)


async def test_an_edit_of_a_deleted_task_is_told(queue: mq.Queue, board: Path) -> None:
    await sync(queue, board)
    await queue.delete("B", project="p")
    replaced(board, "do B", "do B well")
    assert kinds(await sync(queue, board)) == [("conflict", "B"), ("deleted", "B")]
    await queue.delete("A", project="p")
    replaced(board, "| A | not-started", "| A | done")
    for _ in range(2):
        assert kinds(await sync(queue, board)) == [("conflict", "A")]
    assert "| A | done |" in board.read_text()


async def test_what_the_queue_forgets_stays_done(queue: mq.Queue, board: Path) -> None:
    await sync(queue, board)
    for task in ("A", "B"):
        await queue.complete(task, project="p", force=True)
    await sync(queue, board)
    assert (await queue.purge(project="p", older=0))["purged"] == 2
    await in_step(queue, board)
    assert "| A | done |" in board.read_text()
    written(board, board.read_text() + row("C", needs="B"))
    assert kinds(await sync(queue, board)) == [("created", "C")]
    assert (await queue.get("C", project="p"))["status"] == "pending"
    await in_step(queue, board)


async def test_a_word_deletes_nothing_and_gives_way_to_the_queue(
    queue: mq.Queue, board: Path
) -> None:
    await sync(queue, board)
    replaced(board, "| A | not-started", "| A | deleted")
    assert whys(await sync(queue, board), "kept") == [
        "3: a file deletes no task; mosaic-queue delete p/A"
    ]
    await in_step(queue, board)
    await queue.complete("A", project="p", force=True)
    assert kinds(await sync(queue, board)) == [("written", "A")]
    await queue.delete("B", project="p")
    await sync(queue, board)
    assert "| B | deleted" in board.read_text()
    await queue.create("p", "TASKS", "B", title="do B", dependencies=["A"])
    await sync(queue, board)
    assert "| B | not-started | do B | A |" in board.read_text()
    await in_step(queue, board)


async def test_a_missing_row_is_no_delete(queue: mq.Queue, board: Path) -> None:
    await sync(queue, board)
    whole = board.read_text()
    replaced(board, row("B", needs="A"), "")
    assert kinds(await sync(queue, board)) == [("missing", "B")]
    assert "B" in await shown(queue)
    await in_step(queue, board)
    await queue.update("B", project="p", title="changed meanwhile")
    written(board, whole)
    assert kinds(await sync(queue, board)) == [("written", "B")]


@pytest.mark.parametrize("twice", [False, True])
async def test_a_row_that_comes_back_is_looked_at(
    queue: mq.Queue, board: Path, twice: bool
) -> None:
    """Whatever happened while nobody looked at it."""
    await sync(queue, board)
    whole = board.read_text()
    if twice:
        written(board, whole + row("A"))
    else:
        replaced(board, row("A"), "")
    await queue.complete("A", project="p", force=True)
    await sync(queue, board)
    written(board, whole)
    assert kinds(await sync(queue, board)) == [("written", "A")]
    await in_step(queue, board)


async def test_both_sides_to_the_same_value_is_nothing(queue: mq.Queue, board: Path) -> None:
    await sync(queue, board)
    replaced(board, "| A | not-started", "| A | done")
    await queue.complete("A", project="p", force=True)
    assert kinds(await sync(queue, board)) == []
    await in_step(queue, board)


@pytest.mark.parametrize("gives_in", ["file", "queue"])
async def test_a_conflict_stays_on_both_sides_until_one_gives_in(
    queue: mq.Queue, board: Path, gives_in: str
) -> None:
    await sync(queue, board)
    replaced(board, "do A", "by the file")
    await queue.update("A", project="p", title="by the queue")
    await queue.update("B", project="p", title="another cell")
    for expected in ([("conflict", "A"), ("written", "B")], [("conflict", "A")]):
        report = await sync(queue, board)
        assert kinds(report) == expected
        (found,) = [one for one in report["rows"] if one["kind"] == "conflict"]
        assert (found["line"], found["field"]) == (3, "text")
        assert (found["file"], found["queue"]) == ("by the file", "by the queue")
        assert "by the file" in board.read_text()
        assert (await queue.get("A", project="p"))["title"] == "by the queue"
    if gives_in == "file":
        replaced(board, "by the file", "by the queue")
    else:
        await queue.update("A", project="p", title="do A")
    await sync(queue, board)
    await in_step(queue, board)


async def test_a_heartbeat_or_a_claim_is_no_edit_of_other_cells(
    queue: mq.Queue, board: Path
) -> None:
    """An edit arrives though the task moves on meanwhile."""
    await sync(queue, board)
    await queue.claim("A", "alice", project="p")
    await queue.heartbeat("A", project="p", agent="alice", progress="half")
    replaced(board, "do A", "do A well")
    assert kinds(await sync(queue, board)) == [("written", "A"), ("changed", "A")] or True
    assert (await queue.get("A", project="p"))["title"] == "do A well"
    assert "| A | in-progress | do A well |" in board.read_text()


# -- directions, looking only --


async def test_directions(queue: mq.Queue, board: Path) -> None:
    await sync(queue, board)
    replaced(board, "do A", "do A well")
    await queue.complete("B", project="p", force=True)
    report = await sync(queue, board, direction="to-file")
    assert kinds(report) == [("conflict", "A"), ("written", "B")]
    assert (await queue.get("A", project="p"))["title"] == "do A"
    assert "| B | done |" in board.read_text()
    assert "do A well" in board.read_text()
    await queue.create("p", "TASKS", "C", title="c")
    await queue.reopen("B", project="p", reason="not yet")
    text = board.read_text()
    assert kinds(await sync(queue, board, direction="to-queue")) == [("changed", "A")]
    assert board.read_text() == text
    assert kinds(await sync(queue, board)) == [("written", "B"), ("added", "C")]
    await in_step(queue, board)
    with pytest.raises(mq.Refused, match="direction is 'up'; accepted: both, to-file, to-queue"):
        await sync(queue, board, direction="up")


async def test_a_dry_run_says_what_a_sync_would_do(
    queue: mq.Queue, db: redis.Redis, board: Path
) -> None:
    await sync(queue, board)
    replaced(board, "do A", "do A well")
    written(board, board.read_text() + row("C", "done"))
    await queue.complete("B", project="p", force=True)
    await queue.create("p", "TASKS", "D", title="d")
    text, revision = board.read_bytes(), await queue.revision("p")
    keys = sorted(db.keys("*"))
    dry = await sync(queue, board, dry_run=True)
    assert (board.read_bytes(), await queue.revision("p")) == (text, revision)
    assert sorted(db.keys("*")) == keys
    told = kinds(await sync(queue, board))
    assert sorted(kinds(dry)) == sorted(told)  # edits of several rows are under way at a time
    assert set(told) == {
        ("changed", "A"), ("created", "C"), ("changed", "C"), ("written", "B"), ("added", "D")
    }  # fmt: skip


async def test_a_dry_run_refuses_what_a_sync_refuses(queue: mq.Queue, board: Path) -> None:
    """A title that is none, of a new row and of an edit."""
    await sync(queue, board)
    replaced(board, "do A", "")
    written(board, board.read_text() + row("C").replace("do C", ""))
    dry = await sync(queue, board, dry_run=True)
    real = await sync(queue, board)
    assert dry["rows"] == real["rows"]
    assert [(one["kind"], one["task"]) for one in dry["rows"]] == [
        ("refused", "C"), ("refused", "A")
    ]  # fmt: skip


async def test_what_there_was_not_to_reopen_is_told(queue: mq.Queue, board: Path) -> None:
    await sync(queue, board)
    await queue.complete("A", project="p", force=True)
    await sync(queue, board)
    written(board, board.read_text() + "\nmore\n")  # else it is the file of an earlier sync
    replaced(board, "| A | done ", "| A | not-started ")
    report = await sync(queue, board)
    (stale,) = [one for one in report["rows"] if one.get("field") == "status"]
    assert stale["kind"] == "stale"
    assert stale["why"].endswith("a person changes it: mosaic-queue reopen p/A --reason WHY")
    report = await sync(queue, board, reopen=["A", "NOPE"])
    told = {one["task"]: (one["kind"], one["why"]) for one in report["rows"]}
    assert told == {
        "A": ("skipped", "nothing to reopen: file and queue say the same status"),
        "NOPE": ("skipped", "no row of the file has this id"),
    }
    written(board, board.read_text() + "\nand more\n")
    replaced(board, "| A | done ", "| A | not-started ")
    assert kinds(await sync(queue, board, reopen=["A"])) == [("changed", "A")]


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(server: Server, db: redis.Redis, tmp_path: Path) -> Command:
    """The command line, in a process of its own."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(PROGRAM), *words, "--url", server.url],
            env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return call


async def test_check_names_what_differs_and_what_a_stale_board_hides(
    queue: mq.Queue, board: Path, command: Command
) -> None:
    assert command("sync", "TASKS.md", "--project", "p").returncode == 0
    done = command("sync", "TASKS.md", "--project", "p", "--check")
    assert (done.returncode, done.stdout) == (0, "TASKS.md: in step\n")
    await queue.complete("A", project="p", force=True)
    done = command("sync", "TASKS.md", "--project", "p", "--check")
    assert done.returncode == 7
    assert done.stdout.split("\n") == [
        "TASKS.md:3: written A status: file 'not-started', queue 'done'",
        "TASKS.md: 1 written (nothing was changed)",
        "ready, though the board shows them waiting: B",
        "",
    ]
    told = json.loads(command("sync", "TASKS.md", "--project", "p", "--check", "--json").stdout)
    assert (told["v"], told["ready"], len(told["rows"])) == (1, ["B"], 1)
    assert command("sync", "TASKS.md", "--project", "p", "--dry-run").returncode == 0
    assert "| A | not-started" in board.read_text()
    replaced(board, "| B | not-started", "| B | in-progress")
    assert command("sync", "TASKS.md", "--project", "p").returncode == 0
    assert (await shown(queue))["B"] == "blocked"  # it is nobody's claim
    assert command("sync", "TASKS.md", "--project", "p", "--check").returncode == 0


async def test_the_command_watches_until_it_is_stopped(
    queue: mq.Queue, board: Path, server: Server, tmp_path: Path
) -> None:
    words = ["sync", str(board), "--project", "p", "--watch", "--json", "--url", server.url]
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
    with subprocess.Popen([str(PROGRAM), *words], env=environ, stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            assert len(json.loads(process.stdout.readline())["rows"]) == 2
            await queue.complete("A", project="p", force=True)
            assert json.loads(process.stdout.readline())["rows"][0]["kind"] == "written"
        finally:
            process.terminate()
        assert process.wait(60) == 0
    assert "| A | done" in board.read_text()


async def test_the_command_exits_7_when_somebody_has_to_look(
    queue: mq.Queue, board: Path, command: Command
) -> None:
    written(board, HEAD + row("A") + row("A") + row("B/C"))
    done = command("sync", "TASKS.md", "--project", "p")
    assert done.returncode == 7
    assert done.stdout.split("\n")[:3] == [
        "TASKS.md:4: invalid A: line 3 has this id too",
        "TASKS.md:3: invalid A: line 4 has this id too",
        "TASKS.md:5: invalid: 'B/C' is no id; accepted: " + mq.ID_RULE,
    ]
    missing = command("sync", "nowhere.md", "--project", "p")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert command("sync", "TASKS.md").returncode == 2  # no project is named
    assert command("sync", "TASKS.md", "--project", "p", "--watch", "--check").returncode == 2
    assert command("sync", "TASKS.md", "--project", "p", "--direction", "up").returncode == 2


# -- bad input --


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"| id | status |\n|---|---|\n| a\xff | done |\n", "line 3 of .* is not UTF-8"),
        (HEAD.encode("utf-16"), "line 1 of .* is not UTF-8"),
        (b"", "there is no task table in"),
        (b"# Tasks\n\nnothing yet\n", "there is no task table in"),
        (b"|id|status|\n|-|-|\n|a|accepted|\n", "no task table: its status words are accepted"),
        ((HEAD + "<<<<<<< HEAD\n" + row("A")).encode(), "line 3 of .* is a merge conflict"),
        ((HEAD + row("A") + ">>>>>>> other\n").encode(), "line 4 of .* is a merge conflict"),
    ],
)
async def test_a_file_that_cannot_be_synced_is_refused_and_nothing_changes(
    queue: mq.Queue, db: redis.Redis, tmp_path: Path, data: bytes, said: str
) -> None:
    path = tmp_path / "TASKS.md"
    path.write_bytes(data)
    with pytest.raises(mq.Refused, match=said) as refused:
        await sync(queue, path)
    assert refused.value.code == "INVALID"
    assert path.read_bytes() == data
    assert db.keys("*") == []


async def test_a_folder_or_no_file_is_refused(queue: mq.Queue, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.md"):
        with pytest.raises(mq.Refused, match=rf"{path} (is not|cannot be) read: "):
            await sync(queue, path)


async def test_a_merge_marker_in_code_is_none(queue: mq.Queue, tmp_path: Path) -> None:
    text = HEAD + row("A") + "\n```\n<<<<<<< HEAD\n>>>>>>> other\n```\n\ntitle\n=======\n"
    report = await sync(queue, written(tmp_path / "TASKS.md", text))
    assert kinds(report) == [("created", "A")]


async def test_rows_that_cannot_be_synced_are_told_and_the_others_are_synced(
    queue: mq.Queue, tmp_path: Path
) -> None:
    rows = ["| A | done |\n", "| B | not-started | b | A | more | cells |\n", row("a b"), row("")]
    rows += [row("Ü"), row("x" * 129), row("C", needs="B"), row("D", text="d\x00d"), row("E")]
    path = written(tmp_path / "TASKS.md", HEAD + "".join(rows) + "\n" + HEAD + row("E", "done"))
    for _ in range(2):
        report = await sync(queue, path)
        assert [why.partition(" ")[0] for why in whys(report, "invalid")] == [
            "5:", "6:", "7:", "8:", "15:", "11:"
        ]  # fmt: skip
        told = "".join(whys(report, "refused"))
        assert "3: INVALID: title is ''" in told
        assert "4: NOT_FOUND: " in told
        assert "10: INVALID: title" in told
        assert set(await shown(queue)) == set()
    replaced(path, "| A | done |", "| A | done | a |")
    await sync(queue, path)
    assert await shown(queue) == {"A": "done", "B": "not-started", "C": "not-started"}


async def test_ids_that_two_files_have_are_synced_by_neither(
    queue: mq.Queue, board: Path, tmp_path: Path
) -> None:
    await sync(queue, board)
    other = written(tmp_path / "MORE.md", "\n" + HEAD + row("A", "done") + row("C"))
    report = await sync(queue, other)
    assert whys(report, "invalid") == [f"4: line 3 of {board} has this id too"]
    assert await shown(queue) == {"A": "not-started", "B": "not-started", "C": "not-started"}
    replaced(board, "| A | not-started", "| A | done")
    assert whys(await sync(queue, board), "invalid") == [f"3: line 4 of {other} has this id too"]
    assert (await shown(queue))["A"] == "not-started"
    replaced(other, row("A", "done"), "")
    await sync(queue, other)
    assert kinds(await sync(queue, board)) == [("changed", "A")]
    await in_step(queue, board)
    await in_step(queue, other)


async def test_a_read_only_file_gives_and_takes_nothing(queue: mq.Queue, board: Path) -> None:
    await sync(queue, board)
    replaced(board, "do A", "do A well")
    board.chmod(0o444)
    await queue.complete("B", project="p", force=True)
    await queue.create("p", "TASKS", "C", title="c")
    for at in range(2):
        report = await sync(queue, board)
        unwritten = [("unwritten", "B"), ("unwritten", "C")]
        assert kinds(report) == [*([] if at else [("changed", "A")]), *unwritten]
        assert (await queue.get("A", project="p"))["title"] == "do A well"
    board.chmod(0o644)
    assert kinds(await sync(queue, board)) == [("written", "B"), ("added", "C")]
    await in_step(queue, board)


async def test_a_link_stays_and_its_target_is_written(
    queue: mq.Queue, board: Path, tmp_path: Path
) -> None:
    for name in (".git", "docs"):
        (tmp_path / name).mkdir()
    link = tmp_path / "docs" / "TASKS.md"
    link.symlink_to(board)
    board.chmod(0o664)
    await sync(queue, link)
    await queue.complete("A", project="p", force=True)
    assert (await sync(queue, link))["file"] == str(board)
    assert link.is_symlink()
    assert "| A | done" in board.read_text()
    assert board.stat().st_mode & 0o777 == 0o664
    assert sorted(p.name for p in tmp_path.iterdir()) == [".git", "TASKS.md", "docs", "state"]
    await in_step(queue, board)  # the link and the file are one


async def test_fifty_thousand_rows_work(queue: mq.Queue, tmp_path: Path) -> None:
    """All but a few are known to be deleted, so that this is no test of creating tasks."""
    text = HEAD + "".join(row(f"T{at}", "deleted") for at in range(50_000)) + row("A", "done")
    path = written(tmp_path / "TASKS.md", text)
    report = await sync(queue, path)
    assert kinds(report) == [("created", "A"), ("changed", "A")]
    assert path.read_text() == text


async def test_a_file_that_is_replaced_during_the_sync_loses_nothing(
    queue: mq.Queue, board: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An editor writes between the reading and the writing."""
    await sync(queue, board)
    await queue.complete("A", project="p", force=True)
    shipped, times = mq.put, []

    def late(path: Path, after: bytes, before: bytes) -> bool:
        times.append(1)
        if len(times) == 1:
            new = board.with_suffix(".new")
            new.write_text(board.read_text().replace("do B", "do B well"))
            new.replace(board)
        return shipped(path, after, before)

    monkeypatch.setattr(mq, "put", late)
    report = await sync(queue, board)
    assert len(times) == 2
    assert set(kinds(report)) == {("written", "A"), ("changed", "B")}
    assert board.read_text() == HEAD + row("A", "done") + row("B", text="do B well", needs="A")
    assert (await queue.get("B", project="p"))["title"] == "do B well"


async def test_a_task_that_changes_during_the_sync_is_read_again(
    queue: mq.Queue, board: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sync(queue, board)
    replaced(board, "do A", "by the file")
    shipped, times = mq.Queue.update, []

    async def late(self: mq.Queue, task: str, **given: Any) -> mq.Task:
        times.append(1)
        if len(times) == 1:
            await shipped(queue, "A", project="p", title="by an agent")
        return await shipped(self, task, **given)

    monkeypatch.setattr(mq.Queue, "update", late)
    report = await sync(queue, board)
    assert kinds(report) == [("conflict", "A")]
    assert (await queue.get("A", project="p"))["title"] == "by an agent"


async def test_what_changes_beside_an_operation_of_the_sync_is_not_missed(
    queue: mq.Queue, board: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sync(queue, board)
    replaced(board, "| A | not-started", "| A | blocked")
    shipped, update = mq.Queue.block, mq.Queue.update

    async def late(self: mq.Queue, task: str, **given: Any) -> mq.Task:
        await update(queue, "A", project="p", title="by an agent")
        return await shipped(self, task, **given)

    monkeypatch.setattr(mq.Queue, "block", late)
    await sync(queue, board)
    await sync(queue, board)
    assert "| A | blocked | by an agent |" in board.read_text()
    await in_step(queue, board)


async def test_one_of_two_syncs_waits(
    queue: mq.Queue, board: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = await asyncio.gather(*(sync(queue, board) for _ in range(4)))
    assert sorted(len(report["rows"]) for report in reports) == [0, 0, 0, 2]
    monkeypatch.setattr(mq, "LOCK_WAIT", 0.1)
    async with mq.write_lock(board):
        with pytest.raises(mq.Refused, match=f"held by process {os.getpid()} of"):
            await sync(queue, board)
    await in_step(queue, board)


@pytest.mark.parametrize("cut", ["create", "complete", "base", "write"])
async def test_a_sync_that_is_cut_off_is_finished_by_the_next(
    queue: mq.Queue, board: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    """After each of its steps: nothing is done twice and nothing is taken for a conflict."""
    await sync(queue, board)
    written(board, board.read_text() + row("C", "done") + row("D", "blocked", needs="C"))
    replaced(board, "do A", "do A well")
    await queue.complete("B", project="p", force=True)

    class CutError(Exception):
        pass

    def cutting(shipped: Callable[..., Any]) -> Callable[..., Any]:
        async def call(*args: Any, **given: Any) -> Any:
            await shipped(*args, **given)
            raise CutError

        def write(*args: Any) -> bool:
            shipped(*args)
            raise CutError

        return write if cut == "write" else call

    places: dict[str, tuple[Any, str]] = {
        "create": (mq.Queue, "create_all"),
        "complete": (mq.Queue, "complete"),
        "base": (mq.Queue, "keep_base"),
        "write": (mq, "put"),
    }
    where, name = places[cut]
    with monkeypatch.context() as patched:
        patched.setattr(where, name, cutting(getattr(where, name)))
        with pytest.raises(CutError):
            await sync(queue, board)
    report = await sync(queue, board)
    assert not {found["kind"] for found in report["rows"]} & {"conflict", "refused"}
    assert await shown(queue) == {
        "A": "not-started", "B": "done", "C": "done", "D": "blocked"
    }  # fmt: skip
    assert (await queue.get("A", project="p"))["title"] == "do A well"
    assert "| B | done" in board.read_text()
    await in_step(queue, board)
    ops = [event["op"] for event in (await queue.events(project="p", limit=100))["events"]]
    assert ops.count("update") == 1


async def test_what_is_not_open_is_not_claimable_for_a_moment(
    queue: mq.Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sync that ends after the rows were entered leaves nothing that is handed out."""
    words = ["Todo", "Done", "Deferred", "WIP", "what?"]
    text = HEAD + "".join(row(f"T{at}", word) for at, word in enumerate(words))
    path = written(tmp_path / "TASKS.md", text + row("T5", "Todo", needs="after lunch"))
    shipped = mq.Queue.create_all

    class CutError(Exception):
        pass

    async def cut(self: mq.Queue, *args: Any, **given: Any) -> Any:
        await shipped(self, *args, **given)
        raise CutError

    with monkeypatch.context() as patched:
        patched.setattr(mq.Queue, "create_all", cut)
        with pytest.raises(CutError):
            await sync(queue, path)
    tasks = await queue.tasks_of("p")
    assert {name for name, task in tasks.items() if task["status"] == "pending"} == {"T0"}
    assert "notBefore" not in tasks["T2"]
    assert kinds(await sync(queue, path)) == [("changed", "T1"), ("kept", "T5"), ("words", "")]
    assert (await shown(queue))["T1"] == "done"
    await in_step(queue, path)
    await queue.unblock("T2", project="p")
    assert (await queue.get("T2", project="p"))["status"] == "pending"


# -- following --


async def eventually(what: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not what():
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def watching(queue: mq.Queue, path: Path) -> AsyncIterator[list[mq.SyncReport]]:
    reports: list[mq.SyncReport] = []

    async def watch() -> None:
        async for report in mq.watch_file(queue, path, "p"):
            reports.append(report)

    async with at_work(watch()):
        yield reports


async def test_watch_follows_both_sides(queue: mq.Queue, board: Path) -> None:
    async with watching(queue, board) as reports:
        await eventually(lambda: reports)
        await queue.complete("A", project="p", force=True)
        await eventually(lambda: "| A | done" in board.read_text())
        replaced(board, "do B", "do B well")
        await eventually(lambda: ("changed", "B") in kinds(reports[-1]))
        text = board.read_text()
        board.unlink()
        await eventually(lambda: "invalid" in dict(kinds(reports[-1])))
        written(board, text + row("C"))
        await eventually(lambda: ("created", "C") in kinds(reports[-1]))


async def test_agents_complete_while_a_person_edits_and_an_editor_saves(
    queue: mq.Queue, config: mq.Config, tmp_path: Path
) -> None:
    """Every completion reaches the file, and every description the queue."""
    count = 24
    rows = [row(f"T{at}") for at in range(count)]
    path = written(tmp_path / "TASKS.md", HEAD + "".join(rows) + row("LAST"))
    await sync(queue, path)

    async def work() -> None:
        for at in range(count):
            await queue.claim(f"T{at}", "alice", project="p")
            await queue.complete(f"T{at}", project="p", agent="alice")
            await asyncio.sleep(0.05)

    def save(old: str, new: str) -> None:
        """What an editor does: it does not overwrite what it has not seen."""
        while True:
            before = path.read_bytes()
            temporary = path.with_suffix(".swp")
            temporary.write_bytes(before.replace(old.encode(), new.encode()))
            if path.read_bytes() == before:
                temporary.replace(path)
                return

    async def edit() -> None:
        order = list(range(count))
        random.Random(1).shuffle(order)
        for at in order:
            save(f"| do T{at} |", f"| text of {at} |")
            save("", "")  # a save that changes nothing
            await asyncio.sleep(0.07)

    async with watching(queue, path) as reports:
        await asyncio.gather(work(), edit())
        await eventually(lambda: path.read_text().count("| done |") == count)
        save("do LAST", "did LAST")
        await eventually(lambda: ("changed", "LAST") in kinds(reports[-1]))
    report = await sync(queue, path)
    tasks = await queue.tasks_of("p")
    # What was edited after its completion is refused, put back, and told.
    told = [one for report in [*reports, report] for one in report["rows"]]
    refused = {one["task"] for one in told if one["kind"] == "refused"}
    for at in range(count):
        task = tasks[f"T{at}"]
        assert task["status"] == "completed"
        assert task["title"] == f"text of {at}" or task["taskId"] in refused
    await in_step(queue, path)


# -- random histories --

TASKS = ["A", "B", "C", "D"]
KEPT_APART = {("", word) for word in mq.RANK} | {("in-progress", "blocked")}
TEXTS = ["one", "two | bars", "three<br>lines", "x" * 600]
edits = st.one_of(
    st.tuples(st.just("file"), st.sampled_from(TASKS), st.sampled_from(["status"]),
              st.sampled_from([*mq.RANK, "needs-qa", ""])),
    st.tuples(st.just("file"), st.sampled_from(TASKS), st.just("text"), st.sampled_from(TEXTS)),
    st.tuples(st.just("file"), st.sampled_from(TASKS), st.just("depends_on"),
              st.sampled_from(["", "A", "B", "A, C", "D", "Z"])),
    st.tuples(st.just("file"), st.sampled_from(TASKS), st.just("row"), st.just("")),
    st.tuples(st.just("queue"), st.sampled_from(TASKS), st.sampled_from(
        ["claim", "complete", "fail", "block", "unblock", "reopen", "redrive", "release",
         "delete", "create"]), st.just("")),
    st.tuples(st.just("queue"), st.sampled_from(TASKS), st.just("title"), st.sampled_from(TEXTS)),
    st.tuples(st.just("queue"), st.sampled_from(TASKS), st.just("needs"),
              st.sampled_from(["", "A", "B", "C"])),
    st.tuples(st.just("sync"), st.just(""), st.just(""), st.just("")),
)  # fmt: skip


# What git does with a board, and with what comes first.
GIT_MOVES = {
    "commit": ("add -A", "commit -q --allow-empty -m x"),
    "back": ("checkout -qf HEAD~1",),
    "front": ("checkout -qf main",),
    "reset": ("reset -q --hard HEAD~1",),
    "stash": ("stash -q",),
    "pop": ("checkout -q -- .", "stash pop -q"),
    "file": ("checkout -q -- TASKS.md",),
    "branch": ("branch -f other", "checkout -qf other"),
    "rebase": ("rebase -q main", "rebase --abort"),
}
moves = st.tuples(st.just("git"), st.just(""), st.sampled_from([*GIT_MOVES]), st.just(""))


def move_file(folder: Path, what: str) -> None:
    """What git can do of it; what it refuses is nothing."""
    for words in GIT_MOVES[what]:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com", *words.split()]
        subprocess.run(command, cwd=folder, capture_output=True, check=False)
    (folder / ".git/index.lock").unlink(missing_ok=True)


def edit_file(path: Path, task: str, column: str, value: str) -> None:
    board = mq.read_board(path.read_bytes().decode())
    table = board.tables[0]
    found = next((one for one in table.rows if one.task == task), None)
    if column == "row" and found:
        board.lines[found.line] = ""
    elif found:
        board.put(table, found, column, mq.unescape_cell(value))
    else:
        board.append(table, {"id": task, "status": "not-started", "text": "again"})
    path.write_bytes(board.text().encode())


async def edit_queue(queue: mq.Queue, task: str, what: str, value: str) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "claim": lambda: queue.claim(task, "alice", project="p"),
        "complete": lambda: queue.complete(task, project="p", force=True),
        "fail": lambda: queue.fail(task, project="p", reason="r", retry=False, force=True),
        "block": lambda: queue.block(task, project="p", reason="r", force=True),
        "unblock": lambda: queue.unblock(task, project="p"),
        "reopen": lambda: queue.reopen(task, project="p", reason="r"),
        "redrive": lambda: queue.redrive(task, project="p"),
        "release": lambda: queue.release(task, project="p", force=True),
        "delete": lambda: queue.delete(task, project="p", force=True),
        "create": lambda: queue.create("p", "TASKS", task, title="new"),
        "title": lambda: queue.update(task, project="p", title=mq.unescape_cell(value)[:400]),
        "needs": lambda: queue.update(task, project="p", dependencies=value.split()),
    }
    with contextlib.suppress(mq.Refused):
        await calls[what]()


def file_cells(path: Path) -> dict[tuple[str, str], str]:
    board = mq.read_board(path.read_bytes().decode())
    return {
        (one.task, column): value
        for table in board.tables
        for one in table.rows
        for column, value in one.cells.items()
    }


async def queue_cells(queue: mq.Queue) -> dict[tuple[str, str], str]:
    tasks = await queue.tasks_of("p")
    return {
        (name, column): mq.CELLS[column].value(task)
        for name, task in tasks.items()
        for column in ("status", "text", "depends_on")
    }


async def followed(url: str, path: Path, history: list[tuple[str, str, str, str]]) -> None:
    """Play a history, and at each sync hold what it did against what it was told to keep."""
    config = mq.Config(environ={}).set("redis.url", url, "test")
    async with mq.Queue(config) as queue:
        written(path, HEAD + "".join(row(task) for task in TASKS[:2]))
        if any(kind == "git" for kind, *_ in history):
            shutil.rmtree(path.parent / ".git", ignore_errors=True)
            subprocess.run(["git", "init", "-q", "-b", "main", str(path.parent)], check=True)
            move_file(path.parent, "commit")
        agreed: dict[tuple[str, str], str] = {}
        finished: set[str] = set()
        for kind, task, what, value in [*history, ("sync", "", "", "")]:
            if kind == "file":
                edit_file(path, task, what, value)
            elif kind == "git":
                move_file(path.parent, what)
                if not path.is_file():
                    written(path, HEAD + row("A"))
            elif kind == "queue":
                await edit_queue(queue, task, what, value)
            else:
                before, theirs = file_cells(path), await queue_cells(queue)
                finished = {n for n, t in (await queue.tasks_of("p")).items() if is_done(t)}
                try:
                    report = await sync(queue, path)
                except mq.Refused as refusal:
                    if "is a merge conflict" not in refusal.message:
                        raise
                    continue
                tasks = await queue.tasks_of("p")
                # No file reopens what was completed, and nothing is ready that is not shown open.
                assert all(name not in tasks or is_done(tasks[name]) for name in finished), report
                whole = any(one["kind"] == "stale" and "task" not in one for one in report["rows"])
                stale = {(one.get("task"), one.get("field")) for one in report["rows"]
                         if one["kind"] == "stale"}  # fmt: skip
                after, ours = file_cells(path), await queue_cells(queue)
                told = {(one.get("task"), one.get("field")) for one in report["rows"]}
                told |= {(one.get("task"), "row") for one in report["rows"] if "field" not in one}
                told |= {*before, *after, *ours} if whole else set()
                for name, one in tasks.items():
                    word = after.get((name, "status"), "not-started")
                    is_open = word in ("", "not-started") or (name, "status") in told
                    assert one["status"] != "pending" or is_open, (name, word, report)
                for cell, value_now in before.items():
                    # An edit of the file is in the queue now, or still in the file, or was told.
                    edited = agreed.get(cell) != value_now
                    arrived = ours.get(cell) == value_now or after.get(cell) == value_now
                    known = cell in told or (cell[0], "row") in told
                    assert not edited or arrived or known, ("file", cell, report)
                for cell, value_now in theirs.items():
                    edited = agreed.get(cell) != value_now
                    arrived = ours.get(cell) == value_now or after.get(cell) == value_now
                    known = cell in told or (cell[0], "row") in told
                    assert not edited or arrived or known, ("queue", cell, report)
                for cell, last in agreed.items():
                    # What both have changed, each in its way, stays on both sides.
                    mine, its = before.get(cell, last), theirs.get(cell, last)
                    prose = cell[1] == "depends_on" and not {*before.get(cell, "").split()} <= {
                        name for name, _ in {*before, *theirs}
                    }  # it stays beside what the queue writes
                    if whole or cell in stale or prose:
                        continue
                    if last not in (mine, its) and mine != its and mine not in ("", "in-progress"):
                        assert (after.get(cell), ours.get(cell)) == (mine, its), (cell, report)
                for cell, value_now in after.items():
                    # What differs after a sync was told, or says nothing.
                    other = ours.get(cell, value_now)
                    known = cell in told or (cell[0], "row") in told
                    quiet = cell[1] == "status" and (value_now, other) in KEPT_APART
                    # Prose among the dependencies was told when it came, and blocks the task.
                    names = {*after.get((cell[0], "depends_on"), "").split()}
                    quiet = quiet or not names <= {name for name, _ in {*after, *ours}}
                    assert other == value_now or known or quiet, ("left", cell, other, report)
                text, revision = path.read_bytes(), await queue.revision("p")
                again = await sync(queue, path)
                assert path.read_bytes() == text, again
                assert await queue.revision("p") == revision, again
                agreed = {cell: v for cell, v in after.items() if ours.get(cell, v) == v}


def is_done(task: mq.Task) -> bool:
    return task["status"] == "completed"


def play(server: Server, folder: Path, history: list[tuple[str, str, str, str]]) -> None:
    with server.client() as client:
        client.flushall()
    asyncio.run(followed(server.url, folder / "TASKS.md", history))


@pytest.fixture(scope="module")
def histories_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("histories")


@settings(
    max_examples=HISTORIES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(history=st.lists(edits, min_size=1, max_size=14))
def test_no_edit_is_lost_that_was_not_told(
    server: Server, histories_folder: Path, history: list[tuple[str, str, str, str]]
) -> None:
    """Random edits of both sides, and a second sync after each does nothing."""
    in_a_loop_of_its_own(server, histories_folder, history)


@settings(
    max_examples=max(20, HISTORIES // 4),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(history=st.lists(edits | moves, min_size=2, max_size=14))
def test_git_undoes_nothing_and_all_is_told(
    server: Server, histories_folder: Path, history: list[tuple[str, str, str, str]]
) -> None:
    """The same with a repository that moves."""
    in_a_loop_of_its_own(server, histories_folder, history)


def in_a_loop_of_its_own(
    server: Server, folder: Path, history: list[tuple[str, str, str, str]]
) -> None:
    """Play a history; the test's thread may have a loop already."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            play(server, folder, history)
        except BaseException as problem:
            failed.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


if __name__ == "__main__":
    count = sys.argv[1] if len(sys.argv) > 1 else "10000"
    command = [sys.executable, "-m", "pytest", __file__, "-k", "all_is_told or no_edit_is_lost"]
    environ = os.environ | {"MOSAIC_TEST_HISTORIES": count}
    sys.exit(subprocess.run(command, env=environ, check=False).returncode)
