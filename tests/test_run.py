"""`run -- CMD`: a command under a lease.  Real processes, real signals.

What the commands do is Python on the command line, so that a test says all of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import BINARIES, PROGRAM, Server, ask, one_engine

import mosaic_queue as mq

ROOT = "mosaic:queue:project:{p}"


server = one_engine()


@pytest.fixture
def environ(environ: dict[str, str]) -> dict[str, str]:
    return environ | {"MOSAIC_PROJECT": "p", "MOSAIC_AGENT": "alice"}


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(environ: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """Starts a command line in a process of its own."""
    started = []

    def popen(*words: str, **more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(PROGRAM), *words], env=environ | more, cwd=tmp_path, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield popen
    for process in started:
        process.kill()
        process.communicate()


Tell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(start: Start) -> Tell:
    """`run -- python -c CODE`; its exit status, stdout and stderr."""

    def tell(code: str, *words: str, **more: str) -> tuple[int, str, str]:
        process = start("run", *words, "--", sys.executable, "-c", code, **more)
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in err or "Traceback" in code, err
        return process.returncode, out, err

    return tell


def create(server: Server, *names: str, **rest: Any) -> None:
    rows = [{"taskId": name, "mission": "m", "title": "a task", **rest} for name in names]
    ask(server, "create_all", rows, project="p")


def until(true: Callable[[], Any], limit: float = 60) -> Any:
    give_up = time.monotonic() + limit
    while not (value := true()):
        assert time.monotonic() < give_up, "it did not come true"
        time.sleep(0.02)
    return value


# ---- what the command gets ----

SHOW = """
import json, os, stat
file = os.environ["MOSAIC_TASK_FILE"]
names = [name for name in os.environ if name.startswith("MOSAIC_")]
print(json.dumps({
    "env": {name: os.environ[name] for name in names},
    "mode": stat.S_IMODE(os.stat(file).st_mode), "task": json.load(open(file))}))
"""


def test_the_command_knows_its_task(run: Tell, server: Server) -> None:
    create(server, "T1", description="line\n\u00fcber 'quotes'", metadata={"a": [1]})
    status, out, _ = run(SHOW)
    assert status == 0
    told = json.loads(out)
    env, task = told["env"], told["task"]
    assert env["MOSAIC_PROJECT"] == "p"
    assert env["MOSAIC_TASK_ID"] == "T1"
    assert env["MOSAIC_AGENT"] == task["claimedBy"] == "alice"
    assert int(env["MOSAIC_FENCE"]) == task["fence"]
    assert told["mode"] == stat.S_IRUSR | stat.S_IWUSR, "a task may hold what others may not read"
    assert (task["id"], task["description"]) == ("p/T1", "line\n\u00fcber 'quotes'")
    assert task["metadata"] == {"a": [1]}
    assert not Path(env["MOSAIC_TASK_FILE"]).exists(), "it is gone afterwards"


LOOK_AROUND = "import json, os; print(json.dumps(dict(os.environ)))"


def test_the_command_gets_no_password_of_ours(run: Tell, server: Server, tmp_path: Path) -> None:
    """Unless it is wanted.  What the command's own work needs is passed on."""
    create(server, "T1")
    create(server, "T2")
    (tmp_path / "own.yaml").write_text(
        "http: {tokens: ['${BRAIN}']}\npostgres: {url: 'postgres://u:${PW}@${DB}/d'}\n"
    )
    secrets = {"BRAIN": "s1", "PW": "s2", "PGPASSWORD": "s3", "OPENBRAIN_TOKEN": "s4"}
    others = {"DB": "localhost", "API_KEY": "theirs", "OPENBRAIN_URL": "http://u:s5@b/x?a=1"}
    config = ("--config", "own.yaml")
    env = json.loads(run(LOOK_AROUND, *config, **secrets, **others)[1])
    assert secrets.keys() & env.keys() == set()
    assert (env["DB"], env["API_KEY"]) == ("localhost", "theirs")
    assert "s5" not in env["OPENBRAIN_URL"]
    assert env["MOSAIC_VALKEY_URL"] == server.url
    env = json.loads(run(LOOK_AROUND, *config, "--secrets", **secrets, **others)[1])
    assert env.items() >= (secrets | others).items()


