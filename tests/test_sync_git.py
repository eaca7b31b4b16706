"""A TASKS.md in a repository that moves: what git brings back undoes nothing, and is told."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import at_work, one_engine, until
from test_sync import HEAD, Command, command, in_step, kinds, replaced, row, shown, sync, written

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
server = one_engine()
__all__ = ["command"]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@example.com")


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", message)


@pytest.fixture
async def board(queue: mq.Queue, tmp_path: Path) -> Path:
    """A board in a repository, committed and in step."""
    folder = tmp_path / "repo"
    (folder / "docs").mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main")
    written(folder / "a.txt", "one\n")
    path = written(folder / "docs/TASKS.md", HEAD + row("A") + row("B", needs="A") + row("C"))
    written(path, path.read_text() + "\n\n## More\n\n" + HEAD + row("E"))
    commit(folder, "first")
    await sync(queue, path)
    return path


async def worked(queue: mq.Queue, path: Path) -> None:
    """A is completed with a summary, C is held, the board says so, and that is committed."""
    await queue.complete("A", project="p", force=True, summary="it works")
    await queue.claim("C", "alice", project="p")
    await sync(queue, path)
    assert "| A | done |" in path.read_text()
    commit(path.parents[1], "done")


async def unharmed(queue: mq.Queue) -> None:
    task = await queue.get("A", project="p")
    assert (task["status"], task.get("summary")) == ("completed", "it works")
    assert (await queue.get("C", project="p")).get("claimedBy") == "alice"
    ops = {event["op"] for event in (await queue.events(project="p", limit=1000))["events"]}
    assert not ops & {"reopen", "release", "redrive"}


MOVES: dict[str, Callable[[Path], Any]] = {
    "checkout": lambda at: git(at, "checkout", "-q", "HEAD~1"),
    "checkout of the file": lambda at: git(at, "checkout", "-q", "HEAD~1", "--", "docs/TASKS.md"),
    "a branch of before": lambda at: git(at, "checkout", "-q", "-b", "old", "HEAD~1"),
    "reset": lambda at: git(at, "reset", "-q", "--hard", "HEAD~1"),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("known", [True, False], ids=["known", "long ago"])
async def test_an_older_commit_undoes_nothing(
    queue: mq.Queue, board: Path, move: str, known: bool
) -> None:
    """Also where the file of then is none that is remembered."""
    await worked(queue, board)
    if not known:
        (mark,) = await queue.files("p")
        base = json.loads((await queue.base("p", mark))[":state"])
        base["state"]["past"] = []
        await queue.keep_base("p", mark, board, {":state": base})
    MOVES[move](board.parents[1])
    assert "| A | not-started |" in board.read_text()
    report = await sync(queue, board)
    assert {"stale"} <= {found["kind"] for found in report["rows"]}, report
    await unharmed(queue)
    assert "| A | done |" in board.read_text()
    await in_step(queue, board)


async def test_rows_of_an_older_commit_are_not_entered(queue: mq.Queue, board: Path) -> None:
    """Rows that were taken out before the file was first synced, or whose task was deleted."""
    folder = board.parents[1]
    whole = board.read_text()
    written(board, whole + "\n\n" + HEAD + row("OLD"))
    commit(folder, "a row")
    written(board, whole)
    commit(folder, "without it")
    await queue.delete("E", project="p")
    await sync(queue, board)
    assert "| E | deleted |" in board.read_text()
    git(folder, "checkout", "-qf", "HEAD~1")
    for _ in range(2):
        await sync(queue, board)
        assert set(await shown(queue)) == {"A", "B", "C"}
    replaced(board, "do A", "do A well")
    await sync(queue, board)
    assert set(await shown(queue)) == {"A", "B", "C"}
    await in_step(queue, board)
    await sync(queue, board, reopen=["OLD"])


async def test_there_and_back(queue: mq.Queue, board: Path) -> None:
    await worked(queue, board)
    folder = board.parents[1]
    for _ in range(3):
        git(folder, "checkout", "-qf", "HEAD~1")
        assert ("stale", "") in kinds(await sync(queue, board))
        git(folder, "checkout", "-qf", "main")
        assert kinds(await sync(queue, board)) == []
        await unharmed(queue)


async def test_who_comes_back_to_what_is_right_is_told_nothing(
    queue: mq.Queue, board: Path
) -> None:
    written(board, board.read_text() + row("F"))
    await worked(queue, board)
    for _ in range(2):
        git(board.parents[1], "checkout", "-qf", "HEAD~1")
        assert {("stale", ""), ("written", "A"), ("missing", "F")} <= {
            *kinds(await sync(queue, board))
        }
        git(board.parents[1], "checkout", "-qf", "main")
        assert kinds(await sync(queue, board)) == []
    await unharmed(queue)


async def test_an_edit_is_taken_back_with_git(queue: mq.Queue, board: Path) -> None:
    """Nobody but the file has changed anything since."""
    replaced(board, "do B", "do B well")
    await sync(queue, board)
    git(board.parents[1], "checkout", "-q", "--", "docs/TASKS.md")
    assert kinds(await sync(queue, board)) == [("changed", "B")]
    assert (await queue.get("B", project="p"))["title"] == "do B"
    await in_step(queue, board)


async def test_a_stash_undoes_nothing(queue: mq.Queue, board: Path) -> None:
    """Before the commit: HEAD has never seen what the queue wrote."""
    await queue.complete("A", project="p", force=True, summary="it works")
    await queue.claim("C", "alice", project="p")
    await sync(queue, board)
    git(board.parents[1], "stash")
    (said,) = [one for one in (await sync(queue, board))["rows"] if one["kind"] == "stale"]
    assert "TASKS.md is as it was " in said["why"]
    assert "| A | done |" in board.read_text()
    git(board.parents[1], "checkout", "-q", "--", "docs/TASKS.md")
    git(board.parents[1], "stash", "pop")
    assert kinds(await sync(queue, board)) == []
    await unharmed(queue)
    await in_step(queue, board)


async def test_a_rebase_keeps_what_both_have(queue: mq.Queue, board: Path) -> None:
    """Of the other branch come new rows and texts; no status goes back."""
    folder = board.parents[1]
    git(folder, "branch", "other")
    await worked(queue, board)
    git(folder, "checkout", "-q", "other")
    text = board.read_text()
    written(board, text.replace("do E", "do E well") + "\n" + HEAD + row("D", text="new"))
    commit(folder, "by somebody else")
    git(folder, "checkout", "-q", "main")
    assert kinds(await sync(queue, board)) == []
    git(folder, "rebase", "-q", "other")
    assert "| A | done |" in board.read_text()
    assert "do E well" in board.read_text()
    report = await sync(queue, board)
    assert set(kinds(report)) == {("changed", "E"), ("created", "D")}
    await unharmed(queue)
    await in_step(queue, board)


async def test_what_a_pull_brings_is_an_edit(queue: mq.Queue, board: Path, tmp_path: Path) -> None:
    folder, other = board.parents[1], tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(folder), str(other))
    await worked(queue, board)
    git(other, "pull", "-q")
    replaced(other / "docs/TASKS.md", "| B | not-started | do B |", "| B | blocked | do B now |")
    commit(other, "edited")
    git(folder, "pull", "-q", str(other))
    assert set(kinds(await sync(queue, board))) == {("changed", "B")}
    task = await queue.get("B", project="p")
    assert (task["title"], task["status"]) == ("do B now", "blocked")
    await in_step(queue, board)


async def test_a_sync_waits_for_the_end_of_a_git_operation(
    queue: mq.Queue, board: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = board.parents[1]
    git(folder, "checkout", "-q", "-b", "other")
    replaced(board, "do B", "by the other")
    commit(folder, "theirs")
    git(folder, "checkout", "-q", "main")
    replaced(board, "do B", "by main")
    commit(folder, "ours")
    await sync(queue, board)
    done = subprocess.run(["git", "rebase", "other"], cwd=folder, capture_output=True, check=False)
    assert done.returncode != 0
    git(folder, "checkout", "-q", "--theirs", "--", "docs/TASKS.md")
    text, revision = board.read_bytes(), await queue.revision("p")
    with pytest.raises(mq.Refused, match=r"HELD: git is in the middle of something in .*rebase"):
        await sync(queue, board)
    assert (board.read_bytes(), await queue.revision("p")) == (text, revision)
    done_too = command("sync", str(board), "--project", "p")
    assert done_too.returncode == 4
    assert "git is in the middle of something" in done_too.stderr
    git(folder, "rebase", "--abort")
    await sync(queue, board)

    lock = folder / ".git/index.lock"
    lock.touch()
    waiting = asyncio.create_task(sync(queue, board))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    lock.unlink()
    await waiting
    monkeypatch.setattr(mq, "GIT_WAIT", 0.1)
    lock.touch()
    with pytest.raises(mq.Refused, match=r"index\.lock is there"):
        await sync(queue, board)


async def test_worktrees_are_one_board(queue: mq.Queue, board: Path, tmp_path: Path) -> None:
    """Each has its base; edits come from each; the main one is written; a removed one is
    forgotten."""
    await worked(queue, board)
    folder, tree = board.parents[1], tmp_path / "tree"
    git(folder, "worktree", "add", "-q", "-b", "agent", str(tree))
    other = tree / "docs/TASKS.md"
    assert kinds(await sync(queue, other)) == []
    assert len(await queue.files("p")) == 2
    replaced(other, "do B", "do B well")
    written(other, other.read_text() + row("D", "in review"))
    text = other.read_text()
    assert ("changed", "B") in kinds(await sync(queue, other))
    assert set(kinds(await sync(queue, board))) == {("written", "B"), ("added", "D")}
    await queue.complete("B", project="p", force=True)
    for _ in range(2):
        assert kinds(await sync(queue, other)) == []
        assert other.read_text() == text
    await sync(queue, board)
    assert "| B | done | do B well |" in board.read_text()
    replaced(other, "| B | not-started", "| B | blocked")
    assert kinds(await sync(queue, other)) == [("stale", "B")]
    assert (await shown(queue))["B"] == "done"
    git(folder, "worktree", "remove", "--force", str(tree))
    replaced(board, "do E", "do E well")
    await sync(queue, board)
    assert [*(await queue.files("p")).values()] == [str(board)]
    await unharmed(queue)
    await in_step(queue, board)


async def test_a_new_worktree_of_an_older_commit_undoes_nothing(
    queue: mq.Queue, board: Path, tmp_path: Path
) -> None:
    await worked(queue, board)
    await queue.delete("B", project="p", force=True)
    await sync(queue, board)
    folder, tree = board.parents[1], tmp_path / "tree"
    git(folder, "worktree", "add", "-q", "-b", "agent", str(tree), "HEAD~1")
    other = tree / "docs/TASKS.md"
    assert "| A | not-started |" in other.read_text()
    await sync(queue, other)
    await sync(queue, other)
    assert set(await shown(queue)) == {"A", "C", "E"}
    await unharmed(queue)


async def test_all_worktrees_are_written_where_the_configuration_says_so(
    queue: mq.Queue, config: mq.Config, board: Path, tmp_path: Path
) -> None:
    folder, tree = board.parents[1], tmp_path / "tree"
    git(folder, "worktree", "add", "-q", "-b", "agent", str(tree))
    other = tree / "docs/TASKS.md"
    config.set("files", [{"path": str(other), "project": "p", "worktrees": "all"}], "t")
    await queue.complete("A", project="p", force=True, summary="it works")
    assert kinds(await sync(queue, other)) == [("written", "A")]
    assert "| A | done |" in other.read_text()
    config.set("files", [{"path": str(other), "project": "p", "worktrees": "some"}], "t")
    with pytest.raises(mq.Refused, match="worktrees is 'some'; accepted: main, all"):
        await sync(queue, other)


async def test_the_monitor_keeps_all_worktrees_in_step(
    queue: mq.Queue, config: mq.Config, board: Path, tmp_path: Path
) -> None:
    """Those that there are, those that are made later, and none that is removed."""
    folder, first, second = board.parents[1], tmp_path / "first", tmp_path / "second"
    words = {"finished": ["abgehakt"]}
    given = {"path": str(board), "project": "p", "worktrees": "all", "words": words}
    config.set("files", [given], "t")
    git(folder, "worktree", "add", "-q", "-b", "one", str(first))

    def all_say(text: str, *tops: Path) -> bool:
        return all(text in (top / "docs/TASKS.md").read_text() for top in tops)

    async def only_two_are_known() -> bool:
        return {*(await queue.files("p")).values()} == {str(board), str(second / "docs/TASKS.md")}

    async with at_work(mq.watch_all(queue, only=["files"])):
        await queue.complete("A", project="p", force=True, summary="it works")
        await until(lambda: all_say("| A | done |", folder, first))
        git(folder, "worktree", "add", "-q", "-b", "two", str(second))
        await until(lambda: all_say("| A | done |", second))
        replaced(second / "docs/TASKS.md", "do E", "do E well")
        await until(lambda: all_say("do E well", folder, first, second))
        git(folder, "worktree", "remove", "--force", str(first))
        replaced(second / "docs/TASKS.md", "| C | not-started", "| C | abgehakt")
        await until(lambda: all_say("| C | done |", folder))
        await until(only_two_are_known)
    assert (await queue.get("A", project="p"))["summary"] == "it works"
    assert (await shown(queue))["C"] == "done"


async def test_under_watch_a_checkout_is_written_anew(queue: mq.Queue, board: Path) -> None:
    await worked(queue, board)
    reports: list[Any] = []

    async def watch() -> None:
        async for report in mq.watch_file(queue, board, "p"):
            reports.extend(report["rows"])

    task = asyncio.create_task(watch())
    try:
        await asyncio.sleep(0.1)
        git(board.parents[1], "checkout", "-q", "HEAD~1")
        await until(lambda: "| A | done |" in board.read_text())
        await until(lambda: any(one["kind"] == "stale" for one in reports))
        git(board.parents[1], "checkout", "-qf", "main")
        await asyncio.sleep(0.5)
    finally:
        task.cancel()
    await unharmed(queue)
    await in_step(queue, board)


async def test_a_repository_runs_nothing(queue: mq.Queue, board: Path, tmp_path: Path) -> None:
    """What a repository's configuration names is not run by a sync."""
    trap = written(tmp_path / "trap", f"#!/bin/sh\ntouch {tmp_path}/sprung\n")
    os.chmod(trap, 0o755)
    for key in ("core.fsmonitor", "core.pager", "core.sshCommand", "diff.external", "core.editor"):
        git(board.parents[1], "config", key, str(trap))
    git(board.parents[1], "config", "filter.x.smudge", str(trap))
    replaced(board, "do B", "do B well")
    await sync(queue, board)
    assert not (tmp_path / "sprung").exists()
