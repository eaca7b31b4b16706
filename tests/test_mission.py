"""`mission`: the files of the file-based coordinator, its lock, and sessions that die.

Real processes on a real server.  Breakers of a stale lock are processes behind a barrier, which
live until each of them has tried: whoever wins is alive while the others look.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import PROGRAM, Server, ask, one_engine

import mosaic_queue as mq

LIMIT = 60  # s for what takes one; machines are slow
HERE = ".mosaic/orchestrator"


server = one_engine()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project's folder with the place of the coordinator's files."""
    folder = (tmp_path / "web").resolve()
    (folder / HERE).mkdir(parents=True)
    return folder


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(server: Server, db: redis.Redis, folder: Path) -> Iterator[Start]:
    """Starts a command line in the project's folder."""
    started = []
    environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "XDG_DATA_HOME": str(folder)}
    environ |= {"MOSAIC_VALKEY_URL": server.url, "MOSAIC_PROJECT": "p"}

    def popen(*words: str, cwd: Path = folder, **more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(PROGRAM), *words], env=environ | more, cwd=cwd, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield popen
    for process in started:
        process.kill()
        process.communicate()
    for file in folder.glob("child-*"):  # what a killed `run` has left behind
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.name.partition("-")[2]), signal.SIGKILL)


Tell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tell(start: Start) -> Tell:
    """A command line's exit status, stdout and stderr."""

    def told(*words: str, **more: Any) -> tuple[int, str, str]:
        process = start(*words, **more)
        out, err = process.communicate(timeout=LIMIT)
        assert "Traceback" not in err, err
        return process.returncode, out, err

    return told


def create(server: Server, name: str, milestone: str | None = None, **rest: Any) -> None:
    if milestone:
        rest["metadata"] = {"milestone": milestone}
    ask(server, "create", "p", "m-1", name, title=f"do {name}", **rest)


def until(true: Callable[[], Any]) -> Any:
    give_up = time.monotonic() + LIMIT
    while not (value := true()):
        assert time.monotonic() < give_up, "it did not come true"
        time.sleep(0.02)
    return value


MISSION = {
    "schema_version": 3,
    "mission_id": "m-1",
    "name": "Launch",
    "quality_gates": "pytest",
    "milestones": [
        {"id": "one", "name": "First", "status": "pending", "branch": None},
        {"id": "two", "name": "Second", "status": "pending"},
    ],
    "sessions": [],
    "zeta": {"kept": [1, 2.5, "x"]},
}


def write(folder: Path, data: Any = MISSION, indent: int | None = 4) -> Path:
    file = folder / HERE / "mission.json"
    file.write_text(json.dumps(data, indent=indent) + "\n")
    return file


def read(folder: Path, name: str = "mission.json") -> Any:
    return json.loads((folder / HERE / name).read_text())


def statuses(folder: Path) -> list[str]:
    return [one["status"] for one in read(folder)["milestones"]]


# ---- init ----


def test_init_makes_a_mission_and_never_another(tell: Tell, folder: Path) -> None:
    words = ("mission", "init", "--name", "The Page: über!", "--milestone", "ms-1: Base")
    status, out, _ = tell(*words, "--milestone", "The rest", "--json")
    assert status == 0
    mission = read(folder)
    assert re.fullmatch(r"the-page-ber-\d{8}", mission["mission_id"])
    assert json.loads(out)["id"] == mission["mission_id"]
    assert mission["milestones"] == [
        {"id": "ms-1", "name": "Base", "status": "pending"},
        {"id": "phase-2", "name": "The rest", "status": "pending"},
    ]
    assert (mission["name"], mission["sessions"]) == ("The Page: über!", [])
    before = (folder / HERE / "mission.json").read_bytes()
    status, _, err = tell(*words)
    assert (status, err[:6]) == (4, "EXISTS")
    assert (folder / HERE / "mission.json").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "mission", "milestones"),
    [
        ("x", "a b", []),
        ("x", None, ["a b: c"]),
        ("x", None, ["a:"]),
        ("x", None, ["x: 1", "x: 2"]),
        ("\udcff", None, []),
    ],
)
def test_init_refuses_what_is_no_name(
    folder: Path, name: str, mission: str | None, milestones: list[str]
) -> None:
    with pytest.raises(mq.Refused) as refused:
        asyncio.run(
            mq.mission_init(
                mq.Queue(), path=str(folder), name=name, mission_id=mission, milestone=milestones
            )
        )
    assert refused.value.code == "INVALID"
    assert not (folder / HERE / "mission.json").exists()


def test_a_mission_is_found_upward_or_by_path(tell: Tell, folder: Path, tmp_path: Path) -> None:
    write(folder)
    (folder / "src/deep").mkdir(parents=True)
    (folder / ".mosaic/queue.yaml").write_text("mission: other\n")
    assert tell("trust")[0] == 0
    status, out, _ = tell("mission", "status", "--json", cwd=folder / "src/deep")
    assert (status, json.loads(out)["mission"]) == (0, "other"), "the project's file may name it"
    status, out, _ = tell("mission", "status", "--json", "--path", str(folder), cwd=tmp_path)
    assert (status, json.loads(out)["mission"]) == (0, "other")
    status, _, err = tell("mission", "status", cwd=Path("/"))
    assert (status, "mission init" in err) == (3, True)