def test_what_a_killed_run_leaves_is_removed_by_the_next(
    start: Start, server: Server, tmp_path: Path
) -> None:
    for name in ("T1", "T2", "T3"):
        create(server, name)
    folder = tmp_path / "mosaic-queue/runs"
    killed = start("run", "--", "sleep", "60")
    until(lambda: folder.exists() and list(folder.iterdir()))
    alive = start("run", "--", "sh", "-c", "until test -e go; do sleep 0.02; done")
    until(lambda: len(list(folder.iterdir())) == 2)
    mode = {stat.S_IMODE(one.stat().st_mode) for one in (folder, *folder.iterdir())}
    assert mode == {0o700, 0o600}
    killed.kill()
    killed.wait()
    third = start("run", "--", "sh", "-c", f"ls {folder}; cat $MOSAIC_TASK_FILE")
    out, _ = third.communicate(timeout=60)
    assert (third.returncode, out.count(".json"), '"taskId"' in out) == (0, 2, True), out
    (tmp_path / "go").touch()
    assert alive.wait(60) == 0
    assert list(folder.iterdir()) == []


def test_a_run_without_a_home_keeps_its_task_in_the_temporary_folder(
    run: Tell, server: Server, tmp_path: Path
) -> None:
    create(server, "T1")
    (tmp_path / "no").touch()
    more = {"XDG_DATA_HOME": str(tmp_path / "no"), "TMPDIR": str(tmp_path)}
    status, out, _ = run("import os; print(os.environ['MOSAIC_TASK_FILE'])", **more)
    assert (status, out.startswith(f"{tmp_path}/mosaic-queue-runs-{os.getuid()}/")) == (0, True)


def test_the_task_is_in_progress_meanwhile(start: Start, server: Server, tmp_path: Path) -> None:
    create(server, "T1")
    code = "import time, pathlib; pathlib.Path('on').touch(); time.sleep(60)"
    start("run", "--", sys.executable, "-c", code)
    until((tmp_path / "on").exists)
    assert until(lambda: ask(server, "get", "T1")["status"] == "in-progress")


def test_the_command_may_use_the_queue_itself(run: Tell, server: Server) -> None:
    """Its environment names project and agent, so `note` and `heartbeat` need no more."""
    create(server, "T1")
    code = f"""
import os, subprocess
for words in (["note", os.environ["MOSAIC_TASK_ID"], "found it"],
              ["heartbeat", os.environ["MOSAIC_TASK_ID"], "--progress", "half"]):
    subprocess.run({[str(PROGRAM)]!r} + words, check=True, capture_output=True)
"""
    assert run(code)[0] == 0
    told = [event["op"] for event in ask(server, "events", task="T1")["events"]]
    assert told == ["create", "claim", "start", "note", "progress", "complete"]


# ---- how it ends ----


def test_the_last_line_of_stdout_is_the_summary(run: Tell, server: Server) -> None:
    create(server, "T1")
    status, out, err = run("print('one'); print('all is well'); print()")
    assert (status, out) == (0, "one\nall is well\n\n"), "output is passed through"
    assert "1 completed" in err
    task = ask(server, "get", "T1")
    assert (task["status"], task["summary"]) == ("completed", "all is well")


def test_silence_is_a_success_too(run: Tell, server: Server) -> None:
    create(server, "T1")
    assert run("pass")[:2] == (0, "")
    assert ask(server, "get", "T1")["status"] == "completed"


def test_the_tail_of_stderr_is_the_reason(run: Tell, server: Server) -> None:
    create(server, "T1")
    code = "import sys; sys.stderr.write('x' * 9000 + '\\nno disk left\\n'); sys.exit(3)"
    status, _, err = run(code)
    assert status == 7
    assert "no disk left" in err, "output is passed through"
    task = ask(server, "get", "T1")
    assert (task["status"], task["retryCount"]) == ("pending", 1)
    assert task["failureReason"].endswith("x\nno disk left")
    assert len(task["failureReason"].encode()) <= 4096


