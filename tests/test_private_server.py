"""The private server: started by the first use, adopted by the rest, safe from every kill.

Each test has a data folder of its own in a short path (a socket's path is bounded), and whatever
server lives there at the end is killed by the id in its pid file.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import PROGRAM

import mosaic_queue as mq

Done = subprocess.CompletedProcess[str]


class Home:
    """A user's empty home, and the command line in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path / "d"
        self.folder = self.data / "mosaic-queue"
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(path),
            "XDG_DATA_HOME": str(self.data),
            "MOSAIC_PROJECT": "p",
        }

    @property
    def socket(self) -> Path:
        """As `server status` says."""
        return Path(json.loads(self.run("server", "status", "--json").stdout)["socket"])

    def spawn(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(PROGRAM), *words], env=self.environ, cwd=self.path, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *words: str) -> Done:
        return subprocess.run(
            [str(PROGRAM), *words], env=self.environ, cwd=self.path, text=True,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False,
        )  # fmt: skip

    def task(self, *words: str) -> dict[str, Any]:
        """The one task of a command's answer."""
        done = self.run(*words, "--json")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout)["tasks"][0])

    def create(self, task: str = "T1") -> Done:
        return self.run("create", "p", "m", task, "--title", "t")

    def pid(self) -> int:
        return int((self.folder / "valkey.pid").read_text())

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        pid = self.pid()
        os.kill(pid, signal.SIGKILL)
        while alive(pid):
            time.sleep(0.01)

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket), decode_responses=True)

    def close(self) -> None:
        with suppress(OSError, ValueError):
            self.kill()
        shutil.rmtree(self.path, ignore_errors=True)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    return ps("stat", pid)[:1] not in ("", "Z")