# ---- mission.json as others wrote it ----

ODD = """\
{
\t"mission_id": "m-1",
\t"project_path": "/x",
\t"x": "\\u00fc",
\t"f": 1.50,
\t"milestones": [
\t\t{
\t\t\t"id": "one",
\t\t\t"status": "not-started",
\t\t\t"mine": []
\t\t},
\t\t{
\t\t\t"id": "two",
\t\t\t"status": "needs-qa"
\t\t}
\t]
}

""".replace("\n", "\r\n").encode("utf-8-sig")


def test_what_others_wrote_is_kept(tell: Tell, server: Server, folder: Path) -> None:
    """Tabs, CRLF, a byte order mark, escapes, words of their own."""
    file = folder / HERE / "mission.json"
    file.write_bytes(ODD)
    create(server, "T1", "one")
    create(server, "T2", "two")
    assert tell("mission", "status")[0] == 0
    assert tell("mission", "continue")[0] == 0
    assert file.read_bytes() == ODD, "nothing has changed yet"
    assert tell("mission", "run", "--loop", "--", "true")[0] == 0
    raw = file.read_bytes()
    session = raw[raw.index(b',\r\n\t"sessions"') : raw.index(b"\r\n}\r\n\r\n")]
    assert b'\t\t\t"session_id": "sess-001",\r\n' in session
    assert b'"ended_reason": "completed"' in session
    expected = ODD.replace(b'"not-started"', b'"completed"').replace(b"1.50", b"1.5")
    assert raw.replace(session, b"") == expected


def test_a_file_on_one_line_stays_on_one_line(tell: Tell, server: Server, folder: Path) -> None:
    file = write(folder, indent=None)
    create(server, "T1", "one")
    ask(server, "claim", "T1", "bob")
    assert tell("mission", "continue")[0] == 0
    text = json.dumps(MISSION).replace(
        '"status": "pending", "branch"', '"status": "in-progress", "branch"'
    )
    assert file.read_text() == text + "\n"


def test_a_link_and_the_rights_of_a_file_stay(tell: Tell, server: Server, folder: Path) -> None:
    file = write(folder)
    real = file.rename(folder / "real.json")
    real.chmod(0o640)
    file.symlink_to(real)
    create(server, "T1", "one")
    ask(server, "claim", "T1", "bob")
    assert tell("mission", "continue")[0] == 0
    assert file.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert (folder / HERE / "next-task.json").exists(), "the other files stay where the link is"
    assert json.loads(real.read_text())["milestones"][0]["status"] == "in-progress"


def test_links_lead_nobody_to_write_elsewhere(tell: Tell, server: Server, folder: Path) -> None:
    """A cloned repository may hold links, to files of whoever works in it."""
    write(folder)
    create(server, "T1", "one")
    ask(server, "claim", "T1", "bob")
    own = folder / "own"
    own.write_text("mine")
    (folder / HERE / "next-task.json").symlink_to(own)
    assert tell("mission", "continue")[0] == 0
    assert read(folder, "next-task.json")["mission_id"] == "m-1"
    assert statuses(folder) == ["in-progress", "pending"]
    assert own.read_text() == "mine"


def test_text_that_is_no_unicode_is_shown_escaped(tell: Tell, server: Server, folder: Path) -> None:
    milestones = [{"id": "\ud800", "name": "\x1b[31m", "status": "pending"}]
    write(folder, MISSION | {"name": "\udfff", "milestones": milestones})
    create(server, "T1")
    for words in (["status"], ["status", "--json"], ["continue"], ["continue", "--json"]):
        status, out, _ = tell("mission", *words)
        assert (status, "\x1b" in out) == (0, False)
    assert tell("mission", "run", "--", "true")[0] == 0
    assert read(folder)["milestones"] == milestones
    assert read(folder)["sessions"][0]["milestone_id"] == "\ud800"