def test_a_silent_failure_says_its_status(run: Tell, server: Server) -> None:
    create(server, "T1")
    assert run("raise SystemExit(9)")[0] == 7
    assert "status 9" in ask(server, "get", "T1")["failureReason"]


def test_a_command_that_kills_itself_has_failed(run: Tell, server: Server) -> None:
    """A signal that nobody sent to `run` is the command's own fault."""
    create(server, "T1")
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")[0] == 7
    task = ask(server, "get", "T1")
    assert (task["status"], task["retryCount"]) == ("pending", 1)
    assert task["failureReason"] == f"{sys.executable} was killed by signal 9 (SIGKILL)"
    assert mq.ending(-63) == "was killed by signal 63"


def test_bytes_that_are_no_text_are_passed_on_and_told(
    start: Start, server: Server, environ: dict[str, str], tmp_path: Path
) -> None:
    create(server, "T1")
    code = "import os; os.write(1, b'\\xff\\xfe\\0end')"
    done = subprocess.run(
        [str(PROGRAM), "run", "--", sys.executable, "-c", code], env=environ, cwd=tmp_path,
        capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, b"\xff\xfe\0end"), done.stderr
    assert ask(server, "get", "T1")["summary"].endswith("end")


def test_a_lot_of_output_does_not_block(run: Tell, server: Server) -> None:
    """More than pipes hold, on both at once; the summary has its limit."""
    create(server, "T1")
    code = "import sys\n"
    code += "for n in range(2000): print('o' * 999); sys.stderr.write('e' * 1000)\n"
    status, out, err = run(code + "print('s' * 100_000)")
    assert status == 0
    assert (len(out), len(err) > 2_000_000) == (2_100_001, True)
    assert 65_000 < len(ask(server, "get", "T1")["summary"]) <= 65_536


def test_nothing_to_do_is_5_and_says_why(run: Tell, server: Server) -> None:
    create(server, "T1", delay=3600)
    status, out, err = run("print('never')")
    assert (status, out) == (5, "")
    assert "due at" in err


def test_a_command_that_is_not_there(start: Start, server: Server) -> None:
    """The task is somebody else's for a while: who just tried would only try again."""
    create(server, "T1", "T2")
    process = start("run", "--loop", "--wait", "5", "--", "./no-such-program", "x")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert "no-such-program" in err
    assert "the task was released, and is due again 60 s later" in err.split("hint: ")[1]
    assert "Traceback" not in err
    task = ask(server, "get", "T1")
    assert (task["status"], task["retryCount"]) == ("pending", 0)
    assert task["notBefore"] > time.time() * 1000 + 10_000
    assert ask(server, "get", "T2")["status"] == "pending"


@pytest.mark.parametrize("words", [["run"], ["run", "--"], ["run", "--loop", "--wait", "3"]])
def test_no_command_is_2(start: Start, server: Server, words: list[str]) -> None:
    create(server, "T1")
    process = start(*words)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("INVALID: ")
    assert ask(server, "get", "T1")["status"] == "pending"


@pytest.mark.parametrize(
    "words", [["--wait", "-1"], ["--wait", "1000000000"], ["--ttl", "0"], ["--lane", "a b"]]
)
def test_wrong_flags_are_2(run: Tell, server: Server, words: list[str]) -> None:
    create(server, "T1")
    assert run("pass", *words)[0] == 2
    assert ask(server, "get", "T1")["status"] == "pending"


def test_an_unknown_lane_is_2(run: Tell, server: Server) -> None:
    create(server, "T1")
    status, _, err = run("pass", "--lane", "welding")
    assert status == 2
    assert "welding" in err


# ---- signals ----