def ps(what: str, pid: int) -> str:
    done = subprocess.run(
        ["ps", "-o", f"{what}=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def servers_of(folder: Path) -> list[int]:
    """The processes that write this folder's log."""
    log = (folder / "valkey.log").read_text()
    started = {int(line.split(":")[0]) for line in log.splitlines() if "Server initialized" in line}
    return [pid for pid in started if alive(pid)]


def mode(path: Path) -> str:
    return oct(stat.S_IMODE(path.lstat().st_mode))


@pytest.fixture
def home() -> Iterator[Home]:
    made = Home(Path(tempfile.mkdtemp(prefix="mq-", dir="/tmp")))
    yield made
    made.close()


# ---- start and adopt ----


def test_the_first_use_starts_it_and_says_where(home: Home) -> None:
    done = home.create()
    assert done.returncode == 0
    assert done.stderr == f"mosaic-queue: a private Valkey lives in {home.folder}\n"
    first = home.pid()
    done = home.run("claim", "T1", "--agent", "alice")
    assert (done.returncode, done.stderr) == (0, "")
    assert home.pid() == first
    assert "Valkey" in home.run("status").stdout


def test_racing_first_uses_start_exactly_one(home: Home) -> None:
    racers = [
        home.spawn("create", "p", "m", f"T{i}", "--title", "t", "--agent", f"a{i}")
        for i in range(10)
    ]
    said = [racer.communicate(timeout=120) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 10, said
    assert len(servers_of(home.folder)) == 1
    log = (home.folder / "valkey.log").read_text()
    assert log.count("Server initialized") == 1
    assert sum("a private Valkey lives in" in err for _, err in said) == 1
    assert json.loads(home.run("list", "--json").stdout)["total"] == 10


def test_racing_uses_after_a_kill_start_exactly_one(home: Home) -> None:
    for i in range(6):
        home.create(f"T{i}")
    home.kill()
    racers = [home.spawn("claim", f"T{i}", "--agent", f"a{i}") for i in range(6)]
    said = [racer.communicate(timeout=120) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 6, said
    assert len(servers_of(home.folder)) == 1


def test_it_outlives_the_command_in_a_session_of_its_own(home: Home) -> None:
    """Ctrl-C in the terminal and the end of the agent's process group do not reach it."""
    process = subprocess.Popen(
        [str(PROGRAM), "create", "p", "m", "T1", "--title", "t"], env=home.environ, cwd=home.path,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    assert process.wait(60) == 0
    pid = home.pid()
    assert alive(pid)
    group = int(ps("pgid", pid))
    assert group not in (process.pid, os.getpgrp())
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    assert home.task("show", "T1")["status"] == "pending"
    assert home.pid() == pid


def test_it_holds_no_pipe_of_the_command_that_started_it(home: Home) -> None:
    """Else `$(mosaic-queue ...)` would wait for the server's end."""
    done = subprocess.run(
        f"{PROGRAM} create p m T1 --title t 2>&1 | cat", shell=True,
        env=home.environ, cwd=home.path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "pending" in done.stdout
    with open(home.path / "note", "w") as note, subprocess.Popen(
        [str(PROGRAM), "list"], env=home.environ, cwd=home.path, stdout=subprocess.DEVNULL,
        pass_fds=[note.fileno()],
    ) as process:  # fmt: skip
        process.wait(60)
    home.kill()
    read, write = os.pipe()
    with subprocess.Popen(
        [str(PROGRAM), "list"], env=home.environ, cwd=home.path, stdout=subprocess.DEVNULL,
        pass_fds=[write],
    ) as process:  # fmt: skip
        process.wait(60)
    os.close(write)
    os.set_blocking(read, False)
    assert os.read(read, 1) == b""  # the end: nobody else has the other side
    os.close(read)


# ---- kills ----


def test_a_kill_between_any_two_commands_loses_nothing(home: Home) -> None:
    """What was acknowledged is there, and the next command just works; if the server takes a
    while to read its data, it says so."""
    assert home.create().returncode == 0
    steps: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        (("claim", "T1", "--agent", "alice", "--ttl", "600"), {"status": "claimed"}),
        (("start", "T1", "--agent", "alice"), {"status": "in-progress"}),
        (("heartbeat", "T1", "--progress", "half", "--checkpoint", "c"), {"progress": "half"}),
        (("release", "T1", "--agent", "alice"), {"status": "pending"}),
        (("claim", "T1", "--agent", "bob"), {"claimedBy": "bob"}),
        (
            ("fail", "T1", "--agent", "bob", "--reason", "broken", "--retry-delay", "0"),
            {"failureReason": "broken"},
        ),
        (("claim", "T1", "--agent", "carol"), {"claimedBy": "carol", "retryCount": 1}),
        (("complete", "T1", "--agent", "carol", "--summary", "done"), {"summary": "done"}),
    ]
    before = home.task("show", "T1")
    for words, expected in steps:
        home.kill()
        done = home.run(*words)
        assert done.returncode == 0, (words, done.stderr)
        assert done.stderr in ("", "mosaic-queue: the server reads its data\n"), words
        home.kill()
        task = home.task("show", "T1")
        assert expected.items() <= task.items(), words
        assert task["rev"] > before["rev"] or words[0] == "heartbeat"
        assert task.get("fence", 0) >= before.get("fence", 0) or task["status"] == "pending"
        before = task
    assert before["status"] == "completed"


def test_a_kill_in_the_middle_of_a_stream_of_commands(home: Home) -> None:
    """Every create that was acknowledged is there after the kills."""
    home.create("first")
    script = (
        "import asyncio, sys; sys.path.insert(0, sys.argv[1]); import mosaic_queue as mq\n"
        "async def go():\n"
        "    async with mq.Queue() as queue:\n"
        "        for i in range(300):\n"
        "            task = await queue.create('p', 'm', f'N{i}', title='t')\n"
        "            print(task['taskId'], flush=True)\n"
        "asyncio.run(go())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(Path(mq.__file__).parent)], env=home.environ,
        cwd=home.path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout
        told = []
        for line in process.stdout:
            told.append(line.strip())
            if len(told) in (50, 150):
                home.kill()
        assert process.stderr
        assert process.wait(60) == 0, process.stderr.read()
    assert told == [f"N{i}" for i in range(300)]
    assert json.loads(home.run("list", "--json").stdout)["total"] == 301


def test_a_stale_socket_is_no_server(home: Home) -> None:
    home.folder.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(home.folder / "valkey.sock"))
    (home.folder / "valkey.pid").write_text("1\n")
    (home.folder / "lock").write_text("a-host-that-is-gone 12345\n")
    assert home.create().returncode == 0
    assert home.task("show", "T1")["status"] == "pending"


def test_a_torn_log_is_repaired(home: Home) -> None:
    """A crash of the machine may cut the last write off."""
    home.create()
    home.kill()
    (log,) = (home.folder / "appendonlydir").glob("*.incr.aof")
    with log.open("ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$1")
    assert home.task("show", "T1")["status"] == "pending"


# ---- stop and status ----


def test_status_and_stop(home: Home) -> None:
    done = home.run("server", "status", "--json")
    assert done.returncode == 5
    assert json.loads(done.stdout)["running"] is False
    assert not home.folder.exists()  # to ask is no use
    home.create()
    done = home.run("server", "status", "--json")
    assert done.returncode == 0
    facts = json.loads(done.stdout)
    expected = {"running": True, "pid": home.pid(), "folder": str(home.folder)}
    assert expected.items() <= facts.items()
    pid = home.pid()
    done = home.run("server", "stop")
    assert done.returncode == 0
    give_up = time.monotonic() + 60
    while alive(pid):
        assert time.monotonic() < give_up
        time.sleep(0.01)
    assert home.run("server", "stop").returncode == 5
    assert home.run("server", "status").returncode == 5


def test_a_stop_writes_the_data_anew_when_much_has_changed(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the next start reads the data, and not all that ever happened to them."""
    home.create()
    server = mq.PrivateServer(home.folder)
    (log,) = (home.folder / "appendonlydir").glob("*.incr.aof")
    assert server.stop()
    assert log.stat().st_size > 1000
    monkeypatch.setattr(mq, "REWRITE", 1000)
    assert home.task("show", "T1")["status"] == "pending"
    assert server.stop()
    (log,) = (home.folder / "appendonlydir").glob("*.incr.aof")
    assert log.stat().st_size == 0
    assert home.task("show", "T1")["status"] == "pending"


def test_a_server_that_was_stopped_starts_again(home: Home) -> None:
    home.create()
    first = home.pid()
    home.run("server", "stop")
    assert home.task("show", "T1")["status"] == "pending"
    assert home.pid() != first


def test_a_server_that_somebody_shuts_down_starts_again(home: Home) -> None:
    home.create()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(home.socket))
        sock.sendall(b"SHUTDOWN\r\n")
        sock.recv(100)
    assert home.task("show", "T1")["status"] == "pending"


def test_a_server_that_hangs_is_told_and_killed_on_demand(home: Home) -> None:
    """Its tasks are in its folder: another folder helps nobody."""
    home.create()
    pid = home.pid()
    os.kill(pid, signal.SIGSTOP)
    told = f"process {pid} of this host"
    help = "mosaic-queue server stop --force"
    waiting = home.spawn("list")
    status = json.loads(home.run("server", "status", "--json").stdout)
    assert (status["running"], status["pid"]) == (True, pid)
    assert told in status["problem"]
    assert help in status["problem"]
    began = time.monotonic()
    done = home.run("server", "stop")
    assert time.monotonic() - began < 15
    assert (done.returncode, told in done.stderr, help in done.stderr) == (6, True, True)
    out, err = waiting.communicate(timeout=60)
    assert (waiting.returncode, out) == (6, "")
    assert told in err
    assert help in err
    assert "XDG_DATA_HOME" not in err
    assert alive(pid)
    assert home.run("server", "stop", "--force").returncode == 0
    assert home.task("show", "T1")["status"] == "pending"
    assert home.pid() != pid


# ---- two hosts ----

HOLD = """
import fcntl, os, sys
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(lock, fcntl.LOCK_EX)
os.truncate(lock, 0)
os.write(lock, sys.argv[2].encode())
print('held', flush=True)
sys.stdin.read()
"""


def test_a_lock_that_is_held_where_nobody_answers(home: Home) -> None:
    """As on a shared home whose server runs on another host: never two on one folder.  A host
    that is not this one is told at once, before the others; what may be a server that just
    starts, after a while."""
    this = socket.gethostname()
    cases = {
        "node-17 4711\n": "host node-17, process 4711",
        f"{this} 4711\n": f"process 4711 of this host ({this})",
        "": "an unknown host",
    }
    waiting = []
    for i, (told, expected) in enumerate(cases.items()):
        user = Home(home.path / str(i))
        user.folder.mkdir(parents=True)
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(user.folder / "lock"), told],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        process = user.spawn("create", "p", "m", "T1", "--title", "t")
        waiting.append((user, holder, process, expected))
    for n, (user, holder, process, part) in enumerate(waiting):
        out, err = process.communicate(timeout=60)
        if n == 0:
            assert [process.poll() for _, _, process, _ in waiting[1:]] == [None, None]
        assert (process.returncode, out) == (6, "")
        assert err.startswith("UNREACHABLE: ")
        assert part in err.splitlines()[0]
        assert str(user.folder) in err.splitlines()[0]
        assert "hint: " in err
        assert ("XDG_DATA_HOME" in err) == (n == 0)  # another folder would have other tasks
        assert not (user.folder / "appendonlydir").exists()
        holder.communicate()
        try:
            assert user.create().returncode == 0
        finally:
            user.close()


# ---- what it is ----


def test_only_its_user_may_enter(home: Home) -> None:
    os.umask(os.umask(0o022))
    home.create()
    assert mode(home.folder) == "0o700"
    assert mode(home.socket) == "0o700"
    files = [path for path in home.folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"lock", "valkey.log", "valkey.pid"}
    for path in files:
        assert mode(path) == "0o600", path
    for path in home.folder.rglob("*"):
        if path.is_dir():
            assert mode(path) == "0o700", path


def test_a_folder_that_is_open_to_others_is_closed(home: Home) -> None:
    home.folder.mkdir(parents=True, mode=0o755)
    home.folder.chmod(0o777)
    assert home.create().returncode == 0
    assert mode(home.folder) == "0o700"


def test_a_folder_that_cannot_be_made(home: Home) -> None:
    home.data.write_text("a file")
    done = home.create()
    assert done.returncode == 6
    assert done.stderr.startswith(f"UNREACHABLE: {home.folder}")
    assert "Traceback" not in done.stderr


def test_its_settings(home: Home) -> None:
    """Every write is on disk before its answer, nothing is evicted, and no port is open."""
    home.create()
    expected = {
        "appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction",
        "port": "0", "tls-port": "0", "databases": "1", "save": "",
    }  # fmt: skip
    with home.client() as client:
        for name, value in expected.items():
            assert client.config_get(name)[name] == value, name
        assert client.info("persistence")["aof_enabled"] == 1
    facts = json.loads(home.run("status", "--json").stdout)["server"]
    assert facts["backend"] == "private"
    assert facts["evictionPolicy"] == "noeviction"
    if shutil.which("lsof"):
        said = subprocess.run(
            ["lsof", "-nP", "-a", "-i", "-p", str(home.pid())],
            capture_output=True, text=True, check=False,
        ).stdout  # fmt: skip
        assert said == ""


def test_embedded_false_starts_none(home: Home) -> None:
    file = home.path / "queue.yaml"
    file.write_text("embedded: false\n")
    done = home.run("list", "--config", str(file))
    assert done.returncode == 6
    assert "embedded: false" in done.stderr
    assert "--url" in done.stderr
    assert not home.folder.exists()


def test_commands_that_need_no_server_start_none(home: Home) -> None:
    for words in (("--help",), ("version",), ("config",), ("claim", "--help"), ("claim", "a b")):
        home.run(*words)
    assert not home.folder.exists()


# ---- long paths ----


def test_a_long_path_puts_the_socket_elsewhere(home: Home) -> None:
    """A socket's path holds 108 bytes on Linux and 104 on macOS."""
    long = home.path / ("x" * 60) / ("y" * 60)
    long.mkdir(parents=True)
    home.folder = long / "mosaic-queue"
    home.environ["XDG_DATA_HOME"] = str(long)
    assert home.create().returncode == 0
    path = home.socket
    try:
        assert len(str(path)) <= 100
        assert path.is_socket()
        assert mode(path.parent) == "0o700"
        assert (home.folder / "appendonlydir").is_dir()
        first = home.pid()
        assert home.task("show", "T1")["status"] == "pending"
        assert home.pid() == first
        home.kill()
        assert home.task("show", "T1")["status"] == "pending"
    finally:
        home.run("server", "stop")
        shutil.rmtree(path.parent)


def test_a_home_of_120_characters(home: Home) -> None:
    """Without XDG_DATA_HOME the folder is ~/.local/share/mosaic-queue."""
    long = home.path / ("x" * (120 - len(str(home.path)) - 1))
    long.mkdir()
    home.environ["HOME"] = str(long)
    del home.environ["XDG_DATA_HOME"]
    home.folder = long / ".local/share/mosaic-queue"
    assert home.create().returncode == 0
    path = home.socket
    try:
        assert (home.folder / "appendonlydir").is_dir()
        assert len(str(path)) <= 100
    finally:
        home.run("server", "stop")
        shutil.rmtree(path.parent)


def test_a_folder_of_somebody_else_is_not_used(home: Home) -> None:
    """Anybody may make a directory in /tmp before we do."""
    if os.getuid():
        pytest.fail("needs root to give a folder away; run the tests in a container")
    home.folder.mkdir(parents=True)
    os.chown(home.folder, 12345, 12345)
    done = home.create()
    assert done.returncode == 6
    assert "belongs to another user (uid 12345)" in done.stderr
    assert not (home.folder / "appendonlydir").exists()


def test_a_link_in_place_of_the_sockets_folder_is_not_followed(home: Home) -> None:
    """In /tmp a link of another user could lead the socket into a folder of his choice."""
    long = home.path / ("x" * 60) / ("y" * 60)
    home.environ["XDG_DATA_HOME"] = str(long)
    home.folder = long / "mosaic-queue"
    path = home.socket.parent
    target = home.path / "target"
    target.mkdir()
    path.symlink_to(target)
    if os.getuid() == 0:
        os.chown(path, 12345, 12345, follow_symlinks=False)
    try:
        done = home.create()
        assert done.returncode == 6, done.stdout
        assert list(target.iterdir()) == []
    finally:
        home.run("server", "stop")
        path.unlink()


# ---- found by its lock ----


def test_the_lock_names_the_server_that_lives(home: Home) -> None:
    """After kill -9 the old pid file is still there when the new server starts."""
    for _ in range(3):
        home.create()
        facts = json.loads(home.run("server", "status", "--json").stdout)
        assert facts["pid"] == home.pid()
        assert (home.folder / "lock").read_text() == f"{socket.gethostname()} {home.pid()}\n"
        assert alive(home.pid())
        home.kill()
        assert home.run("server", "status").returncode == 5


@pytest.mark.parametrize("what", ["socket", "folder"])
def test_a_server_whose_socket_is_gone(home: Home, what: str) -> None:
    """As after a cleaned /tmp: it is ended cleanly and started again, and nothing is lost."""
    if what == "folder":
        long = home.path / ("x" * 60) / ("y" * 60)
        home.environ["XDG_DATA_HOME"] = str(long)
        home.folder = long / "mosaic-queue"
    home.create()
    first, path = home.pid(), home.socket
    shutil.rmtree(path.parent) if what == "folder" else path.unlink()
    facts = json.loads(home.run("server", "status", "--json").stdout)
    assert (facts["running"], facts["pid"]) == (True, first)
    assert home.task("show", "T1")["status"] == "pending"
    assert not alive(first)
    assert "User requested shutdown" in (home.folder / "valkey.log").read_text()
    second = home.pid()
    path.unlink()
    assert home.run("server", "stop").returncode == 0
    assert not alive(second)
    assert home.run("server", "stop").returncode == 5
    assert home.task("show", "T1")["status"] == "pending"
    home.run("server", "stop")
    if what == "folder":
        shutil.rmtree(path.parent)


def test_the_place_of_the_socket_is_one(home: Home) -> None:
    """Whatever a login sets or does not set: a cron job and a terminal use one server."""
    long = home.path / ("x" * 60) / ("y" * 60)
    home.environ["XDG_DATA_HOME"] = str(long)
    home.folder = long / "mosaic-queue"
    home.create()
    first, path = home.pid(), home.socket
    for name in ("XDG_RUNTIME_DIR", "TMPDIR"):
        home.environ[name] = str(home.path)
        assert home.task("show", "T1")["status"] == "pending"
        assert (home.pid(), home.socket) == (first, path)
    home.run("server", "stop")
    shutil.rmtree(path.parent)


# ---- whose it is ----


def needs_root() -> None:
    if os.getuid():
        pytest.fail("needs root to act as another user; run the tests in a container")


def test_a_server_of_another_user_is_not_talked_to(home: Home) -> None:
    """In the folder that would be ours, and in a folder of ours through a socket of his."""
    needs_root()
    theirs = home.path / "theirs"
    theirs.mkdir(mode=0o777)
    theirs.chmod(0o777)
    home.path.chmod(0o755)
    server = subprocess.Popen(
        [mq.server_binary(), "--port", "0", "--unixsocket", str(theirs / "valkey.sock"),
         "--unixsocketperm", "777", "--save", "", "--dir", str(theirs)],
        user=12345, group=12345, extra_groups=[], stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not (theirs / "valkey.sock").exists():
            time.sleep(0.02)
        home.data.mkdir()
        theirs.rename(home.folder)
        for owner, part in (
            (12345, "belongs to another user (uid 12345)"),
            (os.getuid(), "runs as another user (uid 12345)"),
        ):
            os.chown(home.folder, owner, -1)
            for words in (("create", "p", "m", "T1", "--title", "secret"), ("list",), ("status",)):
                done = home.run(*words)
                assert (done.returncode, done.stdout) == (6, ""), words
                assert done.stderr.startswith("UNFIT: ")
                assert part in done.stderr
                assert "hint: " in done.stderr
        with redis.Redis(unix_socket_path=str(home.folder / "valkey.sock")) as spy:
            told = spy.info("commandstats")
            assert not {"cmdstat_ping", "cmdstat_eval", "cmdstat_evalsha"} & set(told)
    finally:
        server.kill()
        server.wait()


# ---- a disk that is full ----


def test_a_full_disk_is_said_as_such(home: Home) -> None:
    """The server ends at a write that it cannot keep; it is not started again and again."""
    needs_root()
    home.data.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", home.data], check=True)
    try:
        assert home.create().returncode == 0
        with suppress(OSError), (home.data / "filler").open("wb") as filler:
            while True:
                filler.write(bytes(4096))
                filler.flush()
        for _ in range(2):
            done = home.run("create", "p", "m", "T2", "--title", "t", "--description", "x" * 60_000)
            assert done.returncode == 6
            assert done.stderr.startswith("UNFIT: ")
            assert f"the disk of {home.folder} is full" in done.stderr
        log = (home.folder / "valkey.log").read_text()
        assert log.count("Server initialized") <= 2
        (home.data / "filler").unlink()
        assert home.create("T3").returncode == 0
        assert home.task("show", "T1")["status"] == "pending"
    finally:
        home.run("server", "stop")
        subprocess.run(["umount", "-l", home.data], check=True)


# ---- places ----


def test_places_that_are_not_there(home: Home) -> None:
    """No home, a working directory that was deleted, a home that is read-only, a relative
    XDG_DATA_HOME: a sentence that helps, or it simply works; with --url it always does."""
    needs_root()
    server = Home(home.path / "other")
    for folder in (server.path, home.path / "locked", home.path / "gone"):
        folder.mkdir()
    server.create()
    url = f"unix://{server.socket}"
    enter = (
        "mount -t tmpfs -o ro tmpfs locked && cd gone && rmdir ../gone"
        ' && exec unshare --map-user=54321 "$@"'
    )

    def run(*words: str, **environ: str) -> Done:
        """In a deleted folder, as a user whom the system does not know."""
        (home.path / "gone").mkdir(exist_ok=True)
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", enter, "sh", str(PROGRAM), *words], cwd=home.path,
            env={"PATH": os.environ["PATH"], "MOSAIC_PROJECT": "p"} | environ, text=True,
            capture_output=True, timeout=120, check=False,
        )  # fmt: skip

    try:
        for environ in ({}, {"HOME": ""}, {"HOME": "relative"}, {"XDG_DATA_HOME": "relative"}):
            assert run("list", "--url", url, "--json", **environ).returncode == 0
            done = run("list", **environ)
            assert done.returncode == 6, done.stderr
            assert done.stderr.startswith("UNFIT: there is no home folder")
            assert "XDG_DATA_HOME" in done.stderr
        done = run("list", HOME=str(home.path / "locked"))
        assert done.returncode == 6
        assert "Read-only file system\nhint: name folders of yours: XDG_DATA_HOME" in done.stderr
        done = run("server", "status", "--json", HOME=str(home.path), XDG_DATA_HOME="relative")
        assert json.loads(done.stdout)["folder"] == str(home.path / ".local/share/mosaic-queue")
    finally:
        server.close()
