"""Every error that a server can answer: what it is called here, and who goes on after it.

The first half meets a socket that answers any line one likes, with all first words that stand in
the sources of Valkey 9 and Redis 7; the second brings real servers into the states that they name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import BINARIES, PROGRAM, Server, free_port, key_space, one_engine, until

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
server = one_engine()

# Lines of the sources.  What is sent again until the deadline passes by itself.
LINES = {
    "LOADING Valkey is loading the dataset in memory": ("UNREACHABLE", "it reads its data"),
    "BUSY Valkey is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.":
        ("UNREACHABLE", "SCRIPT KILL"),
    "UNKILLABLE Sorry the script already executed write commands": ("UNREACHABLE", "SCRIPT KILL"),
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.":
        ("UNREACHABLE", "primary"),
    "READONLY You can't write against a read only replica.": ("UNREACHABLE", "primary"),
    "REDIRECT 127.0.0.1:6380": ("UNREACHABLE", "primary"),
    "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)":
        ("UNREACHABLE", "primary"),
    "NOMASTERLINK Can't SYNC while failing over": ("UNREACHABLE", "primary"),
    "INPROG Failover already in progress": ("UNREACHABLE", "primary"),
    "CLUSTERDOWN Hash slot not served": ("UNREACHABLE", "redis+cluster://"),
    "TRYAGAIN Multiple keys request during rehashing of slot": ("UNREACHABLE", "redis+cluster://"),
    "MOVED 3999 127.0.0.1:6381": ("UNREACHABLE", "redis+cluster://"),
    "MOVED": ("UNREACHABLE", "redis+cluster://"),
    "ASK 3999 127.0.0.1:6381": ("UNREACHABLE", "redis+cluster://"),
    "ASK what": ("UNREACHABLE", "redis+cluster://"),
    "ERR Script attempted to access a non local key in a cluster node script: 1, on @user_script":
        ("UNREACHABLE", "redis+cluster://"),
    "ERR max number of clients reached": ("UNREACHABLE", "maxclients"),
    "ERR max number of clients + cluster connections reached": ("UNREACHABLE", "maxclients"),
    "NOREPLICAS Not enough good replicas to write.": ("UNFIT", "min-replicas-to-write"),
    # What does not pass is said at once.
    "NOAUTH Authentication required.": ("UNREACHABLE", "user and password"),
    "NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO":
        ("UNREACHABLE", "user and password"),
    "WRONGPASS invalid username-password pair or user is disabled.":
        ("UNREACHABLE", "user and password"),
    "ERR AUTH <password> called without any password configured for the default user.":
        ("UNREACHABLE", "user and password"),
    "NOPERM User alice has no permissions to run the 'evalsha' command": ("UNFIT", "ACL"),
    "DENIED Running in protected mode because protected mode is enabled": ("UNFIT", "protected"),
    "OOM command not allowed when used memory > 'maxmemory'.": ("UNFIT", "maxmemory"),
    "OOM allow-oom flag is not set on the script, can not run it when used memory > 'maxmemory'":
        ("UNFIT", "maxmemory"),
    "MISCONF Errors writing to the AOF file: No space left on device": ("UNFIT", "disk"),
    "MISCONF Valkey is configured to save RDB snapshots, but it's currently unable to persist":
        ("UNFIT", "disk"),
    "ERR OOM command not allowed when used memory > 'maxmemory'. script: on @user_script:85.":
        ("UNFIT", "maxmemory"),
    "WRONGTYPE Operation against a key holding the wrong kind of value":
        ("UNFIT", "another program"),
    "CROSSSLOT Keys in request don't hash to the same slot": ("UNFIT", "report"),
    "ERR unknown command 'EVALSHA', with args beginning with: 'hunter2' ": ("UNFIT", "command"),
    "ERR Unknown Redis command called from script script: 1, on @user_script:3.":
        ("UNFIT", "command"),
    "ERR DB index is out of range": ("UNFIT", "database"),
    "ERR user_script:7: attempt to index a nil value script: 1, on @user_script:7.":
        ("UNFIT", "doctor"),
    "EXECABORT Transaction discarded because of previous errors.": ("UNFIT", "report"),
    "NOSCRIPT No matching script.": ("UNFIT", "report"),  # to EVAL too
    "ERR syntax error": ("UNFIT", "report"),
    "ERR wrong number of arguments for 'evalsha' command": ("UNFIT", "report"),
    "BUSYGROUP Consumer Group name already exists": ("UNFIT", "report"),
    "BUSYKEY Target key name already exists.": ("UNFIT", "report"),
    "NOGROUP No such consumer group": ("UNFIT", "report"),
    "NOTBUSY No scripts in execution right now.": ("UNFIT", "report"),
    "NOPROTO unsupported protocol version": ("UNFIT", "report"),
    "NOQUORUM 1 usable Sentinels. ": ("UNFIT", "report"),
    "IOERR error or timeout reading to target instance": ("UNFIT", "report"),
    "INVALIDOBJ Corrupted HLL object detected": ("UNFIT", "report"),
    "NOGOODSLAVE No suitable replica to promote": ("UNFIT", "report"),
    "ZZZ a word of tomorrow": ("UNFIT", "report"),
    "no word at all": ("UNFIT", "report"),
    "": ("UNFIT", "report"),
    "ERR \x1b[2Jclear \u202e": ("UNFIT", "report"),
    "ERR " + "long " * 10_000: ("UNFIT", "report"),
}  # fmt: skip


class Answers:
    """A server that says it is Valkey 9, and answers every script with the line of the moment."""

    def __init__(self, folder: Path) -> None:
        self.path, self.line = folder / "answers", ""
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen(64)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(
                    target=self.serve, args=(self.listener.accept()[0],), daemon=True
                ).start()

    def answer(self) -> bytes:
        return b"-" + self.line.encode() + b"\r\n"

    def serve(self, client: socket.socket) -> None:
        info = b"valkey_version:9.0.0\r\nmaxmemory_policy:noeviction\r\n"
        with contextlib.suppress(OSError), client, client.makefile("rb") as lines:
            while head := lines.readline():
                words = []
                for _ in range(int(head[1:])):
                    words.append(lines.read(int(lines.readline()[1:]) + 2)[:-2])
                if words[0] == b"INFO":
                    client.sendall(b"$%d\r\n%s\r\n" % (len(info), info))
                elif words[0] in (b"EVALSHA", b"EVAL"):
                    client.sendall(self.answer())
                else:
                    client.sendall(b"+OK\r\n")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answers]:
    made = Answers(tmp_path_factory.mktemp("answers"))
    yield made
    made.listener.close()


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:20])
async def test_every_error_line_is_a_refusal(answers: Answers, line: str) -> None:
    """With its code, a sentence that can be printed, and a next step; never another exception."""
    code, part = LINES[line]
    answers.line = line
    config = mq.Config(environ={}).set("redis.url", f"unix://{answers.path}", "test")
    async with mq.Queue(config, deadline=0.2) as queue:
        with pytest.raises(mq.Refused) as refused:
            await queue.get("p/T1")
    told = refused.value
    assert told.code == code
    assert part in told.hint
    assert told.passes
    assert str(answers.path) in told.message
    assert line.strip()[:7].partition(" ")[0].removeprefix("\x1b") in told.message
    assert "hunter2" not in told.message
    assert told.message.isprintable()
    assert len(told.message) < 600


def test_no_word_of_the_sources_is_forgotten() -> None:
    """Words that the installed server can begin an error with."""
    text = Path(str(BINARIES["valkey"]())).read_bytes()
    words = {word.decode() for word in re.findall(rb"\x00-([A-Z]{3,}) [\x20-\x7e]{3,}", text)}
    assert len(words) > 25
    tested = {line.partition(" ")[0] for line in LINES}
    assert words - tested - {"NOGOODPRIMARY", "ERR"} == set()


def test_an_unknown_exception_of_the_client_library_is_none() -> None:
    """Every error class of redis-py that a reply can become is caught where replies come in."""
    from redis._parsers.base import BaseParser

    for found in BaseParser.EXCEPTION_CLASSES.values():
        for kind in found.values() if isinstance(found, dict) else [found]:
            assert issubclass(kind, redis.exceptions.RedisError)


# ---- real servers in the states that the lines name ----


async def refusal(call: Callable[[], Awaitable[Any]]) -> mq.Refused:
    with pytest.raises(mq.Refused) as refused:
        await call()
    return refused.value


def queue_of(server: Server, deadline: float = 1) -> mq.Queue:
    config = mq.Config(environ={}).set("redis.url", server.url, "test")
    return mq.Queue(config.set("project", "p", "test"), deadline=deadline)


@contextlib.contextmanager
def full(db: redis.Redis) -> Iterator[None]:
    """The memory is full."""
    db.config_set("maxmemory", "1")
    try:
        yield
    finally:
        db.config_set("maxmemory", "0")


async def test_full_memory(server: Server, db: redis.Redis) -> None:
    """What would take room is refused; running work goes on and ends, and room can be made."""
    async with queue_of(server) as queue:
        for i in range(8):
            await queue.create("p", "m", f"T{i}", title="t")
        for i in range(5):
            await queue.claim(f"T{i}", "alice", ttl=60)
        before = key_space(server)
        with full(db):
            for call in (
                lambda: queue.create("p", "m", "T9", title="t"),
                lambda: queue.claim("T6", "bob"),
                lambda: queue.next("bob"),
                lambda: queue.start("T0"),
                lambda: queue.note("T0", "seen"),
                lambda: queue.block("T0", reason="wait"),
                lambda: queue.update("T6", title="u"),
                lambda: queue.pause(),
                lambda: queue.policy(apply=True),
            ):
                told = await refusal(call)
                assert (told.code, "maxmemory" in told.hint) == ("UNFIT", True), told
            assert key_space(server) == before
            assert "the server's memory is full" in str((await mq.doctor(queue))["findings"])
            assert (await queue.get("T0"))["status"] == "claimed"
            assert (await queue.heartbeat("T0", progress="half"))["status"] == "claimed"
            assert (await queue.release("T1"))["status"] == "pending"
            assert (await queue.complete("T2", summary="done"))["status"] == "completed"
            assert (await queue.fail("T3", reason="no", retry=False))["status"] == "failed"
            assert (await queue.reap())["reaped"] == []
            await queue.delete("T7")
            assert (await queue.purge(older=0))["purged"] == 1
            assert await queue.lead("me", 10, "watchdog")
        await queue.create("p", "m", "T9", title="t")


async def test_a_key_of_another_type_is_named(server: Server, db: redis.Redis) -> None:
    """In a script and in a command, for reads and writes, whichever key it is."""
    root = "mosaic:queue:project:{p}"
    for name, call in {
        root: lambda q: q.get("T1"),
        f"{root}:task:T1": lambda q: q.claim("T1", "bob"),
        f"{root}:ready:any": lambda q: q.next("bob"),
        f"{root}:mission:m": lambda q: q.list(project="p", mission="m"),
        f"{root}:events": lambda q: q.events(project="p"),
        f"{root}:files": lambda q: q.files("p"),
    }.items():
        db.flushall()
        async with queue_of(server) as queue:
            await queue.create("p", "m", "T1", title="t")
            kind = db.type(name)
            db.delete(name)
            db.lpush(name, "x") if kind != "list" else db.set(name, "x")
            told = await refusal(lambda call=call, queue=queue: call(queue))
            assert told.code == "UNFIT"
            assert f"{name} " in told.message, told


async def test_too_few_replicas_and_no_disk(server: Server, db: redis.Redis) -> None:
    async with queue_of(server) as queue:
        await queue.create("p", "m", "T1", title="t")
        db.config_set("min-replicas-to-write", 1)
        told = await refusal(lambda: queue.claim("T1", "bob"))
        assert (told.code, "min-replicas-to-write" in told.hint) == ("UNFIT", True)
        db.config_set("min-replicas-to-write", 0)
        db.config_set("save", "1000 1")
        (server.folder / "dump.rdb").mkdir()  # so that it cannot be replaced
        with contextlib.suppress(redis.ResponseError):
            db.save()
        db.bgsave()
        await until(lambda: db.info("persistence")["rdb_last_bgsave_status"] == "err")
        told = await refusal(lambda: queue.claim("T1", "bob"))
        assert (told.code, "disk" in told.hint) == ("UNFIT", True)
        assert (await queue.get("T1"))["status"] == "pending"
        (server.folder / "dump.rdb").rmdir()
        db.config_set("save", "")
        db.save()
        assert (await queue.claim("T1", "bob"))["status"] == "claimed"


async def test_a_replica_a_script_that_runs_and_too_many_clients(
    server: Server, db: redis.Redis
) -> None:
    """They pass by themselves: the call is sent again, and refused when the deadline is over."""
    async with queue_of(server, deadline=0.5) as queue:
        await queue.create("p", "m", "T1", title="t")
        port = free_port()
        db.replicaof("127.0.0.1", port)
        told = await refusal(lambda: queue.claim("T1", "bob"))
        assert (told.code, "primary" in told.hint) == ("UNREACHABLE", True)
        db.config_set("replica-serve-stale-data", "no")
        told = await refusal(lambda: queue.get("T1"))
        assert (told.code, "primary" in told.hint) == ("UNREACHABLE", True)
        db.replicaof("NO", "ONE")
        db.config_set("replica-serve-stale-data", "yes")
        db.config_set("busy-reply-threshold", 1)
        with server.client() as other:
            runs = threading.Thread(target=run_until_killed, args=(other,))
            runs.start()
            await asyncio.sleep(0.1)
            told = await refusal(lambda: queue.get("T1"))
            assert (told.code, "SCRIPT KILL" in told.hint) == ("UNREACHABLE", True)
            db.script_kill()
            runs.join()
        most = db.config_get("maxclients")["maxclients"]
        db.config_set("maxclients", 1)
        async with queue_of(server, deadline=0.5) as late:
            told = await refusal(lambda: late.get("T1"))
            assert told.code == "UNREACHABLE"
        db.config_set("maxclients", most)
        assert (await queue.claim("T1", "bob"))["status"] == "claimed"


def run_until_killed(client: redis.Redis) -> None:
    with contextlib.suppress(redis.ResponseError):
        client.eval("while true do end", 0)


# ---- whoever lives on ----


async def test_what_lives_on_goes_on_after_full_memory(
    server: Server, db: redis.Redis, tmp_path: Path
) -> None:
    """monitor, mcp, run and events --follow: none ends, and each works on when there is room."""
    environ = {
        **{key: value for key, value in os.environ.items() if not key.startswith("MOSAIC")},
        "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), "MOSAIC_PROJECT": "p",
        "MOSAIC_VALKEY_URL": server.url,
    }  # fmt: skip

    def begin(*words: str) -> subprocess.Popen[str]:
        base = tmp_path / words[0]
        with base.with_suffix(".out").open("w") as out, base.with_suffix(".err").open("w") as err:
            return subprocess.Popen(
                [str(PROGRAM), *words], env=environ, cwd=tmp_path, stdin=subprocess.PIPE,
                stdout=out, stderr=err, text=True,
            )  # fmt: skip

    async with queue_of(server, deadline=60) as queue:
        for task, mission in (("T1", "m"), ("T2", "other"), ("T3", "m")):
            await queue.create("p", mission, task, title="t")
        living = {
            "monitor": begin("monitor"),
            "mcp": begin("mcp"),
            "events": begin("events", "--follow", "--json"),
            "run": begin(
                "run", "--mission", "other", "--agent", "bob", "--ttl", "3", "--",
                "sh", "-c", "while [ ! -e go ]; do sleep 0.1; done",
            ),
        }  # fmt: skip
        try:
            opening = {
                "jsonrpc": "2.0", "id": 1, "method": "initialize",
                "params": {
                    "protocolVersion": "2025-06-18", "capabilities": {},
                    "clientInfo": {"name": "t", "version": "1"},
                },
            }  # fmt: skip
            calls = [
                opening, {"jsonrpc": "2.0", "method": "notifications/initialized"},
                call_of(2, "queue_claim", task="p/T1", agent="alice", ttl=3),
            ]  # fmt: skip
            mcp = living["mcp"].stdin
            assert mcp
            for line in calls:
                mcp.write(json.dumps(line) + "\n")
            mcp.flush()

            async def at(task: str, status: str) -> bool:
                return (await queue.get(task))["status"] == status

            await until(partial(at, "T1", "claimed"))
            await until(partial(at, "T2", "in-progress"))
            with full(db):
                mcp.write(json.dumps(call_of(3, "queue_note", task="p/T1", text="seen")) + "\n")
                mcp.flush()
                await until(lambda: "maxmemory" in (tmp_path / "mcp.out").read_text())
                await asyncio.sleep(4)  # longer than the leases: they are renewed all the same
                assert {name: one.poll() for name, one in living.items()} == dict.fromkeys(living)
                assert await at("T1", "claimed")
                assert await at("T2", "in-progress")
            (tmp_path / "go").write_text("")
            await until(lambda: living["run"].poll() is not None)
            assert living["run"].returncode == 0
            assert await at("T2", "completed")
            await until(lambda: "complete" in (tmp_path / "events.out").read_text())
            done = call_of(4, "queue_complete", task="p/T1", agent="alice", summary="x")
            mcp.write(json.dumps(done) + "\n")
            mcp.flush()
            await until(partial(at, "T1", "completed"))
        finally:
            for one in living.values():
                one.kill()
                one.communicate()


def call_of(number: int, tool: str, **arguments: Any) -> dict[str, Any]:
    """A tool call of MCP."""
    params = {"name": tool, "arguments": arguments}
    return {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": params}