CAREFUL = """
import pathlib, signal, sys, time
def told(number, _):
    pathlib.Path("told").write_text(str(number))
    sys.exit(1)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, told)
pathlib.Path("on").touch()
time.sleep(120)
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_goes_to_the_command_and_the_task_back(
    start: Start, server: Server, tmp_path: Path, sent: signal.Signals
) -> None:
    create(server, "T1", "T2")
    process = start("run", "--loop", "--", sys.executable, "-c", CAREFUL)
    until((tmp_path / "on").exists)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + sent
    assert "Traceback" not in err
    assert (tmp_path / "told").read_text() == str(int(sent))
    for name in ("T1", "T2"):
        task = ask(server, "get", name)
        assert (task["status"], task["retryCount"]) == ("pending", 0)
        assert "claimedBy" not in task


def test_a_command_that_finishes_in_spite_of_a_signal_has_finished(
    start: Start, server: Server, tmp_path: Path
) -> None:
    create(server, "T1")
    process = start("run", "--", sys.executable, "-c", CAREFUL.replace("exit(1)", "exit(0)"))
    until((tmp_path / "on").exists)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert ask(server, "get", "T1")["status"] == "completed"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_waits_ends_it_at_once(
    start: Start, server: Server, db: redis.Redis, sent: signal.Signals
) -> None:
    create(server, "later", delay=3600)
    process = start("run", "--wait", "600", "--loop", "--", "true")
    until(lambda: db.info("clients")["blocked_clients"] == 1)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + sent
    assert "Traceback" not in err


def test_a_signal_at_any_moment_leaves_nothing_held(
    start: Start, server: Server, db: redis.Redis
) -> None:
    """Also between a claim and the start of its command, and while its end is being told."""
    for at in range(0, 1000, mq.BATCH):  # more than it gets done
        create(server, *(f"T{n}" for n in range(at, at + mq.BATCH)))
    rng, held = random.Random(7), []
    for _ in range(8):
        process = start("run", "--loop", "--", "true")
        done = db.zcard(f"{ROOT}:completed")
        until(lambda: db.zcard(f"{ROOT}:completed") > done)  # noqa: B023
        time.sleep(rng.uniform(0, 0.03))
        process.terminate()
        _, err = process.communicate(timeout=60)
        assert (process.returncode, "Traceback" in err) == (143, False), err
        held += db.zrange(f"{ROOT}:running:any", 0, -1)
        db.delete(f"{ROOT}:running:any")
    assert held == []


def test_children_of_the_command_get_the_signal_too(
    start: Start, server: Server, tmp_path: Path
) -> None:
    """Most commands are shells, and the work is a child of theirs."""
    create(server, "T1")
    (tmp_path / "work.py").write_text(CAREFUL)
    script = f"{sys.executable} work.py; exit 1"
    process = start("run", "--", "sh", "-c", script)
    until((tmp_path / "on").exists)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert until((tmp_path / "told").exists)


# ---- the lease ----


def test_the_lease_is_renewed_while_the_command_lives(
    start: Start, server: Server, tmp_path: Path
) -> None:
    create(server, "T1")
    code = """
import pathlib, time
pathlib.Path('on').touch()
while not pathlib.Path('off').exists():
    time.sleep(0.02)