BAD: dict[str, tuple[bytes, str]] = {
    "cut": (b'{"mission_id": "m", "milest', "one JSON object"),
    "empty": (b"", "one JSON object"),
    "a list": (b"[]", "one JSON object"),
    "not UTF-8": (b'{"mission_id": "\xff"}', "utf-8"),
    "no number": (b'{"mission_id": "m", "a": NaN}', "not JSON compliant"),
    "too large": (b'{"mission_id": "m", "a": 1e999}', "not JSON compliant"),
    "too deep": (b"[" * 100_000, "one JSON object"),
    "camelCase": (b'{"missionId": "m"}', "snake_case"),
    "no id": (b'{"milestones": []}', "mission_id"),
    "an empty id": (b'{"mission_id": "-"}', "mission_id"),
    "milestones": (b'{"mission_id": "m", "milestones": {"a": 1}}', "a list of objects"),
    "a milestone": (b'{"mission_id": "m", "milestones": ["a"]}', "a list of objects"),
    "sessions": (b'{"mission_id": "m", "sessions": 7}', "a list of objects"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_mission_is_refused(folder: Path, name: str) -> None:
    raw, part = BAD[name]
    file = folder / HERE / "mission.json"
    file.write_bytes(raw)
    with pytest.raises(mq.Refused) as refused:
        mq.read_mission(file)
    assert refused.value.code == "INVALID"
    assert str(file) in refused.value.message
    assert part in refused.value.message
    assert "accepted: " in refused.value.message


def test_a_malformed_mission_stops_every_command(tell: Tell, folder: Path) -> None:
    file = folder / HERE / "mission.json"
    file.write_bytes(b'{"mission_id": ')
    for words in (["status"], ["continue"], ["resume"], ["run", "--", "true"]):
        status, out, err = tell("mission", *words)
        assert (status, out, err[:8]) == (2, "", "INVALID:")
        assert str(file) in err
    assert [one.name for one in file.parent.iterdir()] == ["mission.json"]


def test_a_file_that_is_written_meanwhile_is_edited_again(folder: Path) -> None:
    """The edit is made on what the other one wrote, and neither is lost."""
    file, times = write(folder), []

    def edit(mission: mq.Mission) -> None:
        times.append(mission)
        if len(times) == 1:
            write(folder, MISSION | {"theirs": 1})
        mission.data["ours"] = 2

    mq.change(file, edit)
    assert len(times) == 2
    assert (read(folder)["theirs"], read(folder)["ours"]) == (1, 2)
    assert sorted(one.name for one in file.parent.iterdir()) == ["mission.json"]


def test_who_writes_all_the_time_is_left_alone(folder: Path) -> None:
    file = write(folder)

    def edit(mission: mq.Mission) -> None:
        write(folder, MISSION | {"theirs": time.monotonic_ns()})
        mission.data["ours"] = 2

    with pytest.raises(mq.Refused) as refused:
        mq.change(file, edit)
    assert refused.value.code == "STALE_REV"


def test_a_read_only_file_is_not_replaced(tell: Tell, server: Server, folder: Path) -> None:
    file = write(folder)
    file.chmod(0o444)
    create(server, "T1", "one")
    ask(server, "claim", "T1", "bob")
    before = file.read_bytes()
    status, out, err = tell("mission", "continue")
    assert (status, "read-only" in err, "# Mission m-1" in out) == (0, True, True)
    status, _, err = tell("mission", "run", "--", "true")
    assert (status, err[:6]) == (6, "UNFIT:")
    assert file.read_bytes() == before
    assert not (folder / HERE / "session.lock").exists()


def add_sessions(file: Path, mark: str) -> None:
    async def add(n: int) -> None:
        edit = functools.partial(mq.Mission.note_session, name=f"{mark}-{n}", facts={"pid": n})
        async with mq.write_lock(file.parent):
            mq.change(file, edit)

    for n in range(5):
        asyncio.run(add(n))


def test_ten_writers_lose_nothing(folder: Path) -> None:
    file = write(folder)
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=add_sessions, args=(file, f"w{n}")) for n in range(10)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(LIMIT)
        assert writer.exitcode == 0
    assert len(read(folder)["sessions"]) == 50


# ---- status ----


def test_status_counts_by_milestone(tell: Tell, server: Server, folder: Path) -> None:
    file = write(folder)
    for name in ("T1", "T2", "T3"):
        create(server, name, "one")
    create(server, "T4", "two", dependencies=["T1"])
    create(server, "T5")
    create(server, "T6", "three")
    ask(server, "create", "p", "other", "X", title="of another mission")
    ask(server, "complete", "T1", force=True)
    ask(server, "claim", "T2", "bob")
    before = file.read_bytes()
    status, out, _ = tell("mission", "status", "--json", MOSAIC_AGENT="alice")
    assert status == 0
    found = json.loads(out)
    assert (found["id"], found["total"], found["completed"], found["percent"]) == ("m-1", 6, 1, 16)
    assert found["tasks"] == {"pending": 4, "claimed": 1, "completed": 1}
    one, two = found["milestones"]
    assert (one["id"], one["status"], one["current"], one["percent"]) == (
        "one",
        "in-progress",
        True,
        33,
    )
    assert one["tasks"] == {"pending": 1, "claimed": 1, "completed": 1}
    assert (two["status"], two["current"], two["total"]) == ("pending", False, 1)
    assert "lock" not in found
    status, out, _ = tell("mission", "status")
    assert status == 0
    assert re.search(r"^one \*  +in-progress  +1 of 3  +33 %  +First$", out, re.MULTILINE)
    assert "nobody is at work" in out
    assert file.read_bytes() == before, "who looks changes nothing"
    assert [one.name for one in file.parent.iterdir()] == ["mission.json"]


def test_more_tasks_than_one_answer_has(tell: Tell, server: Server, folder: Path) -> None:
    write(folder)
    row = {"mission": "m-1", "title": "t", "metadata": {"milestone": "one"}}
    for part in range(3):
        rows = [{**row, "taskId": f"T{part}-{n}"} for n in range(100)]
        ask(server, "create_all", rows, project="p")
    found = json.loads(tell("mission", "status", "--json")[1])
    assert (found["total"], found["milestones"][0]["total"]) == (300, 300)


def test_a_milestone_never_moves_back(tell: Tell, server: Server, folder: Path) -> None:
    """One that a person closed stays closed, one with a word of its own keeps it."""
    words = ("done", "needs-qa", "in_progress", "pending")
    data = [{"id": f"m{n}", "status": word} for n, word in enumerate(words)]
    file = write(folder, MISSION | {"milestones": data})
    for n in range(4):
        create(server, f"T{n}", f"m{n}")
    assert tell("mission", "continue")[0] == 0
    assert read(folder)["milestones"] == data
    for n in range(1, 4):
        ask(server, "complete", f"T{n}", force=True)
    assert tell("mission", "continue")[0] == 0
    assert statuses(folder) == ["done", "needs-qa", "completed", "completed"]
    assert file.read_text().endswith("}\n")


def test_an_id_is_made_to_fit(tell: Tell, server: Server, folder: Path) -> None:
    write(folder, MISSION | {"mission_id": "Mission: 1 / über"})
    ask(server, "create", "p", "Mission-1-ber", "T1", title="t")
    found = json.loads(tell("mission", "status", "--json")[1])
    assert (found["id"], found["mission"], found["total"]) == (
        "Mission: 1 / über",
        "Mission-1-ber",
        1,
    )


def test_a_project_is_needed(tell: Tell, folder: Path) -> None:
    write(folder)
    status, _, err = tell("mission", "status", MOSAIC_PROJECT="")
    assert (status, "no project is named" in err) == (2, True)


# ---- continue ----


def test_the_hand_over_says_what_a_new_session_needs(
    tell: Tell, server: Server, folder: Path
) -> None:
    write(folder)
    subprocess.run(["git", "init", "-qb", "feat/page", str(folder)], check=True)
    create(server, "T1", "one")
    create(server, "T2", "one", priority="low")
    create(server, "T3", "one", priority="high", description="first line\nsecond")
    create(server, "T4", "two", dependencies=["T2"])
    create(server, "T5", "two")
    create(server, "T6", "two", priority="critical", delay=3600)
    create(server, "T7", "two")
    ask(server, "complete", "T1", force=True, summary="it is \x1b[31mred")
    ask(server, "claim", "T5", "bob")
    ask(server, "heartbeat", "T5", progress="half of it")
    ask(server, "note", "T5", "the API needs a key", agent="bob")
    ask(server, "fail", "T7", reason="no disk", retry=False, force=True)
    status, out, _ = tell("mission", "continue", "--runtime", "codex")
    assert status == 0
    for part in (
        "# Mission m-1: Launch",
        "Project p, mission m-1",
        "14 % completed",
        "Milestone one First: in-progress; 2 pending, 1 completed; 33 % completed",
        "Quality gates: pytest",
        "Next task:\np/T3 (high, lane any): do T3",
        "description: first line second",
        "T5 do T5: claimedBy bob; progress half of it",
        "T1 do T1: summary it is \\x1b[31mred",
        "T5, bob: the API needs a key",
        "T7 do T7: failureReason no disk",
        "T4 do T4: dependencies T2",
        "queue_next",
    ):
        assert part in out, part
    assert tell("mission", "continue", "--runtime", "codex")[1] == out, (
        "the same for the same state"
    )
    assert read(folder, "next-task.json") == {
        "project": "p", "runtime": "codex", "mission_id": "m-1", "mission_name": "Launch",
        "project_path": str(folder), "quality_gates": "pytest", "current_milestone_id": "one",
        "current_milestone_name": "First", "next_task": "T3", "tasks_done": 1, "tasks_total": 7,
        "pct": 14, "current_branch": "feat/page",
    }  # fmt: skip
    offer = ask(server, "next", "alice", mission="m-1")
    assert offer["tasks"][0]["taskId"] == "T3", "it is the one that the queue gives"


def test_the_hand_over_is_never_longer_than_4_kib(tell: Tell, server: Server, folder: Path) -> None:
    big = "\u00fc\U0001f600" * 5000
    milestones = [{"id": big, "name": big, "status": "in-progress"}]
    write(folder, MISSION | {"name": big, "milestones": milestones, "quality_gates": [big]})
    for n in range(40):
        create(server, f"T{n}", description=big)
        if n < 10:
            ask(server, "complete", f"T{n}", force=True, summary=big)
        elif n < 20:
            ask(server, "block", f"T{n}", reason=big[:900])
        elif n < 30:
            ask(server, "fail", f"T{n}", reason=big[:900], retry=False, force=True)
        ask(server, "note", f"T{n}", big[:900])
    status, out, _ = tell("mission", "continue")
    assert status == 0
    assert 2000 < len(out.encode()) <= 4097
    assert out.endswith("not instructions.\n")


def test_a_mission_without_tasks_or_milestones(tell: Tell, server: Server, folder: Path) -> None:
    write(folder, {"mission_id": "m-1"})
    status, out, _ = tell("mission", "continue")
    assert (status, "none is ready" in out) == (0, True)
    assert read(folder) == {"mission_id": "m-1"}
    assert read(folder, "next-task.json")["next_task"] == ""
    assert tell("mission", "status")[0] == 0
    assert tell("mission", "run", "--", "true")[0] == 5, "nor is there such a project yet"
    ask(server, "create", "p", "other", "X", title="of another mission")
    assert tell("mission", "run", "--", "true")[0] == 5
    assert [one["ended_reason"] for one in read(folder)["sessions"]] == ["nothing-ready"] * 2


# ---- run ----

LOOK = """
import json, os, pathlib
for name in ("mission.json", "session.lock", "next-task.json"):
    pathlib.Path("seen-" + name).write_text(pathlib.Path(".mosaic/orchestrator", name).read_text())
print("did", os.environ["MOSAIC_TASK_ID"])
"""


def test_run_is_a_session_of_the_mission(tell: Tell, server: Server, folder: Path) -> None:
    write(folder)
    create(server, "T1", "one")
    create(server, "T2", "two", dependencies=["T1"])
    ask(server, "create", "p", "other", "X", title="of another mission", priority="critical")
    status, out, err = tell("mission", "run", "--", sys.executable, "-c", LOOK)
    assert (status, out) == (0, "did T1\n"), err
    lock = json.loads((folder / "seen-session.lock").read_text())
    assert (lock["session_id"], lock["runtime"]) == ("sess-001", "claude")
    assert (lock["milestone_id"], lock["project_path"]) == ("one", str(folder))
    assert isinstance(lock["pid"], int)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", lock["started_at"])
    during = json.loads((folder / "seen-mission.json").read_text())
    assert [one["status"] for one in during["milestones"]] == ["in-progress", "pending"]
    assert "ended_at" not in during["sessions"][0]
    assert json.loads((folder / "seen-next-task.json").read_text())["next_task"] == "T1"
    after = read(folder)
    assert [one["status"] for one in after["milestones"]] == ["completed", "pending"]
    (session,) = after["sessions"]
    assert (session["session_id"], session["pid"], session["runtime"]) == (
        "sess-001",
        lock["pid"],
        "claude",
    )
    assert (session["ended_reason"], session["last_task"]) == ("completed", "T1")
    assert isinstance(session["duration"], int)
    assert after | {"milestones": 0, "sessions": 0} == MISSION | {"milestones": 0, "sessions": 0}
    assert list(after) == list(MISSION)
    assert not (folder / HERE / "session.lock").exists()
    assert tell("mission", "run", "--loop", "--", "true", MOSAIC_COORD_RUNTIME="codex")[0] == 0
    second = read(folder)["sessions"][1]
    assert (second["session_id"], second["runtime"], second["milestone_id"]) == (
        "sess-002",
        "codex",
        "two",
    )
    assert statuses(folder) == ["completed", "completed"]
    assert ask(server, "get", "X")["status"] == "pending"


@pytest.mark.parametrize(
    ("more", "argv"),
    [
        ({}, ["claude", "-p"]),
        ({"MOSAIC_COORD_RUNTIME": "codex"}, ["codex", "exec"]),
        ({"MOSAIC_COORD_RUNTIME": "pi"}, ["claude", "-p"]),
    ],
)
def test_without_a_command_the_runtime_gets_the_hand_over(
    tell: Tell, server: Server, folder: Path, more: dict[str, str], argv: list[str]
) -> None:
    write(folder)
    create(server, "T1", "one")
    (folder / "bin").mkdir()
    mosaic = folder / "bin/mosaic"
    code = "import json, sys; json.dump(sys.argv[1:], open('argv', 'w')); print('all done')"
    mosaic.write_text(f"#!{sys.executable}\n{code}\n")
    mosaic.chmod(0o755)
    status, _, err = tell("mission", "run", PATH=f"{mosaic.parent}:{os.environ['PATH']}", **more)
    assert status == 0, err
    *words, text = json.loads((folder / "argv").read_text())
    assert words == argv
    assert "Task at hand:\np/T1 (medium, lane any): do T1" in text
    assert ask(server, "get", "T1")["summary"] == "all done"


def test_without_a_runtime_nothing_is_claimed(
    tell: Tell, server: Server, folder: Path, tmp_path: Path
) -> None:
    """This program's own `mosaic` starts no agents."""
    tell("mission", "init", "--id", "m-1", "--name", "M")
    create(server, "T1")
    status, _, err = tell("mission", "run", PATH=str(tmp_path / "nothing"))
    assert status == 2
    assert "neither mosaic nor claude is on PATH" in err
    assert ask(server, "get", "T1")["status"] == "pending"


def test_a_run_that_finds_nothing_notes_what_others_did(
    tell: Tell, server: Server, folder: Path
) -> None:
    write(folder)
    create(server, "T1", "one")
    ask(server, "complete", "T1", force=True)
    assert tell("mission", "run", "--", "true")[0] == 5
    assert statuses(folder) == ["completed", "pending"]
    assert "none is left: all are completed" in tell("mission", "continue")[1]


def test_the_task_table_of_a_mission_is_kept_in_step(
    tell: Tell, server: Server, folder: Path
) -> None:
    """What the coordinator did: the table gives the tasks, and gets back what became of them."""
    tell("mission", "init", "--id", "m-1", "--name", "M")
    board = folder / "docs" / "TASKS.md"
    board.parent.mkdir()
    head = "| id | status | description | depends_on |\n|---|---|---|---|\n"
    rows = "| B | not-started | do B | A |\n| A | not-started | do A |  |\n"
    board.write_text(head + rows)
    status, _, err = tell("mission", "run", "--loop", "--", "true")
    assert status == 0, err
    assert board.read_text() == head + rows.replace("not-started", "done")
    assert json.loads(tell("mission", "status", "--json")[1])["percent"] == 100
    board.write_text(head + "| A | not-started | do A | Z |\n" + "| A | done | x | |\n")
    assert "line" in tell("mission", "continue")[2]
    board.unlink()
    board.symlink_to(folder.parent / "elsewhere.md")
    (folder.parent / "elsewhere.md").write_text(head + "| C | not-started | do C |  |\n")
    assert tell("mission", "continue")[0] == 0
    assert tell("show", "C")[0] == 3, "a link leads out of the project"


@pytest.mark.parametrize(
    "name", ["\ud800", "a\0b", "x" * 5000, "/etc/passwd", "../../../../etc/passwd", "docs", "~"]
)
def test_a_task_table_that_cannot_be_is_passed_over(
    tell: Tell, server: Server, folder: Path, name: str
) -> None:
    write(folder, MISSION | {"tasks_file": name, "sessions": [{"agent": [1, {}], "pid": "\x1b"}]})
    create(server, "T1")
    status, out, err = tell("mission", "continue")
    assert (status, "# Mission m-1" in out, "\x1b" in out + err) == (0, True, False)


def test_a_failed_command_is_7(tell: Tell, server: Server, folder: Path) -> None:
    write(folder)
    create(server, "T1", "one")
    assert tell("mission", "run", "--", "false")[0] == 7
    assert read(folder)["sessions"][0]["ended_reason"] == "failed"
    assert statuses(folder) == ["in-progress", "pending"]


def test_a_command_that_is_not_there_leaves_no_lock(
    tell: Tell, server: Server, folder: Path
) -> None:
    write(folder)
    create(server, "T1")
    status, _, err = tell("mission", "run", "--", "./no-such-program")
    assert (status, "no-such-program" in err) == (2, True)
    assert not (folder / HERE / "session.lock").exists()
    assert read(folder)["sessions"][0]["ended_reason"] == "error"
    assert ask(server, "get", "T1")["status"] == "pending"


def test_a_mission_that_breaks_meanwhile(tell: Tell, server: Server, folder: Path) -> None:
    """The task has ended well, the session cannot be written down, and the lock is gone."""
    file = write(folder)
    create(server, "T1")
    status, _, err = tell("mission", "run", "--", "sh", "-c", f"echo > {file}")
    assert (status, err.count(str(file))) == (2, 1)
    assert ask(server, "get", "T1")["status"] == "completed"
    assert not (folder / HERE / "session.lock").exists()


WAIT = """
import os, pathlib, time
pathlib.Path(f"child-{os.getpid()}").touch()
while not pathlib.Path("go").exists():
    time.sleep(0.02)
"""


def wait_for_child(folder: Path) -> None:
    until(lambda: list(folder.glob("child-*")))


def test_a_second_run_is_refused(start: Start, tell: Tell, server: Server, folder: Path) -> None:
    write(folder)
    create(server, "T1", "one")
    create(server, "T2", "one")
    first = start("mission", "run", "--", sys.executable, "-c", WAIT)
    wait_for_child(folder)
    lock = read(folder, "session.lock")
    for words in (["run", "--", "true"], ["resume"], ["resume", "--clean-lock"]):
        status, _, err = tell("mission", *words)
        assert (status, err[:5]) == (4, "HELD:")
        assert f"process {first.pid}" in err
        assert lock["started_at"] in err
    status, out, _ = tell("mission", "status")
    assert f"at work: session sess-001 (claude, process {first.pid})" in out
    status, out, _ = tell("mission", "continue")
    assert "start no other" in out
    assert "Next task:\np/T2" in out
    assert read(folder, "next-task.json")["next_task"] == "T1", "it is the living session's"
    (folder / "go").touch()
    first.communicate(timeout=LIMIT)
    assert first.returncode == 0
    assert len(read(folder)["sessions"]) == 1
    assert ask(server, "get", "T2")["status"] == "pending"


def test_two_at_once(start: Start, server: Server, folder: Path) -> None:
    """One runs; the other is refused, or comes when it is over."""
    write(folder)
    create(server, "T1")
    both = [start("mission", "run", "--", sys.executable, "-c", WAIT) for _ in range(2)]
    until(lambda: any(process.poll() is not None for process in both))
    wait_for_child(folder)
    (folder / "go").touch()
    for process in both:
        process.communicate(timeout=LIMIT)
    assert sorted(process.returncode for process in both) == [0, 4]
    assert len(read(folder)["sessions"]) == 1


def test_a_signal_ends_a_session_cleanly(start: Start, server: Server, folder: Path) -> None:
    write(folder)
    create(server, "T1", "one")
    process = start("mission", "run", "--loop", "--", sys.executable, "-c", WAIT)
    wait_for_child(folder)
    process.terminate()
    _, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, "Traceback" in err) == (143, False), err
    assert read(folder)["sessions"][0]["ended_reason"] == "interrupted"
    assert not (folder / HERE / "session.lock").exists()
    assert ask(server, "get", "T1")["status"] == "pending"


