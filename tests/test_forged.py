"""Forged keys: whatever somebody with access to Valkey has written there, a command says so in a
sentence, a long-lived process goes on, and other projects are served as before.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import Server, Shim, at_work, one_engine, until

import mosaic_queue as mq

pytestmark = pytest.mark.anyio
server = one_engine()
ROOT = "mosaic:queue:project:{p}"
DEEP = '{"a":' * 5000 + "1" + "}" * 5000
DIGITS = "9" * 5000

Forgery = Callable[[redis.Redis], Any]


def another_type(key: str) -> Forgery:
    """A key that holds another kind of value than it should."""

    def forge(db: redis.Redis) -> None:
        kind = db.type(key)
        db.delete(key)
        db.set(key, "x") if kind != "string" else db.sadd(key, "x")

    return forge


def fields(key: str, **values: Any) -> Forgery:
    """Fields of a hash; None takes one away."""

    def forge(db: redis.Redis) -> None:
        for name, value in values.items():
            db.hdel(key, name) if value is None else db.hset(key, name, value)

    return forge


def text(key: str, value: Any) -> Forgery:
    return lambda db: db.set(key, value)


def member(key: str, name: Any, score: float = 1.0) -> Forgery:
    return lambda db: db.zadd(key, {name: score})


def event(value: Any) -> Forgery:
    """An event of the stream, after those that are there."""
    return lambda db: db.xadd(f"{ROOT}:events", {"e": value}, id="999-0")


KEYS = (
    *("task:T1", "text:T1", "work:T1", "summary:done", "waits:T2", "dependents:T1", "ready:any"),
    *("delayed", "running:any", "blocked", "failed", "completed", "mission:m", "unsettled"),
    *(
        "lock:held",
        "assigned:bob",
        "bell:any",
        "inbox:bob",
        "waiting",
        "claimers",
        "files",
        "events",
    ),
)
FORGED: dict[str, Forgery] = {
    "root-type": another_type(ROOT),
    **{f"{name}-type": another_type(f"{ROOT}:{name}") for name in KEYS},
    "registry-type": another_type(mq.REGISTRY),
    "registry-no-ids": lambda db: db.sadd(mq.REGISTRY, "", "a b", "{p}", "x" * 500, "\x1b[2J"),
    "registry-bytes": lambda db: db.sadd(mq.REGISTRY, b"\xff\xfe"),
    "leader-type": lambda db: db.sadd(mq.LEADER, "x"),
    **{
        f"meta-{name}-{kind}": fields(ROOT, **{name: value})
        for name in ("epoch", "rev", "fence", "limits", "lanes", "follow:postgres")
        for kind, value in {
            "none": None, "word": "x", "digits": DIGITS, "bytes": b"\xff", "minus": "-5",
        }.items()
    },
    "limits-digits": fields(ROOT, limits=f"schema=1 claimTTL={DIGITS} maxRetries={DIGITS}"),
    "limits-words": fields(ROOT, limits="schema=1 claimTTL=x paused=y policy=z"),
    "limits-newer": fields(ROOT, limits="schema=99"),
    "lanes-words": fields(ROOT, lanes="any=x coding=-1 =4 ="),
    "lanes-many": fields(ROOT, lanes="any " + " ".join(f"l{n}" for n in range(5000))),
    "follow-short": fields(ROOT, **{"follow:a": "1", "follow:": "1 2 3", "follow:b c": "1 2 3"}),
    **{
        f"{task}-{name}-{kind}": fields(f"{ROOT}:task:{task}", **{name: value})
        for task, names in {
            "T1": ("status", "order", "rev", "lane", "mission", "priority", "updatedAt"),
            "held": ("claimedBy", "claimedAt", "claimTTL", "fence", "session"),
            "done": ("completedAt",), "dead": ("failedAt", "retryCount"),
        }.items()
        for name in names
        for kind, value in {"none": None, "word": "x y", "digits": DIGITS, "bytes": b"\xff"}.items()
    },
    "T1-unknown": fields(f"{ROOT}:task:T1", **{"status": "claimed", "": "", "a\tb": "c\td"}),
    "T1-is-empty": lambda db: db.delete(f"{ROOT}:task:T1"),
    **{
        f"{key}-{kind}": text(f"{ROOT}:{key}:T1", value)
        for key in ("text", "work")
        for kind, value in {
            "empty": "", "no-json": "{", "list": "[1]", "null": "null", "deep": DEEP,
            "numbers": '{"title": 5, "metadata": 7, "dependencies": 8, "progress": [1]}',
            "digits": f'{{"title": {DIGITS}}}', "bytes": b"\xff",
            "nul": r'{"title": "a\u0000b", "description": "\ud800"}',
        }.items()
    },
    "metadata-deep": text(f"{ROOT}:text:T1", json.dumps({"title": "t", "metadata": DEEP})),
    "metadata-digits": text(f"{ROOT}:text:T1", json.dumps(
        {"title": "t", "metadata": f'{{"n": {DIGITS}}}'})),
    "metadata-none": text(f"{ROOT}:text:T1", json.dumps({"title": "t", "metadata": "x"})),
    "event-short": event("T1\tclaim"),
    "event-words": event("T1\tclaim\ta\tb\tc\td\te\tf\tg"),
    "event-digits": event(f"T1\tclaim\t\t\t{DIGITS}\t{DIGITS}\tbob\t{DIGITS}\t"),
    "event-bytes": event(b"T1\tcl\xff"),
    "event-no-id": event("a b\tclaim\tpending\tclaimed\t999\t1\tbob\t1\t"),
    "event-two-fields": lambda db: db.xadd(f"{ROOT}:events", {"a": "b", "c": "d"}, id="999-0"),
    "event-far": lambda db: db.xadd(f"{ROOT}:events", {"e": "x"}, id="18446744073709551615-5"),
    **{
        f"{key}-{kind}": member(f"{ROOT}:{key}", name)
        for key in ("ready:any", "delayed", "running:any", "blocked", "mission:m", "unsettled",
                    "waiting", "failed", "completed", "dependents:T1")
        for kind, name in {"nobody": "nobody", "no-id": "a b\t", "bytes": b"\xff", "": ""}.items()
    },
    "running-never": member(f"{ROOT}:running:any", "held", float("inf")),
    "waits-nobody": lambda db: db.sadd(f"{ROOT}:waits:T2", "nobody", "a b", b"\xff"),
}  # fmt: skip

COMMANDS = """
status
status --project p
list
list --project p --full --limit 50
list --status failed
agents
events
events --project p --since 0
doctor
doctor --project p
show p/T1
show p/held
explain p/T1
explain p/T2
explain --project p
policy --project p
claim p/T1 --agent ann
next --project p --agent ann
note p/T1 hello
update p/T1 --title another
heartbeat p/held
complete p/held --force
fail p/T2 --reason r --force
reap
purge --project p --older 0
export --project p
repair
repair --project p
create p m new --title new
delete p/T1 --force
""".strip().splitlines()


async def populate(queue: mq.Queue) -> None:
    """A project with a task in every status."""
    await queue.create("p", "m", "T1", title="one", description="d", metadata={"a": 1})
    await queue.create("p", "m", "T2", title="two", dependencies=["T1"])
    for name in ("held", "done", "dead", "late"):
        await queue.create("p", "m", name, title=name, delay=60 if name == "late" else None)
    await queue.claim("p/held", "bob")
    await queue.heartbeat("p/held", progress="begun")
    await queue.complete("p/done", force=True, summary="s")
    await queue.fail("p/dead", reason="r", retry=False, force=True)
    await queue.assign(agent="bob", project="p")
    await queue.release("p/T1", force=True)


def said(words: str) -> tuple[int, str]:
    """What a command answers, and its exit status; fails on anything that is no refusal."""
    out, err = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = mq.main(words.split())
    text = []
    for one in (out, err):
        one.flush()
        text.append(one.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return status, "".join(text)


@pytest.fixture
def shell(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment of a command on the module's server."""
    monkeypatch.setenv("MOSAIC_VALKEY_URL", server.url)
    for name in ("HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setitem(mq.Queue.__init__.__kwdefaults__, "deadline", 10)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def dump(server: Server, db: redis.Redis, shell: None) -> dict[bytes, Any]:
    """Two projects, as Valkey can make them again at once."""

    async def fill() -> None:
        async with mq.Queue(mq.load_config()) as queue:
            await populate(queue)
            await queue.create("q", "m", "T1", title="of another project")

    asyncio.run(fill())
    with server.client(decode_responses=False) as raw:
        return {key: raw.dump(key) for key in raw.scan_iter(count=1000)}


@pytest.mark.parametrize("part", range(8))
def test_no_forged_key_ends_a_command_in_a_traceback(
    server: Server, db: redis.Redis, dump: dict[bytes, Any], part: int
) -> None:
    """Each answers, or refuses with a code; doctor and repair come to their end in any case."""
    for name in list(FORGED)[part::8]:
        for words in [*random.Random(name).sample(COMMANDS, 3), "doctor", "repair"]:
            with server.client(decode_responses=False) as raw, raw.pipeline() as pipe:
                pipe.flushall()
                for key, value in dump.items():
                    pipe.restore(key, 0, value)
                pipe.execute()
            FORGED[name](db)
            status, text = said(words)
            assert status in (0, 2, 3, 4, 5, 6, 7), (name, words, text)
            assert "Traceback" not in text, (name, words)
            if words in ("doctor", "repair") and name != "registry-type":
                assert status in (0, 7), (name, words, text)


BROKEN = {  # each is the state of a project of its own
    "root": another_type(ROOT),
    "digits": fields(ROOT, rev=DIGITS, limits=f"schema=1 claimTTL={DIGITS}"),
    "newer": fields(ROOT, limits="schema=99"),
    "lanes": fields(ROOT, lanes="any=x =4"),
    "task": fields(f"{ROOT}:task:held", claimedBy=None, claimTTL="x"),
    "deep": text(f"{ROOT}:text:T1", json.dumps({"title": "t", "metadata": DEEP})),
    "text": text(f"{ROOT}:text:T1", "{"),
    "event": event("T1\tclaim"),
    "stream": another_type(f"{ROOT}:events"),
    "running": another_type(f"{ROOT}:running:any"),
    "waiting": member(f"{ROOT}:waiting", "a b"),
    "claimers": member(f"{ROOT}:claimers", "a", float("inf")),
}


async def test_what_is_wrong_in_one_project_stops_no_other(
    server: Server,
    db: redis.Redis,
    shell: None,
    shim: Shim,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Twelve broken projects and a registry full of nonsense: overviews show the sound one and say
    which they leave out, the monitor ends its leases, gives out its tasks and keeps its files."""
    for name, forge in BROKEN.items():
        async with mq.Queue(mq.load_config()) as queue:
            await populate(queue)
        forge(db)
        for key in list(db.scan_iter(match=f"{ROOT}*", count=1000)):
            db.rename(key, key.replace("{p}", f"{{{name}}}"))
        db.sadd(mq.REGISTRY, name)
    db.srem(mq.REGISTRY, "p")
    db.sadd(mq.REGISTRY, "a b", "{q}", "\x1b[2J", b"\xff\xfe", "x" * 500)
    config = mq.load_config(environ=dict(os.environ))
    config.set("manifests", str(tmp_path / "kept"), "t").set("watchdog.interval", 1, "t")
    async with mq.Queue(config) as queue:
        await queue.create("q", "m", "T1", title="of another project")
        await queue.claim("q/T1", "ann", ttl=1)
        async with at_work(mq.watch_all(queue, assign=True)):
            await until(lambda: db.hget("mosaic:queue:project:{q}:task:T1", "status") == "pending")
            await queue.create("q", "m", "later", title="later")
            kept = tmp_path / "kept" / "q"
            await until(lambda: any("later" in one.read_text() for one in kept.glob("m*")))
            given = await queue.assign(agent="eve", project="q")
            assert given["tasks"]
        for overview in (mq.status(queue), queue.list(limit=100), mq.agents(queue)):
            answer: Any = await overview
            left_out = {one.partition(":")[0] for one in answer["unreadable"]}
            assert {"root", "newer"} <= left_out <= BROKEN.keys()
        shown = {one["project"] for one in (await mq.status(queue))["projects"]}
        assert "q" in shown
    log = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert not [line for line in log if line["event"] == "bug"]