"""
    process = start("run", "--ttl", "4", "--", sys.executable, "-c", code)
    until((tmp_path / "on").exists)
    asked, leases = 0.0, [ask(server, "get", "T1")["leaseExpiresAt"]]
    while asked < leases[0] + 1000:
        asked = time.time() * 1000
        leases.append(ask(server, "get", "T1")["leaseExpiresAt"])
        assert leases[-1] > asked
        time.sleep(0.05)
    (tmp_path / "off").touch()
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(set(leases)) > 2
    task = ask(server, "get", "T1")
    assert task["status"] == "completed"
    assert not {"late", "claimTTL", "leaseExpiresAt"} & task.keys()


def test_a_command_whose_task_is_taken_away_is_stopped_at_once(
    start: Start, server: Server, tmp_path: Path
) -> None:
    """Not when the next renewal is due, which is a third of an hour away."""
    create(server, "T1")
    (tmp_path / "work.py").write_text(CAREFUL)
    process = start("run", "--ttl", "3600", "--", sys.executable, "work.py")
    until((tmp_path / "on").exists)
    ask(server, "block", "T1", reason="stop it", force=True)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 7
    assert "lost" in err
    assert (tmp_path / "told").exists()
    assert ask(server, "get", "T1")["status"] == "blocked"


def test_a_command_whose_lease_is_lost_is_stopped(
    start: Start, server: Server, tmp_path: Path
) -> None:
    """Somebody else has the task by now: two at one task is what a queue is there to prevent."""
    create(server, "T1")
    process = start("run", "--ttl", "2", "--", sys.executable, "-c", CAREFUL)
    until((tmp_path / "on").exists)
    until(lambda: ask(server, "get", "T1")["status"] == "in-progress")
    ask(server, "release", "T1", force=True)
    ask(server, "claim", "T1", "bob")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 7
    assert (tmp_path / "told").read_text() == str(int(signal.SIGTERM))
    assert "T1" in err
    assert "Traceback" not in err
    task = ask(server, "get", "T1")
    assert (task["status"], task["claimedBy"]) == ("claimed", "bob")


# ---- what ends work never loses its result ----

LATE = """
import pathlib, time
pathlib.Path("on").touch()
while not pathlib.Path("off").exists():
    time.sleep(0.02)
print("the page is live")
"""


@contextlib.contextmanager
def server_of_its_own() -> Iterator[Server]:
    """A server that a test may kill, and that keeps what it knows."""
    running = Server(str(BINARIES["valkey"]()), "--appendonly", "yes", "--appendfsync", "always")
    try:
        yield running
    finally:
        running.close()


def test_a_result_waits_for_a_server_that_is_away(start: Start, tmp_path: Path) -> None:
    with server_of_its_own() as server:
        create(server, "T1")
        process = start("run", "--", sys.executable, "-c", LATE, MOSAIC_VALKEY_URL=server.url)
        until((tmp_path / "on").exists)
        server.kill()
        (tmp_path / "off").touch()
        assert process.stderr
        while "trying again" not in (line := process.stderr.readline()):
            assert line, "it gave up"
        server.start()
        process.communicate(timeout=60)
        assert process.returncode == 0
        assert ask(server, "get", "T1")["summary"] == "the page is live"


def run_that_loses_its_server(start: Start, tmp_path: Path) -> str:
    """What `run` says whose command ends when its server is dead."""
    with server_of_its_own() as server:
        create(server, "T1")
        words = ["run", "--ttl", "2", "--", sys.executable, "-c", LATE]
        process = start(*words, MOSAIC_VALKEY_URL=server.url)
        until((tmp_path / "on").exists)
        server.kill()
        (tmp_path / "off").touch()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 6
        return err


def test_a_result_that_nobody_took_is_in_a_file(start: Start, tmp_path: Path) -> None:
    err = run_that_loses_its_server(start, tmp_path)
    (file,) = (tmp_path / "mosaic-queue" / "unsent").iterdir()
    assert f"its summary is in {file}" in err
    kept = json.loads(file.read_text())
    assert (kept["task"], kept["summary"]) == ("p/T1", "the page is live")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_result_that_cannot_be_kept_is_told(start: Start, tmp_path: Path) -> None:
    (tmp_path / "mosaic-queue").mkdir(mode=0o700)
    (tmp_path / "mosaic-queue" / "unsent").touch()
    err = run_that_loses_its_server(start, tmp_path)
    assert "the summary of p/T1 is: the page is live" in err
    assert "Traceback" not in err


def test_a_task_whose_file_cannot_be_written_is_given_back(
    environ: dict[str, str], server: Server, tmp_path: Path
) -> None:
    """As on a full disk."""
    create(server, "T1")
    words = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", PROGRAM, "run", "--", "touch", "ran"]
    done = subprocess.run(
        words, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 6
    assert "cannot be written: File too large" in done.stderr
    assert ask(server, "get", "T1")["status"] == "pending"
    assert not (tmp_path / "ran").exists()


def test_a_lease_that_ran_out_takes_no_result_while_nobody_took_the_task_up(
    start: Start, server: Server, db: redis.Redis, tmp_path: Path
) -> None:
    create(server, "T1")
    process = start("run", "--", sys.executable, "-c", LATE)
    until((tmp_path / "on").exists)
    until(lambda: ask(server, "get", "T1")["status"] == "in-progress")
    held = ask(server, "get", "T1")
    reaped = f"{held['fence']} {held['session']} alice"
    task = {"status": "pending", "reaped": reaped}
    db.zrem(f"{ROOT}:running:any", "T1")  # as `reap` leaves a task
    db.zadd(f"{ROOT}:ready:any", {"T1": 1})
    db.hset(f"{ROOT}:task:T1", mapping=task)
    (tmp_path / "off").touch()
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert ask(server, "get", "T1")["late"]


CHILDREN = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen(["sleep", "600"])
pathlib.Path("pids").write_text(f"{os.getpid()} {child.pid}")
pathlib.Path("on").touch()
time.sleep(600)
"""