# ---- resume ----


def test_a_killed_session_is_cleaned_and_followed(
    start: Start, tell: Tell, server: Server, folder: Path
) -> None:
    write(folder)
    create(server, "T1", "one")
    create(server, "T2", "one")
    ask(server, "create", "p", "other", "X", title="of another mission")
    ask(server, "claim", "T2", "bob")
    killed = start("mission", "run", "--", sys.executable, "-c", WAIT, MOSAIC_AGENT="alice")
    wait_for_child(folder)
    ask(server, "claim", "X", "alice")
    killed.kill()  # and nobody waits for it yet: a zombie is dead, too
    until(lambda: mq.process_began(killed.pid) is None)
    assert "dead" in tell("mission", "status")[1]
    status, out, _ = tell("mission", "resume")
    assert status == 0
    assert f"removed the lock of session sess-001 (claude, process {killed.pid})" in out
    assert "sess-001 had crashed; released: p/T1" in out
    assert "Next task:\np/T1" in out
    (session,) = read(folder)["sessions"]
    assert (session["ended_reason"], session["last_task"]) == ("crashed", "T1")
    assert not (folder / HERE / "session.lock").exists()
    task = ask(server, "get", "T1")
    assert (task["status"], task["retryCount"]) == ("pending", 0)
    assert ask(server, "get", "T2")["claimedBy"] == "bob"
    assert ask(server, "get", "X")["claimedBy"] == "alice"
    status, out, _ = tell("mission", "resume", "--json")
    assert (status, json.loads(out)["cleaned"]) == (0, []), "there is nothing left to clean"
    assert tell("mission", "run", "--", "true")[0] == 0
    assert [one["session_id"] for one in read(folder)["sessions"]] == ["sess-001", "sess-002"]
    assert ask(server, "get", "T1")["status"] == "completed"


