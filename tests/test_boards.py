"""Boards as people write them: what is understood, and that nothing else is ever handed out.

`python tests/test_boards.py [N]` prints what was understood of N generated boards (240) and of the
shapes of public ones.
"""

# ruff: noqa: RUF001
from __future__ import annotations

import asyncio
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import BINARIES, Server, one_engine

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
server = one_engine()
BOARDS = 240

# A model of the vocabulary, not made from the module's.
MODEL: dict[str, dict[str, list[str]]] = {
    "English": {
        "open": ["Todo", "To Do", "TODO", "to-do", "Pending", "Open", "Ready", "Backlog", "Planned",
                 "Queued", "Not started", "not_started", "New", "Next", "not done"],
        "finished": ["Done", "Complete", "Completed", "Closed", "Merged", "Shipped", "Released",
                     "Resolved", "Implemented", "Fixed", "Delivered", "100%"],
        "set aside": ["Cancelled", "canceled", "Won't do", "wontfix", "Dropped", "Deferred",
                      "Parked", "Duplicate", "Superseded", "On hold", "N/A", "~~todo~~"],
        "under way": ["In progress", "in_progress", "WIP", "Doing", "Started", "In review",
                      "Testing", "needs-qa", "50%", "Code Review"],
        "unknown": ["to be seen", "RF", "Proposed", "ask Bob", "TBD", "Done?", "Done, except tests",
                    "Done (not merged)", "Open - blocked", "🔴", "❌", "Q3", "?", "half", "x"],
    },
    "German": {
        "open": ["Offen", "offen", "Geplant", "Zu erledigen"],
        "finished": ["Erledigt", "Fertig", "Abgeschlossen", "erledigt"],
        "set aside": ["Zurückgestellt", "Abgebrochen", "Verworfen"],
        "under way": ["In Arbeit", "in Bearbeitung"],
        "unknown": ["Mal sehen", "Rückfrage"],
    },
    "French": {
        "open": ["À faire", "Ouvert"], "finished": ["Terminé", "Fait"],
        "set aside": ["Annulé", "Reporté"], "under way": ["En cours"], "unknown": ["À voir"],
    },
    "Spanish": {
        "open": ["Pendiente", "Por hacer"], "finished": ["Hecho", "Completado", "Terminado"],
        "set aside": ["Cancelado", "Pospuesto"], "under way": ["En progreso"],
        "unknown": ["Quizás"],
    },
    "Portuguese": {
        "open": ["A fazer", "Pendente"], "finished": ["Concluído", "Feito"],
        "set aside": ["Cancelado", "Adiado"], "under way": ["Em andamento"], "unknown": ["Talvez"],
    },
    "Russian": {
        "open": ["К выполнению", "Открыто"], "finished": ["Готово", "Выполнено"],
        "set aside": ["Отменено", "Отложено"], "under way": ["В работе"], "unknown": ["Неясно"],
    },
    "Chinese": {
        "open": ["待办", "未开始"], "finished": ["已完成", "完成"], "set aside": ["已取消", "搁置"],
        "under way": ["进行中"], "unknown": ["再说"],
    },
    "Japanese": {
        "open": ["未着手"], "finished": ["完了"], "set aside": ["保留"], "under way": ["進行中"],
        "unknown": ["相談"],
    },
    "signs": {
        "open": ["⬜", "☐", "[ ]", ":white_large_square:"],
        "finished": ["✅", "✔️", "[x]", "☑", ":white_check_mark:"],
        "set aside": ["⏸️", "🚫"], "under way": ["🔄", "🚧"], "unknown": ["🟢🔴", "[?]"],
    },
}  # fmt: skip
WANTED = {"open": ("pending", "blocked"), "finished": ("completed",)}  # else blocked by hand
HEADS = {
    "id": ["ID", "id", "Task ID", "#", "Key", "Ticket", "**ID**"],
    "status": ["Status", "State", "**Status**", "Estado", "状态", "Status (as of today)"],
    "title": ["Title", "Task", "Description", "Name", "Beschreibung", "What"],
    "depends_on": ["Depends on", "depends_on", "Blocked by", "Deps", "Prerequisites"],
}


class Made(NamedTuple):
    """A generated board: its text, and language and meaning of each of its rows."""

    text: str
    rows: dict[str, tuple[str, str]]