def alive(pid: int) -> bool:
    return mq.process_began(pid) is not None


def test_a_run_that_is_killed_leaves_no_command_at_work(
    start: Start, server: Server, tmp_path: Path
) -> None:
    create(server, "T1")
    process = start("run", "--", sys.executable, "-c", CHILDREN)
    until((tmp_path / "on").exists)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(map(alive, pids))
    process.kill()
    until(lambda: not any(map(alive, pids)), limit=5)


# ---- many tasks ----


def test_a_loop_drains_the_queue(run: Tell, server: Server) -> None:
    create(server, "T1", "T2", "T3")
    code = "import os; print('did', os.environ['MOSAIC_TASK_ID'])"
    status, out, err = run(code, "--loop")
    assert (status, out) == (0, "did T1\ndid T2\ndid T3\n")
    assert "nothing is ready: 3 completed, 0 failed, 0 lost" in err


def test_without_loop_one_task_is_done(run: Tell, server: Server) -> None:
    create(server, "T1", "T2")
    assert run("pass")[0] == 0
    assert ask(server, "get", "T2")["status"] == "pending"


def test_a_loop_tries_again_and_ends_with_7(run: Tell, server: Server) -> None:
    create(server, "T1", "T2")
    server.client().hset("mosaic:queue:project:{p}", "limits", "schema=1 retryDelay=0")
    code = "import os, sys; sys.exit(os.environ['MOSAIC_TASK_ID'] == 'T1')"
    status, _, err = run(code, "--loop")
    assert status == 7
    assert "1 completed, 4 failed" in err
    assert ask(server, "get", "T1")["status"] == "failed"
    assert ask(server, "get", "T2")["status"] == "completed"


def test_a_broken_worker_does_not_empty_the_queue(run: Tell, server: Server) -> None:
    """Dead letters are for tasks that are bad, not for a worker that is."""
    create(server, *(f"T{i}" for i in range(20)))
    status, _, err = run("import sys; sys.exit(1)", "--loop", "--max-failures", "3")
    assert status == 7
    assert "3 commands failed in a row: 0 completed, 3 failed, 0 lost" in err