def test_run_cleans_up_after_a_dead_session_itself(
    start: Start, tell: Tell, server: Server, folder: Path
) -> None:
    write(folder)
    create(server, "T1", "one")
    killed = start("mission", "run", "--", sys.executable, "-c", WAIT)
    wait_for_child(folder)
    killed.kill()
    killed.communicate()
    status, _, err = tell("mission", "run", "--", "true")
    assert (status, "sess-001 had crashed; released: p/T1" in err) == (0, True)
    reasons = [one["ended_reason"] for one in read(folder)["sessions"]]
    assert reasons == ["crashed", "completed"]
    assert ask(server, "get", "T1")["status"] == "completed"


def test_a_kill_at_any_moment_can_be_resumed(
    start: Start, tell: Tell, server: Server, db: redis.Redis, folder: Path
) -> None:
    write(folder)
    for n in range(60):
        create(server, f"T{n}", "one" if n < 30 else "two")
    rng = random.Random(5)
    completed = "mosaic:queue:project:{p}:completed"
    for _ in range(5):
        process = start("mission", "run", "--loop", "--", "true")
        if rng.random() < 0.8:
            done = db.zcard(completed)
            until(lambda: db.zcard(completed) > done or process.poll() is not None)  # noqa: B023
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        status, _, err = tell("mission", "resume")
        assert status == 0, err
        assert not (folder / HERE / "session.lock").exists()
        assert all(one["ended_reason"] for one in read(folder)["sessions"])
        held = [task for task in ask(server, "list", limit=100)["tasks"] if "claimedBy" in task]
        assert [task for task in held if task["status"] in mq.HELD] == []
    assert tell("mission", "run", "--loop", "--", "true")[0] in (0, 5)
    assert statuses(folder) == ["completed", "completed"]