def decorated(word: str, meaning: str, rng: random.Random) -> str:
    """A word as somebody writes it into a cell."""
    if word.startswith(("~~", "[", "?", ":")) or not any(c.isalpha() for c in word):
        return word
    forms = [word, word, f"**{word}**", f"`{word}`", f"*{word}*", f"_{word}_", f"{word.upper()}"]
    if meaning == "finished":
        forms += [f"✅ {word}", f"{word} ✅", f"{word} (PR #{rng.randrange(99)})", f"{word}."]
        forms += [f"{word} — 2026-05-01", f"✅ **{word}**", f"{word}: see #4", f"{word}!"]
    elif meaning == "open":
        forms += [f"⬜ {word}", f"{word} (P2)", f"📋 {word}"]
    elif meaning != "unknown":
        forms += [f"⏳ {word}", f"{word} (alice)", f"{word} - since May"]
    return rng.choice(forms)


def made(seed: int) -> Made:
    """A board of a seed."""
    rng = random.Random(seed)
    language = rng.choice([*MODEL, "English", "English", "English"])
    prefix = rng.choice(["T-", "MQ-00", "", "1.", "US-3.", "ABC-", "t_"])
    columns = ["id", *rng.sample(["status", "title", "depends_on", "Owner", "Notes"], 5)]
    heads = [rng.choice(HEADS.get(column, [column])) for column in columns]
    rows: dict[str, tuple[str, str]] = {}
    cells: list[list[str]] = []
    for at in range(rng.randrange(3, 11)):
        own = rng.random() < 0.85 and at > 0  # the first row is of a word that is known
        meaning = rng.choice([*MODEL[language], "open", "finished"]) if own else "finished"
        word = rng.choice(MODEL[language][meaning])
        task = f"{prefix}{at + 1}"
        needs = rng.choice([*rows, "", ""]) if rows else ""
        needs = rng.choice([needs, needs, f"`{needs}`", f"[{needs}](#x)"]) if needs else "—"
        shown = rng.choice([task, task, f"`{task}`", f"**{task}**", f"[{task}](x/{at})"])
        values = {"id": shown, "status": decorated(word, meaning, rng), "title": f"do {task}",
                  "depends_on": needs, "Owner": rng.choice(["—", "ann"]), "Notes": ""}  # fmt: skip
        cells.append([values[column] for column in columns])
        rows[task] = (language, meaning)
    wide = rng.random() < 0.5
    sizes = [max(3, *(len(one[at]) for one in [heads, *cells])) if wide else 3 for at in range(6)]
    ruled = ["-" * size if wide else rng.choice(["---", ":-:", "-"]) for size in sizes]
    lines = [heads, ruled, *cells]
    text = "".join(
        "| " + " | ".join(c.ljust(s) if wide else c for c, s in zip(line, sizes, strict=True))
        + " |\n" for line in lines
    )  # fmt: skip
    text = f"# Plan {seed}\n\nMission: m{seed}\n\n## Tasks\n\n{text}\nprose | and so on\n"
    return Made(text.replace("\n", "\r\n") if rng.random() < 0.2 else text, rows)


async def claimable(queue: mq.Queue, project: str) -> set[str]:
    """All that `next` hands out."""
    found: set[str] = set()
    while tasks := (await queue.next("a", project=project))["tasks"]:
        found |= {task["taskId"] for task in tasks}
    return found


async def look_at(queue: mq.Queue, path: Path, board: Made, project: str) -> Iterator[str]:
    """Sync a board for the first time, and say what is not as it should be."""
    wrong: list[str] = []
    path.write_bytes(board.text.encode())
    await mq.sync_file(queue, path, project)
    tasks = await queue.tasks_of(project)
    if path.read_bytes() != board.text.encode():
        wrong.append("the first sync changed the file")
    for name, (_, meaning) in board.rows.items():
        status = tasks[name]["status"] if name in tasks else "missing"
        by_hand = name in tasks and "blockedReason" in tasks[name]
        right = status in WANTED.get(meaning, ("blocked",))
        if not right or by_hand != (meaning not in WANTED):
            wrong.append(f"{name} is {status}, of {meaning}")
    wrong += [f"{name} was handed out" for name in await claimable(queue, project)
              if board.rows[name][1] != "open"]  # fmt: skip
    return iter(wrong)