def test_the_pause_after_failures_doubles() -> None:
    pauses = mq.Pauses(1)
    assert [pauses.begin() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_loop_waits_for_a_server_that_fails(
    start: Start, server: Server, db: redis.Redis
) -> None:
    """Between two tasks its memory fills; a command that runs meanwhile loses nothing."""
    create(server, "T1", "T2")
    process = start("run", "--loop", "--", "sh", "-c", "echo begun >&2; sleep 1; echo done")
    assert process.stderr
    assert process.stderr.readline() == "begun\n"
    db.config_set("maxmemory", 1)
    try:
        assert "OOM" in process.stderr.readline()
        assert ask(server, "get", "T1")["summary"] == "done"
    finally:
        db.config_set("maxmemory", 0)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "2 completed, 0 failed, 0 lost" in err


def test_a_loop_waits_for_work(start: Start, server: Server, db: redis.Redis) -> None:
    create(server, "T0")
    process = start("run", "--loop", "--wait", "5", "--", "true")
    until(lambda: db.info("clients")["blocked_clients"] == 1)
    create(server, "T1")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert ask(server, "get", "T1")["status"] == "completed"


def test_a_loop_outlasts_a_pause(start: Start, server: Server) -> None:
    """A pause is longer than --wait, and means that the work goes on later."""
    create(server, "T1")
    ask(server, "pause", project="p")
    process = start("run", "--loop", "--wait", "1", "--", "true")
    assert process.stderr
    assert "project p is paused" in process.stderr.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(4)
    ask(server, "unpause", project="p")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "is paused" not in err, "it is said once"
    assert ask(server, "get", "T1")["status"] == "completed"
    ask(server, "pause", project="p")
    assert start("run", "--", "true").wait(60) == 5  # no loop, no wait


def test_lane_and_mission_are_filters(run: Tell, server: Server) -> None:
    create(server, "P1", lane="planning")
    create(server, "C1", lane="coding")
    code = "import os; print(os.environ['MOSAIC_TASK_ID'])"
    assert run(code, "--lane", "coding", "--loop")[1] == "C1\n"
    assert run(code, "--mission", "none", "--loop")[0] == 5
    assert run(code, "--mission", "m", "--loop")[1] == "P1\n"


# ---- the mission that this program itself came from ----

TASKS_MD = """\
| id | status | description | issue | repo | branch | depends_on | blocks |
|---|---|---|---|---|---|---|---|
| MQ-001 | not-started | Init: pnpm monorepo, TypeScript strict | P1 | queue | f | | MQ-002 |
| MQ-002 | not-started | Connection module with health check | P1 | queue | f | MQ-001 | MQ-003 |
| MQ-003 | not-started | Task CRUD: create, get, list, update | P1 | queue | f | MQ-002 | MQ-004 |
| MQ-004 | not-started | Atomic claim/release/heartbeat | P1 | queue | f | MQ-003 | MQ-005 |
| MQ-005 | not-started | CLI: create/list/show/claim/release | P1 | queue | f | MQ-004 | MQ-006 |
| MQ-006 | not-started | MCP server: queue_list/get/claim | P1 | queue | f | MQ-005 | MQ-007 |
| MQ-007 | not-started | Unit tests for claim atomicity | P1 | queue | f | MQ-006 | MQ-008 |
| MQ-008 | not-started | README, package.json bin entry | P1 | queue | f | MQ-007 | |
"""


def test_a_mission_is_done_in_order_without_a_person(start: Start, server: Server) -> None:
    """Eight tasks in a chain and four agents: each finishing frees the next for whoever waits."""
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in TASKS_MD.splitlines()[2:]]
    tasks = [
        {"taskId": row[0], "mission": "v0.0.1", "title": row[2], "dependencies": row[6].split()}
        for row in rows
    ]
    assert len(tasks) == 8
    ask(server, "create_all", list(reversed(tasks)), project="p")
    code = "import time; time.sleep(0.1)"
    command = ("run", "--loop", "--wait", "2", "--", sys.executable, "-c", code)
    agents = [start(*command, MOSAIC_AGENT=f"agent-{n}") for n in range(4)]
    for agent in agents:
        agent.communicate(timeout=120)
        assert agent.returncode in (0, 5), "5: an agent for whom nothing was left"
    events = ask(server, "events", project="p", since=0, limit=1000)["events"]
    steps = [(one["task"], one["op"]) for one in events if one["op"] in ("claim", "complete")]
    assert steps == [(row[0], op) for row in rows for op in ("claim", "complete")]
    assert {agent.returncode for agent in agents} & {0}