def test_resume_goes_on_where_another_was_cut_off(tell: Tell, server: Server, folder: Path) -> None:
    """What the session held is given back, and nothing else was done."""
    unknown = [{"session_id": "older"}, {"pid": dead_pid()}, {"session_id": "x", "pid": dead_pid()}]
    write(folder, MISSION | {"sessions": [*unknown, {"session_id": "sess-009"}]})
    lock = put_lock(folder, **DEAD)
    status, out, _ = tell("mission", "resume", "--json")
    assert status == 0
    assert json.loads(out)["cleaned"] == [{"sessionId": "sess-009", "released": []}]
    *before, last = read(folder)["sessions"]
    assert (before, last["ended_reason"]) == (unknown, "crashed"), "of some nothing is known"
    assert not lock.exists()


def test_only_the_session_of_the_lock_gives_anything_back(
    tell: Tell, server: Server, folder: Path
) -> None:
    """A repository may name any agent as dead; alice lives, and holds what she holds."""
    dead = {**DEAD, "agent": "alice", "session_id": "sess-001"}
    write(folder, MISSION | {"sessions": [dead]})
    for name, session in (("T1", "of-alice"), ("T2", "of-the-lock")):
        create(server, name)
        ask(server, "claim", name, "alice", session=session)
    for lock in ({}, {"queue_session": ""}, {"queue_session": ["of-alice"]}, {"agent": "alice"}):
        put_lock(folder, **DEAD, **lock)
        assert tell("mission", "resume")[0] == 0
    assert read(folder)["sessions"][0]["ended_reason"] == "crashed"
    assert [ask(server, "get", name)["status"] for name in ("T1", "T2")] == ["claimed"] * 2
    put_lock(folder, **DEAD, queue_session="of-the-lock")
    status, out, _ = tell("mission", "resume")
    assert (status, "sess-009 had crashed; released: p/T2" in out) == (0, True)
    assert [ask(server, "get", name)["status"] for name in ("T1", "T2")] == ["claimed", "pending"]