@pytest.mark.parametrize("part", range(8))
async def test_of_a_generated_board_all_is_understood(
    queue: mq.Queue, tmp_path: Path, part: int
) -> None:
    """Open rows are pending, finished ones completed, all others kept; no byte changes.  One that
    is completed changes one cell, which says so in a word that is read again."""
    for seed in range(part, BOARDS, 8):
        board, path, project = made(seed), tmp_path / f"{seed}.md", f"p{seed}"
        assert [*await look_at(queue, path, board, project)] == [], board.text
        held = [t for t in (await queue.tasks_of(project)).values() if t["status"] == "claimed"]
        if not held:
            continue
        name = held[0]["taskId"]
        for task in held:
            await queue.release(task["taskId"], project=project, force=True)
        await queue.complete(name, project=project, force=True)
        await mq.sync_file(queue, path, project)
        lines = zip(board.text.split("\n"), path.read_bytes().decode().split("\n"), strict=True)
        changed = [(old.split("|"), new.split("|")) for old, new in lines if old != new]
        assert len(changed) == 1, (name, changed)
        cells = [(a, b) for a, b in zip(*changed[0], strict=True) if a.strip() != b.strip()]
        assert len(cells) == 1
        now = {row.task: row for row in mq.read_board(path.read_text()).tables[0].rows}
        assert now[name].meaning == "finished", cells
        said = [row.said["status"] for row in now.values() if row.meaning == "finished"]
        said.remove(now[name].said["status"])
        assert any(cells[0][1].strip() in one for one in said), (cells, said)


# Shapes of public boards: their columns and words, with ids of the same form.  Titles are left out.
PUBLIC: list[tuple[str, list[tuple[str, str]]]] = [
    ("ID|Task|Status|Notes", [("IB-001", "In Progress"), ("IB-002", "Done")]),
    ("ID|Task|Status", [("CODEX-07", "🔴"), ("CODEX-08", "🔴")]),
    ("ID|Task|Status|Depends on", [("WORKBENCH-01", "🔴")]),
    ("ID|Task|Status|Priority|Assignee|Notes", [("P1-01", "PENDING"), ("P1-02", "PENDING")]),
    ("ID|Task|Status|Acceptance", [("0.1.1", "☑"), ("0.1.2", "☑")]),
    ("ID|Task|Status", [("[task-06-05-01](../t.md)", "pending")]),
    ("ID|Task|Status|Notes", [("BL-001", "✅ Completed"), ("BL-002", "✅ Completed")]),
    ("ID|Task|Status", [("IMP-001", "READY"), ("IMP-002", "BLOCKED BY IMP-001")]),
    ("ID|Task|Status|Notes", [("[TFW-1](tasks/a/)", "✅ DONE"), ("[TFW-2](b)", "🟢 RF"),
                              ("TFW-3", "⬜ TODO"), ("[TFW-6](z)", "❄️ FROZEN")]),
    ("ID|Task|Status|Depends On", [("S003-T001", "DONE"), ("S003-T002", "DONE")]),
    ("ID|Task|Status", [("T010", "⬜"), ("T011", "⬜")]),
    ("#|Task|Status|Notes", [("1.1", "⚠️ Partial"), ("1.2", "✅ Done"), ("1.7", "⚠️ Partial")]),
    ("#|Task|Status|Notes", [("0.1", "COMPLETE"), ("0.2", "COMPLETE"), ("2.1", "NOT STARTED")]),
    ("#|Task|Status|Notes", [("1", "pending"), ("2", "pending")]),
    ("#|Task|Status", [("AWS-1a", "✓"), ("AWS-1b", "[ ]"), ("AWS-1e", "✓ (documented)")]),
    ("#|Task|Status|Notes", [("1", "✅ Done"), ("2", "⬜ TODO")]),
    ("#|Task|Status", [("1", "✅ Done"), ("2", "✅ Done")]),
    ("#|Task|Status", [("T0", "✓"), ("T2", "✓ (after one deviation)")]),
    ("#|Task|Status", [("1", "✅ Done"), ("2", "✅ Done"), ("12", "✅ Done")]),
    ("#|Task|Status|Notes", [("1", "✅ Done"), ("2", "✅ Done")]),
    ("#|Task|Status|Notes", [("1", "Complete"), ("2", "Complete")]),
    ("ID|Title|Status", [("P1-001", "✅ Complete (PR #44, #45)"), ("P1-002", "✅ Complete"),
                         ("P1-003", "✅ Implemented; suite verified green (2026-07-12)"),
                         ("P2-001", "✅ Implemented; professional review still required")]),
    ("ID|Title|Status|Severity", [("JW-ISS-10", "Resolved"), ("JW-ISS-9", "Resolved")]),
    ("ID|Title|Status|P", [("FTR-1", "in_progress")]),
    ("ID|Title|Status", [("DNI-390", "Done"), ("DNI-127", "Canceled")]),
    ("Lens|ID|Title|Status|Evidence", [("F-1", "CLOSED"), ("F-2", "CLOSED")]),
    ("ID|Title|Status|Phase|Dependency", [("SVC-ISS-0001", "approved")]),
    ("ID|Title|Status", [("ADR-001", "ACCEPTED"), ("ADR-003", "PROPOSED")]),
    ("list", [("T001", " "), ("T002", " "), ("T003", " ")]),
    ("list", [("#T001", " "), ("T002:", "x"), ("003", " ")]),
]  # fmt: skip
READ = {  # what a reader takes the words for; the others are neither open nor finished
    "open": {"PENDING", "pending", "READY", "⬜ TODO", "⬜", "[ ]", "NOT STARTED", " "},
    "finished": {"Done", "☑", "✅ Completed", "✅ DONE", "DONE", "✅ Done", "COMPLETE", "✓", "x",
                 "✓ (documented)", "Complete", "✅ Complete (PR #44, #45)", "✅ Complete", "CLOSED",
                 "✅ Implemented; suite verified green (2026-07-12)", "Resolved"},
}  # fmt: skip