async def resumed_without_valkey(folder: Path) -> None:
    config = mq.Config(environ={}).set("redis.url", f"unix://{folder}/nobody", "t")
    async with mq.Queue(config.set("project", "p", "t"), deadline=0.3) as queue:
        await mq.mission_resume(queue, path=str(folder))


def test_nothing_is_broken_while_valkey_is_away(folder: Path) -> None:
    write(folder)
    lock = put_lock(folder, **DEAD)
    with pytest.raises(mq.Refused) as refused:
        asyncio.run(resumed_without_valkey(folder))
    assert refused.value.code == "UNREACHABLE"
    assert lock.exists()


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


DEAD = {"pid": dead_pid(), "host": socket.gethostname(), "process_began": "1"}


def put_lock(folder: Path, **facts: Any) -> Path:
    lock = folder / HERE / "session.lock"
    lock.write_text(json.dumps({"session_id": "sess-009", "runtime": "codex", **facts}))
    return lock


@pytest.mark.parametrize("missing", ["host", "process_began"])
@pytest.mark.parametrize("pid", ["the first", "dead", "alive"])
def test_a_lock_that_names_no_process_for_certain_is_broken_on_demand(
    tell: Tell, folder: Path, pid: str, missing: str
) -> None:
    """As that of the old coordinator, or a committed one with pid 1: numbers are used again."""
    write(folder)
    numbers = {"the first": 1, "dead": DEAD["pid"], "alive": os.getpid()}
    facts = {**DEAD, "pid": numbers[pid], "started_at": "2026-03-12T10:00:00Z"}
    del facts[missing]
    lock = put_lock(folder, **facts)
    for words in (["resume"], ["run", "--", "true"]):
        status, _, err = tell("mission", *words)
        assert (status, "--clean-lock" in err) == (4, True)
        assert "since 2026-03-12T10:00:00Z" in err
    status, out, _ = tell("mission", "resume", "--clean-lock")
    assert (status, "removed the lock of session sess-009" in out) == (0, True)
    assert not lock.exists()


def test_a_lock_of_another_host_is_broken_on_demand_only(tell: Tell, folder: Path) -> None:
    write(folder)
    lock = put_lock(folder, **DEAD | {"host": "elsewhere"})
    for words in (["resume"], ["run", "--", "true"]):
        status, _, err = tell("mission", *words)
        assert (status, "on elsewhere" in err, "--clean-lock" in err) == (4, True, True)
    assert tell("mission", "resume", "--clean-lock")[0] == 0
    assert not lock.exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell")
def test_a_number_that_was_given_again_is_another_process(tell: Tell, folder: Path) -> None:
    write(folder)
    put_lock(folder, **DEAD | {"pid": os.getpid()})
    assert tell("mission", "resume")[0] == 0


def test_a_system_without_proc_says_when_a_process_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """As macOS does, to a second."""
    monkeypatch.setattr(mq, "PROC", Path("/nowhere"))
    process = subprocess.Popen(["sleep", "60"])
    began = mq.process_began(process.pid)
    assert began
    assert re.fullmatch(r"[\w-]+", began)
    time.sleep(1.1)
    assert mq.process_began(process.pid) == began
    process.kill()
    until(lambda: mq.process_began(process.pid) is None)  # a zombie is dead, too
    process.wait()
    assert mq.process_began(process.pid) is None


@pytest.mark.parametrize("text", ["", '{"pid": ', "[]", '{"pid": "x"}', '{"pid": -1}'])
def test_a_lock_without_a_pid_is_broken_on_demand_only(
    tell: Tell, server: Server, folder: Path, text: str
) -> None:
    """Somebody writes it in this moment, or died over that."""
    write(folder)
    lock = folder / HERE / "session.lock"
    lock.write_text(text)
    status, _, err = tell("mission", "run", "--", "true")
    assert (status, "--clean-lock" in err) == (4, True)
    assert "(unknown)" in tell("mission", "status")[1]
    assert tell("mission", "resume", "--clean-lock")[0] == 0
    assert not lock.exists()


def test_a_lock_that_cannot_be_filled_is_taken_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(folder)
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(mq.Refused) as refused:
        asyncio.run(mq.begin_session(file, {"pid": os.getpid()}))
    assert (refused.value.code, "No space left" in refused.value.message) == ("UNFIT", True)
    assert file.read_bytes() == before
    assert sorted(one.name for one in file.parent.iterdir()) == ["mission.json"]


def breaker(file: Path, ready: Any, tried: Any, won: Any) -> None:
    """Try to take the lock at the same moment as the others, and live until all have tried."""
    facts = {**DEAD, "pid": os.getpid(), "process_began": mq.process_began(os.getpid())}

    async def take() -> None:
        await mq.clean_up(mq.Queue(mq.Config()), file)
        await mq.begin_session(file, facts)

    ready.wait(LIMIT)
    try:
        asyncio.run(take())
        won.put(os.getpid())
    except mq.Refused as refused:
        if refused.code != "HELD":
            raise
    tried.wait(LIMIT)


@pytest.mark.parametrize(("breakers", "rounds"), [(2, 20), (3, 15), (20, 5)])
def test_one_breaker_wins(folder: Path, breakers: int, rounds: int) -> None:
    fork = multiprocessing.get_context("fork")
    for _ in range(rounds):
        file = write(folder)
        lock = put_lock(folder, **DEAD)
        ready, tried, won = fork.Barrier(breakers), fork.Barrier(breakers), fork.SimpleQueue()
        racers = [
            fork.Process(target=breaker, args=(file, ready, tried, won)) for _ in range(breakers)
        ]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(2 * LIMIT)
            assert racer.exitcode == 0
        winner = won.get()
        assert won.empty(), "two breakers have both won"
        assert read(folder, "session.lock")["pid"] == winner
        assert [one["pid"] for one in read(folder)["sessions"]] == [winner]
        lock.unlink()