def public(shape: tuple[str, list[tuple[str, str]]]) -> Made:
    """A board of a shape of a public one."""
    heads, known = shape
    of = {word: meaning for meaning, words in READ.items() for word in words}
    rows = {mq.plain(task).strip("#:"): ("", of.get(said, "unknown")) for task, said in known}
    if heads == "list":
        lines = [f"- [{said}] {task} Do {task}\n" for task, said in known]
        return Made("# Tasks\n\n## Phase 1\n\n" + "".join(lines), rows)
    columns = heads.split("|")
    text = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    for task, said in known:
        values = {"ID": task, "#": task, "Status": said, "Task": "do it", "Title": "do it"}
        text += "| " + " | ".join(values.get(column, "") for column in columns) + " |\n"
    return Made(text, rows)


@pytest.mark.parametrize("at", range(len(PUBLIC)))
async def test_of_a_public_board_nothing_is_handed_out_that_is_not_open(
    queue: mq.Queue, tmp_path: Path, at: int
) -> None:
    board, path = public(PUBLIC[at]), tmp_path / "TASKS.md"
    unknown = {meaning for _, meaning in board.rows.values()} == {"unknown"}
    if unknown and not any(said in board.text for said in ("in_", "🔴")):
        path.write_text(board.text)
        with pytest.raises(mq.Refused, match="its status words are"):
            await mq.sync_file(queue, path, "p")
        return
    assert [*await look_at(queue, path, board, "p")] == []


async def understood(count: int, folder: Path) -> None:
    """Print what was understood of generated and of public boards."""
    server = Server(str(BINARIES["valkey"]()))
    config = mq.Config(environ={}).set("redis.url", server.url, "here")
    rows: Counter[tuple[str, str, str]] = Counter()
    right = 0
    try:
        async with mq.Queue(config) as queue:
            for seed in range(count):
                board, project = made(seed), f"g{seed}"
                wrong = [*await look_at(queue, folder / f"{seed}.md", board, project)]
                right += not wrong
                tasks = await queue.tasks_of(project)
                for name, (language, meaning) in board.rows.items():
                    is_now = tasks[name]["status"] if name in tasks else "missing"
                    is_now = "pending" if is_now == "claimed" else is_now
                    by_hand = name in tasks and "blockedReason" in tasks[name]
                    waits = is_now == "blocked" and not by_hand
                    rows[language, meaning, "pending" if waits else is_now] += 1
            shapes = []
            for at, shape in enumerate(PUBLIC):
                path, project = folder / f"public{at}.md", f"w{at}"
                try:
                    shapes.append(not [*await look_at(queue, path, public(shape), project)])
                except mq.Refused as refusal:
                    shapes.append(False)
                    print(f"{shape[0]}: {refusal.message.partition('; ')[2]}")
    finally:
        server.close()
    print(f"\n| language | meaning | in the queue | rows of {count} boards |\n|---|---|---|---|")
    for (language, meaning, status), number in sorted(rows.items()):
        print(f"| {language} | {meaning} | {status} | {number} |")
    print(f"\n{right} of {count} generated boards and {sum(shapes)} of {len(shapes)} public shapes"
          " are synced right")  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        import os

        os.environ["XDG_STATE_HOME"] = name
        asyncio.run(understood(int(sys.argv[1]) if len(sys.argv) > 1 else BOARDS, Path(name)))
